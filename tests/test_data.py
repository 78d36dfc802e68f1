"""data.py against torchvision's transforms, and on images and data sets written by the tests."""

import hashlib
import io
import os
import pickle
import urllib.error
from itertools import zip_longest

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chi2_contingency, chisquare
from sklearn.datasets import load_digits
from torchvision.transforms import functional as TF

import data
from data import Batches, Images
from utils import UserError

MEAN, STD = data.CIFAR10_MEAN, data.CIFAR10_STD
UNLIKELY = 1e-3  # the seeds are fixed: what passes once passes always


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def raw(x):
    """Undo the normalisation: pixels from 0 to 255."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((x * std + mean) * 255).round().long()


def make_images(n, size=8, classes=2, **about):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=seeded(1))
    about = {"classes": list("abcdefghij")[:classes], "mean": MEAN, "std": STD} | about
    return Images(images, torch.arange(n) % classes, **about)


def numbered(n):
    """Images whose labels number them; all pixels of an image tell its number too."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, 3, 8, 8).contiguous()
    return Images(images, torch.arange(n), [str(i) for i in range(n)], MEAN, STD)


def ramps(n):
    """Images that grow brighter to the right; after any crop, the centre is no padding."""
    return torch.arange(16, dtype=torch.uint8).expand(n, 3, 16, 16).contiguous()


# ------------------------------------------------------------------------------------------
# Crop, flip, normalisation
# ------------------------------------------------------------------------------------------

N = 162 * 60  # 81 offsets x 2 flips, 60 of each expected


@pytest.fixture(scope="module")
def crops():
    """An image telling row, column and something else; N augmentations; offset, flip of each."""
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    noise = torch.randint(1, 256, (16, 16), generator=seeded(3))
    image = torch.stack((row + 1, 100 + column, noise)).byte()
    x = data.augment(image.expand(N, 3, 16, 16), MEAN, STD, flip=True, generator=seeded())
    pixels = raw(x)  # rows and columns 4..11 of the output are never padding
    top = pixels[:, 0, 8, 8] - 1 - 8 + 4
    flipped = pixels[:, 1, 8, 8] > pixels[:, 1, 8, 9]
    left = torch.where(flipped, pixels[:, 1, 8, 7], pixels[:, 1, 8, 8]) - 100 - 8 + 4
    return image, x, top, left, flipped.long()


def test_crops_and_flips_are_those_of_torchvision(crops):
    image, x, top, left, flipped = crops
    kind = (top * 9 + left) * 2 + flipped
    assert set(kind.tolist()) == set(range(162))
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    for k in range(162):
        i, j, flip = k // 18, k // 2 % 9, k % 2
        expected = TF.crop(TF.pad(pil, 4), i, j, 16, 16)
        expected = TF.hflip(expected) if flip else expected
        expected = TF.normalize(TF.to_tensor(expected), MEAN, STD)
        got = x[kind == k]
        torch.testing.assert_close(got, expected.expand_as(got), rtol=0, atol=2e-6)


def test_offsets_and_flips_are_uniform_and_independent(crops):
    _, _, top, left, flipped = crops
    kind = (top * 9 + left) * 2 + flipped
    assert chisquare(kind.bincount(minlength=162)).pvalue > UNLIKELY


@pytest.mark.parametrize("shift", [1, 2, 81])
def test_images_of_a_batch_are_augmented_independently(crops, shift):
    for values, n in zip(crops[2:], (9, 9, 2), strict=True):
        pairs = (values[:-shift] * n + values[shift:]).bincount(minlength=n * n)
        assert chi2_contingency(pairs.view(n, n)).pvalue > UNLIKELY


def test_padding_is_black_before_normalisation():
    white = torch.full((200, 3, 8, 8), 255, dtype=torch.uint8)
    x = data.augment(white, MEAN, STD, flip=False, generator=seeded())
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(x.amin((0, 2, 3)), black)
    assert set(raw(x).unique().tolist()) == {0, 255}


def test_nothing_is_mirrored_without_flip():
    pixels = raw(data.augment(ramps(500), MEAN, STD, flip=False, generator=seeded()))
    assert (pixels[:, :, 8, 7] + 1 == pixels[:, :, 8, 8]).all()


def test_images_keep_their_place_and_channels():
    images = torch.arange(1, 241, dtype=torch.uint8).view(80, 3, 1, 1).expand(80, 3, 8, 12)
    pixels = raw(data.augment(images, MEAN, STD, flip=True, cutout_length=0, generator=seeded()))
    assert pixels.shape == (80, 3, 8, 12)
    assert torch.equal(pixels.amax((2, 3)), torch.arange(1, 241).view(80, 3))


