"""The training of auxiliary routers: causal ones that learn what expert choice took.

Expert choice picks ids by comparing them with others, later ones among them, which no generation
can do. MoMa (arXiv 2407.21770, section 2.4.1) trains a further router per layer and group to
predict from an id alone whether an expert takes it, on the frozen model.
"""

from collections.abc import Sequence

import torch

from mmpt.model.transformer import Decoder
from mmpt.stream import Rows
from mmpt.train.loss import Losses, NextBatch
from mmpt.vocab import Modality


class CausalRouters:
    """The objective of auxiliary routers: cross-entropy in nats per id, layer and expert.

    Groups without such routers add nothing, their ids count as 0.
    """

    def prepare(self, rows: Rows, generators: Sequence[torch.Generator]) -> NextBatch:
        """Every id but pads counts alike; nothing is drawn."""
        return NextBatch(rows, rows.ids, (rows.document >= 0).float())

    def losses(self, model: Decoder, batch: NextBatch) -> Losses:
        """One pass of the frozen model, routed as in its training."""
        rows = batch.rows
        hidden = model(
            rows.ids, modality=rows.modality, position=rows.position, document=rows.document
        )
        loss = model.take_router_loss()
        assert loss is not None, "the model has auxiliary routers"
        modality = rows.modality[rows.document >= 0]
        counts = torch.bincount(modality, minlength=len(Modality)).double()
        nats = torch.zeros(len(Modality), dtype=torch.float64, device=hidden.device)
        nats.index_add_(0, modality, loss.detach()[rows.document >= 0].double())
        return Losses(loss.sum(), nats, counts)
