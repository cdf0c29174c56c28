"""The coordinate check of muP (arXiv 2203.03466, appendix D.1): do rates hold at other widths?

Models of several widths take the same few steps. Where the parametrisation is right, what a layer
adds to the stream and the logits have coordinates of one size at any width; where it is not, steps
of the same rate move wider models further. Seen from the slope of log size over log width.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.train.optim import OptimConfig, build_optimizer, initialise_mup, set_learning_rate
from mmpt.vocab import Modality

MULTIPLES = (1, 2, 4, 8)  # of the smallest width, which is the base
MAX_LAYERS, MAX_HEAD_WIDTH = 2, 32  # wider heads are narrowed: all grows by the number of heads
NUM_IDS, ROWS, LENGTH = 256, 4, 64
# the rules are the same for any rate: with this one, ten steps outweigh the first weights, whose
# part in the logits is a random sum and has another slope
STEPS, RATE = 10, 0.02
GROWS, VANISHES = 0.2, -0.5  # slopes; the standard parametrisation goes to 0.4 and far above


def check_coordinates(config: ModelConfig, optim: OptimConfig, *, seed: int = 0) -> dict[str, Any]:
    """The mean |coordinate| of attentions, experts and logits by width and step, and the verdict.

    The models take steps of one size on one batch of random ids.
    """
    models = widened(config)
    widths = [model.width for model in models]
    base = widths[0] if optim.mup_base_width else 0
    optim = replace(optim, lr=RATE, mup_base_width=base)
    sizes = [_sizes(model, optim, seed) for model in models]
    slopes = {
        part: round(slope(widths, [found[part][-1] for found in sizes]), 3) for part in sizes[0]
    }
    passed = all(VANISHES < value <= GROWS for value in slopes.values())
    return {
        "parametrisation": "muP" if base else "standard",
        "optimizer": optim.kind,
        "sizes at each step, by width": {
            part: {
                str(width): [float(f"{value:.3g}") for value in found[part]]
                for width, found in zip(widths, sizes, strict=True)
            }
            for part in sizes[0]
        },
        "slopes after the last step": slopes,
        "passed": passed,
        "verdict": _verdict(passed, base),
    }


def widened(config: ModelConfig) -> list[ModelConfig]:
    """The model at several widths: heads of one width, more of them; experts grow alike."""
    sharing = config.num_heads // config.num_kv_heads
    head_width = min(config.width_per_head, MAX_HEAD_WIDTH)
    unit = sharing * head_width
    return [
        replace(
            config,
            vocab_size=NUM_IDS,
            width=unit * multiple,
            num_layers=min(config.num_layers, MAX_LAYERS),
            num_heads=sharing * multiple,
            num_kv_heads=multiple,
            head_width=head_width,
            expert_hidden=max(config.expert_hidden * unit // config.width, 1) * multiple,
        )
        for multiple in MULTIPLES
    ]


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Of the line through log size over log width, by least squares."""
    x = [math.log(width) for width in widths]
    y = [math.log(max(size, 1e-30)) for size in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def _sizes(config: ModelConfig, optim: OptimConfig, seed: int) -> dict[str, list[float]]:
    """By part, before the first and after each step; means over layers."""
    model = Decoder.from_config(config, seed=seed)
    initialise_mup(model, optim)
    optimizer = build_optimizer(model, optim)
    set_learning_rate(optimizer, optim.lr)
    ids = torch.randint(NUM_IDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    modality = torch.arange(len(Modality)).repeat_interleave(LENGTH // len(Modality))
    step: dict[str, list[torch.Tensor]] = {"attention": [], "experts": [], "logits": []}
    for name, module in model.named_modules():
        part = name.rpartition(".")[-1]
        if part in step:
            module.register_forward_hook(
                lambda _, inputs, output, part=part: step[part].append(_size(output))
            )
    sizes: dict[str, list[float]] = {part: [] for part in step}
    for _ in range(STEPS + 1):
        logits = model.logits(model(ids, modality=modality.expand_as(ids)))
        step["logits"].append(logits.detach().abs().mean())
        for part, found in step.items():
            sizes[part].append(float(torch.stack(found).mean()))
            found.clear()
        optimizer.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return sizes


def _verdict(passed: bool, base: int) -> str:
    if passed:
        return "sizes do not grow with the width: a rate found at one holds at others"
    if base:
        return "sizes depend on the width though muP is on: a weight has the wrong rate or start"
    return "sizes grow with the width: tune optim.lr anew at each, or set optim.mup_base_width"


def _size(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Of an output, or of the first one: experts add the loss of their routers."""
    first = output[0] if isinstance(output, tuple) else output
    return first.detach().abs().mean()
