"""Does less work take less time? Prefill of a random model: transformers, unpruned and pruned bundles.

Everything runs in one process in turns, so that a busy machine slows all of it alike; medians are compared.
Memory is measured in processes of their own.

    python benchmarks/prefill.py --out out/prefill
    python benchmarks/prefill.py --layers 12 --hidden 384 --rounds 3   # a quick look
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vla_autoprune.profiling.machine import cpu_name, peak_host_mib

CAMERAS = 6
TEXT_BEFORE, TEXT_AFTER = 4, 96
PATCH = 14
BUDGETS = (0.5, 0.35, 0.25, 0.11)
COMPARED = (0.5, 0.25, 0.11)
SPEED_UP_TARGET = 0.9
"""Times 1 / work."""
SELECTION_TARGET = 0.02
MEMORY_TARGET = 1.05


def build(options: argparse.Namespace) -> tuple[Any, Any]:
    """A random model in float32 and its recipe: one slope per budget, default pruning points."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vla_autoprune.models.families import adapter_for
    from vla_autoprune.recipe import PromptLayout
    from vla_autoprune.recipe_building import build_recipe

    side = round(options.tokens_per_camera**0.5)
    size = side * PATCH
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=size,
            patch_size=PATCH,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=1024,
            hidden_size=options.hidden,
            intermediate_size=int(2.75 * options.hidden),
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 64,
            max_position_embeddings=8192,
        ),
        image_token_index=1000,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    spans: list[tuple] = [("text", TEXT_BEFORE)]
    spans += [("visual", f"CAM_{index}", side * side) for index in range(CAMERAS)]
    layout = PromptLayout(segments=(*spans, ("text", TEXT_AFTER)), image_size=(size, size))
    adapter = adapter_for(model)
    recipe = build_recipe(adapter.shape("random"), layout, decode_length=12, budgets=BUDGETS, slopes=(0.2,))
    return adapter, recipe


def one_bucket_of(five: Path, one: Path, recipe: Any) -> None:
    """The same bundle with nothing but the unpruned bucket; files are linked, not copied."""
    from vla_autoprune import bundle, contract
    from vla_autoprune.recipe import write_recipe
    from vla_autoprune.recipe_building import build_recipe

    alone = build_recipe(recipe.model, recipe.layout, decode_length=recipe.decode_length, budgets=())
    manifest = bundle.read_manifest(five)
    one.mkdir()
    for entry in manifest.files:
        if entry.path not in (bundle.RECIPE, f"{contract.SELECT}.onnx"):
            os.link(five / entry.path, one / entry.path)
    write_recipe(alone, one / bundle.RECIPE)
    bundle.write_manifest(one, alone, contract.graphs(alone, 1024), manifest.options)


