"""What stands before the server: few addresses, small bodies, not too often, and no other hosts.

Gradio serves more than this page needs, among it what fetches addresses for a visitor. Here all
but what is named is not found, and browsers are told to load nothing from elsewhere.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from mmpt.demo.limits import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api/"
OPEN = ("/", "/config", "/favicon.ico", "/manifest.json", "/theme.css", "/robots.txt")
UNDER = ("/assets/", "/static/", "/svelte/")
OF_API = ("info", "app_id", "startup-events", "theme.css", "upload", "upload_progress", "file=")
OF_API += ("queue/join", "queue/data", "run/predict", "call/", "heartbeat/", "cancel", "reset")
UPLOAD = f"{API}upload"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """ASGI middleware. folder: where uploads are kept."""

    def __init__(self, app: App, limits: Limits, folder: Path) -> None:
        self.app, self.limits, self.folder = app, limits, folder
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a sentence, or hand on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refused = self._refuse(scope)
        if refused is not None:
            await _drain(receive, 4 * self._most(scope["path"]))
            return await _say(send, *refused)
        most = self._most(scope["path"])
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            # a body without a length is cut where it becomes too long
            return message if seen <= most else {"type": "http.disconnect"}

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        return await self.app(scope, bounded, marked)

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        path, posts = scope["path"], scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if not _is_open(path):
            return 404, "there is nothing here"
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most(path):
            return 413, f"that is too much at once; at most {self._most(path) >> 20} MiB"
        if posts and not self._may(scope):
            return 429, "too many requests; wait a moment"
        if path == UPLOAD and _bytes_in(self.folder) > self.limits.folder:
            return 507, "there is no room for more files; try again in half an hour"
        return None

    def _most(self, path: str) -> int:
        limits = self.limits
        return limits.files * limits.upload + limits.body if path == UPLOAD else limits.body

    def _may(self, scope: Scope) -> bool:
        """One request less of those that an address has, which come back with time."""
        address, now = (scope.get("client") or ("",))[0], time.monotonic()
        left, last = self._left.pop(address, (float(self.limits.requests), now))
        left = min(self.limits.requests, left + (now - last) * self.limits.requests / 60)
        self._left[address] = (left - 1 if left >= 1 else left), now
        if len(self._left) > self.limits.visitors:
            self._left.popitem(last=False)
        return left >= 1


def _is_open(path: str) -> bool:
    if path in OPEN or path.startswith(UNDER):
        return True
    return path.startswith(API) and path.removeprefix(API).startswith(OF_API)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # removed in the meantime
            continue
    return total


async def _drain(receive: Receive, most: int) -> None:
    """Read on, and keep nothing: who is still sending would not hear why it is refused."""
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b""))
        if not message.get("more_body"):
            return


async def _say(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
