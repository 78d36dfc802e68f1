"""What does the dictionary A do to a search? Idealized searches, without a network.

    python experiments/dictionary.py --quick                                       # seconds
    python experiments/dictionary.py --out numbers.json --picture dictionary.png   # minutes

Simulation. A node has n = 14, 21, 28 or 35 pairs (edge, operation), each with a merit v ~ N(0, 1).
A pair that has run for t steps is worth v − 2 exp(−t / 300), because its operation has to learn. As
in a search, z = argmin ½‖Az − b‖² + λ‖z‖₁, the two entries with the largest |z| (ties go to the
smaller index) are the support S, and w = A_Sᵀb − (A_SᵀA_S − I) z_S. Each step updates b by Adam
(learning rate 6e-4, betas 0.5 and 0.999, weight decay 1e-3) with the gradient of a loss through w,
with z constant. Each entry of the gradient in w gets normal noise of twice its size. b starts at
1e-3 N(0, 1); z and S are recovered after each of 50 epochs of 98 steps. λ = 1e-5, m = 7. Losses:

    shares     −Σ a v with a = w² / Σ w²: invariant to the scale of w, like a BatchNorm
    sizes      −Σ |w| v: w is unbounded
    squares    Σ (w − v)²: w has a target

The loss depends on the merits alone, so the search can only fail because of A, b and the recovery.
Nodes are independent, and two pairs may have the same edge. Figures are means ± standard errors
over nodes (for `loser`: over replaced pairs). All settings have the same seed, so the same merits
and, if m is the same, the same initial b. Tables:

    keeps      Random problems, b ~ N(0, 1): each coordinate of b moves by 0.07 ‖b‖, in the
               direction in which Adam moves it to increase one |w| and decrease the other.
               norm: of a column; cosine: mean |cosine| of two columns; crosstalk: root mean square
               of the off-diagonal entries of AᵀA. In %: opposite: entries of w and z with different
               signs; kept: change of |z|, one less the other, relative to that of |w|, a median;
               leaves: cases in which one of the two leaves S; loser: those in which it is the one
               to be decreased. λ = 1e-4 λ_max by default, λ_max = ‖Aᵀb‖∞ being the smallest λ with
               z = 0. Codes with fewer than two nonzero entries are skipped.
    searches   Idealized searches. Percentiles of the sum of the merits of S among all choices of
               two pairs of the node, after the first recovery (first) and after the last (last),
               and of the last sum over eight nodes among 2,000 random choices (cells); chance is
               50. In %: pairs of a node that ever ran (ran); cases in which the one pair that was
               replaced was the one whose |w| had risen less (loser).
    scale      The same with columns of one norm: entries uniform on [0, 1), centred (uniform less
               1/2) or normal, then scaled.
    factors    The same with one change at a time. With the loss `squares`, the merit is v², because
               the minimum of this loss is the sum of v² over the pairs outside of S.
"""

import io
import json
import os
import sys
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import ista
from harness import flags
from utils import UserError, write_file

EPOCH = 98  # steps: half of CIFAR-10's training images in batches of 256
RATE, BETAS, DECAY, EPSILON = 6e-4, (0.5, 0.999), 1e-3, 1e-8  # of Adam
NODES = 8  # of a normal and a reduction cell together
TWO_DIGITS = "norm", "cosine", "crosstalk"  # columns; the others are in %


class Setting(NamedTuple):
    """Parameters of a problem or a search; the defaults are those of the released code."""

    distribution: str = "uniform"  # of A: uniform on [0, 1), centred (uniform less 1/2) or normal
    factor: float = 1.0  # A is multiplied by it
    norm: float | None = None  # each column of A is scaled to it
    m: int = 7
    lam: float = 1e-5
    relative: bool = False  # whether lam is relative to λ_max
    every: int = EPOCH  # steps between two recoveries
    noise: float = 2.0
    fixed: bool = False  # whether noise is a standard deviation, not relative to the gradient
    loss: str = "shares"


