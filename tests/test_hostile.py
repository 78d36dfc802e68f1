"""Damaged and foreign files, lost outputs, full disks, divergence: one line, and no run is lost."""

import contextlib
import copy
import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import Process, run

import arguments
import checkpoints
import data
import genotypes
import runs
import utils

TINY = ["--dataset", "imagefolder", "--data", "images", "--image_size", "8",
        "--init_channels", "2", "--layers", "3", "--device", "cpu"]
TWO_STAGE = ["search.py", *TINY, "--batch_size", "4", "--epochs", "2"]
ONE_STAGE = ["search.py", *TINY, "--one_stage", "--no-cutout", "--batch_size", "8", "--epochs", "2",
             "--max_search_epochs", "1"]
TRAIN = ["train.py", *TINY, "--no-cutout", "--batch_size", "8", "--epochs", "2", "--arch",
         "ISTA_twostage"]


call = functools.partial(run, cwd=".")

EVAL = "train.py", "--evaluate", "--weights", "work/network.pt"


def refused(script, *flags):
    """The one line with which a script ends."""
    err = call(script, *flags, status=2).stderr
    assert err.startswith(f"{script}: error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, and with runs that have an epoch to go."""
    place = tmp_path_factory.mktemp("hostile")
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for name in "ab":
            (place / "images" / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "images" / part / name / f"{k}.png")
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SummaryWriter", None)
        for name, flags in (("two", TWO_STAGE), ("one", ONE_STAGE), ("train", TRAIN)):
            call(*flags, "--save", name)
            shutil.copy(f"{name}/checkpoint-previous.pt", f"{name}/checkpoint.pt")
    return place


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(runs, "SummaryWriter", None)
    shutil.rmtree("work", ignore_errors=True)
    return place


def put(kind, state, file="checkpoint.pt"):
    """Make the folder `work`, with the config.json of a kind of run and this file."""
    shutil.rmtree("work", ignore_errors=True)
    os.mkdir("work")
    shutil.copy(f"{kind}/config.json", "work")
    torch.save(state, f"work/{file}")


# ------------------------------------------------------------------------------------------------
# Damaged files
# ------------------------------------------------------------------------------------------------

OTHERS = [None, -1, 10**30, 0.5, "x", [], {}, torch.zeros(2, 3), True]


def mutations(state, depth=3, path=()):
    """(path, value) of each entry, of many alike but some, and each other type; ... drops it."""
    items = list(state.items() if isinstance(state, dict) else enumerate(state))
    if len(items) > 8 and path and path[0] != "args":
        items = [*items[:2], items[-1]]
    for key, value in items:
        yield (*path, key), ...
        yield from (((*path, key), other) for other in OTHERS)
        if isinstance(value, torch.Tensor):
            yield (*path, key), value.to(torch.complex64)
        if isinstance(value, dict | list) and depth > 1:
            yield from mutations(value, depth - 1, (*path, key))


def mutated(state, path, value):
    """A copy of nested dicts and lists in which one entry is another, or is not there."""
    state = copy.copy(state)
    if len(path) > 1:
        state[path[0]] = mutated(state[path[0]], path[1:], value)
    elif value is ...:
        del state[path[0]]
    else:
        state[path[0]] = value
    return state


@pytest.fixture
def patience():
    """Raise TimeoutError in what goes on for a minute."""

    def give_up(*args):
        raise TimeoutError("endless")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Every so many of the mutations, so that different ones come up at each entry.
CASES = [("two", "search.py", 41), ("one", "search.py", 29), ("train", "train.py", 19)]


@pytest.mark.parametrize(("run", "script", "stride"), CASES)
def test_a_damaged_checkpoint_resumes_or_ends_in_one_line(here, patience, run, script, stride):
    state = torch.load(f"{run}/checkpoint.pt", weights_only=True)
    statuses = []
    for path, value in list(mutations(state))[::stride]:
        put(run, mutated(state, path, value))
        status, _, err = call(script, "--resume", "work", status=None)
        assert status in (0, 2) and err.count("\n") == (status == 2), (path, value, err)
        statuses.append(status)
    assert statuses.count(2) > 10


def test_a_damaged_network_evaluates_or_ends_in_one_line(here, patience):
    state = torch.load("train/network.pt", weights_only=True)
    statuses = []
    for path, value in list(mutations(state))[::31]:
        put("train", mutated(state, path, value), "network.pt")
        status, _, err = call(*EVAL, status=None)
        assert status in (0, 2) and err.count("\n") == (status == 2), (path, value, err)
        statuses.append(status)
    assert statuses.count(2) > 10


DAMAGE = [
    ("two", ("schedule_start",), None),  # would be searched without end
    ("one", ("schedule_start",), None),
    ("one", ("schedule_start",), 7),
    ("two", ("epoch",), -1),
    ("two", ("epoch",), 1.0),
    ("two", ("row",), {}),
    ("two", ("net", "stem.0.weight"), ...),
    ("two", ("net", "normal_code.z0"), torch.zeros(3)),
    ("two", ("random",), []),
    ("two", ("random", 0, "torch"), torch.zeros(5, dtype=torch.uint8)),
    ("two", ("random", 0, "python"), [3, [], None]),
    ("two", ("weight_optimizer", "state", 0), {}),
    ("two", ("weight_optimizer", "state", 0, "momentum_buffer"), torch.zeros(2)),
    ("two", ("weight_optimizer", "param_groups"), []),
    ("two", ("arch_optimizer", "state"), {}),
    ("two", ("arch_optimizer", "state", 3, "exp_avg"), ...),
    ("two", ("row", "restless"), -1),
    ("two", ("net", "stem.0.weight"), torch.zeros(6, 3, 3, 3, dtype=torch.int64)),
    ("two", ("net", "stem.0.weight"), torch.full((6, 3, 3, 3), torch.nan)),
    ("two", ("net", "normal_code.z0"), torch.ones(14, dtype=torch.float64)),
    ("two", ("net", "normal_code.S"), -torch.ones(4, 2, dtype=torch.int64)),
    ("two", ("net", "normal_code.frozen"), torch.ones(4, dtype=torch.bool)),
    ("two", ("weight_optimizer", "state", 0, "momentum_buffer"), None),
    ("two", ("arch_optimizer", "state", 3, "step"), torch.tensor(-1.0)),
    ("train", ("best",), "x"),
    ("train", ("best",), torch.nan),
    ("train", ("weights", "stem.1.bias"), torch.zeros(6, dtype=torch.int64)),
    ("train", ("config", "layers"), 2**30),  # would be built without end
    ("train", ("config", "genotype", "normal"), []),
    ("train", ("config", "extra"), 1),
    ("train", ("config", 3), 1),
    ("train", ("weights",), {}),
    ("train", ("optimizer", "state", 5), ...),
]


@pytest.mark.parametrize(("run", "path", "value"), DAMAGE)
def test_damage_is_called_so(here, run, path, value):
    put(run, mutated(torch.load(f"{run}/checkpoint.pt", weights_only=True), path, value))
    err = refused("train.py" if run == "train" else "search.py", "--resume", "work")
    assert "work/checkpoint.pt is damaged: " in err or path[-1] == "normal"
    assert sorted(os.listdir("work")) == ["checkpoint.pt", "config.json"]


@pytest.mark.parametrize("value", [None, -1, 2.5, "x", [], True])
@pytest.mark.parametrize("flag", ["batch_size", "seed", "learning_rate", "solver", "one_stage"])
def test_flags_that_nobody_can_have_typed_are_damage(here, flag, value):
    fits = flag == "one_stage" and value is True or flag == "learning_rate" and value == 2.5
    state = torch.load("two/checkpoint.pt", weights_only=True)
    if not fits:
        with pytest.raises(utils.UserError, match="damaged: --"):
            arguments.check_saved("search", {**state["args"], flag: value}, "x")
    arguments.check_saved("search", state["args"], "x")


@pytest.mark.parametrize("run", ["two", "one", "train"])
def test_runs_of_older_versions_go_on(here, run):
    state = torch.load(f"{run}/checkpoint.pt", weights_only=True)
    state["random"] = state["random"][0]
    del state["primitives"]
    for flag in ("label_smoothing", "distinct_edges", "cuda_graphs"):
        state["args"].pop(flag, None)
    if run == "train":
        state["network"], state["model"] = state.pop("config"), state.pop("weights")
    else:
        state["row"].pop("restless")
        for cell in ("normal", "reduce"):
            del state["net"][f"{cell}_code.S"]
    put(run, state)
    config = json.loads(Path(run, "config.json").read_text())
    Path("work/config.json").write_text(json.dumps({k: config[k] for k in state["args"]}))
    call("train.py" if run == "train" else "search.py", "--resume", "work")


def test_a_checkpoint_of_another_run_is_refused(here):
    state = torch.load("two/checkpoint.pt", weights_only=True)
    put("two", mutated(state, ("args", "seed"), 9))
    assert "--seed is 9 in it, and 2 in config.json" in refused("search.py", "--resume", "work")
    put("two", mutated(state, ("args", "seed"), ...))
    assert "--seed is missing in it" in refused("search.py", "--resume", "work")
    for flag, value in (("workers", 1), ("batch_size", 8), ("save", "elsewhere")):
        put("two", mutated(state, ("args", flag), value))
        call("search.py", "--resume", "work")
    Path("work/config.json").write_text("{")
    assert "config.json is damaged" in refused("search.py", "--resume", "work")


def test_a_folder_in_place_of_metrics_is_named(here):
    put("two", torch.load("two/checkpoint.pt", weights_only=True))
    os.mkdir("work/metrics.jsonl")
    assert "work/metrics.jsonl could not be" in refused("search.py", "--resume", "work")


@pytest.mark.parametrize("is_old", [False, True])
def test_a_search_among_other_operations_is_not_resumed(here, monkeypatch, is_old):
    state = torch.load("two/checkpoint.pt", weights_only=True)
    put("two", mutated(state, ("primitives",), ...) if is_old else state)
    monkeypatch.setattr(genotypes, "PRIMITIVES", [*genotypes.PRIMITIVES, "conv_7x7"])
    assert "other operations" in refused("search.py", "--resume", "work")


@pytest.mark.parametrize(("path", "value"), [
    (("about", "classes"), ["a"]), (("about", "classes", 0), 1), (("about", "std", 2), -0.3),
    (("about", "mean"), [0.5, 0.5]), (("args", "image_size"), 0), (("weights", "stem.1.bias"), 0),
    (("config", "num_classes"), 3), (("config", "auxiliary"), False),
])
def test_damage_of_a_network_is_called_so(here, path, value):
    state = torch.load("train/network.pt", weights_only=True)
    put("train", mutated(state, path, value), "network.pt")
    assert "work/network.pt is damaged: " in refused(*EVAL)


def test_a_network_of_an_unknown_operation_is_not_evaluated(here):
    state = torch.load("train/network.pt", weights_only=True)
    put("train", mutated(state, ("config", "genotype", "normal", 0, 0), "conv_7x7"), "network.pt")
    err = refused(*EVAL)
    assert "work/network.pt: normal: there is no operation 'conv_7x7'" in err


# ------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------

WRONG = [
    ([*TRAIN, "--batch_size", "1"], "--no-auxiliary"),
    ([*ONE_STAGE, "--batch_size", "1"], "--no-auxiliary"),
    ([*TRAIN, "--batch_size", "1", "--image_size", "4", "--no-auxiliary"], "--image_size 4"),
    ([*TWO_STAGE, "--init_channels", "200000"], "too little memory"),
    ([*TWO_STAGE, "--init_channels", "9" * 9], "too little memory"),
    ([*TWO_STAGE, "--init_channels", "9" * 20], "at most 2147483647"),
    ([*TWO_STAGE, "--image_size", "100000"], "at most 32768"),
    ([*TWO_STAGE, "--image_size", "32768", "--data", "many"], "too little memory"),
    ([*TWO_STAGE, "--proj_dims", "2000"], "at most 1000"),
    ([*TWO_STAGE, "--learning_rate", "1e300"], "1e38"),
    ([*TWO_STAGE, "--seed", str(2**64)], "at most"),
    ([*TWO_STAGE, "--device", "meta"], "--device meta"),
    ([*TWO_STAGE, "--data", ""], "empty"),
    ([*TWO_STAGE, "--save", ""], "empty"),
    ([*TWO_STAGE, "--save", "a\udcff"], "not UTF-8"),
    ([*TWO_STAGE, "--save", "/dev/null/x"], "Not a directory"),
    ([*TWO_STAGE, "--save", "x" * 300], "name too long"),
    (["search.py", "--resume", ""], "empty"),  # an unset variable must not start a new run
]


@pytest.mark.parametrize(("command", "says"), WRONG)
def test_what_cannot_be_is_refused(here, monkeypatch, command, says):
    if "many" in command:
        monkeypatch.setattr(data.np, "empty", lambda *args: (_ for _ in ()).throw(MemoryError()))
        command[-1] = "images"
    assert says in refused(*command)
    assert not Path("runs").exists()


# A machine with 0.06 GiB more than what is in use when the script begins.
SMALL = """
import os, re
used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 2**10
pages, ask = int(used + 0.06 * 2**30) // os.sysconf("SC_PAGE_SIZE"), os.sysconf
os.sysconf = lambda name: pages if name == "SC_PHYS_PAGES" else ask(name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit may not hold")
def test_more_than_the_memory_in_small_pieces_ends_in_one_line(place, tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    flags = ["--init_channels", 100, "--data", place / "images", "--save", "run"]
    process = Process(*TWO_STAGE, *flags, cwd=tmp_path, meddle=tmp_path / "small.py")
    assert process.wait() == 2
    assert "too little memory" in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(("value", "says"), [(torch.nan, "holds NaN"), (3e38, "is not finite")])
def test_weights_without_a_finite_loss_are_called_so(here, value, says):
    state = torch.load("train/network.pt", weights_only=True)
    state["weights"]["classifier.weight"][0] = value
    put("train", state, "network.pt")
    err = refused(*EVAL)
    assert says in err and "learning_rate" not in err


@pytest.mark.parametrize(("flags", "blamed"), [
    (["--arch_learning_rate", "1e36"], "--arch_learning_rate"),
    (["--learning_rate", "1e30", "--grad_clip", "1e30"], "--learning_rate or --grad_clip"),
])
def test_divergence_blames_the_step_before(here, flags, blamed):
    err = refused(*TWO_STAGE, *flags, "--save", f"work{flags[0]}")
    assert "not finite" in err and f"try a smaller {blamed} in a new run" in err


def test_divergence_of_one_stage_search_names_both_rates(here):
    err = refused(*ONE_STAGE, "--learning_rate", "1e30", "--grad_clip", "1e30", "--save", "work1")
    assert "--learning_rate, --arch_learning_rate or --grad_clip" in err


@pytest.mark.parametrize(("load", "threads", "says"), [(999, 2, True), (0, 2, False),
                                                       (999, 1, False)])
def test_a_busy_machine_is_mentioned(monkeypatch, load, threads, says):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lines = []
    utils.warn_if_busy(torch.device("cpu"), lines.append)
    assert [("OMP_NUM_THREADS" in line and "\n" not in line) for line in lines] == says * [True]


# ------------------------------------------------------------------------------------------------
# Outputs that are lost
# ------------------------------------------------------------------------------------------------


def test_tensorboard_may_be_a_file(place, monkeypatch):
    monkeypatch.chdir(place)
    shutil.rmtree("work", ignore_errors=True)
    put("two", torch.load("two/checkpoint.pt", weights_only=True))
    Path("work/tensorboard").touch()
    done = call("search.py", "--resume", "work", "--epochs", 4)
    assert not done.stderr and done.stdout.count("work/tensorboard could not be written") == 1


resource = pytest.importorskip("resource")


@pytest.mark.parametrize("limit", [10, 4000, 60_000])
def test_a_full_disk_says_so_and_the_last_checkpoint_stands(here, limit):
    put("two", torch.load("two/checkpoint.pt", weights_only=True))
    for name in ("metrics.jsonl", "genotypes.jsonl"):
        shutil.copy(f"two/{name}", "work")
    before = Path("work/checkpoint.pt").read_bytes()
    assert len(before) > 60_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        err = refused("search.py", "--resume", "work")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written: File too large" in err
    assert Path("work/checkpoint.pt").read_bytes() == before
    assert not list(Path("work").glob("*.pt.partial"))
    call("search.py", "--resume", "work")


# What is run first in a process, so that its standard output is no more.
OUTPUTS = {
    "head": "read, write = os.pipe(); os.dup2(write, 1); os.close(read)",
    "closed": "os.close(1); sys.stdout = None",
    "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
    "ascii": "sys.stdout.reconfigure(encoding='ascii')",
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
@pytest.mark.parametrize("way", OUTPUTS)
def test_a_run_outlives_its_standard_output(place, tmp_path, way):
    (tmp_path / "meddle.py").write_text(f"import os, sys\n{OUTPUTS[way]}\n")
    flags = ["--data", place / "images", "--save", "run"]
    if way == "ascii":
        flags += ["--lam", "1e3"]  # the log then has a λ
    done = Process(*TWO_STAGE, *flags, cwd=tmp_path, meddle=tmp_path / "meddle.py")
    assert done.wait() == 0 and not done.stderr, done.stderr
    log = (tmp_path / "run/log.txt").read_text(encoding="utf-8")
    assert "the search is done" in log and ("λ" in log) == (way == "ascii")
    assert checkpoints.load_run(str(tmp_path / "run/checkpoint.pt"), "search")["epoch"] == 2
