from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest

from eval_nuscenes.world.render import (
    LABELS,
    PEDESTRIAN_LABEL,
    RIG,
    VEHICLE_LABEL,
    Renderer,
    render_cameras,
    render_with_labels,
)
from eval_nuscenes.world.scene import (
    Actor,
    ActorState,
    EgoPose,
    RoadMap,
    Scene,
    TrafficLight,
    WorldState,
)
from eval_nuscenes.world.traffic import simulate_scene
from vla_autoprune.frame import CAMERAS, Command

EMPTY = RoadMap((), (), (), (), (), (), (), (), ())
CAR = Actor("car0", "vehicle.car", 1.9, 4.5, 1.6, (38, 84, 160))
WALKER = Actor("adult1", "human.pedestrian.adult", 0.6, 0.7, 1.8, (255, 60, 200))
EGO = EgoPose(30.0, -12.0, 0.7, 5.0, 0.0, 0.0)


def seen_from_ego(actor: int, ahead: float, left: float, turn: float = 0.0, **more: object) -> ActorState:
    cos, sin = math.cos(EGO.heading), math.sin(EGO.heading)
    x, y = EGO.x + ahead * cos - left * sin, EGO.y + ahead * sin + left * cos
    return ActorState(actor, x, y, EGO.heading + turn, 0.0, **more)


def labels_of(states: tuple[ActorState, ...], size: tuple[int, int] = (800, 450)) -> dict[str, np.ndarray]:
    renderer = Renderer(EMPTY, (CAR, WALKER), RIG, *size)
    _, labels = renderer.render(WorldState(0.0, EGO, states, (), Command.STRAIGHT))
    return dict(zip(CAMERAS, labels, strict=True))


def projected(actor: Actor, state: ActorState, channel: str, width: int, height: int) -> np.ndarray:
    """[8, 2] pixels of the box corners, from the calibration alone, as the nuScenes devkit does it."""
    from pyquaternion import Quaternion

    length, wide, tall = actor.length_m / 2, actor.width_m / 2, actor.height_m
    box = [(x, y, z) for x in (-length, length) for y in (-wide, wide) for z in (0.25, tall)]
    turn = Quaternion(axis=(0, 0, 1), angle=state.heading).rotation_matrix
    world = np.array(box) @ turn.T + (state.x, state.y, 0.0)
    to_ego = Quaternion(axis=(0, 0, 1), angle=EGO.heading).rotation_matrix
    camera = RIG.cameras[channel]
    in_ego = (world - (EGO.x, EGO.y, 0.0)) @ to_ego
    in_camera = (in_ego - camera.translation) @ Quaternion(camera.rotation).rotation_matrix
    assert (in_camera[:, 2] > 0).all()
    pixels = in_camera @ camera.intrinsic_at(width, height).T
    return pixels[:, :2] / pixels[:, 2:]


@pytest.mark.parametrize(
    ("channel", "ahead", "left"),
    [
        ("CAM_FRONT", 18.0, 1.0),
        ("CAM_FRONT_LEFT", 11.0, 13.0),
        ("CAM_FRONT_RIGHT", 11.0, -13.0),
        ("CAM_BACK_LEFT", -5.0, 14.0),
        ("CAM_BACK_RIGHT", -5.0, -14.0),
        ("CAM_BACK", -16.0, 2.0),
    ],
)
@pytest.mark.parametrize("size", [(800, 450), (96, 96)])
def test_boxes_land_where_the_calibration_puts_them(
    channel: str, ahead: float, left: float, size: tuple[int, int]
) -> None:
    pytest.importorskip("pyquaternion")
    state = seen_from_ego(0, ahead, left, turn=0.4)
    labels = labels_of((state,), size)[channel]
    factor = labels.shape[1] / size[0]
    rows, columns = np.nonzero(labels == VEHICLE_LABEL + int(math.hypot(ahead, left)))
    corners = projected(CAR, state, channel, *size) * factor
    slack = 1.0 + 0.02 * np.ptp(corners[:, 0])
    assert columns.min() == pytest.approx(corners[:, 0].min(), abs=slack)
    assert columns.max() + 1 == pytest.approx(corners[:, 0].max(), abs=slack)
    assert rows.max() + 1 == pytest.approx(corners[:, 1].max(), abs=slack)
    # The roof is narrower than the box, so its near edge does not reach the top of the box.
    assert corners[:, 1].min() - slack < rows.min() < corners[:, 1].min() + 0.35 * np.ptp(corners[:, 1])


