"""Evaluation: episodes in order, exact shares, unbiased pass@k, honest intervals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from querl.eval.report import (
    execution_shares,
    interval_of_mean,
    interval_over_databases,
    percent_interval,
    write_json,
    write_jsonl,
)
from querl.eval.run import Episode, detail_lines, evaluate, pass_at_k, summarise
from querl.types import (
    Action,
    ActionKind,
    Completion,
    FinishReason,
    Judgement,
    Outcome,
    QueryResult,
    StopReason,
    Task,
    Trajectory,
    Turn,
    Verdict,
)

TASKS = [
    Task(
        id=f"t{n}", question="q", database=f"db{n % 3}.sqlite", difficulty="easy", kind=f"k{n % 2}"
    )
    for n in range(6)
]


def turn(kind: ActionKind, num_tokens: int = 4) -> Turn:
    numbers = tuple(range(num_tokens))
    completion = Completion(
        token_ids=numbers,
        logprobs=(0.0,) * num_tokens,
        versions=numbers,
        finish_reason=FinishReason.STOP,
    )
    return Turn(prompt_ids=(1,), completion=completion, text="", action=Action(kind=kind))


def episode(
    task: Task,
    verdict: Verdict,
    kinds: Sequence[ActionKind] = (ActionKind.SOLUTION,),
    stop: StopReason = StopReason.ANSWERED,
) -> tuple[Trajectory, Judgement]:
    turns = tuple(turn(kind) for kind in kinds)
    return Trajectory(task_id=task.id, turns=turns, stop=stop), Judgement(verdict=verdict)


async def first_half_wins(task: Task, sample_index: int) -> tuple[Trajectory, Judgement]:
    await asyncio.sleep(0)
    if int(task.id[1:]) < 3:
        return episode(task, Verdict.MATCH, [ActionKind.SQL, ActionKind.SOLUTION])
    if sample_index == 1:
        return episode(task, Verdict.UNDECIDED)
    return episode(task, Verdict.BAD_FORMAT, [ActionKind.VOID] * 2, StopReason.TRUNCATED)


def test_episodes_come_back_in_the_order_of_the_tasks() -> None:
    heard: list[Episode] = []
    episodes = asyncio.run(
        evaluate(TASKS, first_half_wins, num_samples=2, max_live=5, on_done=heard.append)
    )
    keys = [(one.task.id, one.sample_index) for one in episodes]
    assert keys == [(task.id, sample) for task in TASKS for sample in range(2)]
    assert len(heard) == 12


def test_no_more_episodes_live_than_allowed() -> None:
    live, most = 0, 0

    async def counted(task: Task, _: int) -> tuple[Trajectory, Judgement]:
        nonlocal live, most
        live += 1
        most = max(most, live)
        await asyncio.sleep(0)
        live -= 1
        return episode(task, Verdict.MATCH)

    episodes = asyncio.run(evaluate(TASKS, counted, max_live=2))
    assert most == 2
    assert [one.sample_index for one in episodes] == [0] * len(TASKS)


def test_a_bug_in_an_episode_ends_the_evaluation_as_it_is() -> None:
    cancelled: list[str] = []

    async def broken(task: Task, _: int) -> tuple[Trajectory, Judgement]:
        if task.id == "t1":
            raise ZeroDivisionError
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(task.id)
        return episode(task, Verdict.MATCH)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(evaluate(TASKS, broken))
    assert sorted(cancelled) == ["t0", "t2", "t3", "t4", "t5"]


def test_details_tell_an_episode_a_line_with_its_answer_and_its_task_s_place() -> None:
    question, right = TASKS[0], Judgement(verdict=Verdict.MATCH, suite=(Verdict.MATCH,))
    answer = Action(kind=ActionKind.SOLUTION, sql="SELECT 1")
    said = replace(turn(ActionKind.SOLUTION, num_tokens=7), action=answer)
    answered = Trajectory(task_id="t0", turns=(said,), stop=StopReason.ANSWERED)
    unasked = Trajectory(task_id="t1", turns=(), stop=StopReason.CONTEXT_FULL)
    wrong = Judgement(verdict=Verdict.NO_ANSWER)
    episodes = [
        Episode(task=question, sample_index=0, trajectory=answered, judgement=right),
        Episode(task=question, sample_index=1, trajectory=unasked, judgement=wrong),
        Episode(task=TASKS[1], sample_index=0, trajectory=unasked, judgement=wrong),
    ]
    lines = detail_lines(episodes)
    assert [(line["index"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0)]
    first, second = lines[0], lines[1]
    assert (first["sql"], first["right"], first["on_suite"]) == ("SELECT 1", True, True)
    assert (first["turns"], first["tokens"]) == (1, 7)
    assert (second["sql"], second["right"], second["on_suite"]) == (None, False, None)
    assert summarise(episodes)["long_prompts"] == 2


def test_shares_of_execution_are_of_all_answers() -> None:
    results = [
        QueryResult(outcome=Outcome.ROWS, columns=("a",), rows=((1,),)),
        QueryResult(outcome=Outcome.ROWS, columns=("a",)),
        QueryResult(outcome=Outcome.OVER_BUDGET),
        None,
    ]
    shares = {"runs": 0.5, "over_budget": 0.25, "empty": 0.25}
    assert execution_shares(results) == shares


def test_the_summary_counts_what_happened() -> None:
    episodes = asyncio.run(evaluate(TASKS, first_half_wins, num_samples=2))
    summary = summarise(episodes)
    assert (summary["n"], summary["num_episodes"], summary["accuracy"]) == (6, 12, 0.5)
    assert summary["verdicts"] == {"match": 6, "bad_format": 3, "undecided": 3}
    assert summary["by_kind"] == {
        "k0": {"n": 3, "accuracy": pytest.approx(2 / 3), "wins_used_tool": 1.0},
        "k1": {"n": 3, "accuracy": pytest.approx(1 / 3), "wins_used_tool": 1.0},
    }
    assert summary["by_difficulty"] == {"easy": {"n": 6, "accuracy": 0.5, "wins_used_tool": 1.0}}
    assert (summary["used_tool"], summary["wins_used_tool"]) == (0.5, 1.0)
    assert (summary["runs"], summary["over_budget"], summary["empty"]) == (0.0, 0.0, 0.0)
    assert summary["truncated"] == 0.25
    assert summary["void_turns"] == pytest.approx(6 / 21)
    assert summary["mean_turns"] == pytest.approx(21 / 12)
    assert summary["mean_tokens"] == pytest.approx(4 * 21 / 12)
    assert summary["pass_at"] == {"1": 0.5, "2": 0.5}
    low, high = summary["accuracy_interval"]
    assert low < 0.5 < high
    assert json.loads(json.dumps(summary))["n"] == 6


def test_shares_of_nothing_are_null_and_one_sample_has_no_pass_at() -> None:
    summary = summarise(
        [
            Episode(task=task, sample_index=0, trajectory=trajectory, judgement=judgement)
            for task in TASKS
            for trajectory, judgement in [episode(task, Verdict.NO_ANSWER, [], StopReason.FAILED)]
        ]
    )
    assert summary["wins_used_tool"] is None
    assert summary["void_turns"] is None
    assert summary["pass_at"] == {}
    assert summary["accuracy_interval"] == pytest.approx((0.0, 0.390), abs=5e-4)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
@settings(max_examples=40, deadline=None)
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(
    counts: tuple[int, int], data: st.DataObject
) -> None:
    num_samples, num_right = counts
    k = data.draw(st.integers(1, num_samples))
    draws = list(combinations(range(num_samples), k))
    share = sum(any(drawn < num_right for drawn in draw) for draw in draws) / len(draws)
    assert pass_at_k(num_samples, num_right, k) == pytest.approx(share)


def test_pass_at_is_told_for_powers_of_two_and_for_all_samples() -> None:
    async def second_wins(task: Task, sample_index: int) -> tuple[Trajectory, Judgement]:
        return episode(task, Verdict.MATCH if sample_index == 1 else Verdict.MISMATCH)

    summary = summarise(asyncio.run(evaluate(TASKS, second_wins, num_samples=5)))
    # one right of five: k samples hold it with probability k / 5
    assert summary["pass_at"] == pytest.approx({"1": 0.2, "2": 0.4, "4": 0.8, "5": 1.0})


def test_an_interval_is_as_wide_as_theory_says() -> None:
    right = np.random.default_rng(1).random(1034) < 0.7
    low, high = interval_of_mean(right.tolist())
    expected = 2 * 1.96 * (right.mean() * (1 - right.mean()) / 1034) ** 0.5
    assert high - low == pytest.approx(expected, rel=0.1)
    assert interval_of_mean(right.tolist()) == (low, high)


def test_an_interval_over_databases_is_wider_when_they_differ() -> None:
    values = [float(n < 50) for n in range(100)]
    databases = [n // 10 for n in range(100)]
    low, high = interval_of_mean(values)
    wide_low, wide_high = interval_of_mean(values, databases)
    assert wide_high - wide_low > 2 * (high - low)


@pytest.mark.parametrize(
    ("values", "low", "high"),  # as Wilson's formula gives them, to three digits
    [
        ([0.0] * 10, 0.0, 0.278),
        ([1.0] * 10, 0.722, 1.0),
        ([0.0], 0.0, 0.793),
        ([0.5] * 4, 0.15, 0.85),
    ],
)
def test_values_that_are_all_alike_leave_an_interval_of_some_width(
    values: list[float], low: float, high: float
) -> None:
    assert interval_of_mean(values) == pytest.approx((low, high), abs=5e-4)


def test_databases_that_are_all_alike_count_once_each() -> None:
    labels = ["a"] * 7 + ["b"] * 3
    assert interval_of_mean([0.0] * 10, labels) == interval_of_mean([0.0] * 2)


def test_one_right_of_many_is_still_resampled() -> None:
    low, high = interval_of_mean([1.0] + [0.0] * 9)
    assert (low, high) == pytest.approx((0.0, 0.3))


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        interval_of_mean([])


def test_json_files_appear_whole_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"ex": 0.5, "name": "é"})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"ex": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ex": 0.5, "name": "é"}
    write_jsonl(path, [{"index": 0}, {"index": 1}])
    with pytest.raises(ValueError, match="Out of range float"):
        write_jsonl(path, [{"index": 0}, {"ex": float("inf")}])
    assert path.read_text() == '{"index": 0}\n{"index": 1}\n'
    assert list(path.parent.iterdir()) == [path]


def test_one_database_gives_no_interval_over_databases() -> None:
    rights = [1.0, 0.0, 1.0, 1.0]
    assert interval_over_databases(rights, ["a"] * 4) is None
    assert percent_interval(None) == "-"
    assert interval_over_databases(rights, list("aabb")) == interval_of_mean(rights, list("aabb"))
