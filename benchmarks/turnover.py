"""Which operations leave the cells of a search, and which come in?

    python benchmarks/turnover.py runs/A runs/B ...

From one epoch to the next a node keeps a pair (edge, operation), or another takes its place. What
comes in did not run before, so the search knows nothing of it: what comes in depends on the
dictionary and b alone. So a search can only find good operations by letting them stay. The table
counts, over all epochs of all runs, how often an operation was in a cell at the end of an epoch,
and which share of these had left by the end of the next, with its 95 % interval (Wilson 1927). Last
is how many came in; where all operations are equally likely, that is a seventh for each.
"""

import os
import sys
from collections import Counter

from scipy.stats import binomtest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import nasbench301

import arguments
from genotypes import NODES, PRIMITIVES
from utils import UserError

CELLS = ("normal", "reduce")


def get_args_parser():
    parser = arguments.Parser(prog="turnover.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of searches")
    return parser


def pairs(genotype, cell):
    """The (node, operation, input) of a cell, each once: a set."""
    chosen = getattr(genotype, cell)
    per_node = len(chosen) // NODES
    return {(k // per_node, *pair) for k, pair in enumerate(chosen)}


def count(search):
    """Count what stays, leaves and comes between the epochs of a search.

    Parameters
    ----------
    search : dict of genotypes.Genotype
        By epoch.

    Returns
    -------
    seen, left, came : Counters
        By (cell, operation): pairs that an epoch ended with and another followed; those of them
        that the next one ended without; those that it ended with anew.
    """
    seen, left, came = Counter(), Counter(), Counter()
    epochs = sorted(search)
    for now, then in zip(epochs, epochs[1:], strict=False):
        for cell in CELLS:
            before, after = pairs(search[now], cell), pairs(search[then], cell)
            seen.update((cell, op) for _, op, _ in before)
            left.update((cell, op) for _, op, _ in before - after)
            came.update((cell, op) for _, op, _ in after - before)
    return seen, left, came


def table(seen, left, came):
    """The text of the counts."""
    lines = [f"{'cell':<8}{'operation':<14}{'in a cell':>10}{'left':>6}{'share':>8}{'95 %':>12}"
             f"{'came in':>9}"]
    for cell in CELLS:
        for op in PRIMITIVES:
            n, k = seen[cell, op], left[cell, op]
            share = interval = "–"
            if n:
                found = binomtest(k, n).proportion_ci(method="wilson")
                share = f"{100 * k / n:.0f} %"
                interval = f"{100 * found.low:.0f} – {100 * found.high:.0f}"
            lines.append(f"{cell:<8}{op:<14}{n:>10}{k:>6}{share:>8}{interval:>12}"
                         f"{came[cell, op]:>9}")
    return "\n".join(lines)


def main(args):
    totals = Counter(), Counter(), Counter()
    for run in args.runs:
        for total, one in zip(totals, count(nasbench301.read_search(run)), strict=True):
            total.update(one)
    print(table(*totals))


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except UserError as error:
        arguments.fail("turnover.py", error)
