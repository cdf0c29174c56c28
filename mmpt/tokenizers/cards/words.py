"""Word error rates of a speech card: the same sentences, as each system says them, to one judge.

Seen voices spoke in training and unseen ones did not. Where both say alike things, their rates
differ by the voice alone.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mmpt.config import UserError
from mmpt.progress import Bar
from mmpt.tokenizers.cards.speech import Utterance
from mmpt.tokenizers.cards.system import Block, require
from mmpt.tokenizers.judge import (
    GrammarJudge,
    Recogniser,
    WhisperJudge,
    WordErrors,
    difference,
    judge,
    spoken_words,
)

log = logging.getLogger(__name__)

GROUPS = ("wer", "wer_seen", "wer_unseen")
COUNTS = ("judged", "judged_seen", "judged_unseen")  # utterances
RIVALS = ("baseline", "ceiling")


def check_unseen(unseen: Sequence[str], seen: Sequence[str]) -> None:
    """Refuse a claim of unseen voices that the voices of the shards to train on contradict."""
    heard = sorted(set(seen) & set(unseen))
    if heard:
        raise UserError(
            f"unseen_voices names {', '.join(heard)}, but the shards to train on hold "
            f"{'it' if len(heard) == 1 else 'them'}; take the name or the shards out"
        )


def judged(
    heldout: Sequence[Utterance], unseen: Sequence[str], *, whisper: str | Path | None = None
) -> tuple[list[int], list[str]]:
    """Which utterances a judge hears: those with a transcript; and what is missing, in sentences.

    Where unseen voices speak, only the data sets in which they do are heard: there, seen and
    unseen voices say alike things.
    """
    sources = {u.source for u in heldout if u.voice in unseen}
    said = {
        index: set(spoken_words(u.text))
        for index, u in enumerate(heldout)
        if spoken_words(u.text) and (not sources or u.source in sources)
    }
    known = None if whisper or not said else _dictionary()
    picks = [index for index, words in said.items() if known is None or words <= known]
    notes = []
    if len(picks) < len(said):
        count = len(said) - len(picks)
        notes.append(f"word error rate: {count} texts with words that the judge does not know")
    if not picks:
        notes.append("word error rate: not measured, for no sound has one text that fits beside it")
    elif not sources:
        notes.append("word error rate: no voice is known to be unseen in training")
    return picks, notes


def by_voice(
    voices: Sequence[str], unseen: Sequence[str], seen: Sequence[str]
) -> dict[str, list[int]]:
    """The rows of each of GROUPS: all, voices heard in training, and voices named as unseen.

    A voice that is neither belongs to no group of its own.
    """
    return {
        "wer": list(range(len(voices))),
        "wer_seen": [row for row, voice in enumerate(voices) if voice in seen],
        "wer_unseen": [row for row, voice in enumerate(voices) if voice in unseen],
    }


def measure_words(
    waves: Mapping[str, Sequence[Tensor]],
    texts: Sequence[str],
    picks: Sequence[int],
    rows: Mapping[str, Sequence[int]],
    *,
    whisper: str | Path | None = None,
) -> dict[str, Block]:
    """Word error rates with 95 % intervals of each system's waves, and how they differ.

    waves: by name of the system, among them "baseline" and "ceiling"; only `picks` of them are
    heard, and `texts` is what they say. rows: of `by_voice`. whisper: folder of a model to judge
    with; without, the judge knows which words may follow each other.
    """
    if not picks:
        return {name: silent() for name in waves}
    recogniser = WhisperJudge(whisper) if whisper else GrammarJudge(texts)
    errors = {
        name: _listen(recogniser, [made[index] for index in picks], texts, name)
        for name, made in waves.items()
    }
    blocks = {name: _block(name, errors, rows) for name in waves}
    return {name: block | {"judge": recogniser.name} for name, block in blocks.items()}


def silent() -> Block:
    """The keys of a word error rate that was not measured."""
    keys = (
        [group, f"{group}_low", f"{group}_high", *(f"{group}_minus_{rival}" for rival in RIVALS)]
        for group in GROUPS
    )
    return dict.fromkeys([*(key for group in keys for key in group), *COUNTS, "judge"])


def _dictionary() -> set[str]:
    """The words that pocketsphinx can hear."""
    require("pocketsphinx")
    import pocketsphinx

    listing = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"))
    return {line.split(maxsplit=1)[0] for line in listing.read_text().splitlines() if line}


def _listen(
    recogniser: Recogniser, waves: Sequence[Tensor], texts: Sequence[str], name: str
) -> WordErrors:
    shown = Bar(waves, desc=f"{name or 'codec'}: {recogniser.name}")
    return judge(recogniser, (wave.numpy() for wave in shown), texts)


def _block(name: str, errors: Mapping[str, WordErrors], rows: Mapping[str, Sequence[int]]) -> Block:
    block = silent()
    for (group, chosen), count in zip(rows.items(), COUNTS, strict=True):
        block[count] = len(chosen)
        if not chosen:
            continue
        mine = _only(errors[name], chosen)
        block[group] = mine.rate
        block[f"{group}_low"], block[f"{group}_high"] = mine.interval()
        for rival in RIVALS:
            middle, low, high = difference(mine, _only(errors[rival], chosen))
            block[f"{group}_minus_{rival}"] = [low, middle, high]
    return block


def _only(errors: WordErrors, rows: Sequence[int]) -> WordErrors:
    return WordErrors(
        tuple(errors.errors[row] for row in rows), tuple(errors.words[row] for row in rows)
    )
