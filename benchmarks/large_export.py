"""How much memory does an export take that streams its weights? A random LLaVA with the shapes of 1.5-7B.

Each depth is written to disk in half precision, shard by shard, exported by a process of its own, and removed
again. The peak (VmHWM) of that process stands beside the weights of its largest stage: it must not grow with
the depth while the stages stay as large.

    python benchmarks/large_export.py --layers 4 8 --stage-layers 2
    python benchmarks/large_export.py --layers 32 --stage-layers 4    # 13 GiB, twice on disk
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import shapes

GIB = 2**30
ALLOWED_BEYOND_STAGE_GIB = 2.0


def write_checkpoint(folder: Path, layers: int, shrink: int) -> int:
    """Write a random checkpoint, one shard per module of the second level; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    folder.mkdir(parents=True)
    config = shapes.configuration(shapes.LLAVA, layers, shrink=shrink)
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.state_dict().items():
        layer = re.search(r"language_model\.layers\.(\d+)", name)
        group = f"layer {layer[1]}" if layer else name.split(".")[1]
        groups.setdefault(group, {})[name] = parameter
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for number, group in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, shape_of in group.items():
            values = torch.empty(shape_of.shape, dtype=torch.float16).normal_(0, 0.02, generator=generator)
            tensors[name] = values + 1 if name.endswith("norm.weight") else values
            weight_map[name] = file
            total += values.nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def export(options: argparse.Namespace) -> None:
    """The child: export one checkpoint, check it stage by stage, print the peaks as JSON."""
    import numpy as np
    import torch

    from engines.parity import TOLERANCES
    from engines.stage_parity import check_stages
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.export.export import export_bundle
    from vla_autoprune.models.stored_weights import open_stored
    from vla_autoprune.recipe import Scorer
    from vla_autoprune.recipe_building import build_recipe

    torch.set_num_threads(options.threads)
    layers = options.layers[0]
    begin, before = time.perf_counter(), peak_gib()
    model = open_stored(options.export)
    layout = shapes.layout(shapes.LLAVA)
    points = tuple(range(options.stage_layers - 1, layers - 1, options.stage_layers))
    recipe = build_recipe(
        model.shape(shapes.title(shapes.LLAVA, options.shrink)),
        layout,
        decode_length=8,
        pruning_points=points,
        budgets=(options.budget,),
        slopes=(0.0,),
        scorer=Scorer(encoder_weight=0.0),
    )
    hashed = time.perf_counter()
    peaks: dict[str, float] = {}
    seconds = {"hash": hashed - begin}
    errors: dict[str, float] = {}

    def say(what: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - begin:.0f} s, {what} {done}/{total}", file=sys.stderr, flush=True)

    def check(folder: Path) -> None:
        peaks["export"] = peak_gib()
        seconds["export"] = time.perf_counter() - hashed
        random = np.random.default_rng(0)
        report = check_stages(
            load_bundle(folder),
            model,
            random.normal(size=(1, 3, 336, 336)).astype(np.float32),
            random.integers(3, model.embedding.shape[0] // 2, layout.length),
            layout.length,
            tolerance=TOLERANCES[options.precision],
            progress=partial(say, "check"),
        )
        errors.update(report.errors)
        seconds["check"] = time.perf_counter() - hashed - seconds["export"]

    bundle = export_bundle(
        model,
        recipe,
        options.export.with_name("bundle"),
        {},
        precision=options.precision,
        opset=options.opset,
        check=check if options.check else None,
        progress=say,
    )
    peaks.setdefault("export", peak_gib())
    seconds["total"] = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "imports_gib": before,
                "export_peak_gib": peaks["export"],
                "check_peak_gib": peak_gib() if options.check else None,
                "seconds": seconds,
                "stages": len(recipe.stages),
                "bundle_gib": sum(entry.bytes for entry in bundle.manifest.files) / GIB,
                "largest_error": max(errors.values()) if errors else None,
            }
        )
    )


def peak_gib() -> float:
    """Peak resident memory of this process. Not ru_maxrss: across fork and exec it keeps the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / GIB


def measure(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Write, export and remove one checkpoint."""
    place = options.out / f"layers_{layers}"
    shutil.rmtree(place, ignore_errors=True)
    try:
        print(f"{layers} layers: writing", file=sys.stderr, flush=True)
        size = write_checkpoint(place / "checkpoint", layers, options.shrink)
        command = [sys.executable, __file__, "--export", str(place / "checkpoint")]
        command += ["--layers", str(layers)]
        for name in ("stage_layers", "precision", "opset", "threads", "budget"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--check"] if options.check else []
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(child.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(place, ignore_errors=True)
    text = shapes.configuration(shapes.LLAVA, layers, shrink=options.shrink).text_config
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    width = 4 if options.precision == "fp32" else 2
    stage = width * layer * options.stage_layers / GIB
    return {"layers": layers, "checkpoint_gib": size / GIB, "largest_stage_gib": stage, **result}


def markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The figures as a table, with what was asked of them."""
    import torch
    import transformers

    lines = [
        f"{shapes.title(shapes.LLAVA, options.shrink)}, random weights, {options.precision}, opset "
        f"{options.opset}, stages of {options.stage_layers} layers; {options.threads} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "| layers | checkpoint GiB | largest stage GiB | after imports GiB | peak of export GiB | beyond the "
        "stage | peak with check GiB | largest difference | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beyond = row["export_peak_gib"] - row["largest_stage_gib"]
        checked = "not run" if row["check_peak_gib"] is None else f"{row['check_peak_gib']:.2f}"
        error = "" if row["largest_error"] is None else f"{row['largest_error']:.1e}"
        lines.append(
            f"| {row['layers']} | {row['checkpoint_gib']:.2f} | {row['largest_stage_gib']:.2f} | "
            f"{row['imports_gib']:.2f} | {row['export_peak_gib']:.2f} | {beyond:.2f} | {checked} | {error} | "
            f"{row['seconds']['total']:.0f} |"
        )
    met = all(row["export_peak_gib"] - row["largest_stage_gib"] <= ALLOWED_BEYOND_STAGE_GIB for row in rows)
    lines += ["", f"- {'met' if met else '**not met**'}: peak at most the largest stage plus 2 GiB"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the options, measure every depth, write large_export.json and large_export.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/large_export"), help="for results")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="depths; the model's is 32")
    parser.add_argument("--shrink", type=int, default=1, help=shapes.SHRINK_HELP)
    parser.add_argument("--stage-layers", type=int, default=2, help="layers of each stage")
    parser.add_argument("--budget", type=float, default=0.7, help="few layers allow no less")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--opset", type=int, default=23)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--check", action="store_true", help="also compare stage by stage with the layers")
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export is not None:
        export(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [measure(layers, options) for layers in options.layers]
    (options.out / "large_export.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "large_export.md").write_text(markdown(rows, options))
    print(markdown(rows, options))


if __name__ == "__main__":
    main()
