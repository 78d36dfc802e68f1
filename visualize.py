"""Draw the cells of a genotype, the pictures of a run, or several runs side by side.

    python visualize.py runs/NAME/genotype.json -o cells.pdf  # its two cells, for a paper
    python visualize.py ISTA_twostage --stacked               # a published one, a column wide
    python visualize.py runs/NAME                             # all pictures of a run, into its folder
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
        "grid.linewidth": 0.5, "axes.axisbelow": True, "lines.linewidth": 1,
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


def depth(pairs):
    """Number of layers of intermediate nodes."""
    layer = _layers(pairs)
    return max(layer.values())


def _layers(pairs):
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
    with _style():
        shown = [(genotype, before)] if before is None else [(before, genotype), (genotype, before)]
        rows = []  # of panels: (pairs, concat, pairs that are marked, heading)
        for (which, other), label in zip(shown, titles if before else [""], strict=True):
            row = []
            for cell, name in CELLS.items():
                pairs = getattr(which, cell)
                marked = _only_here(pairs, getattr(other, cell)) if other else set()
                heading = f"{name}{', ' if label else ''}{label}"
                row.append((pairs, getattr(which, f"{cell}_concat"), marked, heading))
            rows += [[panel] for panel in row] if stacked else [row]

        margin, head = 0.06, 0.2
        width = COLUMN if stacked else WIDTH
        drawn = []  # each row's layouts, and its height
        for row in rows:
            depths = [depth(pairs) for pairs, *_ in row]
            fixed = sum(2 * INPUT + d * (LABEL + STUB + NODE) for d in depths)
            free = width - 2 * margin * len(row) - fixed - 0.1 * (len(row) - 1)
            gap = min(0.45, free / sum(d + 1 for d in depths))
            layouts = [arrange(pairs, concat, gap) for pairs, concat, *_ in row]
            drawn.append((layouts, max(layout.height for layout in layouts)))
        top = 0.22 if title else 0.02
        foot = 0.17 if before else 0.0
        height = top + sum(h + head + 0.13 for _, h in drawn) + foot
        figure = _figure(width, height)
        if title:
            figure.text(margin / width, 1 - 0.05 / height, title, va="top", size=8, weight="bold")
        for row, (layouts, row_height) in zip(rows, drawn, strict=True):
            spare = width - sum(layout.width + 2 * margin for layout in layouts)
            left = margin
            for (pairs, _, marked, heading), layout in zip(row, layouts, strict=True):
                axes = _axes(figure, left - margin, top, layout.width + 2 * margin,
                             head + row_height + 0.1)  # fmt: skip
                axes.set(xlim=(-margin, layout.width + margin),
                         ylim=((row_height + layout.height) / 2 + 0.05,
                               (layout.height - row_height) / 2 - head - 0.05))  # fmt: skip
                axes.axis("off")
                axes.text(0, (layout.height - row_height) / 2 - head, heading, va="top", size=7.5)
                _draw_cell(axes, layout, pairs, marked)
                left += layout.width + 2 * margin + spare / max(1, len(row) - 1)
            top += row_height + head + 0.13
        if before:
            figure.text(margin / width, 0.04 / height, "filled: pairs that only one of the two has",
                        va="bottom")  # fmt: skip
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
        colour, dash, thick = OPERATIONS[pairs[k][0]][1:] if k < len(pairs) else ("#9A9A9A", "-", 1)
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
    files = {name: os.path.join(path, name) for name in (
        "metrics.jsonl", "genotypes.jsonl", "genotype.json", "config.json")}  # fmt: skip
    if not os.path.isdir(path):
        raise ValueError(f"{path}: there is no such folder")
    if not any(os.path.exists(files[name]) for name in ("metrics.jsonl", "config.json")):
        raise ValueError(f"{path} is not a run folder: it has neither metrics.jsonl nor config.json")
    metrics = _rows(files["metrics.jsonl"])
    if not metrics:
        raise ValueError(f"{path}: no epoch has ended yet (metrics.jsonl has no whole row)")
    config = {}
    with contextlib.suppress(OSError, ValueError, TypeError), open(files["config.json"]) as file:
        config = dict(json.load(file))
    history, rows = [], _rows(files["genotypes.jsonl"])
    for row in rows:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            genotype = genotypes.from_lists(row)
            weights = {cell: row.get(f"{cell}_weights") for cell in CELLS}
            for cell, values in weights.items():
                if not isinstance(values, list) or len(values) != len(getattr(genotype, cell)):
                    weights[cell] = None
            history.append(Choice(row["epoch"], genotype, weights))
    if rows and not history:
        raise ValueError(f"{files['genotypes.jsonl']}: damaged, no row holds a genotype")
    search = bool(history) or any("distance" in row for row in metrics)
    genotype = history[-1].genotype if history else None
    if not history and os.path.exists(files["genotype.json"]):
        genotype = genotypes.load(files["genotype.json"])[0]
    one_stage = search and bool(config.get("one_stage", "test_loss" in metrics[-1]))
    moving = [row for row in metrics if "distance" in row]
    end = None
    if one_stage and moving and (moving[-1] is not metrics[-1] or all(_list(moving[-1], "frozen"))):
        end = moving[-1]["epoch"]
    name = os.path.basename(os.path.abspath(path))
    return Run(path, name, config, metrics, history, genotype, search, one_stage, end)


def _rows(path):
    """Rows of a .jsonl file by epoch; the last line may still be on its way to the disk."""
    rows = {}
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                rows[int(row["epoch"])] = row
    return [rows[epoch] for epoch in sorted(rows)]


def _list(row, key):
    """A row's list over the 8 nodes; empty if it has none."""
    values = row.get(key)
    return values if isinstance(values, list) and len(values) == 2 * NODES else []


