"""The same values sooner, on this device. Without its calls only speed is lost.

    net = fast.accelerate(Network(16, 10, 8).to(device))

`operations.py`, `model.py` and `model_search.py` say what is computed; `accelerate` says how. It
gives each layer it knows a class of the same name from here, and leaves its parameters, buffers and
state-dict keys, after it has seen that both compute the same. Cells and networks are left alone,
and so is a layer that somebody has edited. All of it is exact, to rounding:

* The weight w of an operation goes into the BatchNorm that ends it: w (γ x̂ + β) = (wγ) x̂ + wβ
  takes no pass over the tensor.
* On a CPU, oneDNN has kernels for all the convolutions here but not for all their gradients, and
  without one it is up to 30 times slower: gradients are put together from kernels that it has.
  All tensors are in channels-last memory there, where a 1×1 convolution is a product of matrices.
* A tensor's ReLU is computed once for all operations that ask for it.
* On Linux, memory that a step frees stays with the process, in huge pages.
* On CUDA, BatchNorm in channels-last takes torch's kernels, which spread a few channels over all
  multiprocessors where cuDNN's do not. In NCHW it gets a γ and a β in any case, for cuDNN's one
  kernel instead of torch's three. Nothing counts batches.
* The gradients that a concatenation hands out are dense. As slices of one tensor they would have
  each kernel that takes them fall back to another one, or copy them.
* In bfloat16 on CUDA the weights of all convolutions are cast in one launch, and so are their
  gradients.
"""

import contextlib
import copy
import ctypes
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import model_search
import operations


def accelerate(net, log=print):
    """Have a network of `model.py` or `model_search.py` compute the same values sooner, in place.

    Of each kind of layer, a copy with random parameters is compared with its faster form. One that
    computes something else, that cannot be taken, or that has hooks is left as it is, because
    somebody has edited it, and `log` gets a line for each such class.
    """
    if all(p.is_cpu for p in net.parameters()):
        keep_memory()
    for plain, faster in FASTER.items():
        layers = [layer for layer in net.modules() if type(layer) is plain]
        kinds = {}
        for layer in layers:
            if not has_hooks(layer):
                kinds.setdefault(kind(layer), []).append(layer)
        for same_kind in kinds.values():
            if computes_the_same(same_kind[0], faster):
                for layer in same_kind:
                    layer.__class__ = faster
        if left := sum(type(layer) is plain for layer in layers):
            log(f"{plain.__name__} runs as it is written, not accelerated, in {left} of "
                f"{len(layers)} layers: fast.py does not know what it computes there (an edit?)")
    if any(p.is_cuda for p in net.parameters()):
        cast_together(net)
    return net


def compile_network(net, whole, log=print, backend="inductor"):
    """Have torch compile a network in place, instead of `accelerate`: what --compile does.

    Where the support changes, the operations alone: one graph for each class and shape serves all
    cells, and is kept on the disk. Where it does not, the `whole` network.
    """
    log("compiling: each kind of step takes a minute or more when it is first made, and drop-path "
        "draws the compiler's random numbers")
    torch._dynamo.config.recompile_limit = 256  # graphs of one class
    for layer in [net] if whole else net.modules():
        if whole or FASTER.get(type(layer)) in WEIGHTED:
            layer.compile(dynamic=False, backend=backend)
    return net


def has_hooks(layer):
    """Whether a layer has hooks, or a forward of its own, that its faster form would skip."""
    inside = [layer] if isinstance(layer, model_search.MixedOp) else layer.modules()
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or "forward" in vars(m)
        for m in inside
    )


def kind(layer):
    """The `repr` of a layer, and attributes that it may not show."""
    hidden = [
        (name, value) for m in layer.modules() for name, value in vars(m).items()
        if not name.startswith("_") and name != "training"
    ]
    return f"{layer} {hidden}"