def test_normalize_is_torchvisions():
    x = torch.arange(256).repeat(3).view(1, 3, 16, 16).byte()
    expected = TF.normalize(x.float() / 255, MEAN, STD)
    got = data.normalize(x, MEAN, STD)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_augment_reads_no_values():
    # a tensor on "meta" has none: whatever would make a GPU wait fails
    x = torch.empty(5, 3, 8, 8, dtype=torch.uint8, device="meta")
    y = data.augment(x, MEAN, STD, flip=True, cutout_length=4)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.float32, "meta")


# ------------------------------------------------------------------------------------------
# Cutout
# ------------------------------------------------------------------------------------------


def darts_masks(size, length):
    """Mask of every centre, (size * size, size, size): 0 in the square, by DARTS' formula."""
    masks = np.ones((size, size, size, size), np.float32)
    for y in range(size):
        for x in range(size):
            y1, y2 = np.clip(y - length // 2, 0, size), np.clip(y + length // 2, 0, size)
            x1, x2 = np.clip(x - length // 2, 0, size), np.clip(x + length // 2, 0, size)
            masks[y, x, y1:y2, x1:x2] = 0
    return torch.from_numpy(masks).flatten(0, 1)


@pytest.mark.parametrize("length, size", [(6, 12), (5, 12), (2, 8), (16, 32)])
def test_cutout_is_that_of_darts(length, size):
    n = 100 * size**2 if size < 32 else 500
    white = torch.full((n, 3, size, size), 255, dtype=torch.uint8)
    x = data.augment(white, MEAN, STD, flip=True, cutout_length=length, generator=seeded(4))
    plain = data.augment(white, MEAN, STD, flip=True, generator=seeded(4))
    kept = x != 0  # no normalised white or black is 0
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 0], kept[:, 2])
    assert torch.equal(x[kept], plain[kept])
    # each mask belongs to one centre alone at these sizes, so the centres can be counted
    masks = darts_masks(size, length).flatten(1)
    assert len(masks.unique(dim=0)) == size**2
    wrong = masks @ (1 - kept[:, 0].flatten(1).float()).T + (1 - masks) @ (
        kept[:, 0].flatten(1).float().T
    )
    error, centre = wrong.min(0)
    assert error.max() == 0
    if size < 32:
        assert chisquare(centre.bincount(minlength=size**2)).pvalue > UNLIKELY
        row, column = centre // size, centre % size
        for a, b in ((row[1:], row[:-1]), (column[1:], column[:-1]), (row[1:], column[:-1])):
            pairs = (a * size + b).bincount(minlength=size**2).view(size, size)
            assert chi2_contingency(pairs).pvalue > UNLIKELY


# ------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, batch_size, train_sizes, test_sizes",
    [
        (10, 4, [4, 4, 2], [4, 4, 2]),
        (8, 4, [4, 4], [4, 4]),
        (9, 4, [4, 4], [4, 4, 1]),
        (4, 4, [4], [4]),
        (3, 1, [1, 1, 1], [1, 1, 1]),
    ],
)
def test_batch_sizes(n, batch_size, train_sizes, test_sizes):
    for train, sizes in ((True, train_sizes), (False, test_sizes)):
        batches = Batches(numbered(n), batch_size, train=train)
        got = list(batches)
        assert [len(y) for _, y in got] == [len(x) for x, _ in got] == sizes
        assert len(batches) == len(sizes)


def test_a_batch_larger_than_the_training_data_is_an_error():
    with pytest.raises(UserError, match="--batch_size 4 is too large for the 3 images"):
        Batches(numbered(3), 4, train=True)
    assert [len(y) for _, y in Batches(numbered(3), 4, train=False)] == [3]


@pytest.mark.parametrize("n, train", [(0, True), (0, False), (1, True)])
def test_no_batch_at_all_is_an_error(n, train):
    with pytest.raises(UserError, match=f"too few images .* \\({n}\\)"):
        Batches(numbered(n), 4, train=train)


def test_evaluation_is_in_order_and_only_normalised():
    images = make_images(10)
    x, y = (torch.cat(parts) for parts in zip(*Batches(images, 4, train=False), strict=True))
    assert torch.equal(x, data.normalize(images.images, MEAN, STD))
    assert torch.equal(y, images.labels)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_training_passes_over_every_image_in_new_orders():
    batches = Batches(numbered(50), 8, train=True, generator=seeded())
    orders = []
    for _ in range(2):
        for x, y in batches:
            assert x.dtype == torch.float32 and y.dtype == torch.int64
            assert torch.equal(raw(x).amax((1, 2, 3)), y)  # image and label stay together
            orders.append(y)
    first, second = torch.cat(orders).split(50)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second) and first.tolist() != list(range(50))


