"""Run folders: created, resumed, written an epoch at a time; and how a script ends.

    runs/NAME/config.json       the flags of the run
              log.txt           what was printed
              metrics.jsonl     the numbers of each epoch, one JSON object a line
              genotype.json     of a search: the current one; genotypes.jsonl: that of each epoch
              checkpoint.pt     all that is needed to go on; checkpoint-previous.pt: an epoch before
              network.pt        a trained network
              tensorboard/      events; scripts/: the sources that made the run
"""

import contextlib
import datetime
import glob
import json
import os
import shlex
import shutil
import signal
import sys
import time

from tqdm import tqdm

import arguments
import checkpoints
import distributed
import genotypes
import ista
import utils
from distributed import rank_zero_only
from utils import UserError, replacing, writing

try:
    import fcntl
except ImportError:  # there is none on Windows
    fcntl = None

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None

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
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")
    with contextlib.suppress(AttributeError):  # not a stream of text of its own
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        distributed.start()
        yield
        distributed.stop()
    except (UserError, ista.SolverUnavailable) as error:
        arguments.fail(prog, error)
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
    except (RuntimeError, ValueError, MemoryError) as error:
        if utils.is_out_of_memory(error):
            arguments.fail(prog, "there is too little memory for this: give a smaller "
                           "--batch_size, --init_channels, --layers or --image_size")
        if not distributed.is_loss(error):
            raise
        reason = str(error).splitlines()[0]
        if not Run.latest:  # the rank that ended has said why
            arguments.fail(prog, f"another rank of this run has ended: start again ({reason})")
        print(f"{prog}: error: another rank of this run has ended; "
              f"{Run.latest.how_to_resume()} ({reason})", file=sys.stderr)
        sys.exit(2)
    finally:
        if Run.latest and Run.latest.claimed:
            Run.latest.claimed.close()


