"""Models go to a hub and come back: over HTTP, against a small hub that keeps what it is given."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants

import mmpt
from mmpt import hub
from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import Processor
from mmpt.train.export import export
from tests.hub_server import Hub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, and an empty cache."""
    made = Hub()
    # constants that the library reads from the environment when it is imported
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        made.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.utils.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def model_folder(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model; its tokenizers stand elsewhere on this machine."""
    vocabulary = processor.vocabulary
    config = ModelConfig(
        vocab_size=len(vocabulary),
        width=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=32,
        vocabulary=vocabulary.fingerprint,
    )
    model = Decoder.from_config(config)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, processor, folder)
    return folder


@pytest.fixture
def pushed(server: Hub, model_folder: Path) -> Hub:
    """A hub that holds the model as `cats/tiny`."""
    Pipeline.load(model_folder).push_to_hub("cats/tiny", license="apache-2.0")
    return server


def test_what_was_pushed_comes_back_equal(pushed: Hub, model_folder: Path) -> None:
    ours = Pipeline.load(model_folder)
    theirs = mmpt.load("cats/tiny")
    assert theirs.fingerprint == ours.fingerprint
    assert theirs.processor.vocabulary.fingerprint == ours.processor.vocabulary.fingerprint
    settings = {"to": "text", "max_ids": 4}
    assert theirs("a cat", **settings).ids.tolist() == ours("a cat", **settings).ids.tolist()
    for codec in theirs.processor.media.values():  # those that went along, not those left behind
        assert codec.folder is not None
        assert "cache" in codec.folder.parts


def test_the_card_says_what_the_folder_says(pushed: Hub, model_folder: Path) -> None:
    [*_, files] = pushed.repositories["cats/tiny"].commits.values()
    text = files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.pipeline_tag) == ("mmpt", "any-to-any")
    assert card.data.tags == ["mmpt", "text", "image", "video", "speech"]
    model = Pipeline.load(model_folder)
    assert f"{model.model.num_parameters:,}" in text
    assert model.fingerprint in text
    assert model.processor.vocabulary.fingerprint in text
    assert 'mmpt.load("cats/tiny")' in text
    assert "| speech | speech | not stated |" in text
    assert str(model_folder.parent) not in str(files)  # no path of this machine


def test_what_is_here_is_opened_without_network(pushed: Hub) -> None:
    mmpt.load("cats/tiny")
    asked = len(pushed.requests)
    mmpt.load("cats/tiny")
    assert len(pushed.requests) == asked
    pushed.close()
    mmpt.load("cats/tiny")


def test_a_fetch_that_was_cut_off_goes_on(pushed: Hub) -> None:
    folder = hub.fetch(hub.HubName("cats/tiny"))
    (folder / "model.safetensors").unlink()
    assert (hub.fetch(hub.HubName("cats/tiny")) / "model.safetensors").is_file()


def test_a_card_that_others_looked_at_is_no_model(pushed: Hub) -> None:
    huggingface_hub.hf_hub_download("cats/tiny", "README.md")
    huggingface_hub.hf_hub_download("cats/tiny", "config.json")
    assert mmpt.load("cats/tiny").fingerprint


def test_a_revision_stays_what_it_was(pushed: Hub, model_folder: Path) -> None:
    kept = pushed.repositories["cats/tiny"]
    first = kept.refs["main"]
    kept.refs["v1"] = first
    before = mmpt.load("cats/tiny").fingerprint
    changed = Pipeline.load(model_folder)
    with torch.no_grad():
        next(changed.model.parameters()).add_(1)
    changed.push_to_hub("cats/tiny")
    changed.push_to_hub("cats/tiny", revision="other")
    assert set(kept.refs) == {"main", "v1", "other"}
    for pinned in ({"revision": "v1"}, {"revision": first}):
        assert mmpt.load("cats/tiny", **pinned).fingerprint == before
    assert mmpt.load(f"cats/tiny@{first}").fingerprint == before
    assert mmpt.load("cats/tiny").fingerprint == before  # what was fetched stays
    newest = Pipeline.from_pretrained("cats/tiny", force_download=True)
    assert newest.fingerprint == mmpt.load("cats/tiny@other").fingerprint != before


def test_a_branch_is_asked_for_whole_names_only(pushed: Hub) -> None:
    kept = pushed.repositories["cats/tiny"]
    files = kept.commits[kept.refs["main"]]
    kept.commit(files | {"weights.bin": b"\x80", "run.py": b"1/0", "big.parquet": b"0"})
    folder = hub.fetch(hub.HubName("cats/tiny"))
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == set(files) - {".gitattributes"}


def test_another_push_takes_away_what_is_no_more(pushed: Hub, model_folder: Path) -> None:
    kept = pushed.repositories["cats/tiny"]
    kept.commit(kept.commits[kept.refs["main"]] | {"old/config.json": b"{}", "notes.txt": b"mine"})
    Pipeline.load(model_folder).push_to_hub("cats/tiny")
    assert "old/config.json" not in kept.commits[kept.refs["main"]]
    assert "notes.txt" in kept.commits[kept.refs["main"]]  # nothing of ours


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cats/none", "no cats/none at"),
        ("cats/tiny@v9", "has no revision 'v9'"),
        ("cats/gated", "asks for consent"),
        ("cats/empty", "holds no config.json"),
        ("cats/large", "bytes; not fetched"),
        ("cats/huge", "left"),
        ("cats/thief", "names a tokenizer outside of it"),
        ("cats/ti--ny", "no name on a hub"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(pushed: Hub, name: str, says: str) -> None:
    repositories = pushed.repositories
    kept = repositories["cats/tiny"]
    files = kept.commits[kept.refs["main"]]
    for other in ("gated", "empty", "large", "huge", "thief"):
        repositories[f"cats/{other}"] = type(kept)()
    repositories["cats/gated"].commit(files)
    pushed.gated.add("cats/gated")
    repositories["cats/empty"].commit({"model.bin": b"\x80", "README.md": b"# no"})
    repositories["cats/large"].commit(files)
    repositories["cats/huge"].commit(files)
    if name == "cats/large":
        pushed.claimed["vocabulary.json"] = 1 << 30
    if name == "cats/huge":
        pushed.claimed["model.safetensors"] = 1 << 60
    settings = json.loads(files["processor.json"]) | {"tokenizers": ["./../../secrets"]}
    repositories["cats/thief"].commit(files | {"processor.json": json.dumps(settings).encode()})
    with pytest.raises(UserError, match=says) as caught:
        mmpt.load(name)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_line(server: Hub) -> None:
    server.close()
    with pytest.raises(UserError, match="is out of reach") as caught:
        mmpt.load("cats/tiny")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=server.url):
        hub.push(Path(), hub.HubName("cats/tiny"))


def test_a_mistyped_folder_is_not_asked_for(server: Hub, model_folder: Path) -> None:
    Path("runs").mkdir()
    with pytest.raises(UserError, match="no model at runs/tiny"):
        mmpt.load("runs/tiny")
    with pytest.raises(UserError, match="no model at"):
        mmpt.load("/nowhere/tiny")
    with pytest.raises(UserError, match="is of a hub"):
        mmpt.load(str(model_folder), revision="v1")
    with pytest.raises(UserError, match="give one of the two"):
        mmpt.load("cats/tiny@v1", revision="v2")
    assert server.requests == []


def test_a_wrong_name_is_not_pushed_to(server: Hub, model_folder: Path) -> None:
    for name in ("tiny", "a/b/c", "../tiny", "cats/tiny@"):
        assert main(["push", str(model_folder), name]) == 2
    assert main(["push", "nothing", "cats/tiny"]) == 2
    assert [request for request in server.requests if "POST" in request] == []


def test_a_private_model_does_not_become_public(pushed: Hub, model_folder: Path) -> None:
    before = dict(pushed.repositories["cats/tiny"].refs)
    with pytest.raises(UserError, match="there and public"):
        Pipeline.load(model_folder).push_to_hub("cats/tiny", private=True)
    assert pushed.repositories["cats/tiny"].refs == before
    Pipeline.load(model_folder).push_to_hub("cats/other", private=True)
    assert pushed.repositories["cats/other"].private


def test_a_card_of_ones_own_is_kept(model_folder: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(model_folder)
    pipeline.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "README.md").write_text("# mine\n")
    mmpt.load(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == "# mine\n"
    pipeline.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == "# mine\n"


def test_a_card_of_an_export_gets_a_name_and_a_licence(
    server: Hub, model_folder: Path, tmp_path: Path
) -> None:
    Pipeline.load(model_folder).save_pretrained(tmp_path / "made")
    path = tmp_path / "made" / "README.md"
    assert ModelCard(path.read_text()).data.license == "unknown"
    path.write_text(path.read_text() + "\nMore that I know.\n")
    words = ["push", str(tmp_path / "made"), "cats/tiny", "--license", "mit"]
    assert main(words) == 0
    card = (hub.fetch(hub.HubName("cats/tiny")) / "README.md").read_text()
    assert ModelCard(card).data.license == "mit"
    assert 'mmpt.load("cats/tiny")' in card
    assert "More that I know." in card


def test_a_saved_folder_can_be_moved(model_folder: Path, tmp_path: Path) -> None:
    Pipeline.load(model_folder).save_pretrained(tmp_path / "made")
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    assert Pipeline.load(moved).fingerprint == Pipeline.load(model_folder).fingerprint
    assert json.loads((moved / "processor.json").read_text())["tokenizers"][0] == "./text"


def test_an_export_has_a_card_and_the_recipe(model_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = run / "checkpoints" / "step-00000001"
    Pipeline.load(model_folder).save_pretrained(step)
    (step / "README.md").unlink()
    recipe = 'seed = 0\nsources = ["/home/me/secret/shards", "~/tokens"]\nname = "a/b"\n'
    (run / "recipe.toml").write_text(recipe)
    export(run, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'sources = ["shards", "tokens"]\nname = "a/b"' in card
    assert "/home" not in card
    assert ModelCard(card).data.library_name == "mmpt"


def test_a_tokenizer_is_pushed_and_opened(server: Hub, zoo: Path) -> None:
    assert main(["push", str(zoo / "speech"), "cats/speech", "--json"]) == 0
    codec = mmpt.tokenizers.load("cats/speech")
    assert codec.fingerprint == mmpt.tokenizers.load(str(zoo / "speech")).fingerprint


def test_the_command_line_pushes_and_opens(server: Hub, model_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(mmpt.__file__).parents[1]),
    }
    environment.pop("HF_HUB_OFFLINE", None)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mmpt", *arguments]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    done = run("push", str(model_folder), "cats/cli", "--private", "--revision", "v1", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["to"] == "cats/cli@v1"
    assert told["commit"].startswith(server.url)
    assert server.repositories["cats/cli"].private
    made = run("generate", "cats/cli@v1", "a", "--to", "text")
    assert made.returncode == 0, made.stderr
    wrong = run("generate", "cats/nothing", "a", "--to", "text")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
