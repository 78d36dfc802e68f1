"""Does a search follow its gradient, why does it stop changing, and what helps?

    python experiments/follow.py train search walk --save runs/follow --dataset imagefolder --data D
    python experiments/follow.py summary --save runs/follow --nasbench D

Each result (of a supernet, walk or search) is a line of results.jsonl; the same command continues
after the last one. Conditions alternate, so that partial results are balanced. This plan was
written before the first result. All searches have distinct edges.

(a) `train` and `walk`: supernet k (seeds 0, 1, 2) is trained on one half of the training images,
with a random support at each step and w = 1. Then its weights are fixed, and `search.arch_step`
trains b alone on the other half, with batch statistics: 1,200 steps at four times the published
learning rate, as far as the 4,900 steps of the published search, with a recovery every 40 steps.

    uniform, normal    the dictionaries of search.py
    rate ∝ |b|         uniform; Adam's learning rate of a node is multiplied by ‖b‖ / 0.1, because
                       ‖b‖ grows from 0.003 to about 0.9 while the size of Adam's steps is constant
    decay of b         uniform; --arch_weight_decay 0.1, 100 times the published value
    b scaled back      uniform; b is scaled to its initial norm before each recovery. This chooses
                       nearly the same pairs, because z scales with b, but w shrinks: see the loss
    recovery each 10   uniform; --recover_every 10

Search i (0 to 7) in supernet k has seed 1000 k + i in all conditions, so the uniform ones have the
same A, initial b and batches. Primary outcome: the loss of the final cell with w = 1 on the test
images, as a percentile (percentage that is worse) among 300 random cells (`genotypes.draw` with
seeds 5,000 to 5,299). The others are listed in `summarize`. A pair that is replaced is a loser if
its |w| had risen less than that of the other pair of its node, which stays.

(b) `search`: search.py with --search_flags; seeds 2, 3, 4, ...; uniform, normal and, with --cure,
the best cure of (a). Primary outcome: NAS-Bench-301 percentile of the last cell.

(c) `directions`: the first 10 epochs of searches like those of (b), with the dictionaries uniform,
uniform less ½ (`centred`) and normal. Outcomes: mean squared cosines over all nodes and steps of
∇b, b and the mean column of A. For two random directions in R^m the mean is 1/m = 0.14. With a
positive dictionary, a step along the mean column raises or lowers the weights of all pairs.

Analysis: 95 % intervals by Student's t. Percentiles are compared with 50; differences from uniform
are paired, by supernet and seed or by seed. An effect counts as shown if its interval excludes 50
or 0. Intervals of (a) are valid for these supernets only. The default dictionary changes only if
(b) shows that normal is better. No cure becomes a default. Incomplete results are reported with
their number of searches.
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
from model_search import DICTIONARIES, pair_numbers
from utils import UserError

SEARCH = "--init_channels 8 --layers 5 --batch_size 64 --epochs 15 --learning_rate 0.025"
PAIRS = 2 * len(PRIMITIVES) * sum(range(2, 2 + NODES))  # of both cell types: 196
EPOCH = 40  # steps between two recoveries of a walk, unless the condition sets --recover_every
CONDITIONS = {  # and their flags of search.py
    "uniform": "", "normal": "--dictionary normal", "rate ∝ |b|": "", "b scaled back": "",
    "decay of b": "--arch_weight_decay 0.1", "recovery each 10": "--recover_every 10",
}
DICTIONARIES["centred"] = lambda m, n: DICTIONARIES["uniform"](m, n) - 0.5
DIRECTIONS = {"uniform": "", "centred": "--dictionary centred", "normal": "--dictionary normal"}
CURES = ["decay of b", "recovery each 10"]  # those that are flags of search.py
SETTING = "dataset", "image_size", "search_flags", "supernet_epochs", "cells", "steps"


def get_args_parser():
    parser = flags.Parser("follow.py", __doc__)
    parser.usage = "follow.py {train,search,walk,directions,summary} ... --save DIR [flags]"
    parser.add_argument("parts", nargs="+", choices=[*PARTS], metavar="PART", help="what to do")
    parser.add_argument("--cure", choices=CURES, metavar="NAME", help=", ".join(CURES))
    parser.add_argument("--dataset", default="cifar10", choices=[*data.DATASETS], metavar="NAME",
                        help=f"one of {', '.join(data.DATASETS)}")
    nonempty, integer = flags.nonempty, flags.integer
    for flag, type_, default, metavar, help in (
        ("save", nonempty, None, "DIR", "folder of all results"),
        ("data", nonempty, "data", "DIR", "folder of the data set"),
        ("image_size", integer(4), 32, "PIXELS", "width and height of the images"),
        ("search_flags", str, SEARCH, "FLAGS", "flags of search.py, also for supernets and walks"),
        ("supernets", integer(1), 3, "N", "supernets of (a)"),
        ("supernet_epochs", integer(1), 400, "N", "epochs of each: about an hour on a core"),
        ("cells", integer(2), 300, "N", "random cells in each supernet"),
        ("walks", integer(1), 8, "N", "walks of each condition in each supernet"),
        ("steps", integer(2 * EPOCH), 1200, "N", "steps of a walk"),
        ("seeds", integer(1), 24, "N", "searches of each condition in (b) and (c)"),
        ("nasbench", nonempty, None, "DIR", "folder of nb301-surrogate.onnx and encoding.json"),
    ):
        parser.add_argument(f"--{flag}", type=type_, default=default, metavar=metavar, help=help,
                            required=flag == "save")
    parser.show_defaults({})
    return parser


def read_results(args, part):
    path = Path(args.save, "results.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["part"] == part]


def unfinished(args, part, items):
    """Return the items (dicts) that have no result yet."""
    done = read_results(args, part)
    if any(row["setting"] != args.setting for row in done):
        raise UserError(f"{args.save} has results with other flags, {done[0]['setting']}: choose "
                        "another folder")
    return [item for item in items if not any(item.items() <= row.items() for row in done)]


def append_result(args, part, item, **outcomes):
    row = {"part": part, **item, **outcomes, "setting": args.setting,
           "processor": utils.processor_name()}
    with open(Path(args.save, "results.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(part, *item.values(), flush=True)


class Supernet:
    """A supernet with the A and b of a condition, its optimizers and its images."""

    def __init__(self, args, number, seed, condition="uniform"):
        search_flags = f"{args.search_flags} {(CONDITIONS | DIRECTIONS)[condition]}"
        self.args = search.get_args_parser().parse_args([
            *shlex.split(search_flags), "--distinct_edges", "--dataset", args.dataset,
            "--data", args.data, "--image_size", str(args.image_size)])
        self.path, self.number = Path(args.save, f"supernet-{number}.pt"), number
        device = utils.choose_device(self.args.device)
        self.generator = utils.seed_everything(seed, device)
        layout = utils.memory_format(device, amp=False, two_stage=True)
        train, test = data.load(args.dataset, args.data, args.image_size, device)
        # Shuffle the test images: batch statistics would be those of one class otherwise.
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
        """Train the weights on random supports; resume an interrupted training."""
        saved = self.load() if self.path.exists() else {"epoch": 0}
        if saved["epoch"]:
            checkpoints.load_optimizer(self.optimizers[0], saved["optimizer"])
        low = self.args.learning_rate_min / self.args.learning_rate
        for epoch in range(saved["epoch"], epochs):
            # Seed each epoch, so that a checkpoint needs no random state.
            self.generator.manual_seed(1000 * epoch + self.number)
            utils.set_learning_rate(self.optimizers[0], utils.cosine(epoch, epochs, low))
            self.net.train()
            for seed, (x, y) in enumerate(self.batches, 10**9 * (1 + self.number) + 10**6 * epoch):
                self.run_only(genotypes.draw(seed, distinct_edges=True))
                search.weight_step(self.net, x, y, *self.optimizers, self.args)
            checkpoints.save(self.path, dict(epoch=epoch + 1, net=self.net.state_dict(),
                                             optimizer=self.optimizers[0].state_dict()))

    def load(self):
        """Load the weights, but keep A and b; return the checkpoint."""
        saved = checkpoints.load(self.path)
        weights = {key: value for key, value in saved["net"].items() if "_code." not in key}
        self.net.load_state_dict({**self.net.state_dict(), **weights})
        return saved

    def run_only(self, genotype):
        """Run a genotype with w = M b − c = 1 until the next recovery."""
        for code, cell in zip(self.net.codes, (genotype.normal, genotype.reduce), strict=True):
            support = [[(source, PRIMITIVES.index(name)) for name, source in node]
                       for node in genotypes.by_node(cell)]
            code.S.copy_(torch.tensor([pair_numbers(node) for node in support]))
            assert code.support == support  # reading it computes M and c, so write them afterwards
            code.M.zero_()
            code.c.fill_(-1)

    @torch.no_grad()
    def measure(self, genotype):
        """Return test loss and accuracy (%) with w = 1 and batch statistics."""
        self.run_only(genotype)
        self.net.train()
        meter = utils.Meter(self.net.classifier.weight.device)
        for x, y in self.test_batches:
            logits, _ = self.net(x)
            meter.add(torch.nn.functional.cross_entropy(logits, y), logits, y)
        return meter.read()

    def walk(self, condition, steps):
        """Train b with fixed weights; return the outcomes, and the first and the final genotype."""
        net, (weights, adam) = self.net, self.optimizers
        adam.param_groups = [dict(adam.param_groups[0], params=[b]) for b in net.arch_parameters()]
        rate, every = 4 * self.args.arch_learning_rate, self.args.recover_every
        every = EPOCH if every == "epoch" else every
        first_genotype, first_norms = net.genotype(), norms(net)
        losses, lost, changed = [], [], []
        w_recovered = absolute_weights(net)  # after the last recovery
        ran = ran_before = active_pairs(net)  # ran_before: until the last multiple of EPOCH
        net.train()
        for step, (x, y) in zip(range(1, steps + 1), self.arch_batches.endless(), strict=False):
            for group, norm in zip(adam.param_groups, norms(net), strict=True):
                group["lr"] = rate * (norm / 0.1 if condition == "rate ∝ |b|" else 1)
            losses.append(search.arch_step(net, x, y, weights, adam, self.args)[0].item())
            if step % every == 0:
                nodes, rise = node_pairs(net), absolute_weights(net) - w_recovered
                final_norms = norms(net)
                if condition == "b scaled back":
                    factors = np.divide(first_norms, final_norms).tolist()
                    torch._foreach_mul_([b.data for b in net.arch_parameters()], factors)
                net.recover(self.args.solver)
                lost += losers(nodes, node_pairs(net), rise)
                w_recovered, ran = absolute_weights(net), ran | active_pairs(net)
            if step % EPOCH == 0:
                changed.append(len(active_pairs(net) - ran_before))
                ran_before = active_pairs(net)
        recoveries = range(every, steps - 4, every)
        return dict(
            ran=100 * len(ran) / PAIRS, losers=100 * float(np.mean(lost)) if lost else None,
            changed=float(np.mean(changed[-10:])), norm=float(np.mean(final_norms)),
            before=float(np.mean([losses[k - 5 : k] for k in recoveries])),
            after=float(np.mean([losses[k : k + 5] for k in recoveries])),
            genotypes=[genotypes.as_lists(g) for g in (first_genotype, net.genotype())])

    def directions(self, epochs):
        """Search for some epochs; return the mean squared cosines of ∇b, b and A's mean column."""
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


