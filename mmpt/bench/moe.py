"""`mmpt bench moe`: one layer of experts, forward and backward, beside OLMoE's and the peak.

Weights, ids and experts chosen are the same on both sides. Gates differ by design (ours are
sigmoids, OLMoE's the softmax of the chosen scores): outputs and gradients are shown equal with our
gates on both sides, and then each is timed with its own router. Where the medium chooses the
expert, the peer is told the choice, and ours sorts the ids by medium each time, which a model does
once for all its layers.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mmpt.bench.harness import Row, best_seconds, compare, run_rows
from mmpt.bench.olmoe import shape
from mmpt.config import UserError
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.dispatch import Dispatch
from mmpt.model.moe import ModalityMoE
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product is the peak
FAR = {"fp32": 1e-5, "bf16": 2e-2}  # relative distance of outputs and gradients
SAME = 0.99  # of the choices; products of another order may turn a near tie
MOST_COPIED = 2**31  # bytes of weights that an implementation of the peer may copy
SHARES = {Modality.TEXT: 0.5, Modality.IMAGE: 0.35, Modality.SPEECH: 0.15}  # of a mixed batch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a layer, and how many ids meet it at once."""

    width: int
    hidden: int
    experts: int
    active: int
    ids: int

    @property
    def flops(self) -> int:
        """Of the experts' matrix products, forward and backward."""
        return 3 * 2 * self.ids * self.active * 3 * self.width * self.hidden

    def __str__(self) -> str:
        return (
            f"{self.active} of {self.experts} experts {self.width} x {self.hidden}, {self.ids} ids"
        )


CHOICES = (
    Shape(width=1024, hidden=512, experts=8, active=2, ids=4096),
    Shape(width=512, hidden=256, experts=64, active=8, ids=2048),  # as fine as OLMoE's
    Shape(width=256, hidden=128, experts=16, active=4, ids=1024),
)
MEDIA = (Shape(width=1024, hidden=1024, experts=3, active=1, ids=4096),)


def moe(device: str) -> list[Row]:
    """All rows, on a device."""
    return run_rows(_rows(device))


def _rows(device: str) -> Iterator[Row]:
    for precision in DTYPES:
        for each in CHOICES:
            yield from _pair_rows(f"token choice, {each}", Choice(each, device, precision))
        for each in MEDIA:
            yield from _pair_rows(f"by medium, {each}", ByMedium(each, device, precision))


