"""Plan a split with several variants side by side, and keep what was done.

Planning and scoring are apart: plans go to a JSONL file as they are made, one line per sample with every
variant, so an interrupted run goes on where it stopped. Scores are worked out from the plans afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

import engines
import vla_autoprune
from eval_nuscenes.nuscenes_reader import NuScenesSplit
from vla_autoprune.errors import InputError, PlanError
from vla_autoprune.files import write_whole
from vla_autoprune.fingerprint import source_hash
from vla_autoprune.frame import CAMERAS, WAYPOINT_TIMES_S, Frame, Plan
from vla_autoprune.images import Reduction

PrunedKind = Literal["autoprune", "random", "uniform", "fixed"]
"""The policies of `vla_autoprune.runtime.planner` that can be compared."""

PRUNED: tuple[PrunedKind, ...] = get_args(PrunedKind)

VariantKind = Literal["full", PrunedKind, "blanked", "constant_velocity", "predictions"]

GREY = 127


class Agent(Protocol):
    """Whatever plans: `vla_autoprune.runtime.planner.Planner`, or a few lines for a baseline."""

    def plan(self, frame: Frame) -> Plan:
        """Plan one frame; raises PlanError when there is no plan to give."""


@dataclass(frozen=True)
class Variant:
    """One row of the evaluation.

    Attributes:
        name: unique, such as "autoprune 40 %".
        budget: mean visual tokens into the layers over V; None where nothing is pruned.
        bundle: name of the bundle that plans; empty where none does.
    """

    name: str
    kind: VariantKind
    agent: Agent
    budget: float | None = None
    bundle: str = ""


class ConstantVelocity:
    """Goes straight on at the present speed."""

    def plan(self, frame: Frame) -> Plan:
        """Plan from the ego state alone; a baseline takes no time."""
        ahead = frame.ego.speed_mps * np.asarray(WAYPOINT_TIMES_S)
        waypoints = np.column_stack([ahead, np.zeros((len(ahead), 2))])
        return Plan(
            waypoints_in_ego=waypoints,
            times_s=WAYPOINT_TIMES_S,
            text="",
            bucket="none",
            complexity=None,
            visual_tokens_into_layers=(),
            kept_visual=(),
            work_fraction=0.0,
            kv_mib=0.0,
            timings_ms={},
        )


@dataclass(frozen=True)
class Blanked:
    """Shows an agent grey images, so that only ego state and command are left to it."""

    agent: Agent

    def plan(self, frame: Frame) -> Plan:
        """Plan with every image grey."""
        grey = {name: np.full_like(image, GREY) for name, image in frame.images.items()}
        return self.agent.plan(replace(frame, images=grey))


@dataclass(frozen=True)
class PlannerSource:
    """A bundle that makes planners.

    Attributes:
        name: of the bundle.
        make_planner: from budget (None for nothing pruned) and policy to a planner.
        own_full: it answers otherwise than the first bundle where nothing is pruned.
    """

    name: str
    make_planner: Callable[[float | None, PrunedKind], Agent]
    own_full: bool = True


def planner_variants(
    sources: Sequence[PlannerSource],
    budgets: Sequence[float],
    policies: Sequence[PrunedKind] = ("autoprune", "random"),
) -> tuple[Variant, ...]:
    """The rows an evaluation of bundles has.

    Args:
        sources: the bundles. Rows of the first carry no bundle in their name.
        budgets: each is run with every policy.
        policies: how tokens are chosen; a policy named twice counts once.

    Returns:
        Unpruned first, then per budget and policy one per bundle, then the two references.
    """
    first = sources[0]
    full = first.make_planner(None, "autoprune")

    def named(name: str, source: PlannerSource) -> str:
        return name if source is first else f"{name} {source.name}"

    unpruned = [
        Variant(named("full", source), "full", source.make_planner(None, "autoprune"), None, source.name)
        for source in sources[1:]
        if source.own_full
    ]
    pruned = [
        Variant(
            named(f"{kind} {budget:.0%}", source),
            kind,
            source.make_planner(budget, kind),
            budget,
            source.name,
        )
        for budget in budgets
        for kind in dict.fromkeys(policies)
        for source in sources
    ]
    return (
        Variant("full", "full", full, None, first.name),
        *unpruned,
        *pruned,
        Variant("images blanked", "blanked", Blanked(full), None, first.name),
        Variant("constant velocity", "constant_velocity", ConstantVelocity()),
    )


class VariantLike(Protocol):
    """A variant or its summary."""

    @property
    def kind(self) -> VariantKind:
        """What it is."""

    @property
    def budget(self) -> float | None:
        """Of the pruned ones."""

    @property
    def bundle(self) -> str:
        """That plans."""


Row = TypeVar("Row", bound=VariantLike)


def pruned_example(variants: Sequence[Row]) -> Row | None:
    """The pruned variant in pictures: of the first bundle, AutoPrune if it was run, the smallest budget."""
    rows = [row for row in reversed(variants) if row.bundle == variants[0].bundle]
    return next((row for kind in PRUNED for row in rows if row.kind == kind), None)


def counterparts(variants: Sequence[Row], variant: VariantLike) -> list[Row]:
    """What other bundles have of the same kind and budget."""
    return [
        row
        for row in variants
        if (row.kind, row.budget) == (variant.kind, variant.budget) and row.bundle != variant.bundle
    ]


class Record(BaseModel):
    """Base of what evaluation reads and writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanRecord(Record):
    """A plan as kept on disk. A failed plan has an error and stands still."""

    waypoints_in_ego: tuple[tuple[float, ...], ...]
    error: str | None = None
    bucket: str = ""
    complexity: float | None = None
    visual_tokens_into_layers: tuple[int, ...] = ()
    work_fraction: float = 0.0
    kv_mib: float = 0.0
    timings_ms: dict[str, float] = {}
    flags: tuple[str, ...] = ()
    visual_tokens_left: dict[str, int] = {}


