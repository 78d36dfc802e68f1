"""The sparse supernet: codes, weights, support, and one-stage search."""

import copy
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
from genotypes import NODES, PRIMITIVES, by_node
from model_search import Network, SparseCode
from operations import last_norm

SIZES = [7 * (j + 2) for j in range(NODES)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**kwargs):
    return Network(4, 10, 3, **kwargs)


def set_support(net, numbers):
    """Give each node j the pairs with the numbers numbers(j), by codes that are largest there."""
    for code in net.codes:
        codes = [np.zeros(n) for n in SIZES]
        for j, z in enumerate(codes):
            z[list(numbers(j))] = (torch.rand(2).numpy() + 0.5) * [1, -1]
        code.accept(codes, code.choose(codes))


@torch.no_grad()
def randomize(net):
    """Give the points b and the BatchNorms random values."""
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
def test_shapes_and_distributions_of_dictionaries_and_points(dictionary):
    code = SparseCode(proj_dims=5, sparseness=3, dictionary=dictionary)
    assert [A.shape for A in code.A] == [(5, n) for n in SIZES]
    assert [z.shape for z in code.z] == [(n,) for n in SIZES]
    assert [b.shape for b in code.b] == [(5,)] * 4
    assert {t.dtype for t in [*code.A, *code.z]} == {torch.float64}
    assert all(0 < b.abs().max() < 1e-2 for b in code.b)
    entries = torch.cat([A.flatten() for A in code.A])
    if dictionary == "uniform":
        assert 0 <= entries.min() < 0.05 and 0.95 < entries.max() < 1
    else:
        assert abs(entries.mean()) < 0.1
        assert all(torch.allclose(A.norm(dim=0), A.new_ones(())) for A in code.A)


def test_dictionaries_and_points_of_a_seed_never_change():
    net = tiny()  # old runs can be repeated by their seeds
    assert net.normal_code.A[0][0, :2].tolist() == [0.32725104836034624, 0.6832509054721009]
    # The last bit of a normal number depends on the processor.
    assert net.reduce_code.b[3][-1].item() == pytest.approx(-0.001659997971728444)
    assert net.genotype().normal[:3] == [
        ("sep_conv_3x3", 0), ("dil_conv_3x3", 1), ("max_pool_3x3", 0),
    ]


def test_recover_solves_the_problem_of_the_current_tensors():
    code = SparseCode(lam=1e-3)
    with torch.no_grad():  # write in place
        for A, b, z in zip(code.A, code.b, code.z, strict=True):
            A.copy_(torch.rand_like(A))
            b.copy_(torch.randn_like(b))
            z.copy_(torch.randn_like(z))
    assert code.recover() == 0
    for A, b, z, support in zip(code.A, code.b, code.z, code.support, strict=True):
        point = b.detach().double().numpy()
        gap = ista.duality_gap(A.numpy(), point, z.numpy(), 1e-3)
        assert gap <= 1e-9 * 0.5 * point @ point
        largest = z.abs().topk(2).indices.sort().values
        assert support == [divmod(k, 7) for k in largest.tolist()]


def entries(n):
    """Codes with n entries from few values, so that there are ties and zeros."""
    values = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 2.0])
    return st.lists(values, min_size=n, max_size=n).map(np.array)


