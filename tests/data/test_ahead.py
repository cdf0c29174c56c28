"""An iterator in another process: the same items, ahead by no more than asked, and it ends."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmpt.config import UserError
from mmpt.data.ahead import Ahead, Died


def count(folder: str, number: int) -> Iterator[int]:
    for item in range(number):
        (Path(folder) / str(item)).touch()
        yield item


def fail(kind: type[Exception]) -> Iterator[int]:
    yield 1
    raise kind("no luck")


def die() -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def test_items_come_in_order_and_few_are_made_ahead(tmp_path: Path) -> None:
    items = Ahead(count, str(tmp_path), 9, depth=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) <= 3 + 2 + 1  # one is made before it is asked for
    assert list(items) == [3, 4, 5, 6, 7, 8]
    items.process.join()
    for _ in range(3):  # the end stays the end
        assert list(items) == []
    items.close()


def test_close_ends_the_process(tmp_path: Path) -> None:
    items = Ahead(count, str(tmp_path), 1000)
    next(items)
    items.close()
    assert not items.process.is_alive()


@pytest.mark.parametrize(
    ("kind", "seen", "message"),
    [(UserError, UserError, "^no luck$"), (ValueError, RuntimeError, "ValueError: no luck")],
)
def test_errors_come_out_here(kind: type[Exception], seen: type[Exception], message: str) -> None:
    items = Ahead(fail, kind)
    assert next(items) == 1
    for _ in range(2):
        with pytest.raises(seen, match=message):
            next(items)
    items.close()


def test_a_killed_process_is_told() -> None:
    items = Ahead(die)
    assert next(items) == 1
    with pytest.raises(Died, match="exit code -9"):
        next(items)
    items.close()
