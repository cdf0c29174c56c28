"""Image codecs of every shape: the contract, any size, tiles without seams, older formats."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.parts import Image, load_part
from mmpt.processor import Processor
from mmpt.tokenizers.base import codec_folder, load_codec
from mmpt.tokenizers.evaluate import roundtrip
from mmpt.tokenizers.image import ImageCodec, ImageCodecConfig, check_pixels, tiles
from mmpt.tokenizers.presets import PRESETS, list_presets, preset_config
from mmpt.tokenizers.quantize import QuantizerConfig

few = settings(max_examples=5, deadline=None)
sides = st.tuples(st.integers(1, 4), st.integers(1, 4))
CODECS = ["image-f8", *PRESETS, "two-codebooks"]

# as it was shipped in format 1
FORMAT_1 = """{
 "format_version": 1,
 "kind": "image",
 "levels": [
  8,
  8,
  8
 ],
 "encoder_width": 160,
 "decoder_width": 224,
 "decoder_blocks": 3
}
"""


def tiny(**changes: Any) -> ImageCodecConfig:
    """Few channels and blocks."""
    least = ImageCodecConfig(encoder_width=32, encoder_blocks=1, decoder_width=32, decoder_blocks=1)
    return replace(least, **changes)


def random_codec(config: ImageCodecConfig) -> ImageCodec:
    """A codec of random weights, whose residual branches do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = ImageCodec(config)
        with torch.no_grad():
            for parameter in codec.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        width = codec.quantizer.width
        codec.quantizer.initialise(torch.randn(600, width, generator=generator), generator)
    return codec.eval()


@cache
def codec_of(name: str) -> ImageCodec:
    """The shipped codec, or a narrow one of a preset's shape."""
    if name == "image-f8":
        codec = load_codec(name)
        assert isinstance(codec, ImageCodec)
        return codec
    if name == "two-codebooks":
        quantizer = QuantizerConfig(kind="ema", codebook_size=32, width=4, num_codebooks=2)
        return random_codec(tiny(quantizer=quantizer))
    config = replace(
        preset_config(name, encoder_width=32, decoder_width=32), encoder_blocks=1, decoder_blocks=1
    )
    quantizer = config.quantizer
    if quantizer.codebook_size > 256:  # of lfq the width follows
        width = 8 if quantizer.kind == "lfq" else quantizer.width
        config = replace(config, quantizer=replace(quantizer, codebook_size=256, width=width))
    return random_codec(config)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", CODECS)
