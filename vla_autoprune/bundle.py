"""The bundle: a directory of graphs, weights, recipe and text files that refuses to be changed.

Data only. `manifest.json` names every file with size and hash and every tensor with its shapes; its id is a
hash of all that, weights, recipe and export options included. Loading checks the whole and refuses by name.

Only what the manifest lists may lie in the directory, but for `engines/`, which backends fill on the machine
they run on, files recorded later in `samples/`, and names that begin with a dot; loading reads none of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vla_autoprune import contract
from vla_autoprune.errors import BundleError, RecipeError
from vla_autoprune.files import first_fault, write_whole
from vla_autoprune.frame import FloatArray
from vla_autoprune.pruning.work import kv_mib
from vla_autoprune.recipe import Bucket, PruningRecipe, read_recipe

BUNDLE_VERSION = 2
"""Raised whenever the bundle's layout or the stage contract changes; readers refuse other versions."""

MANIFEST = "manifest.json"
RECIPE = "recipe.json"
WEIGHTS = "weights.data"
EMBEDDING = "embedding.npy"
ROTARY = "rotary.npy"
TOKENIZER = "tokenizer.json"
ACTIONS = "actions.json"
PREPROCESS = "preprocess.json"
PROMPT = "prompt.json"
"""Template of the prompt; bundles of the small driving VLA have none."""
SAMPLES = "samples"
ENGINES = "engines"
LINT = "lint.json"
"""What the TensorRT linter found at export."""

_ANEW = "export the bundle anew with vla-autoprune export"
_CHUNK_BYTES = 1 << 22

Role = Literal["recipe", "graph", "weights", "embedding", "rotary", "text", "preprocess", "sample"]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    """One file of the bundle; `path` is relative to it."""

    path: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$")
    role: Role
    bytes: int = Field(ge=0)
    sha256: Hash


class TensorEntry(_Record):
    """One input or output of a graph; names in `shape` are symbols."""

    name: str
    dtype: contract.ElementType
    shape: tuple[int | str, ...]


class GraphEntry(_Record):
    """One graph's tensors, and the value of its symbols in every variant."""

    name: str
    file: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    variants: Mapping[str, Mapping[str, int]]


class ExportOptions(_Record):
    """What the export was told, and the versions that did it."""

    opset: int
    precision: contract.Precision
    versions: Mapping[str, str]


