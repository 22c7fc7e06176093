"""One completion from the pieces that a server sampled between pauses."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from querl.types import Completion, FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from querl.rollout.dialect import Piece


class Pieces:
    """What was sampled so far; ``finish`` is None as long as the rest has to be asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.finish: FinishReason | None = None

    def add(self, piece: Piece, version: int) -> None:
        """Append what ``version`` has sampled."""
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.versions += [version] * len(piece.token_ids)
        self.finish = piece.finish
        if self._stop and self._holds_stop(len(self.token_ids)):
            self._end_at_first_stop()

    def _end_at_first_stop(self) -> None:
        """End where the first stop string does.

        No server has seen one over a cut, and SGLang passes over those that are spelt by more
        tokens than they have when they are encoded.
        """
        end = len(self.token_ids)
        if self._holds_stop(end - 1):
            end = bisect_left(range(end), True, key=self._holds_stop)
        del self.token_ids[end:], self.logprobs[end:], self.versions[end:]
        self.finish = FinishReason.STOP

    def _holds_stop(self, num_tokens: int) -> bool:
        text = self._tokenizer.decode(
            self.token_ids[:num_tokens],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return any(stop in text for stop in self._stop)

    def completion(self, finish: FinishReason) -> Completion:
        """All of it."""
        return Completion(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            versions=tuple(self.versions),
            finish_reason=finish,
        )
