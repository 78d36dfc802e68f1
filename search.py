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

import os
import shlex

# Must be set before torch is imported. OpenMP threads that wait for each other then sleep after 5,000
# spins instead of 300,000, because on a busy machine spinning threads keep others from the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
from torch.nn.utils import clip_grad_norm_

import data
import genotypes
import imagenet
import ista
import utils
import visualize
from harness import checkpoints, distributed, flags, runs, speedups
from harness.cuda_graphs import StepGraphs, use_graphs
from model_search import DICTIONARIES, Network, check_operations

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
# The paper has searched on ImageNet in one stage, but does not say how: the recipe of the
# retraining, with b and the seed as on CIFAR, is our choice; so is two-stage search on it.
ONE_STAGE_IMAGENET = dict(
    ONE_STAGE, init_channels=48, layers=14, image_size=224, batch_size=1024, epochs=250,
    learning_rate=0.5, learning_rate_min=0.0, weight_decay=3e-5, label_smoothing=0.1,
    cutout=False, drop_path_prob=0.0, max_params=None,
)
TWO_STAGE_IMAGENET = dict(TWO_STAGE, image_size=224)


def main(args):
    run = runs.Run("search", args)  # nothing is written before `run.begin`
    args, checkpoint = run.args, run.checkpoint
    device = utils.choose_device(args.device, args.amp)
    generator = utils.seed_everything(args.seed, device)
    memory_format = utils.memory_format(device, args.amp, two_stage=not args.one_stage)

    weight_images, arch_images, measured_images = load_images(run, device)
    measured_name = "test" if args.one_stage else "valid"  # in log and metrics
    options = dict(distributed.place(), generator=generator, memory_format=memory_format)
    training = dict(options, train=True, cutout_length=args.cutout_length if args.cutout else 0)
    batches = weight_images.batches(args.batch_size, **training)
    arch_batches = None
    if arch_images is not None:
        arch_batches = arch_images.batches(args.batch_size, **training)
    measured_batches = measured_images.batches(
        utils.evaluation_batch(args, device), train=False, **options
    )

    net = supernet(args, len(weight_images.classes))
    if checkpoint:
        net.prune_like(checkpoint["net"])
        net.load_state_dict(checkpoint["net"])
    net = net.to(device, memory_format=memory_format)
    if device.type == "cpu":
        speedups.keep_freed_memory()
        speedups.limit_threads(run.log)
    if args.compile:
        speedups.compile_network(net, is_fixed=all(net.frozen), log=run.log)
    weight_optimizer, arch_optimizer = optimizers(net, args)
    checkpoints.record_built_numbers(weight_optimizer, arch_optimizer)
    utils.seed_drop_path(args.seed)
    graphs_enabled = use_graphs(args.cuda_graphs, device, args.recover_every)

    # A one-stage search is searching, at a constant learning rate, until all nodes are frozen; then
    # it is training, along the schedule of --epochs. A two-stage search follows that all along.
    epoch, phase, trained, row = 0, "searching" if args.one_stage else "training", 0, {}
    if checkpoint:
        epoch, phase, trained, row = (checkpoint[k] for k in ("epoch", "phase", "trained", "row"))
        checkpoints.load_optimizer(weight_optimizer, checkpoint["weight_optimizer"], run.log)
        checkpoints.load_optimizer(arch_optimizer, checkpoint["arch_optimizer"], run.log)
        checkpoints.set_random_state(checkpoint["random"], generator, args.seed, epoch, run.log)
    else:  # the first codes, and what runs in epoch 1
        report(run, recover(net, args), epoch)
    run.begin(device, columns(args, measured_name))
    parallel = distributed.data_parallel(net, net.weight_parameters(), static=all(net.frozen))

    while phase == "searching" or trained < args.epochs:
        factor, net.drop_path_prob = schedule(args, epoch, phase, trained)
        utils.set_learning_rate(weight_optimizer, factor)
        before = net.genotype()
        epoch, trained = epoch + 1, trained + (phase == "training")
        name = f"search {epoch}" if phase == "searching" else f"{trained}/{args.epochs}"
        left = args.epochs - trained, phase == "searching"  # epochs; whether there may be more
        rate = factor * weight_optimizer.param_groups[0]["initial_lr"]
        numbers = dict(phase=phase, learning_rate=rate, drop_path_prob=net.drop_path_prob)
        with run.epoch(epoch, name, batches, left, **numbers) as row:
            if args.one_stage:
                row |= one_stage_epoch(
                    parallel, batches, weight_optimizer, arch_optimizer, run, graphs_enabled
                )
            else:
                row |= two_stage_epoch(
                    parallel, batches, arch_batches, weight_optimizer, arch_optimizer, run,
                    graphs_enabled, steps=(epoch - 1) * len(batches),
                )
            row |= utils.named(utils.evaluate(net, measured_batches, args.amp), measured_name)

            # The architecture of the next epoch; what was measured is that of this one.
            if phase == "searching":
                row |= recover(net, args, freeze_tol=args.freeze_tol, max_params=args.max_params)
            elif not args.one_stage and (args.recover_every == "epoch" or trained == args.epochs):
                row |= recover(net, args)
            row["changed"] = len(genotypes.moved(before, net.genotype()))
        report(run, row, epoch)
        announce(run, before, net.genotype(), epoch)
        if phase == "searching" and (all(net.frozen) or epoch == args.max_search_epochs):
            phase = "training"
            settle(run, net, weight_optimizer)
            parallel = distributed.data_parallel(net, net.weight_parameters(), static=True)
        save_genotype(run, net, row)
        run.save_checkpoint(
            epoch=epoch, phase=phase, trained=trained, row=row, net=net.state_dict(),
            weight_optimizer=weight_optimizer.state_dict(),
            arch_optimizer=arch_optimizer.state_dict(),
            random=checkpoints.random_state(generator),
        )
    finish(run, net, weight_images, measured_batches, row)


