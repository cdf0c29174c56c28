"""Report cards of text: how few ids it takes, beside bytes, and that every character comes back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpt.config import UserError
from mmpt.parts import Part, Text
from mmpt.progress import Bar
from mmpt.tokenizers.base import Codec
from mmpt.tokenizers.cards.system import Block, System, Tally


def measure_text(codec: Codec, heldout: Sequence[list[Part]]) -> dict[str, Block]:
    """The blocks of a text codec by name; "" is the codec. Speeds are bytes a second."""
    texts = [part.text for parts in heldout for part in parts if isinstance(part, Text)]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError("the shards hold no text to measure; name others")
    systems = {
        "": System(
            name=codec.name,
            encode=codec.encode,
            decode=codec.decode,
            sizes=(codec.codebook_size,),
        ),
        "baseline": System(name="bytes", encode=_to_bytes, decode=_from_bytes, sizes=(256,)),
        # text without a codec is text: nothing to lose
        "ceiling": System(name="the text", encode=lambda text: text, decode=lambda text: text),
    }
    return {name: _measure(system, texts) for name, system in systems.items()}


def _measure(system: System, texts: Sequence[str]) -> Block:
    tally = Tally(system)
    exact = sum(tally.keep(text) == text for text in Bar(texts, desc=system.name))
    num_bytes = sum(len(text.encode()) for text in texts)
    block: Block = {
        "system": system.name,
        "bytes_per_id": num_bytes / tally.total if tally.total else None,
        "bits_per_byte": tally.bits / num_bytes if tally.total else None,
        "exact": exact / len(texts),
    }
    return block | tally.metrics(num_bytes) | {"bytes": num_bytes}


def _to_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64).reshape(-1, 1)


def _from_bytes(codes: Tensor) -> str:
    return bytes(codes[:, 0].tolist()).decode()
