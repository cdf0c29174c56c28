"""`parallel.compile`: the attention of a layer is one graph and computes what it did."""

import torch

from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder

CONFIG = ModelConfig(
    vocab_size=100, width=32, num_layers=1, num_heads=4, num_kv_heads=2, expert_hidden=16
)


def outcome(model: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 100, (2, 40), generator=generator)
    document = torch.arange(40).div(15, rounding_mode="floor").expand(2, 40)
    position = (torch.arange(40) % 15).expand(2, 40)
    weight = torch.randn(2, 40, 32, generator=generator)
    model.zero_grad()
    hidden = model(ids, modality=ids % 4, position=position, document=document)
    (hidden * weight).sum().backward()
    gradient = model.get_parameter("layers.0.attention.project_in").grad
    assert gradient is not None
    return hidden.detach(), gradient.clone()


def test_attention_is_one_graph():
    model = Decoder.from_config(CONFIG)
    plain = outcome(model)
    # without code generation, which takes a minute on a CPU; a break of the graph is an error
    model.get_submodule("layers.0.attention").compile(fullgraph=True, backend="eager")
    for ours, theirs in zip(outcome(model), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
