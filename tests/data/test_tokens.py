import io
import tarfile

import numpy as np
import pytest
import webdataset

from mmpt.config import UserError
from mmpt.data.tokens import EncodedDocument, ShardWriter, TokenShard, open_shards
from mmpt.stream import Segment
from mmpt.vocab import Modality


def assert_equal(ours: EncodedDocument, theirs: EncodedDocument) -> None:
    assert (ours.key, ours.base, ours.order) == (theirs.key, theirs.base, theirs.order)
    assert len(ours.segments) == len(theirs.segments)
    for one, other in zip(ours.segments, theirs.segments, strict=True):
        assert one.modality == other.modality
        assert one.codes.shape == other.codes.shape
        assert np.array_equal(one.codes, other.codes)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("number", [0, 1, 7, 8, 50])
def test_documents_come_back_as_they_were_written(tmp_path, make_documents, write_shard, number):
    documents = make_documents(number)
    shard = TokenShard(write_shard(tmp_path / "a.tokens.tar", documents))
    assert len(shard) == number
    for document, back in zip(documents, shard, strict=True):
        assert_equal(document, back)
    assert sum(shard.counts.values()) == sum(document.num_codes for document in documents)
    assert shard.separator.tolist() == [10]


def test_codes_are_stored_in_the_smallest_type_and_found_in_place(
    tmp_path, make_documents, write_shard
):
    path = write_shard(tmp_path / "a.tokens.tar", make_documents(20))
    with tarfile.open(path) as tar:
        dtypes = {}
        for member in tar:
            if member.name.endswith(".npy") and "spans" not in member.name:
                payload = io.BytesIO(tar.extractfile(member).read())
                dtypes[member.name.split(".")[1]] = np.load(payload, allow_pickle=False).dtype
    assert dtypes == {"text": "<u2", "image": "u1", "video": "u1", "speech": "<u2"}


def test_plain_webdataset_reads_a_token_shard(tmp_path, make_documents, write_shard):
    documents = make_documents(20)
    path = write_shard(tmp_path / "a.tokens.tar", documents)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    keys = [key for sample in samples for key in sample["json"]["keys"]]
    assert keys == [document.key for document in documents]
    num_text = sum(sample["text.npy"].size for sample in samples if "text.npy" in sample)
    assert num_text == TokenShard(path).counts["text"]


def test_the_same_documents_give_the_same_bytes(tmp_path, make_documents, write_shard):
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "a.tokens.tar", tmp_path / "b" / "a.tokens.tar"]
    one, other = (write_shard(path, make_documents(20)).read_bytes() for path in paths)
    assert one == other


def test_a_shard_of_another_codec_is_refused_with_the_command_that_helps(
    tmp_path, make_documents, make_vocabulary, write_shard
):
    write_shard(tmp_path / "a.tokens.tar", make_documents(20))
    with pytest.raises(UserError, match="image codes were made by codec image-1") as error:
        open_shards([tmp_path], make_vocabulary("image-2"))
    assert "mmpt encode" in one_line(error)


def test_a_codec_that_a_shard_does_not_use_may_change(tmp_path, make_vocabulary, write_shard):
    text = EncodedDocument("a", "a", "any", [Segment(Modality.TEXT, np.arange(5))])
    write_shard(tmp_path / "a.tokens.tar", [text])
    assert len(open_shards([tmp_path / "*.tar"], make_vocabulary("image-2"))) == 1


def test_shards_that_do_not_exist_are_named(tmp_path, vocabulary):
    with pytest.raises(UserError, match=r"no token shard matches .*none") as error:
        open_shards([tmp_path / "none-*.tar"], vocabulary)
    one_line(error)


def test_a_shard_cut_anywhere_is_refused_in_one_line(tmp_path, make_documents, write_shard):
    whole = write_shard(tmp_path / "a.tokens.tar", make_documents(20)).read_bytes()
    with tarfile.open(tmp_path / "a.tokens.tar") as tar:
        end = tar.getmembers()[-1].offset_data + tar.getmembers()[-1].size
    for size in [*range(0, end, 512), end - 1]:
        cut = tmp_path / "cut.tokens.tar"
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match="no whole token shard") as error:
            TokenShard(cut)
        assert "mmpt encode" in one_line(error)


def test_a_header_destroyed_in_the_middle_is_noticed(tmp_path, make_documents, write_shard):
    path = write_shard(tmp_path / "a.tokens.tar", make_documents(20))
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    whole = path.read_bytes()
    for offset in offsets:
        path.write_bytes(whole[:offset] + b"\xff" * 512 + whole[offset + 512 :])
        with pytest.raises(UserError, match="no whole token shard") as error:
            TokenShard(path)
        one_line(error)


def test_a_flipped_byte_in_any_array_is_noticed(tmp_path, make_documents, write_shard):
    path = write_shard(tmp_path / "a.tokens.tar", make_documents(20))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith(".npy")]
    for member in members:
        place = member.offset_data + member.size - 1
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="checksum") as error:
            list(TokenShard(path))
        one_line(error)


def test_a_newer_format_is_refused(tmp_path, make_documents, write_shard, monkeypatch):
    monkeypatch.setattr("mmpt.data.token_writer.FORMAT_VERSION", 3)
    path = write_shard(tmp_path / "a.tokens.tar", [conversation()])
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 3; this mmpt reads 2"):
        TokenShard(path)


def conversation() -> EncodedDocument:
    asked, answer = (Segment(Modality.TEXT, np.arange(n, n + 3)) for n in (10, 20))
    empty = Segment(Modality.TEXT, np.arange(0))
    roles = ("user", "user", "assistant")
    return EncodedDocument("talk", "talk", "fixed", [asked, empty, answer], roles)


def test_who_says_what_is_kept_where_there_are_conversations(tmp_path, make_documents, write_shard):
    path = write_shard(tmp_path / "a.tokens.tar", [*make_documents(20), conversation()])
    *plain, last = TokenShard(path).blocks
    assert {block.meta["format_version"] for block in plain} == {1}
    assert not any("roles" in block.arrays for block in plain)
    assert last.meta["format_version"] == 2
    assert "roles" not in TokenShard(path).counts
    roles = [document.roles for document in TokenShard(path)]
    assert roles == [()] * 20 + [("user", "assistant")]


@pytest.mark.parametrize(
    "segment",
    [
        Segment(Modality.IMAGE, np.full((2, 2), 64)),
        Segment(Modality.IMAGE, np.zeros(4, dtype=int)),
        Segment(Modality.IMAGE, np.zeros((1, 1025), dtype=int)),
        Segment(Modality.TEXT, np.array([-1])),
    ],
)
def test_codes_that_do_not_fit_are_refused_and_nothing_is_lost(tmp_path, vocabulary, segment):
    path = tmp_path / "a.tokens.tar"
    with ShardWriter(path, vocabulary) as writer:
        with pytest.raises(UserError):
            writer.add(EncodedDocument("bad", "bad", "any", [segment]))
        writer.add(EncodedDocument("good", "good", "any", [Segment(Modality.TEXT, np.arange(3))]))
        writer.finish()
    assert [document.key for document in TokenShard(path)] == ["good"]


def test_an_error_while_writing_leaves_nothing_behind(tmp_path, vocabulary, make_documents):
    def fail() -> None:
        with ShardWriter(tmp_path / "a.tokens.tar", vocabulary) as writer:
            writer.add(make_documents(1)[0])
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, vocabulary):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write") as error:
        ShardWriter(tmp_path / "file" / "a.tokens.tar", vocabulary)
    one_line(error)
