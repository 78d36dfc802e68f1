"""`layers.py` computes the same values as torch.nn; `layers.plain()` gives the reference.

Edited operations are tested in `test_edits.py`.
"""

import copy
import functools
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import genotypes
import layers
import search
import train
import utils
from genotypes import NODES, PRIMITIVES
from layers import weighted
from model import NetworkCIFAR, NetworkImageNet
from model_search import Network, randomize_norms, support_and_weights
from operations import build

# In float64, wrong terms exceed the tolerance and rounding errors do not.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 0.1}
SETTINGS = SimpleNamespace(
    learning_rate=0.1, momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4,
    arch_weight_decay=1e-3, grad_clip=0.5, auxiliary_weight=0.4, label_smoothing=0.1, amp=False,
    recover_every="epoch",
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(found, expected, name="", factor=1):
    """Compare by the largest difference, or in float32 by its norm.

    In float32, rounding changes single entries at random, because it can change the sign of the
    input of a ReLU.
    """
    assert (found is None) == (expected is None), name
    if expected is not None:
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        size = torch.linalg.norm if expected.dtype == torch.float32 else (lambda x: x.abs().max())
        error = (size(found - expected) / size(expected).clamp(min=1e-3)).item()
        assert error <= factor * TOLERANCE[expected.dtype], f"{name}: {error:.1e}"


def assert_same_as_plain(compute):
    """Compare the tensors that compute() returns with those of torch's layers."""
    found = compute()
    with layers.plain():
        expected = compute()
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def randomized(net):
    randomize_norms(net)
    return net


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def batch(n=4, size=16, dtype=torch.float64):
    return channels_last(torch.randn(n, 3, size, size, dtype=dtype)), torch.randint(10, (n,))


def statistics(net):
    return {k: v.clone() for k, v in net.named_buffers() if ".running_" in k}


def results(net, x, y, fixed="", memory_format=torch.contiguous_format):
    """Outputs, gradients and running statistics of one pass, which does not change the network.

    `fixed`, "weights" or "points", are parameters of a supernet that need no gradients.
    """
    net = copy.deepcopy(net).to(memory_format=memory_format)
    if fixed:
        for p in net.weight_parameters() if fixed == "weights" else net.arch_parameters():
            p.requires_grad_(False)
    torch.manual_seed(1)  # drop-path
    logits, logits_aux = net(x)
    loss = F.cross_entropy(logits, y)
    (loss if logits_aux is None else loss + 0.4 * F.cross_entropy(logits_aux, y)).backward()
    found = {"logits": logits, "logits_aux": logits_aux, **statistics(net)}
    found.update((f"gradient of {name}", p.grad) for name, p in net.named_parameters())
    return found


def compare(net, x, y, fixed="", training=True, drop_path_prob=0.0):
    """Compare a pass with that of torch's layers. Return the number of gradients."""
    net.train(training).drop_path_prob = drop_path_prob
    with layers.plain():
        expected = results(net, x.contiguous(), y, fixed)
    found = results(net, x, y, fixed, torch.channels_last)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, name)
    return sum("gradient" in name and value is not None for name, value in found.items())


def randomize_support(net, seed):
    """Give a supernet random supports with weights of order 1 and both signs.

    With seed 0, both pairs of a node are on the edge from the node before it.
    """
    rng = random.Random(seed)
    for code in net.codes:
        codes, support = [], []
        for j, z in enumerate(code.z):
            z = 1e-3 * torch.rand_like(z).numpy()
            pairs = rng.sample(range(len(z)), 2)
            if seed == 0:
                pairs = [7 * (j + 1) + op for op in rng.sample(range(7), 2)]
            z[pairs] = [rng.choice((-1, 1)) * rng.uniform(0.5, 1) for _ in pairs]
            codes.append(z)
            support.append([divmod(k, len(PRIMITIVES)) for k in sorted(pairs)])
        for b in code.b:
            nn.init.normal_(b, std=0.3)
        code.accept(codes, support)
    return randomized(net)


