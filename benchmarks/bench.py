"""Measure what a step costs, against the plain form of the same step (`plain.py`), in one table.

    python benchmarks/bench.py                  # a few minutes on a CPU
    python benchmarks/bench.py --quick          # fewer repetitions
    python benchmarks/bench.py --device cuda --out bench.json

Seconds do not carry from one machine to the next, and on a busy machine not from one minute to the
next. So both forms run by turns in one process, and what counts is the ratio. Every figure is the
median of its repetitions, with the lower and upper quartile beside it. Memory is the peak of a
process of its own for each form (on CUDA: of its tensors). If others use the machine at the same
time, set OMP_NUM_THREADS=1: threads that wait for each other multiply the noise.

The fast form is the loops of `search.py` and `train.py` themselves, on random images.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np  # noqa: E402
import plain  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import data  # noqa: E402
import genotypes  # noqa: E402
import ista  # noqa: E402
import search  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from genotypes import PRIMITIVES  # noqa: E402
from model import NetworkCIFAR  # noqa: E402
from model_search import Network  # noqa: E402

KINDS = {
    "two-stage": "two-stage step: C=16, 8 cells, batch 64 + 64",
    "retraining": "retraining step: ISTA_twostage, C=36, 20 cells, auxiliary, batch 8",
    "one-stage": "one-stage step: C=36, 20 cells, auxiliary, batch 8",
}
BATCH = {"two-stage": 64, "retraining": 8, "one-stage": 8}
LIMITS = {  # what the project must reach and hopes to, as shares of the plain form
    "two-stage": dict(time=(0.40, 0.25), memory=(0.75, 0.50)),
    "retraining": dict(time=(0.60, 0.40)),
    "one-stage": dict(time=(0.60, 0.40)),
}


# ------------------------------------------------------------------------------------------------
# The steps that are measured
# ------------------------------------------------------------------------------------------------


class Repeated(list):
    """Batches, as the epoch loops take them: the same ones over and over."""

    def endless(self):
        return itertools.cycle(self)


def choose(net, genotype):
    """Set the support of a supernet to the pairs of a genotype."""
    for code, pairs in zip(net.codes, (genotype.normal, genotype.reduce), strict=True):
        codes = [torch.zeros_like(z) for z in code.z]
        for i, (primitive, edge) in enumerate(pairs):
            operations = len(codes[0]) // 2
            codes[i // 2][operations * edge + PRIMITIVES.index(primitive)] = 1
        code.accept(codes)


def build(kind, form, device, batch=None, layers=None):
    """A function that takes one training step, and the network it trains."""
    torch.manual_seed(0)
    if kind == "two-stage":
        args = settings(search, [], search.published)
        net = Network(args.init_channels, 10, layers or args.layers)
        choose(net, genotypes.ISTA_twostage)
    elif kind == "one-stage":
        args = settings(search, ["--one_stage"], search.published)
        net = Network(args.init_channels, 10, args.layers, one_stage=True, auxiliary=True)
        choose(net, genotypes.ISTA_onestage)
    else:
        args = settings(train, ["--arch", "ISTA_twostage"], lambda typed: train.CIFAR)
        net = NetworkCIFAR(args.init_channels, 10, args.layers, True, genotypes.ISTA_twostage)
    layout = torch.channels_last if form == "fast" else torch.contiguous_format
    net = net.to(device, memory_format=layout).train()

    def random_batch():
        n = batch or BATCH[kind]
        x, y = torch.randn(n, 3, 32, 32), torch.randint(10, (n,))
        return x.to(device).contiguous(memory_format=layout), y.to(device)

    first, second = random_batch(), random_batch()
    if form == "plain":
        optimizers = plain.optimizers(net, args)
        if kind == "two-stage":
            return lambda: plain.two_stage_step(net, *first, *second, args, *optimizers), net
        if kind == "one-stage":
            return lambda: plain.one_stage_step(net, *first, args, *optimizers), net
        return lambda: plain.retraining_step(net, *first, args, optimizers[0]), net

    weights = net.parameters() if kind == "retraining" else net.weight_parameters()
    sgd = torch.optim.SGD(
        weights, args.learning_rate, args.momentum, weight_decay=args.weight_decay, foreach=True
    )
    progress = SimpleNamespace(step=lambda meter: None)
    batches, batches_arch = Repeated([first]), Repeated([second])
    if kind == "retraining":
        return lambda: train.train_epoch(net, batches, sgd, args, progress), net
    adam = torch.optim.Adam(
        net.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=args.arch_weight_decay, fused=True,
    )  # fmt: skip
    if kind == "one-stage":
        return lambda: search.one_stage_epoch(net, batches, sgd, adam, args, progress), net
    return lambda: search.two_stage_epoch(
        net, batches, batches_arch, sgd, adam, args, progress, steps_before=0
    ), net


def settings(script, argv, published):
    """The flags of a script with the published values."""
    return script.get_args_parser().parse_args(argv, published=published)


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def seconds(function, device):
    """Time of one call."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        function()
        ended.record()
        torch.cuda.synchronize(device)
        return began.elapsed_time(ended) / 1000
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def by_turns(functions, repetitions, device, warm_up=2):
    """Times of several functions that run one after the other: (repetitions, functions)."""
    for function in functions * warm_up:
        function()
    return np.array([[seconds(f, device) for f in functions] for _ in range(repetitions)])


