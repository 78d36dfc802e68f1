"""search.py and train.py from the command line: what they do, print and leave behind."""

import json
import re
import shlex
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ONE_STAGE, TINY, TRAIN, TWO_STAGE, assert_same_run, rows, run

import data
import genotypes
import ista
import model
import search
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
    done = run(*ONE_STAGE, "--epochs", 3, "--save", "one", cwd=folder)
    return folder, done.stdout


def assert_changes_are_counted(path):
    """Each epoch counts the pairs that the one before did not have, and names just these."""
    found, metrics = rows(path / "genotypes.jsonl"), rows(path / "metrics.jsonl")
    table = (path / "log.txt").read_text().split(" pairs changed ")[1]
    named = [0] + [len(line.split("; ")) for line in table.splitlines() if " → " in line]
    for a, b, row in zip(found, found[1:], metrics[1:], strict=False):
        new = [set(map(tuple, b[cell][i : i + 2])) - set(map(tuple, a[cell][i : i + 2]))
               for cell in ("normal", "reduce") for i in range(0, 8, 2)]
        assert row["changed"] == sum(map(len, new))
    assert named[1:] == [row["changed"] for row in metrics if row["changed"]]
    assert table.count("Genotype(") == 1, "whole, only at the end"


# ------------------------------------------------------------------------------------------------
# Two-stage search
# ------------------------------------------------------------------------------------------------


def test_a_search_leaves_what_its_folder_should_hold(searched):
    folder, stdout = searched
    path = folder / "two"
    for name in ("config.json", "log.txt", "checkpoint.pt", "scripts/search.py", "cells.png",
                 "search.png", "curves.png"):
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
    accuracy = re.findall(r"test accuracy (\S+) %", done.stdout)[0]
    measured = run(*evaluate, cwd=folder).stdout
    assert f"test accuracy {accuracy} %" in measured
    assert not list(folder.glob("runs*")), "evaluating makes no folder"


def test_the_same_seed_gives_the_same_search_and_another_another(searched, tmp_path):
    folder, _ = searched
    run(*TWO_STAGE, "--epochs", 4, "--save", "again", cwd=tmp_path)
    assert_same_run(folder / "two", tmp_path / "again")
    run(*TWO_STAGE, "--epochs", 1, "--seed", 3, "--save", "other", cwd=tmp_path)
    assert rows(tmp_path / "other/metrics.jsonl")[0] != rows(folder / "two/metrics.jsonl")[0]


def test_images_are_not_kept_twice_when_they_are_split(tmp_path, monkeypatch):
    loaded, load, epoch = [], data.load, search.two_stage_epoch

    def watched(*args):
        splits = load(*args)
        loaded.extend(weakref.ref(split.images) for split in splits)
        return splits

    def looking(*args):
        assert [image() for image in loaded] == [None, None]
        return epoch(*args)

    monkeypatch.setattr(data, "load", watched)
    monkeypatch.setattr(search, "two_stage_epoch", looking)
    run(*TWO_STAGE, "--epochs", 1, "--save", "s", cwd=tmp_path)


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_a_search_that_recovers_every_few_steps_ends_with_a_recovery(tmp_path, steps):
    flags = ["--epochs", 2, "--recover_every", steps, "--save", "r"]  # of 3 steps each
    run(*TWO_STAGE, *flags, cwd=tmp_path)
    metrics = rows(tmp_path / "r/metrics.jsonl")
    assert ("distance" in metrics[0]) == (steps == 1) and "distance" in metrics[1]
    assert_changes_are_counted(tmp_path / "r")
    state = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["net"]
    for code in ("normal_code", "reduce_code"):
        for j in range(4):
            A, b, z = (state[f"{code}.{key}{j}"].double().numpy() for key in ("A", "b.", "z"))
            assert np.allclose(z, ista.recover(A, b).z, atol=1e-6), "z is the code of b"


def test_a_solver_that_does_not_converge_is_warned_of_once(tmp_path, monkeypatch):
    """However many of its codes that are, which is another number at each recovery."""
    counts, recover = [], Network.recover

    def count(net, *args):
        recovery = recover(net, *args)
        counts.append(recovery.not_converged)
        return recovery

    monkeypatch.setattr(Network, "recover", count)
    monkeypatch.setattr(ista, "MAX_ITER", 40)
    flags = ["--epochs", 3, "--solver", "ista", "--save", "s"]
    stdout = run(*TWO_STAGE, *flags, cwd=tmp_path).stdout
    assert len(set(counts) - {0}) > 1
    assert stdout.count("a relative duality gap above 1e-09") == stdout.count("homotopy") == 1
    first = next(filter(None, counts))
    assert f"in some codes ({first} of 8 at first); those are homotopy's" in stdout


