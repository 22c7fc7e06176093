"""Any chat endpoint of OpenAI's kind, hosted or local, as an engine for evaluation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from querl.errors import EngineError
from querl.rollout import noise
from querl.rollout.http import MOST_SHOWN, NO_ENTRY, Http, Overdue, Refused, ServerGone
from querl.rollout.openai_chat import Manner, Said, said, said_by_refusal
from querl.types import Completion

if TYPE_CHECKING:
    from collections.abc import Callable

    from querl.rollout.engine import RequestKey, Sampling
    from querl.rollout.messages import MessageIds
    from querl.types import Message

ROUTE = "/chat/completions"
SEEDS = 2**31  # larger ones some endpoints refuse
MOST_TRIES = 6  # of one request
DEAR_TRIES = 3  # of them that count for one of a missed deadline, or where nothing ever answered
MOST_WAIT_S = 120.0
MOST_LOST = 3  # requests in a row that may be lost before the endpoint counts as broken
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504, 529))
_REFUSED = frozenset((400, 413, 422))  # because of what a request says


class OpenAiEngine:
    """Implements ``querl.rollout.engine.Engine`` over ``{url}/chat/completions``.

    Its ids are those of ``MessageHistory`` with the same ``MessageIds``, and the log-probabilities
    it gives are zeros: nothing can be trained on them. A request is tried again, after growing
    waits or what Retry-After says, when the endpoint is busy or fails; one that is lost raises
    TimeoutError, which breaks its episode alone, unless none or no other is answered any more.
    ``say`` hears, once each, what the endpoint refuses and so is left out.
    """

    num_restarts = 0  # there is no server of ours that could end

    def __init__(
        self,
        url: str,
        model: str,
        ids: MessageIds,
        *,
        api_key: str | None,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._model = model
        self._ids = ids
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._say = say
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = Http(url, headers=headers)
        self._manner = Manner()
        self._told: set[str] = set()
        self._may_lose = 0  # before the first answer the endpoint is not known to work
        self._is_closed = False

    @property
    def version(self) -> int:
        """An endpoint's weights stay what they are."""
        return 0

    async def generate(
        self, prompt_ids: tuple[int, ...], sampling: Sampling, key: RequestKey
    ) -> Completion:
        """The endpoint's answer to the messages that these ids stand for.

        Raises TimeoutError for one that is lost, EngineError for an endpoint that cannot be used.
        """
        messages = self._ids.decode(prompt_ids)
        turn = await self._ask(messages, sampling, noise.seed(key, 0) % SEEDS)
        token_ids = self._ids.encode("assistant", turn.text, turn.num_tokens)
        return Completion(
            token_ids=token_ids,
            logprobs=(0.0,) * len(token_ids),
            versions=(0,) * len(token_ids),
            finish_reason=turn.finish,
        )

    def enter(self, num_episodes: int) -> None:
        """Nothing waits for others here."""

    def leave(self, num_episodes: int) -> None:
        """Nothing waits for others here."""

    async def load_weights(self, weights: object, version: int) -> None:  # noqa: ARG002
        """Refused: raises EngineError."""
        raise EngineError("engine.kind=openai has no weights to load: it only evaluates")

    async def sleep(self) -> None:
        """Nothing to give back."""

    async def wake(self) -> None:
        """Nothing to take back."""

    async def close(self) -> None:
        """End all calls; later ones raise EngineError."""
        self._is_closed = True
        await self._http.close()

    async def _ask(self, messages: list[Message], sampling: Sampling, seed: int) -> Said:
        spread = 0.5 + 0.5 * (seed % 1024) / 1024  # so that not all come back at once
        tries, wait_s, problem = 0, 1.0, ""
        while tries < MOST_TRIES:
            if self._is_closed:
                raise EngineError("the engine is closed")
            if tries:
                await asyncio.sleep(min(wait_s, MOST_WAIT_S))
            tries, wait_s = tries + 1, 2.0**tries * spread
            try:
                turn = await self._once(messages, sampling, seed=seed)
            except Refused as error:
                problem = self._shown(error)
                wait_s = wait_s if error.retry_after_s is None else error.retry_after_s
            except Overdue as error:
                problem = str(error)
                tries += DEAR_TRIES - 1
            except ServerGone as error:
                problem = str(error)
                tries += 0 if self._may_lose else DEAR_TRIES - 1
            else:
                if turn is not None:
                    self._may_lose = MOST_LOST
                    return turn
                problem = f"{self._http.url}{ROUTE} answers, and with no chat completion"
        self._may_lose -= 1
        if self._may_lose < 0:
            raise EngineError(
                f"{problem}: is engine.url={self._http.url} right, and does it serve?"
            )
        raise TimeoutError(f"gave up on the endpoint: {problem}")

    async def _once(self, messages: list[Message], sampling: Sampling, *, seed: int) -> Said | None:
        """One answer, in whatever manner the endpoint takes; None where it says nothing.

        Raises Refused where it may be asked again, EngineError where that would not help.
        """
        while True:
            manner = self._manner
            body = manner.body(self._model, messages, sampling, seed=seed)
            try:
                answer = await self._http.post(ROUTE, body, timeout_s=self._timeout_s)
            except Refused as error:
                if error.status in _AGAIN and "insufficient_quota" not in error.text:
                    raise
                empty = said_by_refusal(error.text) if error.status in _REFUSED else None
                if empty is not None:
                    note = f"a refused prompt counts as unanswered: {self._shown(error)}"
                    self._tell_once(f"prompt {empty.finish}", note)
                    return empty
                changed = manner.after(error.text) if error.status in _REFUSED else None
                if changed is None:
                    raise EngineError(self._cannot(error)) from None
                if self._manner == manner:  # nobody has learnt it meanwhile
                    for name in changed.left_out - manner.left_out:
                        self._tell_once(name, f"the endpoint refuses {name}: its own default holds")
                    self._manner = changed
            else:
                if not answer and not self._may_lose:
                    raise EngineError(
                        f"{self._http.url}{ROUTE} answers, and with no JSON: engine.url="
                        f"{self._http.url} is no endpoint for chat; most end in /v1"
                    )
                return said(answer, sampling.stop)

    def _cannot(self, error: Refused) -> str:
        """Why asking again would not help, and what would."""
        if error.status in NO_ENTRY:
            has_key = "is not accepted" if self._api_key else "is not set"
            return (
                f"{self._http.url} lets nobody in ({error.status}): the environment variable "
                f"OPENAI_API_KEY {has_key}"
            )
        if error.status in (404, 405):
            return (
                f"{self._shown(error)}: engine.url ends in /v1 for most, and "
                f"model.path={self._model!r} must be a name that it serves"
            )
        return self._shown(error)

    def _shown(self, error: Refused) -> str:
        """A refusal in one line, without the key that some endpoints repeat."""
        text = error.text.replace(self._api_key, "***") if self._api_key else error.text
        short = " ".join(text.split())[:MOST_SHOWN]
        return f"{self._http.url}{ROUTE} refused ({error.status}): {short}"

    def _tell_once(self, what: str, note: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._say(note)
