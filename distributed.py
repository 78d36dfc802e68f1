"""Several processes that train one network together, started by torchrun.

    torchrun --nproc_per_node=2 search.py

Each process has a device of its own, takes its part of every batch, and averages its gradients with
those of the others, so that all take the same steps. The first one writes. With a single process,
everything here does nothing.
"""

import functools
import os
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

MIN, SUM = dist.ReduceOp.MIN, dist.ReduceOp.SUM


class Ended(Exception):
    """The first process cannot go on, and has said why."""


def is_loss(error):
    """Whether a RuntimeError says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """Number of all processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def part():
    """Which part of a batch this process takes: its number, and that of all."""
    return rank(), processes()


def local_rank():
    """Number of this process among those of its machine, or None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def local_world_size():
    """Number of the processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes()))


def launcher():
    """What the command line of a script begins with, to run it as this one is run."""
    if processes() == 1:
        return "python"
    here = local_world_size()
    machines = ""
    if here < processes():
        machines = f"--nnodes={processes() // here} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT "
    return f"torchrun {machines}--nproc_per_node={here}"


def start():
    """Find the other processes that torchrun has started, if any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Of the gradients of 1×1 convolutions, whose strides in channels-last are ambiguous.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def stop():
    """Part from the other processes, at the same moment as they do."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def on_first(function):
    """Call a function on the first process alone.

    Returns
    -------
    object
        On every process, what the function returned.

    Raises
    ------
    Exception
        What the function raised; on the other processes Ended.
    """
    if processes() == 1:
        return function()
    answer = [None, False]
    try:
        if rank() == 0:
            answer = [function(), True]
    finally:  # the others wait for an answer
        dist.broadcast_object_list(answer)
    result, done = answer
    if not done:
        raise Ended
    return result


def first_before_others(function):
    """Call a function on every process, on the first one before all others.

    So that what it puts on the disk, a download say, is there for the others, and that an error
    of the first, which would be that of all, is told once.
    """
    results = []
    on_first(lambda: results.append(function()))
    return results[0] if results else function()


def by_first(method):
    """Have the first process alone do what a method does; on the others it does nothing."""

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        if rank() == 0:
            return method(*args, **kwargs)

    return wrapper


def gather(value):
    """List of the values of all processes."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def reduce(tensor, operation=SUM):
    """The sum (or another reduction) over the processes of a tensor; the tensor is left alone."""
    if processes() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, operation)
    return tensor


def averaged(net, idle=()):
    """The network, to be called such that backward passes average gradients over the processes.

    DistributedDataParallel notes in its first backward pass which parameters are reached, and
    counts on the same ones from then on, instead of looking for them at each step. So a supernet
    has to be wrapped anew after a recovery.

    Parameters
    ----------
    net : nn.Module
        The parameters that have `requires_grad` now are averaged.
    idle : iterable of nn.Parameter
        But for these, which no pass will reach, so that nothing is sent for them.

    Returns
    -------
    nn.Module
    """
    if processes() == 1:
        return net
    idle = [p for p in idle if p.requires_grad]
    for p in idle:
        p.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers got another name in 2.14
        # All processes have the same weights, and BatchNorms are averaged once an epoch.
        wrapped = DistributedDataParallel(
            net, init_sync=False, broadcast_buffers=False, static_graph=True
        )
    for p in idle:
        p.requires_grad_(True)
    return wrapped


@torch.no_grad()
def average_statistics(net):
    """Average the running means and variances of all BatchNorms over the processes."""
    if processes() == 1:
        return
    statistics = [buffer for name, buffer in net.named_buffers() if ".running_" in name]
    mean = reduce(torch.cat(statistics)) / processes()
    for buffer, part in zip(statistics, mean.split([len(b) for b in statistics]), strict=True):
        buffer.copy_(part)
