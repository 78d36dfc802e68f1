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

import shlex

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

import arguments
import checkpoints
import data
import distributed
import fast
import genotypes
import graphs
import imagenet
import model
import runs
import utils
import visualize


def get_args_parser():
    return arguments.get_train_parser(__doc__)


def main(args):
    source = checkpoints.read_weights(args.weights) if args.weights else None
    if source:
        use_data_of(source["args"], args)
    run = runs.Run("train", args)
    args, checkpoint = run.args, run.checkpoint
    source = checkpoint or source
    config = network_config(args, source)
    device = utils.choose_device(args.device, args.amp, args.cuda_graphs)
    generator = utils.seed_everything(args.seed, device)
    memory_format = utils.memory_format(device, args.amp)

    train, test = load_images(run, device, config)
    top5 = args.dataset == "imagenet" and len(test.classes) > 5
    options = dict(
        batch_size=args.batch_size, generator=generator, memory_format=memory_format,
        rank=distributed.rank(), world_size=distributed.world_size(),
    )
    test_batches = test.batches(train=False, **options)

    net = model.from_config(config)
    if source:
        path = args.weights or arguments.checkpoint_path(args.resume)
        checkpoints.load_weights(net, source["weights"], path)
    net = fast.accelerate(net.to(device, memory_format=memory_format))
    utils.seed_drop_path(args.seed)
    parameters, multiply_adds = cost(net, args.image_size)
    run.log(
        f"network: {parameters / 1e6:.4f} M parameters, {multiply_adds / 1e6:.1f} M multiply-adds "
        f"an image, both without the auxiliary head; device: {device}"
    )
    if args.evaluate:
        measured = utils.evaluate(net, test_batches, args.amp, top5)
        run.log(f"{told(measured)}, loss {measured[0]:.4f}, on {len(test)} images of "
                f"{args.dataset}")
        run.say()
        return

    cutout_length = args.cutout_length if args.cutout else 0
    batches = train.batches(train=True, cutout_length=cutout_length, **options)
    optimizer = torch.optim.SGD(
        net.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay,
        foreach=True,
    )
    epoch, best = 0, 0.0
    if checkpoint:
        epoch, best = checkpoint["epoch"], checkpoint["best"]
        with run.restoring():
            checkpoints.load_optimizer(optimizer, checkpoint["optimizer"])
            utils.set_random_state(checkpoint["random"], generator, args.seed, epoch, run.log)
    genotype = genotypes.from_lists(config["genotype"])
    run.log(f"genotype = {genotype}")
    run.begin(device, columns(top5))
    run.save_genotype(genotype, config["one_stage"], arch=args.arch)
    parallel = distributed.data_parallel(net, [*net.parameters()], static=True)

    while epoch < args.epochs:
        learning_rate = scheduled(epoch, args)
        utils.set_learning_rate(optimizer, learning_rate)
        net.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        epoch += 1
        with run.epoch(
            epoch, f"{epoch}/{args.epochs}", batches, (args.epochs - epoch, False),
            learning_rate=learning_rate, drop_path_prob=net.drop_path_prob,
            parameters=parameters, multiply_adds=multiply_adds,
        ) as row:
            row |= train_epoch(net, parallel, batches, optimizer, args, run.progress)
            row |= utils.named(utils.evaluate(net, test_batches, args.amp, top5), "test")
            is_best, best = row["test_accuracy"] > best, max(best, row["test_accuracy"])
            row["best_accuracy"] = best
        about = dict(epoch=epoch, test_accuracy=row["test_accuracy"])
        if is_best:
            run.save_network("network-best.pt", net, train, **about)
        run.save_checkpoint(
            epoch=epoch, best=best, row=row, config=net.config, weights=net.state_dict(),
            optimizer=optimizer.state_dict(), random=utils.random_state(generator),
        )

    measured = utils.evaluate(net, test_batches, args.amp, top5)
    about = utils.named(measured, "test")
    run.save_network("network.pt", net, train, epoch=epoch, **about)
    run.draw(visualize.draw_run)
    run.log(f"{told(measured)} after the last epoch (network.pt); test accuracy {best:.2f} % in "
            "the best one (network-best.pt)")
    run.log("to measure the network again:")
    run.log(f"    python train.py --evaluate --weights {shlex.quote(run.file('network.pt'))}")


