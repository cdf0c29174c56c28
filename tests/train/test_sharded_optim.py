"""Two ranks, each with its shards, take the steps that one process takes; and their states fit."""

import multiprocessing
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mmpt.model.transformer import Decoder
from mmpt.train.ema import Average
from mmpt.train.optim import OptimConfig, build_optimizer

MUON = OptimConfig(kind="muon", lr=0.02)


def take_steps(model: Decoder, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps along random gradients that are the same for any number of ranks."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                mesh, places = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, mesh, places, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()


def state_of(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"optimizer": get_optimizer_state_dict(model, optimizer)}


def _one_rank(rank: int, folder: Path, config: Any) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = Decoder.from_config(config, seed=0)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = build_optimizer(model, MUON)
    take_steps(model, optimizer, range(2))
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "state")
    average, hidden = Average(model, 0.5), []
    half = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    take_steps(model, optimizer, range(2, 3))
    average.update(0)
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    ids, modality = torch.arange(6)[None], torch.zeros(1, 6, dtype=torch.long)
    with torch.no_grad():
        for block in (nullcontext(), average.swapped(), nullcontext()):
            with block:
                hidden.append(model(ids, modality=modality))
    if rank == 0:
        save_file(half, folder / "half.safetensors")
        save_file(whole, folder / "whole.safetensors")
        save_file(dict(zip("abc", hidden, strict=True)), folder / "hidden.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def make_ranks(tmp_path_factory):
    """The folder that two ranks wrote; they run once."""
    made: list[Path] = []

    def make(config):
        if not made:
            folder = tmp_path_factory.mktemp("ranks")
            context = multiprocessing.get_context("fork")
            ranks = [context.Process(target=_one_rank, args=(r, folder, config)) for r in range(2)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(60)
            assert [process.exitcode for process in ranks] == [0, 0]
            made.append(folder)
        return made[0]

    return make


def test_a_sharded_step_of_muon_equals_a_whole_one(make_ranks, config, model):
    # 2 experts are one a rank; the speech group's only one leaves a rank with none
    optimizer = build_optimizer(model, MUON)
    take_steps(model, optimizer, range(3))
    sharded = load_file(make_ranks(config) / "whole.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_what_ranks_saved_goes_on_in_one_process(make_ranks, config, model):
    folder = make_ranks(config)
    model.load_state_dict(load_file(folder / "half.safetensors"), strict=False)
    optimizer = build_optimizer(model, MUON)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "state", no_dist=True)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    take_steps(model, optimizer, range(2, 3))
    sharded = load_file(folder / "whole.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_a_sharded_average_is_used_inside_of_the_block_only(make_ranks, config, model):
    folder = make_ranks(config)
    found = load_file(folder / "hidden.safetensors")
    assert torch.equal(found["a"], found["c"])
    half, whole = (load_file(folder / f"{name}.safetensors") for name in ("half", "whole"))
    mean = {name: 0.1 * half[name] + 0.9 * whole[name] for name in half}
    ids, modality = torch.arange(6)[None], torch.zeros(1, 6, dtype=torch.long)
    for name, weights in (("a", whole), ("b", mean)):
        model.load_state_dict(weights, strict=False)
        torch.testing.assert_close(model(ids, modality=modality), found[name])
