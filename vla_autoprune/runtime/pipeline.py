"""A bundle's graphs run as prefill and decode; all memory, bindings and programs are made beforehand."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import PlanError
from vla_autoprune.frame import FloatArray, IntArray
from vla_autoprune.recipe import Bucket
from vla_autoprune.runtime.backend import Backend, Buffer, Program, Steps
from vla_autoprune.runtime.wiring import CACHE, Place, Step, Wiring

Inspect = Callable[[int, Callable[[str], NDArray[Any]]], None]
"""Called with a stage and a function that reads one of its outputs by name."""

ChooseBucket = Callable[[float], Bucket]
"""From the complexity of stage 0 to the bucket of the rest."""

Around = Callable[[str], AbstractContextManager[Any]]
"""Entered around each step by its name, to trace it or to mark it for a profiler."""


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
    """Milliseconds per step; a step that runs again adds up.

    Args:
        around: entered around each block that is timed here.
    """

    def __init__(self, around: Around | None = None) -> None:
        self.ms: dict[str, float] = {}
        self._around = around or nullcontext

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        """Time a block."""
        begin = time.perf_counter()
        try:
            with self._around(step):
                yield
        finally:
            self.add({step: 1e3 * (time.perf_counter() - begin)})

    def add(self, times_ms: Mapping[str, float]) -> None:
        """Count times that were measured elsewhere."""
        for step, ms in times_ms.items():
            self.ms[step] = self.ms.get(step, 0.0) + ms


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

    Between an image and its plan only the complexity has to reach the host: the rest of a prefill is one
    program per bucket, from the first selection to the last stage, and so is a decode step.

    Args:
        bundle: a checked bundle.
        backend: runs its graphs.
        around: entered around each step; where a device works through what was queued, around the queueing
            of a whole program.
    """

    def __init__(self, bundle: Bundle, backend: Backend, around: Around | None = None) -> None:
        self.recipe = bundle.recipe
        self.backend = backend
        self.around = around
        self.embedding = bundle.embedding()
        self.rotary = bundle.rotary()
        self.stages = self.recipe.stages
        self._wiring = Wiring(self.recipe, bundle.graphs)
        self._memory = {key: backend.allocate(*size) for key, size in self._wiring.memory().items()}
        steps = self._wiring.steps
        self._views = {
            place: backend.view(self._memory[place.key], place.shape, place.start)
            for step in steps
            for place in step.all_places
        }
        self._runs = {
            (step.graph, step.variant): backend.bind(
                step.graph, step.variant, {name: self._views[place] for name, place in step.places.items()}
            )
            for step in steps
        }
        self._write_constants()
        model, layout = self.recipe.model, self.recipe.layout
        vision, stages = self._wiring.vision, range(len(self.stages))
        self.pixels: FloatArray = backend.host(vision.places["pixel_values"].shape, "float32")
        """[c, 3, h, w] host memory to fill before `encode`."""
        self._text = backend.host((layout.text_tokens, model.hidden), "float32")
        self._weight = backend.host((len(layout.suffix_rows),), "float32")
        self._weight[:] = 1
        self._token = backend.host((1, 1, model.hidden), "float32")
        self._cos = [backend.host((1, 1, model.head_dim), "float32") for _ in stages]
        self._sin = [backend.host((1, 1, model.head_dim), "float32") for _ in stages]
        self._filled = [backend.host((1,), "int64") for _ in stages]
        self._answer: _Answer | None = None
        self._encoding: Timings | None = None
        """Waits for the time of the last `encode`."""

        first = self._wiring.prefill[self.recipe.buckets[0].name][0]
        self._first = first
        self._encode = self._program([("vision", self._encode_images)])
        self._begin = self._program(
            [("embed", self._embed), (first.graph, partial(self._run_and_fetch, first, "complexity"))]
        )
        self._rest_steps = {bucket.name: self._steps_of_rest(bucket) for bucket in self.recipe.buckets}
        self._rest = {
            name: self._program([(label, work) for label, work, _ in steps])
            for name, steps in self._rest_steps.items()
        }
        give_logits = partial(self._run_and_fetch, self._wiring.head, "logits")
        self._give_logits = self._program([("head", give_logits)])
        self._append = {
            bucket.name: self._program(self._steps_of_decode(bucket)) for bucket in self.recipe.buckets
        }
        self._clear_caches()

    def encode(self, timings: Timings) -> None:
        """Run the vision graph on `pixels`.

        Args:
            timings: receives vision: from a device, which is not waited for, in the next `prefill`.
        """
        self._encode()
        if self.backend.clock == "device":
            self._encoding = timings
        else:
            timings.add(self._encode.times_ms())

    def features(self) -> FloatArray:
        """[1, V, d] features of the last `encode`, on the host."""
        return self._fetched(self._wiring.vision, "features")

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
            timings: receives prompt, embed, stage_XX, store_00, select_XX, head, check and prefill,
                which spans them.
            ranking: [V] scores that replace the stages' own at every pruning point.
            inspect: shown the outputs of every stage, to find where a difference begins.

        Returns:
            Logits and what happened.

        Raises:
            PlanError: complexity, logits, or scores that choose tokens are not finite.
        """
        begin = time.perf_counter()
        self._answer = None
        with timings.of("prompt"):
            self._fill_prompt(token_ids, length)
        self._begin()
        complexity = float(self._read(self._first, "complexity")[0])
        if self._encoding is not None:
            self._encoding.add(self._encode.times_ms())
            self._encoding = None
        timings.add(self._begin.times_ms())
        if not np.isfinite(complexity):
            raise self._not_finite(f"complexity of {self._first.graph} is {complexity}")
        bucket = choose(complexity)
        if ranking is None and inspect is None:
            self._rest[bucket.name]()
        else:
            self._watch(bucket, ranking, inspect, timings)
        steps = self._wiring.prefill[bucket.name]
        stages = [step for step in steps if step.graph.startswith("stage")]
        padding = self.recipe.layout.length - length
        filled = [step.places["hidden"].shape[1] - padding for step in stages]
        logits = self._last_logits(stages[-1], filled[-1] - 1)
        if ranking is None and inspect is None:
            timings.add(self._rest[bucket.name].times_ms())
        timings.add(self._give_logits.times_ms())
        with timings.of("check"):
            kept = self._kept(bucket)
            self._require_finite(logits)
        timings.add({"prefill": 1e3 * (time.perf_counter() - begin)})
        self._answer = _Answer(bucket, length, filled)
        return Prefill(bucket, complexity, logits, kept)

    def decode(self, token: int, timings: Timings) -> FloatArray:
        """Append a token to the prompt and run it through the stages.

        Args:
            token: the token generated last.
            timings: receives decode_embed, decode_stage_XX, decode_head, decode_store, decode_check and
                decode, which spans them.

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
        steps, append = self._wiring.decode[answer.bucket.name], self._append[answer.bucket.name]
        with timings.of("decode_embed"):
            self._fill_token(answer, token)
        append()
        with timings.of("decode_store"):
            for stage, step in enumerate(steps):
                # Where a row goes changes with every step, so these copies are not part of the program.
                self._move(step.new_kv, 0, step.past_kv, answer.filled[stage], 1)
                answer.filled[stage] += 1
        logits = self._read(self._wiring.head, "logits")[0]
        timings.add(append.times_ms())
        with timings.of("decode_check"):
            self._require_finite(logits)
        answer.generated += 1
        timings.add({"decode": 1e3 * (time.perf_counter() - begin)})
        return logits

    def _program(self, steps: Steps) -> Program:
        """A program of the backend, with `around` where the host can enter it."""
        if self.around is None:
            return self.backend.program(steps)
        if self.backend.clock == "device":
            return _Surrounded(self.backend.program(steps), self.around, steps)
        around = self.around
        return self.backend.program([(label, partial(_within, around, label, work)) for label, work in steps])

    def _fill_prompt(self, token_ids: IntArray, length: int) -> None:
        layout = self.recipe.layout
        suffix = layout.suffix_rows
        if token_ids.shape != (layout.length,) or not suffix[0] < length <= len(token_ids):
            raise PlanError(
                f"prompt has {length} of {len(token_ids)} tokens; the recipe's layout has "
                f"{layout.length}, of which the first {suffix[0] + 1} at least are not padding"
            )
        np.take(self.embedding, token_ids[layout.text_positions], axis=0, out=self._text)
        np.less(suffix, length, out=self._weight)

    def _fill_token(self, answer: _Answer, token: int) -> None:
        self._token[:] = self.embedding[token]
        for stage, filled in enumerate(answer.filled):
            compact = self.recipe.positions == "compact"
            position = filled if compact else answer.prompt_length + answer.generated
            self._cos[stage][:], self._sin[stage][:] = self.rotary[position]
            self._filled[stage][:] = filled

    def _encode_images(self) -> None:
        self.backend.write(self._buffer(self._wiring.vision, "pixel_values"), self.pixels)
        self._run(self._wiring.vision)

    def _embed(self) -> None:
        encoded = {"hidden": "features", "deepstack": "deepstack"}
        moves = [
            (self._buffer(self._wiring.vision, source), self._buffer(self._first, target))
            for target, source in encoded.items()
            if target in self._first.places
        ]
        hidden = moves[0][1]
        row = visual = text = 0
        for span in self.recipe.layout.segments:
            count = span[-1]
            if span[0] == "visual":
                for source, target in moves:
                    self.backend.move_rows(source, visual, target, row, count)
                visual += count
            else:
                self.backend.write(hidden, self._text[None, text : text + count], row)
                text += count
            row += count
        self.backend.write(self._buffer(self._first, "text_weight"), self._weight)

    def _steps_of_rest(self, bucket: Bucket) -> list[tuple[str, Callable[[], None], Step]]:
        """What follows the choice of a bucket: name, work, and the step whose outputs it leaves."""
        result: list[tuple[str, Callable[[], None], Step]] = []
        steps = self._wiring.prefill[bucket.name]
        stage = 0
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if step.graph.startswith("stage"):
                ranks = following is not None and not following.graph.startswith("stage")
                work = partial(self._finish_stage, step, stage, bucket, ranks)
                # Stage 0 has run by then; only its keys and values are left to do.
                result.append((step.graph if stage else "store_00", work, step))
                stage += 1
            else:
                work = partial(self._run_and_fetch, step, "kept")
                result.append((f"select_{stage - 1:02d}", work, step))
        return result

    def _steps_of_decode(self, bucket: Bucket) -> list[tuple[str, Callable[[], None]]]:
        steps = self._wiring.decode[bucket.name]
        result = [
            (f"decode_{step.graph}", partial(self._run_decode, step, stage))
            for stage, step in enumerate(steps)
        ]
        return [*result, ("decode_head", partial(self._run_head, steps[-1]))]

    def _finish_stage(self, step: Step, stage: int, bucket: Bucket, ranks: bool) -> None:
        """Run a stage, which for stage 0 has been done, and copy its keys and values into the caches."""
        if stage:
            self._run(step)
        cache = self._wiring.decode[bucket.name][stage].past_kv
        self._move(step.new_kv, 0, cache, 0, step.places["hidden"].shape[1])
        if ranks:
            self.backend.fetch(self._buffer(step, "score"))

    def _run_decode(self, step: Step, stage: int) -> None:
        if stage == 0:
            self.backend.write(self._buffer(step, "hidden"), self._token)
        for name, values in (
            ("cos", self._cos[stage]),
            ("sin", self._sin[stage]),
            ("past_length", self._filled[stage]),
        ):
            self.backend.write(self._buffer(step, name), values)
        self._run(step)

    def _run_head(self, last: Step) -> None:
        head = self._wiring.head
        self.backend.move_rows(self._buffer(last, "hidden_out"), 0, self._buffer(head, "hidden"), 0, 1)
        self._run_and_fetch(head, "logits")

    def _watch(
        self, bucket: Bucket, ranking: FloatArray | None, inspect: Inspect | None, timings: Timings
    ) -> None:
        """The program of a bucket, one step at a time, to look between them or to rank otherwise."""
        visual: IntArray = np.arange(self.recipe.layout.visual_tokens)
        stage = 0
        for label, work, step in self._rest_steps[bucket.name]:
            selects = not step.graph.startswith("stage")
            if selects and ranking is not None:
                self.backend.write(self._buffer(step, "score"), ranking[visual])
            with timings.of(label):
                work()
                self.backend.wait()
            if selects:
                visual = visual[self._read(step, "kept")]
                continue
            if inspect is not None:
                inspect(stage, partial(self._fetched, step))
            stage += 1

    def _kept(self, bucket: Bucket) -> tuple[IntArray, ...]:
        """Per stage, the visual tokens that entered it; refuses scores that could not choose them."""
        visual: IntArray = np.arange(self.recipe.layout.visual_tokens)
        kept = [visual]
        steps = self._wiring.prefill[bucket.name]
        for step, following in itertools.pairwise(steps):
            if not step.graph.startswith("stage"):
                visual = visual[self._read(step, "kept")]
            elif not following.graph.startswith("stage"):
                if not np.isfinite(self._read(step, "score").sum()):
                    raise self._not_finite(f"scores of {step.graph} are not finite")
                continue
            kept.append(visual)
        return tuple(kept)

    def _last_logits(self, stage: Step, row: int) -> FloatArray:
        head = self._wiring.head
        self.backend.move_rows(self._buffer(stage, "hidden_out"), row, self._buffer(head, "hidden"), 0, 1)
        self._give_logits()
        return self._read(head, "logits")[0]

    def _require_finite(self, logits: FloatArray) -> None:
        # The sum is finite only if every logit is; it needs no memory.
        if not np.isfinite(logits.sum()):
            raise self._not_finite("logits contain NaN or infinity")

    def _not_finite(self, what: str) -> PlanError:
        """Caches are cleared: a NaN in a slot that a mask hides would still spoil the next frame."""
        self._answer = None
        self._clear_caches()
        return PlanError(f"{what}; weights or images are not finite, the frame has no plan")

    def _clear_caches(self) -> None:
        for key, buffer in self._memory.items():
            if key.startswith(CACHE):
                self.backend.clear(buffer)

    def _buffer(self, step: Step, name: str) -> Buffer:
        return self._views[step.places[name]]

    def _move(self, source: Place | None, first: int, target: Place | None, start: int, count: int) -> None:
        assert source is not None and target is not None
        self.backend.move_rows(self._views[source], first, self._views[target], start, count)

    def _read(self, step: Step, name: str) -> NDArray[Any]:
        return self.backend.read(self._buffer(step, name))

    def _fetched(self, step: Step, name: str) -> NDArray[Any]:
        self.backend.fetch(self._buffer(step, name))
        return self._read(step, name)

    def _run(self, step: Step) -> None:
        self._runs[step.graph, step.variant]()

    def _run_and_fetch(self, step: Step, name: str) -> None:
        self._run(step)
        self.backend.fetch(self._buffer(step, name))

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


def _within(around: Around, label: str, work: Callable[[], None]) -> None:
    with around(label):
        work()


class _Surrounded:
    """A device's program: the host is there while it is queued, not while its steps run."""

    def __init__(self, program: Program, around: Around, steps: Steps) -> None:
        labels = [label for label, _ in steps]
        self._label = labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1]}"
        self._program, self._around = program, around

    def __call__(self) -> None:
        with self._around(self._label):
            self._program()

    def times_ms(self) -> Mapping[str, float]:
        return self._program.times_ms()