DICTIONARIES = {
    "uniform": {},
    "uniform × 0.378": {"factor": 7**-0.5},
    "N(0, 1)": {"distribution": "normal"},
    "normal, norm 1": {"distribution": "normal", "norm": 1.0},
    "N(0, 1/7)": {"distribution": "normal", "factor": 7**-0.5},
}
NORMS = 0.25, 0.58, 1.0, 1.53, 2.65  # 0.58, 1.53, 2.65: those of uniform × 0.378, uniform, N(0, 1)
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
    """Return the settings of each table by name."""
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
                        help="64 nodes, and only the tables keeps and searches")
    parser.add_argument("--tables", nargs="+", choices=[*settings()], metavar="TABLE",
                        help=f"of {', '.join(settings())} (default: all)")
    parser.add_argument("--nodes", type=flags.integer(2 * NODES), default=640, metavar="N",
                        help="nodes of a search, a multiple of 8; the table keeps has 4 N problems")
    parser.add_argument("--epochs", type=flags.integer(1), default=50, metavar="N",
                        help="epochs of a search")
    parser.add_argument("--seed", type=flags.integer(0), default=0, metavar="N",
                        help="seed of each setting")
    parser.add_argument("--out", type=flags.nonempty, metavar="FILE.json",
                        help="write all numbers, those of searches for each epoch")
    parser.add_argument("--picture", type=flags.nonempty, metavar="FILE.png",
                        help="draw the table searches by epoch")
    parser.show_defaults({})
    return parser


def check(args):
    if args.quick and "nodes" not in args.typed:
        args.nodes = 64
    args.tables = args.tables or [*settings()][: 2 if args.quick else None]
    if args.nodes % NODES:
        raise UserError(f"--nodes must be a multiple of {NODES}, not {args.nodes}")
    if args.picture and "searches" not in args.tables:
        raise UserError("--picture draws the table searches: add it to --tables")
    for path in (args.out, args.picture):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"{path}: there is no such folder")


def draw_dictionary(setting, n, rng):
    size = setting.m, n
    A = rng.standard_normal(size) if setting.distribution == "normal" else rng.random(size)
    if setting.distribution == "centred":
        A = A - 0.5
    A = setting.factor * A
    return A if setting.norm is None else setting.norm * A / np.linalg.norm(A, axis=0)


def recover(setting, A, b, z0=None):
    """Return the code of b and its support."""
    lam = setting.lam * (np.abs(A.T @ b).max() if setting.relative else 1.0)
    z = ista.recover(A, b, lam, z0=z0).z
    return z, np.argsort(-np.abs(z), kind="stable")[:2]


def measure_recovery(setting, A, b, first_rises):
    """Return opposite, kept, leaves and loser of one problem; see the table keeps."""
    z, S = recover(setting, A, b)
    if not z[S].all():
        return [np.nan] * 4
    A_S, directions = A[:, S], np.array([1, -1] if first_rises else [-1, 1])  # of the two |w|
    w = A_S.T @ b - (A_S.T @ A_S @ z[S] - z[S])
    w_directions = directions * np.sign(w)
    b_new = b + 0.07 * np.linalg.norm(b) * np.sign(A_S @ w_directions)
    z_new, S_new = recover(setting, A, b_new)
    w_change = w_directions @ A_S.T @ (b_new - b)
    kept = directions @ (np.abs(z_new[S]) - np.abs(z[S])) / w_change
    stays = np.isin(S, S_new)
    opposite = (np.sign(w) != np.sign(z[S])).mean()
    return opposite, kept, stays.sum() == 1, np.array_equal(stays, directions > 0)


def measure_columns(A):
    """Return norm, cosine and crosstalk of a dictionary; see the table keeps."""
    norms, off_diagonal = np.linalg.norm(A, axis=0), ~np.eye(A.shape[1], dtype=bool)
    products = (A.T @ A)[off_diagonal]
    cosines = products / np.outer(norms, norms)[off_diagonal]
    return norms.mean(), np.abs(cosines).mean(), (products**2).mean() ** 0.5


