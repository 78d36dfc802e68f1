"""What researchers edit is what runs, and a run of edited sources resumes.

Edits of operations are made in this process: the accelerated network computes what the plain one
does. Each other edit is a run of an edited copy of the sources.
"""

import ast
import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from scripts import (
    ONE_STAGE, ROOT, TRAIN, TWO_STAGE, Process, assert_same_run, imagenet_of_digits, rows, saved,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import data
import fast
import model_search
import operations
from genotypes import PRIMITIVES, Genotype
from harness import checkpoints
from model import NetworkCIFAR
from model_search import MixedOp, Network
from operations import DilConv, FactorizedReduce, Normed, ReLUConvBN, SepConv

# ------------------------------------------------------------------------------------------------
# Operations
# ------------------------------------------------------------------------------------------------


def put(place, make):
    """Put a layer, made from the one that is there, at a place of the operation."""
    def change(op):
        op.op[place] = make(op.op[place])
    return change


def with_bias(conv):
    return nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride)


def reflecting(conv):
    return nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, conv.groups, bias=False, padding_mode="reflect",
    )


def without_momentum(op):
    for layer in op.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None


def one_more_layer(op):
    channels = op.op[2].out_channels
    op.op = nn.Sequential(*op.op, nn.Conv2d(channels, channels, 1, bias=False))


