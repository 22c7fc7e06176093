"""Broken numbers cost a step and leave a trace; a run that only skips, or that cannot agree with
itself, stops."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from company import company_recipe, listener, make_company
from safetensors.torch import load_file
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer
from torch import Tensor

from querl.algorithm.loss import ClipLoss, Loss
from querl.algorithm.loss.base import total
from querl.algorithm.loss.correction import Correction
from querl.algorithm.pack import MicroBatch
from querl.durable import read_lines
from querl.errors import TrainingError
from querl.launch.training import train_locally
from querl.metrics import Metrics
from querl.run import Run
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.guards import MAX_DUMPS, PATIENCE, Fault, FaultLog, Reason
from querl.trainer.optim import AdamWSettings
from querl.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Steep:
    """A loss of 0 whose slope is no number: the square root's at 0, where the ratio is 1."""

    def __call__(self, logprobs_T: Tensor, batch: MicroBatch, normaliser: float) -> Tensor:
        distance_T = (logprobs_T - batch.old_logprobs_T).abs()
        return total(distance_T.sqrt(), batch, normaliser)


def learner(
    *, model: torch.nn.Module | None = None, loss: Loss | None = None, **update: Any
) -> FullLearner:
    return FullLearner(
        model or tiny_policy(),
        tiny_tokenizer(),
        loss=loss or ClipLoss(),
        optimizer=AdamWSettings(lr=1e-2),
        update=UpdateSettings(**update),
    )


def update(policy: FullLearner, samples: Sequence[Sample]) -> Metrics:
    return asyncio.run(policy.update(samples))


def weights(policy: FullLearner) -> list[Tensor]:
    return [weight.detach().clone() for weight in policy.weights().module.parameters()]


def are_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(one.equal(other) for one, other in zip(left, right, strict=True))


def sampled_by(policy: FullLearner, samples: list[Sample], *, shift: float = 0.0) -> list[Sample]:
    """The same samples with the policy's own log-probs, all moved by ``shift`` nats."""
    filled = []
    for sample, known in zip(samples, asyncio.run(policy.logprobs(samples)), strict=True):
        values = iter(known)
        logprobs = (next(values) + shift if trained else 0.0 for trained in sample.loss_mask)
        filled.append(replace(sample, sampled_logprobs=tuple(logprobs)))
    return filled


def with_nan(sample: Sample) -> tuple[Sample, int]:
    """The sample with an advantage that is no number at its second trained token, and its place."""
    place = [i for i, trained in enumerate(sample.loss_mask) if trained][1]
    advantages = list(sample.advantages)
    advantages[place] = math.nan
    return replace(sample, advantages=tuple(advantages)), place


def test_a_loss_that_is_no_number_moves_nothing_and_names_its_tokens():
    policy, samples = learner(), make_samples()
    samples[2], place = with_nan(samples[2])
    before = weights(policy)
    metrics = update(policy, samples)
    assert are_equal(weights(policy), before)
    assert metrics["optimizer/skipped_steps"] == 1
    (fault,) = policy.faults
    assert fault.refused.reason is Reason.LOSS
    assert fault.samples == tuple(samples)
    bad = [sum(is_bad) for is_bad in fault.is_bad]
    assert [number for number, count in enumerate(bad) if count] == [2]
    trained = [i for i, is_trained in enumerate(samples[2].loss_mask) if is_trained]
    assert [p for p, is_bad in zip(trained, fault.is_bad[2], strict=True) if is_bad] == [place]
    expected = asyncio.run(policy.logprobs(samples))
    assert [list(one) for one in fault.logprobs] == expected
    update(policy, make_samples())
    assert policy.faults == []
    assert not are_equal(weights(policy), before)


def test_a_bad_minibatch_does_not_keep_the_others_from_teaching():
    policy, samples = learner(minibatches=3), make_samples(3)
    samples[5], _ = with_nan(samples[5])
    before = weights(policy)
    metrics = update(policy, samples)
    assert not are_equal(weights(policy), before)
    assert metrics["optimizer/skipped_steps"] == 1
    assert [(f.minibatch, f.samples) for f in policy.faults] == [(1, tuple(samples[4:8]))]


def test_a_gradient_that_is_no_number_moves_nothing_and_names_its_weights():
    policy = learner(loss=Steep())
    before = weights(policy)
    metrics = update(policy, make_samples())
    assert are_equal(weights(policy), before)
    assert metrics["policy/loss"] == 0
    (fault,) = policy.faults
    assert fault.refused.reason is Reason.GRADIENT
    assert set(fault.refused.weights) == {n for n, _ in policy.weights().module.named_parameters()}
    assert all(all(is_bad) for is_bad in fault.is_bad)


def test_a_sampler_far_from_the_learner_costs_the_step():
    near, far, off = (learner(max_dlogprob=most) for most in (0.25, 0.25, 0.0))
    samples = make_samples()
    for policy, shift, is_skipped in ((near, -0.2, False), (far, -0.3, True), (off, -9.0, False)):
        before = weights(policy)
        metrics = update(policy, sampled_by(policy, samples, shift=shift))
        assert are_equal(weights(policy), before) == is_skipped
        assert metrics["sampler/abs_dlogprob"] == pytest.approx(-shift, abs=1e-4)
    (fault,) = far.faults
    assert fault.refused.reason is Reason.SAMPLER
    assert "0.3 nats a token apart, algorithm.max_dlogprob allows 0.25" in fault.refused.told


