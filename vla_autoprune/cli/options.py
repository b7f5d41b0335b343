"""What the options of several commands share: choices, lists with commas, and places to write to."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console

from vla_autoprune.errors import InputError, VlaError

Item = TypeVar("Item")

THREADS = typer.Option(None, "--threads", min=1, help="CPU threads; all cores unless given.")


MODEL = typer.Option(
    None,
    "--model",
    metavar="DIR|HUB_ID",
    help="A trained model, or a checkpoint of a supported class (docs/model_families.md); "
    "the shipped one unless given.",
)
PROMPT = typer.Option(
    None, "--prompt", metavar="FILE", help="Prompt template (JSON) for a checkpoint that is not ours."
)
DECODER = typer.Option(
    None,
    "--decoder",
    metavar="FORMAT",
    help="What such a checkpoint answers with: waypoints, or a JSON file that describes text waypoints or a "
    "codebook of action tokens.",
)


class PrecisionName(str, Enum):
    """What weights are stored and layers computed in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class BackendName(str, Enum):
    """The names that `engines.backends` opens."""

    ONNXRUNTIME = "onnxruntime"
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    ONNXRUNTIME_TENSORRT = "onnxruntime-tensorrt"
    TENSORRT = "tensorrt"
    TORCH = "torch"
    TORCH_CUDA = "torch-cuda"


BACKEND = typer.Option(
    BackendName.ONNXRUNTIME, "--backend", help="What runs the stages; docs/backends.md compares them."
)


class TargetName(str, Enum):
    """The platforms that `engines.lint` knows."""

    JETPACK6 = "jetpack6"
    JETPACK7 = "jetpack7"
    RTX = "rtx"


class CommandSource(str, Enum):
    """Where the driving command of a sample comes from."""

    ROUTE = "route"
    FUTURE = "future"


class PlanFrameName(str, Enum):
    """The frames of `eval_nuscenes.predictions`."""

    EGO = "ego"
    LIDAR = "lidar"


PLAN_FRAME = typer.Option(
    None, "--frame", help="Of predictions whose file does not say: ego (x forward) or lidar (x right)."
)


class PolicyName(str, Enum):
    """The policies of `runtime.planner`, named here so that --help needs no runtime."""

    AUTOPRUNE = "autoprune"
    FIXED = "fixed"
    RANDOM = "random"
    UNIFORM = "uniform"


def comma_list(
    option: str, text: str, kind: Callable[[str], Item], example: str, what: str = "values"
) -> list[Item]:
    """Read an option that is a list with commas.

    Args:
        option: its name, for the message.
        text: what was given.
        kind: from an entry to its value; raises ValueError for what is none.
        example: a good list, for the message.
        what: the kind, for the message.

    Returns:
        The values in the order given, at least one.

    Raises:
        InputError: an entry is empty or is none of its kind.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        if all(parts):
            return [kind(part) for part in parts]
    except ValueError:
        pass
    raise InputError(f"{option} is {text!r}; expected {what} separated by commas, like {example}")


def camera_floors(text: str) -> dict[str, int]:
    """Read `--camera-floors`, such as CAM_FRONT=24,CAM_BACK=6.

    Raises:
        InputError: an entry is none of the kind CAMERA=N, or a camera is named twice.
    """

    def pair(entry: str) -> tuple[str, int]:
        camera, count = entry.split("=")
        return camera.strip(), int(count)

    pairs = comma_list("--camera-floors", text, pair, "CAM_FRONT=24,CAM_BACK=6", "CAMERA=N")
    cameras = [camera for camera, _ in pairs]
    if twice := [camera for camera in dict.fromkeys(cameras) if cameras.count(camera) > 1]:
        raise InputError(f"--camera-floors is {text!r}; {', '.join(twice)} is named twice, expected once")
    return dict(pairs)


def finite(text: str) -> float:
    """A number, neither infinite nor NaN; raises ValueError for anything else."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise ValueError("expected a finite number")


@contextlib.contextmanager
def gathered(faults: list[str]) -> Iterator[None]:
    """Note what a check raises and go on to the next, so that one run tells all that is wrong.

    Args:
        faults: gets a line per error; `refuse` raises them.
    """
    try:
        yield
    except VlaError as error:
        faults.append(str(error))


def refuse(faults: list[str]) -> None:
    """Raise what `gathered` noted.

    Raises:
        InputError: there is a fault.
    """
    if faults:
        raise InputError("; ".join(faults))


@contextlib.contextmanager
def told_when_interrupted(what_is_left: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, say what there is by then and how to go on.

    Args:
        what_is_left: asked only then.
    """
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True, soft_wrap=True).print(
            f"interrupted: {what_is_left()}", style="yellow", markup=False, highlight=False
        )
        raise


def usage_fault(error: typer.TyperException) -> str:
    """What is wrong with the words of a command line, on one line.

    Args:
        error: as typer raises it.

    Returns:
        Option, value, what is expected, and where help is.
    """
    context, parameter, cause = getattr(error, "ctx", None), getattr(error, "param", None), error.__cause__
    message = error.format_message().rstrip(".")
    if parameter is not None and isinstance(cause, ValidationError):
        fault = cause.errors()[0]
        name = parameter.get_error_hint().strip("'")
        message = f"{name} {fault['input']}: {_expected(fault, parameter)}"
    return f"{message}; see {context.command_path if context else 'vla-autoprune'} --help"


def _expected(fault: Any, parameter: Any) -> str:
    kind, low, high = str(fault["type"]), parameter.min, parameter.max
    if kind == "value_error":  # of a parser or a choice, which repeats the value
        return str(fault["ctx"]["error"]).removeprefix(f"{fault['input']!r} is ").rstrip(".")
    if not kind.startswith(("int_", "float_", "greater_", "less_")):
        return str(fault["msg"])
    noun = "a whole number" if kind.startswith("int_") else "a number"
    if low is None:
        return f"expected {noun}" if high is None else f"expected {noun} up to {high}"
    return f"expected {noun} from {low} {'on' if high is None else f'to {high}'}"


def require_directory(option: str, path: Path) -> None:
    """Refuse a place where no directory can be made or written to, before any work starts.

    Raises:
        InputError: it or something above it is a file, or may not be written to.
    """
    _require_writable(option, path, path)


def require_file(option: str, path: Path) -> None:
    """Refuse a place where no file can be written, before any work starts.

    Raises:
        InputError: it is a directory or device, or its directory cannot be made or written to.
    """
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a device or pipe"
        raise InputError(f"{option} {path} is {kind}; give the name of a file")
    _require_writable(option, path, path.parent)


def _require_writable(option: str, given: Path, folder: Path) -> None:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{option} {given}: {there} is a file; give a directory, new or existing")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option} {given}: {there} may not be written to; give another directory")
