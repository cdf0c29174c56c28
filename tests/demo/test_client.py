"""The endpoints for programs: answers, limits, many at once, and what must never be served."""

import json
import random
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from gradio_client import Client, handle_file

from mmpt.parts import Audio, Image, Video, load_part
from mmpt.replay import replay

SMALL = {"height": 16, "width": 16, "frames": 5, "max_ids": 12, "max_seconds": 0.5, "num_passes": 2}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[Any]:
    caller = Client(server, verbose=False)
    yield caller
    caller.close()


def upload(path: Path) -> Any:
    return handle_file(str(path))


def generate(client: Any, *given: Any, **more: Any) -> dict[str, Any]:
    return client.predict(*given, settings=SMALL, api_name="/generate", **more)


@pytest.mark.parametrize("decoder", ["ar", "dida"])
def test_each_kind_of_answer_comes_with_its_file_and_its_record(
    client: Any, decoder: str, model_folder: Path
) -> None:
    kinds = {"image": Image, "speech": Audio, "video": Video}
    for name, kind in kinds.items():
        made = generate(client, "red apple", answer=name, decoder=decoder, seed=3)
        assert (made["done"], made["seed"], made["settings"]["decoder"]) == (True, 3, decoder)
        [part] = made["parts"]
        assert isinstance(load_part(part["file"]), kind)
    again = replay(Path(made["record"]), model=model_folder)
    assert again["replayed"] == "equal to the last bit"
    said = generate(client, "red", answer="text", decoder=decoder)
    assert isinstance(said["parts"][0]["text"], str)
    assert generate(client, "red")["parts"] is not None  # what the model decides


def test_files_are_read_and_edited(client: Any, tmp_path: Path) -> None:
    picture = tmp_path / "apple.png"
    Image(np.zeros((32, 32, 3), np.uint8)).save(picture)
    sound = tmp_path / "hum.wav"
    Audio(np.zeros(8000, np.float32), 16_000).save(sound)
    made = generate(client, "what is this?", [upload(picture), upload(sound)], answer="text")
    assert made["done"]
    edited = client.predict(upload(picture), "0,0,16,16", api_name="/edit")
    assert edited["parts"][0]["type"] == "image"
    edited = client.predict(upload(sound), "0.1,0.3", "a tone", api_name="/edit")
    assert edited["parts"][0]["type"] == "speech"


def test_progress_comes_and_a_job_is_cancelled(client: Any) -> None:
    long = SMALL | {"num_passes": 64, "frames": 33, "height": 64, "width": 64}
    job = client.submit("red", answer="video", decoder="dida", settings=long, api_name="/generate")
    end = time.monotonic() + 20
    while len(job.outputs()) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    assert not job.outputs()[-1]["done"]
    job.cancel()
    began = time.monotonic()
    assert generate(client, "red", answer="text")["done"]
    assert time.monotonic() - began < 5


def test_a_plan_says_what_an_answer_takes(client: Any) -> None:
    plan = client.predict("red apple", answer="image", settings=SMALL, api_name="/plan")
    assert plan["made"]["image"] == 4
    assert plan["seconds"] > 0


def test_text_with_structure_ids_is_text(client: Any) -> None:
    said = "<boi> <eoi> <eod> <user> <assistant> <pad> \0 \u202e " + "<size-64>" * 20
    assert generate(client, said, answer="image")["done"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "x" * 5000}, "4,000"),
        ({"text": "x", "answer": "smell"}, "smell"),
        ({"text": "x", "settings": {"hight": 3}}, "height"),
        ({"text": "x", "settings": {"height": 4096}}, "at most"),
        ({"text": "x", "settings": {"max_seconds": 1e9}}, "at most"),
        ({"text": "x", "settings": {"height": 17}, "answer": "image"}, "multiples"),
        ({"text": "x", "settings": {"max_ids": True}}, "max_ids"),
        ({"text": "x", "form": "poem"}, "poem"),
        ({"text": "x", "files": [{"path": "/etc/passwd"}]}, "uploaded"),
        ({"text": "x", "files": [{"path": "http://127.0.0.1:1/x.png"}]}, "uploaded"),
        ({"text": "x", "files": [{"path": "../../x.png"}]}, "uploaded"),
        ({"text": "x", "files": ["a"]}, "uploaded"),
        ({"text": "x", "files": 3}, "uploaded"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    client: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        client.predict(**given, api_name="/generate")
    assert "Traceback" not in str(caught.value)
    assert "/site-packages/" not in str(caught.value)


def test_sixteen_clients_are_answered_at_once(server: str) -> None:
    def one(number: int) -> bool:
        caller = Client(server, verbose=False)
        kind = ("text", "image", "speech", "any")[number % 4]
        made = generate(caller, f"apple {number}", answer=kind, seed=number)
        caller.close()
        return made["done"] and made["seed"] == number

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(16)))


