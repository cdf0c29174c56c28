"""The embedded sampler and the verbs that look at data sets."""

import hashlib
import json
from collections import Counter

import pytest

from mmpt import hub
from mmpt.config import UserError
from mmpt.data import inspect as verbs
from mmpt.data import sources
from mmpt.data.shards import Document, Quarantine, is_heldout, read_documents
from mmpt.data.verify import verify
from mmpt.parts import Audio, Image, Text, Video

SAMPLER = hub.shipped("data") / "sampler"
MAX_BYTES = 14_000_000


@pytest.fixture(scope="module")
def documents() -> dict[str, list[Document]]:
    """All documents of the sampler by split."""
    quarantine = Quarantine()
    read = {
        split: list(read_documents(sources.sampler_shards(split), quarantine))
        for split in ("train", "heldout")
    }
    assert quarantine.count == 0
    return read


def parts_of(documents: list[Document], kind: type) -> list:
    return [part for document in documents for part in document.parts if isinstance(part, kind)]


def test_the_splits_share_no_base_key_and_agree_with_is_heldout(documents):
    train, heldout = ({d.base for d in documents[split]} for split in ("train", "heldout"))
    assert train
    assert heldout
    assert not train & heldout
    assert not any(is_heldout(base) for base in train)
    assert all(is_heldout(base) for base in heldout)


def test_no_picture_and_no_spoken_prompt_is_in_both_splits(documents):
    pictures, transcripts = {}, {}
    for split, read in documents.items():
        pictures[split] = {part.pixels.tobytes() for part in parts_of(read, Image)}
        transcripts[split] = {
            document.parts[0].text.lower().strip(" .!,")
            for document in read
            if document.source == "prompts"
        }
    assert not pictures["train"] & pictures["heldout"]
    assert not transcripts["train"] & transcripts["heldout"]


def test_keys_are_unique(documents):
    keys = Counter(document.key for read in documents.values() for document in read)
    assert keys.most_common(1)[0][1] == 1


def test_every_medium_is_in_both_splits(documents):
    for read in documents.values():
        for kind in (Text, Image, Video, Audio):
            assert len(parts_of(read, kind)) >= 20, kind


def test_media_have_the_promised_shapes(documents):
    read = documents["train"] + documents["heldout"]
    assert {part.pixels.shape for part in parts_of(read, Image)} == {(64, 64, 3)}
    assert {part.frames.shape for part in parts_of(read, Video)} == {(17, 64, 64, 3)}
    assert {part.sample_rate for part in parts_of(read, Audio)} == {16_000}
    for part in parts_of(read, Audio):
        assert 0.3 < part.seconds <= 15
        assert 0.05 < abs(part.wave).max() < 0.999  # neither silent nor clipped


def test_pictures_and_clips_of_one_idea_share_their_base_key(documents):
    bases = {}
    for document in documents["train"] + documents["heldout"]:
        bases[document.key] = document.base
    clips = [key for key in bases if key.endswith("-clip")]
    assert len(clips) >= 100
    assert all(bases[key] == bases[key.removesuffix("-clip")] for key in clips)


def test_interleaved_pages_keep_their_order(documents):
    pages = [d for d in documents["train"] if d.source == "handbook"]
    assert {document.order for document in pages} == {"fixed"}
    assert all({Text, Image} == {type(part) for part in document.parts} for document in pages)


def test_the_sampler_is_small_and_says_where_it_comes_from():
    files = [path for path in SAMPLER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    attribution = json.loads((SAMPLER / "ATTRIBUTION.json").read_text())
    described = {shard["shard"]: shard for shard in attribution["shards"]}
    assert set(described) == {path.name for path in sources.sampler_shards()}
    for name, shard in described.items():
        assert hashlib.sha256((SAMPLER / name).read_bytes()).hexdigest() == shard["sha256"]
    for origin in attribution["sources"].values():
        assert all({"package", "license", "copyright", "changes"} <= set(item) for item in origin)
    assert "CC-BY-SA-3.0" in (SAMPLER / "LICENSES" / "asterisk-core-sounds-en-g722.txt").read_text()


def test_the_card_of_the_sampler_has_the_counts_of_the_attribution():
    shards = json.loads((SAMPLER / "ATTRIBUTION.json").read_text())["shards"]
    table = sources.load_script("sampler").count_table(shards)
    assert table in (SAMPLER / "README.md").read_text()


def test_every_data_set_has_a_script_with_a_licence_and_a_card():
    found = sources.list_sources()
    assert {source.name for source in found} == {
        "emoji",
        "gridworld",
        "handbook",
        "instructions",
        "prompts",
        "sampler",
        "stamps",
        "voices",
    }
    for source in found:
        card = (hub.shipped("data") / source.name / "README.md").read_text()
        assert source.summary
        assert source.license
        assert f"mmpt data prepare {source.name}" in card
    assert [source.name for source in found if source.shards] == ["sampler"]


def test_inspect_counts_what_the_attribution_says():
    shards = sources.sampler_shards("heldout")
    counts = verbs.inspect(shards)
    attribution = json.loads((SAMPLER / "ATTRIBUTION.json").read_text())["shards"]
    rows = [row for row in attribution if "-heldout-" in row["shard"]]
    assert counts["bad_samples"] == 0
    assert counts["samples"] == counts["documents"] == sum(row["documents"] for row in rows)
    assert set(counts["modalities"]) == {"text", "image", "video", "audio"}
    for name, key in (("text", "bytes"), ("image", "parts"), ("audio", "seconds")):
        total = sum(row["modalities"].get(name, {}).get(key, 0) for row in rows)
        assert counts["modalities"][name][key] == pytest.approx(total)
    json.dumps(counts)


def test_an_absent_shard_is_named_before_any_progress_is_shown(tmp_path, capsys):
    whole = sources.sampler_shards("heldout")[-1]
    for verb in (verify, verbs.inspect):
        with pytest.raises(UserError, match="no shard at"):
            verb([whole, tmp_path / "absent.tar"])
        assert capsys.readouterr().err == ""


def test_list_names_what_is_here():
    rows = {row["name"]: row for row in verbs.list_datasets()["sets"]}
    assert rows["sampler"]["bytes"] > 1_000_000
    assert rows["stamps"]["shards"] == []


def test_an_unknown_data_set_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(UserError, match="choose one of emoji"):
        verbs.prepare("emojis", out=tmp_path)


def test_no_shards_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match="name one or more"):
        verbs.inspect([])
