"""search.py and train.py from the command line: what they do, print and leave behind."""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import (
    ONE_STAGE,
    ROOT,
    TINY,
    TRAIN,
    TWO_STAGE,
    Process,
    assert_same_run,
    killed_in,
    rows,
    run,
    saved,
)

import data
import genotypes
import ista
import model
from harness import runs
from model_search import Network


def next_commands(stdout):
    """The commands that a script printed for the person to paste."""
    return [shlex.split(line)[1:] for line in stdout.splitlines() if line.startswith("    python ")]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished two-stage search of 4 epochs: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    done = run(*TWO_STAGE, "--epochs", 4, "--save", "two", cwd=folder, pictures=True)
    return folder, done.stdout


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory):
    """A finished one-stage search, its last 3 epochs with the architecture fixed."""
    folder = tmp_path_factory.mktemp("one_stage")
    return folder, run(*ONE_STAGE, "--epochs", 3, "--save", "one", cwd=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training of 3 epochs."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(*TRAIN, "--epochs", 3, "--save", "t", cwd=folder)


def assert_changes_are_counted(path):
    """Each epoch counts the pairs that the one before did not have, and names just these."""
    found, metrics = rows(path / "genotypes.jsonl"), rows(path / "metrics.jsonl")
    log = (path / "log.txt").read_text()
    epochs = re.split(r"^ +\d+/\d+  .*\n", log, flags=re.M)[1:]
    named = [len(re.findall(r"^    (?:normal|reduce) node \d: .* → ", part, re.M))
             for part in epochs]
    assert named == [row["changed"] for row in metrics]
    for a, b, row in zip(found, found[1:], metrics[1:], strict=False):
        new = [set(map(tuple, b[cell][i : i + 2])) - set(map(tuple, a[cell][i : i + 2]))
               for cell in ("normal", "reduce") for i in range(0, 8, 2)]
        assert row["changed"] == sum(map(len, new))
    assert log.count("Genotype(") == 1, "whole, only at the end"


def absorbed(done):
    """Test accuracy of a one-stage search, which absorption must not change."""
    before, after = map(float, re.search(
        r"test accuracy (\S+) % in the supernet, (\S+) % after absorption", done.words
    ).groups())
    assert after == nearly(before)
    return after


def accuracy(done):
    """Test accuracy of an evaluation, or after the last epoch of a training."""
    return float(re.search(r"test accuracy (\S+) %, error", done.words)[1])


def loss(done):
    """Test loss of an evaluation."""
    return float(re.search(r"loss (\S+), on", done.words)[1])


def nearly(percent):
    """The same accuracy, up to an image whose class depends on rounding."""
    return pytest.approx(percent, abs=1)


def assert_measures(done, path):
    """Assert that an evaluation finds the loss and the accuracy of a run's last epoch."""
    row = rows(path / "metrics.jsonl")[-1]
    assert loss(done) == pytest.approx(row["test_loss"], rel=1e-3)
    assert accuracy(done) == nearly(row["test_accuracy"])


# ------------------------------------------------------------------------------------------------
# Two-stage search
# ------------------------------------------------------------------------------------------------


def test_a_search_leaves_what_its_folder_should_hold(searched):
    folder, stdout = searched
    path = folder / "two"
    for name in ("config.json", "log.txt", "checkpoint.pt", "scripts/search.py",
                 "scripts/harness/runs.py", "cells.png", "search.png", "curves.png"):
        assert (path / name).exists(), name
    assert (path / "log.txt").read_text() == stdout
    config = json.loads((path / "config.json").read_text())
    assert config["init_channels"] == 2 and config["learning_rate"] == 0.1 and config["seed"] == 2
    metrics, found = rows(path / "metrics.jsonl"), rows(path / "genotypes.jsonl")
    assert [row["epoch"] for row in metrics] == [row["epoch"] for row in found] == [1, 2, 3, 4]
    genotype, one_stage = genotypes.load(path / "genotype.json")
    assert not one_stage and f"genotype = {genotype}" in stdout
    assert genotypes.as_lists(genotype)["normal"] == found[-1]["normal"]
    assert_changes_are_counted(path)
    assert all(0 <= row["valid_accuracy"] <= 100 for row in metrics)
    assert metrics[0]["learning_rate"] == 0.1, "the schedule starts at the full learning rate"


def test_the_printed_command_trains_the_genotype(searched):
    folder, stdout = searched
    (flags,) = next_commands(stdout)
    small = ["--init_channels", 2, "--layers", 3, "--batch_size", 480, "--epochs", 1]
    done = run(*flags, *small, "--save", "t", cwd=folder)
    (evaluate,) = next_commands(done.stdout)
    assert_measures(run(*evaluate, cwd=folder), folder / "t")
    assert not list(folder.glob("runs*")), "evaluating makes no folder"


def test_the_same_seed_gives_the_same_search_and_another_another(searched, tmp_path):
    folder, _ = searched
    run(*TWO_STAGE, "--epochs", 4, "--save", "again", cwd=tmp_path)
    assert_same_run(folder / "two", tmp_path / "again")
    run(*TWO_STAGE, "--epochs", 1, "--seed", 3, "--save", "other", cwd=tmp_path)
    assert rows(tmp_path / "other/metrics.jsonl")[0] != rows(folder / "two/metrics.jsonl")[0]


@pytest.mark.parametrize("steps", [1, 4, 100])
def test_a_search_that_recovers_every_few_steps_ends_with_a_recovery(tmp_path, steps):
    flags = ["--epochs", 2, "--recover_every", steps, "--save", "r"]  # of 3 steps each
    run(*TWO_STAGE, *flags, cwd=tmp_path)
    metrics = rows(tmp_path / "r/metrics.jsonl")
    assert ("distance" in metrics[0]) == (steps == 1) and "distance" in metrics[1]
    assert_changes_are_counted(tmp_path / "r")
    state = saved(tmp_path / "r/checkpoint.pt")["net"]
    for code in ("normal_code", "reduce_code"):
        for j in range(4):
            A, b, z = (state[f"{code}.{key}{j}"].double().numpy() for key in ("A", "b.", "z"))
            assert np.allclose(z, ista.recover(A, b).z, atol=1e-6), "z is the code of b"


def test_a_solver_that_does_not_converge_is_warned_of_once(tmp_path, monkeypatch):
    """However many of its codes that are, which is another number at each recovery."""
    fails = iter(8 * [False] + 3 * [True] + 5 * [False] + 8 * [True] + 8 * [False])  # 8 a recovery
    solve = ista.SOLVERS["homotopy"]

    def sometimes(*problem):
        z, n_iter, solved = solve(*problem)
        return z, n_iter, solved and not next(fails)

    monkeypatch.setitem(ista.SOLVERS, "ista", sometimes)
    done = run(*TWO_STAGE, "--epochs", 3, "--solver", "ista", "--save", "s", cwd=tmp_path)
    assert not [*fails]
    assert done.words.count("a relative duality gap above 1e-09") == 1
    assert "in some codes (3 of 8 in this recovery); homotopy solves these instead" in done.words


@pytest.mark.parametrize("flags, says", [
    ([], True), (["--learning_rate", 0.1], False),
])
def test_the_learning_rate_of_another_batch_is_said_once(tmp_path, flags, says):
    done = run(*TWO_STAGE, *flags, "--epochs", 1, "--save", "s", cwd=tmp_path)
    assert ("the linear rule gives --learning_rate 0.0938" in done.words) == says
    assert done.words.count("linear rule") == says


def test_progress_has_a_line_every_few_steps_whatever_the_clock_does(tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -1000))  # set back all the time
    monkeypatch.setattr(time, "time", lambda: next(clock))
    done = run(*TWO_STAGE, "--epochs", 2, "--report_freq", 2, "--save", "s", cwd=tmp_path)
    step = r"^    step 2/3: loss \d\.\d+, accuracy \d+\.\d\d %, \d+ images/s, \d+ s left .*"
    assert len(re.findall(step, done.stdout, re.M)) == 2
    assert not re.findall(r"-\d+ (?:s|min|h|images)\b", done.words)
    metrics = (tmp_path / "s/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["seconds"] > 0 for line in metrics)


def test_distinct_edges_reach_the_genotype(tmp_path):
    run(*TWO_STAGE, "--epochs", 2, "--distinct_edges", "--save", "d", cwd=tmp_path)
    genotype, _ = genotypes.load(tmp_path / "d/genotype.json")
    assert genotypes.has_distinct_edges(genotype)
    record = json.loads((tmp_path / "d/genotype.json").read_text())
    assert record["about"]["distinct_edges"] is True


def test_own_images_of_any_kind(tmp_path):
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    for part, count in (("train", 8), ("val", 2)):
        for name, colour in colours.items():
            (tmp_path / "my images" / part / name).mkdir(parents=True)
            for k in range(count):
                mode = ("RGB", "L", "P", "RGBA")[k % 4]
                image = Image.new("RGB", (20 + k, 31), tuple(v + k for v in colour)).convert(mode)
                image.save(tmp_path / "my images" / part / name / f"{k}.png")
    flags = ["--dataset", "imagefolder", "--data", "my images", "--init_channels", "2",
             "--layers", "2"]
    done = run("search.py", *flags, "--epochs", 1, "--save", "s", cwd=tmp_path)
    assert "--batch_size is 12" in done.words and "no normal cell" in done.words
    assert "resized" in done.words and "12 images train the weights" in done.words
    (command,) = next_commands(done.stdout)
    assert command[-1] == "my images"
    assert len(saved(tmp_path / "s/checkpoint.pt")["net"]["classifier.weight"]) == 3


# ------------------------------------------------------------------------------------------------
# One-stage search
# ------------------------------------------------------------------------------------------------


def test_one_stage_search_ends_in_a_trained_network(one_stage):
    folder, done = one_stage
    metrics = rows(folder / "one/metrics.jsonl")
    searching = [row for row in metrics if row["phase"] == "searching"]
    fixed = metrics[len(searching) :]
    assert [row["phase"] for row in fixed] == 3 * ["training"]
    assert {row["learning_rate"] for row in searching} == {0.025}
    assert {row["drop_path_prob"] for row in searching} == {0.0}
    assert [row["drop_path_prob"] for row in fixed] == pytest.approx([0, 0.2 / 3, 0.4 / 3])
    assert fixed[0]["learning_rate"] == 0.025 > fixed[1]["learning_rate"]
    frozen = [sum(row["frozen"]) for row in searching]
    assert frozen == sorted(frozen)
    assert re.search(r"with \d\.\d+ M parameters are deleted, \d\.\d+ M remain", done.words)
    assert "from here on drop-path rises to 0.2, which lowers the training accuracy" in done.words
    evaluate, train = next_commands(done.stdout)
    measured = run(*evaluate, cwd=folder)
    assert_measures(measured, folder / "one")
    assert accuracy(measured) == nearly(absorbed(done))
    run(*train, "--epochs", 1, "--batch_size", 480, "--save", "more", cwd=folder)
    assert [row["epoch"] for row in rows(folder / "more/metrics.jsonl")] == [1]
    assert genotypes.load(folder / "more") == genotypes.load(folder / "one")


@pytest.mark.crash
def test_what_does_not_come_to_rest_is_taken_as_it_is(tmp_path):
    flags = [*ONE_STAGE, "--epochs", 1, "--freeze_tol", 0, "--max_search_epochs", 2]
    done = run(*flags, "--save", "one", cwd=tmp_path)
    assert "warning: 8 of 8 nodes still moved" in done.words
    assert len(rows(tmp_path / "one/metrics.jsonl")) == 3
    assert genotypes.load(tmp_path / "one/genotype.json")[1] is True
    more = ["--resume", "one", "--max_search_epochs", 3]
    assert "contradicts" in run("search.py", *more, cwd=tmp_path, status=2).stderr  # too late

    (tmp_path / "prelude.py").write_text(killed_in(2))
    Process(*flags, "--save", "killed", cwd=tmp_path, prelude=tmp_path / "prelude.py").wait()
    run("search.py", "--resume", "killed", *more[2:], cwd=tmp_path)
    phases = [row["phase"] for row in rows(tmp_path / "killed/metrics.jsonl")]
    assert phases == [*3 * ["searching"], "training"]


def test_candidates_that_are_too_large_are_rejected(tmp_path):
    flags = [*ONE_STAGE, "--epochs", 1, "--max_params", 1e-6, "--max_search_epochs", 2]
    done = run(*flags, "--freeze_tol", 100, "--save", "one", cwd=tmp_path)
    metrics = rows(tmp_path / "one/metrics.jsonl")
    assert all(row["rejected"] and row["changed"] == 0 for row in metrics[:2])
    assert not any(metrics[0]["frozen"]), "what is rejected freezes nothing"
    assert "rejected by --max_params 1e-06" in done.words
    found = rows(tmp_path / "one/genotypes.jsonl")
    assert found[0]["normal"] == found[-1]["normal"]


def test_a_search_ends_when_its_last_node_freezes_and_resumes_before(tmp_path, monkeypatch):
    """Three more nodes freeze in each epoch, however far their codes have moved."""
    freeze, save = Network.freeze, runs.Run.save_checkpoint

    def freeze_three(net, nodes):
        freeze(net, [k < sum(net.frozen) + 3 for k in range(len(nodes))])

    def save_and_stop(self, **state):
        save(self, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Network, "freeze", freeze_three)
    flags = [*ONE_STAGE, "--max_search_epochs", 9, "--epochs", 1]
    done = run(*flags, "--save", "whole", cwd=tmp_path)
    metrics = rows(tmp_path / "whole/metrics.jsonl")
    assert [sum(row["frozen"]) for row in metrics[:-1]] == [3, 6, 8]
    assert metrics[-1]["phase"] == "training" and "nodes still moved" not in done.words
    assert "5 of 8 nodes are not frozen; " in done.words

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save_checkpoint", save_and_stop)
        run(*flags, "--save", "resumed", cwd=tmp_path)
    run("search.py", "--resume", "resumed", cwd=tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


# ------------------------------------------------------------------------------------------------
# Resuming
# ------------------------------------------------------------------------------------------------


def test_a_search_goes_on_with_more_epochs(searched, tmp_path):
    folder, _ = searched
    run(*TWO_STAGE, "--epochs", 2, "--save", "r", cwd=tmp_path)
    done = run("search.py", "--resume", "r", "--epochs", 4, cwd=tmp_path)
    assert "resumed r after epoch 2" in done.words and "the schedule of 4 epochs" in done.words
    metrics, whole = rows(tmp_path / "r/metrics.jsonl"), rows(folder / "two/metrics.jsonl")
    assert [row["epoch"] for row in metrics] == [1, 2, 3, 4]
    for epoch in (2, 3):  # from here on, the schedule is that of 4 epochs
        assert metrics[epoch]["learning_rate"] == whole[epoch]["learning_rate"]


def test_resuming_a_finished_run_restores_its_files(one_stage):
    folder, _ = one_stage
    path = folder / "one"
    before = saved(path / "network.pt")["weights"]
    (path / "network.pt").unlink()
    (path / "genotype.json").unlink()
    done = run("search.py", "--resume", path / "checkpoint.pt", cwd=folder)
    after = saved(path / "network.pt")["weights"]
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (path / "genotype.json").exists()
    assert next_commands(done.stdout)


def test_a_run_resumes_when_its_genotype_file_is_gone(tmp_path):
    genotypes.save(tmp_path / "g.json", genotypes.draw(1), False)
    run(*TRAIN, "--arch", "g.json", "--epochs", 1, "--save", "t", cwd=tmp_path)
    genotypes.save(tmp_path / "g.json", genotypes.draw(2), False)
    run("train.py", "--resume", "t", "--epochs", 2, cwd=tmp_path)
    (tmp_path / "g.json").unlink()
    run("train.py", "--resume", "t", "--epochs", 3, cwd=tmp_path)
    assert genotypes.load(tmp_path / "t")[0] == genotypes.draw(1)


def test_a_run_that_is_older_than_a_flag_goes_on_with_its_default(tmp_path):
    run(*TRAIN, "--epochs", 1, "--save", "old", cwd=tmp_path)
    state = saved(tmp_path / "old/checkpoint.pt")
    del state["args"]["label_smoothing"]
    torch.save(state, tmp_path / "old/checkpoint.pt")
    run("train.py", "--resume", "old", "--epochs", 2, cwd=tmp_path)
    assert saved(tmp_path / "old/checkpoint.pt")["args"]["label_smoothing"] == 0


def test_starts_are_noted_and_changed_sources_kept(tmp_path, monkeypatch):
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "harness", sources / "harness")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, sources)
    monkeypatch.setattr(runs, "SOURCES", sources)
    run(*TRAIN, "--epochs", 1, "--save", "t", cwd=tmp_path)

    def resume(epochs):
        done = run("train.py", "--resume", "t", "--epochs", epochs, cwd=tmp_path)
        return re.findall(r"sources have changed since the last start of the run: (.*?);", done.words)

    assert resume(2) == []
    for name in ("train.py", "harness/runs.py"):
        (sources / name).write_text("edited")
    assert resume(3) == ["harness/runs.py, train.py"]
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")  # git is not installed
        assert resume(4) == []
    assert (tmp_path / "t/scripts/train.py").read_text() == (ROOT / "train.py").read_text()
    assert (tmp_path / "t/scripts-after-epoch-2/train.py").read_text() == "edited"
    assert (tmp_path / "t/scripts-after-epoch-2/harness/runs.py").read_text() == "edited"
    assert (tmp_path / "t/scripts-after-epoch-2/model.py").exists(), "together they run"
    starts = rows(tmp_path / "t/starts.jsonl")
    assert [start["typed"][1:3] for start in starts] == [TRAIN[1:3]] + 3 * [["--resume", "t"]]
    assert all(start["torch"] == torch.__version__ for start in starts)
    assert starts[-1]["commit"] is None and starts[0]["device"] == "cpu"


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def test_training_reports_size_and_cost(trained):
    folder, done = trained
    assert re.search(r"network: 0\.\d{4} M parameters, \d+\.\d M multiply-adds", done.words)
    assert "digits: 1438 images to train on, 359 to test on" in done.words
    metrics = rows(folder / "t/metrics.jsonl")
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.025, 0.01875, 0.00625])
    assert [row["drop_path_prob"] for row in metrics] == pytest.approx([0, 0.2 / 3, 0.4 / 3])
    best = max(row["test_accuracy"] for row in metrics)
    network = saved(folder / "t/network-best.pt")
    assert network["about"]["test_accuracy"] == best == metrics[-1]["best_accuracy"]
    assert any(key.startswith("auxiliary_head") for key in network["weights"])


