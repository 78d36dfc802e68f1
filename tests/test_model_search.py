"""The sparse supernet: codes, weights, support, and what one-stage search does to it."""

import copy
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ista
import model
import model_search
from genotypes import NODES, PRIMITIVES, as_lists, by_node
from model_search import Network, SparseCode
from operations import last_norm

SIZES = [7 * (j + 2) for j in range(NODES)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**kwargs):
    return Network(4, 10, 3, **kwargs)


def set_support(net, numbers):
    """Give each node j the pairs numbers(j), by codes that are largest there."""
    for code in net.codes:
        codes = [np.zeros(n) for n in SIZES]
        for j, z in enumerate(codes):
            z[list(numbers(j))] = (torch.rand(2).numpy() + 0.5) * [1, -1]
        code.accept(codes, code.choose(codes))


def randomize(net):
    """Give points, BatchNorm statistics and γ and β, where there are any, values of their own."""
    with torch.no_grad():
        for b in net.arch_parameters():
            b.normal_()
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 2)
                if layer.affine:
                    layer.weight.uniform_(0.5, 2)
                    layer.bias.normal_()


def assert_same_state(net, before):
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


# ------------------------------------------------------------------------------------------------
# SparseCode
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dictionary", ["uniform", "normal"])
def test_shapes_and_distributions(dictionary):
    code = SparseCode(proj_dims=5, sparseness=3, dictionary=dictionary)
    assert [A.shape for A in code.A] == [(5, n) for n in SIZES]
    assert [z.shape for z in code.z] == [(n,) for n in SIZES]
    assert [b.shape for b in code.b] == [(5,)] * 4
    assert {t.dtype for t in [*code.A, *code.z]} == {torch.float64}
    assert all(0 < b.abs().max() < 1e-2 for b in code.b)
    assert [len(node) for node in code.support] == [3] * 4
    entries = torch.cat([A.flatten() for A in code.A])
    if dictionary == "uniform":
        assert 0 <= entries.min() < 0.05 and 0.95 < entries.max() < 1
    else:
        assert abs(entries.mean()) < 0.1
        assert all(torch.allclose(A.norm(dim=0), A.new_ones(())) for A in code.A)


def test_a_seed_draws_what_it_always_drew():
    # Old runs name their dictionaries by these seeds.
    code = SparseCode()
    assert code.A[0][0, :2].tolist() == [0.9700530018065531, 0.707819864399788]
    assert code.A[3][-1, -1].item() == 0.4740951126860308
    # The last bit of a normal number depends on the processor.
    b = pytest.approx([0.0011933892965316772, -0.0009195213788188994])
    assert code.b[3][:2].tolist() == b
    torch.manual_seed(0)
    net = tiny()
    assert net.normal_code.A[0][0, :2].tolist() == [0.32725104836034624, 0.6832509054721009]
    assert net.reduce_code.b[3][-1].item() == pytest.approx(-0.001659997971728444)
    assert net.genotype().normal[:3] == [
        ("sep_conv_3x3", 0), ("dil_conv_3x3", 1), ("max_pool_3x3", 0),
    ]


def test_recover_solves_the_sparse_coding_problem_of_what_is_there():
    """A, b and z may be written in place."""
    code = SparseCode(lam=1e-3)
    with torch.no_grad():
        for A, b, z in zip(code.A, code.b, code.z, strict=True):
            A.copy_(torch.rand_like(A))
            b.copy_(torch.randn_like(b))
            z.copy_(torch.randn_like(z))
    assert code.recover() == 0
    for A, b, z, support in zip(code.A, code.b, code.z, code.support, strict=True):
        point = b.detach().double().numpy()
        gap = ista.duality_gap(A.numpy(), point, z.numpy(), 1e-3)
        assert gap <= 1e-9 * 0.5 * point @ point
        largest = sorted(range(len(z)), key=lambda k, z=z: (-abs(z[k].item()), k))[:2]
        assert support == [divmod(k, 7) for k in sorted(largest)]
    S = torch.tensor([[edge * 7 + op for edge, op in node] for node in code.support])
    assert torch.equal(code.S, S)
    weights = code.weights()[code.weights() != 0].reshape(4, 2)
    torch.testing.assert_close(code.active_weights(), weights)


