"""Backends against what the original model left in a bundle's samples, and faults that verify must notice."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from engines.onnxruntime import OnnxRuntimeBackend
from engines.verify import Gates, read_sample, text_rows, verify_bundle, write_sample
from vla_autoprune import contract
from vla_autoprune.errors import BundleError, ParityError, PlanError


class Faulty(OnnxRuntimeBackend):
    """A backend with a fault in one output of one graph, in one variant."""

    def __init__(self, bundle, graph, variant, tensor, fault) -> None:
        super().__init__(bundle, threads=1)
        self.where, self.tensor, self.fault = (graph, variant), tensor, fault

    def bind(self, graph, variant, tensors):
        run = super().bind(graph, variant, tensors)
        if (graph, variant) != self.where:
            return run

        def wrong() -> None:
            run()
            tensors[self.tensor][...] = self.fault(tensors[self.tensor])

        return wrong


@pytest.mark.parametrize("name", ["plain", "rich"])
@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_backends_agree_with_the_original(sampled_bundles, name, kind):
    from engines.backends import open_backend

    bundle = sampled_bundles[name]
    report = verify_bundle(bundle, open_backend(kind, bundle, threads=1), Gates(1 - 1e-6, 1e-4))
    assert report.failed == () and report.worst.distance < 1e-4
    recipe = bundle.recipe
    per_bucket = len(recipe.stages) + 2 * len(recipe.pruning_points) + 1
    assert len(report.agreements) == len(recipe.buckets) * per_bucket + 2
    assert {row.tensor for row in report.agreements} == {
        "features",
        "complexity",
        "hidden",
        "score",
        "kept",
        "logits",
    }


@pytest.mark.parametrize(
    "fault,cosine_fails",
    [(lambda value: value * 1.02, False), (lambda value: np.roll(value, 1, axis=-1), True)],
    ids=["longer", "turned"],
)
def test_each_gate_sees_what_the_other_does_not(sampled_bundles, fault, cosine_fails):
    bundle = sampled_bundles["plain"]
    backend = Faulty(bundle, "stage_02", "b40_s0/prefill", "hidden_out", fault)
    report = verify_bundle(bundle, backend)
    first = report.failed[0]
    assert (first.graph, first.tensor, first.bucket) == ("stage_02", "hidden", "b40_s0")
    assert (first.cosine < 0.9999) == cosine_fails
    assert (abs(first.norm_ratio - 1) > 0.01) != cosine_fails
    assert all(row.bucket == "b40_s0" for row in report.failed)
    assert verify_bundle(bundle, backend, Gates(-1, 10)).failed == ()


def test_what_is_not_a_number_fails_and_is_the_worst(sampled_bundles):
    def spoil(value):
        value = value.copy()
        value[0, -1, 3] = np.nan  # a row whose keys no later row reads
        return value

    bundle = sampled_bundles["plain"]
    backend = Faulty(bundle, "stage_02", "full/prefill", "hidden_out", spoil)
    with pytest.raises(PlanError, match="logits contain NaN or infinity; weights or images are not finite"):
        verify_bundle(bundle, backend)
    backend = Faulty(bundle, "vision", "only", "features", lambda value: value * np.float32(np.inf))
    with pytest.raises(PlanError, match="complexity of stage_00 is nan"):
        verify_bundle(bundle, backend)


def test_a_fault_in_decoding_shows_in_the_logits(sampled_bundles):
    bundle = sampled_bundles["plain"]
    backend = Faulty(bundle, "stage_01", "b60_s0/decode", "new_v_01", lambda value: -value)
    report = verify_bundle(bundle, backend)
    assert {(row.graph, row.tensor, row.bucket) for row in report.failed} == {("head", "logits", "b60_s0")}
    assert report.worst.graph == "head"


def test_other_tokens_count_by_their_scores(sampled_bundles):
    bundle = sampled_bundles["plain"]
    bucket = next(b for b in bundle.recipe.buckets if contract.selection_graph(bundle.recipe, b, 1))
    backend = Faulty(bundle, "stage_01", f"{bucket.name}/prefill", "score", lambda value: value[::-1].copy())
    report = verify_bundle(bundle, backend)
    tensors = {row.tensor for row in report.failed if row.bucket == bucket.name}
    assert "score" in tensors and "kept" in tensors
    kept = next(row for row in report.failed if row.tensor == "kept")
    assert kept.graph == "stage_01" and kept.norm_ratio == 1.0 and kept.cosine < 0.9999


def test_a_run_is_compared_up_to_where_a_tie_was_broken_otherwise(sampled_bundles):
    """Either token may be kept at a tie; what follows is not what the original had, and no fault."""
    bundle = sampled_bundles["plain"]
    sample = read_sample(bundle.path / "samples" / "sample_00.npz", bundle)
    bucket = next(b for b in bundle.recipe.buckets if contract.selection_graph(bundle.recipe, b, 0))
    answer = sample.answers[bucket.name]
    score, kept = answer.scores[0], answer.kept[1]
    dropped = np.setdiff1d(answer.kept[0], kept)
    last, first = kept[score[kept].argmin()], dropped[score[dropped].argmax()]
    distance = float((score[last] - score[first]) / np.abs(score).max())

    def swap(value):
        value[[last, first]] = value[[first, last]]
        return value

    backend = Faulty(bundle, "stage_00", "prefill", "score", swap)
    for tie, fails in ((1.01 * distance, False), (0.99 * distance, True)):
        report = verify_bundle(bundle, backend, Gates(tie=tie, min_cosine=0.5))
        mine = [row for row in report.agreements if row.bucket == bucket.name]
        assert [row.tensor for row in mine] == ["hidden", "score", "kept"]
        assert [row.passed for row in mine] == [True, True, not fails]
        assert report.cut_short >= 1
        assert [row.tensor for row in report.agreements if row.bucket == "full"].count("logits") >= 1


def test_text_rows_are_found_whatever_was_dropped(sampled_bundles):
    layout = sampled_bundles["plain"].recipe.layout
    everything = text_rows(layout, np.arange(layout.visual_tokens), layout.length)
    assert np.isin(everything, layout.text_positions).all()
    assert everything[-1] == layout.length - 1
    nothing = text_rows(layout, np.arange(0), layout.length)
    assert nothing[-1] == layout.text_tokens - 1 and len(nothing) == len(everything)
    assert text_rows(layout, np.arange(0), layout.length - 3)[-1] == layout.text_tokens - 4


def test_samples_survive_a_round_trip(sampled_bundles, tmp_path):
    bundle = sampled_bundles["plain"]
    sample = read_sample(bundle.path / "samples" / "sample_00.npz", bundle)
    write_sample(tmp_path / "again.npz", sample)
    again = read_sample(tmp_path / "again.npz", bundle)
    for name, answer in sample.answers.items():
        assert all(
            np.array_equal(a, b) for a, b in zip(answer.hidden, again.answers[name].hidden, strict=True)
        )
    stored = (bundle.path / "samples" / "sample_00.npz").read_bytes()
    assert (tmp_path / "again.npz").read_bytes() == stored  # equal samples are equal bytes


def test_a_bundle_without_samples_is_refused(stored_bundle):
    with pytest.raises(ParityError, match=r"has no recorded samples.*--weights memory --overwrite"):
        verify_bundle(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1))


def test_samples_that_are_none_are_named(sampled_bundles, tmp_path):
    bundle = sampled_bundles["plain"]
    path = tmp_path / "sample_00.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(BundleError, match=r"sample_00\.npz is not a recorded sample"):
        read_sample(path, bundle)
    np.savez(path, pixel_values=np.array([{}], dtype=object))
    with pytest.raises(BundleError, match=r"is not a recorded sample \(Object arrays cannot be loaded"):
        read_sample(path, bundle)
    np.savez(path, pixel_values=np.zeros(3))
    with pytest.raises(BundleError, match="has no array token_ids"):
        read_sample(path, bundle)
    sample = read_sample(bundle.path / "samples" / "sample_00.npz", bundle)
    write_sample(path, dataclasses.replace(sample, token_ids=sample.token_ids[1:]))
    with pytest.raises(BundleError, match=r"\[123\] tokens|\[\d+\] tokens, the recipe asks for"):
        read_sample(path, bundle)


def test_an_edited_sample_is_refused_when_the_bundle_is_loaded(sampled_bundles, tmp_path):
    from vla_autoprune.bundle import load_bundle

    folder = shutil.copytree(sampled_bundles["plain"].path, tmp_path / "bundle")
    path = folder / "samples" / "sample_00.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"sample_00\.npz has been edited or belongs to another bundle"):
        load_bundle(folder)
