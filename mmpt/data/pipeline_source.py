"""Live pipelines: any `webdataset.WebDataset` as a source of a mix, encoded while it is read.

A recipe names a function, `pipeline = "module:function"`. Each logical stream calls it with
`(stream, num_streams)` and iterates over what it returns, again and again: samples as webdataset
gives them, undecoded, which are read as those of raw shards are. Streams share nothing, so the
function says what each gets, such as `WebDataset(...).slice(stream, None, num_streams)`; what
webdataset would split by node or worker it must leave whole (`nodesplitter=None`).

A pipeline has no state. A run that goes on starts it anew, which may repeat documents or miss
some, and loses the pieces that waited in the packers: the job says so, and counts them.
"""

import hashlib
import json
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator, Philox

from mmpt.config import UserError
from mmpt.data.layout import to_stream
from mmpt.data.mix import SourceConfig
from mmpt.data.quarantine import Quarantine
from mmpt.data.shards import is_heldout, load_document
from mmpt.data.tars import Sample
from mmpt.data.tokens import EncodedDocument
from mmpt.stream import Stream
from mmpt.vocab import Vocabulary

if TYPE_CHECKING:
    from mmpt.processor import Processor

COUNTS = ("passes", "used", "heldout", "bad", "lost")  # lost: pieces that waited at a restart
WINDOW = 1024  # documents of a stream that may be asked for again
MAX_BAD_IN_A_ROW = 1000

log = logging.getLogger(__name__)

Counts = dict[str, int]


class Gone(LookupError):
    """A document that was read before, and cannot be read again."""


class PipelineSource:
    """The documents of a pipeline that are not held out, by numbers that rise in each stream.

    Raises UserError for a function that cannot be imported. What it gives is opened at the first
    document: bad samples are counted and quarantined; UserError for an iteration without a usable
    document, for 1,000 bad samples in a row, and when the pipeline itself fails.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        vocabulary: Vocabulary,
        *,
        seed: int,
        streams: int,
        condition_drop: float,
        masked_prompts: bool = False,
    ) -> None:
        if not config.processor:
            raise UserError(
                f"data.sources.{name} is a pipeline; give the folder of a processor.json that "
                "encodes it (mmpt encode writes one) as its processor"
            )
        self.name, self.config, self.vocabulary = name, config, vocabulary
        self.num_streams, self.condition_drop = streams, condition_drop
        self.masked_prompts = masked_prompts
        self.quarantine = Quarantine(Path(config.quarantine) if config.quarantine else None)
        self.open = _find(config.pipeline, name)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        self._key = np.frombuffer(digest[:16], dtype=np.uint64)
        self._feeds: dict[int, _Feed] = {}

    def __len__(self) -> int:
        """0: nobody knows how many there are."""
        return 0

    @property
    def fingerprint(self) -> str:
        """Changes with the function's name alone."""
        return hashlib.sha256(f"pipeline {self.config.pipeline}".encode()).hexdigest()[:16]

    @cached_property
    def processor(self) -> "Processor":
        """What encodes the samples; its codecs must be those of the vocabulary."""
        from mmpt.processor import Processor, ProcessorSettings

        settings = ProcessorSettings.load(self.config.processor)
        return Processor.load(
            settings.tokenizers, vocabulary=self.vocabulary, max_side=settings.max_side
        )

    def stands_at(self, reads: Mapping[int, int]) -> bool:
        """Whether it is being read here, and these streams have read so many documents."""
        feeds = self._feeds
        return bool(feeds) and all(
            n in feeds and feeds[n].read == read for n, read in reads.items()
        )

    def stream(self, number: int) -> Stream:
        """Document `number` of the endless sequence, laid out. Raises Gone for what is past."""
        read, stream = divmod(number, self.num_streams)
        return self._feed(stream).document(read)

    def resume(self, stream: int, read: int, counts: Mapping[str, int]) -> None:
        """Go on after the first `read` documents of a stream, which may not be had again."""
        feed = self._feeds.get(stream)
        if feed is None or feed.read != read:
            self._feeds[stream] = _Feed(self, stream, read, {**dict.fromkeys(COUNTS, 0), **counts})

    def counts(self, stream: int) -> Counts:
        """What became of the samples of a stream so far: used, held out or bad."""
        return dict(self._feed(stream).counts)

    def lay_out(self, sample: Any, stream: int, read: int) -> Stream | None:
        """A sample as the `read`-th document of a stream; None where it is held out."""
        from mmpt.process import one_thread

        document = load_document(to_sample(sample))
        if is_heldout(document.base):
            return None
        with one_thread():
            segments = self.processor.encode_parts(document.parts)
        bits = Philox(key=self._key, counter=[0, 0, stream, read])
        return to_stream(
            EncodedDocument(document.key, document.base, document.order, segments, document.roles),
            self.vocabulary,
            Generator(bits),
            separator=self.processor.separator,
            condition_drop=self.condition_drop,
            masked_prompts=self.masked_prompts,
        )

    def _feed(self, stream: int) -> "_Feed":
        if stream not in self._feeds:
            self.resume(stream, 0, {})
        return self._feeds[stream]


