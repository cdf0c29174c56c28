"""The OLMoE model of transformers in the shape of one of ours, and a bare loop that trains it.

By design it differs from ours in two places: its gates are the softmax of the chosen scores (ours
are sigmoids), and its QK-norm goes over all heads together (ours over each). Where all experts are
active, the router is zero and there is one head, the two compute the same.
"""

from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mmpt.bench.harness import best_seconds
from mmpt.config import UserError
from mmpt.model.attention import Attention
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.layer import Layer
from mmpt.model.moe import Experts
from mmpt.model.transformer import Decoder
from mmpt.train.loop import Trainer
from mmpt.vocab import Modality

AUX = 0.01  # weight of its load balancing loss, as it was trained
SETTINGS = [
    (e, a) for e in ("grouped_mm", "eager") for a in ("sdpa", "eager")
]  # experts, attention


def shape(*, experts: int, active: int, **sizes: Any) -> ModelConfig:
    """A model of ours with one group of experts that all media share."""
    group = GroupConfig(
        modalities=tuple(modality.name.lower() for modality in Modality),
        num_experts=experts,
        num_active=active,
        router="token_choice",
    )
    return ModelConfig(vocab_size=1, groups={"all": group}, tie_embeddings=False, **sizes)


def olmoe(ours: Decoder) -> Any:
    """The peer of equal shape, with the weights of ours."""
    try:
        from transformers import OlmoeConfig, OlmoeForCausalLM
    except ImportError:
        raise UserError("this needs transformers: pip install 'mmpt[eval]'") from None
    config, group = ours.config, ours.config.groups["all"]
    peer: Any = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.expert_hidden,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            num_experts=group.num_experts,
            num_experts_per_tok=group.num_active,
            norm_topk_prob=True,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=config.tie_embeddings,
            router_aux_loss_coef=AUX,
            use_cache=False,
            pad_token_id=None,
            eos_token_id=None,
        )
    )
    _copy(ours, peer)
    return peer.to(ours.embedding.device).train()


@torch.no_grad()
def _copy(ours: Decoder, peer: Any) -> None:
    peer.model.embed_tokens.weight.copy_(ours.embedding)
    if ours.head is not None:
        peer.lm_head.weight.copy_(ours.head)
    peer.model.norm.weight.copy_(ours.norm.scale)
    for layer, theirs in zip(ours.layers, peer.model.layers, strict=True):
        assert isinstance(layer, Layer)
        theirs.input_layernorm.weight.copy_(layer.attention_norm.scale)
        theirs.post_attention_layernorm.weight.copy_(layer.expert_norm.scale)
        _copy_attention(layer.attention, theirs.self_attn)
        _copy_experts(layer.experts.experts()[0], theirs.mlp)


def _copy_attention(ours: Attention, theirs: Any) -> None:
    sizes = (ours.num_queries, 1, 1)
    stack = ours.project_in.unflatten(0, (-1, sum(sizes), ours.head_width))
    for name, part in zip("qkv", stack.split(sizes, 1), strict=True):
        getattr(theirs, f"{name}_proj").weight.copy_(part.flatten(0, 2))
    theirs.o_proj.weight.copy_(ours.project_out)
    for norm, one in ((theirs.q_norm, ours.query_norm), (theirs.k_norm, ours.key_norm)):
        assert one is not None
        scale = one.scale
        norm.weight.copy_(scale.repeat(len(norm.weight) // len(scale)))


def _copy_experts(ours: Experts, theirs: Any) -> None:
    assert ours.router is not None
    theirs.gate.weight.copy_(ours.router.T)
    gate_up = rearrange(ours.bank.gate_up, "e d two f -> e (two f) d")
    theirs.experts.gate_up_proj.copy_(gate_up)
    theirs.experts.down_proj.copy_(ours.bank.down.mT)


class BareLoop:
    """The steps of a trainer's recipe on the peer, and nothing else: batches lie ready as ids."""

    def __init__(self, trainer: Trainer, batches: list[Tensor]) -> None:
        recipe = trainer.recipe
        self.model, self._batches = olmoe(trainer.model), cycle(batches)
        self._device, self._bf16 = trainer.device.type, recipe.precision == "bf16"
        self._parameters, self._clip = list(self.model.parameters()), recipe.optim.clip
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=recipe.optim.lr,
            betas=(recipe.optim.beta1, recipe.optim.beta2),
            weight_decay=recipe.optim.weight_decay,
            fused=True,
        )
        self.setting = self._fastest()

    def step(self) -> Tensor:
        """One update; its loss, with the balancing one."""
        ids = next(self._batches)
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._bf16):
            out = self.model(input_ids=ids, labels=ids, output_router_logits=True)
        out.loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return out.loss.detach()

    def _fastest(self) -> str:
        """Of all its settings, tried one after another."""
        seconds = {setting: self._try(setting) for setting in SETTINGS}
        self._use(min(seconds, key=lambda setting: seconds[setting]))
        return "{} experts, {} attention".format(*min(seconds, key=lambda each: seconds[each]))

    def _try(self, setting: tuple[str, str]) -> float:
        self._use(setting)
        return best_seconds(self.step, device=self._device)[0]

    def _use(self, setting: tuple[str, str]) -> None:
        experts, attention = setting
        self.model.set_experts_implementation(experts)
        self.model.set_attn_implementation(attention)


def same_size(ours: Decoder, peer: nn.Module) -> bool:
    """Whether both have as many weights, but for the QK-norms, of which ours share one scale."""
    return _count(ours, ("query_norm", "key_norm")) == _count(peer, ("q_norm", "k_norm"))


def _count(model: nn.Module, but: tuple[str, ...]) -> int:
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not set(but) & set(name.split(".")))


def equal_shape(config: ModelConfig) -> ModelConfig:
    """The same with one head, and every expert active: both compute the same at a zero router."""
    group = config.groups["all"]
    group = replace(group, num_experts=group.num_active)
    return replace(config, num_heads=1, num_kv_heads=1, groups={"all": group})