def run_problems(setting, args):
    """Compute a row of the table keeps."""
    rng, found, columns = np.random.default_rng(args.seed), [], []
    for k in range(4 * args.nodes):
        A = draw_dictionary(setting, 7 * (2 + k % 4), rng)
        b = rng.standard_normal(setting.m)
        found.append(measure_recovery(setting, A, b, bool(rng.integers(2))))
        columns.append(measure_columns(A))
    found = 100 * np.array(found, dtype=float)
    opposite, kept, leaves, loser = found[~np.isnan(found[:, 0])].T
    norm, cosine, crosstalk = np.transpose(columns)
    medians = np.median(rng.choice(kept, (200, len(kept))), axis=1)  # bootstrap
    return {
        "norm": mean(norm), "cosine": mean(cosine), "crosstalk": mean(crosstalk),
        "opposite": mean(opposite), "kept": (np.median(kept), medians.std()),
        "leaves": mean(leaves), "loser": mean(loser[leaves > 0]),
    }


def mean(x):
    """Return mean and standard error, or nan for fewer than two values."""
    return (np.mean(x), stats.sem(x)) if len(x) > 1 else (np.nan, np.nan)


def loss_gradient(loss, w, v):
    """Return the gradient of a loss in w; all arrays are (nodes, 2)."""
    if loss == "shares":
        total = (w**2).sum(1, keepdims=True)
        return -2 * w / total * (v - (w**2 * v).sum(1, keepdims=True) / total)
    return -np.sign(w) * v if loss == "sizes" else 2 * (w - v)


def search(setting, merits, dictionaries, b, epochs, rng):
    """Search all nodes at once; merits and dictionaries are lists, b is (nodes, m).

    Returns, for the first recovery and each epoch, the supports, (epochs + 1, nodes, 2), and the
    fraction of the pairs that ever ran, (epochs + 1, nodes); whether each replaced pair was a
    loser; and the final b.
    """
    nodes, m = b.shape
    counts, row = np.array([len(v) for v in merits]), np.arange(nodes)[:, None]
    v, runs = np.zeros((2, nodes, counts.max()))  # runs: number of steps of each pair
    for k, merit in enumerate(merits):
        v[k, : counts[k]] = merit
    z, S, w_last = [None] * nodes, np.zeros((nodes, 2), dtype=int), None
    A_S, offset = np.zeros((nodes, m, 2)), np.zeros((nodes, 2))  # w = A_Sᵀb − offset
    first, second = np.zeros((2, nodes, m))  # Adam's moments
    supports, ran, lost = [], [], []
    for step in range(epochs * EPOCH + 1):
        w = np.einsum("kms,km->ks", A_S, b) - offset
        if step % setting.every == 0:
            S_last = S.copy()
            for k, A in enumerate(dictionaries):
                z[k], S[k] = recover(setting, A, b[k], z[k])
                A_S[k], z_S = A[:, S[k]], z[k][S[k]]
                offset[k] = A_S[k].T @ A_S[k] @ z_S - z_S
            if step:
                rise = np.abs(w) - np.abs(w_last)
                stays = (S_last[:, :, None] == S[:, None]).any(2)
                one_left = stays.sum(1) == 1
                rise, stays = rise[one_left], stays[one_left]
                lost += (rise[~stays] < rise[stays]).tolist()
            w = w_last = np.einsum("kms,km->ks", A_S, b) - offset
        if step % EPOCH == 0:
            supports.append(S.copy())
            new = (runs[row, S] == 0).sum(1)
            ran.append(((runs > 0).sum(1) + new) / counts)
        if step == epochs * EPOCH:
            return np.array(supports), np.array(ran), np.array(lost), b

        g = loss_gradient(setting.loss, w, v[row, S] - 2 * np.exp(-runs[row, S] / 300))
        g += setting.noise * (1.0 if setting.fixed else np.abs(g)) * rng.standard_normal(g.shape)
        g = np.einsum("kms,ks->km", A_S, g) + DECAY * b
        first = BETAS[0] * first + (1 - BETAS[0]) * g
        second = BETAS[1] * second + (1 - BETAS[1]) * g**2
        denominator = np.sqrt(second / (1 - BETAS[1] ** (step + 1))) + EPSILON
        b = b - RATE * first / (1 - BETAS[0] ** (step + 1)) / denominator
        runs[row, S] += 1


