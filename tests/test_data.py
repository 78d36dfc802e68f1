"""data.py: augmentation, batches, and loading of data sets."""

import hashlib
import pickle
import urllib.error
from itertools import zip_longest

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chi2_contingency, chisquare
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import functional as TF

import data
from data import Batches, Images
from utils import UserError

MEAN, STD = data.CIFAR10_MEAN, data.CIFAR10_STD
UNLIKELY = 1e-3  # p-value; the seeds are fixed


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def raw(x):
    """Undo the normalization; return pixels from 0 to 255."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((x * std + mean) * 255).round().long()


def make_images(n, size=8, classes=2, **about):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=seeded(1))
    about = {"classes": list("abcdefghij")[:classes], "mean": MEAN, "std": STD} | about
    return Images(images, torch.arange(n) % classes, **about)


def numbered(n):
    """Images with the labels 0, 1, ..., n - 1; all pixels equal the label."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, 3, 8, 8).contiguous()
    return Images(images, torch.arange(n), [str(i) for i in range(n)], MEAN, STD)


# ------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------

N = 162 * 60  # 81 offsets x 2 flips, 60 of each expected


@pytest.fixture(scope="module")
def crops():
    """An image of rows and columns, N augmentations of it, and their offsets and flips."""
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    noise = torch.randint(1, 256, (16, 16), generator=seeded(3))
    image = torch.stack((row + 1, 100 + column, noise)).byte()
    x = data.augment(image.expand(N, 3, 16, 16), MEAN, STD, flip=True, generator=seeded())
    pixels = raw(x)  # rows and columns 4..11 of the output are never padding
    top = pixels[:, 0, 8, 8] - 1 - 8 + 4
    flipped = pixels[:, 1, 8, 8] > pixels[:, 1, 8, 9]
    left = torch.where(flipped, pixels[:, 1, 8, 7], pixels[:, 1, 8, 8]) - 100 - 8 + 4
    return image, x, top, left, flipped.long()


def test_crops_and_flips_equal_those_of_torchvision(crops):
    image, x, top, left, flipped = crops
    combination = (top * 9 + left) * 2 + flipped
    assert set(combination.tolist()) == set(range(162))
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    for k in range(162):
        i, j, flip = k // 18, k // 2 % 9, k % 2
        expected = TF.crop(TF.pad(pil, 4), i, j, 16, 16)
        expected = TF.hflip(expected) if flip else expected
        expected = TF.normalize(TF.to_tensor(expected), MEAN, STD)
        got = x[combination == k]
        torch.testing.assert_close(got, expected.expand_as(got), rtol=0, atol=2e-6)


def test_offsets_and_flips_are_uniform_and_independent(crops):
    _, _, top, left, flipped = crops
    combination = (top * 9 + left) * 2 + flipped
    assert chisquare(combination.bincount(minlength=162)).pvalue > UNLIKELY
    for values, n in ((top, 9), (left, 9), (flipped, 2)):  # neighbors in the batch
        pairs = (values[:-1] * n + values[1:]).bincount(minlength=n * n)
        assert chi2_contingency(pairs.view(n, n)).pvalue > UNLIKELY


def darts_masks(size, length):
    """The mask of DARTS for each center: (size * size, size, size), 0 in the square."""
    masks = np.ones((size, size, size, size), np.float32)
    for y in range(size):
        for x in range(size):
            half = length // 2
            y1, y2 = np.clip([y - half, y - half + length], 0, size)
            x1, x2 = np.clip([x - half, x - half + length], 0, size)
            masks[y, x, y1:y2, x1:x2] = 0
    return torch.from_numpy(masks).flatten(0, 1)