@settings(max_examples=100, deadline=None)
@given(codes=st.tuples(*map(entries, SIZES)), distinct_edges=st.booleans())
def test_the_support_has_the_largest_entries_of_all_or_of_distinct_edges(codes, distinct_edges):
    torch.manual_seed(0)
    code = SparseCode(distinct_edges=distinct_edges)
    last = code.support
    support = code.choose(codes)
    assert code.support is last, "choose does not change the code"
    for z, old, node in zip(codes, last, support, strict=True):
        n = len(PRIMITIVES)
        edges = [range(e * n, e * n + n) for e in range(len(z) // n)]
        old = {edge * n + op for edge, op in old}
        # Largest |z| first; among zeros those of the last support; then the smaller number.
        order = sorted(range(len(z)), key=lambda k: (-abs(z[k]), z[k] == 0 and k not in old, k))
        if distinct_edges:
            order = sorted((min(edge, key=order.index) for edge in edges), key=order.index)
        assert node == [divmod(k, n) for k in sorted(order[:2])]


@pytest.mark.parametrize("sparseness", [1, 2, 5])
def test_weights_follow_the_formula_and_their_gradient_is_the_dictionary(sparseness):
    code = SparseCode(sparseness=sparseness)
    for b in code.b:
        nn.init.normal_(b)
    code.recover()
    with torch.no_grad():
        for b in code.b:
            b += 0.25  # only b changes until the next recovery
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
        torch.testing.assert_close(code.active_weights()[j], node[S])
        for k in S:
            (grad,) = torch.autograd.grad(node[k], b, retain_graph=True)
            torch.testing.assert_close(grad, A[:, k].float())
        first += j + 2


def test_homotopy_replaces_a_solver_that_does_not_converge(monkeypatch):
    exact, other = SparseCode(), SparseCode()
    other.load_state_dict(exact.state_dict())
    for code in (exact, other):
        for b in code.b:
            b.data = torch.linspace(-1, 1, 7)
    assert exact.recover() == 0
    monkeypatch.setattr(ista, "MAX_ITER", 5)
    assert other.recover("ista") == 4 and other.support == exact.support
    for a, b in zip(other.z, exact.z, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("answer", [
    4 * [[(0, 2), (0, 2)]], 4 * [[(2, 0), (1, 0)]], 4 * [[(0, 2)]], 3 * [[(0, 2), (1, 2)]],
], ids=["equal pairs", "no such edge", "one pair", "three nodes"])
def test_an_invalid_answer_of_choose_is_refused(answer, monkeypatch):
    code = SparseCode()
    monkeypatch.setattr(SparseCode, "choose", lambda code, codes: answer)
    with pytest.raises(ValueError, match="SparseCode.choose returned"):
        code.recover()


# ------------------------------------------------------------------------------------------------
# State and names
# ------------------------------------------------------------------------------------------------


def test_the_state_dict_contains_codes_and_frozen_nodes():
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
    assert [b.requires_grad for b in other.arch_parameters()] == [False] + [True] * 7
    assert copy.deepcopy(net).genotype() == net.genotype()


def test_weight_parameters_and_arch_parameters_divide_the_parameters():
    net = tiny(one_stage=True, auxiliary=True)
    arch, weights = net.arch_parameters(), net.weight_parameters()
    assert [id(p) for p in arch] == [id(p) for p in [*net.normal_code.b, *net.reduce_code.b]]
    assert len(weights) + len(arch) == len(list(net.parameters()))
    assert not {id(p) for p in weights} & {id(p) for p in arch}


def test_state_dict_keys_are_those_of_darts():
    keys = set(tiny().state_dict())
    for key in (
        "stem.0.weight", "cells.0.preprocess0.op.1.weight", "cells.2.preprocess0.conv_2.weight",
        "cells.0._ops.0._ops.0.1.running_mean", "cells.1._ops.0._ops.2.bn.running_mean",
        "cells.2._ops.5._ops.3.op.7.running_var", "classifier.bias",
    ):
        assert key in keys
    affine = [key for key in keys if re.match(r"cells.*(bn|op\.[23])\.bias", key)]
    assert not affine, "BatchNorm in the cells of the two-stage supernet has no γ and β"
    others = {key for key in keys if not key.startswith(("stem", "cells", "classifier"))}
    assert all(key.startswith(("normal_code.", "reduce_code.")) for key in others)


# ------------------------------------------------------------------------------------------------
# Forward pass and genotype
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_stage", [False, True])
def test_only_operations_of_the_support_run_and_get_gradients(one_stage):
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


def test_the_genotype_lists_the_support_by_node_and_operation():
    net = tiny()
    set_support(net, lambda j: (j * 7 + 3, 9))
    pairs = [("sep_conv_3x3", 0), ("skip_connect", 1), ("skip_connect", 1), ("sep_conv_3x3", 1),
             ("skip_connect", 1), ("sep_conv_3x3", 2), ("skip_connect", 1), ("sep_conv_3x3", 3)]
    genotype = net.genotype()
    assert genotype.normal == genotype.reduce == pairs
    assert list(genotype.normal_concat) == [2, 3, 4, 5]
    weights = net.describe()["reduce_weights"]
    assert weights == net.reduce_code.active_weights().flatten().tolist()


# ------------------------------------------------------------------------------------------------
# Recoveries
# ------------------------------------------------------------------------------------------------


def test_a_frozen_node_keeps_its_pairs_whatever_choose_returns(monkeypatch):
    net = tiny(one_stage=True)
    net.freeze([False, True] + [False] * 6)
    last = net.genotype()
    answer = [[(j, 6), (j + 1, 5)] for j in range(NODES)]
    monkeypatch.setattr(SparseCode, "choose", lambda code, codes: np.array(answer))
    net.recover()
    chosen = [[("dil_conv_5x5", j), ("dil_conv_3x3", j + 1)] for j in range(NODES)]
    assert by_node(net.genotype().reduce) == chosen
    chosen[1] = by_node(last.normal)[1]
    assert by_node(net.genotype().normal) == chosen


def test_a_code_with_too_few_entries_keeps_pairs_and_does_not_freeze():
    net = tiny(one_stage=True, lam=1e-3)
    randomize(net)
    lam = min(net.recover().lam_max)  # so that a code becomes 0
    last = net.genotype()
    for code in net.codes:
        code.lam = lam
    recovery = net.recover(freeze_tol=1e9)
    assert 0 < sum(recovery.too_sparse) < 8
    nodes = [(code, j) for code in net.codes for j in range(NODES)]
    old, new = (by_node(g.normal) + by_node(g.reduce) for g in (last, net.genotype()))
    for i, (code, j) in enumerate(nodes):
        A, b, z = code.A[j], code.b[j].detach().double(), code.z[j]
        assert recovery.lam_max[i] == pytest.approx((A.T @ b).abs().max().item())
        assert (z == 0).all() == (lam >= recovery.lam_max[i])
        assert recovery.too_sparse[i] == (z.count_nonzero() < 2)
        assert net.frozen[i] == recovery.frozen[i] == (not recovery.too_sparse[i])
        assert len({*new[i]} & {*old[i]}) >= 2 - z.count_nonzero()


# ------------------------------------------------------------------------------------------------
# One-stage search
# ------------------------------------------------------------------------------------------------


def norms(net, code, j):
    """The BatchNorms of all operations of node j."""
    return [
        layer
        for cell in net.cells
        if net.codes[cell.reduction] is code
        for layer in cell.edges(j).modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]


def take_steps(net, optimizers, n):
    for _ in range(n):
        logits, logits_aux = net(torch.randn(4, 3, 16, 16))
        labels = torch.arange(4)
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits_aux, labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def test_freezing_fixes_b_and_trains_the_batch_norms_of_the_node():
    net = tiny(one_stage=True, auxiliary=True)
    optimizers = (
        torch.optim.Adam(net.arch_parameters(), 0.1, weight_decay=0.1),
        torch.optim.SGD(net.weight_parameters(), 0.1, 0.9, weight_decay=0.1),
    )
    take_steps(net, optimizers, 2)
    for code in net.codes:
        for j in range(4):
            for layer in norms(net, code, j):
                assert (layer.weight == 1).all() and (layer.bias == 0).all()
    others = [net.stem[1], net.cells[0].preprocess0.op[2], net.auxiliary_head.features[3]]
    assert all((layer.weight != 1).any() for layer in others)

    net.freeze([False, True] + [False] * 6)
    frozen = net.normal_code
    points = [b.detach().clone() for b in net.arch_parameters()]
    z = frozen.z[1].clone()
    take_steps(net, optimizers, 3)
    changed = [not torch.equal(a, b) for a, b in zip(points, net.arch_parameters(), strict=True)]
    assert changed == [True, False] + [True] * 6
    recovery = net.recover()
    assert recovery.distance[1] == 0 and torch.equal(frozen.z[1], z)
    assert recovery.distance[0] > 0 and recovery.frozen == [False, True] + [False] * 6
    for code in net.codes:
        for j in range(4):
            is_frozen = code is frozen and j == 1
            for layer in norms(net, code, j):
                assert layer.weight.requires_grad == is_frozen
                assert is_frozen or (layer.weight == 1).all()
    edge, op = frozen.support[1][0]
    assert (last_norm(net.cells[0].edges(1)[edge]._ops[op]).weight != 1).any()


def test_nodes_freeze_when_their_codes_change_by_at_most_the_tolerance():
    net = tiny(one_stage=True)
    with torch.no_grad():
        for i, b in enumerate(net.arch_parameters()):
            b += 0.1 * i * torch.rand(7)
    distance = copy.deepcopy(net).recover().distance
    tolerance = sorted(distance)[3] * (1 + 1e-9)
    recovery = net.recover(freeze_tol=tolerance)
    assert recovery.frozen == [d <= tolerance for d in distance] == net.frozen
    assert sum(recovery.frozen) == 4


def test_a_candidate_that_is_too_large_is_rejected_and_changes_nothing():
    net = tiny(one_stage=True)
    set_support(net, lambda j: (0, 1))
    for b in net.arch_parameters():
        nn.init.normal_(b)
    candidate = copy.deepcopy(net)
    expected = candidate.recover()
    plain = model.NetworkCIFAR(4, 10, 3, False, candidate.genotype(), one_stage=True)
    size = sum(p.numel() for p in plain.parameters())
    before, genotype = copy.deepcopy(net.state_dict()), net.genotype()
    recovery = net.recover(freeze_tol=1e9, max_params=size / 1e6)
    assert recovery.rejected and recovery.parameters == size
    assert recovery.distance == expected.distance
    assert not any(recovery.frozen) and not any(net.frozen) and net.genotype() == genotype
    assert all(b.requires_grad for b in net.arch_parameters())
    assert_same_state(net, before)
    recovery = net.recover(freeze_tol=1e9, max_params=(size + 1) / 1e6)
    assert not recovery.rejected and all(net.frozen)
    assert net.genotype() == candidate.genotype()


def test_a_pruned_network_has_the_same_outputs_and_can_be_loaded():
    net = tiny(one_stage=True).eval()
    randomize(net)
    net.recover(freeze_tol=1e9)
    x = torch.randn(2, 3, 16, 16)
    expected, total = net(x)[0], sum(p.numel() for p in net.parameters())
    deleted = net.prune()
    assert torch.equal(net(x)[0], expected)
    assert sum(p.numel() for p in net.parameters()) == total - sum(p.numel() for p in deleted)
    state, other = net.state_dict(), tiny(one_stage=True).eval()
    other.prune_like(state)
    other.load_state_dict(state)
    assert torch.equal(other(x)[0], expected) and all(other.frozen)
    full = tiny(one_stage=True)
    names = [*full.state_dict()]
    full.prune_like(full.state_dict())
    assert [*full.state_dict()] == names


# ------------------------------------------------------------------------------------------------
# Absorption
# ------------------------------------------------------------------------------------------------

# Pairs of each node. Together they contain each operation, on both inputs of a cell.
SUPPORTS = [
    lambda j: (j % 7, 7 + (j + 1) % 7),
    lambda j: ((j + 2) % 7, 7 + (j + 3) % 7),
    lambda j: ((j + 4) % 7, 7 + (j + 5) % 7),
    lambda j: ((j + 6) % 7, (j + 5) % 7),  # both pairs on one edge
]


@pytest.mark.parametrize("numbers", SUPPORTS)
@pytest.mark.parametrize("pruned", [False, True])
def test_absorption_keeps_the_outputs(numbers, pruned):
    net = tiny(one_stage=True, auxiliary=True)
    randomize(net)
    with torch.no_grad():
        for b in net.arch_parameters():
            b *= 0.1  # so that the codes decide the signs of the weights
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
        expected, got = net(x)[0], plain(x)[0]
    assert not plain.training and expected.std() > 0.01
    assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()


def test_absorption_keeps_the_outputs_of_a_network_for_imagenet():
    net = Network(4, 5, 4, one_stage=True, auxiliary=True, imagenet=True)
    randomize(net)
    set_support(net, SUPPORTS[1])
    net.drop_path_prob = 0.25
    plain, x = net.absorb(), torch.randn(2, 3, 64, 64)
    assert type(plain) is model.NetworkImageNet and plain.drop_path_prob == 0.25
    for training in (True, False):
        outputs = []
        for network in (net, plain):
            torch.manual_seed(1)  # to drop the same paths
            with torch.no_grad():
                outputs.append(network.train(training)(x))
        (a, a_aux), (b, b_aux) = outputs
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
        if training:
            assert (a_aux - b_aux).abs().max() <= 1e-4 * a_aux.abs().max()
        else:
            assert a_aux is b_aux is None


def test_a_two_stage_supernet_cannot_be_absorbed():
    with pytest.raises(ValueError, match="one-stage"):
        tiny().absorb()


@pytest.mark.parametrize("one_stage", [False, True])
def test_checking_the_operations_draws_no_random_number(one_stage):
    state = torch.get_rng_state()
    model_search.check_operations(4, one_stage)
    assert torch.equal(torch.get_rng_state(), state)
