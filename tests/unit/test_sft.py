from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer

from querl.errors import DataError
from querl.trainer.optim import AdamWSettings
from querl.trainer.sft import BatchOrder, Sequences, SftSettings, SftTrainer

SAMPLES = make_samples(6, 4)


def trainer(*, seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> SftTrainer:
    return SftTrainer(
        tiny_policy(seed).to(dtype),
        tiny_tokenizer(),
        Sequences.of_samples(SAMPLES),
        optimizer=AdamWSettings(lr=3e-3, schedule="cosine", warmup_steps=2),
        settings=SftSettings(**{"epochs": 2, "batch_tokens": 200, **settings}),
    )


def run(sft: SftTrainer, until: int) -> list[float]:
    losses = []
    while sft.step < until:
        losses.append(sft.train_step()["sft/loss"])
    return losses


def test_sequences_come_back_as_they_went_in():
    sequences = Sequences.of_samples(SAMPLES)
    assert len(sequences) == len(SAMPLES)
    for n, sample in enumerate(SAMPLES):
        part = slice(sequences.offsets[n], sequences.offsets[n + 1])
        assert tuple(sequences.token_ids[part]) == sample.token_ids
        assert tuple(sequences.loss_mask[part]) == sample.loss_mask


def test_a_first_token_is_never_trained_and_a_sequence_without_loss_is_dropped():
    sequences = Sequences.of([([1, 2], [True, True]), ([3, 4], [True, False])])
    assert len(sequences) == 1
    assert sequences.loss_mask.tolist() == [False, True]
    with pytest.raises(DataError, match="no sequence has a token to train on"):
        Sequences.of([([3, 4], [False, False])])


def test_the_validation_loss_is_that_of_a_plain_forward_pass():
    sft = trainer()
    model, total, count = tiny_policy(), 0.0, 0
    for sample in SAMPLES:
        token_ids = torch.tensor(sample.token_ids)[None]
        with torch.no_grad():
            logprobs = model(token_ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, token_ids[0, 1:, None])[:, 0]
        mask = torch.tensor(sample.loss_mask[1:])
        total -= chosen[mask].sum().item()
        count += int(mask.sum())
    validation = Sequences.of_samples(SAMPLES)
    assert sft.validation_loss(validation) == pytest.approx(total / count, rel=1e-5)


def test_a_float32_head_takes_a_bf16_models_hidden_states_as_they_are():
    plain, exact = (trainer(dtype=torch.bfloat16, fp32_head=fp32) for fp32 in (False, True))
    for sft in (plain, exact):
        before = sft.model.get_output_embeddings().weight.clone()
        assert sft.train_step()["optimizer/grad_norm"] > 0
        after = sft.model.get_output_embeddings().weight
        assert after.dtype == torch.bfloat16
        assert not torch.equal(after, before)
    validation = Sequences.of_samples(SAMPLES)
    losses = [sft.validation_loss(validation) for sft in (plain, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]


def test_training_lowers_the_loss():
    sft = trainer(epochs=8)
    validation = Sequences.of_samples(SAMPLES)
    before = sft.validation_loss(validation)
    run(sft, sft.num_steps)
    assert sft.validation_loss(validation) < before - 1


def test_an_epoch_sees_every_sequence_once_in_batches_of_about_the_size_asked_for():
    batches = BatchOrder(Sequences.of_samples(SAMPLES), 300, seed=0)
    lengths = np.array([len(sample.token_ids) for sample in SAMPLES])
    per_epoch = batches.batches_per_epoch
    for epoch in range(2):
        parts = [
            batches[step].tolist() for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
        ]
        assert sorted(n for part in parts for n in part) == list(range(len(SAMPLES)))
        sizes = [lengths[part].sum() for part in parts]
        assert max(sizes) - min(sizes) < 2 * lengths.max()
        assert 300 <= np.mean(sizes) < 600
    assert batches[0].tolist() != batches[per_epoch].tolist()


def test_cutting_a_batch_into_rows_changes_no_loss():
    whole, cut = trainer(tokens_per_microbatch=10**6), trainer(tokens_per_microbatch=80)
    np.testing.assert_allclose(run(whole, 4), run(cut, 4), rtol=1e-3)


def test_saving_and_going_on_equals_never_having_stopped_bit_for_bit(tmp_path):
    straight, first = trainer(), trainer()
    run(straight, straight.num_steps)
    run(first, 3)
    first.save(tmp_path)
    second = trainer(seed=9)
    second.load(tmp_path)
    assert second.step == 3
    run(second, second.num_steps)
    left, right = straight.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
