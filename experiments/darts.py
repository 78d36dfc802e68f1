"""Search with first-order DARTS, or PC-DARTS, on the layers and the data of this project.

    python experiments/darts.py --save runs/darts                             # DARTS' setting
    python experiments/darts.py --save runs/pc-darts --partial 4 --warm_up 15 \\
        --batch_size 256 --learning_rate 0.1 --arch_learning_rate 6e-4        # PC-DARTS'
    python experiments/nasbench301.py --model M.onnx --encoding E.json runs/darts

A search by sparse coding is compared with it, at equal data and steps. Every edge runs all 7
operations (DARTS' eighth, `none`, is not in our space), weighted by a softmax over α. A step moves
first α, by Adam on a batch of one half of the training images, then the weights, by SGD on a batch
of the other half. Each node keeps the 2 edges whose best operation has the largest weight. With
`--partial K` the operations of an edge see 1/K of its channels, the others pass by them, and a
softmax over β weighs the edges of a node.

The folder gets metrics.jsonl, genotypes.jsonl and genotype.json, as from search.py. The same
command goes on with a search that was interrupted.

Sources: Liu, Simonyan, Yang, DARTS, ICLR 2019; Xu et al., PC-DARTS, ICLR 2020.
"""

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

INPUTS = range(2, 2 + NODES)  # how many earlier nodes each node has: 2, 3, 4, 5
EDGES = sum(INPUTS)  # 14
HERE = {"save", "device", "data", "typed"}  # may differ when a search goes on


def get_args_parser():
    parser = flags.Parser("darts.py", __doc__, check=check)
    parser.usage = "darts.py --save DIR [flags]"
    name, whole, real = flags.name, flags.whole, flags.real
    for flag, kind, default, metavar, help in (
        ("save", name, None, "DIR", "folder of the search"),
        ("device", name, None, "NAME", "cuda, cpu, ... (default: cuda if there is one)"),
        ("data", name, "data", "DIR", "folder of the data set"),
        ("image_size", whole(4), 32, "PIXELS", "width and height that images are resized to"),
        ("seed", whole(0), 2, "N", "of all that is random"),
        ("init_channels", whole(1), 16, "C", "channels of the first cells"),
        ("layers", whole(3), 8, "CELLS", "number of cells"),
        ("partial", whole(1), 1, "K", "operations see 1/K of the channels; PC-DARTS: 4"),
        ("epochs", whole(1), 50, "N", "of the search"),
        ("warm_up", whole(0), 0, "N", "first epochs, in which α and β rest; PC-DARTS: 15"),
        ("batch_size", whole(2), 64, "IMAGES", "of α, and as many of the weights, in a step"),
        ("learning_rate", real(1e-3), 0.025, "LR", "of the weights at first; it falls to 0.001"),
        ("arch_learning_rate", real(0), 3e-4, "LR", "of α and β"),
    ):
        parser.add_argument(f"--{flag}", type=kind, default=default, metavar=metavar, help=help,
                            required=flag == "save")
    parser.add_argument("--dataset", default="cifar10", choices=[*data.DATASETS], metavar="NAME",
                        help=f"one of {', '.join(data.DATASETS)}")
    parser.show_defaults({})
    return parser


def check(args):
    if args.init_channels % args.partial:
        raise UserError(f"--init_channels {args.init_channels} is not a multiple of --partial "
                        f"{args.partial}")


# ------------------------------------------------------------------------------------------------
# The supernet
# ------------------------------------------------------------------------------------------------


