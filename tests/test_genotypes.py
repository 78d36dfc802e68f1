"""Reading, writing and drawing genotypes."""

import json
import string
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import genotypes
from genotypes import NODES, PRIMITIVES, Genotype
from utils import UserError


@st.composite
def cells(draw):
    """A valid Genotype with 1 to 4 pairs a node."""
    per_node = draw(st.integers(1, 4))

    def cell():
        return [
            (draw(st.sampled_from(PRIMITIVES)), draw(st.integers(0, node + 1)))
            for node in range(NODES)
            for _ in range(per_node)
        ]

    concat = st.lists(st.integers(2, 5), min_size=1, max_size=4, unique=True)
    return Genotype(cell(), draw(concat), cell(), draw(concat))


def equal(a, b):
    return genotypes.as_lists(a) == genotypes.as_lists(b)


@pytest.mark.parametrize("name, one_stage", [
    ("ISTA_twostage", False), ("ISTA_onestage", True), ("ISTA_ImageNet", False),
])
def test_published_names(name, one_stage):
    assert genotypes.load(name) == (getattr(genotypes, name), one_stage)


@given(genotype=cells(), one_stage=st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_file_gives_back_what_was_saved(tmp_path_factory, genotype, one_stage):
    path = tmp_path_factory.mktemp("g") / "genotype.json"
    genotypes.save(path, genotype, one_stage, seed=3, note="é")
    loaded, flag = genotypes.load(path)
    assert equal(loaded, genotype) and flag is one_stage
    record = json.loads(path.read_text())
    assert record["about"] == {"seed": 3, "note": "é"}
    assert record["normal"] == [list(pair) for pair in genotype.normal]


@given(genotype=cells())
def test_printed_text_gives_back_the_genotype(genotype):
    assert equal(genotypes.load(str(genotype))[0], genotype)
    line = f"2020-10-13 10:15:00,123 genotype = {genotype}\n"
    assert equal(genotypes.load(line)[0], genotype)


@pytest.mark.parametrize("number", ["np.int64({})", "numpy.int64({})", "int64({})"])
def test_numpy_numbers_in_a_text(number):
    text = str(genotypes.ISTA_onestage)
    for k in range(6):
        text = text.replace(f", {k})", f", {number.format(k)})")
    assert number.split("(")[0] in text
    # range(2, 6) is left as it was printed: the loop only meets indices behind a comma.
    text = text.replace(f"range(2, {number.format(6)}", "range(2, 6)")
    assert genotypes.load(text)[0] == genotypes.ISTA_onestage


def test_the_order_of_the_pairs_is_kept():
    # Parameters of a network are numbered in this order, so sorting would misplace weights.
    assert genotypes.load(str(genotypes.ISTA_twostage))[0].normal[4:6] == [
        ("dil_conv_3x3", 1), ("sep_conv_3x3", 0),
    ]


# ------------------------------------------------------------------------------------------------
# What is not a genotype
# ------------------------------------------------------------------------------------------------

GOOD = str(genotypes.ISTA_twostage)


@pytest.mark.parametrize("text, says", [
    ("no_such_name", "unknown genotype"),
    ("random:", "random:SEED"),
    ("random:x", "random:SEED"),
    ("random:-1", "random:SEED"),
    ("random:٣", "random:SEED"),
    ("random:3:", "random:SEED:distinct"),
    ("random:3:other", "random:SEED:distinct"),
    ("random:" + "9" * 5000, "random:SEED"),
    ("Genotype(", "malformed"),
    ("Genotype()", "must give"),
    (GOOD[:-5], "malformed"),
    (GOOD.replace("skip_connect", "none"), "no operation 'none'"),
    (GOOD.replace("'skip_connect', 0", "'skip_connect', 2"), "node 2 cannot take its input"),
    (GOOD.replace("'skip_connect', 0", "'skip_connect', -1"), "malformed"),
    (GOOD.replace("'skip_connect', 0", "'skip_connect', True"), "cannot take"),
    (GOOD.replace("'skip_connect', 0", "'skip_connect', 0.0"), "malformed"),
    (GOOD.replace("('skip_connect', 0), ", "", 1), "as many pairs"),
    (GOOD.replace("range(2, 6)", "range(2, 7)"), "malformed"),
    (GOOD.replace("range(2, 6)", "[]"), "must list nodes"),
    (GOOD.replace("range(2, 6)", "[2, 2]"), "each once"),
    (GOOD.replace("normal_concat", "normal_concat=range(2, 6), normal_concat"), "each once"),
    (GOOD.replace("normal_concat", "concat"), "must give"),
    ("Genotype(normal=__import__('os').getcwd(), normal_concat=1, reduce=1, reduce_concat=1)",
     "malformed"),
    ("x" * 300_000 + "Genotype(" + "[" * 200_000 + ")", "too long"),
    ("Genotype(" + "[" * 5_000 + ")", "malformed"),
    ("Genotype(" + "-" * 50_000 + "1)", "malformed"),
])
def test_what_is_wrong_is_said_in_a_line(text, says):
    with pytest.raises(UserError) as error:
        genotypes.load(text)
    message = str(error.value)
    assert says in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "3", '{"normal": []}', "\x00\x01", "[" * 100_000,
    json.dumps({**genotypes.as_lists(genotypes.ISTA_twostage), "one_stage": "no"}),
    json.dumps({**genotypes.as_lists(genotypes.ISTA_twostage), "one_stage": True, "normal": 5}),
    json.dumps({"one_stage": True, "normal": genotypes.ISTA_twostage.normal}),
])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "genotype.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="genotype.json") as error:
        genotypes.load(path)
    assert "\n" not in str(error.value)


