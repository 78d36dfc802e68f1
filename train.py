"""Train the network of a genotype from scratch, or evaluate one that is trained.

    python train.py --arch runs/NAME/genotype.json            # published recipe, CIFAR-10
    python train.py --arch ISTA_twostage                      # a published cell
    python train.py --arch "Genotype(normal=[...], ...)"      # one copied from a log
    python train.py --arch random:3                           # a random cell, for comparison
    python train.py --resume runs/train-20201206-101500       # resume after an interruption
    python train.py --evaluate --weights runs/NAME/network.pt # measure a trained network
    python train.py --dataset imagenet --data DIR --arch ISTA_ImageNet

The recipe is that of DARTS: SGD with a cosine learning rate, cutout, an auxiliary head, and a
drop-path probability that rises with the epochs; for ImageNet, a linear learning rate and label
smoothing. network.pt holds the network after the last epoch, network-best.pt that of the epoch with
the best test accuracy. Nothing else is selected by the test accuracy.
"""

import os
import shlex

# Must be set before torch is imported. OpenMP threads that wait for each other then sleep after
# 5,000 spins instead of 300,000: on a busy machine, spinning threads keep others from the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

import data
import genotypes
import imagenet
import model
import utils
import visualize
from harness import checkpoints, distributed, flags, runs, speedups
from harness.cuda_graphs import StepGraphs, use_graphs

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


def main(args):
    source = checkpoints.read_weights(args.weights) if args.weights else None
    if source:
        use_data_of(source["args"], args)
    run = runs.Run("train", args)  # writes nothing before `run.begin`
    args, checkpoint = run.args, run.checkpoint
    source = checkpoint or source
    config = network_config(args, source)
    device = utils.choose_device(args.device, args.amp)
    generator = utils.seed_everything(args.seed, device)
    memory_format = utils.memory_format(device, args.amp)

    train, test = load_images(run, device, config, source)
    options = dict(distributed.rank_and_size(), generator=generator, memory_format=memory_format)
    test_batches = test.batches(utils.evaluation_batch(args, device), train=False, **options)
    top5 = args.dataset == "imagenet" and len(test.classes) > 5

    net = model.from_config(config)
    if source:
        path = flags.checkpoint_path(args.resume) if args.resume else args.weights
        checkpoints.load_weights(net, source["weights"], path)
    net = net.to(device, memory_format=memory_format)
    if device.type == "cpu":
        speedups.keep_freed_memory()
        speedups.limit_threads(run.log)
    if args.compile:
        speedups.compile_network(net, is_fixed=True, log=run.log)
    utils.seed_drop_path(args.seed)
    parameters, multiply_adds = cost(net, args.image_size)
    run.log(f"network: {parameters / 1e6:.4f} M parameters, {multiply_adds / 1e6:.1f} M "
            f"multiply-adds an image, both without the auxiliary head; device: {device}")
    if args.evaluate:
        measured = utils.evaluate(net, test_batches, args.amp, top5)
        row = utils.name_metrics(measured, "test")
        run.log(f"{format_accuracy(row)}, loss {row['test_loss']:.4f}, on "
                f"{describe_test_set(test, args)}")
        run.print_pending()
        return

    cutout_length = args.cutout_length if args.cutout else 0
    batches = train.batches(args.batch_size, train=True, cutout_length=cutout_length, **options)
    optimizer = utils.sgd(net.parameters(), args)
    checkpoints.record_hyperparameters(optimizer)
    graphs_enabled = use_graphs(args.cuda_graphs, device)
    epoch, best, row = 0, -1.0, {}
    if checkpoint:
        epoch, best, row = (checkpoint[name] for name in ("epoch", "best", "row"))
        checkpoints.load_optimizer(optimizer, checkpoint["optimizer"], run.log)
        checkpoints.set_random_state(checkpoint["random"], generator, args.seed, epoch, run.log)
    genotype = genotypes.from_lists(config["genotype"])
    run.log(f"genotype = {genotype}", wrap=False)
    run.begin(device, columns(top5))
    run.save_genotype(genotype, config["one_stage"], arch=args.arch)
    parallel = distributed.data_parallel(net, [*net.parameters()], static=True)

    while epoch < args.epochs:
        factor, net.drop_path_prob = schedule(args, epoch)
        utils.set_learning_rate(optimizer, factor)
        epoch += 1
        with run.epoch(
            epoch, f"{epoch}/{args.epochs}", batches, args.epochs - epoch,
            learning_rate=factor * optimizer.param_groups[0]["initial_lr"],
            drop_path_prob=net.drop_path_prob,
            parameters=parameters, multiply_adds=multiply_adds,
        ) as row:
            row.update(train_epoch(parallel, batches, optimizer, run, graphs_enabled))
            measured = utils.evaluate(net, test_batches, args.amp, top5)
            row.update(utils.name_metrics(measured, "test"))
            is_best = row["test_accuracy"] > best
            best = max(best, row["test_accuracy"])
            row["best_accuracy"] = best
        about = describe_network(run, train, row)
        if is_best:
            run.save_network("network-best.pt", net, **about)
        run.save_checkpoint(
            epoch=epoch, best=best, row=row, config=net.config, weights=net.state_dict(),
            optimizer=optimizer.state_dict(), random=checkpoints.random_state(generator),
            about=about,
        )

    run.save_network("network.pt", net, **describe_network(run, train, row))
    run.draw(visualize.draw_run)
    run.log(f"{format_accuracy(row)} after the last epoch (network.pt); test accuracy {best:.2f} % "
            "after the best epoch (network-best.pt)")
    run.log("to evaluate the network again:")
    weights = shlex.quote(run.file("network.pt"))
    amp = " --amp" if args.amp else ""
    run.log(f"    python train.py --evaluate --weights {weights}{amp}", wrap=False)


