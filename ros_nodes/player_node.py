"""`nuscenes_player`: plays a data set in nuScenes format as if the vehicle drove it now.

For workstations: the only node that reads data sets, hence the only one that needs the devkit.
"""

from __future__ import annotations

import array
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from geometry_msgs.msg import AccelWithCovarianceStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import String

from ros_nodes import topics
from ros_nodes.messages import quaternion_of_heading, stamp_ns_of, time_message, trajectory_message
from ros_nodes.motion import Motion, Pose, Trajectory
from ros_nodes.parameters import NodeParameters, Parameter
from ros_nodes.programs import run_program
from vla_autoprune.errors import InputError
from vla_autoprune.frame import CAMERAS, WAYPOINT_TIMES_S, Command

if TYPE_CHECKING:
    from eval_nuscenes.nuscenes_reader import NuScenesSplit, Sample

PARAMETERS = (
    Parameter("data_root", "", "Folder of the data set in nuScenes format (its dataroot)."),
    Parameter("version", "v1.0-synth", "Folder of its tables, such as v1.0-mini."),
    Parameter("split", "val", "A split of the data set, or all."),
    Parameter("scenes", "", "Names of scenes, with commas between; empty plays all of the split."),
    Parameter("command_source", "route", "Of commands; future leaks the label.", choices=("route", "future")),
    Parameter("rate", 1.0, "Seconds of the drive per second.", 0.01, 100.0),
    Parameter("loop", False, "Begin again at the end; the clock then jumps back."),
    Parameter("clock_rate_hz", 50.0, "Clock messages per second.", 1.0, 1000.0),
    Parameter("odometry_rate_hz", 20.0, "Odometry messages per second of the drive.", 2.0, 200.0),
    Parameter("subscribers", 1, "Subscribers of CAM_FRONT to wait for.", 0, 100),
    Parameter("truth_subscribers", 0, "Subscribers of truth/path to wait for: monitors.", 0, 100),
    Parameter("wait_for_subscribers_s", 30.0, "Longest wait for them.", 0.0, 3600.0),
    Parameter(
        "lockstep_timeout_s",
        0.0,
        "Hold the clock at each keyframe until its plan has come, at most so long; 0 does not hold.",
        0.0,
        600.0,
    ),
    Parameter("run_on_s", 1.0, "The clock goes on so long after the last keyframe.", 0.0, 60.0),
)

SETTLE_S = 1.0
"""Subscribers have been there so long when it starts: others of the same nodes are not far."""
SCENE_GAP_S = 0.5
ANCHOR = "CAM_FRONT"


@dataclass(frozen=True)
class Moment:
    """A time of the drive at which something is published.

    Attributes:
        begins: of a scene: the clock is set to it.
        sample: at keyframes.
    """

    stamp_ns: int
    motion: Motion
    acceleration_mps2: float
    begins: bool = False
    sample: Sample | None = None
    command: Command | None = None
    """Of the next keyframe, at the moment before it: no image must overtake its command."""


