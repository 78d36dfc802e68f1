"""ImageNet in both scripts: settings, what the network costs, and runs on small images."""

import os
import re
import shlex
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from scripts import (
    Process,
    assert_same,
    assert_same_run,
    await_checkpoint,
    imagenet_of_digits,
    rows,
    run,
    saved,
)
from test_distributed import finish, start
from torch.utils._python_dispatch import TorchDispatchMode

import genotypes
import layers
import model
import search
import train
import utils


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds handwritten digits in ImageNet's layout, 12 and 4 of each class."""
    place = tmp_path_factory.mktemp("place")
    imagenet_of_digits(place / "images")
    return place


RUN = [
    "train.py", "--dataset", "imagenet", "--data", "images", "--image_size", "32", "--arch",
    "ISTA_ImageNet", "--init_channels", "2", "--layers", "3", "--batch_size", "16", "--epochs", "2",
]


@pytest.fixture(scope="module")
def trained(place):
    return run(*RUN, "--save", "run", cwd=place).words


SEARCH = [
    "search.py", "--dataset", "imagenet", "--data", "images", "--image_size", 32,
    "--init_channels", 2, "--layers", 3, "--batch_size", 12, "--workers", 1,
]
SEARCHES = {
    "two-stage": [*SEARCH, "--arch_learning_rate", 0.02, "--epochs", 3],
    "one-stage": [
        *SEARCH, "--one_stage", "--arch_learning_rate", 0.003, "--freeze_tol", 0,
        "--max_search_epochs", 6, "--epochs", 3,
    ],
}
STEPS = {"two-stage": 4, "one-stage": 7, "run": 6}  # in an epoch


@pytest.fixture(scope="module")
def searched(place):
    """Each search, run in a folder of its name."""
    return {name: run(*flags, "--save", name, cwd=place) for name, flags in SEARCHES.items()}


# ------------------------------------------------------------------------------------------------
# Recipe and cost
# ------------------------------------------------------------------------------------------------


def test_the_flag_of_the_data_set_means_the_published_recipe(place):
    args = train.get_args_parser().parse_args(
        ["--arch", "ISTA_ImageNet", "--dataset", "imagenet", "--data", str(place / "images")]
    )
    recipe = dict(init_channels=48, layers=14, image_size=224, batch_size=1024, epochs=250, seed=0,
                  learning_rate=0.5, momentum=0.9, weight_decay=3e-5, grad_clip=5, auxiliary=True,
                  auxiliary_weight=0.4, drop_path_prob=0, cutout=False, label_smoothing=0.1)
    assert {**vars(args), **recipe} == vars(args)
    args = train.get_args_parser().parse_args(["--arch", "ISTA_ImageNet"])
    assert args.label_smoothing == 0 and args.image_size == 32 and args.cutout


def test_one_stage_search_has_the_recipe_of_the_retraining(place):
    flags = ["--one_stage", "--dataset", "imagenet", "--data", str(place / "images")]
    args = search.get_args_parser().parse_args(flags)
    setting = dict(init_channels=48, layers=14, image_size=224, batch_size=1024, epochs=250,
                   learning_rate=0.5, momentum=0.9, weight_decay=3e-5, grad_clip=5, auxiliary=True,
                   auxiliary_weight=0.4, drop_path_prob=0, cutout=False, label_smoothing=0.1,
                   arch_learning_rate=3e-4, arch_weight_decay=1e-3, proj_dims=7, sparseness=2,
                   lam=1e-5, freeze_tol=1e-3, max_params=None, seed=5)
    assert {**vars(args), **setting} == vars(args)
    assert search.get_args_parser().parse_args([*flags, "--max_params", "6"]).max_params == 6

    share = [search.schedule(args, t, "searching", 0)[0] for t in range(30)]
    assert share == pytest.approx([0.2, 0.4, 0.6, 0.8] + 26 * [1])
    share = [search.schedule(args, 30 + t, "training", t)[0] for t in range(250)]
    assert share == [utils.linear_with_warm_up(t, 250) for t in range(250)]


def test_two_stage_search_has_its_setting_at_224_pixels(place):
    flags = ["--dataset", "imagenet", "--data", str(place / "images")]
    args = vars(search.get_args_parser().parse_args(flags))
    cifar = vars(search.get_args_parser().parse_args([]))
    differ = {name for name, value in args.items() if value != cifar[name]}
    assert differ == {"dataset", "data", "image_size", "typed"} and args["image_size"] == 224