def train_step(net, x, y, optimizer, args):
    """Update the weights on a batch."""
    with speedups.autocast(net, x.device, args.amp):
        logits, logits_aux = net(x)
    loss, total = utils.criterion(logits, logits_aux, y, args)
    optimizer.zero_grad()
    total.backward()
    clip_grad_norm_(utils.parameters_of(optimizer), args.grad_clip)
    optimizer.step()
    return loss.detach(), logits.detach()


def train_epoch(net, batches, optimizer, run, graphs_enabled=False):
    """Update the weights on each batch; return loss and accuracy."""
    module = distributed.unwrapped(net)
    meter = utils.Meter(next(module.parameters()).device)
    graphs = StepGraphs(module, graphs_enabled, run.warn)
    net.train()
    for x, y in batches:
        loss, logits = graphs.run(train_step, net, x, y, optimizer, run.args)
        meter.add(loss, logits, y)
        run.progress.step(meter)
    distributed.average_statistics(module)
    return utils.name_metrics(meter.read(), "train")


def schedule(args, epoch):
    """Factor of the initial learning rate, and drop-path probability, of an epoch from 0."""
    if args.dataset == "imagenet":
        factor = utils.linear_with_warm_up(epoch, args.epochs)
    else:
        factor = utils.cosine(epoch, args.epochs, args.learning_rate_min / args.learning_rate)
    return factor, args.drop_path_prob * epoch / args.epochs


# ------------------------------------------------------------------------------------------------
# Data, network and results
# ------------------------------------------------------------------------------------------------


