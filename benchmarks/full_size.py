"""What would a full-size model cost here? One decoder layer of its shapes measured, extrapolated by layers.

A recipe of the full depth says how many rows enter each layer in each bucket. One layer with random weights
is exported and timed at each of these row counts, in turns; a bucket's prefill is the sum over its layers. A
decoded token is one row over each layer's cache, plus the head, of which a part of the vocabulary is timed
and multiplied. The vision tower is left out: pruning does not change it.

    python benchmarks/full_size.py --model llava-1.5-7b
    python benchmarks/full_size.py --model qwen2.5-vl-7b --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapes

from vla_autoprune.profiling.estimate import models

DECODE = 32
HEAD_PART = 16
"""The head is timed with that fraction of the vocabulary."""


def random_model(name: str, shrink: int) -> tuple[Any, int]:
    """Two decoder layers of a model's shapes in float32 with a small tower, and its full depth."""
    import torch
    import transformers

    from vla_autoprune.models.families import adapter_for

    torch.manual_seed(0)
    config = shapes.configuration(
        name, layers=2, part_of_vocabulary=HEAD_PART, small_tower=True, shrink=shrink
    )
    kind = getattr(transformers, config.architectures[0])
    return adapter_for(kind._from_config(config)), models()[name].decoder.layers


def recipes(model: Any, name: str, depth: int, budgets: tuple[float, ...]) -> tuple[Any, Any]:
    """The recipe of the full depth, and one of the two layers that are exported, a stage each."""
    from vla_autoprune.recipe import Scorer
    from vla_autoprune.recipe_building import build_recipe

    layout, shape = shapes.layout(name), model.shape(f"{name} shapes")
    common: dict[str, Any] = {"decode_length": DECODE, "slopes": (0.2,), "scorer": Scorer(encoder_weight=0.0)}
    full = build_recipe(shape.model_copy(update={"layers": depth}), layout, budgets=budgets, **common)
    return full, build_recipe(shape, layout, budgets=(0.6,), pruning_points=(0,), **common)


def sessions(model: Any, recipe: Any, folder: Path, threads: int) -> dict[str, tuple[Any, Any]]:
    """The last layer and the head, exported, in ONNX Runtime; with their graphs."""
    import onnxruntime

    from vla_autoprune import contract
    from vla_autoprune.export.export import WeightsFile, trace

    folder.mkdir(parents=True, exist_ok=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    made: dict[str, Any] = {}
    with WeightsFile(folder / "weights.data") as weights:
        for graph in contract.graphs(recipe, model.embedding.shape[0]):
            if graph.name in ("stage_01", contract.HEAD):
                proto = trace(model, recipe, graph, 23, "fp32", weights)
                (folder / f"{graph.name}.onnx").write_bytes(proto.SerializeToString())
                made[graph.name] = graph
    return {
        name: (graph, onnxruntime.InferenceSession(folder / f"{name}.onnx", sess_options=options))
        for name, graph in made.items()
    }


def runner(opened: tuple[Any, Any], sizes: dict[str, int], filled: int = 0) -> Callable[[], float]:
    """A function that runs a graph at these sizes, on random values, and gives milliseconds."""
    graph, session = opened
    random = np.random.default_rng(0)
    given: dict[str, Any] = {
        tensor.name: random.normal(size=tensor.pinned(sizes)).astype(np.float32)
        for tensor in graph.inputs
        if tensor.dtype == "float32"
    }
    if "past_length" in {tensor.name for tensor in graph.inputs}:
        given["past_length"] = np.array([filled])

    def run() -> float:
        begin = time.perf_counter()
        session.run(None, given)
        return 1e3 * (time.perf_counter() - begin)

    return run


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time one layer at every row count and cache length, and add up."""
    import onnxruntime
    import torch
    from rich.progress import Progress

    torch.set_num_threads(options.threads)
    from vla_autoprune.pruning.work import kv_mib

    with Progress() as progress:
        progress.add_task("export of one layer", total=None)
        model, depth = random_model(options.model, options.shrink)
        full, small = recipes(model, options.model, depth, tuple(options.budgets))
        opened = sessions(model, small, options.out / "graphs", options.threads)
        text = full.layout.text_tokens
        rows = {bucket.name: [text + v for v in bucket.visual_tokens_into_layers] for bucket in full.buckets}
        runs: dict[tuple[str, int], Callable[[], float]] = {
            ("head", 0): runner(opened["head"], {}),
            **{
                ("prefill", n): runner(opened["stage_01"], {"n": n, "s": 1})
                for n in {n for counts in rows.values() for n in counts}
            },
            **{
                ("decode", s): runner(opened["stage_01"], {"n": 1, "s": s}, s - 1)
                for s in {s for bucket in full.buckets for s in bucket.kv_tokens_per_layer}
            },
        }
        for run in runs.values():
            run()
        times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
        task = progress.add_task("layer and head, in turns", total=options.rounds * len(runs))
        for _ in range(options.rounds):
            for key, run in runs.items():
                times[key].append(run())
                progress.advance(task)
    median = {key: statistics.median(values) for key, values in times.items()}
    head = HEAD_PART * median["head", 0]
    buckets = [
        {
            "bucket": bucket.name,
            "visual_tokens_into_layers": float(np.mean(bucket.visual_tokens_into_layers)),
            "work": bucket.work_fraction,
            "prefill_ms": sum(median["prefill", n] for n in rows[bucket.name]) + head,
            "decode_ms": sum(median["decode", s] for s in bucket.kv_tokens_per_layer) + head,
            "kv_mib": kv_mib(full.model, bucket.kv_tokens_per_layer),
        }
        for bucket in full.buckets
    ]
    return {
        "model": options.model,
        "shrink": options.shrink,
        "layers": depth,
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": f"Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}",
        "layer_ms": {f"{kind} {size}": round(ms, 2) for (kind, size), ms in median.items()},
        "buckets": buckets,
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table, saying what was measured and what follows from it."""
    text = shapes.TEXT_BEFORE + shapes.TEXT_AFTER
    lines = [
        f"{shapes.title(result['model'], result['shrink'])}, random weights in float32: one decoder layer "
        f"measured (medians of {result['rounds']} turns), extrapolated to {result['layers']}; "
        f"1/{HEAD_PART} of the head measured, multiplied. {shapes.VISUAL} visual and {text} text tokens, "
        f"{DECODE} to decode, vision tower not counted. {result['threads']} CPU threads, "
        f"{result['versions']}.",
        "",
        "| bucket | visual tokens into the layers | work | prefill ms | decode ms a token | KV MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["buckets"]:
        lines.append(
            f"| {row['bucket']} | {row['visual_tokens_into_layers']:.0f} | {row['work']:.1%} | "
            f"{row['prefill_ms']:.0f} | {row['decode_ms']:.0f} | {row['kv_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the options, measure, write full_size.json and full_size.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/full_size"), help="for graphs and results")
    parser.add_argument("--model", choices=shapes.MODELS, default=shapes.LLAVA)
    parser.add_argument("--shrink", type=int, default=1, help=shapes.SHRINK_HELP)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.11])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    (options.out / "full_size.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "full_size.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