def test_the_published_learning_rate():
    rate = [0.5 * utils.linear_with_warm_up(t, 250) for t in range(250)]
    assert rate[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rate[5:245] == pytest.approx([0.5 * (245 - t) / 245 for t in range(5, 245)])
    assert rate[245:] == pytest.approx([0.5 * (250 - t) / (5 * 245) for t in range(245, 250)])


@pytest.mark.parametrize("epochs", range(1, 13))
def test_the_learning_rate_of_short_runs(epochs):
    share = [utils.linear_with_warm_up(t, epochs) for t in range(epochs)]
    top = min(epochs, 5) - 1
    assert min(share) > 0 and share[top] == max(share) == pytest.approx((top + 1) / 5)
    assert share[:top] == sorted(share[:top]) and share[top:] == sorted(share[top:], reverse=True)


def test_label_smoothing_applies_to_both_losses():
    logits, logits_aux = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)

    def smooth(logits):
        target = torch.full((6, 10), 0.1 / 10)
        target[range(6), labels] += 0.9
        return -(target * logits.log_softmax(1)).sum(1).mean()

    args = SimpleNamespace(auxiliary_weight=0.4, label_smoothing=0.1)
    loss, total = utils.criterion(logits, logits_aux, labels, args)
    torch.testing.assert_close(loss, smooth(logits))
    torch.testing.assert_close(total, smooth(logits) + 0.4 * smooth(logits_aux))


def test_top5_accuracy():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 9, generator=generator), torch.arange(50) % 9
    meter = utils.Meter(torch.device("cpu"), top5=True)
    for part in (slice(0, 32), slice(32, 50)):
        meter.add(torch.tensor(2.0), logits[part], labels[part])
    rank = [sorted(row, reverse=True).index(row[y]) for row, y in zip(logits.tolist(), labels,
                                                                      strict=True)]
    top1, top5 = (100 * sum(r < k for r in rank) / 50 for k in (1, 5))
    assert meter.read() == pytest.approx((2.0, top1, top5)) and top1 < top5 < 100


class Work(TorchDispatchMode):
    """Count as ptflops 0.5 does: 1 for a multiply-add, rectified or pooled element, 2 for a
    normalized one."""

    def __init__(self):
        super().__init__()
        kinds = ("convolution", "addmm", "native_batch_norm", "relu", "mean", "max_pool2d")
        self.counts = dict.fromkeys(kinds, 0)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__.removesuffix("_with_indices").removesuffix("_")
        if name in self.counts:
            if name == "convolution":
                self.counts[name] += out.numel() * args[1][0].numel()
            elif name == "addmm":
                self.counts[name] += args[1].numel() * args[2].shape[1]
            else:
                self.counts[name] += args[0].numel() * (2 if name == "native_batch_norm" else 1)
        return out


DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)


@pytest.mark.parametrize("arch, multiply_adds, counted", [
    ("ISTA_ImageNet", 621_084_480, 637_962_432),  # the paper: 638 M
    (DARTS_V2, 529_911_552, 544_588_032),  # github.com/quark0/darts/issues/46: 544.59 M
])
def test_published_multiply_adds_are_those_of_ptflops(arch, multiply_adds, counted):
    with torch.device("meta"):
        net = model.NetworkImageNet(48, 1000, 14, True, genotypes.load(arch)[0]).eval()
        image = torch.empty(1, 3, 224, 224)
    assert train.cost(net, 224)[1] == multiply_adds
    with torch.no_grad(), layers.plain(), Work() as work:
        net(image)
    assert work.counts["convolution"] + work.counts["addmm"] == multiply_adds
    assert sum(work.counts.values()) == counted


def test_cost_is_that_of_the_published_networks():
    for one_stage, parameters in ((False, 5_651_392), (True, 5_655_232)):
        net = model.NetworkImageNet(48, 1000, 14, True, genotypes.ISTA_ImageNet, one_stage)
        assert train.cost(net, 224) == (parameters, 621_084_480)
    net = model.NetworkCIFAR(36, 10, 20, True, genotypes.ISTA_twostage)
    assert train.cost(net, 32) == (3_316_726, 515_226_240)


@pytest.mark.parametrize("image_size", [32, 64, 256])
def test_the_auxiliary_head_speaks_at_any_size(image_size):
    net = model.NetworkImageNet(2, 7, 3, True, genotypes.ISTA_ImageNet)
    logits, logits_aux = net(torch.randn(2, 3, image_size, image_size))
    assert logits.shape == logits_aux.shape == (2, 7)