class Manifest(_Record):
    """The bundle's table of contents."""

    bundle_version: int
    bundle_id: Hash
    weights_sha256: Hash
    recipe_sha256: Hash
    options: ExportOptions
    files: tuple[FileEntry, ...]
    graphs: tuple[GraphEntry, ...]

    def computed_id(self) -> str:
        """Hash of everything the manifest says but the id itself."""
        content = self.model_dump(mode="json", exclude={"bundle_id"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked.

    Attributes:
        path: the directory.
        manifest: its table of contents.
        recipe: what is pruned where.
        graphs: by name, in the order they run.
    """

    path: Path
    manifest: Manifest
    recipe: PruningRecipe
    graphs: Mapping[str, contract.Graph]

    def graph_file(self, name: str) -> Path:
        """The ONNX file of a graph."""
        return self.path / next(entry.file for entry in self.manifest.graphs if entry.name == name)

    def kv_mib(self, bucket: Bucket) -> float:
        """MiB of a bucket's KV caches, in the precision of the export."""
        dtype = contract.COMPUTED_IN[self.manifest.options.precision]
        return kv_mib(self.recipe.model, bucket.kv_tokens_per_layer, contract.ITEM_BYTES[dtype])

    def embedding(self) -> FloatArray:
        """[vocabulary, d] float32 token embeddings, memory-mapped."""
        return np.load(self.path / EMBEDDING, mmap_mode="r", allow_pickle=False)

    def rotary(self) -> FloatArray:
        """[positions, 2, head_dim] float32 rotary tables (cos, sin), memory-mapped."""
        return np.load(self.path / ROTARY, mmap_mode="r", allow_pickle=False)


def write_manifest(
    folder: Path, recipe: PruningRecipe, graphs: Sequence[contract.Graph], options: ExportOptions
) -> Manifest:
    """Describe a folder that holds everything else a bundle needs, and make it a bundle.

    Args:
        folder: the folder; not yet visible under its final name.
        recipe: the recipe in it.
        graphs: the graphs in it.
        options: how they were exported.

    Returns:
        The manifest written.
    """
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative == MANIFEST:
            continue
        size, digest = path.stat().st_size, _sha256(path)
        files.append(FileEntry(path=relative, role=_role(relative), bytes=size, sha256=digest))
    manifest = Manifest(
        bundle_version=BUNDLE_VERSION,
        bundle_id="0" * 64,
        weights_sha256=recipe.model.weights_sha256,
        recipe_sha256=recipe.sha256,
        options=options,
        files=tuple(files),
        graphs=tuple(_entry(graph) for graph in graphs),
    )
    manifest = manifest.model_copy(update={"bundle_id": manifest.computed_id()})
    write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest, without looking at the other files.

    Raises:
        BundleError: it is missing, of another version, edited or not a manifest.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise BundleError(f"{folder} {what}; a bundle is a directory that vla-autoprune export writes")
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle: {MANIFEST} cannot be read ({error.strerror}); {_ANEW}"
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is truncated or not JSON ({error}); {_ANEW}") from error
    version = content.get("bundle_version") if isinstance(content, dict) else None
    if version != BUNDLE_VERSION:
        way_out = "update vla-autoprune" if isinstance(version, int) and version > BUNDLE_VERSION else _ANEW
        raise BundleError(
            f"{path}: bundle_version is {version}, this library reads {BUNDLE_VERSION}; {way_out}"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_fault(error)}; {_ANEW}") from error
    if manifest.computed_id() != manifest.bundle_id:
        raise BundleError(f"{path} has been edited: its contents do not give its bundle_id; {_ANEW}")
    return manifest


def load_bundle(folder: Path) -> Bundle:
    """Open a bundle and check all of it: versions, sizes, hashes, recipe, tensor contract, tables.

    Tokenizer, actions and preprocessing, which only planning needs, are the planner's to check.

    Args:
        folder: the bundle's directory.

    Returns:
        The bundle.

    Raises:
        BundleError: something is missing, unlisted, truncated, edited, from another bundle, of a newer
            version or of another shape; the message names the file.
    """
    manifest = read_manifest(folder)
    _check_listed(folder, manifest)
    for entry in manifest.files:
        _check_file(folder, entry)
    try:
        recipe = read_recipe(folder / RECIPE)
    except RecipeError as error:
        raise BundleError(f"bundle's {error}") from error
    if recipe.sha256 != manifest.recipe_sha256 or recipe.model.weights_sha256 != manifest.weights_sha256:
        raise BundleError(f"{folder / RECIPE} belongs to another bundle; {_ANEW}")
    graphs = {entry.name: _graph(entry) for entry in manifest.graphs}
    model = recipe.model
    vocabulary = _check_table(folder / EMBEDDING, ("vocabulary", model.hidden))
    _check_table(folder / ROTARY, (recipe.layout.length + recipe.decode_length, 2, model.head_dim))
    try:
        graphs_of_recipe = contract.graphs(recipe, vocabulary, manifest.options.precision)
    except RecipeError as error:
        raise BundleError(f"{folder / RECIPE}: {error}; {_ANEW}") from error
    wanted = {graph.name: graph for graph in graphs_of_recipe}
    if list(graphs) != list(wanted):
        raise BundleError(
            f"{folder / MANIFEST}: graphs are {', '.join(graphs)}, the recipe needs {', '.join(wanted)}; "
            f"{_ANEW}"
        )
    for name, graph in wanted.items():
        if graphs[name] != graph:
            raise BundleError(f"{folder / MANIFEST}: {_difference(graphs[name], graph)}; {_ANEW}")
    return Bundle(folder, manifest, recipe, graphs)


def _check_listed(folder: Path, manifest: Manifest) -> None:
    """What loading reads is in the manifest, hence checked; nothing else passes for a part of the bundle."""
    listed: set[str] = set()
    for entry in manifest.files:
        if entry.path in listed:
            raise BundleError(f"{folder / MANIFEST} lists {entry.path} twice; {_ANEW}")
        listed.add(entry.path)
    for name in (RECIPE, WEIGHTS, EMBEDDING, ROTARY, *(graph.file for graph in manifest.graphs)):
        if name not in listed:
            raise BundleError(f"{folder / MANIFEST} does not list {name}, which a bundle needs; {_ANEW}")
    known = {path.split("/")[0] for path in listed} | {MANIFEST, SAMPLES, ENGINES}
    for path in sorted(folder.iterdir()):
        if path.name not in known and not path.name.startswith("."):
            raise BundleError(
                f"{path} is not in {MANIFEST}; only {ENGINES}/ and {SAMPLES}/ may be added to a bundle: "
                f"move it elsewhere, or {_ANEW}"
            )


def _check_table(path: Path, shape: tuple[int | str, ...]) -> int:
    """Refuse a table that is not float32 of a shape, in which names take any size; returns its rows."""
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not an array file ({error}); {_ANEW}") from error
    fits = len(table.shape) == len(shape) and all(
        isinstance(wanted, str) or wanted == size for size, wanted in zip(table.shape, shape, strict=True)
    )
    if table.dtype != np.float32 or not fits:
        raise BundleError(
            f"{path} holds {table.dtype} [{', '.join(map(str, table.shape))}], expected float32 "
            f"[{', '.join(map(str, shape))}]; {_ANEW}"
        )
    return len(table)


def _difference(found: contract.Graph, wanted: contract.Graph) -> str:
    """What makes a graph another than the contract's."""
    by_name = {tensor.name: tensor for tensor in found.tensors}
    for tensor in wanted.tensors:
        given = by_name.get(tensor.name)
        if given != tensor:
            has = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
            return (
                f"tensor {tensor.name} of {found.name!r} is {has}, recipe and {EMBEDDING} ask for "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    return f"{found.name!r} has more tensors or other variants than the recipe asks for"


def _check_file(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.path
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BundleError(f"{path} is missing; {_ANEW}") from error
    if size != entry.bytes:
        what = "truncated" if size < entry.bytes else "longer than it should be"
        raise BundleError(f"{path} is {what}: {size} bytes, the manifest says {entry.bytes}; {_ANEW}")
    digest = _sha256(path)
    if digest != entry.sha256:
        raise BundleError(
            f"{path} has been edited or belongs to another bundle: SHA-256 {digest[:12]}…, the manifest says "
            f"{entry.sha256[:12]}…; {_ANEW}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _role(path: str) -> Role:
    by_name: dict[str, Role] = {
        RECIPE: "recipe",
        WEIGHTS: "weights",
        EMBEDDING: "embedding",
        ROTARY: "rotary",
        PREPROCESS: "preprocess",
    }
    if path in by_name:
        return by_name[path]
    if path.startswith(f"{SAMPLES}/"):
        return "sample"
    return "graph" if path.endswith(".onnx") else "text"


def _entry(graph: contract.Graph) -> GraphEntry:
    def tensors(items: Sequence[contract.Tensor]) -> tuple[TensorEntry, ...]:
        return tuple(TensorEntry(name=item.name, dtype=item.dtype, shape=item.shape) for item in items)

    return GraphEntry(
        name=graph.name,
        file=f"{graph.name}.onnx",
        inputs=tensors(graph.inputs),
        outputs=tensors(graph.outputs),
        variants={name: dict(symbols) for name, symbols in graph.variants.items()},
    )


def _graph(entry: GraphEntry) -> contract.Graph:
    def tensors(items: Sequence[TensorEntry]) -> tuple[contract.Tensor, ...]:
        return tuple(contract.Tensor(item.name, item.shape, item.dtype) for item in items)

    return contract.Graph(
        entry.name,
        tensors(entry.inputs),
        tensors(entry.outputs),
        {name: dict(symbols) for name, symbols in entry.variants.items()},
    )
