"""Training steps as CUDA graphs: one launch in place of thousands."""

import argparse
import contextlib
import types

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import layers
from utils import UserError


def use_graphs(wanted, device, recover_every="epoch"):
    """Whether steps are captured: where that is possible, unless --no-cuda_graphs is typed."""
    possible = device.type == "cuda" and not dist.is_initialized() and recover_every == "epoch"
    if wanted and not possible:
        raise UserError("--cuda_graphs needs a single rank on a CUDA device, and recoveries at the "
                        "end of epochs: leave it out")
    return possible and wanted is not False


@contextlib.contextmanager
def no_autotune():
    """Skip cuDNN's autotuning and compilation, which do not pay for a batch of unusual size."""
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

    is step(net, x, y, optimizer, args). If graphs are enabled, the first call of a step runs
    eagerly, the second one is captured, and later ones replay the graph. A step is captured again
    when a number changes that the graph holds as a constant: see `constants`. It runs eagerly when
    its tensors have other shapes than at first, and when it cannot be captured.
    """

    def __init__(self, net, enabled, warn):
        self.warn, self.captured = warn, {}
        self.enabled = enabled and not any(map(layers.has_hooks, net.modules()))
        if self.enabled:
            torch.cuda.empty_cache()  # frees the memory pools of the last epoch's graphs
        if enabled and not self.enabled:
            warn("steps run without CUDA graphs, because modules of the network have hooks, which "
                 "do not run when a graph is replayed", "hooks")

    def run(self, step, *args):
        leaves, structure = tree_flatten(args)
        shapes = [(x.shape, x.dtype) for x in leaves if isinstance(x, torch.Tensor)]
        if step not in self.captured:
            self.captured[step] = CapturedStep(step, structure, shapes)
        captured = self.captured[step]
        if (structure, shapes) != (captured.structure, captured.shapes):
            with no_autotune():
                return step(*args)
        if not self.enabled:
            return step(*args)

        key = constants(leaves)
        if key != captured.key:
            self._warn_of_change(captured, key)
            captured.key, captured.graph = key, None
            return step(*args)  # creates what later steps write in place, such as momenta
        captured.changes = 0
        if captured.graph is None:
            if error := captured.capture(leaves):
                self.enabled = False
                reason = (str(error).splitlines() or [""])[0]
                self.warn(f"{step.__name__} cannot be captured as a CUDA graph, so steps run "
                          f"eagerly ({type(error).__name__}: {reason})", step.__name__)
                for optimizer in optimizers_in(leaves):
                    optimizer.zero_grad()  # the aborted capture has left some
                return step(*args)
        return captured.replay(leaves)

    def _warn_of_change(self, captured, key):
        """Warn once of constants that change at every step, so that nothing is ever captured."""
        captured.changes += 1
        if captured.changes == 5:
            names = [name for name in key if captured.key.get(name) != key[name]]
            self.warn(f"{captured.step.__name__} runs without a CUDA graph, because it would have "
                      f"to be captured again at every step: {', '.join(names)} changes; a tensor "
                      "on the device may change without that", f"changes {captured.step.__name__}")


class CapturedStep:
    """A step, the constants that it was last run with, and its CUDA graph, if there is one."""

    def __init__(self, step, structure, shapes):
        self.step, self.structure, self.shapes = step, structure, shapes
        self.key, self.graph, self.changes = {}, None, 0

    def capture(self, leaves):
        """Capture the step in a memory pool of its own; returns the error that prevents it."""
        leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self.inputs = [x for x in leaves if isinstance(x, torch.Tensor)]
        versions = [x._version for x in self.inputs]
        parameters = [p for optimizer in optimizers_in(leaves)
                      for group in optimizer.param_groups for p in group["params"]]
        before = [p.grad for p in parameters]
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[stream.device_index]
        state = generator.clone_state()
        try:
            # Meanwhile a thread of a data loader may pin memory, which is no part of the step.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.step(*tree_unflatten(leaves, self.structure))
            if versions != [x._version for x in self.inputs]:
                raise RuntimeError("it writes into a tensor that it is given")
        except Exception as error:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
            generator.graphsafe_set_state(state)
            while error.__context__ is not None:  # the end of the capture has failed as well
                error = error.__context__
            return error
        grads = [p.grad for p in parameters]
        self.grads = [(p, new) for p, old, new in zip(parameters, before, grads, strict=True)
                      if new is not old]
        self.graph = graph

    def replay(self, leaves):
        """Replay the graph on other inputs; returns copies of its outputs."""
        given = [x for x in leaves if isinstance(x, torch.Tensor)]
        for own, x in zip(self.inputs, given, strict=True):
            own.copy_(x)
        self.graph.replay()
        for p, grad in self.grads:  # another step may have put its own gradient there
            p.grad = grad
        return tree_map_only(torch.Tensor, torch.clone, self.outputs)


def constants(leaves):
    """Return what Python decides in a step and a graph holds as constants, by name.

    That is what a network names in its `graph_key`, the numbers in the groups of optimizers, the
    numbers in `args`, and numbers that the step is given.
    """
    found = {}
    for value in leaves:
        if hasattr(value, "graph_key"):
            found |= value.graph_key()
        elif isinstance(value, torch.optim.Optimizer):
            for i, group in enumerate(value.param_groups):
                where = f"of group {i} of {type(value).__name__}"
                found |= {f"{name} {where}": number for name, number in group.items()
                          if name != "params" and not isinstance(number, torch.Tensor)}
        elif isinstance(value, argparse.Namespace | types.SimpleNamespace):
            found |= {f"args.{name}": number for name, number in vars(value).items()
                      if is_constant(number)}
        elif is_constant(value):
            found[f"argument {len(found)}"] = value
    return found


def is_constant(value):
    if isinstance(value, list | tuple):
        return all(map(is_constant, value))
    return value is None or isinstance(value, bool | int | float | str)


def optimizers_in(leaves):
    return [value for value in leaves if isinstance(value, torch.optim.Optimizer)]