def train_epoch(net, parallel, batches, optimizer, args, progress):
    """One epoch of SGD on the loss of the network and, with its weight, of the auxiliary head.

    Parameters
    ----------
    parallel : nn.Module
        The network as it is called where gradients are to be averaged over the ranks.

    Returns
    -------
    dict
        Loss and accuracy.
    """
    parameters = list(net.parameters())
    meter = utils.Meter(parameters[0].device)

    def step(x, y):
        with utils.autocast(x.device, args.amp):
            logits, logits_aux = parallel(x)
        loss, total = utils.losses(logits, logits_aux, y, args)
        optimizer.zero_grad()
        total.backward()
        clip_grad_norm_(parameters, args.grad_clip)
        optimizer.step()
        meter.add(loss, logits, y)

    net.train()
    step = graphs.graphed(step, args.cuda_graphs)
    for x, y in batches:
        step(x, y)
        progress.step(meter)
    distributed.average_statistics(net)
    return utils.named(meter.read(), "train")


def scheduled(epoch, args):
    """Learning rate of an epoch, counted from 0."""
    if args.dataset == "imagenet":
        return utils.warm_up_linear(epoch, args.epochs, args.learning_rate)
    return utils.cosine(epoch, args.epochs, args.learning_rate, args.learning_rate_min)


# ------------------------------------------------------------------------------------------------
# What is trained, and what is said of it
# ------------------------------------------------------------------------------------------------


def load_images(run, device, config):
    """Training and test images, for a network of that configuration."""
    args = run.args
    source = imagenet if args.dataset == "imagenet" else data
    with distributed.rank_zero_first():
        train, test = source.load(
            args.dataset, args.data, args.image_size, device, args.workers, run.log
        )
    if config.setdefault("num_classes", len(test.classes)) != len(test.classes):
        raise utils.UserError(
            f"the network tells {config['num_classes']} classes apart, but {args.dataset} has "
            f"{len(test.classes)}: give its --dataset and --data"
        )
    utils.warn_if_busy(device, run.log)
    if not args.evaluate:
        if not run.checkpoint:
            arguments.fit_to_data(
                args, len(train), arguments.train_setting(vars(args)), distributed.world_size(),
                run.log,
            )
        if device.type == "cpu":
            run.log("there is no CUDA device: the published recipe takes weeks on a small CPU; "
                    "fewer --init_channels, --layers and --epochs help")
    return train, test


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
    setting = arguments.train_setting({**known, **typed})
    vars(args).update({**setting, **known, **typed})
    arguments.check_train(args)


def network_config(args, source):
    """Describe the network of the arguments, or that of a file of weights.

    Parameters
    ----------
    args : argparse.Namespace
        Its init_channels, layers and auxiliary are set to those of the network.
    source : dict or None
        What `checkpoints.read_weights` found, or the checkpoint of a resumed run.

    Returns
    -------
    dict
        For `model.from_config`; `num_classes` is missing where the data has to tell.

    Raises
    ------
    utils.UserError
        If a typed flag contradicts the file.
    """
    config = dict(source["config"]) if source else {}
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
    """Columns of the log's table, as `runs.Run.begin` takes them."""
    return {
        "lr": "{learning_rate:.4f}", "train loss": "{train_loss:.3f}",
        "train acc": "{train_accuracy:.2f} %", "test loss": "{test_loss:.3f}",
        "test acc": "{test_accuracy:.2f} %",
        **({"test top-5": "{test_top5_accuracy:.2f} %"} if top5 else {}),
        "best acc": "{best_accuracy:.2f} %",
    }


def told(measured):
    """Loss, accuracy and maybe top-5 accuracy, in words."""
    _, accuracy, *top5 = measured
    text = f"test accuracy {accuracy:.2f} %, error {100 - accuracy:.2f} %"
    return text + "".join(f", top-5 accuracy {value:.2f} %" for value in top5)


if __name__ == "__main__":
    with runs.command("train.py"):
        main(get_args_parser().parse_args())
