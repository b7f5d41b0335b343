"""A bundle's graphs wired into prefill and decode; all memory and bindings are made beforehand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_autoprune import contract
from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import PlanError
from vla_autoprune.frame import FloatArray, IntArray
from vla_autoprune.recipe import Bucket
from vla_autoprune.runtime.backend import Backend, Buffer

_SEQUENCE = ("hidden", "cos", "sin", "text_rows", "other_rows", "visual_rows", "camera")
"""What describes the rows of the sequence, and changes when rows are dropped."""

_UNCHANGED = (
    "text_weight",
    "encoder_score",
    "score",
    "complexity",
    "keep",
    "candidates",
    "groups",
    "floors",
    "kept",
)

Inspect = Callable[[int, Callable[[str], NDArray[Any]]], None]
"""Called with a stage and a function that reads one of its outputs by name."""

ChooseBucket = Callable[[float], Bucket]
"""From the complexity of stage 0 to the bucket of the rest."""


@dataclass(frozen=True)
class Prefill:
    """What a prefill gives.

    Attributes:
        bucket: the bucket it ran in.
        complexity: information of stage 0 in bits.
        logits: [vocabulary] of the last prompt token.
        kept_visual: per stage, indices (0..V-1) of the visual tokens that entered it.
    """

    bucket: Bucket
    complexity: float
    logits: FloatArray
    kept_visual: tuple[IntArray, ...]


class Timings:
    """Milliseconds per step; a step that runs again adds up."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        """Time a block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.ms[step] = self.ms.get(step, 0.0) + 1e3 * (time.perf_counter() - begin)


@dataclass(frozen=True)
class _Place:
    """A tensor's shape and the memory it lives in; places of one key share it."""

    key: str
    shape: tuple[int, ...]
    dtype: contract.ElementType


@dataclass(frozen=True)
class _Step:
    """A graph in one variant, with the place of every tensor."""

    graph: str
    variant: str
    places: dict[str, _Place]


@dataclass
class _Answer:
    """The prompt that decoding continues."""

    bucket: Bucket
    prompt_length: int
    filled: list[int]
    """Filled KV slots per stage."""
    generated: int = 0


