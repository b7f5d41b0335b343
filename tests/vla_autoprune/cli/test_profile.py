from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from vla_autoprune.cli import app
from vla_autoprune.errors import InputError, VlaError


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(
        app, ["profile", *map(str, arguments)], env={"COLUMNS": "60"}, catch_exceptions=False
    )
    assert result.exit_code == exit_code, result.output
    return result.stdout


@pytest.fixture(scope="module")
def measured(stored_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    files = {name: folder / f"profile.{name}" for name in ("json", "trace")}
    printed = run(
        stored_bundle.path, "--frames", 10, "--warm-up", 1, "--threads", 1, "--buckets", "full,b40_s1",
        "--json", files["json"], "--trace", files["trace"],
    )  # fmt: skip
    return files, printed


def test_a_bundle_is_measured_and_what_is_missing_is_said(measured, stored_bundle):
    files, printed = measured
    assert "…" not in printed  # no figure is cut short
    assert "b40_s1" in printed and "select_00" in printed and "decode_stage_00" in printed
    assert "p99 needs 100" in printed and "device time is not measured" in printed
    assert "of an unpruned plan" in printed and "GFLOP/s" in printed
    content = json.loads(files["json"].read_text())
    assert content["profile_version"] == 1
    conditions = content["conditions"]
    assert conditions["bundle_id"] == stored_bundle.manifest.bundle_id
    assert conditions["recipe_sha256"] == stored_bundle.recipe.sha256
    assert len(conditions["input_sha256"]) == 64 and conditions["machine"]["cpu"]
    assert conditions["input"] == "coloured noise, seed 0"
    assert json.loads(files["trace"].read_text())["traceEvents"]


def test_an_earlier_profile_is_compared_with_itself_and_with_a_slower_one(measured, tmp_path):
    files, _ = measured
    assert "regressions: none shown" in run("--compare", files["json"], files["json"], "--fail-on-regression")
    slow = json.loads(files["json"].read_text())
    for bucket in slow["buckets"]:
        bucket["total_ms"] = [2 * ms for ms in bucket["total_ms"]]
        bucket["total"] = {k: 2 * v if isinstance(v, float) else v for k, v in bucket["total"].items()}
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(slow))
    printed = run("--compare", files["json"], path, "--fail-on-regression", exit_code=1)
    assert "regressions: full total, b40_s1 total" in printed
    run("--compare", files["json"], path)


def test_limits_decide_the_exit_code(measured, tmp_path):
    pytest.importorskip("yaml")
    files, _ = measured
    budgets = tmp_path / "budgets.yaml"
    budgets.write_text("total_ms: {p50: 1e5}\nbuckets: {full: {stages_ms: {vision: {p50: 1e5}}}}\n")
    assert "fails" not in run(files["json"], "--assert", budgets)
    budgets.write_text("total_ms: {p50: 0.001, p99: 100000}\n")
    printed = run(files["json"], "--assert", budgets, exit_code=1)
    assert "fails full total p50" in printed and "10 frames are too few, p99 needs 100" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a BUNDLE"),
        (["bundle", "--fail-on-regression"], "--fail-on-regression belongs to --compare"),
        (["bundle", "--json", "."], "--json . is a directory"),
        (["--compare", "a", "b", "--html", "c", "--frames", "3"], "that are there, without --frames, --html"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(*arguments)


def test_what_is_no_bundle_no_profile_or_not_there_is_refused(stored_bundle, tmp_path):
    with pytest.raises(VlaError, match="does not exist"):
        run(tmp_path / "nothing")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a profile: profile_version: Field required"):
        run(tmp_path / "other.json")
    with pytest.raises(VlaError, match="no bucket 'b1'"):
        run(stored_bundle.path, "--buckets", "b1")
    with pytest.raises(InputError, match=r"other.json has been measured; --backend needs a BUNDLE"):
        run(tmp_path / "other.json", "--backend", "torch")


def test_an_interrupt_says_what_is_left(stored_bundle, tmp_path, monkeypatch):
    from vla_autoprune.runtime.pipeline import Pipeline

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "encode", interrupted)
    command = ["profile", str(stored_bundle.path), "--frames", "1", "--json", str(tmp_path / "a.json")]
    found = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert found.exit_code == 130 and "interrupted: nothing has been written" in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_absent_is_said(stored_bundle):
    from vla_autoprune.errors import BackendError

    pytest.importorskip("torch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendError, match="sees no CUDA device"):
        run(stored_bundle.path, "--backend", "torch-cuda")


def test_latencies_of_a_ros_recording_join_the_profile(measured, tmp_path):
    rosbag2 = pytest.importorskip("rosbags.rosbag2")
    from rosbags.typesys import Stores, get_typestore

    files, _ = measured
    types = get_typestore(Stores.LATEST)
    kinds = {name.rsplit("/", 1)[-1]: types.types[name] for name in types.types}
    array, status, value = kinds["DiagnosticArray"], kinds["DiagnosticStatus"], kinds["KeyValue"]
    header = kinds["Header"](stamp=kinds["Time"](sec=1, nanosec=0), frame_id="")
    recording = tmp_path / "drive"
    with rosbag2.Writer(recording, version=9, storage_plugin=rosbag2.StoragePlugin.MCAP) as bag:
        kind = "diagnostic_msgs/msg/DiagnosticArray"
        topic = bag.add_connection("/vla/planner/status", kind, typestore=types)
        for index in range(12):
            values = {"stamp_to_publish_ms": str(50 + index), "remaining_ms": "-3", "bucket": "full"}
            if index == 11:
                values = {}
            entries = [value(key=key, value=text) for key, text in values.items()]
            message = array(
                header=header,
                status=[status(level=0, name="planner", message="", hardware_id="", values=entries)],
            )
            bag.write(topic, index, types.serialize_cdr(message, kind))
    out = tmp_path / "joined.json"
    printed = run(files["json"], "--ros", recording, "--json", out)
    assert "11 plans, 1 refused" in printed and "planner/status stamp_to_publish" in printed
    latencies = json.loads(out.read_text())["ros"]["latencies_ms"]
    assert set(latencies) == {"planner/status stamp_to_publish"}
    assert latencies["planner/status stamp_to_publish"]["p50"] == 55
    with pytest.raises(InputError, match=r"holds no metadata.yaml"):
        run(files["json"], "--ros", tmp_path)
