"""Every family's real class, small and random: bundles against transformers and the eager pruned model."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from engines.lint import TARGETS, lint_bundle
from engines.onnxruntime import OnnxRuntimeBackend
from engines.parity import check_parity
from engines.verify import ModelInput
from vla_autoprune.errors import RecipeError
from vla_autoprune.export.export import export_bundle
from vla_autoprune.models.families import adapter_for
from vla_autoprune.recipe import PromptLayout, Scorer, build_recipe
from vla_autoprune.runtime.pipeline import Pipeline, Timings

IMAGE = 250
"""Token that stands for an image."""

TEXT = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}


def llava():
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(**TEXT, **HEADS, **SPECIAL, head_dim=12),
        image_token_index=IMAGE,
        vision_feature_layer=-2,  # as LLaVA-1.5 has it
    )


def qwen25(tied=False):
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "window_size": 16,  # 2 x 2 tokens; images of 3 x 4 tokens have windows of two sizes
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **TEXT,
            **HEADS,
            **SPECIAL,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        tie_word_embeddings=tied,
        **QWEN,
    )


def qwen3(deepstack=(0, 1)):
    return transformers.Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": list(deepstack),
        },
        text_config={
            **TEXT,
            **HEADS,
            **SPECIAL,
            "head_dim": 16,  # not hidden / heads
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        tie_word_embeddings=True,
        **QWEN,
    )


def random_model(config):
    """Spread out, so that attention has something to rank and no two words almost tie."""
    name = {
        "llava": "LlavaForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
    }[config.model_type]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for path, weights in model.named_parameters():
            if weights.ndim >= 2:
                weights.mul_(4.0)
            elif "norm" not in path and "ln" not in path:
                weights.normal_(std=0.1)
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def layout_for(config, cameras):
    """Several spans with text between them, as long as the suffix is."""
    size, tokens = ((32, 32), 16) if config.model_type == "llava" else ((32, 24), 12)
    spans: list[tuple] = [("text", 3)]
    for index in range(cameras):
        spans += [("visual", f"CAM_{index}", tokens), ("text", 2 if index < cameras - 1 else 9)]
    return PromptLayout(segments=tuple(spans), image_size=size)


def inputs_for(layout, seed, length=None):
    random = np.random.default_rng(seed)
    ids = random.integers(3, 249, layout.length)
    ids[layout.visual_positions] = IMAGE
    width, height = layout.image_size
    pixels = random.normal(size=(len(layout.cameras), 3, height, width)).astype(np.float32)
    return ModelInput(pixels, ids, length or layout.length)


def exported(config, folder, cameras=2, decode_length=32, opset=23, **options):
    model = adapter_for(random_model(config))
    layout = layout_for(config, cameras)
    recipe = build_recipe(
        model.shape(config.model_type),
        layout,
        decode_length=decode_length,
        **{"budgets": (0.5,), "slopes": (0.0, 0.3), "pruning_points": (0,), **options},
    )
    bundle = export_bundle(model, recipe, folder / "bundle", {}, opset=opset)
    return model, bundle, OnnxRuntimeBackend(bundle, threads=1)


CASES = {
    "llava": (llava, {"scorer": Scorer(encoder_weight=0.5), "pruning_points": (0, 1)}),
    "llava, six images": (llava, {"cameras": 6, "decode_length": 4}),
    "qwen2.5": (qwen25, {"scorer": Scorer(encoder_weight=0.5, encoder="received")}),
    "qwen2.5, six images, tied": (lambda: qwen25(tied=True), {"cameras": 6, "decode_length": 4}),
    "qwen3": (qwen3, {"camera_floors": {"CAM_0": 4}}),
    "qwen3, six images, merging": (
        qwen3,
        {"cameras": 6, "decode_length": 4, "recovery": True, "opset": 18},
    ),
    "qwen3 without DeepStack": (lambda: qwen3(()), {"decode_length": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bundle_computes_what_transformers_and_the_eager_pruned_model_compute(case, tmp_path):
    """Logits within 1e-4, the same greedy tokens and kept visual tokens; and TensorRT's parsers take it."""
    config, options = CASES[case]
    model, bundle, backend = exported(config(), tmp_path, **options)
    layout = bundle.recipe.layout
    padded = inputs_for(layout, 1, layout.length - 4)
    report = check_parity(bundle, backend, model, [inputs_for(layout, 0), padded])
    assert report.comparisons == 2 * len(bundle.recipe.buckets) and report.ties == 0
    assert 0 < max(*report.stage_error, report.logit_error, report.generate_error) < 1e-4
    targets = list(TARGETS) if bundle.manifest.options.opset == 18 else ["rtx"]
    assert lint_bundle(bundle, targets).findings == ()

    given = inputs_for(layout, 0)
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


