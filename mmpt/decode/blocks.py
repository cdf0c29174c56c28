"""Blocks of codes or text behind prompts: denoised over a prefix that is only read, then committed.

Legend: B samples, N codes of a block, V candidates, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.decode.noise import Alphabet
from mmpt.decode.passes import Denoising, refine
from mmpt.decode.prefix import Prefix, Prompts
from mmpt.decode.samplers import SAMPLERS
from mmpt.decode.sampling import Sampling
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality, Vocabulary


class Blocks:
    """Writes one block of each sample after another; blocks of a batch may differ in size."""

    def __init__(
        self,
        model: Decoder,
        vocabulary: Vocabulary,
        prompts: Prompts,
        *,
        modality: Modality,
        denoising: Denoising,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        unconditional: Prompts | None,
    ) -> None:
        name, groups = modality.name.lower(), model.config.groups.values()
        if not any(group.noisy and name in group.modalities for group in groups):
            raise UserError(
                f"this model has no noisy group for {name}: it was never adapted to denoise it; "
                "run mmpt adapt, or use decoder='ar'"
            )
        self.alphabet = Alphabet.of(model, vocabulary, modality)
        self.sampler = SAMPLERS[denoising.sampler](denoising, self.alphabet.path)
        self.prefix = Prefix(model, vocabulary, prompts, unconditional, sampling)
        self.nfe = 0  # forward passes so far, but for the prompts
        self.sampling = sampling
        self._modality, self._denoising, self._generators = modality, denoising, generators
        self._longest = model.config.noise.max_block
        self._sizes: list[int] = []
        self._ids = torch.zeros(0, dtype=torch.int64)  # (B, N)

    @property
    def codes(self) -> list[np.ndarray]:
        """Of each sample the ids of its block as far as they are; guesses where it is masked."""
        rows = self._ids.cpu().numpy()
        return [ids[:size] for ids, size in zip(rows, self._sizes, strict=True)]

    def write(self, given: list[np.ndarray], widths: list[int]) -> Iterator[list[int]]:
        """Denoise the next block; yields, behind each pass, how many codes of each sample stay.

        given: of each sample as many ids as its block has, -1 where codes are drawn; a sample of
        none takes no part. widths: codes in a row of each block.
        """
        self._sizes, device = [len(ids) for ids in given], self.prefix.device
        longest = max(self._sizes)
        if self._longest and longest > self._longest:
            raise UserError(
                f"a block of {longest} codes, but the model was adapted to at most "
                f"{self._longest}; ask for less, or adapt it to longer blocks"
            )
        held = torch.full((len(given), longest), -1)
        for row, ids in zip(held, given, strict=True):
            row[: len(ids)] = torch.from_numpy(ids)
        inside = torch.arange(longest) < torch.tensor(self._sizes)[:, None]
        held, inside = held.to(device), inside.to(device)
        free, self._ids = (held < 0) & inside, held.clamp(min=0)
        book_V = self.alphabet.book_V
        book = torch.arange(longest, device=device) % (int(book_V[-1]) + 1)
        elsewhere = book_V != book[:, None] if book_V[-1] > 0 else None

        def look(
            index: torch.Tensor, time: torch.Tensor, live: torch.Tensor
        ) -> Iterator[tuple[slice, torch.Tensor]]:
            scale = self._denoising.guidance_at(time, self.sampling.guidance)
            scale = torch.where(live, scale, 1.0)
            self.nfe += 1 + self.prefix.needs_both(scale)
            for places, scores in self.prefix.block_pieces(
                torch.where(free, self.alphabet.shown[index], self._ids),
                self._modality,
                self.alphabet.ids_V,
                time=time,
                scale=scale,
                sizes=torch.where(live, inside.sum(1), 0),
            ):
                if elsewhere is not None:
                    scores = scores.masked_fill(elsewhere[places], -torch.inf)
                yield places, scores

        for passed in refine(
            self.sampler,
            self.sampling,
            book=book,
            free=free,
            width=torch.tensor(widths, device=device),
            look=look,
            draws=lambda count, live: self.draws(count, live, self._sizes),
        ):
            self._ids = torch.where(free, self.alphabet.ids_V[passed.index], self._ids)
            yield (inside & (passed.settled | ~free)).sum(1).tolist()

    def commit(self) -> torch.Tensor:
        """Put the block into the caches of both branches; its hidden states (rows, N, D)."""
        sizes = torch.tensor(self._sizes, device=self.prefix.device)
        place = torch.arange(self._ids.shape[1], device=self.prefix.device)
        self.nfe += 1 + self.prefix.guided
        modality = torch.full_like(self._ids, self._modality)
        return self.prefix.append(self._ids, modality, place < sizes[:, None])

    def draws(self, count: int, live: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """float64 (count, B, longest of sizes) in [0, 1), drawn by samples that are live only."""
        where = self._generators[0].device
        out = torch.zeros(
            count, len(sizes), max(sizes), dtype=torch.float64, device=where
        )  # pads stay 0
        for row, (generator, on) in enumerate(zip(self._generators, live.tolist(), strict=True)):
            if on:
                drawn = torch.rand(
                    count, sizes[row], generator=generator, dtype=torch.float64, device=where
                )
                out[:, row, : sizes[row]] = drawn
        return out.to(self.prefix.device)


def check_counts(num_prompts: int, **what: Sequence[Any] | None) -> None:
    """Refuse lists that have not one entry for each prompt."""
    for name, values in what.items():
        if values is not None and len(values) != num_prompts:
            raise UserError(f"{num_prompts} prompts need as many of {name}, not {len(values)}")


def join(written: list[np.ndarray], more: list[np.ndarray]) -> list[np.ndarray]:
    """Of each sample, the one behind the other."""
    return [np.concatenate(pair) for pair in zip(written, more, strict=True)]
