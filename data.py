"""Data sets as uint8 tensors on the device, and batches of them, augmented many images at a time.

    train, test = load("cifar10", "../data", device="cuda")
    for x, y in train.batches(96, train=True, cutout_length=16, generator=generator):
        ...

A data set is decoded once, into memory, and stays on the device. Augmentation is a handful of
tensor operations on the whole batch, so neither worker processes nor transfers are needed.
"""

import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import find_classes, is_image_file, make_dataset
from tqdm import tqdm

from utils import UserError

CIFAR10_MEAN = (0.49139968, 0.48215827, 0.44653124)
CIFAR10_STD = (0.24703233, 0.24348505, 0.26158768)
PADDING = 4  # of the random crop


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a data set.

    Attributes
    ----------
    images : uint8 tensor (N, 3, H, W)
    labels : int64 tensor (N,), on the same device
    classes : list of str
        Name of each label.
    mean, std : tuple of 3 floats
        Of the *training* images' channels, in units where white is 1; None where these are unknown.
    flip : bool
        Whether an image means the same when mirrored. It does not for digits.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    mean: tuple
    std: tuple
    flip: bool = True

    def __len__(self):
        return len(self.labels)

    def subset(self, index):
        """The images at `index` (int64, any device), copied."""
        index = index.to(self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def counts(self):
        """How many images there are of each class, a list of int."""
        return self.labels.cpu().bincount(minlength=len(self.classes)).tolist()

    def as_seen_by(self, classes, mean, std):
        """The same images for a network that was trained with these classes, mean and std.

        Classes are matched by name, whatever their order. The network may know others as well;
        where it lacks one of the images', that is a UserError.
        """
        label = {name: k for k, name in enumerate(classes)}
        if unknown := [name for name in self.classes if name not in label]:
            raise UserError("the network does not know all classes of these images: it lacks "
                            f"{_some(unknown)}; it was trained with {_some(classes)}")
        new = torch.tensor([label[name] for name in self.classes], device=self.labels.device)
        return replace(self, labels=new[self.labels], classes=list(classes), mean=tuple(mean),
                       std=tuple(std))

    def batches(self, batch_size, **options):
        return Batches(self, batch_size, **options)


# ------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------


@functools.cache
def _scale_and_bias(mean, std, device):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


@functools.cache
def _axis(n, device):
    """Of n pixels in a line: their indices, what mirroring adds to these, and their centres."""
    index = torch.arange(n, device=device)
    return index, index.flip(0) - index, index + 0.5


def normalize(x, mean, std, memory_format=torch.preserve_format):
    """``(x / 255 - mean) / std`` for each channel: uint8 (B, C, H, W) to float32 (B, C, H, W)."""
    _check_uint8(x)
    scale, bias = _scale_and_bias(tuple(mean), tuple(std), x.device)
    out = torch.empty_like(x, dtype=torch.float32, memory_format=memory_format)
    return torch.mul(x, scale, out=out).add_(bias)  # one kernel converts, lays out, multiplies


def _check_uint8(images):
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, from 0 to 255, not {images.dtype}")


def augment(
    x, mean, std, *, flip, generator=None, memory_format=torch.preserve_format, rank=0,
    world_size=1, cutout_length=0,
):
    """Random crop, horizontal flip, normalisation and cutout, independently for each image.

    The distribution is that of DARTS' CIFAR transforms: the image is surrounded by 4 black
    pixels and a window of its own size is cut out at one of 9 x 9 places, mirrored with
    probability 1/2, normalised; then the square of ``length`` rows from ``cy - length // 2`` on
    (columns likewise) is set to 0 as far as it lies inside the image, with (cy, cx) uniform over
    the pixels (DeVries and Taylor, arXiv 1708.04552).

    ``x``, uint8 (B, C, H, W), is this rank's share of a batch of ``world_size * B`` images. The
    random numbers of the whole batch are drawn on every rank, so that generators in one state stay
    so, and an image is augmented as it would be by a single rank. ``flip`` says whether to mirror
    at all; a ``cutout_length`` of 0 is no cutout. `Batches` passes on this and what you add here.
    """
    B, C, H, W = x.shape
    row, _, row_centre = _axis(H, x.device)
    column, mirroring, column_centre = _axis(W, x.device)

    def randint(n, count=1):  # below n, for each image: (count, B, 1)
        size = (count, world_size * B, 1)
        drawn = torch.randint(n, size, generator=generator, device=x.device)
        return drawn[:, rank * B : (rank + 1) * B]

    top, left = randint(2 * PADDING + 1, 2)
    rows, columns = top + row, left + column  # (B, H), (B, W): of the padded image, to be kept
    if flip:
        columns = torch.addcmul(columns, randint(2)[0], mirroring)
    pixels = torch.add(columns[:, None, :], rows[:, :, None], alpha=W + 2 * PADDING)  # (B, H, W)
    padded = F.pad(x, (PADDING, PADDING, PADDING, PADDING)).flatten(2)
    x = padded.gather(2, pixels.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)
    x = normalize(x, mean, std, memory_format)

    if cutout_length:
        cy, cx = randint(H)[0], randint(W)[0]
        half, shift = cutout_length / 2, cutout_length % 2 / 2  # an odd square is around a pixel
        rows_kept = (row_centre - shift - cy).abs() >= half  # (B, H)
        columns_kept = (column_centre - shift - cx).abs() >= half  # (B, W)
        x.mul_(rows_kept[:, None, :, None] | columns_kept[:, None, None, :])
    return x


# ------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------


def cut(images, batch_size, *, train, rank=0, world_size=1):
    """Cut an order of so many images into the batches of a rank: a list of slices.

    The order is cut into runs of ``world_size * batch_size`` images, the last one shorter, and
    each run into consecutive shares, one for each rank: together the ranks see the batches that
    one rank with the larger batch size would. In training the shares of a run are equal. What the
    last one holds beyond that is left out, and so is all of it when there are not two images for
    each rank, because BatchNorm cannot take a single one. For evaluation no image is left out, and
    a rank without a share of the last run has a batch less.
    """
    slices = []
    for start in range(0, images, world_size * batch_size):
        size = min(world_size * batch_size, images - start)
        if train:
            size -= size % world_size
            if size < 2 * world_size:
                break
        share = slice(start + rank * size // world_size, start + (rank + 1) * size // world_size)
        if share.start < share.stop:
            slices.append(share)
    return slices


class Batches:
    """Batches ``(x, y)`` of a data set: float32 (B, 3, H, W), normalised, and int64 (B,).

    Each iteration is one pass over the data, as `cut` says: in training in a new random order and
    augmented, otherwise in order and whole. ``batch_size`` is that of one rank; UserError where it
    leaves no batch, or not a whole one to train on. ``augmentation`` is what else `augment` takes,
    such as ``cutout_length``, in training only.

    All randomness is drawn from ``generator``, on the device of the data (None: torch's default
    one), while iterating. There is no other state: with the generator set back to what it was
    before a pass, the pass repeats itself exactly. Ranks whose generators begin in the same state
    draw alike.
    """

    def __init__(
        self, images, batch_size, *, train, generator=None,
        memory_format=torch.contiguous_format, rank=0, world_size=1, **augmentation,
    ):
        share = len(images) // world_size
        if train and batch_size > share > 1:
            each = f" for each of {world_size} ranks" if world_size > 1 else ""
            raise UserError(f"--batch_size {batch_size}{each} is too large for the {len(images)} "
                            f"images to train on: give at most {share}")
        self.slices = cut(len(images), batch_size, train=train, rank=rank, world_size=world_size)
        if len(images) == 0 or train and not self.slices:
            what = f"too few images to {'train' if train else 'evaluate'} on ({len(images)})"
            raise UserError(f"{what}: use a larger data set or another --train_portion")
        self.images, self.batch_size, self.train = images, batch_size, train
        self.generator, self.memory_format = generator, memory_format
        self.rank, self.world_size, self.augmentation = rank, world_size, augmentation

    def __len__(self):
        return len(self.slices)

    def __iter__(self):
        data = self.images
        if self.train:
            order = torch.randperm(len(data), generator=self.generator, device=data.labels.device)
        for share in self.slices:
            if self.train:
                index = order[share]
                # index_select: many times faster than data.images[index] on a CPU
                x, y = data.images.index_select(0, index), data.labels.index_select(0, index)
                yield augment(
                    x, data.mean, data.std, flip=data.flip, generator=self.generator,
                    memory_format=self.memory_format, rank=self.rank, world_size=self.world_size,
                    **self.augmentation,
                ), y
            else:
                x = normalize(data.images[share], data.mean, data.std, self.memory_format)
                yield x, data.labels[share]

    def endless(self):
        """Pass after pass, without end.

        Called anew at the start of each epoch, it starts with a fresh permutation: the generator's
        state is all that a resumed run needs. What an earlier call returned is not to be used then.
        """
        while True:
            yield from self


def split(labels, portion, seed):
    """Split at random into two parts with the same share of every class.

    Takes int64 labels (N,); returns two index tensors on their device, sorted, disjoint, together
    ``arange(N)``. The first has ``round(portion * N)`` entries, of each class ``portion`` times its
    images rounded down or up (up where most is missing, so classes of one image are dealt out as
    well). They are the same on every device.
    """
    if not 0 <= portion <= 1:
        raise ValueError(f"portion must be in [0, 1], not {portion}")
    device, labels = labels.device, labels.cpu()
    counts = labels.bincount()
    quota = portion * counts.double()
    take = quota.long()
    missing = round(portion * len(labels)) - int(take.sum())
    take[(quota - take).argsort(descending=True, stable=True)[:missing]] += 1

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # by class, at random within each
    label = labels[order]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[label]  # within its class
    is_first = torch.zeros(len(labels), dtype=torch.bool)
    is_first[order] = rank < take[label]
    return is_first.nonzero().flatten().to(device), (~is_first).nonzero().flatten().to(device)


# ------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------


def load(dataset, root, image_size=32, device="cpu", workers=0, log=print, *, test_only=False):
    """Load a data set into memory.

    Parameters
    ----------
    dataset : str
        A name in `DATASETS`. CIFAR is downloaded to ``root`` if it is not there. The digits are
        scikit-learn's 1,797, a fifth of them for testing. An ``"imagefolder"`` holds
        ``train/<class>/*`` and ``test/<class>/*`` (or ``val``); it is read as torchvision's
        ``ImageFolder`` is, but hidden files are skipped, and 16-bit images scaled to 8 bits.
    root : path
    image_size : int
        All images are resized to this height and width (bilinear, antialiased).
    device : torch.device or str
    workers : int
        Threads that decode image files. For thumbnails like CIFAR's 0, the calling one, is fastest.
    log : callable
        Takes a line of text worth knowing.
    test_only : bool
        Training images of a folder are neither read nor missed: train is None, classes are those
        of the test images, mean and std are None.

    Returns
    -------
    train, test : Images
        Both with classes, mean and std of the training images.

    Raises
    ------
    UserError
        When the data is missing, damaged or not laid out like this.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}: use one of {', '.join(DATASETS)}")
    *pairs, classes = DATASETS[dataset](
        root, image_size=image_size, workers=workers, log=log, test_only=test_only
    )
    for x, y in filter(None, pairs):
        if x.ndim != 4 or x.shape[1] != 3:
            raise UserError(f"{dataset}: its loader must give images (N, 3, H, W), not {x.shape}")
        if len(y) and not 0 <= min(y) <= max(y) < len(classes):
            raise UserError(f"{dataset}: its loader gives labels from {min(y)} to {max(y)}, and "
                            f"{len(classes)} classes")
    train, test = (pair and (_resize(pair[0], image_size), pair[1]) for pair in pairs)
    mean = std = None
    if dataset == "cifar10":
        mean, std = CIFAR10_MEAN, CIFAR10_STD
    elif train:
        mean, std = _mean_and_std(train[0])

    def images(pixels, labels):
        labels = torch.as_tensor(labels, dtype=torch.int64)
        return Images(pixels.to(device), labels.to(device), [str(name) for name in classes],
                      mean, std, flip=dataset != "digits")

    return None if test_only else images(*train), images(*test)


def _load_cifar(cls, root, **_):
    root = Path(root)
    folder = root / cls.base_folder
    is_there = folder.exists()
    for name in ("train", "test", "val"):
        if not is_there and (root / name).is_dir():
            raise UserError(f"{root} has {name}/: give --dataset imagefolder")
    absent = [path for path in (root, *root.parents) if not path.exists()]
    try:
        train, test = cls(root, train=True, download=not is_there), cls(root, train=False)
    except Exception as error:  # of network, disk, archive, checksum, unpickling: of many types
        for path in absent:
            with contextlib.suppress(OSError):  # never made, or it holds part of the archive
                path.rmdir()
        raise UserError(
            f"{folder} is damaged: delete it to have it downloaded again" if is_there else
            f"{folder} is not there and the download failed ({error}): extract the archive in "
            f"{root}, or use --dataset digits or imagefolder"
        ) from error
    pairs = [(part.data.transpose(0, 3, 1, 2), part.targets) for part in (train, test)]
    return *pairs, train.classes


def _load_digits(root, **_):
    from sklearn.datasets import load_digits  # takes a second, and other data does without

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # whole numbers from 0 to 16
    images, labels = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1), torch.tensor(digits.target)
    train, test = ((images[i], labels[i]) for i in split(labels, 0.8, seed=0))
    return train, test, digits.target_names


def _load_folder(root, *, image_size, workers, log, test_only):
    *pairs, classes = scan(root, ("test", "val"), log, test_only)
    train, test = (
        pair and (_decode(pair[0], image_size, workers, log), pair[1]) for pair in pairs
    )
    return train, test, classes


# The place where a new data set is named. Its loader takes what follows --data, and returns images,
# uint8 (N, 3, H, W), and labels from 0, as arrays or tensors; and the names of the classes:
#
#     def load_mine(root, **_):
#         file = np.load(f"{root}/mine.npz")
#         return (file["x"], file["y"]), (file["x_test"], file["y_test"]), ["cat", "dog"]
#
DATASETS = {
    "cifar10": functools.partial(_load_cifar, CIFAR10),
    "cifar100": functools.partial(_load_cifar, CIFAR100),
    "digits": _load_digits,
    "imagefolder": _load_folder,
}


def _resize(images, size):
    images = torch.as_tensor(images).contiguous()
    _check_uint8(images)
    if images.shape[-2:] == (size, size):
        return images
    resize = functools.partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    return torch.cat([resize(chunk.float()).round_().byte() for chunk in images.split(1000)])


def _mean_and_std(images):
    channels = images.flatten(2).unbind(1)
    counts = torch.stack([c.flatten().bincount(minlength=256) for c in channels]).double()
    n, value = images.numel() / 3, torch.arange(256, dtype=torch.float64)
    mean = counts @ value / n  # of whole numbers: exact
    variance = counts @ value.square() / n - mean.square()
    std = variance.clamp(min=1).sqrt()  # a channel may be constant
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


# ------------------------------------------------------------------------------------------
# Image files
# ------------------------------------------------------------------------------------------


def scan(root, test_names, log, test_only=False):
    """List the image files of each class in ``root/train/<class>`` and the same for testing.

    Of the folders in `test_names`, the first one there counts. Returns two pairs of a list of
    paths and an int64 tensor of labels, the first of them None if `test_only`; and the classes.
    """
    train, classes = (None, None) if test_only else _class_folders(root, ["train"])
    test, tested = _class_folders(root, test_names)
    classes = classes or tested
    if train and len(classes) == 1:
        raise UserError(f"{train} has a single class ({classes[0]}): add others")
    if unknown := [name for name in tested if name not in classes]:
        raise UserError(f"{test} has classes that {train} lacks: {_some(unknown)}; add training "
                        "images of them or remove them")
    if missing := [name for name in classes if name not in tested]:
        log(f"warning: {test} lacks classes that {train} has: {_some(missing)}; the accuracy "
            "leaves them out")
    label = {name: k for k, name in enumerate(classes)}
    return (
        train and _files(train, label, log),
        _files(test, {name: label[name] for name in tested}, log),
        classes,
    )


def _class_folders(root, names):
    """The first of these folders that is there, and the names of the classes in it."""
    there = [Path(root, name) for name in names if Path(root, name).is_dir()]
    if not there:
        raise UserError(f"{root} has no folder {' or '.join(f'{name}/' for name in names)}: add "
                        "it, with a folder of images for each class")
    try:
        classes = [name for name in find_classes(there[0])[0] if not name.startswith(".")]
    except OSError:  # torchvision found none, or may not look
        classes = []
    if not classes:
        raise UserError(f"{there[0]} has no class folders: put the images in {there[0]}/<class>/")
    return there[0], classes


def _files(folder, label, log):
    """Paths of the image files of these classes, by class and name, and their labels."""
    start = len(str(folder))
    files = make_dataset(
        folder, label, is_valid_file=lambda path: os.sep + "." not in path[start:],  # not hidden
        allow_empty=True,
    )
    if others := [path for path, _ in files if not is_image_file(path)]:
        kinds = sorted({os.path.splitext(path)[1] or "no suffix" for path in others})
        log(f"skipped {len(others):,} file(s) of other kinds in {folder}: {_some(kinds)}")
    images = [(path, k) for path, k in files if is_image_file(path)]
    found = {k for _, k in images}
    if empty := [name for name, k in label.items() if k not in found]:
        raise UserError(f"{folder}/{empty[0]} has no images: add some or remove the folder")
    return [path for path, _ in images], torch.tensor([k for _, k in images])


def _some(names):
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _decode(paths, image_size, workers, log):
    """uint8 tensor (N, 3, image_size, image_size)."""
    pixels = np.empty((len(paths), 3, image_size, image_size), np.uint8)

    def read(i):
        image = read_rgb(paths[i])
        is_other_size = image.size != (image_size, image_size)
        if is_other_size:
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels[i] = np.asarray(image).transpose(2, 0, 1)
        return is_other_size

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        done = (pool.map if workers else map)(read, range(len(paths)))
        resized = sum(tqdm(done, "reading images", len(paths), leave=False, disable=None))
    if resized:
        log(f"resized {resized:,} of {len(paths):,} images to {image_size} x {image_size}")
    return torch.from_numpy(pixels)


def read_rgb(path):
    """The PIL image of a file, in 8-bit RGB."""
    try:
        with Image.open(path) as file:
            return _to_rgb(file)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many types
        raise UserError(f"{path} cannot be read as an image ({error}): replace or remove it"
                        ) from error


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits, held in 16 or 32, which convert() would clip to 8
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels are not supported")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255
    elif image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    image.info.pop("transparency", None)  # convert() would warn that it is lost
    return image.convert("RGB")
