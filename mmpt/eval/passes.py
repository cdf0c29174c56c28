"""Forward passes of an evaluation, shared out over ranks: every rank gets every result.

All ranks of a sharded model take part in every pass, so that each does as many as any other; one
that has nothing left passes padding.

Legend: N streams, B rows, T row, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from mmpt.eval.likelihood import token_nats, token_scores
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows, Stream
from mmpt.train.parallel import Ranks
from mmpt.vocab import Vocabulary

BATCH = 16  # rows of a pass
MIN_LENGTH = 8  # of rows that are padding alone


class Passes:
    """Runs streams through a model, which is in evaluation mode meanwhile.

    ranks: those of a training; without them this process does all. bf16: as the run trains. batch:
    rows of a pass.
    """

    def __init__(
        self,
        model: Decoder,
        vocabulary: Vocabulary,
        *,
        ranks: Ranks | None = None,
        bf16: bool = False,
        batch: int = BATCH,
    ) -> None:
        self.model, self._ranks, self._bf16 = model, ranks, bf16
        self._batch = batch
        self._pad = vocabulary.structure_id("<pad>")
        self._rank, self._count = (ranks.data_rank, ranks.num_data) if ranks else (0, 1)

    def nats(self, streams: Sequence[Stream]) -> list[float]:
        """(N,): -log p of what has weight in each stream, summed by weight."""

        def measure(rows: Rows) -> torch.Tensor:
            return (token_nats(self.model, rows).double() * rows.loss_weight).sum(1, keepdim=True)

        return self._map(streams, measure, 1)[:, 0].tolist()

    def scores(self, streams: Sequence[Stream]) -> list[tuple[float, bool]]:
        """(N,): log p of what has weight in each stream, and whether each such id is the best."""

        def measure(rows: Rows) -> torch.Tensor:
            nats, best = token_scores(self.model, rows)
            wrong = (~best & (rows.loss_weight > 0)).sum(1)
            return torch.stack([-(nats.double() * rows.loss_weight).sum(1), wrong.double()], 1)

        return [(score, wrong == 0) for score, wrong in self._map(streams, measure, 2).tolist()]

    def pooled(self, streams: Sequence[Stream], layer: int) -> torch.Tensor:
        """float64 (N, D): the mean, by weight, of the hidden states that a layer gives."""
        kept: list[torch.Tensor] = []
        hook = self.model.layers[layer].register_forward_hook(lambda *io: kept.append(io[2][0]))

        def measure(rows: Rows) -> torch.Tensor:
            kept.clear()
            self.model(
                rows.ids,
                modality=rows.modality,
                position=rows.position,
                document=rows.document,
                axes=self.model.axes_of(rows),
            )
            weight = rows.loss_weight.double()
            sums = torch.einsum("btd,bt->bd", kept[0].double(), weight)
            return sums / weight.sum(1, keepdim=True).clamp(min=1e-9)

        try:
            return self._map(streams, measure, self.model.config.width)
        finally:
            hook.remove()

    @torch.no_grad()
    def _map(
        self, streams: Sequence[Stream], measure: Callable[[Rows], torch.Tensor], width: int
    ) -> torch.Tensor:
        """float64 (N, width): `measure` of the row of each stream."""
        device = self.model.groups.device
        out = torch.zeros(len(streams), width, dtype=torch.float64, device=device)
        order = sorted(range(len(streams)), key=lambda i: len(streams[i]))  # little padding
        mine = order[self._rank :: self._count]
        with self._evaluating(device):
            for batch in range(math.ceil(math.ceil(len(order) / self._count) / self._batch)):
                chosen = mine[batch * self._batch : (batch + 1) * self._batch]
                length = max((len(streams[i]) for i in chosen), default=MIN_LENGTH)
                rows = Rows.pack([[streams[i]] for i in chosen] or [[]], length, self._pad)
                values = measure(rows.to(device))
                if chosen:
                    out[chosen] = values
        return (self._ranks.sum(out) if self._ranks else out).cpu()

    @contextmanager
    def _evaluating(self, device: torch.device) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
                yield
        finally:
            self.model.train(training)
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # as a step leaves it
