from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from vla_autoprune.errors import BundleError, InputError
from vla_autoprune.frame import Command, EgoState
from vla_autoprune.models.prompt_template import (
    PromptTemplate,
    TemplatePrompt,
    read_prompt,
    read_template,
)

TEXT = "<s>front <v>{CAM_FRONT}</v> back <v>{CAM_BACK}</v> {speed_mps:.1f} m/s, go {command}\n"
SIZE = (64, 32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, and a few special words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<img>", "<v>", "</v>"])
    return tokenizer


def template(**changes):
    return PromptTemplate(**{"text": TEXT, "suffix_tokens": 40, "image_token": "<img>", **changes})


def test_a_prompt_reads_as_the_template_says(tokenizer):
    given = template(commands={"left": "left!", "straight": "on", "right": "right!"})
    layout = given.layout(tokenizer, 8, SIZE)
    assert layout.segments == (
        ("text", 8),
        ("visual", "CAM_FRONT", 8),
        ("text", 8),
        ("visual", "CAM_BACK", 8),
        ("text", 40),
    )
    prompt = TemplatePrompt(tokenizer, given, layout)
    ids = prompt.build(EgoState(7.26), Command.LEFT)
    images = layout.visual_positions
    assert set(ids[images]) == {tokenizer.token_to_id("<img>")}
    assert prompt.text(np.delete(ids, images)) == "front  back  7.3 m/s, go left!\n"
    longer = prompt.build(EgoState(17.26), Command.STRAIGHT)
    assert len(longer) == len(ids) - 2 and np.array_equal(longer[: images[-1]], ids[: images[-1]])
    assert prompt.notes(EgoState(99.0)) == ()
    with pytest.raises(InputError, match="speed_mps of the ego state is nan"):
        prompt.build(EgoState(float("nan")), Command.LEFT)


def test_a_text_that_is_too_long_is_refused_with_both_lengths(tokenizer):
    exact = len(tokenizer.encode("</v> 12.3 m/s, go straight\n").ids)
    with pytest.raises(InputError, match=f"suffix_tokens is 9; .* has {exact} tokens"):
        template(suffix_tokens=9).layout(tokenizer, 8, SIZE)
    tight = template(suffix_tokens=exact)
    prompt = TemplatePrompt(tokenizer, tight, tight.layout(tokenizer, 8, SIZE))
    with pytest.raises(InputError, match=f"has {exact + 1} tokens; suffix_tokens of the template allows"):
        prompt.build(EgoState(-12.3), Command.STRAIGHT)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"text": "{CAM_FRONT} {speed}"}, r"has the field \{speed\}; allowed are cameras"),
        ({"text": "{CAM_FRONT} {speed_mps.real}"}, r"the field \{speed_mps.real\}"),
        ({"text": "{CAM_FRONT} {0}"}, r"the field \{0\}"),
        ({"text": "no image"}, "at least one, each once"),
        ({"text": "{CAM_FRONT} {CAM_FRONT} x"}, "at least one, each once"),
        ({"text": "{speed_mps} {CAM_FRONT} x"}, r"has \{speed_mps\} before the last image"),
        ({"text": "{CAM_FRONT} {"}, "unmatched braces"),
        ({"commands": {"left": "l"}}, "commands lacks straight, right"),
        ({"image_size": [0, 5]}, "image_size.0"),
    ],
)
def test_faults_of_a_template_are_named(tmp_path, changes, message):
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps({"text": TEXT, "suffix_tokens": 40, **changes}))
    with pytest.raises(InputError, match=message):
        read_template(path)


def test_template_and_tokenizer_must_fit(tokenizer):
    with pytest.raises(InputError, match="does not know image_token '<pic>'"):
        template(image_token="<pic>").layout(tokenizer, 8, SIZE)
    with pytest.raises(InputError, match="3 image tokens for 2 cameras"):
        template(text=f"<img>{TEXT}").layout(tokenizer, 8, SIZE)
    with pytest.raises(InputError, match="text cannot be filled in"):
        template(text="{CAM_FRONT} {speed_mps:d}").layout(tokenizer, 8, SIZE)
    with pytest.raises(InputError, match=r"text ends with \{CAM_BACK\}; the text after"):
        template(text="{CAM_FRONT} {CAM_BACK}").layout(tokenizer, 8, SIZE)


def test_a_bundles_prompt_must_have_its_recipes_layout(tokenizer, tmp_path):
    given = template()
    layout = given.layout(tokenizer, 8, SIZE)
    for name, content in TemplatePrompt(tokenizer, given, layout).files().items():
        (tmp_path / name).write_text(content)
    assert read_prompt(tmp_path, layout).build(EgoState(1.0), Command.LEFT).shape == (51,)
    other = template(suffix_tokens=41).layout(tokenizer, 8, SIZE)
    with pytest.raises(BundleError, match=r"prompt\.json: the prompt's layout is .* 40 at .* is .* 41 at"):
        read_prompt(tmp_path, other)
