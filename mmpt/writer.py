"""Text as it comes: from ids, or from blocks of them, to pieces that can be shown."""

from collections.abc import Iterator

import torch

from mmpt.decode.denoise import Pass
from mmpt.processor import Processor


class TextWriter:
    """Turns ids into text as they come; a character whose bytes are not all there waits."""

    def __init__(self, processor: Processor) -> None:
        self.codec, self.num_text = processor.text, processor.vocabulary.num_text
        self.ids: list[int] = []
        self.shown = 0  # characters handed out

    @property
    def text(self) -> str:
        """All of it so far."""
        return self.codec.decode(torch.tensor(self.ids, dtype=torch.int64)[:, None])

    def push(self, token: int | None) -> str:
        """Take an id (None and ids that are no text change nothing); returns what is new."""
        if token is None or token >= self.num_text:
            return ""
        self.ids.append(token)
        text = self.text
        return "" if text.endswith("\ufffd") else self._new(text)

    def flush(self) -> str:
        """What is left, broken characters included."""
        return self._new(self.text)

    def _new(self, text: str) -> str:
        new, self.shown = text[self.shown :], len(text)
        return new


def blocks_of_text(passes: Iterator[Pass]) -> Iterator[list[list[int]]]:
    """What each block commits to each sample."""
    known: list[int] = []
    last = None
    for last in passes:
        known = known or [0] * len(last.codes)
        if last.committed != known:
            pairs = zip(last.codes, known, last.committed, strict=True)
            yield [ids[begin:end].tolist() for ids, begin, end in pairs]
            known = last.committed
    if last is not None:
        yield [ids[n:].tolist() for ids, n in zip(last.codes, known, strict=True)]
