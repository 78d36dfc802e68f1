"""Measure what a step costs.

    python benchmarks/bench.py                            # a few minutes on a CPU
    python benchmarks/bench.py --quick --threads 1        # fewer repetitions
    python benchmarks/bench.py --device cuda --out bench.json
    python benchmarks/bench.py --device cuda --kinds retraining --forms compiled --profile

Ours are the epoch functions of `search.py` and `train.py` on the network that `fast.accelerate`
returns, with random images. Figures are medians of the repetitions.

On a CPU they are shares of the plain form: the network itself, in contiguous memory, with a step
written in the most obvious way, `plain_step`. As seconds change with the machine and with what else
it does, both forms run by turns, and what counts is the ratio. Each has a process of its own, as it
has in use, for `fast.accelerate` also changes how a process gets its memory; memory is the peak of
that process. On a busy machine set OMP_NUM_THREADS=1: threads that wait for each other multiply the
noise.

On CUDA, at the published sizes, each form of a step is held to a limit: the bytes that the
operators of the eager float32 step read and write, at the bandwidth with which this device copies,
and at least 2.5 µs for each operator. Time and peak memory are of a step as the script runs it;
kernels and their time are the profiler's; `first` is the first step, in which cuDNN looks for its
kernels and what is compiled is compiled, and `record` what recording a CUDA graph takes.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler logs all that it does

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import fast
import genotypes
import search
import train
import utils
from genotypes import NODES, PRIMITIVES
from harness import flags, runs
from model import NetworkCIFAR
from model_search import Network

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
KINDS = {  # flags at the sizes of the scripts, and images of a step on a CPU
    "two-stage": ([], 64), "one-stage": (["--one_stage"], 8),
    "retraining": (["--arch", "ISTA_twostage"], 8),
}
LAYOUTS = {"channels-last": torch.channels_last, "nchw": torch.contiguous_format}
SMALL = ["--init_channels", "4", "--layers", "3", "--batch_size", "8"]


class Form(NamedTuple):
    """A way to compute a step."""

    name: str
    graphs: bool = False
    amp: bool = False
    compiled: bool = False
    is_plain: bool = False


ON_CPU = Form("ours"), Form("plain form", is_plain=True)
ON_CUDA = (
    Form("eager"), Form("graph", graphs=True), Form("bfloat16", graphs=True, amp=True),
    Form("compiled", graphs=True, compiled=True),
    Form("compiled bfloat16", graphs=True, amp=True, compiled=True),
)


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------


def one_by_one(sgd, *adam):
    """Optimizers as these that take a parameter at a time, as torch does by default on a CPU."""
    for optimizer in adam:
        optimizer.param_groups[0].update(fused=False, foreach=False)
    (group,) = sgd.param_groups
    return [torch.optim.SGD(**group, foreach=False), *adam]


def plain_step(net, optimizers, args, batch, arch_batch=None):
    """A step of either search or of retraining, as the text of the method has it.

    Every pass computes the gradients of all parameters, and its loss is read at once. In two-stage
    search b moves on a batch of its own. The optimizers are SGD on the weights and maybe Adam on b.
    """
    sgd, *adam = optimizers

    def backward(x, y):
        logits, logits_aux = net(x)
        loss, total = utils.criterion(logits, logits_aux, y, args)
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


class Batches(list):
    """Some batches, as the epoch functions take them."""

    def endless(self):
        return itertools.cycle(self)


def build(kind, form, device, more=(), layout=None, network=Network):
    """A network, and a function run(steps, progress) that trains it for so many steps.

    `more` are flags of the script; the memory format is by default that of the script.
    """
    torch.manual_seed(0)
    script = train if kind == "retraining" else search
    args = script.get_args_parser().parse_args([*KINDS[kind][0], *more, *["--amp"] * form.amp])
    args.learning_rate = 1e-5  # a network that sees one batch over and over might diverge
    shape = args.init_channels, 10, args.layers
    if kind == "retraining":
        net = NetworkCIFAR(*shape, args.auxiliary, genotypes.ISTA_twostage)
        optimizers = [utils.SGD(
            net.to(device).parameters(), args.learning_rate, args.momentum, args.weight_decay
        )]
    else:
        net = network(*shape, one_stage=args.one_stage, auxiliary=args.auxiliary)
        choose(net, genotypes.ISTA_onestage if args.one_stage else genotypes.ISTA_twostage)
        optimizers = search.optimizers(net.to(device), args)
    layout = layout or utils.memory_format(device, args.amp, kind == "two-stage")
    layout = torch.contiguous_format if form.is_plain else layout
    net = net.to(memory_format=layout).train()

    def random_batch():
        x, y = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))
        return x.to(device).contiguous(memory_format=layout), y.to(device)

    first, second = random_batch(), random_batch()
    if form.is_plain:
        optimizers = one_by_one(*optimizers)
    elif form.compiled:
        fast.compile_network(net, whole=kind == "retraining", log=lambda text: None)
    else:
        fast.accelerate(net)
    graphs = utils.Graphs(form.graphs, lambda: None, print)

    def run(steps, progress):
        batches, of_run = Batches(steps * [first]), SimpleNamespace(args=args, progress=progress)
        if form.is_plain:
            for x in batches:
                plain_step(net, optimizers, args, x, second if kind == "two-stage" else None)
                progress.step()
        elif kind == "retraining":
            train.train_epoch(net, batches, *optimizers, of_run, graphs)
        elif kind == "one-stage":
            search.one_stage_epoch(net, batches, *optimizers, of_run, graphs)
        else:
            search.two_stage_epoch(net, batches, Batches([second]), *optimizers, of_run, graphs)

    return net, run


def choose(net, genotype):
    """Set the support of a supernet to the pairs of a genotype."""
    for code, pairs in zip(net.codes, (genotype.normal, genotype.reduce), strict=True):
        codes = [np.zeros(len(z)) for z in code.z]
        for i, (primitive, edge) in enumerate(pairs):
            node = i * NODES // len(pairs)
            codes[node][len(PRIMITIVES) * edge + PRIMITIVES.index(primitive)] = 1
        code.accept(codes, code.choose(codes))


# ------------------------------------------------------------------------------------------------
# Clocks
# ------------------------------------------------------------------------------------------------


class Clock:
    """Seconds since it was made, or since so many steps were done; and those of each lap."""

    def __init__(self, device, steps=0, laps=None):
        self.device, self.left, self.laps, self.began = device, steps, laps, 0
        self.began = self.seconds()

    def step(self, meter=None):
        self.left -= 1
        if self.left == 0 or self.laps is not None:
            elapsed = self.seconds()
            self.began += elapsed
            if self.laps is not None:
                self.laps.append(elapsed)

    def seconds(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.began


def seconds(function, device):
    """Time of one call."""
    clock = Clock(device)
    function()
    return clock.seconds()


def step_timer(run, device):
    """A function that trains for a step, or on CUDA for eleven, and returns the time of one."""
    skipped, steps = (1, 10) if device.type == "cuda" else (0, 1)  # an epoch ends in a host sync

    def timer():
        clock = Clock(device, skipped)
        run(skipped + steps, clock)
        return clock.seconds() / steps

    return timer


def by_turns(timers, repetitions):
    """What functions return that are called one after the other: (repetitions, functions)."""
    for timer in timers:  # to warm up
        timer()
    return np.array([[timer() for timer in timers] for _ in range(repetitions)])


# ------------------------------------------------------------------------------------------------
# What a step asks for
# ------------------------------------------------------------------------------------------------


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


def host_syncs(function, *args):
    """How often a call would wait for a device, as far as one sees on the CPU."""
    with Reads() as reads, Copies() as copies:
        function(*args)
    return reads.count + copies.count


class Traffic(TorchDispatchMode):
    """Bytes that each operator on a device reads and writes; views, which do neither, left out."""

    def __init__(self, device):
        super().__init__()
        self.device, self.bytes = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned, schema = func(*args, **kwargs), func._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not is_view and not schema.name.startswith(("aten::empty", "aten::new_empty")):
            read = tree_leaves((args, kwargs))
            written = [
                kwargs.get(a.name, args[i] if i < len(args) else None)
                for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write
            ]
            if not written:
                written = [returned]
            moved = sum(map(self.size, (*read, *tree_leaves(written))))
            if moved:
                self.bytes.append(moved)
        return returned

    def size(self, x):
        """Bytes of a tensor, if it is one of the device; expanded ones are small."""
        if not isinstance(x, torch.Tensor) or x.device != self.device:
            return 0
        return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())

    def limit(self, bandwidth):
        """Seconds for all this, at so many bytes a second."""
        return sum(max(moved / bandwidth, 2.5e-6) for moved in self.bytes)


def copy_bandwidth(device):
    """Bytes that a copy of a large tensor reads and writes in a second."""
    source = torch.rand(2**28, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * source.numel() * source.element_size() / np.median(times[2:])


def kernels(run, device):
    """Name, number and milliseconds of the kernels of a step, the longest first."""
    steps = 3
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(steps, Clock(device))
    rows = [(e.key, e.count / steps, getattr(e, "self_device_time_total", 0) / 1e3 / steps)
            for e in profiler.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


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


# ------------------------------------------------------------------------------------------------
# On CUDA: the limit, and what each form of a step makes of it
# ------------------------------------------------------------------------------------------------


def measure_cuda(device, args):
    """Print a table for each kind of step; yields its rows."""
    options = dict(more=SMALL if args.small else [], layout=LAYOUTS.get(args.layout))
    bandwidth = copy_bandwidth(device)
    for kind in args.kinds:
        traffic = traffic_of(kind, device, options)
        limit, moved = 1e3 * traffic.limit(bandwidth), sum(traffic.bytes)
        print(f"\n{kind}, {args.layout}: {len(traffic.bytes):,} operators move {moved / 1e9:.1f} "
              f"GB, at {bandwidth / 1e12:.2f} TB/s: {limit:.1f} ms\n"
              f"  {'form':18}{'ms':>8}{'limit/ms':>10}{'kernels':>9}{'their ms':>10}{'first s':>9}"
              f"{'record s':>10}{'GiB':>7}")
        for form in (form for form in ON_CUDA if form.name in args.forms):
            row = dict(kind=kind, form=form.name, layout=args.layout, limit=limit, bytes=moved,
                       operators=len(traffic.bytes), bandwidth=bandwidth)
            try:
                row |= measure_form(kind, form, device, options, 3 if args.quick else 7)
                print(table_row(row), flush=True)
                for name, count, ms in row["kernels"][: 20 * args.profile]:
                    print(f"    {ms:8.3f} ms {count:7.1f}  {name[:80]}")
            except Exception as error:  # the other forms are still worth their time
                said = (str(error).splitlines() or [""])[0]
                row["error"] = f"{type(error).__name__}: {said}"
                print(f"  {form.name:18}{row['error'][:80]}", flush=True)
                torch.cuda.set_stream(torch.cuda.default_stream())
            yield row
            gc.collect()
            torch.cuda.empty_cache()


def traffic_of(kind, device, options):
    """The `Traffic` of an eager step in float32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # its search takes long
        _, run = build(kind, ON_CUDA[0], device, **options)
        run(1, Clock(device))  # makes the momenta
        with Traffic(device) as traffic:
            run(1, Clock(device))
    return traffic


