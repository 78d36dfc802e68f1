"""Data sets as uint8 tensors on the device, and augmented batches of them.

    train, test = load("cifar10", "../data", device="cuda")
    for x, y in train.batches(96, train=True, cutout_length=16, generator=generator):
        ...

A data set is decoded once and stays in the memory of the device. Augmentation is a few tensor
operations on the whole batch, so there are no worker processes and no transfers. For data that
does not fit in memory use `imagenet.py`, which reads images from files.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from tqdm import tqdm

from utils import UserError

CIFAR10_MEAN = (0.49139968, 0.48215827, 0.44653124)
CIFAR10_STD = (0.24703233, 0.24348505, 0.26158768)
PADDING = 4  # pixels on each side, for the random crop


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a data set."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,), on the same device
    classes: list  # the name of each label
    mean: tuple  # of each channel of the *training* images, scaled to [0, 1]; None if unknown
    std: tuple
    flip: bool = True  # whether horizontal flips preserve the label: not for digits

    def __len__(self):
        return len(self.labels)

    def subset(self, index):
        """Copy the images at `index`, an int64 tensor on any device."""
        index = index.to(self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def counts(self):
        """Number of images of each class, as a list."""
        return self.labels.cpu().bincount(minlength=len(self.classes)).tolist()

    def for_network(self, classes, mean, std):
        """Convert labels and statistics to those of a network that was trained with these."""
        label_of = {name: label for label, name in enumerate(classes)}
        unknown = [name for name in self.classes if name not in label_of]
        if unknown:
            raise UserError("the network does not know all classes of these images: it lacks "
                            f"{_first_names(unknown)}; it was trained with {_first_names(classes)}")
        new_labels = torch.tensor([label_of[name] for name in self.classes],
                                  device=self.labels.device)
        return replace(self, labels=new_labels[self.labels], classes=list(classes),
                       mean=tuple(mean), std=tuple(std))

    def batches(self, batch_size, **options):
        return Batches(self, batch_size, **options)


# ------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------


@functools.cache
def _scale_and_bias(mean, std, device):
    """Return the tensors with which ``x * scale + bias`` is ``(x / 255 - mean) / std``."""
    mean = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


@functools.cache
def _pixel_coordinates(n, device):
    """Return the indices and the centers of n pixels."""
    index = torch.arange(n, device=device)
    return index, index + 0.5


def normalize(x, mean, std, memory_format=torch.preserve_format):
    """``(x / 255 - mean) / std`` for each channel: uint8 (B, C, H, W) to float32 (B, C, H, W)."""
    _check_uint8(x)
    scale, bias = _scale_and_bias(tuple(mean), tuple(std), x.device)
    out = torch.empty_like(x, dtype=torch.float32, memory_format=memory_format)
    return torch.mul(x, scale, out=out).add_(bias)  # mul converts and changes the layout as well


def _check_uint8(images):
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, from 0 to 255, not {images.dtype}")


def augment(
    x, mean, std, *, flip, generator=None, memory_format=torch.preserve_format, rank=0,
    world_size=1, cutout_length=0,
):
    """Random crop, horizontal flip, normalization and cutout, independently for each image.

    The distribution is that of DARTS' transforms for CIFAR, with the cutout of DeVries and Taylor
    (arXiv 1708.04552). `x` is uint8 (B, C, H, W), this rank's part of ``world_size * B`` images.
    To add an augmentation, add a keyword argument: `Batches` passes it on.
    """
    B, C, H, W = x.shape
    row, row_center = _pixel_coordinates(H, x.device)
    column, column_center = _pixel_coordinates(W, x.device)

    def randint(n, count=1):
        """Draw `count` integers below n for each image of this rank: (count, B, 1)."""
        # Every rank draws the numbers of the whole batch. So the generators of all ranks stay in
        # the same state, and an image is augmented as it would be on a single rank.
        size = (count, world_size * B, 1)
        drawn = torch.randint(n, size, generator=generator, device=x.device)
        return drawn[:, rank * B : (rank + 1) * B]

    # Crop a window at a random offset from the padded image, by the flat indices of its pixels.
    top, left = randint(2 * PADDING + 1, 2)
    rows, columns = top + row, left + column  # (B, H), (B, W)
    if flip:
        is_flipped = randint(2)[0].bool()  # (B, 1)
        columns = torch.where(is_flipped, left + column.flip(0), columns)
    pixels = torch.add(columns[:, None, :], rows[:, :, None], alpha=W + 2 * PADDING)  # (B, H, W)
    padded = F.pad(x, (PADDING, PADDING, PADDING, PADDING)).flatten(2)
    x = padded.gather(2, pixels.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)
    x = normalize(x, mean, std, memory_format)

    if cutout_length:
        # The square starts at cy - cutout_length // 2, so an odd one is centered on a pixel.
        cy, cx = randint(H)[0], randint(W)[0]
        half, shift = cutout_length / 2, cutout_length % 2 / 2
        rows_kept = (row_center - shift - cy).abs() >= half  # (B, H)
        columns_kept = (column_center - shift - cx).abs() >= half  # (B, W)
        x.mul_(rows_kept[:, None, :, None] | columns_kept[:, None, None, :])
    return x


# ------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------


def batch_slices(images, batch_size, *, train, rank=0, world_size=1):
    """Slices of the order of `images` images, one for each batch of a rank."""
    slices = []
    for start in range(0, images, world_size * batch_size):
        # A global batch: the ranks take consecutive parts of it. The last one may be smaller.
        size = min(world_size * batch_size, images - start)
        if train:
            size -= size % world_size  # training needs parts of the same size,
            if size < 2 * world_size:  # and BatchNorm needs two images on each rank
                break
        first, last = start + rank * size // world_size, start + (rank + 1) * size // world_size
        if first < last:
            slices.append(slice(first, last))
    return slices


class Batches:
    """Batches ``(x, y)`` of a data set: normalized float32 (B, 3, H, W) and int64 (B,).

    Each iteration is one pass over the data: in training in a new random order and augmented by
    `augment` with the arguments `augmentation`, otherwise in order and with every image. The batch
    size is that of each rank. The generator, on the device of the data, is the only state: from the
    same generator state, a pass repeats exactly. It must start in the same state on all ranks.
    """

    def __init__(
        self, images, batch_size, *, train, generator=None,
        memory_format=torch.contiguous_format, rank=0, world_size=1, **augmentation,
    ):
        largest = len(images) // world_size
        if train and batch_size > largest > 1:
            each = f" for each of {world_size} ranks" if world_size > 1 else ""
            raise UserError(f"--batch_size {batch_size}{each} is too large for the {len(images)} "
                            f"images to train on: give at most {largest}")
        self.slices = batch_slices(
            len(images), batch_size, train=train, rank=rank, world_size=world_size
        )
        if len(images) == 0 or train and not self.slices:
            purpose = "train" if train else "evaluate"
            raise UserError(f"too few images to {purpose} on ({len(images)}): use more images")
        self.images, self.batch_size, self.train = images, batch_size, train
        self.generator, self.memory_format = generator, memory_format
        self.rank, self.world_size, self.augmentation = rank, world_size, augmentation

    def __len__(self):
        return len(self.slices)

    def __iter__(self):
        data = self.images
        if not self.train:
            for batch in self.slices:
                x = normalize(data.images[batch], data.mean, data.std, self.memory_format)
                yield x, data.labels[batch]
            return
        order = torch.randperm(len(data), generator=self.generator, device=data.labels.device)
        for batch in self.slices:
            index = order[batch]
            # index_select is many times faster than data.images[index] on a CPU.
            x, y = data.images.index_select(0, index), data.labels.index_select(0, index)
            x = augment(
                x, data.mean, data.std, flip=data.flip, generator=self.generator,
                memory_format=self.memory_format, rank=self.rank, world_size=self.world_size,
                **self.augmentation,
            )
            yield x, y

    def endless(self):
        """Iterate over an unlimited number of passes.

        Call it again at the start of each epoch, and discard the previous iterator. Each call
        starts a new permutation, so a run can resume from the state of the generator alone.
        """
        while True:
            yield from self


def split(labels, portion, seed):
    """Random stratified split into two index tensors (sorted, int64, on the device of `labels`).

    The first has ``round(portion * N)`` entries. From each class it takes ``portion`` times the
    number of its images, rounded up or down. The result does not depend on the device.
    """
    if not 0 <= portion <= 1:
        raise ValueError(f"portion must be in [0, 1], not {portion}")
    device, labels = labels.device, labels.cpu()
    counts = labels.bincount()
    quota = portion * counts.double()
    take = quota.long()
    # Round up the classes with the largest remainders, so that the total is right.
    missing = round(portion * len(labels)) - int(take.sum())
    take[(quota - take).argsort(descending=True, stable=True)[:missing]] += 1

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # grouped by class, random within a class
    label = labels[order]
    class_start = counts.cumsum(0) - counts
    position = torch.arange(len(labels)) - class_start[label]  # within the class
    is_first = torch.zeros(len(labels), dtype=torch.bool)
    is_first[order] = position < take[label]
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
        scikit-learn's 1,797, a fifth of them for testing. An ``"imagefolder"`` has the folders
        ``train/<class>/`` and ``test/<class>/`` (or ``val``) of torchvision's ``ImageFolder``.
    root : path
    image_size : int
        All images are resized to this height and width (bilinear, antialiased).
    device : torch.device or str
    workers : int
        Number of threads that decode image files. For thumbnails such as CIFAR's, 0 (the calling
        thread) is fastest.
    log : callable
        Called with lines of text for the user.
    test_only : bool
        Do not read the training images of a folder, which may be missing. Then train is None,
        classes are those of the test images, and mean and std are None.

    Returns
    -------
    train, test : Images
        Both with classes, mean and std of the training images.

    Raises
    ------
    UserError
        If the data is missing or damaged, or has another layout.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}: use one of {', '.join(DATASETS)}")
    train, test, classes = DATASETS[dataset](
        root, image_size=image_size, workers=workers, log=log, test_only=test_only
    )
    classes = [str(name) for name in classes]
    if train is not None:
        train = _check_and_resize(dataset, *train, classes, image_size)
    test = _check_and_resize(dataset, *test, classes, image_size)

    mean = std = None
    if dataset == "cifar10":
        mean, std = CIFAR10_MEAN, CIFAR10_STD
    elif train is not None:
        mean, std = _mean_and_std(train[0])

    def to_images(pixels, labels):
        return Images(pixels.to(device), labels.to(device), classes, mean, std,
                      flip=dataset != "digits")

    return None if test_only else to_images(*train), to_images(*test)


def _check_and_resize(dataset, images, labels, classes, size):
    """Return images and labels as tensors; raise an error if they have other shapes or values."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"{dataset}: its loader must give images (N, 3, H, W), not {images.shape}")
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{dataset}: its loader gives labels from {labels.min()} to "
                        f"{labels.max()}, and {len(classes)} classes")
    images = torch.as_tensor(images).contiguous()
    _check_uint8(images)
    if images.shape[-2:] != (size, size):
        images = torch.cat([_resize(chunk, size) for chunk in images.split(1000)])
    return images, labels


