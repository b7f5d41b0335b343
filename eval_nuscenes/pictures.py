"""Pictures of plans: the path on the front camera, the tokens each stage still sees, the scene from above.

Colours are told apart by colour-blind readers and carry the same meaning everywhere.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.metrics import TrackedBox
from eval_nuscenes.nuscenes_reader import CameraView, Sample
from vla_autoprune.frame import CAMERAS, FloatArray, Frame, Image, IntArray, Plan
from vla_autoprune.page import INK
from vla_autoprune.recipe import PromptLayout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUTH = "#009e73"
PLAN = "#2f86d1"
RANDOM = "#d55e00"
BLANKED = "#b86fa0"
NEUTRAL = "#8a8f98"

EGO_LENGTH_M = 4.084
EGO_WIDTH_M = 1.85
EGO_REAR_M = 1.0
EGO_CORNERS = np.array(
    [
        [EGO_LENGTH_M - EGO_REAR_M, EGO_WIDTH_M / 2],
        [EGO_LENGTH_M - EGO_REAR_M, -EGO_WIDTH_M / 2],
        [-EGO_REAR_M, -EGO_WIDTH_M / 2],
        [-EGO_REAR_M, EGO_WIDTH_M / 2],
    ]
)
"""Of the nuScenes car, in the ego frame."""
"""From the rear axle back to the bumper."""

_NEAREST_M = 0.5

NOMINAL_FRONT = CameraView(
    path=Path(),
    width=1600,
    height=900,
    intrinsics=np.array([[1266.4, 0.0, 816.3], [0.0, 1266.4, 491.5], [0.0, 0.0, 1.0]]),
    ego_from_camera=np.array(
        [[0.0, 0.0, 1.0, 1.70], [-1.0, 0.0, 0.0, 0.02], [0.0, -1.0, 0.0, 1.51], [0.0, 0.0, 0.0, 1.0]]
    ),
)
"""The front camera of a nuScenes car, for images that come without calibration."""


def token_grid(tokens: int, width: int, height: int) -> tuple[int, int]:
    """How a camera's visual tokens lie on its image, row by row.

    Args:
        tokens: visual tokens of the camera.
        width: of the tower's input, pixels.
        height: likewise.

    Returns:
        (rows, columns), the factors of `tokens` whose cells come closest to squares.
    """
    factors = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    return min(factors, key=lambda grid: abs(math.log((width / grid[1]) / (height / grid[0]))))


def kept_masks(layout: PromptLayout, kept_visual: IntArray) -> dict[str, NDArray[np.bool_]]:
    """Which cells of each camera's image still have a token.

    Args:
        layout: of the prompt the tokens belong to.
        kept_visual: indices 0..V-1 in prompt order.

    Returns:
        Per camera, [rows, columns].
    """
    width, height = layout.image_size or (1, 1)
    kept = np.zeros(layout.visual_tokens, dtype=bool)
    kept[np.asarray(kept_visual, dtype=np.int64)] = True
    of_camera = layout.camera_of_visual
    return {
        camera: kept[of_camera == number].reshape(token_grid(int((of_camera == number).sum()), width, height))
        for number, camera in enumerate(layout.cameras)
    }


def paint_kept(image: Image, kept: NDArray[np.bool_], width: int = 320) -> Image:
    """Show an image as a stage sees it: cells without a token fade to dark grey.

    Args:
        image: [height, width, 3] RGB.
        kept: [rows, columns] of cells over the whole image.
        width: of the result, pixels; the aspect ratio stays.

    Returns:
        The smaller image with the border of the kept cells drawn.
    """
    import cv2

    height = round(width * image.shape[0] / image.shape[1])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    cells = cv2.resize(kept.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    luminance = small.mean(axis=2, keepdims=True)
    faded = np.broadcast_to(0.36 * luminance + 12.0, small.shape)
    painted = np.where(cells[..., None], small, faded).astype(np.uint8)
    outlines, _ = cv2.findContours(cells.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(painted, outlines, -1, _rgb(PLAN), 1, cv2.LINE_AA)
    return painted


def kept_mosaic(
    images: Mapping[str, Image], masks: Mapping[str, NDArray[np.bool_]], width: int = 320
) -> Image:
    """All cameras as a stage sees them: front row, back row, each camera `width` pixels wide."""
    cameras = [camera for camera in CAMERAS if camera in masks] or list(masks)
    per_row = 3 if len(cameras) > 3 else len(cameras)
    tiles = [paint_kept(images[camera], masks[camera], width) for camera in cameras]
    gap = max(2, width // 80)
    height = max(tile.shape[0] for tile in tiles)
    rows = math.ceil(len(tiles) / per_row)
    canvas = np.full((rows * (height + gap) - gap, per_row * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = (number // per_row) * (height + gap), (number % per_row) * (width + gap)
        canvas[top : top + tile.shape[0], left : left + width] = tile
    return canvas


def project(points_in_ego: FloatArray, camera: CameraView) -> tuple[FloatArray, FloatArray]:
    """Where points appear on a camera's image.

    Args:
        points_in_ego: [n, 3] metres.
        camera: calibrated.

    Returns:
        [n, 2] pixels, and [n] metres in front of the camera (negative behind it, where pixels mean nothing).
    """
    camera_from_ego = np.linalg.inv(camera.ego_from_camera)
    points = points_in_ego @ camera_from_ego[:3, :3].T + camera_from_ego[:3, 3]
    pixels = points @ camera.intrinsics.T
    depth = points[:, 2]
    return pixels[:, :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth)[:, None], depth


def draw_path(image: Image, waypoints_in_ego: FloatArray, camera: CameraView, colour: str = PLAN) -> Image:
    """Lay the ground that a plan covers over a camera image, as a ribbon of the car's width.

    Args:
        image: [height, width, 3] RGB, of any size; calibration is scaled to it.
        waypoints_in_ego: [T, 3] x, y, heading.
        camera: calibration of the image at its own size.
        colour: as "#rrggbb".

    Returns:
        A new image. Waypoints are marked across the ribbon.
    """
    import cv2

    scale = np.array([image.shape[1] / camera.width, image.shape[0] / camera.height])
    path = _dense_path(waypoints_in_ego)
    across = np.stack([-np.sin(path[:, 2]), np.cos(path[:, 2])], axis=1) * EGO_WIDTH_M / 2
    sides = []
    visible = np.ones(len(path), dtype=bool)
    for side in (path[:, :2] + across, path[:, :2] - across):
        pixels, depth = project(np.column_stack([side, np.zeros(len(side))]), camera)
        visible &= depth > _NEAREST_M
        sides.append(pixels * scale)
    drawn = image.copy()
    if visible.sum() < 2:
        return drawn
    left, right = (np.clip(side[visible], -1e5, 1e5) for side in sides)
    fixed = 16  # sub-pixel steps, so that the far end stays smooth
    ribbon = np.round(np.vstack([left, right[::-1]]) * fixed).astype(np.int32)
    overlay = drawn.copy()
    cv2.fillPoly(overlay, [ribbon], _rgb(colour), cv2.LINE_AA, 4)
    drawn = cv2.addWeighted(overlay, 0.45, drawn, 0.55, 0).astype(np.uint8)
    thickness = max(1, round(image.shape[1] / 500))
    for side in (left, right):
        cv2.polylines(
            drawn, [np.round(side * fixed).astype(np.int32)], False, _rgb(colour), thickness, cv2.LINE_AA, 4
        )
    for waypoint in np.asarray(waypoints_in_ego, dtype=float):
        offset = np.array([-np.sin(waypoint[2]), np.cos(waypoint[2])]) * EGO_WIDTH_M / 2
        ends = np.array([[*(waypoint[:2] + offset), 0.0], [*(waypoint[:2] - offset), 0.0]])
        pixels, depth = project(ends, camera)
        if (depth > _NEAREST_M).all():
            start, end = (tuple(int(value) for value in point) for point in np.round(pixels * scale))
            cv2.line(drawn, start, end, (255, 255, 255), thickness, cv2.LINE_AA)
    return drawn


def draw_bird_eye(
    axes: Axes,
    paths: Mapping[str, tuple[FloatArray, Mapping[str, Any]]],
    boxes: Sequence[FloatArray] = (),
    road: Sequence[FloatArray] = (),
    history: FloatArray | None = None,
    ego: FloatArray = EGO_CORNERS,
) -> None:
    """Draw a scene from above, ahead is up.

    Args:
        axes: matplotlib axes to fill.
        paths: label -> ([T, 3] waypoints in the ego frame, line properties), later ones on top.
        boxes: [4, 2] corners of road users in the ego frame.
        road: [N, 2] outlines of drivable area in the ego frame.
        history: [H, 3] where the ego came from.
        ego: [4, 2] corners of the car.
    """
    from matplotlib.ticker import MaxNLocator

    for outline in road:
        axes.fill(*_up(outline), facecolor=NEUTRAL, alpha=0.2, edgecolor=NEUTRAL, linewidth=0.4)
    for corners in boxes:
        axes.fill(*_up(corners), facecolor=NEUTRAL, alpha=0.75, edgecolor=NEUTRAL, linewidth=0.6)
    if history is not None and len(history):
        axes.plot(*_up(np.vstack([history[:, :2], np.zeros(2)])), color=NEUTRAL, linewidth=1.0, linestyle=":")
    axes.fill(*_up(ego), facecolor="none", edgecolor=INK, linewidth=1.2)
    reach = 12.0
    for label, (waypoints, style) in paths.items():
        points = np.vstack([np.zeros(2), np.asarray(waypoints)[:, :2]])
        axes.plot(*_up(points), label=label, **style)
        reach = max(reach, float(np.abs(points).max()))
    axes.set_aspect("equal")
    axes.set_xlim(-0.42 * reach - 4, 0.42 * reach + 4)
    axes.set_ylim(-6, reach + 4)
    axes.set_xticks([])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.tick_params(length=0)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)


def boxes_in_ego(sample: Sample) -> list[FloatArray]:
    """[4, 2] corners of the sample's road users at t0, in the ego frame."""
    return [
        _corners(box) @ sample.ego_from_lidar[:2, :2].T + sample.ego_from_lidar[:2, 3]
        for box in sample.truth.boxes[0]
    ]


