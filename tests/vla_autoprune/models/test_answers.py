from __future__ import annotations

import json

import numpy as np
import pytest

from vla_autoprune.errors import BundleError, InputError, PlanError
from vla_autoprune.models.actions import ActionCodec
from vla_autoprune.models.answers import (
    ActionCodebook,
    WaypointText,
    decoder_option,
    read_answer_format,
)

END = 2
PAIRS = ((4.0, 0.0), (8.0, 0.1), (12.0, 0.3), (16.0, 0.6), (16.02, 0.6), (16.02, 0.6))
TEXT = WaypointText(length=96, end_tokens=(END,))


def listed(pairs=PAIRS, form="({:.2f}, {:.2f})", joint=", "):
    return joint.join(form.format(*pair) for pair in pairs)


@pytest.mark.parametrize(
    "text",
    [
        listed(),
        f"[{listed()}]",
        f" [{listed(form='[{:+.2f},{:.2f}]', joint=',')}]. ",
        listed(joint="\n"),
        listed(form="( {:.3e} , {:.2f} )"),
    ],
)
def test_lists_of_pairs_are_read(text):
    waypoints = TEXT.waypoints([END], text)
    assert waypoints.dtype == np.float32 and np.allclose(waypoints[:, :2], PAIRS, atol=0.01)
    headings = [0.0, np.arctan2(0.1, 4), np.arctan2(0.2, 4), np.arctan2(0.3, 4)]
    assert np.allclose(waypoints[:4, 2], headings, atol=1e-6)
    assert np.allclose(waypoints[4:, 2], headings[-1], atol=1e-6)  # a standstill keeps its heading


def test_marks_and_axes():
    format_ = WaypointText(length=96, end_tokens=(END,), begin="<PLAN>", end="</PLAN>", axes="right_forward")
    text = f"I see (3, 4) cars. <PLAN>{listed([(-y, x) for x, y in PAIRS])}</PLAN> Drive safely."
    assert np.allclose(format_.waypoints([END], text)[:, :2], PAIRS, atol=0.01)
    with pytest.raises(PlanError, match=r"has no '<PLAN>': '\(4\.00"):
        format_.waypoints([END], listed())
    with pytest.raises(PlanError, match="does not end with '</PLAN>'"):
        format_.waypoints([END], f"<PLAN>{listed()}")


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "not a list of 6 pairs of numbers: ''"),
        ("I cannot help with that.", "not a list of 6 pairs"),
        (f"Sure: {listed()}", "not a list"),
        (f"{listed()} and more", "not a list"),
        (listed(PAIRS[:5]), "has 5 waypoints, a plan has 6"),
        (listed((*PAIRS, (1.0, 1.0))), "has 7 waypoints"),
        (listed().replace("8.00", "nan"), "not a list"),
        (listed().replace("8.00", "8.0.0"), "not a list"),
        (listed()[:-1], "not a list"),
        (listed().replace("12.00", "1200"), r"a waypoint 1200 m away; allowed are 200 m"),
    ],
)
def test_anything_else_is_refused_and_never_a_plan(text, message):
    with pytest.raises(PlanError, match=message):
        TEXT.waypoints([END], text)


MOTIONS = ((0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (2.0, 0.1, np.pi / 2), (1.0, 0.0, -0.1))
BOOK = ActionCodebook(length=8, end_tokens=(END,), first_token=100, motions=MOTIONS)


def test_motions_are_put_together_in_the_frame_of_the_step_before():
    waypoints = BOOK.waypoints([101, 102, 101, 100, 103, 100], "")
    expected = [
        (2, 0, 0),
        (4, 0.1, np.pi / 2),
        (4, 2.1, np.pi / 2),
        (4, 2.1, np.pi / 2),
        (4, 3.1, np.pi / 2 - 0.1),
    ]
    assert np.allclose(waypoints[:5], expected, atol=1e-6) and np.allclose(waypoints[5], waypoints[4])
    assert BOOK.is_complete([100] * 6) and not BOOK.is_complete([100] * 5) and BOOK.is_complete([100, END])


@pytest.mark.parametrize(
    "tokens,message",
    [
        ([101, 102, END], r"action 2 of the answer is token 2, not one of 100\.\.103"),
        ([101] * 5, "has 5 action tokens, a plan has 6"),
        ([7, *[101] * 6], "does not begin with an action token"),
        ([101, 101, 104, 101, 101, 101], "action 2 of the answer is token 104"),
        ([], "has 0 action tokens"),
    ],
)
def test_other_tokens_are_refused(tokens, message):
    with pytest.raises(PlanError, match=message):
        BOOK.waypoints(tokens, "")


def test_words_may_come_first_where_the_format_says_so():
    wordy = BOOK.model_copy(update={"text_first": True, "length": 20})
    assert np.array_equal(wordy.waypoints([7, 8, *[101] * 6], ""), BOOK.waypoints([101] * 6, ""))
    with pytest.raises(PlanError, match="action 3 of the answer is token 7"):
        wordy.waypoints([7, 101, 101, 101, 7, 101, 101, 101], "")


def test_files_name_their_kind(tmp_path):
    path = tmp_path / "actions.json"
    for written in (TEXT, BOOK, ActionCodec(first_distance_token=5, first_curvature_token=300)):
        path.write_text(written.model_dump_json())
        assert read_answer_format(path) == written
    path.write_text('{"first_distance_token": 5, "first_curvature_token": 300}')
    assert isinstance(read_answer_format(path), ActionCodec)
    for content, message in (
        ('{"kind": "poem"}', "does not match any of the expected tags"),
        (BOOK.model_dump_json().replace('"length":8', '"length":3'), "6 action tokens need at least as many"),
        ("{", "is not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(BundleError, match=message):
            read_answer_format(path)


def test_what_the_option_takes(tmp_path):
    assert decoder_option("waypoints", [7]) == WaypointText(length=96, end_tokens=(7,))
    path = tmp_path / "format.json"
    path.write_text(json.dumps({"kind": "waypoints", "length": 64, "axes": "right_forward"}))
    chosen = decoder_option(str(path), [7, 8])
    assert chosen == WaypointText(length=64, end_tokens=(7, 8), axes="right_forward")
    with pytest.raises(InputError, match=r"--decoder tokens cannot be read .* allowed: waypoints, or a JSON"):
        decoder_option("tokens", [7])
    path.write_text('{"kind": "waypoints"}')
    with pytest.raises(InputError, match=r"waypoints\.length: Field required"):
        decoder_option(str(path), [7])