def memory_of(path: Path, threads: int) -> float:
    """Peak resident MiB of a process that loads a bundle and runs each of its buckets twice."""
    command = [sys.executable, __file__, "--memory-of", str(path), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def run_for_memory(options: argparse.Namespace) -> None:
    """The child of `memory_of`."""
    pipeline = open_pipeline(options.memory_of, options)
    for bucket in (*pipeline.recipe.buckets, *pipeline.recipe.buckets):
        prefill(pipeline, bucket, prompt_of(pipeline.recipe))
    print(peak_host_mib())


def open_pipeline(path: Path, options: argparse.Namespace) -> Any:
    """A pipeline on a bundle, its images encoded."""
    from engines.onnxruntime import OnnxRuntimeBackend
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.runtime.pipeline import Pipeline, Timings

    loaded = load_bundle(path)
    pipeline = Pipeline(loaded, OnnxRuntimeBackend(loaded, threads=options.threads))
    pipeline.pixels[:] = np.random.default_rng(0).normal(size=pipeline.pixels.shape)
    pipeline.encode(Timings())
    return pipeline


def prompt_of(recipe: Any) -> np.ndarray:
    """[N] random words."""
    return np.random.default_rng(1).integers(2, 900, recipe.layout.length)


def prefill(pipeline: Any, bucket: Any, token_ids: np.ndarray) -> dict[str, float]:
    """Milliseconds per step of one prefill."""
    from vla_autoprune.runtime.pipeline import Timings

    timings = Timings()
    pipeline.prefill(token_ids, len(token_ids), lambda _: bucket, timings)
    return timings.ms


def transformers_prefill(
    adapter: Any, pipeline: Any, token_ids: np.ndarray
) -> Callable[[], dict[str, float]]:
    """The same prompt through transformers' own forward with SDPA, cache and the last row's logits."""
    import torch

    embedded = adapter.embedding[torch.from_numpy(token_ids)][None].clone()
    embedded[0, torch.from_numpy(pipeline.recipe.layout.visual_positions)] = torch.from_numpy(
        pipeline.features()[0].copy()
    )

    def run() -> dict[str, float]:
        begin = time.perf_counter()
        with torch.no_grad():
            adapter.model(inputs_embeds=embedded, use_cache=True, logits_to_keep=1)
        return {"prefill": 1e3 * (time.perf_counter() - begin)}

    return run


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Export, run in turns, and put the figures together."""
    import torch
    from rich.progress import Progress

    from vla_autoprune.export.export import export_bundle

    torch.set_num_threads(options.threads)
    adapter, recipe = build(options)
    five, one = options.out / "five_buckets", options.out / "one_bucket"
    with Progress() as progress:
        task = progress.add_task("export", total=None)
        export_bundle(
            adapter,
            recipe,
            five,
            {},
            opset=options.opset,
            progress=lambda what, done, total: progress.update(
                task, description=f"export {what}", completed=done, total=total
            ),
        )
        if not one.exists():
            one_bucket_of(five, one, recipe)
        pipeline = open_pipeline(five, options)
        token_ids = prompt_of(recipe)
        compared = [recipe.bucket("full"), *(recipe.buckets_of(budget)[0] for budget in COMPARED)]
        runs: dict[str, Callable[[], dict[str, float]]] = {
            "transformers": transformers_prefill(adapter, pipeline, token_ids)
        }
        for bucket in compared:
            runs[bucket.name] = lambda bucket=bucket: prefill(pipeline, bucket, token_ids)  # type: ignore[misc]
        for run in runs.values():
            run()
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        task = progress.add_task("prefill", total=options.rounds * len(runs))
        for _ in range(options.rounds):
            for name, run in runs.items():
                rounds[name].append(run())
                progress.advance(task)
        progress.add_task("memory", total=None)
        peaks = {path.name: memory_of(path, options.threads) for path in (five, one)}
    medians = {
        name: {step: statistics.median(run[step] for run in of_name) for step in of_name[0]}
        for name, of_name in rounds.items()
    }
    disk = {path.name: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in (five, one)}
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": _versions(),
        "command": " ".join(["python", *sys.argv]),
        "model": {
            "layers": options.layers,
            "hidden": options.hidden,
            "visual_tokens": recipe.layout.visual_tokens,
            "text_tokens": recipe.layout.text_tokens,
            "pruning_points": list(recipe.pruning_points),
            "recipe_sha256": recipe.sha256,
        },
        "prefill_ms": {
            name: [round(run["prefill"], 2) for run in of_name] for name, of_name in rounds.items()
        },
        "median_ms": {name: {k: round(v, 3) for k, v in steps.items()} for name, steps in medians.items()},
        "rows": [_row(bucket, medians) for bucket in compared],
        "memory_mib": peaks,
        "memory_ratio": peaks[five.name] / peaks[one.name],
        "disk_bytes": disk,
        "disk_ratio": disk[five.name] / disk[one.name],
    }


def _row(bucket: Any, medians: dict[str, dict[str, float]]) -> dict[str, Any]:
    steps = medians[bucket.name]
    selection = sum(value for step, value in steps.items() if step.startswith("select"))
    speed_up = medians["full"]["prefill"] / steps["prefill"]
    return {
        "bucket": bucket.name,
        "visual_tokens_into_layers": float(np.mean(bucket.visual_tokens_into_layers)),
        "work": bucket.work_fraction,
        "prefill_ms": steps["prefill"],
        "speed_up": speed_up,
        "speed_up_over_ideal": speed_up * bucket.work_fraction,
        "speed_up_over_transformers": medians["transformers"]["prefill"] / steps["prefill"],
        "selection_share": selection / steps["prefill"],
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table, with what was asked of them."""
    model = result["model"]
    lines = [
        f"Prefill of a random model: {model['layers']} layers, hidden {model['hidden']}, "
        f"{model['visual_tokens']} visual and "
        f"{model['text_tokens']} text tokens, pruning after layers "
        f"{', '.join(map(str, model['pruning_points']))}; "
        f"{result['machine']['cpu']}, {result['versions']}. Medians of {len(result['prefill_ms']['full'])} "
        "turns.",
        "",
        "| | visual tokens into layers | work | prefill ms | speed-up | of 1/work | over transformers SDPA | "
        "selection |",
        "|---|---|---|---|---|---|---|---|",
        f"| transformers SDPA | {model['visual_tokens']} | 100 % | "
        f"{result['median_ms']['transformers']['prefill']:.0f} | | | 1.00 | |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['bucket']} | {row['visual_tokens_into_layers']:.0f} | {row['work']:.1%} | "
            f"{row['prefill_ms']:.0f} | "
            f"{row['speed_up']:.2f} | {row['speed_up_over_ideal']:.2f} | "
            f"{row['speed_up_over_transformers']:.2f} | "
            f"{row['selection_share']:.1%} |"
        )
    pruned = result["rows"][1:]
    checks = {
        f"speed-up at least {SPEED_UP_TARGET} of 1/work": all(
            row["speed_up_over_ideal"] >= SPEED_UP_TARGET for row in pruned
        ),
        f"selection at most {SELECTION_TARGET:.0%} of prefill": all(
            row["selection_share"] <= SELECTION_TARGET for row in pruned
        ),
        f"peak memory of five buckets {result['memory_ratio']:.3f} of one (at most {MEMORY_TARGET})": result[
            "memory_ratio"
        ]
        <= MEMORY_TARGET,
        f"disk of five buckets {result['disk_ratio']:.3f} of one (at most {MEMORY_TARGET})": result[
            "disk_ratio"
        ]
        <= MEMORY_TARGET,
    }
    lines += ["", *(f"- {'met' if met else '**not met**'}: {what}" for what, met in checks.items())]
    return "\n".join(lines) + "\n"


def _versions() -> str:
    import onnxruntime
    import torch
    import transformers

    found = (onnxruntime, torch, transformers)
    return ", ".join(f"{module.__name__} {module.__version__}" for module in found)


def main() -> None:
    """Read the options, measure, write prefill.json and prefill.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/prefill"), help="for bundles and results")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens-per-camera", type=int, default=256, help="a square number; six cameras")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--opset", type=int, default=23)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of is not None:
        run_for_memory(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    (options.out / "prefill.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "prefill.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
