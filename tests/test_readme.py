"""What the README shows runs as pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from vla_autoprune.frame import CAMERAS


def test_the_python_sample_plans(repository: Path, stored_bundle, tmp_path: Path) -> None:
    (sample,) = re.findall(r"^```python\n(.*?)^```$", (repository / "README.md").read_text(), re.M | re.S)
    frame = tmp_path / "out" / "demo" / "frame"
    frame.mkdir(parents=True)
    (frame.parent / "bundle").symlink_to(stored_bundle.path)
    generator = np.random.default_rng(0)
    for camera in CAMERAS:
        cv2.imwrite(str(frame / f"{camera}.jpg"), generator.integers(0, 255, (90, 160, 3), dtype=np.uint8))
    shown = sample + "\nprint(plan.waypoints_in_ego.shape, plan.bucket, plan.flags)\n"
    run = subprocess.run(
        [sys.executable, "-c", shown],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"\(6, 3\) b40_s\d \(\)\n", run.stdout)
