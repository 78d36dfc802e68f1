"""Pictures of cells and of runs.

    python visualize.py ISTA_twostage -o cells.pdf           # the two cells of a genotype
    python visualize.py runs/NAME                            # all pictures of a run
    python visualize.py runs/NAME -o curves.pdf              # one of them, for a paper

The pictures of a search are cells (the final cells and those after the first epoch), search (the
pairs of every node in every epoch) and curves; those of a training are cells and curves. A run can
be drawn before it ends. Existing pictures are overwritten. Use TensorBoard to compare runs:

    tensorboard --logdir runs
"""

import contextlib
import io
import json
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise, permutations

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


@dataclass(frozen=True)
class Look:
    """How an operation is drawn."""

    color: str
    text_color: str  # of text on a background of `color`
    dash: str | tuple  # a matplotlib line style
    width: float  # of lines, in points


# Pools, skip, separable and dilated convolutions differ by hue and by dash, 3×3 and 5×5 by width.
# All differ by lightness, for grayscale prints and color-blind readers.
LOOKS = {
    "max_pool_3x3": Look("#D9650F", "white", (0, (1, 1)), 1.5),
    "avg_pool_3x3": Look("#F2C643", "black", (0, (1, 1)), 1.5),
    "skip_connect": Look("#1A1A1A", "white", "-", 0.8),
    "sep_conv_3x3": Look("#58A6DA", "black", "-", 1.2),
    "sep_conv_5x5": Look("#0A3F7D", "white", "-", 2.0),
    "dil_conv_3x3": Look("#7CCBA2", "black", (0, (4, 1.5)), 1.2),
    "dil_conv_5x5": Look("#0A8A6E", "white", (0, (3, 1)), 2.0),
}
OTHERS = "#8E4FA8", "#C2477F", "#7A5230", "#5F6B7A", "#B01E1E"  # colors of added operations
CONCAT = Look("#9A9A9A", "", "-", 0.7)


def look(operation):
    """Return the look of an operation, which may have been added to PRIMITIVES."""
    added = [name for name in PRIMITIVES if name not in LOOKS]
    if operation in added:
        return Look(OTHERS[added.index(operation) % len(OTHERS)], "white", "-", 1.2)
    return LOOKS[operation]


def short(operation):
    """Shorten an operation's name, as in "sep 3×3" for sep_conv_3x3."""
    name = re.sub(r"_(conv|pool|connect)(?=_|$)", "", operation)
    return re.sub(r"(\d)x(?=\d)", r"\1×", name).replace("_", " ")


@contextlib.contextmanager
def style():
    """Use matplotlib's defaults with these changes, and ignore the user's matplotlibrc."""
    changes = {
        "font.size": 6.5, "axes.titlelocation": "left", "axes.titlepad": 3, "axes.axisbelow": True,
        "legend.fontsize": "medium", "legend.frameon": False, "axes.linewidth": 0.5,
        "axes.grid": True, "grid.color": "#E4E4E4", "lines.linewidth": 1, "lines.marker": ".",
        "lines.markersize": 3, "lines.markeredgewidth": 0.3, "savefig.dpi": 200,
        "axes.formatter.useoffset": False, "pdf.fonttype": 42, "svg.hashsalt": "ista-nas",
    }
    with matplotlib.style.context(changes, after_reset=True):
        yield


def new_figure(width, height, **kwargs):
    """Create a figure of this size in inches, without pyplot's windows and global state."""
    return Figure((width, height), **kwargs)


def epoch_axis(axes, until, ticks=5):
    """Let x be the epochs 1 to `until`; remove the markers of long lines, which would overlap."""
    axes.set(xlim=(0.5, until + 0.5), xlabel="epoch")
    axes.locator_params("x", integer=True, nbins=ticks, min_n_ticks=1)
    for line in axes.lines:
        if line.get_marker() == "." and until > 100:
            line.set_marker("")


def log_axis(axes):
    """Make y logarithmic, with ticks such as 0.02. Call this after drawing the lines."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The result of an epoch of a search."""

    epoch: int
    genotype: genotypes.Genotype
    weights: dict  # for each of CELLS the weights of its pairs, or None


