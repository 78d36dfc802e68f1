"""ImageNet in both scripts: settings, cost of the networks, and runs on small images."""

import re
import shlex
import signal
from types import SimpleNamespace

import pytest
import torch
from scripts import (
    Process,
    assert_same,
    assert_same_run,
    imagenet_of_digits,
    rows,
    run,
    saved,
)
from test_distributed import finish, start
from torch.utils.flop_counter import FlopCounterMode

import genotypes
import layers
import model
import search
import train
import utils


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of handwritten digits in ImageNet's layout: 7 classes of 12 and 4 images."""
    place = tmp_path_factory.mktemp("place")
    imagenet_of_digits(place / "images")
    return place


TRAIN = [
    "train.py", "--dataset", "imagenet", "--data", "images", "--image_size", "32", "--arch",
    "ISTA_ImageNet", "--init_channels", "2", "--layers", "3", "--batch_size", "16", "--epochs", "2",
]
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
STEPS_PER_EPOCH = {"two-stage": 4, "one-stage": 7, "training": 6}


@pytest.fixture(scope="module")
def trained(place):
    return run(*TRAIN, "--save", "training", cwd=place).words


@pytest.fixture(scope="module")
def searched(place):
    """The output of each search; the folder of the run has the same name."""
    return {name: run(*flags, "--save", name, cwd=place) for name, flags in SEARCHES.items()}


# ------------------------------------------------------------------------------------------------
# Settings and cost
# ------------------------------------------------------------------------------------------------

RETRAINING = dict(
    init_channels=48, layers=14, image_size=224, batch_size=1024, epochs=250, learning_rate=0.5,
    momentum=0.9, weight_decay=3e-5, grad_clip=5, auxiliary=True, auxiliary_weight=0.4,
    drop_path_prob=0, cutout=False, label_smoothing=0.1,
)


@pytest.mark.parametrize("script, flags, setting", [
    (train, ["--arch", "ISTA_ImageNet"], dict(RETRAINING, seed=0)),
    (search, ["--one_stage"], dict(
        RETRAINING, arch_learning_rate=3e-4, arch_weight_decay=1e-3, proj_dims=7, sparseness=2,
        lam=1e-5, freeze_tol=1e-3, max_params=None, seed=5)),
    (search, [], dict(image_size=224, init_channels=16, layers=8, batch_size=256, epochs=50)),
])
def test_the_default_settings_for_imagenet(place, script, flags, setting):
    flags = [*flags, "--dataset", "imagenet", "--data", str(place / "images")]
    args = script.get_args_parser().parse_args(flags)
    assert {**vars(args), **setting} == vars(args)


def test_the_published_learning_rate():
    rate = [0.5 * utils.linear_with_warm_up(t, 250) for t in range(250)]
    assert rate[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rate[5:245] == pytest.approx([0.5 * (245 - t) / 245 for t in range(5, 245)])
    assert rate[245:] == pytest.approx([0.5 * (250 - t) / (5 * 245) for t in range(245, 250)])


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
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    top1, top5 = (100 * (rank < k).double().mean().item() for k in (1, 5))
    assert meter.read() == pytest.approx((2.0, top1, top5)) and top1 < top5 < 100


@pytest.mark.parametrize("network, shape, genotype, size, multiply_adds", [
    (model.NetworkImageNet, (48, 1000, 14), genotypes.ISTA_ImageNet, 224, 621_084_480),
    (model.NetworkCIFAR, (36, 10, 20), genotypes.ISTA_twostage, 32, 515_226_240),
])
def test_multiply_adds_of_the_published_networks(network, shape, genotype, size, multiply_adds):
    with torch.device("meta"):
        net = network(*shape, True, genotype).eval()
        image = torch.empty(1, 3, size, size)
    assert train.cost(net, size)[1] == multiply_adds
    with torch.no_grad(), layers.plain(), FlopCounterMode(display=False) as counter:
        net(image)
    assert counter.get_total_flops() == 2 * multiply_adds


@pytest.mark.parametrize("flags, message", [
    (["--image_size", "48"], "multiple of 32"), (["--init_channels", "3"], "even"),
    (["--learning_rate_min", "0"], "--learning_rate_min"),
])
def test_the_parser_refuses_settings_that_imagenet_does_not_have(
    place, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit):
        train.get_args_parser().parse_args([*TRAIN[1:], *flags])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def test_training_reports_top5_accuracy(place, trained):
    metrics = rows(place / "training/metrics.jsonl")
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.1, 0.2])
    assert [row["drop_path_prob"] for row in metrics] == [0, 0]
    for row in metrics:
        assert row["test_accuracy"] <= row["test_top5_accuracy"] <= 100
        assert f"{row['test_accuracy']:.2f} {row['test_top5_accuracy']:.2f}" in trained
    about = saved(place / "training/network.pt")["about"]
    assert about["test_top5_accuracy"] == metrics[-1]["test_top5_accuracy"]


