"""What vector-quantize-pytorch implements too gives the same values and codes here."""

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from mmpt.tokenizers.binary import BSQ, LFQ
from mmpt.tokenizers.codebooks import EMAVectorQuantizer, SimVQ
from mmpt.tokenizers.quantize import FSQ, QuantizerConfig, build_quantizer

peers = pytest.importorskip("vector_quantize_pytorch")
# no latent lies within rounding of a border between two codes
LATENTS = torch.randn(1, 500, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5, 5), (8, 8, 8, 6, 5), (3, 27)])
def test_fsq_values_and_codes(levels: tuple[int, ...]) -> None:
    latents = LATENTS[..., : len(levels)] * 2
    values, codes = peers.FSQ(list(levels)).eval()(latents)
    ours = FSQ(levels)(latents)
    assert torch.equal(ours.codes[..., 0], codes.long())
    assert torch.allclose(ours.latents, values, atol=1e-6)
    gradients = []
    for quantize in (lambda z: FSQ(levels)(z).latents, lambda z: peers.FSQ(list(levels))(z)[0]):
        leaf = latents.clone().requires_grad_()
        quantize(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize(("made", "spherical"), [(LFQ, False), (BSQ, True)])
def test_lfq_and_bsq_codes_up_to_the_bit_order(made: type[LFQ], spherical: bool) -> None:
    theirs = peers.LFQ(codebook_size=256, dim=8, spherical=spherical).eval()
    values, codes, _ = theirs(LATENTS)
    ours = made(256).eval()(LATENTS)
    bits = ours.codes >> torch.arange(8) & 1  # least significant first; theirs is the last
    assert torch.equal((bits * 2 ** torch.arange(7, -1, -1)).sum(-1), codes.long())
    assert torch.allclose(ours.latents, values, atol=1e-6)


@pytest.mark.parametrize("spherical", [True, False])
def test_nearest_codes_of_one_codebook(spherical: bool) -> None:
    ours = EMAVectorQuantizer(300, 8, spherical=spherical).eval()
    ours.initialised.fill_(True)
    theirs = peers.VectorQuantize(dim=8, codebook_size=300, use_cosine_sim=spherical).eval()
    theirs.codebook = ours.codebook
    values, codes, _ = theirs(LATENTS)
    out = ours(LATENTS)
    assert torch.equal(out.codes[..., 0], codes)
    assert torch.allclose(out.latents, values, atol=1e-5)


def test_simvq_codes_and_loss() -> None:
    torch.manual_seed(0)
    ours = SimVQ(300, 8)
    theirs = peers.SimVQ(dim=8, codebook_size=300, rotation_trick=False)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(8, 8))
        theirs.frozen_codebook.copy_(ours.frozen)
        theirs.code_transform.weight.copy_(ours.weight.T)
    values, codes, loss = theirs(LATENTS)
    out = ours(LATENTS)
    assert torch.equal(out.codes[..., 0], codes)
    assert torch.allclose(out.latents, values, atol=1e-5)
    assert torch.allclose(out.loss, loss, atol=1e-5)


def test_residual_codes_of_the_same_codebooks() -> None:
    config = QuantizerConfig(kind="ema", codebook_size=64, width=8, num_codebooks=4)
    ours = build_quantizer(config)
    ours.initialise(LATENTS[0], torch.Generator().manual_seed(0))
    theirs = peers.ResidualVQ(dim=8, codebook_size=64, num_quantizers=4).eval()
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):  # type: ignore[arg-type]
        layer.codebook = mine.codebook
    values, codes, _ = theirs(LATENTS)
    out = ours.eval()(LATENTS)
    assert torch.equal(out.codes, codes)
    assert torch.allclose(out.latents, values, atol=1e-5)
    assert torch.allclose(theirs.get_output_from_indices(codes), ours.lookup(codes), atol=1e-5)


def test_the_sphere_of_ours_is_the_one_of_theirs() -> None:
    out = EMAVectorQuantizer(16, 8)(LATENTS)
    flat = rearrange(out.latents, "b n d -> (b n) d")
    assert torch.allclose(flat, F.normalize(LATENTS[0], dim=-1), atol=1e-6)
