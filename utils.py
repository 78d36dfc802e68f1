"""Files, device, seeds, schedules, optimizers, loss, meter and evaluation."""

import contextlib
import math
import os
import platform
import random
import re
import resource
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


class UserError(Exception):
    """An error that the user can fix; the scripts report it in one line, without a traceback."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))  # file names may hold line breaks


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """Turn an OSError while writing to `path` into a UserError."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None


def write_file(path, content):
    """Write bytes to a file, which is replaced atomically once they are on the disk."""
    partial = f"{path}.partial"
    try:
        with writing(path):
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


# ------------------------------------------------------------------------------------------------
# Device and seeds
# ------------------------------------------------------------------------------------------------


def choose_device(name, amp=False):
    """Return the torch.device of --device and make it current; by default CUDA if available.

    With several ranks on a machine, each has its own CUDA device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and dist.is_initialized():
        if name != "cuda":
            raise UserError(f"--device {name}: each rank uses another device, so give cuda")
        devices = torch.cuda.device_count()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        if 0 < devices < ranks:
            raise UserError(
                f"there are {ranks} ranks but {devices} CUDA devices on this machine: give "
                f"torchrun --nproc_per_node={devices}, or --device cpu"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if device.index is None:  # set_device needs an index
                device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.set_device(device)
        # Some devices lack float64, which the codes need, or have no generator or no values (meta).
        generator = torch.Generator(device)
        torch.rand(1, dtype=torch.float64, device=device, generator=generator).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]}): give another device, "
            "such as cpu"
        ) from None
    if device.type == "cuda":
        # Emulated bfloat16 takes about 40 times the time of a step.
        if amp and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"--amp: {torch.cuda.get_device_name()} does not support bfloat16: leave --amp out"
            )
        torch.backends.cudnn.benchmark = True  # a run uses few shapes, each of them many times
    return device


def seed_everything(seed, device):
    """Seed Python, numpy and torch, and return a generator for the data."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def seed_drop_path(seed):
    """Seed torch differently on each rank, so that drop-path differs between ranks."""
    if dist.is_initialized() and dist.get_rank() > 0:
        torch.manual_seed(seed + dist.get_rank())


def memory_format(device, amp, two_stage=False):
    """The faster memory format of network and batches; see docs/speed.md."""
    is_nchw = device.type == "cuda" and not amp and not two_stage
    return torch.contiguous_format if is_nchw else torch.channels_last


