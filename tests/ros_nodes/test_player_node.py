"""The player as a process: what it publishes is the data set, in order, and it ends in order."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytest.importorskip("nuscenes", reason="needs nuscenes-devkit: pip install '.[eval]'")
pytestmark = pytest.mark.ros

from geometry_msgs.msg import AccelWithCovarianceStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import String

from eval_nuscenes.nuscenes_reader import NuScenesSplit
from eval_nuscenes.nuscenes_writer import VERSION, dataset_options, write_dataset
from ros_nodes import topics
from ros_nodes.limits import GuardSettings, faults_of
from ros_nodes.messages import heading_of_quaternion, stamp_ns_of, trajectory_of
from ros_nodes.motion import Trajectory
from vla_autoprune.frame import CAMERAS


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "world"
    options = dataset_options(
        scenes=2, duration_s=4.0, width=160, height=90, val_fraction=1.0, calibration_fraction=0.0
    )
    write_dataset(root, options, workers=1)
    return root


def test_it_plays_the_chosen_scene_as_it_is_and_ends(bench, data_root) -> None:
    split = NuScenesSplit(data_root, VERSION, "val")
    scene = split.scene_names[1]
    samples = {round(s.stamp_s * 1e6) * 1000: s for s in split if s.scene == scene}
    images = {
        camera: bench.listen(CompressedImage, topics.camera_topic(camera), topics.record_qos())
        for camera in CAMERAS
    }
    odometry = bench.listen(Odometry, topics.ODOMETRY, topics.sensor_qos(depth=500))
    acceleration = bench.listen(AccelWithCovarianceStamped, topics.ACCELERATION, topics.sensor_qos(depth=500))
    commands = bench.listen(String, topics.COMMAND, topics.latched_qos())
    truths = bench.listen(PathMessage, topics.TRUTH_PATH, topics.record_qos())
    player = bench.start(
        "ros_nodes.player_node", "player", data_root=str(data_root), scenes=scene, rate=2.0, run_on_s=0.5
    )
    bench.until(lambda: player.process.poll() is not None, "the end", patience_s=240.0)
    assert player.process.returncode == 0, player.log
    last_ns = max(samples)
    ends = [*images.values(), truths, odometry, acceleration]
    bench.until(
        lambda: all(heard and stamp_ns_of(heard[-1].header.stamp) == last_ns for heard in ends),
        "the last message of every topic",
    )

    for camera, heard in images.items():
        assert [stamp_ns_of(image.header.stamp) for image in heard] == list(samples)
        for image, sample in zip(heard, samples.values(), strict=True):
            assert bytes(image.data) == sample.cameras[camera].path.read_bytes()
            assert image.header.frame_id == camera
    motions = {stamp_ns_of(message.header.stamp): message for message in odometry}
    accelerations = {stamp_ns_of(message.header.stamp): message for message in acceleration}
    for (stamp_ns, sample), truth in zip(samples.items(), truths, strict=True):
        message = motions[stamp_ns]
        assert message.twist.twist.linear.x == sample.ego.speed_mps
        assert message.twist.twist.angular.z == sample.ego.yaw_rate_rps
        assert accelerations[stamp_ns].accel.accel.linear.x == sample.ego.acceleration_mps2
        assert message.pose.pose.position.x == sample.ego_pose[0, 3]
        heading = heading_of_quaternion(message.pose.pose.orientation)
        assert heading == pytest.approx(np.arctan2(sample.ego_pose[1, 0], sample.ego_pose[0, 0]))
        poses = trajectory_of(truth, 10).poses
        np.testing.assert_allclose(poses, sample.future_in_ego[sample.future_exists], atol=1e-9)
    assert len(motions) > 5 * len(samples)
    assert commands[-1].data == list(samples.values())[-1].command.value


def test_it_loops_with_the_clock_jumping_back_until_it_is_interrupted(bench, data_root) -> None:
    clocks = bench.listen(Clock, "/clock", topics.record_qos())
    player = bench.start(
        "ros_nodes.player_node",
        "looping",
        data_root=str(data_root),
        rate=20.0,
        loop=True,
        wait_for_subscribers_s=0.0,
    )

    def jumped_back() -> bool:
        times = [stamp_ns_of(clock.clock) for clock in clocks]
        return any(later < earlier for earlier, later in pairwise(times))

    bench.until(jumped_back, "the second lap", patience_s=240.0)
    assert player.interrupt() == 0


def test_the_driver_of_the_data_keeps_the_limits_of_the_guard(data_root) -> None:
    judged = 0
    for sample in NuScenesSplit(data_root, VERSION, "val"):
        poses = sample.future_in_ego[sample.future_exists]
        if len(poses) >= 4:
            due_ns = np.arange(1, len(poses) + 1) * 500_000_000
            trajectory = Trajectory(0, topics.EGO_FRAME, due_ns, poses)
            assert not list(faults_of(trajectory, GuardSettings(), sample.ego.speed_mps))
            judged += 1
    assert judged


def test_it_says_what_is_wrong_and_ends(bench, tmp_path) -> None:
    player = bench.start("ros_nodes.player_node", "lost", data_root=str(tmp_path / "none"))
    bench.until(lambda: player.process.poll() is not None, "the end", patience_s=240.0)
    assert player.process.returncode == 2
    assert "does not exist" in player.log
