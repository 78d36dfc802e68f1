"""experiments/follow.py: supernets, walks, searches and directions, and their resumption."""

import json

import follow
import numpy as np
import pytest
import torch
from scripts import run

import genotypes
import search
from utils import UserError

follow.EPOCH = 20  # steps between two recoveries of a walk
SIZES = "--init_channels 2 --layers 3 --batch_size 240 --epochs 2"
FLAGS = ["--dataset", "digits", "--image_size", "8", "--search_flags", SIZES, "--supernets", "1",
         "--supernet_epochs", "2", "--cells", "4", "--walks", "1", "--steps", "40", "--seeds", "1"]


def parse(folder, *more):
    return follow.get_args_parser().parse_args(["--save", str(folder), *FLAGS, *more])


def call(folder, *more):
    follow.main(parse(folder, *more))
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a trained supernet."""
    folder = tmp_path_factory.mktemp("follow")
    call(folder, "train")
    return folder


def supernet(folder, condition="uniform"):
    one = follow.Supernet(parse(folder, "walk"), 0, 0, condition)
    one.load()
    return one


def test_run_only_runs_the_genotype_with_weights_1(trained):
    one, cell = supernet(trained), genotypes.draw(0, distinct_edges=True)
    one.run_only(cell)
    assert one.net.genotype() == cell
    assert all((code.active_weights() == 1).all() for code in one.net.codes)
    assert one.measure(cell) == one.measure(cell) != one.measure(genotypes.draw(1, True))


def test_an_interrupted_training_resumes(trained, tmp_path, monkeypatch):
    step, calls = search.weight_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # in the second epoch of three steps
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(search, "weight_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, "train")
    row = call(tmp_path, "train")[0]
    assert len(calls) == 4 + 3 and row == call(trained, "train")[0] and len(row["losses"]) == 4
    files = [torch.load(folder / "supernet-0.pt")["net"] for folder in (trained, tmp_path)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.mark.parametrize("condition, weight_decay, every", [
    ("normal", 1e-3, 20), ("rate ∝ |b|", 1e-3, 20), ("decay of b", 0.1, 20),
    ("b scaled back", 1e-3, 20), ("recovery each 10", 1e-3, 10),
])
def test_a_walk_updates_only_b_under_its_condition(
    trained, monkeypatch, condition, weight_decay, every
):
    one = supernet(trained, condition)
    net, norms_at_steps, norms_at_recoveries, recovery_steps = one.net, [], [], []
    weights = [p.clone() for p in net.weight_parameters()]
    step, recover = search.arch_step, net.recover

    def arch_step(*args):
        adam, norms = args[4], follow.norms(net)
        assert {group["weight_decay"] for group in adam.param_groups} == {weight_decay}
        factors = np.array(norms) / 0.1 if condition == "rate ∝ |b|" else np.ones(8)
        np.testing.assert_allclose([g["lr"] for g in adam.param_groups], 4 * 6e-4 * factors)
        norms_at_steps.append(norms)
        return step(*args)

    def recorded_recover(solver):
        recovery_steps.append(len(norms_at_steps))
        norms_at_recoveries.append(follow.norms(net))
        return recover(solver)

    monkeypatch.setattr(search, "arch_step", arch_step)
    monkeypatch.setattr(net, "recover", recorded_recover)
    row = one.walk(condition, 40)
    assert recovery_steps == [*range(every, 41, every)]
    assert all(map(torch.equal, weights, net.weight_parameters()))
    first = norms_at_steps[0]
    assert first != norms_at_steps[1] and 100 * 16 / 196 <= row["ran"] <= 100
    for norms in norms_at_recoveries:
        assert np.allclose(norms, first, rtol=1e-5) == (condition == "b scaled back")
    columns = torch.cat([A.norm(dim=0) for code in net.codes for A in code.A])
    assert torch.allclose(columns, torch.ones_like(columns)) == (condition == "normal")
    assert genotypes.from_lists(row["genotypes"][1]) == net.genotype()


def test_a_loser_is_a_replaced_pair_whose_weight_rose_less():
    nodes = [[(0, 1), (1, 2)], [(0, 3), (2, 4)], [(0, 0), (1, 0)], [(0, 5), (1, 5)]]
    after = [[(0, 1), (1, 6)], [(0, 3), (1, 6)], [(0, 1), (1, 2)], [(0, 5), (1, 5)]]
    rise = np.array([[0.2, 0.1], [-0.2, -0.1], [1, 2], [1, 2]])
    assert follow.losers(nodes, after, rise) == [True, False]


@pytest.mark.crash
def test_finished_items_are_skipped_and_summarized(trained, tmp_path, monkeypatch, capsys):
    commands = []

    def finish(script, folder, flags, args):
        commands.append(flags)
        data_flags = "--dataset", args.dataset, "--image_size", args.image_size
        run(script, *flags.split(), "--save", folder, *data_flags, cwd=tmp_path)

    monkeypatch.setattr(follow.evidence, "finish", finish)
    monkeypatch.setattr(follow, "CONDITIONS", dict([*follow.CONDITIONS.items()][:3]))
    for _ in range(2):
        rows = call(trained, "train", "search", "walk")
    assert [row["part"] for row in rows] == ["train", "search", "search", *3 * ["walk"]]
    assert ["--dictionary normal" in command for command in commands] == [False, True]
    assert all("--distinct_edges --seed 2" in command for command in commands)
    assert len({row["first"] for row in rows[3:] if row["condition"] != "normal"}) == 1
    with pytest.raises(UserError, match="has results with other flags"):
        call(trained, "search", "--cells", "5")

    capsys.readouterr()
    call(trained, "summary")
    text = capsys.readouterr().out
    assert text.count(": 1 searches") == 5
    assert f"{rows[2]['accuracy'] - rows[1]['accuracy']:.2f}\n" in text.splitlines(True)[-1]


def test_directions_writes_a_row_for_each_condition_and_seed_once(tmp_path, monkeypatch):
    measure = follow.Supernet.directions
    monkeypatch.setattr(follow.Supernet, "directions", lambda one, epochs: measure(one, 1))
    rows = call(tmp_path, "directions")
    found = [(row["condition"], row["seed"]) for row in rows]
    assert found == [("uniform", 2), ("centred", 2), ("normal", 2)]
    for row in rows:
        assert all(0 <= row[name] <= 1 for name in ("gradient", "point", "both"))
    monkeypatch.setattr(follow, "Supernet", None)  # no search is run again
    assert call(tmp_path, "directions") == rows


def test_an_estimate_has_the_interval_of_students_t():
    assert follow.estimate([1, 2, 3, 4]) == "2.50 ± 0.65 [0.45 to 4.55]"  # t is 3.182
    assert follow.estimate([3]) == "3.00" and follow.estimate([]) == "–"
