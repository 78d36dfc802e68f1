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
import random
import re
import statistics
from collections import defaultdict, namedtuple

import arguments
import genotypes
from genotypes import NODES

FORMATS = (".png", ".svg", ".pdf")
WIDTH, COLUMN = 6.9, 3.35  # inches: a page, and a column of a paper

# Pools, skip, separable and dilated convolutions differ by hue and by dash, 3×3 and 5×5 by
# lightness and by width. The hues stay apart for the colour-blind, the rest in greyscale.
# Operation: (name, colour, dashes, line width)
OPERATIONS = {
    "max_pool_3x3": ("max 3×3", "#D55E00", (0, (1, 1)), 1.5),
    "avg_pool_3x3": ("avg 3×3", "#EBAA1E", (0, (1, 1)), 1.5),
    "skip_connect": ("skip", "#1A1A1A", "solid", 0.8),
    "sep_conv_3x3": ("sep 3×3", "#6DBBEB", "solid", 1.2),
    "sep_conv_5x5": ("sep 5×5", "#0B5FA5", "solid", 2.0),
    "dil_conv_3x3": ("dil 3×3", "#68C296", (0, (4, 1.5)), 1.2),
    "dil_conv_5x5": ("dil 5×5", "#00735C", (0, (3, 1)), 2.0),
}
for _name in genotypes.PRIMITIVES:  # one that somebody has added
    OPERATIONS.setdefault(_name, (_name.replace("_", " "), "#7A5195", "solid", 1.2))
NAMES = ("$c_{k-2}$", "$c_{k-1}$", "0", "1", "2", "3", "$c_k$")  # of nodes; the last is the output
CELLS = {"normal": "normal cell", "reduce": "reduction cell"}


@contextlib.contextmanager
def _style():
    """Matplotlib's own defaults but for these, whatever the user's matplotlibrc says."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    own = {
        "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "font.size": 6.5,
        "axes.titlesize": 7.5, "axes.titlelocation": "left", "axes.titlepad": 3,
        "axes.labelsize": 6.5, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
        "legend.fontsize": 6.5, "legend.frameon": False, "axes.linewidth": 0.5,
        "xtick.major.width": 0.5, "ytick.major.width": 0.5, "xtick.major.size": 2,
        "ytick.major.size": 2, "ytick.minor.size": 0, "axes.grid": True, "grid.color": "#E4E4E4",
        "grid.linewidth": 0.5, "hatch.linewidth": 0.4, "axes.axisbelow": True,
        "lines.linewidth": 1, "lines.markersize": 3,
        "savefig.dpi": 200, "pdf.fonttype": 42, "svg.hashsalt": "ista-nas",
    }  # fmt: skip
    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    with matplotlib.rc_context({**defaults, **own}):
        yield


def _figure(width, height):
    from matplotlib.figure import Figure  # not pyplot: no window, and no state that others share

    return Figure((width, height))


def _axes(figure, left, top, width, height, **kwargs):
    """Axes at a place in inches from the upper left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h), **kwargs)


def _title(figure, left, right=""):
    w, h = figure.get_size_inches()
    figure.text(0.06 / w, 1 - 0.05 / h, left, va="top", size=8, weight="bold")
    figure.text(1 - 0.06 / w, 1 - 0.06 / h, right, va="top", ha="right")


def _figure_legend(figure, handles, **spacing):
    """A legend in one line below the title."""
    w, h = figure.get_size_inches()
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.06 / w, 1 - 0.25 / h),
                  ncols=len(handles), borderpad=0, borderaxespad=0, **spacing)  # fmt: skip


