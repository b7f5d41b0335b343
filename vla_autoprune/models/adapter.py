"""What the export needs from a transformers model, and what all families of models give alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vla_autoprune.errors import InputError, RecipeError
from vla_autoprune.frame import IntArray
from vla_autoprune.models.stored_weights import StoredWeights, filled
from vla_autoprune.recipe import ModelShape, PromptLayout, Scorer

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_HASHED_ROWS = 4096
"""Of a weight at a time, so that a table of words is not doubled in memory."""

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""What transformers' layers call: (module, query, key, value, mask, **kwargs) to ([b, n, H, hd], weights)."""


class Encoded(NamedTuple):
    """What a vision tower makes of the cameras.

    Attributes:
        features: [c, tokens, d] projected features.
        encoder_score: [c, tokens] the tower's own ranking; None where the scorer does not ask for it.
        deepstack: [R, c * tokens, d] features added after the first R decoder layers; None where there are
            none.
    """

    features: Tensor
    encoder_score: Tensor | None = None
    deepstack: Tensor | None = None


class StageModel(Protocol):
    """A vision tower and decoder, taken apart, in evaluation mode. Weights are there while `loaded` is held.

    Attributes:
        layers: decoder layers; called as transformers calls them, so attention goes through the interface of
            `decoder_attention`.
        final_norm: norm in front of the head.
        head: hidden [.., d] to logits [.., vocabulary].
        embedding: [vocabulary, d] token embeddings, of any floating type, perhaps mapped from a file.
        streams: weights are in memory only while `loaded` is held; the model cannot `generate`.
    """

    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module
    embedding: Tensor

    @property
    def streams(self) -> bool:
        """See the class."""
        ...

    def shape(self, model_id: str) -> ModelShape:
        """What a recipe records of the decoder."""
        ...

    def rotary(self, layout: PromptLayout, rows: int) -> tuple[Tensor, Tensor]:
        """Rotary tables (cos, sin), [rows, head_dim] each, by prompt row; later rows continue the text."""
        ...

    def tower(self, layout: PromptLayout, scorer: Scorer) -> nn.Module:
        """The vision side for a layout's cameras: pixels [c, 3, h, w] to `Encoded`.

        Raises:
            RecipeError: the tower does not take such images or gives no such score.
        """
        ...

    def generate(self, token_ids: IntArray, pixel_values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy answer of the whole model: [steps] tokens as fed back, and [steps, vocabulary] logits."""
        ...

    def decoder_attention(self, function: AttentionFunction) -> AbstractContextManager[None]:
        """Context in which the decoder layers attend through `function`."""
        ...

    def loaded(self, module: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Context in which a module's weights are in memory, and of a type.

        Raises:
            InputError: a weight is too large for the type.
        """
        ...


@contextmanager
def attend_through(config: Any, name: str, function: AttentionFunction) -> Iterator[None]:
    """Context in which the modules of a transformers configuration attend through a function of ours.

    Args:
        config: the configuration the modules ask for their choice.
        name: under which the function is registered with transformers.
        function: what they call.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    chosen = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = chosen


class TransformersAdapter:
    """What the families have in common: a decoder `model.model.language_model` and a head.

    Args:
        model: the whole model; made float32.
    """

    position_axes: Literal[1, 3] = 1
    """1, or 3 where visual tokens have positions in time, height and width."""
    deepstack_layers = 0
    """Decoder layers, from the first on, after which visual features are added."""
    fixed_image_size: tuple[int, int] | None = None
    """(width, height) in pixels; None where the tower takes any multiple of its patches."""

    def __init__(self, model: Any) -> None:
        self.model = model.float().eval()
        self.decoder = model.model.language_model
        self.layers: nn.ModuleList = self.decoder.layers
        self.final_norm: nn.Module = self.decoder.norm
        self.head: nn.Module = model.lm_head
        self.embedding: Tensor = self.decoder.embed_tokens.weight.detach()
        self.stored: StoredWeights | None = None
        self._weights_sha256: str | None = None

    @property
    def streams(self) -> bool:
        """Whether weights stay in files but where `loaded` is held."""
        return self.stored is not None

    def read_from(self, stored: StoredWeights) -> None:
        """Read weights from files where they are needed; the model itself holds none."""
        self.stored = stored
        self.embedding = stored.value_of(self.decoder.embed_tokens.weight)

    def shape(self, model_id: str) -> ModelShape:
        """What a recipe records of the decoder."""
        text = self.model.config.text_config
        return ModelShape(
            id=model_id,
            weights_sha256=self.weights_sha256(),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            ffn=text.intermediate_size,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            position_axes=self.position_axes,
            deepstack_layers=self.deepstack_layers,
        )

    def weights_sha256(self) -> str:
        """Hash of the weights, see `weights_sha256`; computed once where they lie in files."""
        if self.stored is None:
            return weights_sha256(self.model)
        if self._weights_sha256 is None:
            self._weights_sha256 = hash_of_weights(self.stored.names, self.stored.read)
        return self._weights_sha256

    def positions(self, layout: PromptLayout) -> Tensor:
        """[1, N] or [axes, 1, N] positions of the prompt's rows."""
        return torch.arange(layout.length)[None]

    def rotary(self, layout: PromptLayout, rows: int) -> tuple[Tensor, Tensor]:
        """Rotary tables from the model's own rotary module.

        Args:
            layout: the prompt.
            rows: prompt rows, and as many more as may be generated.

        Returns:
            (cos, sin), each [rows, head_dim]. Text continues one by one after the largest position, as in
            the model's own generation.
        """
        prompt = self.positions(layout)
        after = int(prompt.max()) + 1 + torch.arange(rows - layout.length)
        positions = torch.cat([prompt, after.expand(*prompt.shape[:-1], -1)], dim=-1)
        with torch.no_grad():
            cos, sin = self.decoder.rotary_emb(torch.zeros(1), positions)
        return cos[0], sin[0]

    def generate(self, token_ids: IntArray, pixel_values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy answer by transformers' own `generate`.

        Args:
            token_ids: [N] prompt without padding.
            pixel_values: [c, 3, h, w] normalised images.
            steps: tokens to generate; where the end token would be next, the second best is.

        Returns:
            [steps] tokens as they were fed back, and [steps, vocabulary] logits, the end token's among them.

        Raises:
            InputError: the weights are in files; transformers needs them all at once.
        """
        if self.stored is not None:
            raise InputError(
                f"{self.stored.folder}: weights are read part by part; transformers' generate needs them "
                "all in memory, load the checkpoint instead"
            )
        ids = torch.from_numpy(token_ids)[None]
        with torch.no_grad():
            answer: Any = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                **self.image_inputs(ids, pixel_values),
            )
        return answer.sequences[0, len(token_ids) :], torch.cat(answer.logits)

    def image_inputs(self, token_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """What the whole model is given of images [c, 3, h, w] beside the token ids [1, N]."""
        return {"pixel_values": pixel_values}

    def decoder_attention(self, function: AttentionFunction) -> AbstractContextManager[None]:
        """Context in which the decoder layers attend through `function` instead of their own choice."""
        return attend_through(self.decoder.config, "vla_autoprune", function)

    def loaded(self, module: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Context in which a module's weights are in memory, and of a type."""
        if self.stored is None and dtype == torch.float32:
            return nullcontext()
        return filled(module, dtype, self.stored)


class LlavaAdapter(TransformersAdapter):
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
        super().__init__(model)
        self.clip = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
        if not hasattr(self.clip, "pre_layrnorm"):
            raise InputError(
                f"vision tower is {type(self.clip).__name__}; only CLIP towers have the [CLS] row needed"
            )
        depth = len(self.clip.encoder.layers)
        layer = config.vision_feature_layer
        self.tower_layers = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= self.tower_layers <= depth:
            raise InputError(
                f"vision_feature_layer is {layer}; a tower of {depth} layers allows -{depth}..-1"
            )

        side = config.vision_config.image_size
        self.fixed_image_size = (side, side)

    def visual_tokens(self, image_size: tuple[int, int]) -> int:
        """Tokens of one image of (width, height) pixels."""
        return (image_size[0] // self.model.config.vision_config.patch_size) ** 2

    def tower(self, layout: PromptLayout, scorer: Scorer) -> nn.Module:
        """CLIP up to the configured layer, and the projector.

        Raises:
            RecipeError: images have not the size CLIP was made for, or the scorer asks for a layer it has
                not.
        """
        size = self.fixed_image_size
        if size is None or layout.image_size != size:
            raise RecipeError(
                f"layout.image_size is {layout.image_size}; this model's CLIP tower takes {size}"
            )
        require_tokens(layout, self.visual_tokens(size))
        scored = self.tower_layers - 1 if scorer.encoder_layer is None else scorer.encoder_layer
        if not 0 <= scored < self.tower_layers:
            raise RecipeError(
                f"scorer.encoder_layer is {scored}; the features come from tower layers "
                f"0..{self.tower_layers - 1}"
            )
        return _ClipTower(self, scorer, scored)


class _ClipTower(nn.Module):
    def __init__(self, adapter: LlavaAdapter, scorer: Scorer, scored_layer: int) -> None:
        super().__init__()
        self.clip = adapter.clip
        self.layers = adapter.clip.encoder.layers[: adapter.tower_layers]
        self.projector = adapter.model.model.multi_modal_projector
        self.encoder = scorer.encoder if scorer.encoder_weight > 0 else None
        self.scored_layer = scored_layer

    def forward(self, pixel_values: Tensor) -> Encoded:
        """Pixels [c, 3, h, w] to features and, if asked for, the attention that patches receive."""
        hidden = self.clip.pre_layrnorm(self.clip.embeddings(pixel_values))
        score = None
        for index, layer in enumerate(self.layers):
            if self.encoder is not None and index == self.scored_layer:
                attention = layer.self_attn
                normed = layer.layer_norm1(hidden)
                asking = normed[:, :1] if self.encoder == "cls" else normed[:, 1:]
                images, rows, _ = normed.shape
                query = attention.q_proj(asking).view(images, -1, attention.num_heads, attention.head_dim)
                key = attention.k_proj(normed).view(images, rows, attention.num_heads, attention.head_dim)
                score = received_attention(query.transpose(1, 2), key.transpose(1, 2), attention.scale)[:, 1:]
            hidden = layer(hidden, None)
        return Encoded(self.projector(hidden[:, 1:]), score)


def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """How much attention each key receives, mean over heads and asking rows; float32 whatever is given.

    Args:
        query: [c, H, q, hd].
        key: [c, H, k, hd].
        scaling: of the logits.

    Returns:
        [c, k] means of probabilities.
    """
    logits = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def require_tokens(layout: PromptLayout, tokens: int) -> None:
    """Refuse a layout whose cameras have not as many visual tokens as the tower gives.

    Raises:
        RecipeError: naming the camera.
    """
    for span in layout.segments:
        if span[0] == "visual" and span[2] != tokens:
            raise RecipeError(
                f"layout gives {span[1]} {span[2]} visual tokens; images of "
                f"{layout.image_size} give {tokens} with this model"
            )


def weights_sha256(model: nn.Module) -> str:
    """Hash of a model's weights: names and float32 values in name order, however they are stored.

    Args:
        model: any module; buffers that are not saved are left out.

    Returns:
        64 hexadecimal digits.
    """
    weights = model.state_dict()
    return hash_of_weights(weights, weights.__getitem__)


def hash_of_weights(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """`weights_sha256` of weights that are read one at a time.

    Args:
        names: of all weights, tied ones under each of theirs.
        read: gives a weight by name.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        weight = read(name).detach()
        for rows in weight.split(_HASHED_ROWS) if weight.ndim > 1 else (weight,):
            digest.update(np.ascontiguousarray(rows.to(torch.float32).cpu().numpy()).data)
    return digest.hexdigest()
