"""The same values sooner, on this device: take its calls out and only speed is lost.

    net = fast.accelerate(Network(16, 10, 8).to(device))

`operations.py`, `model.py` and `model_search.py` say what is computed; `accelerate` says how. It
gives the layers it knows a class of the same name from here, with the parameters, buffers and
state-dict keys they have. Cells and networks are left alone, so an edited `forward` of theirs is
what runs, and an operation that is not known stays as it is. All of it is exact, to rounding:

* A tensor's ReLU is computed once for all operations that ask for it.
* The weight w of an operation goes into the BatchNorm that ends it: w (γ x̂ + β) = (wγ) x̂ + wβ
  takes no pass over the tensor.
* On a CPU, oneDNN has kernels for all the convolutions here but not for all their gradients, and
  without one it is up to 30 times slower: gradients are put together from kernels that it has.
  All tensors are in channels-last memory there, where a 1×1 convolution is a product of matrices.
* On Linux, memory that a step frees stays with the process, in huge pages.
* On CUDA a step is bound by its launches: BatchNorm gets a γ and a β in any case, for cuDNN's one
  kernel instead of torch's three, and nothing counts batches.
"""

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


def accelerate(net):
    """Have a network compute the same values sooner.

    Parameters
    ----------
    net : nn.Module
        A network of `model.py` or `model_search.py`; it is changed in place. Hooks on layers
        inside an operation do not fire any more; those on operations and cells do.

    Returns
    -------
    nn.Module
        The same network.
    """
    if all(p.is_cpu for p in net.parameters()):
        keep_memory()
    for module in net.modules():
        module.__class__ = FASTER.get(type(module), type(module))
    return net


def once(x, name, compute):
    """compute(x), once for all that ask by this name: it is kept with the tensor x, and as long."""
    if not hasattr(x, name):
        setattr(x, name, compute(x))
    return getattr(x, name)


def once_a_pass(x, name, compute):
    """As `once`, for what depends on the values of x, through which a gradient may flow."""
    if x.is_inference() or (x.is_leaf and x.requires_grad):  # may be changed, or used again
        return compute(x)
    state = x._version, torch.is_grad_enabled()
    if getattr(x, name, (None,))[0] != state:
        setattr(x, name, (state, compute(x)))
    return getattr(x, name)[1]