def test_the_auxiliary_head_pools_as_darts_does_at_224_pixels():
    x = torch.randn(2, 5, 7, 7)
    darts = torch.nn.AvgPool2d(5, stride=2, padding=0, count_include_pad=False)
    assert torch.equal(model.AuxiliaryHead(5, 10, imagenet=True).features[1](x), darts(x))


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def test_a_run_reports_top5(place, trained):
    metrics = rows(place / "run/metrics.jsonl")
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.1, 0.2])
    assert [row["drop_path_prob"] for row in metrics] == [0, 0]
    for row in metrics:
        assert row["test_accuracy"] <= row["test_top5_accuracy"] <= 100
        assert f"{row['test_accuracy']:.2f} {row['test_top5_accuracy']:.2f}" in trained
    assert "train loss train % test loss test % top-5 %" in trained
    about = saved(place / "run/network.pt")["about"]
    assert about["test_top5_accuracy"] == metrics[-1]["test_top5_accuracy"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_the_step(place, tmp_path, signum):
    (tmp_path / "images").symlink_to(place / "images")
    (tmp_path / "prelude.py").write_text("import os\nos.setpgid(0, 0)\n")
    process = Process(*RUN, "--epochs", 99, "--save", "run", cwd=tmp_path,
                      prelude=tmp_path / "prelude.py")
    await_checkpoint(tmp_path / "run")
    os.killpg(process.pid, signum)
    assert process.wait() == 128 + signum, process.stdout + process.stderr
    assert process.stderr == f"train.py: stopped by {signum.name}\n"


def test_evaluation_measures_the_same_from_every_file(place, trained):
    accuracies = r"test accuracy (\S+) %, error \S+ %, top-5 accuracy (\S+) %"
    expected = re.search(f"{accuracies} after the last", trained).groups()
    expected = pytest.approx([*map(float, expected)], abs=4)  # one of 28 images may differ
    torch.save(saved(place / "run/network.pt")["weights"], place / "plain.pt")
    for flags in (
        ["--weights", "run/network.pt", "--workers", 0], ["--resume", "run"],
        ["--weights", "plain.pt", "--arch", "ISTA_ImageNet", *RUN[1:7]],
    ):
        words = run("train.py", "--evaluate", *flags, cwd=place).words
        assert [*map(float, re.search(accuracies, words).groups())] == expected


def test_training_goes_on_from_weights_with_the_recipe_of_imagenet(place, trained):
    flags = ["--weights", "run/network.pt", "--epochs", 1, "--save", "more"]
    assert "--batch_size is 84" in run("train.py", *flags, cwd=place).words
    state = saved(place / "more/checkpoint.pt")
    expected = dict(learning_rate=0.5, label_smoothing=0.1, cutout=False, image_size=32)
    assert {**state["args"], **expected} == state["args"]
    assert state["row"]["learning_rate"] == 0.1


def test_a_broken_image_is_named_in_one_line(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    for part, k, workers in (("train", 3, 2), ("val", 13, 0)):
        path = tmp_path / "images" / part / "n00000002" / f"{k}.JPEG"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        done = run(*RUN, "--workers", workers, "--save", part, cwd=tmp_path, status=2)
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stdout + done.stderr
        assert done.stderr.startswith(f"train.py: error: images/{part}/n00000002/{k}.JPEG cannot")
        path.write_bytes(whole)


# ------------------------------------------------------------------------------------------------
# Searches
# ------------------------------------------------------------------------------------------------


@pytest.mark.crash
def test_one_stage_search_ends_with_a_trained_network(place, searched):
    words, metrics = searched["one-stage"].words, rows(place / "one-stage/metrics.jsonl")
    assert [row["phase"] for row in metrics] == 6 * ["searching"] + 3 * ["training"]
    assert not any(row["rejected"] for row in metrics[:6])
    assert "8 of 8 nodes not frozen; " in words
    assert "from here on the learning rate warms up anew, for 5 epochs, and then falls" in words
    assert [row["learning_rate"] for row in metrics] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5] + [0.1, 0.2, 0.3]
    )
    genotypes_ = rows(place / "one-stage/genotypes.jsonl")
    fixed = [(line["normal"], line["reduce"]) for line in genotypes_[5:]]
    assert len(fixed) == 4 and all(pairs == fixed[0] for pairs in fixed)

    net, about = model.load(place / "one-stage/network.pt")
    assert isinstance(net, model.NetworkImageNet) and about["image_size"] == 32
    config = saved(place / "one-stage/network.pt")["config"]
    assert [list(pair) for pair in config["genotype"]["normal"]] == fixed[0][0]
    evaluated = run("train.py", "--evaluate", "--weights", "one-stage/network.pt", cwd=place).words
    loss = metrics[-1]["test_loss"]
    accuracy = pytest.approx(metrics[-1]["test_accuracy"], abs=4)  # one of 28 images may differ
    both = re.search(r"accuracy (\S+) % in the supernet, (\S+) % after", words).groups()
    assert [*map(float, both)] == [accuracy, accuracy]
    assert float(re.search(r"test accuracy (\S+) %", evaluated)[1]) == accuracy
    assert float(re.search(r"loss (\S+),", evaluated)[1]) == pytest.approx(loss, rel=1e-3)
    size = re.search(r"leaves (\S+ M)", words)[1]
    assert size == f"{train.cost(net, 32)[0] / 1e6:.3f} M"


