"""ImageNet's files, and batches of them from worker processes."""

import multiprocessing
import os
import signal

import pytest
import torch
from scripts import imagenet_of_digits
from torchvision import datasets, transforms

import data
import imagenet
from utils import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds handwritten digits in ImageNet's layout, 12 and 4 of each class."""
    place = tmp_path_factory.mktemp("place")
    imagenet_of_digits(place)
    return place


def load(place, workers=0, size=32, log=print):
    return imagenet.load("imagenet", place, size, "cpu", workers, log=log)


def batches(place, batch_size, *, training=True, seed=0, workers=0, **options):
    images = load(place, workers)[not training]
    generator = torch.Generator().manual_seed(seed)
    return images.batches(batch_size, train=training, generator=generator, **options)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(a, b, strict=True)
    )


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, shorter_side", [(32, 36), (64, 73)])
def test_validation_images_are_those_of_torchvision(place, size, shorter_side):
    transform = transforms.Compose([
        transforms.Resize(shorter_side), transforms.CenterCrop(size), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])
    expected = list(datasets.ImageFolder(place / "val", transform))
    found = list(load(place, size=size)[1].batches(5, train=False))
    assert [len(y) for _, y in found] == [5] * 5 + [3] and found[0][0].dtype == torch.float32
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    torch.testing.assert_close(x, torch.stack([image for image, _ in expected]))
    assert y.tolist() == [label for _, label in expected] and y.dtype == torch.int64


def test_memory_format(place):
    contiguous = list(batches(place, 20))
    last = list(batches(place, 20, memory_format=torch.channels_last))
    assert same(contiguous, last) and all(x.is_contiguous() for x, _ in contiguous)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in last)


def test_an_epoch_depends_on_nothing_but_the_generator(place):
    state = torch.get_rng_state()
    one = batches(place, 16)
    first, second = list(one), list(one)
    assert [len(y) for _, y in first] == [16] * 5 + [4] and len(one) == 6
    assert sorted(torch.cat([y for _, y in first]).tolist()) == sorted([*range(7)] * 12)
    assert not same(first, second) and not same(first, list(batches(place, 16, seed=1)))
    torch.rand(3)
    several = batches(place, 16, workers=2)
    assert same(first, list(several)) and same(second, list(several))
    one.generator.manual_seed(0)
    assert same(first, list(one))
    torch.set_rng_state(state)
    list(batches(place, 16))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("training", [True, False])
def test_two_ranks_see_what_one_sees_in_batches_of_twice_the_size(place, training):
    expected = list(batches(place, 14, training=training))
    options = dict(training=training, world_size=2)
    of_ranks = [list(batches(place, 7, rank=rank, **options)) for rank in (0, 1)]
    together = [
        [torch.cat(tensors) for tensors in zip(*both, strict=True)]
        for both in zip(*of_ranks, strict=True)
    ]
    assert same(expected, together)


def search(place, workers, epochs, state=None):
    """Batches of a search, from two halves and one generator, and its state after each epoch."""
    train, _ = load(place, workers)
    generator = torch.Generator().manual_seed(7)
    if state is not None:
        generator.set_state(state)
    weight_half, arch_half = (
        train.subset(half).batches(size, train=True, generator=generator)
        for half, size in zip(data.split(train.labels, 0.7, 0), (8, 5), strict=True)
    )
    seen, states = [], []
    for _ in range(epochs):
        arch = arch_half.endless()
        for batch in weight_half:
            seen += [batch, next(arch)]
        states.append(generator.get_state())
    assert len(weight_half) == 8 and len(arch_half) == 5  # a pass over arch_half is incomplete
    return seen, states


def test_a_search_resumes_bitwise_with_any_number_of_workers(place):
    expected, states = search(place, 0, 3)
    for workers in (1, 2):
        found, others = search(place, workers, 3)
        assert same(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))
        resumed, others = search(place, workers, 2, states[0])
        assert same(resumed, expected[16:]) and torch.equal(others[-1], states[-1])


