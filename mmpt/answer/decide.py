"""A slot in which the model decides what comes: text, pictures, clips and speech, in any order.

What comes next, and text, is written one id at a time; media by the decoder that is chosen.
"""

from collections.abc import Iterator

import numpy as np
import torch

from mmpt.answer.grids import Grid, fill
from mmpt.answer.players import SoundPlayer
from mmpt.answer.rows import Engine, Row, Ticks, sampling_of, unconditional
from mmpt.data.layout import speech_span
from mmpt.decode.ar import block_steps, generate_steps
from mmpt.decode.denoise import denoise_passes
from mmpt.decode.sampling import Shapes
from mmpt.parts import Text
from mmpt.results import PartDone, PartStart, Settings, TextDelta
from mmpt.vocab import BEGIN, END, MEDIA, Modality
from mmpt.writer import TextWriter


class Decision:
    """One row's slot, part by part."""

    def __init__(self, engine: Engine, row: Row, settings: Settings, *, show: bool) -> None:
        engine.check_adapted(settings)
        self.engine, self.row, self.settings, self.show = engine, row, settings, show
        self.left = settings.max_ids
        self._begins = {
            engine.vocabulary.structure_id(BEGIN[m]): m for m in MEDIA if engine.vocabulary.has(m)
        }
        self._text: TextWriter | None = None  # the part that is being written, if it is text
        self._sound: SoundPlayer | None = None  # or speech,
        self._spans = np.zeros(0, dtype=np.int64)  # whose ids these are
        self._spoken = 0  # codes in it

    def write(self) -> Ticks:
        """Until the model ends, or a limit is reached."""
        while self.left > 0 and not self._full:
            header = np.zeros(0, dtype=np.int64)
            for new in self._step():
                yield None
                if isinstance(new, np.ndarray):
                    header = new
                    break
                if self._text is None and new < self.engine.vocabulary.num_text:
                    yield from self._close()
                    if self._full:
                        return
                    self._text = TextWriter(self.engine.processor, self.settings.stop)
                    yield self.row.number, PartStart("text")
                if self._text is not None and (delta := self._text.push(new)):
                    yield self.row.number, TextDelta(delta)
                if self._text is not None and self._text.stopped:
                    self.left = 0
                    break
            if not len(header):
                continue
            modality = self._begins[int(header[0])]
            if modality != Modality.SPEECH or self._sound is None:
                yield from self._close()
                if self._full:
                    return
            self.left -= len(header)
            yield from self._speak(header) if modality == Modality.SPEECH else self._draw(header)
        yield from self._close()

    @property
    def _full(self) -> bool:
        most, open_ = self.settings.max_parts, self._text is not None or self._sound is not None
        return not open_ and bool(most) and self.row.counts[-1] >= most

    @property
    def _pending(self) -> np.ndarray:
        """Ids of the part that is open."""
        if self._text is not None:
            return np.array(self._text.ids, dtype=np.int64)
        return self._spans

    def _step(self) -> Iterator[int | np.ndarray]:
        """Ids of text one by one, and at last a whole header (n,), if one comes."""
        engine, settings, vocabulary = self.engine, self.settings, self.engine.vocabulary
        # as far as the room goes that was made; then what is seen is chosen anew
        ahead = settings.context // 4 or self.left
        window = self.row.window(ahead, settings.context, self._pending)
        shapes = self._shapes()
        header: list[int] = []
        steps = generate_steps(
            engine.model,
            vocabulary,
            [window.prompt],
            max_ids=self.left,
            sampling=sampling_of(settings),
            generators=[self.row.generator],
            allow=(Modality.TEXT, *shapes),
            shapes=shapes,
            stop="header",
            ends=self.row.ends,
            unconditional=unconditional([window], settings),
            pool=engine.pool,
        )
        for count, step in enumerate(steps, 1):
            token = step.ids[0]
            assert token is not None  # a single row is live while it steps
            if header or token in self._begins:
                header.append(token)
                continue
            self.left -= 1
            if token >= vocabulary.num_text:  # it ends here
                self.row.tail, self.left = np.array([token], dtype=np.int64), 0
                return
            yield token
            if count >= ahead:
                return
        if header:
            yield np.array(header, dtype=np.int64)

    def _shapes(self) -> Shapes:
        """The grids that may be begun."""
        engine, settings = self.engine, self.settings
        shapes: dict[Modality, list[tuple[int, ...]]] = {
            modality: [engine.shape(modality, settings)]
            for modality in (Modality.IMAGE, Modality.VIDEO)
            if engine.vocabulary.has(modality)
        }
        if engine.vocabulary.has(Modality.SPEECH):
            room = engine.max_codes(settings) - self._spoken
            most = min(speech_span(engine.vocabulary), room)
            if most > 0:
                shapes[Modality.SPEECH] = [(length,) for length in range(1, most + 1)]
        return shapes

    def _draw(self, header: np.ndarray) -> Ticks:
        engine, settings = self.engine, self.settings
        modality = self._begins[int(header[0])]
        shape = engine.shape(modality, settings)
        need = len(header) + int(np.prod(shape)) + 1
        window = self.row.window(need, settings.context).then(header)
        grid = Grid(modality, shape, np.zeros((0, 1, 1), dtype=np.int64))
        [(part, ids)] = yield from fill(
            engine, [self.row], [window], [grid], [self.row.generator], settings, show=self.show
        )
        end = engine.vocabulary.structure_id(END[modality])
        self.row.finish(part, np.concatenate([header, ids, [end]]))
        self.left -= len(ids) + 1

    def _speak(self, header: np.ndarray) -> Ticks:
        engine, settings = self.engine, self.settings
        size = engine.vocabulary.size_of(int(header[-1]))
        assert size is not None  # the grammar allows nothing else
        if self._sound is None:
            self._sound = SoundPlayer(engine)
            yield self.row.number, PartStart("speech")
        window = self.row.window(size + 3, settings.context, self._spans).then(header)
        options = {
            "modality": Modality.SPEECH,
            "length": size,
            "sampling": sampling_of(settings),
            "generators": [self.row.generator],
            "unconditional": unconditional([window], settings),
        }
        ids, given = np.zeros(0, dtype=np.int64), (engine.model, engine.vocabulary, [window.prompt])
        if settings.decoder == "ar":
            steps = []
            for step in block_steps(*given, pool=engine.pool, **options):
                steps.append(step)
                yield None
            ids = torch.cat(steps).cpu().numpy()
        else:
            for passed in denoise_passes(*given, denoising=settings.fit(size), **options):
                [ids] = passed.codes
                yield None
        codes = engine.vocabulary.codes_of(Modality.SPEECH, ids)
        assert codes is not None  # decoders draw legal ids
        yield from ((self.row.number, chunk) for chunk in self._sound.push(codes))
        end = engine.vocabulary.structure_id(END[Modality.SPEECH])
        self._spans = np.concatenate([self._spans, header, ids, [end]])
        self._spoken += size
        self.left -= size + 1

    def _close(self) -> Ticks:
        """The part that is open is finished."""
        number = self.row.number
        if self._text is not None:
            if delta := self._text.flush():
                yield number, TextDelta(delta)
            part, ids = Text(self._text.text), self._pending
        elif self._sound is not None:
            yield from ((number, chunk) for chunk in self._sound.flush())
            part, ids = self._sound.part, self._spans
        else:
            return
        self._text, self._sound = None, None
        self._spans, self._spoken = self._spans[:0], 0
        self.row.finish(part, ids)
        yield number, PartDone(part)
