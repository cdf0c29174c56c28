"""Text as it comes: from ids, or from blocks of them, to pieces that can be shown."""

from collections.abc import Iterator, Sequence

import torch

from mmpt.decode.denoise import Pass
from mmpt.processor import Processor


class TextWriter:
    """Turns ids into text as they come; a character whose bytes are not all there waits.

    stop: texts before which it ends; what may be the beginning of one waits, too.
    """

    def __init__(self, processor: Processor, stop: Sequence[str] = ()) -> None:
        self.codec, self.num_text = processor.text, processor.vocabulary.num_text
        self.ids: list[int] = []
        self.shown = 0  # characters handed out
        self.stop = stop
        self.stopped = False

    @property
    def text(self) -> str:
        """All of it so far."""
        whole = self.codec.decode(torch.tensor(self.ids, dtype=torch.int64)[:, None])
        return whole[: min((n for stop in self.stop if (n := whole.find(stop)) >= 0), default=None)]

    def push(self, token: int | None) -> str:
        """Take an id (None and ids that are no text change nothing); returns what is new."""
        if token is None or token >= self.num_text or self.stopped:
            return ""
        self.ids.append(token)
        whole = self.codec.decode(torch.tensor(self.ids, dtype=torch.int64)[:, None])
        self.stopped = any(stop in whole for stop in self.stop)
        if self.stopped:
            return self._new(self.text)
        if whole.endswith("\ufffd"):
            return ""
        return self._new(whole[: len(whole) - self._held(whole)])

    def flush(self) -> str:
        """What is left, broken characters included."""
        return self._new(self.text)

    def _held(self, text: str) -> int:
        """How many characters at the end may begin a stop."""
        starts = (s[:n] for s in self.stop for n in range(1, len(s)))
        return max((len(start) for start in starts if text.endswith(start)), default=0)

    def _new(self, text: str) -> str:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


def blocks_of_text(passes: Iterator[Pass]) -> Iterator[list[list[int]]]:
    """What each pass commits to each sample, which is nothing but at the end of a block."""
    known: list[int] = []
    last = None
    for last in passes:
        known = known or [0] * len(last.codes)
        pairs = zip(last.codes, known, last.committed, strict=True)
        yield [ids[begin:end].tolist() for ids, begin, end in pairs]
        known = last.committed
    if last is not None:
        yield [ids[n:].tolist() for ids, n in zip(last.codes, known, strict=True)]
