"""Pictures of cells and of runs.

    python visualize.py ISTA_twostage -o cells.pdf           # the two cells of a genotype
    python visualize.py runs/NAME                            # all pictures of a run
    python visualize.py runs/NAME -o curves.pdf              # one of them, for a paper
    python visualize.py runs/A runs/B --labels ours random   # runs side by side, and a table

A search has the pictures cells (the final cells and those after the first epoch), search (what
every node chose in every epoch) and curves; a training has cells and curves. A run that is not over
can be drawn too. Pictures are drawn anew each time, over those that are there.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
from collections import defaultdict, namedtuple
from functools import partial
from itertools import islice, pairwise, permutations
from statistics import fmean, stdev

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, NullFormatter

import genotypes
from genotypes import NODES, PRIMITIVES, by_node
from harness import flags
from utils import UserError, write_file

WIDTH, COLUMN = 6.9, 3.35  # inches: a page, and a column of a paper
CELLS = {"normal": "normal cell", "reduce": "reduction cell"}

# Pools, skip, separable and dilated convolutions differ by hue and by dash, 3×3 and 5×5 by width.
# All differ by lightness, for prints in grey and for the colour-blind.
Look = namedtuple("Look", "colour ink dash width")  # ink: of what is written on the colour
LOOKS = {
    "max_pool_3x3": Look("#D9650F", "white", (0, (1, 1)), 1.5),
    "avg_pool_3x3": Look("#F2C643", "black", (0, (1, 1)), 1.5),
    "skip_connect": Look("#1A1A1A", "white", "-", 0.8),
    "sep_conv_3x3": Look("#58A6DA", "black", "-", 1.2),
    "sep_conv_5x5": Look("#0A3F7D", "white", "-", 2.0),
    "dil_conv_3x3": Look("#7CCBA2", "black", (0, (4, 1.5)), 1.2),
    "dil_conv_5x5": Look("#0A8A6E", "white", (0, (3, 1)), 2.0),
}
OTHERS = "#8E4FA8", "#C2477F", "#7A5230", "#5F6B7A", "#B01E1E"  # colours of added operations
CONCAT = Look("#9A9A9A", "", "-", 0.7)


def look(operation):
    """The look of an operation, also of one that was added to PRIMITIVES."""
    added = [name for name in PRIMITIVES if name not in LOOKS]
    if operation in added:
        return Look(OTHERS[added.index(operation) % len(OTHERS)], "white", "-", 1.2)
    return LOOKS[operation]


def short(operation):
    """As "sep 3×3" for sep_conv_3x3."""
    name = re.sub(r"_(conv|pool|connect)(?=_|$)", "", operation)
    return re.sub(r"(\d)x(?=\d)", r"\1×", name).replace("_", " ")


@contextlib.contextmanager
def style():
    """Matplotlib's own defaults but for these, whatever the user's matplotlibrc says."""
    own = {
        "font.size": 6.5, "axes.titlelocation": "left", "axes.titlepad": 3, "axes.axisbelow": True,
        "legend.fontsize": "medium", "legend.frameon": False, "axes.linewidth": 0.5,
        "axes.grid": True, "grid.color": "#E4E4E4", "lines.linewidth": 1, "lines.marker": ".",
        "lines.markersize": 3, "lines.markeredgewidth": 0.3, "savefig.dpi": 200,
        "axes.formatter.useoffset": False, "pdf.fonttype": 42, "svg.hashsalt": "ista-nas",
    }
    with matplotlib.style.context(own, after_reset=True):
        yield


def new_figure(width, height, **kwargs):
    """A figure without pyplot: no window, and no state that others share; sizes in inches."""
    return Figure((width, height), **kwargs)


def epoch_axis(axes, until, ticks=5):
    """Let x be the epochs 1 to `until`, and leave out dots that would run together."""
    axes.set(xlim=(0.5, until + 0.5), xlabel="epoch")
    axes.locator_params("x", integer=True, nbins=ticks, min_n_ticks=1)
    for line in axes.lines:
        if line.get_marker() == "." and until > 100:
            line.set_marker("")


def log_axis(axes):
    """Let y be logarithmic, with ticks such as 0.02; to be called once the lines are there."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------

