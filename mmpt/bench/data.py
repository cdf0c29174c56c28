"""`mmpt bench data`: reading, packing, waiting and resuming, beside webdataset and Energon.

Both sides read the same files with a warm cache, in one process, one sample after another; what
they give is compared before they are timed. Ours checks and counts every sample while it reads.
"""

import hashlib
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmpt import hub
from mmpt.bench.harness import Comparison, Row, compare, run_rows
from mmpt.bench.readers import (
    Reader,
    documents_of,
    energon_name,
    energon_packer,
    has_energon,
    map_rows,
    our_reader,
    peers,
)
from mmpt.config import load_recipe
from mmpt.data.index import build_index, index_path, load_index, save_index
from mmpt.data.loader import DataConfig, Loader, SourceConfig
from mmpt.data.pack import PackReport
from mmpt.data.shards import Quarantine, read_documents, write_samples
from mmpt.data.sources import sampler_shards
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.media import picture_bytes
from mmpt.parts import Image, Text
from mmpt.stream import Segment
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe, fit_model
from mmpt.vocab import Modality, Vocabulary

PAIRS = 600  # pictures with their names
DOCUMENTS = 4000  # of the token shard
BATCHES = 32  # that are timed together, for packers work in bursts
STEPS = 12  # of training, after the first ones
WARM_STEPS = 3
MODEL = ("model.vocab_size=1",)  # in the tiny recipe; the vocabulary says how many
MAX_WAIT = 1.0  # % of a step
MAX_RESUME = 2.0  # seconds
MAX_INDEX = 100.0  # bytes a document
READ = (10_000, 10_000_000)  # documents before a resume


def data(device: str) -> list[Row]:
    """All rows; on `device` a model trains, to see how long it waits for rows."""
    with tempfile.TemporaryDirectory() as folder:
        return run_rows(_rows(Path(folder), device))


def _rows(folder: Path, device: str) -> Iterator[Row]:
    raw, pairs = copy_sampler(folder / "raw"), write_pairs(folder / "pairs")
    yield from _sample_rows("samples, undecoded", raw, decode=False)
    yield from _sample_rows("pictures and texts, decoded", pairs, decode=True)
    yield _index_row(raw)
    vocabulary = bench_vocabulary()
    config = token_config(folder / "tokens", vocabulary)
    yield from _token_rows(folder, config, vocabulary)
    yield from _resume_rows(config, vocabulary)
    for workers in (0, 1):
        yield _wait_row(folder, replace(config, workers=workers), vocabulary, device)


# raw shards


def copy_sampler(folder: Path) -> list[Path]:
    """The sampler's shards in a folder of their own, indexed."""
    folder.mkdir()
    return [_indexed(Path(shutil.copy(shard, folder))) for shard in sampler_shards()]


def write_pairs(folder: Path) -> list[Path]:
    """The sampler's pictures as plain pairs, KEY.png beside KEY.txt, in two shards."""
    shards = [shard for shard in sampler_shards("train") if shard.name.startswith("emoji")]
    samples = (
        {"__key__": document.key, "png": picture_bytes(part.pixels), "txt": text.text.encode()}
        for document in read_documents(shards, Quarantine(allowed=0))
        for part in document.parts
        if isinstance(part, Image)
        for text in document.parts[:1]
        if isinstance(text, Text)
    )
    chosen = list(islice(samples, PAIRS))
    for number in range(2):
        write_samples(folder / f"pairs-{number:04d}.tar", chosen[number::2])
    return [_indexed(shard) for shard in sorted(folder.glob("*.tar"))]


def _indexed(shard: Path) -> Path:
    save_index(build_index(shard))
    return shard


def _sample_rows(case: str, shards: list[Path], *, decode: bool) -> Iterator[Row]:
    ours = our_reader(shards, decode=decode)
    expected = _contents(ours)
    for peer in peers(shards, decode=decode):
        _show_equal(f"{case}, {peer.name}", expected, _contents(peer))
        result = compare(partial(_drain, ours.read), partial(_drain, peer.read))
        yield _rate_row(case, result, "samples/s", len(expected), peer.name)


def _contents(reader: Reader) -> list[bytes]:
    """What an epoch holds, as hashes in sorted order."""
    return sorted(map(_digest, map(reader.view, reader.read())))


def _digest(sample: tuple[str, dict[str, Any]]) -> bytes:
    digest = hashlib.sha256(sample[0].encode())
    for name, value in sorted(sample[1].items()):
        data = value.encode() if isinstance(value, str) else value
        data = data if isinstance(data, bytes) else np.asarray(data)  # Energon's are tensors
        digest.update(f"{name} {getattr(data, 'shape', len(data))} ".encode() + bytes(data))
    return digest.digest()


def _show_equal(case: str, ours: list[bytes], peer: list[bytes]) -> None:
    if ours != peer:
        same = (Counter(ours) & Counter(peer)).total()
        raise RuntimeError(f"{case}: {same} of {len(ours)} are equal; it has {len(peer)}")


def _drain(read: Callable[[], Iterator[Any]]) -> None:
    deque(read(), maxlen=0)


def _index_row(shards: list[Path]) -> Row:
    number = sum(len(index) for shard in shards if (index := load_index(shard)) is not None)
    size = sum(index_path(shard).stat().st_size for shard in shards) / number
    return _limit_row("index of the sampler, mapped", "B/document", size, MAX_INDEX)


# token shards


def bench_vocabulary() -> Vocabulary:
    """As many ids as the shipped tokenizers have; their weights are not needed."""
    return Vocabulary.build(
        num_text=2048,
        text_fingerprint="text",
        codebooks=[
            ("visual", 4096, {"image": "image"}, None),
            ("speech", 1024, {"speech": "speech"}, None),
        ],
    )


