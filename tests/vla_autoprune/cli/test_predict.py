from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("matplotlib")

from vla_autoprune.frame import CAMERAS


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "keyframe"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for camera in CAMERAS:
        cv2.imwrite(str(folder / f"{camera}.png"), generator.integers(0, 255, (90, 160, 3), dtype=np.uint8))
    return folder


def predict(repository, bundle, folder, out, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "vla_autoprune.cli",
        "predict",
        str(bundle.path),
        "--images",
        str(folder),
    ]
    command += ["--speed", "6", "--command", "straight", "--out", str(out), "--threads", "1", *options]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_waypoints_and_a_picture_are_written(repository, stored_bundle, images, tmp_path):
    run = predict(repository, stored_bundle, images, tmp_path / "out", "--budget", "0.4")
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "out" / "waypoints.json").read_text())
    assert [waypoint["time_s"] for waypoint in document["waypoints"]] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert document["bundle_id"] == stored_bundle.manifest.bundle_id
    left = document["visual_tokens_left"]
    assert list(left) == list(CAMERAS)
    assert sum(left.values()) == document["visual_tokens_into_layers"][-1] < 16 * len(CAMERAS)
    assert cv2.imread(str(tmp_path / "out" / "picture.png")) is not None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["picture.png", "waypoints.json"]


def test_values_beyond_the_words_are_noted_and_recorded(repository, stored_bundle, images, tmp_path):
    run = predict(repository, stored_bundle, images, tmp_path / "out", "--speed", "500", "--yaw-rate=-9")
    assert run.returncode == 0, run.stderr
    assert "note: clipped: speed_mps is 500, outside 0 to 24; 24 was used" in run.stdout
    document = json.loads((tmp_path / "out" / "waypoints.json").read_text())
    assert document["ego_asked"] == {"speed_mps": 500.0, "acceleration_mps2": 0.0, "yaw_rate_rps": -9.0}
    assert document["ego_used"] == {"speed_mps": 24.0, "acceleration_mps2": 0.0, "yaw_rate_rps": -0.6}
    assert len(document["flags"]) == 2


def test_a_bundle_that_is_not_there_is_named(repository, stored_bundle, images, tmp_path):
    absent = dataclasses.replace(stored_bundle, path=tmp_path / "absent")
    run = predict(repository, absent, images, tmp_path / "out")
    assert run.returncode == 2
    assert f"{absent.path} does not exist; a bundle is a directory that" in run.stderr


def test_real_keyframes_are_found_by_their_nuscenes_names(
    repository, stored_bundle, shared_data_dir, tmp_path
):
    folder = shared_data_dir / "nuscenes_mini_val" / "keyframe"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    run = predict(repository, stored_bundle, folder, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out" / "waypoints.json").read_text())["bucket"] == "full"


@pytest.mark.parametrize(
    "damage,options,message",
    [
        (
            lambda folder: (folder / "CAM_BACK.png").unlink(),
            [],
            "no image of CAM_BACK; the model needs exactly",
        ),
        (
            lambda folder: (folder / "CAM_BACK.jpg").write_bytes(b"x"),
            [],
            "2 images: CAM_BACK.jpg, CAM_BACK.png",
        ),
        (
            lambda folder: (folder / "CAM_FRONT.png").write_bytes(b"x"),
            [],
            "CAM_FRONT.png (1 bytes) cannot be decoded",
        ),
        (lambda folder: None, ["--budget", "0.33"], "no budget 0.33; it offers 0.6, 0.4"),
        (lambda folder: None, ["--speed", "nan"], "--speed nan: expected a finite number; see"),
        (lambda folder: None, ["--policy", "random"], "--policy random chooses tokens to keep, but without"),
    ],
)
def test_bad_input_is_one_clear_line(repository, stored_bundle, images, tmp_path, damage, options, message):
    damage(images)
    run = predict(repository, stored_bundle, images, tmp_path / "out", *options)
    assert run.returncode == 2
    assert message in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written_are_one_line_too(repository, stored_bundle, images, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = predict(repository, stored_bundle, images, tmp_path / "file")
    assert run.returncode == 2
    assert f"{tmp_path / 'file'} is a file; give a directory" in run.stderr and run.stderr.count("\n") == 1


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    repository, stored_bundle, images, tmp_path, monkeypatch
):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('absent', name='matplotlib')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{repository}")
    run = predict(repository, stored_bundle, images, tmp_path / "out")
    assert run.returncode == 2
    assert "matplotlib is not installed; this needs: pip install 'vla_autoprune[eval]'" in run.stderr
