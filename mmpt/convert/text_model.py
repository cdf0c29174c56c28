"""The weights of a text model of others, as those of a model of ours.

Both rotate the halves of a head against each other, so rows of queries and keys stay as they are;
only their order changes: ours are by key-value head.

Legend: D width, H heads, G key-value heads, W head width, F hidden width, E experts.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from mmpt.config import UserError
from mmpt.convert.architectures import shape_of
from mmpt.convert.files import TensorFiles, read_json
from mmpt.model.config import ModelConfig

# older files keep the waves of the rotary positions, and a copy of a tied head
REDUNDANT = ("rotary_emb.inv_freq", "lm_head.weight")


@dataclass(frozen=True)
class TextModel:
    """kind: its model_type. config: of ours, with one group, `all`; every id is one of text.

    tensors: the state of that model. begin, end: the ids that begin and end its documents.
    """

    kind: str
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    begin: int | None
    end: int | None


def read_text_model(folder: str | Path) -> TextModel:
    """Read config.json and safetensors of a folder; UserError for what would not be the same."""
    folder = Path(folder)
    data = read_json(folder / "config.json")
    config = shape_of(data, where=str(folder / "config.json"))
    with TensorFiles(folder) as files:
        if "tie_word_embeddings" not in data and "lm_head.weight" not in files:
            config = replace(config, tie_embeddings=True)
        tensors = {
            "embedding": files.read("model.embed_tokens.weight", config.vocab_size, config.width),
            "norm.scale": files.read("model.norm.weight", config.width),
        }
        if not config.tie_embeddings:
            tensors["head"] = files.read("lm_head.weight", config.vocab_size, config.width)
        for number in range(config.num_layers):
            layer = _layer(files, f"model.layers.{number}.", config)
            tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.items()}
        files.check_all_read(but=REDUNDANT)
    dtype = tensors["embedding"].dtype
    return TextModel(
        str(data["model_type"]),
        config,
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        _special(data, "bos_token_id", config),
        _special(data, "eos_token_id", config),
    )


def _layer(files: TensorFiles, prefix: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    width = config.width
    tensors = {
        "attention_norm.scale": files.read(f"{prefix}input_layernorm.weight", width),
        "expert_norm.scale": files.read(f"{prefix}post_attention_layernorm.weight", width),
    }
    attention = _attention(files, f"{prefix}self_attn.", config)
    experts = _experts(files, f"{prefix}mlp.", config)
    tensors |= {f"attention.{name}": tensor for name, tensor in attention.items()}
    return tensors | {f"experts.groups.all.{name}": tensor for name, tensor in experts.items()}


def _attention(files: TensorFiles, prefix: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    groups, all_heads = config.num_kv_heads, config.width_of_heads
    heads = {
        "q": all_heads,
        "k": groups * config.width_per_head,
        "v": groups * config.width_per_head,
    }

    def stack(kind: str, *shape: int) -> torch.Tensor:
        parts = [files.read(f"{prefix}{n}_proj.{kind}", num, *shape) for n, num in heads.items()]
        parts = [rearrange(part, "(g w) ... -> g w ...", g=groups) for part in parts]
        return rearrange(torch.cat(parts, 1), "g w ... -> (g w) ...")

    tensors = {
        "project_in": stack("weight", config.width),
        "project_out": files.read(f"{prefix}o_proj.weight", config.width, all_heads),
    }
    if config.attention_bias:
        tensors["bias_in"] = stack("bias")
    if config.qk_norm != "none":
        of_head = config.qk_norm == "head"
        for name, theirs in (("query_norm", "q"), ("key_norm", "k")):
            size = config.width_per_head if of_head else heads[theirs]
            tensors[f"{name}.scale"] = files.read(f"{prefix}{theirs}_norm.weight", size)
    return tensors


def _experts(files: TensorFiles, prefix: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    group, width, hidden = config.groups["all"], config.width, config.expert_hidden
    routed = group.router != "hard"
    names = [f"{prefix}experts.{n}." for n in range(group.num_experts)] if routed else [prefix]
    gate_up, down = [], []
    for name in names:
        pair = [files.read(f"{name}{side}_proj.weight", hidden, width) for side in ("gate", "up")]
        gate_up.append(rearrange(pair, "two f d -> d two f"))
        down.append(files.read(f"{name}down_proj.weight", width, hidden).T)
    tensors = {"bank.gate_up": torch.stack(gate_up), "bank.down": torch.stack(down)}
    if routed:
        gate = files.read(f"{prefix}gate.weight", group.num_experts, width)
        tensors |= {"router": gate.T.contiguous(), "balance": torch.zeros(group.num_experts)}
    return tensors


def _special(data: dict[str, Any], key: str, config: ModelConfig) -> int | None:
    """An id that a config.json names; the first of several, None where it names none."""
    value = data.get(key)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return None
    if type(value) is not int:
        raise UserError(f"config.json: {key} = {value!r} is no id")
    return value if 0 <= value < config.vocab_size else None