# name: in titles and legends. metrics: a dict an epoch. history: of a search, a Choice an epoch.
# genotype: the last one, or None. end: the epoch in which a one-stage search ended, or None.
Run = namedtuple("Run", "path name config metrics history genotype one_stage end")
Choice = namedtuple("Choice", "epoch genotype weights")  # weights: {"normal": list or None, ...}


def read_run(path, name=None):
    """Read the folder of a run, which may still be going on; UserError where it is none."""
    config, arch = (os.path.join(path, file) for file in ("config.json", "genotype.json"))
    if not os.path.exists(config):
        raise UserError(f"{path} is not a run folder: there is no config.json in it")
    with open(config, encoding="utf-8") as file:
        config = json.load(file)
    metrics, rows = (_rows(os.path.join(path, f"{x}.jsonl")) for x in ("metrics", "genotypes"))
    if not metrics:
        raise UserError(f"{path}: no epoch has ended yet (metrics.jsonl has no whole row)")
    searching, end = [row for row in metrics if row.get("phase") == "searching"], None
    if searching and (searching[-1] is not metrics[-1] or all(metrics[-1].get("frozen") or [0])):
        end = searching[-1]["epoch"]
    history, genotype = [], None
    try:
        for row in rows:
            if end is None or row["epoch"] <= end:
                genotype = genotypes.from_lists(row)
                weights = {cell: row.get(f"{cell}_weights") for cell in CELLS}
                history.append(Choice(row["epoch"], genotype, weights))
        if not history and os.path.exists(arch):
            genotype, _ = genotypes.load(arch)
    except ValueError as error:  # it has other nodes or operations, as after an edit
        raise UserError(f"{path}: {error}") from None
    name = os.path.basename(os.path.abspath(path)) if name is None else name
    return Run(path, name, config, metrics, history, genotype, bool(searching), end)


