from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from eval_nuscenes.map_expansion import LOCATIONS
from eval_nuscenes.nuscenes_writer import VERSION, Dataset, dataset_options, read_record, write_dataset
from eval_nuscenes.world.scene import (
    Actor,
    ActorState,
    EgoPose,
    Lane,
    RoadMap,
    Scene,
    TrafficLight,
    WorldState,
)
from vla_autoprune.errors import InputError
from vla_autoprune.frame import CAMERAS, Command

pytest.importorskip("nuscenes")

DURATION_S = 6.0
SPEED = 8.0
ACTORS = (
    Actor("lead", "vehicle.car", 1.9, 4.6, 1.6, (200, 30, 30)),
    Actor("walker", "human.pedestrian.adult", 0.7, 0.6, 1.75, (30, 30, 200)),
    Actor("parked", "vehicle.truck", 2.5, 8.0, 3.2, (90, 90, 90)),
    Actor("leaver", "vehicle.bicycle", 0.7, 1.8, 1.5, (0, 90, 0)),
)


def line(start: tuple[float, float], end: tuple[float, float], count: int = 21) -> np.ndarray:
    return np.linspace(start, end, count)


def box(west: float, south: float, east: float, north: float) -> np.ndarray:
    return np.array([(west, south), (east, south), (east, north), (west, north)], dtype=np.float64)


def right_turn() -> np.ndarray:
    """A quarter circle of 8 m radius from the right eastbound lane to the south."""
    angle = np.linspace(np.pi / 2, 0, 14)
    return np.array([100.0, -10.0]) + 8.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def crossroads() -> RoadMap:
    """Two eastbound lanes to a junction at x = 100..112, then straight on or right."""
    lanes = (
        Lane("left", line((0, 2), (100, 2), 101), 4.0, 12.0, ("left_on",), right_neighbour="right"),
        Lane("right", line((0, -2), (100, -2), 101), 4.0, 12.0, ("right_on", "turn"), left_neighbour="left"),
        Lane("left_on", line((100, 2), (112, 2), 13), 4.0, 12.0, ("left_far",), is_connector=True),
        Lane("right_on", line((100, -2), (112, -2), 13), 4.0, 12.0, ("right_far",), is_connector=True),
        Lane("turn", right_turn(), 4.0, 5.0, ("south",), is_connector=True),
        Lane("left_far", line((112, 2), (180, 2), 69), 4.0, 12.0, right_neighbour="right_far"),
        Lane("right_far", line((112, -2), (180, -2), 69), 4.0, 12.0, left_neighbour="left_far"),
        Lane("south", line((108, -10), (108, -60), 51), 4.0, 8.0),
    )
    light = TrafficLight(
        "signal", (113, -5, 5), np.pi, np.array([(98.0, -4.0), (98.0, 4.0)]), ("left", "right")
    )
    return RoadMap(
        lanes=lanes,
        road_segments=(box(0, -4, 100, 4), box(112, -4, 180, 4), box(106, -60, 110, -10)),
        intersections=(box(100, -10, 112, 4),),
        crossings=(box(101, -4, 104, 4),),
        walkways=(box(0, 4, 100, 6.5), box(0, -6.5, 98, -4)),
        lane_dividers=(line((0, 0), (100, 0)),),
        road_dividers=(line((0, 4), (100, 4)),),
        lights=(light,),
        buildings=((box(20, 12, 60, 30), 9.0),),
        yield_lines=(np.array([(106.0, -11.0), (110.0, -11.0)]),),
    )


def crossroads_drive(name: str, seed: int, duration_s: float, kind: str) -> Scene:
    """Drive east at a constant speed behind a car, past a pedestrian and a parked truck."""
    states = []
    start = 5.0 + seed % 7
    for tick in range(round(duration_s * 10) + 1):
        time_s = tick / 10
        x = start + SPEED * time_s
        actors = [
            ActorState(0, x + 20, -2.0, 0.0, SPEED),
            ActorState(1, 60.0, 8.0 - 1.2 * time_s, -np.pi / 2, 1.2),
            ActorState(2, 130.0, -3.0, 0.0, 0.0),
        ]
        if time_s < 2.0 or time_s > 4.0:
            actors.insert(0, ActorState(3, 40.0, 3.0, np.pi, 0.0))
        ego = EgoPose(x, -2.0, 0.0, SPEED, 0.0, 0.0)
        command = Command.RIGHT if x > 30 else Command.STRAIGHT
        states.append(WorldState(time_s, ego, tuple(actors), ("red",), command))
    return Scene(
        name,
        kind,
        "boston-seaport",
        seed,
        crossroads(),
        ACTORS,
        tuple(states),
        ("right", "right_on", "right_far"),
        0.9,
    )


