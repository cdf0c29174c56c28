"""The video codec: strictly causal, streams at constant memory, starts as the image codec."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.parts import Image, Part, Video
from mmpt.tokenizers.image import ImageCodec, ImageCodecConfig
from mmpt.tokenizers.objectives.video import VideoObjective, move, play
from mmpt.tokenizers.quantize import QuantizerConfig
from mmpt.tokenizers.recipe import CodecRecipe
from mmpt.tokenizers.temporal import GROUP, CausalBlock, LowRank
from mmpt.tokenizers.video import VideoCodec, VideoCodecConfig

few = settings(max_examples=10, deadline=None)
SMALL = ImageCodecConfig(encoder_width=16, decoder_width=16, decoder_blocks=1)
RESIDUAL = QuantizerConfig(kind="fsq", levels=(4, 4), num_codebooks=2)
IMAGES = {
    "f8": SMALL,
    "f16": replace(SMALL, factor=16),
    "residual": replace(SMALL, quantizer=RESIDUAL),
}


def build(kind: str, *, noise: float) -> VideoCodec:
    """A small codec; noise: what is added to its temporal weights, so that all of them matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = ImageCodec(IMAGES[kind])
        config = VideoCodecConfig(
            width=16, encoder_blocks=1, num_blocks=2, fine_width=8, fine_blocks=1, rank=2
        )
        codec = VideoCodec(config, image).eval()
        with torch.no_grad():
            for parameter in [*image.parameters(), *codec.temporal.parameters()]:
                scale = noise if parameter.requires_grad else 0.1
                parameter.add_(torch.randn(parameter.shape) * scale)
    return codec


CODECS = {kind: build(kind, noise=0.1) for kind in IMAGES}
every_kind = pytest.mark.parametrize("kind", list(IMAGES))


