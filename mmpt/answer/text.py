"""A slot of text, of many rows at once."""

from collections.abc import Sequence

import numpy as np

from mmpt.answer.rows import Engine, Row, Ticks, sampling_of, unconditional
from mmpt.decode.ar import generate_steps
from mmpt.decode.text import denoise_text
from mmpt.parts import Text
from mmpt.results import PartDone, PartStart, Settings, TextDelta
from mmpt.vocab import Modality
from mmpt.writer import TextWriter, blocks_of_text


def write_text(engine: Engine, rows: Sequence[Row], settings: Settings) -> Ticks:
    """Until each row ends its text, or a stop string stands in it, or `max_ids` are written."""
    windows = [row.window(settings.max_ids, settings.context) for row in rows]
    writers = [TextWriter(engine.processor, settings.stop) for _ in rows]
    prompts = [window.prompt for window in windows]
    options = {
        "max_ids": settings.max_ids,
        "sampling": sampling_of(settings),
        "generators": [row.generator for row in rows],
        "ends": rows[0].ends,
        "unconditional": unconditional(windows, settings),
    }
    model, vocabulary = engine.model, engine.vocabulary
    if settings.decoder == "dida" and model.config.noise.text_block:
        steps = blocks_of_text(
            denoise_text(model, vocabulary, prompts, denoising=settings, **options)
        )
    else:
        options |= {"allow": (Modality.TEXT,), "pool": engine.pool}
        written = generate_steps(model, vocabulary, prompts, **options)
        steps = ([[] if i is None else [i] for i in step.ids] for step in written)
    yield from ((row.number, PartStart("text")) for row in rows)
    for new in steps:
        yield None
        for row, writer, ids in zip(rows, writers, new, strict=True):
            if delta := "".join(map(writer.push, ids)):
                yield row.number, TextDelta(delta)
        if all(writer.stopped for writer in writers):
            break
    for row, writer in zip(rows, writers, strict=True):
        if delta := writer.flush():
            yield row.number, TextDelta(delta)
        part = Text(writer.text)
        row.finish(part, np.array(writer.ids, dtype=np.int64))
        yield row.number, PartDone(part)
