"""What a decoder is made of: sizes, and the groups of experts that serve the modalities.

A group may serve several modalities: `{"all": GroupConfig(modalities=("text", "image", "video",
"speech"))}` is the shared (modality-agnostic) model that isolation is compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mmpt.config import UserError
from mmpt.vocab import Modality

Router = Literal["hard", "token_choice"]


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """A set of experts that serve the same modalities."""

    modalities: tuple[str, ...]
    num_experts: int = 1
    num_active: int = 1  # experts per id
    router: Router = "hard"  # hard: the only expert; token_choice: the best `num_active`, dropless
    noisy: bool = False  # serves ids that are being denoised, not committed ones

    def __post_init__(self) -> None:
        known = [modality.name.lower() for modality in Modality]
        for name in self.modalities:
            if name not in known:
                raise UserError(f"unknown modality {name!r}; choose from {', '.join(known)}")
        if not 1 <= self.num_active <= self.num_experts:
            raise UserError(
                f"num_active = {self.num_active} of num_experts = {self.num_experts}; "
                "use 1 <= num_active <= num_experts"
            )
        if self.router == "hard" and self.num_experts != 1:
            raise UserError(
                f"the hard router has one expert, not {self.num_experts}; use router = token_choice"
            )


def default_groups() -> dict[str, GroupConfig]:
    """Text, visual (image and video share codes, so they share experts) and speech."""
    return {
        "text": GroupConfig(
            modalities=("text",), num_experts=2, num_active=1, router="token_choice"
        ),
        "visual": GroupConfig(
            modalities=("image", "video"), num_experts=2, num_active=1, router="token_choice"
        ),
        "speech": GroupConfig(modalities=("speech",)),
    }


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary positions of Llama 3, stretched for contexts longer than the original one.

    Waves that turn fewer than `low_freq_factor` times in the original context are `factor` times
    as long, those that turn more than `high_freq_factor` times stay, and between it is smooth.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.factor < 1:
            raise UserError(
                f"rope_scaling: factor = {self.factor}, low_freq_factor = {self.low_freq_factor}, "
                f"high_freq_factor = {self.high_freq_factor}; use factor >= 1 and 0 < low < high"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder; the defaults are the tiny one that trains on a laptop."""

    vocab_size: int
    width: int = 192
    num_layers: int = 5
    num_heads: int = 6
    num_kv_heads: int = 2
    head_width: int = 0  # 0: width / num_heads; see `width_per_head`
    qk_norm: Literal["head", "full", "none"] = "head"  # of each head, or of all heads together
    attention_bias: bool = False  # of queries, keys and values
    norm_eps: float = 1e-6
    expert_hidden: int = 384
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = True
    noisy_rank: int = 16  # rank of the low-rank attention weights of noisy ids; 0: none
    groups: dict[str, GroupConfig] = field(default_factory=default_groups)
    vocabulary: str = ""  # fingerprint of the vocabulary that the ids come from

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")
        if self.head_width < 0 or self.head_width % 2:
            raise UserError(f"head_width = {self.head_width}; use an even number, or 0")
        if not self.head_width and self.width % (2 * self.num_heads):
            raise UserError(
                f"width {self.width} over {self.num_heads} heads is no even head width; "
                f"use a width that is a multiple of {2 * self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        _check_groups(self.groups)

    @property
    def width_per_head(self) -> int:
        return self.head_width or self.width // self.num_heads

    @property
    def width_of_heads(self) -> int:
        """Of all heads together, which need not be that of the stream."""
        return self.num_heads * self.width_per_head

    @property
    def undivided_attention(self) -> str | None:
        """The option, if any, whose weights ranks that share heads cannot divide."""
        if self.qk_norm == "full":
            return "qk_norm = full"
        return "attention_bias = true" if self.attention_bias else None

    @property
    def ordered_groups(self) -> dict[str, GroupConfig]:
        """The groups of clean ids first, then those of noisy ids: the order of a dispatch."""
        return dict(sorted(self.groups.items(), key=lambda item: item[1].noisy))


def _check_groups(groups: Mapping[str, GroupConfig]) -> None:
    for noisy in (False, True):
        served: dict[str, str] = {}
        for name, group in groups.items():
            if not name.isidentifier():
                raise UserError(f"group name {name!r} is no identifier; use letters and _")
            for modality in group.modalities if group.noisy == noisy else ():
                if modality in served:
                    raise UserError(
                        f"groups {served[modality]!r} and {name!r} both serve {modality}"
                    )
                served[modality] = name
        for modality in Modality:
            if not noisy and modality.name.lower() not in served:
                raise UserError(f"no group serves {modality.name.lower()}; add it to a group")