def test_of_fifty_at_once_each_is_answered_or_told_to_wait(server: str, client: Any) -> None:
    def one(number: int) -> str:
        data = [f"apple {number}", [], "image", "ar", number, "conversation", SMALL]
        address = f"{server}/gradio_api/call/generate"
        status, body = post(address, {"data": data})
        if status != 200:
            assert status in (429, 503), (status, body)
            return "told"
        event = json.loads(body)["event_id"]
        with urllib.request.urlopen(f"{address}/{event}", timeout=60) as stream:
            said = stream.read().decode()
        assert "event: complete" in said
        return "answered"

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(one, range(50)))
    assert outcomes.count("answered") >= 16
    assert generate(client, "red", answer="text")["done"]


def test_too_many_requests_are_refused_for_a_while(server: str) -> None:
    statuses = set()
    for _ in range(700):
        statuses.add(post(f"{server}/gradio_api/reset", {"event_id": "x"})[0])
        if 429 in statuses:
            break
    assert 429 in statuses
    time.sleep(3)  # some come back each second
    assert post(f"{server}/gradio_api/reset", {"event_id": "x"})[0] != 429


def post(address: str, data: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(
        address, json.dumps(data).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def get(address: str) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={Path(__file__)}",
        "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file=/tmp/../etc/passwd",
        "gradio_api/file=http://127.0.0.1:1/",
        "gradio_api/proxy=http://127.0.0.1:1/",
        "gradio_api/file/etc/passwd",
        "static/../../../../../../etc/passwd",
        "assets/..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "monitoring",
        "gradio_api/vibe-code",
        "gradio_api/custom_component/1/client/component/index.js",
    ],
)
def test_no_other_file_and_no_other_address_is_served(server: str, path: str) -> None:
    status, body, _ = get(f"{server}/{path}")
    assert status in (400, 403, 404), (status, body[:200])
    assert b"root:" not in body
    assert b"def test_" not in body


def test_the_page_may_load_nothing_from_elsewhere(server: str) -> None:
    status, body, headers = get(server)
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert b"googleapis" not in body
    assert b"cdn" not in body.lower()


def test_bodies_are_bounded(server: str) -> None:
    status, _ = post(f"{server}/gradio_api/queue/join", {"data": ["x" * (2 << 20)]})
    assert status == 413


def bombs(folder: Path) -> Iterator[Path]:
    """Files that are broken, or say or become far more than they are."""
    folder.mkdir()
    rng = random.Random(0)
    good = folder / "good.png"
    Image(np.zeros((32, 32, 3), np.uint8)).save(good)
    data = good.read_bytes()
    header = bytearray(data)
    header[16:24] = (30_000).to_bytes(4, "big") * 2
    flac = folder / "hour.flac"
    soundfile.write(flac, np.zeros(3600 * 1000, np.int16), 1000)
    yield flac
    (folder / "hour.wav").write_bytes(b"")
    with wave.open(str(folder / "hour.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(1000)
        file.writeframes(bytes(3600 * 1000))
    yield folder / "hour.wav"
    names = {
        "wide.png": bytes(header),
        "cut.png": data[:60],
        "empty.png": b"",
        "empty.wav": b"",
        "text.png": b"hello",
        "picture.wav": data,
        "picture.mp4": data,
        "null.txt": b"\xff\xfe\x00",
        "script.html": b"<script>alert(1)</script>",
        "list.m3u8": b"#EXTM3U\n/etc/passwd\n",
        "list.mp4": b"#EXTM3U\n/etc/passwd\n",
    }
    for suffix in ("png", "gif", "webp", "wav", "mp4", "webm", "mp3", "flac"):
        names[f"noise.{suffix}"] = rng.randbytes(2000)
    for name, content in names.items():
        (folder / name).write_bytes(content)
        yield folder / name


def test_malformed_and_huge_files_are_refused_and_the_server_goes_on(
    client: Any, tmp_path: Path
) -> None:
    for path in bombs(tmp_path / "bombs"):
        with pytest.raises(Exception, match=rf"{path.stem}|list\.") as caught:
            generate(client, "what?", [upload(path)], answer="text")
        assert str(tmp_path) not in str(caught.value), path
        assert "mmpt-demo-" not in str(caught.value), path
    assert generate(client, "red", answer="text")["done"]


def test_a_file_over_the_limit_is_not_taken(client: Any, tmp_path: Path) -> None:
    big = tmp_path / "big.wav"
    big.write_bytes(bytes(17 << 20))
    with pytest.raises(Exception, match=r"413|maximum|too much"):
        generate(client, "what?", [upload(big)], answer="text")
    assert generate(client, "red", answer="text")["done"]
