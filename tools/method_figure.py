"""Draw how the method works at one node: point b, dictionary A, code z, weights w, cell.

    python tools/method_figure.py                # of an example
    python tools/method_figure.py runs/NAME      # of a search's normal cell, as it is now
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

import visualize
from genotypes import NODES, PRIMITIVES
from harness import flags
from model_search import SparseCode
from utils import UserError
from visualize import INNER, MARGIN, NAMES, OUTER, OUTPUT, look, short

EXAMPLE = 33  # seed of the code that is drawn without a run
SIGNS = LinearSegmentedColormap.from_list("signs", ("#B0413E", "white", "#4B3F8F"))  # of A


def code_of(run_dir=None):
    """The SparseCode of a search's normal cell, as its checkpoint has it; else a random one.

    That is as a search begins with it, but that b is 1000 times as long.
    """
    if run_dir is None:
        torch.manual_seed(EXAMPLE)
        code = SparseCode()
        with torch.no_grad():
            for b in code.b:
                b.mul_(1000)
        code.recover()
        return code
    path = os.path.join(run_dir, "checkpoint.pt")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "net" not in checkpoint:
        raise UserError(f"{path} is not the checkpoint of a search")
    args, state, prefix = checkpoint["args"], checkpoint["net"], "normal_code."
    code = SparseCode(args["proj_dims"], args["sparseness"], args["lam"])
    code.load_state_dict({k.removeprefix(prefix): state[k] for k in state if k.startswith(prefix)})
    return code


@visualize.style()
def method_figure(code):
    """Draw how the pairs of node 0 come out of its point b: b = Az, the sparse z, w, the cell.

    `code` is a model_search.SparseCode after its `recover()`.
    """
    A, b, z = (x[0].numpy(force=True) for x in (code.A, code.b, code.z))
    (m, n), unit = A.shape, 0.19  # inches: a column of A and of z, a row of A and of b
    kept = {edge * len(PRIMITIVES) + op: (PRIMITIVES[op], edge) for edge, op in code.support[0]}
    weights = code.weights().numpy(force=True).ravel()
    pairs = [(PRIMITIVES[op], edge) for node in code.support for edge, op in node]

    # Inches from the upper left corner: b and A above z to the left, the cell above w to the right.
    left, top, depth = 1.1, 0.46, visualize.layers(pairs)[OUTPUT]
    longest, label = (0.07 * max(len(short(op)) for op in ops) + 0.06 for ops in (
        PRIMITIVES, [op for op, _ in kept.values()]))  # names below z, and in the list of w
    right, codes = left + max(n * unit, 2.66) + 0.3, top + m * unit + 0.62
    names = codes + 0.75 + longest
    gap = max((visualize.WIDTH - right - MARGIN - 2 * OUTER + INNER) / depth - INNER, 0.15)
    wide = 2 * OUTER - INNER + depth * (INNER + gap)
    high = len(pairs) * visualize.PAIR + NODES * visualize.SPACE
    weighing = max(top + high + 0.16, codes - 0.05)
    width = right + max(wide, label + 2.28) + MARGIN
    height = max(names + 0.2, weighing + 0.28 + 0.27 * len(kept))
    figure = visualize.new_figure(width, height)

    def add_axes(x, y, wide, high, **kwargs):
        place = (x / width, 1 - (y + high) / height, wide / width, high / height)
        return figure.add_axes(place, **kwargs)

    page = add_axes(0, 0, width, height, xlim=(0, width), ylim=(height, 0), zorder=2)
    page.axis("off")

    def say(x, y, text, size=7.5, **font):
        page.text(x, y, text, size=size, va="center", **font)

    def arrow(x, y, to_x, to_y):
        page.annotate("", (to_x, to_y), (x, y), zorder=5, arrowprops=dict(
            width=5, headwidth=11, headlength=7, color="#8A8A8A", shrink=0))

    say(MARGIN, 0.13, "1  compressed space: $b = Az$", 9.5)
    say(MARGIN, 0.35, f"$b \\in R^{{{m}}}$, trained")
    say(left, 0.35, f"$A \\in R^{{{m}\\times {n}}}$, random, fixed: a column for each pair")
    axes = add_axes(MARGIN, top, left - MARGIN - 0.25, m * unit)
    axes.barh(range(m), b, 0.6, color="#444444")
    axes.axvline(0, color="black", marker="")
    axes.set(xticks=[], yticks=[], ylim=(m - 0.5, -0.5))
    say(left - 0.13, top + m * unit / 2, "=", 12, ha="center")
    axes = add_axes(left, top, n * unit, m * unit)
    scale = Normalize(-abs(A).max(), abs(A).max())
    axes.imshow(A, cmap=SIGNS, norm=scale, aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for k, (operation, _) in kept.items():
        page.add_patch(Rectangle((left + k * unit, top), unit, m * unit, fill=False, linewidth=2.2,
                                 edgecolor=look(operation).colour))
    bar = figure.colorbar(ScalarMappable(scale, SIGNS), orientation="horizontal", cax=add_axes(
        left + n * unit - 1, top + m * unit + 0.07, 1, 0.07))
    ends = scale.vmin, 0, scale.vmax
    bar.set_ticks(ends, labels=[number(x, 2) for x in ends])
    bar.ax.tick_params(length=0, pad=1.5)

    arrow(0.45, top + m * unit + 0.08, 0.45, codes + 0.08)
    say(left - 0.3, codes - 0.18, "2  sparse code: $z = \\arg\\min\\;\\frac{1}{2}\\|Az - b\\|^2 + "
        "\\lambda\\|z\\|_1$", 9.5)
    axes = add_axes(left, codes, n * unit, 0.75)
    axes.axhline(0, color="black", marker="", linewidth=0.7)
    for k, value in enumerate(z):
        colour = look(kept[k][0]).colour if k in kept else "#8A8A8A"
        axes.plot([k, k], [0, value], color=colour, marker="", linewidth=4 if k in kept else 1.2)
        axes.plot(k, value, "o", color=colour, markersize=7 if k in kept else 4 if value else 1.5)
    axes.margins(y=0.15)
    axes.set(xlim=(-0.5, n - 0.5), yticks=[])
    axes.set_xticks(range(n), n // len(PRIMITIVES) * [*map(short, PRIMITIVES)], rotation=90, size=7)
    axes.tick_params(length=0)
    for k in kept:
        axes.get_xticklabels()[k].set_weight("bold")
    axes.grid(False)
    for edge in range(n // len(PRIMITIVES)):
        x, span = left + edge * len(PRIMITIVES) * unit, len(PRIMITIVES) * unit
        page.plot([x + 0.05, x + span - 0.05], [names] * 2, color="black", marker="")
        say(x + span / 2, names + 0.1, f"from {NAMES[edge]}", ha="center")
    say(MARGIN, codes + 0.3, f"$\\|z\\|_0 = {np.count_nonzero(z)}$ of {n}")
    say(MARGIN, codes + 0.5, f"{len(kept)} largest kept")

    arrow(left + n * unit + 0.04, codes + 0.4, right - 0.03, codes + 0.4)
    say(right, weighing + 0.1, "3  weights: $w_S = A_S^T b - (A_S^T A_S - I)\\,z_S$", 9.5)
    for i, (k, (operation, edge)) in enumerate(kept.items()):
        colour, ink, *_ = look(operation)
        y = weighing + 0.27 * (i + 1)
        visualize.box(page, (right + 0.05, y, label, 0.22), short(operation), f"kept {i}", ink, 7,
                      colour, colour)
        say(right + label + 0.13, y + 0.11, f"from {NAMES[edge]}:  $w$ = {number(weights[k])}", 8.5)

    x = width - MARGIN - OUTER / 2
    arrow(x, weighing + 0.6, x, weighing - 0.3)
    say(right, 0.13, "4  cell: node 0 $= \\Sigma_{k \\in S}\\,w_k\\,op_k(input_k)$", 9.5)
    say(right, 0.35, f"nodes 1 to {NODES - 1} come from points of their own")
    axes = add_axes(right - 0.02, top, wide + 0.04, high, xlim=(-0.02, wide + 0.02), ylim=(high, 0))
    axes.axis("off")
    others = [(None, None)] * len(kept) + pairs[len(kept) :]
    visualize.draw_cell(axes, pairs, range(2, OUTPUT), others, gap)
    return figure


def number(value, digits=3):
    """The first digits of a number, so that a small one is not "−0.00"."""
    return f"{value + 0:.{digits}g}".replace("-", "−")  # + 0: for a 0 that is negative


def get_args_parser():
    parser = flags.Parser(prog="method_figure.py", description=__doc__)
    parser.add_argument(
        "run", nargs="?", metavar="RUN_DIR", help="the folder of a search (default: an example)")
    parser.add_argument(
        "-o", "--output", type=flags.name, metavar="PATH", help="the picture: .png, .svg or .pdf "
        "(default: method.png, in the folder of the run if there is one)")
    return parser


def main(args):
    output = args.output or os.path.join(args.run or "", "method.png")
    visualize.save(method_figure(code_of(args.run)), output)
    print(output)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        flags.fail("method_figure.py", error)
