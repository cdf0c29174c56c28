import itertools
from dataclasses import replace

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.train.optim import (
    OptimConfig,
    build_optimizer,
    decays,
    initialise_mup,
    is_matrix,
    learning_rate,
    matrices_of,
    set_learning_rate,
)
from mmpt.train.pretrain import train


def rates(**options):
    config = OptimConfig(lr=1.0, warmup=10, **options)
    return [learning_rate(step, 100, config) for step in range(100)]


def test_wsd_rises_stays_and_falls():
    found = rates(schedule="wsd", decay=0.2, final=0.1)
    assert found[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert set(found[9:81]) == {1.0}
    assert found[90] == pytest.approx(0.55)
    assert found[99] == pytest.approx(0.1 + 0.9 / 20)
    assert all(later < earlier for earlier, later in itertools.pairwise(found[80:]))


def test_cosine_ends_at_the_final_rate():
    found = rates(schedule="cosine", final=0.1)
    assert found[10] == 1.0
    assert found[55] == pytest.approx(0.55)
    assert found[99] == pytest.approx(0.1, abs=0.001)


def test_constant_stays():
    assert set(rates(schedule="constant")[9:]) == {1.0}


def test_power_falls_from_where_it_meets_the_rate():
    found = rates(schedule="power", hold=20, decay=0.2, final=0.1)
    assert set(found[9:20]) == {1.0}
    assert found[59] == pytest.approx(3**-0.51)
    assert found[90] == pytest.approx((91 / 20) ** -0.51 / 2)
    assert found[99] == 0.1
    # until its tail it does not know how long the run is
    longer = OptimConfig(lr=1.0, warmup=10, schedule="power", hold=20)
    assert [learning_rate(step, 1000, longer) for step in range(80)] == found[:80]


def test_muon_moves_hidden_matrices_and_adam_all_else(model):
    model.add_noisy_groups()
    names = {name for name, p in model.named_parameters() if is_matrix(name, p)}
    leaves = {name.rpartition(".")[-1] for name in names}
    assert leaves == {"project_in", "project_out", "gate_up", "down"}
    assert "layers.0.experts.groups.noisy_visual.bank.down" in names
    assert not any("noisy_in" in name or "noisy_out" in name for name in names)
    optimizer = build_optimizer(model, OptimConfig(kind="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        keys = {"mean"} if name in names else {"mean", "square", "step"}
        assert set(optimizer.state[parameter]) == keys


def test_parameters_that_hold_several_maps_are_told_apart(model):
    def parts_of(name):
        name = f"layers.0.{name}"
        matrices, parameter = matrices_of(model, name), model.get_parameter(name)
        parts = matrices.divide(parameter)
        assert torch.equal(matrices.join(parts), parameter)
        return [tuple(part.shape) for part in parts], matrices.stacked

    assert parts_of("attention.project_in") == ([(16, 16), (8, 16), (8, 16)], False)  # q, k, v
    assert parts_of("attention.project_out") == ([(16, 16)], False)
    assert parts_of("experts.groups.text.bank.gate_up") == ([(2, 16, 24)] * 2, True)
    assert parts_of("experts.groups.text.bank.down") == ([(2, 24, 16)], True)


def test_untied_projections_are_stacks_of_maps(config):
    model = Decoder.from_config(replace(config, untied_attention=True))
    for name, expected in {
        "in": [(3, 16, 16), (3, 8, 16), (3, 8, 16)],
        "out": [(3, 16, 16)],
    }.items():
        name = f"layers.0.attention.project_{name}"
        matrices, weight = matrices_of(model, name), model.get_parameter(name)
        parts = matrices.divide(weight)
        assert [tuple(part.shape) for part in parts] == expected
        assert matrices.stacked
        assert torch.equal(matrices.join(parts), weight)
        one = matrices_of(Decoder.from_config(config), name)
        assert all(map(torch.equal, one.divide(weight[1]), (part[1] for part in parts)))


def test_keys_and_values_of_several_heads_are_told_apart(config):
    model = Decoder.from_config(replace(config, width=32, num_heads=4, num_kv_heads=2))
    weight = model.get_parameter("layers.0.attention.project_in")
    matrices = matrices_of(model, "layers.0.attention.project_in")
    numbered = torch.arange(len(weight))[:, None].expand_as(weight)
    queries, keys, values = (part[::8, 0].tolist() for part in matrices.divide(numbered))
    assert (queries, keys, values) == ([0, 8, 32, 40], [16, 48], [24, 56])  # heads of 8
    assert torch.equal(matrices.join(matrices.divide(weight)), weight)


@pytest.mark.parametrize(("kind", "matrix"), [("adamw", 1 / 4), ("muon", 1 / 2)])
def test_mup_scales_rates_by_what_the_width_sums(model, kind, matrix):
    optimizer = build_optimizer(model, OptimConfig(kind=kind, mup_base_width=4))
    set_learning_rate(optimizer, 1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rate = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {
        names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert rate["embedding"] == rate["layers.0.attention_norm.scale"] == 1.0
    assert rate["norm.scale"] == rate["layers.0.experts.groups.text.router"] == 1 / 4
    assert rate["layers.0.attention.project_in"] == rate["layers.1.experts.groups.text.bank.down"]
    assert rate["layers.0.attention.project_in"] == matrix
    assert decay["layers.0.attention.project_in"] * matrix == pytest.approx(0.1)


def test_mup_changes_the_first_weights_of_what_is_read_out(model, config):
    initialise_mup(model, OptimConfig())
    plain = Decoder.from_config(config, seed=0)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    initialise_mup(model, OptimConfig(mup_base_width=4))
    ids, modality = torch.arange(5)[None], torch.zeros(1, 5, dtype=torch.long)
    model.layers, plain.layers = torch.nn.ModuleList(), torch.nn.ModuleList()
    ours, theirs = (m.logits(m(ids, modality=modality)) for m in (model, plain))
    torch.testing.assert_close(ours, theirs / 4)


def test_norms_embeddings_and_vectors_do_not_decay(model):
    decayed = {name for name, p in model.named_parameters() if decays(name, p)}
    assert "layers.0.attention.project_in" in decayed
    assert "layers.0.experts.groups.text.bank.gate_up" in decayed
    assert "embedding" not in decayed
    assert not any("norm" in name for name in decayed)


def test_frozen_parameters_are_left_out(model):
    model.embedding.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.embedding) not in trained
    assert len(trained) == len(list(model.parameters())) - 1
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"decay": 1.5}, {"warmup": -1}, {"hold": -1}, {"mup_base_width": -1}]
)
def test_values_without_sense_are_refused(options):
    with pytest.raises(UserError):
        OptimConfig(**options)


def test_a_run_of_muon_and_mup_resumes_bit_equal(tmp_path, another, vocabulary, tensors_equal):
    optim = OptimConfig(kind="muon", warmup=2, schedule="power", mup_base_width=8)
    recipe = another(optim=optim, steps=6, checkpoint_every=3)

    def kill(metrics):
        if metrics["step"] == 5:
            raise ZeroDivisionError

    def run(folder, on_step=None):
        options = {"vocabulary": vocabulary, "progress": False, "on_step": on_step}
        return Decoder.load(train(recipe, folder, **options).checkpoint).state_dict()

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "killed", kill)
    assert tensors_equal(run(tmp_path / "killed"), run(tmp_path / "whole"))
