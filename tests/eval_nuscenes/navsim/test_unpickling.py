"""Pickles that want more than they may, damaged ones, and polygons."""

from __future__ import annotations

import lzma
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.navsim import unpickling
from eval_nuscenes.navsim.unpickling import array_of, polygons_of_wkb, read_pickle
from vla_autoprune.errors import InputError


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def stored(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "some.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    attack = pickle.dumps({"poses": Calls(os.system, f"touch {trace}")}, protocol)
    with pytest.raises(InputError, match=r"some\.pkl: it asks for (posix|nt)\.system, which is not among"):
        read_pickle(stored(tmp_path, attack), compressed=False)
    with pytest.raises(InputError, match=r"\.system"):
        read_pickle(stored(tmp_path, lzma.compress(attack)), compressed=True)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (eval, ("1 + 1",)),
        (getattr, (os, "system")),
        (np.load, ("a.npy",)),
        (pickle.loads, (b"",)),
        (__import__, ("os",)),
    ],
)
def test_nothing_outside_the_allow_list_is_called(tmp_path: Path, function: Any, arguments: Any) -> None:
    if function is getattr:
        arguments = ("text", "upper")
    with pytest.raises(InputError, match=function.__name__):
        read_pickle(stored(tmp_path, pickle.dumps(Calls(function, *arguments))), compressed=False)


def test_a_dotted_name_of_an_allowed_package_reaches_nothing(tmp_path: Path) -> None:
    """Protocol 4 lets a name have dots: `navsim` records must not lead to modules through them."""
    attack = b"\x80\x04\x8c\x06navsim\x8c\x09os.system\x93\x8c\x04true\x85R."
    record = read_pickle(stored(tmp_path, attack), compressed=False)
    assert record.kind == "os.system"
    assert record.args == ("true",)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float64).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(4, dtype=">i4"),
        np.array([True, False]),
    ],
)
@pytest.mark.parametrize("protocol", [4, 5])
def test_arrays_come_back(tmp_path: Path, array: Any, protocol: int) -> None:
    read = array_of(read_pickle(stored(tmp_path, pickle.dumps(array, protocol)), compressed=False))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


def test_scalars_and_paths_come_back_and_other_types_do_not(tmp_path: Path) -> None:
    content = pickle.dumps([np.float64(1.5), np.int64(-3), Path("a/b")])
    assert read_pickle(stored(tmp_path, content), compressed=False) == [1.5, -3, "a/b"]
    with pytest.raises(InputError, match="array of type 'U1'"):
        read_pickle(stored(tmp_path, pickle.dumps(np.array(["a"]))), compressed=False)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    content = lzma.compress(pickle.dumps(list(range(1000))))
    path = stored(tmp_path, content[: int(kept * len(content))])
    with pytest.raises(InputError, match=r"some\.pkl.*(cut off|truncated)"):
        read_pickle(path, compressed=True)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickling, "MOST_BYTES", 1 << 20)
    path = stored(tmp_path, lzma.compress(pickle.dumps(bytes(2 << 20)), preset=0))
    with pytest.raises(InputError, match="unpacks to more than 1 MiB"):
        read_pickle(path, compressed=True)


SQUARE = [[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0], [0.0, 0.0]]
HOLE = [[1.0, 1.0], [1.0, 2.0], [2.0, 2.0], [1.0, 1.0]]


def test_polygons_as_shapely_writes_them() -> None:
    shapely = pytest.importorskip("shapely")
    polygon = shapely.Polygon(SQUARE, [HOLE])
    far = shapely.Polygon(np.array(SQUARE) + 10)
    heights = shapely.Polygon([(*point, 7.0) for point in SQUARE])
    for content, expected in (
        (shapely.to_wkb(polygon), [[SQUARE, HOLE]]),
        (shapely.to_wkb(polygon, byte_order=0), [[SQUARE, HOLE]]),
        (shapely.to_wkb(shapely.set_srid(polygon, 4326), include_srid=True), [[SQUARE, HOLE]]),
        (shapely.to_wkb(heights, output_dimension=3), [[SQUARE]]),
        (shapely.to_wkb(heights, output_dimension=3, flavor="iso"), [[SQUARE]]),
        (
            shapely.to_wkb(shapely.MultiPolygon([polygon, far])),
            [[SQUARE, HOLE], [(np.array(SQUARE) + 10).tolist()]],
        ),
        (shapely.to_wkb(shapely.Polygon()), []),
    ):
        read = polygons_of_wkb(content)
        assert [[ring.tolist() for ring in rings] for rings in read] == expected


def test_what_is_no_polygon_is_refused() -> None:
    shapely = pytest.importorskip("shapely")
    with pytest.raises(InputError, match="geometry of type 1"):
        polygons_of_wkb(shapely.to_wkb(shapely.Point(0, 0)))
    whole = shapely.to_wkb(shapely.Polygon(SQUARE))
    with pytest.raises(InputError, match="truncated"):
        polygons_of_wkb(whole[:-3])
    with pytest.raises(InputError, match="3 bytes left over"):
        polygons_of_wkb(whole + b"abc")
    huge = struct.pack("<BIII", 1, 3, 1, 0xFFFFFFFF)
    with pytest.raises(InputError, match="truncated"):
        polygons_of_wkb(huge)