class DeviceReads(TorchDispatchMode):
    """Counts reads of a number off the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def device_reads(step):
    """In one step, but for those by Adam, which are of its own counters on the host."""
    adam = torch.optim.Adam.step
    with DeviceReads() as reads:

        def silent_step(self, *args):
            count = reads.count
            adam(self, *args)
            reads.count = count

        torch.optim.Adam.step = silent_step
        try:
            step()
        finally:
            torch.optim.Adam.step = adam
    return reads.count


def saved_bytes(step, net):
    """Bytes that the forward passes of a step keep for the backward pass, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    storages, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other tensor gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def peak_bytes(kind, form, device):
    """Peak memory of a process that takes 3 steps of one form."""
    command = [sys.executable, os.path.abspath(__file__), "--device", str(device)]
    command += ["--threads", str(torch.get_num_threads()), "--memory_of", kind, form]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def memory_of(kind, form, device):
    before = utils.peak_memory(device)
    step, _ = build(kind, form, device)
    for _ in range(3):
        step()
    print(json.dumps([before * 2**30, utils.peak_memory(device) * 2**30]))


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


class Table:
    """Rows of figures, printed as they come and kept for the JSON."""

    columns = ("", "median", "quartiles", "must", "goal")
    widths = (70, 12, 19, 8, 8)

    def __init__(self):
        self.rows, self.section = [], ""
        self._print(self.columns)

    def _print(self, cells):
        texts = [f"{text:{'<' if i == 0 else '>'}{w}}" for i, (text, w) in
                 enumerate(zip(cells, self.widths, strict=True))]  # fmt: skip
        print("  ".join(texts).rstrip(), flush=True)

    def title(self, text):
        self.section = text
        print(f"\n{text}")

    def add(self, name, values, unit="", must=None, goal=None, at_least=False, digits=3):
        """Add a row.

        Parameters
        ----------
        name, unit : str
        values : number, or array of repetitions
        must, goal : float, optional
            Limits of the median: upper ones, or lower ones if `at_least`.
        """
        values = np.atleast_1d(np.asarray(values, float))
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        row = dict(
            section=self.section, name=name, median=float(median), unit=unit,
            repetitions=len(values), must=must, goal=goal,
        )  # fmt: skip
        if len(values) > 1:
            row.update(lower_quartile=float(low), upper_quartile=float(high))
        limits = []
        for limit in (must, goal):
            met = limit is not None and (median >= limit if at_least else median <= limit)
            sign = "≥" if at_least else "≤"
            limits.append("" if limit is None else f"{sign} {limit:g}{' ✓' if met else ' ✗'}")
        if must is not None:
            row["met"] = bool(median >= must if at_least else median <= must)
        self.rows.append(row)

        def text(value):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"

        spread = f"{text(low)} – {text(high)}" if len(values) > 1 else ""
        self._print([f"  {name}", f"{text(median)} {unit}".rstrip(), spread, *limits])


