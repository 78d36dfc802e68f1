"""Search a cell by sparse coding (ISTA-NAS), in two stages or in one.

    python search.py                                          # published two-stage search, CIFAR-10
    python search.py --one_stage                              # published one-stage search
    python search.py --dataset imagefolder --data my_images   # on your own images
    python search.py --resume runs/search-20201206-101500     # go on after an interruption

Two-stage: each step moves first the points b, by Adam on a batch of one half of the training
images, then the weights, by SGD on a batch of the other half. After each epoch the codes are
recovered from b, and with them the 2 operations that every node runs. The last support is the
genotype, which `train.py --arch RUN/genotype.json` trains from scratch.

One-stage: the supernet has the target size, and b and the weights move in the same step. A node
whose code has come to rest is frozen; when all are, the network trains on with its architecture
fixed. The end is a trained network, which `train.py --evaluate --weights RUN/network.pt` measures.
"""

import shlex

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import arguments
import checkpoints
import data
import distributed
import fast
import genotypes
import graphs
import imagenet
import ista
import runs
import utils
import visualize
from model_search import Network

RESTLESS = 20  # epochs in a row with a change of support, from which on it is worth a warning


def get_args_parser():
    return arguments.get_search_parser(__doc__)


def main(args):
    run = runs.Run("search", args)
    args, checkpoint = run.args, run.checkpoint
    device = utils.choose_device(args.device, args.amp, args.cuda_graphs)
    generator = utils.seed_everything(args.seed, device)
    memory_format = utils.memory_format(device, args.amp)

    # In two-stage search the weights learn from one half of the images, and b from the other.
    weight_images, arch_images, measured = load_images(run, device)
    options = dict(
        batch_size=args.batch_size, generator=generator, memory_format=memory_format,
        cutout_length=args.cutout_length if args.cutout else 0,
        rank=distributed.rank(), world_size=distributed.world_size(),
    )
    batches = weight_images.batches(train=True, **options)
    arch_batches = arch_images and arch_images.batches(train=True, **options)
    measured_batches = measured.batches(train=False, **options)
    check_interval(args, len(batches))

    net = Network(
        args.init_channels, len(weight_images.classes), args.layers, one_stage=args.one_stage,
        auxiliary=args.auxiliary, imagenet=args.dataset == "imagenet",
        proj_dims=args.proj_dims, sparseness=args.sparseness, lam=args.lam,
        distinct_edges=args.distinct_edges,
    )
    if checkpoint:
        checkpoints.load_supernet(net, checkpoint["net"], arguments.checkpoint_path(args.resume))
    net = fast.accelerate(net.to(device, memory_format=memory_format))
    weight_optimizer, arch_optimizer = optimizers(net, args)
    utils.seed_drop_path(args.seed)

    # Learning rate and drop-path follow their schedule from `schedule_start` on: at once, or in
    # one-stage search when all nodes are frozen. Until then it is None.
    epoch, schedule_start, row = 0, None if args.one_stage else 0, {}
    if checkpoint:
        epoch, schedule_start, row = (checkpoint[k] for k in ("epoch", "schedule_start", "row"))
        with run.restoring():
            checkpoints.load_optimizer(weight_optimizer, checkpoint["weight_optimizer"], False)
            checkpoints.load_optimizer(arch_optimizer, checkpoint["arch_optimizer"])
            utils.set_random_state(checkpoint["random"], generator, args.seed, epoch, run.log)
    else:
        recovery = net.recover(args.solver)  # the first codes, and what runs in epoch 1
        report(run, recovery._asdict())
    run.begin(device, columns(args))
    parallel = distributed.data_parallel(net, net.weight_parameters(), static=all(net.frozen))

    while schedule_start is None or epoch < schedule_start + args.epochs:
        name, learning_rate, drop_path_prob = schedule(args, epoch, schedule_start)
        utils.set_learning_rate(weight_optimizer, learning_rate)
        net.drop_path_prob = drop_path_prob
        before, restless = net.genotype(), row.get("restless", 0)
        epoch += 1
        with run.epoch(
            epoch, name, batches, epochs_left(args, epoch, schedule_start),
            learning_rate=learning_rate, drop_path_prob=drop_path_prob,
        ) as row:
            both = weight_optimizer, arch_optimizer
            if args.one_stage:
                row |= one_stage_epoch(net, parallel, batches, *both, args, run.progress)
            else:
                row |= two_stage_epoch(
                    net, parallel, batches, arch_batches, *both, args, run.progress, epoch
                )
            row |= utils.named(utils.evaluate(net, measured_batches, args.amp), measured_name(args))

            # The architecture of the next epoch; what was measured is that of this one.
            if schedule_start is None:
                recovery = net.recover(args.solver, args.freeze_tol, args.max_params)
                row |= recovery._asdict()
                if all(net.frozen) or epoch == args.max_search_epochs:
                    schedule_start = epoch
            elif not args.one_stage and (args.recover_every == "epoch" or epoch == args.epochs):
                recovery = net.recover(args.solver)
                row |= recovery._asdict()
            row["changed"] = len(genotypes.moved(before, net.genotype()))
            row["restless"] = restless + 1 if row["changed"] else 0
        report(run, row)
        announce(run, before, net.genotype(), row)
        if args.one_stage and schedule_start == epoch:
            settle(run, net, weight_optimizer)
            parallel = distributed.data_parallel(net, net.weight_parameters(), static=True)
        save(run, net, generator, row, schedule_start, weight_optimizer, arch_optimizer)
    finish(run, net, weight_images, measured_batches, row)