def token_config(folder: Path, vocabulary: Vocabulary) -> DataConfig:
    """The loader of one token shard of random documents, as long as those of the sampler."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "bench.tokens.tar", vocabulary, separator=np.array([10])) as writer:
        for number in range(DOCUMENTS):
            segments = list(_segments(rng))
            writer.add(EncodedDocument(f"{number}", f"{number}", "any", segments))
        writer.finish()
    shards = (str(folder / "bench.tokens.tar"),)
    return DataConfig(sources={"bench": SourceConfig(shards=shards)})


def _segments(rng: np.random.Generator) -> Iterator[Segment]:
    """A picture with its name, a spoken sentence with its words, or a page of text."""
    kind = rng.choice(3, p=(0.6, 0.25, 0.15))
    yield Segment(
        Modality.TEXT, rng.integers(0, 2048, rng.integers(*((3, 40), (60, 400))[kind > 1]))
    )
    if kind == 0:
        yield Segment(Modality.IMAGE, rng.integers(0, 4096, (8, 8)))
    elif kind == 1:
        yield Segment(Modality.SPEECH, rng.integers(0, 1024, rng.integers(12, 60)))


def _token_rows(folder: Path, config: DataConfig, vocabulary: Vocabulary) -> Iterator[Row]:
    loader = Loader(config, vocabulary, seed=0)
    ours = partial(_take, loader)
    mapped = map_rows(folder / "rows", list(map(vars, islice(loader, BATCHES))))
    number = BATCHES * config.rows
    case = f"rows of {config.length} ids"
    result = compare(ours, partial(_take, mapped))
    yield _rate_row(case, result, "rows/s", number, "numpy memmap of rows")
    if not has_energon():
        return
    source = loader.sources["bench"]
    epoch = [source.stream(number) for number in range(len(source))]
    (folder / "packed").mkdir()
    read = energon_packer(
        folder / "packed",
        epoch,
        rows=config.rows,
        length=config.length,
        buffer=config.buffer,
        pad=vocabulary.structure_id("<pad>"),
    )
    once = replace(config, sources={"bench": replace(config.sources["bench"], max_epochs=1.0)})
    expected = [
        array for rows in Loader(once, vocabulary, seed=0) for array in documents_of(vars(rows))
    ]
    theirs = [array for rows in read(repeat=False) for array in documents_of(rows)]
    _show_equal(f"{case}, {energon_name()}", sorted(expected), sorted(theirs))
    result = compare(ours, partial(_take, read(repeat=True)))
    yield _rate_row(f"{case}, packed", result, "rows/s", number, energon_name())


def _take(batches: Iterator[Any]) -> None:
    deque(islice(batches, BATCHES), maxlen=0)


# resuming, and waiting


def _resume_rows(config: DataConfig, vocabulary: Vocabulary) -> Iterator[Row]:
    early, late = (partial(resume, config, vocabulary, read) for read in READ)
    result = compare(late, early)
    case = f"resume after {READ[1]:,} documents"
    yield _limit_row(case, "s", result.ours, MAX_RESUME)
    name = f"after {READ[0]:,}"
    yield _row(case, "s", result.ours, result.peer, name, result.ratio, result.low, result.high)


def resume(config: DataConfig, vocabulary: Vocabulary, read: int) -> Any:
    """The first batch of a new loader whose stream has read so much, and has a full buffer."""
    loader = Loader(config, vocabulary, seed=0)
    cursor = [read, 120 * read, 120.0 * read, 1.0]
    waiting = [[0, read - place, 0] for place in range(config.buffer - 1, 0, -1)]
    stream = {"cursors": {"bench": cursor}, "since": 120 * read, "residue": waiting, "taken": 0}
    state = loader.state_dict() | {"rows": config.rows * (read // 64)}
    loader.load_state_dict(state | {"streams": {"0": stream | {"report": vars(PackReport())}}})
    return next(loader)


def _wait_row(folder: Path, config: DataConfig, vocabulary: Vocabulary, device: str) -> Row:
    """The share of steps that the tiny recipe's model spends on its batches."""
    recipe = load_recipe(TrainRecipe, hub.shipped("recipes") / "tiny.toml", ["model.vocab_size=1"])
    recipe = replace(
        recipe,
        data=replace(config, rows=recipe.data.rows, length=recipe.data.length),
        model=fit_model(recipe.model, vocabulary),
        codes_from=(),
        vocabulary="",
        device=device,
    )
    trainer = pretrainer(recipe, folder / f"run-{config.workers}", vocabulary=vocabulary)
    with closing(trainer.loader):
        steps = [trainer.step() for _ in range(WARM_STEPS + STEPS)][WARM_STEPS:]
    share = 100 * sum(s["laps"]["data"] for s in steps) / sum(s["step_seconds"] for s in steps)
    case = f"waiting for data, workers = {config.workers}"
    return replace(_limit_row(case, "% of a step", share, MAX_WAIT), device=device)


# rows of the table


def _rate_row(case: str, result: Comparison, unit: str, number: int, peer: str) -> Row:
    ours, theirs = number / result.ours, number / result.peer
    return _row(case, unit, ours, theirs, peer, result.ratio, result.low, result.high)


def _limit_row(case: str, unit: str, ours: float, limit: float) -> Row:
    ratio = limit / max(ours, 1e-9)
    return _row(case, unit, ours, limit, "limit", ratio, ratio, ratio)


def _row(
    case: str, unit: str, ours: float, peer: float, name: str, ratio: float, low: float, high: float
) -> Row:
    return Row(
        case=case,
        device="cpu",
        dtype="-",
        unit=unit,
        ours=ours,
        peer=peer,
        peer_name=name,
        ratio=ratio,
        low=low,
        high=high,
    )
