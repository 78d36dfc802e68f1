"""experiments/evidence.py: its statistics, and a small experiment that is killed and resumed."""

import json
import subprocess
from pathlib import Path

import evidence
import numpy as np
import pytest
from scipy import stats
from scripts import Process, killed_in

import genotypes
from utils import UserError

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
    """Run commands in forked processes and record them; the first search is killed."""
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


def test_a_stopped_experiment_resumes_and_ends_in_a_table(tmp_path, commands, capsys):
    with pytest.raises(UserError, match="search-searched-0 failed: -9"):
        main(tmp_path)
    assert (tmp_path / "out/train-random-0/finished").exists()
    commands.clear()
    main(tmp_path)
    assert "search.py --resume" in commands[0]
    assert not any("train-random-0" in command for command in commands)
    cells = json.loads((tmp_path / "out/evidence.json").read_text())["cells"]
    assert [(c["group"], c["seed"]) for c in cells] == [("random", 0), ("searched", 0)]
    for cell in cells:
        log = (tmp_path / f"out/train-{cell['group']}-{cell['seed']}/log.txt").read_text()
        assert f"error {100 - cell['accuracy']:.2f} % after the last epoch" in log
        assert f"network: {cell['parameters'] / 1e6:.4f} M parameters" in log
        assert f"genotype = {genotypes.from_lists(cell['genotype'])}" in log
    assert len(cells[1]["changed"]) == 2
    assert (tmp_path / "out/evidence.png").exists()
    assert (tmp_path / "out/evidence.txt").read_text() in capsys.readouterr().out
    with pytest.raises(UserError, match="contradicts"):
        main(tmp_path, "--train_flags", SIZES)


def parse(*flags):
    return evidence.get_args_parser().parse_args(["--save", "out", *flags])


def test_distinct_edges_apply_to_every_group():
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
    search, train = 0.1 / 256, 0.025 / 96  # published learning rates divided by batch sizes
    rates = {"search_flags": search, "train_flags": train, "one_stage_flags": train}
    for name, rate_per_image in rates.items():
        words = vars(parse())[name].split()
        batch, rate = (words[words.index(flag) + 1] for flag in ("--batch_size", "--learning_rate"))
        assert float(rate) == pytest.approx(rate_per_image * int(batch), rel=0.01)


def rows(group, accuracies, **more):
    return [
        dict(group=group, seed=i, accuracy=a, parameters=1, multiply_adds=1)
        | {key: values[i] for key, values in more.items()}
        for i, a in enumerate(accuracies)
    ]


def test_the_summary_has_the_statistics():
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
def test_kendalls_tau_needs_6_one_stage_cells(count):
    supernet = [float(k) for k in range(count)]
    one_stage = rows("one_stage", supernet, supernet=supernet, changed=count * [[1]])
    assert ("one_stage: Kendall's tau" in evidence.summarize(one_stage)) == (count == 6)
    right = evidence.draw_figure(one_stage).axes[1]
    assert len(right.lines) == (count == 6)


def test_ties_count_half():
    assert evidence.beats([1.0, 1.0], [1.0, 1.0]) == 50


@pytest.mark.parametrize("effect", [0.0, 3.0])
def test_the_interval_excludes_50_only_if_there_is_an_effect(effect):
    rng = np.random.default_rng(1)
    a, b = effect + rng.normal(size=8), rng.normal(size=8)
    found = evidence.interval((a, b), evidence.beats)
    assert found[0] <= evidence.beats(a, b) <= found[1]
    assert (found[0] > 50) == (effect > 0)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "log.txt").touch()
    with pytest.raises(UserError, match="something else"):
        evidence.main(evidence.get_args_parser().parse_args(["--save", str(tmp_path)]))
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
