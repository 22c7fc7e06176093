"""Compiled layers on the CPU: an adapter, and the base below it as the reference."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer

from querl.algorithm.loss import ClipLoss
from querl.algorithm.loss.kl import KlPenalty
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.optim import AdamWSettings
from querl.trainer.reference import AdapterOff

pytestmark = pytest.mark.slow

PENALTY = KlPenalty(coefficient=0.1, estimator="k2")


def adapted_learner(base: Path, **update: bool) -> FullLearner:
    """Its adapter adds something from the start, so that policy and reference differ."""
    model = tiny_policy()
    add_adapter(model, LoraSettings(rank=4, alpha=64), base=base)
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=dice))
    return FullLearner(
        model,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=1e-3),
        update=UpdateSettings(kl=PENALTY, minibatches=2, tokens_per_microbatch=100, **update),
        reference=AdapterOff(model),
    )


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
def test_the_reference_is_the_base_in_compiled_layers_too(
    tmp_path: Path, is_recomputed: bool
) -> None:
    """Slow for what inductor takes to compile on a CPU."""
    plain = adapted_learner(tmp_path)
    compiled = adapted_learner(tmp_path, compile_layers=True, checkpoint_activations=is_recomputed)
    for seed in (0, 1):
        found = [
            asyncio.run(learner.update(make_samples(seed=seed))) for learner in (plain, compiled)
        ]
        for name in ("policy/kl", "policy/loss", "policy/ratio_max", "optimizer/grad_norm"):
            assert found[1][name] == pytest.approx(found[0][name], rel=2e-3), name
        assert found[0]["policy/kl"] > 0.005
