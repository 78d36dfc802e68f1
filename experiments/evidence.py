"""Compare searched cells with random cells: search, train and test with one recipe.

    python experiments/evidence.py --save runs/evidence --dataset imagefolder --data DIR
    python experiments/evidence.py --save runs/evidence        # resume, or print the result again

For each search seed, the script runs search.py, and train.py on the genotype found. It trains as
many random cells (`--arch random:SEED`), and cells of one-stage searches from scratch (with
BatchNorm after pools and skips, as in the search). All trainings have the same flags and the same
seed. The run folders are in --save, and so is flags.json with the flags. Finished runs are not
repeated, and interrupted runs are resumed. The results are written to evidence.txt, evidence.json
and evidence.png.

Accuracies are those of the last epoch on the test images, which no search uses.
"""

import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import genotypes
import visualize
from harness import flags
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent

# The published learning rates are 0.1 for a batch of 256 (search) and 0.025 for one of 96
# (training, one-stage search). These are for batches of 64, by the linear rule.
SEARCH = "--init_channels 8 --layers 5 --batch_size 64 --learning_rate 0.025 --epochs 15"
TRAIN = ("--init_channels 8 --layers 5 --batch_size 64 --learning_rate 0.0167 --epochs 10 "
         "--no-auxiliary --no-cutout --drop_path_prob 0")
ONE_STAGE = f"{TRAIN} --max_search_epochs 10"
MIN_RANKED = 6  # cells; a rank correlation of fewer is meaningless


def get_args_parser():
    parser = flags.Parser("evidence.py", __doc__)
    parser.usage = "evidence.py --save DIR [flags]"
    nonempty, integer = flags.nonempty, flags.integer
    for flag, type_, default, metavar, help in (
        ("save", nonempty, None, "DIR", "folder of all runs"),
        ("searches", integer(0), 8, "N", "number of two-stage searches"),
        ("random", integer(0), 8, "N", "number of random cells"),
        ("one_stage", integer(0), 1, "N", "number of one-stage searches"),
        ("search_flags", str, SEARCH, "FLAGS", "flags of search.py for two-stage searches"),
        ("train_flags", str, TRAIN, "FLAGS", "flags of train.py"),
        ("one_stage_flags", str, ONE_STAGE, "FLAGS", "flags of search.py for one-stage searches"),
        ("data", nonempty, "data", "DIR", "folder of the data set"),
        ("image_size", integer(4), 32, "PIXELS", "width and height that images are resized to"),
    ):
        parser.add_argument(f"--{flag}", type=type_, default=default, metavar=metavar, help=help,
                            required=flag == "save")
    parser.add_argument("--dataset", default="digits", choices=[*data.DATASETS], metavar="NAME",
                        help=f"one of {', '.join(data.DATASETS)}")
    parser.add_argument("--images", type=integer(1), nargs=2, metavar=("TRAIN", "TEST"),
                        help="use only this many images of --dataset imagefolder, equally many of "
                        "each class")
    parser.add_argument("--distinct_edges", action="store_true", default=False,
                        help="search and draw cells with different input nodes at each node")
    parser.show_defaults({})
    return parser


RESUME_OVERRIDES = {"searches", "random", "one_stage", "save"}  # may change when resumed


def restore_flags(args):
    """Write the flags of a new experiment to flags.json, or restore those of a resumed one."""
    path = args.save / "flags.json"
    if not path.exists():
        if any(args.save.iterdir()):
            raise UserError(f"--save {args.save} contains something else: choose another folder")
        kept = {k: v for k, v in vars(args).items() if k not in RESUME_OVERRIDES | {"typed"}}
        path.write_text(json.dumps(kept, indent=1))
        return
    kept = json.loads(path.read_text())
    for flag in {*args.typed} - RESUME_OVERRIDES:
        value = getattr(args, flag)
        if kept.get(flag) != value:
            raise UserError(f"--{flag} {value} contradicts {path}, which has {kept.get(flag)}: "
                            "omit it, or choose another --save")
    vars(args).update(kept)


