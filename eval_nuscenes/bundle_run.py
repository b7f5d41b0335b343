"""The evaluation of bundles, said in plain values, so that a worker elsewhere opens the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engines.backends import Name as BackendName
from engines.backends import open_backend
from eval_nuscenes.evaluation import PlannerSource, PrunedKind, Variant, planner_variants
from eval_nuscenes.nuscenes_reader import CommandSource, EgoStateSource, NuScenesSplit
from vla_autoprune.bundle import PREPROCESS, Bundle, load_bundle
from vla_autoprune.errors import RecipeError
from vla_autoprune.images import Reduction
from vla_autoprune.models.preprocess import read_preprocessing
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
    """Bundles on some samples.

    Attributes:
        bundles: their directories; the first is what the others are compared with.
        samples: what they plan.
        budgets: of the pruned variants; all of the first recipe's where None.
        policies: of the pruned variants.
        backend: a name of `engines.backends`.
        threads: of the backend; all cores where None.
        warm_up: uncounted plans per variant.
    """

    bundles: tuple[Path, ...]
    samples: SplitChoice
    budgets: tuple[float, ...] | None = None
    policies: tuple[PrunedKind, ...] = ("autoprune", "random")
    backend: BackendName = "onnxruntime"
    threads: int | None = None
    warm_up: int = 3

    def open(self) -> OpenRun:
        """Load the bundles and the data.

        Raises:
            BundleError: a bundle is not whole.
            RecipeError: its recipe has no such budget.
            InputError: the data cannot be read.
        """
        return OpenRun(self)


class OpenRun:
    """A run with its bundles loaded; planning starts no earlier than `variants` is asked for."""

    def __init__(self, run: BundleRun) -> None:
        self.run = run
        self.bundles: dict[str, Bundle] = {
            name: load_bundle(path) for name, path in bundle_names(run.bundles).items()
        }
        first = next(iter(self.bundles.values()))
        budgets = first.recipe.budgets if run.budgets is None else run.budgets
        self.budgets = tuple(sorted(set(budgets), reverse=True))
        for name, bundle in self.bundles.items():
            for budget in self.budgets:
                try:
                    bundle.recipe.buckets_of(budget)
                except RecipeError as error:
                    told = f"bundle {name}: {error}; --budgets takes those that all bundles have"
                    raise RecipeError(told if len(self.bundles) > 1 else str(error)) from error

    @property
    def recipes(self) -> dict[str, PruningRecipe]:
        """By name of the bundle."""
        return {name: bundle.recipe for name, bundle in self.bundles.items()}

    @property
    def cameras(self) -> tuple[str, ...]:
        """What the bundles look through."""
        return tuple(
            dict.fromkeys(camera for recipe in self.recipes.values() for camera in recipe.layout.cameras)
        )

    @cached_property
    def reduction(self) -> Reduction:
        """How the bundles have images decoded; all see the same, so of several the least."""
        each = [read_preprocessing(bundle.path / PREPROCESS).reduction for bundle in self.bundles.values()]
        return lambda width, height: min(reduction(width, height) for reduction in each)

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
        """What plans the samples; one backend per bundle behind all of its variants."""
        from vla_autoprune.runtime.planner import Planner

        first = next(iter(self.bundles.values()))
        sources = [
            PlannerSource(
                name, Planner(bundle, self._backends[name]).variant, _unpruned(bundle) != _unpruned(first)
            )
            for name, bundle in self.bundles.items()
        ]
        return planner_variants(sources, self.budgets, self.run.policies)

    @property
    def device(self) -> str:
        """What the backends run on."""
        return next(iter(self._backends.values())).device

    @cached_property
    def _backends(self) -> dict[str, Backend]:
        return {
            name: open_backend(self.run.backend, bundle, threads=self.run.threads)
            for name, bundle in self.bundles.items()
        }

    def close(self) -> None:
        """Give the backends' memory back."""
        for backend in self._backends.values():
            backend.close()


def bundle_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names for some bundles: their folders' names, or the paths where those are not different."""
    names = [path.resolve().name for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else map(str, paths), paths, strict=True))


def _unpruned(bundle: Bundle) -> tuple[object, ...]:
    """What decides on the answers where nothing is pruned."""
    recipe, options = bundle.recipe, bundle.manifest.options
    return recipe.model.weights_sha256, recipe.layout, options.precision, options.opset