def measure_form(kind, form, device, options, repetitions):
    """What is measured of a form, a dict; times in milliseconds but for `first` and `record`."""
    torch.cuda.reset_peak_memory_stats()
    _, run = build(kind, form, device, **options)
    laps = []
    run(4, Clock(device, laps=laps))
    times = [1e3 * t for t in by_turns([step_timer(run, device)], repetitions)[:, 0]]
    peak = utils.peak_memory(device)
    first, *others = laps
    return dict(
        ms=float(np.median(times)), times=times, first=first, peak=peak,
        record=max(max(others) - np.median(times) / 1e3, 0) if form.graphs else None,
        kernels=kernels(run, device),
    )


def table_row(row):
    found = row["kernels"]  # none on a device without the profiler's CUDA side
    of_kernels = (f"{sum(count for _, count, _ in found):9,.0f}{sum(ms for *_, ms in found):10.1f}"
                  if found else f"{'–':>9}{'–':>10}")
    record = f"{'–':>10}" if row["record"] is None else f"{row['record']:10.2f}"
    return (f"  {row['form']:18}{row['ms']:8.1f}{row['limit'] / row['ms']:10.0%}{of_kernels}"
            f"{row['first']:9.1f}{record}{row['peak']:7.2f}")


# ------------------------------------------------------------------------------------------------
# On a CPU: shares of the plain form
# ------------------------------------------------------------------------------------------------


