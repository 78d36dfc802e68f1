"""Drop-in replacements for torch.nn layers, with faster backward passes.

    from layers import BatchNorm2d, Conv2d, ReLU, Sequential, concat, weighted

Each layer is a subclass of torch's layer with the same parameters, and computes the same values up
to rounding. Its `forward` checks its attributes and its input. If no faster path applies, it calls
`super().forward`. The faster paths are:

* `BatchNorm2d` multiplies γ and β by the weight w of an (edge, operation) pair, because
  w (γ x̂ + β) = (wγ) x̂ + wβ. This needs no pass over the tensor. On CUDA in channels-last it uses
  torch's kernels, because cuDNN's run only one block of threads per channel.
* `Conv2d` computes the gradients of 1×1 and of depthwise convolutions on a CPU with kernels that
  oneDNN has. Without a oneDNN kernel, torch falls back to code that is up to 30 times slower.
* `ReLU` is computed once for all layers that read the same tensor.
* `concat` and `diagonals` return dense gradients. Kernels that read strided gradients copy them or
  fall back to another memory format.

Inside of `plain()`, and while torch compiles or exports a network, all of them compute exactly as
torch.nn does.
"""

import contextlib
import functools
import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import TensorWeakRef

_plain = False


@contextlib.contextmanager
def plain():
    """Compute every layer as torch.nn does, as a reference for tests and benchmarks."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain():
    """Whether layers must compute as torch.nn does."""
    # Layers check this first, because some of their other checks break the graph of torch.compile.
    return torch.compiler.is_compiling() or _plain or torch._C._are_functorch_transforms_active()


# ------------------------------------------------------------------------------------------------
# The weight of an (edge, operation) pair
# ------------------------------------------------------------------------------------------------


def weighted(layer, x, pair_weight):
    """Compute pair_weight · layer(x), or layer(x) if pair_weight is None.

    If the `forward` of the layer has an argument `pair_weight`, the layer does the multiplication.
    """
    if pair_weight is None:
        return layer(x)
    # Hooks must see the output without the weight, as with torch's layers.
    if is_plain() or has_hooks(layer) or not takes_pair_weight(layer):
        return pair_weight * layer(x)
    return layer(x, pair_weight=pair_weight)


def takes_pair_weight(layer):
    """Whether the `forward` of a layer has an argument `pair_weight`."""
    # Look at the function itself, because users may replace the `forward` of a class or instance.
    return _has_pair_weight(getattr(layer.forward, "__func__", layer.forward))


@functools.cache
def _has_pair_weight(function):
    return "pair_weight" in inspect.signature(function).parameters


def has_hooks(layer):
    """Whether forward or backward hooks are registered, for this layer or globally."""
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks
        or layer._backward_hooks or layer._backward_pre_hooks or _has_any_global_hook()
    )


class Sequential(nn.Sequential):
    """Sequential that passes `pair_weight` to its last layer."""

    def forward(self, x, pair_weight=None):
        *first, last = self._modules.values()
        for layer in first:
            x = layer(x)
        return weighted(last, x, pair_weight)


# ------------------------------------------------------------------------------------------------
# BatchNorm
# ------------------------------------------------------------------------------------------------


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that multiplies γ and β by `pair_weight`.

    It counts batches only if its momentum is None, because the count has no effect otherwise.
    """

    def forward(self, x, pair_weight=None):                           # (B, C, H, W)
        if self.momentum is None or self.running_mean is None:
            return _multiply(super().forward(x), pair_weight)
        if is_plain():
            return _multiply(self._batch_norm(x, self.weight, self.bias), pair_weight)
        scale, shift = self._scale_and_shift(x, pair_weight)          # (C,), (C,)
        if x.is_cuda and self.training and _memory_format(x) == torch.channels_last:
            F._verify_batch_size(x.shape)
            return torch.native_batch_norm(
                x, scale, shift, self.running_mean, self.running_var, True, self.momentum, self.eps
            )[0]
        return self._batch_norm(x, scale, shift)

    def _batch_norm(self, x, scale, shift):
        return F.batch_norm(
            x, self.running_mean, self.running_var, scale, shift, self.training, self.momentum,
            self.eps,
        )

    def _scale_and_shift(self, x, pair_weight):
        """Return wγ and wβ; None means all ones or all zeros."""
        scale, shift = self.weight, self.bias
        if pair_weight is not None and self.affine:
            scale, shift = _ScaleShift.apply(pair_weight, scale, shift)
        elif pair_weight is not None:
            # The CPU kernel ignores the strides of γ, so it has to be contiguous.
            scale = pair_weight.expand(self.num_features).contiguous()
        if x.is_cuda:
            # With both γ and β, torch runs one kernel of cuDNN in NCHW instead of three of its own.
            dtype = self.running_mean.dtype
            if scale is None:
                scale = _constant(1, self.num_features, dtype, x.device)
            if shift is None:
                shift = _constant(0, self.num_features, dtype, x.device)
        return scale, shift


