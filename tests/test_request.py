"""What is asked: parts of what people have, slots, and JSON that says all of it."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmpt.config import UserError
from mmpt.edit import Edit
from mmpt.parts import Audio, Image, Message, Text, Video
from mmpt.request import Generate, Request
from mmpt.results import Settings

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
WAVE = np.random.default_rng(0).normal(0, 0.1, 800).astype(np.float32)


def test_what_people_have_becomes_parts(tmp_path: Path) -> None:
    Image(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("hello")
    palette = PIL.Image.fromarray(PIXELS).convert("RGBA")
    items = Request.of(
        ["a.png", PIXELS, np.stack([PIXELS] * 5), tmp_path / "a.png", tmp_path / "a.txt", palette]
    ).items
    assert items[0] == Text("a.png")  # words are never a file
    assert [type(i) for i in items[1:6]] == [Image, Video, Image, Text, Image]
    for item in (items[1], items[3], items[5]):
        assert isinstance(item, Image)
        assert np.array_equal(item.pixels, PIXELS)
    stereo = (np.stack([WAVE, WAVE], axis=1) * 32_768).round().astype(np.int16)
    for given in ((WAVE, 8000), (8000, WAVE), (WAVE.astype(np.float64), 8000), (stereo, 8000)):
        part, _ = Request.of([given]).items
        assert isinstance(part, Audio)
        assert part.sample_rate == 8000
        assert np.allclose(part.wave, WAVE, atol=1e-4)


def test_messages_are_read_from_dictionaries() -> None:
    given = {
        "role": "user",
        "content": [{"type": "text", "text": "hi"}, {"type": "image", "image": PIXELS}],
    }
    message, plain, slot = Request.of([given, {"role": "assistant", "content": "hello"}]).items
    assert isinstance(message, Message)
    assert [type(part) for part in message.content] == [Text, Image]
    assert plain == Message("assistant", (Text("hello"),))
    assert isinstance(slot, Generate)
    assert slot.medium is None


def test_a_request_comes_back_from_json_whole() -> None:
    clip = Video(np.stack([PIXELS[:, :16]] * 5), 9.5)
    request = Request.of(
        [
            Message("user", (Text("x"), Image(PIXELS))),
            Audio(WAVE, 8000),
            Generate("video", begin=clip, frames=9),
            "and",
            Generate("image", edit=Edit.box(Image(PIXELS), top=0, left=0, height=4, width=4)),
            Generate("text", stop=[".", "\n"]),
        ],
        seed=7,
        settings={"guidance": 2, "height": 16},
    )
    data = json.loads(json.dumps(request.to_json()))
    again = Request.from_json(data)
    assert again.to_json() == data
    assert again.seed == 7
    assert [slot.chosen for slot in again.slots] == [slot.chosen for slot in request.slots]
    video, image, text = again.slots
    assert video.chosen == Settings(guidance=2.0, height=16, frames=9)
    assert image.chosen.decoder == "dida"
    assert text.chosen.stop == (".", "\n")
    assert video.begin is not None
    assert np.array_equal(video.begin.frames, clip.frames)
    assert image.edit is not None
    assert image.edit.redo.sum() == 16


def test_what_no_request_can_be_is_refused_with_the_nearest_name() -> None:
    for make, word in (
        (lambda: Generate("imgae"), "'image'"),
        (lambda: Generate("image", hieght=64), "'height'"),
        (lambda: Generate("image", height="big"), "height must be int"),
        (lambda: Generate("text", begin=Video(np.stack([PIXELS]), 1.0)), "'video'"),
        (lambda: Request.of(["a"], settings={"guidence": 2.0}), "'guidance'"),
        (lambda: Request.of([Generate("text")], to="image"), "to, begin and edit"),
        (lambda: Request.of([object()]), "object is no part"),
        (lambda: Request.of([np.zeros((4, 4), np.uint8)]), r"\(4, 4\)"),
        (lambda: Request.of([{"text": "a"}]), "no message"),
        (lambda: Request.of([Message("system", (Text("a"),))]), "'system'"),  # type: ignore[arg-type] # the mistake
        (lambda: Request.of(["a"], seed=-1), "seed"),
        (lambda: Request.from_json({"items": []}), "no request"),
        (lambda: Request.from_json({"format_version": 99}), "upgrade"),
    ):
        with pytest.raises(UserError, match=word) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_packed_bytes_cannot_claim_or_hold_more_than_is_allowed() -> None:
    data = Request.of([PIXELS]).to_json()
    data["items"][0]["pixels"]["shape"] = [1 << 20, 1 << 20, 3]
    with pytest.raises(UserError, match="at most"):
        Request.from_json(data)
    data["items"][0]["pixels"]["shape"] = [16, 25, 3]
    with pytest.raises(UserError, match="broken"):
        Request.from_json(data)