class Edge(nn.Module):
    """All operations of an edge: Σ_k w_k · op_k(x), on the first 1/partial of the channels."""

    def __init__(self, C, stride, partial):
        super().__init__()
        self.partial = partial
        self.mixed = MixedOp(C // partial, stride, one_stage=False)
        self.bypass = nn.MaxPool2d(2, 2) if stride == 2 else nn.Identity()

    def forward(self, x, weights):                                    # (B, C, H, W), 7 numbers
        part, *rest = x.split([x.shape[1] // self.partial] * self.partial, dim=1)
        y, *others = [self.mixed(part, k, w) for k, w in enumerate(weights)]
        y = sum(others, y)
        if not rest:
            return y
        y = torch.cat([y, *(self.bypass(other) for other in rest)], dim=1)
        # Channel shuffle, so that the next cell's operations see other channels.
        return y.unflatten(1, (self.partial, -1)).transpose(1, 2).flatten(1, 2)


class Cell(nn.Module):
    """A cell all of whose edges run."""

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
        edges = zip(self.edges, op_weights, edge_weights, strict=True)
        for inputs in INPUTS:
            outputs = []
            for x in states[:inputs]:
                edge, weights, edge_weight = next(edges)
                y = edge(x, weights)
                outputs.append(y if edge_weight is None else edge_weight * y)
            states.append(sum(outputs[1:], outputs[0]))
        return concat(states[2:])                                     # (B, 4C, H, W)


class Network(Skeleton):
    """The supernet of DARTS, or with `partial` > 1 of PC-DARTS."""

    def __init__(self, C, num_classes, layers, partial=1):
        super().__init__(C, num_classes, layers, False, lambda *shape: Cell(*shape, partial))
        # of the normal and of the reduction cells
        self.alpha = nn.ParameterList(1e-3 * torch.randn(EDGES, len(PRIMITIVES)) for _ in "nr")
        self.beta = nn.ParameterList(1e-3 * torch.randn(EDGES) for _ in "nr" if partial > 1)

    def arch_parameters(self):
        return [*self.alpha, *self.beta]

    def weight_parameters(self):
        arch = {id(p) for p in self.arch_parameters()}
        return [p for p in self.parameters() if id(p) not in arch]

    def edge_weights(self):
        """Of each cell type the softmax of β over the edges of each node, (14,)."""
        return [torch.cat([b.softmax(0) for b in beta.split(list(INPUTS))]) for beta in self.beta]

    def forward(self, x):                                             # (B, 3, H, W)
        edge_weights = [e.unbind() for e in self.edge_weights()] or [[None] * EDGES] * 2
        op_weights = [[w.unbind() for w in a.softmax(1).unbind()] for a in self.alpha]
        return super().forward(x, *zip(op_weights, edge_weights, strict=True))

    @torch.no_grad()
    def genotype(self):
        """Of each node the 2 edges whose best operation weighs most, with that operation."""
        weights = [a.softmax(1) for a in self.alpha]
        if self.beta:
            weights = [e[:, None] * w for e, w in zip(self.edge_weights(), weights, strict=True)]
        cells = []
        for weight in weights:
            pairs = []
            for of_node in weight.split(list(INPUTS)):                # (edges of the node, 7)
                best, op = of_node.max(1)
                for source in best.topk(2).indices.sort().values.tolist():
                    pairs.append((PRIMITIVES[op[source]], source))
            cells += [pairs, range(2, 2 + NODES)]
        return Genotype(*cells)


# ------------------------------------------------------------------------------------------------
# The search
# ------------------------------------------------------------------------------------------------


def main(args):
    path = os.path.join(args.save, "checkpoint.pt")
    plain = {name: value for name, value in vars(args).items() if name not in HERE}
    checkpoint = read(path, plain) if os.path.exists(path) else None
    if checkpoint is None and os.path.isdir(args.save) and os.listdir(args.save):
        raise UserError(f"--save {args.save} has files that no search by DARTS wrote: choose "
                        "another folder")
    device = utils.choose_device(args.device)
    generator = utils.seed_everything(args.seed, device)
    layout = utils.memory_format(device, amp=False)
    images, _ = data.load(args.dataset, args.data, args.image_size, device)
    halves = [images.subset(half) for half in data.split(images.labels, 0.5, args.seed)]
    batches, arch_batches = (
        half.batches(args.batch_size, train=True, generator=generator, memory_format=layout)
        for half in halves)
    held_out = halves[1].batches(args.batch_size, train=False, memory_format=layout)

    net = Network(args.init_channels, len(images.classes), args.layers, args.partial)
    net = net.to(device, memory_format=layout)
    if device.type == "cpu":
        speedups.keep_freed_memory()
    optimizer = utils.SGD(
        net.weight_parameters(), args.learning_rate, momentum=0.9, weight_decay=3e-4)
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
        began = time.monotonic()
        low = 0.001 / args.learning_rate
        utils.set_learning_rate(optimizer, utils.cosine(epoch - 1, args.epochs, low))
        row = dict(
            epoch=epoch, learning_rate=float(optimizer.param_groups[0]["lr"]),
            **train(net, batches, arch_batches, optimizer, arch_optimizer, epoch > args.warm_up),
            **utils.named(utils.evaluate(net, held_out), "valid"),
            seconds=time.monotonic() - began, peak_memory_gib=utils.peak_memory(device),
        )
        rows.append(row)
        history.append({"epoch": epoch, **genotypes.as_lists(net.genotype())})
        os.makedirs(args.save, exist_ok=True)
        checkpoints.save(path, dict(
            kind="darts", args=plain, rows=rows, history=history, net=net.state_dict(),
            optimizer=optimizer.state_dict(), arch_optimizer=arch_optimizer.state_dict(),
            generator=generator.get_state(),
        ))
        print(f"epoch {epoch}/{args.epochs}: train {row['train_accuracy']:.2f} %, "
              f"valid {row['valid_accuracy']:.2f} %, {row['seconds']:.1f} s, "
              f"peak {row['peak_memory_gib']:.2f} GiB", flush=True)
        write(args, net.genotype(), rows, history)
    write(args, net.genotype(), rows, history)  # what a search that was killed just then lacks
    print(f"{sum(row['seconds'] for row in rows):.0f} s, peak "
          f"{max(row['peak_memory_gib'] for row in rows):.2f} GiB, genotype = {net.genotype()}")


def train(net, batches, arch_batches, optimizer, arch_optimizer, arch_moves):
    """One epoch. At each step first α and β move, if they do, then the weights."""
    meter = utils.Meter(net.classifier.weight.device)
    net.train()
    for (x, y), (x_arch, y_arch) in zip(batches, arch_batches.endless(), strict=False):
        if arch_moves:
            step(net, x_arch, y_arch, arch_optimizer, held=optimizer)
        loss, logits = step(net, x, y, optimizer, held=arch_optimizer, grad_clip=5.0)
        meter.add(loss, logits, y)
    return utils.named(meter.read(), "train")


def step(net, x, y, optimizer, held, grad_clip=None):
    """One step of an optimizer; no gradient of what the other one, `held`, moves is computed."""
    with utils.held(held):
        logits, _ = net(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
    if grad_clip is not None:
        clip_grad_norm_(utils.parameters_of(optimizer), grad_clip)
    optimizer.step()
    return loss, logits


def read(path, plain):
    """The checkpoint of a search with these flags."""
    checkpoint = checkpoints.load(path)
    if checkpoint.get("kind") != "darts":
        raise UserError(f"{path} is of another kind of run: choose another --save")
    kept = checkpoint["args"]
    if changed := [name for name in plain if kept.get(name) != plain[name]]:
        raise UserError(f"the search in {os.path.dirname(path)} was begun with another "
                        f"--{changed[0]} ({kept.get(changed[0])}): choose another --save")
    return checkpoint


def write(args, genotype, rows, history):
    """The files that others read, made anew from what the checkpoint holds."""
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
