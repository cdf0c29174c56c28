"""`mmpt bench codecs`: quantisers beside vector-quantize-pytorch's, overhead, memory, throughput.

Both sides run in inference mode, without losses; their codes are compared before they are timed.
"""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mmpt.bench.harness import Comparison, Row, best_seconds, compare, run_rows
from mmpt.config import UserError
from mmpt.tokenizers.base import codec_names, load_codec
from mmpt.tokenizers.codebooks import nearest_centre
from mmpt.tokenizers.image import ImageCodec
from mmpt.tokenizers.quantize import Quantizer, QuantizerConfig, build_quantizer
from mmpt.tokenizers.speech import SpeechCodec
from mmpt.tokenizers.video import VideoCodec

log = logging.getLogger(__name__)

PEER = "vector-quantize-pytorch"
BATCH, SIDE = 32, 64  # pictures, and pixels a side
NUM_VECTORS = BATCH * 64  # codes of as many pictures
FRAME_RATE = 25.0  # of real time
SECONDS = 8.0  # of sound
FRAMES = 17  # of video
MAX_GIB = 4.0  # what a training step of IBQ may take


def codecs(device: str) -> list[Row]:
    """All rows, on a device."""
    return run_rows(_rows(device))


def _rows(device: str) -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.inference_mode():
        for case, config, peer in _quantizers():
            yield _quantizer_row(case, config, peer.to(device).eval(), device)
        yield from _search_rows(device)
        yield from _overhead_rows(device)
        yield from _throughput_rows(device)
    yield _memory_row(device)


# quantisers of the same shape


def _quantizers() -> Iterator[tuple[str, QuantizerConfig, nn.Module]]:
    """(case, ours, the peer of the same shape at its fastest settings)."""
    try:
        import vector_quantize_pytorch as peers
    except ImportError:
        raise UserError(f"this needs {PEER}: pip install 'mmpt[test]'") from None
    for levels in ((8, 8, 8), (8, 8, 8, 6, 5)):
        config = QuantizerConfig(kind="fsq", levels=levels)
        yield f"fsq {'x'.join(map(str, levels))}", config, peers.FSQ(list(levels))
    plain = {"commitment_weight": 0.0, "rotation_trick": False}
    for size, width in ((512, 16), (2048, 16), (16_384, 8)):
        config = QuantizerConfig(kind="ema", codebook_size=size, width=width)
        peer = peers.VectorQuantize(dim=width, codebook_size=size, use_cosine_sim=True, **plain)
        yield f"ema {size} x {width}", config, peer
    config = QuantizerConfig(kind="simvq", codebook_size=4096, width=8)
    peer = peers.SimVQ(dim=8, codebook_size=4096, rotation_trick=False)
    yield "simvq 4096 x 8", config, peer
    for kind in ("lfq", "bsq"):
        config = QuantizerConfig(kind=kind, codebook_size=2**14)
        yield f"{kind} 2^14", config, peers.LFQ(codebook_size=2**14, spherical=kind == "bsq")
    config = QuantizerConfig(kind="ema", codebook_size=1024, width=16, num_codebooks=8)
    peer = peers.ResidualVQ(dim=16, codebook_size=1024, num_quantizers=8, **plain)
    yield "residual ema 8 x 1024 x 16", config, peer


