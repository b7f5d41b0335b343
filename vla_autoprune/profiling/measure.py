"""Plans measured stage by stage, every bucket in turn, and summed up as a `Profile`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np

from vla_autoprune import contract
from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import InputError
from vla_autoprune.frame import Command, EgoState, Frame, Plan, Rehearsal
from vla_autoprune.profiling.document import (
    PROFILE_VERSION,
    BucketProfile,
    Ceiling,
    Conditions,
    Energy,
    Memory,
    Profile,
    SensorState,
    StageProfile,
    Work,
)
from vla_autoprune.profiling.machine import machine_record, peak_host_mib
from vla_autoprune.profiling.percentiles import distribution, missing_percentiles
from vla_autoprune.profiling.sensors import Readings, Sensor, watching
from vla_autoprune.profiling.stage_work import ON_HOST, SUMS, phase_of, rows_into_stages, stage_work
from vla_autoprune.recipe import Bucket
from vla_autoprune.runtime.planner import Planner

ACCOUNTED_TOLERANCE = 0.03
"""Stages are to sum to the total within this; otherwise a note says that they do not."""

ENERGY_SECONDS = 3.0
IDLE_SECONDS = 1.0

NUSCENES_SIZE = (1600, 900)

Progress = Callable[[str, int, int], None]
RunFrame = Callable[[Frame, str], Plan | Rehearsal]
"""A frame, planned in the bucket of a name."""
MemoryMib = Callable[[], tuple[int, int]]
"""Free and total device memory."""


@dataclass(frozen=True)
class Run:
    """What to do and what to write down about it.

    Attributes:
        frames: to measure per bucket.
        warm_up: plans per bucket before.
        buckets: names; empty takes all.
        command: the command line, for the record.
        input: what the frames are, for the record.
        rehearse: answers of full length, whatever they say; for frames that need not have a plan.
    """

    frames: int = 100
    warm_up: int = 5
    buckets: tuple[str, ...] = ()
    command: str = ""
    input: str = ""
    rehearse: bool = False


def synthetic_frames(planner: Planner, count: int = 4, seed: int = 0) -> list[Frame]:
    """Frames of coloured noise at two scales, as large as the cameras of nuScenes: never zeros.

    Args:
        planner: whose cameras and aspect ratio they are to have.
        count: different frames.
        seed: of the noise.
    """
    generator = np.random.default_rng(seed)
    width, height = NUSCENES_SIZE
    ratio = planner.preprocessing.aspect_ratio
    if ratio:
        width = round(height * ratio)

    def image() -> np.ndarray:
        coarse = generator.integers(0, 200, (height // 50 + 1, width // 50 + 1, 3), dtype=np.uint8)
        large = coarse.repeat(50, axis=0).repeat(50, axis=1)[:height, :width]
        return large + generator.integers(0, 50, (height, width, 3), dtype=np.uint8)

    commands = tuple(Command)
    return [
        Frame(
            images={camera: image() for camera in planner.recipe.layout.cameras},
            ego=EgoState(speed_mps=4.0 + 2.0 * index),
            command=commands[index % len(commands)],
            token=f"synthetic {index}",
        )
        for index in range(count)
    ]


def frames_hash(frames: Sequence[Frame]) -> str:
    """SHA-256 of everything the frames hold."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(f"{frame.ego} {frame.command.value}".encode())
        for camera, image in sorted(frame.images.items()):
            digest.update(f"{camera} {image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def profile(
    planner: Planner,
    frames: Sequence[Frame],
    run: Run,
    ceiling: Ceiling,
    sensors: Sequence[Sensor] = (),
    absent_sensors: dict[str, str] | None = None,
    memory_mib: MemoryMib | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure plans of every bucket, frame by frame in turn, so that what disturbs a machine meets all.

    Args:
        planner: with a backend that has been opened for its bundle.
        frames: planned over and over.
        run: how many, and what to record about it.
        ceiling: of the machine.
        sensors: for power each bucket runs alone for some seconds; without one that is left out.
        absent_sensors: name and reason, for the record.
        memory_mib: asks for device memory; None where the backend has none of its own.
        progress: called with what is done, how far, and how far there is to go.

    Returns:
        The profile.

    Raises:
        InputError: there is no frame, or a count is not above 0.
        RecipeError: there is no bucket of a name.
        PlanError: a frame has no plan, and is not rehearsed; or values are not finite.
    """
    if not frames or run.frames < 1 or run.warm_up < 0:
        raise InputError(
            f"profile has {len(frames)} frames to plan, {run.frames} plans per bucket and {run.warm_up} to "
            "warm up; the first two must be at least 1"
        )
    say = progress or (lambda what, done, total: None)
    recipe = planner.recipe
    buckets = tuple(recipe.bucket(name) for name in run.buckets) or recipe.buckets
    once: RunFrame = planner.rehearse if run.rehearse else planner.plan_in_bucket
    with watching(sensors) as idle:
        time.sleep(IDLE_SECONDS if sensors else 0)
    free_before = memory_mib()[0] if memory_mib else 0
    for index in range(run.warm_up):
        for bucket in buckets:
            say("warm-up", index, run.warm_up)
            once(frames[index % len(frames)], bucket.name)
    with watching(sensors) as throughout:
        plans = _plan_in_turns(once, frames, buckets, run.frames, say)
    idle_w = _watts(idle)
    energies = {
        bucket.name: _energies(once, frames, bucket, sensors, idle_w, say) if idle_w else ()
        for bucket in buckets
    }
    profiles = tuple(
        _bucket_profile(planner, bucket, plans[bucket.name], energies[bucket.name]) for bucket in buckets
    )
    device_mib, device_source = _device_memory(memory_mib, throughout)
    manifest = planner.bundle.manifest
    return Profile(
        profile_version=PROFILE_VERSION,
        conditions=Conditions(
            made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=run.command,
            machine=machine_record(),
            backend=planner.backend.name,
            device=planner.backend.device,
            bundle_id=manifest.bundle_id,
            model=recipe.model.id,
            recipe_sha256=manifest.recipe_sha256,
            precision=manifest.options.precision,
            frames=run.frames,
            warm_up=run.warm_up,
            input=run.input,
            input_sha256=frames_hash(frames),
            budgets=recipe.budgets,
        ),
        ceiling=ceiling,
        buckets=profiles,
        memory=Memory(peak_host_mib=peak_host_mib(), device_mib=device_mib, device_source=device_source),
        idle_w=idle_w,
        sensors=tuple(_state(name, throughout) for name in throughout.of if throughout.of[name]),
        absent_sensors={**(absent_sensors or {}), **idle.faults, **throughout.faults},
        notes=_notes(run, planner, profiles, plans, memory_mib, free_before),
    )


def _plan_in_turns(
    once: RunFrame, frames: Sequence[Frame], buckets: Sequence[Bucket], count: int, say: Progress
) -> dict[str, list[Plan | Rehearsal]]:
    """Each round plans one frame in every bucket, beginning with another bucket each time."""
    plans: dict[str, list[Plan | Rehearsal]] = {bucket.name: [] for bucket in buckets}
    for index in range(count):
        say("frames", index, count)
        first = index % len(buckets)
        for bucket in (*buckets[first:], *buckets[:first]):
            plans[bucket.name].append(once(frames[index % len(frames)], bucket.name))
    say("frames", count, count)
    return plans


def _bucket_profile(
    planner: Planner, bucket: Bucket, plans: Sequence[Plan | Rehearsal], energies: tuple[Energy, ...]
) -> BucketProfile:
    clock, rows = planner.backend.clock, rows_into_stages(planner.recipe, bucket)
    decoded = [plan.answer_tokens - 1 for plan in plans]
    usual = round(float(np.median(decoded)))
    work = _work(planner.bundle, bucket, usual)
    stages = []
    for name in dict.fromkeys(name for plan in plans for name in plan.timings_ms if name not in SUMS):
        ms = [plan.timings_ms.get(name, 0.0) for plan in plans]
        entering = rows.get(name)
        stages.append(
            StageProfile(
                name=name,
                phase=phase_of(name),
                clock="host" if name in ON_HOST else clock,
                ms=tuple(round(value, 4) for value in ms),
                time=distribution(ms),
                runs_per_plan=_runs(name, usual),
                rows=entering[0] if entering else None,
                visual_tokens=entering[1] if entering else None,
                work=work.get(name),
            )
        )
    totals = [plan.timings_ms["total"] for plan in plans]
    sums = np.sum([stage.ms for stage in stages], axis=0)
    per_token = [
        plan.timings_ms["decode"] / count for plan, count in zip(plans, decoded, strict=True) if count
    ]
    return BucketProfile(
        name=bucket.name,
        total_ms=tuple(round(value, 4) for value in totals),
        total=distribution(totals),
        stages=tuple(stages),
        accounted=float(np.median(sums / totals)),
        decode_per_token=distribution(per_token) if per_token else None,
        visual_tokens_into_layers=float(np.mean(bucket.visual_tokens_into_layers)),
        work_fraction=bucket.work_fraction,
        kv_mib=plans[0].kv_mib,
        energy=energies,
    )


def _work(bundle: Bundle, bucket: Bucket, decoded: int) -> dict[str, Work]:
    """Counted in the bundle's precision; hidden states between graphs are float32 in all of them."""
    (vocabulary,) = bundle.graphs[contract.HEAD].outputs[0].pinned({})[1:]
    size = contract.ITEM_BYTES[contract.COMPUTED_IN[bundle.manifest.options.precision]]
    return stage_work(bundle.recipe, bucket, vocabulary, decoded, bytes_per_weight=size, bytes_per_kv=size)


def _runs(stage: str, decoded: int) -> int:
    if stage == "choose":
        return decoded + 1
    return max(decoded, 1) if stage.startswith("decode_") else 1


def _watts(readings: Readings) -> dict[str, float]:
    """Mean power by sensor, of those that tell one."""
    found = {name: readings.energy(name) for name in readings.of}
    return {name: joules / seconds for name, each in found.items() if each for joules, seconds in [each]}


def _energies(
    once: RunFrame,
    frames: Sequence[Frame],
    bucket: Bucket,
    sensors: Sequence[Sensor],
    idle_w: dict[str, float],
    say: Progress,
) -> tuple[Energy, ...]:
    """One bucket alone, long enough for slow sensors."""
    say(f"energy of {bucket.name}", 0, 1)
    count, begin = 0, time.perf_counter()
    with watching([sensor for sensor in sensors if sensor.name in idle_w]) as readings:
        while time.perf_counter() - begin < ENERGY_SECONDS:
            once(frames[count % len(frames)], bucket.name)
            count += 1
    say(f"energy of {bucket.name}", 1, 1)
    result = []
    for name in readings.of:
        found = readings.energy(name)
        if found is not None:
            joules, seconds = found
            result.append(
                Energy(
                    sensor=name,
                    plans=count,
                    seconds=seconds,
                    mean_w=joules / seconds,
                    per_plan_j=joules / count,
                    above_idle_j=(joules - idle_w[name] * seconds) / count,
                    rails_w=readings.mean_rails_w(name),
                )
            )
    return tuple(result)


def _device_memory(memory_mib: MemoryMib | None, readings: Readings) -> tuple[float | None, str]:
    """The most that was in use."""
    seen = {
        name: max(reading.memory_mib for _, reading in rows if reading.memory_mib is not None)
        for name, rows in readings.of.items()
        if any(reading.memory_mib is not None for _, reading in rows)
    }
    if memory_mib is not None:
        free, total = memory_mib()
        return float(total - free), "in use on the device after the last plan, other processes included"
    for name, mib in seen.items():
        return mib, f"most in use while planning, other processes included, by {name}"
    return None, "not measured: the backend has no memory of its own and no sensor tells"


def _state(name: str, readings: Readings) -> SensorState:
    rows = readings.of[name]
    before, after = rows[0][1].flat(), rows[-1][1].flat()
    return SensorState(sensor=name, before=before, after=after, throttled=readings.throttled(name))


def _notes(
    run: Run,
    planner: Planner,
    buckets: Sequence[BucketProfile],
    plans: Mapping[str, Sequence[Plan | Rehearsal]],
    memory_mib: MemoryMib | None,
    free_before: int,
) -> tuple[str, ...]:
    """What a reader must know before trusting the figures."""
    notes = [missing_percentiles(run.frames)]
    if run.rehearse and planner.codec.tokens_at(0) is None:
        notes.append(
            f"no plan was asked for: answers are {planner.codec.length} tokens, the longest there may be; "
            "give recorded frames with --images for answers as long as the model's own"
        )
    lengths = {plan.answer_tokens for of_bucket in plans.values() for plan in of_bucket}
    if len(lengths) > 1:
        notes.append(
            f"answers have {min(lengths)} to {max(lengths)} tokens: runs and work of decoding are those of "
            "each bucket's median answer"
        )
    for bucket in buckets:
        if abs(bucket.accounted - 1) > ACCOUNTED_TOLERANCE:
            notes.append(
                f"stages of {bucket.name} sum to {bucket.accounted:.1%} of the total; what lies between them "
                "is other processes' time or waiting for the device"
            )
    clocks = {stage.clock for bucket in buckets for stage in bucket.stages}
    if clocks == {"host"}:
        notes.append(
            "device time is not measured: the backend runs on the host, whose clock times every stage"
        )
    if memory_mib is not None and free_before - memory_mib()[0] > 0:
        notes.append(f"device memory grew by {free_before - memory_mib()[0]} MiB while planning")
    return tuple(note for note in notes if note)
