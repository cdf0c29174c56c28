"""The first weights of a decoder: a function of the seed alone, wherever its parts are.

Normal, 1 / sqrt(fan in); what writes to the stream is divided by sqrt(2 x layers), so that the
stream does not grow with depth (GPT-2). Routers start small: gates start near 1 / experts per id.
"""

from typing import TYPE_CHECKING

import torch

from mmpt.model.attention import Attention, RMSNorm
from mmpt.model.collectives import fill
from mmpt.model.dispatch import group_table
from mmpt.model.moe import Experts

if TYPE_CHECKING:
    from mmpt.model.transformer import Decoder


@torch.no_grad()
def initialise(model: "Decoder", generator: torch.Generator) -> None:
    """Overwrite all weights and buffers; each weight is drawn whole, in the order of the layers."""
    config = model.config
    model.groups.copy_(group_table(config))
    deep = (2 * config.num_layers) ** -0.5
    _normal(model.embedding, 0.02, generator)
    if model.head is not None:
        _normal(model.head, config.width**-0.5, generator)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.scale.fill_(1)
        elif isinstance(module, Attention):
            _attention(module, config.width**-0.5, deep * config.width_of_heads**-0.5, generator)
        elif isinstance(module, Experts):
            _experts(module, config.width**-0.5, deep, generator)


@torch.no_grad()
def initialise_low_rank(attention: Attention, generator: torch.Generator) -> None:
    """The additions of noisy ids, if any: zero together, so that they change nothing."""
    for low_rank in (attention.noisy_in, attention.noisy_out):
        if low_rank is not None:
            _normal(low_rank.down, low_rank.down.shape[1] ** -0.5, generator)
            low_rank.up.zero_()


def _attention(
    attention: Attention, std_in: float, std_out: float, generator: torch.Generator
) -> None:
    _normal(attention.project_in, std_in, generator)
    _normal(attention.project_out, std_out, generator)
    if attention.bias_in is not None:
        attention.bias_in.zero_()
    if attention.head_gate is not None:
        _normal(attention.head_gate, std_in, generator)
    initialise_low_rank(attention, generator)


def _experts(experts: Experts, std_in: float, deep: float, generator: torch.Generator) -> None:
    for buffer in experts.buffers(recurse=False):
        buffer.zero_()
    for bank in experts.banks():
        _normal(bank.gate_up, std_in, generator)
        _normal(bank.down, deep * bank.down.shape[1] ** -0.5, generator)
    if experts.router is not None:
        _normal(experts.router, 0.1 * std_in, generator)
    if experts.auxiliary is not None:
        _normal(experts.auxiliary.inner, std_in, generator)
        experts.auxiliary.outer.zero_()


def _normal(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    fill(weight, torch.randn(weight.shape, generator=generator) * std)
