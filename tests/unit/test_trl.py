"""The common losses and advantages beside TRL's own, number by number: where trl is installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_policy import make_group, tiny_policy, tiny_tokenizer

from querl.algorithm.credit import make_credit
from querl.algorithm.loss import make_loss
from querl.algorithm.loss.correction import Correction
from querl.algorithm.loss.kl import KlPenalty
from querl.algorithm.loss.objective import Objective
from querl.algorithm.loss.reduction import Reduction
from querl.algorithm.pack import Segment, make_row

with warnings.catch_warnings():  # theirs, on being imported
    warnings.simplefilter("ignore")
    pytest.importorskip("trl", reason="pip install querl[trl]")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (6, 4, 5, 2)
LONGEST = 8
TOKEN_MEAN, SEQUENCE_MEAN = Reduction(), Reduction(name="sequence_mean")
CONSTANT = Reduction(name="constant", normaliser=len(LENGTHS) * LONGEST)
CLIP = {"low": 0.2, "high": 0.28}
KL = KlPenalty(coefficient=0.3, estimator="k3")


@dataclass(frozen=True, kw_only=True)
class Policies:
    """Log-probs of the samples' tokens under four policies, entropies, and advantages."""

    new: list[torch.Tensor]
    old: list[torch.Tensor]
    ref: list[torch.Tensor]
    sampled: list[torch.Tensor]
    entropies: list[torch.Tensor]
    advantages: torch.Tensor
    trained: list[torch.Tensor]  # 0 where a tool or the database spoke


@pytest.fixture(scope="module", params=["whole", "with holes"])
def policies(request) -> Policies:
    torch.manual_seed(0)
    trained = [torch.ones(length, dtype=torch.long) for length in LENGTHS]
    if request.param == "with holes":
        trained[0][2:4] = trained[2][1] = 0
    old = [-3 * torch.rand(length) for length in LENGTHS]

    def near(spread: float) -> list[torch.Tensor]:
        return [values + spread * torch.randn_like(values) for values in old]

    return Policies(
        new=near(0.4),
        old=old,
        ref=near(0.3),
        sampled=near(0.5),
        entropies=[torch.rand(length) for length in LENGTHS],
        advantages=torch.tensor([1.2, -0.7, 0.4, -0.9]),
        trained=trained,
    )


def made(kind, settings, tmp_path_factory):
    """A trainer of theirs on a model of ours, whose forward pass gives the numbers it is told."""

    class Told(kind):
        told: tuple[torch.Tensor, torch.Tensor]

        def _get_per_token_logps_and_entropies(self, *_, **__):
            return (*self.told, None)

    return Told(
        model=tiny_policy(),
        processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=LONGEST,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["SELECT"]}),
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return made(GRPOTrainer, GRPOConfig, tmp_path_factory)


@pytest.fixture(scope="module")
def leave_one_out(tmp_path_factory):
    return made(RLOOTrainer, partial(RLOOConfig, beta=0.0), tmp_path_factory)