def test_in_later_epochs_the_old_policy_is_held_against_the_sampler_not_the_new_one():
    """The new one has moved, and is meant to; a batch that was refused is refused again."""
    near, far = (learner(max_dlogprob=0.25, inner_epochs=3) for _ in range(2))
    before = weights(far)
    samples = make_samples()
    assert update(near, sampled_by(near, samples, shift=-0.2))["optimizer/skipped_steps"] == 0
    assert update(far, sampled_by(far, samples, shift=-0.3))["optimizer/skipped_steps"] == 3
    assert are_equal(weights(far), before)


def test_a_sampler_that_gives_no_number_costs_the_step_though_its_tokens_are_masked():
    policy = learner(max_dlogprob=0.25, correction=Correction(kind="mask", low=0.5, high=5))
    samples, before = sampled_by(policy, make_samples()), weights(policy)
    logprobs = list(samples[0].sampled_logprobs)
    logprobs[samples[0].loss_mask.index(True)] = math.nan
    samples[0] = replace(samples[0], sampled_logprobs=tuple(logprobs))
    update(policy, samples)
    assert [fault.refused.reason for fault in policy.faults] == [Reason.SAMPLER]
    assert are_equal(weights(policy), before)


def test_dropout_that_is_on_stops_the_run():
    model = tiny_policy()
    layer = model.get_decoder().layers[0]
    layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.5)).train()
    with pytest.raises(TrainingError, match=r"two passes .* dropout that is on"):
        update(learner(model=model), make_samples())


class OtherWithGraph(torch.nn.Module):
    """Adds a little where a gradient is wanted, as a wrong kernel might."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 1.001 if torch.is_grad_enabled() else hidden


def test_an_old_policy_by_another_kernel_stops_the_run():
    model = tiny_policy()
    layer = model.get_decoder().layers[0]
    layer.mlp = torch.nn.Sequential(layer.mlp, OtherWithGraph())
    update(learner(model=model), make_samples())  # old is new: one kernel, no harm
    with pytest.raises(TrainingError, match=r"nats a token apart, 0 is allowed"):
        update(learner(model=model, minibatches=2), make_samples())


def a_fault() -> Fault:
    policy, samples = learner(), make_samples()
    samples[0], _ = with_nan(samples[0])
    update(policy, samples)
    return policy.faults[0]


def test_the_first_batches_are_dumped_and_every_step_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    faults, log = [a_fault()], FaultLog(tmp_path / "dumps", "recipe (abc)", said.append)
    for step in (1, 3, 5, 7):
        log.note(step, faults)
        log.note(step + 1, [])
    dumps = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert dumps == [f"step-{step:06d}.json" for step in (1, 3, 5)[:MAX_DUMPS]]
    assert said[0] == (
        f"warning: step 1: an update was skipped: the loss is nan; the batch: "
        f"{tmp_path / 'dumps' / dumps[0]}"
    )
    assert said[3] == "warning: step 7: an update was skipped: the loss is nan"

    dump = json.loads((tmp_path / "dumps" / dumps[0]).read_text(), parse_constant=pytest.fail)
    assert (dump["step"], dump["recipe"]) == (1, "recipe (abc)")
    (told,) = dump["faults"]
    assert (told["reason"], told["loss"], len(told["samples"])) == ("loss", "nan", 12)
    sample = told["samples"][0]
    (bad,) = sample["bad"]
    assert sample["advantages"][sample["trained"].index(bad)] == "nan"
    assert tuple(sample["token_ids"]) == faults[0].samples[0].token_ids
    assert sample["logprobs"] == list(faults[0].logprobs[0])


def test_only_steps_in_a_row_end_a_run(tmp_path: Path) -> None:
    log, faults = FaultLog(tmp_path / "dumps", "recipe", lambda _: None), [a_fault()]
    for step in range(1, PATIENCE):
        log.note(step, faults)
    log.note(PATIENCE, [])
    for step in range(1, PATIENCE):
        log.note(PATIENCE + step, faults)
    with pytest.raises(TrainingError, match=rf"stopped after step {2 * PATIENCE}: 5 in a row"):
        log.note(2 * PATIENCE, faults)


def test_a_run_whose_gradients_are_all_broken_stops_and_leaves_its_traces(tmp_path: Path) -> None:
    company = make_company(tmp_path / "company")
    broken = ('algorithm.loss={name="test_guards:Steep"}', "run.num_steps=9", "run.save_every=1")
    recipe, heard = company_recipe(company, *broken), listener()
    with (
        Run(tmp_path / "run", recipe, heard, fresh=False) as run,
        pytest.raises(TrainingError, match="stopped after step 5: 5 in a row had updates skipped"),
    ):
        asyncio.run(train_locally(recipe, run, heard.say))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["optimizer/skipped_steps"] for line in lines] == [1] * 5
    assert len(list((tmp_path / "run" / "dumps").iterdir())) == MAX_DUMPS
    assert sum("weights is not finite" in line for line in heard.said) == 5
    before = load_file(company / "model" / "model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/last/model/model.safetensors")
    assert all(after[name].equal(before[name]) for name in before)
    Run(tmp_path / "run", recipe, heard, fresh=True).__enter__().__exit__(None, None, None)
    assert not (tmp_path / "run" / "dumps").exists()
