"""How the turns of an episode become prompts. Tokens are the truth: a growing prompt keeps the ids.

``Conversation`` and ``Single`` only append. ``Stepwise`` renders each prompt anew where it has to:
what it then shows of earlier turns is another text, and so other tokens, than what was sampled. In
all of them a turn is trained on exactly the ids that were sampled, after exactly those it read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from querl.algorithm.sample import append_only_runs
from querl.errors import ConfigError, ModelError
from querl.rollout.chat import PLAIN_REMEDY
from querl.types import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from querl.rollout.chat import ChatFormat
    from querl.types import Message

# Our own spelling of a turn: templates that drop or reformat thoughts show it here.
_ASSISTANT_PROBE = "<think>probe</think>\n<sql>SELECT 1</sql>"
_USER_PROBE, _NEXT_PROBE = "first probe", "next probe"


class PastTurn(Protocol):
    """What a history must know of a turn that was played; a ``Turn`` is one."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What the model read."""
        ...

    @property
    def completion(self) -> Completion:
        """What it wrote."""
        ...

    @property
    def observation(self) -> str:
        """What it is shown next."""
        ...


class History(Protocol):
    """How the turns of an episode become the prompt of the next one."""

    @property
    def end_id(self) -> int:
        """The token that ends an assistant's message; engines must stop at it."""
        ...

    @property
    def is_append_only(self) -> bool:
        """Whether every prompt begins with all tokens so far: one sample a trajectory."""
        ...

    def start(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of the first prompt."""
        ...

    def text(self, completion: Completion) -> str:
        """What a completion says, without its end token."""
        ...

    def extend(self, messages: Sequence[Message], turns: Sequence[PastTurn]) -> tuple[int, ...]:
        """The ids of the prompt after these turns, of which there is at least one."""
        ...

    def encode_turn(self, text: str, *, is_last: bool) -> tuple[int, ...]:
        """The ids that a model should have sampled for this turn, its end token included."""
        ...


class _Templated:
    """What histories in a chat template have in common."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._end_token, self._after_end = chat.closing()
        self.end_id = chat.token_id(self._end_token)

    def start(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of the first prompt."""
        return self._chat.prompt(messages)

    def text(self, completion: Completion) -> str:
        """What a completion says, without its end token."""
        return self._chat.decode(completion)

    def encode_turn(self, text: str, *, is_last: bool) -> tuple[int, ...]:  # noqa: ARG002
        """The text and the end token: every turn is a message of its own."""
        return (*self._chat.encode(text), self.end_id)


class Conversation(_Templated):
    """Every turn is a message of the assistant, every observation one of the user.

    Raises ModelError for a template that rewrites what was said before.
    """

    is_append_only = True

    def __init__(self, chat: ChatFormat) -> None:
        super().__init__(chat)
        user_turn = _learn_user_turn(chat, self._end_token)
        if user_turn is None:
            raise ModelError(
                f"{chat.name} has a chat template that rewrites earlier turns: "
                f"set env.history=stepwise or env.history=single, or {PLAIN_REMEDY}"
            )
        self._user_turn = user_turn

    def extend(
        self,
        messages: Sequence[Message],  # noqa: ARG002
        turns: Sequence[PastTurn],
    ) -> tuple[int, ...]:
        """All tokens so far, an end token where the model wrote none, then the user's message."""
        before, after, trims = self._user_turn
        last = turns[-1]
        shown = self._chat.defuse(last.observation.strip() if trims else last.observation)
        said = last.completion.token_ids
        end = () if said[-1:] == (self.end_id,) else (self.end_id,)
        return last.prompt_ids + said + end + self._chat.encode(before + shown + after)


class Single(_Templated):
    """The whole exchange grows inside one assistant message (SkyRL-SQL's published recipe)."""

    is_append_only = True

    def __init__(self, chat: ChatFormat) -> None:
        super().__init__(chat)
        self._reopen = self._after_end + chat.opening()

    def extend(
        self,
        messages: Sequence[Message],  # noqa: ARG002
        turns: Sequence[PastTurn],
    ) -> tuple[int, ...]:
        """All tokens so far, then the observation, in a new message if the model ended its own."""
        last = turns[-1]
        shown = self._chat.defuse(last.observation)
        shown = shown if shown.startswith("\n") else f"\n{shown}\n"
        said = last.completion.token_ids
        reopen = self._reopen if said[-1:] == (self.end_id,) else ""
        return last.prompt_ids + said + self._chat.encode(reopen + shown)

    def encode_turn(self, text: str, *, is_last: bool) -> tuple[int, ...]:
        """The text; the end token only where the message ends."""
        return (*self._chat.encode(text), self.end_id) if is_last else self._chat.encode(text)


class Stepwise(_Templated):
    """Each turn's prompt is the template's rendering of the messages so far, whatever it rewrites.

    With ``keep_thoughts`` earlier turns are handed to the template whole; where it keeps them so,
    the prompts only grow, and this is a ``Conversation``. Otherwise an earlier turn is shown as its
    text after ``</think>``, by us or by the template (Qwen3's): that has to be encoded, so a prompt
    is a new one, and the model meets in training what a user of the template will show it.
    """

    def __init__(self, chat: ChatFormat, *, keep_thoughts: bool = True) -> None:
        super().__init__(chat)
        grows = keep_thoughts and _learn_user_turn(chat, self._end_token) is not None
        self._growing = Conversation(chat) if grows else None
        self._recall: Callable[[str], str] = str if keep_thoughts else without_thought

    @property
    def is_append_only(self) -> bool:
        """Whether the template, shown whole turns, keeps them as they are."""
        return self._growing is not None

    def extend(self, messages: Sequence[Message], turns: Sequence[PastTurn]) -> tuple[int, ...]:
        """The ids of the messages so far, sampled ids kept where the rendering only grows."""
        if self._growing is not None:
            return self._growing.extend(messages, turns)
        chat = list(messages)
        for turn in turns:
            said = self._recall(self._chat.decode(turn.completion))
            chat.append({"role": "assistant", "content": said})
            chat.append({"role": "user", "content": turn.observation})
        return self._chat.encode(self._chat.render(chat, add_generation_prompt=True))


HISTORIES: dict[str, Callable[[ChatFormat], History]] = {
    "conversation": Conversation,
    "single": Single,
    "stepwise": Stepwise,
}


def check_can_forget(kind: str) -> None:
    """Raises ConfigError for a history that cannot drop the thoughts of earlier turns."""
    if kind != "stepwise":
        raise ConfigError(
            "env.keep_thoughts=false needs prompts that are rendered anew, which "
            f"env.history={kind} never does: set env.history=stepwise"
        )


def without_thought(text: str) -> str:
    """A turn's text after its last ``</think>``; one that never closed a thought stays whole."""
    return text.rpartition("</think>")[2].lstrip("\n")


def _learn_user_turn(chat: ChatFormat, end_token: str) -> tuple[str, str, bool] | None:
    """The template's text before and after a later user's message, and whether it is trimmed.

    None when the template rewrites what came before.
    """
    first = {"role": "user", "content": _USER_PROBE}
    said = {"role": "assistant", "content": _ASSISTANT_PROBE}
    # blanks round the text show whether the template trims it
    following = {"role": "user", "content": f" {_NEXT_PROBE} "}
    so_far = chat.render([first], add_generation_prompt=True) + _ASSISTANT_PROBE + end_token
    whole = chat.render([first, said, following, said, first], add_generation_prompt=True)
    if not whole.startswith(so_far):
        return None
    rest = whole.removeprefix(so_far)
    trims = f" {_NEXT_PROBE} " not in rest
    before, _, rest = rest.partition(_NEXT_PROBE if trims else f" {_NEXT_PROBE} ")
    after, _, rest = rest.partition(_ASSISTANT_PROBE + end_token)
    if rest != before + _USER_PROBE + after:
        return None
    return before, after, trims


class Imitation(NamedTuple):
    """One token sequence to imitate: ids [L], loss mask [L], how many tokens it starts from."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    num_prompt_tokens: int


class _Imitated(NamedTuple):
    """A turn as it would have been played; it is a ``PastTurn``."""

    prompt_ids: tuple[int, ...]
    completion: Completion
    observation: str


def encode_exchange(
    history: History, messages: Sequence[Message], turns: Sequence[tuple[str, str, bool]]
) -> list[Imitation]:
    """A finished exchange to imitate: one sequence, or one a turn where prompts are rewritten.

    A turn is (what the model should write, what it was shown next, whether to train on it). Only
    what the model should have sampled is in the loss, exactly as in an episode.
    """
    played: list[_Imitated] = []
    for index, (text, observation, _) in enumerate(turns):
        said = history.encode_turn(text, is_last=index == len(turns) - 1)
        completion = Completion(
            token_ids=said,
            logprobs=(0.0,) * len(said),
            versions=(0,) * len(said),
            finish_reason=FinishReason.END if said[-1:] == (history.end_id,) else FinishReason.STOP,
        )
        prompt_ids = history.extend(messages, played) if played else history.start(messages)
        played.append(_Imitated(prompt_ids, completion, observation))
    imitations = []
    for run in append_only_runs([(turn.prompt_ids, turn.completion.token_ids) for turn in played]):
        mask: list[bool] = []
        for n in run:
            said = played[n].completion.token_ids
            mask += [False] * (len(played[n].prompt_ids) - len(mask)) + [turns[n][2]] * len(said)
        ids = played[run[-1]].prompt_ids + played[run[-1]].completion.token_ids
        imitations.append(Imitation(ids, tuple(mask), len(played[run[0]].prompt_ids)))
    return imitations
