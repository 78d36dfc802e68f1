"""ImageNet, or other images in its layout, decoded and augmented by worker processes.

    train, val = load("imagenet", "/data/imagenet", 224, device="cuda", workers=16)
    for x, y in train.batches(1024, train=True, generator=generator):
        ...

The decoded images do not fit in memory, so each pass reads the files again. The interface is that
of `data.py`.
"""

import math
import os
import signal
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import data
from utils import UserError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SEEDS = 2**62  # the seeds of images are below


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(data.Images):
    """The files of one split: `images` are paths (an array of bytes), `labels` are on the CPU."""

    # Paths are in one array, because every worker would copy a list of a million strings.
    image_size: int  # height and width of the images in batches
    device: torch.device  # of the batches
    workers: int  # processes that read images; 0 reads them in the main process
    readers: int = 1  # training sets that are read at the same time and split the workers

    def subset(self, index):
        """One of the two training sets of a search: the images at `index`, on any device."""
        index = index.cpu()
        return replace(self, images=self.images[index.numpy()], labels=self.labels[index],
                       readers=2)

    def batches(self, batch_size, **options):
        return Batches(self, batch_size, **options)


def load(dataset, root, image_size=224, device="cpu", workers=0, log=print, *, test_only=False):
    """List the images of ``root/train/<class>/`` and ``root/val/<class>/``, as `data.load` does.

    `workers` are processes, mean and std are always those of ImageNet, and `dataset` is not used.
    """
    train, val, classes = data.scan(root, ("val",), log, test_only)

    def to_images(paths, labels):
        files = np.array([os.fsencode(path) for path in paths])
        return Images(files, labels, classes, MEAN, STD, image_size=image_size,
                      device=torch.device(device), workers=workers)

    return None if test_only else to_images(*train), to_images(*val)


class Batches(data.Batches):
    """Batches ``(x, y)``: normalized float32 (B, 3, H, W) and int64 (B,).

    Passes and arguments are those of `data.Batches`, but the generator can be on any device, and
    there is no further augmentation. A pass does not depend on the number of workers. UserError
    while iterating if an image cannot be read.
    """

    # A training pass keeps its workers for the next one, because they take seconds to start. So a
    # new training pass ends the previous one. An evaluation starts its own workers.
    def __init__(self, images, batch_size, *, train, **options):
        super().__init__(images, batch_size, train=train, **options)
        for name, value in self.augmentation.items():
            if value:
                hint = "give --no-cutout" if name == "cutout_length" else "leave it out"
                raise UserError(f"--dataset imagenet is augmented without {name}: {hint}")
        workers = math.ceil(images.workers / images.readers) if train else images.workers
        self.loader = DataLoader(
            _Reader(images, train), batch_sampler=_BatchSampler(self),
            collate_fn=_collate, worker_init_fn=_start_worker,
            num_workers=workers, persistent_workers=train and workers > 0,
            pin_memory=images.device.type == "cuda",
            generator=torch.Generator(),  # so that a pass does not draw from the global one
        )

    def __iter__(self):
        images = self.images
        for batch in self._read():
            if isinstance(batch, UserError):
                # Raise a copy: the traceback of an error refers to this frame. If the frame refers
                # to the error as well, the loader is freed late and its workers stay for seconds.
                raise UserError(str(batch))
            pixels, labels = (part.to(images.device, non_blocking=True) for part in batch)
            x = pixels.permute(0, 3, 1, 2)
            yield data.normalize(x, images.mean, images.std, self.memory_format), labels

    def _read(self):
        """Iterate over the loader; UserError if a worker fails."""
        try:
            yield from self.loader
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            if not self.loader.num_workers or reason.startswith("Caught"):
                raise  # the code has an error, in this process or in a worker
            # A worker was killed, or the shared memory is full.
            raise UserError(
                f"images could not be read ({reason}): give fewer --workers, or 0"
            ) from error


class _BatchSampler:
    """The batches of a rank in each pass: lists of (index of the image, seed or None)."""

    def __init__(self, batches):
        self.slices, self.train, self.generator = batches.slices, batches.train, batches.generator
        self.images = len(batches.images)

    def __len__(self):
        return len(self.slices)

    def __iter__(self):
        if not self.train:
            for batch in self.slices:
                yield [(index, None) for index in range(batch.start, batch.stop)]
            return
        # All ranks draw the same order and seeds. So the augmentation of an image does not depend
        # on the rank and the worker that read it.
        g = self.generator
        device = g.device if g else "cpu"
        order = torch.randperm(self.images, generator=g, device=device)
        seeds = torch.randint(SEEDS, (self.images,), generator=g, device=device)
        order, seeds = torch.stack((order, seeds)).cpu()  # the only host synchronization of a pass
        for batch in self.slices:
            index = order[batch]
            yield list(zip(index.tolist(), seeds[index].tolist(), strict=True))


class _Reader:
    """Reads and augments images in the workers; an unreadable image gives a UserError object."""

    def __init__(self, images, train):
        self.files, self.labels = images.images, images.labels.numpy()
        size = images.image_size
        if train:
            self.transform = v2.Compose([
                v2.RandomResizedCrop(size),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
            ])
        else:
            self.transform = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])

    def __getitem__(self, item):
        index, seed = item
        try:
            image = data.read_rgb(os.fsdecode(self.files[index]))
        except UserError as error:
            return error
        with torch.random.fork_rng(devices=[]):  # transforms draw from the global generator
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return np.asarray(self.transform(image)), self.labels[index]


def _collate(samples):
    """Stack the images and labels of a batch, or return its first error."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample  # the loader would add a traceback to an error that is raised here
    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def _start_worker(worker):
    # Ctrl-C, and SIGTERM of some schedulers, reach all processes at once, and the main process
    # handles them. A worker exits with status 0, because the loader raises an error otherwise.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))
