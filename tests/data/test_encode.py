import json
import os
import runpy
import signal
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.codes import count_codes, with_used_codes
from mmpt.data.encode import encode as encode_command
from mmpt.data.encode import encode_shards
from mmpt.data.index import build_index, save_index
from mmpt.data.loader import DataConfig, Loader, SourceConfig
from mmpt.data.shard_job import second_view
from mmpt.data.shards import Document, is_heldout, write_shard
from mmpt.data.tokens import EncodedDocument, TokenShard
from mmpt.parts import Audio, Image, Text, Video
from mmpt.processor import Processor, ProcessorSettings
from mmpt.stream import Segment
from mmpt.vocab import Modality, Vocabulary


@dataclass
class ByteProcessor:
    """Text as bytes, pictures as the top two bits of their pixels' red: a codec of four lines."""

    vocabulary: Vocabulary
    calls: int = 0
    max_side: int = 64
    separator = np.array([10])

    def encode_batch(self, documents):
        return [self.encode_document(parts) for parts in documents]

    def to(self, device):
        raise AssertionError(device)  # which is asked of processors on cards alone

    def encode_document(self, parts):
        self.calls += 1
        try:
            return [self._encode(part) for part in parts]
        except UserError as error:
            return error

    def _encode(self, part):
        if isinstance(part, Text):
            if "\x07" in part.text:
                raise UserError("bad text: it rings a bell")
            return Segment(Modality.TEXT, np.frombuffer(part.text.encode(), dtype=np.uint8))
        return Segment(Modality.IMAGE, part.pixels[..., 0] // 64)


@dataclass
class FragileProcessor(ByteProcessor):
    """The first process that gets to its second document dies."""

    folder: str = ""

    def encode_document(self, parts):
        mark = Path(self.folder) / "died"
        if self.calls == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_document(parts)


@pytest.fixture
def processor(vocabulary):
    return ByteProcessor(vocabulary)


def write_raw(path, number, text="document {}"):
    rng = np.random.default_rng(number)
    documents = [
        Document(
            f"d-{index}",
            f"d-{index}",
            "any",
            [Text(text.format(index)), Image(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))],
        )
        for index in range(number)
    ]
    write_shard(path, documents)
    return path


def encode(shards, out, processor):
    return encode_shards(shards, out, processor, progress=False)


def test_each_raw_shard_becomes_a_token_shard_of_its_documents(tmp_path, processor):
    raws = [write_raw(tmp_path / f"raw-{number}.tar", number) for number in (3, 5)]
    report = encode(raws, tmp_path / "out", processor)
    assert [path.name for path in report.shards] == ["raw-3.tokens.tar", "raw-5.tokens.tar"]
    assert (report.documents, report.bad, report.kept) == (8, 0, 0)
    documents = [document for path in report.shards for document in TokenShard(path)]
    texts = [bytes(document.segments[0].codes.astype(np.uint8)).decode() for document in documents]
    assert texts == [f"document {index}" for number in (3, 5) for index in range(number)]
    assert all(document.segments[1].codes.shape == (4, 6) for document in documents)
    assert TokenShard(report.shards[0]).separator.tolist() == [10]