@pytest.mark.parametrize("flags, says", [
    ([], True), (["--learning_rate", 0.1], False), (["--batch_size", 256], False),
])
def test_the_learning_rate_of_another_batch_is_said_once(tmp_path, flags, says):
    done = run(*TWO_STAGE, *flags, "--epochs", 1, "--save", "s", cwd=tmp_path)
    assert ("the linear rule gives --learning_rate 0.0938" in done.stdout) == says
    assert done.stdout.count("linear rule") == says


def test_restless_epochs_are_counted_over_a_resumption(tmp_path):
    flags = ["--arch_learning_rate", 0.1]
    run(*TWO_STAGE, *flags, "--epochs", 2, "--save", "r", cwd=tmp_path)
    run("search.py", "--resume", "r", "--epochs", 4, cwd=tmp_path)
    metrics = rows(tmp_path / "r/metrics.jsonl")
    expected = 0
    for row in metrics:
        expected = expected + 1 if row["changed"] else 0
        assert row["restless"] == expected
    assert metrics[2]["restless"] > 1


def test_a_clock_that_is_set_back_makes_no_time_negative(tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    flags = ["--epochs", 2, "--report_freq", 1, "--save", "s"]
    stdout = run(*TWO_STAGE, *flags, cwd=tmp_path).stdout
    assert re.findall(r"\d s\b", stdout) and not re.findall(r"-\d+ (?:s|min|h|images)\b", stdout)
    assert all(row["seconds"] > 0 for row in map(
        json.loads, (tmp_path / "s/metrics.jsonl").read_text().splitlines()))


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
    assert "--batch_size is 12" in done.stdout and "no normal cell" in done.stdout
    assert "resized" in done.stdout and "12 images train the weights" in done.stdout
    (command,) = next_commands(done.stdout)
    assert command[-1] == "my images"
    state = torch.load(tmp_path / "s/checkpoint.pt", weights_only=True)["net"]
    assert len(state["classifier.weight"]) == 3


# ------------------------------------------------------------------------------------------------
# One-stage search
# ------------------------------------------------------------------------------------------------


def test_one_stage_search_ends_in_a_trained_network(one_stage):
    folder, stdout = one_stage
    metrics = rows(folder / "one/metrics.jsonl")
    searching = [row for row in metrics if "frozen" in row]
    assert len(metrics) == len(searching) + 3
    assert {row["learning_rate"] for row in searching} == {0.025}
    assert {row["drop_path_prob"] for row in searching} == {0.0}
    fixed = metrics[len(searching) :]
    assert [round(row["drop_path_prob"], 6) for row in fixed] == [0, round(0.2 / 3, 6),
                                                                  round(0.4 / 3, 6)]
    assert fixed[0]["learning_rate"] == 0.025 > fixed[1]["learning_rate"]
    frozen = [sum(row["frozen"]) for row in searching]
    assert frozen == sorted(frozen)
    before, after = re.search(
        r"test accuracy (\S+) % in the supernet, (\S+) % after absorption", stdout
    ).groups()
    assert before == after
    assert "parameters freed" in stdout or "frees" in stdout
    assert "from here on drop-path rises to 0.2, which lowers the training accuracy" in stdout
    evaluate, train = next_commands(stdout)
    assert f"test accuracy {after} %" in run(*evaluate, cwd=folder).stdout
    done = run(*train, "--epochs", 1, "--batch_size", 480, "--save", "more", cwd=folder)
    assert rows(folder / "more/metrics.jsonl")[0]["epoch"] == 1
    assert genotypes.load(folder / "more/genotype.json") == genotypes.load(
        folder / "one/genotype.json"
    )
    assert "new run" in done.stdout


def test_what_does_not_come_to_rest_is_taken_as_it_is(tmp_path):
    flags = [*ONE_STAGE, "--epochs", 1, "--freeze_tol", 0, "--max_search_epochs", 2]
    done = run(*flags, "--save", "one", cwd=tmp_path)
    assert "warning: 8 of 8 nodes still moved" in done.stdout
    assert len(rows(tmp_path / "one/metrics.jsonl")) == 3
    assert genotypes.load(tmp_path / "one/genotype.json")[1] is True


def test_candidates_that_are_too_large_are_rejected(tmp_path):
    flags = [*ONE_STAGE, "--epochs", 1, "--max_params", 1e-6, "--max_search_epochs", 2]
    done = run(*flags, "--freeze_tol", 100, "--save", "one", cwd=tmp_path)
    metrics = rows(tmp_path / "one/metrics.jsonl")
    assert all(row["rejected"] and row["changed"] == 0 for row in metrics[:2])
    assert not any(metrics[0]["frozen"]), "what is rejected freezes nothing"
    assert "rejected" in done.stdout
    found = rows(tmp_path / "one/genotypes.jsonl")
    assert found[0]["normal"] == found[-1]["normal"]


# ------------------------------------------------------------------------------------------------
# Resuming
# ------------------------------------------------------------------------------------------------


def test_a_search_goes_on_with_more_epochs(searched, tmp_path):
    folder, _ = searched
    run(*TWO_STAGE, "--epochs", 2, "--save", "r", cwd=tmp_path)
    done = run("search.py", "--resume", "r", "--epochs", 4, cwd=tmp_path)
    assert "resumed r after epoch 2" in done.stdout
    assert "the schedule of 4 epochs" in done.stdout
    metrics = rows(tmp_path / "r/metrics.jsonl")
    assert [row["epoch"] for row in metrics] == [1, 2, 3, 4]
    # From here on, the schedule is that of 4 epochs.
    whole = rows(folder / "two/metrics.jsonl")
    assert [row["learning_rate"] for row in metrics[2:]] == [
        row["learning_rate"] for row in whole[2:]
    ]


def test_resuming_a_finished_run_restores_its_files(one_stage):
    folder, _ = one_stage
    path = folder / "one"
    before = torch.load(path / "network.pt", weights_only=True)["weights"]
    (path / "network.pt").unlink()
    (path / "genotype.json").unlink()
    done = run("search.py", "--resume", path / "checkpoint.pt", cwd=folder)
    after = torch.load(path / "network.pt", weights_only=True)["weights"]
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (path / "genotype.json").exists()
    assert next_commands(done.stdout)


# ------------------------------------------------------------------------------------------------
# Retraining
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = run(*TRAIN, "--epochs", 3, "--save", "t", cwd=folder)
    return folder, done.stdout


def test_training_reports_size_and_cost(trained):
    folder, stdout = trained
    assert re.search(r"network: 0\.\d{4} M parameters, \d+\.\d M multiply-adds", stdout)
    metrics = rows(folder / "t/metrics.jsonl")
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.025, 0.01875, 0.00625])
    assert [row["drop_path_prob"] for row in metrics] == pytest.approx([0, 0.2 / 3, 0.4 / 3])
    best = max(row["test_accuracy"] for row in metrics)
    saved = torch.load(folder / "t/network-best.pt", weights_only=True)
    assert saved["about"]["test_accuracy"] == best == metrics[-1]["best_accuracy"]
    assert any(key.startswith("auxiliary_head") for key in saved["weights"])


