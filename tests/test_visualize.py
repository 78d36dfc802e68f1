"""Pictures: nothing overlaps in a cell, they show what the files say; errors are one line."""

import itertools
import json
import os
import random
import re

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.path import Path
from matplotlib.text import Text
from scripts import TWO_STAGE, run

import cells
import explain
import genotypes
import visualize
from genotypes import NODES
from model_search import SparseCode
from utils import UserError


def random_genotype(seed, each):
    """A genotype of `each` distinct pairs a node, not all of whose nodes are concatenated."""
    rng = random.Random(seed)

    def cell():
        nodes = range(2, 2 + NODES)
        edges = [[(op, s) for s in range(node) for op in genotypes.PRIMITIVES] for node in nodes]
        return [pair for pairs in edges for pair in rng.sample(pairs, each)]

    concat = sorted(rng.sample(range(2, 2 + NODES), rng.randint(1, NODES)))
    return genotypes.Genotype(cell(), concat, cell(), range(2, 2 + NODES))


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


def check_cells(figure, genotype):
    """Labels and nodes are apart, their texts inside them, and no edge runs over one of them."""
    check_texts(figure)
    renderer = figure.canvas.get_renderer()
    for axes, cell in zip(figure.axes, ("normal", "reduce"), strict=True):
        pairs, concat = getattr(genotype, cell), list(getattr(genotype, f"{cell}_concat"))
        gids = {patch.get_gid(): patch for patch in axes.patches}  # of an edge the upper one
        boxes = {gid: patch.get_window_extent(renderer) for gid, patch in gids.items()}
        edges = {gid: boxes.pop(gid) and gids[gid] for gid in gids if gid.startswith("edge")}
        assert len(edges) == len(pairs) + len(concat) and len(boxes) == len(pairs) + 7
        for a, b in itertools.combinations(boxes, 2):
            assert not overlap(boxes[a], boxes[b]), (a, b)
        for text in axes.texts[1:]:
            box, around = text.get_window_extent(renderer), boxes[text.get_gid()[8:]]
            assert around.x0 <= box.x0 and box.x1 <= around.x1 and around.y0 <= box.y0, text
        labels = {text.get_gid(): text.get_text().replace("\n", " ") for text in axes.texts}
        for k, (operation, _) in enumerate(pairs):
            name, colour, *_ = cells.OPERATIONS[operation]
            assert labels[f"text of label {k}"] == name and operation.startswith(name[:3])
            assert to_hex(edges[f"edge {k}"].get_edgecolor()).upper() == colour
        for gid, edge in edges.items():
            k = int(gid[5:])
            ends = (pairs[k][1], 2 + k * NODES // len(pairs)) if k < len(pairs) else (
                concat[k - len(pairs)], cells.OUTPUT)
            path = edge.get_path().transformed(edge.get_transform())
            points = Path(path.to_polygons(closed_only=False)[0]).interpolated(20).vertices
            for other in boxes.keys() - {f"node {end}" for end in ends} - {f"label {k}"}:
                box = boxes[other]
                inside = [(x, y) for x, y in points if box.x0 < x < box.x1 and box.y0 < y < box.y1]
                assert not inside, (gid, other)


@pytest.mark.parametrize("stacked", [False, True])
def test_nothing_overlaps_in_a_cell(stacked):
    drawn = [genotype for genotype, _ in genotypes.NAMED.values()]
    drawn += [random_genotype(seed, each) for each in range(1, 5) for seed in range(3)]
    for genotype in drawn:
        figure = visualize.cells_figure(genotype, "title", stacked=stacked)
        assert figure.get_figwidth() == (3.35 if stacked else 6.9)
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
    colour = [cells.OPERATIONS[g.normal[7][0]][1] for g in (before, changed)]
    assert filled == [{7: colour[0]}, {}, {7: colour[1]}, {}]
    check_texts(figure)


