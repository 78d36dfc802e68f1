"""Measure what a step costs, against the plain form of the same step, in one table.

    python benchmarks/bench.py                  # a few minutes on a CPU; --quick: fewer repetitions
    python benchmarks/bench.py --device cuda --out bench.json

Ours are the epoch functions of `search.py` and `train.py` on the network that `fast.accelerate`
returns, with random images. The plain form is the network itself, in contiguous memory, with a
step written in the most obvious way: `plain_step`. As seconds change with the machine and with
what else it does, all forms run by turns, and what counts is the ratio. Each form has a process of
its own, as it has in use, for `fast.accelerate` also changes how a process gets its memory. Figures
are medians of the repetitions. Memory is the peak of that process (on CUDA: of its tensors).
On a busy machine set OMP_NUM_THREADS=1: threads that wait for each other multiply the noise.
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import arguments
import data
import fast
import genotypes
import runs
import search
import train
import utils
from genotypes import PRIMITIVES
from model import NetworkCIFAR
from model_search import Network

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
KINDS = {
    "two-stage": "two-stage step: C=16, 8 cells, batch 64 + 64",
    "retraining": "retraining step: ISTA_twostage, C=36, 20 cells, auxiliary, batch 8",
    "one-stage": "one-stage step: C=36, 20 cells, auxiliary, batch 8",
}


def one_by_one(optimizers):
    """Have optimizers take their parameters one at a time, as they do by default on a CPU."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(foreach=False, fused=False)
    return optimizers


def plain_step(net, optimizers, args, batch, arch_batch=None):
    """A step of either search or of retraining, as the text of the method has it.

    Every pass computes the gradients of all parameters, and its loss is read at once. In two-stage
    search b moves on a batch of its own. The optimizers are SGD on the weights and maybe Adam on b.
    """
    sgd, *adam = optimizers

    def backward(x, y):
        logits, logits_aux = net(x)
        loss, total = utils.losses(logits, logits_aux, y, args)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        return loss.item(), (logits.argmax(1) == y).float().mean().item()

    backward(*(arch_batch or batch))
    for optimizer in adam:
        optimizer.step()
    if arch_batch:
        backward(*batch)
    clip_grad_norm_(sgd.param_groups[0]["params"], args.grad_clip, foreach=False)
    sgd.step()


class Form(NamedTuple):
    name: str
    memory_format: torch.memory_format = torch.contiguous_format
    cuda_graphs: bool = False
    is_plain: bool = False


def forms(device):
    """Ours as the scripts run it, the plain form, and on CUDA other ways to run ours."""
    usual, other = utils.memory_format(device, amp=False), torch.channels_last
    every = [Form("ours", usual), Form("plain form", is_plain=True)]
    if device.type == "cuda":
        every += [Form("ours, channels-last", other), Form("ours, CUDA graphs", usual, True),
                  Form("ours, channels-last, CUDA graphs", other, True)]
    return every


class Batches(list):
    """Some batches, as the epoch functions take them."""

    def endless(self):
        return itertools.cycle(self)