def _multiply(y, pair_weight):
    return y if pair_weight is None else pair_weight * y


class _ScaleShift(torch.autograd.Function):
    """Compute wγ and wβ, with half the kernel launches of two products."""

    @staticmethod
    def forward(ctx, w, scale, shift):
        ctx.save_for_backward(w, scale, shift)
        return tuple(torch._foreach_mul([scale, shift], w))

    @staticmethod
    def backward(ctx, g_wscale, g_wshift):
        w, scale, shift = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives, which _foreach_mul lacks
            g_w = (g_wscale * scale + g_wshift * shift).sum()
            return g_w, g_wscale * w, g_wshift * w
        g_w = g_scale = g_shift = None
        if ctx.needs_input_grad[0]:
            g_w = torch.cat(torch._foreach_mul([g_wscale, g_wshift], [scale, shift])).sum()
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            g_scale, g_shift = torch._foreach_mul([g_wscale, g_wshift], w)
        return g_w, g_scale, g_shift


@functools.cache
@torch.inference_mode(False)  # autograd cannot save inference tensors
def _constant(value, n, dtype, device):
    return torch.full((n,), value, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------
# ReLU
# ------------------------------------------------------------------------------------------------


class ReLU(nn.ReLU):
    """ReLU that is computed once for all layers that read the same tensor.

    The output is cached as an attribute of the input. On an Intel Xeon this reduces the time of a
    two-stage step by 9 % and its memory by 12 %.
    """

    def forward(self, x):
        if is_plain() or self.inplace or has_hooks(self) or x.is_inference():
            return super().forward(x)
        # With hooks on saved tensors, as in activation checkpointing, each layer must save its own.
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return super().forward(x)
        # The cache is valid as long as neither the input nor the output is written to.
        state = x._version, x.requires_grad, torch.is_grad_enabled()
        cached = getattr(x, "_relu", None)
        if cached is not None:
            cached_state, y, y_version = cached
            if cached_state == state and y._version == y_version:
                return y
        y = super().forward(x)
        x._relu = state, y, y._version
        if y.grad_fn is not None:  # a backward pass frees the graph of y
            y.grad_fn.register_hook(functools.partial(_clear_relu_cache, TensorWeakRef(x)))
        return y


def _clear_relu_cache(weak_reference, *_):
    x = weak_reference()
    if x is not None:
        x._relu = None


# ------------------------------------------------------------------------------------------------
# Concatenation, and the inputs of FactorizedReduce
# ------------------------------------------------------------------------------------------------


def concat(tensors):
    """Concatenate tensors (B, C_i, H, W) along their channels."""
    return torch.cat(tensors, dim=1) if is_plain() else _Concat.apply(*tensors)


class _Concat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        y = torch.cat(tensors, dim=1)
        ctx.channels, ctx.format = [x.shape[1] for x in tensors], _memory_format(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return tuple(part.contiguous(memory_format=ctx.format) for part in g.split(ctx.channels, 1))


def diagonals(x):
    """Return the pixels with even and with odd coordinates: x[:, :, ::2, ::2], x[:, :, 1::2, 1::2].

    These are the inputs of the two 1×1 convolutions of stride 2 in a FactorizedReduce.
    """
    return (x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]) if is_plain() else _Diagonals.apply(x)


class _Diagonals(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape, ctx.format = x.shape, _memory_format(x)
        return tuple(x[:, :, i::2, i::2].contiguous(memory_format=ctx.format) for i in (0, 1))

    @staticmethod
    def backward(ctx, g_even, g_odd):
        # Write both gradients into one tensor in the memory format of x.
        g = torch.empty(
            ctx.shape, dtype=g_even.dtype, device=g_even.device, memory_format=ctx.format
        ).zero_()
        g[:, :, ::2, ::2] = g_even
        g[:, :, 1::2, 1::2] = g_odd
        return g


def _memory_format(x):
    """Return the memory format for outputs and gradients: on a CPU, always channels-last."""
    is_nchw = x.is_cuda and x.is_contiguous()
    return torch.contiguous_format if is_nchw else torch.channels_last


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# Convolutions
# ------------------------------------------------------------------------------------------------


class Conv2d(nn.Conv2d):
    """Convolution with faster gradients on a CPU if it is 1×1 or depthwise."""

    cast_weight = None  # weight in bfloat16, set by `speedups.autocast` during a forward pass

    def forward(self, x):                                             # (B, C, H, W)
        if is_plain():
            return super().forward(x)
        if self.cast_weight is not None:
            return self._conv_forward(x, self.cast_weight, self.bias)
        if x.is_cpu and torch.is_autocast_enabled("cpu") and self.dilation != (1, 1):
            # torch computes wrong weight gradients here, in bfloat16 with dilation (seen in 2.14).
            with torch.autocast("cpu", enabled=False):
                return self.forward(x.to(self.weight.dtype))
        if self._has_fast_gradients(x):
            if self._is_pointwise():
                return _Pointwise.apply(x, self.weight)
            if self._is_depthwise():
                return _Depthwise.apply(x, self.weight, self.stride[0], self.dilation[0])
        return super().forward(x)

    def _has_fast_gradients(self, x):
        """Whether the fast gradients support this input and the options of this layer."""
        return (
            x.is_cpu and x.ndim == 4 and type(x) is torch.Tensor
            and x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and self.bias is None and self.padding_mode == "zeros"
        )

    def _is_pointwise(self):
        return (
            self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
            and self.groups == 1
        )

    def _is_depthwise(self):
        size, dilation = self.kernel_size[0], self.dilation[0]
        padding = dilation * (size // 2)
        return (
            self.groups == self.in_channels == self.out_channels
            and self.kernel_size in ((3, 3), (5, 5)) and self.stride in ((1, 1), (2, 2))
            and self.dilation in ((1, 1), (2, 2)) and self.padding == (padding, padding)
        )


def _convolution_gradients(
    g, x, weight, wanted, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups
):
    """Return torch's gradients of input and weight, or None where `wanted` is False.

    They can be differentiated again.
    """
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False)
    )[:2]


# ------------------------------------------------------------------------------------------------
# 1×1 convolutions
# ------------------------------------------------------------------------------------------------


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):                                      # (B, C, H, W), (D, C, 1, 1)
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return _pointwise(x, weight)                                  # (B, D, H, W)

    @staticmethod
    def backward(ctx, g):
        weight, x = ctx.saved_tensors
        g_x = g_weight = None
        if torch.is_grad_enabled():  # for second derivatives
            if x is None:
                return F.conv2d(g, weight.transpose(0, 1)), None
            return _convolution_gradients(g, x, weight, ctx.needs_input_grad, groups=1)
        g = _channels_last(g)
        if ctx.needs_input_grad[0]:
            g_x = _pointwise(g, weight.transpose(0, 1))
        if ctx.needs_input_grad[1]:
            g_weight = _pointwise_weight_gradient(g, x, weight)
        return g_x, g_weight


