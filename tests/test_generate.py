"""The verb: parts in any order with slots, on a small random model."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.generate import read_items
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.parts import Audio, Image, Message, Text
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import Processor
from mmpt.request import Generate


@pytest.fixture(scope="module")
def model(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        vocab_size=len(processor.vocabulary),
        width=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=processor.vocabulary.fingerprint,
    )
    folder = tmp_path_factory.mktemp("model")
    save_model(Decoder.from_config(config), processor, folder)
    return folder


SMALL = ["--height", "16", "--width", "16", "--setting", "max_seconds=0.5", "--max-ids", "8"]


def test_words_become_parts_slots_and_turns(tmp_path: Path) -> None:
    Image(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    words = [":user", str(tmp_path / "a.png"), "what?", ":assistant", "It is", ":text,max_ids=4"]
    user, assistant, slot = read_items([*words, ":user", "more"])[:3]
    assert isinstance(user, Message)
    assert [type(part) for part in user.content] == [Image, Text]
    assert assistant == Message("assistant", (Text("It is"),))
    assert isinstance(slot, Generate)
    assert slot.settings == {"max_ids": 4}
    assert read_items([":)", "a:b"]) == [Text(":)"), Text("a:b")]
    for wrong, said in (
        ([":imgae"], ":image"),
        ([":image,hieght=3"], "'height'"),
        ([":user", "a", ":text"], ":assistant"),
    ):
        with pytest.raises(UserError, match=said):
            read_items(wrong)


def test_a_story_is_saved_in_order_and_is_what_the_api_makes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = ["A red", ":image,height=24", "says", ":speech", ":text", "--seed", "3", *SMALL]
    assert main(["generate", str(model), *story, "--out", str(tmp_path / "s"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [Path(part["out"]).name for part in told["parts"]]
    assert names == ["1.png", "2.wav", "3.txt"]
    assert isinstance(told["parts"][2]["text"], str)
    made = Pipeline.load(model)(
        "A red",
        Generate("image", height=24),
        "says",
        Generate("speech"),
        Generate("text"),
        seed=3,
        height=16,
        width=16,
        max_seconds=0.5,
        max_ids=8,
    )
    image = Image.load(tmp_path / "s" / "1.png")
    assert isinstance(made[0], Image)
    assert image.pixels.shape == (24, 16, 3)
    assert np.array_equal(image.pixels, made[0].pixels)
    sound = Audio.load(tmp_path / "s" / "2.wav")
    assert isinstance(made[1], Audio)
    assert np.allclose(sound.wave, made[1].wave, atol=1e-4)
    assert isinstance(made[2], Text)
    assert made[2].text == told["parts"][2]["text"]
    assert main(["replay", str(tmp_path / "s" / "result.json"), "--model", str(model)]) == 0


def test_a_plan_is_told_and_nothing_is_made(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(model), "a", ":image", *SMALL, "--plan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["made"]["image"] == 4
    assert told["seconds"] > 0
    assert main(["generate", str(model), "a", ":image", *SMALL]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["generate", str(model), ":user", "hi", ":assistant", ":text", *SMALL]) == 0
    assert "text:" in capsys.readouterr().out
