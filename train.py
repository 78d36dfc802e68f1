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

import arguments
import genotypes

CIFAR = dict(
    init_channels=36, layers=20, image_size=32, batch_size=96, epochs=600, seed=0,
    learning_rate=0.025, learning_rate_min=0.0, weight_decay=3e-4, label_smoothing=0.0,
    auxiliary=True, cutout=True, drop_path_prob=0.2,
)  # fmt: skip
IMAGENET = dict(
    init_channels=48, layers=14, image_size=224, batch_size=1024, epochs=250, seed=0,
    learning_rate=0.5, learning_rate_min=0.0, weight_decay=3e-5, label_smoothing=0.1,
    auxiliary=True, cutout=False, drop_path_prob=0.0,
)  # fmt: skip


def get_args_parser():
    parser = arguments.Parser(prog="train.py", description=__doc__)
    arguments.add_shared(parser, [*arguments.DATASETS, "imagenet"])
    group = parser.add_argument_group("what to train or evaluate")
    group.add_argument(
        "--arch", metavar="GENOTYPE",
        help="a published name, random:SEED, a genotype.json, or a text 'Genotype(...)'",
    )  # fmt: skip
    arguments.switch(group, "one_stage", "BatchNorm after pools and skips")
    group.add_argument(
        "--weights", metavar="FILE",
        help="start from the weights in a network.pt, a checkpoint.pt or a plain state dict "
        "(the latter needs --arch)",
    )  # fmt: skip
    group.add_argument(
        "--label_smoothing", type=arguments.real(0, 1), metavar="P",
        help="part of each label that is spread over all classes",
    )  # fmt: skip
    group.add_argument(
        "--evaluate", action="store_true",
        help="measure the network of --weights or --resume on the test set, and do nothing else",
    )  # fmt: skip
    parser.show_defaults(cifar=CIFAR, imagenet=IMAGENET)
    return parser


def published(typed):
    """The published setting of the data set that the typed flags name."""
    return IMAGENET if typed.get("dataset") == "imagenet" else CIFAR


def check(args):
    """Raise ValueError on flags that cannot be right, before anything is loaded."""
    arguments.check_shared(args)
    if args.arch is not None:
        genotypes.load(args.arch)
    if args.weights is not None:
        arguments.check_file("--weights", args.weights)
    if args.resume and (args.weights or args.arch):
        raise ValueError("--resume brings its own network: leave out --weights and --arch")
    if args.evaluate and not (args.weights or args.resume):
        raise ValueError("--evaluate needs the network to measure: --weights FILE or --resume RUN")
    if not (args.arch or args.weights or args.resume):
        raise ValueError(
            "--arch is missing: give a genotype.json that search.py wrote, or one of "
            f"{', '.join(genotypes.NAMED)}"
        )
    if args.dataset == "imagenet" and not args.resume:
        check_imagenet(args)


def check_imagenet(args):
    if not os.path.isdir(args.data):
        raise ValueError(
            f"--data {args.data} is not a folder: --dataset imagenet reads DIR/train/<class>/* and "
            "DIR/val/<class>/*"
        )
    if args.image_size % 32:
        raise ValueError(
            f"--image_size must be a multiple of 32 for imagenet, not {args.image_size}: the "
            "network halves it five times"
        )
    if args.init_channels % 2:
        raise ValueError(f"--init_channels must be even for imagenet, not {args.init_channels}")
    if args.cutout:
        raise ValueError("--cutout: the images of imagenet are cropped, not cut; leave it out")
    if "learning_rate_min" in args.typed:
        raise ValueError(
            "--learning_rate_min: the learning rate of imagenet falls in a line to 0; leave it out"
        )


if __name__ == "__main__":  # before torch is imported, so that a typing error is answered at once
    parser = get_args_parser()
    args = parser.parse_args(published=published, check=check)

import functools  # noqa: E402
import shlex  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
from torch.nn.utils import clip_grad_norm_  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
import distributed  # noqa: E402
import imagenet  # noqa: E402
import model  # noqa: E402
import runs  # noqa: E402
import utils  # noqa: E402


