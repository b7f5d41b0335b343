"""Recordings, read back with the libraries that others use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

rerun = pytest.importorskip("rerun")
pytest.importorskip("foxglove")
pytest.importorskip("mcap_protobuf")

from mcap.reader import make_reader
from mcap.records import Schema
from mcap_protobuf.decoder import DecoderFactory

from eval_nuscenes.evaluation import Variant, plan_record
from eval_nuscenes.recording import RecordedSample, write_mcap, write_rerun
from vla_autoprune.frame import CAMERAS


class JsonDecoderFactory:
    def decoder_for(self, encoding: str, schema: Schema | None) -> Callable[[bytes], dict] | None:
        return json.loads if encoding == "json" else None


@pytest.fixture(scope="module")
def views(make_drive: Callable, pretend_planner: type) -> list[RecordedSample]:
    drive = make_drive(scenes=1, keyframes=8)
    variant = Variant("autoprune 25%", "autoprune", pretend_planner(0.25), 0.25)
    return [
        RecordedSample(sample, plan_record(variant, sample.frame()), drive.drivable_area(sample))
        for sample in drive.samples
    ]


def test_foxglove_finds_its_own_schemas(views: list[RecordedSample], tmp_path: Path) -> None:
    path = tmp_path / "scene.mcap"
    write_mcap(path, views, "autoprune 25%")
    with path.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory(), JsonDecoderFactory()])
        found: dict[str, list] = {}
        schemas = {}
        for schema, channel, message, decoded in reader.iter_decoded_messages():
            found.setdefault(channel.topic, []).append((message.log_time, decoded))
            schemas[channel.topic] = schema.name
        (metadata,) = reader.iter_metadata()
    assert schemas["/plan"] == "foxglove.PosesInFrame" and schemas["/scene"] == "foxglove.SceneUpdate"
    assert schemas["/plan/cost"] == "vla_autoprune.PlanCost"
    assert schemas["/CAM_BACK/image"] == "foxglove.CompressedImage"
    assert metadata.metadata == {"variant": "autoprune 25%"}
    assert {len(messages) for messages in found.values()} == {len(views)}
    for view, (stamp, plan), (_, image), (_, cost) in zip(
        views, found["/plan"], found["/CAM_FRONT/image"], found["/plan/cost"], strict=True
    ):
        assert stamp == round(view.sample.stamp_s * 1e9)
        positions = [(pose.position.x, pose.position.y) for pose in plan.poses]
        np.testing.assert_allclose(positions, view.planned_path[:, :2])
        assert image.data == view.sample.cameras["CAM_FRONT"].path.read_bytes()
        assert cost["latency_ms"] == view.plan.timings_ms["total"]
    (_, scene) = found["/scene"][0]
    entities = {entity.id: entity for entity in scene.entities}
    assert set(entities) == {"drivable_area", "road_users", "ego", "truth", "plan"}
    lead = entities["road_users"].cubes[0]
    assert (lead.pose.position.x, lead.size.x) == pytest.approx((14.94, 4.6))
    assert len(entities["truth"].lines[0].points) == 7


def test_rerun_finds_every_keyframe(views: list[RecordedSample], tmp_path: Path) -> None:
    path = tmp_path / "scene.rrd"
    write_rerun(path, views, "autoprune 25%")
    recording = rerun.dataframe.load_recording(path)
    rows = recording.view(index="keyframe", contents="/**").select().read_all()
    assert rows.num_rows == len(views)
    table = {name: rows[name].to_pylist() for name in rows.column_names if name.startswith("/")}
    for camera in CAMERAS:
        assert all(blob is not None for blob in table[f"/cameras/{camera}:Blob"])
    for view, (strip,) in zip(views, table["/map/plan:LineStrip3D"], strict=True):
        np.testing.assert_allclose(strip, view.planned_path, rtol=1e-6)
    latencies = [value for (value,) in table["/plan/latency_ms:Scalar"]]
    np.testing.assert_allclose(latencies, [view.plan.timings_ms["total"] for view in views])


def test_costs_are_plain_numbers(views: list[RecordedSample]) -> None:
    first, last = views[0], views[-1]
    assert json.loads(json.dumps(first.scalars)) == first.scalars
    assert first.scalars["visual_tokens_into_layers"] == pytest.approx(54, abs=1)
    error = np.hypot(*(np.array(first.plan.waypoints_in_ego)[-1, :2] - first.sample.future_in_ego[-1, :2]))
    assert first.scalars["error_at_3_s_m"] == pytest.approx(error)
    assert "error_at_3_s_m" not in last.scalars and len(last.true_path) == 1
