"""Draw the cells of a genotype, the pictures of a run, several runs, or how the method works.

    python visualize.py runs/NAME/genotype.json -o cells.pdf  # its two cells, for a paper
    python visualize.py ISTA_twostage --stacked               # a published one, a column wide
    python visualize.py runs/NAME                             # all pictures of a run
    python visualize.py runs/A runs/B runs/C                  # runs/A/compare.png, and a table
    python visualize.py --method                              # compressed point, code, cell

A search has cells.png (the final cells and those after the first epoch), search.png (what every
node chose in every epoch) and curves.png; a training has cells.png and curves.png. A run that is
not over can be drawn too. --method draws how one node's two operations come out of the normal
cell's point b, dictionary A and code z: those of a search (--method runs/NAME), else of an example.
Pictures are drawn anew each time, over the ones that are there; nothing is ever written that does
not end in .png, .svg or .pdf.
"""

import contextlib
import hashlib
import json
import os
from collections import defaultdict, namedtuple
from statistics import fmean, stdev

import arguments
import explain
import genotypes
from cells import CELLS, COLUMN, WIDTH, cells_figure, epoch_axis, new_figure, search_figure, style
from checkpoints import MISSING, count, departure
from genotypes import NODES
from utils import UserError, replacing

# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------

Record = namedtuple("Record", "path name config metrics history genotype search one_stage end")
Choice = namedtuple("Choice", "epoch genotype weights")  # weights: {"normal": list or None, ...}


def of_nodes(value):
    """Whether this is a list of a number for each node."""
    numbers = isinstance(value, list) and [x for x in value if isinstance(x, int | float)]
    return numbers == value and len(value) == 2 * NODES


# What is relied on; rows of .jsonl files, and a config.json, that depart from it are left out.
NUMBER = MISSING, None, int, float
ROW = {
    "epoch": count, "seconds": NUMBER, "parameters": NUMBER, "multiply_adds": NUMBER,
    "distance": (MISSING, None, of_nodes), "frozen": (MISSING, None, of_nodes),
    **{f"{cell}_weights": (MISSING, None, [int, float]) for cell in CELLS},
}
CONFIG = {"epochs": (MISSING, count), "one_stage": (MISSING, bool), "freeze_tol": NUMBER}


def read_run(path):
    """Read the folder of a run, which may still be running.

    Parameters
    ----------
    path : str

    Returns
    -------
    Record
        path, name; config: dict of its arguments; metrics: one dict an epoch; history: one Choice
        an epoch, of a search; genotype: the last one, or None; search, one_stage: whether it is
        a search, and a one-stage one; end: the epoch in which a one-stage search fixed its
        architecture, else None.

    Raises
    ------
    UserError
        If there is no such folder, it is not that of a run, or no epoch has ended.
    """
    if not os.path.isdir(path):
        raise UserError(f"{path}: there is no such run folder")
    names = ("metrics.jsonl", "config.json", "genotypes.jsonl", "genotype.json")
    files = [os.path.join(path, name) for name in names]
    if not os.path.exists(files[0]) and not os.path.exists(files[1]):
        raise UserError(f"{path} is not a run folder: it has no metrics.jsonl and no config.json")
    metrics, rows = _rows(files[0]), _rows(files[2])
    if not metrics:
        raise UserError(f"{path}: no epoch has ended yet (metrics.jsonl has no whole row)")
    config, history, genotype, end = {}, [], None, None
    with contextlib.suppress(OSError, ValueError, TypeError), open(files[1]) as file:
        found = dict(json.load(file))
        config = {} if departure(found, CONFIG, "") else found
    for row in rows:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            weights = {cell: row.get(f"{cell}_weights") for cell in CELLS}
            history.append(Choice(row["epoch"], genotypes.from_lists(row), weights))
    if history:
        genotype = history[-1].genotype
    elif rows:
        raise UserError(f"{files[2]}: damaged, no row holds a genotype")
    elif os.path.exists(files[3]):
        genotype, _ = genotypes.load(files[3])
    # Rows of older runs have no phase; those of the search have the distances of its codes.
    searching = [row for row in metrics if row.get("phase") == "search"]
    searching = searching or [row for row in metrics if row.get("distance")]
    search = bool(history or searching)
    one_stage = search and bool(config.get("one_stage", "test_loss" in metrics[-1]))
    if one_stage and searching:
        last = searching[-1]
        if last is not metrics[-1] or all(last.get("frozen") or [False]):
            end = last["epoch"]
    name = literal(os.path.basename(os.path.abspath(path)))
    return Record(path, name, config, metrics, history, genotype, search, one_stage, end)


