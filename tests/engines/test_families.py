"""Every family's real class, small and random: bundles against transformers and the eager pruned model."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from engines.lint import TARGETS, lint_bundle
from engines.onnxruntime import OnnxRuntimeBackend
from engines.parity import TOLERANCES, check_parity
from engines.stage_parity import check_stages
from engines.torch_graphs import TorchBackend
from vla_autoprune.errors import BackendError, RecipeError
from vla_autoprune.export.export import export_bundle
from vla_autoprune.models.families import adapter_for
from vla_autoprune.models.stored_weights import open_stored
from vla_autoprune.recipe import PromptLayout, Scorer
from vla_autoprune.recipe_building import build_recipe
from vla_autoprune.runtime.pipeline import Pipeline, Timings


@pytest.fixture
def exported(families, tmp_path):
    return partial(export, families, tmp_path)


def export(families, folder, config, cameras=2, decode_length=32, opset=23, **options):
    model = adapter_for(families.model(config))
    layout = families.layout(config, cameras)
    recipe = build_recipe(
        model.shape(config.model_type),
        layout,
        decode_length=decode_length,
        **{"budgets": (0.5,), "slopes": (0.0, 0.3), "pruning_points": (0,), **options},
    )
    bundle = export_bundle(model, recipe, folder / "bundle", {}, opset=opset)
    return model, bundle, OnnxRuntimeBackend(bundle, threads=1)


CASES = {
    "llava": ("llava", {}, {"scorer": Scorer(encoder_weight=0.5), "pruning_points": (0, 1)}),
    "llava, six images": ("llava", {}, {"cameras": 6, "decode_length": 4}),
    "qwen2.5": ("qwen2.5", {}, {"scorer": Scorer(encoder_weight=0.5, encoder="received")}),
    "qwen2.5, six images, tied": ("qwen2.5", {"tied": True}, {"cameras": 6, "decode_length": 4}),
    "qwen3": ("qwen3", {}, {"camera_floors": {"CAM_0": 4}}),
    "qwen3, six images, merging": (
        "qwen3",
        {},
        {"cameras": 6, "decode_length": 4, "recovery": True, "opset": 18},
    ),
    "qwen3 without DeepStack": ("qwen3", {"deepstack": ()}, {"decode_length": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bundle_computes_what_transformers_and_the_eager_pruned_model_compute(families, exported, case):
    """Logits within 1e-4, the same greedy tokens and kept visual tokens; and TensorRT's parsers take it."""
    family, changes, options = CASES[case]
    model, bundle, backend = exported(families.configuration(family, **changes), **options)
    layout = bundle.recipe.layout
    padded = families.inputs(layout, 1, layout.length - 4)
    report = check_parity(bundle, backend, model, [families.inputs(layout, 0), padded])
    assert report.comparisons == 2 * len(bundle.recipe.buckets) and report.ties == 0
    assert 0 < max(*report.stage_error, report.logit_error, report.generate_error) < 1e-4
    targets = list(TARGETS) if bundle.manifest.options.opset == 18 else ["rtx"]
    assert lint_bundle(bundle, targets).findings == ()

    given = families.inputs(layout, 0)
    pixels = torch.from_numpy(given.pixel_values)
    wanted, _ = model.generate(given.token_ids, pixels, bundle.recipe.decode_length)
    pipeline = Pipeline(bundle, backend)
    pipeline.pixels[:] = given.pixel_values
    pipeline.encode(Timings())
    full = bundle.recipe.buckets[0]
    tokens = [int(pipeline.prefill(given.token_ids, given.length, lambda _: full, Timings()).logits.argmax())]
    while len(tokens) < bundle.recipe.decode_length:
        tokens.append(int(pipeline.decode(tokens[-1], Timings()).argmax()))
    assert tokens == wanted.tolist()


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("llava", "fp32"),
        ("qwen2.5", "bf16"),
        ("qwen3", "fp16"),
        pytest.param("llava", "fp16", marks=pytest.mark.slow),
        pytest.param("llava", "bf16", marks=pytest.mark.slow),
        pytest.param("qwen2.5", "fp16", marks=pytest.mark.slow),
        pytest.param("qwen3", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_streamed_export_is_the_one_from_memory_and_computes_what_the_model_does(
    families, family, precision, tmp_path
):
    """The whole bundle to the byte, from a checkpoint in bfloat16; then in the backend for its precision."""
    config = families.configuration(family)
    folder, layout = tmp_path / "checkpoint", families.layout(config, 2)
    model = families.model(config)
    for weights in model.parameters():
        weights.data = weights.data.bfloat16()
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.json").write_text("{}")
    whole, stored = adapter_for(model), open_stored(folder)
    recipe = build_recipe(
        whole.shape(family), layout, decode_length=4, budgets=(0.5,), slopes=(0.0,), pruning_points=(0,)
    )
    bundles = [
        export_bundle(model, recipe, tmp_path / name, {}, precision=precision)
        for name, model in (("streamed", stored), ("memory", whole))
    ]
    streamed, memory = (
        {path.name: path.read_bytes() for path in bundle.path.iterdir()} for bundle in bundles
    )
    assert streamed.keys() == memory.keys() and len(streamed["weights.data"]) > 50_000
    assert [name for name in memory if streamed[name] != memory[name]] == []
    assert all(parameter.is_meta for parameter in stored.model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in whole.model.parameters())

    bundle, given = bundles[0], families.inputs(layout, 0, layout.length - 3)
    if precision == "bf16":
        with pytest.raises(BackendError, match=r"no bfloat16 MatMul.*--backend torch.*--precision fp16"):
            OnnxRuntimeBackend(bundle)
    backend = TorchBackend(bundle) if precision == "bf16" else OnnxRuntimeBackend(bundle, threads=1)
    report = check_parity(bundle, backend, whole, [given])
    graphwise = check_stages(
        bundle, stored, given.pixel_values, given.token_ids, given.length, tolerance=TOLERANCES[precision]
    )
    rounding = {"fp32": 1e-8, "fp16": 1e-4, "bf16": 1e-3}[precision]
    assert rounding < max(report.stage_error) < TOLERANCES[precision]
    assert rounding < max(graphwise.errors.values()) < TOLERANCES[precision]


@pytest.mark.parametrize("family", ["llava", "qwen2.5", "qwen3"])
def test_the_length_of_the_padding_changes_nothing(families, family):
    """The same text under two paddings, with different rubbish in them: the same bits, tokens and answer."""
    from vla_autoprune.export.eager import encode_eager, run_eager

    config = families.configuration(family)
    model = adapter_for(families.model(config))
    tight = families.layout(config, 2)
    loose = PromptLayout(segments=(*tight.segments[:-1], ("text", 30)), image_size=tight.image_size)
    given = families.inputs(tight, 0)
    runs = []
    for layout, rubbish in ((tight, 0), (loose, 7), (loose, 40)):
        shape = model.shape("random")
        recipe = build_recipe(shape, layout, decode_length=6, budgets=(0.5,), pruning_points=(0,))
        ids = np.pad(given.token_ids, (0, layout.length - tight.length), constant_values=rubbish)
        features, score, deepstack = encode_eager(model, recipe, given.pixel_values)
        bucket = recipe.buckets[1]
        runs.append(run_eager(model, recipe, bucket, ids, tight.length, features, score, deepstack=deepstack))
    for run in runs[1:]:
        assert run.complexity == pytest.approx(runs[0].complexity, abs=1e-5)
        assert [kept.tolist() for kept in run.kept_visual] == [kept.tolist() for kept in runs[0].kept_visual]
        assert run.tokens.tolist() == runs[0].tokens.tolist()
        assert np.abs(run.logits - runs[0].logits).max() < 1e-4


def test_another_rig_is_refused_with_the_difference(families):
    config = families.configuration("qwen3")
    model = adapter_for(families.model(config))
    layout = families.layout(config, 2)
    shape = model.shape("random")

    def refused(message, segments=layout.segments, size=layout.image_size, **scorer):
        with pytest.raises(RecipeError, match=message):
            model.tower(PromptLayout(segments=segments, image_size=size), Scorer(**scorer))

    refused(r"image_size is \(33, 24\); this model takes multiples of 8", size=(33, 24))
    refused("layout gives CAM_0 12 visual tokens; images of .* give 16", size=(32, 32))
    refused("has no .CLS. row: take 'received'", encoder_weight=1.0)
    refused("encoder_layer is 9", encoder_weight=1.0, encoder="received", encoder_layer=9)
    touching = (("text", 3), ("visual", "A", 12), ("visual", "B", 12), ("text", 9))
    with pytest.raises(RecipeError, match="two visual spans without text between them"):
        model.rotary(PromptLayout(segments=touching, image_size=(32, 24)), 60)
    with pytest.raises(RecipeError, match="renumbering would destroy"):
        build_recipe(shape, layout, decode_length=2, budgets=(0.8,), positions="compact")
    with pytest.raises(RecipeError, match=r"this model's CLIP tower takes \(32, 32\)"):
        adapter_for(families.model(families.configuration("llava"))).tower(layout, Scorer())


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "variant", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 8.0, **LLAMA3}]
)
def test_scaled_rotary_tables_are_the_models_own(families, variant):
    from vla_autoprune.export.eager import encode_eager, run_eager

    config = families.configuration("llava")
    config.text_config.rope_parameters = {"rope_theta": 1e4, **variant}
    model = adapter_for(families.model(config))
    layout = families.layout(config, 2)
    recipe = build_recipe(model.shape("random"), layout, decode_length=6, budgets=(0.6,))
    given = families.inputs(layout, 0)
    features, score, _ = encode_eager(model, recipe, given.pixel_values)
    run = run_eager(model, recipe, recipe.buckets[0], given.token_ids, given.length, features, score)
    tokens, logits = model.generate(given.token_ids, torch.from_numpy(given.pixel_values), 6)
    assert run.tokens.tolist() == tokens.tolist() and np.abs(run.logits - logits.numpy()).max() < 1e-4


