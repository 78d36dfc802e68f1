"""Measure what a step costs.

    python benchmarks/bench.py                            # a few minutes on a CPU
    python benchmarks/bench.py --quick --threads 1        # fewer repetitions
    python benchmarks/bench.py --device cuda --out bench.json
    python benchmarks/bench.py --device cuda --kinds retraining --forms compiled --profile

Ours are the epoch functions of `search.py` and `train.py`, with random images. The figures are
medians of the repetitions.

On a CPU they are compared with the plain form: the same network under `layers.plain()`, in
contiguous memory, with the simplest possible step, `plain_step`. Times depend on the machine and on
its load, so both forms run by turns, and the ratio is what counts. Each form has its own process,
because `speedups.keep_freed_memory` changes how a process gets its memory, and because memory is
measured as the peak of the process. On a busy machine, set OMP_NUM_THREADS=1: threads that wait for
each other add noise.

On CUDA, at the published sizes, each form of a step is compared with a limit: the time to move the
bytes that the operators of the eager float32 step read and write, at the bandwidth with which this
device copies, and at least 2.5 µs for each operator. An epoch runs its first step eagerly, captures
the second, and replays the graph in the others; time and kernels are those of replayed steps.
`first` is the first step of all, which includes cuDNN's autotuning and compilation. `capture` is
the additional time of a step that is captured. Memory is the peak of all steps.
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
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler logs all that it does

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import genotypes
import layers
import search
import train
import utils
from genotypes import PRIMITIVES
from harness import flags, runs, speedups
from model import NetworkCIFAR
from model_search import Network, indices

CPU = torch.device("cpu")
KINDS = {  # flags at the sizes of the scripts, and images of a step on a CPU
    "two-stage": ([], 64), "one-stage": (["--one_stage"], 8),
    "retraining": (["--arch", "ISTA_twostage"], 8),
}
LAYOUTS = {"channels-last": torch.channels_last, "nchw": torch.contiguous_format}
SMALL = ["--init_channels", "4", "--layers", "3", "--batch_size", "8"]
NOT_REPLAYED = 3  # first steps of an epoch on CUDA: eager, captured, and one more to settle


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


def per_parameter_optimizers(sgd, *adam):
    """Return such optimizers that update one parameter at a time, torch's default on a CPU."""
    for optimizer in adam:
        optimizer.param_groups[0].update(fused=False, foreach=False)
    (group,) = sgd.param_groups
    return [torch.optim.SGD(**group, foreach=False), *adam]


def plain_step(net, optimizers, args, batch, arch_batch=None):
    """Make a step of a search or of retraining, as the paper describes it.

    Each backward pass computes the gradients of all parameters, and each loss is read immediately.
    In two-stage search, b moves on a batch of its own. The optimizers are SGD on the weights and,
    in a search, Adam on b.
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
    """Batches, as the epoch functions take them."""

    def endless(self):
        return itertools.cycle(self)


def build(kind, form, device, more=(), layout=None):
    """Build a network; return a function run(steps, progress) that trains it for an epoch.

    `more` are flags of the script; by default, the memory format is that of the script.
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
        net = Network(*shape, one_stage=args.one_stage, auxiliary=args.auxiliary)
        set_support(net, genotypes.ISTA_onestage if args.one_stage else genotypes.ISTA_twostage)
        optimizers = search.optimizers(net.to(device), args)
    layout = layout or utils.memory_format(device, args.amp, kind == "two-stage")
    layout = torch.contiguous_format if form.is_plain else layout
    net = net.to(memory_format=layout).train()

    def random_batch():
        x, y = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))
        return x.to(device).contiguous(memory_format=layout), y.to(device)

    first, second = random_batch(), random_batch()
    if form.is_plain:
        optimizers = per_parameter_optimizers(*optimizers)
    elif device.type == "cpu":
        speedups.keep_freed_memory()
    if form.compiled:
        speedups.compile_network(net, is_fixed=kind == "retraining", log=lambda text: None)

    def run(steps, progress):
        batches, arch_batches = Batches(steps * [first]), Batches([second])
        of_run = SimpleNamespace(args=args, progress=progress, warn=fail)
        if form.is_plain:
            with layers.plain():
                for batch in batches:
                    plain_step(
                        net, optimizers, args, batch, second if kind == "two-stage" else None
                    )
                    progress.step()
        elif kind == "retraining":
            train.train_epoch(net, batches, *optimizers, of_run, form.graphs)
        elif kind == "one-stage":
            search.one_stage_epoch(net, batches, *optimizers, of_run, form.graphs)
        else:
            search.two_stage_epoch(
                net, batches, arch_batches, *optimizers, of_run, form.graphs
            )

    return run


def fail(text, kind=None):
    """Raise what would be a warning of a run: a form without its graphs is not that form."""
    raise RuntimeError(text)