def measure_steps(table, device, repetitions):
    # Memory first, while this process is small: a child inherits the peak of its parent.
    memory = {kind: {form: peak_bytes(kind, form, device) for form in ("fast", "plain")}
              for kind in KINDS}  # fmt: skip
    of = "of the process" if device.type == "cpu" else "of the tensors"
    step_seconds = {}
    for kind, title in KINDS.items():
        table.title(title)
        (fast, _), (slow, _) = (build(kind, form, device) for form in ("fast", "plain"))
        reads = device_reads(fast), device_reads(slow)
        times = by_turns([fast, slow], repetitions, device)
        step_seconds[kind] = np.median(times[:, 0])
        must, goal = LIMITS[kind]["time"]
        table.add("time, share of the plain form", times[:, 0] / times[:, 1], "", must, goal)
        table.add("time", 1e3 * times[:, 0], "ms")
        table.add("time of the plain form", 1e3 * times[:, 1], "ms")
        gib = {form: peak / 2**30 for form, (_, peak) in memory[kind].items()}
        must, goal = LIMITS[kind].get("memory", (None, None))
        table.add(f"peak memory {of}, share of the plain form", gib["fast"] / gib["plain"], "",
                  must, goal)  # fmt: skip
        table.add(f"peak memory {of}", gib["fast"], "GiB")
        table.add(f"peak memory {of}, plain form", gib["plain"], "GiB")
        if device.type == "cpu":
            before = np.mean([before for before, _ in memory[kind].values()]) / 2**30
            table.add("  of it before there is a network", before, "GiB")
        table.add("device reads in forward, backward, clip and SGD", reads[0], "", 0, 0)
        table.add("device reads of the plain form", reads[1])
        del fast, slow
    return step_seconds


def measure_recovery(table, step_seconds, repetitions):
    table.title("recovery of all 8 nodes (on the CPU)")
    torch.manual_seed(0)
    net = Network(4, 10, 2)  # the size of the network does not matter
    cpu, rng = torch.device("cpu"), np.random.default_rng(0)

    def problems():
        return [
            (A.numpy(), b.detach().double().numpy(), code.lam, z.numpy().copy())
            for code in net.codes
            for A, b, z in zip(code.A, code.b, code.z, strict=True)
        ]

    def solve(warm):
        return [ista.recover(A, b, lam, z0=z if warm else None) for A, b, lam, z in given]

    cold, warm, whole, gaps = [], [], [], []
    while len(warm) < repetitions:
        for b in net.arch_parameters():  # of the sizes that they have in a search
            b.data = torch.from_numpy(10 ** rng.uniform(-2, 0) * rng.standard_normal(7)).float()
        given = problems()
        cold.append(seconds(lambda: solve(warm=False), cpu))
        net.recover()
        before = torch.cat([z.sign() for code in net.codes for z in code.z])
        for b in net.arch_parameters():  # as the first step of Adam
            signs = torch.from_numpy(rng.choice((-1, 1), 7))
            b.data += search.TWO_STAGE["arch_learning_rate"] * signs
        given = problems()
        elapsed = seconds(lambda: solve(warm=True), cpu)
        elapsed_whole = seconds(net.recover, cpu)
        if torch.equal(torch.cat([z.sign() for code in net.codes for z in code.z]), before):
            warm.append(elapsed)  # the last support is still optimal
            whole.append(elapsed_whole)
        gaps.append(max(
            ista.duality_gap(A, b, z, lam) / (0.5 * b @ b) for A, b, lam, z in problems()
        ))  # fmt: skip
    cold, warm, whole = (1e3 * np.array(times) for times in (cold, warm, whole))
    table.add("cold", cold, "ms", 5)
    table.add("warm: the last support is still optimal", warm, "ms", 0.5)
    table.add("largest gap, relative to ½‖b‖²", max(gaps), "", 1e-9)
    table.add("warm, with the bookkeeping of the supernet", whole, "ms")
    table.add("that, in % of a two-stage step", 0.1 * whole / step_seconds["two-stage"], "%", 2)
    try:
        net.recover("clarabel")
        times = [seconds(lambda: net.recover("clarabel"), cpu) for _ in range(5)]
        table.add("CVXPY with Clarabel", 1e3 * np.array(times), "ms")
    except ista.SolverUnavailable:
        print("  (CVXPY and Clarabel are not installed)")


