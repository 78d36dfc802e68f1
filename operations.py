"""The candidate operations of the DARTS search space, and what both networks build from.

Two things are done here once so that no network has to do them again, both exact:

* Most operations begin with a ReLU. A node's tensor travels as a `State`, which computes its
  rectified form once for all the operations that ask for it.
* The sparse supernet multiplies every operation by a weight w. An operation that ends in a
  BatchNorm takes w into it: w (γ x̂ + β) = (wγ) x̂ + wβ, which costs no pass over the tensor.

Module and parameter names are those of DARTS, so that its checkpoints load.
"""

import torch
import torch.nn.functional as F
from torch import nn

from convolutions import batch_norm, concatenate, diagonal, pointwise, separable


class State:
    """A tensor of the network, and its rectified form, computed at most once.

    Parameters
    ----------
    x : tensor, (batch, C, H, W), or None if it is made up of parts
    parts : list of State
        States whose channels one after the other are this one's. They are put together only
        where that is asked for; 1×1 convolutions do without.
    """

    def __init__(self, x, parts=()):
        self._x = x
        self._relu = None
        self._parts = parts

    @property
    def parts(self):
        return self._parts or [self]  # not kept: that would be a cycle, freed late

    @property
    def x(self):
        if self._x is None:
            self._x = concatenate([part.x for part in self._parts])
        return self._x

    @property
    def relu(self):
        if self._relu is None:
            if self._x is None:
                self._relu = concatenate([part.relu for part in self._parts])
            else:
                self._relu = F.relu(self._x)
        return self._relu


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose output can be multiplied by a scalar weight at no cost.

    forward(x, w) returns w (γ x̂ + β), with γ = 1 and β = 0 where the layer has none.
    """

    def forward(self, x, w=None):
        if self.training:
            return batch_norm(x, self, w)
        return F.batch_norm(
            x, self.running_mean, self.running_var, *self.scale_and_shift(w), eps=self.eps
        )

    def scale_and_shift(self, w=None):
        """(wγ, wβ), or None for what is 1 and 0."""
        if w is None:
            return self.weight, self.bias
        if self.affine:
            return w * self.weight, w * self.bias
        # The CPU kernel reads γ as if it were contiguous, whatever its strides say.
        return w.expand(self.num_features).contiguous(), None


class Operation(nn.Module):
    """An operation of the search space: op(state) = norm(body(state)), or w·op(state).

    Subclasses give `body(state)`, all but the last BatchNorm, and `norm`, that BatchNorm or None.
    `is_identity`: the output is the input tensor itself, neither copied nor normalised.
    """

    is_identity = False

    def forward(self, state, w=None):
        y = self.body(state)
        if self.norm is not None:
            return self.norm(y, w)
        return y if w is None else w * y


class Stack(Operation):
    """Layers in `op`, of which the first is the shared ReLU and the last a BatchNorm."""

    def __init__(self, *layers):
        super().__init__()
        self.op = nn.Sequential(nn.ReLU(), *layers)

    @property
    def norm(self):
        return self.op[-1]

    def body(self, state):
        x = state.relu
        for layer in list(self.op)[1:-1]:
            x = layer(x)
        return x


class ReLUConvBN(Stack):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__(
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            BatchNorm2d(C_out, affine=affine),
        )

    def body(self, state):
        conv = self.op[1]
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1):
            return pointwise([part.relu for part in state.parts], conv.weight)
        return super().body(state)


class SepConv(Stack):
    """Depthwise-separable convolution, applied twice; the first has the stride."""

    def __init__(self, C, kernel_size, stride, affine=True):
        padding = kernel_size // 2
        super().__init__(
            nn.Conv2d(C, C, kernel_size, stride, padding, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False),
            BatchNorm2d(C, affine=affine),
            nn.ReLU(inplace=True),  # BatchNorm's backward needs its input, not its output
            nn.Conv2d(C, C, kernel_size, 1, padding, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False),
            BatchNorm2d(C, affine=affine),
        )

    def forward(self, state, w=None):
        x = separable(state.relu, *self.op[1:4])
        return separable(self.op[4](x), *self.op[5:8], w)


class DilConv(Stack):
    """Depthwise-separable convolution with dilation 2."""

    def __init__(self, C, kernel_size, stride, affine=True):
        super().__init__(
            nn.Conv2d(C, C, kernel_size, stride, kernel_size - 1, dilation=2, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False),
            BatchNorm2d(C, affine=affine),
        )

    def forward(self, state, w=None):
        return separable(state.relu, *self.op[1:4], w)


class FactorizedReduce(Operation):
    """Halves the resolution: two 1×1 convolutions of stride 2, one pixel apart, side by side."""

    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = BatchNorm2d(C_out, affine=affine)

    @property
    def norm(self):
        return self.bn

    def body(self, state):
        even, odd = zip(*[diagonal(part.relu) for part in state.parts], strict=True)
        halves = pointwise(even, self.conv_1.weight), pointwise(odd, self.conv_2.weight)
        return torch.cat(halves, dim=1)


class Plain(nn.Sequential, Operation):
    """A pool or an identity, followed by an appended BatchNorm where there is one."""

    def __init__(self, op, norm=None):
        super().__init__(op, *([norm] if norm is not None else []))

    forward = Operation.forward

    @property
    def norm(self):
        return self[1] if len(self) == 2 else None

    def body(self, state):
        return self[0](state.x)

    @property
    def is_identity(self):
        return isinstance(self[0], nn.Identity) and self.norm is None


def build(primitive, C, stride, *, affine=True, norm_pools=False, norm_skips=False):
    """Build an operation of the search space.

    Parameters
    ----------
    primitive : str
        One of `genotypes.PRIMITIVES`.
    C : int
        Channels of input and output.
    stride : {1, 2}
    affine : bool
        Whether its BatchNorm layers have γ and β.
    norm_pools, norm_skips : bool
        Whether a BatchNorm is appended to pools, and to skips of stride 1.

    Returns
    -------
    Operation
        Takes a `State`, and a weight for its output if wanted.
    """

    def appended(wanted):
        return BatchNorm2d(C, affine=affine) if wanted else None

    match primitive:
        case "max_pool_3x3":
            return Plain(nn.MaxPool2d(3, stride, padding=1), appended(norm_pools))
        case "avg_pool_3x3":
            pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
            return Plain(pool, appended(norm_pools))
        case "skip_connect" if stride == 1:
            return Plain(nn.Identity(), appended(norm_skips))
        case "skip_connect":
            return FactorizedReduce(C, C, affine)
        case "sep_conv_3x3":
            return SepConv(C, 3, stride, affine)
        case "sep_conv_5x5":
            return SepConv(C, 5, stride, affine)
        case "dil_conv_3x3":
            return DilConv(C, 3, stride, affine)
        case "dil_conv_5x5":
            return DilConv(C, 5, stride, affine)
    raise KeyError(primitive)


def drop_path(x, drop_prob):
    """Drop whole samples of x (batch, C, H, W) with `drop_prob` and rescale the rest by 1/keep."""
    keep = 1.0 - drop_prob
    mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)
    return x * (mask / keep)
