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
        - a published name: `ISTA_twostage`, `ISTA_onestage` or `ISTA_ImageNet`;
        - `random:SEED`, or `random:SEED:distinct`, see `draw`;
        - the path of a `genotype.json`, or of the run folder that holds one;
        - the printed form `Genotype(normal=[('sep_conv_3x3', 0), ...], ...)`, or a file that holds
          it. What is before `Genotype(` is ignored, so a line of a log or of DARTS' `genotypes.py`
          will do.

    Returns
    -------
    genotype : Genotype
        Its pairs in the order of the source.
    one_stage : bool
        Whether its network has a BatchNorm after pools and skips; False where the source has not.

    Raises
    ------
    ValueError
        With one line that says what is wrong.
    OSError
        When a file cannot be read.
    """
    spec = os.fspath(spec)
    if spec in NAMED:
        genotype, one_stage = NAMED[spec]
        return _check(genotype), one_stage
    if spec.startswith("random:"):
        parts = re.fullmatch(r"random:([0-9]{1,9})(:distinct)?", spec)
        if not parts:
            raise ValueError(f"{_short(spec)}: expected random:SEED or random:SEED:distinct with a "
                             "whole number, as in random:3")
        return draw(int(parts[1]), distinct_edges=bool(parts[2])), False
    if "Genotype(" in spec:
        return _parse(spec), False
    if os.path.isdir(spec):
        spec = os.path.join(spec, "genotype.json")
    if not spec.endswith(".json") and not os.path.exists(spec):
        raise ValueError(
            f"unknown genotype {_short(spec)}: give one of {', '.join(NAMED)}, random:SEED, "
            "random:SEED:distinct, the path of a genotype.json or of a run folder, or a text "
            "'Genotype(normal=[...], ...)'"
        )
    with open(spec, encoding="utf-8-sig", errors="replace") as file:  # -sig: a byte-order mark
        text = file.read()
    try:
        if "Genotype(" in text and not text.lstrip().startswith("{"):  # JSON, of such an --arch
            return _parse(text), False
        record = json.loads(text)
        return from_lists(record), bool(record.get("one_stage", False))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        is_ours = type(error) is ValueError  # those of the parsers are not, or name no file
        what = error if is_ours else "not a genotype.json (damaged, or another kind of file)"
        raise ValueError(f"{spec}: {what}") from None


def save(path, genotype, one_stage, **about):
    """Write a genotype as a flat JSON object, in one step, so that no reader sees half of it.

    `about` is what JSON can hold of where it came from, kept under that key.
    """
    record = as_lists(genotype)
    text = json.dumps({**record, "one_stage": bool(one_stage), "about": about}, indent=1)
    # One pair a line is easier to compare by eye than one number a line.
    text = re.sub(r'\[\s+("\w+"),\s+(\d)\s+\]', r"[\1, \2]", text)
    text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(f"{text}\n")
    os.replace(partial, path)


def as_lists(genotype):
    """The genotype as a dict of plain lists, as JSON and checkpoints hold it."""
    pairs = {key: [list(pair) for pair in getattr(genotype, key)] for key in ("normal", "reduce")}
    concats = {key: list(getattr(genotype, key)) for key in ("normal_concat", "reduce_concat")}
    return {**pairs, **concats}


def from_lists(record):
    """The Genotype of a dict as `as_lists` makes it; ValueError where it is none."""
    return _check(Genotype(**{key: record[key] for key in Genotype._fields}))


def by_node(pairs):
    """The pairs of each intermediate node."""
    each = len(pairs) // NODES
    return [pairs[node * each : (node + 1) * each] for node in range(NODES)]


def moved(before, after):
    """The pairs in which a genotype differs from an earlier one, as texts, one for each pair.

    Each is like "normal node 1: skip_connect of node 0 → sep_conv_3x3 of c_{k-1}".
    """
    sources = ["c_{k-2}", "c_{k-1}", *(f"node {j}" for j in range(NODES))]
    texts = []
    for cell in ("normal", "reduce"):
        nodes = [by_node(getattr(genotype, cell)) for genotype in (before, after)]
        for node, (a, b) in enumerate(zip(*nodes, strict=True)):
            gone, come = ([p for p in x if p not in y] for x, y in ((a, b), (b, a)))
            texts += [
                f"{cell} node {node}: {was} of {sources[old]} → {operation} of {sources[new]}"
                for (was, old), (operation, new) in zip(gone, come, strict=True)
            ]
    return texts


def has_distinct_edges(genotype):
    """Whether the pairs of every node have different input nodes, as in all DARTS cells."""
    nodes = by_node(genotype.normal) + by_node(genotype.reduce)
    return all(len({source for _, source in node}) == len(node) for node in nodes)


def draw(seed, distinct_edges=False):
    """Draw a genotype uniformly from the search space, with 2 pairs a node.

    With `distinct_edges`, all nodes have two different input nodes, as in about 6 % of all cells.
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


def _parse(text):
    """The Genotype of a printed text: its fields as a literal dict, nothing else is understood."""
    text = re.sub(r"(?:\b\w+\.)?int\d+\((\d+)\)", r"\1", text)  # np.int64(0) of released logs
    text = re.sub(
        r"range\((\d\d?), *(\d\d?)\)", lambda m: str([*range(int(m[1]), int(m[2]))]), text
    )
    found = re.search(r"Genotype\(((?:[^()]|\([^()]*\))*)\)", text)
    try:
        items = re.sub(r"\b(\w+) *=", r"'\1':", found[1])
        record = ast.literal_eval("{" + items + "}")
        lost = {*Genotype._fields} - record.keys()
    except Exception:  # found is None, say, or there are too many brackets for the parser
        raise ValueError(f"malformed genotype text {_short(text)}") from None
    if lost:
        raise ValueError(f"the genotype text does not give {min(lost)}")
    return from_lists(record)


def _check(genotype):
    """The genotype with its pairs as tuples, or ValueError where it is not one of our cells."""
    cells = {}
    for cell in ("normal", "reduce"):
        pairs, concat = getattr(genotype, cell), getattr(genotype, f"{cell}_concat")
        if not isinstance(pairs, list | tuple) or not pairs or len(pairs) % NODES:
            raise ValueError(f"{cell} must list as many pairs for each of the {NODES} nodes")
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"{cell} must be a list of (operation, node) pairs")
        for node, chosen in enumerate(by_node(pairs), 2):
            for operation, source in chosen:
                if operation not in PRIMITIVES:
                    raise ValueError(
                        f"{cell}: there is no operation {_short(operation)}; "
                        f"there are {', '.join(PRIMITIVES)}"
                    )
                if type(source) is not int or not 0 <= source < node:
                    raise ValueError(
                        f"{cell}: node {node} cannot take its input from {_short(source)}, "
                        f"only from nodes 0 to {node - 1}"
                    )
        concat = list(concat) if isinstance(concat, list | tuple | range) else []
        are_nodes = all(type(node) is int and 2 <= node < 2 + NODES for node in concat)
        if not concat or not are_nodes or len({*concat}) < len(concat):
            raise ValueError(f"{cell}_concat must hold nodes of 2 to {NODES + 1}, each once")
        whole = range(concat[0], concat[-1] + 1)
        cells[cell] = [tuple(pair) for pair in pairs]
        cells[f"{cell}_concat"] = whole if list(whole) == concat else concat
    if len(cells["normal"]) != len(cells["reduce"]):
        raise ValueError("normal and reduce must hold the same number of pairs")
    return Genotype(**cells)


def _short(value):
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