@functools.cache
def keep_memory():
    """Have freed memory stay with the process, and lie in huge pages, as far as Linux lets us.

    A step asks for the same gigabyte again and again. By default each large tensor is mapped anew
    and zeroed in pages of 4 KiB, which the processor then looks up one by one. On an Intel Xeon, a
    virtual machine, pages of 2 MiB take 12 % off the CPU time of a two-stage step, 10 % off that of
    a one-stage step and 19 % off that of a retraining step.
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
        if self.training:
            return batch_norm(x, scale, shift, self)
        return F.batch_norm(x, self.running_mean, self.running_var, scale, shift, eps=self.eps)

    def scale_and_shift(self, w):
        """wγ and wβ; None stands for ones and zeros, but on CUDA."""
        scale, shift = self.weight, self.bias
        if w is not None and self.affine and scale.requires_grad:
            scale, shift = w * scale, w * shift
        elif w is not None:  # where they do not train, the supernet holds γ = 1 and β = 0
            name = f"_expanded_to_{self.num_features}"
            scale, shift = once_a_pass(w, name, self._expand), None
        if self.running_mean.is_cuda:
            scale = once(self.running_mean, "_ones", torch.ones_like) if scale is None else scale
            shift = once(self.running_mean, "_zeros", torch.zeros_like) if shift is None else shift
        return scale, shift

    def _expand(self, w):
        # The CPU kernel reads γ as if it were contiguous, whatever its strides say.
        return w.expand(self.num_features).contiguous()


class ReLUConvBN(operations.ReLUConvBN):
    def forward(self, x, w=None):
        _, conv, norm = self.op
        x = once_a_pass(x, "_relu", relu)
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1):
            return norm(pointwise(x, conv.weight), w)
        return norm(conv(x), w)


class SepConv(operations.SepConv):
    def forward(self, x, w=None):
        _, depthwise, point, norm, relu, *second = self.op
        x = separable(once_a_pass(x, "_relu", relu), depthwise, point, norm)
        return separable(relu_(x), *second, w)  # BatchNorm's backward pass needs its input alone


class DilConv(operations.DilConv):
    def forward(self, x, w=None):
        return separable(once_a_pass(x, "_relu", relu), *self.op[1:], w)


class FactorizedReduce(operations.FactorizedReduce):
    def forward(self, x, w=None):
        even, odd = diagonal(once_a_pass(x, "_relu", relu))
        halves = pointwise(even, self.conv_1.weight), pointwise(odd, self.conv_2.weight)
        return self.bn(torch.cat(halves, dim=1), w)


class Normed(operations.Normed):
    def forward(self, x, w=None):
        op, norm = self
        return norm(op(x), w)


class MixedOp(model_search.MixedOp):
    def forward(self, x, op, w):
        layer = self._ops[op]
        return layer(x, w) if isinstance(layer, WEIGHTED) else w * layer(x)


WEIGHTED = (ReLUConvBN, SepConv, DilConv, FactorizedReduce, Normed)
FASTER = {
    nn.BatchNorm2d: BatchNorm2d,
    operations.ReLUConvBN: ReLUConvBN,
    operations.SepConv: SepConv,
    operations.DilConv: DilConv,
    operations.FactorizedReduce: FactorizedReduce,
    operations.Normed: Normed,
    model_search.MixedOp: MixedOp,
}


# ------------------------------------------------------------------------------------------------
# ReLU
# ------------------------------------------------------------------------------------------------
# On a CPU the backward pass writes into the gradient that it is given, which takes 0.4 to 0.7 of
# the time of a new tensor, and 2 % off a two-stage step. That gradient is nobody else's: all the
# convolutions that ask for these ReLUs make theirs anew.


def relu(x):
    return _ReLU.apply(x, F.relu) if x.is_cpu else F.relu(x)


def relu_(x):
    """In place."""
    return _ReLU.apply(x, torch.relu_) if x.is_cpu else torch.relu_(x)


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
    """norm(pointwise(depthwise(x)), w).

    Parameters
    ----------
    x : tensor, (B, C, H, W)
    depthwise : nn.Conv2d
        Of 3×3 or 5×5, groups = C, padded to leave the size as it is or, at stride 2, to halve it;
        dilation 1 or 2; no bias.
    pointwise : nn.Conv2d
        Of 1×1, stride 1; no bias.
    norm : BatchNorm2d
    w : tensor of one number, optional
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
        z, mean, invstd = _batch_norm(y, scale, shift, norm, in_place=few)
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
        if few := y is None:
            between = _depthwise(x, w_depth, stride, dilation)
            y = _pointwise(between, w_point)
        g = _channels_last(g)  # a slice of the gradient of a concatenation, maybe
        g, g_scale, g_shift = _batch_norm_gradients(
            g, y, scale, mean, invstd, ctx.eps, need_norm, in_place=few
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
# BatchNorm
# ------------------------------------------------------------------------------------------------
# In channels-last memory torch's kernels go from pixel to pixel, C numbers at a time: slow where
# these are few, and slower with two threads, which then write to the same cache lines. So a row of
# W pixels is taken for one pixel of W · C channels, whose sums are then added up. At 64×16×32×32,
# on an AMD EPYC, 0.28 and 0.43 ms in place of 0.80 and 0.78 (forward, backward; a copy takes 0.09).

BY_ROWS = 2**18  # numbers, beyond which that makes up for its many small calls


def batch_norm(x, scale, shift, norm):
    """BatchNorm with the statistics of the batch, and scale and shift for its γ and β.

    Parameters
    ----------
    x : tensor, (B, C, H, W)
    scale, shift : tensors, (C,), or None
    norm : nn.BatchNorm2d
        Whose running statistics move.
    """
    if _by_rows(x):
        return _BatchNorm.apply(x, scale, shift, norm)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, scale, shift, True, norm.momentum, norm.eps
    )


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, norm):
        y, mean, invstd = _batch_norm(x, scale, shift, norm)
        ctx.save_for_backward(x, scale, mean, invstd)
        ctx.eps = norm.eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, scale, mean, invstd = ctx.saved_tensors
        return *_batch_norm_gradients(
            _channels_last(g), x, scale, mean, invstd, ctx.eps, ctx.needs_input_grad[1:3]
        ), None