class Pair:
    """Our layer and OLMoE's experts with the same weights, and a batch of ids for both."""

    def __init__(self, shape: Shape, config: ModelConfig, device: str, precision: str) -> None:
        self.shape, self.device, self.precision = shape, device, precision
        dtype = DTYPES[precision]
        layer = Decoder.from_config(config).layers[0].experts.to(device, dtype)  # type: ignore[union-attr] # ModuleList forgets the class
        assert isinstance(layer, ModalityMoE)
        self.config, self.layer = config, layer
        self.peer = _block(shape).to(device, dtype)
        self._copy_weights()
        generator = torch.Generator().manual_seed(0)
        x, gradient = torch.randn(2, 1, shape.ids, shape.width, generator=generator).to(
            device, dtype
        )
        self.x, self.gradient = x.requires_grad_(), gradient
        self.setting = ""

    def ours(self) -> Tensor:
        """(1, ids, width)."""
        raise NotImplementedError

    def theirs(self) -> Tensor:
        """With its own gates."""
        raise NotImplementedError

    def theirs_by_our_gates(self) -> Tensor:
        """What must be equal to ours."""
        raise NotImplementedError

    @torch.no_grad()
    def _copy_weights(self) -> None:
        banks = [experts.bank for experts in self.layer.experts()]
        gate_up, down = (torch.cat([getattr(b, n) for b in banks]) for n in ("gate_up", "down"))
        self.peer.experts.gate_up_proj.copy_(rearrange(gate_up, "e d two f -> e (two f) d"))
        self.peer.experts.down_proj.copy_(down.mT)

    def use(self, setting: str) -> None:
        """An implementation of the peer's experts."""
        self.peer.experts.config._experts_implementation = self.setting = setting

    def run(self, forward: Callable[[], Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """The output, and the gradients of the ids and the weights."""
        out = forward()
        return [out, *torch.autograd.grad(out, [self.x, *weights], self.gradient)]

    def run_ours(self) -> list[Tensor]:
        return self.run(self.ours, list(self.layer.parameters()))

    def run_theirs(self) -> list[Tensor]:
        used = self.peer if isinstance(self, Choice) else self.peer.experts
        return self.run(self.theirs, list(used.parameters()))


class Choice(Pair):
    """Ids choose their experts."""

    def __init__(self, each: Shape, device: str, precision: str) -> None:
        config = shape(
            experts=each.experts,
            active=each.active,
            width=each.width,
            expert_hidden=each.hidden,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
        )
        super().__init__(each, config, device, precision)
        [experts] = self.layer.experts()
        assert experts.router is not None
        self._router: Tensor = experts.router
        with torch.no_grad():
            self.peer.gate.weight.copy_(self._router.T)
        self._group = torch.zeros(1, each.ids, dtype=torch.int64, device=device)

    def ours(self) -> Tensor:
        return self.layer(self.x, Dispatch.plan(self._group, self.config))[0]

    def theirs(self) -> Tensor:
        return self.peer(self.x)

    def theirs_by_our_gates(self) -> Tensor:
        x, num = self.x[0], self.shape.active
        scores = torch.sigmoid(x.float() @ self._router.float())
        gates, chosen = scores.topk(num, dim=-1)
        same = (chosen.sort().values == self.peer.gate(x)[2].sort().values).double().mean()
        if same < SAME:
            raise RuntimeError(f"{same:.1%} of the chosen experts are the peer's")
        return self.peer.experts(x, chosen, (gates * (2 / num)).to(x.dtype))[None]


class ByMedium(Pair):
    """Three groups of one expert each, and a batch of three media."""

    def __init__(self, each: Shape, device: str, precision: str) -> None:
        media = (("text",), ("image", "video"), ("speech",))
        config = ModelConfig(
            vocab_size=1,
            width=each.width,
            expert_hidden=each.hidden,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            groups={names[0]: GroupConfig(modalities=names) for names in media},
        )
        super().__init__(each, config, device, precision)
        counts = [round(share * each.ids) for share in SHARES.values()]
        counts[0] += each.ids - sum(counts)
        group = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        shuffle = torch.randperm(each.ids, generator=torch.Generator().manual_seed(1))
        self._group = group[shuffle][None].to(device)
        self._gates = torch.ones(each.ids, 1, dtype=self.x.dtype, device=device)

    def ours(self) -> Tensor:
        return self.layer(self.x, Dispatch.plan(self._group, self.config))[0]

    def theirs(self) -> Tensor:
        return self.peer.experts(self.x[0], self._group.T, self._gates)[None]

    def theirs_by_our_gates(self) -> Tensor:
        return self.theirs()


def _block(shape: Shape) -> Any:
    try:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    except ImportError:
        raise UserError("this needs transformers: pip install 'mmpt[eval]'") from None
    return OlmoeSparseMoeBlock(
        OlmoeConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_experts=shape.experts,
            num_experts_per_tok=shape.active,
            norm_topk_prob=True,
        )
    )


def use_fastest(pair: Pair) -> None:
    """Of all implementations that the peer has, those that run here, one after another."""
    seconds: dict[str, float] = {}
    for setting in _settings(pair.shape, DTYPES[pair.precision].itemsize):
        pair.use(setting)
        try:
            pair.run_theirs()
        except (ImportError, RuntimeError, ValueError) as error:
            log.info("%s experts do not run here: %s", setting, str(error).split("\n")[0])
            continue
        seconds[setting] = best_seconds(pair.run_theirs, device=pair.device)[0]
    pair.use(min(seconds, key=lambda setting: seconds[setting]))


def _settings(shape: Shape, itemsize: int) -> list[str]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    copied = shape.ids * shape.active * 3 * shape.width * shape.hidden * itemsize
    if copied > MOST_COPIED:  # one matrix for each id and choice
        log.info("batched_mm experts are left out: they copy %.0f GB", copied / 1e9)
        names.remove("batched_mm")
    return names


def show_equal(pair: Pair) -> float:
    """Outputs and gradients are the peer's; by how much they differ at most."""
    banks = [experts.bank for experts in pair.layer.experts()]
    ours = pair.run(pair.ours, [weight for bank in banks for weight in (bank.gate_up, bank.down)])
    ours[2:] = [torch.cat(ours[2::2]), torch.cat(ours[3::2])]
    experts = pair.peer.experts
    theirs = pair.run(pair.theirs_by_our_gates, [experts.gate_up_proj, experts.down_proj])
    theirs[2] = rearrange(theirs[2], "e (two f) d -> e d two f", two=2)
    theirs[3] = theirs[3].mT
    names = ("output", "gradient of ids", "gradient of gate_up", "gradient of down")
    far = 0.0
    for name, mine, other in zip(names, ours, theirs, strict=True):
        mine, other = mine.detach().float(), other.detach().float()
        apart = float((mine - other).norm() / other.norm())
        if apart > FAR[pair.precision]:
            raise RuntimeError(f"the {name} differs from the peer's by {apart:.2g}")
        far = max(far, apart)
    return far


def _pair_rows(case: str, pair: Pair) -> Iterator[Row]:
    """Beside the peer, and beside the peak."""
    use_fastest(pair)
    show_equal(pair)
    result = compare(pair.run_ours, pair.run_theirs, device=pair.device)
    row = partial(Row, device=pair.device, dtype=pair.precision)
    yield row(
        case=case,
        unit="ms",
        ours=result.ours * 1e3,
        peer=result.peer * 1e3,
        peer_name=f"transformers OLMoE, {pair.setting}",
        ratio=result.ratio,
        low=result.low,
        high=result.high,
    )
    side = SIDE[pair.device.split(":")[0]]
    left, right = torch.randn(2, side, side, device=pair.device).to(pair.x.dtype)
    result = compare(pair.run_ours, lambda: left @ right, device=pair.device)
    scale = pair.shape.flops / (2 * side**3)  # matrix products in a layer
    yield row(
        case=case,
        unit="GFLOP/s",
        ours=pair.shape.flops / result.ours / 1e9,
        peer=2 * side**3 / result.peer / 1e9,
        peer_name="peak",
        ratio=result.ratio * scale,
        low=result.low * scale,
        high=result.high * scale,
    )
