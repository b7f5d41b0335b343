"""Plain scene files and files of plans, good and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.navsim import scene_files
from eval_nuscenes.navsim.scene_files import (
    check_coverage,
    find_scenes,
    read_plans,
    read_scene,
    read_stages,
    write_scene,
)
from eval_nuscenes.navsim.scoring import score_plan
from vla_autoprune.errors import InputError

STRAIGHT = [[5.0 * step, 0.0, 0.0] for step in range(1, 9)]


@pytest.mark.parametrize("devkit", ["v1", "v2"])
@pytest.mark.parametrize("name", ["appearing", "human_runs_red", "empty10", "human_wrong_way_syn"])
def test_a_scene_comes_back_and_scores_alike(golden: Any, tmp_path: Path, devkit: Any, name: str) -> None:
    scene = golden.scene(name, devkit)
    path = write_scene(tmp_path, scene)
    assert find_scenes(tmp_path) == {name: path}
    first = path.read_bytes()
    assert write_scene(tmp_path, read_scene(path)).read_bytes() == first
    case = next(case for case in golden.cases if case["scene"] == name)
    before, after = (score_plan(one, golden.path(case)) for one in (scene, read_scene(path)))
    assert before.sub_scores == after.sub_scores
    assert before.score == after.score


def edited(path: Path, **changes: Any) -> Path:
    record = json.loads(gzip.decompress(path.read_bytes()))
    record.update(changes)
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version: Input should be 1"),
        ({"devkit": "v3"}, r"devkit: Input should be 'v1' or 'v2'"),
        ({"token": "another"}, r"holds scene another; name it another\.scene\.json\.gz"),
        ({"centreline": [[0, 0], [float("nan"), 0]]}, r"centreline\.1\.0: .*finite"),
        ({"extra": 1}, r"extra: Extra inputs are not permitted"),
        ({"reference": [[5, 0, 0, 0], [5, 1, 0, 0]]}, r"stamps of the reference must rise"),
        (
            {"tracks": [{"token": "a", "type": "vehicle", "first_speed_mps": 0, "boxes": [None] * 7}]},
            r"tracks need at least 41 boxes of 0\.1 s each; too short: a",
        ),
        ({"red_lights": [["7"]]}, r"red lights without a polygon: 7"),
    ],
)
def test_a_faulty_scene_file_is_refused(
    golden: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = edited(write_scene(tmp_path, golden.scene("cones", "v2")), **changes)
    with pytest.raises(InputError, match=message):
        read_scene(path)


def test_a_truncated_scene_file_is_refused(golden: Any, tmp_path: Path) -> None:
    path = write_scene(tmp_path, golden.scene("cones", "v2"))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="truncated or no gzip"):
        read_scene(path)


def test_a_scene_with_nan_is_not_written(golden: Any, tmp_path: Path) -> None:
    scene = golden.scene("cones", "v2")
    scene.centreline[3] = np.nan
    with pytest.raises(InputError, match=r"scene cones: centreline\.3"):
        write_scene(tmp_path, scene)
    assert not list(tmp_path.iterdir())


def test_folders_that_mix_or_double_are_refused(golden: Any, tmp_path: Path, repository: Path) -> None:
    scene = golden.scene("cones", "v2")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_scene(tmp_path / folder, scene)
    with pytest.raises(InputError, match="token cones has two scene files"):
        find_scenes(tmp_path)
    (tmp_path / "a" / scene_files.CACHE_NAME).write_bytes(b"")
    with pytest.raises(InputError, match="metric caches and scene files"):
        find_scenes(tmp_path / "a")


def plans_file(tmp_path: Path, text: str | None = None, **document: Any) -> Path:
    path = tmp_path / "plans.json"
    path.write_text(text if text is not None else json.dumps({"frame": "ego", "interval_s": 0.5, **document}))
    return path


def test_plans_come_back(tmp_path: Path) -> None:
    plans = read_plans(plans_file(tmp_path, plans={"a": STRAIGHT}))
    assert plans["a"].interval_s == 0.5
    np.testing.assert_array_equal(plans["a"].poses_in_ego, STRAIGHT)
    at_10_hz = [[0.1 * step, 0.0, 0.0] for step in range(1, 41)]
    assert (
        len(read_plans(plans_file(tmp_path, interval_s=0.1, plans={"a": at_10_hz}))["a"].poses_in_ego) == 40
    )


def test_faulty_plans_are_listed_together(tmp_path: Path) -> None:
    plans = {
        "good": STRAIGHT,
        "hole": [*STRAIGHT[:3], [float("nan"), 0, 0], *STRAIGHT[4:]],
        "short": STRAIGHT[:6],
        "flat": [row[:2] for row in STRAIGHT],
        "ragged": [*STRAIGHT[:7], [1.0]],
        "empty": [],
    }
    with pytest.raises(InputError) as refused:
        read_plans(plans_file(tmp_path, plans=plans))
    message = str(refused.value)
    assert "5 of 6 plans are refused" in message
    assert "plan of hole: pose 3 is [nan, 0.0, 0.0]" in message
    assert "plan of short covers 3 s (6 poses 0.5 s apart)" in message
    for token in ("flat", "ragged", "empty"):
        assert f"plan of {token} is [" in message
    assert "good" not in message
    assert set(read_plans(plans_file(tmp_path, plans={"short": STRAIGHT[:6]}), any_horizon=True)) == {"short"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"frame": "ego", "interval_s": 0.5, "plans": {"a": [], "a": []}}', r"1 tokens more than once: a"),
        ('{"frame": "map", "interval_s": 0.5, "plans": {}}', r"frame: Input should be 'ego', got 'map'"),
        ('{"frame": "ego", "plans": {}}', r"interval_s: Field required"),
        ('{"frame": "ego", "interval_s": 0, "plans": {}}', r"interval_s: .*greater than 0"),
        ('{"frame": "ego", "interval_s": 0.5, "plans": {}}', r"holds no plan"),
        ('{"frame": "ego", "interval_s": 0.5, "pla', r"not valid JSON"),
        ("[" * 100_000, r"not valid JSON"),
        ("[]", r"expected \{\"frame\": \"ego\""),
    ],
)
def test_what_is_no_file_of_plans_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_plans(plans_file(tmp_path, text))


def test_coverage() -> None:
    check_coverage({"a": 1}, {"a": 1})
    with pytest.raises(
        InputError, match="1 of 2 scenes have no plan: b; 1 of 2 plans belong to no scene: c;"
    ):
        check_coverage({"a": 1, "b": 1}, {"a": 1, "c": 1})


def test_stages(tmp_path: Path) -> None:
    path = tmp_path / "navhard.yaml"
    path.write_text(
        "reactive_all_mapping:\n- - now\n  - before\n  - - - x\n      - y\n    - - u\n      - v\n"
    )
    (group,) = read_stages(path)
    assert (group.now, group.previous, group.second) == ("now", "before", (("x", "y"), ("u", "v")))
    path.write_text('[["now", "before", [["x", "y"]]]]')
    assert read_stages(path)[0].second == (("x", "y"),)
    path.write_text("scene_filter: 3\n")
    with pytest.raises(InputError, match="no list reactive_all_mapping"):
        read_stages(path)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="neither YAML nor JSON"):
        read_stages(path)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="neither YAML nor JSON"):
        read_stages(path)