@pytest.mark.parametrize("length, size", [(6, 12), (5, 12), (16, 32)])
def test_cutout_equals_that_of_darts_at_uniform_centers(length, size):
    n = 100 * size**2 if size < 32 else 500
    white = torch.full((n, 3, size, size), 255, dtype=torch.uint8)
    x = data.augment(white, MEAN, STD, flip=True, cutout_length=length, generator=seeded(4))
    uncut = data.augment(white, MEAN, STD, flip=True, generator=seeded(4))
    kept = x != 0  # neither white nor black is 0 after normalization
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 0], kept[:, 2])
    assert torch.equal(x[kept], uncut[kept])
    masks, kept = darts_masks(size, length).flatten(1), kept[:, 0].flatten(1).float()
    differences, center = (masks @ (1 - kept).T + (1 - masks) @ kept.T).min(0)
    assert differences.max() == 0
    if size < 32:
        assert chisquare(center.bincount(minlength=size**2)).pvalue > UNLIKELY
        pairs = (center[1:] // size * size + center[:-1] // size).bincount(minlength=size**2)
        assert chi2_contingency(pairs.view(size, size)).pvalue > UNLIKELY


# ------------------------------------------------------------------------------------------
# Batches and split
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, train, message", [
    (0, False, "too few images .* \\(0\\)"), (1, True, "too few images"),
    (3, True, "--batch_size 4 is too large for the 3 images"),
])
def test_too_few_images_for_a_batch(n, train, message):
    with pytest.raises(UserError, match=message):
        Batches(numbered(n), 4, train=train)


def test_evaluation_keeps_the_order_and_only_normalizes():
    images = make_images(10)
    batches = images.batches(4, train=False, cutout_length=4)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(x, data.normalize(images.images, MEAN, STD))
    assert torch.equal(y, images.labels)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_each_training_epoch_contains_every_image_once_in_a_new_order():
    batches = Batches(numbered(50), 8, train=True, generator=seeded())
    assert len(batches) == len(list(batches)) == 7
    orders = []
    for _ in range(2):
        for x, y in batches:
            assert x.dtype == torch.float32 and y.dtype == torch.int64
            assert torch.equal(raw(x).amax((1, 2, 3)), y)  # each image has its label
            orders.append(y)
    first, second = torch.cat(orders).split(50)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second) and first.tolist() != list(range(50))


@pytest.mark.parametrize("flip", [True, False])
def test_training_flips_images_if_allowed_and_cuts_out(flip):
    ramps = torch.arange(16, dtype=torch.uint8).expand(64, 3, 16, 16).contiguous()
    images = Images(ramps, torch.zeros(64).long(), ["a"], MEAN, STD, flip)
    ((x, _),) = images.batches(64, train=True, generator=seeded())
    assert (raw(x)[:, 0, 8, 7] > raw(x)[:, 0, 8, 8]).any() == flip
    ((x, _),) = images.batches(64, train=True, cutout_length=4, generator=seeded())
    assert ((x == 0).sum((1, 2, 3)) >= 3 * 2 * 2).all()


def test_endless_batches_repeat_and_depend_only_on_the_generator():
    generator = seeded()
    batches = Batches(numbered(10), 4, train=True, generator=generator, cutout_length=4)

    def epoch(steps):
        stream = batches.endless()
        return [next(stream) for _ in range(steps)]

    labels = torch.cat([y for _, y in epoch(6)])
    assert sorted(labels[:10].tolist()) == sorted(labels[10:].tolist()) == list(range(10))
    assert not torch.equal(labels[:10], labels[10:])
    state = generator.get_state()
    expected = epoch(4) + epoch(4)
    torch.manual_seed(1)  # the global generator has no effect
    generator.set_state(state)
    for (x, y), (x_again, y_again) in zip(expected, epoch(4) + epoch(4), strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)


