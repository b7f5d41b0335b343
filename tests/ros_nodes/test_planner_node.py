"""vla_planner as a process of its own: plans, deadlines, and a defined answer to every bad input."""

from __future__ import annotations

import gc
import importlib.util
import math
import re
import signal
import weakref
from collections import Counter
from itertools import count
from typing import Any

import cv2
import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.ros

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import AccelWithCovarianceStamped
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from visualization_msgs.msg import MarkerArray

from engines.onnxruntime import OnnxRuntimeBackend
from ros_nodes import topics
from ros_nodes.messages import path_message, stamp_ns_of, time_message
from ros_nodes.planner_node import PARAMETERS, VlaPlanner
from vla_autoprune.frame import CAMERAS, Command, EgoState, Frame
from vla_autoprune.images import decode_image
from vla_autoprune.runtime.planner import Planner

PATIENT = {
    "deadline_ms": 30_000.0,
    "max_frame_age_ms": 30_000.0,
    "sync_wait_ms": 1_000.0,
    "camera_timeout_ms": 60_000.0,
}
"""No test but those of deadlines and silence depends on how fast the machine is."""

FRAME_PERIOD_NS = 110_000_000
"""More than twice the tolerance within which images of other stamps make a frame."""

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR

SPEED_MPS, ACCELERATION_MPS2, YAW_RATE_RPS = 6.0, -0.5, 0.02


def jpeg(seed: int, size: tuple[int, int] = (160, 90)) -> bytes:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def solid(level: int) -> bytes:
    return cv2.imencode(".jpg", np.full((90, 160, 3), level, dtype=np.uint8))[1].tobytes()


