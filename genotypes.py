"""Genotypes, the result of a search and the input of a training.

    python -c "import genotypes; print(genotypes.load('ISTA_twostage')[0])"

A genotype lists the (operation, input node) pairs of each of the 4 intermediate nodes of a normal
and a reduction cell. A node is the sum of the outputs of its pairs. A genotype is given as a name
below, as a `genotype.json`, or as the text `Genotype(normal=[...], ...)` that DARTS and this
project print. Text is parsed, never executed.
"""

import ast
import json
import os
import random
import re
from collections import namedtuple

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
        One of:

        - a published name: `ISTA_twostage`, `ISTA_onestage` or `ISTA_ImageNet`;
        - `random:SEED` or `random:SEED:distinct`, see `draw`;
        - the path of a `genotype.json`, or of a run folder that contains one;
        - the printed form `Genotype(normal=[('sep_conv_3x3', 0), ...], ...)`, or a file that
          contains it. Text before `Genotype(` is ignored, so a line of a log or of DARTS'
          `genotypes.py` can be given.

    Returns
    -------
    genotype : Genotype
        The pairs are in the order of the source.
    one_stage : bool
        Whether the network has a BatchNorm after pools and skips. False if the source does not
        specify it.

    Raises
    ------
    ValueError
        If `spec` is not a genotype. The message is one line.
    OSError
        If a file cannot be read.
    """
    spec = os.fspath(spec)
    if spec in NAMED:
        genotype, one_stage = NAMED[spec]
        return _check(genotype), one_stage
    if spec.startswith("random:"):
        match = re.fullmatch(r"random:([0-9]{1,9})(:distinct)?", spec)
        if not match:
            raise ValueError(f"{_shorten(spec)}: expected random:SEED or random:SEED:distinct with "
                             "a whole number, as in random:3")
        return draw(int(match[1]), distinct_edges=bool(match[2])), False
    if "Genotype(" in spec:
        return _parse(spec), False
    if os.path.isdir(spec):
        spec = os.path.join(spec, "genotype.json")
    if not spec.endswith(".json") and not os.path.exists(spec):
        raise ValueError(
            f"{_shorten(spec)} is no file and no known genotype: give one of {', '.join(NAMED)}, "
            "random:SEED, random:SEED:distinct, the path of a genotype.json or of a run folder, or "
            "a text 'Genotype(normal=[...], ...)'"
        )
    return _read(spec)


def _read(path):
    """Read a genotype and its one_stage from a genotype.json or a text file."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:  # -sig: skip a BOM
        text = file.read()
    try:
        # A genotype.json may contain "Genotype(" as well, in its `about`.
        if "Genotype(" in text and not text.lstrip().startswith("{"):
            return _parse(text), False
        record = json.loads(text)
        return from_lists(record), bool(record.get("one_stage", False))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # Errors of this module are plain ValueErrors; json raises a subclass.
        is_ours = type(error) is ValueError
        reason = error if is_ours else "not a genotype.json (damaged, or another kind of file)"
        raise ValueError(f"{path}: {reason}") from None


def save(path, genotype, one_stage, **about):
    """Write a genotype as a JSON object, atomically.

    Parameters
    ----------
    path : str or path
    genotype : Genotype
    one_stage : bool
        Whether the network has a BatchNorm after pools and skips.
    **about
        Where the genotype comes from, as JSON values. It is stored under the key "about".
    """
    record = {**as_lists(genotype), "one_stage": bool(one_stage), "about": about}
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
    os.replace(partial, path)


def as_lists(genotype):
    """Convert a genotype to a dict of lists, for JSON and checkpoints."""
    return {
        "normal": [list(pair) for pair in genotype.normal],
        "reduce": [list(pair) for pair in genotype.reduce],
        "normal_concat": list(genotype.normal_concat),
        "reduce_concat": list(genotype.reduce_concat),
    }


def from_lists(record):
    """Convert the dict of `as_lists` to a Genotype; ValueError if it is invalid."""
    return _check(Genotype(**{key: record[key] for key in Genotype._fields}))


def by_node(pairs):
    """Return the list of the pairs of each intermediate node."""
    each = len(pairs) // NODES
    return [pairs[node * each : (node + 1) * each] for node in range(NODES)]