def percentiles(v, supports):
    """Return the percentiles of supports (k, 2) among all choices of two pairs, by merit."""
    i, j = np.triu_indices(len(v), 1)
    return stats.percentileofscore(v[i] + v[j], v[supports].sum(1), kind="mean")


def cell_percentiles(merits, supports, rng, draws=2000):
    """Return the percentile of each eight nodes together among random choices."""
    own = np.array([v[S].sum() for v, S in zip(merits, supports, strict=True)])
    others = np.array([v[rng.random((draws, len(v))).argsort(1)[:, :2]].sum(1) for v in merits])
    own, others = own.reshape(-1, NODES).sum(1), others.reshape(-1, NODES, draws).sum(1)
    return 100 * (others < own[:, None]).mean(1)


def run_search(setting, args):
    """Compute a row of the other tables; lists are written to --out only."""
    rng = np.random.default_rng(args.seed)
    merits = [rng.standard_normal(7 * (2 + k % 4)) for k in range(args.nodes)]
    b = 1e-3 * rng.standard_normal((args.nodes, setting.m))
    dictionaries = [draw_dictionary(setting, len(v), rng) for v in merits]
    supports, ran, lost, b = search(setting, merits, dictionaries, b, args.epochs, rng)
    if setting.loss == "squares":
        merits = [v**2 for v in merits]
    found = np.stack([percentiles(v, supports[:, k]) for k, v in enumerate(merits)], axis=1)
    cells = cell_percentiles(merits, supports[-1], rng)
    return {
        "first": mean(found[0]), "last": mean(found[-1]), "cells": mean(cells),
        "ran": mean(100 * ran[-1]), "loser": mean(100 * lost),
        "mean_by_epoch": found.mean(1).tolist(), "ran_by_epoch": (100 * ran.mean(1)).tolist(),
        "quartiles_by_epoch": np.percentile(found, [25, 50, 75], axis=1).T.tolist(),
        "nodes_at_end": found[-1].round(1).tolist(), "cells_at_end": cells.round(1).tolist(),
        "norm_of_b_at_end": np.linalg.norm(b, axis=1).round(4).tolist(),
    }


def draw_picture(rows):
    """Draw percentiles with quartiles by epoch for each dictionary, and the pairs that ever ran."""
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
    results = {"seed": args.seed, "nodes": args.nodes, "epochs": args.epochs}
    for table in args.tables:
        results[table] = {}
        for name, setting in settings()[table].items():
            row = run_problems(setting, args) if table == "keeps" else run_search(setting, args)
            cells = {column: x for column, x in row.items() if isinstance(x, tuple)}
            if not results[table]:
                print(f"{table:<46}" + "".join(f"{column:>12}" for column in cells))
            line = f"{name:<46}"
            for column, (x, error) in cells.items():
                digits = 2 if column in TWO_DIGITS else 1
                text = f"{x:.{digits}f} ±{error:.{digits}f}"
                line += f"{text:>12}"
            print(line, flush=True)
            results[table][name] = {"setting": setting._asdict(), **row}
        print(flush=True)
        if args.out:  # after each table, because the next one may take minutes
            write_file(args.out, json.dumps(results).encode())
    if args.picture:
        png = io.BytesIO()
        figure = draw_picture(results["searches"])
        figure.savefig(png, format="png", metadata={"Software": None})
        write_file(args.picture, png.getbuffer())


if __name__ == "__main__":
    parser = get_args_parser()
    args = parser.parse_args()
    try:
        main(args)
    except UserError as error:
        parser.error(error)
