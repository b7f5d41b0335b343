"""How well the model drives scenes it was not trained on, and whether its attention beats chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_autoprune.frame import CAMERAS, WAYPOINT_TIMES_S
from vla_autoprune.models.driving_vla import DrivingVla
from vla_autoprune.models.packed import Pruning, greedy_actions, make_prefix, visual_features
from vla_autoprune.models.scene_store import SceneStore
from vla_autoprune.pruning.schedule import (
    calibrated_curve,
    default_pruning_points,
    reachable_budget,
    solve_stage_counts,
)

FloatArray = NDArray[np.floating]

EGO_LENGTH_M, EGO_WIDTH_M, EGO_CENTRE_M = 4.084, 1.85, 1.35
"""The nuScenes car, and how far its centre lies in front of the rear axle."""

GREY = 128
RANDOM_DRAWS = 2


@dataclass(frozen=True)
class OpenLoop:
    """Open-loop figures of one driver on the held-out scenes.

    Attributes:
        l2_m: [scenes, 6] distance to the expert at WAYPOINT_TIMES_S.
        collides: [scenes] whether a planned waypoint overlaps another road user, where the expert's do not.
    """

    l2_m: FloatArray
    collides: NDArray[np.bool_]

    def summary(self) -> dict[str, float]:
        """L2 at 1, 2 and 3 s in metres and the collision rate in percent."""
        means = {f"l2_{second}s_m": float(self.l2_m[:, 2 * second - 1].mean()) for second in (1, 2, 3)}
        return {**means, "collision_percent": float(100 * self.collides.mean())}


@dataclass(frozen=True)
class RankTest:
    """Attention against random ranking at equal counts.

    Attributes:
        points: the pruning points.
        kept: visual tokens kept after each.
        budget: mean visual tokens into the layers, over all of them.
        reduction: of the attention over heads and rows.
        full_m: L2 at 3 s with nothing dropped.
        attention_m: with the tokens the attention ranks first.
        random_m: with random tokens, mean of several draws.
        gain_m: random less attention, paired over scenes.
        gain_interval_m: 95 % bootstrap interval of it.
        p_value: of a two-sided sign-flip test.
    """

    points: tuple[int, ...]
    kept: tuple[int, ...]
    budget: float
    reduction: str
    full_m: float
    attention_m: float
    random_m: float
    gain_m: float
    gain_interval_m: tuple[float, float]
    p_value: float

    @property
    def beats_chance(self) -> bool:
        """Whether attention is better than random by more than chance explains, at 5 %."""
        return self.gain_m > 0 and self.p_value < 0.05


@dataclass(frozen=True)
class HeldOut:
    """Greedy planning on held-out scenes; asks the driven query of each scene, as a data set would.

    Attributes:
        store: the scenes.
        scenes: how many of them.
        batch: scenes at once.
    """

    store: SceneStore
    scenes: int
    batch: int = 50
    _rows: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", np.arange(min(self.scenes, len(self.store))))

    def compare(
        self, vla: DrivingVla, cameras: Sequence[int] = tuple(range(len(CAMERAS)))
    ) -> dict[str, OpenLoop]:
        """The model, the same model with grey images, and constant velocity."""
        return {
            "model": self.drive(vla, cameras),
            "images blanked": self.drive(vla, cameras, blank=True),
            "constant velocity": self.constant_velocity(),
        }

    def constant_velocity(self) -> OpenLoop:
        """Straight on at the present speed."""
        speed = self.store.speed_mps[self._rows, 0].cpu().numpy()
        plans = np.zeros((len(speed), len(WAYPOINT_TIMES_S), 3))
        plans[..., 0] = speed[:, None] * np.array(WAYPOINT_TIMES_S)
        return self._judge(plans)

    @torch.no_grad()
    def drive(
        self,
        vla: DrivingVla,
        cameras: Sequence[int] = tuple(range(len(CAMERAS))),
        pruning: Pruning | None = None,
        blank: bool = False,
        seed: int = 0,
    ) -> OpenLoop:
        """Plan greedily.

        Args:
            vla: the model, on the store's device.
            cameras: the prompt holds only these.
            pruning: drop visual tokens between layers.
            blank: grey images.
            seed: of random rankings.

        Returns:
            The figures. An answer that is no plan stands still, which costs it dearly.
        """
        model, device = vla.model, self.store.device
        was_training = model.training
        model.eval()
        prefix = make_prefix(vla.prompt, cameras)
        generator = torch.Generator(device).manual_seed(seed)
        plans = np.zeros((len(self._rows), len(WAYPOINT_TIMES_S), 3))
        for start in range(0, len(self._rows), self.batch):
            rows = self._rows[start : start + self.batch]
            images = self.store.images_of(rows, prefix.cameras)
            if blank:
                images = torch.full_like(images, GREY)
            _, features = visual_features(model, normalise(images.flatten(0, 1), vla))
            features = features.unflatten(0, (len(rows), len(prefix.cameras))).flatten(1, 2)
            suffix = self.store.suffix_ids[rows, 0]
            tokens = greedy_actions(
                model, prefix, features, suffix, vla.codec.length, pruning=pruning, generator=generator
            )
            for row, answer in zip(rows, tokens.cpu().numpy(), strict=True):
                allowed = all(
                    token in vla.codec.tokens_at(place) for place, token in enumerate(answer.tolist())
                )
                if allowed:
                    plans[row] = vla.codec.decode(answer)
        model.train(was_training)
        return self._judge(plans)

    def rank_test(
        self,
        vla: DrivingVla,
        pruning_points: Sequence[int],
        kept: Sequence[int],
        reductions: Sequence[str] = ("mean", "max"),
    ) -> tuple[RankTest, ...]:
        """Compare what attention keeps with random tokens, at equal counts, scene by scene.

        Args:
            vla: the model, on the store's device.
            pruning_points: layers after which tokens are dropped.
            kept: visual tokens kept after each.
            reductions: of the attention over heads and suffix rows: "mean", "max" or both.

        Returns:
            The figures on L2 at 3 s, one per reduction.
        """
        points, counts = tuple(pruning_points), tuple(kept)
        layers = vla.decoder_config.num_hidden_layers
        visual = vla.prompt.layout.visual_tokens
        into = [visual] * layers
        for point, count in zip(points, counts, strict=True):
            into[point + 1 :] = [count] * (layers - point - 1)
        full = self.drive(vla).l2_m[:, -1]
        draws = [
            self.drive(vla, pruning=Pruning(points, counts, ranking="random"), seed=seed).l2_m[:, -1]
            for seed in range(RANDOM_DRAWS)
        ]
        chance = np.mean(draws, axis=0)
        tests = []
        for reduction in reductions:
            ranked = self.drive(vla, pruning=Pruning(points, counts, reduction=reduction)).l2_m[:, -1]
            low, high, p_value = paired_test(chance - ranked)
            tests.append(
                RankTest(
                    points=points,
                    kept=counts,
                    budget=sum(into) / (visual * layers),
                    reduction=reduction,
                    full_m=float(full.mean()),
                    attention_m=float(ranked.mean()),
                    random_m=float(chance.mean()),
                    gain_m=float((chance - ranked).mean()),
                    gain_interval_m=(low, high),
                    p_value=p_value,
                )
            )
        return tuple(tests)

    def rank_tests(self, vla: DrivingVla, budgets: Sequence[float] = (0.5, 0.25)) -> tuple[RankTest, ...]:
        """The rank test layer by layer, then for whole schedules over the layers that passed it.

        Every default pruning point is tested alone, at the count a schedule of the smallest budget leaves
        there. The points whose ranking by the mean beats chance are those a recipe for this model should use.
        """
        layers = vla.decoder_config.num_hidden_layers
        visual = vla.prompt.layout.visual_tokens
        points = default_pruning_points(layers)
        leanest = schedule_counts(visual, layers, points, min(budgets))
        tests = [
            test
            for point, count in zip(points, leanest, strict=True)
            for test in self.rank_test(vla, (point,), (count,))
        ]
        passed = tuple(test.points[0] for test in tests if test.reduction == "mean" and test.beats_chance)
        for budget in budgets if passed else ():
            tests += self.rank_test(vla, passed, schedule_counts(visual, layers, passed, budget))
        return tuple(tests)

    def _judge(self, plans: FloatArray) -> OpenLoop:
        truth = self.store.waypoints[self._rows, 0].cpu().numpy().astype(np.float64)
        obstacles = self.store.obstacles[self._rows, 0].astype(np.float64)
        avoidable = ~overlaps(truth, obstacles)
        return OpenLoop(
            l2_m=np.hypot(plans[..., 0] - truth[..., 0], plans[..., 1] - truth[..., 1]),
            collides=(overlaps(plans, obstacles) & avoidable).any(axis=1),
        )


def schedule_counts(
    visual: int, layers: int, points: Sequence[int], budget: float, slope: float = 0.2
) -> tuple[int, ...]:
    """Visual tokens kept after each pruning point for a budget of mean tokens into the layers.

    A decoder too shallow for the budget gets the smallest one that leaves every layer a sixteenth of them.
    """
    least = max(1, visual // 16)
    reachable = max(budget, reachable_budget(visual, layers, points, least))
    return solve_stage_counts(visual, points, reachable, calibrated_curve(layers, slope, 14.9), least)[1:]


def normalise(images: Tensor, vla: DrivingVla) -> Tensor:
    """[M, S, S, 3] uint8 to pixel values [M, 3, S, S], as `Preprocessing.apply` gives them."""
    mean = torch.tensor(vla.preprocessing.mean, device=images.device)
    std = torch.tensor(vla.preprocessing.std, device=images.device)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def paired_test(
    differences: FloatArray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Bootstrap interval and sign-flip test of a mean of paired differences.

    Args:
        differences: [n].
        resamples: of both.
        seed: of both.

    Returns:
        Lower and upper end of the 95 % interval, and the two-sided p-value.
    """
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(differences), (resamples, len(differences)))
    low, high = np.quantile(differences[picks].mean(axis=1), (0.025, 0.975))
    signs = random.choice((-1.0, 1.0), (resamples, len(differences)))
    beyond = np.abs((signs * differences).mean(axis=1)) >= abs(differences.mean()) - 1e-12
    return float(low), float(high), float((beyond.sum() + 1) / (resamples + 1))


