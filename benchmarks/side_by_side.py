"""What a user would pick instead: the same frames and weights through five ways of planning, in turns.

transformers, unpruned, with SDPA; the unpruned bundle; pruning once before the decoder, as DART does on
embeddings; AutoPrune's buckets; and AutoPrune as it was published: full attention matrices and Python per
layer, pruning after every layer with merging and renumbered positions.

    python benchmarks/side_by_side.py --out out/side_by_side      # the shipped model
    python benchmarks/side_by_side.py --random --out out/mid_size # random weights; --layers, --hidden

The bundle it leaves in its folder can be profiled: vla-autoprune profile out/mid_size/bundle
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_autoprune.profiling.machine import cpu_name, machine_record
from vla_autoprune.profiling.percentiles import median_ratio

REFERENCE = "transformers, SDPA"
UNPRUNED = "bundle, unpruned"
BUCKET = "AutoPrune bucket"
PUBLISHED = "AutoPrune as published"
PIVOTS = 4
"""Of each image and of the text, as in TensorRT Edge-LLM."""

PARTS = ("vision", "prefill", "decode")
RATIOS = ("prefill_over_own_unpruned", "prefill_over_transformers", "plan_over_transformers")
"""Speed-ups. The first shows what pruning brings apart from what the runtime does: the bundle's bucket over
the unpruned bundle, every other way over unpruned transformers."""


@dataclass(frozen=True)
class Planned:
    """A frame planned one way: milliseconds of `PARTS`, and the tokens of its answer."""

    ms: dict[str, float]
    tokens: list[int]


Way = Callable[[tuple[np.ndarray, np.ndarray, int]], Planned]
"""Plans a frame: pixels, token ids, tokens before the padding."""


@dataclass(frozen=True)
class Case:
    """A model with its recipe and the frames it plans.

    Attributes:
        frames: pixels [c, 3, h, w], token ids [N] and tokens before the padding, of each.
    """

    adapter: Any
    recipe: Any
    texts: dict[str, str]
    frames: list[tuple[np.ndarray, np.ndarray, int]]


def answer_with_plans(vla: Any) -> None:
    """Bias random weights to alternate distances and curvatures, so that the runtime takes the answers."""
    import torch

    with torch.no_grad():
        words, answers = vla.model.get_input_embeddings().weight, vla.model.get_output_embeddings().weight
        distances, curvatures = (
            slice(t.start, t.stop) for t in (vla.codec.tokens_at(0), vla.codec.tokens_at(1))
        )
        answers.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        words[:, 0], answers[:, 0] = 3.0, 0.0
        words[distances, 0] = -3.0
        answers[distances, 0], answers[curvatures, 0] = 1.0, -1.0


def case_of(options: argparse.Namespace) -> Case:
    """A driving VLA, shipped or random, on images of noise and prompts of its own."""
    from vla_autoprune.bundle import RECIPE
    from vla_autoprune.export.export import text_files
    from vla_autoprune.frame import Command, EgoState
    from vla_autoprune.models.driving_vla import SHIPPED, ModelSize, build_model, load_shipped
    from vla_autoprune.models.families import adapter_for
    from vla_autoprune.recipe import read_recipe
    from vla_autoprune.recipe_building import build_recipe

    if options.random:
        heads = options.hidden // 64
        size = ModelSize(
            image_size=options.image_size,
            layers=options.layers,
            width=options.hidden,
            heads=heads,
            kv_heads=heads,
            feed_forward=round(2.75 * options.hidden),
        )
        vla = build_model(size)
        answer_with_plans(vla)
        shape = adapter_for(vla.model).shape("random")
        length = vla.codec.length
        recipe = build_recipe(shape, vla.prompt.layout, decode_length=length, budgets=options.budgets)
    else:
        vla, recipe = load_shipped(), read_recipe(SHIPPED / RECIPE)
    width, height = recipe.layout.image_size or (0, 0)
    generator = np.random.default_rng(0)
    frames = []
    for index in range(options.frames):
        pixels = generator.normal(size=(len(recipe.layout.cameras), 3, height, width)).astype(np.float32)
        ids = vla.prompt.build(EgoState(4.0 + index), Command.STRAIGHT)
        frames.append((pixels, ids, len(ids)))
    return Case(adapter_for(vla.model), recipe, text_files(vla), frames)


def one_shot(embedded: np.ndarray, layout: Any, length: int, keep: float) -> np.ndarray:
    """Rows that pruning once before the decoder keeps: the least like a few pivots, per image.

    Args:
        embedded: [N, d] text and visual embeddings.
        layout: where the visual rows are.
        length: rows before the padding.
        keep: share of each image's tokens.

    Returns:
        Ascending rows, text included.

    Source: DART (EMNLP 2025) on input embeddings, as TensorRT Edge-LLM describes it.
    """
    visual, text = layout.visual_positions, layout.text_positions
    text = text[text < length]
    unit = embedded / np.maximum(np.linalg.norm(embedded, axis=1, keepdims=True), 1e-8)
    weight = np.abs(embedded).sum(axis=1)
    text_pivots = text[np.argsort(-weight[text], kind="stable")[:PIVOTS]]
    kept = [text]
    for camera in range(len(layout.cameras)):
        pool = visual[layout.camera_of_visual == camera]
        quota = max(1, math.ceil(len(pool) * keep))
        own = pool[np.argsort(-weight[pool], kind="stable")[: min(PIVOTS, quota)]]
        chosen, pivots = list(own), [*own, *text_pivots]
        for number, pivot in enumerate(pivots):
            rest = np.setdiff1d(pool, chosen)
            share = math.ceil((quota - len(chosen)) / (len(pivots) - number))
            chosen += list(rest[np.argsort(unit[rest] @ unit[pivot], kind="stable")[:share]])
        kept.append(np.array(chosen))
    return np.sort(np.concatenate(kept))


def transformers_way(case: Case, steps: int, keep: float | None = None) -> Way:
    """Plans with transformers' own forward, pruned once before the decoder where a share is given."""
    import torch

    from vla_autoprune.export.eager import encode_eager

    adapter, layout = case.adapter, case.recipe.layout

    @torch.no_grad()
    def run(frame: tuple[np.ndarray, np.ndarray, int]) -> Planned:
        pixels, ids, length = frame
        begin = time.perf_counter()
        features = encode_eager(adapter, case.recipe, pixels)[0]
        encoded = time.perf_counter()
        embedded = adapter.embedding[torch.from_numpy(ids)].clone()
        embedded[torch.from_numpy(layout.visual_positions)] = torch.from_numpy(features)
        rows = np.arange(length) if keep is None else one_shot(embedded.numpy(), layout, length, keep)
        positions = torch.from_numpy(rows)
        answer = adapter.model(
            inputs_embeds=embedded[positions][None],
            position_ids=positions[None],
            attention_mask=torch.ones(1, len(rows), dtype=torch.long),
            use_cache=True,
            logits_to_keep=1,
        )
        prefilled = time.perf_counter()
        tokens = [int(answer.logits[0, -1].argmax())]
        for step in range(steps):
            answer = adapter.model(
                inputs_embeds=adapter.embedding[tokens[-1]][None, None],
                position_ids=torch.tensor([[length + step]]),
                attention_mask=torch.ones(1, len(rows) + step + 1, dtype=torch.long),
                past_key_values=answer.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens.append(int(answer.logits[0, -1].argmax()))
        return _planned(begin, encoded, prefilled, tokens)

    return run


def bundle_way(pipeline: Any, bucket: Any, steps: int) -> Way:
    """Plans of a bucket of the bundle."""
    from vla_autoprune.runtime.pipeline import Timings

    def run(frame: tuple[np.ndarray, np.ndarray, int]) -> Planned:
        pixels, ids, length = frame
        begin = time.perf_counter()
        pipeline.pixels[:] = pixels
        pipeline.encode(Timings())
        encoded = time.perf_counter()
        logits = pipeline.prefill(ids, length, lambda _: bucket, Timings()).logits
        prefilled = time.perf_counter()
        tokens = [int(logits.argmax())]
        for _ in range(steps):
            tokens.append(int(pipeline.decode(tokens[-1], Timings()).argmax()))
        return _planned(begin, encoded, prefilled, tokens)

    return run


def published_way(case: Case, budget: float, steps: int) -> Way:
    """The method of the published code on these weights: what it costs, not what it answers."""
    from vla_autoprune.export.eager import encode_eager, run_eager
    from vla_autoprune.recipe_building import build_recipe

    model, layout = case.recipe.model, case.recipe.layout
    prefill_only, whole = (
        build_recipe(
            model,
            layout,
            decode_length=length,
            budgets=(budget,),
            slopes=(0.2,),
            pruning_points=range(model.layers - 1),
            recovery=True,
            positions="compact",
        )
        for length in (1, steps + 1)
    )

    def run(frame: tuple[np.ndarray, np.ndarray, int]) -> Planned:
        pixels, ids, length = frame
        begin = time.perf_counter()
        features = encode_eager(case.adapter, case.recipe, pixels)[0]
        encoded = time.perf_counter()
        run_eager(case.adapter, prefill_only, prefill_only.buckets[1], ids, length, features, None)
        prefilled = time.perf_counter()
        answer = run_eager(case.adapter, whole, whole.buckets[1], ids, length, features, None)
        # The second run prefills again; what it takes longer is the decoding.
        whole_s, prefill_s = time.perf_counter() - prefilled, prefilled - encoded
        parts = (encoded - begin, prefill_s, max(whole_s - prefill_s, 0.0))
        ms = {name: 1e3 * seconds for name, seconds in zip(PARTS, parts, strict=True)}
        return Planned(ms, [int(token) for token in answer.tokens])

    return run


def _planned(begin: float, encoded: float, prefilled: float, tokens: list[int]) -> Planned:
    parts = (encoded - begin, prefilled - encoded, time.perf_counter() - prefilled)
    return Planned({name: 1e3 * seconds for name, seconds in zip(PARTS, parts, strict=True)}, tokens)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Export, plan every frame every way in turn, and put ratios together."""
    import torch

    from engines.onnxruntime import OnnxRuntimeBackend
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.export.export import export_bundle
    from vla_autoprune.progress import progress_bar
    from vla_autoprune.runtime.pipeline import Pipeline

    torch.set_num_threads(options.threads)
    case = case_of(options)
    recipe, path = case.recipe, options.out / "bundle"
    steps = recipe.decode_length - 1
    with progress_bar() as progress:
        task = progress.add_task("export", total=None)
        if not path.exists():
            export_bundle(case.adapter, recipe, path, case.texts)
        bundle = load_bundle(path)
        pipeline = Pipeline(bundle, OnnxRuntimeBackend(bundle, threads=options.threads))
        ways = {
            REFERENCE: transformers_way(case, steps),
            UNPRUNED: bundle_way(pipeline, recipe.buckets[0], steps),
        }
        for budget in options.budgets:
            ways[f"once before the decoder {budget:.0%}"] = transformers_way(case, steps, budget)
            ways[f"{BUCKET} {budget:.0%}"] = bundle_way(pipeline, recipe.buckets_of(budget)[0], steps)
            ways[f"{PUBLISHED} {budget:.0%}"] = published_way(case, budget, steps)
        for way in ways.values():
            way(case.frames[0])
        runs: dict[str, list[Planned]] = {name: [] for name in ways}
        progress.update(task, description="frames", total=len(case.frames) * len(ways))
        for frame in case.frames:
            for name, way in ways.items():
                runs[name].append(way(frame))
                progress.advance(task)
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_record(),
        "threads": options.threads,
        "model": recipe.model.model_dump(),
        "visual_tokens": recipe.layout.visual_tokens,
        "decoded": steps,
        "runs_ms": {name: [planned.ms for planned in each] for name, each in runs.items()},
        "rows": [_row(name, runs) for name in ways],
    }


def _row(name: str, runs: dict[str, list[Planned]]) -> dict[str, Any]:
    own, base = runs[name], runs[REFERENCE]
    unpruned = runs[UNPRUNED if name.startswith((UNPRUNED, BUCKET)) else REFERENCE]
    row: dict[str, Any] = {"way": name}
    for part in PARTS:
        row[part] = float(np.median([planned.ms[part] for planned in own]))
    for what, parts, beside in zip(
        RATIOS, (("prefill",), ("prefill",), PARTS), (unpruned, base, base), strict=True
    ):
        own_ms, beside_ms = (
            [sum(planned.ms[part] for part in parts) for planned in each] for each in (own, beside)
        )
        row[what] = median_ratio(own_ms, beside_ms, paired=True).model_dump()
    same = [np.mean(np.equal(one.tokens, two.tokens)) for one, two in zip(own, base, strict=True)]
    return {**row, "same_tokens": float(np.mean(same))}


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    model = result["model"]
    frames = len(next(iter(result["runs_ms"].values())))
    lines = [
        f"{model['layers']} layers, hidden {model['hidden']}, {result['visual_tokens']} visual tokens, "
        f"{result['decoded']} decoded tokens; {cpu_name()}, {result['threads']} threads, Python "
        f"{platform.python_version()}, load {result['machine']['load']}; medians of {frames} frames, all "
        "ways on each frame in turn. Speed-ups with their 95 % interval.",
        "",
        "| | vision ms | prefill ms | decode ms | prefill over the same runtime's unpruned | "
        "prefill over transformers | all three over transformers | same tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratios = []
        for what in RATIOS:
            ratio = row[what]
            bounds = "" if ratio["low"] is None else f" ({ratio['low']:.2f} … {ratio['high']:.2f})"
            ratios.append(f"{ratio['ratio']:.2f}{bounds}")
        parts = " | ".join(f"{row[part]:.1f}" for part in PARTS)
        lines.append(f"| {row['way']} | {parts} | {' | '.join(ratios)} | {row['same_tokens']:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the options, measure, write side_by_side.json and side_by_side.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/side_by_side"), help="for bundle and results")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.25], help="the recipe's; with --random any"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--random", action="store_true", help="a mid-size model instead of the shipped one")
    parser.add_argument("--layers", type=int, default=12, help="with --random")
    parser.add_argument("--hidden", type=int, default=512, help="with --random")
    parser.add_argument("--image-size", type=int, default=192, help="with --random; 16 pixels are a token")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    (options.out / "side_by_side.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "side_by_side.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