def test_two_halves_divide_the_workers_in_training(place):
    train, _ = load(place, workers=2)
    halves = [train.subset(half) for half in data.split(train.labels, 0.5, 0)]
    before = set(multiprocessing.active_children())
    streams = [iter(half.batches(6, train=True)) for half in halves]
    assert [len(y) for _, y in map(next, streams)] == [6, 6]
    assert len(set(multiprocessing.active_children()) - before) == 2
    one = load(place, workers=1)[0].subset(torch.arange(6)).batches(6, train=True)
    assert one.loader.num_workers == 1


def test_subset(place):
    train, _ = load(place, workers=1)
    part = train.subset(torch.tensor([80, 2]))
    assert len(part) == 2 and len(train) == 84 and part.labels.tolist() == [6, 0]
    assert part.labels.dtype == torch.int64 and part.classes == train.classes
    assert part.images.tolist() == [train.images[80], train.images[2]]
    assert (part.image_size, part.device, part.workers) == (32, torch.device("cpu"), 1)


def test_a_worker_that_dies_is_reported(place, monkeypatch):
    monkeypatch.setattr(data, "read_rgb", lambda path: signal.raise_signal(signal.SIGKILL))
    with pytest.raises(UserError, match="could not be read .*fewer --workers"):
        list(batches(place, 16, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_code_are_not_hidden(place, monkeypatch, workers):
    def read(path):
        raise RuntimeError("mine")

    monkeypatch.setattr(data, "read_rgb", read)
    one = batches(place, 16, workers=workers)
    with pytest.raises(RuntimeError, match="mine"):
        list(one)
    for worker in one.loader._iterator._workers if workers else ():
        worker.terminate()  # otherwise it ends seconds later


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_a_damaged_image_is_named(tmp_path, workers, training):
    imagenet_of_digits(tmp_path)
    for split in ("train", "val"):
        damaged = next((tmp_path / split / "n00000002").iterdir())
        damaged.write_bytes(damaged.read_bytes()[:-200])
        with pytest.raises(UserError, match=f"{damaged} cannot be read .*truncated"):
            list(batches(tmp_path, 8, training=split == "train", workers=workers))


def test_signals_to_all_processes_end_the_workers_silently(place, capfd):
    one = batches(place, 8, workers=2)
    passing = iter(one)
    next(passing), next(passing)  # one from each worker, so the signal handlers are installed
    workers = one.loader._iterator._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(passing)) == 9  # workers ignore SIGINT
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------


def folder(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize("files, message", [
    (["train/a/1.png", "train/b/1.png", "test/a/1.png"], "no folder val/"),
    (["val/a/1.png", "val/b/1.png"], "no folder train/"),
    (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"], "lacks: c;"),
])
def test_folders_in_another_layout(tmp_path, files, message):
    folder(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_labels_follow_the_training_folders(tmp_path):
    folder(tmp_path, "train/a/1.png", "train/b/1.JPEG", "train/c/x/1.jpg", "val/c/2.png",
           "val/c/note.txt")
    lines = []
    train, val = load(tmp_path, log=lines.append)
    assert train.classes == val.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 1, 2] and val.labels.tolist() == [2]
    assert len(lines) == 1 and "lacks classes" in lines[0] and "a, b" in lines[0]


def test_validation_images_alone_for_a_network(place, tmp_path):
    (tmp_path / "val").symlink_to(place / "val")
    train, val = imagenet.load("imagenet", tmp_path, 32, log=pytest.fail, test_only=True)
    assert train is None and val.counts() == [4] * 7 and val.mean == imagenet.MEAN
    classes = [*reversed(val.classes), "other"]
    converted = val.for_network(classes, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    ((x, y),) = converted.batches(28, train=False)
    assert y.tolist() == [6 - label for label in val.labels]
    assert x.min() >= 0 and x.max() <= 1


def test_invalid_arguments_of_batches(place):
    with pytest.raises(UserError, match="43 for each of 2 ranks is too large for the 84 images"):
        batches(place, 43, rank=0, world_size=2)
    with pytest.raises(UserError, match="without cutout_length: give --no-cutout"):
        batches(place, 16, cutout_length=16)
    with pytest.raises(UserError, match="imagenet is augmented without brightness: leave it out"):
        batches(place, 16, cutout_length=0, brightness=0.5)
    assert len(batches(place, 16, cutout_length=0, brightness=0.0)) == 6
