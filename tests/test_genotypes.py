"""Loading, saving and drawing genotypes."""

import json
import re
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import genotypes
from genotypes import NODES, PRIMITIVES, Genotype

GOOD = str(genotypes.ISTA_twostage)


@st.composite
def cells(draw):
    """Draw a valid Genotype with 1 to 4 pairs per node."""
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
def test_published_genotypes_are_loaded_by_name(name, one_stage):
    assert genotypes.load(name) == (getattr(genotypes, name), one_stage)


@given(genotype=cells(), one_stage=st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_saved_genotype_is_loaded(tmp_path_factory, genotype, one_stage):
    folder = tmp_path_factory.mktemp("g")
    genotypes.save(folder / "genotype.json", genotype, one_stage, seed=3, note="é")
    for path in (folder / "genotype.json", folder, str(folder)):
        loaded, flag = genotypes.load(path)
        assert equal(loaded, genotype) and flag is one_stage
    record = json.loads((folder / "genotype.json").read_text())
    assert record["about"] == {"seed": 3, "note": "é"}
    assert record["normal"] == [list(pair) for pair in genotype.normal]


@given(genotype=cells())
def test_a_printed_genotype_is_loaded(genotype):
    assert equal(genotypes.load(str(genotype))[0], genotype)
    line = f"2020-10-13 10:15:00,123 genotype = {genotype}\n"
    assert equal(genotypes.load(line)[0], genotype)


def test_numpy_integers_in_a_text_are_accepted():
    text = re.sub(r"(?<=', )(\d)", r"np.int64(\1)", GOOD)
    assert text.count("int64") == 16
    assert genotypes.load(text)[0] == genotypes.ISTA_twostage


def test_changed_pairs_are_listed_by_node():
    before = genotypes.ISTA_twostage
    pairs = [("sep_conv_3x3", 1), before.normal[1], *before.normal[2:7], ("skip_connect", 4)]
    after = before._replace(normal=pairs)
    assert genotypes.changed_pairs(before, before) == []
    assert genotypes.changed_pairs(before, after) == [
        "normal node 2: skip_connect of node 0 → sep_conv_3x3 of node 1",
        "normal node 5: skip_connect of node 0 → skip_connect of node 4",
    ]


# ------------------------------------------------------------------------------------------------
# Invalid genotypes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, message", [
    ("no_such_name", "no known genotype"),
    ("random:٣", "random:SEED"),
    ("random:" + "9" * 5000, "random:SEED"),
    ("Genotype()", "does not give normal"),
    (GOOD[:-5], "malformed"),
    (GOOD.replace("skip_connect", "none"), "no operation 'none'"),
    (GOOD.replace("'skip_connect', 0", "'skip_connect', 2"), "node 2 cannot take its input"),
    (GOOD.replace("'skip_connect', 0", "'skip_connect', True"), "cannot take"),
    (GOOD.replace("('skip_connect', 0), ", "", 1), "as many pairs"),
    (GOOD.replace("range(2, 6)", "range(2, 7)"), "nodes of 2 to 5"),
    (GOOD.replace("range(2, 6)", "[2, 2]"), "each once"),
    (GOOD.replace("range(2, 6)", "[]"), "nodes of 2 to 5"),
    ("x" * 300_000 + "Genotype(" + "[" * 200_000 + ")", "malformed"),
], ids=lambda text: text[:40])
def test_invalid_genotypes_are_rejected_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        genotypes.load(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("content", ["[]", "\x00\x01", '{"normal": []}', "[" * 100_000],
                         ids=lambda text: text[:40])
def test_the_error_for_a_damaged_file_names_it(tmp_path, content):
    path = tmp_path / "genotype.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="genotype.json"):
        genotypes.load(path)
    with pytest.raises(OSError, match="none.json"):
        genotypes.load(tmp_path / "none.json")


def test_a_file_without_one_stage_or_with_a_byte_order_mark_is_loaded(tmp_path):
    path = tmp_path / "genotype.json"
    lists = genotypes.as_lists(genotypes.ISTA_onestage)
    path.write_text(json.dumps(lists))
    assert genotypes.load(path) == (genotypes.ISTA_onestage, False)
    path.write_text(json.dumps({**lists, "one_stage": True}), encoding="utf-8-sig")
    assert genotypes.load(path) == (genotypes.ISTA_onestage, True)


def damaged(text):
    """Return a strategy for texts that differ from `text` by deletions and insertions."""

    def apply(edits):
        result = text
        for at, cut, insert in edits:
            result = result[:at] + insert + result[at + cut :]
        return result

    place, cut, insert = st.integers(0, len(text)), st.integers(0, 5), st.text(max_size=5)
    return st.lists(st.tuples(place, cut, insert), min_size=1, max_size=6).map(apply)


@given(text=st.one_of(
    damaged(GOOD),
    st.text(max_size=200).map(lambda s: f"Genotype({s})"),
    st.text("()[]{}'\"\\,=0123456789abcnorml_. \n-~", max_size=300).map("Genotype({})".format),
    st.text(max_size=100),
))
@example("Genotype(normal=open('CREATED', 'w'), normal_concat=1, reduce=1, reduce_concat=1)")
@example("Genotype(*[1]*4)")
@example("Genotype(**{'normal': 1})")
@example(GOOD.replace("range(2, 6)", "[2.0]"))
@settings(max_examples=400, deadline=None)
def test_malicious_and_damaged_texts_give_an_error_or_a_genotype(text):
    try:
        genotype, _ = genotypes.load(text)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
    else:
        assert equal(genotypes.load(str(genotype))[0], genotype)


# ------------------------------------------------------------------------------------------------
# Random cells
# ------------------------------------------------------------------------------------------------


def test_random_cells_are_reproducible_and_valid():
    drawn = [genotypes.load(f"random:{seed}") for seed in range(50)]
    assert drawn == [genotypes.load(f"random:{seed}") for seed in range(50)]
    assert len({str(genotype) for genotype, _ in drawn}) == 50
    for genotype, one_stage in drawn:
        assert one_stage is False and genotypes.load(str(genotype))[0] == genotype


def test_seed_0_gives_a_fixed_cell():
    # Existing runs and tables refer to random cells by their seeds.
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


@pytest.mark.parametrize("cell, k", [("normal", 0), ("normal", 7), ("reduce", 3)])
def test_has_distinct_edges_finds_an_edge_with_two_pairs(cell, k):
    assert genotypes.has_distinct_edges(genotypes.ISTA_twostage)
    pairs = list(getattr(genotypes.ISTA_twostage, cell))
    pairs[k] = (pairs[k][0], pairs[k ^ 1][1])
    assert not genotypes.has_distinct_edges(genotypes.ISTA_twostage._replace(**{cell: pairs}))


def assert_uniform(counts, kinds, quantile):
    """Do a χ² test; `quantile` is the 99.9 % quantile for `kinds` - 1 degrees of freedom."""
    expected = sum(counts.values()) / kinds
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == kinds and chi2 < quantile


def test_random_pairs_are_uniform():
    drawn = [genotypes.draw(seed) for seed in range(3000)]
    assert_uniform(Counter(pair for g in drawn for pair in g.normal[:2]), 14, 34.5)


def test_random_cells_with_distinct_edges_are_uniform():
    assert genotypes.load("random:7:distinct") == (genotypes.draw(7, distinct_edges=True), False)
    drawn = [genotypes.draw(seed, distinct_edges=True) for seed in range(3000)]
    assert all(genotypes.has_distinct_edges(genotype) for genotype in drawn)
    assert_uniform(Counter((g.reduce[4][1], g.reduce[5][1]) for g in drawn), 6, 20.5)
    assert_uniform(Counter(g.normal[0][0] for g in drawn), len(PRIMITIVES), 22.5)
