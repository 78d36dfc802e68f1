"""Pictures: nothing overlaps, they show what the files say, also after edits; errors are a line."""

import importlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path as FilePath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.path import Path
from matplotlib.text import Text

import genotypes
import visualize
from model_search import SparseCode
from tools import method_figure
from utils import UserError

ROOT = FilePath(__file__).resolve().parent.parent


def random_genotype(seed, each=2):
    """A genotype of `each` distinct pairs a node, not all of whose nodes are concatenated."""
    rng, nodes = random.Random(seed), range(2, 2 + genotypes.NODES)

    def cell():
        edges = [[(op, s) for s in range(node) for op in genotypes.PRIMITIVES] for node in nodes]
        return [pair for pairs in edges for pair in rng.sample(pairs, each)]

    concat = sorted(rng.sample(nodes, rng.randint(1, genotypes.NODES)))
    return genotypes.Genotype(cell(), concat, cell(), nodes)


def make_run(path, kind="two", epochs=8, each=2, seed=0, accuracy=90.0, change=None, **config):
    """A run folder; a one-stage search freezes a node of each cell in epochs 2, 3, ...

    `change` edits the list of its rows.
    """
    path.mkdir(parents=True)
    nodes, one = genotypes.NODES, kind == "one"
    last = nodes + 1  # epoch of the search, if it is one-stage
    config |= dict(seed=seed, epochs=max(epochs - last * one, 1), save=str(path), freeze_tol=1e-3,
                   one_stage=None if kind == "train" else one)
    (path / "config.json").write_text(json.dumps(config))
    held_out, rows, choices = "valid" if kind == "two" else "test", [], []
    for epoch in range(1, epochs + 1):
        row = dict(epoch=epoch, learning_rate=0.1 / epoch, drop_path_prob=0.02 * (kind != "two"))
        for part in ("train", held_out):
            row |= {f"{part}_loss": 3 / epoch, f"{part}_accuracy": accuracy - epochs + epoch}
        if kind == "train":
            row.update(parameters=3_316_726, multiply_adds=524_996_736)
        else:
            row["phase"] = "searching" if one and epoch <= last else "training"
            froze = [2 + k % nodes if one else math.inf for k in range(2 * nodes)]
            row["frozen"] = [epoch >= at for at in froze]
            row["distance"] = [0.5 / 4**epoch * (epoch <= at) for at in froze]
        rows.append({**row, "seconds": 1800.0})
        genotype = genotypes.as_lists(random_genotype(min(epoch, last) + 10 * seed, each))
        weights = np.linspace(-1, epoch, each * nodes).tolist()
        choices.append(dict(genotype, epoch=epoch, normal_weights=weights, reduce_weights=weights))
    if change:
        change(rows)
    files = {"metrics": rows, "genotypes": choices}
    if kind == "train":
        genotypes.save(path / "genotype.json", random_genotype(0, each), False)
        del files["genotypes"]
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"{name}.jsonl").write_text(text)
    return str(path)


