"""Weights through a buffer that another process sees: whole, in order, within bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from querl.errors import EngineError
from querl.rollout import transfer, worker
from querl.rollout.transfer import buffer_bytes, host_buffer
from querl.rollout.worker.querl_vllm import copied_tensors, see_buffer

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]
SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=12)
READER = """
import json, sys, torch
from querl_vllm import copied_tensors, see_buffer
from safetensors.torch import save_file
assert not any(name == "querl" or name.startswith("querl.") for name in sys.modules)
buffer, found = see_buffer(json.loads(sys.stdin.readline()), torch.device("cpu")), {}
for line in sys.stdin:
    found.update(copied_tensors(buffer, json.loads(line), torch.device("cpu")))
    print("taken", flush=True)
save_file(found, sys.argv[1])
"""


def named(*tensors: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"layer.{i}", tensor) for i, tensor in enumerate(tensors)]


@settings(deadline=None)
@given(kinds=TENSORS, num_bytes=st.integers(0, 4000))
def test_whatever_goes_in_comes_out(
    kinds: list[tuple[torch.dtype, tuple[int, ...]]], num_bytes: int
) -> None:
    tensors = named(*(torch.randint(0, 200, shape).to(dtype) for dtype, shape in kinds))
    size = max(num_bytes, *(tensor.nbytes for _, tensor in tensors))
    found = []
    with host_buffer(size) as buffer:
        seen = see_buffer(json.loads(buffer.address), CPU)
        for contents in buffer.fill(tensors):
            found += copied_tensors(seen, json.loads(contents), CPU)
    assert [name for name, _ in found] == [name for name, _ in tensors]
    for (_, mine), (_, theirs) in zip(found, tensors, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.equal(theirs)


def test_what_was_taken_does_not_change_when_the_buffer_is_filled_again() -> None:
    tensors = named(torch.zeros(64), torch.ones(64))
    with host_buffer(256) as buffer:
        seen = see_buffer(json.loads(buffer.address), CPU)
        taken = [copied_tensors(seen, json.loads(told), CPU) for told in buffer.fill(tensors)]
    assert [len(part) for part in taken] == [1, 1]
    assert taken[0][0][1].equal(torch.zeros(64))


def test_parts_of_tensors_and_transposed_ones_arrive_as_they_look() -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = named(whole.T, whole[1:3], whole[:, ::2], whole.clone().requires_grad_())
    with host_buffer(buffer_bytes(tensors)) as buffer:
        seen = see_buffer(json.loads(buffer.address), CPU)
        (told,) = buffer.fill(tensors)
        found = copied_tensors(seen, json.loads(told), CPU)
    for (_, mine), (_, theirs) in zip(found, tensors, strict=True):
        assert mine.equal(theirs)


def test_another_process_reads_them_without_querl(tmp_path: Path) -> None:
    tensors = named(*(torch.randn(300, 7) for _ in range(5)), torch.randn(3).bfloat16())
    environment = {**os.environ, "PYTHONPATH": str(Path(worker.__file__).parent)}
    command = [sys.executable, "-c", READER, str(tmp_path / "read")]
    num_parts = 0
    with (
        host_buffer(20_000) as buffer,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as reader,
    ):
        assert reader.stdin is not None
        assert reader.stdout is not None
        print(buffer.address, file=reader.stdin, flush=True)
        for told in buffer.fill(tensors):
            print(told, file=reader.stdin, flush=True)
            assert reader.stdout.readline() == "taken\n"
            num_parts += 1
        reader.stdin.close()
        assert reader.wait(60) == 0
    assert num_parts == 3
    found = load_file(tmp_path / "read")
    assert list(found) == [name for name, _ in tensors]
    assert all(found[name].equal(tensor) for name, tensor in tensors)


def test_a_buffer_holds_all_or_a_gibibyte_or_the_largest_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 1000)
    assert 40 <= buffer_bytes(named(torch.zeros(10))) <= 40 + transfer.ALIGNMENT
    assert buffer_bytes(named(*[torch.zeros(100)] * 9)) == 1000
    assert buffer_bytes(named(torch.zeros(10), torch.zeros(500))) == 2000


def test_the_file_behind_a_buffer_is_gone_afterwards() -> None:
    with host_buffer(100) as buffer:
        path = Path(json.loads(buffer.address)["file"])
        assert path.stat().st_size == 100
    assert not path.exists()


def test_a_buffer_that_was_hidden_is_still_seen_and_leaves_nothing_to_remove() -> None:
    tensors = named(torch.randn(20))
    with host_buffer(100) as buffer:
        address = json.loads(buffer.address)
        seen = see_buffer(address, CPU)
        buffer.hide()
        assert not Path(address["file"]).exists()
        (told,) = buffer.fill(tensors)
        ((_, found),) = copied_tensors(seen, json.loads(told), CPU)
    assert found.equal(tensors[0][1])


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a file may promise what is not there"
)
def test_memory_that_is_not_there_is_told_before_anything_is_written() -> None:
    with (
        pytest.raises(EngineError, match=r"are free in .* to hand the weights over"),
        host_buffer(2**60),
    ):
        pass
