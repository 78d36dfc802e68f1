"""Files of torch.save: checkpoints of runs, and network weights of all origins.

They are written whole or not at all, and no code in them is run. Nothing says what may be in them:
a checkpoint holds what the script gave, and tensors must fit, by torch's own strict loading.
"""

import contextlib
import io
import os
import pickle
import random
import textwrap
import zipfile

import numpy as np
import torch

import genotypes
import utils
from harness import distributed
from utils import UserError, write_file


def save(path, state, keep_last=False):
    """Write a file such that a whole one exists at every moment; UserError where it cannot be.

    With `keep_last`, the file that was there stays, as `previous(path)`.
    """
    buffer = io.BytesIO()  # torch.save's own writer does not tell a full disk from a bug
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(f"{path} was not written, because it could not be read again: save only "
                        f"tensors, numbers, strings, lists and dicts ({error})") from None
    if keep_last and os.path.exists(path):
        with open(path, "rb") as last:
            write_file(previous(path), last.read())
    write_file(path, buffer.getbuffer())


def previous(path):
    """Name of the checkpoint that was written before the one at `path`."""
    stem, extension = os.path.splitext(path)
    return f"{stem}-previous{extension}"


def load(path):
    """Read a file of torch.save; UserError where it is not whole, or no such file."""
    message = f"{path} is damaged, or not a file of network weights"
    try:
        return _load_whole(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # zip, pickle and torch each have errors of their own for damage
        with contextlib.suppress(Exception):
            _load_whole(previous(path))
            message += f"; {previous(path)}, of the epoch before, is whole: copy it over this one"
    raise UserError(message)


def _load_whole(path):
    if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_run(path, kind):
    """Read the checkpoint of a run of a kind, "search" or "train"; UserError if it is none."""
    state = load(path)
    found = state.get("kind") if isinstance(state, dict) else None
    if found not in ("search", "train"):  # a network.pt, say
        raise UserError(f"{path} is not the checkpoint of a run: give the folder of the run")
    if found != kind:
        raise UserError(f"{path} is the checkpoint of a {found} run, which {found}.py resumes")
    if kind == "search" and state["primitives"] != genotypes.PRIMITIVES:  # pools would swap
        raise UserError(
            f"{path} is of a search among other operations than genotypes.PRIMITIVES lists now, or "
            "in another order: have it list those of the run, or start a new search"
        )
    return state


# ------------------------------------------------------------------------------------------------
# Optimizers and random generators
# ------------------------------------------------------------------------------------------------

DEVICE_OPTIONS = ("capturable", "fused", "foreach")  # how an optimizer computes on its device


def record_built_numbers(*optimizers):
    """Store in each group of optimizers the numbers that it was built with: `load_optimizer`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["built"] = {
                name: value.item() if isinstance(value, torch.Tensor) else value
                for name, value in group.items()
                if name not in ("params", "built", *DEVICE_OPTIONS)
            }


def load_optimizer(optimizer, state, log=print):
    """Load an optimizer's state dict: its state and the numbers of its groups.

    The groups keep their `DEVICE_OPTIONS`. A number that the code now builds with another value
    than the saved run did takes the new value, and `log` gets a line.
    """
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group = {**saved, **{name: own[name] for name in DEVICE_OPTIONS if name in own}}
        if "built" in own:
            group["built"] = own["built"]
            group.update(changed_numbers(optimizer, saved.get("built", {}), own["built"], log))
        groups.append(group)
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = utils.set_number(rate, group["lr"])


def changed_numbers(optimizer, before, now, log):
    """Return the numbers that a group is now built with and was not before; log each of them."""
    changed = {}
    for name in sorted(before.keys() & now.keys()):
        if not is_close(before[name], now[name]):
            log(f"{type(optimizer).__name__}: {name} is {now[name]} from here on, and was "
                f"{before[name]}, because the code has changed")
            changed[name] = now[name]
    if "lr" in changed:
        changed["initial_lr"] = changed["lr"]  # which schedules scale
    return changed


def is_close(a, b):
    """Whether two numbers, or tuples of numbers, are equal to the precision of float32."""
    try:
        return np.allclose(a, b, rtol=1e-6, atol=0)
    except TypeError:  # None, or a string
        return a == b


def random_state(generator):
    """States of all random generators, of each rank, as torch.load(weights_only=True) admits them.

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
    """Put all random generators back into the states of `random_state`.

    A generator on CUDA cannot take the state of one on the CPU, nor the reverse: then torch's are
    seeded from the run's seed and the epochs done. Ranks that the saved run did not have keep their
    own generators, but for that of the data, which is common to all.
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
        log(f"the run was on {before}, whose random numbers cannot be continued here: from epoch "
            f"{epoch + 1} on, the order of the images, augmentation and drop-path are drawn anew")
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

    Returns a dict: `weights`, the state dict; `config`, for `model.from_config`, without the
    genotype where the file does not name it; `args` of the run and `about` the data, or nothing.
    UserError if the file is damaged or holds something else.
    """
    state = load(path)
    if isinstance(state, dict) and state.get("kind") == "search":
        raise UserError(
            f"{path} is the checkpoint of a search, whose supernet is not for evaluation: give "
            "the network.pt of a finished one-stage search, or train its genotype.json"
        )
    try:
        if "config" in state:
            return state
        weights = {
            name.removeprefix("module."): value  # the name DataParallel gives it
            for name, value in state.get("state_dict", state).items()
        }
        config = shape_of(weights)
        args = {"dataset": "imagenet"} if config["imagenet"] else {}
        return {"weights": weights, "config": config, "args": args, "about": {}}
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):  # of a tensor
        raise UserError(f"{path} holds no weights of a DARTS network") from None


def shape_of(weights):
    """What a plain state dict says of its network: all of its `config` but the genotype."""
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("cells."))
    first = len(weights["cells.0.preprocess1.op.1.weight"])
    return dict(
        imagenet="stem0.0.weight" in weights,
        C=first // 2 if layers < 3 else first,  # the first of so few cells is a reduction cell
        num_classes=len(weights["classifier.weight"]),
        layers=layers,
        auxiliary="auxiliary_head.classifier.weight" in weights,
    )


def load_weights(net, weights, path):
    """Load a state dict into a network; an auxiliary head that only one of them has is left out.

    UserError if the weights are those of another network.
    """
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