class FormProcess:
    """A process of its own that trains in one form: a call trains a step, and returns its time.

    Attributes
    ----------
    before, peak : float
        GiB before there is a network, and at the peak of 3 steps.
    syncs : int
        Host syncs in a step, without those at the end of an epoch.
    """

    def __init__(self, kind, form):
        command = [sys.executable, __file__, "--serve", kind, form.name]
        command += ["--threads", str(torch.get_num_threads())]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes)
        self.before, self.peak, self.syncs = json.loads(self.process.stdout.readline())

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self):
        self.process.communicate()


def serve(kind, form):
    """The other side of a `FormProcess`."""
    before = utils.peak_memory(CPU)
    net, run = build(kind, form, CPU, batch_flags(kind))
    one, two = (host_syncs(run, n, Clock(CPU)) for n in (1, 2))
    peak = utils.peak_memory(CPU)
    timer = step_timer(run, CPU)
    print(json.dumps([before, peak, two - one]), flush=True)
    for _ in sys.stdin:
        print(timer(), flush=True)


def batch_flags(kind):
    return ["--batch_size", str(KINDS[kind][1])]


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


def measure_steps(table, repetitions):
    """Time, peak memory and host syncs of the three steps, in both forms."""
    # First of all, while this process is small: a child inherits the peak of its parent.
    for kind, (_, batch) in KINDS.items():
        table.title(f"{kind} step of the published network, batch {batch}")
        processes = [FormProcess(kind, form) for form in ON_CPU]
        times = by_turns(processes, repetitions)
        for i, (form, process) in enumerate(zip(ON_CPU, processes, strict=True)):
            process.end()
            table.add(f"time, {form.name}", 1e3 * times[:, i], "ms")
            table.add("  peak memory of the process", process.peak, "GiB")
            table.add("    of it before there is a network", process.before, "GiB")
            if not form.is_plain:
                table.add("  time, share of the plain form", times[:, i] / times[:, 1])
                table.add("  peak memory, share of the plain form",
                          process.peak / processes[1].peak)
            table.add("  host syncs", process.syncs)


