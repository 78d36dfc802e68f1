"""Score cells with the NAS-Bench-301 surrogate, which predicts their accuracy on CIFAR-10.

    python experiments/nasbench301.py --model M.onnx --encoding E.json ISTA_twostage random:3
    python experiments/nasbench301.py --model M.onnx --encoding E.json runs/A runs/B -o scores.png

The script prints a line for each genotype, and scores every epoch of a search run. With -o it draws
the percentiles of the runs against the epoch, and the genotypes as horizontal lines. A percentile
is the percentage of 2,000 random cells with distinct edges whose predicted accuracy is lower.

The surrogate predicts the result of training with the recipe of DARTS (98 epochs; Zela et al., ICLR
2022). It supports only cells whose nodes have two different input nodes, as found by `search.py
--distinct_edges`. It ranks the best cells poorly, and rates cells full of skip connections far too
high, so it cannot detect a collapse of the search to such cells. Model and encoding are in the
folder nb301 of https://github.com/slds-lmu/yahpo_data; they need onnxruntime.
"""

import json
import os
import sys

import numpy as np
from scipy import stats

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import genotypes
import visualize
from genotypes import NODES, by_node
from harness import flags
from utils import UserError

RANDOM_CELLS = 2000
EPOCHS = 98.0  # of the predicted training
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
    parser.add_argument("what", nargs="+", metavar="RUN|GENOTYPE", help="run folders of searches, "
                        "published names, random:SEED:distinct, genotype.json files, or texts "
                        "'Genotype(...)'")
    parser.add_argument("--model", required=True, type=flags.nonempty, metavar="FILE",
                        help="the surrogate (.onnx)")
    parser.add_argument("--encoding", required=True, type=flags.nonempty, metavar="FILE",
                        help="the encoding of its categorical inputs (.json)")
    parser.add_argument("-o", "--output", type=flags.nonempty, metavar="FILE",
                        help="plot of the percentiles of the runs (.png, .svg or .pdf)")
    return parser


def check(args):
    flags.check_file("--model", args.model)
    flags.check_file("--encoding", args.encoding)


def describe(genotype):
    """Convert a genotype to the dict of strings that describes it in NAS-Bench-301."""
    if len(genotype.normal) != 2 * NODES:
        raise UserError(f"{len(genotype.normal) // NODES} pairs a node, not 2")
    if not genotypes.has_distinct_edges(genotype):
        raise UserError("two pairs on one edge")
    values = {}
    for cell in CELLS:
        if sorted(getattr(genotype, f"{cell}_concat")) != list(range(2, 2 + NODES)):
            raise UserError("not all nodes are concatenated")
        first_edge = 0  # edges are ordered by their node, then by its input node
        for node, pairs in enumerate(by_node(getattr(genotype, cell)), 2):
            for operation, source in pairs:
                values[f"edge_{cell}_{first_edge + source}"] = operation
            if node in CHOOSING:
                low, high = sorted(source for _, source in pairs)
                values[f"inputs_node_{cell}_{node}"] = f"{low}_{high}"
            first_edge += node
    return values


