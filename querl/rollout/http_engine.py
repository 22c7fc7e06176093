"""An engine that is a server: what all kinds of them have in common, over a dialect's routes.

Requests are cut by a pause and continued after it, so that one completion may hold tokens of
several versions. A server that ended, failed or froze is started anew, once, and one that lives is
not, though a line to it broke; what was open is asked again, and nothing is lost but time.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from querl.errors import EngineError
from querl.rollout.calls import Calls
from querl.rollout.chores import Chores
from querl.rollout.engine import Sampling
from querl.rollout.http import Http, Overdue, Refused, ServerGone, is_fault
from querl.rollout.noise import seed
from querl.rollout.pieces import Pieces
from querl.rollout.server import allow_connections, wait_until_ready
from querl.types import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from transformers import PreTrainedTokenizerBase

    from querl.rollout.dialect import Dialect, Piece, Weights
    from querl.rollout.engine import RequestKey
    from querl.rollout.server import Server

CUT_UNSEEN = 499  # of a request that a pause met before anything was sampled for it (SGLang)
MOST_BROKEN = 3  # lines to a server that lives, for one request
AGAIN_S = 600.0  # a server that fails twice within these seconds will fail again


class HttpEngine:
    """Samples from ``server``, which need not have been launched; it is closed with the engine.

    ``context`` is the tokens that a prompt and its completion may have together, ``max_batch`` the
    requests that are open at once. After ``heartbeat_s`` without an answer the server is asked
    whether it lives, and counts as frozen when nothing at all was answered in as many seconds more.
    Raises EngineError when closed, for what the server refuses, and for all that wait when the
    server fails twice within ``AGAIN_S`` seconds or cannot be started.
    """

    def __init__(
        self,
        dialect: Dialect,
        server: Server,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        max_batch: int = 256,
        heartbeat_s: float = 15.0,
    ) -> None:
        allow_connections(max_batch)
        self._dialect = dialect
        self._server = server
        self._tokenizer = tokenizer
        self._context = context
        self._heartbeat_s = heartbeat_s
        self._http: Http | None = None  # to the server that is up; None before and between
        self._version = 0
        self._weights: Weights | None = None
        self._is_asleep = False
        self._has_weights = True  # whether there is memory for them; not so asleep
        self._is_blank = False  # whether what they were is lost
        self._end: str | None = None  # why nothing can be asked any more
        self._num_restarts = 0
        self._restarted_at = -AGAIN_S
        self._seats = asyncio.Semaphore(max_batch)
        self._calls = Calls(heartbeat_s, self._find_out)
        self._may_ask = asyncio.Event()
        self._change = asyncio.Lock()  # of what the server holds: one at a time
        self._chores = Chores(self._break_off)

    @property
    def version(self) -> int:
        """The policy step of the weights now loaded."""
        return self._version

    @property
    def num_restarts(self) -> int:
        """How often the server was started anew since it failed."""
        return self._num_restarts

    async def generate(
        self, prompt_ids: tuple[int, ...], sampling: Sampling, key: RequestKey
    ) -> Completion:
        """Sample one completion; ``context`` bounds it as ``max_tokens`` does."""
        self._check_open()
        limit = min(sampling.max_tokens, self._context - len(prompt_ids))
        pieces, num_broken = Pieces(self._tokenizer, sampling.stop), 0
        async with self._seats:
            while pieces.finish is None:
                if len(pieces.token_ids) >= limit:
                    return pieces.completion(FinishReason.LENGTH)
                http = await self._up()
                version, num_said = self._version, len(pieces.token_ids)
                try:
                    piece = await self._ask(
                        http,
                        prompt_ids + tuple(pieces.token_ids),
                        replace(sampling, max_tokens=limit - num_said),
                        seed(key, num_said),
                    )
                except (ServerGone, Overdue, Refused) as error:
                    if isinstance(error, Refused) and error.status == CUT_UNSEEN:
                        continue
                    if not is_fault(error):
                        raise
                    num_broken += 1
                    await self._chores.see_to(self._mend(http, error, num_broken))
                else:
                    if piece is not None:
                        pieces.add(piece, version)
        return pieces.completion(pieces.finish)

    def enter(self, num_episodes: int) -> None:
        """Servers batch continuously: nothing has to be announced."""

    def leave(self, num_episodes: int) -> None:
        """As ``enter``."""

    async def load_weights(self, weights: Weights, version: int) -> None:
        """Cut what runs, load, and go on with what was cut. Asleep, the cache stays given back."""

        def note() -> None:
            self._weights, self._version = weights, version

        async def load(http: Http) -> None:
            await self._take_weights_back(http)
            await self._load(http)

        await self._chores.see_to(self._bring_about(note, load))
        self._check_open()

    async def sleep(self) -> None:
        """Cut what runs, and give the GPU's memory back; requests wait until ``wake``."""

        def note() -> None:
            self._is_asleep = True

        if not self._is_asleep:
            await self._chores.see_to(self._bring_about(note, self._fall_asleep))
            self._check_open()

    async def wake(self) -> None:
        """Take the memory again; weights that ``sleep`` dropped and nobody loaded are loaded."""

        def note() -> None:
            self._is_asleep = False

        async def wake(http: Http) -> None:
            await self._take_weights_back(http)
            if self._is_blank:
                await self._load(http)
            await self._dialect.wake_cache(http)

        if self._is_asleep:
            await self._chores.see_to(self._bring_about(note, wake))
            self._check_open()

    async def close(self) -> None:
        """End the server; all that wait get an EngineError."""
        self._free_all(f"the {self._dialect.name} engine is closed")
        await self._calls.close()
        await self._chores.cancel()
        await self._disconnect()
        await self._server.close()

    # --- requests

    def _check_open(self) -> None:
        if self._end is not None:
            raise EngineError(self._end)

    async def _up(self) -> Http:
        """Wait until requests may be sent."""
        if self._http is None and not self._change.locked():
            await self._chores.see_to(self._begin())
        while not self._may_ask.is_set():  # it may be cleared between its call and our turn
            await self._may_ask.wait()
        self._check_open()
        assert self._http is not None
        return self._http

    async def _ask(
        self, http: Http, prompt_ids: tuple[int, ...], sampling: Sampling, seed: int
    ) -> Piece | None:
        """What the server answers; None where the engine itself hung up."""
        route, body = self._dialect.request(prompt_ids, sampling, seed=seed)
        answer = await self._calls.post(http, route, body)
        try:
            return None if answer is None else self._dialect.piece(answer)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{http.url}{route} answers otherwise than {self._dialect.name} does ({error!r}): "
                "engine.url may be another server's, or this one of a version that querl "
                "does not know"
            ) from error

    async def _find_out(self) -> bool:
        """Whether a silent server lives, or is mended; False where it is no time to ask."""
        http, heard_at = self._http, self._calls.heard_at
        if http is None or not self._may_ask.is_set():
            return False  # it is being started or changed; who asks then starts a watch
        try:
            await self._check_alive(http, timeout_s=self._heartbeat_s)
        except (ServerGone, Overdue) as error:
            if self._calls.heard_at == heard_at and self._may_ask.is_set():
                await self._chores.see_to(self._mend(http, error))
                return True
        self._calls.hear()
        return True

    async def _check_alive(self, http: Http, *, timeout_s: float) -> None:
        """Raises ServerGone or Overdue. Whatever is answered, who answers lives."""
        with suppress(Refused):
            await self._dialect.check_alive(http, timeout_s=timeout_s)

    # --- what the server holds

    async def _bring_about(
        self, note: Callable[[], None], change: Callable[[Http], Awaitable[None]]
    ) -> None:
        """Pause the server, ``change`` it, and let it go on, unless it sleeps.

        What is wished is noted before anything is asked of the server: where it fails at that, a
        new one is brought into that state.
        """
        async with self._change:
            if self._http is None and self._end is None:
                await self._start_or_give_up()
            self._check_open()
            http, was_asleep = self._http, self._is_asleep
            assert http is not None
            self._may_ask.clear()
            note()
            try:
                if not was_asleep:
                    await self._cut(http)
                await change(http)
                if not self._is_asleep:
                    await self._dialect.resume(http)
            except EngineError as error:
                if not is_fault(error):
                    await self._give_up(str(error))
                    raise
                await self._restart(error)
                self._check_open()
            self._go_on()

    async def _cut(self, http: Http) -> None:
        # a frozen one is found out as soon as in mid-rollout: to answer all may take it minutes
        await self._check_alive(http, timeout_s=2 * self._heartbeat_s)
        await self._dialect.pause(http)
        await self._calls.settle()

    def _go_on(self) -> None:
        self._calls.hear()
        if not self._is_asleep:
            self._may_ask.set()

    async def _load(self, http: Http) -> None:
        if self._weights is not None:
            await self._dialect.load(http, self._weights)
        self._is_blank = False

    async def _fall_asleep(self, http: Http) -> None:
        # what is published is loaded again at the next step; of an adapter's base nobody has it
        keeps_weights = self._weights is None or self._weights.is_adapter
        self._has_weights, self._is_blank = False, not keeps_weights
        await self._dialect.sleep(http, keeps_weights=keeps_weights)

    async def _take_weights_back(self, http: Http) -> None:
        if not self._has_weights:
            await self._dialect.wake_weights(http)
            self._has_weights = True

    # --- the server's life

    async def _begin(self) -> None:
        """Start the server, unless somebody has done so meanwhile."""
        async with self._change:
            if self._http is None and self._end is None:
                await self._start_or_give_up()
                self._go_on()

    async def _mend(self, http: Http, reason: EngineError, num_broken: int = 1) -> None:
        """Start the server of ``http`` anew, unless somebody has, or only a line to it broke."""
        async with self._change:
            if self._http is not http or self._end is not None:
                return
            if isinstance(reason, ServerGone) and num_broken <= MOST_BROKEN:
                with suppress(ServerGone, Overdue):
                    return await self._check_alive(http, timeout_s=self._heartbeat_s)
            await self._restart(reason)
            self._go_on()

    async def _restart(self, reason: EngineError) -> None:
        """End the server and start it anew, once."""
        self._may_ask.clear()
        self._calls.hang_up()
        last_words = self._server.last_words()
        self._server.note(f"to be started anew, since {reason}")
        await self._disconnect()
        await self._server.kill()
        if time.monotonic() - self._restarted_at < AGAIN_S:
            again = f"the {self._dialect.name} engine failed again after it was started anew"
            await self._give_up(f"{again}: {reason}; {last_words}")
            return
        await self._start_or_give_up(because=f"{reason}; then, started anew: ")
        self._num_restarts += 1
        self._restarted_at = time.monotonic()

    async def _start_or_give_up(self, *, because: str = "") -> None:
        try:
            await self._start()
        except EngineError as error:
            await self._give_up(f"{because}{error}; {self._server.last_words()}")

    async def _start(self) -> None:
        """Bring a new server into the wished state."""
        self._server.launch()
        http = Http(self._server.url, headers=self._server.headers)
        try:
            await wait_until_ready(self._server, self._dialect, http)
            self._has_weights, self._is_blank = True, False
            if self._weights is not None or self._is_asleep:
                await self._dialect.pause(http)
                await self._load(http)
                if self._is_asleep:
                    await self._fall_asleep(http)
                else:
                    await self._dialect.resume(http)
        except BaseException:
            await http.close()
            raise
        self._http = http

    async def _give_up(self, why: str) -> None:
        self._free_all(why)
        await self._disconnect()
        await self._server.kill()

    def _free_all(self, why: str) -> None:
        """From now on, all that wait or ask are told why nothing is answered."""
        self._end = self._end or why
        self._calls.hang_up()
        self._may_ask.set()

    def _break_off(self, error: BaseException) -> None:
        # in what state the server was left nobody knows: nobody may wait for it
        self._free_all(f"the {self._dialect.name} engine was left half changed: {error}")

    async def _disconnect(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.close()