def literal(text):
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _rows(path):
    """Whole rows of a .jsonl file by epoch; the last may still be on its way to the disk."""
    rows = {}
    with open(path if os.path.exists(path) else os.devnull, errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if not departure(row, ROW, ""):
                    rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


def _series(run, key):
    """Epochs and values of a finite number that some rows have."""
    rows = [row for row in run.metrics if isinstance(row.get(key), int | float)]
    rows = [row for row in rows if abs(row[key]) < 1e38]  # what matplotlib can scale
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def _accuracy(run):
    """What the accuracy of a run is measured on, its epochs, and its values."""
    for kind, name in (("valid", "validation"), ("test", "test"), ("train", "training")):
        epochs, values = _series(run, f"{kind}_accuracy")
        if epochs:
            return name, epochs, values
    return "–", [], []


# ------------------------------------------------------------------------------------------------
# Curves, and several runs
# ------------------------------------------------------------------------------------------------

SERIES = {
    "test": ("test", "#E07B00"),
    "valid": ("validation (the half for b, not augmented)", "#E07B00"),
    "arch": ("the half for b, as it was trained on", "#7CC4F0"),
    "train": ("training", "#0B2A4A"),
}


@style()
def curves_figure(run):
    """Draw losses, accuracies and learning rate (and drop-path probability) over the epochs.

    Parameters
    ----------
    run : Record

    Returns
    -------
    matplotlib.figure.Figure
    """
    titles = {"loss": "loss (cross-entropy)", "accuracy": "accuracy (%)",
              "learning_rate": "learning rate"}
    if any(_series(run, "drop_path_prob")[1]):
        titles["drop_path_prob"] = "drop-path prob."
    figure = new_figure(WIDTH, 2.2, layout="constrained")
    panels = figure.subplots(1, len(titles), width_ratios=[5, 5, 4, 4][: len(titles)])
    for axes, (what, title) in zip(panels, titles.items(), strict=True):
        axes.set_title(title)
        axes.plot(*_series(run, what), color="black")
        for kind, (name, colour) in SERIES.items():
            epochs, values = _series(run, f"{kind}_{what}")
            if epochs:
                axes.plot(epochs, values, color=colour, label=name)
        epoch_axis(axes, run.metrics[-1]["epoch"])
        if what == "loss":
            _clip_outliers(axes)
        if run.end is not None:
            axes.axvline(run.end + 0.5, label="search ends", color="black", linewidth=0.9,
                         linestyle=(0, (4, 2)), marker="", zorder=5)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    what, epochs, values = _accuracy(run)
    text = f"{what} accuracy {values[-1]:.2f} %, best {max(values):.2f} %" if values else ""
    figure.suptitle(f"{run.name}: {text}", x=0.01, ha="left")
    return figure


def _clip_outliers(axes):
    """Let up to 3 values that would flatten all others leave the axis, each marked and written."""
    points = [(y, x, line.get_color()) for line in axes.lines for x, y in line.get_xydata()]
    points.sort(reverse=True)
    bottom = points[-1][0] if points else 0
    for k in range(min(3, len(points) // 4), 0, -1):
        high = points[k][0] - bottom  # of all others
        # Three times: a first epoch is often twice as far off as all that follow.
        if points[k - 1][0] - bottom > 3 * high > 0:
            axes.set_ylim(bottom - 0.05 * high, bottom + (1.05 + 0.12 * k) * high)
            for i, (y, x, colour) in enumerate(points[:k]):
                place = dict(y=0.95 - 0.09 * i, transform=axes.get_xaxis_transform())
                left = x > fmean(axes.get_xlim())  # half of the axis; then there is room there
                axes.plot(x, place["y"], "^", color=colour, markersize=4, zorder=5, gid="outlier",
                          transform=place["transform"])
                axes.text(x, s=f"   {y:.3g}   ", va="center", ha="right" if left else "left",
                          bbox=dict(facecolor="white", edgecolor="none", pad=0), zorder=4, **place)
            return


@style()
def compare_figure(records):
    """Overlay the accuracies of runs, a panel for each kind of images they are measured on.

    Runs that differ only by seed share a colour.

    Parameters
    ----------
    records : list of Record

    Returns
    -------
    matplotlib.figure.Figure
    """
    groups, handles = _groups(records), []
    kinds = list(dict.fromkeys(_accuracy(run)[0] for run in records))
    figure = new_figure(WIDTH, 2.6 + 0.14 * len(groups), layout="constrained")
    panels = dict(zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True))
    late = {kind: [] for kind in kinds}
    for i, group in enumerate(groups):
        label = literal(group[0].path) + f" ({len(group)} seeds)" * (len(group) > 1)
        for run in group:
            kind, epochs, values = _accuracy(run)
            first = len(values) // 3 if len(values) > 20 else 0
            late[kind] += values[first:]  # a long rise is not worth the height
            look = dict(color=f"C{i}", linestyle=("-", "--", "-.", ":")[i % 4])
            line = panels[kind].plot(epochs, values, label=label, **look)
        handles += line
    for kind, axes in panels.items():
        here = [run for run in records if _accuracy(run)[0] == kind]
        epoch_axis(axes, max(run.metrics[-1]["epoch"] for run in here))
        axes.set(ylim=(min(late[kind], default=0) - 1, max(late[kind], default=99) + 1),
                 title=f"{kind} accuracy (%)")
    figure.legend(handles=handles, loc="outside lower left")
    return figure


def table(records):
    """The runs as text: one line each, and mean ± std where several differ only by seed.

    Parameters
    ----------
    records : list of Record

    Returns
    -------
    str
    """
    lines = [("run", "seed", "genotype", "epochs", "measured on",
              "params M", "mult-adds M", "last %", "best %", "hours")]
    digits = (4, 1, 2, 2, 2)
    for group in _groups(records):
        results = []
        for run in group:
            (what, _, values), (done, total) = _accuracy(run), _progress(run)
            values = values or [None]
            sizes = [run.metrics[-1].get(key) for key in ("parameters", "multiply_adds")]
            results.append((*(size and size / 1e6 for size in sizes), values[-1], max(values),
                            sum(_series(run, "seconds")[1]) / 3600))
            numbers = zip(results[-1], digits, strict=True)
            lines.append((run.path, str(run.config.get("seed", "–")), genotype_name(run.genotype),
                          str(done) if done == total else f"{done}/{total}", what,
                          *("–" if x is None else f"{x:.{n}f}" for x, n in numbers)))
        if len(group) > 1:
            columns = zip(zip(*results, strict=True), digits, strict=True)
            means = ["–" if None in x else f"{fmean(x):.{n}f} ± {stdev(x):.{n}f}"
                     for x, n in columns]
            lines.append((f"  mean ± std of {len(group)} seeds", "", "", "", "", *means))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = zip("<><><>>>>>", widths, strict=True)  # texts to the left, numbers to the right
    form = "  ".join(f"{{:{side}{width}}}" for side, width in sides)
    return "\n".join(form.format(*line).rstrip() for line in lines)


def genotype_name(genotype):
    """A published name, or the first 7 digits of a hash that is the same for equal cells."""
    if genotype is None:
        return "–"
    lists = genotypes.as_lists(genotype)
    names = [k for k, (g, _) in genotypes.NAMED.items() if genotypes.as_lists(g) == lists]
    text = json.dumps(lists, sort_keys=True)
    return names[0] if names else hashlib.sha256(text.encode()).hexdigest()[:7]


def _progress(run):
    """Epochs done, and epochs there will be, "?" while a one-stage search goes on."""
    done, total = run.metrics[-1]["epoch"], run.config.get("epochs", 0)
    if run.one_stage:
        total = "?" if run.end is None else run.end + total
    return done, total if total == "?" else max(done, total)


def _groups(records):
    """Runs of one setting and of as many epochs: they differ only by seed, folder or machine."""
    free = {"seed", "save", "data", "device", "workers", "report_freq", "arch", "resume"}
    groups = defaultdict(list)
    for run in records:
        setting = {key: value for key, value in run.config.items() if key not in free}
        done, total = _progress(run)
        # Without a config.json nothing is known of it. A training's --arch is a path: what counts
        # is the genotype itself.
        cells = run.search or genotype_name(run.genotype)
        key = json.dumps([setting or run.path, cells, done == total or done], sort_keys=True)
        groups[key].append(run)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------
# Files and command line
# ------------------------------------------------------------------------------------------------


@style()
def save(figure, path):
    """Write a figure, whole and over an older one.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : str
        Ends in .png, .svg or .pdf, which is its format.

    Raises
    ------
    UserError
        If it ends otherwise, or cannot be written.
    """
    ending = os.path.splitext(path)[1].lower()
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    if ending not in undated:
        raise UserError(f"{path}: a picture ends in {', '.join(undated)}")
    with replacing(path) as file:
        figure.savefig(file, format=ending[1:], metadata=undated[ending])


def draw_run(run_dir, folder=None):
    """Draw all pictures of a run, also of one that is not over.

    Parameters
    ----------
    run_dir : str
    folder : str, optional
        Where to put them, by default into the run's folder.

    Returns
    -------
    list of str
        Paths of the pictures: cells.png (where the genotype is known), search.png (of a search)
        and curves.png.

    Raises
    ------
    UserError
        If it is not the folder of a run, or a picture cannot be written.
    """
    run, figures = read_run(os.fspath(run_dir)), {}
    shown = [choice for choice in run.history[:1] if choice.genotype != run.genotype]
    if run.genotype:
        titles = [f"after epoch {choice.epoch}" for choice in (*shown, *run.history[-1:])]
        before = shown[0].genotype if shown else None
        figures["cells.png"] = cells_figure(run.genotype, run.name, before, titles)
    if run.search:
        figures["search.png"] = search_figure(run)
    figures["curves.png"] = curves_figure(run)
    figures = {os.path.join(folder or run.path, name): figures[name] for name in figures}
    for path, figure in figures.items():
        save(figure, path)
    return list(figures)


def get_args_parser():
    parser = arguments.Parser(prog="visualize.py", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help="a genotype (a genotype.json, a "
                        "published name, random:SEED, a text 'Genotype(...)'), or run folders")
    parser.add_argument("-o", "--output", metavar="PATH", help="the picture (.png, .svg or .pdf), "
                        "or for one run the folder of its pictures. Default: in the folder of the "
                        "(first) run or of the genotype.json, here for a name")
    parser.add_argument("--stacked", action="store_true", help="draw the cells of a genotype one "
                        f"above the other, {COLUMN} inches wide, not {WIDTH}")
    parser.add_argument("--method", action="store_true", help="draw how the method works at one "
                        "node, of the run's search if one is given")
    return parser


def main(args):
    what = args.what or []
    spec = what[0] if what else None
    if args.method:
        if len(what) > 1:
            raise UserError("--method draws one run at most")
        paths = [args.output or os.path.join(spec or "", "method.png")]
        save(explain.method_figure(explain.code_of(spec)), paths[0])
    elif not what:
        raise UserError("give a genotype, one or more run folders, or --method")
    elif len(what) > 1:
        records = [read_run(path) for path in dict.fromkeys(map(os.path.normpath, what))]
        paths = [args.output or os.path.join(records[0].path, "compare.png")]
        save(compare_figure(records), paths[0])
        print(table(records))
    elif os.path.isdir(spec):
        if args.output and not os.path.isdir(args.output):
            raise UserError(f"-o {args.output}: for the pictures of a run, give a folder that "
                            "is there")
        paths = draw_run(spec, args.output)
    else:
        if not (os.path.isfile(spec) or spec in genotypes.NAMED or "Genotype(" in spec
                or spec.startswith("random:")):
            raise UserError(f"{spec}: there is no such run folder or file, and no genotype has "
                            f"that name ({', '.join(genotypes.NAMED)}, random:SEED)")
        genotype, _ = genotypes.load(spec)
        title = None if "(" in spec else os.path.basename(spec)
        name = "cells" if title in (None, "genotype.json") else title.removesuffix(".json")
        folder = os.path.dirname(spec) if os.path.isfile(spec) else ""
        paths = [args.output or os.path.join(folder, name.replace(":", "-") + ".png")]
        save(cells_figure(genotype, literal(title or ""), stacked=args.stacked), paths[0])
    print("\n".join(paths))


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        arguments.fail("visualize.py", error)
