"""Measure what a step costs, against the plain form of the same step, in one table.

    python benchmarks/bench.py                  # a few minutes on a CPU
    python benchmarks/bench.py --quick          # fewer repetitions
    python benchmarks/bench.py --device cuda --out bench.json

Ours are the epoch functions of `search.py` and `train.py` on the network that `fast.accelerate`
returns, with random images. The plain form is the network itself in contiguous memory, with a
step written in the most obvious way, `plain_step`.

Seconds do not carry from one machine to the next, and on a busy machine not from one minute to the
next. So all forms run by turns in one process, and what counts is the ratio. Every figure is the
median of its repetitions, with the lower and upper quartile beside it. Memory is the peak of a
process of its own for each form (on CUDA: of its tensors). If others use the machine at the same
time, set OMP_NUM_THREADS=1: threads that wait for each other multiply the noise.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image
except ImportError:
    transforms = None

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import arguments
import data
import fast
import genotypes
import ista
import search
import train
import utils
from genotypes import NODES, PRIMITIVES
from model import NetworkCIFAR
from model_search import Network

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KINDS = {
    "two-stage": "two-stage step: C=16, 8 cells, batch 64 + 64",
    "retraining": "retraining step: ISTA_twostage, C=36, 20 cells, auxiliary, batch 8",
    "one-stage": "one-stage step: C=36, 20 cells, auxiliary, batch 8",
}
BATCH = {"two-stage": 64, "retraining": 8, "one-stage": 8}


# ------------------------------------------------------------------------------------------------
# The plain step
# ------------------------------------------------------------------------------------------------


def plain_optimizers(net, args):
    """SGD on the weights and, for a supernet, Adam on the points b; one parameter at a time."""
    is_supernet = isinstance(net, Network)
    weights = net.weight_parameters() if is_supernet else net.parameters()
    sgd = torch.optim.SGD(
        weights, args.learning_rate, args.momentum, weight_decay=args.weight_decay, foreach=False
    )
    if not is_supernet:
        return [sgd]
    adam = torch.optim.Adam(
        net.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=args.arch_weight_decay, foreach=False,
    )
    return [sgd, adam]


def plain_step(net, optimizers, args, batch, arch_batch=None):
    """A step of either search or of retraining, as its text reads.

    Every pass computes the gradients of all parameters, and its loss is read at once.

    Parameters
    ----------
    optimizers : list
        SGD on the weights and, for a supernet, Adam on b.
    batch, arch_batch : pairs of images and labels
        The second one, of two-stage search, is the one on which b moves.
    """
    sgd, *adam = optimizers

    def backward(x, y):
        logits, logits_aux = net(x)
        loss, total = utils.losses(logits, logits_aux, y, args)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        return loss.item(), (logits.argmax(1) == y).float().mean().item()

    if arch_batch:
        backward(*arch_batch)
        adam[0].step()
    backward(*batch)
    if adam and not arch_batch:
        adam[0].step()
    clip_grad_norm_(sgd.param_groups[0]["params"], args.grad_clip, foreach=False)
    sgd.step()


# ------------------------------------------------------------------------------------------------
# The forms that are measured
# ------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    name: str
    is_plain: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    cuda_graphs: bool = False


def forms(device):
    """Ours as the scripts run it, the plain form, and on CUDA other ways to run ours."""
    usual = utils.memory_format(device, amp=False)
    two = [Form("ours", memory_format=usual), Form("plain form", is_plain=True)]
    if device.type != "cuda":
        return two
    other = torch.channels_last
    return [
        *two, Form("ours, channels-last", memory_format=other),
        Form("ours, CUDA graphs", memory_format=usual, cuda_graphs=True),
        Form("ours, channels-last, CUDA graphs", memory_format=other, cuda_graphs=True),
    ]


class Batches:
    """The same batch over and over, as the epoch functions take them."""

    def __init__(self, batch):
        self.batch, self.steps = batch, 0

    def __len__(self):
        return self.steps

    def __iter__(self):
        return (self.batch for _ in range(self.steps))

    def endless(self):
        return self


class Progress:
    """Takes the time at which a number of steps is done."""

    def __init__(self, device, steps=0):
        self.device, self.left = device, steps
        self.now = self.began = self._time()

    def _time(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self, meter=None):
        self.left -= 1
        if self.left == 0:
            self.began = self._time()

    def seconds(self):
        return self._time() - self.began


def build(kind, form, device, batch=None, layers=None, network=Network):
    """A network, and a function run(steps, progress) that trains it for so many steps.

    Parameters
    ----------
    kind : one of KINDS
    form : Form
    batch, layers : int, optional
        By default those of KINDS.
    network : class
        Of the supernet.
    """
    torch.manual_seed(0)
    flags = {"two-stage": [], "one-stage": ["--one_stage"], "retraining": ["--arch", "ISTA_twostage"]}
    parser = arguments.get_train_parser if kind == "retraining" else arguments.get_search_parser
    args = parser("").parse_args(flags[kind])
    args.cuda_graphs = form.cuda_graphs
    shape = args.init_channels, 10, layers or args.layers
    if kind == "retraining":
        net = NetworkCIFAR(*shape, True, genotypes.ISTA_twostage)
    else:
        net = network(*shape, one_stage=args.one_stage, auxiliary=args.auxiliary)
        choose(net, genotypes.ISTA_onestage if args.one_stage else genotypes.ISTA_twostage)
    net = net.to(device, memory_format=form.memory_format).train()

    def random_batch():
        n = batch or BATCH[kind]
        x, y = torch.randn(n, 3, 32, 32), torch.randint(10, (n,))
        return x.to(device).contiguous(memory_format=form.memory_format), y.to(device)

    first, second = random_batch(), random_batch() if kind == "two-stage" else None
    if form.is_plain:
        optimizers = plain_optimizers(net, args)

        def run(steps, progress):
            for _ in range(steps):
                plain_step(net, optimizers, args, first, second)
                progress.step()

        return net, run

    net = fast.accelerate(net)
    batches, arch_batches = Batches(first), Batches(second)
    if kind == "retraining":
        sgd = torch.optim.SGD(
            net.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay,
            foreach=True,
        )
    else:
        both = search.optimizers(net, args)

    def run(steps, progress):
        batches.steps = arch_batches.steps = steps
        if kind == "retraining":
            train.train_epoch(net, net, batches, sgd, args, progress)
        elif kind == "one-stage":
            search.one_stage_epoch(net, net, batches, *both, args, progress)
        else:
            search.two_stage_epoch(net, net, batches, arch_batches, *both, args, progress, epoch=1)

    return net, run


def choose(net, genotype):
    """Set the support of a supernet to the pairs of a genotype."""
    for code, pairs in zip(net.codes, (genotype.normal, genotype.reduce), strict=True):
        codes = [np.zeros(len(z)) for z in code.z]
        for i, (primitive, edge) in enumerate(pairs):
            j = i // code.sparseness
            codes[j][len(PRIMITIVES) * edge + PRIMITIVES.index(primitive)] = 1
        code.accept(codes)


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def seconds(function, device):
    """Time of one call."""
    clock = Progress(device)
    function()
    return clock.seconds()


def step_timer(run, device):
    """A function that takes a training step, or on CUDA ten, and returns the time of one."""
    # A CUDA graph is recorded in the second step of an epoch, and an epoch ends in a host sync.
    skipped, steps = (2, 10) if device.type == "cuda" else (0, 1)

    def timer():
        clock = Progress(device, skipped)
        run(skipped + steps, clock)
        return clock.seconds() / steps

    return timer


def by_turns(timers, repetitions, warm_up=2):
    """What functions return that are called one after the other: (repetitions, functions)."""
    for timer in timers * warm_up:
        timer()
    return np.array([[timer() for timer in timers] for _ in range(repetitions)])


class _Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Counts what waits on CUDA, but of which no operator tells on the CPU."""

    methods = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.methods
        return func(*args, **(kwargs or {}))


