"""`--compile`: the same values, few compilations, the same names. Inductor itself is not run."""

import copy

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
    yield CompileCounterWithBackend("aot_eager")  # all but the making of kernels
    torch._dynamo.reset()


def prepare(kind):
    torch.manual_seed(0)
    if kind == "retraining":
        args = train.get_args_parser().parse_args(["--arch", "ISTA_twostage"])
        return args, NetworkCIFAR(2, 10, 3, True, genotypes.ISTA_twostage)
    args = search.get_args_parser().parse_args(["--one_stage"] * (kind == "one-stage"))
    net = Network(2, 10, 3, one_stage=args.one_stage, auxiliary=args.auxiliary)
    if kind == "one-stage":  # once its architecture is fixed
        net.freeze()
        net.prune()
    return args, net


def take_steps(args, net, sizes):
    """Steps on batches of these sizes, as the loops take them."""
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


@pytest.mark.cuda  # where it is worth its time
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_plain_network(kind, compiler):
    args, plain = prepare(kind)
    compiled = copy.deepcopy(plain)
    speedups.compile_network(compiled, kind != "two-stage", lambda text: None, compiler)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    sizes = 4, 4, 4, 3  # the last one is short: it runs uncompiled, as evaluation does
    found = take_steps(args, compiled, sizes)
    with layers.plain():
        expected = take_steps(args, plain, sizes)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for a, b in zip(compiled.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if kind != "two-stage":
        assert compiler.frame_count == 1


@pytest.mark.cuda
def test_a_rising_drop_path_is_compiled_twice(compiler):
    args, net = prepare("retraining")
    speedups.compile_network(net, True, lambda text: None, compiler)
    for epoch in range(4):
        net.drop_path_prob = 0.2 * epoch / 4
        take_steps(args, net, [4, 4])
    assert compiler.frame_count == 2


@pytest.mark.cuda
def test_one_graph_of_a_kind_serves_all_cells(compiler):
    """Where the support changes, the operations alone are compiled."""
    nets, counts = [Network(2, 10, layers) for layers in (6, 9)], []
    for net in nets:
        for code, first in zip(net.codes, nets[0].codes, strict=True):
            code.load_state_dict(first.state_dict())
        speedups.compile_network(net, False, lambda text: None, compiler)
        with torch.no_grad():
            net(torch.randn(4, 3, 8, 8))
        counts.append(compiler.frame_count)
    assert counts[0] > 8 and counts[1] == counts[0]


def test_the_flag_reaches_the_network(monkeypatch, tmp_path):
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
