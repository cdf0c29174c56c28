"""Many experts out of one compute what it computed, and learn apart."""

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.config import GroupConfig
from mmpt.model.transformer import Decoder
from mmpt.model.upcycle import SCATTER, expand, upcycle, upcycle_config

EXPERTS = {"text": 4, "visual": 2, "speech": 3}


@pytest.fixture
def dense(make_model):
    return make_model("hard", noisy=False).eval()


def scores(model, rows, run):
    with torch.no_grad():
        return model.logits(run(model, rows))


@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_upcycling_keeps_the_function(dense, make_rows, run, active, dtype):
    dense, rows = dense.to(dtype), make_rows()
    grown = upcycle(dense, upcycle_config(dense.config, EXPERTS, active=active))
    before, after = (scores(model, rows, run) for model in (dense, grown))
    assert before.std() > 0.5
    assert (before - after).abs().max() < 4e-6 * before.abs().max()  # sums in another order
    assert [len(e.bank.down) for e in grown.layers[0].experts.experts()] == [4, 2, 3]


def test_with_a_router_of_zeros_it_is_the_same_but_for_rounding(dense, make_rows, run):
    rows = make_rows()
    grown = upcycle(dense, upcycle_config(dense.config, EXPERTS, active=2))
    for name, parameter in grown.named_parameters():
        if name.endswith("router"):
            parameter.data.zero_()
    assert (scores(dense, rows, run) - scores(grown, rows, run)).abs().max() < 1e-12


def test_equal_experts_share_the_ids_and_their_routers_learn_at_once(dense, make_rows, run):
    rows = make_rows()
    grown = upcycle(dense, upcycle_config(dense.config, EXPERTS)).train()
    grown.logits(run(grown, rows)).square().sum().backward()
    for name, loads in grown.expert_loads().items():
        assert ((loads > 0).sum(1) > 1).all(), name
    for layer in grown.layers:
        for experts in layer.experts.experts():  # of every expert that took an id
            assert ((experts.router.grad.abs().amax(0) > 1e-3) == (experts.load > 0)).all()


def test_a_trained_router_of_one_expert_is_copied(dense, make_model, make_rows, run, vocabulary):
    one = {"num_experts": 1, "router": "token_choice"}
    groups = {
        name: GroupConfig(modalities=group.modalities, **one)
        for name, group in dense.config.groups.items()
    }
    trained = make_model("hard", noisy=False, groups=groups).eval()
    grown = upcycle(trained, upcycle_config(trained.config, EXPERTS))
    rows = make_rows()
    before, after = scores(trained, rows, run), scores(grown, rows, run)
    assert (before - after).abs().max() < 4e-6 * before.abs().max()  # sums in another order
    router = grown.layers[0].experts.groups["text"].router
    assert 0 < (router - router[:, :1]).abs().max() < 10 * SCATTER


def test_noisy_groups_grow_too_and_others_stay(make_model, make_rows, run):
    model = make_model("hard", noisy=True)
    config = upcycle_config(model.config, {"noisy_visual": 2})
    grown = upcycle(model, config)
    same = {n for n, t in model.state_dict().items() if torch.equal(t, grown.state_dict()[n][:1])}
    before = model.state_dict().keys()
    assert {n for n in before if "noisy_visual" not in n} <= {
        n for n in before if torch.equal(model.state_dict()[n], grown.state_dict()[n])
    }
    assert {n for n in before if "noisy_visual.bank" in n} <= same


def test_moments_are_copied_with_their_experts(dense):
    grown = upcycle(dense, upcycle_config(dense.config, EXPERTS))
    name = "layers.0.experts.groups.text.bank.down"
    moment, step = torch.rand(dense.state_dict()[name].shape), torch.tensor(7.0)
    made = expand({f"{name}:exp_avg": moment, f"{name}:step": step}, grown)
    assert torch.equal(made[f"{name}:exp_avg"], moment.repeat(4, 1, 1))
    assert torch.equal(made[f"{name}:step"], step)


def test_the_seed_decides_the_routers(dense):
    config = upcycle_config(dense.config, EXPERTS)
    one, same, other = (upcycle(dense, config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert {n for n in one if not torch.equal(one[n], other[n])} == {
        n for n in one if n.endswith("router")
    }


def test_what_cannot_be_grown_is_one_line(make_config):
    dense, mixed = make_config("hard"), make_config("token_choice")
    for config, experts, active, message in (
        (dense, {"words": 2}, 1, "no group 'words'; this model has text, visual, speech"),
        (mixed, {"text": 4}, 1, "text has 3 experts; only a group of one"),
        (dense, {"text": 1}, 1, "text=1; use 2 to"),
        (dense, {"text": 1 << 40}, 1, "use 2 to"),
        (dense, {"text": 4}, 5, "num_active = 5 of num_experts = 4"),
    ):
        with pytest.raises(UserError, match=message) as error:
            upcycle_config(config, experts, active=active)
        assert "\n" not in str(error.value)
    assert Decoder(upcycle_config(dense, {"text": 2})).config.groups["speech"].num_experts == 1
