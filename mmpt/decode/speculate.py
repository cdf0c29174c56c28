"""Exact self-speculation: an adapted model drafts codes ahead of itself, and checks them.

A pass is over the last code and the drafts behind it, as clean ids, and over a noisy block in the
same place. The clean outputs p are those of autoregressive decoding: the pass accepts each draft
with probability min(1, p / q), and draws the first rejected one again, from the positive part of
p - q (arXiv 2211.17192, 2302.01318); behind accepted ones it draws one more. The noisy outputs q
are what the next pass checks drafts of: they do not know the newest codes, which costs little, and
saves a pass of their own. Whatever q is, codes have the distribution of `generate_block`: noise and
discarded drafts are independent of them, so both are drawn once for each place.

Legend: B samples, C drafts, N codes of the noisy block, V candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mmpt.config import UserError
from mmpt.decode.ar import Prefix, Prompts, check_open
from mmpt.decode.noise import Alphabet
from mmpt.decode.sampling import Grammar, Sampling, draw, uniforms
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality, Vocabulary


class Speculated(NamedTuple):
    """Of each sample: its codes as ids int64 (length,), and counts, int64 (samples,)."""

    codes: list[np.ndarray]
    num_passes: np.ndarray  # that it took part in, the prompt's own not counted
    num_checked: np.ndarray  # drafts that were accepted or rejected, not those behind
    num_accepted: np.ndarray


@torch.inference_mode()
def speculate_block(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    modality: Modality,
    length: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    unconditional: Prompts | None = None,
    window: int = 8,
) -> Speculated:
    """The next `length` codes of the span that each prompt has open, as `generate_block` draws.

    window: drafts that a pass checks at most. Raises UserError where the model was not adapted.
    """
    if window < 1:
        raise UserError(f"window = {window}; check at least 1 draft in a pass")
    grammars = check_open(vocabulary, [*prompts, *(unconditional or ())], modality, length)
    prefix = Checking(model, vocabulary, prompts, unconditional, sampling)
    block = _Block(
        prefix,
        Alphabet.of(model, vocabulary, modality),
        sampling,
        modality=modality,
        places=torch.tensor([g.place for g in grammars[: len(prompts)]], device=prefix.device),
        uniform=uniforms(generators, 4 * length, prefix.device).unflatten(1, (4, length)),
    )
    while block.check(window):
        block.draft(window)
    return block.result()


class Checking(Prefix):
    """Prompts and codes in one cache, all but the last id of each, which every pass computes."""

    def __init__(
        self,
        model: Decoder,
        vocabulary: Vocabulary,
        prompts: Prompts,
        unconditional: Prompts | None,
        sampling: Sampling,
    ) -> None:
        free = None if unconditional is None else [ids[:-1] for ids in unconditional]
        super().__init__(model, vocabulary, [ids[:-1] for ids in prompts], free, sampling)
        rows = [*prompts, *((unconditional or ()) if self.guided else ())]
        media = [Grammar(vocabulary).read(ids)[-1] for ids in rows]
        self.last = torch.tensor([int(ids[-1]) for ids in rows], device=self.device)
        self._medium = torch.tensor(media, device=self.device)  # of the last id
        for axes, ids in zip(self._axes, rows, strict=False):  # no axes: nothing to follow
            axes.push(int(ids[-1]))

    def look(
        self,
        drafts: torch.Tensor,
        num_drafts: torch.Tensor,
        noise: torch.Tensor,
        num_noisy: torch.Tensor,
        modality: Modality,
    ) -> torch.Tensor:
        """Hidden states (rows, 1 + C + 1 + N, D): last id, drafts (B, C), slot, noise (B, N).

        num_drafts, num_noisy: (B,), how many of a row count; -1: not even its last id does. All
        are in the cache until `keep` says which stay.
        """
        if self.guided:
            parts = (drafts, num_drafts, noise, num_noisy)
            drafts, num_drafts, noise, num_noisy = (torch.cat((part, part)) for part in parts)
        sizes = 1 + drafts.shape[1], 1 + noise.shape[1]
        place = torch.cat([torch.arange(size, device=self.device) for size in sizes])
        noisy = torch.arange(len(place), device=self.device) >= sizes[0]
        last, start = self.last[:, None], self.length[:, None]
        ids = torch.cat((last, drafts, last, noise), dim=1)
        known = place <= torch.where(noisy, num_noisy[:, None], num_drafts[:, None])
        media = torch.full_like(ids, modality)
        media[:, 0] = self._medium
        return self.model(
            ids,
            modality=media,
            position=start + place,
            document=known.long() - 1,
            block=(noisy.long() - 1).expand_as(ids),
            limit=torch.where(noisy, start, start + place),
            axes=self._places(known, sizes),
            time=(~noisy).double().expand_as(ids),
            cache=self.cache,
        )

    def keep(self, ids: torch.Tensor, count: torch.Tensor, width: int, modality: Modality) -> None:
        """Go on behind the first `count` (B,) of new ids (B, n), of `width` that were looked at.

        All but the last of them were drafts; with the last id before them they stay in the cache.
        """
        if self.guided:
            ids, count = torch.cat((ids, ids)), torch.cat((count, count))
        self.cache.retract(torch.arange(width, device=self.device) < count[:, None])
        self.length = self.length + count
        newest = ids.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
        self.last = torch.where(count > 0, newest, self.last)
        self._medium = self._medium.masked_fill(count > 0, modality)
        if self._axes:
            for axes, row, number in zip(self._axes, ids.tolist(), count.tolist(), strict=True):
                for token in row[:number]:
                    axes.push(token)

    def _places(self, known: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        if not self._axes:
            return None
        places = torch.zeros(*known.shape, 3, dtype=torch.int64)
        first = 0
        for size in sizes:
            part = known[:, first : first + size].sum(1).tolist()
            for row, (axes, number) in enumerate(zip(self._axes, part, strict=True)):
                if number:
                    stand = torch.tensor([axes.last, *axes.ahead(number - 1)])
                    places[row, first : first + number] = stand
            first += size
        return places.to(self.device)


class _Block:
    """The codes of a block that is being written, and the drafts of those that come next."""

    def __init__(
        self,
        prefix: Checking,
        alphabet: Alphabet,
        sampling: Sampling,
        *,
        modality: Modality,
        places: torch.Tensor,
        uniform: torch.Tensor,
    ) -> None:
        """places: (B,), codes of the span before these. uniform: (B, 4, length)."""
        self._prefix, self._sampling, self._modality = prefix, sampling, modality
        self._ids_V, self._book_V = alphabet.ids_V, alphabet.book_V
        noise, self._to_draft, self._to_accept, self._to_choose = uniform.unbind(1)
        self._length, num_books = noise.shape[1], int(alphabet.book_V[-1]) + 1
        steps = torch.arange(self._length, device=noise.device)
        self._book = (places[:, None] + steps) % num_books  # (B, length)
        self._noise = alphabet.shown[alphabet.path.begin(self._book, noise)]
        self._index = torch.zeros_like(self._book)  # of codes
        self._done = torch.zeros_like(places)
        self._drafts = self._index[:, :0]
        self._q = noise.new_zeros(len(noise), 0, len(self._ids_V))
        self._counts = torch.zeros(3, len(places), dtype=torch.int64, device=noise.device)
        self._behind = noise.new_zeros(0)  # hidden states that the next drafts may come from

    def check(self, window: int) -> bool:
        """One pass, in which each sample gains the drafts that it accepts and one code more.

        False: all are done.
        """
        rest, num_drafts = self._length - self._done, self._drafts.shape[1]
        count = (rest - 1).clamp(max=num_drafts)  # -1 where a sample is done
        width = torch.where(rest > 0, rest.clamp(max=2 * window), -1)  # as far as drafts may be
        hidden = self._prefix.look(
            self._ids_V[self._drafts],
            count,
            self._ahead(self._noise, int(width.max())),
            width,
            self._modality,
        )
        p = self._probabilities(hidden[:, : 1 + num_drafts])
        accepted, choice = self._judge(p, count)
        new = torch.where(rest > 0, accepted + 1, 0)
        column = torch.arange(1 + num_drafts, device=rest.device)
        ids = F.pad(self._drafts, (0, 1)).scatter(1, accepted[:, None], choice[:, None])
        row, at = (column < new[:, None]).nonzero().unbind(1)
        self._index[row, self._done[row] + at] = ids[row, at]
        self._prefix.keep(self._ids_V[ids], new, hidden.shape[1], self._modality)
        self._done = self._done + new
        self._behind = self._after(hidden[:, 1 + num_drafts :], new, window)
        checked = torch.minimum(accepted + 1, count.clamp(min=0))
        self._counts += torch.stack((rest > 0, checked, accepted))
        return bool((self._done < self._length).any())

    def draft(self, window: int) -> None:
        """Draw the codes that the next pass checks."""
        self._q = self._probabilities(self._behind)
        self._drafts = draw(self._q, self._ahead(self._to_draft, window))

    def result(self) -> Speculated:
        codes = self._ids_V[self._index].cpu().numpy()
        return Speculated(list(codes), *self._counts.cpu().numpy())

    def _judge(self, p: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many drafts are accepted (B,), of at most `count`, and the code behind them (B,)."""
        column = torch.arange(p.shape[1], device=p.device)
        meant = column < count[:, None]
        q = F.pad(self._q, (0, 0, 0, 1)) * meant[..., None]  # 0 behind the drafts: p is left
        chance = [x[:, :-1].gather(-1, self._drafts[..., None])[..., 0] for x in (q, p)]
        passes = self._ahead(self._to_accept, p.shape[1] - 1) * chance[0] < chance[1]
        number = (passes & meant[:, :-1]).long().cumprod(1).sum(1)
        row = torch.arange(len(p), device=p.device)
        left = (p - q)[row, number].clamp(min=0)
        return number, draw(left, self._ahead(self._to_choose, p.shape[1])[row, number])

    def _after(self, hidden: torch.Tensor, new: torch.Tensor, window: int) -> torch.Tensor:
        """Of hidden states (rows, 1 + N, D) of a slot and noise: (rows, window, D) behind `new`."""
        if len(hidden) > len(new):
            new = torch.cat((new, new))
        at = new[:, None] + torch.arange(window, device=new.device)
        at = at.clamp(max=hidden.shape[1] - 1)
        return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))

    def _probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """float64 (B, n, V): the next codes', of hidden states (rows, n, D) before them."""
        scores = self._prefix.scores(self._ids_V, hidden)
        other = self._ahead(self._book, hidden.shape[1])[..., None] != self._book_V
        return self._sampling.probabilities(scores.masked_fill(other, -torch.inf))

    def _ahead(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """The next `count` of values (B, length) of each sample; the last one again behind them."""
        at = self._done[:, None] + torch.arange(count, device=values.device)
        return values.gather(1, at.clamp(max=self._length - 1))
