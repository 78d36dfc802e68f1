"""`--compile` gives the same values, and threads are limited. Inductor itself is not run."""

import copy
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import genotypes
import layers
import search
import train
import utils
from harness import speedups
from harness.cuda_graphs import StepGraphs
from model import NetworkCIFAR
from model_search import Network

KINDS = ["two-stage", "one-stage", "retraining"]


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")  # compiles no kernels
    torch._dynamo.reset()


def prepare(kind):
    torch.manual_seed(0)
    if kind == "retraining":
        args = train.get_args_parser().parse_args(["--arch", "ISTA_twostage"])
        return args, NetworkCIFAR(2, 10, 3, True, genotypes.ISTA_twostage)
    args = search.get_args_parser().parse_args(["--one_stage"] * (kind == "one-stage"))
    net = Network(2, 10, 3, one_stage=args.one_stage, auxiliary=args.auxiliary)
    if kind == "one-stage":  # it is compiled when the architecture is fixed
        net.freeze()
        net.prune()
    return args, net


def take_steps(args, net, sizes):
    """Take steps on batches of these sizes as the scripts do; return the last loss."""
    generator = torch.Generator().manual_seed(0)
    graphs = StepGraphs(net, False, None)
    if isinstance(net, NetworkCIFAR):
        optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9)]
        steps = [train.train_step]
    else:
        optimizers = search.optimizers(net, args)
        two_stage = [search.arch_step, search.weight_step]
        steps = [search.one_stage_step] if args.one_stage else two_stage
    net.train()
    for size in sizes:
        x = torch.randn(size, 3, 8, 8, generator=generator)
        y = torch.randint(10, (size,), generator=generator)
        for step in steps:
            loss, _ = graphs.run(step, net, x, y, *optimizers, args)
    utils.evaluate(net, [(x, y)])
    return loss


@pytest.mark.cuda  # too slow for `make test`
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_equal_those_of_torch_layers(kind, compiler):
    args, net = prepare(kind)
    compiled = copy.deepcopy(net)
    speedups.compile_network(compiled, kind != "two-stage", lambda text: None, compiler)
    sizes = 4, 4, 4, 3  # a batch of another size runs uncompiled, like evaluation
    found = take_steps(args, compiled, sizes)
    with layers.plain():
        expected = take_steps(args, net, sizes)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compiled.state_dict(), net.state_dict(), rtol=1e-3, atol=1e-3)
    if kind != "two-stage":
        assert compiler.frame_count == 1


def test_compile_is_called_with_the_flag(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        speedups, "compile_network", lambda net, is_fixed, log: seen.append(is_fixed))
    monkeypatch.chdir(tmp_path)
    tiny = ["--dataset", "digits", "--image_size", "8", "--init_channels", "2", "--layers", "3",
            "--compile", "--device", "cpu", "--no-cutout", "--batch_size", "480", "--epochs", "1"]
    flags = ["--one_stage", "--max_search_epochs", "1", *tiny, "--save", "one"]
    search.main(search.get_args_parser().parse_args(flags))
    assert seen == [False, True]
    flags = ["--arch", "ISTA_twostage", *tiny, "--save", "train"]
    train.main(train.get_args_parser().parse_args(flags))
    assert seen == [False, True, True]


@pytest.mark.parametrize(("load", "chosen", "threads"), [(1.0, None, 2), (1.6, None, 1), (9, 2, 2)])
def test_a_run_on_a_busy_machine_uses_one_thread(load, chosen, threads, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: 3 * (load * os.cpu_count(),))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", str(chosen))
    before, lines = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        speedups.limit_threads(lines.append)
        assert torch.get_num_threads() == threads
        assert len(lines) == (threads == 1)
    finally:
        torch.set_num_threads(before)
