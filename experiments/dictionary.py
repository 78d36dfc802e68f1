"""What does the dictionary A do to a search? Idealised searches, without a network.

    python experiments/dictionary.py --quick                                       # seconds
    python experiments/dictionary.py --out numbers.json --picture dictionary.png   # minutes

What is simulated. A node has n = 14, 21, 28 or 35 pairs (edge, operation), by turns, each with a
merit v ~ N(0, 1). A pair that has run for t steps is worth v − 2 exp(−t / 300) as yet, for its
operation has to learn. As in a search, z = argmin ½‖Az − b‖² + λ‖z‖₁, the two entries largest in
|z| (ties to the smaller index) are the support S, and w = A_Sᵀb − (A_SᵀA_S − I) z_S. In each step
Adam moves b (rate 6e-4, betas 0.5 and 0.999, weight decay 1e-3) by the gradient of a loss through
this w, with z held constant; to each of the two entries of the gradient in w comes normal noise of
twice its size. b begins at 1e-3 N(0, 1); z and S are recovered after each epoch of 98 steps, 50
times. λ = 1e-5, m = 7. The loss is one of

    shares     −Σ a v with a = w² / Σ w²: the scale of w is free, as before a BatchNorm
    sizes      −Σ |w| v: it is not, and w has no bound
    squares    Σ (w − v)²: it is not, and w has an aim

A loss knows nothing but the merits, so what such a search misses is the fault of A, b and the
recoveries. Nodes do not touch each other, and two pairs may share an edge. Chance is 50 %; figures
are means ± standard errors over nodes (of `loser`: over the pairs that left). All points have the
same seed, so the same merits and, if m is the same, the same first b. The tables:

    keeps      Random problems, b ~ N(0, 1): each coordinate of b moves by 0.07 ‖b‖ as Adam moves it
               where one of the two |w| is to rise and the other to fall. Of A: the norm of a
               column (norm), the |cosine| of two (cosine) and the root mean square of AᵀA off its
               diagonal (crosstalk). Then, in %: how often w and z differ in sign (opposite); the
               change of |z|, of the one less the other, as a share of that of |w|, a median
               (kept); how often one of the two leaves (leaves); how often that is the one that
               was to fall (loser). λ = 1e-4 λ_max where no other is named: λ_max = ‖Aᵀb‖∞ is the
               least at which z = 0. Codes with less than two nonzero entries are left out.
    searches   Idealised searches. In %: where the merit of a node's two pairs, their sum, stands
               among all choices of two of its pairs, after the first recovery (first) and after
               the last (last); where the last sum over eight nodes, those of two cells, stands
               among 2,000 random choices (cells); the pairs of a node that ever ran (ran); how
               often, when one of the two left, it was the one whose |w| had fallen against the
               other's (loser).
    scale      The same for columns of one norm each: entries uniform on [0, 1), centred (these
               less 1/2) or normal, then scaled.
    factors    The same with one thing changed at a time. With the loss `squares` merit is v², for
               at its least this loss is the sum of v² over the pairs that do not run.
"""

import io
import json
import os
import sys
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import ista
from harness import flags
from utils import UserError, write_file

EPOCH = 98  # steps: half of CIFAR-10's training images in batches of 256
RATE, BETAS, DECAY, EPSILON = 6e-4, (0.5, 0.999), 1e-3, 1e-8  # of Adam
CELLS = 8  # nodes of a normal and a reduction cell
TWO_DIGITS = "norm", "cosine", "crosstalk"  # columns; all others are in %


class Setting(NamedTuple):
    """All that the tables change; the defaults are as released."""

    distribution: str = "uniform"  # of A: uniform on [0, 1), centred (that less 1/2), or normal
    factor: float = 1.0  # of A
    norm: float | None = None  # to which each column of A is scaled
    m: int = 7
    lam: float = 1e-5
    relative: bool = False  # lam is a share of λ_max
    every: int = EPOCH  # steps from one recovery to the next
    noise: float = 2.0
    fixed: bool = False  # noise is a standard deviation itself, not a multiple of the gradient
    loss: str = "shares"


