"""What every learner must do. A new one adds its factory to ``LEARNERS``."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer

from querl.algorithm.loss import ClipLoss
from querl.algorithm.loss.reduction import Reduction
from querl.errors import CheckpointError
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.model import load_model, load_tokenizer, save_model
from querl.trainer.offload import HostOffload
from querl.trainer.optim import AdamWSettings


def full_learner(base: Path, *, seed: int = 0, **settings) -> FullLearner:
    return learner_of(tiny_policy(seed), **settings)


def lora_learner(base: Path, *, seed: int = 0, **settings) -> FullLearner:
    if not base.exists():
        save_model(tiny_policy(), tiny_tokenizer(), base)
    model = tiny_policy()
    add_adapter(model, LoraSettings(rank=8, alpha=64), base=base, seed=seed)
    return learner_of(model, **settings)


def moving_learner(base: Path, **settings) -> FullLearner:
    """Asleep, its tensors lie in other memory, as those of a GPU would."""
    return full_learner(base, moves=True, **settings)


def learner_of(model, *, lr: float = 1e-2, moves: bool = False, **update) -> FullLearner:
    return FullLearner(
        model,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=lr, warmup_steps=3),
        update=UpdateSettings(**update),
        offload=HostOffload(model.device) if moves else None,
    )


LEARNERS = {"full": full_learner, "lora": lora_learner, "moving": moving_learner}


@pytest.fixture(params=LEARNERS)
def make_learner(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("learner") / "base"
    return functools.partial(LEARNERS[request.param], base)


def update(learner, samples):
    return asyncio.run(learner.update(samples))


def logprobs(learner, samples):
    return asyncio.run(learner.logprobs(samples))


def weights(learner) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in learner.weights().module.named_parameters()}


def are_equal(left, right) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def distance(left, right) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


def as_sampled_by(learner, samples):
    """The same samples with the log-probs that this policy gives them."""
    filled = []
    for sample, values in zip(samples, logprobs(learner, samples), strict=True):
        remaining = iter(values)
        found = tuple(next(remaining) if trained else 0.0 for trained in sample.loss_mask)
        filled.append(replace(sample, sampled_logprobs=found))
    return filled


def test_logprobs_are_those_of_a_plain_forward_pass(make_learner):
    learner, samples = make_learner(temperature=0.5), make_samples()
    model = learner.weights().module
    for sample, found in zip(samples, logprobs(learner, samples), strict=True):
        token_ids = torch.tensor(sample.token_ids)[None]
        with torch.no_grad():
            all_logprobs = (model(token_ids).logits[0, :-1] / 0.5).log_softmax(-1)
        chosen = all_logprobs.gather(-1, token_ids[0, 1:, None])[:, 0]
        expected = chosen[torch.tensor(sample.loss_mask[1:])]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)


def test_an_update_makes_good_tokens_likelier_and_bad_ones_less_likely(make_learner):
    learner, samples = make_learner(), make_samples()
    samples = as_sampled_by(learner, samples)
    before = logprobs(learner, samples)
    for _ in range(3):
        update(learner, samples)
    after = logprobs(learner, samples)
    gain = sum(
        sample.advantages[0] * (sum(new) - sum(old))
        for sample, old, new in zip(samples, before, after, strict=True)
    )
    assert gain > 0
    assert learner.step == 3


def test_at_the_first_inner_step_the_ratio_is_exactly_one(make_learner):
    samples = make_samples()
    for settings in ({}, {"tokens_per_microbatch": 60}):
        metrics = update(make_learner(**settings), samples)
        assert metrics["policy/ratio"] == 1
        assert metrics["policy/ratio_max"] == 1
        assert metrics["policy/clip_fraction"] == 0
    # With an old policy of its own pass, and no change by the first of two epochs:
    metrics = update(make_learner(lr=0.0, inner_epochs=2, minibatches=2), samples)
    assert metrics["policy/ratio_max"] == 1


def test_samples_in_which_nothing_is_trained_count_for_nothing(make_learner):
    samples = make_samples()
    idle = [replace(sample, loss_mask=(False,) * len(sample.loss_mask)) for sample in samples[:4]]
    found = []
    for batch in (samples[4:], idle + samples[4:], idle):
        learner = make_learner(reduction=Reduction(name="sequence_mean"), minibatches=2)
        before = weights(learner)
        update(learner, batch)
        found.append(weights(learner))
    assert are_equal(found[0], found[1])
    assert are_equal(found[2], before)


def test_with_a_rate_of_zero_nothing_changes(make_learner):
    learner = make_learner(lr=0.0)
    samples = as_sampled_by(learner, make_samples())
    before = weights(learner)
    metrics = update(learner, samples)
    assert are_equal(weights(learner), before)
    assert metrics["sampler/abs_dlogprob_max"] < 1e-5
    assert metrics["optimizer/grad_norm"] > 0


def test_the_distance_to_the_sampler_is_measured(make_learner):
    learner = make_learner()
    samples = [
        replace(sample, sampled_logprobs=tuple(value - 0.25 for value in sample.sampled_logprobs))
        for sample in as_sampled_by(learner, make_samples())
    ]
    metrics = update(learner, samples)
    assert metrics["sampler/abs_dlogprob"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["sampler/abs_dlogprob_max"] == pytest.approx(0.25, abs=1e-5)


def test_cutting_a_step_into_microbatches_changes_no_gradient(make_learner):
    samples = make_samples()
    found = []
    for settings in (
        {"tokens_per_microbatch": 10**6},
        {"tokens_per_microbatch": 64},
        {"share_prefix": False, "tokens_per_microbatch": 64},
        {"checkpoint_activations": True},
    ):
        learner = make_learner(**settings)
        metrics = update(learner, samples)
        found.append((metrics["policy/loss"], metrics["optimizer/grad_norm"], weights(learner)))
    for loss, norm, after in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert norm == pytest.approx(found[0][1], rel=1e-5)
        # AdamW's first step is about the gradient's sign, so a tiny gradient may round either way
        assert distance(after, found[0][2]) < 1e-4


def test_a_fixed_normaliser_divides_instead_of_the_number_of_tokens(make_learner):
    samples = make_samples()
    by_tokens, fixed = (
        make_learner(),
        make_learner(reduction=Reduction(name="constant", normaliser=1000.0)),
    )
    left, right = update(by_tokens, samples), update(fixed, samples)
    num_tokens = sum(sample.num_loss_tokens for sample in samples)
    scale = num_tokens / 1000
    assert right["policy/loss"] == pytest.approx(left["policy/loss"] * scale, rel=1e-5)
    assert right["optimizer/grad_norm"] == pytest.approx(
        left["optimizer/grad_norm"] * scale, rel=1e-5
    )
    assert left["tokens/trained"] == num_tokens


def test_minibatches_and_inner_epochs_leave_the_old_policy(make_learner):
    learner = make_learner(lr=0.05, minibatches=2, inner_epochs=3)
    metrics = update(learner, make_samples())
    assert learner.step == 1
    assert metrics["policy/ratio_max"] > 1.01
    assert metrics["policy/clip_fraction"] > 0


def test_without_samples_only_the_step_advances(make_learner):
    learner = make_learner()
    before = weights(learner)
    update(learner, [])
    assert learner.step == 1
    assert are_equal(weights(learner), before)
    assert logprobs(learner, []) == []


def test_a_broken_step_is_skipped_and_counted(make_learner):
    learner = make_learner()
    before = weights(learner)
    samples = make_samples()
    samples[0] = replace(samples[0], advantages=(float("nan"),) * len(samples[0].advantages))
    metrics = update(learner, samples)
    assert metrics["optimizer/skipped_steps"] == 1
    assert are_equal(weights(learner), before)
    assert update(learner, make_samples())["optimizer/skipped_steps"] == 0


def test_saving_and_going_on_equals_never_having_stopped_bit_for_bit(make_learner, tmp_path):
    batches = [make_samples(seed=seed) for seed in range(6)]
    straight = make_learner(minibatches=2)
    for batch in batches:
        update(straight, batch)

    first = make_learner(minibatches=2)
    for batch in batches[:3]:
        update(first, batch)
    first.save(tmp_path)
    second = make_learner(minibatches=2, seed=7)
    shared = second.weights().module
    second.load(tmp_path)
    assert second.step == 3
    for batch in batches[3:]:
        update(second, batch)
    assert are_equal(weights(second), weights(straight))
    assert second.weights().module is shared


def test_what_is_saved_is_a_plain_model_folder(make_learner, tmp_path):
    learner = make_learner()
    update(learner, make_samples())
    learner.save(tmp_path)
    loaded = load_model(tmp_path / "model", device=torch.device("cpu"))
    assert are_equal({n: w.detach() for n, w in loaded.named_parameters()}, weights(learner))
    text = "SELECT name FROM city"
    assert load_tokenizer(tmp_path / "model").encode(text) == tiny_tokenizer().encode(text)


@pytest.mark.parametrize("victim", ["learner.json", "optimizer.safetensors", "model"])
def test_a_damaged_checkpoint_is_named(make_learner, tmp_path, victim):
    learner = make_learner()
    update(learner, make_samples())
    learner.save(tmp_path)
    path = tmp_path / victim
    if path.is_dir():
        (path,) = path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        make_learner().load(tmp_path)


@pytest.mark.parametrize("state", [{}, {"step": None}, {"step": "one"}])
def test_a_state_without_its_step_is_damaged(make_learner, tmp_path, state):
    make_learner().save(tmp_path)
    (tmp_path / "learner.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(CheckpointError, match="step"):
        make_learner().load(tmp_path)


def test_an_update_that_is_cancelled_still_ends_whole(make_learner):
    samples = make_samples()

    async def cancel_at_once(learner):
        task = asyncio.create_task(learner.update(samples))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return learner.step

    cancelled, whole = make_learner(), make_learner()
    assert asyncio.run(cancel_at_once(cancelled)) == 1
    update(whole, samples)
    assert are_equal(weights(cancelled), weights(whole))


def test_sleeping_between_updates_changes_none_of_them(make_learner):
    batches = [make_samples(seed=seed) for seed in range(3)]

    async def rest(learner):
        for batch in batches:
            await learner.sleep()
            await learner.sleep()
            await learner.wake()
            await learner.wake()
            await learner.update(batch)

    rested, straight = make_learner(), make_learner()
    module = rested.weights().module
    asyncio.run(rest(rested))
    for batch in batches:
        update(straight, batch)
    assert are_equal(weights(rested), weights(straight))
    assert rested.weights().module is module


def test_whatever_computes_wakes_it_first(make_learner):
    samples = make_samples()
    asleep, awake = make_learner(), make_learner()
    asyncio.run(asleep.sleep())
    assert logprobs(asleep, samples) == logprobs(awake, samples)
    asyncio.run(asleep.sleep())
    assert update(asleep, samples)["policy/loss"] == update(awake, samples)["policy/loss"]
    assert are_equal(weights(asleep), weights(awake))


def test_what_is_saved_asleep_is_what_is_saved_awake(make_learner, tmp_path):
    learner = make_learner()
    update(learner, make_samples())
    for name in ("awake", "asleep"):
        (tmp_path / name).mkdir()
        learner.save(tmp_path / name)
        asyncio.run(learner.sleep())
    saved = [path.relative_to(tmp_path / "awake") for path in (tmp_path / "awake").rglob("*.*")]
    assert any(path.name.startswith("optimizer") for path in saved)
    for path in saved:
        both = [(tmp_path / name / path).read_bytes() for name in ("awake", "asleep")]
        assert both[0] == both[1], path


def test_a_checkpoint_can_be_loaded_asleep(make_learner, tmp_path):
    first, second = make_learner(), make_learner(seed=7)
    update(first, make_samples())
    first.save(tmp_path)
    asyncio.run(second.sleep())
    second.load(tmp_path)
    for learner in (first, second):
        update(learner, make_samples(seed=1))
    assert are_equal(weights(first), weights(second))
