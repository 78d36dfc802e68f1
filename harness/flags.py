"""Command lines: a parser that answers in one line, and the flags that both scripts have."""

import argparse
import os
import shlex
import sys

from utils import UserError

# ------------------------------------------------------------------------------------------------
# Parser, and how a wrong flag is answered
# ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that answers an error with one line, and knows which flags were typed.

    `published` takes the typed flags, a dict, and returns the defaults of the setting that they ask
    for; `check` takes all flags, and raises UserError where they cannot be right.
    """

    def __init__(self, prog, description, published=None, check=None):
        self.published = published or (lambda typed: {})
        self.check = check or (lambda args: None)
        super().__init__(
            prog=prog, description=description, usage=f"{prog} [flags]", allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=32, width=100
            ),
        )

    def switch(self, group, name, help, default=None):  # the pair --name / --no-name
        group.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help
        )

    def show_defaults(self, settings):
        """Say in the help of each flag what its default is, in each of the published settings.

        That of "NAME imagenet" is left out where it is that of "NAME".
        """
        for action in self._actions:
            values = {name: column.get(action.dest) for name, column in settings.items()}
            if all(value is None for value in values.values()):
                if action.default in (None, argparse.SUPPRESS):
                    continue
                values = {"default": action.default}
            first = next(iter(values.values()))
            if all(value == first for value in values.values()):
                values = {"default": first}
            usual = {f"{name} imagenet": value for name, value in values.items()}
            values = {n: v for n, v in values.items() if n not in usual or v != usual[n]}
            text = ", ".join(f"{name}: {shown(value)}" for name, value in values.items())
            action.help = f"{action.help} ({text})"

    def error(self, message):
        fail(self.prog, message)

    def parse_args(self, argv=None):
        """All flags; those that are not typed, which `typed` does not name, have their defaults."""
        defaults = {a.dest: a.default for a in self._actions if a.dest != "help"}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            typed = vars(super().parse_args(argv, argparse.Namespace()))
        finally:
            for action in self._actions:
                action.default = defaults.get(action.dest, argparse.SUPPRESS)
        args = argparse.Namespace(
            **{**defaults, **self.published(typed), **typed}, typed=sorted(typed)
        )
        try:
            self.check(args)
        except UserError as error:
            self.error(error)
        return args


def shown(value):
    """A default as the help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else value


def fail(prog, message):
    """Print what is wrong on standard error, in one line, and exit with status 2.

    The ranks of a machine all find the same: the first one prints it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def whole(low, high=2**31 - 1):
    """Type of a flag that takes a whole number of at least `low` and at most `high`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            limit = f"at most {high}" if value > high else f"at least {low}"
            raise argparse.ArgumentTypeError(f"give a whole number of {limit}, not {text!r}")
        return value

    return parse


