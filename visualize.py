"""Draw the cells of a genotype, the pictures of a run, or several runs side by side.

    python visualize.py runs/NAME/genotype.json -o cells.pdf  # its two cells, for a paper
    python visualize.py ISTA_twostage --stacked               # a published one, a column wide
    python visualize.py runs/NAME                             # all pictures of a run
    python visualize.py runs/A runs/B runs/C                  # compare.png, and a table

A search has cells.png (the final cells and those after the first epoch), search.png (what every
node chose in every epoch) and curves.png; a training has cells.png and curves.png. A run that is
not over can be drawn too. Pictures are drawn anew each time, over the ones that are there; nothing
is ever written that does not end in .png, .svg or .pdf.
"""

import contextlib
import hashlib
import json
import math
import os
from collections import defaultdict, namedtuple
from itertools import pairwise, permutations
from statistics import fmean, stdev

import arguments
import genotypes
from genotypes import NODES

WIDTH, COLUMN = 6.9, 3.35  # inches: a page, and a column of a paper

# Pools, skip, separable and dilated convolutions differ by hue and by dash, 3×3 and 5×5 by width.
# All differ by lightness, for prints in grey and for the colour-blind.
# Operation: (name, colour, what can be read on it, dashes, line width)
OPERATIONS = {
    "max_pool_3x3": ("max 3×3", "#D9650F", "white", (0, (1, 1)), 1.5),
    "avg_pool_3x3": ("avg 3×3", "#F2C643", "black", (0, (1, 1)), 1.5),
    "skip_connect": ("skip", "#1A1A1A", "white", "-", 0.8),
    "sep_conv_3x3": ("sep 3×3", "#58A6DA", "black", "-", 1.2),
    "sep_conv_5x5": ("sep 5×5", "#0A3F7D", "white", "-", 2.0),
    "dil_conv_3x3": ("dil 3×3", "#7CCBA2", "black", (0, (4, 1.5)), 1.2),
    "dil_conv_5x5": ("dil 5×5", "#0A8A6E", "white", (0, (3, 1)), 2.0),
}
for _name in genotypes.PRIMITIVES:  # one that was added to them
    OPERATIONS.setdefault(_name, (_name.replace("_", " "), "#8E4FA8", "white", "-", 1.2))
CONCAT = ("", "#9A9A9A", "", "-", 0.7)
CELLS = {"normal": "normal cell", "reduce": "reduction cell"}


@contextlib.contextmanager
def style():
    """Matplotlib's own defaults but for these, whatever the user's matplotlibrc says."""
    try:
        import matplotlib.style
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    own = {
        "font.size": 6.5, "axes.titlelocation": "left", "axes.titlepad": 3, "axes.axisbelow": True,
        "legend.fontsize": "medium", "legend.frameon": False, "axes.linewidth": 0.5,
        "axes.grid": True, "grid.color": "#E4E4E4", "lines.linewidth": 1, "lines.marker": ".",
        "lines.markersize": 3, "lines.markeredgewidth": 0.3, "savefig.dpi": 200,
        "pdf.fonttype": 42, "svg.hashsalt": "ista-nas",
    }
    with matplotlib.style.context(own, after_reset=True):
        yield


def new_figure(width, height, **kwargs):
    from matplotlib.figure import Figure  # not pyplot: no window, and no state that others share

    return Figure((width, height), **kwargs)


def _epoch_axis(axes, until):
    axes.set(xlim=(0.5, until + 0.5), xlabel="epoch")
    axes.locator_params("x", integer=True, nbins=5, min_n_ticks=1)


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------

# A column for each layer: the inputs, the nodes by the length of the longest path to them, the
# output. A row for each node, which has the labels of its pairs in its column, their wires to the
# left of that, and to the right the wire to the output. So whatever the genotype is, wires bend and
# cross only between two columns, where there are no labels and no nodes. Inches; y points down.
OUTPUT = 2 + NODES
NAMES = ("$c_{k-2}$", "$c_{k-1}$", "0", "1", "2", "3", "$c_k$")
LABEL, ARROW, NODE, OUTER = 0.275, 0.075, 0.15, 0.3  # widths; OUTER: of the inputs and the output
INNER = LABEL + ARROW + NODE
PAIR, SPACE = 0.27, 0.04  # heights: of a label, and between two nodes
MARGIN, HEAD = 0.06, 0.25


