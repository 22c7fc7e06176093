"""The divergence from the first policy, and entropy, in a real learner."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
import torch
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer

from querl.algorithm.loss import ClipLoss
from querl.algorithm.loss.kl import KlPenalty
from querl.algorithm.sample import LeftOut
from querl.config import load_recipe
from querl.errors import CheckpointError, ConfigError
from querl.launch.training import left_out_by
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.optim import AdamWSettings
from querl.trainer.reference import AdapterOff, FrozenCopy


def make_learner(kl: KlPenalty, **update) -> FullLearner:
    model = tiny_policy(0)
    return FullLearner(
        model,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=1e-2),
        update=UpdateSettings(kl=kl, **update),
        reference=FrozenCopy(model) if kl.coefficient else None,
    )


def update(learner, seed=0):
    return asyncio.run(learner.update(make_samples(seed=seed)))


def weights(learner):
    return {name: w.detach().clone() for name, w in learner.weights().module.named_parameters()}


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_policy_that_is_held_stays_nearer_to_the_first(place):
    ends = {}
    for coefficient in (1e-9, 1.0):
        estimator = "k1" if place == "reward" else "k2"
        penalty = KlPenalty(coefficient=coefficient, estimator=estimator, place=place)
        learner = make_learner(penalty, minibatches=2)
        steps = [update(learner)["policy/kl"] for _ in range(6)]
        ends[coefficient] = steps[-1]
    assert ends[1.0] < 0.7 * ends[1e-9]


def test_the_divergence_is_none_before_anything_is_learnt_and_told_only_with_a_reference():
    assert update(make_learner(KlPenalty(coefficient=0.1)))["policy/kl"] == pytest.approx(
        0, abs=1e-9
    )
    assert "policy/kl" not in update(make_learner(KlPenalty())).values()


def test_a_resumed_run_is_held_to_its_first_model_by_its_own_coefficient(tmp_path):
    penalty = KlPenalty(coefficient=0.1, target=1e-6)
    straight, first = make_learner(penalty), make_learner(penalty)
    for seed in range(4):
        update(straight, seed)
    for seed in range(2):
        update(first, seed)
    first.save(tmp_path)
    second = make_learner(penalty)  # its reference is made before the checkpoint is loaded
    second.load(tmp_path)
    metrics = [update(second, seed) for seed in (2, 3)]
    assert metrics[0]["policy/kl"] > 1e-4
    # below the target at first, where nothing is learnt yet, and above it from then on
    assert metrics[0]["policy/kl_coefficient"] == pytest.approx(0.1 * 0.98 * 1.02)
    assert all(torch.equal(w, weights(straight)[n]) for n, w in weights(second).items())


def test_an_adapter_is_held_to_the_base_below_it(tmp_path):
    model = tiny_policy(0)
    before = tiny_policy(0)
    add_adapter(model, LoraSettings(rank=4), base=tmp_path)
    learner = FullLearner(
        model,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=1e-2),
        update=UpdateSettings(kl=KlPenalty(coefficient=0.1), minibatches=2),
        reference=AdapterOff(model),
    )
    assert update(learner)["policy/kl"] < 0.1
    samples = make_samples()
    moved = asyncio.run(learner.logprobs(samples))
    plain = FullLearner(
        before,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(),
        update=UpdateSettings(),
    )
    first = asyncio.run(plain.logprobs(samples))
    differences = [
        n - f for new, old in zip(moved, first, strict=True) for n, f in zip(new, old, strict=True)
    ]
    expected = sum(math.expm1(-d) + d for d in differences) / len(differences)
    # with a rate of 0 the next update sees the policy as it is, in every minibatch
    still = FullLearner(
        model,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=0.0),
        update=UpdateSettings(kl=KlPenalty(coefficient=0.1)),
        reference=AdapterOff(model),
    )
    assert expected > 1e-5
    assert update(still)["policy/kl"] == pytest.approx(expected, rel=1e-3)


def test_a_step_that_is_no_number_leaves_the_coefficient_as_it_was():
    learner = make_learner(KlPenalty(coefficient=0.1, target=1e-6))
    samples = make_samples()
    samples[0] = replace(samples[0], token_ids=(0, *samples[0].token_ids[1:]))
    embedding = learner.weights().module.get_input_embeddings().weight
    first = embedding[0].detach().clone()
    with torch.no_grad():
        embedding[0] = math.nan
    metrics = asyncio.run(learner.update(samples))
    assert math.isnan(metrics["policy/kl"])
    assert learner.faults
    with torch.no_grad():
        embedding[0] = first
    assert update(learner)["policy/kl_coefficient"] == 0.1
    assert not learner.faults


def test_a_coefficient_that_follows_no_target_is_the_recipes_after_a_resume(tmp_path):
    make_learner(KlPenalty(coefficient=0.1)).save(tmp_path)
    learner = make_learner(KlPenalty(coefficient=0.2))
    learner.load(tmp_path)
    assert update(learner)["policy/kl_coefficient"] == 0.2


def test_a_checkpoint_without_its_coefficient_is_damaged(tmp_path):
    penalty = KlPenalty(coefficient=0.1, target=0.01)
    make_learner(penalty).save(tmp_path)
    (tmp_path / "kl.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"kl\.json"):
        make_learner(penalty).load(tmp_path)


def test_a_bonus_for_entropy_raises_it():
    ends = {}
    for entropy in (0.0, 1.0):
        learner = make_learner(KlPenalty(), entropy=entropy)
        ends[entropy] = [update(learner)["policy/entropy"] for _ in range(6)][-1]
    assert ends[1.0] > ends[0.0] + 0.01


@pytest.mark.parametrize(
    ("overrides", "are_left_out"),
    [
        ((), True),
        (("algorithm.loss={name='gspo'}",), True),
        (("algorithm.loss={name='kl_cov'}",), False),
        (("algorithm.kl=0.01",), False),
        (("algorithm.entropy=0.01",), False),
        (("lora.rank=4",), True),
        (("lora.rank=4", "lora.anchor=0.05"), False),
        (("algorithm.loss={name='my.module:Loss'}",), False),
    ],
)
def test_groups_without_advantages_are_left_out_where_nothing_else_moves_them(
    overrides, are_left_out
):
    assert (LeftOut.NO_SIGNAL in left_out_by(load_recipe(None, overrides))) == are_left_out


def test_a_divisor_that_nothing_divides_by_is_refused():
    load_recipe(None, ("algorithm.reduction=constant", "algorithm.normaliser=100"))
    for override in ("algorithm.reduction=constant", "algorithm.normaliser=100"):
        with pytest.raises(ConfigError, match="does not go with"):
            load_recipe(None, (override,))


def test_a_target_without_a_coefficient_to_begin_with_is_refused():
    with pytest.raises(ConfigError, match=r"set algorithm\.kl\.coefficient"):
        load_recipe(None, ("algorithm.kl={target=0.1}",))


def test_a_kl_is_a_number_or_a_table_and_reads_back(tmp_path):
    number = load_recipe(None, ("algorithm.kl=0.02",))
    assert number.algorithm.kl.coefficient == 0.02
    table = load_recipe(None, ("algorithm.kl={coefficient=0.02, estimator='k2', target=0.1}",))
    file = tmp_path / "again.toml"
    file.write_text(table.to_toml(), encoding="utf-8")
    assert load_recipe(file) == table
    assert table != number
