"""The front door: `vla-autoprune COMMAND`. One module per command; heavy imports happen inside them."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from vla_autoprune import __version__
from vla_autoprune.cli.options import usage_fault
from vla_autoprune.errors import VlaError

app = typer.Typer(
    name="vla-autoprune",
    help="Prune visual tokens inside a driving VLA's decoder, export it in static stages, run it, score it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_EXTRA_WITH = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "onnx", "onnxscript"), "export"),
    **dict.fromkeys(("nuscenes", "matplotlib", "shapely", "scipy", "yaml", "jinja2"), "eval"),
    **dict.fromkeys(("rerun", "foxglove"), "viz"),
    "ray": "ray",
    "rosbags": "record",
}
"""What the base package leaves out, and the extra that brings it."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vla-autoprune {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line: a mistyped one, an error of ours or of the file system is one line and exit 2."""
    try:
        sys.exit(app(prog_name="vla-autoprune", standalone_mode=False))
    except typer.TyperException as error:
        _refuse(usage_fault(error))
    except VlaError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRA_WITH.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _refuse(f"{error.name} is not installed; this needs: pip install 'vla_autoprune[{extra}]'")
    except OSError as error:
        if error.filename is None:
            raise
        what = error.strerror or error.args[0]  # numpy tells a short write in words only
        _refuse(f"{error.filename}: {what}; check the path, its permissions and the free space")


def _refuse(why: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(why)}", highlight=False)
    sys.exit(2)


# Each module registers its commands on `app` when it is imported.
from vla_autoprune.cli import (  # noqa: E402, F401
    accept,
    build,
    calibrate,
    demo,
    estimate,
    evaluate,
    export,
    inspect,
    lint,
    navsim,
    predict,
    profile,
    recipe,
    replay,
    synth,
    train,
    verify,
)
