"""Check on a GPU that steps compute the same as on a CPU, and that runs resume.

    python benchmarks/check_gpu.py           # prints a table; exit status 1 if a check fails

- Steps of small networks are compared with float64 steps on the CPU in which every layer computes
  as torch.nn does (`layers.plain`). The error is the largest ‖x − x_ref‖ / ‖x_ref‖ of logits,
  gradients of weights and of b, and running statistics. TF32 is off, so errors are due to inputs
  near a kink of a ReLU or of a maximum, where rounding decides.
- Steps with CUDA graphs are compared with eager steps, with drop-path, by the changes of all
  parameters.
- A run that is resumed before its last epoch is compared with the uninterrupted run.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genotypes
import layers
import search
import train
import utils
from benchmarks.bench import KIND_FLAGS, LAYOUTS, make_network, make_optimizers, parse_flags
from harness.cuda_graphs import StepGraphs
from harness.runs import Run
from model_search import Network

CPU = torch.device("cpu")
SIZES = ["--init_channels", "8", "--layers", "4", "--batch_size", "16"]
RUN_SIZES = ["--dataset", "digits", "--image_size", "8", "--init_channels", "4", "--layers", "3",
             "--batch_size", "64", "--epochs", "3"]
RUN_FLAGS = {
    "two-stage": ["--arch_learning_rate", "0.01"],
    "one-stage": ["--one_stage", "--freeze_tol", "9", "--no-cutout"],
    "retraining": ["--arch", "ISTA_twostage", "--no-cutout"],
}


def is_simulated():
    """Whether this is a null GPU, whose kernels use TF32 and whose graphs draw other numbers."""
    return torch.cuda.get_device_name().startswith("null")


def build(kind, seed, device, *, double=False, layout=torch.contiguous_format, plain=False,
          amp=False, drop_path_prob=0.0, learning_rate=0.0):
    """Return a network of a random cell, and a function step(graphs) that makes a step."""
    torch.manual_seed(seed)
    args = parse_flags(kind, SIZES)
    args.amp, args.learning_rate, args.arch_learning_rate = amp, learning_rate, learning_rate
    net = make_network(kind, args, genotypes.draw(seed))
    if kind != "retraining":
        for b in net.arch_parameters():
            torch.nn.init.normal_(b)
    if kind == "one-stage":
        net.freeze([True, False] * genotypes.NODES)
    batches = [(torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,)))
               for _ in range(2)]
    dtype = torch.float64 if double else torch.float32
    net = net.to(device, dtype, memory_format=layout).train()
    net.drop_path_prob = drop_path_prob
    optimizers = make_optimizers(kind, net, args)
    batch, arch_batch = (
        (x.to(device, dtype).contiguous(memory_format=layout), y.to(device)) for x, y in batches)

    def step(graphs):
        with layers.plain() if plain else contextlib.nullcontext():
            if kind == "retraining":
                return graphs.run(train.train_step, net, *batch, *optimizers, args)
            if kind == "one-stage":
                return graphs.run(search.one_stage_step, net, *batch, *optimizers, args)
            graphs.run(search.arch_step, net, *arch_batch, *optimizers, args)
            return graphs.run(search.weight_step, net, *batch, *optimizers, args)

    return net, step


def compute_results(*args, **options):
    """Return logits, gradients and running statistics of a step at learning rate 0, as vectors."""
    net, step = build(*args, **options)
    _, logits = step(StepGraphs(net, False, print))
    arch, weights = [], net.parameters()
    if isinstance(net, Network):
        arch, weights = net.arch_parameters(), net.weight_parameters()
    statistics = [x for name, x in net.named_buffers() if "running_" in name]
    tensors = [logits], [p.grad for p in arch], [p.grad for p in weights], statistics
    return [to_vector(part) for part in tensors]


def to_vector(tensors):
    parts = [t.detach().double().cpu().flatten() for t in tensors if t is not None]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def largest_error(found, expected):
    """Return the largest relative error of some vectors, or inf if there is a NaN."""
    errors = [((a - b).norm() / b.norm()).item()
              for a, b in zip(found, expected, strict=True) if len(b)]
    return max(float("inf") if error != error else error for error in errors)


def changes_by_steps(kind, device, with_graphs, layout, amp):
    """Return the changes of all parameters by five steps, and the warnings of graphs."""
    drop_path_prob = 0.0 if kind == "two-stage" or is_simulated() else 0.4
    net, step = build(kind, 0, device, layout=layout, amp=amp, learning_rate=1e-3,
                      drop_path_prob=drop_path_prob)
    warnings, before = [], to_vector(net.parameters())
    graphs = StepGraphs(net, with_graphs, lambda text, kind=None: warnings.append(text))
    torch.manual_seed(1)
    for _ in range(5):
        step(graphs)
    return [to_vector(net.parameters()) - before], warnings


def changes_by_last_epoch(kind, device):
    """Return how the last epoch changes the weights in a resumed and in an uninterrupted run."""
    script = train if kind == "retraining" else search
    save_checkpoint = Run.save_checkpoint

    def run(*argv):
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(script.get_args_parser().parse_args([*map(str, argv)]))

    def read_weights(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state["weights" if kind == "retraining" else "net"]
        return to_vector([x for x in state.values() if x.is_floating_point()])

    with tempfile.TemporaryDirectory() as folder:
        uninterrupted, resumed = Path(folder, "uninterrupted"), Path(folder, "resumed")
        previous = Path(folder, "previous.pt")

        def save(run, **state):
            if os.path.exists(run.file("checkpoint.pt")):
                shutil.copy(run.file("checkpoint.pt"), previous)
            save_checkpoint(run, **state)

        with mock.patch.object(Run, "save_checkpoint", save):
            run(*RUN_SIZES, *RUN_FLAGS[kind], "--device", device, "--save", uninterrupted)
        shutil.copytree(uninterrupted, resumed)
        shutil.copy(previous, resumed / "checkpoint.pt")
        before = read_weights(previous)
        run("--resume", resumed)
        return [[read_weights(path / "checkpoint.pt") - before]
                for path in (resumed, uninterrupted)]


def run_checks(device):
    """Yield the name of each check, its error and its tolerance."""
    for kind in KIND_FLAGS:
        for seed in (0, 1):
            expected = compute_results(kind, seed, CPU, double=True, plain=True)

            def error(kind=kind, seed=seed, expected=expected, **options):
                return largest_error(compute_results(kind, seed, device, **options), expected)

            for name, layout in LAYOUTS.items():
                for plain in (True, False):
                    what = f"{kind}, cell {seed}, {name}, {'plain' if plain else 'layers.py'}"
                    yield what, error(layout=layout, plain=plain), 1e-2
            plain_error, own_error = (
                error(layout=torch.channels_last, plain=plain, amp=True) for plain in (True, False))
            yield (f"{kind}, cell {seed}, layers.py in bfloat16", own_error,
                   1.3 * plain_error + 0.01)
    for kind in KIND_FLAGS:
        for name, layout, amp in (("nchw", LAYOUTS["nchw"], False),
                                  ("channels-last bfloat16", LAYOUTS["channels-last"], True)):
            found, warnings = changes_by_steps(kind, device, True, layout, amp)
            expected, _ = changes_by_steps(kind, device, False, layout, amp)
            for text in warnings:
                print(f"        {text}")
            graph_error = float("inf") if warnings else largest_error(found, expected)
            yield f"{kind}, {name}, graph", graph_error, 0.2 if amp else 0.05
    for kind in KIND_FLAGS:
        yield f"{kind}, resumed", largest_error(*changes_by_last_epoch(kind, device)), 0.02


def main():
    device = utils.choose_device("cuda")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, is_simulated()
    failed = total = 0
    for name, error, tolerance in run_checks(device):
        passed, total = error <= tolerance, total + 1
        failed += not passed
        print(f"{'ok    ' if passed else 'FAILED'}  {name:58}{error:10.1e} of {tolerance:.1e}",
              flush=True)
    print(f"{total - failed} of {total} checks passed on {torch.cuda.get_device_name()}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
