"""JSON over HTTP to one server: many calls at once, each with a deadline, errors in one line."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import aiohttp

from querl.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_SHOWN = 400  # characters of a server's complaint


class ServerGone(EngineError):
    """The server does not answer: it ended, or the line to it broke."""


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

        Raises ServerGone when nothing answers, EngineError for a refusal or a missed deadline.
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
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self.url + route, json=body, params=params, timeout=timeout
            ) as response:
                text = await response.text()
                if response.status >= 400:
                    raise EngineError(
                        f"{self.url}{route} refused: {response.status} {text[:MOST_SHOWN]}"
                    )
        except TimeoutError as error:
            raise EngineError(f"{self.url}{route} did not answer in {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"{self.url}{route}: {error or type(error).__name__}") from error
        return await asyncio.to_thread(_object, text) if len(text) > 2**20 else _object(text)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
