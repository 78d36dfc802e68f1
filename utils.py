"""What both scripts need around their loops: random states, meters, run folder, checkpoints."""

import contextlib
import datetime
import glob
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import arguments
import data
import ista
import visualize
from genotypes import PRIMITIVES


class UserError(Exception):
    """Something the person at the keyboard can mend; shown as one line, without a traceback."""


# ------------------------------------------------------------------------------------------------
# How a script ends
# ------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT or SIGTERM, raised where nothing is half done."""


class _Signals:
    """SIGINT and SIGTERM. Once a run's epochs have begun, they wait for the end of the step."""

    run = None  # the Run whose epochs have begun
    waiting = None  # the signal that came during a step

    def __call__(self, signum, frame):
        if self.run is None or self.waiting:
            raise Interrupted(signum)
        self.waiting = signum

    def check(self):
        if self.waiting:
            raise Interrupted(self.waiting)


signals = _Signals()


@contextlib.contextmanager
def command(prog):
    """Run a script's main: errors that a person can mend end in one line and exit status 2.

    SIGINT and SIGTERM end in exit status 130 and 143.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signals)
    try:
        yield
        signals.check()
    except (UserError, data.DataError, ista.SolverUnavailable) as error:
        arguments.fail(prog, error)
    except torch.OutOfMemoryError:
        arguments.fail(prog, "the device has too little memory: give a smaller --batch_size")
    except Interrupted as interrupt:
        signum = interrupt.args[0]
        if signals.run:
            signals.run.log(f"stopped; {signals.run.how_to_resume()}")
        print(f"{prog}: stopped by {signal.Signals(signum).name}", file=sys.stderr)
        sys.exit(128 + signum)


# ------------------------------------------------------------------------------------------------
# Device and random states
# ------------------------------------------------------------------------------------------------


def choose_device(name):
    """The torch.device of --device; by default CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): leave it out, "
            "or give cpu"
        ) from None
    return device


def seed_everything(seed):
    """Seed Python's, numpy's and torch's generators, those of all CUDA devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(generator):
    """States of all random generators, as types that torch.load(weights_only=True) admits.

    Parameters
    ----------
    generator : torch.Generator
        That of the data order and augmentation.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": list(random.getstate()),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "data": generator.get_state(),
    }


def set_random_state(state, generator):
    """Put all random generators back into the states of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    generator.set_state(state["data"])


def autocast(device, enabled):
    """The context of forward passes: bfloat16 where that is safe, if `enabled`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def peak_memory(device):
    """Peak memory in GiB: of the tensors on a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------------------------------------------
# Schedule, meters, progress
# ------------------------------------------------------------------------------------------------


def cosine(epoch, epochs, high, low):
    """Learning rate of an epoch, counted from 0: low + (high − low)(1 + cos(π·epoch/epochs))/2."""
    return low + (high - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def forget(optimizer, parameters):
    """Take parameters, and what is remembered of them, out of an optimizer."""
    gone = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for p in parameters:
        optimizer.state.pop(p, None)


class Meter:
    """Mean loss and accuracy of an epoch, added up on the device and read only when asked for."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
        self.batches = 0
        self.first_bad = torch.full((), torch.inf, dtype=torch.float64, device=device)

    def add(self, loss, logits, labels):
        """Add a batch: its mean loss (0-dim tensor), logits (batch, classes), labels (batch,)."""
        self.batches += 1
        loss, n = loss.detach().double(), len(labels)
        correct = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([loss * n, correct, correct.new_full((), n)])
        bad = torch.where(loss.isfinite(), torch.inf, float(self.batches))
        self.first_bad = torch.minimum(self.first_bad, bad)

    def read(self):
        """Mean loss and accuracy in percent. Waits for the device.

        Raises
        ------
        Diverged
            With the number of the first batch (from 1) whose loss was not finite.
        """
        loss, correct, n, first_bad = [*self.sums.tolist(), self.first_bad.item()]
        if math.isfinite(first_bad):
            raise Diverged(int(first_bad))
        return loss / n, 100 * correct / n


class Diverged(Exception):
    """A loss was not finite."""


BAR = "{desc} {percentage:3.0f} %|{bar:20}| {n_fmt}/{total_fmt} steps{postfix}"


