"""The evaluation of a bundle, said in plain values, so that a worker elsewhere opens the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engines.backends import Name as BackendName
from engines.backends import open_backend
from eval_nuscenes.evaluation import PrunedKind, Variant, planner_variants
from eval_nuscenes.nuscenes_reader import CommandSource, EgoStateSource, NuScenesSplit
from vla_autoprune.bundle import Bundle, load_bundle
from vla_autoprune.recipe import PruningRecipe
from vla_autoprune.runtime.backend import Backend


@dataclass(frozen=True)
class SplitChoice:
    """Which samples are asked for; the fields are those of `NuScenesSplit`."""

    root: Path
    version: str
    split: str
    command_source: CommandSource = "route"
    limit: int | None = None
    scenes: Sequence[str] | None = None
    ego_state: EgoStateSource = "auto"
    road_edges: bool = False

    def open(self) -> NuScenesSplit:
        """Read the tables.

        Raises:
            InputError: see `NuScenesSplit`.
        """
        return NuScenesSplit(
            self.root,
            self.version,
            self.split,
            command_source=self.command_source,
            limit=self.limit,
            scenes=self.scenes,
            ego_state=self.ego_state,
            road_edges=self.road_edges,
        )


@dataclass(frozen=True)
class BundleRun:
    """A bundle on some samples.

    Attributes:
        bundle: directory of the bundle.
        samples: what it plans.
        budgets: of the pruned variants; all of the recipe's where None.
        policies: of the pruned variants.
        backend: a name of `engines.backends`.
        threads: of the backend; all cores where None.
        warm_up: uncounted plans per variant.
    """

    bundle: Path
    samples: SplitChoice
    budgets: tuple[float, ...] | None = None
    policies: tuple[PrunedKind, ...] = ("autoprune", "random")
    backend: BackendName = "onnxruntime"
    threads: int | None = None
    warm_up: int = 3

    def open(self) -> OpenRun:
        """Load the bundle and the data.

        Raises:
            BundleError: the bundle is not whole.
            RecipeError: its recipe has no such budget.
            InputError: the data cannot be read.
        """
        return OpenRun(self)


class OpenRun:
    """A bundle run with its parts loaded; planning starts no earlier than `variants` is asked for."""

    def __init__(self, run: BundleRun) -> None:
        self.run = run
        self.bundle: Bundle = load_bundle(run.bundle)
        budgets = self.recipe.budgets if run.budgets is None else run.budgets
        self.budgets = tuple(sorted(set(budgets), reverse=True))
        for budget in self.budgets:
            self.recipe.buckets_of(budget)

    @property
    def recipe(self) -> PruningRecipe:
        """Of the bundle."""
        return self.bundle.recipe

    @property
    def cameras(self) -> tuple[str, ...]:
        """What the bundle looks through."""
        return self.recipe.layout.cameras

    @cached_property
    def split(self) -> NuScenesSplit:
        """The samples, with every image there.

        Raises:
            InputError: the data cannot be read, or an image is missing.
        """
        split = self.run.samples.open()
        split.check_images(self.cameras)
        return split

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """What plans the samples; one backend behind all of them."""
        from vla_autoprune.runtime.planner import Planner

        planner = Planner(self.bundle, self._backend)
        return planner_variants(planner.variant, self.budgets, self.run.policies)

    @property
    def device(self) -> str:
        """What the backend runs on."""
        return self._backend.device

    @cached_property
    def _backend(self) -> Backend:
        return open_backend(self.run.backend, self.bundle, threads=self.run.threads)

    def close(self) -> None:
        """Give the backend's memory back."""
        self._backend.close()
