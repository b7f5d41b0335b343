"""`vla-autoprune build`: TensorRT engines for the machine it runs on."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from engines.tensorrt.build import BuiltEngines
    from engines.tensorrt.engine_files import BuildOptions
    from vla_autoprune.bundle import Bundle

_STEPS = 100

DEVICE = typer.Option(0, "--device", min=0, help="CUDA's index of the GPU.")
WORKSPACE = typer.Option(
    None, "--workspace-mib", min=1, help="Most device memory a kernel may use while it works."
)
OPTIMIZATION = typer.Option(
    3, "--optimization-level", min=0, max=5, help="0 builds fast, 5 tries most kernels."
)
TF32 = typer.Option(
    False, "--tf32", help="Products of matrices in TF32: faster, ten bits of mantissa; verify afterwards."
)


class BuildBackend(str, Enum):
    """Backends that have something to build."""

    TENSORRT = "tensorrt"


@app.command()
def build(
    bundle: Path = typer.Argument(metavar="BUNDLE", help="Directory that vla-autoprune export wrote."),
    backend: BuildBackend = typer.Option(
        BuildBackend.TENSORRT, "--backend", help="What to build for; the others need no build."
    ),
    device: int = DEVICE,
    workspace_mib: int | None = WORKSPACE,
    optimization_level: int = OPTIMIZATION,
    tf32: bool = TF32,
    version_compatible: bool = typer.Option(
        False, "--version-compatible", help="Newer TensorRT of the same major version may load the engines."
    ),
    hardware_compatible: bool = typer.Option(
        False, "--hardware-compatible", help="Any GPU from Ampere on may load the engines; not on a Jetson."
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Build even where engines of the same bundle and options lie."
    ),
) -> None:
    """Build one TensorRT engine per graph of a bundle, on the machine that will run them.

    Every bucket, in prefill and decode, gets a profile of exactly its shapes;
    all share the engine's weights. Engines go into the bundle's engines/
    folder. Ctrl-C stops after the builder's step; what is finished stays.

    On a Jetson:  vla-autoprune build out/bundle --backend tensorrt --workspace-mib 2048
    """
    from engines.tensorrt.engine_files import BuildOptions
    from vla_autoprune.bundle import load_bundle

    options = BuildOptions(
        workspace_mib=workspace_mib,
        optimization_level=optimization_level,
        tf32=tf32,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    loaded = load_bundle(bundle)
    print_engines(build_with_bar(loaded, options, device, overwrite), loaded)


def build_with_bar(bundle: Bundle, options: BuildOptions, device: int, overwrite: bool) -> BuiltEngines:
    """Build engines, with a line for the graphs and one for what TensorRT does with the current one."""
    from engines.tensorrt.build import build_engines

    with progress_bar() as bar:
        graphs, phase = bar.add_task("build", total=len(bundle.graphs)), bar.add_task("", total=_STEPS)

        def show(graph: str, index: int, count: int, what: str, share: float) -> None:
            bar.update(graphs, completed=index, total=count, description=f"build {graph}")
            bar.update(phase, completed=round(share * _STEPS), description=what[:40])

        return build_engines(bundle, options, device=device, overwrite=overwrite, progress=show)


def print_engines(built: BuiltEngines, bundle: Bundle) -> None:
    """What was built, and how often the engines hold the weights."""
    console = Console(soft_wrap=True)
    table = Table("engine", pad_edge=False)
    for name in ("profiles", "MiB", "built in s"):
        table.add_column(name, justify="right")
    for record in built.records:
        took = "reused" if record.graph in built.reused else f"{record.build_seconds:.0f}"
        table.add_row(record.graph, str(len(record.profiles)), f"{record.bytes / 2**20:.1f}", took)
    console.print(table)
    size = sum(record.bytes for record in built.records)
    weights = sum(file.bytes for file in bundle.manifest.files if file.role == "weights")
    console.print(
        f"[bold]{escape(str(built.folder))}[/]: {size / 2**20:.1f} MiB of engines for "
        f"{weights / 2**20:.1f} MiB of weights, {built.gpu}, TensorRT {built.records[0].tensorrt_version}",
        highlight=False,
    )