@settings(deadline=None, database=None, max_examples=50, derandomize=True)
@given(
    n=st.integers(1, 60), size=st.integers(1, 9), world_size=st.integers(2, 4), train=st.booleans()
)
def test_ranks_together_see_the_batches_of_one(n, size, world_size, train):
    assume(not train or (n >= world_size * size and size > 1))
    images, options = numbered(n), dict(train=train, cutout_length=4 * train)

    expected = [*images.batches(world_size * size, generator=seeded(), **options)]
    of_ranks = [
        list(images.batches(size, generator=seeded(), rank=r, world_size=world_size, **options))
        for r in range(world_size)
    ]
    for (x, y), parts in zip(expected, zip_longest(*of_ranks), strict=False):
        parts = [part for part in parts if part]
        if train and len(y) % world_size:  # the last batch, cut to equal parts
            assert [len(y) for _, y in parts] == world_size * [len(y) // world_size]
        else:
            assert torch.equal(torch.cat([x for x, _ in parts]), x)
            assert torch.equal(torch.cat([y for _, y in parts]), y)

    seen = torch.cat([y for batches in of_ranks for _, y in batches])
    assert n >= len(seen.unique()) == len(seen) >= n - train * (2 * world_size - 1)


@pytest.mark.parametrize("images, batch_size, world_size, sizes", [
    (84, 8, 2, [8] * 5 + [2]), (83, 8, 2, [8] * 5), (33, 16, 1, [16, 16]), (3, 4, 2, []),
])
def test_training_batches_have_the_same_size_on_all_ranks(images, batch_size, world_size, sizes):
    for rank in range(world_size):
        slices = data.batch_slices(images, batch_size, train=True, rank=rank, world_size=world_size)
        assert [batch.stop - batch.start for batch in slices] == sizes


@pytest.mark.parametrize("train", [True, False])
def test_channels_last(train):
    images = make_images(6)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        options = dict(cutout_length=4, generator=seeded(), memory_format=memory_format)
        ((x, _),) = images.batches(6, train=train, **options)
        assert x.is_contiguous(memory_format=memory_format)
        found.append(x)
    assert torch.equal(*found)


def test_labels_are_converted_to_those_of_a_network():
    images = make_images(6, classes=3)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    converted = images.for_network(["c", "x", "a", "b"], mean, std)
    assert converted.labels.tolist() == [2, 3, 0, 2, 3, 0] and converted.counts() == [2, 0, 2, 2]
    assert converted.classes == ["c", "x", "a", "b"] and images.labels.tolist() == 2 * [0, 1, 2]
    ((x, _),) = converted.batches(6, train=False)
    assert torch.equal(x, data.normalize(images.images, mean, std))
    with pytest.raises(UserError, match="a, b, c and 2 more; it was trained with x, y"):
        make_images(6, classes=5).for_network(["x", "y"], mean, std)


@settings(deadline=None, database=None, max_examples=200, derandomize=True)
@given(
    st.lists(st.sampled_from([0, 0, 1, 1, 1, 2, 5]), max_size=60), st.floats(0, 1),
    st.integers(0, 2**63 - 1),
)
def test_split_is_stratified_and_reproducible(labels, portion, seed):
    labels = torch.tensor(labels, dtype=torch.int64)
    first, second = data.split(labels, portion, seed)
    assert first.dtype == second.dtype == torch.int64
    assert sorted(first.tolist() + second.tolist()) == list(range(len(labels)))
    assert first.tolist() == sorted(first.tolist()) and second.tolist() == sorted(second.tolist())
    assert len(first) == round(portion * len(labels))
    for label in labels.unique():
        exact = portion * (labels == label).sum().item()
        assert abs((labels[first] == label).sum().item() - exact) < 1
    assert torch.equal(first, data.split(labels, portion, seed)[0])


# ------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------


def no_log(line):
    raise AssertionError(f"unexpected: {line}")


def write_folder(root, files):
    """Write files: path below root → PIL image, bytes, or the color of an 8 x 8 PNG."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            if not isinstance(content, Image.Image):
                content = Image.new("RGB", (8, 8), content)
            content.save(path)
    return root


def write_minimal(root, files=None):
    """Write a valid data set of two classes, and other files."""
    good = [f"{split}/{name}/0.png" for split in ("train", "test") for name in ("blue", "red")]
    return write_folder(root, {path: path.split("/")[1] for path in good} | (files or {}))


def palette_image():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 10, 200, 30])
    image.info["transparency"] = bytes([0, 0])
    return image


MODES = {
    "L.png": (Image.new("L", (8, 8), 77), (77, 77, 77)),
    "P_transparent.png": (palette_image(), (10, 200, 30)),
    "RGBA.png": (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (10, 20, 30)),
    "CMYK.tif": (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), (0, 255, 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_images_of_all_modes_are_converted_to_rgb(tmp_path, name, recwarn):
    image, color = MODES[name]
    root = write_minimal(tmp_path, {f"train/a/{name}": image})
    train, _ = data.load("imagefolder", root, image_size=8, log=list)
    expected = torch.tensor(color).view(3, 1, 1)
    assert (train.images[0] == expected).all()
    assert not recwarn


@pytest.mark.parametrize("workers", [0, 3])
def test_labels_and_order_of_a_folder(tmp_path, workers, capsys):
    write_folder(tmp_path, {
        "train/zebra/2.png": (2, 0, 0), "train/zebra/10.png": (1, 0, 0),
        "train/Ape/deep/er/x.JPG": (0, 0, 0), "train/cat/y.png": (3, 0, 0),
        "train/cat/notes.txt": b"no image", "train/README.md": b"no image",
        "val/zebra/0.png": (5, 0, 0), "val/Ape/0.png": (4, 0, 0),
    })
    lines = []
    train, test = data.load("imagefolder", tmp_path, 8, workers=workers, log=lines.append)
    (line,) = lines
    assert "val lacks classes" in line and "cat" in line
    assert train.classes == test.classes == ["Ape", "cat", "zebra"]
    assert train.labels.tolist() == [0, 1, 2, 2] and test.labels.tolist() == [0, 2]
    assert train.images[:, 0].amax((1, 2)).tolist() == [0, 3, 1, 2]  # sorted by name
    assert test.images[:, 0].amax((1, 2)).tolist() == [4, 5]
    assert train.flip and test.flip and train.images.is_contiguous()
    assert capsys.readouterr() == ("", "")  # a progress bar is shown only in a terminal


def test_images_of_other_sizes_are_resized_with_antialiasing(tmp_path):
    stripes = np.zeros((32, 16, 3), np.uint8)
    stripes[:, ::2] = 255  # gray if antialiased
    root = write_minimal(tmp_path, {"train/blue/1.png": Image.fromarray(stripes)})
    lines = []
    train, _ = data.load("imagefolder", root, 8, log=lines.append)
    assert lines == ["resized 1 of 3 images to 8 x 8"]
    assert (train.images[1].long() - 128).abs().max() < 30


@pytest.mark.parametrize("files, removed, message", [
    ({}, "train", r"no folder train/"),
    ({}, "test", r"no folder test/ or val/"),
    ({"train/green/notes.txt": b""}, None, r"green.*train/<class>/"),
    ({"test/green/0.png": "green", "test/gray/0.png": "gray"}, None,
     r"test has classes that .*train lacks: gray, green;"),
    ({"test/blue/a\nb.png": b"not an image"}, None, r"test/blue/a b.png cannot be read"),
    ({"train/blue/1.tif": Image.fromarray(np.zeros((8, 8), "uint16"))}, None,
     r"blue/1.tif cannot be read as an 8-bit image"),
])
def test_an_invalid_folder_is_refused(tmp_path, files, removed, message):
    root = write_minimal(tmp_path / "set", files)
    if removed:
        (root / removed).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=message) as info:
        data.load("imagefolder", root, 8, workers=2, log=list)
    assert str(root) in str(info.value) and "\n" not in str(info.value)


def test_test_images_can_be_loaded_without_training_images(tmp_path):
    root = write_minimal(tmp_path, {"train/red/1.png": b"broken", "val/gray/0.png": "gray"})
    train, test = data.load("imagefolder", root, 8, log=no_log, test_only=True)
    assert train is None and test.labels.tolist() == [0, 1] and test.classes == ["blue", "red"]
    assert test.mean is None and test.std is None
    for name in ("train", "test"):
        (root / name).rename(tmp_path / f"not_{name}")
    assert data.load("imagefolder", root, 8, log=no_log, test_only=True)[1].classes == ["gray"]


def test_a_new_data_set_of_arrays(tmp_path, monkeypatch):
    def load_mine(root, **_):
        file = np.load(f"{root}/mine.npz")
        return (file["x"], file["y"]), (file["x"][:2], [1, 0]), np.array(["cat", "dog"])

    with pytest.raises(UserError, match="unknown data set 'mine': use one of cifar10, cifar100"):
        data.load("mine", tmp_path)
    monkeypatch.setitem(data.DATASETS, "mine", load_mine)
    x = np.random.default_rng(0).integers(0, (256, 128, 32), (2500, 4, 4, 3)).astype(np.uint8)
    x = x.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(2500, dtype=np.uint8) % 2)
    train, test = data.load("mine", tmp_path, 4, log=no_log)
    assert (train.images.numpy() == x).all() and test.labels.tolist() == [1, 0]
    assert train.labels.dtype == torch.int64 and train.images.is_contiguous() and train.flip
    assert train.classes == ["cat", "dog"] and type(train.classes[0]) is str
    np.testing.assert_allclose(train.mean, x.mean((0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(train.std, x.std((0, 2, 3)) / 255, rtol=1e-9)
    assert (test.mean, test.std) == (train.mean, train.std)

    none, test = data.load("mine", tmp_path, 8, test_only=True)
    assert none is None and test.images.shape == (2, 3, 8, 8)
    np.savez(tmp_path / "mine.npz", x=x, y=[2] * 2500)
    with pytest.raises(UserError, match="labels from 2 to 2, and 2 classes"):
        data.load("mine", tmp_path, 8)


def test_digits():
    train, test = data.load("digits", "unused", 8, log=no_log)
    assert (len(train), len(test)) == (1438, 359)
    assert train.classes == [str(i) for i in range(10)] and not train.flip and not test.flip
    assert (test.labels.bincount() - 359 / 10).abs().max() < 2
    gray = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    found = {im[0].numpy().tobytes() for im in torch.cat((train.images, test.images))}
    assert found == {im.tobytes() for im in gray}
    assert (train.images[:, :1] == train.images).all()


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A small data set in the format of CIFAR, with the right checksums."""
    name = request.param
    cls = CIFAR10 if name == "cifar10" else CIFAR100
    root, labels = tmp_path / "root", "labels" if name == "cifar10" else "fine_labels"
    rng = np.random.default_rng(0)
    folder = root / cls.base_folder
    folder.mkdir(parents=True)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    def batch(file):
        return write(file, {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
                            labels: rng.integers(0, 3, 4).tolist()})

    monkeypatch.setattr(cls, "train_list", [batch(file) for file, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [batch(file) for file, _ in cls.test_list])
    file, md5 = write(cls.meta["filename"], {cls.meta["key"]: ["ant", "bee", "cow"]})
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5})
    return name, root, folder, cls


