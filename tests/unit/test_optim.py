from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from querl.errors import CheckpointError, ConfigError
from querl.trainer.optim import AdamW, AdamWSettings, learning_rate
from querl.trainer.optim.rounding import round_stochastically
from querl.trainer.optim.scale import FIRST, GROW_AFTER, SHRINK, LossScale

KINDS = {
    "adamw": {},
    "adamw8bit": {"kind": "adamw8bit"},
    "stochastic": {"masters": "stochastic"},
    "offload": {"offload": True},
    "all": {"kind": "adamw8bit", "masters": "stochastic", "offload": True},
}


@pytest.fixture(params=KINDS)
def kind(request) -> dict:
    if "8bit" in str(KINDS[request.param]):
        pytest.importorskip("bitsandbytes")
    return KINDS[request.param]


def linear(dtype=torch.float32, seed=0, size=(4, 3)) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(*size).to(dtype)


def give_gradient(module, optimizer, scale=1.0):
    with optimizer.gathering():
        for weight in module.parameters():
            (weight * scale).sum().backward()


def rates(**settings) -> list[float]:
    return [learning_rate(AdamWSettings(lr=1.0, **settings), step) for step in range(1, 7)]


def test_a_schedule_warms_up_then_holds_or_falls_to_zero():
    assert rates(warmup_steps=2) == pytest.approx([0.5, 1, 1, 1, 1, 1])
    linear_down = rates(schedule="linear", warmup_steps=2, num_steps=6)
    assert linear_down == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    cosine = rates(schedule="cosine", num_steps=4)
    assert cosine == pytest.approx([1, 0.853553, 0.5, 0.146447, 0, 0], abs=1e-6)


def test_the_first_step_moves_every_weight_by_the_rate():
    module = linear()
    before = module.weight.detach().clone()
    optimizer = AdamW(module, AdamWSettings(lr=0.01))
    give_gradient(module, optimizer)
    report = optimizer.step(1)
    torch.testing.assert_close(module.weight, before - 0.01)
    assert report.grad_norm == pytest.approx(15**0.5)
    assert not report.was_skipped


def test_a_gradient_longer_than_the_bound_is_shortened():
    free, bound = linear(), linear()
    for module, max_norm in ((free, 1e9), (bound, 0.5)):
        optimizer = AdamW(module, AdamWSettings(lr=0.01, eps=1.0, max_grad_norm=max_norm))
        give_gradient(module, optimizer)
        optimizer.step(1)
    start = linear()
    assert (bound.weight - start.weight).abs().max() < (free.weight - start.weight).abs().max() / 2


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_gradient_changes_nothing_and_is_reported(broken):
    module = linear()
    before = module.weight.detach().clone()
    optimizer = AdamW(module, AdamWSettings(lr=0.01))
    give_gradient(module, optimizer, broken)
    assert optimizer.step(1).was_skipped
    assert torch.equal(module.weight, before)
    assert optimizer.state() == {}
    give_gradient(module, optimizer)
    assert not optimizer.step(2).was_skipped


def test_weight_decay_falls_on_matrices_only():
    module = linear()
    bias, weight = module.bias.detach().clone(), module.weight.detach().clone()
    optimizer = AdamW(module, AdamWSettings(lr=0.1, weight_decay=0.5))
    give_gradient(module, optimizer, 0.0)
    optimizer.step(1)
    assert torch.equal(module.bias, bias)
    torch.testing.assert_close(module.weight, weight * 0.95)


def test_bf16_weights_follow_a_float32_master():
    module, reference = linear(torch.bfloat16), linear(torch.bfloat16).float()
    optimizers = [AdamW(m, AdamWSettings(lr=1e-4)) for m in (module, reference)]
    for step in range(1, 31):
        for m, optimizer in zip((module, reference), optimizers, strict=True):
            give_gradient(m, optimizer)
            optimizer.step(step)
    # In bf16 alone a step of 1e-4 on a weight of about 0.3 would be rounded away every time.
    assert torch.equal(module.weight, reference.weight.bfloat16())
    assert not torch.equal(module.weight, linear(torch.bfloat16).weight)