def _epoch_axis(axes, until):
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, until + 0.5)
    axes.xaxis.set_major_locator(
        MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axes.set_xlabel("epoch", labelpad=1)


# ------------------------------------------------------------------------------------------------
# Layout of a cell
# ------------------------------------------------------------------------------------------------

# Layers from left to right: the inputs, the nodes by the length of the longest path to them, the
# output. An edge that passes a layer has a lane of its own there, and the label of a pair a box at
# its node: so whatever the genotype is, edges bend and cross only between two layers, where there
# are no labels and no nodes. Inches; y points down.
OUTPUT = 2 + NODES
LABEL, STUB, NODE, INPUT = 0.275, 0.075, 0.15, 0.3  # widths
ROW, LANE, SPACE = 0.27, 0.07, 0.035  # heights: of a label, of a lane; free between two of them

Layout = namedtuple("Layout", "width height boxes labels wires")


def _layers(pairs):
    """Layer of each input and intermediate node."""
    layer, each = {0: 0, 1: 0}, len(pairs) // NODES
    for j in range(NODES):
        layer[2 + j] = 1 + max(layer[source] for _, source in pairs[j * each : (j + 1) * each])
    return layer


def arrange(pairs, concat, gap, tries=40):
    """Place a cell such that nothing lies on a label or on a node.

    Parameters
    ----------
    pairs : list of (operation, input node)
    concat : iterable of int
        Nodes whose outputs are concatenated.
    gap : float
        Distance of two layers in inches.
    tries : int
        Random starts of the search for an order with few crossings.

    Returns
    -------
    Layout
        width, height; boxes: {node: (x, y, width, height)}; labels: the same of each pair; wires:
        of each pair, then of each concatenated node, the points between which its curve swings
        (odd to even) and runs straight (even to odd).
    """
    layer, each = _layers(pairs), len(pairs) // NODES
    layer[OUTPUT] = 1 + max(layer.values())
    ends = [(source, 2 + k // each) for k, (_, source) in enumerate(pairs)]
    ends += [(node, OUTPUT) for node in concat]
    items = [[n for n in layer if layer[n] == depth] for depth in range(layer[OUTPUT] + 1)]
    hops, size = [[] for _ in items[1:]], dict.fromkeys(layer, each * ROW)
    size.update({0: 0.24, 1: 0.24, OUTPUT: 0.36})
    for k, (source, target) in enumerate(ends):
        lanes = [(k, depth) for depth in range(layer[source] + 1, layer[target])]
        route = [source, *lanes, target]
        for lane in lanes:
            items[lane[1]].append(lane)
            size[lane] = LANE
        for depth, (a, b) in enumerate(zip(route, route[1:], strict=False), layer[source]):
            hops[depth].append((a, b, k))

    rng, best = random.Random(0), {}
    tries = max(4, tries * 12 // len(ends)) if len(ends) > 12 else tries
    for _ in range(tries):
        order = [items[0], *(rng.sample(layer, len(layer)) for layer in items[1:])]
        for sweep in range(6):
            backward = sweep % 2
            for depth in range(len(hops) - 1, 0, -1) if backward else range(1, len(order)):
                place = {x: i for i, x in enumerate(order[depth + 1 if backward else depth - 1])}
                near = defaultdict(list)
                for a, b, _ in hops[depth if backward else depth - 1]:
                    near[a if backward else b].append(place[b if backward else a])
                rank = {x: i for i, x in enumerate(order[depth])}
                order[depth] = sorted(
                    order[depth],
                    key=lambda x: (statistics.fmean(near[x]) if near[x] else rank[x], rank[x]),
                )
            best.setdefault(_crossings(order, hops), []).append([list(row) for row in order])
    unique = {repr(order): order for order in best[min(best)]}
    places = [_heights(order, hops, size) for order in list(unique.values())[:12]]
    _, y, leave, enter = min(places, key=lambda place: place[0])

    left = [0.0, *(INPUT + gap + d * (LABEL + STUB + NODE + gap) for d in range(len(hops)))]
    top = min(y[x] - size[x] / 2 for x in y)
    height = max(y[x] + size[x] / 2 for x in y) - top
    y = {x: value - top for x, value in y.items()}
    box_left = {n: left[d] + (LABEL + STUB if 2 <= n < OUTPUT else 0) for n, d in layer.items()}
    box_width = {n: NODE if 2 <= n < OUTPUT else INPUT for n in layer}
    boxes = {n: (box_left[n], y[n] - size[n] / 2, box_width[n], size[n]) for n in layer}
    wires, labels = [[] for _ in ends], []
    for row in hops:
        for a, b, k in row:
            if not wires[k]:
                wires[k].append((box_left[a] + box_width[a], y[a] + leave[k]))
            x = left[b[1] if isinstance(b, tuple) else layer[b]]
            if isinstance(b, tuple):
                wires[k] += [(x, y[b]), (x + LABEL + STUB + NODE, y[b])]
            else:
                wires[k].append((x + (b != OUTPUT) * 0.02, y[b] + enter[k]))
    for k in range(len(pairs)):
        x, middle = wires[k][-1]
        labels.append((x, middle - ROW / 2 + 0.02, LABEL - 0.02, ROW - 0.04))
    return Layout(left[-1] + INPUT, height, boxes, labels, wires)


def _crossings(order, hops):
    place = {x: i for row in order for i, x in enumerate(row)}
    total = 0
    for row in hops:
        ends = sorted((place[a], place[b]) for a, b, _ in row)
        total += sum(b > d for i, (a, b) in enumerate(ends) for c, d in ends[i + 1 :] if c > a)
    return total


def _heights(order, hops, size):
    """Heights of all items of an order, long edges as straight as can be, and ports of nodes."""
    y, leave, enter = {}, defaultdict(float), defaultdict(float)
    apart = [
        [0, *((size[a] + size[b]) / 2 + SPACE for a, b in zip(r, r[1:], strict=False))]
        for r in order
    ]
    for row, gaps in zip(order, apart, strict=True):
        below = -sum(gaps) / 2
        for x, step in zip(row, gaps, strict=True):
            below += step
            y[x] = below

    def port(x, k, offset):  # where edge k meets x
        return y[x] + (0 if isinstance(x, tuple) else offset[k])

    for _ in range(30):
        # Ports in the order of what they lead to, so that no two edges of a node cross there.
        for offset, fill, near, far, other in ((leave, 0.75, 0, 1, enter), (enter, 1, 1, 0, leave)):
            ends = defaultdict(list)
            for hop in (hop for row in hops for hop in row):
                if not isinstance(hop[near], tuple):
                    ends[hop[near]].append((port(hop[far], hop[2], other), hop[2]))
            for node, found in ends.items():
                for i, (_, k) in enumerate(sorted(found)):
                    offset[k] = (i - (len(found) - 1) / 2) * size[node] * fill / len(found)
        for row, gaps in zip(order, apart, strict=True):
            wanted, weight = dict.fromkeys(row, 0.0), dict.fromkeys(row, 1e-3)
            for a, b, k in (hop for hops_here in hops for hop in hops_here):
                w = 8 ** (isinstance(a, tuple) + isinstance(b, tuple))
                slope = w * (port(b, k, enter) - port(a, k, leave))
                for x, pull in ((a, slope), (b, -slope)):
                    if x in wanted:
                        wanted[x] += pull + w * y[x]
                        weight[x] += w
            means = [wanted[x] / weight[x] for x in row]
            y.update(zip(row, _spread(means, list(weight.values()), gaps), strict=True))
    bends = sum((port(a, k, leave) - port(b, k, enter)) ** 2 for row in hops for a, b, k in row)
    return bends, y, leave, enter


def _spread(wanted, weights, apart):
    """Positions nearest to the wanted ones (weighted squares) that are in order and apart."""
    shift = [sum(apart[: i + 1]) for i in range(len(apart))]
    blocks = []
    for value, weight, offset in zip(wanted, weights, shift, strict=True):
        blocks.append([value - offset, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            v, w, n = blocks.pop()
            u, t, m = blocks.pop()
            blocks.append([(v * w + u * t) / (w + t), w + t, n + m])
    values = [value for value, _, n in blocks for _ in range(n)]
    return [value + offset for value, offset in zip(values, shift, strict=True)]


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------


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
    # Panels: (pairs, concatenated nodes, indices of the filled pairs, heading)
    rows = [[] for _ in range(2 if before else 1)]
    for cell, name in CELLS.items():
        shown = [(genotype, genotype, "")]
        if before:
            shown = [(before, genotype, f", {titles[0]}"), (genotype, before, f", {titles[1]}")]
        for row, (this, other, heading) in zip(rows, shown, strict=True):
            pairs, concat = getattr(this, cell), getattr(this, f"{cell}_concat")
            row.append((pairs, concat, _only_here(pairs, getattr(other, cell)), name + heading))
    if stacked:
        rows = [[panel] for row in rows for panel in row]

    width, margin, head = COLUMN if stacked else WIDTH, 0.06, 0.25
    layouts = []
    for row in rows:
        depths = [max(_layers(pairs).values()) for pairs, *_ in row]
        fixed = sum(2 * INPUT + d * (LABEL + STUB + NODE) for d in depths)
        free = width - 2 * margin - 0.2 * (len(row) - 1) - fixed
        gap = min(0.45, free / sum(d + 1 for d in depths))
        layouts.append([arrange(pairs, concat, gap) for pairs, concat, *_ in row])
    heights = [head + max(layout.height for layout in row) + 0.1 for row in layouts]
    top, foot = 0.22 if title else 0.0, 0.17 if before else 0.0
    with _style():
        figure = _figure(width, top + sum(heights) + foot)
        if title:
            _title(figure, title)
        for row, placed, height in zip(rows, layouts, heights, strict=True):
            left = margin
            for (pairs, _, marked, heading), layout in zip(row, placed, strict=True):
                axes = _axes(figure, left - margin, top, layout.width + 2 * margin, height)
                above = head + (height - head - 0.1 - layout.height) / 2
                axes.set(xlim=(-margin, layout.width + margin), ylim=(height - above, -above))
                axes.axis("off")
                axes.text(0, 0.05 - above, heading, va="top", size=7.5)
                _draw_cell(axes, layout, pairs, marked)
                left = width - margin - placed[-1].width
            top += height
        if before:
            text = "filled: pairs that the cell of the other epoch does not have"
            figure.text(margin / width, 0.05 / figure.get_figheight(), text, va="bottom")
        return figure


def _only_here(pairs, others):
    """Indices of the pairs that their node has here and not there."""
    each, there = len(pairs) // NODES, len(others) // NODES
    return {
        k for k, pair in enumerate(pairs)
        if pair not in others[k // each * there : (k // each + 1) * there]
    }  # fmt: skip


def _draw_cell(axes, layout, pairs, marked):
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    for k, points in reversed(list(enumerate(layout.wires))):
        code, vertices = [Path.MOVETO], [points[0]]
        for i, ((x, y), (to_x, to_y)) in enumerate(zip(points, points[1:], strict=False)):
            if i % 2:
                vertices.append((to_x, to_y))
                code.append(Path.LINETO)
            else:
                bend = 0.55 * (to_x - x)
                vertices += [(x + bend, y), (to_x - bend, to_y), (to_x, to_y)]
                code += [Path.CURVE4] * 3
        look = OPERATIONS[pairs[k][0]] if k < len(pairs) else ("", "#9A9A9A", "-", 0.7)
        _, colour, dash, thick = look
        path = Path(vertices, code)
        for ink, style, wide in (("white", "-", thick + 1.6), (colour, dash, thick)):
            # The white below each curve shows at a crossing which one runs over the other.
            axes.add_patch(PathPatch(
                path, fill=False, edgecolor=ink, linestyle=style, linewidth=wide, capstyle="butt",
                gid=f"edge {k}",
            ))  # fmt: skip
    for k, (x, y, width, height) in enumerate(layout.labels):
        name, colour, _, thick = OPERATIONS[pairs[k][0]]
        axes.add_patch(FancyBboxPatch(
            (x, y), width, height, edgecolor=colour, linewidth=0.9, zorder=3,
            facecolor=colour if k in marked else "white",
            boxstyle="round,pad=0,rounding_size=0.04",
        ))  # fmt: skip
        axes.text(
            x + width / 2, y + height / 2 + 0.008, name.replace(" ", "\n"), size=6.2, zorder=4,
            ha="center", va="center", linespacing=0.95, gid=f"label {k}",
            color=_ink(colour) if k in marked else "black",
        )  # fmt: skip
        axes.annotate(
            "", (x + width + STUB, y + height / 2), (x + width, y + height / 2), zorder=3,
            arrowprops=dict(arrowstyle="-|>,head_length=0.18,head_width=0.1", shrinkA=0, shrinkB=0,
                            linewidth=0.8, color=colour),
        )  # fmt: skip
    for node, (x, y, width, height) in layout.boxes.items():
        inner = 2 <= node < OUTPUT
        axes.add_patch(FancyBboxPatch(
            (x, y + 0.01), width, height - 0.02, linewidth=0.6, edgecolor="#555555", zorder=3,
            facecolor="#E6E6E6" if inner else "#F7F2E4", gid=f"node {node}",
            boxstyle="round,pad=0,rounding_size=0.03",
        ))  # fmt: skip
        axes.text(
            x + width / 2, y + height / 2, NAMES[node], ha="center", gid=f"name {node}", zorder=4,
            va="center_baseline" if inner else "center", size=7 if inner else 8.6,
        )  # fmt: skip


def _ink(colour):
    """Black or white: what can be read on a colour, by its relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    light = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if light > 0.3 else "white"


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------

Run = namedtuple("Run", "path name config metrics history genotype search one_stage end")
Choice = namedtuple("Choice", "epoch genotype weights")  # weights: {"normal": list or None, ...}


def read_run(path):
    """Read the folder of a run, which may still be running.

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

    Raises
    ------
    ValueError
        With one line: not a run folder, nothing to draw yet, or damaged.
    """
    if not os.path.isdir(path):
        raise ValueError(f"{path}: there is no such folder")
    metrics_file, genotypes_file, genotype_file, config_file = (
        os.path.join(path, name)
        for name in ("metrics.jsonl", "genotypes.jsonl", "genotype.json", "config.json")
    )
    if not os.path.exists(metrics_file) and not os.path.exists(config_file):
        raise ValueError(f"{path} is not a run folder: it has no metrics.jsonl and no config.json")
    metrics = _rows(metrics_file)
    if not metrics:
        raise ValueError(f"{path}: no epoch has ended yet (metrics.jsonl has no whole row)")
    config = {}
    with contextlib.suppress(OSError, ValueError, TypeError), open(config_file) as file:
        config = dict(json.load(file))
    history, rows = [], _rows(genotypes_file)
    for row in rows:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            genotype, weights = genotypes.from_lists(row), {}
            for cell in CELLS:
                values = row.get(f"{cell}_weights")
                fits = isinstance(values, list) and len(values) == len(getattr(genotype, cell))
                fits = fits and all(map(_number, values))
                weights[cell] = values if fits else None
            history.append(Choice(row["epoch"], genotype, weights))
    if rows and not history:
        raise ValueError(f"{genotypes_file}: damaged, no row holds a genotype")
    genotype = history[-1].genotype if history else None
    if not history and os.path.exists(genotype_file):
        genotype = genotypes.load(genotype_file)[0]
    moving = [row for row in metrics if "distance" in row]
    search, end = bool(history or moving), None
    one_stage = search and bool(config.get("one_stage", "test_loss" in metrics[-1]))
    if one_stage and moving:
        if moving[-1] is not metrics[-1] or all(_nodes(moving[-1], "frozen")):
            end = moving[-1]["epoch"]
    name = os.path.basename(os.path.abspath(path))
    return Run(path, name, config, metrics, history, genotype, search, one_stage, end)


def _rows(path):
    """Rows of a .jsonl file by epoch; the last line may still be on its way to the disk."""
    rows = {}
    try:
        with open(path, errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
                    row = json.loads(line)
                    rows[int(row["epoch"])] = {**row, "epoch": int(row["epoch"])}
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return [rows[epoch] for epoch in sorted(rows)]


def _nodes(row, key):
    """A row's list over the 8 nodes; a false value for each if it has none."""
    values = row.get(key)
    return values if isinstance(values, list) and len(values) == 2 * NODES else [0] * 2 * NODES


def _series(run, key):
    """Epochs and values of a number that some rows have."""
    rows = [row for row in run.metrics if _number(row.get(key))]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def _number(value):
    return type(value) in (int, float) and math.isfinite(value)


def _held_out(run):
    """What the accuracy of a run is measured on: its key in the metrics, and its name."""
    names = {"valid": "validation", "test": "test"}
    return next(
        (item for item in names.items() if _series(run, f"{item[0]}_accuracy")[0]),
        ("train", "training"),
    )


# ------------------------------------------------------------------------------------------------
# The search as a film strip
# ------------------------------------------------------------------------------------------------

BAR, SHARED, BREAK = 0.125, 0.11, 0.07  # inches: a lane, one of several bars in it, between nodes
LEFT, RIGHT = 0.78, 0.72  # margins
STRIP = WIDTH - LEFT - RIGHT
END = dict(color="black", linewidth=0.9, linestyle=(0, (4, 2)), zorder=5)


def search_figure(run):
    """Draw what every node chose in every epoch, how far its code moved, and the pairs' weights.

    Parameters
    ----------
    run : Run
        Of a search.

    Returns
    -------
    matplotlib.figure.Figure
    """
    with _style():
        last = max([*(choice.epoch for choice in run.history), run.metrics[-1]["epoch"]])
        until = last if run.end is None else min(last, run.end + max(1, math.ceil(run.end / 12)))
        lanes = {cell: _lanes(run.history, cell) for cell in CELLS if run.history}
        panels = [
            (sum(lanes[cell].values()) + 3 * BREAK, _draw_choices, (cell, lanes[cell]))
            for cell in lanes
        ]
        panels.append((1.1, _draw_distances, ()))
        for cell in CELLS:
            if any(choice.weights[cell] for choice in run.history):
                high = max(0.85, 0.1 * len(getattr(run.genotype, cell)))
                panels.append((high, _draw_weights, (cell,)))
        top = 0.4 if run.history else 0.2
        figure = _figure(WIDTH, top + sum(high + 0.25 for high, *_ in panels) + 0.27)
        _title(figure, run.name, _summary(run, last))
        if run.history:
            _legend(figure, run.one_stage)
        first = None
        for high, draw, what in panels:
            axes = _axes(figure, LEFT, top + 0.2, STRIP, high, sharex=first)
            axes.tick_params(labelbottom=False)
            draw(axes, run, until, *what)
            if run.end is not None:
                axes.axvline(run.end + 0.5, **END)
            first, top = first or axes, top + high + 0.25
        axes.tick_params(labelbottom=True)
        _epoch_axis(axes, until)
        return figure


def _summary(run, last):
    """In words: how long the search was, and when the architecture came to rest."""
    changes = [
        after.epoch for before, after in zip(run.history, run.history[1:], strict=False)
        if before.genotype != after.genotype
    ]  # fmt: skip
    text = f"{last} epoch{'s' if last > 1 else ''} of search"
    if run.end is not None:
        text = f"search: epochs 1–{run.end}"
        text += f", then trained until epoch {last}" if last > run.end else ""
    if run.history:
        text += f"; last change of a pair in epoch {changes[-1]}" if changes else "; no change"
    return text


def _legend(figure, one_stage):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, label=name, edgecolor="white", linewidth=0, hatch=_hatch(key))
        for key, (name, colour, *_) in OPERATIONS.items()
    ]
    if one_stage:
        handles += [
            Line2D([], [], color="black", marker="|", linestyle="", markersize=7,
                   markeredgewidth=1.6, label="node freezes"),
            Line2D([], [], label="search ends", **END),
        ]  # fmt: skip
    _figure_legend(figure, handles, handlelength=1.3, columnspacing=1.1, handletextpad=0.5)


def _hatch(operation):
    """What tells bars of the same lightness apart in greyscale."""
    return {"max": "....", "avg": "....", "dil": "/////"}.get(operation[:3])


def _lanes(history, cell):
    """Heights of the lanes of (node, input): room for a label in all bars that ever share one."""
    most = dict.fromkeys(((node, s) for node in range(2, OUTPUT) for s in range(node)), 1)
    for choice in history:
        for place, operations in _by_lane(getattr(choice.genotype, cell)).items():
            most[place] = max(most[place], len(operations))
    return {place: BAR if n == 1 else SHARED * n for place, n in most.items()}


def _by_lane(pairs):
    """Operations of each (node, input)."""
    lanes = defaultdict(list)
    for k, (operation, source) in enumerate(pairs):
        lanes[2 + k // (len(pairs) // NODES), source].append(operation)
    return lanes


def _draw_choices(axes, run, until, cell, lanes):
    """A lane for each input of each node, with a bar in the epochs in which a pair takes it."""
    from matplotlib.patches import Rectangle

    tops, y = {}, 0.0
    for node in range(2, OUTPUT):
        for source in range(node):
            tops[node, source], high = y, lanes[node, source]
            axes.add_patch(Rectangle((0.5, y + 0.008), until, high - 0.016, color="#F0F0F0"))
            y += high
        axes.text(-0.4 / STRIP, (tops[node, 0] + y) / 2, f"node {NAMES[node]}", ha="right",
                  transform=axes.get_yaxis_transform(), va="center_baseline")  # fmt: skip
        y += BREAK
    axes.set(ylim=(y - BREAK, 0), title=CELLS[cell])
    inputs = ("k−2", "k−1", *NAMES[2:])
    axes.set_yticks([tops[p] + lanes[p] / 2 for p in tops], [inputs[s] for _, s in tops])
    axes.tick_params(axis="y", length=0, pad=2, labelsize=6)
    axes.grid(False)
    axes.spines[["left", "right", "top"]].set_visible(False)

    inch = until / STRIP
    freezes = {
        2 + node % NODES: epoch + 0.5 for node, epoch in _freezes(run)
        if (cell == "reduce") == (node >= NODES)
    }  # fmt: skip
    for place, operation, i, sharing, start, stop in _bars(run.history, cell, until):
        name, colour, *_ = OPERATIONS[operation]
        high = (lanes[place] - 0.016) / sharing
        top = tops[place] + 0.008 + i * high
        bar = dict(facecolor=colour, edgecolor="white", linewidth=0.3, zorder=2)
        axes.add_patch(Rectangle((start, top), stop - start, high, **bar))
        # The label stands at the left, or behind the line of a freeze; the hatch behind the label.
        wide, at = (0.053 * len(name) + 0.08) * inch, start
        if at < freezes.get(place[0], 0) < at + wide:
            at = freezes[place[0]]
        if stop - at > wide:
            axes.text(at + 0.035 * inch, top + high / 2 + 0.004, name, size=6, color=_ink(colour),
                      va="center_baseline", gid="bar")  # fmt: skip
            start = at + wide
        if _hatch(operation):
            bar.update(facecolor="none", linewidth=0, hatch=_hatch(operation))
            axes.add_patch(Rectangle((start, top), stop - start, high, **bar))
    for node, x in freezes.items():
        axes.plot([x, x], [tops[node, 0], tops[node, node - 1] + lanes[node, node - 1]],
                  color="black", linewidth=1.6, solid_capstyle="butt", zorder=4)  # fmt: skip


def _bars(history, cell, until):
    """(lane, operation, i, n, start, stop): a pair while it stays i-th of n in its lane."""
    bars, running = [], {}
    shown = [choice for choice in history if choice.epoch <= until]
    for choice, following in zip(shown, [*shown[1:], None], strict=True):
        stop = following.epoch - 0.5 if following else choice.epoch + 0.5
        now = {
            (place, operation, i, len(operations))
            for place, operations in _by_lane(getattr(choice.genotype, cell)).items()
            for i, operation in enumerate(operations)
        }
        bars += [(*key, *running.pop(key)) for key in set(running) - now]
        for key in now:
            running[key] = (running.get(key, (choice.epoch - 0.5,))[0], stop)
    return sorted(bars + [(*key, *span) for key, span in running.items()])


def _freezes(run):
    """(node of 8, epoch) of every freeze of a one-stage search."""
    found = {}
    for row in run.metrics if run.one_stage else []:
        for node, frozen in enumerate(_nodes(row, "frozen")):
            if frozen:
                found.setdefault(node, row["epoch"])
    return list(found.items())


def _draw_distances(axes, run, until):
    from matplotlib.ticker import LogLocator, NullFormatter

    shades, dashes = ("#0B2A4A", "#1F78B4", "#E07B00", "#A9A9A9"), ("-", (0, (3, 1)))
    distances = [{} for _ in range(2 * NODES)]  # by epoch
    for row in run.metrics:
        for node, value in enumerate(_nodes(row, "distance")):
            if _number(value) and value > 0:  # it is 0 once the node is frozen
                distances[node][row["epoch"]] = value
    for node, values in enumerate(distances):
        axes.plot(list(values), list(values.values()), color=shades[node % NODES],
                  linestyle=dashes[node // NODES], marker="." if until <= 15 else None,
                  label=f"{'normal' if node < NODES else 'reduction'} {node % NODES}")  # fmt: skip
    label = "freezes"
    for node, epoch in _freezes(run):
        axes.plot(epoch, distances[node].get(epoch, math.nan), "o", color=shades[node % NODES],
                  markersize=3.5, markeredgecolor="black", markeredgewidth=0.7, zorder=4,
                  label=label)  # fmt: skip
        label = None
    shown = [value for values in distances for value in values.values()] or [0.1, 1.0]
    tolerance = run.config.get("freeze_tol")
    if run.one_stage and _number(tolerance) and tolerance > 0:
        axes.axhline(tolerance, color="black", linewidth=0.7, linestyle=":", label="tolerance")
        shown.append(tolerance)
    rejected = [row["epoch"] for row in run.metrics if row.get("rejected") is True]
    if rejected:
        axes.plot(rejected, [0.05] * len(rejected), "kx", markersize=3, markeredgewidth=0.8,
                  transform=axes.get_xaxis_transform(), label="rejected")  # fmt: skip
    axes.set(yscale="log", title="distance of each code from the last one, $\\|z_t - z_{t-1}\\|_2$")
    decades = [math.log10(limit(shown)) for limit in (min, max)]
    axes.set_ylim(10 ** math.floor(decades[0] - 0.05), 10 ** math.ceil(decades[1] + 0.05))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.04), handlelength=1.5, labelspacing=0.15,
                fontsize=6, handletextpad=0.4, borderpad=0, borderaxespad=0.3)  # fmt: skip


def _draw_weights(axes, run, until, cell):
    """A line for each pair as long as it stays, with the number of its node at the end."""
    axes.set_title(f"weights of the active pairs, {CELLS[cell]}")
    axes.axhline(0, color="#888888", linewidth=0.5)
    lines, began = defaultdict(list), {}
    for choice in run.history:
        values, pairs = choice.weights[cell], getattr(choice.genotype, cell)
        if values and choice.epoch <= until:
            keys = [(k // (len(pairs) // NODES), *pair) for k, pair in enumerate(pairs)]
            began = {key: began.get(key, choice.epoch) for key in keys}
            for key, value in zip(keys, values, strict=True):
                lines[(*key, began[key])].append((choice.epoch, value))
    for (_, operation, *_), points in lines.items():
        _, colour, dash, thick = OPERATIONS[operation]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=0.6 * thick,
                  marker="." if until <= 15 or len(points) == 1 else None)  # fmt: skip
    axes.margins(y=0.08)
    last = max(points[-1][0] for points in lines.values())
    final = sorted((p[-1][1], node) for (node, *_), p in lines.items() if p[-1][0] == last)
    low, high = axes.get_ylim()
    apart = 0.092 * (high - low) / (axes.get_position().height * axes.figure.get_figheight())
    heights = _spread(
        [value for value, _ in final], [1] * len(final), [0, *[apart] * (len(final) - 1)]
    )
    for y, (value, node) in zip(heights, final, strict=True):
        axes.annotate(
            f"node {node}", (1, value), (1.03, y), xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(), va="center_baseline", size=6,
            arrowprops=dict(arrowstyle="-", linewidth=0.4, color="#888888", shrinkA=0, shrinkB=0,
                            relpos=(0, 0.5)),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Curves, and several runs side by side
# ------------------------------------------------------------------------------------------------

SERIES = {
    "test": ("test", "#E07B00"),
    "valid": ("validation (the half for b, not augmented)", "#E07B00"),
    "arch": ("the half for b, as it was trained on", "#7CC4F0"),
    "train": ("training", "#0B2A4A"),
}


def curves_figure(run):
    """Draw losses, accuracies and learning rate (and drop-path probability) over the epochs.

    Returns
    -------
    matplotlib.figure.Figure
    """
    with _style():
        figure = _figure(WIDTH, 2.2)
        loss, accuracy = (_axes(figure, left, 0.52, 2.05, 1.35) for left in (0.42, 2.86))
        drop = any(_series(run, "drop_path_prob")[1])
        rate = _axes(figure, 5.36, 0.52, 1.42, 0.55 if drop else 1.35)
        look = dict(marker="." if len(run.metrics) <= 15 else None)
        for kind, (name, colour) in SERIES.items():
            for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
                epochs, values = _series(run, f"{kind}_{what}")
                if epochs:
                    axes.plot(epochs, values, color=colour, label=name, **look)
        rate.plot(*_series(run, "learning_rate"), color="black", **look)
        loss.set_title("loss (cross-entropy)")
        accuracy.set_title("accuracy (%)")
        rate.set(title="learning rate", ylim=(0, None))
        _log_if_wide(loss)
        panels = [loss, accuracy, rate]
        if drop:
            panels.append(_axes(figure, 5.36, 1.32, 1.42, 0.55))
            panels[-1].plot(*_series(run, "drop_path_prob"), color="black", **look)
            panels[-1].set(title="drop-path probability", ylim=(0, None))
        for axes in panels:
            _epoch_axis(axes, run.metrics[-1]["epoch"])
            if run.end is not None:
                axes.axvline(run.end + 0.5, label="search ends", **END)
        if drop:
            rate.tick_params(labelbottom=False)
            rate.set_xlabel("")
        _figure_legend(figure, accuracy.get_legend_handles_labels()[0])
        kind, name = _held_out(run)
        epochs, values = _series(run, f"{kind}_accuracy")
        best = max(values, default=math.nan)
        _title(figure, run.name, f"{name} accuracy {values[-1]:.2f} % in epoch {epochs[-1]}, best "
               f"{best:.2f} % in epoch {epochs[values.index(best)]}" if values else "")  # fmt: skip
        return figure


def _log_if_wide(axes):
    """Make the y axis logarithmic where its values span more than a decade; label it well."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [v for line in axes.lines for v in line.get_ydata() if math.isfinite(v)] or [0]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        subs = (1, 2, 5) if max(values) < 300 * min(values) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def compare_figure(runs):
    """Overlay the accuracies of runs; those that differ only by seed share a colour.

    Returns
    -------
    matplotlib.figure.Figure
    """
    colours = ("#0B5FA5", "#E07B00", "#1A1A1A", "#68C296", "#9C3D97", "#6DBBEB", "#D55E00",
               "#8A8A8A")  # fmt: skip
    groups, names = _groups(runs), _names(runs)
    handles, low = [], []
    high = -math.inf
    with _style():
        height = 2.55 + 0.14 * len(groups)
        figure = _figure(WIDTH, height)
        panels = [_axes(figure, left, 0.25, 2.95, 1.9) for left in (0.42, 3.82)]
        for i, group in enumerate(groups):
            label = f"{', '.join(names[run.path] for run in group)} ({_held_out(group[0])[1]})"
            look = dict(
                color=colours[i % len(colours)], linewidth=1.1 if len(group) == 1 else 0.7,
                linestyle=("-", (0, (4, 1.5)), (0, (1, 1)))[i // len(colours) % 3],
                label=label if len(label) <= 110 else label[:107] + "...",
            )  # fmt: skip
            for run in group:
                epochs, values = _series(run, f"{_held_out(run)[0]}_accuracy")
                low += values[len(values) * 2 // 3 :][:1]
                high = max([high, *values])
                look["marker"] = "." if len(epochs) <= 15 else None
                for axes in panels:
                    line = axes.plot(epochs, values, **look)
            handles += line
        kinds = " or ".join(dict.fromkeys(_held_out(run)[1] for run in runs))
        panels[0].set_title(f"{kinds} accuracy (%)")
        panels[1].set_title("the same, enlarged")
        if low:
            room = 0.05 * (high - min(low)) or 1
            panels[1].set_ylim(min(low) - room, high + room)
        for axes in panels:
            _epoch_axis(axes, max(run.metrics[-1]["epoch"] for run in runs))
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0.06 / WIDTH, 0.06 / height),
            borderpad=0, borderaxespad=0, handlelength=2.5, labelspacing=0.4,
        )  # fmt: skip
        return figure


def table(runs):
    """The runs as text: one line each, and mean ± std where several differ only by seed.

    Returns
    -------
    str
    """
    names = _names(runs)
    lines = [("run", "seed", "genotype", "epochs", "measured on",
              "params M", "mult-adds M", "last %", "best %", "hours")]  # fmt: skip
    digits = (4, 1, 2, 2, 2)
    for group in _groups(runs):
        results = []
        for run in group:
            kind, what = _held_out(run)
            values = _series(run, f"{kind}_accuracy")[1] or [None]
            sizes = [run.metrics[-1].get(key) for key in ("parameters", "multiply_adds")]
            results.append((
                *(size / 1e6 if _number(size) else None for size in sizes),
                values[-1], max(values), sum(_series(run, "seconds")[1]) / 3600,
            ))  # fmt: skip
            done, total = _progress(run)
            numbers = ["–" if value is None else f"{value:.{n}f}"
                       for value, n in zip(results[-1], digits, strict=True)]  # fmt: skip
            lines.append((
                names[run.path], str(run.config.get("seed", "–")), genotype_name(run.genotype),
                str(done) if done == total else f"{done}/{total}", what, *numbers,
            ))  # fmt: skip
        if len(group) > 1:
            means = [
                "–" if None in column
                else f"{statistics.fmean(column):.{n}f} ± {statistics.stdev(column):.{n}f}"
                for column, n in zip(zip(*results, strict=True), digits, strict=True)
            ]  # fmt: skip
            lines.append((f"  mean ± std of {len(group)} seeds", "", "", "", "", *means))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = "<><><>>>>>"  # texts to the left, numbers to the right
    return "\n".join(
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(
            line, sides, widths, strict=True)).rstrip()
        for line in lines
    )  # fmt: skip


def genotype_name(genotype):
    """A published name, or the first 7 digits of a hash that is the same for equal cells."""
    if genotype is None:
        return "–"
    lists = genotypes.as_lists(genotype)
    for name, (published, _) in genotypes.NAMED.items():
        if genotypes.as_lists(published) == lists:
            return name
    return hashlib.sha256(json.dumps(lists, sort_keys=True).encode()).hexdigest()[:7]


def _progress(run):
    """Epochs done, and epochs there will be, "?" while a one-stage search goes on."""
    done, total = run.metrics[-1]["epoch"], run.config.get("epochs", 0)
    if run.one_stage:
        return done, "?" if run.end is None else max(done, run.end + total)
    return done, max(done, total)


def _groups(runs):
    """Runs of one setting and of as many epochs: they differ only by seed, folder or machine."""
    free = {"seed", "save", "data", "device", "workers", "report_freq", "arch", "resume"}
    groups = defaultdict(list)
    for run in runs:
        setting = {key: value for key, value in run.config.items() if key not in free}
        done, total = _progress(run)
        # Without a config.json nothing is known of it. A training's --arch is a path: what counts
        # is the genotype itself.
        key = [setting or run.path, run.search, done == total or done]
        key.append(None if run.search else genotype_name(run.genotype))
        groups[json.dumps(key, sort_keys=True)].append(run)
    return list(groups.values())


def _names(runs):
    """Short names of runs: their folders', or where two are the same, their paths."""
    names = [run.name for run in runs]
    return {r.path: r.name if names.count(r.name) == 1 else r.path for r in runs}


# ------------------------------------------------------------------------------------------------
# Files and command line
# ------------------------------------------------------------------------------------------------


def save(figure, path):
    """Write a figure; the format is that of the ending. It appears whole, over an older one.

    Raises
    ------
    ValueError
        If the ending is unknown, or the file cannot be written.
    """
    _check_output(path)
    kind = os.path.splitext(path)[1][1:].lower()
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    partial = f"{path}.partial"
    try:
        with _style():
            figure.savefig(partial, format=kind, metadata=undated)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def _check_output(path):
    """Raise ValueError unless a picture may be written to `path`."""
    if os.path.splitext(path)[1].lower() not in FORMATS:
        raise ValueError(f"{path}: a picture ends in {', '.join(FORMATS)}")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"{path}: there is no folder {os.path.dirname(path)}")


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
    ValueError
        With one line, as `read_run` and `save`; also where matplotlib is missing.
    """
    run = read_run(os.fspath(run_dir))
    figures, first, last = {}, *(run.history[i] if run.history else None for i in (0, -1))
    if run.genotype and first is not last and first.genotype != last.genotype:
        headings = [f"after epoch {choice.epoch}" for choice in (first, last)]
        figures["cells.png"] = cells_figure(run.genotype, run.name, first.genotype, headings)
    elif run.genotype:
        title = run.name
        if first is not last:
            title += f": the same after epochs {first.epoch} and {last.epoch}"
        figures["cells.png"] = cells_figure(run.genotype, title)
    if run.search:
        figures["search.png"] = search_figure(run)
    figures["curves.png"] = curves_figure(run)
    paths = [os.path.join(folder or run.path, name) for name in figures]
    for figure, path in zip(figures.values(), paths, strict=True):
        save(figure, path)
    return paths


def get_args_parser():
    parser = arguments.Parser(prog="visualize.py", description=__doc__)
    parser.add_argument(
        "what", nargs="+", metavar="WHAT",
        help="a genotype (a genotype.json, a published name, random:SEED, a text 'Genotype(...)'), "
        "a run folder, or several run folders",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="PATH",
        help="the picture (.png, .svg or .pdf), or for one run the folder of its pictures. "
        "Default: for genotype.json cells.png beside it, for a name NAME.png here, for a run its "
        "own folder, for several compare.png here",
    )  # fmt: skip
    parser.add_argument(
        "--stacked", action="store_true",
        help=f"draw the cells of a genotype one above the other, {COLUMN} inches wide, not {WIDTH}",
    )  # fmt: skip
    return parser


def default_output(spec):
    """Where the picture of a genotype goes unless -o says so."""
    if os.path.isfile(spec):
        folder, name = os.path.split(os.path.splitext(spec)[0])
        return os.path.join(folder, f"{'cells' if name == 'genotype' else name}.png")
    return "cells.png" if "(" in spec else f"{re.sub(r'[^A-Za-z0-9_]+', '-', spec)}.png"


def main(args):
    spec = args.what[0]
    if len(args.what) > 1:
        runs = [read_run(path) for path in dict.fromkeys(map(os.path.normpath, args.what))]
        paths = [args.output or "compare.png"]
        _check_output(paths[0])
        save(compare_figure(runs), paths[0])
        print(table(runs))
    elif os.path.isdir(spec):
        if args.output and not os.path.isdir(args.output):
            raise ValueError(f"-o {args.output}: for a run, give a folder that exists")
        paths = draw_run(spec, args.output)
    else:
        try:
            genotype, _ = genotypes.load(spec)
        except ValueError as error:
            raise ValueError(f"{error}; or a run folder") from None
        paths = [args.output or default_output(spec)]
        _check_output(paths[0])
        title = None if "(" in spec else os.path.basename(spec)
        save(cells_figure(genotype, title, stacked=args.stacked), paths[0])
    for path in paths:
        print(path)


if __name__ == "__main__":
    args = get_args_parser().parse_args()
    try:
        main(args)
    except ValueError as error:
        arguments.fail("visualize.py", error)
