"""Wrong uses of the scripts: one line on standard error, exit status 2, nothing written.

And failures on the way: one line as well, and no checkpoint is lost.
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

import data
import genotypes
import search as search_script
import train as train_script
from harness import checkpoints

resource = pytest.importorskip("resource")  # there is none on Windows
GOOD = str(genotypes.ISTA_twostage)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with finished runs and data of all kinds, and with what is wrong with them."""
    place = tmp_path_factory.mktemp("place")
    run(*TWO_STAGE, "--epochs", 2, "--save", "search", cwd=place)
    run(*ONE_STAGE, "--epochs", 1, "--save", "one", cwd=place)
    run(*TRAIN, "--epochs", 2, "--save", "train", cwd=place)

    def image(path, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (32, 32)).save(path)

    for part in ("train", "test"):
        for k in range(4):
            for name in "ab":
                image(place / "images" / part / name / f"{k}.png")
            image(place / "one_class" / part / "a" / f"{k}.png")
        for name in "ab":
            (place / "empty" / part / name).mkdir(parents=True, exist_ok=True)
    (place / "nothing").mkdir()
    shutil.copytree(place / "images", place / "new_class")
    image(place / "new_class/test/c/0.png")
    shutil.copytree(place / "images", place / "damaged_image")
    whole = (place / "images/train/a/0.png").read_bytes()
    (place / "damaged_image/train/a/0.png").write_bytes(whole[: len(whole) // 2])
    (place / "batches/cifar-10-batches-py").mkdir(parents=True)
    (place / "batches/cifar-10-batches-py/data_batch_1").write_bytes(b"\x80\x02garbage")

    checkpoint = (place / "search/checkpoint.pt").read_bytes()
    for name, content in (("truncated", checkpoint[: len(checkpoint) // 2]), ("empty_file", b"")):
        (place / name).mkdir()
        (place / name / "checkpoint.pt").write_bytes(content)
    torch.save({"model": torch.nn.Linear(2, 2)}, place / "code.pt")
    torch.save(torch.zeros(3), place / "tensor.pt")
    torch.save({"a": torch.zeros(3)}, place / "other.pt")
    network = saved(place / "train/network.pt")
    torch.save(network["weights"], place / "plain.pt")
    network["weights"]["classifier.weight"][0] = torch.nan
    torch.save(network, place / "nan.pt")
    record = json.loads((place / "search/genotype.json").read_text())
    (place / "bad_operation.json").write_text(json.dumps({**record, "normal": [["conv", 0]] * 8}))
    (place / "half.json").write_text((place / "search/genotype.json").read_text()[:200])
    (place / "text.txt").write_text("hello")
    os.mkfifo(place / "pipe")
    return place


def search(*flags):
    return ["search.py", *flags]


def train(*flags):
    return ["train.py", *flags]


def digits(*flags):
    return ["search.py", *TINY, *flags]


def evaluate(*flags):
    return ["train.py", "--evaluate", "--weights", *flags]


# Numbers out of their range, by what the line says.
NUMBERS = {
    "at least 1": [
        *("--epochs=" + text for text in ("0", "ten", "1.5", "", "a\nb")),
        "--init_channels=0", "--layers=0", "--report_freq=0", "--cutout_length=0", "--proj_dims=0",
        "--sparseness=0", "--recover_every=0", "--recover_every=day", "--max_search_epochs=0",
    ],
    "at least 2": ["--batch_size=1"],
    "at least 4": ["--image_size=0"],
    "at least 0": ["--workers=-1", "--seed=-1"],
    "at most 1000": ["--layers=100000", "--proj_dims=2000"],
    "at most 1024": [f"--workers={2**31 - 1}"],  # of threads
    "at most 32768": ["--image_size=100000"],
    "at most 2147483647": ["--init_channels=99999999999999999999"],
    "at most 9223372036854775807": [f"--seed={2**64}"],
    "number in (0, inf)": [
        "--learning_rate=-0.1", "--learning_rate=nan", "--learning_rate=inf", "--grad_clip=0",
        "--lam=0", "--lam=-1e-5", "--max_params=0",
    ],
    "number in [0, inf)": [
        "--arch_learning_rate=-1", "--arch_weight_decay=-1", "--weight_decay=-1",
        "--freeze_tol=-1", "--auxiliary_weight=-1",
    ],
    "number in [0, 1)": ["--momentum=1", "--drop_path_prob=1", "--drop_path_prob=-0.1"],
    "number in (0, 1)": ["--train_portion=0", "--train_portion=1"],
}

# Answered by the parser; each with a part of what the line says.
EARLY = [
    *((search(flag), says) for says, wrong in NUMBERS.items() for flag in wrong),
    (search("--no_such_flag"), "unrecognized"),
    (search("--epoch", "3"), "unrecognized"),  # no abbreviations: --epochs_x could come to be
    (search("--gpu", "0"), "unrecognized"),
    (search("stray"), "unrecognized"),
    (search("--epochs"), "expected one argument"),
    (search("--image_size", "30"), "multiple of 4"),
    (search("--learning_rate_min", "0.5"), "--learning_rate_min 0.5 is larger"),
    (search("--solver", "lars"), "invalid choice"),
    (search("--dictionary", "gaussian"), "invalid choice"),
    (search("--dataset", "mnist"), "invalid choice"),
    (search("--sparseness", "15", "--proj_dims", "20"), "only 14 pairs"),
    (search("--sparseness", "8"), "larger than --proj_dims 7"),
    (search("--distinct_edges", "--sparseness", "3"), "only 2 edges"),
    (search("--one_stage", "--recover_every", "10"), "one-stage search"),
    (search("--one_stage", "--train_portion", "0.4"), "one-stage search"),
    *((search(f"--{flag}", *value), "two-stage search") for flag, *value in (
        ("auxiliary",), ("auxiliary_weight", "0.3"), ("drop_path_prob", "0.2"),
        ("freeze_tol", "0.1"), ("max_params", "3"), ("max_search_epochs", "3"))),
    # Of the cutout: more than the image where it is typed, else more than half of it.
    (train("--arch", "ISTA_twostage", "--cutout_length", "40"), "--cutout_length 16 or --no-"),
    (search("--cutout", "--image_size", "8"), "--cutout_length 4 or --no-cutout"),
    (search("--one_stage", "--image_size", "8"), "--cutout_length 4 or --no-cutout"),
    (search("--dataset", "imagefolder", "--data", "no_such_folder"), "not a folder"),
    (search("--dataset", "imagefolder", "--data", "text.txt"), "not a folder"),
    (search("--data", ""), "empty"),
    (search("--save", ""), "empty"),
    (search("--save", "search"), "exists already"),
    (search("--save", "text.txt"), "exists already"),
    (search("--resume", ""), "empty"),  # an unset variable must not start a new run
    (search("--resume", "no_such_run"), "no checkpoint"),
    (search("--resume", "nothing"), "no checkpoint"),
    (search("--resume", "search", "--save", "elsewhere"), "leave out --save"),
    (train(), "--arch is missing"),
    (train("--arch", "DARTS_V2"), "unknown genotype"),
    (train("--arch", "random:x"), "random:SEED"),
    (train("--arch", "no_such.json"), "no_such.json"),
    (train("--arch", "half.json"), "half.json"),
    (train("--arch", "bad_operation.json"), "no operation 'conv'"),
    (train("--arch", "text.txt"), "text.txt"),
    (train("--arch", "nothing"), "nothing"),
    (train("--arch", GOOD[:-40]), "malformed"),
    (train("--arch", GOOD.replace("'skip_connect', 0", "'skip_connect', 9")), "node 2"),
    (train("--arch", GOOD.replace("sep_conv_3x3", "sep_conv_7x7")), "sep_conv_7x7"),
    (train("--arch", "Genotype(normal=exit(), normal_concat=1, reduce=1, reduce_concat=1)"),
     "malformed"),
    (train("--evaluate"), "--evaluate needs"),
    (train("--evaluate", "--arch", "ISTA_twostage"), "--evaluate needs"),
    (evaluate("no_such.pt"), "no such file"),
    (evaluate("pipe"), "no such file"),
    (evaluate("train/network.pt", "--save", "measured"), "leave out --save"),
    (train("--weights", "nothing"), "is a folder"),
    (train("--resume", "train", "--weights", "plain.pt"), "leave out"),
]

# Answered with the data, the device or a file of another run at hand.
LATE = [
    (digits("--device", "cuda"), "--device cuda"),
    (digits("--device", "abacus"), "--device abacus"),
    (digits("--device", "meta"), "--device meta"),
    (digits("--cuda_graphs"), "--cuda_graphs"),
    (digits("--solver", "mosek"), "licence"),
    (digits("--save", "/dev/null/x"), "Not a directory"),
    (digits("--save", "x" * 300), "name too long"),
    (digits("--init_channels", "200000"), "out of memory"),
    (digits("--batch_size", "720"), "--batch_size 720 is too large for the 719 images"),
    (train("--arch", "ISTA_twostage", *TINY, "--no-cutout", "--batch_size", "1439"),
     "--batch_size 1439"),
    (digits("--batch_size", "2", "--train_portion", "0.0001"), "too few images"),
    (search("--dataset", "imagefolder", "--data", "nothing"), "train"),
    (search("--dataset", "imagefolder", "--data", "empty"), "no valid file for the classes a, b"),
    (search("--dataset", "imagefolder", "--data", "one_class"), "single class"),
    (search("--dataset", "imagefolder", "--data", "new_class"), "lacks: c"),
    (search("--dataset", "imagefolder", "--data", "damaged_image"), "0.png"),
    (search("--data", "images"), "--dataset imagefolder"),
    (search("--data", "batches"), "cifar-10-batches-py"),
    (search("--resume", "train"), "the checkpoint of a train run, which train.py resumes"),
    (train("--resume", "search"), "the checkpoint of a search run, which search.py resumes"),
    (search("--resume", "one/network.pt"), "give the folder of the run"),
    (train("--resume", "train/network.pt"), "give the folder of the run"),
    (search("--resume", "search", "--seed", "7"), "--seed 7 contradicts"),
    (search("--resume", "search", "--dataset", "cifar10"), "--dataset cifar10 contradicts"),
    (search("--resume", "search", "--epochs", "1"), "--epochs 1 contradicts"),
    (search("--resume", "search", "--one_stage"), "--one_stage"),
    (search("--resume", "truncated"), "truncated/checkpoint.pt is damaged"),
    (search("--resume", "empty_file"), "damaged"),
    (evaluate("code.pt"), "damaged, or not"),
    (evaluate("text.txt"), "damaged, or not"),
    (evaluate("tensor.pt"), "no weights of a DARTS network"),
    (evaluate("other.pt"), "no weights of a DARTS network"),
    (evaluate("nan.pt"), "not finite"),
    (evaluate("search/checkpoint.pt"), "checkpoint of a search"),
    (evaluate("plain.pt"), "give --arch"),
    (evaluate("plain.pt", "--arch", "random:1", "--dataset", "digits"), "does not fit"),
    (evaluate("one/network.pt", "--no-one_stage"), "does not fit"),
    (train("--weights", "train/network.pt", "--no-cutout", "--init_channels", "3"),
     "--init_channels 3"),
    (train("--weights", "train/network.pt", "--no-cutout", "--arch", "ISTA_onestage"),
     "not the genotype"),
    (train("--weights", "train/network.pt", "--no-cutout", "--dataset", "imagefolder", "--data",
           "images"), "the network has 10 classes"),
]


def name(case):
    return " ".join(map(str, case[0]))[:60]


def snapshot(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


def check(prog, status, stderr, says):
    assert status == 2, stderr
    assert stderr.startswith(f"{prog}: error: ") and stderr.count("\n") == 1, stderr
    assert says in stderr, stderr


PARSERS = {"search.py": search_script.get_args_parser(), "train.py": train_script.get_args_parser()}


@pytest.mark.parametrize("case", EARLY, ids=name)
def test_refused_by_the_parser(place, monkeypatch, capsys, case):
    (prog, *flags), says = case
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as exit_:
        PARSERS[prog].parse_args(flags)
    check(prog, exit_.value.code, capsys.readouterr().err, says)


@pytest.mark.parametrize("case", LATE, ids=name)
def test_refused_before_anything_is_written(place, case):
    if "mosek" in case[0]:
        pytest.importorskip("cvxpy")
        pytest.importorskip("mosek")
    (prog, *flags), says = case
    before = snapshot(place)
    check(prog, 2, run(prog, *flags, cwd=place, status=2).stderr, says)
    assert snapshot(place) == before


@pytest.mark.parametrize("prog", ["search.py", "train.py"])
def test_help_names_every_flag(tmp_path, prog):
    done = Process(prog, "--help", cwd=tmp_path)
    assert done.wait() == 0 and not done.stderr
    for action in PARSERS[prog]._actions:
        assert all(option in done.stdout for option in action.option_strings)


def test_images_that_fill_the_memory(place, tmp_path, monkeypatch):
    def empty(*args):
        raise MemoryError

    monkeypatch.setattr(data.np, "empty", empty)
    flags = ["--dataset", "imagefolder", "--data", place / "images"]
    check("search.py", 2, run("search.py", *flags, cwd=tmp_path, status=2).stderr, "out of memory")


def test_a_search_among_operations_in_another_order_is_not_resumed(place, monkeypatch):
    first, second, *others = genotypes.PRIMITIVES
    monkeypatch.setattr(genotypes, "PRIMITIVES", [second, first, *others])  # the pools
    err = run("search.py", "--resume", "search", cwd=place, status=2).stderr
    check("search.py", 2, err, "with other operations")


@pytest.mark.parametrize("script", ["search.py", "train.py"])
def test_a_run_goes_on_with_the_images_it_began_with(place, tmp_path, script):
    """Each change would deal the halves anew, or take a class for another."""
    shutil.copytree(place / "images", tmp_path / "images")
    flags = ["--dataset", "imagefolder", "--data", "images", *TINY[2:], "--no-cutout"]
    arch = ["--arch", "random:1"] * (script == "train.py")
    run(script, *flags, *arch, "--epochs", 1, "--save", "run", cwd=tmp_path)

    def refused(found):
        err = run(script, "--resume", "run", "--epochs", 2, cwd=tmp_path, status=2).stderr
        says = "images does not hold the training images with which run began"
        check(script, 2, err, f"{says} ({found} then)")

    image = tmp_path / "images/train/a/0.png"
    image.rename(tmp_path / "images/train/b/9.png")
    refused("3 of a now, 4 of a")
    (tmp_path / "images/train/b/9.png").rename(image)
    for part in ("train", "test"):
        (tmp_path / "images" / part / "b").rename(tmp_path / "images" / part / "c")
    refused("4 of c now, 0 of c")
    for part in ("train", "test"):
        (tmp_path / "images" / part / "c").rename(tmp_path / "images" / part / "b")
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    run(script, "--resume", "run", "--epochs", 2, "--data", "elsewhere", cwd=tmp_path)


# ------------------------------------------------------------------------------------------------
# Failures on the way
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [TWO_STAGE, ONE_STAGE])
def test_a_search_whose_codes_stay_empty_has_no_result(tmp_path, flags):
    done = run(*flags, "--lam", 1, "--epochs", 2, "--save", "run", cwd=tmp_path, status=2)
    assert done.words.count("warning: all codes are 0, because --lam 1 is") == 1
    check("search.py", 2, done.stderr, "after epoch 1: give a smaller")
    assert not (tmp_path / "run/genotype.json").exists()


def test_codes_that_are_empty_at_first_may_fill(tmp_path):
    done = run(*TWO_STAGE, "--lam", 1e-2, "--epochs", 1, "--save", "run", cwd=tmp_path)
    assert "warning: all codes are 0, because --lam 0.01 is" in done.words
    assert (tmp_path / "run/genotype.json").exists()


@pytest.mark.parametrize(("flags", "rates"), [
    (TWO_STAGE, "--learning_rate, --arch_learning_rate or --grad_clip"),
    (TRAIN, "--learning_rate or --grad_clip"),
])
def test_divergence_names_epoch_and_rate_and_the_last_checkpoint_stays(
    tmp_path, monkeypatch, flags, rates
):
    whole, calls = torch.nn.functional.cross_entropy, []

    def cross_entropy(*args, **options):
        calls.append(1)
        return whole(*args, **options) * (float("inf") if len(calls) > 12 else 1)  # epoch 2

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    done = run(*flags, "--epochs", 3, "--save", "run", cwd=tmp_path, status=2)
    says = rf"epoch 2/3: the loss is not finite at learning rate 0\.\d+; try a smaller {rates} in"
    assert re.search(says, done.stderr), done.stderr
    check(flags[0], 2, done.stderr, f"python {flags[0]} --resume run")
    assert saved(tmp_path / "run/checkpoint.pt")["epoch"] == 1
    monkeypatch.undo()
    run(flags[0], "--resume", "run", cwd=tmp_path)


def test_what_could_not_be_read_again_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="checkpoint.pt was not written"):
        checkpoints.save(tmp_path / "checkpoint.pt", {"std": np.std([1.0, 2.0])})
    assert not os.listdir(tmp_path)


def test_a_search_that_diverges_between_two_recoveries_says_so(tmp_path):
    done = run(*TWO_STAGE, "--recover_every", 1, "--arch_learning_rate", 1e300, "--epochs", 1,
               "--save", "run", cwd=tmp_path, status=2)
    check("search.py", 2, done.stderr, "epoch 1/1: a point b is not finite")


# A limit on the size of a file stands for a full disk; it is met by the log, or by the checkpoint.
FULL = """
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
def test_a_full_disk_says_so_and_the_last_checkpoint_stands(tmp_path, limit):
    (tmp_path / "prelude.py").write_text(FULL.format(limit=limit))
    process = Process(*TWO_STAGE, "--epochs", 3, "--save", "run", cwd=tmp_path,
                      prelude=tmp_path / "prelude.py")
    check("search.py", process.wait(), process.stderr, "could not be written: File too large")
    assert not list((tmp_path / "run").glob("*.partial"))
    assert saved(tmp_path / "run/checkpoint.pt")["epoch"] == 1
    run("search.py", "--resume", "run", cwd=tmp_path)


def test_a_run_does_without_tensorboard(tmp_path, monkeypatch):
    def write(writer, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    done = run(*TWO_STAGE, "--epochs", 2, "--save", "run", cwd=tmp_path)
    says = "warning: run/tensorboard could not be written, so there are no more events: No space"
    assert done.words.count(says) == 1 and "the search is done" in done.stdout


def test_a_log_with_greek_letters_on_an_ascii_terminal(tmp_path):
    (tmp_path / "prelude.py").write_text("import sys\nsys.stdout.reconfigure(encoding='ascii')\n")
    # All codes are 0 at first. The warning about this has a Greek letter.
    process = Process(*TWO_STAGE, "--lam", 1e-2, "--epochs", 1, "--save", "run", cwd=tmp_path,
                      prelude=tmp_path / "prelude.py")
    assert process.wait() == 0 and not process.stderr, process.stderr
    log = (tmp_path / "run/log.txt").read_text(encoding="utf-8")
    assert "the search is done" in log and "λ_max" in log


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    flags = [*TINY, "--batch_size", 480, "--epochs", 1]
    runs = [Process("search.py", *flags, cwd=tmp_path) for _ in range(3)]
    assert [process.wait() for process in runs] == [0, 0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 3
