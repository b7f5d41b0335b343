"""`vla-autoprune recipe`: look at a pruning recipe, check one, and give one camera floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import typer
from rich.box import SIMPLE
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import camera_floors, require_file
from vla_autoprune.errors import InputError, RecipeError
from vla_autoprune.files import write_whole
from vla_autoprune.pruning.work import kv_mib, prefill_flops
from vla_autoprune.recipe import (
    FULL,
    Bucket,
    PruningRecipe,
    published_work_fraction,
    read_recipe,
    rows_into_layers,
    write_recipe,
)
from vla_autoprune.recipe_building import coarsening_error, with_camera_floors

Cell = Callable[[Bucket], str]
WIDE = 140
"""Columns from which all figures of a bucket fit on one line."""
EIGHTHS = " ▁▂▃▄▅▆▇█"
CHART_ROWS = 4

recipe_app = typer.Typer(
    help="Look at a pruning recipe, check one, and give one camera floors.", no_args_is_help=True
)
app.add_typer(recipe_app, name="recipe")

_FILE = typer.Argument(..., metavar="FILE", help="Recipe JSON, or a bundle directory that holds one.")


@recipe_app.command()
def show(
    file: Path = _FILE,
    png: Path | None = typer.Option(None, "--png", help="Also draw the retention curves into this PNG file."),
    layers_of: str | None = typer.Option(
        None, "--layers", metavar="BUCKET", help="Also print tokens, FLOPs and KV cache of each layer."
    ),
) -> None:
    """Print every bucket's token counts, work and KV cache, and draw its retention curve.

    Example: vla-autoprune recipe show out/bundle --png curves.png
    """
    recipe = _read(file)
    bucket = None if layers_of is None else recipe.bucket(layers_of)
    if png is not None:
        if png.suffix.lower() != ".png":
            raise InputError(f"--png {png}: the name must end in .png")
        require_file("--png", png)
        _draw(recipe, png)
    console = Console()
    _print_heading(console, recipe, file)
    schedule, cost = _schedule_columns(recipe), _cost_columns(recipe)
    for columns in [{**schedule, **cost}] if console.width >= WIDE else [schedule, cost]:
        console.print(_table(recipe, columns))
    console.print(
        "* taken when complexity is not asked; +n are merged tokens; complexity in bits", style="dim"
    )
    for budget in recipe.budgets:
        panels = [_chart(recipe, bucket) for bucket in recipe.buckets_of(budget)]
        console.print(Columns(panels, padding=(0, 1)))
    console.print(
        "Bars: visual tokens into each decoder layer, mean into: their mean.\n"
        "work: prefill FLOPs of the decoder, causal and grouped-query aware.\n"
        "paper: its own counter of work.\n"
        "coarse: mean distance from pruning after every layer, in tokens over V.",
        style="dim",
    )
    if bucket is not None:
        console.print(_layer_table(recipe, bucket))
    if png is not None:
        console.print(escape(f"wrote {png}"), soft_wrap=True, highlight=False)


@recipe_app.command()
def check(file: Path = _FILE) -> None:
    """Check that a recipe holds together; exit code 2 and one line that says what is wrong if it does not.

    Example: vla-autoprune recipe check out/bundle/recipe.json
    """
    recipe = _read(file)
    Console().print(
        f"[green]ok[/] {escape(str(file))}: {recipe.form} recipe for {recipe.model.id}, "
        f"{len(recipe.buckets)} buckets, sha256 {recipe.sha256[:16]}…",
        highlight=False,
        soft_wrap=True,
    )


@recipe_app.command()
def floors(
    file: Path = _FILE,
    wanted: str = typer.Option(
        ...,
        "--camera-floors",
        metavar="CAMERA=N,…",
        help="Visual tokens of these cameras that survive to the last stage, at least; in place of the "
        "recipe's floors, and 0 takes one away.",
    ),
    out: Path = typer.Option(..., "--out", metavar="FILE", help="Recipe to write."),
) -> None:
    """Give a recipe other camera floors, without calibrating again.

    Budgets and fitted slopes stay. A bucket's counts change only where a stage
    would hold fewer tokens than the floors ask for. To see what floors do, export
    both recipes and evaluate both bundles at once.

    Example: vla-autoprune recipe floors out/bundle --camera-floors CAM_FRONT=12 --out out/front12.json

    Then: vla-autoprune export out/front12 --recipe out/front12.json

    And: vla-autoprune evaluate out/bundle out/front12 --data out/synth
    """
    require_file("--out", out)
    given, before = camera_floors(wanted), _read(file)
    try:
        after = with_camera_floors(before, given)
    except RecipeError as error:
        raise InputError(f"--camera-floors {wanted}: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(after, out)
    console = Console(soft_wrap=True)
    for old, new in zip(before.buckets, after.buckets, strict=True):
        if old.after_points != new.after_points:
            told = f"{_counts(before, old)}, now {_counts(after, new)}"
            console.print(f"{new.name}: visual tokens into stages were {told}", highlight=False)
    total, smallest = sum(after.camera_floors.values()), min(bucket.kept[-1] for bucket in after.buckets)
    console.print(
        f"wrote {out}: {_floors(after) or 'no floors'}; they add up to {total} of at least {smallest} visual "
        "tokens in the last stage",
        markup=False,
        highlight=False,
    )


def _read(file: Path) -> PruningRecipe:
    return read_recipe(file / "recipe.json" if file.is_dir() else file)


def _print_heading(console: Console, recipe: PruningRecipe, file: Path) -> None:
    model, layout = recipe.model, recipe.layout
    stages = " | ".join(f"{layers.start}-{layers.stop - 1}" for layers in recipe.stages)
    console.print(f"[bold]{escape(str(file))}[/]", highlight=False, soft_wrap=True)
    console.print(
        f"recipe: {recipe.form}, sha256 {recipe.sha256[:16]}…\n"
        f"model:  {model.id}, {model.layers} layers, hidden {model.hidden}, {model.heads} heads, "
        f"{model.kv_heads} KV heads, ffn {model.ffn}\n"
        f"prompt: {layout.visual_tokens} visual tokens from {len(layout.cameras)} cameras, "
        f"{layout.text_tokens} text tokens, {recipe.decode_length} generated\n"
        f"stages: layers {stages}\n"
        f"scores: {recipe.scorer.reduction}, {_encoder(recipe)}; "
        f"recovery {'on' if recipe.recovery else 'off'}; positions {recipe.positions}",
        highlight=False,
    )


def _encoder(recipe: PruningRecipe) -> str:
    """What the vision tower has to say, and the floors that nothing overrules."""
    scorer = recipe.scorer
    told = "no encoder score"
    if scorer.encoder_weight:
        layer = "" if scorer.encoder_layer is None else f" of tower layer {scorer.encoder_layer}"
        told = f"encoder score {scorer.encoder!r}{layer}, weight {scorer.encoder_weight:g}"
    return "; ".join(filter(None, (told, _floors(recipe))))


def _floors(recipe: PruningRecipe) -> str:
    told = ", ".join(f"{camera} {count}" for camera, count in recipe.camera_floors.items())
    return f"floors {told}" if told else ""


def _layer_table(recipe: PruningRecipe, bucket: Bucket) -> Table:
    """What enters each decoder layer in a bucket, and what it costs."""
    table = Table("layer", "visual", "rows", "GFLOPs", "of unpruned", "KV tokens", box=SIMPLE)
    for column in table.columns:
        column.justify = "right"
    whole = prefill_flops(recipe.model, [recipe.layout.length])
    rows = rows_into_layers(recipe, bucket)
    for layer, count in enumerate(rows):
        flops = prefill_flops(recipe.model, [count])
        table.add_row(
            str(layer),
            str(bucket.visual_tokens_into_layers[layer]),
            str(count),
            f"{flops / 1e9:.4g}",
            f"{flops / whole:.1%}",
            str(bucket.kv_tokens_per_layer[layer]),
        )
    table.title = f"{bucket.name}: {prefill_flops(recipe.model, rows) / 1e9:.4g} GFLOPs of prefill"
    return table


def _schedule_columns(recipe: PruningRecipe) -> dict[str, Cell]:
    """What each bucket does, by column title."""
    return {
        "visual tokens into stages": lambda bucket: _counts(recipe, bucket),
        "slope": lambda bucket: "" if bucket.name == FULL else f"{bucket.slope:g}",
        "complexity": lambda bucket: "" if bucket.name == FULL else _interval(bucket),
    }


def _cost_columns(recipe: PruningRecipe) -> dict[str, Cell]:
    """What each bucket costs, by column title."""
    visual = recipe.layout.visual_tokens
    unpruned_kv = sum(recipe.bucket(FULL).kv_tokens_per_layer)
    return {
        "mean into": lambda bucket: f"{_mean_into(bucket):.1f}",
        "of V": lambda bucket: f"{_mean_into(bucket) / visual:.1%}",
        "work": lambda bucket: f"{bucket.work_fraction:.1%}",
        "paper": lambda bucket: f"{published_work_fraction(recipe, bucket):.1%}",
        "KV MiB": lambda bucket: f"{kv_mib(recipe.model, bucket.kv_tokens_per_layer):.2f}",
        "of full": lambda bucket: f"{sum(bucket.kv_tokens_per_layer) / unpruned_kv:.0%}",
        "coarse": lambda bucket: f"{coarsening_error(recipe, bucket):.1%}",
    }


def _table(recipe: PruningRecipe, columns: Mapping[str, Cell]) -> Table:
    table = Table(header_style="bold", box=SIMPLE)
    table.add_column("bucket", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="left" if title.startswith("visual") else "right", no_wrap=True)
    for bucket in recipe.buckets:
        name = f"{bucket.name} *" if bucket.default else bucket.name
        table.add_row(name, *(cell(bucket) for cell in columns.values()))
    return table


def _mean_into(bucket: Bucket) -> float:
    return sum(bucket.visual_tokens_into_layers) / len(bucket.visual_tokens_into_layers)


def _counts(recipe: PruningRecipe, bucket: Bucket) -> str:
    parts = [str(recipe.layout.visual_tokens)]
    for kept, merged in zip(bucket.kept, bucket.merged, strict=True):
        parts.append(f"{kept}+{merged}" if merged else str(kept))
    if len(parts) > 8:
        parts = [*parts[:4], "…", *parts[-3:]]
    return " → ".join(parts)


def _interval(bucket: Bucket) -> str:
    low, high = bucket.complexity
    if low is None and high is None:
        return "any"
    if low is None:
        return f"< {high:.3g}"
    return f"≥ {low:.3g}" if high is None else f"{low:.3g} … {high:.3g}"


def _chart(recipe: PruningRecipe, bucket: Bucket) -> Panel:
    lines = _bars(bucket.visual_tokens_into_layers, recipe.layout.visual_tokens)
    return Panel("\n".join(lines), title=bucket.name, subtitle=f"k {bucket.slope:g}", expand=False)


def _bars(counts: Sequence[int], total: int) -> list[str]:
    """Bar chart of `CHART_ROWS` text rows, one column per layer, doubled where there are few."""
    wide = 2 if len(counts) <= 16 else 1
    # Any token left shows as at least the thinnest bar.
    levels = [max(1, round(count / total * 8 * CHART_ROWS)) if count else 0 for count in counts]
    rows = range(CHART_ROWS - 1, -1, -1)
    return ["".join(EIGHTHS[min(8, max(0, level - 8 * row))] * wide for level in levels) for row in rows]


def _draw(recipe: PruningRecipe, png: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(recipe.budgets), 3.2), layout="constrained")
    every = figure.subplots(1, len(recipe.budgets), sharey=True, squeeze=False)[0]
    edges = range(recipe.model.layers + 1)
    for axes, budget in zip(every, recipe.budgets, strict=True):
        for bucket in recipe.buckets_of(budget):
            axes.stairs(
                bucket.visual_tokens_into_layers, edges, label=f"{bucket.name} (k {bucket.slope:g})", lw=1.8
            )
        mean = budget * recipe.layout.visual_tokens
        axes.axhline(mean, color="0.7", lw=0.8, zorder=0, label="budget: their mean")
        axes.set(
            title=f"budget {budget:g}", xlabel="decoder layer", xlim=(0, recipe.model.layers), ylim=(0, None)
        )
        axes.legend(fontsize=8)
    every[0].set_ylabel("visual tokens into the layer")
    png.parent.mkdir(parents=True, exist_ok=True)
    write_whole(png, lambda file: figure.savefig(file, format="png", dpi=150))
