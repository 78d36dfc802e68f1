"""Data sets as uint8 tensors on the device, and batches of them, augmented many images at a time.

    train, test = load("cifar10", "../data", device="cuda")
    for x, y in Batches(train, 96, train=True, cutout_length=16, generator=generator):
        ...

A data set is decoded once, into memory, and stays on the device. Augmentation is a handful of
tensor operations on the whole batch, so neither worker processes nor transfers are needed.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

DATASETS = ("cifar10", "cifar100", "digits", "imagefolder")
CIFAR10_MEAN = (0.49139968, 0.48215827, 0.44653124)
CIFAR10_STD = (0.24703233, 0.24348505, 0.26158768)
PADDING = 4  # of the random crop
SUFFIXES = tuple(".bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())


class DataError(Exception):
    """Data that cannot be used; the message is one line: what is wrong and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))  # file names may hold line breaks


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
        index = index.to(self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])


# ------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------


@functools.cache
def _scale_and_bias(mean, std, device):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def normalize(x, mean, std):
    """``(x / 255 - mean) / std`` for each channel.

    Parameters
    ----------
    x : uint8 tensor (B, C, H, W)
    mean, std : sequences of C floats

    Returns
    -------
    float32 tensor (B, C, H, W)
    """
    scale, bias = _scale_and_bias(tuple(mean), tuple(std), x.device)
    return x.float().mul_(scale).add_(bias)


