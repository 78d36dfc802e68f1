"""Pictures of cells: of a genotype, of a search in every epoch, and of how one comes from a code.

    python visualize.py ISTA_twostage
    python visualize.py --method
"""

import contextlib
import math
from collections import defaultdict
from itertools import pairwise, permutations

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from genotypes import NODES, PRIMITIVES

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
for _name in PRIMITIVES:  # one that was added to them
    OPERATIONS.setdefault(_name, (_name.replace("_", " "), "#8E4FA8", "white", "-", 1.2))
CONCAT = ("", "#9A9A9A", "", "-", 0.7)
CELLS = {"normal": "normal cell", "reduce": "reduction cell"}


@contextlib.contextmanager
def style():
    """Matplotlib's own defaults but for these, whatever the user's matplotlibrc says."""
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
    """A figure without pyplot: no window, and no state that others share; sizes in inches."""
    return Figure((width, height), **kwargs)


def epoch_axis(axes, until, ticks=5):
    """Let x be the epochs 1 to `until`."""
    axes.set(xlim=(0.5, until + 0.5), xlabel="epoch")
    axes.locator_params("x", integer=True, nbins=ticks, min_n_ticks=1)


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------

# A column for each layer: the inputs, the nodes by the length of the longest path to them, the
# output. A row for each node, which has the labels of its pairs in its column, their wires to the
# left of that, and to the right the wire to the output. So whatever the genotype is, wires bend and
# cross only between two columns, where there are no labels and no nodes. Inches; y points down.
OUTPUT = 2 + NODES
NAMES = ("$c_{k-2}$", "$c_{k-1}$", *map(str, range(NODES)), "$c_k$")
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
    depths = [max(layers(p[0])[OUTPUT] for p in panels[j::columns]) for j in range(columns)]
    outer = 2 * MARGIN + 2 * OUTER - INNER
    gap = (width - columns * outer) / sum(depths) - INNER
    widths = [outer + depth * (INNER + gap) for depth in depths]
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
            draw_cell(axes, pairs, concat, others, gap)
        figure.text(MARGIN / width, 1 - 0.05 / height, title, va="top", size="large")
        return figure


def _by_node(pairs):
    each = len(pairs) // NODES
    return [pairs[k : k + each] for k in range(0, len(pairs), each)]


def layers(pairs):
    """Layer of each node."""
    layer = {0: 0, 1: 0}
    for node, chosen in enumerate(_by_node(pairs), 2):
        layer[node] = 1 + max(layer[source] for _, source in chosen)
    return {**layer, OUTPUT: 1 + max(layer.values())}


def draw_cell(axes, pairs, concat, others, gap):
    each, layer = len(pairs) // NODES, layers(pairs)
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
        box(axes, (x, y - PAIR / 2 + 0.02, LABEL, PAIR - 0.04), name.replace(" ", "\n"),
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
MARKERS = "osD^v"  # of the inputs of a node


@style()
def search_figure(run):
    """Draw what every node chose in every epoch, how far its code moved, and the pairs' weights.

    Parameters
    ----------
    run : visualize.Record

    Returns
    -------
    matplotlib.figure.Figure
    """
    until = run.metrics[-1]["epoch"] if run.end is None else run.end
    lanes = {cell: _lanes(run, cell) for cell in CELLS if run.history}
    panels = [(_draw_choices, cell, LANE * lanes[cell][1]) for cell in lanes]
    panels.append((_draw_distances, None, 1.1))
    panels += [(_draw_weights, cell, 0.9) for cell in lanes if run.history[-1].weights[cell]]
    heights = [height for *_, height in panels]
    figure = new_figure(WIDTH, 0.6 + sum(heights) + 0.26 * len(panels), layout="constrained")
    grid = figure.add_gridspec(len(panels), NODES, height_ratios=heights)
    for i, (draw, cell, _) in enumerate(panels):
        if draw is _draw_weights:
            first = figure.add_subplot(grid[i, 0])
            rest = [figure.add_subplot(grid[i, j], sharey=first) for j in range(1, NODES)]
            draw([first, *rest], run, until, cell)
        else:
            axes = figure.add_subplot(grid[i, :])
            epoch_axis(axes, until)
            draw(axes, run, until, *([cell, *lanes[cell]] if cell else []))
    changes = [b.epoch for a, b in pairwise(run.history) if a.genotype != b.genotype]
    text = f"last change of a pair in epoch {changes[-1]}" if changes else "no change of a pair"
    figure.suptitle(f"{run.name}: {text}; {until} epochs of search", x=0.01, ha="left")
    return figure


def _legend(axes):
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=6, labelspacing=0.2)


