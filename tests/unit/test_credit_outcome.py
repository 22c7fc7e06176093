"""Estimators that read outcomes alone, each against its formula, worked out by hand."""

from __future__ import annotations

import math

import pytest
from tiny_policy import make_group

from querl.algorithm.credit import has_signal, make_credit, reads_turn_rewards
from querl.algorithm.credit.dr_grpo import dr_grpo
from querl.algorithm.credit.max_rl import max_rl
from querl.algorithm.credit.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from querl.algorithm.credit.rloo import rloo
from querl.types import Verdict

OUTCOMES = ("grpo", "grpo_batch_std", "dr_grpo", "rloo", "max_rl")
STEP = [make_group((1.0, 0.0)), make_group((1.0, 1.0), id=1), make_group((0.0, 0.0), id=2)]


def first_turns(credit):
    return [[credit_t[0] for credit_t in credit_Gt] for credit_Gt in credit]


def test_dr_grpo_removes_the_mean_and_divides_by_nothing():
    assert dr_grpo([1.0, 0.0, 0.0, 3.0]) == [0, -1, -1, 2]


def test_rloo_compares_with_the_others():
    rewards = [1.0, 0.0, 0.0, 3.0]
    others = [[r for other, r in enumerate(rewards) if other != own] for own in range(4)]
    expected = [own - sum(rest) / 3 for own, rest in zip(rewards, others, strict=True)]
    assert rloo(rewards) == pytest.approx(expected)
    assert rloo([1.0, 0.0]) == [1, -1], "of two, each against the one other"
    assert rloo([0.7]) == [0]


def test_max_rl_weighs_a_task_by_one_over_its_pass_rate():
    assert max_rl([1.0, 0.0, 0.0, 0.0]) == pytest.approx([3, -1, -1, -1])
    assert max_rl([1.0, 1.0, 1.0, 0.0]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1])
    # the mean of r S / K - S / N over N samples, the estimator's own form
    rewards, scores = [1.0, 0.0, 1.0, 0.0], [0.3, -1.2, 0.5, 0.8]
    ours = sum(a * s for a, s in zip(max_rl(rewards), scores, strict=True)) / 4
    successes = sum(r * s for r, s in zip(rewards, scores, strict=True)) / sum(rewards)
    assert ours == pytest.approx(successes - sum(scores) / 4)


def test_max_rl_gives_nothing_where_nothing_succeeded():
    assert max_rl([0.0, 0.0]) == [0, 0]
    assert max_rl([-1.0, 0.5]) == [0, 0]


def test_reinforce_pp_normalises_over_the_step_and_blames_hard_tasks():
    # rewards 1 0 1 1 0 0: mean and deviation 1/2
    assert first_turns(reinforce_pp(STEP)) == [[1, -1], [1, 1], [-1, -1]]


def test_reinforce_pp_with_a_baseline_divides_by_the_deviation_of_the_differences():
    # differences 1/2 -1/2 0 0 0 0: deviation sqrt(1/12)
    expected = 0.5 / math.sqrt(1 / 12)
    (first, second, third) = first_turns(reinforce_pp_baseline(STEP))
    assert first == pytest.approx([expected, -expected])
    assert second == third == [0, 0]


def test_what_cannot_be_judged_moves_no_mean_of_the_step():
    broken = make_group((1.0, 9.0, 0.0), verdicts=(Verdict.MATCH, Verdict.UNDECIDED, Verdict.MATCH))
    assert first_turns(reinforce_pp([broken])) == [[1, 0, -1]]
    assert first_turns(reinforce_pp_baseline([broken])) == [[1, 0, -1]]


@pytest.mark.parametrize("name", [*OUTCOMES, "reinforce_pp", "reinforce_pp_baseline"])
def test_outcomes_that_differ_by_rounding_alone_teach_nothing(name):
    credit = make_credit(name)
    assert not has_signal(make_group((0.1 + 0.2, 0.3, 0.3)), credit)
    assert has_signal(make_group((1.0, 0.0)), credit)
    assert not reads_turn_rewards(credit)
