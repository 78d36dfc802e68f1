"""benchmarks/turnover.py: what is counted between the epochs of a search."""

import json
import subprocess
import sys

from scripts import ENVIRONMENT, ROOT

import genotypes

sys.path.append(str(ROOT / "benchmarks"))

import turnover


def replaced(genotype, cell, index, pair):
    changed = [*getattr(genotype, cell)]
    changed[index] = pair
    return genotype._replace(**{cell: changed})


def test_a_pair_that_is_replaced_leaves_and_another_comes():
    first = genotypes.ISTA_twostage  # of node 3 of its normal cell: dil_conv_3x3 1, sep_conv_3x3 0
    second = replaced(first, "normal", 4, ("max_pool_3x3", 3))
    third = replaced(second, "reduce", 0, ("skip_connect", 0))
    seen, left, came = turnover.count({1: first, 2: second, 4: third})
    assert left == {("normal", "dil_conv_3x3"): 1, ("reduce", "avg_pool_3x3"): 1}
    assert came == {("normal", "max_pool_3x3"): 1, ("reduce", "skip_connect"): 1}
    assert seen.total() == 2 * 16 and seen["normal", "dil_conv_3x3"] == 3 + 2


def test_a_pair_that_changes_its_place_in_the_list_stays():
    first = genotypes.ISTA_twostage
    second = first._replace(normal=[first.normal[1], first.normal[0], *first.normal[2:]])
    _, left, came = turnover.count({1: first, 2: second})
    assert not left and not came


def test_the_script(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "genotypes.jsonl", "w") as file:
            for epoch in (1, 2, 3):
                row = genotypes.as_lists(genotypes.draw(epoch)) | {"epoch": epoch}
                file.write(json.dumps(row) + "\n")
    command = [sys.executable, ROOT / "benchmarks/turnover.py"]
    streams = dict(cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    done = subprocess.run([*command, "a", "b"], **streams)
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(lines) == 14 and sum(int(line[2]) for line in lines) <= 2 * 2 * 16
    assert sum(int(line[3]) for line in lines) == sum(int(line[-1]) for line in lines) > 20
    failed = subprocess.run([*command, "nowhere"], **streams)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
