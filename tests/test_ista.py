"""LASSO solvers, tested by the optimality conditions instead of stored codes."""

import math
import sys
import types
import warnings
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ista
from ista import SOLVERS, SolverUnavailable, duality_gap, objective, recover, soft_threshold

WIDTHS = (14, 21, 28, 35)  # (edge, operation) pairs of the four nodes of a cell
FIRST_ORDER = ("ista", "fista")
NUMPY_SOLVERS = ("homotopy", *FIRST_ORDER)

# Use the same examples in every run, without time limits.
examples = partial(settings, deadline=None, derandomize=True, database=None)


def draw(rng, n=None, size=None, m=7):
    """Draw a dictionary as a search does, and a point b of norm `size`."""
    A = rng.random((m, n or rng.choice(WIDTHS)))
    b = rng.standard_normal(m)
    return A, b * ((size or 10.0 ** rng.uniform(-4, 1)) / np.linalg.norm(b))


def violation(A, b, lam, z):
    """Largest violation of the optimality conditions, relative to lam_max."""
    c = A.T @ (b - A @ z)
    support = z != 0
    worst = max(np.abs(c).max() - lam, np.abs(c - lam * np.sign(z))[support].max(initial=0.0), 0.0)
    lam_max = np.abs(A.T @ b).max()
    return worst / lam_max if lam_max > 0 else worst


def assert_solved(A, b, lam, solution):
    assert solution.converged is True and solution.solver == "homotopy"
    assert 0.0 <= solution.gap <= 1e-9
    assert violation(A, b, lam, solution.z) <= 1e-9
    assert not np.signbit(solution.z[solution.z == 0.0]).any()


# ------------------------------------------------------------------------------ the problem


@examples(max_examples=200)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_soft_threshold_is_the_proximal_operator(v, t):
    p = soft_threshold(np.array([v, v]), t)[0]
    # v - p is a subgradient of t |.| at p
    if p == 0.0:
        assert abs(v) <= t and not np.signbit(p)
    else:
        assert v - p == pytest.approx(math.copysign(t, p), rel=1e-12, abs=1e-9)
        assert math.copysign(1, p) == math.copysign(1, v)


def test_duality_gap_is_primal_minus_dual_objective():
    rng = np.random.default_rng(0)
    for _ in range(200):
        A, b = draw(rng, size=1.0)
        lam = 10.0 ** rng.uniform(-3, 1)
        z = rng.standard_normal(A.shape[1]) * (rng.random(A.shape[1]) < 0.3)
        r = b - A @ z
        theta = r * min(1.0, lam / np.abs(A.T @ r).max())
        primal = 0.5 * np.sum((A @ z - b) ** 2) + lam * np.sum(np.abs(z))
        dual = 0.5 * np.sum(b**2) - 0.5 * np.sum((b - theta) ** 2)
        assert objective(A, b, z, lam) == pytest.approx(primal, rel=1e-12)
        assert duality_gap(A, b, z, lam) == pytest.approx(primal - dual, rel=1e-9, abs=1e-12)
    A, b = np.eye(3)[:, :2], np.array([1.0, 2.0, 3.0])  # least squares
    assert duality_gap(A, b, np.array([1.0, 2.0]), 0.0) == pytest.approx(0.0, abs=1e-15)
    assert duality_gap(A, b, np.zeros(2), 0.0) == pytest.approx(2.5)


# ------------------------------------------------------------------------------ homotopy


def test_homotopy_solves_the_problems_of_a_search():
    rng = np.random.default_rng(2)
    for k in range(1000):
        A, b = draw(rng, n=WIDTHS[k % 4])
        lam = 10.0 ** rng.uniform(-6, -2)
        solution = recover(A, b, lam)
        assert_solved(A, b, lam, solution)
        # A tolerance of 1e-9 would not detect a missing column at a small lam.
        assert violation(A, b, lam, solution.z) <= 1e-12
        assert solution.gap == pytest.approx(
            duality_gap(A, b, solution.z, lam) / (0.5 * (b @ b)), rel=1e-6, abs=1e-13
        )
        assert np.count_nonzero(solution.z) <= 7


