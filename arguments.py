"""Command-line flags that both scripts share, and how a wrong one is answered.

Nothing here imports torch, so that a typing error is answered at once.
"""

import argparse
import os
import sys

__version__ = "0.1.0"


class Parser(argparse.ArgumentParser):
    """A parser that answers an error with one line, and knows which flags were typed."""

    def __init__(self, prog, description):
        super().__init__(
            prog=prog, description=description, usage=f"{prog} [flags]", allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=32, width=100
            ),
        )  # fmt: skip

    def show_defaults(self, **settings):
        """Say in the help of each flag what its default is, in each of the published settings."""
        for action in self._actions:
            values = {name: column.get(action.dest) for name, column in settings.items()}
            if None in values.values():
                if action.default in (None, argparse.SUPPRESS):
                    continue
                values = {"default": action.default}
            if len(set(values.values())) == 1:
                values = {"default": next(iter(values.values()))}
            text = ", ".join(
                f"{name.replace('_', '-')}: {('off', 'on')[v] if isinstance(v, bool) else v}"
                for name, v in values.items()
            )
            action.help = f"{action.help} ({text})"

    def error(self, message):
        fail(self.prog, message)

    def parse_args(self, argv=None, published=lambda typed: {}, check=lambda args: None):
        """Parse flags; what is not typed comes from the published setting, else the default.

        Parameters
        ----------
        argv : list of str, optional
        published : callable
            published(typed) gives the defaults of the setting that the typed flags ask for.
        check : callable
            check(args) raises ValueError where the flags cannot be right.

        Returns
        -------
        argparse.Namespace
            All flags, and in `typed` the names of those that were given.
        """
        defaults = {a.dest: a.default for a in self._actions if a.dest != "help"}
        typed = vars(super().parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, ...))))
        typed = {name: value for name, value in typed.items() if value is not ...}
        args = argparse.Namespace(**{**defaults, **published(typed), **typed}, typed=sorted(typed))
        try:
            check(args)
        except ValueError as error:
            self.error(error)
        return args


def fail(prog, message):
    """Say in one line on standard error what is wrong, and exit with status 2.

    Of the processes that torchrun has started on a machine, which all find the same wrong, the
    first one says it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------
# Types of flags
# ------------------------------------------------------------------------------------------------


def whole(low):
    """Type of a flag that takes a whole number of at least `low`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"give a whole number of at least {low}, not {text!r}")
        return value

    return parse