def changed_pairs(before, after):
    """Describe the pairs that differ between two genotypes, one text for each pair.

    A text reads "normal node 3: skip_connect of node 2 → sep_conv_3x3 of node 1", with the numbers
    of genotypes: nodes 0 and 1 are the inputs of the cell.
    """
    texts = []
    for cell in ("normal", "reduce"):
        nodes_before, nodes_after = by_node(getattr(before, cell)), by_node(getattr(after, cell))
        for j in range(NODES):
            removed = [pair for pair in nodes_before[j] if pair not in nodes_after[j]]
            added = [pair for pair in nodes_after[j] if pair not in nodes_before[j]]
            for (old, old_input), (new, new_input) in zip(removed, added, strict=True):
                texts.append(f"{cell} node {j + 2}: {old} of node {old_input} → {new} of node "
                             f"{new_input}")
    return texts


def has_distinct_edges(genotype):
    """Whether the pairs of every node have different input nodes, as in all DARTS cells."""
    nodes = by_node(genotype.normal) + by_node(genotype.reduce)
    return all(len({source for _, source in node}) == len(node) for node in nodes)


def draw(seed, distinct_edges=False):
    """Draw a genotype with 2 pairs for each node, uniformly from the search space.

    With `distinct_edges`, the 2 pairs of each node have different input nodes. About 6 % of all
    cells are of this kind.
    """
    rng = random.Random(seed)
    n = len(PRIMITIVES)

    def draw_pairs(inputs):
        if distinct_edges:
            return [(rng.choice(PRIMITIVES), k) for k in sorted(rng.sample(range(inputs), 2))]
        return [(PRIMITIVES[k % n], k // n) for k in sorted(rng.sample(range(n * inputs), 2))]

    def draw_cell():
        return [pair for node in range(NODES) for pair in draw_pairs(node + 2)]

    return Genotype(draw_cell(), range(2, 2 + NODES), draw_cell(), range(2, 2 + NODES))


def _parse(text):
    """Read the Genotype of a printed text, which is parsed and never executed."""
    text = re.sub(r"(?:\b\w+\.)?int\d+\((\d+)\)", r"\1", text)  # np.int64(0) in released logs
    match = re.search(r"Genotype\((?:[^()]|\([^()]*\))*\)", text)
    try:
        call = ast.parse(match[0], mode="eval").body
        record = {field.arg: _evaluate(field.value) for field in call.keywords}
    except Exception:  # no match, a syntax error, too deeply nested brackets, ...
        raise ValueError(f"malformed genotype text {_shorten(text)}") from None
    missing = {*Genotype._fields} - record.keys()
    if missing:
        raise ValueError(f"the genotype text does not give {min(missing)}")
    return from_lists(record)


def _evaluate(node):
    """Return the value of a syntax tree: a literal, or a range of literals."""
    if isinstance(node, ast.Call) and node.func.id == "range":
        return range(*map(ast.literal_eval, node.args))
    return ast.literal_eval(node)


def _check(genotype):
    """Return a genotype with its pairs as tuples; ValueError if it is invalid."""
    fields = {}
    for cell in ("normal", "reduce"):
        pairs, concat = getattr(genotype, cell), getattr(genotype, f"{cell}_concat")
        _check_pairs(cell, pairs)
        # Read only the first entries, because a range in a text may be very long.
        concat = list(concat[: NODES + 1]) if isinstance(concat, list | tuple | range) else []
        are_nodes = all(type(node) is int and 2 <= node < 2 + NODES for node in concat)
        if not concat or not are_nodes or len({*concat}) < len(concat):
            raise ValueError(f"{cell}_concat must hold nodes of 2 to {NODES + 1}, each once")
        as_range = range(concat[0], concat[-1] + 1)
        fields[cell] = [tuple(pair) for pair in pairs]
        fields[f"{cell}_concat"] = as_range if list(as_range) == concat else concat
    if len(fields["normal"]) != len(fields["reduce"]):
        raise ValueError("normal and reduce must hold the same number of pairs")
    return Genotype(**fields)


def _check_pairs(cell, pairs):
    """Raise ValueError if these are not valid pairs for a cell."""
    if not isinstance(pairs, list | tuple) or not pairs or len(pairs) % NODES:
        raise ValueError(f"{cell} must list as many pairs for each of the {NODES} nodes")
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{cell} must be a list of (operation, node) pairs")
    for node, chosen in enumerate(by_node(pairs), 2):
        for operation, source in chosen:
            if operation not in PRIMITIVES:
                raise ValueError(f"{cell}: there is no operation {_shorten(operation)}; there are "
                                 f"{', '.join(PRIMITIVES)}")
            if type(source) is not int or not 0 <= source < node:
                raise ValueError(f"{cell}: node {node} cannot take its input from "
                                 f"{_shorten(source)}, only from nodes 0 to {node - 1}")


def _shorten(value):
    """Return the repr of a value in one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
