"""The loss: the weighted sum of token losses, divided by the sum of weights over the whole step.

The sum of weights is counted before the first backward pass, over all accumulation steps (and, with
several ranks, all-reduced), so that gradients do not depend on how a step is divided. Logits of the
whole vocabulary never exist for more than one chunk of positions.

Legend: N positions that are scored, D width, V vocabulary, C positions of a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mmpt.model.transformer import Decoder
from mmpt.stream import Rows
from mmpt.vocab import MEDIA, Modality

CHUNK = 512  # positions
MAX_LOGITS = 1 << 25  # that exist at a time


@dataclass
class Losses:
    """Of one batch: what is differentiated, and sums to report.

    total: the weighted sum of losses, a scalar with a gradient. nats and counts: float64 (4,), the
    plain sums by modality of the predicted id, over the positions with weight. noisy: the same two
    of codes that are denoised, where clean ids are predicted beside them. num_noisy: float64 (4,),
    all noisy ids, whether they are predicted from or not; none unless given.
    """

    total: torch.Tensor
    nats: torch.Tensor
    counts: torch.Tensor
    noisy: tuple[torch.Tensor, torch.Tensor] | None = None
    num_noisy: torch.Tensor | None = None


class Batch(Protocol):
    """What an objective prepares from rows: it knows its sum of weights before any forward pass."""

    weight: torch.Tensor  # float32, any shape; its sum normalises the loss

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        ...


class Objective(Protocol):
    """A way to train on rows: plain next ids here, denoising in `mmpt.decode.dida`."""

    def prepare(self, rows: Rows, generators: Sequence[torch.Generator]) -> Any:
        """The `Batch` of these rows; all randomness is drawn here, of each row by its generator."""
        ...

    def losses(self, model: Decoder, batch: Any) -> Losses:
        """Run the model on a prepared batch."""
        ...


@dataclass
class NextBatch:
    """Rows, the ids (B, L) that the model is shown, and the weight (B, L) of predicting each id.

    The weight is 0 where nothing stands before an id. noise: int64 (B,), seeds of draws.
    """

    rows: Rows
    shown: torch.Tensor
    weight: torch.Tensor
    noise: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "NextBatch":
        """The same batch on another device."""
        noise = None if self.noise is None else self.noise.to(device)
        return NextBatch(self.rows.to(device), self.shown.to(device), self.weight.to(device), noise)


class NextToken:
    """The autoregressive objective: each id from those before it in its document.

    noise: the share of codes that the model is shown as another code of the rank's batch, while it
    still predicts the true ones. Like unigram noising (arXiv 1703.02573) it keeps a model that sees
    few codes many times from learning them by heart.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        z_loss: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self.weights, self.z_loss, self.noise = modality_weights(weights or {}), z_loss, noise

    def prepare(self, rows: Rows, generators: Sequence[torch.Generator]) -> NextBatch:
        """Draw the noise; rows are on the host."""
        shown, weight = self._shown(rows, generators), next_weight(rows, self.weights)
        return NextBatch(rows, shown, weight, draw_seeds(generators))

    def _shown(self, rows: Rows, generators: Sequence[torch.Generator]) -> torch.Tensor:
        if not self.noise:
            return rows.ids
        shown, size = rows.ids.clone(), (2, rows.ids.shape[1])
        drawn = [torch.rand(size, generator=generator) for generator in generators]
        chance, pick = torch.stack(drawn, 1)
        for modality in MEDIA:
            there = rows.modality == modality
            codes, chosen = rows.ids[there], there & (chance < self.noise)
            shown[chosen] = codes[(pick[chosen] * len(codes)).long()]
        return shown

    def losses(self, model: Decoder, batch: NextBatch) -> Losses:
        """One forward pass, scored where the weight is above 0."""
        rows = batch.rows
        hidden = model(
            batch.shown,
            modality=rows.modality,
            position=rows.position,
            document=rows.document,
            axes=model.axes_of(rows),
            noise=batch.noise,
        )
        return score_next(
            model,
            hidden,
            rows.ids,
            weight=batch.weight,
            modality=rows.modality,
            z_loss=self.z_loss,
        )


def draw_seeds(generators: Sequence[torch.Generator]) -> torch.Tensor | None:
    """int64 (B,): one of each generator, drawn last; None where there are none."""
    drawn = [torch.randint(1 << 62, (1,), generator=generator) for generator in generators]
    return torch.cat(drawn) if drawn else None


def next_weight(rows: Rows, weights: torch.Tensor) -> torch.Tensor:
    """The weight (B, L) of predicting each id; 0 where nothing stands before it."""
    inside = (rows.position > 0) & (rows.document >= 0)
    return torch.where(inside, rows.loss_weight * weights[rows.modality], 0.0)


