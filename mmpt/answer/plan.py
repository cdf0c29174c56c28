"""What a request will take at most, before it is answered: ids, passes, bytes, seconds."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mmpt.answer.grids import NAMES
from mmpt.answer.rows import Engine, Row
from mmpt.data.layout import speech_span
from mmpt.decode.prefix import Prefix, candidate_ids
from mmpt.decode.sampling import Sampling
from mmpt.parts import Text
from mmpt.request import Generate, Request
from mmpt.stream import Segment
from mmpt.vocab import MEDIA, Modality

READ, STEPS, LOOKS, BLOCK = 64, 8, 3, 64  # of the measurement: ids, steps, passes over a block


@dataclass(frozen=True)
class Speed:
    """Seconds of this model on this device: an id that is read, one that is written, a pass over a
    block of 64 codes (0: it never was adapted), and a code of each medium that is decoded.
    """

    read: float
    step: float
    look: float
    decode: dict[str, float]

    @classmethod
    @torch.inference_mode()
    def measure(cls, engine: Engine) -> "Speed":
        """A moment of work, with nothing to show for it; the first time warms up."""
        vocabulary, model = engine.vocabulary, engine.model
        ids = np.append(vocabulary.structure_id("<bod>"), np.zeros(READ - 1, dtype=np.int64))
        open_ = Prefix(model, vocabulary, [ids], None, Sampling())

        def read() -> None:
            Prefix(model, vocabulary, [ids], None, Sampling()).hidden.cpu()

        def step() -> None:
            prefix = Prefix(model, vocabulary, [ids], None, Sampling())
            for _ in range(STEPS):
                choice = prefix.scores().argmax(-1).clamp(max=vocabulary.num_text - 1)
                prefix.push(choice, [Modality.TEXT], [True])
            prefix.hidden.cpu()

        media = [medium for medium in MEDIA if vocabulary.has(medium)]
        look = 0.0
        noisy = {name for g in model.config.groups.values() if g.noisy for name in g.modalities}
        denoised = [medium for medium in media if NAMES[medium] in noisy]
        if denoised:
            candidates = candidate_ids(vocabulary, denoised[0], open_.device)
            block = candidates[:1].expand(1, BLOCK)

            def looks() -> None:
                for _ in range(LOOKS):
                    open_.block_scores(block, denoised[0], candidates, time=0.5).cpu()

            look = _seconds(looks) / LOOKS
        reading = _seconds(read)
        decode = {NAMES[medium]: _decoding(engine, medium) for medium in media}
        stepping = max(0.0, _seconds(step) - reading) / STEPS
        return cls(reading / READ, stepping, look, decode)


@dataclass(frozen=True)
class Plan:
    """At most; what the model ends by itself takes less. Guidance doubles what each pass computes.

    given, made: ids by medium, those that mark and size spans as text. bytes: of the weights, of
    the keys and values of all ids, and of the codecs.
    """

    given: dict[str, int]
    made: dict[str, int]
    passes: int
    weight_bytes: int
    cache_bytes: int
    codec_bytes: int
    seconds: float

    @property
    def ids(self) -> int:
        """Of the whole stream."""
        return sum(self.given.values()) + sum(self.made.values())

    @property
    def bytes(self) -> int:
        """All that is held at once."""
        return self.weight_bytes + self.cache_bytes + self.codec_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"ids": self.ids, "bytes": self.bytes}


def plan_of(engine: Engine, request: Request, speed: Speed) -> Plan:
    """Of one request; parts are encoded, nothing is generated."""
    row, made = Row(request, engine.processor, 0), {name: 0 for name in NAMES.values()}
    longest, passes, branches, seconds, ahead = 0, 0, 1, 0.0, 0
    while (slot := row.advance()) is not None:
        settings = slot.chosen
        medium, codes, blocks = _amount(engine, slot)
        marks = 0 if medium == "text" else 4 * blocks + 1
        made[medium] += codes
        made["text"] += marks
        seen = len(row.ids) + ahead
        seen = min(seen, settings.context) if settings.context else seen
        factor = 1 if settings.guidance == 1 else 2
        branches, longest = max(branches, factor), max(longest, seen + codes + marks)
        # each slot, and each span of speech in it, reads what stands before it
        reads = blocks if medium == "speech" else 1
        seconds += reads * seen * speed.read * factor + marks * speed.step
        if settings.decoder == "dida" and slot.medium not in (None, "text"):
            rounds = (settings.num_passes + 1) * blocks
            seconds += rounds * factor * speed.look * max(1.0, codes / blocks / BLOCK)
            passes += rounds + marks
        else:
            seconds += codes * speed.step * factor
            passes += codes + marks
        seconds += codes * speed.decode.get(medium, 0.0)
        ahead += codes + marks
    given, config = _given(engine, request), engine.model.config
    size = engine.model.embedding.element_size()
    kept = 2 * config.num_kv_heads * config.width_per_head * config.num_layers * size
    return Plan(
        given,
        made,
        passes,
        _bytes_of(engine.model),
        # a buffer doubles when it is full
        2 * kept * longest * branches,
        sum(_bytes_of(codec) for codec in engine.processor.media.values()),
        seconds,
    )


def _amount(engine: Engine, slot: Generate) -> tuple[str, int, int]:
    """Medium, codes at most, and the blocks that they are written in."""
    settings = slot.chosen
    if slot.medium in (None, "text"):
        return "text", settings.max_ids, 1
    modality = Modality[slot.medium.upper()]
    if slot.edit is not None:
        codes = engine.processor.encode_parts([slot.edit.part])[0].codes
        shape = codes.shape
    elif slot.medium == "speech":
        shape = (engine.max_codes(settings),)
    else:
        shape = engine.shape(modality, settings)
    count = int(np.prod(shape))
    if slot.medium == "speech":
        return slot.medium, count, -(-count // speech_span(engine.vocabulary))
    return slot.medium, count, shape[0] if len(shape) == 3 else 1


def _given(engine: Engine, request: Request) -> dict[str, int]:
    counts = {name: 0 for name in NAMES.values()}
    parts = request.filled([], [0] * len(request.slots))
    for segment in engine.processor.encode_parts(parts):
        counts[NAMES[segment.modality]] += segment.codes.size
    row = Row(request, engine.processor, 0)
    while row.advance() is not None:
        pass
    counts["text"] += len(row.ids) - sum(counts.values())
    return counts


def _decoding(engine: Engine, medium: Modality) -> float:
    """Seconds a code."""
    books = engine.codec(medium).num_codebooks
    shape = {Modality.IMAGE: (8, 8 * books), Modality.VIDEO: (2, 8, 8 * books)}
    codes = np.zeros(shape.get(medium, (16 * books,)), dtype=np.int64)
    return _seconds(lambda: _decode(engine, Segment(medium, codes))) / codes.size


def _decode(engine: Engine, segment: Segment) -> None:
    assert not isinstance(engine.processor.decode_segments([segment])[0], Text)


def _seconds(work: Callable[[], None]) -> float:
    """The better of two, behind one that warms up."""
    work()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _bytes_of(module: Any) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
