"""Every flag of both scripts, its default in each published setting, and its check."""

import argparse
import os
import shlex
import sys

import genotypes
import ista
from utils import UserError

__version__ = "0.2.0"

# ------------------------------------------------------------------------------------------------
# Published settings
# ------------------------------------------------------------------------------------------------

TWO_STAGE = dict(
    init_channels=16, layers=8, image_size=32, batch_size=256, epochs=50, seed=2,
    learning_rate=0.1, learning_rate_min=0.001, weight_decay=3e-4, label_smoothing=0.0,
    arch_learning_rate=6e-4, auxiliary=False, cutout=False, drop_path_prob=0.0, max_params=None,
)
ONE_STAGE = dict(
    init_channels=36, layers=20, image_size=32, batch_size=96, epochs=600, seed=5,
    learning_rate=0.025, learning_rate_min=0.001, weight_decay=3e-4, label_smoothing=0.0,
    arch_learning_rate=3e-4, auxiliary=True, cutout=True, drop_path_prob=0.2, max_params=3.7,
)
RETRAINING = dict(
    init_channels=36, layers=20, image_size=32, batch_size=96, epochs=600, seed=0,
    learning_rate=0.025, learning_rate_min=0.0, weight_decay=3e-4, label_smoothing=0.0,
    auxiliary=True, cutout=True, drop_path_prob=0.2,
)
IMAGENET = dict(
    init_channels=48, layers=14, image_size=224, batch_size=1024, epochs=250, seed=0,
    learning_rate=0.5, learning_rate_min=0.0, weight_decay=3e-5, label_smoothing=0.1,
    auxiliary=True, cutout=False, drop_path_prob=0.0,
)
# The paper has searched on ImageNet in one stage, but does not say how: the recipe of the
# retraining, with b and the seed as on CIFAR, is our choice; so is two-stage search on it.
ONE_STAGE_IMAGENET = {**ONE_STAGE, **IMAGENET, "seed": ONE_STAGE["seed"], "max_params": None}
TWO_STAGE_IMAGENET = {**TWO_STAGE, "image_size": 224}


def search_setting(typed):
    """The published setting of the search that the typed flags ask for."""
    imagenet = typed.get("dataset") == "imagenet"
    if typed.get("one_stage"):
        return ONE_STAGE_IMAGENET if imagenet else ONE_STAGE
    return TWO_STAGE_IMAGENET if imagenet else TWO_STAGE


def train_setting(typed):
    """The published setting of the data set that the typed flags name."""
    return IMAGENET if typed.get("dataset") == "imagenet" else RETRAINING


# ------------------------------------------------------------------------------------------------
# Parser, and how a wrong flag is answered
# ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that answers an error with one line, and knows which flags were typed."""

    def __init__(self, prog, description, published=None, check=None):
        self.published = published or (lambda typed: {})
        self.check = check or (lambda args: None)
        super().__init__(
            prog=prog, description=description, usage=f"{prog} [flags]", allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=32, width=100
            ),
        )

    def show_defaults(self, settings):
        """Say in the help of each flag what its default is, in each of the published settings.

        That of "NAME imagenet" is left out where it is that of "NAME".
        """
        for action in self._actions:
            values = {name: column.get(action.dest) for name, column in settings.items()}
            if set(values.values()) == {None}:
                if action.default in (None, argparse.SUPPRESS):
                    continue
                values = {"default": action.default}
            if len(set(values.values())) == 1:
                values = {"default": next(iter(values.values()))}
            usual = {f"{name} imagenet": value for name, value in values.items()}
            values = {n: v for n, v in values.items() if n not in usual or v != usual[n]}
            text = ", ".join(f"{name}: {shown(value)}" for name, value in values.items())
            action.help = f"{action.help} ({text})"

    def error(self, message):
        fail(self.prog, message)

    def parse_args(self, argv=None):
        """Parse flags; what is not typed comes from the published setting, else the default.

        Parameters
        ----------
        argv : list of str, optional

        Returns
        -------
        argparse.Namespace
            All flags, and in `typed` the names of those that were given.
        """
        defaults = {a.dest: a.default for a in self._actions if a.dest != "help"}
        typed = vars(super().parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, ...))))
        typed = {name: value for name, value in typed.items() if value is not ...}
        setting = self.published(typed)
        args = argparse.Namespace(**{**defaults, **setting, **typed}, typed=sorted(typed))
        try:
            self.check(args)
        except ValueError as error:
            self.error(error)
        return args


    def wrong_flag(self, values):
        """The first flag whose value in a dict could not have come from this parser, or None."""
        defaults = {**{a.dest: a.default for a in self._actions}, **self.published(values)}
        for action in self._actions:
            value = values.get(action.dest, defaults[action.dest])
            if value is None or isinstance(value, bool):
                fits = value is defaults[action.dest] or (value is not None and action.nargs == 0)
            else:
                try:
                    fits = (action.type or str)(str(value)) == value
                except argparse.ArgumentTypeError:
                    fits = False
                fits = fits and (action.choices is None or value in action.choices)
            if not fits:
                return action.dest
        return None


