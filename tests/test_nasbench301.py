"""experiments/nasbench301.py: the encoding of genotypes, and the script with another model.

The surrogate is not part of the project. If the environment variable NASBENCH301 names a folder
with nb301-surrogate.onnx and encoding.json, the published cells are scored too.
"""

import json
import os
import sys
from pathlib import Path

import nasbench301
import numpy as np
import pytest

import genotypes
from genotypes import PRIMITIVES, Genotype
from utils import UserError

SPLIT = Genotype(
    normal=[("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("skip_connect", 2), ("dil_conv_3x3", 0)] +
           [("avg_pool_3x3", 1), ("sep_conv_3x3", 3), ("dil_conv_5x5", 4), ("skip_connect", 1)],
    normal_concat=range(2, 6),
    reduce=[("skip_connect", 0), ("skip_connect", 1)] * 4,
    reduce_concat=range(2, 6),
)


def test_describe_uses_the_names_of_the_benchmark():
    # Edges 0 and 1 lead to node 2, 2 to 4 to node 3, 5 to 8 to node 4, and 9 to 13 to node 5.
    assert nasbench301.describe(SPLIT) == {
        "edge_normal_0": "max_pool_3x3", "edge_normal_1": "sep_conv_5x5",
        "edge_normal_2": "dil_conv_3x3", "edge_normal_4": "skip_connect",
        "edge_normal_6": "avg_pool_3x3", "edge_normal_8": "sep_conv_3x3",
        "edge_normal_10": "skip_connect", "edge_normal_13": "dil_conv_5x5",
        "inputs_node_normal_3": "0_2", "inputs_node_normal_4": "1_3", "inputs_node_normal_5": "1_4",
        **{f"edge_reduce_{k}": "skip_connect" for k in (0, 1, 2, 3, 5, 6, 9, 10)},
        **{f"inputs_node_reduce_{node}": "0_1" for node in (3, 4, 5)},
    }


@pytest.mark.parametrize("genotype, why", [
    (SPLIT._replace(reduce=[("skip_connect", 0)] * 8), "two pairs on one edge"),
    (SPLIT._replace(normal=[("skip_connect", 0)] * 4, reduce=[("skip_connect", 0)] * 4),
     "1 pairs a node"),
    (SPLIT._replace(reduce_concat=[3, 4, 5]), "not all nodes"),
])
def test_genotypes_outside_of_the_benchmark_are_refused(genotype, why):
    with pytest.raises(UserError, match=why):
        nasbench301.describe(genotype)


def test_ties_count_half_in_a_percentile():
    assert nasbench301.percentile(3.0, [1, 2, 3, 4]) == 62.5
    assert nasbench301.percentile(0.0, [1, 2]) == 0 and nasbench301.percentile(9.0, [1, 2]) == 100


# ------------------------------------------------------------------------------------------------
# The script with another model
# ------------------------------------------------------------------------------------------------


class Convolutions(nasbench301.Surrogate):
    """A model whose accuracy is 90 % plus the number of sep_conv_3x3 in the cells."""

    def __init__(self, model, encoding):
        self.random = np.array([90.0, 91.0, 92.0, 93.0])

    def accuracy(self, genotype):
        return 90.0 + list(nasbench301.describe(genotype).values()).count("sep_conv_3x3")


def write_search(folder, rows):
    folder.mkdir()
    lines = [json.dumps({"epoch": k, **genotypes.as_lists(g)}) for k, g in enumerate(rows, 1)]
    (folder / "genotypes.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder)


def call(*flags):
    files = ["--model", __file__, "--encoding", __file__]
    nasbench301.main(nasbench301.get_args_parser().parse_args([*files, *flags]))


def test_runs_are_scored_after_each_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nasbench301, "Surrogate", Convolutions)
    better = SPLIT._replace(reduce=[("sep_conv_3x3", 0), *SPLIT.reduce[1:]])
    shared = SPLIT._replace(reduce=[("skip_connect", 0)] * 8)
    a = write_search(tmp_path / "a", [SPLIT, better, shared])
    b = write_search(tmp_path / "b", [better, better])
    with open(tmp_path / "b" / "genotypes.jsonl", "a") as file:
        file.write('{"epoch": 3, "nor')  # an unfinished line
    picture = tmp_path / "scores.png"
    call(a, b, str(genotypes.ISTA_onestage), "random:3", "-o", str(picture))
    output = capsys.readouterr().out
    assert "cell 1    93.00 % (88)\n" in output
    assert "random:3" in output and "cannot be scored: two pairs on one edge" in output
    assert f"{a}: 1 of 3 epochs cannot be scored: two pairs on one edge" in output
    table = [line.split() for line in output.splitlines() if line.split()[0].isdigit()]
    assert table == [
        ["1", "91.00", "%", "(38)", "92.00", "%", "(62)", "50", "±", "18"],
        ["2", "92.00", "%", "(62)", "92.00", "%", "(62)", "62", "±", "0"],
        ["3", "–", "–", "–"],
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def encoding(operations=PRIMITIVES):
    """An encoding like the published one, which gives each value a number."""
    pairs = [f"{p}_{q}" for q in range(5) for p in range(q)]
    return {
        nasbench301.PREFIX + name: {value: k for k, value in enumerate(
            ["#na#", *(pairs if name.startswith("inputs") else operations)])}
        for name in nasbench301.COLUMNS
    }


def test_a_genotype_is_encoded_in_the_column_order_of_the_model(tmp_path):
    path = tmp_path / "encoding.json"
    surrogate = object.__new__(nasbench301.Surrogate)  # without a model
    path.write_text(json.dumps(encoding()))
    surrogate.codes = nasbench301.read_encoding(path)
    row = surrogate.encode(SPLIT)
    assert row[:14] == [1, 5, 6, 0, 3, 0, 2, 0, 4, 0, 3, 0, 0, 7]
    assert row[28:] == [2, 5, 8, 1, 1, 1]
    path.write_text(json.dumps(encoding([name for name in PRIMITIVES if name != "dil_conv_3x3"])))
    surrogate.codes = nasbench301.read_encoding(path)
    with pytest.raises(UserError, match="dil_conv_3x3"):
        surrogate.encode(SPLIT)


def test_a_missing_package_and_a_picture_without_a_run_are_errors(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="pip install onnxruntime"):
        patch.setitem(sys.modules, "onnxruntime", None)
        call("ISTA_twostage")
    monkeypatch.setattr(nasbench301, "Surrogate", Convolutions)
    with pytest.raises(UserError, match="no run folder of a search"):
        call("ISTA_twostage", "-o", "scores.png")


# ------------------------------------------------------------------------------------------------
# The surrogate itself
# ------------------------------------------------------------------------------------------------


@pytest.mark.skipif("NASBENCH301" not in os.environ, reason="NASBENCH301 names no folder with the "
                    "surrogate: nb301-surrogate.onnx and encoding.json")
def test_the_published_cells_are_among_the_best():
    folder = Path(os.environ["NASBENCH301"])
    surrogate = nasbench301.Surrogate(folder / "nb301-surrogate.onnx", folder / "encoding.json")
    assert surrogate.random.mean() == pytest.approx(94.4, abs=0.05)
    for name, accuracy, place in (
        ("ISTA_twostage", 95.48, 99), ("ISTA_ImageNet", 95.26, 97), ("ISTA_onestage", 95.19, 96),
    ):
        predicted, percentile = surrogate.score(genotypes.load(name)[0])
        assert predicted == pytest.approx(accuracy, abs=0.006)
        # Such a percentile among 2,000 cells has a standard error of 0.2 to 0.5.
        assert percentile == pytest.approx(place, abs=1.1)
