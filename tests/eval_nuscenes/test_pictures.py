"""Pictures show what they claim to."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from eval_nuscenes.pictures import (
    NOMINAL_FRONT,
    PLAN,
    boxes_in_ego,
    draw_path,
    kept_masks,
    kept_mosaic,
    paint_kept,
    plan_picture,
    project,
    token_grid,
)
from vla_autoprune.frame import CAMERAS
from vla_autoprune.recipe import PromptLayout


@pytest.fixture(scope="module")
def layout(six_camera_layout: PromptLayout) -> PromptLayout:
    return six_camera_layout


@pytest.mark.parametrize(
    ("tokens", "size", "grid"), [(36, (96, 96), (6, 6)), (180, (800, 448), (10, 18)), (5, (100, 100), (1, 5))]
)
def test_token_grids_have_square_cells(tokens: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    rows, columns = token_grid(tokens, *size)
    assert rows * columns == tokens
    assert (rows, columns) == grid or (columns, rows) == grid


def test_kept_tokens_land_on_their_camera_row_by_row(layout: PromptLayout) -> None:
    masks = kept_masks(layout, np.array([0, 36 + 6 * 2 + 4, 215]))
    assert masks["CAM_FRONT_LEFT"][0, 0] and masks["CAM_FRONT_LEFT"].sum() == 1
    assert masks["CAM_FRONT"][2, 4] and masks["CAM_FRONT"].sum() == 1
    assert masks["CAM_BACK_RIGHT"][5, 5]
    assert not masks["CAM_BACK"].any()


def test_kept_cells_stay_and_dropped_cells_fade() -> None:
    image = np.full((90, 160, 3), (200, 100, 50), dtype=np.uint8)
    kept = np.zeros((3, 4), dtype=bool)
    kept[1, 2] = True
    painted = paint_kept(image, kept, width=160)
    assert painted[45, 100].tolist() == [200, 100, 50]
    assert painted[10, 10].max() < 70
    assert np.ptp(painted[10, 10]) == 0


def test_a_mosaic_has_three_cameras_a_row(layout: PromptLayout) -> None:
    images = {camera: np.zeros((90, 160, 3), dtype=np.uint8) for camera in CAMERAS}
    mosaic = kept_mosaic(images, kept_masks(layout, np.arange(216)), width=80)
    assert mosaic.shape == (2 * 45 + 2, 3 * 80 + 2 * 2, 3)


def test_points_ahead_project_to_the_middle() -> None:
    pixels, depth = project(np.array([[21.7, 0.02, 1.51], [-5.0, 0.0, 0.0], [21.7, 5.0, 0.0]]), NOMINAL_FRONT)
    np.testing.assert_allclose(pixels[0], [816.3, 491.5])
    assert depth[0] == pytest.approx(20.0) and depth[1] < 0
    assert pixels[2, 0] < 816 and pixels[2, 1] > 491


@pytest.mark.parametrize("turn", [-1, 1])
def test_a_path_is_drawn_on_its_side_of_the_road(turn: int) -> None:
    image = np.zeros((450, 800, 3), dtype=np.uint8)
    times = np.arange(1, 7) * 0.5
    waypoints = np.column_stack([6 * times, turn * 0.8 * times**2, turn * np.arctan(0.27 * times)])
    drawn = draw_path(image, waypoints, NOMINAL_FRONT)
    columns = np.nonzero(drawn[250:330].any(axis=2))[1]
    assert len(columns) > 500
    assert (columns.mean() < 400) == (turn > 0)
    assert not drawn[:240].any()
    assert not image.any()


def test_a_path_that_stands_still_or_reverses_is_drawn_without_fuss() -> None:
    image = np.zeros((450, 800, 3), dtype=np.uint8)
    for ahead in (0.0, -10.0):
        waypoints = np.column_stack([np.linspace(0, ahead, 6), np.zeros((6, 2))])
        assert draw_path(image, waypoints, NOMINAL_FRONT, PLAN).shape == image.shape


def test_boxes_turn_into_the_ego_frame(make_drive: Callable) -> None:
    lead, walker = boxes_in_ego(make_drive()[0])
    np.testing.assert_allclose(lead.mean(axis=0), [14.94, 0.0], atol=1e-6)
    assert np.ptp(lead[:, 0]) == pytest.approx(4.6)
    assert walker[:, 1].mean() == pytest.approx(4.5)


def test_a_plan_becomes_one_picture(
    make_drive: Callable, pretend_planner: type, layout: PromptLayout
) -> None:
    frame = make_drive()[0].frame()
    picture = plan_picture(frame, pretend_planner(0.25).plan(frame), layout)
    decoded = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape[1] == 12 * 120
    assert decoded.std() > 30
