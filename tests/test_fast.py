"""`fast.accelerate` changes nothing but time: networks and steps are held to the plain ones."""

import copy
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

import fast
import genotypes
import model
import model_search
import operations
import runs
import search
import train
import utils
from benchmarks import bench
from genotypes import NODES, PRIMITIVES
from model import NetworkCIFAR, NetworkImageNet
from model_search import Network
from operations import build

# Float64 tells a wrong term from rounding; float32 is what people run.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
SETTINGS = SimpleNamespace(
    learning_rate=0.1, momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4,
    arch_weight_decay=1e-3, grad_clip=5.0, auxiliary_weight=0.4, label_smoothing=0.1, amp=False,
    recover_every="epoch", cuda_graphs=False,
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


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def batch(n=4, size=16, dtype=torch.float64):
    return channels_last(torch.randn(n, 3, size, size, dtype=dtype)), torch.randint(10, (n,))


def accelerated(net):
    return fast.accelerate(copy.deepcopy(net).to(memory_format=torch.channels_last))


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


def compare(net, x, y, fixed=""):
    """A pass of the accelerated network is that of the plain one; returns the gradients met."""
    expected = results(net, x.contiguous(), y, fixed)
    found = results(accelerated(net), x, y, fixed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, name)
    return sum("gradient" in name and value is not None for name, value in found.items())


def randomized(net, seed):
    """A supernet with random supports, weights of order 1 and either sign; seed 0: one edge."""
    rng = random.Random(seed)
    for code in net.codes:
        codes = []
        for j, z in enumerate(code.z):
            z = 1e-3 * torch.rand_like(z)  # off the support; has no part in the weights
            pairs = rng.sample(range(len(z)), 2)
            if seed == 0:  # both on the edge from the newest node
                pairs = [7 * (j + 1) + op for op in rng.sample(range(7), 2)]
            for k in pairs:
                z[k] = rng.choice((-1, 1)) * rng.uniform(0.5, 1)
            codes.append(z.numpy())
        for b in code.b:
            nn.init.normal_(b, std=0.3)
        code.accept(codes)
    shuffle(net)
    if net.one_stage:  # where γ and β are held, they are 1 and 0
        for layer in (m for cell in net.cells for m in cell._ops.modules()):
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
    return net


def supernet(seed, C=4, layers=3, **kwargs):
    return randomized(Network(C, 10, layers, **kwargs).double(), seed)


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
    plain = build(primitive, C, stride, **norms).to(dtype)
    shuffle(plain)
    ours = accelerated(plain)
    assert type(ours) is type(plain) or type(ours).__module__ == "fast"
    for training, requires_grad in itertools.product((True, False), (True, False)):
        plain.train(training)
        ours.train(training)
        x = torch.randn(3, C, size, size, dtype=dtype, requires_grad=requires_grad)
        x_ours = channels_last(x.detach().clone()).requires_grad_(requires_grad)
        y, y_ours = plain(x), ours(x_ours)
        assert_close(y_ours, y, "output")
        if y.requires_grad:
            g = torch.randn_like(y)
            inputs = [x] * requires_grad + [*plain.parameters()]
            inputs_ours = [x_ours] * requires_grad + [*ours.parameters()]
            expected = torch.autograd.grad(y, inputs, g)
            found = torch.autograd.grad(y_ours, inputs_ours, channels_last(g))
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, "gradient")
        with torch.no_grad():
            assert_close(ours(x_ours), plain(x), "output without gradients")
        for a, b in zip(statistics(ours).values(), statistics(plain).values(), strict=True):
            assert_close(a, b, "running statistics")
        assert torch.equal(x_ours, x), "nothing is written over a shared input"


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("C, size", [(36, 8), (36, 7), (40, 6), (6, 16), (72, 8)])
def test_batch_norm_by_rows(monkeypatch, threads, C, size, affine):
    monkeypatch.setattr(fast, "BY_ROWS", 0)
    x = 3 * torch.randn(4, C, size, size) + torch.randn(C, 1, 1)
    plain = build("max_pool_3x3", C, 1, affine=affine, norm_pools=True)
    shuffle(plain)
    ours, plain = accelerated(plain), plain.double()
    x_ours, x = channels_last(x).requires_grad_(), x.double().requires_grad_()
    found, expected = ours(x_ours), plain(x)
    for y in (found, expected):
        y.pow(3).mean().backward()
    pairs = [(found, expected), (x_ours.grad, x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(ours.parameters(), plain.parameters(), strict=True)]
    pairs += zip(statistics(ours).values(), statistics(plain).values(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


def on_one_edge(choices):
    """An edge of the supernet, plain and accelerated: w_0 · op_0(x) + w_1 · op_1(x)."""
    plain = model_search.MixedOp(4, 1, one_stage=False).double()
    return plain, accelerated(plain), [PRIMITIVES.index(name) for name in choices]


def grad(mixed, ops, x, w):
    y = sum(mixed(x, op, v) for op, v in zip(ops, w.unbind(), strict=True))
    return [y, *torch.autograd.grad(y.pow(2).sum(), [x, w])]


@pytest.mark.parametrize("choices", [*itertools.combinations_with_replacement(PRIMITIVES, 2)])
def test_two_operations_on_one_input(choices):
    """They share its ReLU; neither may spoil it, or the input, for the other."""
    plain, ours, ops = on_one_edge(choices)
    values = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    x, w = values.clone(), torch.tensor([0.7, -1.3], dtype=torch.float64)
    for v in (x, w):
        v.requires_grad_()
    for a, b in zip(grad(ours, ops, x, w), grad(plain, ops, x, w), strict=True):
        assert_close(a, b)
    assert torch.equal(x, values)


def test_an_input_may_be_used_again():
    """After a pass without gradients or a backward pass, and when it has changed in place."""
    plain, ours, ops = on_one_edge(["sep_conv_3x3", "dil_conv_5x5"])
    start = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)

    def same(x, what):
        with torch.no_grad():
            assert_close(ours(x, ops[0], w[0]), plain(x, ops[0], w[0]), what)
        for _ in range(2 if x.is_leaf else 1):
            if x.requires_grad:
                for a, b in zip(grad(ours, ops, x, w), grad(plain, ops, x, w), strict=True):
                    assert_close(a, b, what)

    for x in (start, start * 2, start.detach().clone()):
        same(x, "at first")
        if x.is_leaf:
            with torch.no_grad():
                x.neg_()
            same(x, "changed in place")
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            p.data += 0.1
            q.data += 0.1
        if x.is_leaf:
            same(x, "with other weights")
    with torch.inference_mode():
        for x in (start.detach(), start.detach() + 1):
            same(x, "in inference mode")


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
# Networks
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_two_stage(seed):
    net = supernet(seed)
    x, y = batch()
    assert compare(net, x, y, fixed="weights") == 2 * NODES  # the step on b
    assert compare(net, x, y, fixed="points") > 20  # the step on the weights
    compare(net.eval(), x, y)
    net.train().drop_path_prob = 0.5
    compare(net, x, y)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("by_rows", [0, 10**9])
@pytest.mark.parametrize("n", [4, 16])  # oneDNN has weight gradients of its own from 16 on
def test_float32(monkeypatch, onednn, by_rows, n):
    monkeypatch.setattr(fast, "ONEDNN", onednn)
    monkeypatch.setattr(fast, "BY_ROWS", by_rows)
    net = randomized(Network(12, 10, 3), 2)
    x, y = batch(n, dtype=torch.float32)
    compare(net, x, y, fixed="weights")
    compare(net, x, y, fixed="points")


@pytest.mark.parametrize("seed", range(3))
def test_one_stage(seed):
    net = supernet(seed, one_stage=True, auxiliary=True)
    x, y = batch()
    net.freeze([seed > 1, False, False, True] * 2)
    assert compare(net, x, y) > 20
    net.freeze()
    net.prune()
    shuffle(net)
    net.drop_path_prob = 0.5
    compare(net, x, y)
    compare(net.eval(), x, y)


def test_supernet_for_imagenet():
    net = supernet(3, one_stage=True, auxiliary=True, imagenet=True)
    compare(net, *batch(6, size=64))


@pytest.mark.parametrize("name, size", [("ISTA_twostage", 16), ("ISTA_onestage", 16),
                                        ("random:5", 20), ("random:6", 12)])
def test_retraining(name, size):
    genotype, one_stage = genotypes.load(name)
    net = NetworkCIFAR(4, 10, 3, True, genotype, one_stage).double()
    shuffle(net)
    x, y = batch(size=size)
    compare(net, x, y)
    net.drop_path_prob = 0.5
    compare(net, x, y)
    compare(net.eval(), x, y)


def test_retraining_for_imagenet():
    net = NetworkImageNet(4, 10, 3, True, genotypes.ISTA_ImageNet).double()
    shuffle(net)
    compare(net, *batch(2, size=96))


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
    truth = results(net, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = results(accelerated(net), x, y), results(net, x, y)
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
def test_names_parameters_and_their_order_stay(net):
    net = net()
    state, parameters = list(net.state_dict()), list(net.named_parameters())
    values = copy.deepcopy(net.state_dict())
    assert fast.accelerate(net) is net
    assert list(net.state_dict()) == state
    for (name, p), (was, q) in zip(net.named_parameters(), parameters, strict=True):
        assert name == was and p is q
    for name, value in net.state_dict().items():
        assert torch.equal(value, values[name]), name
    assert type(net) in (Network, NetworkCIFAR)
    assert {type(cell) for cell in net.cells} <= {model.Cell, model_search.Cell}
    again = copy.deepcopy(fast.accelerate(net))  # twice, and a copy: neither does harm
    again.load_state_dict(values)


class Blur(nn.Module):
    """An operation that somebody pastes in: unknown to fast.py, and without a BatchNorm's name."""

    def __init__(self, C, stride):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x):
        return torch.tanh(self.bn(self.conv(x)))


@pytest.mark.parametrize("one_stage", [False, True])
def test_an_operation_that_it_does_not_know_stays(monkeypatch, one_stage):
    monkeypatch.setitem(operations.OPS, "blur", lambda C, stride, affine: Blur(C, stride))
    monkeypatch.setattr(genotypes, "PRIMITIVES", [*PRIMITIVES, "blur"])
    monkeypatch.setattr(model_search, "PRIMITIVES", genotypes.PRIMITIVES)
    net = Network(4, 10, 3, one_stage=one_stage).double()
    for code in net.codes:  # it runs at every node, beside one that is known
        codes = [torch.zeros_like(z).numpy() for z in code.z]
        for z in codes:
            z[7], z[11] = 1, -0.5
        code.accept(codes)
        for b in code.b:
            nn.init.normal_(b)
    assert net.genotype().normal[0] == ("blur", 0)
    x, y = batch()
    compare(net, x, y)
    blurs = [m for m in accelerated(net).modules() if isinstance(m, Blur)]
    assert blurs and all(type(m) is Blur for m in blurs)
    if one_stage:
        net.freeze()
        compare(net, x, y)
    else:
        plain = NetworkCIFAR(4, 10, 3, False, net.genotype()).double()
        compare(plain, x, y)


class SecondNodeAlone(model_search.Cell):
    """A cell that somebody has edited."""

    def forward(self, s0, s1, *given):
        y = super().forward(s0, s1, *given)
        keep = torch.zeros_like(y)
        keep[:, len(y[0]) // NODES : len(y[0]) // 2] = 1
        return y * keep


def test_an_edited_cell_is_what_runs(monkeypatch):
    unedited = supernet(2)
    monkeypatch.setattr(model_search, "Cell", SecondNodeAlone)
    net = supernet(2)
    net.load_state_dict(unedited.state_dict())
    x, y = batch()
    compare(net, x, y)
    with torch.no_grad():
        edited, usual = (accelerated(n).eval()(x)[0] for n in (net, unedited))
    assert not torch.allclose(edited, usual)


# ------------------------------------------------------------------------------------------------
# Whole steps
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["two-stage", "one-stage", "retraining"])
def test_steps(monkeypatch, kind):
    """Steps of the scripts' own epochs: equal to the plain ones, without a host sync."""
    if kind == "retraining":
        net = NetworkCIFAR(4, 10, 3, True, genotypes.ISTA_twostage).double()
    else:
        net = supernet(3, one_stage=kind == "one-stage", auxiliary=kind == "one-stage")
    if kind == "one-stage":
        net.freeze([False, True, False, False] * 2)
    ours, progress = accelerated(net), SimpleNamespace(step=lambda meter: None)
    batches, arch_batches = (bench.Batches(batch(8) for _ in range(3)) for _ in range(2))
    monkeypatch.setattr(utils.Meter, "read", lambda meter: (0, 0))  # the one host sync, at the end

    def optimizers_of(net):
        if isinstance(net, Network):
            return search.optimizers(net, SETTINGS)
        return [torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=3e-4, foreach=True)]

    def epoch():
        given = *optimizers_of(ours), SETTINGS, progress
        if kind == "retraining":
            train.train_epoch(ours, ours, batches, *given)
        elif kind == "one-stage":
            search.one_stage_epoch(ours, ours, batches, *given)
        else:
            search.two_stage_epoch(ours, ours, batches, arch_batches, *given, epoch=1)

    assert bench.host_syncs(epoch) == 0

    optimizers = bench.one_by_one(optimizers_of(net))
    start = {name: p.detach().clone() for name, p in net.named_parameters()}

    def plain_epoch():
        for first, second in zip(batches, arch_batches, strict=True):
            second = second if kind == "two-stage" else None
            bench.plain_step(net, optimizers, SETTINGS, first, second)

    assert bench.host_syncs(plain_epoch) >= 3 * (4 if kind == "two-stage" else 2)
    moved = 0
    for (name, p), q in zip(net.named_parameters(), ours.parameters(), strict=True):
        assert_close(q.detach(), p.detach(), name, factor=1e2)  # steps amplify rounding
        moved += not torch.equal(p, start[name])
    assert moved > 20
    for (name, a), b in zip(statistics(ours).items(), statistics(net).values(), strict=True):
        assert_close(a, b, name, factor=1e2)


@pytest.mark.parametrize("flags", [["--threads", "0"], ["--device", "abacus"]])
def test_the_benchmark_answers_a_mistake_with_a_line(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit) as ended, runs.command("bench.py"):
        bench.main()
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
