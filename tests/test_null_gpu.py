"""Whole scripts on a GPU that is not there: torch's own CUDA host code, and values by the CPU.

`make cuda` runs these where there is a null GPU: a command that runs commands on one, named by the
environment variable NULLGPU, or at ../shared/nullgpu/nullgpu. They show mistakes with devices,
generators, host syncs and graphs; not speed, rounding, races, or NCCL, for which gloo stands in.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import (
    CUDA_ENVIRONMENT,
    GPU,
    NULLGPU,
    ONE_STAGE,
    ROOT,
    TRAIN,
    TWO_STAGE,
    Process,
    as_ranks,
    assert_same,
    assert_same_run,
    imagenet_of_digits,
    killed_in,
    needs_null_gpu,
    null_gpu,
    rows,
    run,
    saved,
    stderr_of,
)

pytestmark = [pytest.mark.cuda, needs_null_gpu]
TWO_GPUS = null_gpu("--devices", "2")

IMAGENET = ["--dataset", "imagenet", "--data", "images", "--image_size", 32, "--init_channels", 2,
            "--layers", 3, "--batch_size", 16, "--workers", 1]
EAGER = ["--no-cuda_graphs"]  # else steps are recorded; the null GPU draws other numbers in a graph
# --device: none, "cuda" and "cuda:0".
LOOPS = {
    "two-stage": [*TWO_STAGE, "--batch_size", 160, "--epochs", 2],
    "every step": [
        "search.py", *IMAGENET, "--recover_every", 1, "--epochs", 2, "--device", "cuda",
    ],
    "one-stage": [
        *ONE_STAGE, "--batch_size", 320, "--epochs", 2, "--max_search_epochs", 2, "--device",
        "cuda:0",
    ],
    "training": [
        *TRAIN, "--batch_size", 320, "--epochs", 3, "--drop_path_prob", 0.5, "--cutout",
        "--cutout_length", 4, "--device", "cuda:0",
    ],
    "imagenet": ["train.py", *IMAGENET, "--arch", "ISTA_ImageNet", "--epochs", 2],
    "one-stage imagenet": [
        "search.py", *IMAGENET, "--one_stage", "--arch_learning_rate", 0.003, "--epochs", 2,
        "--max_search_epochs", 2,
    ],
}
EPOCHS = {"two-stage": 2, "every step": 2, "one-stage": 4, "training": 3, "imagenet": 2,
          "one-stage imagenet": 4}
KILLED = {**EPOCHS, "one-stage": 3}  # in this epoch; the first 2 search


def kill_and_resume(loop, cwd, before=EAGER, after=()):
    """Kill a run and resume it, each time with more flags."""
    prelude = cwd / "prelude.py"
    prelude.write_text(killed_in(KILLED[loop]))
    killed = Process(*LOOPS[loop], *before, "--save", "run", cwd=cwd, prelude=prelude, launcher=GPU)
    assert killed.wait() == -signal.SIGKILL, killed.stderr
    return run(LOOPS[loop][0], "--resume", "run", *after, cwd=cwd, launcher=GPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each loop, the folder in which it ran to its end on CUDA, and what it printed."""
    made = {}

    def make(loop):
        if loop not in made:
            folder = tmp_path_factory.mktemp("whole")
            imagenet_of_digits(folder / "images")
            done = run(*LOOPS[loop], *EAGER, "--save", "run", cwd=folder, launcher=GPU)
            assert done.stderr == ""
            made[loop] = folder, done.words
        return made[loop]

    return make


@pytest.mark.parametrize("loop", LOOPS)
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, loop):
    folder, words = whole(loop)
    assert "device: cuda:0" in words and "no CUDA device" not in words
    assert len(rows(folder / "run/metrics.jsonl")) == EPOCHS[loop]
    (tmp_path / "images").symlink_to(folder / "images")
    resumed = kill_and_resume(loop, tmp_path)
    assert "random numbers" not in resumed.words
    assert_same_run(folder / "run", tmp_path / "run")