def options(**changes: object) -> object:
    values = {"scenes": 5, "duration_s": DURATION_S, "width": 160, "height": 90, "kinds": ("free", "lead")}
    return dataset_options(**{**values, **changes})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("data") / "synth"
    return write_dataset(root, options(), workers=1, simulate=crossroads_drive)


@pytest.fixture(scope="module")
def nusc(dataset: Dataset):
    from nuscenes.nuscenes import NuScenes

    return NuScenes(version=VERSION, dataroot=str(dataset.root), verbose=False)


@pytest.fixture(scope="module")
def city(dataset: Dataset):
    from nuscenes.map_expansion.map_api import NuScenesMap

    return NuScenesMap(dataroot=str(dataset.root), map_name=LOCATIONS[0])


def annotations(nusc, name: str) -> list[dict]:
    """The boxes of an actor of the fixture in the first scene, in order, told by its category."""
    category = next(actor.category for actor in ACTORS if actor.name == name)
    found, scene = [], nusc.scene[0]
    token = scene["first_sample_token"]
    while token:
        sample = nusc.get("sample", token)
        boxes = [nusc.get("sample_annotation", token) for token in sample["anns"]]
        found += [box for box in boxes if box["category_name"] == category]
        token = sample["next"]
    return found


# --- tables


def test_every_token_resolves_and_none_occurs_twice(nusc) -> None:
    for table in nusc.table_names:
        records = getattr(nusc, table)
        assert len({record["token"] for record in records}) == len(records), table
        for record in records:
            for key, value in record.items():
                if key.endswith("_token") and key != "map_token" and value:
                    target = key.removesuffix("_token").removeprefix("first_").removeprefix("last_")
                    target = {"annotation": "sample_annotation"}.get(target, target)
                    nusc.get(target, value)
    assert len(nusc.scene) == 5
    assert {log["location"] for log in nusc.log} == set(LOCATIONS)


def test_samples_chain_at_two_hertz_with_all_sensors(nusc) -> None:
    for scene in nusc.scene:
        times, token = [], scene["first_sample_token"]
        while token:
            sample = nusc.get("sample", token)
            assert set(sample["data"]) == {*CAMERAS, "LIDAR_TOP"}
            times.append(sample["timestamp"])
            token = sample["next"]
        assert len(times) == scene["nbr_samples"] == 13
        assert set(np.diff(times)) == {500_000}