class Epoch:
    """An epoch in progress: a bar on a terminal, else a line every `report_freq` steps.

    While one is entered, a signal waits for the end of the step, or for that of the checkpoint. A
    loss that is not finite ends the run, and the last checkpoint stands.

    Parameters
    ----------
    run : Run
    name : str
        As in "3/50".
    batches : data.Batches
        What the steps go through.
    learning_rate : float
        For the message of a run that diverges.
    report_freq : int
    epochs_left : int
        Epochs of the run after this one.
    """

    def __init__(self, run, name, batches, learning_rate, report_freq, epochs_left):
        self.run, self.label, self.learning_rate = run, f"epoch {name}", learning_rate
        self.total, self.report_freq = len(batches), report_freq
        self.images_per_step, self.epochs_left = batches.batch_size, epochs_left
        self.steps = 0
        self.began = time.time()
        self.bar = tqdm(
            total=self.total, desc=self.label, leave=False, file=sys.stdout,
            disable=not sys.stdout.isatty(), dynamic_ncols=True, bar_format=BAR,
        )  # fmt: skip

    def __enter__(self):
        signals.run = self.run
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        if kind is Diverged:
            raise UserError(
                f"{self.label}, step {error}: the loss is not finite at learning rate "
                f"{self.learning_rate:.4g}; try a smaller --learning_rate or --grad_clip in a new "
                f"run; {self.run.how_to_resume()}"
            ) from None
        if kind is None:
            signals.check()

    def step(self, meter):
        """Count a step; `meter` is read every `report_freq` steps."""
        self.steps += 1
        self.bar.update()
        if self.steps % self.report_freq == 0 and self.steps < self.total:
            loss, accuracy = meter.read()
            pace = (time.time() - self.began) / self.steps
            left = pace * (self.total - self.steps)
            report = (
                f"loss {loss:.3f}, accuracy {accuracy:.2f} %, "
                f"{self.images_per_step / pace:.0f} images/s, {duration(left)} left, of the run "
                f"{duration(left + pace * self.total * self.epochs_left)}"
            )
            self.bar.set_postfix_str(report)
            if self.bar.disable:
                self.run.log(f"    {self.label}, step {self.steps}/{self.total}: {report}")
        if self.steps == self.total:
            self.bar.close()
        signals.check()


def fit_to_data(args, images):
    """Make an untyped --batch_size fit so many images; return what there is to say of the data."""
    notes = []
    if args.batch_size > images and "batch_size" not in args.typed and images > 1:
        args.batch_size = images
        notes.append(f"--batch_size is {images}, for there are no more images")
    if args.cutout and 2 * args.cutout_length > args.image_size:
        notes.append(f"warning: cutout of {args.cutout_length} pixels takes most of an image of "
                     f"{args.image_size}: give --cutout_length or --no-cutout")  # fmt: skip
    return notes


def data_flags(args):
    """The flags by which another script reads the same data; empty for the default ones."""
    flags = {"dataset": "cifar10", "data": "data", "image_size": 32}
    return "".join(
        f" --{name} {shlex.quote(str(getattr(args, name)))}"
        for name, default in flags.items()
        if getattr(args, name) != default
    )


def losses(logits, logits_aux, labels, auxiliary_weight):
    """Cross-entropy, and its sum with that of the auxiliary head (if any) times its weight."""
    loss = F.cross_entropy(logits.float(), labels)
    if logits_aux is None:
        return loss, loss
    return loss, loss + auxiliary_weight * F.cross_entropy(logits_aux.float(), labels)


@torch.no_grad()
def evaluate(net, batches, amp=False):
    """Mean cross-entropy and accuracy (percent) of a network in evaluation mode.

    Parameters
    ----------
    net : Module
        Its forward returns (logits, anything).
    batches : data.Batches
    amp : bool
        Whether to compute in bfloat16 where that is safe.
    """
    net.eval()
    device = next(net.parameters()).device
    meter = Meter(device)
    for x, y in batches:
        with autocast(device, amp):
            logits, _ = net(x)
        meter.add(F.cross_entropy(logits.float(), y), logits, y)
        signals.check()
    return meter.read()


def table_row(columns, values=None):
    """A line of a table.

    Parameters
    ----------
    columns : list of str
        Names of the columns.
    values : list of str, optional
        One text a column; without them, the line of the names.
    """
    widths = [max(11, len(name)) for name in columns]
    texts = zip(values or columns, widths, strict=True)
    return "  ".join(f"{text:>{width}}" for text, width in texts)


