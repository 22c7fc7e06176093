"""JSON over HTTP to one server: many calls at once, each with a deadline, errors in one line."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

import aiohttp

from querl.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_SHOWN = 400  # characters of a server's complaint
# Idle connections, before the server closes them: vLLM's and SGLang's do after 5 s. A request sent
# at that moment is lost, and looks as if the server had ended.
KEPT_S = 2.0
NO_ENTRY = (401, 403)
HOW_TO_ENTER = ": set its key as the environment variable VLLM_API_KEY or SGLANG_API_KEY"


class ServerGone(EngineError):
    """The server does not answer: it ended, or the line to it broke."""


class Overdue(EngineError):
    """The server took the request and did not answer within its deadline."""


class Refused(EngineError):
    """The server says no: its status, all that it answered, and when it wants to be asked again.

    ``retry_after_s`` is None where it names no number of seconds.
    """

    def __init__(
        self, message: str, *, status: int, text: str, retry_after_s: float | None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.text = text
        self.retry_after_s = retry_after_s


def is_fault(error: EngineError) -> bool:
    """Whether the server is at fault, and not what it was asked."""
    return isinstance(error, ServerGone | Overdue) or (
        isinstance(error, Refused) and error.status >= 500
    )


class Http:
    """A client of the server at ``url``. Closing it ends what is under way."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = dict(headers or {})
        self._session: aiohttp.ClientSession | None = None

    async def post(
        self,
        route: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """The JSON object that the server answers, empty where it answers none.

        Raises ServerGone when nothing answers, Refused for a refusal, Overdue for a missed
        deadline: all of them EngineErrors.
        """
        return await self._call("POST", route, body, params, timeout_s)

    async def get(self, route: str, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """As ``post``, without a body."""
        return await self._call("GET", route, None, None, timeout_s)

    async def close(self) -> None:
        """End all calls."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _call(
        self,
        method: str,
        route: str,
        body: Any,
        params: Mapping[str, str] | None,
        timeout_s: float,
    ) -> dict[str, Any]:
        if self._session is None:
            # the engine bounds what runs at once; a pool of 100 would queue where nobody sees it
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, trace_configs=[_one_after_another()]
            )
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self.url + route, json=body, params=params, timeout=timeout
            ) as response:
                text = await response.text(errors="replace")
                if response.status >= 400:
                    raise Refused(
                        f"{self.url}{route} refused: {response.status} {text[:MOST_SHOWN]}"
                        + (HOW_TO_ENTER if response.status in NO_ENTRY else ""),
                        status=response.status,
                        text=text,
                        retry_after_s=_seconds(response.headers.get("Retry-After")),
                    )
        except TimeoutError as error:
            raise Overdue(f"{self.url}{route} did not answer in {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"{self.url}{route}: {error or type(error).__name__}") from error
        return await asyncio.to_thread(_object, text) if len(text) > 2**20 else _object(text)


def _one_after_another() -> aiohttp.TraceConfig:
    """One new connection a turn of the event loop.

    Processes that share a server's port each take all that have come when they look: of 1,024 at
    once one of four took half, and kept them.
    """
    first = asyncio.Lock()

    async def wait(*_: object) -> None:
        async with first:
            await asyncio.sleep(0)

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_start.append(wait)
    return trace


def _seconds(retry_after: str | None) -> float | None:
    """The header's number; None for a date, which clocks that differ would falsify."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
