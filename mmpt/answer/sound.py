"""Speech: as long as the model says, heard span by span; and edits of a sound."""

from collections.abc import Sequence

import numpy as np

from mmpt.answer.players import SoundPlayer
from mmpt.answer.rows import Engine, Row, Ticks, sampling_of, unconditional
from mmpt.data.layout import speech_span
from mmpt.decode.denoise import denoise_passes
from mmpt.decode.speech import speak_steps
from mmpt.request import Generate
from mmpt.results import PartDone, PartStart, Settings
from mmpt.stream import parse
from mmpt.vocab import END, Modality


def write_speech(engine: Engine, rows: Sequence[Row], settings: Settings) -> Ticks:
    """Row after row."""
    engine.check_adapted(settings)
    most = engine.max_codes(settings)
    for row in rows:
        window = row.window(2 * most, settings.context)
        free = unconditional([window], settings)
        player, ids = SoundPlayer(engine), []
        yield row.number, PartStart("speech")
        for span in speak_steps(
            engine.model,
            engine.vocabulary,
            window.prompt,
            max_codes=most,
            denoising=settings if settings.decoder == "dida" else None,
            sampling=sampling_of(settings),
            generator=row.generator,
            ends=row.ends,
            unconditional=None if free is None else free[0],
            pool=engine.pool,
        ):
            yield None
            if span is not None:
                ids.append(span)
                for segment in parse(span, engine.vocabulary):
                    yield from ((row.number, chunk) for chunk in player.push(segment.codes))
        yield from ((row.number, chunk) for chunk in player.flush())
        whole = np.concatenate(ids)
        last = engine.vocabulary.structure_id(END[Modality.SPEECH])
        if whole[-1] != last:  # what ended it is no part of it
            whole, row.tail = whole[:-1], whole[-1:]
        row.finish(player.part, whole)
        yield row.number, PartDone(player.part)


def edit_speech(engine: Engine, row: Row, slot: Generate) -> Ticks:
    """Span by span; those behind a stretch are not seen by it."""
    assert slot.edit is not None
    settings, vocabulary = slot.chosen, engine.vocabulary
    engine.check_adapted(settings)
    segment, redo = slot.edit.encode(engine.processor)
    held = np.where(redo, -1, vocabulary.ids_of(Modality.SPEECH, segment.codes))
    window = row.window(2 * len(held), settings.context)
    size, end = speech_span(vocabulary), vocabulary.structure_id(END[Modality.SPEECH])
    player, written = SoundPlayer(engine), np.zeros(0, dtype=np.int64)
    yield row.number, PartStart("speech")
    for span in np.split(held, range(size, len(held), size)):
        header = engine.header(Modality.SPEECH, (len(span),))
        seen = window.then(np.append(written, header))
        ids = span
        for passed in denoise_passes(
            engine.model,
            vocabulary,
            [seen.prompt],
            modality=Modality.SPEECH,
            length=len(span),
            sampling=sampling_of(settings),
            generators=[row.generator],
            denoising=settings,
            unconditional=unconditional([seen], settings),
            held=[span],
        ):
            [ids] = passed.codes
            yield None
        codes = vocabulary.codes_of(Modality.SPEECH, ids)
        assert codes is not None  # decoders draw legal ids
        yield from ((row.number, chunk) for chunk in player.push(codes))
        written = np.concatenate([written, header, ids, [end]])
    yield from ((row.number, chunk) for chunk in player.flush())
    row.finish(player.part, written)
    yield row.number, PartDone(player.part)
