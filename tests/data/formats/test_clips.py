"""Films with captions, and LeRobot folders."""

import json

import numpy as np
import pytest

from mmpt.media import video_bytes
from mmpt.parts import Text, Video


@pytest.fixture(scope="module")
def film() -> bytes:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return video_bytes(frames, 10.0, ".mp4")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    return folder


def captions(found) -> list[str]:
    return [document.parts[0].text for document in found.documents]


def test_captions_stand_beside_the_films(folder, run, film):
    for name in ("a.mp4", "b.mp4", "c.mp4", "more/d.mp4"):
        (folder / name).write_bytes(film)
    (folder / "a.txt").write_text("from text\n")
    (folder / "b.json").write_text('{"caption": "from json", "fps": 10}')
    rows = [{"file_name": "c.mp4", "text": "from a list"}, {"file_name": "more/d.mp4", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "more" / "metadata.jsonl").write_text('{"file_name": "d.mp4", "caption": "nearer"}')
    found = run("clips", folder)
    assert captions(found) == ["from text", "from json", "from a list", "nearer"]
    [first, *_] = found.documents
    assert (first.order, first.base) == ("any", "films/a")
    assert isinstance(first.parts[1], Video)
    assert first.parts[1].frames.shape == (3, 16, 16, 3)


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".avi"])
def test_other_films_are_taken_as_they_are(folder, run, suffix):
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    if suffix == ".avi":
        import av

        with av.open(str(folder / "a.avi"), "w") as container:
            stream = container.add_stream("mjpeg", rate=10)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    else:
        (folder / f"a{suffix}").write_bytes(video_bytes(frames, 10.0, suffix))
    (folder / "a.txt").write_text("words")
    [document] = run("clips", folder).documents
    assert document.parts[1].frames.shape == (3, 16, 16, 3)


def test_bad_films_are_left_out_and_the_next_is_read(folder, run, film):
    for name in ("a", "d", "e", "f"):
        (folder / f"{name}.mp4").write_bytes(film)
    (folder / "b.mp4").write_bytes(film[:60])
    (folder / "c.mp4").symlink_to("/etc/passwd")
    for name in ("b", "c", "f"):
        (folder / f"{name}.txt").write_text("words")
    (folder / "d.json").write_text("{cut")
    (folder / "e.json").write_text('{"fps": 10}')
    found = run("clips", folder)
    assert captions(found) == ["words"]
    assert found.result["reasons"] == {
        "no caption": 2,
        "bad video": 1,
        "outside": 1,
        "bad json": 1,
    }


def lerobot(folder, film, *, version="v2.1", episodes=3):
    (folder / "meta").mkdir()
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": version}))
    rows = [{"episode_index": n, "tasks": [f"task {n}"], "length": 3} for n in range(episodes)]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for camera in ("top", "wrist"):
        for number in range(2):
            path = folder / f"videos/chunk-000/observation.images.{camera}/episode_{number:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(film)
    return folder


def test_an_episode_of_lerobot_is_its_task_and_all_cameras(folder, run, film):
    found = run("clips", lerobot(folder, film))
    assert captions(found) == ["task 0", "task 1"]
    kinds = [type(part) for part in found.documents[0].parts]
    assert kinds == [Text, Video, Video]
    assert found.result["reasons"] == {"missing file": 1}


def test_newer_lerobot_folders_are_refused_in_one_line(folder, run, film):
    found = run("clips", lerobot(folder, film, version="v3.0"))
    assert found.documents == []
    assert "only v2 is read" in found.lines[0]["why"]


def test_broken_lists_of_lerobot_are_left_out(folder, run, film):
    lists = lerobot(folder, film) / "meta" / "episodes.jsonl"
    rows = ['{"episode_index": 0}', '{"episode_index": "1", "tasks": ["x"]}', "[]", "{}"]
    lists.write_text("\n".join(rows))
    found = run("clips", folder)
    assert found.result["reasons"] == {"no caption": 1, "missing file": 2, "bad json": 1}
