"""Histories without a tokenizer, for endpoints that take messages and tell no token ids.

A message is numbered, and its number, followed by ``FILLER`` up to its length in tokens, stands for
its ids. So an episode's limits and counts hold, and its engine reads the messages again. Nothing
could be trained on such ids: they only make an endpoint play what other engines play.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from querl.errors import ConfigError
from querl.rollout.history import check_can_forget, without_thought

if TYPE_CHECKING:
    from collections.abc import Sequence

    from querl.rollout.history import PastTurn
    from querl.types import Completion, Message

FILLER = 0
CHARS_A_TOKEN = 4  # of English and SQL, about; as a schema's budget is counted without a tokenizer


def estimated_tokens(text: str) -> int:
    """How many tokens a text may have, at least one."""
    return max(-(-len(text) // CHARS_A_TOKEN), 1)


class MessageIds:
    """Numbers messages, and finds them again; an engine and its history share one."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def encode(self, role: str, text: str, num_tokens: int | None = None) -> tuple[int, ...]:
        """The ids of one message; its length is estimated where nobody told ``num_tokens``."""
        number = self._numbers.setdefault((role, text), len(self._messages) + 1)
        if number > len(self._messages):
            self._messages.append({"role": role, "content": text})
        length = estimated_tokens(text) if num_tokens is None else max(num_tokens, 1)
        return (number, *[FILLER] * (length - 1))

    def decode(self, token_ids: Sequence[int]) -> list[Message]:
        """The messages that these ids stand for."""
        return [self._messages[number - 1] for number in token_ids if number != FILLER]


class MessageHistory:
    """Implements ``querl.rollout.history.History`` for an endpoint, whose template is its own.

    With ``keep_thoughts`` it is a conversation, otherwise earlier turns are shown without what they
    thought. What the endpoint's template then makes of the messages cannot be seen from here.
    """

    end_id = FILLER  # endpoints end a message themselves

    def __init__(self, ids: MessageIds, *, keep_thoughts: bool = True) -> None:
        self._ids = ids
        self._keeps_thoughts = keep_thoughts

    @property
    def is_append_only(self) -> bool:
        """Whether every prompt begins with all messages so far."""
        return self._keeps_thoughts

    def start(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The first messages."""
        return tuple(
            token_id
            for message in messages
            for token_id in self._ids.encode(message["role"], message["content"])
        )

    def text(self, completion: Completion) -> str:
        """What a completion says."""
        return "".join(message["content"] for message in self._ids.decode(completion.token_ids))

    def extend(self, messages: Sequence[Message], turns: Sequence[PastTurn]) -> tuple[int, ...]:
        """All messages so far, each turn one of the assistant and its observation one of the user.

        A turn has the length that the endpoint told, an observation an estimated one.
        """
        if self._keeps_thoughts:
            last = turns[-1]
            shown = self._ids.encode("user", last.observation)
            return last.prompt_ids + last.completion.token_ids + shown
        ids = self.start(messages)
        for turn in turns:
            said = without_thought(self.text(turn.completion))
            ids += self._ids.encode("assistant", said)
            ids += self._ids.encode("user", turn.observation)
        return ids

    def encode_turn(self, text: str, *, is_last: bool) -> tuple[int, ...]:  # noqa: ARG002
        """A turn's text as a message of the assistant."""
        return self._ids.encode("assistant", text)


def message_history(kind: str, ids: MessageIds, *, keep_thoughts: bool) -> MessageHistory:
    """The history that a recipe names by ``env.history``. Raises ConfigError for ``single``.

    ``stepwise`` with thoughts is the same as ``conversation``: only the endpoint renders.
    """
    if kind == "single":
        raise ConfigError(
            "env.history=single lets one message of the assistant grow, which an endpoint for chat "
            "has no way to ask for: set env.history=conversation"
        )
    if not keep_thoughts:
        check_can_forget(kind)
    return MessageHistory(ids, keep_thoughts=keep_thoughts)
