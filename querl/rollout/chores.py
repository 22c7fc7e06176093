"""Work that belongs to nobody who may be cancelled: once begun it is done to its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any


class Chores:
    """Tasks of their owner's; ``on_failure`` hears what one raised, whoever still waits for it."""

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[None]] = set()

    async def see_to(self, chore: Coroutine[Any, Any, None]) -> None:
        """Return when it is done, or has been cancelled by ``cancel``; raises what it raised."""
        task = asyncio.create_task(chore)
        self._tasks.add(task)
        task.add_done_callback(self._settle)
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def cancel(self) -> None:
        """End those under way."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _settle(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_failure(error)