def test_the_rig_has_the_six_cameras_and_looks_all_around() -> None:
    assert tuple(RIG.cameras) == CAMERAS
    covered = np.zeros(360, dtype=bool)
    for camera in RIG.cameras.values():
        ahead = camera.ego_from_camera @ (0.0, 0.0, 1.0)
        down = camera.ego_from_camera @ (0.0, 1.0, 0.0)
        assert down == pytest.approx((0.0, 0.0, -1.0), abs=1e-12)
        assert np.linalg.norm(camera.rotation) == pytest.approx(1.0)
        yaw = math.degrees(math.atan2(ahead[1], ahead[0]))
        half = math.degrees(math.atan2(800, camera.intrinsic[0, 0]))
        covered[np.arange(math.ceil(yaw - half), math.floor(yaw + half) + 1) % 360] = True
    assert covered.all()


def test_intrinsics_scale_with_each_axis() -> None:
    camera = RIG.cameras["CAM_FRONT"]
    native, squeezed = camera.intrinsic_at(1600, 900), camera.intrinsic_at(96, 96)
    assert np.array_equal(native, camera.intrinsic)
    assert squeezed[0] == pytest.approx(native[0] * 96 / 1600)
    assert squeezed[1] == pytest.approx(native[1] * 96 / 900)


def test_near_things_hide_far_ones() -> None:
    behind = seen_from_ego(1, 30.0, 0.0)
    assert (labels_of((behind,))["CAM_FRONT"] == PEDESTRIAN_LABEL + 30).any()
    hidden = labels_of((behind, seen_from_ego(0, 12.0, 0.0)))["CAM_FRONT"]
    assert not (hidden == PEDESTRIAN_LABEL + 30).any()
    assert (hidden == VEHICLE_LABEL + 12).any()


def test_brake_lights_show_from_behind_only() -> None:
    lit = LABELS.index("brake_light")

    def pixels(turn: float, braking: bool) -> int:
        labels = labels_of((seen_from_ego(0, 20.0, 0.0, turn, braking=braking),))
        return int((labels["CAM_FRONT"] == lit).sum())

    assert pixels(0.0, braking=True) > 200
    assert pixels(0.0, braking=False) == pixels(math.pi, braking=True) == 0


@pytest.mark.parametrize(
    ("colour", "lit"),
    [
        ("red", {"light_red"}),
        ("amber", {"light_amber"}),
        ("green", {"light_green"}),
        ("red_amber", {"light_red", "light_amber"}),
    ],
)
def test_lamps_show_the_lights_colour_to_those_they_face(colour: str, lit: set[str]) -> None:
    def shown(heading: float) -> set[str]:
        line = np.array([[10.0, 0.0], [10.0, -3.5]])
        light = TrafficLight("light0", (19.0, -4.7, 3.4), heading, line, ("lane",))
        renderer = Renderer(replace(EMPTY, lights=(light,)), (), RIG, 96, 96)
        ego = EgoPose(-5.0, -1.75, 0.0, 0.0, 0.0, 0.0)
        _, labels = renderer.render(WorldState(0.0, ego, (), (colour,), Command.STRAIGHT))
        names = {LABELS[value] for value in np.unique(labels[1]) if value < len(LABELS)}
        return names & {"light_red", "light_amber", "light_green"}

    assert shown(math.pi) == lit
    assert shown(0.0) == set()