def score_next(
    model: Decoder,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    *,
    weight: torch.Tensor,
    modality: torch.Tensor,
    z_loss: float = 0.0,
) -> Losses:
    """Losses of predicting each of `ids` (B, L) from what stands before it, where it has weight."""
    scored = weight[:, 1:] > 0
    return score(
        hidden[:, :-1][scored],
        head_weight(model),
        ids[:, 1:][scored],
        weights=weight[:, 1:][scored],
        modality=modality[:, 1:][scored],
        z_loss=z_loss,
    )


def score(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    *,
    weights: torch.Tensor,
    modality: torch.Tensor,
    z_loss: float = 0.0,
) -> Losses:
    """Losses of predicting `targets` (N,) from `hidden` (N, D) with the head (V, D)."""
    total, nll = cross_entropy(hidden, head, targets, weights, z_loss=z_loss)
    nats = torch.zeros(len(Modality), dtype=torch.float64, device=hidden.device)
    nats.index_add_(0, modality, nll.double())
    return Losses(total, nats, torch.bincount(modality, minlength=len(Modality)).double())


def cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of -log p (scalar, with gradient), and -log p (N,) without gradient.

    `z_loss` adds its multiple of log(Z)^2, which keeps the logits' scale from drifting.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    return _ChunkedCrossEntropy.apply(  # type: ignore[return-value] # apply is untyped
        hidden, head, targets, weights, z_loss, chunk or _chunk(len(head)), needs_gradient
    )


def _chunk(vocab_size: int) -> int:
    """Positions of a chunk: fewer where the vocabulary is large."""
    return max(1, min(CHUNK, MAX_LOGITS // vocab_size))


def head_weight(model: Decoder) -> torch.Tensor:
    """The (V, D) matrix that scores the next id."""
    return model.embedding if model.head is None else model.head


def modality_weights(weights: Mapping[str, float]) -> torch.Tensor:
    """float32 (4,): the loss weight of each modality, 1 unless given."""
    return torch.tensor([weights.get(modality.name.lower(), 1.0) for modality in Modality])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients of a chunk while its logits exist, so that they are made only once.

    Under autocast the matrix products run in its dtype; softmax and sums are float32 or better.
    """

    @staticmethod
    def forward(  # type: ignore[override] # torch's own signature is *args
        ctx, hidden_ND, head_VD, targets, weights, z_loss, chunk, needs_gradient
    ):
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        low = _product_dtype(hidden_ND)
        h_ND, w_VD = hidden_ND.to(low), head_VD.to(low)
        total = torch.zeros((), dtype=exact, device=hidden_ND.device)
        nll_N = torch.empty(len(targets), dtype=exact, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        for_head = needs_gradient and ctx.needs_input_grad[1]
        gradient_VD = torch.zeros_like(head_VD, dtype=exact) if for_head else None
        for start in range(0, len(targets), chunk):
            place = slice(start, start + chunk)
            target_C1, weight_C = targets[place, None], weights[place].to(exact)
            # in place from here on: memory traffic costs more than the products
            x_CV = (h_ND[place] @ w_VD.T).to(exact)
            top_C1 = x_CV.amax(-1, keepdim=True)
            target_x_C = x_CV.gather(1, target_C1)[:, 0]
            sum_C = x_CV.sub_(top_C1).exp_().sum(-1)
            log_z_C = sum_C.log() + top_C1[:, 0]
            nll_N[place] = log_z_C - target_x_C
            total += (weight_C * (nll_N[place] + z_loss * log_z_C**2)).sum()
            if gradient_ND is None:
                continue
            # d/dlogits of w (log Z - x_t + z log^2 Z) = w ((1 + 2 z log Z) softmax - onehot)
            x_CV *= (weight_C * (1 + 2 * z_loss * log_z_C) / sum_C)[:, None]
            slope_CV = x_CV.scatter_add_(1, target_C1, -weight_C[:, None]).to(low)
            gradient_ND[place] = slope_CV @ w_VD
            if gradient_VD is not None:
                gradient_VD += slope_CV.T @ h_ND[place]
        ctx.save_for_backward(gradient_ND, gradient_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(nll_N)
        return total, nll_N

    @staticmethod
    def backward(ctx, gradient, _):  # type: ignore[override] # torch's own signature is *args
        gradient_ND, gradient_VD = ctx.saved_tensors
        if gradient_VD is not None:
            gradient_VD = (gradient_VD * gradient).to(ctx.head_dtype)
        return gradient_ND * gradient, gradient_VD, None, None, None, None, None


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
