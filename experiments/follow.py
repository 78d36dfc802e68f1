"""Does a search follow its gradient, why does it come to rest, and does a cure help it?

    python experiments/follow.py train search walk --save runs/follow --dataset imagefolder --data D
    python experiments/follow.py summary --save runs/follow --nasbench D

On real networks, with distinct edges. What has ended, a supernet, walk or search, is a line of
results.jsonl; a command that was stopped goes on behind the last one. Conditions take turns, so
that a cut leaves them balanced. What follows was written down before the first result.

(a) `train`, `walk`: does b follow its gradient, and why does it rest? Supernet k (seeds 0, 1, 2)
learns on one half of the training images, from a random support at each step and with w = 1. Then
its weights are fixed, and b alone moves by `search.arch_step`, with the BatchNorm statistics of the
batch, on the other half: 1,200 steps at four times the published rate, as far as the 4,900 of the
published search, and a recovery each 40 steps. Conditions:

    uniform, normal    the dictionaries of search.py
    rate ∝ |b|         uniform; Adam's rate of a node times ‖b‖ / 0.1. (‖b‖ begins at 0.003 and
                       grows to about 0.9, while Adam's steps stay as they are.)
    decay of b         uniform; --arch_weight_decay 0.1, 100 times the published
    b scaled back      uniform; before each recovery b gets its first norm again. Nearly the same
                       pairs are chosen, as z scales with b, but so does w: see the loss
    recovery each 10   uniform; --recover_every 10

Search i (0 to 7) in supernet k has seed 1000 k + i in all conditions: the uniform ones share A, the
first b and the batches. Primary outcome: the loss with w = 1 of the final cell on the test images,
which neither weights nor b have seen, as a percentile (share that is worse) among 300 random cells
(`genotypes.draw` of 5,000 to 5,299). Others: the same of the first cell; the share of the 196 pairs
that ever ran; how often, when one of a node's two left, its |w| had fallen against the other's
(loser); pairs that change in 40 steps, mean of the last ten; training loss of five steps before and
after a recovery; NAS-Bench-301 percentile of the final cell; Spearman's ρ of it and the 300 losses.

(b) `search`: does it help a search? search.py with --search_flags, weights and b by turns; seeds 2,
3, 4, ..., uniform, normal, and with --cure the best cure of (a). Primary outcome: NAS-Bench-301
percentile of the last cell. Others: that after epoch 1, and the supernet's last held-out accuracy.

(c) `directions`: what does b learn? The first 10 epochs of searches like those of (b), with the
dictionaries uniform, uniform less ½ (`centred`) and normal. The outcomes are mean squared cosines
over all nodes and steps: of ∇b and the mean column of A, of b and the mean column, and of b and ∇b.
For two random directions in R^m the mean is 1/m = 0.14. With a positive dictionary, a step along
the mean column raises or lowers the weights of all pairs.

Rules. 95 % intervals by Student's t; percentiles are compared with 50, and differences from uniform
are paired, by supernet and seed or by seed. An interval that leaves out 50, or 0, counts as shown.
Those of (a) speak of these supernets alone. The default dictionary changes only if (b) shows normal
to be better. No cure becomes a default. What has not ended is told as it stands, with its number.
"""

import json
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import evidence
import nasbench301

import data
import genotypes
import search
import utils
import visualize
from genotypes import NODES, PRIMITIVES
from harness import checkpoints, flags, speedups
from model_search import DICTIONARIES, indices
from utils import UserError

SEARCH = "--init_channels 8 --layers 5 --batch_size 64 --epochs 15 --learning_rate 0.025"
PAIRS = 2 * len(PRIMITIVES) * sum(range(2, 2 + NODES))  # of both cell types: 196
EPOCH = 40  # steps between two recoveries of a walk, where a condition names no others
CONDITIONS = {  # with their flags of search.py
    "uniform": "", "normal": "--dictionary normal", "rate ∝ |b|": "", "b scaled back": "",
    "decay of b": "--arch_weight_decay 0.1", "recovery each 10": "--recover_every 10",
}
DICTIONARIES["centred"] = lambda m, n: DICTIONARIES["uniform"](m, n) - 0.5
DIRECTIONS = {"uniform": "", "centred": "--dictionary centred", "normal": "--dictionary normal"}
CURES = ["decay of b", "recovery each 10"]  # for which there is a flag
SETTING = "dataset", "image_size", "search_flags", "supernet_epochs", "cells", "steps"


