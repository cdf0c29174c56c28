"""Report cards and round trips: baselines of as many codes, sizes kept, no stale numbers."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.shards import Document, is_heldout, write_shard
from mmpt.parts import Audio, Image, Part, Text, Video, load_part
from mmpt.tokenizers import evaluate as evaluation
from mmpt.tokenizers.base import codec_folder, load_codec
from mmpt.tokenizers.evaluate import evaluate, list_tokenizers, roundtrip

CODECS = ("text", "image", "video", "speech")
DIGITS = ("one", "two", "three", "four")


def parts(seed: int) -> list[Part]:
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    wave = (rng.standard_normal(6400) * 0.1).astype(np.float32)
    return [
        Text(f"a red apple {DIGITS[seed % 4]}"),
        Image(frames[0]),
        Video(frames, 12.0),
        Audio(wave, 16_000),
    ]


@pytest.fixture(scope="module")
def measured(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo whose recipes name sixteen training and two held-out documents."""
    folder = tmp_path_factory.mktemp("measured")
    keys = [f"k{i}" for i in range(200)]
    for split, count in (("train", 16), ("heldout", 2)):
        chosen = [k for k in keys if is_heldout(k) == (split == "heldout")][:count]
        documents = [Document(k, k, "any", parts(int(k[1:])), voices=("anna",)) for k in chosen]
        if split == "heldout":
            documents[1] = dataclasses.replace(documents[1], voices=("ben",))
        write_shard(folder / f"mixed-{split}-0.tar", documents)
    for name in CODECS:
        shutil.copytree(zoo / name, folder / name)
        pattern = folder / "mixed-train-*.tar"
        recipe = f'kind = "{name}"\nshards = ["{pattern}"]\nunseen_voices = ["ben"]\n'
        (folder / name / "recipe.toml").write_text(recipe)
    return folder


COMMON = {"usage", "perplexity", "dead", "identity", "encode_speed", "decode_speed"}
VISUAL = COMMON | {"bits_per_pixel", "psnr", "ssim"}
WER = {
    f"{group}{suffix}"
    for group in ("wer", "wer_seen", "wer_unseen")
    for suffix in ("", "_low", "_high", "_minus_baseline", "_minus_ceiling")
} | {"judged", "judged_seen", "judged_unseen", "judge"}
SOUND = COMMON | {"bits_per_second", "spectral", "log_mel_distance", "stoi", "visqol", "seconds"}
ABOUT = {"tokenizer", "modality", "fingerprint", "codebook_size", "num_codebooks"} | {
    "speed_unit",
    "compared",
    "notes",
    "seconds_taken",
}


@pytest.fixture(scope="module")
def cards(measured: Path) -> dict[str, dict[str, Any]]:
    return {name: evaluate(str(measured / name)) for name in CODECS}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("text", COMMON | {"bytes_per_id", "bits_per_byte", "exact", "bytes"}),
        ("image", VISUAL | {"pictures"}),
        ("video", VISUAL | {"clips", "seconds"}),
        ("speech", SOUND | WER),
    ],
)
def test_codec_baseline_and_ceiling_have_the_same_keys(
    name: str, keys: set[str], measured: Path, cards: dict[str, dict[str, Any]]
) -> None:
    card, codec = cards[name], load_codec(measured / name)
    assert (card["tokenizer"], card["modality"]) == (name, codec.modality.name.lower())
    assert card["fingerprint"] == codec.fingerprint
    blocks = {"baseline", "ceiling"} | ({"original"} if name == "speech" else set())
    assert set(card) == ABOUT | keys | blocks
    assert set(card["baseline"]) == set(card["ceiling"]) == keys
    assert json.loads(json.dumps(card)) == card
    for block in (card, card["baseline"], card["ceiling"]):
        numbers = [block[key] for key in keys if isinstance(block[key], float)]
        assert all(math.isfinite(value) for value in numbers)
    # what the codec and the baseline both have is measured of both
    for key in keys:
        assert (card[key] is None) == (card["baseline"][key] is None), key
    # a ceiling has no codes
    assert all(card["ceiling"][key] is None for key in COMMON)


def test_words_are_judged_by_voice(cards: dict[str, dict[str, Any]]) -> None:
    card = cards["speech"]
    assert (card["judged"], card["judged_seen"], card["judged_unseen"]) == (2, 1, 1)
    assert card["judge"] == "pocketsphinx, word pairs"
    for block in (card, card["baseline"], card["ceiling"], card["original"]):
        for group in ("wer", "wer_seen", "wer_unseen"):
            assert block[f"{group}_low"] <= block[group] <= block[f"{group}_high"]
            low, middle, high = block[f"{group}_minus_baseline"]
            assert low <= middle <= high
            assert middle == pytest.approx(block[group] - card["baseline"][group], abs=2e-4)
    assert card["baseline"]["wer_minus_baseline"] == [0, 0, 0]
    assert card["notes"] == []