class Drive:
    """The planner under test, what feeds it, and what it says."""

    def __init__(self, bench: Any, stored_bundle: Any) -> None:
        self.bench, node = bench, bench.node
        self.planner = bench.start(
            "ros_nodes.planner_node",
            "vla_planner",
            bundle=str(stored_bundle.path),
            budget=0.6,
            threads=1,
            warmup_runs=1,
        )
        sensors = topics.sensor_qos(depth=20)
        self.cameras = {
            camera: node.create_publisher(CompressedImage, topics.camera_topic(camera), sensors)
            for camera in CAMERAS
        }
        self.raw = {
            camera: node.create_publisher(Image, topics.camera_topic(camera, raw=True), sensors)
            for camera in CAMERAS
        }
        self.odometry = node.create_publisher(Odometry, topics.ODOMETRY, sensors)
        self.acceleration = node.create_publisher(AccelWithCovarianceStamped, topics.ACCELERATION, sensors)
        self.command: Any = None
        self.clock = node.create_publisher(Clock, "/clock", QoSProfile(depth=1))
        self.paths = bench.listen(PathMessage, topics.PLANNER_PATH, topics.plan_qos())
        self.texts = bench.listen(String, topics.PLANNER_TEXT, topics.record_qos())
        self.markers = bench.listen(MarkerArray, topics.PLANNER_MARKERS, topics.record_qos())
        self.statuses = bench.listen(DiagnosticArray, topics.PLANNER_STATUS, topics.record_qos())
        self.diagnostics = bench.listen(DiagnosticArray, topics.DIAGNOSTICS, topics.record_qos())
        self.position_m = 0.0
        self.parameters: dict[str, Any] = {}
        self.last_ns = 0

    def begin(self, **parameters: Any) -> None:
        """From wherever the planner is to active, with these parameters and otherwise patient defaults."""
        wanted = {
            **PATIENT,
            "budget": 0.6,
            "missing_camera": "refuse",
            "image_transport": "compressed",
            "acceleration_source": "topic",
            "initial_command": "left",
            "deadline_aware": True,
            "sync_tolerance_ms": 50.0,
            "odometry_max_age_ms": 200.0,
            **parameters,
        }
        inputs = [*self.cameras.values(), *self.raw.values(), self.odometry, self.acceleration]
        images = self.raw if wanted["image_transport"] == "raw" else self.cameras
        if self.parameters:
            assert self.planner.transition("deactivate"), self.planner.log
            self.bench.until(
                lambda: not any(publisher.get_subscription_count() for publisher in inputs),
                "the planner to stop listening",
            )
        if self.command is not None:  # the last command of an earlier drive goes with its publisher
            self.bench.node.destroy_publisher(self.command)
        self.command = self.bench.node.create_publisher(String, topics.COMMAND, topics.latched_qos())
        if self.parameters != wanted:
            if self.parameters:
                assert self.planner.transition("cleanup"), self.planner.log
            assert self.planner.set(**wanted) == []
            assert self.planner.transition("configure"), self.planner.log
        assert self.planner.transition("activate"), self.planner.log
        self.parameters = wanted
        heard = [*images.values(), self.odometry, self.acceleration, self.command]
        self.bench.until(
            lambda: all(publisher.get_subscription_count() for publisher in heard), "the planner to listen"
        )
        for said in (self.paths, self.texts, self.markers, self.statuses, self.diagnostics):
            said.clear()
        self.last_ns = 0

    def now_ns(self) -> int:
        """A stamp so much later than the one before that an image of that one cannot pass for one of this."""
        clock = self.bench.node.get_clock()
        self.bench.until(
            lambda: clock.now().nanoseconds >= self.last_ns + FRAME_PERIOD_NS, "the next frame's time"
        )
        self.last_ns = clock.now().nanoseconds
        return self.last_ns

    def send_odometry(self, stamp_ns: int, speed_mps: float = SPEED_MPS, **changes: Any) -> None:
        message = Odometry(child_frame_id=changes.get("frame", "base_link"))
        message.header.stamp = time_message(stamp_ns)
        message.header.frame_id = "map"
        message.pose.pose.position.x = self.position_m + changes.get("jump_m", 0.0)
        message.pose.pose.orientation.w = 1.0
        message.twist.twist.linear.x = speed_mps
        message.twist.twist.angular.z = YAW_RATE_RPS
        self.odometry.publish(message)
        acceleration = AccelWithCovarianceStamped()
        acceleration.header.stamp = message.header.stamp
        acceleration.accel.accel.linear.x = ACCELERATION_MPS2
        self.acceleration.publish(acceleration)

    def send_image(self, camera: str, data: bytes, stamp_ns: int) -> None:
        message = CompressedImage(format="jpeg", data=data)
        message.header.stamp = time_message(stamp_ns)
        message.header.frame_id = camera
        self.cameras[camera].publish(message)

    def send(
        self, seed: int = 0, stamp_ns: int | None = None, without: tuple[str, ...] = (), **images: bytes
    ) -> int:
        """A frame: odometry, then every camera with an image of its own, the front last; its stamp."""
        stamp_ns = self.now_ns() if stamp_ns is None else stamp_ns
        self.send_odometry(stamp_ns)
        for camera in sorted(CAMERAS, key=lambda name: name == "CAM_FRONT"):
            if camera not in without:
                data = images.get(camera, jpeg(10 * seed + CAMERAS.index(camera)))
                self.send_image(camera, data, stamp_ns)
        return stamp_ns

    def give_command(self, command: Command) -> None:
        """Publish a command, and frames until one is planned with it: no image waits for a command."""
        self.command.publish(String(data=command.value))
        seeds = count(100)  # the same images again would be frozen ones

        def heard() -> bool:
            return self.status_of(self.send(next(seeds)))[2].get("command") == command.value

        self.bench.until(heard, f"command {command.value}")

    def set_clock(self, stamp_ns: int) -> None:
        """Publish a time until the planner's diagnostics carry it."""

        def told() -> bool:
            self.clock.publish(Clock(clock=time_message(stamp_ns)))
            return any(stamp_ns_of(array.header.stamp) == stamp_ns for array in self.diagnostics)

        self.bench.until(told, f"the planner's clock to be {stamp_ns}")

    def status_of(self, stamp_ns: int) -> tuple[str, str, dict[str, str]]:
        """Level, message and values that the planner publishes about a frame."""

        def found() -> Any:
            return next((s for s in self.statuses if stamp_ns_of(s.header.stamp) == stamp_ns), None)

        (status,) = self.bench.until(found, f"the status of {stamp_ns}").status
        level = {OK: "ok", WARN: "warn", ERROR: "error"}[status.level]
        return level, status.message, {value.key: value.value for value in status.values}

    def path_of(self, stamp_ns: int) -> Any:
        def found() -> Any:
            return next((path for path in self.paths if stamp_ns_of(path.header.stamp) == stamp_ns), None)

        return self.bench.until(found, f"the plan of {stamp_ns}")

    def diagnosed(self, part: str, text: str) -> Any:
        """The status in which a part is diagnosed with a text, a regular expression."""

        def found() -> Any:
            for array in self.diagnostics:
                for status in array.status:
                    if status.name == f"vla_planner: {part}" and re.search(text, status.message):
                        return status
            return None

        return self.bench.until(found, f"{part} diagnosed with {text!r}")


