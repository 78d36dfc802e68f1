"""Command lines: a parser with one-line errors, and the flags of both scripts."""

import argparse
import os
import shlex
import sys

from utils import UserError

# ------------------------------------------------------------------------------------------------
# Parser
# ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, and knows which flags were typed.

    published : callable
        Takes the typed flags as a dict, and returns the defaults of the setting that they select.
    check : callable
        Takes all flags, and raises UserError if they cannot be right.
    """

    def __init__(self, prog, description, published=None, check=None):
        self.published, self.check = published, check
        super().__init__(
            prog=prog, description=description, usage=f"{prog} [flags]", allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=32, width=100
            ),
        )

    def add_switch(self, group, name, help, default=None):
        """Add the pair of flags --name and --no-name."""
        group.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help
        )

    def show_defaults(self, settings):
        """Append defaults to the help of each flag: its own, or those of the published settings.

        A setting named "NAME imagenet" is shown only where it differs from "NAME".
        """
        for action in self._actions:
            values = {name: setting.get(action.dest) for name, setting in settings.items()}
            if all(value is None for value in values.values()):
                if action.default in (None, argparse.SUPPRESS):
                    continue
                values = {"default": action.default}
            elif len({*values.values()}) == 1:
                values = {"default": next(iter(values.values()))}
            texts = []
            for name, value in values.items():
                usual = name.removesuffix(" imagenet")
                if usual == name or value != values[usual]:
                    texts.append(f"{name}: {format_default(value)}")
            action.help = f"{action.help} ({', '.join(texts)})"

    def error(self, message):
        fail(self.prog, message)

    def parse_args(self, argv=None):
        """Parse all flags; `typed` in the result names those that were on the command line."""
        defaults = {a.dest: a.default for a in self._actions if a.dest != "help"}
        absent = object()  # argparse sets no default where the namespace has a value already
        found = super().parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, absent)))
        typed = {name: value for name, value in vars(found).items() if value is not absent}
        published = self.published(typed) if self.published else {}
        args = argparse.Namespace(**{**defaults, **published, **typed}, typed=sorted(typed))
        if self.check:
            try:
                self.check(args)
            except UserError as error:
                self.error(error)
        return args


def format_default(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else value


def fail(prog, message):
    """Print an error to standard error in one line, and exit with status 2.

    All ranks of a machine find the same error, so only the first one prints it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def integer(low, high=2**31 - 1):
    """Type of a flag that takes an integer from `low` to `high`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            limit = f"at least {low}" if value is None or value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"give an integer of {limit}, not {text!r}")
        return value

    return parse


def number(low, high=float("inf"), *, open_low=False):
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


def nonempty(text):
    """Type of a flag that takes the name of a file, a folder or a device."""
    if not text:  # for example a variable that a shell script has not set
        raise argparse.ArgumentTypeError("the name is empty")
    return text


# ------------------------------------------------------------------------------------------------
# Flags of both scripts
# ------------------------------------------------------------------------------------------------


def add_common_flags(parser, datasets):
    """Add the flags of both scripts; missing defaults are those of the published setting."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=nonempty, default="data", metavar="DIR", help="folder of the data set")
    group.add_argument(
        "--dataset", default="cifar10", choices=datasets, metavar="NAME",
        help=f"one of {', '.join(datasets)}; imagenet is read from files during training, the "
        "others are kept in memory")
    group.add_argument(
        "--image_size", type=integer(4, 2**15), metavar="PIXELS",
        help="resize images to this width and height, a multiple of 4 (imagenet: of 32)")
    group.add_argument(
        "--batch_size", type=integer(2), metavar="IMAGES", help="batch size of each rank")
    group.add_argument(
        "--workers", type=integer(0, 1024), default=2, metavar="N",
        help="threads (imagenet: processes) that read image files")
    parser.add_switch(group, "cutout", "cut a square out of each training image")
    group.add_argument(
        "--cutout_length", type=integer(1), default=16, metavar="PIXELS",
        help="side of that square")

    group = parser.add_argument_group("network")
    group.add_argument(
        "--init_channels", type=integer(1), metavar="C", help="channels of the first cells")
    group.add_argument("--layers", type=integer(1, 1000), metavar="CELLS", help="number of cells")
    parser.add_switch(group, "auxiliary", "train with an auxiliary head")
    group.add_argument(
        "--auxiliary_weight", type=number(0), default=0.4, metavar="WEIGHT",
        help="weight of the auxiliary head's loss")
    group.add_argument(
        "--drop_path_prob", type=number(0, 1), metavar="P",
        help="probability of dropping the output of an operation for an image: it rises from 0 in "
        "the first epoch to P (E - 1) / E in the last of E epochs")
    group.add_argument(
        "--label_smoothing", type=number(0, 1), metavar="P",
        help="label smoothing of the cross-entropy")

    group = parser.add_argument_group("optimization of the weights (SGD)")
    group.add_argument("--epochs", type=integer(1), help="passes through the training images")
    group.add_argument(
        "--learning_rate", type=number(0, open_low=True), metavar="LR",
        help="learning rate of the first epoch")
    group.add_argument(
        "--learning_rate_min", type=number(0), metavar="LR",
        help="learning rate at the end of the cosine schedule")
    group.add_argument(
        "--momentum", type=number(0, 1), default=0.9, metavar="M", help="momentum of SGD")
    group.add_argument("--weight_decay", type=number(0), metavar="L2", help="weight decay of SGD")
    group.add_argument(
        "--grad_clip", type=number(0, open_low=True), default=5.0, metavar="NORM",
        help="clip the gradient of all weights to this norm")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--save", type=nonempty, metavar="DIR",
        help="folder of the run (default: a name with date and time in runs/)")
    group.add_argument(
        "--resume", type=nonempty, metavar="RUN_DIR",
        help="continue the run in this folder, or its checkpoint.pt")
    group.add_argument(
        "--seed", type=integer(0, 2**63 - 1), help="seed of weights, data order and augmentation")
    group.add_argument(
        "--device", type=nonempty, help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    parser.add_switch(group, "amp", "compute in bfloat16 where that is safe", default=False)
    parser.add_switch(
        group, "cuda_graphs", "capture steps as CUDA graphs and replay them (default: on a CUDA "
        "device with a single rank, if codes are recovered at the end of epochs)")
    parser.add_switch(
        group, "compile", "compile the network with torch.compile; for long runs on a GPU",
        default=False)
    group.add_argument(
        "--report_freq", type=integer(1), default=50, metavar="STEPS",
        help="steps between two lines of progress")


def check_common_flags(args):
    """Raise UserError if flags of both scripts cannot be right."""
    if args.image_size % 4:
        raise UserError(f"--image_size must be a multiple of 4, not {args.image_size}")
    if not getattr(args, "weights", None):  # otherwise the image size may come from the file
        check_cutout(args)
    if args.resume:
        if args.save:
            raise UserError("--resume continues in the folder of the run: leave out --save")
        checkpoint_path(args.resume)
        return
    if args.learning_rate_min > args.learning_rate:
        raise UserError(
            f"--learning_rate_min {args.learning_rate_min:g} is larger than --learning_rate "
            f"{args.learning_rate:g}: give a smaller --learning_rate_min"
        )
    if args.save and os.path.lexists(args.save):
        # Only rank 0 checks this, because it may have created the folder already.
        is_rank_zero = os.environ.get("RANK", "0") == "0"
        if is_rank_zero and (not os.path.isdir(args.save) or os.listdir(args.save)):
            hint = "or remove it, because it has no checkpoint"
            if os.path.isfile(os.path.join(args.save, "checkpoint.pt")):
                hint = f"or continue that run with --resume {args.save}"
            raise UserError(f"--save {args.save} exists already and is not overwritten: give "
                            f"another folder, {hint}")
    if args.dataset == "imagefolder" and not os.path.isdir(args.data):
        raise UserError(
            f"--data {args.data} is not a folder: --dataset imagefolder reads "
            "DIR/train/<class>/* and DIR/test/<class>/*"
        )


def check_cutout(args):
    """Raise UserError if cutout would remove most of an image."""
    if args.cutout and not args.resume and not getattr(args, "evaluate", False):
        is_typed = "cutout" in args.typed or "cutout_length" in args.typed
        limit = args.image_size if is_typed else args.image_size // 2
        if args.cutout_length > limit:
            raise UserError(
                f"--cutout_length {args.cutout_length} is too large for images of "
                f"{args.image_size} pixels: give --cutout_length {args.image_size // 2} or "
                "--no-cutout"
            )


def check_imagenet(args, linear):
    """Raise UserError if flags do not fit --dataset imagenet."""
    if not os.path.isdir(args.data):
        raise UserError(
            f"--data {args.data} is not a folder: --dataset imagenet reads DIR/train/<class>/* and "
            "DIR/val/<class>/*"
        )
    if args.image_size % 32:
        raise UserError(
            f"--image_size must be a multiple of 32 for imagenet, not {args.image_size}, because "
            "the network halves it five times"
        )
    if args.init_channels % 2:
        raise UserError(f"--init_channels must be even for imagenet, not {args.init_channels}")
    if linear and "learning_rate_min" in args.typed:
        raise UserError(
            "--learning_rate_min: the linear schedule of imagenet ends at 0; leave it out"
        )


def checkpoint_path(resume):
    """Path of the checkpoint of --resume, which names a run folder or its checkpoint.pt."""
    path = os.path.join(resume, "checkpoint.pt") if os.path.isdir(resume) else resume
    if not os.path.exists(path):
        raise UserError(f"--resume {resume}: {path} does not exist")
    if not os.path.isfile(path):
        raise UserError(f"--resume {resume}: {path} is not a checkpoint")
    return path


def check_file(flag, path):
    """Raise UserError unless the value of a flag is the path of a file."""
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder: give a file in it, such as network.pt")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: there is no such file")