class HostSyncs(contextlib.ExitStack):
    """Counts how often its block waits for the device, or on the CPU would, as far as one sees."""

    def __init__(self, device=torch.device("cpu")):
        super().__init__()
        self.device = device

    def __enter__(self):
        super().__enter__()
        if self.device.type != "cuda":
            self.modes = [self.enter_context(mode()) for mode in (_Reads, _Copies)]
            return self
        self.warnings = self.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        self.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    @property
    def count(self):
        if self.device.type != "cuda":
            return sum(mode.count for mode in self.modes)
        return sum("synchronizing" in str(warning.message) for warning in self.warnings)


def host_syncs_of_a_step(run, device):
    """Those of a step, without those at the end of an epoch."""
    progress = Progress(device)
    run(1, progress)
    counts = []
    for steps in (1, 2):
        with HostSyncs(device) as syncs:
            run(steps, progress)
        counts.append(syncs.count)
    return counts[1] - counts[0]


def saved_bytes(run, net, device):
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
        run(1, Progress(device))
    return sum(storages.values())


def peak_memory(kind, form, device):
    """GiB before there is a network, and at the peak of 3 steps, in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--device", str(device)]
    command += ["--threads", str(torch.get_num_threads()), "--memory_of", kind, form.name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def print_peak_memory(kind, name, device):
    before = utils.peak_memory(device)
    form = next(form for form in forms(device) if form.name == name)
    _, run = build(kind, form, device)
    run(3, Progress(device))
    print(json.dumps([before, utils.peak_memory(device)]))


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


class Table:
    """Rows of figures, printed as they come and kept for the JSON."""

    def __init__(self):
        self.rows, self.section = [], ""
        self._print("", "median", "quartiles")

    def _print(self, name, median, quartiles):
        print(f"{name:66}  {median:>14}  {quartiles:>19}".rstrip(), flush=True)

    def title(self, text):
        self.section = text
        print(f"\n{text}")

    def add(self, name, values, unit=""):
        """Add a row: the median of a number or an array of repetitions, and its quartiles."""
        values = np.atleast_1d(np.asarray(values, float))
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        row = dict(section=self.section, name=name, median=median, unit=unit)
        row.update(repetitions=len(values), lower_quartile=low, upper_quartile=high)
        self.rows.append(row)

        def text(value):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

        spread = f"{text(low)} – {text(high)}" if len(values) > 1 else ""
        self._print(f"  {name}", f"{text(median)} {unit}".rstrip(), spread)


def measure_steps(table, device, repetitions):
    """The three steps in all forms; returns the seconds of ours, by kind."""
    # Memory first, while this process is small: a child inherits the peak of its parent.
    every = forms(device)
    memory = {kind: np.array([peak_memory(kind, form, device) for form in every]) for kind in KINDS}
    of = "of the tensors" if device.type == "cuda" else "of the process"
    step_seconds = {}
    for kind, title in KINDS.items():
        table.title(title)
        runs = [build(kind, form, device)[1] for form in every]
        times = by_turns([step_timer(run, device) for run in runs], repetitions)
        step_seconds[kind] = np.median(times[:, 0])
        for i, form in enumerate(every):
            if not form.is_plain:
                table.add(f"time, share of the plain form: {form.name}", times[:, i] / times[:, 1])
        for i, form in enumerate(every):
            table.add(f"time: {form.name}", 1e3 * times[:, i], "ms")
        before, peaks = memory[kind].T
        table.add(f"peak memory {of}, share of the plain form", peaks[0] / peaks[1])
        for form, peak in zip(every, peaks, strict=True):
            table.add(f"peak memory {of}: {form.name}", peak, "GiB")
        if device.type != "cuda":
            table.add("of it before there is a network", before.mean(), "GiB")
        for form, run in zip(every, runs, strict=True):
            if not form.cuda_graphs:
                table.add(f"host syncs: {form.name}", host_syncs_of_a_step(run, device))
        del runs
    return step_seconds


def measure_recovery(table, step_seconds, repetitions):
    """Cold and warm solves of all codes, of points as large as they are in a search."""
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

    def solve(given, warm):
        return [ista.recover(A, b, lam, z0=z if warm else None) for A, b, lam, z in given]

    def signs():
        return torch.cat([z.sign() for code in net.codes for z in code.z])

    cold, warm, whole, gaps = [], [], [], []
    while len(warm) < repetitions:
        for b in net.arch_parameters():
            point = 10 ** rng.uniform(-2, 0) * rng.standard_normal(len(b))
            b.data = torch.from_numpy(point).float()
        given = problems()
        cold.append(seconds(lambda given=given: solve(given, warm=False), cpu))
        net.recover()
        before = signs()
        for b in net.arch_parameters():  # as the first step of Adam
            b.data += arguments.TWO_STAGE["arch_learning_rate"] * torch.randn_like(b).sign()
        given = problems()
        elapsed = seconds(lambda given=given: solve(given, warm=True), cpu)
        elapsed_whole = seconds(net.recover, cpu)
        if torch.equal(signs(), before):  # the last support is still optimal
            warm.append(elapsed)
            whole.append(elapsed_whole)
        gaps += [ista.duality_gap(A, b, z, lam) / (0.5 * b @ b) for A, b, lam, z in problems()]
    cold, warm, whole = (1e3 * np.array(times) for times in (cold, warm, whole))
    table.add("cold", cold, "ms")
    table.add("warm: the last support is still optimal", warm, "ms")
    table.add("largest gap, relative to ½‖b‖²", max(gaps))
    table.add("warm, with the bookkeeping of the supernet", whole, "ms")
    table.add("that, in % of a two-stage step", 0.1 * whole / step_seconds["two-stage"], "%")
    try:
        net.recover("clarabel")
        times = [seconds(lambda: net.recover("clarabel"), cpu) for _ in range(5)]
        table.add("CVXPY with Clarabel", 1e3 * np.array(times), "ms")
    except ista.SolverUnavailable:
        print("  (CVXPY and Clarabel are not installed)")


def measure_data(table, device, repetitions):
    """Augmented batches of ours, and of torchvision's transforms on PIL images, on one core."""
    where = "on the device" if device.type == "cuda" else "on one core"
    table.title(f"training images a second, augmented, {where}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    n, size = 4096, 256
    pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (n,))
    mean, std = data.CIFAR10_MEAN, data.CIFAR10_STD
    images = data.Images(pixels.to(device), labels.to(device), list("0123456789"), mean, std)
    batches = images.batches(
        size, train=True, memory_format=utils.memory_format(device, amp=False)
    )
    functions = [lambda: [None for _ in batches]]
    if transforms:
        pil = [to_pil_image(image) for image in pixels]
        transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(mean, std),
        ])
        functions.append(lambda: [
            torch.stack([transform(image) for image in pil[start : start + size]])
            for start in range(0, n, size)
        ])
    else:
        print("  (torchvision is not installed)")
    timers = [lambda function=function: seconds(function, device) for function in functions]
    rates = n / by_turns(timers, repetitions, warm_up=1)
    if transforms:
        table.add("times those of torchvision on PIL images", rates[:, 0] / rates[:, 1])
    for rate, name in zip(rates.T, ("ours", "torchvision"), strict=False):
        table.add(name, rate, "/s")
    torch.set_num_threads(threads)


