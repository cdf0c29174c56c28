"""Quantisers: legal codes for any latents, the codebook stays alive, autocast changes nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpt.tokenizers.quantize import FSQ, EMAVectorQuantizer, kmeans, nearest_centre


@given(
    levels=st.lists(st.integers(2, 40), min_size=1, max_size=3).map(tuple),
    scale=st.sampled_from([0, 1, 1e4]),
)
def test_fsq_codes_are_legal_and_invert(levels: tuple[int, ...], scale: float) -> None:
    fsq = FSQ(levels)
    out = fsq(torch.randn(64, len(levels)) * scale)
    assert out.codes.min() >= 0
    assert out.codes.max() < fsq.codebook_size
    assert torch.allclose(fsq.lookup(out.codes), out.latents)


@pytest.mark.parametrize("levels", [(8, 8, 8), (7, 5, 5), (3,), (2, 27)])
def test_every_fsq_code_is_its_own_nearest(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    codes = torch.arange(fsq.codebook_size)[:, None]
    assert len(fsq.lookup(codes).unique(dim=0)) == fsq.codebook_size


def test_fsq_passes_the_gradient_through_the_rounding() -> None:
    latents = torch.zeros(4, 3, requires_grad=True)
    FSQ((8, 5, 5))(latents).latents.sum().backward()
    assert latents.grad is not None
    assert (latents.grad > 0).all()


def test_autocast_changes_no_code() -> None:
    latents = torch.randn(256, 3) * 2
    fsq = FSQ((8, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = fsq(latents).codes
    assert torch.equal(inside, fsq(latents).codes)


def test_dead_codes_are_restarted_even_with_few_vectors() -> None:
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(32, 4)
    quantizer.initialise(torch.randn(200, 4), torch.Generator().manual_seed(0))
    quantizer.counts[:20] = 0.0
    quantizer.train()
    points = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    quantizer(points)  # 8 vectors for 20 dead codes
    assert (quantizer.counts >= 0.1).all()
    similar = quantizer.codebook[:20] @ points.T
    assert (similar.max(dim=1).values > 0.99).sum() >= 12
    assert torch.allclose(quantizer.codebook.norm(dim=-1), torch.ones(32), atol=1e-5)


def test_latents_pass_until_the_codebook_is_initialised() -> None:
    quantizer = EMAVectorQuantizer(16, 4)
    latents = torch.randn(5, 4)
    assert torch.allclose(
        quantizer(latents).latents, torch.nn.functional.normalize(latents, dim=-1)
    )
    with pytest.raises(ValueError, match="too few"):
        quantizer.initialise(latents, torch.Generator())


def test_kmeans_finds_planted_centres() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = planted.repeat_interleave(50, 0) + torch.randn(150, 2, generator=generator) * 0.1
    centres, counts = kmeans(points, 3, generator)
    assert counts.sum() == 150
    assert (torch.cdist(planted, centres).min(dim=1).values < 3).sum() >= 2
    assert nearest_centre(points, centres).shape == (150,)
