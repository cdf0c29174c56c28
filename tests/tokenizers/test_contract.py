"""What every codec promises: streaming = whole, batch = singles, causality, legal codes decode."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.tokenizers.base import load_codec
from mmpt.tokenizers.image import ImageCodec
from mmpt.tokenizers.speech import SpeechCodec
from mmpt.tokenizers.text import TextCodec
from mmpt.tokenizers.video import VideoCodec

few = settings(max_examples=8, deadline=None)
chunks = st.lists(st.integers(0, 9), max_size=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "codec"


def _pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_batch_of_pictures_gives_the_codes_of_its_singles(image_codec: ImageCodec) -> None:
    pixels = _pixels(3, 3, 16, 24)
    codes = image_codec.encode(pixels)
    assert codes.shape == (3, 2, 3, 1)
    assert codes.dtype == torch.int64
    for i in range(3):
        assert torch.equal(codes[i : i + 1], image_codec.encode(pixels[i : i + 1]))


def test_an_image_is_a_video_of_one_frame(image_codec: ImageCodec, video_codec: VideoCodec) -> None:
    pixels = _pixels(1, 3, 16, 16)
    assert torch.equal(video_codec.encode(pixels[None])[:, 0], image_codec.encode(pixels))
    codes = image_codec.encode(pixels)
    assert torch.equal(video_codec.decode(codes[:, None])[:, 0], image_codec.decode(codes))


@few
@given(plan=chunks, num_frames=st.integers(1, 12))
def test_a_streamed_video_has_the_codes_of_the_whole(
    video_codec: VideoCodec, plan: list[int], num_frames: int
) -> None:
    pixels = _pixels(num_frames, 3, 16, 16)
    stream, place, codes = video_codec.stream(), 0, []
    for size in [*plan, num_frames]:
        codes.append(stream.push(pixels[place : place + size]))
        place += size
    # before the first frame the sides are unknown: such codes are (0, 0, 0, 1)
    codes = torch.cat([c for c in [*codes, stream.flush()] if len(c)])
    assert torch.equal(codes, video_codec.encode(pixels[None])[0])
    assert len(codes) == 1 + -(-(num_frames - 1) // 4)


def test_a_later_frame_leaves_earlier_codes_alone(video_codec: VideoCodec) -> None:
    pixels = _pixels(1, 9, 3, 16, 16)
    changed = pixels.clone()
    changed[:, -1] = -changed[:, -1]
    before, after = video_codec.encode(pixels), video_codec.encode(changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_a_video_decodes_the_same_in_pieces(video_codec: VideoCodec) -> None:
    codes = torch.randint(video_codec.codebook_size, (1, 4, 2, 2, 1))
    stream = video_codec.decode_stream()
    pieces = torch.cat(
        [stream.push(codes[0, :1]), stream.push(codes[0, 1:3]), stream.push(codes[0, 3:])]
    )
    assert torch.equal(pieces, video_codec.decode(codes)[0])
    assert len(pieces) == 13


@few
@given(plan=st.lists(st.integers(0, 20_000), max_size=4), num_samples=st.integers(1, 40_000))
def test_streamed_speech_has_the_codes_of_the_whole(
    speech_codec: SpeechCodec, plan: list[int], num_samples: int
) -> None:
    wave = _pixels(num_samples) * 0.3
    stream, place, codes = speech_codec.stream(), 0, []
    for size in [*plan, num_samples]:
        codes.append(stream.push(wave[place : place + size]))
        place += size
    codes = torch.cat([*codes, stream.flush()])
    assert torch.equal(codes, speech_codec.encode(wave[None])[0])
    assert len(codes) == -(-num_samples // 1280)


def test_speech_streams_what_training_computes(speech_codec: SpeechCodec) -> None:
    from mmpt.tokenizers.vocoder import log_mel

    wave = _pixels(2, 3 * speech_codec.block_samples) * 0.3
    features = speech_codec.encode_features(log_mel(wave))
    offline = speech_codec.quantizer(features).codes
    agree = (offline == speech_codec.encode(wave)).float().mean()
    assert (
        agree > 0.95
    )  # the same numbers up to rounding; codes promise no more across batch shapes


def test_later_sound_leaves_earlier_blocks_alone(speech_codec: SpeechCodec) -> None:
    wave = _pixels(1, 3 * speech_codec.block_samples) * 0.3
    changed = wave.clone()
    changed[:, 2 * speech_codec.block_samples :] = 0
    before, after = speech_codec.encode(wave), speech_codec.encode(changed)
    assert torch.equal(before[:, :20], after[:, :20])


@few
@given(num_codes=st.integers(1, 35), cut=st.integers(0, 35))
def test_speech_decodes_the_same_in_pieces(
    speech_codec: SpeechCodec, num_codes: int, cut: int
) -> None:
    codes = torch.randint(speech_codec.codebook_size, (1, num_codes, 1))
    stream = speech_codec.decode_stream()
    pieces = torch.cat([stream.push(codes[0, :cut]), stream.push(codes[0, cut:]), stream.flush()])
    whole = speech_codec.decode(codes)[0]
    assert torch.equal(pieces, whole)
    assert len(whole) == 1280 * num_codes
    assert torch.isfinite(whole).all()


def test_every_legal_code_decodes_and_others_are_refused(
    image_codec: ImageCodec, speech_codec: SpeechCodec
) -> None:
    every = torch.arange(image_codec.codebook_size).reshape(1, 16, -1, 1)
    pixels = image_codec.decode(every)
    assert torch.isfinite(pixels).all()
    assert pixels.abs().max() <= 1
    for codec, codes in ((image_codec, every), (speech_codec, torch.zeros(1, 3, 1).long())):
        for bad in (-1, codec.codebook_size):
            wrong = codes.clone()
            wrong.view(-1)[0] = bad
            with pytest.raises(UserError, match="must be in"):
                codec.decode(wrong)  # type: ignore[operator] # both kinds have it


def test_bad_media_are_refused_in_one_line(
    image_codec: ImageCodec, speech_codec: SpeechCodec
) -> None:
    for pixels in (
        _pixels(1, 3, 15, 16),
        _pixels(1, 4, 16, 16),
        _pixels(3, 16, 16),
        torch.full((1, 3, 16, 16), torch.nan),
        _pixels(1, 3, 16, 16) * 3,
    ):
        with pytest.raises(UserError) as caught:
            image_codec.encode(pixels)
        assert "\n" not in str(caught.value)
    for wave in (torch.zeros(1, 0), torch.zeros(5), torch.full((1, 5), torch.inf)):
        with pytest.raises(UserError):
            speech_codec.encode(wave)


def test_autocast_changes_no_code(
    image_codec: ImageCodec, video_codec: VideoCodec, speech_codec: SpeechCodec
) -> None:
    clip, wave = _pixels(1, 5, 3, 16, 16), _pixels(1, 20_000) * 0.3
    outside = (image_codec.encode(clip[0]), video_codec.encode(clip), speech_codec.encode(wave))
    with torch.autocast("cpu", torch.bfloat16):
        inside = (image_codec.encode(clip[0]), video_codec.encode(clip), speech_codec.encode(wave))
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_a_saved_codec_gives_the_same_codes_and_fingerprint(
    image_codec: ImageCodec, folder: Path
) -> None:
    image_codec.save(folder)
    loaded = load_codec(folder)
    assert isinstance(loaded, ImageCodec)
    pixels = _pixels(2, 3, 16, 16)
    assert torch.equal(loaded.encode(pixels), image_codec.encode(pixels))
    assert loaded.fingerprint == image_codec.fingerprint


def test_the_fingerprint_follows_the_encoder_and_not_the_decoder(image_codec: ImageCodec) -> None:
    before = image_codec.fingerprint
    with torch.no_grad():
        image_codec.from_latents.weight.mul_(2)
        assert image_codec.fingerprint == before
        image_codec.from_latents.weight.div_(2)
        image_codec.to_latents.weight.mul_(2)
        assert image_codec.fingerprint != before
        image_codec.to_latents.weight.div_(2)


def test_a_broken_or_newer_codec_folder_is_refused(image_codec: ImageCodec, folder: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_codec(folder)
    image_codec.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_codec(folder)
    (folder / "config.json").write_text(json.dumps(config | {"quantizer": {"levels": [8, 8]}}))
    with pytest.raises(UserError, match="does not fit"):
        load_codec(folder)
    (folder / "config.json").write_text(json.dumps(config))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="does not fit"):
        load_codec(folder)


@given(text=st.text())
@settings(deadline=None)
def test_any_text_comes_back(text_codec: TextCodec, text: str) -> None:
    codes = text_codec.encode(text)
    assert text_codec.decode(codes) == text
    assert not len(codes) or codes.max() < text_codec.codebook_size


@given(
    text=st.text(alphabet="a red\napple.,'<boi>1\u00e9", max_size=60),
    cuts=st.lists(st.integers(1, 9)),
)
@settings(deadline=None)
def test_streamed_text_has_the_codes_of_the_whole(
    text_codec: TextCodec, text: str, cuts: list[int]
) -> None:
    stream, place, codes = text_codec.stream(), 0, []
    for size in [*cuts, len(text)]:
        codes.append(stream.push(text[place : place + size]))
        place += size
    assert torch.equal(torch.cat([*codes, stream.flush()]), text_codec.encode(text))


def test_structure_names_in_user_text_are_plain_characters(text_codec: TextCodec) -> None:
    text = "<boi><eod>\u0000<bod>"
    codes = text_codec.encode(text)
    assert len(codes) >= 5
    assert text_codec.decode(codes) == text


def test_a_video_codec_finds_its_image_codec_or_brings_a_copy(
    video_codec: VideoCodec, image_codec: ImageCodec, zoo: Path, tmp_path: Path
) -> None:
    video_codec.save(tmp_path / "alone" / "video")
    video_codec.save(zoo / "again")  # beside it
    pixels = _pixels(1, 5, 3, 16, 16)
    for folder, copied in ((tmp_path / "alone" / "video", True), (zoo / "again", False)):
        loaded = load_codec(folder)
        assert isinstance(loaded, VideoCodec)
        assert loaded.fingerprint == video_codec.fingerprint
        assert torch.equal(loaded.encode(pixels), video_codec.encode(pixels))
        assert (folder / "image").is_dir() == copied
    other = ImageCodec(image_codec.config)
    other.save(tmp_path / "alone" / "video" / "image")
    with pytest.raises(UserError, match="train the video codec again") as caught:
        load_codec(tmp_path / "alone" / "video")
    assert other.fingerprint in str(caught.value)


def test_a_stream_takes_pieces_of_any_size_even_none(
    image_codec: ImageCodec, video_codec: VideoCodec, speech_codec: SpeechCodec
) -> None:
    assert image_codec.stream().push(torch.zeros(0, 3, 16, 24)).shape == (0, 2, 3, 1)
    assert video_codec.stream().push(torch.zeros(0, 3, 16, 24)).shape == (0, 0, 0, 1)
    assert video_codec.decode_stream().push(torch.zeros(0, 2, 3, 1)).shape == (0, 3, 16, 24)
    assert speech_codec.stream().push(torch.zeros(0)).shape == (0, 1)
    for codec in (image_codec, video_codec, speech_codec):
        assert len(codec.stream().flush()) == 0
    decoder = speech_codec.decode_stream()
    assert decoder.push(torch.zeros(0, 1, dtype=torch.int64)).shape == (0,)
    assert decoder.flush().shape == (0,)


def test_codes_that_are_not_legal_are_refused_by_streams_as_well(
    video_codec: VideoCodec, speech_codec: SpeechCodec
) -> None:
    for bad in (-1, video_codec.codebook_size):
        with pytest.raises(UserError, match="must be in"):
            video_codec.decode_stream().push(torch.full((1, 2, 2, 1), bad))
    for bad in (-1, speech_codec.codebook_size):
        with pytest.raises(UserError, match="must be in"):
            speech_codec.decode_stream().push(torch.full((3, 1), bad))


def test_a_lone_surrogate_is_refused(text_codec: TextCodec) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        text_codec.encode("bad \udcff")
