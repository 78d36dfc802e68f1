"""Search with first-order DARTS or PC-DARTS, on the layers and the data of this project.

    python experiments/darts.py --save runs/darts                             # setting of DARTS
    python experiments/darts.py --save runs/pc-darts --partial 4 --warm_up 15 \\
        --batch_size 256 --learning_rate 0.1 --arch_learning_rate 6e-4        # setting of PC-DARTS
    python experiments/nasbench301.py --model M.onnx --encoding E.json runs/darts

This is the baseline for searches by sparse coding, with the same data and the same number of steps.
Every edge runs all 7 operations (our space lacks DARTS' operation `none`), weighted by a softmax
over α. Each step first updates α, by Adam on a batch of one half of the training images, then the
weights, by SGD on a batch of the other half. Each node keeps the 2 edges whose best operation has
the largest weight. With `--partial K`, the operations of an edge process 1/K of its channels, the
other channels bypass them, and a softmax over β weights the edges of a node.

The folder gets metrics.jsonl, genotypes.jsonl and genotype.json, as from search.py. The same
command resumes an interrupted search.

Sources: Liu, Simonyan, Yang, DARTS, ICLR 2019; Xu et al., PC-DARTS, ICLR 2020.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data
import genotypes
import utils
from genotypes import NODES, PRIMITIVES, Genotype
from harness import checkpoints, flags, speedups
from layers import concat
from model import Skeleton, preprocess
from model_search import MixedOp
from utils import UserError

INPUTS = range(2, 2 + NODES)  # number of possible inputs of each node: 2, 3, 4, 5
EDGES = sum(INPUTS)  # 14
RESUME_OVERRIDES = {"save", "device", "data", "typed"}  # may change when a search is resumed


def get_args_parser():
    parser = flags.Parser("darts.py", __doc__, check=check)
    parser.usage = "darts.py --save DIR [flags]"
    nonempty, integer, number = flags.nonempty, flags.integer, flags.number
    for flag, type_, default, metavar, help in (
        ("save", nonempty, None, "DIR", "folder of the search"),
        ("device", nonempty, None, "NAME", "cuda, cpu, ... (default: cuda if there is one)"),
        ("data", nonempty, "data", "DIR", "folder of the data set"),
        ("image_size", integer(4), 32, "PIXELS", "width and height that images are resized to"),
        ("seed", integer(0), 2, "N", "seed of all random numbers"),
        ("init_channels", integer(1), 16, "C", "channels of the first cells"),
        ("layers", integer(3), 8, "CELLS", "number of cells"),
        ("partial", integer(1), 1, "K", "operations process 1/K of the channels; PC-DARTS: 4"),
        ("epochs", integer(1), 50, "N", "number of epochs"),
        ("warm_up", integer(0), 0, "N", "first epochs, in which α and β are fixed; PC-DARTS: 15"),
        ("batch_size", integer(2), 64, "IMAGES", "images in each of the two batches of a step"),
        ("learning_rate", number(1e-3), 0.025, "LR", "of the weights; falls to 0.001 by cosine"),
        ("arch_learning_rate", number(0), 3e-4, "LR", "of α and β"),
    ):
        parser.add_argument(f"--{flag}", type=type_, default=default, metavar=metavar, help=help,
                            required=flag == "save")
    parser.add_argument("--dataset", default="cifar10", choices=[*data.DATASETS], metavar="NAME",
                        help=f"one of {', '.join(data.DATASETS)}")
    parser.show_defaults({})
    return parser


def check(args):
    if args.init_channels % args.partial:
        raise UserError(f"--init_channels {args.init_channels} is not a multiple of --partial "
                        f"{args.partial}")


class Edge(nn.Module):
    """All operations of an edge: Σ_k w_k · op_k(x) on the first 1/partial of the channels."""

    def __init__(self, C, stride, partial):
        super().__init__()
        self.partial = partial
        self.mixed = MixedOp(C // partial, stride, one_stage=False)
        self.bypass = nn.MaxPool2d(2, 2) if stride == 2 else nn.Identity()

    def forward(self, x, weights):                                    # (B, C, H, W), 7 numbers
        channels = x.shape[1] // self.partial
        part, rest = x[:, :channels], x[:, channels:]
        outputs = [self.mixed(part, k, w) for k, w in enumerate(weights)]
        y = sum(outputs[1:], outputs[0])
        if self.partial == 1:
            return y
        y = torch.cat([y, self.bypass(rest)], dim=1)
        # Shuffle the channels, so that the operations of the next cell process other channels.
        return y.unflatten(1, (self.partial, -1)).transpose(1, 2).flatten(1, 2)


class Cell(nn.Module):
    """A cell that runs all of its edges."""

    def __init__(self, C_prev_prev, C_prev, C, reduction, reduction_prev, partial):
        super().__init__()
        self.reduction = reduction
        self.C_out = NODES * C
        self.preprocess0, self.preprocess1 = preprocess(
            C_prev_prev, C_prev, C, reduction_prev, affine=False)
        self.edges = nn.ModuleList(
            Edge(C, 2 if reduction and source < 2 else 1, partial)
            for inputs in INPUTS for source in range(inputs))

    def forward(self, s0, s1, keep, op_weights, edge_weights):        # 14 × 7, 14 numbers
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        first = 0  # the first edge of the node
        for inputs in INPUTS:
            outputs = []
            for k, x in enumerate(states, first):
                y = self.edges[k](x, op_weights[k])
                outputs.append(y if edge_weights is None else edge_weights[k] * y)
            states.append(sum(outputs[1:], outputs[0]))
            first += inputs
        return concat(states[2:])                                     # (B, 4C, H, W)


class Network(Skeleton):
    """The supernet of DARTS, or of PC-DARTS if `partial` > 1."""

    def __init__(self, C, num_classes, layers, partial=1):
        super().__init__(C, num_classes, layers, False, lambda *shape: Cell(*shape, partial))
        # One of each for the normal cells and one for the reduction cells.
        self.alpha = nn.ParameterList(1e-3 * torch.randn(EDGES, len(PRIMITIVES)) for _ in range(2))
        self.beta = nn.ParameterList(
            1e-3 * torch.randn(EDGES) for _ in range(2 if partial > 1 else 0))

    def arch_parameters(self):
        return [*self.alpha, *self.beta]

    def weight_parameters(self):
        arch = {id(p) for p in self.arch_parameters()}
        return [p for p in self.parameters() if id(p) not in arch]

    def edge_weights(self):
        """Return the softmax of β over the edges of each node, (14,), for each cell type."""
        return [torch.cat([b.softmax(0) for b in beta.split([*INPUTS])]) for beta in self.beta]

    def forward(self, x):                                             # (B, 3, H, W)
        edge_weights = [e.unbind() for e in self.edge_weights()] or [None, None]
        op_weights = [[w.unbind() for w in a.softmax(1).unbind()] for a in self.alpha]
        return super().forward(x, *zip(op_weights, edge_weights, strict=True))

    @torch.no_grad()
    def genotype(self):
        """Keep the 2 edges of each node whose best operation has the largest weight."""
        weights = [a.softmax(1) for a in self.alpha]
        if self.beta:
            weights = [e[:, None] * w for e, w in zip(self.edge_weights(), weights, strict=True)]
        cells = []
        for weight in weights:
            pairs = []
            for node_weights in weight.split([*INPUTS]):              # (edges of the node, 7)
                best, op = node_weights.max(1)
                for source in best.topk(2).indices.sort().values.tolist():
                    pairs.append((PRIMITIVES[op[source]], source))
            cells += [pairs, range(2, 2 + NODES)]
        return Genotype(*cells)


def main(args):
    path = os.path.join(args.save, "checkpoint.pt")
    kept_flags = {name: x for name, x in vars(args).items() if name not in RESUME_OVERRIDES}
    checkpoint = load_checkpoint(path, kept_flags) if os.path.exists(path) else None
    if checkpoint is None and os.path.isdir(args.save) and os.listdir(args.save):
        raise UserError(f"--save {args.save} contains files but no DARTS search: choose another "
                        "folder")
    device = utils.choose_device(args.device)
    generator = utils.seed_everything(args.seed, device)
    layout = utils.memory_format(device, amp=False)
    images, _ = data.load(args.dataset, args.data, args.image_size, device)
    weight_half, arch_half = map(images.subset, data.split(images.labels, 0.5, args.seed))
    options = dict(train=True, generator=generator, memory_format=layout)
    batches = weight_half.batches(args.batch_size, **options)
    arch_batches = arch_half.batches(args.batch_size, **options)
    valid_batches = arch_half.batches(args.batch_size, train=False, memory_format=layout)

    net = Network(args.init_channels, len(images.classes), args.layers, args.partial)
    net = net.to(device, memory_format=layout)
    if device.type == "cpu":
        speedups.keep_freed_memory()
    sgd_flags = argparse.Namespace(
        learning_rate=args.learning_rate, momentum=0.9, weight_decay=3e-4)
    optimizer = utils.sgd(net.weight_parameters(), sgd_flags)
    arch_optimizer = torch.optim.Adam(
        net.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=1e-3, fused=True)
    rows, history = [], []
    if checkpoint:
        rows, history = checkpoint["rows"], checkpoint["history"]
        net.load_state_dict(checkpoint["net"])
        checkpoints.load_optimizer(optimizer, checkpoint["optimizer"])
        checkpoints.load_optimizer(arch_optimizer, checkpoint["arch_optimizer"])
        generator.set_state(checkpoint["generator"])

    for epoch in range(len(rows) + 1, args.epochs + 1):
        start = time.monotonic()
        low = 0.001 / args.learning_rate
        utils.set_learning_rate(optimizer, utils.cosine(epoch - 1, args.epochs, low))
        row = dict(
            epoch=epoch, learning_rate=float(optimizer.param_groups[0]["lr"]),
            **train(net, batches, arch_batches, optimizer, arch_optimizer, epoch > args.warm_up),
            **utils.name_metrics(utils.evaluate(net, valid_batches), "valid"),
            seconds=time.monotonic() - start, peak_memory_gib=utils.peak_memory(device),
        )
        rows.append(row)
        history.append({"epoch": epoch, **genotypes.as_lists(net.genotype())})
        os.makedirs(args.save, exist_ok=True)
        checkpoints.save(path, dict(
            kind="darts", args=kept_flags, rows=rows, history=history, net=net.state_dict(),
            optimizer=optimizer.state_dict(), arch_optimizer=arch_optimizer.state_dict(),
            generator=generator.get_state(),
        ))
        print(f"epoch {epoch}/{args.epochs}: train {row['train_accuracy']:.2f} %, "
              f"valid {row['valid_accuracy']:.2f} %, {row['seconds']:.1f} s, "
              f"peak {row['peak_memory_gib']:.2f} GiB", flush=True)
        write_files(args, net.genotype(), rows, history)
    # Write again, because a search may have been killed between its checkpoint and its files.
    write_files(args, net.genotype(), rows, history)
    print(f"{sum(row['seconds'] for row in rows):.0f} s, peak "
          f"{max(row['peak_memory_gib'] for row in rows):.2f} GiB, genotype = {net.genotype()}")


def train(net, batches, arch_batches, optimizer, arch_optimizer, train_arch):
    """Train for an epoch; each step updates first α and β, if `train_arch`, then the weights."""
    meter = utils.Meter(net.classifier.weight.device)
    net.train()
    for (x, y), (x_arch, y_arch) in zip(batches, arch_batches.endless(), strict=False):
        if train_arch:
            step(net, x_arch, y_arch, arch_optimizer, fixed=optimizer)
        loss, logits = step(net, x, y, optimizer, fixed=arch_optimizer, grad_clip=5.0)
        meter.add(loss, logits, y)
    return utils.name_metrics(meter.read(), "train")


def step(net, x, y, optimizer, fixed, grad_clip=None):
    """Make a step of `optimizer` without gradients of the parameters of the optimizer `fixed`."""
    with utils.no_gradients_of(fixed):
        logits, _ = net(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
    if grad_clip is not None:
        clip_grad_norm_(utils.parameters_of(optimizer), grad_clip)
    optimizer.step()
    return loss, logits


def load_checkpoint(path, kept_flags):
    """Load the checkpoint of a search; UserError if that had other flags."""
    checkpoint = checkpoints.load(path)
    if checkpoint.get("kind") != "darts":
        raise UserError(f"{path} is of another kind of run: choose another --save")
    for name, value in kept_flags.items():
        if checkpoint["args"].get(name) != value:
            raise UserError(f"the search in {os.path.dirname(path)} was started with another "
                            f"--{name} ({checkpoint['args'].get(name)}): choose another --save")
    return checkpoint


def write_files(args, genotype, rows, history):
    for name, lines in (("metrics.jsonl", rows), ("genotypes.jsonl", history)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        utils.write_file(os.path.join(args.save, name), text.encode())
    method = "DARTS, first order" if args.partial == 1 else f"PC-DARTS, 1/{args.partial}"
    genotypes.save(os.path.join(args.save, "genotype.json"), genotype, one_stage=False,
                   method=method, seed=args.seed, dataset=args.dataset, result=rows[-1])


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except utils.Diverged as error:
        flags.fail("darts.py", f"{error}: give a smaller --learning_rate")
    except (UserError, OSError) as error:
        flags.fail("darts.py", error)
