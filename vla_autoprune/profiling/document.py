"""The profile as a file: everything one run measured, with its conditions. docs/profiling.md explains it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vla_autoprune.contract import Precision
from vla_autoprune.errors import InputError
from vla_autoprune.files import first_fault, read_json, write_whole

PROFILE_VERSION = 1
"""Raised whenever a field changes its meaning; readers refuse other versions."""

Phase = Literal["input", "vision", "prefill", "decode", "answer"]
PHASES: tuple[Phase, ...] = ("input", "vision", "prefill", "decode", "answer")


class Record(BaseModel):
    """Frozen, without unknown fields, and finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Distribution(Record):
    """Samples of one quantity in a few figures; None where there are too few samples to say."""

    count: int = Field(ge=1)
    mean: float
    p50: float
    p90: float | None
    p99: float | None
    max: float
    jitter: float = Field(ge=0)
    """Standard deviation."""


class Ratio(Record):
    """A ratio of medians with its 95 % interval; None where there are too few samples for one."""

    ratio: float
    low: float | None = None
    high: float | None = None


class Work(Record):
    """What a stage has to compute and to move, counted from the recipe, for one plan.

    Attributes:
        flops: floating-point operations, a multiply and an add counted as two.
        bytes: that must move at least: weights once per run, rows in and out, keys and values.
    """

    flops: int = Field(ge=0)
    bytes: int = Field(ge=0)


class StageProfile(Record):
    """One stage of a plan in one bucket.

    Attributes:
        name: as in `Plan.timings_ms`; NVTX ranges and traces have the same names.
        phase: the part of a plan it belongs to.
        clock: whose clock `ms` is of.
        ms: [frames] milliseconds per plan, in the order measured; a stage that runs per token is summed.
        runs_per_plan: how often it runs for one plan; the median where answers differ in length.
        rows: text and visual tokens that enter it; None where it takes none.
        visual_tokens: of these, visual.
        work: None where it is not counted.
    """

    name: str
    phase: Phase
    clock: Literal["host", "device"]
    ms: tuple[float, ...]
    time: Distribution
    runs_per_plan: int = Field(ge=1)
    rows: int | None = None
    visual_tokens: int | None = None
    work: Work | None = None


class Energy(Record):
    """What one sensor saw while a bucket ran over and over.

    Attributes:
        plans: in that time.
        seconds: how long.
        mean_w: mean power.
        per_plan_j: energy of a plan, everything on the rail included.
        above_idle_j: the same less the power measured before, at rest.
        rails_w: mean power of each rail.
    """

    sensor: str
    plans: int = Field(ge=1)
    seconds: float = Field(gt=0)
    mean_w: float
    per_plan_j: float
    above_idle_j: float | None = None
    rails_w: Mapping[str, float] = {}


class BucketProfile(Record):
    """Plans of one bucket.

    Attributes:
        total_ms: [frames] from images to waypoints, by the host's clock.
        accounted: median over frames of the sum of stages over the total.
        decode_per_token: milliseconds per decoded token.
        visual_tokens_into_layers: mean over the decoder's layers.
    """

    name: str
    total_ms: tuple[float, ...]
    total: Distribution
    stages: tuple[StageProfile, ...]
    accounted: float
    decode_per_token: Distribution | None
    visual_tokens_into_layers: float
    work_fraction: float
    kv_mib: float
    energy: tuple[Energy, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> BucketProfile:
        for stage in self.stages:
            if len(stage.ms) != len(self.total_ms):
                raise ValueError(
                    f"{self.name} has {len(self.total_ms)} totals and {len(stage.ms)} times of {stage.name}; "
                    "there must be one of each per frame"
                )
        return self

    @property
    def budget(self) -> str:
        """What the names of a budget's buckets begin with: `b40` of `b40_s1`."""
        return self.name.partition("_")[0]

    def stage(self, name: str) -> StageProfile | None:
        """The stage of that name, None where this bucket has none."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def phase_ms(self, phase: Phase) -> float:
        """Sum of the medians of a phase's stages."""
        return sum(stage.time.p50 for stage in self.stages if stage.phase == phase)

    def frames_ms(self, phase: str) -> tuple[float, ...]:
        """[frames] milliseconds of a phase; empty where no stage belongs to it."""
        columns = [stage.ms for stage in self.stages if stage.phase == phase]
        return tuple(map(sum, zip(*columns, strict=True)))


class Ceiling(Record):
    """What a machine can do at best, and how that is known.

    Attributes:
        flops_per_s: of a large matrix product; None where it is not measured.
        bytes_per_s: of a large copy, reading and writing counted.
        source: how they were found.
    """

    flops_per_s: float | None = Field(default=None, gt=0)
    bytes_per_s: float | None = Field(default=None, gt=0)
    source: str


class SensorState(Record):
    """What a sensor said before and after: where clocks fall or temperatures rise, figures drift."""

    sensor: str
    before: Mapping[str, float | str]
    after: Mapping[str, float | str]
    throttled: tuple[str, ...] | None = None
    """What slowed the device down; None where the sensor does not tell."""

    @property
    def throttling(self) -> str:
        """In words."""
        if self.throttled is None:
            return "does not tell of throttling"
        return f"throttled: {', '.join(self.throttled)}" if self.throttled else "no throttling seen"


class Memory(Record):
    """Peak memory in MiB; None where it cannot be read."""

    peak_host_mib: float | None
    device_mib: float | None
    device_source: str


class Conditions(Record):
    """What was run, on what, and how.

    Attributes:
        precision: what the bundle's weights are stored and its layers computed in.
        input_sha256: of all frames' images, ego states and commands.
    """

    made: str
    command: str
    machine: Mapping[str, str]
    backend: str
    device: str
    bundle_id: str
    model: str
    recipe_sha256: str
    precision: Precision = "fp32"
    frames: int
    warm_up: int
    input: str
    input_sha256: str
    budgets: tuple[float, ...] = ()


class RosLatencies(Record):
    """Path latencies of the ROS nodes, from the status messages of a recording."""

    recording: str
    plans: int
    refused: int
    latencies_ms: Mapping[str, Distribution]


class Profile(Record):
    """One run of `vla-autoprune profile`."""

    profile_version: int
    conditions: Conditions
    ceiling: Ceiling
    buckets: tuple[BucketProfile, ...] = Field(min_length=1)
    memory: Memory
    idle_w: Mapping[str, float] = {}
    sensors: tuple[SensorState, ...] = ()
    absent_sensors: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    ros: RosLatencies | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, values: Any) -> Any:
        """Before all else: fields of another version would only be called unexpected."""
        version = values.get("profile_version") if isinstance(values, dict) else None
        if version not in (None, PROFILE_VERSION):
            raise ValueError(
                f"profile_version is {version}, this library reads {PROFILE_VERSION}; profile anew"
            )
        return values

    def bucket(self, name: str) -> BucketProfile | None:
        """The bucket of that name, None if it was not profiled."""
        return next((bucket for bucket in self.buckets if bucket.name == name), None)


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (profile.model_dump_json(indent=1) + "\n").encode())


def read_profile(path: Path) -> Profile:
    """Read what `write_profile` wrote.

    Raises:
        InputError: it is no profile, or of another version; the message names file and field.
        OSError: it cannot be read.
    """
    content = read_json(path)
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        raise InputError(
            f"{path} is not a profile: {first_fault(error)}; make one with vla-autoprune profile --json"
        ) from error
