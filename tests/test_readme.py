"""The README stays true: its commands parse, its flags exist, and none is missing."""

import json
import re
import shlex
import shutil

import pytest
import torch
from scripts import ROOT, TINY, TWO_STAGE, run

import search
import train
import visualize

README = (ROOT / "README.md").read_text()
PARSERS = {
    f"{script.__name__}.py": script.get_args_parser() for script in (search, train, visualize)
}


def commands():
    text = README.replace("\\\n", " ")
    launched = r"(?:\+ |    |`)(?:\S*python|torchrun .*?) (search|train|visualize)\.py([^`\n]*)"
    for script, flags in re.findall(launched, text):
        if flags != " --help":
            yield f"{script}.py", shlex.split(flags, comments=True)


def test_every_file_is_named():
    listed = re.findall(r"`(\w+\.py)`", README.split("## Editing it")[1].split("The scripts")[0])
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("*.py"))


def test_commands_parse():
    found = list(commands())
    assert len(found) > 20
    for script, flags in found:
        PARSERS[script].parse_args(flags)


@pytest.mark.parametrize("script", ["search.py", "train.py"])
def test_every_flag_is_explained(script):
    explained = set(re.findall(r"`(--\w+)`", README))
    flags = {a.option_strings[0] for a in PARSERS[script]._actions} - {"-h"}
    assert flags <= explained, flags - explained


def test_every_explained_flag_exists():
    flags = {s for parser in PARSERS.values() for a in parser._actions for s in a.option_strings}
    assert set(re.findall(r"`(--[\w-]+)`", README)) <= flags


@pytest.mark.parametrize("script, column", [
    ([], dict(init_channels=16, layers=8, batch_size=256, epochs=50, seed=2, learning_rate=0.1,
              learning_rate_min=0.001, arch_learning_rate=6e-4, auxiliary=False, cutout=False)),
    (["--one_stage"], dict(init_channels=36, layers=20, batch_size=96, epochs=600, seed=5,
                           learning_rate=0.025, learning_rate_min=0.001, arch_learning_rate=3e-4,
                           auxiliary=True, cutout=True, drop_path_prob=0.2, freeze_tol=1e-3,
                           max_params=3.7, max_search_epochs=600)),
])  # fmt: skip
def test_no_flag_means_the_published_search(script, column):
    args = search.get_args_parser().parse_args(script, published=search.published)
    common = dict(momentum=0.9, weight_decay=3e-4, arch_weight_decay=1e-3, grad_clip=5,
                  proj_dims=7, sparseness=2, lam=1e-5, solver="homotopy", train_portion=0.5,
                  recover_every="epoch", dataset="cifar10", data="data",
                  cutout_length=16)  # fmt: skip
    assert {**vars(args), **common, **column} == vars(args)


def test_no_flag_means_the_published_retraining():
    args = train.get_args_parser().parse_args(
        ["--arch", "ISTA_twostage"], published=lambda typed: train.CIFAR
    )
    recipe = dict(init_channels=36, layers=20, batch_size=96, epochs=600, seed=0,
                  learning_rate=0.025, learning_rate_min=0.0, momentum=0.9, weight_decay=3e-4,
                  grad_clip=5, auxiliary=True, auxiliary_weight=0.4, drop_path_prob=0.2,
                  cutout=True, cutout_length=16)  # fmt: skip
    assert {**vars(args), **recipe} == vars(args)


# ------------------------------------------------------------------------------------------------
# "Editing it"
# ------------------------------------------------------------------------------------------------


def test_an_operation_can_be_added_as_the_readme_says(tmp_path):
    section = README.split("## Editing it")[1].split("## MOSEK")[0]
    name, case = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for file, at, text in (
        ("genotypes.py", "]\n\nNODES", name), ("operations.py", "    raise KeyError(prim", case)
    ):  # fmt: skip
        source = (tmp_path / file).read_text()
        assert source.count(at) == 1
        (tmp_path / file).write_text(source.replace(at, text + at))
    flags = [*TINY, "--batch_size", 480, "--epochs", 1]
    run(tmp_path / "search.py", *flags, "--sparseness", 16, "--save", "s", cwd=tmp_path)
    found = json.loads((tmp_path / "s/genotype.json").read_text())
    # Node 0 has 8 operations on 2 edges, and keeps all 16.
    assert ["conv_3x3", 0] in found["normal"] and (tmp_path / "s/cells.png").exists()
    arch = ["--arch", "s/genotype.json"]
    run(tmp_path / "train.py", *flags, *arch, "--save", "t", cwd=tmp_path)


def test_another_number_of_pairs_and_another_solver(tmp_path):
    flags = ["--sparseness", 3, "--solver", "fista", "--lam", 1e-3, "--epochs", 1, "--save", "s"]
    run(*TWO_STAGE, *flags, cwd=tmp_path)
    arch = ["--arch", "s/genotype.json", "--epochs", 1, "--save", "t"]
    run("train.py", *TINY, "--batch_size", 480, *arch, cwd=tmp_path)
    state = torch.load(tmp_path / "t/network.pt", weights_only=True)
    assert len(state["network"]["genotype"]["normal"]) == 12