def _is_intel():
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


# MKL's product of narrow matrices takes as long as oneDNN's convolution on an Intel Xeon, and 1.7
# to 2.7 times as long on an AMD EPYC. There, oneDNN makes a two-stage step 19 % faster, and a
# retraining step 18 %.
USE_ONEDNN = torch.backends.mkldnn.is_available() and not _is_intel()


def _pointwise(x, weight):
    if USE_ONEDNN and x.dtype == torch.float32:
        # F.conv2d does not choose oneDNN for batches below 16.
        return torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 1)
    B, _, H, W = x.shape
    y = torch.empty((B, len(weight), H, W), dtype=x.dtype, memory_format=torch.channels_last)
    torch.mm(_pixels(x), weight.flatten(1).T, out=_pixels(y))
    return y


def _pointwise_weight_gradient(g, x, weight):
    if USE_ONEDNN and x.dtype == torch.float32 and len(x) >= 16:
        return _convolution_gradients(g, x, weight, (False, True), groups=1)[1]
    return (_pixels(g).T @ _pixels(x)).view_as(weight)


def _pixels(x):
    """View images as a matrix with one pixel in each row, (B·H·W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


# ------------------------------------------------------------------------------------------------
# Depthwise convolutions
# ------------------------------------------------------------------------------------------------
# The kernel is 3×3 or 5×5 with dilation 1 or 2. With the padding, stride 1 keeps the size of images
# and stride 2 halves it.


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, dilation):                    # (B, C, H, W), (C, 1, k, k)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return _depthwise(x, weight, stride, dilation)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        stride, dilation = ctx.stride, ctx.dilation
        g_x = g_weight = None
        if torch.is_grad_enabled():  # for second derivatives
            padding = dilation * (weight.shape[3] // 2)
            g_x, g_weight = _convolution_gradients(
                g, x, weight, ctx.needs_input_grad[:2], stride=(stride, stride),
                padding=(padding, padding), dilation=(dilation, dilation), groups=len(weight),
            )
            return g_x, g_weight, None, None
        g = _channels_last(g)
        if ctx.needs_input_grad[0]:
            g_x = _depthwise_input_gradient(g, x, weight, stride, dilation)
        if ctx.needs_input_grad[1]:
            g_weight = _depthwise_weight_gradient(g, x, weight, stride, dilation)
        return g_x, g_weight, None, None


def _depthwise(x, weight, stride, dilation):
    padding = dilation * (weight.shape[3] // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=len(weight))


def _depthwise_input_gradient(g, x, weight, stride, dilation):
    if stride == 1:  # a convolution with the flipped weight, faster than torch's gradient
        return _depthwise(g, weight.flip(2, 3), 1, dilation)
    if dilation == 1:
        padding = weight.shape[3] // 2
        return _convolution_gradients(
            g, x, weight, (True, False), stride=(stride, stride), padding=(padding, padding),
            groups=len(weight),
        )[0]
    # Stride 2 with dilation 2 reads only even rows and columns. On the image x[:, :, ::2, ::2] this
    # is a convolution of stride 1 without dilation. All other pixels have gradient 0.
    g_x = torch.zeros_like(x)
    x = _channels_last(x[:, :, ::2, ::2])
    g_x[:, :, ::2, ::2] = _depthwise_input_gradient(g, x, weight, 1, 1)
    return g_x


# oneDNN has fast weight gradients only for undilated kernels with up to 3 columns; for all others
# torch's code is up to 12 times slower. So compute 3 kernel columns at a time: -s, 0 and s. To do
# so, fold s neighboring pixels of a row into the channels, (B, C, H, W) → (B, s·C, H, W/s). Kernel
# columns that were s pixels apart are then adjacent. For a 5×5 kernel, s = 1 gives its columns 1 to
# 3, and s = 2 its columns 0, 2 and 4.


def _depthwise_weight_gradient(g, x, weight, stride, dilation):
    size = weight.shape[3]
    if stride == 2 and dilation == 2:  # as in _depthwise_input_gradient
        x, stride, dilation = _channels_last(x[:, :, ::2, ::2]), 1, 1
    if size == 3 and dilation == 1:
        return _convolution_gradients(
            g, x, weight, (False, True), stride=(stride, stride), padding=(1, 1),
            groups=len(weight),
        )[1]
    if stride == 2:  # 5×5, undilated
        # With pairs of neighboring pixels viewed as one (s = 2), the stride along rows is 1. Even
        # pixels meet the columns -2, 0 and 2 of the kernel; odd ones meet -1, 1 and 3 (not used).
        g = _channels_last(torch.cat([g, g], dim=1))
        even, odd = _three_columns(g, x, rows=5, dilation=1, spacing=2, stride=(2, 1))
        columns = even[..., 0], odd[..., 0], even[..., 1], odd[..., 1], even[..., 2]
        return torch.stack(columns, dim=3)
    inner = _three_columns(g, x, size, dilation, spacing=dilation).sum(0)
    if size == 3:
        return inner
    outer = _three_columns(g, x, size, dilation, spacing=2 * dilation).sum(0)
    return torch.cat([outer[..., :1], inner, outer[..., 2:]], dim=3)


def _three_columns(g, x, rows, dilation, spacing, stride=(1, 1)):
    """Return weight gradients at columns -spacing, 0 and spacing: (spacing, C, 1, rows, 3).

    Entry i holds the part of the gradient from image columns i, i + spacing, i + 2 spacing, ...
    With stride (1, 1), the gradient is the sum of all entries.
    """
    channels = x.shape[1]
    height = dilation * (rows - 1) + 1  # of an undilated kernel that contains all rows
    if stride == (1, 1):
        g = _pixels_as_channels(g, spacing, height)
        x = _pixels_as_channels(x, spacing, height)
    else:
        x = _pixels_as_channels(x, spacing, 1)
    weight = x.new_empty(spacing * channels, 1, height, 3)
    gradient = _convolution_gradients(
        g, x, weight, (False, True), stride=stride, padding=(height // 2, 1), groups=len(weight)
    )[1]
    return gradient.unflatten(0, (spacing, channels))[:, :, :, ::dilation]


def _pixels_as_channels(x, spacing, height):
    """View `spacing` pixels of a row as one: (B, spacing·C, H, W/spacing)."""
    B, C, H, W = x.shape
    pad_columns = -W % spacing
    pad_rows = max(height + 1 - H, 0)  # oneDNN is only fast if images are higher than the kernel
    if pad_rows or pad_columns:
        x = F.pad(x, (0, pad_columns, 0, pad_rows))
    x = x.permute(0, 2, 3, 1).reshape(B, H + pad_rows, -1, spacing * C)
    return x.permute(0, 3, 1, 2)
