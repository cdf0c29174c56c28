"""The page in a browser: what a person does, and what is there afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpt.parts import Image

EXTENT = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"


def ask(page: Any, text: str, kind: str, *, wait: bool = True) -> Any:
    """Write, send by Enter, and wait for the answer: its element."""
    number = page.locator("#history .turn").count()
    page.click(f"#kind >> text={kind}")
    page.fill("#composer textarea", text)
    page.press("#composer textarea", "Enter")
    turn = page.locator("#history .turn").nth(number)
    if wait:
        turn.locator(".answer.done").last.wait_for()
    return turn


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image(np.full((40, 60, 3), (200, 30, 30), np.uint8)).save(path)
    return path


def test_what_is_written_is_answered_by_text_a_picture_speech_and_a_clip(visit: Any) -> None:
    page = visit()
    page.wait_for_function("document.activeElement.tagName == 'TEXTAREA'")
    assert ask(page, "a <b>red</b> <boi> apple", "Text").locator(".parts .part").count() == 1
    assert page.inner_text("#history .asked .said") == "a <b>red</b> <boi> apple"
    drawn = ask(page, "red apple", "Image").locator(".parts img")
    assert drawn.evaluate("image => image.naturalWidth") == 64
    spoken = ask(page, "apple", "Speech")
    assert spoken.locator("audio").evaluate("audio => audio.src.slice(0, 14)") == "data:audio/wav"
    # it was heard while it was made
    assert page.evaluate("mmpt.heard") >= 1
    clip = ask(page, "table", "Video").locator(".parts picture img")
    assert clip.evaluate("image => image.src.slice(0, 15)") == "data:image/webp"
    assert page.locator(".problem").count() == 0


def test_both_decoders_stand_side_by_side_with_their_times(visit: Any) -> None:
    page = visit()
    page.click("#decoder >> text=Both")
    turn = ask(page, "apple", "Image")
    notes = turn.locator("footer").all_inner_texts()
    assert ["one id at a time" in notes[0], "in parallel" in notes[1]] == [True, True]
    seeds = {note[note.index("seed") :].split()[1] for note in notes}
    assert len(seeds) == 1
    left, right = (turn.locator(".answer").nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_a_file_is_uploaded_and_a_region_of_it_made_anew(visit: Any, picture: Path) -> None:
    page = visit()
    page.set_input_files("#composer input[type=file]", picture)
    page.wait_for_selector("#composer .thumbnail-item, #composer .thumbnail-wrapper img")
    turn = ask(page, "What is this?", "Text")
    assert turn.locator(".asked img").evaluate("image => image.naturalWidth") == 60
    turn.locator(".asked [data-act=redo]").click()
    box = page.locator(".easel canvas").bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 60, steps=3)
    page.mouse.up()
    page.fill(".easel [name=text]", "an apple")
    page.press(".easel [name=text]", "Enter")
    edited = page.locator("#history .turn").nth(1)
    edited.locator(".answer.done img").wait_for()
    assert edited.locator(".answer img").evaluate("image => image.naturalWidth") == 32
    assert page.locator(".easel").count() == 0 or not page.locator(".easel").is_visible()


def test_the_microphone_is_recorded_answered_and_edited(visit: Any) -> None:
    page = visit()
    page.click("#composer [data-testid=microphone-button]")
    page.wait_for_timeout(900)
    page.click("#composer [aria-label='Stop recording']")
    page.wait_for_selector("#composer .thumbnail-item")
    turn = ask(page, "", "Text")
    assert turn.locator(".asked audio").count() == 1
    turn.locator(".asked [data-act=redo]").click()
    page.fill(".easel [name=stop]", "0.5")
    page.click(".easel .primary")
    page.locator("#history .turn").nth(1).locator(".answer.done audio").wait_for()


def film_for_long(page: Any) -> Any:
    """Asks for a clip that takes a second; its turn, once the first pass is shown."""
    if not page.locator("#new").is_visible():
        page.click("#settings > button")
    for label, value in (("Passes", "64"), ("Frames", "33")):
        box = page.locator(f"#settings input[type=number][aria-label*='{label}']")
        box.fill(value)
        box.press("Tab")
    turn = ask(page, "apple", "Video", wait=False)
    page.wait_for_selector("#live progress")
    return turn


def test_denoising_is_shown_and_escape_stops_it_and_what_was_made_stays(visit: Any) -> None:
    page = visit()
    turn = film_for_long(page)
    done = page.locator("#live progress").evaluate("bar => bar.value")
    page.wait_for_function(
        "done => document.querySelector('#live progress')?.value > done", arg=done
    )
    page.press("body", "Escape")
    turn.wait_for()
    assert "Stopped" in turn.inner_text()
    assert turn.locator(".parts img").count() == 1
    assert ask(page, "and now?", "Text").locator(".parts .part").count() == 1


def test_the_drawer_shows_ids_and_gives_files(visit: Any, tmp_path: Path, server: str) -> None:
    page = visit()
    page.fill("#composer textarea", "")
    ask(page, "apple", "Image").locator("[data-act=inspect]").click()
    page.wait_for_selector("#ribbon iframe")
    frame = page.frame_locator("#ribbon iframe")
    assert frame.locator(".ribbon i").count() > 64
    with page.expect_download() as waiting:
        page.locator("#files a[download]").last.click()
    saved = tmp_path / "result.json"
    waiting.value.save_as(saved)
    from mmpt.provenance import read_recording

    assert read_recording(saved).provenance.parts[0].type == "image"


def test_an_example_runs_by_a_click_and_a_new_conversation_begins(visit: Any) -> None:
    page = visit()
    page.click("#examples button >> nth=0")
    page.locator("#history .answer.done").wait_for()
    assert not page.locator("#start").is_visible()
    page.click("#settings > button")
    page.click("#new")
    page.locator("#start").wait_for()
    assert page.locator("#history .turn").count() == 0


def test_it_fits_a_phone_in_dark_and_in_light(visit: Any) -> None:
    page = visit(width=390, height=844, dark=True)
    page.click("#decoder >> text=Both")
    ask(page, "x" * 300, "Image")
    wide, seen = page.evaluate(EXTENT)
    assert wide <= seen
    assert brightness(page) < 200
    page.click("#theme")
    assert brightness(page) > 600
    for name in ("#composer [data-testid=submit-button]", "#kind label", "#settings > button"):
        box = page.locator(name).first.bounding_box()
        assert box["y"] + box["height"] <= 844


def brightness(page: Any) -> int:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, colour[4:-1].split(",")))


def test_a_broken_file_is_refused_in_a_sentence_and_the_words_stay(
    visit: Any, tmp_path: Path
) -> None:
    page = visit()
    broken = tmp_path / "cat.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    page.set_input_files("#composer input[type=file]", broken)
    page.wait_for_timeout(400)
    page.fill("#composer textarea", "What is this?")
    page.press("#composer textarea", "Enter")
    page.wait_for_selector(".problem")
    assert "cat.png" in page.inner_text(".problem")
    assert page.input_value("#composer textarea") == "What is this?"


def test_closing_the_tab_in_the_middle_lets_others_be_answered(visit: Any) -> None:
    leaving = visit()
    film_for_long(leaving)
    leaving.close()
    assert ask(visit(), "apple", "Text").locator(".parts .part").count() == 1