@pytest.mark.parametrize("config", [llava, qwen25, qwen3])
def test_the_length_of_the_padding_changes_nothing(config):
    """The same text under two paddings, with different rubbish in them: the same bits, tokens and answer."""
    from vla_autoprune.export.eager import encode_eager, run_eager

    model = adapter_for(random_model(config()))
    tight = layout_for(config(), 2)
    loose = PromptLayout(segments=(*tight.segments[:-1], ("text", 30)), image_size=tight.image_size)
    given = inputs_for(tight, 0)
    runs = []
    for layout, rubbish in ((tight, 0), (loose, 7), (loose, 40)):
        shape = model.shape("random")
        recipe = build_recipe(shape, layout, decode_length=6, budgets=(0.5,), pruning_points=(0,))
        ids = np.pad(given.token_ids, (0, layout.length - tight.length), constant_values=rubbish)
        features, score, deepstack = encode_eager(model, recipe, given.pixel_values)
        bucket = recipe.buckets[1]
        runs.append(
            run_eager(model, recipe, bucket, ids, tight.length, features, score, deepstack=deepstack)
        )
    for run in runs[1:]:
        assert run.complexity == pytest.approx(runs[0].complexity, abs=1e-5)
        assert [kept.tolist() for kept in run.kept_visual] == [kept.tolist() for kept in runs[0].kept_visual]
        assert run.tokens.tolist() == runs[0].tokens.tolist()
        assert np.abs(run.logits - runs[0].logits).max() < 1e-4


def test_another_rig_is_refused_with_the_difference():
    model = adapter_for(random_model(qwen3()))
    layout = layout_for(qwen3(), 2)
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
        adapter_for(random_model(llava())).tower(layout, Scorer())


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "variant", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 8.0, **LLAMA3}]
)
def test_scaled_rotary_tables_are_the_models_own(variant):
    from vla_autoprune.export.eager import encode_eager, run_eager

    config = llava()
    config.text_config.rope_parameters = {"rope_theta": 1e4, **variant}
    model = adapter_for(random_model(config))
    layout = layout_for(config, 2)
    recipe = build_recipe(model.shape("random"), layout, decode_length=6, budgets=(0.6,))
    given = inputs_for(layout, 0)
    features, score, _ = encode_eager(model, recipe, given.pixel_values)
    run = run_eager(model, recipe, recipe.buckets[0], given.token_ids, given.length, features, score)
    tokens, logits = model.generate(given.token_ids, torch.from_numpy(given.pixel_values), 6)
    assert run.tokens.tolist() == tokens.tolist() and np.abs(run.logits - logits.numpy()).max() < 1e-4


def test_patches_are_laid_out_as_the_image_processor_lays_them_out():
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
    model = adapter_for(random_model(qwen3()))
    given = model.image_inputs(torch.zeros(1, 4, dtype=torch.long), torch.from_numpy(pixels))
    assert torch.equal(given["image_grid_thw"], wanted["image_grid_thw"])
    assert (given["pixel_values"] - wanted["pixel_values"]).abs().max() < 1e-5


def test_received_attention_is_what_the_towers_own_attention_gives():
    """Read off transformers' eager attention, layer by layer, image by image."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import eager_attention_forward

    from vla_autoprune.models.adapter import attend_through

    model = adapter_for(random_model(qwen3()))
    layout = layout_for(qwen3(), 2)
    pixels = torch.from_numpy(inputs_for(layout, 0).pixel_values)
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