def clip(num_frames: int, *, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Noise, (T, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((num_frames, 3, side, side), generator=generator) * 2 - 1


def in_pieces(push: Callable, media: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Push the media in pieces of these sizes, the rest last."""
    made, place = [], 0
    for size in [*sizes, len(media)]:
        made.append(push(media[place : place + size]))
        place += size
    return [piece for piece in made if len(piece)]


@every_kind
@few
@given(sizes=st.lists(st.integers(0, 7), max_size=6), num_frames=st.integers(1, 15))
def test_any_chunking_gives_the_codes_of_the_whole(
    kind: str, sizes: list[int], num_frames: int
) -> None:
    codec, frames = CODECS[kind], clip(num_frames)
    stream = codec.stream()
    pieces = in_pieces(stream.push, frames, sizes)
    codes = torch.cat([*pieces, stream.flush()])
    assert torch.equal(codes, codec.encode(frames[None])[0])
    assert len(codes) == 1 + -(-(num_frames - 1) // GROUP)


@every_kind
@few
@given(sizes=st.lists(st.integers(0, 3), max_size=5), num_latents=st.integers(1, 6))
def test_codes_decode_the_same_in_pieces(kind: str, sizes: list[int], num_latents: int) -> None:
    codec = CODECS[kind]
    generator = torch.Generator().manual_seed(num_latents)
    shape = (num_latents, 2, 2, codec.num_codebooks)
    codes = torch.randint(codec.codebook_size, shape, generator=generator)
    pieces = torch.cat(in_pieces(codec.decode_stream().push, codes, sizes))
    assert torch.equal(pieces, codec.decode(codes[None])[0])
    assert len(pieces) == 1 + GROUP * (num_latents - 1)


@every_kind
def test_a_batch_of_clips_gives_what_its_singles_give(kind: str) -> None:
    codec = CODECS[kind]
    clips = torch.stack([clip(9, seed=seed) for seed in range(3)])
    codes = codec.encode(clips)
    frames = codec.decode(codes)
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.equal(codes[one], codec.encode(clips[one]))
        assert torch.equal(frames[one], codec.decode(codes[one]))


@every_kind
def test_a_code_depends_on_no_later_frame_and_on_all_of_its_own(kind: str) -> None:
    codec, frames = CODECS[kind], clip(13)
    before = codec.encode(frames[None])[0]
    for index in range(1, 13):
        changed = frames.clone()
        changed[index] = -changed[index]
        after = codec.encode(changed[None])[0]
        first = 1 + (index - 1) // GROUP  # the first latent that may change
        assert torch.equal(before[:first], after[:first])
        assert not torch.equal(before[first], after[first])


@every_kind
def test_a_frame_depends_on_no_later_code_and_on_earlier_ones(kind: str) -> None:
    codec = CODECS[kind]
    codes = codec.encode(clip(13)[None])
    changed = codes.clone()
    changed[:, 1] = (changed[:, 1] + codec.codebook_size // 2) % codec.codebook_size
    before, after = codec.decode(codes)[0], codec.decode(changed)[0]
    assert torch.equal(before[:1], after[:1])
    for latent in range(3):  # the changed one, and those that remember it
        part = slice(1 + GROUP * latent, 1 + GROUP * (latent + 1))
        assert not torch.equal(before[part], after[part])


@every_kind
def test_the_first_frame_has_the_codes_of_a_picture(kind: str) -> None:
    codec, frames = CODECS[kind], clip(6)
    codes = codec.encode(frames[None])
    pictures = codec.image.encode(frames[:1])
    assert torch.equal(codes[:, 0], pictures)
    assert torch.equal(codec.decode(codes)[:, 0], codec.image.decode(pictures))


@every_kind
def test_an_untrained_codec_codes_a_still_clip_as_the_picture_again_and_again(kind: str) -> None:
    codec = build(kind, noise=0.0)
    frames = clip(1).expand(9, -1, -1, -1)
    codes = codec.encode(frames[None])[0]
    assert (codes == codes[:1]).float().mean() > 0.99  # the mean of equal frames may round
    made = codec.decode(codes[:1].expand(3, -1, -1, -1)[None])[0]
    torch.testing.assert_close(made, made[:1].expand_as(made), atol=1e-5, rtol=0)


def test_a_stream_remembers_as_much_after_many_frames_as_after_a_few() -> None:
    codec, sizes = CODECS["f8"], []
    stream, decoder = codec.stream(), codec.decode_stream()
    for index in range(12):
        decoder.push(stream.push(clip(GROUP + (index == 0), seed=index)))
        assert decoder.known is not None
        assert stream.decoder.known is not None
        held = [*stream.memory.values(), *decoder.known.memory.values()]
        held += [*stream.decoder.known.memory.values(), decoder.known.context, decoder.known.shown]
        sizes.append(sum(x.untyped_storage().nbytes() for x in held))
    assert len(set(sizes[1:])) == 1  # the encoder's own begins with the second latent
    assert len(stream.memory) == 2 * 1
    assert decoder.known is not None
    assert len(decoder.known.memory) == 2 * (2 + 1)


def test_training_computes_what_a_stream_does() -> None:
    codec, frames = CODECS["f8"], clip(13)[None]
    with torch.no_grad():
        made, quantized = codec(frames)
    codes = quantized.codes
    assert (codes == codec.encode(frames)).float().mean() > 0.95  # equal up to rounding
    torch.testing.assert_close(made.clamp(-1, 1), codec.decode(codes)[:, 1:], atol=1e-4, rtol=0)


def test_every_temporal_weight_learns_and_no_weight_of_the_image_codec() -> None:
    codec = build("f8", noise=0.1)
    made, _ = codec(clip(9)[None])
    made.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in codec.temporal.parameters())
    assert all(p.grad is None for p in codec.image.parameters())


def test_the_fingerprint_follows_all_that_the_codes_depend_on() -> None:
    codec = build("f8", noise=0.1)
    for name in ("temporal.head.weight", "temporal.encode.0.first.before.weight"):
        before, codes = codec.fingerprint, codec.encode(clip(9)[None])
        with torch.no_grad():
            codec.get_parameter(name).neg_()
        assert codec.fingerprint != before
        assert not torch.equal(codec.encode(clip(9)[None]), codes)


def test_odd_clips_are_coded_or_refused_in_one_line() -> None:
    codec = CODECS["f8"]
    for num_frames, num_latents in ((1, 1), (2, 2), (5, 2), (6, 3)):
        assert codec.encode(clip(num_frames)[None]).shape == (1, num_latents, 4, 4, 1)
    assert codec.encode(clip(2, side=8)[None]).shape == (1, 2, 1, 1, 1)
    stream, decoder = codec.stream(), codec.decode_stream()
    stream.push(clip(2))
    with pytest.raises(UserError, match="change their size"):
        stream.push(clip(1, side=16))
    decoder.push(torch.zeros(1, 2, 2, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="change their size"):
        decoder.push(torch.zeros(1, 2, 3, 1, dtype=torch.int64))
    for frames in (clip(0), clip(3, side=12), clip(3).fill_(torch.nan), clip(3) * 2):
        with pytest.raises(UserError) as caught:
            codec.encode(frames[None])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"width": 0}, {"num_blocks": 0}, {"rank": -1}])
def test_a_codec_that_cannot_be_built_is_refused(change: dict) -> None:
    with pytest.raises(UserError, match="or more"):
        replace(VideoCodecConfig(), **change)


def test_a_new_causal_block_changes_nothing_and_a_low_rank_term_neither() -> None:
    x = torch.randn(2, 8, 3, 5)
    memory: dict = {}
    block = CausalBlock(8)
    assert torch.equal(block(x, memory), x)
    assert torch.equal(block(x, memory), x)
    convolution = torch.nn.Conv2d(8, 4, 3, padding=1)
    changed = LowRank(convolution, 2)(convolution)
    assert list(changed) == ["weight"]
    assert torch.equal(changed["weight"], convolution.weight)


@few
@given(num_frames=st.integers(5, 17), spare=st.integers(0, 5), seed=st.integers(0, 99))
def test_clips_are_played_from_frames_that_there_are(
    num_frames: int, spare: int, seed: int
) -> None:
    numbered = np.arange(num_frames + spare, dtype=np.uint8).reshape(-1, 1, 1, 1)
    played = play(numbered, num_frames, np.random.default_rng(seed)).ravel().astype(int)
    assert played.shape == (num_frames,)
    assert np.abs(np.diff(played)).max() <= 2
    assert np.array_equal(played, play(numbered, num_frames, np.random.default_rng(seed)).ravel())


def test_a_moved_picture_stays_in_range_moves_and_is_a_pure_function_of_its_generator() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for seed in range(5):
        clip, again = (move(picture, 9, np.random.default_rng(seed)) for _ in range(2))
        assert clip.shape == (9, 3, 64, 64)
        assert torch.equal(clip, again)
        assert clip.abs().max() <= 1 + 1e-6
        assert clip.diff(dim=0).any()
    white = move(np.full((64, 64, 3), 255, np.uint8), 9, np.random.default_rng(1))
    torch.testing.assert_close(white, torch.ones_like(white))


def test_training_clips_are_still_pictures_in_motion_as_often_as_the_recipe_says(
    zoo: Path,
) -> None:
    black, white = np.zeros((9, 64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    documents: list[list[Part]] = [[Video(black, 12.0)], [Image(white), Image(white[:8])]]
    for moved, least, most in ((0.0, 0, 0), (0.5, 1, 15), (1.0, 16, 16)):
        recipe = CodecRecipe(kind="video", shards=("x",), base=str(zoo / "image"), moved=moved)
        objective = VideoObjective(recipe, documents)
        pixels = objective.batch(np.random.default_rng(0), 16)["pixels"]
        assert pixels.shape == (16, 9, 3, 64, 64)
        assert least <= (pixels[:, 0, 0, 0, 0] > 0).sum() <= most
        again = objective.batch(np.random.default_rng(0), 16)["pixels"]
        assert torch.equal(pixels, again)
    clips_alone = VideoObjective(recipe, documents[:1])
    assert (clips_alone.batch(np.random.default_rng(0), 4)["pixels"] < 0).all()
    with pytest.raises(UserError, match="it is a share of the clips"):
        replace(recipe, moved=1.5)