def leave_stdout():
    """Send standard output nowhere from now on, with what is still to be flushed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------

# What may be given anew at a resumption.
FREE = {"resume", "evaluate", "device", "workers", "report_freq", "data", "cuda_graphs"}


class Run:
    """A run and its folder, which is made, or gone on with, by `begin`.

    Until then nothing is written, so that a run which cannot start leaves nothing behind. Of
    several ranks, rank 0 writes; all may call the methods.

    Parameters
    ----------
    kind : {"search", "train"}
    args : argparse.Namespace
        The flags; `resume` names an old run.

    Attributes
    ----------
    args : argparse.Namespace
        Of a resumed run its own, but for what was typed anew (`FREE`, and more --epochs).
    checkpoint : dict or None
        The last one of a resumed run.
    path : str or None
        The folder, once begun.

    Raises
    ------
    UserError
        If the run to resume is of another kind, or a typed flag contradicts it.
    """

    latest = None

    def __init__(self, kind, args):
        self.kind, self.args, self.checkpoint, self.path = kind, args, None, None
        self.kept, self.warned, self.board, self.claimed = [], set(), None, None
        if args.resume:
            self._load(args)

    def _load(self, typed):
        """Take the checkpoint of --resume, and the flags of its run."""
        path = arguments.checkpoint_path(typed.resume)
        checkpoint = checkpoints.load_run(path, self.kind)
        checkpoints.check_origin(path, checkpoint["args"], FREE)
        saved = {**vars(typed), **checkpoint["args"]}  # a newer flag than the run: its default
        for name in typed.typed:
            value = getattr(typed, name)
            if name in FREE or (name == "epochs" and value > saved["epochs"]):
                saved[name] = value
            elif saved.get(name) != value:
                raise UserError(
                    f"--{name} {value} contradicts the run in {typed.resume}, which has "
                    f"{saved.get(name)}: leave it out, or start a new run"
                )
        if "device" not in typed.typed and not utils.is_usable(saved["device"]):
            self.log(f"--device {saved['device']}, which the run was given, cannot be used here: "
                     "it goes on with the default one")
            saved["device"] = None
        # All ranks together go on with the batches they had.
        together = saved["batch_size"] * len(checkpoint["random"])
        saved["batch_size"] = max(together // distributed.world_size(), 1)
        saved.update(save=os.path.dirname(path) or ".", typed=typed.typed, resume=typed.resume)
        self.checkpoint, self.args = checkpoint, type(typed)(**saved)
        arguments.check_step(self.args)

    def begin(self, device, columns):
        """Make the folder, or cut an old one back to its checkpoint; print the table's head.

        Parameters
        ----------
        device : torch.device
            Where it computes.
        columns : dict of str
            Head of each column, and a format string of its text, for the row of an epoch.
        """
        path = self.args.save if self.checkpoint else None
        if distributed.rank() == 0:
            path = path or self._make_folder()
            if fcntl:
                self._claim(path)
        self.path, self.device = distributed.gather(path)[0], device
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
            self.log(text)
        self.columns = {"epoch": "{name}", **columns, "memory": "{peak_memory_gib:.2f} GiB",
                        "time": "{time}", "left": "{left}"}
        self.log(utils.table_row(self.columns, self.columns))
        Run.latest = self

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
        with replacing(os.path.join(name, "config.json")) as file:
            file.write(json.dumps(plain(args), indent=1).encode())
        sources, copies = os.path.dirname(os.path.abspath(__file__)), os.path.join(name, "scripts")
        with writing(copies):
            os.makedirs(copies)
            for script in glob.glob(os.path.join(glob.escape(sources), "*.py")):
                shutil.copy(script, copies)
        return name

    def _claim(self, path):
        """Refuse a folder that another process is writing to; a claim ends as `command` does."""
        with contextlib.suppress(OSError):  # no such file, or a file system without locks
            self.claimed = open(os.path.join(path, "config.json"), "r+b")
            try:
                fcntl.lockf(self.claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path} is being written by another process: let it end, or end "
                                "it, and resume then") from None

    @rank_zero_only
    def _cut(self, epoch):
        """Drop the rows of the .jsonl files that are later than `epoch`, or damaged.

        An epoch's rows are written before its checkpoint, so a run that was stopped between the
        two would repeat them.
        """
        for path in glob.glob(os.path.join(glob.escape(self.path), "*.jsonl")):
            kept = []
            with writing(path), open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        if json.loads(line)["epoch"] <= epoch:
                            kept.append(line)
            with replacing(path) as file:
                file.write("".join(kept).encode())

    def file(self, name):
        return os.path.join(self.path, name)

    # --------------------------------------------------------------------------------------------
    # What is said
    # --------------------------------------------------------------------------------------------

    @rank_zero_only
    def log(self, text):
        """Print a text, and append it to log.txt; before `begin`, keep it until then."""
        if self.path is None:
            self.kept.append(text)
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # nobody reads it any more, as after `| head`: the run goes on
            leave_stdout()
        path = self.file("log.txt")
        with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}\n")

    @rank_zero_only
    def say(self):
        """Print what was logged, where no run begins."""
        try:
            with writing("standard output"):
                print("\n".join(self.kept), flush=True)
        except UserError:
            leave_stdout()
            raise

    def warn_once(self, what, text):
        """Log a warning, unless there was one of this kind before."""
        if what not in self.warned:
            self.warned.add(what)
            self.log(f"warning: {text}")

    def how_to_resume(self):
        """What can be done with a run that ended early."""
        if not os.path.exists(self.file("checkpoint.pt")):
            return "no epoch was finished, so there is no checkpoint yet"
        script, path = os.path.basename(sys.argv[0]), shlex.quote(self.path)
        launcher = distributed.launcher()
        return f"go on from the last checkpoint with: {launcher} {script} --resume {path}"

    # --------------------------------------------------------------------------------------------
    # An epoch
    # --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def epoch(self, epoch, name, batches, epochs_left, **row):
        """Time an epoch, show its progress, and put its numbers in log, metrics and TensorBoard.

        Parameters
        ----------
        epoch : int
            From 1.
        name : str
            As the log calls it: "3/50".
        batches : data.Batches
            What the steps go through.
        epochs_left : (int, bool)
            Of the run, after this one; and whether there may be more.
        **row
            What is known before.

        Yields
        ------
        dict
            The row of the epoch, to be filled.

        Raises
        ------
        UserError
            If a loss was not finite.
        """
        began = time.monotonic()
        epochs_left, is_least = epochs_left
        self.progress = utils.Progress(
            f"epoch {name}", len(batches), distributed.world_size() * batches.batch_size,
            self.args.report_freq, epochs_left, self.log,
        )
        row = {"epoch": epoch, **row}
        try:
            yield row
        except utils.Diverged as error:
            raise UserError(
                f"epoch {name}, {error.where}: the loss is not finite at learning rate "
                f"{row['learning_rate']:.4g}; try a smaller {error.blame} in a new run; "
                f"{self.how_to_resume()}"
            ) from None
        finally:
            self.progress.close()
        row["seconds"] = seconds = time.monotonic() - began
        row["peak_memory_gib"] = utils.peak_memory(self.device)
        left = "> " * is_least + utils.duration(seconds * epochs_left)
        shown = {**row, "name": name, "time": utils.duration(seconds), "left": left}
        texts = [text.format(**shown) for text in self.columns.values()]
        self.log(utils.table_row(texts, self.columns))
        self.append("metrics.jsonl", row)
        self._show(row)

    @rank_zero_only
    def append(self, name, row):
        """Append a row to a file of one JSON object a line."""
        with writing(self.file(name)), open(self.file(name), "a") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def _show(self, row):
        if SummaryWriter is None:
            self.warn_once("tensorboard", "tensorboard is not installed, so it has no events")
        if "tensorboard" in self.warned:
            return
        with self._writing_events():
            if self.board is None:
                # Events of a run that was stopped, from this epoch on, are not shown.
                self.board = SummaryWriter(self.file("tensorboard"), purge_step=row["epoch"])
            for key, value in row.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(key, value, row["epoch"])
            self.board.flush()

    @contextlib.contextmanager
    def _writing_events(self):
        """Warn where events of TensorBoard cannot be written: a run can do without."""
        try:
            yield
        except OSError as error:
            self.board = None
            self.warn_once("tensorboard", f"{self.file('tensorboard')} could not be written, so "
                           f"there are no more events: {error.strerror or error}")

    @rank_zero_only
    def show_figure(self, name, figure, epoch):
        """Put a matplotlib figure into the TensorBoard events."""
        if self.board is not None:
            with self._writing_events():
                self.board.add_figure(name, figure, epoch)

    # --------------------------------------------------------------------------------------------
    # What is saved
    # --------------------------------------------------------------------------------------------

    def restoring(self):
        """Context in which what does not fit is damage to the checkpoint."""
        return checkpoints.taking(arguments.checkpoint_path(self.args.resume))

    @rank_zero_only
    def save_checkpoint(self, **state):
        """Write checkpoint.pt such that a whole one exists at every moment.

        The one that was there stays as checkpoint-previous.pt. `state` is made of tensors,
        numbers, strings, lists and dicts.
        """
        about = dict(
            kind=self.kind, version=arguments.__version__, args=plain(self.args),
            primitives=genotypes.PRIMITIVES,
        )
        checkpoints.save(self.file("checkpoint.pt"), about | state, keep_last=True)

    @rank_zero_only
    def save_network(self, name, net, images, **about):
        """Write a network of model.py such that `model.load` needs nothing else.

        Parameters
        ----------
        name : str
            Of the file.
        net : model.NetworkCIFAR or model.NetworkImageNet
        images : data.Images or imagenet.Images
            What it was trained on.
        **about
            Numbers and strings: what is known of it.
        """
        about |= dict(
            dataset=self.args.dataset, classes=list(images.classes), mean=list(images.mean),
            std=list(images.std), image_size=self.args.image_size,
        )
        state = dict(
            config=net.config, weights=net.state_dict(), args=plain(self.args), about=about
        )
        checkpoints.save(self.file(name), state)

    @rank_zero_only
    def save_genotype(self, genotype, one_stage, **about):
        """Write genotype.json; see `genotypes.save`."""
        genotypes.save(
            self.file("genotype.json"), genotype, one_stage, arguments=plain(self.args), **about
        )

    @rank_zero_only
    def draw(self, draw_run):
        """Have the pictures of the run drawn, and say where they are.

        Parameters
        ----------
        draw_run : callable
            Takes the folder, returns the paths of pictures.
        """
        try:
            names = [os.path.basename(path) for path in draw_run(self.path)]
            self.log(f"pictures in {self.path}: {', '.join(names)}")
        except (ValueError, OSError) as error:
            self.log(f"no pictures could be drawn: {error}")


def plain(args):
    """The arguments as a dict that JSON and torch.save can hold."""
    return {name: value for name, value in vars(args).items() if name not in ("typed", "resume")}