def _series(run, key):
    """Epochs and values of a number that some rows have."""
    found = [(row["epoch"], row[key]) for row in run.metrics if type(row.get(key)) in (int, float)]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _held_out(run):
    """What the accuracy of a run is measured on: its key in the metrics, and its name."""
    return next(((k, n) for k, n in (("valid", "validation"), ("test", "test"))
                 if _series(run, f"{k}_accuracy")[0]), ("train", "training"))  # fmt: skip


# ------------------------------------------------------------------------------------------------
# The search as a film strip
# ------------------------------------------------------------------------------------------------

BAR, BREAK = 0.125, 0.07  # inches: height of an input's lane, and free between two nodes
LEFT, RIGHT = 0.78, 0.72  # margins


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
        each = len(run.genotype.normal) if run.history else 0
        lanes = {cell: _lanes(run.history, cell) for cell in CELLS}
        heights = {cell: sum(lanes[cell].values()) + 3 * BREAK for cell in CELLS if run.history}
        heights["distance"] = 1.1
        for cell in CELLS:
            if any(choice.weights[cell] for choice in run.history):
                heights[f"{cell} weights"] = max(0.85, 0.1 * each)
        top = 0.4 if run.history else 0.2
        height = top + sum(h + 0.25 for h in heights.values()) + 0.27
        figure = _figure(WIDTH, height)
        last = max([*(c.epoch for c in run.history), run.metrics[-1]["epoch"]])
        until = last if run.end is None else min(last, run.end + max(1, math.ceil(run.end / 12)))
        figure.text(0.06 / WIDTH, 1 - 0.06 / height, run.name, va="top", size=8, weight="bold")
        figure.text(1 - 0.06 / WIDTH, 1 - 0.07 / height, _summary(run, last), va="top", ha="right")
        if run.history:
            _legend(figure, height - 0.25, frozen=run.one_stage)

        panels, first = {}, None
        for name, size in heights.items():
            top += 0.2
            axes = panels[name] = _axes(figure, LEFT, top, WIDTH - LEFT - RIGHT, size, sharex=first)
            first = first or axes
            axes.tick_params(labelbottom=False)
            top += size + 0.05
            if run.end is not None:
                axes.axvline(run.end + 0.5, color="black", linewidth=0.9, linestyle=(0, (4, 2)), zorder=5)
        _epoch_axis(axes, until)
        axes.tick_params(labelbottom=True)
        for cell in CELLS:
            if cell in panels:
                _draw_choices(panels[cell], run, cell, lanes[cell], until)
            if f"{cell} weights" in panels:
                _draw_weights(panels[f"{cell} weights"], run, cell, until)
        _draw_distances(panels["distance"], run, until)
        return figure