class Pipeline:
    """Runs a bundle: encode images, prefill a prompt, decode token by token.

    Args:
        bundle: a checked bundle.
        backend: runs its graphs.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.recipe = bundle.recipe
        self.graphs = bundle.graphs
        self.backend = backend
        self.embedding = bundle.embedding()
        self.rotary = bundle.rotary()
        self.stages = self.recipe.stages
        self._vision = self._wire_only(contract.VISION)
        self._head = self._wire_only(contract.HEAD)
        self._prefill = {bucket.name: self._wire_prefill(bucket) for bucket in self.recipe.buckets}
        self._decode = {bucket.name: self._wire_decode(bucket) for bucket in self.recipe.buckets}
        steps = [self._vision, self._head]
        steps += [step for chain in (*self._prefill.values(), *self._decode.values()) for step in chain]
        self._elements = _elements(steps)
        self._memory = {key: backend.allocate(*size) for key, size in self._elements.items()}
        self._views = {
            place: backend.view(self._memory[place.key], place.shape)
            for step in steps
            for place in step.places.values()
        }
        self._runs = {
            (step.graph, step.variant): backend.bind(
                step.graph, step.variant, {name: self._views[place] for name, place in step.places.items()}
            )
            for step in {(step.graph, step.variant): step for step in steps}.values()
        }
        self._write_constants()
        layout = self.recipe.layout
        self.pixels: FloatArray = np.zeros(self._vision.places["pixel_values"].shape, dtype=np.float32)
        """[c, 3, h, w] host memory to fill before `encode`."""
        self._text = np.zeros((layout.text_tokens, self.recipe.model.hidden), dtype=np.float32)
        self._weight = np.zeros(len(layout.suffix_rows), dtype=np.float32)
        self._filled = np.zeros(1, dtype=np.int64)
        self._answer: _Answer | None = None

    def encode(self, timings: Timings) -> None:
        """Run the vision graph on `pixels`."""
        with timings.of("vision"):
            self.backend.write(self._buffer(self._vision, "pixel_values"), self.pixels)
            self._run(self._vision)

    def features(self) -> tuple[FloatArray, FloatArray]:
        """[1, V, d] features and [V] encoder scores of the last `encode`, on the host."""
        return self._read(self._vision, "features"), self._read(self._vision, "encoder_score")

    def prefill(
        self,
        token_ids: IntArray,
        length: int,
        choose: ChooseBucket,
        timings: Timings,
        ranking: FloatArray | None = None,
        inspect: Inspect | None = None,
    ) -> Prefill:
        """Run the prompt through the stages, on the features of the last `encode`.

        Args:
            token_ids: [N] of the layout's length; those at visual positions are ignored.
            length: tokens before the padding.
            choose: picks the bucket from the complexity.
            timings: receives embed, stage_XX, select_XX, head and their sum prefill.
            ranking: [V] scores that replace the stages' own at every pruning point.
            inspect: shown the outputs of every stage, to find where a difference begins.

        Returns:
            Logits and what happened.

        Raises:
            PlanError: complexity, logits, or scores that choose tokens are not finite.
        """
        begin = time.perf_counter()
        self._answer = None
        with timings.of("embed"):
            self._embed_prompt(token_ids, length)
        first = self._prefill[self.recipe.buckets[0].name][0]
        with timings.of(first.graph):
            self._run(first)
        complexity = float(self._read(first, "complexity")[0])
        if not np.isfinite(complexity):
            raise self._not_finite(f"complexity of {first.graph} is {complexity}")
        bucket = choose(complexity)
        steps = self._prefill[bucket.name]
        visual: IntArray = np.arange(self.recipe.layout.visual_tokens)
        kept = [visual]
        filled: list[int] = []
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if step.graph.startswith("stage"):
                stage = len(filled)
                if stage:
                    with timings.of(step.graph):
                        self._run(step)
                if inspect is not None:
                    inspect(stage, partial(self._read, step))
                filled.append(self._store(step, stage, bucket, length))
                if following is not None and following.graph.startswith("stage"):
                    kept.append(visual)
                elif following is not None and ranking is not None:
                    self.backend.write(self._buffer(step, "score"), ranking[visual])
            else:
                with timings.of(f"select_{len(filled) - 1:02d}"):
                    self._run(step)
                if not np.isfinite(self._read(step, "score").sum()):
                    raise self._not_finite(f"scores of {contract.stage_name(len(filled) - 1)} are not finite")
                visual = visual[self._read(step, "kept")]
                kept.append(visual)
        last = self._buffer(steps[-1], "hidden_out")
        with timings.of("head"):
            logits = self._logits(last, filled[-1] - 1)
        timings.ms["prefill"] = timings.ms.get("prefill", 0.0) + 1e3 * (time.perf_counter() - begin)
        self._answer = _Answer(bucket, length, filled)
        return Prefill(bucket, complexity, logits, tuple(kept))

    def decode(self, token: int, timings: Timings) -> FloatArray:
        """Append a token to the prompt and run it through the stages.

        Args:
            token: the token generated last.
            timings: receives decode_stage_XX, decode_head and their sum decode.

        Returns:
            [vocabulary] logits of the next token.

        Raises:
            PlanError: there is no prompt, the answer is as long as the recipe allows, or logits are not
                finite.
        """
        answer = self._answer
        if answer is None:
            raise PlanError("nothing to decode: run a prefill first")
        if answer.generated + 1 >= self.recipe.decode_length:
            raise PlanError(
                f"answer has {answer.generated + 1} tokens and no end; the recipe's decode_length is "
                f"{self.recipe.decode_length}"
            )
        begin = time.perf_counter()
        steps = self._decode[answer.bucket.name]
        self.backend.write(self._buffer(steps[0], "hidden"), self.embedding[token][None, None])
        for stage, step in enumerate(steps):
            with timings.of(f"decode_{step.graph}"):
                compact = self.recipe.positions == "compact"
                position = answer.filled[stage] if compact else answer.prompt_length + answer.generated
                self.backend.write(self._buffer(step, "cos"), self.rotary[None, position : position + 1, 0])
                self.backend.write(self._buffer(step, "sin"), self.rotary[None, position : position + 1, 1])
                self._filled[0] = answer.filled[stage]
                self.backend.write(self._buffer(step, "past_length"), self._filled)
                self._run(step)
                for layer in self.stages[stage]:
                    for kind in "kv":
                        new = self._buffer(step, f"new_{kind}_{layer:02d}")
                        past = self._buffer(step, f"past_{kind}_{layer:02d}")
                        self.backend.move_rows(new, 0, past, answer.filled[stage], 1)
                answer.filled[stage] += 1
        with timings.of("decode_head"):
            logits = self._logits(self._buffer(steps[-1], "hidden_out"), 0)
        answer.generated += 1
        timings.ms["decode"] = timings.ms.get("decode", 0.0) + 1e3 * (time.perf_counter() - begin)
        return logits

    def _embed_prompt(self, token_ids: IntArray, length: int) -> None:
        suffix = self.recipe.layout.suffix_rows
        if token_ids.shape != (self.recipe.layout.length,) or not suffix[0] < length <= len(token_ids):
            raise PlanError(
                f"prompt has {length} of {len(token_ids)} tokens; the recipe's layout has "
                f"{self.recipe.layout.length}, of which the first {suffix[0] + 1} at least are not padding"
            )
        first = self._prefill[self.recipe.buckets[0].name][0]
        hidden, features = self._buffer(first, "hidden"), self._buffer(self._vision, "features")
        row = visual = 0
        for span in self.recipe.layout.segments:
            count = span[-1]
            if span[0] == "visual":
                self.backend.move_rows(features, visual, hidden, row, count)
                visual += count
            else:
                np.take(self.embedding, token_ids[row : row + count], axis=0, out=self._text[:count])
                self.backend.write(hidden, self._text[None, :count], row)
            row += count
        np.less(suffix, length, out=self._weight)
        self.backend.write(self._buffer(first, "text_weight"), self._weight)

    def _store(self, step: _Step, stage: int, bucket: Bucket, length: int) -> int:
        """Copy a stage's new keys and values into the bucket's caches; returns the filled slots."""
        rows = step.places["hidden"].shape[1]
        decode = self._decode[bucket.name][stage]
        for layer in self.stages[stage]:
            for kind in "kv":
                new = self._buffer(step, f"new_{kind}_{layer:02d}")
                past = self._buffer(decode, f"past_{kind}_{layer:02d}")
                self.backend.move_rows(new, 0, past, 0, rows)
        return rows - (self.recipe.layout.length - length)

    def _logits(self, hidden: Buffer, row: int) -> FloatArray:
        self.backend.move_rows(hidden, row, self._buffer(self._head, "hidden"), 0, 1)
        self._run(self._head)
        logits = self._read(self._head, "logits")[0]
        # The sum is finite only if every logit is; it needs no memory.
        if not np.isfinite(logits.sum()):
            raise self._not_finite("logits contain NaN or infinity")
        return logits

    def _not_finite(self, what: str) -> PlanError:
        """Caches are cleared: a NaN in a slot that a mask hides would still spoil the next frame."""
        self._answer = None
        for key, buffer in self._memory.items():
            if key.startswith("cache"):
                self.backend.write(buffer, np.zeros(self._elements[key][0], dtype=np.float32))
        return PlanError(f"{what}; weights or images are not finite, the frame has no plan")

    def _buffer(self, step: _Step, name: str) -> Buffer:
        return self._views[step.places[name]]

    def _read(self, step: _Step, name: str) -> NDArray[Any]:
        return self.backend.read(self._buffer(step, name))

    def _run(self, step: _Step) -> None:
        self._runs[step.graph, step.variant]()

    def _wire_only(self, name: str) -> _Step:
        return self._step(
            name,
            contract.ONLY,
            {tensor.name: tensor.name for tensor in self.graphs[name].tensors}
            | ({"hidden": "head_hidden"} if name == contract.HEAD else {}),
        )

    def _wire_prefill(self, bucket: Bucket) -> list[_Step]:
        """Stages and selections in turn; outputs alternate between two places, as inputs are still read."""
        steps: list[_Step] = []
        keys = {name: f"start_{name}" for name in _SEQUENCE} | {name: name for name in _UNCHANGED}
        selections = 0
        for stage, layers in enumerate(self.stages):
            keys |= {"hidden_out": f"stage_out_{stage % 2}", "past_length": "zero"}
            for layer in layers:
                for kind in "kv":
                    keys[f"past_{kind}_{layer:02d}"] = "empty"
                    keys[f"new_{kind}_{layer:02d}"] = f"new_{kind}_{layer - layers.start}"
            steps.append(
                self._step(contract.stage_name(stage), contract.prefill_variant(stage, bucket.name), keys)
            )
            keys["hidden"] = keys["hidden_out"]
            if stage + 1 == len(self.stages):
                break
            graph = contract.selection_graph(self.recipe, bucket, stage)
            if graph is not None:
                selected = {name: f"selected_{name}_{selections % 2}" for name in _SEQUENCE}
                keys |= {f"{name}_out": key for name, key in selected.items()}
                steps.append(self._step(graph, contract.point_variant(stage, bucket.name), keys))
                keys |= selected
                selections += 1
        return steps

    def _wire_decode(self, bucket: Bucket) -> list[_Step]:
        """Stages over the bucket's caches; what only ranking needs is a dummy of length one."""
        steps: list[_Step] = []
        for stage, layers in enumerate(self.stages):
            keys = {name: f"token_{name}" for name in ("cos", "sin", "past_length")}
            keys |= {"hidden": f"token_{stage % 2}", "hidden_out": f"token_{(stage + 1) % 2}"}
            keys |= {"text_rows": "zero", "visual_rows": "zero", "text_weight": "one", "encoder_score": "one"}
            keys |= {"score": "unused_score", "complexity": "unused_complexity"}
            for layer in layers:
                for kind in "kv":
                    keys[f"past_{kind}_{layer:02d}"] = f"cache_{kind}_{layer:02d}"
                    keys[f"new_{kind}_{layer:02d}"] = f"token_{kind}_{layer - layers.start}"
            steps.append(self._step(contract.stage_name(stage), contract.decode_variant(bucket.name), keys))
        return steps

    def _step(self, name: str, variant: str, keys: dict[str, str]) -> _Step:
        graph = self.graphs[name]
        shapes = graph.shapes(variant)
        places = {
            tensor.name: _Place(keys[tensor.name], shapes[tensor.name], tensor.dtype)
            for tensor in graph.tensors
        }
        return _Step(name, variant, places)

    def _write_constants(self) -> None:
        layout = self.recipe.layout
        floors = [self.recipe.camera_floors.get(camera, 0) for camera in layout.cameras]
        constants: dict[str, NDArray[Any]] = {
            "start_text_rows": layout.suffix_rows,
            "start_other_rows": layout.text_positions,
            "start_visual_rows": layout.visual_positions,
            "start_camera": layout.camera_of_visual,
            "start_cos": self.rotary[: layout.length, 0].reshape(-1),
            "start_sin": self.rotary[: layout.length, 1].reshape(-1),
            "floors": np.array(floors, dtype=np.int64),
            "one": np.ones(1, dtype=np.float32),
        }
        for key, values in constants.items():
            if key in self._memory:
                self.backend.write(self._memory[key], values)


def _elements(steps: list[_Step]) -> dict[str, tuple[int, contract.ElementType]]:
    """Per key of memory, as many elements as the largest bucket needs: buckets share it."""
    elements: dict[str, tuple[int, contract.ElementType]] = {}
    for step in steps:
        for place in step.places.values():
            largest = max(math.prod(place.shape), elements.get(place.key, (0, place.dtype))[0])
            elements[place.key] = (largest, place.dtype)
    return elements
