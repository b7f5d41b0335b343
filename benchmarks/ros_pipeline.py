"""What ROS adds to a plan, and what a deadline-aware choice of buckets keeps of it.

Six JPEG cameras and odometry from this process, planner and guard in processes of their own, real DDS with
the shared-memory profile of config/. First undisturbed; then under a load that comes and goes, with fixed and
deadline-aware buckets in turns, so that both meet the same machine.

    python benchmarks/ros_pipeline.py --bundle out/demo/bundle --out out/ros_pipeline
    python benchmarks/ros_pipeline.py --part deadline --size 160 90 --rate 5 --load 1 --slack 1.3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
ODOMETRY_HZ = 100.0
SPEED_MPS = 8.0
PICTURES = 8
"""Different images, played in turns."""
BURN = """
import time
while True:
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        sum(range(1000))
    time.sleep(0.5)
"""
"""Half a second of work, half a second of rest."""


def pictures(width: int, height: int) -> list[bytes]:
    """JPEGs of the kind of detail that cameras see."""
    import cv2

    generator = np.random.default_rng(0)
    made = []
    for _ in range(PICTURES):
        coarse = generator.integers(0, 255, (height // 24, width // 24, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        image += generator.integers(-3, 4, image.shape, dtype=np.int16)
        made.append(cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8))[1].tobytes())
    return made


def random_bundle(folder: Path) -> Path:
    """A bundle of 12 layers of width 384, random but biased to answer with plans: here prefill matters."""
    import torch

    from vla_autoprune.export.export import export_bundle, text_files
    from vla_autoprune.models.adapter import LlavaAdapter
    from vla_autoprune.models.driving_vla import ModelSize, build_model
    from vla_autoprune.recipe_building import build_recipe

    shape = {"layers": 12, "width": 384, "heads": 6, "kv_heads": 6, "feed_forward": 1024, "tower_layers": 2}
    vla = build_model(ModelSize(image_size=96, **shape), seed=1)
    with torch.no_grad():
        words, answers = vla.model.get_input_embeddings().weight, vla.model.get_output_embeddings().weight
        distances, curvatures = (vla.codec.tokens_at(position) for position in (0, 1))
        words[:, 0], answers[:, 0] = 3.0, 0.0
        words[distances.start : distances.stop, 0] = -3.0
        answers[distances.start : distances.stop, 0] = 1.0
        answers[curvatures.start : curvatures.stop, 0] = -1.0
    adapter = LlavaAdapter(vla.model)
    recipe = build_recipe(adapter.shape("random"), vla.prompt.layout, decode_length=12, slopes=(0.0,))
    export_bundle(adapter, recipe, folder, text_files(vla))
    return folder


class Rig:
    """The cameras, the nodes under test, and what they say."""

    def __init__(self, options: argparse.Namespace, environment: dict[str, str]) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from nav_msgs.msg import Odometry
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import CompressedImage

        from ros_nodes import topics
        from vla_autoprune.frame import CAMERAS

        self.rate_hz = options.rate
        rclpy.init()
        self.node = rclpy.create_node("rig")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.images = pictures(*options.size)
        sensors = topics.sensor_qos(depth=5)
        self.cameras = {
            camera: self.node.create_publisher(CompressedImage, topics.camera_topic(camera), sensors)
            for camera in CAMERAS
        }
        self.odometry = self.node.create_publisher(Odometry, topics.ODOMETRY, topics.sensor_qos(depth=20))
        self.frames: list[dict[str, str]] = []
        self.node.create_subscription(
            DiagnosticArray, topics.PLANNER_STATUS, self._on_status, topics.record_qos()
        )
        self.processes = {
            name: subprocess.Popen(
                [sys.executable, "-m", module, "--ros-args", *given], env=environment, cwd=REPOSITORY
            )
            for name, module, given in (
                ("vla_planner", "ros_nodes.planner_node", _planner_arguments(options)),
                ("trajectory_guard", "ros_nodes.guard_node", []),
            )
        }

    def _on_status(self, message: Any) -> None:
        (status,) = message.status
        self.frames.append({value.key: value.value for value in status.values})

    def call(self, kind: Any, service: str, request: Any) -> Any:
        """Ask a service; its answer."""
        client: Any = self.node.create_client(kind, service)
        if not client.wait_for_service(60.0):
            raise TimeoutError(f"service {service} does not appear")
        future = client.call_async(request)
        self.executor.spin_until_future_complete(future, 120.0)
        self.node.destroy_client(client)
        return future.result()

    def transition(self, node: str, *steps: str) -> None:
        """Lead a node through lifecycle transitions."""
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState

        for step in steps:
            number = getattr(Transition, f"TRANSITION_{step.upper()}")
            request = ChangeState.Request(transition=Transition(id=number))
            if not self.call(ChangeState, f"{node}/change_state", request).success:
                raise RuntimeError(f"{node} refuses to {step}; see its log")

    def set(self, node: str, **values: Any) -> None:
        """Set parameters of a node."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        self.call(SetParameters, f"{node}/set_parameters", SetParameters.Request(parameters=messages))

    def wait_until_heard(self) -> None:
        """Until every topic has its subscriber, and a second more."""
        publishers = [self.odometry, *self.cameras.values()]
        while not all(publisher.get_subscription_count() for publisher in publishers):
            self.executor.spin_once(timeout_sec=0.1)
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.1)

    def play(self, seconds: float) -> tuple[int, list[dict[str, str]]]:
        """Publish in real time; the frames sent, and what the planner says about each it took."""
        from nav_msgs.msg import Odometry
        from sensor_msgs.msg import CompressedImage

        self.frames.clear()
        begin_s = time.monotonic()
        next_odometry_s = next_frame_s = begin_s
        sent = 0
        while (now_s := time.monotonic()) < begin_s + seconds:
            if now_s >= next_odometry_s:
                next_odometry_s += 1.0 / ODOMETRY_HZ
                message = Odometry(child_frame_id="base_link")
                message.header.stamp = self.node.get_clock().now().to_msg()
                message.pose.pose.orientation.w = 1.0
                message.pose.pose.position.x = SPEED_MPS * (now_s - begin_s)
                message.twist.twist.linear.x = SPEED_MPS
                self.odometry.publish(message)
            if now_s >= next_frame_s:
                next_frame_s += 1.0 / self.rate_hz
                stamp = self.node.get_clock().now().to_msg()
                for index, (camera, publisher) in enumerate(self.cameras.items()):
                    # Bytes behind a JPEG's end mean nothing; they keep the planner from finding it frozen.
                    data = self.images[(sent + index) % PICTURES] + sent.to_bytes(4, "little")
                    image = CompressedImage(format="jpeg", data=data)
                    image.header.stamp, image.header.frame_id = stamp, camera
                    publisher.publish(image)
                sent += 1
            due_s = min(next_odometry_s, next_frame_s)
            self.executor.spin_once(timeout_sec=max(0.0, min(due_s - time.monotonic(), 0.005)))
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.05)
        return sent, list(self.frames)

    def close(self) -> None:
        """End the nodes, then this one."""
        import rclpy

        for process in self.processes.values():
            process.send_signal(signal.SIGINT)
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown()


def pipeline(rig: Rig, seconds: float) -> dict[str, Any]:
    """Undisturbed: what arrives, what ROS adds, what it costs."""
    import psutil

    def cpu_s(process: subprocess.Popen[bytes]) -> float:
        times = psutil.Process(process.pid).cpu_times()
        return times.user + times.system

    cpu_before = {name: cpu_s(process) for name, process in rig.processes.items()}
    counted_before = dict(rig.frames[-1])
    sent, frames = rig.play(seconds)
    planned = [frame for frame in frames if "stamp_to_publish_ms" in frame]

    def counted(what: str) -> int:
        return int(frames[-1].get(f"count_{what}", "0")) - int(counted_before.get(f"count_{what}", "0"))

    overhead = [_ms(frame, "stamp_to_publish") - _ms(frame, "total") for frame in planned]
    ros_alone = [
        value - _ms(frame, "images") - _ms(frame, "waited")
        for value, frame in zip(overhead, planned, strict=True)
    ]
    return {
        "seconds": seconds,
        "frames_sent": sent,
        "images_delivered_percent": 100 * counted("images") / (sent * len(rig.cameras)),
        "frames_planned": len(planned),
        "frames_superseded": counted("superseded"),
        "frames_refused": counted("refused"),
        "overhead_ms": _quantiles(overhead),
        "transport_and_publishing_ms": _quantiles(ros_alone),
        "waiting_ms": _quantiles([_ms(frame, "waited") for frame in planned]),
        "decoding_ms": _quantiles([_ms(frame, "images") for frame in planned]),
        "plan_ms": _quantiles([_ms(frame, "total") for frame in planned]),
        "stamp_to_publish_ms": _quantiles([_ms(frame, "stamp_to_publish") for frame in planned]),
        "cpu_percent_of_one_core": {
            name: 100 * (cpu_s(process) - cpu_before[name]) / (seconds + 1.0)
            for name, process in rig.processes.items()
        },
    }


def deadlines(rig: Rig, options: argparse.Namespace, deadline_ms: float) -> dict[str, Any]:
    """Under load: fixed against deadline-aware buckets, in turns."""
    kept: dict[str, list[dict[str, str]]] = {"fixed": [], "deadline-aware": []}
    for _ in range(options.turns):
        for kind, frames in kept.items():
            rig.transition("vla_planner", "deactivate", "cleanup")
            rig.set(
                "vla_planner",
                deadline_aware=kind == "deadline-aware",
                deadline_ms=deadline_ms,
                budget=1.0,
                max_frame_age_ms=10_000.0,
            )
            rig.transition("vla_planner", "configure", "activate")
            rig.wait_until_heard()
            load = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(options.load)]
            frames += [frame for frame in rig.play(options.load_seconds)[1] if "stamp_to_publish_ms" in frame]
            for process in load:
                process.kill()
                process.wait()
    return {
        "deadline_ms": deadline_ms,
        "load_processes": options.load,
        "seconds_each": options.turns * options.load_seconds,
        **{kind: _kept(frames, deadline_ms) for kind, frames in kept.items()},
    }


def _kept(frames: list[dict[str, str]], deadline_ms: float) -> dict[str, Any]:
    took = [_ms(frame, "stamp_to_publish") for frame in frames]
    buckets = [frame["bucket"] for frame in frames]
    return {
        "plans": len(took),
        "deadline_kept_percent": 100 * sum(value <= deadline_ms for value in took) / max(len(took), 1),
        "stamp_to_publish_ms": _quantiles(took),
        "buckets": {name: buckets.count(name) for name in sorted(set(buckets))},
    }


def _planner_arguments(options: argparse.Namespace) -> list[str]:
    given = {
        "bundle": Path(options.bundle).absolute(),
        "budget": options.budget,
        "initial_command": "straight",
        "max_frame_age_ms": 10_000.0,
        "deadline_ms": 60_000.0,
        "warmup_runs": 3,
        "threads": options.threads,
    }
    return [item for name, value in given.items() for item in ("-p", f"{name}:={value}")]


def _ms(frame: dict[str, str], step: str) -> float:
    return float(frame[f"{step}_ms"])


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {name: float(np.quantile(values, q)) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), "unknown")


def main() -> None:
    """Run both parts and write a JSON."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--bundle", help="directory of a bundle; a random one of some size unless given")
    parser.add_argument("--budget", type=float, default=0.4)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the undisturbed part")
    parser.add_argument("--rate", type=float, default=10.0, help="frames per second")
    parser.add_argument("--size", type=int, nargs=2, default=(1600, 900), help="width and height")
    parser.add_argument("--threads", type=int, default=1, help="of the backend")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--load-seconds", type=float, default=10.0, help="per turn and kind")
    parser.add_argument("--load", type=int, default=os.cpu_count(), help="processes that disturb")
    parser.add_argument("--slack", type=float, default=1.1, help="deadline over the undisturbed median")
    parser.add_argument("--part", choices=("pipeline", "deadline", "both"), default="both")
    parser.add_argument("--out", type=Path, default=Path("out/ros_pipeline"))
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    options.bundle = options.bundle or random_bundle(options.out / "bundle")
    profile = REPOSITORY / "config" / "fastdds_shared_memory.xml"
    os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(profile))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ["PYTHONPATH"] = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    rig = Rig(options, dict(os.environ))
    try:
        rig.transition("trajectory_guard", "configure", "activate")
        rig.transition("vla_planner", "configure", "activate")
        rig.wait_until_heard()
        rig.play(2.0)
        result: dict[str, Any] = {
            "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
            "images": {"size": list(options.size), "bytes": [len(image) for image in rig.images]},
            "load_average_before": os.getloadavg()[0],
        }
        if options.part != "deadline":
            result["pipeline"] = pipeline(rig, options.seconds)
        if options.part != "pipeline":
            rig.transition("vla_planner", "deactivate", "cleanup")
            rig.set("vla_planner", budget=1.0)
            rig.transition("vla_planner", "configure", "activate")
            rig.wait_until_heard()
            unpruned = [_ms(f, "stamp_to_publish") for f in rig.play(5.0)[1] if "stamp_to_publish_ms" in f]
            result["deadline"] = deadlines(rig, options, options.slack * float(np.median(unpruned)))
    finally:
        rig.close()
    text = json.dumps(result, indent=1)
    (options.out / "ros_pipeline.json").write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
