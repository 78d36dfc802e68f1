"""Run the scripts as a person does: their `main` in this process, or in one of its own."""

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
from unittest import mock

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

# A command that runs commands on a GPU that is not there.
COMMAND = os.environ.get("NULLGPU", ROOT.parent / "shared/nullgpu/nullgpu")
NULLGPU = os.path.abspath(shutil.which(COMMAND) or COMMAND)


def null_gpu(*options):
    """A command that runs commands on a null GPU, with values."""
    return NULLGPU, "--values", *options, "--"


GPU = null_gpu()
needs_null_gpu = pytest.mark.skipif(
    not shutil.which(NULLGPU), reason=f"there is no null GPU at {NULLGPU}")

# Runs in this process are to equal those in others to the bit.
os.environ.update(ENVIRONMENT)
torch.set_num_threads(1)

# Handwritten digits at 8×8 pixels and the smallest networks: an epoch takes 0.2 s.
TINY = ["--dataset", "digits", "--image_size", "8", "--init_channels", "2", "--layers", "3"]
TWO_STAGE = ["search.py", *TINY, "--batch_size", "240", "--arch_learning_rate", "0.02"]
ONE_STAGE = [
    "search.py", "--one_stage", *TINY, "--no-cutout", "--batch_size", "480",
    "--arch_learning_rate", "0.02", "--freeze_tol", "0.05", "--max_search_epochs", "3",
]
TRAIN = ["train.py", *TINY, "--no-cutout", "--arch", "ISTA_twostage", "--batch_size", "480"]


class Process:
    """A script running in a process of its own; see `zygote.py` for where it comes from.

    Parameters
    ----------
    script : str or path
    *flags
    cwd : path
    meddle : path, optional
        Of a file that is run first, to change the libraries.
    launcher : tuple of str
        A command that runs commands, for a process that is to have a CUDA device.
    pictures : bool
        Whether it draws any: they take longer than a tiny run.
    """

    _zygotes = {}

    def __init__(self, script, *flags, cwd, meddle=None, launcher=(), pictures=False):
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
            meddle=meddle and str(meddle), output=[file.name for file in self.output],
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
        """The exit status, -k after signal k; stdout and stderr are there then."""
        self.status = self._ask(wait=self.pid)
        self.stdout, self.stderr = (file.read() for file in self.output)
        return self.status


class Done(NamedTuple):
    """What a script that has ended left."""

    status: int
    stdout: str
    stderr: str

    @property
    def words(self):
        """What it printed, however its lines are broken."""
        return " ".join(self.stdout.split())


def run(script, *flags, cwd, status=0, pictures=False, launcher=()):
    """Run a script to its end, in this process where it can be; check its exit status if not None.

    Returns
    -------
    Done
    """
    if launcher or script not in SCRIPTS:
        process = Process(script, *flags, cwd=cwd, launcher=launcher, pictures=pictures)
        done = Done(process.wait(), process.stdout, process.stderr)
    else:
        done = _run_here(script, [*map(str, flags)], cwd, pictures)
    assert status in (None, done.status), done.stdout + done.stderr
    return done


def _run_here(script, flags, cwd, pictures):
    out, err, status, folder = io.StringIO(), io.StringIO(), 0, os.getcwd()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch.object(sys, "argv", [script, *flags]))
        stack.enter_context(mock.patch.object(runs.Run, "latest", None))
        stack.enter_context(mock.patch.object(threading, "excepthook", threading.__excepthook__))
        if not pictures:
            stack.enter_context(mock.patch.object(visualize, "draw_run", lambda path: []))
            stack.enter_context(mock.patch.object(runs.Run, "show_figure"))
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


# Stays for a minute in a step of the second or third epoch, for a signal to find it running. At the
# first step it reads its folder, as the code that draws pictures does, which must not end the lock.
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


# Ends a run when it has written the rows of an epoch, and not its checkpoint.
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
    """Text of a file that, run first, has a script killed in an epoch: before its checkpoint."""
    return f"KILLED = {epoch}\n{KILL}"


def as_ranks(n):
    """Texts of files that n ranks run first, to find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        "import os\n"
        f"os.environ.update(RANK='{rank}', LOCAL_RANK='{rank}', WORLD_SIZE='{n}', "
        f"LOCAL_WORLD_SIZE='{n}', MASTER_ADDR='127.0.0.1', MASTER_PORT='{port}')\n"
        for rank in range(n)
    ]


def said(process):
    """What a script put on standard error.

    Torch adds a warning where the rank that keeps the store is not the last to end; under torchrun
    no rank keeps it.
    """
    return re.sub(r"^\[W.* TCPStore\.cpp.*\n(.+\n)*\n", "", process.stderr, flags=re.MULTILINE)


def saved(path):
    """What a checkpoint or a network file holds."""
    return torch.load(path, map_location="cpu", weights_only=True)


def rows(path):
    """Objects of a JSON-lines file, without what differs from one machine or hour to the next."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "peak_memory_gib")}
        for line in Path(path).read_text().splitlines()
    ]


def assert_same(a, b, where=""):
    """Assert that two nested structures are equal, tensors to the bit."""
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
    """Assert that two finished runs have the same results: metrics, genotypes, checkpoint."""
    a, b = Path(a), Path(b)
    for name in ("metrics.jsonl", "genotypes.jsonl"):
        assert (a / name).exists() == (b / name).exists()
        if (a / name).exists():
            assert rows(a / name) == rows(b / name)
    for name in ("checkpoint.pt", "network.pt"):
        assert (a / name).exists() == (b / name).exists()
        if (a / name).exists():
            assert_same(*(saved(path / name) for path in (a, b)), name)
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
            # As in ImageNet: of many sizes, most in colour, some grey, some CMYK.
            image = Image.fromarray(image).convert(("RGB", "RGB", "L", "CMYK")[k % 4])
            image.resize((40 + k, 48)).save(folder / f"{k}.JPEG")