def overlap(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def check_texts(figure):
    """No text is smaller than 6 pt, clipped, or on another one; ticks included."""
    FigureCanvasAgg(figure).draw()  # so that everything has its place
    renderer, texts = figure.canvas.get_renderer(), set(figure.findobj(Text))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high or not axis.axes.axison:
                texts -= {tick.label1}  # matplotlib does not draw it
    boxes = {text: text.get_window_extent(renderer) for text in texts
             if text.get_visible() and text.get_text().strip()}
    for text, box in boxes.items():
        assert text.get_fontsize() >= 6, text
        assert -1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, text
        assert -1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, text
    for a, b in itertools.combinations(boxes, 2):
        assert not overlap(boxes[a], boxes[b]), (a, b)


def check_plots(figure):
    """Besides, both axes say what they are, or the plot to the left with the same axis does."""
    check_texts(figure)
    for axes in figure.axes:
        shared = axes.get_shared_y_axes().get_siblings(axes)
        assert axes.get_xlabel() == "epoch" and any(other.get_ylabel() for other in shared)


def check_cells(figure, genotype):
    """Labels and nodes are apart, their texts inside them, and no edge runs over one of them."""
    check_texts(figure)
    renderer = figure.canvas.get_renderer()
    for axes, cell in zip(figure.axes, ("normal", "reduce"), strict=True):
        pairs, concat = getattr(genotype, cell), list(getattr(genotype, f"{cell}_concat"))
        gids = {patch.get_gid(): patch for patch in axes.patches}  # of an edge the upper one
        boxes = {gid: patch.get_window_extent(renderer) for gid, patch in gids.items()}
        edges = {gid: boxes.pop(gid) and gids[gid] for gid in gids if gid.startswith("edge")}
        assert len(edges) == len(pairs) + len(concat)
        assert len(boxes) == len(pairs) + genotypes.NODES + 3
        for a, b in itertools.combinations(boxes, 2):
            assert not overlap(boxes[a], boxes[b]), (a, b)
        for text in axes.texts[1:]:
            box, around = text.get_window_extent(renderer), boxes[text.get_gid()[8:]]
            assert around.x0 <= box.x0 and box.x1 <= around.x1 and around.y0 <= box.y0, text
        labels = {text.get_gid(): text.get_text().replace("\n", " ") for text in axes.texts}
        for k, (operation, _) in enumerate(pairs):
            assert labels[f"text of label {k}"][:3] == operation[:3]
            colour = visualize.look(operation).colour
            assert to_hex(edges[f"edge {k}"].get_edgecolor()).upper() == colour
        for gid, edge in edges.items():
            k = int(gid[5:])
            ends = (pairs[k][1], 2 + k * genotypes.NODES // len(pairs)) if k < len(pairs) else (
                concat[k - len(pairs)], visualize.OUTPUT)
            path = edge.get_path().transformed(edge.get_transform())
            points = Path(path.to_polygons(closed_only=False)[0]).interpolated(20).vertices
            for other in boxes.keys() - {f"node {end}" for end in ends} - {f"label {k}"}:
                low, high = boxes[other].min, boxes[other].max
                assert not ((low < points) & (points < high)).all(1).any(), (gid, other)


def check_search(run):
    """Each strip has the pairs of its epochs, each panel the weights of its node, and their key."""
    figure, nodes = visualize.search_figure(run), genotypes.NODES
    check_plots(figure)
    inputs = ("k−2", "k−1", *range(nodes - 1))
    for axes, cell in zip(figure.axes, ("normal", "reduce"), strict=False):
        lanes = [tick.get_text() for tick in axes.get_yticklabels()]
        assert lanes == [f"{inputs[s]} → {j}" for j in range(nodes) for s in range(j + 2)]
        for choice in run.history:
            here = [p for p in axes.patches if p.get_x() < choice.epoch < p.get_x() + p.get_width()
                    and to_hex(p.get_facecolor()) != "#f0f0f0"]
            here.sort(key=lambda p: p.get_y())
            expected = [visualize.look(op).colour
                        for pairs in genotypes.by_node(getattr(choice.genotype, cell))
                        for op, _ in sorted(pairs, key=lambda pair: pair[1])]
            assert [to_hex(p.get_facecolor()).upper() for p in here] == expected
    for k, axes in enumerate(figure.axes[3:]):
        assert axes.get_title(loc="left").endswith(f"node {k % nodes}")
        lines = [line.get_ydata() for line in axes.lines]
        drawn = sorted(y for ys in lines if len(ys) == len(run.history) for y in ys if y == y)
        weights = [choice.weights["normal" if k < nodes else "reduce"] for choice in run.history]
        assert drawn == sorted(w for ws in weights for w in genotypes.by_node(ws)[k % nodes])
    key = [text.get_text() for text in figure.axes[2 + nodes].get_legend().get_texts()]
    assert key == [*map(visualize.short, genotypes.PRIMITIVES), *(f"from {i}" for i in inputs)]
    return figure


@pytest.mark.parametrize("stacked", [False, True])
def test_nothing_overlaps_in_a_cell(stacked):
    drawn = [genotype for genotype, _ in genotypes.NAMED.values()]
    for genotype in drawn + [random_genotype(seed, 1 + seed // 2) for seed in range(8)]:
        figure = visualize.cells_figure(genotype, "title", stacked=stacked)
        assert figure.get_figwidth() == pytest.approx(3.35 if stacked else 6.9)
        check_cells(figure, genotype)


def test_changes_are_filled():
    before, after = genotypes.draw(1), genotypes.draw(2)
    changed = before._replace(normal=[*before.normal[:7], after.normal[7]])
    assert changed.normal[7] not in before.normal[6:]
    figure = visualize.cells_figure(changed, "t", before, ("epoch 1", "epoch 9"))
    filled = [
        {int(p.get_gid()[6:]): to_hex(p.get_facecolor()).upper() for p in axes.patches
         if p.get_gid().startswith("label") and to_hex(p.get_facecolor()) != "#ffffff"}
        for axes in figure.axes
    ]
    colour = [visualize.look(g.normal[7][0]).colour for g in (before, changed)]
    assert filled == [{7: colour[0]}, {}, {7: colour[1]}, {}]
    check_texts(figure)


@pytest.fixture
def edit(monkeypatch):
    """Edits genotypes.py, as far as pictures are concerned."""

    def reload(nodes, primitives):
        monkeypatch.setattr(genotypes, "NODES", nodes)
        monkeypatch.setattr(genotypes, "PRIMITIVES", primitives)
        importlib.reload(visualize)
        importlib.reload(method_figure)

    yield reload
    monkeypatch.undo()
    importlib.reload(visualize)
    importlib.reload(method_figure)


ADDED = ["sep_conv_7x7", *genotypes.PRIMITIVES, "inverted_bottleneck_3x3", "conv_7x1_1x7"]


@pytest.mark.crash
@pytest.mark.parametrize("nodes, each, primitives", [
    (3, 4, genotypes.PRIMITIVES[4:1:-1]), (6, 1, ADDED),
])
def test_pictures_of_an_edited_search_space(tmp_path, edit, nodes, each, primitives):
    edit(nodes, primitives)
    assert len({visualize.look(name).colour for name in primitives}) == len(primitives)
    genotype = random_genotype(0, each)
    for stacked in (False, True):
        check_cells(visualize.cells_figure(genotype, stacked=stacked), genotype)
    check_search(visualize.read_run(make_run(tmp_path / "one", "one", 10, each)))
    check_method(fake_code(each))
    assert len(visualize.draw_run(make_run(tmp_path / "two", "two", 2, each))) == 3


@pytest.mark.parametrize("kind, epochs", [
    ("two", 1), ("two", 50), ("one", 4), ("one", 5), ("one", 12),
])
def test_search_figure(tmp_path, kind, epochs):
    run = visualize.read_run(make_run(tmp_path / "run", kind, epochs))
    assert run.one_stage == (kind == "one")
    assert run.end == (5 if kind == "one" and epochs >= 5 else None)
    figure = check_search(run)
    # The title counts the epochs that the axes have, which are those of the search.
    shown = min(epochs, 5) if kind == "one" else epochs
    assert f"; {shown} epochs of search" in figure.get_suptitle()
    assert {axes.get_xlim()[1] for axes in figure.axes} == {shown + 0.5}
    for axes in figure.axes[:2]:  # a stroke for each node that is frozen by then
        strokes = sorted(c.get_segments()[0][0][0] for c in axes.collections)
        assert strokes == [x + 0.5 for x in (2, 3, 4, 5) if kind == "one" and x <= shown]
    lines = {line.get_label(): line for line in figure.axes[2].lines}
    for name, frozen in (("normal 0", 2), ("reduction 3", 5)):  # distances until they freeze
        values = [value for value in lines[name].get_ydata() if value == value]
        until = min(epochs, frozen) if kind == "one" else epochs
        assert values == pytest.approx([0.5 / 4**epoch for epoch in range(1, until + 1)])


@pytest.mark.parametrize("low, high", [(0.021, 0.045), (0.004, 0.3), (1e-7, 0.5), (0.02, 0.02)])
def test_a_log_axis_has_readable_ticks(tmp_path, low, high):
    def change(rows):
        for row, value in zip(rows, (low, high), strict=True):
            row["distance"] = [value] * len(row["distance"])

    run = visualize.read_run(make_run(tmp_path / "run", epochs=2, change=change))
    figure = visualize.search_figure(run)
    check_plots(figure)
    axis = figure.axes[2].yaxis
    view = axis.get_view_interval()
    ticks = [tick for tick in axis.get_major_ticks() if view[0] <= tick.get_loc() <= view[1]]
    texts = [tick.label1.get_text().replace("−", "-") for tick in ticks]
    assert 2 <= len(texts) <= 10
    assert [float(text) for text in texts] == pytest.approx([tick.get_loc() for tick in ticks])


@pytest.mark.parametrize("kind, epochs", [("two", 1), ("two", 50), ("one", 12), ("train", 600)])
def test_curves_figure(tmp_path, kind, epochs):
    figure = visualize.curves_figure(visualize.read_run(make_run(tmp_path / "run", kind, epochs)))
    check_plots(figure)
    names = [axes.get_ylabel() for axes in figure.axes]
    assert ("drop-path probability" in names) == (kind != "two")
    lines = {line.get_label().split()[0]: line for line in figure.axes[1].lines}
    line = lines["validation" if kind == "two" else "test"]
    assert list(line.get_xdata()) == list(range(1, epochs + 1)) and line.get_ydata()[-1] == 90
    assert ("search" in lines) == (kind == "one")
    legend = {text.get_text().split()[0] for text in figure.legends[0].get_texts()}
    assert legend == {name for name in lines if name[0] != "_"}


@pytest.mark.parametrize("losses, scale", [
    ([2.4, *19 * [2.3026]], "linear"), ([2.30261, *19 * [2.3026]], "linear"),
    ([4.0, *19 * [0.3]], "linear"), ([1.0, 71.25, *17 * [0.5], 8e6], "log"),
])
def test_no_loss_is_cut_off(tmp_path, losses, scale):
    def change(rows):
        for row, loss in zip(rows, losses, strict=True):
            row["train_loss"] = row["valid_loss"] = loss

    run = visualize.read_run(make_run(tmp_path / "run", "two", 20, change=change))
    figure = visualize.curves_figure(run)
    check_plots(figure)
    (low, high), axes = figure.axes[0].get_ylim(), figure.axes[0]
    assert low < min(losses) and max(losses) < high and axes.get_yscale() == scale
    assert not axes.yaxis.get_offset_text().get_text()


def test_table_and_mean_over_seeds(tmp_path, script):
    for k in range(3):
        make_run(tmp_path / f"seed{k}", "train", 4, seed=k, accuracy=97 + k / 10, batch_size=96)
    make_run(tmp_path / "other", "train", 4, batch_size=64)
    make_run(tmp_path / "cut", "train", 4, batch_size=96, change=lambda rows: rows.pop())
    make_run(tmp_path / "search", "two", 4)
    genotypes.save(tmp_path / "other" / "genotype.json", genotypes.ISTA_twostage, False)
    names = ("seed0", "seed1", "seed2", "other", "cut", "search")
    runs = [visualize.read_run(name) for name in names]
    lines = visualize.table(runs).splitlines()
    assert len(lines) == 1 + 6 + 1
    assert "3.3167" in lines[1] and "525.0" in lines[1] and "ISTA_twostage" in lines[5]
    assert len(lines[1].split()[2]) == 7  # the hash of a genotype without a name
    assert lines[2].split()[-3:] == ["97.10", "97.10", "2.00"]
    assert "mean ± std of 3 runs" in lines[4] and lines[4].count("97.10 ± 0.10") == 2
    assert "3/4" in lines[6] and lines[7].startswith("search") and "validation" in lines[7]
    assert script(*names) == [*lines, "seed0/compare.png"]
    assert (tmp_path / "seed0/compare.png").exists() and not (tmp_path / "compare.png").exists()
    figure = visualize.compare_figure(runs)
    check_plots(figure)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["seed0 (mean of 3 runs)", "other", "cut", "search"]
    panels = {axes.get_ylabel(): axes.lines for axes in figure.axes}
    assert {name: len(lines) for name, lines in panels.items()} == {
        "test accuracy (%)": 4 + 1 + 1, "validation accuracy (%)": 1}
    [mean] = (line for line in panels["test accuracy (%)"] if "mean" in line.get_label())
    np.testing.assert_allclose(mean.get_ydata(), [94.1, 95.1, 96.1, 97.1])


def test_searches_are_grouped_by_setting_and_phase(tmp_path):
    kinds = [dict(seed=0), dict(seed=1), dict(seed=2, lam=1e-3), dict(kind="one", seed=3)]
    runs = [visualize.read_run(make_run(tmp_path / str(k), epochs=7, **kinds[k])) for k in range(4)]
    assert [len(group) for group in visualize.groups(runs)] == [2, 1, 1]
    going = visualize.read_run(make_run(tmp_path / "going", "one", 4))
    assert [visualize.progress(run) for run in (*runs[2:], going)] == [(7, 7), (7, 7), (4, "?")]

    def thaw(rows):  # as after --max_search_epochs
        rows[4]["frozen"][0] = False

    assert visualize.read_run(make_run(tmp_path / "long", "one", 7, change=thaw)).end == 5


def test_short_names_and_labels(tmp_path, script):
    for k, folder in enumerate(("a", "b")):
        make_run(tmp_path / folder / "train", "train", 2, batch_size=k)
    assert visualize.short_names(["a/train", "c/", "x/y/b"]) == ["train", "c", "b"]
    paths = ("a/train", "b/train")
    assert [line.split()[0] for line in script(*paths)[1:3]] == ["a/train", "b/train"]
    script(*paths, "-o", "both.svg", "--labels", "ours", "random cells")
    shown = (tmp_path / "both.svg").read_text()
    assert "<!-- ours -->" in shown and "<!-- random cells -->" in shown and "train" not in shown
    script("a/train", "-o", "curves.svg")
    assert "<!-- train: test" in (tmp_path / "curves.svg").read_text()
    script("a/train", "-o", "curves.svg", "--labels", "ours")
    assert "<!-- ours: test" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("kind", ["two", "one", "train"])
def test_a_running_run_can_be_drawn(tmp_path, kind):
    path = make_run(tmp_path / "run", kind, 4)
    for name in ("metrics.jsonl", "genotypes.jsonl")[: 1 if kind == "train" else 2]:
        with open(os.path.join(path, name), "r+") as file:
            file.truncate(len(file.read()) - 30)  # half of the last line is not there yet
    run = visualize.read_run(path)
    assert [row["epoch"] for row in run.metrics] == [1, 2, 3]
    assert [choice.epoch for choice in run.history] == ([] if kind == "train" else [1, 2, 3])
    names = ["cells", "curves"] if kind == "train" else ["cells", "search", "curves"]
    paths = visualize.draw_run(path)
    assert paths == [os.path.join(path, f"{name}.png") for name in names]
    assert all(os.path.getsize(name) > 10_000 for name in paths)


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["two", "one"])
def test_rows_of_an_edited_script_can_be_drawn(tmp_path, kind, script):
    def change(rows):
        rows[3].update(train_loss=math.nan, train_accuracy=math.inf, learning_rate=-1e308)
        for row in rows[:2]:
            row.update(w=[1, [2]], penalty={"b": 1.0}, train_loss=[1, 2], frozen=None)
            for key in ("distance", "seconds", "test_accuracy"):
                row.pop(key, None)

    def bare(rows):
        rows[:] = [{"epoch": row["epoch"]} for row in rows]

    path = make_run(tmp_path / "run", kind, 6, change=change)
    make_run(tmp_path / "bare", kind, 6, change=bare, batch_size=1)
    loss = visualize.curves_figure(visualize.read_run(path)).axes[0]
    [line] = (line for line in loss.lines if line.get_label() == "training")
    assert list(line.get_xdata()) == [3, 5, 6]
    for run in (path, "bare"):
        assert len(visualize.draw_run(run)) == 3
    assert len(script(path, "bare")) == 1 + 2 + 1


def fake_code(each, scale=1.0):
    """What `method_figure` asks of a SparseCode, also of an edited search space."""
    n, nodes = len(genotypes.PRIMITIVES), range(genotypes.NODES)
    sizes, generator = [n * (j + 2) for j in nodes], torch.Generator().manual_seed(0)
    A = [torch.randn(7, size, generator=generator) for size in sizes]
    support = [[divmod(k, n) for k in torch.randperm(size)[:each].tolist()] for size in sizes]
    weights = scale * torch.linspace(-1, 1, sizes[-1]).view(-1, n)
    return SimpleNamespace(A=A, b=[a[:, 0] for a in A], z=[a[0] for a in A], support=support,
                           weights=lambda: weights)


def check_method(code):
    figure = method_figure.method_figure(code)
    check_texts(figure)
    page, point, dictionary, _, sparse, cell = figure.axes
    assert [bar.get_width() for bar in point.patches] == code.b[0].tolist()
    image, A = dictionary.images[0], code.A[0].numpy()
    np.testing.assert_array_equal(image.get_array(), A)
    for x in (A.min(), 0, A.max()):  # below 0 red, above blue
        red, _, blue, _ = image.cmap(image.norm(x))
        assert abs(red - blue) < 0.02 if x == 0 else (blue - red) * x > 0
    heads = {x: y for line in sparse.lines for x, y in [line.get_xydata()[-1]]
             if line.get_marker() == "o"}
    assert [heads[k] for k in range(len(heads))] == code.z[0].tolist()
    # The pairs that are kept: bold below z, listed with their weights, filled in the cell.
    kept = [edge * len(genotypes.PRIMITIVES) + op for edge, op in code.support[0]]
    bold = [k for k, text in enumerate(sparse.get_xticklabels()) if text.get_weight() == "bold"]
    assert bold == sorted(kept)
    texts = [text.get_text().replace("−", "-") for text in page.texts]
    weights = [float(text.split("= ")[1]) for text in texts if "$w$ = " in text]
    assert weights == pytest.approx(code.weights().flatten()[kept].tolist(), rel=5e-3)
    filled = {patch.get_gid() for patch in cell.patches if patch.get_gid().startswith("label")
              and to_hex(patch.get_facecolor()) != "#ffffff"}
    assert filled == {f"label {k}" for k in range(len(kept))}


def test_method_figure():
    for seed, setting in enumerate([{}, dict(sparseness=1), dict(proj_dims=5, sparseness=4)]):
        torch.manual_seed(seed)
        code = SparseCode(**setting)
        code.recover()
        check_method(code)
    check_method(fake_code(2, scale=1e-4))  # small weights are not "−0.00"
    assert [method_figure.number(x) for x in (-0.0, -3e-7, 1.234)] == ["0", "−3e−07", "1.23"]


def test_method_of_a_run_is_that_of_its_checkpoint(tmp_path):
    torch.manual_seed(1)
    code = SparseCode(5, 3, 1e-4)
    for b in code.b:
        b.data *= 100
    code.recover()
    net = {f"normal_code.{key}": value for key, value in code.state_dict().items()}
    args = dict(proj_dims=5, sparseness=3, lam=1e-4)
    torch.save({"net": {**net, "stem.0.weight": torch.ones(1)}, "args": args},
               tmp_path / "checkpoint.pt")
    found = method_figure.code_of(tmp_path)
    assert found.support == code.support and found.lam == 1e-4
    torch.testing.assert_close(found.state_dict(), code.state_dict())
    torch.testing.assert_close(found.weights(), code.weights())
    done = subprocess.run([sys.executable, ROOT / "tools" / "method_figure.py", "."], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout == "./method.png\n", done.stderr
    assert (tmp_path / "method.png").stat().st_size > 10_000


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs main in the temporary folder; gives the lines that it prints."""
    monkeypatch.chdir(tmp_path)

    def run_main(*argv):
        visualize.main(visualize.get_args_parser().parse_args([*argv]))
        return capsys.readouterr().out.splitlines()

    return run_main


def test_pictures_go_where_the_output_says(tmp_path, script):
    run = make_run(tmp_path / "run", "two", 2)
    assert script("random:3", "--stacked") == ["random-3.png"]
    genotypes.save(tmp_path / "mine.json", genotypes.ISTA_twostage, False)
    assert script("mine.json") == ["mine.png"]
    assert script(f"g = {genotypes.ISTA_twostage}", "-o", "a.svg") == ["a.svg"]
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    # One picture of a run, by its name; all of them, in a folder that need not be there.
    drawn = set()
    for name in ("search", "curves", "fig2-cells"):
        assert script(run, "-o", f"{name}.pdf") == [f"{name}.pdf"]
        drawn.add((tmp_path / f"{name}.pdf").read_bytes())
    assert len(drawn) == 3 and all(content.startswith(b"%PDF") for content in drawn)
    names = ("cells", "search", "curves")
    assert script(run, "-o", "new") == [f"new/{name}.png" for name in names]
    assert script(run, run, "-o", "new")[-1] == "new/compare.png"
    assert sorted(os.listdir("new")) == sorted(f"{name}.png" for name in (*names, "compare"))
    assert not [name for name in os.listdir(run) if name.endswith(".png")]


@pytest.mark.parametrize("argv, message", [
    ([], "give a genotype"),
    (["runs/TYPO"], "unknown genotype 'runs/TYPO'"),
    (["empty"], "empty is not a run folder"),
    (["begun"], "begun: no epoch has ended yet"),
    (["done", "-o", "figure.pdf"], "is to end in cells or search or curves"),
    (["done", "-o", "curves.jpg"], "ends in .png, .svg, .pdf"),
    (["done", "done", "--labels", "one"], "1 names for 2"),
    (["ISTA_twostage", "-o", "good.json"], "ends in .png, .svg, .pdf"),
    (["ISTA_twostage", "-o", "no/such/cells.png"], "No such file or directory"),
    (["other"], "other: "),
])
def test_what_cannot_be_drawn_is_said(tmp_path, script, argv, message):
    for name in ("empty", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    for name in ("done", "other"):
        make_run(tmp_path / name, "two", 2)
    choices = tmp_path / "other" / "genotypes.jsonl"  # of a search space that was edited since
    choices.write_text(choices.read_text().replace("conv", "my"))
    genotypes.save(tmp_path / "good.json", genotypes.ISTA_twostage, False)
    good = (tmp_path / "good.json").read_bytes()
    with pytest.raises(UserError, match=re.escape(message)):
        script(*argv)
    assert (tmp_path / "good.json").read_bytes() == good


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "visualize.py", "runs/A", "runs/B"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("visualize.py: error: runs/A is not a run folder.*\n", done.stderr)
