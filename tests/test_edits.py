"""Edited sources do what the edit says, and their runs resume.

Edits of operations are made in this process and compared with the layers of torch.nn. Other edits
are patches of a copy of the sources, which is then run.
"""

import copy
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from scripts import (
    GPU,
    ROOT,
    TRAIN,
    TWO_STAGE,
    Process,
    assert_same_run,
    needs_null_gpu,
    rows,
    saved,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import data
import layers
import model_search
import operations
import search
import utils
from genotypes import PRIMITIVES, Genotype
from harness import checkpoints
from model import NetworkCIFAR
from model_search import MixedOp, Network
from operations import DilConv, FactorizedReduce, SepConv
from utils import UserError

# ------------------------------------------------------------------------------------------------
# Operations
# ------------------------------------------------------------------------------------------------


def in_init(cls, change):
    """Return an edit of `__init__` that changes the operation that it made."""
    def edit(patch):
        init = cls.__init__
        patch.setattr(cls, "__init__", lambda layer, *args, **kwargs: (
            init(layer, *args, **kwargs), change(layer))[0])
    return edit


def replace(place, make):
    """Replace the layer at a place of an operation."""
    return lambda op: op.op.__setitem__(place, make(op.op[place]))


def set_attributes(place, **attributes):
    """Set attributes of the layer at a place of an operation."""
    return lambda op: [setattr(op.op[place], key, value) for key, value in attributes.items()]


def in_forward(cls, forward):
    """Return an edit of `forward`; `forward` gets the original one as its first argument."""
    before = cls.forward
    return lambda patch: patch.setattr(cls, "forward", lambda *args: forward(before, *args))


def add_primitive(patch):
    patch.setattr(model_search, "PRIMITIVES", [*PRIMITIVES, "sep_conv_7x7"])
    patch.setitem(operations.OPS, "sep_conv_7x7",
                  lambda C, stride, affine: SepConv(C, 7, stride, affine))


def add_gains(patch):
    """Multiply each operation by a different number, which its `repr` does not show."""
    made = []
    in_init(SepConv, lambda op: (made.append(op), setattr(op, "gain", len(made) // 3)))(patch)
    in_forward(SepConv, lambda before, op, x: (1 + op.gain) * before(op, x))(patch)


OPERATIONS = {
    "none": lambda patch: None,
    "SiLU": in_init(DilConv, replace(0, lambda _: nn.SiLU())),
    "padding_mode": in_init(SepConv, set_attributes(1, padding_mode="reflect")),
    "GroupNorm": in_init(DilConv, replace(3, lambda norm: nn.GroupNorm(2, norm.num_features))),
    "no statistics": in_init(DilConv, replace(3, lambda norm: layers.BatchNorm2d(
        norm.num_features, track_running_stats=False))),
    "primitive": add_primitive,
    "gains": add_gains,
    "hook": in_init(DilConv, lambda op: op.register_forward_hook(lambda op, x, y: 2 * y)),
    "pre-hook of a layer": in_init(SepConv, lambda op: op.op[1].register_forward_pre_hook(
        lambda conv, x: (3 * x[0] + 1,))),
    "backward hook": in_init(FactorizedReduce, lambda op: op.register_full_backward_hook(
        lambda op, g, _: (2 * g[0],))),
    "fixed weights": in_init(SepConv, lambda op: op.requires_grad_(False)),
    "residual": in_forward(SepConv, lambda before, op, x: before(op, x) + x[:, :, :1, :1]),
    "first layers only": in_forward(SepConv, lambda before, op, x: op.op[:4](x)),
    "flip": in_forward(FactorizedReduce, lambda before, op, x: before(op, x.flip(3))),
    "MixedOp": in_forward(MixedOp, lambda before, mixed, x, op, w: (
        before(mixed, x, op, w.sigmoid()))),
}
# Edits of a network after it has run.
LATER = {
    "none": lambda net: None,
    "forward of instances": lambda net: [setattr(op, "forward", lambda x, op=op: 3 * op.op(x))
                                         for op in find(net, SepConv)],
    "ReLU": lambda net: [replace(0, lambda _: nn.SiLU())(op) for op in find(net, DilConv)],
    "dropout": lambda net: [op.op.append(nn.Dropout(0.5)) for op in find(net, SepConv)],
    "hooks": lambda net: [op.register_forward_hook(lambda op, x, y: y + 0.1)
                          for op in find(net, (SepConv, nn.Conv2d, nn.ReLU, nn.BatchNorm2d))],
    "global hook": lambda net: nn.modules.module.register_module_forward_hook(
        lambda layer, x, y: y + 0.1 if isinstance(layer, nn.BatchNorm2d) else None),
}


def find(net, classes):
    return [layer for layer in net.modules() if isinstance(layer, classes)]


def supernet():
    """A reduction cell that runs every operation, at stride 2 (node 0) and 1 (node 1)."""
    n = len(model_search.PRIMITIVES)
    net = Network(4, 10, 1, sparseness=n, proj_dims=n)
    codes = [z.numpy() for z in net.reduce_code.z]
    net.reduce_code.accept(codes, [[(edge, op) for op in range(n)] for edge in (0, 2, 1, 3)])
    for b in net.reduce_code.b:
        nn.init.normal_(b)  # then w is of order 1 and has both signs
    return net


def network():
    """A network of `model.py` with the same operations, whose BatchNorms have γ and β."""
    pairs = [(name, node) for node in (0, 2, 1, 3) for name in model_search.PRIMITIVES]
    return NetworkCIFAR(4, 10, 1, False, Genotype(pairs, range(2, 6), pairs, range(2, 6)), True)


def results(net):
    """Logits, gradients and running statistics, in training and then in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for mode in (True, False):
        x = 3 * torch.randn(6, 3, 12, 12, dtype=torch.float64, generator=generator)
        net.train(mode).zero_grad()
        logits, _ = net(x.contiguous(memory_format=torch.channels_last))
        logits.square().sum().backward()
        found[mode] = [
            logits, {name: p.grad for name, p in net.named_parameters()},
            {name: t.clone() for name, t in net.named_buffers() if ".running_" in name},
        ]
    return found


def assert_equals_plain_layers(net):
    """Assert that the results equal those of torch.nn's layers up to rounding; return them."""
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(2)
    found = results(net)
    net.load_state_dict(state)
    torch.manual_seed(2)
    with layers.plain():
        torch.testing.assert_close(found, results(net), rtol=1e-7, atol=1e-8)
    net.load_state_dict(state)
    return found


@pytest.mark.parametrize(("name", "make"), [
    *((name, supernet) for name in OPERATIONS),
    *((name, network) for name in ("none", "pre-hook of a layer", "residual", "no statistics")),
])
def test_edited_operations_compute_the_same_as_with_torch_layers(name, make, monkeypatch):
    torch.manual_seed(0)
    OPERATIONS[name](monkeypatch)
    net = make().double().to(memory_format=torch.channels_last)
    model_search.randomize_norms(net)
    assert_equals_plain_layers(net)


@pytest.mark.parametrize("name", LATER)
def test_edits_of_a_network_that_has_run_have_an_effect(name, monkeypatch):
    monkeypatch.setattr(nn.modules.module, "_global_forward_hooks", OrderedDict())
    net = supernet().double().to(memory_format=torch.channels_last)
    before, _, _ = assert_equals_plain_layers(net)[True]
    LATER[name](net)
    after, _, _ = assert_equals_plain_layers(net)[True]
    assert torch.allclose(before, after) == (name == "none")


def with_residual(op, x, pair_weight=None):
    stride = op.op[1].stride[0]
    return layers.weighted(op.op, x, pair_weight) + x[:, :, ::stride, ::stride]


@pytest.mark.parametrize(("one_stage", "edit", "reason"), [
    (False, lambda patch: patch.setattr(SepConv, "forward", with_residual),
     "sep_conv_3x3 at stride 1: .*multiply the whole output"),
    (True, in_init(DilConv, lambda op: op.op.append(nn.Tanh())),
     "dil_conv_3x3 at stride 1: .*other layers follow the last BatchNorm"),
    (True, OPERATIONS["GroupNorm"], "dil_conv_3x3 at stride 1: .* needs a BatchNorm at the end"),
    (False, in_init(DilConv, replace(0, lambda _: nn.ReLU(inplace=True))),
     "dil_conv_3x3 at stride 1: the operation writes into its input"),
    (True, OPERATIONS["MixedOp"], "an edit of MixedOp, MixedCell or Network"),
])
def test_edits_that_a_search_cannot_compute_are_refused(one_stage, edit, reason, monkeypatch):
    edit(monkeypatch)
    args = ["--one_stage"] * one_stage + ["--init_channels", "4", "--layers", "3"]
    with pytest.raises(UserError, match=reason):
        search.supernet(search.get_args_parser().parse_args(args), 10)


# ------------------------------------------------------------------------------------------------
# Runs of edited sources
# ------------------------------------------------------------------------------------------------


KEEP_PREVIOUS = """
@@ harness/checkpoints.py
+    import pathlib, shutil
+    if pathlib.Path(path).exists():
+        shutil.copy(path, f"{path}.previous")
     write_file(path, buffer.getbuffer())
"""


def edited(folder, *patches):
    """Copy the sources and apply patches; the text that a hunk replaces must occur once."""
    sources = folder / "sources"
    for path in (*ROOT.glob("*.py"), *ROOT.glob("harness/*.py"), *ROOT.glob("tools/*.py")):
        copied = sources / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    for hunk in "".join((KEEP_PREVIOUS, *patches)).split("\n@@ ")[1:]:
        name, *lines = hunk.rstrip("\n").split("\n")
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in kept)
                    for kept in ((" ", "-", ""), (" ", "+", "")))
        text = (sources / name).read_text()
        assert text.count(old) == 1, f"{name} has this {text.count(old)} times:\n{old}"
        (sources / name).write_text(text.replace(old, new))
    return sources


def finish(script, *flags, cwd, status=0, **options):
    """Run a script to its end; return the process, with `stdout` and `stderr`."""
    process = Process(script, *flags, cwd=cwd, **options)
    assert process.wait() == status, process.stdout + process.stderr
    return process


class Run:
    """A run of two epochs, and a resumption after its first epoch, with the same results."""

    def __init__(self, sources, script, *flags, pictures=False, launcher=()):
        parent = sources.parent
        self.folder, again = parent / "run", parent / "again"
        self.log = finish(sources / script, "--epochs", 2, *flags, "--save", "run", cwd=parent,
                          pictures=pictures, launcher=launcher).stdout
        again.mkdir()
        for name in ("config.json", "metrics.jsonl", "genotypes.jsonl"):
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, again)
        shutil.copy(self.folder / "checkpoint.pt.previous", again / "checkpoint.pt")
        finish(sources / script, "--resume", "again", cwd=parent, launcher=launcher)
        assert_same_run(self.folder, again)

        self.rows = rows(self.folder / "metrics.jsonl")
        self.before = saved(self.folder / "checkpoint.pt.previous")
        self.last = saved(self.folder / "checkpoint.pt")
        self.weights = self.last["net" if script == "search.py" else "weights"]


class Edit(NamedTuple):
    """A patch with hunks that begin with `@@ FILE`, a check of its effect, and its flags."""

    patch: str
    effect: Callable
    flags: tuple = ()


def optimizer_of_search(name):
    def effect(run):
        rates = [0.002, 0.002 * 1.01 / 2]  # cosine, from 0.1 to 0.001
        assert [row["learning_rate"] for row in run.rows] == pytest.approx(rates)
        return run.last["weight_optimizer"]["param_groups"][0]["lr"] == pytest.approx(rates[1])

    return Edit(f"""
@@ search.py
-    weight_optimizer = utils.sgd(net.weight_parameters(), args)
+    weight_optimizer = torch.optim.{name}(net.weight_parameters(), 0.002)
""", effect)


def optimizer_of_training(name):
    def effect(run):
        first, second = run.last["optimizer"]["param_groups"]
        assert [first["lr"], second["lr"]] == pytest.approx([0.001, 0.002])
        return second["eps"] == 1e-7

    return Edit(f"""
@@ train.py
-    optimizer = utils.sgd(net.parameters(), args)
+    optimizer = torch.optim.{name}([
+        dict(params=[p for p in net.parameters() if p.ndim > 1]),
+        dict(params=[p for p in net.parameters() if p.ndim <= 1], lr=0.004, eps=1e-7),
+    ], 0.002)
""", effect)


LOSS = Edit("""
@@ utils.py
-    loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
+    loss = 100 + F.multi_margin_loss(logits.float(), labels)
     if logits_aux is None:
""", lambda run: all(
    min(row["train_loss"], row.get("arch_loss", 101)) > 100 for row in run.rows))

TERM = Edit("""
@@ search.py
         loss, total = utils.criterion(logits, logits_aux, y, args)
+        scale, target = args.pull
+        total = total + scale * sum((b - target).square().sum() for b in net.arch_parameters())
         arch_optimizer.zero_grad()
@@ search.py
     group = parser.add_argument_group("architecture")
+    group.add_argument("--pull", type=float, nargs=2, default=[0.0, 0.0], help="of b, to a target")
""", lambda run: all((b > 0.1).all() for key, b in run.weights.items() if "_code.b." in key),
    ("--pull", 1000, 2))

MIXUP = Edit("""
@@ train.py
+        y = torch.nn.functional.one_hot(y, 10).float()
+        order, part = torch.randperm(len(x)), 0.25 + torch.rand(()) / 2
+        x, y = part * x + (1 - part) * x[order], part * y + (1 - part) * y[order]
         loss, logits = graphs.run(train_step, net, x, y, optimizer, run.args)
@@ train.py
-    return utils.name_metrics(meter.read(), "train")
+    entropy = torch.special.entr(y).sum(1).mean()
+    return utils.name_metrics(meter.read(), "train") | {"entropy": entropy}
""", lambda run: all(row["train_loss"] > row["entropy"] > 0.3 for row in run.rows))


def has_its_values_in_the_row(run):
    for row in run.rows:
        assert type(row["numpy"]) is type(row["torch"]) is float and row["array"] == [0, 1, 2]
        assert row["dict"] == {"normal": 0.25, "3": 4} and f"{row['torch']:.5f}" in run.log
    assert "‖weights‖" in run.log
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for tag, values in (("torch", [row["torch"] for row in run.rows]), ("dict/3", [4, 4])):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(values)
    return {key: run.last["row"][key] for key in run.rows[-1]} == run.rows[-1]


ROW = Edit("""
@@ search.py
 import torch
+import numpy as np
 from torch.nn.utils import clip_grad_norm_
@@ search.py
+            row["numpy"] = np.float64(0.5)
+            row["torch"] = net.classifier.weight.detach().norm()
+            row["array"] = np.arange(3)
+            row["dict"] = {"normal": torch.tensor(0.25), 3: np.int64(4)}
             row["changed"] = len(genotypes.changed_pairs(before, net.genotype()))
@@ search.py
     return {
+        "‖weights‖": "{torch:.5f}",
         "lr": "{learning_rate:.4f}", "train loss": "{train_loss:.3f}",
""", has_its_values_in_the_row)


def has_averaged(run):
    average = run.last["average"]
    for key, value in run.weights.items():
        if key.endswith("weight"):
            mean = (run.before["weights"][key] + value) / 2
            torch.testing.assert_close(average[f"module.{key}"], mean)
    return average["n_averaged"] == 2


AVERAGE = Edit("""
@@ train.py
     epoch, best, row = 0, -1.0, {}
+    average = torch.optim.swa_utils.AveragedModel(net)
@@ train.py
         checkpoints.load_optimizer(optimizer, checkpoint["optimizer"], run.log)
+        average.load_state_dict(checkpoint["average"])
@@ train.py
             row.update(train_epoch(parallel, batches, optimizer, run, graphs_enabled))
+            average.update_parameters(net)
@@ train.py
         run.save_checkpoint(
+            average=average.state_dict(),
""", has_averaged)

SELDOM = Edit("""
@@ search.py
-            elif not args.one_stage and (args.recover_every == "epoch" or trained == args.epochs):
+            elif trained % 2 == 0:
""", lambda run: ["distance" in row for row in run.rows] == [False, True])  # after a recovery

BLACK = Edit("""
@@ data.py
-    world_size=1, cutout_length=0,
+    world_size=1, cutout_length=0, erase=0.0,
 ):
@@ data.py
     x = normalize(x, mean, std, memory_format)
+    if erase:
+        x *= torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) >= erase
@@ harness/flags.py
     group = parser.add_argument_group("network")
+    group.add_argument("--erase", type=float, default=0.0, help="fraction of black images")
@@ train.py
-    batches = train.batches(args.batch_size, train=True, cutout_length=cutout_length, **options)
+    options["erase"] = args.erase
+    batches = train.batches(args.batch_size, train=True, cutout_length=cutout_length, **options)
""", lambda run: torch.equal(  # black images give no gradient
    run.before["weights"]["stem.0.weight"], run.weights["stem.0.weight"]), ("--erase", 1))

SIGNS = Edit("""
@@ model_search.py
 DICTIONARIES = {"uniform": uniform, "normal": normal}
+DICTIONARIES["signs"] = lambda m, n: normal(m, n).sign()
""", lambda run: all((A.abs() == 1).all() for key, A in run.weights.items() if "_code.A" in key),
    ("--dictionary", "signs"))



def has_last_pairs(run):
    for code in ("normal_code", "reduce_code"):
        for j, chosen in enumerate(run.weights[f"{code}.S"]):
            nonzero = run.weights[f"{code}.z{j}"].nonzero().flatten()
            assert torch.equal(chosen, nonzero[-2:])
    return True


RULE = Edit("""
@@ model_search.py
-            magnitude = np.abs(z)
+            magnitude = (z != 0) * np.arange(1, len(z) + 1)  # choose the last nonzero pairs
""", has_last_pairs)


@pytest.mark.parametrize(("command", "edits"), [
    pytest.param(TWO_STAGE, [optimizer_of_search("AdamW"), ROW, LOSS], id="AdamW, row, loss"),
    pytest.param(TWO_STAGE, [optimizer_of_search("RMSprop"), TERM, SIGNS, RULE],
                 id="RMSprop, term, dictionary, rule"),
    pytest.param(TRAIN, [optimizer_of_training("AdamW"), AVERAGE, LOSS], id="AdamW, average, loss"),
    pytest.param(TRAIN, [optimizer_of_training("RMSprop"), BLACK, MIXUP],
                 id="RMSprop, augmentation, mixup"),
])
def test_edited_runs_show_the_effect_and_resume(command, edits, tmp_path):
    script, *flags = command
    sources = edited(tmp_path, *(edit.patch for edit in edits))
    run = Run(sources, script, *flags, *(flag for edit in edits for flag in edit.flags))
    for edit in edits:
        assert edit.effect(run)


# ------------------------------------------------------------------------------------------------
# Edits of runs with CUDA graphs
# ------------------------------------------------------------------------------------------------

SMOOTHING = Edit("""
@@ train.py
         epoch += 1
+        args.label_smoothing = 0.3 * epoch / args.epochs
""", lambda run: run.last["args"]["label_smoothing"] == 0.3)


SCHEDULER = Edit("""
@@ train.py
-        utils.set_learning_rate(optimizer, factor)
@@ train.py
     checkpoints.record_hyperparameters(optimizer)
+    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
@@ train.py
         checkpoints.load_optimizer(optimizer, checkpoint["optimizer"], run.log)
+        scheduler.load_state_dict(checkpoint["scheduler"])
@@ train.py
             row["best_accuracy"] = best
+            row["rate"] = float(optimizer.param_groups[0]["lr"])
@@ train.py
         about = describe_network(run, train, row)
+        scheduler.step()
@@ train.py
         run.save_checkpoint(
+            scheduler=scheduler.state_dict(),
""", lambda run: [row["rate"] for row in run.rows] == pytest.approx([0.025, 0.0125]))

UNROLLED = Edit("""
@@ search.py
-def arch_step(net, x, y, weight_optimizer, arch_optimizer, args):
+def arch_step(net, x, y, x_train, y_train, weight_optimizer, arch_optimizer, args):
@@ search.py
-    with utils.no_gradients_of(weight_optimizer):
-        with speedups.autocast(net, x.device, args.amp):
-            logits, logits_aux = net(x)
-        loss, total = utils.criterion(logits, logits_aux, y, args)
-        arch_optimizer.zero_grad()
-        total.backward()
+    weights = {name: p for name, p in net.named_parameters() if "_code." not in name}
+    loss, _ = utils.criterion(net(x_train)[0], None, y_train, args)
+    grads = torch.autograd.grad(loss, weights.values(), create_graph=True, allow_unused=True)
+    weights = {name: p if g is None else p - 0.1 * g
+               for (name, p), g in zip(weights.items(), grads, strict=True)}
+    logits, _ = torch.func.functional_call(net, weights, (x,))
+    loss, _ = utils.criterion(logits, None, y, args)
+    arch_optimizer.zero_grad()
+    loss.backward(inputs=net.arch_parameters())
@@ search.py
-            arch_step, module, x_arch, y_arch, weight_optimizer, arch_optimizer, args
+            arch_step, module, x_arch, y_arch, x, y, weight_optimizer, arch_optimizer, args
""", lambda run: True, ("--train_portion", 0.7))

CAPTURES = """
@@ harness/cuda_graphs.py
         leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
+        print("capture of", self.step.__name__)
"""
NULL_GPU = pytest.param(GPU, id="null GPU", marks=[pytest.mark.cuda, needs_null_gpu])


@pytest.mark.parametrize("launcher", [pytest.param((), id="CPU"), NULL_GPU])
@pytest.mark.parametrize(("command", "edits"), [
    pytest.param([*TRAIN, "--drop_path_prob", 0], [SMOOTHING, SCHEDULER],
                 id="label smoothing, scheduler"),
    pytest.param(TWO_STAGE, [UNROLLED, SELDOM], id="unrolled gradient, recovery times"),
])
def test_edited_runs_show_the_effect_with_graphs(command, edits, launcher, tmp_path):
    script, *flags = [*command, "--batch_size", 160, *(f for edit in edits for f in edit.flags)]
    sources = edited(tmp_path, *(edit.patch for edit in edits), CAPTURES)
    run = Run(sources, script, *flags, launcher=launcher)
    for edit in edits:
        assert edit.effect(run)
    if not launcher:
        return
    steps = re.findall(r"capture of (\w+)", run.log)
    assert steps and all(steps.count(step) == 2 for step in steps), "not one per epoch"
    assert "captured" not in run.log
    finish(sources / script, "--epochs", 2, *flags, "--no-cuda_graphs", "--save", "eager",
           cwd=tmp_path, launcher=launcher)
    assert rows(tmp_path / "eager/metrics.jsonl") == run.rows


EACH_STEP = """
@@ train.py
         loss, logits = graphs.run(train_step, net, x, y, optimizer, run.args)
+        {}
"""
LOSS_OF_STEP = """
@@ utils.py
     if logits_aux is None:
-        return loss, loss
+        return loss, {}
"""


@pytest.mark.parametrize("patch, captures, same, line", [
    pytest.param(EACH_STEP.format('optimizer.param_groups[0]["momentum"] *= 0.9'), 0, True,
                 "momentum of group 0 of SGD", id="a momentum of each step"),
    pytest.param(LOSS_OF_STEP.format("loss * random.random()"), 2, False, None,
                 id="a random number"),
    pytest.param(LOSS_OF_STEP.format("loss * (loss.item() < 100)"), 2, True,
                 "train_step cannot be captured", id="a host synchronization"),
    pytest.param("""
@@ train.py
     optimizer.step()
+    x.mul_(2)
     return loss.detach(), logits.detach()
""", 2, True, "it writes into a tensor that it is given", id="a write into an input"),
    pytest.param("""
@@ train.py
     parallel = distributed.data_parallel(net, [*net.parameters()], static=True)
+    net.stem.register_forward_hook(lambda *_: print("fired"))
""", 0, True, "modules of the network have hooks", id="hooks"),
])
@pytest.mark.cuda
@needs_null_gpu
def test_edited_steps_are_captured_or_run_eagerly(patch, captures, same, line, tmp_path):
    sources = edited(tmp_path, patch, CAPTURES)
    flags = [*TRAIN[1:], "--no-auxiliary", "--batch_size", 160, "--epochs", 2,
             "--drop_path_prob", 0]
    for name, more in ("eager", ["--no-cuda_graphs"]), ("graphs", []):
        done = finish(sources / "train.py", *flags, *more, "--save", name, cwd=tmp_path,
                      launcher=GPU)
    assert done.stdout.count("capture of") == captures
    words = " ".join(done.stdout.split())
    assert words.count("warning") == (line is not None) and (line or "") in words
    assert done.stdout.count("fired") in (0, 2 * (9 + 1))  # batches of training and of tests
    eager, graphs = (rows(tmp_path / name / "metrics.jsonl") for name in ("eager", "graphs"))
    assert (eager == graphs) == same


def test_edited_optimizer_numbers_replace_those_of_the_checkpoint(tmp_path):
    script, *flags = TWO_STAGE
    finish(ROOT / script, *flags, "--epochs", 1, "--save", "run", cwd=tmp_path)
    sources = edited(tmp_path, """
@@ utils.py
-        parameters, args.learning_rate, args.momentum, weight_decay=args.weight_decay, fused=True
+        parameters, 0.05, 0.8, weight_decay=args.weight_decay, fused=True
@@ search.py
-        net.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999),
+        net.arch_parameters(), args.arch_learning_rate, betas=(0.9, 0.999), eps=1e-6,
""")
    resumed = finish(sources / script, "--resume", "run", "--epochs", 2, cwd=tmp_path).stdout
    for change in ("SGD: lr is now 0.05", "SGD: momentum is now 0.8",
                   "Adam: betas is now (0.9, 0.999)", "Adam: eps is now 1e-06"):
        assert resumed.count(change) == 1
    assert resumed.count("because the source code has changed") == 4
    last = saved(tmp_path / "run/checkpoint.pt")
    sgd, adam = (last[name]["param_groups"][0] for name in ("weight_optimizer", "arch_optimizer"))
    assert sgd["momentum"] == 0.8 and adam["betas"] == (0.9, 0.999) and adam["eps"] == 1e-6
    assert sgd["initial_lr"] == 0.05 and sgd["lr"] == pytest.approx(0.05 * 1.01 / 2)
    again = finish(sources / script, "--resume", "run", "--epochs", 3, cwd=tmp_path).stdout
    assert "because the source code has changed" not in again


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_an_optimizer_of_another_class_starts_without_a_state(name, tmp_path):
    script, *flags = TWO_STAGE
    finish(ROOT / script, *flags, "--epochs", 1, "--save", "run", cwd=tmp_path)
    sources = edited(tmp_path, optimizer_of_search(name).patch)
    resumed = finish(sources / script, "--resume", "run", "--epochs", 2, cwd=tmp_path).stdout
    assert f"the optimizer is now {name} instead of SGD" in resumed
    again = finish(sources / script, "--resume", "run", "--epochs", 3, cwd=tmp_path).stdout
    assert "the optimizer is now" not in again


# ------------------------------------------------------------------------------------------------
# Nodes, primitives, rules, data, pictures
# ------------------------------------------------------------------------------------------------


def test_other_nodes_and_primitives(tmp_path):
    sources = edited(tmp_path, """
@@ genotypes.py
 PRIMITIVES = [
-    "max_pool_3x3",
-    "avg_pool_3x3",
@@ genotypes.py
-NODES = 4  # intermediate nodes of a cell; nodes 0 and 1 are its inputs
+NODES = 5
""")
    run = Run(sources, *TWO_STAGE, pictures=True)
    assert run.weights["normal_code.z4"].shape == (5 * 6,)
    assert "could be drawn" not in run.log and (run.folder / "cells.png").exists()
    genotype = json.loads((run.folder / "genotype.json").read_text())
    assert len(genotype["normal"]) == 10
    assert not any("pool" in name for name, _ in genotype["normal"])
    finish(sources / "train.py", *TRAIN[1:], "--arch", "run", "--epochs", 1, "--save", "trained",
           cwd=tmp_path)
    refused = finish(ROOT / "search.py", "--resume", "run", cwd=tmp_path, status=2)
    assert "other operations" in refused.stderr


def test_a_data_set_can_be_added(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (150, 3, 8, 8), np.uint8), np.arange(150) % 2
    np.savez(tmp_path / "mine.npz", x=x // (1 + y[:, None, None, None]), y=y, names=["cat", "dog"])
    sources = edited(tmp_path, """
@@ data.py
+def _load_mine(root, **_):
+    x, y, names = np.load(f"{root}/mine.npz").values()
+    return (x[:100].astype(np.uint8), y[:100]), (x[100:].astype(np.uint8), y[100:]), names
+
+
 DATASETS = {
+    "mine": _load_mine,
""")
    mine = ["--dataset", "mine", "--data", tmp_path, "--batch_size", 25]
    run = Run(sources, *TWO_STAGE, *mine)
    assert f"--dataset mine --data {tmp_path}" in " ".join(run.log.split())
    finish(sources / "train.py", *TRAIN[1:], *mine, "--arch", "run", "--epochs", 1, "--save",
           "trained", cwd=tmp_path)
    done = finish(sources / "train.py", "--evaluate", "--weights", "trained/network.pt",
                  cwd=tmp_path)
    (row,) = rows(tmp_path / "trained/metrics.jsonl")
    (loss,) = re.findall(r"loss (\S+), on 50 images of mine", done.stdout)
    assert float(loss) == pytest.approx(row["test_loss"], abs=1e-3)
    assert saved(tmp_path / "trained/network.pt")["about"]["classes"] == ["cat", "dog"]


def test_a_failing_picture_does_not_end_the_run(tmp_path):
    sources = edited(tmp_path, "\n@@ visualize.py\n def look(operation):\n+    1 / 0\n")
    script, *flags = TWO_STAGE
    done = finish(sources / script, *flags, "--epochs", 2, cwd=tmp_path, pictures=True)
    assert done.stdout.count("no pictures could be drawn (ZeroDivisionError") == 1
    assert "python train.py --arch" in done.stdout and not done.stderr


def test_a_failing_edit_prints_a_traceback(tmp_path):
    sources = edited(tmp_path, "\n@@ utils.py\n def cosine(epoch, epochs, low):\n+    {}[epoch]\n")
    script, *flags = TRAIN
    done = finish(sources / script, *flags, cwd=tmp_path, status=1)
    assert "Traceback" in done.stderr and "{}[epoch]" in done.stderr


def test_device_options_of_an_optimizer_are_not_loaded():
    layer = nn.Linear(2, 2)
    old = torch.optim.AdamW(layer.parameters(), 0.1, betas=(0.5, 0.6), fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    old.step()
    new = torch.optim.AdamW(layer.parameters(), 0.3, foreach=False)
    checkpoints.load_optimizer(new, old.state_dict())
    (group,) = new.param_groups
    assert (group["lr"], group["betas"], len(new.state)) == (0.1, (0.5, 0.6), 2)
    assert (group["fused"], group["foreach"], group["capturable"]) == (None, False, False)


def test_an_optimizer_loads_a_checkpoint_without_its_newer_options_and_some_momenta():
    layer, args = nn.Linear(2, 2), search.get_args_parser().parse_args([])
    state = utils.sgd(layer.parameters(), args).state_dict()
    state["state"].pop(1)
    for name in ("dampening", "nesterov", "maximize", "differentiable"):
        state["param_groups"][0].pop(name)
    optimizer = utils.sgd(layer.parameters(), args)
    checkpoints.load_optimizer(optimizer, state)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in layer.parameters())


def test_edited_operations_have_the_same_accuracy_in_all_uses(tmp_path):
    """Compare training, `--evaluate` and ONNX."""
    sources = edited(tmp_path, """
@@ genotypes.py
     "dil_conv_5x5",
+    "sep_conv_7x7",
 ]
@@ operations.py
 OPS = {
+    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, 7, stride, affine),
@@ operations.py
-            ReLU(),
+            nn.SiLU(),
             Conv2d(C, C, kernel_size, stride, padding, dilation=2, groups=C, bias=False),
-            Conv2d(C, C, 1, bias=False),
-            BatchNorm2d(C, affine=affine),
+            Conv2d(C, C, 1),
+            nn.GroupNorm(1, C),
@@ operations.py
-        even, odd = diagonals(self.relu(x))                           # (B, C_in, H/2, W/2)
+        even, odd = diagonals(self.relu(x).sigmoid())
""")
    normal = 4 * [("sep_conv_7x7", 0), ("dil_conv_3x3", 1)]
    reduce = 4 * [("skip_connect", 0), ("sep_conv_5x5", 1)]
    arch = str(Genotype(normal, [2, 3, 4, 5], reduce, [2, 3, 4, 5]))
    finish(sources / "train.py", *TRAIN[1:], "--arch", arch, "--batch_size", 120, "--epochs", 1,
           "--save", "run", cwd=tmp_path)
    (row,) = rows(tmp_path / "run/metrics.jsonl")
    done = finish(sources / "train.py", "--evaluate", "--weights", "run/network.pt", cwd=tmp_path)
    (numbers,) = re.findall(r"test accuracy (\S+) %.*, loss (\S+),", done.stdout)
    # Rounding depends on the batch size and the library. It may change the class of an image.
    same_accuracy = pytest.approx(row["test_accuracy"], abs=0.5)
    assert [*map(float, numbers)] == [same_accuracy, pytest.approx(row["test_loss"], abs=1e-3)]

    export = sources / "tools/export.py"
    finish(export, "--weights", "run/network.pt", cwd=tmp_path, pictures=True)
    session = onnxruntime.InferenceSession(tmp_path / "run/network.onnx")
    _, test = data.load("digits", "", 8)
    logits = torch.tensor(session.run(None, {"images": test.images.numpy()})[0])
    assert 100 * (logits.argmax(1) == test.labels).double().mean().item() == same_accuracy
