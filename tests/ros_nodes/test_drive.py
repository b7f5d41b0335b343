"""A drive through real processes: player, planner, guard, monitor, recorder; then the same frames offline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytest.importorskip("nuscenes", reason="needs nuscenes-devkit: pip install '.[eval]'")
pytest.importorskip("rosbags", reason="needs rosbags: pip install '.[record]'")
pytestmark = [pytest.mark.ros, pytest.mark.slow]

from nav_msgs.msg import Path as PathMessage
from typer.testing import CliRunner

from engines.onnxruntime import OnnxRuntimeBackend
from eval_nuscenes.metrics import PROTOCOLS
from eval_nuscenes.nuscenes_reader import NuScenesSplit
from eval_nuscenes.nuscenes_writer import VERSION, dataset_options, write_dataset
from ros_nodes import topics
from ros_nodes.limits import GuardSettings, faults_of
from ros_nodes.messages import trajectory_of
from ros_nodes.replay import replay
from vla_autoprune.cli import app
from vla_autoprune.runtime.planner import Planner

BUDGET = 0.4
LIDAR_AHEAD_M = 0.94


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "world"
    options = dataset_options(
        scenes=1, duration_s=5.0, width=320, height=180, val_fraction=1.0, calibration_fraction=0.0
    )
    write_dataset(root, options, workers=1)
    return root


@pytest.fixture(scope="module")
def driven(bench, data_root, repository):
    """The drive, played in lockstep so that a slow machine drops nothing."""
    bundle, out = str(repository / "tests" / "data" / "tiny_bundle"), bench.folder
    guarded = bench.listen(PathMessage, topics.GUARD_PATH, topics.record_qos())
    planner = bench.start(
        "ros_nodes.planner_node",
        "vla_planner",
        bundle=bundle,
        budget=BUDGET,
        threads=1,
        deadline_aware=False,
        sync_wait_ms=1000.0,
        acceleration_source="topic",
        use_sim_time=True,
    )
    guard = bench.start("ros_nodes.guard_node", "trajectory_guard", use_sim_time=True)
    recorder = bench.start("ros_nodes.recording", "recorder", out=str(out / "drive"))
    monitor = bench.start(
        "ros_nodes.monitor_node",
        "open_loop_monitor",
        out=str(out / "score.json"),
        scored_point_x_m=LIDAR_AHEAD_M,
        use_sim_time=True,
    )
    for node in (planner, guard):
        assert node.transition("configure"), node.log
        assert node.transition("activate"), node.log
    player = bench.start(
        "ros_nodes.player_node",
        "nuscenes_player",
        data_root=str(data_root),
        lockstep_timeout_s=20.0,
        subscribers=2,
        truth_subscribers=2,  # the recorder, too
    )
    bench.until(lambda: player.process.poll() is not None, "the end of the drive", patience_s=240.0)
    assert player.process.returncode == 0, player.log
    bench.until(lambda: monitor.process.poll() is not None, "the monitor's end")
    assert monitor.process.returncode == 0, monitor.log
    for node in (recorder, planner, guard):
        assert node.interrupt() == 0, node.log
    bench.until(lambda: guarded and trajectory_of(guarded[-1], 100).is_stop, "the stop")
    return {
        "score": json.loads((out / "score.json").read_text()),
        "drive": out / "drive",
        "guarded": guarded,
        "log": player.log + planner.log,
    }


@pytest.fixture(scope="module")
def planner(stored_bundle):
    return Planner(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1), BUDGET)


def test_the_monitor_finds_what_offline_evaluation_finds(driven, data_root, planner) -> None:
    score, split = driven["score"], NuScenesSplit(data_root, VERSION, "val")
    assert score["frames"] == score["planned"] == len(split), driven["log"]
    assert score["missed"] == 0
    at = []
    for sample in split:
        plan = planner.plan(sample.frame(reduction=planner.preprocessing.reduction))
        offline = PROTOCOLS["uniad"].scorer(sample.truth)(sample.lidar_waypoints(plan.waypoints_in_ego))
        online = score["distances_m"][str(round(sample.stamp_s * 1e6) * 1000)]
        assert [value is not None for value in online] == sample.future_exists.tolist()
        known = sum(value is not None for value in online)
        np.testing.assert_allclose(online[:known], offline.distance_m[:known], atol=1e-4)
        if known == len(online):
            at.append(offline.l2_m)
    assert score["complete"] == len(at) > 0
    np.testing.assert_allclose(score["l2_at_m"], np.mean(at, axis=0), atol=1e-4)


def test_what_the_guard_let_out_keeps_its_limits_and_ends_with_a_stop(driven) -> None:
    guarded = [trajectory_of(path, 100) for path in driven["guarded"]]
    assert guarded[-1].is_stop
    assert all(out.is_stop or not list(faults_of(out, GuardSettings())) for out in guarded)


def test_the_recording_replays_to_the_same_plans(driven, planner) -> None:
    command = ["replay", str(driven["drive"]), "--bundle", str(planner.bundle.path), "--threads", "1"]
    command += ["--acceleration-source", "topic", "--tolerance-m", "1e-5"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"{driven['score']['planned']} planned again" in result.output
    too_slow = CliRunner().invoke(app, [*command, "--max-slowdown", "1e-9"])
    assert too_slow.exit_code == 1
    assert "times as long" in too_slow.output


def test_a_replay_sees_a_plan_that_moved(driven, planner) -> None:
    from dataclasses import replace
    from functools import partial

    def shifted(frame, bucket):
        plan = planner.plan_in_bucket(frame, bucket)
        return replace(plan, waypoints_in_ego=plan.waypoints_in_ego + np.array([0.0, 0.5, 0.0]))

    cameras = planner.recipe.layout.cameras
    again = partial(replay, reduction=planner.preprocessing.reduction, acceleration_source="topic")
    for plan in again(driven["drive"], cameras, shifted):
        assert plan.difference_m == pytest.approx(0.5, abs=1e-5)
    for plan in again(driven["drive"], cameras, planner.plan_in_bucket, sync_tolerance_ms=-1.0):
        assert "no image of" in plan.problem
