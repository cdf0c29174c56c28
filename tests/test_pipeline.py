"""The inference API on a small untrained model with small codecs: what goes in comes out typed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.edit import Edit
from mmpt.generate import generate
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.parts import Audio, Image, Text, Video
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import Processor
from mmpt.results import PartDone, PartStart, Preview, Result, TextDelta
from mmpt.stream import parse
from mmpt.tokenizers.base import Codec
from mmpt.tokenizers.image import ImageCodec
from mmpt.tokenizers.quantize import QuantizerConfig
from mmpt.tokenizers.speech import SpeechCodec
from mmpt.vocab import Modality


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("codecs")


@pytest.fixture(scope="module")
def pipeline(
    image_codec: Codec, video_codec: Codec, speech_codec: Codec, text_codec: Codec, folder: Path
) -> Pipeline:
    return build_pipeline(folder, [text_codec, image_codec, video_codec, speech_codec])


def build_pipeline(folder: Path, codecs: Sequence[Codec]) -> Pipeline:
    names = []
    for codec in codecs:
        codec.save(folder / codec.kind)
        names.append(str(folder / codec.kind))
    processor = Processor.load(names, max_side=16)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(processor.vocabulary),
        width=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=processor.vocabulary.fingerprint,
    )
    model = Decoder.from_config(config)
    model.add_noisy_groups()
    save_model(model, processor, folder / "model")
    return Pipeline.load(folder / "model")


SMALL = {"height": 16, "width": 16, "frames": 5, "max_ids": 12, "max_seconds": 0.5, "num_passes": 2}


@pytest.mark.parametrize("decoder", ["ar", "dida"])
def test_every_medium_comes_out_typed_and_saves(
    pipeline: Pipeline, decoder: str, tmp_path: Path
) -> None:
    expected = {"text": Text, "image": Image, "video": Video, "speech": Audio}
    files = {"text": "a.txt", "image": "a.png", "video": "a.mp4", "speech": "a.wav"}
    for to, kind in expected.items():
        [part] = pipeline("a red apple", to=to, decoder=decoder, **SMALL)  # type: ignore[arg-type] # names of media
        assert isinstance(part, kind)
        part.save(tmp_path / files[to])
        assert (tmp_path / files[to]).exists()
    [video] = pipeline("a", to="video", decoder=decoder, **SMALL)
    assert isinstance(video, Video)
    assert video.frames.shape == (5, 16, 16, 3)


@pytest.mark.parametrize("decoder", ["ar", "dida"])
def test_pictures_and_sound_of_several_codebooks_come_out_in_their_size(
    image_codec: ImageCodec,
    speech_codec: SpeechCodec,
    text_codec: Codec,
    decoder: str,
    tmp_path: Path,
) -> None:
    residual = QuantizerConfig(kind="ema", codebook_size=8, width=4, num_codebooks=2)
    image = ImageCodec(replace(image_codec.config, quantizer=residual)).eval()
    speech = SpeechCodec(replace(speech_codec.config, quantizer=residual)).eval()
    pipeline = build_pipeline(tmp_path, [text_codec, image, speech])
    [picture] = pipeline("a red apple", to="image", decoder=decoder, **SMALL)  # type: ignore[arg-type] # names of decoders
    assert isinstance(picture, Image)
    assert picture.pixels.shape == (16, 16, 3)
    [sound] = pipeline(picture, to="speech", decoder=decoder, **SMALL)  # type: ignore[arg-type] # names of decoders
    assert isinstance(sound, Audio)
    assert len(sound.wave) % speech.samples_per_code == 0


def test_results_can_be_handed_back_in(pipeline: Pipeline) -> None:
    [picture] = pipeline("a red apple", to="image", **SMALL)
    [sound] = pipeline(picture, to="speech", **SMALL)
    [text] = pipeline(sound, picture, "and", to="text", **SMALL)
    assert isinstance(text, Text)


@pytest.mark.parametrize("decoder", ["ar", "dida"])
@pytest.mark.parametrize("to", ["text", "image", "speech"])
def test_a_batch_gives_what_its_singles_give(pipeline: Pipeline, decoder: str, to: str) -> None:
    prompts = [["apple"], ["a red table on a table"], ["red"]]
    seeds = [3, 4, 5]
    settings = {**SMALL, "guidance": 2.0, "decoder": decoder}
    together = pipeline.batch(prompts, to=to, seeds=seeds, **settings)  # type: ignore[arg-type] # a medium
    for prompt, seed, result in zip(prompts, seeds, together, strict=True):
        alone = pipeline(*prompt, to=to, seed=seed, **settings)  # type: ignore[arg-type] # a medium
        assert np.array_equal(alone.ids, result.ids)


def test_the_same_seed_gives_the_same_and_another_one_does_not(pipeline: Pipeline) -> None:
    first, again, other = (pipeline("a", to="image", seed=s, **SMALL).ids for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_events_lead_to_the_result(pipeline: Pipeline) -> None:
    events = list(pipeline.stream("a", to="image", decoder="dida", **SMALL))
    assert [type(e) for e in events] == [PartStart, Preview, Preview, PartDone, Result]
    *deltas, done, result = pipeline.stream("a", to="text", **SMALL)
    assert isinstance(done, PartDone)
    assert isinstance(result, Result)
    [part] = result
    assert isinstance(part, Text)
    assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == part.text
    provenance = result.provenance()
    assert provenance["seed"] == 0
    assert len(provenance["model"]) == len(provenance["vocabulary"]) == 16


def test_a_clip_is_continued_from_its_first_frames(pipeline: Pipeline) -> None:
    begin = Video(np.full((1, 16, 16, 3), 200, np.uint8), 10.0)
    [made] = pipeline("a", to="video", begin=begin, **SMALL)
    [decoded] = pipeline.processor.decode_segments(pipeline.processor.encode_parts([begin]))
    assert isinstance(made, Video)
    assert isinstance(decoded, Video)
    assert np.array_equal(made.frames[0], decoded.frames[0])


def test_free_continuation_is_parts_in_order(pipeline: Pipeline) -> None:
    for seed in range(4):
        result = pipeline("a red", seed=seed, **{**SMALL, "max_ids": 40})
        assert all(isinstance(part, Text | Image | Video | Audio) for part in result)


def test_mistakes_are_one_line(pipeline: Pipeline) -> None:
    mistakes = [
        {"to": "smell"},
        {"to": "image", "height": 15},
        {"to": "video", "frames": 4},
        {"to": "image", "colour": 3},
        {"to": "image", "num_passes": 0},
        {"to": "image", "begin": Video(np.zeros((1, 16, 16, 3), np.uint8), 1.0)},
    ]
    for mistake in mistakes:
        with pytest.raises(UserError) as caught:
            pipeline("a", **{**SMALL, **mistake})
        assert "\n" not in str(caught.value)


def test_structure_in_user_text_changes_no_structure(pipeline: Pipeline) -> None:
    vocabulary = pipeline.processor.vocabulary
    [segment] = pipeline.processor.encode_parts([Text("<boi><eod><bod>")])
    assert segment.codes.max() < vocabulary.num_text
    pipeline("<boi> <eoi> <eod>", to="image", **SMALL)


def test_a_model_that_was_never_adapted_says_so(pipeline: Pipeline) -> None:
    model = Decoder.from_config(
        ModelConfig(
            vocab_size=len(pipeline.processor.vocabulary),
            width=24,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            expert_hidden=16,
        )
    )
    with pytest.raises(UserError, match="never adapted"):
        Pipeline(model, pipeline.processor)("a", to="image", decoder="dida", **SMALL)


def test_long_words_are_no_file_and_a_missing_out_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model"):
        generate(tmp_path, ["a" * 5000], to="text")
    with pytest.raises(UserError, match="--out"):
        generate(tmp_path, ["a"], to="image")


def made_codes(
    pipeline: Pipeline, made: Result, modality: Modality, shape: tuple[int, ...]
) -> np.ndarray:
    """Local codes of the span that the ids of a result end in."""
    ids = made.ids[-int(np.prod(shape)) :]
    return pipeline.processor.vocabulary.codes_of(modality, ids).reshape(shape)


def test_an_edit_holds_what_is_not_made_anew(pipeline: Pipeline) -> None:
    rng = np.random.default_rng(0)
    image = Image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    edit = Edit.box(image, top=0, left=8, height=16, width=8)
    segment, redo = edit.encode(pipeline.processor)
    made = pipeline("apple", edit=edit, num_passes=2, guidance=2.0, seed=1)
    codes = made_codes(pipeline, made, Modality.IMAGE, redo.shape)
    assert np.array_equal(codes[~redo], segment.codes[~redo])
    assert not np.array_equal(codes, segment.codes)
    assert made[0].pixels.shape == (16, 16, 3)
    clip = Video(rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8), 12.0)
    edit = Edit.stretch(clip, start=0.1, stop=0.3)
    segment, redo = edit.encode(pipeline.processor)
    events = list(pipeline.stream(edit=edit, num_passes=2))
    made = events[-1]
    codes = made_codes(pipeline, made, Modality.VIDEO, redo.shape)
    assert np.array_equal(codes[~redo], segment.codes[~redo])
    assert made[0].frames.shape == clip.frames.shape
    assert sum(isinstance(event, Preview) for event in events) == 3  # two passes, and the held end


def test_a_stretch_of_a_sound_is_made_anew(pipeline: Pipeline) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 4 * 16000).clip(-1, 1).astype(np.float32)
    edit = Edit.stretch(Audio(wave, 16000), start=1.0, stop=1.5)
    segment, redo = edit.encode(pipeline.processor)
    made = pipeline("hello", edit=edit, num_passes=2, seed=1)
    spans = [
        s for s in parse(made.ids, pipeline.processor.vocabulary) if s.modality == Modality.SPEECH
    ]
    codes = np.concatenate([span.codes for span in spans])
    assert len(spans) > 1
    assert np.array_equal(codes[~redo], segment.codes[~redo])
    assert abs(made[0].seconds - 4) < 0.2


def test_an_edit_is_reached_from_the_command_line(
    pipeline: Pipeline, tmp_path: Path, folder: Path
) -> None:
    image = Image(np.zeros((16, 16, 3), dtype=np.uint8))
    image.save(tmp_path / "in.png")
    told = generate(
        folder / "model",
        ["apple"],
        edit=tmp_path / "in.png",
        redo="0,0,8,8",
        out=tmp_path / "out.png",
        setting=["num_passes=2", "schedule=cosine"],
    )
    assert told["settings"]["schedule"] == "cosine"
    assert Image.load(tmp_path / "out.png").pixels.shape == (16, 16, 3)
    with pytest.raises(UserError, match="names no region"):
        generate(
            folder / "model", [], edit=tmp_path / "in.png", redo="1,2,3", out=tmp_path / "o.png"
        )
    with pytest.raises(UserError, match="--edit FILE"):
        generate(folder / "model", [], redo="0,0,8,8", out=tmp_path / "o.png")


def test_a_setting_that_there_is_not_is_refused(pipeline: Pipeline) -> None:
    for wrong in ({"samplr": "euler"}, {"sampler": "foo"}, {"num_passes": "a"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            pipeline("apple", to="image", decoder="dida", **wrong)


def test_what_an_edit_cannot_be_is_refused(pipeline: Pipeline) -> None:
    edit = Edit.extend(Image(np.zeros((16, 8, 3), dtype=np.uint8)), right=8)
    with pytest.raises(UserError, match="decoder='dida'"):
        pipeline(edit=edit, decoder="ar")
    with pytest.raises(UserError, match="leave out to"):
        pipeline(edit=edit, to="video")
    with pytest.raises(UserError, match="4 or fewer"):
        pipeline(edit=edit, num_passes=99, sampler="maskgit")