DICTIONARIES = {
    "uniform": {},
    "uniform × 0.378": {"factor": 7**-0.5},
    "N(0, 1)": {"distribution": "normal"},
    "normal, norm 1": {"distribution": "normal", "norm": 1.0},
    "N(0, 1/7)": {"distribution": "normal", "factor": 7**-0.5},
}
NORMS = 0.25, 0.58, 1.0, 1.53, 2.65  # 0.58, 1.53, 2.65: of uniform × 0.378, uniform and N(0, 1)
SHARES = {f"λ = {share:g} λ_max": {"lam": share, "relative": True} for share in (0.1, 0.3)}
LENGTHS = {f"m = {m}": {"m": m} for m in (4, 14)}
FACTORS = {
    "recovery every 490 steps": {"every": 490},
    "recovery every 10 steps": {"every": 10},
    "no noise": {"noise": 0.0},
    "noise 10 times the gradient": {"noise": 10.0},
    **{f"noise of size {size:g}": {"noise": size, "fixed": True} for size in (20.0, 200.0, 2000.0)},
    "loss sizes": {"loss": "sizes"},
    "loss squares": {"loss": "squares"},
    **SHARES, **LENGTHS,
}


def settings():
    """The rows of each table, by name."""
    base = {name: Setting(**change) for name, change in DICTIONARIES.items()}
    keeps = {name: one._replace(lam=1e-4, relative=True) for name, one in base.items()}
    for name in ("uniform", "normal, norm 1"):
        for factor, change in {**SHARES, **LENGTHS}.items():
            keeps[f"{name}, {factor}"] = keeps[name]._replace(**change)
    return {
        "keeps": keeps,
        "searches": base,
        "scale": {f"{name}, norm {norm:g}": Setting(distribution=name, norm=norm)
                  for norm in NORMS for name in ("uniform", "centred", "normal")},
        "factors": {f"{factor}: {name}": base[name]._replace(**change)
                    for factor, change in FACTORS.items() for name in [*DICTIONARIES][:4]},
    }


def get_args_parser():
    parser = flags.Parser(prog="dictionary.py", description=__doc__, check=check)
    parser.add_argument("--quick", action="store_true", default=False,
                        help="64 nodes, and no more than the tables keeps and searches")
    parser.add_argument("--tables", nargs="+", choices=[*settings()], metavar="TABLE",
                        help="only these")
    parser.add_argument("--nodes", type=flags.whole(2 * CELLS), default=640, metavar="N",
                        help="of a search, a multiple of 8; the table keeps has 4 N problems")
    parser.add_argument("--epochs", type=flags.whole(1), default=50, metavar="N",
                        help="of a search")
    parser.add_argument("--seed", type=flags.whole(0), default=0, metavar="N",
                        help="of every point")
    parser.add_argument("--out", type=flags.name, metavar="FILE.json",
                        help="keep all numbers there, and the course of searches by epoch")
    parser.add_argument("--picture", type=flags.name, metavar="FILE.png",
                        help="draw the table searches by epoch")
    parser.show_defaults({})
    return parser


def check(args):
    if args.quick and "nodes" not in args.typed:
        args.nodes = 64
    args.tables = args.tables or [*settings()][: 2 if args.quick else None]
    if args.nodes % CELLS:
        raise UserError(f"--nodes must be a multiple of {CELLS}, not {args.nodes}")
    if args.picture and "searches" not in args.tables:
        raise UserError("--picture draws the table searches: name it in --tables")
    for path in (args.out, args.picture):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"{path}: there is no such folder")


# ------------------------------------------------------------------------------------------------
# Dictionaries, and what a recovery keeps
# ------------------------------------------------------------------------------------------------


