"""ImageNet, or other images in its layout, decoded and augmented by worker processes.

    train, val = load("imagenet", "/data/imagenet", 224, device="cuda", workers=16)
    for x, y in train.batches(1024, train=True, generator=generator):
        ...

Unlike the data sets of `data.py` it is too large to be kept decoded, so each pass reads the files
anew. The interface is that of `data.py`.
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
SEEDS = 2**62  # of an image's augmentation


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(data.Images):
    """The files of one split; labels, classes, mean and std are as in `data.Images`, on the CPU.

    images : array (N,) of bytes
        Paths. One array, as a list of a million strings would be copied by every worker.
    image_size, device
        Height and width of x in `batches`; device of x and y.
    workers : int
        Processes that read images; 0 reads in this one.
    readers : int
        Data sets that are read side by side in training, among which the workers are shared.
    """

    image_size: int
    device: torch.device
    workers: int
    readers: int = 1

    def subset(self, index):
        """The images at `index` (an int64 tensor, any device), one of two halves in training."""
        index = index.cpu()
        return replace(self, images=self.images[index.numpy()], labels=self.labels[index],
                       readers=2)

    def batches(self, batch_size, **options):
        return Batches(self, batch_size, **options)


def load(dataset, root, image_size=224, device="cpu", workers=0, log=print, *, test_only=False):
    """List the images of ``root/train/<class>/*`` and ``root/val/<class>/*``; none is read yet.

    Parameters and what is returned are those of `data.load`, but that `workers` are processes, and
    mean and std always those of ImageNet. `dataset` is not used.
    """
    *pairs, classes = data.scan(root, ("val",), log, test_only)
    train, val = (
        pair and Images(
            np.array([os.fsencode(path) for path in pair[0]]), pair[1], classes, MEAN, STD,
            image_size=image_size, device=torch.device(device), workers=workers,
        )
        for pair in pairs
    )
    return train, val


class Batches(data.Batches):
    """Batches ``(x, y)``: float32 (B, 3, H, W), normalised, and int64 (B,).

    Parameters, passes over the images and ranks are as in `data.Batches`, but the generator may be
    on any device; a pass repeats itself exactly with any number of workers. Training images are
    cropped at random (8 to 100 % of the area), resized, mirrored and jittered in colour, and there
    are no other augmentations; others are resized by their shorter side to 8/7 of the image size,
    and the centre is taken. An image that cannot be read is a UserError while iterating.

    A training pass keeps its workers for the next one, because it takes seconds to start them. So
    it ends the pass before, if that was left early. Other passes start workers of their own.
    """

    def __init__(self, images, batch_size, *, train, **options):
        super().__init__(images, batch_size, train=train, **options)
        for name, value in self.augmentation.items():
            if value:
                hint = "give --no-cutout" if name == "cutout_length" else "leave it out"
                raise UserError(f"--dataset imagenet is augmented without {name}: {hint}")
        workers = math.ceil(images.workers / images.readers) if train else images.workers
        self.loader = DataLoader(
            _Reader(images, train), batch_sampler=_Plan(self),
            collate_fn=_collate, worker_init_fn=_start_worker,
            num_workers=workers, persistent_workers=train and workers > 0,
            pin_memory=images.device.type == "cuda",
            generator=torch.Generator(),  # else a pass would draw from the global one
        )

    def __iter__(self):
        images = self.images
        for batch in self._read():
            if isinstance(batch, UserError):
                # A copy, for a raised error refers to this frame: in a cycle with it, the loader
                # would be left to the garbage collector, and its workers linger for seconds.
                raise UserError(str(batch))
            pixels, labels = (part.to(images.device, non_blocking=True) for part in batch)
            x = pixels.permute(0, 3, 1, 2)
            yield data.normalize(x, images.mean, images.std, self.memory_format), labels

    def _read(self):
        try:
            yield from self.loader
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            if not self.loader.num_workers or reason.startswith("Caught"):
                raise  # the error of an edit, here or in a worker
            # A worker was killed, or shared memory is full.
            raise UserError(
                f"images could not be read ({reason}): give fewer --workers, or 0"
            ) from error


class _Plan:
    """The batches of a rank in each pass: lists of (index of the image, seed or None).

    A training pass draws, at its start, one order and one seed for each image. All ranks draw the
    same, so an image is augmented the same whichever rank, and worker, it falls to.
    """

    def __init__(self, batches):
        self.slices, self.train, self.generator = batches.slices, batches.train, batches.generator
        self.images = len(batches.images)

    def __len__(self):
        return len(self.slices)

    def __iter__(self):
        if not self.train:
            for share in self.slices:
                yield [(index, None) for index in range(share.start, share.stop)]
            return
        g = self.generator
        device = g.device if g else "cpu"
        order = torch.randperm(self.images, generator=g, device=device)
        seeds = torch.randint(SEEDS, (self.images,), generator=g, device=device)
        order, seeds = torch.stack((order, seeds)).cpu()  # a pass's only host sync
        for share in self.slices:
            index = order[share]
            yield list(zip(index.tolist(), seeds[index].tolist(), strict=True))


class _Reader:
    """Reads and augments an image; runs in the workers, and returns what the error is."""

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
        with torch.random.fork_rng(devices=[]):  # transforms know the global generator only
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return np.asarray(self.transform(image)), self.labels[index]


def _collate(samples):
    for sample in samples:
        if isinstance(sample, UserError):  # raised here, it would arrive with a traceback
            return sample
    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def _start_worker(worker):
    # Ctrl-C, and some schedulers' SIGTERM, reach all processes at once. The main one says what
    # there is to say; its loader would raise an error if a worker's exit status were not 0.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))
