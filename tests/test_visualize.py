"""Pictures: nothing overlaps or is clipped, they show what the files say; errors are one line."""

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
from matplotlib.text import Text  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NODES = range(2, 6)


def random_genotype(seed, each):
    """A genotype of `each` distinct pairs a node, not all of whose nodes are concatenated."""
    rng = random.Random(seed)

    def cell():
        return [
            (op, source)
            for node in NODES
            for source, op in sorted(
                rng.sample([(s, op) for s in range(node) for op in genotypes.PRIMITIVES], each)
            )
        ]

    concat = sorted(rng.sample(NODES, rng.randint(1, 4)))
    return genotypes.Genotype(cell(), concat, cell(), range(2, 6))


SAME_EDGE = genotypes.load(
    "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_5x5', 1), ('skip_connect', 2), "
    "('sep_conv_3x3', 2), ('max_pool_3x3', 3), ('avg_pool_3x3', 3), ('dil_conv_3x3', 4), "
    "('dil_conv_5x5', 4)], normal_concat=[5], reduce=[('sep_conv_3x3', 0), ('sep_conv_5x5', 0), "
    "('skip_connect', 0), ('sep_conv_3x3', 0), ('max_pool_3x3', 0), ('avg_pool_3x3', 0), "
    "('dil_conv_3x3', 0), ('dil_conv_5x5', 0)], reduce_concat=range(2, 6))"
)[0]


# ------------------------------------------------------------------------------------------------
# What can be measured of a picture
# ------------------------------------------------------------------------------------------------


