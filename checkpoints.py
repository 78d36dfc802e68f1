"""Files of torch.save: checkpoints of runs, and network weights of all origins.

They are written whole or not at all, and no code in them is run. What they hold is described here,
once, and checked whenever one is read.
"""

import contextlib
import io
import json
import os
import shutil
import zipfile

import torch
from torch import Tensor

import arguments
import genotypes
from utils import UserError, is_out_of_memory, replacing

# ------------------------------------------------------------------------------------------------
# What the files hold
# ------------------------------------------------------------------------------------------------

# A form says what a value may be: a type; None; MISSING, for what older files lack; a function of
# the value; a tuple of forms, one of which must do; [form], a list of any length; or a dict of the
# forms of certain keys, or of all keys of a type.
MISSING = object()


def count(value, least=1):
    """Whether this is a whole number from 1, or another one."""
    return type(value) is int and least <= value < 2**31


def plain(value):
    """Whether JSON can hold this."""
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def weight(value):
    """Whether this is a tensor that a network could hold."""
    is_real = isinstance(value, Tensor) and not value.is_complex()
    return is_real and bool(value.isfinite().all())


def of_channels(value):
    """Whether this is a list of a number in [0, 1] for each of the 3 channels."""
    is_three = isinstance(value, list) and [type(x) for x in value] == 3 * [float]
    return is_three and all(0 <= x <= 1 for x in value)


OPTIMIZER = {"state": {int: {str: (None, weight)}}, "param_groups": [{"params": [int]}]}
RUN = {  # what the checkpoints of both scripts hold
    "args": {str: plain},
    "epoch": count,
    "row": {"epoch": count, "restless": (MISSING, lambda n: count(n, 0)), str: plain},
    "random": [{
        "python": list, "numpy": list, "torch": Tensor, "cuda": (None, Tensor), "data": Tensor,
    }],
    "primitives": (MISSING, [str]),
}
NETWORK = {  # what a network.pt holds
    "config": {
        "imagenet": bool, "C": count, "num_classes": count, "layers": count, "auxiliary": bool,
        "one_stage": bool, "genotype": {key: list for key in genotypes.Genotype._fields},
        str: lambda value: False,  # and nothing else
    },
    "weights": {str: weight},
    "args": {"dataset": arguments.DATASETS.__contains__, "data": str, "image_size": count},
    "about": (MISSING, {
        "classes": (MISSING, [str]), "mean": (MISSING, of_channels),
        "std": (MISSING, of_channels), "image_size": (MISSING, count), str: plain,
    }),
}
CHECKPOINTS = {
    "search": {
        **RUN, "args": {"proj_dims": count, "sparseness": count, "lam": float, str: plain},
        "schedule_start": (None, int), "net": {str: weight}, "weight_optimizer": OPTIMIZER,
        "arch_optimizer": OPTIMIZER,
    },
    "train": {
        **RUN, **NETWORK, "args": {**NETWORK["args"], str: plain}, "optimizer": OPTIMIZER,
        "best": lambda x: type(x) in (int, float) and 0 <= x <= 100,
    },
}
MEMORY = {  # what an optimizer remembers of a parameter
    torch.optim.SGD: {"momentum_buffer": Tensor},
    torch.optim.Adam: {
        "step": lambda t: weight(t) and bool((t > 0).all()), "exp_avg": Tensor,
        "exp_avg_sq": Tensor,
    },
}


