"""Models with the shapes of published checkpoints and random weights, and the prompt they are measured on.

The decoders' figures are those that `vla-autoprune estimate` knows: vla_autoprune/profiling/models.json.
"""

from __future__ import annotations

from typing import Any

from vla_autoprune.profiling.estimate import models
from vla_autoprune.recipe import PromptLayout

LLAVA, QWEN = MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b")

VISUAL, TEXT_BEFORE, TEXT_AFTER = 576, 35, 29
"""Tokens of the prompt: one image with text around it."""

IMAGE_SIDES = {LLAVA: 336, QWEN: 672}
"""Pixels of a square image of so many tokens."""

SHRINK_HELP = "divide widths, heads and vocabulary by this: a quick look, no figure of the model"


def configuration(
    name: str, layers: int, *, part_of_vocabulary: int = 1, small_tower: bool = False, shrink: int = 1
) -> Any:
    """A model's configuration with as many decoder layers as asked for.

    Args:
        name: of `MODELS`.
        layers: of the decoder.
        part_of_vocabulary: divides the vocabulary.
        small_tower: a tower that costs nothing; Qwen's whole one is not described here.
        shrink: divides widths, heads and the vocabulary; a tower that is shrunk has two layers.
    """
    import transformers

    model = models()[name]
    text: dict[str, Any] = {
        "vocab_size": model.vocabulary // (part_of_vocabulary * shrink),
        "hidden_size": model.decoder.hidden // shrink,
        "intermediate_size": model.decoder.ffn // shrink,
        "num_hidden_layers": layers,
        "num_attention_heads": model.decoder.heads // shrink,
        "num_key_value_heads": model.decoder.kv_heads // shrink,
        "max_position_embeddings": 4096,
    }
    image_token = text["vocab_size"] - 64
    if name == LLAVA:
        width, heads = (64, 1) if small_tower else (1024 // shrink, 16 // shrink)
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2 if small_tower or shrink > 1 else 24,
                num_attention_heads=heads,
                image_size=IMAGE_SIDES[LLAVA],
                patch_size=14,
            ),
            text_config=transformers.LlamaConfig(**text),
            image_token_index=image_token,
            vision_feature_layer=-2,
            architectures=["LlavaForConditionalGeneration"],
        )
    assert small_tower
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 1,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [0],
        },
        text_config={
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        image_token_id=image_token,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def title(name: str, shrink: int) -> str:
    """Names the shapes, and says if they are not whole."""
    return f"{name} shapes" + (f", widths divided by {shrink}" if shrink > 1 else "")


def layout(name: str) -> PromptLayout:
    """The prompt of a model: its image among the text."""
    side = IMAGE_SIDES[name]
    return PromptLayout(
        segments=(("text", TEXT_BEFORE), ("visual", "CAM_FRONT", VISUAL), ("text", TEXT_AFTER)),
        image_size=(side, side),
    )