# ------------------------------------------------------------------------------------------------
# The steps, and the loops over batches that call them
# ------------------------------------------------------------------------------------------------
# On CUDA a step is captured as a CUDA graph in each epoch, and then replayed: Python inside of it
# does not run at every step. See "Change the method" in the README.


def arch_step(net, x, y, weight_optimizer, arch_optimizer, args):
    """Move b, with the weights as they are: no gradient of a weight is computed."""
    with utils.held(weight_optimizer):
        with speedups.autocast(net, x.device, args.amp):
            logits, logits_aux = net(x)
        loss, total = utils.criterion(logits, logits_aux, y, args)
        arch_optimizer.zero_grad()
        total.backward()
    distributed.average_gradients(utils.parameters_of(arch_optimizer))
    arch_optimizer.step()
    return loss.detach(), logits.detach()


def weight_step(net, x, y, weight_optimizer, arch_optimizer, args):
    """Move the weights, with b as it is."""
    with utils.held(arch_optimizer):
        with speedups.autocast(net, x.device, args.amp):
            logits, logits_aux = net(x)
        loss, total = utils.criterion(logits, logits_aux, y, args)
        weight_optimizer.zero_grad()
        total.backward()
    clip_grad_norm_(utils.parameters_of(weight_optimizer), args.grad_clip)
    weight_optimizer.step()  # operations that did not run have no gradient, so SGD skips them
    return loss.detach(), logits.detach()


def one_stage_step(net, x, y, weight_optimizer, arch_optimizer, args):
    """Move b and the weights, by the gradients of the same backward pass."""
    with speedups.autocast(net, x.device, args.amp):
        logits, logits_aux = net(x)
    loss, total = utils.criterion(logits, logits_aux, y, args)
    arch_optimizer.zero_grad()
    weight_optimizer.zero_grad()
    total.backward()
    distributed.average_gradients(utils.parameters_of(arch_optimizer))
    arch_optimizer.step()  # frozen points have no gradient, so Adam leaves them alone
    clip_grad_norm_(utils.parameters_of(weight_optimizer), args.grad_clip)
    weight_optimizer.step()
    return loss.detach(), logits.detach()