def _rows(path):
    """Rows of a .jsonl file by epoch; the last one may still be on its way to the disk."""
    rows = {}
    with open(path if os.path.exists(path) else os.devnull, errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


def series(run, key):
    """Epochs and values of a number that some rows have, where it is finite."""
    rows = [row for row in run.metrics if isinstance(row.get(key), int | float)]
    rows = [row for row in rows if abs(row[key]) < 1e38]  # what matplotlib can scale
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def accuracy(run):
    """What the accuracy of a run is measured on, its epochs, and its values."""
    for kind, name in (("valid", "validation"), ("test", "test"), ("train", "training")):
        epochs, values = series(run, f"{kind}_accuracy")
        if epochs:
            return name, epochs, values
    return "–", [], []


def progress(run):
    """Epochs done, and epochs there will be, "?" while a one-stage search goes on."""
    done, total = run.metrics[-1]["epoch"], run.config["epochs"]
    if run.one_stage:
        total = "?" if run.end is None else run.end + total
    return done, total if total == "?" else max(done, total)  # a resumed run may have gone on


def groups(runs):
    """Lists of the runs that differ only by seed or machine, and have come equally far."""
    free = {"seed", "save", "data", "device", "workers", "report_freq", "cuda_graphs",
            "compile", "arch"}
    found = defaultdict(list)
    for run in runs:
        setting = {key: value for key, value in run.config.items() if key not in free}
        done, total = progress(run)
        # A training's --arch may be a path: what counts is the network that it names.
        network = [genotype_name(run.genotype), run.metrics[-1].get("parameters")]
        key = [setting, bool(run.history) or network, done == total or done]
        found[json.dumps(key, sort_keys=True)].append(run)
    return list(found.values())


def genotype_name(genotype):
    """A published name, or the first 7 digits of a hash that is the same for equal cells."""
    if genotype is None:
        return "–"
    lists = genotypes.as_lists(genotype)
    names = [k for k, (g, _) in genotypes.NAMED.items() if genotypes.as_lists(g) == lists]
    text = json.dumps(lists, sort_keys=True)
    return names[0] if names else hashlib.sha256(text.encode()).hexdigest()[:7]


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------

# A column for each layer: the inputs, the nodes by the length of the longest path to them, the
# output. A row for each node, which has the labels of its pairs in its column, their wires to the
# left of that, and to the right the wire to the output. So whatever the genotype is, wires bend and
# cross only between two columns, where there are no labels and no nodes. Inches; y points down.


def label(operation):
    """The short name of an operation in two lines of at most 9 characters."""
    lines = short(operation).split(" ", 1)
    return "\n".join(line if len(line) < 10 else f"{line[:8]}…" for line in lines)


OUTPUT = 2 + NODES
NAMES = ("$c_{k-2}$", "$c_{k-1}$", *map(str, range(NODES)), "$c_k$")
LABEL = max(0.275, *(0.06 * len(line) for op in PRIMITIVES for line in label(op).split("\n")))
ARROW, NODE, OUTER = 0.075, 0.15, 0.3  # widths, as LABEL; OUTER: of the inputs and the output
INNER, GAP = LABEL + ARROW + NODE, 0.1  # GAP: the least one between two layers
PAIR, SPACE = 0.27, 0.04  # heights: of a label, and between two nodes
MARGIN, HEAD = 0.06, 0.25


def cells_figure(genotype, title=None, before=None, titles=("", ""), stacked=False):
    """Draw the normal and the reduction cell, in a single column if `stacked`.

    `before` is an earlier genotype, which is drawn above; pairs that only one of the two has are
    filled. `titles` say what to call the earlier genotype and this one.
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
    depths = [max(layers(p[0])[OUTPUT] for p in panels[j::columns]) for j in range(columns)]
    outer = 2 * MARGIN + 2 * OUTER - INNER
    gap = max((width - columns * outer) / sum(depths) - INNER, GAP)
    widths = [outer + depth * (INNER + gap) for depth in depths]
    high, rows = len(genotype.normal) * PAIR + NODES * SPACE, len(panels) // columns
    title = (title or "") + "   filled: pairs that the other epoch does not have" * bool(before)
    top = 0.22 * bool(title)
    height = top + rows * (HEAD + high)
    with style():
        figure = new_figure(sum(widths), height)
        grid = dict(left=0, right=1, bottom=0, top=1 - top / height, wspace=0, hspace=0)
        grid = figure.subplots(rows, columns, squeeze=False, width_ratios=widths, gridspec_kw=grid)
        for i, (pairs, concat, others, name) in enumerate(panels):
            axes = grid.flat[i]
            axes.set(xlim=(-MARGIN, widths[i % columns] - MARGIN), ylim=(high, -HEAD))
            axes.axis("off")
            axes.text(0, 0.05 - HEAD, name, va="top", size="large")
            draw_cell(axes, pairs, concat, others, gap)
        figure.text(MARGIN / sum(widths), 1 - 0.05 / height, title, va="top", size="large")
        return figure


def layers(pairs):
    """Layer of each node."""
    layer = {0: 0, 1: 0}
    for node, chosen in enumerate(by_node(pairs), 2):
        layer[node] = 1 + max(layer[source] for _, source in chosen)
    return {**layer, OUTPUT: 1 + max(layer.values())}


def draw_cell(axes, pairs, concat, others, gap):
    """Draw a cell; pairs that are not among `others` at the same node are filled."""
    each, layer = len(pairs) // NODES, layers(pairs)
    left = [0.0, *(OUTER + gap + depth * (INNER + gap) for depth in range(layer[OUTPUT]))]
    wires = [(source, 2 + k // each) for k, (_, source) in enumerate(pairs)]
    wires += [(node, OUTPUT) for node in concat]
    row = each * PAIR + SPACE
    high = NODES * row
    # The order of the nodes with the shortest wires; beyond 7 nodes not all orders are tried.
    orders = islice(permutations([(i + 0.5) * row for i in range(NODES)]), math.factorial(7))
    middles = ([0.3 * high, 0.7 * high, *order, 0.5 * high] for order in orders)
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
        swing = to_x - gap if target == OUTPUT else x  # where it leaves its first height
        path = Path([(x, y), (swing, y), (swing + bend, y), (swing + gap - bend, to_y),
                     (swing + gap, to_y), (to_x, to_y)], [1, 2, 4, 4, 4, 2])
        colour, _, dash, thick = CONCAT if target == OUTPUT else look(pairs[k][0])
        # The white below each curve shows at a crossing which one runs over the other.
        for ink, dashes, wide in (("white", "-", thick + 1.6), (colour, dash, thick)):
            axes.add_patch(PathPatch(path, fill=False, edgecolor=ink, linestyle=dashes,
                                     linewidth=wide, capstyle="butt", gid=f"edge {k}"))
    for k, (operation, source) in enumerate(pairs):
        colour, ink, *_ = look(operation)
        x, y = left[layer[2 + k // each]], ends[1][k]
        new = (operation, source) not in by_node(others)[k // each]
        box(axes, (x, y - PAIR / 2 + 0.02, LABEL, PAIR - 0.04), label(operation),
            f"label {k}", ink if new else "black", 6.2, colour, colour if new else "white")
        axes.plot(x + LABEL + ARROW / 2, y, ">", color=colour, markersize=2.5)
    for node, name in enumerate(NAMES):
        outer = node in (0, 1, OUTPUT)
        wide, font, fill = (OUTER, 8.6, "#F7F2E4") if outer else (NODE, 7, "#E6E6E6")
        x, y = left[layer[node]] + (0 if outer else LABEL + ARROW), middle[node] - size[node] / 2
        box(axes, (x, y, wide, size[node]), name, f"node {node}", "black", font, "#555555", fill)


def box(axes, place, text, gid, ink, size, edge, fill):
    x, y, width, height = place
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.03", zorder=3,
                                  linewidth=0.7, edgecolor=edge, facecolor=fill, gid=gid))
    axes.text(x + width / 2, y + height / 2 + 0.005, text, size=size, color=ink, zorder=4,
              ha="center", va="center", linespacing=0.95, gid=f"text of {gid}")


# ------------------------------------------------------------------------------------------------
# The search as a film strip
# ------------------------------------------------------------------------------------------------

STRIP, LANE = 5.2, 0.142  # inches: about the width of all epochs; height of an operation
INPUTS = ("k−2", "k−1", *map(str, range(NODES - 1)))
MARKERS = "osD^vP*<>"  # of the inputs of a node


@style()
def search_figure(run):
    """Draw what every node chose in every epoch, how far its code moved, and its pairs' weights."""
    until = run.end or run.metrics[-1]["epoch"]
    lanes = {cell: _lanes(run, cell) for cell in CELLS}
    panels = [(_draw_choices, cell, LANE * sum(lanes[cell][NODES - 1, NODES])) for cell in CELLS]
    panels += [(_draw_distances, None, 1.1)] * any(row.get("distance") for row in run.metrics)
    panels += [(_draw_weights, cell, 0.9) for cell in CELLS if run.history[-1].weights[cell]]
    heights = [height for *_, height in panels]
    figure = new_figure(WIDTH, 0.4 + sum(heights) + 0.45 * len(panels), layout="constrained")
    grid = figure.add_gridspec(len(panels), NODES, height_ratios=heights)
    for i, (draw, cell, _) in enumerate(panels):
        if draw is _draw_weights:
            first = figure.add_subplot(grid[i, 0])
            rest = [figure.add_subplot(grid[i, j], sharey=first) for j in range(1, NODES)]
            draw([first, *rest], run, until, cell)
        else:
            axes = figure.add_subplot(grid[i, :])
            draw(axes, run, until, *([cell, lanes[cell]] if cell else []))
            epoch_axis(axes, until, 10)
    changes = [b.epoch for a, b in pairwise(run.history) if a.genotype != b.genotype]
    text = f"last change of a pair in epoch {changes[-1]}" if changes else "no change of a pair"
    figure.suptitle(f"{run.name}: {text}; {until} epochs of search", x=0.01, ha="left")
    return figure


def _legend(axes, handles):
    return axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize=6,
                       labelspacing=0.2)


