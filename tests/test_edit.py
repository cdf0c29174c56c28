"""Which codes an edit makes anew, on small codecs."""

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.edit import Edit
from mmpt.parts import Audio, Image, Video
from mmpt.processor import Processor


@pytest.fixture(scope="module")
def processor(image_codec, video_codec, speech_codec, text_codec, tmp_path_factory) -> Processor:
    folder, names = tmp_path_factory.mktemp("codecs"), []
    for codec in (text_codec, image_codec, video_codec, speech_codec):
        codec.save(folder / codec.kind)
        names.append(str(folder / codec.kind))
    return Processor.load(names, max_side=32)


def image(height: int = 32, width: int = 32) -> Image:
    return Image(np.zeros((height, width, 3), dtype=np.uint8))


def test_a_box_of_pixels_is_the_codes_that_it_touches(processor):
    segment, redo = Edit.box(image(), top=8, left=15, height=8, width=2).encode(processor)
    expected = np.zeros((4, 4), dtype=bool)
    expected[1, 1:3] = True
    assert segment.codes.shape == redo.shape
    assert np.array_equal(redo, expected)


def test_the_box_of_a_picture_that_is_shrunk_is_shrunk_with_it(processor):
    _, redo = Edit.box(image(64, 64), top=0, left=0, height=16, width=17).encode(processor)
    expected = np.zeros((4, 4), dtype=bool)
    expected[0, :2] = True
    assert np.array_equal(redo, expected)


def test_a_stretch_of_a_video_is_the_latent_frames_that_it_touches(processor):
    video = Video(np.zeros((9, 16, 16, 3), dtype=np.uint8), 10.0)
    _, redo = Edit.stretch(video, start=0.1, stop=0.3).encode(processor)
    assert redo.all((1, 2)).tolist() == [False, True, False]
    assert redo.any((1, 2)).tolist() == [False, True, False]
    _, redo = Edit.box(video, top=0, left=0, height=8, width=8).encode(processor)
    assert redo.sum((1, 2)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_a_stretch_of_sound_is_the_frames_that_it_touches(processor, sample_rate):
    sound = Audio(np.zeros(sample_rate, dtype=np.float32), sample_rate)
    segment, redo = Edit.stretch(sound, start=0.25, stop=0.5).encode(processor)
    codec = next(c for c in processor.media.values() if c.sample_rate)
    rate = codec.sample_rate / codec.samples_per_code
    chosen = redo.reshape(-1, codec.num_codebooks)
    assert segment.codes.shape == redo.shape
    assert (chosen == chosen[:, :1]).all()
    places = chosen[:, 0].nonzero()[0]
    assert abs(places[0] - 0.25 * rate) <= 1
    assert abs(places[-1] + 1 - 0.5 * rate) <= 1


def test_a_picture_is_extended_by_what_is_made(processor):
    edit = Edit.extend(image(16, 16), right=16)
    assert edit.part.pixels.shape == (16, 32, 3)
    _, redo = edit.encode(processor)
    assert np.array_equal(redo, [[False, False, True, True]] * 2)


def test_an_extended_picture_is_never_shrunk(processor):
    edit = Edit.extend(image(32, 32), right=16)  # max_side is 32
    with pytest.raises(UserError, match="32 x 48 pixels, this model reads at most 32 a side"):
        edit.encode(processor)


def test_what_cannot_be_edited_is_refused():
    with pytest.raises(UserError, match="needs bool"):
        Edit(image(), np.ones((3, 3), dtype=bool))
    with pytest.raises(UserError, match="nothing is to be made anew"):
        Edit(image(), np.zeros((32, 32), dtype=bool))
    with pytest.raises(UserError, match="outside"):
        Edit.box(image(), top=40, left=0, height=1, width=1)
    with pytest.raises(UserError, match="no stretch"):
        Edit.stretch(Audio(np.zeros(100, dtype=np.float32), 8000), start=2, stop=3)
    with pytest.raises(UserError, match="0 or more"):
        Edit.extend(image(), top=-1)
