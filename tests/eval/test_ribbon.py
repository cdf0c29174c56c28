"""The page of a result: every id once, codes that decode, experts that saw what they saw."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.eval.routes import measure, read_stream
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.parts import Image
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import Processor
from mmpt.provenance import _note, _signed
from mmpt.request import Generate
from mmpt.results import Result
from mmpt.ribbon import inspect_file
from mmpt.stream import Rows, StreamBuilder
from mmpt.vocab import Modality

SMALL = {"height": 16, "width": 16, "frames": 5, "max_ids": 12, "max_seconds": 0.5}
NASTY = "<script>alert(1)</script> <boi>"


@pytest.fixture(scope="module")
def folder(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [str(zoo / name) for name in ("text", "image", "video", "speech")]
    processor = Processor.load(names, max_side=16)
    routed: dict[str, Any] = {"num_experts": 4, "num_active": 2, "router": "token_choice"}
    config = ModelConfig(
        vocab_size=len(processor.vocabulary),
        width=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=processor.vocabulary.fingerprint,
        groups={
            "text": GroupConfig(modalities=("text",), **routed),
            "visual": GroupConfig(modalities=("image", "video"), **routed),
            "speech": GroupConfig(modalities=("speech",)),
        },
    )
    folder = tmp_path_factory.mktemp("model")
    save_model(Decoder.from_config(config), processor, folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.load(folder)


@pytest.fixture(scope="module")
def result(pipeline: Pipeline) -> Result:
    slots = [Generate(medium) for medium in ("image", "video", "speech", "text")]
    return pipeline(NASTY, *slots, seed=1, **SMALL)


def test_the_page_shows_every_id_once_and_asks_nothing(
    result: Result, folder: Path, tmp_path: Path, read_page: Any
) -> None:
    [path] = result.save(tmp_path / "a.json")
    said = inspect_file(path, model=folder)
    page = read_page(Path(said["page"]).read_text())
    assert page.asks_nothing()
    cells = [a for a in page.all("i") if a.get("title")]
    assert len(cells) == len(result.ids) == sum(said["ids"].values())
    assert [str(cell["title"]).split(":")[0] for cell in cells] == [
        str(place) for place in range(len(cells))
    ]
    for kind, count in said["ids"].items():
        hue = "c-other" if kind == "structure" else f"c-{kind}"
        assert sum(cell["class"] == hue for cell in cells) == count
    assert {"text", "image", "video", "speech", "structure"} == set(said["ids"])
    assert NASTY[:9] not in page.html.replace("&lt;", "")  # it stays text
    pictures = [a["alt"] for a in page.all("img")]
    assert pictures.count("codes") == 3


def test_a_picture_says_what_its_stream_was(result: Result, folder: Path, tmp_path: Path) -> None:
    paths = result.save(tmp_path / "all")
    said = inspect_file(paths[0], model=folder, out=tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()
    assert sum(said["ids"].values()) == len(result.ids)


def test_streams_read_back_as_they_were_written(result: Result, pipeline: Pipeline) -> None:
    vocabulary = pipeline.processor.vocabulary
    rng = np.random.default_rng(0)
    builder = StreamBuilder(vocabulary).structure("<bod>").text([5, 6])
    builder.media(Modality.IMAGE, rng.integers(0, 9, (2, 3)))
    builder.media(Modality.VIDEO, rng.integers(0, 9, (2, 3, 2)))
    builder.media(Modality.SPEECH, rng.integers(0, 9, 7)).structure("<eod>")
    written = builder.build()
    read = read_stream(written.ids, vocabulary)
    assert (read.modality.tolist(), read.spans) == (written.modality.tolist(), written.spans)
    for stop in range(len(written)):  # and wherever it is cut
        cut = read_stream(written.ids[:stop], vocabulary)
        assert len(cut) == stop
        assert cut.spans == [s for s in written.spans if s.start + s.length <= stop]


def test_every_id_is_seen_by_as_many_experts_as_are_active_and_nothing_changes(
    result: Result, pipeline: Pipeline
) -> None:
    model, vocabulary = pipeline.model, pipeline.processor.vocabulary
    stream = read_stream(result.ids, vocabulary)
    rows = Rows.pack([[stream]], len(stream), 0)
    told = {"modality": rows.modality, "position": rows.position, "document": rows.document}
    with torch.no_grad():
        before = model(rows.ids, **told)
        routes = measure(model, stream, vocabulary)
        assert torch.equal(before, model(rows.ids, **told))
    media = {"text": [0], "visual": [1, 2], "speech": [3]}
    for name, used in routes.experts.items():
        here = np.isin(stream.modality, media[name])
        active = model.config.groups[name].num_active
        assert np.array_equal(used.sum(2), np.tile(here * active, (2, 1))), name
    assert set(routes.experts) == set(media)
    # the first expert layer sees what its router says
    seen = routes.experts["visual"]
    assert len({tuple(row) for row in seen[0][stream.modality == 1]}) > 1


def test_pages_are_of_results_only(
    result: Result, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = result.parts[0]
    assert isinstance(picture, Image)
    for changes, why in (
        ({"ids": []}, "holds 0 ids"),
        ({"ids": [10**15]}, "ids that vocabulary"),
        ({"ids": [-1]}, "ids that vocabulary"),
    ):
        record = json.loads(_note(result, 0)) | changes
        record.pop("sha256")
        note = _signed(record)
        replace(picture, provenance=lambda note=note: note).save(tmp_path / "a.png")
        with pytest.raises(UserError, match=why):
            inspect_file(tmp_path / "a.png", model=folder)
    Image(picture.pixels).save(tmp_path / "b.png")
    assert main(["inspect", str(tmp_path / "b.png")]) == 2
    assert "does not say how it was made" in capsys.readouterr().err
