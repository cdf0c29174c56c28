"""The rows of `mmpt bench decode` about blocks that are decoded in parallel.

Denoising, its commit pass counted and timed, stands beside our own autoregressive decoding, eager,
and beside `generate` of transformers at its fastest settings, on CUDA also as compiled graphs.
Weights are random and say nothing of quality, so what is shown before anything is timed is that

- the pass over a noisy block and the cache gives the logits of the layout that training sees,
- the commit pass leaves what an autoregressive prefill of the same codes leaves,
- one code at a time, ours and the peer's are the same ids.

Self-speculation writes the ids of autoregressive decoding (also shown), at temperature 0: how many
drafts it accepts depends on the weights, and of random ones next to none, the worst case.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from mmpt.bench.harness import Row, compare
from mmpt.bench.pair import GREEDY, SMALL, TINY, Case, Pair, dense, show_equal
from mmpt.decode.ar import Prefix
from mmpt.decode.denoise import denoise_block
from mmpt.decode.dida import corrupt, joint_forward
from mmpt.decode.noise import Alphabet
from mmpt.decode.passes import Denoising
from mmpt.decode.sampling import Sampling
from mmpt.decode.speculate import Speculated, speculate_block
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows, StreamBuilder
from mmpt.vocab import Modality, Vocabulary

PROMPT = 16  # ids before the codes
EQUAL = 1e-9  # relative, in float64
SHOWN = 256  # codes, of which that is shown at most
# of a block of so many codes, in which it is denoised; the last one also beside the peer
PASSES = {64: (4, 8), 256: (11,), 1024: (16,), 4096: (25,)}
MEDIUM = {"width": 1024, "num_layers": 24, "num_heads": 16, "num_kv_heads": 4}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model of random weights, and what is decoded with it.

    peer: also beside transformers. speculate: also by self-speculation.
    """

    name: str
    model: ModelConfig
    codes: int
    batch: int = 1
    peer: bool = True
    speculate: bool = False

    @property
    def case(self) -> Case:
        """The same one code at a time."""
        new, medium = self.codes, Modality.IMAGE
        return Case(name=self.name, model=self.model, prompt=PROMPT, new=new, medium=medium)

    def named(self, what: str) -> str:
        """The case of a row."""
        return f"{self.name}, {self.codes} codes {what}, batch {self.batch}"


_TINY = dense(expert_hidden=320, **TINY)
_SMALL = dense(expert_hidden=1408, **SMALL)  # 26M parameters in its layers
_MEDIUM = dense(expert_hidden=4096, **MEDIUM)  # 380M parameters, those of noisy ids aside
SETUPS = {  # on CPUs few: one code a pass takes long
    "cpu": (
        Setup(name="tiny", model=_TINY, codes=64, speculate=True),
        Setup(name="tiny", model=_TINY, codes=64, batch=8, peer=False, speculate=True),
        Setup(name="tiny", model=_TINY, codes=256),
        Setup(name="tiny", model=_TINY, codes=256, batch=8, peer=False),
        Setup(name="tiny", model=_TINY, codes=1024, peer=False),
        Setup(name="512 wide", model=_SMALL, codes=64),
    ),
    "cuda": tuple(
        Setup(
            name=name,
            model=model,
            codes=codes,
            batch=batch,
            peer=codes < 4096,
            speculate=codes <= 256,
        )
        for name, model in (("tiny", _TINY), ("1024 wide", _MEDIUM))
        for codes in PASSES
        for batch in (1, 8)
    ),
}
DTYPES = {"cpu": ("fp32", torch.float32), "cuda": ("bf16", torch.bfloat16)}


def parallel_rows(device: str) -> Iterator[Row]:
    """Of each setup, on a device."""
    for setup in SETUPS[device.split(":")[0]]:
        yield from measure(setup, device)


def measure(setup: Setup, device: str) -> Iterator[Row]:
    """Its rows, after what can be shown equal was."""
    if setup.peer:
        show_equal(setup.case, setup.batch, device)
    precision, dtype = DTYPES[device.split(":")[0]]
    blocks = Blocks(setup, device)
    pair = blocks.pair.to(torch.float64)
    blocks.show_exact()
    accepted = blocks.show_speculation() if setup.speculate else 0.0
    pair.to(dtype)
    against, number = ("mmpt, one code a pass", pair.ours), setup.batch * setup.codes

    def row(what: str, ours: Callable[[], Any], peer: tuple[str, Callable[[], Any]]) -> Row:
        result = compare(ours, peer[1], device=device)
        return Row(
            case=setup.named(what),
            device=device,
            dtype=precision,
            unit="codes/s",
            ours=number / result.ours,
            peer=number / result.peer,
            peer_name=peer[0],
            ratio=result.ratio,
            low=result.low,
            high=result.high,
        )

    def denoised(passes: int, peer: tuple[str, Callable[[], Any]]) -> Row:
        what = f"in {passes} passes and a commit (NFE {passes + 1})"
        return row(what, partial(blocks.denoised, passes), peer)

    for passes in PASSES[setup.codes]:
        yield denoised(passes, against)
    if setup.speculate:
        what = f"self-speculated, random weights: {accepted:.0%} of drafts accepted"
        yield row(what, blocks.speculated, against)
    if setup.peer:
        pair.use_fastest()
        name = f"transformers {type(pair.peer).__name__}, {pair.setting}"
        yield denoised(PASSES[setup.codes][-1], (name, pair.theirs))


class Blocks:
    """A block of codes behind each prompt, by a model that can denoise."""

    def __init__(self, setup: Setup, device: str) -> None:
        self.setup = setup
        self.pair = Pair(setup.case, setup.model, setup.batch, device)
        self.pair.model.add_noisy_groups()
        self.vocabulary, self.prompts = self.pair.vocabulary, self.pair.prompts

    @property
    def _given(self) -> tuple[Decoder, Vocabulary, list[np.ndarray]]:
        return self.pair.model, self.vocabulary, self.prompts

    @cached_property
    def _alphabet(self) -> Alphabet:
        return Alphabet.of(self.pair.model, self.vocabulary, Modality.IMAGE)

    def _generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(len(self.prompts))]

    def denoised(self, num_passes: int) -> np.ndarray:
        """int64 (batch, codes); the commit is a prefill, which takes the prompt's few ids anew."""
        codes = denoise_block(
            *self._given,
            modality=Modality.IMAGE,
            length=self.setup.codes,
            denoising=Denoising(num_passes=num_passes),
            sampling=Sampling(),
            generators=self._generators(),
        )
        whole = [np.concatenate(pair) for pair in zip(self.prompts, codes, strict=True)]
        Prefix(self.pair.model, self.vocabulary, whole, None, GREEDY)
        return np.stack(codes)

    def speculated(self) -> np.ndarray:
        """int64 (batch, codes)."""
        return np.stack(self._speculate().codes)

    def _speculate(self) -> Speculated:
        return speculate_block(
            *self._given,
            modality=Modality.IMAGE,
            length=self.setup.codes,
            sampling=GREEDY,
            generators=self._generators(),
        )

    def show_speculation(self) -> float:
        """The ids are those of one code a pass; the share of drafts that were accepted."""
        ours, wanted = self._speculate(), self.pair.ours()
        equal = np.stack(ours.codes) == wanted
        if not equal.all():
            raise RuntimeError(f"{equal.mean():.1%} of speculated ids are those of one code a pass")
        return ours.num_accepted.sum() / max(1, ours.num_checked.sum())

    @torch.inference_mode()
    def show_exact(self) -> None:
        """Passes over a cache give what one pass over the layout of training gives; in float64."""
        model, candidates = self.pair.model, self._alphabet.ids_V
        rows = self._rows()
        num_codes = rows.ids.shape[1] - PROMPT - 2  # an end of image and of document
        generators = self._generators()[: len(rows.ids)]
        joint = corrupt(rows, self.vocabulary, generators=generators, max_noisy=num_codes + 1).to(
            self.pair.device
        )
        hidden = joint_forward(model, joint)
        noisy = joint.num_clean + torch.arange(num_codes + 1, device=joint.ids.device)
        wanted = model.logits(hidden[:, noisy[:-1]], candidates)  # the last output is of no use
        prefix = Prefix(model, self.vocabulary, list(rows.ids[:, :PROMPT].numpy()), None, GREEDY)
        codes = joint.ids[:, noisy[1:]]
        for row, scores in enumerate(wanted):  # each has a time of its own
            time = float(joint.time[row, joint.num_clean])
            found = prefix.block_scores(codes, Modality.IMAGE, candidates, time=time)[row]
            _check_equal(found, scores, "a block's logits")
        new = joint.ids[:, PROMPT : PROMPT + num_codes]
        live = torch.ones(len(new), dtype=torch.bool, device=prefix.device)
        prefix.append(new, torch.full_like(new, Modality.IMAGE), live)
        last = model.logits(hidden[:, PROMPT + num_codes - 1])
        _check_equal(prefix.scores(), last, "logits after a commit")

    def _rows(self) -> Rows:
        """Some prompts with random codes, of one image of few, packed as for training."""
        rng, vocabulary = np.random.default_rng(0), self.vocabulary
        side, number = (
            round(min(self.setup.codes, SHOWN) ** 0.5),
            vocabulary.range_of(Modality.IMAGE).size,
        )
        documents = []
        for prompt in self.prompts[:2]:
            builder = StreamBuilder(vocabulary).structure("<bod>").text(prompt[1:-3])
            builder.media(Modality.IMAGE, rng.integers(0, number, (side, side)))
            documents.append([builder.structure("<eod>").build()])
        length = len(documents[0][0])
        return Rows.pack(documents, length, vocabulary.structure_id("<pad>"))


def _check_equal(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    if not worst < EQUAL:
        raise RuntimeError(f"{what} are off by {worst:.1e} of the largest")