class NuScenesPlayer(Node):
    """Publishes cameras, odometry, acceleration, command, truth and /clock at the data set's own times.

    All messages of a keyframe carry its time, that of its LIDAR sweep, to which poses, ego state and truth
    belong; CAM_FRONT comes last. Image files are published as they are.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("nuscenes_player", **options)
        self._settings = NodeParameters(self, PARAMETERS).read()
        self.done = False
        self._split = _open(self._settings)
        self._make_publishers()
        self._moments = self._drive()
        self._next: Moment | None = next(self._moments)
        self._last_ns = self._next.stamp_ns if self._next else 0
        self._set_clock(self._last_ns)
        self._held_ns: int | None = None
        self._held_until_s = math.inf
        self._keyframes = 0
        self._waits_until_s = time.monotonic() + self._settings["wait_for_subscribers_s"]
        self._heard_since_s = math.inf
        self._playing = False
        self._timer = self.create_timer(
            1.0 / self._settings["clock_rate_hz"], self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )
        self.get_logger().info(f"{len(self._split)} keyframes; waits for subscribers of {ANCHOR}")

    def finish(self) -> None:
        """Say how much was played."""
        self.get_logger().info(f"played {self._keyframes} keyframes")

    def _make_publishers(self) -> None:
        sensor = topics.sensor_qos(depth=5)
        self._clock_out = self.create_publisher(ClockMessage, "/clock", topics.record_qos())
        self._odometry_out = self.create_publisher(Odometry, topics.ODOMETRY, sensor)
        self._acceleration_out = self.create_publisher(
            AccelWithCovarianceStamped, topics.ACCELERATION, sensor
        )
        self._command_out = self.create_publisher(String, topics.COMMAND, topics.latched_qos())
        self._truth_out = self.create_publisher(PathMessage, topics.TRUTH_PATH, topics.record_qos())
        self._camera_out = {
            camera: self.create_publisher(CompressedImage, topics.camera_topic(camera), sensor)
            for camera in [*(camera for camera in CAMERAS if camera != ANCHOR), ANCHOR]
        }
        if self._settings["lockstep_timeout_s"]:
            self._plans = self.create_subscription(
                PathMessage, topics.PLANNER_PATH, self._on_plan, topics.plan_qos()
            )

    def _drive(self) -> Iterator[Moment]:
        """Every moment of every scene, in order; over and over if asked to."""
        once = True
        while once or self._settings["loop"]:
            once = False
            before: Moment | None = None
            scene = ""
            for sample in self._split:
                moment = _moment(sample, begins=sample.scene != scene)
                scene = sample.scene
                if before is not None and not moment.begins:
                    yield from _between(before, moment, self._settings["odometry_rate_hz"])
                yield moment
                before = moment

    def _set_clock(self, stamp_ns: int) -> None:
        self._from_ns, self._from_s = stamp_ns, time.monotonic()

    def _publish_clock(self, stamp_ns: int) -> None:
        self._clock_out.publish(ClockMessage(clock=time_message(stamp_ns)))

    def _tick(self) -> None:
        steady_s = time.monotonic()
        if not self._playing:
            self._wait(steady_s)
            return
        if self._held_ns is not None:
            self._publish_clock(self._held_ns)
            if steady_s < self._held_until_s:
                return
            self.get_logger().warning(f"no plan for the keyframe at {self._held_ns} in time; goes on")
            self._go_on()
        now_ns = self._from_ns + round((steady_s - self._from_s) * self._settings["rate"] * 1e9)
        while self._next is not None and (self._next.begins or self._next.stamp_ns <= now_ns):
            moment = self._next
            if moment.begins:
                if self._keyframes and now_ns < self._last_ns + SCENE_GAP_S * 1e9:
                    self._publish_command(moment)
                    break
                self._set_clock(moment.stamp_ns)
                now_ns = moment.stamp_ns
            self._last_ns = moment.stamp_ns
            self._publish(moment)
            self._next = next(self._moments, None)
            if moment.sample is not None and self._settings["lockstep_timeout_s"]:
                self._held_ns = moment.stamp_ns
                self._held_until_s = steady_s + self._settings["lockstep_timeout_s"]
                return
        self._publish_clock(now_ns)
        self.done = self._next is None and now_ns >= self._last_ns + self._settings["run_on_s"] * 1e9

    def _wait(self, steady_s: float) -> None:
        """Before the start the clock stands at the first moment."""
        self._publish_clock(self._from_ns)
        if self._next is not None:
            self._publish_command(self._next)
        if not self._heard():
            self._heard_since_s = math.inf
        elif self._heard_since_s == math.inf:
            self._heard_since_s = steady_s
        settled = steady_s - self._heard_since_s >= SETTLE_S
        if not settled and steady_s < self._waits_until_s:
            return
        if not settled:
            self.get_logger().warning(f"too few subscribers of {ANCHOR} or {topics.TRUTH_PATH}; plays anyway")
        self._playing = True

    def _heard(self) -> bool:
        """Enough subscribers of anchor and truth, and DDS has connected whoever subscribes to anything."""
        outputs = [*self._camera_out.values(), self._odometry_out, self._acceleration_out, self._truth_out]
        return (
            self._camera_out[ANCHOR].get_subscription_count() >= self._settings["subscribers"]
            and self._truth_out.get_subscription_count() >= self._settings["truth_subscribers"]
            and all(
                publisher.get_subscription_count() >= self.count_subscribers(publisher.topic_name)
                for publisher in outputs
            )
        )

    def _on_plan(self, message: PathMessage) -> None:
        if self._held_ns is not None and stamp_ns_of(message.header.stamp) == self._held_ns:
            self._go_on()

    def _go_on(self) -> None:
        if self._held_ns is not None:
            self._set_clock(self._held_ns)
        self._held_ns = None

    def _publish(self, moment: Moment) -> None:
        self._publish_clock(moment.stamp_ns)
        self._publish_motion(moment)
        self._publish_command(moment)
        if moment.sample is not None:
            self._publish_keyframe(moment.stamp_ns, moment.sample)
            self._keyframes += 1

    def _publish_command(self, moment: Moment) -> None:
        command = moment.sample.command if moment.sample is not None else moment.command
        if command is not None:
            self._command_out.publish(String(data=command.value))

    def _publish_motion(self, moment: Moment) -> None:
        odometry = Odometry(child_frame_id=topics.EGO_FRAME)
        odometry.header.stamp = time_message(moment.stamp_ns)
        odometry.header.frame_id = topics.MAP_FRAME
        pose = moment.motion.pose
        odometry.pose.pose.position.x = pose.x
        odometry.pose.pose.position.y = pose.y
        odometry.pose.pose.orientation = quaternion_of_heading(pose.heading)
        odometry.twist.twist.linear.x = moment.motion.speed_mps
        odometry.twist.twist.angular.z = moment.motion.yaw_rate_rps
        acceleration = AccelWithCovarianceStamped()
        acceleration.header.stamp = odometry.header.stamp
        acceleration.header.frame_id = topics.EGO_FRAME
        acceleration.accel.accel.linear.x = moment.acceleration_mps2
        self._acceleration_out.publish(acceleration)
        self._odometry_out.publish(odometry)

    def _publish_keyframe(self, stamp_ns: int, sample: Sample) -> None:
        known = sample.future_exists
        due = stamp_ns + np.rint(np.array(WAYPOINT_TIMES_S)[known] * 1e9).astype(np.int64)
        truth = Trajectory(stamp_ns, topics.EGO_FRAME, due, sample.future_in_ego[known])
        self._truth_out.publish(trajectory_message(truth))
        for camera, publisher in self._camera_out.items():
            image = CompressedImage(format="jpeg")
            image.header.stamp = time_message(stamp_ns)
            image.header.frame_id = camera
            image.data = array.array("B", sample.cameras[camera].path.read_bytes())
            publisher.publish(image)


def _open(settings: dict[str, Any]) -> NuScenesSplit:
    if not settings["data_root"]:
        raise InputError("parameter data_root is empty; give a folder such as vla-autoprune synth writes")
    try:
        from eval_nuscenes.nuscenes_reader import NuScenesSplit

        scenes = [name.strip() for name in settings["scenes"].split(",") if name.strip()]
        split = NuScenesSplit(
            Path(settings["data_root"]),
            settings["version"],
            settings["split"],
            settings["command_source"],
            scenes=scenes or None,
        )
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; data sets need: pip install 'vla_autoprune[eval]'"
        ) from error
    split.check_images()
    return split


def _moment(sample: Sample, begins: bool) -> Moment:
    pose = sample.ego_pose
    heading = math.atan2(pose[1, 0], pose[0, 0])
    return Moment(
        stamp_ns=round(sample.stamp_s * 1e6) * 1000,
        motion=Motion(
            Pose(float(pose[0, 3]), float(pose[1, 3]), heading), sample.ego.speed_mps, sample.ego.yaw_rate_rps
        ),
        acceleration_mps2=sample.ego.acceleration_mps2,
        begins=begins,
        sample=sample,
    )


def _between(before: Moment, after: Moment, rate_hz: float) -> Iterator[Moment]:
    """Moments between two keyframes, on the straight line from one to the other."""
    ends = np.array(
        [(*moment.motion.pose, *moment.motion[1:], moment.acceleration_mps2) for moment in (before, after)]
    )
    ends[:, 2] = np.unwrap(ends[:, 2])
    gap_ns = after.stamp_ns - before.stamp_ns
    count = max(round(gap_ns / 1e9 * rate_hz), 1)
    for step in range(1, count):
        x, y, heading, speed, yaw_rate, acceleration = (ends[0] + (ends[1] - ends[0]) * step / count).tolist()
        motion = Motion(Pose(x, y, heading), speed, yaw_rate)
        command = after.sample.command if after.sample is not None and step == count - 1 else None
        yield Moment(before.stamp_ns + gap_ns * step // count, motion, acceleration, command=command)


def main() -> int:
    """Play until the end, or until interrupted."""
    return run_program(NuScenesPlayer)


if __name__ == "__main__":
    sys.exit(main())