def cells_figure(genotype, title=None, before=None, titles=("", ""), stacked=False):
    """Draw the normal and the reduction cell.

    Parameters
    ----------
    genotype : genotypes.Genotype
    title : str, optional
    before : genotypes.Genotype, optional
        An earlier genotype, drawn above; pairs that only one of the two has are filled.
    titles : pair of str
        What to call the earlier genotype and this one.
    stacked : bool
        Whether to draw the reduction cell below the normal one, for a single column.

    Returns
    -------
    matplotlib.figure.Figure
    """
    shown = [(genotype, genotype, "")]
    if before:
        shown = [(before, genotype, f", {titles[0]}"), (genotype, before, f", {titles[1]}")]
    panels = [
        (getattr(this, cell), getattr(this, f"{cell}_concat"), getattr(other, cell), name + heading)
        for this, other, heading in shown
        for cell, name in CELLS.items()
    ]
    columns, width = (1, COLUMN) if stacked else (2, WIDTH)
    # What the deepest cell of each column leaves free goes between its layers.
    layers = [max(_layers(p[0])[OUTPUT] for p in panels[j::columns]) for j in range(columns)]
    outer = 2 * MARGIN + 2 * OUTER - INNER
    gap = (width - columns * outer) / sum(layers) - INNER
    widths = [outer + depth * (INNER + gap) for depth in layers]
    high, rows = len(genotype.normal) * PAIR + NODES * SPACE, len(panels) // columns
    title = (title or "") + "   filled: pairs that the other epoch does not have" * bool(before)
    top = 0.22 * bool(title)
    height = top + rows * (HEAD + high)
    with style():
        figure = new_figure(width, height)
        grid = dict(left=0, right=1, bottom=0, top=1 - top / height, wspace=0, hspace=0)
        grid = figure.subplots(rows, columns, squeeze=False, width_ratios=widths, gridspec_kw=grid)
        for i, (pairs, concat, others, name) in enumerate(panels):
            axes = grid.flat[i]
            axes.set(xlim=(-MARGIN, widths[i % columns] - MARGIN), ylim=(high, -HEAD))
            axes.axis("off")
            axes.text(0, 0.05 - HEAD, name, va="top", size="large")
            _draw_cell(axes, pairs, concat, others, gap)
        figure.text(MARGIN / width, 1 - 0.05 / height, title, va="top", size="large")
        return figure


def _by_node(pairs):
    each = len(pairs) // NODES
    return [pairs[k : k + each] for k in range(0, len(pairs), each)]


def _layers(pairs):
    """Layer of each node."""
    layer = {0: 0, 1: 0}
    for node, chosen in enumerate(_by_node(pairs), 2):
        layer[node] = 1 + max(layer[source] for _, source in chosen)
    return {**layer, OUTPUT: 1 + max(layer.values())}