class Clock:
    """Seconds since it was made, or since so many steps were done."""

    def __init__(self, device, steps=0):
        self.device, self.left, self.began = device, steps, 0
        self.began = self.seconds()

    def step(self, meter=None):
        self.left -= 1
        if self.left == 0:
            self.began += self.seconds()

    def seconds(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.began


def build(kind, form, device, batch=None, layers=None, network=Network):
    """A network, and a function run(steps, progress) that trains it for so many steps."""
    torch.manual_seed(0)
    script = train if kind == "retraining" else search
    flags = {"one-stage": ["--one_stage"], "retraining": ["--arch", "ISTA_twostage"]}
    args = script.get_args_parser().parse_args(flags.get(kind, []))
    args.cuda_graphs, C, layers = form.cuda_graphs, args.init_channels, layers or args.layers
    if kind == "retraining":
        net = NetworkCIFAR(C, 10, layers, True, genotypes.ISTA_twostage)
        optimizers = [torch.optim.SGD(net.parameters(), args.learning_rate, args.momentum,
                                      weight_decay=args.weight_decay, foreach=True)]
    else:
        net = network(C, 10, layers, one_stage=args.one_stage, auxiliary=args.auxiliary)
        choose(net, genotypes.ISTA_onestage if args.one_stage else genotypes.ISTA_twostage)
        optimizers = search.optimizers(net.to(device), args)
    net = net.to(device, memory_format=form.memory_format).train()

    def random_batch():
        n = batch or (64 if kind == "two-stage" else 8)
        x, y = torch.randn(n, 3, 32, 32), torch.randint(10, (n,))
        return x.to(device).contiguous(memory_format=form.memory_format), y.to(device)

    first, second = random_batch(), random_batch()
    if form.is_plain:
        optimizers = one_by_one(optimizers)
    else:
        fast.accelerate(net)

    def run(steps, progress):
        batches, arch_batches = Batches(steps * [first]), Batches([second])
        if form.is_plain:
            for x in batches:
                plain_step(net, optimizers, args, x, second if kind == "two-stage" else None)
                progress.step()
        elif kind == "retraining":
            train.train_epoch(net, net, batches, *optimizers, args, progress)
        elif kind == "one-stage":
            search.one_stage_epoch(net, net, batches, *optimizers, args, progress)
        else:
            search.two_stage_epoch(net, net, batches, arch_batches, *optimizers, args, progress, 1)

    return net, run


def choose(net, genotype):
    """Set the support of a supernet to the pairs of a genotype."""
    for code, pairs in zip(net.codes, (genotype.normal, genotype.reduce), strict=True):
        codes = [np.zeros(len(z)) for z in code.z]
        for i, (primitive, edge) in enumerate(pairs):
            codes[i // 2][len(PRIMITIVES) * edge + PRIMITIVES.index(primitive)] = 1
        code.accept(codes)


def seconds(function, device):
    """Time of one call."""
    clock = Clock(device)
    function()
    return clock.seconds()


def step_timer(run, device):
    """A function that trains for a step, or on CUDA for twelve, and returns the time of one."""
    # A CUDA graph is recorded in the second step of an epoch, and an epoch ends in a host sync.
    skipped, steps = (2, 10) if device.type == "cuda" else (0, 1)

    def timer():
        clock = Clock(device, skipped)
        run(skipped + steps, clock)
        return clock.seconds() / steps

    return timer


def by_turns(timers, repetitions, warm_up=2):
    """What functions return that are called one after the other: (repetitions, functions)."""
    for timer in timers * warm_up:
        timer()
    return np.array([[timer() for timer in timers] for _ in range(repetitions)])


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts calls that wait on CUDA, but of which no operator tells on the CPU."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
        return func(*args, **(kwargs or {}))


def host_syncs(function, *args, device=CPU):
    """How often a call waits for the device; on the CPU, as far as one sees, would."""
    if device.type != "cuda":
        with Reads() as reads, Copies() as copies:
            function(*args)
        return reads.count + copies.count
    try:
        torch.cuda.set_sync_debug_mode("error")
        function(*args)
        return 0
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with warnings.catch_warnings(record=True) as waits:  # there are some: how many?
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        function(*args)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in waits)


def saved_bytes(run, net, device):
    """Bytes that the forward passes of a step keep for the backward pass, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    kept = {}  # by address, and alive, so that no other tensor gets it

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(1, Clock(device))
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


class FormProcess:
    """A process of its own that trains in one form: a call trains a step, and returns its time.

    Attributes
    ----------
    before, peak : float
        GiB before there is a network, and at the peak of 3 steps.
    syncs : int or None
        Host syncs in a step, without those at the end of an epoch; None in a CUDA graph.
    """

    def __init__(self, kind, form, device):
        command = [sys.executable, __file__, "--device", str(device), "--serve", kind, form.name]
        command += ["--threads", str(torch.get_num_threads())]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes)
        self.before, self.peak, self.syncs = json.loads(self.process.stdout.readline())

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self):
        self.process.communicate()


def serve(kind, form, device):
    """The other side of a `FormProcess`."""
    before = utils.peak_memory(device)
    net, run = build(kind, form, device)
    run(3, Clock(device))
    peak, syncs = utils.peak_memory(device), None
    if not form.cuda_graphs:
        one, two = (host_syncs(run, n, Clock(device), device=device) for n in (1, 2))
        syncs = two - one
    timer = step_timer(run, device)
    print(json.dumps([before, peak, syncs]), flush=True)
    for _ in sys.stdin:
        print(timer(), flush=True)


class Table:
    """Rows of figures, printed as they come and kept for the JSON."""

    def __init__(self):
        self.rows, self.section = [], ""

    def title(self, text):
        self.section = text
        print(f"\n{text:60}  {'median':>14}  {'quartiles':>19}")

    def add(self, name, values, unit=""):
        """Add a row: of a number, or of an array of repetitions."""
        values = np.atleast_1d(np.asarray(values, float))
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        self.rows.append(dict(
            section=self.section, name=name, median=median, unit=unit, repetitions=len(values),
            lower_quartile=low, upper_quartile=high,
        ))
        low, median, high = (f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in (low, median, high))
        spread = f"{low} – {high}" if len(values) > 1 else ""
        print(f"  {name:58}  {f'{median} {unit}'.rstrip():>14}  {spread:>19}".rstrip(), flush=True)


def measure_steps(table, device, repetitions):
    """Time, peak memory and host syncs of the three steps, in all forms."""
    # First of all, while this process is small: a child inherits the peak of its parent.
    every, of = forms(device), "the tensors" if device.type == "cuda" else "the process"
    for kind, title in KINDS.items():
        table.title(title)
        processes = [FormProcess(kind, form, device) for form in every]
        times = by_turns(processes, repetitions)
        for i, (form, process) in enumerate(zip(every, processes, strict=True)):
            process.end()
            table.add(f"time, {form.name}", 1e3 * times[:, i], "ms")
            table.add(f"  peak memory of {of}", process.peak, "GiB")
            if device.type != "cuda":
                table.add("    of it before there is a network", process.before, "GiB")
            if not form.is_plain:
                table.add("  time, share of the plain form", times[:, i] / times[:, 1])
                table.add("  peak memory, share of the plain form",
                          process.peak / processes[1].peak)
            if process.syncs is not None:
                table.add("  host syncs", process.syncs)


def measure_recovery(table, device, repetitions):
    """Cold and warm solves of all codes, of points as large as they are in a search."""
    table.title("recovery of all 8 nodes (on the CPU)")
    torch.manual_seed(0)
    net = Network(4, 10, 2)  # the size of the network does not matter

    def solve():
        return [code.solve() for code in net.codes]

    cold, warm, whole = [], [], []
    for _ in range(20 * repetitions):
        for b in net.arch_parameters():
            b.data = torch.randn(len(b)) / 100 ** torch.rand(1)
        for code in net.codes:
            code.accept([np.zeros(len(z)) for z in code.z])
        cold.append(1e3 * seconds(solve, CPU))
        net.recover()
        for b in net.arch_parameters():  # as the first step of Adam
            b.data += 6e-4 * torch.randn_like(b).sign()
        warm.append(1e3 * seconds(solve, CPU))
        whole.append(1e3 * seconds(net.recover, CPU))
    table.add("cold", cold, "ms")
    table.add("warm: after a step of Adam", warm, "ms")
    table.add("  with the bookkeeping of the supernet", whole, "ms")
    net.recover("clarabel")
    times = [seconds(lambda: net.recover("clarabel"), CPU) for _ in range(repetitions)]
    table.add("CVXPY with Clarabel, and the bookkeeping", 1e3 * np.array(times), "ms")


def measure_data(table, device, repetitions):
    """Augmented batches of ours, and of torchvision's transforms on PIL images, on one core."""
    table.title("training images a second, augmented, one core")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    n, size, mean, std = 4096, 256, data.CIFAR10_MEAN, data.CIFAR10_STD
    pixels, labels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 10
    images = data.Images(pixels.to(device), labels.to(device), list("0123456789"), mean, std)
    batches = images.batches(size, train=True, memory_format=utils.memory_format(device, False))
    pil = [transforms.ToPILImage()(image) for image in pixels]
    transform = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(mean, std),
    ])

    def ours():
        return seconds(lambda: [None for _ in batches], device)

    def torchvision():
        parts = (pil[i : i + size] for i in range(0, n, size))
        return seconds(lambda: [torch.stack([*map(transform, part)]) for part in parts], CPU)

    times = by_turns([ours, torchvision], repetitions, warm_up=1)
    torch.set_num_threads(threads)
    table.add("ours", n / times[:, 0], "/s")
    table.add("torchvision on PIL images", n / times[:, 1], "/s")
    table.add("ours, times torchvision's", times[:, 1] / times[:, 0])