def two_stage_epoch(
    net, batches, arch_batches, weight_optimizer, arch_optimizer, run, graphs_enabled=False, steps=0
):
    """At each step first b, on a batch of one half of the images, then the weights, on the other.

    `net` averages the gradients of its weights over the ranks; `steps` were made in earlier epochs.
    Returns losses and accuracies of both halves, and what the last recovery among the steps did.
    """
    args, plain = run.args, distributed.unwrapped(net)
    device = next(plain.parameters()).device
    meter, arch_meter, recovered = utils.Meter(device), utils.Meter(device), {}
    graphs = StepGraphs(plain, graphs_enabled, run.warn)
    moved = weight_optimizer, arch_optimizer, args
    net.train()
    for (x, y), (x_arch, y_arch) in zip(batches, arch_batches.endless(), strict=False):
        loss, logits = graphs.run(arch_step, plain, x_arch, y_arch, *moved)
        arch_meter.add(loss, logits, y_arch)
        loss, logits = graphs.run(weight_step, net, x, y, *moved)
        meter.add(loss, logits, y)
        steps += 1
        if args.recover_every != "epoch" and steps % args.recover_every == 0:
            recovered = recover(plain, args)
        run.progress.step(meter)
    distributed.average_statistics(plain)
    return utils.named(meter.read(), "train") | utils.named(arch_meter.read(), "arch") | recovered


def one_stage_epoch(net, batches, weight_optimizer, arch_optimizer, run, graphs_enabled=False):
    """At each step b and the weights; see `two_stage_epoch`. Returns loss and accuracy."""
    plain = distributed.unwrapped(net)
    meter = utils.Meter(next(plain.parameters()).device)
    graphs = StepGraphs(plain, graphs_enabled, run.warn)
    net.train()
    for x, y in batches:
        loss, logits = graphs.run(
            one_stage_step, net, x, y, weight_optimizer, arch_optimizer, run.args
        )
        meter.add(loss, logits, y)
        run.progress.step(meter)
    distributed.average_statistics(plain)
    return utils.named(meter.read(), "train")


# ------------------------------------------------------------------------------------------------
# Before the epochs
# ------------------------------------------------------------------------------------------------


def load_images(run, device):
    """Images that train the weights, images that train b, and images to measure after an epoch.

    In two-stage search the last are those of b, not augmented. In one-stage search all train both,
    so the second are None, and the last are the test images.
    """
    args = run.args
    source = imagenet if args.dataset == "imagenet" else data
    with distributed.rank_zero_first():
        train, test = source.load(
            args.dataset, args.data, args.image_size, device, args.workers, run.log
        )
    run.check_data(train)
    if args.one_stage:
        parts = train, None, test
        run.log(f"{args.dataset}: {len(train)} images train the weights and b; the {len(test)} "
                "test images are measured for the log alone")
    else:
        halves = data.split(train.labels, args.train_portion, args.seed)
        weight_half, arch_half = (train.subset(half) for half in halves)
        parts = weight_half, arch_half, arch_half
        run.log(f"{args.dataset}: {len(weight_half)} images train the weights, {len(arch_half)} "
                "others b; valid loss and accuracy are those of the images of b, not augmented")
    published = published_setting(vars(args))
    if not run.checkpoint:
        smallest = min(len(part) for part in parts[:2] if part is not None)
        flags.fit_to_data(args, smallest, published, distributed.world_size(), run.log)
    run.log(f"device: {device}")
    if args.layers < 3:
        run.warn("with fewer than 3 layers there is no normal cell, so none is searched")
    if device.type == "cpu" and args.init_channels >= published["init_channels"]:
        run.log("there is no CUDA device: a small CPU takes hours for the published two-stage "
                "search, and weeks for the one-stage one; fewer --init_channels and --layers help")
    return parts


def supernet(args, num_classes):
    """Build the supernet; UserError if edited operations could not be searched."""
    try:
        check_operations(args.init_channels, args.one_stage, args.dataset == "imagenet")
    except ValueError as error:
        raise utils.UserError(error) from None
    return Network(
        args.init_channels, num_classes, args.layers, one_stage=args.one_stage,
        auxiliary=args.auxiliary, imagenet=args.dataset == "imagenet",
        proj_dims=args.proj_dims, sparseness=args.sparseness, lam=args.lam,
        distinct_edges=args.distinct_edges, dictionary=args.dictionary,
    )


def optimizers(net, args):
    """SGD on the weights, and Adam on the points b."""
    weight_optimizer = utils.SGD(
        net.weight_parameters(), args.learning_rate, args.momentum, args.weight_decay
    )
    arch_optimizer = torch.optim.Adam(
        net.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=args.arch_weight_decay, fused=True, capturable=net.normal_code.A0.is_cuda,
    )
    return weight_optimizer, arch_optimizer


