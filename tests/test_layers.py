"""The layers of `layers.py` compute what torch.nn's do, and `layers.plain()` is the reference.

What happens to edited operations is in `test_edits.py`.
"""

import copy
import functools
import itertools
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scripts import ROOT
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import genotypes
import layers
import search
import train
import utils
from genotypes import NODES, PRIMITIVES
from layers import weighted
from model import NetworkCIFAR, NetworkImageNet
from model_search import Network
from operations import ReLUConvBN, SepConv, build

# Float64 tells a wrong term from rounding; float32 is what people run.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 0.1}
SETTINGS = SimpleNamespace(
    learning_rate=0.1, momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4,
    arch_weight_decay=1e-3, grad_clip=0.5, auxiliary_weight=0.4, label_smoothing=0.1, amp=False,
    recover_every="epoch",
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(ours, plain, what="", factor=1):
    """The difference is within the tolerance: its largest entry, or in float32 its norm.

    In float32, rounding decides on which side of a ReLU some entries fall.
    """
    assert (ours is None) == (plain is None), what
    if plain is not None:
        assert ours.shape == plain.shape and ours.dtype == plain.dtype, what
        size = torch.linalg.norm if plain.dtype == torch.float32 else (lambda x: x.abs().max())
        error = (size(ours - plain) / size(plain).clamp(min=1e-3)).item()
        assert error <= factor * TOLERANCE[plain.dtype], f"{what}: {error:.1e}"


def shuffle(net):
    """Give γ, β and the running statistics values that are not those of the start."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return net


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def batch(n=4, size=16, dtype=torch.float64):
    return channels_last(torch.randn(n, 3, size, size, dtype=dtype)), torch.randint(10, (n,))


def statistics(net):
    return {k: v.clone() for k, v in net.named_buffers() if ".running_" in k}


def results(net, x, y, fixed=""):
    """Outputs, gradients and running statistics of one pass; the net stays as it is.

    `fixed`, "weights" or "points", are parameters of a supernet that need no gradients.
    """
    before = statistics(net)
    trains = {p: p.requires_grad for p in net.parameters()}
    if fixed:
        for p in net.weight_parameters() if fixed == "weights" else net.arch_parameters():
            p.requires_grad_(False)
    torch.manual_seed(1)  # drop-path
    logits, logits_aux = net(x)
    loss = F.cross_entropy(logits, y)
    (loss if logits_aux is None else loss + 0.4 * F.cross_entropy(logits_aux, y)).backward()
    found = {"logits": logits, "logits_aux": logits_aux, **statistics(net)}
    for name, p in net.named_parameters():
        found[f"gradient of {name}"], p.grad = p.grad, None
        p.requires_grad_(trains[p])
    for name, value in before.items():
        net.get_buffer(name).copy_(value)
    return found


def compare(net, x, y, fixed="", training=True, drop_path_prob=0.0):
    """A pass equals that of torch's layers; returns the number of gradients."""
    net.train(training).drop_path_prob = drop_path_prob
    with layers.plain():
        expected = results(net, x.contiguous(), y, fixed)
    found = results(copy.deepcopy(net).to(memory_format=torch.channels_last), x, y, fixed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, name)
    return sum("gradient" in name and value is not None for name, value in found.items())


def randomized(net, seed):
    """A supernet with random supports, weights of order 1 and either sign; seed 0: one edge."""
    rng = random.Random(seed)
    for code in net.codes:
        codes, support = [], []
        for j, z in enumerate(code.z):
            z = 1e-3 * torch.rand_like(z).numpy()  # off the support; has no part in the weights
            pairs = rng.sample(range(len(z)), 2)
            if seed == 0:  # both on the edge from the newest node
                pairs = [7 * (j + 1) + op for op in rng.sample(range(7), 2)]
            z[pairs] = [rng.choice((-1, 1)) * rng.uniform(0.5, 1) for _ in pairs]
            codes.append(z)
            support.append([divmod(k, len(PRIMITIVES)) for k in sorted(pairs)])
        for b in code.b:
            nn.init.normal_(b, std=0.3)
        code.accept(codes, support)
    return shuffle(net)


def supernet(seed, **kwargs):
    return randomized(Network(4, 10, 3, **kwargs).double(), seed)


# ------------------------------------------------------------------------------------------------
# Operations
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine, norm_skips", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("size, C, dtype", [
    (10, 6, torch.float64), (7, 36, torch.float64), (10, 6, torch.float32)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_operations(primitive, stride, size, C, affine, norm_skips, dtype):
    if primitive == "skip_connect" and stride == 2 and size % 2:
        pytest.skip("FactorizedReduce halves even sizes only")
    norms = dict(affine=affine, norm_pools=not affine or norm_skips, norm_skips=norm_skips)
    op = shuffle(build(primitive, C, stride, **norms).to(dtype))
    values = channels_last(torch.randn(3, C, size, size, dtype=dtype))
    w = None if affine and not norm_skips else torch.tensor(-0.7, dtype=dtype, requires_grad=True)

    def outcome(x):
        reset = copy.deepcopy(op)
        y, x_before = weighted(reset, x, w), x.detach().clone()
        inputs = [p for p in (x, w, *reset.parameters()) if p is not None and p.requires_grad]
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = torch.autograd.grad(y, inputs, g) if inputs else ()
        with torch.no_grad():
            again = weighted(reset, x, w)
        assert torch.equal(x, x_before), "a shared input is not overwritten"
        return [y, *grads, again, *statistics(reset).values()]

    for training, input_trains, weights_train in itertools.product((True, False), repeat=3):
        op.train(training).requires_grad_(weights_train)
        with layers.plain():
            expected = outcome(values.clone(memory_format=torch.contiguous_format)
                               .requires_grad_(input_trains))
        found = outcome(values.clone().requires_grad_(input_trains))
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
            assert a.requires_grad == b.requires_grad


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("n", [4, 16])  # oneDNN has weight gradients of its own from 16 on
def test_pointwise_convolutions_in_float32(monkeypatch, onednn, n):
    monkeypatch.setattr(layers, "ONEDNN", onednn)
    conv = layers.Conv2d(12, 20, 1, bias=False)
    x = channels_last(torch.randn(n, 12, 9, 9)).requires_grad_()
    g = channels_last(torch.randn(n, 20, 9, 9))

    def outcome():
        y = conv(x)
        return [y, *torch.autograd.grad(y, [x, conv.weight], g)]

    found = outcome()
    with layers.plain():
        for a, b in zip(found, outcome(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_second_order_gradients(primitive, stride):
    op = shuffle(build(primitive, 4, stride, norm_pools=True, norm_skips=True).double())
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for weights_train in (True, False):
        op.requires_grad_(weights_train)
        trained = [p for p in (x, w, *op.parameters()) if p.requires_grad]

        def second_order(trained=trained):
            loss = weighted(op, x, w).square().sum()
            grads = torch.autograd.grad(loss, trained, create_graph=True)
            penalty = sum(g.square().sum() for g in grads)
            return [*grads, *torch.autograd.grad(penalty, trained)]

        found = second_order()
        with layers.plain():
            for a, b in zip(found, second_order(), strict=True):
                assert_close(a, b)


# ------------------------------------------------------------------------------------------------
# The ReLU that operations share
# ------------------------------------------------------------------------------------------------


def two_outputs(first, second, x):
    """first(x) + second(x), and its gradient."""
    y = first(x) - 1.3 * second(x)
    return [y, *torch.autograd.grad(y.pow(2).sum(), [x])]


@pytest.mark.parametrize("names", [*itertools.combinations_with_replacement(PRIMITIVES, 2)])
def test_two_operations_on_one_input(names):
    """They share its ReLU; neither may spoil it, the input or a gradient for the other."""
    ops = [shuffle(build(name, 4, 1, norm_pools=True).double()) for name in names]
    values = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    x = 1 * values  # no leaf, as inside of a network
    found = two_outputs(*ops, x)
    assert torch.equal(x, values)
    with layers.plain():
        for a, b in zip(found, two_outputs(*ops, x), strict=True):
            assert_close(a, b)


def test_a_shared_relu_is_computed_once_and_never_stale():
    relu = layers.ReLU()
    values = torch.randn(2, 4, 8, 8, requires_grad=True)
    x = 1 * values
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
    relu(x).add_(1)  # somebody writes into the output
    check(x)
    x.requires_grad_()
    relu(x).sum().backward()
    assert torch.equal(x.grad, (x > 0).float())
    with torch.inference_mode():
        inside = torch.randn(3)
        check(inside)
        inside.neg_()
        check(inside)


# ------------------------------------------------------------------------------------------------
# The weight of a pair
# ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """An operation that somebody pastes in: it has no argument pair_weight."""

    def __init__(self):
        super().__init__()
        self.op = SepConv(4, 3, 1)

    def forward(self, x):
        return x + self.op(x)


def hooked(kind):
    op, seen = SepConv(4, 3, 1), []
    if kind == "forward":
        op.register_forward_hook(lambda op, x, y: seen.append(y))
    elif kind == "inner":
        op.op[-1].register_forward_hook(lambda op, x, y: 2 * y)
    elif kind == "pre":
        op.op[1].register_forward_pre_hook(lambda op, x: (3 * x[0] + 1,))
    else:
        op.op[0].register_full_backward_hook(lambda op, g, _: (2 * g[0],))
    return op


@pytest.mark.parametrize("make", [
    lambda: SepConv(4, 3, 1), Residual, lambda: nn.Conv2d(4, 4, 1), lambda: nn.Identity(),
    lambda: layers.Sequential(Residual(), nn.ReLU()), lambda: layers.BatchNorm2d(4, momentum=None),
    lambda: layers.BatchNorm2d(4, track_running_stats=False),
    *(lambda kind=kind: hooked(kind) for kind in ("forward", "inner", "pre", "backward")),
])
def test_weighted_is_the_weight_times_the_output(make):
    op = shuffle(make().double()) if not isinstance(make(), nn.BatchNorm2d) else make().double()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(-1.7, dtype=torch.float64, requires_grad=True)

    def outcome(function):
        y = function(copy.deepcopy(op))
        return [y, *torch.autograd.grad(y.square().sum(), [x, w])]

    found = outcome(lambda op: weighted(op, x, w))
    with layers.plain():
        for a, b in zip(found, outcome(lambda op: w * op(x)), strict=True):
            assert_close(a, b)


def test_hooks_see_the_output_without_the_weight():
    op, x, seen = SepConv(4, 3, 1).eval(), torch.randn(2, 4, 8, 8), []
    expected = op(x)
    inner = op.op[-1].register_forward_hook(lambda op, x, y: seen.append(y))
    weighted(op, x, torch.tensor(3.0))
    inner.remove()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda layer, x, y: seen.append(y) if layer is op else None)
    weighted(op, x, torch.tensor(3.0))
    everywhere.remove()
    assert len(seen) == 2
    for y in seen:
        torch.testing.assert_close(y, expected)


def test_a_forward_that_is_replaced_is_asked_for_its_arguments_again(monkeypatch):
    op, x, w = SepConv(4, 3, 1).eval(), torch.randn(2, 4, 8, 8), torch.tensor(3.0)
    weighted(op, x, w)
    monkeypatch.setattr(SepConv, "forward", lambda op, x: x + op.op(x))
    torch.testing.assert_close(weighted(op, x, w), 3 * (x + op.op(x)))
    op.forward = lambda x: 2 * x
    torch.testing.assert_close(weighted(op, x, w), 6 * x)


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2])
def test_two_stage(seed):
    net, images = supernet(seed), batch()
    assert compare(net, *images, fixed="weights") == 2 * NODES  # the step on b
    assert compare(net, *images, fixed="points") > 20  # the step on the weights
    compare(net, *images, training=False)


