"""Pictures: nothing overlaps in a cell, they show what the files say; errors are one line."""

import itertools
import json
import os
import random
import subprocess
import sys

import pytest

import genotypes
import visualize

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.path import Path  # noqa: E402
from matplotlib.text import Text  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NODES = range(2, 6)


def random_genotype(seed, each):
    """A genotype of `each` distinct pairs a node, not all of whose nodes are concatenated."""
    rng = random.Random(seed)

    def cell():
        edges = [[(op, s) for s in range(node) for op in genotypes.PRIMITIVES] for node in NODES]
        return [pair for pairs in edges for pair in rng.sample(pairs, each)]

    concat = sorted(rng.sample(NODES, rng.randint(1, 4)))
    return genotypes.Genotype(cell(), concat, cell(), range(2, 6))


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
            name, colour, *_ = visualize.OPERATIONS[operation]
            assert labels[f"text of label {k}"] == name and operation.startswith(name[:3])
            assert to_hex(edges[f"edge {k}"].get_edgecolor()).upper() == colour
        for gid, edge in edges.items():
            k = int(gid[5:])
            ends = (pairs[k][1], 2 + k * 4 // len(pairs)) if k < len(pairs) else (
                concat[k - len(pairs)], 6)
            path = edge.get_path().transformed(edge.get_transform())
            points = Path(path.to_polygons(closed_only=False)[0]).interpolated(20).vertices
            for other in boxes.keys() - {f"node {end}" for end in ends} - {f"label {k}"}:
                box = boxes[other]
                inside = [(x, y) for x, y in points if box.x0 < x < box.x1 and box.y0 < y < box.y1]
                assert not inside, (gid, other)


@pytest.mark.parametrize("stacked", [False, True])
def test_nothing_overlaps_in_a_cell(stacked):
    cells = [genotype for genotype, _ in genotypes.NAMED.values()]
    cells += [random_genotype(seed, each) for each in range(1, 5) for seed in range(3)]
    for genotype in cells:
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
    colour = [visualize.OPERATIONS[g.normal[7][0]][1] for g in (before, changed)]
    assert filled == [{7: colour[0]}, {}, {7: colour[1]}, {}]
    check_texts(figure)