def test_gradients_of_bf16_weights_add_up_in_float32():
    module = linear(torch.bfloat16)
    optimizer = AdamW(module, AdamWSettings(lr=1e-4))
    give_gradient(module, optimizer)
    for _ in range(256):
        give_gradient(module, optimizer, 2**-9)
    # each of the 256 additions would be rounded away in bf16
    assert optimizer.step(1).grad_norm == pytest.approx(1.5 * 15**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened(dtype, kind):
    module, other = linear(dtype, size=(80, 64)), linear(dtype, seed=5, size=(80, 64))
    settings = AdamWSettings(lr=0.01, anchor=0.1, **kind)
    optimizer, restored = AdamW(module, settings), AdamW(other, settings)
    for step in (1, 2):
        give_gradient(module, optimizer, step)
        optimizer.step(step)
    other.load_state_dict(module.state_dict())
    restored.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for m, o in ((module, optimizer), (other, restored)):
        give_gradient(m, o, 3)
        o.step(3)
    assert torch.equal(module.weight, other.weight)
    assert optimizer.state().keys() == restored.state().keys()
    for name, tensor in optimizer.state().items():
        assert torch.equal(tensor, restored.state()[name]), name


def noisy_steps(module, settings, count=60):
    """Follow a gradient with noise, the same for all optimizers."""
    optimizer = AdamW(module, settings)
    dice = torch.Generator().manual_seed(0)
    for step in range(1, count + 1):
        noise = torch.randn(module.weight.shape, generator=dice)
        with optimizer.gathering():
            (
                (module.weight.float() - 1) * (module.weight.float().detach() - 1 + noise)
            ).sum().backward()
        optimizer.step(step)
    return module.weight.detach().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_takes_the_same_steps_bit_for_bit(dtype):
    settings = AdamWSettings(lr=1e-3, weight_decay=0.1)
    beside = noisy_steps(linear(dtype), settings)
    assert torch.equal(noisy_steps(linear(dtype), replace(settings, offload=True)), beside)


def test_adamw_is_torchs():
    settings = AdamWSettings(lr=1e-2, weight_decay=0.1, max_grad_norm=1e9)
    module, theirs = linear(), linear()
    optimizer = AdamW(module, settings)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.weight], "weight_decay": 0.1},
            {"params": [theirs.bias], "weight_decay": 0},
        ],
        lr=1e-2,
        betas=settings.betas,
    )
    for step in range(1, 6):
        give_gradient(module, optimizer, step)
        optimizer.step(step)
        for weight in theirs.parameters():
            weight.grad = torch.full_like(weight, step)
        reference.step()
    torch.testing.assert_close(module.weight, theirs.weight)
    torch.testing.assert_close(module.bias, theirs.bias)


def test_moments_in_eight_bits_take_a_quarter_and_lead_about_the_same_way():
    pytest.importorskip("bitsandbytes")
    settings = AdamWSettings(lr=1e-2)
    size = (80, 64)
    exact = noisy_steps(linear(size=size), settings)
    module = linear(size=size)
    start = module.weight.detach().clone()
    found = noisy_steps(module, replace(settings, kind="adamw8bit"))
    assert (found - exact).norm() < 0.05 * (exact - start).norm()
    optimizer = AdamW(module, replace(settings, kind="adamw8bit"))
    give_gradient(module, optimizer)
    optimizer.step(1)
    state = optimizer.state()
    num_bytes = sum(t.nbytes for name, t in state.items() if name.endswith(".weight"))
    assert num_bytes == 2 * 80 * 64 + 2 * 4 * 20 + 8
    assert state["exp_avg.bias"].dtype == torch.float32


def test_steps_in_eight_bits_are_those_of_bitsandbytes_own_optimizer():
    theirs = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    settings = AdamWSettings(kind="adamw8bit", lr=1e-2, weight_decay=0.1, max_grad_norm=1e9)
    ours, other = linear(size=(80, 64)), linear(size=(80, 64))
    optimizer = AdamW(ours, settings)
    rates = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    reference = theirs([other.weight], **rates, weight_decay=settings.weight_decay)
    dice = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        gradient = torch.randn(other.weight.shape, generator=dice) * 10.0 ** -(step % 4)
        ours.weight.grad, other.weight.grad = gradient.clone(), gradient
        optimizer.step(step)
        reference.step()
        assert torch.equal(ours.weight, other.weight)


def test_rounding_at_random_is_right_on_average_and_a_function_of_the_seed():
    value = torch.tensor([1.0, 1 + 2**-9, -3.1, 1e-20, 0.0]).repeat(20_000, 1)
    rounded = round_stochastically(value, seed=1)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float().mean(0), value[0], rtol=1e-4, atol=0)
    assert (rounded[:, 0] == 1).all()
    assert set(rounded[:, 1].tolist()) == {1.0, 1 + 2**-7}
    assert torch.equal(rounded, round_stochastically(value, seed=1))
    assert not torch.equal(rounded, round_stochastically(value, seed=2))


