"""A checkpoint of somebody else's: opened, exported by the command line, planned with without torch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from vla_autoprune.errors import PlanError, RecipeError, VlaError
from vla_autoprune.frame import Command, EgoState, Frame
from vla_autoprune.models.checkpoint import open_model
from vla_autoprune.models.families import adapter_for

SPECIAL = ("<pad>", "<s>", "</s>", "<img>", "<v>", "</v>")
FIRST = 256
ACTIONS = range(FIRST + len(SPECIAL), FIRST + len(SPECIAL) + 8)
TEXT = "<s><v>{CAM_FRONT}</v><v>{CAM_BACK}</v>{speed_mps:.1f} m/s, go {command}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen2.5-VL that answers with action tokens, as `save_pretrained` and its like leave it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "driver"
    pad, bos, eos, image, start, end = range(FIRST, FIRST + len(SPECIAL))
    text = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "pad_token_id": pad,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim >= 2:
                weights.mul_(4.0)
        answers = model.get_output_embeddings().weight
        answers.zero_()
        answers[ACTIONS.start : ACTIONS.stop].normal_(std=0.5)
    model.generation_config.eos_token_id = [eos, pad]
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, *(f"<act_{index}>" for index in range(8))])
    tokenizer.save(str(folder / "tokenizer.json"))
    normal = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normal))
    return folder


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps({"text": TEXT, "suffix_tokens": 40, "image_size": [32, 24]}))
    return path


@pytest.fixture
def codebook(tmp_path):
    path = tmp_path / "codebook.json"
    motions = [[0.5 * index, 0.0, 0.01 * index] for index in range(8)]
    book = {"kind": "codebook", "length": 6, "first_token": ACTIONS.start, "motions": motions}
    path.write_text(json.dumps(book))
    return path


@pytest.fixture
def frame():
    random = np.random.default_rng(0)
    front, back = random.integers(0, 255, (2, 60, 80, 3), dtype=np.uint8)
    return Frame({"CAM_FRONT": front, "CAM_BACK": back}, EgoState(7.0), Command.LEFT)


def test_a_checkpoint_is_opened_with_what_its_files_say(folder, template):
    opened = open_model(str(folder), template, "waypoints")
    vla = opened.vla
    assert opened.name == "driver" and vla.codec.end_tokens == (FIRST + 2, FIRST)
    assert vla.preprocessing.mean == (0.5, 0.4, 0.3)
    assert vla.preprocessing.cameras == ("CAM_FRONT", "CAM_BACK")
    assert vla.prompt.layout.visual_tokens == 24 and vla.prompt.layout.image_size == (32, 24)
    assert adapter_for(vla.model).shape("x").position_axes == 3


def test_what_does_not_fit_is_refused(folder, template, tmp_path):
    def refused(message, model=folder, prompt=template, decoder="waypoints"):
        with pytest.raises(VlaError, match=message):
            open_model(None if model is None else str(model), prompt, decoder)

    refused("--prompt is for checkpoints without prompt", model=None)
    refused("--decoder is for checkpoints", model=None, prompt=None)
    refused("--decoder is missing", decoder=None)
    refused("--prompt is missing", prompt=None)
    refused("no such folder, and not a hub id like organisation/name", model=tmp_path / "absent")
    far = {"kind": "codebook", "length": 6, "first_token": 400, "motions": [[0, 0, 0], [1, 0, 0]]}
    (tmp_path / "far.json").write_text(json.dumps(far))
    refused("its tokens go up to 401, the model's vocabulary to 319", decoder=str(tmp_path / "far.json"))
    for changes, message in (
        ({"image_size": None}, "image_size is missing"),
        ({"image_size": [10**6, 24]}, r"image_size\.0: .* less than or equal to 8192"),
        ({"image_size": [30, 24]}, r"image_size is \(30, 24\); this model takes multiples of 8 pixels"),
        ({"text": TEXT.replace("<v>{CAM_BACK}", "{CAM_BACK}")}, r"\{CAM_BACK\} must stand between '<v>'"),
    ):
        good = {"text": TEXT, "suffix_tokens": 40, "image_size": [32, 24]}
        template.write_text(json.dumps({**good, **changes}))
        refused(message)


@pytest.mark.parametrize("stream", [False, True])
def test_weights_that_no_file_holds_are_not_made_up(folder, template, tmp_path, stream):
    from safetensors.torch import load_file, save_file

    damaged = shutil.copytree(folder, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    (lost,) = (name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    del weights[lost]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(VlaError, match=r"its files hold no \S*layers\.1\.mlp\.up_proj.weight \(1 of "):
        open_model(str(damaged), template, "waypoints", stream=stream).adapter()


@pytest.mark.parametrize(
    "name,message",
    [
        ("tokenizer.json", r"tokenizer\.json is not a tokenizer file: .*; download the checkpoint again"),
        ("generation_config.json", r"generation_config\.json is not valid JSON"),
    ],
)
def test_a_broken_file_is_named(folder, template, tmp_path, name, message):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / name).write_text("{")
    with pytest.raises(VlaError, match=message):
        open_model(str(damaged), template, "waypoints")


@pytest.mark.slow
def test_from_checkpoint_to_plan_and_evaluation(folder, template, codebook, frame, tmp_path):
    """Every command as for the shipped model; the bundle alone tokenises, preprocesses, parses."""
    for package in ("onnxruntime", "onnxscript", "nuscenes", "shapely"):
        pytest.importorskip(package)
    from typer.testing import CliRunner

    from engines.onnxruntime import OnnxRuntimeBackend
    from eval_nuscenes.nuscenes_writer import dataset_options, write_dataset
    from eval_nuscenes.summary import EvaluationSummary
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.cli import app
    from vla_autoprune.recipe import read_recipe
    from vla_autoprune.runtime.planner import Planner

    def run(*words) -> str:
        done = CliRunner(env={"COLUMNS": "150"}).invoke(app, [*map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    options = dataset_options(
        scenes=10, duration_s=4.0, width=96, height=54, val_fraction=0.0, calibration_fraction=1.0
    )
    data = write_dataset(tmp_path / "drives", options, workers=1).root
    drives = ["--data", data, "--split", "calibration", "--threads", 1]
    checkpoint = ["--model", folder, "--prompt", template, "--decoder", codebook]
    recipe, made, out = (tmp_path / name for name in ("recipe.json", "bundle", "evaluation"))

    pruning = ["--budgets", 0.6, "--slopes", "0,0.4", "--camera-floors", "CAM_FRONT=3", "--limit", 20]
    said = run("calibrate", *drives, *checkpoint, *pruning, "--out", recipe)
    assert "frames of 10 scenes" in said and "without a plan" not in said
    assert read_recipe(recipe).model.id == "driver" and read_recipe(recipe).model.position_axes == 3

    export = ["export", made, *checkpoint, "--recipe", recipe]
    assert "parity: " in run(*export)
    bundle = load_bundle(made)
    planner = Planner(bundle, OnnxRuntimeBackend(bundle, threads=1), budget=0.6)
    plan = planner.plan(frame)
    vla = open_model(str(folder), template, str(codebook)).vla
    ids = planner.prompt.build(frame.ego, frame.command)
    pixels = planner.preprocessing.apply(frame.images)
    wanted, _ = adapter_for(vla.model).generate(ids, torch.from_numpy(pixels), 6)
    unpruned = planner.variant(None).plan(frame)
    expected = vla.codec.waypoints(wanted.tolist(), "")
    assert np.array_equal(unpruned.waypoints_in_ego, expected)
    assert plan.waypoints_in_ego.shape == (6, 3) and plan.work_fraction < 1
    assert (bundle.recipe.layout.camera_of_visual[plan.kept_visual[-1]] == 0).sum() >= 3

    wordy = vla.codec.model_copy(update={"first_token": ACTIONS.start + 300})
    planner.codec = wordy
    with pytest.raises(PlanError, match=r"the answer has 6 tokens and no end"):
        planner.plan(frame)
    assert planner.rehearse(frame, "full").answer_tokens == 6

    quick = ["--protocols", "standard", "--policies", "autoprune", "--limit", 3, "--warm-up", 0]
    assert "failed" not in run("evaluate", made, *drives, *quick, "--out", out)
    result = EvaluationSummary.model_validate_json((out / "results.json").read_bytes())
    full, pruned = result.variants[:2]
    assert pruned.kind == "autoprune" and not full.failed_plans and not pruned.failed_plans
    assert full.cost.visual_tokens_into_layers == 24 > pruned.cost.visual_tokens_into_layers

    other = json.loads(template.read_text())
    template.write_text(json.dumps({**other, "image_size": [32, 32]}))
    with pytest.raises(RecipeError, match=r"layout has image_size \(32, 24\), prompt and rig .* \(32, 32\)"):
        run(*export)


def test_an_export_that_streams_says_what_it_compared(folder, template, codebook, tmp_path):
    from typer.testing import CliRunner

    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.cli import app
    from vla_autoprune.recipe import Scorer, write_recipe
    from vla_autoprune.recipe_building import build_recipe

    pytest.importorskip("onnxscript")
    opened = open_model(str(folder), template, str(codebook), stream=True)
    assert all(parameter.is_meta for parameter in opened.vla.model.parameters())
    recipe = build_recipe(
        opened.adapter().shape("driver"),
        opened.vla.prompt.layout,
        decode_length=opened.vla.codec.length,
        budgets=(0.7,),
        slopes=(0.0,),
        scorer=Scorer(encoder_weight=0.0),
    )
    write_recipe(recipe, tmp_path / "recipe.json")
    options = ["--model", folder, "--prompt", template, "--decoder", codebook]
    options += ["--recipe", tmp_path / "recipe.json", "--weights", "stream", "--precision", "bf16"]
    done = CliRunner().invoke(app, ["export", str(tmp_path / "bundle"), *map(str, options)])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "parity, graph by graph: 5 graphs of bucket b70_s0 within" in said
    assert "not compared, as the weights were never all in memory: whole answers" in said
    assert "allowed in bf16 are 0.15" in said
    assert "onnxruntime, the default backend, does not run bf16: plan with --backend torch" in said
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest.options.precision == "bf16"
    assert not any(entry.role == "sample" for entry in bundle.manifest.files)