def _summary(run, last):
    """In words: how long the search was, and when the architecture came to rest."""
    changes = [b.epoch for a, b in zip(run.history, run.history[1:], strict=False)
               if a.genotype != b.genotype]  # fmt: skip
    if run.end is not None:
        text = f"search: epochs 1–{run.end}"
        text += f", then trained until epoch {last}" if last > run.end else ""
    else:
        text = f"{last} epoch{'s' if last > 1 else ''} of search"
    if run.history:
        text += f"; last change of a pair in epoch {changes[-1]}" if changes else "; no pair changed"
    return text


def _epoch_axis(axes, until):
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, until + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", labelpad=1)


def _legend(figure, bottom, frozen):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=name) for name, colour, *_ in OPERATIONS.values()]
    if frozen:
        handles.append(Line2D([], [], color="black", marker="|", linestyle="", markersize=7,
                              markeredgewidth=1.6, label="node freezes"))  # fmt: skip
        handles.append(Line2D([], [], color="black", linestyle=(0, (4, 2)), linewidth=0.9,
                              label="search ends"))  # fmt: skip
    figure.legend(
        handles=handles, loc="upper left", ncols=len(handles), handlelength=1.3, borderpad=0,
        bbox_to_anchor=(0.06 / WIDTH, bottom / figure.get_figheight()), columnspacing=1.1,
        handletextpad=0.5, borderaxespad=0,
    )  # fmt: skip


def _lanes(history, cell):
    """Heights of the lanes of (node, input): room for a label in all bars that ever share one."""
    most = dict.fromkeys(((node, s) for node in range(2, OUTPUT) for s in range(node)), 1)
    for choice in history:
        for place, operations in _by_lane(getattr(choice.genotype, cell)).items():
            most[place] = max(most[place], len(operations))
    return {place: BAR if n == 1 else 0.1 * n for place, n in most.items()}


