"""What attention may be made of: each option by its formula, and every one by the contracts."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmpt.config import UserError
from mmpt.model.attention import Attention, Context
from mmpt.model.backends import Causal
from mmpt.model.config import RopeScaling
from mmpt.model.rotary import Rotary, axes_of
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows
from mmpt.train.parallel import ParallelConfig
from mmpt.vocab import Modality

EXACT = {"atol": 1e-10, "rtol": 0.0}
STRETCHED = RopeScaling(factor=4.0, original_max_position_embeddings=64)
STILL = Rotary(torch.ones(()), torch.zeros(()))
VARIANTS = {
    "wide heads": {"head_width": 6},
    "norm over all heads": {"qk_norm": "full", "norm_eps": 1e-5},
    "no norm, biases": {"qk_norm": "none", "attention_bias": True},
    "stretched": {"rope_scaling": STRETCHED, "rope_base": 1000.0},
    "gated": {"gated_attention": True},
    "untied": {"untied_attention": True, "attention_bias": True},
    "three axes": {"rope": "3d", "head_width": 12},
}


UNDIVIDED = (
    {"qk_norm": "full"},
    {"attention_bias": True},
    {"gated_attention": True},
    {"untied_attention": True},
)


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture
def model(make_model, variant):
    return make_model(**variant)


def test_a_packed_row_equals_its_documents_alone(model, make_rows, make_document, run):
    packed = run(model, make_rows())
    first = Rows.pack([[make_document(0, 2)]], 60, 0)
    second = Rows.pack([[make_document(1, 3)]], 60, 0)
    lengths = [int((rows.document >= 0).sum()) for rows in (first, second)]
    alone = [run(model, rows)[0, :n] for rows, n in zip((first, second), lengths, strict=True)]
    torch.testing.assert_close(packed[0, : sum(lengths)], torch.cat(alone), **EXACT)


def test_cached_decoding_equals_the_whole_pass(model, make_rows, run):
    rows = make_rows()
    cache = model.new_cache()
    columns = {n: getattr(rows, n) for n in ("ids", "modality", "position", "document")}
    columns["axes"] = axes_of(rows)
    parts = [
        model(
            **{name: column[:, start : start + 9] for name, column in columns.items()}, cache=cache
        )
        for start in range(0, 100, 9)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), run(model, rows), **EXACT)


def test_no_later_id_moves_an_earlier_one(model, make_rows, run):
    rows = make_rows()
    ids = rows.ids.clone()
    ids[:, 30:] = 3
    before, after = run(model, rows), run(model, rows, ids=ids)
    torch.testing.assert_close(after[:, :30], before[:, :30], **EXACT)
    assert (after[:, 30:] - before[:, 30:]).abs().max() > 1e-3


def test_every_weight_learns_and_survives_a_file(model, make_rows, run, tmp_path):
    rows = make_rows()
    run(
        model, rows, block=torch.where(rows.modality > 0, 0, -1), limit=rows.position
    ).sum().backward()
    attention = model.layers[0].attention
    assert all(p.grad is not None and p.grad.any() for p in attention.parameters())
    model.save(tmp_path)
    again = Decoder.load(tmp_path)
    assert again.config == model.config
    with torch.no_grad():
        torch.testing.assert_close(run(again, rows), run(model, rows), **EXACT)


def test_weights_that_one_id_multiplies_with_are_counted(make_model, variant):
    plain, model = make_model(noisy=False), make_model(noisy=False, **variant)
    own = "untied_attention" in variant
    shared = [
        (len(p) - 1) * p[0].numel() * own
        for n, p in model.named_parameters()
        if "attention.project" in n
    ]
    more = model.num_parameters - sum(shared) - plain.num_parameters
    assert model.num_active_parameters(0) - plain.num_active_parameters(0) == more


def _heads(attention: Attention, x: torch.Tensor) -> list[torch.Tensor]:
    # of 4 query and 2 key-value heads, which share rows: 2 queries, key, value
    y = F.linear(x, attention.project_in, attention.bias_in)
    y = y.unflatten(-1, (2, 4, attention.head_width))
    return [y[..., :2, :].flatten(-3, -2), y[..., 2, :], y[..., 3, :]]


@pytest.mark.parametrize(("norm", "bias"), [("full", False), ("none", True), ("head", True)])
def test_attention_is_its_formula(make_model, norm, bias):
    attention = make_model(qk_norm=norm, attention_bias=bias, head_width=6).layers[0].attention
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=generator)
    q, k, v = _heads(attention, x)
    if norm == "full":
        q, k = (
            F.rms_norm(y.flatten(2), (n,), scale, 1e-6).view_as(y)
            for y, n, scale in (
                (q, 24, attention.query_norm.scale),
                (k, 12, attention.key_norm.scale),
            )
        )
    elif norm == "head":
        q = F.rms_norm(q, (6,), attention.query_norm.scale, 1e-6)
        k = F.rms_norm(k, (6,), attention.key_norm.scale, 1e-6)
    k, v = (y.repeat_interleave(2, dim=2) for y in (k, v))
    scores = torch.einsum("bqhw,bkhw->bhqk", q, k) / math.sqrt(6)
    p = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhw->bqhw", p, v).flatten(2) @ attention.project_out.T
    got = attention(x, context=Context(STILL, Causal()), noisy_index=None, cache=None)
    torch.testing.assert_close(got, out, **EXACT)


def test_a_gate_scales_what_its_head_puts_out(make_model):
    attention = make_model(gated_attention=True, noisy=False).layers[0].attention
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    context = Context(STILL, Causal())
    gate, whole = attention.head_gate, torch.zeros(1, 5, 16, dtype=torch.float64)
    got = attention(x, context=context, noisy_index=None, cache=None)
    attention.head_gate = None
    for head in range(4):  # the output is a sum over heads
        kept = attention.project_out.detach().clone()
        alone = torch.zeros_like(kept)
        alone[:, head * 4 : head * 4 + 4] = kept[:, head * 4 : head * 4 + 4]
        attention.project_out.data = alone
        part = attention(x, context=context, noisy_index=None, cache=None)
        whole = whole + part * (x @ gate[head]).sigmoid()[..., None]
        attention.project_out.data = kept
    torch.testing.assert_close(got, whole, **EXACT)


def test_untied_projections_are_those_of_the_group_of_each_id(make_model, make_rows, run):
    untied, rows = make_model(untied_attention=True), make_rows()
    tied = make_model()
    shared = {n: p for n, p in untied.state_dict().items() if "attention.project" not in n}
    tied.load_state_dict(shared, strict=False)
    own = [untied.layers[n].attention for n in range(2)]
    assert own[0].project_in.shape == (3, 32, 16)
    with torch.no_grad():  # all groups alike: as if tied
        for mine, theirs in zip(own, [layer.attention for layer in tied.layers], strict=True):
            for name in ("project_in", "project_out"):
                getattr(theirs, name).copy_(getattr(mine, name)[0])
                getattr(mine, name).copy_(getattr(mine, name)[:1].clone())
    noisy = {"block": torch.where(rows.modality > 0, 0, -1), "limit": rows.position}
    torch.testing.assert_close(run(untied, rows, **noisy), run(tied, rows, **noisy), **EXACT)
    before = run(untied, rows, **noisy)
    with torch.no_grad():
        own[1].project_out[1] += 0.1  # of the visual group, in the last layer
    moved = (run(untied, rows, **noisy) - before).abs().amax(-1) > 1e-9
    visual = (rows.modality == Modality.IMAGE) | (rows.modality == Modality.VIDEO)
    assert torch.equal(moved, visual)


def test_stretched_positions_follow_the_wavelength(make_config):
    config = make_config(head_width=16, rope_base=500.0, rope_scaling=STRETCHED)
    one = torch.ones(1, 1, dtype=torch.int64)
    rotary = Rotary.at(one, config, torch.float64)
    expected = []
    for i in range(8):
        rate = 500.0 ** (-2 * i / 16)
        wave = 2 * math.pi / rate
        if wave > 64 / 1.0:
            rate = rate / 4
        elif wave > 64 / 4.0:
            share = (64 / wave - 1) / (4 - 1)
            rate = (1 - share) * rate / 4 + share * rate
        expected.append(rate)
    assert len({round(500 ** (-2 * i / 16) / e, 9) for i, e in enumerate(expected)}) == 3
    torch.testing.assert_close(rotary.sin.flatten(), torch.tensor(expected).double().sin())


def test_wrong_options_are_refused(make_config):
    with pytest.raises(UserError, match="head_width = 5; use an even"):
        make_config(head_width=5)
    with pytest.raises(UserError, match="0 < low < high"):
        RopeScaling(low_freq_factor=5.0)


@pytest.mark.parametrize("changes", UNDIVIDED)
def test_what_ranks_cannot_divide_is_refused(make_config, changes):
    parallel = ParallelConfig(tensor=2)
    parallel.check(make_config(), 2)
    with pytest.raises(UserError, match=f"model.{next(iter(changes))} = .* parallel.tensor = 1"):
        parallel.check(make_config(**changes), 2)
