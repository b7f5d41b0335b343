"""`vla-autoprune recipe`: look at a pruning recipe, and check one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.errors import InputError
from vla_autoprune.pruning.work import kv_mib
from vla_autoprune.recipe import (
    FULL,
    Bucket,
    PruningRecipe,
    coarsening_error,
    published_work_fraction,
    read_recipe,
)

EIGHTHS = " ▁▂▃▄▅▆▇█"
CHART_ROWS = 4

recipe_app = typer.Typer(help="Look at a pruning recipe, and check one.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

_FILE = typer.Argument(..., metavar="FILE", help="Recipe JSON, or a bundle directory that holds one.")


@recipe_app.command()
def show(
    file: Path = _FILE,
    png: Path | None = typer.Option(None, "--png", help="Also draw the retention curves into this PNG file."),
) -> None:
    """Print every bucket's token counts, work and KV cache, and draw its retention curve.

    Example: vla-autoprune recipe show out/bundle --png curves.png
    """
    recipe = _read(file)
    console = Console()
    _print_heading(console, recipe, file)
    console.print(_table(recipe))
    for budget in recipe.budgets:
        panels = [_chart(recipe, bucket) for bucket in recipe.buckets_of(budget)]
        console.print(Columns(panels, padding=(0, 1)))
    console.print(
        "Bars: visual tokens into each decoder layer. "
        "work: prefill FLOPs of the decoder, causal and grouped-query aware;\n"
        "paper: its own counter. coarse: mean distance from pruning after every layer, in tokens over V.",
        style="dim",
    )
    if png is not None:
        _draw(recipe, png)
        console.print(f"wrote {png}")


@recipe_app.command()
def check(file: Path = _FILE) -> None:
    """Check that a recipe holds together; exit code 2 and one line that says what is wrong if it does not.

    Example: vla-autoprune recipe check out/bundle/recipe.json
    """
    recipe = _read(file)
    Console().print(
        f"[green]ok[/] {file}: {recipe.form} recipe for {recipe.model.id}, {len(recipe.buckets)} buckets, "
        f"sha256 {recipe.sha256[:16]}…",
        highlight=False,
        soft_wrap=True,
    )


def _read(file: Path) -> PruningRecipe:
    return read_recipe(file / "recipe.json" if file.is_dir() else file)


def _print_heading(console: Console, recipe: PruningRecipe, file: Path) -> None:
    model, layout = recipe.model, recipe.layout
    stages = " | ".join(f"{layers.start}-{layers.stop - 1}" for layers in recipe.stages)
    console.print(f"[bold]{file}[/]  {recipe.form} recipe, sha256 {recipe.sha256[:16]}…", highlight=False)
    console.print(
        f"model {model.id}: {model.layers} layers, hidden {model.hidden}, {model.heads} heads, "
        f"{model.kv_heads} KV heads, ffn {model.ffn}\n"
        f"prompt: {layout.visual_tokens} visual tokens from {len(layout.cameras)} cameras, "
        f"{layout.text_tokens} text tokens, {recipe.decode_length} generated; stages (layers) {stages}\n"
        f"scores: {recipe.scorer.reduction}, encoder weight {recipe.scorer.encoder_weight:g}; "
        f"recovery {'on' if recipe.recovery else 'off'}; positions {recipe.positions}",
        highlight=False,
    )


def _table(recipe: PruningRecipe) -> Table:
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("bucket")
    table.add_column("visual tokens into stages")
    for title in ("slope", "complexity", "mean into", "of V", "work", "paper", "KV MiB", "coarse"):
        table.add_column(title, justify="right")
    for bucket in recipe.buckets:
        mean = sum(bucket.visual_tokens_into_layers) / recipe.model.layers
        table.add_row(
            f"{bucket.name}{' *' if bucket.default else ''}",
            _counts(recipe, bucket),
            "" if bucket.name == FULL else f"{bucket.slope:g}",
            "" if bucket.name == FULL else _interval(bucket),
            f"{mean:.1f}",
            f"{100 * mean / recipe.layout.visual_tokens:.1f} %",
            f"{100 * bucket.work_fraction:.1f} %",
            f"{100 * published_work_fraction(recipe, bucket):.1f} %",
            f"{kv_mib(recipe.model, bucket.kv_tokens_per_layer):.2f}",
            f"{100 * coarsening_error(recipe, bucket):.1f} %",
        )
    table.caption = "* taken when complexity is not asked; +n are merged tokens; complexity in bits"
    return table


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
    if png.suffix.lower() != ".png":
        raise InputError(f"--png {png}: the name must end in .png")
    if not png.parent.is_dir():
        raise InputError(f"--png {png}: there is no directory {png.parent}; create it first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "--png needs matplotlib; install it with: pip install 'vla_autoprune[eval]'"
        ) from error
    figure = Figure(figsize=(4 * len(recipe.budgets), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(1, len(recipe.budgets), sharey=True, squeeze=False)[0]
    edges = range(recipe.model.layers + 1)
    for axes, budget in zip(every, recipe.budgets, strict=True):
        for bucket in recipe.buckets_of(budget):
            axes.stairs(
                bucket.visual_tokens_into_layers, edges, label=f"{bucket.name} (k {bucket.slope:g})", lw=1.8
            )
        axes.axhline(budget * recipe.layout.visual_tokens, color="0.7", lw=0.8, zorder=0)
        axes.set(
            title=f"budget {budget:g}", xlabel="decoder layer", xlim=(0, recipe.model.layers), ylim=(0, None)
        )
        axes.legend(fontsize=8)
    every[0].set_ylabel("visual tokens into the layer")
    temporary = png.with_name(f".{png.name}.part")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(png)
