"""Ours, webdataset's and Energon's ways to read the same data, for `mmpt bench data`.

Each is used as its documentation has it, at its fastest settings: in one process, in file order,
without shuffling. A peer that is not installed is left out, and the log says so.
"""

import importlib
import logging
import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmpt.data.index import load_index
from mmpt.data.indexed import samples_of
from mmpt.data.shards import Quarantine, load_document, write_samples
from mmpt.data.tars import Damage
from mmpt.parts import Image, Text
from mmpt.stream import Stream

log = logging.getLogger(__name__)

# an id of a document as Energon gets it: one member a document, which is read without parsing
TOKEN = np.dtype([("ids", "<u4"), ("modality", "u1"), ("loss_weight", "u1")])
ARRAYS = {  # as `Rows` has them
    "ids": np.int64,
    "modality": np.int64,
    "document": np.int64,
    "position": np.int64,
    "loss_weight": np.float32,
}


class Reader(NamedTuple):
    """read: an epoch, which is timed. view: what an item of it holds, as (key, members)."""

    name: str
    read: Callable[[], Iterator[Any]]
    view: Callable[[Any], tuple[str, dict[str, Any]]]


def our_reader(shards: Sequence[Path], *, decode: bool) -> Reader:
    """Reads by the index and accounts for every sample; raises where one is missing."""
    promised = [index.promised for shard in shards if (index := load_index(shard)) is not None]

    def read() -> Iterator[Any]:
        quarantine, used = Quarantine(), 0
        for shard in shards:
            for item in samples_of(shard):
                if isinstance(item, Damage):
                    quarantine.add(shard=item.shard, offset=item.offset, key=item.key, why=item.why)
                    continue
                used += 1
                yield load_document(item) if decode else item
        if len(promised) != len(shards) or used + quarantine.count != sum(promised):
            raise RuntimeError(f"{used} samples of {sum(promised)} that are indexed came out")

    def view(item: Any) -> tuple[str, dict[str, Any]]:
        if not decode:
            return item.key, item.members
        kinds = {Text: ("txt", "text"), Image: ("png", "pixels")}
        named = [(*kinds[type(part)], part) for part in item.parts]
        return item.key, {name: getattr(part, field) for name, field, part in named}

    return Reader("mmpt", read, view)


def peers(shards: Sequence[Path], *, decode: bool) -> Iterator[Reader]:
    """Those that are installed."""
    yield _webdataset(shards, decode=decode)
    if has_energon():
        yield _energon(shards, decode=decode)


def _webdataset(shards: Sequence[Path], *, decode: bool) -> Reader:
    from webdataset.compat import WebDataset

    def read() -> Iterator[Any]:
        dataset: Any = WebDataset([str(shard) for shard in shards], shardshuffle=False)
        yield from dataset.decode("rgb8") if decode else dataset

    return Reader(f"webdataset {version('webdataset')}", read, _plain_view)


def _plain_view(item: Any) -> tuple[str, dict[str, Any]]:
    members = {name: value for name, value in item.items() if not name.startswith("__")}
    return item["__key__"], members


# rows