def draw(setting, n, rng):
    """A dictionary of n columns."""
    size = setting.m, n
    A = rng.standard_normal(size) if setting.distribution == "normal" else rng.random(size)
    A = setting.factor * (A - 0.5 if setting.distribution == "centred" else A)
    return A if setting.norm is None else setting.norm * A / np.linalg.norm(A, axis=0)


def recover(setting, A, b, z0=None):
    """The code of b, and its support."""
    lam = setting.lam * (np.abs(A.T @ b).max() if setting.relative else 1.0)
    z = ista.recover(A, b, lam, z0=z0).z
    return z, np.argsort(-np.abs(z), kind="stable")[:2]


def keep(setting, A, b, first_rises):
    """What the table keeps counts in one problem: opposite, kept, leaves, loser."""
    z, S = recover(setting, A, b)
    if not z[S].all():
        return [np.nan] * 4
    A_S, sides = A[:, S], np.array([1, -1] if first_rises else [-1, 1])
    w = A_S.T @ b - (A_S.T @ A_S @ z[S] - z[S])
    up = sides * np.sign(w)  # where the loss wants w to go
    moved = b + 0.07 * np.linalg.norm(b) * np.sign(A_S @ up)
    new, S_new = recover(setting, A, moved)
    kept = sides @ (np.abs(new[S]) - np.abs(z[S])) / (up @ A_S.T @ (moved - b))
    stays = np.isin(S, S_new)
    opposite = (np.sign(w) != np.sign(z[S])).mean()
    return opposite, kept, stays.sum() == 1, np.array_equal(stays, sides > 0)


def shape(A):
    """Mean norm of the columns, mean |cosine| of two, root mean square of AᵀA off its diagonal."""
    norms, off = np.linalg.norm(A, axis=0), ~np.eye(A.shape[1], dtype=bool)
    products = (A.T @ A)[off]
    cosines = products / np.outer(norms, norms)[off]
    return norms.mean(), np.abs(cosines).mean(), (products**2).mean() ** 0.5


def keeps(setting, args):
    """A row of the table keeps."""
    rng, found, shapes = np.random.default_rng(args.seed), [], []
    for k in range(4 * args.nodes):
        A, b = draw(setting, 7 * (2 + k % 4), rng), rng.standard_normal(setting.m)
        found.append(keep(setting, A, b, bool(rng.integers(2))))
        shapes.append(shape(A))
    found = 100 * np.array(found, dtype=float)
    opposite, kept, leaves, loser = found[~np.isnan(found[:, 0])].T
    norm, cosine, crosstalk = np.transpose(shapes)
    medians = np.median(rng.choice(kept, (200, len(kept))), axis=1)  # bootstrap
    return {
        "norm": mean(norm), "cosine": mean(cosine), "crosstalk": mean(crosstalk),
        "opposite": mean(opposite), "kept": (np.median(kept), medians.std()),
        "leaves": mean(leaves), "loser": mean(loser[leaves > 0]),
    }