def test_without_masters_small_steps_are_not_lost():
    settings = AdamWSettings(lr=1e-4, masters="stochastic")
    module = linear(torch.bfloat16, size=(64, 64))
    optimizer = AdamW(module, settings)
    before = module.weight.detach().float()
    for step in range(1, 31):
        give_gradient(module, optimizer)
        optimizer.step(step)
    moved = (module.weight.detach().float() - before).mean()
    assert moved == pytest.approx(-30e-4, rel=0.1)
    assert not any(name.startswith("master") for name in optimizer.state())


def test_the_inner_steps_of_a_batch_are_rounded_each_by_noise_of_its_own():
    module = linear(torch.bfloat16, size=(128, 128))
    torch.nn.init.constant_(module.weight, 1.5)
    optimizer = AdamW(module, AdamWSettings(lr=1e-3, masters="stochastic"))
    for _ in range(8):
        give_gradient(module, optimizer)
        optimizer.step(1)
    # by the same noise a weight would go down by all eight spacings, or stay
    spacing, share = 2**-7, 1e-3 * 2**7
    expected = spacing * (8 * share * (1 - share)) ** 0.5
    assert module.weight.float().std().item() == pytest.approx(expected, rel=0.05)


def test_fp16_needs_masters():
    with pytest.raises(ConfigError, match=r"rounds to bf16, and the model is in fp16"):
        AdamW(linear(torch.float16), AdamWSettings(masters="stochastic"))


def test_an_anchor_pulls_by_twice_its_weight_and_the_distance():
    module = linear()
    optimizer = AdamW(module, AdamWSettings(lr=0.0, anchor=0.5))
    with torch.no_grad():
        module.weight += 3.0
    give_gradient(module, optimizer, 0.0)
    assert optimizer.step(1).grad_norm == pytest.approx(3 * 12**0.5)
    optimizer = AdamW(module, AdamWSettings(lr=0.1, anchor=0.5))
    give_gradient(module, optimizer, 0.0)
    assert optimizer.step(1).grad_norm == 0


def test_fp16_gradients_are_scaled_back_and_an_overflow_is_skipped():
    module = linear(torch.float16)
    before = module.weight.detach().clone()
    optimizer = AdamW(module, AdamWSettings(lr=0.01))
    assert optimizer.loss_scale == FIRST
    give_gradient(module, optimizer, optimizer.loss_scale * 2)  # 131072 is beyond float16
    report = optimizer.step(1)
    assert report.was_skipped
    assert torch.equal(module.weight, before)
    assert optimizer.loss_scale == FIRST / SHRINK
    give_gradient(module, optimizer, optimizer.loss_scale * 2**-20)
    report = optimizer.step(2)
    assert not report.was_skipped
    assert report.loss_scale == FIRST / SHRINK
    assert report.grad_norm == pytest.approx(2**-20 * 15**0.5)
    torch.testing.assert_close(module.weight.float(), before.float() - 0.01, atol=5e-4, rtol=0)
    other = AdamW(linear(torch.float16), AdamWSettings())
    other.load_state(optimizer.state())
    assert other.loss_scale == FIRST / SHRINK


def test_the_scale_grows_after_a_long_time_and_never_falls_below_one():
    scale = LossScale()
    for _ in range(GROW_AFTER):
        scale.update(is_finite=True)
    assert scale.value == 2 * FIRST
    for _ in range(20):
        scale.update(is_finite=False)
    assert scale.value == 1


def test_gradients_of_halves_are_never_whole_in_their_own_dtype():
    model = torch.nn.Sequential(*(linear(torch.bfloat16, size=(8, 8)) for _ in range(4)))
    optimizer = AdamW(model, AdamWSettings())
    with optimizer.gathering():
        model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
        assert all(weight.grad is None for weight in model.parameters())
    model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_state_of_another_kind_is_refused():
    pytest.importorskip("bitsandbytes")
    module = linear(size=(80, 64))
    optimizer = AdamW(module, AdamWSettings())
    give_gradient(module, optimizer)
    optimizer.step(1)
    with pytest.raises(CheckpointError, match=r"another optimizer\.kind"):
        AdamW(module, AdamWSettings(kind="adamw8bit")).load_state(optimizer.state())


def test_the_state_of_another_model_is_refused():
    module = linear()
    optimizer = AdamW(module, AdamWSettings())
    give_gradient(module, optimizer)
    optimizer.step(1)
    other = AdamW(torch.nn.Linear(9, 3), AdamWSettings())
    with pytest.raises(CheckpointError, match="another shape"):
        other.load_state(optimizer.state())
