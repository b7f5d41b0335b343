"""`vla-autoprune verify`: does a backend compute what the original model computed?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import BACKEND, THREADS, BackendName
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from engines.verify import VerifyReport


@app.command()
def verify(
    bundle: Path = typer.Argument(metavar="BUNDLE", help="Directory that vla-autoprune export wrote."),
    backend: BackendName = BACKEND,
    min_cosine: float | None = typer.Option(
        None,
        "--min-cosine",
        min=-1,
        max=1,
        help="First gate: least cosine of any row with the original's. Default by precision: 0.9999 (fp32), "
        "0.999 (fp16), 0.98 (bf16).",
    ),
    max_norm_error: float | None = typer.Option(
        None,
        "--max-norm-error",
        min=0,
        help="Second gate: how far the ratio of norms may be from 1. Default: 0.01, 0.02, 0.1.",
    ),
    threads: int | None = THREADS,
    as_json: bool = typer.Option(False, "--json", help="Print every comparison as JSON."),
) -> None:
    """Run the inputs recorded at export, compare every stage and the answer with the original model's.

    Each tensor of each stage and bucket passes two gates, cosine and ratio of
    norms. Neither torch nor the original model is needed. Exits with 1 if a
    tensor fails, and names the worst.

    Example: vla-autoprune verify out/bundle --backend tensorrt
    """
    from engines.backends import open_backend
    from engines.verify import GATES, verify_bundle
    from vla_autoprune.bundle import load_bundle

    loaded = load_bundle(bundle)
    gates = GATES[loaded.manifest.options.precision]
    if min_cosine is not None:
        gates = replace(gates, min_cosine=min_cosine)
    if max_norm_error is not None:
        gates = replace(gates, max_norm_error=max_norm_error)
    engine = open_backend(backend.value, loaded, threads=threads)
    try:
        with progress_bar() as progress:
            task = progress.add_task("verify", total=None)
            report = verify_bundle(
                loaded,
                engine,
                gates,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
    finally:
        engine.close()
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        _print(report)
    if report.failed:
        raise typer.Exit(1)


def _print(report: VerifyReport) -> None:
    console = Console(soft_wrap=True)
    table = Table("graph", "tensor", "worst in bucket", "of sample", pad_edge=False)
    for name in ("1 - cosine", "norm ratio - 1", ""):
        table.add_column(name, justify="right")
    for row in report.worst_of_each():
        table.add_row(
            row.graph,
            row.tensor,
            row.bucket,
            row.sample.removesuffix(".npz"),
            f"{1 - row.cosine:.1e}",
            f"{row.norm_ratio - 1:+.1e}",
            "[green]ok[/]" if row.passed else "[bold red]fails[/]",
        )
    console.print(table)
    worst, gates = report.worst, report.gates
    failed = f"{len(report.failed)} fail" if report.failed else "all pass"
    console.print(
        f"{report.backend} on {report.device}: {len(report.agreements)} comparisons, {failed} "
        f"(cosine at least {gates.min_cosine}, norm ratio within {gates.max_norm_error} of 1); "
        f"the worst is {worst.tensor} of {worst.graph} in bucket {worst.bucket} of {worst.sample}",
        highlight=False,
    )
    if report.cut_short:
        console.print(
            "runs of a sample in a bucket that kept other tokens than the original, and were compared up to "
            f"there: {report.cut_short}",
            highlight=False,
        )
