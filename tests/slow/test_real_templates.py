"""The laws of histories over real tokenizers: ``QUERL_TOKENIZERS`` names a folder of folders.

Each of its folders holds one model's tokenizer files, as published.
"""

from __future__ import annotations

import os
from pathlib import Path

import chat_laws
import pytest
from chat_laws import PROMPT, SYSTEM, Said, exchanges, play, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from querl.errors import ModelError
from querl.rollout.chat import ChatFormat
from querl.rollout.history import Conversation, History, Single, Stepwise

ROOM = os.environ.get("QUERL_TOKENIZERS")
FOLDERS = sorted(path for path in Path(ROOM).iterdir() if path.is_dir()) if ROOM else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDERS, reason="QUERL_TOKENIZERS names no folder of tokenizers"),
]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda path: path.name)
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    tokenizer = AutoTokenizer.from_pretrained(request.param, local_files_only=True)
    return ChatFormat(tokenizer)


def histories(chat: ChatFormat) -> list[History]:
    """All that serve the template; one that rewrites is served by all but ``conversation``."""
    served: list[History] = [Single(chat), Stepwise(chat), Stepwise(chat, keep_thoughts=False)]
    if served[1].is_append_only:
        return [Conversation(chat), *served]
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        Conversation(chat)
    return served


def test_what_was_sampled_is_what_is_trained(chat: ChatFormat) -> None:
    @given(said=exchanges(*chat.control_tokens))
    @settings(max_examples=60, deadline=None)
    def holds(said: list[Said]) -> None:
        for history in histories(chat):
            turns = play(history, chat, said)
            chat_laws.text_is_read_as_written(history, turns, said)
            chat_laws.sampled_tokens_are_trained(turns)
            chat_laws.imitation_trains_what_would_be_sampled(history, said)
            if history.is_append_only:
                chat_laws.prompts_grow(history, turns)
            if not isinstance(history, Single):
                chat_laws.one_end_token_closes_a_turn(history, chat, said[0][0])

    holds()


def test_prompts_read_as_the_template_renders_them(chat: ChatFormat) -> None:
    if not chat.tokenizer.chat_template:
        pytest.skip("a base model has no template of its own")

    @given(
        said=st.lists(
            st.tuples(texts().map(str.strip), texts(), st.booleans()), min_size=1, max_size=3
        )
    )
    @settings(max_examples=60, deadline=None)
    def holds(said: list[Said]) -> None:
        for history in histories(chat):
            if not isinstance(history, Single):
                chat_laws.prompts_are_the_templates_own(history, chat, prompt, said)

    merged = {"role": "user", "content": f"{SYSTEM['content']}\n\n{PROMPT[1]['content']}"}
    prompt = list(PROMPT) if chat.takes_system else [merged]
    holds()


def test_data_spells_no_control_token_and_the_model_opens_its_thoughts(chat: ChatFormat) -> None:
    for history in histories(chat):
        chat_laws.data_spells_no_control_token(history, chat)
        chat_laws.the_model_opens_its_thoughts(history, chat)
