"""Genotypes: what a search finds and what a retraining starts from.

    python -c "import genotypes; print(genotypes.load('ISTA_twostage')[0])"

A genotype names, for each of the 4 intermediate nodes of a normal and of a reduction cell, the
(operation, input node) pairs whose outputs the node adds up. It travels as a name below, as a
`genotype.json`, or as the text `Genotype(normal=[...], ...)` that DARTS and this project print.
Text is parsed, never executed.
"""

import ast
import json
import os
import random
import re
import warnings
from collections import namedtuple

from utils import UserError, replacing

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

PRIMITIVES = [
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
]

NODES = 4  # intermediate nodes of a cell; nodes 0 and 1 are its inputs
LONGEST_TEXT = 100_000  # characters; a genotype needs about 500


# ------------------------------------------------------------------------------------------------
# Published genotypes (Yang et al., 2020)
# ------------------------------------------------------------------------------------------------

ISTA_twostage = Genotype(
    normal=[
        ("skip_connect", 0), ("dil_conv_3x3", 1),
        ("sep_conv_5x5", 0), ("dil_conv_3x3", 2),
        ("dil_conv_3x3", 1), ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 2), ("skip_connect", 0),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("avg_pool_3x3", 0), ("sep_conv_5x5", 1),
        ("dil_conv_5x5", 2), ("max_pool_3x3", 1),
        ("dil_conv_5x5", 3), ("sep_conv_3x3", 1),
        ("dil_conv_5x5", 4), ("sep_conv_5x5", 1),
    ],
    reduce_concat=range(2, 6),
)

ISTA_onestage = Genotype(
    normal=[
        ("skip_connect", 0), ("dil_conv_3x3", 1),
        ("sep_conv_3x3", 1), ("dil_conv_5x5", 2),
        ("avg_pool_3x3", 3), ("sep_conv_3x3", 1),
        ("sep_conv_5x5", 1), ("sep_conv_3x3", 2),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("avg_pool_3x3", 0), ("max_pool_3x3", 1),
        ("skip_connect", 0), ("max_pool_3x3", 1),
        ("sep_conv_5x5", 1), ("avg_pool_3x3", 0),
        ("max_pool_3x3", 0), ("dil_conv_5x5", 2),
    ],
    reduce_concat=range(2, 6),
)

ISTA_ImageNet = Genotype(
    normal=[
        ("sep_conv_3x3", 1), ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1), ("skip_connect", 2),
        ("sep_conv_3x3", 1), ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1), ("dil_conv_5x5", 4),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("skip_connect", 0), ("sep_conv_3x3", 1),
        ("dil_conv_5x5", 2), ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 0), ("skip_connect", 2),
        ("sep_conv_3x3", 2), ("skip_connect", 3),
    ],
    reduce_concat=range(2, 6),
)

NAMED = {
    "ISTA_twostage": (ISTA_twostage, False),
    "ISTA_onestage": (ISTA_onestage, True),
    "ISTA_ImageNet": (ISTA_ImageNet, False),
}


# ------------------------------------------------------------------------------------------------
# Reading and writing
# ------------------------------------------------------------------------------------------------


def load(spec):
    """Read a genotype from a name, a file or a text.

    Parameters
    ----------
    spec : str or path
        - a published name: `ISTA_twostage`, `ISTA_onestage` or `ISTA_ImageNet`;
        - `random:SEED` for cells drawn uniformly from the search space, `random:SEED:distinct` for
          cells whose nodes have two different input nodes (see `draw`);
        - the path of a `genotype.json`, or of the run folder that holds one. It needs normal,
          normal_concat, reduce and reduce_concat; a file without one_stage is one of two-stage
          search;
        - the printed form `Genotype(normal=[('sep_conv_3x3', 0), ...], ...)`. Everything before
          `Genotype(` is ignored, so a line of a log or of DARTS' `genotypes.py` will do.

    Returns
    -------
    genotype : Genotype
        Pairs as tuples, in the order of the source; concatenated nodes as a range where they are
        contiguous.
    one_stage : bool
        Whether its network has BatchNorm after pools and skips (one-stage search).

    Raises
    ------
    UserError
        With one line that says what is wrong; also when the text is not a genotype of 4 nodes
        over `PRIMITIVES`.
    """
    spec = os.fspath(spec)
    if spec in NAMED:
        return NAMED[spec]
    if spec.startswith("random:"):
        parts = re.fullmatch(r"random:([0-9]{1,9})(:distinct)?", spec)
        if not parts:
            raise UserError(f"{_short(spec)}: expected random:SEED or random:SEED:distinct with a "
                            "whole number, as in random:3")
        return draw(int(parts[1]), distinct_edges=bool(parts[2])), False
    if "Genotype(" in spec:
        return _check(_parse(spec)), False
    if os.path.isdir(spec):
        return _read(os.path.join(spec, "genotype.json"))
    if spec.endswith(".json") or os.path.exists(spec):
        return _read(spec)
    raise UserError(
        f"unknown genotype {_short(spec)}: give one of {', '.join(NAMED)}, random:SEED, "
        "random:SEED:distinct, the path of a genotype.json or of a run folder, or a text "
        "'Genotype(normal=[...], ...)'"
    )