def duration(seconds):
    """Seconds as a person would say them: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


# ------------------------------------------------------------------------------------------------
# Run folder
# ------------------------------------------------------------------------------------------------


class Run:
    """A run folder: config.json, log.txt, metrics.jsonl, checkpoint.pt, a copy of the scripts.

    Parameters
    ----------
    path : str
        Of a folder that exists; `Run.create` makes that of a new run.
    """

    def __init__(self, path):
        self.path = path
        self.warnings = set()
        self.board = None
        self.restless = 0  # epochs in a row in which a search has changed its architecture

    @classmethod
    def create(cls, args, prefix):
        """Make the folder of a new run: --save, or runs/PREFIX-DATE-TIME.

        Raises
        ------
        UserError
            If --save is not an empty or a new folder: a run is never overwritten.
        """
        if args.save and os.path.isdir(args.save) and not os.listdir(args.save):
            run = cls(args.save)
        else:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            run = cls(_make_folder(args.save or os.path.join("runs", f"{prefix}-{stamp}"), args))
        with replacing(run.file("config.json")) as partial, open(partial, "w") as file:
            json.dump(plain(args), file, indent=1)
        sources = os.path.dirname(os.path.abspath(__file__))
        with writing(run.file("scripts")):
            os.makedirs(run.file("scripts"), exist_ok=True)
            for script in glob.glob(os.path.join(glob.escape(sources), "*.py")):
                shutil.copy(script, run.file("scripts"))
        return run

    @classmethod
    def resume(cls, args, checkpoint):
        """The folder of a run that goes on after a checkpoint; later rows are dropped from it."""
        run, epoch, epochs = cls(args.save), checkpoint["epoch"], checkpoint["args"]["epochs"]
        run.cut(epoch)
        run.log(f"resumed {run.path} after epoch {epoch}")
        if args.epochs != epochs:
            run.log(f"--epochs is {args.epochs} now, and was {epochs}: from here on, learning rate "
                    f"and drop-path follow the schedule of {args.epochs} epochs")  # fmt: skip
        return run

    def file(self, name):
        return os.path.join(self.path, name)

    def log(self, text=""):
        """Print a text, and append it to log.txt."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        with writing(self.file("log.txt")), open(self.file("log.txt"), "a") as file:
            file.write(f"{text}\n")

    def show(self, row, genotype=None):
        """Write the numbers of an epoch, and its cells, as TensorBoard events."""
        if self.board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.warn_once("tensorboard is not installed, so no events are written for it")
                return
            # Events of a run that was stopped, from this epoch on, are not shown.
            self.board = SummaryWriter(self.file("tensorboard"), purge_step=row["epoch"])
        for key, value in row.items():
            if isinstance(value, int | float):
                self.board.add_scalar(key, value, row["epoch"])
        if genotype is not None:
            for operation in PRIMITIVES:
                count = sum(op == operation for op, _ in genotype.normal + genotype.reduce)
                self.board.add_scalar(f"pairs/{operation}", count, row["epoch"])
            if row["changed"] or row["epoch"] == 1:
                figure = visualize.cells_figure(genotype)
                self.board.add_figure("cells", figure, row["epoch"])
        self.board.flush()

    def append(self, name, row):
        """Append a row to a file of one JSON object a line."""
        with writing(self.file(name)), open(self.file(name), "a") as file:
            file.write(json.dumps(row) + "\n")

    def warn_once(self, text):
        """Log a warning, unless it was logged before."""
        if text not in self.warnings:
            self.warnings.add(text)
            self.log(f"warning: {text}")

    def cut(self, epoch):
        """Drop the rows of the .jsonl files that are later than `epoch`, or damaged.

        An epoch's rows are written before its checkpoint, so a run that was stopped between the
        two would repeat them.
        """
        for path in glob.glob(os.path.join(glob.escape(self.path), "*.jsonl")):
            kept = []
            with open(path, errors="replace") as file:
                for line in file:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        if json.loads(line)["epoch"] <= epoch:
                            kept.append(line)
            with replacing(path) as partial, open(partial, "w") as file:
                file.writelines(kept)

    def save_checkpoint(self, state):
        """Write checkpoint.pt such that a whole one exists at every moment.

        The one that was there stays as checkpoint-previous.pt. `state` is a dict of tensors,
        numbers, strings, lists and dicts.
        """
        path = self.file("checkpoint.pt")
        with replacing(path) as partial:
            torch.save(state, partial)
            if os.path.exists(path):
                with replacing(previous(path)) as link:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(link)
                    try:
                        os.link(path, link)
                    except OSError:  # a file system without links
                        shutil.copyfile(path, link)

    def draw(self):
        """Draw the pictures of the run, and say where they are."""
        try:
            names = [os.path.basename(path) for path in visualize.draw_run(self.path)]
            self.log(f"pictures in {self.path}: {', '.join(names)}")
        except (ValueError, OSError) as error:
            self.log(f"no pictures could be drawn: {error}")

    def how_to_resume(self):
        """What can be done with a run that ended early."""
        if not os.path.exists(self.file("checkpoint.pt")):
            return "no epoch was finished, so there is no checkpoint yet"
        script, path = os.path.basename(sys.argv[0]), shlex.quote(self.path)
        return f"go on from the last checkpoint with: python {script} --resume {path}"


