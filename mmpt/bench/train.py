"""`mmpt bench train`: a training step beside the machine's peak, OLMoE, and itself unwatched.

Ours is always `Trainer.step`, with its reading, judging and counting. Both models have the weights
of ours and read the same rows, one document each; their losses and gradients are compared where
they compute the same (see `olmoe`), and lie close where they do not.
"""

import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpt import hub
from mmpt.bench.data import bench_vocabulary, token_config
from mmpt.bench.harness import PARTS, REPETITIONS, Row, compare, run_rows
from mmpt.bench.olmoe import BareLoop, equal_shape, olmoe, same_size, shape
from mmpt.config import load_recipe
from mmpt.data.loader import DataConfig, Loader, SourceConfig
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows, Segment
from mmpt.train.guard import GuardConfig
from mmpt.train.loop import Trainer
from mmpt.train.optim import OptimConfig
from mmpt.train.parallel import clip_gradients
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe, fit_model
from mmpt.train.watching import Watching
from mmpt.vocab import Modality, Vocabulary

log = logging.getLogger(__name__)

Precision = str  # fp32 or bf16
PRECISIONS = ("fp32", "bf16")
# 9.5M weights, 5.5M of them active
OLMOE = shape(
    experts=16, active=4, width=256, num_layers=4, num_heads=4, num_kv_heads=4, expert_hidden=128
)
ROWS, LENGTH, VOCABULARY = 4, 256, 4096
BATCHES = 8
TINY = ["model.vocab_size=1"]  # in the tiny recipe; the vocabulary says how many
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product is the peak
CLOSE = 0.02  # of the loss; what gates and QK-norms may change at the first weights
EXACT = 1e-5  # of loss and gradient
WIDE = {"width": 2048, "num_layers": 12, "num_heads": 16, "num_kv_heads": 4}
# at the width of a model of 1.4B weights: one expert, or as many active ones of 16 in its place
LARGE = {
    "2048 wide, dense": shape(experts=1, active=1, expert_hidden=5632, **WIDE),
    "2048 wide, 4 of 16 experts": shape(experts=16, active=4, expert_hidden=1408, **WIDE),
}
LARGE_ROWS = 8, 2048
MAX_BLOCKING = 10.0  # % of a step
MAX_CHECKPOINTS = 2.0  # % of the throughput
EVERY = 50  # steps to a checkpoint
BLOCK = 5  # steps that are timed with one; it must be written by then
# what never changes the weights much, so that the experts' loads stay alike on both sides
STILL = OptimConfig(lr=1e-6, warmup=0, schedule="constant")


def train(device: str) -> list[Row]:
    """All rows, on a device."""
    with tempfile.TemporaryDirectory() as folder:
        return run_rows(_rows(Path(folder), device))


def _rows(folder: Path, device: str) -> Iterator[Row]:
    for precision in PRECISIONS:
        yield from _olmoe_rows(folder / f"olmoe-{precision}", device, precision)
    with closing(tiny_trainer(folder / "tiny", device)) as trainer:
        yield _peak_row("step of the tiny recipe", trainer)
        yield _watching_row(trainer)
        yield from _checkpoint_rows(trainer)
    if device.startswith("cuda"):
        yield from _large_rows(folder, device)


# what is trained


def plain_trainer(
    folder: Path, device: str, precision: Precision, model: ModelConfig, rows: int, length: int
) -> Trainer:
    """One that reads rows of one document each, of random ids."""
    vocabulary = Vocabulary.build(num_text=0, text_fingerprint="text", codebooks=[])
    vocabulary = replace(vocabulary, num_text=VOCABULARY - len(vocabulary))
    recipe = TrainRecipe(
        model=fit_model(model, vocabulary),
        data=replace(
            _whole_rows(folder.with_suffix(".tokens.tar"), vocabulary, length),
            rows=rows,
            length=length,
            packing="none",
        ),
        steps=10**6,
        optim=STILL,
        precision=precision,  # type: ignore[arg-type] # one of the two
        guard=GuardConfig(sigmas=0),  # a skipped step would be a short one
        device=device,
    )
    return pretrainer(recipe, folder, vocabulary=vocabulary)


def _whole_rows(shard: Path, vocabulary: Vocabulary, length: int) -> DataConfig:
    shard.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with ShardWriter(shard, vocabulary, separator=np.array([10])) as writer:
        for number in range(64):
            text = rng.integers(0, vocabulary.num_text, length - 2)  # begin and end come to it
            segments = [Segment(Modality.TEXT, text)]
            writer.add(EncodedDocument(f"{number}", f"{number}", "any", segments))
        writer.finish()
    return DataConfig(sources={"bench": SourceConfig(shards=(str(shard),))}, condition_drop=0.0)