def _resize(images, size):
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.round_().byte()


def _mean_and_std(images):
    """Mean and standard deviation of each channel, scaled to [0, 1]; exact, from histograms."""
    channels = images.flatten(2).unbind(1)
    counts = torch.stack([c.flatten().bincount(minlength=256) for c in channels]).double()
    n, value = images.numel() / 3, torch.arange(256, dtype=torch.float64)
    mean = counts @ value / n
    variance = counts @ value.square() / n - mean.square()
    std = variance.clamp(min=1).sqrt()  # the clamp is for constant channels
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _load_cifar(cls, root, **_):
    root = Path(root)
    folder = root / cls.base_folder
    is_there = folder.exists()
    for name in ("train", "test", "val"):
        if not is_there and (root / name).is_dir():
            raise UserError(f"{root} has {name}/: give --dataset imagefolder")
    try:
        train, test = cls(root, train=True, download=not is_there), cls(root, train=False)
    except MemoryError:
        raise
    except Exception as error:  # many types: network, disk, archive, checksum, unpickling
        message = (f"{folder} does not exist, and the download failed ({error}): extract the "
                   f"archive in {root}, or use --dataset digits or imagefolder")
        if is_there:
            message = f"{folder} is damaged: delete it, and it is downloaded again"
        raise UserError(message) from error
    return (
        (train.data.transpose(0, 3, 1, 2), train.targets),
        (test.data.transpose(0, 3, 1, 2), test.targets),
        train.classes,
    )


