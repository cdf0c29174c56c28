"""What may be sent, what is kept of it, and what conversations do with it, without a server."""

import asyncio
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.demo.conversation import Answer, Conversation, Turn, Visitors
from mmpt.demo.easel import read_edit, render_easel
from mmpt.demo.guard import Guard
from mmpt.demo.limits import Limits, check_settings, read_file, read_files, read_seed
from mmpt.demo.page import fetch_nothing
from mmpt.demo.render import render_turn
from mmpt.demo.sound import Heard
from mmpt.page.cells import picture_uri
from mmpt.parts import Audio, Image, Message, Part, Text, Video
from mmpt.pipeline import Pipeline
from mmpt.results import Result

SMALL = {"height": 16, "width": 16, "frames": 5, "max_ids": 8, "max_seconds": 0.5, "num_passes": 2}
LIMITS = Limits(side=64, sound=2.0, clip=1.0, frames=3 * 64 * 64 * 30)


def picture(height: int = 48, width: int = 32) -> Image:
    return Image(np.full((height, width, 3), 90, np.uint8))


def turn(*asked: Part, to: Any = "text", **more: Any) -> Turn:
    settings = check_settings(SMALL, LIMITS)
    return Turn(
        number=0, asked=list(asked), to=to, seed=1, form="conversation", settings=settings, **more
    )


def test_big_pictures_and_long_clips_become_small(tmp_path: Path) -> None:
    picture(300, 200).save(tmp_path / "big.png")
    big = read_file(tmp_path / "big.png", LIMITS)
    assert isinstance(big, Image)
    assert big.pixels.shape == (64, 43, 3)
    Video(np.zeros((48, 32, 32, 3), np.uint8), 24.0).save(tmp_path / "clip.mp4")
    clip = read_file(tmp_path / "clip.mp4", LIMITS)
    assert isinstance(clip, Video)
    assert (clip.frames.shape, clip.fps) == ((12, 32, 32, 3), 12.0)


def test_a_clip_of_endless_frames_is_read_no_further_than_the_limit(tmp_path: Path) -> None:
    import PIL.Image

    path = tmp_path / "bomb.gif"
    PIL.Image.new("P", (2000, 2000)).save(path)
    data = path.read_bytes()
    start = data.index(b"\x2c")  # one picture, again and again
    path.write_bytes(data[:start] + data[start:-1] * 500 + b"\x3b")
    limits = Limits(frames=3 * 2000 * 2000 * 3)
    clip = read_file(path, limits)
    assert isinstance(clip, Image | Video)
    with pytest.raises(UserError, match="too large"):
        read_file(path, Limits(frames=1000))
    with pytest.raises(UserError, match=r"bomb.gif: it has 2000 x 2000 pixels"):
        read_file(path, Limits(pixels=1000))


def test_what_is_too_long_is_refused(tmp_path: Path) -> None:
    Audio(np.zeros(50_000, np.float32), 16_000).save(tmp_path / "long.wav")
    with pytest.raises(UserError, match=r"long.wav: it is longer than 2 s"):
        read_file(tmp_path / "long.wav", LIMITS)
    with pytest.raises(UserError, match="5 files at once; at most 4"):
        read_files([tmp_path / "a.png"] * 5, LIMITS)
    with pytest.raises(UserError, match="gone"):
        read_file(tmp_path / "none.png", LIMITS)
    with pytest.raises(UserError, match="at most"):
        check_settings({"max_ids": 10_000}, LIMITS)
    with pytest.raises(UserError, match="whole number"):
        read_seed("-1")
    assert read_seed(" 7 ") == 7


def test_a_conversation_is_given_in_turns_and_goes_on_with_the_first_of_two(
    pipeline: Pipeline,
) -> None:
    talk = Conversation()
    list(talk.answer(pipeline, turn(Text("red"), to="image"), ["dida", "ar"], LIMITS))
    list(talk.answer(pipeline, turn(Text("what?")), ["ar"], LIMITS))
    result = talk.find(2).result
    assert isinstance(result, Result)
    messages = [item for item in result.request.items if isinstance(item, Message)]
    assert [m.role for m in messages] == ["user", "assistant", "user"]
    [drawn] = messages[1].content
    assert isinstance(drawn, Image)
    first = talk.find(1, 0).parts[0]
    assert isinstance(first, Image)
    assert np.array_equal(drawn.pixels, first.pixels)
    assert "one id at a time" in render_turn(talk.turns[0])


def test_a_turn_that_is_stopped_keeps_what_was_made(pipeline: Pipeline) -> None:
    talk = Conversation()
    events = talk.answer(pipeline, turn(Text("red"), to="image"), ["dida"], LIMITS)
    for _ in events:
        if talk.turns[0].answers[0].live is not None:
            talk.stop()
    answer = talk.find(1)
    assert (answer.note, len(answer.parts), answer.result) == ("stopped", 1, None)
    assert talk.cancel is None


