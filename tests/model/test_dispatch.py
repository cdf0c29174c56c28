"""Every way of dispatch gives what a loop over ids and experts gives, values and gradients."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.dispatch import Dispatch, group_table
from mmpt.model.layout import Layout
from mmpt.model.moe import Experts, ModalityMoE

EVERYTHING = ("text", "image", "video", "speech")
SEVERAL = {"num_experts": 3, "num_active": 2}
KINDS = {
    "hard": {},
    "token choice": {"router": "token_choice", **SEVERAL},
    "one active": {"router": "token_choice", "num_experts": 4},
    "softmax": {"router": "token_choice", "gate": "softmax", **SEVERAL},
    "renormalised": {"router": "token_choice", "renormalise": True, **SEVERAL},
    "shared expert": {"router": "token_choice", "shared_hidden": 5, **SEVERAL},
    "dense and shared": {"shared_hidden": 5},
    "identity": {"router": "token_choice", "num_identity": 2, **SEVERAL},
    "batch": {"router": "expert_choice", **SEVERAL},
    "sequence": {"router": "expert_choice", "scope": "sequence", **SEVERAL},
    "block": {"router": "expert_choice", "scope": "block", "capacity_slope": 0.8, **SEVERAL},
    "many experts": {"router": "expert_choice", "scope": "sequence", "num_experts": 7},
}


def build(kind: str, width: int, hidden: int) -> tuple[ModalityMoE, ModelConfig]:
    """Text and speech in groups of one expert, the visual media in one of the kind."""
    clean = KINDS[kind]
    if clean.get("scope") == "block":
        clean = {"router": "token_choice", **SEVERAL}
    visual = GroupConfig(modalities=("image", "video"), **clean)
    groups = {
        "text": GroupConfig(modalities=("text",)),
        "visual": visual,
        "speech": GroupConfig(modalities=("speech",)),
        "noisy_visual": visual.for_noisy(("image", "video"), "expert_choice", 0.8)
        if KINDS[kind].get("scope") == "block"
        else visual.for_noisy(("image", "video")),
    }
    sizes = {"num_heads": 1, "num_kv_heads": 1, "expert_hidden": hidden}
    config = ModelConfig(vocab_size=9, width=width, groups=groups, **sizes)
    layer = ModalityMoE(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn)
        for name, buffer in layer.named_buffers():
            if name.endswith("balance"):
                buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
    return layer, config


def loop(
    layer: ModalityMoE,
    config: ModelConfig,
    x: torch.Tensor,
    modality: torch.Tensor,
    *,
    layout: Layout,
    time: torch.Tensor,
    causal: bool = False,
) -> torch.Tensor:
    """(B, T, D) of ids (B, T) none of which is hashed; causal: as where nothing is learned."""
    names, table = list(config.ordered_groups), group_table(config)
    members = defaultdict(list)
    for b, t in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2])).tolist():
        if layout.document[b, t] >= 0:
            noisy = int(layout.block[b, t] >= 0)
            members[names[int(table[noisy, modality[b, t]])]].append((b, t))
    out = torch.zeros_like(x)
    for name, places in members.items():
        experts = layer.groups[name]
        assert isinstance(experts, Experts)
        chosen = _choose(experts, x, places, layout, time, causal)
        for b, t in places:
            y = torch.zeros_like(x[b, t])
            for expert, gate in chosen[b, t]:
                y = y + gate * _compute(experts, x[b, t], expert)
            if experts.shared is not None:
                y = y + _swiglu(experts.shared, x[b, t], 0)
            out[b, t] = y
    return out


def _choose(experts, x, places, layout, time, causal):
    """Place -> [(expert, gate)]."""
    group = experts.group
    if experts.router is None:
        return {place: [(0, 1.0)] for place in places}
    scores = {}
    for b, t in places:
        logits = x[b, t] @ experts.router
        scores[b, t] = logits.softmax(0) if group.gate == "softmax" else torch.sigmoid(logits)
    if group.router == "expert_choice" and not (causal and not group.noisy):
        picked = _by_expert(group, scores, places, layout, time)
    elif experts.auxiliary is not None:
        says = {p: experts.auxiliary(x[p][None])[0] for p in places}
        picked = {p: [e for e in range(group.num_experts) if says[p][e] > 0] for p in places}
    else:
        bias = getattr(experts, "balance", 0)
        picked = {p: (scores[p].detach() + bias).topk(group.num_active)[1].tolist() for p in places}
    chosen = {}
    for place in places:
        gates = {e: scores[place][e] for e in picked[place]}
        if group.renormalise:
            gates = {e: gate / sum(gates.values()) for e, gate in gates.items()}
        elif group.gate == "sigmoid":
            gates = {e: gate * 2 / group.num_active for e, gate in gates.items()}
        chosen[place] = list(gates.items())
    return chosen


def _by_expert(group, scores, places, layout, time):
    pools = defaultdict(list)
    for b, t in places:
        within = layout.block if group.noisy else layout.document
        pools[None if group.scope == "batch" else (b, int(within[b, t]))].append((b, t))
    picked = {place: [] for place in places}
    for pool in pools.values():
        factor = 1 + group.capacity_slope * (2 * float(time[pool[0]]) - 1)
        wanted = len(pool) * group.num_active / group.num_experts * factor
        capacity = min(max(int(wanted + 0.5), 1), len(pool))
        for expert in range(group.num_experts):
            best = sorted(pool, key=lambda p: -scores[p][expert].item())
            for place in best[:capacity]:
                picked[place].append(expert)
    return picked


def _compute(experts, x_D, expert):
    identity = expert >= experts.num_experts
    return x_D if identity else _swiglu(experts.bank, x_D, expert)


def _swiglu(bank, x_D, expert):
    gate, up = x_D @ bank.gate_up[expert, :, 0], x_D @ bank.gate_up[expert, :, 1]
    return (F.silu(gate) * up) @ bank.down[expert]


def assert_as_loop(layer, config, modality, document, block, *, time, learns):
    length = modality.shape[1]
    position = torch.arange(length).expand(modality.shape)
    layout = Layout(document, position, block, position)
    group = group_table(config)[(block >= 0).long(), modality]
    group = torch.where(document < 0, len(config.groups), group)
    dispatch = Dispatch.plan(group, config, ids=modality, layout=layout, time=time)
    generator = torch.Generator().manual_seed(3)
    shape = (*modality.shape, config.width)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    layer.train(learns)
    results = []
    for compute in (
        lambda x: layer(x, dispatch)[0],
        lambda x: loop(layer, config, x, modality, layout=layout, time=time, causal=not learns),
    ):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        (y.square().sum() + 0 * leaf.sum()).backward()
        zero = torch.zeros((), dtype=x.dtype)
        gradients = [zero if p.grad is None else p.grad for p in layer.parameters()]
        results.append([y, leaf.grad, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.expand_as(ours), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_dispatch_equals_a_loop_over_ids_and_experts(kind, data):
    width = data.draw(st.sampled_from([2, 6, 8]))
    layer, config = build(kind, width, data.draw(st.sampled_from([1, 3, 8])))
    size = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)))
    media = data.draw(st.sampled_from([(0,), (1,), (0, 1), (1, 2), (0, 1, 2, 3)]))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    modality = torch.tensor(media)[torch.randint(len(media), size, generator=seed)]
    document = torch.randint(2, size, generator=seed).sort(1).values
    document = torch.where(torch.rand(size, generator=seed) < 0.1, -1, document)
    block = torch.randint(-1, 3, size, generator=seed).sort(1).values
    visual = (modality == 1) | (modality == 2)
    block = torch.where(visual & (document >= 0), block, -1)
    time = torch.rand(size, generator=seed)[:, :1].expand(size)
    learns = data.draw(st.booleans())
    assert_as_loop(layer, config, modality, document, block, time=time, learns=learns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", [[[1]], [[1, 1]], [[0, 0]], [[1, 2, 1, 2, 1], [1] * 5]])
def test_groups_of_few_ids_and_none(kind, mix):
    """So expert choice has capacities that round to zero, and pools of one id."""
    layer, config = build(kind, 8, 3)
    modality = torch.tensor(mix)
    document, none = torch.zeros_like(modality), torch.full_like(modality, -1)
    block = torch.where(modality > 0, 0, -1) if KINDS[kind].get("scope") == "block" else none
    time = torch.full(modality.shape, 0.2)
    assert_as_loop(layer, config, modality, document, block, time=time, learns=True)


def test_each_expert_takes_its_share_of_each_pool_by_the_noise():
    visual = GroupConfig(modalities=EVERYTHING, num_experts=4, router="token_choice")
    noisy = visual.for_noisy(("image",), "expert_choice", 1.0)
    config = ModelConfig(vocab_size=9, groups={"all": visual, "noisy_all": noisy})
    block = torch.tensor([[0] * 8 + [1] * 8 + [2] * 8 + [3]])
    zero = torch.zeros_like(block)
    time = torch.tensor([[1.0] * 8 + [0.5] * 8 + [0.0] * 8 + [0.0]])
    layout = Layout(zero, zero, block, zero)
    part = Dispatch.plan(zero + 1, config, layout=layout, time=time).parts[1]
    taken = part.pool_G[part.slots_K].bincount()
    # twice the share of 8 ids at no noise, the share, and one of each where it comes to none
    assert taken.tolist() == [4, 2, 1, 1]


def test_strange_ids_and_modalities_are_refused_in_one_line(make_model):
    model = make_model()
    ids = torch.tensor([[1, 2, 3]])
    zero = torch.zeros_like(ids)
    for bad in (torch.tensor([[1, -2, 3]]), torch.tensor([[1, 2, 10**6]])):
        with pytest.raises(UserError, match=r"1 ids are not among the \d+ of this model"):
            model(bad, modality=zero)
    for bad in (4, -1):
        with pytest.raises(UserError, match="no group serves the modality of 3 ids"):
            model(ids, modality=zero + bad)
