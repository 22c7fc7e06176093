"""One completion from the pieces that a server sampled between pauses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from querl.rollout.stopping import StopStrings
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
        first = len(self.token_ids)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.versions += [version] * len(piece.token_ids)
        self.finish = piece.finish
        if first and self._stop:
            self._end_at_stop_over(first)

    def _end_at_stop_over(self, first: int) -> None:
        """End where a stop string ends that began in the pieces before: no server has seen it."""
        stops = StopStrings(self._tokenizer, self._stop, len(self._tokenizer))
        # a token holds at least one byte of text, and a character at most four
        reach = first + 4 * max(map(len, self._stop))
        for end in range(first + 1, min(reach, len(self.token_ids)) + 1):
            if stops.is_complete(self.token_ids[:end]):
                del self.token_ids[end:], self.logprobs[end:], self.versions[end:]
                self.finish = FinishReason.STOP
                return

    def completion(self, finish: FinishReason) -> Completion:
        """All of it."""
        return Completion(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            versions=tuple(self.versions),
            finish_reason=finish,
        )
