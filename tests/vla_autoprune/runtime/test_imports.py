from __future__ import annotations

import subprocess
import sys

import pytest

FORBIDDEN = ("torch", "transformers", "onnx", "onnxscript", "nuscenes", "matplotlib", "shapely", "rclpy")


@pytest.mark.parametrize(
    "modules",
    [
        "vla_autoprune.runtime.planner, engines.onnxruntime, engines.backends, engines.verify",
        "vla_autoprune.runtime.slope_losses",
        "vla_autoprune.profiling.measure, vla_autoprune.profiling.report, vla_autoprune.profiling.estimate",
        "vla_autoprune.cli",
    ],
)
def test_what_runs_in_the_vehicle_imports_no_training_library(repository, modules):
    pytest.importorskip("onnxruntime")
    code = f"import {modules}, sys; print([name for name in {FORBIDDEN} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