def evaluation_batch(args, device):
    """Batch size of evaluations: on CUDA large enough to use the whole device."""
    if device.type != "cuda":
        return args.batch_size
    return max(args.batch_size, 1000 * 32**2 // args.image_size**2)


def autocast(device, enabled):
    """Context of forward passes in bfloat16 where that is safe, if `enabled`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def peak_memory(device):
    """Peak memory in GiB, of the tensors on a CUDA device or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def processor_name():
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


def is_out_of_memory(error):
    """Whether an error of Python or torch means that memory was exhausted."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


# ------------------------------------------------------------------------------------------------
# Schedules and optimizers
# ------------------------------------------------------------------------------------------------
# A schedule returns the factor of an epoch, counted from 0, by which the initial learning rate is
# multiplied.


def cosine(epoch, epochs, low):
    """low + (1 − low)(1 + cos(π·epoch/epochs))/2."""
    return low + (1 - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


WARM_UP = 5  # epochs


def warm_up(epoch):
    """Linear warm-up from 1/5 to 1 in 5 epochs."""
    return min((epoch + 1) / WARM_UP, 1)


def linear_with_warm_up(epoch, epochs):
    """The schedule of ImageNet: a warm-up of 5 epochs, then a linear decrease.

    In the last 5 epochs the slope is a fifth of that before, so that the end is just above 0.
    """
    if epoch < WARM_UP:
        return warm_up(epoch)
    epochs_left = epochs - epoch
    if epochs_left > WARM_UP:
        return (epochs_left - WARM_UP) / (epochs - WARM_UP)
    return epochs_left / WARM_UP / (epochs - WARM_UP)


def sgd(parameters, args):
    """Return torch's fused SGD with momentum; on CUDA its learning rate is a tensor.

    A CUDA graph reads a tensor at each replay, but keeps the value that a number had at capture.
    """
    optimizer = torch.optim.SGD(
        parameters, args.learning_rate, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    for group in optimizer.param_groups:
        if group["params"][0].is_cuda:
            rate = torch.tensor(group["lr"], device=group["params"][0].device)
            group.update(initial_lr=group["lr"], lr=rate)
    create_momenta(optimizer)
    return optimizer


def create_momenta(optimizer):
    """Create missing momenta as zeros, because fused SGD needs them for all parameters or none."""
    for p in parameters_of(optimizer):
        state = optimizer.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)


def set_learning_rate(optimizer, factor):
    """Set the learning rate of each group of an optimizer to `factor` times its initial one."""
    for group in optimizer.param_groups:
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"])
        group["lr"] = set_number(group["lr"], factor * group["initial_lr"])


def set_number(old, value):
    """Return `value` as a float or, if `old` is a tensor, in that tensor."""
    return old.fill_(value) if isinstance(old, torch.Tensor) else float(value)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def no_gradients_of(optimizer):
    """Compute no gradients of an optimizer's parameters inside of the context."""
    trained = [p for p in parameters_of(optimizer) if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def remove_parameters(optimizer, parameters):
    """Remove parameters and their state from an optimizer."""
    removed = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in removed]
    for p in parameters:
        optimizer.state.pop(p, None)


# ------------------------------------------------------------------------------------------------
# Loss, meter, evaluation
# ------------------------------------------------------------------------------------------------


def criterion(logits, logits_aux, labels, args):
    """Cross-entropy for the log, and the loss to minimize, which adds that of the auxiliary head.

    Labels are classes (B,) or probabilities (B, classes). logits_aux is None without the head.
    """
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
    if logits_aux is None:
        return loss, loss
    aux = F.cross_entropy(logits_aux.float(), labels, label_smoothing=args.label_smoothing)
    return loss, loss + args.auxiliary_weight * aux


class Diverged(UserError):
    """The loss or b is not finite."""


class Meter:
    """Mean loss and accuracy, accumulated on the device; only `read` synchronizes with it."""

    def __init__(self, device, top5=False):
        self.top5 = top5
        self.sums = torch.zeros(3 + top5, dtype=torch.float64, device=device)

    def add(self, loss, logits, labels):
        """Add a batch: its mean loss, logits (B, classes), and labels as in `criterion`."""
        loss, logits = loss.detach().double(), logits.detach()
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        counts = [(logits.argmax(1) == labels).sum()]
        if self.top5:
            counts.append((logits.topk(5).indices == labels[:, None]).sum())
        images = loss.new_full((), len(labels))
        self.sums += torch.stack([images, images * loss, *counts])

    def read(self):
        """Return mean loss, accuracy (%) and, if counted, top-5 accuracy (%) over all ranks."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        images, loss, *counts = sums.tolist()
        if not math.isfinite(loss):
            raise Diverged("the loss is not finite")
        return loss / images, *(100 * count / images for count in counts)


def name_metrics(measured, prefix):
    """Return the results of a meter as a dict with keys such as train_loss."""
    names = (f"{prefix}_loss", f"{prefix}_accuracy", f"{prefix}_top5_accuracy")
    return dict(zip(names, measured, strict=False))


@torch.no_grad()
def evaluate(net, batches, amp=False, top5=False):
    """Return mean cross-entropy and accuracy (%), and maybe top-5 accuracy, in evaluation mode."""
    net.eval()
    device = next(net.parameters()).device
    meter = Meter(device, top5)
    for x, y in batches:
        with autocast(device, amp), torch.compiler.set_stance("force_eager"):
            logits, _ = net(x)
        meter.add(F.cross_entropy(logits.float(), y), logits, y)
    return meter.read()