def augment(x, mean, std, *, flip, cutout_length=0, generator=None, part=(0, 1)):
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
    part : (int, int)
        (i, p): x is the i-th of p equal parts of a batch. The random numbers of the whole batch
        are drawn, so that p generators in one state stay so, and the images together are treated
        as one process would treat the batch.

    Returns
    -------
    float32 tensor (B, C, H, W)

    References
    ----------
    DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout",
    arXiv 1708.04552. Liu, Simonyan and Yang, "DARTS", ICLR 2019.
    """
    B, C, H, W = x.shape

    i, parts = part

    def randint(n, count=1):  # below n, for each image: (count, B, 1)
        size = (count, parts * B, 1)
        return torch.randint(n, size, generator=generator, device=x.device)[:, i * B : (i + 1) * B]

    row, column = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    top, left = randint(2 * PADDING + 1, 2)
    rows, columns = top + row, left + column  # (B, H), (B, W): of the padded image, to be kept
    if flip:
        columns = torch.where(randint(2)[0].bool(), columns.flip(1), columns)
    pixels = (rows * (W + 2 * PADDING))[:, :, None] + columns[:, None, :]
    padded = F.pad(x, (PADDING, PADDING, PADDING, PADDING)).flatten(2)
    x = padded.gather(2, pixels.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)
    x = normalize(x, mean, std)

    if cutout_length:
        y_centre, x_centre = randint(H)[0], randint(W)[0]
        in_rows = ((row - y_centre + 0.5).abs() < cutout_length // 2).float()
        in_columns = ((column - x_centre + 0.5).abs() < cutout_length // 2).float()
        x.mul_(1 - in_rows[:, None, :, None] * in_columns[:, None, None, :])
    return x


class Batches:
    """Batches ``(x, y)`` of a data set: float32 (B, 3, H, W), normalised, and int64 (B,).

    Each iteration is one pass over the data. In training, it is in a new random order and
    augmented, and a last batch of a single image is left out, for BatchNorm cannot take it.
    Otherwise it is in order and whole.

    All randomness is drawn from ``generator``, while iterating. There is no other state: with
    the generator set back to what it was before a pass, the pass repeats itself exactly.

    Of p processes, each takes its part of every batch of p * batch_size images: together they see
    in a pass the images that one process with that batch size would, augmented alike, if their
    generators begin in the same state. In training all parts of a batch have the same size, at
    least 2: what the last batch holds beyond that is left out.

    Parameters
    ----------
    data : Images
    batch_size : int
        Of one process.
    train : bool
    cutout_length : int
        0 for no cutout; used in training only.
    generator : torch.Generator on the device of the data, or None for torch's default one
    channels_last : bool
        Memory format of x.
    part : (int, int)
        Number of this process, from 0, and of all processes.

    Raises
    ------
    DataError
        When there is not a single batch, or not a whole one to train on.
    """

    def __init__(
        self, data, batch_size, *, train, cutout_length=0, generator=None, channels_last=False,
        part=(0, 1),
    ):  # fmt: skip
        self.data = data
        self.batch_size = batch_size
        self.train = train
        self.generator = generator
        self.part = part
        self.options = {"cutout_length": cutout_length, "generator": generator, "part": part}
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        share = len(data) // part[1]
        if train and batch_size > share > 1:
            each = f" for each of {part[1]} processes" if part[1] > 1 else ""
            raise DataError(f"--batch_size {batch_size}{each} is too large for the {len(data)} "
                            f"images to train on: give at most {share}")  # fmt: skip
        if len(self) == 0:
            what = f"too few images to {'train' if train else 'evaluate'} on ({len(data)})"
            raise DataError(f"{what}: use a larger data set or another --train_portion")

    def __len__(self):
        parts = self.part[1]
        full, rest = divmod(len(self.data), parts * self.batch_size)
        return full + (rest // parts > 1 if self.train else rest > 0)

    def __iter__(self):
        data, (i, parts) = self.data, self.part
        if self.train:
            order = torch.randperm(len(data), generator=self.generator, device=data.labels.device)
        stride = parts * self.batch_size
        for start in range(0, len(self) * stride, stride):
            size = min(stride, len(data) - start)  # of the batch of all processes
            if self.train:
                size -= size % parts
            index = slice(start + i * size // parts, start + (i + 1) * size // parts)
            if index.start == index.stop:  # fewer images than processes
                continue
            if self.train:
                index = order[index]
                # index_select: many times faster than data.images[index] on a CPU
                x, y = data.images.index_select(0, index), data.labels.index_select(0, index)
                x = augment(x, data.mean, data.std, flip=data.flip, **self.options)
            else:
                x, y = data.images[index], data.labels[index]
                x = normalize(x, data.mean, data.std)
            yield x.contiguous(memory_format=self.memory_format), y

    def endless(self):
        """Pass after pass, without end.

        Call it anew at the start of each epoch: it then starts with a fresh permutation, so that
        every image is used equally often on average, and a resumed run needs nothing but the
        generator's state to continue exactly.
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
    DataError
        When the data is missing, damaged or not laid out like this.
    """
    if dataset in ("cifar10", "cifar100"):
        train, test, classes = _load_cifar(dataset, Path(root), image_size)
    elif dataset == "digits":
        train, test, classes = _load_digits(image_size)
    elif dataset == "imagefolder":
        train, test, classes = _load_folder(Path(root), image_size, workers, log)
    else:
        raise DataError(f"unknown data set {dataset!r}: use one of {', '.join(DATASETS)}")

    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if dataset == "cifar10" else _mean_and_std(train[0])
    train, test = (
        Images(images.to(device), labels.to(device), classes, mean, std, flip=dataset != "digits")
        for images, labels in (train, test)
    )
    return train, test


def _load_cifar(dataset, root, image_size):
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = CIFAR10 if dataset == "cifar10" else CIFAR100
    folder = root / cls.base_folder
    try:
        if not folder.exists():
            cls(root, download=True)
    except Exception as error:  # network, disk and archive errors of many types
        raise DataError(
            f"{dataset} is not in {root} and the download failed ({error}): put the extracted "
            f"{cls.base_folder} there, or use --dataset digits or imagefolder"
        ) from error
    try:
        splits = [cls(root, train=train) for train in (True, False)]
    except Exception as error:  # a wrong checksum, or whatever unpickling may raise
        raise DataError(
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
        raise DataError("--dataset digits needs scikit-learn: pip install scikit-learn") from error

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # whole numbers from 0 to 16
    images = _resize(torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1), image_size)
    labels = torch.from_numpy(digits.target).long()
    train, test = ((images[i], labels[i]) for i in split(labels, 0.8, seed=0))
    return train, test, [str(name) for name in digits.target_names]


def _load_folder(root, image_size, workers, log):
    try:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder: --data must hold train/ and test/ (or val/)")
        folders = [root / "train", root / "test" if (root / "test").is_dir() else root / "val"]
        for folder, name in zip(folders, ("train/", "test/ or val/"), strict=True):
            if not folder.is_dir():
                raise DataError(f"{root} has no folder {name}: add it, with a folder per class")
        files, test_files = (_image_files(folder) for folder in folders)
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror})") from error

    classes = list(files)
    if len(classes) == 1:
        raise DataError(f"{folders[0]} has a single class ({classes[0]}): add others")
    if unknown := [name for name in test_files if name not in files]:
        raise DataError(
            f"{folders[1]} has classes that {folders[0]} lacks: {', '.join(unknown)}; "
            "add training images of them or remove them"
        )
    files, test_files = (
        [(path, classes.index(name)) for name, paths in of_class.items() for path in paths]
        for of_class in (files, test_files)
    )
    paths, labels = zip(*files, *test_files, strict=True)
    images, resized = _decode(paths, image_size, workers)
    if resized:
        log(f"resized {resized:,} of {len(paths):,} images to {image_size} x {image_size}")
    sizes = len(files), len(test_files)
    return *zip(images.split(sizes), torch.tensor(labels).split(sizes), strict=True), classes


def _image_files(folder):
    """Sorted image files of each class, by sorted class name."""

    def is_image(path):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix.lower() in SUFFIXES and not hidden

    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = {name: sorted(map(str, filter(is_image, (folder / name).rglob("*")))) for name in names}
    if not files:
        raise DataError(f"{folder} has no class folders: put the images in {folder}/<class>/")
    for name in names:
        if not files[name]:
            raise DataError(f"{folder / name} has no images: add some or remove the folder")
    return files


def _decode(paths, image_size, workers):
    """uint8 tensor (N, 3, image_size, image_size), and how many images were of another size."""
    pixels = np.empty((len(paths), image_size, image_size, 3), np.uint8)

    def read(i):
        try:
            with Image.open(paths[i]) as file:
                image = to_rgb(file)
        except Exception as error:  # Pillow's readers raise errors of many types
            raise DataError(
                f"{paths[i]} cannot be read as an image ({error}): replace or remove it"
            ) from error
        is_other_size = image.size != (image_size, image_size)
        if is_other_size:
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels[i] = np.asarray(image)
        return is_other_size

    def read_some(start):  # one at a time, threads would mostly wait for each other
        return sum(read(i) for i in range(start, min(start + 32, len(paths))))

    starts = range(0, len(paths), 32)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        done = (pool.map if workers else map)(read_some, starts)
        resized = sum(tqdm(done, "reading images", len(starts), leave=False, disable=None))
    return _channels_first(pixels), resized


def to_rgb(image):
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
