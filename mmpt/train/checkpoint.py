"""Checkpoints: a folder of safetensors and JSON that is either whole or absent.

It is written under a temporary name, flushed to the disk and renamed. `config.json` and
`model.safetensors` make it a model folder, which `Decoder.load` reads as it is; beside them stand
the vocabulary, the processor's settings, the optimiser's tensors and `state.json` (loader,
counters, checksums of the files).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.processor import FILE as PROCESSOR_FILE
from mmpt.processor import ProcessorSettings
from mmpt.vocab import Vocabulary

FORMAT_VERSION = 1
PREFIX = "step-"


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    vocabulary: Vocabulary,
    state: Mapping[str, Any],
    processor: ProcessorSettings | None = None,
    keep: int = 2,
) -> Path:
    """Write `folder`/step-N and delete all but the last `keep`; returns the new path.

    `state` is JSON: all that a run needs besides tensors to go on as if it had not stopped. With
    the settings of its `processor`, a checkpoint is all that generating needs.
    """
    folder = Path(folder)
    path = folder / f"{PREFIX}{step:08d}"
    temporary = folder / f"{path.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        model.save(temporary)
        vocabulary.save(temporary / "vocabulary.json")
        if processor is not None:
            processor.save(temporary)
        save_file(_flatten(model, optimizer), temporary / "optimizer.safetensors")
        checksums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        data = {"format_version": FORMAT_VERSION, "step": step, "files": checksums, "state": state}
        (temporary / "state.json").write_text(json.dumps(data))
        for file in (*temporary.iterdir(), temporary):
            _flush(file)
        if path.exists():  # the same step again, after a resume
            shutil.rmtree(path)
        os.replace(temporary, path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write checkpoint {path}: {reason}; free space or choose another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_checkpoint(
    path: str | Path, *, model: Decoder, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Restore weights and optimiser in place and return `state`; verifies every file first."""
    path = Path(path)
    data = _read_state(path)
    for name, checksum in data["files"].items():
        if not (path / name).is_file() or _sha256(path / name) != checksum:
            raise UserError(
                f"checkpoint {path} is damaged: {name} is missing or differs from its checksum; "
                "delete the folder to go on from the one before"
            )
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        if optimizer is not None:
            _restore(model, optimizer, load_file(path / "optimizer.safetensors"))
    except (RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {path} is of another model: {reason}") from None
    return data["state"]


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = Path(folder).glob(f"{PREFIX}*")
    return sorted(path for path in found if path.suffix != ".tmp" and path.is_dir())


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def begun_with(folder: str | Path, vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary of a run's newest checkpoint, or `vocabulary` when it has none.

    The ids are the same in both, but the codes that training data uses may differ: data that was
    encoded since must not change what a run that goes on learns.
    """
    path = latest(folder)
    if path is None or not (path / "vocabulary.json").is_file():
        return vocabulary
    begun = Vocabulary.load(path / "vocabulary.json")
    vocabulary.check(begun.fingerprint, what=f"the run at {path}")
    return begun


def find_processor(*folders: Path | None) -> ProcessorSettings | None:
    """The settings in the first of the folders that has any."""
    for folder in folders:
        if folder is not None and (folder / PROCESSOR_FILE).is_file():
            return ProcessorSettings.load(folder)
    return None


def _read_state(path: Path) -> dict[str, Any]:
    try:
        data = json.loads((path / "state.json").read_text())
        version = data["format_version"]
        data["files"].items()
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is no checkpoint (state.json: {error}); delete the folder to go on from the "
            "one before"
        ) from None
    if version > FORMAT_VERSION:
        raise UserError(f"{path} has format {version}; this mmpt reads {FORMAT_VERSION}: upgrade")
    return data


def _flatten(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's tensors as `parameter name:state name`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}:{key}"] = torch.as_tensor(value).detach().contiguous()
    return tensors


def _restore(
    model: Decoder, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(":")
        parameter = parameters[name]
        # the step too, though it has no dimensions: fused AdamW counts beside the parameter
        optimizer.state[parameter][key] = tensor.to(parameter.device)


def _remove_leftovers(folder: Path) -> None:
    """What a killed process left of its temporary folders."""
    for path in folder.glob(f"{PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
