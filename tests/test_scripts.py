"""search.py and train.py from the command line: what they do, print and write."""

import json
import re
import shlex
import shutil
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
from harness import runs
from model_search import Network


def next_commands(stdout):
    """The commands that a script suggests at its end."""
    return [shlex.split(line)[1:] for line in stdout.splitlines() if line.startswith("    python ")]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished two-stage search: its folder and its output."""
    folder = tmp_path_factory.mktemp("searched")
    return folder, run(*TWO_STAGE, "--epochs", 4, "--save", "two", cwd=folder, pictures=True)


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory):
    """A finished one-stage search; the architecture is fixed in its last 3 epochs."""
    folder = tmp_path_factory.mktemp("one_stage")
    return folder, run(*ONE_STAGE, "--epochs", 3, "--save", "one", cwd=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training of 3 epochs."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(*TRAIN, "--epochs", 3, "--save", "t", cwd=folder)


def assert_changes_are_counted(path):
    """Assert that each epoch counts the pairs that the previous one did not have."""
    found, metrics = rows(path / "genotypes.jsonl"), rows(path / "metrics.jsonl")
    for a, b, row in zip(found, found[1:], metrics[1:], strict=False):
        new = [set(map(tuple, b[cell][i : i + 2])) - set(map(tuple, a[cell][i : i + 2]))
               for cell in ("normal", "reduce") for i in range(0, 8, 2)]
        assert row["changed"] == sum(map(len, new))


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
    """Assert that an evaluation finds the loss and the accuracy of the last epoch of a run."""
    row = rows(path / "metrics.jsonl")[-1]
    assert loss(done) == pytest.approx(row["test_loss"], rel=1e-3)
    assert accuracy(done) == nearly(row["test_accuracy"])


# ------------------------------------------------------------------------------------------------
# Two-stage search
# ------------------------------------------------------------------------------------------------


def test_files_of_a_search(searched):
    folder, done = searched
    path = folder / "two"
    for name in ("config.json", "checkpoint.pt", "scripts/search.py", "scripts/harness/runs.py",
                 "cells.png", "search.png", "curves.png"):
        assert (path / name).exists(), name
    assert (path / "log.txt").read_text() == done.stdout
    config = json.loads((path / "config.json").read_text())
    assert config["init_channels"] == 2 and config["learning_rate"] == 0.1 and config["seed"] == 2
    metrics, found = rows(path / "metrics.jsonl"), rows(path / "genotypes.jsonl")
    assert [row["epoch"] for row in metrics] == [row["epoch"] for row in found] == [1, 2, 3, 4]
    genotype, one_stage = genotypes.load(path / "genotype.json")
    assert not one_stage and f"genotype = {genotype}" in done.stdout
    assert genotypes.as_lists(genotype)["normal"] == found[-1]["normal"]
    assert_changes_are_counted(path)
    assert metrics[0]["learning_rate"] == 0.1, "the schedule starts at the full learning rate"


def test_the_suggested_commands_train_and_evaluate_the_genotype(searched):
    folder, done = searched
    (flags,) = next_commands(done.stdout)
    small = ["--init_channels", 2, "--layers", 3, "--batch_size", 480, "--epochs", 1]
    done = run(*flags, *small, "--save", "t", cwd=folder)
    (evaluate,) = next_commands(done.stdout)
    assert_measures(run(*evaluate, cwd=folder), folder / "t")
    assert not list(folder.glob("runs*")), "an evaluation creates no folder"


def test_equal_seeds_give_equal_searches(searched, tmp_path):
    folder, _ = searched
    run(*TWO_STAGE, "--epochs", 4, "--save", "again", cwd=tmp_path)
    assert_same_run(folder / "two", tmp_path / "again")
    run(*TWO_STAGE, "--epochs", 1, "--seed", 3, "--save", "other", cwd=tmp_path)
    assert rows(tmp_path / "other/metrics.jsonl")[0] != rows(folder / "two/metrics.jsonl")[0]


@pytest.mark.parametrize("steps", [1, 4])
def test_a_search_that_recovers_every_few_steps_ends_with_a_recovery(tmp_path, steps):
    flags = ["--epochs", 2, "--recover_every", steps, "--save", "r"]  # an epoch has 3 steps
    run(*TWO_STAGE, *flags, cwd=tmp_path)
    metrics = rows(tmp_path / "r/metrics.jsonl")
    assert ("distance" in metrics[0]) == (steps == 1) and "distance" in metrics[1]
    assert_changes_are_counted(tmp_path / "r")
    state = saved(tmp_path / "r/checkpoint.pt")["net"]
    for code in ("normal_code", "reduce_code"):
        for j in range(4):
            A, b, z = (state[f"{code}.{key}{j}"].double().numpy() for key in ("A", "b.", "z"))
            assert np.allclose(z, ista.recover(A, b).z, atol=1e-6), "z is the code of b"


def test_distinct_edges_hold_in_the_genotype(tmp_path):
    run(*TWO_STAGE, "--epochs", 2, "--distinct_edges", "--save", "d", cwd=tmp_path)
    genotype, _ = genotypes.load(tmp_path / "d/genotype.json")
    assert genotypes.has_distinct_edges(genotype)


def test_a_search_on_a_folder_of_images(tmp_path):
    colors = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    for part, count in (("train", 8), ("val", 2)):
        for name, color in colors.items():
            folder = tmp_path / "my images" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (20 + k, 31), color).save(folder / f"{k}.png")
    flags = ["--dataset", "imagefolder", "--data", "my images", "--init_channels", "2",
             "--layers", "2"]
    done = run("search.py", *flags, "--epochs", 1, "--save", "s", cwd=tmp_path)
    (command,) = next_commands(done.stdout)
    assert command[-1] == "my images"
    checkpoint = saved(tmp_path / "s/checkpoint.pt")
    assert checkpoint["args"]["batch_size"] == 12, "half of the training images"
    assert len(checkpoint["net"]["classifier.weight"]) == 3


# ------------------------------------------------------------------------------------------------
# One-stage search
# ------------------------------------------------------------------------------------------------


def test_one_stage_search_ends_with_a_trained_network(one_stage):
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
    evaluate, train = next_commands(done.stdout)
    measured = run(*evaluate, cwd=folder)
    assert_measures(measured, folder / "one")
    absorbed = r"test accuracy (\S+) % in the supernet, (\S+) % after absorption"
    before, after = map(float, re.search(absorbed, done.words).groups())
    assert before == nearly(after) and accuracy(measured) == nearly(after)
    run(*train, "--epochs", 1, "--batch_size", 480, "--save", "more", cwd=folder)
    assert [row["epoch"] for row in rows(folder / "more/metrics.jsonl")] == [1]
    assert genotypes.load(folder / "more") == genotypes.load(folder / "one")


@pytest.mark.crash
def test_max_search_epochs_fixes_an_architecture_that_has_not_converged(tmp_path):
    flags = [*ONE_STAGE, "--epochs", 1, "--freeze_tol", 0, "--max_search_epochs", 2]
    done = run(*flags, "--save", "one", cwd=tmp_path)
    assert "warning: 8 of 8 nodes" in done.words
    assert len(rows(tmp_path / "one/metrics.jsonl")) == 3
    more = ["--resume", "one", "--max_search_epochs", 3]  # the architecture is already fixed
    assert "contradicts" in run("search.py", *more, cwd=tmp_path, status=2).stderr

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
    assert not any(metrics[0]["frozen"])
    assert "rejected by --max_params 1e-06" in done.words


def test_search_ends_when_the_last_node_freezes_and_resumes_to_the_bit(tmp_path, monkeypatch):
    freeze, save = Network.freeze, runs.Run.save_checkpoint

    def freeze_three_more(net, nodes):
        freeze(net, [k < sum(net.frozen) + 3 for k in range(len(nodes))])

    def save_and_stop(self, **state):
        save(self, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Network, "freeze", freeze_three_more)
    flags = [*ONE_STAGE, "--max_search_epochs", 9, "--epochs", 1]
    run(*flags, "--save", "one", cwd=tmp_path)
    metrics = rows(tmp_path / "one/metrics.jsonl")
    assert [sum(row["frozen"]) for row in metrics[:-1]] == [3, 6, 8]
    assert metrics[-1]["phase"] == "training"

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save_checkpoint", save_and_stop)
        run(*flags, "--save", "resumed", cwd=tmp_path)
    run("search.py", "--resume", "resumed", cwd=tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / "resumed")


# ------------------------------------------------------------------------------------------------
# Resuming (test_crash.py compares resumed runs to the bit)
# ------------------------------------------------------------------------------------------------


def test_a_search_resumes_with_more_epochs(searched, tmp_path):
    folder, _ = searched
    run(*TWO_STAGE, "--epochs", 2, "--save", "r", cwd=tmp_path)
    done = run("search.py", "--resume", "r", "--epochs", 4, cwd=tmp_path)
    assert "resumed r after epoch 2" in done.words and "the schedule of 4 epochs" in done.words
    metrics, whole = rows(tmp_path / "r/metrics.jsonl"), rows(folder / "two/metrics.jsonl")
    assert [row["epoch"] for row in metrics] == [1, 2, 3, 4]
    for epoch in (2, 3):  # the schedule is now that of 4 epochs
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


def test_a_run_resumes_without_its_genotype_file_and_a_newer_flag(tmp_path):
    genotypes.save(tmp_path / "g.json", genotypes.draw(1), False)
    run(*TRAIN, "--arch", "g.json", "--epochs", 1, "--save", "t", cwd=tmp_path)
    (tmp_path / "g.json").unlink()
    state = saved(tmp_path / "t/checkpoint.pt")
    del state["args"]["label_smoothing"]  # as if this version had added the flag
    torch.save(state, tmp_path / "t/checkpoint.pt")
    run("train.py", "--resume", "t", "--epochs", 2, cwd=tmp_path)
    assert genotypes.load(tmp_path / "t")[0] == genotypes.draw(1)
    assert saved(tmp_path / "t/checkpoint.pt")["args"]["label_smoothing"] == 0


def test_each_start_is_recorded_and_changed_sources_are_copied(tmp_path, monkeypatch):
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "harness", sources / "harness")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, sources)
    monkeypatch.setattr(runs, "SOURCES", sources)
    run(*TRAIN, "--epochs", 1, "--save", "t", cwd=tmp_path)

    def resume(epochs):
        done = run("train.py", "--resume", "t", "--epochs", epochs, cwd=tmp_path)
        return re.findall(r"sources have changed since the last start .*?: (.*?);", done.words)

    assert resume(2) == []
    for name in ("train.py", "harness/runs.py"):
        (sources / name).write_text("edited")
    assert resume(3) == ["harness/runs.py, train.py"]
    assert (tmp_path / "t/scripts/train.py").read_text() == (ROOT / "train.py").read_text()
    copied = tmp_path / "t/scripts-after-epoch-2"
    assert (copied / "train.py").read_text() == (copied / "harness/runs.py").read_text() == "edited"
    assert (copied / "model.py").exists(), "the copy is complete"
    starts = rows(tmp_path / "t/starts.jsonl")
    assert [start["typed"][1:3] for start in starts] == [TRAIN[1:3]] + 2 * [["--resume", "t"]]
    assert all(start["torch"] == torch.__version__ for start in starts)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def test_training_reports_size_cost_and_best_accuracy(trained):
    folder, done = trained
    assert re.search(r"network: 0\.\d{4} M parameters, \d+\.\d M multiply-adds", done.words)
    metrics = rows(folder / "t/metrics.jsonl")
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.025, 0.01875, 0.00625])
    assert [row["drop_path_prob"] for row in metrics] == pytest.approx([0, 0.2 / 3, 0.4 / 3])
    best = max(row["test_accuracy"] for row in metrics)
    network = saved(folder / "t/network-best.pt")
    assert network["about"]["test_accuracy"] == best == metrics[-1]["best_accuracy"]
    assert any(key.startswith("auxiliary_head") for key in network["weights"])


def test_a_genotype_can_be_given_as_text_file_or_seed(tmp_path):
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
def test_evaluation_gives_the_same_result_from_every_file(trained, flags):
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


def write_digits(images, root, classes, tint=(1, 1, 1)):
    """Write the images of some classes to files. A tint changes their mean and deviation."""
    for k, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        name = images.classes[label]
        if name in classes:
            (root / name).mkdir(parents=True, exist_ok=True)
            pixels = (image.permute(1, 2, 0) * torch.tensor(tint)).byte().numpy()
            Image.fromarray(pixels).save(root / name / f"{k}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of digits, and a network that was trained on 3 of the classes."""
    place = tmp_path_factory.mktemp("folders")
    train, test = data.load("digits", None, 8)
    write_digits(train, place / "own/train", "127")
    write_digits(test, place / "own/test", "127")
    write_digits(train, place / "tinted/train", "127", (0.3, 1, 0.6))
    write_digits(test, place / "tinted/test", "127")
    write_digits(test, place / "less/test", "17")
    flags = ["--dataset", "imagefolder", "--data", "own", *TINY[2:], "--init_channels", 4]
    run("train.py", "--arch", "ISTA_twostage", *flags, "--no-cutout", "--no-auxiliary",
        "--drop_path_prob", 0, "--batch_size", 16, "--epochs", 4, "--save", "run", cwd=place)
    losses = [row["train_loss"] for row in rows(place / "run/metrics.jsonl")]
    assert losses[-1] < losses[0]
    return place


