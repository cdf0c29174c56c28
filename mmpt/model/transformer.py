"""The decoder: one stream of ids in, one hidden vector per id out.

Pre-norm blocks of grouped-query attention and ModalityMoE. The residual stream stays in the dtype
of the embedding; autocast makes the projections bf16. The same forward serves pretraining on
packed rows, cached decoding, and the joint layout of clean and noisy ids.

Legend: B batch, T row, D width, V vocabulary.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed import ProcessGroup

from mmpt.config import UserError, to_dict, write_atomic
from mmpt.model.attention import Attention, Context, RMSNorm, Sorted
from mmpt.model.backends import Attend, Backend, Causal, plan_attention
from mmpt.model.bank import Bank
from mmpt.model.cache import KVCache
from mmpt.model.collectives import fill
from mmpt.model.config import ModelConfig, NoiseConfig, Router
from mmpt.model.dispatch import Dispatch, group_table
from mmpt.model.float8 import Linear
from mmpt.model.initialise import initialise, initialise_low_rank
from mmpt.model.layer import Layer
from mmpt.model.layout import Layout
from mmpt.model.moe import Experts
from mmpt.model.rotary import Rotary, axes_of
from mmpt.model.weights import FORMAT_VERSION, read_config, read_tensors, upgrade
from mmpt.stream import Rows
from mmpt.vocab import Modality, Vocabulary


class Decoder(nn.Module):
    """A decoder-only transformer with experts grouped by modality."""

    groups: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend: Backend = "sdpa"  # of attention in training
        self.linear: Linear = F.linear  # of projections; see `multiply_by`
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.layers = nn.ModuleList()
        for number in range(config.num_layers):
            self.layers.append(Layer(config, number=number, lender=self._lender(number)))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head: nn.Parameter | None = None
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.width))
        if any(group.noisy for group in config.groups.values()) and config.noisy_rank:
            for layer in self._attentions():
                layer.add_noisy(config.noisy_rank)
        self.register_buffer("groups", group_table(config), persistent=False)
        self._router_loss: torch.Tensor | None = None

    @classmethod
    def from_config(cls, config: ModelConfig, *, seed: int = 0) -> "Decoder":
        """A fresh model; its weights are a function of the seed alone."""
        model = cls(config)
        model.initialise(seed)
        return model

    def initialise(self, seed: int) -> None:
        """Overwrite all weights and buffers, wherever they are, by a function of the seed alone.

        Every rank draws each weight whole, one after another, and keeps its part.
        """
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        ids: torch.Tensor,
        *,
        modality: torch.Tensor,
        position: torch.Tensor | None = None,
        document: torch.Tensor | None = None,
        block: torch.Tensor | None = None,
        limit: torch.Tensor | None = None,
        axes: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        cache: KVCache | None = None,
        append: bool = True,
    ) -> torch.Tensor:
        """Hidden states (B, T, D) after the final norm, of ids (B, T).

        modality, position, document, block, limit: int64 (B, T), see `Layout`. Without `document` a
        row is one document without pads; without `position` its ids are counted on from the cache.
        axes: int64 (B, T, 3), see `axes_of`, where the model has three; without them ids have their
        position on each, as text has.
        time: float (B, T), from 0 (noise) to 1 (clean), and noise: int64 (B,), see `Dispatch.plan`.
        With a cache, the ids see what it holds, and are appended to it unless `append` is False.
        """
        past = 0 if cache is None else len(cache)
        plain = document is None and block is None and past == 0
        layout = _layout(ids, position, document, block, limit, past)
        attend = Causal() if plain else self._attend(layout, cache)
        group = self.groups[(layout.block >= 0).long(), modality.clamp(0, len(Modality) - 1)]
        known = (modality >= 0) & (modality < len(Modality))
        group = torch.where(known, group, len(self.config.groups) + 1)
        group = torch.where(layout.document < 0, len(self.config.groups), group)
        dispatch = Dispatch.plan(group, self.config, ids=ids, layout=layout, time=time, noise=noise)
        if cache is not None:
            cache.begin(append=append)
        x_BTD = F.embedding(ids, self.embedding)
        place = layout.position if axes is None or self.config.rope == "1d" else axes
        rotary = Rotary.at(place, self.config, x_BTD.dtype)
        context = Context(rotary, attend, self._sort(modality), self.linear)
        losses: list[torch.Tensor] = []
        for number, layer in enumerate(self.layers):
            kept = None if cache is None else cache.layers[number]
            x_BTD, loss_BT = layer(x_BTD, context=context, dispatch=dispatch, cache=kept)
            losses += [] if loss_BT is None else [loss_BT]
        self._router_loss = torch.stack(losses).sum(0) / len(self.layers) if losses else None
        if cache is not None and append:
            cache.commit(layout)
        return self.norm(x_BTD)

    def logits(self, hidden: torch.Tensor, ids: torch.Tensor | slice | None = None) -> torch.Tensor:
        """Scores (..., V) of the next id, or (..., n) of candidate `ids` (n,); at least float32.

        A slice of ids copies no weights.
        """
        weight = self.embedding if self.head is None else self.head
        if ids is not None:
            weight = weight[ids] if isinstance(ids, slice) else weight.index_select(0, ids)
        scores = F.linear(hidden, weight)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def axes_of(self, rows: Rows) -> torch.Tensor | None:
        """The `axes` of packed rows, where the model has three."""
        return axes_of(rows) if self.config.rope == "3d" else None

    def take_router_loss(self) -> torch.Tensor | None:
        """Of the last forward pass, once: float (B, T), what each id adds, the mean over layers.

        Balance loss and z-loss with their weights, or the loss of auxiliary routers; None without.
        """
        loss, self._router_loss = self._router_loss, None
        return loss

    def new_cache(self) -> KVCache:
        """An empty cache for this model."""
        return KVCache(self.config.num_layers)

    def add_noisy_groups(
        self,
        *,
        seed: int = 0,
        router: Router | None = None,
        capacity_slope: float = 0.0,
        noise: NoiseConfig | None = None,
    ) -> None:
        """Grow the experts of noisy ids as copies of the clean ones, once per group.

        Those of text come with blocks of text in `noise`, which the config keeps. Low-rank
        attention weights of `config.noisy_rank` come with them, zero at the start: a noisy id is
        then computed exactly as a clean one. Nothing changes for clean ids, ever. router and
        capacity_slope: see `GroupConfig.for_noisy`; with another router experts are chosen anew.
        """
        noise = noise or self.config.noise
        left_out = () if noise.text_block else (Modality.TEXT.name.lower(),)
        grown = dict(self.config.groups)
        for name, group in self.config.groups.items():
            media = tuple(m for m in group.modalities if m not in left_out)
            if media and not group.noisy:
                new = group.for_noisy(media, router, capacity_slope)
                grown[f"noisy_{name}"] = replace(grown.get(f"noisy_{name}", new), modalities=media)
        self.config = replace(self.config, groups=grown, noise=noise)
        generator = torch.Generator().manual_seed(seed)
        for number, layer in enumerate(self._layers()):
            lender = self._lender(number)
            layer.experts.grow(self.config, None if lender is None else lender.experts)
            if self.config.noisy_rank and layer.attention.noisy_in is None:
                layer.attention.add_noisy(self.config.noisy_rank)
                initialise_low_rank(layer.attention, generator)
        self.groups = group_table(self.config).to(self.groups.device)

    def freeze_for_adaptation(self) -> list[nn.Parameter]:
        """Train only what noisy ids use; returns those parameters.

        Every weight that a clean id meets is frozen, so the plain autoregressive pass stays
        bit-equal through adaptation.
        """
        if not any(group.noisy for group in self.config.groups.values()):
            raise UserError("this model has no noisy groups; call add_noisy_groups() first")
        self.requires_grad_(False)
        trained = [p for name, p in self.named_parameters() if self._noisy_only(name)]
        for parameter in trained:
            parameter.requires_grad_()
        return trained

    def multiply_by(self, linear: Linear) -> None:
        """Compute the products of projections and experts by another function, such as in FP8."""
        self.linear = linear
        for module in self.modules():
            if isinstance(module, Bank):
                module.linear = linear

    def freeze_for_routers(self) -> None:
        """Train only the auxiliary routers; UserError where there are none."""
        auxiliary = [e.auxiliary for e in self._groups() if e.auxiliary is not None]
        if not auxiliary:
            raise UserError(
                "no group of this model has causal = auxiliary; only such have routers to train"
            )
        self.requires_grad_(False)
        for each in auxiliary:
            each.requires_grad_()

    @property
    def frozen_clean(self) -> bool:
        """Whether clean ids are computed by frozen weights only, auxiliary routers aside."""
        return not any(
            p.requires_grad
            for n, p in self.named_parameters()
            if not (self._noisy_only(n) or ".auxiliary." in n)
        )

    def update_balance(self, rate: float = 1e-3) -> None:
        """After an optimiser step: move the routers' biases against the load, and reset it."""
        for experts in self._groups():
            experts.update_balance(rate)

    def sum_loads(self, group: ProcessGroup) -> None:
        """Add up over ranks what experts counted on each."""
        counted = [each for e in self._groups() for each in (e.load, e.scores, e.unserved)]
        flat = torch.cat(counted)
        distributed.all_reduce(flat, group=group)
        for each, total in zip(counted, flat.split([len(c) for c in counted]), strict=True):
            each.copy_(total)

    def expert_loads(self) -> dict[str, torch.Tensor]:
        """Per group (layers, experts): training ids per expert since the last `update_balance`."""
        return self._by_group(lambda experts: experts.load)

    def router_scores(self) -> dict[str, torch.Tensor]:
        """Per group (layers, experts): sums of the routers' scores, over the same ids."""
        return self._by_group(lambda experts: experts.scores)

    def routers(self) -> dict[str, list[nn.Parameter]]:
        """Per group that has any: the weights of its routers that are trained, by layer."""
        found: dict[str, list[nn.Parameter]] = {}
        for name in self.config.ordered_groups:
            for layer in self._layers():
                router = layer.experts.groups[name].router
                if isinstance(router, nn.Parameter) and router.requires_grad:
                    found.setdefault(name, []).append(router)
        return found

    def unserved(self) -> dict[str, torch.Tensor]:
        """Per group (layers, 2): the ids that no expert computed, and all, where routers choose."""
        return self._by_group(lambda experts: experts.unserved)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "model.safetensors"
        temporary = weights.with_name(f"{weights.name}.{os.getpid()}.tmp")
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        try:
            save_file(tensors, temporary, metadata={"vocabulary": self.config.vocabulary})
            os.replace(temporary, weights)
        finally:
            temporary.unlink(missing_ok=True)
        write_atomic(folder / "config.json", self.config_json())

    def config_json(self) -> str:
        """config.json: all that `load` needs besides the tensors."""
        data = {"format_version": FORMAT_VERSION, "model": to_dict(self.config)}
        return json.dumps(data, indent=1)

    @classmethod
    def load(cls, folder: str | Path, *, vocabulary: Vocabulary | None = None) -> "Decoder":
        """Read what `save` wrote, on the CPU; refuses another vocabulary and newer formats."""
        folder = Path(folder)
        config, version = read_config(folder)
        if vocabulary is not None:
            vocabulary.check(config.vocabulary, what=str(folder))
        model = cls(config)
        try:
            tensors = upgrade(read_tensors(folder), version, config)
            model.load_state_dict(tensors, assign=True)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder} has no readable weights: {error}") from None
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the weights in {folder} do not fit its config.json: {reason}"
            ) from None
        return model

    def fill(self, folder: str | Path) -> None:
        """Overwrite the weights by those of a model folder of the same shape, also in parts."""
        folder = Path(folder)
        config, version = read_config(folder)
        ours, theirs = (to_dict(replace(each, noisy_rank=0)) for each in (self.config, config))
        if different := [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]:
            key = different[0]
            raise UserError(
                f"{folder} has {key} = {theirs.get(key)}, the recipe's model {ours.get(key)}; they "
                "must be equal"
            )
        tensors = upgrade(read_tensors(folder), version, config)
        for name, tensor in self.state_dict().items():
            fill(tensor, tensors[name])

    @property
    def num_parameters(self) -> int:
        """All weights that are stored."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self, modality: Modality, *, noisy: bool = False) -> int:
        """Weights that one id of this medium multiplies with, the head included.

        The mean, where routers choose how many experts; without auxiliary routers, which training
        does not use.
        """
        config, attention = self.config, next(iter(self._attentions()))
        name = list(config.ordered_groups)[int(self.groups[int(noisy), modality])]
        group = config.groups[name]
        hidden = round(group.mean_active * config.expert_hidden) + group.shared_hidden
        router = config.width * group.num_choices if group.learned else 0
        layer = attention.num_active(noisy=noisy)
        layer += 3 * config.width * hidden + router + 2 * config.width
        return config.num_layers * layer + config.width * (config.vocab_size + 1)

    def flops_per_token(self, modality: Modality, *, context: int = 0, noisy: bool = False) -> int:
        """Of a forward pass, with `context` keys seen; a training step takes three times that."""
        attention = 4 * self.config.width_of_heads * context * self.config.num_layers
        return 2 * self.num_active_parameters(modality, noisy=noisy) + attention

    def _by_group(self, counted: Callable[[Experts], torch.Tensor]) -> dict[str, torch.Tensor]:
        layers = [[counted(e) for e in layer.experts.experts()] for layer in self._layers()]
        pairs = zip(self.config.ordered_groups, zip(*layers, strict=True), strict=True)
        return {name: torch.stack(of_layers) for name, of_layers in pairs}

    def _noisy_only(self, name: str) -> bool:
        """Whether noisy ids alone use a parameter."""
        names = {name for name, group in self.config.groups.items() if group.noisy}
        return bool((names | {"noisy_in", "noisy_out"}) & set(name.split(".")))

    def _lender(self, number: int) -> Layer | None:
        """The layer whose experts another one shares; None where that has its own."""
        first = number - number % self.config.expert_share_every
        return None if first == number else self._layers()[first]

    def _attend(self, layout: Layout, cache: KVCache | None) -> Attend:
        past = None if cache is None else cache.layout
        key = layout if past is None else past.cat(layout)
        return plan_attention(layout, key, self.backend if self.training else "sdpa")

    def _sort(self, modality: torch.Tensor) -> Sorted | None:
        if not self.config.untied_attention:
            return None
        clean = [group for group in self.config.groups.values() if not group.noisy]
        return Sorted.plan(self.groups[0, modality], len(clean))

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type] # ModuleList forgets the class

    def _attentions(self) -> list[Attention]:
        return [layer.attention for layer in self._layers()]

    def _groups(self) -> list[Experts]:
        return [experts for layer in self._layers() for experts in layer.experts.experts()]


def _layout(
    ids: torch.Tensor,
    position: torch.Tensor | None,
    document: torch.Tensor | None,
    block: torch.Tensor | None,
    limit: torch.Tensor | None,
    past: int,
) -> Layout:
    if position is None:
        position = torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)
    if document is None:
        document = torch.zeros_like(ids)
    if block is None:
        return Layout.clean(document, position)
    assert limit is not None, "noisy ids need the limit of what they see"
    return Layout(document, position, block, limit)