def tiny_trainer(folder: Path, device: str) -> Trainer:
    """The tiny recipe's, on random ids as long as the sampler's documents."""
    folder.mkdir(parents=True)
    vocabulary = bench_vocabulary()
    tiny = hub.shipped("recipes") / "tiny.toml"
    recipe = load_recipe(TrainRecipe, tiny, TINY)
    recipe = replace(
        recipe,
        data=replace(
            token_config(folder / "tokens", vocabulary),
            rows=recipe.data.rows,
            length=recipe.data.length,
        ),
        model=fit_model(recipe.model, vocabulary),
        optim=STILL,
        steps=10**6,
        guard=GuardConfig(sigmas=0),
        codes_from=(),
        vocabulary="",
        device=device,
    )
    return pretrainer(recipe, folder / "run", vocabulary=vocabulary)


def next_rows(trainer: Trainer, number: int = BATCHES) -> list[Rows]:
    """What the trainer reads first, of another loader."""
    recipe = trainer.recipe
    with closing(Loader(recipe.data, trainer.vocabulary, seed=recipe.seed)) as loader:
        return [rows.to(trainer.device) for rows in islice(loader, number)]


def flops_of_step(model: Decoder, batches: Sequence[Rows]) -> tuple[float, float]:
    """(FLOPs of a step, ids of a step): the mean over batches, pads left out.

    Attention counts the ids that a causal one sees within a document.
    """
    flops = ids = 0
    for rows in batches:
        there = rows.document >= 0
        for modality in Modality:
            mine = there & (rows.modality == modality)
            if num := int(mine.sum()):
                context = round(float((rows.position[mine] + 1).double().mean()))
                flops += 3 * num * model.flops_per_token(modality, context=context)
        ids += int(there.sum())
    return flops / len(batches), ids / len(batches)


# beside the peak


def _peak_row(case: str, trainer: Trainer) -> Row:
    """ids/s, and what they would be if all FLOPs ran as fast as one large matrix product."""
    flops, ids = flops_of_step(trainer.model, next_rows(trainer))
    device, precision = trainer.device.type, trainer.recipe.precision
    side = SIDE[device]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    result = compare(trainer.step, lambda: left @ right, device=device)
    scale = flops / (2 * side**3)  # matrix products in a step
    return _row(
        f"{case}, {flops / result.ours / 1e9:,.0f} GFLOP/s",
        trainer,
        "ids/s",
        (ids / result.ours, ids / (result.peer * scale)),
        "peak",
        (result.ratio * scale, result.low * scale, result.high * scale),
    )


# beside OLMoE


def _olmoe_rows(folder: Path, device: str, precision: Precision) -> Iterator[Row]:
    show_equal(folder / "equal", device)
    sizes = OLMOE, ROWS, LENGTH
    with closing(plain_trainer(folder / "run", device, precision, *sizes)) as trainer:
        batches = next_rows(trainer)
        assert all(bool((rows.position[:, -1] == LENGTH - 1).all()) for rows in batches)
        peer = BareLoop(trainer, [rows.ids for rows in batches])
        show_close(trainer, batches[0])
        result = compare(trainer.step, peer.step, device=trainer.device.type)
        ids = ROWS * LENGTH
        yield _row(
            f"step of {trainer.model.num_parameters / 1e6:.1f}M weights, shape of OLMoE",
            trainer,
            "ids/s",
            (ids / result.ours, ids / result.peer),
            f"transformers OLMoE, {peer.setting}",
            (result.ratio, result.low, result.high),
        )
        yield _peak_row("step, shape of OLMoE", trainer)


def show_equal(folder: Path, device: str) -> None:
    """Losses and gradients are those of the peer where both compute the same."""
    model = equal_shape(OLMOE)
    with closing(plain_trainer(folder, device, "fp32", model, ROWS, LENGTH)) as trainer:
        ours, rows = trainer.model, next_rows(trainer, 1)[0]
        for layer in ours.layers:
            torch.nn.init.zeros_(layer.experts.groups["all"].router)  # type: ignore[index,union-attr]
        peer = olmoe(ours)
        losses = loss_of(trainer, rows), loss_of_peer(peer, rows)
        _show_near("loss", losses[0], losses[1])
        weights = ours.embedding, peer.model.embed_tokens.weight
        gradients = [torch.autograd.grad(*pair)[0] for pair in zip(losses, weights, strict=True)]
        _show_near("gradient of the embedding", gradients[0], gradients[1])


def show_close(trainer: Trainer, rows: Rows) -> float:
    """As many weights, and near losses where gates and QK-norms differ; by how much they do."""
    peer = olmoe(trainer.model)
    if not same_size(trainer.model, peer):
        raise RuntimeError("the models differ in size")
    with torch.no_grad():
        return _show_near("loss", loss_of(trainer, rows), loss_of_peer(peer, rows), CLOSE)


def _show_near(what: str, ours: Tensor, peer: Tensor, tolerance: float = EXACT) -> float:
    apart = float(((ours - peer).norm() / peer.norm()).detach())
    if apart > tolerance:
        raise RuntimeError(f"the {what} differs: {ours.norm():.7g}, the peer's {peer.norm():.7g}")
    return apart


