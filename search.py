"""Search a cell by sparse coding (ISTA-NAS), in two stages or in one.

    python search.py                                          # published two-stage search, CIFAR-10
    python search.py --one_stage                              # published one-stage search
    python search.py --dataset imagefolder --data my_images   # on your own images
    python search.py --resume runs/search-20201206-101500     # resume after an interruption

Two-stage search: each step first updates the architecture parameters b (Adam, a batch of one half
of the training images), then the weights (SGD, a batch of the other half). After each epoch the
sparse codes are recovered from b. They determine the 2 operations that each node runs. The final
support is the genotype, which `train.py --arch RUN/genotype.json` trains from scratch.

One-stage search: the supernet has the target size, and each step updates b and the weights. A node
is frozen when its code has converged. When all nodes are frozen, training continues with the fixed
architecture. The result is a trained network, which `train.py --evaluate --weights RUN/network.pt`
evaluates.
"""

import os
import shlex

# Must be set before torch is imported. OpenMP threads that wait for each other then sleep after
# 5,000 spins instead of 300,000: on a busy machine, spinning threads keep others from the cores.
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
# The paper searches on ImageNet in one stage, but does not give the setting. We use the recipe of
# the retraining, with the setting of b and the seed as on CIFAR. Two-stage search is our addition.
ONE_STAGE_IMAGENET = dict(
    ONE_STAGE, init_channels=48, layers=14, image_size=224, batch_size=1024, epochs=250,
    learning_rate=0.5, learning_rate_min=0.0, weight_decay=3e-5, label_smoothing=0.1,
    cutout=False, drop_path_prob=0.0, max_params=None,
)
TWO_STAGE_IMAGENET = dict(TWO_STAGE, image_size=224)


def main(args):
    run = runs.Run("search", args)  # writes nothing before `run.begin`
    args, checkpoint = run.args, run.checkpoint
    device = utils.choose_device(args.device, args.amp)
    generator = utils.seed_everything(args.seed, device)
    memory_format = utils.memory_format(device, args.amp, two_stage=not args.one_stage)
    batches, arch_batches, eval_batches = load_batches(run, device, generator, memory_format)
    eval_name = "test" if args.one_stage else "valid"  # prefix in log and metrics

    net = supernet(args, len(batches.images.classes))
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
    checkpoints.record_hyperparameters(weight_optimizer, arch_optimizer)
    utils.seed_drop_path(args.seed)
    graphs_enabled = use_graphs(args.cuda_graphs, device, args.recover_every)

    # One-stage search has two phases: "searching", at a constant learning rate, until all nodes are
    # frozen, then "training", with the schedule of --epochs. Two-stage search is always "training".
    phase = "searching" if args.one_stage else "training"
    epoch, trained, row = 0, 0, {}  # completed epochs, those of phase "training", the last metrics
    if checkpoint:
        epoch, phase = checkpoint["epoch"], checkpoint["phase"]
        trained, row = checkpoint["trained"], checkpoint["row"]
        checkpoints.load_optimizer(weight_optimizer, checkpoint["weight_optimizer"], run.log)
        checkpoints.load_optimizer(arch_optimizer, checkpoint["arch_optimizer"], run.log)
        checkpoints.set_random_state(checkpoint["random"], generator, args.seed, epoch, run.log)
    else:  # the architecture of epoch 1
        log_recovery(run, recover(net, args), epoch)
    run.begin(device, columns(args, eval_name))
    parallel = distributed.data_parallel(net, net.weight_parameters(), static=all(net.frozen))

    while phase == "searching" or trained < args.epochs:
        factor, net.drop_path_prob = schedule(args, epoch, phase, trained)
        utils.set_learning_rate(weight_optimizer, factor)
        before = net.genotype()
        epoch += 1
        name = f"search {epoch}"
        if phase == "training":
            trained += 1
            name = f"{trained}/{args.epochs}"
        rate = factor * weight_optimizer.param_groups[0]["initial_lr"]
        with run.epoch(
            epoch, name, batches, args.epochs - trained, may_take_longer=phase == "searching",
            phase=phase, learning_rate=rate, drop_path_prob=net.drop_path_prob,
        ) as row:
            if args.one_stage:
                row.update(one_stage_epoch(
                    parallel, batches, weight_optimizer, arch_optimizer, run, graphs_enabled
                ))
            else:
                row.update(two_stage_epoch(
                    parallel, batches, arch_batches, weight_optimizer, arch_optimizer, run,
                    graphs_enabled, steps=(epoch - 1) * len(batches),
                ))
            measured = utils.evaluate(net, eval_batches, args.amp)
            row.update(utils.name_metrics(measured, eval_name))

            # Recover the architecture of the next epoch. The metrics above are of the current one.
            if phase == "searching":
                limits = dict(freeze_tol=args.freeze_tol, max_params=args.max_params)
                row.update(recover(net, args, **limits))
            elif not args.one_stage and (args.recover_every == "epoch" or trained == args.epochs):
                row.update(recover(net, args))
            row["changed"] = len(genotypes.changed_pairs(before, net.genotype()))
        log_recovery(run, row, epoch)
        log_changes(run, before, net.genotype(), epoch)
        if phase == "searching" and (all(net.frozen) or epoch == args.max_search_epochs):
            phase = "training"
            fix_architecture(run, net, weight_optimizer)
            parallel = distributed.data_parallel(net, net.weight_parameters(), static=True)
        run.append("genotypes.jsonl", {"epoch": epoch, **net.describe()})
        save_genotype(run, net, row)
        run.save_checkpoint(
            epoch=epoch, phase=phase, trained=trained, row=row, net=net.state_dict(),
            weight_optimizer=weight_optimizer.state_dict(),
            arch_optimizer=arch_optimizer.state_dict(),
            random=checkpoints.random_state(generator),
        )
    finish(run, net, batches.images, eval_batches, row)


