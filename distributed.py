"""torch.distributed in a few lines: several ranks, started by torchrun, train one network.

    torchrun --nproc_per_node=2 search.py

Each rank has a device of its own, takes its part of every batch, and averages its gradients with
those of the others, so that all take the same steps. Rank 0 writes. With a single process, all of
this does nothing.
"""

import contextlib
import functools
import os
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

MIN, SUM = dist.ReduceOp.MIN, dist.ReduceOp.SUM


def is_loss(error):
    """Whether a RuntimeError says that another rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """Number of this rank among those of its machine, or None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def local_world_size():
    """Number of the ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def launcher():
    """What the command line of a script begins with, to run it as this one is run."""
    if world_size() == 1:
        return "python"
    here, machines = local_world_size(), ""
    if here < world_size():
        nodes = world_size() // here
        machines = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT "
    return f"torchrun {machines}--nproc_per_node={here}"


def start():
    """Find the other ranks that torchrun has started, if any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Of the gradients of 1×1 convolutions, whose strides in channels-last are ambiguous.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def stop():
    """Part from the other ranks, at the same moment as they do."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


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
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def reduce(tensor, operation=SUM):
    """The sum (or another reduction) of a tensor over the ranks; the tensor is left alone."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, operation)
    return tensor


def from_rank_zero(codes):
    """The codes of rank 0, on every rank: lists of lists of float64 arrays, broadcast flat."""
    if world_size() == 1:
        return codes
    flat = torch.from_numpy(np.concatenate([z for zs in codes for z in zs]))
    dist.broadcast(flat, 0)
    parts = iter(np.split(flat.numpy(), np.cumsum([len(z) for zs in codes for z in zs])[:-1]))
    return [[next(parts) for _ in zs] for zs in codes]


def data_parallel(net, parameters, static=False):
    """The network, to be called such that backward passes average gradients over the ranks.

    A supernet runs other operations after each recovery, so DistributedDataParallel looks anew in
    every pass for the parameters that it reaches, unless the network is `static`.

    Parameters
    ----------
    net : nn.Module
    parameters : list of nn.Parameter
        Those to average; they may train or not from one pass to the next.
    static : bool
        Whether every pass reaches the same ones.

    Returns
    -------
    nn.Module
        The network itself where there is a single rank.
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


def average_gradients(parameters):
    """Average the gradients of a few small parameters over the ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not gradients:
        return
    mean = reduce(torch.cat([g.flatten() for g in gradients])) / world_size()
    for g, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


@torch.no_grad()
def average_statistics(net):
    """Average the running means and variances of all BatchNorms over the ranks."""
    if world_size() == 1:
        return
    statistics = [buffer for name, buffer in net.named_buffers() if ".running_" in name]
    mean = reduce(torch.cat(statistics)) / world_size()
    for buffer, part in zip(statistics, mean.split([len(b) for b in statistics]), strict=True):
        buffer.copy_(part)
