"""Matrix products of 8-bit floats while training (FP8), by torchao, on cards that have them.

What a projection or an expert multiplies is rounded to e4m3, each row with a scale of its own
(torchao's recipe "rowwise"). The stored weights, norms, routers, attention itself and the head stay
as they are.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import nn
from torch.func import functional_call

from mmpt.config import UserError

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x (..., n), weight (m, n)
CAPABILITY = (8, 9)  # of the first cards that multiply 8-bit floats


def check_float8(device: torch.device) -> None:
    """UserError where `device` has no products of 8-bit floats."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"precision = fp8 needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} "
            f"or later, and this is {device.type}; use bf16"
        )


@cache
def float8_linear(*, emulate: bool = False) -> Linear:
    """x @ weight.T in 8 bits, and its gradients; `emulate` rounds alike and multiplies in float32.

    While no gradients are wanted (sampling, evaluation) it is the plain product.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("precision = fp8 needs torchao; install mmpt[gpu]") from None
    # torchao converts modules; ours have other weights at each call
    config = Float8LinearConfig.from_recipe_name("rowwise")
    # numbers of ids need not be multiples of 16
    config = replace(config, emulate=emulate, pad_inner_dim=True)
    linear = convert_to_float8_training(nn.Linear(1, 1, bias=False, device="meta"), config=config)

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.numel()):
            return nn.functional.linear(x, weight)
        low = torch.bfloat16
        return functional_call(linear, {"weight": weight.to(low)}, (x.to(low),))

    return multiply