def _lanes(run, cell):
    """Top and height of the lane of each (node, input).

    A lane is as high as the most operations that share it in an epoch.
    """
    lanes, top = {}, 0
    for node in range(NODES):
        chosen = [by_node(getattr(choice.genotype, cell))[node] for choice in run.history]
        for source in range(2 + node):
            height = max(1, *(sum(s == source for _, s in pairs) for pairs in chosen))
            lanes[node, source] = top, height
            top += height
        top += 0.5
    return lanes


def _freezes(run):
    """The epoch in which each node froze, of those of both cells that did."""
    epochs = {}
    for row in run.metrics:
        for node, frozen in enumerate(row.get("frozen") or ()):
            if frozen:
                epochs.setdefault(node, row["epoch"])
    return epochs


def _draw_choices(axes, run, until, cell, lanes):
    """A lane for each input of each node, with a bar in the epochs in which a pair takes it."""
    first = NODES * (cell == "reduce")
    freezes = {node - first: epoch for node, epoch in _freezes(run).items()}
    bars = defaultdict(list)  # of (node, input, operation, i-th of, n, frozen): [start, stop]
    for choice in run.history:
        for node, pairs in enumerate(by_node(getattr(choice.genotype, cell))):
            frozen = choice.epoch > freezes.get(node, math.inf)
            for operation, source in pairs:
                sharing = [op for op, other in pairs if other == source]
                i, n = sharing.index(operation), len(sharing)
                spans = bars[node, source, operation, i, n, frozen]
                if spans and spans[-1][1] == choice.epoch - 0.5:
                    spans[-1][1] += 1
                else:
                    spans.append([choice.epoch - 0.5, choice.epoch + 0.5])

    for top, height in lanes.values():
        axes.axhspan(top, top + height, facecolor="#F0F0F0", edgecolor="white")
    for (node, source, operation, i, n, _), spans in bars.items():
        name, (colour, ink, *_) = short(operation), look(operation)
        top, height = lanes[node, source]
        top, height = top + i * height / n, height / n
        for start, stop in spans:
            axes.barh(top, stop - start, height, start, align="edge", color=colour,
                      edgecolor="white", linewidth=0.5)
            wide = (min(stop, until + 0.5) - start) * STRIP / until
            if wide > 0.055 * len(name) + 0.05:  # in a short bar the colour has to do
                axes.text(start + 0.035 * until / STRIP, top + height / 2, name, size=6, color=ink,
                          va="center_baseline", gid="bar")
    for node in freezes.keys() & range(NODES):
        axes.vlines(freezes[node] + 0.5, lanes[node, 0][0], sum(lanes[node, node + 1]),
                    color="black", linewidth=1.6, clip_on=False)
    axes.set_yticks([top + height / 2 for top, height in lanes.values()],
                    [f"{INPUTS[source]} → {node}" for node, source in lanes], size=6)
    axes.set(ylim=(sum(lanes[NODES - 1, NODES]), 0), title=CELLS[cell], ylabel="input → node")
    axes.tick_params("y", length=0)
    axes.grid(False)
    if cell == "normal":
        stroke = Line2D([], [], linestyle="", marker="|", markersize=7, markeredgewidth=1.6,
                        color="black", label="node freezes")
        colours = [Patch(color=look(op).colour, label=short(op)) for op in PRIMITIVES]
        _legend(axes, colours + [stroke] * run.one_stage)