@pytest.fixture(scope="module")
def drive(bench, stored_bundle) -> Drive:
    return Drive(bench, stored_bundle)


@pytest.fixture(scope="module")
def offline(stored_bundle) -> Planner:
    return Planner(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1), budget=0.6)


def planned(offline: Planner, seed: int, command: Command = Command.LEFT, **images: bytes) -> Any:
    """The plan of the same frame without ROS."""
    contents = {camera: images.get(camera, jpeg(10 * seed + index)) for index, camera in enumerate(CAMERAS)}
    ego = EgoState(SPEED_MPS, ACCELERATION_MPS2, YAW_RATE_RPS)
    return offline.plan(Frame({c: decode_image(data, c) for c, data in contents.items()}, ego, command))


def poses_of(path: Any) -> list[Any]:
    return [(pose.header.stamp, pose.pose) for pose in path.poses]


def test_plans_are_those_of_the_offline_planner_to_the_bit(drive, offline):
    drive.begin()
    for seed, command in ((1, Command.LEFT), (2, Command.RIGHT)):
        if command is not Command.LEFT:
            drive.give_command(command)
        stamp_ns = drive.send(seed)
        plan = planned(offline, seed, command)
        path = drive.path_of(stamp_ns)
        assert poses_of(path) == poses_of(path_message(plan, stamp_ns))
        assert path.header.frame_id == "base_link"
        level, message, values = drive.status_of(stamp_ns)
        assert (level, message) == ("ok", "planned")
        assert values["bucket"] == plan.bucket
        assert float(values["complexity_bits"]) == pytest.approx(plan.complexity, rel=1e-5)
        assert values["visual_tokens_into_layers"] == " ".join(map(str, plan.visual_tokens_into_layers))
        steps = ("vision", "stage_00", "select_00", "prefill", "decode", "total")
        assert {f"{step}_ms" for step in steps} <= set(values)
        drive.bench.until(lambda text=plan.text: text in [heard.data for heard in drive.texts], "the text")
    marker = drive.bench.until(lambda: drive.markers, "markers")[-1].markers[0]
    assert len(marker.points) == 7 and marker.header.frame_id == "base_link"
    assert drive.diagnosed("planning", "planned").level == OK
    assert drive.diagnosed("cameras", "all arrive").level == OK


def test_raw_images_give_the_same_plan(drive, offline):
    drive.begin(image_transport="raw")
    stamp_ns = drive.now_ns()
    drive.send_odometry(stamp_ns)
    for index, camera in enumerate(CAMERAS):
        image = decode_image(jpeg(10 + index), camera)
        message = Image(height=90, width=160, encoding="bgr8", step=160 * 3 + 20)
        rows = np.zeros((90, 500), dtype=np.uint8)
        rows[:, :480] = image[:, :, ::-1].reshape(90, 480)
        message.data = rows.tobytes()
        message.header.stamp = time_message(stamp_ns)
        drive.raw[camera].publish(message)
    assert poses_of(drive.path_of(stamp_ns)) == poses_of(path_message(planned(offline, 1), stamp_ns))


def test_a_deadline_takes_smaller_budgets_and_says_so(drive):
    drive.begin(deadline_ms=1.0)
    stamp_ns = drive.send(1)
    level, message, values = drive.status_of(stamp_ns)
    assert level == "warn" and "bucket overridden: b40_" in message and "deadline missed" in message
    assert values["bucket"].startswith("b40_")
    assert (values["count_buckets_overridden"], values["count_deadline_missed"]) == ("1", "1")
    drive.begin(deadline_ms=1.0, deadline_aware=False)
    level, message, values = drive.status_of(drive.send(1))
    assert values["bucket"].startswith("b60_") and values["count_buckets_overridden"] == "0"
    assert level == "warn" and "deadline missed" in message


