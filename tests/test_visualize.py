"""Pictures show what the files of a run contain, also after edits; errors are one line."""

import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

import genotypes
import visualize
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent


def random_genotype(seed, each=2):
    """A genotype with `each` distinct pairs for each node, and any concatenated nodes."""
    rng, nodes = random.Random(seed), range(2, 2 + genotypes.NODES)

    def cell():
        edges = [[(op, s) for s in range(node) for op in genotypes.PRIMITIVES] for node in nodes]
        return [pair for pairs in edges for pair in rng.sample(pairs, each)]

    concat = sorted(rng.sample(nodes, rng.randint(1, genotypes.NODES)))
    return genotypes.Genotype(cell(), concat, cell(), nodes)


def make_run(path, kind="two", epochs=8, each=2, change=None):
    """Write a run folder; a one-stage search freezes a node of each cell in epochs 2, 3, ...

    `kind` is "one" or "two" for a search with so many stages, or "train". `change` edits the rows.
    """
    path.mkdir(parents=True)
    nodes, one_stage = genotypes.NODES, kind == "one"
    last = nodes + 1  # epoch of a one-stage search
    (path / "config.json").write_text(json.dumps({"freeze_tol": 1e-3, "one_stage": one_stage}))
    held_out, rows, choices = "valid" if kind == "two" else "test", [], []
    for epoch in range(1, epochs + 1):
        row = dict(epoch=epoch, learning_rate=0.1 / epoch, drop_path_prob=0.02 * (kind != "two"))
        for part in ("train", held_out):
            row |= {f"{part}_loss": 3 / epoch, f"{part}_accuracy": 90.0 - epochs + epoch}
        if kind != "train":
            row["phase"] = "searching" if one_stage and epoch <= last else "training"
            frozen_at = [2 + k % nodes if one_stage else math.inf for k in range(2 * nodes)]
            row["frozen"] = [epoch >= at for at in frozen_at]
            row["distance"] = [0.5 / 4**epoch * (epoch <= at) for at in frozen_at]
        rows.append(row)
        genotype = genotypes.as_lists(random_genotype(min(epoch, last), each))
        weights = np.linspace(-1, epoch, each * nodes).tolist()
        choices.append(dict(genotype, epoch=epoch, normal_weights=weights, reduce_weights=weights))
    if change:
        change(rows)
    files = {"metrics": rows, "genotypes": choices}
    if kind == "train":
        genotypes.save(path / "genotype.json", random_genotype(0, each), False)
        del files["genotypes"]
    for name, lines in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs main in the temporary folder and returns the lines that it prints."""
    monkeypatch.chdir(tmp_path)

    def run_main(*argv):
        visualize.main(visualize.get_args_parser().parse_args([*argv]))
        return capsys.readouterr().out.splitlines()

    return run_main


def check_cells(figure, genotype):
    """Labels and edges of both cells are those of the genotype."""
    for axes, cell in zip(figure.axes, ("normal", "reduce"), strict=True):
        pairs, concat = getattr(genotype, cell), getattr(genotype, f"{cell}_concat")
        labels = {text.get_gid(): text.get_text() for text in axes.texts}
        edges = {patch.get_gid(): patch for patch in axes.patches if patch.get_gid()}
        assert len(edges) == len(pairs) + len(concat)
        for k, (operation, _) in enumerate(pairs):
            assert labels[f"label {k}"][:3] == operation[:3]
            color = to_hex(edges[f"edge {k}"].get_edgecolor())
            assert color.upper() == visualize.look(operation).color


def check_search(figure, run):
    """The lanes show the pairs of every epoch, and the panels the weights of every node."""
    nodes = genotypes.NODES
    for axes, cell in zip(figure.axes, ("normal", "reduce"), strict=False):
        for choice in run.history:
            bars = [p for p in axes.patches if p.get_x() < choice.epoch < p.get_x() + p.get_width()
                    and to_hex(p.get_facecolor()) != "#f0f0f0"]
            bars.sort(key=lambda p: p.get_y())
            expected = [visualize.look(op).color
                        for pairs in genotypes.by_node(getattr(choice.genotype, cell))
                        for op, _ in sorted(pairs, key=lambda pair: pair[1])]
            assert [to_hex(p.get_facecolor()).upper() for p in bars] == expected
    for k, axes in enumerate(figure.axes[3:]):
        lines = [line.get_ydata() for line in axes.lines]
        drawn = sorted(y for ys in lines if len(ys) == len(run.history) for y in ys if y == y)
        weights = [choice.weights["normal" if k < nodes else "reduce"] for choice in run.history]
        assert drawn == sorted(w for ws in weights for w in genotypes.by_node(ws)[k % nodes])


def test_cells_figure():
    drawn = [genotype for genotype, _ in genotypes.NAMED.values()]
    for genotype in drawn + [random_genotype(seed, 1 + seed // 2) for seed in range(4)]:
        check_cells(visualize.cells_figure(genotype, "title"), genotype)


@pytest.mark.parametrize("kind, epochs", [("two", 1), ("two", 50), ("one", 4), ("one", 12)])
def test_search_figure(tmp_path, kind, epochs):
    run = visualize.read_run(make_run(tmp_path / "run", kind, epochs))
    assert run.end == (5 if kind == "one" and epochs >= 5 else None)
    figure = visualize.search_figure(run)
    check_search(figure, run)
    shown = min(epochs, 5) if kind == "one" else epochs  # the epochs of the search only
    assert f"; {shown} epochs of search" in figure.get_suptitle()
    assert {axes.get_xlim()[1] for axes in figure.axes} == {shown + 0.5}
    lines = {line.get_label(): line for line in figure.axes[2].lines}
    for name, frozen in (("normal 0", 2), ("reduction 3", 5)):  # distances until nodes freeze
        values = [value for value in lines[name].get_ydata() if value == value]
        until = min(epochs, frozen) if kind == "one" else epochs
        assert values == pytest.approx([0.5 / 4**epoch for epoch in range(1, until + 1)])


def test_a_search_that_ends_with_active_nodes(tmp_path):  # as with --max_search_epochs
    path = make_run(tmp_path / "run", "one", 7, change=lambda rows: rows[4].pop("frozen"))
    assert visualize.read_run(path).end == 5


@pytest.mark.parametrize("kind, epochs", [("two", 1), ("one", 12), ("train", 600)])
def test_curves_figure(tmp_path, kind, epochs):
    figure = visualize.curves_figure(visualize.read_run(make_run(tmp_path / "run", kind, epochs)))
    names = [axes.get_ylabel() for axes in figure.axes]
    assert ("drop-path probability" in names) == (kind != "two")
    lines = {line.get_label().split()[0]: line for line in figure.axes[1].lines}
    line = lines["validation" if kind == "two" else "test"]
    assert list(line.get_xdata()) == list(range(1, epochs + 1)) and line.get_ydata()[-1] == 90
    assert ("search" in lines) == (kind == "one")
    assert "accuracy 90.00 %, best 90.00 %" in figure.get_suptitle()


@pytest.mark.crash
@pytest.mark.parametrize("nodes, each, primitives", [
    (3, 4, genotypes.PRIMITIVES[4:1:-1]),
    (6, 1, ["sep_conv_7x7", *genotypes.PRIMITIVES, "inverted_bottleneck_3x3", "conv_7x1_1x7"]),
])
def test_pictures_of_an_edited_search_space(tmp_path, monkeypatch, nodes, each, primitives):
    try:
        with monkeypatch.context() as patch:
            patch.setattr(genotypes, "NODES", nodes)
            patch.setattr(genotypes, "PRIMITIVES", primitives)
            importlib.reload(visualize)
            assert len({visualize.look(name).color for name in primitives}) == len(primitives)
            genotype = random_genotype(0, each)
            check_cells(visualize.cells_figure(genotype), genotype)
            run = visualize.read_run(make_run(tmp_path / "one", "one", 10, each))
            check_search(visualize.search_figure(run), run)
            assert len(visualize.draw_run(make_run(tmp_path / "two", "two", 2, each))) == 3
    finally:
        importlib.reload(visualize)


@pytest.mark.parametrize("kind", ["two", "train"])
def test_a_running_run_can_be_drawn(tmp_path, kind):
    path = make_run(tmp_path / "run", kind, 4)
    for file in Path(path).glob("*.jsonl"):
        file.write_text(file.read_text()[:-30])  # the last line is incomplete
    run = visualize.read_run(path)
    assert [row["epoch"] for row in run.metrics] == [1, 2, 3]
    assert [choice.epoch for choice in run.history] == ([] if kind == "train" else [1, 2, 3])
    names = ["cells", "curves"] if kind == "train" else ["cells", "search", "curves"]
    paths = visualize.draw_run(path)
    assert paths == [os.path.join(path, f"{name}.png") for name in names]
    assert all(os.path.getsize(name) > 10_000 for name in paths)


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["two", "one"])
def test_rows_of_an_edited_script_can_be_drawn(tmp_path, kind):
    def change(rows):
        rows[3].update(train_loss=math.nan, train_accuracy=math.inf, learning_rate=-1e308)
        for row in rows[:2]:
            row.update(w=[1, [2]], penalty={"b": 1.0}, train_loss=[1, 2], frozen=None)
            for key in ("distance", "test_accuracy"):
                row.pop(key, None)

    def remove_metrics(rows):
        rows[:] = [{"epoch": row["epoch"]} for row in rows]

    path = make_run(tmp_path / "run", kind, 6, change=change)
    loss = visualize.curves_figure(visualize.read_run(path)).axes[0]
    [line] = (line for line in loss.lines if line.get_label() == "training")
    assert list(line.get_xdata()) == [3, 5, 6]
    for run in (path, make_run(tmp_path / "bare", kind, 6, change=remove_metrics)):
        assert len(visualize.draw_run(run)) == 3


def test_output_paths_and_title(tmp_path, script):
    run = make_run(tmp_path / "run", "two", 2)
    assert script("random:3") == ["random-3.png"]
    genotypes.save(tmp_path / "mine.json", genotypes.ISTA_twostage, False)
    assert script("mine.json") == ["mine.png"]
    assert script(f"g = {genotypes.ISTA_twostage}", "-o", run) == [f"{run}/cells.png"]
    # One picture of a run, selected by its name, or all of them in a folder that may not exist.
    names = ("cells", "search", "curves")
    drawn = set()
    for name in names:
        assert script(run, "-o", f"fig2-{name}.pdf") == [f"fig2-{name}.pdf"]
        drawn.add((tmp_path / f"fig2-{name}.pdf").read_bytes())
    assert len(drawn) == 3 and all(content.startswith(b"%PDF") for content in drawn)
    assert script(run, "-o", "new") == [f"new/{name}.png" for name in names]
    for title, expected in (([], "run"), (["--title", "ours"], "ours")):
        script("run", "-o", "curves.svg", *title)
        assert f"<!-- {expected}: validation" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("argv, message", [
    (["runs/TYPO"], "no known genotype"),
    (["empty"], "empty is not a run folder"),
    (["begun"], "begun: no epoch has ended yet"),
    (["done", "-o", "figure.pdf"], "must end in cells.pdf or search.pdf"),
    (["done", "-o", "curves.jpg"], ".png, .svg, .pdf"),
    (["ISTA_twostage", "-o", "good.json"], ".png, .svg, .pdf"),
    (["ISTA_twostage", "-o", "no/such/cells.png"], "No such file or directory"),
    (["other"], "other: "),
])
def test_error_messages(tmp_path, script, argv, message):
    for name in ("empty", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    for name in ("done", "other"):
        make_run(tmp_path / name, "two", 2)
    choices = tmp_path / "other" / "genotypes.jsonl"  # of a search space that was edited since
    choices.write_text(choices.read_text().replace("conv", "my"))
    with pytest.raises(UserError, match=re.escape(message)):
        script(*argv)
    assert not (tmp_path / "good.json").exists()


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    (tmp_path / "A").mkdir()
    done = subprocess.run([sys.executable, ROOT / "visualize.py", "A"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("visualize.py: error: A is not a run folder.*\n", done.stderr)
