"""Training steps as CUDA graphs: one launch instead of thousands."""

import argparse
import contextlib
import types

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import layers
from utils import UserError


def use_graphs(wanted, device, recover_every="epoch"):
    """Whether to capture steps: if possible, and unless --no-cuda_graphs is given."""
    possible = device.type == "cuda" and not dist.is_initialized() and recover_every == "epoch"
    if wanted and not possible:
        raise UserError("--cuda_graphs needs a single rank on a CUDA device, and recoveries at the "
                        "end of epochs: leave it out")
    return possible and wanted is not False


@contextlib.contextmanager
def no_autotune():
    """Disable cuDNN's autotuning and compilation, which do not pay off for a batch of rare size."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


class StepGraphs:
    """The CUDA graphs of the steps of one epoch.

        graphs = StepGraphs(net, enabled, run.warn)
        loss, logits = graphs.run(step, net, x, y, optimizer, args)

    computes step(net, x, y, optimizer, args). If graphs are enabled, the first call of a step runs
    eagerly, the second call captures it, and later calls replay the graph. If a number that the
    graph holds as a constant changes (see `constants`), the step is captured again. Steps whose
    inputs have other shapes than the first call, or that cannot be captured, run eagerly.
    """

    def __init__(self, net, enabled, warn):
        has_hooks = enabled and any(layers.has_hooks(module) for module in net.modules())
        self.enabled = enabled and not has_hooks
        self.warn = warn
        self.captured = {}
        if self.enabled:
            torch.cuda.empty_cache()  # free the memory pools of the previous epoch's graphs
        if has_hooks:
            warn("steps run without CUDA graphs, because modules of the network have hooks, which "
                 "do not run when a graph is replayed", "hooks")

    def run(self, step, *args):
        leaves, structure = tree_flatten(args)
        shapes = [(x.shape, x.dtype) for x in tensors_in(leaves)]
        if step not in self.captured:
            self.captured[step] = CapturedStep(step, structure, shapes)
        captured = self.captured[step]
        if (structure, shapes) != (captured.structure, captured.shapes):
            with no_autotune():
                return step(*args)
        if not self.enabled:
            return step(*args)

        found = constants(leaves)
        if found != captured.constants:
            captured.changes += 1
            if captured.changes == 5:
                self._warn_of_changes(captured, found)
            captured.constants, captured.graph = found, None
            return step(*args)  # creates state that later steps update in place, such as momenta
        captured.changes = 0
        if captured.graph is None:
            try:
                captured.capture(leaves)
            except Exception as error:
                self._fall_back(step, first_error(error), leaves)
                return step(*args)
        return captured.replay(leaves)

    def _fall_back(self, step, error, leaves):
        """Run all steps eagerly from now on, and warn."""
        self.enabled = False
        for optimizer in optimizers_in(leaves):
            optimizer.zero_grad()  # discard gradients of the aborted capture
        reason = (str(error).splitlines() or [""])[0]
        self.warn(f"{step.__name__} cannot be captured as a CUDA graph, so steps run eagerly "
                  f"({type(error).__name__}: {reason})", step.__name__)

    def _warn_of_changes(self, captured, found):
        names = [name for name in found if captured.constants.get(name) != found[name]]
        self.warn(f"{captured.step.__name__} runs without a CUDA graph, because its constants have "
                  f"changed in {captured.changes} consecutive steps ({', '.join(names)}); use a "
                  "tensor on the device for a number that changes",
                  f"changes {captured.step.__name__}")


class CapturedStep:
    """A step, the constants of its last run, and its CUDA graph if there is one."""

    def __init__(self, step, structure, shapes):
        self.step, self.structure, self.shapes = step, structure, shapes
        self.constants, self.graph = {}, None
        self.changes = 0  # consecutive steps at which constants changed

    def capture(self, leaves):
        """Capture the step in its own memory pool."""
        leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self.inputs = tensors_in(leaves)
        versions = [x._version for x in self.inputs]
        parameters = [p for optimizer in optimizers_in(leaves)
                      for group in optimizer.param_groups for p in group["params"]]
        grads_before = [p.grad for p in parameters]
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[stream.device_index]
        generator_state = generator.clone_state()
        try:
            # "thread_local" lets the threads of a data loader pin memory during the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.step(*tree_unflatten(leaves, self.structure))
            if versions != [x._version for x in self.inputs]:
                raise RuntimeError("it writes into a tensor that it is given")
        except Exception:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
            generator.graphsafe_set_state(generator_state)
            raise
        # Gradients that the graph writes.
        self.grads = [(p, p.grad) for p, before in zip(parameters, grads_before, strict=True)
                      if p.grad is not before]
        self.graph = graph

    def replay(self, leaves):
        """Replay the graph with the given inputs. Return copies of its outputs."""
        for graph_input, x in zip(self.inputs, tensors_in(leaves), strict=True):
            graph_input.copy_(x)
        self.graph.replay()
        for p, grad in self.grads:  # another step may have replaced p.grad
            p.grad = grad
        return tree_map_only(torch.Tensor, torch.clone, self.outputs)


def first_error(error):
    """Return the error that led to this one: after a failed step, ending the capture fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def constants(leaves):
    """Return the Python values that become constants of a captured graph, by name.

    These are the `graph_key` of a network, the numbers in `param_groups` of optimizers and in
    `args`, and numbers that are arguments of the step.
    """
    found = {}
    for i, value in enumerate(leaves):
        if hasattr(value, "graph_key"):
            found |= value.graph_key()
        elif isinstance(value, torch.optim.Optimizer):
            for k, group in enumerate(value.param_groups):
                for name, number in group.items():
                    if name != "params" and not isinstance(number, torch.Tensor):
                        found[f"{name} of group {k} of {type(value).__name__}"] = number
        elif isinstance(value, argparse.Namespace | types.SimpleNamespace):
            for name, number in vars(value).items():
                if is_constant(number):
                    found[f"args.{name}"] = number
        elif is_constant(value):
            found[f"argument {i}"] = value
    return found


def is_constant(value):
    if isinstance(value, list | tuple):
        return all(is_constant(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def tensors_in(leaves):
    return [value for value in leaves if isinstance(value, torch.Tensor)]


def optimizers_in(leaves):
    return [value for value in leaves if isinstance(value, torch.optim.Optimizer)]
