"""Small random text models, as transformers saves them, with a tokenizer of 270 pieces."""

import json

import pytest
import torch

from mmpt.tokenizers.text import TextCodec

NUM_TEXT, ROWS = 272, 280  # pieces and special tokens; rows of the models, some of them padding
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 270,
    "eos_token_id": 271,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> model_type and what differs from the sizes above
KINDS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 6}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "olmoe": ("olmoe", EXPERTS),
    "olmoe-renormalised": ("olmoe", EXPERTS | {"norm_topk_prob": True}),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads that wait for each other make tiny tensors slow where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _peer(kind):
    """A model of transformers whose every weight matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = KINDS[kind]
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    peer = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return peer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The path of a tokenizer.json with two special tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    learnt = TextCodec.train_on(["a red apple on a red table"] * 20, num_text=280)
    learnt.tokenizer.add_special_tokens(["<s>", "</s>"])
    learnt.tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def peers(tmp_path_factory, tokenizer):
    """kind -> a model of transformers and the folder where it was saved, made when asked for."""
    pytest.importorskip("transformers", reason="transformers is not installed: mmpt[eval]")
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            peer = _peer(kind)
            peer.save_pretrained(folder)
            (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
            made[kind] = peer, folder
        return made[kind]

    return get


@pytest.fixture
def edit():
    """Changes entries of the config.json of a folder; "absent" removes one."""

    def change(folder, **changes):
        data = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in data.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(kept))

    return change