def make_run(path, kind="two", epochs=8, weights=True, seed=0, accuracy=90.0, **config):
    """A run folder; a one-stage search freezes node k in epoch 2 + k // 2, the last one in 5.

    "old": a one-stage search whose rows do not say in which phase they are.
    """
    path.mkdir()
    one = kind in ("one", "old")
    config |= dict(seed=seed, epochs=epochs - 5 * one, one_stage=one, freeze_tol=1e-3)
    (path / "config.json").write_text(json.dumps(config))
    held_out, rows, choices = "valid" if kind == "two" else "test", [], []
    for epoch in range(1, epochs + 1):
        row = dict(epoch=epoch, learning_rate=0.1 / epoch, drop_path_prob=0.02 * (kind != "two"))
        for part in ("train", held_out):
            row |= {f"{part}_loss": 3 / epoch, f"{part}_accuracy": accuracy - epochs + epoch}
        if kind in ("two", "one") or (kind == "old" and epoch <= 5):
            row["frozen"] = [one and epoch >= 2 + k // 2 for k in range(2 * NODES)]
            row["distance"] = [0.5 / 4**epoch * (not one or epoch <= 2 + k // 2)
                               for k in range(2 * NODES)]
        if kind == "one":
            row["phase"] = "search" if epoch <= 5 else "train"
        if kind == "train":
            row.update(parameters=3_316_726, multiply_adds=524_996_736)
        rows.append({**row, "seconds": 1800.0})
        choice = genotypes.as_lists(genotypes.draw(min(epoch, 4) + 10 * seed))
        if weights:
            choice |= {f"{cell}_weights": [1 / epoch] * 8 for cell in ("normal", "reduce")}
        choices.append({"epoch": epoch, **choice})
    files = {"metrics.jsonl": rows, "genotypes.jsonl": choices}
    if kind == "train":
        del files["genotypes.jsonl"]
        genotypes.save(path / "genotype.json", genotypes.ISTA_twostage, False)
    for name, lines in files.items():
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("kind, epochs", [
    ("two", 1), ("two", 50), ("one", 4), ("one", 5), ("one", 12), ("old", 12),
])
def test_search_figure(tmp_path, kind, epochs):
    run = visualize.read_run(make_run(tmp_path / "run", kind, epochs, weights=epochs != 4))
    kind = "one" if kind == "old" else kind
    assert run.search and run.one_stage == (kind == "one") and len(run.history) == epochs
    assert run.end == (5 if kind == "one" and epochs >= 5 else None)
    figure = visualize.search_figure(run)
    assert len(figure.axes) == 3 + 2 * NODES * (epochs != 4)
    check_texts(figure)
    # The title counts the epochs that the axes have, which are those of the search.
    shown = min(epochs, 5) if kind == "one" else epochs
    assert f"; {shown} epochs of search" in figure.get_suptitle()
    assert {axes.get_xlim()[1] for axes in figure.axes} == {shown + 0.5}
    # A stroke for each node that is frozen by then.
    strokes = [[c.get_segments()[0][0][0] for c in axes.collections] for axes in figure.axes[:2]]
    last = (min(epochs, 5) if kind == "one" else 0) + 0.5
    assert sorted(strokes[0]) == [x for x in (2.5, 2.5, 3.5, 3.5) if x <= last]
    assert sorted(strokes[1]) == [x for x in (4.5, 4.5, 5.5, 5.5) if x <= last]
    lines = {line.get_label(): line for line in figure.axes[2].lines}
    for name, shown in (("normal 0", 2), ("reduction 3", 5)):  # the distances until they freeze
        values = [value for value in lines[name].get_ydata() if value == value]
        shown = min(epochs, shown) if kind == "one" else epochs
        assert values == pytest.approx([0.5 / 4**epoch for epoch in range(1, shown + 1)])


def test_bars_show_the_pairs(tmp_path):
    run = visualize.read_run(make_run(tmp_path / "run", epochs=9))
    figure = visualize.search_figure(run)
    inputs = ("k−2", "k−1", 0, 1, 2)
    for axes, cell in zip(figure.axes, ("normal", "reduce"), strict=False):
        lanes = [tick.get_text() for tick in axes.get_yticklabels()]
        assert lanes == [f"{inputs[s]} → {j}" for j in range(NODES) for s in range(j + 2)]
        for choice in run.history:
            here = [p for p in axes.patches if p.get_x() < choice.epoch < p.get_x() + p.get_width()
                    and to_hex(p.get_facecolor()) != "#f0f0f0"]
            here.sort(key=lambda p: p.get_y())
            pairs = getattr(choice.genotype, cell)
            expected = [
                cells.OPERATIONS[op][1]
                for node in range(NODES)
                for op, _ in sorted(pairs[2 * node : 2 * node + 2], key=lambda pair: pair[1])
            ]
            assert [to_hex(p.get_facecolor()).upper() for p in here] == expected


DAMAGE = [
    dict(epoch=1e400), dict(epoch="2"), dict(epoch=10**12), dict(distance=5), dict(distance=[1, 2]),
    dict(frozen="abc"), dict(frozen=[None] * 8), dict(parameters="x"), dict(seconds=[1]),
]


def test_damaged_rows_and_numbers_out_of_range_are_left_out(tmp_path, script):
    path, whole = make_run(tmp_path / "run"), make_run(tmp_path / "whole", epochs=7)
    with open(f"{path}/metrics.jsonl") as file:
        *rows, last = map(json.loads, file)
    rows[3].update(valid_accuracy=1e308, train_loss=-1e308)
    damaged = [{**last, **damage} for damage in DAMAGE]
    with open(f"{path}/metrics.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows + damaged)
    with open(f"{path}/genotypes.jsonl", "a") as file:
        file.write(json.dumps({**genotypes.as_lists(genotypes.draw(0)), "epoch": 8,
                               "normal_weights": "abcdefgh"}) + "\n")
    with open(f"{path}/config.json", "w") as file:
        json.dump(dict(epochs="many", one_stage="x", freeze_tol="a"), file)
    run = visualize.read_run(path)
    assert [row["epoch"] for row in run.metrics] == [*range(1, 8)] and run.config == {}
    assert len(script(path)) == 3 and len(script(path, whole, "-o", "both.png")) == 4
    check_texts(visualize.curves_figure(run))


def test_a_name_is_no_formula(tmp_path, script):
    names = "$x_{$", "$\\alpha$"
    for k, name in enumerate(names):
        make_run(tmp_path / name, batch_size=k)
    script(*names, "-o", "compare.svg")
    shown = (tmp_path / "compare.svg").read_text()
    assert all(f"<!-- {name} -->" in shown for name in names)
    assert len(script(names[0])) == 3
    genotypes.save(tmp_path / "$x_{$.json", genotypes.ISTA_twostage, False)
    assert script("$x_{$.json") == ["$x_{$.png"]


def genotype_of(cell):
    return genotypes.Genotype(cell, range(2, 6), cell, range(2, 6))


def test_operations_on_one_edge_have_labels_and_weights_panels(tmp_path):
    """Also with four pairs a node, all of them on one edge."""
    operations = genotypes.PRIMITIVES[:4]
    genotype = genotype_of([(op, source) for source in (0, 1, 0, 2) for op in operations])
    path = make_run(tmp_path / "run", epochs=3)
    with open(os.path.join(path, "genotypes.jsonl"), "w") as file:
        for epoch in range(1, 4):
            weights = {f"{c}_weights": np.linspace(-1, epoch, 16).tolist() for c in cells.CELLS}
            row = {"epoch": epoch, **genotypes.as_lists(genotype), **weights}
            file.write(json.dumps(row) + "\n")
    figure = visualize.search_figure(visualize.read_run(path))
    check_texts(figure)
    for axes in figure.axes[:2]:
        labels = [text.get_text() for text in axes.texts if text.get_gid() == "bar"]
        assert labels == [cells.OPERATIONS[op][0] for _ in range(NODES) for op in operations]
    for k, axes in enumerate(figure.axes[3:]):  # a panel for each node, a line for each pair
        assert axes.get_title(loc="left").endswith(f"node {k % NODES}")
        lines = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 3]
        node = slice(4 * (k % NODES), 4 * (k % NODES) + 4)
        expected = np.stack([np.linspace(-1, epoch, 16)[node] for epoch in range(1, 4)], 1)
        np.testing.assert_allclose(lines, expected)


@pytest.mark.parametrize("kind, epochs", [("two", 1), ("two", 50), ("one", 12), ("train", 600)])
def test_curves_figure(tmp_path, kind, epochs):
    run = visualize.read_run(make_run(tmp_path / "run", kind, epochs))
    figure = visualize.curves_figure(run)
    check_texts(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert ("drop-path prob." in titles) == (kind != "two")
    lines = {line.get_label().split()[0]: line for line in figure.axes[1].lines}
    line = lines["validation" if kind == "two" else "test"]
    assert list(line.get_xdata()) == list(range(1, epochs + 1)) and line.get_ydata()[-1] == 90
    assert ("search" in lines) == (kind == "one")
    assert max(figure.axes[0].get_ylim()) > 3  # the first loss is no outlier


@pytest.mark.parametrize("kind", ["two", "one"])
def test_outliers_of_a_loss_are_marked_and_do_not_flatten_the_rest(tmp_path, kind):
    path = make_run(tmp_path / "run", kind, 20)
    rows = [json.loads(line) for line in open(os.path.join(path, "metrics.jsonl"))]
    rows[1]["train_loss"], rows[16]["train_loss"] = 71.25, 8e6
    with open(os.path.join(path, "metrics.jsonl"), "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    figure = visualize.curves_figure(visualize.read_run(path))
    check_texts(figure)
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low < 3 / 20 and 3 < high < 5
    marks = {line.get_xdata()[0] for line in axes.lines if line.get_gid() == "outlier"}
    assert marks == {2, 17}
    assert [text.get_text().strip() for text in axes.texts] == ["8e+06", "71.2"]


@pytest.mark.parametrize("kind", ["two", "one", "train"])
def test_a_running_or_cut_run_can_be_drawn(tmp_path, kind):
    path = make_run(tmp_path / "run", kind, 4)
    for name in ("metrics.jsonl", "genotypes.jsonl")[: 1 if kind == "train" else 2]:
        with open(os.path.join(path, name), "r+") as file:
            file.truncate(len(file.read()) - 30)
    os.remove(os.path.join(path, "config.json"))
    run = visualize.read_run(path)
    assert [row["epoch"] for row in run.metrics] == [1, 2, 3]
    assert [choice.epoch for choice in run.history] == ([] if kind == "train" else [1, 2, 3])
    paths = visualize.draw_run(path)
    names = ["cells", "curves"] if kind == "train" else ["cells", "search", "curves"]
    assert paths == [os.path.join(path, f"{name}.png") for name in names]
    assert all(os.path.getsize(name) > 10_000 for name in paths)


def test_rows_without_distances_and_nan_losses(tmp_path):
    path = make_run(tmp_path / "run", "two", 6)
    file = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[:2]:  # as with --recover_every and few steps
        del row["distance"], row["frozen"]
    rows[3]["train_loss"] = float("nan")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "garbage\n[1]\n")
    assert len(visualize.draw_run(path)) == 3
    os.remove(tmp_path / "run" / "genotypes.jsonl")
    assert [os.path.basename(p) for p in visualize.draw_run(path)] == ["search.png", "curves.png"]


def test_table_and_mean_over_seeds(tmp_path, script):
    for k in range(3):
        make_run(tmp_path / f"seed{k}", "train", 4, seed=k, accuracy=97 + k / 10, batch_size=96)
    make_run(tmp_path / "other", "train", 4, seed=3, batch_size=64)
    make_run(tmp_path / "unfinished", "train", 4, seed=4, batch_size=96)
    metrics = tmp_path / "unfinished" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:2]))
    make_run(tmp_path / "search", "two", 4)
    names = ("seed0", "seed1", "seed2", "other", "unfinished", "search")
    runs = [visualize.read_run(name) for name in names]
    lines = visualize.table(runs).splitlines()
    assert len(lines) == 1 + 6 + 1
    assert "ISTA_twostage" in lines[1] and "3.3167" in lines[1] and "525.0" in lines[1]
    assert lines[2].split()[-3:] == ["97.10", "97.10", "2.00"]
    assert "mean ± std of 3 seeds" in lines[4] and lines[4].count("97.10 ± 0.10") == 2
    assert "2/4" in lines[6] and lines[7].startswith("search") and "validation" in lines[7]
    assert len(lines[7].split()[2]) == 7  # the hash of a genotype without a name
    assert script(*names) == [*lines, "seed0/compare.png"]
    assert (tmp_path / "seed0/compare.png").exists() and not (tmp_path / "compare.png").exists()
    assert script(*names, "-o", "here.png")[-1] == "here.png"
    figure = visualize.compare_figure(runs)
    check_texts(figure)
    assert len(figure.legends[0].get_texts()) == 4
    panels = {axes.get_title(loc="left"): len(axes.lines) for axes in figure.axes}
    assert panels == {"test accuracy (%)": 5, "validation accuracy (%)": 1}


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs main in the temporary folder; gives the lines that it prints."""
    monkeypatch.chdir(tmp_path)

    def run_main(*argv):
        visualize.main(visualize.get_args_parser().parse_args([str(arg) for arg in argv]))
        out, err = capsys.readouterr()
        assert err == ""
        return out.split("\n")[:-1]

    return run_main


def random_code(seed, **setting):
    torch.manual_seed(seed)
    code = SparseCode(**setting)
    code.recover()
    return code


@pytest.mark.parametrize("setting", [{}, dict(sparseness=1), dict(proj_dims=5, sparseness=4)])
def test_method_figure(setting):
    for seed in range(3):
        code = random_code(seed, **setting)
        figure = explain.method_figure(code)
        check_texts(figure)
        page, point, dictionary, sparse, cell = figure.axes
        assert [bar.get_width() for bar in point.patches] == code.b[0].tolist()
        np.testing.assert_array_equal(dictionary.images[0].get_array(), code.A[0].numpy())
        heads = {x: y for line in sparse.lines for x, y in [line.get_xydata()[-1]]
                 if line.get_marker() == "o"}
        assert [heads[k] for k in range(len(heads))] == code.z[0].tolist()
        # The pairs that are kept: bold below z, listed with their weights, filled in the cell.
        kept = [edge * len(genotypes.PRIMITIVES) + op for edge, op in code.support[0]]
        bold = [k for k, text in enumerate(sparse.get_xticklabels())
                if text.get_weight() == "bold"]
        assert bold == kept
        texts = [text.get_text() for text in page.texts]
        weights = [text.split("= ")[1].strip("$") for text in texts if "w = " in text]
        dense = code.weights().flatten().tolist()
        assert weights == [f"{dense[k]:.2f}" for k in kept]
        filled = {patch.get_gid() for patch in cell.patches if patch.get_gid().startswith("label")
                  and to_hex(patch.get_facecolor()) != "#ffffff"}
        assert filled == {f"label {k}" for k in range(len(kept))}


def test_method_of_a_run_is_that_of_its_checkpoint(tmp_path, script):
    flags = ["--proj_dims", 5, "--lam", 1e-4, "--distinct_edges", "--epochs", 1]
    run(*TWO_STAGE, *flags, "--save", "run", cwd=tmp_path)
    code = explain.code_of("run")
    genotype, _ = genotypes.load("run")
    pairs = [(genotypes.PRIMITIVES[op], edge) for node in code.support for edge, op in node]
    assert pairs == genotype.normal and len(code.b[0]) == 5
    state = torch.load("run/checkpoint.pt", weights_only=True)["net"]
    for name in ("A0", "b.0", "z0"):
        torch.testing.assert_close(code.state_dict()[name], state[f"normal_code.{name}"])
    [row] = (json.loads(line) for line in open("run/genotypes.jsonl"))
    weights = code.weights().flatten()
    assert weights[weights != 0].tolist() == pytest.approx(row["normal_weights"])
    assert script("--method", "run") == ["run/method.png"]
    assert script("--method") == ["method.png"]


def test_script_draws_genotypes(tmp_path, script):
    run = make_run(tmp_path / "run", "train", 1)
    assert script("random:3", "--stacked") == ["random-3.png"]
    assert script(f"{run}/genotype.json") == [f"{run}/cells.png"]
    for name, magic in (("a.svg", b"<?xml"), ("b.pdf", b"%PDF")):
        assert script(f"g = {genotypes.ISTA_twostage}", "-o", name) == [name]
        assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give a genotype"),
        (["runs/TYPO"], "runs/TYPO: there is no such run folder or file"),
        (["pipe"], "pipe: there is no such run folder or file"),  # to be read from
        (["runs/TYPO", "good.json"], "runs/TYPO: there is no such run folder"),
        (["random:x"], "expected random:SEED"),
        (["--method", "runs/TYPO"], "runs/TYPO/checkpoint.pt cannot be read"),
        (["--method", "broken", "empty"], "one run at most"),
        (["done", "-o", "no/such"], "give a folder"),
        (["empty"], "not a run folder"),
        (["begun", "missing"], "begun: no epoch has ended yet"),
        (["ISTA_twostage", "-o", "good.json"], "ends in .png, .svg, .pdf"),
        (["ISTA_twostage", "-o", "no/such/cells.png"], "No such file or directory"),
        (["broken", "broken"], "no row holds a genotype"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, script, argv, message):
    for name in ("empty", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    make_run(tmp_path / "broken", "two", 2)
    make_run(tmp_path / "done", "two", 2)
    (tmp_path / "broken" / "genotypes.jsonl").write_text('{"epoch": 1, "normal": []}\n')
    genotypes.save(tmp_path / "good.json", genotypes.ISTA_twostage, False)
    good = (tmp_path / "good.json").read_bytes()
    with pytest.raises(UserError, match=re.escape(message)):
        script(*argv)
    assert (tmp_path / "good.json").read_bytes() == good


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    error = run("visualize.py", "runs/TYPO", cwd=tmp_path, status=2)
    assert error.stdout == "" and error.stderr.count("\n") == 1
    assert error.stderr.startswith("visualize.py: error: runs/TYPO: there is no such run folder")
