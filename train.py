"""Train the network of a genotype from scratch, or evaluate one that is trained.

    python train.py --arch runs/NAME/genotype.json            # published recipe, CIFAR-10
    python train.py --arch ISTA_twostage                      # a published cell
    python train.py --arch "Genotype(normal=[...], ...)"      # one copied from a log
    python train.py --arch random:3                           # a random cell, for comparison
    python train.py --resume runs/train-20201206-101500       # go on after an interruption
    python train.py --evaluate --weights runs/NAME/network.pt # measure a trained network
    python train.py --dataset imagenet --data DIR --arch ISTA_ImageNet

The recipe is that of DARTS: SGD with a cosine learning rate, cutout, an auxiliary head, and a
drop-path probability that rises with the epochs; for ImageNet, a linear learning rate and label
smoothing. The network after the last epoch is in network.pt, the best of all epochs in
network-best.pt. Nothing is selected by the test accuracy but that name.
"""

import os
import shlex

# Must be set before torch is imported. OpenMP threads that wait for each other then sleep after 5,000
# spins instead of 300,000, because on a busy machine spinning threads keep others from the cores.
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
    run = runs.Run("train", args)  # nothing is written before `run.begin`
    args, checkpoint = run.args, run.checkpoint
    source = checkpoint or source
    config = network_config(args, source)
    device = utils.choose_device(args.device, args.amp)
    generator = utils.seed_everything(args.seed, device)
    memory_format = utils.memory_format(device, args.amp)

    train, test = load_images(run, device, config, source)
    options = dict(distributed.place(), generator=generator, memory_format=memory_format)
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
        run.log(f"{told(measured)}, loss {measured[0]:.4f}, on {told_images(test, args)}")
        run.say()
        return

    cutout_length = args.cutout_length if args.cutout else 0
    batches = train.batches(args.batch_size, train=True, cutout_length=cutout_length, **options)
    optimizer = utils.SGD(
        net.parameters(), args.learning_rate, args.momentum, args.weight_decay
    )
    checkpoints.record_built_numbers(optimizer)
    graphs_enabled = use_graphs(args.cuda_graphs, device)
    epoch, best = 0, -1.0
    if checkpoint:
        epoch, best = checkpoint["epoch"], checkpoint["best"]
        checkpoints.load_optimizer(optimizer, checkpoint["optimizer"], run.log)
        checkpoints.set_random_state(checkpoint["random"], generator, args.seed, epoch, run.log)
    genotype = genotypes.from_lists(config["genotype"])
    run.log(f"genotype = {genotype}", whole=True)
    run.begin(device, columns(top5))
    run.save_genotype(genotype, config["one_stage"], arch=args.arch)
    parallel = distributed.data_parallel(net, [*net.parameters()], static=True)

    while epoch < args.epochs:
        factor, net.drop_path_prob = schedule(args, epoch)
        utils.set_learning_rate(optimizer, factor)
        epoch += 1
        with run.epoch(
            epoch, f"{epoch}/{args.epochs}", batches, (args.epochs - epoch, False),
            learning_rate=factor * optimizer.param_groups[0]["initial_lr"],
            drop_path_prob=net.drop_path_prob,
            parameters=parameters, multiply_adds=multiply_adds,
        ) as row:
            row |= train_epoch(parallel, batches, optimizer, run, graphs_enabled)
            row |= utils.named(utils.evaluate(net, test_batches, args.amp, top5), "test")
            is_best, best = row["test_accuracy"] > best, max(best, row["test_accuracy"])
            row["best_accuracy"] = best
        about = dict(run.describe(train), epoch=epoch, test_accuracy=row["test_accuracy"])
        if is_best:
            run.save_network("network-best.pt", net, **about)
        run.save_checkpoint(
            epoch=epoch, best=best, row=row, config=net.config, weights=net.state_dict(),
            optimizer=optimizer.state_dict(), random=checkpoints.random_state(generator),
            about=about,
        )

    measured = utils.evaluate(net, test_batches, args.amp, top5)
    about = dict(run.describe(train), epoch=epoch, **utils.named(measured, "test"))
    run.save_network("network.pt", net, **about)
    run.draw(visualize.draw_run)
    run.log(f"{told(measured)} after the last epoch (network.pt); test accuracy {best:.2f} % in "
            "the best one (network-best.pt)")
    run.log("to measure the network again:")
    weights = shlex.quote(run.file("network.pt"))
    run.log(f"    python train.py --evaluate --weights {weights}{' --amp' * args.amp}", whole=True)


