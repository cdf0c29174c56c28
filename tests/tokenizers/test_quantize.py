"""Quantisers of every kind keep one contract: legal codes, exact lookups, fp32, a gradient."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.tokenizers.quantize import (
    FSQ,
    Quantizer,
    QuantizerConfig,
    ResidualQuantizer,
    build_quantizer,
)

KINDS = {
    "fsq": QuantizerConfig(kind="fsq", levels=(8, 5, 5)),
    "ema": QuantizerConfig(kind="ema", codebook_size=48, width=4),
    "simvq": QuantizerConfig(kind="simvq", codebook_size=48, width=4),
    "ibq": QuantizerConfig(kind="ibq", codebook_size=48, width=4),
    "lfq": QuantizerConfig(kind="lfq", codebook_size=64),
    "bsq": QuantizerConfig(kind="bsq", codebook_size=64),
}
EVERY = [(kind, num_codebooks) for kind in KINDS for num_codebooks in (1, 3)]


def build(kind: str, num_codebooks: int = 1, **options: object) -> Quantizer:
    """An initialised quantiser, out of training."""
    torch.manual_seed(0)
    config = {**vars(KINDS[kind]), "num_codebooks": num_codebooks, **options}
    quantizer = build_quantizer(QuantizerConfig(**config))
    generator = torch.Generator().manual_seed(0)
    quantizer.initialise(torch.randn(300, quantizer.width), generator)
    return quantizer.eval()


@pytest.mark.parametrize(("kind", "num_codebooks"), EVERY)
@settings(deadline=None, max_examples=15)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e38]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    training=st.booleans(),
)
def test_codes_are_legal_and_latents_are_their_lookup(
    kind: str,
    num_codebooks: int,
    shape: list[int],
    scale: float,
    dtype: torch.dtype,
    training: bool,
) -> None:
    quantizer = build(kind, num_codebooks)
    latents = (torch.randn(*shape, quantizer.width).clamp(-3, 3) * scale).to(dtype)
    codes = quantizer(latents).codes
    out = quantizer.train(training)(latents)
    assert torch.equal(out.codes, codes)
    assert codes.shape == (*shape, num_codebooks)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < quantizer.codebook_size
    assert out.latents.dtype == torch.float32
    assert out.latents.isfinite().all()
    assert out.loss.isfinite()
    if kind != "ema" or not training:  # whose codebook has moved
        assert torch.equal(out.latents, quantizer.eval().lookup(codes))


@pytest.mark.parametrize(("kind", "num_codebooks"), EVERY)
def test_autocast_changes_nothing(kind: str, num_codebooks: int) -> None:
    quantizer, latents = build(kind, num_codebooks), torch.randn(128, 9)
    latents = latents[:, : quantizer.width].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(latents)
    (inside.latents.square().sum() + inside.loss).backward()
    assert latents.grad is not None
    gradient, latents.grad = latents.grad, None
    outside = quantizer(latents)
    (outside.latents.square().sum() + outside.loss).backward()
    assert torch.equal(inside.codes, outside.codes)
    assert torch.equal(inside.latents, outside.latents)
    assert torch.equal(gradient, latents.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_its_own_nearest(kind: str) -> None:
    quantizer = build(kind)
    codes = torch.arange(quantizer.codebook_size)[:, None]
    made = quantizer.lookup(codes)
    assert len(made.unique(dim=0)) == quantizer.codebook_size
    if kind == "ibq":  # the largest product, not the nearest
        return
    found = quantizer.snap(made).codes
    assert torch.equal(found, codes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "num_codebooks"), EVERY)
def test_the_encoder_gets_a_gradient_even_from_a_frozen_quantiser(
    kind: str, num_codebooks: int, training: bool
) -> None:
    quantizer = build(kind, num_codebooks).requires_grad_(False).train(training)
    latents = torch.randn(64, quantizer.width, requires_grad=True)
    wanted = torch.randn(64, quantizer.width)
    (quantizer(latents).latents * wanted).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    if kind in ("lfq", "simvq"):  # whose bound is the identity: straight through, once
        assert torch.allclose(latents.grad, wanted)


@pytest.mark.parametrize(("kind", "num_codebooks"), EVERY)
def test_no_loss_is_computed_where_no_gradient_is_wanted(kind: str, num_codebooks: int) -> None:
    quantizer = build(kind, num_codebooks)
    with torch.inference_mode():
        out = quantizer(torch.randn(8, quantizer.width))
    assert out.loss == 0
    assert out.parts == {}


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_is_loaded_gives_the_same_codes(kind: str) -> None:
    quantizer, other = build(kind, 2), build(kind, 2)
    with torch.no_grad():
        for tensor in quantizer.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.randn(tensor.shape) * 0.1
    latents = torch.randn(64, quantizer.width)
    other(latents)  # whatever it keeps from before the load must go
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(latents).codes, quantizer(latents).codes)


@pytest.mark.parametrize("kind", ["fsq", "ema", "lfq", "bsq"])
def test_the_error_shrinks_with_every_codebook(kind: str) -> None:
    quantizer = build(kind, 4)
    latents = torch.randn(500, quantizer.width)
    target, codes = quantizer.bound(latents), quantizer(latents).codes
    errors = [
        float((quantizer.lookup(codes[:, : count + 1]) - target).square().mean().detach())
        for count in range(4)
    ]
    assert all(after < before * 0.8 for before, after in pairwise(errors))


@pytest.mark.parametrize("kind", ["simvq", "ibq"])
def test_the_error_of_trained_residual_codebooks_shrinks_with_every_one(kind: str) -> None:
    quantizer = build(kind, 3).train()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    latents = torch.randn(256, quantizer.width)
    for _ in range(80):
        optimizer.zero_grad()
        quantizer(latents).loss.backward()
        optimizer.step()
    codes = quantizer.eval()(latents).codes
    made = [quantizer.lookup(codes[:, : count + 1]) for count in range(3)]
    errors = [float((each - latents).square().mean().detach()) for each in made]
    assert errors[0] > errors[1] > errors[2]


def test_dropout_uses_the_first_codebooks_only_and_only_in_training() -> None:
    quantizer, latents = build("fsq", 3, dropout=0.9), torch.randn(16, 3)
    codes = quantizer(latents).codes
    wanted = [quantizer.lookup(codes[:, :count]) for count in (1, 2, 3)]
    quantizer.train()
    seen = set()
    for _ in range(60):
        made = quantizer(latents).latents
        seen |= {i for i, each in enumerate(wanted) if torch.equal(made, each)}
    assert seen == {0, 1, 2}
    assert torch.equal(quantizer.eval()(latents).latents, wanted[2])


def test_residual_latents_pass_until_all_codebooks_are_there() -> None:
    quantizer = build_quantizer(
        QuantizerConfig(kind="ema", codebook_size=16, width=4, num_codebooks=2)
    )
    latents = torch.randn(40, 4)
    assert not quantizer.ready
    assert torch.equal(quantizer(latents).latents, latents)
    quantizer.train().initialise(latents, torch.Generator().manual_seed(0))
    assert quantizer.ready
    assert quantizer.training
    assert isinstance(quantizer, ResidualQuantizer)
    assert [float(layer.counts.sum()) for layer in quantizer.layers] == pytest.approx([16, 16])


@given(
    levels=st.lists(st.integers(2, 40), min_size=1, max_size=3).map(tuple),
    scale=st.sampled_from([0, 1, 1e4]),
)
def test_fsq_codes_are_legal_for_any_levels(levels: tuple[int, ...], scale: float) -> None:
    fsq = FSQ(levels)
    out = fsq(torch.randn(64, len(levels)) * scale)
    assert out.codes.min() >= 0
    assert out.codes.max() < fsq.codebook_size
    assert torch.equal(fsq.lookup(out.codes), out.latents)


@pytest.mark.parametrize("levels", [(8, 8, 8), (7, 5, 5), (3,), (2, 27), (2001,), (5000, 2)])
def test_fsq_reaches_its_outer_levels_and_no_others(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    ends = torch.tensor([[-1e9] * len(levels), [1e9] * len(levels)])
    assert fsq(ends).codes.flatten().tolist() == [0, fsq.codebook_size - 1]
    codes = torch.arange(fsq.codebook_size)[:, None]
    assert torch.equal(fsq.snap(fsq.lookup(codes)).codes, codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fsq", "levels": (8, 1)}, "at least 2"),
        ({"kind": "fsq", "levels": ()}, "give one or more"),
        ({"kind": "ema", "codebook_size": 16}, "width of 1 or more"),
        ({"kind": "ibq", "codebook_size": 1, "width": 4}, "2 or more"),
        ({"kind": "lfq", "codebook_size": 48}, "power of 2"),
        ({"kind": "bsq", "codebook_size": 1}, "power of 2"),
        ({"kind": "lfq", "codebook_size": 64, "width": 5}, "leave it out"),
        ({"kind": "fsq", "levels": (8,), "num_codebooks": 0}, "1 or more"),
        ({"kind": "fsq", "levels": (8,), "num_codebooks": 2, "dropout": 1.0}, "dropout"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_quantizer(QuantizerConfig(**options))
    assert "\n" not in str(caught.value)