def set_support(net, genotype):
    """Have a supernet run the pairs of a genotype, with codes of 1."""
    for code, pairs in zip(net.codes, (genotype.normal, genotype.reduce), strict=True):
        support = [[(source, PRIMITIVES.index(primitive)) for primitive, source in node]
                   for node in genotypes.by_node(pairs)]
        codes = [np.zeros(len(z)) for z in code.z]
        for z, node in zip(codes, support, strict=True):
            z[indices(node)] = 1
        code.accept(codes, support)


# ------------------------------------------------------------------------------------------------
# Clocks
# ------------------------------------------------------------------------------------------------


class Clock:
    """The progress of an epoch, with the seconds since `skipped` steps ended, or since it was made.

    `laps`, if it is given, gets the seconds of each step. `at_start` is called when the clock
    starts after the skipped steps.
    """

    def __init__(self, device, skipped=0, laps=None, at_start=None):
        self.device, self.left, self.laps, self.at_start = device, skipped, laps, at_start
        self.began = self.now()

    def step(self, meter=None):
        self.left -= 1
        if self.laps is not None:
            self.laps.append(self.restart())
        elif self.left == 0:
            self.restart()
            if self.at_start is not None:
                self.at_start()

    def restart(self):
        now = self.now()
        elapsed, self.began = now - self.began, now
        return elapsed

    def seconds(self):
        return self.now() - self.began

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def seconds(function, device):
    """Seconds of one call."""
    clock = Clock(device)
    function()
    return clock.seconds()


def step_timer(run, device):
    """Return a function that trains for an epoch, and returns the seconds of a step.

    On CUDA, the epoch has ten replayed steps, because it ends in a host synchronization.
    """
    skipped, steps = (NOT_REPLAYED, 10) if device.type == "cuda" else (0, 1)

    def timer():
        clock = Clock(device, skipped)
        run(skipped + steps, clock)
        return clock.seconds() / steps

    return timer


def by_turns(timers, repetitions):
    """Call functions by turns; return what they return as an array, (repetitions, functions)."""
    for timer in timers:  # to warm up
        timer()
    return np.array([[timer() for timer in timers] for _ in range(repetitions)])


# ------------------------------------------------------------------------------------------------
# What a step on CUDA costs
# ------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Records the bytes that each operator on a device reads and writes, without views."""

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
        """Return the bytes of a tensor of the device; those of an expanded one are few."""
        if not isinstance(x, torch.Tensor) or x.device != self.device:
            return 0
        return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())

    def limit(self, bandwidth):
        """Return the seconds that all operators need at a bandwidth in bytes per second."""
        return sum(max(moved / bandwidth, 2.5e-6) for moved in self.bytes)