def node_pairs(net):
    """Return the active pairs (edge, operation index) of each of the 8 nodes."""
    return [list(node) for code in net.codes for node in code.support]


def active_pairs(net):
    """Return the active pairs of all nodes as a set of (node, edge, operation index)."""
    return {(j, *pair) for j, node in enumerate(node_pairs(net)) for pair in node}


def absolute_weights(net):
    return torch.cat([code.active_weights() for code in net.codes]).abs().numpy(force=True)


def norms(net):
    return [b.detach().norm().item() for b in net.arch_parameters()]


def losers(before, after, rise):
    """Return, for nodes that lost one of their two pairs, whether |w| of that pair rose less."""
    found = []
    for old, new, (rise0, rise1) in zip(before, after, rise, strict=True):
        stays = [pair in new for pair in old]
        if stays == [False, True]:
            found.append(bool(rise0 < rise1))
        elif stays == [True, False]:
            found.append(bool(rise1 < rise0))
    return found


def random_cells(n):
    return [genotypes.draw(5000 + k, distinct_edges=True) for k in range(n)]


def train(args):
    for item in unfinished(args, "train", [{"supernet": k} for k in range(args.supernets)]):
        supernet = Supernet(args, item["supernet"], seed=item["supernet"])
        supernet.train(args.supernet_epochs)
        losses, accuracies = zip(*map(supernet.measure, random_cells(args.cells)), strict=True)
        append_result(args, "train", item, losses=losses, accuracy=float(np.mean(accuracies)))