@pytest.mark.parametrize("flags", [
    ["--weights", "t/network.pt"], ["--weights", "t/checkpoint.pt"], ["--resume", "t"],
    ["--resume", "t/checkpoint.pt"], ["--weights", "t/network.pt", "--arch", "ISTA_twostage"],
    ["--weights", "t/network.pt", "--no-auxiliary"],
])
def test_evaluation_measures_the_same_from_every_file(trained, flags):
    folder, stdout = trained
    accuracy = re.findall(r"test accuracy (\S+) %, error", stdout)[0]
    before = sorted(folder.rglob("*"))
    done = run("train.py", "--evaluate", *flags, cwd=folder)
    assert f"test accuracy {accuracy} %" in done.stdout
    assert sorted(folder.rglob("*")) == before


def test_a_plain_state_dict_needs_its_genotype(trained):
    folder, stdout = trained
    accuracy = re.findall(r"test accuracy (\S+) %, error", stdout)[0]
    weights = torch.load(folder / "t/network.pt", weights_only=True)["weights"]
    old = {f"module.{k}": v for k, v in weights.items() if "num_batches_tracked" not in k}
    torch.save({"state_dict": old, "epoch": 600}, folder / "darts.pt")
    flags = ["--evaluate", "--weights", "darts.pt", "--dataset", "digits", "--image_size", 8]
    done = run("train.py", *flags, "--arch", "ISTA_twostage", cwd=folder)
    assert f"test accuracy {accuracy} %" in done.stdout
    assert "give --arch" in run("train.py", *flags, cwd=folder, status=2).stderr
    wrong = run("train.py", *flags, "--arch", "ISTA_onestage", cwd=folder, status=2)
    assert "does not fit" in wrong.stderr


