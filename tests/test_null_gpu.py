"""Whole scripts on a null GPU, which runs torch's CUDA host code and computes values on the CPU.

`make cuda` runs these tests if there is a null GPU: a command that runs other commands, given by
the environment variable NULLGPU, or ../shared/nullgpu/nullgpu. They find wrong devices, generators,
host synchronizations and graphs, but nothing about speed, rounding, races or NCCL (gloo replaces
it).
"""

import json
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
    assert_same,
    assert_same_run,
    imagenet_of_digits,
    killed_in,
    needs_null_gpu,
    null_gpu,
    rows,
    run,
    saved,
)

pytestmark = [pytest.mark.cuda, needs_null_gpu]
TWO_GPUS = null_gpu("--devices", "2")

IMAGENET = ["--dataset", "imagenet", "--data", "images", "--image_size", 32, "--init_channels", 2,
            "--layers", 3, "--batch_size", 16, "--workers", 1]
EAGER = ["--no-cuda_graphs"]  # in a graph the null GPU draws other random numbers
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
KILLED = {**EPOCHS, "one-stage": 3}  # epoch of the kill; one-stage search has 2 searching epochs


def kill_and_resume(loop, cwd, before=EAGER, after=()):
    """Start a run with the flags `before`, kill it, and resume it with the flags `after`."""
    prelude = cwd / "prelude.py"
    prelude.write_text(killed_in(KILLED[loop]))
    killed = Process(*LOOPS[loop], *before, "--save", "run", cwd=cwd, prelude=prelude, launcher=GPU)
    assert killed.wait() == -signal.SIGKILL, killed.stderr
    return run(LOOPS[loop][0], "--resume", "run", *after, cwd=cwd, launcher=GPU)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """For each loop, the folder and the output of an uninterrupted run on CUDA."""
    made = {}

    def make(loop):
        if loop not in made:
            folder = tmp_path_factory.mktemp("reference")
            imagenet_of_digits(folder / "images")
            done = run(*LOOPS[loop], *EAGER, "--save", "run", cwd=folder, launcher=GPU)
            assert done.stderr == ""
            made[loop] = folder, done.words
        return made[loop]

    return make


@pytest.mark.parametrize("loop", LOOPS)
def test_a_resumed_run_is_bit_identical(reference, tmp_path, loop):
    folder, words = reference(loop)
    assert "device: cuda:0" in words and "no CUDA device" not in words
    assert len(rows(folder / "run/metrics.jsonl")) == EPOCHS[loop]
    (tmp_path / "images").symlink_to(folder / "images")
    resumed = kill_and_resume(loop, tmp_path)
    assert "random numbers" not in resumed.words
    assert_same_run(folder / "run", tmp_path / "run")


@pytest.mark.parametrize("loop", ["one-stage", "training", "imagenet", "one-stage imagenet"])
def test_cpu_and_cuda_evaluate_a_network_alike(reference, loop):
    folder, _ = reference(loop)
    flags = ["train.py", "--evaluate", "--weights", "run/network.pt"]
    on_cpu = run(*flags, cwd=folder).words
    on_cuda = run(*flags, cwd=folder, launcher=GPU).words
    assert "device: cuda:0" in on_cuda and on_cuda.replace("cuda:0", "cpu") == on_cpu
    accuracy = saved(folder / "run/network.pt")["about"]["test_accuracy"]
    assert f"test accuracy {accuracy:.2f} %" in on_cpu


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_can_be_resumed_on_the_cpu_and_on_cuda_again(reference, tmp_path, loop):
    folder, _ = reference(loop)
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "images").symlink_to(folder / "images")
    script, epochs = LOOPS[loop][0], int(LOOPS[loop][LOOPS[loop].index("--epochs") + 1])
    for k, device, launcher in (1, "cpu", ()), (2, "cuda", GPU):
        flags = ["--resume", "run", "--epochs", epochs + k, "--device", device]
        done = run(script, *flags, cwd=tmp_path, launcher=launcher)
        assert f"device: {device}" in done.words and "random numbers cannot" in done.words
    found = [row["epoch"] for row in rows(tmp_path / "run/metrics.jsonl")]
    assert found == [*range(1, EPOCHS[loop] + 3)]


@pytest.mark.parametrize("loop, before, after", [
    ("two-stage", EAGER, ["--cuda_graphs"]), ("one-stage", [], []),
    ("training", ["--cuda_graphs"], EAGER),
])
def test_graphs_compute_the_same_as_eager_steps(reference, tmp_path, loop, before, after):
    folder, _ = reference(loop)
    kill_and_resume(loop, tmp_path, before, after)
    eager, graphs = (rows(place / "run/metrics.jsonl") for place in (folder, tmp_path))
    assert len(eager) == len(graphs) == EPOCHS[loop]
    # Compare the epochs before drop-path, because the null GPU draws other numbers in a graph.
    n = sum(row["drop_path_prob"] == 0 for row in eager)
    assert n > 0 and graphs[:n] == eager[:n]
    if loop == "two-stage":
        assert_same(*(saved(place / "run/checkpoint.pt")["net"] for place in (folder, tmp_path)))