def walk(args):
    ready = {row["supernet"]: row["losses"] for row in read_results(args, "train")}
    if not ready:
        raise UserError("there is no trained supernet: run the part train first")
    items = [{"supernet": k, "search": i, "condition": name}
             for i in range(args.walks) for k in ready for name in CONDITIONS]
    for item in unfinished(args, "walk", items):
        k, i, condition = item.values()
        supernet = Supernet(args, k, 1000 * k + i, condition)
        supernet.load()
        outcomes = supernet.walk(condition, args.steps)
        losses = [supernet.measure(genotypes.from_lists(g))[0] for g in outcomes["genotypes"]]
        first, final = (100 - nasbench301.percentile(loss, ready[k]) for loss in losses)
        append_result(args, "walk", item, first=first, final=final, **outcomes)


def run_searches(args):
    names = [name for name in ("uniform", "normal", args.cure) if name]
    items = [{"condition": name, "seed": 2 + i} for i in range(args.seeds) for name in names]
    for item in unfinished(args, "search", items):
        name, seed = item.values()
        folder = Path(args.save, f"{name.replace(' ', '-')}-{seed}")
        search_flags = f"{args.search_flags} {CONDITIONS[name]} --distinct_edges --seed {seed}"
        evidence.finish("search.py", folder, search_flags, args)
        run = visualize.read_run(str(folder))
        append_result(args, "search", item, accuracy=run.metrics[-1]["valid_accuracy"],
            genotypes=[genotypes.as_lists(run.history[k].genotype) for k in (0, -1)])


