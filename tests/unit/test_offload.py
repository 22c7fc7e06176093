"""Tensors that leave their device and come back: here from one memory of the CPU to another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from tiny_policy import decoder, make_samples, tiny_policy, tiny_tokenizer

from querl.algorithm.loss import ClipLoss
from querl.algorithm.loss.kl import KlPenalty
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.offload import HostOffload, Movable, tensors_of
from querl.trainer.optim import AdamWSettings
from querl.trainer.reference import FrozenCopy

CPU = torch.device("cpu")


def places(model: torch.nn.Module) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in model.named_parameters()}


def test_everything_a_model_has_moves_and_is_the_same_when_it_is_back() -> None:
    model, offload = tiny_policy(), HostOffload(CPU)
    token_ids = torch.arange(8)[None]
    before, first = model(token_ids).logits, places(model)
    offload.sleep(tensors_of(model))
    asleep = places(model)
    offload.wake()
    assert all(first[name] != asleep[name] != places(model)[name] for name in first)
    assert model(token_ids).logits.equal(before)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_untied_ones_apart(tied: bool) -> None:
    model, offload = decoder("llama", tied=tied), HostOffload(CPU)

    def are_one() -> bool:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        return inputs.weight.data_ptr() == outputs.weight.data_ptr()

    offload.sleep(tensors_of(model))
    assert are_one() == tied
    offload.wake()
    assert are_one() == tied


def test_views_of_one_memory_stay_views_of_one() -> None:
    whole = torch.arange(12.0)
    rows = whole.view(3, 4)
    column = rows[:, 1]
    offload = HostOffload(CPU)
    offload.sleep([Movable(whole), Movable(column), Movable(rows)])
    offload.wake()
    whole[5] = -1
    assert rows[1, 1] == column[1] == -1
    assert column.tolist() == [1, -1, 9]


def test_what_never_changes_is_copied_once_and_what_may_each_time() -> None:
    frozen, trained = torch.zeros(4), torch.zeros(4)
    offload = HostOffload(CPU)
    for _ in range(2):
        offload.sleep([Movable(frozen, changes=False), Movable(trained)])
        offload.wake()
        frozen += 1  # which no update would do: it shows that the first copy came back
        trained += 1
    assert frozen.tolist() == [1] * 4
    assert trained.tolist() == [2] * 4


def test_moments_that_are_made_after_the_first_sleep_leave_with_the_second() -> None:
    early, late = torch.ones(3), torch.ones(5)
    offload = HostOffload(CPU)
    offload.sleep([Movable(early)])
    offload.wake()
    place = late.data_ptr()
    offload.sleep([Movable(early), Movable(late)])
    assert late.data_ptr() != place
    assert late.tolist() == [1] * 5


def test_tensors_elsewhere_stay() -> None:
    here = torch.ones(3)
    place = here.data_ptr()
    offload = HostOffload(torch.device("meta"))
    offload.sleep([Movable(here)])
    assert here.data_ptr() == place


def test_the_copy_of_the_first_policy_leaves_too() -> None:
    model = tiny_policy()
    reference = FrozenCopy(model)
    policy = FullLearner(
        model,
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(),
        update=UpdateSettings(kl=KlPenalty(coefficient=0.1)),
        reference=reference,
        offload=HostOffload(CPU),
    )
    before = places(reference.model)
    asyncio.run(policy.sleep())
    asleep = places(reference.model)
    assert not set(before.values()) & set(asleep.values())
    assert asyncio.run(policy.update(make_samples()))["policy/kl"] == 0


def test_an_adapters_base_is_frozen_and_the_adapter_is_not(tmp_path: Path) -> None:
    model = tiny_policy()
    add_adapter(model, LoraSettings(rank=4), base=tmp_path)
    weights = {id(weight): name for name, weight in model.named_parameters()}
    changing = {
        weights[id(movable.tensor)]
        for movable in tensors_of(model)
        if movable.changes and id(movable.tensor) in weights
    }
    assert changing == {name for name in weights.values() if "lora_" in name}


def test_weights_in_four_bits_move_with_their_tables() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=True)
    layer.to(CPU)
    state = layer.weight.quant_state
    tables = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]

    def numbers() -> torch.Tensor:
        found: torch.Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
        return found

    before, first = numbers(), [table.data_ptr() for table in tables]
    offload = HostOffload(CPU)
    offload.sleep(tensors_of(layer))
    assert all(a != b.data_ptr() for a, b in zip(first, tables, strict=True))
    offload.wake()
    assert layer.weight.quant_state is layer.quant_state is state
    assert numbers().equal(before)