class Dense(Network):
    """A relaxation as in DARTS, in which every operation runs."""

    def _given(self, code):
        weights = [(A.T @ b.double()).softmax(0) for A, b in zip(code.A, code.b, strict=True)]
        operations = len(weights[0]) // 2
        support = [[divmod(k, operations) for k in range(len(w))] for w in weights]
        return support, [w.to(self.classifier.weight.dtype).unbind() for w in weights]


def measure_growth(table, device, repetitions):
    """Steps in spaces of 7, 14 and 28 operations an edge, the available ones repeated."""
    published, (ours, plain, *_) = list(PRIMITIVES), forms(device)
    for title, times, options in (
        ("two-stage step", repetitions, (ours, device)),
        ("where all of them run, 2 cells, batch 8", 3, (plain, device, 8, 2, Dense)),
    ):
        table.title(f"growth with the operations: {title}")
        built = []
        for copies in (1, 2, 4):
            PRIMITIVES[:] = published * copies
            built.append(build("two-stage", *options))
        PRIMITIVES[:] = published
        taken = by_turns([step_timer(run, device) for _, run in built], times)
        saved = [saved_bytes(run, net, device) for net, run in built]
        for i, n in ((1, 14), (2, 28)):
            table.add(f"time, {n} operations to 7", taken[:, i] / taken[:, 0])
            table.add(f"activation memory, {n} operations to 7", saved[i] / saved[0])