def load_images(run, device, config, source):
    """Return training images (None for an evaluation) and test images.

    Evaluations use the class names, mean and standard deviation of the training images.
    """
    args = run.args
    about = source["about"] if source and args.evaluate else {}
    reader = imagenet if args.dataset == "imagenet" else data
    with distributed.rank_zero_first():
        train, test = reader.load(
            args.dataset, args.data, args.image_size, device, args.workers, run.log,
            test_only=bool(about),
        )
    if about:
        return None, test.for_network(about["classes"], about["mean"], about["std"])
    if args.evaluate:
        run.log("the file lacks mean and standard deviation of the training images and the order "
                "of the classes: those of this data set are used")
    if config.setdefault("num_classes", len(test.classes)) != len(test.classes):
        raise utils.UserError(
            f"the network has {config['num_classes']} classes, but {args.dataset} has "
            f"{len(test.classes)}: give the --dataset and --data of the network"
        )
    if args.evaluate:
        return None, test
    run.check_data(train)
    run.log(f"{args.dataset}: {len(train)} images to train on, {len(test)} to test on")
    if not run.checkpoint:
        published = published_setting(vars(args))
        flags.fit_to_data(args, len(train), published, distributed.world_size(), run.log)
    if device.type == "cpu" and args.init_channels >= RETRAINING["init_channels"]:
        run.log("without a CUDA device, the published recipe takes weeks; reduce "
                "--init_channels, --layers and --epochs")
    return train, test


def use_data_of(saved, args):
    """Use the data set of a saved network and its published setting, except for typed flags.

    `saved` has the flags of the run that trained the network; it is empty if they are unknown.
    """
    of_data = {name: saved[name] for name in ("dataset", "data", "image_size") if name in saved}
    typed = {name: getattr(args, name) for name in args.typed}
    published = published_setting({**of_data, **typed})
    vars(args).update({**published, **of_data, **typed})
    check(args)
    flags.check_cutout(args)


def network_config(args, source):
    """Return the configuration of the network, from the flags or from a file of weights.

    `source` is a dict of `checkpoints.read_weights`, a checkpoint, or None. The flags get the
    values of the file; a typed flag that contradicts it is an error. `num_classes` is missing if
    it depends on the data.
    """
    path = args.resume or args.weights
    config = dict(source["config"]) if source else {}
    if "genotype" in config:
        try:
            genotypes.from_lists(config["genotype"])
        except ValueError as error:  # for example an operation that is no longer in PRIMITIVES
            raise utils.UserError(f"{path}: {error}") from None
    elif not args.arch:
        raise utils.UserError(f"{path} does not contain the genotype of its weights: give --arch")
    if args.arch and not args.resume:
        genotype, one_stage = read_arch(args.arch)
        lists = genotypes.as_lists(genotype)
        if config.setdefault("genotype", lists) != lists:
            raise utils.UserError(
                f"--arch {args.arch} is not the genotype in {path}: leave it out"
            )
        config.setdefault("one_stage", one_stage)
    for flag, key in (("init_channels", "C"), ("layers", "layers")):
        value = getattr(args, flag)
        if flag in args.typed and config.get(key, value) != value:
            raise utils.UserError(
                f"--{flag} {value} contradicts {path}, which has {config[key]}"
            )
        setattr(args, flag, config.setdefault(key, value))
    for flag in ("auxiliary", "one_stage"):
        if flag in args.typed:
            config[flag] = getattr(args, flag)
    args.auxiliary = config.setdefault("auxiliary", args.auxiliary)
    is_imagenet = args.dataset == "imagenet"
    if config.setdefault("imagenet", is_imagenet) != is_imagenet:
        raise utils.UserError(
            f"{path} is a network for {'imagenet' if config['imagenet'] else 'CIFAR'}, which has "
            f"another stem than those for {args.dataset}: give the --dataset and --data of the "
            "network"
        )
    return config


def read_arch(arch):
    """Load the genotype of --arch."""
    try:
        return genotypes.load(arch)
    except ValueError as error:
        raise utils.UserError(f"--arch: {error}") from None
    except OSError as error:
        raise utils.UserError(f"--arch {arch} cannot be read: {error.strerror}") from None