def test_training_goes_on_from_weights_as_a_new_run(trained):
    folder, _ = trained
    flags = ["--weights", "t/network.pt", "--epochs", 1, "--batch_size", 480, "--no-cutout"]
    run("train.py", *flags, "--save", "more", cwd=folder)
    assert len(rows(folder / "more/metrics.jsonl")) == 1
    config = saved(folder / "more/checkpoint.pt")["config"]
    assert config["C"] == 2 and config["layers"] == 3


def test_any_form_of_a_genotype_can_be_trained(tmp_path):
    text = str(genotypes.ISTA_onestage)
    (tmp_path / "cells.txt").write_text(f"# of a log\n2020-12-06 genotype = {text}\n")
    for arch in (text, "cells.txt", "random:3"):
        flags = [*TRAIN, "--epochs", 1, "--arch", arch, "--no-auxiliary", "--one_stage"]
        done = run(*flags, cwd=tmp_path)
        path = Path(tmp_path, re.search(r"new run in (\S+)", done.stdout)[1])
        expected = genotypes.draw(3) if arch == "random:3" else genotypes.ISTA_onestage
        assert genotypes.load(path) == (expected, True)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    ["--weights", "t/network.pt"], ["--weights", "t/checkpoint.pt"], ["--resume", "t"],
    ["--resume", "t/checkpoint.pt"], ["--weights", "t/network.pt", "--arch", "ISTA_twostage"],
    ["--weights", "t/network.pt", "--no-auxiliary"],
])
def test_evaluation_measures_the_same_from_every_file(trained, flags):
    folder, _ = trained
    before = sorted(folder.rglob("*"))
    assert_measures(run("train.py", "--evaluate", *flags, cwd=folder), folder / "t")
    assert sorted(folder.rglob("*")) == before


