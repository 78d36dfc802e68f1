"""Runs that are killed at any moment go on to the very end they would have had."""

import random
import re
import signal
import time

import pytest
from scripts import (
    LINGER,
    ONE_STAGE,
    TRAIN,
    TWO_STAGE,
    Process,
    assert_same_run,
    await_checkpoint,
    killed_in,
    rows,
    run,
    saved,
)

from harness import runs

LOOPS = {
    "two-stage": [*TWO_STAGE, "--epochs", 6],
    "one-stage": [*ONE_STAGE, "--epochs", 3],
    "training": [*TRAIN, "--epochs", 6],
}
MANY = pytest.mark.crash


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each loop, the folder of a run that was never stopped, and the seconds it took."""
    made = {}

    def make(loop):
        if loop not in made:
            folder = tmp_path_factory.mktemp("whole")
            Process("search.py", "--help", cwd=folder).wait()  # what starts once is not counted
            began = time.monotonic()
            process = start_or_resume(loop, folder)
            assert process.wait() == 0, process.stderr
            made[loop] = folder / "run", time.monotonic() - began
        return made[loop]

    return make


def start_or_resume(loop, place, prelude=None):
    script, *flags = LOOPS[loop]
    if (place / "run/checkpoint.pt").exists():
        return Process(script, "--resume", "run", cwd=place)
    if (place / "run").exists():  # killed in its first epoch: there is nothing to go on from
        (place / "run").rename(place / f"given up {time.monotonic()}")
    return Process(script, *flags, "--save", "run", cwd=place, prelude=prelude)


def linger(loop, place):
    """A run that has written a checkpoint, and is still going on."""
    (place / "prelude.py").write_text(LINGER)
    process = start_or_resume(loop, place, place / "prelude.py")
    await_checkpoint(place / "run")
    return process


def kill_and_resume(loop, place, seconds, kills, rng):
    """Kill a run at random moments, resuming it each time, and let it end.

    Returns the number of kills that found it running.
    """
    killed = 0
    for _ in range(kills):
        process = start_or_resume(loop, place)
        time.sleep(rng.uniform(0.2, 0.7) * seconds / (1 + killed / 2))
        process.kill(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    process = start_or_resume(loop, place)
    assert process.wait() == 0, process.stderr
    return killed


@pytest.mark.parametrize("loop", [  # one-stage search: see the end
    "two-stage", pytest.param("training", marks=MANY),
])
def test_a_kill_costs_nothing_but_time(whole, tmp_path, loop):
    path, _ = whole(loop)
    process = linger(loop, tmp_path)
    process.kill(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert saved(tmp_path / "run/checkpoint.pt")["epoch"] in (1, 2)
    run(LOOPS[loop][0], "--resume", "run", cwd=tmp_path)
    assert_same_run(path, tmp_path / "run")


@MANY
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loop", LOOPS)
def test_many_kills_cost_nothing_but_time(whole, tmp_path, loop, seed):
    path, seconds = whole(loop)
    rng, killed = random.Random(f"{loop} {seed}"), 0
    while killed < 3:  # 27 kills in all; one that comes too late, after the end, does not count
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        killed += kill_and_resume(loop, place, seconds, 3, rng)
        assert_same_run(path, place / "run")


# Kills at the weak moments of writing a checkpoint, of the epoch that is the 2nd of its process.
MOMENTS = {
    "half of the file is written": (
        "import os, signal\n"
        "calls = []\n"
        "def fsync(file):\n"
        "    calls.append(os.readlink(f'/proc/self/fd/{file}').endswith('checkpoint.pt.partial'))\n"
        "    if sum(calls) == 2:\n"
        "        os.truncate(file, os.fstat(file).st_size // 2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.fsync = fsync\n"
    ),
    "the file is whole, and not in its place": (
        "import os, signal\n"
        "whole, calls = os.replace, []\n"
        "def replace(a, b):\n"
        "    calls.extend([1] * str(b).endswith('checkpoint.pt'))\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    whole(a, b)\n"
        "os.replace = replace\n"
    ),
    "the rows of the epoch are written, the checkpoint is not": killed_in(2),
}


@pytest.mark.crash
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_the_checkpoint_is_written(whole, tmp_path, moment):
    path, _ = whole("two-stage")
    prelude = tmp_path / "prelude.py"
    prelude.write_text(MOMENTS[moment])
    script, *flags = LOOPS["two-stage"]
    process = Process(script, *flags, "--save", "run", cwd=tmp_path, prelude=prelude)
    assert process.wait() == -signal.SIGKILL
    assert saved(tmp_path / "run/checkpoint.pt")["epoch"] == 1
    run(script, "--resume", "run", cwd=tmp_path)
    assert_same_run(path, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize(("loop", "signum"), [
    ("two-stage", signal.SIGINT), ("training", signal.SIGTERM),
    pytest.param("one-stage", signal.SIGTERM, marks=MANY),
])
def test_a_signal_ends_the_step_and_says_how_to_go_on(whole, tmp_path, loop, signum):
    path, _ = whole(loop)
    process = linger(loop, tmp_path)
    process.kill(signum)
    assert process.wait() == 128 + signum, process.stdout + process.stderr
    assert process.stderr == f"{LOOPS[loop][0]}: stopped by {signum.name}\n"
    command = re.search(r"resume from the last checkpoint with: python (\S+) --resume (\S+)",
                        process.stdout)
    assert not list((tmp_path / "run").glob("*.partial"))
    run(command[1], "--resume", command[2], cwd=tmp_path)
    assert_same_run(path, tmp_path / "run")


def test_a_run_is_not_resumed_while_it_goes_on(tmp_path, monkeypatch):
    process = linger("training", tmp_path)
    done = run("train.py", "--resume", "run", cwd=tmp_path, status=2)
    assert done.stderr.count("\n") == 1 and "is being written by another process" in done.stderr
    assert (tmp_path / "run/log.txt").read_text().count("resumed") == 0
    process.kill(signal.SIGKILL)
    process.wait()
    begin, kept = runs.Run.begin, []
    monkeypatch.setattr(runs.Run, "begin", lambda *args: kept.append(args) or begin(*args))
    run("train.py", "--resume", "run", cwd=tmp_path)
    resumed = Process("train.py", "--resume", "run", "--epochs", 7, cwd=tmp_path)
    assert kept and resumed.wait() == 0, "the process that ended a run may live on"


def test_a_signal_before_there_is_a_checkpoint_says_so(tmp_path):
    (tmp_path / "prelude.py").write_text(
        "import os, signal, torch\n"
        "torch.save = lambda *args: os.kill(os.getpid(), signal.SIGINT)\n"
    )
    process = start_or_resume("two-stage", tmp_path, tmp_path / "prelude.py")
    assert process.wait() == 130
    assert process.stderr == "search.py: stopped by SIGINT\n"
    last = process.stdout.splitlines()[-1]
    assert last == "stopped; no epoch was finished, so there is no checkpoint yet"
    assert (tmp_path / "run/log.txt").read_text() == process.stdout


@pytest.mark.crash
@pytest.mark.parametrize("phase", ["searching", "training"])
def test_one_stage_search_resumes_in_either_phase(whole, tmp_path, phase):
    path, _ = whole("one-stage")
    searching = sum(row["phase"] == "searching" for row in rows(path / "metrics.jsonl"))
    prelude = tmp_path / "prelude.py"
    prelude.write_text(killed_in(2 if phase == "searching" else searching + 2))
    script, *flags = LOOPS["one-stage"]
    process = Process(script, *flags, "--save", "run", cwd=tmp_path, prelude=prelude)
    assert process.wait() == -signal.SIGKILL
    run(script, "--resume", "run", cwd=tmp_path)
    assert_same_run(path, tmp_path / "run")
