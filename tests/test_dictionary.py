"""experiments/dictionary.py: recoveries, and searches with a known merit of each pair."""

import json
from itertools import combinations

import dictionary
import numpy as np
import pytest
import torch
from dictionary import EPOCH, Setting
from hypothesis import given
from hypothesis import strategies as st

import ista

LOSSES = {
    "shares": lambda w, v: -(w**2 * v).sum() / (w**2).sum(),
    "sizes": lambda w, v: -(w.abs() * v).sum(),
    "squares": lambda w, v: ((w - v) ** 2).sum(),
}


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_recovery_in_an_orthonormal_dictionary_keeps_the_progress(seed, first_rises):
    rng = np.random.default_rng(seed)
    A, _ = np.linalg.qr(rng.standard_normal((7, 7)))
    b = A @ (rng.choice([-1, 1], 7) * rng.permutation([7, 6, 1, 1.1, 1.2, 1.3, 1.4]))
    opposite, kept, leaves, _ = dictionary.measure_recovery(Setting(lam=1e-6), A, b, first_rises)
    assert opposite == 0 and kept == pytest.approx(1, abs=1e-4) and not leaves


def test_a_pair_leaves_when_another_code_entry_is_larger():
    for second, first_rises, left in ((2, True, True), (2.3, False, False)):
        b = np.array([3, second, 1.99])
        _, _, leaves, loser = dictionary.measure_recovery(Setting(), np.eye(3), b, first_rises)
        assert leaves == left and loser == left
    # With this lam the code has one nonzero entry.
    assert np.isnan(dictionary.measure_recovery(Setting(lam=2.5), np.eye(3), b, True)).all()


@given(st.lists(st.integers(-3, 3), min_size=3, max_size=9))
def test_percentiles_of_all_choices_have_mean_50_and_the_order_of_the_sums(v):
    choices = np.array(list(combinations(range(len(v)), 2)))
    found = dictionary.percentiles(np.array(v), choices)
    assert found.mean() == pytest.approx(50)
    sums = np.array(v)[choices].sum(1)
    assert (np.sign(found[:, None] - found) == np.sign(sums[:, None] - sums)).all()


def test_the_mean_percentile_of_random_cells_is_50_and_that_of_the_best_100():
    rng = np.random.default_rng(0)
    merits = [rng.standard_normal(7 * (2 + k % 4)) for k in range(800)]
    chance = np.array([rng.choice(len(v), 2, replace=False) for v in merits])
    best = np.array([v.argsort()[-2:] for v in merits])
    found = dictionary.cell_percentiles(merits, chance, rng, draws=200)
    assert len(found) == 100 and abs(found.mean() - 50) < 10  # its standard error is 2.9
    assert dictionary.cell_percentiles(merits, best, rng, draws=200).min() == 100


@pytest.mark.parametrize("loss", LOSSES)
def test_a_search_without_noise_equals_one_with_torch_and_autograd(loss):
    rng = np.random.default_rng(1)
    A, start = rng.random((7, 14)), 1e-3 * rng.standard_normal((1, 7))
    v, epochs, every = rng.standard_normal(14), 3, 42
    supports, ran, lost, last = dictionary.search(
        Setting(noise=0.0, loss=loss, every=every), [v], [A], start, epochs, rng
    )
    b = torch.tensor(start[0], requires_grad=True)
    adam = torch.optim.Adam([b], lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    runs = np.zeros(14)
    for step in range(epochs * EPOCH):
        if step % every == 0:
            z = ista.recover(A, b.detach().numpy()).z
            S = np.argsort(-np.abs(z), kind="stable")[:2]
            A_S, z_S = torch.tensor(A[:, S]), torch.tensor(z[S])
        w = A_S.T @ b - (A_S.T @ A_S - torch.eye(2)) @ z_S
        adam.zero_grad()
        LOSSES[loss](w, torch.tensor(v[S] - 2 * np.exp(-runs[S] / 300))).backward()
        adam.step()
        runs[S] += 1
    assert np.allclose(last[0], b.detach().numpy(), rtol=1e-6, atol=1e-9)
    assert supports.shape == (epochs + 1, 1, 2) and ran[0] == 2 / 14
    assert (np.diff(ran[:, 0]) >= 0).all() and len(lost) <= epochs * EPOCH // every


def test_a_search_finds_good_pairs_in_an_orthonormal_but_not_in_a_positive_dictionary():
    rng = np.random.default_rng(0)
    merits = [rng.standard_normal(14) for _ in range(100)]
    start = 1e-3 * rng.standard_normal((100, 14))
    for A, finds in ((np.eye(14), True), (np.eye(14) + 0.5, False)):
        supports, ran, _, _ = dictionary.search(
            Setting(noise=0.0), merits, [A] * 100, start, 15, rng
        )
        first, last = (
            np.mean([dictionary.percentiles(v, S[[k]]) for k, v in enumerate(merits)])
            for S in supports[[0, -1]]
        )
        assert abs(first - 50) < 10 and (last > first + 10) == finds
        assert (ran[-1].mean() > 0.5) == finds


def test_the_script_writes_tables_numbers_and_a_picture(tmp_path, capsys):
    parser = dictionary.get_args_parser()
    out, picture = tmp_path / "numbers.json", tmp_path / "dictionary.png"
    flags = ["--quick", "--nodes", "16", "--epochs", "2", "--out", str(out)]
    dictionary.main(parser.parse_args([*flags, "--picture", str(picture)]))
    text, numbers = capsys.readouterr().out, json.loads(out.read_text())
    for table, rows in list(dictionary.settings().items())[:2]:
        assert f"\n{table} " in f"\n{text}" and [*numbers[table]] == [*rows]
        assert all(f"\n{name} " in text for name in rows)
    assert np.shape(numbers["searches"]["uniform"]["quartiles_by_epoch"]) == (3, 3)
    assert len(numbers["searches"]["uniform"]["nodes_at_end"]) == 16
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong in (["--nodes", "20"], ["--tables", "keeps", "--picture", "x.png"], ["--out", "a/b"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(wrong)