def drawn(figure):
    """The figure's renderer, after it was drawn once so that everything has its place."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def boxes(figure, renderer, prefix):
    """{(axes index, gid): extent in pixels} of the artists whose gid begins so."""
    return {
        (i, artist.get_gid()): artist.get_window_extent(renderer)
        for i, axes in enumerate(figure.axes)
        for artist in [*axes.texts, *axes.patches]
        if (artist.get_gid() or "").startswith(prefix)
    }


def overlap(a, b, slack=0.5):
    return (
        min(a.x1, b.x1) - max(a.x0, b.x0) > slack and min(a.y1, b.y1) - max(a.y0, b.y0) > slack
    )


def curves(axes):
    """{index: points in pixels, 1 pixel or less apart} of the edges of a cell."""
    found = {}
    for patch in axes.patches:
        if (patch.get_gid() or "").startswith("edge"):
            path = patch.get_path().transformed(patch.get_transform())
            points = path.interpolated(1).to_polygons(closed_only=False)[0]
            dense = []
            for (x, y), (u, v) in itertools.pairwise(points):
                n = int(max(abs(u - x), abs(v - y))) + 1
                dense += [(x + (u - x) * t / n, y + (v - y) * t / n) for t in range(n)]
            found[int(patch.get_gid().split()[1])] = [*dense, tuple(points[-1])]
    return found


def check_cells(figure, genotype):
    """Labels, nodes and edges of both cells are apart; all text is large enough and inside."""
    renderer = drawn(figure)
    labels = boxes(figure, renderer, "label")
    nodes, names = boxes(figure, renderer, "node"), boxes(figure, renderer, "name")
    assert len(labels) == len(genotype.normal) + len(genotype.reduce)
    assert len(nodes) == len(names) == 14
    for a, b in itertools.combinations({**labels, **nodes}.items(), 2):
        assert not overlap(a[1], b[1]), (a, b)
    for key, box in names.items():
        around = nodes[key[0], key[1].replace("name", "node")]
        assert around.x0 <= box.x0 and box.x1 <= around.x1, key
        assert around.y0 <= box.y0 and box.y1 <= around.y1, key
    for i, axes in enumerate(figure.axes):
        pairs = (genotype.normal, genotype.reduce)[i % 2]
        concat = list((genotype.normal_concat, genotype.reduce_concat)[i % 2])
        each = len(pairs) // 4
        edges = curves(axes)
        assert len(edges) == len(pairs) + len(concat)
        for k, points in edges.items():
            if k < len(pairs):
                ends = {pairs[k][1], 2 + k // each}
            else:
                ends = {concat[k - len(pairs)], 6}
            for (where, name), box in {**labels, **nodes}.items():
                kind, other = name.split()
                if where != i or (kind == "node" and int(other) in ends):
                    continue
                hit = [(x, y) for x, y in points
                       if box.x0 - 1 < x < box.x1 + 1 and box.y0 - 1 < y < box.y1 + 1]  # fmt: skip
                assert not hit, (k, name, hit[:3])
        for a, b in itertools.combinations(edges, 2):
            assert edges[a] != edges[b]
    check_texts(figure, renderer)


def check_texts(figure, renderer):
    """No text is smaller than 6 pt, clipped, or on another one; ticks included."""
    texts = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    for axes in figure.axes:
        texts += axes.texts
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
        if axes.axison:
            texts += [t for t in axes.findobj(Text) if t.get_text() == axes.get_title(loc="left")]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                texts += [axis.label, *(tick.label1 for tick in axis.get_major_ticks()
                                        if low <= tick.get_loc() <= high)]  # fmt: skip
    shown = []
    for text in texts:
        if not text.get_visible() or not text.get_text().strip():
            continue
        box = Text.get_window_extent(text, renderer)  # without the arrow of an annotation
        assert text.get_fontsize() >= 6, text
        if "_" in text.get_text() and "$c" in text.get_text():
            assert 0.7 * text.get_fontsize() >= 6, text  # the index
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        shown.append((text, box))
    assert shown
    for (a, box), (b, other) in itertools.combinations(shown, 2):
        assert not overlap(box, other, 1.0), (a, b)


# ------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", genotypes.NAMED)
@pytest.mark.parametrize("stacked", [False, True])
def test_published_cells(name, stacked):
    genotype = genotypes.load(name)[0]
    figure = visualize.cells_figure(genotype, name, stacked=stacked)
    assert figure.get_figwidth() == (3.35 if stacked else 6.9)
    check_cells(figure, genotype)


@pytest.mark.parametrize("each, count", [(1, 10), (2, 30), (3, 6), (4, 4), (14, 1)])
def test_random_cells(each, count):
    for seed in range(count):
        genotype = random_genotype(seed, each)
        check_cells(visualize.cells_figure(genotype, "title", stacked=seed % 3 == 0), genotype)


def test_pairs_on_the_same_edge():
    check_cells(visualize.cells_figure(SAME_EDGE), SAME_EDGE)


def test_labels_say_the_operations():
    genotype = genotypes.ISTA_onestage
    figure = visualize.cells_figure(genotype)
    for axes, pairs in zip(figure.axes, (genotype.normal, genotype.reduce), strict=True):
        labels = {t.get_gid(): t.get_text() for t in axes.texts}
        for k, (operation, _) in enumerate(pairs):
            kind, *_, size = operation.split("_")
            expected = "skip" if kind == "skip" else f"{kind}\n{size.replace('x', '×')}"
            assert labels[f"label {k}"] == expected
        edges = {p.get_gid(): to_hex(p.get_edgecolor()) for p in axes.patches}
        for k, (operation, _) in enumerate(pairs):
            assert edges[f"edge {k}"].upper() == visualize.OPERATIONS[operation][1]


def test_operations_differ_in_colour_or_dash_and_width():
    assert list(visualize.OPERATIONS) == genotypes.PRIMITIVES
    for part in (0, 1):
        assert len({look[part] for look in visualize.OPERATIONS.values()}) == 7


def test_changes_are_filled():
    before, after = genotypes.draw(1), genotypes.draw(2)
    changed = before._replace(normal=[*before.normal[:7], after.normal[7]])
    assert changed.normal[7] not in before.normal[6:]
    figure = visualize.cells_figure(changed, "t", before, ("epoch 1", "epoch 9"))
    assert len(figure.axes) == 4
    filled = [
        [to_hex(p.get_facecolor()).upper() for p in axes.patches if p.get_gid() is None]
        for axes in figure.axes
    ]
    colour = [visualize.OPERATIONS[g.normal[7][0]][1] for g in (before, changed)]
    assert filled[0] == ["#FFFFFF"] * 7 + [colour[0]]
    assert filled[2] == ["#FFFFFF"] * 7 + [colour[1]]
    assert filled[1] == filled[3] == ["#FFFFFF"] * 8
    check_texts(figure, drawn(figure))


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def make_run(path, kind="two", epochs=8, weights=True, seed=0, accuracy=90.0, **config):
    """A run folder as search.py ("two", "one") and train.py ("train") write it.

    A one-stage search freezes node k in epoch 2 + k // 2 and trains on after epoch 5.
    """
    path.mkdir()
    config = dict(seed=seed, save=str(path), epochs=epochs, one_stage=kind == "one", **config)
    if kind == "one":
        config.update(freeze_tol=1e-3, epochs=epochs - 5)
    (path / "config.json").write_text(json.dumps(config))
    held_out = "valid" if kind == "two" else "test"
    rng = random.Random(seed)
    rows, choices = [], []
    for epoch in range(1, epochs + 1):
        row = dict(epoch=epoch, learning_rate=0.1 / epoch, drop_path_prob=0.02 * (kind != "two"))
        for part in ("train", held_out) + (("arch",) if kind == "two" else ()):
            row[f"{part}_loss"] = 3 / epoch
            row[f"{part}_accuracy"] = accuracy - 50 / epoch
        row[f"{held_out}_accuracy"] = accuracy - (epochs - epoch)
        if kind == "two" or (kind == "one" and epoch <= 5):
            frozen = [kind == "one" and epoch >= 2 + k // 2 for k in range(8)]
            row.update(
                distance=[0.0 if f and epoch > 2 + k // 2 else 0.5 / 4**epoch
                          for k, f in enumerate(frozen)],
                changed=1, frozen=frozen, parameters=None, rejected=kind == "one" and epoch == 1,
                not_converged=0,
            )  # fmt: skip
        if kind == "train":
            row.update(best_accuracy=accuracy, parameters=3_316_726, multiply_adds=524_996_736)
        row.update(seconds=1800.0, peak_memory_gib=None)
        rows.append(row)
        genotype = genotypes.draw(min(epoch, 4) + 10 * seed)
        choice = {"epoch": epoch, **genotypes.as_lists(genotype)}
        if weights:
            for cell in ("normal", "reduce"):
                choice[f"{cell}_weights"] = [rng.gauss(0, 1) for _ in range(8)]
        choices.append(choice)
    files = {"metrics.jsonl": rows, "genotypes.jsonl": choices}
    if kind == "train":
        del files["genotypes.jsonl"]
        genotypes.save(path / "genotype.json", genotypes.ISTA_twostage, False)
    for name, lines in files.items():
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("kind, epochs", [("two", 1), ("two", 50), ("one", 4), ("one", 12)])
@pytest.mark.parametrize("weights", [True, False])
def test_search_figure(tmp_path, kind, epochs, weights):
    run = visualize.read_run(make_run(tmp_path / "run", kind, epochs, weights))
    assert run.search and run.one_stage == (kind == "one") and len(run.history) == epochs
    assert run.end == (5 if epochs == 12 else None)
    figure = visualize.search_figure(run)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == (5 if weights else 3)
    assert titles[:2] == ["normal cell", "reduction cell"] and "z_t - z_{t-1}" in titles[2]
    check_texts(figure, drawn(figure))
    # Dashed lines at the end of the search, and a stroke for each node that is frozen by then.
    strokes = [
        [x for line in axes.lines if line.get_linewidth() == 1.6 for x in line.get_xdata()[:1]]
        for axes in figure.axes[:2]
    ]
    if kind == "one":
        last = min(epochs, 5) + 0.5
        assert strokes[0] == [x for x in (2.5, 2.5, 3.5, 3.5) if x <= last]
        assert strokes[1] == [x for x in (4.5, 4.5, 5.5, 5.5) if x <= last]
        ends = [line.get_xdata()[0] for line in figure.axes[2].lines if line.get_linewidth() == 0.9]
        assert ends == ([5.5] if epochs == 12 else [])
        assert figure.axes[2].get_xlim()[1] == (6.5 if epochs == 12 else 4.5)
    else:
        assert strokes == [[], []]


def test_bars_show_the_pairs(tmp_path):
    run = visualize.read_run(make_run(tmp_path / "run", epochs=9))
    figure = visualize.search_figure(run)
    for axes, cell in zip(figure.axes, ("normal", "reduce"), strict=False):
        lanes = [tick.get_text() for tick in axes.get_yticklabels()]
        assert lanes == [s for n in NODES for s in ["k−2", "k−1", "0", "1", "2"][:n]]
        bars = [p for p in axes.patches if p.get_facecolor()[:3] != (240 / 255,) * 3]
        for choice in run.history:
            here = [p for p in bars if p.get_x() < choice.epoch < p.get_x() + p.get_width()
                    and p.get_hatch() is None]  # fmt: skip
            tops = sorted(p.get_y() for p in here)
            colours = [
                to_hex(p.get_facecolor()).upper() for p in sorted(here, key=lambda p: p.get_y())
            ]
            pairs = getattr(choice.genotype, cell)
            expected = [
                visualize.OPERATIONS[op][1]
                for node in range(4)
                for op, _ in sorted(pairs[2 * node : 2 * node + 2], key=lambda pair: pair[1])
            ]
            assert colours == expected and len(set(tops)) == 8
        # The genotype is the same from epoch 4 on: a bar of each pair is at least that long.
        last = [p for p in bars if p.get_x() + p.get_width() == 9.5 and p.get_hatch() is None]
        assert len(last) == 8 and all(p.get_x() <= 3.5 for p in last)


def test_distances_are_those_of_the_file(tmp_path):
    run = visualize.read_run(make_run(tmp_path / "run", "one", 12))
    axes = visualize.search_figure(run).axes[2]
    assert axes.get_yscale() == "log"
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["normal 0"].get_xdata()) == [1, 2]  # frozen in epoch 2
    assert list(lines["reduction 3"].get_xdata()) == [1, 2, 3, 4, 5]
    assert lines["reduction 3"].get_ydata()[-1] == pytest.approx(0.5 / 4**5)
    assert list(lines["rejected"].get_xdata()) == [1]


@pytest.mark.parametrize("kind, epochs", [("two", 1), ("two", 50), ("one", 12), ("train", 600)])
def test_curves_figure(tmp_path, kind, epochs):
    run = visualize.read_run(make_run(tmp_path / "run", kind, epochs))
    figure = visualize.curves_figure(run)
    check_texts(figure, drawn(figure))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert ("drop-path probability" in titles) == (kind != "two")
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    name = next(label for label in lines if label.startswith(("validation", "test")))
    assert list(lines[name].get_xdata()) == list(range(1, epochs + 1))
    assert lines[name].get_ydata()[-1] == 90
    assert ("search ends" in lines) == (kind == "one")


def test_draw_run_writes_the_pictures_of_its_kind(tmp_path):
    for kind, names in (("two", ["cells", "search", "curves"]), ("train", ["cells", "curves"])):
        path = make_run(tmp_path / kind, kind)
        paths = visualize.draw_run(path)
        assert paths == [os.path.join(path, f"{name}.png") for name in names]
        for name in paths:
            with open(name, "rb") as file:
                assert file.read(4) == b"\x89PNG"
        assert not [name for name in os.listdir(path) if name.endswith(".partial")]


@pytest.mark.parametrize("kind", ["two", "one", "train"])
def test_a_running_or_cut_run_can_be_drawn(tmp_path, kind):
    path = make_run(tmp_path / "run", kind, 4)
    for name in os.listdir(path):
        if name.endswith(".jsonl"):
            with open(os.path.join(path, name), "r+") as file:
                text = file.read()
                file.truncate(len(text) - 30)
    run = visualize.read_run(path)
    assert [row["epoch"] for row in run.metrics] == [1, 2, 3]
    assert [choice.epoch for choice in run.history] == ([] if kind == "train" else [1, 2, 3])
    os.remove(os.path.join(path, "config.json"))
    assert len(visualize.draw_run(path)) == (2 if kind == "train" else 3)


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
    run = visualize.read_run(path)
    assert run.search and run.genotype is None
    assert [os.path.basename(p) for p in visualize.draw_run(path)] == ["search.png", "curves.png"]


# ------------------------------------------------------------------------------------------------
# Comparison
# ------------------------------------------------------------------------------------------------


def test_table_and_mean_over_seeds(tmp_path):
    paths = [
        make_run(tmp_path / f"seed{k}", "train", 4, seed=k, accuracy=97 + k / 10, batch_size=96)
        for k in range(3)
    ]
    paths.append(make_run(tmp_path / "other", "train", 4, seed=3, batch_size=64))
    paths.append(make_run(tmp_path / "unfinished", "train", 4, seed=4, batch_size=96))
    metrics = tmp_path / "unfinished" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:2]))
    paths.append(make_run(tmp_path / "search", "two", 4))
    runs = [visualize.read_run(path) for path in paths]
    lines = visualize.table(runs).splitlines()
    assert len(lines) == 1 + 6 + 1
    assert "ISTA_twostage" in lines[1] and "3.3167" in lines[1] and "525.0" in lines[1]
    assert lines[2].split()[-3:] == ["97.10", "97.10", "2.00"]
    mean = lines[4]
    assert "mean ± std of 3 seeds" in mean and mean.count("97.10 ± 0.10") == 2
    assert "2/4" in lines[6] and lines[7].startswith("search") and "validation" in lines[7]
    starts = [line.index("test ") for line in (*lines[1:4], *lines[5:7])]
    assert len(set(starts)) == 1 and lines[0].index("measured on") == starts[0]
    figure = visualize.compare_figure(runs)
    check_texts(figure, drawn(figure))
    assert len(figure.legends[0].get_texts()) == 4 and len(figure.axes[0].lines) == 6


def test_genotypes_have_names_or_hashes():
    assert visualize.genotype_name(genotypes.ISTA_onestage) == "ISTA_onestage"
    one, other = (visualize.genotype_name(genotypes.draw(seed)) for seed in (1, 2))
    assert len(one) == 7 and one != other
    assert one == visualize.genotype_name(genotypes.draw(1)._replace(normal_concat=[2, 3, 4, 5]))


# ------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------


def script(*argv, cwd, code=0):
    result = subprocess.run(
        [sys.executable, os.path.join(ROOT, "visualize.py"), *map(str, argv)],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip
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
    assert script("ISTA_onestage", cwd=tmp_path) == ["ISTA_onestage.png"]
    assert script("random:3", "--stacked", cwd=tmp_path) == ["random-3.png"]
    assert script(f"{run}/genotype.json", cwd=tmp_path) == [f"{run}/cells.png"]
    text = f"genotype = {genotypes.ISTA_twostage}"
    for name, magic in (("a.svg", b"<?xml"), ("b.pdf", b"%PDF"), ("C.PNG", b"\x89PNG")):
        assert script(text, "-o", name, cwd=tmp_path) == [name]
        assert (tmp_path / name).read_bytes().startswith(magic)
    first = (tmp_path / "a.svg").read_bytes()
    script(text, "-o", "a.svg", cwd=tmp_path)  # overwritten, and the same to the byte
    assert (tmp_path / "a.svg").read_bytes() == first


def test_script_draws_and_compares_runs(tmp_path):
    make_run(tmp_path / "a", "two", 3)
    make_run(tmp_path / "b", "two", 3, seed=1)
    assert script("a", cwd=tmp_path) == ["a/cells.png", "a/search.png", "a/curves.png"]
    lines = script("a", "b", cwd=tmp_path)
    assert lines[-1] == "compare.png" and "mean ± std of 2 seeds" in lines[3]
    assert (tmp_path / "compare.png").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "required"),
        (["nothing"], "unknown genotype"),
        (["empty"], "not a run folder"),
        (["begun"], "no epoch has ended yet"),
        (["bad.json"], "not a genotype.json"),
        (["ISTA_twostage", "-o", "cells.gif"], "ends in .png, .svg, .pdf"),
        (["ISTA_twostage", "-o", "good.json"], "ends in .png, .svg, .pdf"),
        (["ISTA_twostage", "-o", "no/such/cells.png"], "there is no folder no/such"),
        (["begun", "missing"], "begun: no epoch"),
        (["broken", "broken"], "no row holds a genotype"),
        (["strange"], "cannot be read"),
    ],
)
def test_errors_are_one_line(tmp_path, argv, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "strange" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "begun" / "config.json").write_text("{}")
    make_run(tmp_path / "broken", "two", 2)
    (tmp_path / "broken" / "genotypes.jsonl").write_text('{"epoch": 1, "normal": []}\n')
    (tmp_path / "bad.json").write_text('{"normal": [')
    genotypes.save(tmp_path / "good.json", genotypes.ISTA_twostage, False)
    assert message in script(*argv, cwd=tmp_path, code=2)


def test_other_files_stay(tmp_path):
    genotypes.save(tmp_path / "g.json", genotypes.ISTA_twostage, False)
    before = (tmp_path / "g.json").read_bytes()
    script("g.json", "-o", "g.json", cwd=tmp_path, code=2)
    assert (tmp_path / "g.json").read_bytes() == before and os.listdir(tmp_path) == ["g.json"]
