"""Recipes of codecs: presets, and what of the recipe an image objective heeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpt import hub
from mmpt.config import UserError, load_recipe, to_toml
from mmpt.parts import Audio, Image, Video
from mmpt.tokenizers.image import ImageCodecConfig
from mmpt.tokenizers.objectives import ImageObjective
from mmpt.tokenizers.presets import PRESETS, preset_config
from mmpt.tokenizers.quantize import QuantizerConfig
from mmpt.tokenizers.recipe import CodecRecipe, load_codec_recipe, recipe_hash
from mmpt.tokenizers.speech import PRESETS as SPEECH_PRESETS
from mmpt.tokenizers.train import train


def write(tmp_path: Path, *lines: str, kind: str = "image") -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join([f'kind = "{kind}"', 'shards = ["x"]', *lines]))
    return path


def make_recipe(**changes: Any) -> CodecRecipe:
    image = ImageCodecConfig(encoder_width=8, decoder_width=8, decoder_blocks=1)
    return CodecRecipe(**{"kind": "image", "shards": ("x",), "image": image, **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_the_table_of_images(name: str, tmp_path: Path) -> None:
    recipe = load_codec_recipe(write(tmp_path, f'preset = "{name}"'))
    assert recipe.image == preset_config(name)
    # the resolved recipe says all, and reads back
    (tmp_path / "resolved.toml").write_text(to_toml(recipe))
    assert load_codec_recipe(tmp_path / "resolved.toml") == recipe


def test_a_preset_fills_the_table_of_speech(tmp_path: Path) -> None:
    recipe = load_codec_recipe(write(tmp_path, 'preset = "mimi"', kind="speech"))
    assert recipe.speech == SPEECH_PRESETS["mimi"][1]


def test_keys_of_the_recipe_and_overrides_win_over_the_preset(tmp_path: Path) -> None:
    lines = ['preset = "cosmos"', "[image]", "encoder_width = 16", "[image.quantizer]"]
    path = write(tmp_path, *lines, "levels = [4, 4]")
    recipe = load_codec_recipe(path, ["image.decoder_width=32"])
    assert (recipe.image.encoder_width, recipe.image.decoder_width) == (16, 32)
    assert recipe.image.quantizer.levels == (4, 4)
    assert recipe.image.factor == preset_config("cosmos").factor
    other = load_codec_recipe(path, ["preset=conv-f8"])
    assert other.image.factor == 8


@pytest.mark.parametrize(("kind", "message"), [("image", "no preset 'x'"), ("speech", "mimi")])
def test_an_unknown_preset_is_refused_in_one_line(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_codec_recipe(write(tmp_path, 'preset = "x"', kind=kind))
    assert "\n" not in str(caught.value)


def test_only_what_moves_a_weight_makes_another_recipe() -> None:
    plain = recipe_hash(make_recipe())
    free = {"checkpoint_every": 7, "samples_every": 7, "log_every": 7, "device": "cpu"}
    assert recipe_hash(make_recipe(**free)) == plain
    assert recipe_hash(make_recipe(seed=1)) != plain


@pytest.mark.parametrize(
    "shipped", sorted(hub.shipped("tokenizers").glob("*/*.toml")), ids=lambda path: path.parent.name
)
def test_shipped_recipes_can_be_read(shipped: Path) -> None:
    assert load_codec_recipe(shipped) == load_recipe(CodecRecipe, shipped)


def test_larger_pictures_are_cut_at_random_places() -> None:
    large = np.zeros((80, 100, 3), np.uint8)
    large[:, :, 0], large[:, :, 1] = np.arange(80)[:, None], np.arange(100)
    documents = [[Image(large), Video(np.stack([large] * 5), 12.0)]]
    objective = ImageObjective(make_recipe(size=32), [*documents, [Image(large[:20])]])
    assert len(objective.pictures) == 3  # of five frames, every fourth
    first, again = (objective.batch(np.random.default_rng(0), 20)["pixels"] for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (20, 3, 32, 32)
    assert len({float(picture[0, 16, 16]) for picture in first}) > 10


def test_a_codebook_of_images_is_made_after_the_warm_up() -> None:
    quantizer = QuantizerConfig(kind="ema", codebook_size=70, width=4)
    image = ImageCodecConfig(quantizer=quantizer, encoder_width=8, decoder_width=8)
    rng = np.random.default_rng(0)
    documents = [[Image(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(3)]]
    objective = ImageObjective(make_recipe(image=image, warmup=2), documents)
    for step in range(6):
        batch = objective.batch(np.random.default_rng(step), 2)
        loss, _ = objective.loss(batch, step)
        assert torch.isfinite(loss)
        assert objective.codec.quantizer.ready == (step >= 4)


def test_a_weight_without_effect_is_said(
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = write_recipe(tmp_path, "speech", shards[Audio])
    weights = ["loss.ssim=0.1", "loss.l2=2.0", "loss.discriminator=0.1"]
    train(recipe, [*tiny["speech"], "steps=1", *weights], out=tmp_path / "out")
    assert "loss.l2, loss.ssim: no effect on speech codecs" in caplog.text
    assert "discriminator" not in caplog.text
