"""The README stays true: its commands parse, its flags exist, and none is missing."""

import re
import shlex

import pytest
from scripts import ROOT

import search
import train

README = (ROOT / "README.md").read_text()
PARSERS = {"search.py": search.get_args_parser(), "train.py": train.get_args_parser()}


def commands():
    text = README.replace("\\\n", " ")
    for line in text.splitlines():
        found = re.match(r"(?:\+ |    )\S*python (search|train)\.py(.*)", line)
        if found:
            yield f"{found[1]}.py", shlex.split(found[2], comments=True)


def test_commands_parse():
    found = list(commands())
    assert len(found) > 8
    for script, flags in found:
        PARSERS[script].parse_args(flags)


@pytest.mark.parametrize("script", PARSERS)
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