def padded(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


@contextmanager
def changed(trainer, **attributes) -> Iterator[None]:
    """While it is open their trainer, or its settings, are so."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in attributes.items():
            owner = trainer if hasattr(trainer, name) else trainer.args
            patch.setattr(owner, name, value)
        trainer.model.eval()
        yield


def scored(trainer, policies: Policies) -> dict[str, torch.Tensor]:
    """What their trainer makes of finished completions, before the loss."""
    num_samples = len(LENGTHS)
    generated = (
        [[1]] * num_samples,
        [[2] * length for length in LENGTHS],
        [mask.tolist() for mask in policies.trained],
        [""] * num_samples,
        [values.tolist() for values in policies.sampled],
        {},
        None,
        None,
    )
    trainer.told = (padded(policies.old), padded(policies.entropies))
    with changed(trainer, _generate=lambda prompts: generated):
        inputs = trainer._generate_and_score_completions([{"prompt": "SELECT"}] * num_samples)
    return inputs | {
        "advantages": policies.advantages,
        "old_per_token_logps": padded(policies.old),
        "ref_per_token_logps": padded(policies.ref),
        "num_items_in_batch": padded(policies.trained).sum(),
    }


def theirs(trainer, policies: Policies, **attributes) -> tuple[float, torch.Tensor]:
    """Their loss and its slope at each token of the completions."""
    new = padded(policies.new).requires_grad_()
    with changed(trainer, **{"beta": 0.0} | attributes):
        with changed(trainer, beta=0.0):  # the reference is told
            inputs = scored(trainer, policies)
        trainer.told = (new, padded(policies.entropies))
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    is_there = padded([torch.ones(length) for length in LENGTHS]).bool()
    return loss.item(), new.grad[is_there]


def ours(objective: Objective, policies: Policies) -> tuple[float, torch.Tensor]:
    count = sum(LENGTHS)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    row = make_row(
        np.arange(count),
        torch.cat(policies.trained).bool().numpy(),
        [Segment(int(start), length) for start, length in zip(starts, LENGTHS, strict=True)],
        sampled_logprobs_T=torch.cat(policies.sampled).numpy(),
        advantages_T=policies.advantages.repeat_interleave(torch.tensor(LENGTHS)).numpy(),
        members=tuple(range(len(LENGTHS))),
    )
    row = replace(
        row, old_logprobs_T=torch.cat(policies.old), ref_logprobs_T=torch.cat(policies.ref)
    )
    (row,) = objective.prepare([row])
    settled = objective.settle(row, objective.kl.coefficient)
    found = objective.differentiate(
        torch.cat(policies.new),
        torch.cat(policies.entropies),
        settled,
        objective.reduction.divisor([row]),
        objective.kl.coefficient,
    )
    return found.value.item(), found.by_logprob_T


def objective(name: str, settings, reduction: Reduction, **more) -> Objective:
    plain = {"correction": Correction(kind="none")} | more
    return Objective(loss=make_loss(name, **settings), reduction=reduction, **plain)


BOUNDS = {"epsilon_low": 0.2, "epsilon_high": 0.28}
CORRECTIONS = {
    "token_truncate": Correction(kind="cap", high=1.5),
    "sequence_truncate": Correction(kind="cap", level="sequence", high=1.5),
    "token_mask": Correction(kind="mask", low=0.7, high=1.5),
    "sequence_mask": Correction(kind="mask", level="sequence", low=0.7, high=1.5),
}


def sampling(mode: str) -> dict[str, object]:
    """Their names for one of the corrections."""
    correction = CORRECTIONS[mode]
    return {
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": correction.low,
        "vllm_importance_sampling_clip_max": correction.high,
    }


CASES = {
    "grpo": (objective("clip", CLIP, SEQUENCE_MEAN), {"loss_type": "grpo", **BOUNDS}),
    "bnpo": (objective("clip", CLIP, TOKEN_MEAN), {"loss_type": "bnpo", **BOUNDS}),
    "dapo": (objective("clip", CLIP, TOKEN_MEAN), {"loss_type": "dapo", **BOUNDS}),
    "dr_grpo": (objective("clip", CLIP, CONSTANT), {"loss_type": "dr_grpo", **BOUNDS}),
    "two-sided": (
        objective("clip", {**CLIP, "dual": 1.3}, TOKEN_MEAN),
        {"loss_type": "bnpo", "delta": 1.3, **BOUNDS},
    ),
    "gspo": (
        objective("gspo", {"low": 0.1, "high": 0.12}, SEQUENCE_MEAN),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.1,
            "epsilon_high": 0.12,
        },
    ),
    "cispo": (
        objective("cispo", {"cap": 1.2}, TOKEN_MEAN),
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ),
    "sapo": (
        objective("sapo", {"up": 1.0, "down": 1.05}, SEQUENCE_MEAN),
        {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    ),
    "kl": (
        objective("clip", CLIP, SEQUENCE_MEAN, kl=KL),
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False, **BOUNDS},
    ),
    "entropy": (
        objective("clip", CLIP, TOKEN_MEAN, entropy=0.2),
        {"loss_type": "bnpo", "_entropy_bonus_enabled": True, "entropy_coef": 0.2, **BOUNDS},
    ),
} | {
    f"importance sampling, {mode}": (
        objective("clip", CLIP, TOKEN_MEAN, correction=correction),
        {"loss_type": "bnpo", **BOUNDS, **sampling(mode)},
    )
    for mode, correction in CORRECTIONS.items()
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_trls(trainer, policies, name):
    mine, attributes = CASES[name]
    value, slopes = ours(mine, policies)
    their_value, their_slopes = theirs(trainer, policies, **attributes)
    assert value == pytest.approx(their_value, rel=1e-5)
    torch.testing.assert_close(slopes, their_slopes, rtol=1e-4, atol=1e-7)
    assert slopes.abs().sum() > 0


def test_a_corrected_divergence_has_the_corrections_weight_here_and_none_there(trainer, policies):
    attributes = {"loss_type": "bnpo", "use_bias_correction_kl": False, **BOUNDS}
    correction = CORRECTIONS["token_truncate"]

    def of_kl(slopes_of, *cases) -> torch.Tensor:
        with_kl, without = (slopes_of(case)[1] for case in cases)
        return with_kl - without

    mine = of_kl(
        lambda kl: ours(
            objective("clip", CLIP, TOKEN_MEAN, correction=correction, kl=kl), policies
        ),
        KL,
        KlPenalty(),
    )
    their = of_kl(
        lambda beta: theirs(
            trainer, policies, **attributes, **sampling("token_truncate"), beta=beta
        ),
        KL.coefficient,
        0.0,
    )
    ratios_T = (torch.cat(policies.old) - torch.cat(policies.sampled)).exp()
    torch.testing.assert_close(mine, their * ratios_T.clamp(max=1.5), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(mine, their, rtol=1e-2)


REWARDS = torch.tensor([(1.0, 0.0, 0.25, 1.0), (0.0, 0.0, 1.0, 0.0), (0.5, 0.5, 0.5, 0.5)])


def their_advantages(trainer, *generated, **attributes) -> torch.Tensor:
    """[P, G] of ``REWARDS``; ``generated`` is what every completion comes with."""
    trainer.told = (torch.zeros(REWARDS.numel(), 1),) * 2
    attributes |= {
        "_generate": lambda prompts: generated,
        "_calculate_rewards": lambda *_: REWARDS.reshape(-1, 1),
    }
    with changed(trainer, **attributes):
        inputs = [{"prompt": "SELECT"}] * REWARDS.numel()
        return trainer._generate_and_score_completions(inputs)["advantages"].view_as(REWARDS)


def our_advantages(name: str) -> torch.Tensor:
    """[P, G] of ``REWARDS``."""
    groups = [make_group(tuple(row.tolist()), id=n) for n, row in enumerate(REWARDS)]
    return torch.tensor([[turns[0] for turns in group] for group in make_credit(name)(groups)])


@pytest.mark.parametrize(
    ("name", "scale"), [("dr_grpo", "none"), ("grpo", "group"), ("grpo_batch_std", "batch")]
)
def test_advantages_are_trls_but_for_the_kind_of_deviation(trainer, name, scale):
    num = REWARDS.numel()
    generated = ([[1]] * num, [[2]] * num, None, [""] * num, None, {}, None, None)
    found = their_advantages(trainer, *generated, scale_rewards=scale)
    over = {"none": None, "group": 1, "batch": (0, 1)}[scale]
    if over is not None:  # theirs is the sample's, and 1e-4 more
        found = found * (REWARDS.std(over, keepdim=True) + 1e-4)
        found = found / REWARDS.std(over, keepdim=True, correction=0).clamp(min=1e-9)
    torch.testing.assert_close(our_advantages(name), found)


def test_rloos_advantages_are_trls(leave_one_out):
    num = REWARDS.numel()
    found = their_advantages(leave_one_out, [[1]] * num, [[2]] * num, [""] * num)
    torch.testing.assert_close(our_advantages("rloo"), found)
