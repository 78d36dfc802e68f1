"""Runs that are killed or stopped, and resumed, end like uninterrupted runs."""

import random
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
SLOW = pytest.mark.crash


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """For each loop, the folder of an uninterrupted run, and its duration in seconds."""
    made = {}

    def make(loop):
        if loop not in made:
            folder = tmp_path_factory.mktemp("reference")
            Process("search.py", "--help", cwd=folder).wait()  # excludes the start of the zygote
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
    if (place / "run").exists():  # killed in the first epoch, so there is no checkpoint
        (place / "run").rename(place / f"aborted {time.monotonic()}")
    return Process(script, *flags, "--save", "run", cwd=place, prelude=prelude)


def linger(loop, place):
    """Start a run, and return it when it has written a checkpoint; it is still running then."""
    (place / "prelude.py").write_text(LINGER)
    process = start_or_resume(loop, place, place / "prelude.py")
    await_checkpoint(place / "run")
    return process


def kill_and_resume(loop, place, seconds, kills, rng):
    """Kill a run at random moments, resume it each time, and wait until it ends.

    Returns the number of kills that came before the end of the run.
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


@SLOW
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_can_be_resumed_after_kills_at_random_moments(reference, tmp_path, loop, seed):
    path, seconds = reference(loop)
    rng, killed = random.Random(f"{loop} {seed}"), 0
    while killed < 3:  # 27 kills in total; a kill after the end does not count
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        killed += kill_and_resume(loop, place, seconds, 3, rng)
        assert_same_run(path, place / "run")


# Kills while the second epoch of a process writes its checkpoint.
MOMENTS = {
    "half of the file is written": """
import os, signal
calls = []
def fsync(file):
    calls.append(os.readlink(f"/proc/self/fd/{file}").endswith("checkpoint.pt.partial"))
    if sum(calls) == 2:
        os.truncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
""",
    "the file is not yet renamed": """
import os, signal
rename, calls = os.replace, []
def replace(a, b):
    calls.append(str(b).endswith("checkpoint.pt"))
    if sum(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
os.replace = replace
""",
    "the rows of the epoch are written, but not the checkpoint": killed_in(2),
}


def kill_by_prelude_and_resume(loop, place, text):
    (place / "prelude.py").write_text(text)
    process = start_or_resume(loop, place, place / "prelude.py")
    assert process.wait() == -signal.SIGKILL
    run(LOOPS[loop][0], "--resume", "run", cwd=place)


@SLOW
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_while_it_writes_a_checkpoint_can_be_resumed(reference, tmp_path, moment):
    path, _ = reference("two-stage")
    kill_by_prelude_and_resume("two-stage", tmp_path, MOMENTS[moment])
    assert_same_run(path, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.partial"))


@SLOW
@pytest.mark.parametrize("phase", ["searching", "training"])
def test_one_stage_search_can_be_resumed_in_either_phase(reference, tmp_path, phase):
    path, _ = reference("one-stage")
    searching = sum(row["phase"] == "searching" for row in rows(path / "metrics.jsonl"))
    epoch = 2 if phase == "searching" else searching + 2
    kill_by_prelude_and_resume("one-stage", tmp_path, killed_in(epoch))
    assert_same_run(path, tmp_path / "run")


@pytest.mark.parametrize(("loop", "signum"), [
    ("two-stage", signal.SIGKILL), ("two-stage", signal.SIGINT), ("training", signal.SIGTERM),
    pytest.param("one-stage", signal.SIGTERM, marks=SLOW),
])
def test_a_run_stopped_by_a_signal_can_be_resumed(reference, tmp_path, loop, signum):
    path, _ = reference(loop)
    process = linger(loop, tmp_path)
    process.kill(signum)
    if signum == signal.SIGKILL:
        assert process.wait() == -signal.SIGKILL
        command = f"python {LOOPS[loop][0]} --resume run"
    else:
        assert process.wait() == 128 + signum, process.stdout + process.stderr
        assert process.stderr == f"{LOOPS[loop][0]}: stopped by {signum.name}\n"
        command = process.stdout.splitlines()[-1].split(": ")[-1]
        assert not list((tmp_path / "run").glob("*.partial"))
    assert saved(tmp_path / "run/checkpoint.pt")["epoch"] in (1, 2)
    run(*command.split()[1:], cwd=tmp_path)
    assert_same_run(path, tmp_path / "run")


def test_a_running_run_cannot_be_resumed(tmp_path, monkeypatch):
    process = linger("training", tmp_path)
    done = run("train.py", "--resume", "run", cwd=tmp_path, status=2)
    assert "another process is writing to run" in done.stderr
    process.kill(signal.SIGKILL)
    process.wait()
    # A finished run can be resumed even if its process still exists and holds the Run object.
    begin, kept = runs.Run.begin, []
    monkeypatch.setattr(runs.Run, "begin", lambda *args: kept.append(args) or begin(*args))
    run("train.py", "--resume", "run", cwd=tmp_path)
    resumed = Process("train.py", "--resume", "run", "--epochs", 7, cwd=tmp_path)
    assert kept and resumed.wait() == 0


def test_a_signal_before_the_first_checkpoint_is_reported(tmp_path):
    (tmp_path / "prelude.py").write_text(
        "import os, signal, torch\n"
        "torch.save = lambda *args: os.kill(os.getpid(), signal.SIGINT)\n"
    )
    process = start_or_resume("two-stage", tmp_path, tmp_path / "prelude.py")
    assert process.wait() == 130
    assert process.stderr == "search.py: stopped by SIGINT\n"
    assert "there is no checkpoint yet" in process.stdout.splitlines()[-1]
    assert (tmp_path / "run/log.txt").read_text() == process.stdout
