"""benchmarks/causes.py: searches that differ in one thing from those of search.py."""

import random
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from scripts import ENVIRONMENT, ROOT

import ista
import search
from genotypes import NODES
from model_search import Network

sys.path.append(str(ROOT / "benchmarks"))

import causes


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Network(2, 10, 3)


@pytest.fixture
def optimizer(net):
    return torch.optim.SGD(net.weight_parameters(), 0.1, momentum=0.9, weight_decay=3e-4)


BATCHES = [(torch.randn(4, 3, 8, 8), torch.arange(4))]


def weights_of_operations(net):
    return {name: p.detach().clone() for name, p in net.named_parameters() if "._ops." in name}


def changed(net, before):
    return {name for name, p in net.named_parameters() if name in before
            and not torch.equal(p, before[name])}


def train(net, batches, optimizer, epochs=1):
    args = Namespace(seed=0, grad_clip=5, solver="homotopy")
    causes.warm_up(net, batches, optimizer, args, print, epochs)


def test_pairs_are_drawn_on_distinct_edges_with_weights_of_1(net):
    generator, drawn = random.Random(0), set()
    for _ in range(200):
        causes.draw(net.normal_code, generator)
        assert all(len({edge for edge, _ in node}) == 2 for node in net.normal_code.support)
        torch.testing.assert_close(net.normal_code.active_weights(), torch.ones(NODES, 2).double())
        drawn |= {(j, *pair) for j, node in enumerate(net.normal_code.support) for pair in node}
    assert len(drawn) == 7 * (2 + 3 + 4 + 5)


def test_operations_outside_the_support_learn_while_b_rests(net, optimizer):
    before, genotype = weights_of_operations(net), net.genotype()
    points = [b.detach().clone() for b in net.arch_parameters()]
    train(net, 8 * BATCHES, optimizer, epochs=2)
    assert len(changed(net, before)) > 0.5 * len(before)  # the support alone: 0.1
    assert net.genotype() == genotype
    assert all(map(torch.equal, net.arch_parameters(), points))


@pytest.mark.parametrize("flags", [[], ["--idle_weights_move"]])
def test_weights_that_have_run_move_when_idle(monkeypatch, net, flags):
    for name in ("main", "two_stage_epoch", "optimizers"):  # restored at the end
        monkeypatch.setattr(search, name, getattr(search, name))
    args = search.get_args_parser().parse_args([])
    monkeypatch.setattr(search, "main", lambda args: None)
    monkeypatch.setattr(sys, "argv", ["causes.py", *flags])
    causes.main()
    optimizer, _ = search.optimizers(net, args)
    train(net, BATCHES, optimizer)
    search.train_only(net.weight_parameters(), net.arch_parameters())
    before = weights_of_operations(net)
    optimizer.zero_grad()
    optimizer.step()
    assert bool(changed(net, before)) == bool(flags)


def test_lam_is_a_share_of_the_least_at_which_the_code_is_0():
    rng = np.random.default_rng(0)
    A, b = rng.random((7, 14)), rng.standard_normal(7)
    lam_max = np.abs(A.T @ b).max()
    found = causes.relative(ista.recover, 0.3)(A, b, 1e-5, "ista", z0=np.zeros(14))
    np.testing.assert_allclose(found.z, ista.recover(A, b, 0.3 * lam_max).z, atol=1e-9 * lam_max)


def script(tmp_path, *flags):
    command = [sys.executable, ROOT / "benchmarks/causes.py", *map(str, flags)]
    return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_script(tmp_path):
    flags = [
        "--warm_up", 2, "--idle_weights_move", "--relative_lam", 0.9, "--dataset", "digits",
        "--image_size", 8,
        "--init_channels", 2, "--layers", 3, "--batch_size", 256, "--epochs", 1, "--save", "run",
    ]
    done = script(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "warm-up 2/2: loss" in done.stdout and "the search is done" in done.stdout
    assert "have fewer than 2 nonzero entries" in done.stdout  # as at such a λ
    for flags in (["--warm_up", 0], ["--no_such_flag"]):
        failed = script(tmp_path, *flags)
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1
        assert failed.stderr.startswith("causes.py: error: ")