def columns(args, name):
    """Columns of the log's table: the head of each, and its text for the row of an epoch."""
    pairs = 2 * genotypes.NODES * args.sparseness
    return {
        "lr": "{learning_rate:.4f}", "train loss": "{train_loss:.3f}",
        "train %": "{train_accuracy:.2f}", f"{name} loss": f"{{{name}_loss:.3f}}",
        f"{name} %": f"{{{name}_accuracy:.2f}}", "changed": f"{{changed}}/{pairs}",
    }


# ------------------------------------------------------------------------------------------------
# Between epochs
# ------------------------------------------------------------------------------------------------


def recover(net, args, **limits):
    """Recover the codes from b; returns what `model_search.Recovery` holds, as a dict."""
    if not all(b.isfinite().all() for b in net.arch_parameters()):
        raise utils.Diverged("a point b is not finite")
    # Use rank 0's codes on all ranks, because rounding may differ.
    return net.recover(args.solver, share=distributed.from_rank_zero, **limits)._asdict()


def schedule(args, epoch, phase, trained):
    """Share of the initial learning rate, and drop-path probability, of the next epoch."""
    linear = args.one_stage and args.dataset == "imagenet"
    if phase == "searching":
        return utils.warm_up(epoch) if linear else 1.0, 0.0
    if linear:
        share = utils.warm_up_linear(trained, args.epochs)
    else:
        low = args.learning_rate_min / args.learning_rate
        share = utils.cosine(trained, args.epochs, low)
    return share, args.drop_path_prob * trained / args.epochs


def settle(run, net, weight_optimizer):
    """End the search of a one-stage run: the architecture is fixed, and the rest is dropped."""
    if not all(net.frozen):
        moving = net.frozen.count(False)
        run.warn(f"{moving} of {len(net.frozen)} nodes still moved in the last epoch of the "
                 "search; the last architecture is taken (--max_search_epochs)")
        net.freeze()
    dropped = net.prune()
    utils.forget(weight_optimizer, dropped)
    freed = sum(p.numel() for p in dropped)
    kept = net.retraining_parameters()  # as train.py counts them
    run.log("the architecture is fixed; the operations outside it are dropped, which frees "
            f"{freed / 1e6:.3f} M parameters and leaves {kept / 1e6:.3f} M")
    if run.args.compile:
        speedups.compile_network(net, is_fixed=True, log=run.log)
    if run.args.drop_path_prob:
        run.log(f"from here on drop-path rises to {run.args.drop_path_prob:g}, which lowers the "
                "training accuracy, and the learning rate falls")
    if run.args.dataset == "imagenet":
        run.log(f"from here on the learning rate warms up anew, for {utils.WARM_UP} epochs, and "
                "then falls")


def report(run, row, epoch):
    """Log what a recovery calls for: solver trouble, empty codes, and how far the nodes are.

    `row` has what `model_search.Recovery` holds, if there was a recovery, after `epoch`; 0 is for
    the first one.
    """
    args = run.args
    nodes = [f"{cell} {j}" for cell in ("normal", "reduction") for j in range(genotypes.NODES)]
    if row.get("not_converged"):
        run.warn(f"solver {args.solver} leaves a relative duality gap above {ista.TOLERANCE:g} in "
                 f"some codes ({row['not_converged']} of {len(nodes)} at first); those are "
                 "homotopy's", "solver")
    if row.get("lam_max") and max(row["lam_max"]) <= args.lam:
        largest = f"--lam {args.lam:g}: all codes are 0 above λ_max, {max(row['lam_max']):.1e} at "
        if epoch:
            raise utils.UserError(largest + f"most after epoch {epoch}, so nothing is searched: "
                                  "give a smaller --lam")
        run.warn(largest + "most now; the search ends if that is so after an epoch", "zero")
    elif any(row.get("too_sparse", [])):
        told = zip(nodes, row["too_sparse"], row["lam_max"], strict=True)
        told = [f"{node} (λ_max {lam_max:.1e})" for node, sparse, lam_max in told if sparse]
        run.warn(f"at λ {args.lam:g} the codes of some nodes have fewer than {args.sparseness} "
                 "nonzero entries, so that they keep pairs of their last support and do not "
                 f"freeze; a smaller --lam helps: {', '.join(told)}", "sparse")
    if row.get("parameters"):  # one-stage search: how near the end is
        size = f"{row['parameters'] / 1e6:.3f} M parameters"
        if row["rejected"]:
            size += f", rejected: --max_params is {args.max_params:g}"
        run.log(f"    {row['frozen'].count(False)} of {len(nodes)} nodes not frozen; the cell's "
                f"network has {size}")
        moved = [
            "frozen" if frozen and not distance else f"{distance:.1e}" + "→frozen" * frozen
            for frozen, distance in zip(row["frozen"], row["distance"], strict=True)
        ]
        each = genotypes.NODES
        for cell, part in ("normal", moved[:each]), ("reduction", moved[each:]):
            run.log(f"    distance of each {cell} code from the last: {' '.join(part)}")