@pytest.mark.parametrize("seed", [0, 2])
def test_one_stage(seed):
    """γ and β are computed with while they are held: `requires_grad` changes no output."""
    net, images = supernet(seed, one_stage=True, auxiliary=True), batch()
    net.freeze([seed > 1, False, False, True] * 2)
    assert compare(net, *images) > 20
    net.freeze()
    net.prune()
    compare(net, *images, drop_path_prob=0.5)
    compare(net, *images, training=False)


def test_supernet_for_imagenet():
    compare(supernet(3, one_stage=True, auxiliary=True, imagenet=True), *batch(6, size=64))


@pytest.mark.parametrize("name, size", [("ISTA_twostage", 16), ("ISTA_onestage", 16),
                                        ("random:5", 20), ("random:6", 12)])
def test_retraining(name, size):
    genotype, one_stage = genotypes.load(name)
    net, images = shuffle(NetworkCIFAR(4, 10, 3, True, genotype, one_stage).double()), batch(
        size=size)
    compare(net, *images)
    compare(net, *images, drop_path_prob=0.5)
    compare(net, *images, training=False)


def test_retraining_for_imagenet():
    net = shuffle(NetworkImageNet(4, 10, 3, True, genotypes.ISTA_ImageNet).double())
    compare(net, *batch(2, size=96))