def test_a_file_may_lack_one_stage_and_have_a_byte_order_mark(tmp_path):
    path = tmp_path / "genotype.json"
    lists = genotypes.as_lists(genotypes.ISTA_onestage)
    path.write_text(json.dumps(lists))
    assert genotypes.load(path) == (genotypes.ISTA_onestage, False)
    path.write_text(json.dumps({**lists, "one_stage": True}), encoding="utf-8-sig")
    assert genotypes.load(path) == (genotypes.ISTA_onestage, True)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=path.name):
            genotypes.load(str(path))


def damaged(text):
    """Texts that differ from `text` by a few deletions and insertions."""
    edit = st.tuples(
        st.integers(0, len(text)), st.integers(0, 5), st.text(string.printable, max_size=5)
    )

    def apply(edits):
        result = text
        for at, cut, insert in edits:
            result = result[:at] + insert + result[at + cut :]
        return result

    return st.lists(edit, min_size=1, max_size=6).map(apply)


@given(text=st.one_of(
    damaged(GOOD),
    st.text(max_size=200).map(lambda s: f"Genotype({s})"),
    st.text("()[]{}'\"\\,=0123456789abcnorml_. \n-~", max_size=300).map("Genotype({})".format),
    st.text(max_size=100),
))
@example("Genotype(normal=open('HOSTILE', 'w'), normal_concat=1, reduce=1, reduce_concat=1)")
@example("Genotype(*[1]*4)")
@example("Genotype(**{'normal': 1})")
@example("Genotype(lambda: 0, 1, 2, 3)")
@example("Genotype([x for x in 'ab'], 1, 2, 3)")
@example("Genotype(f'{1}', 1, 2, 3)")
@example("Genotype('\\d', 1, 2, 3)")
@settings(max_examples=5000, deadline=None)
def test_hostile_and_damaged_texts_raise_value_error_or_give_a_genotype(text):
    try:
        genotype, _ = genotypes.load(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert equal(genotypes.load(str(genotype))[0], genotype)


# ------------------------------------------------------------------------------------------------
# Random cells
# ------------------------------------------------------------------------------------------------


def test_a_random_cell_is_reproducible_and_valid():
    drawn = [genotypes.load(f"random:{seed}") for seed in range(50)]
    assert drawn == [genotypes.load(f"random:{seed}") for seed in range(50)]
    assert len({str(genotype) for genotype, _ in drawn}) == 50
    for genotype, one_stage in drawn:
        assert one_stage is False
        assert genotypes.load(str(genotype))[0] == genotype
        for pairs in (genotype.normal, genotype.reduce):
            for a, b in zip(pairs[::2], pairs[1::2], strict=True):
                assert (a[1], PRIMITIVES.index(a[0])) < (b[1], PRIMITIVES.index(b[0]))


def test_a_seed_gives_the_cell_it_always_gave():
    # Old runs and tables name their cells by these seeds.
    assert genotypes.draw(0) == Genotype(
        normal=[
            ("dil_conv_5x5", 0), ("dil_conv_5x5", 1), ("avg_pool_3x3", 0), ("dil_conv_5x5", 1),
            ("avg_pool_3x3", 1), ("skip_connect", 2), ("sep_conv_5x5", 3), ("sep_conv_3x3", 4),
        ],
        normal_concat=range(2, 6),
        reduce=[
            ("sep_conv_5x5", 0), ("dil_conv_3x3", 1), ("sep_conv_5x5", 1), ("avg_pool_3x3", 2),
            ("dil_conv_5x5", 0), ("sep_conv_5x5", 2), ("avg_pool_3x3", 1), ("sep_conv_5x5", 4),
        ],
        reduce_concat=range(2, 6),
    )


def test_random_cells_of_distinct_edges():
    assert genotypes.load("random:7:distinct") == (genotypes.draw(7, distinct_edges=True), False)
    drawn = [genotypes.draw(seed, distinct_edges=True) for seed in range(3000)]
    assert all(genotypes.has_distinct_edges(genotype) for genotype in drawn)
    assert all(genotypes.load(str(genotype))[0] == genotype for genotype in drawn[:50])
    # Each as often: the 6 pairs of inputs of the third node, and the operations.
    inputs = Counter((g.reduce[4][1], g.reduce[5][1]) for g in drawn)
    operations = Counter(g.normal[0][0] for g in drawn)
    for seen, kinds in ((inputs, 6), (operations, len(PRIMITIVES))):
        expected = len(drawn) / kinds
        chi2 = sum((count - expected) ** 2 / expected for count in seen.values())
        assert len(seen) == kinds and chi2 < 22.5  # 99.9 % quantile, 6 degrees of freedom


@pytest.mark.parametrize("cell, k", [("normal", 0), ("normal", 7), ("reduce", 3)])
def test_one_shared_edge_is_found_in_any_node(cell, k):
    genotype = genotypes.ISTA_twostage
    assert genotypes.has_distinct_edges(genotype)
    pairs = list(getattr(genotype, cell))
    pairs[k] = (pairs[k][0], pairs[k ^ 1][1])
    assert not genotypes.has_distinct_edges(genotype._replace(**{cell: pairs}))
    same_inputs = [("skip_connect", 0), ("skip_connect", 1)] * NODES  # in all nodes alike
    assert genotypes.has_distinct_edges(genotype._replace(normal=same_inputs))


def test_random_pairs_are_uniform():
    # Each of the 14 pairs of the first node is kept with probability 2/14.
    counts = dict.fromkeys(((op, edge) for edge in (0, 1) for op in PRIMITIVES), 0)
    n = 4000
    for seed in range(n):
        for pair in genotypes.draw(seed).normal[:2]:
            counts[pair] += 1
    expected = 2 * n / 14
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < 34.5  # 99.9 % quantile with 13 degrees of freedom
