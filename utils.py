"""What both scripts need around their loops: how they end, devices, random states, meters."""

import contextlib
import functools
import math
import random
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import arguments
import data
import distributed
import ista


class UserError(ValueError):
    """Something the person at the keyboard can mend; shown as one line, without a traceback."""


# ------------------------------------------------------------------------------------------------
# How a script ends
# ------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT or SIGTERM, raised where nothing is half done."""


class _Signals:
    """SIGINT and SIGTERM. Once a run's epochs have begun, they wait for the end of the step."""

    run = None  # the Run whose epochs have begun
    waiting = None  # the signal that came during a step

    def __call__(self, signum, frame):
        if self.run is None or self.waiting:
            raise Interrupted(signum)
        self.waiting = signum

    def check(self):
        if self.waiting:
            raise Interrupted(self.waiting)


signals = _Signals()


@contextlib.contextmanager
def command(prog):
    """Run a script's main: errors that a person can mend end in one line and exit status 2.

    SIGINT and SIGTERM end in exit status 130 and 143.
    """
    distributed.start()  # before signals wait: one that comes while it does should end it
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signals)
    try:
        yield
        signals.check()
        distributed.stop()
    except (UserError, data.DataError, ista.SolverUnavailable) as error:
        arguments.fail(prog, error)
    except distributed.Ended:
        sys.exit(2)
    except torch.OutOfMemoryError:
        arguments.fail(prog, "the device has too little memory: give a smaller --batch_size")
    except Interrupted as interrupt:
        _stop(prog, interrupt.args[0])
    except RuntimeError as error:
        if not distributed.is_loss(error):
            raise
        if signals.waiting:  # it came to all, and another process was a step ahead
            _stop(prog, signals.waiting)
        hint = signals.run.how_to_resume() if signals.run else "see what it says, and start again"
        reason = str(error).splitlines()[0]
        print(f"{prog}: error: another process of this run has ended; {hint} ({reason})",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)


def _stop(prog, signum):
    if signals.run:
        signals.run.log(f"stopped; {signals.run.how_to_resume()}")
    if distributed.rank() == 0:
        print(f"{prog}: stopped by {signal.Signals(signum).name}", file=sys.stderr)
    sys.exit(128 + signum)


# ------------------------------------------------------------------------------------------------
# Device and random states
# ------------------------------------------------------------------------------------------------


def choose_device(name, amp=False):
    """The torch.device of --device, made the current one; by default CUDA, else the CPU.

    Of several ranks on a machine, each has a CUDA device of its own.

    Parameters
    ----------
    name : str or None
    amp : bool
        Whether the device is to compute in bfloat16.

    Raises
    ------
    UserError
        If nothing can be trained there. Every rank of a machine with too few devices finds that.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and distributed.processes() > 1:
        devices, ranks = torch.cuda.device_count(), distributed.local_world_size()
        if name != "cuda":
            raise UserError(f"--device {name}: each rank takes a device of its own: give cuda")
        if 0 < devices < ranks:
            raise UserError(
                f"more ranks ({ranks}) than CUDA devices ({devices}) on this machine: give "
                f"torchrun --nproc_per_node={devices}, or --device cpu"
            )
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if device.index is None:  # set_device takes no device without an index
                device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.set_device(device)
        # Some devices hold no float64, as codes need it, or have no generator, or hold no values.
        generator = torch.Generator(device)
        torch.rand(1, dtype=torch.float64, device=device, generator=generator).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): leave it out, "
            "or give cpu"
        ) from None
    if device.type == "cuda":
        # Emulated, bfloat16 is some 40 times the kernels of a step.
        if amp and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"--amp: {torch.cuda.get_device_name()} has no bfloat16, and emulating it is "
                "slower than float32: leave it out, or give --device cpu"
            )
        torch.backends.cudnn.benchmark = True  # a run has few shapes, each of them many times
    return device


def seed_everything(seed):
    """Seed Python's, numpy's and torch's generators, those of all CUDA devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_drop_path(seed):
    """Have each process drop other paths, once all have made the same network."""
    if distributed.rank() > 0:
        torch.manual_seed(seed + distributed.rank())


