"""Scores, selection, grouping and host-side policies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_autoprune.pruning.merging import group_tokens, merge_counts, merge_sources
from vla_autoprune.pruning.policies import random_scores, uniform_scores
from vla_autoprune.pruning.selection import fused_scores, select_top, text_scores
from vla_autoprune.pruning.work import kv_mib, prefill_flops, published_macs
from vla_autoprune.recipe import ModelShape


def test_text_scores_leave_padding_out_and_know_two_reductions() -> None:
    attention = np.random.default_rng(0).random((3, 4, 5))
    weight = np.array([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(text_scores(attention, weight), attention[:, [0, 2]].mean(axis=(0, 1)))
    np.testing.assert_allclose(text_scores(attention, weight, "max"), attention[:, [0, 2]].max(axis=(0, 1)))
    np.testing.assert_allclose(text_scores(attention, np.ones(4)), text_scores(attention))
    with pytest.raises(ValueError, match="one of them above 0"):
        text_scores(attention, np.zeros(4))


def test_fused_scores_ignore_the_scale_of_either_part() -> None:
    text, encoder = np.array([1.0, 2.0, 3.0]), np.array([5.0, 1.0, 1.0])
    np.testing.assert_allclose(fused_scores(text, encoder, 0.5), fused_scores(100 * text, encoder / 7, 0.5))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_select_top_keeps_order_and_breaks_ties_by_index(values: list[int], data: st.DataObject) -> None:
    scores = np.array(values, dtype=np.float32)
    count = data.draw(st.integers(0, len(scores)))
    kept = select_top(scores, count)
    wanted = sorted(sorted(range(len(values)), key=lambda slot: (-values[slot], slot))[:count])
    assert kept.tolist() == wanted


def test_camera_floors_come_first() -> None:
    scores = np.array([9.0, 8.0, 7.0, 6.0, 1.0, 2.0])
    camera = np.array([0, 0, 0, 0, 1, 1])
    assert select_top(scores, 3, camera, {1: 1}).tolist() == [0, 1, 5]
    assert select_top(scores, 3, camera, {1: 2}).tolist() == [0, 4, 5]
    with pytest.raises(ValueError, match="camera floors ask for 2"):
        select_top(scores, 1, camera, {1: 2})


@pytest.mark.parametrize("count", [-1, 4])
def test_a_count_out_of_range_is_named(count: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot keep {count} of 3 visual tokens; allowed: 0\.\.3"):
        select_top(np.zeros(3), count)


def test_scores_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match="score of visual slot 1 is not finite"):
        select_top(np.array([0.0, np.nan, 1.0]), 1)


@settings(max_examples=60)
@given(count=st.integers(1, 30), seed=st.integers(0, 500), data=st.data())
def test_groups_cover_every_token_and_average_it(count: int, seed: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, count))
    tokens = np.random.default_rng(seed).standard_normal((count, 6))
    grouping = group_tokens(tokens, groups, size_epsilon=0.0)
    assert sorted(set(grouping.group_of_token.tolist())) == list(range(groups))
    assert grouping.group_of_token[grouping.centres].tolist() == list(range(groups))
    for group in range(groups):
        members = tokens[grouping.group_of_token == group]
        np.testing.assert_allclose(grouping.merged[group], members.mean(axis=0), rtol=1e-9, atol=1e-12)


def test_identical_tokens_are_grouped_by_index() -> None:
    grouping = group_tokens(np.ones((5, 4)), 2)
    assert grouping.centres.tolist() == [0, 1]
    assert grouping.group_of_token.tolist() == [0, 1, 0, 0, 0]


def test_merge_counts_and_sources() -> None:
    assert [merge_counts(dropped) for dropped in (0, 1, 4, 30, 34, 100)] == [
        (0, 0), (1, 1), (2, 1), (10, 2), (11, 2), (31, 4),
    ]  # fmt: skip
    scores = np.array([5.0, 1.0, 4.0, 1.0, 3.0])
    assert merge_sources(scores, np.array([0, 2]), 2).tolist() == [4, 1]


def test_random_scores_depend_on_the_frame_only() -> None:
    first = random_scores(216, "frame-a")
    assert first.dtype == np.float32 and sorted(first.tolist()) == list(range(1, 217))
    assert (first == random_scores(216, "frame-a")).all()
    assert (first != random_scores(216, "frame-b")).any()
    assert (first != random_scores(216, "frame-a", seed=1)).any()


@pytest.mark.parametrize("grids", [[(6, 6)] * 6, [(4, 8), (5, 3)]])
def test_uniform_scores_thin_out_every_camera_alike(grids: list[tuple[int, int]]) -> None:
    scores = uniform_scores(grids)
    sizes = [rows * columns for rows, columns in grids]
    camera = np.repeat(np.arange(len(grids)), sizes)
    assert len(set(scores.tolist())) == sum(sizes)
    for count in range(1, sum(sizes) + 1):
        kept = np.bincount(camera[select_top(scores, count)], minlength=len(grids))
        shares = kept / sizes
        assert shares.max() - shares.min() <= 1 / min(sizes) + 1e-9


def test_uniform_scores_spread_over_the_image() -> None:
    """A quarter of an 8 x 8 grid leaves exactly one token in every 2 x 2 block."""
    kept = select_top(uniform_scores([(8, 8)]), 16)
    blocks = {(slot // 8 // 2, slot % 8 // 2) for slot in kept.tolist()}
    assert len(blocks) == 16


def test_work_counts_causal_grouped_query_attention() -> None:
    decoder = ModelShape(id="x", weights_sha256="0" * 64, layers=2, hidden=8, heads=4, kv_heads=2, ffn=16)
    rows = 5
    projections = 2 * rows * 8 * (8 + 4 + 4 + 8)
    scored_pairs = rows * (rows + 1) // 2
    attention = 2 * 2 * 4 * 2 * scored_pairs
    feed_forward = 2 * rows * 3 * 8 * 16
    assert prefill_flops(decoder, [rows]) == projections + attention + feed_forward
    assert published_macs(decoder, [rows]) == 4 * 5 * 64 + 2 * 25 * 8 + 3 * 5 * 8 * 16
    assert kv_mib(decoder, [1024, 1024]) == 2 * 1024 * 2 * 2 * 2 * 4 / 2**20
