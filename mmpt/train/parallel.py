"""How the processes of a training share a model: FSDP2, experts, tensors.

The ranks form a grid of four sides, replicate x outer x expert x tensor, the last one fastest:

- Ranks that differ in `tensor` read the same rows and share heads and hidden widths.
- All others read rows of their own. Ranks that differ in `outer` or `expert` each keep a part of
  every weight (FSDP2); replicas of them sum their gradients (HSDP).
- Ranks that differ in `expert` have different experts of each group with several of them, and send
  each other the ids that these serve. A group of one expert is kept as other weights are.

Gradients are summed, not averaged: the loss is divided by the weight of all ranks' ids beforehand,
so that weights which see the ids of all ranks (experts) and of one (the others) need no correction.
"""

import os
import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mmpt.config import UserError
from mmpt.data.order import mix_keys
from mmpt.model.bank import Bank
from mmpt.model.collectives import local
from mmpt.model.config import ModelConfig
from mmpt.model.layer import Layer
from mmpt.model.moe import recomputing
from mmpt.model.transformer import Decoder
from mmpt.process import pick_device

SIDES = ("replicate", "outer", "expert", "tensor")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The sides of the grid that are not 1; the rest of the processes shard the weights."""

    replicate: int = 1  # copies of the sharded model
    expert: int = 1  # ranks that have different experts
    tensor: int = 1  # ranks that share heads and hidden widths
    reshard: bool = True  # free gathered weights after a layer's forward pass
    recompute: Literal["none", "selective", "full"] = "none"  # activations kept: all, products, few
    compile: bool = False  # the attention of each layer, on CUDA

    def __post_init__(self) -> None:
        for name in ("replicate", "expert", "tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name} = {getattr(self, name)}; use at least 1")

    def grid(self, count: int) -> tuple[int, int, int, int]:
        """The sides of the grid for so many processes; UserError where it does not come out."""
        unit = self.replicate * self.expert * self.tensor
        if count % unit:
            raise UserError(
                f"{count} processes are no multiple of parallel.replicate x expert x tensor = "
                f"{self.replicate} x {self.expert} x {self.tensor} = {unit}; start {unit} or a "
                "multiple"
            )
        return self.replicate, count // unit, self.expert, self.tensor

    def check(self, model: ModelConfig, count: int) -> None:
        """Refuse what the model cannot be divided by, before anything is read."""
        _, outer, expert, tensor = self.grid(count)
        for name, size in (
            ("num_kv_heads", model.num_kv_heads),
            ("expert_hidden", model.expert_hidden),
        ):
            if size % tensor:
                raise UserError(f"parallel.tensor = {tensor} does not divide model.{name} = {size}")
        if tensor > 1 and (undivided := model.undivided_attention):
            raise UserError(
                f"model.{undivided} is not divided over tensors; use parallel.tensor = 1, not "
                f"{tensor}"
            )
        for name, group in model.groups.items():
            if group.shared_hidden % tensor:
                raise UserError(
                    f"parallel.tensor = {tensor} does not divide shared_hidden = "
                    f"{group.shared_hidden} of group {name}"
                )
            if group.num_experts > 1 and group.num_experts % expert:
                raise UserError(
                    f"parallel.expert = {expert} does not divide the {group.num_experts} experts "
                    f"of group {name}"
                )
        spread = {"tensor": (tensor, outer * expert), "expert": (expert, outer)}
        for name, (size, parts) in spread.items():
            if size > 1 and (model.width % parts or model.expert_hidden // tensor % parts):
                raise UserError(
                    f"with parallel.{name} = {size}, {parts} ranks divide model.width = "
                    f"{model.width} and expert_hidden = {model.expert_hidden}, which does not come "
                    f"out; use widths that are multiples of {parts}"
                )


class Ranks:
    """This process among those of a training; without a launcher the only one.

    data_rank, num_data: which rows it reads, of how many shares.
    """

    def __init__(self, config: ParallelConfig, device: str = "auto") -> None:
        self.config, self.device = config, pick_device(device)
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.data_rank, self.num_data = 0, 1
        grid = config.grid(self.count)
        self.mesh: DeviceMesh | None = None
        self._opened = False
        if self.count == 1:
            return
        if not distributed.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            _join("nccl" if self.device.type == "cuda" else "gloo")
            self._opened = True
        self.rank = distributed.get_rank()
        self.mesh = init_device_mesh(self.device.type, grid, mesh_dim_names=SIDES)
        self.data_rank, self.num_data = self.rank // config.tensor, self.count // config.tensor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that slices of flattened sides will change
            self._shard = self.mesh["outer", "expert"]._flatten("shard")
            self._data = self.mesh["replicate", "outer", "expert"]._flatten("data").get_group()

    def close(self) -> None:
        """Leave the group of processes, where it was joined here."""
        if self._opened:
            distributed.destroy_process_group()
            self._opened = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def first(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that read different rows."""
        if self.mesh is not None:
            values = values.to(self.device).clone()
            distributed.all_reduce(values, group=self._data)
        return values

    def generators(self, key: int, rows: int) -> list[torch.Generator]:
        """One for each of this rank's rows of a batch, by its number among those of all ranks."""
        numbers = range(self.data_rank, rows * self.num_data, self.num_data)
        return [torch.Generator().manual_seed(mix_keys(key, number) >> 1) for number in numbers]

    def sum_loads(self, model: Decoder) -> None:
        """Add up what the experts counted on all ranks."""
        if self.mesh is not None:
            model.sum_loads(self._data)

    def spread(self, model: Decoder) -> Decoder:
        """Give this rank its part of every weight; in place, also on the meta device."""
        self.config.check(model.config, self.count)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            layer.recompute = _contexts(self.config.recompute)
            if self.config.compile:
                layer.attention.compile(fullgraph=True)
        if self.mesh is None:
            return model.to(self.device)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            self._divide(layer, lent=model.config.expert_share_every > 1)
            self._shard_module(layer, reshard=self.config.reshard)
        self._shard_module(model, reshard=False)  # the head is needed right after it
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    module.register_buffer(
                        name,
                        buffer.to(self.device),
                        persistent=name not in module._non_persistent_buffers_set,
                    )
        return model

    def _divide(self, layer: Layer, *, lent: bool) -> None:
        """Heads and hidden widths over `tensor`, experts over `expert`."""
        assert self.mesh is not None
        attention = layer.attention
        if self.config.tensor > 1:
            tensor = self.mesh["tensor"]
            attention.tensor_group = tensor.get_group()
            _distribute(attention, "project_in", tensor, Shard(0))
            _distribute(attention, "project_out", tensor, Shard(1))
            for low_rank, name, side in (
                (attention.noisy_in, "up", Shard(0)),
                (attention.noisy_out, "down", Shard(1)),
            ):
                if low_rank is not None:
                    low_rank.tensor_group = tensor.get_group()
                    _distribute(low_rank, name, tensor, side)
        for experts in layer.experts.experts():
            apart = self.config.expert > 1 and experts.num_experts > 1
            for bank in experts.banks():
                self._divide_bank(bank, apart=apart and bank is not experts.shared, lent=lent)
            layer.experts.always |= apart or lent  # its bank is gathered by all ranks at once
            if apart:
                experts.expert_group = self.mesh["expert"].get_group()

    def _divide_bank(self, bank: Bank, *, apart: bool, lent: bool) -> None:
        """apart: experts over `expert`. lent: other layers use it, too, so it is kept by itself."""
        assert self.mesh is not None
        sides = {"expert": (Shard(0), Shard(0))} if apart else {}
        if self.config.tensor > 1:
            sides["tensor"] = (Shard(3), Shard(1))
            bank.tensor_group = self.mesh["tensor"].get_group()
        if sides:
            mesh = self.mesh[tuple(sides)]
            gate_up, down = zip(*sides.values(), strict=True)
            _distribute(bank, "gate_up", mesh, *gate_up)
            _distribute(bank, "down", mesh, *down)
        if apart or lent:
            over = "outer" if apart else "shard"
            self._shard_module(bank, over=over, reshard=self.config.reshard)

    def _shard_module(self, module: nn.Module, *, reshard: bool, over: str = "shard") -> None:
        assert self.mesh is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copies = self.config.replicate > 1
            mesh = self.mesh["replicate", over] if copies else self.mesh[over]
        side = partial(_free_side, count=mesh.shape[-1])
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, shard_placement_fn=side)