def list_cells(args):
    """Yield (group, seed, flags of its search or None) for each cell, alternating the groups."""
    distinct = " --distinct_edges" if args.distinct_edges else ""
    groups = [
        ("random", args.random, None),
        ("searched", args.searches, args.search_flags + distinct),
        ("one_stage", args.one_stage, f"--one_stage {args.one_stage_flags}{distinct}"),
    ]
    for seed in range(max(count for _, count, _ in groups)):
        for group, count, search_flags in groups:
            if seed < count:
                yield group, seed, search_flags


def architecture(cell, args):
    """Return the genotype of a cell as `genotypes.load` takes it."""
    group, seed, search_flags = cell
    if search_flags is None:
        return f"random:{seed}" + ":distinct" * args.distinct_edges
    return str(args.save / f"search-{group}-{seed}")


def run_cell(cell, args):
    """Search a cell, unless it is random, and train it."""
    group, seed, search_flags = cell
    arch = architecture(cell, args)
    if search_flags is not None:
        finish("search.py", Path(arch), f"{search_flags} --seed {seed}", args)
    train_flags = f"{args.train_flags} --arch {shlex.quote(arch)}"
    finish("train.py", args.save / f"train-{group}-{seed}", train_flags, args)


def finish(script, run, run_flags, args):
    """Start or resume a run, unless it is finished."""
    command = [sys.executable, str(ROOT / script)]
    if (run / "finished").exists():
        return
    if (run / "checkpoint.pt").exists():
        command += ["--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)  # it ended before its first checkpoint
        command += [*shlex.split(run_flags), "--save", str(run), "--dataset", args.dataset]
        command += ["--data", str(args.data), "--image_size", str(args.image_size)]
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{run.name} failed: {done.stderr.strip() or done.returncode}")
    (run / "finished").touch()


def choose_images(args):
    """Replace args.data by a folder of links to a random choice of its images."""
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


def read_result(cell, args):
    """Collect the numbers of a cell's training and of its search."""
    group, seed, search_flags = cell
    arch = architecture(cell, args)
    genotype, _ = genotypes.load(arch)
    last = visualize.read_run(str(args.save / f"train-{group}-{seed}")).metrics[-1]
    row = dict(group=group, seed=seed, accuracy=last["test_accuracy"],
               parameters=last["parameters"], multiply_adds=last["multiply_adds"],
               genotype=genotypes.as_lists(genotype))
    if search_flags is not None:
        epochs = visualize.read_run(arch).metrics
        measured = "test" if group == "one_stage" else "valid"
        row.update(
            supernet=epochs[-1][f"{measured}_accuracy"],
            changed=[epoch["changed"] for epoch in epochs],
            skips=sum(op == "skip_connect" for op, _ in genotype.normal),
        )
        if group == "one_stage":
            network = torch.load(Path(arch) / "network.pt", map_location="cpu", weights_only=True)
            row["absorbed"] = network["about"]["test_accuracy"]
    return row


def interval(samples, statistic, **kwargs):
    """Return the 95 % bootstrap interval of a statistic, resampling the cells of each group."""
    found = stats.bootstrap(
        samples, statistic, vectorized=False, n_resamples=4999, method="percentile",
        rng=np.random.default_rng(0), **kwargs,
    ).confidence_interval
    return found.low, found.high


def beats(a, b):
    """Return the percentage of pairs in which a value of a is larger; ties count half."""
    difference = np.subtract.outer(a, b)
    return 100 * ((difference > 0).mean() + 0.5 * (difference == 0).mean())


def improvement(a, b):
    """Return 100 · (mean a − mean b) / mean b (Yang, Esperança, Carlucci, ICLR 2020)."""
    return 100 * (np.mean(a) - np.mean(b)) / np.mean(b)


def tau(a, b):
    """Return Kendall's rank correlation, or 0 if a or b is constant."""
    return np.nan_to_num(stats.kendalltau(a, b).statistic)


def group_rows(rows):
    """Return the rows of each group, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups


def mean_and_std(values):
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def summarize(rows):
    """Return the table and the statistics as text."""
    groups = group_rows(rows)
    lines = [f"{'cell':<18}{'accuracy %':>12}{'params M':>12}{'mult-adds M':>14}{'supernet %':>12}"
             f"{'absorbed %':>12}{'changes':>9}{'skips':>7}"]
    for group, members in groups.items():
        for r in members:
            name = f"{group} {r['seed']}"
            supernet, absorbed = (f"{r[key]:.2f}" if key in r else ""
                                  for key in ("supernet", "absorbed"))
            changes = sum(r["changed"]) if "changed" in r else ""
            lines.append(
                f"{name:<18}{r['accuracy']:>12.2f}{r['parameters'] / 1e6:>12.4f}"
                f"{r['multiply_adds'] / 1e6:>14.1f}{supernet:>12}{absorbed:>12}{changes:>9}"
                f"{r.get('skips', ''):>7}"
            )
        if len(members) > 1:
            text = mean_and_std([r["accuracy"] for r in members])
            lines.append(f"  {group}: {text} % (mean ± std of {len(members)})")
    chance = [r["accuracy"] for r in groups.get("random", [])]
    for group, members in groups.items():
        own = [r["accuracy"] for r in members]
        if group != "random" and len(own) > 1 and len(chance) > 1:
            low, high = interval((own, chance), beats)
            lines.append(f"{group}: a cell beats a random one in {beats(own, chance):.0f} % of "
                         f"{len(own)}×{len(chance)} pairs (95 % interval {low:.0f} to {high:.0f})")
            low, high = interval((own, chance), improvement)
            lines.append(f"{group}: relative improvement over the average random cell "
                         f"{improvement(own, chance):+.2f} % ({low:+.2f} to {high:+.2f})")
        if "supernet" in members[0] and len(own) >= MIN_RANKED:
            supernet = [r["supernet"] for r in members]
            low, high = interval((supernet, own), tau, paired=True)
            lines.append(f"{group}: Kendall's tau between the accuracies in the supernet and after "
                         f"training {tau(supernet, own):+.2f} ({low:+.2f} to {high:+.2f})")
    return "\n".join(lines)


@visualize.style()
def draw_figure(rows):
    """Draw the accuracies of each group, and those in the supernet against those after training."""
    figure = visualize.new_figure(visualize.WIDTH, 2.6, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    groups = group_rows(rows)
    for y, (group, members) in enumerate(groups.items()):
        own = [r["accuracy"] for r in members]
        style = dict(color=f"C{y}", marker="osD"[y], markersize=4)
        left.plot(own, [y] * len(own), linestyle="", alpha=0.7, **style)
        if len(own) > 1:
            mean, std = np.mean(own), np.std(own, ddof=1)
            left.errorbar(mean, y + 0.25, xerr=std, capsize=2, **style)
            left.text(mean, y + 0.36, mean_and_std(own), ha="center")
        if "supernet" in members[0] and (group != "one_stage" or len(own) >= MIN_RANKED):
            images = "test" if group == "one_stage" else "validation"
            right.plot([r["supernet"] for r in members], own, linestyle="",
                       label=f"{group} ({images} images)", **style)
    left.set(yticks=range(len(groups)), yticklabels=list(groups), ylim=(-0.5, len(groups) - 0.3),
             xlabel="test accuracy after training (%)")
    left.set_title("accuracy of each cell, and mean ± std")
    right.set(xlabel="accuracy in the supernet (%)", ylabel="test accuracy after training (%)")
    right.set_title("ranking of the cells by the supernet")
    if right.lines:
        right.legend()
    return figure


def main(args):
    args.save = Path(args.save)
    args.save.mkdir(parents=True, exist_ok=True)
    restore_flags(args)
    if args.images:
        choose_images(args)
    cells = list(list_cells(args))
    for cell in cells:
        run_cell(cell, args)
    rows = [read_result(cell, args) for cell in cells]
    text = summarize(rows)
    print(text)
    (args.save / "evidence.json").write_text(json.dumps({"cells": rows}, indent=1))
    (args.save / "evidence.txt").write_text(text + "\n")
    visualize.save(draw_figure(rows), str(args.save / "evidence.png"))
    print(f"in {args.save}: evidence.json, evidence.txt, evidence.png")


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (UserError, OSError) as error:
        flags.fail("evidence.py", error)