def test_flip_and_cutout_are_passed_on():
    for flip in (True, False):
        images = Images(ramps(64), torch.zeros(64).long(), ["a"], MEAN, STD, flip)
        ((x, _),) = Batches(images, 64, train=True, generator=seeded())
        assert (raw(x)[:, 0, 8, 7] > raw(x)[:, 0, 8, 8]).any() == flip
        assert (x == 0).sum() == 0
        ((x, _),) = Batches(images, 64, train=True, cutout_length=4, generator=seeded())
        assert ((x == 0).sum((1, 2, 3)) >= 3 * 2 * 2).all()
    ((x, _),) = Batches(images, 64, train=False, cutout_length=4)
    assert (x == 0).sum() == 0


def test_the_generator_is_all_the_state():
    generator = seeded()
    batches = Batches(make_images(21), 5, train=True, cutout_length=4, generator=generator)
    list(batches)
    state = generator.get_state()
    torch.manual_seed(0)
    before = [list(batches), list(batches)]
    generator.set_state(state)
    torch.manual_seed(1)  # the default generator has no part in it
    torch.rand(10)
    after = [list(batches), list(batches)]
    other = seeded()
    other.set_state(state)
    resumed = Batches(make_images(21), 5, train=True, cutout_length=4, generator=other)
    after_restart = [list(resumed), list(resumed)]
    for x, again, restarted in zip(
        *(sum(b, []) for b in (before, after, after_restart)), strict=True
    ):
        for a, b, c in zip(x, again, restarted, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(before[0][0][0], before[1][0][0])


def test_endless_goes_round_and_resumes_at_the_start_of_an_epoch():
    generator = seeded()
    batches = Batches(numbered(10), 4, train=True, generator=generator)

    def epoch(steps):
        stream = batches.endless()
        return [next(stream) for _ in range(steps)]

    labels = torch.cat([y for _, y in epoch(6)])
    assert sorted(labels[:10].tolist()) == sorted(labels[10:].tolist()) == list(range(10))
    assert not torch.equal(labels[:10], labels[10:])
    state = generator.get_state()
    expected = epoch(4) + epoch(4)
    generator.set_state(state)
    for (x, y), (x_again, y_again) in zip(expected, epoch(4) + epoch(4), strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)


@settings(deadline=None, database=None, max_examples=50, derandomize=True)
@given(
    n=st.integers(4, 60), size=st.integers(1, 9), world_size=st.integers(2, 4), train=st.booleans()
)
def test_ranks_together_see_what_a_single_one_sees(n, size, world_size, train):
    assume(not train or (n >= world_size * size and size > 1))
    images, options = numbered(n), dict(train=train, cutout_length=4 * train)

    whole = [*images.batches(world_size * size, generator=seeded(), **options)]
    of_ranks = [
        list(images.batches(size, generator=seeded(), rank=r, world_size=world_size, **options))
        for r in range(world_size)
    ]
    for batch, own in zip(whole, zip_longest(*of_ranks), strict=False):
        own = [share for share in own if share]
        if train and len(batch[1]) % world_size:  # the last one, cut to equal shares
            assert [len(y) for _, y in own] == world_size * [len(batch[1]) // world_size]
        else:
            for together, alone in zip(zip(*own, strict=True), batch, strict=True):
                assert torch.equal(torch.cat(together), alone)

    # In the next pass the generators are still in step.
    seen = torch.cat([y for batches in of_ranks for _, y in batches])
    assert n >= len(seen.unique()) == len(seen) >= n - train * (2 * world_size - 1)


@pytest.mark.parametrize("images, batch_size, world_size, sizes", [
    (84, 8, 2, [8] * 5 + [2]), (83, 8, 2, [8] * 5), (86, 8, 2, [8] * 5 + [3]),
    (87, 8, 2, [8] * 5 + [3]), (33, 16, 1, [16, 16]), (34, 16, 1, [16, 16, 2]),
    (24, 4, 3, [4, 4]), (32, 4, 3, [4, 4, 2]), (5, 1, 2, [1, 1]), (3, 4, 2, []), (1, 1, 2, []),
])
def test_training_images_are_cut_into_equal_shares(images, batch_size, world_size, sizes):
    seen = []
    for rank in range(world_size):
        slices = data.cut(images, batch_size, train=True, rank=rank, world_size=world_size)
        shares = [range(images)[share] for share in slices]
        assert [len(share) for share in shares] == sizes
        seen += [index for share in shares for index in share]
    assert sorted(seen) == list(range(world_size * sum(sizes)))


@pytest.mark.parametrize("images", [0, 1, 7, 8, 9, 31])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_neither_loses_nor_repeats_an_image(images, world_size):
    shares = [
        range(images)[share] for rank in range(world_size)
        for share in data.cut(images, 4, train=False, rank=rank, world_size=world_size)
    ]
    assert sorted(i for share in shares for i in share) == list(range(images))
    assert all(0 < len(share) <= 4 for share in shares)


def test_a_rank_without_images_to_evaluate_is_no_error():
    found = [list(numbered(1).batches(4, train=False, rank=r, world_size=2)) for r in range(2)]
    assert [len(batches) for batches in found] == [0, 1]


@pytest.mark.parametrize("train", [True, False])
def test_channels_last(train):
    images = make_images(6)
    options = dict(train=train, cutout_length=4, generator=seeded())
    ((x, _),) = images.batches(6, memory_format=torch.channels_last, **options)
    options["generator"].manual_seed(0)
    ((plain, _),) = images.batches(6, **options)
    assert x.is_contiguous(memory_format=torch.channels_last) and plain.is_contiguous()
    assert torch.equal(x, plain)


def test_subset():
    images = make_images(10, classes=3, flip=False)
    part = images.subset(torch.tensor([7, 2]))
    assert len(part) == 2 and len(images) == 10
    assert torch.equal(part.images, images.images[[7, 2]])
    assert part.labels.tolist() == [1, 2]
    assert (part.classes, part.mean, part.std, part.flip) == (["a", "b", "c"], MEAN, STD, False)


# ------------------------------------------------------------------------------------------
# split
# ------------------------------------------------------------------------------------------


@settings(deadline=None, database=None, max_examples=200, derandomize=True)
@given(
    st.lists(st.sampled_from([0, 0, 1, 1, 1, 2, 5]), max_size=60),
    st.floats(0, 1),
    st.integers(0, 2**63 - 1),
)
def test_split_is_stratified(labels, portion, seed):
    labels = torch.tensor(labels, dtype=torch.int64)
    first, second = data.split(labels, portion, seed)
    assert first.dtype == second.dtype == torch.int64
    assert sorted(first.tolist() + second.tolist()) == list(range(len(labels)))
    assert first.tolist() == sorted(first.tolist()) and second.tolist() == sorted(second.tolist())
    assert len(first) == round(portion * len(labels))
    for label in labels.unique():
        exact = portion * (labels == label).sum().item()
        assert abs((labels[first] == label).sum().item() - exact) < 1
    again = data.split(labels, portion, seed)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


def test_split_gives_every_image_the_same_chance_and_seeds_differ():
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 1, 1])
    count = torch.zeros(10)
    seen = set()
    for seed in range(600):
        first, _ = data.split(labels, 0.5, seed)
        count[first] += 1
        seen.add(tuple(first.tolist()))
    assert len(seen) > 70  # of 6 * 20 = 120
    assert (count - 300).abs().max() < 5 * (600 / 4) ** 0.5