@pytest.mark.parametrize("loop", ["one-stage", "training", "imagenet", "one-stage imagenet"])
def test_the_cpu_measures_the_same_network_alike(whole, loop):
    folder, _ = whole(loop)
    flags = ["train.py", "--evaluate", "--weights", "run/network.pt"]
    here = run(*flags, cwd=folder).words
    there = run(*flags, cwd=folder, launcher=GPU).words
    assert "device: cuda:0" in there and there.replace("cuda:0", "cpu") == here
    accuracy = saved(folder / "run/network.pt")["about"]["test_accuracy"]
    assert f"test accuracy {accuracy:.2f} %" in here


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_goes_on_on_the_other_kind_of_device_and_back(whole, tmp_path, loop):
    folder, _ = whole(loop)
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "images").symlink_to(folder / "images")
    script, epochs = LOOPS[loop][0], int(LOOPS[loop][LOOPS[loop].index("--epochs") + 1])
    flags = [script, "--resume", "run"]
    on_cpu = ["--device", "cpu"] * ("--device" in LOOPS[loop])
    done = run(*flags, *on_cpu, "--epochs", epochs + 1, cwd=tmp_path)
    assert "the run was on CUDA" in done.words
    done = run(*flags, "--epochs", epochs + 2, "--device", "cuda", cwd=tmp_path, launcher=GPU)
    assert "the run was on the CPU" in done.words and "device: cuda:0" in done.words
    found = [row["epoch"] for row in rows(tmp_path / "run/metrics.jsonl")]
    assert found == [*range(1, EPOCHS[loop] + 3)]


@pytest.mark.parametrize("loop, before, after", [
    ("two-stage", EAGER, ["--cuda_graphs"]), ("one-stage", [], []),
    ("training", ["--cuda_graphs"], EAGER),
])
def test_graphs_end_with_the_values_of_the_same_steps(whole, tmp_path, loop, before, after):
    folder, _ = whole(loop)
    kill_and_resume(loop, tmp_path, before, after)
    eager, graphs = (rows(place / "run/metrics.jsonl") for place in (folder, tmp_path))
    assert len(eager) == len(graphs) == EPOCHS[loop]
    # The null GPU draws other random numbers in a graph: drop-path drops other paths.
    undropped = [k for k, row in enumerate(eager) if not row["drop_path_prob"]]
    assert undropped == list(range(len(undropped))) and undropped
    assert [graphs[k] for k in undropped] == [eager[k] for k in undropped]
    if loop == "two-stage":
        assert_same(*(saved(place / "run/checkpoint.pt")["net"] for place in (folder, tmp_path)))


def test_graphs_are_recorded_while_a_thread_pins_images(whole, tmp_path):
    folder, _ = whole("one-stage imagenet")
    (tmp_path / "images").symlink_to(folder / "images")
    flags = ["--epochs", 1, "--max_search_epochs", 1, "--save", "run"]
    done = run(*LOOPS["one-stage imagenet"], *flags, cwd=tmp_path, launcher=GPU)
    assert "cannot be captured" not in done.words
    eager, graphs = (rows(place / "run/metrics.jsonl")[0] for place in (folder, tmp_path))
    assert graphs["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)


# A drop-path that counts on the device which samples to drop, since the null GPU draws other random
# numbers in a graph. As random masks do, its masks differ from call to call and from step to step.
COUNTED = f"""
import sys, torch
sys.path.append({str(ROOT)!r})
import operations
count = []
def drop_path(x, keep):
    if not count: count.append(torch.zeros((), dtype=torch.int64, device=x.device))
    count[0].add_(1)
    kept = (torch.arange(len(x), device=x.device) * 7 + count[0]) % 10 < 10 * keep
    return x * (kept.to(x.dtype) / keep).view(-1, 1, 1, 1)
operations.drop_path = drop_path
"""

def test_graphs_with_drop_path(tmp_path):
    """Its probability changes from epoch to epoch, in the same graph."""
    (tmp_path / "prelude.py").write_text(COUNTED)
    flags = [*TRAIN, "--drop_path_prob", 0.6, "--batch_size", 320, "--epochs", 3]
    for name, more in ("eager", EAGER), ("graphs", []):
        process = Process(*flags, *more, "--save", name, cwd=tmp_path, launcher=GPU,
                          prelude=tmp_path / "prelude.py")
        assert process.wait() == 0, process.stderr
        assert "cannot be captured" not in " ".join(process.stdout.split())
    assert rows(tmp_path / "eager/metrics.jsonl") == rows(tmp_path / "graphs/metrics.jsonl")
    assert_same(*(saved(tmp_path / name / "checkpoint.pt")["weights"]
                  for name in ("eager", "graphs")))


@pytest.mark.parametrize("command", [TWO_STAGE, TRAIN])
def test_bfloat16(tmp_path, command):
    run(*command, "--epochs", 1, "--amp", "--save", "run", cwd=tmp_path, launcher=GPU)
    loss = rows(tmp_path / "run/metrics.jsonl")[0]["train_loss"]
    run(*command, "--epochs", 1, "--save", "float32", cwd=tmp_path, launcher=GPU)
    expected = rows(tmp_path / "float32/metrics.jsonl")[0]["train_loss"]
    assert 1e-5 < abs(loss / expected - 1) < 0.05  # more than the rounding of float32


def test_bfloat16_is_refused_on_a_gpu_that_would_emulate_it(tmp_path):
    old = null_gpu("--capability", "7.5")
    done = run(*TWO_STAGE, "--amp", cwd=tmp_path, status=2, launcher=old)
    assert re.fullmatch(r"search\.py: error: --amp: .*does not support bfloat16.*\n", done.stderr)
    assert not os.listdir(tmp_path)


def test_a_run_on_a_device_that_is_not_there_goes_on_on_another(tmp_path):
    flags = [*TRAIN, "--epochs", 1, "--device", "cuda:1", "--save", "run"]
    done = run(*flags, cwd=tmp_path, launcher=TWO_GPUS)
    assert "device: cuda:1" in done.words
    resume = ["train.py", "--resume", "run", "--epochs", 2]
    done = run(*resume, cwd=tmp_path, status=2, launcher=GPU)
    assert re.fullmatch(r"train\.py: error: --device cuda:1 cannot be used here.*\n", done.stderr)
    done = run(*resume, "--device", "cuda", cwd=tmp_path, launcher=GPU)
    assert "device: cuda:0" in done.words and "random numbers" not in done.words


def test_two_ranks_take_a_device_each(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*TWO_GPUS, *torchrun, "--nproc_per_node=2", ROOT / "search.py",
         *map(str, [*TWO_STAGE[1:], "--batch_size", 100, "--epochs", 1, "--save", "run"])],
        cwd=tmp_path, env=CUDA_ENVIRONMENT, check=True, capture_output=True,
    )
    first, second = saved(tmp_path / "run/checkpoint.pt")["random"]
    assert torch.equal(first["data"], second["data"])
    assert not torch.equal(first["cuda"], second["cuda"]), "each drops its own paths"
    done = run("search.py", "--resume", "run", "--epochs", 2, cwd=tmp_path, launcher=GPU)
    assert "random numbers" not in done.words


