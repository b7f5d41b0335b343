import numpy as np
import pytest

from vla_autoprune.errors import PlanError
from vla_autoprune.models.actions import ActionCodec

CODEC = ActionCodec(first_distance_token=100, first_curvature_token=300)


def drive(speed: float, acceleration: float, curvature: float) -> np.ndarray:
    waypoints, x, y, heading = [], 0.0, 0.0, 0.0
    for tick in range(300):
        speed = max(0.0, speed + acceleration * 0.01)
        heading += curvature * speed * 0.01
        x += speed * 0.01 * np.cos(heading)
        y += speed * 0.01 * np.sin(heading)
        if tick % 50 == 49:
            waypoints.append((x, y, heading))
    return np.array(waypoints)


def plausible_drives(count: int) -> np.ndarray:
    random = np.random.default_rng(1)
    paths = []
    for _ in range(count):
        speed = random.uniform(0.0, 16.0)
        most = min(0.12, 3.0 / max(speed, 1.0) ** 2)  # 3 m/s² sideways, 8 m radius
        paths.append(drive(speed, random.uniform(-5.0, 2.0), random.uniform(-most, most)))
    return np.array(paths)


def test_round_trip_stays_within_a_decimetre_and_does_not_drift() -> None:
    paths = plausible_drives(400)
    decoded = np.array([CODEC.decode(tokens) for tokens in CODEC.encode(paths)])
    errors = np.hypot(decoded[..., 0] - paths[..., 0], decoded[..., 1] - paths[..., 1])
    assert errors.mean() < 0.035
    assert np.quantile(errors, 0.99) < 0.1
    assert errors[:, -1].mean() < 1.5 * errors[:, 0].mean()


def test_headings_follow_the_path() -> None:
    paths = plausible_drives(400)
    moving = np.hypot(paths[:, -1, 0] - paths[:, -2, 0], paths[:, -1, 1] - paths[:, -2, 1]) > 1.0
    decoded = np.array([CODEC.decode(tokens) for tokens in CODEC.encode(paths[moving])])
    assert np.abs(decoded[..., 2] - paths[moving][..., 2]).mean() < 0.012


def test_headings_do_not_ring_on_a_noisy_straight() -> None:
    random = np.random.default_rng(0)
    x = np.arange(1, 7) * 4.0
    for _ in range(50):
        path = np.stack([x, random.normal(0.0, 0.02, 6)], axis=1)
        assert np.abs(CODEC.decode(CODEC.encode(path))[:, 2]).max() < 0.05


def test_encoding_what_was_decoded_changes_nothing() -> None:
    tokens = CODEC.encode(plausible_drives(50))
    again = CODEC.encode(np.array([CODEC.decode(one) for one in tokens]))
    moving = tokens[:, 0::2] > CODEC.first_distance_token + 5
    assert (tokens[:, 0::2] == again[:, 0::2]).mean() > 0.99
    assert (tokens[:, 1::2] == again[:, 1::2])[moving].mean() > 0.99


def test_standing_still_is_straight_on() -> None:
    tokens = CODEC.encode(np.zeros((6, 3)))
    assert tokens.tolist() == [100, 300 + 40] * 6
    assert np.array_equal(CODEC.decode(tokens), np.zeros((6, 3), dtype=np.float32))


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ([100, 340] * 5, "10 action tokens"),
        ([100, 340] * 7, "14 action tokens"),
        ([100, 340, 340, 100] + [100, 340] * 4, "token 2 is 340"),
        ([100, 340] * 5 + [100, 381], "token 11 is 381"),
        ([221, 340] + [100, 340] * 5, r"token 0 is 221, not a distance token \(100..220\)"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(tokens: list[int], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        CODEC.decode(tokens)


@pytest.mark.parametrize("waypoints", [np.zeros((5, 3)), np.zeros((6, 4)), np.full((6, 3), np.nan)])
def test_waypoints_that_cannot_be_encoded_are_refused(waypoints: np.ndarray) -> None:
    with pytest.raises(PlanError, match="waypoint"):
        CODEC.encode(waypoints)


def test_the_bins_survive_json() -> None:
    assert ActionCodec.model_validate_json(CODEC.model_dump_json()) == CODEC
