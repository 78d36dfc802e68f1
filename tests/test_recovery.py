"""benchmarks/recovery.py: what codes keep of what the weights have learnt."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import ENVIRONMENT, ROOT

sys.path.append(str(ROOT / "benchmarks"))

import recovery


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_codes_of_an_orthonormal_dictionary_keep_all(seed, first_rises):
    rng = np.random.default_rng(seed)
    A, _ = np.linalg.qr(rng.standard_normal((7, 7)))
    b = A @ (rng.choice([-1, 1], 7) * rng.permutation([7, 6, 1, 1.1, 1.2, 1.3, 1.4]))
    one = recovery.move(A, b, 1e-6, 0.1, first_rises)
    assert one.nonzero == 7 and one.kept == pytest.approx(1, abs=1e-4) and not one.leaves


def test_a_pair_that_falls_far_enough_leaves():
    one = recovery.move(np.eye(3), np.array([3.0, 2, 1.9]), 1e-6, 0.2, True)
    assert one.leaves and one.loser
    one = recovery.move(np.eye(3), np.array([3.0, 2.2, 1.9]), 1e-6, 0.2, False)
    assert not one.leaves


def test_a_large_lam_leaves_fewer_entries_and_follows_the_weights():
    small, large = (
        recovery.row([*recovery.outcomes(7, share, 300, 0.07, 0)]) for share in (1e-4, 0.5)
    )
    assert small[0] == pytest.approx(7, abs=0.1) and small[1] == 0
    assert large[0] < 3 and 0.1 < large[1] < 0.5  # too few
    assert large[3] > small[3] + 0.1 and large[5] > small[5] + 0.1  # kept, loser
    assert large[2] < 0.02 < 0.2 < small[2] < 0.4  # opposite


def test_a_code_that_is_too_sparse_is_only_counted():
    assert recovery.move(np.eye(3), np.array([3.0, 1, 1]), 0.5, 0.1, True) == recovery.Outcome(1)


def test_the_script():
    command = [sys.executable, ROOT / "benchmarks/recovery.py", "--problems"]
    streams = dict(env=ENVIRONMENT, capture_output=True, text=True)
    lines = subprocess.run([*command, "8"], **streams).stdout.splitlines()
    assert len(lines) == 1 + 3 * len(recovery.SHARES)
    failed = subprocess.run([*command, "0"], **streams)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