def announce(run, before, genotype, epoch):
    """Log the pairs that changed, and warn of what has spoilt searches before."""
    if moved := genotypes.moved(before, genotype):
        run.log("\n".join(f"    {text}" for text in moved))
        run.show_figure("cells", lambda: visualize.cells_figure(genotype), epoch)
    for cell in ("normal", "reduce"):
        pairs = getattr(genotype, cell)
        skips = sum(operation == "skip_connect" for operation, _ in pairs)
        if 2 * skips >= len(pairs):
            run.warn(f"{skips} of {len(pairs)} pairs of the {cell} cell are skip_connect",
                     f"skips {cell}")


# ------------------------------------------------------------------------------------------------
# What came out
# ------------------------------------------------------------------------------------------------


def save_genotype(run, net, row, anew=True):
    """Save the current genotype, and if `anew` also as that of the epoch."""
    args = run.args
    if anew:
        run.append("genotypes.jsonl", {"epoch": row["epoch"], **net.describe()})
    run.save_genotype(
        net.genotype(), args.one_stage,
        method=f"ISTA-NAS {'one' if args.one_stage else 'two'}-stage search",
        distinct_edges=args.distinct_edges, dictionary=args.dictionary, seed=args.seed,
        dataset=args.dataset, result=row,
    )


def finish(run, net, images, measured_batches, row):
    """Log what came out, and the next command; in one-stage search save the trained network."""
    args = run.args
    save_genotype(run, net, row, anew=False)  # a resumed run that had ended has only this to do
    run.draw(visualize.draw_run)
    run.log(f"the search is done: genotype = {net.genotype()}", whole=True)
    if not args.one_stage:
        run.log("to train it from scratch at the published size (for less add --init_channels, "
                "--layers, --epochs):")
        arch = shlex.quote(run.file("genotype.json"))
        run.log(f"    python train.py --arch {arch}{flags.data_flags(args)}"
                f"{flags.cutout_flag(args)}", whole=True)
        return
    plain = net.absorb()
    _, before = utils.evaluate(net, measured_batches, args.amp)
    _, after = utils.evaluate(plain, measured_batches, args.amp)
    run.log(f"test accuracy {before:.2f} % in the supernet, {after:.2f} % after absorption")
    run.save_network("network.pt", plain, epoch=row["epoch"], test_accuracy=after,
                     **run.describe(images))
    run.log("the trained network is in network.pt; to measure it, and to train it further:")
    weights = shlex.quote(run.file("network.pt"))
    run.log(f"    python train.py --evaluate --weights {weights}{' --amp' * args.amp}", whole=True)
    run.log(f"    python train.py --weights {weights}{flags.cutout_flag(args)}", whole=True)


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


def published_setting(typed):
    """The published setting of the search that the typed flags ask for."""
    if typed.get("dataset") == "imagenet":
        return ONE_STAGE_IMAGENET if typed.get("one_stage") else TWO_STAGE_IMAGENET
    return ONE_STAGE if typed.get("one_stage") else TWO_STAGE