@dataclass(frozen=True)
class Run:
    """The files of a run."""

    path: str
    name: str  # for titles
    config: dict
    metrics: list  # a dict for each epoch
    history: list  # a Choice for each epoch of a search
    genotype: genotypes.Genotype | None  # the last one
    one_stage: bool
    end: int | None  # the epoch in which a one-stage search ended


def read_run(path, name=None):
    """Read the folder of a run, which may not have ended; UserError if it is not one."""
    config_path = os.path.join(path, "config.json")
    if not os.path.exists(config_path):
        raise UserError(f"{path} is not a run folder: there is no config.json in it")
    with open(config_path, encoding="utf-8") as file:
        config = json.load(file)
    metrics = _read_rows(os.path.join(path, "metrics.jsonl"))
    if not metrics:
        raise UserError(f"{path}: no epoch has ended yet (metrics.jsonl has no whole row)")

    # A one-stage search ends when all nodes are frozen or when another phase begins.
    searching, end = [row for row in metrics if row.get("phase") == "searching"], None
    if searching and (searching[-1] is not metrics[-1] or all(metrics[-1].get("frozen") or [0])):
        end = searching[-1]["epoch"]

    history, genotype = [], None
    try:
        for row in _read_rows(os.path.join(path, "genotypes.jsonl")):
            if end is None or row["epoch"] <= end:
                genotype = genotypes.from_lists(row)
                weights = {cell: row.get(f"{cell}_weights") for cell in CELLS}
                history.append(Choice(row["epoch"], genotype, weights))
        genotype_path = os.path.join(path, "genotype.json")
        if not history and os.path.exists(genotype_path):
            genotype, _ = genotypes.load(genotype_path)
    except ValueError as error:  # other nodes or operations, if genotypes.py was edited
        raise UserError(f"{path}: {error}") from None
    if name is None:
        name = os.path.basename(os.path.abspath(path))
    return Run(path, name, config, metrics, history, genotype, bool(searching), end)


