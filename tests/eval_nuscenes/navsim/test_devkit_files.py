"""Metric caches and submissions that the devkits' own classes wrote."""

from __future__ import annotations

import lzma
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.navsim.devkit_files import find_metric_caches, read_metric_cache, read_submission
from eval_nuscenes.navsim.scene import PlannedPath
from eval_nuscenes.navsim.scoring import score_plan
from vla_autoprune.errors import InputError

SCENES = ("appearing", "human_runs_red", "human_wrong_way_syn")


def token_of(scene: str, devkit: str) -> str:
    digits = 17 if devkit == "v2" and scene.endswith("_syn") else 16
    return scene.encode().hex()[:digits]


@pytest.fixture
def caches(repository: Path) -> Path:
    return repository / "tests" / "data" / "navsim"


@pytest.mark.parametrize("devkit", ["v1", "v2"])
@pytest.mark.parametrize("name", SCENES)
def test_a_cache_gives_the_scene_it_was_made_from(golden: Any, caches: Path, devkit: Any, name: str) -> None:
    found = find_metric_caches(caches / devkit)
    assert len(found) == 3
    read, expected = read_metric_cache(found[token_of(name, devkit)]), golden.scene(name, devkit)
    assert (read.devkit, read.synthetic) == (devkit, expected.synthetic)
    assert read.log == "2021.06.01.12.00.00_veh-1_00000_00100"
    assert read.route_lane_ids == expected.route_lane_ids
    assert read.red_lights == expected.red_lights
    assert set(read.tracks.tokens) == set(expected.tracks.tokens)
    order = [read.tracks.tokens.index(token) for token in expected.tracks.tokens]
    assert tuple(read.tracks.types[index] for index in order) == expected.tracks.types
    np.testing.assert_allclose(read.tracks.boxes[order], expected.tracks.boxes, atol=1e-6)
    np.testing.assert_allclose(read.tracks.first_speed_mps[order], expected.tracks.first_speed_mps)
    np.testing.assert_allclose(read.ego.state(), expected.ego.state(), atol=1e-9)
    np.testing.assert_allclose(read.reference, expected.reference, atol=1e-6)
    assert [(area.id, area.type) for area in read.areas] == [(area.id, area.type) for area in expected.areas]
    for case in golden.cases:
        if case["scene"] == name:
            plan = golden.path(case)
            result, wanted = score_plan(read, plan), score_plan(expected, plan)
            assert result.sub_scores == pytest.approx(wanted.sub_scores, abs=1e-12)
            assert result.score == pytest.approx(wanted.score, abs=1e-12)


@pytest.mark.parametrize("devkit", ["v1", "v2"])
def test_a_submission(golden: Any, caches: Path, devkit: str) -> None:
    plans = read_submission(caches / devkit / "submission.pkl")
    assert set(plans) == {token_of(name, devkit) for name in SCENES}
    expected = golden.path(golden.case("cv"))
    for plan in plans.values():
        assert plan.interval_s == expected.interval_s
        np.testing.assert_array_equal(plan.poses_in_ego, expected.poses_in_ego)


class Devkit:
    """Classes under the devkit's names, to pickle what a devkit of another version might."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def instance(self, module: str, name: str, **fields: Any) -> Any:
        made = type(name, (), {"__module__": module})
        holder = types.ModuleType(module)
        setattr(holder, name, made)
        parts = module.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            self.monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        self.monkeypatch.setitem(sys.modules, module, holder)
        instance = made()
        instance.__dict__.update(fields)
        return instance


@pytest.fixture
def devkit(monkeypatch: pytest.MonkeyPatch) -> Devkit:
    return Devkit(monkeypatch)


def cache_file(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "a_log" / "unknown" / "0123456789abcdef" / "metric_cache.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(lzma.compress(pickle.dumps(content), preset=0))
    return path


CACHE = ("navsim.planning.metric_caching.metric_cache", "MetricCache")


def test_a_cache_of_another_version_is_refused(tmp_path: Path, devkit: Devkit) -> None:
    old = devkit.instance(*CACHE, trajectory=1, ego_state=2, observation=3, centerline=4, log_name="a")
    with pytest.raises(
        InputError, match=r"lacks route_lane_ids, drivable_area_map, scene_type.*neither devkit 1\.1"
    ):
        read_metric_cache(cache_file(tmp_path, old))


def test_a_cache_with_other_contents_is_refused(tmp_path: Path, devkit: Devkit) -> None:
    names = ["trajectory", "ego_state", "observation", "centerline", "route_lane_ids", "drivable_area_map"]
    strange = devkit.instance(*CACHE, **dict.fromkeys(names, 3))
    with pytest.raises(InputError, match=r"no metric cache of devkit 1\.1 or 2\.2"):
        read_metric_cache(cache_file(tmp_path, strange))
    with pytest.raises(InputError, match="holds a list instead of a MetricCache"):
        read_metric_cache(cache_file(tmp_path / "other", [1, 2]))


def test_a_truncated_cache_is_refused(tmp_path: Path, caches: Path) -> None:
    whole = next(caches.rglob("metric_cache.pkl"))
    cut = tmp_path / "metric_cache.pkl"
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(InputError, match="cut off"):
        read_metric_cache(cut)


def test_folders_without_caches_or_with_doubles_are_refused(tmp_path: Path, caches: Path) -> None:
    with pytest.raises(InputError, match="run_metric_caching"):
        find_metric_caches(tmp_path)
    with pytest.raises(InputError, match="not a directory"):
        find_metric_caches(tmp_path / "absent")
    with pytest.raises(InputError, match="has two metric caches"):
        find_metric_caches(caches)


def test_what_is_no_submission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "submission.pkl"
    path.write_bytes(pickle.dumps({"team_name": "a"}))
    with pytest.raises(InputError, match=r"none of predictions .* it has team_name"):
        read_submission(path)
    path.write_bytes(pickle.dumps({"predictions": [{"t": [1, 2]}]}))
    with pytest.raises(InputError, match="plan of t is a list, no Trajectory"):
        read_submission(path)
    for seeds in (3, [3], [[1]]):
        path.write_bytes(pickle.dumps({1: 2, "predictions": seeds}))
        with pytest.raises(InputError, match="predictions is no list of objects from token to Trajectory"):
            read_submission(path)


def test_several_seeds_are_refused(tmp_path: Path, devkit: Devkit) -> None:
    plan = devkit.instance("navsim.common.dataclasses", "Trajectory", poses=np.zeros((8, 3)))
    path = tmp_path / "submission.pkl"
    path.write_bytes(pickle.dumps({"predictions": [{"t": plan}, {"t": plan, "u": plan}]}))
    with pytest.raises(InputError, match=r"1 tokens more than once \(several seeds\?\): t"):
        read_submission(path)
    path.write_bytes(pickle.dumps({"predictions": [{"t": plan}]}))
    assert isinstance(read_submission(path)["t"], PlannedPath)
