"""imagenet.py: the images of a folder, and their batches from worker processes."""

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
    """A folder of handwritten digits in ImageNet's layout: 7 classes of 12 and 4 images."""
    place = tmp_path_factory.mktemp("place")
    imagenet_of_digits(place)
    return place


def load(place, workers=0, size=32):
    return imagenet.load("imagenet", place, size, "cpu", workers)


def batches(place, batch_size, *, training=True, seed=0, workers=0, **options):
    images = load(place, workers)[not training]
    generator = torch.Generator().manual_seed(seed)
    return images.batches(batch_size, train=training, generator=generator, **options)


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(a, b, strict=True)
    )


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, shorter_side", [(32, 36), (64, 73)])
def test_validation_batches_are_those_of_torchvision(place, size, shorter_side):
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


def test_an_epoch_depends_only_on_the_generator(place):
    state = torch.get_rng_state()
    one = batches(place, 16)
    first, second = list(one), list(one)
    assert [len(y) for _, y in first] == [16] * 5 + [4] and len(one) == 6
    assert sorted(torch.cat([y for _, y in first]).tolist()) == sorted([*range(7)] * 12)
    assert not equal(first, second) and not equal(first, list(batches(place, 16, seed=1)))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    several = batches(place, 16, workers=2)
    assert equal(first, list(several)) and equal(second, list(several))
    one.generator.manual_seed(0)
    assert equal(first, list(one))


@pytest.mark.parametrize("training", [True, False])
def test_two_ranks_together_see_the_batches_of_one(place, training):
    expected = list(batches(place, 14, training=training))
    options = dict(training=training, world_size=2)
    of_ranks = [list(batches(place, 7, rank=rank, **options)) for rank in (0, 1)]
    together = [
        (torch.cat((x0, x1)), torch.cat((y0, y1)))
        for (x0, y0), (x1, y1) in zip(*of_ranks, strict=True)
    ]
    assert equal(expected, together)


def batches_of_a_search(place, workers, epochs, state=None):
    """Batches of both halves, which use one generator, and its state after each epoch."""
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
    assert len(weight_half) == 8 and len(arch_half) == 5  # so one pass of arch_half is incomplete
    return seen, states


def test_a_search_resumes_to_the_bit_with_any_number_of_workers(place):
    expected, states = batches_of_a_search(place, 0, 3)
    for workers in (1, 2):
        found, others = batches_of_a_search(place, workers, 3)
        assert equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))
        resumed, others = batches_of_a_search(place, workers, 2, states[0])
        assert equal(resumed, expected[16:]) and torch.equal(others[-1], states[-1])


def test_the_halves_of_a_search_divide_the_workers(place):
    train, _ = load(place, workers=2)
    halves = [train.subset(half) for half in data.split(train.labels, 0.5, 0)]
    before = set(multiprocessing.active_children())
    streams = [iter(half.batches(6, train=True)) for half in halves]
    assert [len(y) for _, y in map(next, streams)] == [6, 6]
    assert len(set(multiprocessing.active_children()) - before) == 2


# ------------------------------------------------------------------------------------------------
# Failures
# ------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_reported(place, monkeypatch):
    monkeypatch.setattr(data, "read_rgb", lambda path: signal.raise_signal(signal.SIGKILL))
    with pytest.raises(UserError, match="could not be read .*fewer --workers"):
        list(batches(place, 16, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_code_keeps_its_type(place, monkeypatch, workers):
    def read(path):
        raise RuntimeError("mine")

    monkeypatch.setattr(data, "read_rgb", read)
    one = batches(place, 16, workers=workers)
    with pytest.raises(RuntimeError, match="mine"):
        list(one)
    for worker in one.loader._iterator._workers if workers else ():
        worker.terminate()  # otherwise it ends seconds later


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named(tmp_path, workers, split):
    imagenet_of_digits(tmp_path)
    damaged = next((tmp_path / split / "n00000002").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{damaged} cannot be read .*truncated"):
        list(batches(tmp_path, 8, training=split == "train", workers=workers))


def test_signals_to_all_processes_end_the_workers_silently(place, capfd):
    one = batches(place, 8, workers=2)
    iterator = iter(one)
    next(iterator), next(iterator)  # one from each worker, so the signal handlers are installed
    workers = one.loader._iterator._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(iterator)) == 9  # workers ignore SIGINT
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert capfd.readouterr() == ("", "")


def test_augmentations_of_other_data_sets_are_refused(place):
    with pytest.raises(UserError, match="give --no-cutout"):
        batches(place, 16, cutout_length=16)
    with pytest.raises(UserError, match="without brightness: leave it out"):
        batches(place, 16, cutout_length=0, brightness=0.5)


def test_validation_images_can_be_loaded_without_training_images(place, tmp_path):
    (tmp_path / "val").symlink_to(place / "val")
    train, val = imagenet.load("imagenet", tmp_path, 32, log=pytest.fail, test_only=True)
    assert train is None and val.counts() == [4] * 7 and val.mean == imagenet.MEAN
    classes = [*reversed(val.classes), "other"]
    converted = val.for_network(classes, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    ((x, y),) = converted.batches(28, train=False)
    assert y.tolist() == [6 - label for label in val.labels]
    assert x.min() >= 0 and x.max() <= 1
