"""Learned codebooks: the search is right, codes stay alive, ranks agree, SimVQ moves as a whole."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmpt.tokenizers import codebooks
from mmpt.tokenizers.codebooks import (
    EMAVectorQuantizer,
    SimVQ,
    kmeans,
    most_similar,
    nearest_centre,
)


@settings(deadline=None, max_examples=40)
@given(
    num_points=st.integers(0, 70),
    num_centres=st.integers(1, 200),
    width=st.integers(1, 5),
    tile=st.sampled_from([1, 64, 2**18]),
    most=st.sampled_from([7, 16_384]),
    seed=st.integers(0, 99),
)
def test_the_search_equals_the_plain_one_whatever_the_tiles(
    num_points: int, num_centres: int, width: int, tile: int, most: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # small integers: products are exact, and many centres tie
    points = torch.randint(-3, 4, (num_points, width), generator=generator).float()
    centres = torch.randint(-3, 4, (num_centres, width), generator=generator).float()
    bias = centres.square().sum(-1) / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codebooks.TILE, "cpu", tile)
        patch.setattr(codebooks, "MIN_POINTS", 5)
        patch.setattr(codebooks, "MAX_CODES", most)
        assert torch.equal(most_similar(points, centres), (points @ centres.T).argmax(-1))
        plain = (points @ centres.T - bias).argmax(-1)
        assert torch.equal(nearest_centre(points, centres), plain)


def test_kmeans_finds_planted_centres() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = planted.repeat_interleave(50, 0) + torch.randn(150, 2, generator=generator) * 0.1
    centres, counts = kmeans(points, 3, generator)
    assert counts.sum() == 150
    assert (torch.cdist(planted, centres).min(dim=1).values < 3).sum() >= 2
    assert nearest_centre(points, centres).shape == (150,)


def ready(num_codes: int, *, spherical: bool = True) -> EMAVectorQuantizer:
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(num_codes, 4, spherical=spherical)
    quantizer.initialise(torch.randn(200, 4), torch.Generator().manual_seed(0))
    return quantizer.train()


@pytest.mark.parametrize("spherical", [True, False])
def test_dead_codes_are_restarted_even_with_few_vectors(spherical: bool) -> None:
    quantizer = ready(32, spherical=spherical)
    quantizer.counts[:20] = 0.0
    points = torch.randn(8, 4)
    quantizer(points)  # 8 vectors for 20 dead codes
    assert (quantizer.counts >= 0.1).all()
    distance = torch.cdist(quantizer.codebook[:20], quantizer.bound(points)).min(dim=1).values
    assert (distance < 0.1).sum() >= 12
    if spherical:
        assert torch.allclose(quantizer.codebook.norm(dim=-1), torch.ones(32), atol=1e-5)


def test_a_restarted_code_stays_where_it_was_put() -> None:
    quantizer = ready(32)
    quantizer.counts[:5] = 0.0
    points = torch.randn(64, 4)
    quantizer(points)
    put = quantizer.codebook[:5].clone()
    quantizer(points)
    assert (quantizer.counts[:5] >= 0.1).all()
    assert ((quantizer.codebook[:5] * put).sum(-1) > 0.9).all()
    assert len(set(quantizer.eval()(points).codes.flatten().tolist()) & set(range(5))) >= 3


@pytest.mark.parametrize("spherical", [True, False])
def test_the_codebook_moves_towards_what_it_sees(spherical: bool) -> None:
    quantizer = ready(8, spherical=spherical)
    points = F.normalize(torch.randn(300, 4) + 1.0, dim=-1)
    before = float(quantizer(points).loss)
    for _ in range(60):
        after = float(quantizer(points).loss)
    assert after < 0.9 * before


def test_a_batch_that_is_not_finite_leaves_the_codebook_alone() -> None:
    quantizer = ready(8)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.full((5, 4), torch.nan))
    quantizer(torch.zeros(0, 4))
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


def test_latents_pass_until_the_codebook_is_initialised() -> None:
    quantizer, latents = EMAVectorQuantizer(16, 4), torch.randn(5, 4)
    assert torch.allclose(quantizer(latents).latents, F.normalize(latents, dim=-1))
    with pytest.raises(ValueError, match="too few"):
        quantizer.initialise(latents, torch.Generator())


def _one_rank(rank: int, folder: Path, halves: list[torch.Tensor]) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), len(halves))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(halves))
    quantizer = ready(32)
    quantizer.counts[:20] = 0.0
    torch.manual_seed(rank)  # every rank would pick other vectors
    quantizer(halves[rank])
    made: dict[str, Any] = quantizer.state_dict()
    torch.save(made, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_keep_one_codebook_and_count_all_vectors(tmp_path: Path) -> None:
    points = torch.randn(40, 4)
    halves = [points[:25], points[25:]]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_one_rank, args=(r, tmp_path, halves)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = ready(32)
    alone.counts[:20] = 0.0
    torch.manual_seed(0)
    alone(points)
    assert torch.allclose(first["counts"], alone.counts, atol=1e-5)
    assert torch.allclose(first["sums"][20:], alone.sums[20:], atol=1e-5)


def test_simvq_moves_every_code_in_one_step() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(64, 4).train()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    before = quantizer.codebook.clone()
    quantizer(torch.randn(3, 4)).loss.backward()  # three vectors, so three codes at most
    optimizer.step()
    assert ((quantizer.codebook - before).abs().sum(-1) > 0).all()
    assert [name for name, _ in quantizer.named_parameters()] == ["weight"]


def test_simvq_bakes_its_table_once_and_anew_when_a_factor_changes() -> None:
    quantizer = SimVQ(64, 4).eval()
    with torch.inference_mode():
        table = quantizer.codebook
    assert quantizer.codebook is table
    wanted = torch.nn.Linear(4, 2)  # a decoder can train on what inference baked
    wanted(quantizer.lookup(torch.arange(8)[:, None])).sum().backward()
    with torch.no_grad():
        quantizer.weight.mul_(2)
    assert torch.allclose(quantizer.codebook, 2 * table)
    quantizer.load_state_dict({"frozen": torch.zeros(64, 4), "weight": torch.eye(4)})
    assert not quantizer.codebook.any()
