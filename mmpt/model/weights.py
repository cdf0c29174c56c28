"""What a model folder holds: config.json, and tensors in one file, or as the ranks wrote them.

Parts are written by PyTorch's distributed checkpoints in their safetensors form, which says in each
header where a part belongs; nothing is pickled.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from safetensors import safe_open
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mmpt.config import UserError, from_dict
from mmpt.model.config import ModelConfig

FORMAT_VERSION = 2  # 1 had another order of the rows of `project_in`, and no banks


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """That of a model folder, and the version of its format."""
    try:
        data = json.loads((folder / "config.json").read_text())
        version, model = data["format_version"], data["model"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} holds no model (config.json: {error})") from None
    if version > FORMAT_VERSION:
        raise UserError(f"{folder} has format {version}; this mmpt reads {FORMAT_VERSION}: upgrade")
    return from_dict(ModelConfig, model, where=f"{folder}/config.json"), version


def files_of(folder: str | Path, name: str = "model") -> list[Path]:
    """`NAME.safetensors`, or what lies in the folder NAME; empty when neither is there."""
    whole = Path(folder) / f"{name}.safetensors"
    return [whole] if whole.is_file() else sorted((Path(folder) / name).glob("*.safetensors"))


def read_tensors(folder: str | Path, name: str = "model") -> dict[str, torch.Tensor]:
    """All tensors, whole, on the CPU. Raises OSError and safetensors' errors."""
    files = files_of(folder, name)
    if not files:
        raise FileNotFoundError(f"neither {name}.safetensors nor parts in {name}/")
    if files[0].parent == Path(folder):
        with safe_open(files[0], framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype)
        for key, meta in list_parts(files[0].parent).items()
    }
    read_parts(tensors, files[0].parent, alone=True)
    return tensors


def list_parts(folder: str | Path) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of every tensor whose parts are in a folder."""
    listed = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {key: meta for key, meta in listed.items() if isinstance(meta, TensorStorageMetadata)}


def read_parts(
    tensors: Mapping[str, torch.Tensor], folder: str | Path, *, alone: bool = False
) -> None:
    """Overwrite tensors, or the parts of them that this rank has; all ranks call it.

    alone: this process reads by itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        load(
            {key: tensor.detach() for key, tensor in tensors.items()},
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=alone or not distributed.is_initialized(),
        )


def write_parts(
    tensors: Mapping[str, torch.Tensor], folder: str | Path, group: ProcessGroup | None
) -> None:
    """Write this rank's parts; all ranks of the group call it, or one process without a group."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def fingerprint(folder: str | Path) -> str:
    """sha256 over the files of a model's weights, 16 digits."""
    digest = hashlib.sha256()
    for path in files_of(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def upgrade(
    tensors: Mapping[str, torch.Tensor], version: int, config: ModelConfig
) -> dict[str, torch.Tensor]:
    """Tensors of an older format as those of today; also of an optimiser, as `weight:state`."""
    if version > 1:
        return dict(tensors)
    return dict(_from_1(name, tensor, config) for name, tensor in tensors.items())


def _from_1(name: str, tensor: torch.Tensor, config: ModelConfig) -> tuple[str, torch.Tensor]:
    # all queries, then all keys, then all values; gate beside up; no banks
    weight, colon, state = name.partition(":")
    parts = weight.split(".")
    if parts[-1] == "project_in" or parts[-2:] == ["noisy_in", "up"]:
        heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        tensor = _by_head(tensor, heads, config.width_per_head) if tensor.ndim else tensor
    elif "groups" in parts and parts[-1] in ("gate_up", "down"):
        weight = ".".join([*parts[:-1], "bank", parts[-1]])
        if parts[-1] == "gate_up" and tensor.ndim:
            tensor = rearrange(tensor, "e d (two f) -> e d two f", two=2)
    return f"{weight}{colon}{state}", tensor


def _by_head(tensor: torch.Tensor, heads: tuple[int, int, int], width: int) -> torch.Tensor:
    parts = tensor.split([num * width for num in heads])
    parts = [rearrange(part, "(g h) d -> g h d", g=heads[1]) for part in parts]
    return rearrange(torch.cat(parts, 1), "g h d -> (g h) d")
