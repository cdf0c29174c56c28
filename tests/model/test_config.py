import pytest

from mmpt.config import UserError, from_dict, to_dict
from mmpt.model.config import GroupConfig, ModelConfig


def test_a_config_survives_plain_values():
    config = ModelConfig(vocab_size=10, width=24, num_heads=4)
    assert from_dict(ModelConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 100, "num_heads": 3}, "multiple of 6"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_kv_heads 4"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"groups": {"text": {"modalities": ["text"]}}}, "no group serves image"),
        ({"groups": {"a": {"modalities": ["smell"]}}}, "unknown modality 'smell'"),
        ({"groups": {"a": {"modalities": ["text"], "num_experts": 2}}}, "router = token_choice"),
        ({"groups": {"a": {"modalities": ["text"], "num_active": 2}}}, "num_active = 2"),
        ({"width": 192, "widht": 3}, "did you mean 'width'"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        from_dict(ModelConfig, {"vocab_size": 10, **values})
    assert "\n" not in str(caught.value)


def test_two_groups_may_not_serve_one_modality():
    everything = GroupConfig(modalities=("text", "image", "video", "speech"))
    with pytest.raises(UserError, match="'a' and 'b' both serve image"):
        ModelConfig(vocab_size=4, groups={"a": everything, "b": GroupConfig(modalities=("image",))})