def departure(value, form, name):
    """In what a value, of this name, departs from a form; None if in nothing."""
    if isinstance(form, tuple):
        found = [departure(value, one, name) for one in form]
        return None if None in found else found[-1]
    if value is MISSING or form is MISSING:
        return None if value is form else f"{name} is missing"
    if isinstance(form, dict) and isinstance(value, dict):
        parts = [(value.get(key, MISSING), one, f"{name} {key}".strip())
                 for key, one in form.items() if not isinstance(key, type)]
        for kind in filter(lambda key: isinstance(key, type), form):
            if strange := [key for key in value if type(key) is not kind]:
                return f"{name} has the key {strange[0]!r:.40}"
            parts += [(value[key], form[kind], f"{name} {key}") for key in value if key not in form]
    elif isinstance(form, list) and isinstance(value, list):
        parts = [(one, tuple(form), f"{name} {k}") for k, one in enumerate(value)]
        if not value:
            return f"{name} is empty"
    else:
        if isinstance(form, type):  # True is an int to Python
            fits = isinstance(value, form) and (form is bool) == isinstance(value, bool)
        else:
            fits = value is None if form is None else callable(form) and form(value)
        return None if fits else f"{name} cannot be {_short(value)}"
    return next(filter(None, (departure(*part) for part in parts)), None)


def _short(value):
    if isinstance(value, Tensor):
        bad = "" if weight(value) else " that holds NaN, infinite or complex numbers"
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}{bad}"
    text = repr(value)
    return f"a {type(value).__name__}" if len(text) > 40 else text


@contextlib.contextmanager
def taking(path):
    """Say that a file is damaged where what it holds is not what it is taken for."""
    try:
        yield
    except (
        RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError
    ) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:200] + " is missing" * isinstance(error, KeyError)
        raise UserError(f"{path} is damaged: {text}") from None


def check(state, form, path):
    """Raise UserError unless a file's content is of a form."""
    with taking(path):
        if found := departure(state, form, ""):
            raise ValueError(found.strip())


# ------------------------------------------------------------------------------------------------
# Writing and reading
# ------------------------------------------------------------------------------------------------


def save(path, state, keep_last=False):
    """Write a file such that a whole one exists at every moment.

    Parameters
    ----------
    path : str
    state : dict
        Of tensors, numbers, strings, lists and dicts.
    keep_last : bool
        Whether the file that was there stays, as `previous(path)`.

    Raises
    ------
    utils.UserError
        If it cannot be written.
    """
    buffer = io.BytesIO()  # torch.save's own writer does not tell a full disk from a bug
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())
        if keep_last and os.path.exists(path):
            _link(path, previous(path))


def _link(path, other):
    partial = f"{other}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.remove(partial)
    try:
        os.link(path, partial)
        os.replace(partial, other)
    except OSError:  # a file system without links
        with replacing(other) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)


def previous(path):
    """Name of the checkpoint that was written before the one at `path`."""
    stem, extension = os.path.splitext(path)
    return f"{stem}-previous{extension}"


