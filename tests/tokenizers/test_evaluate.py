"""Report cards and round trips: baselines of as many codes, sizes kept, no stale numbers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.data.shards import Document, is_heldout, write_shard
from mmpt.parts import Audio, Image, Part, Text, Video, load_part
from mmpt.tokenizers import evaluate as evaluation
from mmpt.tokenizers.base import codec_folder, load_codec
from mmpt.tokenizers.evaluate import evaluate, list_tokenizers, roundtrip

CODECS = ("text", "image", "video", "speech")


def parts(seed: int) -> list[Part]:
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    wave = (rng.standard_normal(16_000) * 0.1).astype(np.float32)
    return [Text(f"a red apple {seed}"), Image(frames[0]), Video(frames, 12.0), Audio(wave, 16_000)]


@pytest.fixture(scope="module")
def measured(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo whose recipes name twelve training and two held-out documents."""
    folder = tmp_path_factory.mktemp("measured")
    keys = [f"k{i}" for i in range(200)]
    for split, count in (("train", 12), ("heldout", 2)):
        chosen = [k for k in keys if is_heldout(k) == (split == "heldout")][:count]
        documents = [Document(k, k, "any", parts(int(k[1:]))) for k in chosen]
        write_shard(folder / f"mixed-{split}-0.tar", documents)
    for name in CODECS:
        shutil.copytree(zoo / name, folder / name)
        pattern = folder / "mixed-train-*.tar"
        (folder / name / "recipe.toml").write_text(f'kind = "{name}"\nshards = ["{pattern}"]\n')
    return folder


