"""What can be known of CUDA without a GPU: the choice of a device, and fake tensors on one.

Whole scripts on a null GPU are in `test_null_gpu.py`.
"""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launches import KINDS, prepare, take_epoch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import layers
import utils
from harness import checkpoints, distributed
from harness.cuda_graphs import use_graphs
from model_search import SparseCode

TINY = ["--init_channels", "2", "--layers", "3"]

# ------------------------------------------------------------------------------------------------
# Fake tensors on CUDA: operators check devices and shapes, and compute nothing
# ------------------------------------------------------------------------------------------------


def to_fake_cuda(net):
    """The network with fake parameters and buffers on CUDA."""

    def fake(tensor):
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
        )

    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(fake(p), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = fake(buffer)
    return net


def backward(loss):
    """Give a gradient to all parameters that a loss depends on.

    torch cannot go back through fake CUDA tensors where there is no driver.
    """
    nodes, seen = [loss.grad_fn], {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes += [function for function, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(utils.Meter, "read", lambda meter: (0.0, 0.0))  # once an epoch: a host sync
    monkeypatch.setattr(SparseCode, "_refresh", lambda code: None)  # there are no values
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *tensors, **options: None)  # has no fake
    yield FakeTensorMode()
    for cached in (data._scale_and_bias, data._axis, layers._constant):
        cached.cache_clear()  # they hold fake tensors now


def fake_images(n):
    pixels = torch.zeros(n, 3, 8, 8, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(n, dtype=torch.int64, device="cuda")
    return data.Images(pixels, labels, list("0123456789"), data.CIFAR10_MEAN, data.CIFAR10_STD)


@pytest.fixture(scope="module")
def nets():
    return {kind: prepare(kind, *TINY) for kind in KINDS}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_stay_on_the_device_and_read_nothing_from_it(nets, fake_cuda, kind, layout):
    args, net = copy.deepcopy(nets[kind])
    with fake_cuda:
        net = to_fake_cuda(net)
        net.drop_path_prob = 0.0 if kind == "two-stage" else 0.2
        batches = fake_images(10).batches(
            batch_size=4, train=True, cutout_length=2 * args.cutout, memory_format=layout
        )
        take_epoch(args, net, batches)
    weight = net.classifier.weight
    assert weight.grad is not None and weight.device.type == "cuda"


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_stays_on_the_device_and_reads_nothing_from_it(nets, fake_cuda, kind):
    net = copy.deepcopy(nets[kind][1])
    with fake_cuda:
        batches = fake_images(10).batches(batch_size=4, train=False)
        utils.evaluate(to_fake_cuda(net), batches, top5=True)
    assert not net.training


def test_fake_tensors_would_tell(fake_cuda):
    with fake_cuda:
        here, there = torch.zeros(2, device="cuda"), torch.zeros(2)
        with pytest.raises(RuntimeError, match="device"):
            here + there
        with pytest.raises(DataDependentOutputException):
            here.sum().item()


# ------------------------------------------------------------------------------------------------
# The choice of a device, and what follows from it
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Have torch see as many GPUs; their tensors are those of the CPU."""
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
def test_a_cuda_device_gets_an_index_and_is_made_the_current_one(gpus, name, index):
    chosen = gpus(2)
    assert utils.choose_device(name) == torch.device("cuda", index)
    assert chosen == [index]
    assert torch.backends.cudnn.benchmark


def test_without_cuda_the_default_is_the_cpu(gpus):
    gpus(0)
    assert utils.choose_device(None) == torch.device("cpu")
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", ["cuda:2", "meta", "gpu", "cuda:x", "vulkan"])
def test_a_device_that_cannot_train_is_refused_in_a_line(gpus, name):
    if name.startswith("cuda"):
        gpus(2)
    with pytest.raises(utils.UserError, match=f"--device {name} cannot be used") as refused:
        utils.choose_device(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("rank", range(3))
def test_every_rank_finds_that_there_are_more_ranks_than_devices(gpus, rank):
    gpus(2, ranks=3, rank=rank)
    with pytest.raises(utils.UserError, match="3 ranks but 2 CUDA.*--nproc_per_node=2"):
        utils.choose_device(None)
    gpus(3, ranks=3, rank=rank)
    assert utils.choose_device(None).index == rank
    with pytest.raises(utils.UserError, match="another device"):
        utils.choose_device("cuda:1")


def test_bfloat16_that_a_gpu_would_emulate_is_refused(gpus):
    gpus(1, bfloat16=False)
    assert utils.choose_device("cuda").type == "cuda"
    with pytest.raises(utils.UserError, match="--amp: GPU does not support bfloat16"):
        utils.choose_device("cuda", amp=True)
    gpus(1)
    assert utils.choose_device("cuda", amp=True).type == "cuda"


CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


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
def test_graphs_are_used_where_they_can_be(gpus, wanted, device, recover_every, ranks, used):
    gpus(1, ranks=ranks)
    if used is None:
        with pytest.raises(utils.UserError, match="--cuda_graphs"):
            use_graphs(wanted, device, recover_every)
    else:
        assert use_graphs(wanted, device, recover_every) == used


@pytest.mark.parametrize("device, batch_size, image_size, images", [
    (CPU, 64, 32, 64), (CUDA, 64, 32, 1000), (CUDA, 2000, 32, 2000), (CUDA, 1024, 224, 1024),
])
def test_evaluation_on_cuda_takes_more_images_at_once(device, batch_size, image_size, images):
    args = SimpleNamespace(batch_size=batch_size, image_size=image_size)
    assert utils.evaluation_batch(args, device) == images


# ------------------------------------------------------------------------------------------------
# Random states of the other kind of device
# ------------------------------------------------------------------------------------------------


def drawn(generator):
    """What the generators of the data, of drop-path, of Python and of numpy give next."""
    draws = torch.rand(3, generator=generator), torch.rand(3), random.random(), np.random.rand()
    return [torch.as_tensor(draw).tolist() for draw in draws]


def resumed(states, seed=3, epoch=5):
    """What is drawn, and said, after a resumption on the CPU."""
    lines = []
    generator = utils.seed_everything(seed, CPU)
    checkpoints.set_random_state(states, generator, seed, epoch, lines.append)
    return drawn(generator), lines


def test_states_of_the_same_kind_of_device_are_restored():
    generator = utils.seed_everything(3, CPU)
    drawn(generator)
    states = checkpoints.random_state(generator)
    expected = drawn(generator)
    assert resumed(states) == (expected, [])


def test_on_the_other_kind_of_device_numbers_are_drawn_anew_by_seed_and_epoch(monkeypatch):
    generator = utils.seed_everything(3, CPU)
    drawn(generator)
    states = checkpoints.random_state(generator)
    same, _ = resumed(states)
    states[0]["cuda"] = torch.zeros(16, dtype=torch.uint8)  # those of CUDA are of another size
    states[0]["data"] = torch.zeros(16, dtype=torch.uint8)
    other, (line,) = resumed(states)
    assert "on CUDA" in line and "from epoch 6 on" in line
    assert other[2:] == same[2:], "Python's and numpy's know no device"
    start = drawn(utils.seed_everything(3, CPU))
    for images, drop_path in (same[:2], start[:2]):
        assert other[0] != images and other[1] != drop_path
    assert resumed(states)[0] == other
    for seed, epoch in ((4, 5), (3, 6)):
        assert all(a != b for a, b in zip(resumed(states, seed, epoch)[0][:2], other, strict=False))
    states *= 2
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    second, _ = resumed(states)
    assert second[0] == other[0], "all ranks draw the same images"
    assert second[1] != other[1], "and drop other paths"