class _Feed:
    """One stream's iterations of a pipeline; `read`: documents that it gave during the run."""

    def __init__(self, source: PipelineSource, stream: int, read: int, counts: Counts) -> None:
        self.source, self.number, self.read, self.counts = source, stream, read, counts
        self._recent: dict[int, Stream] = {}
        self._streams = self._iterate()

    def document(self, read: int) -> Stream:
        if read < self.read and read not in self._recent:
            self.counts["lost"] += 1
            raise Gone(f"document {read} of source {self.source.name}")
        while self.read <= read:
            self._recent[self.read] = next(self._streams)
            self.read += 1
            self._recent.pop(self.read - WINDOW - 1, None)
        return self._recent[read]

    def _iterate(self) -> Iterator[Stream]:
        while True:
            self.counts["passes"] += 1
            empty, bad = True, 0
            for sample in self._samples():
                try:
                    stream = self.source.lay_out(sample, self.number, self.read)
                except UserError as error:
                    self._quarantine(sample, str(error))
                    bad += 1
                    if bad == MAX_BAD_IN_A_ROW:
                        raise UserError(
                            f"source {self.source.name}: {bad} bad samples in a row, the last: "
                            f"{error}"
                        ) from None
                    continue
                bad = 0
                if stream is None:
                    self.counts["heldout"] += 1
                    continue
                self.counts["used"] += 1
                empty = False
                yield stream
            if empty:
                raise UserError(
                    f"source {self.source.name}: {self.source.config.pipeline} gave stream "
                    f"{self.number} of {self.source.num_streams} no document to train on"
                )

    def _samples(self) -> Iterator[Any]:
        """One iteration of the pipeline."""
        try:
            yield from self.source.open(self.number, self.source.num_streams)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"source {self.source.name}: {self.source.config.pipeline} failed with "
                f"{type(error).__name__}: {error}; it ends the run unless the pipeline handles it "
                "(webdataset: handler=warn_and_continue)"
            ) from error

    def _quarantine(self, sample: Any, why: str) -> None:
        self.counts["bad"] += 1
        place = sample if isinstance(sample, Mapping) else {}
        quarantine, key = self.source.quarantine, str(place.get("__key__", ""))
        known = len(quarantine.reasons)
        shard = str(place.get("__url__", self.source.config.pipeline))
        quarantine.add(shard=shard, offset=-1, key=key, why=why)
        if len(quarantine.reasons) > known:
            log.warning("source %s: bad sample %r: %s", self.source.name, key, why)


def to_sample(item: Any) -> Sample:
    """A sample of webdataset as the reader of raw shards has it.

    Text and json may be decoded; media must be bytes. Raises UserError for what is none.
    """
    if not isinstance(item, Mapping) or not isinstance(item.get("__key__"), str):
        kind = type(item).__name__
        raise UserError(f"no sample: a dict with __key__ is needed, not a {kind}")
    members = {str(k).lower(): v for k, v in item.items() if not str(k).startswith("__")}
    if not members:
        raise UserError("no sample: it has no members")
    data = {name: _to_bytes(name, value) for name, value in members.items()}
    return Sample(item["__key__"], data, str(item.get("__url__", "")), -1)


def of_pipelines(sources: Mapping[str, Any]) -> dict[str, PipelineSource]:
    """The live ones among sources."""
    return {name: each for name, each in sources.items() if isinstance(each, PipelineSource)}


def warn_of_pipelines(
    sources: Mapping[str, Any], states: Mapping[int, Mapping[str, Any]], numbers: Iterable[int]
) -> None:
    """Say which sources cannot go on, before these streams begin or after they stopped."""
    places = {name: place for place, name in enumerate(sources)}
    known = {number: states[number] for number in numbers if number in states}
    residues = [state["residue"] for state in known.values()]
    live = [
        name
        for name, source in of_pipelines(sources).items()
        if not source.stands_at({n: state["cursors"][name][0] for n, state in known.items()})
    ]
    if live and not residues:
        log.warning(
            "%s: pipelines have no state; a run that is interrupted starts them anew, and is not "
            "equal to one that is not",
            ", ".join(live),
        )
    elif live:
        waiting = [np.asarray(each, np.int64).reshape(-1, 3)[:, 0] for each in residues]
        lost = np.isin(np.concatenate(waiting), [places[name] for name in live]).sum()
        log.warning(
            "%s: pipelines cannot go on where they were; they start anew, %d pieces of documents "
            "that waited for a row are lost, and the rows differ from those of an uninterrupted "
            "run",
            ", ".join(live),
            lost,
        )


def with_processors(
    sources: Mapping[str, SourceConfig], folder: str | Path
) -> dict[str, SourceConfig]:
    """The same sources; pipelines that name no processor have that of a token folder."""
    return {
        name: replace(source, processor=str(folder))
        if source.pipeline and not source.processor
        else source
        for name, source in sources.items()
    }


def _to_bytes(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        # a lone surrogate is refused where the text is read
        return value.encode("utf-8", "surrogatepass")
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise UserError(
            f"decoded: {name} is a {kind}; leave media as bytes, they are decoded here"
        ) from None


def _find(reference: str, name: str) -> Callable[[int, int], Iterable[Any]]:
    try:
        found = pkgutil.resolve_name(reference)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"data.sources.{name}.pipeline = {reference!r} cannot be imported ({error}); give "
            "module:function, and the module's folder in PYTHONPATH"
        ) from None
    if ":" not in reference or not callable(found):
        raise UserError(f"data.sources.{name}.pipeline = {reference!r} is no module:function")
    return found  # type: ignore[return-value] # what it gives shows when it is read
