"""Errors: a wrong use of a script gives one line and exit status 2, and writes nothing.

Failures during a run give one line as well, and lose no checkpoint.
"""

import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import (
    ONE_STAGE,
    TINY,
    TRAIN,
    TWO_STAGE,
    Process,
    run,
    saved,
)
from tensorboard.summary.writer import record_writer

import genotypes
import search as search_script
import train as train_script
from harness import checkpoints

resource = pytest.importorskip("resource")  # Windows does not have it
GENOTYPE = str(genotypes.ISTA_twostage)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with finished runs, and with good and damaged data and files."""
    place = tmp_path_factory.mktemp("place")
    run(*TWO_STAGE, "--epochs", 2, "--save", "search", cwd=place)
    run(*ONE_STAGE, "--epochs", 1, "--save", "one", cwd=place)
    run(*TRAIN, "--epochs", 2, "--save", "train", cwd=place)

    for part in ("train", "test"):
        for name in "ab":
            folder = place / "images" / part / name
            folder.mkdir(parents=True)
            for k in range(4):
                Image.new("RGB", (32, 32)).save(folder / f"{k}.png")
    shutil.copytree(place / "images", place / "damaged_image")
    content = (place / "images/train/a/0.png").read_bytes()
    (place / "damaged_image/train/a/0.png").write_bytes(content[: len(content) // 2])
    shutil.copytree(place / "images", place / "one_class")
    for part in ("train", "test"):
        shutil.rmtree(place / "one_class" / part / "b")
    (place / "nothing").mkdir()
    (place / "batches/cifar-10-batches-py").mkdir(parents=True)
    (place / "batches/cifar-10-batches-py/data_batch_1").write_bytes(b"\x80\x02garbage")

    checkpoint = (place / "search/checkpoint.pt").read_bytes()
    (place / "truncated").mkdir()
    (place / "truncated/checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    torch.save({"model": torch.nn.Linear(2, 2)}, place / "code.pt")
    torch.save({"a": torch.zeros(3)}, place / "other.pt")
    network = saved(place / "train/network.pt")
    torch.save(network["weights"], place / "plain.pt")
    network["weights"]["classifier.weight"][0] = torch.nan
    torch.save(network, place / "nan.pt")
    record = json.loads((place / "search/genotype.json").read_text())
    (place / "bad_operation.json").write_text(json.dumps({**record, "normal": [["conv", 0]] * 8}))
    (place / "text.txt").write_text("hello")
    return place


def search(*flags):
    return ["search.py", *flags]


def search_folder(name):
    return ["search.py", "--dataset", "imagefolder", "--data", name]


def search_digits(*flags):
    return ["search.py", *TINY, *flags]


def train(*flags):
    return ["train.py", *flags]


def train_from_weights(*flags):
    return ["train.py", "--weights", "train/network.pt", "--no-cutout", *flags]


def evaluate(*flags):
    return ["train.py", "--evaluate", "--weights", *flags]


# Each command with a part of its error message.
REFUSED_BY_THE_PARSER = [
    (search("--epochs", "0"), "at least 1"),
    (search("--recover_every", "day"), "at least 1"),
    (search("--batch_size", "1"), "at least 2"),
    (search("--seed", str(2**64)), "at most 9223372036854775807"),
    (search("--learning_rate", "nan"), "number in (0, inf)"),
    (search("--lam", "0"), "number in (0, inf)"),
    (search("--freeze_tol", "-1"), "number in [0, inf)"),
    (search("--momentum", "1"), "number in [0, 1)"),
    (search("--train_portion", "1"), "number in (0, 1)"),
    (search("--epoch", "3"), "unrecognized"),  # abbreviations are not allowed
    (search("--epochs"), "expected one argument"),
    (search("--image_size", "30"), "multiple of 4"),
    (search("--learning_rate_min", "0.5"), "--learning_rate_min 0.5 is larger"),
    (search("--sparseness", "15", "--proj_dims", "20"), "only 14 pairs"),
    (search("--distinct_edges", "--sparseness", "3"), "only 2 edges"),
    (search("--one_stage", "--recover_every", "10"), "one-stage search"),
    (search("--max_params", "3"), "two-stage search"),
    # A cutout that was typed may be as large as the image, otherwise half as large.
    (train("--arch", "ISTA_twostage", "--cutout_length", "40"), "--cutout_length 16 or --no-"),
    (search("--one_stage", "--image_size", "8"), "--cutout_length 4 or --no-cutout"),
    (search_folder("no_such_folder"), "not a folder"),
    (search("--save", "search"), "exists already"),
    (search("--resume", ""), "empty"),  # an unset variable must not start a new run
    (search("--resume", "nothing"), "nothing/checkpoint.pt"),
    (search("--resume", "search", "--save", "elsewhere"), "leave out --save"),
    (train(), "--arch is missing"),
    (train("--arch", "DARTS_V2"), "no known genotype"),
    (train("--arch", "no_such.json"), "no_such.json"),
    (train("--arch", "bad_operation.json"), "no operation 'conv'"),
    (train("--arch", GENOTYPE[:-40]), "malformed"),
    (train("--evaluate", "--arch", "ISTA_twostage"), "--evaluate needs"),
    (evaluate("no_such.pt"), "no such file"),
    (evaluate("train/network.pt", "--save", "measured"), "leave out --save"),
    (train("--weights", "nothing"), "is a folder"),
]

REFUSED_BEFORE_TRAINING = [
    (search_digits("--device", "cuda"), "--device cuda"),
    (search_digits("--cuda_graphs"), "--cuda_graphs"),
    (search_digits("--solver", "mosek"), "license"),
    (search_digits("--init_channels", "200000"), "out of memory"),
    (search_digits("--batch_size", "720"), "--batch_size 720 is too large for the 719 images"),
    (search_folder("nothing"), "train"),
    (search_folder("one_class"), "single class"),
    (search_folder("damaged_image"), "0.png"),
    (search("--data", "images"), "--dataset imagefolder"),
    (search("--data", "batches"), "cifar-10-batches-py"),
    (search("--resume", "train"), "the checkpoint of a train run, which train.py resumes"),
    (train("--resume", "train/network.pt"), "give the folder of the run"),
    (search("--resume", "search", "--seed", "7"), "--seed 7 contradicts"),
    (search("--resume", "search", "--epochs", "1"), "--epochs 1"),
    (search("--resume", "truncated"), "truncated/checkpoint.pt is damaged"),
    (evaluate("code.pt"), "damaged, or not"),
    (evaluate("other.pt"), "no weights of a DARTS network"),
    (evaluate("nan.pt"), "not finite"),
    (evaluate("search/checkpoint.pt"), "checkpoint of a search"),
    (evaluate("plain.pt", "--arch", "random:1", "--dataset", "digits"), "does not fit"),
    (evaluate("one/network.pt", "--no-one_stage"), "does not fit"),
    (train_from_weights("--init_channels", "3"), "--init_channels 3"),
    (train_from_weights("--arch", "ISTA_onestage"), "not the genotype"),
    (train_from_weights(*search_folder("images")[1:]), "the network has 10 classes"),
]

PARSERS = {"search.py": search_script.get_args_parser(), "train.py": train_script.get_args_parser()}


def case_name(case):
    return " ".join(case[0]).replace(" ".join(TINY), "digits")[:60]


def check(prog, status, stderr, message):
    assert status == 2, stderr
    assert stderr.startswith(f"{prog}: error: ") and stderr.count("\n") == 1, stderr
    assert message in stderr, stderr


@pytest.mark.parametrize("case", REFUSED_BY_THE_PARSER, ids=case_name)
def test_the_parser_refuses_wrong_flags(place, monkeypatch, capsys, case):
    (prog, *flags), message = case
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as exit_:
        PARSERS[prog].parse_args(flags)
    check(prog, exit_.value.code, capsys.readouterr().err, message)


@pytest.mark.parametrize("case", REFUSED_BEFORE_TRAINING, ids=case_name)
def test_wrong_data_and_files_are_refused_before_anything_is_written(place, case):
    if "mosek" in case[0]:
        pytest.importorskip("cvxpy")
        pytest.importorskip("mosek")
    (prog, *flags), message = case
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    check(prog, 2, run(prog, *flags, cwd=place, status=2).stderr, message)
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}


@pytest.mark.parametrize("prog", PARSERS)
def test_help_lists_every_flag(tmp_path, prog):
    done = Process(prog, "--help", cwd=tmp_path)
    assert done.wait() == 0 and not done.stderr
    for action in PARSERS[prog]._actions:
        assert all(option in done.stdout for option in action.option_strings)


@pytest.mark.parametrize("script", ["search.py", "train.py"])
def test_a_run_does_not_resume_with_other_training_images(place, tmp_path, script):
    images = tmp_path / "images"
    shutil.copytree(place / "images", images)
    flags = ["--dataset", "imagefolder", "--data", "images", *TINY[2:], "--no-cutout"]
    arch = ["--arch", "random:1"] * (script == "train.py")
    run(script, *flags, *arch, "--epochs", 1, "--save", "run", cwd=tmp_path)

    def assert_refused(difference):
        err = run(script, "--resume", "run", "--epochs", 2, cwd=tmp_path, status=2).stderr
        message = "images does not hold the training images with which run began"
        check(script, 2, err, f"{message} ({difference} then)")

    (images / "train/a/0.png").rename(images / "train/b/9.png")
    assert_refused("3 of a now, 4 of a")
    (images / "train/b/9.png").rename(images / "train/a/0.png")
    for part in ("train", "test"):
        (images / part / "b").rename(images / part / "c")
    assert_refused("4 of c now, 0 of c")
    for part in ("train", "test"):
        (images / part / "c").rename(images / part / "b")
    images.rename(tmp_path / "elsewhere")
    run(script, "--resume", "run", "--epochs", 2, "--data", "elsewhere", cwd=tmp_path)


# ------------------------------------------------------------------------------------------------
# Failures during a run
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [TWO_STAGE, ONE_STAGE])
def test_a_search_ends_with_an_error_if_all_codes_stay_zero(tmp_path, flags):
    done = run(*flags, "--lam", 1, "--epochs", 2, "--save", "run", cwd=tmp_path, status=2)
    assert done.words.count("warning: all codes are 0, because --lam 1 is") == 1
    check("search.py", 2, done.stderr, "after epoch 1: give a smaller")
    assert not (tmp_path / "run/genotype.json").exists()


def test_a_search_continues_if_all_codes_are_zero_at_first(tmp_path):
    # The warning contains a Greek letter, which an ASCII terminal cannot show.
    (tmp_path / "prelude.py").write_text("import sys\nsys.stdout.reconfigure(encoding='ascii')\n")
    process = Process(*TWO_STAGE, "--lam", 1e-2, "--epochs", 1, "--save", "run", cwd=tmp_path,
                      prelude=tmp_path / "prelude.py")
    assert process.wait() == 0 and not process.stderr, process.stderr
    log = (tmp_path / "run/log.txt").read_text(encoding="utf-8")
    assert "warning: all codes are 0, because --lam 0.01 is" in " ".join(log.split())
    assert "λ_max" in log and (tmp_path / "run/genotype.json").exists()


@pytest.mark.parametrize(("flags", "rates"), [
    (TWO_STAGE, "--learning_rate, --arch_learning_rate or --grad_clip"),
    (TRAIN, "--learning_rate or --grad_clip"),
])
def test_divergence_is_an_error_and_the_last_checkpoint_stays(tmp_path, monkeypatch, flags, rates):
    cross_entropy, calls = torch.nn.functional.cross_entropy, []

    def diverge_in_the_second_epoch(*args, **options):
        calls.append(1)
        return cross_entropy(*args, **options) * (float("inf") if len(calls) > 12 else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", diverge_in_the_second_epoch)
    done = run(*flags, "--epochs", 3, "--save", "run", cwd=tmp_path, status=2)
    message = rf"epoch 2/3: the loss is not finite at learning rate 0\.\d+; try a smaller {rates}"
    assert re.search(message, done.stderr), done.stderr
    check(flags[0], 2, done.stderr, f"python {flags[0]} --resume run")
    assert saved(tmp_path / "run/checkpoint.pt")["epoch"] == 1
    monkeypatch.undo()
    run(flags[0], "--resume", "run", cwd=tmp_path)


def test_divergence_of_b_between_two_recoveries_is_an_error(tmp_path):
    done = run(*TWO_STAGE, "--recover_every", 1, "--arch_learning_rate", 1e300, "--epochs", 1,
               "--save", "run", cwd=tmp_path, status=2)
    check("search.py", 2, done.stderr, "b is not finite")


def test_a_checkpoint_that_could_not_be_loaded_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="checkpoint.pt was not written"):
        checkpoints.save(tmp_path / "checkpoint.pt", {"std": np.std([1.0, 2.0])})
    assert not os.listdir(tmp_path)


# A limit on file sizes has the effect of a full disk. Writing the log fails, or the checkpoint.
LIMIT = """
import resource, signal
from tqdm import tqdm
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write = tqdm.write
def limit(text, **options):
    write(text, **options)
    if "2/3" in text:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
tqdm.write = limit
"""


@pytest.mark.parametrize("limit", [1000, 60_000])
def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmp_path, limit):
    (tmp_path / "prelude.py").write_text(LIMIT.format(limit=limit))
    process = Process(*TWO_STAGE, "--epochs", 3, "--save", "run", cwd=tmp_path,
                      prelude=tmp_path / "prelude.py")
    check("search.py", process.wait(), process.stderr, "could not be written: File too large")
    assert not list((tmp_path / "run").glob("*.partial"))
    assert saved(tmp_path / "run/checkpoint.pt")["epoch"] == 1
    run("search.py", "--resume", "run", cwd=tmp_path)


def test_a_run_continues_if_tensorboard_cannot_write(tmp_path, monkeypatch):
    def write(writer, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    done = run(*TWO_STAGE, "--epochs", 2, "--save", "run", cwd=tmp_path)
    assert done.words.count("warning: run/tensorboard could not be written") == 1
    assert "the search is done" in done.stdout


def test_runs_that_start_in_the_same_second_get_different_folders(tmp_path):
    flags = [*TINY, "--batch_size", 480, "--epochs", 1]
    processes = [Process("search.py", *flags, cwd=tmp_path) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 3