def integer_problem(rng):
    """Draw small integers, so that nearly every breakpoint has ties."""
    m, n = rng.integers(1, 8), rng.integers(1, 16)
    A = rng.integers(rng.integers(-2, 1), 3, (m, n)).astype(float)
    variant = rng.integers(5)
    if variant == 0:
        A = np.repeat(A, 2, axis=1)
    elif variant == 1:
        A = np.hstack([A, -A])
    elif variant == 2:
        A[:, rng.random(n) < 0.3] = 0.0
    elif variant == 3:
        A = A[:, :1] @ A[:1] + A[:, -1:] @ A[-1:]  # rank 2
    b = rng.integers(-2, 3, m).astype(float)
    return A, b, float(rng.choice([0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0, 2.0]))


@pytest.mark.parametrize("path_fails", [False, True])
def test_homotopy_solves_problems_with_ties_even_if_the_path_fails(path_fails, monkeypatch):
    if path_fails:
        monkeypatch.setattr(ista, "_path", lambda A, b, lam: (np.zeros(A.shape[1]), 1))
    rng = np.random.default_rng(3)
    for _ in range(4000):
        A, b, lam = integer_problem(rng)
        assert_solved(A, b, lam, recover(A, b, lam))


def test_ill_conditioned_problems_are_solved_or_reported():
    """Columns are dependent to 1e-13 ... 1e-6, and lam is near 0: codes have norms up to 1e7."""
    rng = np.random.default_rng(27)
    failures = 0
    for k in range(500):
        m, n = rng.integers(2, 8), rng.integers(4, 22)
        A, half = rng.standard_normal((m, n)), n // 2
        A[:, half : 2 * half] = A[:, :half] @ rng.integers(-1, 2, (half, half))
        A += 10.0 ** rng.uniform(-13, -6) * rng.standard_normal((m, n))
        b, lam = rng.standard_normal(m), (0.0, 1e-12, 1e-9)[k % 3]
        z0 = np.where(rng.random(n) < 0.2, rng.standard_normal(n), 0.0)
        solution = recover(A, b, lam, z0=z0)
        assert np.isfinite(solution.z).all()
        failures += not solution.converged
        if solution.converged:
            assert duality_gap(A, b, solution.z, lam) <= 1.01e-9 * 0.5 * (b @ b)
    assert 0 < failures < 250


@pytest.mark.parametrize("m, n", [(1, 1), (1, 9), (9, 1), (7, 7), (12, 7), (30, 80), (60, 30)])
def test_homotopy_solves_problems_of_other_shapes(m, n):
    rng = np.random.default_rng(6)
    for lam in (1e-8, 1e-3, 0.1):
        for _ in range(5):
            A, b = draw(rng, n=n, m=m, size=1.0)
            assert_solved(A, b, lam, recover(A, b, lam))


@st.composite
def degenerate(draw_):
    m, n = draw_(st.integers(1, 7)), draw_(st.integers(1, 12))
    entries = st.integers(-2, 2).map(float)
    A = np.array(draw_(st.lists(entries, min_size=m * n, max_size=m * n))).reshape(m, n)
    A = A[:, draw_(st.lists(st.integers(0, n - 1), min_size=1, max_size=14))]  # repeats columns
    b = np.array(draw_(st.lists(entries, min_size=m, max_size=m)))
    lam = draw_(st.sampled_from([0.0, 1e-6, 1e-3, 0.25, 0.5, 1.0, 1.5, 3.0]))
    values = st.one_of(st.just(0.0), st.floats(-5, 5, allow_subnormal=False))
    z0 = np.array(draw_(st.lists(values, min_size=A.shape[1], max_size=A.shape[1])))
    return A, b, lam, z0


@examples(max_examples=200)
@given(degenerate())
def test_homotopy_solves_degenerate_problems_cold_and_warm(problem):
    A, b, lam, z0 = problem
    assert_solved(A, b, lam, recover(A, b, lam))
    assert_solved(A, b, lam, recover(A, b, lam, z0=z0))


