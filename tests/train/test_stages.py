"""New rows first: until then nothing else moves, and a run that goes on does the same."""

import signal
from dataclasses import replace

import pytest
import torch

from mmpt.config import to_toml
from mmpt.model.transformer import Decoder
from mmpt.train.guard import Guard
from mmpt.train.pretrain import pretrainer, train


@pytest.fixture
def staged(another, recipe, config):
    """Recipes whose first three steps of six train new rows, while much would decay."""

    def make(kind="adamw", *, tied=False):
        return another(
            model=replace(config, tie_embeddings=tied),
            optim=replace(recipe.optim, weight_decay=0.5, kind=kind),
            steps=6,
            new_rows_first=3,
        )

    return make


def rows_moved(before, after):
    return (before != after).any(1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_new_rows_move_before_all_do(tmp_path, staged, vocabulary, tied, kind):
    trainer = pretrainer(staged(kind, tied=tied), tmp_path / "run", vocabulary=vocabulary)
    seen = [{n: t.clone() for n, t in trainer.model.state_dict().items()}]
    for _ in range(6):
        trainer.step()
        seen.append({n: t.clone() for n, t in trainer.model.state_dict().items()})
    trainer.close()
    first, third, last = seen[0], seen[3], seen[6]
    tables = {"embedding"} if tied else {"embedding", "head"}
    assert {n for n in first if not torch.equal(first[n], third[n])} == tables
    for name in tables:
        moved = rows_moved(first[name], third[name])
        assert not moved[: vocabulary.num_text].any()
        assert moved[vocabulary.num_text :].float().mean() > 0.1
        assert rows_moved(third[name], last[name])[: vocabulary.num_text].any()
    weights = dict(trainer.model.named_parameters())
    still = {n for n in weights if torch.equal(third[n], last[n])}
    assert not {n for n in still if "bank" in n or "project" in n or "norm" in n}


def test_a_staged_run_that_goes_on_ends_bit_equal(tmp_path, staged, vocabulary, tensors_equal):
    recipe = staged()

    def go(folder, *stops):
        def stop(metrics):
            if metrics["step"] in stops:
                signal.raise_signal(signal.SIGINT)

        result = train(
            recipe, tmp_path / folder, vocabulary=vocabulary, progress=False, on_step=stop
        )
        return result, Decoder.load(result.checkpoint).state_dict()

    whole = go("whole")[1]
    for step in (2, 3):  # within the first stage, and at its end
        assert not go(f"stopped-{step}", step)[0].finished
        assert tensors_equal(go(f"stopped-{step}")[1], whole)


def test_the_end_of_the_first_stage_is_no_spike(tmp_path, another, vocabulary, monkeypatch):
    monkeypatch.setattr("mmpt.train.guard.ENOUGH", 4)
    recipe = another(new_rows_first=6)
    trainer = pretrainer(recipe, tmp_path / "run", vocabulary=vocabulary)
    metrics = [trainer.step() for _ in range(10)]
    trainer.close()
    usual = Guard(recipe.guard)
    judged = [usual.judge({"the gradient": line["grad_norm"]}) for line in metrics[:7]]
    assert judged == [None] * 6 + ["the gradient spikes"]
    assert metrics[-1]["bad_steps"] == 0


def test_ranks_that_share_the_rows_hold_what_one_holds(
    tmp_path, staged, recipe, vocabulary, run_script
):
    vocabulary.save(tmp_path / "vocabulary.json")
    data = replace(recipe.data, streams=2)
    many = replace(staged(), data=data, vocabulary=str(tmp_path / "vocabulary.json"))
    (tmp_path / "recipe.toml").write_text(to_toml(many))
    run_script("staged.py", tmp_path / "recipe.toml", tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for before, after in (one, two):
        assert {n for n in before if not torch.equal(before[n], after[n])} == {"embedding", "head"}
        for name in ("embedding", "head"):
            assert not rows_moved(before[name], after[name])[: vocabulary.num_text].any()
    assert all(torch.allclose(one[1][name], two[1][name], atol=1e-5) for name in one[1])