def test_images_have_the_size_the_tables_say(nusc) -> None:
    import cv2

    for record in nusc.sample_data[:: len(nusc.sample_data) // 12]:
        path = Path(nusc.dataroot) / record["filename"]
        if record["channel"] != "LIDAR_TOP":
            assert cv2.imread(str(path)).shape == (90, 160, 3) == (record["height"], record["width"], 3)


def test_boxes_fall_into_the_cameras_that_look_at_them(nusc) -> None:
    lead = annotations(nusc, "lead")[0]
    sample = nusc.get("sample", lead["sample_token"])
    _, boxes, intrinsic = nusc.get_sample_data(sample["data"]["CAM_FRONT"])
    seen = next(box for box in boxes if box.token == lead["token"])
    pixel = intrinsic @ seen.center
    assert np.allclose(pixel[:2] / pixel[2], (80, 45), atol=16), "straight ahead"
    assert 17 < seen.center[2] < 20, "20 m ahead of the rear axle"
    _, behind, _ = nusc.get_sample_data(sample["data"]["CAM_BACK"])
    assert lead["token"] not in {box.token for box in behind}


def test_box_velocity_is_the_actors_speed(nusc) -> None:
    for name, velocity in (("lead", (SPEED, 0, 0)), ("walker", (0, -1.2, 0)), ("parked", (0, 0, 0))):
        for box in annotations(nusc, name):
            np.testing.assert_allclose(nusc.box_velocity(box["token"]), velocity, atol=1e-5)


def test_boxes_lie_on_the_ground_in_nuscenes_size_order(nusc) -> None:
    box = annotations(nusc, "parked")[0]
    assert box["size"] == [2.5, 8.0, 3.2]
    assert box["translation"][2] == 1.6


def test_attributes_follow_motion(nusc) -> None:
    def attributes(name: str) -> set[str]:
        return {
            nusc.get("attribute", token)["name"]
            for box in annotations(nusc, name)
            for token in box["attribute_tokens"]
        }

    assert attributes("lead") == {"vehicle.moving"}
    assert attributes("parked") == {"vehicle.parked"}
    assert attributes("walker") == {"pedestrian.moving"}
    assert attributes("leaver") == {"cycle.without_rider"}


def test_tracks_have_no_gaps_in_time(nusc) -> None:
    for instance in nusc.instance:
        token, times = instance["first_annotation_token"], []
        while token:
            box = nusc.get("sample_annotation", token)
            times.append(nusc.get("sample", box["sample_token"])["timestamp"])
            token = box["next"]
        assert len(times) == instance["nbr_annotations"]
        assert set(np.diff(times)) <= {500_000}
    bicycle = nusc.field2token("category", "name", "vehicle.bicycle")[0]
    assert len(nusc.field2token("instance", "category_token", bicycle)) == 2 * 5, (
        "gone and back is two instances"
    )


def test_actors_are_annotated_only_near_the_ego_vehicle(nusc) -> None:
    truck = annotations(nusc, "parked")
    assert 0 < len(truck) < 13
    for box in nusc.sample_annotation:
        sample = nusc.get("sample", box["sample_token"])
        pose = nusc.get("ego_pose", nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["ego_pose_token"])
        assert np.hypot(*(np.array(box["translation"]) - pose["translation"])[:2]) <= 100.0


def test_lidar_counts_are_the_points_in_the_boxes(nusc) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    counted = 0
    for sample in nusc.sample[::7]:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        cloud = LidarPointCloud.from_file(path)
        assert len(cloud.points.T) > 1000
        for one in boxes:
            box = nusc.get("sample_annotation", one.token)
            inside = points_in_box(one, cloud.points[:3], wlh_factor=1.002).sum()
            ground = 4  # a box stands on the ground: rays that end at its foot may count as either
            assert abs(int(inside) - box["num_lidar_pts"]) <= ground
            counted += box["num_lidar_pts"]
    assert counted > 100


def test_visibility_tells_hidden_from_seen(nusc) -> None:
    lead, truck = annotations(nusc, "lead"), annotations(nusc, "parked")
    assert {box["visibility_token"] for box in lead} == {"4"}
    assert nusc.get("visibility", "4")["level"] == "v80-100"
    assert {box["visibility_token"] for box in truck} - {"4"}, "the lead car stands before the truck at times"


# --- maps


def first_pose(nusc, scene: dict) -> np.ndarray:
    sample = nusc.get("sample", scene["first_sample_token"])
    data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    return np.array(nusc.get("ego_pose", data["ego_pose_token"])["translation"])


def test_the_map_has_every_layer(city) -> None:
    for layer in [*city.non_geometric_layers, "lane_connector", "polygon", "line", "node"]:
        records = getattr(city, layer)
        assert records or layer == "carpark_area", layer
    assert len(city.lane) == 2 * 5, "two scenes share this location"
    assert len(city.lane_connector) == 2 * 3


def test_scenes_of_a_location_lie_apart_on_a_canvas(nusc, city) -> None:
    nodes = np.array([(node["x"], node["y"]) for node in city.node])
    assert np.all(nodes > 0)
    assert np.all(nodes < city.canvas_edge)
    first, second = (first_pose(nusc, nusc.scene[index]) for index in (0, 4))
    assert np.hypot(*(first - second)[:2]) > 30


def test_ego_poses_are_on_the_drivable_area_and_its_layers(nusc, city) -> None:
    from nuscenes.map_expansion.utils import get_egoposes_on_drivable_ratio

    for index in (0, 4):
        assert get_egoposes_on_drivable_ratio(nusc, city, nusc.scene[index]["token"]) == 1.0
        x, y, _ = first_pose(nusc, nusc.scene[index])
        layers = city.layers_on_point(x, y)
        assert all(layers[name] for name in ("drivable_area", "road_segment", "road_block", "lane"))
        assert not layers["walkway"]
        records = city.get_records_in_radius(
            x + 90, y, 40, ["lane", "lane_connector", "stop_line", "traffic_light"]
        )
        assert (len(records["lane"]), len(records["lane_connector"])) == (5, 3)
        assert len(records["stop_line"]) == 2
        assert len(records["traffic_light"]) == 1


def test_lanes_discretise_to_their_centrelines(nusc, city) -> None:
    x, y, _ = first_pose(nusc, nusc.scene[0])
    drive = crossroads_drive("", read_record(Path(nusc.dataroot)).scenes[0].seed, DURATION_S, "")
    shift = np.array([x, y]) - (drive.states[0].ego.x, drive.states[0].ego.y)
    near = city.get_records_in_radius(x, y, 200, ["lane", "lane_connector"])
    paths = city.discretize_lanes(near["lane"] + near["lane_connector"], 0.1)
    for lane in drive.map.lanes:
        distances = [
            np.linalg.norm(np.array(poses)[:, None, :2] - (lane.centreline + shift)[None], axis=2).min(axis=0)
            for poses in paths.values()
        ]
        assert min(distance.max() for distance in distances) < 0.06, (
            f"a path passes all points of {lane.name}"
        )
    assert all(len(poses) for poses in city.discretize_centerlines(1.0))


def test_lanes_lead_to_their_successors(nusc, city) -> None:
    x, y, _ = first_pose(nusc, nusc.scene[0])
    lane = city.get_closest_lane(x, y)
    assert city.record_on_point(x, y, "lane") == lane
    onward = city.get_outgoing_lane_ids(lane)
    assert len(onward) == 2
    assert all(token in {record["token"] for record in city.lane_connector} for token in onward)
    assert all(city.get_incoming_lane_ids(token) == [lane] for token in onward)
    end = np.array(city.discretize_lanes([lane], 0.5)[lane][-1])
    for token in onward:
        start = np.array(city.get_arcline_path(token)[0]["start_pose"])
        np.testing.assert_allclose(start[:2], end[:2], atol=1e-6)
    assert city.get_next_roads(x, y)["road_segment"], "the junction shares nodes with the lane's end"


def test_stop_lines_name_their_light_and_the_light_its_road(city) -> None:
    stop, give_way = city.stop_line[:2]
    assert (stop["stop_line_type"], give_way["stop_line_type"]) == ("TRAFFIC_LIGHT", "YIELD")
    light = stop["cue"][0]
    assert {item["color"] for item in light["items"]} == {"RED", "YELLOW", "GREEN"}
    assert city.get("road_block", light["from_road_block_token"])


def test_map_patches_show_the_road_as_pixels(nusc, city) -> None:
    x, y, _ = first_pose(nusc, nusc.scene[0])
    layers = ["drivable_area", "lane", "road_segment", "walkway", "lane_divider", "road_divider", "stop_line"]
    masks = city.get_map_mask((x, y, 40, 40), 0.0, layers, (200, 200))
    assert masks.shape == (7, 200, 200)
    drivable, walkway = masks[0], masks[3]
    assert drivable[100, 100] == 1
    assert drivable[100 + 45, 150] == 0, "9 m north of the right lane is no road"
    assert walkway[100 + 37, 150] == 1


def test_the_mask_shows_roads_where_the_poses_are(nusc) -> None:
    for scene in nusc.scene:
        log = nusc.get("log", scene["log_token"])
        mask = nusc.get("map", log["map_token"])["mask"]
        x, y, _ = first_pose(nusc, scene)
        around = np.array([(x, y), (x, y + 5), (x, y + 7.5), (x, y + 9.5), (x, y - 3.5), (x, y - 5.5)])
        assert mask.is_on_mask(*around.T).tolist() == [True, True, True, False, True, False]


def test_the_devkit_finds_the_mask_by_its_own_name(dataset: Dataset) -> None:
    from nuscenes.map_expansion.bitmap import BitMap

    for location in LOCATIONS:
        assert BitMap(str(dataset.root), location, "semantic_prior").image.max() == 255


# --- CAN bus


@pytest.fixture(scope="module")
def can(dataset: Dataset):
    from nuscenes.can_bus.can_bus_api import NuScenesCanBus

    return NuScenesCanBus(dataroot=str(dataset.root))


def test_can_bus_has_every_message_at_its_rate(nusc, can) -> None:
    name = nusc.scene[0]["name"]
    meta = can.get_messages(name, "meta")
    for message in can.can_messages:
        rows = can.get_messages(name, message)
        assert meta[message.lower()]["message_count"] == len(rows)
    assert meta["pose"]["message_freq"] == pytest.approx(50)
    assert meta["vehicle_monitor"]["message_freq"] == pytest.approx(2)
    can.print_all_message_stats(name)


def test_can_poses_meet_the_ego_poses(nusc, can) -> None:
    for scene in nusc.scene:
        poses = {row["utime"]: row for row in can.get_messages(scene["name"], "pose")}
        token = scene["first_sample_token"]
        while token:
            sample = nusc.get("sample", token)
            data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            ego = nusc.get("ego_pose", data["ego_pose_token"])
            pose = poses[sample["timestamp"]]
            np.testing.assert_allclose(pose["pos"], ego["translation"], atol=1e-5)
            np.testing.assert_allclose(pose["orientation"], ego["rotation"], atol=1e-5)
            assert pose["vel"] == [SPEED, 0.0, 0.0]
            token = sample["next"]


def test_can_signs_follow_the_documentation(can) -> None:
    from eval_nuscenes.can_bus import can_bus_messages

    drive = crossroads_drive("scene-2001", 0, 4.0, "free")
    left = [
        dataclasses.replace(
            state, ego=dataclasses.replace(state.ego, yaw_rate_rps=0.2, acceleration_mps2=-2.0)
        )
        for state in drive.states
    ]
    messages = can_bus_messages(dataclasses.replace(drive, states=tuple(left)), 0, (0,))
    assert messages["pose"][5]["rotation_rate"][2] > 0
    assert messages["pose"][5]["accel"][0] == -2.0
    assert messages["vehicle_monitor"][1]["steering"] > 0
    assert messages["vehicle_monitor"][1]["yaw_rate"] == pytest.approx(np.degrees(0.2), abs=0.1)
    assert messages["vehicle_monitor"][1]["vehicle_speed"] == pytest.approx(SPEED * 3.6)
    assert messages["vehicle_monitor"][1]["brake"] > 0
    assert messages["steeranglefeedback"][5]["value"] < 0, "positive to the right"


def test_the_route_passes_along_the_drive(nusc, can) -> None:
    for scene in nusc.scene:
        route, pose = can.get_pose_and_route(scene["name"])
        gaps = np.linalg.norm(pose[:, None] - route[None], axis=2).min(axis=1)
        assert gaps.max() < 0.3


def test_each_keyframe_has_its_command(nusc, dataset: Dataset) -> None:
    scene = nusc.scene[0]
    rows = json.loads((dataset.root / "can_bus" / f"{scene['name']}_command.json").read_text())
    times = sorted(sample["timestamp"] for sample in nusc.sample if sample["scene_token"] == scene["token"])
    assert [row["utime"] for row in rows] == times
    assert {row["command"] for row in rows} == {"straight", "right"}


# --- prediction


def test_predict_helper_sees_past_future_and_speed(nusc) -> None:
    from nuscenes.prediction import PredictHelper

    prediction = PredictHelper(nusc)
    box = annotations(nusc, "lead")[6]
    where = box["instance_token"], box["sample_token"]
    future = prediction.get_future_for_agent(*where, seconds=3, in_agent_frame=True)
    np.testing.assert_allclose(future, [(0, SPEED * t) for t in (0.5, 1, 1.5, 2, 2.5, 3)], atol=1e-4)
    past = prediction.get_past_for_agent(*where, seconds=2, in_agent_frame=False)
    assert len(past) == 4
    assert prediction.get_velocity_for_agent(*where) == pytest.approx(SPEED, abs=1e-4)
    assert prediction.get_acceleration_for_agent(*where) == pytest.approx(0, abs=1e-4)
    assert prediction.get_heading_change_rate_for_agent(*where) == pytest.approx(0, abs=1e-6)
    assert prediction.get_map_name_from_sample_token(where[1]) == LOCATIONS[0]


# --- the data set as a whole


def test_splits_hold_every_scene_once_and_share_kinds(dataset: Dataset) -> None:
    splits = json.loads((dataset.root / "splits.json").read_text())
    assert list(splits) == ["train", "calibration", "val"]
    assert sorted(name for names in splits.values() for name in names) == [
        entry.name for entry in dataset.record.scenes
    ]
    assert [len(splits[name]) for name in splits] == [1, 1, 3]


def test_the_same_options_give_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "elsewhere", options(), workers=1, simulate=crossroads_drive)
    assert not again.reused
    assert again.record == dataset.record
    other = write_dataset(tmp_path / "other", options(seed=1, scenes=1), workers=1, simulate=crossroads_drive)
    assert other.record.content_sha256 != dataset.record.content_sha256