@few
@given(grid=sides, batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_sides_any_batch_and_autocast_give_the_codes_of_the_single_picture(
    name: str, grid: tuple[int, int], batch: int, seed: int
) -> None:
    codec = codec_of(name)
    pixels = noise(batch, 3, *(side * codec.factor for side in grid), seed=seed)
    codes = codec.encode(pixels)
    assert codes.shape == (batch, *grid, codec.num_codebooks)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < codec.codebook_size
    with torch.autocast("cpu", torch.bfloat16):
        singles = [codec.encode(picture[None]) for picture in pixels]
        made = codec.decode(codes)
    assert torch.equal(codes, torch.cat(singles))
    assert torch.equal(made, torch.cat([codec.decode(single) for single in singles]))
    assert made.shape == pixels.shape
    stream = codec.stream()
    assert torch.equal(torch.cat([stream.push(pixels[:1]), stream.push(pixels[1:])]), codes)
    assert stream.flush().shape[-1] == codec.num_codebooks


@pytest.mark.parametrize("name", CODECS)
@few
@given(grid=sides, seed=st.integers(0, 99))
def test_every_legal_code_decodes_and_every_other_is_refused(
    name: str, grid: tuple[int, int], seed: int
) -> None:
    codec, generator = codec_of(name), torch.Generator().manual_seed(seed)
    shape = (1, *grid, codec.num_codebooks)
    codes = torch.randint(codec.codebook_size, shape, generator=generator)
    pixels = codec.decode(codes)
    assert torch.isfinite(pixels).all()
    assert pixels.abs().max() <= 1
    for bad in (-1, codec.codebook_size):
        wrong = codes.clone()
        wrong[0, -1, -1, -1] = bad
        with pytest.raises(UserError, match="must be in"):
            codec.decode(wrong)
    with pytest.raises(UserError, match=f"the last of size {codec.num_codebooks}"):
        codec.decode(torch.cat([codes, codes], dim=-1))


@pytest.mark.parametrize("name", CODECS)
def test_a_saved_codec_gives_the_same_codes_and_fingerprint(name: str, tmp_path: Path) -> None:
    codec_of(name).save(tmp_path / "first")  # rounds the weights to what files hold
    codec = load_codec(tmp_path / "first")
    assert isinstance(codec, ImageCodec)
    codec.save(tmp_path / "second")
    again = load_codec(tmp_path / "second")
    pixels = noise(1, 3, 2 * codec.factor, 3 * codec.factor)
    assert codec.config == codec_of(name).config
    assert torch.equal(again.encode(pixels), codec.encode(pixels))
    assert torch.equal(again.decode(codec.encode(pixels)), codec.decode(codec.encode(pixels)))
    assert again.fingerprint == codec.fingerprint == codec_of(name).fingerprint


SHAPES = [(backbone, factor) for backbone in ("conv", "transformer") for factor in (8, 16)]


@pytest.mark.parametrize(("backbone", "factor"), SHAPES)
def test_tiles_give_the_codes_and_pixels_of_the_whole(backbone: str, factor: int) -> None:
    codec = random_codec(tiny(backbone=backbone, factor=factor, encoder_blocks=2))
    pixels = noise(1, 3, 528, 1040)
    codes = codec.encode(pixels)
    with torch.inference_mode():
        whole = codec.quantize(codec.encoder(pixels)).codes
        made = codec.decoder(codec.from_latents(codec.lookup(codes))).clamp(-1, 1)
    assert (codes == whole).float().mean() > 0.9999  # up to rounding
    assert (codec.decode(codes) - made).abs().max() < 1e-4
    assert codes.unique().numel() > 10


@pytest.mark.parametrize(("backbone", "factor"), SHAPES)
def test_a_code_depends_on_nothing_beyond_its_reach(backbone: str, factor: int) -> None:
    codec = random_codec(tiny(backbone=backbone, factor=factor, decoder_blocks=2))
    reach = codec.encoder.reach
    side = 2 * reach + 5  # two codes more on each side
    pixels = noise(1, 3, side * factor, side * factor).requires_grad_()
    codec.encoder(pixels)[..., reach + 2, reach + 2].sum().backward()
    seen = torch.nn.functional.max_pool2d(pixels.grad.abs().sum(1), factor)[0] > 0  # type: ignore[union-attr]
    assert not seen[:2].any()
    assert not seen[:, -2:].any()
    assert seen[2:-2, 2:-2].any(0).all()
    reach = codec.decoder.reach
    latents = torch.randn(1, 32, *[2 * reach + 5] * 2).requires_grad_()
    middle = slice((reach + 2) * factor, (reach + 3) * factor)
    codec.decoder(latents)[..., middle, middle].sum().backward()
    seen = latents.grad.abs().sum((0, 1)) > 0  # type: ignore[union-attr]
    assert not seen[:2].any()
    assert not seen[:, -2:].any()
    assert seen[2:-2, 2:-2].any(0).all()


@pytest.mark.parametrize("backbone", ["conv", "transformer"])
def test_equal_surroundings_give_equal_features_wherever_they_are(backbone: str) -> None:
    codec = random_codec(tiny(backbone=backbone))
    tile = noise(1, 3, 16, 24)  # two by three codes
    with torch.inference_mode():
        features = codec.encoder(tile.repeat(1, 1, 12, 8))
    inner = features[..., 5:-5, 5:-5]
    assert torch.allclose(inner[..., 2:, :], inner[..., :-2, :], atol=1e-4)
    assert torch.allclose(inner[..., 3:], inner[..., :-3], atol=1e-4)
    assert not torch.allclose(inner[..., 1:], inner[..., :-1], atol=1e-2)


def test_the_shipped_codec_shows_no_seam() -> None:
    codec = codec_of("image-f8")
    y, x = torch.meshgrid(torch.arange(64) / 10, torch.arange(64) / 10, indexing="ij")
    cell = torch.stack([(x + y).sin(), (2 * torch.pi * x / 6.4).cos(), (y > x).float()])
    pixels = cell[None].repeat(1, 1, 1, 17) * 0.9  # the same cell, 17 times side by side
    error = (codec.decode(codec.encode(pixels)) - pixels).square().mean((0, 1, 2)).reshape(17, 64)
    inner = error[2:-2]  # the ends of the strip see no neighbours
    assert inner.mean() < 0.1
    # the tiles meet at several columns; the same column of other cells is nowhere near
    assert torch.allclose(inner, inner[:1].expand_as(inner), rtol=0.02, atol=1e-4)


@given(length=st.integers(1, 500), margin=st.integers(1, 12), more=st.integers(0, 30))
def test_tiles_of_one_size_cover_each_code_once_and_with_a_margin(
    length: int, margin: int, more: int
) -> None:
    size = 4 * margin + more
    cover = tiles(length, size, margin)
    kept = [place for tile in cover for place in range(length)[tile.kept()]]
    assert kept == list(range(length))
    for tile in cover:
        assert tile.stop - tile.start == min(size, length)
        assert tile.start == 0 or tile.first - tile.start >= margin
        assert tile.stop == length or tile.stop - tile.last >= margin


def test_a_wide_picture_is_encoded_in_bounded_pieces_and_a_wider_one_refused() -> None:
    codec, shapes = codec_of("conv-f8"), []
    hook = codec.encoder.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    codes = codec.encode(torch.zeros(1, 3, 16, 8192))
    hook.remove()
    assert codes.shape == (1, 2, 1024, 1)
    assert set(shapes) == {(1, 3, 16, 512)}
    with pytest.raises(UserError, match="30000: at most 8192 pixels"):
        codec.encode(torch.zeros(1, 3, 64, 30_000))
    check_pixels(torch.zeros(1, 3, 16, 16_384), 4, factor=16)


def test_a_codec_of_format_1_is_read_as_it_was(tmp_path: Path) -> None:
    shutil.copy(codec_folder("image-f8") / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(FORMAT_1)
    old, new = load_codec(tmp_path), codec_of("image-f8")
    assert old.config == new.config
    assert old.fingerprint == new.fingerprint
    old.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    assert load_codec(tmp_path).config == new.config


def test_the_fingerprint_follows_what_defines_the_codes() -> None:
    base = tiny()
    first = random_codec(base).fingerprint
    assert random_codec(replace(base, decoder_blocks=2)).fingerprint == first
    for other in (
        replace(base, quantizer=QuantizerConfig(levels=(8, 8, 9))),
        replace(base, encoder_blocks=2),
        replace(base, factor=16),
    ):
        assert random_codec(other).fingerprint != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_width": 31}, "multiple of 2"),
        ({"backbone": "transformer", "decoder_width": 48}, "multiple of 32"),
        ({"encoder_blocks": 0}, "use 1 or more"),
        ({"factor": 4}, "factor = 4; choose one of 8, 16"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_presets_have_the_shapes_of_their_sources() -> None:
    rows = {row["name"]: row for row in list_presets()["presets"]}
    sizes = {"emu3.5": 131_072, "llamagen": 16_384, "cosmos": 64_000, "chameleon": 8192}
    for name, size in sizes.items():
        assert (rows[name]["codebook_size"], rows[name]["factor"]) == (size, 16)
        assert "arXiv" in rows[name]["source"]
    assert preset_config("emu3.5").quantizer.width == 256
    assert preset_config("cosmos").quantizer.levels == (8, 8, 8, 5, 5, 5)
    assert preset_config("conv-f8", encoder_width=64).encoder_width == 64
    with pytest.raises(UserError, match="no preset 'emu' of image codecs; choose"):
        preset_config("emu")


def test_a_processor_goes_by_the_factor_and_the_codebooks_of_its_codec(
    zoo: Path, tmp_path: Path
) -> None:
    codec_of("cosmos").save(tmp_path / "f16")
    processor = Processor.load([str(zoo / "text"), str(tmp_path / "f16")])
    [segment] = processor.encode_parts([Image(np.zeros((40, 24, 3), np.uint8))])
    assert segment.codes.shape == (2, 2)
    [made] = processor.decode_segments([segment])
    assert isinstance(made, Image)
    assert made.pixels.shape == (32, 32, 3)
    codec_of("two-codebooks").save(tmp_path / "two")
    processor = Processor.load([str(zoo / "text"), str(tmp_path / "two")])
    [segment] = processor.encode_parts([Image(np.zeros((40, 24, 3), np.uint8))])
    assert segment.codes.shape == (5, 3 * 2)
    [made] = processor.decode_segments([segment])
    assert isinstance(made, Image)
    assert made.pixels.shape == (40, 24, 3)


def odd_pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Files that people have, and the (height, width) that they stand for."""
    values = np.random.default_rng(0).integers(0, 256, (11, 21, 4), dtype=np.uint8)
    rgba = PIL.Image.fromarray(values, "RGBA")
    rgb, exif = rgba.convert("RGB"), PIL.Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    rgb.crop((0, 0, 1, 1)).save(folder / "dot.png")
    PIL.Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.convert("CMYK").save(folder / "inks.jpg")
    rgba.save(folder / "alpha.png")
    rgb.save(folder / "turned.jpg", exif=exif)
    plain = dict.fromkeys(("deep.png", "palette.png", "inks.jpg", "alpha.png"), (11, 21))
    return {"dot.png": (1, 1), **plain, "turned.jpg": (21, 11)}


def test_pictures_of_every_kind_come_back_at_their_size(zoo: Path, tmp_path: Path) -> None:
    for name, size in odd_pictures(tmp_path).items():
        result = roundtrip(str(zoo / "image"), tmp_path / name, out=tmp_path / "out.png")
        made = load_part(tmp_path / "out.png")
        assert isinstance(made, Image)
        assert made.pixels.shape[:2] == size, name
        assert result["shape"] == [-(-side // 8) for side in size]
    PIL.Image.new("RGB", (30_000, 8)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="at most 8192 pixels; shrink it"):
        roundtrip(str(zoo / "image"), tmp_path / "wide.png", out=tmp_path / "out.png")
