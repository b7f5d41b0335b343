"""A checkpoint folder as a model whose weights stay on disk until a part of it is used.

The modules are transformers' own, built without memory for their parameters. What a part needs is read from
the safetensors files when it is used and let go afterwards, so that a model of any size takes no more memory
than its largest part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_autoprune.errors import InputError
from vla_autoprune.models.families import adapter_for, check_checkpoint, require_all_weights, weight_files

if TYPE_CHECKING:
    from vla_autoprune.models.adapter import StageModel


class StoredWeights:
    """The weights of a folder, by the names that a model's own parameters have.

    Args:
        folder: with config.json and safetensors files.
        model: the modules, without memory.

    Raises:
        InputError: a file cannot be read, or weights of the model are in none of them; the message names
            them.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder = folder
        parameters = model.state_dict(keep_vars=True)
        found = _names(folder, model, parameters)
        aliases: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            aliases.setdefault(id(parameter), []).append(name)
        self._keys: dict[str, tuple[Path, str]] = {}
        missing = []
        for names in aliases.values():  # a tied weight has several names, and is stored under one at least
            stored = next((name for name in names if name in found), None)
            if stored is None:
                missing.append(names[0])
                continue
            self._keys.update(dict.fromkeys(names, found[stored]))
        require_all_weights(folder, missing, len(parameters))
        for name, parameter in parameters.items():
            shape = self._shape(name)
            if shape != tuple(parameter.shape):
                path, key = self._keys[name]
                raise InputError(
                    f"{path}: {key} is {list(shape)}, config.json asks for {list(parameter.shape)}; "
                    "configuration and weights are of different models"
                )
        self._name_of = {id(parameter): name for name, parameter in parameters.items()}
        self._kept = list(parameters.values())  # an id stays the object's own as long as the object lives

    @property
    def names(self) -> Collection[str]:
        """Of every weight; a tied one under each of its names."""
        return self._keys.keys()

    def read(self, name: str) -> Tensor:
        """A weight in the type it is stored in, mapped from its file."""
        from safetensors import safe_open

        path, key = self._keys[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)

    def value_of(self, parameter: nn.Parameter) -> Tensor:
        """What belongs into one of the model's parameters."""
        return self.read(self._name_of[id(parameter)])

    def _shape(self, name: str) -> tuple[int, ...]:
        from safetensors import safe_open

        path, key = self._keys[name]
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())


def open_stored(folder: Path) -> StageModel:
    """Take a checkpoint apart without loading it.

    Args:
        folder: as transformers' `save_pretrained` writes it: config.json, safetensors files, one or several.

    Returns:
        A `StageModel` that reads weights where `loaded` asks for them. It cannot `generate`.

    Raises:
        InputError: a file is missing or not valid, or the model is not supported.
    """
    check_checkpoint(folder)
    model = skeleton(folder)
    adapter = adapter_for(model)
    adapter.read_from(StoredWeights(folder, model))
    return adapter


def skeleton(folder: Path) -> Any:
    """A checkpoint's real class, whose parameters have shapes and no memory; its small tables are real.

    Raises:
        InputError: the configuration cannot be read, or the class has stored weights that are no parameters.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from error
    kind = getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    owner: Any = model
    for path, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel):
            owner = module
        tables = {name for name, _ in module.named_buffers(recurse=False)}
        for name in tables:
            if name not in module._non_persistent_buffers_set:
                raise InputError(
                    f"{folder}: {path}.{name} is a stored buffer; only models whose weights are all "
                    "parameters can be read part by part"
                )
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if tables:
            with torch.no_grad():
                owner._init_weights(module)  # transformers fills such tables where weights are initialised
    return model.eval()


def _names(folder: Path, model: nn.Module, wanted: dict[str, Any]) -> dict[str, tuple[Path, str]]:
    """From the model's names to file and name in it; transformers knows what older checkpoints call them."""
    from safetensors import SafetensorError, safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    prefix = model.base_model_prefix
    found: dict[str, tuple[Path, str]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}); download the checkpoint again") from error
        for key in keys:
            name, _ = rename_source_key(key, renamings, [], prefix, wanted)
            found[name] = (path, key)
    return found


@contextmanager
def filled(module: nn.Module, dtype: torch.dtype, stored: StoredWeights | None) -> Iterator[None]:
    """Context in which a module's parameters have values of a type; afterwards they are what they were.

    Args:
        module: any part of a model.
        dtype: of the values.
        stored: where they are read; None casts what the module holds.

    Raises:
        InputError: a weight is not finite, or too large for the type.
    """
    held = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    values: dict[int, nn.Parameter] = {}
    try:
        for owner, name, parameter in held:
            if id(parameter) not in values:
                given = parameter.detach() if stored is None else stored.value_of(parameter)
                values[id(parameter)] = nn.Parameter(_cast(given, dtype, name), requires_grad=False)
            owner._parameters[name] = values[id(parameter)]
        yield
    finally:
        for owner, name, parameter in held:
            owner._parameters[name] = parameter
        for value in values.values():
            # Whoever still knows it holds no memory: the exporter's rules remember the last graph they saw.
            value.data = torch.empty(0, dtype=dtype)


def _cast(stored: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if stored.dtype == dtype:
        return stored
    value = stored.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(stored.dtype).max and not value.isfinite().all():
        raise InputError(
            f"a {name} of the model reaches {stored.abs().max():.3g}, {dtype} ends at "
            f"{torch.finfo(dtype).max:.3g}; export with --precision bf16 or fp32"
        )
    return value
