import pytest
import torch
import torch.nn.functional as F

from mmpt.config import UserError
from mmpt.model import moe
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.moe import Dispatch, Experts, ModalityMoE, group_table
from mmpt.vocab import Modality


@pytest.fixture
def make_layer(make_config):
    """A float64 layer with random weights, and its config."""

    def make(router: str = "token_choice"):
        config = make_config(router)
        layer = ModalityMoE(config).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return layer, config

    return make


def _inputs(config, modality: list[list[int]]):
    modality_BT = torch.tensor(modality)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*modality_BT.shape, config.width, generator=generator, dtype=torch.float64)
    return x, modality_BT, Dispatch.plan(group_table(config)[0, modality_BT], config)


def _loop(layer, config, x, modality):
    # one id, one expert at a time, straight from the definition
    out = torch.zeros_like(x)
    names = list(config.ordered_groups)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2])).tolist():
        b, t = index
        experts = layer.groups[names[group_table(config)[0, modality[b, t]]]]
        scores = torch.ones(1, dtype=x.dtype) / 2
        if experts.router is not None:
            scores = torch.sigmoid(x[b, t] @ experts.router)
        best = (scores.detach() + getattr(experts, "balance", 0)).topk(experts.num_active).indices
        y = torch.zeros_like(x[b, t])
        for e in best.tolist():
            gate, up = (
                x[b, t] @ experts.bank.gate_up[e, :, 0],
                x[b, t] @ experts.bank.gate_up[e, :, 1],
            )
            expert = (F.silu(gate) * up) @ experts.bank.down[e]
            y = y + scores[e] * (2 / experts.num_active) * expert
        out[b, t] = y
    return out


MIXES = {
    "every group": [[0, 1, 2, 3, 0], [1, 1, 3, 0, 2]],
    "uneven": [[0, 1, 1, 1, 1, 1, 1]],
    "two absent": [[0, 0, 0]],
    "one id": [[3]],
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_dispatch_equals_a_loop_over_ids_and_experts_in_values_and_gradients(
    make_layer, router, mix
):
    layer, config = make_layer(router)
    x, modality, dispatch = _inputs(config, mix)
    results = []
    for compute in (
        lambda x: layer(x, dispatch),
        lambda x: _loop(layer, config, x, modality),
    ):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        y.square().sum().backward()
        zero = torch.zeros((), dtype=x.dtype)
        results.append(
            [y, leaf.grad, *(zero if p.grad is None else p.grad for p in layer.parameters())]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.expand_as(ours), atol=1e-9, rtol=1e-9)


def test_absent_groups_get_zero_gradients_and_not_none(make_layer, router):
    layer, config = make_layer(router)
    x, _, dispatch = _inputs(config, [[0, 0, 0]])
    layer(x, dispatch).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert gradient.any() == ("speech" not in name and "visual" not in name), name


def test_a_token_never_reaches_an_expert_of_another_group(make_layer):
    layer, config = make_layer()
    x, modality, dispatch = _inputs(config, MIXES["every group"])
    before = layer(x, dispatch)
    with torch.no_grad():
        for parameter in layer.groups["visual"].parameters():
            parameter += 1.0
    changed = (layer(x, dispatch) - before).abs().amax(-1) > 0
    visual = (modality == Modality.IMAGE) | (modality == Modality.VIDEO)
    assert torch.equal(changed, visual)


def test_pads_give_zero_and_reach_no_expert(make_layer):
    layer, config = make_layer()
    group = torch.tensor([[0, len(config.groups), 1]])
    x = torch.ones(1, 3, config.width, dtype=torch.float64)
    y = layer(x, Dispatch.plan(group, config))
    assert not y[0, 1].any()
    assert y[0, 0].any()
    assert sum(experts.load.sum() for experts in layer.experts()) == 2 * 2  # ids x experts per id


def test_copies_of_one_expert_compute_what_the_one_computes(make_config):
    config = make_config()
    many, one = (
        Experts(config, config.groups["text"]),
        Experts(make_config("hard"), make_config("hard").groups["text"]),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("gate_up", "down"):
            weight = torch.randn(getattr(one.bank, name).shape, generator=generator)
            getattr(one.bank, name).copy_(weight)
            getattr(many.bank, name).copy_(weight.expand_as(getattr(many.bank, name)))
        many.router.zero_()
    x = torch.randn(5, config.width, generator=generator)
    torch.testing.assert_close(many(x), one(x))


def test_the_balance_decides_who_is_chosen_and_never_enters_the_gate(make_layer):
    layer, config = make_layer()
    experts = layer.groups["text"]
    x, _, dispatch = _inputs(config, [[0] * 6])
    before = layer(x, dispatch)
    experts.balance += 100.0  # the same for all: the choice stays
    assert torch.equal(layer(x, dispatch), before)
    experts.balance[2] -= 1000.0
    experts.load.zero_()
    layer(x, dispatch)
    assert experts.load.tolist() == [6, 6, 0]


def test_balancing_evens_the_load_and_needs_no_gradient(make_config):
    config = make_config()
    experts = Experts(config, config.groups["text"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        experts.router[:, 0] += 0.5
    x = torch.randn(400, config.width, generator=generator) + 0.5
    spreads = []
    for _ in range(120):
        experts(x)
        spreads.append(float(experts.load.max() - experts.load.min()))
        experts.update_balance(0.01)
    assert not experts.balance.requires_grad
    assert experts.load.sum() == 0
    assert spreads[0] > 200
    assert sum(spreads[-5:]) / 5 < 80


def test_only_training_passes_count_the_load(make_layer):
    layer, config = make_layer()
    x, _, dispatch = _inputs(config, [[0, 1, 3]])
    with torch.no_grad():
        layer(x, dispatch)
    layer.eval()
    layer(x, dispatch)
    assert all(not experts.load.any() for experts in layer.experts())


def test_noisy_ids_without_a_noisy_group_are_refused(make_config):
    config = make_config()
    group = group_table(config)[1, torch.tensor([[1, 3]])]
    with pytest.raises(UserError, match="no noisy group"):
        Dispatch.plan(group, config)


@pytest.mark.parametrize("router", ["hard", "token_choice"])
def test_places_that_nobody_reads_change_nothing(
    monkeypatch: pytest.MonkeyPatch, router: str
) -> None:
    experts, active = (1, 1) if router == "hard" else (4, 2)
    group = GroupConfig(
        modalities=("text", "image", "video", "speech"),
        num_experts=experts,
        num_active=active,
        router=router,  # type: ignore[arg-type] # one of the two
    )
    sizes = {"width": 16, "num_heads": 2, "num_kv_heads": 1, "expert_hidden": 24}
    config = ModelConfig(vocab_size=8, groups={"all": group}, **sizes)
    layer = Experts(config, group)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(1))
    x = torch.randn(37, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    made = []
    for step in (1, 32):
        monkeypatch.setattr(moe, "ROW_STEP", step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        weights = [x, *layer.parameters()]
        made.append([y, *torch.autograd.grad(y.float().square().sum(), weights)])
    for plain, longer in zip(*made, strict=True):
        torch.testing.assert_close(longer, plain, rtol=2e-2, atol=2e-2)
