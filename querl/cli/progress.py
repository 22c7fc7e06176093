"""Progress on a terminal; on a pipe, a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

from rich.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

PLAIN_LINE_EVERY_S = 10.0


class PlainLines:
    """Says how far something is, every ten seconds and at its end."""

    def __init__(self, console: Console, what: str) -> None:
        self._console = console
        self._what = what
        self._last_s = time.monotonic()

    def tell(self, done: float, total: float, remark: str = "") -> None:
        """Perhaps print a line."""
        if time.monotonic() - self._last_s >= PLAIN_LINE_EVERY_S or done >= total:
            self._last_s = time.monotonic()
            line = f"{self._what} {done:,.0f}/{total:,.0f} {remark}"
            self._console.print(line.rstrip(), soft_wrap=True)


def counter(show: Callable[..., None], total: int) -> Callable[..., None]:
    """A function to call whenever one of ``total`` is done; it passes over what is done."""
    done = count(1)
    return lambda *_: show(next(done), total)


@contextmanager
def progress(console: Console, what: str) -> Iterator[Callable[..., None]]:
    """A function ``(done, total, remark="")`` to call as often as one likes."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)

            def show(done: float, total: float, remark: str = "") -> None:
                bar.update(task, completed=done, total=total, description=f"{what} {remark}")

            yield show
        return
    yield PlainLines(console, what).tell
