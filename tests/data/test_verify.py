"""`mmpt data verify`: every damage is listed, and a repaired copy has none."""

import json

import pytest

from mmpt.config import UserError
from mmpt.data import sources
from mmpt.data.index import build_index, save_index
from mmpt.data.shards import Quarantine, Record, read_documents, write_shard
from mmpt.data.tars import read_samples
from mmpt.data.verify import verify
from tests.data.test_shards import make_shard


def test_verify_finds_damage_and_documents_of_the_wrong_split(tmp_path):
    whole = sources.sampler_shards("heldout")[-1]
    good = verify([whole])
    assert (good["ok"], good["exit_status"]) == (True, 0)
    wrong = tmp_path / "x-train-0000.tar"
    wrong.write_bytes(whole.read_bytes()[:-20_000])
    result = verify([wrong])
    assert (result["ok"], result["exit_status"]) == (False, 1)
    assert result["reasons"]["truncated"] >= 1
    assert result["reasons"]["wrong split"] == result["documents"]
    json.dumps(result)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_repaired_copy_holds_what_is_whole_byte_by_byte(tmp_path, indexed):
    path = make_shard(tmp_path / "a.tar", 6)
    before = {sample.key: sample.members for sample in read_samples(path)}
    if indexed:
        save_index(build_index(path))
    data = bytearray(path.read_bytes())
    third = data.index(b"doc2.1.webp")
    data[third + 600 : third + 700] = bytes(100)  # in the picture
    fifth = data.index(b"doc4.json")
    data[fifth + 148 : fifth + 156] = b"notasum!"
    path.write_bytes(data)
    result = verify([path], repair=tmp_path / "clean")
    assert result["exit_status"] == 1
    assert result["indexed"] == indexed
    if indexed:
        assert result["documents"] + result["bad_samples"] == 6
    [copy] = result["repaired"]
    clean = verify([tmp_path / "clean" / "a.tar"])
    assert (clean["ok"], clean["documents"]) == (True, result["documents"])
    after = {sample.key: sample.members for sample in read_samples(copy)}
    assert set(before) - {"doc2", "doc4"} <= set(after)
    assert all(before[key] == members for key, members in after.items())


def test_a_copy_leaves_out_documents_of_the_wrong_split(tmp_path):
    parts = ({"type": "text", "text": "a"},)
    records = [Record(f"k{n}", f"k{n}", "any", parts, "test", "MIT") for n in range(30)]
    path = tmp_path / "x-train-0000.tar"
    write_shard(path, records)
    result = verify([path], repair=tmp_path / "clean")
    assert set(result["reasons"]) == {"wrong split"}
    copy = tmp_path / "clean" / path.name
    assert verify([copy])["ok"]
    assert len(list(read_documents([copy], Quarantine()))) == 30 - result["bad_samples"]


def test_what_is_whole_is_not_copied_and_a_shard_is_not_written_over(tmp_path):
    path = make_shard(tmp_path / "a.tar")
    assert verify([path], repair=tmp_path)["repaired"] == []
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(UserError, match="itself; give another folder"):
        verify([path], repair=tmp_path)


def test_bytes_that_no_sample_owns_are_held_to_the_index(tmp_path):
    path = make_shard(tmp_path / "a.tar")
    save_index(build_index(path))
    assert verify([path])["ok"]
    path.write_bytes(path.read_bytes() + bytes(1024))
    result = verify([path])
    assert result["reasons"] == {"changed": 1}
    assert result["documents"] == 4
