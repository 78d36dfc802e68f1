"""What both scripts need around their loops: device, seeds, schedules, meter, progress."""

import contextlib
import functools
import math
import os
import random
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import distributed

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None


class UserError(ValueError):
    """Something the person at the keyboard can fix; shown as one line, without a traceback."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))  # file names may hold line breaks


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """Name the path when a file or folder cannot be written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None


@contextlib.contextmanager
def replacing(path):
    """Open a temporary binary file that takes the place of `path` once it is whole on the disk.

    So at every moment there is a whole file of that name, the old one or the new one.
    """
    partial = f"{path}.partial"
    try:
        with writing(path):
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


# ------------------------------------------------------------------------------------------------
# Device and random states
# ------------------------------------------------------------------------------------------------


def choose_device(name, amp=False, cuda_graphs=False):
    """The torch.device of --device, made the current one; by default CUDA, else the CPU.

    Of several ranks on a machine, each has a CUDA device of its own.

    Parameters
    ----------
    name : str or None
    amp : bool
        Whether the device is to compute in bfloat16.
    cuda_graphs : bool
        Whether steps are to be recorded as CUDA graphs.

    Raises
    ------
    UserError
        If nothing can be trained there. Every rank of a machine with too few devices finds that.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and distributed.world_size() > 1:
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
    elif device.type == "cpu":
        keep_to_memory()
    if cuda_graphs and (device.type != "cuda" or distributed.world_size() > 1):
        raise UserError("--cuda_graphs needs a single rank on a CUDA device: leave it out")
    return device


def keep_to_memory():
    """Have an allocation fail that is beyond the machine's memory.

    Else many small ones may together be granted more than there is, until the kernel kills some
    process without a word.
    """
    if resource:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft == resource.RLIM_INFINITY or memory < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))


def is_usable(name):
    """Whether there is such a device here, as `choose_device` finds."""
    try:
        choose_device(name)
    except UserError:
        return False
    return True


def seed_everything(seed, device):
    """Seed Python's, numpy's and torch's generators, and one for the order of the images.

    Parameters
    ----------
    seed : int
        Of 64 bits at most.
    device : torch.device

    Returns
    -------
    torch.Generator
        On the device, for data order and augmentation; alike on all ranks.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def seed_drop_path(seed):
    """Have each rank drop other paths, once all have made the same network."""
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
        One for each rank.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return distributed.gather({
        "python": list(random.getstate()),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(generator.device) if generator.device.type == "cuda"
        else None,
        "data": generator.get_state(),
    })


def set_random_state(states, generator, seed, epoch, log):
    """Put all random generators back into the states of `random_state`.

    A generator of one kind of device cannot take the state of one of another kind. On another kind
    than the run was on, torch's generators are seeded from the run's seed and the epochs done.

    Ranks that were not there then keep their own generators, but for that of the data, which is
    common to all.

    Parameters
    ----------
    states : list of dict
    generator : torch.Generator
        That of the data order and augmentation.
    seed, epoch : int
        Of the run.
    log : callable
        Takes a line.
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
        log(f"the run was on {before}, whose random numbers cannot be continued here: from epoch "
            f"{epoch + 1} on, the order of the images, augmentation and drop-path are drawn anew")
        return
    generator.set_state(states[0]["data"])
    if state:
        torch.set_rng_state(state["torch"])
        if on_cuda:
            torch.cuda.set_rng_state(state["cuda"], generator.device)


def warn_if_busy(device, log):
    """Say in a line if other processes keep the cores busy, where several threads are slow."""
    try:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system
        return
    if device.type == "cpu" and load > cores and torch.get_num_threads() > 1:
        log(f"the machine is busy (load {load:.1f} on {cores} cores): threads that wait for each "
            "other are slow; OMP_NUM_THREADS=1 before the command may be faster")


def is_out_of_memory(error):
    """Whether an error of Python, numpy or torch says that there is too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = "can't allocate memory", "calculation overflowed", "array is too big"
    is_candidate = isinstance(error, RuntimeError | ValueError)
    return is_candidate and any(sign in str(error) for sign in signs)


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
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------------------------------------------
# Schedules and optimizers
# ------------------------------------------------------------------------------------------------