def real(low, high=float("inf"), *, open_low=False):
    """Type of a flag that takes a number in [low, high), or with `open_low` in (low, high)."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low < value < high or value == low and not open_low):
            interval = f"{'(' if open_low else '['}{low}, {high})"
            raise argparse.ArgumentTypeError(f"give a number in {interval}, not {text!r}")
        return value

    return parse


def name(text):
    """Type of a flag that takes the name of a file, a folder or a device."""
    if not text:  # as of a variable that a shell script has not set
        raise argparse.ArgumentTypeError("give a name: this one is empty")
    return text


# ------------------------------------------------------------------------------------------------
# Flags of both scripts
# ------------------------------------------------------------------------------------------------


def add_shared(parser, datasets):
    """Flags of both scripts; those without a default take it from the published setting."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=name, default="data", metavar="DIR", help="folder of the data set")
    group.add_argument(
        "--dataset", default="cifar10", choices=datasets, metavar="NAME",
        help=f"one of {', '.join(datasets)}; imagenet is read from files, the others are kept "
        "in memory")
    group.add_argument(
        "--image_size", type=whole(4, 2**15), metavar="PIXELS",
        help="width and height that images are resized to: a multiple of 4, for imagenet of 32")
    group.add_argument(
        "--batch_size", type=whole(2), metavar="IMAGES", help="images in a step, of each rank")
    group.add_argument(
        "--workers", type=whole(0, 1024), default=2, metavar="N",
        help="threads that read image files; for imagenet, processes")
    parser.switch(group, "cutout", "cut a square out of each training image")
    group.add_argument(
        "--cutout_length", type=whole(1), default=16, metavar="PIXELS", help="side of that square")

    group = parser.add_argument_group("network")
    group.add_argument(
        "--init_channels", type=whole(1), metavar="C", help="channels of the first cells")
    group.add_argument("--layers", type=whole(1, 1000), metavar="CELLS", help="number of cells")
    parser.switch(group, "auxiliary", "train with an auxiliary head")
    group.add_argument(
        "--auxiliary_weight", type=real(0), default=0.4, metavar="WEIGHT",
        help="weight of the auxiliary head's loss")
    group.add_argument(
        "--drop_path_prob", type=real(0, 1), metavar="P",
        help="probability P of dropping an operation for an image: it rises from 0 in the first "
        "epoch to P (E - 1) / E in the last of E epochs")
    group.add_argument(
        "--label_smoothing", type=real(0, 1), metavar="P",
        help="part of each label that is spread over all classes")

    group = parser.add_argument_group("optimisation of the weights (SGD)")
    group.add_argument("--epochs", type=whole(1), help="passes through the training images")
    group.add_argument(
        "--learning_rate", type=real(0, open_low=True), metavar="LR",
        help="learning rate of the first epoch")
    group.add_argument(
        "--learning_rate_min", type=real(0), metavar="LR",
        help="learning rate towards the last epoch, reached by cosine")
    group.add_argument(
        "--momentum", type=real(0, 1), default=0.9, metavar="M", help="momentum of SGD")
    group.add_argument("--weight_decay", type=real(0), metavar="L2", help="weight decay of SGD")
    group.add_argument(
        "--grad_clip", type=real(0, open_low=True), default=5.0, metavar="NORM",
        help="largest norm of the gradient of all weights together")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--save", type=name, metavar="DIR",
        help="folder of the run (default: runs/ with date and time)")
    group.add_argument(
        "--resume", type=name, metavar="RUN_DIR",
        help="continue the run in this folder, or its checkpoint.pt")
    group.add_argument(
        "--seed", type=whole(0, 2**63 - 1), help="seed of weights, data order and augmentation")
    group.add_argument(
        "--device", type=name, help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    parser.switch(group, "amp", "compute in bfloat16 where that is safe", default=False)
    parser.switch(group, "cuda_graphs", "record steps as CUDA graphs, and replay them (default: on "
                  "a CUDA device, with a single rank and recoveries at the end of epochs)")
    parser.switch(group, "compile", "have torch compile what runs, for a GPU and a long run",
                  default=False)
    group.add_argument(
        "--report_freq", type=whole(1), default=50, metavar="STEPS",
        help="steps between two lines of progress")


def check_shared(args):
    """Raise UserError on flags that cannot be right; called by the parsers of both scripts."""
    if args.image_size % 4:
        raise UserError(f"--image_size must be a multiple of 4, not {args.image_size}")
    if args.cutout and not args.resume and not getattr(args, "evaluate", False):
        typed = {"cutout", "cutout_length"} & {*args.typed}
        if args.cutout_length > args.image_size / (1 if typed else 2):
            raise UserError(
                f"cutout of {args.cutout_length} pixels takes {'all' if typed else 'most'} of an "
                f"image of {args.image_size}: give --cutout_length {args.image_size // 2} or "
                "--no-cutout"
            )
    if args.learning_rate_min > args.learning_rate:
        raise UserError(
            f"--learning_rate_min {args.learning_rate_min:g} is larger than --learning_rate "
            f"{args.learning_rate:g}"
        )
    if args.resume:
        if args.save:
            raise UserError("--resume continues in the run's own folder: leave out --save")
        checkpoint_path(args.resume)
        return
    if args.save and os.path.lexists(args.save):
        is_first = os.environ.get("RANK", "0") == "0"  # which makes it for all, maybe just now
        if is_first and (not os.path.isdir(args.save) or os.listdir(args.save)):
            can_resume = os.path.isfile(os.path.join(args.save, "checkpoint.pt"))
            raise UserError(
                f"--save {args.save} exists already and is not overwritten: choose another folder, "
                + (f"or continue that run with --resume {args.save}" if can_resume else
                   "or remove it: it has no checkpoint")
            )
    if args.dataset == "imagefolder" and not os.path.isdir(args.data):
        raise UserError(
            f"--data {args.data} is not a folder: --dataset imagefolder reads "
            "DIR/train/<class>/* and DIR/test/<class>/*"
        )


def check_imagenet(args, linear):
    """Raise UserError on flags that do not go with --dataset imagenet."""
    if not os.path.isdir(args.data):
        raise UserError(
            f"--data {args.data} is not a folder: --dataset imagenet reads DIR/train/<class>/* and "
            "DIR/val/<class>/*"
        )
    if args.image_size % 32:
        raise UserError(
            f"--image_size must be a multiple of 32 for imagenet, not {args.image_size}: the "
            "network halves it five times"
        )
    if args.init_channels % 2:
        raise UserError(f"--init_channels must be even for imagenet, not {args.init_channels}")
    if linear and "learning_rate_min" in args.typed:
        raise UserError(
            "--learning_rate_min: the learning rate of imagenet falls in a line to 0; leave it out"
        )


def checkpoint_path(resume):
    """Path of the checkpoint that --resume RUN_DIR, or a checkpoint's own path, names."""
    path = os.path.join(resume, "checkpoint.pt") if os.path.isdir(resume) else resume
    if not os.path.isfile(path):
        raise UserError(f"--resume {resume}: there is no checkpoint at {path}")
    return path


def check_file(flag, path):
    """Raise UserError unless `path`, the value of a flag, is a file."""
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder: give a file in it, a network.pt say")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: there is no such file")