def _quantizer_row(case: str, config: QuantizerConfig, peer: nn.Module, device: str) -> Row:
    ours = build_quantizer(config).to(device).eval()
    _share_codebook(ours, peer)
    latents = torch.randn(BATCH, NUM_VECTORS // BATCH, ours.width, device=device)
    _show_equal(case, ours(latents).latents, peer(latents)[0])
    result = compare(lambda: ours(latents), lambda: peer(latents), device=device)
    return _timed_row(f"quantise {NUM_VECTORS}, {case}", result, PEER, device)


def _share_codebook(ours: Quantizer, peer: Any) -> None:
    """Give the peer the codebook of ours, where there is one."""
    if hasattr(ours, "layers"):
        for mine, layer in zip(ours.layers, peer.layers, strict=True):  # type: ignore[arg-type]
            _share_codebook(mine, layer)
    elif hasattr(ours, "frozen"):
        peer.frozen_codebook.copy_(ours.frozen)
        peer.code_transform.weight.copy_(ours.weight.T)  # type: ignore[union-attr] # a matrix
    elif hasattr(ours, "initialised"):
        ours.initialised.fill_(True)  # type: ignore[operator] # a tensor
        peer.codebook = ours.codebook


def _show_equal(case: str, ours: Tensor, peer: Tensor) -> None:
    """Vectors that lie between two codes may go to either, but to hardly any other."""
    same = (ours - peer).abs().amax(-1) < 1e-4
    if same.float().mean() < 0.999:
        raise RuntimeError(f"{case}: {int((~same).sum())} of {same.numel()} vectors differ")


def _timed_row(case: str, result: Comparison, peer_name: str, device: str) -> Row:
    return Row(
        case=case,
        device=device,
        dtype="fp32",
        unit="ms",
        ours=result.ours * 1e3,
        peer=result.peer * 1e3,
        peer_name=peer_name,
        ratio=result.ratio,
        low=result.low,
        high=result.high,
    )


# the search alone


def _search_rows(device: str) -> Iterator[Row]:
    from vector_quantize_pytorch import VectorQuantize

    for size, width in ((16_384, 8),):
        peer = VectorQuantize(dim=width, codebook_size=size).to(device).eval()
        points = torch.randn(NUM_VECTORS, width, device=device)
        centres = torch.randn(size, width, device=device)
        peer.codebook = centres
        peers = {
            PEER: lambda peer=peer, points=points: peer._codebook(points[None])[1][0],
            "torch, one matrix product": partial(_plain_search, points, centres),
        }
        for name, search in peers.items():
            case = f"nearest of {size} x {width}"
            _show_equal(case, centres[nearest_centre(points, centres)], centres[search()])
            ours = partial(nearest_centre, points, centres)
            yield _timed_row(case, compare(ours, search, device=device), name, device)


def _plain_search(points: Tensor, centres: Tensor) -> Tensor:
    return (points @ centres.T - centres.square().sum(-1) / 2).argmax(-1)


# what a quantiser costs beside the networks around it


def _overhead_rows(device: str) -> Iterator[Row]:
    codec = shipped(ImageCodec)
    if codec is None:
        return
    codec = codec.to(device)
    pixels = torch.rand(BATCH, 3, SIDE, SIDE, device=device) * 2 - 1
    for config in (
        QuantizerConfig(kind="ema", codebook_size=16_384, width=16),
        QuantizerConfig(kind="fsq", levels=(8, 8, 8, 6, 5)),
    ):
        quantizer = build_quantizer(config).to(device).eval()
        if hasattr(quantizer, "initialised"):
            quantizer.initialised.fill_(True)  # type: ignore[operator] # a tensor
        width = quantizer.width
        shrink = nn.Conv2d(codec.config.encoder_width, width, 1).to(device)
        grow = nn.Conv2d(width, codec.config.decoder_width, 3, padding=1).to(device)
        stack = partial(_stack, codec, shrink, grow)
        whole = partial(stack, quantizer, pixels)
        result = compare(whole, partial(stack, None, pixels), device=device)
        case = f"{BATCH} pictures, {config.kind} {quantizer.codebook_size} x {width}"
        yield _timed_row(case, result, "the same without quantiser", device)


def _stack(
    codec: ImageCodec, shrink: nn.Module, grow: nn.Module, quantizer: Quantizer | None, x: Tensor
) -> Tensor:
    latents = shrink(codec.encoder(x))
    if quantizer is not None:
        out = quantizer(rearrange(latents, "b d h w -> b h w d"))
        latents = rearrange(out.latents, "b h w d -> b d h w")
    return codec.decoder(grow(latents))


# shipped codecs against real time


def _throughput_rows(device: str) -> Iterator[Row]:
    for kind in (ImageCodec, VideoCodec, SpeechCodec):
        codec = shipped(kind)
        if codec is None:
            continue
        codec = codec.to(device)
        media, amount, real_time = _medium(kind)
        codes = codec.encode(media)
        runs = {"encode": partial(codec.encode, media), "decode": partial(codec.decode, codes)}
        for verb, run in runs.items():
            yield _rate_row(f"{codec.name} {verb}", run, amount, real_time, device)


def _medium(kind: type) -> tuple[Tensor, float, tuple[str, float]]:
    """(a batch of one medium, how much it is, (unit of its rate, the rate of real time))."""
    if kind is ImageCodec:
        return torch.rand(8, 3, SIDE, SIDE) * 2 - 1, 8.0, ("pictures/s", FRAME_RATE)
    if kind is VideoCodec:
        return torch.rand(1, FRAMES, 3, SIDE, SIDE) * 2 - 1, FRAMES, ("frames/s", FRAME_RATE)
    wave = torch.randn(1, int(SECONDS * SpeechCodec.sample_rate)) * 0.1
    return wave.clamp(-1, 1), SECONDS, ("s/s", 1.0)


def _rate_row(
    case: str,
    run: Callable[[], Any],
    amount: float,
    real_time: tuple[str, float],
    device: str,
) -> Row:
    unit, peer = real_time
    best, parts = best_seconds(run, device=device)
    return Row(
        case=case,
        device=device,
        dtype="fp32",
        unit=unit,
        ours=amount / best,
        peer=peer,
        peer_name="real time",
        ratio=amount / best / peer,
        low=amount / max(parts) / peer,
        high=amount / best / peer,
    )


def shipped(kind: type) -> Any:
    """The first shipped codec of a kind; None when none is installed."""
    for name in codec_names():
        codec = load_codec(name)
        if isinstance(codec, kind):
            return codec
    log.warning("no %s is shipped here: its rows are left out", kind.__name__)
    return None


# memory

TRAINING_STEP = """
import resource, sys, torch
from mmpt.tokenizers.ibq import IBQ
device = sys.argv[1]
quantizer = IBQ(131_072, 256).to(device).train()
optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-4)
latents = torch.randn(4, 256, 256, device=device, requires_grad=True)
out = quantizer(latents)
(out.loss + out.latents.square().mean()).backward()
optimizer.step()
if device.startswith("cuda"):
    print(torch.cuda.max_memory_allocated())
else:
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def _memory_row(device: str) -> Row:
    """The whole process of one training step, its optimiser included, in a process of its own."""
    command: list[str] = [sys.executable, "-c", TRAINING_STEP, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout) / 2**30
    return Row(
        case="ibq 131072 x 256, step of 4 x 256 vectors, peak memory",
        device=device,
        dtype="fp32",
        unit="GiB",
        ours=peak,
        peer=MAX_GIB,
        peer_name="limit",
        ratio=MAX_GIB / peak,
        low=MAX_GIB / peak,
        high=MAX_GIB / peak,
    )
