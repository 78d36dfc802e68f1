"""Run the scripts, in this process or in a separate one, and compare their results."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import visualize
from harness import runs

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"search.py": "search", "train.py": "train", "tools/export.py": "tools.export"}
CUDA_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT = {**CUDA_ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}

# A command that runs other commands on an emulated GPU.
COMMAND = os.environ.get("NULLGPU", ROOT.parent / "shared/nullgpu/nullgpu")
NULLGPU = os.path.abspath(shutil.which(COMMAND) or COMMAND)


def null_gpu(*options):
    """The command that runs other commands on a null GPU, which computes values on the CPU."""
    return NULLGPU, "--values", *options, "--"


GPU = null_gpu()
needs_null_gpu = pytest.mark.skipif(
    not shutil.which(NULLGPU), reason=f"there is no null GPU at {NULLGPU}")

# Runs in this process must be bit-identical to those in other processes.
os.environ.update(ENVIRONMENT)
torch.set_num_threads(1)

# Handwritten digits at 8×8 pixels and the smallest network: an epoch takes 0.2 s.
TINY = ["--dataset", "digits", "--image_size", "8", "--init_channels", "2", "--layers", "3"]
TWO_STAGE = ["search.py", *TINY, "--batch_size", "240", "--arch_learning_rate", "0.02"]
ONE_STAGE = [
    "search.py", "--one_stage", *TINY, "--no-cutout", "--batch_size", "480",
    "--arch_learning_rate", "0.02", "--freeze_tol", "0.05", "--max_search_epochs", "3",
]
TRAIN = ["train.py", *TINY, "--no-cutout", "--arch", "ISTA_twostage", "--batch_size", "480"]


class Process:
    """A script that runs in a separate process, forked by `zygote.py`.

    `prelude` is the path of a Python file that is run before the script, to patch libraries.
    `launcher` is `GPU` for a process with a CUDA device. Pictures take longer than a tiny run, so
    they are drawn only if `pictures` is true.
    """

    _zygotes = {}

    def __init__(self, script, *flags, cwd, prelude=None, launcher=(), pictures=False):
        self.launcher = launcher
        if launcher not in Process._zygotes:
            Process._zygotes[launcher] = subprocess.Popen(
                [*launcher, sys.executable, Path(__file__).parent / "zygote.py"], text=True,
                env=CUDA_ENVIRONMENT if launcher else ENVIRONMENT,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
        self.output = [tempfile.NamedTemporaryFile("r", errors="replace") for _ in range(2)]
        self.pid = self._ask(
            argv=[str(ROOT / script), *map(str, flags)], cwd=str(cwd),
            prelude=prelude and str(prelude), output=[file.name for file in self.output],
            pictures=pictures,
        )

    def _ask(self, **job):
        zygote = Process._zygotes[self.launcher]
        zygote.stdin.write(json.dumps(job) + "\n")
        zygote.stdin.flush()
        return json.loads(zygote.stdout.readline())

    def kill(self, signum):
        os.kill(self.pid, signum)

    def wait(self):
        """Set stdout and stderr, and return the exit status, which is -k after signal k."""
        self.status = self._ask(wait=self.pid)
        self.stdout, self.stderr = (file.read() for file in self.output)
        return self.status


class Done(NamedTuple):
    """Exit status and output of a finished script."""

    status: int
    stdout: str
    stderr: str

    @property
    def words(self):
        """Standard output without line breaks."""
        return " ".join(self.stdout.split())


def run(script, *flags, cwd, status=0, pictures=False, launcher=()):
    """Run a script to its end, in this process if possible; check its exit status if not None."""
    if launcher or script not in SCRIPTS:
        process = Process(script, *flags, cwd=cwd, launcher=launcher, pictures=pictures)
        done = Done(process.wait(), process.stdout, process.stderr)
    else:
        done = _run_in_this_process(script, [*map(str, flags)], cwd, pictures)
    assert status in (None, done.status), done.stdout + done.stderr
    return done


def _run_in_this_process(script, flags, cwd, pictures):
    out, err, status, folder = io.StringIO(), io.StringIO(), 0, os.getcwd()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(runs.Run, "latest", None)
        patch.setattr(threading, "excepthook", threading.__excepthook__)
        if not pictures:
            patch.setattr(visualize, "draw_run", lambda path: [])
            patch.setattr(runs.Run, "show_figure", lambda *args: None)
        os.chdir(cwd)
        try:
            with runs.command(Path(script).name):
                module = importlib.import_module(SCRIPTS[script])
                module.main(module.get_args_parser().parse_args(flags))
        except SystemExit as end:
            status = end.code
        finally:
            os.chdir(folder)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
    return Done(status, out.getvalue(), err.getvalue())


def await_checkpoint(run):
    """Wait until a run in another process has written a checkpoint."""
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Sleeps in a step of the second or third epoch, so that a signal arrives during a step. The first
# step opens files of the run folder, as drawing code does; this must not release the run's lock.
LINGER = """
import pathlib, time
import torch.nn.functional as F
cross_entropy, calls = F.cross_entropy, []
def linger(*args, **options):
    calls.append(1)
    if len(calls) == 1:
        [path.read_bytes() for path in pathlib.Path().glob("run/*.json")]
    if len(calls) == 20:
        time.sleep(60)
    return cross_entropy(*args, **options)