def measure_recovery(table, repetitions):
    """Cold and warm solves of all codes, of points as large as they are in a search."""
    table.title("recovery of all 8 nodes")
    torch.manual_seed(0)
    net = Network(4, 10, 2)  # the size of the network does not matter

    def solve():
        return [code.solve() for code in net.codes]

    cold, warm, whole = [], [], []
    for _ in range(20 * repetitions):
        for b in net.arch_parameters():
            b.data = torch.randn(len(b)) / 100 ** torch.rand(1)
        for code in net.codes:
            code.accept([np.zeros(len(z)) for z in code.z], code.support)
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


def measure_data(table, repetitions):
    """Augmented batches of ours, and of torchvision's transforms on PIL images, on one core."""
    table.title("training images a second, augmented, one core")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    n, size, mean, std = 4096, 256, data.CIFAR10_MEAN, data.CIFAR10_STD
    pixels, labels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 10
    images = data.Images(pixels, labels, list("0123456789"), mean, std)
    batches = images.batches(size, train=True, memory_format=torch.channels_last)
    pil = [transforms.ToPILImage()(image) for image in pixels]
    transform = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(mean, std),
    ])

    def ours():
        return seconds(lambda: [None for _ in batches], CPU)

    def torchvision():
        parts = (pil[i : i + size] for i in range(0, n, size))
        return seconds(lambda: [torch.stack([*map(transform, part)]) for part in parts], CPU)

    times = by_turns([ours, torchvision], repetitions)
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