def entries(n):
    """Codes of n entries: few values, so that there are ties and zeros."""
    values = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 2.0])
    return st.lists(values, min_size=n, max_size=n).map(np.array)


@settings(max_examples=100, deadline=None)
@given(codes=st.tuples(*map(entries, SIZES)), distinct_edges=st.booleans())
def test_support_is_the_largest_of_all_or_of_each_edge(codes, distinct_edges):
    torch.manual_seed(0)
    code = SparseCode(distinct_edges=distinct_edges)
    last = code.support
    support = code.choose(codes)
    assert code.support is last, "choosing changes nothing"
    for z, old, node in zip(codes, last, support, strict=True):
        n = len(PRIMITIVES)
        edges = [range(e * n, e * n + n) for e in range(len(z) // n)]
        old = {edge * n + op for edge, op in old}
        # Largest |z| first; among zeros those of the last support; then the smaller index.
        order = sorted(range(len(z)), key=lambda k: (-abs(z[k]), z[k] == 0 and k not in old, k))
        if distinct_edges:
            order = sorted((min(edge, key=order.index) for edge in edges), key=order.index)
        assert node == [divmod(k, n) for k in sorted(order[:2])]


@pytest.mark.parametrize("sparseness", [1, 2, 5])
def test_weights_are_the_formula_and_their_gradient_is_the_dictionary(sparseness):
    code = SparseCode(sparseness=sparseness)
    for b in code.b:
        nn.init.normal_(b)
    code.recover()
    with torch.no_grad():
        for b in code.b:
            b += 0.25  # b alone moves, until the next recovery
    weights = code.weights()
    assert weights.shape == (14, 7) and (weights != 0).sum() == 4 * sparseness
    first = 0
    for j, (A, b, z) in enumerate(zip(code.A, code.b, code.z, strict=True)):
        S = [edge * 7 + op for edge, op in code.support[j]]
        dense = torch.zeros(SIZES[j], dtype=torch.float64)
        A_S = A[:, S]
        dense[S] = A_S.T @ b.detach().double() - (A_S.T @ A_S - torch.eye(len(S))) @ z[S]
        node = weights[first : first + j + 2].flatten()
        torch.testing.assert_close(node, dense, rtol=1e-9, atol=1e-9)
        for k in S:
            (grad,) = torch.autograd.grad(node[k], b, retain_graph=True)
            torch.testing.assert_close(grad, A[:, k].float())
        first += j + 2


def test_the_weights_are_the_code_itself_where_the_support_holds_all_of_it():
    code = SparseCode()
    codes = [np.zeros(n) for n in SIZES]
    for z, b, A in zip(codes, code.b, code.A, strict=True):
        z[3], z[8] = 0.7, -0.4
        b.data = (A @ torch.from_numpy(z)).float()
    code.accept(codes, [[(0, 3), (1, 1)]] * NODES)
    expected = torch.tensor([[0.7, -0.4]] * NODES, dtype=torch.float64)
    torch.testing.assert_close(code.active_weights(), expected, rtol=1e-6, atol=1e-6)


def test_a_solver_that_does_not_converge_is_replaced_by_homotopy(monkeypatch):
    exact, steps, short = (SparseCode() for _ in range(3))
    for code in (exact, steps, short):
        code.load_state_dict(exact.state_dict())
        for b in code.b:
            b.data = torch.linspace(-1, 1, 7)
    assert exact.recover() == steps.recover("ista") == 0
    monkeypatch.setattr(ista, "MAX_ITER", 5)
    assert short.recover("ista") == 4
    for other in (steps, short):
        assert other.support == exact.support
    for a, b in zip(short.z, exact.z, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------
# State
# ------------------------------------------------------------------------------------------------


def test_codes_travel_in_the_state_dict():
    net, other = tiny(one_stage=True), tiny(one_stage=True)
    randomize(net)
    net.recover()
    net.freeze([True] + [False] * 7)
    assert other.genotype() != net.genotype()
    other.load_state_dict(net.state_dict())
    assert other.genotype() == net.genotype() and other.frozen == net.frozen
    for a, b in zip(net.codes, other.codes, strict=True):
        assert a.support == b.support
        torch.testing.assert_close(a.weights(), b.weights())
    assert_same_state(other, net.state_dict())
    assert [b.requires_grad for b in other.arch_parameters()] == [False] + [True] * 7
    assert copy.deepcopy(net).genotype() == net.genotype()


def test_codes_move_with_the_network():
    for code in tiny().to("meta").codes:
        assert {t.device.type for t in [*code.A, *code.b, *code.z, code.S, code.M]} == {"meta"}


def test_parameters_are_told_apart():
    net = tiny(one_stage=True, auxiliary=True)
    arch = net.arch_parameters()
    assert [id(p) for p in arch] == [id(p) for p in [*net.normal_code.b, *net.reduce_code.b]]
    weights = net.weight_parameters()
    assert len(weights) + len(arch) == len(list(net.parameters()))
    assert not {id(p) for p in weights} & {id(p) for p in arch}
    assert weights[0] is net.stem[0].weight and weights[-1] is net.classifier.bias


def test_names_are_those_of_darts():
    keys = set(tiny().state_dict())
    for key in (
        "stem.0.weight", "stem.1.running_mean", "cells.0.preprocess0.op.1.weight",
        "cells.2.preprocess0.conv_2.weight", "cells.0._ops.3._ops.4.op.1.weight",
        "cells.0._ops.0._ops.0.1.running_mean", "cells.0._ops.13._ops.1.1.running_var",
        "cells.1._ops.0._ops.2.conv_1.weight", "cells.1._ops.0._ops.2.bn.running_mean",
        "cells.2._ops.5._ops.3.op.7.running_var", "classifier.weight", "classifier.bias",
    ):
        assert key in keys
    affine = [key for key in keys if re.match(r"cells.*(bn|op\.[23])\.bias", key)]
    assert not affine, "BatchNorm in the cells of the two-stage supernet has no γ and β"
    new = {key for key in keys if not key.startswith(("stem", "cells", "classifier"))}
    assert all(key.startswith(("normal_code.", "reduce_code.")) for key in new)
    # A checkpoint of the released code has everything else.
    released = {key: value for key, value in tiny().state_dict().items() if key not in new}
    missing, unexpected = tiny().load_state_dict(released, strict=False)
    assert set(missing) == new and not unexpected


# ------------------------------------------------------------------------------------------------
# What runs
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_stage", [False, True])
def test_only_the_support_runs_and_only_it_gets_gradients(one_stage):
    net = tiny(one_stage=one_stage, auxiliary=one_stage)
    ran = set()
    for name, module in net.named_modules():
        if re.fullmatch(r"cells\.\d+\._ops\.\d+\._ops\.\d+", name):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    logits, _ = net(torch.randn(2, 3, 16, 16))
    logits.sum().backward()
    expected = set()
    for i, cell in enumerate(net.cells):
        first = 0
        for j, node in enumerate(net.codes[cell.reduction].support):
            expected |= {f"cells.{i}._ops.{first + edge}._ops.{op}" for edge, op in node}
            first += j + 2
    assert ran == expected and len(expected) == 8 * 3
    for name, p in net.named_parameters():
        candidate = re.match(r"cells\.\d+\._ops\.\d+\._ops\.\d+", name)
        if candidate and candidate[0] not in expected:
            assert p.grad is None, name
        elif p.requires_grad and "auxiliary" not in name:
            assert p.grad is not None, name


def test_genotype_lists_the_support_by_node_and_operation():
    net = tiny()
    set_support(net, lambda j: (j * 7 + 3, 9))
    pairs = [("sep_conv_3x3", 0), ("skip_connect", 1), ("skip_connect", 1), ("sep_conv_3x3", 1),
             ("skip_connect", 1), ("sep_conv_3x3", 2), ("skip_connect", 1), ("sep_conv_3x3", 3)]
    genotype = net.genotype()
    assert genotype.normal == genotype.reduce == pairs
    assert list(genotype.normal_concat) == [2, 3, 4, 5]
    described = net.describe()
    assert described.items() >= as_lists(genotype).items()
    weights = net.reduce_code.active_weights().flatten()
    assert described["reduce_weights"] == weights.tolist()


# ------------------------------------------------------------------------------------------------
# Recoveries
# ------------------------------------------------------------------------------------------------


def test_a_recovery_without_a_move_of_b_moves_nothing():
    net = tiny()
    first, genotype = net.recover(), net.genotype()
    assert first.not_converged == 0 and not first.rejected and first.parameters is None
    assert max(net.recover().distance) < 1e-12 and net.genotype() == genotype


def test_the_rule_is_asked_once_and_what_it_answers_is_what_runs(monkeypatch):
    net, calls = tiny(one_stage=True), []

    def last_pairs(code, codes):
        calls.append(code)
        return np.array([[(j, 6), (j + 1, 5)] for j in range(NODES)])

    net.freeze([False, True] + [False] * 6)
    last = net.genotype()
    monkeypatch.setattr(SparseCode, "choose", last_pairs)
    rejected = net.recover(max_params=1e-6)
    assert calls == [*net.codes] and rejected.rejected and net.genotype() == last
    recovery = net.recover(max_params=10)
    assert calls == 2 * [*net.codes] and not recovery.rejected
    normal, reduce = (by_node(getattr(net.genotype(), cell)) for cell in ("normal", "reduce"))
    chosen = [[("dil_conv_5x5", j), ("dil_conv_3x3", j + 1)] for j in range(NODES)]
    assert reduce == chosen
    kept = by_node(last.normal)[1]
    assert normal == [chosen[0], kept, *chosen[2:]], "a frozen node keeps its support"
    plain = model.NetworkCIFAR(4, 10, 3, False, net.genotype(), True)
    size = sum(p.numel() for p in plain.parameters())
    assert rejected.parameters == recovery.parameters == size
    x = torch.randn(2, 3, 16, 16)
    expected = net.eval()(x)[0]
    json.dumps(net.describe())
    net.prune()
    assert torch.equal(net(x)[0], expected)


def test_codes_and_supports_of_rank_zero_are_everybodys():
    first, second = tiny(), tiny()
    shared = []

    def share(found):
        shared.append(found)
        return shared[0]

    for net in (first, second):
        randomize(net)
        net.recover(broadcast=share)
    assert len(shared) == 2
    assert second.genotype() == first.genotype()
    for a, b in zip(first.codes, second.codes, strict=True):
        assert all(torch.equal(y, z) for y, z in zip(a.z, b.z, strict=True))


@pytest.mark.parametrize("lam", [0.5, 1e3, 1e9])
def test_a_code_without_enough_entries_keeps_pairs_and_does_not_freeze(lam):
    net = tiny(one_stage=True, lam=1e-3)
    randomize(net)
    net.recover()
    last = net.genotype()
    for code in net.codes:
        code.lam = lam
    recovery = net.recover(freeze_tol=1e9)
    nodes = [(code, j) for code in net.codes for j in range(NODES)]
    old, new = (by_node(g.normal) + by_node(g.reduce) for g in (last, net.genotype()))
    for i, (code, j) in enumerate(nodes):
        A, b, z = code.A[j], code.b[j].detach().double(), code.z[j]
        assert recovery.lam_max[i] == pytest.approx((A.T @ b).abs().max().item())
        assert (z == 0).all() == (lam >= recovery.lam_max[i])
        assert recovery.too_sparse[i] == (z.count_nonzero() < 2)
        assert net.frozen[i] == recovery.frozen[i] == (not recovery.too_sparse[i])
        assert len({*new[i]} & {*old[i]}) >= 2 - z.count_nonzero()
    if lam >= 1e3:
        assert all(recovery.too_sparse) and net.genotype() == last
        assert min(recovery.distance) > 0


# ------------------------------------------------------------------------------------------------
# One-stage search
# ------------------------------------------------------------------------------------------------


def norms(net, code, j):
    """The BatchNorm layers of all operations that lead into node j."""
    return [
        layer
        for cell in net.cells
        if net.codes[cell.reduction] is code
        for layer in cell.edges(j).modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]


def take_step(net, optimizers):
    logits, logits_aux = net(torch.randn(4, 3, 16, 16))
    loss = F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits_aux, torch.arange(4))
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def test_a_node_is_held_until_it_freezes_and_its_b_never_moves_after():
    net = tiny(one_stage=True, auxiliary=True)
    optimizers = (
        torch.optim.Adam(net.arch_parameters(), 0.1, weight_decay=0.1),
        torch.optim.SGD(net.weight_parameters(), 0.1, 0.9, weight_decay=0.1),
    )
    for _ in range(2):
        take_step(net, optimizers)
    for code in net.codes:
        for j in range(4):
            for layer in norms(net, code, j):
                assert (layer.weight == 1).all() and (layer.bias == 0).all()
    others = [net.stem[1], net.cells[0].preprocess0.op[2], net.auxiliary_head.features[3]]
    assert all((layer.weight != 1).any() for layer in others)

    frozen, moving = net.normal_code, net.reduce_code
    net.freeze([False, True, False, False] + [False] * 4)
    points = [b.detach().clone() for b in net.arch_parameters()]
    z = [z.clone() for z in frozen.z]
    for _ in range(3):
        take_step(net, optimizers)
    moved = [not torch.equal(a, b) for a, b in zip(points, net.arch_parameters(), strict=True)]
    assert moved == [True, False, True, True] + [True] * 4
    recovery = net.recover()
    assert recovery.distance[1] == 0 and torch.equal(frozen.z[1], z[1])
    assert recovery.distance[0] > 0 and recovery.frozen == [False, True] + [False] * 6
    edge, op = frozen.support[1][0]
    for j in range(4):
        for layer in norms(net, frozen, j):
            assert layer.weight.requires_grad == (j == 1)
        assert all((layer.weight == 1).all() for layer in norms(net, moving, j))
    trained = last_norm(net.cells[0].edges(1)[edge]._ops[op])
    assert (trained.weight != 1).any()


def test_freezing_compares_whole_codes_with_the_tolerance():
    net = tiny(one_stage=True)
    with torch.no_grad():
        for i, b in enumerate(net.arch_parameters()):
            b += 0.1 * i * torch.rand(7)
    distance = copy.deepcopy(net).recover().distance
    tolerance = sorted(distance)[3] * (1 + 1e-9)
    recovery = net.recover(freeze_tol=tolerance)
    assert recovery.frozen == [d <= tolerance for d in distance] == net.frozen
    assert sum(recovery.frozen) == 4


def test_freezing_again_or_all_keeps_what_is_frozen():
    net = tiny(one_stage=True)
    net.freeze([False] * 7 + [True])
    net.freeze([True] + [False] * 7)
    assert net.frozen == [True] + [False] * 6 + [True]
    net.freeze()
    assert all(net.frozen) and not any(b.requires_grad for b in net.arch_parameters())
    assert all(p.requires_grad for p in net.weight_parameters())


def test_a_candidate_that_is_too_large_is_rejected_and_freezes_nothing():
    net = tiny(one_stage=True)
    set_support(net, lambda j: (0, 1))
    for b in net.arch_parameters():
        nn.init.normal_(b)
    candidate = copy.deepcopy(net)
    candidate.recover()
    plain = model.NetworkCIFAR(4, 10, 3, False, candidate.genotype(), True)
    size = sum(p.numel() for p in plain.parameters())
    before, genotype = copy.deepcopy(net.state_dict()), net.genotype()
    weights = [code.active_weights() for code in net.codes]
    recovery = net.recover(freeze_tol=1e9, max_params=size / 1e6)
    assert recovery.rejected and recovery.parameters == size
    assert not any(recovery.frozen) and not any(net.frozen) and net.genotype() == genotype
    assert all(b.requires_grad for b in net.arch_parameters())
    assert_same_state(net, before)
    for w, code in zip(weights, net.codes, strict=True):
        assert torch.equal(w, code.active_weights())
    before_and_after = ([z for code in n.codes for z in code.z] for n in (net, candidate))
    distance = [(z - y).norm().item() for z, y in zip(*before_and_after, strict=True)]
    assert recovery.distance == pytest.approx(distance)
    recovery = net.recover(freeze_tol=1e9, max_params=(size + 1) / 1e6)
    assert not recovery.rejected and all(net.frozen)
    assert net.genotype() == candidate.genotype()


def test_a_pruned_network_computes_the_same_and_loads_into_a_whole_one():
    net = tiny(one_stage=True).eval()
    randomize(net)
    net.recover(freeze_tol=1e9)
    x = torch.randn(2, 3, 16, 16)
    expected, total = net(x)[0], sum(p.numel() for p in net.parameters())
    dropped = net.prune()
    assert torch.equal(net(x)[0], expected)
    assert sum(p.numel() for p in net.parameters()) == total - sum(p.numel() for p in dropped)
    assert not net.prune(), "there is nothing more to drop"
    state = net.state_dict()
    other = tiny(one_stage=True).eval()
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)
    other.prune_like(state)
    other.load_state_dict(state)
    assert torch.equal(other(x)[0], expected) and all(other.frozen)
    assert [*other.state_dict()] == [*state]
    assert not any(b.requires_grad for b in other.arch_parameters())
    assert all(p.requires_grad for p in other.weight_parameters())
    whole = tiny(one_stage=True)
    names = [*whole.state_dict()]
    whole.prune_like(whole.state_dict())
    assert [*whole.state_dict()] == names


# ------------------------------------------------------------------------------------------------
# Absorption
# ------------------------------------------------------------------------------------------------

OPERATIONS_OF_NODE = [  # pairs of each node such that every operation runs, from both inputs
    lambda j: (j % 7, 7 + (j + 1) % 7),
    lambda j: ((j + 2) % 7, 7 + (j + 3) % 7),
    lambda j: ((j + 4) % 7, 7 + (j + 5) % 7),
    lambda j: ((j + 6) % 7, (j + 5) % 7),  # both on one edge
]


@pytest.mark.parametrize("numbers", OPERATIONS_OF_NODE)
@pytest.mark.parametrize("pruned", [False, True])
def test_absorption_keeps_the_outputs(numbers, pruned):
    net = Network(4, 10, 3, one_stage=True, auxiliary=True)
    randomize(net)
    with torch.no_grad():
        for b in net.arch_parameters():
            b *= 0.1  # so that the codes, with a sign of each, give the weights theirs
    set_support(net, numbers)
    weights = torch.cat([code.active_weights().flatten() for code in net.codes])
    assert (weights < 0).any() and (weights > 0).any()
    if pruned:
        net.prune()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(4, 3, 32, 32)
    plain = net.absorb()
    assert type(plain) is model.NetworkCIFAR and plain.training and net.training
    assert_same_state(net, before)
    with torch.no_grad():
        for a, b in zip(net(x), plain(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
        net.load_state_dict(before)
        plain = net.eval().absorb()
        assert not plain.training and not net.training
        expected, got = net(x)[0], plain(x)[0]
    assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.std() > 0.01, "logits that hardly vary would show nothing"


def test_absorption_of_a_supernet_for_imagenet():
    net = Network(4, 5, 4, one_stage=True, auxiliary=True, imagenet=True)
    randomize(net)
    set_support(net, OPERATIONS_OF_NODE[1])
    net.freeze()
    net.drop_path_prob = 0.25
    plain, x = net.absorb(), torch.randn(2, 3, 64, 64)
    assert type(plain) is model.NetworkImageNet and plain.drop_path_prob == 0.25
    for training in (True, False):
        outputs = []
        for network in (net, plain):
            torch.manual_seed(1)  # they drop the same paths
            with torch.no_grad():
                outputs.append(network.train(training)(x))
        (a, a_aux), (b, b_aux) = outputs
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
        assert (a_aux is None) == (b_aux is None) == (not training)
        if training:
            assert (a_aux - b_aux).abs().max() <= 1e-4 * a_aux.abs().max()
    assert net.retraining_parameters() == sum(
        p.numel() for name, p in plain.named_parameters() if "auxiliary" not in name
    )


def test_absorption_needs_the_supernet_of_one_stage_search():
    with pytest.raises(ValueError, match="one-stage"):
        tiny().absorb()


@pytest.mark.parametrize("answer", [
    4 * [[(0, 2), (0, 2)]], 4 * [[(0, 7), (1, 0)]], 4 * [[(2, 0), (1, 0)]], 4 * [[(0, 2)]],
    3 * [[(0, 2), (1, 2)]],
])
def test_a_wrong_answer_of_the_rule_is_refused(answer, monkeypatch):
    code = SparseCode()
    monkeypatch.setattr(SparseCode, "choose", lambda code, codes: answer)
    with pytest.raises(ValueError, match="SparseCode.choose returned"):
        code.recover()


@pytest.mark.parametrize("one_stage", [False, True])
def test_the_check_of_the_operations_draws_no_random_number(one_stage):
    state = torch.get_rng_state()
    model_search.check_operations(4, one_stage)
    assert torch.equal(torch.get_rng_state(), state)
