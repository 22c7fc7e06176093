"""An engine that replays written answers, so that the whole system runs in CPU tests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from querl.errors import EngineError
from querl.rollout.stopping import stop_strings
from querl.types import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from querl.rollout.dialect import Weights
    from querl.rollout.engine import RequestKey, Sampling

    Answer = Callable[[RequestKey, str], str]


class ScriptedEngine:
    """Answers each request with ``answer(key, prompt text)``, cut as a model would have ended it.

    An answer that meets no stop string ends with the tokenizer's end token. Log-probabilities are a
    fixed function of the token. ``enter``, ``leave``, ``sleep`` and ``wake`` do nothing.
    """

    num_restarts = 0  # there is no server of ours that could end

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer: Answer) -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self._stop_strings = stop_strings(tokenizer, len(tokenizer))
        self._version = 0
        self._is_closed = False

    @property
    def version(self) -> int:
        """The step given to the last ``load_weights``."""
        return self._version

    async def generate(
        self, prompt_ids: tuple[int, ...], sampling: Sampling, key: RequestKey
    ) -> Completion:
        """The written answer up to a stop string, the end token or ``max_tokens``."""
        if self._is_closed:
            raise EngineError("the engine is closed")
        await asyncio.sleep(0)  # others take their turn here, as with an engine that computes
        prompt = self._tokenizer.decode(list(prompt_ids), skip_special_tokens=False)
        assert isinstance(prompt, str)
        written = self._tokenizer.encode(self._answer(key, prompt), add_special_tokens=False)
        token_ids, reason = self._cut(list(written), sampling)
        return Completion(
            token_ids=tuple(token_ids),
            logprobs=tuple(scripted_logprob(token_id) for token_id in token_ids),
            versions=(self._version,) * len(token_ids),
            finish_reason=reason,
        )

    def _cut(self, written: list[int], sampling: Sampling) -> tuple[list[int], FinishReason]:
        stops = self._stop_strings(sampling.stop)
        end_id = self._tokenizer.eos_token_id
        assert isinstance(end_id, int), "the tokenizer has one end token"
        token_ids: list[int] = []
        for token_id in [*written, end_id][: sampling.max_tokens]:
            token_ids.append(token_id)
            if token_id == end_id:
                return token_ids, FinishReason.END
            if stops.can_end[token_id] and stops.is_complete(token_ids):
                return token_ids, FinishReason.STOP
        return token_ids, FinishReason.LENGTH

    def enter(self, num_episodes: int) -> None:
        """Nothing waits here."""

    def leave(self, num_episodes: int) -> None:
        """Nothing waits here."""

    async def load_weights(self, weights: Weights, version: int) -> None:  # noqa: ARG002
        """Later tokens say ``version``; the answers stay."""
        self._version = version

    async def sleep(self) -> None:
        """Nothing to give back."""

    async def wake(self) -> None:
        """Nothing to take back."""

    async def close(self) -> None:
        """Refuse further calls."""
        self._is_closed = True


def scripted_logprob(token_id: int) -> float:
    """The log-probability that the scripted engine gives a token: in [-1, -1/8]."""
    return -(1 + token_id % 8) / 8