def save(path, genotype, one_stage, **about):
    """Write a genotype as a flat JSON object.

    Parameters
    ----------
    path : str or path
        File to write; it is replaced in one step, so a reader never sees half of it.
    genotype : Genotype
        `genotype.normal` is written as `[[operation, node], ...]`, the concatenated nodes as lists.
    one_stage : bool
        Whether the network of this genotype has BatchNorm after pools and skips.
    **about
        Anything JSON can hold on where it came from (method, seed, data set, accuracy); kept under
        the key `about`.
    """
    record = as_lists(genotype)
    text = json.dumps({**record, "one_stage": bool(one_stage), "about": about}, indent=1)
    # One pair a line is easier to compare by eye than one number a line.
    text = re.sub(r'\[\s+("\w+"),\s+(\d)\s+\]', r"[\1, \2]", text)
    text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


def as_lists(genotype):
    """The genotype as a dict of plain lists, as JSON and checkpoints hold it."""
    pairs = {key: [list(pair) for pair in getattr(genotype, key)] for key in ("normal", "reduce")}
    concats = {key: list(getattr(genotype, key)) for key in ("normal_concat", "reduce_concat")}
    return {**pairs, **concats}


def from_lists(record):
    """The Genotype of a dict as `as_lists` makes it; UserError where it is none."""
    return _check(Genotype(**{key: record[key] for key in Genotype._fields}))


def moved(before, after):
    """The pairs in which a genotype differs from an earlier one, as texts, one for each pair.

    Returns
    -------
    list of str
        Like "normal node 1: skip_connect of node 0 → sep_conv_3x3 of c_{k-1}".
    """
    sources = ["c_{k-2}", "c_{k-1}", *(f"node {j}" for j in range(NODES))]
    texts = []
    for cell in ("normal", "reduce"):
        pairs_before, pairs_after = getattr(before, cell), getattr(after, cell)
        each = len(pairs_after) // NODES
        for node in range(NODES):
            a, b = (pairs[node * each : (node + 1) * each] for pairs in (pairs_before, pairs_after))
            gone, come = ([p for p in x if p not in y] for x, y in ((a, b), (b, a)))
            texts += [
                f"{cell} node {node}: {was} of {sources[old]} → {operation} of {sources[new]}"
                for (was, old), (operation, new) in zip(gone, come, strict=True)
            ]
    return texts


def has_distinct_edges(genotype):
    """Whether the pairs of every node have different input nodes, as all DARTS cells do.

    Where two pairs of a node share an edge, the node adds up two operations on the same input.
    """
    for pairs in (genotype.normal, genotype.reduce):
        per_node = len(pairs) // NODES
        for start in range(0, len(pairs), per_node):
            if len({source for _, source in pairs[start : start + per_node]}) < per_node:
                return False
    return True