def evaluate(place, *flags, status=0):
    return run("train.py", "--evaluate", *flags, cwd=place, status=status)


@pytest.mark.parametrize("file", [
    ["--weights", "run/network.pt"], ["--weights", "run/checkpoint.pt"], ["--resume", "run"],
])
def test_evaluation_uses_the_mean_and_deviation_of_the_training(folders, file):
    own, tinted = (evaluate(folders, *file, "--data", name) for name in ("own", "tinted"))
    assert own.stdout == tinted.stdout
    assert_measures(own, folders / "run")


def test_classes_are_matched_by_name(folders):
    # 7 is the second class of the data and the third class of the network, which predicts only 7.
    network = saved(folders / "run/network.pt")
    network["weights"]["classifier.weight"].zero_()
    network["weights"]["classifier.bias"] = torch.tensor([0.0, 0.0, 1.0])
    torch.save(network, folders / "seven.pt")
    _, test = data.load("imagefolder", folders / "less", 8, test_only=True)
    less = evaluate(folders, "--weights", "seven.pt", "--data", "less")
    assert accuracy(less) == pytest.approx(100 * test.counts()[1] / len(test), abs=0.01)
    assert f"on {len(test)} images of imagefolder (1 of the 3 classes have none)" in less.words


def test_classes_that_the_network_does_not_have_are_refused(folders):
    shutil.copytree(folders / "less", folders / "renamed")
    (folders / "renamed/test/1").rename(folders / "renamed/test/one")
    done = evaluate(folders, "--weights", "run/network.pt", "--data", "renamed", status=2)
    assert "lacks one; it was trained with 1, 2, 7" in done.stderr
