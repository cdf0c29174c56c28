"""Replay: every saved result is made again to the last bit, or what differs is named."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.edit import Edit
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.parts import Audio, Image, Message, Text, Video, load_part
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import Processor
from mmpt.provenance import PartRecord, _note, _signed, read_note, read_recording
from mmpt.replay import replay
from mmpt.request import Generate
from mmpt.results import Result

SMALL = {"height": 16, "width": 16, "frames": 5, "max_ids": 12, "max_seconds": 0.5, "num_passes": 2}
APPLE = Image(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
SOUND = Audio(np.random.default_rng(1).uniform(-0.3, 0.3, 9000).astype(np.float32), 16_000)
CLIP = Video(np.random.default_rng(2).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8), 12.0)
TURNS = [Message("user", (Text("what is this?"), APPLE)), Message("assistant", (Text("red"),))]
EDITED = Edit.box(APPLE, top=0, left=0, height=8, width=8)


def build(folder: Path, zoo: Path, seed: int) -> Path:
    processor = Processor.load(
        [str(zoo / name) for name in ("text", "image", "video", "speech")], max_side=16
    )
    config = ModelConfig(
        vocab_size=len(processor.vocabulary),
        width=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=processor.vocabulary.fingerprint,
    )
    model = Decoder.from_config(config, seed=seed)
    model.add_noisy_groups()
    save_model(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def folder(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model"), zoo, 0)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.load(folder)


ASKED: dict[str, tuple[str, Sequence[Any], dict[str, Any]]] = {
    "text.json": ("text", ["a red apple"], {}),
    "text-dida.json": ("text", [APPLE], {"decoder": "dida"}),
    "caption.json": ("text", [APPLE, "shows"], {"temperature": 0.7}),
    "heard.json": ("text", [SOUND], {"seed": 5}),
    "watched.json": ("text", [CLIP], {}),
    "stop.json": ("text", ["red"], {"stop": ["e"], "max_ids": 20}),
    "image.png": ("image", ["a red apple"], {}),
    "image-dida.png": ("image", ["a red apple"], {"decoder": "dida", "guidance": 2.0}),
    "image.webp": ("image", [SOUND, "red"], {"seed": 9}),
    "wide.png": ("image", [CLIP], {"width": 24}),
    "video.mp4": ("video", ["apple"], {}),
    "video-dida.webp": ("video", [APPLE], {"decoder": "dida"}),
    "video.json": ("video", ["table"], {"top_p": 0.5}),
    "longer.mp4": ("video", ["table"], {"begin": CLIP, "frames": 9}),
    "speech.wav": ("speech", ["apple"], {}),
    "speech-dida.wav": ("speech", [APPLE], {"decoder": "dida", "seed": 3}),
    "speech.json": ("speech", [SOUND], {"guidance": 1.5}),
    "edit.png": ("image", ["red"], {"edit": EDITED}),
    "turns.png": ("image", [*TURNS, Message("user", (Text("draw it"),))], {}),
    "said.wav": ("speech", [*TURNS, Message("user", (Text("say it"),))], {}),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_result_of_any_medium_replays_equal(
    pipeline: Pipeline, folder: Path, name: str, tmp_path: Path
) -> None:
    to, items, settings = ASKED[name]
    asked: dict[str, Any] = SMALL | settings
    result = pipeline(*items, to=to, **asked)  # type: ignore[arg-type] # a medium
    [path] = result.save(tmp_path / name)
    said = replay(path, model=folder)
    assert said["replayed"] == "equal to the last bit", said
    assert "exit_status" not in said
    if path.suffix != ".json":
        load_part(path)
    before = result.ids.copy()
    assert np.array_equal(read_recording(path).provenance.ids, before)


def test_several_slots_replay_from_any_of_their_files(
    pipeline: Pipeline, folder: Path, tmp_path: Path
) -> None:
    slots = [Generate("image"), "says", Generate("speech"), Generate("text")]
    result = pipeline("a red apple", *slots, seed=7, **SMALL)
    paths = result.save(tmp_path / "all")
    assert [path.name for path in paths] == ["1.png", "2.wav", "3.txt", "result.json"]
    for path in paths:
        if path.suffix != ".txt":
            assert replay(str(path), model=str(folder))["replayed"] == "equal to the last bit"
    content = read_recording(paths[-1]).content
    assert content is not None
    assert list(map(PartRecord.of, content)) == list(map(PartRecord.of, result.parts))
    with pytest.raises(UserError, match="one part, the result has 3"):
        result.save(tmp_path / "one.png")


def test_what_the_model_decided_replays(pipeline: Pipeline, folder: Path, tmp_path: Path) -> None:
    result = pipeline("a red apple", seed=2, **{**SMALL, "max_ids": 40})
    [path] = result.save(tmp_path / "a.json")
    assert replay(path, model=folder)["replayed"] == "equal to the last bit"


def test_one_of_a_batch_replays_in_a_batch_of_its_size(
    pipeline: Pipeline, folder: Path, tmp_path: Path
) -> None:
    prompts, seeds = [["red"], ["apple"], ["table"]], [1, 2, 3]
    results = pipeline.batch(prompts, to="image", seeds=seeds, **SMALL)
    [path] = results[1].save(tmp_path / "b.png")
    assert read_recording(path).provenance.place == (1, 3)
    assert replay(path, model=folder)["replayed"] == "equal to the last bit"


def edited(result: Result, path: Path, **changes: Any) -> Path:
    """A PNG whose record says other things, and is signed."""
    record = json.loads(_note(result, 0)) | changes
    record.pop("sha256")
    note = _signed(record)
    replace(result.parts[0], provenance=lambda: note).save(path)
    return path


@pytest.fixture(scope="module")
def result(pipeline: Pipeline) -> Result:
    return pipeline("a red apple", to="image", seed=1, **SMALL)  # type: ignore[arg-type] # SMALL


def test_another_seed_is_reported_by_the_first_id_that_differs(
    result: Result, folder: Path, tmp_path: Path
) -> None:
    request = result.request.to_json() | {"seed": 2}
    path = edited(result, tmp_path / "a.png", request=request)
    said = replay(path, model=folder)
    assert said["exit_status"] == 1
    assert said["circumstances"] == "the same, as far as they are recorded"
    first = said["first_difference"]
    assert first["position"] >= len(result.ids) - 4  # the last four are what was drawn
    assert first["was"].startswith(f"{result.ids[first['position']]} (visual code ")
    assert first["is"] != first["was"]


def test_other_circumstances_are_named_beside_a_difference(
    result: Result, folder: Path, tmp_path: Path
) -> None:
    assert result.circumstances is not None
    changed = asdict(result.circumstances) | {"threads": 4096, "torch": "1.0"}
    same = edited(result, tmp_path / "a.png", circumstances=changed)
    said = replay(same, model=folder)
    assert said["replayed"] == "equal to the last bit"
    expected = {"threads": "4096, now 1", "torch": f"1.0, now {torch.__version__}"}
    assert said["circumstances"] == expected
    request = result.request.to_json() | {"seed": 2}
    said = replay(
        edited(result, tmp_path / "b.png", circumstances=changed, request=request), model=folder
    )
    assert (said["exit_status"], said["circumstances"]) == (1, expected)


def test_threads_are_set_to_the_recorded_number_and_back(
    result: Result, folder: Path, tmp_path: Path
) -> None:
    assert result.circumstances is not None
    changed = asdict(result.circumstances) | {"threads": 2}
    said = replay(edited(result, tmp_path / "a.png", circumstances=changed), model=folder)
    assert "circumstances" not in said
    assert torch.get_num_threads() == 1


def test_another_model_is_refused(result: Result, zoo: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", zoo, 1)
    [path] = result.save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"the file was made by {result.model}"):
        replay(path, model=other)


def test_the_model_is_found_by_its_fingerprint(
    result: Result, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = result.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no model {result.model} in runs"):
        replay(path)
    build(tmp_path / "runs/a/model", zoo, 1)
    build(tmp_path / "runs/b/model", zoo, 0)
    assert replay(path)["replayed"] == "equal to the last bit"


def test_a_picture_that_was_painted_over_is_reported(
    result: Result, folder: Path, tmp_path: Path
) -> None:
    [part] = result.parts
    assert isinstance(part, Image)
    pixels = part.pixels.copy()
    pixels[0, 0] ^= 1
    replace(part, pixels=pixels).save(tmp_path / "a.png")
    said = replay(tmp_path / "a.png", model=folder)
    assert (said["exit_status"], "no longer shows" in said["content"]) == (1, True)


def test_an_edited_record_is_refused(result: Result, tmp_path: Path) -> None:
    [path] = result.save(tmp_path / "a.json")
    text = path.read_text()
    for changed, why in (
        (text.replace('"seed": 1', '"seed": 2'), "was changed after it was written"),
        (re.sub(r'"zlib": "eJ[^"]*"', '"zlib": "eJxjYGBgAAAABAAB"', text), "broken"),
        (text.replace('"content": [', '"content": [{"type": "text", "text": ""}, '), "changed"),
        (text.replace('"mmpt": 1', '"mmpt": 2'), "this mmpt reads 1: upgrade"),
        (text.replace('"mmpt": 1', '"mmpt": "x"'), "holds no result"),
        (text[:-9], "broken"),
        ("[" * 100_000, "broken"),
        ("[]", "holds no result"),
        ("9" * 5000, "broken"),
    ):
        path.write_text(changed)
        with pytest.raises(UserError, match=why) as caught:
            read_recording(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"place": [0, 10**9]}, "in a batch of 1000000000"),
        ({"place": [3, 2]}, "counts to 2, but names 3"),
        ({"part": 9}, "counts to"),
        ({"ids": [10**30]}, None),
        ({"ids": ["1"]}, "must be int"),
        ({"request": []}, "no request"),
        ({"request": None}, "had no room"),
        ({"unknown": 1}, "unknown key"),
        ({"model": 7}, "must be str"),
    ],
)
def test_absurd_records_are_refused_in_one_line(
    result: Result, folder: Path, changes: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    path = edited(result, tmp_path / "a.png", **changes)
    if why is None:
        assert replay(path, model=folder)["replayed"] == "equal to the last bit"
        return
    with pytest.raises(UserError, match=why) as caught:
        replay(path, model=folder)
    assert "\n" not in str(caught.value)


def test_absurd_sizes_are_not_made(result: Result, folder: Path, tmp_path: Path) -> None:
    for key, value in (("height", 1 << 40), ("max_ids", 1 << 40), ("num_passes", 1 << 40)):
        request = result.request.to_json()
        request["items"][-1]["settings"][key] = value
        path = edited(result, tmp_path / "a.png", request=request)
        with pytest.raises(UserError, match=f"{key} = 1099511627776"):
            replay(path, model=folder)


def test_what_has_no_room_in_a_picture_is_left_out(pipeline: Pipeline, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photo = Image(rng.integers(0, 256, (600, 800, 3), dtype=np.uint8))
    result = pipeline(photo, to="image", **SMALL)  # type: ignore[arg-type] # SMALL
    paths = result.save(tmp_path / "all")
    assert read_recording(paths[0]).request is None
    whole = read_recording(paths[1]).request
    assert whole is not None
    assert PartRecord.of(whole.items[0]) == PartRecord.of(photo)  # type: ignore[arg-type] # a part


def test_parts_that_were_not_generated_have_no_record(tmp_path: Path) -> None:
    APPLE.save(tmp_path / "a.png")
    assert read_note(tmp_path / "a.png") is None
    for name, data in (("a.jpg", APPLE.encode(".jpg")), ("a.txt", b"red"), ("b.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="does not say how it was made"):
            read_recording(tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        read_recording(tmp_path / "none.png")


def test_the_command_exits_by_what_it_found(
    result: Result, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = result.save(tmp_path / "a.png")
    assert main(["replay", str(path), "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replayed"] == "equal to the last bit"
    other = edited(result, tmp_path / "b.png", request=result.request.to_json() | {"seed": 2})
    assert main(["replay", str(other), "--model", str(folder)]) == 1
    assert "position: " in capsys.readouterr().out
    APPLE.save(tmp_path / "c.png")
    assert main(["replay", str(tmp_path / "c.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
