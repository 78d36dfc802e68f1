"""Check on a GPU that steps compute what they compute on a CPU, and that runs resume.

    python benchmarks/check_gpu.py           # prints a table; exit status 1 if a check fails

Steps of small networks are compared with the plain network (`layers.plain`) in float64 on the CPU.
The table shows the largest ‖x − x_ref‖ / ‖x_ref‖ of logits, gradients of weights and of b, and
running statistics. TF32 is off, so what rounding changes is the side that a ReLU or a maximum falls
to, here and there. Steps that are captured as CUDA graphs are compared with eager steps, including
drop-path, by how all parameters move. So is a run that was resumed before its last epoch with one
that was not interrupted.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genotypes
import layers
import search
import train
import utils
from benchmarks.bench import KINDS, LAYOUTS, set_support
from harness.cuda_graphs import StepGraphs
from model import NetworkCIFAR
from model_search import Network

CPU = torch.device("cpu")
SIZES = ["--init_channels", "8", "--layers", "4", "--batch_size", "16"]
RUNS = {
    "two-stage": ("search.py", ["--arch_learning_rate", "0.01"]),
    "one-stage": ("search.py", ["--one_stage", "--freeze_tol", "9", "--no-cutout"]),
    "retraining": ("train.py", ["--arch", "ISTA_twostage", "--no-cutout"]),
}


def is_null():
    """Whether this is a null GPU, whose kernels use TF32 and whose graphs draw other numbers."""
    return torch.cuda.get_device_name().startswith("null")


def build(kind, seed, device, *, double=False, layout=torch.contiguous_format, plain=False,
          amp=False, drop_path_prob=0.0, rate=0.0):
    """Return a network of a random cell, and a function step(graphs) that makes a step."""
    torch.manual_seed(seed)
    script = train if kind == "retraining" else search
    args = script.get_args_parser().parse_args([*KINDS[kind][0], *SIZES])
    args.amp, args.learning_rate, args.arch_learning_rate = amp, rate, rate
    shape, genotype = (args.init_channels, 10, args.layers), genotypes.draw(seed)
    if kind == "retraining":
        net = NetworkCIFAR(*shape, args.auxiliary, genotype)
    else:
        net = Network(*shape, one_stage=args.one_stage, auxiliary=args.auxiliary)
        for b in net.arch_parameters():
            torch.nn.init.normal_(b)
        set_support(net, genotype)
        if args.one_stage:
            net.freeze([True, False] * genotypes.NODES)
    first, second = (
        (torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,)))
        for _ in range(2)
    )
    net = net.to(device, torch.float64 if double else torch.float32, memory_format=layout).train()
    net.drop_path_prob = drop_path_prob
    if kind == "retraining":
        optimizers = [utils.SGD(net.parameters(), rate, args.momentum, weight_decay=0)]
    else:
        optimizers = search.optimizers(net, args)

    def on_device(x, y):
        return x.to(net.keep_prob).contiguous(memory_format=layout), y.to(device)

    first, second = on_device(*first), on_device(*second)

    def step(graphs):
        with layers.plain() if plain else contextlib.nullcontext():
            if kind == "retraining":
                return graphs.run(train.train_step, net, *first, *optimizers, args)
            if kind == "one-stage":
                return graphs.run(search.one_stage_step, net, *first, *optimizers, args)
            graphs.run(search.arch_step, net, *second, *optimizers, args)
            return graphs.run(search.weight_step, net, *first, *optimizers, args)

    return net, step


def results(*args, **options):
    """Return logits, gradients and running statistics of a step that moves nothing, as vectors."""
    net, step = build(*args, **options)
    _, logits = step(StepGraphs(net, False, print))
    arch, weights = [], net.parameters()
    if isinstance(net, Network):
        arch, weights = net.arch_parameters(), net.weight_parameters()
    statistics = [x for name, x in net.named_buffers() if "running_" in name]
    return [vector(part) for part in (
        [logits], [p.grad for p in arch], [p.grad for p in weights], statistics,
    )]


def vector(tensors):
    parts = [t.detach().double().cpu().flatten() for t in tensors if t is not None]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def distance(found, expected):
    """Return the largest relative error of some vectors, or inf if there is a NaN."""
    errors = [((a - b).norm() / b.norm()).item()
              for a, b in zip(found, expected, strict=True) if len(b)]
    return max(float("inf") if error != error else error for error in errors)


def movement(kind, device, with_graphs, layout, amp):
    """Return how all parameters move in five steps with drop-path, and the warnings of graphs."""
    drop_path_prob = 0.0 if kind == "two-stage" or is_null() else 0.4
    net, step = build(kind, 0, device, layout=layout, amp=amp, rate=1e-3,
                      drop_path_prob=drop_path_prob)
    warnings, before = [], vector(net.parameters())
    graphs = StepGraphs(net, with_graphs, lambda text, kind=None: warnings.append(text))
    torch.manual_seed(1)
    for _ in range(5):
        step(graphs)
    return [vector(net.parameters()) - before], warnings


def last_movements(kind, device):
    """Return how weights move in the last epoch of a resumed and of an uninterrupted run."""
    name, more = RUNS[kind]
    script = {"search.py": search, "train.py": train}[name]
    tiny = ["--dataset", "digits", "--image_size", "8", "--init_channels", "4", "--layers", "3",
            "--batch_size", "64", "--epochs", "3", "--device", str(device)]

    def run(*argv):
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(script.get_args_parser().parse_args([*map(str, argv)]))

    def weights(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state["weights" if name == "train.py" else "net"]
        return vector([x for key, x in state.items() if x.is_floating_point()])

    with tempfile.TemporaryDirectory() as folder:
        whole, other = Path(folder, "whole"), Path(folder, "other")
        run(*tiny, *more, "--save", whole)
        shutil.copytree(whole, other)
        before = weights(whole / "checkpoint-previous.pt")
        os.replace(other / "checkpoint-previous.pt", other / "checkpoint.pt")
        run("--resume", other)
        return [[weights(path / "checkpoint.pt") - before] for path in (other, whole)]


def checks(device):
    """Yield the name of each check, its error and its bound."""
    for kind in KINDS:
        for seed in (0, 1):
            expected = results(kind, seed, CPU, double=True, plain=True)
            for name, layout in LAYOUTS.items():
                for plain in (True, False):
                    what = f"{kind}, cell {seed}, {name}, {'plain' if plain else 'layers.py'}"
                    found = results(kind, seed, device, layout=layout, plain=plain)
                    yield what, distance(found, expected), 1e-2
            plain, ours = (
                distance(results(kind, seed, device, layout=torch.channels_last, plain=plain,
                                 amp=True), expected)
                for plain in (True, False)
            )
            yield f"{kind}, cell {seed}, layers.py in bfloat16", ours, 1.3 * plain + 0.01
    for kind in KINDS:
        for name, layout, amp in (("nchw", LAYOUTS["nchw"], False),
                                  ("channels-last bfloat16", LAYOUTS["channels-last"], True)):
            found, warnings = movement(kind, device, True, layout, amp)
            expected, _ = movement(kind, device, False, layout, amp)
            for text in warnings:
                print(f"        {text}")
            error = distance(found, expected) if not warnings else float("inf")
            yield f"{kind}, {name}, graph", error, 0.2 if amp else 0.05
    for kind in KINDS:
        yield f"{kind}, resumed", distance(*last_movements(kind, device)), 0.02


def main():
    device = utils.choose_device("cuda")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, is_null()
    failed = total = 0
    for name, error, bound in checks(device):
        failed, total = failed + (not error <= bound), total + 1
        print(f"{'ok    ' if error <= bound else 'FAILED'}  {name:58}{error:10.1e} of {bound:.1e}",
              flush=True)
    print(f"{total - failed} of {total} checks passed on {torch.cuda.get_device_name()}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
