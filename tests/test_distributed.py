"""Several ranks that train together, by gloo on the CPU."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from scripts import (
    ENVIRONMENT,
    LINGER,
    ONE_STAGE,
    ROOT,
    TINY,
    TRAIN,
    TWO_STAGE,
    Process,
    as_ranks,
    assert_same,
    assert_same_run,
    await_checkpoint,
    imagenet_of_digits,
    killed_in,
    rows,
    run,
    saved,
    stderr_of,
)

LOOPS = {
    "two-stage": [*TWO_STAGE, "--batch_size", 100],
    "every step": [*TWO_STAGE, "--batch_size", 100, "--recover_every", 2],
    "one-stage": [*ONE_STAGE, "--batch_size", 240],
    "training": [*TRAIN, "--batch_size", 240],
    "imagenet": [
        "train.py", "--dataset", "imagenet", "--data", "images", "--image_size", 32, "--arch",
        "ISTA_ImageNet", "--init_channels", 2, "--layers", 3, "--batch_size", 16, "--workers", 1,
    ],
}

# Each rank keeps what it would save as a checkpoint.
KEEP = """
import torch
from harness import distributed
save_checkpoint = runs.Run.save_checkpoint
def keep(self, **state):
    state_and_args = dict(state, args=runs.args_dict(self.args))
    torch.save(state_and_args, f"{self.path}-{distributed.rank()}.pt")
    save_checkpoint(self, **state)
runs.Run.save_checkpoint = keep
"""


def start(script, *flags, cwd, n=2, killed=None, lingers=None):
    """n ranks of a script that find each other; they are killed in an epoch, or one lingers."""
    processes = []
    for rank, text in enumerate(as_ranks(n)):
        prelude = Path(tempfile.mkstemp(suffix=".py")[1])
        prelude.write_text(text + killed_in(killed) + KEEP + LINGER * (rank == lingers))
        processes.append(Process(script, *flags, cwd=cwd, prelude=prelude))
    return processes


def finish(processes):
    for process in processes:
        assert process.wait() == 0, process.stderr
    return processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each loop, the folder of a run by 2 ranks over 3 epochs, and its ranks."""
    made = {}

    def make(loop):
        if loop not in made:
            folder = tmp_path_factory.mktemp("whole")
            if loop == "imagenet":
                imagenet_of_digits(folder / "images")
            processes = start(*LOOPS[loop], "--epochs", 3, "--save", "run", cwd=folder)
            made[loop] = folder, finish(processes)
        return made[loop]

    return make


@pytest.mark.parametrize("loop", [
    pytest.param(loop, marks=[pytest.mark.crash] * (loop in ("every step", "imagenet")))
    for loop in LOOPS
])
def test_ranks_end_with_the_same_weights_codes_and_optimizers(whole, loop):
    folder, _ = whole(loop)
    first, second = (saved(folder / f"run-{rank}.pt") for rank in range(2))
    a, b = first["random"]
    assert torch.equal(a["data"], b["data"]) and not torch.equal(a["torch"], b["torch"])
    assert_same(first, second)
    last = saved(folder / "run/checkpoint.pt")
    assert_same(first, {key: last[key] for key in first})


