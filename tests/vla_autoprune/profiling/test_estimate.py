from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from typer.testing import CliRunner

from vla_autoprune.cli import app
from vla_autoprune.errors import InputError
from vla_autoprune.profiling.document import Ceiling, Work, write_profile
from vla_autoprune.profiling.estimate import (
    calibrate,
    devices,
    estimate,
    measured_range,
    model_named,
    models,
    published_range,
    recipe_for,
)
from vla_autoprune.profiling.percentiles import distribution
from vla_autoprune.profiling.roofline import least_s
from vla_autoprune.pruning.work import prefill_flops
from vla_autoprune.recipe import rows_into_layers

PUBLISHED = [
    # TensorRT Edge-LLM v0.10.0 llm_bench: model, device, precision, prefill of 2048 tokens in ms
    ("qwen3-vl-4b", "orin", "int4", 758.0),
    ("qwen3-vl-8b", "orin", "int4", 1388.0),
    ("qwen3-vl-4b", "thor", "fp4", 62.2),
    ("qwen3-vl-8b", "thor", "fp4", 104.5),
]


def whole(name, device, precision, rows, answer=12):
    model = model_named(name)
    cameras = 4
    text = rows - cameras * model.visual_tokens_per_image
    recipe = recipe_for(model, name, None, cameras, text, answer, (0.5, 0.25))
    return recipe, estimate(recipe, model, cameras, precision, published_range(devices()[device], precision))


@pytest.mark.parametrize(("name", "device", "precision", "published_ms"), PUBLISHED)
def test_published_prefills_lie_within_the_range(name, device, precision, published_ms):
    _, (full, *_) = whole(name, device, precision, 2048)
    low, high = full.ms("prefill")
    assert low <= published_ms <= high
    assert high < 3 * low


def test_published_decoding_lies_within_the_range():
    for device, precision, tokens_per_s in (("orin", "int4", 30.6), ("thor", "fp4", 44.0)):
        _, (full, *_) = whole("qwen3-vl-8b", device, precision, 2048, answer=11)
        low, high = (ms / 10 for ms in full.ms("decode"))
        assert low <= 1e3 / tokens_per_s <= high


def test_work_and_cache_are_the_recipes():
    recipe, found = whole("qwen2.5-vl-3b", "thor", "fp16", 1800)
    full, half, quarter = found
    for row in found:
        stages = [stage for stage in row.stages if stage.name.startswith("stage_")]
        into = rows_into_layers(recipe, row.bucket)
        assert sum(stage.work.flops for stage in stages) == prefill_flops(recipe.model, into)
        assert sum(stage.kv_mib for stage in stages) == pytest.approx(row.kv_mib)
    # 36 layers, 2 KV heads of 128, 2 bytes, keys and values, 1800 + 12 tokens
    assert full.kv_mib == pytest.approx(36 * 2 * 128 * 2 * 2 * 1812 / 2**20)
    assert full.ms("prefill")[0] > half.ms("prefill")[0] > quarter.ms("prefill")[0]
    assert full.ms("vision") == quarter.ms("vision")


def test_every_model_and_device_is_whole_and_names_its_source():
    sizes = {"llava-1.5-7b": 6.7e9, "qwen2.5-vl-3b": 3.1e9, "qwen2.5-vl-7b": 7.6e9, "qwen3-vl-4b": 4.0e9}
    for name, billions in sizes.items():
        model = models()[name]
        decoder = model.decoder
        width = (decoder.heads + decoder.kv_heads) * decoder.head_dim
        layer = 2 * decoder.hidden * width + 3 * decoder.hidden * decoder.ffn
        tied = 1 if name in ("qwen2.5-vl-3b", "qwen3-vl-4b") else 2
        total = decoder.layers * layer + tied * model.vocabulary * decoder.hidden
        assert total == pytest.approx(billions, rel=0.03)
    assert all("config.json" in model.source for model in models().values())
    for device in devices().values():
        assert device.source and device.efficiency_source
        assert device.compute_efficiency[0] < device.compute_efficiency[1]


def made(profile, overhead_s, efficiency, noise=0.0):
    """The profile as if its machine took overhead + least / efficiency for each run."""
    generator = np.random.default_rng(0)
    buckets = []
    for bucket in profile.buckets:
        stages = []
        for stage in bucket.stages:
            if stage.work is not None and stage.work.flops:
                least, _ = least_s(stage.work, profile.ceiling)
                ms = 1e3 * (stage.runs_per_plan * overhead_s + least / efficiency)
                ms *= 1 + noise * generator.normal()
                stage = stage.model_copy(update={"ms": (ms,), "time": distribution([ms])})
            stages.append(stage)
        buckets.append(bucket.model_copy(update={"stages": tuple(stages)}))
    return profile.model_copy(update={"buckets": tuple(buckets)})