def _load_digits(root, **_):
    from sklearn.datasets import load_digits  # the import takes a second

    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the values are 0, 1, ..., 16
    images, labels = torch.from_numpy(gray)[:, None].repeat(1, 3, 1, 1), torch.tensor(digits.target)
    train, test = ((images[i], labels[i]) for i in split(labels, 0.8, seed=0))
    return train, test, digits.target_names


def _load_folder(root, *, image_size, workers, log, test_only):
    train, test, classes = scan(root, ("test", "val"), log, test_only)
    if train is not None:
        paths, labels = train
        train = _decode(paths, image_size, workers, log), labels
    paths, labels = test
    return train, (_decode(paths, image_size, workers, log), labels), classes


# Add new data sets here. A loader takes the value of --data, and returns (images, labels) for
# training and for testing, and the names of the classes. Images are uint8 (N, 3, H, W) and labels
# count from 0, as arrays or tensors:
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


# ------------------------------------------------------------------------------------------
# Image files
# ------------------------------------------------------------------------------------------


def scan(root, test_names, log, test_only=False):
    """List the image files of each class in ``root/train/<class>`` and in the test folder.

    The test folder is the first of `test_names` that exists. Returns (paths, labels) of the
    training images, or None if `test_only`; (paths, labels) of the test images; and the classes.
    """
    train = None if test_only else _image_folder(root, ["train"])
    test = _image_folder(root, test_names)
    classes = test.classes
    if train is not None:
        classes = train.classes
        if len(classes) == 1:
            raise UserError(f"{train.root} has a single class ({classes[0]}): add others")
        unknown = [name for name in test.classes if name not in classes]
        if unknown:
            raise UserError(f"{test.root} has classes that {train.root} lacks: "
                            f"{_first_names(unknown)}; add training images of them or remove them")
        missing = [name for name in classes if name not in test.classes]
        if missing:
            log(f"warning: {test.root} lacks classes that {train.root} has: "
                f"{_first_names(missing)}; the accuracy leaves them out")
        train = _paths_and_labels(train, classes)
    return train, _paths_and_labels(test, classes), classes


