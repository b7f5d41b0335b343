"""NAVSIM's own numbers, and the scenes they belong to."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.navsim.scene import Devkit, EgoMotion, MapArea, PlannedPath, Scene, Tracks

Json = dict[str, Any]


@dataclass(frozen=True)
class Golden:
    """The golden files by name, unpacked from a folder or an archive."""

    files: dict[str, Any]

    @property
    def cases(self) -> list[Json]:
        return [content for name, content in self.files.items() if name.startswith("cases/")]

    def case(self, name: str) -> Json:
        return self.files[f"cases/{name}.json"]

    def scene_record(self, name: str) -> Json:
        return self.files[f"scenes/{name}.json"]

    def scene(self, name: str, devkit: Devkit) -> Scene:
        record = self.scene_record(name)
        own = record[devkit]
        common = {
            "token": name,
            "log": "a log",
            "devkit": devkit,
            "ego": motion(record["ego"]),
            "centreline": np.array(record["centerline"])[:, :2],
            "route_lane_ids": frozenset(record["route_lane_ids"]),
            "areas": tuple(
                MapArea(area["id"], area["type"], ((np.array(area["polygon"]),),)) for area in record["map"]
            ),
            "reference": np.array(own["reference"]),
            "tracks": tracks(own["tracks"], 51 if devkit == "v1" else 41),
        }
        if devkit == "v1":
            return Scene(**common)
        human = own["human_trajectory"]
        return Scene(
            **common,
            past=tuple(motion(state) for state in own["past"]),
            red_lights=tuple(tuple(ids) for ids in own["red_light_connectors"]),
            red_light_polygons={id: ((np.array(ring),),) for id, ring in own["red_light_polygons"].items()},
            human=None if human is None else PlannedPath(np.array(human)),
            synthetic=own["scene_type"] == "synthetic",
        )

    def path(self, case: Json) -> PlannedPath:
        return PlannedPath(np.array(case["trajectory"]["poses"]), case["trajectory"]["interval_s"])


def motion(state: Json) -> EgoMotion:
    return EgoMotion(
        state["time_us"],
        np.array(state["pose"]),
        np.array(state["velocity"]),
        np.array(state["acceleration"]),
        state["tire_steering_angle"],
        state["tire_steering_rate"],
        state["angular_velocity"],
        state["angular_acceleration"],
    )


def tracks(records: list[Json], steps: int) -> Tracks:
    boxes = np.full((len(records), steps, 5), np.nan)
    first_speeds = []
    for number, record in enumerate(records):
        for step, state in enumerate(record["states"]):
            if state is not None:
                boxes[number, step] = [*state[:3], record["length"], record["width"]]
        first = next(state for state in record["states"] if state is not None)
        first_speeds.append(float(np.hypot(first[3], first[4])))
    return Tracks(
        tuple(record["token"] for record in records),
        tuple(record["type"] for record in records),
        boxes,
        np.array(first_speeds),
    )


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> Golden:
    pytest.importorskip("shapely")
    pytest.importorskip("scipy")
    folder = golden_dir / "navsim"
    archive = folder / "vectors.tar.xz"
    if not archive.is_file():
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.json")}
    else:
        with tarfile.open(archive) as opened:
            files = {member.name: opened.extractfile(member).read() for member in opened if member.isfile()}
    return Golden({name: json.loads(content) for name, content in sorted(files.items())})


@pytest.fixture(scope="session")
def differences() -> Callable[..., str]:
    """Says where a number is further from the expected one than allowed; empty when nowhere."""

    def describe(what: str, value: Any, expected: Any, tolerance: float, angle: int | None = None) -> str:
        apart = np.asarray(value, dtype=float) - np.asarray(expected, dtype=float)
        if angle is not None:
            apart[..., angle] = (apart[..., angle] + np.pi) % (2 * np.pi) - np.pi
        worst = float(np.abs(apart).max()) if apart.size else 0.0
        return "" if worst <= tolerance else f"{what} is {worst:.3g} off\n"

    return describe