def test_a_plain_state_dict_needs_its_genotype(trained):
    folder, _ = trained
    weights = saved(folder / "t/network.pt")["weights"]
    old = {f"module.{k}": v for k, v in weights.items() if "num_batches_tracked" not in k}
    torch.save({"state_dict": old, "epoch": 600}, folder / "darts.pt")
    flags = ["--evaluate", "--weights", "darts.pt", "--dataset", "digits", "--image_size", 8]
    done = run("train.py", *flags, "--arch", "ISTA_twostage", cwd=folder)
    assert_measures(done, folder / "t")
    assert "lacks mean and standard deviation" in done.words
    assert "give --arch" in run("train.py", *flags, cwd=folder, status=2).stderr
    wrong = run("train.py", *flags, "--arch", "ISTA_onestage", cwd=folder, status=2)
    assert "does not fit" in wrong.stderr


@pytest.mark.parametrize("kind", ["trained", "one_stage"])
def test_a_network_is_used_from_python(request, kind):
    folder, done = request.getfixturevalue(kind)
    net, about = model.load(next(folder.glob("*/network.pt")))
    _, test = data.load("digits", None, about["image_size"])
    logits, _ = net(data.normalize(test.images, about["mean"], about["std"]))
    names = [about["classes"][k] for k in logits.argmax(1)]
    right = sum(name == test.classes[k] for name, k in zip(names, test.labels, strict=True))
    expected = accuracy(done) if kind == "trained" else absorbed(done)
    assert 100 * right / len(test) == nearly(expected)


