"""What every test shares: one thread per process, and where golden numbers and optional data lie."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job inherits this, and so would the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

with suppress(ModuleNotFoundError):
    from hypothesis import HealthCheck, settings

    # The same examples every time, on machines of any speed; --hypothesis-profile=default looks for new ones.
    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of golden numbers; VLA_GOLDEN_DIR replaces the one in the repository."""
    return Path(os.environ.get("VLA_GOLDEN_DIR", REPOSITORY / "tests" / "golden"))


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """Folder with data that is not in the repository (VLA_SHARED_DIR); tests skip without it."""
    folder = Path(os.environ.get("VLA_SHARED_DIR", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set VLA_SHARED_DIR to run this test")
    return folder


@pytest.fixture(scope="module")
def ros_domain() -> Iterator[int]:
    """A domain that no other tests on this machine use: they must not hear each other.

    The name of an abstract socket is the claim. It reaches as far as DDS does here, whoever runs the tests
    and wherever their files lie, and it ends with the process.
    """
    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as claim:
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        for domain in range(99, 0, -1):  # people take low ones
            with suppress(OSError):
                claim.bind(f"\0vla_autoprune tests in ROS domain {domain}")
                break
        else:
            raise AssertionError("every ROS domain from 1 to 99 is taken by other tests")
        yield domain


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short drives with six cameras, CAN bus and map: to be read, not changed."""
    from eval_nuscenes.nuscenes_writer import dataset_options, write_dataset

    root = tmp_path_factory.mktemp("synthetic") / "data"
    options = dataset_options(
        scenes=2, duration_s=5.0, width=160, height=90, val_fraction=1.0, calibration_fraction=0.0
    )
    write_dataset(root, options, workers=1)
    return root


@pytest.fixture(scope="session")
def stored_bundle():
    """`tiny_bundles["plain"]` as it was once exported: runs where torch is not installed."""
    pytest.importorskip("onnxruntime")
    from vla_autoprune.bundle import load_bundle

    return load_bundle(REPOSITORY / "tests" / "data" / "tiny_bundle")


@pytest.fixture(scope="session")
def floored_bundle(stored_bundle, tiny_vla, tmp_path_factory):
    """`stored_bundle` with a floor of 9 tokens for CAM_BACK_LEFT: another recipe and selection, no more."""
    pytest.importorskip("onnxscript")
    from vla_autoprune import contract
    from vla_autoprune.bundle import load_bundle, write_manifest
    from vla_autoprune.export.export import trace
    from vla_autoprune.models.adapter import LlavaAdapter
    from vla_autoprune.recipe import write_recipe
    from vla_autoprune.recipe_building import with_camera_floors

    folder = shutil.copytree(stored_bundle.path, tmp_path_factory.mktemp("floors") / "floored")
    recipe = with_camera_floors(stored_bundle.recipe, {"CAM_BACK_LEFT": 9})
    (vocabulary,) = stored_bundle.graphs[contract.HEAD].outputs[0].shape[1:]
    graphs = contract.graphs(recipe, vocabulary)
    selection = next(graph for graph in graphs if graph.name == contract.SELECT)
    options = stored_bundle.manifest.options
    proto = trace(LlavaAdapter(tiny_vla.model), recipe, selection, options.opset)
    (folder / f"{contract.SELECT}.onnx").write_bytes(proto.SerializeToString())
    write_recipe(recipe, folder / "recipe.json")
    write_manifest(folder, recipe, graphs, options)
    return load_bundle(folder)


@pytest.fixture(scope="session")
def recorded(stored_bundle, tmp_path_factory):
    """`stored_bundle` with a sample of what ONNX Runtime itself answers, in place of an original model."""
    import numpy as np

    from engines.onnxruntime import OnnxRuntimeBackend
    from engines.verify import Answer, Sample, feature_rows, text_rows, write_sample
    from vla_autoprune.bundle import load_bundle, write_manifest
    from vla_autoprune.runtime.pipeline import Pipeline, Timings

    folder = shutil.copytree(stored_bundle.path, tmp_path_factory.mktemp("verify") / "bundle")
    recipe = stored_bundle.recipe
    pipeline = Pipeline(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1))
    pixels = np.random.default_rng(0).normal(size=pipeline.pixels.shape).astype(np.float32)
    ids = np.full(recipe.layout.length, 20)
    answers = {}
    for bucket in recipe.buckets:
        hidden, scores = [], []

        def inspect(stage, read, hidden=hidden, scores=scores):
            hidden.append(read("hidden_out")[0].copy())
            if stage < len(recipe.pruning_points):
                scores.append(read("score").copy())

        pipeline.pixels[:] = pixels
        pipeline.encode(Timings())
        run = pipeline.prefill(ids, len(ids), lambda _, b=bucket: b, Timings(), inspect=inspect)
        kept, logits = run.kept_visual, [run.logits.copy()]
        for _ in range(2):
            logits.append(pipeline.decode(int(logits[-1].argmax()), Timings()).copy())
        answers[bucket.name] = Answer(
            tokens=np.stack(logits).argmax(axis=1),
            logits=np.stack(logits),
            kept=kept,
            scores=tuple(scores),
            hidden=tuple(
                rows[text_rows(recipe.layout, k, len(ids))] for rows, k in zip(hidden, kept, strict=True)
            ),
        )
    features = feature_rows(pipeline.features()[0]).copy()
    (folder / "samples").mkdir()
    sample = Sample(pixels, ids, len(ids), run.complexity, features, answers)
    write_sample(folder / "samples" / "sample_00.npz", sample)
    write_manifest(folder, recipe, list(stored_bundle.graphs.values()), stored_bundle.manifest.options)
    return load_bundle(folder)


@pytest.fixture(scope="session")
def tiny_vla():
    """The driving VLA, very small and untrained, but biased to answer with well-formed plans."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from vla_autoprune.models.driving_vla import ModelSize, build_model

    torch.set_num_threads(1)
    size = ModelSize(image_size=64, layers=4, width=32, heads=4, kv_heads=2, feed_forward=48, tower_layers=2)
    vla = build_model(size, seed=1)
    with torch.no_grad():
        for name, weights in vla.model.named_parameters():
            if "layers" in name and weights.ndim == 2:
                weights.mul_(6.0)  # attention of a fresh model is almost uniform; ranking needs differences
        words, answers = vla.model.get_input_embeddings().weight, vla.model.get_output_embeddings().weight
        distances, curvatures = (
            slice(t.start, t.stop) for t in (vla.codec.tokens_at(0), vla.codec.tokens_at(1))
        )
        answers.normal_(std=0.3, generator=torch.Generator().manual_seed(0))  # no two words almost tie
        words[:, 0], answers[:, 0] = 3.0, 0.0
        words[distances, 0] = -3.0
        answers[distances, 0], answers[curvatures, 0] = 1.0, -1.0
    return vla


@pytest.fixture(scope="session")
def tiny_recipes(tiny_vla):
    """Recipes for `tiny_vla`: plain, and one that merges, renumbers, fuses, and keeps floors."""
    from vla_autoprune.models.adapter import LlavaAdapter
    from vla_autoprune.recipe import Scorer
    from vla_autoprune.recipe_building import build_recipe

    shape = LlavaAdapter(tiny_vla.model).shape("tiny")
    common = {"decode_length": 12, "pruning_points": (0, 2), "slopes": (0.0, 0.3)}
    plain = build_recipe(shape, tiny_vla.prompt.layout, budgets=(0.6, 0.4), **common)
    rich = build_recipe(
        shape,
        tiny_vla.prompt.layout,
        budgets=(0.5,),
        recovery=True,
        scorer=Scorer(reduction="max", encoder_weight=0.5),
        camera_floors={"CAM_FRONT": 6, "CAM_BACK": 2},
        positions="compact",
        **common,
    )
    return {"plain": plain, "rich": rich}


@pytest.fixture(scope="session")
def tiny_bundles(tiny_vla, tiny_recipes, tmp_path_factory):
    """Both recipes exported, opset 23 and 18, without a parity check: the tests are it."""
    pytest.importorskip("onnxscript")
    from vla_autoprune.export.export import export_bundle, text_files
    from vla_autoprune.models.adapter import LlavaAdapter

    folder = tmp_path_factory.mktemp("bundles")
    return {
        name: export_bundle(
            LlavaAdapter(tiny_vla.model), recipe, folder / name, text_files(tiny_vla), opset=opset
        )
        for (name, recipe), opset in zip(tiny_recipes.items(), (23, 18), strict=True)
    }


IMAGE_TOKEN = 250
"""Stands for images in the families' small models."""


@pytest.fixture(scope="session")
def families():
    """Every family's real class, small and random, with prompts and images for it."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return SimpleNamespace(
        configuration=_configuration, model=_random_model, layout=_layout, inputs=_prompt_and_images
    )


def _configuration(family, tied=None, deepstack=(0, 1)):
    """A family's configuration; `tied` embeddings and `deepstack` layers where it has such."""
    import transformers

    text = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    tower = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    marks = {"video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
    rotary = {"rope_type": "default", "rope_theta": 1e4}
    if family == "llava":
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            ),
            text_config=transformers.LlamaConfig(**text, head_dim=12),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2,  # as LLaVA-1.5 has it
        )
    if family == "qwen2.5":
        return transformers.Qwen2_5_VLConfig(
            vision_config={
                **tower,
                "window_size": 16,  # 2 x 2 tokens; images of 3 x 4 tokens have windows of two sizes
                "out_hidden_size": 64,
                "fullatt_block_indexes": [1],
            },
            text_config={**text, "rope_parameters": {**rotary, "mrope_section": [2, 2, 4]}},
            tie_word_embeddings=bool(tied),
            image_token_id=IMAGE_TOKEN,
            **marks,
        )
    assert family == "qwen3"
    return transformers.Qwen3VLConfig(
        vision_config={
            **tower,
            "out_hidden_size": 64,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": list(deepstack),
        },
        text_config={
            **text,
            "head_dim": 24,  # not hidden / heads
            "rope_parameters": {**rotary, "mrope_section": [4, 4, 4], "mrope_interleaved": True},
        },
        tie_word_embeddings=tied is not False,
        image_token_id=IMAGE_TOKEN,
        **marks,
    )


def _random_model(config):
    """Spread out, so that attention has something to rank and no two words almost tie."""
    import torch
    import transformers

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


def _layout(config, cameras):
    """Several spans with text between them, as long as the suffix is."""
    from vla_autoprune.recipe import PromptLayout

    size, tokens = ((32, 32), 16) if config.model_type == "llava" else ((32, 24), 12)
    spans: list[tuple] = [("text", 3)]
    for index in range(cameras):
        spans += [("visual", f"CAM_{index}", tokens), ("text", 2 if index < cameras - 1 else 9)]
    return PromptLayout(segments=tuple(spans), image_size=size)


def _prompt_and_images(layout, seed, length=None):
    import numpy as np

    from engines.verify import ModelInput

    random = np.random.default_rng(seed)
    ids = random.integers(3, IMAGE_TOKEN - 1, layout.length)
    ids[layout.visual_positions] = IMAGE_TOKEN
    width, height = layout.image_size
    pixels = random.normal(size=(len(layout.cameras), 3, height, width)).astype(np.float32)
    return ModelInput(pixels, ids, length or layout.length)
