"""Products in 8 bits, rounded as a GPU would and multiplied in float32."""

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.config import ModelConfig
from mmpt.model.float8 import check_float8, float8_linear
from mmpt.model.transformer import Decoder

CONFIG = ModelConfig(
    vocab_size=300, width=64, num_layers=2, num_heads=4, num_kv_heads=2, expert_hidden=48
)


def gradients(model: Decoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 300, (2, 37), generator=generator)  # no multiple of 16
    modality = torch.randint(0, 2, ids.shape, generator=generator)  # no speech at all
    weight = torch.randn(2, 37, 64, generator=generator)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(ids, modality=modality)
    (hidden * weight).sum().backward()
    grown = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), grown


def test_gradients_point_where_those_of_bf16_do():
    model = Decoder.from_config(CONFIG)
    plain, theirs = gradients(model)
    model.multiply_by(float8_linear(emulate=True))
    rounded, ours = gradients(model)
    assert ours.keys() == theirs.keys()
    assert not torch.equal(rounded, plain)
    for name, theirs_of in theirs.items():
        if "speech" in name:
            assert not ours[name].any(), name
        elif "router" not in name:  # an id that changes its expert turns those
            near = torch.cosine_similarity(ours[name].flatten(), theirs_of.flatten(), dim=0)
            assert near > 0.9, (name, near)


def test_nothing_is_rounded_while_no_gradient_is_wanted():
    model = Decoder.from_config(CONFIG).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain = model(ids, modality=torch.zeros_like(ids))
        model.multiply_by(float8_linear(emulate=True))
        torch.testing.assert_close(model(ids, modality=torch.zeros_like(ids)), plain)


def test_a_device_without_8_bit_products_is_refused():
    with pytest.raises(UserError, match="fp8 needs a GPU of compute capability"):
        check_float8(torch.device("cpu"))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU that multiplies 8-bit floats",
)
def test_the_rounding_on_a_gpu_is_the_emulated_one():
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(37, 64, device="cuda", generator=generator, requires_grad=True)
    weight = torch.randn(96, 64, device="cuda", generator=generator)
    ours, emulated = (float8_linear(emulate=e)(x, weight) for e in (False, True))
    torch.testing.assert_close(ours, emulated, rtol=2e-2, atol=0.1)