def test_split_leaves_the_default_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    data.split(torch.zeros(10).long(), 0.5, 7)
    assert torch.equal(torch.rand(3), expected)


def test_split_with_classes_of_one_image():
    first, second = data.split(torch.arange(7), 0.5, 0)
    assert (len(first), len(second)) == (4, 3)


@pytest.mark.parametrize("portion", [-0.1, 1.5, float("nan")])
def test_split_refuses_other_portions(portion):
    with pytest.raises(ValueError, match="portion"):
        data.split(torch.zeros(4).long(), portion, 0)


# ------------------------------------------------------------------------------------------
# load: folders of images
# ------------------------------------------------------------------------------------------


def quiet(line):
    raise AssertionError(f"unexpected: {line}")


def write_folder(root, files):
    """``files``: path below root → PIL image, bytes, or a colour of an 8 x 8 PNG."""
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


def minimal(root, files=None):
    """A good data set of two classes, and other files."""
    files = files or {}
    good = {f"{split}/{name}/0.png": name for split in ("train", "test") for name in
            ("blue", "red")}
    return write_folder(root, good | files)


def palette_image(transparency):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 10, 200, 30])
    if transparency:
        image.info["transparency"] = bytes([0, 0])
    return image


def grey16(value, dtype=np.uint16):
    return Image.fromarray(np.full((8, 8), value, dtype))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


