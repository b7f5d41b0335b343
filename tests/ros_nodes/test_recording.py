"""The recorder hears publishers of every kind, and what it wrote can be read without ROS."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytest.importorskip("rosbags", reason="needs rosbags: pip install '.[record]'")
pytestmark = pytest.mark.ros

from nav_msgs.msg import Odometry
from rclpy.parameter import Parameter
from rosbags.highlevel import AnyReader
from std_msgs.msg import String

from ros_nodes import replay as replaying
from ros_nodes import topics
from ros_nodes.messages import diagnostics_message, path_message, stamp_ns_of, time_message
from ros_nodes.recording import Recorder
from vla_autoprune.errors import InputError
from vla_autoprune.frame import WAYPOINT_TIMES_S, Command, Frame, Plan

MS = 1_000_000
PLAN = Plan(np.ones((6, 3), np.float32), WAYPOINT_TIMES_S, "", "full", None, (), (), 1.0, 1.0, {"total": 1.0})


def cli(bench, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vla_autoprune.cli", *arguments]
    return bench.spawn(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)


def test_a_disk_that_fills_up_ends_the_recording_while_it_can_be_closed(bench, monkeypatch) -> None:
    out = bench.folder / "2026"
    used = shutil.disk_usage(bench.folder)
    publisher = bench.node.create_publisher(String, "/full/command", topics.latched_qos())
    publisher.publish(String(data="left"))
    recorder = Recorder(
        context=bench.context,
        namespace="/full",
        parameter_overrides=[Parameter("out", value=str(out)), Parameter("keep_free_mb", value=1.0)],
    )
    bench.executor.add_node(recorder)
    try:
        bench.until(lambda: recorder.counts.get("/full/command"), "the command")
        assert not recorder.done
        monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=999_999))
        bench.until(lambda: recorder.done, "the end")
        recorder.finish()
    finally:
        bench.executor.remove_node(recorder)
        recorder.destroy_node()
    with AnyReader([out]) as reader:
        assert reader.message_count == 1
    with pytest.raises(InputError, match="has 1 MB left; keep_free_mb is 1"):
        Recorder(
            context=bench.context,
            parameter_overrides=[Parameter("out", value=f"{out}b"), Parameter("keep_free_mb", value=1.0)],
        )


def test_a_directory_may_be_named_like_a_number(bench) -> None:
    recorder = cli(bench, "record", "20261231", cwd=bench.folder)
    try:
        bench.until((bench.folder / "20261231").is_dir, "the recording")
    finally:
        recorder.send_signal(signal.SIGINT)
        said, _ = recorder.communicate(timeout=60)
    assert recorder.returncode == 0, said


@pytest.mark.parametrize("order", ["as it was", "the status first", "another image before"])
def test_a_plan_is_repeated_with_what_it_was_made_with(monkeypatch, order) -> None:
    def message(stamp_ns: int = 0, **fields: Any) -> SimpleNamespace:
        return SimpleNamespace(header=SimpleNamespace(stamp=time_message(stamp_ns)), **fields)

    path = path_message(PLAN, MS)
    values = {"bucket": "full", "command": "left", "total_ms": 1.0, "skew_ms": 0.0}
    status = diagnostics_message(MS, "frame", "ok", "", values)
    odometry = Odometry()
    odometry.header.stamp = time_message(MS)

    def image_of(level: int, stamp_ns: int) -> SimpleNamespace:
        data = np.full(12, level, np.uint8)
        return message(stamp_ns, data=data, encoding="rgb8", width=2, height=2, step=6)

    image = image_of(200, MS)
    recorded = [
        ("/command", message(data="left")),
        ("/camera/cam_front/image", image),
        ("/odometry", odometry),
        ("/command", message(data="right")),  # came while it planned
        ("/planner/path", path),
        ("/planner/status", status),
    ]
    if order != "as it was":  # a busy recorder takes topics as it finds them
        recorded.insert(0, recorded.pop())
    if order == "another image before":
        recorded.insert(0, ("/camera/cam_front/image", image_of(100, 0)))
    monkeypatch.setattr(replaying, "read_messages", lambda _: iter(recorded))
    frames = []

    def plan(frame: Frame, _: str) -> Plan:
        frames.append(frame)
        return PLAN

    again = list(replaying.replay(Path("drive"), ("CAM_FRONT",), plan))
    assert [item.problem for item in again] == [""] and again[0].difference_m < 1e-6
    assert [frame.command for frame in frames] == [Command.LEFT]
    assert frames[0].images["CAM_FRONT"].mean() == 200


def test_latched_and_best_effort_publishers_are_recorded(bench) -> None:
    out = bench.folder / "some" / "drive"
    command = bench.node.create_publisher(String, "/car/command", topics.latched_qos())
    best_effort = topics.sensor_qos("best_effort", depth=5)
    odometry = bench.node.create_publisher(Odometry, "/car/odometry", best_effort)
    command.publish(String(data="left"))  # before anyone listens
    recorder = cli(bench, "record", str(out), "--namespace", "/car")
    sent = []

    def publish() -> None:
        if odometry.get_subscription_count() and command.get_subscription_count():
            message = Odometry()
            message.header.stamp = time_message(len(sent) + 1)
            message.twist.twist.linear.x = float(len(sent))
            odometry.publish(message)
            sent.append(message)

    timer = bench.node.create_timer(0.02, publish)
    try:
        bench.until(lambda: len(sent) > 100, "both to be listened to")
        bench.node.destroy_timer(timer)
        bench.spin(0.5)
    finally:
        recorder.send_signal(signal.SIGINT)
        said, _ = recorder.communicate(timeout=60)
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
    assert speeds  # how many arrive is best effort
    assert all(speed == stamp_ns - 1 for stamp_ns, speed in speeds.items())
    assert f"{len(messages)} messages of 2 topics" in said

    again = cli(bench, "record", str(out))
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 2, said
    assert "not there yet" in said

    nothing = cli(bench, "replay", str(out.parent), "--bundle", "tests/data/tiny_bundle")
    said, _ = nothing.communicate(timeout=60)
    assert nothing.returncode == 2, said
    assert "metadata.yaml" in said