def test_no_file_knows_where_it_was_written(dataset: Dataset) -> None:
    for path in dataset.root.rglob("*.json"):
        assert str(dataset.root.parent) not in path.read_text()


def test_a_finished_data_set_is_reused_and_left_alone(dataset: Dataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")}
    again = write_dataset(dataset.root, options(), workers=1, simulate=crossroads_drive)
    assert again.reused
    assert again.record == dataset.record
    assert {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")} == before


def test_a_foreign_folder_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"not a synthetic data set .*--out"):
        write_dataset(tmp_path, options(), workers=1, overwrite=True, simulate=crossroads_drive)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_other_options_and_damaged_files_are_named_and_can_be_overwritten(tmp_path: Path) -> None:
    root = tmp_path / "synth"
    write_dataset(root, options(scenes=1), workers=1, simulate=crossroads_drive)
    with pytest.raises(InputError, match=r"seed 0 instead of 3.*--overwrite"):
        write_dataset(root, options(scenes=1, seed=3), workers=1, simulate=crossroads_drive)
    (root / VERSION / "sample.json").write_text("[]")
    with pytest.raises(InputError, match=r"changed, added or lost.*--overwrite"):
        write_dataset(root, options(scenes=1), workers=1, simulate=crossroads_drive)
    repaired = write_dataset(root, options(scenes=1), workers=1, overwrite=True, simulate=crossroads_drive)
    assert not repaired.reused
    assert json.loads((root / VERSION / "sample.json").read_text())


def failing_drive(name: str, seed: int, duration_s: float, kind: str) -> Scene:
    if name.endswith("2003"):
        raise KeyboardInterrupt
    return crossroads_drive(name, seed, duration_s, kind)


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "synth", options(), workers=1, simulate=failing_drive)
    assert list(tmp_path.iterdir()) == []