def _by_rows(*tensors):
    return all(
        x.is_cpu and x.dtype == torch.float32 and x.numel() > BY_ROWS
        and x.is_contiguous(memory_format=torch.channels_last) for x in tensors
    )


def _batch_norm(x, scale, shift, norm, in_place=False):
    """Output, mean and 1/√(variance + ε), as torch.native_batch_norm gives them.

    With `in_place` the output may be written over x.
    """
    if not _by_rows(x):
        return torch.native_batch_norm(
            x, scale, shift, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
    B, C, H, W = x.shape
    rows = _rows(x)
    means, variances = torch.batch_norm_update_stats(rows[..., None, None], None, None, 0)
    spread, mean = torch.var_mean(means.view(W, C), 0, correction=0)
    variance = variances.view(W, C).mean(0) + spread
    n = B * H * W
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
    invstd = (variance + norm.eps).rsqrt()
    a = invstd if scale is None else scale * invstd
    b = -mean * a if shift is None else shift - mean * a
    y = x if in_place else torch.empty_like(x)
    torch.addcmul(_row(b, W), rows, _row(a, W), out=_rows(y))
    return y, mean, invstd


def _batch_norm_gradients(g, y, scale, mean, invstd, eps, wanted, in_place=False):
    """Gradients of input, scale and shift, the latter two where `wanted`.

    With x̂ = (y − mean) invstd and n pixels, that of y is
    scale invstd (g − Σg/n − x̂ Σ(g x̂)/n). With `in_place` it may be written over y.
    """
    if not _by_rows(g, y):
        return torch.ops.aten.native_batch_norm_backward(
            g, y, scale, None, None, mean, invstd, True, eps, (True, *wanted)
        )
    B, C, H, W = g.shape
    n = B * H * W
    _, g_scale, g_shift = torch.ops.aten.native_batch_norm_backward(
        _rows(g)[..., None, None], _rows(y)[..., None, None], None, None, None,
        _row(mean, W), _row(invstd, W), True, eps, (False, True, True),
    )
    g_scale, g_shift = g_scale.view(W, C).sum(0), g_shift.view(W, C).sum(0)
    a = invstd if scale is None else scale * invstd
    b = g_scale * invstd * a / -n
    c = g_shift * a / -n - b * mean
    g_y = y if in_place else torch.empty_like(g)
    torch.addcmul(_row(c, W), _rows(y), _row(b, W), out=_rows(g_y)).addcmul_(_rows(g), _row(a, W))
    return g_y, g_scale if wanted[0] else None, g_shift if wanted[1] else None


def _rows(x):
    """The matrix of all rows, (batch · H, W · C)."""
    B, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).view(B * H, W * C)


def _row(v, W):
    """A row of W pixels with the channels v."""
    return v.expand(W, -1).flatten()


# ------------------------------------------------------------------------------------------------
# 1×1 convolutions
# ------------------------------------------------------------------------------------------------


def pointwise(x, weight):
    """1×1 convolution.

    Parameters
    ----------
    x : tensor, (B, C, H, W)
    weight : tensor, (C_out, C, 1, 1)
    """
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


def diagonal(x):
    """x[:, :, ::2, ::2] and x[:, :, 1::2, 1::2]."""
    return _Diagonal.apply(x)


class _Diagonal(torch.autograd.Function):
    """Both gradients go into one tensor."""

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
