"""`vla-autoprune lint`: would TensorRT's parser take a bundle's graphs?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import TargetName
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from engines.lint import Finding
    from engines.lint import TargetName as Name


@app.command()
def lint(
    bundle: Path = typer.Argument(metavar="BUNDLE", help="Directory that vla-autoprune export wrote."),
    target: TargetName | None = typer.Option(
        None, "--target", help="Where engines are to be built. Default: all, of which one must be clean."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Check a bundle's graphs against the operator tables of TensorRT's parser.

    Operators, opset, types, control flow, and with the shapes of every bucket
    in prefill and decode: open dimensions and counts. Nothing of TensorRT is
    needed, nor a GPU. Exits with 1 if the target would refuse a graph.

    Example: vla-autoprune lint out/bundle --target jetpack6
    """
    from engines.lint import TARGETS, lint_bundle
    from vla_autoprune.bundle import load_bundle

    names: list[Name] = list(TARGETS) if target is None else [target.value]
    loaded = load_bundle(bundle)
    with progress_bar() as progress:
        task = progress.add_task("lint", total=None)
        report = lint_bundle(
            loaded, names, lambda done, total: progress.update(task, completed=done, total=total)
        )
    console = Console(soft_wrap=True)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        if report.findings:
            console.print(_table(report.findings))
        for name in names:
            platform, count = TARGETS[name], len(report.of(name))
            verdict = f"{count} findings" if count else "clean"
            console.print(
                f"[bold]{name}[/] ({platform.title}, parser of TensorRT {platform.tensorrt}): {verdict}; "
                f"{report.graphs} graphs in {report.variants} sets of shapes",
                highlight=False,
            )
    if all(report.of(name) for name in names):
        raise typer.Exit(1)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("target", "graph", "shapes", "rule", "finding", title_justify="left", pad_edge=False)
    for finding in findings:
        table.add_row(finding.target, finding.graph, finding.variant or "all", finding.rule, finding.message)
    return table
