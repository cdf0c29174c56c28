"""What a plan says of a model is what the built and the spread model are."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.plan import _mix, plan
from mmpt.plan.layouts import check, cost, sensible, survey
from mmpt.plan.machines import MACHINES
from mmpt.plan.memory import kept_of_layer, memory
from mmpt.plan.timing import flops_of_rank, seconds
from mmpt.plan.traffic import Layout, held, messages
from mmpt.plan.workload import Workload
from mmpt.train.loss import score
from mmpt.train.optim import OptimConfig, build_optimizer
from mmpt.train.parallel import ParallelConfig, Ranks, _contexts
from mmpt.vocab import Modality

RECIPE = Path("examples/recipes/tiny.toml")
H100 = MACHINES["h100"]
ROWS, LENGTH = 8, 96


def run(model, autocast=False, rows=ROWS):
    """Forward on rows of all modalities in equal parts: hidden states and modalities."""
    ids = torch.arange(rows * LENGTH).view(rows, LENGTH) % 300
    modality = ids % 4
    position = torch.arange(LENGTH).expand(rows, LENGTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(ids, modality=modality, position=position, document=torch.zeros_like(ids))
    return hidden, ids, modality


def test_parameters_are_those_of_the_built_model(recipe):
    work, model = Workload.of(recipe), Decoder.from_config(recipe.model)
    assert work.num_parameters == model.num_parameters
    summary = work.summary()
    for modality in Modality:
        active = model.num_active_parameters(modality)
        assert summary["active parameters"][modality.name.lower()] == active


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_flops_are_those_that_a_counter_sees(recipe, recompute, cpu_attention):
    recipe = replace(recipe, parallel=ParallelConfig(recompute=recompute))
    model = Decoder.from_config(recipe.model).train()
    for layer in model.layers:
        layer.recompute = _contexts(recompute)
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        hidden, ids, modality = run(model)
        flat = hidden.flatten(0, 1)
        ones = torch.ones(len(flat))
        losses = score(
            flat, model.embedding, ids.flatten(), weights=ones, modality=modality.flatten()
        )
        losses.total.backward()
    recipe = replace(recipe, data=replace(recipe.data, rows=ROWS, length=LENGTH))
    expected = flops_of_rank(Workload.of(recipe), Layout(1, 1, 1, 1))
    # the counter has five products of attention's backward pass, of which one repeats the forward
    attention = 4 * recipe.model.width * LENGTH * ROWS * LENGTH * recipe.model.num_layers
    assert counter.get_total_flops() - attention / 2 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_kept_activations_are_those_that_autograd_keeps(recipe, precision, recompute):
    recipe = replace(recipe, precision=precision)
    kept = []
    width, hidden = recipe.model.width, recipe.model.expert_hidden
    shapes = {(width, 2 * hidden), (hidden, width), (width, 2 * width), (width, width)}
    for num_layers in (1, 2):
        model = Decoder.from_config(replace(recipe.model, num_layers=num_layers)).train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(tensor, own=own, seen=seen):
            storage = tensor.untyped_storage()
            matrix = tensor.ndim == 2 and tensor.dtype == torch.bfloat16
            cast = matrix and tuple(tensor.shape) in shapes
            if storage.data_ptr() not in own and not cast:
                seen[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        for layer in model.layers:
            layer.recompute = _contexts(recompute)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(model, autocast=precision == "bf16")
        kept.append(sum(size for size, _ in seen.values()))
    recipe = replace(recipe, data=replace(recipe.data, length=LENGTH))
    expected = kept_of_layer(Workload.of(recipe), Layout(1, 1, 1, 1), recompute)
    if recompute == "selective":  # whose caches hooks do not see
        assert kept[1] - kept[0] < expected * ROWS * LENGTH
    else:
        assert (kept[1] - kept[0]) / ROWS / LENGTH == pytest.approx(expected, rel=0.1)


@pytest.fixture
def pretended(monkeypatch):
    """Joins groups of ranks that are not there."""

    def join(count: int, config: ParallelConfig) -> Ranks:
        monkeypatch.setitem(os.environ, "WORLD_SIZE", str(count))
        distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        return Ranks(config, "cpu")

    yield join
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("sides", "count"),
    [
        ({}, 2),
        ({}, 16),
        ({"replicate": 4}, 64),
        ({"expert": 2}, 8),
        ({"tensor": 2}, 8),
        ({"expert": 2, "tensor": 2, "replicate": 2}, 32),
    ],
)
def test_a_rank_holds_what_the_spread_model_holds(recipe, pretended, sides, count, kind):
    parallel = ParallelConfig(**sides)
    recipe = replace(recipe, parallel=parallel, optim=OptimConfig(kind=kind))
    ranks = pretended(count, parallel)
    with torch.device("meta"):
        model = Decoder(recipe.model)
    model = ranks.spread(model).to_empty(device="cpu")
    work, layout = Workload.of(recipe), Layout.of(parallel, count)
    mine = {each.weight.name: each.mine for each in held(work, layout)}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        name = "layer." + name.split(".", 2)[2] if name.startswith("layers.") else name
        assert parameter.to_local().numel() == mine[name], name  # rank 0 has the largest part
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(model, recipe.optim)
    optimizer.step()
    state = sum(
        value.to_local().nbytes
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, DTensor)
    )
    expected = memory(work, layout)
    assert expected.optimizer == state
    assert expected.weights == sum(p.to_local().nbytes for p in model.parameters())


def test_layouts_are_those_that_the_engine_takes(recipe):
    work = Workload.of(recipe)
    for layout in sensible(work, 64, H100):
        assert layout.num_data * layout.tensor == 64
    with pytest.raises(UserError, match="num_kv_heads"):
        check(work, Layout(1, 2, 1, 4), 8)
    with pytest.raises(UserError, match=r"divide data\.rows = 64; use a multiple of 128"):
        check(work, Layout(1, 128, 1, 1), 128)


def test_70_billion_parameters_on_4096_gpus_are_planned_in_seconds(large):
    began = time.monotonic()
    work = Workload.of(large)
    assert 69e9 < work.num_parameters < 72e9
    found = survey(work, 4096, MACHINES["b200"])
    assert time.monotonic() - began < 5
    assert found.own is not None
    assert not found.own.fits
    assert found.best is not None
    assert found.best.recompute != "none"
    assert found.best.seconds.step == min(each.seconds.step for each in found.fitting)
    assert 0.2 < found.best.mfu < MACHINES["b200"].efficiency
    assert all(why and "\n" not in why for _, why in found.refused)


def test_costs_move_as_they_must(large):
    work, cards = Workload.of(large), replace(H100, memory=1e15)
    layouts = {
        name: Layout(*sides)
        for name, sides in {
            "sharded": (1, 512, 1, 1),
            "replicas": (64, 8, 1, 1),
            "tensor": (1, 64, 1, 8),
        }.items()
    }
    costs = {name: cost(work, each, cards, recompute="full") for name, each in layouts.items()}
    assert costs["replicas"].memory.weights > 60 * costs["sharded"].memory.weights
    assert costs["sharded"].seconds.exchanged == 0 < costs["tensor"].seconds.exchanged
    slow = replace(cards, network=cards.network / 10)
    for each in layouts.values():
        assert seconds(work, each, slow).weights > seconds(work, each, cards).weights
    lean = cost(work, layouts["sharded"], cards, recompute="full")
    rich = cost(work, layouts["sharded"], cards, recompute="none")
    assert lean.memory.peak < rich.memory.peak
    assert lean.seconds.compute > rich.seconds.compute


def test_8_billion_parameters_on_8_h100_are_near_what_is_reported(large):
    model = replace(
        large.model,
        vocab_size=128_256,
        width=4096,
        num_layers=32,
        num_heads=32,
        expert_hidden=14_336,
    )
    recipe = replace(large, model=model, data=replace(large.data, rows=16, length=8192))
    found = cost(Workload.of(recipe), Layout(1, 8, 1, 1), H100, recompute="selective").row()
    assert 5762 * 0.85 < found["tokens per second and rank"] < 6667 * 1.15  # torchtitan's


def test_one_rank_sends_nothing(recipe):
    assert not list(messages(Workload.of(recipe), Layout(1, 1, 1, 1)))


def test_the_command_prints_a_table_and_json(capsys):
    arguments = ["plan", str(RECIPE), "model.vocab_size=9000", "data.rows=16", "--gpus", "8"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "is the recipe's own" in table
    assert "fastest that fits: parallel." in table
    assert main([*arguments, "--json", "--device", "a100", "--mix", "text=3", "image=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["mix"] == {"text": 0.75, "image": 0.25, "video": 0, "speech": 0}
    assert found["machine"]["name"].startswith("A100")
    assert found["layouts"][0]["fits"]
    assert set(found["layouts"][0]["sent"]) >= {"all-gather", "reduce-scatter", "all-to-all"}
    assert found["recommended"][0].startswith("parallel.replicate=")


def test_without_gpus_only_the_model_is_described(capsys):
    assert main(["plan", str(RECIPE), "model.vocab_size=9000", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"model"}


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="choose from a100"):
        plan(RECIPE, ["model.vocab_size=9000"], gpus=8, device="h1000")
    with pytest.raises(UserError, match=r"give its size: model\.vocab_size"):
        plan(RECIPE, [f"vocabulary={tmp_path}/none.json"])
    with pytest.raises(UserError, match="MODALITY=SHARE"):
        _mix(["smell=1"])
    with pytest.raises(UserError, match="not all 0"):
        _mix(["text=0"])
