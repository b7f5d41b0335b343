"""Result files of other models: read as they are, refused with a list of what is wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_nuscenes import predictions
from eval_nuscenes.predictions import (
    check_reading,
    covered,
    headings_along,
    prediction_variants,
    read_predictions,
    sample_record,
)
from eval_nuscenes.summary import score_sample
from vla_autoprune.errors import InputError

STEPS = np.arange(1, 7)
AHEAD = [[2.0 * step, 0.0] for step in range(1, 7)]
RIGHT_AHEAD = [[0.0, 2.0 * step] for step in range(1, 7)]


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def own(predictions: list[dict], **changes: Any) -> dict:
    return {"format": "vla_autoprune.predictions/1", "frame": "ego", "predictions": predictions} | changes


def answer(points: str) -> str:
    return f"<PLANNING>Predicted future movement: {points}</PLANNING>"


@pytest.mark.parametrize(
    ("document", "read_as"),
    [
        ({"t1": RIGHT_AHEAD, "t2": RIGHT_AHEAD}, "token to waypoints"),
        ({"t1_trajectory": [RIGHT_AHEAD], "t2_trajectory": [RIGHT_AHEAD]}, "token to waypoints"),
        ([{"token": "t1", "planning_traj": [RIGHT_AHEAD]}, {"token": "t2", "planning_traj": RIGHT_AHEAD}],
         "token and answer"),
        ([{"id": "t1", "predict": "(0.00,2.00), (0.0, 4.0), (0,6) (0.0,8.0) (0.0,10.0) (0.0,12.0)"},
          {"id": "t2", "predict": answer("[0.0, 2.0], [0.0, 4.0], [0.0, 6], [0, 8], [0, 10.0], [0, 12.0]")}],
         "token and answer"),
        ('{"id": "t1", "question": "?", "answer": ["[(0,2),(0,4),(0,6),(0,8),(0,10),(0,12)]"]}\n'
         '{"id": "t2", "question": "?", "answer": ["[(0,2),(0,4),(0,6),(0,8),(0,10),(-0.0,12)]"]}\n',
         "token and answer"),
        ({name: ", ".join(f"(0e0, {2 * step:.2E})" for step in range(1, 7)) for name in ("t1", "t2")},
         "token to waypoints"),
        ({"plan_results": {name: [[[[9, 9]] * 6, [[0, 2.0]] * 6, [[9, 9]] * 6], [[[[0, 1, 0]]]]]
                           for name in ("t1", "t2")}}, "VAD's plan_results"),
    ],
)  # fmt: skip
def test_common_result_files_are_read(document: Any, read_as: str, tmp_path: Path) -> None:
    found = read_predictions(write(tmp_path / "plans.json", document), "lidar")
    assert (found.read_as, found.frame, found.name) == (read_as, "lidar", "plans")
    assert list(found.waypoints) == ["t1", "t2"]
    for plan in found.waypoints.values():
        np.testing.assert_allclose(plan, RIGHT_AHEAD)


def test_our_own_format_carries_headings_and_latencies(tmp_path: Path) -> None:
    plans = [{"token": "t1", "waypoints": [[*row, 0.1] for row in AHEAD], "latency_ms": 85.5}]
    found = read_predictions(write(tmp_path / "plans.json", own(plans)))
    assert found.frame == "ego" and found.waypoints["t1"].shape == (6, 3)
    assert found.latency_ms == {"t1": 85.5}


def plan(token: str = "t1", waypoints: Any = AHEAD, **more: Any) -> dict:
    return {"token": token, "waypoints": waypoints, **more}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (own([plan(), plan()]), "1 fault: t1 is there twice"),
        ('{"t1": %s, "t2": %s, "t1": %s}' % ((AHEAD,) * 3), "1 fault: t1 is there twice"),
        ({"t1": [*AHEAD[:5], [float("nan"), 0.0]]}, "t1 is not finite at step 5"),
        ({"t1": AHEAD[:5], "t2": AHEAD * 2}, "2 faults: t1 has 5 waypoints, needed: 6, .*; t2 has 12"),
        ({"t1": [[1.0] * 4] * 6}, r"t1 has shape \[6, 4\], allowed in frame ego: \[6, 2\] or \[6, 3\]"),
        ({"t1": "I would rather wait."}, "has no waypoints in its text but 'I would rather wait.', needed"),
        (
            {"t1": "PATH: [(2.0, 0.1, 0.05), (4.0, 0.2, 0.05)]"},
            r"t1 has no waypoints in its text but '\(2.0, 0.1, 0.05\)', needed: 6 of \(x, y\)",
        ),
        ({"t1": [[True, 0.0], *AHEAD[1:]]}, "t1 is no list of waypoints, it holds True"),
        ({"t1": [["2.0", 0.0], *AHEAD[1:]]}, "t1 is no list of waypoints, it holds '2.0'"),
        (own([plan(), plan("t2", [[2.0, False], *AHEAD[1:]])]), "t2 is no list of waypoints, it holds False"),
        (own([plan(latency_ms=True)]), "predictions.0.latency_ms: .*number"),
        ({"t1": [AHEAD, AHEAD]}, r"t1 has shape \[2, 6, 2\]"),
        ({f"t{number}": AHEAD[:3] for number in range(14)}, "14 faults: t0 .* and 4 more"),
        ({"t1": [*AHEAD[:5], [1e300, 0.0]]}, r"t1 is 1e\+300 m away at step 5, allowed: 10000 m"),
        ({"t1": [[2.0, 0.0, 5.0]] * 5 + [[2.0, 0.0, -12.0]]}, "t1 has a heading of 12, allowed: 6.28 rad"),
        ({"t1": [[10**400, 0]] * 6}, "t1 is no list of waypoints"),
        ("[" * 100_000, "is neither JSON nor JSON lines"),
        (json.dumps(own([plan()])).replace('"token"', '"token": "t", "token"'), "1 fault: token is there"),
        (own([plan()], times_s=[1, 2, 3, 4, 5, 6]), "times_s is .*; the protocols score .*resample"),
        (own([plan()], times_s=[]), "times_s is"),
        (own([plan()], frame="map"), "frame: .*'ego' or 'lidar'"),
        (own([plan(latency_ms=-1)]), "predictions.0.latency_ms"),
        (own([plan(), plan("t2", latency_ms=5)]), "t1 has no latency_ms, others have"),
        (own([plan()], frame="lidar"), "has its waypoints in frame lidar, not ego"),
        ("{", "is neither JSON nor JSON lines"),
        ([1, 2], "is no predictions file; expected format"),
        ({"meta": {"use_camera": True}, "results": {}}, "is no predictions file"),
    ],
)
def test_faults_are_listed(document: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_predictions(write(tmp_path / "plans.json", document), "ego")


@pytest.mark.parametrize("step", [["a", "b"], ["0", "1"], [False, True]])
def test_steps_of_vad_that_are_no_numbers_are_refused(step: list[Any], tmp_path: Path) -> None:
    document = {"plan_results": {"t1": [[[step] * 6] * 3, [0, 1, 0]]}}
    with pytest.raises(InputError, match="t1 is no list of waypoints, it holds"):
        read_predictions(write(tmp_path / "plans.json", document))


def test_a_frame_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not say which frame its waypoints are in; give --frame ego"):
        read_predictions(write(tmp_path / "plans.json", {"t1": AHEAD}))


def test_pickles_of_numpy_arrays_are_read(tmp_path: Path) -> None:
    plans = {"t1": np.array([RIGHT_AHEAD]), "t2": np.array(RIGHT_AHEAD, dtype=np.float32)}
    path = tmp_path / "pred_trajs_dict.pkl"
    path.write_bytes(pickle.dumps(plans))
    found = read_predictions(path, "lidar")
    assert found.read_as == "token to waypoints"
    np.testing.assert_allclose(found.waypoints["t2"], RIGHT_AHEAD)


def list_in_itself() -> list:
    made: list = []
    made.append(made)
    return made


def list_of_lists_of_one() -> list:
    made: list = []
    for _ in range(40):
        made = [made, made]
    return made


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch %s'\ntR.",
        pickle.dumps({"t1": 1j}),
        b"\x80\x04",
        pickle.dumps(list_in_itself()),
        pickle.dumps(list_of_lists_of_one()),
    ],
    ids=["command", "complex number", "cut off", "list in itself", "list named again and again"],
)
def test_other_pickles_are_refused_and_run_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "MOST_VALUES", 1000)
    path, sign = tmp_path / "results.pkl", tmp_path / "ran"
    path.write_bytes(content.replace(b"%s", str(sign).encode()))
    with pytest.raises(InputError, match=r"only plain values and numpy arrays are read: write the plans as"):
        read_predictions(path, "lidar")
    assert not sign.exists()


def test_samples_without_a_plan_are_listed_or_left_out(tmp_path: Path) -> None:
    found = read_predictions(write(tmp_path / "plans.json", {"t1": AHEAD, "t3": AHEAD, "x": AHEAD}), "ego")
    with pytest.raises(InputError, match=r"1 fault: t2 is missing; .*--allow-missing"):
        covered([found], ["t1", "t2", "t3"])
    assert covered([found], ["t1", "t2", "t3"], allow_missing=True) == ["t1", "t3"]
    with pytest.raises(InputError, match=r"a plan for none of the 1 samples; its tokens are like t1, .* q"):
        covered([found], ["q"], allow_missing=True)


@pytest.mark.parametrize("frame", ["ego", "lidar"])
def test_the_truth_scores_zero_in_either_frame(frame: str, make_drive: Callable, tmp_path: Path) -> None:
    drive = make_drive()
    truth = {
        sample.token: (sample.future_in_ego if frame == "ego" else sample.truth.waypoints).tolist()
        for sample in drive.samples
    }
    found = read_predictions(write(tmp_path / "truth.json", truth), frame)
    check_reading(found, drive.samples)
    for sample in drive.samples:
        if not sample.truth.complete:
            continue
        scores = score_sample(sample, sample_record(sample, [found]), ("uniad", "stp3")).scores
        assert max(scores["uniad"]["truth"].distance_m) < (1e-6 if frame == "lidar" else 1e-5)
        assert max(scores["uniad"]["constant velocity"].distance_m) < 1


@pytest.mark.parametrize(("frame", "other"), [("ego", "lidar"), ("lidar", "ego")])
def test_the_wrong_frame_is_noticed(frame: str, other: str, make_drive: Callable, tmp_path: Path) -> None:
    drive = make_drive()
    path = write(
        tmp_path / "plans.json",
        {
            sample.token: (sample.future_in_ego[:, :2] if frame == "ego" else sample.truth.waypoints).tolist()
            for sample in drive.samples
        },
    )
    check_reading(read_predictions(path, frame), drive.samples)
    with pytest.raises(InputError, match=f"the frame is wrong: use --frame {frame}"):
        check_reading(read_predictions(path, other), drive.samples)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (lambda path: path * [1, -1], "read with left and right exchanged .*the ego frame has y to the left"),
        (lambda path: np.diff(path, axis=0, prepend=[[0, 0]]), "read as steps to add up .* are positions"),
        (lambda path: 100 * path, "read as centimetres .*waypoints are metres"),
    ],
    ids=["y to the right", "steps", "centimetres"],
)
def test_other_conventions_are_noticed(
    written: Callable, told: str, make_drive: Callable, tmp_path: Path
) -> None:
    drive = make_drive(scenes=14, keyframes=8)
    shaky = np.random.default_rng(0)
    plans = {
        sample.token: written(sample.future_in_ego[:, :2] + 0.1 * shaky.normal(size=(6, 2))).tolist()
        for sample in drive.samples
    }
    with pytest.raises(InputError, match=told):
        check_reading(read_predictions(write(tmp_path / "plans.json", plans), "ego"), drive.samples)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.5])
def test_a_bad_planner_is_not_taken_for_another_convention(
    share: float, make_drive: Callable, tmp_path: Path
) -> None:
    drive = make_drive(scenes=14, keyframes=8)
    plans = {sample.token: (share * sample.future_in_ego[:, :2]).tolist() for sample in drive.samples}
    check_reading(read_predictions(write(tmp_path / "slow.json", plans), "ego"), drive.samples)


def test_headings_follow_the_path_and_hold_where_it_stands() -> None:
    turned = 0.25 * STEPS
    arc = np.column_stack([20 * np.sin(turned), 20 * (1 - np.cos(turned))])
    np.testing.assert_allclose(headings_along(arc)[:5], turned[:5], atol=1e-9)
    stopping = np.array([[3.0, 0.3], [4.0, 0.4], [4.1, 0.41], [4.1, 0.4], [4.1, 0.41], [4.09, 0.41]])
    assert np.abs(headings_along(stopping)).max() < 0.2
    np.testing.assert_array_equal(headings_along(np.zeros((6, 2))), 0.0)


def test_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one, other = (
        read_predictions(write(folder / "plans.json", {"t1": AHEAD}), "ego")
        for folder in (tmp_path, tmp_path / "a")
    )
    with pytest.raises(InputError, match="told apart by name"):
        prediction_variants([one, other])
    baseline = read_predictions(write(tmp_path / "constant velocity.json", {"t1": AHEAD}), "ego")
    with pytest.raises(InputError, match=r"beside rows called constant velocity; .*: rename one"):
        prediction_variants([baseline])
    assert [row.kind for row in prediction_variants([one])] == ["predictions", "constant_velocity"]
