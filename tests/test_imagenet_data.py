"""ImageNet's files, and batches of them from worker processes."""

import re
import signal

import pytest
import torch
from scripts import imagenet_of_digits

import data
import imagenet


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds handwritten digits in ImageNet's layout, 12 and 4 of each class."""
    place = tmp_path_factory.mktemp("place")
    imagenet_of_digits(place / "images")
    return place


def batches(place, batch_size, *, training=True, seed=0, **options):
    images = imagenet.load(place / "images")[not training]
    generator = torch.Generator().manual_seed(seed)
    return imagenet.Batches(
        images, batch_size, train=training, image_size=32, generator=generator, **options
    )


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(a, b, strict=True)
    )


def test_validation_images_are_those_of_torchvision(place):
    from torchvision import datasets, transforms

    transform = transforms.Compose([
        transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    expected = list(datasets.ImageFolder(place / "images/val", transform))
    found = list(batches(place, 5, training=False))
    assert [len(y) for _, y in found] == [5] * 5 + [3] and found[0][0].dtype == torch.float32
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found)
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    torch.testing.assert_close(x, torch.stack([image for image, _ in expected]))
    assert y.tolist() == [label for _, label in expected]


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
    one.loader.batch_sampler.generator.manual_seed(0)
    assert same(first, list(one))
    torch.set_rng_state(state)
    list(batches(place, 16))
    assert torch.equal(state, torch.get_rng_state()), "the network's random numbers are its own"


def test_an_image_is_augmented_anew_in_every_epoch(place):
    loader = batches(place, 84)
    (x, _), (x2, _) = next(iter(loader)), next(iter(loader))
    plans = [list(imagenet.Plan(84, 84, True, torch.Generator().manual_seed(s)))[0] for s in (0, 1)]
    assert {i for i, _ in plans[0]} == {i for i, _ in plans[1]} == set(range(84))
    assert not {seed for _, seed in plans[0]} & {seed for _, seed in plans[1]}
    assert len({image.sum().item() for image in torch.cat([x, x2])}) > 160, "hardly any twice"


def test_two_processes_see_what_one_sees_in_batches_of_twice_the_size(place):
    whole = list(batches(place, 16))
    parts = [list(batches(place, 8, part=(rank, 2))) for rank in (0, 1)]
    together = [
        [torch.cat(tensors) for tensors in zip(*both, strict=True)]
        for both in zip(*parts, strict=True)
    ]
    assert same(whole, together)


@pytest.mark.parametrize("images, batch_size, processes, sizes", [
    (84, 8, 2, [8] * 5 + [2]), (83, 8, 2, [8] * 5), (86, 8, 2, [8] * 5 + [3]),
    (87, 8, 2, [8] * 5 + [3]), (33, 16, 1, [16, 16]), (34, 16, 1, [16, 16, 2]),
    (24, 4, 3, [4, 4]), (32, 4, 3, [4, 4, 2]),
])  # fmt: skip
def test_training_images_are_dealt_out_in_equal_parts(images, batch_size, processes, sizes):
    dealt = []
    for rank in range(processes):
        generator = torch.Generator().manual_seed(5)
        plan = imagenet.Plan(images, batch_size, True, generator, (rank, processes))
        found = list(plan)
        assert [len(batch) for batch in found] == sizes and len(plan) == len(sizes)
        dealt += [index for batch in found for index, _ in batch]
    assert len(set(dealt)) == len(dealt) == processes * sum(sizes)


@pytest.mark.parametrize("images", [1, 7, 8, 9, 31])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_neither_loses_nor_repeats_an_image(images, processes):
    plans = [imagenet.Plan(images, 4, False, part=(rank, processes)) for rank in range(processes)]
    found = [list(plan) for plan in plans]
    assert [len(plan) for plan in plans] == [len(part) for part in found]
    index = [i for part in found for batch in part for i, seed in batch if seed is None]
    assert sorted(index) == list(range(images))
    assert all(0 < len(batch) <= 4 for part in found for batch in part)


class Deadly(imagenet._Reader):
    def __getitem__(self, item):
        signal.raise_signal(signal.SIGKILL)


def test_a_worker_that_dies_is_reported(place, monkeypatch):
    monkeypatch.setattr(imagenet, "_Reader", Deadly)
    with pytest.raises(data.DataError, match="fewer --workers"):
        list(batches(place, 16, workers=1))


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------


def folder(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize("files, says", [
    (["train/a/1.png", "train/b/1.png"], "no folder val/"),
    (["val/a/1.png", "val/b/1.png"], "no folder train/"),
    (["train/a/1.png", "train/b/1.png", "val/1.png"], "no class folders"),
    (["train/a/1.png", "train/b/._1.png", "val/a/1.png"], "train/b has no images"),
    (["train/a/1.png", "val/a/1.png"], "single class (a)"),
    (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"], "lacks: c;"),
])  # fmt: skip
def test_folders_that_are_not_imagenets(tmp_path, files, says):
    folder(tmp_path, *files)
    with pytest.raises(data.DataError, match=re.escape(says)):
        imagenet.load(tmp_path)


def test_labels_follow_the_training_folders(tmp_path):
    folder(tmp_path, "train/a/1.png", "train/b/1.JPEG", "train/c/x/1.jpg", "val/c/2.png",
           "val/c/note.txt")  # fmt: skip
    train_images, val = imagenet.load(tmp_path)
    assert train_images.classes == val.classes == ["a", "b", "c"]
    assert train_images.labels.tolist() == [0, 1, 2] and val.labels.tolist() == [2]


def test_batches_that_cannot_be(place):
    with pytest.raises(data.DataError, match="too large for the 84 images"):
        batches(place, 43, part=(0, 2))
    with pytest.raises(data.DataError, match="at least 2"):
        batches(place, 1)
