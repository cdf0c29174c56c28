"""A vocabulary with dead codes, documents of every medium, and decoders in float64."""

import numpy as np
import pytest
import torch

from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows, StreamBuilder
from mmpt.vocab import Modality, Vocabulary

ROUTERS = ("hard", "token_choice", "shared")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads that wait for each other make tiny tensors slow where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vocabulary() -> Vocabulary:
    """Text of 20 ids, 12 visual codes of which 10 are used, 6 speech codes."""
    used = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    return Vocabulary.build(
        num_text=20,
        text_fingerprint="text",
        codebooks=[
            ("visual", 12, {"image": "image", "video": "video"}, used),
            ("speech", 6, {"speech": "speech"}, None),
        ],
    )


@pytest.fixture(params=ROUTERS)
def router(request):
    return request.param


def build_config(vocabulary: Vocabulary, router: str = "token_choice", **changes) -> ModelConfig:
    """Two layers; `shared` is one group of four experts for all media."""
    choice = {"num_experts": 3, "num_active": 2, "router": "token_choice"}
    options = {} if router == "hard" else choice
    groups = {
        "text": GroupConfig(modalities=("text",), **options),
        "visual": GroupConfig(modalities=("image", "video"), **options),
        "speech": GroupConfig(modalities=("speech",), **options),
    }
    if router == "shared":
        everything = ("text", "image", "video", "speech")
        groups = {"all": GroupConfig(modalities=everything, **choice)}
    sizes = {"width": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "expert_hidden": 12}
    options = {"vocab_size": len(vocabulary), "groups": groups, **sizes, **changes}
    return ModelConfig(vocabulary=vocabulary.fingerprint, **options)


def build_model(
    vocabulary: Vocabulary, router: str = "token_choice", *, noisy: bool = True, **changes
) -> Decoder:
    """float64, with weights so large that every route and every low-rank weight matters."""
    model = Decoder.from_config(build_config(vocabulary, router, **changes), seed=1).double()
    if noisy:
        model.add_noisy_groups()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += noise * (1.0 if "router" in name else 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("balance"):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
    return model


@pytest.fixture
def make_model(vocabulary):
    return lambda router="token_choice", **options: build_model(vocabulary, router, **options)


@pytest.fixture
def make_config(vocabulary):
    return lambda router="token_choice", **changes: build_config(vocabulary, router, **changes)


@pytest.fixture
def make_document(vocabulary):
    """A document with every medium: 46 ids and `num_text` more."""
    used = np.array(vocabulary.ranges[0].used)

    def make(seed: int, num_text: int = 3):
        rng = np.random.default_rng(seed)
        builder = StreamBuilder(vocabulary).structure("<bod>").text(rng.integers(0, 20, num_text))
        builder.media(Modality.IMAGE, rng.choice(used, (2, 3))).text(rng.integers(0, 20, 2))
        builder.media(Modality.SPEECH, rng.integers(0, 6, 4))
        builder.media(Modality.VIDEO, rng.choice(used, (2, 2, 2))).text(rng.integers(0, 20, 1))
        return builder.media(Modality.IMAGE, rng.choice(used, (1, 3))).structure("<eod>").build()

    return make


@pytest.fixture
def make_rows(vocabulary, make_document):
    """Two rows of two documents and one, with pads."""

    def make(length: int = 100) -> Rows:
        documents = [make_document(seed, 2 + seed) for seed in range(3)]
        pad = vocabulary.structure_id("<pad>")
        return Rows.pack([documents[:2], documents[2:]], length, pad)

    return make


@pytest.fixture
def run():
    """Hidden states of rows."""

    def call(model: Decoder, rows: Rows, **changes) -> torch.Tensor:
        columns = {name: getattr(rows, name) for name in ("modality", "position", "document")}
        columns["axes"] = model.axes_of(rows)
        return model(changes.pop("ids", rows.ids), **{**columns, **changes})

    return call
