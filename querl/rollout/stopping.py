"""Stop strings: found in the decoded tail, and looked for only where they can end."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Finds out whether the last token of a sequence completes one of the stop strings.

    ``can_end`` [vocabulary] marks the tokens that may hold the last character of a stop string, so
    that a decoding loop decodes text for few rows only. A stop string may end inside a token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], vocab_size: int
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # A token holds at least one byte of text, and a character at most four.
        self._tail = 4 * max(map(len, stop), default=0) + 1
        self.can_end = _holding_any({text[-1] for text in stop}, tokenizer, vocab_size)

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """Whether a stop string stands in the tail of these ids."""
        text = self._tokenizer.decode(
            list(token_ids[-self._tail :]),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return any(stop in text for stop in self._stop)


def stop_strings(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Callable[[tuple[str, ...]], StopStrings]:
    """``StopStrings`` of each tuple, made once: its making reads the whole vocabulary."""
    return cache(lambda stop: StopStrings(tokenizer, stop, vocab_size))


def _holding_any(
    characters: set[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> NDArray[np.bool_]:
    """Which tokens hold one of the characters; all where a vocabulary may spell it otherwise."""
    # Byte-level vocabularies spell only printable ASCII as itself.
    if any(not ("!" <= character <= "~") for character in characters):
        return np.ones(vocab_size, dtype=np.bool_)
    holds = np.zeros(vocab_size, dtype=np.bool_)
    size = min(len(tokenizer), vocab_size)
    for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(size)))):
        holds[token_id] = token is not None and any(c in token for c in characters)
    return holds
