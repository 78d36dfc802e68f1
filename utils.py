"""What the loops need: files, device, seeds, schedules, loss, meter, evaluation."""

import contextlib
import math
import os
import random
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None


class UserError(Exception):
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


def write_file(path, content):
    """Write bytes into a file, which is replaced in one step once they are on the disk."""
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
    """The torch.device of --device, made the current one; by default CUDA, else the CPU.

    Of several ranks on a machine, each has a CUDA device of its own. UserError if nothing can be
    trained there: every rank of a machine with too few devices finds that.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and dist.is_initialized():
        if name != "cuda":
            raise UserError(f"--device {name}: each rank takes a device of its own: give cuda")
        devices = torch.cuda.device_count()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        if 0 < devices < ranks:
            raise UserError(
                f"more ranks ({ranks}) than CUDA devices ({devices}) on this machine: give "
                f"torchrun --nproc_per_node={devices}, or --device cpu"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
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
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): give another "
            "one, cpu say"
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


def seed_everything(seed, device):
    """Seed Python, numpy and torch; return a generator for the data, equal on all ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def seed_drop_path(seed):
    """Have each rank drop other paths, once all have made the same network."""
    if dist.is_initialized() and dist.get_rank() > 0:
        torch.manual_seed(seed + dist.get_rank())


def memory_format(device, amp, two_stage=False):
    """The faster memory format of network and batches; see docs/speed.md.

    Channels-last on a CPU, in bfloat16 on CUDA, where tensor cores work on it, and in two-stage
    search.
    """
    is_nchw = device.type == "cuda" and not amp and not two_stage
    return torch.contiguous_format if is_nchw else torch.channels_last


def evaluation_batch(args, device):
    """Images in a batch of an evaluation: on CUDA as many as keep it busy; they divide 10,000."""
    busy = 1000 * 32**2 // args.image_size**2
    return max(args.batch_size, busy) if device.type == "cuda" else args.batch_size


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


def is_out_of_memory(error):
    """Whether an error of Python or torch means that there is too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


# ------------------------------------------------------------------------------------------------
# Schedules and optimizers
# ------------------------------------------------------------------------------------------------
# A schedule gives the learning rate of an epoch, counted from 0, as a share of the initial one.


def cosine(epoch, epochs, low):
    """low + (1 − low)(1 + cos(π·epoch/epochs))/2."""
    return low + (1 - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


WARM_UP = 5  # epochs


def warm_up(epoch):
    """From 1/5 to 1 in 5 epochs."""
    return min((epoch + 1) / WARM_UP, 1)


def warm_up_linear(epoch, epochs):
    """The ImageNet recipe: 5 steps up to 1, then a line towards 0.

    In the last 5 epochs the line has a fifth of the slope, and ends just above 0. A run of 6 to 10
    epochs goes from the warm-up into that last line; one of at most 5 is all warm-up.
    """
    if epoch < WARM_UP:
        return warm_up(epoch)
    left = epochs - epoch
    return (left - WARM_UP if left > WARM_UP else left / WARM_UP) / (epochs - WARM_UP)


class SGD(torch.optim.Optimizer):
    """SGD with momentum and weight decay as in torch.optim.SGD; on CUDA its rate is a tensor.

    torch's own reads that tensor on the host, so a CUDA graph would keep its first value.
    """

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for group in self.param_groups:
            if group["params"][0].is_cuda:
                rate = torch.tensor(group["lr"], device=group["params"][0].device)
                group.update(initial_lr=group["lr"], lr=rate)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            grads = [p.grad for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(
                momenta, torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_sub_(params, torch._foreach_mul(momenta, group["lr"]))


def set_learning_rate(optimizer, share):
    """Give each group of an optimizer this share of the learning rate that it began with."""
    for group in optimizer.param_groups:
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"])
        group["lr"] = set_number(group["lr"], share * group["initial_lr"])


def set_number(old, value):
    """Store a number where the old one was: in its tensor, if it had one."""
    return old.fill_(value) if isinstance(old, torch.Tensor) else float(value)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def held(optimizer):
    """Compute no gradient of an optimizer's parameters meanwhile."""
    trained = [p for p in parameters_of(optimizer) if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def forget(optimizer, parameters):
    """Take parameters, and what is remembered of them, out of an optimizer."""
    gone = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for p in parameters:
        optimizer.state.pop(p, None)


# ------------------------------------------------------------------------------------------------
# Loss, meter, evaluation
# ------------------------------------------------------------------------------------------------


def criterion(logits, logits_aux, labels, args):
    """The loss that the log shows, and the one that is minimised: with the auxiliary head's.

    Labels are classes, (B,), or their probabilities, (B, classes). logits_aux may be None.
    """
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
    if logits_aux is None:
        return loss, loss
    aux = F.cross_entropy(logits_aux.float(), labels, label_smoothing=args.label_smoothing)
    return loss, loss + args.auxiliary_weight * aux


class Diverged(UserError):
    """A loss was not finite."""


class Meter:
    """Mean loss and accuracy, summed up on the device: only reading them waits for it."""

    def __init__(self, device, top5=False):
        self.top5 = top5
        self.sums = torch.zeros(3 + top5, dtype=torch.float64, device=device)

    def add(self, loss, logits, labels):
        """Add a batch: its mean loss (0-dim tensor), logits (B, classes), labels as `criterion`."""
        loss, logits = loss.detach().double(), logits.detach()
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        counts = [(logits.argmax(1) == labels).sum()]
        if self.top5:
            counts.append((logits.topk(5).indices == labels[:, None]).sum())
        images = loss.new_full((), len(labels))
        self.sums += torch.stack([images, images * loss, *counts])

    def read(self):
        """Mean loss, accuracy (%) and, if counted, top-5 accuracy (%); of all ranks together."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        images, loss, *counts = sums.tolist()
        if not math.isfinite(loss):
            raise Diverged("the loss is not finite")
        return loss / images, *(100 * count / images for count in counts)


def named(measured, what):
    """What a meter has read, under its names in metrics.jsonl: "train_loss", say."""
    names = (f"{what}_loss", f"{what}_accuracy", f"{what}_top5_accuracy")
    return dict(zip(names, measured, strict=False))


@torch.no_grad()
def evaluate(net, batches, amp=False, top5=False):
    """Mean cross-entropy and accuracy (%), maybe top-5 too, of a network in evaluation mode."""
    net.eval()
    device = next(net.parameters()).device
    meter = Meter(device, top5)
    for x, y in batches:
        with autocast(device, amp), torch.compiler.set_stance("force_eager"):
            logits, _ = net(x)
        meter.add(F.cross_entropy(logits.float(), y), logits, y)
    return meter.read()
