"""experiments/evidence.py: its statistics, and a small experiment that is stopped and goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scripts import ENVIRONMENT, ROOT, Process, await_checkpoint, killed_in

import genotypes
from utils import UserError

sys.path.append(str(ROOT / "experiments"))

import evidence

SIZES = "--init_channels 2 --layers 3 --batch_size 240"
FLAGS = [
    "--image_size", "8", "--random", "1", "--searches", "1", "--one_stage", "0",
    "--search_flags", f"{SIZES} --epochs 2",
    "--train_flags", f"{SIZES} --epochs 1 --no-auxiliary --no-cutout",
]


def main(folder, *more):
    flags = ["--save", str(folder / "out"), *FLAGS, *more]
    evidence.main(evidence.get_args_parser().parse_args(flags))


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that are run, from where torch is there already; the first search is killed."""
    (tmp_path / "kill.py").write_text(killed_in(2))
    commands = []

    def start(command, **streams):
        commands.append(" ".join(command))
        killed = "search-searched-0 " in commands[-1] and "--resume" not in commands[-1]
        prelude = tmp_path / "kill.py" if killed else None
        process = Process(*command[1:], cwd=tmp_path, prelude=prelude)
        return subprocess.CompletedProcess(command, process.wait(), stderr=process.stderr)

    monkeypatch.setattr(subprocess, "run", start)
    return commands


def test_an_experiment_goes_on_where_it_was_stopped_and_ends_in_a_table(tmp_path, commands, capsys):
    with pytest.raises(UserError, match="search-searched-0 failed: -9"):
        main(tmp_path)
    assert (tmp_path / "out/train-random-0/finished").exists()
    commands.clear()
    main(tmp_path)
    assert "search.py --resume" in commands[0]
    assert not any("train-random-0" in command for command in commands)
    cells = json.loads((tmp_path / "out/evidence.json").read_text())["cells"]
    assert [(c["group"], c["seed"]) for c in cells] == [
        ("random", 0), ("searched", 0)
    ]
    for cell in cells:
        log = (tmp_path / f"out/train-{cell['group']}-{cell['seed']}/log.txt").read_text()
        accuracy = cell["accuracy"]
        assert f"error {100 - accuracy:.2f} % after the last epoch" in log
        assert f"network: {cell['parameters'] / 1e6:.4f} M parameters" in log
        assert f"genotype = {genotypes.from_lists(cell['genotype'])}" in log
    assert len(cells[1]["changed"]) == 2
    assert (tmp_path / "out/evidence.png").exists()
    assert (tmp_path / "out/evidence.txt").read_text() in capsys.readouterr().out

    flags = json.loads((tmp_path / "out/flags.json").read_text())
    assert flags["image_size"] == 8 and flags["search_flags"] == f"{SIZES} --epochs 2"
    with pytest.raises(UserError, match="contradicts"):
        main(tmp_path, "--train_flags", SIZES)


@pytest.mark.crash
def test_a_killed_experiment_goes_on(tmp_path):
    command = [sys.executable, ROOT / "experiments/evidence.py", "--save", "out", *FLAGS]
    first = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True)
    await_checkpoint(tmp_path / "out/search-searched-0")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0 and "random 0 " in again.stdout, again.stderr
    third = subprocess.run([*command, "--train_flags", SIZES], cwd=tmp_path, env=ENVIRONMENT,
                           capture_output=True, text=True)
    assert third.returncode == 2 and third.stderr.count("\n") == 1


def parse(*flags):
    return evidence.get_args_parser().parse_args(["--save", "out", *flags])


def test_distinct_edges_hold_for_every_group():
    args = parse("--distinct_edges")
    args.save = Path(args.save)
    groups = {group: (group, seed, flags) for group, seed, flags in evidence.list_cells(args)}
    assert evidence.architecture(groups["random"], args) == "random:7:distinct"
    for group in ("searched", "one_stage"):
        assert "--distinct_edges" in groups[group][2].split()
    args.distinct_edges = False
    assert evidence.architecture(groups["random"], args) == "random:7"
    assert not any("distinct" in (flags or "") for _, _, flags in evidence.list_cells(args))


