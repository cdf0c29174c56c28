"""Index back-propagation: equal to the dense formula, in memory that does not grow with N x K."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.tokenizers import codebooks, ibq
from mmpt.tokenizers.ibq import IBQ, entropies, index_backpropagation


def dense(points: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The paper's formula as it stands, N x K."""
    chances = (points @ codebook.T).softmax(-1)
    hard = torch.nn.functional.one_hot(chances.argmax(-1), len(codebook)).to(chances)
    return (hard + chances - chances.detach()) @ codebook


@pytest.mark.parametrize("tile", [1, 100, 2**22])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_values_and_gradients_equal_the_dense_formula(
    tile: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ibq, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(24, 8, generator=generator, dtype=torch.float64) * scale
    codebook = torch.randn(130, 8, generator=generator, dtype=torch.float64)
    wanted = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    gradients, values = [], []
    for formula in (dense, lambda z, e: index_backpropagation(z, e, (z @ e.T).argmax(-1))):
        z, e = points.clone().requires_grad_(), codebook.clone().requires_grad_()
        out = formula(z, e)
        ((out - wanted) ** 2).sum().backward()
        values.append(out.detach())
        gradients.append((z.grad, e.grad))
    assert (values[0] - values[1]).abs().max() < 1e-8
    for plain, ours in zip(*gradients, strict=True):
        assert plain is not None
        assert ours is not None
        assert (plain - ours).abs().max() < 1e-8


def test_entropies_equal_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibq, "TILE", 200)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(15, 4, generator=generator, dtype=torch.float64) * 0.02
    codebook = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    gradients = []
    for formula in (entropies, _dense_entropies):
        z, e = points.clone().requires_grad_(), codebook.clone().requires_grad_()
        sure, spread = formula(z, e)
        (sure - 0.7 * spread).backward()
        gradients.append((sure.detach(), spread.detach(), z.grad, e.grad))
    for ours, plain in zip(*gradients, strict=True):
        assert (ours - plain).abs().max() < 1e-8


def _dense_entropies(points: torch.Tensor, codebook: torch.Tensor) -> list[torch.Tensor]:
    chances = (points @ codebook.T / ibq.TEMPERATURE).softmax(-1)
    share = chances.mean(0)
    return [-(p * p.log()).sum(-1).mean() for p in (chances, share)]


def test_entropies_of_codes_without_any_chance_have_a_gradient() -> None:
    codebook = torch.tensor([[100.0], [-100.0]], requires_grad=True)
    _, spread = entropies(torch.tensor([[50.0]]), codebook)
    spread.backward()
    assert codebook.grad is not None
    assert codebook.grad.isfinite().all()


def test_every_code_learns_in_every_step() -> None:
    torch.manual_seed(0)
    quantizer = IBQ(200, 8, entropy_weight=0.0).train()
    quantizer(torch.randn(4, 8)).latents.sum().backward()
    assert quantizer.codebook.grad is not None
    assert (quantizer.codebook.grad.abs().sum(-1) > 0).all()


def test_a_training_uses_more_of_the_codebook_and_loses_less() -> None:
    torch.manual_seed(0)
    quantizer = IBQ(64, 4).train()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    latents = torch.randn(256, 4)
    before = quantizer(latents)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(latents).loss.backward()
        optimizer.step()
    after = quantizer(latents)
    assert after.loss < 0.8 * before.loss
    assert len(after.codes.unique()) > 10


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_no_step_ever_holds_batch_times_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibq, "TILE", 2**15)
    monkeypatch.setitem(codebooks.TILE, "cpu", 2**15)
    monkeypatch.setattr(codebooks, "MIN_POINTS", 4)
    quantizer = IBQ(8192, 4).train()
    latents = torch.randn(500, 4, requires_grad=True)
    with _Largest() as largest:
        out = quantizer(latents)
        (out.loss + out.latents.sum()).backward()
    assert latents.grad is not None
    assert largest.numel <= 2**15  # the codebook itself; dense would be 2^22