def test_one_turn_at_a_time_and_leaving_ends_it(pipeline: Pipeline) -> None:
    visitors = Visitors(Limits(visitors=2))
    talk = visitors.find("a")
    events = talk.answer(pipeline, turn(Text("red"), to="image"), ["dida"], LIMITS)
    next(events)
    with pytest.raises(UserError, match="still being answered"):
        next(talk.answer(pipeline, turn(Text("blue")), ["ar"], LIMITS))
    visitors.find("b")
    visitors.find("c")  # the oldest of three is forgotten
    assert talk.cancel is not None
    assert talk.cancel.is_set()
    events.close()
    assert visitors.find("a") is not talk


@pytest.mark.parametrize("error", [UserError("<b>no</b>"), ZeroDivisionError()])
def test_what_goes_wrong_is_a_note_of_the_answer(pipeline: Pipeline, error: Exception) -> None:
    class Broken:
        def stream(self, *items: Any, **_: Any) -> Any:
            raise error

    talk = Conversation()
    list(talk.answer(Broken(), turn(Text("red")), ["ar"], LIMITS))
    shown = render_turn(talk.turns[0])
    assert ("&lt;b&gt;no" in shown) == isinstance(error, UserError)
    assert 'role="alert"' in shown
    list(talk.answer(pipeline, turn(Text("blue")), ["ar"], LIMITS))
    assert talk.find(2).result is not None


def test_a_painted_region_becomes_an_edit() -> None:
    part, mask = picture(), np.zeros((48, 32, 4), np.uint8)
    mask[8:16, 8:24, 3] = 255  # black paint on nothing
    edit = read_edit(part, {"mask": picture_uri(mask)})
    assert edit.redo.sum() == 8 * 16
    assert edit.redo[8, 8]
    clip = Video(np.zeros((5, 48, 32, 3), np.uint8), 12.0)
    assert read_edit(clip, {"mask": picture_uri(mask)}).redo.sum() == 5 * 8 * 16
    sound = Audio(np.zeros(16_000, np.float32), 16_000)
    assert read_edit(sound, {"start": "0.5", "stop": "0.75"}).redo.sum() == 4000
    for said in ({}, {"mask": picture_uri(mask[:5])}, {"mask": "data:image/png;base64,?"}):
        with pytest.raises(UserError, match="paint"):
            read_edit(part, said)
    with pytest.raises(UserError, match="second"):
        read_edit(sound, {"start": "x"})
    assert 'data-part="1.0.0"' in render_easel(sound, "1.0.0")


def test_sound_goes_out_chunk_by_chunk() -> None:
    asked = turn(Text("a"))
    asked.answers.append(Answer(decoder="ar"))
    heard = Heard(asked)
    wave = np.linspace(-2, 2, 100, dtype=np.float32)
    first, second = heard.push(wave, 16_000), heard.push(wave, 16_000)
    assert first["name"] == second["name"]
    assert (len(first["chunks"]), len(second["chunks"])) == (1, 2)  # type: ignore[arg-type]


def ask(guard: Guard, path: str, *, method: str = "GET", length: int = 0) -> int:
    """The status that an ASGI app behind the guard would give."""
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * min(length, 1000), "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"content-length", str(length).encode())]
    scope = {"type": "http", "path": path, "method": method, "headers": headers}
    asyncio.run(guard(scope | {"client": ("127.0.0.1", 1)}, receive, send))
    return statuses[0]


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return Guard(app, Limits(requests=3, folder=100, body=1000), tmp_path)


def test_an_address_in_place_of_a_file_is_not_fetched() -> None:
    box = gr.MultimodalTextbox(render=False)
    fetch_nothing(box)
    with pytest.raises(gr.Error, match="addresses are not read"):
        asyncio.run(box.async_move_resource_to_block_cache("http://127.0.0.1:1/cat.png"))


def test_what_is_too_much_of_a_conversation_is_forgotten(pipeline: Pipeline) -> None:
    talk, limits = Conversation(), Limits(kept=3 * 48 * 32 * 3 + 2000, turns=4)
    for number in range(6):
        list(talk.answer(pipeline, turn(picture()), ["ar"], limits))
        assert len(talk.turns) == min(number + 1, 3)
    for _ in range(6):
        list(talk.answer(pipeline, turn(Text("a")), ["ar"], limits))
    assert [each.number for each in talk.turns] == [9, 10, 11, 12]
    with pytest.raises(UserError, match="forgotten"):
        talk.find(1)


def test_the_guard_hands_on_what_is_named_and_nothing_else(guard: Guard) -> None:
    assert ask(guard, "/") == ask(guard, "/gradio_api/info") == 200
    assert ask(guard, "/gradio_api/proxy=http://x") == ask(guard, "/monitoring") == 404


def test_the_guard_bounds_bodies_requests_and_the_folder(guard: Guard, tmp_path: Path) -> None:
    join = "/gradio_api/queue/join"
    assert ask(guard, join, method="POST", length=2000) == 413
    assert [ask(guard, join, method="POST", length=9) for _ in range(4)] == [200] * 3 + [429]
    (tmp_path / "file").write_bytes(bytes(200))
    guard.limits = Limits(folder=100)
    assert ask(guard, "/gradio_api/upload", method="GET") == 507