def copy_bandwidth(device):
    """Return the bytes per second that a copy of a large tensor reads and writes."""
    source = torch.rand(2**28, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * source.numel() * source.element_size() / np.median(times[2:])


def kernels(run, device):
    """Return name, number and milliseconds of the kernels of a step, the longest first."""
    steps, profiler = 3, profile(activities=[ProfilerActivity.CUDA])
    run(NOT_REPLAYED + steps, Clock(device, NOT_REPLAYED, at_start=profiler.start))
    profiler.stop()
    rows = [(e.key, e.count / steps, getattr(e, "self_device_time_total", 0) / 1e3 / steps)
            for e in profiler.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


# ------------------------------------------------------------------------------------------------
# On CUDA: each form of a step, compared with the limit
# ------------------------------------------------------------------------------------------------


def measure_cuda(device, args):
    """Print a table for each kind of step; yield its rows."""
    options = dict(more=SMALL if args.small else [], layout=LAYOUTS.get(args.layout))
    bandwidth = copy_bandwidth(device)
    for kind in args.kinds:
        traffic = traffic_of(kind, device, options)
        limit, moved = 1e3 * traffic.limit(bandwidth), sum(traffic.bytes)
        print(f"\n{kind}, {args.layout}: {len(traffic.bytes):,} operators move {moved / 1e9:.1f} "
              f"GB, at {bandwidth / 1e12:.2f} TB/s: {limit:.1f} ms\n"
              f"  {'form':18}{'ms':>8}{'limit/ms':>10}{'kernels':>9}{'their ms':>10}{'first s':>9}"
              f"{'capture s':>11}{'GiB':>7}")
        for form in (form for form in ON_CUDA if form.name in args.forms):
            row = dict(kind=kind, form=form.name, layout=args.layout, limit=limit, bytes=moved,
                       operators=len(traffic.bytes), bandwidth=bandwidth)
            try:
                row |= measure_form(kind, form, device, options, 3 if args.quick else 7)
                print(table_row(row), flush=True)
                for name, count, ms in row["kernels"][: 20 * args.profile]:
                    print(f"    {ms:8.3f} ms {count:7.1f}  {name[:80]}")
            except Exception as error:  # the other forms are still measured
                said = (str(error).splitlines() or [""])[0]
                row["error"] = f"{type(error).__name__}: {said}"
                print(f"  {form.name:18}{row['error'][:80]}", flush=True)
                torch.cuda.set_stream(torch.cuda.default_stream())
            yield row
            gc.collect()
            torch.cuda.empty_cache()


def traffic_of(kind, device, options):
    """Return the `Traffic` of an eager step in float32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # autotuning takes long
        run = build(kind, ON_CUDA[0], device, **options)
        run(1, Clock(device))  # creates the momenta
        with Traffic(device) as traffic:
            run(1, Clock(device))
    return traffic


def measure_form(kind, form, device, options, repetitions):
    """Return a dict of figures; times are in milliseconds, but `first` and `capture` in seconds."""
    torch.cuda.reset_peak_memory_stats()
    run = build(kind, form, device, **options)
    laps = []
    run(NOT_REPLAYED, Clock(device, laps=laps))
    times = [1e3 * t for t in by_turns([step_timer(run, device)], repetitions)[:, 0]]
    peak, ms = utils.peak_memory(device), float(np.median(times))
    first, second, *_ = laps
    return dict(
        ms=ms, times=times, first=first, peak=peak,
        capture=max(second - ms / 1e3, 0) if form.graphs else None,
        kernels=kernels(run, device),
    )


def table_row(row):
    found = row["kernels"]  # none on a device without the profiler's CUDA side
    of_kernels = (f"{sum(count for _, count, _ in found):9,.0f}{sum(ms for *_, ms in found):10.1f}"
                  if found else f"{'–':>9}{'–':>10}")
    capture = f"{'–':>11}" if row["capture"] is None else f"{row['capture']:11.2f}"
    return (f"  {row['form']:18}{row['ms']:8.1f}{row['limit'] / row['ms']:10.0%}{of_kernels}"
            f"{row['first']:9.1f}{capture}{row['peak']:7.2f}")


# ------------------------------------------------------------------------------------------------
# On a CPU: shares of the plain form
# ------------------------------------------------------------------------------------------------


class FormProcess:
    """A process that trains in one form: a call makes a step in it, and returns the seconds.

    Attributes
    ----------
    before, peak : float
        Peak memory in GiB before there is a network, and after 3 steps.
    """

    def __init__(self, kind, form):
        command = [sys.executable, __file__, "--serve", kind, form.name]
        command += ["--threads", str(torch.get_num_threads())]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes)
        self.before, self.peak = json.loads(self.process.stdout.readline())

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self):
        self.process.communicate()


def serve_form(kind, form):
    """Make steps for a `FormProcess`: the other side of its pipes."""
    before = utils.peak_memory(CPU)
    run = build(kind, form, CPU, batch_flags(kind))
    run(3, Clock(CPU))
    peak = utils.peak_memory(CPU)
    timer = step_timer(run, CPU)
    print(json.dumps([before, peak]), flush=True)
    for _ in sys.stdin:
        print(timer(), flush=True)


def batch_flags(kind):
    return ["--batch_size", str(KINDS[kind][1])]


class Table:
    """Rows of figures, printed when they are added and kept for the JSON."""

    def __init__(self):
        self.rows, self.section = [], ""

    def title(self, text):
        self.section = text
        print(f"\n{text:60}  {'median':>14}  {'quartiles':>19}")

    def add(self, name, values, unit=""):
        """Add a row: a number, or an array of repetitions."""
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
    """Measure time and peak memory of the three kinds of steps, in both forms."""
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


def measure_recovery(table, repetitions):
    """Measure cold and warm solves of all codes, at points as large as those of a search."""
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
    """Measure augmentation, ours and that of torchvision on PIL images, on one core."""
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


# ------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------


def machine(device):
    """Return what the figures depend on."""
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
        serve_form(kind, {form.name: form for form in ON_CPU}[name])
        return
    args.forms = args.forms or [f.name for f in ON_CUDA if not (args.quick and f.compiled)]
    about, table = machine(device), Table()
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    def write():  # after each figure, because the script may be cut off
        if args.out:
            figures = {"machine": about, "figures": table.rows}
            utils.write_file(args.out, json.dumps(figures, indent=1).encode())

    if device.type == "cuda":
        for row in measure_cuda(device, args):
            table.rows.append(row)
            write()
    else:
        # Steps come first, while this process is small: a child inherits the peak of its parent.
        for measure in measure_steps, measure_recovery, measure_data:
            measure(table, repetitions=3 if args.quick else 9)
            write()


if __name__ == "__main__":
    with runs.command("bench.py"):
        main()