def test_the_newest_frame_wins(drive):
    # A busy planner finds newer images in the places of those it did not take, and odometry queues up: with
    # so much tolerance both will do.
    drive.begin(sync_tolerance_ms=1_000.0, odometry_max_age_ms=10_000.0)
    drive.status_of(drive.send(0))
    stamps = [drive.send(seed) for seed in range(1, 13)]
    level, _, values = drive.status_of(stamps[-1])
    assert level == "ok"
    counted = Counter({key: int(value) for key, value in values.items() if key.startswith("count_")})
    assert counted["count_frames"] <= 13
    ends = ("count_plans", "count_superseded", "count_refused")
    assert sum(counted[end] for end in ends) == counted["count_frames"]


def test_old_frames_are_dropped(drive):
    drive.begin(max_frame_age_ms=1_000.0)
    level, message, values = drive.status_of(drive.send(1, drive.now_ns() - 5_000_000_000))
    assert level == "error" and "ms old, max_frame_age_ms is 1000" in message
    assert values["count_too_old"] == "1" and not drive.paths


@pytest.mark.parametrize("missing", ["refuse", "last_frame", "black"])
def test_a_side_camera_stops(drive, offline, missing):
    drive.begin(missing_camera=missing, last_frame_max_age_ms=10_000.0, sync_tolerance_ms=0.0)
    assert drive.status_of(drive.send(1))[0] == "ok"
    level, message, values = drive.status_of(stamp_ns := drive.send(2, without=("CAM_BACK",)))
    if missing == "refuse":
        assert level == "error" and "CAM_BACK is" in message and "missing_camera" in message
        assert values["count_refused"] == "1"
        return
    assert level == "warn" and f"filled CAM_BACK with {missing}" in message
    assert values["count_CAM_BACK_filled"] == "1"
    black = cv2.imencode(".png", np.zeros((90, 160, 3), np.uint8))[1].tobytes()
    stand_in = {"last_frame": jpeg(14), "black": black}[missing]
    plan = planned(offline, 2, CAM_BACK=stand_in)
    assert poses_of(drive.path_of(stamp_ns)) == poses_of(path_message(plan, stamp_ns))


def test_cameras_that_never_arrive_are_named(drive):
    drive.begin(missing_camera="black")
    level, message, _ = drive.status_of(drive.send(1, without=("CAM_BACK",)))
    assert level == "warn" and "CAM_BACK never arrived" in message
    absent = r"^CAM_BACK never arrived \(/camera/cam_back/image/compressed, 1 publishers\)$"
    assert drive.diagnosed("cameras", absent).level == WARN
    drive.begin(camera_timeout_ms=200.0)
    drive.send(1, without=("CAM_FRONT",))
    assert drive.diagnosed("cameras", "CAM_FRONT never arrived").level == ERROR
    assert drive.diagnosed("planning", "no plan for").level == ERROR
    assert not drive.paths


def test_a_late_side_camera_is_not_used(drive):
    drive.begin(missing_camera="black", sync_tolerance_ms=20.0)
    stamp_ns = drive.now_ns()
    drive.send_image("CAM_BACK", jpeg(3), stamp_ns - 100_000_000)
    level, message, _ = drive.status_of(drive.send(1, stamp_ns, without=("CAM_BACK",)))
    assert level == "warn" and "CAM_BACK is 100 ms from CAM_FRONT, allowed 20" in message


def test_an_image_of_the_frame_before_does_not_pass_for_one_of_this(drive, offline):
    drive.begin(sync_wait_ms=1_000.0)
    first_ns = drive.now_ns()
    stamps = [first_ns + step * 50_000_000 for step in range(4)]  # 20 Hz: the tolerance is a whole period
    for seed in (0, 1):
        assert drive.status_of(drive.send(seed, stamps[seed]))[:2] == ("ok", "planned")

    def all_heard() -> bool:
        parts = [status for array in drive.diagnostics for status in array.status]
        return any((item.key, item.value) == ("count_images", "12") for part in parts for item in part.values)

    drive.bench.until(all_heard, "every image to be heard")
    drive.send(2, stamps[2], without=("CAM_BACK",))
    drive.bench.spin(0.1)
    drive.send_image("CAM_BACK", jpeg(20 + CAMERAS.index("CAM_BACK")), stamps[2])
    assert poses_of(drive.path_of(stamps[2])) == poses_of(path_message(planned(offline, 2), stamps[2]))
    assert drive.status_of(stamps[2])[2]["skew_ms"] == "0"
    level, message, values = drive.status_of(drive.send(3, stamps[3], without=("CAM_BACK",)))
    assert level == "warn" and "CAM_BACK is 50 ms behind" in message
    assert (values["count_CAM_BACK_behind"], values["behind_ms"]) == ("1", "CAM_BACK 50.000")