def get_args_parser():
    parser = flags.Parser("follow.py", __doc__)
    parser.usage = "follow.py {train,search,walk,directions,summary} ... --save DIR [flags]"
    parser.add_argument("parts", nargs="+", choices=[*PARTS], metavar="PART", help="what to do")
    parser.add_argument("--cure", choices=CURES, metavar="NAME", help=", ".join(CURES))
    parser.add_argument("--dataset", default="cifar10", choices=[*data.DATASETS], metavar="NAME",
                        help=f"one of {', '.join(data.DATASETS)}")
    for flag, kind, default, metavar, help in (
        ("save", flags.name, None, "DIR", "folder of all results"),
        ("data", flags.name, "data", "DIR", "folder of the data set"),
        ("image_size", flags.whole(4), 32, "PIXELS", "width and height of the images"),
        ("search_flags", str, SEARCH, "FLAGS", "of search.py, also for supernets and walks"),
        ("supernets", flags.whole(1), 3, "N", "supernets of (a)"),
        ("supernet_epochs", flags.whole(1), 400, "N", "that each trains: about an hour of a core"),
        ("cells", flags.whole(2), 300, "N", "random cells in each supernet"),
        ("walks", flags.whole(1), 8, "N", "of each condition in each supernet"),
        ("steps", flags.whole(2 * EPOCH), 1200, "N", "of a walk"),
        ("seeds", flags.whole(1), 24, "N", "searches of each condition in (b) and (c)"),
        ("nasbench", flags.name, None, "DIR", "of nb301-surrogate.onnx and encoding.json"),
    ):
        parser.add_argument(f"--{flag}", type=kind, default=default, metavar=metavar, help=help,
                            required=flag == "save")
    parser.show_defaults({})
    return parser


def results(args, part):
    path = Path(args.save, "results.jsonl")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
    return [row for row in rows if row["part"] == part]


def todo(args, part, items):
    """Of items, dicts, those of which there is no line yet."""
    done = results(args, part)
    if any(row["setting"] != args.setting for row in done):
        raise UserError(f"{args.save} is of other flags, {done[0]['setting']}: choose another")
    return [item for item in items if not any(item.items() <= row.items() for row in done)]


