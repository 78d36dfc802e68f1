"""Speedups of a whole network: huge pages on a CPU, bfloat16 casts in one launch, torch.compile."""

import contextlib
import ctypes
import functools
import os
import sys

import torch

import layers
from harness.distributed import unwrapped

# ------------------------------------------------------------------------------------------------
# Memory and threads of a process
# ------------------------------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_MAX, MADV_HUGEPAGE = -1, -4, 14  # malloc.h, mman.h
HUGE_PAGE, HEAP = 2 << 20, 4 << 30  # bytes; beyond this heap, pages are small


@functools.cache
def keep_freed_memory():
    """Keep freed memory in the process, in huge pages, as far as Linux and its libc allow.

    Every step allocates the same gigabyte again. By default, each large tensor is mapped anew and
    zeroed in pages of 4 KiB. On an Intel Xeon, a virtual machine, pages of 2 MiB take 12 % off the
    CPU time of a two-stage step, 10 % off a one-stage step and 19 % off a retraining step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # it belongs to glibc
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(HEAP)  # reserves addresses only: pages are mapped when they are written
    if start:
        libc.free(start)
        aligned = -(-start // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(aligned, HEAP - HUGE_PAGE, MADV_HUGEPAGE)


def limit_threads(log):
    """Use one thread if other processes take the cores, as threads would wait for each other."""
    cores, load = os.cpu_count(), os.getloadavg()[0]
    # A run of ours that has just ended leaves a load of one process for each core.
    if load > 1.5 * cores and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        log(f"the machine is busy (load {load:.1f} on {cores} cores), so this run uses one thread; "
            "set OMP_NUM_THREADS to choose their number")


# ------------------------------------------------------------------------------------------------
# bfloat16
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def autocast(net, device, enabled):
    """Run a forward pass of a network in bfloat16 where that is safe, if `enabled`.

    On CUDA, the weights of all convolutions are cast in one launch, and so are their gradients.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        if not enabled or device.type != "cuda":
            yield
            return
        convolutions = [m for m in unwrapped(net).active_modules() if isinstance(m, layers.Conv2d)]
        casts = _Cast.apply(torch.bfloat16, *(conv.weight for conv in convolutions))
        for conv, weight in zip(convolutions, casts, strict=True):
            conv.cast_weight = weight
        try:
            yield
        finally:
            for conv in convolutions:
                conv.cast_weight = None


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [t.dtype for t in tensors]
        return _cast(tensors, len(tensors) * [dtype])

    @staticmethod
    def backward(ctx, *gradients):
        given = [k for k, g in enumerate(gradients) if g is not None]
        if torch.is_grad_enabled():  # second order: torch's casts are differentiable
            cast = [gradients[k].to(ctx.dtypes[k]) for k in given]
        else:
            cast = _cast([gradients[k] for k in given], [ctx.dtypes[k] for k in given])
        found = dict(zip(given, cast, strict=True))
        return None, *(found.get(k) for k in range(len(gradients)))


def _cast(tensors, dtypes):
    cast = [torch.empty_like(t, dtype=d) for t, d in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(cast, tensors)
    return tuple(cast)


# ------------------------------------------------------------------------------------------------
# torch.compile
# ------------------------------------------------------------------------------------------------


def compile_network(net, is_fixed, log=print, backend="inductor"):
    """Have torch compile a network in place; its names and its state dict stay as they are.

    The whole network if its architecture is fixed. Otherwise only its operations: one graph for
    each class and shape serves all cells.
    """
    log("compiling: each kind of step takes a minute or more when it is first made, and drop-path "
        "draws the compiler's random numbers")
    torch._dynamo.config.recompile_limit = 256  # graphs of one class
    for module in [net] if is_fixed else net.operations():
        module.compile(dynamic=False, backend=backend)
