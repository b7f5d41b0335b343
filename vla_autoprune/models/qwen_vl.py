"""Qwen2.5-VL and Qwen3-VL taken apart: multi-axis positions, windowed towers, DeepStack features.

What depends on the size of the images alone (rotary tables of the tower, windows, interpolated positions) is
computed once with transformers' own functions, for the one rig that a recipe has; the exported tower is
static. Its blocks are transformers' modules; only how they split rows into windows is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_autoprune.errors import InputError, RecipeError
from vla_autoprune.models.adapter import (
    Encoded,
    TransformersAdapter,
    attend_through,
    received_attention,
    require_tokens,
)
from vla_autoprune.recipe import PromptLayout, Scorer

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration


class QwenVlAdapter(TransformersAdapter):
    """A `Qwen2_5_VLForConditionalGeneration` or `Qwen3VLForConditionalGeneration`, on still images.

    Raises:
        InputError: the model has a part that stages cannot express; the message names it.
    """

    position_axes = 3

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration) -> None:
        super().__init__(model)
        self.visual: Any = model.model.visual
        vision: Any = model.config.vision_config
        for name in ("patch_size", "temporal_patch_size"):
            if not isinstance(getattr(vision, name), int):
                raise InputError(
                    f"vision_config.{name} is {getattr(vision, name)}; only square patches are supported"
                )
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.deepstack_layers = len(getattr(vision, "deepstack_visual_indexes", ()))
        if self.deepstack_layers > len(self.layers):
            raise InputError(
                f"vision_config has {self.deepstack_layers} DeepStack layers, the decoder {len(self.layers)} "
                "layers to add them to"
            )

    def positions(self, layout: PromptLayout) -> Tensor:
        """[3, 1, N] positions in time, height and width, as the model's own `get_rope_index` gives them.

        Raises:
            RecipeError: two images follow each other without text, or images of that size do not fit.
        """
        spans = [span[0] for span in layout.segments]
        if ("visual", "visual") in itertools.pairwise(spans):
            raise RecipeError(
                "layout has two visual spans without text between them; this family puts at least a "
                "vision-start and a vision-end token there"
            )
        _, rows, columns = self._grid(layout)
        is_visual = torch.zeros(1, layout.length, dtype=torch.long)
        is_visual[0, torch.from_numpy(layout.visual_positions)] = 1
        grids = torch.tensor([[1, rows, columns]] * len(layout.cameras))
        positions, _ = self.model.model.get_rope_index(
            torch.zeros_like(is_visual), mm_token_type_ids=is_visual, image_grid_thw=grids
        )
        return positions

    def tower(self, layout: PromptLayout, scorer: Scorer) -> nn.Module:
        """The tower for the layout's cameras, all of one size.

        Raises:
            RecipeError: images are no whole number of merged patches, or the scorer asks for what this tower
                has not.
        """
        depth = len(self.visual.blocks)
        scored = None
        if scorer.encoder_weight > 0:
            scored = self._scored_layer(scorer, depth)
        return _QwenTower(self, self._grid(layout), scored)

    def visual_tokens(self, image_size: tuple[int, int]) -> int:
        """Tokens of one image of (width, height) pixels.

        Raises:
            RecipeError: it is no whole number of merged patches.
        """
        unit = self.patch * self.merge
        if any(side < unit or side % unit for side in image_size):
            raise RecipeError(
                f"image_size is {image_size}; this model takes multiples of {unit} pixels in both directions"
            )
        return (image_size[0] // unit) * (image_size[1] // unit)

    def image_inputs(self, token_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """Patches, their grid, and which tokens are visual."""
        cameras, _, height, width = pixel_values.shape
        grid = [1, height // self.patch, width // self.patch]
        image = self.model.config.image_token_id
        return {
            "pixel_values": _patches(pixel_values, self.patch, self.merge, self._temporal_patch),
            "image_grid_thw": torch.tensor([grid] * cameras),
            "mm_token_type_ids": (token_ids == image).long(),
        }

    @property
    def _temporal_patch(self) -> int:
        return self.model.config.vision_config.temporal_patch_size

    def _grid(self, layout: PromptLayout) -> tuple[int, int, int]:
        """Cameras, and rows and columns of patches of each."""
        width, height = layout.image_size or (0, 0)
        require_tokens(layout, self.visual_tokens((width, height)))
        return len(layout.cameras), height // self.patch, width // self.patch

    def _scored_layer(self, scorer: Scorer, depth: int) -> int:
        full = tuple(getattr(self.visual, "fullatt_block_indexes", range(depth)))
        if scorer.encoder != "received":
            raise RecipeError(
                f"scorer.encoder is {scorer.encoder!r}; the tower of this model has no [CLS] row: take "
                "'received' (attention that patches receive), or encoder_weight 0"
            )
        layer = full[-1] if scorer.encoder_layer is None else scorer.encoder_layer
        if layer not in full:
            raise RecipeError(
                f"scorer.encoder_layer is {layer}; layers of this tower that see the whole image: "
                f"{', '.join(map(str, full))}"
            )
        return layer


class _QwenTower(nn.Module):
    """Patches, blocks and mergers of one tower for a fixed grid."""

    def __init__(self, adapter: QwenVlAdapter, grid: tuple[int, int, int], scored: int | None) -> None:
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        super().__init__()
        self.visual = visual = adapter.visual
        self.cameras, rows, columns = grid
        self.patch, self.merge = adapter.patch, adapter.merge
        self.temporal_patch = adapter._temporal_patch
        self.scored = scored
        patches = rows * columns
        self.whole_images = [patches] * self.cameras
        grids = torch.tensor([[1, rows, columns]] * self.cameras)
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grids, self.merge))
        unit = self.merge**2
        self.full_layers = tuple(range(len(visual.blocks)))
        self.windows: list[int] = self.whole_images
        order = torch.arange(self.cameras * patches // unit)
        if hasattr(visual, "fullatt_block_indexes"):
            self.full_layers = tuple(visual.fullatt_block_indexes)
            order, edges = get_vision_window_index(grids, self.merge, visual.window_size, self.patch)
            self.windows = edges.diff().tolist()
        self.reorders = not torch.equal(order, torch.arange(len(order)))
        by_patch = (order[:, None] * unit + torch.arange(unit)).flatten()
        self.register_buffer("order", by_patch, persistent=False)
        self.register_buffer("back", torch.argsort(order), persistent=False)
        self.register_buffer("cos", cos[by_patch], persistent=False)
        self.register_buffer("sin", sin[by_patch], persistent=False)
        self.deepstack = tuple(getattr(visual, "deepstack_visual_indexes", ()))
        self.has_positions = hasattr(visual, "pos_embed")
        if self.has_positions:
            indices, weights = _interpolation(visual, grids)
            self.register_buffer("indices", indices, persistent=False)
            self.register_buffer("weights", weights, persistent=False)

    def forward(self, pixel_values: Tensor) -> Encoded:
        """Pixels [c, 3, h, w] to features, and what else the recipe asks for."""
        hidden = self.visual.patch_embed(_patches(pixel_values, self.patch, self.merge, self.temporal_patch))
        if self.has_positions:
            positions = self.visual.pos_embed(self.indices) * self.weights[:, :, None].to(hidden.dtype)
            hidden = hidden + positions.sum(dim=1)
        if self.reorders:
            hidden = hidden.index_select(0, self.order)
        received: list[Tensor] = []
        levels: list[Tensor] = []
        with attend_through(self.visual.config, "vla_autoprune_tower", _segmented_attention):
            for index, block in enumerate(self.visual.blocks):
                hidden = block(
                    hidden,
                    # One piece for transformers; the attention function knows the windows.
                    cu_seqlens=np.array([0, self.cos.shape[0]]),
                    position_embeddings=(self.cos, self.sin),
                    segments=self.whole_images if index in self.full_layers else self.windows,
                    received=received if index == self.scored else None,
                )
                if index in self.deepstack:
                    merger = self.visual.deepstack_merger_list[self.deepstack.index(index)]
                    levels.append(self._in_order(merger(hidden)))
        features = self._in_order(self.visual.merger(hidden))
        score = None
        if self.scored is not None:
            # A token stands for merge x merge patches.
            score = self._in_order(received[0].reshape(-1, self.merge**2).mean(dim=1, keepdim=True))
            score = score.reshape(self.cameras, -1)
        return Encoded(
            features.reshape(self.cameras, -1, features.shape[-1]),
            score,
            torch.stack(levels) if levels else None,
        )

    def _in_order(self, tokens: Tensor) -> Tensor:
        return tokens.index_select(0, self.back) if self.reorders else tokens


def _patches(pixel_values: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """Images in the towers' layout: blocks of merge x merge patches, a still image repeated in time.

    Args:
        pixel_values: [c, 3, h, w].
        patch: pixels per side of a patch.
        merge: patches per side of a block.
        temporal: frames of a patch.

    Returns:
        [c * h / patch * w / patch, 3 * temporal * patch * patch].
    """
    cameras, channels, height, width = pixel_values.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    blocks = pixel_values.reshape(cameras * channels, rows, merge, patch, columns, merge, patch)
    blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(cameras, channels, -1, patch * patch)
    frames = blocks.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, temporal, -1)
    return frames.reshape(-1, channels * temporal * patch * patch)


def _interpolation(visual: Any, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Which learned positions every patch takes, [patches, taps], and their weights."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    return get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=visual.spatial_merge_size,
    )


def _segmented_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    segments: Sequence[int],
    received: list[Tensor] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention within segments of rows; neighbours of one length run as a batch.

    Args:
        module: the attention module; not used.
        query: [1, H, n, hd].
        key: [1, H, n, hd].
        value: [1, H, n, hd].
        attention_mask: None.
        scaling: of the logits.
        segments: rows of each segment, sum n.
        received: gets the attention every row receives, [n], if it is a list.

    Returns:
        [1, n, H, hd], and no weights.
    """
    heads, width = query.shape[1], query.shape[3]
    attended: list[Tensor] = []
    scores: list[Tensor] = []
    start = 0
    for length, run in itertools.groupby(segments):
        count = len(list(run))
        rows = slice(start, start + count * length)
        q, k, v = (
            tensor[0, :, rows].reshape(heads, count, length, width).transpose(0, 1)
            for tensor in (query, key, value)
        )
        part = nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        attended.append(part.transpose(1, 2).reshape(count * length, heads, width))
        if received is not None:
            scores.append(received_attention(q, k, scaling).flatten())
        start += count * length
    if received is not None:
        received.append(torch.cat(scores))
    return torch.cat(attended)[None], None