def cost(net, image_size):
    """Numbers of parameters and of multiply-adds per image, without the auxiliary head.

    Multiply-adds are those of convolutions and linear layers, counted on the meta device.
    """
    parameters = sum(p.numel() for name, p in net.named_parameters() if "auxiliary" not in name)
    with torch.device("meta"):
        twin = model.from_config(net.config).eval()
        image = torch.empty(1, 3, image_size, image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(image)
    return parameters, counter.get_total_flops() // 2  # a multiply-add is two operations


def columns(top5):
    """Columns of the log: heading, and format string for the row of an epoch."""
    return {
        "lr": "{learning_rate:.4f}", "train loss": "{train_loss:.3f}",
        "train %": "{train_accuracy:.2f}", "test loss": "{test_loss:.3f}",
        "test %": "{test_accuracy:.2f}",
        **({"top-5 %": "{test_top5_accuracy:.2f}"} if top5 else {"best %": "{best_accuracy:.2f}"}),
    }


def describe_network(run, images, row):
    """What a network file says about its network: training images, epoch and test results."""
    measured = {name: value for name, value in row.items() if name.startswith("test_")}
    return dict(run.describe(images), epoch=row["epoch"], **measured)


def format_accuracy(row):
    """Accuracy and error on the test set, and the top-5 accuracy if it was measured."""
    accuracy = row["test_accuracy"]
    text = f"test accuracy {accuracy:.2f} %, error {100 - accuracy:.2f} %"
    if "test_top5_accuracy" in row:
        text += f", top-5 accuracy {row['test_top5_accuracy']:.2f} %"
    return text


def describe_test_set(test, args):
    """The number of test images, and the number of classes without any."""
    text = f"{len(test)} images of {args.dataset}"
    empty = test.counts().count(0)
    if empty:
        text += f" ({empty} of the {len(test.classes)} classes have none)"
    return text


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


def published_setting(typed):
    """The published setting that the typed flags select."""
    return IMAGENET if typed.get("dataset") == "imagenet" else RETRAINING


def get_args_parser():
    parser = flags.Parser("train.py", __doc__, published_setting, check)
    flags.add_common_flags(parser, [*data.DATASETS, "imagenet"])
    group = parser.add_argument_group("what to train or evaluate")
    group.add_argument(
        "--arch", metavar="GENOTYPE",
        help="a published name, random:SEED, random:SEED:distinct, a genotype.json, a text "
        "'Genotype(...)' or a file that holds one")
    parser.add_switch(group, "one_stage",
                  "put a BatchNorm after pools and skips, whatever the genotype says")
    group.add_argument(
        "--weights", type=flags.nonempty, metavar="FILE",
        help="start from the weights in a network.pt, a checkpoint.pt or a plain state dict "
        "(a plain state dict also needs --arch)")
    group.add_argument(
        "--evaluate", action="store_true",
        help="evaluate the network of --weights or --resume on the test set, and do not train")
    parser.show_defaults({"cifar": RETRAINING, "imagenet": IMAGENET})
    return parser


def check(args):
    """Raise UserError if flags cannot be right."""
    flags.check_common_flags(args)
    if args.arch is not None:
        read_arch(args.arch)
    if args.weights is not None:
        flags.check_file("--weights", args.weights)
    if args.resume and (args.weights or args.arch):
        raise utils.UserError("--resume has its own network: leave out --weights and --arch")
    if args.evaluate and not (args.weights or args.resume):
        raise utils.UserError(
            "--evaluate needs a network: give --weights FILE or --resume RUN"
        )
    if args.evaluate and args.save:
        raise utils.UserError("--evaluate creates no folder: leave out --save")
    if not (args.arch or args.weights or args.resume):
        raise utils.UserError(
            "--arch is missing: give a genotype.json that search.py wrote, or one of "
            f"{', '.join(genotypes.NAMED)}"
        )
    if args.dataset == "imagenet" and not args.resume:
        flags.check_imagenet(args, linear=True)


if __name__ == "__main__":
    with runs.command("train.py"):
        main(get_args_parser().parse_args())
