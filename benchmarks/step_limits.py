"""What a step's tokens must cost at least, after the machine's own rates.

A step's episodes are read from a run's records; ``Rates`` are measured in the same process, so that
a share of a limit is one of this machine. The formulas are these:

- decoding reads the weights once for each token of the longest episode, and every sampled token
  reads the keys and values of what stands before it; or it is bound by its products;
- prefill computes what was not sampled, a group's prompt once and each observation once;
- training computes forward and backward of each token once a group, and the head where trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from querl.trainer.shapes import DecoderShape

BF16_BYTES = 2
NUM_GOES, NUM_CALLS = 5, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one machine: bf16 products in FLOP/s, and bytes read and written a second by a copy."""

    flops: float
    bytes: float


def measure_rates(device: torch.device) -> Rates:
    """An 8192^3 bf16 product of random data and a 4 GiB copy; small ones on a CPU."""
    size, num_bytes = (8192, 2**32) if device.type == "cuda" else (512, 2**24)
    found = Rates(flops=_product_rate(size, device), bytes=_copy_rate(num_bytes, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _product_rate(size: int, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b), device)


def _copy_rate(num_bytes: int, device: torch.device) -> float:
    source = torch.empty(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call: the best of some goes of several, after one to warm up.

    Whatever else computes on the machine makes a go slower, never faster.
    """
    goes = []
    for _ in range(1 + NUM_GOES):
        _wait(device)
        start = time.perf_counter()
        for _ in range(NUM_CALLS):
            work()
        _wait(device)
        goes.append((time.perf_counter() - start) / NUM_CALLS)
    return min(goes[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a step's episodes read and wrote."""

    num_groups: int
    num_trajectories: int
    num_turns: int
    generated: int
    longest: int  # tokens that one episode sampled: so many decoding steps there were at least
    first_prompts: int  # of all trajectories, those of a group counted each time
    prefill: int  # with a group's prompt once, and nothing twice that an episode read before
    prefill_uncached: int  # all prompts of all turns
    context_sum: int  # tokens that stood before each sampled one
    tree_tokens: int  # a group's prompt once
    tree_context_sum: int  # tokens up to and with each of those

    @property
    def mean_tree_context(self) -> float:
        """Tokens that one trained or read token attends to."""
        return self.tree_context_sum / max(self.tree_tokens, 1)


def count_tokens(trajectories: Sequence[dict[str, Any]]) -> Tokens:
    """Of one step's records (``querl.records.read_step``) with histories that only grow."""
    by_group: dict[int, list[list[tuple[int, int]]]] = {}
    for line in trajectories:
        turns = [(turn["num_prompt_tokens"], turn["num_tokens"]) for turn in line["turns"]]
        if turns:  # an episode whose prompt was too long, or that failed, has none
            by_group.setdefault(line["group"], []).append(turns)
    played = [turns for group in by_group.values() for turns in group]
    prompts = [group[0][0][0] for group in by_group.values()]
    ends = [prompt + said for turns in played for prompt, said in turns[-1:]]
    return Tokens(
        num_groups=len(by_group),
        num_trajectories=len(played),
        num_turns=sum(len(turns) for turns in played),
        generated=sum(said for turns in played for _, said in turns),
        longest=max((sum(said for _, said in turns) for turns in played), default=0),
        first_prompts=sum(turns[0][0] for turns in played),
        prefill=sum(prompts) + sum(_observed(turns) for turns in played),
        prefill_uncached=sum(prompt for turns in played for prompt, _ in turns),
        context_sum=sum(_sum_from(prompt, said) for turns in played for prompt, said in turns),
        tree_tokens=sum(prompts)
        + sum(end - turns[0][0] for end, turns in zip(ends, played, strict=True)),
        tree_context_sum=sum(_sum_from(1, prompt) for prompt in prompts)
        + sum(
            _sum_from(turns[0][0] + 1, end - turns[0][0])
            for end, turns in zip(ends, played, strict=True)
        ),
    )


def _observed(turns: Sequence[tuple[int, int]]) -> int:
    """Tokens that stood between an episode's turns, which nobody sampled."""
    return sum(prompt - before - said for (before, said), (prompt, _) in pairwise(turns))


def _sum_from(first: int, count: int) -> int:
    """first + (first + 1) + ..., so many of them."""
    return count * first + count * (count - 1) // 2


def limits_s(
    shape: DecoderShape, tokens: Tokens, rates: Rates, *, forward: float, trained: float
) -> dict[str, float]:
    """The least seconds for decoding, prefill and training of a step in bf16.

    ``forward`` tokens went through the layers in training, ``trained`` of them through the head.
    """
    in_layers = shape.num_layers * shape.num_layer_parameters
    all_read = in_layers + shape.num_head_parameters
    kv_bytes = BF16_BYTES * 2 * shape.kv_width * shape.num_layers
    read = BF16_BYTES * all_read * tokens.longest + kv_bytes * tokens.context_sum
    attention = 4 * shape.query_width * shape.num_layers
    return {
        "decode": max(read / rates.bytes, 2 * all_read * tokens.generated / rates.flops),
        "prefill": 2 * in_layers * tokens.prefill / rates.flops,
        "train": 3
        * (
            2 * in_layers * forward
            + attention * tokens.mean_tree_context * forward
            + 2 * shape.num_head_parameters * trained
        )
        / rates.flops,
    }
