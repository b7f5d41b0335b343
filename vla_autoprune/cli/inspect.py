"""`vla-autoprune inspect`: what is in a bundle."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.contract import ITEM_BYTES
from vla_autoprune.recipe import FULL

if TYPE_CHECKING:
    from vla_autoprune.bundle import Bundle


@app.command()
def inspect(
    bundle: Path = typer.Argument(metavar="BUNDLE", help="Directory that vla-autoprune export wrote."),
    as_json: bool = typer.Option(False, "--json", help="Print all of it as JSON, with every static shape."),
) -> None:
    """Check a bundle and print its contract: graphs, tensors, shapes per bucket, files, sizes, memory.

    Loading is the check: a bundle that is edited, mixed, incomplete or newer
    than this library is refused, and the file at fault is named.

    Example: vla-autoprune inspect out/bundle
    """
    from vla_autoprune.bundle import load_bundle

    loaded = load_bundle(bundle)
    if as_json:
        typer.echo(json.dumps(describe(loaded), indent=1))
        return
    console = Console(soft_wrap=True)
    manifest, recipe = loaded.manifest, loaded.recipe
    model = recipe.model
    console.print(
        f"[bold]{escape(str(bundle))}[/]: bundle version {manifest.bundle_version}, "
        f"id {manifest.bundle_id[:12]}, opset {manifest.options.opset}, {manifest.options.precision}\n"
        f"model {model.id}: {model.layers} layers of width {model.hidden}, {model.heads} heads over "
        f"{model.kv_heads} of keys; weights {manifest.weights_sha256[:12]}\n"
        f"prompt: {len(recipe.layout.cameras)} cameras, {recipe.layout.visual_tokens} visual and "
        f"{recipe.layout.text_tokens} text tokens; answers of up to {recipe.decode_length}",
        highlight=False,
    )
    for table in (_graphs(loaded), _tensors(loaded), _buckets(loaded), _files(loaded)):
        console.print(table)


def describe(bundle: Bundle) -> dict[str, Any]:
    """The manifest, with the static shape of every tensor in every variant and the bytes they take."""
    content: dict[str, Any] = bundle.manifest.model_dump(mode="json")
    for entry in content["graphs"]:
        graph = bundle.graphs[entry["name"]]
        entry["shapes"] = {variant: graph.shapes(variant) for variant in graph.variants}
        entry["tensor_bytes"] = {
            variant: tensor_bytes(bundle, graph.name, variant) for variant in graph.variants
        }
    content["buckets"] = {
        bucket.name: {
            "visual_tokens_into_layers": bucket.visual_tokens_into_layers,
            "work_fraction": bucket.work_fraction,
            "kv_mib": bundle.kv_mib(bucket),
            "unpruned_kv_mib": bundle.kv_mib(bundle.recipe.bucket(FULL)),
        }
        for bucket in bundle.recipe.buckets
    }
    return content


def tensor_bytes(bundle: Bundle, graph: str, variant: str) -> int:
    """Bytes of all inputs and outputs of a graph in one variant."""
    shapes = bundle.graphs[graph].shapes(variant)
    return sum(
        math.prod(shapes[tensor.name]) * ITEM_BYTES[tensor.dtype] for tensor in bundle.graphs[graph].tensors
    )


def _graphs(bundle: Bundle) -> Table:
    table = _table("graphs", "graph", "inputs", "outputs", "sets of shapes", "tensors MiB, largest")
    for name, graph in bundle.graphs.items():
        largest = max(tensor_bytes(bundle, name, variant) for variant in graph.variants)
        table.add_row(
            name, str(len(graph.inputs)), str(len(graph.outputs)), str(len(graph.variants)), _mib(largest)
        )
    return table


def _tensors(bundle: Bundle) -> Table:
    """Symbols stand for what a bucket pins; layers of a stage look alike, so the first stands for all."""
    table = _table("tensors", "graph", "tensor", "type", "shape")
    for name, graph in bundle.graphs.items():
        shown: set[tuple[str, Any]] = set()
        for kind, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                label = re.sub(r"^(past|new)_([kv])_\d+$", r"\1_\2_NN", tensor.name)
                if (label, kind) in shown:
                    continue
                shown.add((label, kind))
                shape = ", ".join(map(str, tensor.shape))
                table.add_row(name, f"{kind} {label}", tensor.dtype, f"[{shape}]".replace("[", r"\["))
    return table


def _buckets(bundle: Bundle) -> Table:
    stages = [name for name in bundle.graphs if name.startswith("stage")]
    columns = ("bucket", *stages, "KV slots", "KV MiB", "of unpruned", "work")
    table = _table("buckets: rows n of each stage in prefill, slots s of its KV caches", *columns)
    for bucket in bundle.recipe.buckets:
        prefill, slots = [], []
        for name in stages:
            graph = bundle.graphs[name]
            variant = "prefill" if "prefill" in graph.variants else f"{bucket.name}/prefill"
            prefill.append(str(graph.variants[variant]["n"]))
            slots.append(str(graph.variants[f"{bucket.name}/decode"]["s"]))
        table.add_row(
            bucket.name,
            *prefill,
            "/".join(slots),
            f"{bundle.kv_mib(bucket):.3f}",
            f"{bundle.kv_mib(bucket) / bundle.kv_mib(bundle.recipe.bucket(FULL)):.0%}",
            f"{bucket.work_fraction:.2f}",
        )
    return table


def _files(bundle: Bundle) -> Table:
    table = _table("files", "file", "role", "MiB", "SHA-256")
    for entry in bundle.manifest.files:
        table.add_row(entry.path, entry.role, _mib(entry.bytes), entry.sha256[:12])
    total = sum(entry.bytes for entry in bundle.manifest.files)
    table.add_row("all", "", _mib(total), "")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right" if "MiB" in column else "left")
    return table


def _mib(count: int) -> str:
    return f"{count / 2**20:.3f}"