@examples(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.sampled_from(WIDTHS), st.floats(-4, 1), st.floats(-6, -2))
def test_any_warm_start_gives_the_same_code(seed, n, log_size, log_lam):
    rng = np.random.default_rng(seed)
    A, b = draw(rng, n=n, size=10.0**log_size)
    lam = 10.0**log_lam
    cold = recover(A, b, lam)
    starts = [cold.z, recover(A, rng.standard_normal(7), lam).z, rng.standard_normal(n), A[0]]
    for i in cold.z.nonzero()[0]:  # with a wrong sign, or without a column
        starts += [np.where(np.arange(n) == i, value, cold.z) for value in (-cold.z[i], 0.0)]
    for z0 in starts:
        warm = recover(A, b, lam, z0=z0)
        assert_solved(A, b, lam, warm)
        assert np.allclose(warm.z, cold.z, rtol=1e-6, atol=1e-8 * np.abs(cold.z).max())


def test_a_warm_start_with_the_optimal_support_takes_one_linear_solve():
    rng = np.random.default_rng(8)
    same_support = 0
    for k in range(100):
        A, b = draw(rng, n=WIDTHS[k % 4], size=1.0)
        last = recover(A, b)
        b = b + 6e-4 * rng.choice([-1.0, 1.0], 7)
        cold, warm = recover(A, b), recover(A, b, z0=last.z)
        assert np.allclose(cold.z, warm.z, rtol=1e-9, atol=1e-12)
        if (np.sign(cold.z) == np.sign(last.z)).all():
            same_support += 1
            assert warm.n_iter == 1 < cold.n_iter
    assert same_support >= 80


# ------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("solver", NUMPY_SOLVERS)
def test_the_code_is_zero_exactly_from_lam_max_on(solver):
    rng = np.random.default_rng(9)
    A, b = draw(rng, n=21, size=1e-3)
    zero = np.zeros(7)
    lam_max = np.abs(A.T @ b).max()
    for problem in ((A, b, lam_max), (A, b, 5.0), (A, zero, 1e-5), (A, zero, 0.0), (0 * A, b, 0.0)):
        solution = recover(*problem, solver=solver, z0=rng.standard_normal(21))
        assert solution == (solution.z, 0.0, 0, True, solver)
        assert solution.z.shape == (21,) and not solution.z.any()
    solution = recover(A, b, (1 - 1e-9) * lam_max, solver)
    assert solution.z.nonzero()[0].tolist() == [np.abs(A.T @ b).argmax()]


def test_without_penalty_the_code_is_the_least_squares_fit_with_the_smallest_l1_norm():
    linprog = pytest.importorskip("scipy.optimize").linprog
    rng = np.random.default_rng(11)
    for _ in range(60):
        A, b, _ = integer_problem(rng)
        solution = recover(A, b, 0.0)
        fit = A @ np.linalg.lstsq(A, b, rcond=None)[0]
        assert np.allclose(A @ solution.z, fit, atol=1e-9)
        # z = positive part - negative part
        least = linprog(np.ones(2 * A.shape[1]), A_eq=np.hstack([A, -A]), b_eq=fit)
        assert least.status == 0 and np.abs(solution.z).sum() <= least.fun + 1e-8


def test_arguments_are_converted_but_not_modified():
    rng = np.random.default_rng(14)
    A, b = draw(rng, n=14, size=1.0)
    z0 = rng.standard_normal(14)
    before = A.copy(), b.copy(), z0.copy()
    for solver in NUMPY_SOLVERS:
        assert recover(A, b, 0.1, solver, z0).z is not z0
    assert all((x == y).all() for x, y in zip((A, b, z0), before, strict=True))
    assert (recover(A.tolist(), tuple(b)).z == recover(A, b).z).all()
    assert recover(A.astype(np.float32), b).z.dtype == np.float64
    assert recover([[1, 0], [0, 2]], [3, 4], 1).z.tolist() == pytest.approx([2.0, 1.75])


# ------------------------------------------------------------------------------ first order


