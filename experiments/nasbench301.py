"""Score cells with NAS-Bench-301: the accuracy on CIFAR-10 that its surrogate model predicts.

    python experiments/nasbench301.py --model M.onnx --encoding E.json ISTA_twostage random:3
    python experiments/nasbench301.py --model M.onnx --encoding E.json runs/A runs/B -o scores.png

A genotype (a name, a file, random:SEED:distinct, a text) gets a line; of a search run every epoch
is scored, and -o draws the percentiles of the runs over their epochs, with the genotypes beside
them as horizontal lines. A percentile is the share of 2,000 random cells with distinct edges that
are predicted to be worse.

The surrogate stands for a training by the recipe of DARTS (98 epochs; Zela et al., ICLR 2022). It
knows only cells whose nodes have two different input nodes, as `search.py --distinct_edges` finds
them. It ranks the best cells poorly among each other, and rates cells full of skip connections far
too high, so it cannot tell whether a search collapsed to them. Model and encoding come from the
folder nb301 of https://github.com/slds-lmu/yahpo_data, and need onnxruntime.
"""

import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import genotypes
import visualize
from genotypes import NODES, by_node
from harness import flags
from utils import UserError

RANDOM_CELLS = 2000
EPOCHS = 98.0  # of the training that is predicted
PREFIX = "NetworkSelectorDatasetInfo_COLON_darts_COLON_"
CELLS = ("normal", "reduce")
EDGES = sum(range(2, 2 + NODES))  # of a cell: 14
CHOOSING = range(3, 2 + NODES)  # nodes with more than two possible inputs
COLUMNS = [f"edge_{cell}_{k}" for cell in CELLS for k in range(EDGES)] + [
    f"inputs_node_{cell}_{node}" for cell in CELLS for node in CHOOSING
]
ABSENT = "#na#"


def get_args_parser():
    parser = flags.Parser("nasbench301.py", __doc__, check=check)
    parser.usage = "nasbench301.py --model FILE --encoding FILE [-o FILE] RUN|GENOTYPE ..."
    parser.add_argument("what", nargs="+", metavar="RUN|GENOTYPE", help="folders of searches; "
                        "published names, random:SEED:distinct, genotype.json files, texts "
                        "'Genotype(...)'")
    parser.add_argument("--model", required=True, type=flags.name, metavar="FILE",
                        help="the surrogate (.onnx)")
    parser.add_argument("--encoding", required=True, type=flags.name, metavar="FILE",
                        help="the number of each of its categorical values (.json)")
    parser.add_argument("-o", "--output", type=flags.name, metavar="FILE",
                        help="a picture of the runs' percentiles (.png, .svg or .pdf)")
    return parser


def check(args):
    flags.check_file("--model", args.model)
    flags.check_file("--encoding", args.encoding)


# ------------------------------------------------------------------------------------------------
# The surrogate
# ------------------------------------------------------------------------------------------------


def describe(genotype):
    """A genotype in the terms of NAS-Bench-301: a dict of texts; UserError if it has no such form.

    `edge_normal_0` to `edge_reduce_13` are the operations of the edges in use; the edges into a
    node follow those into the nodes before it, ordered by input node. `inputs_node_normal_3` to
    `inputs_node_reduce_5` are the input nodes, as "0_2".
    """
    if len(genotype.normal) != 2 * NODES:
        raise UserError(f"{len(genotype.normal) // NODES} pairs a node, not 2")
    if not genotypes.has_distinct_edges(genotype):
        raise UserError("two pairs on one edge")
    values = {}
    for cell in CELLS:
        if sorted(getattr(genotype, f"{cell}_concat")) != list(range(2, 2 + NODES)):
            raise UserError("not all nodes are concatenated")
        first_edge = 0
        for node, pairs in enumerate(by_node(getattr(genotype, cell)), 2):
            values |= {f"edge_{cell}_{first_edge + source}": name for name, source in pairs}
            if node in CHOOSING:
                low, high = sorted(source for _, source in pairs)
                values[f"inputs_node_{cell}_{node}"] = f"{low}_{high}"
            first_edge += node
    return values


class Surrogate:
    """The model, and the 2,000 random cells that scores are compared with.

    Parameters
    ----------
    model : path
        ONNX: x_cat int32 (N, 34) and x_cont float32 (N, 1), the epoch; the first column of the
        first output is the accuracy in percent.
    encoding : path
        JSON: of each of the 34 inputs a dict from values to whole numbers.
    """

    def __init__(self, model, encoding):
        try:
            import onnxruntime
        except ImportError:
            raise UserError("this needs onnxruntime: pip install onnxruntime") from None
        self.codes = read_encoding(encoding)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.random = np.array([
            self.accuracy(genotypes.draw(seed, distinct_edges=True)) for seed in range(RANDOM_CELLS)
        ])

    def encode(self, genotype):
        """The 34 whole numbers that stand for a genotype; UserError where there are none."""
        values = describe(genotype)
        row = []
        for name, codes in zip(COLUMNS, self.codes, strict=True):
            value = values.get(name, ABSENT)
            if value not in codes:
                raise UserError(f"an operation it does not know: {value}")
            row.append(codes[value])
        return row

    def accuracy(self, genotype):
        """Predicted accuracy in percent; UserError where the genotype cannot be scored."""
        feed = {
            "x_cat": np.array([self.encode(genotype)], np.int32),
            "x_cont": np.array([[EPOCHS]], np.float32),
        }
        return float(self.session.run(None, feed)[0][0, 0])

    def score(self, genotype):
        """Predicted accuracy, and its percentile among the random cells."""
        accuracy = self.accuracy(genotype)
        return accuracy, percentile(accuracy, self.random)


