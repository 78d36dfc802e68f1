"""Do searched cells beat random ones? Search, train and compare, with one recipe for all.

    python experiments/evidence.py --save runs/evidence --dataset imagefolder --data DIR
    python experiments/evidence.py --save runs/evidence        # go on, or show the result again

For each search seed it runs search.py, and train.py on the cell that comes out; train.py on as many
random cells (`--arch random:SEED`); and one-stage searches, whose cells it also trains from
scratch (with BatchNorm after pools and skips, as they were searched). All trainings have the same
flags and the same seed. The runs are folders of --save, and its flags.json has the flags. What is
there and done is not run again, and what was interrupted goes on, so this can be stopped and
started at will. The table goes to evidence.txt, its numbers to evidence.json, a picture to
evidence.png.

`--distinct_edges` searches, and draws random cells, with two different input nodes for each node.
Accuracies are those of the last epoch on the test images, which no search has seen.
"""

import functools
import json
import random
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import genotypes
import visualize
from harness.flags import Parser, fail, name, whole
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent

# The published learning rates are 0.1 for a batch of 256 (search) and 0.025 for one of 96
# (training, one-stage search). These are for batches of 64, by the linear rule.
SEARCH = "--init_channels 8 --layers 5 --batch_size 64 --learning_rate 0.025 --epochs 15"
TRAIN = ("--init_channels 8 --layers 5 --batch_size 64 --learning_rate 0.0167 --epochs 10 "
         "--no-auxiliary --no-cutout --drop_path_prob 0")
ONE_STAGE = f"{TRAIN} --max_search_epochs 10"
RANKABLE = 6  # cells: of fewer, a rank correlation says nothing


def get_args_parser():
    parser = Parser("evidence.py", __doc__)
    parser.usage = "evidence.py --save DIR [flags]"
    for flag, kind, default, metavar, help in (
        ("save", name, None, "DIR", "folder of all runs"),
        ("searches", whole(0), 8, "N", "search seeds"),
        ("random", whole(0), 8, "N", "random cells"),
        ("one_stage", whole(0), 1, "N", "seeds of one-stage searches"),
        ("search_flags", str, SEARCH, "FLAGS", "of search.py in every two-stage search"),
        ("train_flags", str, TRAIN, "FLAGS", "of train.py in every training"),
        ("one_stage_flags", str, ONE_STAGE, "FLAGS", "of search.py in every one-stage search"),
        ("data", name, "data", "DIR", "folder of the data set"),
        ("image_size", whole(4), 32, "PIXELS", "width and height that images are resized to"),
        ("jobs", whole(1), 1, "N", "runs at a time"),
    ):
        parser.add_argument(f"--{flag}", type=kind, default=default, metavar=metavar, help=help,
                            required=flag == "save")
    parser.add_argument("--dataset", default="digits", choices=[*data.DATASETS], metavar="NAME",
                        help=f"one of {', '.join(data.DATASETS)}")
    parser.add_argument("--images", type=whole(1), nargs=2, metavar=("TRAIN", "TEST"),
                        help="use so many images of --dataset imagefolder, the same of each class")
    parser.add_argument("--distinct_edges", action="store_true", default=False,
                        help="searches and random cells have at most one pair an edge")
    parser.show_defaults({})
    return parser


FREE = {"searches", "random", "one_stage", "jobs", "save"}  # given anew when it goes on


def recall(args):
    """The flags of an experiment that goes on, or those of a new one, which are kept."""
    path = args.save / "flags.json"
    if not path.exists():
        if any(args.save.iterdir()):
            raise UserError(f"--save {args.save} holds something else: give another folder")
        kept = {k: v for k, v in vars(args).items() if k not in FREE | {"typed"}}
        path.write_text(json.dumps(kept, indent=1))
        return
    kept = json.loads(path.read_text())
    for flag in {*args.typed} - FREE:
        value = getattr(args, flag)
        if kept.get(flag) != value:
            raise UserError(f"--{flag} {value} contradicts {path}, which has {kept.get(flag)}: "
                            "leave it out, or give another --save")
    vars(args).update(kept)


# ------------------------------------------------------------------------------------------------
# The runs
# ------------------------------------------------------------------------------------------------


def cells(args):
    """What is trained: its group and seed, and the flags of its search or none."""
    rule = " --distinct_edges" if args.distinct_edges else ""
    groups = [
        ("random", args.random, None),
        ("searched", args.searches, args.search_flags + rule),
        ("one_stage", args.one_stage, f"--one_stage {args.one_stage_flags}{rule}"),
    ]
    for seed in range(max(count for _, count, _ in groups)):  # by turns
        yield from ((group, seed, flags) for group, count, flags in groups if seed < count)


