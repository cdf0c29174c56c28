"""`mmpt demo`: one conversation of text, pictures, speech and clips in the browser.

What is here: `limits` (what a visitor may send), `conversation` (what was said and how it is
answered), `render` (it as HTML), `page` (the controls), `api` (the same for programs).
"""

import logging
import os
import signal
import socket
import tempfile
from pathlib import Path
from threading import Event as Flag
from typing import Any

from mmpt.config import UserError

log = logging.getLogger(__name__)
DEFAULT_MODEL = Path("examples/mmpt-mini")
HOST = "127.0.0.1"


def demo(
    model: Path = DEFAULT_MODEL, *, port: int = 7860, device: str = "cpu", browser: bool = False
) -> dict[str, Any]:
    """Serve a conversation with MODEL, a model folder or a run, on this computer alone.

    Anyone who can open http://127.0.0.1:PORT may write, record and upload; nothing is shared, and
    nothing is asked of other servers. Ctrl-C ends it. --browser opens the page.
    """
    if not model.exists():
        raise UserError(
            f"no model at {model}; give a model folder or a run, such as: mmpt demo "
            "runs/quickstart/model"
        )
    _check_port(port)
    with tempfile.TemporaryDirectory(prefix="mmpt-demo-") as folder:
        # where Gradio keeps what is uploaded; it reads both when it is imported
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio looks whether it is there
        try:
            import gradio  # noqa: F401
        except ImportError:
            raise UserError("the demo needs Gradio: pip install 'mmpt[demo]'") from None
        from mmpt.demo.limits import Limits
        from mmpt.demo.page import build, close, launch
        from mmpt.pipeline import Pipeline
        from mmpt.serve import Server

        pipeline = Pipeline.load(model, device=device)
        limits = Limits()
        server = Server(pipeline, queue=limits.queue, batch=limits.answers)
        blocks = build(server, pipeline, limits, Path(folder), title=str(model))
        launch(blocks, limits, Path(folder), host=HOST, port=port, browser=browser)
        url = f"http://{HOST}:{port}"
        log.info("%s answers at %s; Ctrl-C ends it", model, url)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            Flag().wait()
        except KeyboardInterrupt:
            log.info("ended")
        finally:
            server.close()
            close(blocks)
    return {"url": url}


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be had ({error}); give another --port") from None
