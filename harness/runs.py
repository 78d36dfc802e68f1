"""Run folders: created, resumed, written an epoch at a time; and how a script ends.

    runs/NAME/config.json       the flags of the run; starts.jsonl: what was typed at each start
              log.txt           what was printed
              metrics.jsonl     the numbers of each epoch, one JSON object a line
              genotype.json     of a search: the current one; genotypes.jsonl: that of each epoch
              checkpoint.pt     all that is needed to go on; checkpoint-previous.pt: an epoch before
              lock              locked by the process that writes the run
              network.pt        a trained network
              tensorboard/      events; scripts/: the sources that made the run
"""

import contextlib
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import genotypes
import ista
from harness import checkpoints, distributed, flags
from harness.distributed import rank_zero_only
from utils import Diverged, UserError, is_out_of_memory, peak_memory, write_file, writing

try:
    import fcntl
except ImportError:  # there is none on Windows
    fcntl = None

SOURCES = Path(__file__).resolve().parent.parent

# What may be given anew at a resumption.
FREE = {"resume", "evaluate", "device", "workers", "report_freq", "data", "cuda_graphs", "compile"}


# ------------------------------------------------------------------------------------------------
# How a script ends
# ------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """SIGINT or SIGTERM."""


@contextlib.contextmanager
def command(prog):
    """Run a script's main: what a person can fix ends in one line and exit status 2.

    SIGINT and SIGTERM end in exit status 130 and 143, and a line that says how to go on.
    """

    def stop(signum, frame):
        raise Stopped(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    with contextlib.suppress(AttributeError):  # not a stream of text of its own
        sys.stdout.reconfigure(errors="backslashreplace")  # λ and → are not in every encoding
    # A full disk is met by TensorBoard's thread too; the next event raises its error here.
    threading.excepthook = lambda error: (
        issubclass(error.exc_type, OSError) or threading.__excepthook__(error)
    )
    try:
        distributed.start()
        yield
        distributed.stop()
    except (UserError, ista.SolverUnavailable) as error:
        flags.fail(prog, error)
    except Stopped as stopped:
        signum = stopped.args[0]
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        if Run.latest:
            with contextlib.suppress(UserError):  # a full disk
                Run.latest.log(f"stopped; {Run.latest.how_to_resume()}")
        if distributed.rank() == 0:
            print(f"{prog}: stopped by {signal.Signals(signum).name}", file=sys.stderr)
        sys.exit(128 + signum)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            flags.fail(prog, "there is too little memory for this: give a smaller --batch_size, "
                       "--init_channels, --layers or --image_size")
        if not distributed.is_loss(error):
            raise
        reason = str(error).splitlines()[0]
        if not Run.latest:  # the rank that ended has said why
            flags.fail(prog, f"another rank of this run has ended: start again ({reason})")
        print(f"{prog}: error: another rank of this run has ended; "
              f"{Run.latest.how_to_resume()} ({reason})", file=sys.stderr)
        sys.exit(2)
    finally:
        if Run.latest and Run.latest.claimed:
            Run.latest.claimed.close()


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


class Run:
    """A run and its folder, which is made, or gone on with, by `begin`.

    Until then nothing is written, so that a run which cannot start leaves nothing behind. Of
    several ranks, rank 0 writes; all may call the methods.

    args : argparse.Namespace
        Of a resumed run its own, but for what was typed anew (`FREE`, and more epochs).
    checkpoint : dict or None
        The last one of a resumed run.
    path : str or None
        The folder, once begun.
    """

    latest = None

    def __init__(self, kind, args):
        self.kind, self.args, self.checkpoint, self.path = kind, args, None, None
        self.kept, self.warned, self.board, self.claimed = [], set(), None, None
        if args.resume:
            self._load(args)

    def _load(self, typed):
        """Take the checkpoint of --resume, and the flags of its run."""
        path = flags.checkpoint_path(typed.resume)
        checkpoint = checkpoints.load_run(path, self.kind)
        saved = {**vars(typed), **checkpoint["args"]}  # a newer flag than the run: its default
        for name in typed.typed:
            value = getattr(typed, name)
            is_limit = name == "epochs" or (
                name == "max_search_epochs" and checkpoint["phase"] == "searching")
            if name in FREE or (is_limit and value > saved[name]):
                saved[name] = value
            elif saved.get(name) != value:
                raise UserError(
                    f"--{name} {value} contradicts the run in {typed.resume}, which has "
                    f"{saved.get(name)}: leave it out, or start a new run"
                )
        # All ranks together go on with the batches they had.
        together = saved["batch_size"] * len(checkpoint["random"])
        saved["batch_size"] = max(together // distributed.world_size(), 2)
        if "cuda_graphs" not in typed.typed and saved["cuda_graphs"]:
            saved["cuda_graphs"] = None  # the run may go on on another device
        saved.update(save=os.path.dirname(path) or ".", typed=typed.typed, resume=typed.resume)
        self.checkpoint, self.args = checkpoint, type(typed)(**saved)

    def begin(self, device, columns):
        """Make the folder, or cut an old one back to its checkpoint; print the table's head.

        `columns`: the head of each, and a format string of its text, for the row of an epoch.
        """
        path = self.args.save if self.checkpoint else None
        if distributed.rank() == 0:
            path = path or self._make_folder()
            if fcntl:
                self._claim(path)
        self.path, self.device = distributed.from_rank_zero(path), device
        Run.latest = self
        kept, self.kept = self.kept, []
        if self.checkpoint:
            epoch, epochs = self.checkpoint["epoch"], self.checkpoint["args"]["epochs"]
            self._cut(epoch)
            self.log(f"resumed {self.path} after epoch {epoch}")
            if self.args.epochs != epochs:
                self.log(f"--epochs is {self.args.epochs} now, and was {epochs}: from here on, "
                         "learning rate and drop-path follow the schedule of "
                         f"{self.args.epochs} epochs")
        else:
            self.log(f"new run in {self.path}")
        for text in kept:
            self.log(text, whole=True)
        self._keep_sources()
        self.columns = {"epoch": "{name}", **columns, "GiB": "{peak_memory_gib:.2f}",
                        "time": "{time}", "left": "{left}"}
        self.log(table_row(self.columns, self.columns), whole=True)

    def _make_folder(self):
        args = self.args
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = args.save or os.path.join("runs", f"{self.kind}-{stamp}")
        # Two runs that start in the same second get folders of their own.
        names = [path] if args.save else [path, *(f"{path}-{k}" for k in range(2, 1000))]
        for name in names:
            with contextlib.suppress(FileExistsError), writing(name):
                if not (args.save and os.path.isdir(name) and not os.listdir(name)):
                    os.makedirs(name)
                break
        else:
            raise UserError(
                f"--save {path} exists already and is not overwritten: choose another folder"
            )
        write_file(os.path.join(name, "config.json"), json.dumps(saved(args), indent=1).encode())
        return name

    def _claim(self, path):
        """Refuse a folder that another process is writing to; a claim ends as `command` does.

        A POSIX lock ends when its process closes any descriptor of the file, so nothing else may
        open this one.
        """
        with contextlib.suppress(OSError):  # a file system without locks
            self.claimed = open(os.path.join(path, "lock"), "wb")
            try:
                fcntl.lockf(self.claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path} is being written by another process: let it end, or end "
                                "it, and resume then") from None

    @rank_zero_only
    def _cut(self, epoch):
        """Drop the rows of the .jsonl files that are later than `epoch`, or half written.

        An epoch's rows are written before its checkpoint, so a run that was stopped between the
        two would repeat them.
        """
        for path in map(self.file, ("metrics.jsonl", "genotypes.jsonl")):
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    lines = [line for line in file if line.endswith("}\n")]
                kept = [line for line in lines if json.loads(line)["epoch"] <= epoch]
                write_file(path, "".join(kept).encode())

    @rank_zero_only
    def _keep_sources(self):
        """Note the start, and keep a copy of the sources where they are not those of before."""
        git = ["git", "-C", str(SOURCES), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = None
        with contextlib.suppress(OSError):  # git is not installed
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        self.append("starts.jsonl", dict(
            time=datetime.datetime.now().isoformat(timespec="seconds"), typed=sys.argv,
            commit=commit or None, device=str(self.device), python=platform.python_version(),
            torch=torch.__version__, numpy=np.__version__, ranks=distributed.world_size(),
        ))
        files = {*SOURCES.glob("*.py"), *SOURCES.glob("harness/*.py")}
        for module in [*sys.modules.values()]:  # and what else an edited script imports
            path = Path(getattr(module, "__file__", None) or "/")
            if path.is_relative_to(SOURCES) and "site-packages" not in path.parts:
                files.add(path)
        now = {path.relative_to(SOURCES): path.read_bytes() for path in files}
        copies = sorted(Path(self.path).glob("scripts*"), key=os.path.getmtime)
        changed = [
            str(name) for name, text in now.items()
            if copies and (copies[-1] / name).exists() and (copies[-1] / name).read_bytes() != text
        ]
        if copies and not changed:
            return
        folder = Path(self.path, "scripts")
        if copies:
            folder = Path(self.path, f"scripts-after-epoch-{self.checkpoint['epoch']}")
            self.log(f"the sources have changed since the run's last start: "
                     f"{', '.join(sorted(changed))}; they are kept in {folder.name}")
        for name, text in now.items():
            with writing(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(text)

    def file(self, name):
        return os.path.join(self.path, name)

    # --------------------------------------------------------------------------------------------
    # Log
    # --------------------------------------------------------------------------------------------

    @rank_zero_only
    def log(self, text, whole=False):
        """Print a text, and append it to log.txt; before `begin`, keep it until then.

        Lines of more than 100 columns are broken, unless they are to be copied `whole`.
        """
        if not whole:
            text = "\n".join(
                textwrap.fill(line, 100, subsequent_indent="    ", break_long_words=False,
                              break_on_hyphens=False)
                for line in text.splitlines()
            )
        if self.path is None:
            self.kept.append(text)
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # nobody reads it any more, as after `| head`: the run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        path = self.file("log.txt")
        with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}\n")

    def warn(self, text, kind=None):
        """Log a warning; of warnings of one `kind`, only the first."""
        if kind is None or kind not in self.warned:
            self.warned.add(kind)
            self.log(f"warning: {text}")

    @rank_zero_only
    def say(self):
        """Print what was logged, in a script that begins no run."""
        print("\n".join(self.kept), flush=True)

    def how_to_resume(self):
        """What the user can do with a run that ended early."""
        if not os.path.exists(self.file("checkpoint.pt")):
            return "no epoch was finished, so there is no checkpoint yet"
        script, path = os.path.basename(sys.argv[0]), shlex.quote(self.path)
        return ("go on from the last checkpoint with: "
                f"{distributed.launcher()} {script} --resume {path}")

    # --------------------------------------------------------------------------------------------
    # An epoch
    # --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def epoch(self, epoch, name, batches, left, **row):
        """Time an epoch, show its progress, and put its numbers in log, metrics and TensorBoard.

        `name` is what the log calls it, "3/50" say; `left` are the epochs of the run after it, and
        whether there may be more. Yields the row of the epoch, a dict to be filled, with numbers,
        arrays and dicts of any library. When the block ends they are made `plain`, for the files.
        """
        began = time.monotonic()
        epochs_left, is_least = left
        images = distributed.world_size() * batches.batch_size
        self.progress = Progress(f"epoch {name}", len(batches), images, self.args.report_freq,
                                 epochs_left, self.log)
        row = {"epoch": epoch, **row}
        try:
            yield row
        except Diverged as error:
            rates = "--learning_rate" + ", --arch_learning_rate" * (self.kind == "search")
            raise UserError(
                f"epoch {name}: {error} at learning rate {row['learning_rate']:.4g}; try a smaller "
                f"{rates} or --grad_clip in a new run; {self.how_to_resume()}"
            ) from None
        finally:
            self.progress.bar.close()
        seconds = time.monotonic() - began
        row.update(plain(row), seconds=seconds, peak_memory_gib=peak_memory(self.device))
        left = ">" * is_least + duration(seconds * epochs_left)
        shown = {**row, "name": name, "time": duration(seconds), "left": left}
        texts = [cell(text, shown) for text in self.columns.values()]
        self.log(table_row(texts, self.columns), whole=True)
        self.append("metrics.jsonl", row)
        self._show(row)

    @rank_zero_only
    def append(self, name, row):
        """Append a row to a file of one JSON object a line."""
        with writing(self.file(name)), open(self.file(name), "a") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def _show(self, row):
        if "tensorboard" in self.warned:
            return
        try:
            if self.board is None:
                # Events of a run that was stopped, from this epoch on, are not shown.
                self.board = SummaryWriter(self.file("tensorboard"), purge_step=row["epoch"])
            for key, value in row.items():
                for name, number in (value if isinstance(value, dict) else {"": value}).items():
                    if isinstance(number, int | float):
                        self.board.add_scalar(f"{key}/{name}".rstrip("/"), number, row["epoch"])
            self.board.flush()
        except OSError as error:  # a run can do without
            self.board = None
            self.warn(f"{self.file('tensorboard')} could not be written, so there are no more "
                      f"events: {error.strerror or error}", "tensorboard")

    @rank_zero_only
    def show_figure(self, name, draw, epoch):
        """Put a matplotlib figure, made by a callable, into the TensorBoard events."""
        if self.board is not None:
            with self._drawing(name):
                self.board.add_figure(name, draw(), epoch)

    # --------------------------------------------------------------------------------------------
    # Files
    # --------------------------------------------------------------------------------------------

    @rank_zero_only
    def save_checkpoint(self, **state):
        """Write checkpoint.pt such that a whole one exists at every moment; keep the one before.

        `state` is made of tensors, numbers, strings, lists and dicts.
        """
        about = dict(kind=self.kind, args=saved(self.args), primitives=genotypes.PRIMITIVES,
                     data=self.data)
        checkpoints.save(self.file("checkpoint.pt"), about | state, keep_last=True)

    @rank_zero_only
    def save_network(self, name, net, **about):
        """Write a network of model.py, and what is known of it, such that `model.load` reads it."""
        state = dict(config=net.config, weights=net.state_dict(), args=saved(self.args),
                     about=about)
        checkpoints.save(self.file(name), state)

    def describe(self, images):
        """What a network has to know of the images that it is trained on."""
        return dict(
            dataset=self.args.dataset, classes=images.classes, mean=[*images.mean],
            std=[*images.std], image_size=self.args.image_size,
        )

    def check_data(self, images):
        """Refuse to go on with other training images than a resumed run began with."""
        self.data = dict(classes=images.classes, counts=images.counts())
        if self.checkpoint and self.checkpoint["data"] != self.data:
            both = [[f"{count} of {name}" for name, count in zip(*data.values(), strict=True)]
                    for data in (self.data, self.checkpoint["data"])]
            differ = [pair for pair in zip_longest(*both, fillvalue="none") if len({*pair}) == 2]
            raise UserError(
                f"{self.args.data} does not hold the training images that {self.args.save} began "
                f"with ({differ[0][0]} now, {differ[0][1]} then): give that --data, or start a new "
                "run"
            )

    @rank_zero_only
    def save_genotype(self, genotype, one_stage, **about):
        """Write genotype.json; see `genotypes.save`."""
        path = self.file("genotype.json")
        with writing(path):
            genotypes.save(path, genotype, one_stage, arguments=saved(self.args), **about)

    @rank_zero_only
    def draw(self, draw_run):
        """Draw the pictures of the run by a callable that takes its folder; log their names."""
        with self._drawing("pictures"):
            names = [os.path.basename(path) for path in draw_run(self.path)]
            self.log(f"pictures in {self.path}: {', '.join(names)}")

    @contextlib.contextmanager
    def _drawing(self, what):
        """Warn of whatever keeps a picture from being drawn: a run can do without."""
        try:
            yield
        except Exception as error:
            self.warn(f"no {what} could be drawn ({type(error).__name__}: {error})", what)


def saved(args):
    """The arguments as a dict that JSON and torch.save can hold."""
    return {name: value for name, value in vars(args).items() if name not in ("typed", "resume")}


def plain(value):
    """A value as Python's own numbers, lists and dicts, whatever library it is of."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


# ------------------------------------------------------------------------------------------------
# Table and progress
# ------------------------------------------------------------------------------------------------


def cell(text, row):
    """A format string filled in, or a dash where the row has nothing that fits it."""
    try:
        return text.format(**row)
    except (LookupError, TypeError, ValueError, AttributeError):
        return "–"


WIDTHS = {"epoch": 9, "GiB": 5, "time": 10, "left": 11}  # what stands below is wider than the head


def table_row(texts, columns):
    """A line of a table whose columns have these names."""
    widths = [max(WIDTHS.get(name, 6), len(name)) for name in columns]
    return "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def duration(seconds):
    """Seconds as text: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


BAR = "{desc} {percentage:3.0f} %|{bar:20}| {n_fmt}/{total_fmt} steps{postfix}"


class Progress:
    """An epoch in progress: a bar on a terminal, else a line every `report_freq` steps."""

    def __init__(self, label, steps, images_per_step, report_freq, epochs_left, log):
        self.label, self.images_per_step, self.report_freq = label, images_per_step, report_freq
        self.epochs_left, self.log, self.began = epochs_left, log, time.monotonic()
        self.bar = tqdm(
            total=steps, desc=label, leave=False, file=sys.stdout, bar_format=BAR,
            disable=distributed.rank() > 0 or not sys.stdout.isatty(), dynamic_ncols=True,
        )
        self.steps, self.total = 0, steps

    def step(self, meter):
        """Count a step; `meter` is read every `report_freq` steps."""
        self.steps += 1
        self.bar.update()
        if self.steps % self.report_freq == 0 and self.steps < self.total:
            loss, accuracy = meter.read()
            pace = (time.monotonic() - self.began) / self.steps
            left = pace * (self.total - self.steps)
            report = (
                f"loss {loss:.3f}, accuracy {accuracy:.2f} %, "
                f"{self.images_per_step / pace:.0f} images/s, {duration(left)} left (of the run: "
                f"{duration(left + pace * self.total * self.epochs_left)})"
            )
            self.bar.set_postfix_str(report)
            if self.bar.disable:
                self.log(f"    step {self.steps}/{self.total}: {report}")