def computes_the_same(layer, faster):
    """Whether a copy of a layer with random parameters computes the same in its faster form."""
    plain, layer = type(layer), copy.deepcopy(layer).float().requires_grad_()
    for m in layer.modules():  # of what a MixedOp holds: nobody wants to hear of a comparison
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))

    def compare(allow_tf32):
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=allow_tf32)
        devices = [device] if device.type == "cuda" else []
        as_written = torch.autocast(device.type, enabled=False)
        with torch.random.fork_rng(devices), exact, torch.enable_grad(), as_written:
            for training in (True, False):
                found = _results(layer.train(training), faster, device)
                expected = _results(layer, plain, device)
                if not all(_is_close(a, b) for a, b in zip(found, expected, strict=True)):
                    return False
        return True

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and threads wait for busy cores
    try:
        for allow_tf32 in (False, True):  # a cuDNN may have no kernel without it
            with contextlib.suppress(Exception):  # if what an edit provokes is real, a step raises
                return compare(allow_tf32)
        return False
    finally:
        torch.set_num_threads(threads)


def _results(layer, cls, device):
    """Outputs of a layer in the form of a class, all gradients, and running statistics."""
    layer.__class__ = cls
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in layer.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_running_stats()  # without a momentum, batches are counted
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():  # positive, for a variance is among them
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                tensor.mul_(torch.randn(tensor.shape, generator=generator).sign().to(device)
                            if tensor.requires_grad else 1)
    found = []
    for inputs in _inputs(layer, generator, device):
        y = layer(*inputs)
        g = torch.randn(y.shape, generator=generator).to(y)
        flat = [t for x in inputs for t in (x if isinstance(x, list) else [x])]
        trained = [t for t in flat if isinstance(t, torch.Tensor)] + [*layer.parameters()]
        found += [y, *torch.autograd.grad(y, trained, g, allow_unused=True)]
        found += [t.clone() for name, t in layer.named_buffers() if "running_" in name]
    return found


def _inputs(layer, generator, device):
    """Arguments to call a layer with: images of as many channels as its first layer takes."""
    sizes = [getattr(m, "in_channels", None) or getattr(m, "num_features", None)
             for m in layer.modules()]
    channels = next((size for size in sizes if size), 4)

    def images():
        x = torch.randn(8, channels, 8, 8, generator=generator)
        x = (x * torch.logspace(-1, 1.5, 8).view(8, 1, 1, 1)).to(device)  # as ReLU6 tells apart
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    if isinstance(layer, model_search.MixedOp):
        ops = [k for k, op in enumerate(layer._ops) if op is not None]
        sizes = torch.tensor([3 * (-0.5) ** n for n in range(len(ops))], device=device)
        return [(images(), k, w.requires_grad_()) for k, w in zip(ops, sizes, strict=True)]
    return [([images(), images()],) if isinstance(layer, operations.Concat) else (images(),)]


def _is_close(a, b):
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-3 * b.abs().max())