def test_the_yield_sign_faces_those_who_give_way() -> None:
    def red(heading: float) -> int:
        # The line runs from the middle of the road to the kerb on the right of those who come from x < 0.
        line = np.array([[0.0, 0.0], [0.0, -3.5]])
        renderer = Renderer(replace(EMPTY, yield_lines=(line,)), (), RIG, 96, 96)
        ego = EgoPose(-12.0 * math.cos(heading), -1.75, heading, 0.0, 0.0, 0.0)
        images, _ = renderer.render(WorldState(0.0, ego, (), (), Command.STRAIGHT))
        front = images[1].astype(int)
        return int(((front[..., 0] > 150) & (front[..., 1] < 90)).sum())

    assert red(0.0) > 20
    assert red(math.pi) == 0


def test_ground_that_reaches_behind_the_camera_is_cut_at_it() -> None:
    road = np.array([[-50.0, -4.0], [80.0, -4.0], [80.0, 4.0], [-50.0, 4.0]])
    renderer = Renderer(replace(EMPTY, road_segments=(road,)), (), RIG, 96, 96)
    ego = EgoPose(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    _, labels = renderer.render(WorldState(0.0, ego, (), (), Command.STRAIGHT))
    size = labels.shape[1]
    for front in (labels[1], labels[4]):
        assert (front[-1] == 1).all(), "the road fills the bottom row"
        assert (front[: size // 2] == 0).all(), "and nothing of it is above the horizon"
    # Its edge, 4 m aside, meets the bottom row where the calibration says.
    column = np.flatnonzero(labels[1][int(size * 0.6)] == 1)
    depth = 1.5 * (1260 * 96 / 900) / (0.1 * 96)
    edge = 4.0 / depth * 1260 / 1600 * size
    assert column.max() - size / 2 == pytest.approx(edge, abs=size * 0.02)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return simulate_scene("scene-0006", 6, 8.0)


def test_same_state_same_bytes(scene: Scene) -> None:
    one, other = (render_cameras(scene, 40, RIG, 96, 96) for _ in range(2))
    assert tuple(one) == CAMERAS
    for name in CAMERAS:
        assert one[name].dtype == np.uint8 and one[name].shape == (96, 96, 3)
        assert np.array_equal(one[name], other[name])


def test_a_squeezed_image_looks_like_a_large_one_scaled_down(scene: Scene) -> None:
    large = render_cameras(scene, 40, RIG, 800, 450)
    small = render_cameras(scene, 40, RIG, 96, 96)
    for name in CAMERAS:
        assert large[name].shape == (450, 800, 3)
        scaled = cv2.resize(large[name], (96, 96), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(scaled - small[name]).mean() < 3.0
        assert np.abs((scaled - small[name]).mean()) < 1.0


def test_threads_make_no_difference(scene: Scene) -> None:
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        single = render_cameras(scene, 40, RIG, 160, 90)
        cv2.setNumThreads(4)
        several = render_cameras(scene, 40, RIG, 160, 90)
    finally:
        cv2.setNumThreads(before)
    for name in CAMERAS:
        assert np.array_equal(single[name], several[name])


def test_dusk_and_haze_change_the_light_but_not_the_labels(scene: Scene) -> None:
    clear, labels = render_with_labels(replace(scene, daylight=1.0, haze=0.0), 40, RIG, 96, 96)
    dim, same = render_with_labels(replace(scene, daylight=0.5, haze=0.0), 40, RIG, 96, 96)
    hazy, _ = render_with_labels(replace(scene, daylight=1.0, haze=0.8), 40, RIG, 96, 96)
    for name in CAMERAS:
        assert np.array_equal(labels[name], same[name])
        assert dim[name].mean() < 0.85 * clear[name].mean()
    assert any(not np.array_equal(clear[name], hazy[name]) for name in CAMERAS)