def test_evaluation_gives_the_same_result_from_every_file(place, trained):
    accuracies = r"test accuracy (\S+) %, error \S+ %, top-5 accuracy (\S+) %"
    expected = re.search(f"{accuracies} after the last", trained).groups()
    expected = pytest.approx([*map(float, expected)], abs=4)  # one of 28 images may differ
    torch.save(saved(place / "training/network.pt")["weights"], place / "plain.pt")
    for flags in (
        ["--weights", "training/network.pt", "--workers", 0], ["--resume", "training"],
        ["--weights", "plain.pt", "--arch", "ISTA_ImageNet", *TRAIN[1:7]],
    ):
        words = run("train.py", "--evaluate", *flags, cwd=place).words
        assert [*map(float, re.search(accuracies, words).groups())] == expected


def test_training_from_weights_uses_the_settings_for_imagenet(place, trained):
    flags = ["--weights", "training/network.pt", "--epochs", 1, "--save", "more"]
    run("train.py", *flags, cwd=place)
    state = saved(place / "more/checkpoint.pt")
    expected = dict(learning_rate=0.5, label_smoothing=0.1, cutout=False, image_size=32,
                    batch_size=84)  # instead of 1024, because there are 84 images
    assert {**state["args"], **expected} == state["args"]
    assert state["row"]["learning_rate"] == 0.1


def test_a_network_for_imagenet_is_refused_for_other_data(place, trained):
    flags = ["--weights", "training/network.pt", "--dataset", "digits"]
    done = run("train.py", "--evaluate", *flags, cwd=place, status=2)
    assert done.stderr.count("\n") == 1 and "is a network for imagenet" in done.stderr


# ------------------------------------------------------------------------------------------------
# Searches
# ------------------------------------------------------------------------------------------------


@pytest.mark.crash
def test_one_stage_search_ends_with_a_trained_network(place, searched):
    words, metrics = searched["one-stage"].words, rows(place / "one-stage/metrics.jsonl")
    assert [row["phase"] for row in metrics] == 6 * ["searching"] + 3 * ["training"]
    assert [row["learning_rate"] for row in metrics] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5] + [0.1, 0.2, 0.3]
    )
    choices = rows(place / "one-stage/genotypes.jsonl")
    fixed = [(line["normal"], line["reduce"]) for line in choices[5:]]
    assert len(fixed) == 4 and all(pairs == fixed[0] for pairs in fixed)

    net, about = model.load(place / "one-stage/network.pt")
    assert isinstance(net, model.NetworkImageNet) and about["image_size"] == 32
    assert [list(pair) for pair in net.config["genotype"]["normal"]] == fixed[0][0]
    evaluated = run("train.py", "--evaluate", "--weights", "one-stage/network.pt", cwd=place).words
    accuracy = pytest.approx(metrics[-1]["test_accuracy"], abs=4)  # one of 28 images may differ
    both = re.search(r"accuracy (\S+) % in the supernet, (\S+) % after", words).groups()
    assert [*map(float, both)] == [accuracy, accuracy]
    assert float(re.search(r"test accuracy (\S+) %", evaluated)[1]) == accuracy
    loss = float(re.search(r"loss (\S+),", evaluated)[1])
    assert loss == pytest.approx(metrics[-1]["test_loss"], rel=1e-3)


def test_two_stage_search_suggests_the_command_that_trains_its_cell(place, searched):
    (command,) = re.findall(r"^    python (train\.py .*)", searched["two-stage"].stdout, re.M)
    small = ["--init_channels", 2, "--layers", 3, "--batch_size", 42, "--epochs", 1]
    run(*shlex.split(command), *small, "--save", "from-two-stage", cwd=place)
    args = saved(place / "from-two-stage/checkpoint.pt")["args"]
    assert args["dataset"] == "imagenet" and args["image_size"] == 32
    found, _ = genotypes.load(str(place / "from-two-stage/genotype.json"))
    assert found == genotypes.load(str(place / "two-stage/genotype.json"))[0]


# Kills a run in the middle of an epoch, while workers read ahead.
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
@pytest.mark.parametrize("name", STEPS_PER_EPOCH)
def test_a_run_that_is_killed_in_every_epoch_resumes_to_the_bit(
    place, trained, searched, tmp_path, name
):
    (tmp_path / "images").symlink_to(place / "images")
    prelude = tmp_path / "prelude.py"
    prelude.write_text(KILL.format(step=STEPS_PER_EPOCH[name] + 3))  # in its second epoch
    script, *flags = {**SEARCHES, "training": TRAIN}[name]
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
    finish(start(*flags, "--save", "run", cwd=tmp_path))
    states = [saved(tmp_path / f"run-{rank}.pt") for rank in range(2)]
    assert_same(*states)
    last = saved(tmp_path / "run/checkpoint.pt")
    assert_same(states[1], {key: last[key] for key in states[1]})
    assert any(key.startswith("normal_code.z") for key in last["net"])
    assert (tmp_path / "run/network.pt").exists() == (name == "one-stage")