def test_the_rests_of_a_killed_run_are_cleared_away(tmp_path: Path) -> None:
    rest = tmp_path / "synth.synth-partial"
    (rest / VERSION).mkdir(parents=True)
    (rest / "stray").write_text("")
    made = write_dataset(tmp_path / "synth", options(scenes=1), workers=1, simulate=crossroads_drive)
    assert not rest.exists()
    assert not (made.root / "stray").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": 0}, "^--scenes 0: expected 1 to 1000$"),
        ({"seed": -1}, "^--seed -1: expected 0 or more$"),
        ({"duration_s": 1}, "^--duration-s 1: expected 4.0 to 60.0$"),
        ({"kinds": ("flying",)}, "^--kinds: there is no flying; choose from"),
        ({"val_fraction": 0.8, "calibration_fraction": 0.4}, r"0\.8 \+ --calibration-fraction 0\.4 > 1"),
        ({"jpeg_quality": 101}, "^--jpeg-quality 101: expected 30 to 100$"),
        ({"seed": "x"}, "^--seed 'x': Input should be a valid integer"),
    ],
)
def test_bad_options_are_named(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**changes)


# --- the world itself


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    small = dataset_options(scenes=7, duration_s=4.0, width=96, height=54)
    return write_dataset(tmp_path_factory.mktemp("world") / "synth", small, workers=1)