def test_learning_rates_follow_the_linear_rule():
    search, train = 0.1 / 256, 0.025 / 96  # published learning rates, over their batches
    rates = {"search_flags": search, "train_flags": train, "one_stage_flags": train}
    for name, rate_of_an_image in rates.items():
        words = vars(parse())[name].split()
        batch, rate = (words[words.index(flag) + 1] for flag in ("--batch_size", "--learning_rate"))
        assert float(rate) == pytest.approx(rate_of_an_image * int(batch), rel=0.01)


def test_what_is_known_of_a_one_stage_cell(tmp_path):
    search, training = tmp_path / "search-one_stage-0", tmp_path / "train-one_stage-0"
    for folder, row in (
        (search, dict(epoch=1, test_loss=1.0, test_accuracy=61.0, changed=3)),
        (training, dict(epoch=1, test_accuracy=80.0, parameters=5, multiply_adds=6)),
    ):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    genotype = genotypes.as_lists(genotypes.ISTA_onestage)
    (search / "genotypes.jsonl").write_text(json.dumps({"epoch": 1, **genotype}) + "\n")
    genotypes.save(search / "genotype.json", genotypes.ISTA_onestage, True)
    torch.save({"about": {"epoch": 1, "test_accuracy": 62.5}}, search / "network.pt")
    args = parse()
    args.save = tmp_path
    assert evidence.read_result(("one_stage", 0, ""), args) == dict(
        group="one_stage", seed=0, accuracy=80.0, parameters=5, multiply_adds=6,
        genotype=genotype, supernet=61.0, changed=[3], skips=1, absorbed=62.5,
    )


def rows(group, accuracies, **more):
    return [
        dict(group=group, seed=i, accuracy=a, parameters=1, multiply_adds=1)
        | {key: values[i] for key, values in more.items()}
        for i, a in enumerate(accuracies)
    ]


def test_the_text_gives_the_statistics():
    random = [50.0, 52.0, 54.0, 56.0]
    own = [55.0, 57.0, 53.0, 58.0, 54.5, 57.5]
    supernet = [40.0, 42.0, 41.0, 45.0, 43.0, 44.0]
    text = evidence.summarize(
        rows("random", random) + rows("searched", own, supernet=supernet, changed=6 * [[3, 0]])
    )
    wins = np.mean([a > b for a in own for b in random])
    assert f"a cell beats a random one in {100 * wins:.0f} % of 6×4 pairs" in text
    assert f"average random cell {100 * (np.mean(own) - 53) / 53:+.2f} %" in text
    assert f"after training {stats.kendalltau(supernet, own).statistic:+.2f} (" in text
    assert f"searched: {np.mean(own):.2f} ± {np.std(own, ddof=1):.2f} %" in text


@pytest.mark.parametrize("count", [5, 6])
def test_one_stage_cells_are_ranked_where_there_are_enough(count):
    supernet = [float(k) for k in range(count)]
    one_stage = rows("one_stage", supernet, supernet=supernet, changed=count * [[1]])
    assert ("one_stage: Kendall's tau" in evidence.summarize(one_stage)) == (count == 6)
    right = evidence.draw_figure(one_stage).axes[1]
    assert len(right.lines) == (count == 6)


def test_draws_count_half():
    assert evidence.beats([1.0, 1.0], [1.0, 1.0]) == 50


@pytest.mark.parametrize("effect", [0.0, 3.0])
def test_the_interval_tells_a_large_effect_from_none(effect):
    rng = np.random.default_rng(1)
    a, b = effect + rng.normal(size=8), rng.normal(size=8)
    found = evidence.interval((a, b), evidence.beats)
    assert found[0] <= evidence.beats(a, b) <= found[1]
    assert (found[0] > 50) == (effect > 0)


def test_the_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "log.txt").touch()
    with pytest.raises(UserError, match="something else"):
        evidence.main(evidence.get_args_parser().parse_args(["--save", str(tmp_path)]))
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
