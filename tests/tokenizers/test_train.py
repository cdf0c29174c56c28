"""Training codecs: what is trained on, what is refused, what is reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.data.shards import Document, write_shard
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.tokenizers.base import load_codec
from mmpt.tokenizers.image import ImageCodec
from mmpt.tokenizers.objectives import ImageObjective, SpeechObjective, VideoObjective
from mmpt.tokenizers.quantize import QuantizerConfig
from mmpt.tokenizers.recipe import CodecRecipe, read_parts
from mmpt.tokenizers.speech import SpeechCodec, SpeechCodecConfig
from mmpt.tokenizers.train import train


def test_a_training_goes_on_from_another_one(
    shards: dict[type, Path],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    tiny: dict[str, list[str]],
) -> None:
    recipe = write_recipe(tmp_path, "speech", shards[Audio])
    train(recipe, tiny["speech"], out=tmp_path / "first")
    start = f"start={tmp_path / 'first'}"
    train(recipe, [*tiny["speech"], start, "lr=1e-30", "weight_decay=0.0"], out=tmp_path / "second")
    first, second = (load_codec(tmp_path / name) for name in ("first", "second"))
    for name, value in first.named_parameters():  # the codebook is averaged further
        assert torch.equal(value, second.get_parameter(name)), name
    for other, message in (
        ("speech.width=32", "another shape"),
        (f"start={tmp_path / 'absent'}", "no tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            train(recipe, [*tiny["speech"], start, other], out=tmp_path / "third")


def test_a_video_training_goes_on_only_with_its_image_codec(
    shards: dict[type, Path],
    zoo: Path,
    image_codec: ImageCodec,
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    recipe = write_recipe(tmp_path, "video", shards[Video])
    ImageCodec(image_codec.config).save(tmp_path / "other")
    settings = ["video.width=16", "video.num_blocks=1", f"start={zoo / 'video'}"]
    train(recipe, [*settings, f"base={zoo / 'image'}"], out=tmp_path / "out")
    with pytest.raises(UserError, match="extends another image codec than base"):
        train(recipe, [*settings, f"base={tmp_path / 'other'}"], out=tmp_path / "out")


def test_training_leaves_the_callers_random_numbers_alone(
    shards: dict[type, Path],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    tiny: dict[str, list[str]],
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image])
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    train(recipe, [*tiny["image"], "steps=2"], out=tmp_path / "out")
    assert torch.equal(torch.rand(3), want)


def test_a_checkpoint_of_another_recipe_or_a_broken_one_is_refused(
    shards: dict[type, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
    tiny: dict[str, list[str]],
    stop_at: Callable[[int], Any],
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image])
    with stop_at(4), pytest.raises(KeyboardInterrupt):
        train(recipe, tiny["image"], out=tmp_path / "out")
    for other in ([*tiny["image"], "lr=0.5"], [*tiny["image"], "image.encoder_width=16"]):
        with pytest.raises(UserError, match="belongs to another recipe") as caught:
            train(recipe, other, out=tmp_path / "out")
        assert "\n" not in str(caught.value)
    path = tmp_path / "out" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        train(recipe, tiny["image"], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=smell", "choose one of text, image, video, speech"),
        ("precision=fp16", "choose one of bf16, fp32"),
        ("steps=0", "steps = 0; use 1 or more"),
        ("batch=-1", "batch = -1"),
        ("checkpoint_every=0", "checkpoint_every = 0"),
        ("ema=1.0", "ema = 1.0"),
        ("stpes=3", "did you mean 'steps'"),
        ("image.quantizer.levels=[1]", "each at least 2"),
        ('shards=["absent-*.tar"]', "no shard matches 'absent-"),
        ('shards=["/absent/a.tar"]', "no shard matches"),
        ("kind=video", "no tokenizer ''|base"),
        ("kind=speech", "hold no sound"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_one_line(
    override: str,
    message: str,
    shards: dict[type, Path],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image])
    with pytest.raises(UserError, match=message) as caught:
        train(recipe, [override], out=tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_held_out_documents_are_never_trained_on(
    tmp_path: Path, write_recipe: Callable[..., Path], key: Callable[..., str]
) -> None:
    mixed = [
        Document(k, k, "any", [Text(f"{k} {'seen' if i < 3 else 'secret'}")])
        for i, k in enumerate(
            [*(key(i) for i in range(3)), *(key(i, heldout=True) for i in range(3))]
        )
    ]
    write_shard(tmp_path / "mixed.tar", mixed)
    pattern = [str(tmp_path / "mix*.tar")]
    assert len(read_parts(pattern)) == 6
    assert [len(read_parts(pattern, heldout=h)) for h in (False, True)] == [3, 3]
    seen = [
        p.text for parts in read_parts(pattern, heldout=False) for p in parts if isinstance(p, Text)
    ]
    assert all("secret" not in text for text in seen)
    recipe = write_recipe(tmp_path, "text", tmp_path / "mixed.tar", "num_text = 300")
    train(recipe, out=tmp_path / "text")
    merged = json.loads((tmp_path / "text" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("seen" in word for word in merged)
    assert not any("secr" in word for word in merged)


def test_bad_samples_are_left_out_and_counted(
    shards: dict[type, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = shards[Image].read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    assert 0 < len(read_parts([str(tmp_path / "cut.tar")])) < 6
    assert "bad samples were left out" in caplog.text


TINY_SPEECH = SpeechCodecConfig(
    quantizer=QuantizerConfig(kind="ema", codebook_size=8, width=16),
    width=16,
    num_layers=1,
    num_heads=2,
)


def make_recipe(**changes: Any) -> CodecRecipe:
    return CodecRecipe(shards=("x",), speech=TINY_SPEECH, **changes)


def test_pictures_and_clips_that_do_not_fit_are_counted(
    zoo: Path, caplog: pytest.LogCaptureFixture, part: Callable[[type, int], Part]
) -> None:
    small, large = Image(np.zeros((8, 8, 3), np.uint8)), part(Image, 0)
    objective = ImageObjective(make_recipe(kind="image"), [[small, large]])
    assert len(objective.pictures) == 1
    assert "1 are left out" in caplog.text
    with pytest.raises(UserError, match="no pictures of 64 x 64"):
        ImageObjective(make_recipe(kind="image"), [[small]])
    short = Video(np.zeros((4, 64, 64, 3), np.uint8), 12.0)
    video = make_recipe(kind="video", base=str(zoo / "image"))
    with pytest.raises(UserError, match="no clips of 5 or more frames"):
        VideoObjective(video, [[short]])
    with pytest.raises(UserError, match="must name an image codec"):
        VideoObjective(make_recipe(kind="video", base=str(zoo / "text")), [[short]])


@pytest.mark.parametrize(("num_frames", "used"), [(5, 5), (7, 5), (16, 13), (40, 17)])
def test_clips_of_any_length_train_on_whole_groups(zoo: Path, num_frames: int, used: int) -> None:
    clip = Video(np.zeros((num_frames, 64, 64, 3), np.uint8), 12.0)
    objective = VideoObjective(make_recipe(kind="video", base=str(zoo / "image")), [[clip]])
    batch = objective.batch(np.random.default_rng(0), 2)
    assert batch["pixels"].shape == (2, used, 3, 64, 64)
    loss, _ = objective.loss(batch, 0)
    assert torch.isfinite(loss)


def test_a_batch_is_a_pure_function_of_its_generator(part: Callable[[type, int], Part]) -> None:
    documents: list[list[Part]] = [[Text(f"word {i}"), part(Audio, i)] for i in range(5)]
    objective = SpeechObjective(make_recipe(kind="speech"), documents)
    first, second, other = (objective.batch(np.random.default_rng(seed), 3) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["num_samples"], other["num_samples"])
    assert 160 * first["mel"].shape[1] % objective.codec.block_samples == 0


def test_infeasible_transcripts_are_counted_and_left_out() -> None:
    codec = SpeechCodec(TINY_SPEECH)
    num_samples = torch.tensor([12_800, 12_800, 1280, 12_800])  # 40, 40, 4 and 40 steps
    text = torch.tensor([[1, 2, 3, 0], [4, 4, 4, 4], [5, 5, 5, 0], [0, 0, 0, 0]])
    num_text = torch.tensor([3, 4, 3, 0])  # the third needs 3 + 2 repeats, and has 4 steps
    logits = torch.zeros(4, 40, 29, requires_grad=True)
    loss, infeasible = codec.ctc_loss(logits, num_samples, text, num_text)
    assert infeasible == 1
    assert torch.isfinite(loss)
    loss.backward()
    assert logits.grad is not None
    assert [bool(row.any()) for row in logits.grad] == [True, True, False, False]
    loss, infeasible = codec.ctc_loss(logits, num_samples[2:], text[2:], num_text[2:])
    assert (loss.item(), infeasible) == (0.0, 1)


def test_infeasible_transcripts_are_reported_by_the_training(
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    part: Callable[[type, int], Part],
    key: Callable[..., str],
    tiny: dict[str, list[str]],
) -> None:
    documents = [
        Document(key(i), key(i), "any", [Text("far too many letters " * 9), part(Audio, i)])
        for i in range(4)
    ]
    write_shard(tmp_path / "a.tar", documents)
    recipe = write_recipe(tmp_path, "speech", tmp_path / "a.tar")
    train(recipe, tiny["speech"], out=tmp_path / "out")
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    ]
    assert [(row["step"], row["infeasible"]) for row in rows] == [(0, 2), (5, 12)]


def test_sound_without_words_trains_as_well(
    tmp_path: Path, part: Callable[[type, int], Part]
) -> None:
    tiny = Audio(np.zeros(1, np.float32), 16_000)
    documents: list[list[Part]] = [[tiny], [part(Audio, 0)]]
    objective = SpeechObjective(make_recipe(kind="speech"), documents)
    loss, metrics = objective.loss(objective.batch(np.random.default_rng(0), 2), 0)
    assert torch.isfinite(loss)
    assert metrics["ctc"] == 0
    assert metrics["infeasible"] == 0


def test_a_codebook_needs_as_many_vectors_as_codes() -> None:
    documents: list[list[Part]] = [[Audio(np.zeros(2000, np.float32), 16_000)]]
    recipe = CodecRecipe(kind="speech", shards=("x",), speech=SpeechCodecConfig(width=16))
    with pytest.raises(UserError, match="too few for 512 centres"):
        SpeechObjective(recipe, documents)


@pytest.mark.parametrize("change", [{"width": 30}, {"num_heads": 0}, {"context": -1}, {"block": 0}])
def test_a_codec_that_cannot_be_built_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(UserError):
        SpeechCodecConfig(**change)


def test_shards_may_be_given_by_path_pattern_or_name(
    shards: dict[type, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def find(pattern: str) -> int:
        return len(read_parts([pattern]))

    monkeypatch.chdir(tmp_path)
    assert find(str(shards[Image])) == find("Image.tar") == find("./Ima*.tar") == 6
    assert find(str(tmp_path / "*.tar")) == 18
    assert find("handbook-heldout-*.tar") > 0  # of the sampler


def test_training_writes_neither_over_a_shipped_codec_nor_over_its_recipe(
    shards: dict[type, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
    tiny: dict[str, list[str]],
) -> None:
    home = tmp_path / "tokenizers" / "image-f8"
    home.mkdir(parents=True)
    recipe = write_recipe(home, "image", shards[Image])
    recipe = recipe.rename(home / "recipe.toml")
    before = recipe.read_text()
    monkeypatch.chdir(tmp_path)
    done = train(recipe, [*tiny["image"], "steps=1"])
    assert done["tokenizer"] == "build/image-f8"
    assert [path.name for path in home.iterdir()] == ["recipe.toml"]
    assert load_codec("build/image-f8").fingerprint == done["fingerprint"]
    assert (tmp_path / "build" / "image-f8" / "recipe.toml").is_file()
    train(recipe, [*tiny["image"], "steps=1"], out=home)
    assert recipe.read_text() == before
