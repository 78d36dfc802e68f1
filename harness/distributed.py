"""torch.distributed in a few lines: several ranks, started by torchrun, train one network.

    torchrun --nproc_per_node=2 search.py

Each rank has a device of its own, takes its share of every batch, and averages its gradients with
those of the others, so that all take the same steps. Rank 0 writes. With a single process, all of
this does nothing.
"""

import contextlib
import functools
import os
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def place():
    """This rank among all, as `data.Batches` takes it."""
    return dict(rank=rank(), world_size=world_size())


def launcher():
    """What the command line of a script begins with, to run it as this one is run."""
    if world_size() == 1:
        return "python"
    here, machines = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())), ""
    if here < world_size():
        nodes = world_size() // here
        machines = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT "
    return f"torchrun {machines}--nproc_per_node={here}"


def start():
    """Find the other ranks that torchrun has started, if any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Of the gradients of 1×1 convolutions, whose strides in channels-last are ambiguous.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def stop():
    """Part from the other ranks, at the same moment as they do."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_loss(error):
    """Whether a RuntimeError says that another rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text


@contextlib.contextmanager
def rank_zero_first():
    """Run a block on rank 0 before the others: what it puts on the disk is there for them."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if rank() == 0 and world_size() > 1:
            dist.barrier()


def rank_zero_only(method):
    """Have rank 0 alone do what a method does; on the others it does nothing."""

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        if rank() == 0:
            return method(*args, **kwargs)

    return wrapper


def gather(value):
    """List of the values of all ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_rank_zero(value):
    """The value of rank 0, on every rank."""
    return gather(value)[0]


def data_parallel(net, parameters, static=False):
    """The network, to be called such that backward passes average gradients over the ranks.

    Averaged are those of the `parameters`, which may train or not from one pass to the next. A
    supernet runs other operations after each recovery, so DistributedDataParallel looks anew in
    every pass for the parameters that it reaches, unless the network is `static`. With a single
    rank it is the network itself.
    """
    if world_size() == 1:
        return net
    trained = {p: p.requires_grad for p in net.parameters()}
    for p in trained:
        p.requires_grad_(False)
    for p in parameters:  # it takes in what needs a gradient now
        p.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers got another name in 2.14
        # All ranks have the same weights, and BatchNorms are averaged once an epoch.
        wrapped = DistributedDataParallel(
            net, init_sync=False, broadcast_buffers=False, static_graph=static,
            find_unused_parameters=not static,
        )
    for p, flag in trained.items():
        p.requires_grad_(flag)
    return wrapped


def unwrapped(net):
    return net.module if isinstance(net, DistributedDataParallel) else net


def average_gradients(parameters):
    """Average the gradients of a few small parameters over the ranks."""
    average([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def average_statistics(net):
    """Average the running means and variances of all BatchNorms over the ranks."""
    average([buffer for name, buffer in net.named_buffers() if ".running_" in name])


def average(tensors):
    """Average tensors over the ranks in place, in one exchange."""
    if world_size() == 1 or not tensors:
        return
    mean = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(mean)
    mean /= world_size()
    for t, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))
