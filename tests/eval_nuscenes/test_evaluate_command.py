"""`vla-autoprune evaluate` from the command line: a stored bundle on a small data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("nuscenes")
pytest.importorskip("matplotlib")

from eval_nuscenes.nuscenes_reader import NuScenesSplit
from eval_nuscenes.nuscenes_writer import dataset_options, write_dataset
from eval_nuscenes.summary import STEPS_OF_A_PLAN
from vla_autoprune import contract
from vla_autoprune.bundle import Bundle, load_bundle, write_manifest
from vla_autoprune.cli import app
from vla_autoprune.cli.evaluate import HOPELESS
from vla_autoprune.errors import InputError, PlanError
from vla_autoprune.recipe import write_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drives of nine keyframes, small images."""
    root = tmp_path_factory.mktemp("data") / "synth"
    options = dataset_options(scenes=2, duration_s=4.0, width=96, height=54, kinds=("free", "lead"))
    return write_dataset(root, options, workers=1).root


@pytest.fixture(scope="module")
def lean_bundle(stored_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Without the buckets of 60 %."""
    folder = shutil.copytree(stored_bundle.path, tmp_path_factory.mktemp("lean") / "lean")
    whole = stored_bundle.recipe
    buckets = tuple(bucket for bucket in whole.buckets if bucket.budget != 0.6)
    recipe = whole.model_copy(update={"budgets": (0.4,), "buckets": buckets})
    write_recipe(recipe, folder / "recipe.json")
    (vocabulary,) = stored_bundle.graphs[contract.HEAD].outputs[0].shape[1:]
    options = stored_bundle.manifest.options
    write_manifest(folder, recipe, contract.graphs(recipe, vocabulary), options)
    return load_bundle(folder)


def evaluate(bundle: Bundle, world: Path, out: Path, *options: str) -> Result:
    where = (str(bundle.path), "--data", str(world), "--split", "all", "--out", str(out))
    return CliRunner().invoke(app, ["evaluate", *where, "--threads", "1", "--warm-up", "1", *options])


def numbers(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_a_run_writes_table_numbers_and_report(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    result = evaluate(stored_bundle, world, tmp_path / "out")
    assert result.exit_code == 0, result.output
    for word in ("autoprune 60%", "random 40%", "images blanked", "constant velocity", "uniad", "standard"):
        assert word in result.output
    found = numbers(tmp_path / "out")
    assert [variant["name"] for variant in found["variants"]][:2] == ["full", "autoprune 60%"]
    assert found["conditions"]["samples"] == 18
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
    assert not list((tmp_path / "out").glob("*.tmp"))

    (log,) = (tmp_path / "out").glob("plans-*.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    planned = [variant for variant in found["variants"] if variant["cost"] is not None]
    assert len(planned) == 6
    for variant in planned:
        plans = [sample["plans"][variant["name"]] for sample in samples]
        assert [plan["error"] for plan in plans] == [None] * 18
        split = variant["cost"]["split_ms"]
        assert tuple(split) == STEPS_OF_A_PLAN and min(split.values()) > 0
        total = np.mean([plan["timings_ms"]["total"] for plan in plans])
        assert sum(split.values()) == pytest.approx(total, abs=1e-3)
    tokens = {variant["name"]: variant["cost"]["visual_tokens_into_layers"] for variant in planned}
    assert tokens["full"] == tokens["images blanked"] == 96
    assert tokens["autoprune 40%"] == pytest.approx(0.4 * 96, abs=0.5)


def test_floors_hold_on_every_frame_and_stand_beside_none(
    stored_bundle: Bundle, floored_bundle: Bundle, world: Path, tmp_path: Path
) -> None:
    """Two bundles of one model at once: table, numbers and kept plans agree."""
    plain, floored, floor = stored_bundle, floored_bundle, 9
    options = ("--budgets", "0.4", "--policies", "autoprune", "--limit", "6")
    where = ("--data", str(world), "--split", "all", "--out", str(tmp_path / "out"))
    sources = (str(plain.path), str(floored.path))
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, ["evaluate", *sources, *where, *options])
    assert result.exit_code == 0, result.output
    found = numbers(tmp_path / "out")
    rows = {row["name"]: row for row in found["variants"]}
    names = ["autoprune 40%", "autoprune 40% floored"]
    assert list(rows) == ["full", *names, "images blanked", "constant velocity"]
    assert found["conditions"]["key"]["planned_by"].count(",") == 1

    (log,) = (tmp_path / "out").glob("plans-*.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    left = {name: [sample["plans"][name]["visual_tokens_left"] for sample in samples] for name in names}
    # Without a floor the camera has fewer somewhere: the floor has something to do.
    assert min(each["CAM_BACK_LEFT"] for each in left[names[0]]) < floor
    assert min(each["CAM_BACK_LEFT"] for each in left[names[1]]) >= floor
    for name, bundle in zip(names, (plain, floored), strict=True):
        sizes = {bucket.name: bucket.after_points[-1] for bucket in bundle.recipe.buckets}
        plans = [sample["plans"][name] for sample in samples]
        assert [sum(plan["visual_tokens_left"].values()) for plan in plans] == [
            sizes[plan["bucket"]] for plan in plans
        ]
        (line,) = (
            (line for line in result.output.splitlines() if line.startswith(f"│{name} ") and " ≥" in line)
            if bundle is floored
            else (None,)
        )
        for camera, stated in rows[name]["cameras"].items():
            counts = [each[camera] for each in left[name]]
            assert stated["visual_tokens"] == 16
            assert stated["floor"] == (floor if bundle is floored and camera == "CAM_BACK_LEFT" else 0)
            assert (stated["least"], stated["most"]) == (min(counts), max(counts))
            assert stated["mean"] == pytest.approx(np.mean(counts))
            told = f" {np.mean(counts):.1f} {min(counts)}-{max(counts)}"
            assert line is None or told in line
    difference = rows[names[1]]["planning"]["uniad"]["l2_above_counterpart_m"]["mean"]
    means = [rows[name]["planning"]["uniad"]["l2_m"][3]["mean"] for name in names]
    assert difference == pytest.approx(means[1] - means[0])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Bundles against each other" in page and f"floor {floor}</small>" in page


def test_a_budget_that_another_bundle_lacks_is_named(
    stored_bundle: Bundle, lean_bundle: Bundle, world: Path, tmp_path: Path
) -> None:
    where = ("--data", str(world), "--split", "all", "--out", str(tmp_path / "out"))
    result = CliRunner().invoke(app, ["evaluate", str(stored_bundle.path), str(lean_bundle.path), *where])
    assert isinstance(result.exception, InputError)
    assert "bundle lean: recipe has no budget 0.6; it offers 0.4" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_second_run_plans_nothing_again_and_says_the_same(
    stored_bundle: Bundle, world: Path, tmp_path: Path
) -> None:
    evaluate(stored_bundle, world, tmp_path, "--limit", "5")
    first = numbers(tmp_path)
    (log,) = tmp_path.glob("plans-*.jsonl")
    plans = log.read_text()
    result = evaluate(stored_bundle, world, tmp_path, "--limit", "5")
    assert "5 of 5 samples are done already" in result.output
    assert log.read_text() == plans
    assert numbers(tmp_path)["variants"] == first["variants"]
    evaluate(stored_bundle, world, tmp_path, "--limit", "7")
    assert numbers(tmp_path)["conditions"]["samples"] == 7
    assert log.read_text().startswith(plans)


def test_a_model_that_never_answers_with_a_plan_is_not_scored(
    stored_bundle: Bundle, world: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stored_bundle.path, tmp_path / "bundle")
    actions = json.loads((folder / "actions.json").read_text())
    (folder / "actions.json").write_text(json.dumps({**actions, "first_distance_token": 0}))
    graphs = list(stored_bundle.graphs.values())
    write_manifest(folder, stored_bundle.recipe, graphs, stored_bundle.manifest.options)
    quick = ("--limit", str(HOPELESS), "--policies", "autoprune", "--budgets", "0.4")
    run = evaluate(load_bundle(folder), world, tmp_path / "out", *quick)
    assert isinstance(run.exception, PlanError)
    assert "full has no plan on any of 10 samples" in str(run.exception)
    assert "full has no plan on the first 10 samples: answer token 0" in " ".join(run.output.split())
    assert not (tmp_path / "out" / "results.json").exists()


def test_other_policies_can_be_compared(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    result = evaluate(
        stored_bundle, world, tmp_path, "--policies", "uniform,fixed", "--budgets", "0.4", "--limit", "4"
    )
    assert result.exit_code == 0, result.output
    names = [variant["name"] for variant in numbers(tmp_path)["variants"]]
    assert names == ["full", "uniform 40%", "fixed 40%", "images blanked", "constant velocity"]
    fixed = numbers(tmp_path)["variants"][2]
    (default,) = (bucket.name for bucket in stored_bundle.recipe.buckets_of(0.4) if bucket.default)
    assert fixed["buckets"] == {default: 4}
    assert "evenly spread tokens" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--budgets", "0.33"), InputError, "recipe has no budget 0.33; it offers 0.6, 0.4"),
        (("--budgets", "half"), InputError, "--budgets is 'half'; expected values"),
        (("--policies", "autoprune,best"), InputError, "--policies: best is no policy; choose from"),
        (("--budgets", ","), InputError, "--budgets is ','; expected values"),
        (("--protocols", "uniad,carla"), InputError, "no open-loop protocol 'carla'; use one"),
        (("--frame", "lidar"), InputError, "--frame is for predictions files, not a bundle"),
        (("--latency-ms", "5000"), InputError, "--latency-ms is 5000.0; expected less than 3000"),
        (("--replicas", "4"), InputError, "--replicas 4 is for a Ray cluster; name one with --ray"),
        (("--scenes", "scene-0001"), InputError, "split all has no scene scene-0001; it has"),
        (("--record", "scene-0001"), InputError, "--record scene-0001: no such scene in split all"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    stored_bundle: Bundle, world: Path, tmp_path: Path, options: tuple[str, ...], error: type, message: str
) -> None:
    result = evaluate(stored_bundle, world, tmp_path / "out", *options)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = evaluate(stored_bundle, world, tmp_path / "out")
    assert isinstance(result.exception, InputError) and "out is a file; give a dir" in str(result.exception)
    assert (tmp_path / "out").read_text() == "mine"


def test_all_wrong_options_are_told_at_once(stored_bundle: Bundle, tmp_path: Path) -> None:
    wrong = ("--policies", "best", "--budgets", "half", "--protocols", "carla,vad", "--latency-ms", "9999")
    result = evaluate(stored_bundle, tmp_path / "nowhere", tmp_path / "out", *wrong)
    assert "nowhere holds no v1.0-synth" in str(result.exception)
    for told in ("best is no policy", "--budgets is 'half'", "no open-loop protocol 'carla'", "--latency-ms"):
        assert told in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_protocols_scenes_and_latency_are_chosen(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    options = ("--protocols", "sparsedrive,bevplanner", "--scenes", "scene-2001", "--latency-ms", "250")
    result = evaluate(stored_bundle, world, tmp_path, *options, "--budgets", "0.4", "--limit", "4")
    assert result.exit_code == 0, result.output
    found = numbers(tmp_path)
    assert list(found["variants"][0]["planning"]) == ["sparsedrive", "bevplanner"]
    assert found["conditions"]["scenes"] == 1 and found["conditions"]["latency_ms"] == 250
    assert found["variants"][0]["planning"]["bevplanner"]["late"]["latency_ms"] == 250
    assert found["variants"][0]["planning"]["bevplanner"]["intersection"] is not None
    assert "Few samples" in result.output and "bevplanner, road edges %" in result.output


def test_a_map_protocol_without_a_map_is_refused(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(world, tmp_path / "bare")
    shutil.rmtree(bare / "maps" / "expansion")
    result = evaluate(stored_bundle, bare, tmp_path / "out", "--protocols", "bevplanner")
    assert isinstance(result.exception, InputError) and "maps/expansion" in str(result.exception)
    assert not (tmp_path / "out").exists()


def predictions(world: Path, path: Path, skip: int = 0, **plan: Any) -> Path:
    """The true future of every sample, or other waypoints, as a predictions file."""
    plans = []
    for sample in list(NuScenesSplit(world, "v1.0-synth", "all"))[skip:]:
        waypoints = plan.get("waypoints", sample.future_in_ego[:, :2].tolist())
        plans.append({"token": sample.token, "waypoints": waypoints, "latency_ms": 80.0})
    content = {"format": "vla_autoprune.predictions/1", "frame": "ego", "predictions": plans}
    path.write_text(json.dumps(content))
    return path


def evaluate_files(world: Path, out: Path, *words: str | Path) -> Result:
    where = ("--data", str(world), "--split", "all", "--out", str(out))
    return CliRunner().invoke(app, ["evaluate", *map(str, words), *where])


def test_predictions_are_scored_side_by_side(world: Path, tmp_path: Path) -> None:
    true = predictions(world, tmp_path / "true.json")
    still = predictions(world, tmp_path / "still.json", waypoints=[[0.0, 0.0]] * 6)
    protocols = ("standard", "uniad", "stp3", "vad", "opendrivevla_vehicle_ped")
    result = evaluate_files(world, tmp_path / "out", true, still, "--protocols", ",".join(protocols))
    assert result.exit_code == 0, result.output
    found = numbers(tmp_path / "out")
    assert [variant["name"] for variant in found["variants"]] == ["true", "still", "constant velocity"]
    whole = found["variants"][0]["planning"]["vad"]
    assert whole["l2_m"][3]["mean"] < 0.02  # headings along the path, where the file has none
    assert whole["late"]["latency_ms"] == 80 and whole["late"]["l2_m"][3]["mean"] > whole["l2_m"][3]["mean"]
    assert found["variants"][1]["planning"]["vad"]["l2_above_reference_m"]["mean"] > 1
    assert "…" not in result.output.partition("┏")[2].partition("└")[0]
    assert "true.json: 18 plans" in result.output
    assert "without an interval (fewer than 5 scenes)" in result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Worst scenes" in page and "plan blue" in page


def test_missing_predictions_are_refused_or_counted_in_the_first_line(world: Path, tmp_path: Path) -> None:
    path = predictions(world, tmp_path / "some.json", skip=4)
    refused = evaluate_files(world, tmp_path / "out", path)
    assert isinstance(refused.exception, InputError)
    assert "4 faults" in str(refused.exception) and "--allow-missing" in str(refused.exception)
    assert not (tmp_path / "out").exists()
    result = evaluate_files(world, tmp_path / "out", path, "--allow-missing")
    assert result.exit_code == 0, result.output
    (title,) = (line for line in result.output.splitlines() if line.startswith("all: "))
    assert title.strip() == "all: only 14 of 18 samples (77.8%) of 2 scenes"
    assert "only 14 of 18 samples" in (tmp_path / "out" / "report.html").read_text()


def test_sources_are_not_mixed_and_bundle_options_not_ignored(
    stored_bundle: Bundle, world: Path, tmp_path: Path
) -> None:
    path = predictions(world, tmp_path / "true.json")
    mixed = evaluate_files(world, tmp_path / "out", path, stored_bundle.path, tmp_path / "absent.json")
    assert "absent.json does not exist" in str(mixed.exception)
    mixed = evaluate_files(world, tmp_path / "out", path, stored_bundle.path)
    assert "is a directory: give bundles or predictions files, not both at once" in str(mixed.exception)
    twice = evaluate_files(world, tmp_path / "out", stored_bundle.path, stored_bundle.path)
    assert "tiny_bundle: give each bundle once" in str(twice.exception)
    idle = evaluate_files(world, tmp_path / "out", path, "--budgets", "0.4")
    assert "--budgets is for a bundle, not predictions files" in str(idle.exception)


def test_a_scene_is_recorded(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    pytest.importorskip("foxglove")
    options = ("--budgets", "0.4", "--limit", "4", "--record", "scene-2002")
    result = evaluate(stored_bundle, world, tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.glob("scene-*")} == {"scene-2002.rrd", "scene-2002.mcap"}