def train_step(net, x, y, optimizer, args):
    """One step of SGD."""
    with speedups.autocast(net, x.device, args.amp):
        logits, logits_aux = net(x)
    loss, total = utils.criterion(logits, logits_aux, y, args)
    optimizer.zero_grad()
    total.backward()
    clip_grad_norm_(utils.parameters_of(optimizer), args.grad_clip)
    optimizer.step()
    return loss.detach(), logits.detach()


def train_epoch(net, batches, optimizer, run, graphs_enabled=False):
    """A step on each batch; returns loss and accuracy. `net` averages gradients over the ranks."""
    plain = distributed.unwrapped(net)
    meter = utils.Meter(next(plain.parameters()).device)
    graphs = StepGraphs(plain, graphs_enabled, run.warn)
    net.train()
    for x, y in batches:
        loss, logits = graphs.run(train_step, net, x, y, optimizer, run.args)
        meter.add(loss, logits, y)
        run.progress.step(meter)
    distributed.average_statistics(plain)
    return utils.named(meter.read(), "train")


def schedule(args, epoch):
    """Share of the initial learning rate, and drop-path probability, of an epoch from 0."""
    if args.dataset == "imagenet":
        share = utils.warm_up_linear(epoch, args.epochs)
    else:
        share = utils.cosine(epoch, args.epochs, args.learning_rate_min / args.learning_rate)
    return share, args.drop_path_prob * epoch / args.epochs


# ------------------------------------------------------------------------------------------------
# What is trained, and what is said of it
# ------------------------------------------------------------------------------------------------


def load_images(run, device, config, source):
    """Training images (None for an evaluation) and test images, for a network of a configuration.

    A network is evaluated with the class names, mean and standard deviation of its training.
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
        return None, test.as_seen_by(about["classes"], about["mean"], about["std"])
    if args.evaluate:
        run.log("the file does not say by which mean and standard deviation images are to be "
                "normalised, nor the order of its classes: those of this data set are taken")
    if config.setdefault("num_classes", len(test.classes)) != len(test.classes):
        raise utils.UserError(
            f"the network tells {config['num_classes']} classes apart, but {args.dataset} has "
            f"{len(test.classes)}: give its --dataset and --data"
        )
    if args.evaluate:
        return None, test
    run.check_data(train)
    run.log(f"{args.dataset}: {len(train)} images to train on, {len(test)} to test on")
    if not run.checkpoint:
        published = published_setting(vars(args))
        flags.fit_to_data(args, len(train), published, distributed.world_size(), run.log)
    if device.type == "cpu" and args.init_channels >= RETRAINING["init_channels"]:
        run.log("there is no CUDA device: the published recipe takes weeks on a small CPU; "
                "fewer --init_channels, --layers and --epochs help")
    return train, test


def use_data_of(saved, args):
    """Take the data that a network was trained on, and the recipe for them, for what is not typed.

    `saved` are the arguments of the run that the network is from, or none.
    """
    known = {name: saved[name] for name in ("dataset", "data", "image_size") if name in saved}
    typed = {name: getattr(args, name) for name in args.typed}
    vars(args).update({**published_setting({**known, **typed}), **known, **typed})
    check(args)


def network_config(args, source):
    """The configuration of the network that the arguments, or a file of weights, describe.

    `source` is what `checkpoints.read_weights` found, or the checkpoint of a resumed run. The
    arguments get the network's init_channels, layers and auxiliary; a typed one that contradicts it
    is a UserError. `num_classes` is missing where the data has to tell.
    """
    config, path = dict(source["config"]) if source else {}, args.resume or args.weights
    try:
        genotypes.from_lists(config.get("genotype", genotypes.as_lists(genotypes.draw(0))))
    except ValueError as error:  # an operation that is not among PRIMITIVES now, say
        raise utils.UserError(f"{path}: {error}") from None
    if args.arch and not args.resume:  # a resumed run has its genotype in the checkpoint
        genotype, one_stage = read_arch(args.arch)
        named = dict(genotype=genotypes.as_lists(genotype), one_stage=one_stage)
        if config.setdefault("genotype", named["genotype"]) != named["genotype"]:
            raise utils.UserError(
                f"--arch {args.arch} is not the genotype in {path}: leave it out"
            )
        config = {**named, **config}
    elif "genotype" not in config:
        raise utils.UserError(
            f"{path} does not say what genotype its weights are for: give --arch"
        )
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
    is_for_imagenet = args.dataset == "imagenet"
    if config.setdefault("imagenet", is_for_imagenet) != is_for_imagenet:
        raise utils.UserError(
            f"{path} is a network for {'imagenet' if config['imagenet'] else 'CIFAR'}, "
            f"with another stem than those for {args.dataset}: give its --dataset and --data"
        )
    return config


def read_arch(arch):
    """`genotypes.load`, with UserError for what is wrong."""
    try:
        return genotypes.load(arch)
    except (ValueError, OSError) as error:
        raise utils.UserError(f"--arch: {error}") from None


def cost(net, image_size):
    """Parameters, and multiply-adds of an image; both without the auxiliary head.

    Multiply-adds are those of convolutions and linear layers, counted on the meta device, where
    nothing is computed.
    """
    parameters = sum(p.numel() for name, p in net.named_parameters() if "auxiliary" not in name)
    with torch.device("meta"):
        twin, image = model.from_config(net.config).eval(), torch.empty(1, 3, *2 * [image_size])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(image)
    return parameters, counter.get_total_flops() // 2  # a multiply-add is two operations


def columns(top5):
    """Columns of the log's table: the head of each, and its text for the row of an epoch."""
    return {
        "lr": "{learning_rate:.4f}", "train loss": "{train_loss:.3f}",
        "train %": "{train_accuracy:.2f}", "test loss": "{test_loss:.3f}",
        "test %": "{test_accuracy:.2f}",
        **({"top-5 %": "{test_top5_accuracy:.2f}"} if top5 else {"best %": "{best_accuracy:.2f}"}),
    }


