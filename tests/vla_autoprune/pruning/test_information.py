"""The corrected measure: scale-free, never negative, blind to padding; the published one is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_autoprune.pruning.information import calibrated_information, information, reference_information

PUBLISHED_HEADS = 32
# docs/pruning.md prints these: (text rows, visual tokens, published, exact), bits summed over 32 heads.
EPSILON_TABLE = [
    (30, 160, 6.1, 6.3),
    (60, 576, 5.1, 6.6),
    (150, 1250, 0.6, 6.7),
    (200, 1600, -2.1, 6.7),
    (150, 2880, -3.9, 6.7),
    (200, 4320, -8.7, 6.7),
]


def attention(heads: int, rows: int, visual: int, mass: float = 0.2, seed: int = 0) -> np.ndarray:
    """Dirichlet(0.5) rows of one visual attention mass."""
    drawn = np.random.default_rng(seed).standard_gamma(0.5, (heads, rows, visual))
    return (mass * drawn / drawn.sum(axis=2, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("rows", "visual", "published", "exact"), EPSILON_TABLE)
def test_the_epsilon_makes_the_published_measure_one_of_prompt_length(
    rows: int, visual: int, published: float, exact: float
) -> None:
    heads = 4
    drawn = attention(heads, rows, visual)
    assert reference_information(drawn).mean() * PUBLISHED_HEADS == pytest.approx(published, abs=0.15)
    assert calibrated_information(drawn).mean() * PUBLISHED_HEADS == pytest.approx(exact, abs=0.15)


@settings(max_examples=60)
@given(
    heads=st.integers(1, 4),
    rows=st.integers(1, 12),
    visual=st.integers(1, 40),
    mass=st.floats(1e-6, 1.0),
    seed=st.integers(0, 1000),
)
def test_calibrated_information_is_never_negative_and_bounded(
    heads: int, rows: int, visual: int, mass: float, seed: int
) -> None:
    bits = calibrated_information(attention(heads, rows, visual, mass, seed))
    assert bits.shape == (heads,)
    assert (bits >= -1e-12).all()
    assert (bits <= 1.001 * mass * np.log2(max(rows, 2)) + 1e-9).all()


def test_one_row_equal_rows_and_zeros_give_zero_without_nan() -> None:
    assert calibrated_information(attention(3, 1, 50)) == pytest.approx(0.0, abs=1e-9)
    assert calibrated_information(np.repeat(attention(3, 1, 50), 7, axis=1)) == pytest.approx(0.0, abs=1e-9)
    assert calibrated_information(np.zeros((2, 5, 9), dtype=np.float32)).tolist() == [0.0, 0.0]
    one_hot = np.eye(8, dtype=np.float32)[None]
    assert information(one_hot) == pytest.approx(3.0)


def test_calibrated_information_scales_with_the_mass_and_not_with_heads() -> None:
    drawn = attention(4, 20, 60).astype(np.float64)
    assert information(drawn / 1000) == pytest.approx(information(drawn) / 1000, rel=1e-9)
    assert information(np.concatenate([drawn, drawn])) == pytest.approx(information(drawn))
    assert information(np.concatenate([drawn, drawn]), "reference") == pytest.approx(
        2 * information(drawn, "reference")
    )


@pytest.mark.parametrize("form", ["reference", "calibrated"])
def test_padding_takes_no_part(form: str) -> None:
    drawn = attention(3, 9, 30)
    weight = np.array([1, 1, 0, 1, 1, 0, 0, 1, 0], dtype=np.float32)
    assert information(drawn, form, weight) == pytest.approx(
        information(drawn[:, weight > 0], form), rel=1e-6
    )


@pytest.mark.parametrize(
    ("shape", "weight", "message"),
    [
        ((2, 0, 4), None, "expected"),
        ((2, 4), None, "expected"),
        ((2, 3, 4), [0.0, 0.0, 0.0], "not all of them 0"),
        ((2, 3, 4), [1.0, 1.0], "must be 3 values"),
    ],
)
def test_bad_input_is_named(shape: tuple[int, ...], weight: list[float] | None, message: str) -> None:
    rows = None if weight is None else np.array(weight)
    with pytest.raises(ValueError, match=message):
        calibrated_information(np.ones(shape), rows)