def _image_folder(root, names):
    """Return the ImageFolder of the first of these folders that exists."""
    for name in names:
        folder = os.path.join(root, name)
        if os.path.isdir(folder):
            try:
                return ImageFolder(folder)
            except OSError as error:  # no class folders, a class without images, no permission
                reason = str(error).rstrip(".")
                raise UserError(f"{reason}: images have to be in {folder}/<class>/") from None
    raise UserError(f"{root} has no folder {' or '.join(f'{name}/' for name in names)}: give the "
                    "folder that contains it")


def _paths_and_labels(folder, classes):
    """Return the paths of an ImageFolder, and their labels as indices into `classes`."""
    paths = [path for path, _ in folder.samples]
    labels = torch.tensor([classes.index(name) for name in folder.classes])
    return paths, labels[torch.tensor(folder.targets)]


def _first_names(names):
    """Join the first three names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _decode(paths, image_size, workers, log):
    """Read image files into a uint8 tensor (N, 3, image_size, image_size)."""
    pixels = np.empty((len(paths), 3, image_size, image_size), np.uint8)

    def read(i):
        """Read an image; return whether it had to be resized."""
        image = read_rgb(paths[i])
        needs_resize = image.size != (image_size, image_size)
        if needs_resize:
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels[i] = np.asarray(image).transpose(2, 0, 1)
        return needs_resize

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        run_all = pool.map if workers else map
        done = run_all(read, range(len(paths)))
        resized = sum(tqdm(done, "reading images", len(paths), leave=False, disable=None))
    if resized:
        log(f"resized {resized:,} of {len(paths):,} images to {image_size} x {image_size}")
    return torch.from_numpy(pixels)


def read_rgb(path):
    """Read an image file as a PIL image in 8-bit RGB."""
    try:
        with Image.open(path) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                raise ValueError(f"its mode is {image.mode}, not 8 bits for each channel")
            image.info.pop("transparency", None)  # convert() would warn that it is lost
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many types
        raise UserError(f"{path} cannot be read as an 8-bit image ({error}): convert, replace or "
                        "remove it") from error
