import numpy as np
import pytest

from eval_nuscenes import lidar
from eval_nuscenes.lidar import Surroundings, sweep, visible_fraction

CAR = (4.6, 1.9, 1.6)
NO_WALLS = np.zeros((0, 5))


def car(x: float, y: float, heading: float = 0.0, size: tuple[float, float, float] = CAR) -> list[float]:
    return [x, y, size[2] / 2, *size, heading]


def cars(*boxes: list[float]) -> Surroundings:
    return Surroundings(np.array(boxes, dtype=np.float64).reshape(-1, 7), NO_WALLS)


def in_ego_frame(points: np.ndarray) -> np.ndarray:
    """Undo the sensor's mounting by its quaternion, independently of the module's own arithmetic."""
    from pyquaternion import Quaternion

    rotated = points[:, :3].astype(np.float64) @ Quaternion(lidar.LIDAR_ROTATION).rotation_matrix.T
    return rotated + np.array(lidar.LIDAR_TRANSLATION)


def test_an_empty_world_shows_rings_of_flat_ground() -> None:
    points = in_ego_frame(sweep(cars()).points)
    assert np.abs(points[:, 2]).max() < 1e-4
    assert len(np.unique(sweep(cars()).points[:, 4])) > 15
    assert np.linalg.norm(sweep(cars()).points[:, :3], axis=1).max() <= lidar.RANGE_M


def test_points_counted_on_a_box_lie_on_its_surface_and_face_the_sensor() -> None:
    turned = np.radians(30)
    swept = sweep(cars(car(15, 3, turned), car(-12, -4)))
    on_box = swept.points[:, 3] == 55.0
    assert swept.points_on_box.sum() == on_box.sum() > 50
    points = in_ego_frame(swept.points[on_box])
    first = points[points[:, 0] > 0] - (15, 3, 0.8)
    local = first[:, :2] @ np.array([[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]])
    outside = np.abs(np.column_stack([local, first[:, 2]])) - np.array(CAR) / 2
    assert np.abs(outside.max(axis=1)).max() < 1e-4, "every point is on the surface, none inside or outside"
    # The nearest face has its outward normal towards the sensor.
    assert np.all((points[points[:, 0] > 0][:, 0] < 15 + 2.2) & (len(first) == swept.points_on_box[0]))


def test_a_nearer_box_takes_the_points_of_the_one_behind_it() -> None:
    alone = sweep(cars(car(25, 0))).points_on_box
    hidden = sweep(cars(car(25, 0), car(12, 0, size=(4.6, 3.0, 4.0)))).points_on_box
    assert alone[0] > 10
    assert hidden[0] == 0
    assert hidden[1] > 100


def test_more_distant_boxes_get_fewer_points() -> None:
    counts = [sweep(cars(car(distance, 0))).points_on_box[0] for distance in (10, 20, 40, 90)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0, "out of range"


def test_a_narrow_distant_object_is_hit_in_some_spins() -> None:
    pedestrian = cars(car(55, 20, size=(0.6, 0.6, 1.7)))
    assert any(sweep(pedestrian, spin).points_on_box[0] for spin in range(6))


@pytest.mark.parametrize(
    ("blocker", "expected"),
    [(None, 1.0), (car(10, 0, size=(4, 6, 4)), 0.0), (car(15, -1.8, size=(0.5, 3.0, 4.0)), None)],
)
def test_visibility_falls_with_what_stands_in_the_way(
    blocker: list[float] | None, expected: float | None
) -> None:
    boxes = [car(30, 0)] + ([blocker] if blocker else [])
    seen = visible_fraction(cars(*boxes))[0]
    if expected is None:
        assert 0.1 < seen < 0.9
    else:
        assert seen == expected


def test_a_wall_hides_what_is_behind_it_and_is_hit_itself() -> None:
    wall = np.array([[15.0, -10.0, 15.0, 10.0, 8.0]])
    around = Surroundings(np.array([car(25, 0)]), wall)
    assert visible_fraction(around)[0] == 0.0
    swept = sweep(around)
    assert swept.points_on_box[0] == 0
    on_wall = in_ego_frame(swept.points[swept.points[:, 3] == 30.0])
    assert np.allclose(on_wall[:, 0], 15.0, atol=1e-4)
    assert on_wall[:, 2].max() < 8.0


def test_a_low_wall_is_seen_over() -> None:
    around = Surroundings(
        np.array([car(25, 0, size=(8, 2.5, 3.4))]), np.array([[15.0, -10.0, 15.0, 10.0, 1.2]])
    )
    assert 0.0 < visible_fraction(around)[0] < 1.0
    assert sweep(around).points_on_box[0] > 0