def load(path):
    """Read a file of torch.save, of which no code is run (weights_only).

    Raises
    ------
    UserError
        If it cannot be read, or is damaged; names an older checkpoint beside it that is whole.
    """
    try:
        return _load_whole(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # zip, pickle and torch each have errors of their own for damage
        message = f"{path} is damaged, or not a file of network weights"
    with contextlib.suppress(Exception):
        _load_whole(previous(path))
        message += f"; {previous(path)}, of the epoch before, is whole: copy it over this one"
    raise UserError(message)


def _load_whole(path):
    # torch.load does not look at the checksums that torch.save has written.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("damaged")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict):  # of older runs
        if {"network", "model"} <= state.keys():
            state["config"], state["weights"] = state.pop("network"), state.pop("model")
        if isinstance(state.get("random"), dict):  # of before there could be several ranks
            state["random"] = [state["random"]]
    return state


# ------------------------------------------------------------------------------------------------
# Checkpoints of runs
# ------------------------------------------------------------------------------------------------


def load_run(path, kind):
    """Read the checkpoint of a run of a kind, "search" or "train".

    Raises
    ------
    UserError
        If it is none, or is damaged.
    """
    state = load(path)
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise UserError(f"{path} is not a checkpoint of a {kind} run; search.py resumes searches, "
                        "and train.py trainings")
    check(state, CHECKPOINTS[kind], path)
    if state["row"]["epoch"] != state["epoch"]:
        raise UserError(f"{path} is damaged: its row is not that of epoch {state['epoch']}")
    arguments.check_saved(kind, state["args"], path)
    if kind == "train":
        check_config(state, path)
        return state

    args, start = state["args"], state["schedule_start"]
    with taking(path):
        found = shape_of(state["net"])
        for flag, key in (("init_channels", "C"), ("layers", "layers")):
            if args.get(flag, found[key]) != found[key]:
                raise ValueError(f"--{flag} is {args[flag]}, but the weights have {found[key]}")
        frozen = torch.cat([state["net"][f"{cell}_code.frozen"] for cell in ("normal", "reduce")])
        if args.get("one_stage"):
            is_right = (start is not None) == bool(frozen.all())
            is_right = is_right and (start is None or 1 <= start <= state["epoch"])
        else:
            is_right = start == 0 and not frozen.any()
        if not is_right:
            raise ValueError(f"schedule_start cannot be {start}")
        here, then = genotypes.PRIMITIVES, state.get("primitives")
        if then is None:  # an older run
            then = here if state["net"]["normal_code.A0"].shape[1] == 2 * len(here) else "others"
        if then != here:
            raise UserError(
                f"{path} is of a search among other operations than genotypes.PRIMITIVES lists "
                "now: have it list those of the run, or start a new search"
            )
    return state


def check_origin(path, args, free):
    """Raise UserError where a checkpoint is not of the run whose config.json lies beside it.

    Parameters
    ----------
    path : str
        Of the checkpoint.
    args : dict
        The flags in it. --epochs may have grown, and more ranks have a smaller --batch_size.
    free : set of str
        Flags that may be given anew.
    """
    config = os.path.join(os.path.dirname(path), "config.json")
    try:
        with open(config, encoding="utf-8") as file:
            begun = dict(json.load(file))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{config} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UserError(f"{config} is damaged: without it, the run could be resumed") from None
    for name in begun.keys() - free - {"save", "epochs", "batch_size"}:
        if name not in args or args[name] != begun[name]:
            raise UserError(
                f"{path} is not of the run in this folder, or is damaged: --{name} is "
                f"{args.get(name, 'missing')} in it, and {begun[name]} in config.json"
            )


def load_supernet(net, weights, path):
    """Load the weights in the checkpoint of a search into its supernet.

    Raises
    ------
    UserError
        If they do not fit.
    """
    with taking(path):
        then, now = len(weights["classifier.weight"]), len(net.classifier.weight)
        if then != now:
            raise UserError(f"the run in {path} tells {then} classes apart, but the data has {now}")
        net.prune_like(weights)
        _check_like(weights, net.state_dict(), "net")
        net.load_state_dict(weights)
        for code in net.codes:
            if code.choose([z.numpy() for z in code.z])[0] != code.support:
                raise ValueError("the support is not that of the codes")


def load_optimizer(optimizer, state, complete=True):
    """Load what an optimizer remembers; learning rate and the like are those of the flags.

    Parameters
    ----------
    optimizer : torch.optim.SGD or torch.optim.Adam
    state : dict
        What its state_dict was.
    complete : bool
        Whether it has updated all of its parameters: operations that never ran it has not.

    Raises
    ------
    ValueError
        If that is of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in state["param_groups"]]:
        raise ValueError("the optimizer had other parameters")
    parameters = dict(enumerate(p for g in optimizer.param_groups for p in g["params"]))
    remembers = optimizer.defaults.get("momentum", 1)  # without momentum SGD does not
    memories = state["state"] if remembers else {}
    if remembers and (lost := {*(parameters if complete else [0])} - memories.keys()):
        raise ValueError(f"the optimizer's state {min(lost)} is missing")
    for index, memory in memories.items():
        name = f"the optimizer's state {index}"
        found = departure(memory, MEMORY[type(optimizer)], name)
        if found or index not in parameters:
            raise ValueError(found or f"the optimizer has no parameter {index}")
        like = {**dict.fromkeys(memory, parameters[index]), "step": torch.ones(())}
        _check_like(memory, like, name)
    optimizer.load_state_dict({"state": memories, "param_groups": groups})


def _check_like(tensors, others, name):
    """Raise ValueError where a tensor is not of the shape and type of its namesake."""
    for key in tensors.keys() & others.keys():
        if (tensors[key].shape, tensors[key].dtype) != (others[key].shape, others[key].dtype):
            raise ValueError(f"{name} {key} cannot be {_short(tensors[key])}")


# ------------------------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------------------------


def check_config(state, path):
    """Raise UserError unless a network's config is that of its weights, and can be built here."""
    with taking(path):
        for key, value in shape_of(state["weights"]).items():
            if state["config"][key] != value:
                raise ValueError(f"{key} is {state['config'][key]}, but the weights have {value}")
        classes = state.get("about", {}).get("classes")
        if classes and len(classes) != state["config"]["num_classes"]:
            raise ValueError(f"it names {len(classes)} classes")
        try:
            genotypes.from_lists(state["config"]["genotype"])
        except UserError as error:  # an operation, say, that is not here
            raise UserError(f"{path}: {error}") from None


def read_weights(path):
    """Read network weights from a network.pt, a checkpoint.pt or a plain state dict.

    Returns
    -------
    dict
        `weights`: the state dict; `config`: what `model.from_config` needs, without genotype where
        the file does not know it; `args`: arguments of the run, or none.

    Raises
    ------
    UserError
        If the file is damaged or holds something else.
    """
    state = load(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no network weights")
    if state.get("kind") == "search":
        raise UserError(
            f"{path} is the checkpoint of a search, whose supernet is not for evaluation: give "
            "the network.pt of a finished one-stage search, or train its genotype.json"
        )
    if len({"config", "weights", "args", "about", "kind"} & state.keys()) > 1:  # one of ours
        check(state, NETWORK, path)
        check_config(state, path)
        return state
    try:
        weights = {
            name.removeprefix("module."): value  # the name DataParallel gives it
            for name, value in state.get("state_dict", state).items()
        }
        config = shape_of(weights)
        about = {"dataset": "imagenet"} if config["imagenet"] else {}
        return {"weights": weights, "config": config, "args": about}
    except (LookupError, AttributeError, TypeError, ValueError):
        raise UserError(f"{path} holds no weights of a DARTS network") from None


def load_weights(net, weights, path):
    """Load a state dict into a network; an auxiliary head that only one of them has is left out.

    Raises
    ------
    UserError
        If the weights are those of another network.
    """
    if not net.auxiliary:
        weights = {k: v for k, v in weights.items() if not k.startswith("auxiliary_head.")}
    with taking(path):
        for key, own in net.state_dict().items():
            value = weights.get(key, own)
            if not weight(value) or value.is_floating_point() != own.is_floating_point():
                raise ValueError(f"{key} cannot be {_short(value)}")
    try:
        missing, unexpected = net.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes that differ
        missing, unexpected = [], [" ".join(str(error).splitlines()[1:2]).strip()]
    missing = [k for k in missing if not k.startswith("auxiliary_head.")]
    if missing or unexpected:
        what = f"it has no {missing[0]}" if missing else f"it has {unexpected[0]}"
        raise UserError(
            f"{path} does not fit the network: {what}; give the --arch that it was trained with, "
            "and --one_stage or --no-one_stage"
        )


def shape_of(weights):
    """What a plain state dict says of its network: all of its `config` but the genotype.

    Raises
    ------
    KeyError, ValueError, ...
        If these are not the weights of such a network.
    """
    cells = {int(key.split(".")[1]) for key in weights if key.startswith("cells.")}
    if not cells:
        raise KeyError("cells")
    imagenet = "stem0.0.weight" in weights
    return dict(
        imagenet=imagenet,
        C=len(weights["stem1.1.weight"]) if imagenet else len(weights["stem.0.weight"]) // 3,
        num_classes=len(weights["classifier.weight"]),
        layers=len(cells),
        auxiliary="auxiliary_head.classifier.weight" in weights,
    )