def write(images, root, only=None, tint=(1, 1, 1)):
    """Make a folder of digits, of some classes; a tint changes their mean and deviation."""
    for k, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        name = images.classes[label]
        if only is None or name in only:
            (root / name).mkdir(parents=True, exist_ok=True)
            pixels = (image.permute(1, 2, 0) * torch.tensor(tint)).byte().numpy()
            Image.fromarray(pixels).save(root / name / f"{k}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Digits in folders, and a network that is trained on 3 of them."""
    place = tmp_path_factory.mktemp("folders")
    train, test = data.load("digits", None, 8)
    write(train, place / "own/train", "127")
    write(test, place / "own/test", "127")
    write(train, place / "tinted/train", "127", (0.3, 1, 0.6))
    write(test, place / "tinted/test", "127")
    write(test, place / "less/test", "17")
    flags = ["--dataset", "imagefolder", "--data", "own", *TINY[2:], "--init_channels", 4]
    run("train.py", "--arch", "ISTA_twostage", *flags, "--no-cutout", "--no-auxiliary",
        "--drop_path_prob", 0, "--batch_size", 16, "--epochs", 4, "--save", "run", cwd=place)
    return place


def evaluate(place, *flags, file=("--weights", "run/network.pt"), status=0):
    done = run("train.py", "--evaluate", *file, *flags, cwd=place, status=status)
    return done if status == 0 else done.stderr


@pytest.mark.parametrize("file", [
    ["--weights", "run/network.pt"], ["--weights", "run/checkpoint.pt"], ["--resume", "run"],
])
def test_a_network_is_measured_with_the_mean_and_deviation_of_its_training(folders, file):
    """Whatever training images are beside the test images, if there are any."""
    place = folders
    tinted = evaluate(place, "--data", "tinted", file=file)
    own = evaluate(place, file=file)
    assert own.stdout == tinted.stdout
    assert_measures(own, place / "run")
    plain = saved(place / "run/network.pt")["weights"]
    torch.save(plain, place / "plain.pt")  # which does not know them
    flags = ["--arch", "ISTA_twostage", "--dataset", "imagefolder", "--image_size", 8]
    plain = ["--weights", "plain.pt", *flags]
    own, tinted = (evaluate(place, "--data", name, file=plain) for name in ("own", "tinted"))
    assert_measures(own, place / "run")
    assert loss(tinted) != pytest.approx(loss(own), rel=1e-3)


def test_classes_are_matched_by_name(folders):
    """Here 7 is the second class of two. The network, whose third class it is, predicts only 7."""
    place = folders
    network = saved(place / "run/network.pt")
    network["weights"]["classifier.weight"].zero_()
    network["weights"]["classifier.bias"] = torch.tensor([0.0, 0.0, 1.0])
    torch.save(network, place / "seven.pt")
    _, test = data.load("imagefolder", place / "less", 8, test_only=True)
    less = evaluate(place, "--data", "less", file=["--weights", "seven.pt"])
    assert accuracy(less) == pytest.approx(100 * test.counts()[1] / len(test), abs=0.01)
    assert f"on {len(test)} images of imagefolder (1 of the 3 classes have none)" in less.words


def test_other_classes_are_refused(folders, trained):
    place = folders
    shutil.copytree(place / "less", place / "renamed")
    (place / "renamed/test/1").rename(place / "renamed/test/one")
    for flags, unknown in (
        (["--data", "renamed"], "one"), (["--dataset", "digits"], "0, 3, 4 and 4 more"),
    ):
        err = evaluate(place, *flags, status=2)
        assert f"lacks {unknown}; it was trained with 1, 2, 7" in err and err.count("\n") == 1
    folder, _ = trained
    err = evaluate(folder, "--data", place / "renamed", "--dataset", "imagefolder", status=2,
                   file=["--weights", "t/network.pt"])
    assert "lacks one; it was trained with 0, 1, 2 and 7 more" in err
    less = evaluate(folder, "--data", place / "less", "--dataset", "imagefolder",
                    file=["--weights", "t/network.pt"])
    assert "(8 of the 10 classes have none)" in less.words


def test_a_training_lowers_the_loss(folders):
    losses = [row["train_loss"] for row in rows(folders / "run/metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_training_from_weights_takes_the_data_that_it_has(folders):
    place = folders
    run("train.py", "--weights", "run/network.pt", "--data", "tinted", "--no-cutout", "--epochs", 1,
        "--batch_size", 200, "--save", "more", cwd=place)
    old, new = (saved(place / name / "network.pt")["about"] for name in ("run", "more"))
    assert new["mean"][0] == pytest.approx(0.3 * old["mean"][0], abs=0.01)
