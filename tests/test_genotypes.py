"""Reading, writing and drawing genotypes."""

import json
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import genotypes
from genotypes import NODES, PRIMITIVES, Genotype


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
])  # fmt: skip
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
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------
# What is not a genotype
# ------------------------------------------------------------------------------------------------

GOOD = str(genotypes.ISTA_twostage)


@pytest.mark.parametrize("text, says", [
    ("no_such_name", "unknown genotype"),
    ("random:", "random:SEED"),
    ("random:x", "random:SEED"),
    ("random:-1", "random:SEED"),
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
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(text, says):
    with pytest.raises(ValueError) as error:
        genotypes.load(text)
    message = str(error.value)
    assert says in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "3", '{"normal": []}', "\x00\x01", "[" * 100_000,
    json.dumps({**genotypes.as_lists(genotypes.ISTA_twostage), "one_stage": "no"}),
    json.dumps({**genotypes.as_lists(genotypes.ISTA_twostage), "one_stage": True, "normal": 5}),
    json.dumps({**genotypes.as_lists(genotypes.ISTA_twostage)}),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "genotype.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="genotype.json") as error:
        genotypes.load(path)
    assert "\n" not in str(error.value)


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
))  # fmt: skip
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