def overlaps(plans: FloatArray, obstacles: FloatArray) -> NDArray[np.bool_]:
    """Whether the ego vehicle's box overlaps another at each waypoint (separating axes).

    Args:
        plans: [n, 6, 3] x, y, heading of the rear axle.
        obstacles: [n, 6, boxes, 5] x, y, heading, length, width; NaN where absent.

    Returns:
        [n, 6].
    """
    heading = plans[..., 2]
    forward = np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    centre = plans[..., :2] + EGO_CENTRE_M * forward
    offset = obstacles[..., :2] - centre[..., None, :]
    ego = np.broadcast_to(np.array([EGO_LENGTH_M, EGO_WIDTH_M]) / 2, (*obstacles.shape[:-1], 2))
    other = obstacles[..., 3:5] / 2
    turn = obstacles[..., 2] - heading[..., None]
    cosine, sine = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    apart = np.zeros(obstacles.shape[:-1], dtype=bool)
    for angle, near, far in ((heading[..., None], ego, other), (obstacles[..., 2], other, ego)):
        along = np.abs(offset[..., 0] * np.cos(angle) + offset[..., 1] * np.sin(angle))
        across = np.abs(-offset[..., 0] * np.sin(angle) + offset[..., 1] * np.cos(angle))
        apart |= along > near[..., 0] + far[..., 0] * cosine + far[..., 1] * sine
        apart |= across > near[..., 1] + far[..., 0] * sine + far[..., 1] * cosine
    present = np.isfinite(obstacles[..., 0])
    return (present & ~apart).any(axis=-1)


def report_lines(figures: Mapping[str, OpenLoop]) -> list[str]:
    """One line per driver, for people."""
    lines = []
    for name, drive in figures.items():
        s = drive.summary()
        lines.append(
            f"{name:18s} L2 {s['l2_1s_m']:.2f} / {s['l2_2s_m']:.2f} / {s['l2_3s_m']:.2f} m at 1/2/3 s, "
            f"collisions {s['collision_percent']:.1f} %"
        )
    return lines