def supernet(seed, **kwargs):
    return randomize_support(Network(4, 10, 3, **kwargs).double(), seed)


# ------------------------------------------------------------------------------------------------
# Operations
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine, norm_skips", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("size, C, dtype", [
    (10, 6, torch.float64), (7, 36, torch.float64), (10, 6, torch.float32)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_operations_equal_torch_layers(primitive, stride, size, C, affine, norm_skips, dtype):
    if primitive == "skip_connect" and stride == 2 and size % 2:
        pytest.skip("FactorizedReduce requires even sizes")
    norms = dict(affine=affine, norm_pools=not affine or norm_skips, norm_skips=norm_skips)
    op = randomized(build(primitive, C, stride, **norms).to(dtype))
    values = channels_last(torch.randn(3, C, size, size, dtype=dtype))
    w = None if affine and not norm_skips else torch.tensor(-0.7, dtype=dtype, requires_grad=True)

    def compute(x):
        copied = copy.deepcopy(op)
        y, x_before = weighted(copied, x, w), x.detach().clone()
        inputs = [p for p in (x, w, *copied.parameters()) if p is not None and p.requires_grad]
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = torch.autograd.grad(y, inputs, g) if inputs else ()
        with torch.no_grad():
            without_grad = weighted(copied, x, w)
        assert torch.equal(x, x_before)
        return [y, *grads, without_grad, *statistics(copied).values()]

    for training, input_trains, weights_train in itertools.product((True, False), repeat=3):
        op.train(training).requires_grad_(weights_train)
        with layers.plain():
            expected = compute(values.clone(memory_format=torch.contiguous_format)
                               .requires_grad_(input_trains))
        found = compute(values.clone().requires_grad_(input_trains))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
            assert a.requires_grad == b.requires_grad


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("n", [4, 16])  # weight gradients use oneDNN for batches of 16 and more
def test_pointwise_convolutions_in_float32_equal_those_of_torch(monkeypatch, onednn, n):
    monkeypatch.setattr(layers, "USE_ONEDNN", onednn)
    conv = layers.Conv2d(12, 20, 1, bias=False)
    x = channels_last(torch.randn(n, 12, 9, 9)).requires_grad_()

    def compute():
        y = conv(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, conv.weight])]

    found = compute()
    with layers.plain():
        torch.testing.assert_close(found, compute(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_second_order_gradients_equal_those_of_torch_layers(primitive, stride):
    op = randomized(build(primitive, 4, stride, norm_pools=True, norm_skips=True).double())
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def compute():
        trained = [p for p in (x, w, *op.parameters()) if p.requires_grad]
        loss = weighted(op, x, w).square().sum()
        grads = torch.autograd.grad(loss, trained, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        return [*grads, *torch.autograd.grad(penalty, trained)]

    for weights_train in (True, False):
        op.requires_grad_(weights_train)
        assert_same_as_plain(compute)


# ------------------------------------------------------------------------------------------------
# ReLU
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [*itertools.combinations_with_replacement(PRIMITIVES, 2)])
def test_two_operations_can_read_the_same_input(names):
    """They have one ReLU in common, and must not change each other's output, input or gradient."""
    first, second = (randomized(build(name, 4, 1, norm_pools=True).double()) for name in names)
    values = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    x = 1 * values  # not a leaf, as in a network

    def compute():
        y = first(x) - 1.3 * second(x)
        return [y, *torch.autograd.grad(y.pow(2).sum(), [x])]

    assert_same_as_plain(compute)
    assert torch.equal(x, values)


def test_a_relu_is_computed_once_until_its_input_changes():
    relu = layers.ReLU()
    x = 1 * torch.randn(2, 4, 8, 8, requires_grad=True)
    assert relu(x) is relu(x) is layers.ReLU()(x)

    def check(x):
        assert torch.equal(relu(x), x.clamp(min=0))

    with torch.no_grad():
        check(x)
    torch.autograd.grad(relu(x).sum(), x)
    torch.autograd.grad(relu(x).sum(), x)  # the first backward pass has freed the graph
    x = x.detach()
    check(x)
    x.neg_()
    check(x)
    relu(x).add_(1)
    check(x)
    x.requires_grad_()
    relu(x).sum().backward()
    assert torch.equal(x.grad, (x > 0).float())
    with torch.inference_mode():
        x = torch.randn(3)
        check(x)
        x.neg_()
        check(x)


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2])
def test_two_stage_supernets_equal_torch_layers(seed):
    net, images = supernet(seed), batch()
    assert compare(net, *images, fixed="weights") == 2 * NODES  # the step that updates b
    assert compare(net, *images, fixed="points") > 20  # the step that updates the weights
    compare(net, *images, training=False)