def check_saved(kind, values, path):
    """Raise UserError unless these can be the flags of a run of a kind; missing ones may be newer.

    Parameters
    ----------
    kind : {"search", "train"}
    values : dict
    path : str
        Where they are from.
    """
    parser = {"search": get_search_parser, "train": get_train_parser}[kind]("")
    if name := parser.wrong_flag(values):
        raise UserError(f"{path} is damaged: --{name} cannot be {values[name]!r:.60}")


def shown(value):
    """A default as the help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else value


def fail(prog, message):
    """Say in one line on standard error what is wrong, and exit with status 2.

    Of the ranks that torchrun has started on a machine, which all find the same wrong, the first
    one says it.
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
        if value < low:
            raise argparse.ArgumentTypeError(f"give a whole number of at least {low}, not {text!r}")
        if value > high:
            raise argparse.ArgumentTypeError(f"give a whole number of at most {high}, not {text!r}")
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
        if value > 1e38:
            raise argparse.ArgumentTypeError(f"float32 holds numbers to 1e38 only, not {text!r}")
        return value

    return parse


def name(text):
    """Type of a flag that takes the name of a file, a folder or a device."""
    if not text:  # as of a variable that a shell script has not set
        raise argparse.ArgumentTypeError("give a name: this one is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # neither TensorBoard nor matplotlib can take it
        raise argparse.ArgumentTypeError(f"the name {ascii(text)} is not UTF-8") from None
    return text


def recovery_interval(text):
    """Type of --recover_every: "epoch", or a number of steps."""
    return text if text == "epoch" else whole(1)(text)


def switch(group, name, help):
    """Add the pair --name / --no-name."""
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=help)


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

DATASETS = ["cifar10", "cifar100", "digits", "imagefolder", "imagenet"]