# ------------------------------------------------------------------------------------------------
# One epoch of each search
# ------------------------------------------------------------------------------------------------


def two_stage_epoch(
    net, parallel, batches, arch_batches, weight_optimizer, arch_optimizer, args, progress, epoch
):
    """At each step first b, on a batch of one half of the images, then the weights, on the other.

    Parameters
    ----------
    parallel : nn.Module
        The network as it is called where the gradients of its weights are to be averaged over the
        ranks.
    epoch : int
        From 1; --recover_every STEPS counts the steps of all epochs.

    Returns
    -------
    dict
        Losses and accuracies on the batches of the weights, and on those of b; and what the last
        recovery among the steps did, if there was one.
    """
    weights, points = net.weight_parameters(), net.arch_parameters()
    device = weights[0].device
    arch_meter = utils.Meter(device)
    meter = utils.Meter(device, blame="--arch_learning_rate", after=arch_meter)

    def step(x, y, x_arch, y_arch):
        # b, with the weights as they are: no gradient of a weight is computed.
        train_only(points, weights)
        with utils.autocast(device, args.amp):
            logits, _ = net(x_arch)
        loss = F.cross_entropy(logits.float(), y_arch, label_smoothing=args.label_smoothing)
        arch_optimizer.zero_grad()
        loss.backward()
        distributed.average_gradients(points)
        arch_optimizer.step()
        arch_meter.add(loss, logits, y_arch)

        # The weights, with b as it is now.
        train_only(weights, points)
        with utils.autocast(device, args.amp):
            logits, _ = parallel(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
        weight_optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(weights, args.grad_clip)
        weight_optimizer.step()  # operations that did not run have no gradient, so SGD skips them
        meter.add(loss, logits, y)

    net.train()
    recovered = {}
    step = graphs.graphed(step, args.cuda_graphs and args.recover_every == "epoch")
    pairs = zip(batches, arch_batches.endless(), strict=False)
    for steps, ((x, y), (x_arch, y_arch)) in enumerate(pairs, (epoch - 1) * len(batches) + 1):
        step(x, y, x_arch, y_arch)
        if args.recover_every != "epoch" and steps % args.recover_every == 0:
            recovered = net.recover(args.solver)._asdict()
        progress.step(meter)
    distributed.average_statistics(net)
    return utils.named(meter.read(), "train") | utils.named(arch_meter.read(), "arch") | recovered


def one_stage_epoch(net, parallel, batches, weight_optimizer, arch_optimizer, args, progress):
    """At each step b and the weights move by the gradients of the same backward pass.

    Parameters
    ----------
    parallel : nn.Module
        As for `two_stage_epoch`.

    Returns
    -------
    dict
        Loss and accuracy.
    """
    weights, points = net.weight_parameters(), net.arch_parameters()
    device = weights[0].device
    meter = utils.Meter(device, blame="--learning_rate, --arch_learning_rate or --grad_clip")

    def step(x, y):
        with utils.autocast(device, args.amp):
            logits, logits_aux = parallel(x)
        loss, total = utils.losses(logits, logits_aux, y, args)
        arch_optimizer.zero_grad()
        weight_optimizer.zero_grad()
        total.backward()
        distributed.average_gradients(points)
        arch_optimizer.step()  # frozen points have no gradient, so Adam leaves them alone
        clip_grad_norm_(weights, args.grad_clip)
        weight_optimizer.step()
        meter.add(loss, logits, y)

    net.train()
    step = graphs.graphed(step, args.cuda_graphs)
    for x, y in batches:
        step(x, y)
        progress.step(meter)
    distributed.average_statistics(net)
    return utils.named(meter.read(), "train")


def train_only(trained, fixed):
    """Have gradients computed for some parameters and not for others."""
    for p in trained:
        p.requires_grad_(True)
    for p in fixed:
        p.requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# Before the epochs
# ------------------------------------------------------------------------------------------------


def load_images(run, device):
    """Images that train the weights, that train b, and that an epoch ends by measuring.

    In two-stage search the last are those of b, not augmented; in one-stage search those that
    train the weights also train b, in place of which there is None, and the test images are last.
    """
    args = run.args
    source = imagenet if args.dataset == "imagenet" else data
    with distributed.rank_zero_first():
        train, test = source.load(
            args.dataset, args.data, args.image_size, device, args.workers, run.log
        )
    if args.one_stage:
        parts = train, None, test
        run.log(f"{args.dataset}: {len(train)} images train the weights and b; the {len(test)} "
                "test images are measured for the log alone")
    else:
        halves = data.split(train.labels, args.train_portion, args.seed)
        weight_half, arch_half = (train.subset(half) for half in halves)
        parts = weight_half, arch_half, arch_half
        run.log(f"{args.dataset}: {len(weight_half)} images train the weights, {len(arch_half)} "
                "others train b; these, not augmented, give the valid loss and accuracy")
    published = arguments.search_setting(vars(args))
    if not run.checkpoint:
        smallest = min(len(part) for part in parts[:2] if part)
        arguments.fit_to_data(
            args, smallest, published, distributed.world_size(), run.log
        )
    run.log(f"device: {device}")
    utils.warn_if_busy(device, run.log)
    if args.layers < 3:
        run.log("warning: with fewer than 3 layers there is no normal cell, so none is searched")
    if device.type == "cpu" and args.init_channels >= published["init_channels"]:
        run.log("there is no CUDA device: a small CPU takes hours for the published two-stage "
                "search, and weeks for the one-stage one; fewer --init_channels and --layers help")
    return parts


def check_interval(args, steps):
    """Refuse a --recover_every that a search never reaches."""
    steps *= args.epochs
    if args.recover_every != "epoch" and args.recover_every > steps:
        raise utils.UserError(
            f"--recover_every {args.recover_every}: the whole search has {steps} steps"
        )


def optimizers(net, args):
    """SGD on the weights, and Adam on the points b."""
    weight_optimizer = torch.optim.SGD(
        net.weight_parameters(), args.learning_rate, args.momentum,
        weight_decay=args.weight_decay, foreach=True,
    )
    arch_optimizer = torch.optim.Adam(
        net.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=args.arch_weight_decay, fused=True, capturable=args.cuda_graphs,
    )
    return weight_optimizer, arch_optimizer


def measured_name(args):
    """What the images that an epoch ends by measuring are called in log and metrics."""
    return "test" if args.one_stage else "valid"


def columns(args):
    """Columns of the log's table, as `runs.Run.begin` takes them."""
    name = measured_name(args)
    return {
        "lr": "{learning_rate:.4f}", "train loss": "{train_loss:.3f}",
        "train acc": "{train_accuracy:.2f} %", f"{name} loss": f"{{{name}_loss:.3f}}",
        f"{name} acc": f"{{{name}_accuracy:.2f}} %",
        "pairs changed": f"{{changed}} of {2 * genotypes.NODES * args.sparseness}",
    }


# ------------------------------------------------------------------------------------------------
# Between epochs
# ------------------------------------------------------------------------------------------------


def schedule(args, epoch, schedule_start):
    """Name, learning rate and drop-path probability of the epoch after `epoch` epochs."""
    linear = args.one_stage and args.dataset == "imagenet"
    if schedule_start is None:
        warm_up = min((epoch + 1) / utils.WARM_UP, 1) if linear else 1
        return f"search {epoch + 1}", args.learning_rate * warm_up, 0.0
    done = epoch - schedule_start
    if linear:
        learning_rate = utils.warm_up_linear(done, args.epochs, args.learning_rate)
    else:
        learning_rate = utils.cosine(done, args.epochs, args.learning_rate, args.learning_rate_min)
    name = f"{'train ' if args.one_stage else ''}{done + 1}/{args.epochs}"
    return name, learning_rate, args.drop_path_prob * done / args.epochs


def epochs_left(args, epoch, schedule_start):
    """Epochs after this one: a number, and whether there may be more."""
    if schedule_start is None:
        return args.epochs, True
    return schedule_start + args.epochs - epoch, False


def settle(run, net, weight_optimizer):
    """End the search of a one-stage run: the architecture is fixed, and the rest is dropped."""
    if not all(net.frozen):
        moving = net.frozen.count(False)
        run.log(f"warning: {moving} of {len(net.frozen)} nodes still moved in the last epoch of "
                "the search; the last architecture is taken (--max_search_epochs)")
        net.freeze()
    dropped = net.prune()
    utils.forget(weight_optimizer, dropped)
    freed = sum(p.numel() for p in dropped)
    kept = net.retraining_parameters()  # as train.py counts them
    run.log(f"the architecture is fixed; the operations outside it are dropped, which frees "
            f"{freed / 1e6:.3f} M parameters and leaves {kept / 1e6:.3f} M")
    if run.args.drop_path_prob:
        run.log(f"from here on drop-path rises to {run.args.drop_path_prob:g}, which lowers the "
                "training accuracy, and the learning rate falls")
    if run.args.dataset == "imagenet":
        run.log(f"from here on the learning rate warms up anew, for {utils.WARM_UP} epochs, and "
                "then falls")


def report(run, row):
    """Log what a recovery calls for: solver trouble, and how far the nodes are.

    Parameters
    ----------
    row : dict
        With what `model_search.Recovery` holds, if there was a recovery.
    """
    args, nodes = run.args, node_names()
    if row.get("not_converged"):
        run.warn_once("solver", f"solver {args.solver} leaves a relative duality gap above "
                      f"{ista.TOLERANCE:g} in some codes ({row['not_converged']} of {len(nodes)} "
                      "at first); those are homotopy's")
    if any(row.get("too_sparse", [])):
        told = zip(nodes, row["too_sparse"], row["lam_max"], strict=True)
        told = [f"{node} (λ_max {lam_max:.1e})" for node, sparse, lam_max in told if sparse]
        run.warn_once("sparse", f"at λ {args.lam:g} the codes of some nodes have fewer than "
                      f"{args.sparseness} nonzero entries, so that they keep pairs of their last "
                      f"support and do not freeze: {', '.join(told)}; a smaller --lam helps")
    if row.get("parameters"):  # one-stage search: how near the end is
        moved = [
            "frozen" if frozen and not distance else f"{distance:.1e}" + "→frozen" * frozen
            for frozen, distance in zip(row["frozen"], row["distance"], strict=True)
        ]
        size = f"{row['parameters'] / 1e6:.3f} M parameters"
        if row["rejected"]:
            size += f", rejected: --max_params is {args.max_params:g}"
        each = genotypes.NODES
        run.log(f"    searching {row['frozen'].count(False)} of {len(nodes)} nodes; codes moved by "
                f"{' '.join(moved[:each])} (normal), {' '.join(moved[each:])} (reduction); {size}")


def announce(run, before, genotype, row):
    """Log the pairs that changed, and warn of what has spoilt searches before."""
    if moved := genotypes.moved(before, genotype):
        run.log(f"    {'; '.join(moved)}")
        run.show_figure("cells", visualize.cells_figure(genotype), row["epoch"])
    for cell in ("normal", "reduce"):
        pairs = getattr(genotype, cell)
        skips = sum(operation == "skip_connect" for operation, _ in pairs)
        if 2 * skips >= len(pairs):
            run.warn_once(f"skips {cell}",
                          f"{skips} of {len(pairs)} pairs of the {cell} cell are skip_connect")
    if row["restless"] >= RESTLESS:
        run.warn_once("restless", f"some pair has changed in each of the last {RESTLESS} epochs; a "
                      "smaller --arch_learning_rate or more epochs may bring it to rest")


def node_names():
    """Names of the nodes in the order of a Recovery."""
    return [f"{cell} {j}" for cell in ("normal", "reduction") for j in range(genotypes.NODES)]


# ------------------------------------------------------------------------------------------------
# What is saved, and what came out
# ------------------------------------------------------------------------------------------------


def save(run, net, generator, row, schedule_start, weight_optimizer, arch_optimizer):
    """Save the genotype, and all that is needed to go on."""
    run.append("genotypes.jsonl", {"epoch": row["epoch"], **net.describe()})
    save_genotype(run, net, row)
    run.save_checkpoint(
        epoch=row["epoch"], schedule_start=schedule_start, row=row, net=net.state_dict(),
        weight_optimizer=weight_optimizer.state_dict(),
        arch_optimizer=arch_optimizer.state_dict(), random=utils.random_state(generator),
    )


def save_genotype(run, net, row):
    args = run.args
    run.save_genotype(
        net.genotype(), args.one_stage,
        method=f"ISTA-NAS {'one' if args.one_stage else 'two'}-stage search",
        distinct_edges=args.distinct_edges, seed=args.seed, dataset=args.dataset, result=row,
    )


def finish(run, net, images, measured_batches, row):
    """Say what came out, and the next command; in one-stage search save the trained network."""
    args = run.args
    save_genotype(run, net, row)  # a resumed run that had ended has only this to do
    run.draw(visualize.draw_run)
    run.log(f"the search is done: genotype = {net.genotype()}")
    if not args.one_stage:
        run.log("to train it from scratch, at the published size unless flags say otherwise:")
        arch = shlex.quote(run.file("genotype.json"))
        flags = arguments.data_flags(args) + arguments.cutout_flag(args)
        run.log(f"    python train.py --arch {arch}{flags}")
        return
    plain = net.absorb()
    _, before = utils.evaluate(net, measured_batches, args.amp)
    _, after = utils.evaluate(plain, measured_batches, args.amp)
    run.log(f"test accuracy {before:.2f} % in the supernet, {after:.2f} % after absorption")
    run.save_network("network.pt", plain, images, epoch=row["epoch"], test_accuracy=after)
    run.log("the trained network is in network.pt; to measure it, and to train it further:")
    weights = shlex.quote(run.file("network.pt"))
    run.log(f"    python train.py --evaluate --weights {weights}")
    run.log(f"    python train.py --weights {weights}{arguments.cutout_flag(args)}")


if __name__ == "__main__":
    with runs.command("search.py"):
        main(get_args_parser().parse_args())
