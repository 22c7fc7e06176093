"""Messages <-> text <-> token ids, by a tokenizer's own chat template or a plain one.

What is rendered is a function of the messages alone: a template that asks for the day gets the same
one always, and a template that would think for the model is kept from it.
"""

from __future__ import annotations

import re
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING

from querl.env.wire import TAG_NAMES
from querl.errors import ModelError
from querl.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from querl.types import Completion, Message


PLAIN_REMEDY = "remove chat_template from the model's folder for a plain layout"
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant\n' }}{% endif %}"
)

# Llama 3 templates write today's date into the prompt, or by default this one. A clock would give
# each day of a run other prompts, and an evaluation others than its training. Templates take values
# from a caller but no functions, so that theirs is shadowed by a macro.
TEMPLATE_DATE = date(2024, 7, 26)
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{d}', '{TEMPLATE_DATE.strftime(f'%{d}')}')" for d in "aAbBdmyYjHIMSp")
    + " }}{% endmacro %}\n"
)
# A thought that a generation prompt opens, or opens and closes: by our tags the model writes it.
_BEGUN_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
_PROBE = "probe"
_KEPT_PROMPTS = 256  # groups whose samples may begin side by side


class ChatFormat:
    """A tokenizer with its template; a base model's without one gets headings and its end token.

    Raises ModelError where it has neither template nor end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = _control_tokens(tokenizer)
        # Gemma has thousands of them: a text is looked at where one may begin, not once a token
        self._spellings = frozenset(self.control_tokens)
        self._lengths = {len(token) for token in self.control_tokens}
        first_signs = {token[0] for token in self.control_tokens}
        self._first_signs = re.compile("|".join(map(re.escape, sorted(first_signs))) or "(?!)")
        self._layout = _layout(tokenizer)
        self.takes_system = self._accepts_system()
        self._prompt = lru_cache(_KEPT_PROMPTS)(self._encode_prompt)

    def token_id(self, token: str) -> int:
        """The id of one token by its text."""
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(token_id, int)
        return token_id

    @property
    def name(self) -> str:
        """How messages name this tokenizer."""
        return _name(self.tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, nothing added."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of what begins an episode, encoded once for all samples of a group."""
        return self._prompt(tuple(tuple(message.items()) for message in messages))

    def _encode_prompt(self, messages: tuple[tuple[tuple[str, str], ...], ...]) -> tuple[int, ...]:
        chat = [dict(message) for message in messages]
        return self.encode(self.render(chat, add_generation_prompt=True))

    def decode(self, completion: Completion) -> str:
        """What a completion says, its end token left out and all else kept."""
        token_ids = list(completion.token_ids)
        if completion.finish_reason is FinishReason.END:
            token_ids.pop()
        return str(
            self.tokenizer.decode(
                token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The template's text for a conversation; control tokens in contents are broken up.

        A generation prompt ends where the model writes its first token, ``<think>`` included.
        """
        chat = [{**message, "content": self.defuse(message["content"])} for message in messages]
        if not self.takes_system and chat and chat[0]["role"] == "system":
            system, first, *rest = chat
            merged = f"{system['content']}\n\n{first['content']}"
            chat = [{**first, "content": merged}, *rest]
        text = self._apply(chat, add_generation_prompt)
        return _BEGUN_THOUGHT.sub("", text) if add_generation_prompt else text

    def closing(self) -> tuple[str, str]:
        """The token that ends an assistant's message, and the text that the template puts after it.

        Raises ModelError where it is no special token: an engine could not stop there.
        """
        answered = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": "answer"}]
        closing = self.render(answered, add_generation_prompt=False).rpartition("answer")[2]
        for token in self.control_tokens:
            if closing.startswith(token):
                return token, closing.removeprefix(token)
        raise ModelError(
            f"{self.name} has a chat template that does not end an assistant's turn with a special "
            f"token: {PLAIN_REMEDY}"
        )

    def opening(self) -> str:
        """The text with which an assistant's message begins."""
        asked = [{"role": "user", "content": _PROBE}]
        bare = self.render(asked, add_generation_prompt=False)
        return self.render(asked, add_generation_prompt=True).removeprefix(bare)

    def defuse(self, text: str) -> str:
        """The text, unable to spell a control token of the tokenizer."""

        def broken(first: re.Match[str]) -> str:
            at = first.start()
            if not any(text[at : at + length] in self._spellings for length in self._lengths):
                return first[0]
            return "&lt;" if first[0] == "<" else f"{first[0]} "

        return self._first_signs.sub(broken, text)

    def _apply(self, chat: list[Message], add_generation_prompt: bool) -> str:
        rendered = self.tokenizer.apply_chat_template(
            chat,
            chat_template=self._layout,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            enable_thinking=True,
        )
        assert isinstance(rendered, str)
        return rendered

    def _accepts_system(self) -> bool:
        from jinja2.exceptions import TemplateError

        try:
            self._apply(
                [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                ],
                True,
            )
        except TemplateError:
            return False
        return True


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}"


def _layout(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the template. A plain one opens with the token before every text, if any."""
    if tokenizer.chat_template:
        own = tokenizer.get_chat_template()
        return _FIXED_CLOCK + own if "strftime_now" in own else own
    if tokenizer.eos_token is None:
        raise ModelError(f"{_name(tokenizer)} has no end token: set eos_token in its config")
    starts_with_bos = tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if starts_with_bos else "") + PLAIN_TEMPLATE


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Special tokens, longest first, but for our own tags, which a prompt has to name."""
    tags = {f"<{slash}{name}>" for name in TAG_NAMES for slash in ("", "/")}
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return tuple(sorted((t for t in special - tags if len(t) > 1), key=lambda t: (-len(t), t)))