def _lanes(run, cell):
    """Top and height of the lane of each (node, input), and the height of all.

    A lane is as high as the most operations that share it in an epoch.
    """
    heights = {(node, source): 1 for node in range(NODES) for source in range(2 + node)}
    for choice in run.history:
        for node, pairs in enumerate(_by_node(getattr(choice.genotype, cell))):
            sources = [source for _, source in pairs]
            for source in sources:
                lane = node, source
                heights[lane] = max(heights[lane], sources.count(source))
    lanes, top = {}, 0
    for (node, source), height in heights.items():
        top += 0.5 * (source == 0 < node)
        lanes[node, source] = top, height
        top += height
    return lanes, top


def _freezes(run):
    """The epoch in which each of the 8 nodes of a one-stage search froze, if it did."""
    epochs = {}
    for row in run.metrics if run.one_stage else ():
        for node, frozen in enumerate(row.get("frozen") or ()):
            if frozen:
                epochs.setdefault(node, row["epoch"])
    return epochs


def _draw_choices(axes, run, until, cell, lanes, bottom):
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

    for top, height in lanes.values():
        axes.axhspan(top, top + height, facecolor="#F0F0F0", edgecolor="white")
    for (node, source, operation, i, n, _), spans in bars.items():
        name, colour, ink, *_ = OPERATIONS[operation]
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
        top, height = lanes[node, node + 1]
        axes.vlines(freezes[node] + 0.5, lanes[node, 0][0], top + height, color="black",
                    linewidth=1.6, clip_on=False)
    for name, colour, *_ in OPERATIONS.values():
        axes.bar(math.nan, 0, color=colour, label=name)
    if run.one_stage:
        axes.plot([], [], "k|", markersize=7, markeredgewidth=1.6, label="node freezes")
    axes.set_yticks([top + height / 2 for top, height in lanes.values()],
                    [f"{INPUTS[source]} → {node}" for node, source in lanes], size=6)
    axes.set(ylim=(bottom, 0), title=CELLS[cell], ylabel="input → node")
    axes.set_xlabel(None)
    axes.tick_params(length=0, labelbottom=False)
    axes.grid(False)
    if cell == "normal":
        _legend(axes)


def _draw_distances(axes, run, until):
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
        axes.axhline(run.config["freeze_tol"], color="black", linestyle=":", marker="",
                     label="tolerance")
    axes.set(yscale="log", title="distance of each code from the last one, $\\|z_t - z_{t-1}\\|_2$")
    _legend(axes)


def _draw_weights(row, run, until, cell):
    """Axes for each node, with a line for each pair while it is active."""
    lines = defaultdict(lambda: [math.nan] * len(run.history))
    for i, choice in enumerate(run.history):
        pairs, weights = getattr(choice.genotype, cell), choice.weights[cell] or ()
        for k, (pair, weight) in enumerate(zip(pairs, weights, strict=False)):
            lines[(k * NODES // len(pairs), *pair)][i] = weight
    epochs = [choice.epoch for choice in run.history]
    for (node, operation, source), values in lines.items():
        _, colour, _, dash, thick = OPERATIONS[operation]
        row[node].plot(epochs, values, color=colour, linestyle=dash, linewidth=0.6 * thick,
                       marker=MARKERS[source], markersize=2.5, markevery=math.ceil(until / 8))
    for node, axes in enumerate(row):
        axes.axhline(0, color="#888888", linewidth=0.5, marker="", zorder=1)
        axes.set_title(f"{CELLS[cell]}, node {node}", size=6.5)
        epoch_axis(axes, until, 3)
        axes.tick_params(labelleft=node == 0)
    row[0].set_ylabel("weights $w_S$")
    if cell == "normal":
        for name, marker in zip(INPUTS, MARKERS, strict=True):
            axes.plot([], [], marker, color="black", label=f"from {name}")
        _legend(axes)
