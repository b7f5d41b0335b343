import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from vla_autoprune.errors import BundleError, InputError
from vla_autoprune.frame import CAMERAS, Command, EgoState
from vla_autoprune.models.prompt import PromptBuilder, clipping_notes, heard_ego, prompt_layout
from vla_autoprune.models.tokenizer import action_codec, build_tokenizer, ordinal_families


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(build_tokenizer(), prompt_layout())


def test_a_prompt_reads_as_text(builder: PromptBuilder) -> None:
    text = builder.text(builder.build(EgoState(7.43, 0.44, 0.021), Command.LEFT))
    assert text.startswith("<bos> CAM_FRONT_LEFT: <image> <image>")
    assert text.endswith("<image> speed 7.4 accel +0.4 yaw +0.02 turn left plan:")


def test_the_layout_says_where_everything_is(builder: PromptBuilder) -> None:
    layout = builder.layout
    ids = builder.build(EgoState(3.0), Command.STRAIGHT)
    image = builder.tokenizer.token_to_id("<image>")
    assert len(ids) == layout.length == 232
    assert layout.visual_tokens == 216
    assert layout.cameras == CAMERAS
    assert np.array_equal(np.flatnonzero(ids == image), layout.visual_positions)
    assert builder.text(ids[layout.suffix_rows]).startswith("speed")


def test_text_round_trip(builder: PromptBuilder) -> None:
    ids = builder.build(EgoState(0.0, -0.01, -0.009), Command.RIGHT)
    assert builder.tokenizer.encode(builder.text(ids)).ids == ids.tolist()
    assert "accel +0.0 yaw +0.00" in builder.text(ids)


def test_the_tokenizer_is_always_the_same() -> None:
    script = "from vla_autoprune.models.tokenizer import build_tokenizer; print(build_tokenizer().to_str())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert other.strip() == build_tokenizer().to_str()


def test_families_of_bins_are_ordered_and_disjoint() -> None:
    tokenizer = build_tokenizer()
    families = ordinal_families(tokenizer)
    seen = [token for family in families for token in family]
    assert len(set(seen)) == len(seen)
    for family in families:
        numbers = [float(tokenizer.id_to_token(token).rstrip("/m")) for token in family]
        assert numbers == sorted(numbers)
    codec = action_codec(tokenizer)
    assert tokenizer.id_to_token(codec.tokens_at(0)[37]) == "3.7m"
    assert tokenizer.id_to_token(codec.tokens_at(1)[40]) == "+0.0000/m"


def test_values_beyond_the_bins_are_clipped_and_named(builder: PromptBuilder) -> None:
    fast = EgoState(31.0, -9.5, 0.1)
    assert clipping_notes(fast) == (
        "clipped: speed_mps is 31, outside 0 to 24; 24 was used",
        "clipped: acceleration_mps2 is -9.5, outside -8 to 4; -8 was used",
    )
    assert heard_ego(fast) == EgoState(24.0, -8.0, 0.1)
    assert heard_ego(EgoState(6.07, 0.31, -0.051)) == EgoState(6.0, 0.4, -0.06)
    assert "speed 24.0 accel -8.0 yaw +0.10" in builder.text(builder.build(fast, Command.LEFT))
    assert clipping_notes(EgoState(12.0)) == ()


def test_ego_states_that_are_not_numbers_are_refused(builder: PromptBuilder) -> None:
    with pytest.raises(InputError, match="speed_mps of the ego state is nan, not finite"):
        builder.build(EgoState(float("nan")), Command.LEFT)


def test_a_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match="not a tokenizer file"):
        PromptBuilder.from_files(path, prompt_layout())
    foreign = Tokenizer.from_str(build_tokenizer().to_str().replace("CAM_BACK:", "CAM_REAR:"))
    with pytest.raises(BundleError, match="CAM_BACK:"):
        PromptBuilder(foreign, prompt_layout())
    path.write_text(foreign.to_str())
    with pytest.raises(BundleError, match=r"tokenizer\.json: .* not know the word 'CAM_BACK:'"):
        PromptBuilder.from_files(path, prompt_layout())


def test_prompts_and_actions_need_no_torch() -> None:
    script = (
        "import sys; from vla_autoprune.models import prompt, actions, preprocess;"
        "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