class SampleRecord(Record):
    """What every variant planned on one sample."""

    token: str
    scene: str
    plans: dict[str, PlanRecord]


def machine() -> str:
    """What timed a run, for reports: processor, cores, system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of what decides on plans and timings."""
    packages = ("vla_autoprune", "numpy", "opencv-python-headless", "onnxruntime", "nuscenes-devkit")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def code_hash() -> str:
    """Hash of the sources that plan, time and read: other code may plan otherwise or take other time."""
    library, here = Path(vla_autoprune.__file__).parent, Path(__file__).parent
    files = ("runtime", "bundle.py", "contract.py", "frame.py", "images.py", "recipe.py")
    planning = [library / name for name in files]
    words = [
        library / "models" / f"{name}.py"
        for name in ("actions", "answers", "preprocess", "prompt", "prompt_template", "tokenizer")
    ]
    reading = [here / name for name in ("evaluation.py", "nuscenes_reader.py", "driving_command.py")]
    policies = library / "pruning" / "policies.py"
    return source_hash([*planning, *words, policies, Path(engines.__file__).parent, *reading])


class RunKey(Record):
    """What must be equal for kept plans to be taken up again: the question, the code, and the machine.

    Attributes:
        planned_by: "bundle" and its id (or several), or "predictions" and the hash of their files.
    """

    planned_by: str
    data_hash: str
    variants: tuple[str, ...]
    command_source: str
    code: str
    machine: str
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """Short name of the key, for file names."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


class PlanLog:
    """The JSONL file of a run: its key on the first line, one sample per further line."""

    def __init__(self, folder: Path, key: RunKey) -> None:
        """Open or create the log of a run.

        Args:
            folder: created where missing.
            key: names the file, so that runs under other conditions lie beside each other.

        Raises:
            InputError: the file is of another run or a line of it is damaged. A last line cut short by a
                killed run is dropped.
        """
        self.key = key
        self.path = folder / f"plans-{key.digest}.jsonl"
        self.records: dict[str, SampleRecord] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._load(key)
        else:
            self._rewrite([key.model_dump_json()])

    def append(self, record: SampleRecord) -> None:
        """Keep a sample; it is on disk when this returns."""
        with self.path.open("a") as file:
            file.write(record.model_dump_json() + "\n")
        self.records[record.token] = record

    def _load(self, key: RunKey) -> None:
        text = self.path.read_text()
        complete = text[: text.rfind("\n") + 1].splitlines()
        advice = "delete it to start the evaluation afresh"
        if not complete or complete[0] != key.model_dump_json():
            raise InputError(f"{self.path} does not start with the key of this run; {advice}")
        for number, line in enumerate(complete[1:], start=2):
            try:
                record = SampleRecord.model_validate_json(line)
            except ValidationError as error:
                raise InputError(f"{self.path} line {number} is no sample record; {advice}") from error
            self.records[record.token] = record
        if not text.endswith("\n"):
            self._rewrite(complete)

    def _rewrite(self, lines: Sequence[str]) -> None:
        write_whole(self.path, "".join(f"{line}\n" for line in lines).encode())


def plan_samples(
    split: NuScenesSplit,
    variants: Sequence[Variant],
    log: PlanLog,
    cameras: Sequence[str] = CAMERAS,
    reduction: Reduction | None = None,
    warm_up: int = 3,
) -> Iterator[SampleRecord]:
    """Plan every sample that the log lacks, all variants on one frame before the next frame.

    The order of the variants turns by one with each frame, so none always finds a warm cache.

    Args:
        split: samples to plan.
        variants: what plans them.
        log: takes each sample as soon as it is done.
        cameras: images to decode.
        reduction: the planner's, to decode them as the vehicle does.
        warm_up: unrecorded plans per variant before the first sample.

    Yields:
        The records of newly planned samples.

    Raises:
        InputError: a camera or image is missing or unreadable. Samples done so far are kept.
    """
    warm = False
    for index, token in enumerate(split.tokens):
        if token in log.records:
            continue
        if not warm:
            warm_variants(split[index].frame(cameras, reduction), variants, warm_up)
            warm = True
        record = plan_sample(split, index, variants, cameras, reduction)
        log.append(record)
        yield record


def plan_sample(
    split: NuScenesSplit,
    index: int,
    variants: Sequence[Variant],
    cameras: Sequence[str] = CAMERAS,
    reduction: Reduction | None = None,
) -> SampleRecord:
    """Plan one sample with every variant; which one begins depends on the index.

    Raises:
        InputError: a camera or image is missing or unreadable.
    """
    sample = split[index]
    frame = sample.frame(cameras, reduction)
    turn = index % len(variants)
    plans = {variant.name: plan_record(variant, frame) for variant in [*variants[turn:], *variants[:turn]]}
    return SampleRecord(
        token=sample.token,
        scene=sample.scene,
        plans={variant.name: plans[variant.name] for variant in variants},
    )


def warm_variants(frame: Frame, variants: Sequence[Variant], plans: int) -> None:
    """Plan a frame some times with each variant, for nothing, so that first calls are not timed."""
    for variant in variants:
        for _ in range(plans):
            plan_record(variant, frame)


def plan_record(variant: Variant, frame: Frame) -> PlanRecord:
    """Plan a frame; an agent that finds no plan stands still, with its error."""
    try:
        plan = variant.agent.plan(frame)
    except PlanError as error:
        return PlanRecord(waypoints_in_ego=((0.0, 0.0, 0.0),) * len(WAYPOINT_TIMES_S), error=str(error))
    return PlanRecord(
        waypoints_in_ego=tuple(tuple(float(value) for value in row) for row in plan.waypoints_in_ego),
        bucket=plan.bucket,
        complexity=plan.complexity,
        visual_tokens_into_layers=tuple(int(count) for count in plan.visual_tokens_into_layers),
        work_fraction=plan.work_fraction,
        kv_mib=plan.kv_mib,
        timings_ms={name: round(float(value), 4) for name, value in plan.timings_ms.items()},
        flags=plan.flags,
        visual_tokens_left=dict(plan.visual_tokens_left),
    )
