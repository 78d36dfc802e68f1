"""ImageNet, or other images in its layout, decoded and augmented by worker processes.

    train, val = load("/data/imagenet")         # train/<class>/*.JPEG and val/<class>/*.JPEG
    for x, y in Batches(train, 1024, train=True, device="cuda", workers=16, generator=generator):
        ...

Unlike the data sets of `data.py` it is too large to be kept decoded, so each pass reads the files
anew. `Batches` has the interface of `data.Batches`.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import SUFFIXES, DataError, normalize, to_rgb

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Images:
    """The files of one split.

    Attributes
    ----------
    files : array (N,) of bytes
        Paths. One array, as a list of a million strings would be copied by every worker.
    labels : int64 array (N,)
    classes : list of str
        Name of each label.
    """

    files: np.ndarray
    labels: np.ndarray
    classes: list

    def __len__(self):
        return len(self.labels)


def load(root):
    """List the images of ``root/train/<class>/*`` and ``root/val/<class>/*``; none is read yet.

    Parameters
    ----------
    root : path

    Returns
    -------
    train, val : Images
        Both with the classes of the training images.

    Raises
    ------
    DataError
        When a folder is missing, or a class is empty, alone, or in val/ only.
    """
    train, val = (_list(Path(root) / name) for name in ("train", "val"))
    if len(train.classes) == 1:
        raise DataError(f"{root}/train has a single class ({train.classes[0]}): add others")
    label = {name: k for k, name in enumerate(train.classes)}
    if unknown := [name for name in val.classes if name not in label]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise DataError(
            f"{root}/val has classes that {root}/train lacks: {', '.join(unknown[:3])}{more}; "
            "add training images of them or remove them"
        )
    labels = np.array([label[name] for name in val.classes])[val.labels]
    return train, Images(val.files, labels, train.classes)


def _list(folder):
    from torchvision.datasets import ImageFolder  # takes a second to import

    if not folder.is_dir():
        raise DataError(f"{folder.parent} has no folder {folder.name}/: --dataset imagenet reads "
                        f"{folder}/<class>/*")  # fmt: skip

    class Folder(ImageFolder):
        def find_classes(self, directory):
            names = sorted(e.name for e in os.scandir(directory) if e.is_dir())
            names = [name for name in names if not name.startswith(".")]
            if not names:
                raise DataError(
                    f"{folder} has no class folders: put the images in {folder}/<class>/"
                )
            return names, {name: k for k, name in enumerate(names)}

    try:
        found = Folder(folder, is_valid_file=_is_image, allow_empty=True)
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read ({error.strerror})") from error
    files = np.array([os.fsencode(path) for path, _ in found.samples], dtype=np.bytes_)
    labels = np.array(found.targets, dtype=np.int64)
    counts = np.bincount(labels, minlength=len(found.classes))
    if not counts.all():
        empty = folder / found.classes[counts.argmin()]
        raise DataError(f"{empty} has no images: add some or remove the folder")
    return Images(files, labels, found.classes)


def _is_image(path):
    name = os.path.basename(path).lower()
    return name.endswith(SUFFIXES) and not name.startswith(".")


class Plan:
    """The batches of a process in each pass: lists of (index of the image, seed or None).

    A training pass draws, at its start, one order and one seed for each image. All processes draw
    the same, so an image is augmented the same whichever process, and worker, it falls to. Each
    run of ``processes * batch_size`` images in that order is cut in equal parts, one a process;
    so are the images left over at the end, if that gives a process at least 2, which BatchNorm
    needs. For evaluation, process ``rank`` takes every ``processes``-th image and no seeds.

    Parameters
    ----------
    images : int
    batch_size : int
        Images of a batch of one process.
    train : bool
    generator : torch.Generator or None
        In training, in the same state in all processes.
    part : (int, int)
        ``(rank, processes)``.
    """

    def __init__(self, images, batch_size, train, generator=None, part=(0, 1)):
        self.images, self.batch_size, self.train = images, batch_size, train
        self.generator = generator
        self.rank, self.processes = part

    def __len__(self):
        if self.train:
            full, rest = divmod(self.images, self.processes * self.batch_size)
            return full + (rest // self.processes > 1)
        return -(-len(range(self.rank, self.images, self.processes)) // self.batch_size)

    def __iter__(self):
        if not self.train:
            share = range(self.rank, self.images, self.processes)
            for start in range(0, len(share), self.batch_size):
                yield [(index, None) for index in share[start : start + self.batch_size]]
            return
        device = self.generator.device if self.generator else "cpu"
        order = torch.randperm(self.images, generator=self.generator, device=device).cpu()
        seeds = torch.randint(2**62, (self.images,), generator=self.generator, device=device).cpu()
        together = self.processes * self.batch_size
        for start in range(0, len(self) * together, together):
            size = min(together, self.images - start) // self.processes
            index = order[start + self.rank * size :][:size]
            yield list(zip(index.tolist(), seeds[index].tolist(), strict=True))


class Batches:
    """Batches ``(x, y)``: float32 (B, 3, H, W), normalised; int64 (B,).

    Each iteration is one pass over the images, as `Plan` says. Training images are cropped at
    random (8 to 100 % of the area), resized, mirrored and jittered in colour; others are resized
    by their shorter side to 8/7 of `image_size`, and the centre is taken.

    There is no state but that of ``generator``: with it set back to what it was before a pass, the
    pass repeats itself exactly, with any number of workers.

    Parameters
    ----------
    images : Images
    batch_size : int
        Images of a batch of one process.
    train : bool
    image_size : int
        Height and width of x.
    device : torch.device or str
        Of x and y.
    workers : int
        Processes that read images; 0 reads in this one.
    generator, part
        As in `Plan`.
    channels_last : bool
        Memory format of x.

    Raises
    ------
    DataError
        When there is no batch to train on; while iterating, when an image cannot be read.
    """

    def __init__(
        self, images, batch_size, *, train, image_size=224, device="cpu", workers=0,
        generator=None, part=(0, 1), channels_last=True,
    ):  # fmt: skip
        share = len(images) // part[1]
        if train and batch_size < 2:
            raise DataError("--batch_size 1: BatchNorm needs at least 2 images to train on")
        if train and batch_size > share:
            each = f" for each of {part[1]} processes" if part[1] > 1 else ""
            raise DataError(f"--batch_size {batch_size}{each} is too large for the {len(images)} "
                            f"images to train on: give at most {share}")  # fmt: skip
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.loader = DataLoader(
            _Reader(images, image_size, train),
            batch_sampler=Plan(len(images), batch_size, train, generator, part),
            collate_fn=_collate, worker_init_fn=_start_worker,
            num_workers=workers, persistent_workers=train and workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else a pass would draw from the global one
        )  # fmt: skip

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self._read():
            if isinstance(batch, DataError):
                raise batch
            pixels, labels = (part.to(self.device, non_blocking=True) for part in batch)
            pixels = pixels.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)
            yield normalize(pixels, MEAN, STD), labels

    def _read(self):
        try:
            yield from self.loader
        except RuntimeError as error:  # a worker was killed, or shared memory is full
            raise DataError(
                f"images could not be read ({error}): give fewer --workers, or 0"
            ) from error


class _Reader:
    """Reads and augments an image; runs in the workers, and returns what the error is."""

    def __init__(self, images, image_size, train):
        from torchvision.transforms import v2  # takes a second to import

        self.images = images
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
            ]
            if train
            else [v2.Resize(image_size * 256 // 224), v2.CenterCrop(image_size)]
        )

    def __getitem__(self, item):
        index, seed = item
        path = os.fsdecode(self.images.files[index])
        try:
            with Image.open(path) as file:
                image = to_rgb(file)
        except Exception as error:  # Pillow's readers raise errors of many types
            return DataError(f"{path} cannot be read as an image ({error}): replace or remove it")
        with torch.random.fork_rng(devices=[]):  # transforms know the global generator only
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return np.asarray(self.transform(image)), self.images.labels[index]


def _collate(samples):
    for sample in samples:
        if isinstance(sample, DataError):  # raised here, it would arrive with a traceback
            return sample
    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def _start_worker(worker):
    # Ctrl-C, and some schedulers' SIGTERM, reach all processes at once. The main one then ends its
    # step, and its loader would raise an error if a worker's exit status were not 0.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))