def test_cifar(cifar):
    name, root, folder, cls = cifar
    train, test = data.load(name, str(root), log=no_log)
    assert train.classes == ["ant", "bee", "cow"] and train.flip
    for images, files in ((train, cls.train_list), (test, cls.test_list)):
        batches = [pickle.loads((folder / file).read_bytes()) for file, _ in files]
        pixels = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)
        labels = sum((b.get("labels", b.get("fine_labels")) for b in batches), [])
        assert torch.equal(images.images, torch.from_numpy(pixels))
        assert images.labels.tolist() == labels
    if name == "cifar10":
        assert (train.mean, train.std) == (MEAN, STD)
    else:
        std = train.images[:, 0].double().std(correction=0).item() / 255
        np.testing.assert_allclose(train.std[0], std)


def test_damaged_cifar_is_refused(cifar):
    name, root, folder, cls = cifar
    path = folder / cls.test_list[0][0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=f"{root}/{cls.base_folder} is damaged: delete it"):
        data.load(name, root)


def test_a_failed_download_of_cifar_is_reported_in_one_line(tmp_path, monkeypatch):
    root = tmp_path / "empty"

    def download(self):
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr(CIFAR10, "download", download)
    with pytest.raises(UserError, match=f"{root}/.* download failed .*no network"):
        data.load("cifar10", root)


def test_a_folder_of_images_is_not_mistaken_for_cifar(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", lambda self: pytest.fail("downloads"))
    with pytest.raises(UserError, match="images has train/: give --dataset imagefolder"):
        data.load("cifar10", write_minimal(tmp_path / "images"))
