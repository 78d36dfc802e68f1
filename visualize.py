"""Pictures of cells and of runs.

    python visualize.py ISTA_twostage -o cells.pdf           # the two cells of a genotype
    python visualize.py runs/NAME                            # all pictures of a run
    python visualize.py runs/NAME -o curves.pdf              # one of them, for a paper

The pictures of a search are cells, search (the pairs of every node after every epoch) and curves.
Those of a training are cells and curves. A run can be drawn before it ends. Existing pictures are
overwritten. Use TensorBoard to compare runs: tensorboard --logdir runs
"""

import contextlib
import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice, pairwise, permutations

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.patheffects import withStroke

import genotypes
from genotypes import NODES, PRIMITIVES, by_node
from harness import flags
from utils import UserError, write_file

WIDTH = 6.9  # inches, of a page
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


def epoch_axis(axes, until):
    """Let x be the epochs 1 to `until`; remove the markers of long lines, which would overlap."""
    axes.set(xlim=(0.5, until + 0.5), xlabel="epoch")
    axes.locator_params("x", integer=True, min_n_ticks=1)
    if until > 100:
        for line in axes.lines:
            line.set_marker("")


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The result of an epoch of a search."""

    epoch: int
    genotype: genotypes.Genotype
    weights: dict  # for each of CELLS the weights of its pairs


@dataclass(frozen=True)
class Run:
    """The files of a run."""

    name: str  # for titles
    config: dict
    metrics: list  # a dict for each epoch
    history: list  # a Choice for each epoch of a search
    genotype: genotypes.Genotype | None  # the last one
    end: int | None  # the epoch in which a one-stage search ended


def read_run(path, name=None):
    """Read the folder of a run, which may not have ended; UserError if it is not one."""
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} is not a run folder: there is no config.json in it") from None
    metrics = _read_rows(os.path.join(path, "metrics.jsonl"))
    if not metrics:
        raise UserError(f"{path}: no epoch has ended yet (metrics.jsonl has no whole row)")

    # A one-stage search ends when all nodes are frozen or when another phase begins.
    end = None
    searching = [row for row in metrics if row.get("phase") == "searching"]
    if searching:
        last = searching[-1]
        if last is not metrics[-1] or (last.get("frozen") and all(last["frozen"])):
            end = last["epoch"]

    history, genotype = [], None
    try:
        for row in _read_rows(os.path.join(path, "genotypes.jsonl")):
            if end is None or row["epoch"] <= end:
                genotype = genotypes.from_lists(row)
                weights = {cell: row.get(f"{cell}_weights") or [] for cell in CELLS}
                history.append(Choice(row["epoch"], genotype, weights))
        genotype_path = os.path.join(path, "genotype.json")
        if not history and os.path.exists(genotype_path):
            genotype, _ = genotypes.load(genotype_path)
    except ValueError as error:  # other nodes or operations, if genotypes.py was edited
        raise UserError(f"{path}: {error}") from None
    name = name or os.path.basename(os.path.abspath(path))
    return Run(name, config, metrics, history, genotype, end)


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

# The columns of a cell are the inputs, the nodes by the length of the longest path to them, and the
# output. Each node has a row of its own, in which the edges to the node arrive from the left and
# its edge to the output leaves to the right. So for any genotype, edges bend and cross only between
# columns, where there are no labels and nodes. Sizes are in inches, and y points down.

OUTPUT = 2 + NODES  # the number of the output; inputs are 0 and 1
NAMES = ("$c_{k-2}$", "$c_{k-1}$", *map(str, range(NODES)), "$c_k$")
OUTER, INNER = 0.3, 0.15  # widths: of inputs and output, and of other nodes
# The width of the longest line of a label, which has the first word of a name in its first line.
LABEL = max(0.275, *(0.06 * len(line) for op in PRIMITIVES for line in short(op).split(" ", 1)))
ARROW, GAP = 0.085, 0.16  # widths: after a label, and at least before it
PAIR, SPACE = 0.27, 0.05  # heights: of the label of a pair, and between two nodes


@style()
def cells_figure(genotype, title=None):
    """Draw the normal and the reduction cell."""
    depth = max(layers(getattr(genotype, cell))[OUTPUT] for cell in CELLS)
    width = max(WIDTH / 2 - 0.1, OUTER + depth * (GAP + LABEL + ARROW + INNER))
    height = len(genotype.normal) * PAIR + NODES * SPACE
    figure = new_figure(2 * width + 0.2, height + (0.5 if title else 0.3), layout="constrained")
    for axes, (cell, name) in zip(figure.subplots(1, 2), CELLS.items(), strict=True):
        axes.set(xlim=(-0.02, width + 0.02), ylim=(height, 0), title=name)
        axes.axis("off")
        draw_cell(axes, getattr(genotype, cell), getattr(genotype, f"{cell}_concat"), width)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def layers(pairs):
    """Map each node to its column, the length of the longest path from an input."""
    layer = {0: 0, 1: 0}
    for node, chosen in enumerate(by_node(pairs), 2):
        layer[node] = 1 + max(layer[source] for _, source in chosen)
    layer[OUTPUT] = 1 + max(layer.values())
    return layer


def draw_cell(axes, pairs, concat, width):
    """Draw the nodes of a cell, its pairs, and the edges to its output."""
    each, layer = len(pairs) // NODES, layers(pairs)
    edges = [(source, 2 + k // each) for k, (_, source) in enumerate(pairs)]
    edges += [(node, OUTPUT) for node in concat]
    height = each * PAIR
    y = order_rows(edges, height + SPACE)
    # Edges touch a node in the order of their other ends, so that they do not cross next to it.
    # Edges to the output begin in the row of their source.
    end_y = spread([(target, y[source]) for source, target in edges], y, height)
    ends = zip(edges, end_y, strict=True)
    start_y = spread([(s, y[s] if t == OUTPUT else end) for (s, t), end in ends], y, height)
    column = (width - OUTER) / layer[OUTPUT]
    gap = column - LABEL - ARROW - INNER
    right = [OUTER + layer[node] * column for node in range(OUTPUT + 1)]
    left = [x - (OUTER if node in (0, 1, OUTPUT) else INNER) for node, x in enumerate(right)]
    for k, (source, target) in enumerate(edges):
        # An edge to the output bends in the last gap, any other one right after its source.
        bend = right[target] - column if target == OUTPUT else right[source]
        points = [(right[source], start_y[k]), (bend, start_y[k]), (bend + gap / 2, start_y[k]),
                  (bend + gap / 2, end_y[k]), (bend + gap, end_y[k]), (left[target], end_y[k])]
        curve = Path(points, [Path.MOVETO, Path.LINETO, *[Path.CURVE4] * 3, Path.LINETO])
        line = CONCAT if target == OUTPUT else look(pairs[k][0])
        # A white outline separates edges where they cross.
        outline = withStroke(linewidth=line.width + 1.6, foreground="white")
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=line.color, linestyle=line.dash,
                                 linewidth=line.width, path_effects=[outline], gid=f"edge {k}"))
        axes.plot(left[target] - 0.03, end_y[k], ">", color=line.color, markersize=4)
        if target != OUTPUT:
            name = short(pairs[k][0]).replace(" ", "\n", 1)
            box = dict(boxstyle="round,pad=0.2", facecolor="white", edgecolor=line.color)
            axes.text(left[target] - ARROW - LABEL / 2, end_y[k], name, size=6.2,
                      ha="center", va="center", linespacing=0.95, gid=f"label {k}", bbox=box)
    for node, name in enumerate(NAMES):
        color = "#E6E6E6" if 2 <= node < OUTPUT else "#F7F2E4"
        axes.add_patch(Rectangle((left[node], y[node] - height / 2), right[node] - left[node],
                                 height, facecolor=color, edgecolor="#555555", linewidth=0.7))
        axes.text((left[node] + right[node]) / 2, y[node], name, size=8, ha="center", va="center")


def order_rows(edges, row):
    """List the y of the center of each node, with the rows in the order of the shortest edges."""
    def centers(order):
        nodes = [(position + 0.5) * row for position in order]
        return [NODES * row / 4, NODES * row * 3 / 4, *nodes, NODES * row / 2]

    def length(y):
        return sum(abs(y[source] - y[target]) for source, target in edges)

    orders = islice(permutations(range(NODES)), math.factorial(7))  # all, for up to 7 nodes
    return min(map(centers, orders), key=length)


def spread(ends, y, height):
    """List the y of ends of edges, (node, y of the other end), spaced evenly at each node."""
    ends_y = []
    for k, (node, other_y) in enumerate(ends):
        same_node = sorted((end[1], i) for i, end in enumerate(ends) if end[0] == node)
        place = (same_node.index((other_y, k)) + 0.5) / len(same_node)  # between 0 and 1
        ends_y.append(y[node] + (place - 0.5) * height)
    return ends_y


# ------------------------------------------------------------------------------------------------
# Epochs of a run
# ------------------------------------------------------------------------------------------------

SPACING = 0.7  # between the lanes of two nodes, where a lane has height 1
SERIES = {
    "test": ("test", "#E07B00"),
    "valid": ("validation (architecture half, not augmented)", "#E07B00"),
    "arch": ("architecture half (augmented, during training)", "#7CC4F0"),
    "train": ("training", "#0B2A4A"),
}


@style()
def search_figure(run):
    """Draw the pairs of every node after every epoch, how far its code moved, and pair weights."""
    until = run.end or run.metrics[-1]["epoch"]
    lanes = {cell: _lanes(run, cell) for cell in CELLS}
    rows = [[name] * NODES for name in (*CELLS, "distance")]
    rows += [[f"{cell} {node}" for node in range(NODES)] for cell in CELLS]
    heights = [0.142 * (len(lanes[cell]) + SPACING * NODES) for cell in CELLS] + [1.1, 0.9, 0.9]
    figure = new_figure(WIDTH, sum(heights) + 2.6, layout="constrained")
    panels = figure.subplot_mosaic(rows, height_ratios=heights)
    for cell, name in CELLS.items():
        _draw_lanes(panels[cell], lanes[cell], until)
        panels[cell].set_title(name)
        for node in range(NODES):
            _draw_weights(panels[f"{cell} {node}"], run, cell, node)
        panels[f"{cell} 0"].set_ylabel(f"$w_S$, {name}")
    _draw_distances(panels["distance"], run)
    for axes in figure.axes:
        epoch_axis(axes, until)
    operations = [Patch(color=look(op).color, label=short(op)) for op in PRIMITIVES]
    panels["normal"].legend(handles=operations, loc="upper left", bbox_to_anchor=(1, 1))
    changes = [b.epoch for a, b in pairwise(run.history) if a.genotype != b.genotype]
    text = f"last change of a pair in epoch {changes[-1]}" if changes else "no change of a pair"
    figure.suptitle(f"{run.name}: {text}; {until} epochs of search", x=0.01, ha="left")
    return figure


def _lanes(run, cell):
    """Map each lane (node, input, place) to its bars [operation, first epoch, last epoch]."""
    # Place 1 is for the second operation that a node takes from the same input.
    lanes = {(node, source, 0): [] for node in range(NODES) for source in range(2 + node)}
    for choice in run.history:
        for node, pairs in enumerate(by_node(getattr(choice.genotype, cell))):
            places = Counter()
            for operation, source in pairs:
                bars = lanes.setdefault((node, source, places[source]), [])
                places[source] += 1
                if bars and bars[-1][0] == operation and bars[-1][2] == choice.epoch - 1:
                    bars[-1][2] = choice.epoch
                else:
                    bars.append([operation, choice.epoch, choice.epoch])
    return dict(sorted(lanes.items()))


def _draw_lanes(axes, lanes, until):
    """Draw the bars of all lanes of a cell, with names of operations where they fit."""
    tops = {lane: i + SPACING * lane[0] for i, lane in enumerate(lanes)}
    for lane, bars in lanes.items():
        axes.axhspan(tops[lane], tops[lane] + 1, facecolor="#F0F0F0", edgecolor="white")
        for operation, first, last in bars:
            length = last + 1 - first
            axes.barh(tops[lane], length, 1, first - 0.5, align="edge", linewidth=0.5,
                      color=look(operation).color, edgecolor="white")
            if length / until > 0.0125 * len(short(operation)):
                axes.text(first - 0.5 + 0.007 * until, tops[lane] + 0.5, short(operation), size=6,
                          color=look(operation).text_color, va="center_baseline")
    labeled = [lane for lane in lanes if lane[2] == 0]
    axes.set_yticks([tops[lane] + 0.5 for lane in labeled],
                    [f"{NAMES[source]} → {node}" for node, source, _ in labeled], size=6)
    axes.set(ylim=(max(tops.values()) + 1, 0), ylabel="input → node")
    axes.tick_params("y", length=0)
    axes.grid(False)


def _draw_distances(axes, run):
    """Draw a line for each node. It ends when the node freezes, as the distance is 0 afterwards."""
    rows = [row for row in run.metrics if row.get("distance")]
    for node in range(2 * NODES):
        cell, dash = (("normal", "-"), ("reduction", "--"))[node // NODES]
        values = [row["distance"][node] or math.nan for row in rows]
        axes.plot([row["epoch"] for row in rows], values, dash, label=f"{cell} {node % NODES}",
                  color=matplotlib.colormaps["viridis"](node % NODES / NODES))
    if run.config.get("one_stage") and run.config.get("freeze_tol"):
        axes.axhline(run.config["freeze_tol"], color="black", linestyle=":", marker="",
                     label="tolerance")
    axes.set(title="distance of each code from the last one", ylabel="$\\|z_t - z_{t-1}\\|_2$",
             yscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_weights(axes, run, cell, node):
    """Draw a line for each pair of a node while it is active."""
    lines = defaultdict(lambda: [math.nan] * len(run.history))
    for i, choice in enumerate(run.history):
        pairs = by_node(getattr(choice.genotype, cell))[node]
        for pair, weight in zip(pairs, by_node(choice.weights[cell])[node], strict=False):
            lines[pair][i] = weight
    axes.axhline(0, color="#888888", linewidth=0.5, marker="")
    axes.set_title(f"node {node}")
    for (operation, _), weights in lines.items():
        axes.plot([choice.epoch for choice in run.history], weights, color=look(operation).color,
                  linestyle=look(operation).dash, linewidth=0.6 * look(operation).width)


@style()
def curves_figure(run):
    """Draw losses, accuracies and learning rate (and drop-path probability) over the epochs."""
    quantities = {"loss": "loss (cross-entropy)", "accuracy": "accuracy (%)",
                  "learning_rate": "learning rate"}
    if any(series(run, "drop_path_prob")[1]):
        quantities["drop_path_prob"] = "drop-path probability"
    figure, handles = new_figure(WIDTH, 2.1, layout="constrained"), {}
    panels = figure.subplots(1, len(quantities))
    for axes, (quantity, name) in zip(panels, quantities.items(), strict=True):
        axes.plot(*series(run, quantity), color="black")  # learning rate, drop-path probability
        for prefix, (images, color) in SERIES.items():
            epochs, values = series(run, f"{prefix}_{quantity}")
            if epochs:
                [handles[images]] = axes.plot(epochs, values, color=color, label=images)
        if run.end is not None:
            handles["end"] = axes.axvline(run.end + 0.5, color="black", linestyle="--", marker="",
                                          label="search ends")
        axes.set_ylabel(name)
        epoch_axis(axes, run.metrics[-1]["epoch"])
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


def draw_run(run_dir, output=None, name=None):
    """Draw the pictures of a run, which may not have ended, and return their paths.

    `output` is the folder for the pictures, by default that of the run, or the path of a single
    picture. Its name ends in cells, search or curves, and .png, .svg or .pdf: figure-1-curves.pdf.
    """
    run = read_run(os.fspath(run_dir), name)
    drawings = {}
    if run.genotype:
        drawings["cells"] = lambda: cells_figure(run.genotype, run.name)
    if run.history:
        drawings["search"] = lambda: search_figure(run)
    drawings["curves"] = lambda: curves_figure(run)
    stem, ending = os.path.splitext(output or "")
    if ending and not os.path.isdir(output):
        paths = {picture: output for picture in drawings if stem.endswith(picture)}
        if not paths:
            raise UserError(f"-o {output}: the file name selects the picture, so it must end in "
                            f"{' or '.join(name + ending for name in drawings)}")
    else:
        folder = output or os.fspath(run_dir)
        os.makedirs(folder, exist_ok=True)
        paths = {picture: os.path.join(folder, f"{picture}.png") for picture in drawings}
    for picture, path in paths.items():
        save(drawings[picture](), path)
    return list(paths.values())


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
    return parser


def main(args):
    if os.path.isdir(args.what):
        print("\n".join(draw_run(args.what, args.output, args.title)))
        return
    try:
        genotype, _ = genotypes.load(args.what)
    except ValueError as error:
        raise UserError(error) from None
    if os.path.isfile(args.what):
        stem = os.path.splitext(args.what)[0]
    else:
        stem = "cells" if "Genotype(" in args.what else args.what.replace(":", "-")
    output = args.output or f"{stem}.png"
    if not os.path.splitext(output)[1]:  # a folder
        os.makedirs(output, exist_ok=True)
        output = os.path.join(output, f"{os.path.basename(stem)}.png")
    save(cells_figure(genotype, args.title), output)
    print(output)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        flags.fail("visualize.py", error)
