"""`ros2 launch` for real: up in order, down together, a stop last. Needs launch_ros and the ros2 command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytest.importorskip("launch_ros", reason="needs ROS 2's launch_ros, which is not on PyPI")
pytest.importorskip("ros2launch", reason="needs ROS 2's ros2launch, which is not on PyPI")
psutil = pytest.importorskip("psutil")
cv2 = pytest.importorskip("cv2")
pytestmark = [pytest.mark.ros, pytest.mark.slow]

from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from sensor_msgs.msg import CompressedImage

from ros_nodes import topics
from ros_nodes.messages import time_message
from vla_autoprune.frame import CAMERAS

REPOSITORY = Path(__file__).resolve().parents[2]
ROS2 = shutil.which("ros2", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
NAMESPACE = "ego"

PARAMETERS = """
/**/vla_planner:
  ros__parameters:
    threads: 1
    warmup_runs: 1
    max_frame_age_ms: 30000.0
    sync_wait_ms: 500.0
    initial_command: straight
"""


class Launch:
    """A launch in a process group of its own."""

    def __init__(self, bench: Any, folder: Path, launch_file: str, **arguments: Any) -> None:
        self.bench, self.log_file = bench, folder / "launch.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [ROS2, "launch", str(REPOSITORY / "launch" / launch_file)]
                + [f"{name}:={value}" for name, value in arguments.items()],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**bench.environment, "ROS_LOG_DIR": str(folder)},
                cwd=folder,
                start_new_session=True,
            )
        self.nodes: dict[str, Any] = {}

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def find(self, module: str) -> Any:
        """The process that runs a module, once there is one."""

        def found() -> Any:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # some last a moment only
                    if module in " ".join(child.cmdline()):
                        return child
            return None

        self.nodes[module] = self.bench.until(found, f"{module} to run\n{self.log[-3000:]}")
        return self.nodes[module]

    def wait(self) -> int:
        """The exit code; nothing it started may be left."""
        self.bench.until(lambda: self.process.poll() is not None, "the launch to end", 60)
        assert not [node for node in self.nodes.values() if node.is_running()], "orphans"
        return self.process.returncode


@pytest.fixture
def launch(bench, tmp_path):
    started = []

    def start(launch_file: str, **arguments: Any) -> Launch:
        started.append(Launch(bench, tmp_path, launch_file, **arguments))
        return started[-1]

    yield start
    for item in started:
        if item.process.poll() is None:
            os.killpg(item.process.pid, signal.SIGKILL)
            item.process.wait(5)


def is_stop(path: Any) -> bool:
    """A command to stand still: every pose is where the vehicle is."""
    return all(abs(pose.pose.position.x) < 1e-6 and abs(pose.pose.position.y) < 1e-6 for pose in path.poses)


def test_a_drive_from_cameras_to_a_stop(bench, launch, stored_bundle, tmp_path):
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(PARAMETERS)
    drive = launch(
        "drive.launch.py",
        bundle=stored_bundle.path,
        namespace=NAMESPACE,
        params_file=parameters,
        deadline_ms=30_000,
        budget=0.6,
        cam_back_topic="/rear/compressed",
    )
    guarded = bench.listen(PathMessage, f"{NAMESPACE}/{topics.GUARD_PATH}", topics.plan_qos())
    plans = bench.listen(PathMessage, f"{NAMESPACE}/{topics.PLANNER_PATH}", topics.plan_qos())
    statuses = bench.listen(DiagnosticArray, f"{NAMESPACE}/{topics.PLANNER_STATUS}", topics.record_qos())
    node, sensors = bench.node, topics.sensor_qos(depth=20)
    cameras = {
        camera: node.create_publisher(CompressedImage, f"{NAMESPACE}/{topics.camera_topic(camera)}", sensors)
        for camera in CAMERAS
    }
    cameras["CAM_BACK"] = node.create_publisher(CompressedImage, "/rear/compressed", sensors)
    odometry = node.create_publisher(Odometry, f"{NAMESPACE}/{topics.ODOMETRY}", sensors)
    for module in ("ros_nodes.planner_node", "ros_nodes.guard_node"):
        drive.find(module)
    everything = [odometry, *cameras.values()]
    bench.until(
        lambda: all(publisher.get_subscription_count() for publisher in everything),
        "the planner to be active",
        60,
    )
    generator = np.random.default_rng(0)

    def planned() -> bool:
        stamp = time_message(node.get_clock().now().nanoseconds)
        message = Odometry(child_frame_id="base_link")
        message.header.stamp = stamp
        message.header.frame_id = "map"
        message.pose.pose.orientation.w = 1.0
        odometry.publish(message)
        for camera in sorted(CAMERAS, key=lambda name: name == "CAM_FRONT"):
            pixels = generator.integers(0, 255, (90, 160, 3), dtype=np.uint8)
            image = CompressedImage(format="jpeg", data=cv2.imencode(".jpg", pixels)[1].tobytes())
            image.header.stamp, image.header.frame_id = stamp, camera
            cameras[camera].publish(image)
        bench.spin(0.5)
        return bool(plans)

    bench.until(planned, "a plan")
    assert statuses and bench.until(lambda: guarded, "the guard")
    os.killpg(drive.process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    assert drive.wait() == 0, drive.log
    bench.until(lambda: is_stop(guarded[-1]), "the stop")
    assert "Traceback" not in drive.log


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_launch_that_is_killed_takes_its_nodes_along_and_the_guard_stops(bench, launch, stored_bundle, how):
    drive = launch("drive.launch.py", bundle=stored_bundle.path, namespace=NAMESPACE)
    guarded = bench.listen(PathMessage, f"{NAMESPACE}/{topics.GUARD_PATH}", topics.plan_qos())
    for module in ("ros_nodes.planner_node", "ros_nodes.guard_node"):
        drive.find(module)
    bench.until(lambda: "ready after" in drive.log and guarded, "both nodes", 60)
    drive.process.send_signal(how)  # not to the group
    left = list(drive.nodes.values())
    bench.until(lambda: not [node for node in left if node.is_running()], "the nodes to end")
    drive.wait()
    bench.until(lambda: is_stop(guarded[-1]), "the stop")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"rate": "fast"}, "rate:=fast is no number"),
        ({"loop": "True"}, "loop"),
        ({"params_file": "nothing.yaml"}, "params_file:=nothing.yaml cannot be read"),
    ],
)
def test_arguments_of_a_replay_that_mean_nothing_are_refused(launch, stored_bundle, arguments, complaint):
    replay = launch("replay.launch.py", bundle=stored_bundle.path, data_root="nowhere", **arguments)
    assert replay.wait() == 1
    assert complaint in replay.log and "process started" not in replay.log


def test_a_planner_that_cannot_be_configured_ends_the_launch(launch, tmp_path):
    drive = launch("drive.launch.py", bundle=tmp_path / "nothing")
    drive.find("ros_nodes.guard_node")
    assert drive.wait() == 1
    assert "configure refused" in drive.log and "vla_planner cannot be configured" in drive.log


def test_a_node_that_dies_ends_the_launch_and_the_guard_stops(bench, launch, stored_bundle):
    drive = launch("drive.launch.py", bundle=stored_bundle.path, namespace=NAMESPACE)
    guarded = bench.listen(PathMessage, f"{NAMESPACE}/{topics.GUARD_PATH}", topics.plan_qos())
    planner = drive.find("ros_nodes.planner_node")
    drive.find("ros_nodes.guard_node")
    bench.until(lambda: "ready after" in drive.log and guarded, "both nodes", 60)
    planner.kill()
    assert drive.wait() == 1
    assert "vla_planner cannot go on: its process ended with code -9" in drive.log
    bench.until(lambda: is_stop(guarded[-1]), "the stop")