def wider_apart(op):
    op.op[1].dilation, op.op[1].padding = (3, 3), (3 * (op.op[1].kernel_size[0] // 2),) * 2


def rising(op):
    """Give each operation a number of its own, which its `repr` does not show."""
    SepConv.made = getattr(SepConv, "made", 0) + 1
    op.gain = 1 + SepConv.made // 2


def seven(patch):
    patch.setattr(model_search, "PRIMITIVES", [*PRIMITIVES, "sep_conv_7x7"])
    patch.setitem(operations.OPS, "sep_conv_7x7",
                  lambda C, stride, affine: SepConv(C, 7, stride, affine))


def in_init(cls, *changes):
    """An edit of `__init__`: changes of the operation that it makes."""
    def edit(patch):
        init = cls.__init__

        def edited(op, *args, **kwargs):
            init(op, *args, **kwargs)
            for change in changes:
                change(op)

        patch.setattr(cls, "__init__", edited)
    return edit


def in_forward(cls, forward):
    """An edit of `forward`, given what it was before."""
    def edit(patch):
        before = cls.forward
        patch.setattr(cls, "forward", lambda op, *args: forward(op, before, *args))
    return edit


def both(*edits):
    return lambda patch: [edit(patch) for edit in edits]


# Each with the classes that the log names.
OPERATIONS = {
    "none": (lambda patch: None, ""),
    "SiLU": (in_init(DilConv, put(0, lambda _: nn.SiLU())), "DilConv"),
    "ReLU6": (in_init(DilConv, put(0, lambda _: nn.ReLU6())), "DilConv"),
    "GELU": (in_init(SepConv, put(4, lambda _: nn.GELU())), "SepConv"),
    "bias": (in_init(ReLUConvBN, put(1, with_bias)), "ReLUConvBN"),
    "padding_mode": (in_init(SepConv, put(1, reflecting)), "SepConv"),
    "GroupNorm": (in_init(DilConv, put(3, lambda norm: nn.GroupNorm(2, norm.num_features))), "DilConv"),
    "BatchNorm without momentum": (in_init(DilConv, without_momentum), "BatchNorm2d DilConv"),
    "one more layer": (in_init(DilConv, one_more_layer), "DilConv"),
    "7×7": (seven, "SepConv"),
    "dilation 3": (in_init(DilConv, wider_apart), "DilConv"),
    "forward of ReLUConvBN": (
        in_forward(ReLUConvBN, lambda op, before, x: before(op, x) + 0.1), "ReLUConvBN"),
    "forward of SepConv": (in_forward(SepConv, lambda op, before, x: op.op[:4](x)), "SepConv"),
    "forward of DilConv": (
        in_forward(DilConv, lambda op, before, x: op.op(x) * (1.5 if op.training else 1)),
        "DilConv"),
    "forward of FactorizedReduce": (
        in_forward(FactorizedReduce, lambda op, before, x: before(op, x.flip(3))),
        "FactorizedReduce"),
    "forward of Normed": (in_forward(Normed, lambda op, before, x: before(op, 2 + x)), "Normed"),
    "forward of MixedOp": (
        in_forward(MixedOp, lambda mixed, before, x, op, w: before(mixed, x, op, w.sigmoid())),
        "MixedOp"),
    "w at most 1": (
        in_forward(MixedOp, lambda mixed, before, x, op, w: before(mixed, x, op, w.clamp(-1, 1))),
        "MixedOp"),
    "a number of its own": (
        both(in_init(SepConv, rising),
             in_forward(SepConv, lambda op, before, x: op.gain * before(op, x))), "SepConv"),
    "hook": (
        in_init(DilConv, lambda op: op.register_forward_hook(lambda op, x, y: 2 * y)), "DilConv"),
    "hook inside": (
        in_init(SepConv, lambda op: op.op[1].register_forward_pre_hook(
            lambda conv, x: (3 * x[0] + 1,))), "SepConv"),
    "hook of the gradient": (
        in_init(FactorizedReduce, lambda op: op.register_full_backward_hook(
            lambda op, g_in, g_out: (2 * g_in[0],))), "FactorizedReduce"),
    "requires_grad": (
        both(*(in_init(cls, lambda op: op.requires_grad_(False))
               for cls in (DilConv, SepConv, FactorizedReduce))), ""),
}


def supernet():
    """A reduction cell that runs every operation, at stride 2 (node 0) and 1 (the others)."""
    n = len(model_search.PRIMITIVES)
    net = Network(4, 10, 1, sparseness=n, proj_dims=n)
    codes = [z.numpy() for z in net.reduce_code.z]
    net.reduce_code.accept(codes, [[(edge, op) for op in range(n)] for edge in (0, 2, 1, 3)])
    for b in net.reduce_code.b:
        nn.init.normal_(b)  # w is of order 1, and of either sign
    return net


def network():
    """The same as a network of `model.py`, whose BatchNorms have γ and β."""
    pairs = [(name, node) for node in (0, 2, 1, 3) for name in model_search.PRIMITIVES]
    return NetworkCIFAR(4, 10, 1, False, Genotype(pairs, range(2, 6), pairs, range(2, 6)), True)


def results(net):
    """Logits, gradients and running statistics, in training and then in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for mode in (True, False):
        x = 3 * torch.randn(6, 3, 12, 12, dtype=torch.float64, generator=generator)
        net.train(mode).zero_grad()
        logits, _ = net(x.contiguous(memory_format=torch.channels_last))
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        statistics = {name: t.clone() for name, t in net.named_buffers() if ".running_" in name}
        found |= {(mode, k): t for k, t in {"": logits, **gradients, **statistics}.items()}
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_computed_is_what_is_written(name, monkeypatch):
    torch.manual_seed(0)
    edit, expected = OPERATIONS[name]
    edit(monkeypatch)
    for make in (supernet, network):
        plain = make().double()
        for norm in plain.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
        log = []
        swapped = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        found, wanted = results(fast.accelerate(swapped, log.append)), results(plain)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (found[key] is None) == (value is None), key
            if value is not None:
                limit = 1e-9 * value.abs().max().clamp(min=1e-3)
                assert (found[key] - value).abs().max() <= limit, key
        assert any(type(m).__module__ == "fast" for m in swapped.modules())
        told = {line.split()[0] for line in log if "runs as it is written" in line}
        assert told == {*expected.split()} - ({"MixedOp"} if make is network else set())


def unabsorbable(patch):
    in_init(DilConv, lambda op: op.op.append(nn.Tanh()))(patch)


@pytest.mark.parametrize(("edit", "reason"), [
    (unabsorbable, "dil_conv_3x3 at stride 1: .* cannot absorb w"),
    (OPERATIONS["GroupNorm"][0], "dil_conv_3x3 at stride 1: .* needs a BatchNorm at its end"),
    (in_forward(FactorizedReduce, lambda op, before, x: before(op, x) ** 2),
     "skip_connect at stride 2: .* cannot absorb w"),
    (OPERATIONS["forward of MixedOp"][0], "max_pool_3x3 at stride 1: .* MixedOp"),
    (OPERATIONS["w at most 1"][0], "MixedOp"),
])
def test_one_stage_search_refuses_what_it_could_not_absorb(edit, reason, monkeypatch):
    Network(4, 10, 3, one_stage=True)
    edit(monkeypatch)
    with pytest.raises(ValueError, match=reason):
        Network(4, 10, 3, one_stage=True)


def test_absorption_answers_for_the_whole_network(monkeypatch):
    OPERATIONS["SiLU"][0](monkeypatch)
    net = Network(4, 10, 3, one_stage=True)
    for b in net.arch_parameters():
        nn.init.normal_(b)
    net.absorb()
    in_forward(model_search.Cell, lambda cell, before, *args: 2 * before(cell, *args))(monkeypatch)
    with pytest.raises(ValueError, match="an edit of Cell or Network"):
        net.absorb()