def get_args_parser():
    parser = flags.Parser("search.py", __doc__, published_setting, check)
    flags.add_shared(parser, [*data.DATASETS, "imagenet"])

    group = parser.add_argument_group("architecture")
    parser.switch(group, "one_stage", "search at the target size, in one run with the training",
                  default=False)
    group.add_argument(
        "--arch_learning_rate", type=flags.real(0), metavar="LR",
        help="learning rate of Adam on b")
    group.add_argument(
        "--arch_weight_decay", type=flags.real(0), default=1e-3, metavar="L2",
        help="weight decay of Adam on b")
    group.add_argument(
        "--proj_dims", type=flags.whole(1, 1000), default=7, metavar="M", help="m, the length of b")
    group.add_argument(
        "--sparseness", type=flags.whole(1), default=2, metavar="S",
        help="s, the (edge, operation) pairs that each node keeps")
    parser.switch(group, "distinct_edges", "let a node keep at most one operation an edge",
                  default=False)
    group.add_argument(
        "--lam", type=flags.real(0, open_low=True), default=1e-5, metavar="LAMBDA",
        help="λ, the weight of the l1 norm of a code")
    group.add_argument(
        "--dictionary", default="uniform", metavar="NAME", choices=[*DICTIONARIES],
        help="how A is drawn: uniform on [0, 1), as in the released code; or normal, as reported "
        "for the paper, with columns scaled (by us) to norm 1")
    group.add_argument(
        "--solver", default="homotopy", metavar="NAME", choices=[*ista.SOLVERS],
        help=f"how codes are recovered: {', '.join(ista.SOLVERS)}; ista and fista take steps on "
        "the support once the signs rest")

    group = parser.add_argument_group("two-stage search")
    group.add_argument(
        "--train_portion", type=flags.real(0, 1, open_low=True), default=0.5, metavar="P",
        help="part of the training images for the weights; the rest is for b")
    group.add_argument(
        "--recover_every", type=recovery_interval, default="epoch", metavar="{epoch,STEPS}",
        help="recover the codes after each epoch, or after so many steps")

    group = parser.add_argument_group("one-stage search, whose --epochs follow the last freezing")
    group.add_argument(
        "--freeze_tol", type=flags.real(0), default=1e-3, metavar="TOL",
        help="a node freezes when its code moves by no more than this in an epoch, so sooner when "
        "epochs are short")
    group.add_argument(
        "--max_params", type=flags.real(0, open_low=True), metavar="MILLIONS",
        help="architectures with as many parameters or more are rejected")
    group.add_argument(
        "--max_search_epochs", type=flags.whole(1), default=600, metavar="EPOCHS",
        help="after these the last architecture is taken, at rest or not")
    parser.show_defaults({
        "two-stage": TWO_STAGE, "two-stage imagenet": TWO_STAGE_IMAGENET,
        "one-stage": ONE_STAGE, "one-stage imagenet": ONE_STAGE_IMAGENET,
    })
    return parser


def recovery_interval(text):
    return text if text == "epoch" else flags.whole(1)(text)


# Flags that only one of the searches reads: typed for the other, they are a mistake.
ONE_STAGE_ONLY = (
    "freeze_tol", "max_params", "max_search_epochs", "auxiliary", "auxiliary_weight",
    "drop_path_prob",
)
TWO_STAGE_ONLY = ("train_portion", "recover_every")


def check(args):
    """Raise UserError on flags that cannot be right."""
    flags.check_shared(args)
    search, unread = "two-stage", ONE_STAGE_ONLY
    if args.one_stage:
        search, unread = "one-stage", TWO_STAGE_ONLY
    for name in unread:
        if name in args.typed and not args.resume:  # of which kind that run is, it says itself
            raise utils.UserError(f"--{name}: {search} search does not read it; leave it out")
    if args.sparseness > args.proj_dims:
        raise utils.UserError(
            f"--sparseness {args.sparseness}: a code has at most --proj_dims {args.proj_dims} "
            "nonzero entries to choose from"
        )
    pairs = 2 if args.distinct_edges else 2 * len(genotypes.PRIMITIVES)
    if args.sparseness > pairs:
        raise utils.UserError(f"--sparseness {args.sparseness}: the first node has only {pairs} "
                              f"{'edges' if args.distinct_edges else 'pairs'}")
    if args.dataset == "imagenet" and not args.resume:
        flags.check_imagenet(args, linear=args.one_stage)


if __name__ == "__main__":
    with runs.command("search.py"):
        main(get_args_parser().parse_args())
