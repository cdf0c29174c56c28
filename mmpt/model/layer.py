"""One layer of the decoder: attention, then experts, each behind a norm and added to the stream.

Legend: B batch, T row, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmpt.model.attention import Attention, Context, RMSNorm
from mmpt.model.cache import LayerCache
from mmpt.model.config import ModelConfig
from mmpt.model.dispatch import Dispatch
from mmpt.model.moe import ModalityMoE


class Layer(nn.Module):
    """Attention, then experts, each behind a norm and added to the stream."""

    def __init__(
        self, config: ModelConfig, *, number: int = 0, lender: "Layer | None" = None
    ) -> None:
        super().__init__()
        self.attention_norm, self.expert_norm = (
            RMSNorm(config.width, config.norm_eps) for _ in range(2)
        )
        self.attention = Attention(config)
        lent = None if lender is None else lender.experts
        self.experts = ModalityMoE(config, layer=number, lender=lent)
        # contexts of a forward pass and of its repetition, where activations are not kept
        self.recompute: Callable[[], tuple[Any, Any]] | None = None

    def forward(
        self,
        x_BTD: torch.Tensor,
        *,
        context: Context,
        dispatch: Dispatch,
        cache: LayerCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stream behind this layer, and (B, T) what ids add to losses of routers, if any."""
        inputs = x_BTD, context, dispatch, cache
        if self.recompute is None or not torch.is_grad_enabled() or cache is not None:
            return self._compute(*inputs)
        return checkpoint(  # type: ignore[return-value] # it gives what the function gives
            self._compute,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=self.recompute,
        )

    def _compute(
        self,
        x_BTD: torch.Tensor,
        context: Context,
        dispatch: Dispatch,
        cache: LayerCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_BTD = x_BTD + self.attention(
            self.attention_norm(x_BTD),
            context=context,
            noisy_index=dispatch.noisy_index,
            cache=cache,
        )
        y_BTD, loss_BT = self.experts(self.expert_norm(x_BTD), dispatch)
        return x_BTD + y_BTD, loss_BT
