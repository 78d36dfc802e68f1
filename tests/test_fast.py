"""`fast.accelerate` changes nothing but time: networks and steps are held to the plain ones.

What it does with operations that have been edited is in `test_edits.py`.
"""

import copy
import itertools
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import ROOT
from torch import nn
from torch.nn.utils import clip_grad_norm_

import fast
import genotypes
import model
import model_search
import operations
import search
import train
import utils
from genotypes import NODES, PRIMITIVES
from model import NetworkCIFAR, NetworkImageNet
from model_search import Network
from operations import build

# Float64 tells a wrong term from rounding; float32 is what people run.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
SETTINGS = SimpleNamespace(
    learning_rate=0.1, momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4,
    arch_weight_decay=1e-3, grad_clip=0.5, auxiliary_weight=0.4, label_smoothing=0.1, amp=False,
    recover_every="epoch",
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(ours, plain, what="", factor=1):
    """The largest difference, relative to the largest entry, is within the tolerance."""
    assert (ours is None) == (plain is None), what
    if plain is not None:
        assert ours.shape == plain.shape and ours.dtype == plain.dtype, what
        scale = plain.abs().max().clamp(min=1e-3)
        error = ((ours - plain).abs().max() / scale).item()
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


def accelerated(net):
    """An accelerated copy, in which every layer that has a faster form got it."""
    log = []
    ours = fast.accelerate(copy.deepcopy(net).to(memory_format=torch.channels_last), log.append)
    assert log == [] and not any(type(m) in fast.FASTER for m in ours.modules())
    return ours


def statistics(net):
    return {k: v.clone() for k, v in net.named_buffers() if ".running_" in k}


def results(net, x, y, fixed=""):
    """Outputs, gradients and running statistics of one pass; the net stays as it is.

    Parameters
    ----------
    fixed : {"", "weights", "points"}
        Parameters of a supernet for which no gradients are computed.
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


def compare(net, ours, x, y, fixed="", training=True, drop_path_prob=0.0):
    """A pass of the accelerated network is that of the plain one; returns the gradients met."""
    for form in (net, ours):
        form.train(training).drop_path_prob = drop_path_prob
    expected = results(net, x.contiguous(), y, fixed)
    found = results(ours, x, y, fixed)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("affine, norm_skips", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("size, C", [(10, 6), (7, 36)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_operations(primitive, stride, size, C, affine, norm_skips, dtype):
    if primitive == "skip_connect" and stride == 2 and size % 2:
        pytest.skip("FactorizedReduce halves even sizes only")
    norms = dict(affine=affine, norm_pools=not affine or norm_skips, norm_skips=norm_skips)
    plain = shuffle(build(primitive, C, stride, **norms).to(dtype))
    ours = accelerated(plain)
    for training, input_trains, weights_train in itertools.product((True, False), repeat=3):
        for op in (plain, ours):
            op.train(training).requires_grad_(weights_train)
        x = torch.randn(3, C, size, size, dtype=dtype, requires_grad=input_trains)
        x_ours = channels_last(x.detach().clone()).requires_grad_(input_trains)
        y, y_ours = plain(x), ours(x_ours)
        assert_close(y_ours, y, "output")
        assert y_ours.requires_grad == y.requires_grad
        if y.requires_grad:
            g = torch.randn_like(y)
            inputs = [p for p in (x, *plain.parameters()) if p.requires_grad]
            inputs_ours = [p for p in (x_ours, *ours.parameters()) if p.requires_grad]
            expected = torch.autograd.grad(y, inputs, g)
            found = torch.autograd.grad(y_ours, inputs_ours, channels_last(g))
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, "gradient")
        with torch.no_grad():
            assert_close(ours(x_ours), plain(x), "output without gradients")
        for a, b in zip(statistics(ours).values(), statistics(plain).values(), strict=True):
            assert_close(a, b, "running statistics")
        assert torch.equal(x_ours, x), "nothing is written over a shared input"


def on_one_input(mixed, names, x, w):
    """w_0 · op_0(x) + w_1 · op_1(x), and its gradients."""
    y = sum(mixed(x, PRIMITIVES.index(name), v) for name, v in zip(names, w.unbind(), strict=True))
    return [y, *torch.autograd.grad(y.pow(2).sum(), [x, w])]


@pytest.mark.parametrize("names", [*itertools.combinations_with_replacement(PRIMITIVES, 2)])
def test_two_operations_on_one_input(names):
    """They share its ReLU; neither may spoil it, the input or a gradient for the other."""
    plain = shuffle(model_search.MixedOp(4, 1, one_stage=False).double())
    values = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    found = []
    for mixed in (accelerated(plain), plain):
        x = 1 * values  # no leaf, as inside of a network
        found.append(on_one_input(mixed, names, x, w))
        assert torch.equal(x, values)
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_an_input_may_be_used_again():
    """After a pass without gradients or a backward pass, and when it has changed in place."""
    plain = model_search.MixedOp(4, 1, one_stage=False).double()
    ours, names = accelerated(plain), ["sep_conv_3x3", "dil_conv_5x5"]
    start = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)

    def same(x, what):
        with torch.no_grad():
            assert_close(ours(x, 3, w[0]), plain(x, 3, w[0]), what)
        if x.requires_grad:
            for a, b in zip(on_one_input(ours, names, x, w), on_one_input(plain, names, x, w),
                            strict=True):
                assert_close(a, b, what)

    for x in (start, start * 2, start.detach().clone()):
        same(x, "at first")
        if x.is_leaf:
            same(x, "again")
            with torch.no_grad():
                x.neg_()
            same(x, "changed in place")
    with torch.inference_mode():
        for x in (start.detach(), start.detach() + 1):
            same(x, "in inference mode")


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_two_stage(seed):
    net = supernet(seed)
    nets, images = (net, accelerated(net)), batch()
    assert compare(*nets, *images, fixed="weights") == 2 * NODES  # the step on b
    assert compare(*nets, *images, fixed="points") > 20  # the step on the weights
    compare(*nets, *images, training=False)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("n", [4, 16])  # oneDNN has weight gradients of its own from 16 on
def test_float32(monkeypatch, onednn, n):
    monkeypatch.setattr(fast, "ONEDNN", onednn)
    net = randomized(Network(12, 10, 3), 2)
    nets, images = (net, accelerated(net)), batch(n, dtype=torch.float32)
    compare(*nets, *images, fixed="weights")
    compare(*nets, *images, fixed="points")


@pytest.mark.parametrize("seed", range(3))
def test_one_stage(seed):
    """Where γ and β are held, they count as well: what trains never decides what is computed."""
    net = supernet(seed, one_stage=True, auxiliary=True)
    nets, images = (net, accelerated(net)), batch()
    for form in nets:
        form.freeze([seed > 1, False, False, True] * 2)
    assert compare(*nets, *images) > 20
    for form in nets:
        form.freeze()
        form.prune()
    compare(*nets, *images, drop_path_prob=0.5)
    compare(*nets, *images, training=False)


def test_supernet_for_imagenet():
    net = supernet(3, one_stage=True, auxiliary=True, imagenet=True)
    compare(net, accelerated(net), *batch(6, size=64))


@pytest.mark.parametrize("name, size", [("ISTA_twostage", 16), ("ISTA_onestage", 16),
                                        ("random:5", 20), ("random:6", 12)])
def test_retraining(name, size):
    genotype, one_stage = genotypes.load(name)
    net = shuffle(NetworkCIFAR(4, 10, 3, True, genotype, one_stage).double())
    nets, images = (net, accelerated(net)), batch(size=size)
    compare(*nets, *images)
    compare(*nets, *images, drop_path_prob=0.5)
    compare(*nets, *images, training=False)


def test_retraining_for_imagenet():
    net = shuffle(NetworkImageNet(4, 10, 3, True, genotypes.ISTA_ImageNet).double())
    compare(net, accelerated(net), *batch(2, size=96))


@pytest.mark.parametrize("net", [
    lambda: supernet(1, one_stage=True),
    lambda: NetworkCIFAR(4, 10, 3, False, genotypes.ISTA_twostage).double(),
])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(net, mode):
    net = net()
    ours, (x, _) = accelerated(net), batch()
    for training in (True, False):
        with mode():
            logits, _ = ours.train(training)(x)
            assert_close(logits, net.train(training)(x)[0])
    assert not logits.requires_grad
    for (name, a), b in zip(statistics(ours).items(), statistics(net).values(), strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("one_stage", [False, True])
def test_autocast(one_stage):
    """In bfloat16 the two forms do not round alike, but one is as near the truth as the other."""
    net = randomized(Network(4, 10, 3, one_stage=one_stage), 2)
    x, y = batch(8, dtype=torch.float32)
    truth, swapped = results(net, x, y), accelerated(net)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = results(swapped, x, y), results(net, x, y)
    assert ours["logits"].dtype == torch.bfloat16

    def error(found, what):
        names = [k for k, v in truth.items() if what in k and v is not None]
        a, b = (torch.cat([r[k].float().flatten() for k in names]) for r in (found, truth))
        return (a - b).norm() / b.norm()

    for what in ("logits", "gradient of cells", "gradient of normal_code", "running_var"):
        assert error(ours, what) < 0.25, what
        assert error(ours, what) < 2 * error(plain, what), what


# ------------------------------------------------------------------------------------------------
# What a person relies on
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [
    lambda: Network(4, 10, 3), lambda: Network(4, 10, 3, one_stage=True, auxiliary=True),
    lambda: NetworkCIFAR(4, 10, 3, True, genotypes.ISTA_onestage, True),
])
def test_names_parameters_values_and_random_generators_stay(net):
    net = net()
    state, parameters = list(net.state_dict()), list(net.named_parameters())
    values = copy.deepcopy(net.state_dict())
    generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    assert fast.accelerate(net) is net
    assert generators == (
        random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    assert list(net.state_dict()) == state
    for (name, p), (was, q) in zip(net.named_parameters(), parameters, strict=True):
        assert name == was and p is q and p.grad is None
    for name, value in net.state_dict().items():
        assert torch.equal(value, values[name]), name
    assert type(net) in (Network, NetworkCIFAR) and net.training
    assert {type(cell) for cell in net.cells} <= {model.Cell, model_search.Cell}
    again = copy.deepcopy(fast.accelerate(net))  # twice, and a copy: neither does harm
    again.load_state_dict(values)


def test_a_layer_with_a_hook_is_left_alone_and_the_others_are_not():
    net, log, seen = Network(4, 10, 3), [], []
    layer = net.cells[0]._ops[0]._ops[PRIMITIVES.index("sep_conv_5x5")]
    layer.op[2].register_forward_hook(lambda *_: seen.append(1))
    fast.accelerate(net, log.append)
    layers = [m for m in net.modules() if isinstance(m, operations.SepConv)]
    assert [type(m) for m in layers].count(fast.SepConv) == len(layers) - 1
    assert type(layer) is operations.SepConv
    (line,) = log
    assert line.startswith(f"SepConv runs as it is written, not accelerated, in 1 of {len(layers)}")
    seen.clear()
    layer(torch.randn(2, 4, 8, 8))
    assert seen


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_freed_memory_stays():
    """In a process of its own: tensors that follow one another take no new pages."""
    script = """
import resource, torch
import fast
fast.accelerate(torch.nn.Linear(2, 2))
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
    """Epochs of the scripts, on the accelerated network, equal plain steps on the plain one."""
    if kind == "retraining":
        net = NetworkCIFAR(4, 10, 3, True, genotypes.ISTA_twostage).double()
    else:
        net = supernet(3, one_stage=kind == "one-stage", auxiliary=kind == "one-stage")
    if kind == "one-stage":
        net.freeze([False, True, False, False] * 2)
    ours = accelerated(net)
    batches, arch_batches = (Batches(batch(8) for _ in range(3)) for _ in range(2))
    progress = SimpleNamespace(step=lambda meter: None)
    run = SimpleNamespace(args=SETTINGS, progress=progress)
    graphs = utils.Graphs(False, None, None)
    if kind == "retraining":
        optimizer = utils.SGD(ours.parameters(), 0.1, 0.9, weight_decay=3e-4)
        train.train_epoch(ours, batches, optimizer, run, graphs)
    elif kind == "one-stage":
        search.one_stage_epoch(ours, batches, *search.optimizers(ours, SETTINGS), run, graphs)
    else:
        optimizers = search.optimizers(ours, SETTINGS)
        search.two_stage_epoch(ours, batches, arch_batches, *optimizers, run, graphs)

    optimizers = plain_optimizers(net)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
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
