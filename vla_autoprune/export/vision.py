"""The vision side as one torch module: all cameras at once, in the order of the prompt."""

from __future__ import annotations

from torch import Tensor, nn

from vla_autoprune.models.adapter import StageModel
from vla_autoprune.recipe import PruningRecipe


class Vision(nn.Module):
    """Tower and projector, computed in the type of their weights; one row of features per visual token."""

    def __init__(self, model: StageModel, recipe: PruningRecipe) -> None:
        super().__init__()
        self.tower = model.tower(recipe.layout, recipe.scorer)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Encode the cameras.

        Args:
            pixel_values: [c, 3, h, w] normalised images.

        Returns:
            [1, V, d] features; [V] the tower's score if the scorer asks for it; [R, V, d] features for the
            first R decoder layers of a model that has them.
        """
        dtype = next(self.tower.parameters()).dtype
        features, score, deepstack = self.tower(pixel_values.to(dtype))
        outputs = [features.flatten(0, 1)[None].float()]
        if score is not None:
            outputs.append(score.flatten())
        if deepstack is not None:
            outputs.append(deepstack.float())
        return tuple(outputs)
