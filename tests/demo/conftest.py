"""A demo of a tiny random model, served as `mmpt demo` does, and a browser that looks at it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import mmpt
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import Processor

ROOT = Path(mmpt.__file__).resolve().parent.parent
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="session")
def model_folder(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of all four media."""
    folder = tmp_path_factory.mktemp("model")
    names = ("text", "image", "video", "speech")
    processor = Processor.load([str(zoo / name) for name in names], max_side=32)
    config = ModelConfig(
        vocab_size=len(processor.vocabulary),
        width=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=processor.vocabulary.fingerprint,
    )
    model = Decoder.from_config(config, seed=0)
    model.add_noisy_groups()
    save_model(model, processor, folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> Pipeline:
    return Pipeline.load(model_folder)


@pytest.fixture(scope="session")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running demo; what it wrote is shown where it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    command = [sys.executable, "-m", "mmpt", "demo", str(model_folder), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while "answers at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, with a microphone that beeps."""
    reason = "looking at the page needs playwright"
    sync = pytest.importorskip("playwright.sync_api", reason=reason)
    if not CHROMIUM.exists():
        pytest.skip(f"looking at the page needs {CHROMIUM}")
    with sync.sync_playwright() as playwright:
        options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        options += ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def windows(browser: Any) -> Callable[[int, int, bool], Any]:
    """Windows of a size, which keep what they loaded of the page."""

    @cache
    def window(width: int, height: int, dark: bool) -> Any:
        opened = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            permissions=["microphone"],
        )
        opened.set_default_timeout(20_000)
        return opened

    return window


@pytest.fixture
def visit(windows: Callable[..., Any], server: str) -> Iterator[Callable[..., Any]]:
    """Opens the page as a new visitor; it may ask the server alone, and nothing may go wrong."""
    pages, wrong = [], []

    def watch(url: str) -> None:
        if not url.startswith((f"{server}/", "data:", "blob:")):
            wrong.append(f"asked {url}")

    def open_page(*, width: int = 1280, height: int = 800, dark: bool = False) -> Any:
        page = windows(width, height, dark).new_page()
        pages.append(page)
        page.on("request", lambda request: watch(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(server)
        page.wait_for_selector("#composer textarea")
        page.wait_for_selector("#history", state="attached")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []
