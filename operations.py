"""The candidate operations of the DARTS search space.

    op = build("sep_conv_3x3", C=16, stride=1)
    y = op(x)                                   # x, y: (B, C, H, W)

Every operation is a plain module, tensor in, tensor out; paste in your own. Module and parameter
names are those of DARTS, so that its checkpoints load.
"""

import torch
from torch import nn


class ReLUConvBN(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class SepConv(nn.Module):
    """Depthwise-separable convolution, applied twice; the first has the stride."""

    def __init__(self, C, kernel_size, stride, affine=True):
        super().__init__()
        padding = kernel_size // 2
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C, C, kernel_size, stride, padding, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False),
            nn.BatchNorm2d(C, affine=affine),
            nn.ReLU(),
            nn.Conv2d(C, C, kernel_size, 1, padding, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False),
            nn.BatchNorm2d(C, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class DilConv(nn.Module):
    """Depthwise-separable convolution with dilation 2."""

    def __init__(self, C, kernel_size, stride, affine=True):
        super().__init__()
        padding = kernel_size - 1
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C, C, kernel_size, stride, padding, dilation=2, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False),
            nn.BatchNorm2d(C, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halves the resolution: two 1×1 convolutions of stride 2, one pixel apart, side by side."""

    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):                                             # (B, C_in, H, W)
        x = self.relu(x)
        x = torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)
        return self.bn(x)                                             # (B, C_out, H/2, W/2)


class Concat(nn.Module):
    """Concatenation of nodes, the output of a cell."""

    def forward(self, nodes):                                         # each (B, C, H, W)
        return torch.cat(nodes, dim=1)                                # (B, len(nodes)·C, H, W)


class Normed(nn.Sequential):
    """An operation and the BatchNorm that is appended to it."""


# Each takes the channels, the stride and whether its BatchNorms have γ and β.
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

    `affine`: whether its BatchNorms have γ and β. `norm_pools`, `norm_skips`: whether a BatchNorm
    is appended to pools, and to skips of stride 1.
    """
    op = OPS[primitive](C, stride, affine)
    is_pool, is_identity = "_pool_" in primitive, isinstance(op, nn.Identity)
    if (is_pool and norm_pools) or (is_identity and norm_skips):
        return Normed(op, nn.BatchNorm2d(C, affine=affine))
    return op


def last_norm(op):
    """The BatchNorm that an operation ends in: the last of its layers of that kind, or None."""
    norms = [layer for layer in op.modules() if isinstance(layer, nn.BatchNorm2d)]
    return norms[-1] if norms else None


def drop_path(x, keep):
    """Keep each sample of x (B, C, H, W) with probability `keep`, rescaled by 1/keep; drop others.

    Source: Larsson, Maire, Shakhnarovich, FractalNet, ICLR 2017; as DARTS uses it.
    """
    mask = x.new_empty(len(x), 1, 1, 1).bernoulli_(keep)              # (B, 1, 1, 1)
    return x * (mask / keep)