def after(k, A, b, lam, solver, z0=None, support_steps=True):
    """Return the result of at most k steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ista, "MAX_ITER", k)
        if not support_steps:
            patch.setattr(ista, "STABLE_STEPS", math.inf)
        return recover(A, b, lam, solver, z0)


def assert_solved_by_steps(A, b, lam, solver, solution):
    assert solution.converged is True and solution.solver == solver
    scale = 0.5 * (b @ b)
    assert duality_gap(A, b, solution.z, lam) <= 1.01e-9 * scale
    exact = objective(A, b, recover(A, b, lam).z, lam)
    assert objective(A, b, solution.z, lam) >= exact - 1e-12 * scale
    assert violation(A, b, lam, solution.z) <= 1e-4
    assert not np.signbit(solution.z[solution.z == 0.0]).any()


@pytest.mark.parametrize("solver", FIRST_ORDER)
@examples(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(WIDTHS), st.floats(-3, 0), st.floats(-6, -2))
def test_first_order_solvers_reach_the_optimum(solver, seed, n, log_size, log_lam):
    rng = np.random.default_rng(seed)
    A, b = draw(rng, n=n, size=10.0**log_size)
    lam = 10.0**log_lam
    for z0 in (None, recover(A, b + 1e-3 * rng.random(7), lam).z, rng.standard_normal(n)):
        assert_solved_by_steps(A, b, lam, solver, recover(A, b, lam, solver, z0))


@pytest.mark.parametrize("solver", FIRST_ORDER)
@examples(max_examples=60)
@given(degenerate())
def test_first_order_solvers_reach_the_optimum_of_degenerate_problems(solver, problem):
    A, b, lam, z0 = problem
    for start in (None, z0):
        assert_solved_by_steps(A, b, lam, solver, recover(A, b, lam, solver, start))


@examples(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from(WIDTHS), st.floats(-5, 0))
def test_ista_descends_at_its_theoretical_rate(seed, n, log_lam):
    rng = np.random.default_rng(seed)
    A, b = draw(rng, n=n, size=1.0)
    lam = 10.0**log_lam
    for z0 in (np.zeros(n), rng.standard_normal(n)):
        iterates = [after(k, A, b, lam, "ista", z0).z for k in range(1, 40)]
        values = np.array([objective(A, b, z, lam) for z in (z0, *iterates)])
        assert (np.diff(values) <= 1e-14 * values[0]).all()
    best = recover(A, b, lam).z
    bound = 0.5 * np.linalg.norm(A, 2) ** 2 * np.sum(best**2)
    for k in (1, 10, 100):
        z = after(k, A, b, lam, "ista", support_steps=False).z
        assert objective(A, b, z, lam) - objective(A, b, best, lam) <= bound / k + 1e-12


@pytest.mark.parametrize("solver", FIRST_ORDER)
def test_first_order_solvers_report_too_few_steps(solver):
    A, b = draw(np.random.default_rng(17), n=28, size=1.0)
    for k in (1, 5, 20):
        solution = after(k, A, b, 1e-5, solver)
        assert solution.converged is False and solution.n_iter == k and solution.gap > 1e-9
        assert solution.gap == pytest.approx(duality_gap(A, b, solution.z, 1e-5) / (0.5 * (b @ b)))
        assert recover(A, b, 1e-5, solver, z0=solution.z).converged


# ------------------------------------------------------------------------------ other solvers


def test_a_new_solver_gets_the_scaled_problem(monkeypatch):
    rng = np.random.default_rng(32)
    calls, z0 = [], np.arange(21.0)

    def new_solver(*problem):
        calls.append(problem)
        return SOLVERS["homotopy"](*problem[:3], None)

    monkeypatch.setitem(SOLVERS, "new", new_solver)
    for scale in (2.0**-30, 1.0, 3.7, 2.0**20):
        A, b = draw(rng, n=21, size=1e-3)
        solution = recover(scale * A, b, 1e-5 * scale, "new", z0=z0)
        assert solution.converged and solution.solver == "new"
        assert (solution.z == recover(scale * A, b, 1e-5 * scale).z).all()
        scaled_A, scaled_b, scaled_lam, scaled_z0 = calls[-1]
        lam_max = np.abs(scaled_A.T @ scaled_b).max()
        assert 0.5 <= np.abs(scaled_A).max() < 1.0 and 0.5 <= lam_max < 1.0
        assert scaled_lam / lam_max == pytest.approx(1e-5 / np.abs(A.T @ b).max(), rel=1e-12)
        assert np.allclose(scaled_A @ scaled_z0 / scaled_b, scale * A @ z0 / b, rtol=1e-12)


@pytest.mark.parametrize("change", [
    lambda z: (z, 0, False), lambda z: (z / 2, 0, True), lambda z: (z * math.nan, 0, True),
])
def test_a_wrong_solution_has_not_converged(monkeypatch, change):
    A, b = draw(np.random.default_rng(33), n=21, size=1.0)
    monkeypatch.setitem(SOLVERS, "wrong", lambda *args: change(SOLVERS["homotopy"](*args)[0]))
    assert recover(A, b, solver="wrong").converged is False


def test_homotopy_agrees_with_clarabel(capfd):
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    rng = np.random.default_rng(19)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(24):
            A, b = draw(rng, n=WIDTHS[k % 4], size=(1e-3, 1e-1, 1.0)[k % 3])
            lam = 1e-5 if k < 12 else 1e-8
            exact, other = recover(A, b, lam), recover(A, b, lam, "clarabel")
            assert other.converged is True and other.n_iter > 0
            assert objective(A, b, exact.z, lam) <= objective(A, b, other.z, lam) * (1 + 1e-9)
            assert np.abs(exact.z - other.z).max() <= 1e-8 * np.abs(exact.z).max()
        assert np.allclose(A @ recover(A, b, 0.0, "clarabel").z, b, atol=1e-8)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------ errors

GOOD_A, GOOD_B = np.ones((3, 5)), np.ones(3)


@pytest.mark.parametrize("A, b, z", [
    (GOOD_A, np.ones(4), None), (GOOD_A[0], GOOD_B, None), (np.ones((3, 0)), GOOD_B, None),
    (GOOD_A * math.nan, GOOD_B, None), (GOOD_A, GOOD_B * -math.inf, None),
    (GOOD_A, GOOD_B, np.ones(4)), (GOOD_A, GOOD_B, np.ones(5) * math.nan),
])
def test_wrong_arrays_are_rejected(A, b, z):
    code = np.ones(5) if z is None else z
    for function, args in (recover, (A, b, 0.1, "ista", z)), (duality_gap, (A, b, code, 0.1)):
        with pytest.raises(ValueError, match=r"\(.*\)"):  # names a shape
            function(*args)


@pytest.mark.parametrize("lam", [-1e-9, math.nan, math.inf])
def test_a_wrong_lam_is_rejected(lam):
    with pytest.raises(ValueError, match="lam"):
        recover(GOOD_A, GOOD_B, lam)
    with pytest.raises(ValueError, match="lam"):
        objective(GOOD_A, GOOD_B, np.ones(5), lam)


def test_an_unknown_solver_is_rejected():
    with pytest.raises(ValueError, match="osqp.*homotopy"):
        recover(GOOD_A, GOOD_B, solver="osqp")


@pytest.mark.parametrize("solver, package", [("mosek", "cvxpy"), ("clarabel", "clarabel")])
def test_a_missing_package_is_named(solver, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", types.ModuleType("cvxpy"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SolverUnavailable, match=f"pip install {package}.*homotopy"):
        recover(GOOD_A, GOOD_B, 0.1, solver)


def test_mosek_without_a_license_is_unavailable(monkeypatch):
    mosek = MagicMock(Error=OSError)
    mosek.Env.return_value.__enter__.return_value.checkoutlicense.side_effect = OSError("a\nb")
    monkeypatch.setitem(sys.modules, "mosek", mosek)
    monkeypatch.setitem(sys.modules, "cvxpy", types.ModuleType("cvxpy"))
    with pytest.raises(SolverUnavailable, match="MOSEKLM_LICENSE_FILE.*homotopy"):
        recover(GOOD_A, GOOD_B, 0.1, "mosek")


def test_mosek_solves_a_problem_or_lacks_only_the_license(monkeypatch):
    cvxpy, mosek = pytest.importorskip("cvxpy"), pytest.importorskip("mosek")
    A, b = draw(np.random.default_rng(22), n=28, size=1.0)
    try:
        assert recover(A, b, 1e-3, "mosek").gap <= 1e-6
    except SolverUnavailable:
        # Skip our check of the license. MOSEK checks the parameters before the license.
        modules = {"cvxpy": cvxpy, "mosek": MagicMock(Error=OSError)}
        monkeypatch.setattr(ista, "_import", lambda package, solver: modules[package])
        with pytest.raises(mosek.Error, match="[Ll]icense"):
            recover(A, b, 1e-3, "mosek")
