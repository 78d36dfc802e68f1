"""Files of torch.save: checkpoints of runs, and network weights of all origins.

They are written whole or not at all, and no code in them is run.
"""

import contextlib
import io
import os
import shutil
import zipfile

import torch

from utils import UserError, replacing


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
    if isinstance(state, dict) and {"network", "model"} <= state.keys():  # of older runs
        state["config"], state["weights"] = state.pop("network"), state.pop("model")
    return state


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
    if "config" in state and "weights" in state:
        return state
    weights = {
        name.removeprefix("module."): value  # the name DataParallel gives it
        for name, value in state.get("state_dict", state).items()
    }
    try:
        config = shape_of(weights)
        about = {"dataset": "imagenet"} if config["imagenet"] else {}
        return {"weights": weights, "config": config, "args": about}
    except (KeyError, AttributeError, IndexError, ValueError):
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
    KeyError
        If these are not the weights of such a network.
    """
    imagenet = "stem0.0.weight" in weights
    return dict(
        imagenet=imagenet,
        C=len(weights["stem1.1.weight"]) if imagenet else len(weights["stem.0.weight"]) // 3,
        num_classes=len(weights["classifier.weight"]),
        layers=1 + max(int(key.split(".")[1]) for key in weights if key.startswith("cells.")),
        auxiliary="auxiliary_head.classifier.weight" in weights,
    )