# ------------------------------------------------------------------------------------------------
# Training steps and epochs
# ------------------------------------------------------------------------------------------------
# On CUDA, each epoch captures a step as a CUDA graph and replays it, so the Python code of a step
# does not run each time. See "Change the method" in the README.


def arch_step(net, x, y, weight_optimizer, arch_optimizer, args):
    """Update b; compute no gradients of the weights."""
    with utils.no_gradients_of(weight_optimizer):
        with speedups.autocast(net, x.device, args.amp):
            logits, logits_aux = net(x)
        loss, total = utils.criterion(logits, logits_aux, y, args)
        arch_optimizer.zero_grad()
        total.backward()
    distributed.average_gradients(utils.parameters_of(arch_optimizer))
    arch_optimizer.step()
    return loss.detach(), logits.detach()


def weight_step(net, x, y, weight_optimizer, arch_optimizer, args):
    """Update the weights; compute no gradients of b."""
    with utils.no_gradients_of(arch_optimizer):
        with speedups.autocast(net, x.device, args.amp):
            logits, logits_aux = net(x)
        loss, total = utils.criterion(logits, logits_aux, y, args)
        weight_optimizer.zero_grad()
        total.backward()
    clip_grad_norm_(utils.parameters_of(weight_optimizer), args.grad_clip)
    weight_optimizer.step()  # skips operations that did not run, as they have no gradient
    return loss.detach(), logits.detach()


def one_stage_step(net, x, y, weight_optimizer, arch_optimizer, args):
    """Update b and the weights, with the gradients of the same backward pass."""
    with speedups.autocast(net, x.device, args.amp):
        logits, logits_aux = net(x)
    loss, total = utils.criterion(logits, logits_aux, y, args)
    arch_optimizer.zero_grad()
    weight_optimizer.zero_grad()
    total.backward()
    distributed.average_gradients(utils.parameters_of(arch_optimizer))
    arch_optimizer.step()  # skips frozen points, as they have no gradient
    clip_grad_norm_(utils.parameters_of(weight_optimizer), args.grad_clip)
    weight_optimizer.step()
    return loss.detach(), logits.detach()


