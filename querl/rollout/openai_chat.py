"""What is sent to a chat endpoint, and what its answers say: no network here.

Endpoints of this kind agree on the route and differ in the rest. Some refuse parameters that others
need; none keeps the stop string that ended a text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from querl.rollout.messages import estimated_tokens
from querl.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from querl.rollout.engine import Sampling
    from querl.types import Message

MOST_STOPS = 4  # that OpenAI takes; a text is cut here at all of them anyway
_OPTIONAL = ("seed", "top_p", "stop", "temperature")
_IS_UNKNOWN = re.compile(r"support|unknown|unrecogni[sz]ed|permitted|allowed|unexpected", re.I)
_IS_TOO_LONG = re.compile(
    "context_length|context length|context window|context size|maximum model length|"
    "prompt is too long"
)
_IS_FILTERED = re.compile(r"content_filter|content_policy|content management policy")
_TAG = re.compile(r"<(?=/?[a-z_]+\s*>)", re.IGNORECASE)
_TELLS_STOP = ("stop_reason", "matched_stop")  # of vLLM, of SGLang


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """Which parameters an endpoint takes, as far as its refusals have taught."""

    length_key: str = "max_tokens"
    left_out: frozenset[str] = field(default_factory=frozenset)

    def body(
        self, model: str, messages: Sequence[Message], sampling: Sampling, *, seed: int
    ) -> dict[str, Any]:
        """One request. ``seed`` repeats a sample only where the endpoint honours it."""
        parameters: dict[str, Any] = {"temperature": sampling.temperature, "seed": seed}
        if sampling.top_p < 1:
            parameters["top_p"] = sampling.top_p
        if sampling.stop:
            parameters["stop"] = list(sampling.stop[-MOST_STOPS:])
        return {
            "model": model,
            "messages": list(messages),
            self.length_key: sampling.max_tokens,
            **{name: value for name, value in parameters.items() if name not in self.left_out},
        }

    def after(self, refusal: str) -> Manner | None:
        """The manner without the parameter that this refusal names; None where it names none."""
        if not _IS_UNKNOWN.search(refusal):
            return None
        names = self._named_in(refusal)
        if "max_tokens" in names and self.length_key == "max_tokens":
            return replace(self, length_key="max_completion_tokens")
        refused = next((name for name in _OPTIONAL if name in names - self.left_out), None)
        return None if refused is None else replace(self, left_out=self.left_out | {refused})

    def _named_in(self, refusal: str) -> set[str]:
        """By the field that OpenAI has for it, else by name, in quotes or behind a colon."""
        param = _error(refusal).get("param")
        if isinstance(param, str) and param:
            return {param}
        named = r"""["'`]{0}\\?["'`]|: {0}\b"""
        return {
            name
            for name in ("max_tokens", *_OPTIONAL)
            if re.search(named.format(name), refusal) is not None
        }


def _error(refusal: str) -> dict[str, Any]:
    try:
        found = json.loads(refusal)
    except ValueError:
        return {}
    error = found.get("error") if isinstance(found, dict) else None
    return error if isinstance(error, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A model's turn as an endpoint gave it; ``num_tokens`` counts hidden thoughts too."""

    text: str
    finish: FinishReason
    num_tokens: int


def said_by_refusal(refusal: str) -> Said | None:
    """The empty turn that a refusal of this prompt stands for, or None where it is no such thing.

    A prompt beyond the model's context is cut at its length; one that a content filter stops is
    answered by nothing.
    """
    if _IS_TOO_LONG.search(refusal.lower()):
        return Said(text="", finish=FinishReason.LENGTH, num_tokens=0)
    if _IS_FILTERED.search(refusal.lower()):
        return Said(text="", finish=FinishReason.END, num_tokens=0)
    return None


def said(answer: Mapping[str, Any], stops: Sequence[str]) -> Said | None:
    """The turn in an answer, None where there is none.

    A thought in a field of its own is put before an answer that has none: our prompts ask for it
    there. Where ``usage`` is missing the length is estimated.
    """
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return None
    text = _ended(_text(message.get("content")), choice, stops)
    is_stopped = text.endswith(tuple(stops))
    was_cut = choice.get("finish_reason") == "length"
    thought = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    if thought.strip() and "<think>" not in text:
        # a tag that such a thought mentions breaks no format of ours
        thought = _TAG.sub("&lt;", thought).strip()
        text = f"<think>{thought}</think>\n{text}".rstrip("\n")
    usage = answer.get("usage")
    told = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Said(
        text=text,
        finish=FinishReason.STOP
        if is_stopped
        else (FinishReason.LENGTH if was_cut else FinishReason.END),
        num_tokens=told if isinstance(told, int) else estimated_tokens(text),
    )


def _text(value: object) -> str:
    """A text that can be written as UTF-8: half a surrogate pair becomes a question mark."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _ended(content: str, choice: Mapping[str, Any], stops: Sequence[str]) -> str:
    """The text up to its first stop string, with the one that the endpoint took off.

    vLLM and SGLang tell which that was. Elsewhere it is the end of the block that is open: there a
    model that ended its message inside a block cannot be told from one that closed it.
    """
    ends = [content.find(stop) + len(stop) for stop in stops if stop in content]
    if ends:
        return content[: min(ends)]
    if choice.get("finish_reason") != "stop":
        return content
    told = [choice[name] for name in _TELLS_STOP if name in choice]
    if told:
        return content + told[0] if told[0] in stops else content
    acting = content.rpartition("</think>")[2]
    opened = {acting.rfind(stop.replace("</", "<", 1)): stop for stop in stops}
    last = max(opened, default=-1)
    return content + opened[last] if last >= 0 else content