def map_rows(folder: Path, batches: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of rows that lie ready in files, one for each array, in random order."""
    folder.mkdir()
    arrays = {}
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", np.concatenate([batch[name] for batch in batches]))
        arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    rng, size = np.random.default_rng(0), len(batches[0]["ids"])
    while True:
        order = rng.permutation(len(arrays["ids"])).reshape(-1, size)
        yield from ({name: array[rows] for name, array in arrays.items()} for rows in order)


def documents_of(arrays: Mapping[str, Any]) -> Iterator[bytes]:
    """The documents of a batch with all that rows say of them."""
    for row in range(len(arrays["ids"])):
        parts = {name: np.asarray(arrays[name][row]) for name in ARRAYS}
        document = parts.pop("document")
        for number in range(document.max() + 1):
            chosen = document == number
            yield b"".join(part[chosen].tobytes() for part in parts.values())


# Energon


def has_energon() -> bool:
    """Whether it can be imported; says so where it cannot."""
    try:
        _module()
    except ImportError:
        log.warning("no megatron-energon here, its rows are left out: pip install 'mmpt[bench]'")
        return False
    return True


def _module(name: str = "") -> Any:
    return importlib.import_module(f"megatron.energon{name}")


def energon_name() -> str:
    """With its version, as the rows have it."""
    return f"megatron-energon {version('megatron-energon')}"


def _energon(shards: Sequence[Path], *, decode: bool) -> Reader:
    energon = _module()

    class Plain(energon.DefaultTaskEncoder):
        decoder = energon.SampleDecoder(image_decode="rgb8") if decode else None
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)

    _prepare(shards)
    folder = shards[0].parent
    return Reader(energon_name(), lambda: iter(_loader(folder, Plain(), None)), _plain_view)


def energon_packer(
    folder: Path, streams: Sequence[Stream], *, rows: int, length: int, buffer: int, pad: int
) -> Callable[..., Iterator[dict[str, np.ndarray]]]:
    """Packed rows of these documents from Energon: a function of whether they repeat.

    It gets the documents laid out already, one small member each, and the same best-fit search over
    a buffer of the same size. The last batch is dropped where it is not whole.
    """
    energon = _module()

    class Packing(energon.DefaultTaskEncoder):
        decoder = None
        cookers = (energon.Cooker(energon.stateless(_cook)),)

        def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
            return _best_fit(samples, length)

        @energon.stateless
        def pack_selected_samples(self, samples: list[Any]) -> Any:
            return samples[0] | _lay_out([sample["tokens"] for sample in samples], length, pad)

        @energon.stateless
        def batch(self, samples: list[Any]) -> Any:
            return {name: np.stack([sample[name] for sample in samples]) for name in ARRAYS}

    shard = folder / "streams-0000.tar"
    write_samples(shard, map(_stream_sample, range(len(streams)), streams))
    _prepare([shard])

    def read(*, repeat: bool) -> Iterator[dict[str, np.ndarray]]:
        options = {"packing_buffer_size": buffer, "repeat": repeat}
        return iter(_loader(folder, Packing(), rows, **options))

    return read


def _prepare(shards: Sequence[Path]) -> None:
    """Write Energon's own index beside shards of one folder."""
    folder, names = shards[0].parent, [shard.name for shard in shards]
    prepare = _module(".flavors.webdataset.prepare").WebdatasetPreparator.prepare_dataset
    with redirect_stdout(sys.stderr):  # it prints what it does
        prepare(folder, names, split_parts_ratio=[("train", 1.0)], workers=1, shuffle_seed=None)
    kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(kind)


def _loader(folder: Path, encoder: Any, rows: int | None, **options: Any) -> Any:
    energon = _module()

    settings = {
        "worker_config": energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        "task_encoder": encoder,
        "batch_size": rows,
        "shuffle_buffer_size": None,
        "max_samples_per_sequence": None,
        "shuffle_over_epochs_multiplier": None,
        "parallel_shard_iters": 1,
        "repeat": False,
    }
    return energon.get_savable_loader(energon.get_train_dataset(folder, **settings | options))


def _stream_sample(number: int, stream: Stream) -> dict[str, Any]:
    tokens = np.empty(len(stream), TOKEN)
    for name in TOKEN.names or ():
        tokens[name] = getattr(stream, name)
    return {"__key__": f"{number:06d}", "tokens": tokens.tobytes()}


def _cook(sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"tokens": np.frombuffer(sample["tokens"], TOKEN)}


def _best_fit(samples: Sequence[Any], length: int) -> list[list[Any]]:
    """Longest first, each into the fullest row that has room."""
    rows: list[list[Any]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for sample in sorted(samples, key=lambda sample: -len(sample["tokens"])):
        size = len(sample["tokens"])
        place = bisect_left(rooms, (size, 0))
        room, row = rooms.pop(place) if place < len(rooms) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        insort(rooms, (room - size, row))
    return rows


def _lay_out(documents: Sequence[np.ndarray], length: int, pad: int) -> dict[str, np.ndarray]:
    """One packed row: the five arrays of `Rows`, each (length,)."""
    out = {name: np.zeros(length, dtype) for name, dtype in ARRAYS.items()}
    out["ids"][:] = pad
    out["document"][:] = -1
    begin = 0
    for number, tokens in enumerate(documents):
        place = slice(begin, begin := begin + len(tokens))
        for name in TOKEN.names or ():
            out[name][place] = tokens[name]
        out["document"][place] = number
        out["position"][place] = np.arange(len(tokens))
    return out
