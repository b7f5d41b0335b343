"""An evaluation shared out over a Ray cluster: replicas of the planner as actors, batches of samples as work.

A replica that dies costs the batch it was planning; the batch goes to another, and a new replica takes its
place. What is planned does not depend on who plans it: the variants' order on a sample follows from the
sample's place in the split, so all but the timings equals a serial run.
"""

from __future__ import annotations

import contextlib
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eval_nuscenes.evaluation import PlanLog, SampleRecord, Variant, machine, plan_sample, warm_variants
from eval_nuscenes.nuscenes_reader import NuScenesSplit
from vla_autoprune.errors import InputError, VlaError
from vla_autoprune.images import Reduction

LOCAL = "local"
"""The address that starts a cluster of this machine alone."""
BATCH = 4
"""Samples a replica plans between two reports; what its death costs."""
KNOCK_S = 5.0
DEATHS_ALLOWED = 3
"""Replicas that may die on one batch before it is taken for the cause."""


class PlannableRun(Protocol):
    """What a replica has to load, once, where it runs."""

    @property
    def split(self) -> NuScenesSplit:
        """The samples."""

    @property
    def variants(self) -> Sequence[Variant]:
        """What plans them."""

    @property
    def cameras(self) -> Sequence[str]:
        """The images to decode."""

    @property
    def reduction(self) -> Reduction | None:
        """How they are decoded."""

    @property
    def device(self) -> str:
        """What the planner runs on."""


OpenRun = Callable[[], PlannableRun]


class _Replica:
    """Lives in a Ray worker."""

    def __init__(self, open_run: OpenRun, warm_up: int) -> None:
        self._run = open_run()
        self._warm_up = warm_up
        self._warm = False

    def where(self) -> str:
        return f"{machine()}; {self._run.device}"

    def plan(self, indices: Sequence[int]) -> list[SampleRecord]:
        run = self._run
        if not self._warm:
            frame = run.split[indices[0]].frame(run.cameras, run.reduction)
            warm_variants(frame, run.variants, self._warm_up)
            self._warm = True
        return [plan_sample(run.split, index, run.variants, run.cameras, run.reduction) for index in indices]


@dataclass
class RayRun:
    """Replicas on a cluster, to be entered with `with`.

    Attributes:
        address: of the cluster (`ray://host:10001`, `host:6379`, "auto"), or "local" for this machine alone.
        replicas: planners at work at the same time, each with one CPU.
        open_run: what each replica calls first; it is pickled, and paths in it must be good on every node.
        warm_up: uncounted plans per variant and replica.
        batch: samples per piece of work.
    """

    address: str
    replicas: int
    open_run: OpenRun
    warm_up: int = 3
    batch: int = BATCH
    _actors: list[Any] = field(default_factory=list, init=False)
    _started_ray: bool = field(default=False, init=False)

    def __enter__(self) -> RayRun:
        import ray

        if self.replicas < 1:
            raise InputError(f"--replicas is {self.replicas}; at least 1 is needed")
        if not ray.is_initialized():
            # The driver's own import path: workers on this machine see the same code.
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
            try:
                _knock(self.address)
                if self.address == LOCAL:
                    ray.init(num_cpus=self.replicas, include_dashboard=False, **quiet)
                else:
                    ray.init(address=self.address, **quiet)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"no Ray cluster answers at --ray {self.address} ({error}); start one with ray start "
                    "--head, or use --ray local"
                ) from error
            self._started_ray = True
        cores = int(ray.cluster_resources().get("CPU", 0))
        if cores < self.replicas:
            raise InputError(f"--replicas is {self.replicas}; the Ray cluster has {cores} CPUs, one for each")
        self._actors = [self._new_actor() for _ in range(self.replicas)]
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        if self._started_ray:
            ray.shutdown()

    @property
    def machine(self) -> str:
        """What times the plans: the replicas' machines, and how many replicas share each.

        Raises:
            VlaError: a replica could not start.
        """
        import ray

        try:
            places = Counter(ray.get([actor.where.remote() for actor in self._actors]))
        except ray.exceptions.RayActorError as error:
            raise VlaError(f"a Ray replica could not start: {error}") from error
        return "; ".join(f"{count} Ray replicas on {place}" for place, count in sorted(places.items()))

    def plan(self, split: NuScenesSplit, log: PlanLog) -> Iterator[SampleRecord]:
        """Plan every sample that the log lacks.

        Args:
            split: the same samples that the replicas open.
            log: takes each batch as soon as it is done.

        Yields:
            New records, in the order they are finished in.

        Raises:
            InputError: as `plan_samples`, from a replica.
            VlaError: replicas keep dying on one batch.
        """
        import ray

        left = [index for index, token in enumerate(split.tokens) if token not in log.records]
        batches = deque(tuple(left[start : start + self.batch]) for start in range(0, len(left), self.batch))
        deaths: Counter[tuple[int, ...]] = Counter()
        idle = deque(self._actors)
        at_work: dict[Any, tuple[Any, tuple[int, ...]]] = {}
        while batches or at_work:
            while batches and idle:
                actor, indices = idle.popleft(), batches.popleft()
                at_work[actor.plan.remote(list(indices))] = actor, indices
            (done,), _ = ray.wait(list(at_work), num_returns=1)
            actor, indices = at_work.pop(done)
            try:
                records = ray.get(done)
            except ray.exceptions.RayActorError as error:
                deaths[indices] += 1
                if deaths[indices] >= DEATHS_ALLOWED:
                    raise VlaError(
                        f"{DEATHS_ALLOWED} replicas died planning sample {split.tokens[indices[0]]} and the "
                        f"{len(indices) - 1} after it, perhaps for want of memory; use fewer (--replicas)"
                    ) from error
                batches.appendleft(indices)
                self._actors[self._actors.index(actor)] = actor = self._new_actor()
                idle.append(actor)
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            idle.append(actor)
            for record in records:
                log.append(record)
                yield record

    def _new_actor(self) -> Any:
        import ray

        return ray.remote(num_cpus=1)(_Replica).remote(self.open_run, self.warm_up)


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at host and port: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
