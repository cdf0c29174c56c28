"""Which text models can be read: their config.json as the shape of a model of ours.

| model_type     | QK-norm            | biases       | experts                               |
|----------------|--------------------|--------------|---------------------------------------|
| llama, mistral | none               | none         | one                                   |
| qwen2          | none               | of q, k, v   | one                                   |
| qwen3          | of each head       | none         | one                                   |
| olmoe          | of all heads as one| none         | several, the softmax of all is a gate |

Whatever else a config.json may ask for and would change what is computed is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmpt.config import UserError
from mmpt.model.config import GroupConfig, ModelConfig, RopeScaling
from mmpt.vocab import Modality

MOST = 1 << 24  # of any size in a config.json
ALL = tuple(modality.name.lower() for modality in Modality)


@dataclass(frozen=True)
class Family:
    """What a model_type says without saying it."""

    qk_norm: Literal["head", "full", "none"] = "none"
    attention_bias: bool = False
    experts: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(attention_bias=True),
    "qwen3": Family(qk_norm="head"),
    "olmoe": Family(qk_norm="full", experts=True),
}
# settings that change what is computed, and the values that are understood
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "clip_qkv": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def shape_of(config: Mapping[str, Any], *, where: str) -> ModelConfig:
    """The model of ours that computes the same; one group of experts serves all media.

    config: the content of a config.json. where: what errors call it.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type = {kind!r} is not supported; use one of {', '.join(FAMILIES)}"
        )
    family, read = FAMILIES[kind], _Reader(config, where)
    for key, known in ONLY.items():
        if config.get(key) not in known:
            raise UserError(f"{where}: {key} = {config[key]!r} is not supported")
    _check_windows(config, where)
    heads = read.size("num_attention_heads")
    base, scaling = _rope(config, where)
    return ModelConfig(
        vocab_size=read.size("vocab_size"),
        width=read.size("hidden_size"),
        num_layers=read.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=read.size("num_key_value_heads", heads),
        head_width=read.size("head_dim", 128 if kind == "qwen3" else 0),
        qk_norm=family.qk_norm,
        attention_bias=family.attention_bias,
        norm_eps=read.number("rms_norm_eps", 1e-5 if kind == "olmoe" else 1e-6),
        expert_hidden=read.size("intermediate_size"),
        rope_base=base,
        rope_scaling=scaling,
        tie_embeddings=config.get("tie_word_embeddings") is True,
        groups={"all": _experts(read) if family.experts else GroupConfig(modalities=ALL)},
    )


@dataclass(frozen=True)
class _Reader:
    """Numbers of a config.json; those that are absent or null have a default, or are missed."""

    config: Mapping[str, Any]
    where: str

    def size(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int or not (1 <= value <= MOST or value == default):
            raise UserError(f"{self.where}: {key} = {value!r}; it must be from 1 to {MOST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise UserError(f"{self.where}: {key} = {value!r}; it must be a number above 0")
        return float(value)

    def _value(self, key: str, default: float | None) -> Any:
        value = self.config.get(key)
        if value is None and default is None:
            raise UserError(f"{self.where}: {key} is missing")
        return default if value is None else value


def _experts(read: _Reader) -> GroupConfig:
    return GroupConfig(
        modalities=ALL,
        num_experts=read.size("num_experts"),
        num_active=read.size("num_experts_per_tok"),
        router="token_choice",
        gate="softmax",
        renormalise=read.config.get("norm_topk_prob") is True,
    )


def _check_windows(config: Mapping[str, Any], where: str) -> None:
    if config.get("use_sliding_window") is not False and config.get("sliding_window") is not None:
        raise UserError(
            f"{where}: sliding_window = {config['sliding_window']!r} is not supported; only models "
            "whose ids see all before them are"
        )
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise UserError(f"{where}: a layer of type {kind!r} is not supported")


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """The base and the scaling; older files have the base outside of the table."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: the rotary parameters must be a table, not {table!r}")
    if table.get("partial_rotary_factor", 1) not in ONLY["partial_rotary_factor"]:
        raise UserError(f"{where}: heads that are turned in part only are not supported")
    read = _Reader({"rope_theta": config.get("rope_theta"), **table}, where)
    base, kind = read.number("rope_theta", 10_000.0), table.get("rope_type", table.get("type"))
    if kind in (None, "default"):
        return base, None
    if kind != "llama3":
        raise UserError(f"{where}: rope_type = {kind!r} is not supported; use default or llama3")
    return base, RopeScaling(
        factor=read.number("factor"),
        low_freq_factor=read.number("low_freq_factor"),
        high_freq_factor=read.number("high_freq_factor"),
        original_max_position_embeddings=read.size("original_max_position_embeddings"),
    )
