import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows
from mmpt.vocab import Modality, Vocabulary

EXACT = {"atol": 1e-10, "rtol": 0.0}


def test_no_later_id_moves_an_earlier_logit(make_model, make_rows, run, router):
    model, rows = make_model(router), make_rows()
    before = model.logits(run(model, rows))
    cut = 30
    generator = torch.Generator().manual_seed(0)
    ids = rows.ids.clone()
    ids[:, cut:] = torch.randint(0, 20, ids[:, cut:].shape, generator=generator)
    modality = rows.modality.clone()
    modality[:, cut:] = torch.randint(0, 4, ids[:, cut:].shape, generator=generator)
    after = model.logits(run(model, rows, ids=ids, modality=modality))
    torch.testing.assert_close(after[:, :cut], before[:, :cut], **EXACT)
    assert (after[:, cut:] - before[:, cut:]).abs().max() > 1e-3


def test_a_packed_row_equals_its_documents_alone(make_model, make_rows, make_document, run, router):
    model = make_model(router)
    packed = run(model, make_rows())
    offset = 0
    for seed in range(2):
        alone = Rows.pack([[make_document(seed, 2 + seed)]], 60, 0)
        length = int((alone.document >= 0).sum())
        here = packed[0, offset : offset + length]
        torch.testing.assert_close(here, run(model, alone)[0, :length], **EXACT)
        offset += length


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_cached_decoding_equals_the_whole_pass(make_model, make_document, router, chunk):
    model, document = make_model(router), make_document(0)
    ids, modality = (torch.from_numpy(a).long()[None] for a in (document.ids, document.modality))
    cache = model.new_cache()
    parts = [
        model(i, modality=m, cache=cache)
        for i, m in zip(ids.split(chunk, 1), modality.split(chunk, 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, modality=modality), **EXACT)
    assert len(cache) == len(document)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_of_different_lengths_equal_the_singles(make_model, make_document, side):
    model = make_model()
    documents = [make_document(seed, 2 + 5 * seed) for seed in range(3)]
    longest = max(len(document) for document in documents)
    columns = torch.zeros(4, 3, longest + 1, dtype=torch.int64)  # ids, modality, position, document
    columns[3] = -1
    for row, document in enumerate(documents):
        first = longest - len(document) if side == "left" else 0
        place = slice(first, first + len(document))
        columns[0, row, place] = torch.from_numpy(document.ids)
        columns[1, row, place] = torch.from_numpy(document.modality).long()
        columns[2, row, place] = torch.arange(len(document))
        columns[2, row, longest] = len(document)  # one more id, behind the prompt or its pads
        columns[3, row, place] = columns[3, row, longest] = 0
    cache = model.new_cache()
    for part in (slice(0, longest), slice(longest, None)):
        ids, modality, position, doc = columns[:, :, part]
        batch = model(ids, modality=modality, position=position, document=doc, cache=cache)
    for row, document in enumerate(documents):
        ids, modality = (
            torch.from_numpy(a).long()[None] for a in (document.ids, document.modality)
        )
        zero = torch.zeros(1, 1, dtype=torch.int64)
        single = model(torch.cat((ids, zero), 1), modality=torch.cat((modality, zero), 1))
        torch.testing.assert_close(batch[row, -1], single[0, -1], **EXACT)


def test_a_reading_pass_leaves_the_cache_as_it_is(make_model, make_document):
    model, document = make_model(), make_document(0)
    ids, modality = (torch.from_numpy(a).long()[None] for a in (document.ids, document.modality))
    cache = model.new_cache()
    model(ids, modality=modality, cache=cache)
    new, text = torch.tensor([[3, 4]]), torch.zeros(1, 2, dtype=torch.int64)
    first = model(new, modality=text, cache=cache, append=False)
    model(new + 9, modality=text, cache=cache, append=False)
    assert len(cache) == len(document)
    assert torch.equal(model(new, modality=text, cache=cache, append=False), first)
    assert torch.equal(model(new, modality=text, cache=cache), first)
    assert len(cache) == len(document) + 2


def test_growing_noisy_groups_and_training_them_leaves_the_clean_pass_bit_equal(
    make_model, make_rows, run, router
):
    model, rows = make_model(router, noisy=False).float(), make_rows()
    with torch.no_grad():
        before = model.logits(run(model, rows))
    model.add_noisy_groups()
    trained = model.freeze_for_adaptation()
    assert 0 < sum(p.numel() for p in trained) < model.num_parameters
    with torch.no_grad():
        for parameter in trained:
            parameter += 1.0
        model.update_balance()
        assert torch.equal(model.logits(run(model, rows)), before)


def test_a_frozen_router_keeps_its_balance(make_model, make_rows, run):
    model = make_model()
    model.freeze_for_adaptation()
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("balance")}
    run(model, make_rows())
    assert model.expert_loads()["text"].any()
    model.update_balance()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)


def test_noisy_ids_start_out_computed_as_clean_ones(make_model, make_rows, run, router):
    model, rows = make_model(router, noisy=False), make_rows()
    clean = run(model, rows)
    model.add_noisy_groups()
    # every media id is called noisy, in a block that sees what a clean id sees
    media = rows.modality > 0
    block = torch.where(media, torch.arange(100), -1)
    noisy = run(model, rows, block=torch.where(media, block, -1), limit=rows.position)
    cut = int(media[0].int().argmax()) + 1  # later ids miss the earlier codes, which are not clean
    torch.testing.assert_close(noisy[:1, :cut], clean[:1, :cut], **EXACT)


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone(make_config):
    state = torch.get_rng_state()
    one, same, other = (Decoder.from_config(make_config(), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding, other.embedding)


def test_the_stream_does_not_grow_with_depth_and_scores_start_near_uniform(
    make_config, make_rows, run
):
    model = Decoder.from_config(make_config(num_layers=12, width=64))
    with torch.no_grad():
        scores = model.logits(run(model, make_rows()))
    assert scores.std() < 0.5


def test_autocast_keeps_scores_close_and_the_stream_in_float32(make_model, make_rows, run, router):
    model, rows = make_model(router).float(), make_rows()
    exact = run(model, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = run(model, rows)
        scores = model.logits(hidden)
    assert hidden.dtype == scores.dtype == torch.float32
    scores.logsumexp(-1).sum().backward()
    if router == "hard":  # elsewhere rounding may change a choice of experts
        assert (hidden - exact).abs().mean() < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_bf16_model_stays_bf16(make_model, make_rows, run):
    model = make_model().bfloat16()
    assert run(model, make_rows()).dtype == torch.bfloat16


def test_candidate_scores_are_columns_of_all_scores(make_model, make_rows, run):
    model = make_model(tie_embeddings=False)
    hidden, ids = run(model, make_rows()), torch.tensor([5, 2, 9])
    torch.testing.assert_close(model.logits(hidden, ids), model.logits(hidden)[..., ids])


def test_loads_are_readable_per_layer_group_and_expert(make_model, make_rows, run):
    model, rows = make_model(), make_rows()
    run(model, rows)
    loads = model.expert_loads()
    real = rows.document >= 0
    for name, modalities in (("text", [0]), ("visual", [1, 2]), ("speech", [3])):
        ids = (torch.isin(rows.modality, torch.tensor(modalities)) & real).sum()
        assert loads[name].shape == (2, 3)
        assert (loads[name].sum(1) == 2 * ids).all()
    assert not loads["noisy_visual"].any()
    model.update_balance()
    assert not model.expert_loads()["text"].any()


def test_active_parameters_are_what_a_hard_model_holds_for_one_modality(make_model):
    model = make_model("hard", noisy=False)
    experts = sum(
        p.numel() for layer in model.layers for p in layer.experts.groups["text"].parameters()
    )
    others = sum(p.numel() for n, p in model.named_parameters() if ".groups." not in n)
    assert model.num_active_parameters(Modality.TEXT) == experts + others
    assert model.flops_per_token(Modality.TEXT, context=10) > 2 * experts


def test_a_saved_model_computes_the_same(make_model, make_rows, run, tmp_path, vocabulary):
    model, rows = make_model(), make_rows()
    model.save(tmp_path / "model")
    loaded = Decoder.load(tmp_path / "model", vocabulary=vocabulary)
    assert loaded.config == model.config
    assert torch.equal(run(loaded, rows), run(model, rows))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def _edit(folder, **changes):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["model"].update(changes.pop("model", {}))
    path.write_text(json.dumps({**data, **changes}))


def test_what_cannot_be_loaded_is_refused_in_one_line(make_model, tmp_path):
    folder = tmp_path / "model"
    make_model().save(folder)
    other = Vocabulary.build(num_text=3, text_fingerprint="x", codebooks=[])
    refusals = [(lambda: Decoder.load(folder, vocabulary=other), "made with vocabulary")]
    _edit(folder, format_version=99)
    with pytest.raises(UserError, match="has format 99"):
        Decoder.load(folder)
    _edit(folder, format_version=1, model={"width": 32})
    refusals.append((lambda: Decoder.load(folder), "do not fit"))
    refusals.append((lambda: Decoder.load(tmp_path / "nowhere"), "holds no model"))
    for load, message in refusals:
        with pytest.raises(UserError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)
    _edit(folder, model={"width": 16, "widht": 3})
    with pytest.raises(UserError, match="did you mean 'width'"):
        Decoder.load(folder)
    make_model().save(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"no readable weights"):
        Decoder.load(folder)


def test_a_model_of_format_1_is_read_as_it_was(make_model, tmp_path):
    model = make_model()
    model.add_noisy_groups()
    model.save(tmp_path)
    config, tensors = model.config, load_file(tmp_path / "model.safetensors")
    old = {}
    for name, tensor in tensors.items():
        if name.endswith(("project_in", "noisy_in.up")):  # all queries, all keys, all values
            heads = tensor.view(config.num_kv_heads, -1, config.width_per_head, tensor.shape[1])
            tensor = torch.cat(
                [part.flatten(0, 2) for part in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])]
            )
        old[name.replace(".bank", "")] = tensor.flatten(2) if "gate_up" in name else tensor
    save_file(old, tmp_path / "model.safetensors")
    _edit(tmp_path, format_version=1)
    loaded = Decoder.load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
