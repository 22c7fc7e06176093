"""What benchmarks/step_limits.py counts of a step, and the seconds that it costs at least."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.step_limits import Rates, count_tokens, limits_s
from querl.trainer.shapes import PUBLISHED

RATES = Rates(flops=800e12, bytes=4e12)


def episode(group: int, *turns: tuple[int, int]) -> dict[str, Any]:
    """A line of a run's records: (tokens of the prompt, tokens that were sampled) by turn."""
    told = [{"num_prompt_tokens": prompt, "num_tokens": said} for prompt, said in turns]
    return {"group": group, "turns": told}


# two episodes of one group: one answers at once, one reads 5 tokens of a result before it answers
EPISODES = [episode(0, (10, 4)), episode(0, (10, 3), (18, 2))]


def test_a_prompt_is_computed_once_a_group_and_a_result_once():
    tokens = count_tokens(EPISODES)
    assert tokens.generated == 4 + 3 + 2
    assert tokens.prefill == 10 + 5
    assert tokens.prefill_uncached == 10 + 10 + 18
    assert tokens.longest == 3 + 2


def test_each_sampled_token_reads_all_before_it():
    assert count_tokens([episode(0, (10, 3))]).context_sum == 10 + 11 + 12


def test_a_tree_holds_a_prompt_once():
    tokens = count_tokens(EPISODES)
    assert tokens.tree_tokens == 10 + 4 + (3 + 5 + 2)
    below = sum(range(1, 11))
    assert tokens.tree_context_sum == below + sum(range(11, 15)) + sum(range(11, 21))


def test_episodes_without_a_turn_are_left_out():
    assert count_tokens([*EPISODES, episode(1)]) == count_tokens(EPISODES)


def test_decoding_reads_the_weights_once_a_token_of_the_longest_episode():
    shape = PUBLISHED["Qwen/Qwen2.5-Coder-0.5B"]
    found = limits_s(shape, count_tokens([episode(0, (1, 100))]), RATES, forward=0, trained=0)
    weights = 2 * (shape.num_parameters)
    assert found["decode"] == pytest.approx(100 * weights / RATES.bytes, rel=0.01)
    assert found["train"] == 0


def test_training_costs_six_operations_a_parameter_and_token_where_attention_is_short():
    shape = PUBLISHED["Qwen/Qwen2.5-Coder-7B"]
    found = limits_s(shape, count_tokens([episode(0, (1, 2))]), RATES, forward=1e6, trained=1e6)
    matrices = shape.num_layers * shape.num_layer_parameters + shape.num_head_parameters
    assert found["train"] == pytest.approx(6 * matrices * 1e6 / RATES.flops, rel=0.01)
