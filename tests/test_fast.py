"""The networks and steps of the project are held to their plain form, `benchmarks/plain.py`."""

import copy
import importlib.util
import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import genotypes
import search
import train
from genotypes import NODES, PRIMITIVES
from model import NetworkCIFAR, NetworkImageNet
from model_search import Network
from operations import BatchNorm2d, State, build

_spec = importlib.util.spec_from_file_location(
    "plain", Path(__file__).parents[1] / "benchmarks" / "plain.py"
)
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

# Float64 tells a wrong term from rounding; float32 is what people run.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
SETTINGS = SimpleNamespace(
    learning_rate=0.1, momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4,
    arch_weight_decay=1e-3, grad_clip=5.0, auxiliary_weight=0.4, label_smoothing=0.0, amp=False,
    recover_every="epoch",
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(fast, plain_, what="", factor=1):
    """The largest difference, relative to the largest entry, is within the tolerance."""
    assert (fast is None) == (plain_ is None), what
    if fast is not None:
        assert fast.shape == plain_.shape, what
        scale = plain_.abs().max().clamp(min=1e-3)
        error = ((fast - plain_).abs().max() / scale).item()
        assert error <= factor * TOLERANCE[plain_.dtype], f"{what}: {error:.1e}"


def shuffle(net):
    """Give γ, β and the running statistics values that are not those of the start."""
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                torch.nn.init.normal_(m.weight)
                torch.nn.init.normal_(m.bias)


def batch(n=4, size=32, dtype=torch.float64):
    x = torch.randn(n, 3, size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.randint(10, (n,))


def run(net, forward, x, y, fixed=()):
    """Outputs, gradients and buffers after one forward and backward pass; the net stays as is."""
    buffers = {name: v.clone() for name, v in net.named_buffers()}
    fixed = [p for p in fixed if p.requires_grad]
    for p in fixed:
        p.requires_grad_(False)
    torch.manual_seed(1)  # drop-path
    logits, logits_aux = forward(x)
    loss = F.cross_entropy(logits, y)
    (loss if logits_aux is None else loss + 0.4 * F.cross_entropy(logits_aux, y)).backward()
    results = {"logits": logits, "logits_aux": logits_aux}
    for name, p in net.named_parameters():
        results[f"gradient of {name}"], p.grad = p.grad, None
    for name, v in net.named_buffers():  # running statistics
        results[name] = v.clone().to(x.dtype)
        v.copy_(buffers[name])
    for p in fixed:
        p.requires_grad_(True)
    return results


def compare(net, x, y, fixed=()):
    """One pass of both forms is the same, but that the fast one has no gradients at `fixed`.

    Returns
    -------
    int
        Number of gradients compared.
    """
    net.to(memory_format=torch.contiguous_format)
    expected = run(net, lambda x: plain.network(net, x), x.contiguous(), y)
    net.to(memory_format=torch.channels_last)
    results = run(net, net, x, y, fixed)
    fixed = {id(p) for p in fixed}
    left_out = {f"gradient of {name}" for name, p in net.named_parameters() if id(p) in fixed}
    for name, value in expected.items():
        assert_close(results[name], None if name in left_out else value, name)
    return sum("gradient" in name and value is not None for name, value in results.items())


# ------------------------------------------------------------------------------ operations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("affine, norm_skips", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("size, C", [(10, 6), (7, 36)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_operations(primitive, stride, size, C, affine, norm_skips, dtype):
    if primitive == "skip_connect" and stride == 2 and size % 2:
        pytest.skip("FactorizedReduce halves even sizes only")
    norms = dict(affine=affine, norm_pools=not affine or norm_skips, norm_skips=norm_skips)
    op = build(primitive, C, stride, **norms).to(dtype, memory_format=torch.channels_last)
    shuffle(op)
    slow = copy.deepcopy(op).to(memory_format=torch.contiguous_format)
    x = torch.randn(3, C, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for training, w in itertools.product((True, False), (None, 0.7, -1.3)):
        op.train(training), slow.train(training)
        x_fast, x_plain = x.clone().requires_grad_(), x.contiguous().requires_grad_()
        parameters, slow_parameters = list(op.parameters()), list(slow.parameters())
        y_plain = plain.operation(slow, x_plain)
        if w is None:
            y = op(State(x_fast))
        else:
            parameters.append(w_fast := torch.tensor(w, dtype=dtype, requires_grad=True))
            slow_parameters.append(w_plain := torch.tensor(w, dtype=dtype, requires_grad=True))
            y, y_plain = op(State(x_fast), w_fast), w_plain * y_plain
        assert_close(y, y_plain, "output")
        g = torch.randn_like(y)
        gradients = torch.autograd.grad(y, [x_fast, *parameters], g)
        slow_gradients = torch.autograd.grad(y_plain, [x_plain, *slow_parameters], g)
        for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
            assert_close(gradient, slow_gradient, "gradient")
        for v, u in zip(op.buffers(), slow.buffers(), strict=True):
            assert_close(v.to(dtype), u.to(dtype), "running statistics")
        with torch.no_grad():
            y = op(State(x)) if w is None else op(State(x), w_fast)
            y_plain = plain.operation(slow, x)
            assert_close(y, y_plain if w is None else w * y_plain, "output without gradients")
        assert torch.equal(x_fast, x)  # nothing is written over a shared input


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("affine, w", [(True, None), (True, 0.3), (False, None), (False, -0.3)])
@pytest.mark.parametrize("C, size", [(36, 8), (36, 7), (40, 6), (6, 16), (72, 8)])
def test_batch_norm_of_several_threads(two_threads, C, size, affine, w):
    ours = BatchNorm2d(C, affine=affine)
    x = (3 * torch.randn(4, C, size, size) + torch.randn(C, 1, 1)).contiguous(
        memory_format=torch.channels_last
    )
    if affine:
        torch.nn.init.normal_(ours.weight)
        torch.nn.init.normal_(ours.bias)
    usual = copy.deepcopy(ours).double()

    def results(norm, x, w, forward):
        x.requires_grad_()
        y = forward(norm, x, w)
        y.pow(3).mean().backward()
        gradients = [p.grad for p in [x, w, *norm.parameters()] if p is not None]
        return [y, *norm.buffers(), *gradients]

    def weight(dtype):
        return None if w is None else torch.tensor(w, dtype=dtype, requires_grad=True)

    wide = x.double().contiguous()
    fast = results(ours, x, weight(torch.float32), lambda norm, x, w: norm(x, w))
    reference = results(
        usual, wide, weight(torch.float64),
        lambda norm, x, w: torch.nn.BatchNorm2d.forward(norm, x) * (1 if w is None else w),
    )  # fmt: skip
    for a, b in zip(fast, reference, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("first", PRIMITIVES)
@pytest.mark.parametrize("second", PRIMITIVES)
def test_two_operations_on_one_state(first, second):
    """They share the rectified input; neither may spoil it, or the input, for the other."""
    ops = [build(p, 4, 1, affine=False, norm_pools=True).double() for p in (first, second)]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    w = torch.tensor([0.7, -1.3], dtype=torch.float64)
    x_fast, w_fast = x.clone().requires_grad_(), w.clone().requires_grad_()
    x_plain, w_plain = x.clone().requires_grad_(), w.clone().requires_grad_()
    state = State(x_fast)
    y = sum(op(state, v) for op, v in zip(ops, w_fast, strict=True))
    y_plain = sum(v * plain.operation(op, x_plain) for op, v in zip(ops, w_plain, strict=True))
    assert_close(y, y_plain)
    g = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, [x_fast, w_fast], g),
        torch.autograd.grad(y_plain, [x_plain, w_plain], g),
        strict=True,
    ):
        assert_close(a, b)


# ------------------------------------------------------------------------------ supernet


def supernet(seed, C=4, layers=3, dtype=torch.float64, **kwargs):
    """A supernet with random supports, weights of order 1 and either sign; seed 0: one edge."""
    net = Network(C, 10, layers, **kwargs)
    net = net.double() if dtype == torch.float64 else net
    rng = random.Random(seed)
    for code in net.codes:
        codes = []
        for j in range(NODES):
            n = 7 * (j + 2)
            pairs = rng.sample(range(n), 2)
            if seed == 0:  # both on the edge from the newest node
                pairs = [7 * (j + 1) + op for op in rng.sample(range(7), 2)]
            z = torch.zeros(n, dtype=torch.float64)
            for k in pairs:
                z[k] = rng.choice((-1, 1)) * rng.uniform(0.5, 1)
            z += 1e-3 * torch.rand(n)  # off the support; has no part in the weights
            codes.append(z)
        code.accept(codes)
        for b in code.b:
            torch.nn.init.normal_(b, std=0.3)
    shuffle(net)
    if net.one_stage:
        for m in net.modules():
            if hasattr(m, "_ops") and not hasattr(m, "preprocess0"):
                for bn in m.modules():
                    if isinstance(bn, torch.nn.BatchNorm2d):
                        torch.nn.init.ones_(bn.weight)
                        torch.nn.init.zeros_(bn.bias)
    return net


def test_weights():
    net = supernet(1)
    for code in net.codes:
        w = plain.weights(code)
        assert_close(code.weights(), w)
        assert w.count_nonzero() == 8 and (w > 0).any() and (w < 0).any()


@pytest.mark.parametrize("seed", range(5))
def test_two_stage(seed):
    net = supernet(seed)
    x, y = batch(size=16)
    assert compare(net, x, y, fixed=net.weight_parameters()) == 8  # the step on b
    assert compare(net, x, y, fixed=net.arch_parameters()) > 20  # the step on the weights
    compare(net.eval(), x, y)
    net.train().drop_path_prob = 0.5
    compare(net, x, y)


def test_two_stage_float32():
    net = supernet(2, dtype=torch.float32)
    x, y = batch(size=16, dtype=torch.float32)
    compare(net, x, y, fixed=net.weight_parameters())
    compare(net, x, y, fixed=net.arch_parameters())


def test_autocast():
    """In bfloat16 the two forms do not round alike, but nearly."""
    net = supernet(2, dtype=torch.float32, one_stage=True, auxiliary=True)
    x, y = batch(8, dtype=torch.float32)
    expected = run(net, net, x, y)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(net, net, x, y)["logits"]
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("seed", range(4))
def test_one_stage(seed):
    net = supernet(seed, one_stage=True, auxiliary=True)
    x, y = batch()
    net.freeze([seed > 1, False, False, True] * 2)
    assert compare(net, x, y) > 20
    net.freeze([True] * 8)
    net.prune()
    net.drop_path_prob = 0.5
    compare(net, x, y)


# ------------------------------------------------------------------------------ genotypes


@pytest.mark.parametrize("name", ["ISTA_twostage", "ISTA_onestage", "random:5"])
def test_retraining(name):
    genotype, one_stage = genotypes.load(name)
    net = NetworkCIFAR(4, 10, 3, True, genotype, one_stage).double()
    shuffle(net)
    x, y = batch()
    compare(net, x, y)
    net.drop_path_prob = 0.5
    compare(net, x, y)
    compare(net.eval(), x, y, fixed=net.auxiliary_head.parameters())


def test_retraining_imagenet():
    net = NetworkImageNet(4, 10, 3, True, genotypes.ISTA_ImageNet).double()
    shuffle(net)
    x, y = batch(2, size=224)
    compare(net, x, y)


# ------------------------------------------------------------------------------ whole steps


class Once(list):
    """Batches, as the epoch loops take them."""

    def endless(self):
        return itertools.cycle(self)


class DeviceReads(TorchDispatchMode):
    """Counts what waits for the device: reads of a number, by `.item()` or by `if`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def fast_optimizers(net):
    sgd = torch.optim.SGD(
        net.weight_parameters() if isinstance(net, Network) else net.parameters(),
        SETTINGS.learning_rate, SETTINGS.momentum, weight_decay=SETTINGS.weight_decay,
        foreach=True,
    )  # fmt: skip
    if not isinstance(net, Network):
        return (sgd,)
    adam = torch.optim.Adam(
        net.arch_parameters(), SETTINGS.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=SETTINGS.arch_weight_decay, fused=True,
    )  # fmt: skip
    return sgd, adam


@pytest.mark.parametrize("kind", ["two-stage", "one-stage", "retraining"])
def test_steps(kind):
    """Three steps of the scripts' own loops: equal to the plain ones, and no device reads."""
    if kind == "retraining":
        net = NetworkCIFAR(4, 10, 3, True, genotypes.ISTA_twostage).double()
    else:
        net = supernet(3, one_stage=kind == "one-stage", auxiliary=kind == "one-stage")
        net.freeze([False, True, False, False] * 2 if net.one_stage else [False] * 8)
    slow = copy.deepcopy(net)
    batches, batches_arch = (Once(batch(8) for _ in range(3)) for _ in range(2))
    optimizers = fast_optimizers(net.to(memory_format=torch.channels_last))
    progress = SimpleNamespace(step=lambda meter: None)
    net.train()
    with DeviceReads() as reads:
        if kind == "two-stage":
            search.two_stage_epoch(
                net, batches, batches_arch, *optimizers, SETTINGS, progress, steps_before=0
            )
        elif kind == "one-stage":
            search.one_stage_epoch(net, batches, *optimizers, SETTINGS, progress)
        else:
            train.train_epoch(net, batches, *optimizers, SETTINGS, progress)
    assert reads.count == 0

    sgd, adam = plain.optimizers(slow, SETTINGS)
    with DeviceReads() as reads:
        for (x, y), (x_arch, y_arch) in zip(batches, batches_arch, strict=True):
            if kind == "two-stage":
                plain.two_stage_step(slow, x, y, x_arch, y_arch, SETTINGS, sgd, adam)
            elif kind == "one-stage":
                plain.one_stage_step(slow, x, y, SETTINGS, sgd, adam)
            else:
                plain.retraining_step(slow, x, y, SETTINGS, sgd)
    halves = {"two-stage": 2, "one-stage": 1, "retraining": 1}[kind]
    asked = 0 if kind == "retraining" else 14 * 7 * len(net.cells)
    assert reads.count >= 3 * halves * (asked + 2)  # this is what it is to read the device
    for (name, p), q in zip(net.named_parameters(), slow.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), name, factor=1e3)  # steps amplify rounding
