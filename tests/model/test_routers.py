"""Routers by themselves: noise, hashes, losses, balance, auxiliary ones; experts of each kind."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import noop_context_fn

from mmpt.config import UserError
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.dispatch import Dispatch
from mmpt.model.draws import hash_ids, logistic
from mmpt.model.layout import Layout
from mmpt.model.moe import ModalityMoE
from mmpt.model.routers import router_loss
from mmpt.model.transformer import Decoder
from mmpt.train.pretrain import unusual_rates

EVERYTHING = ("text", "image", "video", "speech")
SEVERAL = {"num_experts": 3, "num_active": 2}
TAKEN = {"router": "expert_choice", **SEVERAL}


@pytest.fixture
def model_of(make_config):
    """A model of two layers with one group of all media."""

    def make(**options):
        changes = {"num_layers": options.pop("num_layers", 2)}
        if "every" in options:
            changes["expert_share_every"] = options.pop("every")
        groups = {"all": GroupConfig(modalities=EVERYTHING, **options)}
        return Decoder.from_config(make_config(groups=groups, **changes), seed=1)

    return make


def forward(model, rows, **options):
    return model(
        rows.ids,
        modality=rows.modality,
        position=rows.position,
        document=rows.document,
        **options,
    )


def test_noise_is_logistic_and_a_function_of_its_key():
    drawn = logistic(torch.arange(200_000))
    assert torch.equal(drawn, logistic(torch.arange(200_000)))
    assert drawn.mean().abs() < 0.02
    assert drawn.std() == pytest.approx(math.pi / math.sqrt(3), abs=0.02)
    assert torch.isfinite(drawn).all()
    assert abs(torch.corrcoef(torch.stack((drawn[1:], drawn[:-1])))[0, 1]) < 0.01


def test_hashes_spread_ids_over_different_experts():
    chosen = hash_ids(torch.arange(6000), 5, 3)
    assert torch.equal(chosen, hash_ids(torch.arange(6000), 5, 3))
    assert all(len(set(row)) == 3 for row in chosen[:100].tolist())
    counts = chosen.flatten().bincount(minlength=5)
    assert (counts - 3600).abs().max() < 200


def test_the_balance_loss_is_one_at_an_even_load_and_the_z_loss_is_the_formula():
    group = GroupConfig(
        modalities=("text",),
        num_experts=4,
        num_active=2,
        router="token_choice",
        balance="loss",
        balance_loss=1.0,
    )
    even = router_loss(torch.zeros(6, 4), group, torch.tensor([3, 3, 3, 3]))
    torch.testing.assert_close(even, torch.ones(6))
    sure = torch.tensor([[50.0, 0.0, 0.0, 0.0]])  # E f P = 4 x 1/2 x 1
    torch.testing.assert_close(
        router_loss(sure, group, torch.tensor([1, 1, 0, 0])), torch.ones(1) * 2
    )
    z_only = replace(group, balance="none", router_z_loss=0.5)
    z_loss = router_loss(torch.zeros(1, 4), z_only, torch.tensor([2, 0, 0, 0]))
    torch.testing.assert_close(z_loss, torch.full((1,), 0.5 * math.log(4) ** 2))


def test_router_losses_reach_the_routers_once_per_pass(model_of, make_rows):
    rows = make_rows()
    options = {"router": "token_choice", "balance": "loss", "router_z_loss": 0.1, **SEVERAL}
    model = model_of(**options)
    hidden = forward(model, rows)
    loss = model.take_router_loss()
    assert model.take_router_loss() is None
    assert loss.shape == rows.ids.shape
    assert not loss[rows.document < 0].any()
    assert (loss[rows.document >= 0] > 0).all()
    loss.sum().backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"layers.0.experts.groups.all.router", "layers.1.experts.groups.all.router"} <= names
    with torch.no_grad():
        assert torch.equal(forward(model, rows), hidden)
        assert model.take_router_loss() is None
    # recomputed layers give the same
    gradient = model.layers[0].experts.groups["all"].router.grad.clone()
    model.zero_grad()
    for layer in model.layers:
        layer.recompute = noop_context_fn
    forward(model, rows)
    model.take_router_loss().sum().backward()
    assert torch.equal(model.layers[0].experts.groups["all"].router.grad, gradient)


@pytest.mark.parametrize("balance", ["loss", "none"])
def test_only_one_kind_of_balance_moves_the_bias(model_of, make_rows, balance):
    model = model_of(router="token_choice", balance=balance, **SEVERAL)
    forward(model, make_rows())
    model.update_balance(1.0)
    assert not any(b.any() for n, b in model.named_buffers() if n.endswith("balance"))


def test_noise_changes_training_only_and_each_row_by_its_seed(model_of, make_rows):
    model, rows = model_of(router_noise=True, scope="sequence", **TAKEN), make_rows()
    plain = forward(model, rows)
    seeds = torch.tensor([5, 6])
    noisy = forward(model, rows, noise=seeds)
    assert torch.equal(noisy, forward(model, rows, noise=seeds))
    other = forward(model, rows, noise=torch.tensor([5, 7]))
    assert torch.equal(noisy[0], other[0])
    assert not torch.equal(noisy[1], other[1])
    assert not torch.equal(noisy, plain)
    model.eval()
    with torch.no_grad():
        assert torch.equal(forward(model, rows, noise=seeds), forward(model, rows))


def test_expert_choice_is_even_and_tells_of_ids_without_experts(model_of, make_rows):
    model, rows = model_of(router="expert_choice", num_experts=3), make_rows()
    forward(model, rows)
    number = int((rows.document >= 0).sum())
    assert (model.expert_loads()["all"] == int(number / 3 + 0.5)).all()
    left, seen = model.unserved()["all"].unbind(1)
    assert (seen == number).all()
    assert (left > 0).all()
    assert (left < 2 * number / 3).all()
    model.update_balance()
    assert not model.unserved()["all"].any()


def test_auxiliary_routers_learn_on_a_frozen_model_and_choose_at_inference(model_of, make_rows):
    rows, options = make_rows(), {"router": "expert_choice", "num_experts": 2}
    model = model_of(causal="auxiliary", **options)
    assert forward(model, rows).isfinite().all()
    assert model.take_router_loss() is None  # they take no part in the model's own training
    model.freeze_for_routers()
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".auxiliary." not in n}
    rate = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(60):
        forward(model, rows)
        loss = model.take_router_loss()[rows.document >= 0].mean()
        losses.append(float(loss.detach()))
        rate.zero_grad()
        loss.backward()
        rate.step()
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3)
    assert losses[-1] < 0.5 * losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    # what they choose is close to what expert choice takes, and far from nothing
    taken = forward(model, rows).detach()
    with torch.no_grad():
        causal = forward(model.eval(), rows)
        for experts in (layer.experts.groups["all"] for layer in model.layers):
            experts.auxiliary.outer.zero_()  # sigmoid .5 is not above .5: no experts at all
        none = forward(model, rows)
    real = rows.document >= 0
    assert (causal - taken)[real].norm() < 0.5 * (none - taken)[real].norm()


def test_a_model_without_auxiliary_routers_has_none_to_train(model_of):
    with pytest.raises(UserError, match="causal = auxiliary"):
        model_of(**TAKEN).freeze_for_routers()


@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "hash"])
def test_one_expert_is_the_dense_layer(model_of, make_rows, router):
    rows = make_rows()
    dense, routed = model_of(), model_of(router=router, gate="softmax")
    ours = dict(routed.named_parameters())
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            ours[name].copy_(parameter)
    torch.testing.assert_close(forward(routed, rows), forward(dense, rows))


def test_layers_share_experts_and_save_them_once(model_of, make_rows, tmp_path):
    rows, options = make_rows(), {"router": "token_choice", "shared_hidden": 4, **SEVERAL}
    model = model_of(every=2, num_layers=5, **options)
    alone = model_of(num_layers=5, **options)
    bank = sum(p.numel() for p in model.layers[0].experts.groups["all"].bank.parameters())
    assert model.num_parameters == alone.num_parameters - 2 * bank
    assert model.num_active_parameters(0) == alone.num_active_parameters(0)
    model.add_noisy_groups()
    groups = [layer.experts.groups for layer in model.layers]
    for name in ("all", "noisy_all"):
        banks = [group[name].bank for group in groups]
        assert banks[0] is banks[1]
        assert banks[2] is banks[3]
        assert len({id(each) for each in banks}) == 3
        assert len({id(group[name].router) for group in groups}) == 5
    before = forward(model, rows)
    model.save(tmp_path)
    assert sum("all.bank.down" in name for name in load_file(tmp_path / "model.safetensors")) == 6
    assert torch.equal(forward(Decoder.load(tmp_path), rows), before)
    before.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".bank." in n)


def test_a_layer_without_weights_of_its_own_grows_noisy_groups_too(model_of):
    model = model_of(every=2)  # one expert and no router: the second layer borrows all it has
    model.add_noisy_groups()
    first, second = (layer.experts.groups["noisy_all"] for layer in model.layers)
    clean = model.layers[0].experts.groups["all"].bank
    assert second.bank is first.bank
    assert first.bank is not clean
    assert torch.equal(first.bank.down, clean.down)


def test_plain_models_have_the_weights_they_always_had(make_config):
    names = set(Decoder(make_config()).state_dict())
    within = {name.split("groups.")[1] for name in names if "groups." in name}
    parts = ("bank.gate_up", "bank.down", "router", "balance")
    assert within == {f"{group}.{part}" for group in ("text", "visual", "speech") for part in parts}


def test_noisy_groups_may_choose_otherwise_than_clean_ones(make_model, make_rows, run):
    model, rows = make_model(noisy=False), make_rows()
    before = run(model, rows)
    model.add_noisy_groups(router="expert_choice", capacity_slope=0.5)
    group = model.config.groups["noisy_visual"]
    assert (group.router, group.scope, group.capacity_slope) == ("expert_choice", "block", 0.5)
    tensors = model.state_dict()
    for part in ("router", "bank.down"):
        grown, source = (
            tensors[f"layers.0.experts.groups.{n}visual.{part}"] for n in ("noisy_", "")
        )
        assert torch.equal(grown, source)
    assert torch.equal(run(model, rows), before)


def test_rates_of_activation_are_those_of_the_formula():
    def rates(text, image, speech, hidden=512):
        numbers = {"text": ("text",), "visual": ("image", "video"), "speech": ("speech",)}
        groups = {
            name: GroupConfig(modalities=media, num_experts=number, router="token_choice")
            for (name, media), number in zip(numbers.items(), (text, image, speech), strict=True)
        }
        return ModelConfig(vocab_size=4, groups=groups, expert_hidden=hidden)

    default = rates(4, 2, 2)
    assert default.activation_rates == pytest.approx(dict.fromkeys(default.groups, 12 / 68))
    dense = GroupConfig(modalities=EVERYTHING)
    assert unusual_rates(default) is None
    assert unusual_rates(ModelConfig(vocab_size=4, groups={"all": dense})) is None
    assert "text 9 %, visual 9 %, speech 9 %" in str(unusual_rates(rates(8, 8, 1)))


@pytest.mark.parametrize("kind", ["token_choice", "expert_choice", "hash"])
def test_odd_rows_stay_right(model_of, make_rows, kind):
    """Rows of pads, of one id, and of ids that all want one expert."""
    model = model_of(router=kind, **SEVERAL)
    experts = model.layers[0].experts.groups["all"]
    if experts.router is not None:
        with torch.no_grad():
            experts.router[:] = 0.0
            experts.router[:, 1] = 1.0
    rows = make_rows()
    one = torch.zeros(1, 1, dtype=torch.int64)
    for learns in (True, False):
        model.train(learns)
        with torch.set_grad_enabled(learns):
            empty = replace(rows, document=torch.full_like(rows.document, -1))
            assert forward(model, empty).isfinite().all()
            assert model(one, modality=one).isfinite().all()
            same = torch.full_like(rows.ids, 5)
            hidden = forward(model, replace(rows, ids=same, modality=same * 0))
            assert hidden.isfinite().all()
    assert not model(one[:, :0], modality=one[:, :0]).numel()


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_nan_stays_with_its_id_or_in_its_document(make_config, scope):
    kinds = ({"router": "token_choice"}, {"router": "expert_choice", "scope": scope})
    for options in kinds:
        group = GroupConfig(modalities=EVERYTHING, **SEVERAL, **options)
        config = make_config(groups={"all": group})
        layer = ModalityMoE(config)
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
        document = torch.tensor([[0, 0, 0, 1, 1, 1]])
        zero = torch.zeros_like(document)
        dispatch = Dispatch.plan(zero, config, layout=Layout.clean(document, zero))
        x = torch.randn(1, 6, config.width, generator=torch.Generator().manual_seed(0))
        poisoned = x.clone()
        poisoned[0, 4] = torch.nan
        bad = layer(poisoned, dispatch)[0].isnan().any(-1)
        assert bad.nonzero().tolist() == [[0, 4]]
        same = [0, 1, 2] if scope == "sequence" else []
        before, after = layer(x, dispatch)[0], layer(poisoned, dispatch)[0]
        torch.testing.assert_close(after[0, same], before[0, same])
