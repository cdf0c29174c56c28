"""Every numbered example runs in an empty folder, and what comes out of it is what it says."""

import json
import re
import runpy
import sys
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import mmpt
from mmpt.data.sources import shards_of
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.parts import Audio, Image, Video
from mmpt.pipeline import save_model
from mmpt.processor import Processor

EXAMPLES = Path(mmpt.__file__).resolve().parent.parent / "examples"
SHIPPED = EXAMPLES / "mmpt-mini"
OUT = Path("runs/examples")  # of the scripts, below the folder that they run in
MOST_LINES = 40


@pytest.fixture(scope="module")
def model(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped model; where it is not there, a small random one with small random codecs."""
    if SHIPPED.is_dir():
        return str(SHIPPED)
    processor = Processor.load([str(zoo / name) for name in ("text", "image", "video", "speech")])
    config = ModelConfig(
        vocab_size=len(processor.vocabulary),
        width=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=processor.vocabulary.fingerprint,
    )
    decoder = Decoder.from_config(config, seed=3)
    decoder.add_noisy_groups()
    folder = tmp_path_factory.mktemp("model")
    save_model(decoder, processor, folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(number: int, *arguments: str) -> dict[str, Any]:
    """Run an example as a script, here; its global names."""
    [path] = EXAMPLES.glob(f"{number:02}_*.py")
    before, sys.argv = sys.argv, [str(path), *arguments]
    try:
        return runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def small_shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first 21 documents of the sampler."""
    path = tmp_path_factory.mktemp("raw") / "small.tar"
    with tarfile.open(shards_of("sampler", "train")[0]) as source, tarfile.open(path, "w") as few:
        for member in islice(source, 48):
            few.addfile(member, source.extractfile(member))
    return str(path)


@pytest.fixture(scope="module")
def trained(small_shard: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A folder in which 13, 14 and 15 ran in turn, and the losses of 14."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(13, small_shard)
        losses = run(14, "4")["losses"]
        run(15, "2")
    return folder, losses


def test_examples_are_short_numbered_and_say_how_they_are_run() -> None:
    paths = sorted(EXAMPLES.glob("[0-9]*.py"))
    assert [int(path.name[:2]) for path in paths] == list(range(1, len(paths) + 1))
    for path in paths:
        lines = path.read_text().splitlines()
        assert len(lines) < MOST_LINES, path
        assert f"Run: python examples/{path.name}" in lines[2], path
        assert f"def test_{path.stem[3:]}" in Path(__file__).read_text(), path


def test_round_trip(here: Path) -> None:
    run(1)
    for name in ("picture.png", "clip.webp"):
        one, other = (Video.load(OUT / f"{kind}-{name}") for kind in ("original", "decoded"))
        error = np.abs(one.frames.astype(float) - other.frames).mean()
        assert 0 < error < 20, name  # the shipped codecs
    assert Audio.load(OUT / "decoded-sound.wav").seconds > 0.5


def test_generate(here: Path, model: str) -> None:
    run(2, model)
    one, faster = (Image.load(OUT / f"apple{name}.png") for name in ("", "-in-8-passes"))
    assert one.pixels.shape == faster.pixels.shape == (64, 64, 3)
    assert (one.pixels != faster.pixels).any()
    assert len(Video.load(OUT / "apple.mp4").frames) == 17
    assert Audio.load(OUT / "apple.wav").sample_rate == 16_000


def test_watch_it_denoise(here: Path, model: str) -> None:
    run(3, model)
    passes = [Image.load(OUT / f"star-{number}-of-8.png") for number in range(1, 9)]
    assert (passes[0].pixels != passes[-1].pixels).any()
    assert np.array_equal(passes[-1].pixels, Image.load(OUT / "star.png").pixels)


def test_both_decoders(here: Path, model: str) -> None:
    assert run(4, model)["seconds"].keys() == {"ar", "dida"}
    pixels = Image.load(OUT / "both-decoders.png").pixels
    assert pixels.shape == (128, 256, 3)
    assert (pixels[:64] != pixels[64:]).any()


def test_inpaint(here: Path, model: str) -> None:
    names = run(5, model)
    assert names["left"] < names["right"]
    assert Image.load(OUT / "inpainted.png").pixels.shape == (64, 256, 3)


def test_infill_speech(here: Path, model: str) -> None:
    names = run(6, model)
    codes, redo = names["codes"].codes, names["redo"]
    assert 0 < redo.sum() < codes.size
    [again] = names["model"].processor.encode_parts([names["sound"]])
    assert np.array_equal(again.codes, codes)
    said, anew = (Audio.load(OUT / f"said{name}.wav") for name in ("", "-anew"))
    assert abs(said.seconds - anew.seconds) < 0.1


def test_interleave(here: Path, model: str) -> None:
    story = run(7, model)["story"]
    assert [type(part).__name__ for part in story] == ["Image", "Audio", "Video", "Text"]
    suffixes = sorted(path.suffix for path in (OUT / "story").iterdir())
    assert suffixes == [".json", ".mp4", ".png", ".txt", ".wav"]
    assert json.loads((OUT / "free/result.json").read_text())["request"]["seed"] == 3


def test_stream_speech(here: Path, model: str) -> None:
    whole = run(8, model)["whole"]
    wave, rate = soundfile.read(OUT / "streamed.wav", dtype="float32")
    assert rate == whole.sample_rate
    assert np.abs(wave - whole.wave).max() < 1e-3  # 16 bits of the same samples


def test_edit(here: Path, model: str) -> None:
    names = run(9, model)
    folder = OUT / "edits"
    assert Image.load(folder / "told.png").pixels.shape == (64, 64, 3)
    assert Image.load(folder / "another-half.png").pixels.shape == (64, 64, 3)
    processor, ended = names["model"].processor, names["ended"].frames
    [held] = processor.decode_segments(processor.encode_parts([names["clip"]]))
    assert np.array_equal(held.frames[:5], ended[:5])  # 0.5 s is in the second group of four
    assert (held.frames[5:] != ended[5:]).any()
    assert len(Video.load(folder / "another-end.mp4").frames) == 17


def test_probe(here: Path, model: str) -> None:
    told = run(10, model, "24")["told"]
    assert told["trials"] > 8
    assert told["classes"] > 2
    assert 0 <= told["low"] <= told["right"] <= told["high"] <= 1


def test_replay(here: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(11, model)
    assert capsys.readouterr().out.count("equal to the last bit") == 2
    assert (OUT / "replayed.png.html").stat().st_size > 10_000


def test_train_a_codec(here: Path, small_shard: str) -> None:
    names = run(12, "steps=20", f'shards=["{small_shard}"]')
    pictures = names["pictures"].astype(float)
    grey = np.square(pictures - pictures.mean()).mean()
    assert names["error"] < grey
    assert names["codes"].shape == (8, 8, 8, 1)
    assert Image.load(OUT / "my-codec/rebuilt.png").pixels.shape == (128, 512, 3)


def test_encode_shards(trained: tuple[Path, list[Any]]) -> None:
    [shard] = (trained[0] / OUT / "tokens").glob("*.tokens.tar")
    assert shard.name == "small.tokens.tar"


def test_pretrain(trained: tuple[Path, list[Any]]) -> None:
    losses = trained[1]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_adapt(trained: tuple[Path, list[Any]]) -> None:
    folder = trained[0] / OUT
    assert Image.load(folder / "adapted.png").pixels.shape == (64, 64, 3)
    before, after = (mmpt.load(str(folder / name)) for name in ("pretrained", "adapted"))
    assert not any(group.noisy for group in before.model.config.groups.values())
    assert any(group.noisy for group in after.model.config.groups.values())
    one, other = (p("a", to="text", max_ids=8, seed=2).ids.tolist() for p in (before, after))
    assert one == other


def test_own_text_model(here: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: mmpt[eval]")
    names = run(16)
    assert float(names["same"]) < 1e-4
    assert names["model"].model.config.groups["text"].num_experts == 4


def test_own_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = run(17)["result"].data["samples"]["squares"]
    assert samples["quarantined"] == 0
    assert samples["used"] > 16
    assert samples["filtered"]["held out"] > 0  # about one key in ten
    assert re.search(r"^[\d,]+ ids", capsys.readouterr().out, re.MULTILINE)


def test_the_notebook_runs_and_shows_media(
    here: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: mmpt[test]")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: mmpt[test]")
    tour = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)  # stripped in git
    assert cells[0].source.count('MODEL = "mmpt-mini"') == 1
    cells[0].source = cells[0].source.replace('"mmpt-mini"', repr(model))

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(here))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    nbclient.NotebookClient(
        tour, timeout=120, resources={"metadata": {"path": str(here)}}
    ).execute()  # raises where a cell does

    outputs = [output for cell in cells for output in cell.outputs]
    kinds = Counter(kind for output in outputs for kind in output.get("data", {}))
    assert (kinds["image/png"], kinds["image/gif"]) == (6, 2)
    assert sum("data:audio/" in str(output) for output in outputs) == 2
    assert "equal to the last bit" in str(cells[-2].outputs)
    assert "passes" in str(cells[-1].outputs)