def _draw_distances(axes, run, until):
    """A line for each node, which ends where it freezes: from then on the distance is 0."""
    rows = [row for row in run.metrics if row.get("distance")]
    epochs = [row["epoch"] for row in rows]
    for node in range(2 * NODES):
        cell, dash = (("normal", "-"), ("reduction", "--"))[node // NODES]
        values = [row["distance"][node] or math.nan for row in rows]
        axes.plot(epochs, values, dash, label=f"{cell} {node % NODES}",
                  color=matplotlib.colormaps["viridis"](node % NODES / NODES))
    if run.one_stage and run.config.get("freeze_tol"):
        axes.axhline(run.config["freeze_tol"], color="black", linestyle=":", marker="",
                     label="tolerance")
    axes.set(title="distance of each code from the last one", ylabel="$\\|z_t - z_{t-1}\\|_2$")
    log_axis(axes)
    _legend(axes, axes.get_legend_handles_labels()[0])


def _draw_weights(row, run, until, cell):
    """Axes for each node, with a line for each pair while it is active."""
    lines = defaultdict(lambda: [math.nan] * len(run.history))
    for i, choice in enumerate(run.history):
        pairs, weights = getattr(choice.genotype, cell), choice.weights[cell] or ()
        for k, (pair, weight) in enumerate(zip(pairs, weights, strict=False)):
            lines[(k * NODES // len(pairs), *pair)][i] = weight
    epochs = [choice.epoch for choice in run.history]
    for (node, operation, source), values in lines.items():
        colour, _, dash, thick = look(operation)
        row[node].plot(epochs, values, color=colour, linestyle=dash, linewidth=0.6 * thick,
                       marker=MARKERS[source % len(MARKERS)], markersize=2.5,
                       markevery=math.ceil(until / 8))
    for node, axes in enumerate(row):
        axes.axhline(0, color="#888888", linewidth=0.5, marker="", zorder=1)
        axes.set_title(f"node {node}", size=6.5)
        epoch_axis(axes, until, 3)
        axes.tick_params(labelleft=node == 0)
    row[0].set_ylabel(f"$w_S$, {CELLS[cell]}")
    if cell == "normal":
        pairs = [Line2D([], [], color=look(op).colour, linestyle=look(op).dash, marker="",
                        linewidth=look(op).width, label=short(op)) for op in PRIMITIVES]
        inputs = [Line2D([], [], color="black", linestyle="", marker=MARKERS[i % len(MARKERS)],
                         label=f"from {name}") for i, name in enumerate(INPUTS)]
        _legend(row[-1], pairs + inputs).set_in_layout(False)  # it is as high as both cells' axes


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
    """Draw losses, accuracies and learning rate (and drop-path probability) over the epochs."""
    names = {"loss": "loss (cross-entropy)", "accuracy": "accuracy (%)",
             "learning_rate": "learning rate"}
    if any(series(run, "drop_path_prob")[1]):
        names["drop_path_prob"] = "drop-path probability"
    figure, handles = new_figure(WIDTH, 2.1, layout="constrained"), {}
    panels = figure.subplots(1, len(names))
    for axes, (what, name) in zip(panels, names.items(), strict=True):
        axes.plot(*series(run, what), color="black")
        for kind, (images, colour) in SERIES.items():
            epochs, values = series(run, f"{kind}_{what}")
            if epochs:
                handles[images], = axes.plot(epochs, values, color=colour, label=images)
        epoch_axis(axes, run.metrics[-1]["epoch"])
        axes.set_ylabel(name)
        losses = sorted(y for line in axes.lines for y in line.get_ydata() if what == "loss")
        if losses and losses[-1] > 20 * losses[len(losses) // 2] > 0:  # it would flatten the others
            log_axis(axes)
        if run.end is not None:
            handles["end"] = axes.axvline(run.end + 0.5, label="search ends", color="black",
                                          linewidth=0.9, linestyle=(0, (4, 2)), marker="", zorder=5)
    figure.legend(handles=[*handles.values()], loc="outside lower left", ncols=4)
    what, _, values = accuracy(run)
    text = f": {what} accuracy {values[-1]:.2f} %, best {max(values):.2f} %" if values else ""
    figure.suptitle(run.name + text, x=0.01, ha="left")
    return figure


@style()
def compare_figure(runs):
    """Overlay the accuracies of runs, a panel for each kind of images they are measured on.

    Runs that differ only by seed share a colour, and have a line for their mean.
    """
    curves, handles = [(group, [accuracy(run) for run in group]) for group in groups(runs)], []
    kinds = list(dict.fromkeys(found[0][0] for _, found in curves))
    figure = new_figure(WIDTH, 2.5 + 0.14 * len(curves), layout="constrained")
    panels = dict(zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True))
    for i, (group, found) in enumerate(curves):
        axes, each, several = panels[found[0][0]], defaultdict(list), len(group) > 1
        dash = dict(color=f"C{i}", linestyle=("-", "--", "-.", ":")[i % 4])
        thin = dict(linewidth=0.5, alpha=0.6, marker="") if several else {}
        for _, epochs, values in found:
            handle, = axes.plot(epochs, values, label=group[0].name, **dash, **thin)
            for epoch, value in zip(epochs, values, strict=True):
                each[epoch].append(value)
        if several:
            means = {epoch: fmean(each[epoch]) for epoch in each if len(each[epoch]) == len(group)}
            handle, = axes.plot([*means], [*means.values()], linewidth=1.4, **dash,
                                label=f"{group[0].name} (mean of {len(group)} runs)")
        handles.append(handle)
    for kind, axes in panels.items():
        here = [values for _, found in curves for images, _, values in found if images == kind]
        epoch_axis(axes, max(run.metrics[-1]["epoch"] for run in runs if accuracy(run)[0] == kind))
        axes.set_ylabel(f"{kind} accuracy (%)")
        if any(here):  # a long rise is not worth the height
            late = [x for values in here for x in values[len(values) // 3 * (len(values) > 20) :]]
            axes.set_ylim(min(late) - 1, max(map(max, here)) + 1)
    figure.legend(handles=handles, loc="outside lower left")
    return figure


def table(runs):
    """The runs as text: one line each, and mean ± std where several differ only by seed."""
    lines = [("run", "seed", "genotype", "epochs", "measured on",
              "params M", "mult-adds M", "last %", "best %", "hours")]
    digits = (4, 1, 2, 2, 2)
    for group in groups(runs):
        results = []
        for run in group:
            (what, _, values), (done, total) = accuracy(run), progress(run)
            values = values or [None]
            sizes = [run.metrics[-1].get(key) for key in ("parameters", "multiply_adds")]
            results.append((*(size and size / 1e6 for size in sizes), values[-1], max(values),
                            sum(series(run, "seconds")[1]) / 3600))
            numbers = zip(results[-1], digits, strict=True)
            lines.append((run.name, str(run.config.get("seed", "–")), genotype_name(run.genotype),
                          str(done) if done == total else f"{done}/{total}", what,
                          *("–" if x is None else f"{x:.{n}f}" for x, n in numbers)))
        if len(group) > 1:
            columns = zip(zip(*results, strict=True), digits, strict=True)
            means = ["–" if None in x else f"{fmean(x):.{n}f} ± {stdev(x):.{n}f}"
                     for x, n in columns]
            lines.append((f"  mean ± std of {len(group)} runs", "", "", "", "", *means))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = zip("<><><>>>>>", widths, strict=True)  # texts to the left, numbers to the right
    form = "  ".join(f"{{:{side}{width}}}" for side, width in sides)
    return "\n".join(form.format(*line).rstrip() for line in lines)


# ------------------------------------------------------------------------------------------------
# Files and command line
# ------------------------------------------------------------------------------------------------


@style()
def save(figure, path):
    """Write a figure, whole and over an older one; the ending of its path is its format."""
    ending = os.path.splitext(path)[1].lower()
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    if ending not in undated:
        raise UserError(f"{path}: a picture ends in {', '.join(undated)}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending[1:], metadata=undated[ending])
    write_file(path, buffer.getbuffer())


def draw_run(run_dir, output=None, name=None, stacked=False):
    """Draw the pictures of a run, also of one that is not over; return their paths.

    These are cells (where the genotype is known), search (of a search) and curves. `output` is
    their folder, or the path of a single one, whose name ends in that of the picture and .png, .svg
    or .pdf, as in figure-1-curves.pdf.
    """
    run, drawn = read_run(os.fspath(run_dir), name), {}
    if run.genotype:
        ends = run.history[:1] + run.history[-1:]
        before = ends[0].genotype if ends and ends[0].genotype != run.genotype else None
        titles = [f"after epoch {choice.epoch}" for choice in ends]
        drawn["cells"] = partial(cells_figure, run.genotype, run.name, before, titles, stacked)
    if run.history:
        drawn["search"] = partial(search_figure, run)
    drawn["curves"] = partial(curves_figure, run)
    stem, ending = os.path.splitext(output or "")
    if ending and not os.path.isdir(output):
        asked = [what for what in drawn if stem.endswith(what)]
        if not asked:
            raise UserError(f"-o {output}: the name of a picture of this run is to end in "
                            f"{' or '.join(drawn)}, as in curves{ending}")
        paths = {output: drawn[asked[0]]}
    else:
        folder = output or run.path
        os.makedirs(folder, exist_ok=True)
        paths = {os.path.join(folder, f"{what}.png"): draw for what, draw in drawn.items()}
    for path, draw in paths.items():
        save(draw(), path)
    return list(paths)


def short_names(paths):
    """The last parts of paths, as many as tell them apart."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def get_args_parser():
    parser = flags.Parser(prog="visualize.py", description=__doc__)
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="a genotype (a genotype.json, a published name, "
        "random:SEED, a text 'Genotype(...)'), or run folders")
    parser.add_argument(
        "-o", "--output", type=flags.name, metavar="PATH", help="the picture (.png, .svg or .pdf), "
        "of a run one whose name ends in cells, search or curves; or the folder of its pictures "
        "(default: that of the first run or of the genotype.json, else this one)")
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="what titles and legends call each WHAT; runs "
        "that differ only by seed have the first one's (default: names of the run folders)")
    parser.add_argument(
        "--stacked", action="store_true", help="draw the reduction cell below the normal one, "
        f"{COLUMN} inches wide, not {WIDTH}")
    return parser


def main(args):
    what, labels, output = args.what or [], args.labels, args.output
    if not what:
        raise UserError("give a genotype, or one or more run folders")
    if labels and len(labels) != len(what):
        raise UserError(f"--labels: {len(labels)} names for {len(what)} runs or genotypes")
    label = labels and labels[0]
    if len(what) > 1:
        names = labels or short_names(what)
        runs = [read_run(path, name) for path, name in zip(what, names, strict=True)]
        figure, default = compare_figure(runs), os.path.join(runs[0].path, "compare.png")
        print(table(runs))
    elif os.path.isdir(what[0]):
        print("\n".join(draw_run(what[0], output, label, args.stacked)))
        return
    else:
        try:
            genotype, _ = genotypes.load(what[0])
        except ValueError as error:
            raise UserError(error) from None
        is_file = os.path.isfile(what[0])
        stem = os.path.splitext(what[0])[0] if is_file else what[0].replace(":", "-")
        default = "cells.png" if "Genotype(" in stem else f"{stem}.png"
        figure = cells_figure(genotype, label, stacked=args.stacked)
    if output and os.path.isdir(output):
        output = os.path.join(output, os.path.basename(default))
    save(figure, output or default)
    print(output or default)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        flags.fail("visualize.py", error)
