"""The requests that are open at a server: ended together, and watched over while it is silent."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from querl.rollout.http import Http

ANSWER_S = 3600.0  # for one request to be answered, while others are
CUT_S = 10.0  # without an answer to any of those that a pause has cut; vLLM's come by the 128


class Calls:
    """Sends requests; after ``heartbeat_s`` without an answer to any, ``find_out`` is awaited.

    It says whether to go on watching, and calls ``hear`` where the server lives.
    """

    def __init__(self, heartbeat_s: float, find_out: Callable[[], Awaitable[bool]]) -> None:
        self._heartbeat_s = heartbeat_s
        self._find_out = find_out
        self._open: set[asyncio.Task[dict[str, Any]]] = set()
        self._watch: asyncio.Task[None] | None = None
        self.heard_at = 0.0  # of the newest answer, or of the first request after a silence

    def hear(self) -> None:
        """The server lives: silence begins anew."""
        self.heard_at = time.monotonic()

    async def post(self, http: Http, route: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """What the server answers; None where we hung up. Raises as ``Http.post`` does."""
        if not self._open:
            self.hear()
        call = asyncio.create_task(http.post(route, body, timeout_s=ANSWER_S))
        self._open.add(call)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_over())
        try:
            await asyncio.wait([call])
        finally:
            self._open.discard(call)
            call.cancel()  # of no effect once it is answered
        if call.cancelled():
            return None
        answer = call.result()
        self.hear()
        return answer

    def hang_up(self) -> None:
        """Answer all that are open with None."""
        for call in self._open:
            call.cancel()

    async def settle(self) -> None:
        """Wait for the answers to all that a pause has cut."""
        late = set(self._open)
        while late:
            done, late = await asyncio.wait(
                late, timeout=CUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                # what came after the pause waits inside the server for the new weights, and would
                # be noted as sampled from the old ones
                self.hang_up()

    async def close(self) -> None:
        """End the watch."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])

    async def _watch_over(self) -> None:
        while self._open:
            quiet_s = time.monotonic() - self.heard_at
            if quiet_s < self._heartbeat_s:
                await asyncio.sleep(self._heartbeat_s - quiet_s)
            elif not await self._find_out():
                return