def get_search_parser(description):
    parser = Parser("search.py", description, search_setting, check_search)
    add_shared(parser)

    group = parser.add_argument_group("architecture")
    switch(group, "one_stage", "search at the target size, in one run with the training")
    group.add_argument(
        "--arch_learning_rate", type=real(0), metavar="LR", help="learning rate of Adam on b")
    group.add_argument(
        "--arch_weight_decay", type=real(0), default=1e-3, metavar="L2",
        help="weight decay of Adam on b")
    group.add_argument(
        "--proj_dims", type=whole(1, 1000), default=7, metavar="M", help="m, the length of b")
    group.add_argument(
        "--sparseness", type=whole(1), default=2, metavar="S",
        help="s, the (edge, operation) pairs that each node keeps")
    switch(group, "distinct_edges", "let a node keep at most one operation an edge")
    group.add_argument(
        "--lam", type=real(0, open_low=True), default=1e-5, metavar="LAMBDA",
        help="λ, the weight of the l1 norm of a code")
    group.add_argument(
        "--solver", default="homotopy", metavar="NAME", choices=[*ista.SOLVERS],
        help=f"how codes are recovered: {', '.join(ista.SOLVERS)}")
    parser.set_defaults(one_stage=False, distinct_edges=False)

    group = parser.add_argument_group("two-stage search")
    group.add_argument(
        "--train_portion", type=real(0, 1, open_low=True), default=0.5, metavar="P",
        help="part of the training images for the weights; the rest is for b")
    group.add_argument(
        "--recover_every", type=recovery_interval, default="epoch", metavar="{epoch,STEPS}",
        help="recover the codes after each epoch, or after so many steps")

    group = parser.add_argument_group("one-stage search")
    group.add_argument(
        "--freeze_tol", type=real(0), default=1e-3, metavar="TOL",
        help="a node freezes when its code moves by no more than this in an epoch, so sooner when "
        "epochs are short")
    group.add_argument(
        "--max_params", type=real(0, open_low=True), metavar="MILLIONS",
        help="architectures with as many parameters or more are rejected")
    group.add_argument(
        "--max_search_epochs", type=whole(1), default=600, metavar="EPOCHS",
        help="after these the last architecture is taken, at rest or not")
    parser.show_defaults({
        "two-stage": TWO_STAGE, "two-stage imagenet": TWO_STAGE_IMAGENET,
        "one-stage": ONE_STAGE, "one-stage imagenet": ONE_STAGE_IMAGENET,
    })
    return parser


def get_train_parser(description):
    parser = Parser("train.py", description, train_setting, check_train)
    add_shared(parser)
    group = parser.add_argument_group("what to train or evaluate")
    group.add_argument(
        "--arch", metavar="GENOTYPE",
        help="a published name, random:SEED, random:SEED:distinct, a genotype.json, or a text "
        "'Genotype(...)'")
    switch(group, "one_stage", "put a BatchNorm after pools and skips, whatever the genotype says")
    group.add_argument(
        "--weights", type=name, metavar="FILE",
        help="start from the weights in a network.pt, a checkpoint.pt or a plain state dict "
        "(the latter needs --arch)")
    group.add_argument(
        "--evaluate", action="store_true",
        help="measure the network of --weights or --resume on the test set, and do nothing else")
    parser.show_defaults({"cifar": RETRAINING, "imagenet": IMAGENET})
    return parser