def test_finished_shards_are_kept_and_new_ones_are_equal(tmp_path, processor, vocabulary):
    raws = [write_raw(tmp_path / f"raw-{number}.tar", number) for number in (3, 5)]
    report = encode(raws[:1], tmp_path / "out", processor)
    again = ByteProcessor(vocabulary)
    resumed = encode(raws, tmp_path / "out", again)
    assert resumed.kept == 1
    assert again.calls == 5
    assert resumed.documents == 8
    whole = encode(raws, tmp_path / "whole", processor)
    for ours, theirs in zip(resumed.shards, whole.shards, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert report.shards[0] == resumed.shards[0]


def test_a_stale_changed_or_damaged_shard_is_encoded_again(tmp_path, processor, make_vocabulary):
    raw = write_raw(tmp_path / "raw.tar", 3)
    [path] = encode([raw], tmp_path, processor).shards
    newer = ByteProcessor(make_vocabulary("image-2"))
    assert encode([raw], tmp_path, newer).kept == 0
    assert encode([raw], tmp_path, newer).kept == 1
    path.write_bytes(path.read_bytes()[:1000])
    assert encode([raw], tmp_path, newer).kept == 0
    newer.max_side = 32
    assert encode([raw], tmp_path, newer).kept == 0
    write_raw(raw, 3, text="changed {}")
    assert encode([raw], tmp_path, newer).kept == 0
    assert len(TokenShard(path)) == 3


def test_bad_samples_are_counted_and_listed(tmp_path, processor):
    raw = write_raw(tmp_path / "raw.tar", 3, text="{}")
    documents = [
        Document("ok", "ok", "any", [Text("fine")]),
        Document("bell", "bell", "any", [Text("ding \x07")]),
    ]
    write_shard(raw, documents)
    for _ in range(2):
        report = encode([raw], tmp_path / "out", processor)
        assert (report.documents, report.bad) == (1, 1)
    listing = (tmp_path / "out" / "raw.quarantine.jsonl").read_text().splitlines()
    assert len(listing) == 1
    assert "rings a bell" in listing[0]
    assert '"bell"' in listing[0]


def test_a_truncated_raw_shard_gives_what_is_whole_and_counts_the_rest(tmp_path, processor):
    raw = write_raw(tmp_path / "raw.tar", 5)
    with tarfile.open(raw) as tar:
        raw.write_bytes(raw.read_bytes()[: tar.getmembers()[5].offset_data + 10])
    report = encode([raw], tmp_path / "out", processor)
    assert 1 <= report.documents < 5
    assert report.bad >= 1


def test_an_interrupted_encoding_leaves_finished_shards_and_no_half_one(
    tmp_path, processor, vocabulary
):
    raws = [write_raw(tmp_path / f"raw-{number}.tar", number) for number in (3, 5)]

    class Stopping(ByteProcessor):
        def encode_document(self, parts):
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().encode_document(parts)

    with pytest.raises(KeyboardInterrupt):
        encode(raws, tmp_path / "out", Stopping(vocabulary))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["raw-3.tokens.tar"]
    assert encode(raws, tmp_path / "out", processor).kept == 1


def test_used_codes_are_those_of_documents_that_are_not_held_out(tmp_path, vocabulary, write_shard):
    bases = [f"base-{number}" for number in range(40)]
    documents = [
        EncodedDocument(base, base, "any", [Segment(Modality.IMAGE, np.full((2, 2), number))])
        for number, base in enumerate(bases)
    ]
    counts = count_codes([write_shard(tmp_path / "a.tokens.tar", documents)], vocabulary)
    expected = [number for number, base in enumerate(bases) if not is_heldout(base)]
    assert 20 < len(expected) < 40
    assert np.flatnonzero(counts[Modality.IMAGE][0]).tolist() == expected
    assert set(counts) == {Modality.IMAGE}
    used = with_used_codes(vocabulary, counts)
    assert used.fingerprint == vocabulary.fingerprint
    assert [code_range.used for code_range in used.ranges] == [tuple(expected), None]


def test_missing_shards_and_colliding_names_are_one_line(tmp_path, processor):
    with pytest.raises(UserError, match="no shard at"):
        encode([tmp_path / "none.tar"], tmp_path / "out", processor)
    raws = [write_raw(tmp_path / folder / "raw.tar", 1) for folder in ("a", "b")]
    with pytest.raises(UserError, match="rename one"):
        encode(raws, tmp_path / "out", processor)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, processor):
    raw = write_raw(tmp_path / "raw.tar", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        encode([raw], tmp_path / "file", processor)


def test_the_command_leaves_what_opens_its_processor_again(zoo, tmp_path):
    raw = write_raw(tmp_path / "raw.tar", 2)
    names = [str(zoo / name) for name in ("text", "image")]
    encode_command([raw], out=tmp_path / "out", tokenizers=names, max_side=16)
    processor = Processor.from_folder(tmp_path / "out")
    assert processor.settings == ProcessorSettings(tuple(names), 16)


def test_what_an_index_promises_is_used_or_counted_as_bad(tmp_path, processor):
    raw = write_raw(tmp_path / "raw.tar", 9, "{}")
    save_index(build_index(raw))
    data = raw.read_bytes()
    raw.write_bytes(data[: len(data) // 2])
    report = encode([raw], tmp_path / "out", processor)
    assert (report.promised, report.indexed) == (9, 1)
    assert report.documents + report.bad == 9
    assert 0 < report.documents < 9


def test_more_bad_samples_than_tolerated_stop_the_job(tmp_path, processor):
    documents = [
        Document(f"d-{n}", "b", "any", [Text("\x07" if n < 2 else "a")]) for n in range(20)
    ]
    write_shard(tmp_path / "raw.tar", documents)
    for tolerance, most in ((0.0, 0), (0.09, 1)):
        with pytest.raises(UserError, match=f"{most + 1} bad samples, {most} are tolerated"):
            encode_shards(
                [tmp_path / "raw.tar"], tmp_path, processor, tolerance=tolerance, progress=False
            )
        assert not (tmp_path / "raw.tokens.tar").exists()
    report = encode_shards(
        [tmp_path / "raw.tar"], tmp_path, processor, tolerance=0.1, progress=False
    )
    assert (report.documents, report.bad) == (18, 2)


def test_several_processes_write_what_one_writes(zoo, tmp_path):
    processor = Processor.load([str(zoo / name) for name in ("text", "image")], max_side=16)
    raws = [write_raw(tmp_path / f"raw-{number}.tar", number, "a red {}") for number in (9, 2, 5)]
    options = {"augment": True, "progress": False}
    alone = encode_shards(raws, tmp_path / "alone", processor, **options)
    shared = encode_shards(raws, tmp_path / "shared", processor, workers=2, **options)
    assert [path.name for path in shared.shards] == [path.name for path in alone.shards]
    assert (shared.documents, shared.codes) == (alone.documents, alone.codes) != (0, {})
    for ours, theirs in zip(shared.shards, alone.shards, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert encode_shards(raws, tmp_path / "shared", processor, workers=2, **options).kept == 3


def test_a_process_killed_while_it_writes_is_replaced_and_leaves_nothing(vocabulary, tmp_path):
    raws = [write_raw(tmp_path / f"raw-{number}.tar", number) for number in (3, 4)]
    processor = FragileProcessor(vocabulary, folder=str(tmp_path))
    report = encode_shards(raws, tmp_path / "out", processor, workers=2, progress=False)
    assert (tmp_path / "died").exists()
    assert report.documents == 7
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "raw-3.tokens.tar",
        "raw-4.tokens.tar",
    }


def test_a_command_that_was_killed_is_run_again(zoo, tmp_path):
    script = runpy.run_path(str(Path(__file__).parent / "kill_and_encode.py"))
    raws = [str(write_raw(tmp_path / f"raw-{number}.tar", number)) for number in (90, 60, 5)]
    names = [str(zoo / name) for name in ("text", "image")]
    encode_command(raws, out=tmp_path / "whole", tokenizers=names, max_side=16, workers=1)
    options = ["--workers", "2", "--max-side", "16", "--tokenizers", *names]
    command = [sys.executable, "-m", "mmpt", "encode", *raws, *options]
    killed, done = script["kill_and_encode"](command, tmp_path / "out", 0.0)
    assert killed
    assert done < 3
    assert script["contents"](tmp_path / "out") == script["contents"](tmp_path / "whole")


def test_second_views_are_added_to_training_documents_that_allow_it(tmp_path, processor):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    keys = [f"d-{index}" for index in range(20)]
    documents = [Document(key, key, "any", [Text("a"), Image(picture)]) for key in keys]
    documents.append(Document("arrow", "d-1", "any", [Text("a"), Image(picture)], mirror=False))
    documents.append(Document("page", "d-1", "fixed", [Text("a"), Image(picture)]))
    documents.append(Document("words", "d-1", "any", [Text("a")]))
    write_shard(tmp_path / "raw.tar", documents)

    report = encode_shards(
        [tmp_path / "raw.tar"], tmp_path, processor, augment=True, progress=False
    )

    encoded = {document.key: document for document in TokenShard(report.shards[0])}
    trained = [key for key in keys if not is_heldout(key)]
    assert 0 < len(trained) < len(keys)
    extra = set(encoded) - {document.key for document in documents}
    assert extra == {f"{key} again" for key in trained}
    plain, other = (encoded[f"{trained[0]}{end}"].segments for end in ("", " again"))
    assert np.array_equal(other[1].codes, plain[1].codes[:, ::-1])
    assert np.array_equal(other[0].codes, plain[0].codes)
    assert report.documents == len(documents)


def test_a_second_view_of_sound_has_another_speed():
    wave = (0.1 * np.sin(np.arange(16_000) / 10)).astype(np.float32)
    views = [
        second_view(
            Document(f"d-{n}", "d-1", "any", [Text("a"), Audio(wave, 16_000)], mirror=False)
        )
        for n in range(8)
    ]
    assert not is_heldout("d-1")
    lengths = {len(view.parts[1].wave) for view in views}
    assert lengths == {14_546, 17_778}
    assert {view.parts[1].sample_rate for view in views} == {16_000}


def test_asking_for_second_views_encodes_again(tmp_path, processor):
    raw = write_raw(tmp_path / "raw.tar", 5)
    encode([raw], tmp_path / "out", processor)
    again = encode_shards([raw], tmp_path / "out", processor, augment=True, progress=False)
    assert again.kept == 0


def mixed_documents(number):
    """Pictures of two sizes and sounds of two lengths; every fifth cannot be encoded."""
    rng = np.random.default_rng(0)
    for index in range(number):
        side = 8 * (1 + index % 2)
        wave = rng.normal(0, 0.1, 2000 * (1 + index % 2)).astype(np.float32)
        parts = [
            Text(f"a red {index}"),
            Image(rng.integers(0, 256, (side, 8, 3), dtype=np.uint8)),
            Video(rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), 5.0)
            if index % 5 == 4
            else Audio(wave, 16_000),
        ]
        yield Document(f"d-{index}", f"d-{index}", "any", parts)


@pytest.mark.parametrize("batch", [2, 7, 100])
def test_a_batch_of_documents_gives_the_bytes_of_single_ones(zoo, tmp_path, batch):
    """There is no tokenizer of clips: a bad document is quarantined alone."""
    names = [str(zoo / name) for name in ("text", "image", "speech")]
    processor = Processor.load(names, max_side=16)
    raw = tmp_path / "raw.tar"
    write_shard(raw, mixed_documents(12))
    options = {"augment": True, "progress": False}
    single = encode_shards([raw], tmp_path / "single", processor, batch=1, **options)
    together = encode_shards([raw], tmp_path / "together", processor, batch=batch, **options)
    assert (single.documents, single.bad) == (together.documents, together.bad) == (10, 2)
    assert single.reasons == together.reasons == {"this model has no video tokenizer": 2}
    for name in ("raw.tokens.tar", "raw.quarantine.jsonl"):
        assert (tmp_path / "single" / name).read_bytes() == (
            tmp_path / "together" / name
        ).read_bytes()


def test_a_batch_ends_before_its_media_take_too_much_memory(tmp_path, processor, monkeypatch):
    sizes, encode_batch = [], processor.encode_batch

    def watched(_, documents):
        sizes.append(len(documents))
        return encode_batch(documents)

    monkeypatch.setattr(ByteProcessor, "encode_batch", watched)
    monkeypatch.setattr("mmpt.data.shard_job.MAX_BATCH_BYTES", 3 * 4 * 6 * 3)
    raw = write_raw(tmp_path / "raw.tar", 8)
    encode_shards([raw], tmp_path / "out", processor, batch=5, progress=False)
    assert sizes == [3, 3, 2]
    with pytest.raises(UserError, match="batch = 0"):
        encode_shards([raw], tmp_path / "out", processor, batch=0, progress=False)


def listing(path, *rows):
    lines = [json.dumps(dict(zip(("shard", "key", "filter"), row, strict=True))) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_what_a_list_leaves_out_is_counted_and_not_even_decoded(tmp_path, processor):
    raw = tmp_path / "raw.tar"
    documents = [Document(f"d-{n}", "b", "any", [Text("\x07" if n < 2 else "a")]) for n in range(9)]
    write_shard(raw, documents)
    save_index(build_index(raw))
    rows = [("else/raw.tar", f"d-{n}", "short" if n else "copies") for n in (0, 3, 4)]
    out = listing(tmp_path / "filtered.jsonl", *rows, ("other.tar", "d-8", "short"))
    options = {"without": [out], "progress": False}
    report = encode_shards([raw], tmp_path / "out", processor, **options)
    assert report.filtered == {"copies": 1, "short": 2}
    assert (report.documents, report.bad, report.promised) == (5, 1, 9)
    assert report.reasons == {"bad text": 1}
    [path] = report.shards
    assert TokenShard(path).notes["filtered"] == {"copies": 1, "short": 2}
    assert encode_shards([raw], tmp_path / "out", processor, **options).kept == 1
    listing(out, *rows[:2])  # another list is another token shard
    again = encode_shards([raw], tmp_path / "out", processor, **options)
    assert (again.kept, again.documents) == (0, 6)
    plain = encode_shards([raw], tmp_path / "out", processor, progress=False)
    assert (plain.kept, plain.documents, plain.filtered) == (0, 7, {})


def test_a_list_that_is_none_or_of_other_shards_is_one_line(tmp_path, processor):
    raw, path = write_raw(tmp_path / "raw.tar", 1), tmp_path / "list.jsonl"
    for text, message in (
        ("{}", "line 1: no shard, key and filter"),
        ("[1]", "line 1"),
        ('{"shard": "raw.tar", "key": 1, "filter": "x"}', "must be strings"),
        ('{"shard": "a.tar", "key": "k", "filter": "x"}', "of none that is encoded"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            encode_shards([raw], tmp_path / "out", processor, without=[path], progress=False)
    with pytest.raises(UserError, match="cannot read the list"):
        encode_shards([raw], tmp_path, processor, without=[tmp_path / "none"], progress=False)


def test_a_dry_run_of_curation_and_encoding_leave_out_the_same(tmp_path, processor):
    from mmpt.data.curate import CurateRecipe, curate_shards

    raws = [write_raw(tmp_path / "raw" / f"raw-{number}.tar", number) for number in (11, 12)]
    recipe = CurateRecipe(shards=(str(tmp_path / "raw"),), filters={"short": "text_chars < 11"})
    curated = curate_shards(recipe, tmp_path / "curated", dry_run=True)
    lists = [tmp_path / "curated" / "filtered.jsonl"]
    report = encode_shards(raws, tmp_path / "out", processor, without=lists, progress=False)
    assert report.filtered == curated.filtered == {"short": 20}
    assert report.documents == curated.used == 3


def test_the_loader_says_what_became_of_every_sample(tmp_path, processor):
    raw = tmp_path / "raw.tar"
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    keys = [f"d-{index}" for index in range(40)]
    parts = [[Text("\x07" if index < 3 else "a"), Image(picture)] for index in range(40)]
    write_shard(raw, [Document(k, k, "any", p) for k, p in zip(keys, parts, strict=True)])
    save_index(build_index(raw))
    out = listing(tmp_path / "filtered.jsonl", *[(str(raw), key, "dull") for key in keys[20:24]])
    encode_shards([raw], tmp_path / "out", processor, without=[out], augment=True, progress=False)
    config = DataConfig(sources={"a": SourceConfig(shards=(str(tmp_path / "out"),))}, length=64)
    samples = Loader(config, processor.vocabulary, seed=0).summary()["samples"]["a"]
    heldout = sum(is_heldout(key) for key in keys[3:20] + keys[24:])
    assert heldout > 0
    assert samples == {
        "used": 33 - heldout,
        "filtered": {"dull": 4, "held out": heldout},
        "quarantined": 3,
        "promised": 40,
    }


def test_a_card_that_is_not_there_is_one_line(tmp_path, processor):
    raw = write_raw(tmp_path / "raw.tar", 1)
    with pytest.raises(UserError, match="cannot be used here"):
        encode_shards([raw], tmp_path / "out", processor, device="cuda:77", progress=False)