def _join(backend: str) -> None:
    """The group of processes that the launcher started."""
    store, rank, count = next(rendezvous("env://"))
    # the store outlives a restart of the processes, with addresses of those that are gone
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"attempt-{attempt}", store)  # type: ignore # torch exports it
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together, wherever their parts are; equal on all ranks."""
    parts: dict[tuple[ProcessGroup, ...], list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups, mine = (), parameter.grad
            if isinstance(mine, DTensor):
                sides = enumerate(mine.placements)
                groups = tuple(mine.device_mesh.get_group(n) for n, p in sides if p.is_shard())
                mine = mine.to_local()
            parts.setdefault(groups, []).append(mine)
    total = torch.zeros(())
    for groups, gradients in parts.items():
        square = nn.utils.get_total_norm(gradients).double().square()
        for group in groups:
            distributed.all_reduce(square, group=group)
        total = total.to(square) + square
    return total.sqrt()


def gradient_norms(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """(n,): the norm of each gradient, 0 where there is none; equal on all ranks.

    All of the parameters are spread alike.
    """
    squares = torch.zeros(len(parameters), dtype=torch.float64, device=parameters[0].device)
    for number, parameter in enumerate(parameters):
        if parameter.grad is not None:
            squares[number] = local(parameter.grad).double().square().sum()
    first = parameters[0]
    if isinstance(first, DTensor):
        for side, placement in enumerate(first.placements):
            if placement.is_shard():
                distributed.all_reduce(squares, group=first.device_mesh.get_group(side))
    return squares.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """The gradients' norm before clipping; they are scaled down to `limit` unless it is 0."""
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit else None
    mine = [
        p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        for p in parameters
        if p.grad is not None
    ]
    if factor is not None:
        for gradient in mine:
            gradient.mul_(factor.to(gradient))
    return norm


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, *sides: Shard) -> None:
    weight = getattr(module, name)
    spread = distribute_tensor(weight.detach(), mesh, list(sides), src_data_rank=None)
    setattr(module, name, nn.Parameter(spread, requires_grad=weight.requires_grad))


