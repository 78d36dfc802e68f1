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
from tqdm import tqdm

from utils import UserError, is_out_of_memory

DATASETS = ("cifar10", "cifar100", "digits", "imagefolder")
CIFAR10_MEAN = (0.49139968, 0.48215827, 0.44653124)
CIFAR10_STD = (0.24703233, 0.24348505, 0.26158768)
PADDING = 4  # of the random crop
SUFFIXES = tuple(".bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())


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
        Of the *training* images' channels, in units where white is 1.
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
        """The images at ``index`` (an int64 tensor, any device), copied."""
        with _enough_memory(self.images.device):
            index = index.to(self.labels.device)
            return replace(self, images=self.images[index], labels=self.labels[index])

    def batches(self, batch_size, **options):
        """`Batches` of these images, with its options."""
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
    """``(x / 255 - mean) / std`` for each channel.

    Parameters
    ----------
    x : uint8 tensor (B, C, H, W)
    mean, std : sequences of C floats
    memory_format : torch.memory_format
        Of what is returned.

    Returns
    -------
    float32 tensor (B, C, H, W)
    """
    scale, bias = _scale_and_bias(tuple(mean), tuple(std), x.device)
    out = torch.empty_like(x, dtype=torch.float32, memory_format=memory_format)
    return torch.mul(x, scale, out=out).add_(bias)  # one kernel converts, lays out, multiplies


def augment(
    x, mean, std, *, flip, cutout_length=0, generator=None,
    memory_format=torch.preserve_format, rank=0, world_size=1,
):
    """Random crop, horizontal flip, normalisation and cutout, independently for each image.

    The distribution is that of DARTS' CIFAR transforms: the image is surrounded by 4 black
    pixels and a window of its own size is cut out at one of 9 x 9 places, mirrored with
    probability 1/2, normalised; then the square of rows ``cy - length // 2`` up to, not with,
    ``cy + length // 2`` (columns likewise) is set to 0 as far as it lies inside the image, its
    centre uniform over the pixels.

    Parameters
    ----------
    x : uint8 tensor (B, C, H, W)
    mean, std : sequences of C floats
    flip : bool
        Whether to mirror at all.
    cutout_length : int
        Side of the square; 0 for no cutout.
    generator : torch.Generator on the device of x, or None for torch's default one
    memory_format : torch.memory_format
        Of what is returned.
    rank, world_size : int
        x is this rank's share of a batch of ``world_size * B`` images. The random numbers of the
        whole batch are drawn on every rank, so that generators in one state stay so, and an image
        is augmented as it would be by a single rank.

    Returns
    -------
    float32 tensor (B, C, H, W)

    References
    ----------
    DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout",
    arXiv 1708.04552. Liu, Simonyan and Yang, "DARTS", ICLR 2019.
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
        cy, cx, half = randint(H)[0], randint(W)[0], cutout_length // 2
        rows_kept = (row_centre - cy).abs() >= half  # (B, H)
        columns_kept = (column_centre - cx).abs() >= half  # (B, W)
        x.mul_(rows_kept[:, None, :, None] | columns_kept[:, None, None, :])
    return x


# ------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------


def cut(images, batch_size, *, train, rank=0, world_size=1):
    """Cut an order of images into the batches of a rank.

    The order is cut into runs of ``world_size * batch_size`` images, the last one shorter, and
    each run into consecutive shares, one for each rank: together the ranks see the batches that
    one rank with the larger batch size would. In training the shares of a run are equal. What the
    last one holds beyond that is left out, and so is all of it when there are not two images for
    each rank, because BatchNorm cannot take a single one. For evaluation no image is left out, and
    a rank without a share of the last run has a batch less.

    Parameters
    ----------
    images : int
    batch_size : int
        Of one rank.
    train : bool
    rank, world_size : int

    Returns
    -------
    list of slice
        Of the order, one for each batch.
    """
    slices = []
    for start in range(0, images, world_size * batch_size):
        size = min(world_size * batch_size, images - start)
        if train:
            size -= size % world_size
            if size < world_size * min(2, batch_size):
                break
        share = slice(start + rank * size // world_size, start + (rank + 1) * size // world_size)
        if share.start < share.stop:
            slices.append(share)
    return slices


class Batches:
    """Batches ``(x, y)`` of a data set: float32 (B, 3, H, W), normalised, and int64 (B,).

    Each iteration is one pass over the data, as `cut` says. In training, it is in a new random
    order and augmented. Otherwise it is in order and whole.

    All randomness is drawn from ``generator``, while iterating. There is no other state: with
    the generator set back to what it was before a pass, the pass repeats itself exactly. Ranks
    whose generators begin in the same state draw alike.

    Parameters
    ----------
    images : Images
    batch_size : int
        Of one rank.
    train : bool
    cutout_length : int
        0 for no cutout; used in training only.
    generator : torch.Generator on the device of the data, or None for torch's default one
    memory_format : torch.memory_format
        Of x.
    rank, world_size : int

    Raises
    ------
    UserError
        When there is not a single batch, or not a whole one to train on.
    """

    def __init__(
        self, images, batch_size, *, train, cutout_length=0, generator=None,
        memory_format=torch.contiguous_format, rank=0, world_size=1,
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
        self.images = images
        self.batch_size = batch_size
        self.train = train
        self.generator = generator
        self.memory_format = memory_format
        self.augmentation = {"cutout_length": cutout_length, "generator": generator,
                             "memory_format": memory_format, "rank": rank, "world_size": world_size}

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
                yield augment(x, data.mean, data.std, flip=data.flip, **self.augmentation), y
            else:
                x = normalize(data.images[share], data.mean, data.std, self.memory_format)
                yield x, data.labels[share]

    def endless(self):
        """Pass after pass, without end.

        Call it anew at the start of each epoch: it then starts with a fresh permutation, so that
        every image is used equally often on average, and a resumed run needs nothing but the
        generator's state to continue exactly. What an earlier call returned is not to be used
        from then on.
        """
        while True:
            yield from self


# ------------------------------------------------------------------------------------------
# Splitting
# ------------------------------------------------------------------------------------------


def split(labels, portion, seed):
    """Split at random into two parts with the same share of every class.

    Parameters
    ----------
    labels : int64 tensor (N,), any device
    portion : float in [0, 1]
        Share of the first part.
    seed : int

    Returns
    -------
    first, second : int64 tensors on the device of labels
        Sorted, disjoint, together ``arange(N)``; ``first`` has ``round(portion * N)`` entries, of
        each class ``portion`` times its images rounded down or up (up where most is missing, so
        classes of one image are dealt out as well). The same on every device.
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


def load(dataset, root, image_size=32, device="cpu", workers=0, log=print):
    """Load a data set into memory.

    Parameters
    ----------
    dataset : str
        - ``"cifar10"``, ``"cifar100"``: from ``root``, downloaded if absent.
        - ``"digits"``: scikit-learn's 1,797 digits of 8 x 8 pixels, a fifth of them for testing;
          ``root`` is not used.
        - ``"imagefolder"``: ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``).
          Files of any type in ``SUFFIXES``, in subfolders too; hidden ones are skipped. Grey,
          palette and CMYK images become RGB, 16-bit ones are scaled to 8 bits, and transparency
          is dropped, as in torchvision's ``ImageFolder``. Of an animation, the first image.
    root : path
    image_size : int
        All images are resized to this height and width (bilinear, antialiased).
    device : torch.device or str
    workers : int
        Threads that decode image files; 0 decodes in the calling one, which is fastest for
        thumbnails like CIFAR's.
    log : callable
        Takes a line of text worth knowing.

    Returns
    -------
    train, test : Images

    Raises
    ------
    UserError
        When the data is missing, damaged or not laid out like this.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}: use one of {', '.join(DATASETS)}")
    with _enough_memory("cpu"):
        if dataset == "digits":
            train, test, classes = _load_digits(image_size)
        elif dataset == "imagefolder":
            train, test, classes = _load_folder(root, image_size, workers, log)
        else:
            train, test, classes = _load_cifar(dataset, Path(root), image_size)
        mean, std = (CIFAR10_MEAN, CIFAR10_STD) if dataset == "cifar10" else _mean_and_std(train[0])
    with _enough_memory(device):
        return tuple(
            Images(x.to(device), y.to(device), classes, mean, std, flip=dataset != "digits")
            for x, y in (train, test)
        )


@contextlib.contextmanager
def _enough_memory(device):
    """Say what helps where a data set does not fit into memory: a smaller batch does not."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if not is_out_of_memory(error):
            raise
        is_cpu = str(device) == "cpu"
        raise UserError(
            f"{'the machine' if is_cpu else device} has too little memory for the data set: give a "
            f"smaller --image_size{'' if is_cpu else ', --device cpu'} or, for a folder of images, "
            "--dataset imagenet, which reads the files anew in each pass"
        ) from error


def _load_cifar(dataset, root, image_size):
    cls = CIFAR10 if dataset == "cifar10" else CIFAR100
    folder = root / cls.base_folder
    try:
        if not folder.exists():
            cls(root, download=True)
    except Exception as error:  # network, disk and archive errors of many types
        raise UserError(
            f"{dataset} is not in {root} and the download failed ({error}): put the extracted "
            f"{cls.base_folder} there, or use --dataset digits or imagefolder"
        ) from error
    try:
        splits = [cls(root, train=train) for train in (True, False)]
    except Exception as error:  # a wrong checksum, or whatever unpickling may raise
        raise UserError(
            f"{folder} is damaged or incomplete: delete it and run again to download it, "
            "or extract the archive there anew"
        ) from error
    train, test = (
        (_resize(_channels_first(s.data), image_size), torch.tensor(s.targets)) for s in splits
    )
    return train, test, splits[0].classes


def _load_digits(image_size):
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--dataset digits needs scikit-learn: pip install scikit-learn") from error

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # whole numbers from 0 to 16
    images = _resize(torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1), image_size)
    labels = torch.from_numpy(digits.target).long()
    train, test = ((images[i], labels[i]) for i in split(labels, 0.8, seed=0))
    return train, test, [str(name) for name in digits.target_names]