class Dense(Network):
    """A relaxation as in DARTS, in which every operation runs."""

    def _given(self, code):
        weights = [(A.T @ b.double()).softmax(0) for A, b in zip(code.A, code.b, strict=True)]
        every = range(len(PRIMITIVES))
        support = [[(edge, op) for edge in range(j + 2) for op in every] for j in range(NODES)]
        return support, [w.to(self.classifier.weight.dtype).unbind() for w in weights]


def measure_growth(table, device, repetitions):
    """Steps in spaces of 7, 14 and 28 operations an edge, the available ones repeated."""
    published = list(PRIMITIVES)

    def measure(repetitions, form, *shape):
        built = []
        for copies in (1, 2, 4):
            PRIMITIVES[:] = published * copies
            try:
                built.append(build("two-stage", form, device, *shape))
            finally:
                PRIMITIVES[:] = published
        times = by_turns([step_timer(run, device) for _, run in built], repetitions)
        saved = [saved_bytes(run, net, device) for net, run in built]
        for i, n in ((1, 14), (2, 28)):
            table.add(f"time, {n} operations", times[:, i] / times[:, 0])
            table.add(f"activation memory, {n} operations", saved[i] / saved[0])

    ours, plain = forms(device)[:2]
    table.title("growth: the two-stage step in spaces of 14 and 28 operations, to that in 7")
    measure(repetitions, ours)
    table.title("growth of a network that runs every operation (2 cells, batch 8)")
    measure(3, plain, 8, 2, Dense)


