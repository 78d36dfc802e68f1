"""The choice of a device, and what depends on it, without a GPU.

Tests of whole scripts on a null GPU are in `test_null_gpu.py`.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import utils
from harness import checkpoints, distributed
from harness.cuda_graphs import use_graphs

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes torch find `count` GPUs, whose tensors are on the CPU."""
    chosen, generator, rand = [], torch.Generator, torch.rand

    def set_up(count, ranks=1, rank=0, bfloat16=True):
        def set_device(device):
            assert torch.device(device).index is not None
            if torch.device(device).index >= count:
                raise RuntimeError("CUDA error: invalid device ordinal\nmore")
            chosen.append(device.index)

        answers = {
            "is_available": lambda: count > 0, "device_count": lambda: count,
            "current_device": lambda: chosen[-1] if chosen else 0, "set_device": set_device,
            "is_bf16_supported": lambda including_emulation: bfloat16 or including_emulation,
            "get_device_name": lambda: "GPU",
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
        monkeypatch.setattr(torch, "rand", lambda *size, device, **more: rand(*size, **more))
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        monkeypatch.setattr(dist, "is_initialized", lambda: ranks > 1)
        monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        return chosen

    return set_up


@pytest.mark.parametrize("name, index", [(None, 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_cuda_device_gets_an_index_and_becomes_current(gpus, name, index):
    chosen = gpus(2)
    assert utils.choose_device(name) == torch.device("cuda", index)
    assert chosen == [index]
    assert torch.backends.cudnn.benchmark


def test_without_cuda_the_default_is_the_cpu(gpus):
    gpus(0)
    assert utils.choose_device(None) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:2", "meta", "gpu", "cuda:x", "vulkan"])
def test_a_device_that_cannot_train_is_refused(gpus, name):
    if name.startswith("cuda"):
        gpus(2)
    with pytest.raises(utils.UserError, match=f"--device {name} cannot be used"):
        utils.choose_device(name)


@pytest.mark.parametrize("rank", [0, 2])
def test_more_ranks_than_devices_are_refused_by_each_rank(gpus, rank):
    gpus(2, ranks=3, rank=rank)
    with pytest.raises(utils.UserError, match="3 ranks but 2 CUDA.*--nproc_per_node=2"):
        utils.choose_device(None)
    gpus(3, ranks=3, rank=rank)
    assert utils.choose_device(None).index == rank
    with pytest.raises(utils.UserError, match="another device"):
        utils.choose_device("cuda:1")


def test_emulated_bfloat16_is_refused(gpus):
    gpus(1, bfloat16=False)
    assert utils.choose_device("cuda").type == "cuda"
    with pytest.raises(utils.UserError, match="--amp: GPU does not support bfloat16"):
        utils.choose_device("cuda", amp=True)
    gpus(1)
    assert utils.choose_device("cuda", amp=True).type == "cuda"


def test_memory_formats():
    assert {utils.memory_format(CPU, amp) for amp in (False, True)} == {torch.channels_last}
    assert utils.memory_format(CUDA, False) == torch.contiguous_format
    assert utils.memory_format(CUDA, True) == torch.channels_last


@pytest.mark.parametrize("wanted, device, recover_every, ranks, used", [
    (None, CUDA, "epoch", 1, True), (True, CUDA, "epoch", 1, True),
    (False, CUDA, "epoch", 1, False), (None, CPU, "epoch", 1, False),
    (None, CUDA, 10, 1, False), (None, CUDA, "epoch", 2, False),
    (True, CPU, "epoch", 1, None), (True, CUDA, 10, 1, None), (True, CUDA, "epoch", 2, None),
])
def test_graphs_are_used_if_possible(gpus, wanted, device, recover_every, ranks, used):
    gpus(1, ranks=ranks)
    if used is None:
        with pytest.raises(utils.UserError, match="--cuda_graphs"):
            use_graphs(wanted, device, recover_every)
    else:
        assert use_graphs(wanted, device, recover_every) == used


@pytest.mark.parametrize("device, batch_size, image_size, images", [
    (CPU, 64, 32, 64), (CUDA, 64, 32, 1000), (CUDA, 2000, 32, 2000), (CUDA, 1024, 224, 1024),
])
def test_evaluation_uses_larger_batches_on_cuda(device, batch_size, image_size, images):
    args = SimpleNamespace(batch_size=batch_size, image_size=image_size)
    assert utils.evaluation_batch(args, device) == images


def draw(generator):
    """Draw from the generators of the data, of torch, of Python and of numpy."""
    draws = torch.rand(3, generator=generator), torch.rand(3), random.random(), np.random.rand()
    return [torch.as_tensor(x).tolist() for x in draws]


def draw_resumed(states, seed=3, epoch=5):
    """Draw after a resumption on the CPU; also return the lines of the log."""
    lines = []
    generator = utils.seed_everything(seed, CPU)
    checkpoints.set_random_state(states, generator, seed, epoch, lines.append)
    return draw(generator), lines


def test_random_states_are_restored_or_on_another_device_seeded_by_epoch(monkeypatch):
    generator = utils.seed_everything(3, CPU)
    start = draw(generator)
    states = checkpoints.random_state(generator)
    expected = draw(generator)
    assert draw_resumed(states) == (expected, [])

    states[0]["cuda"] = torch.zeros(16, dtype=torch.uint8)  # states of CUDA have another size
    states[0]["data"] = torch.zeros(16, dtype=torch.uint8)
    found, lines = draw_resumed(states)
    assert len(lines) == 1 and draw_resumed(states)[0] == found
    assert found[2:] == expected[2:], "Python and numpy do not depend on the device"
    others = [expected, start, draw_resumed(states, seed=4)[0], draw_resumed(states, epoch=6)[0]]
    for other in others:
        assert found[0] != other[0] and found[1] != other[1]

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    second, _ = draw_resumed(2 * states)
    assert second[0] == found[0], "all ranks draw the same images"
    assert second[1] != found[1], "drop-path differs between ranks"
