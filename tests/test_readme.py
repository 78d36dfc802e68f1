"""The README stays true: its commands parse, its flags exist, and none is missing."""

import json
import re
import shlex
import shutil

import pytest
import torch
from scripts import ROOT, TINY, TWO_STAGE, run

import genotypes
import search
import train
import visualize
from experiments import darts, dictionary, evidence, follow, nasbench301
from tools import export

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
SCRIPTS = (search, train, visualize, export, darts, dictionary, evidence, follow,
           nasbench301)
PARSERS = {f"{script.__name__.replace('.', '/')}.py": script.get_args_parser()
           for script in SCRIPTS}


def commands():
    text = "\n".join(DOCS.values()).replace("\\\n", " ")
    launched = r"(?:\+ |    |`)(?:\S*python|torchrun .*?) ([\w/]+)\.py([^`\n]*)"
    for script, flags in re.findall(launched, text):
        if flags != " --help" and not script.startswith("benchmarks/"):
            yield f"{script}.py", shlex.split(flags, comments=True)


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200


def test_every_file_and_folder_is_named():
    listed = {*re.findall(r"`(\w+\.py|\w+/)`", README.split("**Files.**")[1].split("##")[0])}
    assert listed == {path.name for path in ROOT.glob("*.py")} | {
        f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/*.py") if path.parent.name != "tests"
    }


def test_every_link_and_picture_is_there():
    for name, text in DOCS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (folder / target).exists(), f"{name}: {target}"


def test_commands_parse(tmp_path, monkeypatch):
    """With the folders and files there that they name."""
    for folder in ("DIR", "docs"):
        (tmp_path / folder).mkdir()
    for name in ("FILE", "NAME.pt"):
        (tmp_path / name).touch()
    for folder in ("runs/NAME", "runs/A", "runs/B"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "checkpoint.pt").touch()
        (tmp_path / folder / "network.pt").touch()
        genotypes.save(tmp_path / folder / "genotype.json", genotypes.ISTA_twostage, False)
    monkeypatch.chdir(tmp_path)
    found = list(commands())
    assert len(found) > 20
    for script, flags in found:
        flags = [{"ARCH": "ISTA_twostage", "NAME": "ISTA_twostage"}.get(f, f) for f in flags]
        demo = any(flag.startswith("runs/demo") for flag in flags)
        if not demo:
            PARSERS[script].parse_args(flags)


def test_every_explained_flag_exists():
    flags = {s for parser in PARSERS.values() for a in parser._actions for s in a.option_strings}
    foreign = {"--model", "--encoding", "--help", "--nproc_per_node", "--dataset"}
    for text in DOCS.values():
        assert set(re.findall(r"`(--[\w-]+)", text)) <= flags | foreign


@pytest.mark.parametrize("script, column", [
    ([], dict(init_channels=16, layers=8, batch_size=256, epochs=50, seed=2, learning_rate=0.1,
              learning_rate_min=0.001, arch_learning_rate=6e-4, auxiliary=False, cutout=False)),
    (["--one_stage"], dict(init_channels=36, layers=20, batch_size=96, epochs=600, seed=5,
                           learning_rate=0.025, learning_rate_min=0.001, arch_learning_rate=3e-4,
                           auxiliary=True, cutout=True, drop_path_prob=0.2, freeze_tol=1e-3,
                           max_params=3.7, max_search_epochs=600)),
])
def test_no_flag_means_the_published_search(script, column):
    args = search.get_args_parser().parse_args(script)
    common = dict(momentum=0.9, weight_decay=3e-4, arch_weight_decay=1e-3, grad_clip=5,
                  proj_dims=7, sparseness=2, lam=1e-5, solver="homotopy", train_portion=0.5,
                  recover_every="epoch", dataset="cifar10", data="data",
                  cutout_length=16)
    assert {**vars(args), **common, **column} == vars(args)


def test_no_flag_means_the_published_retraining():
    args = train.get_args_parser().parse_args(["--arch", "ISTA_twostage"])
    recipe = dict(init_channels=36, layers=20, batch_size=96, epochs=600, seed=0,
                  learning_rate=0.025, learning_rate_min=0.0, momentum=0.9, weight_decay=3e-4,
                  grad_clip=5, auxiliary=True, auxiliary_weight=0.4, drop_path_prob=0.2,
                  cutout=True, cutout_length=16)
    assert {**vars(args), **recipe} == vars(args)


# ------------------------------------------------------------------------------------------------
# "Change the method": what is not in test_edits.py
# ------------------------------------------------------------------------------------------------


def copy_sources(folder):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")):
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))


def test_an_operation_can_be_added_as_the_readme_says(tmp_path):
    section = README.split("## Change the method")[1].split("## Does it work")[0]
    (case,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (name,) = re.findall(r"needs the line `(.*?)`", section)
    copy_sources(tmp_path)
    for file, at, text in (
        ("genotypes.py", "]\n\nNODES", f"    {name}\n"),
        ("operations.py", "}\n\n\ndef build(", case),
    ):
        source = (tmp_path / file).read_text()
        assert source.count(at) == 1
        (tmp_path / file).write_text(source.replace(at, text + at))
    flags = [*TINY, "--batch_size", 480, "--epochs", 1]
    run(tmp_path / "search.py", *flags, "--save", "s", cwd=tmp_path)
    found = json.loads((tmp_path / "s/genotype.json").read_text())
    found["normal"][0] = ["sep_conv_7x7", 0]
    (tmp_path / "s/genotype.json").write_text(json.dumps(found))
    arch = ["--arch", "s/genotype.json"]
    run(tmp_path / "train.py", *flags, *arch, "--no-cutout", "--save", "t", cwd=tmp_path,
        pictures=True)
    assert (tmp_path / "t/cells.png").exists()


def test_another_number_of_pairs_and_another_solver(tmp_path):
    flags = ["--sparseness", 3, "--solver", "fista", "--lam", 1e-3, "--epochs", 1, "--save", "s"]
    run(*TWO_STAGE, *flags, cwd=tmp_path)
    arch = ["--arch", "s/genotype.json", "--epochs", 1, "--save", "t"]
    run("train.py", *TINY, "--no-cutout", "--batch_size", 480, *arch, cwd=tmp_path)
    state = torch.load(tmp_path / "t/network.pt", weights_only=True)
    assert len(state["config"]["genotype"]["normal"]) == 12


def test_another_solver_takes_two_edits(tmp_path):
    copy_sources(tmp_path)
    source = (tmp_path / "ista.py").read_text()
    start = source.index("SOLVERS = {")
    end = source.index("}", start)
    mine = "    \"mine\": lambda A, b, lam, z0: _homotopy(A, b, lam, z0),\n"
    source = source[:end] + mine + source[end:]
    (tmp_path / "ista.py").write_text(source)
    flags = [*TINY, "--batch_size", 480, "--epochs", 1, "--solver", "mine"]
    done = run(tmp_path / "search.py", *flags, "--save", "s", cwd=tmp_path)
    assert "duality gap" not in done.stdout