# ------------------------------------------------------------------------------------------------
# Flags that depend on the data
# ------------------------------------------------------------------------------------------------


def fit_to_data(args, images, published, world_size, log):
    """Reduce the default --batch_size to the number of images, and log batches and rate."""
    if "batch_size" not in args.typed:  # the published batch is that of all ranks together
        args.batch_size = max(args.batch_size // world_size, 2)
        images_per_rank = images // world_size
        if args.batch_size > images_per_rank > 1:
            args.batch_size = images_per_rank
            log(f"--batch_size is reduced to {images_per_rank}, the number of images of each rank")
    total_batch = world_size * args.batch_size
    if world_size > 1:
        log(f"{world_size} ranks with --batch_size {args.batch_size}: a batch of {total_batch}")
    batch, rate = published["batch_size"], published["learning_rate"]
    if total_batch != batch and "learning_rate" not in args.typed:
        log(f"note: --learning_rate {rate:g} is published for batches of {batch}; for "
            f"{total_batch} the linear rule would give {rate * total_batch / batch:.3g}, which is "
            "not applied")


def data_flags(args):
    """The flags with which train.py reads the same data; empty for the defaults."""
    image_size = 224 if args.dataset == "imagenet" else 32
    text = ""
    for name, default in dict(dataset="cifar10", data="data", image_size=image_size).items():
        value = getattr(args, name)
        if value != default:
            text += f" --{name} {shlex.quote(str(value))}"
    return text


def cutout_flag(args):
    """The cutout flag with which train.py continues, if images are small or cutout is off."""
    if "cutout" in args.typed and not args.cutout:
        return " --no-cutout"
    if "cutout_length" in args.typed:
        return f" --cutout_length {args.cutout_length}"
    if args.dataset != "imagenet" and args.image_size < 32:
        return f" --cutout_length {args.image_size // 2}"
    return ""
