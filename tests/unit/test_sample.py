from __future__ import annotations

from collections import Counter

import pytest
from tiny_policy import make_group, make_turn

from querl.algorithm.pack import pack
from querl.algorithm.sample import LeftOut, to_samples
from querl.types import ActionKind, StopReason, Verdict

TWO_TURNS = (make_turn((1, 2), (3, 4)), make_turn((1, 2, 3, 4, 8, 9), (5,), ActionKind.SOLUTION))


def test_only_sampled_tokens_are_trained():
    (sample,), _ = to_samples([make_group((1.0,), turns=TWO_TURNS)], [[[0.25, -2.0]]])
    assert sample.token_ids == (1, 2, 3, 4, 8, 9, 5)
    assert sample.loss_mask == (False, False, True, True, False, False, True)
    assert sample.advantages == (0, 0, 0.25, 0.25, 0, 0, -2.0)
    assert sample.sampled_logprobs == (0, 0, -0.5, -1.5, 0, 0, -0.5)
    assert sample.versions == (-1, -1, 3, 3, -1, -1, 3)
    assert sample.num_prompt_tokens == 2


def test_a_turns_credit_may_be_one_number_a_token():
    (sample,), _ = to_samples([make_group((1.0,), turns=TWO_TURNS)], [[[[0.1, 0.2], -2.0]]])
    assert sample.advantages == (0, 0, 0.1, 0.2, 0, 0, -2.0)


def test_token_credit_of_another_length_is_a_bug():
    with pytest.raises(ValueError, match="3 token advantages for 2 sampled tokens"):
        to_samples([make_group((1.0,), turns=TWO_TURNS)], [[[[0.1, 0.2, 0.3], 0.0]]])


def test_a_rewritten_prompt_starts_a_sample_and_one_that_grows_goes_on():
    turns = (
        make_turn((1, 2), (3,)),
        make_turn((1, 2, 7), (4,)),
        make_turn((1, 2, 7, 4, 9), (5, 6)),
        make_turn((8,), (3,)),
    )
    samples, _ = to_samples([make_group((1.0,), turns=turns)], [[[0.1, 0.2, 0.3, 0.4]]])
    assert [sample.token_ids for sample in samples] == [(1, 2, 3), (1, 2, 7, 4, 9, 5, 6), (8, 3)]
    assert [sample.advantages for sample in samples] == [
        (0, 0, 0.1),
        (0, 0, 0, 0.2, 0, 0.3, 0.3),
        (0, 0.4),
    ]
    assert [sample.num_prompt_tokens for sample in samples] == [2, 3, 1]


def test_samples_of_rewritten_prompts_hold_each_prompt_once():
    turns = (make_turn((1, 2, 3), (4,)), make_turn((1, 2, 3, 9), (5,)))
    samples, _ = to_samples([make_group((1.0, 0.0), turns=turns)], [[[0.1, 0.2], [0.3, 0.4]]])
    (row,) = pack(samples, 100)
    assert len(samples) == 4
    assert row.num_tokens == len((1, 2, 3)) + 2 * len((4,)) + len((9,)) + 2 * len((5,))
    assert row.num_loss_tokens == 4


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (StopReason.OUT_OF_TURNS, LeftOut.VOID_TURNS),
        (StopReason.TRUNCATED, LeftOut.TRUNCATED_TURNS),
    ],
)
def test_a_turn_at_fault_is_read_but_not_trained(stop, reason):
    faulty = make_turn((1, 2), (3,), ActionKind.VOID)
    good = make_turn((1, 2, 3, 8), (4,))
    last = make_turn((1, 2, 3, 8, 4, 9), (5, 6), ActionKind.VOID)
    by_turn = frozenset({LeftOut.VOID_TURNS, LeftOut.TRUNCATED_TURNS})
    group = make_group((0.0,), turns=(faulty, good, last), stops=(stop,))
    (sample,), left_out = to_samples([group], [[[0.5, 0.5, 0.5]]], leave_out=by_turn)
    assert sample.token_ids == (1, 2, 3, 8, 4), "what follows the last trained turn is cut off"
    assert sample.loss_mask == (False, False, False, False, True)
    assert left_out == Counter([LeftOut.VOID_TURNS, reason])


def test_a_trajectory_of_faulty_turns_alone_gives_no_sample():
    group = make_group((0.0,), turns=(make_turn((1,), (2,), ActionKind.VOID),))
    found = to_samples([group], [[[0.5]]], leave_out=frozenset({LeftOut.VOID_TURNS}))
    assert found == ([], {LeftOut.VOID_TURNS: 1})


