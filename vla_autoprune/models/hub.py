"""Checkpoints of a hub: what is needed of one and nothing else, and its configuration before its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vla_autoprune.errors import InputError
from vla_autoprune.models.families import SHARDS, check_description, weight_files

DESCRIPTION = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    SHARDS,
)
"""Files that say what a checkpoint is. They come first: a model that is not supported is not downloaded."""


def downloaded(model: str) -> Path:
    """The folder of a hub id in the local cache; what is not there yet is downloaded.

    Files with pickled weights, and copies in folders within, are left where they are.

    Args:
        model: like organisation/name.

    Returns:
        The folder, with description and safetensors.

    Raises:
        InputError: it is no hub id, the hub does not give it, or it is not supported; the message names the
            id and the way out.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise InputError(f"--model {model}: no such folder, and not a hub id like organisation/name")
    folder = _snapshot(model, DESCRIPTION)
    check_description(folder)
    shards = weight_files(folder)
    # The same commit, so that nothing is mixed if the model changes meanwhile.
    _snapshot(model, [path.name for path in shards], revision=folder.name)
    if not any(path.is_file() for path in shards):
        raise InputError(
            f"--model {model}: the hub has no safetensors files of it; pickled weights are not read, so save "
            "it once with transformers' save_pretrained and give that folder"
        )
    return folder


def _snapshot(model: str, names: Sequence[str], revision: str | None = None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    where = f"--model {model}: no such folder, and the hub at {constants.ENDPOINT}"
    log_in = "log in with 'hf auth login' or set HF_TOKEN"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(names)))
    except errors.GatedRepoError as error:
        raise InputError(
            f"{where} gives it to users that accepted its terms; accept them at {constants.ENDPOINT}/{model} "
            f"and {log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{where} has no model of that name, or a private one; check the spelling, or {log_in}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = constants.is_offline_mode()
        why = "is not asked, as HF_HUB_OFFLINE is set" if offline else f"cannot be reached ({_cause(error)})"
        raise InputError(
            f"{where} {why}; this machine's cache does not have all of it. Where there is a network: "
            f"hf download {model} --local-dir DIR, then --model DIR"
        ) from error
    except Exception as error:  # of its own, of the connection, of the disk
        raise InputError(f"{where} does not give it ({_cause(error)})") from error


def _cause(error: BaseException) -> str:
    """The first line of what began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
