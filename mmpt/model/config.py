"""What a decoder is made of: sizes, and the groups of experts that serve the modalities.

A group may serve several modalities: `{"all": GroupConfig(modalities=("text", "image", "video",
"speech"))}` is the shared (modality-agnostic) model that isolation is compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmpt.config import UserError
from mmpt.vocab import Modality

Router = Literal["hard", "hash", "token_choice", "expert_choice"]


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """A set of experts that serve the same modalities."""

    modalities: tuple[str, ...]
    num_experts: int = 1
    num_active: int = 1  # experts per id; with expert choice the mean over ids
    # hard: the only expert; hash: those that a hash of the id says; token_choice: the best ones of
    # each id, dropless; expert_choice: each expert takes its best ids
    router: Router = "hard"
    noisy: bool = False  # serves ids that are being denoised, not committed ones
    gate: Literal["sigmoid", "softmax"] = "sigmoid"  # softmax: over all experts, as OLMoE
    renormalise: bool = False  # gates of an id sum to one, as in Mixtral
    balance: Literal["bias", "loss", "none"] = "bias"  # token choice: what evens the load
    balance_loss: float = 0.01  # weight, with balance = loss
    router_z_loss: float = 0.0  # weight of logsumexp^2
    shared_hidden: int = 0  # hidden width of an expert that every id takes; 0: none
    num_identity: int = 0  # further experts, of token choice, that give back what they get
    # expert choice: which ids compete, those of a batch or of a document (clean ids), or of a block
    # (noisy ones)
    scope: Literal["batch", "sequence", "block"] = "batch"
    capacity_slope: float = 0.0  # capacity x (1 + slope (2t - 1)) at time t: 0 noise, 1 clean
    router_noise: bool = False  # expert choice: Gumbel-sigmoid noise while training
    # expert choice of clean ids where later ids must not count, that is everywhere but in training:
    # the best `num_active`, or auxiliary routers that are trained for it
    causal: Literal["token_choice", "auxiliary"] = "token_choice"

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
        for name in ("balance_loss", "router_z_loss", "shared_hidden", "num_identity"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)}; use at least 0")
        if self.renormalise and self.num_active == 1:
            raise UserError(
                "renormalise makes the gate of a single expert 1, from which no router learns; use "
                "num_active = 2 or more"
            )
        self._check_kinds()

    def _check_kinds(self) -> None:
        """What only some routers can do."""
        chosen = self.router == "expert_choice"
        if self.num_identity and self.router != "token_choice":
            raise UserError(f"num_identity needs router = token_choice, not {self.router}")
        if chosen and self.noisy != (self.scope == "block"):
            raise UserError(
                f"expert choice of {'noisy' if self.noisy else 'clean'} ids with scope = "
                f"{self.scope}; use {'block' if self.noisy else 'batch or sequence'}"
            )
        if chosen and (self.renormalise or self.balance == "loss"):
            raise UserError("expert choice is balanced as it is; leave out renormalise and balance")
        if not chosen and (self.router_noise or self.capacity_slope or self.causal == "auxiliary"):
            raise UserError(
                "router_noise, capacity_slope and causal = auxiliary need router = expert_choice, "
                f"not {self.router}"
            )
        if not -1 <= self.capacity_slope <= 1:
            raise UserError(f"capacity_slope = {self.capacity_slope}; use -1 to 1")

    def for_noisy(
        self, media: tuple[str, ...], router: Router | None = None, slope: float = 0.0
    ) -> "GroupConfig":
        """The group of the noisy ids of `media` that is grown from this one.

        router: of groups of several experts, this one's unless given. Expert choice is by block.
        slope: `capacity_slope`, this one's where it is 0.
        """
        router = router if router and self.num_experts > 1 else self.router
        options: dict[str, Any] = {"modalities": media, "noisy": True, "router": router}
        if router == "expert_choice":
            if not self.learned:
                raise UserError(f"expert choice needs routers to start from, not {self.router}")
            options |= {"scope": "block", "capacity_slope": slope or self.capacity_slope}
            options |= {"balance": "bias", "renormalise": False, "causal": "token_choice"}
        elif self.router == "expert_choice":
            options |= {"capacity_slope": 0.0, "router_noise": False, "causal": "token_choice"}
        return replace(self, **options)

    @property
    def num_choices(self) -> int:
        """Experts that the router chooses from."""
        return self.num_experts + self.num_identity

    @property
    def mean_active(self) -> float:
        """Experts that compute something, per id, the shared one not counted, at an even load."""
        return self.num_active * self.num_experts / self.num_choices

    @property
    def learned(self) -> bool:
        """Whether the router has weights."""
        return self.router in ("token_choice", "expert_choice")


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
class NoiseConfig:
    """What a model was adapted to denoise; see `mmpt.decode.noise`."""

    path: Literal["mixture", "masked", "metric"] = "mixture"
    metric_scale: float = 3.0  # c of the metric path
    metric_power: float = 0.9  # its exponent
    max_block: int = 0  # ids of the longest block that was denoised in training; 0: not known
    text_block: int = 0  # ids of a block of text; 0: text is not denoised

    def __post_init__(self) -> None:
        for name in ("metric_scale", "metric_power"):
            if getattr(self, name) <= 0:
                raise UserError(f"noise.{name} = {getattr(self, name)}; use more than 0")
        for name in ("max_block", "text_block"):
            if getattr(self, name) < 0:
                raise UserError(f"noise.{name} = {getattr(self, name)}; use at least 0")


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
    gated_attention: bool = False  # a gate for each head (arXiv 2505.06708)
    untied_attention: bool = False  # projections for each clean group (arXiv 2411.04996)
    norm_eps: float = 1e-6
    expert_hidden: int = 384
    rope: Literal["1d", "3d"] = "1d"  # 3d: grids have time, height and width
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = True
    noisy_rank: int = 16  # rank of the low-rank attention weights of noisy ids; 0: none
    noise: NoiseConfig = field(default_factory=NoiseConfig)  # of adapted models
    groups: dict[str, GroupConfig] = field(default_factory=default_groups)
    expert_share_every: int = 1  # adjacent layers that have one set of experts, each its own router
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
        if self.expert_share_every < 1:
            raise UserError(f"expert_share_every = {self.expert_share_every}; use 1 or more")
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
        options = {
            "qk_norm = full": self.qk_norm == "full",
            "attention_bias = true": self.attention_bias,
            "gated_attention = true": self.gated_attention,
            "untied_attention = true": self.untied_attention,
        }
        return next((option for option, chosen in options.items() if chosen), None)

    @property
    def ordered_groups(self) -> dict[str, GroupConfig]:
        """The groups of clean ids first, then those of noisy ids: the order of a dispatch."""
        return dict(sorted(self.groups.items(), key=lambda item: item[1].noisy))

    @property
    def activation_rates(self) -> dict[str, float]:
        """Of each clean group: the share of a layer's weights that an id meets.

        (4 + 3b) / (4 + 3m) with b the hidden widths that it meets, and m all there are, over the
        width (arXiv 2506.12119). Noisy groups, which come with adaptation, do not count.
        """
        clean = {name: group for name, group in self.groups.items() if not group.noisy}
        hidden = self.expert_hidden
        stored = sum(g.num_experts * hidden + g.shared_hidden for g in clean.values()) / self.width
        met = {
            name: (g.mean_active * hidden + g.shared_hidden) / self.width
            for name, g in clean.items()
        }
        return {name: (4 + 3 * b) / (4 + 3 * stored) for name, b in met.items()}


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
