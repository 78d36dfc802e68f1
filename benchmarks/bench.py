"""Measure the time and the memory of training steps.

    python benchmarks/bench.py                            # a few minutes on a CPU
    python benchmarks/bench.py --quick --threads 1        # fewer repetitions
    python benchmarks/bench.py --device cuda --out bench.json
    python benchmarks/bench.py --device cuda --kinds retraining --forms compiled --profile

The script runs the epoch functions of `search.py` and `train.py` on random images and reports
medians.

On a CPU, each step is compared with its plain form: the same network inside of `layers.plain()`, in
contiguous memory, with the simple step `plain_step`. Both forms run in turns, so that the load of
the machine affects both. Each form has its own process, because the memory is the peak of a
process. On a busy machine use --threads 1, because threads that wait for each other add noise.

On CUDA, an epoch runs its first step eagerly, captures the second one as a CUDA graph, and replays
the graph in the others. The table shows times and kernels of replayed steps; `first s`: the first
step, with cuDNN's autotuning and compilation; `capture s`: the additional time of the step that is
captured; GiB: the peak of all steps.
"""

import gc
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch's profiler logs every action

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genotypes
import layers
import search
import train
import utils
from genotypes import PRIMITIVES
from harness import flags, runs, speedups
from model import NetworkCIFAR
from model_search import Network, pair_numbers

CPU = torch.device("cpu")
KIND_FLAGS = {
    "two-stage": [], "one-stage": ["--one_stage"], "retraining": ["--arch", "ISTA_twostage"],
}
CPU_BATCH = {"two-stage": 64, "one-stage": 8, "retraining": 8}
LAYOUTS = {"channels-last": torch.channels_last, "nchw": torch.contiguous_format}
SMALL = ["--init_channels", "4", "--layers", "3", "--batch_size", "8"]
NOT_REPLAYED = 3  # first steps of an epoch on CUDA: eager, captured, first replay


class Form(NamedTuple):
    """An implementation of a step."""

    name: str
    graphs: bool = False
    amp: bool = False
    compiled: bool = False
    is_plain: bool = False


CPU_FORMS = Form("ours"), Form("plain form", is_plain=True)
CUDA_FORMS = (
    Form("eager"), Form("graph", graphs=True), Form("bfloat16", graphs=True, amp=True),
    Form("compiled", graphs=True, compiled=True),
    Form("compiled bfloat16", graphs=True, amp=True, compiled=True),
)


def parse_flags(kind, more=()):
    script = train if kind == "retraining" else search
    return script.get_args_parser().parse_args([*KIND_FLAGS[kind], *more])


def make_network(kind, args, genotype):
    shape = args.init_channels, 10, args.layers
    if kind == "retraining":
        return NetworkCIFAR(*shape, args.auxiliary, genotype)
    net = Network(*shape, one_stage=args.one_stage, auxiliary=args.auxiliary)
    for code, pairs in zip(net.codes, (genotype.normal, genotype.reduce), strict=True):
        support = [[(source, PRIMITIVES.index(primitive)) for primitive, source in node]
                   for node in genotypes.by_node(pairs)]
        codes = [np.zeros(len(z)) for z in code.z]
        for z, node in zip(codes, support, strict=True):
            z[pair_numbers(node)] = 1
        code.accept(codes, support)
    return net


def make_optimizers(kind, net, args):
    if kind == "retraining":
        return [utils.sgd(net.parameters(), args)]
    return search.optimizers(net, args)


