"""Wrong uses of the scripts: one line on standard error, exit status 2, nothing written."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from scripts import (
    ENVIRONMENT,
    ONE_STAGE,
    ROOT,
    TINY,
    TRAIN,
    TWO_STAGE,
    Process,
    assert_same,
    run,
)

import checkpoints
import genotypes
import search as search_script
import train as train_script
import utils

GOOD = str(genotypes.ISTA_twostage)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with finished runs and data of all kinds, and with what is wrong with them."""
    place = tmp_path_factory.mktemp("place")
    run(*TWO_STAGE, "--epochs", 2, "--recover_every", 2, "--save", "search", cwd=place)
    run(*ONE_STAGE, "--epochs", 1, "--save", "one", cwd=place)
    run(*TRAIN, "--epochs", 2, "--save", "train", cwd=place)

    def image(path, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (32, 32)).save(path)

    for k in range(4):
        for part in ("train", "test"):
            for name in "ab":
                image(place / "images" / part / name / f"{k}.png")
            image(place / "one_class" / part / "a" / f"{k}.png")
    (place / "empty" / "train" / "a").mkdir(parents=True)
    (place / "empty" / "test" / "a").mkdir(parents=True)
    (place / "nothing").mkdir()
    shutil.copytree(place / "images", place / "new_class")
    image(place / "new_class/test/c/0.png")
    shutil.copytree(place / "images", place / "damaged_image")
    whole = (place / "images/train/a/0.png").read_bytes()
    (place / "damaged_image/train/a/0.png").write_bytes(whole[: len(whole) // 2])
    (place / "batches/cifar-10-batches-py").mkdir(parents=True)
    (place / "batches/cifar-10-batches-py/data_batch_1").write_bytes(b"\x80\x02garbage")

    checkpoint = (place / "search/checkpoint.pt").read_bytes()
    for name, content in (
        ("truncated", checkpoint[: len(checkpoint) // 2]), ("empty_file", b""),
        ("flipped", checkpoint[:3000] + bytes(b ^ 255 for b in checkpoint[3000:9000])
         + checkpoint[9000:]),
    ):
        (place / name).mkdir()
        (place / name / "checkpoint.pt").write_bytes(content)
    shutil.copy(place / "search/checkpoint.pt", place / "truncated/checkpoint-previous.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, place / "code.pt")
    torch.save(torch.zeros(3), place / "tensor.pt")
    torch.save({"a": torch.zeros(3)}, place / "other.pt")
    weights = torch.load(place / "train/network.pt", weights_only=True)["weights"]
    torch.save(weights, place / "plain.pt")
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


# Answered without torch; each with a part of what the line says.
EARLY = [
    (search("--no_such_flag"), "unrecognized"),
    (search("--epoch", "3"), "unrecognized"),  # no abbreviations: --epochs_x could come to be
    (search("stray"), "unrecognized"),
    (search("--epochs"), "expected one argument"),
    (search("--epochs", "0"), "at least 1"),
    (search("--epochs", "-3"), "at least 1"),
    (search("--epochs", "ten"), "at least 1"),
    (search("--epochs", "1.5"), "at least 1"),
    (search("--epochs", ""), "at least 1"),
    (search("--epochs", "a\nb"), "at least 1"),
    (search("--batch_size", "0"), "at least 1"),
    (search("--init_channels", "0"), "at least 1"),
    (search("--layers", "0"), "at least 1"),
    (search("--layers", "100000"), "at most 1000"),
    (search("--learning_rate", "-0.1"), "number in [0, inf)"),
    (search("--learning_rate", "nan"), "number in"),
    (search("--learning_rate", "inf"), "number in"),
    (search("--learning_rate_min", "-1"), "number in"),
    (search("--learning_rate_min", "0.5"), "--learning_rate_min"),
    (search("--arch_learning_rate", "-1"), "number in"),
    (search("--arch_weight_decay", "-1"), "number in"),
    (search("--weight_decay", "-1"), "number in"),
    (search("--momentum", "1"), "number in [0, 1)"),
    (search("--grad_clip", "0"), "number in (0"),
    (search("--sparseness", "0"), "at least 1"),
    (search("--sparseness", "15", "--proj_dims", "20"), "only 14 pairs"),
    (search("--sparseness", "8"), "at most --proj_dims 7"),
    (search("--distinct_edges", "--sparseness", "3"), "only 2 edges"),
    (search("--freeze_tol", "0.1"), "--freeze_tol"),
    (search("--one_stage", "--train_portion", "0.4"), "--train_portion"),
    (search("--one_stage", "--image_size", "8"), "--cutout_length 4 or --no-cutout"),
    (train("--arch", "ISTA_twostage", "--image_size", "16"), "--cutout_length 8 or --no-cutout"),
    (search("--seed", str(2**64)), "at most"),
    (search("--proj_dims", "0"), "at least 1"),
    (search("--lam", "0"), "number in (0"),
    (search("--lam=-1e-5"), "number in (0"),
    (search("--solver", "lars"), "invalid choice"),
    (search("--train_portion", "1"), "number in (0, 1)"),
    (search("--train_portion", "0"), "number in (0, 1)"),
    (search("--recover_every", "0"), "at least 1"),
    (search("--recover_every", "day"), "at least 1"),
    (search("--one_stage", "--recover_every", "10"), "--recover_every"),
    (search("--one_stage", "--freeze_tol", "-1"), "number in"),
    (search("--one_stage", "--max_params", "0"), "number in"),
    (search("--one_stage", "--max_search_epochs", "0"), "at least 1"),
    (search("--auxiliary"), "--auxiliary"),
    (search("--auxiliary_weight", "0.3"), "two-stage search does not read it"),
    (search("--max_params", "3"), "two-stage search does not read it"),
    (search("--max_search_epochs", "3"), "two-stage search does not read it"),
    (search("--cuda_graphs", "--recover_every", "5"), "leave out --recover_every"),
    (search("--drop_path_prob", "0.2"), "--drop_path_prob"),
    (search("--one_stage", "--drop_path_prob", "1"), "number in [0, 1)"),
    (search("--cutout_length", "0"), "at least 1"),
    (search("--image_size", "30"), "multiple of 4"),
    (search("--image_size", "0"), "at least 4"),
    (search("--seed", "-1"), "at least 0"),
    (search("--workers", "-1"), "at least 0"),
    (search("--workers", str(2**31 - 1)), "at most 1024"),  # of threads
    (search("--report_freq", "0"), "at least 1"),
    (search("--dataset", "mnist"), "invalid choice"),
    (search("--dataset", "imagefolder", "--data", "no_such_folder"), "not a folder"),
    (search("--dataset", "imagefolder", "--data", "text.txt"), "not a folder"),
    (search("--save", "search"), "exists already"),
    (search("--save", "text.txt"), "exists already"),
    (search("--resume", "no_such_run"), "no checkpoint"),
    (search("--resume", "nothing"), "no checkpoint"),
    (search("--resume", "search", "--save", "elsewhere"), "leave out --save"),
    (search("--gpu", "0"), "unrecognized"),
    (train(), "--arch is missing"),
    (train("--arch", "DARTS_V2"), "unknown genotype"),
    (train("--arch", "random:x"), "random:SEED"),
    (train("--arch", "no_such.json"), "no_such.json"),
    (train("--arch", "half.json"), "half.json"),
    (train("--arch", "bad_operation.json"), "no operation 'conv'"),
    (train("--arch", "text.txt"), "text.txt"),
    (train("--arch", "nothing"), "nothing"),
    (train("--arch", "pipe"), "no such file"),
    (train("--arch", GOOD[:-40]), "malformed"),
    (train("--arch", GOOD.replace("'skip_connect', 0", "'skip_connect', 9")), "node 2"),
    (train("--arch", GOOD.replace("sep_conv_3x3", "sep_conv_7x7")), "sep_conv_7x7"),
    (train("--arch", "Genotype(normal=exit(), normal_concat=1, reduce=1, reduce_concat=1)"),
     "malformed"),
    (train("--evaluate"), "--evaluate needs"),
    (train("--evaluate", "--arch", "ISTA_twostage"), "--evaluate needs"),
    (train("--evaluate", "--weights", "no_such.pt"), "no such file"),
    (train("--weights", "nothing"), "is a folder"),
    (train("--resume", "train", "--weights", "plain.pt"), "leave out"),
    (train("--arch", "ISTA_twostage", "--save", "train"), "exists already"),
    (train("--arch", "ISTA_twostage", "--drop_path_prob", "-0.1"), "number in"),
    (train("--arch", "ISTA_twostage", "--auxiliary_weight", "-1"), "number in"),
]

# Answered once torch is there.
LATE = [
    (digits("--device", "cuda"), "--device cuda"),
    (digits("--device", "abacus"), "--device abacus"),
    (digits("--solver", "mosek"), "licence"),
    (digits("--batch_size", "720"), "--batch_size 720 is too large for the 719 images"),
    (train("--arch", "ISTA_twostage", *TINY, "--no-cutout", "--batch_size", "1439"),
     "--batch_size 1439"),
    (digits("--recover_every", "1000000"), "the whole search has"),
    (digits("--batch_size", "1", "--train_portion", "0.0001"), "too few images"),
    (search("--dataset", "imagefolder", "--data", "nothing"), "train"),
    (search("--dataset", "imagefolder", "--data", "empty"), "no images"),
    (search("--dataset", "imagefolder", "--data", "one_class"), "single class"),
    (search("--dataset", "imagefolder", "--data", "new_class"), "lacks: c"),
    (search("--dataset", "imagefolder", "--data", "damaged_image"), "0.png"),
    (search("--data", "batches"), "cifar-10-batches-py"),
    (search("--resume", "search", "--cuda_graphs"), "leave out --recover_every"),
    (search("--resume", "train"), "not a checkpoint of a search run"),
    (train("--resume", "search"), "not a checkpoint of a train run"),
    (search("--resume", "search", "--seed", "7"), "--seed 7 contradicts"),
    (search("--resume", "search", "--init_channels", "8"), "--init_channels 8 contradicts"),
    (search("--resume", "search", "--dataset", "cifar10"), "--dataset cifar10 contradicts"),
    (search("--resume", "search", "--epochs", "1"), "--epochs 1 contradicts"),
    (search("--resume", "search", "--one_stage"), "--one_stage"),
    (search("--resume", "truncated"), "checkpoint-previous.pt"),
    (search("--resume", "flipped"), "damaged"),
    (search("--resume", "empty_file"), "damaged"),
    (train("--evaluate", "--weights", "code.pt"), "damaged, or not"),
    (train("--evaluate", "--weights", "tensor.pt"), "no network weights"),
    (train("--evaluate", "--weights", "other.pt"), "no weights of a DARTS network"),
    (train("--evaluate", "--weights", "text.txt"), "damaged, or not"),
    (train("--evaluate", "--weights", "search/checkpoint.pt"), "checkpoint of a search"),
    (train("--evaluate", "--weights", "plain.pt"), "give --arch"),
    (train("--evaluate", "--weights", "plain.pt", "--arch", "random:1", "--dataset", "digits"),
     "does not fit"),
    (train("--weights", "train/network.pt", "--no-cutout", "--init_channels", "3"),
     "--init_channels 3"),
    (train("--weights", "train/network.pt", "--no-cutout", "--arch", "ISTA_onestage"),
     "not the genotype"),
    (train("--evaluate", "--weights", "train/network.pt", "--dataset", "imagefolder", "--data",
           "images"), "classes"),
    (train("--evaluate", "--weights", "one/network.pt", "--no-one_stage"), "does not fit"),
]


def name(case):
    return " ".join(map(str, case[0]))[:60]


def snapshot(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


def check(prog, status, stderr, says):
    assert status == 2, stderr
    assert stderr.startswith(f"{prog}: error: ") and stderr.count("\n") == 1, stderr
    assert says in stderr, stderr
    assert "Traceback" not in stderr


PARSERS = {"search.py": search_script.get_args_parser(), "train.py": train_script.get_args_parser()}


@pytest.mark.parametrize("case", EARLY, ids=name)
def test_refused_by_the_parser(place, monkeypatch, capsys, case):
    (prog, *flags), says = case
    monkeypatch.chdir(place)
    before = snapshot(place)
    with pytest.raises(SystemExit) as exit_:
        PARSERS[prog].parse_args(flags)
    check(prog, exit_.value.code, capsys.readouterr().err, says)
    assert snapshot(place) == before


@pytest.mark.parametrize("case", LATE, ids=name)
def test_answered_before_anything_is_written(place, case):
    if "mosek" in case[0]:
        pytest.importorskip("cvxpy")
        pytest.importorskip("mosek")
    (prog, *flags), says = case
    before = snapshot(place)
    check(prog, 2, run(prog, *flags, cwd=place, status=2).stderr, says)
    assert snapshot(place) == before


def test_there_are_enough_of_them():
    assert len(EARLY) + len(LATE) >= 60


@pytest.mark.parametrize("prog", ["search.py", "train.py"])
def test_help_names_every_flag_and_starts_a_process(prog):
    done = subprocess.run(
        [sys.executable, ROOT / prog, "--help"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0 and not done.stderr
    for action in PARSERS[prog]._actions:
        assert all(option in done.stdout for option in action.option_strings)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(place, tmp_path):
    whole = (place / "search/checkpoint.pt").read_bytes()
    state = checkpoints.load(place / "search/checkpoint.pt")
    rng = random.Random(0)
    noticed = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        try:
            loaded = checkpoints.load(str(tmp_path / "checkpoint.pt"))
        except utils.UserError as error:
            assert "checkpoint.pt is damaged" in str(error) and "\n" not in str(error)
            noticed += 1
        else:  # a byte that says nothing: padding, dates
            assert_same(loaded, state)
    assert noticed > 20


# ------------------------------------------------------------------------------------------------
# Failures on the way
# ------------------------------------------------------------------------------------------------


def test_divergence_names_epoch_step_and_rate(tmp_path):
    done = Process(*TWO_STAGE, "--epochs", 3, "--learning_rate", 1e30, "--grad_clip", 1e30,
                   "--save", "d", cwd=tmp_path)
    assert done.wait() == 2
    assert done.stderr.count("\n") == 1
    for part in ("epoch ", "step ", "not finite", "1e+30", "smaller --learning_rate"):
        assert part in done.stderr, done.stderr


def test_the_last_good_checkpoint_survives_divergence(tmp_path):
    meddle = tmp_path / "meddle.py"
    # From the 11th cross-entropy on (the second epoch has 6, the first too) the loss is infinite.
    meddle.write_text(
        "import torch.nn.functional as F\n"
        "whole, calls = F.cross_entropy, []\n"
        "def cross_entropy(logits, y, **options):\n"
        "    calls.append(1)\n"
        "    return whole(logits, y, **options) * (float('inf') if len(calls) > 12 else 1)\n"
        "F.cross_entropy = cross_entropy\n"
    )
    done = Process(*TWO_STAGE, "--epochs", 3, "--save", "d", cwd=tmp_path, meddle=meddle)
    assert done.wait() == 2
    assert "epoch 2/3, step" in done.stderr and "--resume d" in done.stderr
    assert torch.load(tmp_path / "d/checkpoint.pt", weights_only=True)["epoch"] == 1
    run("search.py", "--resume", "d", cwd=tmp_path)


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path):
    meddle = tmp_path / "meddle.py"
    # A limit on the size of a file, which the second checkpoint meets, stands for the full disk.
    meddle.write_text(
        "import resource, signal, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "whole, calls = torch.save, []\n"
        "def save(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    whole(*args)\n"
        "torch.save = save\n"
    )
    done = Process(*TWO_STAGE, "--epochs", 3, "--save", "d", cwd=tmp_path, meddle=meddle)
    assert done.wait() == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "d/checkpoint.pt could not be written" in done.stderr
    assert not list((tmp_path / "d").glob("*.partial"))
    assert torch.load(tmp_path / "d/checkpoint.pt", weights_only=True)["epoch"] == 1
    run("search.py", "--resume", "d", cwd=tmp_path)


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    flags = [*TINY, "--batch_size", 480, "--epochs", 1]
    runs = [Process("search.py", *flags, cwd=tmp_path) for _ in range(3)]
    assert [process.wait() for process in runs] == [0, 0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 3