def add_shared(parser):
    """Add the flags that mean the same in both scripts, in groups.

    Those without a default here take it from the published setting that the script runs.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=name, default="data", metavar="DIR", help="folder of the data set")
    group.add_argument(
        "--dataset", default="cifar10", choices=DATASETS, metavar="NAME",
        help=f"one of {', '.join(DATASETS)}; imagenet is read from files, the others are kept "
        "in memory")
    group.add_argument(
        "--image_size", type=whole(4, 2**15), metavar="PIXELS",
        help="width and height that images are resized to: a multiple of 4, for imagenet of 32")
    group.add_argument(
        "--batch_size", type=whole(1), metavar="IMAGES", help="images in a step, of each rank")
    group.add_argument(
        "--workers", type=whole(0, 1024), default=2, metavar="N",
        help="threads that read image files; for imagenet, processes")
    switch(group, "cutout", "cut a square out of each training image")
    group.add_argument(
        "--cutout_length", type=whole(1), default=16, metavar="PIXELS", help="side of that square")

    group = parser.add_argument_group("network")
    group.add_argument(
        "--init_channels", type=whole(1), metavar="C", help="channels of the first cells")
    group.add_argument("--layers", type=whole(1, 1000), metavar="CELLS", help="number of cells")
    switch(group, "auxiliary", "train with an auxiliary head")
    group.add_argument(
        "--auxiliary_weight", type=real(0), default=0.4, metavar="WEIGHT",
        help="weight of the auxiliary head's loss")
    group.add_argument(
        "--drop_path_prob", type=real(0, 1), metavar="P",
        help="probability of dropping an operation for an image, reached at the last epoch")
    group.add_argument(
        "--label_smoothing", type=real(0, 1), metavar="P",
        help="part of each label that is spread over all classes")

    group = parser.add_argument_group("optimisation of the weights (SGD)")
    group.add_argument(
        "--epochs", type=whole(1),
        help="passes through the training images; in one-stage search, after the last freezing")
    group.add_argument(
        "--learning_rate", type=real(0), metavar="LR", help="learning rate of the first epoch")
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
    switch(group, "amp", "compute in bfloat16 where that is safe")
    switch(group, "cuda_graphs", "record a step of each epoch as a CUDA graph, and replay it")
    group.set_defaults(amp=False, cuda_graphs=False)
    group.add_argument(
        "--report_freq", type=whole(1), default=50, metavar="STEPS",
        help="steps between two lines of progress")


# ------------------------------------------------------------------------------------------------
# Checks that need nothing loaded
# ------------------------------------------------------------------------------------------------

# What the other search alone reads: typed, such a flag is a mistake.
ONE_STAGE_ONLY = (
    "freeze_tol", "max_params", "max_search_epochs", "auxiliary", "auxiliary_weight",
    "drop_path_prob",
)
TWO_STAGE_ONLY = ("train_portion", "recover_every")


def check_search(args):
    """Raise UserError on flags that cannot be right."""
    check_shared(args)
    search, unread = "two-stage", ONE_STAGE_ONLY
    if args.one_stage:
        search, unread = "one-stage", TWO_STAGE_ONLY
    for name in unread:
        if name in args.typed:
            raise UserError(f"--{name}: {search} search does not read it; leave it out")
    if args.sparseness > args.proj_dims:
        raise UserError(
            f"--sparseness {args.sparseness}: a code has at most --proj_dims {args.proj_dims} "
            "nonzero entries to choose from"
        )
    pairs = 2 if args.distinct_edges else 2 * len(genotypes.PRIMITIVES)
    if args.sparseness > pairs:
        raise UserError(f"--sparseness {args.sparseness}: the first node has only {pairs} "
                        f"{'edges' if args.distinct_edges else 'pairs'}")
    if args.dataset == "imagenet" and not args.resume:
        check_imagenet(args, linear=args.one_stage)
    check_step(args)


def check_train(args):
    """Raise UserError on flags that cannot be right."""
    check_shared(args)
    if args.arch is not None:
        if os.path.exists(args.arch) and not os.path.isdir(args.arch):
            check_file("--arch", args.arch)  # reading from a pipe would wait for ever
        genotypes.load(args.arch)
    if args.weights is not None:
        check_file("--weights", args.weights)
    if args.resume and (args.weights or args.arch):
        raise UserError("--resume brings its own network: leave out --weights and --arch")
    if args.evaluate and not (args.weights or args.resume):
        raise UserError("--evaluate needs the network to measure: --weights FILE or --resume RUN")
    if not (args.arch or args.weights or args.resume):
        raise UserError(
            "--arch is missing: give a genotype.json that search.py wrote, or one of "
            f"{', '.join(genotypes.NAMED)}"
        )
    if args.dataset == "imagenet" and not args.resume:
        check_imagenet(args, linear=True)


def check_imagenet(args, linear):
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
    if args.cutout:
        raise UserError("--cutout: the images of imagenet are cropped, not cut; leave it out")
    if linear and "learning_rate_min" in args.typed:
        raise UserError(
            "--learning_rate_min: the learning rate of imagenet falls in a line to 0; leave it out"
        )


def check_shared(args):
    if args.image_size % 4:
        raise UserError(f"--image_size must be a multiple of 4, not {args.image_size}")
    wide = args.cutout and 2 * args.cutout_length > args.image_size
    if wide and not args.resume and not getattr(args, "evaluate", False):
        if not {"cutout", "cutout_length"} & {*args.typed}:
            raise UserError(
                f"cutout of {args.cutout_length} pixels takes most of an image of "
                f"{args.image_size}: give --cutout_length {args.image_size // 2} or --no-cutout"
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
    elif args.save and os.path.lexists(args.save):
        is_first = os.environ.get("RANK", "0") == "0"  # which makes it for all, maybe just now
        if is_first and (not os.path.isdir(args.save) or os.listdir(args.save)):
            raise UserError(
                f"--save {args.save} exists already and is not overwritten: choose another "
                f"folder, or continue that run with --resume {args.save}"
            )
    if args.dataset == "imagefolder" and not os.path.isdir(args.data) and not args.resume:
        raise UserError(
            f"--data {args.data} is not a folder: --dataset imagefolder reads "
            "DIR/train/<class>/* and DIR/test/<class>/*"
        )


def checkpoint_path(resume):
    """Path of the checkpoint that --resume RUN_DIR, or a checkpoint's own path, names."""
    path = os.path.join(resume, "checkpoint.pt") if os.path.isdir(resume) else resume
    if not os.path.isfile(path):
        raise UserError(f"--resume {resume}: there is no checkpoint at {path}")
    return path