def cosine(epoch, epochs, high, low):
    """Learning rate of an epoch, counted from 0: low + (high − low)(1 + cos(π·epoch/epochs))/2."""
    return low + (high - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


WARM_UP = 5  # epochs


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


# ------------------------------------------------------------------------------------------------
# Losses, meter, evaluation
# ------------------------------------------------------------------------------------------------


def losses(logits, logits_aux, labels, args):
    """Cross-entropy, and its sum with that of the auxiliary head (if any) times its weight.

    Parameters
    ----------
    logits, logits_aux : tensors (B, classes); the second may be None
    labels : int64 tensor (B,)
    args : argparse.Namespace
        With label_smoothing and auxiliary_weight.
    """
    cross_entropy = functools.partial(F.cross_entropy, label_smoothing=args.label_smoothing)
    loss = cross_entropy(logits.float(), labels)
    if logits_aux is None:
        return loss, loss
    return loss, loss + args.auxiliary_weight * cross_entropy(logits_aux.float(), labels)


class Meter:
    """Mean loss and accuracy of an epoch, added up on the device and read only when asked for.

    Adding changes tensors in place and nothing else, so that a CUDA graph can repeat it.

    Parameters
    ----------
    device : torch.device
    top5 : bool
        Whether to count also the images whose label is among the 5 largest logits.
    blame : str
        The flags of the last update before a loss: too large a one makes it not finite.
    after : Meter, optional
        Whose loss is computed before this one's in each step: both tell of the first bad one.
    """

    def __init__(self, device, top5=False, blame="--learning_rate or --grad_clip", after=None):
        # batches, images, loss, correct, correct among 5
        self.sums = torch.zeros(4 + top5, dtype=torch.float64, device=device)
        if after:  # the losses of step n count as n and n + 1/2
            self.first_bad, self.blames, self.offset = after.first_bad, after.blames, 0.5
        else:
            self.first_bad = torch.full((), torch.inf, dtype=torch.float64, device=device)
            self.blames, self.offset = [], 0.0
        self.blames.append(blame)
        self.top5 = top5

    def add(self, loss, logits, labels):
        """Add a batch: its mean loss (0-dim tensor), logits (B, classes), labels (B,)."""
        loss, logits, images = loss.detach().double(), logits.detach(), len(labels)
        correct = [(logits.argmax(1) == labels).sum()]
        if self.top5:
            correct.append((logits.topk(5).indices == labels[:, None]).sum())
        counts = [loss.new_full((), 1), loss.new_full((), images)]
        self.sums += torch.stack([*counts, images * loss, *correct])
        bad = torch.where(loss.isfinite(), torch.inf, self.sums[0] + self.offset)
        torch.minimum(self.first_bad, bad, out=self.first_bad)

    def read(self):
        """Mean loss, accuracy in percent and, if counted, top-5 accuracy; over all ranks.

        A host sync.

        Raises
        ------
        Diverged
            If a loss was not finite: says which was the first.
        """
        _, images, loss, *correct = distributed.reduce(self.sums).tolist()
        first_bad = distributed.reduce(self.first_bad, distributed.MIN).item()
        if math.isfinite(first_bad):
            step = int(first_bad)
            raise Diverged(f"step {step}", self.blames[first_bad > step])
        return loss / images, *(100 * count / images for count in correct)


def named(measured, what):
    """What a meter has read, under its names in metrics.jsonl: "train_loss", say."""
    names = (f"{what}_loss", f"{what}_accuracy", f"{what}_top5_accuracy")
    return dict(zip(names, measured, strict=False))


class Diverged(UserError):
    """A loss was not finite.

    Parameters
    ----------
    where : str
        As in "step 3".
    blame : str
        The flags of the update before; see `Meter`.
    """

    def __init__(self, where, blame):
        super().__init__(f"{where}: the loss is not finite; the weights may hold NaN")
        self.where, self.blame = where, blame


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
    try:
        return meter.read()
    except Diverged as error:
        raise Diverged("evaluation", error.blame) from None


# ------------------------------------------------------------------------------------------------
# Progress
# ------------------------------------------------------------------------------------------------


BAR = "{desc} {percentage:3.0f} %|{bar:20}| {n_fmt}/{total_fmt} steps{postfix}"


class Progress:
    """An epoch in progress: a bar on a terminal, else a line every `report_freq` steps.

    Parameters
    ----------
    label : str
        As in "epoch 3/50".
    steps : int
        Of the epoch.
    images_per_step : int
        Of all ranks.
    report_freq : int
    epochs_left : int
        Of the run, after this one.
    log : callable
        Takes a line.
    """

    def __init__(self, label, steps, images_per_step, report_freq, epochs_left, log):
        self.label, self.images_per_step, self.report_freq = label, images_per_step, report_freq
        self.epochs_left, self.log, self.began = epochs_left, log, time.monotonic()
        self.bar = tqdm(
            total=steps, desc=label, leave=False, file=sys.stdout, bar_format=BAR,
            disable=distributed.rank() > 0 or not sys.stdout.isatty(), dynamic_ncols=True,
        )
        self.steps, self.total = 0, steps

    def step(self, meter):
        """Count a step; `meter` is read every `report_freq` steps."""
        self.steps += 1
        self.bar.update()
        if self.steps % self.report_freq == 0 and self.steps < self.total:
            loss, accuracy = meter.read()
            pace = (time.monotonic() - self.began) / self.steps
            left = pace * (self.total - self.steps)
            report = (
                f"loss {loss:.3f}, accuracy {accuracy:.2f} %, "
                f"{self.images_per_step / pace:.0f} images/s, {duration(left)} left, of the run "
                f"{duration(left + pace * self.total * self.epochs_left)}"
            )
            self.bar.set_postfix_str(report)
            if self.bar.disable:
                self.log(f"    {self.label}, step {self.steps}/{self.total}: {report}")

    def close(self):
        self.bar.close()


def table_row(texts, columns):
    """A line of a table whose columns have these names."""
    widths = [max(11, len(name)) for name in columns]
    return "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def duration(seconds):
    """Seconds as a person would say them: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