def measure_start(table, device, repetitions):
    """What a person waits for: the first step of a search, and the help."""
    table.title("start: python search.py --dataset digits")
    command = [sys.executable, str(ROOT / "search.py")]
    flags = "--dataset digits --image_size 8 --init_channels 2 --layers 3 --report_freq 1".split()

    def first_step():
        clock = Clock(CPU)
        with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
            [*command, *flags, "--device", str(device), "--save", f"{folder}/run"],
            stdout=subprocess.PIPE, text=True,
        ) as script:
            reached = any(", step 1/" in line for line in script.stdout)
            elapsed = clock.seconds()
            script.kill()
        return elapsed if reached else np.nan

    def prompt():
        return seconds(lambda: subprocess.run([*command, "--help"], stdout=subprocess.PIPE), CPU)

    times = by_turns([first_step, prompt], repetitions, warm_up=1)
    table.add("to the first step", times[:, 0], "s")
    table.add("--help to the prompt", times[:, 1], "s")


def machine(device):
    """What the figures depend on."""
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processor = (re.findall("model name.*: (.*)", cpuinfo.read_text()) or [processor])[0]
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        processor=processor, cores=os.cpu_count(), threads=torch.get_num_threads(),
        torch=torch.__version__, python=platform.python_version(), system=platform.system(),
    )


def main():
    parser = arguments.Parser("bench.py", __doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--threads", type=arguments.whole(1, 1024),
                        help="of the CPU (default: as torch chooses)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--out", metavar="FILE", help="write the figures to a JSON as well")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = utils.choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.serve:
        kind, name = args.serve
        serve(kind, {form.name: form for form in forms(device)}[name], device)
        return

    about, table = machine(device), Table()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for measure in measure_steps, measure_recovery, measure_data, measure_growth, measure_start:
        measure(table, device, repetitions=3 if args.quick else 9)
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"machine": about, "figures": table.rows}, file, indent=1)


if __name__ == "__main__":
    with runs.command("bench.py"):
        main()
