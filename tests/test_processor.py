"""The processor: parts of any size become codes of one vocabulary and come back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.processor import (
    Processor,
    ProcessorSettings,
    fit_pixels,
    flatten,
    merge_speech,
    unflatten,
)
from mmpt.stream import Segment, StreamBuilder, parse
from mmpt.tokenizers.image import ImageCodec, from_pixels, to_pixels
from mmpt.vocab import Modality, Vocabulary


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sound(num_samples: int, rate: int = 16_000) -> Audio:
    rng = np.random.default_rng(0)
    return Audio((rng.standard_normal(num_samples) * 0.1).astype(np.float32), rate)


def clip(num_frames: int, height: int = 16, width: int = 24) -> Video:
    return Video(np.stack([picture(height, width, seed) for seed in range(num_frames)]), 10.0)


def test_every_kind_of_part_becomes_codes_of_its_medium(processor: Processor) -> None:
    parts: list[Part] = [Text("a red apple"), Image(picture(16, 24)), clip(5), sound(20_000)]
    segments = processor.encode_parts(parts)
    assert [segment.modality for segment in segments] == list(Modality)
    assert [segment.codes.shape for segment in segments[1:]] == [(2, 3), (2, 2, 3), (16,)]
    builder = StreamBuilder(processor.vocabulary)
    for modality, codes in segments:
        if modality == Modality.TEXT:
            builder.text(codes)
        else:
            builder.media(modality, codes)
    read = list(parse(builder.build().ids, processor.vocabulary))
    back = processor.decode_segments(read)
    assert [type(part) for part in back] == [Text, Image, Video, Audio]
    text, image, video, audio = cast(tuple[Text, Image, Video, Audio], tuple(back))
    assert text.text == "a red apple"
    assert image.pixels.shape == (16, 24, 3)
    assert video.frames.shape == (5, 16, 24, 3)
    assert (audio.wave.shape, audio.sample_rate) == ((16 * 1280,), 16_000)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(height=st.integers(1, 200), width=st.integers(1, 200), max_side=st.integers(8, 100))
def test_a_picture_of_any_size_fits(
    processor: Processor, height: int, width: int, max_side: int
) -> None:
    small = Processor(processor.vocabulary, processor.text, processor.media, max_side)
    [segment] = small.encode_parts([Image(picture(height, width))])
    assert all(1 <= side <= (max_side + 4) // 8 for side in segment.codes.shape)
    [made] = small.decode_segments([segment])
    assert isinstance(made, Image)
    assert made.pixels.shape == (segment.codes.shape[0] * 8, segment.codes.shape[1] * 8, 3)


def test_a_picture_that_fits_is_left_as_it_is(processor: Processor) -> None:
    pixels = picture(16, 24)
    fitted = fit_pixels(to_pixels(pixels[None]), 64)
    assert np.array_equal(from_pixels(fitted)[0], pixels)
    shrunk = fit_pixels(to_pixels(picture(300, 100)[None]), 64)
    assert shrunk.shape == (1, 3, 64, 24)
    assert shrunk.abs().max() <= 1


def test_a_still_and_the_first_frame_of_a_clip_have_the_same_codes(processor: Processor) -> None:
    video = clip(9, 30, 50)
    still, moving = processor.encode_parts([Image(video.frames[0]), video])
    assert np.array_equal(moving.codes[0], still.codes)


def test_a_long_clip_is_shrunk_in_pieces_as_it_would_be_whole(processor: Processor) -> None:
    video = clip(40, 90, 70)
    [segment] = processor.encode_parts([video])
    whole = fit_pixels(to_pixels(video.frames), processor.max_side)[None]
    codes = processor.media[Modality.VIDEO].encode(whole)
    assert np.array_equal(segment.codes, codes[0, ..., 0].numpy())


@pytest.mark.parametrize("rate", [8_000, 44_100, 96_000])
def test_sound_of_any_rate_has_a_code_for_every_80_ms(processor: Processor, rate: int) -> None:
    [segment] = processor.encode_parts([sound(rate, rate)])
    assert segment.codes.shape == (13,)
    [shortest] = processor.encode_parts([sound(1, rate)])
    assert shortest.codes.shape == (1,)


def test_codes_do_not_depend_on_what_else_is_encoded(processor: Processor) -> None:
    parts: list[Part] = [Image(picture(16, 16)), Text("a"), Image(picture(24, 16, 1)), sound(3000)]
    together = processor.encode_parts(parts)
    for part, segment in zip(parts, together, strict=True):
        [alone] = processor.encode_parts([part])
        assert np.array_equal(alone.codes, segment.codes)


def test_structure_names_in_user_text_stay_characters(processor: Processor) -> None:
    text = "<boi><eod> <null>"
    [segment] = processor.encode_parts([Text(text)])
    assert segment.codes.max() < processor.vocabulary.num_text
    [part] = processor.decode_segments([segment])
    assert part == Text(text)


def test_the_separator_is_a_new_line(processor: Processor) -> None:
    [part] = processor.decode_segments([Segment(Modality.TEXT, processor.separator)])
    assert part == Text("\n")


def test_an_empty_text_has_no_codes_and_comes_back(processor: Processor) -> None:
    [segment] = processor.encode_parts([Text("")])
    assert segment.codes.shape == (0,)
    assert processor.decode_segments([segment]) == [Text("")]


def test_what_cannot_be_encoded_is_one_line(processor: Processor) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        processor.encode_parts([Text("bad \udcff")])
    with pytest.raises(UserError, match="str is no Text"):
        processor.encode_parts([cast(Any, "a bare string")])
    mute = Processor(processor.vocabulary, processor.text, {})
    for part in (Image(picture(8, 8)), clip(1), sound(10)):
        with pytest.raises(UserError, match=r"has no [a-z]+ tokenizer"):
            mute.encode_parts([part])
    with pytest.raises(UserError, match="max_side = 4"):
        Processor(processor.vocabulary, processor.text, processor.media, 4)


def test_speech_that_was_cut_into_spans_is_one_sound(processor: Processor) -> None:
    [whole] = processor.encode_parts([sound(60_000)])
    spans = [Segment(Modality.SPEECH, whole.codes[i : i + 26]) for i in range(0, 47, 26)]
    text = Segment(Modality.TEXT, processor.separator)
    merged = merge_speech([*spans, text, *spans])
    assert [s.modality for s in merged] == [Modality.SPEECH, Modality.TEXT, Modality.SPEECH]
    assert np.array_equal(merged[0].codes, whole.codes)
    [made] = processor.decode_segments(spans)
    [want] = processor.decode_segments([whole])
    assert isinstance(made, Audio)
    assert isinstance(want, Audio)
    assert np.array_equal(made.wave, want.wave)


def test_every_code_of_the_vocabulary_decodes(processor: Processor) -> None:
    for modality in (Modality.IMAGE, Modality.VIDEO, Modality.SPEECH):
        codes = np.arange(processor.vocabulary.range_of(modality).size)
        shape = {Modality.IMAGE: (16, -1), Modality.VIDEO: (2, 16, -1)}.get(modality, (-1,))
        [part] = processor.decode_segments([Segment(modality, codes.reshape(shape))])
        assert isinstance(part, (Image, Video, Audio)[modality - 1])


def test_image_and_video_share_their_ids(processor: Processor) -> None:
    vocabulary = processor.vocabulary
    assert [r.name for r in vocabulary.ranges] == ["visual", "speech"]
    assert vocabulary.range_of(Modality.IMAGE) == vocabulary.range_of(Modality.VIDEO)
    for modality, codec in processor.media.items():
        assert vocabulary.fingerprint_of(modality) == codec.fingerprint


@pytest.mark.parametrize(
    ("names", "ranges"),
    [
        (("text",), []),
        (("text", "speech"), ["speech"]),
        (("text", "video"), ["video"]),
        (("image", "text"), ["visual"]),
    ],
)
def test_a_vocabulary_may_lack_media(zoo: Path, names: tuple[str, ...], ranges: list[str]) -> None:
    loaded = Processor.load([str(zoo / name) for name in names])
    assert [r.name for r in loaded.vocabulary.ranges] == ranges


def test_a_set_of_tokenizers_that_cannot_be_is_refused(zoo: Path, tmp_path: Path) -> None:
    def load(*names: str) -> Callable[[], Processor]:
        return lambda: Processor.load([str(zoo / name) for name in names])

    for call, message in (
        (load("image"), "exactly one text tokenizer, got 0"),
        (load("text", "text"), "exactly one text tokenizer, got 2"),
        (load("text", "image", "image"), "two tokenizers serve the same medium"),
        (load("text", "absent"), "no tokenizer"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_video_codec_of_another_image_codec_is_refused(
    zoo: Path, image_codec: ImageCodec, tmp_path: Path
) -> None:
    other = ImageCodec(image_codec.config)
    other.save(tmp_path / "image")
    with pytest.raises(UserError, match="use the pair that belongs together"):
        Processor.load([str(zoo / "text"), str(tmp_path / "image"), str(zoo / "video")])


def test_a_vocabulary_that_is_given_must_fit_the_tokenizers(
    zoo: Path, processor: Processor, tmp_path: Path
) -> None:
    names = [str(zoo / name) for name in ("text", "image", "video", "speech")]
    path = tmp_path / "vocabulary.json"
    first, second = processor.vocabulary.ranges
    known = Vocabulary.build(
        num_text=processor.vocabulary.num_text,
        text_fingerprint=processor.vocabulary.text_fingerprint,
        codebooks=[
            (first.name, first.size, first.fingerprints, [0, 3]),
            (second.name, second.size, second.fingerprints, None),
        ],
    )
    known.save(path)
    loaded = Processor.load(names, vocabulary=path)
    assert loaded.vocabulary.range_of(Modality.IMAGE).used == (0, 3)
    with pytest.raises(UserError, match="this set of tokenizers was made with vocabulary"):
        Processor.load(names[:2], vocabulary=path)


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    pixels = to_pixels(every)
    assert pixels.shape == (1, 3, 16, 16)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert np.array_equal(from_pixels(pixels), every)
    assert from_pixels(torch.full((1, 3, 8, 8), 9.0)).max() == 255


NAMES = ("text", "image", "video", "speech")


def test_a_processor_opens_again_from_its_settings(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    processor = Processor.load(NAMES, max_side=24)
    processor.vocabulary.save(tmp_path / "vocabulary.json")
    processor.save_settings(tmp_path)
    monkeypatch.chdir(tmp_path)  # paths are absolute
    again = Processor.from_folder(tmp_path)
    assert again.vocabulary == processor.vocabulary
    assert again.max_side == 24
    assert again.settings.tokenizers == tuple(str(zoo / name) for name in NAMES)


def test_shipped_tokenizers_stay_names(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmpt import hub

    monkeypatch.setattr(hub, "shipped", lambda what: zoo)
    assert Processor.load(NAMES).settings.tokenizers == NAMES


def test_settings_that_are_absent_odd_or_newer_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "processor.json"
    good = {"format_version": 1, "tokenizers": ["text-2k"], "max_side": 64}
    cases = {
        "{": "holds no settings",
        "[]": "holds no settings",
        json.dumps(good | {"format_version": 2}): "format 2; this mmpt reads 1",
        json.dumps(good | {"tokenizers": "text-2k"}): "a list of tokenizers",
        json.dumps(good | {"max_side": "64"}): "a whole max_side",
    }
    for text, message in {"": "holds no settings", **cases}.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            ProcessorSettings.load(tmp_path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        Processor.from_folder(tmp_path)


def test_a_codec_that_was_never_saved_has_no_settings(zoo: Path) -> None:
    loaded = Processor.load([str(zoo / "text")])
    loaded.text.folder = None
    with pytest.raises(UserError, match="never saved"):
        _ = loaded.settings


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    count=st.integers(1, 8),
)
def test_codes_of_several_codebooks_are_laid_out_frame_by_frame(
    shape: list[int], count: int
) -> None:
    codes = torch.arange(int(np.prod(shape)) * count).reshape(*shape, count)
    flat = flatten(codes)
    assert flat.shape == (*shape[:-1], shape[-1] * count)
    assert flat.reshape(-1).tolist() == list(range(codes.numel()))  # id i is of codebook i mod Q
    assert torch.equal(unflatten(flat, count), codes)
    with pytest.raises(UserError, match=f"no whole frames of {count + 1}"):
        unflatten(np.zeros(count), count + 1)


def test_a_batch_of_documents_is_each_of_them_and_a_bad_one_is_bad_alone(
    processor: Processor,
) -> None:
    documents: list[list[Part]] = [
        [Text("a red apple"), Image(picture(16, 16)), sound(2000)],
        [Image(picture(16, 16)), Text("bad \udcff"), Image(picture(8, 16))],
        [],
        [sound(2000), Image(picture(8, 16)), Image(picture(16, 16))],
        [sound(2000)],
    ]
    cast(Audio, documents[4][0]).wave[7] = np.nan  # its codec refuses it, beside others
    batch = processor.encode_batch(documents)
    assert ["lone surrogate" in str(each) for each in batch] == [False, True, False, False, False]
    assert "no finite numbers" in str(batch[4])
    for parts, segments in zip(documents, batch, strict=True):
        if isinstance(segments, UserError):
            with pytest.raises(UserError):
                processor.encode_parts(parts)
            continue
        assert len(segments) == len(parts)
        for part, segment in zip(parts, segments, strict=True):
            [alone] = processor.encode_parts([part])
            assert (alone.modality, alone.codes.dtype) == (segment.modality, segment.codes.dtype)
            assert np.array_equal(alone.codes, segment.codes)
