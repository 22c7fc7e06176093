"""Laws of the histories, over each family's template; `chat_laws.py` says them."""

from __future__ import annotations

import chat_laws
import pytest
from chat_laws import PROMPT, SYSTEM, Said, exchanges, play, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, FAMILIES, QWEN3
from tiny_policy import tiny_tokenizer

from querl.errors import ModelError
from querl.rollout.chat import ChatFormat
from querl.rollout.history import Conversation, History, Single, Stepwise

CHATS = {name: family.chat() for name, family in FAMILIES.items()}
KINDS = {
    "conversation": Conversation,
    "single": Single,
    "stepwise": Stepwise,
    "stepwise-thoughtless": lambda chat: Stepwise(chat, keep_thoughts=False),
}
REFUSED = [("conversation", name) for name, family in FAMILIES.items() if family.rewrites]
SERVED: dict[tuple[str, str], History] = {
    (kind, name): make(CHATS[name])
    for kind, make in KINDS.items()
    for name in FAMILIES
    if (kind, name) not in REFUSED
}
CONTROLS = tuple(sorted({token for chat in CHATS.values() for token in chat.control_tokens}))
EACH = st.sampled_from(sorted(SERVED))
EACH_MESSAGES = st.sampled_from(sorted(pair for pair in SERVED if pair[0] != "single"))


@given(pair=EACH, said=exchanges(*CONTROLS))
@settings(max_examples=150, deadline=None)
def test_what_was_sampled_is_what_is_trained(pair: tuple[str, str], said: list[Said]) -> None:
    history, chat = SERVED[pair], CHATS[pair[1]]
    turns = play(history, chat, said)
    chat_laws.text_is_read_as_written(history, turns, said)
    chat_laws.sampled_tokens_are_trained(turns)
    chat_laws.imitation_trains_what_would_be_sampled(history, said)
    if history.is_append_only:
        chat_laws.prompts_grow(history, turns)


@given(pair=EACH_MESSAGES, text=texts())
@settings(max_examples=60, deadline=None)
def test_one_end_token_closes_a_turn(pair: tuple[str, str], text: str) -> None:
    chat_laws.one_end_token_closes_a_turn(SERVED[pair], CHATS[pair[1]], text)


@pytest.mark.parametrize("pair", SERVED, ids="-".join)
def test_control_tokens_in_data_stay_text(pair: tuple[str, str]) -> None:
    chat_laws.data_spells_no_control_token(SERVED[pair], CHATS[pair[1]])


@pytest.mark.parametrize("pair", SERVED, ids="-".join)
def test_the_model_opens_its_thoughts_itself(pair: tuple[str, str]) -> None:
    chat_laws.the_model_opens_its_thoughts(SERVED[pair], CHATS[pair[1]])


@given(
    pair=EACH_MESSAGES.filter(lambda pair: FAMILIES[pair[1]].template is not None),
    said=st.lists(
        # what a template trims is no question of histories: a sampled blank stays in a growing one
        st.tuples(texts().map(str.strip), texts(), st.booleans()),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=150, deadline=None)
def test_prompts_read_as_the_template_renders_them(pair: tuple[str, str], said: list[Said]) -> None:
    prompt = list(PROMPT)
    if not CHATS[pair[1]].takes_system:
        prompt = [{"role": "user", "content": f"{SYSTEM['content']}\n\n{PROMPT[1]['content']}"}]
    chat_laws.prompts_are_the_templates_own(SERVED[pair], CHATS[pair[1]], prompt, said)


def test_a_plain_layout_is_headings_and_end_tokens() -> None:
    history = SERVED["conversation", "plain-bos"]
    said = [("<think>a</think>\n<sql>SELECT 1</sql>", "seen", True), ("done", "", True)]
    chat = CHATS["plain-bos"]
    last = play(history, chat, said)[-1]
    assert chat.tokenizer.decode(list(last.prompt_ids + last.completion.token_ids)) == (
        "<|begin_of_text|>### System\nYou write SQL.\n\n### User\nhow many?\n\n\n### Assistant\n"
        "<think>a</think>\n<sql>SELECT 1</sql><|end_of_text|>\n\n### User\nseen\n\n"
        "### Assistant\ndone<|end_of_text|>"
    )


def test_thoughts_are_dropped_by_qwen3_and_elsewhere_on_demand() -> None:
    said = [("<think>\nhmm\n</think>\n\n<sql>SELECT 1</sql>", "seen", True)]
    shown = {}
    for pair, history in SERVED.items():
        chat = CHATS[pair[1]]
        ids = history.extend(PROMPT, play(history, chat, said))
        shown[pair] = "hmm" in chat.tokenizer.decode(list(ids))
    for (kind, name), keeps in shown.items():
        drops = kind == "stepwise-thoughtless" or (kind == "stepwise" and FAMILIES[name].rewrites)
        assert keeps != drops, (kind, name)


def test_a_thought_that_was_never_closed_is_shown_again() -> None:
    history, chat = SERVED["stepwise-thoughtless", "qwen2.5"], CHATS["qwen2.5"]
    turns = play(history, chat, [("<think>hmm <sql>SELECT 1</sql>", "seen", True)])
    assert "hmm <sql>" in chat.tokenizer.decode(list(history.extend(PROMPT, turns)))


def test_only_stepwise_rewrites() -> None:
    rewriting = {pair for pair, history in SERVED.items() if not history.is_append_only}
    assert rewriting == {("stepwise-thoughtless", name) for name in FAMILIES} | {
        ("stepwise", name) for name, family in FAMILIES.items() if family.rewrites
    }


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_a_template_that_rewrites_is_refused_for_conversations(kind: str, name: str) -> None:
    with pytest.raises(ModelError, match=r"rewrites earlier turns.*stepwise.*single.*plain"):
        KINDS[kind](CHATS[name])


def test_no_prompt_depends_on_the_day() -> None:
    text = CHATS["llama-3"].render(PROMPT, add_generation_prompt=True)
    assert "\nToday Date: 26 Jul 2024\n" in text
    other = tiny_tokenizer()
    other.chat_template = "{{ strftime_now('%A, %Y-%m-%d %H:%M') }}<|im_end|>" + CHATML
    rendered = ChatFormat(other).render(PROMPT, add_generation_prompt=True)
    assert rendered.startswith("Friday, 2024-07-26 00:00<|im_end|>")


def test_an_empty_thought_by_default_is_taken_out_of_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN3.replace("not enable_thinking", "enable_thinking")
    assert ChatFormat(tokenizer).opening() == "<|im_start|>assistant\n"


def test_a_tokenizer_without_template_needs_an_end_token() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    assert ChatFormat(bare).closing()[0] == bare.eos_token
    bare.eos_token = None
    with pytest.raises(ModelError, match=r"no end token: set eos_token"):
        ChatFormat(bare)


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_without_end_token_is_refused(kind: str) -> None:
    endless = tiny_tokenizer()
    endless.chat_template = CHATML.replace("<|im_end|>", "")
    with pytest.raises(ModelError, match="special token"):
        KINDS[kind](ChatFormat(endless))
