"""Options of models count in a plan as in the built model: experts of all kinds, attention."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpt.__main__ import main
from mmpt.model.transformer import Decoder
from mmpt.plan.measure import measure, planned_bytes, prepare
from mmpt.plan.memory import kept_of_layer, memory
from mmpt.plan.timing import flops_of_rank
from mmpt.plan.traffic import Layout
from mmpt.plan.workload import Workload
from mmpt.train.loss import score
from mmpt.train.parallel import ParallelConfig

ROWS, LENGTH = 8, 96
ALONE = Layout(1, 1, 1, 1)
CHOICE = {"router": "expert_choice", "causal": "auxiliary"}
OPTIONS = {
    "shared": ({}, {"text": {"shared_hidden": 40}, "speech": {"shared_hidden": 24}}),
    "identity": ({}, {"text": {"num_identity": 4}, "visual": {"num_identity": 1}}),
    "lent": ({"expert_share_every": 2}, {}),
    "gated": ({"gated_attention": True}, {}),
    "untied": ({"untied_attention": True, "tie_embeddings": False}, {}),
    "auxiliary": ({}, {"text": {**CHOICE, "num_active": 1}, "visual": CHOICE}),
    "all": (
        {"expert_share_every": 2, "gated_attention": True, "untied_attention": True},
        {"text": {"num_identity": 2, "shared_hidden": 40}, "visual": CHOICE},
    ),
}


@pytest.fixture(params=OPTIONS)
def optioned(request, recipe):
    """The small recipe with an option, and three layers."""
    of_model, of_groups = OPTIONS[request.param]
    groups = {
        name: replace(group, **of_groups.get(name, {}))
        for name, group in recipe.model.groups.items()
    }
    model = replace(recipe.model, num_layers=3, groups=groups, **of_model)
    return replace(recipe, model=model, data=replace(recipe.data, rows=ROWS, length=LENGTH))


def run(model, rows=ROWS):
    """Forward on rows of all modalities in equal parts: hidden states, ids and modalities."""
    ids = torch.arange(rows * LENGTH).view(rows, LENGTH) % 300
    position = torch.arange(LENGTH).expand(rows, LENGTH)
    hidden = model(ids, modality=ids % 4, position=position, document=torch.zeros_like(ids))
    return hidden, ids, ids % 4


def even(model):
    """Routers without a preference but by the ids' own vectors: loads are nearly even."""
    with torch.no_grad():
        for layers in model.routers().values():
            for router in layers:
                router -= router.mean(1, keepdim=True)
    return model


def test_parameters_are_those_of_the_built_model(optioned):
    work = Workload.of(optioned)
    assert work.num_parameters == Decoder.from_config(optioned.model).num_parameters


def test_flops_are_those_that_a_counter_sees(optioned, cpu_attention):
    model = even(Decoder.from_config(optioned.model)).train()
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        hidden, ids, modality = run(model)
        flat = hidden.flatten(0, 1)
        head = model.embedding if model.head is None else model.head
        ones = torch.ones(len(flat))
        score(flat, head, ids.flatten(), weights=ones, modality=modality.flatten()).total.backward()
    expected = flops_of_rank(Workload.of(optioned), ALONE)
    # the counter has five products of attention's backward pass, of which one repeats the forward
    attention = 4 * optioned.model.width * LENGTH * ROWS * LENGTH * optioned.model.num_layers
    assert counter.get_total_flops() - attention / 2 == pytest.approx(expected, rel=0.02)


def test_kept_activations_are_those_that_autograd_keeps(optioned):
    kept = []
    for num_layers in (1, 2):
        model = Decoder.from_config(replace(optioned.model, num_layers=num_layers)).train()
        seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
        tensors = []  # so that no storage takes the place of another

        def keep(tensor, seen=seen, tensors=tensors):
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(model)
        kept.append(sum(seen.values()))
    expected = kept_of_layer(Workload.of(optioned), ALONE, "none")
    assert (kept[1] - kept[0]) / ROWS / LENGTH == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("optioned", "sides"),
    [("all", {}), ("shared", {"tensor": 2})],
    indirect=["optioned"],
)
def test_bytes_are_exact_and_memory_is_near(optioned, tmp_path, sides):
    recipe = replace(prepare(optioned, tmp_path), parallel=ParallelConfig(**sides))
    found = measure(recipe, 2, tmp_path / "case", steps=1)
    work, layout = Workload.of(recipe, found.mix), Layout.of(recipe.parallel, 2)
    assert found.bytes == planned_bytes(work, layout)
    assert memory(work, layout).peak == pytest.approx(found.memory, rel=0.2)


def test_the_command_tells_rates_and_auxiliary_routers(capsys):
    moma = ["plan", "examples/recipes/moma-4t4i.toml", "model.vocab_size=65536"]
    assert main(moma) == 0
    told = capsys.readouterr().out
    assert "of a layer's weights an id meets: text 17." in told
    assert "parameters are of auxiliary routers, trained afterwards" in told
    assert "warning" not in told
    assert main([*moma, "model.groups.text.num_experts=16"]) == 0
    assert "warning: the share of a layer's weights that an id meets is" in capsys.readouterr().out