def add(args, part, item, **found):
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpuinfo.read_text().partition("model name\t: ")[2] if cpuinfo.exists() else ""
    found |= {"setting": args.setting, "processor": cpu.partition("\n")[0]}
    with open(Path(args.save, "results.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, **item, **found}, ensure_ascii=False) + "\n")
    print(part, *item.values(), flush=True)


class Supernet:
    """A supernet trained on random supports, with the A and b of a condition; and its images."""

    def __init__(self, args, number, seed, condition="uniform"):
        given = f"{args.search_flags} {(CONDITIONS | DIRECTIONS)[condition]} --distinct_edges"
        self.args = search.get_args_parser().parse_args([
            *shlex.split(given), "--dataset", args.dataset, "--data", args.data,
            "--image_size", str(args.image_size)])
        self.path, self.number = Path(args.save, f"supernet-{number}.pt"), number
        device = utils.choose_device(self.args.device)
        self.generator = utils.seed_everything(seed, device)
        layout = utils.memory_format(device, amp=False, two_stage=True)
        train, test = data.load(args.dataset, args.data, args.image_size, device)
        # In the order of a folder, a batch would hold one class, and its statistics.
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        halves = data.split(train.labels, self.args.train_portion, number)
        self.batches, self.arch_batches, self.test_batches = (
            images.subset(index).batches(self.args.batch_size, train=images is train,
                                         memory_format=layout, generator=self.generator)
            for images, index in zip((train, train, test), (*halves, order), strict=True))
        net = search.supernet(self.args, len(train.classes))
        self.net = net.to(device, memory_format=layout)
        if device.type == "cpu":
            speedups.keep_freed_memory()
        self.optimizers = search.optimizers(self.net, self.args)

    def train(self, epochs):
        """Train the weights; what an interrupted training has saved goes on."""
        saved = self.load() if self.path.exists() else {"epoch": 0}
        if saved["epoch"]:
            checkpoints.load_optimizer(self.optimizers[0], saved["optimizer"])
        low = self.args.learning_rate_min / self.args.learning_rate
        for epoch in range(saved["epoch"], epochs):
            # Seeded by the epoch, so that there is no random state to be saved.
            self.generator.manual_seed(1000 * epoch + self.number)
            utils.set_learning_rate(self.optimizers[0], utils.cosine(epoch, epochs, low))
            self.net.train()
            for seed, (x, y) in enumerate(self.batches, 10**9 * (1 + self.number) + 10**6 * epoch):
                self.run_only(genotypes.draw(seed, distinct_edges=True))
                search.weight_step(self.net, x, y, *self.optimizers, self.args)
            checkpoints.save(self.path, dict(epoch=epoch + 1, net=self.net.state_dict(),
                                             optimizer=self.optimizers[0].state_dict()))

    def load(self):
        """Load the weights alone: A and b stay as they are. Returns all that was saved."""
        saved = checkpoints.load(self.path)
        weights = {key: value for key, value in saved["net"].items() if "_code." not in key}
        self.net.load_state_dict({**self.net.state_dict(), **weights})
        return saved

    def run_only(self, genotype):
        """Have the cells run a genotype with w = M b − c = 1, until the next recovery."""
        for code, cell in zip(self.net.codes, (genotype.normal, genotype.reduce), strict=True):
            support = [[(source, PRIMITIVES.index(name)) for name, source in node]
                       for node in genotypes.by_node(cell)]
            code.S.copy_(torch.tensor([indices(node) for node in support]))
            # Reading the support computes M and c from S, so they can only be written afterwards.
            assert code.support == support
            code.M.zero_()
            code.c.fill_(-1)

    @torch.no_grad()
    def measure(self, genotype):
        """Loss and accuracy (%) on the test images with w = 1 and the statistics of the batch."""
        self.run_only(genotype)
        self.net.train()
        meter = utils.Meter(self.net.classifier.weight.device)
        for x, y in self.test_batches:
            logits, _ = self.net(x)
            meter.add(torch.nn.functional.cross_entropy(logits, y), logits, y)
        return meter.read()

    def walk(self, condition, steps):
        """Move b alone; returns what was counted, with the first and the final genotype."""
        net, (weights, adam) = self.net, self.optimizers
        adam.param_groups = [dict(adam.param_groups[0], params=[b]) for b in net.arch_parameters()]
        rate, every = 4 * self.args.arch_learning_rate, self.args.recover_every
        every = EPOCH if every == "epoch" else every
        first, (_, ran, w_then, first_norms) = net.genotype(), state(net)
        marked, losses, lost, changed = ran, [], [], []
        net.train()
        for step, (x, y) in zip(range(1, steps + 1), self.arch_batches.endless(), strict=False):
            for group, norm in zip(adam.param_groups, state(net)[-1], strict=True):
                group["lr"] = rate * (norm / 0.1 if condition == "rate ∝ |b|" else 1)
            losses.append(search.arch_step(net, x, y, weights, adam, self.args)[0].item())
            if step % every == 0:
                nodes, _, w, norms = state(net)
                if condition == "b scaled back":
                    shares = np.divide(first_norms, norms)
                    torch._foreach_mul_([b.data for b in net.arch_parameters()], shares.tolist())
                net.recover(self.args.solver)
                new_nodes, pairs, w_new, _ = state(net)
                lost += losers(nodes, new_nodes, w - w_then)
                ran, w_then = ran | pairs, w_new
            if step % EPOCH == 0:
                changed, marked = [*changed, len(state(net)[1] - marked)], state(net)[1]
        at = range(every, steps - 4, every)
        return dict(
            ran=100 * len(ran) / PAIRS, losers=100 * float(np.mean(lost)) if lost else None,
            changed=float(np.mean(changed[-10:])), norm=float(np.mean(norms)),
            before=float(np.mean([losses[k - 5 : k] for k in at])),
            after=float(np.mean([losses[k : k + 5] for k in at])),
            genotypes=[*map(genotypes.as_lists, (first, net.genotype()))])


    def directions(self, epochs):
        """Search for some epochs; returns the mean squared cosines of ∇b, b and A's mean column."""
        net, (weights, adam) = self.net, self.optimizers
        low = self.args.learning_rate_min / self.args.learning_rate
        means = [A.mean(dim=1) for code in net.codes for A in code.A]
        found = []
        for epoch in range(epochs):
            utils.set_learning_rate(weights, utils.cosine(epoch, self.args.epochs, low))
            net.train()
            for (x, y), (x_arch, y_arch) in zip(
                self.batches, self.arch_batches.endless(), strict=False
            ):
                points = [b.detach().clone() for b in net.arch_parameters()]
                search.arch_step(net, x_arch, y_arch, weights, adam, self.args)
                for b, mean, parameter in zip(points, means, net.arch_parameters(), strict=True):
                    g = parameter.grad
                    found.append([squared_cosine(g, mean), squared_cosine(b, mean),
                                  squared_cosine(b, g)])
                search.weight_step(net, x, y, weights, adam, self.args)
            net.recover(self.args.solver)
        gradient, point, both = np.mean(found, axis=0).tolist()
        return dict(gradient=gradient, point=point, both=both)


def squared_cosine(x, y):
    return torch.cosine_similarity(x.double(), y.double(), dim=0).square().item()


def state(net):
    """Pairs of the nodes; all of them as a set; their |w|, (8, 2); ‖b‖ of the nodes."""
    nodes = [list(node) for code in net.codes for node in code.support]
    pairs = {(j, *pair) for j, node in enumerate(nodes) for pair in node}
    w = torch.cat([code.active_weights() for code in net.codes]).abs().numpy(force=True)
    return nodes, pairs, w, [b.detach().norm().item() for b in net.arch_parameters()]


def losers(before, after, rise):
    """Of each pair that left without the other one of its node: whether its |w| had risen less."""
    stays = np.array([[pair in new for pair in old]
                      for old, new in zip(before, after, strict=True)])
    alone = stays.sum(1) == 1
    return (rise[alone][~stays[alone]] < rise[alone][stays[alone]]).tolist()


def random_cells(n):
    return [genotypes.draw(5000 + k, distinct_edges=True) for k in range(n)]


def train(args):
    for item in todo(args, "train", [{"supernet": k} for k in range(args.supernets)]):
        supernet = Supernet(args, item["supernet"], seed=item["supernet"])
        supernet.train(args.supernet_epochs)
        losses, accuracies = zip(*map(supernet.measure, random_cells(args.cells)), strict=True)
        add(args, "train", item, losses=losses, accuracy=float(np.mean(accuracies)))


def walk(args):
    ready = {row["supernet"]: row["losses"] for row in results(args, "train")}
    if not ready:
        raise UserError("there is no supernet to walk in: train comes first")
    items = [{"supernet": k, "search": i, "condition": name}
             for i in range(args.walks) for k in ready for name in CONDITIONS]
    for item in todo(args, "walk", items):
        k, i, condition = item.values()
        supernet = Supernet(args, k, 1000 * k + i, condition)
        supernet.load()
        counted = supernet.walk(condition, args.steps)
        losses = [supernet.measure(genotypes.from_lists(g))[0] for g in counted["genotypes"]]
        first, final = (100 - nasbench301.percentile(loss, ready[k]) for loss in losses)
        add(args, "walk", item, first=first, final=final, **counted)


def run_searches(args):
    names = [name for name in ("uniform", "normal", args.cure) if name]
    items = [{"condition": name, "seed": 2 + i} for i in range(args.seeds) for name in names]
    for item in todo(args, "search", items):
        name, seed = item.values()
        folder = Path(args.save, f"{name.replace(' ', '-')}-{seed}")
        given = f"{args.search_flags} {CONDITIONS[name]} --distinct_edges --seed {seed}"
        evidence.finish("search.py", folder, given, args)
        run = visualize.read_run(str(folder))
        add(args, "search", item, accuracy=run.metrics[-1]["valid_accuracy"],
            genotypes=[genotypes.as_lists(run.history[k].genotype) for k in (0, -1)])


def directions(args):
    items = [{"condition": name, "seed": 2 + i} for i in range(args.seeds) for name in DIRECTIONS]
    for item in todo(args, "directions", items):
        name, seed = item.values()
        add(args, "directions", item, **Supernet(args, seed, seed, name).directions(epochs=10))


def estimate(values):
    """Mean ± standard error, and the 95 % interval, as a text."""
    if len(values) < 2:
        return f"{np.mean(values):.2f}" if values else "–"
    mean, error = np.mean(values), stats.sem(values)
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    return f"{mean:.2f} ± {error:.2f} [{mean - reach:.2f} to {mean + reach:.2f}]"


def table(title, rows, columns):
    """Print each condition's outcomes, of a column by name, and its differences from uniform."""
    def known(condition, column):
        return {tuple(row.get(key) for key in ("supernet", "search", "seed")): row[column]
                for row in rows if row["condition"] == condition and row[column] is not None}

    print(f"\n{title}: mean ± standard error [95 % interval]")
    for name, searches in Counter(row["condition"] for row in rows).items():
        print(f"{name}: {searches} searches")
        for column, text in columns.items():
            own, base = known(name, column), known("uniform", column)
            line = f"    {text:<40}{estimate([*own.values()]):>34}"
            if name != "uniform":
                line += f"    − uniform: {estimate([own[k] - base[k] for k in own if k in base])}"
            print(line)


def summary(args):
    files = [Path(args.nasbench or "", x) for x in ("nb301-surrogate.onnx", "encoding.json")]
    surrogate = args.nasbench and nasbench301.Surrogate(*files)
    supernets, walks, searches = (results(args, part) for part in ("train", "walk", "search"))
    print(*{row["processor"] for row in supernets + walks + searches}, sep=", ")
    for row in supernets:
        scores = map(surrogate.accuracy, random_cells(len(row["losses"]))) if surrogate else []
        rho = stats.spearmanr(row["losses"], [*scores]).statistic if surrogate else np.nan
        print(f"supernet {row['supernet']}: {row['accuracy']:.1f} % on test images, random cells; "
              f"Spearman's correlation of loss and NAS-Bench-301: {rho:.2f}")
    for row in walks + searches:
        both = map(genotypes.from_lists, row["genotypes"])
        row["early"], row["score"] = (surrogate and surrogate.score(g)[1] for g in both)
    table("(a) weights fixed, b alone moves", walks, {
        "first": "percentile of the loss, first cell", "final": "percentile, final cell",
        "score": "NAS-Bench-301 percentile, final cell", "ran": "pairs that ran, %",
        "losers": "leavers that were losers, %", "changed": "pairs changed in 40 steps, last ten",
        "norm": "‖b‖ at the end", "before": "training loss before a recovery",
        "after": "training loss after a recovery"})
    table("(b) whole searches", searches, {
        "score": "NAS-Bench-301 percentile, last cell", "early": "the same after epoch 1",
        "accuracy": "held-out accuracy of the supernet, %"})
    table("(c) directions in R^m, mean squared cosine", results(args, "directions"), {
        "gradient": "∇b and the mean column", "point": "b and the mean column",
        "both": "b and ∇b"})


PARTS = {"train": train, "search": run_searches, "walk": walk, "directions": directions,
         "summary": summary}


def main(args):
    Path(args.save).mkdir(parents=True, exist_ok=True)
    args.setting = {name: getattr(args, name) for name in SETTING}
    for part in args.parts:
        PARTS[part](args)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        flags.fail("follow.py", error)