def test_graphs_are_captured_while_a_thread_pins_memory(reference, tmp_path):
    folder, _ = reference("one-stage imagenet")
    (tmp_path / "images").symlink_to(folder / "images")
    flags = ["--epochs", 1, "--max_search_epochs", 1, "--save", "run"]
    done = run(*LOOPS["one-stage imagenet"], *flags, cwd=tmp_path, launcher=GPU)
    assert "cannot be captured" not in done.words
    eager, graphs = (rows(place / "run/metrics.jsonl")[0] for place in (folder, tmp_path))
    assert graphs["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)


# A drop-path with a counter on the device instead of random numbers, because the null GPU draws
# other numbers in a graph. Like random masks, its masks differ from call to call.
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


def test_graphs_follow_the_drop_path_probability(tmp_path):
    (tmp_path / "prelude.py").write_text(COUNTED)
    flags = [*TRAIN, "--drop_path_prob", 0.6, "--batch_size", 320, "--epochs", 3]
    for name, more in ("eager", EAGER), ("graphs", []):
        process = Process(*flags, *more, "--save", name, cwd=tmp_path, launcher=GPU,
                          prelude=tmp_path / "prelude.py")
        assert process.wait() == 0, process.stderr
        assert "captured" not in process.stdout
    assert rows(tmp_path / "eager/metrics.jsonl") == rows(tmp_path / "graphs/metrics.jsonl")
    assert_same(*(saved(tmp_path / name / "checkpoint.pt")["weights"]
                  for name in ("eager", "graphs")))


@pytest.mark.parametrize("command", [TWO_STAGE, TRAIN])
def test_bfloat16_gives_nearly_the_loss_of_float32(tmp_path, command):
    losses = []
    for name, flags in ("bfloat16", ["--amp"]), ("float32", []):
        run(*command, "--epochs", 1, *flags, "--save", name, cwd=tmp_path, launcher=GPU)
        losses.append(rows(tmp_path / name / "metrics.jsonl")[0]["train_loss"])
    assert 1e-5 < abs(losses[0] / losses[1] - 1) < 0.05  # rounding of float32 is below 1e-5


def test_a_run_can_be_resumed_on_another_gpu(tmp_path):
    flags = [*TRAIN, "--epochs", 1, "--device", "cuda:1", "--save", "run"]
    done = run(*flags, cwd=tmp_path, launcher=TWO_GPUS)
    assert "device: cuda:1" in done.words
    resume = ["train.py", "--resume", "run", "--epochs", 2]
    done = run(*resume, cwd=tmp_path, status=2, launcher=GPU)
    assert "--device cuda:1 cannot be used" in done.stderr
    done = run(*resume, "--device", "cuda", cwd=tmp_path, launcher=GPU)
    assert "device: cuda:0" in done.words and "random numbers" not in done.words


def test_each_rank_uses_its_own_device(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*TWO_GPUS, *torchrun, "--nproc_per_node=2", ROOT / "search.py",
         *map(str, [*TWO_STAGE[1:], "--batch_size", 100, "--epochs", 1, "--save", "run"])],
        cwd=tmp_path, env=CUDA_ENVIRONMENT, check=True, capture_output=True,
    )
    first, second = saved(tmp_path / "run/checkpoint.pt")["random"]
    assert torch.equal(first["data"], second["data"])
    assert not torch.equal(first["cuda"], second["cuda"]), "drop-path is the same"
    done = run("search.py", "--resume", "run", "--epochs", 2, cwd=tmp_path, launcher=GPU)
    assert "random numbers" not in done.words


@pytest.fixture(scope="module")
def launches():
    """The output of `launches.py`."""
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
    ("recovery of two-stage", 200, 60, 0), ("recovery of one-stage", 200, 60, 0),
])
def test_step_costs(launches, kind, most_launches, most_syncs, most_memory):
    """Limit launches, host synchronizations and memory (GiB) of a step."""
    count, syncs, memory, _ = launches[kind]
    assert count <= most_launches and syncs <= most_syncs and memory <= most_memory


def test_convolutions_and_batch_norms_get_dense_channels_last_tensors(launches):
    """Otherwise a kernel falls back to another layout or copies its input."""
    found = {kind: strided for kind, (*_, strided) in launches.items()}
    assert sum(" bfloat16" in k or "channels-last" in k or k == "two-stage" for k in found) == 6
    del found["one-stage"], found["retraining"]  # in NCHW
    assert not any(found.values()), found
