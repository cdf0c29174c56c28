import pytest
import torch

from mmpt.config import UserError
from mmpt.model import bank
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.dispatch import Dispatch, group_table
from mmpt.model.moe import Experts, ModalityMoE
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


MIXES = {
    "every group": [[0, 1, 2, 3, 0], [1, 1, 3, 0, 2]],
    "uneven": [[0, 1, 1, 1, 1, 1, 1]],
    "two absent": [[0, 0, 0]],
    "one id": [[3]],
}


def test_absent_groups_get_zero_gradients_and_not_none(make_layer, router):
    layer, config = make_layer(router)
    x, _, dispatch = _inputs(config, [[0, 0, 0]])
    layer(x, dispatch)[0].sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert gradient.any() == ("speech" not in name and "visual" not in name), name


def test_a_token_never_reaches_an_expert_of_another_group(make_layer):
    layer, config = make_layer()
    x, modality, dispatch = _inputs(config, MIXES["every group"])
    before, _ = layer(x, dispatch)
    with torch.no_grad():
        for parameter in layer.groups["visual"].parameters():
            parameter += 1.0
    changed = (layer(x, dispatch)[0] - before).abs().amax(-1) > 0
    visual = (modality == Modality.IMAGE) | (modality == Modality.VIDEO)
    assert torch.equal(changed, visual)


def test_pads_give_zero_and_reach_no_expert(make_layer):
    layer, config = make_layer()
    group = torch.tensor([[0, len(config.groups), 1]])
    x = torch.ones(1, 3, config.width, dtype=torch.float64)
    y, _ = layer(x, Dispatch.plan(group, config))
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
    torch.testing.assert_close(many(x)[0], one(x)[0])


def test_the_balance_decides_who_is_chosen_and_never_enters_the_gate(make_layer):
    layer, config = make_layer()
    experts = layer.groups["text"]
    x, _, dispatch = _inputs(config, [[0] * 6])
    before, _ = layer(x, dispatch)
    experts.balance += 100.0  # the same for all: the choice stays
    assert torch.equal(layer(x, dispatch)[0], before)
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
        monkeypatch.setattr(bank, "ROW_STEP", step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = layer(x)
        weights = [x, *layer.parameters()]
        made.append([y, *torch.autograd.grad(y.float().square().sum(), weights)])
    for plain, longer in zip(*made, strict=True):
        torch.testing.assert_close(longer, plain, rtol=2e-2, atol=2e-2)