class Surrogate:
    """The ONNX model, and its predictions for 2,000 random cells.

    Inputs are x_cat, int32 (N, 34), and x_cont, float32 (N, 1), the epoch; the first column of the
    first output is the accuracy in percent. The encoding maps the values of each categorical input
    to integers.
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
        """Return the 34 integers of a genotype; UserError if it cannot be encoded."""
        values = describe(genotype)
        row = []
        for name, codes in zip(COLUMNS, self.codes, strict=True):
            value = values.get(name, ABSENT)
            if value not in codes:
                raise UserError(f"unknown operation: {value}")
            row.append(codes[value])
        return row

    def accuracy(self, genotype):
        """Predict the accuracy in percent; UserError if the genotype cannot be scored."""
        feed = {
            "x_cat": np.array([self.encode(genotype)], np.int32),
            "x_cont": np.array([[EPOCHS]], np.float32),
        }
        return float(self.session.run(None, feed)[0][0, 0])

    def score(self, genotype):
        """Return the predicted accuracy and its percentile among the random cells."""
        accuracy = self.accuracy(genotype)
        return accuracy, percentile(accuracy, self.random)


def read_encoding(path):
    """Return the dict from values to integers for each of `COLUMNS`."""
    with open(path, encoding="utf-8") as file:
        encoding = json.load(file)
    return [encoding[PREFIX + name] for name in COLUMNS]


def percentile(value, sample):
    """Return the percentage of a sample below a value; ties count half."""
    return float(stats.percentileofscore(sample, value, kind="mean"))


def read_search(path):
    """Read the genotype of each epoch of a search from its run folder."""
    found = {}
    with open(os.path.join(path, "genotypes.jsonl"), encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # the search may be writing the last line
                row = json.loads(line)
                found[row["epoch"]] = genotypes.from_lists(row)
    if not found:
        raise UserError(f"{path}: no epoch has ended yet")
    return found


def score_search(surrogate, search):
    """Score each epoch: (accuracy, percentile) or nan, and the reasons of the latter."""
    scores, reasons = {}, {}
    for epoch, genotype in search.items():
        try:
            scores[epoch] = surrogate.score(genotype)
        except UserError as error:
            scores[epoch] = (np.nan, np.nan)
            reasons[epoch] = str(error)
    return scores, reasons


def format_table(runs):
    """Format the scores: a line for each epoch, a column for each run, then mean ± std."""
    names = [os.path.basename(os.path.normpath(path)) for path in runs]
    width = max(15, *map(len, names))
    rows = [["epoch", *names] + ["mean ± std"] * (len(runs) > 1)]
    for epoch in sorted(set().union(*runs.values())):
        scores = [scores.get(epoch, (np.nan, np.nan)) for scores in runs.values()]
        texts = ["–" if np.isnan(acc) else f"{acc:.2f} % ({pct:.0f})" for acc, pct in scores]
        if len(runs) > 1:
            known = [pct for _, pct in scores if not np.isnan(pct)]
            text = f"{np.mean(known):.0f} ± {np.std(known, ddof=1):.0f}" if known[1:] else "–"
            texts.append(text + f" of {len(known)}" * (1 < len(known) < len(runs)))
        rows.append([f"{epoch:>5}", *texts])
    return "\n".join("  ".join([row[0], *(f"{text:>{width}}" for text in row[1:])])
                     for row in rows)


@visualize.style()
def figure(runs, references):
    """Draw percentiles against epochs: scores of runs by path, percentiles of genotypes by name."""
    drawn = visualize.new_figure(visualize.WIDTH, 2.8, layout="constrained")
    axes = drawn.subplots()
    for path, scores in runs.items():
        epochs = sorted(scores)
        axes.plot(epochs, [scores[epoch][1] for epoch in epochs], label=path,
                  linewidth=0.7 if len(runs) > 1 else 1)
    if len(runs) > 1:
        common = sorted(set.intersection(*map(set, runs.values())))
        means = [np.mean([scores[epoch][1] for scores in runs.values()]) for epoch in common]
        axes.plot(common, means, color="black", linewidth=1.8, label="mean")
    for k, (name, value) in enumerate(references.items()):
        axes.axhline(value, color="grey", linestyle=("--", "-.", ":")[k % 3], marker="", label=name)
    axes.axhline(50, color="#BBBBBB", marker="", linewidth=0.7, label="median random cell")
    axes.set(xlabel="epoch", ylim=(-2, 102))
    axes.set_title("predicted accuracy: percentile among random cells")
    axes.locator_params("x", integer=True, min_n_ticks=1)
    drawn.legend(loc="outside right upper")
    return drawn


def load_genotypes(texts):
    """Load genotypes by name; those given as a text are named by their position."""
    found = {}
    for text in texts:
        try:
            genotype, _ = genotypes.load(text)
        except ValueError as error:
            raise UserError(error) from None
        found[f"cell {len(found) + 1}" if "Genotype(" in text else text] = genotype
    return found


def main(args):
    paths = [what for what in args.what if os.path.exists(os.path.join(what, "genotypes.jsonl"))]
    searches = {path: read_search(path) for path in paths}
    cells = load_genotypes(what for what in args.what if what not in searches)
    if args.output and not searches:
        raise UserError("-o draws the epochs of runs, but no run folder of a search is given")
    surrogate = Surrogate(args.model, args.encoding)
    sample = surrogate.random
    print(f"{RANDOM_CELLS:,} random cells: {sample.mean():.2f} ± {sample.std(ddof=1):.2f} %, "
          f"best {sample.max():.2f} %; percentiles among them in parentheses")

    references = {}
    width = max(map(len, cells), default=0)
    for name, genotype in cells.items():
        try:
            accuracy, references[name] = surrogate.score(genotype)
            print(f"{name:<{width}}  {accuracy:.2f} % ({references[name]:.0f})")
        except UserError as error:
            print(f"{name:<{width}}  cannot be scored: {error}")
    runs = {}
    for path, search in searches.items():
        runs[path], reasons = score_search(surrogate, search)
        if reasons:
            print(f"{path}: {len(reasons)} of {len(search)} epochs cannot be scored: "
                  f"{', '.join(sorted(set(reasons.values())))}")
    if runs:
        print(format_table(runs))
    if args.output:
        visualize.save(figure(runs, references), args.output)
        print(args.output)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        flags.fail("nasbench301.py", error)