def test_more_workers_write_the_same_bytes(world: Dataset, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "synth", world.record.options, workers=2)
    assert again.record == world.record


def test_the_devkit_opens_every_kind_of_drive(world: Dataset) -> None:
    from nuscenes.can_bus.can_bus_api import NuScenesCanBus
    from nuscenes.map_expansion.map_api import NuScenesMap
    from nuscenes.map_expansion.utils import get_egoposes_on_drivable_ratio
    from nuscenes.nuscenes import NuScenes
    from shapely.geometry import Polygon

    nusc = NuScenes(version=VERSION, dataroot=str(world.root), verbose=False)
    can = NuScenesCanBus(dataroot=str(world.root))
    assert can.list_misaligned_routes() == []
    assert {entry.kind for entry in world.record.scenes} == set(world.record.options.kinds)
    maps = {location: NuScenesMap(dataroot=str(world.root), map_name=location) for location in LOCATIONS}
    for scene in nusc.scene:
        location = nusc.get("log", scene["log_token"])["location"]
        assert get_egoposes_on_drivable_ratio(nusc, maps[location], scene["token"]) == 1.0
        x, y, _ = first_pose(nusc, scene)
        assert maps[location].get_closest_lane(x, y)
        assert maps[location].get_next_roads(x, y)["road_segment"]
    for city in maps.values():
        shapes = [city.extract_polygon(record["token"]) for record in city.polygon]
        assert all(isinstance(shape, Polygon) and shape.is_valid and shape.area > 0 for shape in shapes)
        for token, ends in city.connectivity.items():
            for onward in ends["outgoing"]:
                end = city.get_arcline_path(token)[-1]["end_pose"]
                start = city.get_arcline_path(onward)[0]["start_pose"]
                np.testing.assert_allclose(end[:2], start[:2], atol=0.05)