def plan_picture(frame: Frame, plan: Plan, layout: PromptLayout, camera: CameraView = NOMINAL_FRONT) -> bytes:
    """One picture of one plan: path on the front camera, scene from above, tokens that each stage sees.

    Args:
        frame: what was planned on.
        plan: what came out.
        layout: of the model's prompt, to find each visual token's place.
        camera: calibration of CAM_FRONT; without it the nuScenes car's is taken.

    Returns:
        A PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    stages = plan.kept_visual
    mosaics = [kept_mosaic(frame.images, kept_masks(layout, kept)) for kept in stages]
    rows = math.ceil(len(mosaics) / 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.5 + 2.7 * max(rows, 1)), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[5.5, 2.7 * max(rows, 1)])
        top, bottom = parts
        top.get_layout_engine().set(h_pad=0.09, w_pad=0.06)
        front, above = top.subplots(1, 2, width_ratios=[3.2, 1.0])
        if "CAM_FRONT" in frame.images:
            front.imshow(draw_path(frame.images["CAM_FRONT"], plan.waypoints_in_ego, camera))
        front.set_axis_off()
        front.set_title(_headline(plan, layout), loc="left")
        path = {
            "plan": (plan.waypoints_in_ego, {"color": PLAN, "marker": "o", "markersize": 4, "linewidth": 2})
        }
        draw_bird_eye(above, path)
        above.set_title("from above (m)", loc="left")
        tiles = np.atleast_1d(bottom.subplots(max(rows, 1), 2)).ravel()
        for axes in tiles:
            axes.set_axis_off()
        for number, (axes, mosaic, kept) in enumerate(zip(tiles, mosaics, stages, strict=False)):
            axes.imshow(mosaic)
            axes.set_title(f"into stage {number}: {len(kept)} of {layout.visual_tokens} tokens", loc="left")
        return png(figure)


STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": NEUTRAL,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": NEUTRAL,
    "grid.alpha": 0.35,
    "svg.fonttype": "none",
    "svg.hashsalt": "vla_autoprune",
    "font.family": "sans-serif",
}
"""Matplotlib settings of every figure."""


def png(figure: Figure, dots_per_inch: int = 120) -> bytes:
    """A figure as a PNG file on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white")
    return buffer.getvalue()