def two_stage_epoch(
    net, batches, arch_batches, weight_optimizer, arch_optimizer, run, graphs_enabled=False, steps=0
):
    """Update b on a batch of one half of the images, then the weights on a batch of the other.

    `net` averages the gradients of the weights over the ranks. `steps` counts those of earlier
    epochs. Returns losses and accuracies of both halves, and the last recovery within the epoch.
    """
    args, module = run.args, distributed.unwrapped(net)
    device = next(module.parameters()).device
    meter, arch_meter, recovered = utils.Meter(device), utils.Meter(device), {}
    graphs = StepGraphs(module, graphs_enabled, run.warn)
    net.train()
    for (x, y), (x_arch, y_arch) in zip(batches, arch_batches.endless(), strict=False):
        loss, logits = graphs.run(
            arch_step, module, x_arch, y_arch, weight_optimizer, arch_optimizer, args
        )
        arch_meter.add(loss, logits, y_arch)
        loss, logits = graphs.run(weight_step, net, x, y, weight_optimizer, arch_optimizer, args)
        meter.add(loss, logits, y)
        steps += 1
        if args.recover_every != "epoch" and steps % args.recover_every == 0:
            recovered = recover(module, args)
        run.progress.step(meter)
    distributed.average_statistics(module)
    metrics = utils.name_metrics(meter.read(), "train")
    arch_metrics = utils.name_metrics(arch_meter.read(), "arch")
    return {**metrics, **arch_metrics, **recovered}


def one_stage_epoch(net, batches, weight_optimizer, arch_optimizer, run, graphs_enabled=False):
    """Update b and the weights on each batch; return loss and accuracy."""
    module = distributed.unwrapped(net)
    meter = utils.Meter(next(module.parameters()).device)
    graphs = StepGraphs(module, graphs_enabled, run.warn)
    net.train()
    for x, y in batches:
        loss, logits = graphs.run(
            one_stage_step, net, x, y, weight_optimizer, arch_optimizer, run.args
        )
        meter.add(loss, logits, y)
        run.progress.step(meter)
    distributed.average_statistics(module)
    return utils.name_metrics(meter.read(), "train")


# ------------------------------------------------------------------------------------------------
# Setup
# ------------------------------------------------------------------------------------------------


def load_batches(run, device, generator, memory_format):
    """Return batches that train the weights, batches that train b (or None), and for evaluation."""
    args = run.args
    weight_images, arch_images, eval_images = load_images(run, device)
    options = dict(distributed.rank_and_size(), generator=generator, memory_format=memory_format)
    training = dict(options, train=True, cutout_length=args.cutout_length if args.cutout else 0)
    batches = weight_images.batches(args.batch_size, **training)
    arch_batches = None
    if arch_images is not None:
        arch_batches = arch_images.batches(args.batch_size, **training)
    eval_batch = utils.evaluation_batch(args, device)
    return batches, arch_batches, eval_images.batches(eval_batch, train=False, **options)


def load_images(run, device):
    """Return the images that train the weights, those that train b, and those for evaluation.

    In two-stage search, the images of b are also those for evaluation. In one-stage search all
    images train the weights and b, so the second item is None, and the third are the test images.
    """
    args = run.args
    reader = imagenet if args.dataset == "imagenet" else data
    with distributed.rank_zero_first():
        train, test = reader.load(
            args.dataset, args.data, args.image_size, device, args.workers, run.log
        )
    run.check_data(train)
    if args.one_stage:
        parts = train, None, test
        run.log(f"{args.dataset}: {len(train)} images train the weights and b; {len(test)} test "
                "images are evaluated for the log only")
    else:
        halves = data.split(train.labels, args.train_portion, args.seed)
        weight_half, arch_half = (train.subset(half) for half in halves)
        parts = weight_half, arch_half, arch_half
        run.log(f"{args.dataset}: {len(weight_half)} images train the weights, {len(arch_half)} "
                "others train b; valid loss and accuracy are measured on the latter, without "
                "augmentation")
    published = published_setting(vars(args))
    if not run.checkpoint:
        smallest = min(len(part) for part in parts[:2] if part is not None)
        flags.fit_to_data(args, smallest, published, distributed.world_size(), run.log)
    run.log(f"device: {device}")
    if args.layers < 3:
        run.warn("a network with fewer than 3 layers has no normal cell, so none is searched")
    if device.type == "cpu" and args.init_channels >= published["init_channels"]:
        run.log("without a CUDA device, the published two-stage search takes hours, and the "
                "one-stage search weeks; reduce --init_channels and --layers")
    return parts


def supernet(args, num_classes):
    """Build the supernet, after a check of edited operations and cells."""
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
    """SGD for the weights, and Adam for b."""
    weight_optimizer = utils.sgd(net.weight_parameters(), args)
    arch_optimizer = torch.optim.Adam(
        net.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=args.arch_weight_decay, fused=True, capturable=net.normal_code.A0.is_cuda,
    )
    return weight_optimizer, arch_optimizer