def test_more_ranks_than_devices_are_refused_once(tmp_path):
    ranks = []
    for text in as_ranks(2):
        prelude = tmp_path / f"{len(ranks)}.py"
        prelude.write_text(text)
        ranks.append(Process(*TRAIN, cwd=tmp_path, prelude=prelude, launcher=GPU))
    assert [process.wait() for process in ranks] == [2, 2]
    first, second = ranks
    assert re.fullmatch(r"train\.py: error: more ranks \(2\) than .* \(1\).*\n", stderr_of(first))
    assert (second.stdout, stderr_of(second)) == ("", "") and not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def launches():
    """Of each kind of step, and of recoveries: launches, host syncs, GiB."""
    script = Path(__file__).parent / "launches.py"
    done = subprocess.run(
        [NULLGPU, "--", sys.executable, script], env=CUDA_ENVIRONMENT, check=True,
        capture_output=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind, most_launches, most_syncs, most_memory", [
    ("two-stage", 3050, 0, 2.6), ("two-stage, bfloat16", 3100, 0, 1.4),
    ("one-stage", 3450, 0, 6.0), ("one-stage, bfloat16", 4850, 0, 3.1),
    ("retraining", 2450, 0, 5.1), ("retraining, bfloat16", 3550, 0, 2.7),
    ("recovery of two-stage", 200, 50, 0), ("recovery of one-stage", 200, 50, 0),
])
def test_what_a_step_asks_for(launches, kind, most_launches, most_syncs, most_memory):
    count, syncs, memory, _ = launches[kind]
    assert count <= most_launches and syncs <= most_syncs and memory <= most_memory


@pytest.mark.parametrize("kind", ["two-stage", "one-stage", "retraining"])
def test_bfloat16_adds_few_launches(launches, kind):
    """All casts are made together; BatchNorm is the same in both, as the layout is."""
    float32 = launches.get(f"{kind}, channels-last", launches[kind])
    assert launches[f"{kind}, bfloat16"][0] <= 1.1 * float32[0]


def test_convolutions_and_batch_norms_take_dense_tensors_in_channels_last(launches):
    """Else a kernel falls back to another layout, or copies."""
    found = {kind: strided for kind, (*_, strided) in launches.items()}
    assert sum(" bfloat16" in k or "channels-last" in k or k == "two-stage" for k in found) == 6
    del found["one-stage"], found["retraining"]  # in NCHW
    assert not any(found.values()), found