def measure_growth(table, repetitions):
    """Steps in spaces of 7, 14 and 28 operations an edge, the available ones repeated."""
    published, (ours, plain) = list(PRIMITIVES), ON_CPU
    for title, times, options in (
        ("two-stage step", repetitions, (ours, CPU, batch_flags("two-stage"))),
        ("where all of them run, 2 cells, batch 8", 3,
         (plain, CPU, ["--batch_size", "8", "--layers", "2"], None, Dense)),
    ):
        table.title(f"growth with the operations: {title}")
        built = []
        for copies in (1, 2, 4):
            PRIMITIVES[:] = published * copies
            built.append(build("two-stage", *options))
        PRIMITIVES[:] = published
        taken = by_turns([step_timer(run, CPU) for _, run in built], times)
        saved = [saved_bytes(run, net, CPU) for net, run in built]
        for i, n in ((1, 14), (2, 28)):
            table.add(f"time, {n} operations to 7", taken[:, i] / taken[:, 0])
            table.add(f"activation memory, {n} operations to 7", saved[i] / saved[0])


def measure_start(table, repetitions):
    """What a person waits for: the first step of a search, and the help."""
    table.title("start: python search.py --dataset digits")
    command = [sys.executable, str(ROOT / "search.py")]
    tiny = "--dataset digits --image_size 8 --init_channels 2 --layers 3 --report_freq 1".split()

    def first_step():
        clock = Clock(CPU)
        with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
            [*command, *tiny, "--device", "cpu", "--save", f"{folder}/run"],
            stdout=subprocess.PIPE, text=True,
        ) as script:
            reached = any("step 1/" in line for line in script.stdout)
            elapsed = clock.seconds()
            script.kill()
        return elapsed if reached else np.nan

    def prompt():
        return seconds(lambda: subprocess.run([*command, "--help"], stdout=subprocess.PIPE), CPU)

    times = by_turns([first_step, prompt], 1 + repetitions // 2)
    table.add("to the first step", times[:, 0], "s")
    table.add("--help to the prompt", times[:, 1], "s")


# ------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------


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


def get_args_parser():
    parser = flags.Parser("bench.py", __doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--quick", action="store_true", default=False,
                        help="fewer repetitions, and nothing is compiled")
    parser.add_argument("--out", type=flags.name, metavar="FILE",
                        help="write the figures to a JSON as well")
    parser.add_argument("--threads", type=flags.whole(1, 1024), metavar="N",
                        help="of the CPU (default: as torch chooses)")
    group = parser.add_argument_group("on CUDA")
    forms = [form.name for form in ON_CUDA]
    group.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS], metavar="KIND",
                       help=f"of {', '.join(KINDS)} (default: all)")
    group.add_argument("--forms", nargs="+", choices=forms, metavar="FORM",
                       help=f"of {', '.join(map(repr, forms))} (default: all)")
    group.add_argument("--layout", choices=["default", *LAYOUTS], default="default",
                       help="memory format of the tensors (default: that of the scripts)")
    group.add_argument("--profile", action="store_true", default=False,
                       help="print the twenty most expensive kernels of each form")
    group.add_argument("--small", action="store_true", default=False,
                       help="tiny networks, to try this script")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    return parser


def main():
    args = get_args_parser().parse_args()
    device = utils.choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.serve:
        kind, name = args.serve
        serve(kind, {form.name: form for form in ON_CPU}[name])
        return
    args.forms = args.forms or [f.name for f in ON_CUDA if not (args.quick and f.compiled)]
    about, table = machine(device), Table()
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    def keep():  # what is measured by now, for this may be cut off
        if args.out:
            with utils.replacing(args.out) as file:
                file.write(json.dumps({"machine": about, "figures": table.rows}, indent=1).encode())

    if device.type == "cuda":
        for row in measure_cuda(device, args):
            table.rows.append(row)
            keep()
    else:
        for measure in measure_steps, measure_recovery, measure_data, measure_growth, measure_start:
            measure(table, repetitions=3 if args.quick else 9)
            keep()


if __name__ == "__main__":
    with runs.command("bench.py"):
        main()