def main(args):
    # --------------------------------------------------------------------------------------------
    # Network and data
    # --------------------------------------------------------------------------------------------
    checkpoint = source = None
    if args.resume:
        checkpoint, args = distributed.first_before_others(lambda: runs.resume(args, "train"))
        source = checkpoint
    elif args.weights:
        source = read_weights(args.weights)
        use_data_of(source["args"], args)
    config = network_config(args, source)
    device = utils.choose_device(args.device, args.amp)
    memory_format = utils.memory_format(device, args.amp)
    utils.seed_everything(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)

    notes = []
    layout = dict(part=distributed.part(), channels_last=memory_format is torch.channels_last)
    if args.dataset == "imagenet":
        train, test = distributed.first_before_others(lambda: imagenet.load(args.data))
        options = dict(image_size=args.image_size, device=device, workers=args.workers)
        batches = functools.partial(imagenet.Batches, **layout, **options)
    else:
        train, test = distributed.first_before_others(lambda: data.load(
            args.dataset, args.data, args.image_size, device, args.workers, log=notes.append
        ))  # fmt: skip
        options = dict(cutout_length=args.cutout_length if args.cutout else 0)
        batches = functools.partial(data.Batches, **layout, **options)
    top5 = args.dataset == "imagenet" and len(test.classes) > 5
    if not args.evaluate and not checkpoint:
        notes += utils.fit_to_data(args, len(train))
    if config.setdefault("num_classes", len(test.classes)) != len(test.classes):
        raise utils.UserError(
            f"the network tells {config['num_classes']} classes apart, but {args.dataset} has "
            f"{len(test.classes)}: give its --dataset and --data"
        )
    net = model.from_config(config)
    if source:
        load_weights(net, source["model"], args.weights or args.resume)
    net = net.to(device, memory_format=memory_format)
    utils.seed_drop_path(args.seed)
    test_batches = batches(test, args.batch_size, train=False)
    parameters, multiply_adds = cost(net, args.image_size)
    notes.append(
        f"network: {parameters / 1e6:.4f} M parameters, {multiply_adds / 1e6:.1f} M multiply-adds "
        f"an image, both without the auxiliary head; device: {device}"
    )

    if args.evaluate:
        loss, *accuracies = utils.evaluate(net, test_batches, args.amp, top5)
        notes.append(f"test accuracy {accuracies[0]:.2f} %, error {100 - accuracies[0]:.2f} %, "
                     + (f"top-5 accuracy {accuracies[1]:.2f} %, " if top5 else "")
                     + f"loss {loss:.4f}, on {len(test)} images of {args.dataset}")  # fmt: skip
        if distributed.rank() == 0:
            print("\n".join(notes))
        return

    # --------------------------------------------------------------------------------------------
    # A new run, or an old one from where it stopped
    # --------------------------------------------------------------------------------------------
    train_batches = batches(train, args.batch_size, train=True, generator=generator)
    optimizer = torch.optim.SGD(
        net.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay,
        foreach=True,
    )  # fmt: skip
    if checkpoint:
        epoch, best = checkpoint["epoch"], checkpoint["best"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        notes += utils.set_random_state(checkpoint["random"], generator, args.seed, epoch)
        run = runs.Run.resume(args, checkpoint)
    else:
        epoch, best = 0, 0.0
        run = runs.Run.create(args, "train")
        run.log(f"new run in {run.path}")
        run.save_genotype(
            genotypes.from_lists(config["genotype"]), config["one_stage"], arch=args.arch,
            arguments=runs.plain(args),
        )  # fmt: skip
    if device.type == "cpu":
        notes.append("there is no CUDA device: the published recipe takes weeks on a small CPU; "
                     "fewer --init_channels, --layers and --epochs help")  # fmt: skip
    for note in [*notes, f"genotype = {genotypes.from_lists(config['genotype'])}"]:
        run.log(note)
    averaged = distributed.averaged(net)
    columns = ["epoch", "lr", "train loss", "train acc", "test loss", "test acc",
               *["test top-5"] * top5, "best acc", "memory", "time", "left"]  # fmt: skip
    run.log(utils.table_row(columns))

    # --------------------------------------------------------------------------------------------
    # The epochs
    # --------------------------------------------------------------------------------------------
    while epoch < args.epochs:
        began = time.time()
        learning_rate = scheduled(epoch, args)
        utils.set_learning_rate(optimizer, learning_rate)
        net.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        epoch += 1
        row = dict(epoch=epoch, learning_rate=learning_rate, drop_path_prob=net.drop_path_prob)
        name = f"{epoch}/{args.epochs}"

        with utils.Epoch(
            run, name, train_batches, learning_rate, args.report_freq, args.epochs - epoch
        ) as progress:
            net.train()
            meter = train_epoch(averaged, train_batches, optimizer, args, progress)
            distributed.average_statistics(net)
            row["train_loss"], row["train_accuracy"] = meter.read()
            loss, *accuracies = utils.evaluate(net, test_batches, args.amp, top5)
            is_best = accuracies[0] > best
            best = max(best, accuracies[0])
            row.update(test_loss=loss, **named(accuracies), best_accuracy=best)

            row.update(parameters=parameters, multiply_adds=multiply_adds)
            row["seconds"] = time.time() - began
            row["peak_memory_gib"] = utils.peak_memory(device)
            run.log(utils.table_row(columns, [
                name, f"{learning_rate:.4f}",
                f"{row['train_loss']:.3f}", f"{row['train_accuracy']:.2f} %",
                f"{loss:.3f}", *(f"{value:.2f} %" for value in [*accuracies, best]),
                f"{row['peak_memory_gib']:.2f} GiB", utils.duration(row["seconds"]),
                utils.duration(row["seconds"] * (args.epochs - epoch)),
            ]))  # fmt: skip
            run.append("metrics.jsonl", row)
            run.show(row)
            if is_best:
                run.save_network("network-best.pt", net, args, row)
            run.save_checkpoint({
                "kind": "train", "version": arguments.__version__, "args": runs.plain(args),
                "epoch": epoch, "best": best, "row": row,
                "network": net.config, "model": net.state_dict(),
                "optimizer": optimizer.state_dict(), "random": utils.random_state(generator),
            })  # fmt: skip

    # --------------------------------------------------------------------------------------------
    # What came out, and what to do with it
    # --------------------------------------------------------------------------------------------
    _, *accuracies = utils.evaluate(net, test_batches, args.amp, top5)
    run.save_network("network.pt", net, args, dict(epoch=epoch, **named(accuracies)))
    run.draw()
    run.log(f"test accuracy {accuracies[0]:.2f} % after the last epoch (network.pt), "
            f"{best:.2f} % in the best one (network-best.pt)")  # fmt: skip
    if top5:
        run.log(f"top-5 accuracy {accuracies[1]:.2f} % after the last epoch")
    run.log(f"genotype = {genotypes.from_lists(config['genotype'])}")
    run.log("to measure the network again:")
    run.log(f"    python train.py --evaluate --weights {shlex.quote(run.file('network.pt'))}")


def named(accuracies):
    """What `utils.evaluate` has measured besides the loss, under its names in metrics.jsonl."""
    return dict(zip(("test_accuracy", "test_top5_accuracy"), accuracies, strict=False))


def scheduled(epoch, args):
    """Learning rate of an epoch, counted from 0."""
    if args.dataset == "imagenet":
        return utils.warm_up_linear(epoch, args.epochs, args.learning_rate)
    return utils.cosine(epoch, args.epochs, args.learning_rate, args.learning_rate_min)


def train_epoch(net, batches, optimizer, args, progress):
    """One epoch of SGD on the loss of the network and, with its weight, of the auxiliary head.

    Returns
    -------
    utils.Meter
    """
    parameters = list(net.parameters())
    device = parameters[0].device
    meter = utils.Meter(device)
    for x, y in batches:
        with utils.autocast(device, args.amp):
            logits, logits_aux = net(x)
        loss, total = utils.losses(
            logits, logits_aux, y, args.auxiliary_weight, args.label_smoothing
        )
        optimizer.zero_grad()
        total.backward()
        clip_grad_norm_(parameters, args.grad_clip)
        optimizer.step()
        meter.add(loss, logits, y)
        progress.step(meter)
    return meter


def cost(net, image_size):
    """Parameters, and multiply-adds of an image; both without the auxiliary head.

    Multiply-adds are those of convolutions and linear layers. They are counted on the meta device,
    where nothing is computed: the counter does not know all that 1×1 convolutions call on a CPU.
    """
    parameters = sum(p.numel() for name, p in net.named_parameters() if "auxiliary" not in name)
    with torch.device("meta"):
        twin, image = model.from_config(net.config).eval(), torch.empty(1, 3, *2 * [image_size])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(image)
    return parameters, counter.get_total_flops() // 2  # a multiply-add is two operations


def use_data_of(saved, args):
    """Unless told otherwise, the data that a network was trained on, and the recipe for them.

    Parameters
    ----------
    saved : dict
        Arguments of the run that the network is from, or none.
    args : argparse.Namespace
        To be changed.
    """
    known = {name: saved[name] for name in ("dataset", "data", "image_size") if name in saved}
    typed = {name: getattr(args, name) for name in args.typed}
    vars(args).update({**published({**known, **typed}), **known, **typed})
    try:
        check(args)
    except ValueError as error:
        raise utils.UserError(error) from None


def network_config(args, source):
    """Describe the network of the arguments, or that of a file of weights.

    Parameters
    ----------
    args : argparse.Namespace
        Its init_channels, layers and auxiliary are set to those of the network.
    source : dict or None
        What `runs.resume` or `read_weights` found.

    Returns
    -------
    dict
        For `model.from_config`; `num_classes` is missing where the data has to tell.

    Raises
    ------
    utils.UserError
        If a typed flag contradicts the file.
    """
    config = dict(source["network"]) if source else {}
    if args.arch and not args.resume:  # a resumed run has its genotype in the checkpoint
        genotype, one_stage = genotypes.load(args.arch)
        named = dict(genotype=genotypes.as_lists(genotype), one_stage=one_stage)
        if config.setdefault("genotype", named["genotype"]) != named["genotype"]:
            raise utils.UserError(
                f"--arch {args.arch} is not the genotype in {args.weights}: leave it out"
            )
        config = {**named, **config}
    elif "genotype" not in config:
        raise utils.UserError(
            f"{args.weights} does not say what genotype its weights are for: give --arch"
        )
    for flag, key in (("init_channels", "C"), ("layers", "layers")):
        value = getattr(args, flag)
        if flag in args.typed and config.get(key, value) != value:
            raise utils.UserError(
                f"--{flag} {value} contradicts {args.weights}, which has {config[key]}"
            )
        setattr(args, flag, config.setdefault(key, value))
    for flag in ("auxiliary", "one_stage"):
        if flag in args.typed:
            config[flag] = getattr(args, flag)
    args.auxiliary = config.setdefault("auxiliary", args.auxiliary)
    is_for_imagenet = args.dataset == "imagenet"
    if config.setdefault("imagenet", is_for_imagenet) != is_for_imagenet:
        raise utils.UserError(
            f"{args.weights} is a network for {'imagenet' if config['imagenet'] else 'CIFAR'}, "
            f"with another stem than those for {args.dataset}: give its --dataset and --data"
        )
    return config


# ------------------------------------------------------------------------------------------------
# Weights from files
# ------------------------------------------------------------------------------------------------


def read_weights(path):
    """Read network weights from a network.pt, a checkpoint.pt or a plain state dict.

    Returns
    -------
    dict
        `model`: the state dict; `network`: what `model.from_config` needs, without genotype where
        the file does not know it; `args`: arguments of the run, or none.

    Raises
    ------
    utils.UserError
        If the file is damaged or holds something else.
    """
    state = runs.load_checkpoint(path)
    if not isinstance(state, dict):
        raise utils.UserError(f"{path} holds no network weights")
    if state.get("kind") == "search":
        raise utils.UserError(
            f"{path} is the checkpoint of a search, whose supernet is not for evaluation: give "
            "the network.pt of a finished one-stage search, or train its genotype.json"
        )
    if "network" in state and "model" in state:
        return state
    weights = {
        name.removeprefix("module."): value  # the name DataParallel gives it
        for name, value in state.get("state_dict", state).items()
    }
    try:
        network = model.shape_of(weights)
        about = {"dataset": "imagenet"} if network["imagenet"] else {}
        return {"model": weights, "network": network, "args": about}
    except (KeyError, AttributeError, IndexError, ValueError):
        raise utils.UserError(f"{path} holds no weights of a DARTS network") from None


def load_weights(net, weights, path):
    """Load a state dict into a network; an auxiliary head that only one of them has is left out.

    Raises
    ------
    utils.UserError
        If the weights are those of another network.
    """
    if not net.auxiliary:
        weights = {k: v for k, v in weights.items() if not k.startswith("auxiliary_head.")}
    try:
        missing, unexpected = net.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes that differ
        missing, unexpected = [], [" ".join(str(error).splitlines()[1:2]).strip()]
    missing = [k for k in missing if not k.startswith("auxiliary_head.")]
    if missing or unexpected:
        what = f"it has no {missing[0]}" if missing else f"it has {unexpected[0]}"
        raise utils.UserError(
            f"{path} does not fit the network: {what}; give the --arch that it was trained with, "
            "and --one_stage or --no-one_stage"
        )


if __name__ == "__main__":
    with utils.command("train.py"):
        main(args)