def columns(args, name):
    """Columns of the log: heading, and format string for the row of an epoch."""
    pairs = 2 * genotypes.NODES * args.sparseness
    return {
        "lr": "{learning_rate:.4f}", "train loss": "{train_loss:.3f}",
        "train %": "{train_accuracy:.2f}", f"{name} loss": "{" + name + "_loss:.3f}",
        f"{name} %": "{" + name + "_accuracy:.2f}", "changed": f"{{changed}}/{pairs}",
    }


# ------------------------------------------------------------------------------------------------
# Between epochs
# ------------------------------------------------------------------------------------------------


def recover(net, args, **limits):
    """Recover the codes from b; return `model_search.Recovery` as a dict."""
    if not all(b.isfinite().all() for b in net.arch_parameters()):
        raise utils.Diverged("an architecture parameter b is not finite")
    # Use rank 0's codes on all ranks, because rounding may differ.
    return net.recover(args.solver, broadcast=distributed.from_rank_zero, **limits)._asdict()


def schedule(args, epoch, phase, trained):
    """Factor of the initial learning rate, and drop-path probability, of the next epoch."""
    linear = args.one_stage and args.dataset == "imagenet"
    if phase == "searching":
        factor = utils.warm_up(epoch) if linear else 1.0
        return factor, 0.0
    if linear:
        factor = utils.linear_with_warm_up(trained, args.epochs)
    else:
        low = args.learning_rate_min / args.learning_rate
        factor = utils.cosine(trained, args.epochs, low)
    return factor, args.drop_path_prob * trained / args.epochs


def fix_architecture(run, net, weight_optimizer):
    """End the searching phase of one-stage search, and delete the idle operations."""
    if not all(net.frozen):
        run.warn(f"{net.frozen.count(False)} of {len(net.frozen)} nodes have not converged within "
                 "--max_search_epochs; the current architecture is used")
        net.freeze()
    deleted = net.prune()
    utils.remove_parameters(weight_optimizer, deleted)
    count = sum(p.numel() for p in deleted) / 1e6
    kept = net.count_retraining_parameters() / 1e6  # as train.py counts them
    run.log(f"the architecture is fixed; idle operations with {count:.3f} M parameters are "
            f"deleted, {kept:.3f} M remain")
    if run.args.max_params is not None and kept >= run.args.max_params:
        run.warn(f"this exceeds --max_params {run.args.max_params:g}: no candidate was smaller")
    if run.args.compile:
        speedups.compile_network(net, is_fixed=True, log=run.log)
    if run.args.drop_path_prob:
        run.log(f"from here on drop-path rises to {run.args.drop_path_prob:g}, which lowers the "
                "training accuracy, and the learning rate decreases")
    if run.args.dataset == "imagenet":
        run.log(f"from here on the learning rate warms up again for {utils.WARM_UP} epochs, and "
                "then decreases")


def log_recovery(run, row, epoch):
    """Log the problems of a recovery and, in one-stage search, how far the nodes have converged.

    `row` holds the items of `model_search.Recovery` if there was a recovery after `epoch`; epoch 0
    is the start.
    """
    args = run.args
    nodes = [f"{cell} node {j}" for cell in ("normal", "reduce")
             for j in range(2, 2 + genotypes.NODES)]
    if row.get("not_converged"):
        run.warn(f"solver {args.solver} leaves a relative duality gap above {ista.TOLERANCE:g} in "
                 f"some codes ({row['not_converged']} of {len(nodes)} in this recovery); homotopy "
                 "solves these instead", "solver")
    if row.get("lam_max") and max(row["lam_max"]) <= args.lam:
        text = (f"all codes are 0, because --lam {args.lam:g} is not below the largest λ_max, "
                f"{max(row['lam_max']):.1e}")
        if epoch:
            raise utils.UserError(f"{text}, after epoch {epoch}: give a smaller --lam")
        run.warn(f"{text}; the search ends if this is still so after an epoch", "zero")
    elif any(row.get("too_sparse", [])):
        texts = [
            f"{node} (λ_max {lam_max:.1e})"
            for node, too_sparse, lam_max in zip(
                nodes, row["too_sparse"], row["lam_max"], strict=True)
            if too_sparse
        ]
        run.warn(f"with --lam {args.lam:g} the codes of some nodes have fewer than "
                 f"{args.sparseness} nonzero entries, so these nodes keep pairs of their previous "
                 f"support and do not freeze; try a smaller --lam: {', '.join(texts)}", "sparse")
    if row.get("parameters"):  # one-stage search
        rejected = ""
        if row["rejected"]:
            rejected = f", rejected by --max_params {args.max_params:g}: the previous one is kept"
        run.log(f"    {row['frozen'].count(True)} of {len(nodes)} nodes are frozen; the new "
                f"architecture has {row['parameters'] / 1e6:.3f} M parameters{rejected}")
        texts = []
        for frozen, distance in zip(row["frozen"], row["distance"], strict=True):
            text = f"{distance:.1e}"
            if frozen:
                text = f"{text}→frozen" if distance else "frozen"
            texts.append(text)
        run.log(f"    change of the normal codes: {' '.join(texts[:genotypes.NODES])}")
        run.log(f"    change of the reduce codes: {' '.join(texts[genotypes.NODES:])}")