def test_boxes_cover_what_the_cameras_see_of_vehicles(world: Dataset) -> None:
    """Where the renderer labels a vehicle's pixels, the devkit projects a box of the tables."""
    from nuscenes.nuscenes import NuScenes

    from eval_nuscenes.world.render import PEDESTRIAN_LABEL, RIG, VEHICLE_LABEL, render_with_labels
    from eval_nuscenes.world.traffic import simulate_scene

    nusc = NuScenes(version=VERSION, dataroot=str(world.root), verbose=False)
    covered = seen = 0
    for record, entry in zip(nusc.scene, world.record.scenes, strict=True):
        scene = simulate_scene(entry.name, entry.seed, 4.0, entry.kind)
        sample = nusc.get("sample", record["first_sample_token"])
        _, labels = render_with_labels(scene, 0, RIG, 96, 54)
        for camera, label in labels.items():
            scale = label.shape[1] / 96
            mask = np.zeros(label.shape, dtype=bool)
            _, boxes, intrinsic = nusc.get_sample_data(sample["data"][camera])
            for one in boxes:
                corners = intrinsic @ one.corners()
                if corners[2].min() > 0.5:
                    pixels = (corners[:2] / corners[2] * scale).round().astype(int)
                    (left, top), (right, bottom) = pixels.min(axis=1), pixels.max(axis=1)
                    mask[max(top - 1, 0) : bottom + 2, max(left - 1, 0) : right + 2] = True
            distance = np.where(label < PEDESTRIAN_LABEL, label.astype(int) - VEHICLE_LABEL, -1)
            vehicle = (distance > 8) & (distance < 60)  # nearer boxes may reach behind the camera
            seen += vehicle.sum()
            covered += (vehicle & mask).sum()
    assert seen > 500
    assert covered > 0.98 * seen
