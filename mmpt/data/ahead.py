"""An iterator in a process of its own, some items ahead of who reads it.

The process is started anew (not forked, for libraries hold threads), so a script that uses it
needs `if __name__ == "__main__":`, as all of multiprocessing does.
"""

import multiprocessing
import queue
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from mmpt.config import UserError

T = TypeVar("T")


class Died(Exception):
    """The process is gone; what it had sent before was handed out."""


class Ahead(Iterator[T], Generic[T]):
    """The items of `generate(*arguments)`; `generate` is a function of a module.

    At most `depth` items wait here. Raises UserError for a mistake of the user in the process,
    RuntimeError with its traceback for other errors, and Died when it is killed.
    """

    def __init__(
        self, generate: Callable[..., Iterator[T]], *arguments: Any, depth: int = 4
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_live, args=(theirs, generate), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self._send(arguments)
        for _ in range(depth):
            self._send("one more")
        self._items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_receive, args=(self._pipe, self._items), daemon=True
        )
        self._thread.start()
        self._end = weakref.finalize(self, self.process.terminate)

    def __next__(self) -> T:
        kind, value = self._items.get()
        if kind == "item":
            self._send("one more")
            return value
        self._items.put((kind, value))  # it stays so
        if kind == "end":
            raise StopIteration
        if kind == "mistake":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(value)
        self.process.join()
        raise Died(f"exit code {self.process.exitcode}")

    def close(self) -> None:
        """End the process; what it was ahead is lost."""
        self._end()
        self.process.join()
        self._thread.join()
        self._pipe.close()

    def _send(self, value: Any) -> None:
        # where the process died, reading from the pipe says so
        with suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send(value)


def _receive(pipe: Connection, items: "queue.SimpleQueue[tuple[str, Any]]") -> None:
    # as many items come as were asked for, so the queue is bounded
    try:
        kind = "item"
        while kind == "item":
            kind, value = pipe.recv()
            items.put((kind, value))
    except (EOFError, OSError):
        items.put(("died", None))


def _live(pipe: Connection, generate: Callable[..., Iterator[Any]]) -> None:
    # the terminal's Ctrl-C goes to all processes; the first one decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody reads any more
        try:
            for item in generate(*pipe.recv()):
                pipe.recv()
                pipe.send(("item", item))
            pipe.send(("end", None))
        except UserError as error:
            pipe.send(("mistake", str(error)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception:
            pipe.send(("error", traceback.format_exc()))
