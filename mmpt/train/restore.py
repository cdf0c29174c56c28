"""Reading a checkpoint back, on any number of ranks, after every file of it was verified."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from mmpt.config import UserError
from mmpt.data.loader import merge_states
from mmpt.model.collectives import fill
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.model.weights import files_of, list_parts, read_parts, read_tensors, upgrade
from mmpt.train.checkpoint import FORMAT_VERSION, sha256_of


def load_checkpoint(
    path: str | Path,
    *,
    model: Decoder,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Restore weights and optimiser in place, on any number of ranks; verifies every file first.

    Returns `state`, whose "loader" is that of all ranks, and the tensors of `Moment.extra` by these
    names, as parts of tensors where the weights of their names are parts.
    """
    path = Path(path)
    data = _read_state(path)
    _verify(path, data["files"])
    state, version = dict(data["state"]), data["format_version"]
    weights = dict(model.named_parameters())
    more: dict[str, dict[str, torch.Tensor]] = {}
    try:
        _read_into(path, model.state_dict(), version, model.config)
        if optimizer is not None:
            optimizer.state.clear()
            for name, tensor in _read_like(
                path, "optimizer", weights, version, model.config
            ).items():
                weight, _, key = name.rpartition(":")
                if not tensor.ndim and not optimizer.defaults.get("fused"):
                    tensor = tensor.cpu()  # counted on the host, unless it counts beside the weight
                optimizer.state[weights[weight]][key] = tensor
        for name in extra:
            if files_of(path, name):
                more[name] = _read_like(path, name, weights, version, model.config)
        if version > 1:
            files = sorted(path.glob("loader-*.json"))
            state["loader"] = merge_states([json.loads(file.read_text()) for file in files])
    except (RuntimeError, KeyError, ValueError, SafetensorError, CheckpointException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {path} is of another model: {reason}") from None
    return state, more


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


def _verify(path: Path, checksums: Mapping[str, str]) -> None:
    """Every rank its share of the files; all hear of what is damaged."""
    rank, count = 0, 1
    if distributed.is_initialized():
        rank, count = distributed.get_rank(), distributed.get_world_size()
    damaged = [
        name
        for name, checksum in sorted(checksums.items())[rank::count]
        if not (path / name).is_file() or sha256_of(path / name) != checksum
    ]
    if count > 1:
        found = [[]] * count
        distributed.all_gather_object(found, damaged)
        damaged = [name for each in found for name in each]
    if damaged:
        raise UserError(
            f"checkpoint {path} is damaged: {damaged[0]} is missing or differs from its checksum; "
            "delete the folder to go on from the one before"
        )


def _read_into(
    path: Path, tensors: dict[str, torch.Tensor], version: int, config: ModelConfig
) -> None:
    """The weights; KeyError or ValueError names what does not fit."""
    old = {} if version > 1 else upgrade(read_tensors(path), version, config)
    sizes = {key: tensor.shape for key, tensor in old.items()} or {
        key: meta.size for key, meta in list_parts(path / "model").items()
    }
    if different := sizes.keys() ^ tensors.keys():
        raise KeyError(f"{min(different)} is in one of them only")
    for key, tensor in tensors.items():
        if sizes[key] != tensor.shape:
            raise ValueError(f"{key} has shape {tuple(sizes[key])} there")
    if version > 1:
        read_parts(tensors, path / "model")
    for key, value in old.items():
        fill(tensors[key], value)


def _read_like(
    path: Path,
    name: str,
    weights: Mapping[str, torch.Tensor],
    version: int,
    config: ModelConfig,
) -> dict[str, torch.Tensor]:
    """Tensors `weight` or `weight:state`, spread as their weights are; scalars are whole."""
    if not files_of(path, name):
        return {}
    tensors: dict[str, torch.Tensor] = {}
    old = {} if version > 1 else upgrade(read_tensors(path, name), version, config)
    for key, meta in (old or list_parts(path / name)).items():
        like = weights[key.rpartition(":")[0] or key]
        size = meta.shape if isinstance(meta, torch.Tensor) else meta.size
        tensors[key] = torch.empty_like(like) if size else torch.empty((), device=like.device)
    if version > 1:
        read_parts(tensors, path / name)
    for key, value in old.items():
        fill(tensors[key], value)
    return {key: tensor.detach() for key, tensor in tensors.items()}