def test_a_machine_that_obeys_the_model_is_found_without_error(tiny_profile):
    found = calibrate(made(tiny_profile, 2e-4, 0.4))
    for phase in ("prefill", "decode"):
        overhead, efficiency = found.fits[phase]
        assert overhead == pytest.approx(2e-4, rel=1e-6) and efficiency == pytest.approx(0.4, rel=1e-6)
    assert found.error < 1e-6
    assert 0.001 < calibrate(made(tiny_profile, 2e-4, 0.4, noise=0.05)).error < 0.2
    seconds = measured_range(found, tiny_profile.ceiling)
    work = tiny_profile.buckets[0].stage("stage_00").work
    low, high = seconds("prefill", work, 1)
    assert low == pytest.approx(high) == pytest.approx(2e-4 + least_s(work, tiny_profile.ceiling)[0] / 0.4)


def test_beyond_what_was_profiled_the_range_begins_at_the_ceilings(tiny_profile):
    found = calibrate(made(tiny_profile, 2e-4, 0.4))
    seconds = measured_range(found, tiny_profile.ceiling)
    # 10^11 operations at the 10^11 a second of the made-up ceiling
    low, high = seconds("prefill", Work(flops=10**11, bytes=1), 1)
    assert low == 1.0 and high == pytest.approx(2e-4 + 1.0 / 0.4)
    many, _ = seconds("decode", Work(flops=10**11, bytes=1), 10**9)
    assert many == pytest.approx(10**9 * 2e-4 + 1.0 / 0.4)  # each run is small


def test_the_error_is_of_budgets_that_took_no_part(tiny_profile):
    """One budget on a machine twice as slow: its other buckets may not tell the fit."""
    steady = made(tiny_profile, 0.0, 0.4)
    slow = made(tiny_profile, 0.0, 0.2)
    buckets = [slow.bucket(b.name) if b.budget == "b40" else b for b in steady.buckets]
    assert sum(bucket.budget == "b40" for bucket in buckets) > 1
    assert calibrate(steady.model_copy(update={"buckets": tuple(buckets)})).error == pytest.approx(0.5)


def test_what_cannot_calibrate_is_refused(tiny_profile):
    with pytest.raises(InputError, match="a profile of 1 budgets"):
        calibrate(tiny_profile.model_copy(update={"buckets": tiny_profile.buckets[:1]}))
    pruned = [bucket for bucket in tiny_profile.buckets if bucket.budget == "b40"]
    with pytest.raises(InputError, match="a profile of 1 budgets"):
        calibrate(tiny_profile.model_copy(update={"buckets": tuple(pruned)}))
    with pytest.raises(InputError, match="with ceilings 'copy only' cannot"):
        calibrate(tiny_profile.model_copy(update={"ceiling": Ceiling(bytes_per_s=1e9, source="copy only")}))


def run(*arguments):
    return CliRunner().invoke(
        app, ["estimate", *map(str, arguments)], env={"COLUMNS": "60"}, catch_exceptions=False
    )


def test_the_command_states_sources_and_error(tiny_profile, stored_bundle, tmp_path):
    out = tmp_path / "estimate.json"
    published = run("--model", "qwen3-vl-4b", "--device", "orin", "--precision", "int4", "--json", out)
    assert published.exit_code == 0, published.output
    assert "…" not in published.stdout.replace(" … ", "")  # no figure is cut short
    assert "Technical Brief" in published.stdout and "the error is not known" in published.stdout
    content = json.loads(out.read_text())
    assert [row["bucket"]["name"] for row in content["buckets"]] == ["full", "b60_s0", "b40_s0", "b25_s0"]
    profile = tmp_path / "profile.json"
    write_profile(tiny_profile, profile)
    measured = run(
        "--model", "qwen3-vl-4b", "--device", "measured", "--profile", profile, "--recipe", stored_bundle.path
    )
    assert measured.exit_code == 0, measured.output
    assert "error on prefill and decoding of budgets left out up to" in measured.stdout
    assert "the error does not cover it" in measured.stdout and "b40_s0" in measured.stdout
    assert "(fp32)" in measured.stdout
    with pytest.raises(InputError, match=r"--precision fp16: .* was measured in fp32"):
        run("--model", "qwen3-vl-4b", "--device", "cpu", "--profile", profile, "--precision", "fp16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-9", "--device", "orin"], "--model is 'gpt-9'; known are llava-1.5-7b"),
        (["--model", "qwen3-vl-4b", "--device", "measured"], "needs the --profile"),
        (["--model", "qwen3-vl-4b", "--device", "orin", "--precision", "fp8"], "no throughput of Jetson AGX"),
        (["--model", "qwen3-vl-4b", "--device", "orin", "--profile", "x"], "take --device measured"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        run(*arguments)