def _by_lane(pairs):
    """Operations of each (node, input)."""
    lanes = defaultdict(list)
    for k, (operation, source) in enumerate(pairs):
        lanes[2 + k // (len(pairs) // NODES), source].append(operation)
    return lanes


def _draw_choices(axes, run, cell, lanes, until):
    """A lane for each input of each node, with a bar in the epochs in which a pair takes it."""
    from matplotlib.patches import Rectangle

    tops, y = {}, 0.0
    for node in range(2, OUTPUT):
        for source in range(node):
            tops[node, source], high = y, lanes[node, source]
            axes.add_patch(Rectangle((0.5, y + 0.008), until, high - 0.016, color="#F0F0F0"))
            y += high
        axes.text(-0.4 / (WIDTH - LEFT - RIGHT), (tops[node, 0] + y) / 2, f"node {NAMES[node]}",
                  transform=axes.get_yaxis_transform(), ha="right", va="center_baseline")  # fmt: skip
        y += BREAK
    axes.set(ylim=(y - BREAK, 0), title=CELLS[cell])
    axes.set_yticks([tops[p] + lanes[p] / 2 for p in tops], [NAMES[s] for _, s in tops])
    axes.tick_params(axis="y", length=0, pad=2, labelsize=6)
    axes.grid(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)

    # Bars: a pair that stays is one bar. Pairs that share their input share its lane.
    bars, open_bars = [], {}
    shown = [choice for choice in run.history if choice.epoch <= until]
    for i, choice in enumerate(shown):
        stop = shown[i + 1].epoch - 0.5 if i + 1 < len(shown) else choice.epoch + 0.5
        now = [(place, operation, i, len(operations))
               for place, operations in _by_lane(getattr(choice.genotype, cell)).items()
               for i, operation in enumerate(operations)]  # fmt: skip
        for key in set(open_bars) - set(now):
            bars.append((*key, *open_bars.pop(key)))
        for key in now:
            open_bars[key] = (open_bars.get(key, (choice.epoch - 0.5,))[0], stop)
    bars += [(*key, *span) for key, span in open_bars.items()]
    inch = until / (WIDTH - LEFT - RIGHT)
    for place, operation, i, sharing, start, stop in sorted(bars):
        name, colour, *_ = OPERATIONS[operation]
        high = (lanes[place] - 0.016) / sharing
        top = tops[place] + 0.008 + i * high
        axes.add_patch(Rectangle((start, top), stop - start, high, facecolor=colour, zorder=2,
                                 edgecolor="white", linewidth=0.3))  # fmt: skip
        if (stop - start) / inch > 0.055 * len(name) + 0.03:
            axes.text((start + stop) / 2, top + high / 2 + 0.004, name, size=6, ha="center",
                      va="center_baseline", color=_ink(colour), gid="bar")  # fmt: skip
    for node, epoch, _ in _freezes(run):
        if (cell == "reduce") == (node >= NODES):
            ends = (2 + node % NODES, 0), (2 + node % NODES, 1 + node % NODES)
            axes.plot([epoch + 0.5] * 2, [tops[ends[0]], tops[ends[1]] + lanes[ends[1]]],
                      color="black", linewidth=1.6, solid_capstyle="butt", zorder=4)  # fmt: skip


def _freezes(run):
    """(node of 8, epoch, distance) of every freeze of a one-stage search."""
    found = {}
    for row in run.metrics if run.one_stage else []:
        for node, flag in enumerate(_list(row, "frozen")):
            if flag and node not in found:
                found[node] = (node, row["epoch"], (_list(row, "distance") or [0] * 8)[node])
    return list(found.values())


def _draw_distances(axes, run, until):
    from matplotlib.ticker import LogLocator, NullFormatter

    shades, kinds = ("#0B2A4A", "#1F78B4", "#E07B00", "#A9A9A9"), ("-", (0, (3, 1)))
    marker = "." if until <= 15 else None
    positive = []
    for node in range(2 * NODES):
        points = [(row["epoch"], _list(row, "distance")[node]) for row in run.metrics
                  if _list(row, "distance") and row["epoch"] <= until]  # fmt: skip
        points = [(e, d) for e, d in points if isinstance(d, int | float) and d > 0]
        positive += [d for _, d in points]
        axes.plot(*(zip(*points, strict=True) if points else ([], [])), color=shades[node % NODES],
                  linestyle=kinds[node // NODES], marker=marker, markersize=3,
                  label=f"{'normal' if node < NODES else 'reduction'} {node % NODES}")  # fmt: skip
    label = "freezes"
    for node, epoch, distance in _freezes(run):
        if distance > 0:
            axes.plot(epoch, distance, "o", color=shades[node % NODES], markersize=3.5, zorder=4,
                      markeredgecolor="black", markeredgewidth=0.7, label=label)  # fmt: skip
            label = None
    tolerance = run.config.get("freeze_tol")
    if run.one_stage and isinstance(tolerance, int | float) and tolerance > 0:
        axes.axhline(tolerance, color="black", linewidth=0.7, linestyle=":", label="tolerance")
        positive.append(tolerance)
    rejected = [row["epoch"] for row in run.metrics if row.get("rejected") is True]
    if rejected:
        axes.plot(rejected, [0.05] * len(rejected), "kx", markersize=3, markeredgewidth=0.8,
                  transform=axes.get_xaxis_transform(), label="rejected")  # fmt: skip
    low, high = (min(positive), max(positive)) if positive else (0.1, 1.0)
    axes.set(yscale="log", title="distance of each code from the last one, $\\|z_t - z_{t-1}\\|_2$")
    axes.set_ylim(10 ** math.floor(math.log10(low) - 0.05), 10 ** math.ceil(math.log10(high) + 0.05))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.04), handlelength=1.5, labelspacing=0.15,
                fontsize=6, handletextpad=0.4, borderpad=0, borderaxespad=0.3)  # fmt: skip