def log_changes(run, before, genotype, epoch):
    """Log the pairs that changed, and warn of cells with many skip connections."""
    changed = genotypes.changed_pairs(before, genotype)
    if changed:
        run.log("\n".join(f"    {text}" for text in changed))
        run.show_figure("cells", lambda: visualize.cells_figure(genotype), epoch)
    for cell in ("normal", "reduce"):
        pairs = getattr(genotype, cell)
        skips = sum(operation == "skip_connect" for operation, _ in pairs)
        if 2 * skips >= len(pairs):
            run.warn(f"{skips} of {len(pairs)} pairs of the {cell} cell are skip_connect",
                     f"skips {cell}")


# ------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------


def save_genotype(run, net, row):
    """Write genotype.json."""
    args = run.args
    run.save_genotype(
        net.genotype(), args.one_stage,
        method=f"ISTA-NAS {'one' if args.one_stage else 'two'}-stage search",
        distinct_edges=args.distinct_edges, dictionary=args.dictionary, seed=args.seed,
        dataset=args.dataset, result=row,
    )


def finish(run, net, images, eval_batches, row):
    """Log the genotype and the next commands; in one-stage search, save the trained network."""
    args = run.args
    save_genotype(run, net, row)  # a resumed run may have ended before
    run.draw(visualize.draw_run)
    run.log(f"the search is done: genotype = {net.genotype()}", wrap=False)
    if not args.one_stage:
        run.log("to train it from scratch at the published size (for a smaller network add "
                "--init_channels, --layers, --epochs):")
        arch = shlex.quote(run.file("genotype.json"))
        run.log(f"    python train.py --arch {arch}{flags.data_flags(args)}"
                f"{flags.cutout_flag(args)}", wrap=False)
        return
    absorbed = net.absorb()
    _, before = utils.evaluate(net, eval_batches, args.amp)
    _, after = utils.evaluate(absorbed, eval_batches, args.amp)
    run.log(f"test accuracy {before:.2f} % in the supernet, {after:.2f} % after absorption")
    run.save_network("network.pt", absorbed, epoch=row["epoch"], test_accuracy=after,
                     **run.describe(images))
    run.log("the trained network is in network.pt; to evaluate it, and to train it further:")
    weights = shlex.quote(run.file("network.pt"))
    amp = " --amp" if args.amp else ""
    run.log(f"    python train.py --evaluate --weights {weights}{amp}", wrap=False)
    run.log(f"    python train.py --weights {weights}{flags.cutout_flag(args)}", wrap=False)


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


def published_setting(typed):
    """The published setting that the typed flags select."""
    if typed.get("dataset") == "imagenet":
        return ONE_STAGE_IMAGENET if typed.get("one_stage") else TWO_STAGE_IMAGENET
    return ONE_STAGE if typed.get("one_stage") else TWO_STAGE