@pytest.mark.parametrize(
    "data,fault",
    [
        (b"\xff\xd8 this is no image", "cannot be decoded"),
        (jpeg(5)[:-900], "truncated"),
        (b"", "0 bytes"),
        (solid(0), "is black"),
        (jpeg(5, (90, 160)), "is 90x160"),
    ],
    ids=["garbage", "truncated", "empty", "black", "another shape"],
)
def test_images_of_no_use(drive, data, fault):
    drive.begin(missing_camera="black")
    level, message, _ = drive.status_of(drive.send(1, CAM_BACK_LEFT=data))
    assert level == "warn" and "filled CAM_BACK_LEFT with black" in message and fault in message
    level, message, _ = drive.status_of(drive.send(2, CAM_FRONT=data))
    assert level == "error" and fault in message and "no plan without this camera" in message
    assert drive.status_of(drive.send(3))[0] == "ok", "the next good frame is planned"


def test_a_changed_size_is_used_and_reported(drive):
    drive.begin()
    assert drive.status_of(drive.send(1))[0] == "ok"
    level, message, _ = drive.status_of(stamp_ns := drive.send(2, CAM_BACK=jpeg(5, (320, 180))))
    assert level == "warn" and "CAM_BACK changed from 160x90 to 320x180" in message
    assert drive.path_of(stamp_ns)


def test_a_frozen_camera_is_found_once_the_vehicle_moves(drive):
    drive.begin(missing_camera="black")
    begin_ns, frozen = drive.now_ns() - 2_000_000_000, jpeg(99)
    seen = []
    for step in range(4):  # 100 ms at 6 m/s are 0.6 m
        stamp_ns = drive.send(step, begin_ns + step * 100_000_000, CAM_BACK=frozen)
        seen.append(drive.status_of(stamp_ns)[1])
    assert seen[:2] == ["planned", "planned"]
    assert all("CAM_BACK is frozen" in message for message in seen[2:])


def test_odometry_that_stops_jumps_or_is_nonsense(drive):
    drive.begin(odometry_max_age_ms=100.0)
    stamp_ns = drive.send(1)
    assert drive.status_of(stamp_ns)[0] == "ok"
    later_ns = stamp_ns + 300_000_000
    for camera in reversed(CAMERAS):
        drive.send_image(camera, jpeg(CAMERAS.index(camera)), later_ns)
    level, message, _ = drive.status_of(later_ns)
    assert level == "error" and "odometry is 300 ms older than the image, allowed 100" in message
    drive.begin(odometry_max_age_ms=100.0)
    stamp_ns = drive.now_ns()
    drive.send_odometry(stamp_ns, math.nan)
    drive.send_odometry(stamp_ns, frame="lidar")
    drive.bench.until(lambda: "child_frame_id 'lidar'" in drive.planner.log, "odometry to arrive")
    for camera in reversed(CAMERAS):
        drive.send_image(camera, jpeg(CAMERAS.index(camera)), stamp_ns)
    level, message, values = drive.status_of(stamp_ns)
    assert level == "error" and "no odometry has arrived" in message
    assert values["count_odometry_of_another_frame"] == "1"
    later_ns = stamp_ns + 100_000_000
    drive.send_odometry(later_ns)
    drive.send_odometry(later_ns + 10_000_000, jump_m=30.0)
    status = drive.diagnosed("odometry", "new faults: .*jump 1")
    values = {value.key: value.value for value in status.values}
    assert status.level != OK and values["count_odometry_not_finite"] == "1"


def test_topics_that_are_mixed_up_are_noticed(drive):
    drive.begin()
    stamp_ns = drive.send(1)
    assert drive.status_of(stamp_ns)[0] == "ok"
    message = CompressedImage(format="jpeg", data=jpeg(1))
    message.header.stamp = time_message(drive.now_ns())
    message.header.frame_id = "CAM_FRONT"
    drive.cameras["CAM_BACK"].publish(message)
    drive.bench.until(lambda: "an image has frame_id CAM_FRONT" in drive.planner.log, "the image to arrive")
    assert drive.status_of(drive.send(2))[2]["count_CAM_BACK_miswired"] == "1"