def test_a_trajectory_that_is_left_out_counts_no_turns():
    group = make_group((0.0,), turns=(make_turn((1,), (2,), ActionKind.VOID),))
    both = frozenset({LeftOut.VOID, LeftOut.VOID_TURNS})
    assert to_samples([group], [[[0.5]]], leave_out=both) == ([], {LeftOut.VOID: 1})


@pytest.mark.parametrize(
    ("stop", "verdict", "turns", "reason"),
    [
        (StopReason.FAILED, Verdict.NO_ANSWER, TWO_TURNS, LeftOut.UNUSABLE),
        (StopReason.ANSWERED, Verdict.UNDECIDED, TWO_TURNS, LeftOut.UNUSABLE),
        (StopReason.ANSWERED, Verdict.GOLD_FAILED, TWO_TURNS, LeftOut.UNUSABLE),
        (StopReason.CONTEXT_FULL, Verdict.NO_ANSWER, (), LeftOut.EMPTY),
        (StopReason.OUT_OF_TURNS, Verdict.NO_ANSWER, (make_turn((1,), ()),), LeftOut.EMPTY),
    ],
)
def test_what_cannot_teach_is_always_left_out(stop, verdict, turns, reason):
    group = make_group((1.0,), turns=turns, stops=(stop,), verdicts=(verdict,))
    assert to_samples([group], [[[0.0] * len(turns)]]) == ([], {reason: 1})


@pytest.mark.parametrize(
    ("stop", "kind", "reason"),
    [
        (StopReason.OUT_OF_TURNS, ActionKind.VOID, LeftOut.VOID),
        (StopReason.TRUNCATED, ActionKind.VOID, LeftOut.TRUNCATED),
        (StopReason.CONTEXT_FULL, ActionKind.SQL, LeftOut.TRUNCATED),
    ],
)
def test_void_and_truncated_trajectories_are_left_out_by_choice(stop, kind, reason):
    turns = (make_turn((1,), (2,), kind),)
    group = make_group((0.0,), turns=turns, stops=(stop,), verdicts=(Verdict.NO_ANSWER,))
    samples, left_out = to_samples([group], [[[0.0]]])
    assert (len(samples), left_out) == (1, {})
    both = frozenset({LeftOut.VOID, LeftOut.TRUNCATED})
    assert to_samples([group], [[[0.0]]], leave_out=both) == ([], {reason: 1})


@pytest.mark.parametrize("alone", [LeftOut.VOID, LeftOut.VOID_TURNS])
def test_a_turn_that_was_cut_is_not_void(alone):
    cut = make_turn((1, 2, 3, 4, 8), (5,), ActionKind.VOID)
    group = make_group((0.0,), turns=(TWO_TURNS[0], cut), stops=(StopReason.TRUNCATED,))
    (sample,), left_out = to_samples([group], [[[0.5, 0.5]]], leave_out=frozenset({alone}))
    assert sample.loss_mask == (False, False, True, True, False, True)
    assert left_out == Counter()


@pytest.mark.parametrize("alone", [LeftOut.VOID, LeftOut.VOID_TURNS])
def test_a_void_turn_before_one_that_was_cut_is_still_void(alone):
    void = make_turn((1, 2), (3,), ActionKind.VOID)
    cut = make_turn((1, 2, 3, 8), (4,), ActionKind.VOID)
    group = make_group((0.0,), turns=(void, cut), stops=(StopReason.TRUNCATED,))
    _, left_out = to_samples([group], [[[0.5, 0.5]]], leave_out=frozenset({alone}))
    assert left_out == {alone: 1}


@pytest.mark.parametrize("silence", [0.0, -0.0, (0.0, 0.0)])
def test_a_group_whose_every_advantage_is_0_is_left_out_where_asked_for(silence):
    speaking = make_group((1.0, 0.0), id=2)
    turns = (make_turn((1, 2), (3, 4)),)
    silent = make_group((1.0, 1.0), id=1, turns=turns)
    credit = [[[silence], [silence]], [[0.5], [0.0]]]
    samples, left_out = to_samples(
        [silent, speaking], credit, leave_out=frozenset({LeftOut.NO_SIGNAL})
    )
    assert [sample.group_id for sample in samples] == [2, 2], "also the one whose advantage is 0"
    assert left_out == {LeftOut.NO_SIGNAL: 2}
    assert len(to_samples([silent, speaking], credit)[0]) == 4


def test_a_trajectory_with_a_reason_of_its_own_keeps_it_in_a_silent_group():
    stops = (StopReason.FAILED, StopReason.ANSWERED)
    group = make_group((0.0, 0.0), stops=stops)
    _, left_out = to_samples([group], [[[0.0], [0.0]]], leave_out=frozenset({LeftOut.NO_SIGNAL}))
    assert left_out == {LeftOut.UNUSABLE: 1, LeftOut.NO_SIGNAL: 1}