def get_args_parser():
    parser = flags.Parser("search.py", __doc__, published_setting, check)
    flags.add_common_flags(parser, [*data.DATASETS, "imagenet"])

    group = parser.add_argument_group("architecture")
    parser.add_switch(group, "one_stage", "search at the target size, and train in the same run",
                  default=False)
    group.add_argument(
        "--arch_learning_rate", type=flags.number(0), metavar="LR",
        help="learning rate of Adam on b")
    group.add_argument(
        "--arch_weight_decay", type=flags.number(0), default=1e-3, metavar="L2",
        help="weight decay of Adam on b")
    group.add_argument(
        "--proj_dims", type=flags.integer(1, 1000), default=7, metavar="M",
        help="m, the length of b")
    group.add_argument(
        "--sparseness", type=flags.integer(1), default=2, metavar="S",
        help="s, the number of active (edge, operation) pairs of a node")
    parser.add_switch(group, "distinct_edges", "choose at most one operation per edge",
                  default=False)
    group.add_argument(
        "--lam", type=flags.number(0, open_low=True), default=1e-5, metavar="LAMBDA",
        help="λ, the weight of the l1 norm in the LASSO problem")
    group.add_argument(
        "--dictionary", default="uniform", metavar="NAME", choices=[*DICTIONARIES],
        help="distribution of A: uniform on [0, 1), as in the released code; or normal, as "
        "reported for the paper, with columns scaled to norm 1 (our choice)")
    group.add_argument(
        "--solver", default="homotopy", metavar="NAME", choices=[*ista.SOLVERS],
        help=f"solver of the LASSO problem: {', '.join(ista.SOLVERS)}")

    group = parser.add_argument_group("two-stage search")
    group.add_argument(
        "--train_portion", type=flags.number(0, 1, open_low=True), default=0.5, metavar="P",
        help="fraction of the training images that train the weights; the others train b")
    group.add_argument(
        "--recover_every", type=recovery_interval, default="epoch", metavar="{epoch,STEPS}",
        help="recover the codes after each epoch, or after this number of steps")

    group = parser.add_argument_group("one-stage search (--epochs follow the searching phase)")
    group.add_argument(
        "--freeze_tol", type=flags.number(0), default=1e-3, metavar="TOL",
        help="freeze a node when its code changes by at most this (l2 norm) between two epochs")
    group.add_argument(
        "--max_params", type=flags.number(0, open_low=True), metavar="MILLIONS",
        help="reject architectures with this number of parameters or more")
    group.add_argument(
        "--max_search_epochs", type=flags.integer(1), default=600, metavar="EPOCHS",
        help="end the searching phase after this number of epochs at the latest")
    parser.show_defaults({
        "two-stage": TWO_STAGE, "two-stage imagenet": TWO_STAGE_IMAGENET,
        "one-stage": ONE_STAGE, "one-stage imagenet": ONE_STAGE_IMAGENET,
    })
    return parser


def recovery_interval(text):
    return text if text == "epoch" else flags.integer(1)(text)


# Flags of only one of the searches; typing them for the other is an error.
ONE_STAGE_ONLY = (
    "freeze_tol", "max_params", "max_search_epochs", "auxiliary", "auxiliary_weight",
    "drop_path_prob",
)
TWO_STAGE_ONLY = ("train_portion", "recover_every")


def check(args):
    """Raise UserError if flags cannot be right."""
    flags.check_common_flags(args)
    if args.resume:  # the other flags come from the checkpoint
        return
    search, without_effect = "two-stage", ONE_STAGE_ONLY
    if args.one_stage:
        search, without_effect = "one-stage", TWO_STAGE_ONLY
    for name in without_effect:
        if name in args.typed:
            raise utils.UserError(f"--{name} has no effect in {search} search: leave it out")
    if args.sparseness > args.proj_dims:
        raise utils.UserError(
            f"--sparseness {args.sparseness} is larger than --proj_dims {args.proj_dims}, the "
            "largest number of nonzero entries of a code"
        )
    pairs = 2 if args.distinct_edges else 2 * len(genotypes.PRIMITIVES)
    if args.sparseness > pairs:
        raise utils.UserError(f"--sparseness {args.sparseness}: the first node has only {pairs} "
                              f"{'edges' if args.distinct_edges else 'pairs'} to choose from")
    if args.dataset == "imagenet":
        flags.check_imagenet(args, linear=args.one_stage)


if __name__ == "__main__":
    with runs.command("search.py"):
        main(get_args_parser().parse_args())