def free_side(shape: Sequence[int], taken: Container[int], count: int) -> int:
    """The side of a weight that `count` ranks divide, of those that experts and tensors leave.

    It is side 0, which need not come out even, unless much of it would be padding (2 experts on 64
    ranks) and another side comes out even.
    """
    free = [side for side in range(len(shape)) if side not in taken]
    padded = -(-shape[0] // count) * count
    if free[0] or 8 * padded <= 9 * shape[0]:
        return free[0]
    return next((side for side in free if shape[side] % count == 0), 0)


def _free_side(weight: nn.Parameter, count: int) -> Shard:
    sides = weight.placements if isinstance(weight, DTensor) else ()
    taken = {side.dim for side in sides if isinstance(side, Shard)}
    return Shard(free_side(weight.shape, taken, count))


def _contexts(kind: str) -> Any:
    """What `torch.utils.checkpoint` calls for the contexts of a pass and of its repetition."""
    if kind == "none":
        return None
    if kind == "full":
        return lambda: (nullcontext(), recomputing())

    def selective() -> tuple[Any, Any]:
        forward, again = create_selective_checkpoint_contexts(_keep_products)
        return forward, _repeating(again)

    return selective


@contextmanager
def _repeating(kept: Any) -> Iterator[None]:
    with kept, recomputing():
        yield


def _keep_products(context: Any, function: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    # matrix products and attention cost the most; the rest is cheap to do again
    aten = torch.ops.aten
    kept = (
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
    )
    keep = function in kept
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
