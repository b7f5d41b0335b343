"""Does each graph compute what the model's own layers compute, where neither fits into memory as a whole?

The eager pruned model runs first, its weights read layer by layer. Then every graph of the bundle runs alone
on what the eager model had there, with its weights mapped from the bundle, and is let go before the next.
What this does not see is how differences add up from stage to stage and over an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.torch_graphs import TorchBackend
from vla_autoprune import contract
from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import ParityError
from vla_autoprune.export.eager import EagerRun, encode_eager, run_eager
from vla_autoprune.frame import FloatArray, IntArray
from vla_autoprune.models.adapter import StageModel
from vla_autoprune.recipe import Bucket


@dataclass(frozen=True)
class StageParityReport:
    """What was compared, and the largest differences.

    Attributes:
        bucket: in which everything ran.
        errors: per graph, the largest difference of an output over its largest value; of a stage, that of
            the last prompt row in decoding as well.
    """

    bucket: str
    errors: Mapping[str, float]


def check_stages(
    bundle: Bundle,
    model: StageModel,
    pixel_values: FloatArray,
    token_ids: IntArray,
    length: int,
    *,
    tolerance: float,
    progress: Callable[[int, int], None] | None = None,
) -> StageParityReport:
    """Compare graph by graph in the bucket that prunes most.

    Args:
        bundle: the bundle.
        model: the original; its weights may stay in files.
        pixel_values: [c, 3, h, w] normalised.
        token_ids: [N] prompt, padded to the layout's length.
        length: tokens before the padding.
        tolerance: largest difference allowed, over the largest value.
        progress: called with layers done and to do, of the model and of the bundle; the head is one more.

    Returns:
        The differences.

    Raises:
        ParityError: a difference is too large, or a selection keeps other tokens; the graph is named.
    """
    recipe = bundle.recipe
    bucket = min(recipe.buckets, key=lambda bucket: bucket.work_fraction)
    layers = recipe.model.layers
    total = 2 * layers + 1

    def say(done: int) -> None:
        if progress is not None:
            progress(done, total)

    say(0)
    encoded = encode_eager(model, recipe, pixel_values)
    one_token = recipe.model_copy(update={"decode_length": 1})
    eager = run_eager(
        model, one_token, bucket, token_ids, length, *encoded[:2], deepstack=encoded[2], progress=say
    )
    check = _Check(bundle, bucket, tolerance)
    vision = check.run(contract.VISION, contract.ONLY, {"pixel_values": pixel_values})
    for name, wanted in zip(("features", "encoder_score", "deepstack"), encoded, strict=True):
        if wanted is not None:
            check.compare(contract.VISION, name, vision[name].reshape(wanted.shape), wanted)
    rows = _prompt_rows(bundle, token_ids, length, encoded)
    for stage, of_stage in enumerate(recipe.stages):
        say(layers + of_stage.start)
        rows = _check_stage(check, stage, rows, eager, length)
    say(2 * layers)
    last = eager.hidden[-1][len(eager.hidden[-1]) - (recipe.layout.length - length) - 1]
    logits = check.run(contract.HEAD, contract.ONLY, {"hidden": last[None, None]})["logits"]
    check.compare(contract.HEAD, "logits", logits[0], eager.logits[0])
    say(total)
    return StageParityReport(bucket.name, check.errors)


class _Check:
    """Runs one graph at a time and notes how far its outputs are from the original's."""

    def __init__(self, bundle: Bundle, bucket: Bucket, tolerance: float) -> None:
        self.bundle, self.bucket, self.tolerance = bundle, bucket, tolerance
        self.errors: dict[str, float] = {}

    def run(self, graph: str, variant: str, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs of a graph; inputs that are not given are 0. Its weights are mapped while it runs."""
        described = self.bundle.graphs[graph]
        backend = TorchBackend(self.bundle)
        tensors: dict[str, Tensor] = {}
        for name, shape in described.shapes(variant).items():
            dtype = next(tensor.dtype for tensor in described.tensors if tensor.name == name)
            tensors[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
            if name in given:
                tensors[name].copy_(torch.from_numpy(np.array(given[name])))
        try:
            backend.bind(graph, variant, tensors)()
        finally:
            backend.close()
        half = torch.float16, torch.bfloat16
        return {
            tensor.name: (held.float() if held.dtype in half else held).numpy()
            for tensor in described.outputs
            for held in (tensors[tensor.name],)
        }

    def compare(self, graph: str, what: str, found: NDArray[Any], wanted: NDArray[Any]) -> None:
        """Note a difference, or refuse it."""
        error = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
        if not error <= self.tolerance:
            raise ParityError(
                f"{graph} (bucket {self.bucket.name}): {what} differs by {error:.2e} of its largest value, "
                f"allowed is {self.tolerance:.0e}; the export does not compute what the model computes"
            )
        self.errors[graph] = max(self.errors.get(graph, 0.0), error)


def _prompt_rows(
    bundle: Bundle,
    token_ids: IntArray,
    length: int,
    encoded: tuple[FloatArray, FloatArray | None, FloatArray | None],
) -> dict[str, NDArray[Any]]:
    """What goes into stage 0, and stays with the rows from there on, by tensor name."""
    recipe, layout = bundle.recipe, bundle.recipe.layout
    features, encoder_score, deepstack = encoded
    hidden = np.array(bundle.embedding()[token_ids])
    hidden[layout.visual_positions] = features
    rotary = bundle.rotary()[: layout.length]
    rows: dict[str, NDArray[Any]] = {
        "hidden": hidden[None],
        "cos": rotary[None, :, 0],
        "sin": rotary[None, :, 1],
        "text_rows": layout.suffix_rows,
        "text_weight": (layout.suffix_rows < length).astype(np.float32),
        "other_rows": layout.text_positions,
        "visual_rows": layout.visual_positions,
        "camera": layout.camera_of_visual,
        "floors": np.array([recipe.camera_floors.get(camera, 0) for camera in layout.cameras]),
    }
    if encoder_score is not None:
        rows["encoder_score"] = encoder_score
    if deepstack is not None:
        rows["deepstack"] = np.zeros((len(deepstack), *hidden.shape), dtype=np.float32)
        rows["deepstack"][:, layout.visual_positions] = deepstack
    return rows


def _check_stage(
    check: _Check, stage: int, rows: dict[str, NDArray[Any]], eager: EagerRun, length: int
) -> dict[str, NDArray[Any]]:
    """Check a stage in prefill and decode and the selection after it; gives the rows of the next stage."""
    recipe, bucket, graph = check.bundle.recipe, check.bucket, contract.stage_name(stage)
    given = {name: values for name, values in rows.items() if name not in ("other_rows", "camera", "floors")}
    made = check.run(graph, contract.prefill_variant(stage, bucket.name), given)
    check.compare(graph, "hidden", made["hidden_out"][0], eager.hidden[stage])
    if stage < len(eager.scores):
        check.compare(graph, "score", made["score"], eager.scores[stage])
    if stage == 0:
        difference = abs(float(made["complexity"][0]) - eager.complexity)
        if not difference <= check.tolerance * max(1.0, eager.complexity):
            raise ParityError(
                f"{graph}: complexity is {difference:.2e} bits off, buckets would be chosen wrongly"
            )
    _check_decode(check, stage, rows, made, eager, length)
    if stage == len(eager.scores):
        return rows
    following = {**rows, "hidden": eager.hidden[stage][None], "score": eager.scores[stage]}
    name = contract.selection_graph(recipe, bucket, stage)
    if name is None:
        return following
    selected = check.run(name, contract.point_variant(stage, bucket.name), following)
    kept = eager.kept_visual[stage][selected["kept"]]
    if not np.array_equal(kept, eager.kept_visual[stage + 1]):
        raise ParityError(
            f"{name} (bucket {bucket.name}, pruning point {stage}): keeps other visual tokens than the "
            f"original, {np.setdiff1d(kept, eager.kept_visual[stage + 1])[:5].tolist()} among them"
        )
    check.errors.setdefault(name, 0.0)
    return {**rows, **{key[:-4]: value for key, value in selected.items() if key.endswith("_out")}}


def _check_decode(
    check: _Check,
    stage: int,
    rows: dict[str, NDArray[Any]],
    made: Mapping[str, NDArray[Any]],
    eager: EagerRun,
    length: int,
) -> None:
    """The prompt's last row once more, as if it were generated: from the keys and values of those before."""
    recipe, graph = check.bundle.recipe, contract.stage_name(stage)
    variant = contract.decode_variant(check.bucket.name)
    last = rows["hidden"].shape[1] - (recipe.layout.length - length) - 1
    slots = check.bundle.graphs[graph].shapes(variant)
    given: dict[str, NDArray[Any]] = {
        name: rows[name][..., last : last + 1, :]
        for name in ("hidden", "cos", "sin", "deepstack")
        if name in rows
    }
    given |= {"text_weight": np.ones(1, np.float32), "encoder_score": np.ones(1, np.float32)}
    given["past_length"] = np.array([last])
    for name, shape in slots.items():
        if name.startswith(("past_k_", "past_v_")):
            given[name] = np.zeros(shape, dtype=np.float32)
            given[name][:, :, :last] = made[name.replace("past", "new")][:, :, :last]
    again = check.run(graph, variant, given)
    check.compare(graph, "hidden of a decoded token", again["hidden_out"][0], eager.hidden[stage][last][None])