def plain_step(net, optimizers, args, batch, arch_batch=None):
    """Make a step of a search or of retraining as the paper describes it.

    Each backward pass computes the gradients of all parameters, and each loss is read immediately.
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
    clip_grad_norm_(utils.parameters_of(sgd), args.grad_clip, foreach=False)
    sgd.step()


class Batches(list):
    """Batches, as the epoch functions take them."""

    def endless(self):
        return itertools.cycle(self)


def fail(text, kind=None):
    """Raise an error in place of a warning, such as the one that a graph cannot be captured."""
    raise RuntimeError(text)


def build(kind, form, device, more=(), layout=None):
    """Build a network; return a function run(steps, progress) that trains it for an epoch.

    `more` are flags of the script. The default layout is the memory format that the script chooses.
    """
    torch.manual_seed(0)
    args = parse_flags(kind, [*more, *["--amp"] * form.amp])
    args.learning_rate = 1e-5  # training on the same batch in every step could diverge
    genotype = genotypes.ISTA_onestage if kind == "one-stage" else genotypes.ISTA_twostage
    if form.is_plain:
        layout = torch.contiguous_format
    layout = layout or utils.memory_format(device, args.amp, kind == "two-stage")
    net = make_network(kind, args, genotype).to(device, memory_format=layout).train()
    optimizers = make_optimizers(kind, net, args)
    if form.is_plain:
        for optimizer in optimizers:  # update one parameter at a time: torch's default on a CPU
            optimizer.param_groups[0].update(fused=False, foreach=False)
    elif device.type == "cpu":
        speedups.keep_freed_memory()
    if form.compiled:
        speedups.compile_network(net, is_fixed=kind == "retraining", log=lambda text: None)

    def random_batch():
        x, y = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))
        return x.to(device).contiguous(memory_format=layout), y.to(device)

    batch, arch_batch = random_batch(), random_batch()

    def run(steps, progress):
        batches = Batches(steps * [batch])
        context = SimpleNamespace(args=args, progress=progress, warn=fail)
        if form.is_plain:
            with layers.plain():
                for _ in range(steps):
                    plain_step(net, optimizers, args, batch,
                               arch_batch if kind == "two-stage" else None)
                    progress.step()
        elif kind == "retraining":
            train.train_epoch(net, batches, *optimizers, context, form.graphs)
        elif kind == "one-stage":
            search.one_stage_epoch(net, batches, *optimizers, context, form.graphs)
        else:
            arch_batches = Batches([arch_batch])
            search.two_stage_epoch(net, batches, arch_batches, *optimizers, context, form.graphs)

    return run


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(function, device):
    """Return the seconds of one call."""
    start = now(device)
    function()
    return now(device) - start


class Clock:
    """The progress of an epoch; records when it starts and when the steps numbered `at` end.

    `action` is called after each recording, when the device is idle.
    """

    def __init__(self, device, at=(), action=lambda: None):
        self.device, self.at, self.action = device, at, action
        self.steps, self.times = 0, [now(device)]

    def step(self, meter=None):
        self.steps += 1
        if self.steps in self.at:
            self.times.append(now(self.device))
            self.action()


def time_step(run, device):
    """Train for an epoch; return the seconds of a step."""
    # On CUDA an epoch ends in a host synchronization, so it has several steps.
    first, steps = (NOT_REPLAYED, 10) if device.type == "cuda" else (0, 1)
    clock = Clock(device, at=[first])
    run(first + steps, clock)
    return (now(device) - clock.times[-1]) / steps


def call_in_turns(functions, repetitions):
    """Call functions in turns; return their results as an array (repetitions, functions)."""
    for function in functions:  # warm up
        function()
    return np.array([[function() for function in functions] for _ in range(repetitions)])


def profile_kernels(run, device):
    """Return the kernels of a step as (name, count, milliseconds), the longest first."""
    steps, profiler = 3, profile(activities=[ProfilerActivity.CUDA])
    run(NOT_REPLAYED + steps, Clock(device, at=[NOT_REPLAYED], action=profiler.start))
    profiler.stop()
    rows = [(e.key, e.count / steps, getattr(e, "self_device_time_total", 0) / 1e3 / steps)
            for e in profiler.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def measure_form(kind, form, device, options, repetitions):
    """Return a dict of figures; times are in ms, except `first` and `capture` in s."""
    torch.cuda.reset_peak_memory_stats()
    run = build(kind, form, device, **options)
    clock = Clock(device, at=range(1, NOT_REPLAYED + 1))
    run(NOT_REPLAYED, clock)
    times = 1e3 * call_in_turns([lambda: time_step(run, device)], repetitions)[:, 0]
    first, second, *_ = np.diff(clock.times).tolist()
    ms = float(np.median(times))
    return dict(
        ms=ms, times=times.tolist(), first=first, peak=utils.peak_memory(device),
        capture=max(second - ms / 1e3, 0) if form.graphs else None,
        kernels=profile_kernels(run, device),
    )


def measure_cuda(device, args):
    """Print a table for each kind of step; yield its rows."""
    options = dict(more=SMALL if args.small else [], layout=LAYOUTS.get(args.layout))
    for kind in args.kinds:
        print(f"\n{kind}, {args.layout}\n  {'form':18}{'ms':>8}{'kernels':>9}{'their ms':>10}"
              f"{'first s':>9}{'capture s':>11}{'GiB':>7}")
        for form in CUDA_FORMS:
            if form.name not in args.forms:
                continue
            row = dict(kind=kind, form=form.name, layout=args.layout)
            try:
                row.update(measure_form(kind, form, device, options, 3 if args.quick else 7))
                print(format_row(row), flush=True)
                for name, count, ms in row["kernels"][: 20 * args.profile]:
                    print(f"    {ms:8.3f} ms {count:7.1f}  {name[:80]}")
            except Exception as error:  # the other forms are still measured
                message = (str(error).splitlines() or [""])[0]
                row["error"] = f"{type(error).__name__}: {message}"
                print(f"  {form.name:18}{row['error'][:80]}", flush=True)
                torch.cuda.set_stream(torch.cuda.default_stream())
            yield row
            gc.collect()
            torch.cuda.empty_cache()


def format_row(row):
    count = sum(count for _, count, _ in row["kernels"])
    ms = sum(ms for *_, ms in row["kernels"])
    # There are no kernels on a device without the profiler's CUDA side.
    kernels = f"{count:9,.0f}{ms:10.1f}" if count else f"{'–':>9}{'–':>10}"
    capture = f"{'–':>11}" if row["capture"] is None else f"{row['capture']:11.2f}"
    return (f"  {row['form']:18}{row['ms']:8.1f}{kernels}{row['first']:9.1f}{capture}"
            f"{row['peak']:7.2f}")


def summarize(kind, name, values, unit=""):
    """Print the median and the quartiles of an array; return them as a row for the JSON file."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    print(f"  {name:32}{median:9.3f} {unit:4}{f'({low:.3f} – {high:.3f})':>24}", flush=True)
    return dict(kind=kind, name=name, unit=unit, median=median, lower_quartile=low,
                upper_quartile=high, repetitions=np.size(values))