def make_run(path, kind="two", epochs=8, weights=True, seed=0, accuracy=90.0, **config):
    """A run folder; a one-stage search freezes node k in epoch 2 + k // 2, the last one in 5."""
    path.mkdir()
    one = kind == "one"
    config |= dict(seed=seed, epochs=epochs - 5 * one, one_stage=one, freeze_tol=1e-3)
    (path / "config.json").write_text(json.dumps(config))
    held_out, rows, choices = "valid" if kind == "two" else "test", [], []
    for epoch in range(1, epochs + 1):
        row = dict(epoch=epoch, learning_rate=0.1 / epoch, drop_path_prob=0.02 * (kind != "two"))
        for part in ("train", held_out):
            row |= {f"{part}_loss": 3 / epoch, f"{part}_accuracy": accuracy - epochs + epoch}
        if kind == "two" or (one and epoch <= 5):
            row["frozen"] = [one and epoch >= 2 + k // 2 for k in range(8)]
            row["distance"] = [0.5 / 4**epoch * (not one or epoch <= 2 + k // 2) for k in range(8)]
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


@pytest.mark.parametrize("kind, epochs", [("two", 1), ("two", 50), ("one", 4), ("one", 12)])
def test_search_figure(tmp_path, kind, epochs):
    run = visualize.read_run(make_run(tmp_path / "run", kind, epochs, weights=epochs != 4))
    assert run.search and run.one_stage == (kind == "one") and len(run.history) == epochs
    assert run.end == (5 if epochs == 12 else None)
    figure = visualize.search_figure(run)
    assert len(figure.axes) == (5 if epochs != 4 else 3)
    check_texts(figure)
    # Dashed lines at the end of the search, and a stroke for each node that is frozen by then.
    strokes = [[c.get_segments()[0][0][0] for c in axes.collections] for axes in figure.axes[:2]]
    last = (min(epochs, 5) if kind == "one" else 0) + 0.5
    assert sorted(strokes[0]) == [x for x in (2.5, 2.5, 3.5, 3.5) if x <= last]
    assert sorted(strokes[1]) == [x for x in (4.5, 4.5, 5.5, 5.5) if x <= last]
    lines = {line.get_label(): line for line in figure.axes[2].lines}
    assert ("search ends" in lines) == (epochs == 12)
    for name, shown in (("normal 0", 2), ("reduction 3", 5)):  # the distances until they freeze
        values = [value for value in lines[name].get_ydata() if value == value]
        shown = min(epochs, shown) if kind == "one" else epochs
        assert values == pytest.approx([0.5 / 4**epoch for epoch in range(1, shown + 1)])


def test_bars_show_the_pairs(tmp_path):
    run = visualize.read_run(make_run(tmp_path / "run", epochs=9))
    figure = visualize.search_figure(run)
    for axes, cell in zip(figure.axes, ("normal", "reduce"), strict=False):
        lanes = [tick.get_text() for tick in axes.get_yticklabels()]
        assert lanes == [f"{('k−2', 'k−1', 0, 1, 2)[s]} → {n - 2}" for n in NODES for s in range(n)]
        for choice in run.history:
            here = [p for p in axes.patches if p.get_x() < choice.epoch < p.get_x() + p.get_width()
                    and to_hex(p.get_facecolor()) != "#f0f0f0"]
            here.sort(key=lambda p: p.get_y())
            pairs = getattr(choice.genotype, cell)
            expected = [
                visualize.OPERATIONS[op][1]
                for node in range(4)
                for op, _ in sorted(pairs[2 * node : 2 * node + 2], key=lambda pair: pair[1])
            ]
            assert [to_hex(p.get_facecolor()).upper() for p in here] == expected


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


def test_table_and_mean_over_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    assert script(*names, cwd=tmp_path) == [*lines, "compare.png"]
    figure = visualize.compare_figure(runs)
    check_texts(figure)
    assert len(figure.legends[0].get_texts()) == 4 and len(figure.axes[0].lines) == 6


def script(*argv, cwd, code=0):
    command = [sys.executable, os.path.join(ROOT, "visualize.py"), *map(str, argv)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    if code:
        assert result.stdout == ""
        assert result.stderr.startswith("visualize.py: error: ") and result.stderr.count("\n") == 1
        return result.stderr
    assert result.stderr == ""
    return result.stdout.split("\n")[:-1]


def test_import_is_light():
    code = "import sys, visualize; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_script_draws_genotypes(tmp_path):
    run = make_run(tmp_path / "run", "train", 1)
    assert script("random:3", "--stacked", cwd=tmp_path) == ["random-3.png"]
    assert script(f"{run}/genotype.json", cwd=tmp_path) == [f"{run}/cells.png"]
    for name, magic in (("a.svg", b"<?xml"), ("b.pdf", b"%PDF")):
        assert script(f"g = {genotypes.ISTA_twostage}", "-o", name, cwd=tmp_path) == [name]
        assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "required"),
        (["nothing"], "unknown genotype"),
        (["empty"], "not a run folder"),
        (["begun", "missing"], "begun: no epoch has ended yet"),
        (["ISTA_twostage", "-o", "good.json"], "ends in .png, .svg, .pdf"),
        (["ISTA_twostage", "-o", "no/such/cells.png"], "No such file or directory"),
        (["broken", "broken"], "no row holds a genotype"),
    ],
)
def test_errors_are_one_line(tmp_path, argv, message):
    for name in ("empty", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    make_run(tmp_path / "broken", "two", 2)
    (tmp_path / "broken" / "genotypes.jsonl").write_text('{"epoch": 1, "normal": []}\n')
    genotypes.save(tmp_path / "good.json", genotypes.ISTA_twostage, False)
    good = (tmp_path / "good.json").read_bytes()
    assert message in script(*argv, cwd=tmp_path, code=2)
    assert (tmp_path / "good.json").read_bytes() == good
