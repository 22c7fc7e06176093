"""What chat endpoints say, and how one finds out what they take."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from querl.env.wire import ACTION_STOPS, parse_action
from querl.errors import ConfigError
from querl.rollout.engine import Sampling
from querl.rollout.messages import MessageHistory, MessageIds, estimated_tokens, message_history
from querl.rollout.openai_chat import Manner, Said, said, said_by_refusal
from querl.types import ActionKind, Completion, FinishReason, Message

SAMPLING = Sampling(max_tokens=90, temperature=0.7, top_p=0.9, stop=ACTION_STOPS)
ASK = "<think>look</think>\n<sql>SELECT 1"


def said_of(
    content: str | None, finish: str = "stop", choice: dict[str, Any] | None = None, **message: str
) -> Said:
    answer = {
        "choices": [
            {"message": {"content": content, **message}, "finish_reason": finish, **(choice or {})}
        ]
    }
    turn = said(answer, ACTION_STOPS)
    assert turn is not None
    return turn


def test_the_stop_string_that_an_endpoint_took_off_is_put_back() -> None:
    turn = said_of(ASK)
    assert turn.text == ASK + "</sql>"
    assert turn.finish is FinishReason.STOP


def test_of_several_blocks_the_open_one_is_closed() -> None:
    mentioned = "<think>first <sql> and then <solution></think>\n<sql>SELECT 2"
    assert said_of(mentioned).text == mentioned + "</sql>"


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
def test_an_endpoint_that_tells_the_stop_string_is_believed(field: str) -> None:
    assert said_of(ASK, choice={field: "</sql>"}).finish is FinishReason.STOP
    ended_in_a_block = said_of(ASK, choice={field: None})
    assert (ended_in_a_block.text, ended_in_a_block.finish) == (ASK, FinishReason.END)
    assert said_of(ASK, choice={field: 151645}).text == ASK


def test_a_text_is_cut_where_a_local_model_would_have_stopped() -> None:
    turn = said_of(ASK + "</sql>\n<observation>made up</observation>\n<solution>x</solution>")
    assert turn.text == ASK + "</sql>"
    assert turn.finish is FinishReason.STOP


def test_a_text_that_hit_its_limit_is_not_closed() -> None:
    turn = said_of(ASK, "length")
    assert (turn.text, turn.finish) == (ASK, FinishReason.LENGTH)


def test_a_plain_ending_is_the_models_own() -> None:
    turn = said_of("I do not know.")
    assert (turn.text, turn.finish) == ("I do not know.", FinishReason.END)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_thought_in_a_field_of_its_own_is_the_turns_thought(field: str) -> None:
    turn = said_of("\n\n<solution>SELECT 1", **{field: "count <b> rows, then <sql>"})
    action = parse_action(turn.text)
    assert (action.kind, action.sql, action.well_formed) == (ActionKind.SOLUTION, "SELECT 1", True)
    assert "count" in turn.text


def test_a_turn_that_only_thought_asks_for_nothing() -> None:
    turn = said_of(None, reasoning_content="maybe <sql>SELECT 1</sql>")
    assert turn.text.startswith("<think>maybe ")
    assert parse_action(turn.text).kind is ActionKind.VOID


def test_a_thought_of_the_answer_itself_is_kept_alone() -> None:
    text = "<think>mine</think>\n<sql>SELECT 1</sql>"
    assert said_of(text, reasoning_content="hidden").text == text


def test_a_filtered_answer_is_empty_and_no_error() -> None:
    turn = said_of(None, "content_filter")
    assert (turn.text, turn.finish) == ("", FinishReason.END)


def test_half_a_surrogate_pair_can_be_written_to_a_file() -> None:
    said_of("\ud83d!").text.encode()


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"text": "old"}]}])
def test_an_answer_without_a_message_is_none(answer: dict[str, Any]) -> None:
    assert said(answer, ACTION_STOPS) is None


def test_tokens_are_counted_by_the_endpoint_where_it_tells() -> None:
    choices = [{"message": {"content": "four"}, "finish_reason": "stop"}]
    told = said({"choices": choices, "usage": {"completion_tokens": 41}}, ())
    untold = said({"choices": choices}, ())
    assert told is not None
    assert untold is not None
    assert (told.num_tokens, untold.num_tokens) == (41, 1)


def refused(message: str, **more: Any) -> str:
    return json.dumps({"error": {"message": message, **more}})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            refused("Unsupported value: 'temperature' does not support 0", param="temperature"),
            "temperature",
        ),
        (refused("Unrecognized request argument supplied: seed"), "seed"),
        (refused("property 'top_p' is unsupported"), "top_p"),
        (
            json.dumps(
                {"detail": [{"loc": ["body", "stop"], "msg": "Extra inputs are not permitted"}]}
            ),
            "stop",
        ),
    ],
)
def test_a_parameter_that_an_endpoint_refuses_is_left_out(text: str, name: str) -> None:
    manner = Manner().after(text)
    assert manner is not None
    before = Manner().body("m", [], SAMPLING, seed=1)
    assert before.keys() - manner.body("m", [], SAMPLING, seed=1).keys() == {name}
    assert manner.after(text) is None  # once: the next refusal is an error


def test_max_tokens_gives_way_to_its_new_name() -> None:
    text = refused(
        "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.",
        param="max_tokens",
    )
    manner = Manner().after(text)
    assert manner is not None
    body = manner.body("m", [], SAMPLING, seed=1)
    assert body["max_completion_tokens"] == 90
    assert "max_tokens" not in body
    assert manner.after(text) is None


def test_a_complaint_about_a_value_leaves_nothing_out() -> None:
    assert Manner().after(refused("temperature must be at most 2", param="temperature")) is None
    assert Manner().after("<html>Bad Request</html>") is None


def test_at_most_four_stop_strings_are_asked_for_with_the_actions_among_them() -> None:
    stops = tuple(f"</tool{n}>" for n in range(5)) + ACTION_STOPS
    body = Manner().body("m", [], Sampling(max_tokens=9, stop=stops), seed=1)
    assert len(body["stop"]) == 4
    assert set(ACTION_STOPS) <= set(body["stop"])


@pytest.mark.parametrize(
    ("text", "finish"),
    [
        (refused("too many", code="context_length_exceeded"), FinishReason.LENGTH),
        (refused("This model's maximum context length is 2048 tokens"), FinishReason.LENGTH),
        (refused("filtered", code="content_filter"), FinishReason.END),
    ],
)
def test_a_refused_prompt_is_an_empty_turn(text: str, finish: FinishReason) -> None:
    turn = said_by_refusal(text)
    assert turn is not None
    assert (turn.text, turn.finish) == ("", finish)
    assert said_by_refusal(refused("model not found")) is None


messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}
    ),
    min_size=1,
)


@given(messages)
def test_ids_stand_for_their_messages_and_lengths(prompt: list[Message]) -> None:
    ids = MessageIds()
    token_ids = MessageHistory(ids).start(prompt)
    assert ids.decode(token_ids) == prompt
    assert len(token_ids) == sum(estimated_tokens(message["content"]) for message in prompt)


class Past:
    def __init__(self, ids: MessageIds, prompt_ids: tuple[int, ...], text: str) -> None:
        token_ids = ids.encode("assistant", text, 50)
        zeros = (0,) * len(token_ids)
        self.prompt_ids = prompt_ids
        self.completion = Completion(
            token_ids=token_ids, logprobs=zeros, versions=zeros, finish_reason=FinishReason.STOP
        )
        self.observation = "<observation>\n1\n</observation>"


@pytest.mark.parametrize(
    ("keeps", "shown"), [(True, f"{ASK}</sql>"), (False, "<sql>SELECT 1</sql>")]
)
def test_a_later_prompt_shows_earlier_turns_with_or_without_thoughts(
    keeps: bool, shown: str
) -> None:
    ids = MessageIds()
    history = message_history("stepwise", ids, keep_thoughts=keeps)
    first = [{"role": "user", "content": "question: how many?"}]
    past = Past(ids, history.start(first), f"{ASK}</sql>")
    prompt = history.extend(first, [past])
    assert history.text(past.completion) == f"{ASK}</sql>"
    assert [message["role"] for message in ids.decode(prompt)] == ["user", "assistant", "user"]
    assert ids.decode(prompt)[1]["content"] == shown
    assert (prompt[: len(past.prompt_ids) + 50] == past.prompt_ids + past.completion.token_ids) is (
        history.is_append_only
    )


def test_a_history_that_no_endpoint_can_play_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"env\.history=conversation"):
        message_history("single", MessageIds(), keep_thoughts=True)
    with pytest.raises(ConfigError, match=r"env\.history=stepwise"):
        message_history("conversation", MessageIds(), keep_thoughts=False)