def test_rank_zero_speaks_and_writes_for_all(whole):
    folder, (first, second) = whole("two-stage")
    assert (second.stdout, second.stderr) == ("", "")
    assert (folder / "run/log.txt").read_text() == first.stdout
    assert [row["epoch"] for row in rows(folder / "run/metrics.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run-0.pt", "run-1.pt"]


@pytest.mark.parametrize("loop", ["training", "imagenet"])
def test_ranks_share_an_evaluation(whole, loop):
    folder, (first, _) = whole(loop)
    flags = ["train.py", "--evaluate", "--weights", "run/network.pt"]
    together, silent = finish(start(*flags, cwd=folder))
    alone = run(*flags, cwd=folder)
    assert together.stdout == alone.stdout and silent.stdout == ""
    accuracies = [float(re.search(r"test accuracy (\S+) %, error", process.stdout)[1])
                  for process in (first, alone)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=4)  # one of 28 images may differ


@pytest.mark.parametrize(("loop", "victim"), [
    ("two-stage", 0), pytest.param("one-stage", 1, marks=pytest.mark.crash),
])
def test_the_death_of_one_rank_ends_the_others_with_a_message(whole, tmp_path, loop, victim):
    folder, _ = whole(loop)
    flags = [*LOOPS[loop], "--epochs", 3, "--save", "run"]
    processes = start(*flags, cwd=tmp_path, lingers=victim)
    await_checkpoint(tmp_path / "run")
    processes[victim].kill(signal.SIGKILL)
    survivor = processes[1 - victim]
    assert processes[victim].wait() == -signal.SIGKILL
    assert survivor.wait() == 2
    message = "another rank of this run has ended; resume from the last checkpoint with: torchrun"
    assert message in stderr_of(survivor) and stderr_of(survivor).count("\n") == 1

    script = LOOPS[loop][0]
    finish(start(script, "--resume", "run", cwd=tmp_path))
    assert_same_run(folder / "run", tmp_path / "run")


@pytest.mark.crash
def test_one_stage_search_resumes_after_its_architecture_is_fixed(whole, tmp_path):
    folder, _ = whole("one-stage")
    last = rows(folder / "run/metrics.jsonl")[-1]["epoch"]
    flags = [*LOOPS["one-stage"], "--epochs", 3, "--save", "run"]
    ranks = start(*flags, cwd=tmp_path, killed=last)
    assert [rank.wait() for rank in ranks] == 2 * [-signal.SIGKILL]
    finish(start("search.py", "--resume", "run", cwd=tmp_path))
    assert_same_run(folder / "run", tmp_path / "run")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_ranks_is_told_once(tmp_path, signum):
    ranks = start(*LOOPS["two-stage"], "--epochs", 99, "--save", "run", cwd=tmp_path)
    await_checkpoint(tmp_path / "run")
    for rank in ranks:
        rank.kill(signum)
    assert [rank.wait() for rank in ranks] == 2 * [128 + signum]
    assert [*map(stderr_of, ranks)] == [f"search.py: stopped by {signum.name}\n", ""]
    command = "torchrun --nproc_per_node=2 search.py --resume run"
    assert ranks[0].stdout.endswith(f"resume from the last checkpoint with: {command}\n")


@pytest.mark.crash
def test_a_run_goes_on_with_another_world_size(whole, tmp_path):
    processes = start(*LOOPS["two-stage"], "--epochs", 1, "--save", "run", cwd=tmp_path)
    finish(processes)
    run("search.py", "--resume", "run", "--epochs", 2, cwd=tmp_path)
    finish(start("search.py", "--resume", "run", "--epochs", 3, cwd=tmp_path, n=3))
    assert [row["epoch"] for row in rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    states = [saved(tmp_path / f"run-{rank}.pt") for rank in range(3)]
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])
    assert len(states[0]["random"]) == 3
    assert [s["args"]["batch_size"] for s in states] == 3 * [2 * 100 // 3]


# A cell whose nodes use input 1 alone, so that no loss depends on what is made of input 0.
LOPSIDED = (
    "Genotype(normal=[{0}], normal_concat=range(2, 6), reduce=[{0}], reduce_concat=range(2, 6))"
).format(", ".join(["('sep_conv_3x3', 1), ('dil_conv_3x3', 1)"] * 4))


def test_parameters_that_no_loss_depends_on_are_no_obstacle(tmp_path):
    flags = ["train.py", *TINY, "--no-cutout", "--arch", LOPSIDED, "--batch_size", 240,
             "--epochs", 2]
    finish(start(*flags, "--save", "run", cwd=tmp_path))
    assert_same(*(saved(tmp_path / f"run-{rank}.pt") for rank in range(2)))


AVERAGE = """
import torch
import torch.nn.functional as F
from harness import distributed
from model_search import Network

distributed.start()
torch.manual_seed(0)
net = Network(2, 10, 3)
x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))

def gradients(net, x, y):
    for p in net.parameters():
        p.grad = None
    F.cross_entropy(net(x)[0], y).backward()
    return {name.removeprefix("module."): None if p.grad is None else p.grad.clone()
            for name, p in net.named_parameters()}

each = [gradients(net, x[i : i + 2], y[i : i + 2]) for i in (0, 2)]
parallel = distributed.data_parallel(net, net.weight_parameters())
i = 2 * distributed.rank()
for _ in range(2):
    gradients(parallel, x[i : i + 2], y[i : i + 2])
    distributed.average_gradients(net.arch_parameters())
    together = {name: p.grad for name, p in net.named_parameters()}
    for name, a in each[0].items():
        assert (a is None) == (together[name] is None), name
        if a is not None:
            torch.testing.assert_close(together[name], (a + each[1][name]) / 2)
    assert any(each[0][f"normal_code.b.{j}"].abs().max() > 0 for j in range(4))
"""


def test_gradients_are_the_mean_over_the_ranks(tmp_path):
    script = tmp_path / "average.py"
    script.write_text(AVERAGE)
    finish(start(script, cwd=tmp_path))


CODES = """
import torch
from harness import distributed
from model_search import Network

distributed.start()
torch.manual_seed(distributed.rank())  # another network on each
net = Network(2, 10, 3)
own = [z.tolist() for code in net.codes for z in code.z]
net.recover(broadcast=distributed.from_rank_zero)
codes = [z.tolist() for code in net.codes for z in code.z]
of_all = distributed.gather((own, codes, [code.support for code in net.codes]))
assert of_all[0][0] != of_all[1][0] and of_all[0][1:] == of_all[1][1:]
assert codes == of_all[0][0]
"""


def test_all_ranks_take_the_codes_of_rank_zero(tmp_path):
    script = tmp_path / "codes.py"
    script.write_text(CODES)
    finish(start(script, cwd=tmp_path))


def torchrun(*command, cwd):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node=2", str(ROOT / command[0]), *map(str, command[1:])],
        cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
    )


@pytest.mark.crash
def test_torchrun_starts_it(tmp_path):
    done = torchrun(*LOOPS["training"], "--epochs", 1, "--save", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("new run in run\n") == 1 and (tmp_path / "run/network.pt").exists()


def test_a_folder_that_exists_is_refused_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").touch()
    ranks = start(*LOOPS["training"], "--epochs", 1, "--save", "run", cwd=tmp_path)
    assert [rank.wait() for rank in ranks] == [2, 2]
    error = "".join(map(stderr_of, ranks))
    assert error.count("\n") == 1 and "exists already and is not overwritten" in error


def test_a_batch_per_rank_that_is_too_large_is_refused_once(tmp_path):
    processes = start(*TRAIN, "--batch_size", 1000, cwd=tmp_path)
    assert [process.wait() for process in processes] == [2, 2]
    first, second = processes
    assert "--batch_size 1000 for each of 2 ranks" in stderr_of(first)
    assert (second.stdout, stderr_of(second)) == ("", "")
    assert not os.listdir(tmp_path)