def measure_start(table, device, repetitions):
    """What a person waits for: the help, and the first step of a search."""
    table.title("start of search.py, handwritten digits at 8×8 pixels")
    command = [sys.executable, "-u", os.path.join(ROOT, "search.py")]
    shape = "--dataset digits --image_size 8 --init_channels 2 --layers 3 --batch_size 64"

    def until_first_step():
        with tempfile.TemporaryDirectory() as folder:
            flags = [*shape.split(), "--report_freq", "1", "--device", str(device), "--save",
                     os.path.join(folder, "run")]
            began = time.perf_counter()
            script = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
            reached = any(", step 1/" in line for line in script.stdout)
            elapsed = time.perf_counter() - began
            script.kill()
            script.communicate()
            return elapsed if reached else np.nan

    def until_prompt():
        return seconds(
            lambda: subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL),
            torch.device("cpu"),
        )

    times = by_turns([until_first_step, until_prompt], repetitions, warm_up=1)
    table.add("to the first step", times[:, 0], "s")
    table.add("--help to the prompt", times[:, 1], "s")


def machine(device):
    """What the figures depend on."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if "model name" in line]
        processor = names[0] if names else processor
    about = dict(device=str(device), processor=processor, cores=os.cpu_count())
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return dict(
        about, threads=torch.get_num_threads(), torch=torch.__version__,
        python=platform.python_version(), system=platform.system(),
    )


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
    device = utils.choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print_peak_memory(*args.memory_of, device)
        return

    about = machine(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    repetitions = 3 if args.quick else 9
    table = Table()
    step_seconds = measure_steps(table, device, repetitions)
    measure_recovery(table, step_seconds, 20 * repetitions)
    measure_data(table, device, repetitions)
    measure_growth(table, device, repetitions)
    measure_start(table, device, repetitions)
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"machine": about, "figures": table.rows}, file, indent=1)


if __name__ == "__main__":
    main()
