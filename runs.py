"""Run folders: the log, the numbers of each epoch, and checkpoints that a kill cannot spoil."""

import contextlib
import datetime
import glob
import json
import os
import shlex
import shutil
import sys
import zipfile

import torch
from tqdm import tqdm

import arguments
import distributed
import genotypes
import visualize
from distributed import by_first
from utils import UserError, choose_device

# ------------------------------------------------------------------------------------------------
# Run folder
# ------------------------------------------------------------------------------------------------


class Run:
    """A run folder: config.json, log.txt, metrics.jsonl, checkpoint.pt, a copy of the scripts.

    Of several processes the first one writes; the methods may be called by all.

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
        return cls(distributed.on_first(lambda: cls._create(args, prefix)))

    @classmethod
    def _create(cls, args, prefix):
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
        return run.path

    @classmethod
    def resume(cls, args, checkpoint):
        """The folder of a run that goes on after a checkpoint; later rows are dropped from it."""
        run, epoch, epochs = cls(args.save), checkpoint["epoch"], checkpoint["args"]["epochs"]
        run.cut(epoch)
        run.log(f"resumed {run.path} after epoch {epoch}")
        if args.device is None and (device := checkpoint["args"]["device"]) is not None:
            run.log(f"--device {device}, which the run was given, cannot be used here: it goes on "
                    "with the default one")  # fmt: skip
        if args.epochs != epochs:
            run.log(f"--epochs is {args.epochs} now, and was {epochs}: from here on, learning rate "
                    f"and drop-path follow the schedule of {args.epochs} epochs")  # fmt: skip
        return run

    def file(self, name):
        return os.path.join(self.path, name)

    @by_first
    def log(self, text=""):
        """Print a text, and append it to log.txt."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        with writing(self.file("log.txt")), open(self.file("log.txt"), "a") as file:
            file.write(f"{text}\n")

    @by_first
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
            for operation in genotypes.PRIMITIVES:
                count = sum(op == operation for op, _ in genotype.normal + genotype.reduce)
                self.board.add_scalar(f"pairs/{operation}", count, row["epoch"])
            if row["changed"] or row["epoch"] == 1:
                figure = visualize.cells_figure(genotype)
                self.board.add_figure("cells", figure, row["epoch"])
        self.board.flush()

    @by_first
    def append(self, name, row):
        """Append a row to a file of one JSON object a line."""
        with writing(self.file(name)), open(self.file(name), "a") as file:
            file.write(json.dumps(row) + "\n")

    def warn_once(self, text):
        """Log a warning, unless it was logged before."""
        if text not in self.warnings:
            self.warnings.add(text)
            self.log(f"warning: {text}")

    @by_first
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

    @by_first
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

    @by_first
    def save_network(self, name, net, args, about):
        """Write a network of model.py such that it can be built again from the file alone.

        Parameters
        ----------
        name : str
            Of the file.
        net : model.NetworkCIFAR or model.NetworkImageNet
        args : argparse.Namespace
            Of the run; says what data the network is for.
        about : dict
            Numbers and strings: what is known of it.
        """
        state = dict(network=net.config, model=net.state_dict(), args=plain(args), about=about)
        with replacing(self.file(name)) as partial:
            torch.save(state, partial)

    @by_first
    def save_genotype(self, genotype, one_stage, **about):
        """Write genotype.json; see `genotypes.save`."""
        with writing(self.file("genotype.json")):
            genotypes.save(self.file("genotype.json"), genotype, one_stage, **about)

    @by_first
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
        launcher = distributed.launcher()
        return f"go on from the last checkpoint with: {launcher} {script} --resume {path}"


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


# What may be given anew when a run is resumed.
FREE = {"resume", "evaluate", "device", "workers", "report_freq", "data"}


def resume(args, kind):
    """Load the checkpoint of --resume, and the arguments of its run.

    Returns
    -------
    checkpoint : dict
    args : argparse.Namespace
        Those of the run, except for the typed flags in `FREE` and a larger --epochs. `save` is the
        run's folder, wherever it is now, `batch_size` is for as many processes as there are, and
        `device` is None where that of the run cannot be used.

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
    if isinstance(checkpoint["random"], dict):  # of before there could be several processes
        checkpoint["random"] = [checkpoint["random"]]
    saved = {**vars(args), **checkpoint["args"]}  # a flag that is newer than the run: its default
    for name in args.typed:
        value = getattr(args, name)
        if name in FREE or (name == "epochs" and value > saved["epochs"]):
            saved[name] = value
        elif saved.get(name) != value:
            raise UserError(
                f"--{name} {value} contradicts the run in {args.resume}, which has "
                f"{saved.get(name)}: leave it out, or start a new run"
            )
    # All processes together go on with the batches they had.
    together = saved["batch_size"] * len(checkpoint["random"])
    saved["batch_size"] = max(together // distributed.processes(), 1)
    if "device" not in args.typed:  # that of the run, where there is such a one
        try:
            choose_device(saved["device"])
        except UserError:
            saved["device"] = None
    saved.update(save=os.path.dirname(path) or ".", typed=args.typed, resume=args.resume)
    return checkpoint, type(args)(**saved)