@pytest.mark.parametrize("net", [
    lambda: supernet(1, one_stage=True),
    lambda: NetworkCIFAR(4, 10, 3, False, genotypes.ISTA_twostage).double(),
])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(net, mode):
    net, (x, y) = net(), batch()
    for training in (True, False):
        with mode():
            logits, _ = copy.deepcopy(net).train(training)(x)
            with layers.plain():
                assert_close(logits, copy.deepcopy(net).train(training)(x)[0])
        assert not logits.requires_grad
    F.cross_entropy(net.train()(x)[0], y).backward()  # what inference mode has left is no obstacle


@pytest.mark.parametrize("one_stage", [False, True])
def test_autocast(one_stage):
    """In bfloat16 the two forms do not round alike, but one is as near the truth as the other."""
    net = randomized(Network(4, 10, 3, one_stage=one_stage), 2)
    x, y = batch(8, dtype=torch.float32)
    truth = results(net, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(net, x, y)
        with layers.plain():
            plain = results(net, x, y)
    assert ours["logits"].dtype == torch.bfloat16

    def error(found, what):
        names = [k for k, v in truth.items() if what in k and v is not None]
        a, b = (torch.cat([r[k].float().flatten() for k in names]) for r in (found, truth))
        return (a - b).norm() / b.norm()

    for what in ("logits", "gradient of cells", "gradient of normal_code", "running_var"):
        assert error(ours, what) < 0.25, what
        assert error(ours, what) < 2 * error(plain, what), what


@pytest.mark.parametrize("k", [3, 5])
def test_gradients_of_dilated_convolutions_in_bfloat16(k):
    """torch's own are wrong on a CPU, where freed memory holds a NaN."""
    op, x = build(f"dil_conv_{k}x{k}", 16, 1), channels_last(torch.randn(8, 16, 16, 16))
    g = torch.randn(8, 16, 16, 16)

    def gradient():
        return torch.autograd.grad((g * op(x)).sum(), op.op[1].weight)[0]

    expected = gradient()
    for _ in range(5):
        torch.full((2**18,), float("nan"))
        with torch.autocast("cpu", torch.bfloat16):
            found = gradient()
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_copies_parametrizations_and_averages():
    net, (x, _) = supernet(2), batch()
    average = AveragedModel(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    net.recover()
    average.update_parameters(net)
    average.update_parameters(net)
    with torch.no_grad():
        for mean, p in zip(average.module.parameters(), net.parameters(), strict=True):
            mean.copy_(p)
    assert average.module.genotype() == net.genotype()
    assert_close(average.eval()(x)[0], net.eval()(x)[0])
    op = SepConv(4, 3, 1).double()
    parametrizations.weight_norm(op.op[1])
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    found = op(images)
    with layers.plain():
        assert_close(found, copy.deepcopy(op)(images))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_cells_can_be_checkpointed(use_reentrant):
    """Neighboring cells read the same tensor, and share its ReLU."""
    net, (x, _) = supernet(1), batch()
    found = []
    for run in (lambda cell, *args: cell(*args),
                functools.partial(checkpoint, use_reentrant=use_reentrant)):
        each = copy.deepcopy(net)
        s0 = s1 = each.stem(x)
        for cell in each.cells:
            given = each._given(each.codes[cell.reduction])
            s0, s1 = s1, run(cell, s0, s1, None, *given)
        s1.square().sum().backward()
        found.append([p.grad for p in each.cells.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_statistics_can_be_recalibrated():
    """update_bn sets every momentum to None, and counts batches."""
    norm = ReLUConvBN(3, 4, 1, 1, 0).double()
    batches = [torch.randn(8, 3, 4, 4, dtype=torch.float64) for _ in range(3)]
    update_bn(batches, norm)
    means = [norm.op[1](x.relu()).mean((0, 2, 3)) for x in batches]
    torch.testing.assert_close(norm.op[2].running_mean, sum(means).detach() / 3)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_freed_memory_stays():
    """In a process of its own: tensors that follow one another take no new pages."""
    script = """
import resource, torch
from harness import speedups
speedups.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
assert faults() < 100, faults()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# ------------------------------------------------------------------------------------------------
# Whole steps
# ------------------------------------------------------------------------------------------------


class Batches(list):
    """Some batches, as the loops take them."""

    def endless(self):
        return itertools.cycle(self)


def plain_optimizers(net):
    """SGD on the weights, and of a supernet Adam on b, one parameter at a time."""
    is_search = isinstance(net, Network)
    weights = net.weight_parameters() if is_search else net.parameters()
    sgd = torch.optim.SGD(weights, 0.1, 0.9, weight_decay=3e-4, foreach=False)
    if not is_search:
        return [sgd]
    return [sgd, torch.optim.Adam(net.arch_parameters(), 6e-4, (0.5, 0.999), weight_decay=1e-3,
                                  foreach=False)]


def plain_step(net, optimizers, first, second=None):
    """A step in the most obvious way; in two-stage search b moves on a batch of its own."""
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
    assert norm > 0.5, "it should matter"
    sgd.step()


@pytest.mark.parametrize("kind", ["two-stage", "one-stage", "retraining"])
def test_steps(kind):
    """Epochs of the scripts equal plain steps with torch's layers."""
    if kind == "retraining":
        net = NetworkCIFAR(4, 10, 3, True, genotypes.ISTA_twostage).double()
    else:
        net = supernet(3, one_stage=kind == "one-stage", auxiliary=kind == "one-stage")
    if kind == "one-stage":
        net.freeze([False, True, False, False] * 2)
    ours = copy.deepcopy(net).to(memory_format=torch.channels_last)
    batches, arch_batches = (Batches(batch(8) for _ in range(3)) for _ in range(2))
    progress = SimpleNamespace(step=lambda meter: None)
    run = SimpleNamespace(args=SETTINGS, progress=progress, warn=None)
    if kind == "retraining":
        optimizer = utils.SGD(ours.parameters(), 0.1, 0.9, weight_decay=3e-4)
        train.train_epoch(ours, batches, optimizer, run)
    elif kind == "one-stage":
        search.one_stage_epoch(ours, batches, *search.optimizers(ours, SETTINGS), run)
    else:
        optimizers = search.optimizers(ours, SETTINGS)
        search.two_stage_epoch(ours, batches, arch_batches, *optimizers, run)

    optimizers = plain_optimizers(net)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    with layers.plain():
        for first, second in zip(batches, arch_batches, strict=True):
            plain_step(net, optimizers, first, second if kind == "two-stage" else None)
    moved = 0
    for (name, p), q in zip(net.named_parameters(), ours.parameters(), strict=True):
        assert_close(q.detach(), p.detach(), name, factor=1e3)  # steps amplify rounding
        moved += not torch.equal(p, start[name])
    assert moved > 20
    for (name, a), b in zip(statistics(ours).items(), statistics(net).values(), strict=True):
        assert_close(a, b, name, factor=1e3)


def test_each_step_of_two_stage_search_computes_its_own_gradients_alone():
    net = supernet(1)
    weight_optimizer, arch_optimizer = search.optimizers(net, SETTINGS)
    for step, own, other in (
        (search.arch_step, net.arch_parameters(), net.weight_parameters()),
        (search.weight_step, net.weight_parameters(), net.arch_parameters()),
    ):
        net.zero_grad()
        step(net, *batch(), weight_optimizer, arch_optimizer, SETTINGS)
        assert any(p.grad is not None for p in own)
        assert all(p.grad is None and p.requires_grad for p in other)