def test_no_command_no_plan(drive):
    drive.begin(initial_command="none")
    level, message, _ = drive.status_of(drive.send(1))
    assert level == "error" and "no command has arrived" in message and "initial_command" in message
    drive.command.publish(String(data="backwards"))
    drive.bench.until(lambda: "command 'backwards' is none of" in drive.planner.log, "the command to arrive")
    drive.give_command(Command.STRAIGHT)
    level, _, values = drive.status_of(drive.send(2))
    assert level == "ok" and values["count_unknown_commands"] == "1"


def test_a_clock_that_jumps_back_begins_anew(drive):
    drive.begin(use_sim_time=True)
    drive.bench.until(drive.clock.get_subscription_count, "the planner to hear the clock")
    try:
        for second in (1_000, 1_001, 500):
            stamp_ns = second * 1_000_000_000
            drive.set_clock(stamp_ns)
            level, message, values = drive.status_of(drive.send(second, stamp_ns))
            assert level == "ok", message
        assert values["count_CAM_FRONT_clock_went_back"] == "1"
        silent_ns = drive.now_ns()
        level, message, _ = drive.status_of(drive.send(1, silent_ns))
        assert level == "error" and "ahead of the clock" in message and "use_sim_time" in message
    finally:
        drive.planner.set(use_sim_time=False)


def test_wrong_parameters_and_bundles_are_refused(drive, stored_bundle, tmp_path):
    drive.planner.transition("deactivate")
    drive.planner.transition("cleanup")
    assert drive.planner.set(deadline_ms=-1.0) != []
    autoware = importlib.util.find_spec("autoware_planning_msgs")
    assert "allowed: 'refuse', 'last_frame', 'black'" in drive.planner.set(missing_camera="grey")[0]
    for name, value, reason in (
        ("bundle", "", "parameter bundle is empty"),
        ("bundle", str(tmp_path), "manifest.json cannot be read"),
        ("budget", 0.33, "it offers 0.6, 0.4"),
        ("anchor_camera", "CAM_TOP", "the bundle has CAM_FRONT_LEFT"),
        *(() if autoware else (("output_type", "trajectory", "autoware_planning_msgs is not installed"),)),
    ):
        assert drive.planner.set(**{name: value}) == []
        assert not drive.planner.transition("configure")
        drive.bench.until(lambda reason=reason: reason in drive.planner.log, reason)
        assert drive.planner.set(bundle=str(stored_bundle.path), budget=0.6, anchor_camera="CAM_FRONT") == []
        assert drive.planner.set(output_type="auto") == []
    assert drive.planner.transition("configure")
    assert "clean it up" in drive.planner.set(deadline_ms=50.0)[0]
    assert drive.planner.transition("activate")


def test_two_planners_on_one_topic(drive, bench):
    drive.begin()
    rival = bench.node.create_publisher(PathMessage, topics.PLANNER_PATH, topics.plan_qos())
    try:
        assert drive.diagnosed("planning", "plans are published by /bench, too").level == ERROR
        level, message, _ = drive.status_of(drive.send(1))
        assert level == "error" and "nothing is published until one planner is left" in message
        assert drive.planner.transition("deactivate")
        assert not drive.planner.transition("activate")
        bench.until(lambda: "one planner per topic" in drive.planner.log, "the refusal in the log")
    finally:
        bench.node.destroy_publisher(rival)
    bench.until(lambda: drive.planner.transition("activate"), "the other publisher to be forgotten")


