import dataclasses

import numpy as np
import pytest
import torch

from vla_autoprune.errors import InputError
from vla_autoprune.frame import Command, EgoState
from vla_autoprune.models.driving_vla import DrivingVla, ModelSize, build_model, load_model, save_model
from vla_autoprune.models.packed import Pruning, greedy_actions, make_prefix, packed_logits, visual_features

POINTS = (0, 2)


@pytest.fixture
def lively_vla(small_vla: DrivingVla) -> DrivingVla:
    """Weights large enough that attention is uneven and answers differ."""
    with torch.no_grad():
        for parameter in small_vla.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return small_vla


def questions(vla: DrivingVla, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts [B, N], pixels [B * 6, 3, 32, 32] and features [B, V, d]."""
    torch.manual_seed(3)
    states = [EgoState(2.0 + 3 * index, 0.2, 0.0) for index in range(batch)]
    ids = torch.as_tensor(np.stack([vla.prompt.build(state, Command.LEFT) for state in states]))
    pixels = torch.randn(6 * batch, 3, 32, 32)
    with torch.no_grad():
        _, features = visual_features(vla.model, pixels)
    return ids, pixels, features.unflatten(0, (batch, 6)).flatten(1, 2)


def test_decoding_is_what_transformers_generates(lively_vla: DrivingVla) -> None:
    ids, pixels, features = questions(lively_vla, 3)
    prefix = make_prefix(lively_vla.prompt)
    ours = greedy_actions(lively_vla.model, prefix, features, ids[:, len(prefix.token_ids) :], 12)
    lively_vla.model.generation_config.eos_token_id = None
    theirs = lively_vla.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        max_new_tokens=12,
        do_sample=False,
    )
    assert torch.equal(ours, theirs[:, ids.shape[1] :])


def test_packed_queries_do_not_see_each_other(lively_vla: DrivingVla) -> None:
    ids, pixels, features = questions(lively_vla, 2)
    prefix = make_prefix(lively_vla.prompt)
    suffix = torch.stack([ids[:, len(prefix.token_ids) :], ids.flip(0)[:, len(prefix.token_ids) :]], dim=1)
    actions = torch.randint(260, 460, (2, 2, 11))
    with torch.no_grad():
        packed, _ = packed_logits(lively_vla.model, prefix, features, suffix, actions)
        for query in (0, 1):
            text = torch.as_tensor(prefix.token_ids).expand(2, -1)
            alone = torch.cat([text, suffix[:, query], actions[:, query]], dim=1)
            logits = lively_vla.model(input_ids=alone, pixel_values=pixels).logits[:, -12:]
            assert torch.allclose(packed[:, query], logits, atol=1e-4)


def test_ranking_uses_the_attention_transformers_computes(lively_vla: DrivingVla) -> None:
    ids, pixels, features = questions(lively_vla, 2)
    prefix = make_prefix(lively_vla.prompt)
    first = len(prefix.token_ids)
    actions = torch.full((2, 1, 11), 300)
    with torch.no_grad():
        _, seen = packed_logits(
            lively_vla.model, prefix, features, ids[:, None, first:], actions, collect=POINTS
        )
        lively_vla.model.set_attn_implementation("eager")
        layers = lively_vla.model(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions
    for point, ours in zip(POINTS, seen, strict=True):
        theirs = layers[point][:, :, first:][..., torch.as_tensor(prefix.visual)].mean(dim=(1, 2))
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("ranking", ["attention", "random"])
def test_keeping_every_token_changes_nothing(lively_vla: DrivingVla, ranking: str) -> None:
    ids, _, features = questions(lively_vla, 2)
    prefix = make_prefix(lively_vla.prompt)
    suffix, visual = ids[:, len(prefix.token_ids) :], len(prefix.visual)
    whole = greedy_actions(lively_vla.model, prefix, features, suffix, 12)
    kept = greedy_actions(
        lively_vla.model, prefix, features, suffix, 12, Pruning(POINTS, (visual, visual), ranking=ranking)
    )
    assert torch.equal(whole, kept)


def test_packed_and_cached_pruning_agree(lively_vla: DrivingVla) -> None:
    ids, _, features = questions(lively_vla, 2)
    prefix = make_prefix(lively_vla.prompt)
    suffix = ids[:, len(prefix.token_ids) :]
    pruning = Pruning(POINTS, (14, 6))
    decoded = greedy_actions(lively_vla.model, prefix, features, suffix, 12, pruning)
    with torch.no_grad():
        logits, _ = packed_logits(
            lively_vla.model, prefix, features, suffix[:, None], decoded[:, None, :-1], pruning=pruning
        )
        whole, _ = packed_logits(lively_vla.model, prefix, features, suffix[:, None], decoded[:, None, :-1])
    assert torch.equal(logits.argmax(-1)[:, 0], decoded)
    assert (logits - whole).abs().max() > 0.01


def test_a_prefix_of_one_camera_keeps_its_place_in_the_prompt(small_vla: DrivingVla) -> None:
    prefix = make_prefix(small_vla.prompt, (1,))
    assert prefix.positions.tolist() == [0, 6, 7, 8, 9, 10]
    assert prefix.visual.tolist() == [2, 3, 4, 5]
    assert small_vla.prompt.text(prefix.token_ids).startswith("<bos> CAM_FRONT: <image>")
    assert prefix.suffix_position == 31


def test_saved_and_loaded_it_is_the_same_model_in_half_precision(small_vla: DrivingVla, tmp_path) -> None:
    save_model(small_vla, tmp_path / "model")
    save_model(small_vla, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert loaded.codec == small_vla.codec
    assert loaded.preprocessing == small_vla.preprocessing
    theirs = loaded.model.state_dict()
    for name, tensor in small_vla.model.state_dict().items():
        assert torch.equal(tensor.half().float(), theirs[name])


def test_a_model_with_a_missing_file_is_refused(small_vla: DrivingVla, tmp_path) -> None:
    save_model(small_vla, tmp_path / "model")
    (tmp_path / "model" / "actions.json").unlink()
    with pytest.raises(InputError, match=r"no actions\.json"):
        load_model(tmp_path / "model")


def test_same_seed_same_weights_and_an_impossible_size_is_refused() -> None:
    size = ModelSize(image_size=32, width=32, layers=2, heads=2, kv_heads=1, feed_forward=48, tower_layers=1)
    one, other = (build_model(size, seed=4).model.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    with pytest.raises(InputError, match="does not divide"):
        build_model(dataclasses.replace(size, heads=3))