F.cross_entropy = linger
"""

# Kills a run after it has written the rows of an epoch, and before it writes the checkpoint.
KILL = f"""
import os, signal, sys
sys.path.append({str(ROOT)!r})
from harness import runs
save = runs.Run.save_checkpoint
def save_checkpoint(run, **state):
    if state["epoch"] == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    save(run, **state)
runs.Run.save_checkpoint = save_checkpoint
"""


def killed_in(epoch):
    """Text of a file that, if run first, kills a script in an epoch, before its checkpoint."""
    return f"KILLED = {epoch}\n{KILL}"


def as_ranks(n):
    """Texts of files that, if run first, make n processes ranks of a run, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        "import os\n"
        f"os.environ.update(RANK='{rank}', LOCAL_RANK='{rank}', WORLD_SIZE='{n}', "
        f"LOCAL_WORLD_SIZE='{n}', MASTER_ADDR='127.0.0.1', MASTER_PORT='{port}')\n"
        for rank in range(n)
    ]


def stderr_of(process):
    """Standard error of a rank, without a warning of torch that does not occur under torchrun.

    Torch warns if the rank that holds the store ends before the others.
    """
    return re.sub(r"^\[W.* TCPStore\.cpp.*\n(.+\n)*\n", "", process.stderr, flags=re.MULTILINE)


def saved(path):
    """Load a checkpoint or a network file."""
    return torch.load(path, map_location="cpu", weights_only=True)


def rows(path):
    """Objects of a JSON-lines file, without times and memory."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "peak_memory_gib")}
        for line in Path(path).read_text().splitlines()
    ]


def assert_same(a, b, where=""):
    """Assert that two nested structures are equal, with bit-identical tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "peak_memory_gib", "save"):
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Assert that two finished runs have the same metrics, genotypes, checkpoint and network."""
    a, b = Path(a), Path(b)
    for name in ("metrics.jsonl", "genotypes.jsonl", "checkpoint.pt", "network.pt"):
        assert (a / name).exists() == (b / name).exists()
        if (a / name).exists():
            read = saved if name.endswith(".pt") else rows
            assert_same(read(a / name), read(b / name), name)
    x, y = (json.loads((path / "genotype.json").read_text()) for path in (a, b))
    assert x["normal"] == y["normal"] and x["reduce"] == y["reduce"]


def imagenet_of_digits(root):
    """Make a folder in ImageNet's layout, with 12 and 4 images of each of the digits 0 to 6."""
    digits = load_digits()
    for label in range(7):
        pixels = digits.images[digits.target == label][:16] * (255 / 16)
        for k, image in enumerate(pixels.astype(np.uint8)):
            folder = root / ("train" if k < 12 else "val") / f"n{label:08}"
            folder.mkdir(parents=True, exist_ok=True)
            # As in ImageNet, sizes differ, and some images are grey or CMYK.
            image = Image.fromarray(image).convert(("RGB", "RGB", "L", "CMYK")[k % 4])
            image.resize((40 + k, 48)).save(folder / f"{k}.JPEG")
