"""The recorder hears publishers of every kind, and what it wrote can be read without ROS."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytest.importorskip("rosbags", reason="needs rosbags: pip install '.[record]'")
pytestmark = pytest.mark.ros

from nav_msgs.msg import Odometry
from rosbags.highlevel import AnyReader
from std_msgs.msg import String

from ros_nodes import topics
from ros_nodes.messages import stamp_ns_of, time_message


def cli(bench, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vla_autoprune.cli", *arguments]
    return subprocess.Popen(
        command, env=bench.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_latched_and_best_effort_publishers_are_recorded(bench) -> None:
    out = bench.folder / "some" / "drive"
    command = bench.node.create_publisher(String, "/car/command", topics.latched_qos())
    best_effort = topics.sensor_qos("best_effort", depth=5)
    odometry = bench.node.create_publisher(Odometry, "/car/odometry", best_effort)
    command.publish(String(data="left"))  # before anyone listens
    recorder = cli(bench, "record", str(out), "--namespace", "/car")
    sent = []

    def publish() -> None:
        if odometry.get_subscription_count():
            message = Odometry()
            message.header.stamp = time_message(len(sent) + 1)
            message.twist.twist.linear.x = float(len(sent))
            odometry.publish(message)
            sent.append(message)

    timer = bench.node.create_timer(0.02, publish)
    try:
        bench.until(lambda: len(sent) > 50, "a subscriber of odometry")
        bench.node.destroy_timer(timer)
        bench.spin(0.5)
    finally:
        recorder.send_signal(signal.SIGINT)
        said, _ = recorder.communicate(timeout=20)
    assert recorder.returncode == 0, said
    with AnyReader([out]) as reader:
        messages = [
            (connection.topic, reader.deserialize(content, connection.msgtype))
            for connection, _, content in reader.messages()
        ]
    assert [message.data for topic, message in messages if topic == "/car/command"] == ["left"]
    speeds = {
        stamp_ns_of(message.header.stamp): message.twist.twist.linear.x
        for topic, message in messages
        if topic == "/car/odometry"
    }
    assert len(speeds) > 25
    assert all(speed == stamp_ns - 1 for stamp_ns, speed in speeds.items())
    assert f"{len(messages)} messages of 2 topics" in said

    again = cli(bench, "record", str(out))
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 2
    assert "not there yet" in said

    nothing = cli(bench, "replay", str(out.parent), "--bundle", "tests/data/tiny_bundle")
    said, _ = nothing.communicate(timeout=60)
    assert nothing.returncode == 2
    assert "metadata.yaml" in said
