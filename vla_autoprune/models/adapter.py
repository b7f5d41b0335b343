"""What the export needs from a transformers model, and how LLaVA-like models give it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vla_autoprune.errors import InputError
from vla_autoprune.frame import IntArray
from vla_autoprune.recipe import ModelShape

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""What transformers' layers call: (module, query, key, value, mask, **kwargs) to ([b, n, H, hd], weights)."""


class StageModel(Protocol):
    """A vision tower and a decoder, taken apart. Everything is float32 and in evaluation mode.

    Attributes:
        layers: decoder layers; called as transformers calls them, so attention goes through the interface of
            `decoder_attention`.
        final_norm: norm in front of the head.
        head: hidden [.., d] to logits [.., vocabulary].
        embedding: [vocabulary, d] token embeddings.
    """

    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module
    embedding: Tensor

    def shape(self, model_id: str) -> ModelShape:
        """What a recipe records of the decoder."""
        ...

    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """Rotary tables (cos, sin), each [positions, head_dim]."""
        ...

    def vision(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [c, 3, h, w] to features [c, patches, d] and the [CLS] row's attention [c, patches]."""
        ...

    def generate(self, token_ids: IntArray, pixel_values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy answer of the whole model: [steps] tokens as fed back, and [steps, vocabulary] logits."""
        ...

    def decoder_attention(self, function: AttentionFunction) -> Any:
        """Context in which the decoder layers attend through `function`."""
        ...


class LlavaAdapter:
    """A `LlavaForConditionalGeneration` with a CLIP tower and a Llama-like decoder.

    Raises:
        InputError: the model has a part that stages cannot express; the message names it.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        config = model.config
        if config.vision_feature_select_strategy != "default" or not isinstance(
            config.vision_feature_layer, int
        ):
            raise InputError(
                f"model takes vision features {config.vision_feature_select_strategy!r} of layer "
                f"{config.vision_feature_layer}; "
                "only one layer without its [CLS] row ('default') is supported"
            )
        self.model = model.float().eval()
        self.decoder = model.model.language_model
        self.tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
        if not hasattr(self.tower, "pre_layrnorm"):
            raise InputError(
                f"vision tower is {type(self.tower).__name__}; only CLIP towers have the [CLS] row needed"
            )
        depth = len(self.tower.encoder.layers)
        layer = config.vision_feature_layer
        self.tower_layers = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= self.tower_layers <= depth:
            raise InputError(
                f"vision_feature_layer is {layer}; a tower of {depth} layers allows -{depth}..-1"
            )
        self.layers: nn.ModuleList = self.decoder.layers
        self.final_norm: nn.Module = self.decoder.norm
        self.head: nn.Module = model.lm_head
        self.embedding: Tensor = self.decoder.embed_tokens.weight.detach()

    def shape(self, model_id: str) -> ModelShape:
        """What a recipe records of the decoder."""
        text = self.model.config.text_config
        return ModelShape(
            id=model_id,
            weights_sha256=weights_sha256(self.model),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            ffn=text.intermediate_size,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        )

    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """Rotary tables (cos, sin), each [positions, head_dim], from the model's own rotary module."""
        with torch.no_grad():
            cos, sin = self.decoder.rotary_emb(self.embedding[None, :1], torch.arange(positions)[None])
        return cos[0], sin[0]

    def vision(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features of the configured tower layer, and its [CLS] attention (mean over heads).

        Args:
            pixel_values: [c, 3, h, w] normalised images.

        Returns:
            [c, patches, d] features and [c, patches] attention of the [CLS] row, not renormalised.
        """
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        for layer in self.tower.encoder.layers[: self.tower_layers - 1]:
            hidden = layer(hidden, None)
        last = self.tower.encoder.layers[self.tower_layers - 1]
        cls_attention = _cls_attention(last.self_attn, last.layer_norm1(hidden))
        return self.model.model.multi_modal_projector(last(hidden, None)[:, 1:]), cls_attention

    def generate(self, token_ids: IntArray, pixel_values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy answer by transformers' own `generate`.

        Args:
            token_ids: [N] prompt without padding.
            pixel_values: [c, 3, h, w] normalised images.
            steps: tokens to generate; where the end token would be next, the second best is.

        Returns:
            [steps] tokens as they were fed back, and [steps, vocabulary] logits, the end token's among them.
        """
        with torch.no_grad():
            answer: Any = self.model.generate(
                input_ids=torch.from_numpy(token_ids)[None],
                attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
                pixel_values=pixel_values,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return answer.sequences[0, len(token_ids) :], torch.cat(answer.logits)

    @contextmanager
    def decoder_attention(self, function: AttentionFunction) -> Iterator[None]:
        """Context in which the decoder layers attend through `function` instead of their own choice."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = "vla_autoprune"
        config = self.decoder.config
        chosen = config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = chosen


def _cls_attention(attention: Any, normed: Tensor) -> Tensor:
    """Attention of the first row on all others, mean over heads: [c, rows, d] to [c, rows - 1]."""
    images, rows, _ = normed.shape
    query = attention.q_proj(normed[:, :1]).view(images, 1, attention.num_heads, attention.head_dim)
    key = attention.k_proj(normed).view(images, rows, attention.num_heads, attention.head_dim)
    logits = torch.einsum("cqhx,ckhx->chqk", query, key) * attention.scale
    return logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def weights_sha256(model: nn.Module) -> str:
    """Hash of a model's weights: names and float32 values in name order, however they are stored.

    Args:
        model: any module; buffers that are not saved are left out.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().to(torch.float32).cpu().numpy()).tobytes())
    return digest.hexdigest()