MODES = {
    "L.png": (Image.new("L", (8, 8), 77), (77, 77, 77)),
    "RGB.bmp": (Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
    "RGB.webp": (encoded(Image.new("RGB", (8, 8), (200, 100, 50)), "webp", lossless=True),
                 (200, 100, 50)),
    "RGB.PPM": (Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
    "L.pgm": (Image.new("L", (8, 8), 3), (3, 3, 3)),
    "RGB.JPeG": (encoded(Image.new("RGB", (8, 8), (120, 120, 120)), "jpeg"), (120, 120, 120)),
    "P.png": (palette_image(False), (10, 200, 30)),
    "P_transparent.png": (palette_image(True), (10, 200, 30)),
    "P.gif": (palette_image(False), (10, 200, 30)),
    "RGBA.png": (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (10, 20, 30)),
    "LA.png": (Image.new("LA", (8, 8), (50, 128)), (50, 50, 50)),
    "one.png": (Image.new("1", (8, 8), 1), (255, 255, 255)),
    "CMYK.tif": (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), (0, 255, 255)),
    "CMYK.jpg": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", quality=100),
                 (255, 0, 0)),
    "16_mid.png": (grey16(32768), (128, 128, 128)),
    "16_dark.png": (grey16(257 * 3 + 128), (3, 3, 3)),
    "16_dark_up.png": (grey16(257 * 3 + 129), (4, 4, 4)),
    "16_white.tiff": (grey16(65535), (255, 255, 255)),
    "16_pgm.pgm": (b"P5 8 8 65535\n" + b"\x80\x00" * 64, (128, 128, 128)),
    "16_big_endian.tif": (grey16(32768, np.dtype(">u2")), (128, 128, 128)),
    "32_holding_16.tif": (grey16(32768, np.int32), (128, 128, 128)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_image_becomes_rgb(tmp_path, name, recwarn):
    image, colour = MODES[name]
    root = write_folder(tmp_path, {f"train/a/{name}": image, "train/b/0.png": "red",
                                   "test/a/0.png": "blue"})
    train, _ = data.load("imagefolder", root, image_size=8, log=list)
    assert train.images.shape == (2, 3, 8, 8) and train.images.dtype == torch.uint8
    tolerance = 2 if name.endswith(("JPeG", "jpg")) else 0
    expected = torch.tensor(colour).view(3, 1, 1)
    assert (train.images[0].long() - expected).abs().max() <= tolerance
    assert not recwarn


@pytest.mark.parametrize("workers", [0, 3])
def test_folder_layout(tmp_path, workers, capsys):
    write_folder(tmp_path, {
        "train/zebra/2.png": (2, 0, 0), "train/zebra/10.png": (1, 0, 0),
        "train/Ape/deep/er/x.JPG": (0, 0, 0), "train/cat/y.png": (3, 0, 0),
        "train/cat/.hidden.png": b"no image", "train/cat/notes.txt": b"no image",
        "train/cat/.thumbnails/y.png": b"no image", "train/.cache/y.png": b"no image",
        "train/README.md": b"no image", "val/zebra/0.png": (5, 0, 0), "val/Ape/0.png": (4, 0, 0),
    })
    lines = []
    train, test = data.load("imagefolder", tmp_path, 8, workers=workers, log=lines.append)
    assert lines == [f"warning: {tmp_path}/val lacks classes that {tmp_path}/train has: cat; the "
                     "accuracy leaves them out"]
    assert train.classes == test.classes == ["Ape", "cat", "zebra"]
    assert train.labels.tolist() == [0, 1, 2, 2] and test.labels.tolist() == [0, 2]
    assert train.images[:, 0].amax((1, 2)).tolist() == [0, 3, 1, 2]  # sorted by name
    assert test.images[:, 0].amax((1, 2)).tolist() == [4, 5]
    assert train.flip and test.flip and train.labels.dtype == torch.int64
    assert train.images.is_contiguous()
    assert capsys.readouterr() == ("", "")  # no progress bar where nobody watches


def test_many_images_by_many_threads_stay_in_order(tmp_path):
    files = {f"train/{c}/{i:03}.png": (i, c == "b", 0) for c in "ab" for i in range(150)}
    minimal_test = {"test/a/0.png": "red"}
    train, _ = data.load("imagefolder", write_folder(tmp_path, files | minimal_test), 8, workers=4)
    assert train.images[:, :, 0, 0].tolist() == [[i, c, 0] for c in (0, 1) for i in range(150)]


def test_test_is_preferred_to_val(tmp_path):
    root = minimal(tmp_path, {"val/red/0.png": "red", "val/unknown/0.png": "red"})
    assert len(data.load("imagefolder", root, 8)[1]) == 2


def test_images_of_other_sizes_are_resized_and_reported(tmp_path):
    stripes = np.zeros((32, 16, 3), np.uint8)
    stripes[:, ::2] = 255  # antialiased: grey, where picking pixels gives stripes
    root = minimal(tmp_path, {"train/blue/1.png": Image.fromarray(stripes),
                              "test/red/1.png": Image.new("RGB", (8, 9), (7, 8, 9))})
    lines = []
    train, test = data.load("imagefolder", root, 8, log=lines.append)
    assert lines == ["resized 2 of 6 images to 8 x 8"]
    assert train.images.shape[2:] == (8, 8)
    assert (train.images[1].long() - 128).abs().max() < 30
    assert (test.images[2] == torch.tensor([7, 8, 9]).view(3, 1, 1)).all()


def test_mean_and_std_are_those_of_the_training_images(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, (256, 128, 32), (2500, 4, 4, 3)).astype(np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    monkeypatch.setattr(
        data,
        "_load_folder",
        lambda *_: (
            (images, torch.zeros(2500).long()),
            (images[:1], torch.zeros(1).long()),
            ["a", "b"],
        ),
    )
    train, test = data.load("imagefolder", tmp_path, 4)
    expected = pixels.reshape(-1, 3) / 255
    np.testing.assert_allclose(train.mean, expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(train.std, expected.std(0), rtol=1e-9)
    assert (test.mean, test.std) == (train.mean, train.std)


def test_a_constant_channel_gives_finite_numbers(tmp_path):
    train, _ = data.load("imagefolder", minimal(tmp_path), 8)  # green is 0 everywhere
    ((x, _),) = Batches(train, 2, train=False)
    assert x.isfinite().all() and train.std[1] > 0


GOOD_PNG = encoded(Image.new("RGB", (8, 8), "red"), "png")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "files, remove, message",
    [
        ({}, "train", r"no folder train/"),
        ({}, "test", r"no folder test/ or val/"),
        ({"train/green/notes.txt": b""}, None, r"train/green has no images"),
        ({"test/green/.a.png": b""}, None, r"test/green has no images"),
        ({"test/green/0.png": "green", "test/grey/0.png": "grey"}, None,
         r"test has classes that .*train lacks: green, grey;"),
        ({"test/blue/1.png": b"not an image"}, None, r"test/blue/1.png cannot be read"),
        ({"train/blue/1.png": b""}, None, r"train/blue/1.png cannot be read"),
        ({"train/blue/1.png": GOOD_PNG[:-30]}, None, r"train/blue/1.png cannot be read"),
        ({"train/blue/1.jpg": encoded(NOISE, "jpeg")[:-900]}, None,
         r"train/blue/1.jpg cannot be read.*truncated"),
        ({"train/blue/a\nb.png": b"no"}, None, r"train/blue/a b.png cannot be read"),
        ({"train/blue/1.tif": grey16(70000, np.int32)}, None, r"blue/1.tif .*32-bit"),
        ({"train/blue/1.tif": grey16(0.5, np.float32)}, None, r"blue/1.tif .*floating"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_with_a_folder(tmp_path, files, remove, message, workers):
    root = minimal(tmp_path / "set", files)
    if remove:
        (root / remove).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=message) as info:
        data.load("imagefolder", root, 8, workers=workers, log=quiet)
    assert str(root) in str(info.value)


def test_a_single_class(tmp_path):
    root = write_folder(tmp_path, {"train/a/0.png": "red", "test/a/0.png": "red"})
    with pytest.raises(UserError, match=r"a single class \(a\)"):
        data.load("imagefolder", root)


def test_images_without_class_folders(tmp_path):
    root = write_folder(tmp_path, {"train/0.png": "red", "test/0.png": "red"})
    with pytest.raises(UserError, match=r"train has no class folders.*train/<class>/"):
        data.load("imagefolder", root)


def test_a_root_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("absent", "file"):
        with pytest.raises(UserError, match=f"{name} is not a folder"):
            data.load("imagefolder", tmp_path / name)


def test_an_unreadable_folder(tmp_path, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", deny)  # chmod does not stop root
    with pytest.raises(UserError, match=r"train cannot be read \(Permission denied\)"):
        data.load("imagefolder", minimal(tmp_path))


def load_with_notes(root, links):
    """Load after making links: path below root → target."""
    for path, target in links.items():
        (root / path).symlink_to(target)
    notes = []
    train, test = data.load("imagefolder", root, 8, log=notes.append)
    return train, test, notes


@pytest.mark.parametrize("link, target", [
    ("train/loop", "."), ("train/loop", ".."), ("train/blue/loop", "../.."),
    ("train/blue/deep/loop", ".."), ("train/blue/loop.png", "/"), ("test/loop", "."),
])
def test_a_link_to_a_folder_around_it_is_skipped_with_a_warning(tmp_path, link, target):
    root = minimal(tmp_path, {"train/blue/deep/1.png": "blue"})
    train, test, notes = load_with_notes(root, {link: target})
    assert (train.classes, len(train), len(test)) == (["blue", "red"], 3, 2)
    assert notes == [f"warning: skipped {root / link} (a link to a folder around it)"]


def test_links_that_lead_to_each_other_end(tmp_path):
    root = minimal(tmp_path)
    train, _, notes = load_with_notes(root, {"train/blue/x": "../red", "train/red/y": "../blue"})
    assert train.labels.tolist() == [0, 0, 1, 1]  # either also has the other's image
    assert notes == [f"warning: skipped {root}/train/blue/x/y (a link to a folder around it), "
                     f"{root}/train/red/y/x (a link to a folder around it)"]


def test_other_links_are_followed(tmp_path):
    elsewhere = minimal(tmp_path / "elsewhere")
    root = minimal(tmp_path / "set", {"test/green/0.png": "green"})
    train, _, notes = load_with_notes(root, {
        "train/green": elsewhere / "train/red", "train/red/more": elsewhere / "train/blue",
        "train/red/1.png": "../blue/0.png",
    })
    assert train.classes == ["blue", "green", "red"] and notes == []
    assert train.labels.tolist() == [0, 1, 2, 2, 2]
    assert torch.equal(train.images[3], train.images[0])  # red/0.png, red/1.png, red/more/0.png


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("gone")])
def test_only_regular_files_are_read(tmp_path, make):
    root = minimal(tmp_path)
    for k in range(5):
        make(root / f"train/blue/f{k}.png")
    train, _, notes = load_with_notes(root, {"train/blue/g.png": "/dev/zero"})
    assert len(train) == 2
    named = ", ".join(f"{root}/train/blue/f{k}.png (not a regular file)" for k in range(3))
    assert notes == [f"warning: skipped {named} and 3 more"]


def test_a_class_of_nothing_but_a_pipe_is_empty(tmp_path):
    root = minimal(tmp_path, {"train/cat/note.txt": b""})
    os.mkfifo(root / "train/cat/f.png")
    with pytest.raises(UserError, match="train/cat has no images"):
        data.load("imagefolder", root, 8)


def test_classes_without_test_images_are_named(tmp_path):
    root = minimal(tmp_path, {f"train/more{k}/0.png": "red" for k in range(5)})
    _, _, notes = load_with_notes(root, {})
    assert len(notes) == 1
    assert "lacks classes" in notes[0] and "more0, more1, more2 and 2 more; the" in notes[0]


# ------------------------------------------------------------------------------------------
# load: too little memory
# ------------------------------------------------------------------------------------------

HELP = "give a smaller --image_size.* or, .*--dataset imagenet, which reads"


@pytest.mark.parametrize("dataset", ["digits", "imagefolder"])
@pytest.mark.parametrize("size", [10**7, 10**10])  # memory, addresses: other errors of numpy
def test_images_larger_than_the_memory(tmp_path, dataset, size):
    with pytest.raises(UserError, match=f"the machine has too little memory.*{HELP}") as info:
        data.load(dataset, minimal(tmp_path), size)
    assert "batch" not in str(info.value) and "--device" not in str(info.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_that_ends_while_a_file_is_decoded(tmp_path, monkeypatch, workers):
    def convert(image):
        raise MemoryError

    monkeypatch.setattr(data, "_to_rgb", convert)
    with pytest.raises(UserError, match=f"the machine has too little memory.*{HELP}"):
        data.load("imagefolder", minimal(tmp_path), 8, workers=workers)


def test_a_device_too_small_for_the_data(tmp_path, monkeypatch):
    def move(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\n\nMore")

    train, _ = data.load("digits", "", 8)
    monkeypatch.setattr(torch.Tensor, "to", move)
    with pytest.raises(UserError, match=f"cuda:0 has too little memory.*{HELP}") as info:
        data.load("imagefolder", minimal(tmp_path), 8, "cuda:0")
    assert "--device cpu" in str(info.value) and "batch" not in str(info.value)
    with pytest.raises(UserError, match=HELP):
        train.subset(torch.arange(3))


def test_other_errors_of_torch_stay_as_they_are(tmp_path, monkeypatch):
    def move(self, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.Tensor, "to", move)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        data.load("imagefolder", minimal(tmp_path), 8, "cuda:0")


def test_an_unknown_data_set():
    with pytest.raises(UserError, match="unknown data set 'mnist': use one of cifar10, cifar100"):
        data.load("mnist", ".")


# ------------------------------------------------------------------------------------------
# load: digits, CIFAR
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 32])
def test_digits(size):
    train, test = data.load("digits", "unused", size, log=quiet)
    digits = load_digits()
    assert (len(train), len(test)) == (1438, 359)
    assert train.classes == [str(i) for i in range(10)] and not train.flip and not test.flip
    assert torch.equal(train.labels.bincount() + test.labels.bincount(),
                       torch.from_numpy(np.bincount(digits.target)))
    exact = digits.target.size / 10 * 0.2
    assert (test.labels.bincount() - exact).abs().max() < 2
    again, _ = data.load("digits", "unused", size)
    assert torch.equal(train.images, again.images)
    if size == 8:
        grey = np.rint(digits.images * 255 / 16)
        got = {im[0].numpy().tobytes() for im in torch.cat((train.images, test.images))}
        assert got == {im.astype(np.uint8).tobytes() for im in grey}
    assert train.images.shape[1:] == (3, size, size) and train.images.max() == 255
    assert (train.images[:, :1] == train.images).all()
    np.testing.assert_allclose(train.mean, 3 * [train.images.double().mean().item() / 255])


def test_enlarged_digits_are_bilinear():
    small, _ = data.load("digits", "", 8)
    large, _ = data.load("digits", "", 32)
    for i in (0, 700):
        image = Image.fromarray(small.images[i, 0].numpy())
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(large.images[i, 0].numpy() - expected).max() <= 1


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A small data set in the format of CIFAR, with checksums to match."""
    name = request.param
    cls = {"cifar10": torchvision.datasets.CIFAR10,
           "cifar100": torchvision.datasets.CIFAR100}[name]
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
    monkeypatch.setattr(cls, "download", lambda self: None)
    return name, root, folder, cls


def test_cifar(cifar):
    name, root, folder, cls = cifar
    train, test = data.load(name, str(root), log=quiet)
    assert train.classes == ["ant", "bee", "cow"] and train.flip
    for images, files in ((train, cls.train_list), (test, cls.test_list)):
        batches = [pickle.loads((folder / file).read_bytes()) for file, _ in files]
        pixels = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)
        labels = sum((b.get("labels", b.get("fine_labels")) for b in batches), [])
        assert torch.equal(images.images, torch.from_numpy(pixels))
        assert images.images.is_contiguous()
        assert images.labels.tolist() == labels and images.labels.dtype == torch.int64
    if name == "cifar10":
        assert (train.mean, train.std) == (MEAN, STD)
    else:
        std = train.images[:, 0].double().std(correction=0).item() / 255
        np.testing.assert_allclose(train.std[0], std)


def test_cifar_of_another_size(cifar):
    name, root, _, _ = cifar
    full, _ = data.load(name, root)
    train, test = data.load(name, root, 16)
    assert train.images.shape[2:] == test.images.shape[2:] == (16, 16)
    image = Image.fromarray(full.images[1].permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    difference = train.images[1].permute(1, 2, 0).numpy() - expected
    assert np.abs(difference).max() <= 1 and abs(difference.mean()) < 0.2  # rounded, not cut


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "meta"])
def test_damaged_cifar(cifar, damage):
    name, root, folder, cls = cifar
    path = folder / (cls.meta["filename"] if damage == "meta" else cls.test_list[0][0])
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if damage == "truncate" else content[:-1] + b"!")
    with pytest.raises(UserError, match=f"{cls.base_folder} is damaged.*delete it") as info:
        data.load(name, root)
    assert str(root) in str(info.value) and "\n" not in str(info.value)


def test_absent_cifar_that_cannot_be_downloaded(cifar, tmp_path, monkeypatch):
    name, _, _, cls = cifar

    def download(self):
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr(cls, "download", download)
    with pytest.raises(UserError, match=r"download failed .*no\snetwork") as info:
        data.load(name, tmp_path / "empty")
    for part in (str(tmp_path / "empty"), cls.base_folder, "--dataset digits or imagefolder"):
        assert part in str(info.value)


def test_absent_cifar_is_downloaded(cifar, tmp_path, monkeypatch):
    name, root, folder, cls = cifar
    new = tmp_path / "new"

    def download(self):
        new.mkdir()
        folder.rename(new / cls.base_folder)

    monkeypatch.setattr(cls, "download", download)
    assert len(data.load(name, new)[1]) == 4