def _make_folder(path, args):
    # Two runs that start in the same second get folders of their own.
    names = [path] if args.save else [path, *(f"{path}-{k}" for k in range(2, 1000))]
    for name in names:
        with contextlib.suppress(FileExistsError), writing(name):
            os.makedirs(name)
            return name
    raise UserError(f"--save {path} exists already and is not overwritten: choose another folder")


def plain(args):
    """The arguments as a dict that JSON and torch.save can hold."""
    return {name: value for name, value in vars(args).items() if name not in ("typed", "resume")}


@contextlib.contextmanager
def writing(path):
    """Name the path when a file or folder cannot be written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None
    except RuntimeError as error:  # torch.save's answer to a full disk
        raise UserError(f"{path} could not be written: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def replacing(path):
    """Give the name of a temporary file that takes the place of `path` once it is whole."""
    partial = f"{path}.partial"
    try:
        with writing(path):
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def previous(path):
    """Name of the checkpoint that was written before the one at `path`."""
    stem, extension = os.path.splitext(path)
    return f"{stem}-previous{extension}"


def load_checkpoint(path):
    """Read a file of torch.save, of which no code is run (weights_only).

    Raises
    ------
    UserError
        If it cannot be read, or is damaged; names an older checkpoint beside it that is whole.
    """
    try:
        return _load_whole(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # zip, pickle and torch each have errors of their own for damage
        message = f"{path} is damaged, or not a file of network weights"
    with contextlib.suppress(Exception):
        _load_whole(previous(path))
        message += f"; {previous(path)}, of the epoch before, is whole: copy it over this one"
    raise UserError(message)


def _load_whole(path):
    # torch.load does not look at the checksums that torch.save has written.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_network(path, net, args, about):
    """Write a network of model.py such that it can be built again from the file alone.

    Parameters
    ----------
    path : str
    net : model.NetworkCIFAR or model.NetworkImageNet
    args : argparse.Namespace
        Of the run; says what data the network is for.
    about : dict
        Numbers and strings: what is known of it.
    """
    state = {"network": net.config, "model": net.state_dict(), "args": plain(args), "about": about}
    with replacing(path) as partial:
        torch.save(state, partial)


# What may be given anew when a run is resumed.
FREE = {"resume", "evaluate", "device", "workers", "report_freq", "data"}


def resume(args, kind):
    """Load the checkpoint of --resume, and the arguments of its run.

    Returns
    -------
    checkpoint : dict
    args : argparse.Namespace
        Those of the run, except for the typed flags in `FREE` and a larger --epochs. `save` is the
        run's folder, wherever it is now.

    Raises
    ------
    UserError
        If the run is of another kind, or a typed flag contradicts it.
    """
    path = arguments.checkpoint_path(args.resume)
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        raise UserError(
            f"--resume {args.resume}: that is not a checkpoint of a {kind} run; search.py resumes "
            "searches, and train.py trainings"
        )
    saved = dict(checkpoint["args"])
    for name in args.typed:
        value = getattr(args, name)
        if name in FREE or (name == "epochs" and value > saved["epochs"]):
            saved[name] = value
        elif saved.get(name) != value:
            raise UserError(
                f"--{name} {value} contradicts the run in {args.resume}, which has "
                f"{saved.get(name)}: leave it out, or start a new run"
            )
    saved.update(save=os.path.dirname(path) or ".", typed=args.typed, resume=args.resume)
    return checkpoint, type(args)(**saved)
