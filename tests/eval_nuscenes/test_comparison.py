"""Policies at equal latency."""

from __future__ import annotations

import numpy as np
import pytest

from eval_nuscenes.bootstrap import SceneBootstrap
from eval_nuscenes.comparison import LatencyComparison, MeasuredVariant, compare_at_equal_latency

SCENES = [f"scene-{number // 4}" for number in range(40)]


def point(name: str, kind: str, latency_ms: float) -> MeasuredVariant:
    return MeasuredVariant(name=name, kind=kind, latency_ms=latency_ms)


def compare(variants: list[MeasuredVariant], l2_m: dict[str, np.ndarray]) -> list[LatencyComparison]:
    counted = np.ones((40, 3), dtype=bool)
    none = {name: np.zeros((40, 3)) for name in l2_m}
    return compare_at_equal_latency("standard", variants, l2_m, none, counted, SceneBootstrap(SCENES))


def constant(value: float) -> np.ndarray:
    return np.full((40, 3), value)


def test_the_other_curve_is_read_off_at_the_same_latency() -> None:
    variants = [
        point("full", "full", 100.0),
        point("autoprune 40%", "autoprune", 80.0),
        point("random 60%", "random", 90.0),
        point("random 25%", "random", 70.0),
    ]
    l2_m = {
        "full": constant(1.0),
        "autoprune 40%": constant(1.1),
        "random 60%": constant(1.4),
        "random 25%": constant(2.0),
    }
    (found,) = compare(variants, l2_m)
    assert (found.variant, found.against, found.latency_ms) == ("autoprune 40%", "random", 80.0)
    assert set(found.between) == {"random 25%", "random 60%"}
    assert found.l2_m.mean == pytest.approx(1.1 - 1.7)
    assert found.l2_m.verdict == "lower"


def test_nothing_is_read_off_beyond_the_curve() -> None:
    variants = [
        point("full", "full", 100.0),
        point("autoprune 25%", "autoprune", 60.0),
        point("autoprune 40%", "autoprune", 69.5),
        point("random 40%", "random", 70.0),
    ]
    l2_m = {variant.name: constant(1.0) for variant in variants}
    (found,) = compare(variants, l2_m)
    assert found.variant == "autoprune 40%" and found.between == ("random 40%",)


def test_equal_policies_are_not_told_apart_and_unequal_ones_are() -> None:
    generator = np.random.default_rng(3)
    of_scene = np.repeat(generator.normal(size=10), 4)[:, None]
    base = 2 + np.broadcast_to(of_scene, (40, 3))
    variants = [
        point("full", "full", 100.0),
        point("autoprune 40%", "autoprune", 80.0),
        point("random 40%", "random", 80.0),
        point("uniform 40%", "uniform", 80.0),
    ]
    l2_m = {
        "full": base,
        "autoprune 40%": base + 0.05 * generator.normal(size=(40, 3)),
        "random 40%": base + 0.2 + 0.05 * generator.normal(size=(40, 3)),
        "uniform 40%": base + 0.05 * generator.normal(size=(40, 3)),
    }
    verdicts = {found.against: found.l2_m.verdict for found in compare(variants, l2_m)}
    assert verdicts == {"random": "lower", "uniform": "no difference shown"}
