"""Small recipes to plan, with synthetic sizes and no data."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.train.recipe import TrainRecipe

GROUPS = {
    "text": GroupConfig(modalities=("text",), num_experts=4, num_active=2, router="token_choice"),
    "visual": GroupConfig(modalities=("image", "video"), num_experts=2, router="token_choice"),
    "speech": GroupConfig(modalities=("speech",)),
}


@pytest.fixture
def recipe() -> TrainRecipe:
    """Two layers, three groups."""
    model = ModelConfig(
        vocab_size=300,
        width=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        expert_hidden=48,
        groups=GROUPS,
    )
    sources = {"a": SourceConfig(shards=("a.tar",))}
    data = DataConfig(sources=sources, rows=64, length=96)
    return TrainRecipe(data=data, steps=10, model=model, device="cpu")


@pytest.fixture
def large(recipe) -> TrainRecipe:
    """70 billion parameters in one group."""
    everything = GroupConfig(modalities=("text", "image", "video", "speech"))
    model = ModelConfig(
        vocab_size=128_000,
        width=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        expert_hidden=28_672,
        tie_embeddings=False,
        groups={"all": everything},
    )
    data = replace(recipe.data, rows=4096, length=4096)
    return replace(recipe, model=model, data=data, precision="bf16", device="cuda")


@pytest.fixture(scope="session")
def cpu_attention():
    """Operations of CPUs' attention, which the counter does not know."""
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
        ),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
        ),
    }
