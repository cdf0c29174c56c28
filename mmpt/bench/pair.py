"""Our decoder and its peer in transformers, with the same weights and prompts.

The peer is Qwen3, whose dense form is our decoder with one group of one expert, or its mixture of
experts. Ids outside of the medium that is written score zero, which is never the best, for the peer
knows no grammar.
"""

import timeit
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange

from mmpt.config import UserError
from mmpt.decode.ar import generate, generate_block
from mmpt.decode.sampling import Sampling
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.layer import Layer
from mmpt.model.transformer import Decoder
from mmpt.vocab import BEGIN, Modality, Vocabulary

NUM_TEXT, NUM_CODES = 4096, 4096
GREEDY = Sampling(temperature=0)
CACHES = ("dynamic", "static", "compiled static")  # of the peer


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is written: text, or the codes of a square image."""

    name: str
    model: ModelConfig
    prompt: int  # ids
    new: int
    medium: Modality = Modality.TEXT

    def __str__(self) -> str:
        what = "ids of text" if self.medium == Modality.TEXT else "codes of an image"
        return f"{self.name}, {self.new} {what} after {self.prompt} ids"


TINY = {"width": 144, "num_layers": 4, "num_heads": 6, "num_kv_heads": 2}  # that of the recipe
SMALL = {"width": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2}


def dense(**sizes: int) -> ModelConfig:
    """One expert for all media."""
    group = GroupConfig(modalities=tuple(modality.name.lower() for modality in Modality))
    return ModelConfig(vocab_size=1, groups={"all": group}, tie_embeddings=False, **sizes)  # type: ignore[arg-type] # all are numbers


def show_equal(case: Case, batch: int, device: str) -> None:
    """Both write the same ids, where they compute the same."""
    group = case.model.groups["all"]
    all_active = replace(group, num_experts=group.num_active)
    pair = Pair(case, replace(case.model, groups={"all": all_active}), batch, device)
    with torch.no_grad():
        for name, parameter in pair.model.named_parameters():
            if name.endswith("router"):
                parameter.zero_()
    pair.copy_weights()
    ours, theirs = pair.ours(), pair.theirs()
    if not np.array_equal(ours, theirs):
        raise RuntimeError(f"{(ours == theirs).mean():.1%} of the ids are the peer's")


class Pair:
    """Our decoder and the peer with the same weights, and prompts for both."""

    def __init__(self, case: Case, config: ModelConfig, batch: int, device: str) -> None:
        self.case, self.device = case, device
        self.vocabulary = _vocabulary()
        config = replace(config, vocab_size=len(self.vocabulary))
        self.model = Decoder.from_config(config).to(device).eval()
        self.peer = _peer(config).to(device).eval()
        self.setting = "dynamic cache"
        self._options: dict[str, Any] = {}
        self.copy_weights()
        self.prompts = self._prompts(batch)
        self._tensor = torch.from_numpy(np.stack(self.prompts)).to(device)

    def to(self, dtype: torch.dtype) -> "Pair":
        """Both models in another type."""
        for model in (self.model, self.peer):
            model.to(dtype)
        return self

    def _prompts(self, batch: int) -> list[np.ndarray]:
        rng, vocabulary, case = np.random.default_rng(0), self.vocabulary, self.case
        header = []
        if case.medium == Modality.IMAGE:
            side = vocabulary.size_id(round(case.new**0.5))
            header = [vocabulary.structure_id(BEGIN[case.medium]), side, side]
        begin, number = vocabulary.structure_id("<bod>"), case.prompt - 1 - len(header)
        texts = rng.integers(0, vocabulary.num_text, (batch, number))
        return [np.array([begin, *text, *header]) for text in texts]

    @torch.no_grad()
    def copy_weights(self) -> None:
        """From ours to the peer."""
        ours, peer = self.model, self.peer
        assert ours.head is not None
        first, last = 0, self.vocabulary.num_text
        if self.case.medium != Modality.TEXT:
            codes = self.vocabulary.range_of(self.case.medium)
            first, last = codes.start, codes.stop
        ours.head[:first], ours.head[last:] = 0, 0
        peer.model.embed_tokens.weight.copy_(ours.embedding)
        peer.lm_head.weight.copy_(ours.head)
        for layer, theirs in zip(ours.layers, peer.model.layers, strict=True):
            assert isinstance(layer, Layer)
            _copy_layer(layer, theirs)

    def ours(self) -> np.ndarray:
        """int64 (batch, new)."""
        given = (self.model, self.vocabulary, self.prompts)
        generators = [torch.Generator() for _ in self.prompts]
        options = {"sampling": GREEDY, "generators": generators}
        if self.case.medium == Modality.TEXT:
            allow = (self.case.medium,)
            return np.stack(generate(*given, max_ids=self.case.new, allow=allow, **options))
        return np.stack(
            generate_block(*given, modality=self.case.medium, length=self.case.new, **options)
        )

    @torch.inference_mode()
    def theirs(self) -> np.ndarray:
        """The same by the peer, in the setting that is in use."""
        ids = self.peer.generate(
            self._tensor,
            attention_mask=torch.ones_like(self._tensor),
            do_sample=False,
            max_new_tokens=self.case.new,
            **self._options,
        )
        return ids[:, self.case.prompt :].cpu().numpy()

    def use_fastest(self) -> None:
        """Of the peer's caches, compiled or not, and of its experts."""
        torch.compiler.reset()  # it compiles a function a limited number of times
        seconds = {}
        for experts in self._experts():
            for cache in CACHES:
                self._use(experts, cache)
                setting = experts, cache
                seconds[setting] = min(timeit.repeat(self.theirs, number=1, repeat=3))
        self._use(*min(seconds, key=lambda setting: seconds[setting]))

    def _experts(self) -> tuple[str, ...]:
        mixture = self.model.config.groups["all"].num_experts > 1
        return ("grouped_mm", "batched_mm", "eager") if mixture else ("",)

    def _use(self, experts: str, cache: str) -> None:
        self.setting = f"{cache} cache" + (f", {experts} experts" if experts else "")
        self._options = {"cache_implementation": cache.split()[-1]}
        if cache == "compiled static":
            self._options["compile_config"] = _compiling(self.device)
        elif cache == "static":
            self._options["disable_compile"] = True
        if experts:
            self.peer.set_experts_implementation(experts)


def _compiling(device: str) -> Any:
    from transformers import CompileConfig

    mode = "reduce-overhead" if device.startswith("cuda") else "default"  # the former is a graph
    config = CompileConfig(fullgraph=False, mode=mode)
    config._compile_all_devices = True  # type: ignore[assignment] # on CPUs, too, where transformers compiles on demand only
    return config


def _vocabulary() -> Vocabulary:
    codebooks = [("visual", NUM_CODES, {"image": "image"}, None)]
    return Vocabulary.build(num_text=NUM_TEXT, text_fingerprint="text", codebooks=codebooks)


def _peer(config: ModelConfig) -> Any:
    try:
        from transformers import (
            Qwen3Config,
            Qwen3ForCausalLM,
            Qwen3MoeConfig,
            Qwen3MoeForCausalLM,
        )
    except ImportError:
        raise UserError("this needs transformers: pip install 'mmpt[eval]'") from None
    group = config.groups["all"]
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.width_per_head,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if group.router == "hard":
        return Qwen3ForCausalLM(Qwen3Config(intermediate_size=config.expert_hidden, **sizes))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            moe_intermediate_size=config.expert_hidden,
            num_experts=group.num_experts,
            num_experts_per_tok=group.num_active,
            norm_topk_prob=True,
            **sizes,
        )
    )


def _copy_layer(ours: Layer, theirs: Any) -> None:
    # all norms are ones
    attention, [experts] = ours.attention, ours.experts.experts()
    sizes = (attention.num_queries, 1, 1)
    stack = attention.project_in.unflatten(0, (-1, sum(sizes), attention.head_width))
    for name, part in zip("qkv", stack.split(sizes, 1), strict=True):
        getattr(theirs.self_attn, f"{name}_proj").weight.copy_(part.flatten(0, 2))
    theirs.self_attn.o_proj.weight.copy_(attention.project_out)
    gate_up, down, mlp = experts.bank.gate_up, experts.bank.down, theirs.mlp
    if experts.router is None:
        parts = {"gate_proj": gate_up[0, :, 0], "up_proj": gate_up[0, :, 1], "down_proj": down[0]}
        for name, part in parts.items():
            getattr(mlp, name).weight.copy_(part.T)
        return
    mlp.gate.weight.copy_(experts.router.T)
    mlp.experts.gate_up_proj.copy_(rearrange(gate_up, "e d two f -> e (two f) d"))
    mlp.experts.down_proj.copy_(down.mT)
