"""`vla-autoprune accept`: build, verify, provoke and measure on a new machine; one file to send back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.build import (
    DEVICE,
    OPTIMIZATION,
    TF32,
    WORKSPACE,
    build_with_bar,
    print_engines,
)
from vla_autoprune.cli.options import BackendName, require_file
from vla_autoprune.errors import BackendError, InputError
from vla_autoprune.files import write_whole
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from engines.acceptance import Acceptance


@app.command()
def accept(
    bundle: Path = typer.Argument(metavar="BUNDLE", help="Directory that vla-autoprune export wrote."),
    backend: BackendName = typer.Option(
        BackendName.TENSORRT, "--backend", help="What is to be accepted; TensorRT is built first."
    ),
    frames: int = typer.Option(
        500, "--frames", min=1, help="Frames to measure, over all buckets; p99 needs 100 of each."
    ),
    out: Path = typer.Option(Path("acceptance.json"), "--out", metavar="FILE", help="The result file."),
    device: int = DEVICE,
    workspace_mib: int | None = WORKSPACE,
    optimization_level: int = OPTIMIZATION,
    tf32: bool = TF32,
) -> None:
    """Accept a bundle on this machine: build engines, compare every stage, provoke faults, measure.

    Needs nothing but the bundle: inputs and answers were recorded at its
    export, unless that streamed the weights. Writes one result file, machine
    and versions included, to keep or to send back. Exits with 1 if a check
    fails.

    On a Jetson:  vla-autoprune accept out/bundle --workspace-mib 2048
    """
    from engines.acceptance import accept as run_acceptance
    from engines.acceptance import not_opened
    from engines.backends import open_backend
    from engines.tensorrt.engine_files import BuildOptions, require_tensorrt
    from engines.verify import sample_paths
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.runtime.backend import Backend

    require_file("--out", out)
    options = BuildOptions(workspace_mib=workspace_mib, optimization_level=optimization_level, tf32=tf32)
    if backend is not BackendName.TENSORRT and (device or options != BuildOptions()):
        raise InputError(
            "--device, --workspace-mib, --optimization-level and --tf32 belong to --backend tensorrt; "
            f"--backend is {backend.value}"
        )
    loaded = load_bundle(bundle)
    sample_paths(loaded)  # to build engines takes minutes: what is missing is said before
    opened: Backend
    memory_mib = None
    engines: list[dict[str, Any]] = []
    if backend is BackendName.TENSORRT:
        from engines.tensorrt.backend import TensorRtBackend
        from engines.tensorrt.cuda import require_cuda

        require_tensorrt()
        require_cuda()
        try:
            built = build_with_bar(loaded, options, device, overwrite=False)
            print_engines(built, loaded)
            engines = [record.model_dump(mode="json") for record in built.records]
            opened = engine = TensorRtBackend(loaded, device=device)
        except BackendError as error:
            _finish(not_opened(loaded, backend.value, error), out)
        memory_mib = engine.memory_mib
    else:
        opened = open_backend(backend.value, loaded)
    try:
        with progress_bar() as bar:
            task = bar.add_task("accept", total=None)
            result = run_acceptance(
                loaded,
                opened,
                frames=frames,
                engines=engines,
                memory_mib=memory_mib,
                progress=lambda what, done, total: bar.update(
                    task, description=what, completed=done, total=total
                ),
            )
    finally:
        opened.close()
    _finish(result, out)


def _finish(result: Acceptance, out: Path) -> NoReturn:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, result.to_json().encode())
    _print(result, out)
    raise typer.Exit(0 if result.passed else 1)


def _print(result: Acceptance, out: Path) -> None:
    from vla_autoprune.profiling.percentiles import missing_percentiles

    console = Console(soft_wrap=True)
    table = Table("bucket", pad_edge=False)
    for name in ("prefill p50", "p99", "per token p50", "frame p50", "p99", "cost of a switch"):
        table.add_column(f"{name} ms", justify="right")
    for name, times in result.times.items():
        switch = times.after_other_bucket_ms - times.after_same_bucket_ms
        figures = (*times.prefill_ms, times.decode_ms[0], *times.frame_ms)
        table.add_row(name, *("–" if ms is None else f"{ms:.2f}" for ms in figures), f"{switch:+.2f}")
    if result.times:
        console.print(table)
        fewest = missing_percentiles(min(times.frames for times in result.times.values()))
        if fewest:
            console.print(f"note: {fewest}", style="yellow", highlight=False)
    for check in result.checks:
        mark = "[green]ok[/]   " if check.passed else "[bold red]fails[/]"
        console.print(f"{mark} {escape(f'{check.name}: {check.seen}')}", highlight=False)
    console.print(f"[bold]{escape(str(out))}[/]: {result.backend} on {result.device}", highlight=False)