def jpeg(image: Image, quality: int = 82) -> bytes:
    """An RGB image as a JPEG file."""
    import cv2

    _, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    return encoded.tobytes()


def _headline(plan: Plan, layout: PromptLayout) -> str:
    tokens = ""
    if plan.visual_tokens_into_layers:
        mean = float(np.mean(plan.visual_tokens_into_layers))
        tokens = f" · {mean:.0f} of {layout.visual_tokens} visual tokens into the layers"
    return f"bucket {plan.bucket}{tokens} · {plan.timings_ms.get('total', math.nan):.0f} ms"


def _up(points: FloatArray) -> tuple[FloatArray, FloatArray]:
    """From x forward, y left to a page with ahead up."""
    return -points[:, 1], points[:, 0]


def _corners(box: TrackedBox) -> FloatArray:
    along = np.array([math.cos(box.yaw), math.sin(box.yaw)]) * box.length / 2
    across = np.array([-math.sin(box.yaw), math.cos(box.yaw)]) * box.width / 2
    centre = np.array([box.x, box.y])
    return np.stack(
        [centre + along + across, centre + along - across, centre - along - across, centre - along + across]
    )


def _dense_path(waypoints_in_ego: FloatArray) -> FloatArray:
    """[n, 3] the path at 0.1 s steps from the front bumper's start, headings interpolated."""
    poses = np.vstack([np.zeros(3), np.asarray(waypoints_in_ego, dtype=float)])
    steps = np.linspace(0, len(poses) - 1, 5 * (len(poses) - 1) + 1)
    index = np.arange(len(poses))
    heading = np.unwrap(poses[:, 2])
    return np.column_stack(
        [np.interp(steps, index, column) for column in (poses[:, 0], poses[:, 1], heading)]
    )


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue
