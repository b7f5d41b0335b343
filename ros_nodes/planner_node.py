"""vla_planner: a lifecycle node that turns camera images, odometry and a command into plans.

Callbacks run in one thread and only file messages. Whatever belongs together goes to a second thread, which
decodes and plans one frame at a time and publishes; of the frames that wait, the newest wins.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import AccelWithCovarianceStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.clock import Clock, ClockType, ROSClock
from rclpy.lifecycle import LifecycleNode, LifecycleState
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from visualization_msgs.msg import MarkerArray

from engines import backends
from ros_nodes import messages, topics
from ros_nodes.camera_images import CameraImages, FrameImages, ImageData
from ros_nodes.ego_motion import EgoMotion, OdometrySample
from ros_nodes.lifecycle import run, transition
from ros_nodes.messages import Level
from ros_nodes.parameters import NodeParameters, Parameter
from ros_nodes.synchronisation import FrameSet, Synchroniser
from ros_nodes.worker import NewestFirst
from vla_autoprune.bundle import load_bundle
from vla_autoprune.errors import InputError, VlaError
from vla_autoprune.frame import Command, EgoState, Frame, Plan
from vla_autoprune.runtime.backend import Backend
from vla_autoprune.runtime.deadline import BucketLatencies, measure_latencies
from vla_autoprune.runtime.planner import OVERRIDDEN, POLICIES, Planner

COMMANDS = tuple(command.value for command in Command)
DIAGNOSTICS_PERIOD_S = 1.0
ODOMETRY_SILENT_MS = 1_000.0

PARAMETERS = (
    Parameter("bundle", "", "directory of the bundle, as vla-autoprune export writes it"),
    Parameter("budget", 0.4, "a budget of the bundle's recipe; 1 prunes nothing", 0.01, 1.0),
    Parameter("policy", "autoprune", "how bucket and tokens are chosen", choices=tuple(POLICIES)),
    Parameter("backend", "onnxruntime", "what runs the bundle", choices=get_args(backends.Name)),
    Parameter("threads", 0, "CPU threads of the backend; 0 takes all cores", 0, 256),
    Parameter("warmup_runs", 3, "timed plans per bucket when the node is configured", 1, 100),
    Parameter("deadline_ms", 200.0, "from an image's stamp to its plan's publication", 1.0, 60_000.0),
    Parameter("deadline_margin_ms", 3.0, "kept of the deadline for publishing", 0.0, 1_000.0),
    Parameter("deadline_aware", True, "take a smaller budget where the one asked for does not fit"),
    Parameter("max_frame_age_ms", 300.0, "older frames are dropped, younger by as much, too", 1.0, 60_000.0),
    Parameter("anchor_camera", "CAM_FRONT", "its images make frames; without it there is no plan"),
    Parameter("sync_tolerance_ms", 50.0, "between the anchor's stamp and another camera's", 0.0, 1_000.0),
    Parameter("sync_wait_ms", 40.0, "an anchor image waits for other cameras and odometry", 0.0, 1_000.0),
    Parameter(
        "missing_camera",
        "refuse",
        "what is done without a usable image of another camera",
        choices=("refuse", "last_frame", "black"),
    ),
    Parameter("last_frame_max_age_ms", 500.0, "age of an image that stands in", 0.0, 10_000.0),
    Parameter("black_level", 2.0, "images with a mean below (0..255) are no use; 0 takes all", 0.0, 255.0),
    Parameter("camera_timeout_ms", 1_000.0, "a camera silent for longer is reported", 10.0, 60_000.0),
    Parameter("image_transport", "compressed", "kind of the camera topics", choices=("compressed", "raw")),
    Parameter("reliability", "reliable", "asked of publishers", choices=("reliable", "best_effort")),
    Parameter("odometry_max_age_ms", 200.0, "between the frame and its odometry", 1.0, 10_000.0),
    Parameter(
        "acceleration_source",
        "odometry",
        "differences of odometry's speed, or messages on the topic acceleration",
        choices=("odometry", "topic"),
    ),
    Parameter("initial_command", "none", "until one arrives", choices=("none", *COMMANDS)),
    Parameter("ego_frame", topics.EGO_FRAME, "the rear axle, frame of plans and of odometry's twist"),
    Parameter(
        "output_type",
        "auto",
        "planner/path alone, or planner/trajectory, too: auto where autoware_planning_msgs is there",
        choices=("auto", "path", "trajectory"),
    ),
    Parameter(
        "trajectory_frame",
        topics.EGO_FRAME,
        "of planner/trajectory; map: the frame that odometry names, by the frame's odometry",
        choices=(topics.EGO_FRAME, topics.MAP_FRAME),
    ),
)


@dataclass(frozen=True)
class _Configured:
    """What configuring makes and cleaning up frees."""

    settings: dict[str, Any]
    backend: Backend
    planner: Planner
    latencies: BucketLatencies


@dataclass(frozen=True)
class _Inputs:
    """What activating makes anew: nothing of an earlier drive is left."""

    synchroniser: Synchroniser[ImageData]
    ego: EgoMotion
    images: CameraImages
    latencies: BucketLatencies


@dataclass(frozen=True)
class _Job:
    """A frame on its way to the planning thread.

    Attributes:
        spent_ms: age of the anchor's image when it arrived, by the ROS clock.
        ego: state at the frame's time, or why there is none.
    """

    frame: FrameSet[ImageData]
    spent_ms: float
    travelled_m: float
    ego: EgoState | VlaError
    pose: OdometrySample | None
    command: Command | None


class VlaPlanner(LifecycleNode):
    """Plans with a bundle, on time, or says why not; see docs/ros.md."""

    def __init__(self, **options: Any) -> None:
        super().__init__("vla_planner", **options)
        self._settings = NodeParameters(self, PARAMETERS)
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._configured: _Configured | None = None
        self._inputs: _Inputs | None = None
        self._worker: NewestFirst[_Job] | None = None
        self._entities: list[tuple[Any, Any]] = []
        self._lock = threading.Lock()

    @transition
    def on_configure(self, _: LifecycleState) -> None:
        """Check parameters and bundle, warm every bucket up."""
        settings = self._settings.read()
        try:
            self._configured = self._configure(settings)
        except BaseException:
            self._settings.release()
            raise

    @transition
    def on_activate(self, _: LifecycleState) -> None:
        """Listen and plan."""
        configured = self._need_configured()
        rivals = self._rivals()
        if rivals:
            raise InputError(
                f"{self.resolve_topic_name(topics.PLANNER_PATH)} is published by {', '.join(rivals)}; "
                "one planner per topic: end the other, or remap or give this one a namespace"
            )
        try:
            self._activate(configured)
        except BaseException:
            self._deactivate()
            raise

    @transition
    def on_deactivate(self, _: LifecycleState) -> None:
        """Stop listening and planning; a plan in progress is the last."""
        self._deactivate()

    @transition
    def on_cleanup(self, _: LifecycleState) -> None:
        """Give back sessions and memory."""
        self._free()

    @transition
    def on_shutdown(self, _: LifecycleState) -> None:
        """End in order from any state."""
        self._free()

    @transition
    def on_error(self, _: LifecycleState) -> None:
        """Back to unconfigured."""
        self._free()

    def _configure(self, settings: dict[str, Any]) -> _Configured:
        if not settings["bundle"]:
            raise InputError("parameter bundle is empty; give the directory of a bundle, bundle:=<directory>")
        if settings["output_type"] == "trajectory" and not _has_trajectory_messages():
            raise InputError(
                "parameter output_type is 'trajectory', but autoware_planning_msgs is not installed; "
                "install it and source its workspace, or set output_type to path"
            )
        begin = time.monotonic()
        self.get_logger().info(f"opens and warms up {settings['bundle']} on {settings['backend']}")
        bundle = load_bundle(Path(settings["bundle"]))
        cameras = bundle.recipe.layout.cameras
        if settings["anchor_camera"] not in cameras:
            raise InputError(
                f"parameter anchor_camera is {settings['anchor_camera']!r}; "
                f"the bundle has {', '.join(cameras)}"
            )
        backend = backends.open_backend(settings["backend"], bundle, threads=settings["threads"] or None)
        try:
            budget = None if settings["budget"] == 1.0 else settings["budget"]
            planner = Planner(bundle, backend, budget, settings["policy"])
            latencies = measure_latencies(planner, _blank_frame(planner), settings["warmup_runs"])
        except BaseException:
            backend.close()
            raise
        times = ", ".join(f"{name} {ms:.1f}" for name, ms in latencies.undisturbed_ms.items())
        self.get_logger().info(
            f"bundle {bundle.manifest.bundle_id[:12]} on {backend.device}, ready after "
            f"{time.monotonic() - begin:.1f} s; milliseconds from choice to waypoints: {times}"
        )
        return _Configured(settings, backend, planner, latencies)

    def _activate(self, configured: _Configured) -> None:
        settings, planner = configured.settings, configured.planner
        anchor = settings["anchor_camera"]
        cameras = planner.recipe.layout.cameras
        self._inputs = _Inputs(
            Synchroniser(cameras, anchor, settings["sync_tolerance_ms"], settings["sync_wait_ms"]),
            EgoMotion(settings["odometry_max_age_ms"], settings["acceleration_source"]),
            CameraImages(
                planner.preprocessing,
                anchor,
                settings["missing_camera"],
                settings["last_frame_max_age_ms"],
                settings["black_level"],
            ),
            BucketLatencies(planner.recipe, configured.latencies.undisturbed_ms),
        )
        self._counts: Counter[str] = Counter()
        self._spent_ms = 0.0
        self._activated_s = time.monotonic()
        self._last_plan_s: float | None = None
        self._last_frame: tuple[Level, str] = ("ok", "planning")
        self._odometry_faults: Counter[str] = Counter()
        self._rival_names: tuple[str, ...] = ()
        initial = settings["initial_command"]
        self._command = None if initial == "none" else Command(initial)
        self._worker = NewestFirst(self._plan)
        self._create_publishers(settings["output_type"] != "path" and _has_trajectory_messages())
        raw = settings["image_transport"] == "raw"
        kind, sensors = (Image if raw else CompressedImage), topics.sensor_qos(settings["reliability"])
        self._cameras_in: dict[str, Any] = {}
        for camera in cameras:
            take = partial(self._on_image, camera)
            self._cameras_in[camera] = self._subscribe(kind, topics.camera_topic(camera, raw), take, sensors)
        odometry_qos = topics.sensor_qos(settings["reliability"], depth=20)
        self._odometry_in = self._subscribe(Odometry, topics.ODOMETRY, self._on_odometry, odometry_qos)
        self._acceleration_in = None
        if settings["acceleration_source"] == "topic":
            self._acceleration_in = self._subscribe(
                AccelWithCovarianceStamped, topics.ACCELERATION, self._on_acceleration, odometry_qos
            )
        self._command_in = self._subscribe(String, topics.COMMAND, self._on_command, topics.latched_qos())
        self._wait = self.create_timer(
            max(settings["sync_wait_ms"], 1.0) / 1e3, self._on_waited, clock=self._steady
        )
        self._wait.cancel()
        diagnostics = self.create_timer(DIAGNOSTICS_PERIOD_S, self._on_diagnostics, clock=self._steady)
        self._entities += [(self.destroy_timer, self._wait), (self.destroy_timer, diagnostics)]

    def _create_publishers(self, with_trajectory: bool) -> None:
        """Plain publishers that exist while the node is active: an idle planner is nobody's rival."""

        def publisher(kind: Any, topic: str, qos: Any) -> Any:
            made = self.create_publisher(kind, topic, qos)
            self._entities.append((self.destroy_publisher, made))
            return made

        record = topics.record_qos()
        self._path_out = publisher(PathMessage, topics.PLANNER_PATH, topics.plan_qos())
        self._markers_out = publisher(MarkerArray, topics.PLANNER_MARKERS, record)
        self._text_out = publisher(String, topics.PLANNER_TEXT, record)
        self._status_out = publisher(DiagnosticArray, topics.PLANNER_STATUS, record)
        self._diagnostics_out = publisher(DiagnosticArray, topics.DIAGNOSTICS, record)
        self._trajectory_out = None
        if with_trajectory:
            from autoware_planning_msgs.msg import Trajectory

            self._trajectory_out = publisher(Trajectory, topics.PLANNER_TRAJECTORY, topics.plan_qos())

    def _subscribe(self, kind: Any, topic: str, callback: Any, qos: Any) -> Any:
        made = self.create_subscription(kind, topic, callback, qos)
        self._entities.append((self.destroy_subscription, made))
        return made

    def _deactivate(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        while self._entities:
            destroy, entity = self._entities.pop()
            destroy(entity)
        self._inputs = None

    def _free(self) -> None:
        self._deactivate()
        if self._configured is not None:
            self._configured.backend.close()
            self._configured = None
            gc.collect()  # steps and sessions hold each other, for a large model gigabytes
        self._settings.release()

    def _need_configured(self) -> _Configured:
        if self._configured is None:
            raise InputError("the node is not configured")
        return self._configured

    def _on_image(self, camera: str, message: CompressedImage | Image) -> None:
        inputs, arrived_s = self._inputs, time.monotonic()
        if inputs is None:
            return
        named = message.header.frame_id
        if named != camera and named in (inputs.synchroniser.anchor, *inputs.synchroniser.others):
            self._count(f"{camera} miswired")
            self.get_logger().error(
                f"{camera}: an image has frame_id {named}; check the remaps of the camera topics",
                throttle_duration_sec=5.0,
            )
            return
        stamp_ns = messages.stamp_ns_of(message.header.stamp)
        verdict = inputs.synchroniser.add(camera, stamp_ns, messages.image_data(message), arrived_s)
        self._count("images")
        if verdict != "kept":
            self._count(f"{camera} {verdict}")
        if camera == inputs.synchroniser.anchor and verdict in ("kept", "clock went back"):
            self._count("frames")
            # A simulated clock moves in steps: there, only the time since the arrival counts.
            clock = self.get_clock()
            simulated = isinstance(clock, ROSClock) and clock.ros_time_is_active
            age_ns = 0 if simulated else self._now_ns() - stamp_ns
            if inputs.synchroniser.pending_stamp_ns == stamp_ns:
                self._spent_ms = max(age_ns, 0) / 1e6
                self._wait.reset()
        self._take()

    def _on_odometry(self, message: Odometry) -> None:
        if self._inputs is None:
            return
        wanted, given = self._need_configured().settings["ego_frame"], message.child_frame_id
        if given not in ("", wanted):
            self._count("odometry of another frame")
            self.get_logger().error(
                f"odometry has child_frame_id {given!r}, ego_frame is {wanted!r}: its twist is not the "
                "rear axle's; set ego_frame or convert it",
                throttle_duration_sec=5.0,
            )
            return
        self._inputs.ego.add(messages.odometry_sample(message))
        self._take()

    def _on_acceleration(self, message: AccelWithCovarianceStamped) -> None:
        if self._inputs is not None:
            stamp_ns = messages.stamp_ns_of(message.header.stamp)
            self._inputs.ego.add_acceleration(stamp_ns, message.accel.accel.linear.x)
            self._take()

    def _on_command(self, message: String) -> None:
        if message.data in COMMANDS:
            self._command = Command(message.data)
            return
        self._count("unknown commands")
        self.get_logger().error(f"command {message.data!r} is none of {', '.join(COMMANDS)}; it is ignored")

    def _on_waited(self) -> None:
        self._wait.cancel()
        self._take()

    def _take(self) -> None:
        """Hand the newest frame to the planning thread as soon as it is whole, or has waited."""
        inputs, worker = self._inputs, self._worker
        if inputs is None or worker is None or inputs.synchroniser.pending_stamp_ns is None:
            return
        known = inputs.ego.reached(inputs.synchroniser.pending_stamp_ns)
        frame = inputs.synchroniser.take(time.monotonic(), known)
        if frame is None:
            return
        self._wait.cancel()
        ego: EgoState | VlaError
        pose = None
        try:
            ego, pose = inputs.ego.at(frame.stamp_ns), inputs.ego.pose_at(frame.stamp_ns)
        except VlaError as error:
            ego = error
        worker.offer(_Job(frame, self._spent_ms, inputs.ego.travelled_m, ego, pose, self._command))

    def _plan(self, job: _Job) -> None:
        """In the planning thread: from a frame to what is published about it."""
        configured, inputs = self._configured, self._inputs
        if configured is None or inputs is None:
            return
        waited_ms = 1e3 * (time.monotonic() - job.frame.arrived_s)
        try:
            self._check_age(job.frame.stamp_ns)
            if isinstance(job.ego, VlaError):
                raise job.ego
            if job.command is None:
                raise InputError(
                    "no command has arrived; publish left, straight or right, or set initial_command"
                )
            begin_s = time.monotonic()
            images = inputs.images.of(job.frame, job.travelled_m)
            images_ms = 1e3 * (time.monotonic() - begin_s)
            frame = Frame(images.images, job.ego, job.command, stamp_s=job.frame.stamp_ns / 1e9)
            plan = self._plan_in_time(configured, inputs.latencies, frame, job)
            before_plan = {"transport_ms": job.spent_ms, "waited_ms": waited_ms, "images_ms": images_ms}
            self._publish(job, images, plan, before_plan, inputs.latencies.slowdown)
        except VlaError as error:
            self._refuse(job, str(error))
        except Exception as error:
            self.get_logger().error(f"planning failed: {error!r}", throttle_duration_sec=1.0)
            self._refuse(job, f"planning failed: {error!r}")

    def _plan_in_time(
        self, configured: _Configured, latencies: BucketLatencies, frame: Frame, job: _Job
    ) -> Plan:
        settings = configured.settings
        limit = None
        if settings["deadline_aware"]:
            usable_ms = settings["deadline_ms"] - settings["deadline_margin_ms"]
            limit = latencies.limit(lambda: usable_ms - self._since_stamp_ms(job))
        plan = configured.planner.plan(frame, limit)
        latencies.observe(plan)
        return plan

    def _publish(
        self, job: _Job, images: FrameImages, plan: Plan, before_plan: dict[str, float], slowdown: float
    ) -> None:
        configured = self._need_configured()
        settings, stamp_ns = configured.settings, job.frame.stamp_ns
        if self._rival_names:
            raise InputError(
                f"{self.resolve_topic_name(topics.PLANNER_PATH)} is published by "
                f"{', '.join(self._rival_names)}, too; nothing is published until one planner is left"
            )
        path = messages.path_message(plan, stamp_ns, settings["ego_frame"])
        self._path_out.publish(path)
        took_ms = self._since_stamp_ms(job)
        age_ms = (self._now_ns() - stamp_ns) / 1e6
        self._publish_trajectory(job, plan, settings)
        late = took_ms > settings["deadline_ms"]
        overridden = any(flag.startswith(OVERRIDDEN) for flag in plan.flags)
        self._count("plans")
        self._count("deadline missed", late)
        self._count("buckets overridden", overridden)
        for camera in images.filled:
            self._count(f"{camera} filled")
        notes = [*plan.flags, *images.notes]
        notes += [f"filled {camera} with {how}" for camera, how in images.filled.items()]
        for camera, behind_ms in job.frame.behind_ms.items():
            self._count(f"{camera} behind")
            notes.append(f"{camera} is {behind_ms:.0f} ms behind, its image of this frame came too late")
        if late:
            notes.append(f"deadline missed: {took_ms:.1f} of {settings['deadline_ms']:g} ms")
        self._text_out.publish(String(data=plan.text))
        self._markers_out.publish(messages.marker_message(path, f"{plan.bucket} {took_ms:.0f} ms"))
        values = {
            "command": "" if job.command is None else job.command.value,
            "bucket": plan.bucket,
            "complexity_bits": "" if plan.complexity is None else plan.complexity,
            "work_fraction": plan.work_fraction,
            "kv_mib": plan.kv_mib,
            "visual_tokens_into_layers": _listed(plan.visual_tokens_into_layers),
            "visual_tokens_into_stages": _listed([len(kept) for kept in plan.kept_visual]),
            "flags": "; ".join(plan.flags),
            "filled": "; ".join(images.filled),
            "behind_ms": "; ".join(f"{camera} {ms:.3f}" for camera, ms in job.frame.behind_ms.items()),
            "skew_ms": job.frame.skew_ms,
            "stamp_to_publish_ms": took_ms,
            "age_at_publish_ms": age_ms,
            **before_plan,
            "remaining_ms": settings["deadline_ms"] - took_ms,
            "slowdown": slowdown,
            **{f"{step}_ms": ms for step, ms in plan.timings_ms.items()},
        }
        self._publish_status(stamp_ns, "warn" if notes else "ok", "; ".join(notes) or "planned", values)
        self._last_plan_s = time.monotonic()

    def _publish_trajectory(self, job: _Job, plan: Plan, settings: dict[str, Any]) -> None:
        if self._trajectory_out is None:
            return
        assert isinstance(job.ego, EgoState)
        placed = job.pose if settings["trajectory_frame"] != topics.EGO_FRAME else None
        frame_id = settings["ego_frame"] if placed is None else settings["trajectory_frame"]
        stamp_ns, speed_mps = job.frame.stamp_ns, job.ego.speed_mps
        self._trajectory_out.publish(
            messages.autoware_trajectory_message(plan, stamp_ns, speed_mps, frame_id, placed)
        )

    def _refuse(self, job: _Job, reason: str) -> None:
        self._count("refused")
        self.get_logger().warning(f"no plan: {reason}", throttle_duration_sec=1.0)
        self._publish_status(job.frame.stamp_ns, "error", f"no plan: {reason}", {})

    def _publish_status(self, stamp_ns: int, level: Level, message: str, values: dict[str, Any]) -> None:
        self._last_frame = (level, message)
        counted = {**values, **self._counted()}
        self._status_out.publish(
            messages.diagnostics_message(stamp_ns, f"{self.get_name()}: frame", level, message, counted)
        )

    def _on_diagnostics(self) -> None:
        self._rival_names = self._rivals()
        parts = (self._planning_status, self._camera_status, self._odometry_status, self._command_status)
        array = DiagnosticArray(status=[part() for part in parts])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics_out.publish(array)

    def _planning_status(self) -> DiagnosticStatus:
        level, message = self._last_frame
        settings = self._need_configured().settings
        last_s = self._activated_s if self._last_plan_s is None else self._last_plan_s
        silent_s = time.monotonic() - last_s
        if self._rival_names:
            level, message = "error", f"plans are published by {', '.join(self._rival_names)}, too"
        elif level != "error" and silent_s * 1e3 > settings["camera_timeout_ms"]:
            level, message = "error", f"no plan for {silent_s:.1f} s"
        return self._status("planning", level, message, {"bundle": self._bundle_id(), **self._counted()})

    def _camera_status(self) -> DiagnosticStatus:
        level: Level = "ok"
        faults = []
        inputs, settings = self._inputs, self._need_configured().settings
        assert inputs is not None
        now_s, anchor = time.monotonic(), inputs.synchroniser.anchor
        for camera in (anchor, *inputs.synchroniser.others):
            silent_s = inputs.synchroniser.silent_s(camera, now_s)
            if silent_s is not None and silent_s * 1e3 <= settings["camera_timeout_ms"]:
                continue
            since = "never arrived" if silent_s is None else f"silent for {silent_s:.1f} s"
            faults.append(f"{camera} {since} ({topics.publishers_of(self, self._cameras_in[camera])})")
            worst = camera == anchor or settings["missing_camera"] == "refuse"
            level = "error" if worst or level == "error" else "warn"
        return self._status("cameras", level, "; ".join(faults) or "all arrive", {})

    def _odometry_status(self) -> DiagnosticStatus:
        inputs = self._inputs
        assert inputs is not None
        level: Level = "ok"
        findings = []
        newest, counts = inputs.ego.newest, inputs.ego.counts.copy()
        publishers = topics.publishers_of(self, self._odometry_in)
        if newest is None:
            level, findings = "error", [f"never arrived ({publishers})"]
        else:
            age_ms = (self._now_ns() - newest.stamp_ns) / 1e6
            if abs(age_ms) > max(self._need_configured().settings["odometry_max_age_ms"], ODOMETRY_SILENT_MS):
                level, findings = "error", [f"the last is {age_ms:.0f} ms old ({publishers})"]
        if self._acceleration_in is not None and not inputs.ego.accelerations:
            level = "error"
            findings.append(f"no acceleration ({topics.publishers_of(self, self._acceleration_in)})")
        faults = counts - self._odometry_faults
        self._odometry_faults = counts
        if faults:
            level = "error" if level == "error" else "warn"
            findings.append("new faults: " + ", ".join(f"{name} {n}" for name, n in sorted(faults.items())))
        values = {f"count_{fault.replace(' ', '_')}": number for fault, number in sorted(counts.items())}
        return self._status("odometry", level, "; ".join(findings) or "arrives", values)

    def _command_status(self) -> DiagnosticStatus:
        if self._command is None:
            publishers = topics.publishers_of(self, self._command_in)
            return self._status("command", "error", f"never arrived ({publishers})", {})
        return self._status("command", "ok", self._command.value, {})

    def _status(self, part: str, level: Level, message: str, values: dict[str, Any]) -> DiagnosticStatus:
        return messages.diagnostic_status(f"{self.get_name()}: {part}", level, message, values)

    def _check_age(self, stamp_ns: int) -> None:
        age_ms = (self._now_ns() - stamp_ns) / 1e6
        limit_ms = self._need_configured().settings["max_frame_age_ms"]
        if abs(age_ms) > limit_ms:
            self._count("too old" if age_ms > 0 else "from the future")
            raise InputError(
                f"the frame is {abs(age_ms):.0f} ms {'old' if age_ms > 0 else 'ahead of the clock'}, "
                f"max_frame_age_ms is {limit_ms:g}; check the stamps, use_sim_time and /clock"
            )

    def _since_stamp_ms(self, job: _Job) -> float:
        return job.spent_ms + 1e3 * (time.monotonic() - job.frame.arrived_s)

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def _rivals(self) -> tuple[str, ...]:
        """Other nodes that publish plans on this topic."""
        own = (self.get_namespace(), self.get_name())
        found = self.get_publishers_info_by_topic(self.resolve_topic_name(topics.PLANNER_PATH))
        names = [(info.node_namespace, info.node_name) for info in found]
        if own in names and self._entities:
            names.remove(own)
        return tuple(f"{namespace.rstrip('/')}/{name}" for namespace, name in names)

    def _bundle_id(self) -> str:
        return self._need_configured().planner.bundle.manifest.bundle_id[:12]

    def _count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number

    def _counted(self) -> dict[str, int]:
        """Counters since the node was activated, as keys of a status message."""
        assert self._inputs is not None and self._worker is not None
        with self._lock:
            counts = dict(self._counts)
        counts["superseded"] = self._inputs.synchroniser.superseded + self._worker.superseded
        return {f"count_{name.replace(' ', '_')}": number for name, number in sorted(counts.items())}


def _blank_frame(planner: Planner) -> Frame:
    """Grey images, to warm up with."""
    size = (planner.preprocessing.height, planner.preprocessing.width, 3)
    grey = np.full(size, 128, dtype=np.uint8)
    return Frame(dict.fromkeys(planner.preprocessing.cameras, grey), EgoState(5.0), Command.STRAIGHT)


def _has_trajectory_messages() -> bool:
    return find_spec("autoware_planning_msgs") is not None


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def main(args: Sequence[str] | None = None) -> int:
    """Run the node; see `ros_nodes.lifecycle.run`."""
    return run(VlaPlanner, args)


if __name__ == "__main__":
    sys.exit(main())