def random_state(generator):
    """States of all random generators, as types that torch.load(weights_only=True) admits.

    Parameters
    ----------
    generator : torch.Generator
        That of the data order and augmentation.

    Returns
    -------
    list of dict
        One for each process.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return distributed.gather({
        "python": list(random.getstate()),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(generator.device) if generator.device.type == "cuda"
        else None,
        "data": generator.get_state(),
    })  # fmt: skip


def set_random_state(states, generator, seed, epoch):
    """Put all random generators back into the states of `random_state`.

    A generator of one kind of device cannot take the state of one of another kind. On another kind
    than the run was on, torch's generators are seeded from the run's seed and the epochs done.

    Ranks that were not there then keep their own generators, but for that of the data, which is
    common to all.

    Returns
    -------
    list of str
        What there is to say of it.
    """
    rank, on_cuda = distributed.rank(), generator.device.type == "cuda"
    state = states[rank] if rank < len(states) else None
    if state:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(state["numpy"]))
    if on_cuda != (states[0]["cuda"] is not None):
        seed = random.Random(f"{seed} {epoch}").getrandbits(62)
        generator.manual_seed(seed)
        torch.manual_seed(seed + rank)
        before = "the CPU" if on_cuda else "CUDA"
        return [f"the run was on {before}, whose random numbers cannot be continued here: from "
                f"epoch {epoch + 1} on, the order of the images, augmentation and drop-path are "
                "drawn anew"]  # fmt: skip
    generator.set_state(states[0]["data"])
    if state:
        torch.set_rng_state(state["torch"])
        if on_cuda:
            torch.cuda.set_rng_state(state["cuda"], generator.device)
    return []


def memory_format(device, amp):
    """The memory format of network and batches.

    Channels-last on a CPU, and in bfloat16 on CUDA, where it is what tensor cores work on. In
    float32 on CUDA it would send depthwise convolutions to cuDNN, whose kernels for it are slow;
    in NCHW they run on torch's own.
    """
    is_nchw = device.type == "cuda" and not amp
    return torch.contiguous_format if is_nchw else torch.channels_last


def autocast(device, enabled):
    """The context of forward passes: bfloat16 where that is safe, if `enabled`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def peak_memory(device):
    """Peak memory in GiB: of the tensors on a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------------------------------------------
# Schedule, meters, progress
# ------------------------------------------------------------------------------------------------


def cosine(epoch, epochs, high, low):
    """Learning rate of an epoch, counted from 0: low + (high − low)(1 + cos(π·epoch/epochs))/2."""
    return low + (high - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def warm_up_linear(epoch, epochs, high):
    """Learning rate of an epoch, counted from 0, of the ImageNet recipe.

    It rises in 5 steps to ``high``, falls in a line towards 0, and in the last 5 epochs, in a line
    of a fifth of the slope, ends just above 0. A run too short for all this loses the middle
    first: one of 6 to 10 epochs goes from the warm-up into the last line, one of at most 5 is all
    warm-up.
    """
    if epoch < 5:
        return high * (epoch + 1) / 5
    left = epochs - epoch
    return high * (left - 5 if left > 5 else left / 5) / (epochs - 5)


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def forget(optimizer, parameters):
    """Take parameters, and what is remembered of them, out of an optimizer."""
    gone = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for p in parameters:
        optimizer.state.pop(p, None)


class Meter:
    """Mean loss and accuracy of an epoch, added up on the device and read only when asked for.

    Parameters
    ----------
    device : torch.device
    top5 : bool
        Whether to count also the images whose label is among the 5 largest logits.
    """

    def __init__(self, device, top5=False):
        # loss, images, correct, correct among 5
        self.sums = torch.zeros(3 + top5, dtype=torch.float64, device=device)
        self.batches = 0
        self.first_bad = torch.full((), torch.inf, dtype=torch.float64, device=device)

    def add(self, loss, logits, labels):
        """Add a batch: its mean loss (0-dim tensor), logits (batch, classes), labels (batch,)."""
        self.batches += 1
        loss, n = loss.detach().double(), len(labels)
        correct = [(logits.detach().argmax(1) == labels).sum()]
        if len(self.sums) > 3:
            correct.append((logits.detach().topk(5).indices == labels[:, None]).sum())
        self.sums += torch.stack([loss * n, labels.new_full((), n), *correct])
        bad = torch.where(loss.isfinite(), torch.inf, float(self.batches))
        self.first_bad = torch.minimum(self.first_bad, bad)

    def read(self):
        """Mean loss, accuracy in percent and, if counted, top-5 accuracy, over all processes.

        Waits for the device, and for the processes.

        Raises
        ------
        Diverged
            With the number of the first batch (from 1) whose loss was not finite.
        """
        loss, n, *correct = distributed.reduce(self.sums).tolist()
        first_bad = distributed.reduce(self.first_bad, distributed.MIN).item()
        if math.isfinite(first_bad):
            raise Diverged(int(first_bad))
        return loss / n, *(100 * count / n for count in correct)


class Diverged(Exception):
    """A loss was not finite."""


BAR = "{desc} {percentage:3.0f} %|{bar:20}| {n_fmt}/{total_fmt} steps{postfix}"


class Epoch:
    """An epoch in progress: a bar on a terminal, else a line every `report_freq` steps.

    While one is entered, a signal waits for the end of the step, or for that of the checkpoint. A
    loss that is not finite ends the run, and the last checkpoint stands.

    Parameters
    ----------
    run : Run
    name : str
        As in "3/50".
    batches : data.Batches
        What the steps go through.
    learning_rate : float
        For the message of a run that diverges.
    report_freq : int
    epochs_left : int
        Epochs of the run after this one.
    """

    def __init__(self, run, name, batches, learning_rate, report_freq, epochs_left):
        self.run, self.label, self.learning_rate = run, f"epoch {name}", learning_rate
        self.total, self.report_freq = len(batches), report_freq
        self.images_per_step = distributed.processes() * batches.batch_size
        self.epochs_left = epochs_left
        self.steps = 0
        self.began = time.time()
        self.bar = tqdm(
            total=self.total, desc=self.label, leave=False, file=sys.stdout,
            disable=distributed.rank() > 0 or not sys.stdout.isatty(), dynamic_ncols=True,
            bar_format=BAR,
        )  # fmt: skip

    def __enter__(self):
        signals.run = self.run
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        if kind is Diverged and distributed.rank() > 0:
            raise distributed.Ended from None
        if kind is Diverged:
            raise UserError(
                f"{self.label}, step {error}: the loss is not finite at learning rate "
                f"{self.learning_rate:.4g}; try a smaller --learning_rate or --grad_clip in a new "
                f"run; {self.run.how_to_resume()}"
            ) from None
        if kind in (None, data.DataError):  # the signal may have ended the readers of data too
            signals.check()

    def step(self, meter):
        """Count a step; `meter` is read every `report_freq` steps."""
        self.steps += 1
        self.bar.update()
        if self.steps % self.report_freq == 0 and self.steps < self.total:
            loss, accuracy = meter.read()
            pace = (time.time() - self.began) / self.steps
            left = pace * (self.total - self.steps)
            report = (
                f"loss {loss:.3f}, accuracy {accuracy:.2f} %, "
                f"{self.images_per_step / pace:.0f} images/s, {duration(left)} left, of the run "
                f"{duration(left + pace * self.total * self.epochs_left)}"
            )
            self.bar.set_postfix_str(report)
            if self.bar.disable:
                self.run.log(f"    {self.label}, step {self.steps}/{self.total}: {report}")
        if self.steps == self.total:
            self.bar.close()
        signals.check()


def fit_to_data(args, images):
    """Make an untyped --batch_size fit so many images; return what there is to say of the data."""
    notes = []
    processes = distributed.processes()
    if "batch_size" not in args.typed:  # the published one is that of all processes together
        args.batch_size = max(args.batch_size // processes, 1)
        share = images // processes
        if args.batch_size > share > 1:
            args.batch_size = share
            notes.append(f"--batch_size is {share}, for there are no more images")
    if processes > 1:
        notes.append(f"{processes} processes with --batch_size {args.batch_size}: a step takes "
                     f"{processes * args.batch_size} images")  # fmt: skip
    if args.cutout and 2 * args.cutout_length > args.image_size:
        notes.append(f"warning: cutout of {args.cutout_length} pixels takes most of an image of "
                     f"{args.image_size}: give --cutout_length or --no-cutout")  # fmt: skip
    return notes


def data_flags(args):
    """The flags by which another script reads the same data; empty for the default ones."""
    flags = {"dataset": "cifar10", "data": "data", "image_size": 32}
    return "".join(
        f" --{name} {shlex.quote(str(getattr(args, name)))}"
        for name, default in flags.items()
        if getattr(args, name) != default
    )


def losses(logits, logits_aux, labels, auxiliary_weight, label_smoothing=0.0):
    """Cross-entropy, and its sum with that of the auxiliary head (if any) times its weight."""
    cross_entropy = functools.partial(F.cross_entropy, label_smoothing=label_smoothing)
    loss = cross_entropy(logits.float(), labels)
    if logits_aux is None:
        return loss, loss
    return loss, loss + auxiliary_weight * cross_entropy(logits_aux.float(), labels)


@torch.no_grad()
def evaluate(net, batches, amp=False, top5=False):
    """Mean cross-entropy and accuracy (percent) of a network in evaluation mode.

    Parameters
    ----------
    net : Module
        Its forward returns (logits, anything).
    batches : data.Batches
    amp : bool
        Whether to compute in bfloat16 where that is safe.
    top5 : bool
        Whether to return also the top-5 accuracy (percent).
    """
    net.eval()
    device = next(net.parameters()).device
    meter = Meter(device, top5)
    for x, y in batches:
        with autocast(device, amp):
            logits, _ = net(x)
        meter.add(F.cross_entropy(logits.float(), y), logits, y)
        signals.check()
    return meter.read()


def table_row(columns, values=None):
    """A line of a table.

    Parameters
    ----------
    columns : list of str
        Names of the columns.
    values : list of str, optional
        One text a column; without them, the line of the names.
    """
    widths = [max(11, len(name)) for name in columns]
    texts = zip(values or columns, widths, strict=True)
    return "  ".join(f"{text:>{width}}" for text, width in texts)


def duration(seconds):
    """Seconds as a person would say them: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
