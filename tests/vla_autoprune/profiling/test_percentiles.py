from __future__ import annotations

import numpy as np
import pytest

from vla_autoprune.profiling.percentiles import distribution, median_ratio, missing_percentiles


def test_percentiles_of_a_known_distribution():
    samples = np.random.default_rng(0).permutation(np.arange(1, 1001)) / 10  # 0.1 … 100.0, evenly
    found = distribution(samples)
    assert found.count == 1000 and found.max == 100.0
    assert found.p50 == pytest.approx(50.05) and found.mean == pytest.approx(50.05)
    assert found.p90 == pytest.approx(90.01) and found.p99 == pytest.approx(99.001)
    assert found.jitter == pytest.approx(100 / np.sqrt(12), rel=1e-3)  # of a uniform distribution


def test_too_few_samples_give_no_percentile_and_say_so():
    found = distribution(np.ones(99))
    assert found.p90 == 1.0 and found.p99 is None
    assert distribution([3.0]).p90 is None and distribution([3.0]).p50 == 3.0
    assert distribution(np.ones(100)).p99 == 1.0
    assert missing_percentiles(99) == "99 frames per bucket are too few: p99 needs 100"
    assert "p90 needs 10" in missing_percentiles(9) and missing_percentiles(100) == ""


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [[1.0]]])
def test_no_samples_are_refused(samples):
    with pytest.raises(ValueError, match="at least one finite sample"):
        distribution(samples)


def test_a_ratio_knows_its_doubt():
    generator = np.random.default_rng(1)
    base, other = generator.gamma(50, 1.0, 200), 1.2 * generator.gamma(50, 1.0, 200)
    ratio = median_ratio(base, other)
    assert ratio.low < 1.2 < ratio.high and 0.01 < ratio.high - ratio.low < 0.15
    same = median_ratio(base, generator.gamma(50, 1.0, 200))
    assert same.low < 1 < same.high
    assert median_ratio(base[:9], other).low is None
    # Measured in turns, what slows both down cancels.
    busy = np.repeat(generator.uniform(1, 5, 20), 10)
    apart, together = (median_ratio(base * busy, other * busy, paired=paired) for paired in (False, True))
    assert together.high - together.low < 0.5 * (apart.high - apart.low)
    assert together.low < 1.2 < together.high
    # A disturbance that lasts makes neighbours alike; the interval has to grow with it.
    slow = base + 20 * (np.arange(200) // 50 % 2)
    steady, drifting = median_ratio(base, base), median_ratio(base, slow)
    assert drifting.high - drifting.low > 2 * (steady.high - steady.low)