@pytest.mark.parametrize(
    ("name", "keys", "centres"),
    [
        ("text", {"bytes_per_id", "exact", "bytes"}, []),
        ("image", {"psnr", "bits_per_pixel", "pictures", "usage", "perplexity"}, [512]),
        ("video", {"psnr", "bits_per_pixel", "clips", "usage", "perplexity"}, [512, 512]),
        (
            "speech",
            {"log_mel_distance", "bits_per_second", "seconds", "usage", "perplexity"},
            [64],
        ),
    ],
)
def test_a_codec_is_measured_beside_a_baseline_of_as_many_codes(
    name: str, keys: set[str], centres: list[int], measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, real = [], evaluation.kmeans

    def kmeans(points: torch.Tensor, num_centres: int, generator: torch.Generator) -> Any:
        fitted.append(num_centres)
        return real(points, num_centres, generator, num_steps=2)

    monkeypatch.setattr(evaluation, "kmeans", kmeans)
    card = evaluate(str(measured / name))
    codec = load_codec(measured / name)
    assert (card["tokenizer"], card["modality"]) == (name, codec.modality.name.lower())
    assert card["fingerprint"] == codec.fingerprint
    assert set(card["heldout"]) == keys
    assert set(card["baseline"]) <= keys
    assert fitted == centres
    for metrics in (card["heldout"], card["baseline"]):
        assert all(math.isfinite(value) for value in metrics.values())
    for rate in ("bits_per_pixel", "bits_per_second"):
        assert card["heldout"].get(rate) == card["baseline"].get(rate)
    assert json.loads(json.dumps(card)) == card


def test_the_rates_are_what_the_codes_cost(measured: Path) -> None:
    image = evaluate(str(measured / "image"))["heldout"]
    assert image["bits_per_pixel"] == pytest.approx(9 / 64, abs=1e-4)
    assert image["pictures"] == 2
    video = evaluate(str(measured / "video"))["heldout"]
    assert video["bits_per_pixel"] == pytest.approx(3 * 64 * 9 / (9 * 64 * 64), abs=1e-4)
    speech = evaluate(str(measured / "speech"))["heldout"]
    assert speech["bits_per_second"] == 12.5 * 6
    assert speech["seconds"] == 2


def test_a_text_codec_gives_every_byte_back(measured: Path) -> None:
    card = evaluate(str(measured / "text"))
    assert card["heldout"]["exact"] == 1
    assert card["heldout"]["bytes_per_id"] > card["baseline"]["bytes_per_id"] == 1


def test_only_held_out_documents_are_measured(measured: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(measured, tmp_path / "zoo")
    # a recipe whose shards are not split by name: the key decides
    keys = [f"k{i}" for i in range(40)]
    write_shard(whole / "all.tar", [Document(k, k, "any", [Text(k * 9)]) for k in keys])
    recipe = whole / "text" / "recipe.toml"
    recipe.write_text(f'kind = "text"\nshards = ["{whole / "all.tar"}"]\n')
    kept = sum(len(k) * 9 for k in keys if is_heldout(k))
    assert evaluate(str(whole / "text"))["heldout"]["bytes"] == kept
    everything = evaluate(str(whole / "text"), [str(whole / "all.tar")])
    assert everything["heldout"]["bytes"] == sum(len(k) * 9 for k in keys)


def test_a_card_is_saved_and_a_stale_one_is_not_shown(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree(measured, tmp_path / "tokenizers")
    card = evaluate(str(whole / "text"), save=True)
    assert json.loads((whole / "text" / "metrics.json").read_text()) == card
    monkeypatch.setattr(evaluation, "codec_names", lambda: [str(whole / name) for name in CODECS])
    rows = {Path(row["name"]).name: row for row in list_tokenizers()["tokenizers"]}
    assert rows["text"]["heldout"] == card["heldout"]
    assert rows["image"]["heldout"] is None
    stale = card | {"fingerprint": "0" * 16}
    (whole / "text" / "metrics.json").write_text(json.dumps(stale))
    assert list_tokenizers()["tokenizers"][0]["heldout"] is None


def test_the_list_names_every_shipped_tokenizer() -> None:
    rows = list_tokenizers()["tokenizers"]
    want = {"name", "modality", "codebook_size", "rate", "fingerprint", "heldout", "baseline"}
    assert all(set(row) == want for row in rows)
    assert json.dumps(rows)


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("text-2k", lambda card: card["bytes_per_id"]),
        ("image-f8", lambda card: card["psnr"]),
        ("video-f8t4", lambda card: card["psnr"]),
        ("speech-12hz", lambda card: -card["log_mel_distance"]),
    ],
)
def test_a_shipped_tokenizer_is_better_than_its_baseline(
    name: str, measure: Callable[[dict[str, float]], float]
) -> None:
    card = evaluation.read_card(codec_folder(name), load_codec(name).fingerprint)
    if not card:
        pytest.skip(f"no card of this {name}; run mmpt tokenizer eval {name} --save")
    assert measure(card["heldout"]) > measure(card["baseline"])


def test_what_cannot_be_measured_is_one_line(measured: Path, zoo: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "text.tar", [Document("a", "a", "any", [Text("words")])])
    small = Image(np.zeros((8, 8, 3), np.uint8))
    write_shard(tmp_path / "small.tar", [Document("a", "a", "any", [small])])
    for name, shard, message in (
        ("image", "small.tar", "no pictures of 64 x 64 pixels"),
        ("video", "text.tar", "no clips"),
        ("speech", "text.tar", "no sound"),
        ("text", "small.tar", "no text"),
        ("text", "absent.tar", "no shard matches"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            evaluate(str(measured / name), [str(tmp_path / shard)])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no recipe at"):
        evaluate(str(zoo / "image"))


def test_a_baseline_that_has_too_little_data_is_one_line(measured: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(measured / "image", tmp_path / "image")
    key = next(f"k{i}" for i in range(99) if not is_heldout(f"k{i}"))
    write_shard(tmp_path / "one.tar", [Document(key, key, "any", parts(0)[:2])])
    (folder / "recipe.toml").write_text(f'kind = "image"\nshards = ["{tmp_path / "one.tar"}"]\n')
    with pytest.raises(UserError, match="64 vectors are too few for 512 centres"):
        evaluate(str(folder), [str(tmp_path / "one.tar")])


# round trips


@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 9), (1, 1), (130, 61)])
def test_a_picture_keeps_its_size(zoo: Path, tmp_path: Path, height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image(pixels).save(tmp_path / "a.png")
    found = roundtrip(str(zoo / "image"), tmp_path / "a.png", out=tmp_path / "b.png")
    made = load_part(tmp_path / "b.png")
    assert isinstance(made, Image)
    assert made.pixels.shape == pixels.shape
    assert found["shape"] == [-(-height // 8), -(-width // 8)]
    assert found["codes"] == math.prod(found["shape"])
    assert found["bits"] == found["codes"] * 9


@pytest.mark.parametrize(("num_frames", "height", "width"), [(5, 16, 16), (7, 17, 9), (2, 1, 30)])
def test_a_clip_keeps_its_size_length_and_rate(
    zoo: Path, tmp_path: Path, num_frames: int, height: int, width: int
) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    Video(frames, 10.0).save(tmp_path / "a.webp")
    found = roundtrip(str(zoo / "video"), tmp_path / "a.webp", out=tmp_path / "b.webp")
    made = load_part(tmp_path / "b.webp")
    assert isinstance(made, Video)
    assert made.frames.shape == frames.shape
    assert made.fps == pytest.approx(10.0)
    assert found["shape"] == [1 + -(-(num_frames - 1) // 4), -(-height // 8), -(-width // 8)]
    Video(frames, 10.0).save(tmp_path / "a.mp4")
    roundtrip(str(zoo / "video"), tmp_path / "a.mp4", out=tmp_path / "b.mp4")
    assert len(Video.load(tmp_path / "b.mp4").frames) == num_frames


def test_a_still_through_the_video_codec_is_a_still(zoo: Path, tmp_path: Path) -> None:
    Image(np.zeros((10, 12, 3), np.uint8)).save(tmp_path / "a.png")
    roundtrip(str(zoo / "video"), tmp_path / "a.png", out=tmp_path / "video.png")
    roundtrip(str(zoo / "image"), tmp_path / "a.png", out=tmp_path / "image.png")
    ours, theirs = (Image.load(tmp_path / f"{n}.png").pixels for n in ("video", "image"))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("num_samples", "rate"), [(1, 16_000), (1281, 16_000), (9999, 44_100)])
def test_a_sound_keeps_its_length(zoo: Path, tmp_path: Path, num_samples: int, rate: int) -> None:
    wave = (np.random.default_rng(0).standard_normal(num_samples) * 0.1).astype(np.float32)
    Audio(wave, rate).save(tmp_path / "a.wav")
    found = roundtrip(str(zoo / "speech"), tmp_path / "a.wav", out=tmp_path / "b.wav")
    made = Audio.load(tmp_path / "b.wav")
    expected = math.ceil(num_samples * 16_000 / rate)
    assert (len(made.wave), made.sample_rate) == (expected, 16_000)
    assert found["codes"] == -(-expected // 1280)


def test_a_text_comes_back(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red <boi> apple\n")
    found = roundtrip(str(zoo / "text"), tmp_path / "a.txt", out=tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == "a red <boi> apple\n"
    assert found["codes"] > 0
    (tmp_path / "a.txt").write_text("")
    assert roundtrip(str(zoo / "text"), tmp_path / "a.txt", out=tmp_path / "b.txt")["codes"] == 0


def test_a_file_of_another_medium_and_a_bad_name_are_one_line(zoo: Path, tmp_path: Path) -> None:
    Image(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for codec, file, out, message in (
        ("speech", "a.png", "b.wav", "speech is a speech codec; it cannot read a image"),
        ("image", "a.png", "b.wav", "cannot write a picture as .wav"),
        ("image", "absent.png", "b.png", "No such file"),
        ("image", "broken.png", "b.png", "no picture|broken picture"),
        ("absent", "a.png", "b.png", "no tokenizer"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            roundtrip(str(zoo / codec), tmp_path / file, out=tmp_path / out)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "broken.png"]