@pytest.mark.parametrize("seed", [0, 2])
def test_one_stage_supernets_equal_torch_layers(seed):
    net, images = supernet(seed, one_stage=True, auxiliary=True), batch()
    net.freeze([seed > 1, False, False, True] * 2)
    assert compare(net, *images) > 20
    net.freeze()
    net.prune()
    compare(net, *images, drop_path_prob=0.5)
    compare(net, *images, training=False)


@pytest.mark.parametrize("name, size", [
    ("ISTA_twostage", 16), ("ISTA_onestage", 16), ("random:5", 20)])
def test_retraining_networks_equal_torch_layers(name, size):
    genotype, one_stage = genotypes.load(name)
    net = randomized(NetworkCIFAR(4, 10, 3, True, genotype, one_stage).double())
    images = batch(size=size)
    compare(net, *images)
    compare(net, *images, drop_path_prob=0.5)
    compare(net, *images, training=False)


def test_imagenet_networks_equal_torch_layers():
    compare(supernet(3, one_stage=True, auxiliary=True, imagenet=True), *batch(6, size=64))
    net = NetworkImageNet(4, 10, 3, True, genotypes.ISTA_ImageNet).double()
    compare(randomized(net), *batch(2, size=96))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_networks_without_gradients_equal_torch_layers(mode):
    net, (x, y) = supernet(1, one_stage=True), batch()
    for training in (True, False):
        with mode():
            logits, _ = copy.deepcopy(net).train(training)(x)
            with layers.plain():
                assert_close(logits, copy.deepcopy(net).train(training)(x)[0])
        assert not logits.requires_grad
    F.cross_entropy(net.train()(x)[0], y).backward()  # must not find cached inference tensors


