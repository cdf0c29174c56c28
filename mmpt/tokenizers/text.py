"""Text codec: BPE of Hugging Face `tokenizers`, learnt here or read from others' tokenizer.json.

Structure ids live behind the text ids, so a user who writes `<boi>` gets five ordinary characters.
The special tokens of others keep their ids, and no text is ever encoded as one of them.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import tokenizers
from mmpt.config import UserError, from_dict, write_atomic
from mmpt.parts import check_unicode
from mmpt.tokenizers.base import FORMAT_VERSION, Codec
from mmpt.vocab import Modality
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MAX_BYTES = 1 << 28  # of a tokenizer.json; those of the largest vocabularies have some 30 MB
PROBE = "A \u00e9t\u00e9,\n\t 123  \u6f22\u5b57 \U0001f642\x07."


@dataclass(frozen=True, kw_only=True)
class TextCodecConfig:
    """num_text: size of the vocabulary, bytes included; merges: sha256 of the merge table."""

    num_text: int
    merges: str


class TextCodec(Codec):
    """text <-> codes int64 (n, 1). Every byte has a code, so nothing is ever unknown."""

    kind = "text"
    modality = Modality.TEXT
    config_class = TextCodecConfig
    config: TextCodecConfig

    def __init__(self, config: TextCodecConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config)
        self.tokenizer = tokenizer
        # what comes later can change no code of earlier words; others' rules may look further
        self.by_words = (
            isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
            and tokenizer.normalizer is None
            and not tokenizer.get_added_tokens_decoder()
        )

    @classmethod
    def train_on(cls, texts: Iterable[str], *, num_text: int) -> "TextCodec":
        """Learn merges from texts. num_text: at least 256, one per byte."""
        if num_text < 256:
            raise UserError(f"num_text = {num_text}; needs at least 256, one id per byte")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment] # stub lacks the setter
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment] # stub lacks the setter
        trainer = trainers.BpeTrainer(
            vocab_size=num_text,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(_config_of(tokenizer), tokenizer)

    @classmethod
    def read(cls, path: str | Path) -> "TextCodec":
        """A tokenizer.json as `transformers` keeps it, whose text comes back as it was."""
        tokenizer = _read(Path(path))
        codec = cls(_config_of(tokenizer), tokenizer)
        if codec.decode(codec.encode(PROBE)) != PROBE:
            raise UserError(f"{path} changes texts; use a BPE tokenizer that knows every byte")
        return codec

    @property
    def codebook_size(self) -> int:
        return self.config.num_text

    @property
    def rate(self) -> str:
        return "1 code per merged run of bytes"

    @property
    def fingerprint(self) -> str:
        return self.config.merges

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def defining_tensors(self) -> dict[str, Tensor]:
        return {}

    def encode(self, text: str) -> Tensor:
        """Codes (n, 1); n is 0 for the empty text."""
        check_unicode(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int64).reshape(-1, 1)

    def decode(self, codes: Tensor) -> str:
        """The text of codes (n, 1); bytes that are no UTF-8 become U+FFFD."""
        if not len(codes):
            return ""
        return self.tokenizer.decode(self.check_codes(codes, 2)[:, 0].tolist())

    def stream(self) -> "TextStream":
        """Characters in, codes out once no later character can change them."""
        return TextStream(self)

    def save(self, folder: str | Path) -> None:
        """Write config.json and the library's own tokenizer.json."""
        folder = Path(folder)
        write_atomic(folder / "tokenizer.json", self.tokenizer.to_str())
        config = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "num_text": self.config.num_text,
            "merges": self.config.merges,
        }
        write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Open what `save` wrote; refuses a table that does not match its config."""
        tokenizer = _read(folder / "tokenizer.json")
        codec = cls(from_dict(TextCodecConfig, config, where=f"{folder}/config.json"), tokenizer)
        if _config_of(tokenizer) != codec.config:
            raise UserError(f"{folder}/tokenizer.json is not the table that config.json names")
        return codec


class TextStream:
    """push(text) -> codes (n, 1). Words are held back until the next one begins.

    With a tokenizer of others, which may join words, all of the text is held back.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self._waiting = ""

    def push(self, text: str) -> Tensor:
        """Codes of the words that are complete."""
        self._waiting += text
        # a piece of the pre-tokenizer is final once two others have begun behind it
        splitter = self.codec.tokenizer.pre_tokenizer
        pieces = splitter.pre_tokenize_str(self._waiting) if self.codec.by_words else ()
        if len(pieces) < 3:
            return torch.zeros((0, 1), dtype=torch.int64)
        cut = pieces[-2][1][0]
        ready, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return self.codec.encode(ready)

    def flush(self) -> Tensor:
        """Codes of what is left."""
        ready, self._waiting = self._waiting, ""
        return self.codec.encode(ready)


def text_ids(codec: TextCodec, text: str) -> np.ndarray:
    """The ids (n,) of a text."""
    return codec.encode(text)[:, 0].numpy()


def _read(path: Path) -> Tokenizer:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES} bytes; it is no tokenizer")
        tokenizer = Tokenizer.from_file(str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read: {reason}") from None
    if not isinstance(tokenizer.model, models.BPE):
        kind = type(tokenizer.model).__name__
        raise UserError(f"{path} is a {kind} tokenizer; only BPE is supported")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # as plain characters
    return tokenizer


def _config_of(tokenizer: Tokenizer) -> TextCodecConfig:
    model = json.loads(tokenizer.to_str())["model"]
    added = {str(i): t.content for i, t in tokenizer.get_added_tokens_decoder().items()}
    meaning = json.dumps(
        [model["vocab"], model["merges"], *([added] if added else [])], sort_keys=True
    )
    digest = hashlib.sha256(f"{tokenizers.__name__}:{meaning}".encode()).hexdigest()[:16]
    last = max(tokenizer.get_vocab().values(), default=-1)  # ids may have holes
    return TextCodecConfig(num_text=1 + last, merges=digest)
