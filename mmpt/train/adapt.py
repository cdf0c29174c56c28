"""Adaptation to parallel decoding (DiDA): a trained model learns to denoise whole media blocks.

The model grows experts for noisy ids as copies of its own, and only what noisy ids alone use is
trained, so its autoregressive pass stays bit-equal. With `autoregressive` in the recipe all weights
are trained, and clean ids are predicted in the same pass. The loop is that of pretraining, with
another objective.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.data.layout import speech_span
from mmpt.data.tokens import open_shards
from mmpt.decode.dida import JointRows, corrupt, denoising_loss, joint_forward
from mmpt.decode.noise import Alphabet, denoised_media
from mmpt.model.config import NoiseConfig
from mmpt.model.transformer import Decoder
from mmpt.model.weights import read_tensors
from mmpt.stream import Rows
from mmpt.train.checkpoint import begun_with, checkpoints_of, find_model
from mmpt.train.distill import with_samples
from mmpt.train.loop import Trainer
from mmpt.train.loss import Losses, draw_seeds, modality_weights, next_weight, score_next
from mmpt.train.metrics import Metrics
from mmpt.train.recipe import AdaptRecipe, load_run_recipe
from mmpt.train.result import TrainResult
from mmpt.vocab import Modality, Vocabulary

MAX_LOOKED_AT = 256  # blocks of documents of a source, for the longest of what is denoised


def adapt_command(recipe: Path, overrides: Sequence[str] = (), *, out: Path) -> dict[str, Any]:
    """Adapt a trained model to parallel decoding; the same command goes on after an interruption.

    The recipe's `start` names a model folder or a training run. Overrides are key=value.
    """
    resolved, vocabulary = load_run_recipe(AdaptRecipe, recipe, overrides)
    return adapt(resolved, out, vocabulary=vocabulary).to_json()


def adapt(
    recipe: AdaptRecipe,
    run: str | Path,
    *,
    vocabulary: Vocabulary,
    progress: bool = True,
    on_step: Callable[[Metrics], None] | None = None,
) -> TrainResult:
    """Adapt the model at `recipe.start`, or go on with the run in the folder `run`."""
    trainer = adapter(recipe, run, vocabulary=vocabulary)
    return trainer.run(progress=progress, on_step=on_step)


def adapter(recipe: AdaptRecipe, run: str | Path, *, vocabulary: Vocabulary) -> Trainer:
    """What `adapt` runs."""
    vocabulary = begun_with(checkpoints_of(run), vocabulary)
    start = find_model(recipe.start)
    recipe = with_samples(recipe, run, start, vocabulary)
    noise = replace(recipe.noise, max_block=longest_block(recipe, vocabulary))

    def build() -> Decoder:
        model = Decoder.load(start, vocabulary=vocabulary)
        model.add_noisy_groups(
            seed=recipe.seed,
            router=recipe.router,
            capacity_slope=recipe.capacity_slope,
            noise=noise,
        )
        if not recipe.autoregressive:
            model.freeze_for_adaptation()
        return model

    objective = Denoise(
        vocabulary,
        recipe.loss_weights,
        max_noisy=recipe.max_noisy,
        copies=recipe.copies,
        noise=noise,
        vectors=read_tensors(start)["embedding"] if noise.path == "metric" else None,
        autoregressive=recipe.autoregressive,
    )
    return Trainer(
        recipe, run, build=build, vocabulary=vocabulary, objective=objective, start=start
    )


def longest_block(recipe: AdaptRecipe, vocabulary: Vocabulary) -> int:
    """Ids of the longest block that training denoises, 0 without any; UserError if none fits.

    Of large sources every so many documents are looked at, of live ones none.
    """
    most = min(recipe.max_noisy, recipe.data.length) - 1
    sizes = [recipe.noise.text_block] if recipe.noise.text_block else []
    for source in recipe.data.sources.values():
        if source.pipeline:
            sizes.append(most)
            continue
        blocks = [b for shard in open_shards(source.shards, vocabulary) for b in shard.blocks]
        for block in blocks[:: 1 + len(blocks) // MAX_LOOKED_AT]:
            _, modality, _, length, _, height, width = block.arrays["spans"].T
            speech, visual = modality == Modality.SPEECH, modality != Modality.TEXT
            if speech.any():
                length = length[speech].clip(max=speech_span(vocabulary))
                sizes += np.unique(length).tolist()
            sizes += np.unique((height * width)[visual & ~speech]).tolist()
    if sizes and min(sizes) > most:
        raise UserError(
            f"no block to denoise fits max_noisy = {recipe.max_noisy} and data.length = "
            f"{recipe.data.length}, which leave {most} ids beside a slot; the shortest has "
            f"{min(sizes)}"
        )
    return max((size for size in sizes if size <= most), default=0)


@dataclass
class NoisyBatch:
    """The joint layout of clean ids and noisy blocks, and the weight of predicting each id there.

    A clean id is predicted from those before it, the clean code of a noisy one from its block.
    """

    joint: JointRows
    weight: torch.Tensor
    noise: torch.Tensor | None = None  # int64 (B,), seeds of what routers draw

    def to(self, device: torch.device | str) -> "NoisyBatch":
        """The same batch on another device."""
        noise = None if self.noise is None else self.noise.to(device)
        return NoisyBatch(self.joint.to(device), self.weight.to(device), noise)


class Denoise:
    """The objective of adaptation: the clean codes of noisy blocks.

    copies: of each block, see `corrupt`. noise: the mixture path of media unless given. vectors:
    (vocabulary, D) of all ids, which the metric path measures distances of. autoregressive: the
    weight of predicting clean ids, in the same pass; 0: they are not.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        weights: Mapping[str, float] | None = None,
        *,
        max_noisy: int,
        copies: int = 1,
        noise: NoiseConfig | None = None,
        vectors: torch.Tensor | None = None,
        autoregressive: float = 0.0,
    ) -> None:
        self.vocabulary, self.max_noisy, self.copies = vocabulary, max_noisy, copies
        self.noise = noise or NoiseConfig()
        self.alphabets = {
            modality: Alphabet.over(vocabulary, modality, self.noise, vectors)
            for modality in denoised_media(vocabulary, self.noise)
        }
        self.weights, self.autoregressive = modality_weights(weights or {}), autoregressive

    def prepare(self, rows: Rows, generators: Sequence[torch.Generator]) -> NoisyBatch:
        """Choose and corrupt blocks."""
        joint = corrupt(
            rows,
            self.vocabulary,
            generators=generators,
            max_noisy=self.max_noisy,
            copies=self.copies,
            noise=self.noise,
            alphabets=self.alphabets,
        )
        weight = joint.loss_weight * self.weights[joint.modality]
        weight = torch.where(joint.labels >= 0, weight, 0.0)
        if self.autoregressive:
            clean = self.autoregressive * next_weight(rows, self.weights)
            weight[:, : joint.num_clean] = clean
        return NoisyBatch(joint, weight, draw_seeds(generators))

    def losses(self, model: Decoder, batch: NoisyBatch) -> Losses:
        """One joint pass, scored on the noisy positions, and on the clean ones if asked to."""
        joint = batch.joint
        hidden = joint_forward(model, joint, noise=batch.noise)
        total = hidden[:, :0].sum()  # where there is no block, too, gradients are zero
        nats, counts = torch.zeros(2, len(Modality), dtype=torch.float64, device=hidden.device)
        for modality, loss in denoising_loss(model, self.vocabulary, joint, hidden).items():
            total = total + self.weights[modality].to(hidden.device) * loss.nats
            nats[modality], counts[modality] = loss.nats.detach(), loss.weight
        length = joint.num_clean
        there = joint.modality[:, length:][joint.document[:, length:] >= 0]
        num_noisy = torch.bincount(there, minlength=len(Modality)).double()
        if not self.autoregressive:
            return Losses(total, nats, counts, num_noisy=num_noisy)
        clean = score_next(
            model,
            hidden[:, :length],
            joint.ids[:, :length],
            weight=batch.weight[:, :length],
            modality=joint.modality[:, :length],
        )
        noisy = nats, counts
        return Losses(total + clean.total, clean.nats, clean.counts, noisy, num_noisy)