def _draw_weights(axes, run, cell, until):
    """A line for each pair as long as it stays, with the number of its node at the end."""
    axes.set_title(f"weights of the active pairs, {CELLS[cell]}")
    axes.axhline(0, color="#888888", linewidth=0.5)
    lines = defaultdict(list)
    serial = {}
    for choice in run.history:
        values, pairs = choice.weights[cell], getattr(choice.genotype, cell)
        if choice.epoch > until or not values:
            continue
        keys = [(k // (len(pairs) // NODES), *pair) for k, pair in enumerate(pairs)]
        serial = {key: serial.get(key, choice.epoch) for key in keys}
        for key, value in zip(keys, values, strict=True):
            lines[(*key, serial[key])].append((choice.epoch, value))
    for (_, operation, _, _), points in lines.items():
        _, colour, dash, thick = OPERATIONS[operation]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=0.6 * thick,
                  marker="." if until <= 15 or len(points) == 1 else None, markersize=3)  # fmt: skip
    final = sorted((points[-1][1], node) for (node, *_), points in lines.items()
                   if points[-1][0] == max(p[-1][0] for p in lines.values()))  # fmt: skip
    axes.margins(y=0.08)
    low, high = axes.get_ylim()
    inch = (high - low) / (axes.get_position().height * axes.figure.get_figheight())
    at = _spread([value for value, _ in final], [1] * len(final), [0] + [0.092 * inch] * (len(final) - 1))
    for y, (value, node) in zip(at, final, strict=True):
        axes.annotate(f"node {node}", (1, value), (1.03, y), xycoords=axes.get_yaxis_transform(),
                      textcoords=axes.get_yaxis_transform(), va="center_baseline", size=6,
                      arrowprops=dict(arrowstyle="-", linewidth=0.4, color="#888888", shrinkA=0,
                                      shrinkB=0, relpos=(0, 0.5)))  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Curves, and several runs side by side
# ------------------------------------------------------------------------------------------------

SERIES = {
    "train": ("training", "#0B5FA5", "-"),
    "arch": ("half for b, augmented", "#EBAA1E", (0, (1, 1))),
    "valid": ("validation", "#D55E00", (0, (4, 1.5))),
    "test": ("test", "#D55E00", (0, (4, 1.5))),
}


def curves_figure(run):
    """Draw losses, accuracies and learning rate (and drop-path probability) over the epochs.

    Returns
    -------
    matplotlib.figure.Figure
    """
    with _style():
        figure = _figure(WIDTH, 2.35)
        figure.text(0.06 / WIDTH, 1 - 0.06 / 2.35, run.name, va="top", size=8, weight="bold")
        loss, accuracy = (_axes(figure, left, 0.65, 2.05, 1.35) for left in (0.42, 2.86))
        drop = any(_series(run, "drop_path_prob")[1])
        rate = _axes(figure, 5.36, 0.65, 1.42, 0.55 if drop else 1.35)
        marker = "." if len(run.metrics) <= 15 else None
        for kind, (name, colour, dash) in SERIES.items():
            for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
                epochs, values = _series(run, f"{kind}_{what}")
                if epochs:
                    axes.plot(epochs, values, color=colour, linestyle=dash, marker=marker,
                              markersize=3, label=name)  # fmt: skip
        rate.plot(*_series(run, "learning_rate"), color="black", marker=marker, markersize=3)
        loss.set(title="loss (cross-entropy)")
        accuracy.set(title="accuracy (%)")
        rate.set(title="learning rate", ylim=(0, None))
        panels = [loss, accuracy, rate]
        if drop:
            panels.append(_axes(figure, 5.36, 1.45, 1.42, 0.55))
            panels[-1].plot(*_series(run, "drop_path_prob"), color="black", marker=marker, markersize=3)
            panels[-1].set(title="drop-path probability", ylim=(0, None))
            rate.tick_params(labelbottom=False)
        _log_if_wide(loss)
        for axes in panels:
            _epoch_axis(axes, run.metrics[-1]["epoch"])
            if run.end is not None:
                line = axes.axvline(run.end + 0.5, color="black", linewidth=0.9,
                                    linestyle=(0, (4, 2)), label="search ends")  # fmt: skip
        if drop:
            rate.set_xlabel("")
        handles = accuracy.get_legend_handles_labels()
        figure.legend(*handles, loc="upper left", ncols=len(handles[0]), borderpad=0,
                      bbox_to_anchor=(0.06 / WIDTH, 1 - 0.25 / 2.35), borderaxespad=0)  # fmt: skip
        kind, name = _held_out(run)
        epochs, values = _series(run, f"{kind}_accuracy")
        if values:
            best = max(values)
            figure.text(1 - 0.06 / WIDTH, 1 - 0.07 / 2.35, f"{name} accuracy {values[-1]:.2f} % in epoch "
                        f"{epochs[-1]}, best {best:.2f} % in epoch {epochs[values.index(best)]}",
                        va="top", ha="right")  # fmt: skip
        return figure


def _log_if_wide(axes):
    """Make the y axis logarithmic where its values span more than a decade; label it well."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [v for line in axes.lines for v in line.get_ydata() if math.isfinite(v)]
    if not values or min(values) <= 0 or max(values) < 10 * min(values):
        return
    axes.set_yscale("log")
    decades = math.log10(max(values) / min(values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def compare_figure(runs):
    """Overlay the accuracies of runs; those that differ only by seed share colour and dash.

    Returns
    -------
    matplotlib.figure.Figure
    """
    colours = [colour for _, colour, *_ in OPERATIONS.values()] + ["#9C3D97", "#8A8A8A"]
    dashes = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
    names = _names(runs)
    with _style():
        height = 2.6 + 0.14 * len(runs)
        figure = _figure(WIDTH, height)
        panels = [_axes(figure, left, 0.25, 2.95, 1.9) for left in (0.42, 3.82)]
        lines = []
        for i, group in enumerate(_groups(runs)):
            for run in group:
                kind, what = _held_out(run)
                look = dict(color=colours[i % len(colours)], linestyle=dashes[i % len(dashes)],
                            linewidth=1.2 if len(group) == 1 else 0.8,
                            marker="." if len(run.metrics) <= 15 else None, markersize=3)  # fmt: skip
                panels[0].plot(*_series(run, "train_accuracy"), **look)
                label = f"{names[run.path]}, {what}"
                if len(group) > 1:
                    label += f" (setting {i + 1}, seed {run.config.get('seed', '–')})"
                lines += panels[1].plot(*_series(run, f"{kind}_accuracy"), **look, label=label)
        kinds = list(dict.fromkeys(_held_out(run)[1] for run in runs))
        for axes, title in zip(panels, ("training", " or ".join(kinds)), strict=True):
            axes.set_title(f"{title} accuracy (%)")
            _epoch_axis(axes, max(run.metrics[-1]["epoch"] for run in runs))
        figure.legend(handles=lines, loc="lower left", bbox_to_anchor=(0.42 / WIDTH, 0.02), borderpad=0,
                      borderaxespad=0, handlelength=2.5, labelspacing=0.4)  # fmt: skip
        return figure


def table(runs):
    """The runs as text: one line each, and mean ± std where several differ only by seed.

    Returns
    -------
    str
    """
    names = _names(runs)
    lines = [("run", "seed", "genotype", "params M", "mult-adds M", "epochs", "measured on",
              "last %", "best %", "hours")]  # fmt: skip
    for group in _groups(runs):
        results = []
        for run in group:
            kind, what = _held_out(run)
            values = _series(run, f"{kind}_accuracy")[1]
            hours = sum(_series(run, "seconds")[1]) / 3600
            sizes = [run.metrics[-1].get(key) for key in ("parameters", "multiply_adds")]
            sizes = [value / 1e6 if isinstance(value, int | float) else None for value in sizes]
            done, total = _progress(run)
            results.append([*sizes, *((values[-1], max(values)) if values else (None, None)), hours])
            lines.append((
                names[run.path], str(run.config.get("seed", "–")), genotype_name(run.genotype),
                _number(sizes[0], 4), _number(sizes[1], 1), f"{done}" if done == total else
                f"{done}/{total}", what, *(_number(v, 2) for v in results[-1][2:]),
            ))  # fmt: skip
        if len(group) > 1:
            cells = [_mean_std(column, digits) for column, digits in
                     zip(zip(*results, strict=True), (4, 1, 2, 2, 2), strict=True)]  # fmt: skip
            lines.append((f"  mean ± std of {len(group)} seeds", "", "", *cells[:2], "", "", *cells[2:]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = (0, 2, 6)  # columns of text; numbers are aligned to the right
    return "\n".join("  ".join(f"{text:{'<' if i in left else '>'}{widths[i]}}" for i, text in enumerate(
        line)).rstrip() for line in lines)  # fmt: skip


def _number(value, digits):
    return "–" if value is None else f"{value:.{digits}f}"


def _mean_std(values, digits):
    """Mean ± sample standard deviation."""
    if None in values:
        return "–"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


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
    """Epochs done, and epochs there will be (as far as is known)."""
    done, total = run.metrics[-1]["epoch"], run.config.get("epochs")
    if run.one_stage:
        total = None if run.end is None or total is None else run.end + total
        return (done, "?") if total is None else (done, max(done, total))
    return done, max(done, total or 0)


def _groups(runs):
    """Runs of one setting and of as many epochs: they differ only by seed, folder or machine."""
    groups = defaultdict(list)
    for run in runs:
        free = ("seed", "save", "data", "device", "workers", "report_freq", "arch", "resume")
        setting = {key: value for key, value in run.config.items() if key not in free}
        done, total = _progress(run)
        setting["done"] = done == total or done
        if not run.search:  # the genotype itself, wherever it was read from
            setting["arch"] = run.genotype and genotypes.as_lists(run.genotype)
        alone = run.path if not run.config else ""  # without config.json nothing is known of it
        groups[json.dumps([setting, run.search, alone], sort_keys=True)].append(run)
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
    metadata = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    partial = f"{path}.partial"
    try:
        with _style():
            figure.savefig(partial, format=kind, metadata=metadata)
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
    run_dir : str or Run
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
    run = run_dir if isinstance(run_dir, Run) else read_run(os.fspath(run_dir))
    figures = {}
    if run.genotype:
        title, first, last = run.name, *([*run.history, None, None][i] for i in (0, -3))
        if len(run.history) > 1:
            both = [genotypes.as_lists(choice.genotype) for choice in (first, last)]
            same = both[0] == both[1]
            title += f": as after epoch {first.epoch}" if same else ""
            figures["cells.png"] = cells_figure(
                run.genotype, title, None if same else first.genotype,
                (f"after epoch {first.epoch}", f"after epoch {last.epoch}"),
            )  # fmt: skip
        else:
            figures["cells.png"] = cells_figure(run.genotype, title)
    if run.search:
        figures["search.png"] = search_figure(run)
    figures["curves.png"] = curves_figure(run)
    paths = {name: os.path.join(folder or run.path, name) for name in figures}
    for name, figure in figures.items():
        save(figure, paths[name])
    return list(paths.values())


def get_args_parser():
    parser = arguments.Parser(prog="visualize.py", description=__doc__)
    parser.add_argument(
        "what", nargs="+", metavar="WHAT",
        help="a genotype (a genotype.json, a published name, random:SEED, a text 'Genotype(...)'), "
        "a run folder, or several run folders",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="PATH",
        help="a picture (.png, .svg or .pdf); of one run: the folder for its pictures. Default: "
        "for genotype.json cells.png beside it, for a name NAME.png here, for a run its own "
        "folder, for several compare.png here",
    )  # fmt: skip
    parser.add_argument(
        "--stacked", action="store_true",
        help=f"draw the cells of a genotype one above the other, {COLUMN} in wide instead of {WIDTH}",
    )  # fmt: skip
    return parser


def default_output(spec):
    """Where the picture of a genotype goes unless -o says so."""
    if os.path.isfile(spec):
        stem, _ = os.path.splitext(spec)
        if os.path.basename(spec) == "genotype.json":
            stem = os.path.join(os.path.dirname(spec), "cells")
        return f"{stem}.png"
    return "cells.png" if "(" in spec else f"{re.sub(r'[^A-Za-z0-9_]+', '-', spec)}.png"


def main(args):
    spec, many = args.what[0], len(args.what) > 1
    if many:
        runs = [read_run(path) for path in dict.fromkeys(map(os.path.normpath, args.what))]
        output = args.output or "compare.png"
        _check_output(output)
        print(table(runs))
        save(compare_figure(runs), output)
        paths = [output]
    elif os.path.isdir(spec):
        run = read_run(spec)
        if args.output and not os.path.isdir(args.output):
            raise ValueError(f"-o {args.output}: of a run, give a folder that exists")
        paths = draw_run(run, args.output)
    else:
        try:
            genotype, _ = genotypes.load(spec)
        except ValueError as error:
            raise ValueError(f"{error}; or a run folder") from None
        output = args.output or default_output(spec)
        _check_output(output)
        title = None if "(" in spec else os.path.basename(spec)
        save(cells_figure(genotype, title, stacked=args.stacked), output)
        paths = [output]
    for path in paths:
        print(path)


if __name__ == "__main__":
    args = get_args_parser().parse_args()
    try:
        main(args)
    except ValueError as error:
        arguments.fail("visualize.py", error)
