from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import make_samples, make_turn_samples

from querl.algorithm.pack import Segment, pack, subtree_ends
from querl.trainer.flex import BLOCK, FlexRow, block_relations, lay_out
from querl.trainer.segments import plan_segments

packings = st.tuples(
    st.integers(1, 4), st.integers(1, 5), st.integers(0, 99), st.integers(20, 300), st.booleans()
)
makers = st.sampled_from([make_samples, make_turn_samples])


def seen_tokens(plan) -> list[Counter[int]]:
    """For each token of the row, the row's tokens that it attends to, by count."""
    seen = []
    first_query = first_key = 0
    for call in plan.calls:
        causal = torch.ones(call.num_queries, call.num_keys).tril().bool()
        mask = causal[None, None] if call.mask is None else call.mask
        mask = mask.expand(call.num_segments, 1, -1, -1)[:, 0]
        num_keys = call.num_segments * call.num_keys
        keys = plan.key_index[first_key : first_key + num_keys].view(call.num_segments, -1)
        seen += [
            Counter(keys[row][mask[row, query]].tolist())
            for row in range(call.num_segments)
            for query in range(call.num_queries)
        ]
        first_key += num_keys
        first_query += call.num_segments * call.num_queries
    assert plan.query_index[plan.result_index_T].tolist() == list(range(len(plan.result_index_T)))
    return [seen[place] for place in plan.result_index_T.tolist()]


@settings(max_examples=40, deadline=None)
@given(packings, makers)
def test_every_sample_comes_back_and_no_token_twice(packing, make):
    num_groups, group_size, seed, max_tokens, share_prefix = packing
    samples = make(num_groups, group_size, seed=seed)
    random.Random(seed).shuffle(samples)
    rows = pack(samples, max_tokens, share_prefix=share_prefix)
    assert sorted(n for row in rows for n in row.members) == list(range(len(samples)))
    for row in rows:
        assert row.num_tokens <= max_tokens or len(row.members) == 1
        trained = row.loss_mask_T.nonzero().squeeze(1).tolist()
        for place_of_member, number in enumerate(row.members):
            sample = samples[number]
            mine, trained = trained[: sample.num_loss_tokens], trained[sample.num_loss_tokens :]
            places = [place for place, is_trained in enumerate(sample.loss_mask) if is_trained]
            assert set(row.sequence_T[mine].tolist()) == {place_of_member}
            assert row.positions_T[mine].tolist() == places
            assert (
                row.advantages_T[mine].tolist()
                == torch.tensor([sample.advantages[place] for place in places]).tolist()
            )
            path = path_of(row, mine[-1])
            assert row.token_ids_T[path].tolist() == list(sample.token_ids[: places[-1] + 1])
            assert row.positions_T[path].tolist() == list(range(places[-1] + 1))
        assert trained == []


def path_of(row, token: int) -> list[int]:
    """The row's tokens from position 0 to this one, following each token's source."""
    path = [token]
    while row.source_T[path[-1]] != path[-1]:
        path.append(int(row.source_T[path[-1]]))
    return path[::-1]


@settings(max_examples=30, deadline=None)
@given(packings, makers)
def test_a_token_attends_to_the_tokens_before_it_in_its_own_sample_once_each(packing, make):
    num_groups, group_size, seed, max_tokens, share_prefix = packing
    for row in pack(make(num_groups, group_size, seed=seed), max_tokens, share_prefix=share_prefix):
        seen = seen_tokens(plan_segments(row.segments))
        for token in range(row.num_tokens):
            assert seen[token] == Counter(path_of(row, token))


@settings(max_examples=30, deadline=None)
@given(packings)
def test_a_prompt_is_held_once_where_its_group_fits_one_row(packing):
    num_groups, group_size, seed, _, _ = packing
    samples = make_samples(num_groups, group_size, seed=seed)
    (row,) = pack(samples, 10**6)
    prompts = {s.group_id: s.num_prompt_tokens for s in samples}
    branches = sum(len(s.token_ids) - s.num_prompt_tokens for s in samples)
    assert row.num_tokens == sum(prompts.values()) + branches
    assert (row.sequence_T == -1).sum() == (sum(prompts.values()) if group_size > 1 else 0)
    assert row.num_unshared_tokens == sum(len(s.token_ids) for s in samples)


@settings(max_examples=30, deadline=None)
@given(packings)
def test_each_distinct_prompt_of_later_turns_is_held_once(packing):
    num_groups, group_size, seed, _, _ = packing
    samples = make_turn_samples(num_groups, group_size, seed=seed)
    (row,) = pack(samples, 10**6)
    num_tokens = sum(len(s.token_ids) - s.num_prompt_tokens for s in samples)
    for group_id in range(num_groups):
        prompts = {s.token_ids[: s.num_prompt_tokens] for s in samples if s.group_id == group_id}
        for prompt in prompts:
            begun = [len(p) for p in prompts if len(p) < len(prompt) and prompt[: len(p)] == p]
            num_tokens += len(prompt) - max(begun, default=0)
    assert row.num_tokens == num_tokens


def test_branches_of_branches_see_their_whole_path():
    table = [Segment(0, 3), Segment(3, 2, 0), Segment(5, 4, 1), Segment(9, 1, 0)]
    seen = seen_tokens(plan_segments(table))
    assert seen[8] == Counter(range(9))
    assert seen[9] == Counter([0, 1, 2, 9])


@settings(max_examples=25, deadline=None)
@given(packings, makers, st.none() | st.integers(1, 60))
def test_blocks_meet_where_a_query_sees_a_key_and_wholly_where_all_see_all(packing, make, window):
    num_groups, group_size, seed, _, share_prefix = packing
    samples = make(num_groups * 3, group_size, seed=seed)
    (row,) = pack(samples, 10**6, share_prefix=share_prefix)
    ends, positions = lay_out(row.segments)
    query, key = np.indices((len(ends), len(ends)))
    sees = (key <= query) & (query < ends[key])
    for token in range(0, row.num_tokens, 17):
        assert sees[token].nonzero()[0].tolist() == sorted(path_of(row, token))
    if window is not None:
        sees &= positions[query] - positions[key] < window
    assert sees.any(1).all()
    kernel_sees = FlexRow(row.segments, torch.device("cpu"))._mask(window).mask_mod
    places = torch.from_numpy(query), torch.from_numpy(key)
    assert (kernel_sees(torch.tensor(0), torch.tensor(0), *places).numpy() == sees).all()
    blocks = sees.reshape(len(ends) // BLOCK, BLOCK, len(ends) // BLOCK, BLOCK)
    some, whole = block_relations(ends, positions, window)
    assert (some >= blocks.any((1, 3))).all()
    assert (whole <= blocks.all((1, 3))).all()
    if window is None:
        assert (some == blocks.any((1, 3))).all()
        assert (whole == blocks.all((1, 3))).all()


def test_a_row_whose_families_are_mixed_up_is_refused():
    assert subtree_ends([Segment(0, 3), Segment(3, 2, 0), Segment(5, 4)]) == [5, 5, 9]
    with pytest.raises(ValueError, match="segment 0 is not in one piece"):
        subtree_ends([Segment(0, 3), Segment(3, 2), Segment(5, 4, 0)])
