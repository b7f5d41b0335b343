"""What colcon and pip install, and where."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = ("vla_planner", "trajectory_guard", "nuscenes_player", "open_loop_monitor", "recorder")
SHARED = (
    "package.xml",
    "launch/drive.launch.py",
    "launch/replay.launch.py",
    "config/drive.yaml",
    "config/drive.rviz",
    "config/foxglove.json",
    "config/fastdds_shared_memory.xml",
)
FOLDERS = (
    *("vla_autoprune", "engines", "eval_nuscenes", "ros_nodes"),
    *("launch", "config", "scripts", "resource"),
)
COLCON = os.environ.get("VLA_COLCON") or shutil.which("colcon")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The repository without what git ignores."""
    target = tmp_path / "src" / "vla_autoprune"
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "package.xml", "README.md"):
        shutil.copy(REPOSITORY / name, target / name)
    return target


@pytest.mark.slow
@pytest.mark.skipif(COLCON is None, reason="needs colcon (colcon-core, colcon-ros); VLA_COLCON names it")
@pytest.mark.parametrize("options", [(), ("--symlink-install",)], ids=["copied", "linked"])
def test_colcon_installs_programs_and_shared_files(source, options):
    workspace = source.parents[1]
    built = subprocess.run(
        [COLCON, "build", *options], cwd=workspace, capture_output=True, text=True, timeout=200
    )
    assert built.returncode == 0, built.stdout + built.stderr
    prefix = workspace / "install" / "vla_autoprune"
    assert (prefix / "share/ament_index/resource_index/packages/vla_autoprune").exists()
    for name in SHARED:
        assert (prefix / "share/vla_autoprune" / name).is_file(), name
    for name in (*PROGRAMS, "vla-autoprune"):
        assert os.access(prefix / "lib/vla_autoprune" / name, os.X_OK), name
    paths = map(str, (workspace / "build/vla_autoprune", *prefix.glob("lib/python*/site-packages")))
    subprocess.run(
        [sys.executable, "-c", "import ros_nodes.topics, engines, eval_nuscenes, vla_autoprune.cli"],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": ":".join(paths)},
        check=True,
        timeout=60,
    )


@pytest.mark.slow
def test_a_wheel_holds_programs_and_shared_files(source):
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", "."],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = {
            info.filename.partition(".data/data/")[2]: stat.S_IMODE(info.external_attr >> 16)
            for info in archive.infolist()
        }
    assert "share/ament_index/resource_index/packages/vla_autoprune" in data
    assert {f"share/vla_autoprune/{name}" for name in SHARED} <= set(data)
    for name in PROGRAMS:
        assert data[f"lib/vla_autoprune/{name}"] & 0o111, name


def test_every_program_runs_a_module_that_is_there():
    for name in PROGRAMS:
        (module,) = re.findall(r'start\("([\w.]+)"\)', (REPOSITORY / "scripts" / name).read_text())
        assert "\ndef main(" in (REPOSITORY / f"{module.replace('.', '/')}.py").read_text(), name
