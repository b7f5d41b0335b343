"""Nodes as processes of their own, over real DDS on a domain of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ros_nodes.programs import LAUNCH_PID

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
"""A loaded machine is slow, not wrong."""


class NodeProcess:
    """A node in a process, its log in a file."""

    def __init__(self, bench: Bench, module: str, name: str, arguments: list[str], log: Path) -> None:
        self.bench, self.name, self.log_file = bench, name, log
        command = [sys.executable, "-m", module, "--ros-args", "-r", f"__node:={name}", *arguments]
        with log.open("wb") as output:
            self.process = bench.spawn(command, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def transition(self, what: str) -> bool:
        """Ask a lifecycle node for a transition; whether it succeeded."""
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState

        number = getattr(Transition, f"TRANSITION_{what.upper()}")
        request = ChangeState.Request(transition=Transition(id=number))
        return self.bench.call(ChangeState, f"{self.name}/change_state", request).success

    def set(self, **parameters: Any) -> list[str]:
        """Set parameters; the reasons of those refused."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in parameters.items()]
        answer = self.bench.call(
            SetParameters, f"{self.name}/set_parameters", SetParameters.Request(parameters=messages)
        )
        return [result.reason for result in answer.results if not result.successful]

    def interrupt(self) -> int:
        """SIGINT; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_S)


class Bench:
    """The test's own node, and the processes it talks to."""

    def __init__(self, folder: Path, domain: int) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self.domain = domain
        self.environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(domain),
            "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
            "PYTHONUNBUFFERED": "1",
            LAUNCH_PID: str(os.getpid()),  # nothing outlives tests that are killed
        }
        self.folder = folder
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("bench", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.processes: list[NodeProcess] = []
        self._spawned: list[subprocess.Popen[Any]] = []

    def spawn(self, command: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process in this domain; it is killed at the end at the latest."""
        process = subprocess.Popen(command, env=self.environment, **options)
        self._spawned.append(process)
        return process

    def start(self, module: str, name: str, *arguments: str, **parameters: Any) -> NodeProcess:
        """Start a node's module in a process, with parameters."""
        values = [item for key, value in parameters.items() for item in ("-p", f"{key}:={_yaml(value)}")]
        log = self.folder / f"{name}-{len(self.processes)}.log"
        process = NodeProcess(self, module, name, [*arguments, *values], log)
        self.processes.append(process)
        return process

    def call(self, kind: Any, service: str, request: Any) -> Any:
        client = self.node.create_client(kind, service)
        try:
            self.until(client.service_is_ready, f"service {service}")
            future = client.call_async(request)
            self.until(future.done, f"an answer of {service}")
            return future.result()
        finally:
            self.node.destroy_client(client)

    def listen(self, kind: Any, topic: str, qos: Any) -> list[Any]:
        """What arrives on a topic, in a list that grows."""
        heard: list[Any] = []
        self.node.create_subscription(kind, topic, heard.append, qos)
        return heard

    def until(self, happened: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        """Spin until something is so; its value."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if value := happened():
                return value
            self.executor.spin_once(timeout_sec=0.05)
        logs = "\n".join(f"--- {process.name}\n{process.log[-2000:]}" for process in self.processes)
        raise AssertionError(f"waited {patience_s:g} s for {what}\n{logs}")

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        import rclpy

        for process in self._spawned:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self._spawned:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else str(value)


@pytest.fixture(scope="module")
def bench(ros_domain: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
    made = Bench(tmp_path_factory.mktemp("ros"), ros_domain)
    try:
        yield made
    finally:
        made.close()
