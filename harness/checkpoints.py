"""Checkpoints of runs, and network weights of all origins.

Files are replaced atomically, and read with `weights_only`, so that no code in them is executed.
"""

import io
import pickle
import random
import textwrap

import numpy as np
import torch

import genotypes
import utils
from harness import distributed
from utils import UserError, write_file


def save(path, state):
    """Write a file such that a complete one exists at every moment."""
    buffer = io.BytesIO()  # with a path, torch.save would not distinguish a full disk from a bug
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(f"{path} was not written, because it could not be read again: save only "
                        f"tensors, Python numbers, strings, lists and dicts ({error})") from None
    write_file(path, buffer.getbuffer())


def load(path):
    """Read a file of torch.save; UserError if it is damaged or of another kind."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise
    except Exception:  # torch, zip and pickle each have errors of their own for damage
        raise UserError(f"{path} is damaged, or not a file of network weights") from None


def load_run(path, kind):
    """Read the checkpoint of a run; `kind` is "search" or "train"."""
    state = load(path)
    found = state.get("kind") if isinstance(state, dict) else None
    if found not in ("search", "train"):  # for example a network.pt
        raise UserError(f"{path} is not the checkpoint of a run: give the folder of the run")
    if found != kind:
        raise UserError(f"{path} is the checkpoint of a {found} run, which {found}.py resumes")
    if kind == "search" and state["primitives"] != genotypes.PRIMITIVES:  # pools would swap
        raise UserError(
            f"{path} is the checkpoint of a search with other operations than those now in "
            "genotypes.PRIMITIVES, or in another order: restore these, or start a new search"
        )
    return state


# ------------------------------------------------------------------------------------------------
# Optimizers and random generators
# ------------------------------------------------------------------------------------------------

DEVICE_OPTIONS = ("capturable", "fused", "foreach")  # of optimizers; they depend on the device


def record_hyperparameters(*optimizers):
    """Store in each group of optimizers the hyperparameters it was constructed with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["class"] = type(optimizer).__name__
            group["built"] = {
                name: value.item() if isinstance(value, torch.Tensor) else value
                for name, value in group.items()
                if name not in ("params", "class", "built", "initial_lr", *DEVICE_OPTIONS)
            }


def load_optimizer(optimizer, state, log=print):
    """Load an optimizer's state dict, except for `DEVICE_OPTIONS` and edited hyperparameters.

    If the code now constructs the optimizer with another hyperparameter than the saved run did, the
    new one is used, and `log` gets a line. An optimizer of another class keeps its own state.
    """
    now = type(optimizer).__name__
    before = state["param_groups"][0].get("class", now)
    if before != now:
        log(f"the optimizer is now {now} instead of {before}, so it starts without a state")
        return
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        # Options that an old checkpoint lacks keep their values.
        group = {**own, **saved, **{name: own[name] for name in DEVICE_OPTIONS if name in own}}
        if "built" in own:
            group["built"] = own["built"]
            before = saved.get("built", {})
            group.update(changed_hyperparameters(optimizer, before, own["built"], log))
        groups.append(group)
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    if isinstance(optimizer, torch.optim.SGD):
        utils.create_momenta(optimizer)  # old checkpoints lack those of operations that never ran
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = utils.set_number(rate, group["lr"])


def changed_hyperparameters(optimizer, before, now, log):
    """Return and log the hyperparameters of a group that have been edited in the code."""
    changed = {}
    for name in sorted(before.keys() & now.keys()):
        if not is_close(before[name], now[name]):
            log(f"{type(optimizer).__name__}: {name} is now {now[name]} instead of "
                f"{before[name]}, because the source code has changed")
            changed[name] = now[name]
    if "lr" in changed:
        changed["initial_lr"] = changed["lr"]  # which schedules scale
    return changed


def is_close(a, b):
    """Whether two numbers or tuples of numbers are equal to the precision of float32."""
    try:
        return np.allclose(a, b, rtol=1e-6, atol=0)
    except TypeError:  # None, or a string
        return a == b


def random_state(generator):
    """List of the states of all random generators of each rank.

    `generator` is that of the data order and augmentation.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    on_cuda = generator.device.type == "cuda"
    return distributed.gather({
        "python": list(random.getstate()),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(generator.device) if on_cuda else None,
        "data": generator.get_state(),
    })


def set_random_state(states, generator, seed, epoch, log):
    """Restore the states of all random generators.

    Generators of the CPU and of CUDA cannot take each other's states. If the device has changed,
    torch's generators are seeded from the seed of the run and the epoch. Ranks that the saved run
    did not have keep their generators, except for that of the data, which all ranks have in common.
    """
    rank, on_cuda = distributed.rank(), generator.device.type == "cuda"
    state = states[rank] if rank < len(states) else None
    if state:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(state["numpy"]))
    if on_cuda != (states[0]["cuda"] is not None):
        seed = random.Random(f"{seed} {epoch}").getrandbits(62)
        generator.manual_seed(seed)
        torch.manual_seed(seed + rank)
        before = "the CPU" if on_cuda else "CUDA"
        log(f"the run was on {before}, whose random numbers cannot be continued on this device: "
            f"from epoch {epoch + 1} on, other random numbers are used")
        return
    generator.set_state(states[0]["data"])
    if state:
        torch.set_rng_state(state["torch"])
        if on_cuda:
            torch.cuda.set_rng_state(state["cuda"], generator.device)


# ------------------------------------------------------------------------------------------------
# Network weights
# ------------------------------------------------------------------------------------------------


def read_weights(path):
    """Read network weights from a network.pt, a checkpoint.pt or a plain state dict.

    Returns a dict with `weights`, the state dict; `config` for `model.from_config`, without the
    genotype if the file lacks it; `args` of the run; and `about` the training images.
    """
    state = load(path)
    if isinstance(state, dict) and state.get("kind") == "search":
        raise UserError(
            f"{path} is the checkpoint of a search, whose supernet cannot be evaluated: give the "
            "network.pt of a finished one-stage search, or train the genotype.json"
        )
    try:
        if "config" in state:
            return state
        weights = {
            name.removeprefix("module."): value  # the prefix of DataParallel
            for name, value in state.get("state_dict", state).items()
        }
        config = shape_of(weights)
        args = {"dataset": "imagenet"} if config["imagenet"] else {}
        return {"weights": weights, "config": config, "args": args, "about": {}}
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path} holds no weights of a DARTS network") from None


def shape_of(weights):
    """The `config` of a network without its genotype, from a plain state dict."""
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("cells."))
    first = len(weights["cells.0.preprocess1.op.1.weight"])
    return dict(
        imagenet="stem0.0.weight" in weights,
        C=first // 2 if layers < 3 else first,  # with 1 or 2 cells, the first is a reduction cell
        num_classes=len(weights["classifier.weight"]),
        layers=layers,
        auxiliary="auxiliary_head.classifier.weight" in weights,
    )


def load_weights(net, weights, path):
    """Load a state dict into a network, ignoring an auxiliary head that only one of them has."""
    own = net.state_dict()
    heads = {k: v for k, v in own.items() if k.startswith("auxiliary_head.")}
    weights = {k: v for k, v in weights.items() if k in own or not k.startswith("auxiliary_head.")}
    try:
        net.load_state_dict({**heads, **weights})
    except RuntimeError as error:
        what = textwrap.shorten("".join(str(error).splitlines()[1:2]), 200, placeholder=" ...")
        raise UserError(
            f"{path} does not fit the network: {what}; give the --arch that it was trained with, "
            "and --one_stage or --no-one_stage"
        ) from None
