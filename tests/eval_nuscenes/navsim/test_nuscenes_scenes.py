"""PDM's rules on nuScenes-format data: the synthetic world, whose roads and drives are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nuscenes")
pytest.importorskip("shapely")
pytest.importorskip("scipy")

from eval_nuscenes.metrics import TrackedBox
from eval_nuscenes.navsim.nuscenes_scenes import (
    PDMS_NUSCENES,
    OffLaneError,
    scene_of_sample,
    score_on_nuscenes,
)
from eval_nuscenes.navsim.scoring import COMFORT, DAC, EP, NC, TTC
from eval_nuscenes.nuscenes_reader import NuScenesSplit, Sample
from vla_autoprune import cli
from vla_autoprune.errors import InputError

TIMES = np.arange(1, 7) * 0.5


@pytest.fixture(scope="module")
def split(synthetic_root: Path) -> NuScenesSplit:
    return NuScenesSplit(synthetic_root, "v1.0-synth", "val", command_source="future")


@pytest.fixture(scope="module")
def whole(split: NuScenesSplit) -> list[Sample]:
    return [sample for sample in split if sample.future_exists.all()]


def scene(split: NuScenesSplit, sample: Sample) -> Any:
    return scene_of_sample(sample, split.road_map(sample.location))


def ahead(sample: Sample) -> np.ndarray:
    return np.column_stack([sample.ego.speed_mps * TIMES, np.zeros((6, 2))])


def test_the_logged_drive_scores_well(split: NuScenesSplit, whole: list[Sample]) -> None:
    for sample in whole[::3]:
        score = score_on_nuscenes(scene(split, sample), sample.future_in_ego)
        assert score.metric is PDMS_NUSCENES
        assert score.sub_scores[NC] == score.sub_scores[DAC] == 1
        assert score.sub_scores[EP] == pytest.approx(1)
        assert score.score > 0.8
        assert len(score.drive.states) == 31
        assert score.score == pytest.approx(
            (5 * score.sub_scores[EP] + 5 * score.sub_scores[TTC] + 2 * score.sub_scores[COMFORT]) / 12
        )


def test_leaving_the_road_voids_the_score(split: NuScenesSplit, whole: list[Sample]) -> None:
    sample = max(whole, key=lambda one: one.ego.speed_mps)
    turned = -0.4 * TIMES
    radius = sample.ego.speed_mps / 0.4
    astray = np.column_stack([-radius * np.sin(turned), radius * (np.cos(turned) - 1), turned])
    score = score_on_nuscenes(scene(split, sample), astray)
    assert score.sub_scores[DAC] == 0
    assert score.score == 0


def test_a_car_in_the_way_is_hit(split: NuScenesSplit, whole: list[Sample]) -> None:
    sample = max(whole, key=lambda one: one.ego.speed_mps)
    assert sample.ego.speed_mps > 4
    parked = TrackedBox(0.0, 2 * sample.ego.speed_mps, 4.5, 1.9, np.pi / 2, "vehicle.car", "parked")
    cone = replace(parked, category="movable_object.trafficcone", length=0.4, width=0.4)
    scores = {}
    for what, box in (("car", parked), ("cone", cone)):
        truth = replace(sample.truth, boxes=((box,),) * 7)
        scores[what] = score_on_nuscenes(scene(split, replace(sample, truth=truth)), ahead(sample))
    assert scores["car"].sub_scores[NC] == 0
    assert scores["car"].sub_scores[TTC] == 0
    assert scores["cone"].sub_scores[NC] == 0.5
    empty = replace(sample, truth=replace(sample.truth, boxes=((),) * 7))
    assert score_on_nuscenes(scene(split, empty), ahead(sample)).sub_scores[NC] == 1


def test_tracks_pass_through_the_annotated_boxes(split: NuScenesSplit, whole: list[Sample]) -> None:
    sample = next(one for one in whole if any(one.truth.boxes))
    tracks = scene(split, sample).tracks
    map_from_lidar = sample.ego_pose @ sample.ego_from_lidar
    checked = 0
    for keyframe, boxes in enumerate(sample.truth.boxes):
        for box in boxes:
            row = tracks.boxes[tracks.tokens.index(box.track), 5 * keyframe]
            centre = map_from_lidar @ [box.x, box.y, 0, 1]
            np.testing.assert_allclose(row[:2], centre[:2], atol=1e-6)
            np.testing.assert_allclose(row[3:], [box.length, box.width])
            checked += 1
    assert checked > 7


def test_the_route_runs_the_way_the_car_drives(split: NuScenesSplit, whole: list[Sample]) -> None:
    for sample in whole[::3]:
        made = scene(split, sample)
        away = np.hypot(*(made.centreline - made.ego.pose[:2]).T)
        assert away.min() < 3.0
        assert made.route_lane_ids
        lanes = [area.id for area in made.areas if area.type in ("lane", "lane_connector")]
        assert made.route_lane_ids <= set(lanes)
        assert len(made.route_lane_ids) < len(lanes)  # oncoming lanes are none of the route's
        assert (made.horizon, len(made.reference)) == (30, 7)


def test_what_cannot_be_scored_is_refused(split: NuScenesSplit, whole: list[Sample]) -> None:
    cut = next(sample for sample in split if not sample.future_exists.all())
    with pytest.raises(InputError, match="no whole future of 3 s"):
        scene(split, cut)
    far = whole[0].ego_pose.copy()
    far[:2, 3] += 3000.0
    with pytest.raises(OffLaneError, match=r"no lane within 3 m runs the car's way"):
        scene(split, replace(whole[0], ego_pose=far))
    with pytest.raises(InputError, match=r"\[5, 3\]; expected \[6, 3\]"):
        score_on_nuscenes(scene(split, whole[0]), np.zeros((5, 3)))


def test_the_command(
    synthetic_root: Path,
    split: NuScenesSplit,
    whole: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plans = tmp_path / "standing.json"
    plans.write_text(
        json.dumps(
            {
                "format": "vla_autoprune.predictions/1",
                "frame": "ego",
                "predictions": [
                    {"token": token, "waypoints": [[0, 0, 0]] * 6} for token in split.tokens[:-1]
                ],
            }
        )
    )
    words = ["vla-autoprune", "navsim", "nuscenes", str(plans), "--data", str(synthetic_root)]
    words += ["--out", str(tmp_path / "out"), "--worst", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert f"{split.tokens[-1]} is missing" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--allow-missing"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr().out
    assert not left.value.code, printed
    assert f"PDMS-nuScenes: {len(whole)} of {len(split)} samples scored; 1 without a plan" in printed
    assert "not comparable to NAVSIM's" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["standing", "constant velocity", "logged drive"]
    assert len(results["standing"]["frames"]) == len(whole)
    means = {name: each["means"]["all frames"][EP] for name, each in results.items()}
    assert means["standing"] < 0.9 < means["logged drive"]
    assert (tmp_path / "out" / "scores.png").is_file()


def test_the_command_takes_a_frame_and_notices_a_wrong_one(
    synthetic_root: Path, split: NuScenesSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lidar = {sample.token: sample.truth.waypoints.tolist() for sample in split}
    plans, again = tmp_path / "true.json", tmp_path / "logged drive.json"
    for path in (plans, again):
        path.write_text(json.dumps(lidar))

    def run(*words: str) -> int:
        where = ["--data", str(synthetic_root), "--out", str(tmp_path / "out"), "--worst", "0"]
        monkeypatch.setattr(sys, "argv", ["vla-autoprune", "navsim", "nuscenes", *words, *where])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    assert run(str(plans)) == 2
    assert run(str(plans), "--frame", "ego") == 2
    assert run(str(again), "--frame", "lidar") == 2
    assert run(str(plans), "--frame", "lidar") == 0
    means = {
        name: each["means"]["all frames"][EP]
        for name, each in json.loads((tmp_path / "out" / "results.json").read_text()).items()
    }
    assert means["true"] == pytest.approx(means["logged drive"], abs=0.05)
