"""LFQ and BSQ: the bit order is as said, and factorised entropies equal the dense ones."""

import pytest
import torch

from mmpt.tokenizers.binary import BSQ, LFQ, SHARPNESS


def _dense_entropies(quantizer: LFQ, bounded: torch.Tensor) -> list[torch.Tensor]:
    codes = torch.arange(quantizer.codebook_size)[:, None]
    codebook = quantizer.lookup(codes).sign().double() * quantizer.corner
    sharpness = SHARPNESS / (2 * quantizer.corner**2)
    chances = (sharpness * bounded @ codebook.T).softmax(-1)
    return [-torch.xlogy(p, p).sum(-1).mean() for p in (chances, chances.mean(0))]


@pytest.mark.parametrize("made", [LFQ, BSQ])
def test_factorised_entropies_equal_the_dense_ones(made: type[LFQ]) -> None:
    quantizer = made(256)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(40, 8, generator=generator, dtype=torch.float64) * 0.3
    bounded = quantizer.bound(latents)
    sure, spread = quantizer.entropies(bounded)
    dense_sure, dense_spread = _dense_entropies(quantizer, bounded)
    assert (sure - dense_sure).abs() < 1e-8
    assert spread >= dense_spread - 1e-8  # a bound from above
    for one in bounded[:5, None]:  # which is sharp where bits are independent
        assert (quantizer.entropies(one)[1] - _dense_entropies(quantizer, one)[1]).abs() < 1e-4


def test_the_first_dimension_is_the_least_significant_bit() -> None:
    latents = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0]])
    for quantizer in (LFQ(8), BSQ(8)):
        assert quantizer(latents).codes.flatten().tolist() == [1, 2, 4, 0]


def test_bsq_codes_are_unit_vectors() -> None:
    made = BSQ(64).lookup(torch.arange(64)[:, None])
    assert torch.allclose(made.norm(dim=-1), torch.ones(64))


@pytest.mark.parametrize("made", [LFQ, BSQ])
def test_the_entropy_term_spreads_vectors_over_the_codes(made: type[LFQ]) -> None:
    torch.manual_seed(0)
    quantizer = made(64, entropy_weight=1.0).train()
    latents = (torch.rand(128, 6) * 0.2 + 0.01).requires_grad_()  # all in one corner
    optimizer = torch.optim.Adam([latents], lr=0.05)
    assert len(quantizer(latents).codes.unique()) == 1
    for _ in range(50):
        optimizer.zero_grad()
        quantizer(latents).loss.backward()
        optimizer.step()
    assert len(quantizer(latents).codes.unique()) > 20