def test_an_activation_that_fails_leaves_nothing_behind(bench, stored_bundle, tmp_path, monkeypatch):
    (tmp_path / "autoware_planning_msgs").mkdir()  # a package that was not built
    (tmp_path / "autoware_planning_msgs" / "__init__.py").touch()
    monkeypatch.setitem(bench.environment, "PYTHONPATH", f"{bench.environment['PYTHONPATH']}:{tmp_path}")
    node = bench.start(
        "ros_nodes.planner_node",
        "vla_planner",
        "-r",
        "__ns:=/unbuilt",
        bundle=str(stored_bundle.path),
        warmup_runs=1,
        budget=0.6,
    )
    node.name = "/unbuilt/vla_planner"
    assert node.transition("configure"), node.log
    for _ in range(2):
        assert not node.transition("activate")
    bench.until(lambda: node.log.count("activate failed") == 2, "the reason")
    assert "autoware_planning_msgs" in node.log
    bench.until(lambda: not bench.node.count_publishers("/unbuilt/planner/path"), "its publishers to go")
    assert node.transition("cleanup") and node.transition("configure")
    assert node.interrupt() == 0


def test_cleaning_up_frees_the_model(bench, stored_bundle):
    overrides = {"bundle": str(stored_bundle.path), "budget": 0.6, "threads": 1, "warmup_runs": 1}
    parameters = [Parameter(name, value=value) for name, value in overrides.items()]
    node = VlaPlanner(context=bench.context, namespace="freed", parameter_overrides=parameters)
    gc.disable()
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        backend = weakref.ref(node._configured.backend)
        assert node.trigger_activate() == node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
        assert backend() is not None
        assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
        assert backend() is None
    finally:
        gc.enable()
        node.destroy_node()


def test_configuring_is_given_up_at_a_signal(bench, stored_bundle):
    node = bench.start(
        "ros_nodes.planner_node",
        "slow_planner",
        bundle=str(stored_bundle.path),
        warmup_runs=100,
        budget=0.6,
        threads=1,
    )
    client = bench.node.create_client(ChangeState, "slow_planner/change_state")
    bench.until(client.service_is_ready, "the planner")
    configure = Transition(id=Transition.TRANSITION_CONFIGURE)
    client.call_async(ChangeState.Request(transition=configure))
    bench.until(lambda: "warms up" in node.log, "configuring to begin")
    node.process.send_signal(signal.SIGINT)
    assert node.interrupt() == 0  # terminal and launch send one each
    assert "configure given up: SIGINT" in node.log
    assert "ready after" not in node.log and "Traceback" not in node.log
    bench.node.destroy_client(client)


def test_publishers_that_are_not_heard_are_named(drive, bench):
    drive.begin(camera_timeout_ms=200.0)
    other = rclpy.Context()  # of several types on one topic, a process may have only one
    rclpy.init(context=other, domain_id=bench.domain)
    node = rclpy.create_node("wrong", context=other)
    node.create_publisher(CompressedImage, topics.camera_topic("CAM_BACK"), topics.sensor_qos("best_effort"))
    node.create_publisher(Image, topics.camera_topic("CAM_FRONT"), topics.sensor_qos())
    node.create_publisher(String, "latched", QoSProfile(depth=1))
    latched = bench.node.create_subscription(String, "latched", lambda _: None, topics.latched_qos())
    try:
        for text in (
            "CAM_BACK .*2 publishers: /wrong is not heard, .*est effort publisher",
            "CAM_FRONT .*: /wrong .*publishes sensor_msgs/msg/Image, not sensor_msgs/msg/CompressedImage",
        ):
            assert drive.diagnosed("cameras", text).level == ERROR
        bench.until(lambda: "olatile publisher" in topics.publishers_of(bench.node, latched), "the reason")
    finally:
        bench.node.destroy_subscription(latched)
        node.destroy_node()
        rclpy.shutdown(context=other)


def test_the_documentation_lists_every_parameter(repository):
    text = (repository / "docs" / "ros.md").read_text()
    for parameter in PARAMETERS:
        default = str(parameter.default).lower() if isinstance(parameter.default, bool) else parameter.default
        shown = f"`{default}`" if default != "" else ""
        allowed = parameter.allowed.replace("'", "`")
        assert f"| `{parameter.name}` | {shown} | {allowed} | {parameter.description} |" in text


def test_wrong_overrides_are_refused_when_configured_and_interrupts_end_in_order(drive, bench):
    other = bench.start("ros_nodes.planner_node", "other_planner", deadline_ms=-5.0)
    assert not other.transition("configure")
    bench.until(lambda: "deadline_ms is -5.0; allowed: finite numbers 1..60000" in other.log, "the reason")
    assert other.interrupt() == 0
    drive.begin()
    assert drive.planner.interrupt() == 0
    assert "Traceback" not in drive.planner.log
