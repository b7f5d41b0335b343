"""Where every tensor of every graph lives: which of them share memory, and which follow from each other.

Buckets share all of it, and so do steps that do not overlap. A stage's keys and values, of all its layers,
lie together, so that one copy of rows moves them into the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vla_autoprune import contract
from vla_autoprune.contract import ElementType
from vla_autoprune.recipe import Bucket, PruningRecipe

ALIGNMENT = 256
"""Bytes on which starts what lies within shared memory, as devices ask."""

CACHE = "cache"
"""Memory of the KV caches has keys that begin so."""

_SEQUENCE = ("hidden", "cos", "sin", "text_rows", "other_rows", "visual_rows", "camera", "deepstack")
"""What describes the rows of the sequence, and changes when rows are dropped."""

_UNCHANGED = ("text_weight", "encoder_score", "complexity", "keep", "candidates", "groups", "floors")


@dataclass(frozen=True)
class Place:
    """A tensor's shape and the memory it lives in; places of one key share it."""

    key: str
    shape: tuple[int, ...]
    dtype: ElementType = "float32"
    start: int = 0
    """First element within the memory."""


@dataclass(frozen=True)
class Step:
    """A graph in one variant, with the place of every tensor.

    Attributes:
        graph: its name.
        variant: one of its variants.
        places: by tensor name.
        new_kv: [blocks, n, head_dim] a stage's new keys and values of all layers.
        past_kv: [blocks, s, head_dim] the caches they are appended to, in decoding.
    """

    graph: str
    variant: str
    places: Mapping[str, Place]
    new_kv: Place | None = None
    past_kv: Place | None = None

    @property
    def all_places(self) -> Iterator[Place]:
        """Every place of the step."""
        yield from self.places.values()
        yield from (place for place in (self.new_kv, self.past_kv) if place is not None)


class Wiring:
    """The steps of a bundle, and the memory they need.

    Args:
        recipe: what is pruned where.
        graphs: the bundle's.

    Attributes:
        vision: encodes images.
        head: gives logits.
        prefill: per bucket, stages and selections in turn.
        decode: per bucket, the stages.
    """

    def __init__(self, recipe: PruningRecipe, graphs: Mapping[str, contract.Graph]) -> None:
        self.recipe, self.graphs = recipe, graphs
        self.vision = self._only(contract.VISION)
        self.head = self._only(contract.HEAD)
        self.prefill = {bucket.name: self._prefill(bucket) for bucket in recipe.buckets}
        self.decode = {bucket.name: self._decode(bucket) for bucket in recipe.buckets}

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step once, though buckets share some."""
        chains = (*self.prefill.values(), *self.decode.values())
        steps = (self.vision, self.head, *(step for chain in chains for step in chain))
        return tuple({(step.graph, step.variant): step for step in steps}.values())

    def memory(self) -> dict[str, tuple[int, ElementType]]:
        """Per key, as many elements as the largest bucket needs: buckets share it."""
        memory: dict[str, tuple[int, ElementType]] = {}
        for step in self.steps:
            for place in step.all_places:
                end = place.start + math.prod(place.shape)
                memory[place.key] = (max(end, memory.get(place.key, (0, place.dtype))[0]), place.dtype)
        return memory

    def _only(self, name: str) -> Step:
        keys = {tensor.name: tensor.name for tensor in self.graphs[name].tensors}
        if name == contract.HEAD:
            keys["hidden"] = "head_hidden"
        return self._step(name, contract.ONLY, keys)

    def _prefill(self, bucket: Bucket) -> list[Step]:
        """Stages and selections in turn; outputs alternate between two places, as inputs are still read."""
        steps: list[Step] = []
        keys = {name: f"start_{name}" for name in _SEQUENCE} | {name: name for name in _UNCHANGED}
        selections = 0
        for stage in range(len(self.recipe.stages)):
            keys |= {
                "hidden_out": f"stage_out_{stage % 2}",
                "past_length": "zero",
                "score": f"score_{stage:02d}",
                "kept": f"kept_{stage:02d}",
            }
            variant = contract.prefill_variant(stage, bucket.name)
            steps.append(self._stage(stage, variant, keys, "new", "empty"))
            keys["hidden"] = keys["hidden_out"]
            if stage + 1 == len(self.recipe.stages):
                break
            graph = contract.selection_graph(self.recipe, bucket, stage)
            if graph is not None:
                selected = {name: f"selected_{name}_{selections % 2}" for name in _SEQUENCE}
                keys |= {f"{name}_out": key for name, key in selected.items()}
                steps.append(self._step(graph, contract.point_variant(stage, bucket.name), keys))
                keys |= selected
                selections += 1
        return steps

    def _decode(self, bucket: Bucket) -> list[Step]:
        """Stages over the bucket's caches; what only ranking needs is a dummy of length one."""
        steps: list[Step] = []
        for stage in range(len(self.recipe.stages)):
            keys = {name: f"token_{name}_{stage:02d}" for name in ("cos", "sin", "past_length")}
            keys |= {"hidden": f"token_{stage % 2}", "hidden_out": f"token_{(stage + 1) % 2}"}
            keys |= {"text_rows": "zero", "visual_rows": "zero", "text_weight": "one", "encoder_score": "one"}
            keys |= {"score": "unused_score", "complexity": "unused_complexity"}
            keys["deepstack"] = "token_deepstack"  # stays 0: a generated token is text
            variant = contract.decode_variant(bucket.name)
            steps.append(self._stage(stage, variant, keys, f"token_kv_{stage:02d}", f"{CACHE}_{stage:02d}"))
        return steps

    def _stage(self, stage: int, variant: str, keys: Mapping[str, str], new: str, past: str) -> Step:
        """A stage whose layers' keys and values lie one after the other in the memory `new` and `past`."""
        name = contract.stage_name(stage)
        model, shapes = self.recipe.model, self.graphs[name].shapes(variant)
        # Blocks of one layer may be a little larger than needed, so that each starts where devices want it.
        dtype = next(tensor.dtype for tensor in self.graphs[name].inputs if tensor.name.startswith("past_k"))
        heads = model.kv_heads
        while heads * model.head_dim * contract.ITEM_BYTES[dtype] % ALIGNMENT:
            heads += 1
        layers = self.recipe.stages[stage]
        places: dict[str, Place] = {}
        for block, (layer, kind) in enumerate((layer, kind) for layer in layers for kind in "kv"):
            for prefix, key in (("new", new), ("past", past)):
                shape = shapes[f"{prefix}_{kind}_{layer:02d}"]
                start = 0 if key == "empty" else block * heads * shape[2] * shape[3]
                places[f"{prefix}_{kind}_{layer:02d}"] = Place(key, shape, dtype, start)
        first = f"k_{layers.start:02d}"

        def whole(prefix: str) -> Place:
            _, _, rows, width = shapes[f"{prefix}_{first}"]
            return Place(places[f"{prefix}_{first}"].key, (2 * len(layers) * heads, rows, width), dtype)

        past_kv = whole("past") if past != "empty" else None
        return self._step(name, variant, keys, places, whole("new"), past_kv)

    def _step(
        self,
        name: str,
        variant: str,
        keys: Mapping[str, str],
        places: Mapping[str, Place] | None = None,
        new_kv: Place | None = None,
        past_kv: Place | None = None,
    ) -> Step:
        graph = self.graphs[name]
        shapes, placed = graph.shapes(variant), dict(places or {})
        for tensor in graph.tensors:
            if tensor.name not in placed:
                placed[tensor.name] = Place(keys[tensor.name], shapes[tensor.name], tensor.dtype)
        return Step(name, variant, placed, new_kv, past_kv)
