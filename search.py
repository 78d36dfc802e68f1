"""Search a cell by sparse coding (ISTA-NAS), in two stages or in one.

    python search.py                                          # published two-stage search, CIFAR-10
    python search.py --one_stage --cutout --auxiliary         # published one-stage search
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

import arguments
import genotypes

# The published settings, a column each.
TWO_STAGE = dict(
    init_channels=16, layers=8, batch_size=256, epochs=50, seed=2,
    learning_rate=0.1, learning_rate_min=0.001, weight_decay=3e-4, arch_learning_rate=6e-4,
    auxiliary=False, cutout=False, drop_path_prob=0.0,
)  # fmt: skip
ONE_STAGE = dict(
    init_channels=36, layers=20, batch_size=96, epochs=600, seed=5,
    learning_rate=0.025, learning_rate_min=0.001, weight_decay=3e-4, arch_learning_rate=3e-4,
    auxiliary=True, cutout=True, drop_path_prob=0.2,
)  # fmt: skip


RESTLESS = 20  # epochs in a row with a change of support, from which on it is worth a warning


def get_args_parser():
    parser = arguments.Parser(prog="search.py", description=__doc__)
    arguments.add_shared(parser)

    group = parser.add_argument_group("architecture")
    arguments.switch(group, "one_stage", "search at the target size, in one run with the training")
    parser.set_defaults(one_stage=False)
    group.add_argument(
        "--arch_learning_rate", type=arguments.real(0), metavar="LR", help="of Adam on b",
    )  # fmt: skip
    group.add_argument(
        "--arch_weight_decay", type=arguments.real(0), default=1e-3, metavar="L2",
        help="of Adam on b",
    )  # fmt: skip
    group.add_argument(
        "--proj_dims", type=arguments.whole(1), default=7, metavar="M", help="m, the length of b"
    )
    group.add_argument(
        "--sparseness", type=arguments.whole(1), default=2, metavar="S",
        help="s, the (edge, operation) pairs that each node keeps",
    )  # fmt: skip
    group.add_argument(
        "--lam", type=arguments.real(0, open_low=True), default=1e-5, help="λ"
    )
    group.add_argument(
        "--solver", default="homotopy", metavar="NAME",
        choices=["homotopy", "ista", "fista", "mosek", "clarabel"],
        help="homotopy (exact), ista, fista, mosek or clarabel",
    )  # fmt: skip

    group = parser.add_argument_group("two-stage search")
    group.add_argument(
        "--train_portion", type=arguments.real(0, 1, open_low=True), default=0.5, metavar="P",
        help="part of the training images for the weights; the rest is for b",
    )  # fmt: skip
    group.add_argument(
        "--recover_every", type=recovery_interval, default="epoch", metavar="{epoch,STEPS}",
        help="recover codes after each epoch, or after so many steps",
    )  # fmt: skip

    group = parser.add_argument_group("one-stage search")
    group.add_argument(
        "--freeze_tol", type=arguments.real(0), default=1e-3, metavar="TOL",
        help="a node freezes when its code moves by no more than this",
    )  # fmt: skip
    group.add_argument(
        "--max_params", type=arguments.real(0, open_low=True), default=3.7, metavar="MILLIONS",
        help="architectures with as many parameters or more are rejected",
    )  # fmt: skip
    group.add_argument(
        "--max_search_epochs", type=arguments.whole(1), default=600, metavar="EPOCHS",
        help="then the last architecture is taken, at rest or not",
    )  # fmt: skip
    parser.show_defaults(two_stage=TWO_STAGE, one_stage=ONE_STAGE)
    return parser


def recovery_interval(text):
    """Type of --recover_every: "epoch", or a number of steps."""
    return text if text == "epoch" else arguments.whole(1)(text)


def published(typed):
    """The published setting of the search that the typed flags ask for."""
    return ONE_STAGE if typed.get("one_stage") else TWO_STAGE


def check(args):
    """Raise ValueError on flags that cannot be right, before anything is loaded."""
    arguments.check_shared(args)
    pairs = 2 * len(genotypes.PRIMITIVES)
    if args.sparseness > pairs:
        raise ValueError(f"--sparseness {args.sparseness}: the first node has only {pairs} pairs")
    if args.one_stage and args.recover_every != "epoch":
        raise ValueError("--recover_every: one-stage search compares the codes of whole epochs")
    if not args.one_stage and args.auxiliary:
        raise ValueError("--auxiliary: the supernet of two-stage search has no auxiliary head")
    if not args.one_stage and args.drop_path_prob:
        raise ValueError("--drop_path_prob: two-stage search trains without drop-path")


if __name__ == "__main__":  # before torch is imported, so that a typing error is answered at once
    parser = get_args_parser()
    args = parser.parse_args(published=published, check=check)

import shlex  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.utils import clip_grad_norm_  # noqa: E402

import data  # noqa: E402
import distributed  # noqa: E402
import runs  # noqa: E402
import utils  # noqa: E402
from model_search import Network  # noqa: E402


def main(args):
    # --------------------------------------------------------------------------------------------
    # Data, supernet, optimizers
    # --------------------------------------------------------------------------------------------
    checkpoint = None
    if args.resume:
        checkpoint, args = distributed.first_before_others(lambda: runs.resume(args, "search"))
    device = utils.choose_device(args.device, args.amp)
    memory_format = utils.memory_format(device, args.amp)
    utils.seed_everything(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)

    def batches(images, training=True):
        return data.Batches(
            images, args.batch_size, train=training, generator=generator,
            channels_last=memory_format is torch.channels_last, part=distributed.part(),
            cutout_length=args.cutout_length if args.cutout else 0,
        )  # fmt: skip

    notes = []
    train, test = distributed.first_before_others(lambda: data.load(
        args.dataset, args.data, args.image_size, device, args.workers, log=notes.append
    ))  # fmt: skip
    if args.one_stage:
        if not checkpoint:
            notes += utils.fit_to_data(args, len(train))
        train_batches, arch_batches = batches(train), None
        held_out, held_out_batches = "test", batches(test, training=False)
        notes.append(
            f"{args.dataset}: {len(train)} images train the weights and b; the {len(test)} test "
            "images are measured for the log alone"
        )
    else:
        halves = data.split(train.labels, args.train_portion, args.seed)
        weight_half, arch_half = (train.subset(half) for half in halves)
        if not checkpoint:
            notes += utils.fit_to_data(args, min(len(weight_half), len(arch_half)))
        train_batches, arch_batches = batches(weight_half), batches(arch_half)
        held_out, held_out_batches = "valid", batches(arch_half, training=False)
        notes.append(
            f"{args.dataset}: {len(weight_half)} images train the weights, {len(arch_half)} others "
            "train b; these, not augmented, give the valid loss and accuracy"
        )

    net = Network(
        args.init_channels, len(train.classes), args.layers,
        one_stage=args.one_stage, auxiliary=args.auxiliary,
        proj_dims=args.proj_dims, sparseness=args.sparseness, lam=args.lam,
    ).to(device, memory_format=memory_format)  # fmt: skip
    utils.seed_drop_path(args.seed)
    if checkpoint:
        net.load_state_dict(checkpoint["net"])
    weight_optimizer = torch.optim.SGD(
        net.weight_parameters(), args.learning_rate, args.momentum,
        weight_decay=args.weight_decay, foreach=True,
    )  # fmt: skip
    arch_optimizer = torch.optim.Adam(
        net.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=args.arch_weight_decay, fused=True,
    )  # fmt: skip

    # --------------------------------------------------------------------------------------------
    # A new run, or an old one from where it stopped
    # --------------------------------------------------------------------------------------------
    # The schedule of learning rate and drop-path begins after `schedule_start` epochs: at once,
    # or in one-stage search when all nodes are frozen. Until then it is None.
    if checkpoint:
        epoch, schedule_start = checkpoint["epoch"], checkpoint["schedule_start"]
        row = checkpoint["row"]
        weight_optimizer.load_state_dict(checkpoint["weight_optimizer"])
        arch_optimizer.load_state_dict(checkpoint["arch_optimizer"])
        notes += utils.set_random_state(checkpoint["random"], generator, args.seed, epoch)
        run = runs.Run.resume(args, checkpoint)
    else:
        epoch, schedule_start = 0, None if args.one_stage else 0
        first = net.recover(args.solver)  # says at once if the solver cannot be used
        run = runs.Run.create(args, "search")
        run.log(f"new run in {run.path}")
        report(run, args, [first])
    for note in [*notes, f"device: {device}"]:
        run.log(note)
    if args.layers < 3:
        run.warn_once("with fewer than 3 layers there is no normal cell, so it is not searched")
    if device.type == "cpu":
        run.log(
            "there is no CUDA device: a small CPU takes about a day for the published two-stage "
            "search, and weeks for the one-stage one; fewer --init_channels and --layers help"
        )
    columns = ["epoch", "lr", "train loss", "train acc", f"{held_out} loss", f"{held_out} acc",
               "pairs changed", "memory", "time", "left"]  # fmt: skip
    run.log(utils.table_row(columns))

    # --------------------------------------------------------------------------------------------
    # The epochs
    # --------------------------------------------------------------------------------------------
    while schedule_start is None or epoch < schedule_start + args.epochs:
        began = time.time()
        name, learning_rate, net.drop_path_prob = schedule(args, epoch, schedule_start)
        utils.set_learning_rate(weight_optimizer, learning_rate)
        epoch += 1
        row = dict(epoch=epoch, learning_rate=learning_rate, drop_path_prob=net.drop_path_prob)

        last_epoch = args.epochs + (epoch if schedule_start is None else schedule_start)
        with utils.Epoch(
            run, name, train_batches, learning_rate, args.report_freq, last_epoch - epoch
        ) as progress:
            net.train()
            if args.one_stage:
                recoveries = []
                meter = one_stage_epoch(
                    net, train_batches, weight_optimizer, arch_optimizer, args, progress
                )
            else:
                meter, arch_meter, recoveries = two_stage_epoch(
                    net, train_batches, arch_batches, weight_optimizer, arch_optimizer, args,
                    progress, steps_before=(epoch - 1) * len(train_batches),
                )  # fmt: skip
                row["arch_loss"], row["arch_accuracy"] = arch_meter.read()
            distributed.average_statistics(net)
            row["train_loss"], row["train_accuracy"] = meter.read()
            loss, accuracy = utils.evaluate(net, held_out_batches, args.amp)
            row[f"{held_out}_loss"], row[f"{held_out}_accuracy"] = loss, accuracy

            # The architecture of the next epoch
            if args.one_stage and schedule_start is None:
                recoveries.append(net.recover(args.solver, args.freeze_tol, args.max_params))
                if all(net.frozen) or epoch == args.max_search_epochs:
                    schedule_start = epoch
            elif not args.one_stage and args.recover_every == "epoch":
                recoveries.append(net.recover(args.solver))
            row.update(recoveries[-1]._asdict() if recoveries else {})
            row["changed"] = sum(recovery.changed for recovery in recoveries)

            # Log and checkpoint
            row["seconds"] = time.time() - began
            row["peak_memory_gib"] = utils.peak_memory(device)
            at_least = "> " if schedule_start is None else ""
            run.log(utils.table_row(columns, [
                name, f"{learning_rate:.4f}",
                f"{row['train_loss']:.3f}", f"{row['train_accuracy']:.2f} %",
                f"{loss:.3f}", f"{accuracy:.2f} %", f"{row['changed']} of {8 * args.sparseness}",
                f"{row['peak_memory_gib']:.2f} GiB", utils.duration(row["seconds"]),
                at_least + utils.duration(row["seconds"] * (last_epoch - epoch)),
            ]))  # fmt: skip
            report(run, args, recoveries)
            watch(run, net.genotype(), recoveries)
            if args.one_stage and schedule_start == epoch:
                settle(run, net, weight_optimizer)
                row["frozen"] = net.frozen
            run.log(f"genotype = {net.genotype()}")
            run.append("metrics.jsonl", row)
            run.append("genotypes.jsonl", {"epoch": epoch, **net.describe()})
            run.show(row, net.genotype())
            save_genotype(run, args, net, row)
            run.save_checkpoint({
                "kind": "search", "version": arguments.__version__, "args": runs.plain(args),
                "epoch": epoch, "schedule_start": schedule_start, "row": row,
                "net": net.state_dict(),
                "weight_optimizer": weight_optimizer.state_dict(),
                "arch_optimizer": arch_optimizer.state_dict(),
                "random": utils.random_state(generator),
            })  # fmt: skip

    # --------------------------------------------------------------------------------------------
    # What came out, and what to do with it
    # --------------------------------------------------------------------------------------------
    save_genotype(run, args, net, row)
    run.draw()
    run.log(f"the search is done: genotype = {net.genotype()}")
    if args.one_stage:
        plain = net.absorb()
        _, before = utils.evaluate(net, held_out_batches, args.amp)
        _, after = utils.evaluate(plain, held_out_batches, args.amp)
        run.log(f"test accuracy {before:.2f} % in the supernet, {after:.2f} % after absorption")
        about = dict(epoch=epoch, test_accuracy=after)
        run.save_network("network.pt", plain, args, about)
        run.log("the trained network is in network.pt; to measure it, and to train it further:")
        weights = shlex.quote(run.file("network.pt"))
        run.log(f"    python train.py --evaluate --weights {weights}")
        run.log(f"    python train.py --weights {weights}")
    else:
        run.log("to train it from scratch, at the published size unless flags say otherwise:")
        arch = shlex.quote(run.file("genotype.json"))
        run.log(f"    python train.py --arch {arch}{utils.data_flags(args)}")


# ------------------------------------------------------------------------------------------------
# One epoch of each search
# ------------------------------------------------------------------------------------------------


def two_stage_epoch(
    net, batches, arch_batches, weight_optimizer, arch_optimizer, args, progress, steps_before
):
    """At each step first b, on a batch of one half of the images, then the weights, on the other.

    Returns
    -------
    meter, arch_meter : utils.Meter
        Losses and accuracies on the batches of the weights, and on those of b.
    recoveries : list of model_search.Recovery
        Those of --recover_every STEPS.
    """
    weights, points = net.weight_parameters(), net.arch_parameters()
    device = weights[0].device
    meter, arch_meter = utils.Meter(device), utils.Meter(device)

    def averaged():
        """The network for the steps on b, and for those on the weights, until the next recovery."""
        train_only(points, weights)
        net_for_b = distributed.averaged(net)
        train_only(weights, points)
        return net_for_b, distributed.averaged(net, net.idle_parameters())

    recoveries = []
    net_for_b, net_for_weights = averaged()
    pairs = zip(batches, arch_batches.endless(), strict=False)
    for step, ((x, y), (x_arch, y_arch)) in enumerate(pairs, steps_before + 1):
        # b, with the weights as they are: no gradient of a weight is computed.
        train_only(points, weights)
        with utils.autocast(device, args.amp):
            logits, _ = net_for_b(x_arch)
        loss = F.cross_entropy(logits.float(), y_arch)
        arch_optimizer.zero_grad()
        loss.backward()
        arch_optimizer.step()
        arch_meter.add(loss, logits, y_arch)

        # The weights, with b as it is now.
        train_only(weights, points)
        with utils.autocast(device, args.amp):
            logits, _ = net_for_weights(x)
        loss = F.cross_entropy(logits.float(), y)
        weight_optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(weights, args.grad_clip)
        weight_optimizer.step()
        meter.add(loss, logits, y)

        if args.recover_every != "epoch" and step % args.recover_every == 0:
            recoveries.append(net.recover(args.solver))
            net_for_b, net_for_weights = averaged()
        progress.step(meter)
    return meter, arch_meter, recoveries


def one_stage_epoch(net, batches, weight_optimizer, arch_optimizer, args, progress):
    """At each step b and the weights move by the gradients of the same backward pass.

    Returns
    -------
    utils.Meter
    """
    weights = net.weight_parameters()
    device = weights[0].device
    meter = utils.Meter(device)
    net = distributed.averaged(net, net.idle_parameters())
    for x, y in batches:
        with utils.autocast(device, args.amp):
            logits, logits_aux = net(x)
        loss, total = utils.losses(logits, logits_aux, y, args.auxiliary_weight)
        arch_optimizer.zero_grad()
        weight_optimizer.zero_grad()
        total.backward()
        arch_optimizer.step()  # frozen points have no gradient, so Adam leaves them alone
        clip_grad_norm_(weights, args.grad_clip)
        weight_optimizer.step()
        meter.add(loss, logits, y)
        progress.step(meter)
    return meter


def train_only(trained, fixed):
    """Have gradients computed for some parameters and not for others."""
    for p in trained:
        p.requires_grad_(True)
    for p in fixed:
        p.requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# Between epochs
# ------------------------------------------------------------------------------------------------


def schedule(args, epoch, schedule_start):
    """Name, learning rate and drop-path probability of the epoch after `epoch` epochs."""
    if schedule_start is None:
        return f"search {epoch + 1}", args.learning_rate, 0.0
    done = epoch - schedule_start
    learning_rate = utils.cosine(done, args.epochs, args.learning_rate, args.learning_rate_min)
    name = f"{'train ' if args.one_stage else ''}{done + 1}/{args.epochs}"
    return name, learning_rate, args.drop_path_prob * done / args.epochs


def settle(run, net, weight_optimizer):
    """End the search of a one-stage run: the architecture is fixed, and the rest is dropped."""
    if not all(net.frozen):
        moving = net.frozen.count(False)
        run.log(f"warning: {moving} of 8 nodes still moved in the last epoch of the search; the "
                "last architecture is taken (--max_search_epochs)")  # fmt: skip
        net.freeze([True] * 8)
    dropped = net.prune()
    utils.forget(weight_optimizer, dropped)
    freed = sum(p.numel() for p in dropped)
    kept = net.retraining_parameters()  # as train.py counts them
    run.log(f"the architecture is fixed; the operations outside it are dropped, which frees "
            f"{freed / 1e6:.3f} M parameters and leaves {kept / 1e6:.3f} M")  # fmt: skip


def report(run, args, recoveries):
    """Log what the recoveries of an epoch call for: solver trouble, and how far the nodes are."""
    failed = sum(recovery.not_converged for recovery in recoveries)
    if failed:
        run.warn_once(f"solver {args.solver} does not converge on some codes (first on {failed}); "
                      "homotopy solves those")  # fmt: skip
    if recoveries and recoveries[-1].parameters:  # one-stage search: how near the end is
        last = recoveries[-1]
        nodes = [
            "frozen" if frozen and not distance else f"{distance:.1e}" + "→frozen" * frozen
            for frozen, distance in zip(last.frozen, last.distance, strict=True)
        ]
        size = f"{last.parameters / 1e6:.3f} M parameters"
        if last.rejected:
            size += f", rejected: --max_params is {args.max_params:g}"
        normal, reduction = " ".join(nodes[:4]), " ".join(nodes[4:])
        run.log(f"    searching {last.frozen.count(False)} of 8 nodes; codes moved by {normal} "
                f"(normal), {reduction} (reduction); {size}")  # fmt: skip


def watch(run, genotype, recoveries):
    """Warn of what has spoilt searches before: skips that take over, codes that find no rest."""
    for cell in ("normal", "reduce"):
        pairs = getattr(genotype, cell)
        skips = sum(operation == "skip_connect" for operation, _ in pairs)
        if 2 * skips >= len(pairs):
            run.warn_once(f"{skips} of {len(pairs)} pairs of the {cell} cell are skip_connect")
    run.restless = run.restless + 1 if any(r.changed for r in recoveries) else 0
    if run.restless >= RESTLESS:
        run.warn_once(f"some pair has changed in each of the last {RESTLESS} epochs; a smaller "
                      "--arch_learning_rate or more epochs may bring it to rest")  # fmt: skip


def save_genotype(run, args, net, row):
    run.save_genotype(
        net.genotype(), args.one_stage,
        method=f"ISTA-NAS {'one' if args.one_stage else 'two'}-stage search",
        seed=args.seed, dataset=args.dataset, result=row, arguments=runs.plain(args),
    )  # fmt: skip


if __name__ == "__main__":
    with utils.command("search.py"):
        main(args)
