"""A text model of others becomes one of ours: equal over text, ready for media."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.convert.extend import draw_rows
from mmpt.convert.init import init
from mmpt.convert.text_model import read_text_model
from mmpt.model.transformer import Decoder
from mmpt.pipeline import Pipeline
from mmpt.processor import Processor
from mmpt.tokenizers.text import TextCodec
from mmpt.train.pretrain import train
from mmpt.train.recipe import TrainRecipe, load_run_recipe
from mmpt.vocab import Vocabulary

from .conftest import KINDS, NUM_TEXT

MEDIA = ("image", "video", "speech")


@pytest.fixture
def codecs(zoo):
    return [str(zoo / name) for name in MEDIA]


@pytest.fixture
def start(peers, codecs, tmp_path):
    """Makes a model folder of a kind."""

    def make(kind, **options):
        _, folder = peers(kind)
        told = init(from_=folder, out=tmp_path / "start", codecs=codecs, **options)
        return tmp_path / "start", told

    return make


def text_logits(model, ids):
    with torch.no_grad():
        return model.logits(model(ids, modality=torch.zeros_like(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_over_text_are_those_of_transformers(kind, peers, start):
    ids = torch.randint(NUM_TEXT, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = peers(kind)[0](ids).logits[..., :NUM_TEXT]
    folder, _ = start(kind)
    ours = text_logits(Decoder.load(folder).eval(), ids)[..., :NUM_TEXT]
    assert theirs.std() > 0.5  # the weights are no small noise
    assert (ours - theirs).abs().max() < 1e-4


def test_shared_experts_serve_all_media_and_compute_the_same(start, peers):
    folder, told = start("olmoe", shared=True)
    assert told["groups"] == {"all": 4}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = peers("olmoe")[0](ids).logits[..., :NUM_TEXT]
    ours = text_logits(Decoder.load(folder).eval(), ids)[..., :NUM_TEXT]
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmoe"])
def test_media_begin_with_the_experts_of_text(kind, start):
    model = Decoder.load(start(kind)[0])
    for layer in model.layers:
        text, *others = layer.experts.experts()
        for other in others:
            for name, tensor in text.state_dict().items():
                assert torch.equal(tensor, other.state_dict()[name])
                assert tensor.data_ptr() != other.state_dict()[name].data_ptr()


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_new_rows_are_drawn_by_the_seed_and_begin_and_end_are_known(kind, start, tmp_path):
    folder, told = start(kind)
    again = read_rows(folder)
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    assert told["ids"] == len(vocabulary) == len(again["embedding"])
    assert ("head" in again) == (kind == "llama")
    for rows in again.values():
        assert torch.equal(rows[vocabulary.structure_id("<bod>")], rows[270])
        assert torch.equal(rows[vocabulary.structure_id("<eod>")], rows[271])
    shutil.rmtree(folder)
    other = read_rows(start(kind, seed=1)[0])
    for name, rows in again.items():
        assert torch.equal(rows[:NUM_TEXT], other[name][:NUM_TEXT])
        assert not torch.equal(rows[NUM_TEXT:], other[name][NUM_TEXT:])


def read_rows(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: tensors[name] for name in ("embedding", "head") if name in tensors}


def test_drawn_rows_have_the_mean_and_the_covariance_of_the_old():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    new = draw_rows(old, 40_000, seed=0)
    assert torch.allclose(new.mean(0), old.mean(0), atol=0.1)
    assert torch.allclose(
        new.T.cov(), old.T.cov(correction=0), atol=0.04 * float(old.T.cov().max())
    )
    few = draw_rows(old[:3], 100, seed=0)  # fewer rows than directions
    assert torch.isfinite(few).all()
    assert torch.linalg.svdvals(few - few.mean(0))[2] < 0.05 * torch.linalg.svdvals(few)[0]


def test_several_files_and_older_settings_read_alike(peers, tmp_path, edit):
    peer, folder = peers("llama-tied")
    want = read_text_model(folder)
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 2
    edit(
        tmp_path,
        rope_parameters="absent",
        rope_theta=10_000,
        rope_scaling=None,
        tie_word_embeddings="absent",
        head_dim="absent",
    )
    again = read_text_model(tmp_path)
    assert again.config == replace(want.config, head_width=0)
    assert again.tensors.keys() == want.tensors.keys()
    assert all(torch.equal(t, want.tensors[n]) for n, t in again.tensors.items())
    edit(tmp_path, rope_scaling={"rope_type": "default", "partial_rotary_factor": 0.5})
    with pytest.raises(UserError, match="turned in part only"):
        read_text_model(tmp_path)


def test_the_folder_can_be_moved_and_generates(peers, codecs, tmp_path, capsys):
    options = ["--codecs", *codecs, "--out", str(tmp_path / "start"), "--json"]
    assert main(["init", "--from", str(peers("qwen2")[1]), *options]) == 0
    assert json.loads(capsys.readouterr().out)["text_ids"] == NUM_TEXT
    moved = (tmp_path / "start").rename(tmp_path / "moved")
    result = Pipeline.load(moved)("a red", to="text", max_ids=4)
    assert isinstance(result.parts[0].text, str)
    assert Pipeline.load(moved).processor.settings.tokenizers[0] == str(moved / "tokenizer")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmoe"])
def test_a_training_step_with_images_and_speech(kind, start, tmp_path, write_shard, documents):
    folder, _ = start(kind)
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    write_shard(tmp_path / "a.tokens.tar", documents(folder), vocabulary=vocabulary)
    (tmp_path / "recipe.toml").write_text(
        f'vocabulary = "{folder}/vocabulary.json"\nstart = "{folder}"\nsteps = 1\n'
        f'[data]\nrows = 2\nlength = 96\nsources.a.shards = ["{tmp_path}/a.tokens.tar"]\n'
    )
    recipe, vocabulary = load_run_recipe(TrainRecipe, tmp_path / "recipe.toml")
    result = train(recipe, tmp_path / "run", vocabulary=vocabulary, progress=False)
    assert {"text", "image", "speech"} <= result.last["modality"].keys()
    assert result.counters.bad_steps == 0
    before, after = (Decoder.load(f).state_dict() for f in (folder, result.checkpoint))
    for group in ("text", "visual", "speech"):
        name = f"layers.1.experts.groups.{group}.bank.down"
        assert not torch.equal(before[name], after[name])
    assert Processor.from_folder(result.checkpoint).vocabulary == vocabulary


@pytest.fixture
def documents():
    """Pictures and sounds with words, as the codecs of a folder encode them."""
    from mmpt.data.tokens import EncodedDocument
    from mmpt.parts import Audio, Image, Text

    def make(folder):
        processor, rng = Processor.from_folder(folder), np.random.default_rng(0)
        made = []
        for number in range(12):
            picture = Image(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
            sound = Audio(rng.normal(size=4000).astype(np.float32) * 0.1, 16_000)
            segments = processor.encode_parts([Text("a red apple"), picture, sound])
            made.append(EncodedDocument(f"d{number}", f"d{number}", "any", segments))
        return made

    return make


def test_special_tokens_are_never_written_by_users(tokenizer):
    codec = TextCodec.read(tokenizer)
    assert codec.codebook_size == NUM_TEXT
    codes = codec.encode("<s>a red</s>")
    assert codes.max() < 270
    assert codec.decode(codes) == "<s>a red</s>"
    stream = codec.stream()
    parts = [stream.push("<s>a "), stream.push("red</s>"), stream.flush()]
    assert torch.equal(torch.cat(parts), codes)


REFUSED = {
    "model_type": ("gpt2", "model_type = 'gpt2' is not supported; use one of llama"),
    "hidden_act": ("gelu", "hidden_act = 'gelu' is not supported"),
    "attention_bias": (True, "attention_bias = True is not supported"),
    "quantization_config": ({"bits": 4}, "quantization_config"),
    "sliding_window": (4096, "sliding_window = 4096 is not supported"),
    "layer_types": (["full_attention", "linear_attention"], "a layer of type 'linear_attention'"),
    "rope_parameters": ({"rope_type": "yarn", "factor": 4.0}, "rope_type = 'yarn'"),
    "rope_scaling": ({"rope_type": "llama3", "factor": 4.0}, "low_freq_factor is missing"),
    "hidden_size": (1 << 40, "hidden_size = 1099511627776; it must be from 1"),
    "num_hidden_layers": ("2", "num_hidden_layers = '2'; it must be"),
    "vocab_size": (1 << 20, r"embed_tokens.weight is F32 \(280, 16\); its config.json needs"),
    "num_attention_heads": (None, "num_attention_heads is missing"),
    "rms_norm_eps": (-1, "rms_norm_eps = -1; it must be a number above 0"),
    "intermediate_size": (25, "needs F32 or BF16 or F16"),
    "eos_token_id": ("x", "eos_token_id = 'x' is no id"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_supported_is_one_line(key, peers, tmp_path, edit):
    shutil.copytree(peers("llama")[1], tmp_path / "copy")
    value, message = REFUSED[key]
    changes = {"rope_parameters": None} if key == "rope_scaling" else {}
    edit(tmp_path / "copy", **changes, **{key: value})
    with pytest.raises(UserError, match=message) as error:
        read_text_model(tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_broken_folders_are_one_line(peers, tmp_path, tokenizer, codecs):
    folder = tmp_path / "copy"
    shutil.copytree(peers("llama")[1], folder)
    weights = load_file(folder / "model.safetensors")

    def refused(message, act=lambda: read_text_model(folder)):
        with pytest.raises(UserError, match=message) as error:
            act()
        assert "\n" not in str(error.value)

    def write(tensors):
        save_file(tensors, folder / "model.safetensors")

    write({n: t.bfloat16() for n, t in weights.items()})
    assert {t.dtype for t in read_text_model(folder).tensors.values()} == {torch.bfloat16}
    write({n: t for n, t in weights.items() if "1.mlp.up" not in n})
    refused("model.layers.1.mlp.up_proj.weight is missing")
    write(weights | {"model.layers.1.self_attn.sinks": torch.zeros(4)})
    refused("self_attn.sinks is no part of this kind of model")
    write(weights | {"model.norm.weight": torch.zeros(16, dtype=torch.int64)})
    refused(r"model.norm.weight is I64 \(16,\)")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    refused("has no readable weights")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin is a pickle, which is never read")
    index = folder / "model.safetensors.index.json"
    for name in ("../other.safetensors", "weights.bin"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused("no safetensors file beside it")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refused("has no readable weights")
    for text, message in (("[]", "holds no table"), ("{", "is no JSON")):
        (folder / "config.json").write_text(text)
        refused(message)
    refused("cannot read", lambda: read_text_model(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    refused("not empty", lambda: init(from_=folder, out=tmp_path / "full", codecs=codecs))


def test_tokenizers_that_would_not_do_are_one_line(peers, tmp_path, codecs):
    from tokenizers import Tokenizer, models, normalizers

    folder = tmp_path / "copy"
    shutil.copytree(peers("llama")[1], folder)
    path = folder / "tokenizer.json"

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            init(from_=folder, out=tmp_path / "out", codecs=codecs)
        assert "\n" not in str(error.value)

    many = Tokenizer.from_file(str(path))
    many.add_special_tokens([f"<{n}>" for n in range(9)])
    many.save(str(path))
    refused("the tokenizer has 281 ids, the model 280")
    shutil.rmtree(tmp_path / "out")
    many.normalizer = normalizers.Lowercase()
    many.save(str(path))
    refused("changes texts")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    refused("is a WordLevel tokenizer")
    path.write_text("{")
    refused("cannot be read")
    path.unlink()
    refused("cannot read")