@pytest.mark.parametrize("kind", ["trained", "one_stage"])
def test_a_network_is_used_from_python(request, kind):
    folder, stdout = request.getfixturevalue(kind)
    net, about = model.load(next(folder.glob("*/network.pt")))
    _, test = data.load("digits", None, about["image_size"])
    logits, _ = net(data.normalize(test.images, about["mean"], about["std"]))
    names = [about["classes"][k] for k in logits.argmax(1)]
    right = sum(name == test.classes[k] for name, k in zip(names, test.labels, strict=True))
    said = re.findall(r"(\S+) % after absorption|(\S+) %, error", stdout)
    assert f"{100 * right / len(test):.2f}" in said[-1]


def test_training_goes_on_from_weights_as_a_new_run(trained):
    folder, _ = trained
    flags = ["--weights", "t/network.pt", "--epochs", 1, "--batch_size", 480, "--no-cutout"]
    run("train.py", *flags, "--save", "more", cwd=folder)
    assert len(rows(folder / "more/metrics.jsonl")) == 1
    state = torch.load(folder / "more/checkpoint.pt", weights_only=True)
    assert state["config"]["C"] == 2 and state["config"]["layers"] == 3


def test_a_run_resumes_when_its_genotype_file_is_gone(tmp_path):
    genotypes.save(tmp_path / "g.json", genotypes.draw(1), False)
    flags = [*TINY, "--no-cutout", "--batch_size", 480, "--epochs", 1, "--arch", "g.json",
             "--save", "t"]
    run("train.py", *flags, cwd=tmp_path)
    genotypes.save(tmp_path / "g.json", genotypes.draw(2), False)
    run("train.py", "--resume", "t", "--epochs", 2, cwd=tmp_path)
    (tmp_path / "g.json").unlink()
    run("train.py", "--resume", "t", "--epochs", 3, cwd=tmp_path)
    assert genotypes.load(tmp_path / "t")[0] == genotypes.draw(1)


def test_a_genotype_text_and_a_random_cell_can_be_trained(tmp_path):
    for arch in (str(genotypes.ISTA_onestage), "random:3"):
        flags = [*TINY, "--no-cutout", "--batch_size", 480, "--epochs", 1, "--arch", arch]
        done = run("train.py", *flags, "--no-auxiliary", "--one_stage", cwd=tmp_path)
        path = Path(tmp_path, re.search(r"new run in (\S+)", done.stdout)[1])
        assert genotypes.load(path / "genotype.json") == (genotypes.load(arch)[0], True)


def test_a_one_stage_search_freezes_all_nodes_by_itself_and_learns(tmp_path):
    flags = [*TINY, "--init_channels", 6, "--batch_size", 32, "--arch_learning_rate", 0.02,
             "--learning_rate", 0.05, "--freeze_tol", 0.1, "--no-cutout", "--drop_path_prob", 0,
             "--epochs", 2]
    done = run("search.py", "--one_stage", *flags, "--save", "one", cwd=tmp_path)
    searching = [row for row in rows(tmp_path / "one/metrics.jsonl") if "frozen" in row]
    assert "warning" not in done.stdout and len(searching) < 100
    assert all(searching[-1]["frozen"]) and not all(searching[0]["frozen"])
    before, after = re.search(
        r"test accuracy (\S+) % in the supernet, (\S+) % after absorption", done.stdout
    ).groups()
    assert before == after and float(after) > 40  # chance is 10
    measured = run("train.py", "--evaluate", "--weights", "one/network.pt", cwd=tmp_path).stdout
    assert f"test accuracy {after} %" in measured
