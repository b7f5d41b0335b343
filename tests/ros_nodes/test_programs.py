"""Programs and signals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytestmark = pytest.mark.ros

SLOW_TO_MAKE = """
import os, signal, sys, time
from ros_nodes.programs import run_program

def make():
    os.kill(os.getpid(), signal.{0})
    time.sleep(3600)

sys.exit(run_program(make, []))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_program_that_opens_something_large_ends_at_once(repository, name):
    ended = subprocess.run(
        [sys.executable, "-c", SLOW_TO_MAKE.format(name)], cwd=repository, capture_output=True, timeout=240
    )
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_node_ends_in_order_while_its_imports_run(repository, tmp_path, name):
    (tmp_path / "slow_to_import.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(3600)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "ros_nodes.start", "slow_to_import"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": f"{repository}:{tmp_path}"},
        capture_output=True,
        timeout=240,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
