"""What a model makes of one stream in one pass: nats of each id, and the experts that saw it.

Legend: N ids, L layers, E experts of a group, C chosen by an id, G ids of a group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmpt.eval.likelihood import token_nats
from mmpt.model.dispatch import Dispatch
from mmpt.model.moe import Experts
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows, Span, Stream
from mmpt.vocab import BEGIN, NUM_GRID_SIZES, Vocabulary


@dataclass
class Routes:
    """nats: float32 (N,), 0 for the first id. experts: group -> bool (L, N, E), True where seen."""

    nats: np.ndarray
    experts: dict[str, np.ndarray] = field(default_factory=dict)


def read_stream(ids: np.ndarray, vocabulary: Vocabulary) -> Stream:
    """A stream of ids (N,) as they come, also one that ends inside of a span."""
    begins = {vocabulary.structure_id(name): modality for modality, name in BEGIN.items()}
    modality, spans, place = np.zeros(len(ids), dtype=np.int8), [], 0
    while place < len(ids):
        medium = begins.get(int(ids[place]))
        place += 1
        if medium is None:
            continue
        first = place + NUM_GRID_SIZES[medium]
        sides = [vocabulary.size_of(int(token)) or 0 for token in ids[place:first]]
        length = int(np.prod(sides, dtype=np.int64)) if len(sides) == first - place else 0
        if 0 < length <= len(ids) - first:
            one, two, three = [1] * (3 - len(sides)) + sides
            spans.append(Span(first, length, medium, (one, two, three)))
        modality[first : first + length] = medium
        place = first + length
    return Stream(ids, modality, np.ones(len(ids), dtype=np.float32), spans)


@torch.no_grad()
def measure(model: Decoder, stream: Stream, vocabulary: Vocabulary) -> Routes:
    """One pass of the autoregressive model over the ids, all of them committed."""
    rows = Rows.pack([[stream]], len(stream), vocabulary.structure_id("<pad>"))
    with _recording(model, len(stream)) as experts:
        nats = token_nats(model, rows.to(model.embedding.device))
    return Routes(nats[0].cpu().numpy(), {n: used for n, used in experts.items() if used.any()})


@contextmanager
def _recording(model: Decoder, num_ids: int) -> Iterator[dict[str, np.ndarray]]:
    """Group -> bool (L, N, E), filled by the passes inside the `with`."""
    layers: list[Any] = list(model.layers)
    shape = len(layers), num_ids
    seen = {
        name: np.zeros((*shape, group.num_choices), dtype=bool)
        for name, group in model.config.ordered_groups.items()
    }
    hooks, wrapped = [], []
    for number, layer in enumerate(layers):
        places: dict[str, np.ndarray] = {}
        groups: dict[str, Experts] = dict(layer.experts.groups.items())
        hooks.append(
            layer.experts.register_forward_pre_hook(_placing(places, groups, seen, number))
        )
        for name, experts in groups.items():
            note = _noting(seen[name][number], places, name)
            experts._by_token = _through(experts._by_token, note)  # type: ignore[method-assign] # it alone knows
            wrapped.append(experts)
            if experts.auxiliary is not None:
                hooks.append(experts.auxiliary.register_forward_hook(_deciding(note)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for experts in wrapped:
            del experts._by_token


Note = Callable[[np.ndarray, np.ndarray], None]


def _placing(
    places: dict[str, np.ndarray],
    groups: dict[str, Experts],
    seen: dict[str, np.ndarray],
    number: int,
) -> Callable[..., None]:
    def hook(_: Any, inputs: tuple[torch.Tensor, Dispatch]) -> None:
        dispatch = inputs[1]
        of_groups = dispatch.order.cpu().split(dispatch.counts)
        for (name, experts), rows in zip(groups.items(), of_groups, strict=False):
            places[name] = rows.numpy()
            if experts.group.router == "hard":
                seen[name][number, places[name]] = True

    return hook


def _noting(used: np.ndarray, places: dict[str, np.ndarray], name: str) -> Note:
    def note(row: np.ndarray, expert: np.ndarray) -> None:
        used[places[name][row], expert] = True

    return note


def _through(compute: Callable[..., torch.Tensor], note: Note) -> Callable[..., torch.Tensor]:
    def by_token(low: torch.Tensor, gates: torch.Tensor, chosen_GC: torch.Tensor, *rest: Any):
        rows = np.arange(len(chosen_GC)).repeat(chosen_GC.shape[1])
        note(rows, chosen_GC.flatten().cpu().numpy())
        return compute(low, gates, chosen_GC, *rest)

    return by_token


def _deciding(note: Note) -> Callable[..., None]:
    def hook(_: Any, __: Any, logits_GE: torch.Tensor) -> None:
        note(*(logits_GE > 0).cpu().numpy().nonzero())

    return hook
