"""Each loss beside the clip, and what is weighed and charged, against its formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from querl.algorithm.logprobs import selected_logprobs
from querl.algorithm.loss import LOSSES, ONLY_ADVANTAGES, Marking, make_loss
from querl.algorithm.loss.base import total
from querl.algorithm.loss.correction import Correction
from querl.algorithm.loss.covariance import covariances
from querl.algorithm.loss.kl import KlPenalty, estimate_kl
from querl.algorithm.loss.objective import Objective
from querl.algorithm.loss.reduction import Reduction
from querl.algorithm.pack import Segment, make_row

LENGTHS = (3, 6, 1)
KS = ("k1", "k2", "k3")


def row_of(lengths=LENGTHS, *, seed=0, mask=None):
    """Samples of these lengths with new, old, sampled and reference log-probs that all differ."""
    dice = np.random.default_rng(seed)
    count = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    row = make_row(
        np.arange(count),
        np.ones(count, bool) if mask is None else np.array(mask),
        [Segment(int(s), n) for s, n in zip(starts, lengths, strict=True)],
        sampled_logprobs_T=dice.uniform(-3, -1, count).astype(np.float32),
        advantages_T=dice.normal(size=count).astype(np.float32),
        members=tuple(range(len(lengths))),
    )
    old_T = row.sampled_logprobs_T + torch.tensor(dice.normal(0, 0.3, count)).float()
    ref_T = old_T + torch.tensor(dice.normal(0, 0.3, count)).float()
    new_T = old_T + torch.tensor(dice.normal(0, 0.4, count)).float()
    return replace(row, old_logprobs_T=old_T, ref_logprobs_T=ref_T), new_T


def value_and_slopes(loss, new_T, row, normaliser=1.0):
    leaf_T = new_T.clone().requires_grad_()
    value = loss(leaf_T, row, normaliser)
    (slopes_T,) = torch.autograd.grad(value, leaf_T)
    return value.item(), slopes_T


@pytest.mark.parametrize("bound", [0.05, 0.9])
def test_gspo_holds_a_sample_by_the_geometric_mean_of_its_ratios(bound):
    row, new_T = row_of()
    advantages = torch.tensor([1.0, -1.0, 0.5])
    row = replace(row, advantages_T=advantages.repeat_interleave(torch.tensor(LENGTHS)))
    row = Reduction(name="sequence_mean").weigh(row)
    value, slopes_T = value_and_slopes(make_loss("gspo", low=bound, high=bound), new_T, row, 3)
    expected, first = [], 0
    for number, length in enumerate(LENGTHS):
        part = slice(first, first + length)
        log_ratio = (new_T[part] - row.old_logprobs_T[part]).double()
        ratio, advantage = log_ratio.mean().exp().item(), advantages[number].item()
        held = min(max(ratio, 1 - bound), 1 + bound)
        expected.append(min(ratio * advantage, held * advantage))
        is_cut = held * advantage < ratio * advantage
        slope = 0.0 if is_cut else -ratio * advantage / length / 3
        assert slopes_T[part].tolist() == pytest.approx([slope] * length, rel=1e-5)
        first += length
    assert value == pytest.approx(-sum(expected) / 3, rel=1e-5)


def test_cispo_caps_the_weight_and_keeps_every_gradient():
    row, new_T = row_of()
    _, slopes_T = value_and_slopes(make_loss("cispo", cap=1.1), new_T, row)
    ratio_T = (new_T - row.old_logprobs_T).exp()
    torch.testing.assert_close(slopes_T, -ratio_T.clamp(max=1.1) * row.advantages_T)


def test_sapo_closes_a_gate_on_both_sides_of_one():
    row, new_T = row_of()
    value, slopes_T = value_and_slopes(make_loss("sapo", up=2.0, down=3.0), new_T, row)
    ratio_T = (new_T - row.old_logprobs_T).exp()
    tau_T = torch.where(row.advantages_T > 0, 2.0, 3.0)
    gate_T = torch.sigmoid(tau_T * (ratio_T - 1))
    expected = -(4 / tau_T * gate_T * row.advantages_T).sum().item()
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        slopes_T, -4 * gate_T * (1 - gate_T) * ratio_T * row.advantages_T, rtol=1e-4, atol=1e-6
    )


def test_policy_gradient_knows_no_ratio():
    row, new_T = row_of()
    _, slopes_T = value_and_slopes(make_loss("policy_gradient"), new_T, row, 4.0)
    torch.testing.assert_close(slopes_T, -row.advantages_T / 4)


def test_a_covariance_is_the_product_of_two_distances_from_a_mean():
    row, _ = row_of((5,), mask=[True, True, False, True, True])
    row = replace(
        row,
        old_logprobs_T=torch.tensor([-1.0, -2.0, 50.0, -3.0, -6.0]),  # mean -3, where trained
        advantages_T=torch.tensor([3.0, 1.0, 90.0, 1.0, -1.0]),  # mean 1
    )
    assert covariances([row]).tolist() == [2 * 2, 0, 0, -3 * -2]
    (marked,) = make_loss("clip_cov", share=1, least=4, most=6).mark([row])
    assert marked.marked_T.tolist() == [True, False, False, False, True], "both bounds are within"


def test_kl_cov_holds_the_tokens_of_greatest_covariance_to_the_old_policy():
    row, new_T = row_of()
    loss = make_loss("kl_cov", share=0.2, penalty=0.5)
    (marked,) = loss.mark([row])
    chosen = covariances([row]).topk(2).indices
    assert sorted(marked.marked_T.nonzero()[:, 0].tolist()) == sorted(chosen.tolist())
    _, slopes_T = value_and_slopes(loss, new_T, marked)
    log_ratio_T = new_T - row.old_logprobs_T
    expected_T = -log_ratio_T.exp() * row.advantages_T
    expected_T[chosen] += 0.5 * log_ratio_T[chosen].sign()
    torch.testing.assert_close(slopes_T, expected_T)


def test_clip_cov_cuts_some_tokens_of_high_covariance_and_counts_them():
    row, new_T = row_of((40,))
    loss = make_loss("clip_cov", share=0.1, least=0.2, most=5.0, low=9.0, high=9.0)
    (marked,) = loss.mark([row])
    assert marked.marked_T.sum() == 4
    assert (covariances([row])[marked.marked_T] >= 0.2).all()
    value, slopes_T = value_and_slopes(loss, new_T, marked)
    plain = make_loss("clip", low=9.0, high=9.0)
    whole, whole_slopes_T = value_and_slopes(plain, new_T, row)
    assert value == pytest.approx(whole)
    torch.testing.assert_close(slopes_T, whole_slopes_T.where(~marked.marked_T, 0))


@pytest.mark.parametrize("name", ["kl_cov", "clip_cov"])
def test_the_same_tokens_are_marked_however_a_minibatch_is_cut(name):
    parts = [row_of((40,), seed=seed)[0] for seed in (1, 2, 3)]
    loss = make_loss(name, share=0.1, **({"least": 0.1} if name == "clip_cov" else {}))
    assert isinstance(loss, Marking)
    marked = torch.cat([row.marked_T for row in loss.mark(parts)])
    joined = {
        "loss_mask_T": torch.cat([row.loss_mask_T for row in parts]),
        "old_logprobs_T": torch.cat([row.old_logprobs_T for row in parts]),
        "advantages_T": torch.cat([row.advantages_T for row in parts]),
    }
    (whole,) = loss.mark([replace(parts[0], **joined)])
    assert marked.sum() == 12
    assert torch.equal(whole.marked_T, marked)


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_first_inner_step_every_loss_has_the_same_gradient(name):
    row, _ = row_of(LENGTHS)
    by_sample = torch.tensor([1.0, -1.0, 0.5]).repeat_interleave(torch.tensor(LENGTHS))
    row = replace(row, advantages_T=by_sample)
    _, slopes_T = value_and_slopes(make_loss(name), row.old_logprobs_T, row)
    torch.testing.assert_close(slopes_T, -by_sample)


@pytest.mark.parametrize("name", LOSSES)
def test_untrained_tokens_have_no_gradient_whatever_they_hold(name):
    mask = [True, False, True, True, True, False, True, True, True, True]
    row, new_T = row_of(mask=mask)
    row = Reduction(name="sequence_mean").weigh(row)
    strange_T = torch.full_like(row.old_logprobs_T, -1e9).where(
        ~row.loss_mask_T, row.old_logprobs_T
    )
    _, slopes_T = value_and_slopes(make_loss(name), new_T, replace(row, old_logprobs_T=strange_T))
    assert slopes_T.isfinite().all()
    assert (slopes_T[~row.loss_mask_T] == 0).all()
    _, expected_T = value_and_slopes(make_loss(name), new_T, row)
    assert torch.equal(slopes_T, expected_T)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_knows_advantages_alone_is_still_where_they_are_zero(name):
    row, new_T = row_of()
    row = replace(row, advantages_T=torch.zeros_like(new_T))
    marked = make_loss(name).mark([row])[0] if name.endswith("_cov") else row
    _, slopes_T = value_and_slopes(make_loss(name), new_T, marked)
    assert (not slopes_T.any()) == (name in ONLY_ADVANTAGES)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_weighs_its_tokens(name):
    row, new_T = row_of()
    weights_T = torch.linspace(0, 2, len(new_T))
    _, plain_T = value_and_slopes(make_loss(name), new_T, row)
    _, slopes_T = value_and_slopes(make_loss(name), new_T, replace(row, weights_T=weights_T))
    torch.testing.assert_close(slopes_T, plain_T * weights_T)


def test_a_correction_caps_or_masks_old_over_sampled():
    row, _ = row_of((4,))
    sampled_T = row.old_logprobs_T - torch.tensor([0.1, 3.0, -3.0, 0.0])
    row = replace(row, sampled_logprobs_T=sampled_T)
    e = np.exp
    cap = Correction(kind="cap", high=2.0).apply(row).weights_T
    assert cap.tolist() == pytest.approx([e(0.1), 2, e(-3), 1], rel=1e-4)
    mask = Correction(kind="mask", low=0.5, high=2.0).apply(row).weights_T
    assert mask.tolist() == pytest.approx([e(0.1), 0, 0, 1], rel=1e-4)
    assert Correction(kind="none").apply(row) is row


def test_a_correction_by_sample_takes_the_product_of_its_trained_tokens():
    row, _ = row_of((3, 2), mask=[True, False, True, True, True])
    sampled_T = row.old_logprobs_T - torch.tensor([1.0, 9.0, -0.5, 3.0, 0.0])
    row = replace(row, sampled_logprobs_T=sampled_T)
    trained = row.loss_mask_T
    cap = Correction(kind="cap", level="sequence", high=4.0).apply(row).weights_T[trained]
    assert cap.tolist() == pytest.approx([np.exp(0.5)] * 2 + [4, 4], rel=1e-4)
    mask = Correction(kind="mask", level="sequence", high=4.0).apply(row).weights_T[trained]
    assert mask.tolist() == pytest.approx([np.exp(0.5)] * 2 + [0, 0], rel=1e-4)


def test_reductions_divide_by_tokens_by_a_constant_or_by_samples():
    row, new_T = row_of()
    ones_T = torch.ones_like(new_T)
    squares_T = new_T.square()
    for reduction, expected in (
        (Reduction(), squares_T.mean()),
        (Reduction(name="constant", normaliser=7.0), squares_T.sum() / 7),
        (
            Reduction(name="sequence_mean"),
            sum(part.mean() for part in squares_T.split(LENGTHS)) / len(LENGTHS),
        ),
    ):
        weighed = reduction.weigh(row)
        found = total(squares_T, weighed, reduction.divisor([row]))
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        if reduction.name != "constant":
            assert total(ones_T, weighed, reduction.divisor([row])).item() == pytest.approx(1)


def test_kl_estimates_are_unbiased_but_for_k2_and_their_gradients_are_not():
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    logits = policy.log().requires_grad_()

    def of(first, second):
        return (first * (first.log() - second.log())).sum()

    def slope(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    logprobs = logits.log_softmax(0)
    divergence = of(policy, reference)
    means = {k: (policy * estimate_kl(k, policy.log(), reference.log())).sum() for k in KS}
    assert means["k1"].item() == pytest.approx(divergence.item())
    assert means["k3"].item() == pytest.approx(divergence.item())
    assert means["k2"].item() != pytest.approx(divergence.item(), rel=1e-3)
    # the mean over samples of the policy: what is drawn is not differentiated
    slopes = {k: slope((policy * estimate_kl(k, logprobs, reference.log())).sum()) for k in KS}
    wanted = slope(of(logprobs.exp(), reference))
    reverse = slope(-(reference * logprobs).sum())
    torch.testing.assert_close(slopes["k2"], wanted)
    torch.testing.assert_close(slopes["k3"], reverse)
    torch.testing.assert_close(slopes["k1"], torch.zeros_like(wanted))


def test_k1_in_the_reward_is_k2_in_the_loss_where_the_ratio_is_one():
    row, _ = row_of()
    new_T = row.old_logprobs_T
    found = {}
    for place, estimator in (("reward", "k1"), ("loss", "k2")):
        objective = Objective(kl=KlPenalty(coefficient=0.3, estimator=estimator, place=place))
        settled = objective.settle(row, 0.3)
        found[place] = objective.differentiate(new_T, new_T, settled, 5.0, 0.3)
    torch.testing.assert_close(found["reward"].by_logprob_T, found["loss"].by_logprob_T)
    assert not torch.equal(found["loss"].by_loss_T, found["loss"].by_logprob_T)


def test_a_coefficient_follows_its_target_by_a_fiftieth_at_most():
    penalty = KlPenalty(coefficient=1.0, target=0.1)
    assert penalty.adapted(1.0, 0.11) == pytest.approx(1.01)
    assert penalty.adapted(2.0, 5.0) == pytest.approx(2.04)
    assert penalty.adapted(2.0, 0.0) == pytest.approx(1.96)
    assert KlPenalty(coefficient=1.0).adapted(1.0, 5.0) == 1.0


def test_an_entropy_bonus_lowers_the_objective_and_slopes_by_entropy_alone():
    row, new_T = row_of()
    entropies_T = torch.linspace(0.1, 1, len(new_T))
    plain = Objective().differentiate(new_T, entropies_T, row, 5.0, 0.0)
    found = Objective(entropy=0.2).differentiate(new_T, entropies_T, row, 5.0, 0.0)
    assert plain.by_entropy_T is None
    assert found.value.item() == pytest.approx((plain.value - 0.2 * entropies_T.sum() / 5).item())
    torch.testing.assert_close(found.by_entropy_T, torch.full_like(new_T, -0.2 / 5))
    assert torch.equal(found.by_logprob_T, plain.by_logprob_T)


@pytest.mark.parametrize("weigh_logprobs", [True, False], ids=["both", "entropies alone"])
def test_entropies_carry_the_gradient_of_the_full_softmax(weigh_logprobs):
    torch.manual_seed(0)
    hidden = torch.randn(700, 16, requires_grad=True)
    head = torch.randn(70, 16, requires_grad=True)
    targets = torch.randint(0, 70, (700,))
    by_logprob, by_entropy = torch.randn(2, 700)
    by_logprob = by_logprob * weigh_logprobs

    logprobs, entropies = selected_logprobs(
        hidden, head, targets, temperature=0.7, chunk_elements=1
    )
    value = (entropies * by_entropy).sum()
    if weigh_logprobs:
        value = value + (logprobs * by_logprob).sum()
    found = torch.autograd.grad(value, (hidden, head))
    full = ((hidden @ head.T) / 0.7).log_softmax(-1)
    chosen = full.gather(-1, targets[:, None])[:, 0]
    plain = (-(full.exp() * full).sum(-1) * by_entropy + chosen * by_logprob).sum()
    for mine, theirs in zip(found, torch.autograd.grad(plain, (hidden, head)), strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-5
