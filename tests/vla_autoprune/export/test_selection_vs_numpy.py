"""The selection graphs, traced and run in ONNX Runtime, against the numpy arithmetic of `pruning`."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from vla_autoprune import contract
from vla_autoprune.export.export import trace
from vla_autoprune.pruning.merging import group_tokens, merge_sources
from vla_autoprune.pruning.selection import select_top

WIDTH, HEAD_DIM, TEXT_BEFORE, TEXT_AFTER = 32, 8, 2, 4


@pytest.fixture(scope="module")
def sessions(tiny_vla, tiny_recipes):
    from vla_autoprune.models.adapter import LlavaAdapter

    model = LlavaAdapter(tiny_vla.model)
    made = {}
    for recipe, name in (
        (tiny_recipes["plain"], contract.SELECT),
        (tiny_recipes["rich"], contract.SELECT_MERGE),
    ):
        graph = next(graph for graph in contract.graphs(recipe, 512) if graph.name == name)
        proto = trace(model, recipe, graph, 23)
        made[name] = onnxruntime.InferenceSession(
            proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    return made


def sequence(visual: int, seed: int) -> dict[str, np.ndarray]:
    """Text around two images, one text row between them."""
    generator = np.random.default_rng(seed)
    half = visual // 2
    visual_rows = np.concatenate([np.arange(half), half + 1 + np.arange(visual - half)]) + TEXT_BEFORE
    rows = TEXT_BEFORE + visual + 1 + TEXT_AFTER
    other_rows = np.setdiff1d(np.arange(rows), visual_rows)
    return {
        "hidden": generator.normal(size=(1, rows, WIDTH)).astype(np.float32),
        "cos": generator.normal(size=(1, rows, HEAD_DIM)).astype(np.float32),
        "sin": generator.normal(size=(1, rows, HEAD_DIM)).astype(np.float32),
        "score": generator.random(visual).astype(np.float32),
        "text_rows": other_rows[-TEXT_AFTER:],
        "other_rows": other_rows,
        "visual_rows": visual_rows,
    }


def run(session, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def check_order(feed, out, slots, hidden):
    rows = np.sort(np.concatenate([feed["other_rows"], feed["visual_rows"][slots]]))
    assert np.array_equal(out["kept"], slots)
    assert np.array_equal(out["hidden_out"], hidden[:, rows])
    assert np.array_equal(out["cos_out"], feed["cos"][:, rows])
    assert np.array_equal(out["sin_out"], feed["sin"][:, rows])
    for name in ("text_rows", "other_rows"):
        assert np.array_equal(rows[out[f"{name}_out"]], feed[name])
    assert np.array_equal(rows[out["visual_rows_out"]], feed["visual_rows"][slots])


@pytest.mark.parametrize("visual,count,seed", [(12, 5, 0), (40, 39, 1), (7, 1, 2)])
def test_selection_keeps_the_best_in_their_order(sessions, visual, count, seed):
    feed = sequence(visual, seed)
    out = run(sessions[contract.SELECT], {**feed, "keep": np.zeros(count, np.float32)})
    check_order(feed, out, select_top(feed["score"], count), feed["hidden"])


def test_ties_go_to_the_lower_slot(sessions):
    feed = sequence(30, 3)
    feed["score"] = np.repeat(np.float32([0.2, 0.7, 0.2]), 10)
    out = run(sessions[contract.SELECT], {**feed, "keep": np.zeros(14, np.float32)})
    assert out["kept"].tolist() == [0, 1, 2, 3, *range(10, 20)]


@pytest.mark.parametrize("seed", range(6))
def test_recovery_merges_into_the_centres_slots(sessions, seed):
    visual, keep, candidates, groups = 60, 11, 17, 4
    feed = sequence(visual, seed)
    feed["hidden"] += 5.0  # what all tokens share must not cost digits of their distances
    # Mutual nearest neighbours, far from the rest: their densities tie exactly.
    feed["hidden"][0, feed["visual_rows"][1]] = feed["hidden"][0, feed["visual_rows"][0]] + 0.01
    floors, camera = np.array([0, 3, 0, 0, 0, 0]), np.arange(visual) // 10
    out = run(
        sessions[contract.SELECT_MERGE],
        {
            **feed,
            "camera": camera,
            "floors": floors,
            "keep": np.zeros(keep, np.float32),
            "candidates": np.zeros(candidates, np.float32),
            "groups": np.zeros(groups, np.float32),
        },
    )
    kept = select_top(feed["score"], keep, camera, {1: 3})
    sources = merge_sources(feed["score"], kept, candidates)
    grouping = group_tokens(feed["hidden"][0, feed["visual_rows"][sources]], groups, size_epsilon=0.0)
    slots = np.sort(np.concatenate([kept, sources[grouping.centres]]))
    assert (camera[kept] == 1).sum() >= 3
    assert np.array_equal(out["kept"], slots)
    assert np.array_equal(out["camera_out"], camera[slots])
    expected = feed["hidden"].copy()
    expected[0, feed["visual_rows"][sources[grouping.centres]]] = grouping.merged
    rows = np.sort(np.concatenate([feed["other_rows"], feed["visual_rows"][slots]]))
    assert np.abs(out["hidden_out"] - expected[:, rows]).max() < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_scores_that_are_not_finite_never_lead_out_of_range(sessions, bad: float, share: float) -> None:
    feed = sequence(12, seed=5)
    feed["score"][: round(12 * share)] = bad
    feed["keep"] = np.zeros(5, np.float32)
    kept = run(sessions[contract.SELECT], feed)["kept"]
    assert len(set(kept.tolist())) == 5
    assert kept.min() >= 0 and kept.max() < 12
    if share < 1:
        assert kept.min() >= 6  # those with a score come first


def test_hidden_states_that_are_not_finite_never_lead_merging_out_of_range(sessions) -> None:
    feed = sequence(12, seed=6)
    feed["hidden"][:] = np.nan
    feed |= {"camera": np.arange(12) // 2, "floors": np.zeros(6, dtype=np.int64)}
    lengths = {"keep": 4, "candidates": 5, "groups": 2}
    feed |= {name: np.zeros(length, np.float32) for name, length in lengths.items()}
    found = run(sessions[contract.SELECT_MERGE], feed)["kept"]
    assert len(set(found.tolist())) == 6
    assert found.min() >= 0 and found.max() < 12
