"""Distributed runs with several ranks, which use gloo on the CPU."""

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

# Each rank writes the state of its checkpoint to a file of its own.
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
    """Start n ranks of a script; `killed` is an epoch, `lingers` is a rank that runs LINGER."""
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
def reference(tmp_path_factory):
    """For each loop, the folder and the ranks of an uninterrupted run of 2 ranks and 3 epochs."""
    made = {}

    def make(loop):
        if loop not in made:
            folder = tmp_path_factory.mktemp("reference")
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
def test_ranks_end_with_the_same_weights_codes_and_optimizers(reference, loop):
    folder, _ = reference(loop)
    first, second = (saved(folder / f"run-{rank}.pt") for rank in range(2))
    a, b = first["random"]
    assert torch.equal(a["data"], b["data"]) and not torch.equal(a["torch"], b["torch"])
    assert_same(first, second)
    last = saved(folder / "run/checkpoint.pt")
    assert_same(first, {key: last[key] for key in first})


def test_only_rank_zero_prints_and_writes(reference):
    folder, (first, second) = reference("two-stage")
    assert (second.stdout, second.stderr) == ("", "")
    assert (folder / "run/log.txt").read_text() == first.stdout
    assert [row["epoch"] for row in rows(folder / "run/metrics.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run-0.pt", "run-1.pt"]


def test_an_evaluation_by_two_ranks_equals_that_by_one(reference):
    folder, (first, _) = reference("training")
    flags = ["train.py", "--evaluate", "--weights", "run/network.pt"]
    together, silent = finish(start(*flags, cwd=folder))
    alone = run(*flags, cwd=folder)
    assert together.stdout == alone.stdout and silent.stdout == ""
    accuracies = [float(re.search(r"test accuracy (\S+) %, error", process.stdout)[1])
                  for process in (first, alone)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.5)


def test_if_one_rank_dies_the_other_ends_and_the_run_can_be_resumed(reference, tmp_path):
    folder, _ = reference("two-stage")
    flags = [*LOOPS["two-stage"], "--epochs", 3, "--save", "run"]
    victim, survivor = start(*flags, cwd=tmp_path, lingers=0)
    await_checkpoint(tmp_path / "run")
    victim.kill(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert survivor.wait() == 2
    message = stderr_of(survivor)
    assert "another rank" in message and message.count("\n") == 1
    finish(start("search.py", "--resume", "run", cwd=tmp_path))
    assert_same_run(folder / "run", tmp_path / "run")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_only_rank_zero_reports_a_signal(tmp_path, signum):
    ranks = start(*LOOPS["two-stage"], "--epochs", 99, "--save", "run", cwd=tmp_path)
    await_checkpoint(tmp_path / "run")
    for rank in ranks:
        rank.kill(signum)
    assert [rank.wait() for rank in ranks] == 2 * [128 + signum]
    assert [*map(stderr_of, ranks)] == [f"search.py: stopped by {signum.name}\n", ""]
    command = "torchrun --nproc_per_node=2 search.py --resume run"
    assert ranks[0].stdout.endswith(f"resume from the last checkpoint with: {command}\n")


@pytest.mark.crash
def test_a_run_can_be_resumed_with_another_world_size(tmp_path):
    finish(start(*LOOPS["two-stage"], "--epochs", 1, "--save", "run", cwd=tmp_path))
    run("search.py", "--resume", "run", "--epochs", 2, cwd=tmp_path)
    finish(start("search.py", "--resume", "run", "--epochs", 3, cwd=tmp_path, n=3))
    assert [row["epoch"] for row in rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    states = [saved(tmp_path / f"run-{rank}.pt") for rank in range(3)]
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])
    assert len(states[0]["random"]) == 3
    assert [s["args"]["batch_size"] for s in states] == 3 * [2 * 100 // 3]


def test_parameters_that_the_loss_does_not_depend_on_are_allowed(tmp_path):
    pairs = ", ".join(["('sep_conv_3x3', 1), ('dil_conv_3x3', 1)"] * 4)  # no node uses input 0
    arch = (f"Genotype(normal=[{pairs}], normal_concat=range(2, 6), reduce=[{pairs}], "
            "reduce_concat=range(2, 6))")
    flags = ["train.py", *TINY, "--no-cutout", "--arch", arch, "--batch_size", 240, "--epochs", 2]
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


CODES = """
import torch
from harness import distributed
from model_search import Network

distributed.start()
torch.manual_seed(distributed.rank())  # the networks differ
net = Network(2, 10, 3)
own = [z.tolist() for code in net.codes for z in code.z]
net.recover(broadcast=distributed.from_rank_zero)
codes = [z.tolist() for code in net.codes for z in code.z]
gathered = distributed.gather((own, codes, [code.support for code in net.codes]))
assert gathered[0][0] != gathered[1][0] and gathered[0][1:] == gathered[1][1:]
assert codes == gathered[0][0]
"""


@pytest.mark.parametrize("text", [
    pytest.param(AVERAGE, id="gradients are averaged"),
    pytest.param(CODES, id="all use the codes of rank 0"),
])
def test_ranks_agree(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    finish(start(script, cwd=tmp_path))


@pytest.mark.crash
def test_torchrun_starts_a_run(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*LOOPS["training"][1:], "--epochs", 1, "--save", "run"]
    done = subprocess.run([*torchrun, ROOT / "train.py", *map(str, flags)], cwd=tmp_path,
                          env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("new run in run\n") == 1 and (tmp_path / "run/network.pt").exists()


@pytest.mark.parametrize("flags, message", [
    (["--save", "existing"], "exists already and is not overwritten"),
    (["--save", "new", "--batch_size", 1000], "--batch_size 1000 for each of 2 ranks"),
])
def test_an_error_of_all_ranks_is_printed_once(tmp_path, flags, message):
    (tmp_path / "existing").mkdir()
    (tmp_path / "existing/notes.txt").touch()
    ranks = start(*LOOPS["training"], *flags, cwd=tmp_path)
    assert [rank.wait() for rank in ranks] == [2, 2]
    error = "".join(map(stderr_of, ranks))
    assert error.count("\n") == 1 and message in error
    assert os.listdir(tmp_path) == ["existing"]