@functools.cache
def keep_memory():
    """Have freed memory stay with the process, and lie in huge pages, as far as Linux lets us.

    A step asks for the same gigabyte again and again. By default each large tensor is mapped anew
    and zeroed in pages of 4 KiB. On an Intel Xeon, a virtual machine, pages of 2 MiB take 12 % off
    the CPU time of a two-stage step, 10 % off a one-stage step and 19 % off a retraining step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # of glibc
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(HEAP)  # addresses alone: no page is there before it is written to
    if start:
        libc.free(start)
        whole = -(-start // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(whole, HEAP - HUGE_PAGE, MADV_HUGEPAGE)


M_TRIM_THRESHOLD, M_MMAP_MAX, MADV_HUGEPAGE = -1, -4, 14  # malloc.h, mman.h
HUGE_PAGE, HEAP = 2 << 20, 4 << 30  # bytes; beyond this heap, pages are small


# ------------------------------------------------------------------------------------------------
# Layers and operations
# ------------------------------------------------------------------------------------------------
# `forward(x, w)` is w times what the layer computes, for a tensor w of one number.


class BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x, w=None):
        scale, shift = self.scale_and_shift(w)
        if x.is_cuda and self.training and _layout(x) == torch.channels_last:
            F._verify_batch_size(x.shape)
            return torch.native_batch_norm(
                x, scale, shift, self.running_mean, self.running_var, True, self.momentum, self.eps
            )[0]
        return F.batch_norm(
            x, self.running_mean, self.running_var, scale, shift, self.training, self.momentum,
            self.eps,
        )

    def scale_and_shift(self, w):
        """wγ and wβ; None stands for ones and zeros, but on CUDA."""
        scale, shift = self.weight, self.bias
        if w is not None and self.affine:
            scale, shift = _Weighted.apply(w, scale, shift)
        elif w is not None:
            # The CPU kernel reads γ as if it were contiguous, whatever its strides say.
            scale = w.expand(self.num_features).contiguous()
        mean = self.running_mean
        if mean.is_cuda:
            like = self.num_features, mean.dtype, mean.device
            scale = _constant(1, *like) if scale is None else scale
            shift = _constant(0, *like) if shift is None else shift
        return scale, shift


class _Weighted(torch.autograd.Function):
    """wγ and wβ, in half the launches of two products."""

    @staticmethod
    def forward(ctx, w, *affine):
        ctx.save_for_backward(w, *affine)
        return tuple(torch._foreach_mul(affine, w))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        w, *affine = ctx.saved_tensors
        of_affine = torch._foreach_mul(grads, w) if any(ctx.needs_input_grad[1:]) else (None, None)
        needs_w = ctx.needs_input_grad[0]  # not once the architecture is fixed
        of_w = torch.cat(torch._foreach_mul(grads, affine)).sum() if needs_w else None
        return of_w, *of_affine


@functools.cache
def _constant(value, n, dtype, device):
    return torch.full((n,), value, dtype=dtype, device=device)


class ReLUConvBN(operations.ReLUConvBN):
    def forward(self, x, w=None):
        _, conv, norm = self.op
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1):
            return norm(pointwise(shared_relu(x), conv.weight), w)
        return norm(conv(shared_relu(x)), w)


class SepConv(operations.SepConv):
    def forward(self, x, w=None):
        _, depthwise, point, norm, _, *second = self.op
        x = separable(shared_relu(x), depthwise, point, norm)
        x = relu(x, torch.relu_)  # in place, for BatchNorm's backward pass needs its input alone
        return separable(x, *second, w)


class DilConv(operations.DilConv):
    def forward(self, x, w=None):
        _, *layers = self.op
        return separable(shared_relu(x), *layers, w)


class FactorizedReduce(operations.FactorizedReduce):
    def forward(self, x, w=None):
        even, odd = _Diagonal.apply(shared_relu(x))
        halves = pointwise(even, self.conv_1.weight), pointwise(odd, self.conv_2.weight)
        return self.bn(_Concat.apply(*halves), w)


class Concat(operations.Concat):
    def forward(self, nodes):
        return _Concat.apply(*nodes)


class Normed(operations.Normed):
    def forward(self, x, w=None):
        op, norm = self
        return norm(op(x), w)


class MixedOp(model_search.MixedOp):
    def forward(self, x, op, w):
        layer = self._ops[op]
        return layer(x, w) if isinstance(layer, WEIGHTED) else w * layer(x)


WEIGHTED = (ReLUConvBN, SepConv, DilConv, FactorizedReduce, Normed)
FASTER = {  # what is inside others first
    nn.BatchNorm2d: BatchNorm2d,
    operations.ReLUConvBN: ReLUConvBN,
    operations.SepConv: SepConv,
    operations.DilConv: DilConv,
    operations.FactorizedReduce: FactorizedReduce,
    operations.Normed: Normed,
    operations.Concat: Concat,
    model_search.MixedOp: MixedOp,
}


# ------------------------------------------------------------------------------------------------
# ReLU
# ------------------------------------------------------------------------------------------------
# All operations on a tensor share its ReLU, which takes 9 % off a two-stage step and 12 % off its
# memory (Intel Xeon). On a CPU the backward pass writes into the gradient that it is given, which
# takes 0.4 to 0.7 of the time of a new tensor, and 2 % off the step. That gradient is nobody
# else's: all the convolutions that take these ReLUs make theirs anew.


def shared_relu(x):
    """ReLU of x, kept with the tensor and for as long, for all operations that ask for it."""
    if x.is_inference() or (x.is_leaf and x.requires_grad):  # may be changed, or used again
        return relu(x)
    state = x._version, torch.is_grad_enabled()
    if getattr(x, "_relu", (None,))[0] != state:
        x._relu = state, relu(x)
    return x._relu[1]


def relu(x, function=F.relu):
    return _ReLU.apply(x, function) if x.is_cpu else function(x)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, relu):
        y = relu(x)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g), None


# ------------------------------------------------------------------------------------------------
# Separable convolutions
# ------------------------------------------------------------------------------------------------


def separable(x, depthwise, pointwise, norm, w=None):
    """norm(pointwise(depthwise(x)), w), x: (B, C, H, W).

    `depthwise` is 3×3 or 5×5, of dilation 1 or 2, padded to leave the size as it is or, at stride
    2, to halve it; `pointwise` is 1×1, of stride 1. Neither has a bias.
    """
    if not (x.is_cpu and norm.training and torch.is_grad_enabled()) or _in_bfloat16():
        return norm(pointwise(depthwise(x)), w)
    return _Separable.apply(
        x, depthwise.weight, pointwise.weight, *norm.scale_and_shift(w),
        norm, depthwise.stride[0], depthwise.dilation[0],
    )


class _Separable(torch.autograd.Function):
    """What is between the layers is not kept but computed again, where that is cheap."""

    @staticmethod
    def forward(ctx, x, w_depth, w_point, scale, shift, norm, stride, dilation):
        between = _depthwise(x, w_depth, stride, dilation)
        y = _pointwise(between, w_point)
        few = len(w_point) <= 32  # channels: much memory, and little to compute
        z, mean, invstd = torch.native_batch_norm(
            y, scale, shift, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        between = between if ctx.needs_input_grad[2] and not few else None
        ctx.save_for_backward(
            x, w_depth, w_point, scale, mean, invstd, between, None if few else y
        )
        ctx.eps, ctx.stride, ctx.dilation = norm.eps, stride, dilation
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w_depth, w_point, scale, mean, invstd, between, y = ctx.saved_tensors
        stride, dilation = ctx.stride, ctx.dilation
        need_x, need_depth, need_point, *need_norm = ctx.needs_input_grad[:5]
        if y is None:
            between = _depthwise(x, w_depth, stride, dilation)
            y = _pointwise(between, w_point)
        g = _channels_last(g)  # a slice of the gradient of a concatenation, maybe
        g, g_scale, g_shift = torch.ops.aten.native_batch_norm_backward(
            g, y, scale, None, None, mean, invstd, True, ctx.eps, (True, *need_norm)
        )
        g_x = g_depth = g_point = None
        if need_point:
            g_point = _pointwise_weight_gradient(g, between, w_point)
        g = _pointwise(g, w_point.transpose(0, 1))
        if need_x:
            g_x = _depthwise_input_gradient(g, x, w_depth, stride, dilation)
        if need_depth:
            g_depth = _depthwise_weight_gradient(g, x, w_depth, stride, dilation)
        return g_x, g_depth, g_point, g_scale, g_shift, None, None, None


# ------------------------------------------------------------------------------------------------
# 1×1 convolutions
# ------------------------------------------------------------------------------------------------


def pointwise(x, weight):  # (B, C, H, W), (C_out, C, 1, 1)
    if x.is_cpu and not _in_bfloat16():
        return _Pointwise.apply(x, weight)
    return F.conv2d(x, weight)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return _pointwise(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        weight, x = ctx.saved_tensors
        g_x = g_weight = None
        if ctx.needs_input_grad[0]:
            g_x = _pointwise(g, weight.transpose(0, 1))
        if ctx.needs_input_grad[1]:
            g_weight = _pointwise_weight_gradient(g, x, weight)
        return g_x, g_weight


def _in_bfloat16():
    return torch.is_autocast_enabled("cpu")


def _is_intel():
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


# A product of thin matrices by MKL takes as long as oneDNN's convolution on an Intel Xeon, and 1.7
# to 2.7 times as long on an AMD EPYC, where a two-stage step gained 19 % (retraining: 18 %).
ONEDNN = torch.backends.mkldnn.is_available() and not _is_intel()


def _pointwise(x, weight):
    if ONEDNN and x.dtype == torch.float32:  # F.conv2d does not take it for batches below 16
        return torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 1)
    B, _, H, W = x.shape
    y = torch.empty((B, len(weight), H, W), dtype=x.dtype, memory_format=torch.channels_last)
    torch.mm(_pixels(x), weight.flatten(1).T, out=_pixels(y))
    return y


def _pointwise_weight_gradient(g, x, weight):
    if ONEDNN and x.dtype == torch.float32 and len(x) >= 16:
        return _undilated_gradients(g, x, weight, (1, 1), (0, 0), (False, True), groups=1)[1]
    return (_pixels(g).T @ _pixels(x)).view_as(weight)


def _pixels(x):
    """The matrix of all pixels, (batch · H · W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


# ------------------------------------------------------------------------------------------------
# Depthwise convolutions
# ------------------------------------------------------------------------------------------------


def _depthwise(x, weight, stride, dilation):
    padding = dilation * (weight.shape[3] // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=len(weight))


def _depthwise_input_gradient(g, x, weight, stride, dilation):
    if stride == 1:  # a convolution with the weight turned round, sooner than torch's gradient
        return _depthwise(g, weight.flip(2, 3), 1, dilation)
    if dilation == 1:
        padding = weight.shape[3] // 2
        padding, stride = (padding, padding), (stride, stride)
        return _undilated_gradients(g, x, weight, stride, padding, (True, False))[0]
    # At stride 2 only every second pixel was seen, and those by an undilated convolution.
    g_x = torch.zeros_like(x)
    seen = _channels_last(x[:, :, ::2, ::2])
    g_x[:, :, ::2, ::2] = _depthwise_input_gradient(g, seen, weight, 1, 1)
    return g_x


# For the gradient of a weight oneDNN has undilated kernels of up to 3 columns alone; torch's others
# are up to 12 times slower. Where `apart` neighbouring pixels are seen as the channels of one,
# columns that lie so far apart are adjacent, without a copy: so 5 columns are put together from 3
# and 3, at 64×16×32×32 in 0.6 of the time that copies of shifted images took (dilated: 0.4).


def _depthwise_weight_gradient(g, x, weight, stride, dilation):
    k = weight.shape[3]
    if dilation == 2 and stride == 2:  # only every second pixel was seen, without dilation
        x, dilation, stride = _channels_last(x[:, :, ::2, ::2]), 1, 1
    if k == 3 and dilation == 1:
        return _undilated_gradients(g, x, weight, (stride, stride), (1, 1), (False, True))[1]
    if stride == 2:  # columns -2, 0, 2 of even pixels; -1, 1 (and 3) of odd ones
        g = _channels_last(torch.cat([g, g], dim=1))
        even, odd = _three_columns(g, x, k, 1, 2, stride=(2, 1)).unbind()
        columns = even[..., 0], odd[..., 0], even[..., 1], odd[..., 1], even[..., 2]
        return torch.stack(columns, dim=3)
    inner = _three_columns(g, x, k, dilation, dilation).sum(0)
    if k == 3:
        return inner
    outer = _three_columns(g, x, k, dilation, 2 * dilation).sum(0)
    return torch.cat([outer[..., :1], inner, outer[..., 2:]], dim=3)


def _three_columns(g, x, rows, dilation, apart, stride=(1, 1)):
    """Weight gradients at columns -apart, 0 and apart: (apart, C, 1, rows, 3).

    One for each of the `apart` pixels that are seen as one; their sum is the gradient.
    """
    C, height = x.shape[1], dilation * (rows - 1) + 1  # undilated, of which some rows are taken
    if stride == (1, 1):
        g = _side_by_side(g, apart, height)
        x = _side_by_side(x, apart, height)
    else:
        x = _side_by_side(x, apart, 1)
    weight = x.new_empty(apart * C, 1, height, 3)
    padding = height // 2, 1
    gradient = _undilated_gradients(g, x, weight, stride, padding, (False, True))[1]
    return gradient.unflatten(0, (apart, C))[:, :, :, ::dilation]


def _side_by_side(x, apart, height):
    """See `apart` pixels of a row as one: (B, apart · C, H, W / apart)."""
    B, C, H, W = x.shape
    below, right = max(height + 1 - H, 0), -W % apart  # oneDNN leaves low images to a slow kernel
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    x = x.permute(0, 2, 3, 1).reshape(B, H + below, -1, apart * C)
    return x.permute(0, 3, 1, 2)


def _undilated_gradients(g, x, weight, stride, padding, wanted, groups=None):
    """Gradients of the input and the weight of a (depthwise) convolution, as far as wanted."""
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, (1, 1), False, (0, 0),
        groups or len(weight), (*wanted, False),
    )


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


class _Concat(torch.autograd.Function):
    """Concatenation of channels, whose backward pass hands out dense slices."""

    @staticmethod
    def forward(ctx, *parts):
        ctx.sizes, y = [x.shape[1] for x in parts], torch.cat(parts, dim=1)
        ctx.layout = _layout(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return tuple(part.contiguous(memory_format=ctx.layout) for part in g.split(ctx.sizes, 1))


class _Diagonal(torch.autograd.Function):
    """x[:, :, ::2, ::2] and x[:, :, 1::2, 1::2], whose gradients go into one tensor."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape, ctx.layout = x.shape, _layout(x)
        return tuple(x[:, :, i::2, i::2].contiguous(memory_format=ctx.layout) for i in (0, 1))

    @staticmethod
    def backward(ctx, g_even, g_odd):
        g = torch.empty(
            ctx.shape, dtype=g_even.dtype, device=g_even.device, memory_format=ctx.layout
        ).zero_()
        g[:, :, ::2, ::2] = g_even
        g[:, :, 1::2, 1::2] = g_odd
        return g


def _layout(x):
    """The memory format of x, which on CUDA may also be NCHW."""
    is_nchw = x.is_cuda and x.is_contiguous()
    return torch.contiguous_format if is_nchw else torch.channels_last


# ------------------------------------------------------------------------------------------------
# bfloat16 on CUDA
# ------------------------------------------------------------------------------------------------


def cast_together(net):
    """Have a network cast the weights of its convolutions in one launch, where autocast is on.

    During a forward pass the cast tensors stand in for the parameters, as attributes of the same
    name; parameters, state dict and optimizers are not touched.
    """
    convolutions, supports = None, None

    def before(net, inputs):
        nonlocal convolutions, supports
        if not torch.is_autocast_enabled("cuda"):
            return
        codes = getattr(net, "codes", ())
        if convolutions is None or supports != [code.support for code in codes]:
            supports = [code.support for code in codes]
            idle = {m for *_, op in net.idle_operations() for m in op.modules()} if codes else ()
            convolutions = [m for m in net.modules() if type(m) is nn.Conv2d and m not in idle]
        weights = [m.weight for m in convolutions]
        for m, cast in zip(convolutions, _Cast.apply(torch.bfloat16, *weights), strict=True):
            vars(m)["weight"] = cast

    def after(net, inputs, outputs):
        for m in convolutions or ():
            vars(m).pop("weight", None)

    net.register_forward_pre_hook(before)
    net.register_forward_hook(after, always_call=True)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [t.dtype for t in tensors]
        return _cast(tensors, [dtype] * len(tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        found = [k for k, g in enumerate(gradients) if g is not None]
        cast = _cast([gradients[k] for k in found], [ctx.dtypes[k] for k in found])
        cast = dict(zip(found, cast, strict=True))
        return None, *(cast.get(k) for k in range(len(gradients)))


def _cast(tensors, dtypes):
    cast = [torch.empty_like(t, dtype=d) for t, d in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(cast, tensors)
    return tuple(cast)