# ------------------------------------------------------------------------------------------------
# Flags and the data
# ------------------------------------------------------------------------------------------------


def fit_to_data(args, images, published, world_size, log):
    """Make an untyped --batch_size fit so many images, and log what the data change."""
    if "batch_size" not in args.typed:  # the published one is that of all ranks together
        args.batch_size = max(args.batch_size // world_size, 2)
        share = images // world_size
        if args.batch_size > share > 1:
            args.batch_size = share
            log(f"--batch_size is {share}, for there are no more images")
    together = world_size * args.batch_size
    if world_size > 1:
        log(f"{world_size} ranks with --batch_size {args.batch_size}: a step takes {together} "
            "images")
    batch, rate = published["batch_size"], published["learning_rate"]
    if together != batch and "learning_rate" not in args.typed:
        log(f"note: --learning_rate {rate:g} is published for batches of {batch} images; for "
            f"{together} the linear rule gives --learning_rate {rate * together / batch:.3g}")


def data_flags(args):
    """The flags by which train.py reads the same data; empty for the default ones."""
    imagenet = args.dataset == "imagenet"
    defaults = dict(dataset="cifar10", data="data", image_size=224 if imagenet else 32)
    flags = {name: value for name in defaults if (value := getattr(args, name)) != defaults[name]}
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in flags.items())


def cutout_flag(args):
    """The flag that train.py needs for images too small for the published cutout."""
    small = args.dataset != "imagenet" and args.image_size < 32
    return f" --cutout_length {args.image_size // 2}" if small else ""
