"""The machine a figure was measured on, and the memory of this process."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from vla_autoprune import __version__

PACKAGES = ("tensorrt", "cuda-python", "cuda-bindings", "onnxruntime", "torch", "numpy")
_BOARD_FILES = ("/proc/device-tree/model", "/etc/nv_tegra_release")


def machine_record() -> dict[str, str]:
    """Platform, processor, versions and, on a Jetson, board and power mode, for reports."""
    found = {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "load": _load(),
        "python": platform.python_version(),
        "vla_autoprune": __version__,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    for file in map(Path, _BOARD_FILES):
        if file.is_file():
            found[file.name] = file.read_bytes().decode(errors="replace").strip("\0\n ")
    mode = _power_mode()
    return {**found, "power_mode": mode} if mode else found


def cpu_name() -> str:
    """The processor's name as its maker writes it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def peak_host_mib() -> float | None:
    """Largest resident memory of this process so far; None where /proc does not say.

    Not `ru_maxrss`: across fork and exec it keeps the parent's peak.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak[1]) / 1024 if peak else None


def _load() -> str:
    """Processes that wanted a core in the last minute: above the number of cores, figures are disturbed."""
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except OSError:
        return "unknown"


def _power_mode() -> str:
    """What `nvpmodel -q` says on a Jetson; empty elsewhere."""
    program = shutil.which("nvpmodel")
    if program is None:
        return ""
    try:
        said = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    mode = re.search(r"NV Power Mode:\s*(\S+)", said.stdout)
    return mode[1] if mode else f"unknown ({(said.stderr or said.stdout).strip()[:80]})"
