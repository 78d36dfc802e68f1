"""Data-parallel training with torch.distributed.

    torchrun --nproc_per_node=2 search.py

Each rank has its own device and processes its part of each batch. Gradients are averaged over the
ranks, so that all take the same steps. Rank 0 writes the files. With a single process, the
functions of this file do nothing.
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


def rank_and_size():
    """Rank and world size, as options of `data.Batches`."""
    return dict(rank=rank(), world_size=world_size())


def launch_command():
    """Command that runs a script with as many ranks as this one: python, or torchrun with flags."""
    if world_size() == 1:
        return "python"
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = world_size() // ranks_per_node
    options = ""
    if nodes > 1:
        options = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT "
    return f"torchrun {options}--nproc_per_node={ranks_per_node}"


def start():
    """Initialize the process group if torchrun has started several ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # 1×1 convolutions have ambiguous strides in channels-last, of which torch warns.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def stop():
    """Wait for the other ranks, and destroy the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_peer_failure(error):
    """Whether a RuntimeError says that another rank has ended."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text


@contextlib.contextmanager
def rank_zero_first():
    """Run a block on rank 0 first, so that the other ranks find the files it has written."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if rank() == 0 and world_size() > 1:
            dist.barrier()


def rank_zero_only(method):
    """Decorate a method so that it does nothing on other ranks than 0."""

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
    """Wrap a network so that backward passes average the gradients of `parameters` over the ranks.

    With a single rank, return the network itself. Unless the network is `static`, each backward
    pass searches for unused parameters, because a supernet runs other operations after a recovery.
    """
    if world_size() == 1:
        return net
    trained = {p: p.requires_grad for p in net.parameters()}
    for p in trained:
        p.requires_grad_(False)
    for p in parameters:  # the wrapper registers the parameters that require a gradient now
        p.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers
        # All ranks start with the same weights, and average BatchNorm statistics once per epoch.
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
    """Average tensors over the ranks in place, with one all-reduce."""
    if world_size() == 1 or not tensors:
        return
    mean = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(mean)
    mean /= world_size()
    for t, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))