def check_file(flag, path):
    """Raise UserError unless `path`, the value of a flag, is a file that can be read."""
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder: give a file in it, a network.pt say")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: there is no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: not readable")


# ------------------------------------------------------------------------------------------------
# Flags and the data
# ------------------------------------------------------------------------------------------------


def fit_to_data(args, images, setting, world_size, log):
    """Make an untyped --batch_size fit the images, and say what does not go with the data.

    Parameters
    ----------
    args : argparse.Namespace
    images : int
        To train on, in each part of them.
    setting : dict
        The published one.
    world_size : int
    log : callable
        Takes a line.
    """
    if "batch_size" not in args.typed:  # the published one is that of all ranks together
        args.batch_size = max(args.batch_size // world_size, 1)
        share = images // world_size
        if args.batch_size > share > 1:
            args.batch_size = share
            log(f"--batch_size is {share}, for there are no more images")
    together = world_size * args.batch_size
    if world_size > 1:
        log(f"{world_size} ranks with --batch_size {args.batch_size}: a step takes {together} "
            "images")
    check_step(args)
    published, rate = setting["batch_size"], setting["learning_rate"]
    if together != published and "learning_rate" not in args.typed:
        log(f"note: --learning_rate {rate:g} is published for batches of {published} images; for "
            f"{together} the linear rule gives --learning_rate {rate * together / published:.3g}")


def check_step(args):
    """Refuse steps that cannot be recorded, and a BatchNorm with a single value of each channel."""
    if args.cuda_graphs and getattr(args, "recover_every", "epoch") != "epoch":
        raise UserError("--cuda_graphs records a step for a whole epoch: leave out --recover_every")
    if args.batch_size > 1 or args.dataset == "imagenet":
        return
    if args.auxiliary:
        raise UserError("--batch_size 1: the auxiliary head normalises over the images of a batch; "
                        "give 2 or more, or --no-auxiliary")
    if args.image_size == 4 and args.layers > 1:  # 1 pixel is left
        raise UserError("--batch_size 1 with --image_size 4: the last cells normalise over the "
                        "images of a batch; give 2 or more")


def data_flags(args):
    """The flags by which train.py reads the same data; empty for the default ones."""
    imagenet = args.dataset == "imagenet"
    defaults = dict(dataset="cifar10", data="data", image_size=224 if imagenet else 32)
    flags = {name: value for name in defaults if (value := getattr(args, name)) != defaults[name]}
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in flags.items())


def cutout_flag(args):
    """What train.py has to be told for images too small for the published cutout."""
    small = args.dataset != "imagenet" and args.image_size < 32
    return f" --cutout_length {args.image_size // 2}" if small else ""