def test_a_voice_that_spoke_in_training_is_not_called_unseen(
    measured: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(measured / "speech", tmp_path / "speech")
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("ben", "anna"))
    with pytest.raises(UserError, match="unseen_voices names anna, but the shards to train on"):
        evaluate(str(folder))


def test_a_saved_baseline_of_sound_stands_in_for_missing_shards(
    measured: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(measured / "speech", tmp_path / "speech")
    for path in measured.glob("mixed-*.tar"):
        shutil.copy(path, tmp_path)
    recipe = (folder / "recipe.toml").read_text().replace(str(measured), str(tmp_path))
    (folder / "recipe.toml").write_text(recipe)
    fitted = evaluate(str(folder), save=True)
    (tmp_path / "mixed-train-0.tar").unlink()
    again = evaluate(str(folder))
    for card in (fitted, again):
        assert "baseline: k-means of 8 log-mel frames" in card["compared"]
        assert (card["judged_seen"], card["judged_unseen"]) == (1, 1)
    for key in ("spectral", "log_mel_distance", "wer", "perplexity"):
        assert again["baseline"][key] == fitted["baseline"][key]
    (folder / "recipe.toml").write_text(recipe.replace("mixed-train-", "mixed-trained-"))
    with pytest.raises(UserError, match="was fitted on other shards than"):
        evaluate(str(folder), [str(tmp_path / "mixed-heldout-0.tar")])
    (folder / "recipe.toml").write_text(recipe)
    (folder / "baseline.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="holds no baseline of sound"):
        evaluate(str(folder))
    (folder / "baseline.safetensors").unlink()
    with pytest.raises(UserError, match="no shard matches"):
        evaluate(str(folder))


def test_sound_without_transcripts_has_a_card_without_word_errors(
    measured: Path, tmp_path: Path
) -> None:
    sound = parts(5)[3]
    write_shard(tmp_path / "mute.tar", [Document("a", "a", "any", [sound], voices=("anna",))])
    card = evaluate(str(measured / "speech"), [str(tmp_path / "mute.tar")])
    assert {card[key] for key in WER} == {None}
    assert len(card["notes"]) == 1
    assert "not measured" in card["notes"][0]
    assert card["spectral"] > 0


def test_a_baseline_spends_as_many_bits(cards: dict[str, dict[str, Any]]) -> None:
    for name, key in (
        ("image", "bits_per_pixel"),
        ("video", "bits_per_pixel"),
        ("speech", "bits_per_second"),
    ):
        assert cards[name][key] == cards[name]["baseline"][key] > 0
        assert cards[name]["ceiling"][key] is None
    assert cards["image"]["bits_per_pixel"] == pytest.approx(9 / 64, abs=1e-4)
    assert cards["video"]["bits_per_pixel"] == pytest.approx(3 * 9 / (9 * 64), abs=1e-4)
    assert cards["speech"]["bits_per_second"] == 12.5 * 6
    assert cards["text"]["baseline"]["bits_per_byte"] == 8


def test_the_sizes_of_what_was_measured_are_told(cards: dict[str, dict[str, Any]]) -> None:
    assert cards["image"]["pictures"] == 2
    assert cards["video"]["clips"] == 2
    assert cards["video"]["seconds"] == pytest.approx(2 * 9 / 12, abs=1e-4)
    assert cards["speech"]["seconds"] == pytest.approx(2 * 0.4)
    assert cards["text"]["exact"] == cards["text"]["identity"] == 1
    assert cards["text"]["bytes_per_id"] > cards["text"]["baseline"]["bytes_per_id"] == 1


def test_a_card_is_a_table_for_people(cards: dict[str, dict[str, Any]]) -> None:
    lines = str(cards["speech"]).splitlines()
    assert lines[0] == "tokenizer: speech"
    [head] = [line.split() for line in lines if line.split()[:1] == ["codec"]]
    assert head == ["codec", "baseline", "ceiling", "original"]
    [usage] = [line.split() for line in lines if line.split()[0] == "usage"]
    assert usage[0] == "usage"
    assert usage[-2:] == ["-", "-"]


def test_only_held_out_documents_are_measured(measured: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(measured, tmp_path / "zoo")
    # a recipe whose shards are not split by name: the key decides
    keys = [f"k{i}" for i in range(40)]
    write_shard(whole / "all.tar", [Document(k, k, "any", [Text(k * 9)]) for k in keys])
    recipe = whole / "text" / "recipe.toml"
    recipe.write_text(f'kind = "text"\nshards = ["{whole / "all.tar"}"]\n')
    kept = sum(len(k) * 9 for k in keys if is_heldout(k))
    assert evaluate(str(whole / "text"))["bytes"] == kept
    # shards that are named twice are drawn twice as often, and measured once
    twice = f'"{whole / "all.tar"}", "{whole / "all.tar"}"'
    recipe.write_text(f'kind = "text"\nshards = [{twice}]\n')
    assert evaluate(str(whole / "text"))["bytes"] == kept
    everything = evaluate(str(whole / "text"), [str(whole / "all.tar")])
    assert everything["bytes"] == sum(len(k) * 9 for k in keys)
    # and shards that the recipe names beside them
    more = [Document(k, k, "any", [Text("more")]) for k in keys]
    write_shard(whole / "more.tar", more)
    recipe.write_text(recipe.read_text() + f'heldout = ["{whole / "more.tar"}"]\n')
    assert evaluate(str(whole / "text"))["bytes"] == kept + 4 * sum(map(is_heldout, keys))


def test_a_card_is_saved_and_a_stale_one_is_not_shown(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree(measured, tmp_path / "tokenizers")
    card = evaluate(str(whole / "text"), save=True)
    assert json.loads((whole / "text" / "metrics.json").read_text()) == card
    monkeypatch.setattr(evaluation, "codec_names", lambda: [str(whole / name) for name in CODECS])
    rows = {Path(row["name"]).name: row for row in list_tokenizers()["tokenizers"]}
    shown = rows["text"]["heldout"]
    assert shown == {key: card[key] for key in shown}
    assert {"bytes_per_id", "exact", "usage"} < set(shown)
    assert set(rows["text"]["baseline"]) == set(shown)
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
    ("name", "measure", "margin"),
    [
        ("text-2k", lambda card: card["bytes_per_id"], 0),
        ("image-f8", lambda card: card["psnr"], 2),
        ("video-f8t4", lambda card: card["psnr"], 2),
        ("speech-12hz", lambda card: -card["spectral"], 0),
        ("speech-12hz", lambda card: -card["log_mel_distance"], 0),
    ],
)
def test_a_shipped_tokenizer_is_better_than_its_baseline(
    name: str, measure: Callable[[dict[str, float]], float], margin: float
) -> None:
    card = evaluation.read_card(codec_folder(name), load_codec(name).fingerprint)
    if not card:
        pytest.skip(f"no card of this {name}; run mmpt tokenizer eval {name} --save")
    assert measure(card) > measure(card["baseline"]) + margin


def test_the_shipped_speech_codec_carries_words() -> None:
    card = evaluation.read_card(codec_folder("speech-12hz"), load_codec("speech-12hz").fingerprint)
    if not card:
        pytest.skip("no card of this speech-12hz; run mmpt tokenizer eval speech-12hz --save")
    assert card["judged_unseen"] >= 200
    assert card["wer_unseen_minus_baseline"][2] < 0  # the upper bound
    assert card["wer_seen_minus_ceiling"][1] < 0.05


def test_what_cannot_be_measured_is_one_line(measured: Path, zoo: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "text.tar", [Document("a", "a", "any", [Text("words")])])
    small = Image(np.zeros((8, 8, 3), np.uint8))
    write_shard(tmp_path / "small.tar", [Document("a", "a", "any", [small])])
    for name, shard, message in (
        ("image", "small.tar", "no pictures of at least 16 x 16 pixels"),
        ("video", "text.tar", "no clips"),
        ("speech", "text.tar", "no sound"),
        ("text", "small.tar", "no text"),
        ("text", "absent.tar", "no shard matches"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            evaluate(str(measured / name), [str(tmp_path / shard)])
        assert "\n" not in str(caught.value)


def test_a_codec_without_recipe_needs_shards_to_fit_its_baseline_on(
    zoo: Path, measured: Path
) -> None:
    heldout, train = (str(measured / f"mixed-{split}-0.tar") for split in ("heldout", "train"))
    for shards in ([], [heldout]):
        with pytest.raises(UserError, match=r"no recipe.toml.*SHARDS --train OTHERS") as caught:
            evaluate(str(zoo / "image"), shards)
        assert "\n" not in str(caught.value)
    card = evaluate(str(zoo / "image"), [heldout], train=[train])
    assert card["baseline"]["psnr"] == evaluate(str(measured / "image"))["baseline"]["psnr"]
    assert evaluate(str(zoo / "text"), [heldout])["exact"] == 1


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
