from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from querl.algorithm.logprobs import selected_logprobs
from querl.algorithm.loss import ClipLoss, make_loss
from querl.algorithm.pack import Segment, make_row
from querl.errors import ConfigError


@dataclass(frozen=True)
class SquareLoss:
    scale: float = 1.0

    def __call__(self, logprobs_T, batch, normaliser):
        return self.scale * (logprobs_T**2).sum() / normaliser


def make_batch(advantages, *, old, sampled=None, mask=None):
    count = len(advantages)
    row = make_row(
        np.arange(count),
        np.array(mask or [True] * count),
        [Segment(0, count)],
        sampled_logprobs_T=np.array(old if sampled is None else sampled, np.float32),
        advantages_T=np.array(advantages, np.float32),
    )
    return replace(row, old_logprobs_T=torch.tensor(old))


def loss_and_gradient(loss, logprobs, batch, normaliser=1.0):
    logprobs_T = torch.tensor(logprobs, requires_grad=True)
    value = loss(logprobs_T, batch, normaliser)
    value.backward()
    return value.item(), logprobs_T.grad.tolist()


def test_where_new_is_old_the_gradient_is_the_advantage():
    batch = make_batch([2.0, -1.0], old=[-1.0, -3.0])
    value, gradient = loss_and_gradient(ClipLoss(), [-1.0, -3.0], batch, normaliser=4)
    assert value == pytest.approx(-(2 - 1) / 4)
    assert gradient == pytest.approx([-2 / 4, 1 / 4])


def test_the_ratio_is_clipped_above_for_good_tokens_and_below_for_bad_ones():
    log = np.log
    batch = make_batch([1.0, 1.0, -1.0, -1.0], old=[0.0] * 4)
    new = [log(1.5), log(0.5), log(1.5), log(0.5)]
    value, gradient = loss_and_gradient(ClipLoss(low=0.2, high=0.28), new, batch)
    assert value == pytest.approx(-(1.28 + 0.5 - 1.5 - 0.8))
    assert gradient == pytest.approx([0, -0.5, 1.5, 0])


def test_dual_clip_bounds_the_loss_of_bad_tokens_that_became_likely():
    batch = make_batch([-2.0, -2.0, 2.0], old=[0.0] * 3)
    new = [np.log(5.0), np.log(2.0), np.log(5.0)]
    value, gradient = loss_and_gradient(ClipLoss(high=0.2, dual=3.0), new, batch)
    assert value == pytest.approx(3 * 2 + 2 * 2 - 1.2 * 2)
    assert gradient == pytest.approx([0, 4, 0])


def test_untrained_tokens_count_for_nothing_whatever_they_hold():
    batch = make_batch([7.0, 1.0], old=[-9.0, 0.0], sampled=[-1.0, 0.0], mask=[False, True])
    value, gradient = loss_and_gradient(ClipLoss(), [0.0, 0.0], batch)
    assert value == -1
    assert gradient == [0, -1]


def test_a_loss_is_made_by_name_with_its_settings():
    assert make_loss("clip", low=0.1, dual=3) == ClipLoss(low=0.1, dual=3.0)
    assert make_loss(f"{__name__}:SquareLoss", scale=3.0) == SquareLoss(3.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip", {"low": 0, "high": 0, "dual": 1.01}),
        ("cispo", {"cap": 0.1}),
        ("sapo", {"up": 0.1, "down": 0.1}),
        ("clip_cov", {"share": 1}),
        ("kl_cov", {"penalty": 0}),
    ],
)
def test_a_setting_may_be_as_strange_as_its_bounds_allow(name, settings):
    assert {key: getattr(make_loss(name, **settings), key) for key in settings} == settings


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("clop", {}, "unknown loss 'clop': use clip"),
        ("clip", {"hihg": 0.3}, "unexpected keyword argument 'hihg'"),
        ("clip", {"low": "wide"}, r"algorithm\.loss\.low = 'wide' is no float"),
        ("clip", {"dual": [2.0]}, r"algorithm\.loss\.dual = \[2\.0\] is no float"),
        ("clip", {"high": -0.1}, r"high = -0\.1 .* greater than or equal to 0"),
        ("clip", {"dual": 0.5}, r"dual = 0\.5 .* greater than 1"),
        ("gspo", {"low": -1}, r"low = -1 .* greater than or equal to 0"),
        ("cispo", {"cap": 0}, r"cap = 0 .* greater than 0"),
        ("sapo", {"up": 0}, r"algorithm\.loss\.up = 0 is no float"),
        ("clip_cov", {"share": 0}, r"share = 0 .* greater than 0"),
        ("kl_cov", {"share": 1.1}, r"share = 1\.1 .* less than or equal to 1"),
        ("kl_cov", {"penalty": -1}, r"penalty = -1 .* greater than or equal to 0"),
        (f"{__name__}:SquareLoss", {"scale": {}}, r"algorithm\.loss\.scale = {} is no float"),
    ],
)
def test_a_loss_that_cannot_be_made_is_named(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_loss(name, **settings)


@pytest.mark.parametrize("chunk_elements", [1, 10**9], ids=["chunks of 512", "one chunk"])
def test_chunked_logprobs_equal_the_full_softmax(chunk_elements):
    torch.manual_seed(0)
    hidden = torch.randn(1300, 16, requires_grad=True)
    head = torch.randn(70, 16, requires_grad=True)
    targets = torch.randint(0, 70, (1300,))
    weights = torch.randn(1300)
    logprobs, entropies = selected_logprobs(
        hidden, head, targets, temperature=0.7, chunk_elements=chunk_elements
    )
    found = torch.autograd.grad((logprobs * weights).sum(), (hidden, head))

    full = ((hidden @ head.T) / 0.7).log_softmax(-1)
    chosen = full.gather(-1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((chosen * weights).sum(), (hidden, head))
    torch.testing.assert_close(logprobs, chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, -(full.exp() * full).sum(-1), rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-5


def test_a_frozen_head_gets_no_gradient_and_leaves_that_below_it_as_it_is():
    torch.manual_seed(0)
    hidden = torch.randn(600, 16, requires_grad=True)
    head, targets = torch.randn(70, 16, requires_grad=True), torch.randint(0, 70, (600,))
    made: list[tuple[int, ...]] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            made.append(tuple(getattr(found, "shape", ())))
            return found

    def gradient(head):
        logprobs, entropies = selected_logprobs(hidden, head, targets)
        made.clear()
        with Sizes():
            (found,) = torch.autograd.grad((logprobs + 0.1 * entropies).sum(), hidden)
        return found, tuple(head.shape) in made

    expected, makes_one = gradient(head)
    assert makes_one
    found, makes_one = gradient(head.detach())
    assert not makes_one
    assert torch.equal(found, expected)