def mean(x):
    """Mean and standard error; of fewer than two, nan."""
    return (np.mean(x), np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else (np.nan, np.nan)


# ------------------------------------------------------------------------------------------------
# The idealised search
# ------------------------------------------------------------------------------------------------


def slope(loss, w, v):
    """Gradient in w of a loss, of nodes side by side: all (nodes, 2)."""
    if loss == "shares":
        total = (w**2).sum(1, keepdims=True)
        return -2 * w / total * (v - (w**2 * v).sum(1, keepdims=True) / total)
    return -np.sign(w) * v if loss == "sizes" else 2 * (w - v)


def search(setting, merits, dictionaries, b, epochs, rng):
    """Search, all nodes side by side; merits and dictionaries are lists, b is (nodes, m).

    Returns the supports from the first recovery on, after each epoch, (epochs + 1, nodes, 2); the
    share of its pairs that a node has run until then, (epochs + 1, nodes); of each pair that left
    without the other whether it had lost; and the last b.
    """
    nodes, m = b.shape
    counts, row = np.array([len(v) for v in merits]), np.arange(nodes)[:, None]
    v, runs = np.zeros((2, nodes, counts.max()))  # runs: steps that a pair has run
    for k, merit in enumerate(merits):
        v[k, : counts[k]] = merit
    z, S, w_then = [None] * nodes, np.zeros((nodes, 2), dtype=int), None
    A_S, offset = np.zeros((nodes, m, 2)), np.zeros((nodes, 2))  # w = A_Sᵀb − offset
    first, second = np.zeros((2, nodes, m))  # Adam's moments
    supports, ran, lost = [], [], []
    for step in range(epochs * EPOCH + 1):
        w = np.einsum("kms,km->ks", A_S, b) - offset
        if step % setting.every == 0:
            S_then = S.copy()
            for k, A in enumerate(dictionaries):
                z[k], S[k] = recover(setting, A, b[k], z[k])
                A_S[k], z_S = A[:, S[k]], z[k][S[k]]
                offset[k] = A_S[k].T @ A_S[k] @ z_S - z_S
            if step:
                rise = np.abs(w) - np.abs(w_then)
                stays = (S_then[:, :, None] == S[:, None]).any(2)
                alone = stays.sum(1) == 1
                lost += (rise[alone][~stays[alone]] < rise[alone][stays[alone]]).tolist()
            w = w_then = np.einsum("kms,km->ks", A_S, b) - offset
        if step % EPOCH == 0:
            supports.append(S.copy())
            new = (runs[row, S] == 0).sum(1)
            ran.append(((runs > 0).sum(1) + new) / counts)
        if step == epochs * EPOCH:
            return np.array(supports), np.array(ran), np.array(lost), b

        g = slope(setting.loss, w, v[row, S] - 2 * np.exp(-runs[row, S] / 300))
        g += setting.noise * (1.0 if setting.fixed else np.abs(g)) * rng.standard_normal(g.shape)
        g = np.einsum("kms,ks->km", A_S, g) + DECAY * b
        first = BETAS[0] * first + (1 - BETAS[0]) * g
        second = BETAS[1] * second + (1 - BETAS[1]) * g**2
        size = np.sqrt(second / (1 - BETAS[1] ** (step + 1))) + EPSILON
        b = b - RATE * first / (1 - BETAS[0] ** (step + 1)) / size
        runs[row, S] += 1


def percentiles(v, supports):
    """Of supports (k, 2): the share of all choices of two with less merit, ties by half, in %."""
    i, j = np.triu_indices(len(v), 1)
    sums, own = np.sort(v[i] + v[j]), v[supports].sum(1)
    return 50 * sum(np.searchsorted(sums, own, side) for side in ("left", "right")) / len(sums)


def cell_percentiles(merits, supports, rng, draws=2000):
    """The same of each eight nodes together, among random choices; supports is (nodes, 2)."""
    own = np.array([v[S].sum() for v, S in zip(merits, supports, strict=True)])
    others = np.array([v[rng.random((draws, len(v))).argsort(1)[:, :2]].sum(1) for v in merits])
    own, others = own.reshape(-1, CELLS).sum(1), others.reshape(-1, CELLS, draws).sum(1)
    return 100 * (others < own[:, None]).mean(1)


def searches(setting, args):
    """A row of the other tables, and of what is not printed the course by epoch and the end."""
    rng = np.random.default_rng(args.seed)
    merits = [rng.standard_normal(7 * (2 + k % 4)) for k in range(args.nodes)]
    b = 1e-3 * rng.standard_normal((args.nodes, setting.m))
    dictionaries = [draw(setting, len(v), rng) for v in merits]
    supports, ran, lost, b = search(setting, merits, dictionaries, b, args.epochs, rng)
    worth = [v**2 for v in merits] if setting.loss == "squares" else merits
    found = np.stack([percentiles(v, supports[:, k]) for k, v in enumerate(worth)], axis=1)
    cells = cell_percentiles(worth, supports[-1], rng)
    return {
        "first": mean(found[0]), "last": mean(found[-1]), "cells": mean(cells),
        "ran": mean(100 * ran[-1]), "loser": mean(100 * lost),
        "mean_by_epoch": found.mean(1).tolist(), "ran_by_epoch": (100 * ran.mean(1)).tolist(),
        "quartiles_by_epoch": np.percentile(found, [25, 50, 75], axis=1).T.tolist(),
        "nodes_at_end": found[-1].round(1).tolist(), "cells_at_end": cells.round(1).tolist(),
        "norm_of_b_at_end": np.linalg.norm(b, axis=1).round(4).tolist(),
    }


# ------------------------------------------------------------------------------------------------
# Tables and the picture
# ------------------------------------------------------------------------------------------------


def picture(rows):
    """Percentile by epoch of each dictionary, with its quartiles, and the share that ever ran."""
    style = {
        "font.size": 7, "axes.titlelocation": "left", "axes.axisbelow": True, "axes.grid": True,
        "grid.color": "#E4E4E4", "lines.linewidth": 1.2, "legend.frameon": False,
    }
    with matplotlib.style.context(style, after_reset=True):
        figure = Figure((6.9, 4), layout="constrained", dpi=200)
        *panels, last = figure.subplots(2, 3, sharex=True, sharey=True).flat
        for k, (axes, (name, row)) in enumerate(zip(panels, rows.items(), strict=True)):
            low, _, high = np.transpose(row["quartiles_by_epoch"])
            axes.fill_between(range(len(low)), low, high, color=f"C{k}", alpha=0.2, linewidth=0)
            for other in rows.values():
                axes.plot(other["mean_by_epoch"], color="#AAAAAA", linewidth=0.5)
            axes.plot(row["mean_by_epoch"], color=f"C{k}")
            axes.axhline(50, color="black", linewidth=0.7, linestyle=":")
            axes.set_title(f"{name}: {row['last'][0]:.0f} at the end")
            last.plot(row["ran_by_epoch"], color=f"C{k}", label=name)
        last.set_title("pairs that ever ran, %")
        last.legend(loc="upper left", ncols=2, fontsize=6, columnspacing=1, handlelength=1.2)
        last.set(xlim=(0, len(low) - 1), ylim=(0, 100))
        figure.supxlabel("epoch", fontsize=7)
        figure.supylabel("percentile of a node's two pairs: mean, quartiles", fontsize=7)
    return figure


def main(args):
    done = {"seed": args.seed, "nodes": args.nodes, "epochs": args.epochs}
    for table in args.tables:
        done[table] = {}
        for name, setting in settings()[table].items():
            row = keeps(setting, args) if table == "keeps" else searches(setting, args)
            figures = {column: x for column, x in row.items() if isinstance(x, tuple)}
            if not done[table]:
                print(f"{table:<46}" + "".join(f"{column:>12}" for column in figures))
            texts = (f"{x:.{digits}f} ±{error:.{digits}f}" for column, (x, error) in figures.items()
                     for digits in [1 + (column in TWO_DIGITS)])
            print(f"{name:<46}" + "".join(f"{text:>12}" for text in texts), flush=True)
            done[table][name] = {"setting": setting._asdict(), **row}
        print(flush=True)
        if args.out:  # after each table, for the next one may take minutes
            write_file(args.out, json.dumps(done).encode())
    if args.picture:
        png = io.BytesIO()
        picture(done["searches"]).savefig(png, format="png", metadata={"Software": None})
        write_file(args.picture, png.getbuffer())


if __name__ == "__main__":
    parser = get_args_parser()
    args = parser.parse_args()
    try:
        main(args)
    except UserError as error:
        parser.error(error)