def loss_of(trainer: Trainer, rows: Rows) -> Tensor:
    """The mean loss of ours."""
    batch = trainer.objective.prepare(rows, ())
    return trainer.objective.losses(trainer.model, batch).total / batch.weight.sum()


def loss_of_peer(peer: Any, rows: Rows) -> Tensor:
    """The same without what balances the experts."""
    return peer(input_ids=rows.ids, labels=rows.ids).loss


# beside itself


def _watching_row(trainer: Trainer) -> Row:
    """A step with all that is judged, counted and written, beside its gradients and update."""
    with trainer.watching as watching:
        watched = partial(_watched, trainer, watching)
        result = compare(watched, partial(_bare, trainer), device=trainer.device.type)
    return _row(
        "step with its watching, tiny recipe",
        trainer,
        "ms",
        (result.ours * 1e3, result.peer * 1e3),
        "the same unwatched",
        (result.ratio, result.low, result.high),
    )


def _watched(trainer: Trainer, watching: Watching) -> None:
    watching.before(trainer.counters.step + 1)
    watching.after(trainer.step(), trainer.model)


def _bare(trainer: Trainer) -> None:
    recipe, model = trainer.recipe, trainer.model
    rows = next(trainer.loader)
    batch = trainer.objective.prepare(rows, [torch.Generator() for _ in rows.ids])
    batch = batch.to(trainer.device)
    with torch.autocast(
        trainer.device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"
    ):
        total = trainer.objective.losses(model, batch).total
    (total / batch.weight.sum()).backward()
    clip_gradients(model.parameters(), recipe.optim.clip)
    trainer.optimizer.step()
    model.update_balance()
    trainer.optimizer.zero_grad()


# beside itself without checkpoints


def _checkpoint_rows(trainer: Trainer) -> Iterator[Row]:
    trainer.step()  # so that the optimiser has what it keeps
    steps, begins = [], []
    for _ in range(REPETITIONS):
        steps.append(trainer.step()["step_seconds"])
        began = time.perf_counter()
        trainer._begin_save()
        begins.append(time.perf_counter() - began)
        trainer.saved.wait()
    parts = [100 * min(begins[i::PARTS]) / min(steps[i::PARTS]) for i in range(PARTS)]
    share = 100 * min(begins) / min(steps)
    yield _limit_row("a checkpoint blocks, tiny recipe", trainer, share, MAX_BLOCKING, parts)
    blocks = (partial(_block, trainer, save=save) for save in (True, False))
    result = compare(*blocks, device=trainer.device.type)
    share, *parts = (
        100 * (1 / ratio - 1) * BLOCK / EVERY for ratio in (result.ratio, result.low, result.high)
    )
    case = f"a checkpoint every {EVERY} steps, tiny recipe"
    yield _limit_row(case, trainer, share, MAX_CHECKPOINTS, parts)


def _block(trainer: Trainer, *, save: bool) -> None:
    if save:
        trainer._begin_save()
    for _ in range(BLOCK):
        trainer.step()
    trainer.saved.wait()


# at the width of a large model


def _large_rows(folder: Path, device: str) -> Iterator[Row]:
    for name, model in LARGE.items():
        if not _fits(model):
            log.warning("%s: left out, for the GPU has too little memory free", name)
            continue
        with closing(plain_trainer(folder / name, device, "bf16", model, *LARGE_ROWS)) as trainer:
            yield _peak_row(f"step, {name}", trainer)
        torch.cuda.empty_cache()


def _fits(model: ModelConfig) -> bool:
    """Weights, gradients and moments in float32, and about what a layer keeps of each id."""
    with torch.device("meta"):
        weights = Decoder(replace(model, vocab_size=VOCABULARY)).num_parameters
    active = model.groups["all"].num_active * model.expert_hidden
    kept = math.prod(LARGE_ROWS) * model.num_layers * (24 * model.width + 12 * active)
    return 16 * weights + kept < 0.9 * torch.cuda.mem_get_info()[0]


# rows of the table


def _limit_row(
    case: str, trainer: Trainer, share: float, limit: float, parts: Sequence[float]
) -> Row:
    """A share in %, which noise may take below nothing."""
    ratio, *bounds = (limit / max(each, 0.01) for each in (share, *parts))
    ratios = ratio, min(ratio, *bounds), max(ratio, *bounds)
    return _row(case, trainer, "%", (share, limit), "limit", ratios)


def _row(
    case: str,
    trainer: Trainer,
    unit: str,
    values: tuple[float, float],
    peer: str,
    ratios: tuple[float, float, float],
) -> Row:
    """values: ours and the peer's. ratios: with low and high."""
    return Row(
        case=case,
        device=trainer.device.type,
        dtype=trainer.recipe.precision,
        unit=unit,
        ours=values[0],
        peer=values[1],
        peer_name=peer,
        ratio=ratios[0],
        low=ratios[1],
        high=ratios[2],
    )
