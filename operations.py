"""The candidate operations of the DARTS search space.

    op = build("sep_conv_3x3", C=16, stride=1)
    y = op(x)                                   # x, y: (B, C, H, W)
    y = weighted(op, x, w)                      # w · op(x)

Every operation is a module that maps one tensor to another. Its `forward` may have an argument
`pair_weight`, the weight of an (edge, operation) pair, and must then multiply its output by it. The
operations here pass it to their last BatchNorm, where the multiplication costs nothing. Your own
operations do not need this argument. Module and parameter names are those of DARTS, so that its
checkpoints load.
"""

from torch import nn

from layers import BatchNorm2d, Conv2d, ReLU, Sequential, concat, diagonals, weighted


class ReLUConvBN(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = Sequential(
            ReLU(),
            Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x, pair_weight=None):
        return weighted(self.op, x, pair_weight)


class SepConv(nn.Module):
    """Depthwise-separable convolution, applied twice; the first one has the stride."""

    def __init__(self, C, kernel_size, stride, affine=True):
        super().__init__()
        padding = kernel_size // 2
        self.op = Sequential(
            ReLU(),
            Conv2d(C, C, kernel_size, stride, padding, groups=C, bias=False),
            Conv2d(C, C, 1, bias=False),
            BatchNorm2d(C, affine=affine),
            ReLU(),
            Conv2d(C, C, kernel_size, 1, padding, groups=C, bias=False),
            Conv2d(C, C, 1, bias=False),
            BatchNorm2d(C, affine=affine),
        )

    def forward(self, x, pair_weight=None):
        return weighted(self.op, x, pair_weight)


class DilConv(nn.Module):
    """Depthwise-separable convolution with dilation 2."""

    def __init__(self, C, kernel_size, stride, affine=True):
        super().__init__()
        padding = kernel_size - 1
        self.op = Sequential(
            ReLU(),
            Conv2d(C, C, kernel_size, stride, padding, dilation=2, groups=C, bias=False),
            Conv2d(C, C, 1, bias=False),
            BatchNorm2d(C, affine=affine),
        )

    def forward(self, x, pair_weight=None):
        return weighted(self.op, x, pair_weight)


class FactorizedReduce(nn.Module):
    """Halve the resolution: concatenate two 1×1 convolutions of stride 2, one pixel apart."""

    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        self.relu = ReLU()
        self.conv_1 = Conv2d(C_in, C_out // 2, 1, bias=False)
        self.conv_2 = Conv2d(C_in, C_out // 2, 1, bias=False)
        self.bn = BatchNorm2d(C_out, affine=affine)

    def forward(self, x, pair_weight=None):                           # (B, C_in, H, W)
        # `diagonals` applies the stride, so the convolutions have stride 1.
        even, odd = diagonals(self.relu(x))                           # (B, C_in, H/2, W/2)
        x = concat([self.conv_1(even), self.conv_2(odd)])             # (B, C_out, H/2, W/2)
        return weighted(self.bn, x, pair_weight)


# Constructors: channels, stride, and whether BatchNorms have γ and β (affine).
OPS = {
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride, 1),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "skip_connect": lambda C, stride, affine:
        nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, 5, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, 3, stride, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, 5, stride, affine),
}


def build(primitive, C, stride, *, affine=True, norm_pools=False, norm_skips=False):
    """Build an operation of the search space: (B, C, H, W) → (B, C, H/stride, W/stride).

    `affine`: whether BatchNorms have γ and β. `norm_pools`, `norm_skips`: whether to append a
    BatchNorm to pools, and to skips of stride 1.
    """
    op = OPS[primitive](C, stride, affine)
    is_pool, is_identity = "_pool_" in primitive, isinstance(op, nn.Identity)
    if (is_pool and norm_pools) or (is_identity and norm_skips):
        return Sequential(op, BatchNorm2d(C, affine=affine))
    return op


def last_norm(op):
    """Return the last BatchNorm of an operation, or None if it has none."""
    norms = [layer for layer in op.modules() if isinstance(layer, nn.BatchNorm2d)]
    return norms[-1] if norms else None


def drop_path(x, keep):
    """Keep each sample of x with probability `keep` and scale it by 1/keep; set others to zero.

    (Larsson, Maire, Shakhnarovich, FractalNet, ICLR 2017, as used in DARTS.)
    """
    mask = x.new_empty(len(x), 1, 1, 1).bernoulli_(keep)              # (B, 1, 1, 1)
    return x * (mask / keep)
