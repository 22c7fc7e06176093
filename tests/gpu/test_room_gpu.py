"""Room on a CUDA device: what is given back before an engine takes it, and what is held twice."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer

from querl.algorithm.loss import ClipLoss
from querl.errors import EngineError
from querl.launch.placement import TakingTurns
from querl.rollout.dialect import Weights
from querl.rollout.hf import HfEngine
from querl.rollout.hf_batch import Buffer
from querl.rollout.pickled import reachable
from querl.rollout.probe import Probe
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.optim import AdamWSettings

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
MIB, GIB = 2**20, 2**30


class Looking(HfEngine):
    """Notes what torch keeps unused when weights come."""

    unused: int

    async def load_weights(self, weights: Weights, version: int) -> None:
        self.unused = torch.cuda.memory_reserved(CUDA) - torch.cuda.memory_allocated(CUDA)
        await super().load_weights(weights, version)


def test_what_an_update_freed_is_given_back_before_an_engine_s_weights_wake() -> None:
    policy = FullLearner(
        tiny_policy().to(CUDA),
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=1e-3),
        update=UpdateSettings(),
    )
    engine = Looking(policy.weights().module, tiny_tokenizer())
    prompt = tuple(tiny_tokenizer().encode("SELECT name"))
    probe = Probe(engine, policy.logprobs, prompt, temperature=1.0, tolerance=0.25)

    async def go() -> None:
        await policy.update(make_samples(8, 1, seed=0))
        torch.zeros(GIB, dtype=torch.uint8, device=CUDA)  # freed at once, and kept by torch
        await TakingTurns(engine, policy, probe).publish(1)
        await engine.close()

    with policy:
        asyncio.run(go())
    assert engine.unused < GIB // 4


def test_a_buffer_that_grows_is_held_twice_in_one_layer_only() -> None:
    shape = (2, 1, 1, 40 * MIB // 512, 64)
    buffer = Buffer([torch.zeros(shape, device=CUDA) for _ in range(8)], shape[-2])
    before = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    buffer.grow()
    assert torch.cuda.max_memory_allocated(CUDA) - before < 80 * MIB


def test_weights_of_the_host_that_no_gpu_has_room_for_are_an_engine_s_error() -> None:
    endless = torch.zeros(1).expand(2**44)
    with pytest.raises(EngineError, match=r"set a smaller engine\.memory_share"):
        reachable([("weight", endless)], shares_memory=True)
