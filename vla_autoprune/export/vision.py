"""The vision side as one torch module: all cameras at once, in the order of the prompt."""

from __future__ import annotations

from torch import Tensor, nn

from vla_autoprune.models.adapter import StageModel


class Vision(nn.Module):
    """Tower and projector; one row of features per visual token."""

    def __init__(self, model: StageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the cameras.

        Args:
            pixel_values: [c, 3, h, w] normalised images.

        Returns:
            [1, V, d] features and [V] attention of each camera's [CLS] row.
        """
        features, cls_attention = self.model.vision(pixel_values)
        return features.flatten(0, 1)[None], cls_attention.flatten()