def serve_form(connection, kind, form, threads):
    """Time a step at each request. First send the peak memory without and with the network."""
    torch.set_num_threads(threads)
    before = utils.peak_memory(CPU)
    run = build(kind, form, CPU, ["--batch_size", str(CPU_BATCH[kind])])
    run(3, Clock(CPU))
    connection.send((before, utils.peak_memory(CPU)))
    while connection.recv():
        connection.send(time_step(run, CPU))


def measure_cpu(args):
    """Print time and peak memory of each kind of step in both forms; yield the rows."""
    context = multiprocessing.get_context("spawn")
    for kind in args.kinds:
        connections, processes = [], []
        for form in CPU_FORMS:
            connection, other_end = context.Pipe()
            process = context.Process(
                target=serve_form, args=(other_end, kind, form, torch.get_num_threads()),
                daemon=True)
            process.start()
            other_end.close()
            connections.append(connection)
            processes.append(process)
        memory = [connection.recv() for connection in connections]

        def request(connection):
            connection.send(True)
            return connection.recv()

        times = call_in_turns([lambda c=c: request(c) for c in connections],
                              repetitions=3 if args.quick else 9)
        for connection, process in zip(connections, processes, strict=True):
            connection.send(False)
            process.join()
        print(f"\n{kind} step of the published network, batch {CPU_BATCH[kind]}: medians "
              "(and quartiles)")
        for i, form in enumerate(CPU_FORMS):
            before, peak = memory[i]
            yield summarize(kind, f"{form.name}: time", times[:, i], "s")
            yield summarize(kind, f"{form.name}: peak memory", peak, "GiB")
            yield summarize(kind, f"{form.name}: before the network", before, "GiB")
        yield summarize(kind, "time, ours / plain form", times[:, 0] / times[:, 1])
        yield summarize(kind, "memory, ours / plain form", memory[0][1] / memory[1][1])


def get_args_parser():
    parser = flags.Parser("bench.py", __doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--quick", action="store_true", default=False,
                        help="fewer repetitions, and no compiled forms")
    parser.add_argument("--out", type=flags.nonempty, metavar="FILE",
                        help="write the figures to a JSON file")
    parser.add_argument("--threads", type=flags.integer(1, 1024), metavar="N",
                        help="number of CPU threads (default: torch's)")
    parser.add_argument("--kinds", nargs="+", choices=[*KIND_FLAGS], default=[*KIND_FLAGS],
                        metavar="KIND", help=f"of {', '.join(KIND_FLAGS)} (default: all)")
    group = parser.add_argument_group("on CUDA")
    forms = [form.name for form in CUDA_FORMS]
    group.add_argument("--forms", nargs="+", choices=forms, metavar="FORM",
                       help=f"of {', '.join(map(repr, forms))} (default: all)")
    group.add_argument("--layout", choices=["default", *LAYOUTS], default="default",
                       help="memory format of the tensors (default: that of the scripts)")
    group.add_argument("--profile", action="store_true", default=False,
                       help="print the twenty most expensive kernels of each form")
    group.add_argument("--small", action="store_true", default=False,
                       help="use tiny networks, to test this script")
    return parser


def main():
    args = get_args_parser().parse_args()
    device = utils.choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.forms = args.forms or [f.name for f in CUDA_FORMS if not (args.quick and f.compiled)]
    machine = dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        processor=utils.processor_name(), cores=os.cpu_count(), threads=torch.get_num_threads(),
        torch=torch.__version__, python=platform.python_version(), system=platform.system(),
    )
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for row in measure_cuda(device, args) if device.type == "cuda" else measure_cpu(args):
        rows.append(row)
        if args.out:  # after each row, because the script may be interrupted
            figures = {"machine": machine, "figures": rows}
            utils.write_file(args.out, json.dumps(figures, indent=1).encode())


if __name__ == "__main__":
    with runs.command("bench.py"):
        main()