def test_patches_are_laid_out_as_the_image_processor_lays_them_out(families):
    """The graph's patch layout, from plain pixels, against transformers' own preprocessing."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from vla_autoprune.models.preprocess import Preprocessing

    images = np.random.default_rng(0).integers(0, 255, (2, 24, 32, 3), dtype=np.uint8)
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.27, 0.28)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False, image_mean=mean, image_std=std
    )
    wanted = processor(list(images), return_tensors="pt")
    names = ("CAM_FRONT", "CAM_BACK")
    ours = Preprocessing(cameras=names, width=32, height=24, mean=mean, std=std)
    pixels = ours.apply(dict(zip(names, images, strict=True)))
    model = adapter_for(families.model(families.configuration("qwen3")))
    given = model.image_inputs(torch.zeros(1, 4, dtype=torch.long), torch.from_numpy(pixels))
    assert torch.equal(given["image_grid_thw"], wanted["image_grid_thw"])
    assert (given["pixel_values"] - wanted["pixel_values"]).abs().max() < 1e-5


def test_received_attention_is_what_the_towers_own_attention_gives(families):
    """Read off transformers' eager attention, layer by layer, image by image."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import eager_attention_forward

    from vla_autoprune.models.adapter import attend_through

    config = families.configuration("qwen3")
    model = adapter_for(families.model(config))
    layout = families.layout(config, 2)
    pixels = torch.from_numpy(families.inputs(layout, 0).pixel_values)
    seen = []

    def watched(*given, **options):
        output, weights = eager_attention_forward(*given, **options)
        seen.append(weights)
        return output, weights

    given = model.image_inputs(torch.zeros(1, 4, dtype=torch.long), pixels)
    with torch.no_grad(), attend_through(model.visual.config, "watched", watched):
        wanted = model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
    for layer in range(3):
        scorer = Scorer(encoder_weight=1.0, encoder="received", encoder_layer=layer)
        with torch.no_grad():
            features, score, deepstack = model.tower(layout, scorer)(pixels)
        of_layer = torch.cat(seen[2 * layer : 2 * layer + 2])  # one call per image
        received = of_layer.mean(dim=(1, 2)).reshape(2, -1, 4).mean(dim=2)
        assert score.shape == (2, 12) and (score - received).abs().max() < 1e-6
    assert (features.flatten(0, 1) - wanted.pooler_output).abs().max() < 1e-4
    assert (deepstack - torch.stack(wanted.deepstack_features)).abs().max() < 1e-4