def directions(args):
    items = [{"condition": name, "seed": 2 + i} for i in range(args.seeds) for name in DIRECTIONS]
    for item in unfinished(args, "directions", items):
        name, seed = item.values()
        outcomes = Supernet(args, seed, seed, name).directions(epochs=10)
        append_result(args, "directions", item, **outcomes)


def estimate(values):
    """Format mean ± standard error and the 95 % interval."""
    if len(values) < 2:
        return f"{np.mean(values):.2f}" if values else "–"
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    return f"{np.mean(values):.2f} ± {stats.sem(values):.2f} [{low:.2f} to {high:.2f}]"


def print_table(title, rows, columns):
    """Print the outcomes of each condition, and their paired differences from uniform."""
    def outcomes(condition, column):
        return {tuple(row.get(key) for key in ("supernet", "search", "seed")): row[column]
                for row in rows if row["condition"] == condition and row[column] is not None}

    if not rows:
        return
    print(f"\n{title}: mean ± standard error [95 % interval]")
    for name, count in Counter(row["condition"] for row in rows).items():
        print(f"{name}: {count} searches")
        for column, text in columns.items():
            own, uniform = outcomes(name, column), outcomes("uniform", column)
            line = f"    {text:<40}{estimate([*own.values()]):>34}"
            if name != "uniform":
                differences = [own[k] - uniform[k] for k in own if k in uniform]
                line += f"    − uniform: {estimate(differences)}"
            print(line)


def summarize(args):
    surrogate = None
    if args.nasbench:
        surrogate = nasbench301.Surrogate(Path(args.nasbench, "nb301-surrogate.onnx"),
                                          Path(args.nasbench, "encoding.json"))
    supernets, walks, searches = (read_results(args, part) for part in ("train", "walk", "search"))
    print(*{row["processor"] for row in supernets + walks + searches}, sep=", ")
    for row in supernets:
        rho = np.nan
        if surrogate:
            scores = [surrogate.accuracy(cell) for cell in random_cells(len(row["losses"]))]
            rho = stats.spearmanr(row["losses"], scores).statistic
        print(f"supernet {row['supernet']}: {row['accuracy']:.1f} % on test images, random cells; "
              f"Spearman's correlation of loss and NAS-Bench-301: {rho:.2f}")
    for row in walks + searches:
        early, last = map(genotypes.from_lists, row["genotypes"])
        row["early"] = surrogate.score(early)[1] if surrogate else None
        row["score"] = surrogate.score(last)[1] if surrogate else None
    print_table("(a) weights fixed, b alone moves", walks, {
        "first": "percentile of the loss, first cell", "final": "percentile, final cell",
        "score": "NAS-Bench-301 percentile, final cell", "ran": "pairs that ran, %",
        "losers": "replaced pairs that were losers, %",
        "changed": "pairs changed in 40 steps, last ten", "norm": "‖b‖ at the end",
        "before": "training loss before a recovery", "after": "training loss after a recovery"})
    print_table("(b) whole searches", searches, {
        "score": "NAS-Bench-301 percentile, last cell", "early": "the same after epoch 1",
        "accuracy": "held-out accuracy of the supernet, %"})
    print_table("(c) directions in R^m, mean squared cosine", read_results(args, "directions"), {
        "gradient": "∇b and the mean column", "point": "b and the mean column",
        "both": "b and ∇b"})


PARTS = {"train": train, "search": run_searches, "walk": walk, "directions": directions,
         "summary": summarize}


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
