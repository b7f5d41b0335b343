"""Two-frame extended comfort, and one-stage and two-stage results, against NAVSIM's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.navsim.aggregation import Stages, one_stage, two_stage
from eval_nuscenes.navsim.comfort import extended_comfort
from eval_nuscenes.navsim.scoring import EC, EP, FrameScore, score_plan
from vla_autoprune.errors import InputError

PROGRESS_TOLERANCE = 1e-6
TOLERANCE = 1e-9


def scored(golden: Any, name: str, devkit: Any = "v2") -> FrameScore:
    case = golden.case(name)
    return score_plan(golden.scene(case["scene"], devkit), golden.path(case))


def test_extended_comfort_of_neighbouring_frames(golden: Any) -> None:
    verdicts = set()
    for pair in golden.files["extended_comfort.json"]:
        now, previous = scored(golden, pair["now"]), scored(golden, pair["previous"])
        _, rms = extended_comfort(now.drive.states, previous.drive.states, pair["interval_s"])
        for name, expected in pair["rms"].items():
            assert rms[name] == pytest.approx(expected, abs=3e-7), (pair["now"], pair["previous"], name)
        previous = replace(previous, time_us=now.time_us - round(pair["interval_s"] * 1e6))
        result = one_stage([now, previous])
        by_token = {frame.token: frame for frame in result.frames}
        assert by_token[now.token].sub_scores[EC] == pair["extended_comfort"]
        assert EC not in by_token[previous.token].sub_scores
        assert by_token[now.token].score == pytest.approx(pair["epdms_now"], abs=PROGRESS_TOLERANCE)
        assert by_token[previous.token].score == pytest.approx(pair["epdms_previous"], abs=PROGRESS_TOLERANCE)
        assert result.score == pytest.approx(pair["mean"], abs=PROGRESS_TOLERANCE)
        verdicts.add(pair["extended_comfort"])
    assert verdicts == {0.0, 1.0}


def test_frames_of_other_logs_and_far_ones_are_no_neighbours(golden: Any) -> None:
    now, previous = scored(golden, "ec_now_cv"), scored(golden, "ec_prev_cv")
    late = replace(previous, time_us=now.time_us - 600_000)
    elsewhere = replace(previous, time_us=now.time_us - 500_000, log="another log")
    made_up = replace(previous, time_us=now.time_us - 500_000, synthetic=True)
    for neighbour in (late, elsewhere, made_up):
        assert EC not in one_stage([now, neighbour]).sub_scores


def test_pdms_is_a_plain_mean(golden: Any) -> None:
    names = ("cv", "hit_stopped", "hit_cone")
    result = one_stage([scored(golden, name, "v1") for name in names])
    expected = np.mean([golden.case(name)["v1"]["expected"]["pdms"] for name in names])
    assert result.score == pytest.approx(expected, abs=PROGRESS_TOLERANCE)


def staged(golden: Any) -> tuple[list[FrameScore], list[Stages], dict[str, Any]]:
    record = golden.files["two_stage.json"]
    frames, groups = [], []
    for group in record["groups"]:
        first = [group["now"], group["previous"]]
        second = [pair[side] for pair in group["second_stage"] for side in ("now", "previous")]
        for entry in first + second:
            frames.append(
                replace(
                    scored(golden, entry["case"]),
                    token=entry["token"],
                    time_us=round(entry["start_time_s"] * 1e6),
                    end_m=np.array(entry.get("endpoint", (0.0, 0.0))),
                    start_m=np.array(entry.get("start_point", (0.0, 0.0))),
                    synthetic=entry in second,
                )
            )
        pairs = tuple((pair["now"]["token"], pair["previous"]["token"]) for pair in group["second_stage"])
        groups.append(Stages(group["now"]["token"], group["previous"]["token"], pairs))
    return frames, groups, record


def test_two_stages(golden: Any) -> None:
    frames, groups, record = staged(golden)
    result = two_stage(frames, groups)
    by_token = {frame.token: frame for frame in result.frames}
    for token, row in record["rows"].items():
        assert result.weights[token] == pytest.approx(row["weight"], abs=TOLERANCE), token
        assert by_token[token].score == pytest.approx(row["score"], abs=PROGRESS_TOLERANCE), token
        for name, value in by_token[token].sub_scores.items():
            tolerance = PROGRESS_TOLERANCE if name == EP else 0.0
            assert value == pytest.approx(row[name], abs=tolerance), (token, name)
    for stage, means in (("stage_one", result.stage_one), ("stage_two", result.stage_two)):
        for name, value in means.items():
            tolerance = PROGRESS_TOLERANCE if name in (EP, "score") else TOLERANCE
            assert value == pytest.approx(record[stage][name], abs=tolerance), (stage, name)
    assert result.score == pytest.approx(record["combined"]["score"], abs=PROGRESS_TOLERANCE)


def test_two_stages_need_every_frame(golden: Any) -> None:
    frames, groups, _ = staged(golden)
    with pytest.raises(InputError, match="1 frames of the stages have no plan or scene: g0_s1_now"):
        two_stage([frame for frame in frames if frame.token != "g0_s1_now"], groups)
    late = [replace(frame, time_us=0) if frame.token == "g1_prev" else frame for frame in frames]
    with pytest.raises(InputError, match=r"g1_now is \d+\.\d+ s after g1_prev"):
        two_stage(late, groups)


def test_what_cannot_be_averaged_is_refused(golden: Any) -> None:
    now = scored(golden, "ec_now_cv")
    with pytest.raises(InputError, match="no frame was scored"):
        one_stage([])
    with pytest.raises(InputError, match="frames come twice: ec_now"):
        one_stage([now, now])
    with pytest.raises(InputError, match="mixed"):
        one_stage([now, scored(golden, "cv", "v1")])