@pytest.mark.parametrize("one_stage", [False, True])
def test_bfloat16_is_as_accurate_as_with_torch_layers(one_stage):
    """Compare errors with respect to float32, because rounding differs."""
    net = randomize_support(Network(4, 10, 3, one_stage=one_stage), 2)
    x, y = batch(8, dtype=torch.float32)
    exact = results(net, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(net, x, y)
        with layers.plain():
            expected = results(net, x, y)
    assert found["logits"].dtype == torch.bfloat16

    def error(found, key):
        names = [name for name, value in exact.items() if key in name and value is not None]
        a, b = (torch.cat([r[name].float().flatten() for name in names]) for r in (found, exact))
        return (a - b).norm() / b.norm()

    for key in ("logits", "gradient of cells", "gradient of normal_code", "running_var"):
        assert error(found, key) < 0.25, key
        assert error(found, key) < 2 * error(expected, key), key


def test_gradients_of_dilated_convolutions_in_bfloat16_ignore_freed_memory():
    """Those of torch are wrong on a CPU if freed memory contains a NaN."""
    op, x = build("dil_conv_3x3", 16, 1), channels_last(torch.randn(8, 16, 16, 16))
    g = torch.randn(8, 16, 16, 16)

    def gradient():
        return torch.autograd.grad((g * op(x)).sum(), op.op[1].weight)[0]

    expected = gradient()
    for _ in range(5):
        torch.full((2**18,), float("nan"))
        with torch.autocast("cpu", torch.bfloat16):
            found = gradient()
        assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_cells_can_be_checkpointed(use_reentrant):
    """Without checkpointing, neighboring cells use the same ReLU of their common input."""
    net, (x, _) = supernet(1), batch()
    gradients = []
    for run in (lambda cell, *args: cell(*args),
                functools.partial(checkpoint, use_reentrant=use_reentrant)):
        copied = copy.deepcopy(net)
        s0 = s1 = copied.stem(x)
        for cell in copied.cells:
            support, weights = support_and_weights(copied.codes[cell.reduction], x.dtype)
            s0, s1 = s1, run(cell, s0, s1, None, support, weights)
        s1.square().sum().backward()
        gradients.append([p.grad for p in copied.cells.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------


class Batches(list):
    def endless(self):
        return itertools.cycle(self)


def reference_step(net, optimizers, first, second=None):
    """Take a step with torch's optimizers; in two-stage search, `second` is the batch of b."""
    sgd, *adam = optimizers

    def backward(x, y):
        logits, logits_aux = net(x)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        if logits_aux is not None:
            loss = loss + 0.4 * F.cross_entropy(logits_aux, y, label_smoothing=0.1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()

    backward(*(second or first))
    for optimizer in adam:
        optimizer.step()
    if second:
        backward(*first)
    norm = clip_grad_norm_(sgd.param_groups[0]["params"], 0.5, foreach=False)
    assert norm > 0.5, "gradients are not clipped"
    sgd.step()


@pytest.mark.parametrize("kind", ["two-stage", "one-stage", "retraining"])
def test_epochs_equal_steps_of_torch_layers_and_optimizers(kind):
    if kind == "retraining":
        net = NetworkCIFAR(4, 10, 3, True, genotypes.ISTA_twostage).double()
    else:
        net = supernet(3, one_stage=kind == "one-stage", auxiliary=kind == "one-stage")
    if kind == "one-stage":
        net.freeze([False, True, False, False] * 2)
    found = copy.deepcopy(net).to(memory_format=torch.channels_last)
    batches, arch_batches = (Batches(batch(8) for _ in range(3)) for _ in range(2))
    run = SimpleNamespace(
        args=SETTINGS, progress=SimpleNamespace(step=lambda meter: None), warn=None)
    if kind == "retraining":
        train.train_epoch(found, batches, utils.sgd(found.parameters(), SETTINGS), run)
    elif kind == "one-stage":
        search.one_stage_epoch(found, batches, *search.optimizers(found, SETTINGS), run)
    else:
        optimizers = search.optimizers(found, SETTINGS)
        search.two_stage_epoch(found, batches, arch_batches, *optimizers, run)

    weights = net.parameters() if kind == "retraining" else net.weight_parameters()
    optimizers = [torch.optim.SGD(weights, 0.1, 0.9, weight_decay=3e-4, foreach=False)]
    if kind != "retraining":
        optimizers.append(torch.optim.Adam(
            net.arch_parameters(), 6e-4, (0.5, 0.999), weight_decay=1e-3, foreach=False))
    before = [p.detach().clone() for p in net.parameters()]
    with layers.plain():
        for first, second in zip(batches, arch_batches, strict=True):
            reference_step(net, optimizers, first, second if kind == "two-stage" else None)
    changed = 0
    for (name, p), q, start in zip(
        net.named_parameters(), found.parameters(), before, strict=True
    ):
        assert_close(q.detach(), p.detach(), name, factor=1e3)  # steps amplify rounding errors
        changed += not torch.equal(p, start)
    assert changed > 20
    for (name, a), b in zip(statistics(found).items(), statistics(net).values(), strict=True):
        assert_close(a, b, name, factor=1e3)


def test_each_step_of_two_stage_search_computes_only_its_own_gradients():
    net = supernet(1)
    weight_optimizer, arch_optimizer = search.optimizers(net, SETTINGS)
    for step, updated, fixed in (
        (search.arch_step, net.arch_parameters(), net.weight_parameters()),
        (search.weight_step, net.weight_parameters(), net.arch_parameters()),
    ):
        net.zero_grad()
        step(net, *batch(), weight_optimizer, arch_optimizer, SETTINGS)
        assert any(p.grad is not None for p in updated)
        assert all(p.grad is None and p.requires_grad for p in fixed)
