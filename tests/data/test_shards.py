"""Raw shards: what is whole is read, what is not is counted with its reason, nothing is trusted."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.shards import (
    Damage,
    Document,
    Quarantine,
    Record,
    Sample,
    is_heldout,
    read_documents,
    read_samples,
    write_shard,
)
from mmpt.data.tars import parse_header
from mmpt.parts import Audio, Image, Text, Video


def make_document(number: int) -> Document:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    frames = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    wave = (rng.integers(-9000, 9000, 400) / 32768).astype(np.float32)
    parts = [Text(f"doc {number}"), Image(pixels), Video(frames, 10.0), Audio(wave, 16000)]
    return Document(f"doc{number}", f"base{number}", "any", parts, "test")


def make_shard(path: Path, count: int = 4) -> Path:
    write_shard(path, [make_document(number) for number in range(count)])
    return path


def write_tar(
    path: Path, members: list[tuple[str, bytes]], *, kind: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read_all(*paths: Path) -> tuple[list[Document], Quarantine]:
    quarantine = Quarantine()
    return list(read_documents(paths, quarantine)), quarantine


def describe(*parts: dict, base: str = "b") -> bytes:
    return json.dumps({"base": base, "order": "fixed", "parts": list(parts)}).encode()


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def png_bytes(tmp_path: Path) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image(pixels).save(tmp_path / "a.png")
    return (tmp_path / "a.png").read_bytes()


def member_offsets(path: Path) -> dict[str, int]:
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


def test_times_of_parts_are_kept(tmp_path):
    times = ((0.0, 1.5), None, (1.5, 1.5), (2.0, 3.25))
    write_shard(tmp_path / "a.tar", [replace(make_document(0), times=times), make_document(1)])
    [timed, plain], _ = read_all(tmp_path / "a.tar")
    assert timed.times == times
    assert plain.times == ()


def test_who_says_a_part_is_kept(tmp_path):
    roles = ("user", "user", "assistant", "user")
    talk = replace(make_document(0), order="fixed", roles=roles)
    write_shard(tmp_path / "a.tar", [talk, make_document(1)])
    [talk, plain], _ = read_all(tmp_path / "a.tar")
    assert talk.roles == roles
    assert plain.roles == ()


def test_turns_that_may_be_permuted_are_refused(tmp_path):
    roles = ("user", "user", "assistant", "user")
    write_shard(tmp_path / "a.tar", [replace(make_document(0), roles=roles)])
    documents, quarantine = read_all(tmp_path / "a.tar")
    assert documents == []
    assert dict(quarantine.reasons) == {"bad role": 1}


@pytest.mark.parametrize(
    "times",
    [
        {"start": 1},
        {"end": 1},
        {"start": 2, "end": 1},
        {"start": -1, "end": 1},
        {"start": "0", "end": 1},
        {"start": True, "end": 1},
        {"start": 0, "end": float("nan")},
        {"start": 0, "end": 10**400},
    ],
)
def test_times_that_are_none_are_refused(tmp_path, times):
    described = describe({"type": "text", "text": "a"} | times)
    documents, quarantine = read_all(write_tar(tmp_path / "a.tar", [("a.json", described)]))
    assert documents == []
    assert dict(quarantine.reasons) == {"bad json": 1}


def test_documents_come_back_as_they_were_written(tmp_path):
    documents, quarantine = read_all(make_shard(tmp_path / "a.tar"))
    assert quarantine.count == 0
    assert [document.key for document in documents] == ["doc0", "doc1", "doc2", "doc3"]
    for number, document in enumerate(documents):
        want = make_document(number)
        assert (document.base, document.order, document.source) == (want.base, "any", "test")
        text, image, video, audio = document.parts
        assert text == want.parts[0]
        assert np.array_equal(image.pixels, want.parts[1].pixels)
        assert np.array_equal(video.frames, want.parts[2].frames)
        assert video.fps == want.parts[2].fps
        assert np.abs(audio.wave - want.parts[3].wave).max() < 1e-6


@pytest.mark.parametrize("order", [(0, 0, 0), (0, 0, 1, 1), (0, 1, 1, 0, 0), (0, 1)])
@pytest.mark.parametrize("fps", [10.0, 24.0, 60.0])
def test_a_clip_with_equal_frames_keeps_their_number_and_rate(tmp_path, order, fps):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)[list(order)]
    write_shard(tmp_path / "a.tar", [Document("a", "a", "any", [Video(frames, fps)])])
    [document], quarantine = read_all(tmp_path / "a.tar")
    [video] = document.parts
    assert quarantine.count == 0
    assert np.array_equal(video.frames, frames)
    assert video.fps == fps


def test_equal_documents_give_equal_bytes(tmp_path):
    first, second = make_shard(tmp_path / "a.tar"), make_shard(tmp_path / "b.tar")
    assert first.read_bytes() == second.read_bytes()


def test_a_plain_webdataset_reader_reads_our_shards(tmp_path):
    import webdataset

    make_shard(tmp_path / "a.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["doc0", "doc1", "doc2", "doc3"]
    assert all({"json", "1.webp", "2.webp", "3.flac"} <= set(sample) for sample in samples)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def documents():
        yield make_document(0)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", documents())
    assert list(tmp_path.iterdir()) == []


def test_a_key_with_a_dot_is_refused(tmp_path):
    with pytest.raises(UserError, match="without dots"):
        write_shard(tmp_path / "a.tar", [Record("a.b", "a", "any", (), "", "")])


def test_a_truncated_tar_gives_what_is_whole_and_reports_the_rest(tmp_path):
    whole = make_shard(tmp_path / "whole.tar").read_bytes()
    offsets = sorted(member_offsets(tmp_path / "whole.tar").values())
    starts = [offset for offset in offsets if offset % 512 == 0]
    cut = tmp_path / "cut.tar"
    for size in [0, 1, 511, 512, 700, *starts, *(offset + 300 for offset in starts)]:
        cut.write_bytes(whole[:size])
        documents, quarantine = read_all(cut)
        num_whole = sum(1 for start in starts[4::4] if start <= size)
        assert len(documents) == num_whole, size
        assert quarantine.count >= 1, size
        for number, document in enumerate(documents):
            assert document.parts[0] == Text(f"doc {number}")


@pytest.mark.parametrize("member", ["doc1.json", "doc1.1.webp", "doc1.3.flac", "doc2.1.webp"])
@pytest.mark.parametrize("junk", [b"\xff" * 512, bytes(512), b"x" * 257 + b"ustar" + b"x" * 250])
def test_documents_on_both_sides_of_a_destroyed_header_survive(tmp_path, member, junk):
    path = make_shard(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    offset = member_offsets(path)[member]
    data[offset : offset + 512] = junk
    path.write_bytes(data)
    documents, quarantine = read_all(path)
    lost = member.partition(".")[0]
    assert {document.key for document in documents} == {"doc0", "doc1", "doc2", "doc3"} - {lost}
    assert any(line["offset"] == offset for line in quarantine.lines)  # the place is named
    assert any(line["key"] == lost for line in quarantine.lines)  # and the sample


def test_a_size_field_that_lies_does_not_hide_the_documents_behind_it(tmp_path):
    path = make_shard(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    offset = member_offsets(path)["doc1.1.webp"]
    header = tarfile.TarInfo.frombuf(bytes(data[offset : offset + 512]), "utf-8", "strict")
    header.size = 1 << 40
    data[offset : offset + 512] = header.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(data)
    documents, quarantine = read_all(path)
    assert {document.key for document in documents} == {"doc0", "doc2", "doc3"}
    assert quarantine.reasons["truncated"] == 1


def test_random_damage_never_raises_and_never_invents_documents(tmp_path):
    whole = make_shard(tmp_path / "whole.tar").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "a.tar"
    for _ in range(60):
        data = bytearray(whole)
        begin = int(rng.integers(0, len(data)))
        size = int(rng.integers(1, 1500))
        data[begin : begin + size] = rng.bytes(len(data[begin : begin + size]))
        path.write_bytes(data)
        documents, quarantine = read_all(path)
        assert len(documents) <= 4
        assert len({document.key for document in documents}) == len(documents)
        assert len(documents) == 4 or quarantine.count > 0


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("json", describe({"type": "image", "ref": "1.png"}))], "missing part"),
        ([("json", describe({"type": "image"}))], "missing part"),
        ([("json", describe({"type": "text", "text": "  \n"}))], "empty text"),
        ([("json", describe({"type": "text"}))], "bad json"),
        ([("json", describe({"type": "smell", "ref": "0.x"}), ), ("0.x", b"x")], "bad json"),
        ([("json", describe())], "bad json"),
        ([("json", describe(text("a") | {"role": "system"}))], "bad role"),
        ([("json", describe(text("a") | {"role": None}))], "bad role"),
        ([("json", describe(text("a") | {"role": ["user"]}))], "bad role"),
        ([("json", describe(text("a") | {"role": "user"}, text("b")))], "bad role"),
        ([("json", b'{"parts": ')], "bad json"),
        ([("json", b"[" * 100_000)], "bad json"),
        ([("json", b'{"parts": "x"}')], "bad json"),
        ([("json", describe({"type": "image", "ref": "0.png"})), ("0.png", b"no")], "bad image"),
        ([("json", describe({"type": "audio", "ref": "0.wav"})), ("0.wav", b"no")], "bad audio"),
        ([("json", describe({"type": "video", "ref": "0.mp4"})), ("0.mp4", b"no")], "bad video"),
        ([("txt", b"")], "empty text"),
        ([("txt", b"\xff\xfe")], "bad text"),
        ([("png", b"\x89PNG\r\n\x1a\n")], "bad image"),
        ([("0.webp", b"x")], "unknown member"),  # its json was lost
    ],
)  # fmt: skip
def test_a_bad_sample_is_quarantined_with_its_reason(tmp_path, members, why):
    good = ("good.txt", b"a good one")
    path = write_tar(tmp_path / "a.tar", [(f"bad.{name}", data) for name, data in members] + [good])
    documents, quarantine = read_all(path)
    assert [document.key for document in documents] == ["good"]
    assert [line["key"] for line in quarantine.lines] == ["bad"]
    assert dict(quarantine.reasons) == {why: 1}


def test_a_truncated_picture_is_quarantined(tmp_path):
    data = png_bytes(tmp_path)
    path = write_tar(tmp_path / "a.tar", [("a.png", data[: len(data) // 2]), ("b.png", data)])
    documents, quarantine = read_all(path)
    assert [document.key for document in documents] == ["b"]
    assert quarantine.reasons["bad image"] == 1


def test_plain_paired_samples_are_documents_text_first(tmp_path):
    data = png_bytes(tmp_path)
    path = write_tar(
        tmp_path / "a.tar",
        [("x/a.PNG", data), ("x/a.txt", b"a cat"), ("b.json", b'{"text": "dog"}'), ("b.png", data)],
    )
    documents, quarantine = read_all(path)
    assert quarantine.count == 0
    assert [(document.key, document.order) for document in documents] == [
        ("x/a", "any"),
        ("b", "any"),
    ]
    assert [document.parts[0] for document in documents] == [Text("a cat"), Text("dog")]
    assert all(isinstance(document.parts[1], Image) for document in documents)


def test_a_json_table_beside_other_members_describes_them_unless_it_holds_a_text(tmp_path):
    members = [
        ("a.json", b'{"width": 3}'),
        ("a.txt", b"a cat"),
        ("b.json", b'{"width": 3, "text": "dog"}'),
        ("b.cls", b"7"),
        ("c.json", b'{"width": 3}'),
    ]
    documents, quarantine = read_all(write_tar(tmp_path / "a.tar", members))
    assert [d.parts for d in documents] == [[Text("a cat")], [Text("7"), Text("dog")]]
    assert quarantine.reasons == {"bad json": 1}


def test_paired_films_of_both_containers_are_clips(tmp_path):
    members = []
    for suffix, codec in (("mp4", "libx264"), ("webm", "libvpx")):
        film = io.BytesIO()
        with av.open(film, "w", format=suffix) as container:
            stream = container.add_stream(codec, rate=10)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
            for _ in range(5):
                black = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
                container.mux(stream.encode(black))
            container.mux(stream.encode())
        members.append((f"{suffix}.{suffix}", film.getvalue()))
    documents, _ = read_all(write_tar(tmp_path / "a.tar", members))
    assert [len(document.parts[0].frames) for document in documents] == [5, 5]


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/etc/evil.txt"])
def test_a_name_that_leaves_the_shard_is_refused(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"one"), (name, b"evil"), ("b.txt", b"two")])
    documents, quarantine = read_all(path)
    assert [document.key for document in documents] == ["a", "b"]
    assert dict(quarantine.reasons) == {"unsafe name": 1}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_are_not_followed(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.txt", "c.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"one"))
            link = tarfile.TarInfo("b.txt")
            link.type, link.linkname = kind, "/etc/passwd"
            if name == "a.txt":
                tar.addfile(link)
    documents, quarantine = read_all(tmp_path / "a.tar")
    assert [document.key for document in documents] == ["a", "c"]
    assert dict(quarantine.reasons) == {"no plain file": 1}


def test_members_that_do_not_stand_together_are_reported(tmp_path):
    data = png_bytes(tmp_path)
    members = [("a.png", data), ("b.png", data), ("a.txt", b"a"), ("b.txt", b"b")]
    documents, quarantine = read_all(write_tar(tmp_path / "a.tar", members))
    assert [document.key for document in documents] == ["a", "b"]
    assert dict(quarantine.reasons) == {"maybe incomplete": 2}


def test_a_key_that_returns_is_counted_once_and_used_where_its_list_is_whole(tmp_path):
    data = png_bytes(tmp_path)
    text, picture = {"type": "text", "text": "a"}, {"type": "image", "ref": "png"}
    members = [
        ("a.json", describe(text)),
        ("b.json", describe(text, picture)),
        ("b.png", data),
        ("a.json", describe(text, picture)),
        ("a.png", data),
        ("b.json", describe(text, picture)),  # its picture stands elsewhere
        ("a.txt", b"plain"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    documents, quarantine = read_all(path)
    assert [document.key for document in documents] == ["a", "b", "a"]
    assert dict(quarantine.reasons) == {"missing part": 1, "maybe incomplete": 1}
    assert len(documents) + quarantine.count == len(list(read_samples(path))) == 5


def test_a_repeated_member_is_reported_and_the_first_is_kept(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"first"), ("a.txt", b"second")])
    documents, quarantine = read_all(path)
    assert documents[0].parts == [Text("first")]
    assert quarantine.reasons["repeated member"] == 1


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_folders_of_every_tar_format_are_read(tmp_path, kind):
    long = "d" * 90 + "/" + "k" * (60 if kind == tarfile.USTAR_FORMAT else 180)
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{long}.txt", b"long"), ("./b.txt", b"short")], kind=kind)
    documents, quarantine = read_all(path)
    assert quarantine.count == 0
    assert [document.key for document in documents] == [long, "b"]


def test_plain_headers_are_read_as_tarfile_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    block = make_shard(tmp_path / "a.tar").read_bytes()[:512]
    # name, size, checksum and type, magic, prefix: what is read of a header
    places = [*range(100), *range(124, 136), *range(148, 157), *range(257, 265), *range(345, 500)]
    for _ in range(2000):
        damaged = bytearray(block)
        for place in rng.choice(places, rng.integers(0, 3)):
            damaged[place] = rng.choice([0, 32, 48, 55, 56, 128, 255])
        total = sum(damaged) - sum(damaged[148:156]) + 256
        if rng.random() < 0.7:  # the checksum of what it is now
            damaged[148:156] = f"{total:06o}\0 ".encode()
        try:
            wanted = tarfile.TarInfo.frombuf(bytes(damaged), "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            wanted = None
        found = parse_header(bytes(damaged))
        if wanted is None or wanted.size < 0:
            assert found is None
        else:
            assert found is not None
            assert [found.name, found.size, found.type] == [wanted.name, wanted.size, wanted.type]


def test_concatenated_tars_are_read_to_the_end(tmp_path):
    one = write_tar(tmp_path / "1.tar", [("a.txt", b"a")]).read_bytes()
    two = write_tar(tmp_path / "2.tar", [("b.txt", b"b")]).read_bytes()
    (tmp_path / "both.tar").write_bytes(one + two)
    documents, quarantine = read_all(tmp_path / "both.tar")
    assert [document.key for document in documents] == ["a", "b"]
    assert quarantine.count == 0


def test_a_tar_inside_a_tar_is_not_mistaken_for_its_members(tmp_path):
    inner = write_tar(tmp_path / "1.tar", [("evil.txt", b"inner")]).read_bytes()
    path = write_tar(tmp_path / "2.tar", [("a.txt", b"a"), ("a.bin", inner), ("b.txt", b"b")])
    items = [item for item in read_samples(path) if isinstance(item, Sample)]
    assert [item.key for item in items] == ["a", "b"]


def test_what_is_no_tar_is_reported(tmp_path):
    import gzip

    (tmp_path / "a.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "b.tar").write_bytes(gzip.compress(make_shard(tmp_path / "c.tar").read_bytes()))
    for name in ("a.tar", "b.tar"):
        [damage, *_] = read_samples(tmp_path / name)
        assert isinstance(damage, Damage)
        assert damage.offset == 0


def test_a_missing_shard_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(UserError, match="cannot read shard"):
        read_all(tmp_path / "none.tar")


def test_the_quarantine_file_has_one_line_for_each_bad_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b""), ("b.txt", b"b"), ("c.txt", b" ")])
    for _ in range(2):  # it is appended to
        quarantine = Quarantine(tmp_path / "sub" / "bad.jsonl")
        list(read_documents([path], quarantine))
        assert quarantine.count == 2
    lines = [json.loads(line) for line in (tmp_path / "sub" / "bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a", "c"] * 2
    assert all(set(line) == {"shard", "offset", "key", "why"} for line in lines)


def test_a_quarantine_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(tmp_path / "file" / "bad.jsonl")
    with pytest.raises(UserError, match="quarantine file"):
        quarantine.add(shard="a.tar", offset=0, key="k", why="x")


def test_about_one_base_key_in_ten_is_held_out_and_the_choice_never_changes():
    chosen = [is_heldout(f"base{number}") for number in range(5000)]
    assert 0.085 < np.mean(chosen) < 0.115
    assert [number for number in range(60) if is_heldout(f"base{number}")] == GOLDEN


GOLDEN = [26, 30, 33, 35, 48, 56]