def draw(seed, distinct_edges=False):
    """Draw a genotype uniformly from the search space, with 2 pairs a node.

    Parameters
    ----------
    seed : int
        The same seed gives the same genotype on every machine.
    distinct_edges : bool
        Whether to draw among the genotypes whose nodes have two different input nodes. About 6 %
        of all cells are such.

    Returns
    -------
    Genotype
        Of each node its pairs by input node, then by operation.
    """
    rng = random.Random(seed)
    n = len(PRIMITIVES)

    def node_pairs(inputs):
        if distinct_edges:
            return [(rng.choice(PRIMITIVES), k) for k in sorted(rng.sample(range(inputs), 2))]
        return [(PRIMITIVES[k % n], k // n) for k in sorted(rng.sample(range(n * inputs), 2))]

    def cell():
        return [pair for node in range(NODES) for pair in node_pairs(node + 2)]

    return Genotype(cell(), range(2, 2 + NODES), cell(), range(2, 2 + NODES))


def _read(path):
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors put a byte-order mark first
            record = {"one_stage": False, **json.loads(file.read(LONGEST_TEXT))}
        one_stage = record["one_stage"]
        record = {key: record[key] for key in Genotype._fields}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(
            f"{path}: not a genotype.json (damaged, or another kind of file); search.py writes "
            "them, and genotypes.jsonl of the same run folder holds every epoch's"
        ) from None
    if not isinstance(one_stage, bool):
        raise UserError(f"{path}: one_stage must be true or false")
    try:
        return from_lists(record), one_stage
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _parse(text):
    """The Genotype of a printed text, by its syntax tree: nothing in the text is executed."""
    start, end = text.find("Genotype("), text.rfind(")")
    if end - start > LONGEST_TEXT:
        raise UserError("genotype text: far too long to be one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's remarks on the style of the text
            call = ast.parse(text[start : end + 1], mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise UserError(f"malformed genotype text {_short(text)}") from None
    if not isinstance(call, ast.Call) or _name(call) != "Genotype":
        raise UserError(f"malformed genotype text {_short(text)}")
    fields = dict(zip(Genotype._fields, call.args, strict=False))
    fields.update((keyword.arg, keyword.value) for keyword in call.keywords)
    if len(fields) != len(call.args) + len(call.keywords) or set(fields) != set(Genotype._fields):
        raise UserError(f"genotype text must give {', '.join(Genotype._fields)}, each once")
    return Genotype(**{key: _literal(node) for key, node in fields.items()})


def _literal(node):
    """Value of a list, tuple, string, whole number, range(a, b) or np.int64(k)."""
    match node:
        case ast.Constant(value=str() | int() as value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Call(args=[ast.Constant(value=int() as k)], keywords=[]) if re.fullmatch(
            r"int\d+", _name(node)
        ):
            return k
        case ast.Call(
            args=[ast.Constant(value=int() as a), ast.Constant(value=int() as b)], keywords=[]
        ) if _name(node) == "range" and 0 <= a <= b <= 2 + NODES:
            return list(range(a, b))
    raise UserError("malformed genotype text: only lists, tuples, strings, numbers and ranges")


def _name(call):
    """Last part of the name of a called function: int64 of np.int64(0)."""
    function = call.func
    return getattr(function, "attr", None) or getattr(function, "id", "")


def _check(genotype):
    """The genotype with its pairs as tuples, or UserError where it is not one of our cells."""
    cells = {}
    for cell in ("normal", "reduce"):
        pairs, concat = getattr(genotype, cell), getattr(genotype, f"{cell}_concat")
        if not isinstance(pairs, list | tuple) or not pairs or len(pairs) % NODES:
            raise UserError(f"{cell} must list as many pairs for each of the {NODES} nodes")
        for k, pair in enumerate(pairs):
            node = k // (len(pairs) // NODES)
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise UserError(f"{cell}: {_short(pair)} is not an (operation, node) pair")
            operation, source = pair
            if operation not in PRIMITIVES:
                raise UserError(
                    f"{cell}: there is no operation {_short(operation)}; "
                    f"there are {', '.join(PRIMITIVES)}"
                )
            if type(source) is not int or not 0 <= source < node + 2:
                raise UserError(
                    f"{cell}: node {node + 2} cannot take its input from {_short(source)}, "
                    f"only from nodes 0 to {node + 1}"
                )
        if not isinstance(concat, list | tuple | range) or not concat:
            raise UserError(f"{cell}_concat must list nodes")
        concat = list(concat)
        allowed = range(2, 2 + NODES)
        if any(type(n) is not int or n not in allowed for n in concat) or len(set(concat)) < len(
            concat
        ):
            raise UserError(f"{cell}_concat must hold nodes of 2 to {NODES + 1}, each once")
        whole = range(concat[0], concat[-1] + 1)
        cells[cell] = [tuple(pair) for pair in pairs]
        cells[f"{cell}_concat"] = whole if list(whole) == concat else concat
    if len(cells["normal"]) != len(cells["reduce"]):
        raise UserError("normal and reduce must hold the same number of pairs")
    return Genotype(**cells)


def _short(value):
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