def read_encoding(path):
    """The dict from values to numbers of each of `COLUMNS`."""
    with open(path, encoding="utf-8") as file:
        encoding = json.load(file)
    return [encoding[PREFIX + name] for name in COLUMNS]


def percentile(value, sample):
    """Percentage of a sample that is smaller than a value; equal ones count half."""
    sample = np.asarray(sample)
    return 100 * float((sample < value).mean() + (sample == value).mean() / 2)


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def read_search(path):
    """The genotype of each epoch of a search, by epoch, from the folder of its run."""
    found = {}
    with open(os.path.join(path, "genotypes.jsonl"), encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # the last one may still be on its way to the disk
                row = json.loads(line)
                found[row["epoch"]] = genotypes.from_lists(row)
    if not found:
        raise UserError(f"{path}: no epoch has ended yet")
    return found


def score_search(surrogate, search):
    """Accuracy and percentile of each epoch's genotype (nan where it has none), and why not."""
    scores, reasons = {}, {}
    for epoch, genotype in search.items():
        try:
            scores[epoch] = surrogate.score(genotype)
        except UserError as error:
            scores[epoch] = (np.nan, np.nan)
            reasons[epoch] = str(error)
    return scores, reasons


def run_table(runs):
    """Percentiles as text: a line for each epoch, a column for each run, then mean ± std."""
    epochs = sorted(set().union(*runs.values()))
    several = len(runs) > 1
    names = [os.path.basename(os.path.normpath(path)) for path in runs]
    width = max(15, *map(len, names))
    head = ["epoch", *(f"{name:>{width}}" for name in names)]
    lines = ["  ".join(head + [f"{'mean ± std':>{width}}"] * several)]
    for epoch in epochs:
        scores = [scores.get(epoch, (np.nan, np.nan)) for scores in runs.values()]
        texts = ["–" if np.isnan(acc) else f"{acc:.2f} % ({pct:.0f})" for acc, pct in scores]
        known = [pct for _, pct in scores if not np.isnan(pct)]
        if several:
            spread = f"{np.mean(known):.0f} ± {np.std(known, ddof=1):.0f}" if known[1:] else "–"
            texts.append(spread + f" of {len(known)}" * (1 < len(known) < len(runs)))
        lines.append("  ".join([f"{epoch:>5}", *(f"{text:>{width}}" for text in texts)]))
    return "\n".join(lines)


@visualize.style()
def figure(runs, references):
    """Draw percentile against epoch.

    `runs` are, of each path, the scores of `score_search`; `references` the percentiles of single
    genotypes, by name, drawn as horizontal lines.
    """
    drawn = visualize.new_figure(visualize.WIDTH, 2.8, layout="constrained")
    axes = drawn.subplots()
    for path, scores in runs.items():
        epochs = sorted(scores)
        axes.plot(epochs, [scores[epoch][1] for epoch in epochs], label=path,
                  linewidth=0.7 if len(runs) > 1 else 1)
    if len(runs) > 1:
        shared = sorted(set.intersection(*(set(scores) for scores in runs.values())))
        table = np.array([[scores[epoch][1] for epoch in shared] for scores in runs.values()])
        axes.plot(shared, table.mean(0), color="black", linewidth=1.8, label="mean")
    for k, (name, value) in enumerate(references.items()):
        axes.axhline(value, color="grey", linestyle=("--", "-.", ":")[k % 3], marker="", label=name)
    axes.axhline(50, color="#BBBBBB", marker="", linewidth=0.7, label="median random cell")
    axes.set(xlabel="epoch", ylim=(-2, 102))
    axes.set_title("predicted accuracy: percentile among random cells")
    axes.locator_params("x", integer=True, min_n_ticks=1)
    drawn.legend(loc="outside right upper")
    return drawn


def load(what):
    """`genotypes.load`, what is wrong with it as one line."""
    try:
        return genotypes.load(what)[0]
    except ValueError as error:
        raise UserError(error) from None


def main(args):
    paths = [what for what in args.what if os.path.exists(os.path.join(what, "genotypes.jsonl"))]
    searches = {path: read_search(path) for path in paths}
    loaded = {what: load(what) for what in args.what if what not in searches}
    # A text is too long for a table: its published name, or a hash.
    cells = {visualize.genotype_name(genotype) if "(" in what else what: genotype
             for what, genotype in loaded.items()}
    if args.output and not searches:
        raise UserError("-o draws runs over their epochs, and there is no folder of a search")
    surrogate = Surrogate(args.model, args.encoding)
    sample = surrogate.random
    print(f"{RANDOM_CELLS:,} random cells: {sample.mean():.2f} ± {sample.std(ddof=1):.2f} %, "
          f"best {sample.max():.2f} %; in brackets the percentile among them")

    references = {}
    width = max(map(len, cells), default=0)
    for name, genotype in cells.items():
        try:
            accuracy, references[name] = surrogate.score(genotype)
            print(f"{name:<{width}}  {accuracy:.2f} % ({references[name]:.0f})")
        except UserError as error:
            print(f"{name:<{width}}  not scorable: {error}")
    runs = {}
    for path, search in searches.items():
        runs[path], reasons = score_search(surrogate, search)
        if reasons:
            print(f"{path}: {len(reasons)} of {len(search)} epochs are not scorable: "
                  f"{', '.join(sorted(set(reasons.values())))}")
    if runs:
        print(run_table(runs))
    if args.output:
        visualize.save(figure(runs, references), args.output)
        print(args.output)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        flags.fail("nasbench301.py", error)
