"""What the head's passes take at the most, counted tensor by tensor, against the plan."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from querl.algorithm.logprobs import MIN_CHUNK_TOKENS, selected_logprobs
from querl.trainer.plan import Adapter, PlanSettings, plan
from querl.trainer.shapes import DecoderShape

# A vocabulary beside which all else is small, in chunks of ``MIN_CHUNK_TOKENS``.
SHAPE = DecoderShape(
    hidden_size=64,
    intermediate_size=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    vocab_size=2**16,
    is_tied=True,
)
FROZEN = PlanSettings(
    tokens_per_microbatch=2 * MIN_CHUNK_TOKENS, compute_bytes=4, adapter=Adapter(rank=1)
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is open and not gone yet."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        given = {self._key(tensor) for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if is_tensor(tensor) and self._key(tensor) not in given | self._live.keys():
                key, storage = self._key(tensor), tensor.untyped_storage()
                self._live[key] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, key)
        self.peak = max(self.peak, sum(self._live.values()))
        return result

    def _key(self, tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def peak_of_head(*, is_trained: bool, has_entropy: bool, num_chunks: int) -> int:
    """Bytes that one forward and backward pass takes on top of its inputs."""
    num_tokens = num_chunks * MIN_CHUNK_TOKENS
    hidden = torch.randn(num_tokens, SHAPE.hidden_size, requires_grad=True)
    head = torch.randn(SHAPE.vocab_size, SHAPE.hidden_size, requires_grad=is_trained)
    targets = torch.arange(num_tokens)
    with LiveBytes() as live:
        logprobs_M, entropies_M = selected_logprobs(hidden, head, targets)
        (logprobs_M.sum() + (entropies_M.sum() if has_entropy else 0)).backward()
    return live.peak


@pytest.mark.parametrize("num_chunks", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_entropy", [False, True])
@pytest.mark.parametrize("is_trained", [False, True])
def test_the_head_takes_what_is_planned(
    is_trained: bool, has_entropy: bool, num_chunks: int
) -> None:
    settings = replace(FROZEN, has_entropy=has_entropy)
    planned = plan(SHAPE, settings if not is_trained else replace(settings, adapter=None)).working
    measured = peak_of_head(is_trained=is_trained, has_entropy=has_entropy, num_chunks=num_chunks)
    assert measured == pytest.approx(planned, rel=0.02)