def test_two_stage_search_names_the_command_that_trains_its_cell(place, searched):
    done = searched["two-stage"]
    assert "42 images train the weights, 42 others train b" in done.words
    (command,) = re.findall(r"^    python (train\.py .*)", done.stdout, re.M)
    small = ["--init_channels", 2, "--layers", 3, "--batch_size", 42, "--epochs", 1]
    run(*shlex.split(command), *small, "--save", "from-two-stage", cwd=place)
    args = saved(place / "from-two-stage/checkpoint.pt")["args"]
    assert args["dataset"] == "imagenet" and args["image_size"] == 32
    found, _ = genotypes.load(str(place / "from-two-stage/genotype.json"))
    assert found == genotypes.load(str(place / "two-stage/genotype.json"))[0]
    last = rows(place / "two-stage/genotypes.jsonl")[-1]
    assert [list(pair) for pair in found.normal] == last["normal"]


# Dies in the middle of an epoch, with workers that read ahead.
KILL = """
import os, signal, torch
clip, calls = torch.nn.utils.clip_grad_norm_, []
def kill(*args, **options):
    calls.append(1)
    if len(calls) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args, **options)
torch.nn.utils.clip_grad_norm_ = kill
"""


@pytest.mark.crash
@pytest.mark.parametrize("name", STEPS)
def test_a_run_that_is_killed_in_every_epoch_ends_as_the_whole_one(
    place, trained, searched, tmp_path, name
):
    (tmp_path / "images").symlink_to(place / "images")
    prelude = tmp_path / "prelude.py"
    prelude.write_text(KILL.format(step=STEPS[name] + 3))  # each process ends one epoch
    script, *flags = {**SEARCHES, "run": RUN}[name]
    flags, epochs = [*flags, "--save", name], len(rows(place / name / "metrics.jsonl"))
    for epoch in range(1, epochs):
        process = Process(script, *flags, cwd=tmp_path, prelude=prelude)
        assert process.wait() == -signal.SIGKILL, process.stderr
        assert saved(tmp_path / name / "checkpoint.pt")["epoch"] == epoch
        flags = ["--resume", name]
    run(script, *flags, cwd=tmp_path)
    assert_same_run(place / name, tmp_path / name)


@pytest.mark.parametrize("name", [
    "two-stage", pytest.param("one-stage", marks=pytest.mark.crash),
])
def test_two_ranks_of_a_search_end_with_the_same_codes(place, tmp_path, name):
    (tmp_path / "images").symlink_to(place / "images")
    flags = [*SEARCHES[name], "--batch_size", 7, "--epochs", 2]
    first, second = finish(start(*flags, "--save", "run", cwd=tmp_path))
    assert second.stdout == "" and "2 ranks with --batch_size 7" in first.stdout
    states = [saved(tmp_path / f"run-{rank}.pt") for rank in range(2)]
    assert_same(*states)
    last = saved(tmp_path / "run/checkpoint.pt")
    assert_same(states[1], {key: last[key] for key in states[1]})
    assert any(key.startswith("normal_code.z") for key in last["net"])
    assert (tmp_path / "run/network.pt").exists() == (name == "one-stage")


EARLY = [
    ([*RUN, "--data", "nowhere"], "not a folder"),
    ([*RUN, "--image_size", "48"], "multiple of 32"),
    ([*RUN, "--init_channels", "3"], "even"),
    ([*RUN, "--learning_rate_min", "0"], "--learning_rate_min"),
    ([*RUN, "--label_smoothing", "1"], "number in [0, 1)"),
]


@pytest.mark.parametrize("command, says", EARLY)
def test_refused_by_the_parser(place, monkeypatch, capsys, command, says):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as exit_:
        train.get_args_parser().parse_args(command[1:])
    stderr = capsys.readouterr().err
    assert exit_.value.code == 2 and stderr.count("\n") == 1
    assert stderr.startswith("train.py: error: ") and says in stderr

def test_networks_and_data_of_different_kinds_are_refused(place, trained):
    flags = ["--weights", "run/network.pt", "--dataset", "digits"]
    done = run("train.py", "--evaluate", *flags, cwd=place, status=2)
    assert done.stderr.count("\n") == 1 and "is a network for imagenet" in done.stderr
    done = run("train.py", "--weights", "run/network.pt", "--cutout", cwd=place, status=2)
    assert done.stderr.count("\n") == 1 and "give --no-cutout" in done.stderr
