"""Run folders: create and resume them, log epochs, write files; and how a script ends.

    runs/NAME/config.json       all flags
              starts.jsonl      command line, commit and versions of each start
              log.txt           everything that was printed
              metrics.jsonl     the metrics of each epoch, one JSON object per line
              genotype.json     the genotype
              genotypes.jsonl   the genotype after each epoch of a search
              checkpoint.pt     everything that is needed to resume
              network.pt        a trained network; network-best.pt: the best one of a training
              tensorboard/      events
              scripts/          copies of the sources
              lock              locked by the process that writes to the folder
"""

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import textwrap
import time
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

SOURCES = Path(__file__).resolve().parent.parent

# Flags that may get another value when a run is resumed.
RESUME_OVERRIDES = {
    "resume", "evaluate", "device", "workers", "report_freq", "data", "cuda_graphs", "compile"
}


# ------------------------------------------------------------------------------------------------
# How a script ends
# ------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """SIGINT or SIGTERM was received."""


@contextlib.contextmanager
def command(prog):
    """Run the main function of a script, and report an error of the user in one line.

    The exit status is then 2. SIGINT and SIGTERM end in exit status 130 and 143, with a line that
    says how to resume.
    """

    def stop(signum, frame):
        raise Stopped(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    with contextlib.suppress(AttributeError):  # stdout is no text file in tests and notebooks
        sys.stdout.reconfigure(errors="backslashreplace")  # λ and → are not in every encoding
    try:
        distributed.start()
        yield
        distributed.stop()
    except (UserError, ista.SolverUnavailable) as error:
        flags.fail(prog, error)
    except Stopped as stopped:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        signum = stopped.args[0]
        if Run.latest:
            with contextlib.suppress(UserError):  # a full disk
                Run.latest.log(f"stopped; {Run.latest.resume_hint()}")
        if distributed.rank() == 0:
            print(f"{prog}: stopped by {signal.Signals(signum).name}", file=sys.stderr)
        sys.exit(128 + signum)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            flags.fail(prog, "out of memory: give a smaller --batch_size, --init_channels, "
                       "--layers or --image_size")
        if not distributed.is_peer_failure(error):
            raise
        reason = str(error).splitlines()[0]
        if not Run.latest:  # the rank that has ended has printed its error
            flags.fail(prog, f"another rank of this run has ended: start again ({reason})")
        # Every remaining rank prints this, because the first one may be the one that has ended.
        print(f"{prog}: error: another rank of this run has ended; "
              f"{Run.latest.resume_hint()} ({reason})", file=sys.stderr)
        sys.exit(2)
    finally:
        if Run.latest and Run.latest.lock:
            Run.latest.lock.close()


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


class Run:
    """A run and its folder, which `begin` creates or resumes.

    Nothing is written before `begin`, so that a run that cannot start leaves nothing behind. All
    ranks may call the methods; only rank 0 writes.

    args : argparse.Namespace
        The flags. A resumed run has those of its checkpoint, except for `RESUME_OVERRIDES` and a
        larger number of epochs.
    checkpoint : dict or None
        The checkpoint of a resumed run.
    path : str or None
        The folder, after `begin`.
    """

    latest = None

    def __init__(self, kind, args):
        self.kind, self.args = kind, args
        self.checkpoint = self.path = self.lock = self.board = None
        self.pending, self.warned = [], set()  # lines logged before `begin`; keys of warnings
        if args.resume:
            self._load(args)

    def _load(self, args):
        """Read the checkpoint of --resume, and merge the typed flags into those of its run."""
        path = flags.checkpoint_path(args.resume)
        checkpoint = checkpoints.load_run(path, self.kind)
        merged = {**vars(args), **checkpoint["args"]}  # flags that the run lacks: their defaults
        for name in args.typed:
            value = getattr(args, name)
            can_grow = name == "epochs"
            if name == "max_search_epochs":
                can_grow = checkpoint["phase"] == "searching"
            if name in RESUME_OVERRIDES or (can_grow and value > merged[name]):
                merged[name] = value
            elif can_grow and value < merged[name]:
                raise UserError(f"--{name} {value} is smaller than {merged[name]}, the value of "
                                f"the run in {args.resume}: give a larger one, or start a new run")
            elif merged.get(name) != value:
                raise UserError(
                    f"--{name} {value} contradicts the run in {args.resume}, which has "
                    f"{merged.get(name)}: leave it out, or start a new run"
                )
        # With another number of ranks, the batch of all ranks together stays the same.
        total_batch = merged["batch_size"] * len(checkpoint["random"])
        merged["batch_size"] = max(total_batch // distributed.world_size(), 2)
        if "cuda_graphs" not in args.typed and merged["cuda_graphs"]:
            merged["cuda_graphs"] = None  # the new device may not be a CUDA device
        merged.update(save=os.path.dirname(path) or ".", typed=args.typed, resume=args.resume)
        self.checkpoint, self.args = checkpoint, argparse.Namespace(**merged)

    def begin(self, device, columns):
        """Create the folder, or drop what a resumed run wrote after its checkpoint.

        `columns` maps the heading of each column of the log to a format string for the row of an
        epoch.
        """
        path = None
        if distributed.rank() == 0:
            path = self.args.save if self.checkpoint else self._make_folder()
            self.lock = lock_folder(path)
            config = json.dumps(args_dict(self.args), indent=1)
            write_file(os.path.join(path, "config.json"), config.encode())
        self.path, self.device = distributed.from_rank_zero(path), device
        Run.latest = self
        pending, self.pending = self.pending, []
        if self.checkpoint:
            epoch, epochs = self.checkpoint["epoch"], self.checkpoint["args"]["epochs"]
            self._drop_rows_after(epoch)
            self.log(f"resumed {self.path} after epoch {epoch}")
            if self.args.epochs != epochs:
                self.log(f"--epochs is now {self.args.epochs} instead of {epochs}: from here on, "
                         "learning rate and drop-path follow the schedule of "
                         f"{self.args.epochs} epochs")
        else:
            self.log(f"new run in {self.path}")
        for text in pending:
            self.log(text, wrap=False)
        self._record_start()
        self._copy_sources()
        self.columns = {"epoch": "{name}", **columns, "peak GiB": "{peak_memory_gib:.2f}",
                        "time": "{time}", "left": "{left}"}
        self.log(table_row(self.columns, self.columns), wrap=False)

    def _make_folder(self):
        path = self.args.save
        if path:
            is_empty = os.path.isdir(path) and not os.listdir(path)
            try:
                with writing(path):
                    os.makedirs(path, exist_ok=is_empty)
            except FileExistsError:
                raise UserError(f"--save {path} exists already and is not overwritten: give "
                                "another folder") from None
            return path
        while True:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            path = os.path.join("runs", f"{self.kind}-{stamp}")
            try:
                with writing(path):
                    os.makedirs(path)
                return path
            except FileExistsError:  # another run has started in this second
                time.sleep(1)

    @rank_zero_only
    def _drop_rows_after(self, epoch):
        """Remove rows of the .jsonl files that are later than `epoch` or incomplete.

        The rows of an epoch are written before its checkpoint, so a run that stops between the two
        would repeat them.
        """
        for path in map(self.file, ("metrics.jsonl", "genotypes.jsonl")):
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    lines = [line for line in file if line.endswith("}\n")]
                kept = [line for line in lines if json.loads(line)["epoch"] <= epoch]
                write_file(path, "".join(kept).encode())

    def _record_start(self):
        git = ["git", "-C", str(SOURCES), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = None
        with contextlib.suppress(OSError):  # git is not installed
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        self.append("starts.jsonl", dict(
            time=datetime.datetime.now().isoformat(timespec="seconds"), typed=sys.argv,
            commit=commit or None, device=str(self.device), python=platform.python_version(),
            torch=torch.__version__, numpy=np.__version__, ranks=distributed.world_size(),
        ))

    @rank_zero_only
    def _copy_sources(self):
        """Copy the sources into the folder, if they differ from its last copy."""
        files = {*SOURCES.glob("*.py"), *SOURCES.glob("harness/*.py")}
        for module in [*sys.modules.values()]:  # also what an edited script imports
            path = Path(getattr(module, "__file__", None) or "/")
            if path.is_relative_to(SOURCES) and "site-packages" not in path.parts:
                files.add(path)
        sources = {path.relative_to(SOURCES): path.read_bytes() for path in files}
        folder = Path(self.path, "scripts")
        copies = sorted(Path(self.path).glob("scripts*"), key=os.path.getmtime)
        if copies:
            last = copies[-1]
            changed = sorted(str(name) for name, source in sources.items()
                             if not (last / name).exists()
                             or (last / name).read_bytes() != source)
            if not changed:
                return
            folder = Path(self.path, f"scripts-after-epoch-{self.checkpoint['epoch']}")
            self.log(f"these sources have changed since the last start of the run: "
                     f"{', '.join(changed)}; copies are in {folder.name}")
        for name, source in sources.items():
            with writing(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source)

    def file(self, name):
        return os.path.join(self.path, name)

    # --------------------------------------------------------------------------------------------
    # Log
    # --------------------------------------------------------------------------------------------

    @rank_zero_only
    def log(self, text, wrap=True):
        """Print a text and append it to log.txt; before `begin`, keep it until then.

        Lines of more than 100 columns are wrapped, unless `wrap` is False.
        """
        if wrap:
            text = "\n".join(
                textwrap.fill(line, 100, subsequent_indent="    ", break_long_words=False,
                              break_on_hyphens=False)
                for line in text.splitlines()
            )
        if self.path is None:
            self.pending.append(text)
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        path = self.file("log.txt")
        with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}\n")

    def warn(self, text, key=None):
        """Log a warning; of warnings with the same `key`, only the first."""
        if key is None or key not in self.warned:
            self.warned.add(key)
            self.log(f"warning: {text}")

    @rank_zero_only
    def print_pending(self):
        """Print the pending lines, if `begin` is not called: for `train.py --evaluate`."""
        print("\n".join(self.pending), flush=True)

    def resume_hint(self):
        """How the user can continue a run that ended early."""
        if not os.path.exists(self.file("checkpoint.pt")):
            return "no epoch was completed, so there is no checkpoint yet"
        script, path = os.path.basename(sys.argv[0]), shlex.quote(self.path)
        return ("resume from the last checkpoint with: "
                f"{distributed.launch_command()} {script} --resume {path}")

    # --------------------------------------------------------------------------------------------
    # An epoch
    # --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def epoch(self, epoch, name, batches, epochs_left, may_take_longer=False, **metrics):
        """Time an epoch, show its progress, and write its metrics to all logs.

        Yields the row of the epoch, a dict of numbers, arrays and dicts, for the caller to fill.

        name : str
            The epoch in the log, such as "3/50".
        epochs_left : int
            Epochs of the run after this one.
        may_take_longer : bool
            Whether `epochs_left` is only a lower bound, as long as nodes have not converged.
        metrics
            First entries of the row.
        """
        start = time.monotonic()
        images = distributed.world_size() * batches.batch_size
        self.progress = Progress(f"epoch {name}", len(batches), images, self.args.report_freq,
                                 epochs_left, self.log)
        row = {"epoch": epoch, **metrics}
        try:
            yield row
        except Diverged as error:
            rates = "--learning_rate"
            if self.kind == "search":
                rates += ", --arch_learning_rate"
            raise UserError(
                f"epoch {name}: {error} at learning rate {row['learning_rate']:.4g}; try a smaller "
                f"{rates} or --grad_clip in a new run; {self.resume_hint()}"
            ) from None
        finally:
            self.progress.bar.close()
        seconds = time.monotonic() - start
        row.update(to_builtin(row), seconds=seconds, peak_memory_gib=peak_memory(self.device))
        left = format_duration(seconds * epochs_left)
        if may_take_longer:
            left = f">{left}"
        shown = {**row, "name": name, "time": format_duration(seconds), "left": left}
        texts = []
        for heading, text in self.columns.items():
            try:
                texts.append(text.format(**shown))
            except KeyError as error:
                texts.append("–")
                self.warn(f"column {heading}: the row of the epoch has no {error}", heading)
            except (TypeError, ValueError):  # None, for example
                texts.append("–")
        self.log(table_row(texts, self.columns), wrap=False)
        self.append("metrics.jsonl", row)
        self._write_events(row)

    @rank_zero_only
    def append(self, name, row):
        """Append a row to a file with one JSON object per line."""
        with writing(self.file(name)), open(self.file(name), "a") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def _write_events(self, row):
        if "tensorboard" in self.warned:
            return
        try:
            if self.board is None:
                # Hide events that a stopped run wrote for this epoch and later ones.
                self.board = SummaryWriter(self.file("tensorboard"), purge_step=row["epoch"])
            for key, value in row.items():
                scalars = {key: value}
                if isinstance(value, dict):
                    scalars = {f"{key}/{name}": number for name, number in value.items()}
                for tag, number in scalars.items():
                    if isinstance(number, int | float):
                        self.board.add_scalar(tag, number, row["epoch"])
            self.board.flush()
        except OSError as error:  # a run does not need its events
            self.board = None
            self.warn(f"{self.file('tensorboard')} could not be written, so there are no more "
                      f"events: {error.strerror or error}", "tensorboard")

    @rank_zero_only
    def show_figure(self, name, draw, epoch):
        """Add the matplotlib figure that the callable `draw` returns to the TensorBoard events."""
        if self.board is not None:
            with self._drawing(name):
                self.board.add_figure(name, draw(), epoch)

    # --------------------------------------------------------------------------------------------
    # Files
    # --------------------------------------------------------------------------------------------

    @rank_zero_only
    def save_checkpoint(self, **state):
        """Write checkpoint.pt; `state` may hold tensors, numbers, strings, lists and dicts."""
        about = dict(kind=self.kind, args=args_dict(self.args), primitives=genotypes.PRIMITIVES,
                     data=self.data)
        checkpoints.save(self.file("checkpoint.pt"), about | state)

    @rank_zero_only
    def save_network(self, name, net, **about):
        """Write a network of model.py and what is known about it, for `model.load`."""
        state = dict(config=net.config, weights=net.state_dict(), args=args_dict(self.args),
                     about=about)
        checkpoints.save(self.file(name), state)

    def describe(self, images):
        """Data set, class names, mean, standard deviation and image size of training images."""
        return dict(
            dataset=self.args.dataset, classes=images.classes, mean=[*images.mean],
            std=[*images.std], image_size=self.args.image_size,
        )

    def check_data(self, images):
        """Raise UserError if a resumed run began with other training images than these."""
        self.data = dict(classes=images.classes, counts=images.counts())
        if not self.checkpoint or self.checkpoint["data"] == self.data:
            return
        now, then = (dict(zip(data["classes"], data["counts"], strict=True))
                     for data in (self.data, self.checkpoint["data"]))
        names = [name for name in now | then if now.get(name) != then.get(name)]
        difference = "classes in another order"
        if names:
            name = names[0]
            difference = f"{now.get(name, 0)} of {name} now, {then.get(name, 0)} of {name} then"
        raise UserError(
            f"{self.args.data} does not hold the training images with which {self.args.save} began "
            f"({difference}): give their folder with --data, or start a new run"
        )

    @rank_zero_only
    def save_genotype(self, genotype, one_stage, **about):
        """Write genotype.json; see `genotypes.save`."""
        path = self.file("genotype.json")
        with writing(path):
            genotypes.save(path, genotype, one_stage, arguments=args_dict(self.args), **about)

    @rank_zero_only
    def draw(self, draw_run):
        """Call `draw_run` with the folder, and log the names of the pictures that it returns."""
        with self._drawing("pictures"):
            names = [os.path.basename(path) for path in draw_run(self.path)]
            self.log(f"pictures in {self.path}: {', '.join(names)}")

    @contextlib.contextmanager
    def _drawing(self, what):
        """Turn any error into a warning, because a run does not need its pictures."""
        try:
            yield
        except Exception as error:
            self.warn(f"no {what} could be drawn ({type(error).__name__}: {error})", what)


def lock_folder(path):
    """Lock a run folder until the returned file is closed; UserError if another process has it.

    A POSIX lock ends when its process closes any descriptor of the file, so the lock has a file of
    its own, which nothing else opens.
    """
    try:
        file = open(os.path.join(path, "lock"), "wb")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing to {path}: resume when it has ended"
                        ) from None
    except OSError:  # a file system without locks
        return None
    return file


def args_dict(args):
    """The flags as a dict for JSON and torch.save."""
    return {name: value for name, value in vars(args).items() if name not in ("typed", "resume")}


def to_builtin(value):
    """Convert arrays, tensors and sets, also in dicts and lists, to Python's numbers and lists."""
    if isinstance(value, dict):
        return {str(key): to_builtin(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [to_builtin(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


# ------------------------------------------------------------------------------------------------
# Table and progress
# ------------------------------------------------------------------------------------------------


WIDTHS = {"epoch": 9, "time": 10, "left": 11}  # of columns wider than their heading


def table_row(texts, columns):
    """A line of the table with these columns."""
    widths = [max(WIDTHS.get(name, 6), len(name)) for name in columns]
    return "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def format_duration(seconds):
    """Format seconds as 42 s, 3 min 05 s or 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


BAR = "{desc} {percentage:3.0f} %|{bar:20}| {n_fmt}/{total_fmt} steps{postfix}"


class Progress:
    """Progress of an epoch: a bar on a terminal, otherwise a line every `report_freq` steps."""

    def __init__(self, label, steps, images_per_step, report_freq, epochs_left, log):
        self.images_per_step, self.report_freq = images_per_step, report_freq
        self.epochs_left, self.log, self.start = epochs_left, log, time.monotonic()
        self.bar = tqdm(
            total=steps, desc=label, leave=False, file=sys.stdout, bar_format=BAR,
            disable=distributed.rank() > 0 or not sys.stdout.isatty(), dynamic_ncols=True,
        )
        self.steps, self.total = 0, steps

    def step(self, meter):
        """Count a step; read `meter` every `report_freq` steps."""
        self.steps += 1
        self.bar.update()
        if self.steps % self.report_freq == 0 and self.steps < self.total:
            loss, accuracy = meter.read()
            seconds_per_step = (time.monotonic() - self.start) / self.steps
            epoch_left = seconds_per_step * (self.total - self.steps)
            run_left = epoch_left + seconds_per_step * self.total * self.epochs_left
            report = (
                f"loss {loss:.3f}, accuracy {accuracy:.2f} %, "
                f"{self.images_per_step / seconds_per_step:.0f} images/s, "
                f"{format_duration(epoch_left)} left (of the run: {format_duration(run_left)})"
            )
            self.bar.set_postfix_str(report)
            if self.bar.disable:
                self.log(f"    step {self.steps}/{self.total}: {report}")
