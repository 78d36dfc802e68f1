"""experiments/darts.py: the supernet of DARTS and PC-DARTS, its genotype, and resumption."""


import darts
import nasbench301
import pytest
import torch
from scripts import rows

import data
import genotypes
import layers
import utils
from genotypes import PRIMITIVES
from utils import UserError


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
def test_an_edge_is_the_weighted_sum_of_its_operations(stride):
    edge = darts.Edge(4, stride, partial=1).double()
    x, weights = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    close(edge(x, weights.unbind()),
          sum(w * op(x) for w, op in zip(weights, edge.mixed._ops, strict=True)))


def test_only_some_channels_pass_through_the_operations():
    edge = darts.Edge(8, 1, partial=4).double()
    x = torch.randn(3, 8, 8, 8, dtype=torch.float64)
    only_skip = torch.eye(7, dtype=torch.float64)[PRIMITIVES.index("skip_connect")]
    y = edge(x, (2 * only_skip).unbind())
    # After the shuffle, every fourth channel has passed through the operations.
    close(y[:, 0::4], 2 * x[:, 0:2])
    for group in (1, 2, 3):
        close(y[:, group::4], x[:, 2 * group : 2 * group + 2])
    assert darts.Edge(8, 2, partial=4)(x.float(), only_skip.float()).shape == (3, 8, 4, 4)


@pytest.mark.parametrize("partial", [1, 4])
def test_gradients_equal_those_with_torch_layers(partial):
    torch.manual_seed(0)
    net = darts.Network(8, 10, 3, partial).double()
    for p in net.arch_parameters():
        p.data.normal_()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    def results():
        logits, _ = net(x)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(net.parameters()))]

    found = results()
    with layers.plain():
        for a, b in zip(found, results(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_the_genotype_has_the_two_edges_with_the_best_operations():
    net = darts.Network(4, 10, 3)
    for alpha in net.alpha:
        alpha.data.zero_()
    # Edges 5 to 8 lead from nodes 0 to 3 to node 4.
    chosen = {5: ("sep_conv_5x5", 0.5), 6: ("avg_pool_3x3", 2.0), 8: ("dil_conv_3x3", 1.0)}
    for edge, (name, value) in chosen.items():
        net.alpha[1].data[edge, PRIMITIVES.index(name)] = value
    net.alpha[1].data[7] = 3.0  # equal operations have small softmax weights
    genotype = net.genotype()
    assert genotype.reduce[4:6] == [("avg_pool_3x3", 1), ("dil_conv_3x3", 3)]
    assert genotypes.has_distinct_edges(genotype)


def test_edge_weights_affect_the_genotype():
    net = darts.Network(4, 10, 3, partial=4)
    for parameter in net.arch_parameters():
        parameter.data.zero_()
    net.beta[0].data[9:14] = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0])  # node 5
    assert [source for _, source in net.genotype().normal[6:]] == [1, 3]
    for weights in net.edge_weights():  # a softmax for each node
        assert [round(part.sum().item(), 6) for part in weights.split([2, 3, 4, 5])] == [1] * 4


def test_steps_update_alpha_and_the_weights_separately():
    images, _ = data.load("digits", "", image_size=8)
    batches = images.subset(torch.arange(8)).batches(8, train=True)
    net = darts.Network(4, 10, 3)
    weights = torch.optim.SGD(net.weight_parameters(), 0.1)
    arch = torch.optim.Adam(net.arch_parameters(), 0.1)

    def changes(update_alpha):
        before = [p.clone() for p in (net.alpha[0], net.classifier.weight)]
        darts.train(net, batches, batches, weights, arch, update_alpha)
        after = (net.alpha[0], net.classifier.weight)
        return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]

    assert changes(False) == [False, True]
    assert changes(True) == [True, True]
    net.zero_grad()
    x, y = next(iter(batches))
    darts.step(net, x, y, arch, fixed=weights)
    assert all(p.grad is None for p in net.weight_parameters())
    assert all(p.grad is not None for p in net.arch_parameters())


FLAGS = ["--dataset", "digits", "--image_size", "8", "--init_channels", "4", "--layers", "3",
         "--batch_size", "40", "--epochs", "2", "--device", "cpu"]


def call(folder, *flags):
    darts.main(darts.get_args_parser().parse_args(["--save", str(folder), *FLAGS, *flags]))


@pytest.mark.crash
def test_an_interrupted_search_resumes(tmp_path, monkeypatch, capsys):
    few = [images.subset(torch.arange(80)) for images in data.load("digits", "", image_size=8)]
    monkeypatch.setattr(data, "load", lambda *args: few)
    call(tmp_path / "reference")
    evaluate, calls = utils.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(utils, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "resumed")
    call(tmp_path / "resumed")
    with pytest.raises(UserError, match="started with another --seed"):
        call(tmp_path / "resumed", "--seed", "3")

    expected, found = (rows(tmp_path / name / "metrics.jsonl") for name in ("reference", "resumed"))
    assert len(expected) == 2 and found == expected
    search = nasbench301.read_search(tmp_path / "resumed")
    assert search == nasbench301.read_search(tmp_path / "reference") and list(search) == [1, 2]
    assert genotypes.load(tmp_path / "resumed") == (search[2], False)
    assert f"genotype = {search[2]}" in capsys.readouterr().out


def test_other_folders_and_a_wrong_number_of_channels_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="choose another folder"):
        call(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        call(tmp_path / "new", "--partial", "3")