def real(low, high=float("inf"), *, open_low=False, open_high=True):
    """Type of a flag that takes a number in an interval, by default [low, high)."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        inside = low < value if open_low else low <= value
        inside = inside and (value < high if open_high else value <= high)
        if not inside:
            interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
            raise argparse.ArgumentTypeError(f"give a number in {interval}, not {text!r}")
        return value

    return parse


def switch(group, name, help):
    """Add the pair --name / --no-name."""
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=help)


# ------------------------------------------------------------------------------------------------
# Shared flags
# ------------------------------------------------------------------------------------------------

DATASETS = ["cifar10", "cifar100", "digits", "imagefolder"]


def add_shared(parser, datasets=DATASETS):
    """Add the flags that mean the same in both scripts, in groups.

    Those without a default here take it from the published setting that the script runs.
    """
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="data", metavar="DIR", help="folder of the data set")
    group.add_argument(
        "--dataset", default="cifar10", choices=datasets, metavar="NAME",
        help=f"one of {', '.join(datasets)}",
    )  # fmt: skip
    group.add_argument(
        "--image_size", type=whole(4), default=32, metavar="PIXELS",
        help="images are resized to this width and height; a multiple of 4",
    )  # fmt: skip
    group.add_argument(
        "--batch_size", type=whole(1), metavar="IMAGES", help="in a step, of each process"
    )
    group.add_argument(
        "--workers", type=whole(0), default=2, metavar="N",
        help="threads that read image files; for imagenet, processes",
    )  # fmt: skip
    switch(group, "cutout", "cut a square out of each training image")
    group.add_argument(
        "--cutout_length", type=whole(1), default=16, metavar="PIXELS", help="side of that square"
    )

    group = parser.add_argument_group("network")
    group.add_argument("--init_channels", type=whole(1), metavar="C", help="of the first cells")
    group.add_argument("--layers", type=whole(1), metavar="CELLS", help="number of cells")
    switch(group, "auxiliary", "train with an auxiliary head")
    group.add_argument(
        "--auxiliary_weight", type=real(0), default=0.4, metavar="WEIGHT", help="weight of its loss"
    )
    group.add_argument(
        "--drop_path_prob", type=real(0, 1), metavar="P",
        help="probability of dropping an operation for an image, reached at the last epoch",
    )  # fmt: skip

    group = parser.add_argument_group("optimisation of the weights (SGD)")
    group.add_argument("--epochs", type=whole(1), help="passes through the training images")
    group.add_argument("--learning_rate", type=real(0), metavar="LR", help="in the first epoch")
    group.add_argument(
        "--learning_rate_min", type=real(0), metavar="LR", help="towards the last epoch, by cosine"
    )
    group.add_argument("--momentum", type=real(0, 1), default=0.9, metavar="M", help="of SGD")
    group.add_argument("--weight_decay", type=real(0), metavar="L2", help="of SGD")
    group.add_argument(
        "--grad_clip", type=real(0, open_low=True), default=5.0, metavar="NORM",
        help="largest norm of the gradient of all weights together",
    )  # fmt: skip

    group = parser.add_argument_group("run")
    group.add_argument(
        "--save", metavar="DIR", help="folder of the run (default: runs/ with date and time)"
    )
    group.add_argument(
        "--resume", metavar="RUN_DIR", help="continue the run in this folder, or its checkpoint.pt"
    )
    group.add_argument("--seed", type=whole(0), help="of weights, data order and augmentation")
    group.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    switch(group, "amp", "compute in bfloat16 where that is safe")
    group.set_defaults(amp=False)
    group.add_argument(
        "--report_freq", type=whole(1), default=50, metavar="STEPS",
        help="steps between two lines of progress",
    )  # fmt: skip


def check_shared(args):
    """What can be wrong with the shared flags and is seen without loading anything.

    Raises
    ------
    ValueError
        With one line that says what is wrong and what to do.
    """
    if args.image_size % 4:
        raise ValueError(f"--image_size must be a multiple of 4, not {args.image_size}")
    if args.learning_rate_min > args.learning_rate:
        raise ValueError(
            f"--learning_rate_min {args.learning_rate_min:g} is larger than --learning_rate "
            f"{args.learning_rate:g}"
        )
    if args.resume:
        if args.save:
            raise ValueError("--resume continues in the run's own folder: leave out --save")
        checkpoint_path(args.resume)
    elif args.save and os.path.lexists(args.save):
        is_first = os.environ.get("RANK", "0") == "0"  # which makes it for all, maybe just now
        if is_first and (not os.path.isdir(args.save) or os.listdir(args.save)):
            raise ValueError(
                f"--save {args.save} exists already and is not overwritten: choose another "
                f"folder, or continue that run with --resume {args.save}"
            )
    if args.dataset == "imagefolder" and not os.path.isdir(args.data) and not args.resume:
        raise ValueError(
            f"--data {args.data} is not a folder: --dataset imagefolder reads "
            "DIR/train/<class>/* and DIR/test/<class>/*"
        )


def checkpoint_path(resume):
    """Path of the checkpoint that --resume RUN_DIR, or a checkpoint's own path, names."""
    path = os.path.join(resume, "checkpoint.pt") if os.path.isdir(resume) else resume
    if not os.path.isfile(path):
        raise ValueError(f"--resume {resume}: there is no checkpoint at {path}")
    return path


def check_file(flag, path):
    """Raise ValueError unless `path`, the value of a flag, is a file that can be read."""
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path} is a folder: give a file in it, a network.pt say")
    if not os.path.isfile(path):
        raise ValueError(f"{flag} {path}: there is no such file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{flag} {path}: not readable")