def architecture(cell, args):
    """Where the genotype of a cell is: as genotypes.load takes it."""
    group, seed, search_flags = cell
    if search_flags is None:
        return f"random:{seed}" + ":distinct" * args.distinct_edges
    return str(args.save / f"search-{group}-{seed}")


def work_out(cell, args):
    """Search a cell, unless it is random, and train it."""
    group, seed, search_flags = cell
    arch = architecture(cell, args)
    if search_flags is not None:
        finish("search.py", Path(arch), f"{search_flags} --seed {seed}", args)
    train_flags = f"{args.train_flags} --arch {shlex.quote(arch)}"
    finish("train.py", args.save / f"train-{group}-{seed}", train_flags, args)


def finish(script, run, flags, args):
    """Start a run, or go on with it; nothing where it is done."""
    command = [sys.executable, str(ROOT / script)]
    if (run / "finished").exists():
        return
    if (run / "checkpoint.pt").exists():
        command += ["--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)  # it ended before its first epoch did
        command += [*shlex.split(flags), "--save", str(run), "--dataset", args.dataset]
        command += ["--data", str(args.data), "--image_size", str(args.image_size)]
    print(shlex.join(command), flush=True)
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        raise UserError(f"{run.name} failed: {ended.stderr.strip() or ended.returncode}")
    (run / "finished").touch()


def choose_images(args):
    """Make args.data a folder of links to --images of it, the same number of each class."""
    source, chosen = Path(args.data), args.save / "images"
    test = "test" if (source / "test").is_dir() else "val"
    for split, count in zip(("train", test), args.images, strict=True):
        classes = sorted(path for path in (source / split).iterdir() if path.is_dir())
        for folder in classes:
            (chosen / split / folder.name).mkdir(parents=True, exist_ok=True)
            files = sorted(folder.iterdir())
            random.Random(0).shuffle(files)
            for file in files[: count // len(classes)]:
                link = chosen / split / folder.name / file.name
                if not link.exists():
                    link.symlink_to(file.resolve())
    args.data = chosen


# ------------------------------------------------------------------------------------------------
# What came out
# ------------------------------------------------------------------------------------------------


def result(cell, args):
    """What is known of a cell: numbers of its training and, where it was searched, of that."""
    group, seed, search_flags = cell
    arch = architecture(cell, args)
    genotype, _ = genotypes.load(arch)
    last = visualize.read_run(str(args.save / f"train-{group}-{seed}")).metrics[-1]
    row = dict(group=group, seed=seed, accuracy=last["test_accuracy"],
               parameters=last["parameters"], multiply_adds=last["multiply_adds"],
               genotype=genotypes.as_lists(genotype))
    if search_flags is not None:
        epochs = visualize.read_run(arch).metrics
        held_out = "test" if group == "one_stage" else "valid"
        row |= dict(
            supernet=epochs[-1][f"{held_out}_accuracy"],
            changed=[epoch["changed"] for epoch in epochs],
            skips=sum(op == "skip_connect" for op, _ in genotype.normal),
        )
        if group == "one_stage":
            network = torch.load(Path(arch) / "network.pt", map_location="cpu", weights_only=True)
            row["absorbed"] = network["about"]["test_accuracy"]
    return row


def interval(samples, statistic, **kwargs):
    """A 95 % interval by the bootstrap: each sample of cells is drawn anew from itself."""
    found = stats.bootstrap(
        samples, statistic, vectorized=False, n_resamples=4999, method="percentile",
        rng=np.random.default_rng(0), **kwargs,
    ).confidence_interval
    return found.low, found.high


def beats(a, b):
    """How often one of a is better than one of b, in percent; draws count half."""
    difference = np.subtract.outer(a, b)
    return 100 * ((difference > 0).mean() + 0.5 * (difference == 0).mean())


def improvement(a, b):
    """100 · (mean a − mean b) / mean b (Yang, Esperança, Carlucci, ICLR 2020)."""
    return 100 * (np.mean(a) - np.mean(b)) / np.mean(b)


def tau(a, b):
    """Kendall's rank correlation; 0 where one of them is constant."""
    return np.nan_to_num(stats.kendalltau(a, b).statistic)


def summary(rows):
    """The text of the results."""
    groups = by_group(rows)
    lines = [f"{'cell':<18}{'accuracy %':>12}{'params M':>12}{'mult-adds M':>14}{'supernet %':>12}"
             f"{'absorbed %':>12}{'changes':>9}{'skips':>7}"]
    for group, members in groups.items():
        for r in members:
            lines.append(
                f"{group + ' ' + str(r['seed']):<18}{r['accuracy']:>12.2f}"
                f"{r['parameters'] / 1e6:>12.4f}{r['multiply_adds'] / 1e6:>14.1f}"
                f"{optional(r, 'supernet', '.2f'):>12}{optional(r, 'absorbed', '.2f'):>12}"
                f"{sum(r['changed']) if 'changed' in r else '':>9}{r.get('skips', ''):>7}"
            )
        if len(members) > 1:
            mean, std = mean_and_std(r["accuracy"] for r in members)
            lines.append(f"  {group}: {mean:.2f} ± {std:.2f} % (mean ± std of {len(members)})")
    chance = [r["accuracy"] for r in groups.get("random", [])]
    for group, members in groups.items():
        own = [r["accuracy"] for r in members]
        if group != "random" and len(own) > 1 and len(chance) > 1:
            low, high = interval((own, chance), beats)
            lines.append(f"{group}: a cell beats a random one in {beats(own, chance):.0f} % of "
                         f"{len(own)}×{len(chance)} pairs "
                         f"(95 % interval {low:.0f} to {high:.0f})")
            low, high = interval((own, chance), improvement)
            lines.append(f"{group}: relative improvement over the average random cell "
                         f"{improvement(own, chance):+.2f} % "
                         f"({low:+.2f} to {high:+.2f})")
        if "supernet" in members[0] and len(own) >= RANKABLE:
            supernet = [r["supernet"] for r in members]
            low, high = interval((supernet, own), tau, paired=True)
            lines.append(f"{group}: Kendall's tau between the accuracies in the supernet and after "
                         f"training {tau(supernet, own):+.2f} "
                         f"({low:+.2f} to {high:+.2f})")
    return "\n".join(lines)


def by_group(rows):
    """The rows of each group, the groups in the order they come in."""
    names = dict.fromkeys(r["group"] for r in rows)
    return {name: [r for r in rows if r["group"] == name] for name in names}


def optional(row, key, form):
    return format(row[key], form) if key in row else ""


def mean_and_std(values):
    values = list(values)
    return fmean(values), stdev(values)


@visualize.style()
def figure(rows):
    """Accuracies of each group's cells, and those in the supernet against those after training."""
    drawn = visualize.new_figure(visualize.WIDTH, 2.6, layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
    markers = "osD^vPX"
    groups = by_group(rows)
    for y, (group, members) in enumerate(groups.items()):
        own = [r["accuracy"] for r in members]
        look = dict(color=f"C{y}", marker=markers[y % len(markers)], markersize=4)
        left.plot(own, [y] * len(own), linestyle="", alpha=0.7, **look)
        if len(own) > 1:
            mean, std = mean_and_std(own)
            left.errorbar(mean, y + 0.25, xerr=std, capsize=2, **look)
            left.text(mean, y + 0.36, f"{mean:.2f} ± {std:.2f}", ha="center")
        if "supernet" in members[0] and (group != "one_stage" or len(own) >= RANKABLE):
            images = "test" if group == "one_stage" else "validation"
            right.plot([r["supernet"] for r in members], own, linestyle="",
                       label=f"{group} ({images} images)", **look)
    left.set(yticks=range(len(groups)), yticklabels=list(groups), ylim=(-0.5, len(groups) - 0.3),
             xlabel="test accuracy after training (%)")
    left.set_title("each dot a cell; above them mean ± std")
    right.set(xlabel="accuracy in the supernet (%)",
              ylabel="test accuracy after training (%)")
    right.set_title("does the supernet rank the cells?")
    if right.lines:
        right.legend()
    return drawn


def main(args):
    args.save = Path(args.save)
    args.save.mkdir(parents=True, exist_ok=True)
    recall(args)
    if args.images:
        choose_images(args)
    todo = list(cells(args))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(functools.partial(work_out, args=args), todo))
    rows = [result(cell, args) for cell in sorted(todo, key=lambda cell: cell[1])]
    text = summary(rows)
    print(text)
    (args.save / "evidence.json").write_text(json.dumps({"cells": rows}, indent=1))
    (args.save / "evidence.txt").write_text(text + "\n")
    visualize.save(figure(rows), str(args.save / "evidence.png"))
    print(f"in {args.save}: evidence.json, evidence.txt, evidence.png")


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        fail("evidence.py", error)
