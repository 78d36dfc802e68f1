"""Speedups for whole networks: huge pages on a CPU, bfloat16 casts in one launch, torch.compile."""

import contextlib
import ctypes
import functools
import os
import sys

import torch

import layers
from harness.distributed import unwrapped

# ------------------------------------------------------------------------------------------------
# Memory and threads of the process
# ------------------------------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_MAX, MADV_HUGEPAGE = -1, -4, 14  # malloc.h, mman.h
HUGE_PAGE = 2 << 20  # bytes
HEAP = 4 << 30  # bytes of the heap in huge pages; memory beyond it has small pages


@functools.cache
def keep_freed_memory():
    """Keep freed memory in the process, in huge pages, if Linux and its libc support this.

    Every step allocates the same gigabyte again. By default, the kernel maps new pages of 4 KiB for
    each large tensor and zeroes them. On an Intel Xeon (a virtual machine), keeping pages of 2 MiB
    reduces the CPU time of a two-stage step by 12 %, of a one-stage step by 10 % and of a
    retraining step by 19 %.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # only glibc has it
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # This only reserves addresses; a page is mapped when it is first written.
    start = libc.malloc(HEAP)
    if start:
        libc.free(start)
        aligned = -(-start // HUGE_PAGE) * HUGE_PAGE  # rounded up
        libc.madvise(aligned, HEAP - HUGE_PAGE, MADV_HUGEPAGE)


def limit_threads(log):
    """Use one thread on a busy machine, where threads would wait for each other."""
    cores, load = os.cpu_count(), os.getloadavg()[0]
    # The factor 1.5: a previous run that has just ended still counts as one process per core.
    if load > 1.5 * cores and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        log(f"the machine is busy (load {load:.1f} on {cores} cores), so this run uses one thread; "
            "set OMP_NUM_THREADS to choose the number of threads")


# ------------------------------------------------------------------------------------------------
# bfloat16
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def autocast(net, device, enabled):
    """Autocast a forward pass of a network to bfloat16, if `enabled`.

    On CUDA, one kernel launch casts the weights of all convolutions, and one casts their gradients.
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
        defined = [k for k, g in enumerate(gradients) if g is not None]
        given = [gradients[k] for k in defined]
        dtypes = [ctx.dtypes[k] for k in defined]
        if torch.is_grad_enabled():  # for second derivatives: torch's casts are differentiable
            casts = [g.to(dtype) for g, dtype in zip(given, dtypes, strict=True)]
        else:
            casts = _cast(given, dtypes)
        result = len(gradients) * [None]
        for k, g in zip(defined, casts, strict=True):
            result[k] = g
        return None, *result


def _cast(tensors, dtypes):
    """Cast all tensors in one kernel launch."""
    casts = [torch.empty_like(t, dtype=d) for t, d in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(casts, tensors)
    return tuple(casts)


# ------------------------------------------------------------------------------------------------
# torch.compile
# ------------------------------------------------------------------------------------------------


def compile_network(net, is_fixed, log=print, backend="inductor"):
    """Compile a network in place with torch.compile; parameter names do not change.

    If the architecture is not fixed, compile only its operations. All cells then share one graph
    for each class of operations and shape.
    """
    log("compiling: the first step of each kind takes a minute or more, and drop-path uses the "
        "compiler's random numbers")
    torch._dynamo.config.recompile_limit = 256  # graphs per class
    modules = [net] if is_fixed else net.operations()
    for module in modules:
        module.compile(dynamic=False, backend=backend)
