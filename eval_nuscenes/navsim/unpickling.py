"""Reads NAVSIM's pickles without running anything in them.

A pickle names classes and functions to call. Here every name of `navsim` and `nuplan` stands for an inert
record that keeps what it is given; five names of numpy, one of shapely and paths stand for small readers of
our own; any other name is refused. numpy's and shapely's own unpickling code is never called.
"""

from __future__ import annotations

import io
import lzma
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eval_nuscenes.navsim.scene import Floats, Rings
from vla_autoprune.errors import InputError

RECORD_PACKAGES = ("navsim", "nuplan")
MOST_BYTES = 1 << 30
"""A larger pickle is taken for a decompression bomb; real metric caches have a few megabytes."""

_NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_WKB_POLYGON, _WKB_MULTI_POLYGON = 3, 6


class Record:
    """Stands for an object of the devkit: its class's name, what it was made from, what it holds."""

    kind = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        """Keep the arguments; a pickle may make a record with or without calling `__init__`."""
        record = super().__new__(cls)
        record.args = args
        record.fields = dict(kwargs)
        return record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.fields: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        # Classes with slots give a pair: their dictionary and their slots.
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.fields.update(part)
            elif part is not None:
                raise InputError(f"a {self.kind} holds {type(part).__name__} instead of named fields")

    def __hash__(self) -> int:
        return id(self)

    def field(self, *path: str) -> Any:
        """A field, or a field of a field.

        Raises:
            InputError: there is none of that name; the message says what there is.
        """
        value: Any = self
        for name in path:
            if not isinstance(value, Record) or name not in value.fields:
                what = (
                    f"a {value.kind} with {', '.join(value.fields)}"
                    if isinstance(value, Record)
                    else repr(value)
                )
                raise InputError(
                    f"expected {'.'.join(path)} of a {self.kind}, but {name} is not in {what[:300]}"
                )
            value = value.fields[name]
        return value


class StoredDtype:
    """Stands for numpy.dtype: plain numbers, and objects as array elements."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = str(code).lstrip("<>|=")
        self.order = "<"
        if self.code not in _NUMBERS and self.code != "O8":
            raise InputError(f"an array of type {code!r} is not expected in a NAVSIM file; it is refused")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The type of plain numbers."""
        if self.code == "O8":
            raise InputError("numbers are expected, but the array holds objects")
        return np.dtype(self.order + self.code)


class StoredArray:
    """Stands for numpy.ndarray; `value` is the array, or a list where it holds objects."""

    def __init__(self, *_: Any) -> None:
        self.value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_first, content = state
        if dtype.code == "O8":
            self.value = list(content)
        else:
            self.value = np.frombuffer(content, dtype.numpy).reshape(
                shape, order="F" if column_first else "C"
            )


def read_pickle(path: Path, compressed: bool) -> Any:
    """The content of a pickle, with `Record` and `StoredArray` in place of foreign objects.

    Args:
        path: the file.
        compressed: by lzma, as metric caches are.

    Raises:
        InputError: it cannot be read, is truncated, or names something outside the allow-list.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _Unpickler(io.BytesIO(_decompressed(content) if compressed else content)).load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply") from error
    except Exception as error:  # a damaged pickle can make its machine raise anything
        raise InputError(
            f"{path} is no whole pickle ({type(error).__name__}: {error}); it is truncated or damaged"
        ) from error


def array_of(value: Any) -> Any:
    """An array (or a list of objects) from what a pickle held."""
    return value.value if isinstance(value, StoredArray) else value


def polygons_of_wkb(content: bytes) -> tuple[Rings, ...]:
    """Polygons in well-known binary, shapely's way to pickle geometries.

    Args:
        content: a polygon or multi-polygon; heights and a reference system are read over.

    Returns:
        One tuple of rings [n, 2] per polygon, the outline before its holes.

    Raises:
        InputError: it is another geometry, truncated, or has bytes left over.
    """
    try:
        polygons, end = _geometry(content, 0)
    except (struct.error, ValueError, IndexError) as error:
        raise InputError(f"a polygon of {len(content)} bytes is truncated") from error
    if end != len(content):
        raise InputError(f"a polygon has {len(content) - end} bytes left over")
    return polygons


def _geometry(content: bytes, at: int) -> tuple[tuple[Rings, ...], int]:
    order = "<" if content[at] else ">"
    (kind,) = struct.unpack_from(f"{order}I", content, at + 1)
    at += 5
    dimensions = 2 + bool(kind & 0x80000000) + bool(kind & 0x40000000)
    at += 4 if kind & 0x20000000 else 0
    iso, shape = divmod(kind & 0x0FFFFFFF, 1000)
    dimensions += (0, 1, 1, 2)[iso]
    if shape not in (_WKB_POLYGON, _WKB_MULTI_POLYGON):
        raise InputError(f"a geometry of type {kind} is not expected in a NAVSIM file; polygons are")
    (count,) = struct.unpack_from(f"{order}I", content, at)
    at += 4
    if shape == _WKB_MULTI_POLYGON:
        polygons: list[Rings] = []
        for _ in range(count):
            parts, at = _geometry(content, at)
            polygons += parts
        return tuple(polygons), at
    rings: list[Floats] = []
    for _ in range(count):
        (points,) = struct.unpack_from(f"{order}I", content, at)
        ring = np.frombuffer(content, f"{order}f8", points * dimensions, at + 4).reshape(points, dimensions)
        rings.append(ring[:, :2].astype(np.float64))
        at += 4 + points * dimensions * 8
    return (tuple(rings),) if rings else (), at


def _decompressed(content: bytes) -> bytes:
    reader = lzma.LZMADecompressor()
    whole = reader.decompress(content, max_length=MOST_BYTES)
    if not reader.eof:
        raise InputError(
            "the compressed content is cut off"
            if len(whole) < MOST_BYTES
            else f"it unpacks to more than {MOST_BYTES >> 20} MiB"
        )
    return whole


def _scalar(dtype: StoredDtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.numpy)[0].item()


def _from_buffer(content: bytes, dtype: StoredDtype, shape: tuple[int, ...], order: str) -> StoredArray:
    array = StoredArray()
    array.value = np.frombuffer(content, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")
    return array


def _path(*parts: str) -> str:
    return "/".join(map(str, parts))


_READERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): StoredDtype,
    ("numpy", "ndarray"): StoredArray,
    ("shapely.io", "from_wkb"): polygons_of_wkb,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): StoredArray for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _READERS:
            return _READERS[module, name]
        if module.partition(".")[0] in RECORD_PACKAGES:
            return type(name, (Record,), {"kind": name})
        raise InputError(
            f"it asks for {module}.{name}, which is not among what such a file may hold "
            f"(records of {' and '.join(RECORD_PACKAGES)}, arrays of numbers, polygons, paths); it is refused"
        )