def told(measured):
    """Loss, accuracy and maybe top-5 accuracy, in words."""
    _, accuracy, *top5 = measured
    text = f"test accuracy {accuracy:.2f} %, error {100 - accuracy:.2f} %"
    return text + "".join(f", top-5 accuracy {value:.2f} %" for value in top5)


def told_images(test, args):
    """How many images of what an evaluation was on, in words."""
    absent = test.counts().count(0)
    without = f" ({absent} of the {len(test.classes)} classes have none)" if absent else ""
    return f"{len(test)} images of {args.dataset}{without}"


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


def published_setting(typed):
    """The published setting of the data set that the typed flags name."""
    return IMAGENET if typed.get("dataset") == "imagenet" else RETRAINING


def get_args_parser():
    parser = flags.Parser("train.py", __doc__, published_setting, check)
    flags.add_shared(parser, [*data.DATASETS, "imagenet"])
    group = parser.add_argument_group("what to train or evaluate")
    group.add_argument(
        "--arch", metavar="GENOTYPE",
        help="a published name, random:SEED, random:SEED:distinct, a genotype.json, a text "
        "'Genotype(...)' or a file that holds one")
    parser.switch(group, "one_stage",
                  "put a BatchNorm after pools and skips, whatever the genotype says")
    group.add_argument(
        "--weights", type=flags.name, metavar="FILE",
        help="start from the weights in a network.pt, a checkpoint.pt or a plain state dict "
        "(the latter needs --arch)")
    group.add_argument(
        "--evaluate", action="store_true",
        help="measure the network of --weights or --resume on the test set, and do nothing else")
    parser.show_defaults({"cifar": RETRAINING, "imagenet": IMAGENET})
    return parser


def check(args):
    """Raise UserError on flags that cannot be right."""
    flags.check_shared(args)
    if args.arch is not None:
        read_arch(args.arch)
    if args.weights is not None:
        flags.check_file("--weights", args.weights)
    if args.resume and (args.weights or args.arch):
        raise utils.UserError("--resume brings its own network: leave out --weights and --arch")
    if args.evaluate and not (args.weights or args.resume):
        raise utils.UserError(
            "--evaluate needs the network to measure: --weights FILE or --resume RUN"
        )
    if args.evaluate and args.save:
        raise utils.UserError("--evaluate makes no folder: leave out --save")
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