def measure_data(table, device, repetitions):
    table.title("training images a second, augmented, on one core" if device.type == "cpu"
                else "training images a second, augmented, on the device")  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    n, size = 4096, 256
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (n,))
    mean, std = data.CIFAR10_MEAN, data.CIFAR10_STD
    ours = data.Images(images.to(device), labels.to(device), list("0123456789"), mean, std)
    batches = data.Batches(ours, size, train=True, channels_last=True)
    functions = [lambda: [None for _ in batches]]
    try:
        from torchvision import transforms
        from torchvision.transforms.functional import to_pil_image

        pil = [to_pil_image(image) for image in images]
        transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(mean, std),
        ])  # fmt: skip

        def torchvision():
            for start in range(0, n, size):
                torch.stack([transform(image) for image in pil[start : start + size]])

        functions.append(torchvision)
    except ImportError:
        print("  (torchvision is not installed)")
    rates = n / by_turns(functions, repetitions, device, warm_up=1)
    if len(functions) == 2:
        table.add("times those of torchvision on PIL images", rates[:, 0] / rates[:, 1], "", 10,
                  at_least=True)  # fmt: skip
    for rate, name in zip(rates.T, ("ours", "torchvision"), strict=False):
        table.add(name, rate, "/s")
    torch.set_num_threads(threads)


def measure_growth(table, device, repetitions):
    """Steps in spaces of 7, 14 and 28 operations an edge, the available ones repeated."""
    published = list(PRIMITIVES)

    def in_space(copies, function):
        PRIMITIVES[:] = published * copies
        try:
            return function()
        finally:
            PRIMITIVES[:] = published

    table.title("growth: the two-stage step in spaces of 14 and 28 operations, to that in 7")
    built = [in_space(k, lambda: build("two-stage", "fast", device)) for k in (1, 2, 4)]
    times = by_turns([step for step, _ in built], repetitions, device)
    saved = [saved_bytes(step, net) for step, net in built]
    for i, n in ((1, 14), (2, 28)):
        table.add(f"time, {n} operations", times[:, i] / times[:, 0], "", 1.1)
        table.add(f"activation memory, {n} operations", saved[i] / saved[0], "", 1.1)
    del built

    # For comparison a relaxation as in DARTS, where every operation runs. The rest is `plain.py`.
    table.title("growth of a network that runs every operation (2 cells, batch 8)")
    sparse_weights = plain.weights

    def dense_weights(code):
        w = torch.cat([A.sum(0) * b.sum() for A, b in zip(code.A, code.b, strict=True)])
        return w.view(14, -1).softmax(dim=1)

    plain.weights = dense_weights
    try:
        built = [in_space(k, lambda: build("two-stage", "plain", device, 8, 2)) for k in (1, 2, 4)]
        times = by_turns([step for step, _ in built], 3, device, warm_up=1)
        saved = [saved_bytes(step, net) for step, net in built]
    finally:
        plain.weights = sparse_weights
    for i, n in ((1, 14), (2, 28)):
        table.add(f"time, {n} operations", times[:, i] / times[:, 0])
        table.add(f"activation memory, {n} operations", saved[i] / saved[0])


def machine(device):
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as file:
                names = [line.split(":")[1].strip() for line in file if "model name" in line]
            processor = names[0] if names else processor
    return dict(
        device=str(device), processor=processor, cores=os.cpu_count(),
        threads=torch.get_num_threads(), torch=torch.__version__,
        python=platform.python_version(), system=platform.system(),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as torch chooses)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--out", metavar="FILE", help="write the figures to a JSON as well")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        return memory_of(*args.memory_of, device)

    about = machine(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    repetitions = 3 if args.quick else 9
    table = Table()
    step_seconds = measure_steps(table, device, repetitions)
    measure_recovery(table, step_seconds, 20 * repetitions)
    measure_data(table, device, repetitions)
    measure_growth(table, device, repetitions)
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"machine": about, "figures": table.rows}, file, indent=1)


if __name__ == "__main__":
    main()
