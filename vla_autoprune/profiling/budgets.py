"""Limits as tests: a YAML file says how long stages and plans may take, a profile meets it or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from vla_autoprune.errors import InputError
from vla_autoprune.files import first_fault
from vla_autoprune.profiling.document import PHASES, BucketProfile, Distribution, Profile, Record
from vla_autoprune.profiling.percentiles import LEAST_SAMPLES, distribution

Limit = Annotated[float, Field(gt=0)]


class TimeLimits(Record):
    """Milliseconds that may not be exceeded; what is not named is not limited."""

    p50: Limit | None = None
    p90: Limit | None = None
    p99: Limit | None = None
    max: Limit | None = None
    jitter: Limit | None = None


class Limits(Record):
    """Limits of one bucket, or of all where they stand at the top of the file.

    Attributes:
        total_ms: of a whole plan.
        decode_per_token_ms: of one decoded token.
        stages_ms: by stage or phase (`input`, `vision`, `prefill`, `decode`, `answer`).
    """

    total_ms: TimeLimits = TimeLimits()
    decode_per_token_ms: TimeLimits = TimeLimits()
    stages_ms: Mapping[str, TimeLimits] = {}
    kv_mib: Limit | None = None
    energy_per_plan_j: Limit | None = None


class Budgets(Limits):
    """A budget file.

    Attributes:
        peak_host_mib: of the whole run.
        device_mib: likewise.
        buckets: limits of single buckets, besides those above that hold for all.
    """

    peak_host_mib: Limit | None = None
    device_mib: Limit | None = None
    buckets: Mapping[str, Limits] = {}


class Check(Record):
    """One limit and what was seen; `seen` is None where the profile does not know it, which fails."""

    what: str
    limit: float
    seen: float | None
    unit: str
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the profile knows it and keeps the limit."""
        return self.seen is not None and self.seen <= self.limit


def read_budgets(path: Path) -> Budgets:
    """Read a budget file.

    Raises:
        InputError: it is not YAML, has unknown fields, or limits nothing; the message names the field.
        OSError: it cannot be read.
        ModuleNotFoundError: PyYAML is not installed.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        budgets = Budgets.model_validate(content if content is not None else {})
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}; docs/profiling.md lists the fields") from error
    if not _limits_something(budgets.model_dump()):
        raise InputError(f"{path} limits nothing; name at least one, such as total_ms: {{p99: 100}}")
    return budgets


def _limits_something(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_limits_something, value.values()))
    return value is not None


def check_budgets(profile: Profile, budgets: Budgets) -> tuple[Check, ...]:
    """Every limit against a profile.

    Args:
        profile: what was measured.
        budgets: the limits.

    Returns:
        A check per limit and bucket; a limit that the profile cannot answer (a percentile of too few frames,
        a stage or bucket that is not there, a sensor that is absent) has failed and says why.
    """
    checks: list[Check] = []
    memory = profile.memory
    for what, limit, seen in (
        ("peak host memory", budgets.peak_host_mib, memory.peak_host_mib),
        ("device memory", budgets.device_mib, memory.device_mib),
    ):
        if limit is not None:
            reason = "" if seen is not None else memory.device_source
            checks.append(Check(what=what, limit=limit, seen=seen, unit="MiB", reason=reason))
    for bucket in profile.buckets:
        checks += _of_bucket(bucket, budgets)
    for name, limits in budgets.buckets.items():
        found = profile.bucket(name)
        if found is None:
            known = ", ".join(bucket.name for bucket in profile.buckets)
            checks.append(
                Check(what=f"bucket {name}", limit=0, seen=None, unit="", reason=f"profiled are {known}")
            )
        else:
            checks += _of_bucket(found, limits)
    return tuple(checks)


def _of_bucket(bucket: BucketProfile, limits: Limits) -> Iterator[Check]:
    yield from _times(f"{bucket.name} total", limits.total_ms, bucket.total)
    yield from _times(f"{bucket.name} per decoded token", limits.decode_per_token_ms, bucket.decode_per_token)
    for name, times in limits.stages_ms.items():
        yield from _times(f"{bucket.name} {name}", times, _time_of(bucket, name), bucket)
    if limits.kv_mib is not None:
        yield Check(what=f"{bucket.name} KV", limit=limits.kv_mib, seen=bucket.kv_mib, unit="MiB")
    if limits.energy_per_plan_j is not None:
        seen = bucket.energy[0].per_plan_j if bucket.energy else None
        reason = "" if bucket.energy else "no sensor of this machine tells power"
        yield Check(
            what=f"{bucket.name} energy of a plan",
            limit=limits.energy_per_plan_j,
            seen=seen,
            unit="J",
            reason=reason,
        )


def _time_of(bucket: BucketProfile, name: str) -> Distribution | None:
    """Of a stage, or of a phase frame by frame."""
    stage = bucket.stage(name)
    if stage is not None:
        return stage.time
    samples = bucket.frames_ms(name)
    return distribution(samples) if samples else None


def _times(
    what: str, limits: TimeLimits, seen: Distribution | None, bucket: BucketProfile | None = None
) -> Iterator[Check]:
    for name, limit in limits:
        if limit is None:
            continue
        value = None if seen is None else getattr(seen, name)
        reason = ""
        if seen is None:
            known = sorted({stage.name for stage in bucket.stages} | set(PHASES)) if bucket else []
            reason = f"there is no such stage; known are {', '.join(known)}" if known else "not measured"
        elif value is None:
            reason = f"{seen.count} frames are too few, {name} needs {LEAST_SAMPLES[name]}"
        yield Check(what=f"{what} {name}", limit=limit, seen=value, unit="ms", reason=reason)
