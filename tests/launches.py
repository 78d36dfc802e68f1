"""Count launches and host synchronizations of a step at the published size, and of a recovery.

Run as a script by a null GPU without values, it prints as JSON for each kind: launches, host
synchronizations, peak memory in GiB, and the operators that get a tensor that is not dense in
channels-last.
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import nullgpu
except ImportError:  # only a null GPU provides it
    nullgpu = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genotypes
import model
import search
import train
import utils
from genotypes import PRIMITIVES, by_node
from model_search import Network

KINDS = {
    "two-stage": (search, [], genotypes.ISTA_twostage),
    "one-stage": (search, ["--one_stage"], genotypes.ISTA_onestage),
    "retraining": (train, ["--arch", "ISTA_twostage"], genotypes.ISTA_twostage),
}


def prepare(kind, *flags):
    """Return the flags of a script, and a network with the support of a published cell."""
    script, own_flags, genotype = KINDS[kind]
    args = script.get_args_parser().parse_args([*own_flags, *flags])
    shape = args.init_channels, 10, args.layers
    if script is train:
        return args, model.NetworkCIFAR(*shape, args.auxiliary, genotype)
    net = Network(*shape, one_stage=args.one_stage, auxiliary=args.auxiliary)
    for code, pairs in zip(net.codes, (genotype.normal, genotype.reduce), strict=True):
        support = [[(edge, PRIMITIVES.index(op)) for op, edge in node] for node in by_node(pairs)]
        code.accept([z.numpy() for z in code.z], support)
    return args, net


def take_epoch(args, net, batches):
    """Run an epoch without CUDA graphs."""
    progress = SimpleNamespace(step=lambda meter: None)
    run = SimpleNamespace(args=args, progress=progress, warn=None)
    if isinstance(net, model.NetworkCIFAR):
        optimizer = utils.sgd(net.parameters(), args)
        return train.train_epoch(net, batches, optimizer, run)
    optimizers = search.optimizers(net, args)
    if args.one_stage:
        return search.one_stage_epoch(net, batches, *optimizers, run)
    return search.two_stage_epoch(net, batches, batches, *optimizers, run)


class Recorded(list):
    """Five equal batches; the step on the fourth is recorded, the fifth checks memory formats."""

    def __iter__(self):
        yield from itertools.repeat(self[0], 3)  # the first steps create momenta and caches
        torch.cuda.reset_peak_memory_stats()
        with nullgpu.record() as self.record:
            yield self[0]
        self.peak = torch.cuda.max_memory_allocated() / 2**30
        with Formats() as self.formats:
            yield self[0]

    def endless(self):
        return itertools.repeat(self[0])


class Formats(TorchDispatchMode):
    """Record convolutions and BatchNorms that get a large tensor not dense in channels-last."""

    def __init__(self):
        super().__init__()
        self.count, self.strided = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name() or "batch_norm" in func.name():
            large = [x for x in args if isinstance(x, torch.Tensor) and x.ndim == 4
                     and x.numel() > 100_000]
            self.count += 1
            if not all(x.is_contiguous(memory_format=torch.channels_last) for x in large):
                self.strided.append(func.name())
        return func(*args, **(kwargs or {}))


def record_step(kind, amp, layout):
    """Return launches, host synchronizations, GiB and operators with strided inputs of a step."""
    args, net = prepare(kind, *["--amp"] * amp)
    device = torch.device("cuda", 0)
    with nullgpu.Shadow():  # keeps values, because the codes are read from the device once
        net = net.to(device, memory_format=layout)
        net.graph_key()
    x = torch.zeros(args.batch_size, 3, 32, 32).to(device, memory_format=layout)
    batches = Recorded([(x, torch.zeros(len(x), dtype=torch.int64).to(device))])
    take_epoch(args, net, batches)
    assert batches.formats.count > 500
    return (len(batches.record.launches), len(batches.record.waits), batches.peak,
            batches.formats.strided)


def main():
    device, counts = utils.choose_device("cuda"), {}
    utils.Meter.read = lambda meter: (0.0, 0.0)  # there are no values
    for kind, amp in itertools.product(KINDS, (False, True)):
        name = f"{kind}, bfloat16" if amp else kind
        layout = utils.memory_format(device, amp, two_stage=kind == "two-stage")
        counts[name] = record_step(kind, amp, layout)
        if layout != torch.channels_last:
            counts[f"{name}, channels-last"] = record_step(kind, amp, torch.channels_last)

    with nullgpu.Shadow():  # a recovery depends on values
        for kind in ("two-stage", "one-stage"):
            args, net = prepare(kind, "--init_channels", "2", "--layers", "3")
            net.to(device)
            net.recover()
            # b has not changed since, so all nodes freeze in one-stage search.
            limits = (args.freeze_tol, args.max_params) if args.one_stage else ()
            with nullgpu.record() as record:
                net.recover(args.solver, *limits)
            syncs = [entry for entry in record.waits if entry.name == "cudaStreamSynchronize"]
            counts[f"recovery of {kind}"] = len(record.launches), len(syncs), 0.0, []
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