def _draw_cell(axes, pairs, concat, others, gap):
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    each, layer = len(pairs) // NODES, _layers(pairs)
    left = [0.0, *(OUTER + gap + depth * (INNER + gap) for depth in range(layer[OUTPUT]))]
    wires = [(source, 2 + k // each) for k, (_, source) in enumerate(pairs)]
    wires += [(node, OUTPUT) for node in concat]
    row = each * PAIR + SPACE
    orders = permutations([(i + 0.5) * row for i in range(NODES)])
    middles = ([1.2 * row, 2.8 * row, *order, 2 * row] for order in orders)
    middle = min(middles, key=lambda y: sum(abs(y[a] - y[b]) for a, b in wires))
    size = {node: row - SPACE if 2 <= node < OUTPUT else 0.4 for node in layer}

    # Wires leave and enter a node in the order of their other ends, so as not to cross there.
    ends = [{}, {}]  # heights at which wires leave, and enter
    for side in (1, 0):
        for node in layer:
            there = [k for k, wire in enumerate(wires) if wire[side] == node]
            far = {k: middle[wires[k][0]] if side or k >= len(pairs) else ends[1][k] for k in there}
            for i, k in enumerate(sorted(there, key=far.get)):
                ends[side][k] = middle[node] + (i - (len(there) - 1) / 2) * size[node] / len(there)
    # They run straight and swing (Path's codes: 1 start, 2 line, 4 curve) in the gap behind their
    # source, those to the output in the last gap.
    for k, (source, target) in reversed(list(enumerate(wires))):
        x = left[layer[source]] + (INNER if source > 1 else OUTER)
        y, to_y = ends[0][k], ends[1][k]
        to_x, bend = left[layer[target]], 0.55 * gap
        _, colour, _, dash, thick = CONCAT if target == OUTPUT else OPERATIONS[pairs[k][0]]
        swing = to_x - gap if target == OUTPUT else x  # where it leaves its first height
        path = Path([(x, y), (swing, y), (swing + bend, y), (swing + gap - bend, to_y),
                     (swing + gap, to_y), (to_x, to_y)], [1, 2, 4, 4, 4, 2])
        # The white below each curve shows at a crossing which one runs over the other.
        for ink, style, wide in (("white", "-", thick + 1.6), (colour, dash, thick)):
            axes.add_patch(PathPatch(path, fill=False, edgecolor=ink, linestyle=style,
                                     linewidth=wide, capstyle="butt", gid=f"edge {k}"))
    for k, (operation, source) in enumerate(pairs):
        name, colour, ink, *_ = OPERATIONS[operation]
        x, y = left[layer[2 + k // each]], ends[1][k]
        new = (operation, source) not in _by_node(others)[k // each]
        _box(axes, (x, y - PAIR / 2 + 0.02, LABEL, PAIR - 0.04), name.replace(" ", "\n"),
             f"label {k}", ink if new else "black", 6.2, colour, colour if new else "white")
        axes.plot(x + LABEL + ARROW / 2, y, ">", color=colour, markersize=2.5)
    for node, name in enumerate(NAMES):
        outer = node in (0, 1, OUTPUT)
        wide, font, fill = (OUTER, 8.6, "#F7F2E4") if outer else (NODE, 7, "#E6E6E6")
        x, y = left[layer[node]] + (0 if outer else LABEL + ARROW), middle[node] - size[node] / 2
        _box(axes, (x, y, wide, size[node]), name, f"node {node}", "black", font, "#555555", fill)


def _box(axes, place, text, gid, ink, size, edge, fill):
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.03", zorder=3,
                                  linewidth=0.7, edgecolor=edge, facecolor=fill, gid=gid))
    axes.text(x + width / 2, y + height / 2 + 0.005, text, size=size, color=ink, zorder=4,
              ha="center", va="center", linespacing=0.95, gid=f"text of {gid}")


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------

Run = namedtuple("Run", "path name config metrics history genotype search one_stage end")
Choice = namedtuple("Choice", "epoch genotype weights")  # weights: {"normal": list or None, ...}


def read_run(path):
    """Read the folder of a run, which may still be running; ValueError where it is none.

    Parameters
    ----------
    path : str

    Returns
    -------
    Run
        path, name; config: dict of its arguments; metrics: one dict an epoch; history: one Choice
        an epoch, of a search; genotype: the last one, or None; search, one_stage: whether it is
        a search, and a one-stage one; end: the epoch in which a one-stage search fixed its
        architecture, else None.
    """
    names = ("metrics.jsonl", "config.json", "genotypes.jsonl", "genotype.json")
    files = [os.path.join(path, name) for name in names]
    if not os.path.exists(files[0]) and not os.path.exists(files[1]):
        raise ValueError(f"{path} is not a run folder: it has no metrics.jsonl and no config.json")
    metrics, rows = _rows(files[0]), _rows(files[2])
    if not metrics:
        raise ValueError(f"{path}: no epoch has ended yet (metrics.jsonl has no whole row)")
    config, history, genotype, end = {}, [], None, None
    with contextlib.suppress(OSError, ValueError, TypeError), open(files[1]) as file:
        config = dict(json.load(file))
    for row in rows:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            weights = {cell: row.get(f"{cell}_weights") for cell in CELLS}
            history.append(Choice(row["epoch"], genotypes.from_lists(row), weights))
    if history:
        genotype = history[-1].genotype
    elif rows:
        raise ValueError(f"{files[2]}: damaged, no row holds a genotype")
    elif os.path.exists(files[3]):
        genotype, _ = genotypes.load(files[3])
    moving = [row for row in metrics if row.get("distance")]
    search = bool(history or moving)
    one_stage = search and bool(config.get("one_stage", "test_loss" in metrics[-1]))
    if one_stage and moving and (moving[-1] is not metrics[-1] or all(moving[-1]["frozen"])):
        end = moving[-1]["epoch"]
    name = os.path.basename(os.path.abspath(path))
    return Run(path, name, config, metrics, history, genotype, search, one_stage, end)


def _rows(path):
    """Rows of a .jsonl file by epoch; the last line may still be on its way to the disk."""
    rows = {}
    with open(path if os.path.exists(path) else os.devnull, errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                rows[int(row["epoch"])] = row
    return [rows[epoch] for epoch in sorted(rows)]


def _series(run, key):
    """Epochs and values of a finite number that some rows have."""
    rows = [row for row in run.metrics if isinstance(row.get(key), int | float)]
    rows = [row for row in rows if math.isfinite(row[key])]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def _accuracy(run):
    """What the accuracy of a run is measured on, its epochs, and its values."""
    for kind, name in (("valid", "validation"), ("test", "test"), ("train", "training")):
        epochs, values = _series(run, f"{kind}_accuracy")
        if epochs:
            return name, epochs, values
    return "–", [], []


# ------------------------------------------------------------------------------------------------
# The search as a film strip
# ------------------------------------------------------------------------------------------------

STRIP = 5.2  # inches: about the width of all epochs
END = dict(color="black", linewidth=0.9, linestyle=(0, (4, 2)), marker="", zorder=5)


@style()
def search_figure(run):
    """Draw what every node chose in every epoch, how far its code moved, and the pairs' weights.

    Parameters
    ----------
    run : Run

    Returns
    -------
    matplotlib.figure.Figure
    """
    last, panels = run.metrics[-1]["epoch"], [(_draw_distances, None, 1.1)]
    until = last if run.end is None else min(last, run.end + 1)
    if run.history:
        panels = [(_draw_choices, cell, 2.2) for cell in CELLS] + panels
        panels += [(_draw_weights, cell, 0.9) for cell in CELLS if run.history[-1].weights[cell]]
    heights = [height for *_, height in panels]
    figure = new_figure(WIDTH, 0.5 + sum(heights) + 0.22 * len(panels), layout="constrained")
    column = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (draw, cell, _) in zip(column, panels, strict=True):
        draw(axes, run, until, cell)
        if run.end is not None:
            axes.axvline(run.end + 0.5, label="search ends", **END)
        if cell != "reduce":
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=6, labelspacing=0.2)
    _epoch_axis(axes, until)
    changes = [b.epoch for a, b in pairwise(run.history) if a.genotype != b.genotype]
    text = f"last change of a pair in epoch {changes[-1]}" if changes else "no change of a pair"
    figure.suptitle(f"{run.name}: {text}, {last} epochs so far", x=0.01, ha="left")
    return figure


def _freezes(run):
    """The epoch in which each of the 8 nodes of a one-stage search froze, if it did."""
    epochs = {}
    for row in run.metrics if run.one_stage else ():
        for node, frozen in enumerate(row.get("frozen") or ()):
            if frozen:
                epochs.setdefault(node, row["epoch"])
    return epochs


def _draw_choices(axes, run, until, cell):
    """A lane for each input of each node, with a bar in the epochs in which a pair takes it."""
    first = NODES * (cell == "reduce")
    freezes = {node - first: epoch for node, epoch in _freezes(run).items()}
    bars = defaultdict(list)  # of (node, input, operation, i-th of, n, frozen): [start, stop]
    for choice in run.history:
        for node, pairs in enumerate(_by_node(getattr(choice.genotype, cell))):
            frozen = choice.epoch > freezes.get(node, math.inf)
            for operation, source in pairs:
                sharing = [op for op, other in pairs if other == source]
                i, n = sharing.index(operation), len(sharing)
                spans = bars[node, source, operation, i, n, frozen]
                if spans and spans[-1][1] == choice.epoch - 0.5:
                    spans[-1][1] += 1
                else:
                    spans.append([choice.epoch - 0.5, choice.epoch + 0.5])

    lanes = [(node, source) for node in range(NODES) for source in range(2 + node)]
    tops = {lane: i + 0.5 * lane[0] for i, lane in enumerate(lanes)}
    for top in tops.values():
        axes.axhspan(top, top + 1, facecolor="#F0F0F0", edgecolor="white")
    for (node, source, operation, i, n, _), spans in bars.items():
        name, colour, ink, *_ = OPERATIONS[operation]
        top = tops[node, source] + i / n
        for start, stop in spans:
            axes.barh(top, stop - start, 1 / n, start, align="edge", color=colour,
                      edgecolor="white", linewidth=0.5)
            # In a shared lane, and in a short bar, the colour has to do.
            wide = (min(stop, until + 0.5) - start) * STRIP / until
            if n == 1 and wide > 0.055 * len(name) + 0.05:
                axes.text(start + 0.035 * until / STRIP, top + 0.5, name, size=6, color=ink,
                          va="center_baseline", gid="bar")
    for node in freezes.keys() & range(NODES):
        axes.vlines(freezes[node] + 0.5, tops[node, 0], tops[node, node + 1] + 1, color="black",
                    linewidth=1.6)
    for name, colour, *_ in OPERATIONS.values():
        axes.bar(math.nan, 0, color=colour, label=name)
    if run.one_stage:
        axes.plot([], [], "k|", markersize=7, markeredgewidth=1.6, label="node freezes")
    inputs = ("k−2", "k−1", *NAMES[2:])
    axes.set_yticks([top + 0.5 for top in tops.values()],
                    [f"{inputs[source]} → {node}" for node, source in lanes], size=6)
    axes.set(ylim=(max(tops.values()) + 1, 0), title=CELLS[cell], ylabel="input → node")
    axes.tick_params(length=0)
    axes.grid(False)


def _draw_distances(axes, run, until, _cell):
    """A line for each node, with a ring where it freezes; from then on the distance is 0."""
    rows, freezes = [row for row in run.metrics if row.get("distance")], _freezes(run)
    epochs = [row["epoch"] for row in rows]
    for node in range(2 * NODES):
        cell, dash = (("normal", "-"), ("reduction", "--"))[node // NODES]
        look = dict(color=("#0B2A4A", "#1F78B4", "#E07B00", "#A9A9A9")[node % NODES])
        values = [row["distance"][node] or math.nan for row in rows]
        axes.plot(epochs, values, dash, marker=".", label=f"{cell} {node % NODES}", **look)
        if freezes.get(node) in epochs:
            axes.plot(freezes[node], values[epochs.index(freezes[node])], "o", mec="black", **look)
    if run.one_stage and run.config.get("freeze_tol"):
        axes.axhline(run.config["freeze_tol"], color="black", linestyle=":", label="tolerance")
    axes.set(yscale="log", title="distance of each code from the last one, $\\|z_t - z_{t-1}\\|_2$")


def _draw_weights(axes, run, until, cell):
    """A line for each pair while it is active, with the markers of its node."""
    axes.set_title(f"weights of the active pairs, {CELLS[cell]}")
    axes.axhline(0, color="#888888", linewidth=0.5)
    lines = defaultdict(lambda: [math.nan] * len(run.history))
    for i, choice in enumerate(run.history):
        pairs, weights = getattr(choice.genotype, cell), choice.weights[cell] or ()
        for k, (pair, weight) in enumerate(zip(pairs, weights, strict=False)):
            lines[(k * NODES // len(pairs), *pair)][i] = weight
    epochs = [choice.epoch for choice in run.history]
    for (node, operation, _), values in lines.items():
        _, colour, _, dash, thick = OPERATIONS[operation]
        axes.plot(epochs, values, color=colour, linestyle=dash, linewidth=0.6 * thick,
                  marker="osD^"[node], markersize=2.2, markevery=math.ceil(until / 25))
    for node in range(NODES):
        axes.plot([], [], "osD^"[node], color="black", label=f"node {node}")


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
    run : Run

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
        if run.end is not None:
            axes.axvline(run.end + 0.5, label="search ends", **END)
        _epoch_axis(axes, run.metrics[-1]["epoch"])
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    what, epochs, values = _accuracy(run)
    text = f"{what} accuracy {values[-1]:.2f} %, best {max(values):.2f} %" if values else ""
    figure.suptitle(f"{run.name}: {text}", x=0.01, ha="left")
    return figure


@style()
def compare_figure(runs):
    """Overlay the accuracies of runs; those that differ only by seed share a colour.

    Parameters
    ----------
    runs : list of Run

    Returns
    -------
    matplotlib.figure.Figure
    """
    groups, handles, late = _groups(runs), [], []
    figure = new_figure(WIDTH, 3 + 0.14 * len(groups), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(groups):
        seeds = f", {len(group)} seeds" if len(group) > 1 else ""
        label = f"{group[0].path} ({_accuracy(group[0])[0]}{seeds})"
        for run in group:
            _, epochs, values = _accuracy(run)
            late += values[len(values) // 3 :]  # what is lower is not worth the height
            look = dict(color=f"C{i}", linestyle=("-", "--", "-.", ":")[i % 4])
            line = axes.plot(epochs, values, label=label, **look)
        handles += line
    _epoch_axis(axes, max(run.metrics[-1]["epoch"] for run in runs))
    axes.set(ylim=(min(late, default=0) - 1, max(late, default=99) + 1), title="accuracy (%)")
    figure.legend(handles=handles, loc="outside lower left")
    return figure


def table(runs):
    """The runs as text: one line each, and mean ± std where several differ only by seed.

    Parameters
    ----------
    runs : list of Run

    Returns
    -------
    str
    """
    lines = [("run", "seed", "genotype", "epochs", "measured on",
              "params M", "mult-adds M", "last %", "best %", "hours")]
    digits = (4, 1, 2, 2, 2)
    for group in _groups(runs):
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


def _groups(runs):
    """Runs of one setting and of as many epochs: they differ only by seed, folder or machine."""
    free = {"seed", "save", "data", "device", "workers", "report_freq", "arch", "resume"}
    groups = defaultdict(list)
    for run in runs:
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
    """Write a figure, whole and over an older one; ValueError where it has another ending.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : str
        Ends in .png, .svg or .pdf, which is its format.
    """
    partial, ending = f"{path}.partial", os.path.splitext(path)[1].lower()
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    if ending not in undated:
        raise ValueError(f"{path}: a picture ends in {', '.join(undated)}")
    try:
        figure.savefig(partial, format=ending[1:], metadata=undated[ending])
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def draw_run(run_dir, folder=None):
    """Draw all pictures of a run, also of one that is not over; ValueError where it is none.

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
    parser.add_argument("what", nargs="+", metavar="WHAT", help="a genotype (a genotype.json, a "
                        "published name, random:SEED, a text 'Genotype(...)'), or run folders")
    parser.add_argument("-o", "--output", metavar="PATH", help="the picture (.png, .svg or .pdf), "
                        "or for one run the folder of its pictures. Default: in the folder of the "
                        "run or of the genotype.json, here for a name and for several runs")
    parser.add_argument("--stacked", action="store_true", help="draw the cells of a genotype one "
                        f"above the other, {COLUMN} inches wide, not {WIDTH}")
    return parser


def main(args):
    spec = args.what[0]
    if len(args.what) > 1:
        runs = [read_run(path) for path in dict.fromkeys(map(os.path.normpath, args.what))]
        paths = [args.output or "compare.png"]
        save(compare_figure(runs), paths[0])
        print(table(runs))
    elif os.path.isdir(spec):
        paths = draw_run(spec, args.output)
    else:
        genotype, _ = genotypes.load(spec)
        title = None if "(" in spec else os.path.basename(spec)
        name = "cells" if title in (None, "genotype.json") else title.removesuffix(".json")
        folder = os.path.dirname(spec) if os.path.isfile(spec) else ""
        paths = [args.output or os.path.join(folder, name.replace(":", "-") + ".png")]
        save(cells_figure(genotype, title, stacked=args.stacked), paths[0])
    print("\n".join(paths))


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:
        arguments.fail("visualize.py", error)
