"""Which images belong together: an anchor camera sets the time, the others join it. Knows no ROS."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Generic, Literal, TypeVar

Content = TypeVar("Content")

Verdict = Literal["kept", "repeated", "out of order", "clock went back"]

RESET_NS = 1_000_000_000
"""A stamp this much older than the one before means that time began anew."""

PATIENT_FRAMES = 3
"""A camera silent for so many frames is not waited for, until it is heard again. After so many frames in a
row that made room for newer ones, the next one does not: else a short period and a long wait give none."""

BUFFERED = 4
"""Images kept per side camera."""


@dataclass(frozen=True)
class Stamped(Generic[Content]):
    """An image as it came.

    Attributes:
        stamp_ns: when it was taken, by its header.
        arrived_s: when it came, on a steady clock.
    """

    stamp_ns: int
    arrived_s: float
    content: Content


@dataclass(frozen=True)
class FrameSet(Generic[Content]):
    """Images that belong together.

    Attributes:
        stamp_ns: of the anchor's image.
        arrived_s: when the anchor's image came.
        images: by camera, the anchor's included.
        absent: by camera, why there is no image of it.
        behind_ms: by camera, how much older than the anchor's its image is, where a far nearer one was due
            and has not come in time.
    """

    stamp_ns: int
    arrived_s: float
    images: Mapping[str, Stamped[Content]]
    absent: Mapping[str, str]
    behind_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def skew_ms(self) -> float:
        """How far the image furthest from the anchor's is from it."""
        return max(abs(image.stamp_ns - self.stamp_ns) for image in self.images.values()) / 1e6


class Synchroniser(Generic[Content]):
    """Collects images and gives out the newest set, once.

    Args:
        cameras: all of them.
        anchor: the one whose images make a frame.
        tolerance_ms: how far another camera's stamp may be from the anchor's.
        wait_ms: how long the anchor's image waits for lively cameras, from its arrival.
    """

    def __init__(self, cameras: Sequence[str], anchor: str, tolerance_ms: float, wait_ms: float) -> None:
        self.anchor = anchor
        self.others = tuple(camera for camera in cameras if camera != anchor)
        self.tolerance_ns = round(tolerance_ms * 1e6)
        self.wait_s = wait_ms / 1e3
        self.superseded = 0
        """Anchor images replaced by a newer one before their set was given out."""
        self._gave_way = 0
        """Anchor images in a row, up to the one that waits, that a newer one replaced."""
        self._frames_silent = dict.fromkeys(self.others, 0)
        self._pending: Stamped[Content] | None = None
        self._newest: dict[str, Stamped[Content]] = {}
        self._buffers: dict[str, deque[Stamped[Content]]] = {
            camera: deque(maxlen=BUFFERED) for camera in self.others
        }

    @property
    def pending_stamp_ns(self) -> int | None:
        """Stamp of the anchor image that waits."""
        return None if self._pending is None else self._pending.stamp_ns

    def silent_s(self, camera: str, now_s: float) -> float | None:
        """Seconds since a camera's last image; None if it never came."""
        newest = self._newest.get(camera)
        return None if newest is None else now_s - newest.arrived_s

    def add(self, camera: str, stamp_ns: int, content: Content, now_s: float) -> Verdict:
        """Take an image in, or say why not.

        Args:
            camera: one of the cameras.
            stamp_ns: from its header.
            content: the image.
            now_s: steady clock.
        """
        image = Stamped(stamp_ns, now_s, content)
        newest = self._newest.get(camera)
        verdict: Verdict = "kept"
        if newest is not None and stamp_ns <= newest.stamp_ns:
            if newest.stamp_ns - stamp_ns < RESET_NS:
                return "repeated" if stamp_ns == newest.stamp_ns else "out of order"
            verdict = "clock went back"
        self._newest[camera] = image
        if camera == self.anchor:
            if verdict == "clock went back":
                self._gave_way = 0
            if self._pending is not None:
                self.superseded += 1
                self._gave_way += 1
            if self._pending is None or self._gave_way <= PATIENT_FRAMES:
                self._pending = image
        else:
            self._frames_silent[camera] = 0
            buffer = self._buffers[camera]
            if verdict == "clock went back":
                buffer.clear()
            buffer.append(image)
        return verdict

    def take(self, now_s: float, ego_known: bool) -> FrameSet[Content] | None:
        """The newest set if it is complete or has waited long enough.

        Args:
            now_s: steady clock.
            ego_known: the ego state has reached the pending image's time.
        """
        if self._pending is None:
            return None
        anchor, waited = self._pending, now_s - self._pending.arrived_s >= self.wait_s
        images, absent, behind_ms = {self.anchor: anchor}, {}, {}
        for camera in self.others:
            near = min(
                self._buffers[camera], key=lambda image: abs(image.stamp_ns - anchor.stamp_ns), default=None
            )
            if near is not None and abs(near.stamp_ns - anchor.stamp_ns) <= self.tolerance_ns:
                if self._nearer_is_due(camera, anchor.stamp_ns):
                    if not waited:
                        return None
                    behind_ms[camera] = (anchor.stamp_ns - near.stamp_ns) / 1e6
                images[camera] = near
                continue
            if not waited and self._frames_silent[camera] < PATIENT_FRAMES:
                return None
            absent[camera] = (
                "never arrived"
                if near is None
                else f"is {abs(near.stamp_ns - anchor.stamp_ns) / 1e6:.0f} ms from {self.anchor}, "
                f"allowed {self.tolerance_ns / 1e6:g}"
            )
        if not ego_known and not waited:
            return None
        self._pending, self._gave_way = None, 0
        for camera in absent:
            self._frames_silent[camera] += 1
        return FrameSet(anchor.stamp_ns, anchor.arrived_s, images, absent, behind_ms)

    def _nearer_is_due(self, camera: str, stamp_ns: int) -> bool:
        """Whether a camera's next image, by its period, lies less than half as far from a time as its newest.

        Without this the image before would pass for that of a frame wherever the tolerance spans a period.
        """
        stamps = [image.stamp_ns for image in self._buffers[camera]]
        if len(stamps) < 2:
            return False
        due_ns = stamps[-1] + median(after - before for before, after in pairwise(stamps))
        return 2 * abs(due_ns - stamp_ns) < stamp_ns - stamps[-1]
