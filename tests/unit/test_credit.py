"""Each estimator against its formula, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from tiny_policy import make_group, make_turn

from querl.algorithm.credit import has_signal, make_credit, reads_turn_rewards
from querl.algorithm.credit.base import discounted_returns
from querl.algorithm.credit.grpo import grpo, grpo_batch_std
from querl.algorithm.credit.turn_state import states_before
from querl.errors import ConfigError
from querl.types import Action, ActionKind, Group, StopReason, Trajectory, Turn, Verdict


def whole_step_half(groups):
    return [[[0.5] * len(t.turns) for t in group.trajectories] for group in groups]


def doubled(rewards_G):
    return [2 * reward for reward in rewards_G]


def wrongly_named(scores):
    return scores


@dataclass(frozen=True)
class Constant:
    value: float = 1.0

    def __call__(self, groups):
        return [[[self.value] * len(t.turns) for t in group.trajectories] for group in groups]


def ran(sql: str, prompt: tuple[int, ...] = (1,), said: tuple[int, ...] = (2,)) -> Turn:
    return replace(
        make_turn(prompt, said),
        action=Action(kind=ActionKind.SQL, sql=sql),
        observation=f"rows of {sql.strip(' ;').lower()}",
    )


def group_of(
    rewards: Sequence[float],
    turns: Sequence[Sequence[Turn]],
    turn_rewards: Sequence[Sequence[float]] = (),
    **changed: float,
) -> Group:
    """A group whose trajectories have turns of their own."""
    plain = make_group(tuple(rewards))
    trajectories = tuple(
        Trajectory(task_id="t", turns=tuple(own), stop=StopReason.ANSWERED) for own in turns
    )
    return replace(
        plain, trajectories=trajectories, turn_rewards=tuple(map(tuple, turn_rewards)), **changed
    )


def test_grpo_gives_zero_mean_and_unit_deviation():
    assert grpo([1.0, 0.0, 0.0, 1.0]) == pytest.approx([1, -1, -1, 1])
    advantages_G = grpo([1.0, 0.0, 0.0, 0.0])
    assert sum(advantages_G) == pytest.approx(0)
    assert sum(a * a for a in advantages_G) / 4 == pytest.approx(1)
    assert advantages_G[0] == pytest.approx(math.sqrt(3))


def test_grpo_gives_zeros_where_all_rewards_are_equal():
    assert grpo([0.1 + 0.2, 0.3, 0.3]) == [0, 0, 0]


def test_batch_deviation_removes_group_means_and_divides_by_the_steps_deviation():
    advantages = grpo_batch_std([make_group((1.0, 0.0)), make_group((3.0, 3.0), id=1)])
    deviation = math.sqrt(((1 - 1.75) ** 2 + 1.75**2 + 2 * 1.25**2) / 4)
    assert advantages[0] == [[pytest.approx(0.5 / deviation)], [pytest.approx(-0.5 / deviation)]]
    assert advantages[1] == [[0.0], [0.0]]


def test_batch_deviation_gives_zeros_where_the_whole_step_is_equal():
    assert grpo_batch_std([make_group((1.0, 1.0)), make_group((1.0, 1.0))]) == [[[0], [0]]] * 2


def test_every_turn_gets_its_trajectorys_advantage():
    turns = (make_turn((1,), (2,)), make_turn((1, 2, 9), (4,)))
    assert make_credit("grpo")([make_group((1.0, 0.0), turns=turns)]) == [[[1, 1], [-1, -1]]]


def test_a_return_is_what_comes_discounted_by_the_turn():
    assert discounted_returns([1.0, 0.0, 4.0], 0.5) == [2.0, 2.0, 4.0]
    assert discounted_returns([], 0.5) == []


def test_the_last_steps_reward_decides_for_all_steps_and_the_others_are_lost():
    group = group_of([1.0, 0.0], [[ran("a"), ran("b")], [ran("c")]], [(9.0, 0.0), (0.0,)])
    assert make_credit("last_step")([group]) == [[[1, 1], [-1]]]
    outweighed = replace(group, turn_rewards=((9.0, 0.0), (2.0,)))
    assert make_credit("last_step")([outweighed]) == [[[-1, -1], [1]]]


def test_without_turn_rewards_the_last_step_is_grpo():
    group = make_group((1.0, 0.0, 0.5), turns=(ran("a"), ran("b")))
    assert make_credit("last_step")([group]) == make_credit("grpo")([group])


def test_naive_credit_lets_a_busy_wrong_trajectory_outbid_a_short_right_one():
    busy, short = [ran("a"), ran("b"), ran("c")], [ran("d")]
    group = group_of([0.0, 1.0], [busy, short], [(0.5, 0.5, 0.5), (0.0,)])
    assert make_credit("dense_naive", scale="group")([group]) == [[[1, 1, 1], [-1]]]


def test_turns_are_compared_with_the_same_turn_of_the_others():
    turns = [[ran("a"), ran("b")]] * 2
    group = group_of([1.0, 1.0], turns, [(1.0, 0.0), (0.0, 0.5)])
    # with gamma 0.5: R = (1, 0) and (0.25, 0.5); each index has two values, so they become +-1
    credit = make_credit("turn_index", gamma=0.5, weight=0.3, scale="group")
    assert credit([group]) == [[pytest.approx([0.3, -0.3]), pytest.approx([-0.3, 0.3])]]


def test_the_outcome_is_a_track_of_its_own_that_turn_rewards_do_not_shrink():
    turns = [[ran("a")], [ran("b")]]
    group = group_of([1.0, 0.0], turns, [(0.0,), (1.0,)])
    credit = make_credit("turn_index", weight=0.3)
    assert credit([group]) == [[[pytest.approx(0.7)], [pytest.approx(-0.7)]]]


def test_the_turns_track_fades_with_the_weight_that_its_schedule_has_left():
    turns = [[ran("a")], [ran("b")]]
    group = group_of([0.0, 0.0], turns, [(0.01,), (0.0,)], turn_weight=0.1)
    assert make_credit("turn_index", weight=1.0)([group]) == [[[0.1], [-0.1]]]


def test_a_turn_that_no_other_sample_reached_has_the_outcome_alone():
    group = group_of([1.0, 0.0], [[ran("a"), ran("b")], [ran("a")]], [(0.5, 1.0), (0.5,)])
    credit = make_credit("turn_index", gamma=0.0, scale="group")([group])
    assert credit == [[[1, 1], [-1]]]


def test_the_steps_deviation_keeps_a_small_difference_small():
    turns = [[ran("a")], [ran("b")]]
    small = group_of([0.0, 0.0], turns, [(0.01,), (0.0,)])
    large = group_of([0.0, 0.0], turns, [(1.0,), (0.0,)])
    by_group = make_credit("turn_index", weight=1.0, scale="group")([small, large])
    assert by_group == [[[1], [-1]]] * 2
    by_step = make_credit("turn_index", weight=1.0, scale="step")([small, large])
    assert by_step[0][0][0] == pytest.approx(by_step[1][0][0] / 100)


def test_a_state_is_what_was_run_and_seen_whatever_its_spelling():
    def state(sql: str, seen: str) -> object:
        first = replace(ran(sql), observation=seen)
        episode = Trajectory(task_id="t", turns=(first, ran("b")), stop=StopReason.ANSWERED)
        assert states_before(episode)[0] == ()
        return states_before(episode)[1]

    known = state("SELECT a FROM t WHERE n = 'X'", "1 row")
    assert state("select A\nfrom T where n='X' ; -- so", "1 row") == known
    assert state("SELECT a FROM t WHERE n = 'x'", "1 row") != known
    assert state("SELECT a FROM t WHERE n = 'X'", "2 rows") != known


def test_turns_from_one_state_are_compared_and_others_are_not():
    same = ran("SELECT a")
    turns = [[same, ran("b")], [same, ran("c")], [ran("SELECT d"), ran("e")]]
    group = group_of([1.0, 0.0, 0.0], turns)
    credit = make_credit("turn_state", gamma=0.5, weight=1.0, scale="group")([group])[0]
    outcome = grpo([1.0, 0.0, 0.0])
    # first turns: one state, returns 0.5, 0, 0; second: the first two share theirs, the third none
    assert [turn[0] for turn in credit] == pytest.approx([2 * one for one in outcome])
    assert [turn[1] for turn in credit] == pytest.approx(
        [outcome[0] + 1, outcome[1] - 1, outcome[2]]
    )


def test_the_token_where_samples_part_gets_what_parting_was_worth():
    shared = (7, 8)
    turns = [[make_turn((1,), (*shared, 9))], [make_turn((1,), (*shared, 5))]]
    group = group_of([1.0, 0.0], turns)
    credit = make_credit("token_tree", scale="group")([group])[0]
    assert credit == [[[1, 1, 2]], [[-1, -1, -2]]]  # V moves from 1/2 to 1 or 0, deviation 1/2


def test_the_tree_goes_on_over_turns():
    first = make_turn((1,), (2,))
    turns = [[first, make_turn((1, 2, 3), (4,))], [first, make_turn((1, 2, 3), (5,))]]
    credit = make_credit("token_tree", scale="group")([group_of([1.0, 0.0], turns)])
    assert credit == [[[[1], [2]], [[-1], [-2]]]]


@pytest.mark.parametrize(
    "name", ["grpo", "grpo_batch_std", "last_step", "dense_naive", "turn_index", "turn_state"]
)
def test_a_sample_that_nobody_could_judge_moves_no_mean(name):
    verdicts = (Verdict.MATCH, Verdict.MISMATCH, Verdict.UNDECIDED)
    with_it = make_group((1.0, 0.0, 0.0), verdicts=verdicts)
    with_it = replace(with_it, turn_rewards=((0.5,), (0.0,), (9.0,)))
    without = replace(make_group((1.0, 0.0)), turn_rewards=((0.5,), (0.0,)))
    credit = make_credit(name)
    assert credit([with_it])[0] == [*credit([without])[0], [0.0]]


def test_a_sample_that_nobody_could_judge_passes_through_no_tree():
    with_it = make_group((1.0, 0.0, 5.0), verdicts=(Verdict.MATCH,) * 2 + (Verdict.UNDECIDED,))
    credit = make_credit("token_tree")
    assert credit([with_it])[0] == [*credit([make_group((1.0, 0.0))])[0], [[0.0]]]


def test_a_group_has_signal_when_usable_rewards_differ():
    grpo_credit = make_credit("grpo")
    assert has_signal(make_group((1.0, 0.0)), grpo_credit)
    assert not has_signal(make_group((1.0, 1.0)), grpo_credit)
    failed = (StopReason.ANSWERED, StopReason.ANSWERED, StopReason.FAILED)
    assert not has_signal(make_group((1.0, 1.0, 0.0), stops=failed), grpo_credit)
    assert not has_signal(make_group((1.0, 0.0), stops=(StopReason.FAILED,) * 2), grpo_credit)
    one_usable = (StopReason.ANSWERED, StopReason.FAILED)
    assert not has_signal(make_group((1.0, 0.0), stops=one_usable), grpo_credit)


def test_a_group_has_signal_where_its_credit_reads_what_differs():
    turns = [[ran("a"), ran("b")], [ran("c")]]
    early = group_of([0.0, 0.0], turns, [(0.5, 0.0), (0.0,)])
    assert has_signal(early, make_credit("turn_index"))
    assert not has_signal(early, make_credit("last_step"))
    unpaid = group_of([0.0, 0.0], turns, [(0.0, 0.0), (0.0,)])
    assert not has_signal(unpaid, make_credit("turn_index"))


def test_right_episodes_of_different_lengths_have_signal_where_delay_is_discounted():
    group = group_of([1.0, 1.0], [[ran("a"), ran("b")], [ran("b")]])
    assert has_signal(group, make_credit("turn_state", gamma=0.9))
    assert not has_signal(group, make_credit("turn_state", gamma=1.0))
    assert not has_signal(group, make_credit("grpo"))


def test_a_right_answer_counts_half_where_it_comes_a_turn_later():
    group = group_of([1.0, 1.0, 0.0], [[ran("a"), ran("b")], [ran("c")], [ran("d")]])
    credit = make_credit("turn_state", gamma=0.5, weight=1.0, scale="group")([group])[0]
    # the first turns' returns are 1/2, 1 and 0: mean 1/2, deviation sqrt(1/6)
    track = [0.0, 0.5 / math.sqrt(1 / 6), -0.5 / math.sqrt(1 / 6)]
    outcome = grpo([1.0, 1.0, 0.0])
    expected = [one + other for one, other in zip(outcome, track, strict=True)]
    assert [turns[0] for turns in credit] == pytest.approx(expected)


def test_putting_off_a_penalty_does_not_pay():
    idle, prompt = [ran("a"), ran("a"), ran("a")], [ran("b")]
    group = group_of([-1.0, -1.0], [idle, prompt])
    assert make_credit("turn_state", gamma=0.5)([group]) == [[[0, 0, 0], [0]]]
    halved = group_of([-0.5, 0.0], [[ran("a")], [ran("b")]])
    assert make_credit("turn_state", scale="group")([halved]) == [[[-2], [2]]]
    paid = replace(group, turn_rewards=((0.0, 0.0, 0.0), (0.5,)))
    first_turns = [turns[0] for turns in make_credit("turn_state", gamma=0.5)([paid])[0]]
    assert first_turns == pytest.approx([-1, 1])


def test_a_long_prompt_costs_a_tree_no_more_a_token():
    """The prompt is looked up once a turn: hashing it a token made it most of a step."""
    lookups = 0

    class Counted(tuple):
        __slots__ = ()

        def __hash__(self):
            nonlocal lookups
            lookups += 1
            return super().__hash__()

    turns = [[make_turn(Counted((1, 2)), tuple(range(50)))] for _ in range(2)]
    make_credit("token_tree")([group_of([1.0, 0.0], turns)])
    assert lookups <= 6


def test_which_credit_reads_turn_rewards():
    names = ["grpo", "grpo_batch_std", "token_tree", f"{__name__}:doubled"]
    assert not any(reads_turn_rewards(make_credit(name)) for name in names)
    names = ["last_step", "dense_naive", "turn_index", "turn_state", f"{__name__}:whole_step_half"]
    assert all(reads_turn_rewards(make_credit(name)) for name in names)


def test_your_own_estimator_is_found_and_lifted_by_the_name_of_its_parameter():
    group = make_group((1.0, 0.0))
    assert make_credit(f"{__name__}:whole_step_half")([group]) == [[[0.5], [0.5]]]
    assert make_credit(f"{__name__}:doubled")([group]) == [[[2.0], [0.0]]]
    assert make_credit(f"{__name__}:Constant", value=3)([group]) == [[[3.0], [3.0]]]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gropo", {}, "unknown credit 'gropo': use grpo"),
        ("no_such_module:f", {}, "no module 'no_such_module'"),
        ("math:no_such_function", {}, "math has no 'no_such_function'"),
        (f"{__name__}:wrongly_named", {}, "takes .'scores'.: it must take one parameter"),
        ("grpo", {"gamma": 0.9}, "credit 'grpo' is a function and has no setting 'gamma'"),
        ("turn_index", {"gama": 0.9}, "unexpected keyword argument 'gama'"),
        ("turn_index", {"gamma": 1.5}, r"algorithm\.credit\.gamma = 1\.5 is no float: .*less"),
        ("turn_state", {"weight": -1}, r"algorithm\.credit\.weight = -1 is no float: .*greater"),
        ("turn_state", {"scale": "batch"}, "input should be 'group' or 'step'"),
    ],
)
def test_an_estimator_that_cannot_be_used_is_named(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_credit(name, **settings)
