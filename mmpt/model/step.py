"""One more clean id of each row over a cache, with little but matrix products.

Decoding one id at a time, small models spend most of their time between the products: on sorting
ids by group, on masks, on copies of keys. Here are the same layers for exactly one id a row; a test
holds the two together. Models with options that this file does not know go through the decoder.

Legend: B rows, n rows of a group, D width, G key-value heads, Q queries of each, W head width,
E experts, C experts per id, F hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from mmpt.model.attention import Attention
from mmpt.model.bank import Bank
from mmpt.model.cache import KVCache, LayerCache
from mmpt.model.layer import Layer
from mmpt.model.moe import Experts
from mmpt.model.rotary import Rotary
from mmpt.model.transformer import Decoder

EPS = 1e-6  # of RMSNorm
MODEL_OPTIONS = {
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "expert_hidden",
    "rope_base",
    "tie_embeddings",
    "noisy_rank",
    "noise",
    "groups",
    "vocabulary",
}
GROUP_OPTIONS = {"modalities", "num_experts", "num_active", "router", "noisy"}
LONG = 8  # steps after which weights are packed; most headers are shorter
MOST_PACKED = 2**30  # bytes of weights, which packing doubles
LARGE = 2**18  # numbers of a weight that is worth it
SMALL = 2**21  # numbers in all experts of a group that are read as fast as some are found

Product = Callable[[torch.Tensor], torch.Tensor]


class Stepper:
    """The layers of a decoder, for one clean id of each row."""

    def __init__(self, model: Decoder) -> None:
        self._model, self._config, self._embedding = model, model.config, model.embedding
        exact = torch.promote_types(model.embedding.dtype, torch.float32)
        self._layers = self._read(num_rows=0)
        self._steps = 0
        self._norm = model.norm.scale.to(exact)
        self._groups: list[int] = model.groups[0].tolist()
        on_cpu = model.embedding.device.type == "cpu"
        self.attention_dtype = exact if on_cpu else model.embedding.dtype  # as in `attend`
        self._told: tuple[tuple[int, ...], list[tuple[int, torch.Tensor]]] = ((), [])

    @classmethod
    def of(cls, model: Decoder) -> "Stepper | None":
        """None where the decoder itself has to compute single ids, too."""
        groups = model.config.groups.values()
        known = _known(model.config, MODEL_OPTIONS) and all(
            _known(group, GROUP_OPTIONS) and group.router in ("hard", "token_choice")
            for group in groups
        )
        spread = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        spread |= any(getattr(m, "expert_group", None) is not None for m in model.modules())
        mixed = torch.is_autocast_enabled(model.embedding.device.type)
        return cls(model) if known and not (spread or mixed) else None

    def __call__(
        self,
        ids: torch.Tensor,
        media: Sequence[int],
        position: torch.Tensor,
        cache: KVCache,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states (B, D) after the final norm; the layers of `cache` keep the new keys.

        ids, position: int64 (B,). media: of each row, on the host. bias: (B, 1, 1, S) in
        `attention_dtype`, 0 where the row sees the slot (its own is the last), else -inf; None
        where all rows see all.
        """
        self._steps += 1
        if self._steps == LONG and self._worth_packing(len(ids)):
            self._layers = self._read(num_rows=len(ids))
        groups = self._sort(media, ids.device)
        x_BD = F.embedding(ids, self._embedding)
        rotary = Rotary.at(position[:, None], self._config, x_BD.dtype)
        cos, sin = torch.cat((rotary.cos,) * 2, -1), torch.cat((-rotary.sin, rotary.sin), -1)
        for layer, kept in zip(self._layers, cache.layers, strict=True):
            x_BD = self._attend(x_BD, layer, kept, cos, sin, bias)
            low_BD = _norm(x_BD, layer.expert_norm)
            if len(groups) == 1:
                x_BD = layer.groups[groups[0][0]].add(x_BD, low_BD)
                continue
            parts = [layer.groups[group].add(x_BD[rows], low_BD[rows]) for group, rows in groups]
            for (_, rows), part in zip(groups, parts, strict=True):
                x_BD = x_BD.index_copy(0, rows, part)
        return _norm(x_BD, self._norm)

    def _read(self, *, num_rows: int) -> list["_Layer"]:
        """num_rows: pack weights for so many rows at a time; 0: leave them as they are."""
        exact = torch.promote_types(self._embedding.dtype, torch.float32)
        return [_Layer.of(layer, exact, num_rows) for layer in self._model.layers]  # type: ignore[arg-type] # ModuleList forgets the class

    def _worth_packing(self, num_rows: int) -> bool:
        """On CPUs, few rows by large matrices take half the time or less with packed weights.

        One row in float32 reads the weights once, packed or not.
        """
        weight, mkldnn = self._embedding, torch.ops.mkldnn
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        low = weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()
        if not (low or (weight.dtype == torch.float32 and num_rows > 1)):
            return False
        size = sum(p.numel() for p in self._model.layers.parameters()) * weight.itemsize
        return size <= MOST_PACKED

    def _sort(self, media: Sequence[int], device: torch.device) -> list[tuple[int, torch.Tensor]]:
        """(group, its rows) of each group that has any; as the last time, when media are."""
        if self._told[0] != tuple(media):
            of_rows = torch.tensor([self._groups[medium] for medium in media])
            rows = [
                (g, (of_rows == g).nonzero()[:, 0].to(device)) for g in of_rows.unique().tolist()
            ]
            self._told = tuple(media), rows
        return self._told[1]

    def _attend(
        self,
        x_BD: torch.Tensor,
        layer: "_Layer",
        kept: LayerCache,
        cos: torch.Tensor,
        sin: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        y = layer.project_in(_norm(x_BD, layer.attention_norm))
        y_BGHW = y.view(len(y), -1, len(layer.head_scale) + 1, layer.head_scale.shape[1])
        turned = y_BGHW[:, :, :-1].to(cos.dtype)  # queries, and the key behind them
        turned = torch.rms_norm(turned, turned.shape[-1:], None, EPS) * layer.head_scale
        turned = turned.to(y.dtype)
        swapped = turned.roll(turned.shape[-1] // 2, -1)
        turned = torch.addcmul(turned * cos, swapped, sin).to(y.dtype)
        k, v = kept.push(turned[:, :, -1], y_BGHW[:, :, -1])
        q = turned[:, :, :-1]  # queries of a head stand where those of one id do otherwise
        out = F.scaled_dot_product_attention(
            *(part.to(self.attention_dtype) for part in (q, k, v)), attn_mask=bias
        )
        return x_BD + layer.project_out(out.reshape(x_BD.shape).to(y.dtype))


class _Hard(NamedTuple):
    """A group of one expert."""

    gate_up: Product  # D -> 2 F
    down: Product

    def add(self, x_nD: torch.Tensor, low_nD: torch.Tensor) -> torch.Tensor:
        """x, and what the experts make of its norm."""
        return x_nD + self.down(_inner(self.gate_up(low_nD)))


class _Choice(NamedTuple):
    """A group whose ids choose their experts, see `Experts`."""

    gate_up: torch.Tensor  # (E, D, 2 F)
    down: torch.Tensor  # (E, F, D)
    router: torch.Tensor
    balance: torch.Tensor
    num_active: int
    products: list[tuple[Product, Product]]  # those of each expert

    def add(self, x_nD: torch.Tensor, low_nD: torch.Tensor) -> torch.Tensor:
        """x, and what the experts make of its norm."""
        chosen_nC, gates_nC = self.route(low_nD)
        total_nD = torch.zeros_like(x_nD, dtype=gates_nC.dtype)
        if x_nD.device.type != "cpu" or self.gate_up.numel() <= SMALL:
            gates_nE = total_nD.new_zeros(len(x_nD), len(self.router[0]))
            total_nD = self.every(low_nD, gates_nE.scatter_(1, chosen_nC, gates_nC))
        else:
            for expert, rows, ranks in _by_expert(chosen_nC.tolist()):
                gate_up, down = self.products[expert]
                y = down(_inner(gate_up(low_nD[rows])))
                total_nD.index_add_(0, torch.tensor(rows), y * gates_nC[rows, ranks, None])
        return x_nD + total_nD.to(x_nD.dtype)

    def route(self, low_nD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's experts (n, C), and their gates."""
        scores_nE = torch.sigmoid(low_nD.to(self.router.dtype) @ self.router)
        chosen_nC = (scores_nE + self.balance).topk(self.num_active, dim=-1, sorted=False).indices
        return chosen_nC, scores_nE.gather(1, chosen_nC) * (2 / self.num_active)

    def every(self, low_nD: torch.Tensor, gates_nE: torch.Tensor) -> torch.Tensor:
        """All experts on all rows: no host sync, three products, and no copies of weights."""
        y_EnD = _inner(low_nD @ self.gate_up) @ self.down
        return torch.einsum("end,ne->nd", y_EnD.to(gates_nE.dtype), gates_nE)


class _Layer(NamedTuple):
    attention_norm: torch.Tensor
    project_in: Product
    head_scale: torch.Tensor  # (Q + 1, W): of QK-norms
    project_out: Product
    expert_norm: torch.Tensor
    groups: list[_Hard | _Choice]

    @classmethod
    def of(cls, layer: Layer, exact: torch.dtype, num_rows: int) -> "_Layer":
        attention: Attention = layer.attention
        assert attention.query_norm is not None  # as `Stepper.of` saw: qk_norm = head
        assert attention.key_norm is not None
        queries = attention.query_norm.scale.expand(attention.num_queries, -1)
        return cls(
            layer.attention_norm.scale.to(exact),
            _product(attention.project_in, num_rows),
            torch.cat((queries, attention.key_norm.scale[None])).to(exact),
            _product(attention.project_out, num_rows),
            layer.expert_norm.scale.to(exact),
            [_group(experts, exact, num_rows) for experts in layer.experts.experts()],
        )


def _group(experts: Experts, exact: torch.dtype, num_rows: int) -> _Hard | _Choice:
    bank: Bank = experts.bank
    gate_up = bank.gate_up.flatten(2)
    products = [
        (_product(first.T, num_rows), _product(second.T, num_rows))
        for first, second in zip(gate_up, bank.down, strict=True)
    ]
    if experts.router is None:
        return _Hard(*products[0])
    router, balance = experts.router.to(exact), experts.balance.to(exact)
    return _Choice(gate_up, bank.down, router, balance, experts.num_active, products)


def _product(weight: torch.Tensor, num_rows: int) -> Product:
    """Of rows (n, in) with a weight (out, in)."""
    if not num_rows or weight.numel() < LARGE:
        return partial(F.linear, weight=weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), num_rows)
    multiply = torch.ops.mkldnn._linear_pointwise  # what PyTorch's compiler packs weights for
    return lambda x: multiply(x, packed, None, "none", [], "")


def _norm(x_BD: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.rms_norm(x_BD.to(scale.dtype), scale.shape, scale, EPS).to(x_BD.dtype)


def _inner(x_2F: torch.Tensor) -> torch.Tensor:
    gate, up = x_2F.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _by_expert(chosen: list[list[int]]) -> list[tuple[int, list[int], list[int]]]:
    """(expert, rows, which of their choices it was)."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row, experts in enumerate(chosen):
        for rank, expert in enumerate(experts):
            rows, ranks = found.setdefault(expert, ([], []))
            rows.append(row)
            ranks.append(rank)
    return [(expert, rows, ranks) for expert, (rows, ranks) in found.items()]


def _known(config: Any, names: set[str]) -> bool:
    """Whether every option but those is as it is by default."""
    others = [f for f in fields(config) if f.name not in names]
    return all(f.default is not MISSING and getattr(config, f.name) == f.default for f in others)