def _load_folder(root, image_size, workers, log):
    classes, splits = scan(root, ("test", "val"), log)
    paths = [path for files, _ in splits for path in files]
    images, resized = _decode(paths, image_size, workers)
    if resized:
        log(f"resized {resized:,} of {len(paths):,} images to {image_size} x {image_size}")
    images = images.split([len(files) for files, _ in splits])
    return *zip(images, (labels for _, labels in splits), strict=True), classes


def _decode(paths, image_size, workers):
    """uint8 tensor (N, 3, image_size, image_size), and how many images were of another size."""
    pixels = np.empty((len(paths), 3, image_size, image_size), np.uint8)

    def read(i):
        image = read_rgb(paths[i])
        is_other_size = image.size != (image_size, image_size)
        if is_other_size:
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels[i] = np.asarray(image).transpose(2, 0, 1)
        return is_other_size

    def read_some(start):  # one at a time, threads would mostly wait for each other
        return sum(read(i) for i in range(start, min(start + 32, len(paths))))

    starts = range(0, len(paths), 32)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        done = (pool.map if workers else map)(read_some, starts)
        resized = sum(tqdm(done, "reading images", len(starts), leave=False, disable=None))
    return torch.from_numpy(pixels), resized


def read_rgb(path):
    """The PIL image of a file, in 8-bit RGB.

    Raises
    ------
    UserError
        When it cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            return _to_rgb(file)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many types
        raise UserError(
            f"{path} cannot be read as an image ({error}): replace or remove it"
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


def _channels_first(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _resize(images, size):
    if images.shape[-2:] == (size, size):
        return images
    resize = functools.partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    return torch.cat([resize(chunk.float()).round_().byte() for chunk in images.split(1000)])


def _mean_and_std(images):
    count = images.numel() / 3
    total, squares = torch.zeros(2, 3, dtype=torch.float64)
    for chunk in images.split(1000):  # sums of whole numbers: exact in float64
        chunk = chunk.double()
        total += chunk.sum((0, 2, 3))
        squares += chunk.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1).sqrt()  # a channel may be constant
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


# ------------------------------------------------------------------------------------------
# Folders of classes
# ------------------------------------------------------------------------------------------


def scan(root, test_names, log):
    """List the image files of each class in ``root/train/<class>/**`` and the same for testing.

    Only regular files of a type in `SUFFIXES` are listed, and links to such; no hidden ones. Links
    to folders are followed, except to one that holds them. `log` is told what is skipped.

    Parameters
    ----------
    root : path
    test_names : sequence of str
        Of the folders of test images: the first one there is counts.
    log : callable
        Takes a line of text worth knowing.

    Returns
    -------
    classes : list of str
        Names of the folders in ``train``, sorted.
    splits : list of two pairs
        For training and for testing: the paths (list of str), sorted by class and path, and their
        labels (int64 tensor).

    Raises
    ------
    UserError
        When a folder is missing, or a class is empty, alone, or for testing only.
    """
    root, skipped, found = Path(root), [], []
    test_name = next((name for name in test_names if (root / name).is_dir()), test_names[-1])
    folders = root / "train", root / test_name
    try:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder: --data must hold train/ and "
                            f"{_either(test_names)}")
        for folder, names in zip(folders, (["train"], test_names), strict=True):
            if not folder.is_dir():
                raise UserError(f"{root} has no folder {_either(names)}: add it, with a folder of "
                                "images for each class")
            found.append(_class_files(folder, skipped))
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read ({error.strerror})") from error
    train, test = found

    if skipped:
        log(f"warning: skipped {_some(sorted(skipped))}")
    if len(train) == 1:
        raise UserError(f"{folders[0]} has a single class ({_some(train)}): add others")
    if unknown := [name for name in test if name not in train]:
        raise UserError(f"{folders[1]} has classes that {folders[0]} lacks: {_some(unknown)}; add "
                        "training images of them or remove them")
    if missing := [name for name in train if name not in test]:
        log(f"warning: {folders[1]} lacks classes that {folders[0]} has: {_some(missing)}; the "
            "accuracy leaves them out")
    label = {name: k for k, name in enumerate(train)}
    return list(train), [
        ([path for paths in files.values() for path in paths],
         torch.tensor([label[name] for name, paths in files.items() for _ in paths]))
        for files in (train, test)
    ]


def _either(names):
    return " or ".join(f"{name}/" for name in names)


def _some(names):
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _class_files(folder, skipped):
    """Sorted image files of each class, by sorted class name."""
    real = folder.resolve()
    around = {_identity(path) for path in (real, *real.parents)}
    files = {}
    for subfolder in sorted(_list(folder, around, skipped)[0], key=lambda pair: pair[0]):
        files[os.path.basename(subfolder[0])] = images = []
        pending = [subfolder]
        while pending:
            subfolders, more = _list(*pending.pop(), skipped)
            pending += subfolders
            images += more
        images.sort()
        if not images:
            raise UserError(f"{subfolder[0]} has no images: add some or remove the folder")
    if not files:
        raise UserError(f"{folder} has no class folders: put the images in {folder}/<class>/")
    return files


def _list(folder, around, skipped):
    """What is in a folder: [(path of a subfolder, the folders around its contents)], [image file].

    Folders around are told by device and inode, for a link may lead back to one.
    """
    subfolders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                identity = _identity(entry.path)
                if identity in around:
                    skipped.append(f"{entry.path} (a link to a folder around it)")
                else:
                    subfolders.append((entry.path, around | {identity}))
            elif entry.name.lower().endswith(SUFFIXES):
                if entry.is_file():
                    images.append(entry.path)
                else:  # reading from a pipe, say, would wait for ever
                    skipped.append(f"{entry.path} (not a regular file)")
    return subfolders, images


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino
