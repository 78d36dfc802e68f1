"""Time exported networks: size of the file, and CPU time an image by torch and by onnxruntime.

    python benchmarks/export.py

The networks are untrained, for time does not depend on the weights. Both libraries have one thread
and take turns, an image at a time, on 51 images after 5 to warm up; medians are printed as the
table of docs/export.md.
"""

import os
import sys
import time
from itertools import pairwise
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import onnxruntime
import torch

import data
import export
import genotypes
import model
import model_search

NETWORKS = {  # name: network, image size
    "`ISTA_twostage`, 36 channels, 20 cells": lambda: (
        model.NetworkCIFAR(36, 10, 20, True, genotypes.ISTA_twostage), 32),
    "absorbed one-stage search, 16 channels, 8 cells": lambda: (
        model_search.Network(16, 10, 8, one_stage=True).absorb(), 32),
    "`ISTA_ImageNet`, 48 channels, 14 cells": lambda: (
        model.NetworkImageNet(48, 1000, 14, True, genotypes.ISTA_ImageNet), 224),
}
WARM_UP, IMAGES = 5, 51


def times(net, image_size):
    """Size of the exported file in bytes, and median seconds an image by each library."""
    net = export.Exported(net, data.CIFAR10_MEAN, data.CIFAR10_STD).eval()
    content = export.to_onnx(net, image_size, {})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    image = torch.randint(256, (1, 3, image_size, image_size), dtype=torch.uint8)
    inputs, rounds = {"images": image.numpy()}, []
    with torch.inference_mode():
        for _ in range(WARM_UP + IMAGES):
            clock = [time.process_time()]
            for compute in (lambda: net(image), lambda: session.run(None, inputs)):
                compute()
                clock.append(time.process_time())
            rounds.append([end - start for start, end in pairwise(clock)])
    return len(content), *map(median, zip(*rounds[WARM_UP:], strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"| network (torch {torch.__version__}, onnxruntime {onnxruntime.__version__}) | image | "
          "file | torch | onnxruntime |\n|---|---|---|---|---|")
    for name, build in NETWORKS.items():
        net, size = build()
        length, *seconds = times(net, size)
        shown = " | ".join(f"{1000 * value:.1f} ms" for value in seconds)
        print(f"| {name} | {size}×{size} | {length / 1e6:.1f} MB | {shown} |", flush=True)