def _read_rows(path):
    """Rows of a .jsonl file, sorted by epoch; without the last one if it is incomplete."""
    rows = {}
    with open(path if os.path.exists(path) else os.devnull, errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


def series(run, key):
    """Epochs and values of a metric, where it is a finite number."""
    rows = [row for row in run.metrics if isinstance(row.get(key), int | float)]
    rows = [row for row in rows if abs(row[key]) < 1e38]  # matplotlib cannot scale larger ones
    return [row["epoch"] for row in rows], [row[key] for row in rows]


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------

# A cell is drawn in columns, one for each layer: the inputs, the nodes by the length of the longest
# path to them, the output. Each node has a row of its own. To the left of a node are the labels of
# its pairs. The lines to the labels come from the left, and the line from the node to the output
# leaves to the right. So in any genotype lines bend and cross only in the gaps between columns,
# where there are no labels and nodes. Sizes are in inches, and y points down.


def label(operation):
    """The short name of an operation in two lines of at most 9 characters."""
    lines = short(operation).split(" ", 1)
    return "\n".join(line if len(line) < 10 else f"{line[:8]}…" for line in lines)


OUTPUT = 2 + NODES  # the number of the output; inputs are 0 and 1
NAMES = ("$c_{k-2}$", "$c_{k-1}$", *map(str, range(NODES)), "$c_k$")
# Widths of a label, the arrow after it, a node, the inputs and the output.
LABEL = max(0.275, *(0.06 * len(line) for op in PRIMITIVES for line in label(op).split("\n")))
ARROW, NODE, OUTER = 0.075, 0.15, 0.3
INNER = LABEL + ARROW + NODE  # width of a column of nodes
MIN_GAP = 0.1  # between two columns
PAIR, SPACE = 0.27, 0.04  # heights: of a label, and between two nodes
MARGIN, HEAD = 0.06, 0.25  # around a cell, and above it for its name


def cells_figure(genotype, title=None, before=None, titles=("", ""), stacked=False):
    """Draw the normal and the reduction cell, in a single column if `stacked`.

    If an earlier genotype `before` is given, it is drawn above, and labels are filled if only one
    of the genotypes has the pair. `titles` are the names of the earlier and of this genotype.
    """
    versions = [(genotype, genotype, "")]
    if before:
        versions = [(before, genotype, f", {titles[0]}"), (genotype, before, f", {titles[1]}")]
        title = (title or "") + "   filled: pairs that the other epoch does not have"
    panels = [
        (name + suffix, getattr(shown, cell), getattr(shown, f"{cell}_concat"),
         getattr(other, cell))
        for shown, other, suffix in versions
        for cell, name in CELLS.items()
    ]
    columns, width = (1, COLUMN) if stacked else (2, WIDTH)
    rows = len(panels) // columns

    # Widen the gaps so that the deepest cells of all columns fill the width of the figure.
    depths = [max(layers(panel[1])[OUTPUT] for panel in panels[i::columns]) for i in range(columns)]
    gap = (width - sum(cell_width(depth, 0) for depth in depths)) / sum(depths)
    gap = max(gap, MIN_GAP)
    widths = [cell_width(depth, gap) for depth in depths]
    cell_height = len(genotype.normal) * PAIR + NODES * SPACE
    title_height = 0.22 if title else 0
    height = title_height + rows * (HEAD + cell_height)
    with style():
        figure = new_figure(sum(widths), height)
        grid = figure.subplots(
            rows, columns, squeeze=False, width_ratios=widths, gridspec_kw=dict(
                left=0, right=1, bottom=0, top=1 - title_height / height, wspace=0, hspace=0))
        for i, (name, pairs, concat, other_pairs) in enumerate(panels):
            axes = grid.flat[i]
            axes.set(xlim=(-MARGIN, widths[i % columns] - MARGIN), ylim=(cell_height, -HEAD))
            axes.axis("off")
            axes.text(0, 0.05 - HEAD, name, va="top", size="large")
            draw_cell(axes, pairs, concat, other_pairs, gap)
        figure.text(MARGIN / sum(widths), 1 - 0.05 / height, title or "", va="top", size="large")
        return figure


def cell_width(depth, gap):
    """Width of a cell of depth - 1 columns of nodes between the inputs and the output."""
    return 2 * MARGIN + 2 * OUTER + (depth - 1) * INNER + depth * gap


def layers(pairs):
    """Map each node to its layer, the length of the longest path from an input."""
    layer = {0: 0, 1: 0}
    for node, chosen in enumerate(by_node(pairs), 2):
        layer[node] = 1 + max(layer[source] for _, source in chosen)
    return {**layer, OUTPUT: 1 + max(layer.values())}


def draw_cell(axes, pairs, concat, other_pairs, gap):
    """Draw a cell; fill the labels of pairs that `other_pairs` lacks at the same node."""
    each, layer = len(pairs) // NODES, layers(pairs)
    # Edges as (source, target): edge k belongs to pair k, and edges to the output follow.
    edges = [(source, 2 + k // each) for k, (_, source) in enumerate(pairs)]
    edges += [(node, OUTPUT) for node in concat]
    row = each * PAIR + SPACE
    height = {node: row - SPACE if 2 <= node < OUTPUT else 0.4 for node in layer}
    center = order_rows(edges, row)
    start_y, end_y = edge_ends(edges, center, height)

    # Columns begin at these x: the inputs, the nodes and, in the last one, the output.
    column_x = [0.0, *(OUTER + gap + i * (INNER + gap) for i in range(layer[OUTPUT]))]
    for k, (source, target) in reversed(list(enumerate(edges))):
        start = column_x[layer[source]] + (INNER if source > 1 else OUTER)
        end = column_x[layer[target]]
        # An edge to the output bends in the last gap, any other one right after its source.
        bend = end - gap if target == OUTPUT else start
        path = edge_path((start, start_y[k]), (end, end_y[k]), bend, gap)
        line = CONCAT if target == OUTPUT else look(pairs[k][0])
        # A wider white line below separates edges where they cross.
        for color, dash, width in (("white", "-", line.width + 1.6),
                                   (line.color, line.dash, line.width)):
            axes.add_patch(PathPatch(path, fill=False, edgecolor=color, linestyle=dash,
                                     linewidth=width, capstyle="butt", gid=f"edge {k}"))
    for k, (operation, source) in enumerate(pairs):
        color = look(operation).color
        x, y = column_x[layer[2 + k // each]], end_y[k]
        is_new = (operation, source) not in by_node(other_pairs)[k // each]
        draw_box(axes, (x, y - PAIR / 2 + 0.02, LABEL, PAIR - 0.04), f"label {k}", label(operation),
                 size=6.2, color=look(operation).text_color if is_new else "black",
                 edge=color, fill=color if is_new else "white")
        axes.plot(x + LABEL + ARROW / 2, y, ">", color=color, markersize=2.5)
    for node, name in enumerate(NAMES):
        x, y = column_x[layer[node]], center[node] - height[node] / 2
        if node in (0, 1, OUTPUT):
            place, size, fill = (x, y, OUTER, height[node]), 8.6, "#F7F2E4"
        else:
            place, size, fill = (x + LABEL + ARROW, y, NODE, height[node]), 7, "#E6E6E6"
        draw_box(axes, place, f"node {node}", name, size=size, edge="#555555", fill=fill)


def order_rows(edges, row):
    """List the y of the center of each node, with the nodes in the order of the shortest edges."""
    total = NODES * row

    def centers(order):
        nodes = [(position + 0.5) * row for position in order]
        return [0.3 * total, 0.7 * total, *nodes, 0.5 * total]

    def length(y):
        return sum(abs(y[source] - y[target]) for source, target in edges)

    orders = islice(permutations(range(NODES)), math.factorial(7))  # all, for up to 7 nodes
    return min(map(centers, orders), key=length)


def edge_ends(edges, center, height):
    """Two dicts: the y at which each edge starts, and that at which it ends."""

    def spread(ordered, node):
        n = len(ordered)
        return {k: center[node] + (i - (n - 1) / 2) * height[node] / n
                for i, k in enumerate(ordered)}

    # Edges touch a node in the order of their other ends, so that they do not cross next to it.
    start_y, end_y = {}, {}
    for node in height:
        ending = [k for k, (_, target) in enumerate(edges) if target == node]
        end_y |= spread(sorted(ending, key=lambda k: center[edges[k][0]]), node)
    for node in height:
        starting = [k for k, (source, _) in enumerate(edges) if source == node]
        # An edge to the output does not bend behind its source, so it starts in the middle.
        other_y = {k: center[node] if edges[k][1] == OUTPUT else end_y[k] for k in starting}
        start_y |= spread(sorted(starting, key=other_y.get), node)
    return start_y, end_y


def edge_path(start, end, bend, gap):
    """A horizontal line with an S-curve from x = `bend` to `bend + gap`."""
    (x0, y0), (x1, y1) = start, end
    control = 0.55 * gap  # distance of the control points from the ends of the curve
    points = [(x0, y0), (bend, y0), (bend + control, y0), (bend + gap - control, y1),
              (bend + gap, y1), (x1, y1)]
    curve = [Path.CURVE4] * 3
    return Path(points, [Path.MOVETO, Path.LINETO, *curve, Path.LINETO])


def draw_box(axes, place, gid, text, *, size, edge, fill, color="black"):
    """Draw a rounded box at (x, y, width, height) with a text in it."""
    x, y, width, height = place
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.03", zorder=3,
                                  linewidth=0.7, edgecolor=edge, facecolor=fill, gid=gid))
    axes.text(x + width / 2, y + height / 2 + 0.005, text, size=size, color=color, zorder=4,
              ha="center", va="center", linespacing=0.95, gid=f"text of {gid}")


# ------------------------------------------------------------------------------------------------
# Search
# ------------------------------------------------------------------------------------------------

STRIP, LANE = 5.2, 0.142  # inches: approximate width of all epochs, height of a lane
INPUTS = ("k−2", "k−1", *map(str, range(NODES - 1)))
MARKERS = "osD^vP*<>"  # of the inputs of a node


@style()
def search_figure(run):
    """Draw for every epoch the pairs of every node, how far its code moved, and pair weights."""
    until = run.end or run.metrics[-1]["epoch"]
    lanes = {cell: _lanes(run, cell) for cell in CELLS}
    has_distances = any(row.get("distance") for row in run.metrics)
    weight_cells = [cell for cell in CELLS if run.history[-1].weights[cell]]
    heights = [LANE * _bottom(lanes[cell]) for cell in CELLS]
    heights += [1.1] * has_distances + [0.9] * len(weight_cells)
    figure = new_figure(WIDTH, 0.4 + sum(heights) + 0.45 * len(heights), layout="constrained")
    grid = figure.add_gridspec(len(heights), NODES, height_ratios=heights)
    rows = iter(range(len(heights)))
    for cell in CELLS:
        _draw_choices(figure.add_subplot(grid[next(rows), :]), run, until, cell, lanes[cell])
    if has_distances:
        _draw_distances(figure.add_subplot(grid[next(rows), :]), run, until)
    for cell in weight_cells:
        row = next(rows)
        panels = [figure.add_subplot(grid[row, 0])]
        panels += [figure.add_subplot(grid[row, j], sharey=panels[0]) for j in range(1, NODES)]
        _draw_weights(panels, run, until, cell)
    changes = [b.epoch for a, b in pairwise(run.history) if a.genotype != b.genotype]
    text = f"last change of a pair in epoch {changes[-1]}" if changes else "no change of a pair"
    figure.suptitle(f"{run.name}: {text}; {until} epochs of search", x=0.01, ha="left")
    return figure


def _legend(axes, handles):
    """Add a legend to the right of the axes."""
    return axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize=6,
                       labelspacing=0.2)


def _lanes(run, cell):
    """Top and height of the lane of each (node, input), in lanes of a single operation.

    The height is the largest number of operations that a node takes from this input in an epoch.
    """
    lanes, top = {}, 0
    for node in range(NODES):
        chosen = [by_node(getattr(choice.genotype, cell))[node] for choice in run.history]
        for source in range(2 + node):
            height = max(1, *(sum(s == source for _, s in pairs) for pairs in chosen))
            lanes[node, source] = top, height
            top += height
        top += 0.5  # space between two nodes
    return lanes


def _bottom(lanes, node=NODES - 1):
    """The bottom of the last lane of a node."""
    top, height = lanes[node, node + 1]
    return top + height


def _freeze_epochs(run):
    """Map each frozen node, counted over both cells, to the epoch in which it froze."""
    epochs = {}
    for row in run.metrics:
        for node, frozen in enumerate(row.get("frozen") or ()):
            if frozen:
                epochs.setdefault(node, row["epoch"])
    return epochs


def _bars(run, cell, freezes):
    """Consecutive epochs of each pair: {(node, pair, place in its lane, frozen): [[start, stop]]}.

    The place (i, n) is i of n, if n operations take the same input. A bar ends when the place
    changes and when the node freezes.
    """
    bars = defaultdict(list)
    for choice in run.history:
        for node, pairs in enumerate(by_node(getattr(choice.genotype, cell))):
            frozen = choice.epoch > freezes.get(node, math.inf)
            for operation, source in pairs:
                same_input = [op for op, other in pairs if other == source]
                place = same_input.index(operation), len(same_input)
                spans = bars[node, (operation, source), place, frozen]
                if spans and spans[-1][1] == choice.epoch - 0.5:
                    spans[-1][1] += 1
                else:
                    spans.append([choice.epoch - 0.5, choice.epoch + 0.5])
    return bars


def _draw_choices(axes, run, until, cell, lanes):
    """Draw a lane for each input of each node, with bars while a pair of the node takes it."""
    first = 0 if cell == "normal" else NODES
    freezes = {node - first: epoch for node, epoch in _freeze_epochs(run).items()}
    for top, height in lanes.values():
        axes.axhspan(top, top + height, facecolor="#F0F0F0", edgecolor="white")
    for (node, (operation, source), (i, n), _), spans in _bars(run, cell, freezes).items():
        name, color = short(operation), look(operation).color
        lane_top, lane_height = lanes[node, source]
        top, height = lane_top + i * lane_height / n, lane_height / n
        for start, stop in spans:
            axes.barh(top, stop - start, height, start, align="edge", color=color,
                      edgecolor="white", linewidth=0.5)
            inches = (min(stop, until + 0.5) - start) * STRIP / until
            if inches > 0.055 * len(name) + 0.05:  # the name fits into the bar
                axes.text(start + 0.035 * until / STRIP, top + height / 2, name, size=6,
                          color=look(operation).text_color, va="center_baseline", gid="bar")
    for node in freezes.keys() & range(NODES):
        axes.vlines(freezes[node] + 0.5, lanes[node, 0][0], _bottom(lanes, node),
                    color="black", linewidth=1.6, clip_on=False)
    axes.set_yticks([top + height / 2 for top, height in lanes.values()],
                    [f"{INPUTS[source]} → {node}" for node, source in lanes], size=6)
    axes.set(ylim=(_bottom(lanes), 0), title=CELLS[cell], ylabel="input → node")
    axes.tick_params("y", length=0)
    axes.grid(False)
    epoch_axis(axes, until, 10)
    if cell == "normal":
        stroke = Line2D([], [], linestyle="", marker="|", markersize=7, markeredgewidth=1.6,
                        color="black", label="node freezes")
        colors = [Patch(color=look(op).color, label=short(op)) for op in PRIMITIVES]
        _legend(axes, colors + [stroke] * run.one_stage)


def _draw_distances(axes, run, until):
    """Draw a line for each node. It ends when the node freezes, as the distance is 0 afterwards."""
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
    epoch_axis(axes, until, 10)


def _draw_weights(panels, run, until, cell):
    """Draw a panel for each node, with a line for each pair while it is active."""
    lines = defaultdict(lambda: [math.nan] * len(run.history))
    for i, choice in enumerate(run.history):
        pairs, weights = getattr(choice.genotype, cell), choice.weights[cell] or ()
        for k, (pair, weight) in enumerate(zip(pairs, weights, strict=False)):
            node = k * NODES // len(pairs)
            lines[node, pair][i] = weight
    epochs = [choice.epoch for choice in run.history]
    for (node, (operation, source)), values in lines.items():
        op_look = look(operation)
        panels[node].plot(epochs, values, color=op_look.color, linestyle=op_look.dash,
                          linewidth=0.6 * op_look.width, marker=MARKERS[source % len(MARKERS)],
                          markersize=2.5, markevery=math.ceil(until / 8))
    for node, axes in enumerate(panels):
        axes.axhline(0, color="#888888", linewidth=0.5, marker="", zorder=1)
        axes.set_title(f"node {node}", size=6.5)
        epoch_axis(axes, until, 3)
        axes.tick_params(labelleft=node == 0)
    panels[0].set_ylabel(f"$w_S$, {CELLS[cell]}")
    if cell == "normal":
        operations = [Line2D([], [], color=look(op).color, linestyle=look(op).dash, marker="",
                             linewidth=look(op).width, label=short(op)) for op in PRIMITIVES]
        inputs = [Line2D([], [], color="black", linestyle="", marker=MARKERS[i % len(MARKERS)],
                         label=f"from {name}") for i, name in enumerate(INPUTS)]
        # The legend extends over the panels of both cells, so ignore its height in the layout.
        _legend(panels[-1], operations + inputs).set_in_layout(False)


# ------------------------------------------------------------------------------------------------
# Curves
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
    for axes, (metric, name) in zip(panels, names.items(), strict=True):
        axes.plot(*series(run, metric), color="black")
        for prefix, (images, color) in SERIES.items():
            epochs, values = series(run, f"{prefix}_{metric}")
            if epochs:
                handles[images], = axes.plot(epochs, values, color=color, label=images)
        epoch_axis(axes, run.metrics[-1]["epoch"])
        axes.set_ylabel(name)
        if metric == "loss":
            # Use a logarithmic axis if an outlier would flatten the rest of the curves.
            losses = sorted(y for line in axes.lines for y in line.get_ydata())
            if losses and losses[-1] > 20 * losses[len(losses) // 2] > 0:
                log_axis(axes)
        if run.end is not None:
            handles["end"] = axes.axvline(run.end + 0.5, label="search ends", color="black",
                                          linewidth=0.9, linestyle=(0, (4, 2)), marker="", zorder=5)
    figure.legend(handles=[*handles.values()], loc="outside lower left", ncols=4)
    title = run.name
    for prefix, images in (("valid", "validation"), ("test", "test"), ("train", "training")):
        _, values = series(run, f"{prefix}_accuracy")
        if values:
            title += f": {images} accuracy {values[-1]:.2f} %, best {max(values):.2f} %"
            break
    figure.suptitle(title, x=0.01, ha="left")
    return figure


# ------------------------------------------------------------------------------------------------
# Files and command line
# ------------------------------------------------------------------------------------------------


@style()
def save(figure, path):
    """Write a figure atomically, in the format of the ending of `path`."""
    ending = os.path.splitext(path)[1].lower()
    # Leave out dates, so that equal figures give equal files.
    metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    if ending not in metadata:
        raise UserError(f"{path}: a picture ends in {', '.join(metadata)}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending[1:], metadata=metadata[ending])
    write_file(path, buffer.getbuffer())


def draw_run(run_dir, output=None, name=None, stacked=False):
    """Draw the pictures of a run, which may not have ended, and return their paths.

    `output` is the folder for the pictures, by default that of the run, or the path of a single
    picture. Its name ends in cells, search or curves, and .png, .svg or .pdf: figure-1-curves.pdf.
    """
    run = read_run(os.fspath(run_dir), name)
    drawings = {}
    if run.genotype:
        before, titles = None, ("", "")
        if run.history and run.history[0].genotype != run.genotype:
            before = run.history[0].genotype
            titles = [f"after epoch {run.history[i].epoch}" for i in (0, -1)]
        drawings["cells"] = partial(cells_figure, run.genotype, run.name, before, titles, stacked)
    if run.history:
        drawings["search"] = partial(search_figure, run)
    drawings["curves"] = partial(curves_figure, run)
    stem, ending = os.path.splitext(output or "")
    if ending and not os.path.isdir(output):
        chosen = [picture for picture in drawings if stem.endswith(picture)]
        if not chosen:
            raise UserError(f"-o {output}: the name of a picture of this run is to end in "
                            f"{' or '.join(drawings)}, as in curves{ending}")
        paths = {output: drawings[chosen[0]]}
    else:
        folder = output or run.path
        os.makedirs(folder, exist_ok=True)
        paths = {os.path.join(folder, f"{name}.png"): draw for name, draw in drawings.items()}
    for path, draw in paths.items():
        save(draw(), path)
    return list(paths)


def get_args_parser():
    parser = flags.Parser(prog="visualize.py", description=__doc__)
    parser.add_argument(
        "what", metavar="WHAT", help="a genotype (a genotype.json, a published name, random:SEED, "
        "a text 'Genotype(...)'), or the folder of a run")
    parser.add_argument(
        "-o", "--output", type=flags.nonempty, metavar="PATH", help="path of the picture (.png, "
        ".svg or .pdf), whose name must end in cells, search or curves for a run; or a folder for "
        "the pictures (default: that of the run or of the genotype.json, or the current folder)")
    parser.add_argument(
        "--title", metavar="TEXT", help="title of the pictures (default: the name of the run)")
    parser.add_argument(
        "--stacked", action="store_true", help="draw the reduction cell below the normal one, "
        f"{COLUMN} inches wide instead of {WIDTH}")
    return parser


def main(args):
    if os.path.isdir(args.what):
        print("\n".join(draw_run(args.what, args.output, args.title, args.stacked)))
        return
    try:
        genotype, _ = genotypes.load(args.what)
    except ValueError as error:
        raise UserError(error) from None
    if os.path.isfile(args.what):
        output = os.path.splitext(args.what)[0] + ".png"
    elif "Genotype(" in args.what:
        output = "cells.png"
    else:
        output = args.what.replace(":", "-") + ".png"
    if args.output and os.path.isdir(args.output):
        output = os.path.join(args.output, os.path.basename(output))
    elif args.output:
        output = args.output
    save(cells_figure(genotype, args.title, stacked=args.stacked), output)
    print(output)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        flags.fail("visualize.py", error)
