"""`vla-autoprune navsim` on metric caches and on converted scenes."""

from __future__ import annotations

import json
import lzma
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_nuscenes.navsim.aggregation import one_stage
from eval_nuscenes.navsim.scene_files import write_scene
from eval_nuscenes.navsim.scoring import score_plan
from vla_autoprune import cli

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vla-autoprune", "navsim", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out + printed.err

    return call


@pytest.fixture
def caches(repository: Path) -> Path:
    return repository / "tests" / "data" / "navsim"


@pytest.mark.parametrize(("devkit", "metric"), [("v1", "PDMS"), ("v2", "EPDMS")])
def test_a_submission_on_caches_and_on_converted_scenes(
    golden: Any, run: Run, tmp_path: Path, caches: Path, devkit: str, metric: str
) -> None:
    cache, submission = caches / devkit / "metric_cache", caches / devkit / "submission.pkl"
    status, printed = run("score", cache, submission, "--out", tmp_path / "direct", "--worst", 2)
    assert status == 0, printed
    assert f"{metric}: 3 of 3 scenes scored" in printed
    assert ("0 with extended comfort" in printed) == (metric == "EPDMS")
    results = json.loads((tmp_path / "direct" / "results.json").read_text())
    assert results["metric"] == metric
    assert (tmp_path / "direct" / "scores.png").read_bytes().startswith(b"\x89PNG")
    plan = golden.path(golden.case("cv"))
    expected = one_stage(
        [
            score_plan(golden.scene(name, devkit), plan)
            for name in ("appearing", "human_runs_red", "human_wrong_way_syn")
        ]
    )
    assert results["means"]["all frames"]["score"] == pytest.approx(expected.score, abs=1e-12)

    status, printed = run("convert", cache, "--out", tmp_path / "plain")
    assert status == 0, printed
    assert f"wrote 3 scenes (3 of {devkit})" in printed
    assert "already" in run("convert", cache, "--out", tmp_path / "plain")[1]
    status, printed = run("score", tmp_path / "plain", submission, "--out", tmp_path / "again", "--worst", 0)
    assert status == 0, printed
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["means"]["all frames"] == pytest.approx(results["means"]["all frames"], abs=1e-12)


def test_a_figure_that_is_not_the_official_one_is_named_apart(
    golden: Any, run: Run, tmp_path: Path, caches: Path
) -> None:
    cache, submission = caches / "v2" / "metric_cache", caches / "v2" / "submission.pkl"
    where = ("--out", tmp_path / "out", "--worst", 0)
    printed = run("score", cache, submission, "--no-human-filter", *where)[1]
    assert "EPDMS-unfiltered: 3 of 3 scenes scored" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metric"] == "EPDMS-unfiltered" and "without the official" in results["definition"]

    write_scene(tmp_path, golden.scene("cones", "v2"))
    plans = tmp_path / "plans.json"
    short = [[5.0 * step, 0.0, 0.0] for step in range(1, 7)]
    plans.write_text(json.dumps({"frame": "ego", "interval_s": 0.5, "plans": {"cones": short}}))
    status, printed = run("score", tmp_path, plans, *where)
    assert status == 2 and "plan of cones covers 3 s" in printed
    printed = run("score", tmp_path, plans, "--any-horizon", *where)[1]
    assert "EPDMS: 1 of 1 scenes scored, 1 with plans of another length than 4 s" in printed


def test_missing_plans_are_refused_or_counted(golden: Any, run: Run, tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for name in ("cones", "empty10", "stop"):
        write_scene(scenes, golden.scene(name, "v2"))
    straight = [[5.0 * step, 0.0, 0.0] for step in range(1, 9)]
    plans = tmp_path / "plans.json"
    plans.write_text(
        json.dumps({"frame": "ego", "interval_s": 0.5, "plans": {"cones": straight, "elsewhere": straight}})
    )
    status, printed = run("score", scenes, plans, "--out", tmp_path / "out")
    assert status == 2
    assert "2 of 3 scenes have no plan: empty10, stop; 1 of 2 plans belong to no scene: elsewhere" in printed
    assert not (tmp_path / "out").exists()
    status, printed = run("score", scenes, plans, "--out", tmp_path / "out", "--allow-missing", "--worst", 0)
    assert status == 0, printed
    assert "EPDMS: 1 of 3 scenes scored, 1 plans without a scene left out" in printed
    plans.write_text(json.dumps({"frame": "ego", "interval_s": 0.5, "plans": {"elsewhere": straight}}))
    status, printed = run("score", scenes, plans, "--out", tmp_path / "out", "--allow-missing")
    assert status == 2
    assert "are they of the same split?" in printed


def test_two_stages(golden: Any, run: Run, tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for name in ("ec_now", "ec_prev"):
        write_scene(scenes, golden.scene(name, "v2"))
    poses = {
        name: golden.case(case)["trajectory"]["poses"]
        for name, case in (("ec_now", "ec_now_cv"), ("ec_prev", "ec_prev_cv"))
    }
    plans, stages = tmp_path / "plans.json", tmp_path / "stages.json"
    plans.write_text(json.dumps({"frame": "ego", "interval_s": 0.5, "plans": poses}))
    stages.write_text('[["ec_now", "ec_prev", [["ec_now", "ec_prev"]]]]')
    status, printed = run("score", scenes, plans, "--stages", stages, "--out", tmp_path / "out", "--worst", 0)
    assert status == 0, printed
    assert "do not compare with that leaderboard" in printed
    assert "EPDMS: 2 of 2 scenes scored; two stages, replayed traffic: not navhard's figure" in printed
    means = json.loads((tmp_path / "out" / "results.json").read_text())["means"]
    assert list(means) == ["stage one", "stage two", "combined"]
    assert means["stage one"]["two_frame_extended_comfort"] == 1
    stages.write_text('[["ec_now", "absent", []]]')
    status, printed = run("score", scenes, plans, "--stages", stages, "--out", tmp_path / "out")
    assert status == 2
    assert "1 frames of the stages have no plan or scene: absent" in printed


def test_unreadable_caches_are_listed_or_counted(run: Run, tmp_path: Path, caches: Path) -> None:
    copied = tmp_path / "caches"
    shutil.copytree(caches / "v2" / "metric_cache", copied)
    first, second, _ = sorted(copied.rglob("metric_cache.pkl"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(lzma.compress(pickle.dumps(Path.cwd)))
    submission = caches / "v2" / "submission.pkl"
    status, printed = run("score", copied, submission, "--out", tmp_path / "out")
    assert status == 2
    assert "2 of 3 scenes cannot be read" in printed
    for path, why in ((first, "is cut off"), (second, "which is not among what such a file may hold")):
        assert f"{path}: " in printed
        assert why in printed
    assert not (tmp_path / "out").exists()
    status, printed = run(
        "score", copied, submission, "--out", tmp_path / "out", "--allow-missing", "--worst", 0
    )
    assert status == 0, printed
    assert "EPDMS: 1 of 3 scenes scored, 2 unreadable" in printed
    status, printed = run("convert", copied, "--out", tmp_path / "plain")
    assert status == 2
    assert "wrote 1 scenes (1 of v2)" in printed
    assert "2 of 3 caches cannot be converted" in printed
