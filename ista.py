"""LASSO solvers: the sparse-coding step of ISTA-NAS (Yang et al., NeurIPS 2020), in numpy.

Given a dictionary A (m, n) and a point b (m,), compute the code

    z = argmin_z  P(z),     P(z) = 1/2 ||A z - b||^2 + lam ||z||_1.

`recover` offers five solvers (docs/speed.md has their times):

    homotopy   The default. Exact to rounding. It follows the solution path in lam, which has about
               10 breakpoints in a search.
    ista       Proximal gradient, the method that gives ISTA-NAS its name. Gradient steps find the
               support, and Newton steps on the support converge: about 50 steps, or 1 step from a
               warm start.
    fista      ista with momentum, for dictionaries larger than those of a search.
    mosek      Interior point through CVXPY, as in the original experiments. Needs a license.
    clarabel   Interior point through CVXPY, free. An independent check.

To add a solver, write a function and enter it in `SOLVERS`, where its interface is described.

>>> import numpy as np
>>> from ista import recover
>>> rng = np.random.default_rng(0)
>>> A, b = rng.random((7, 14)), 1e-3 * rng.standard_normal(7)
>>> solution = recover(A, b, lam=1e-5)
>>> support = np.argsort(-np.abs(solution.z), kind="stable")[:2]
>>> again = recover(A, 0.999 * b, lam=1e-5, z0=solution.z)   # warm start: one linear solve
"""

import contextlib
import importlib
import io
import math
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-9  # relative duality gap at which a solution counts as converged
MAX_ITER = 10_000  # of ista and fista
STABLE_STEPS = 5  # steps of ista and fista without a change of signs, before a support step
RIDGE = 1e-12  # of _support_step, relative to L; at 1e-8 some problems take 100 times the steps
SYSTEM_SCALE = 1e-3  # of _solve_on_support; small next to A, whose largest entry is in [1/2, 1)
DEPENDENCE_TOLERANCE = 1e-9  # relative residual at which a column counts as dependent on others
TINY = 1e-300  # replaces a zero divisor
SOLVERS_HINT = "homotopy, ista and fista need neither package nor license"

# This file uses `dot` and `argmax`: for arrays this small they take half the time of `@` and `max`.


class Solution(NamedTuple):
    """A code, and how accurately it solves its problem."""

    z: np.ndarray    # float64, (n,)
    gap: float       # duality_gap / (1/2 ||b||^2), or 0 if b = 0: bounds the relative suboptimality
    n_iter: int      # linear solves (homotopy), gradient and support steps, interior-point steps
    converged: bool  # gap <= TOLERANCE; homotopy also checks the optimality conditions
    solver: str


class SolverUnavailable(RuntimeError):
    """The package or the license of a solver is missing; the one-line message names it."""


# ------------------------------------------------------------------------------ the problem


def soft_threshold(v, t):
    """Proximal operator of t ||.||_1: sign(v) max(|v| - t, 0), elementwise.

    Parameters
    ----------
    v : array_like
    t : float or array_like, >= 0

    Returns
    -------
    ndarray
        Entries with |v| <= t become exactly +0.0.
    """
    v = np.asarray(v)
    return v - np.minimum(np.maximum(v, -t), t) + 0.0  # + 0.0 turns -0.0, possible at t = 0, to 0.0


def objective(A, b, z, lam):
    """Primal objective P(z) = 1/2 ||A z - b||^2 + lam ||z||_1 (absolute).

    Parameters
    ----------
    A, b, z : array_like, shapes (m, n), (m,), (n,)
    lam : float, >= 0

    Raises
    ------
    ValueError
        As `recover`.
    """
    A, b, lam, z, _ = _validate(A, b, lam, z)
    r = b - A.dot(z)
    return float(0.5 * r.dot(r) + lam * np.abs(z).sum())


def duality_gap(A, b, z, lam):
    """Duality gap P(z) - D(theta) (absolute, never negative): an upper bound of P(z) - min P.

    The dual problem is to maximize D(theta) = 1/2 ||b||^2 - 1/2 ||b - theta||^2 subject to
    ||A^T theta||_inf <= lam. With r = b - A z and c = A^T r, the scaled residual theta = alpha r,
    alpha = min(1, lam / ||c||_inf), is feasible. For lam = 0 the feasible set is the null space of
    A^T, and theta is the projection of r onto it.

    Parameters and errors are those of `objective`.
    """
    A, b, lam, z, _ = _validate(A, b, lam, z)
    return _gap(A, b, z, lam)


def _gap(A, b, z, lam):
    r = b - A.dot(z)
    if lam == 0.0:
        # r - theta is the projection of r onto the range of A, and P - D = 1/2 ||r - theta||^2.
        fitted = A.dot(np.linalg.lstsq(A, r, rcond=None)[0])
        return float(0.5 * fitted.dot(fitted))
    c = A.T.dot(r)
    alpha = lam / max(_max_abs(c), lam)
    # P - D, with b^T r = r^T r + z^T c substituted. Up to rounding no term is negative, so that a
    # small gap does not suffer from cancellation between two large numbers.
    gap = 0.5 * (1.0 - alpha) ** 2 * r.dot(r) + z.dot(np.copysign(lam, z) - alpha * c)
    return max(float(gap), 0.0)  # returns nan if gap is nan, which max(0.0, gap) would not


def _max_abs(x):
    """||x||_inf, which is nan or inf if an entry is."""
    magnitude = np.abs(x)
    return magnitude.item(magnitude.argmax())  # faster than max() for small arrays


def _validate(A, b, lam, z):
    """Convert the arguments, and also return the largest |entry| of A."""
    A, b = np.asarray(A, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if A.ndim != 2 or b.shape != A.shape[:1] or A.size == 0:
        raise ValueError(f"A must be (m, n) and b (m,), m, n >= 1; got {A.shape} and {b.shape}")
    max_A = _max_abs(A)
    if not (math.isfinite(max_A) and math.isfinite(_max_abs(b))):
        raise ValueError(f"A {A.shape} and b {b.shape} must be finite")
    lam = float(lam)
    if not 0.0 <= lam < math.inf:
        raise ValueError(f"lam must be finite and >= 0; got {lam}")
    if z is not None:
        z = np.asarray(z, dtype=np.float64)
        if z.shape != A.shape[1:]:
            raise ValueError(f"a code for A {A.shape} must be {A.shape[1:]}; got {z.shape}")
        if not math.isfinite(_max_abs(z)):
            raise ValueError(f"the code {z.shape} must be finite")
    return A, b, lam, z, max_A


# ------------------------------------------------------------------------------ homotopy
#
# Let r = b - A z. A code z is optimal if and only if
#
#     A_j^T r = lam sign(z_j)  for j on the support of z,     |A_j^T r| <= lam  for all other j.


def _homotopy(A, b, lam, z0):
    """Solve exactly: find a support from the warm start or the path, then correct it if necessary.

    `_active_set` first solves on the support that it is given, and checks the optimality
    conditions. If the support of z0 is still optimal, this one linear solve is all. Otherwise
    `_path` supplies the support. Ties (several columns that join or leave at the same lam) can make
    the path end at a wrong support, which `_active_set` corrects with a few more solves.
    """
    n_iter = 0
    if z0 is not None and 0 < np.count_nonzero(z0) <= A.shape[0]:
        z, n_iter, solved = _active_set(A, b, lam, z0, only_if_near=True)
        if solved:
            return z, n_iter, True
    z, n_path = _path(A, b, lam)
    z, n_more, solved = _active_set(A, b, lam, z)
    return z, n_iter + n_path + n_more, solved


def _solve_on_support(A, b, S, s):
    """Solve the optimality conditions on a support S with signs s, for all lam at once.

    With the k columns A_S linearly independent, the conditions

        A_S z_S + r = b,     A_S^T r = lam s

    have a unique solution (z_S, r), which is linear in lam. Returns its coefficients, arrays
    Z (k, 2) and R (m, 2):

        z_S = Z[:, 0] + lam Z[:, 1],     r = R[:, 0] + lam R[:, 1].

    If elimination finds A_S singular, it raises LinAlgError. Near singularity may go unnoticed, and
    the result can be inaccurate.
    """
    # With sigma = SYSTEM_SCALE, solve both conditions as one symmetric system:
    #
    #     [ sigma I   A_S ] [ r / sigma ]   [       b       ]
    #     [ A_S^T      0  ] [    z_S    ] = [ lam s / sigma ]
    #
    # sigma does not change the solution. It is small, so that elimination takes its pivots from
    # A_S and not from the identity (Björck, BIT 1967). Pivots from the identity would lead to the
    # normal equations, which square the condition number of A_S (1e3 and more for 7 x 7).
    # In numpy, one LU decomposition also takes half the time of a QR decomposition or an SVD.
    m, k = len(b), len(S)
    order = m + k
    K, rhs = np.zeros((order, order)), np.zeros((order, 2))
    A_S = A.take(S, axis=1)
    K[:m, m:] = A_S
    K[m:, :m] = A_S.T
    K.flat[: m * order : order + 1] = SYSTEM_SCALE  # the first m entries of the diagonal
    rhs[:m, 0], rhs[m:, 1] = b, s / SYSTEM_SCALE
    solution = np.linalg.solve(K, rhs)
    return solution[m:], SYSTEM_SCALE * solution[:m]


def _path(A, b, lam):
    """Follow the piecewise linear solution path z(mu) from mu = lam_max down to mu = lam.

    (Osborne, Presnell, Turlach, IMA J. Numer. Anal. 2000; as LARS: Efron et al., Ann. Stat. 2004.)

    Between breakpoints, z_S = p + mu d on the support, and c = A^T r = a + mu g. As mu decreases,
    the next breakpoint is the largest mu of these:

        Column j joins when |c_j| = mu. The line c_j ends in a_j at mu = 0, where the bounds +mu and
        -mu meet. So it crosses the bound that has the sign of a_j, at
        mu = |a_j| / (1 - sign(a_j) g_j).

        Column i leaves when z_i = 0, at mu = |p_i| / |d_i|. This happens only if the sign that z_i
        would have at mu = 0, sign(p_i), differs from its sign now.

    The rules depend on the support alone, and not on which column joined or left last.

    Returns z and the number of linear solves. With ties, the path can stop early or end at a code
    that is not optimal, so the caller must check the result.
    """
    m, n = A.shape
    z, s = np.zeros(n), np.zeros(n)
    c = A.T.dot(b)
    joining = np.abs(c).argmax()
    s[joining], mu = np.sign(c[joining]), abs(c[joining])
    noise = 1e-13 * mu  # a_j of a column that depends on the support is 0 up to rounding
    n_iter = 0
    while n_iter < 4 * (m + n):  # usual paths take about 1.5 m; ties can make a path cycle
        n_iter += 1
        S = s.nonzero()[0]
        try:
            Z, R = _solve_on_support(A, b, S, s[S])
        except np.linalg.LinAlgError:
            break

        a, g = A.T.dot(R).T
        magnitude, rate = np.abs(a), 1.0 - np.sign(a) * g
        magnitude[S] = 0.0  # these columns are on the support already
        # rate <= 0 means that the column is beyond its bound, because the path has missed its
        # breakpoint. Division by TINY makes it join now.
        join_at = np.where(magnitude > noise, magnitude / np.maximum(rate, TINY), 0.0)
        joining = join_at.argmax()
        leaving, mu_next = None, join_at[joining]

        can_leave = (s[S] * Z[:, 0] < 0.0).nonzero()[0]
        if can_leave.size:
            p, d = np.abs(Z[can_leave]).T
            leave_at = p / np.maximum(d, TINY)
            if leave_at.max() > mu_next:
                leaving, mu_next = S[can_leave[leave_at.argmax()]], leave_at.max()

        mu = min(mu, mu_next)
        z[S] = Z[:, 0] + max(mu, lam) * Z[:, 1]
        if mu <= lam:
            break
        if leaving is None:
            s[joining] = np.sign(a[joining])
        else:
            z[leaving] = s[leaving] = 0.0
    return z, n_iter


def _active_set(A, b, lam, z, only_if_near=False):
    """Minimize P from z by an active-set method on the pair (support, signs).

    (Feature-sign search: Lee, Battle, Raina, Ng, NeurIPS 2006, with a rule for dependent columns.)

    Each iteration minimizes P on the support with the signs fixed:

    1. If an entry would change its sign, move only until the first entry reaches zero, and remove
       it from the support.
    2. Otherwise, if all columns satisfy |A_j^T r| <= lam, z is optimal.
    3. Otherwise add the column that violates this bound most. If it depends linearly on the
       support, first move along the null vector of the enlarged support: A z is constant there and
       ||z||_1 decreases. Stop when an entry reaches zero, and remove it. This keeps the columns of
       the support independent.

    Termination: P never increases, and decreases strictly between two visits to 2, so in exact
    arithmetic no pair (support, signs) occurs twice there. If one does, progress is below rounding,
    and the method stops.

    Far from the optimum this takes more solves than the path. With `only_if_near` it gives up if
    two or more signs would change in the first solve.

    Returns z, the number of linear solves, and whether z satisfies the optimality conditions to
    within `slack`, with all signs correct.
    """
    n, s = A.shape[1], np.sign(z)
    slack = 1e-9 * lam + 1e-12  # lam_max is in [1/2, 1), so A^T r is accurate to 12 digits
    visited, n_iter, solved = set(), 0, False
    while True:
        n_iter += 1
        S = s.nonzero()[0]
        s_S = s[S]
        try:
            Z, _ = _solve_on_support(A, b, S, s_S)
        except np.linalg.LinAlgError:
            break
        target = np.zeros(n)
        target[S] = Z[:, 0] + lam * Z[:, 1]
        crossing = S[target[S] * s_S <= 0.0]
        if only_if_near and n_iter == 1 and crossing.size > 1:
            break
        if crossing.size:
            z = _move_to_first_zero(z, s, target - z, crossing)
            continue

        z = target
        c = A.T.dot(b - A.dot(z))
        magnitude = np.abs(c)
        j = magnitude.argmax()
        if magnitude[j] <= lam + slack:
            # Each s_i c_i is at most lam. If their sum is |S| lam, each of them equals lam.
            solved = bool(s.dot(c) >= len(S) * (lam - slack))
            break
        if s[j] or s.tobytes() in visited:
            break
        visited.add(s.tobytes())

        # Column j joins. With A_j for b, Z[:, 0] and R[:, 0] are its least-squares fit by A_S.
        sign = np.sign(c[j])
        n_iter += 1
        Z, R = _solve_on_support(A, A[:, j], S, s_S)
        if np.linalg.norm(R[:, 0]) <= DEPENDENCE_TOLERANCE * np.linalg.norm(A[:, j]):
            null = np.zeros(n)
            null[S], null[j] = -sign * Z[:, 0], sign
            shrinking = (s * null < 0.0).nonzero()[0]
            if not shrinking.size:
                break
            z = _move_to_first_zero(z, s, null, shrinking)
        s[j] = sign
    return z, n_iter, solved


def _move_to_first_zero(z, s, direction, entries):
    """Move z along `direction` until an entry of `entries` is 0, and set its sign in s to 0."""
    steps = np.abs(z[entries]) / np.maximum(np.abs(direction[entries]), TINY)
    i = entries[steps.argmin()]
    z = z + steps.min() * direction
    z[i] = s[i] = 0.0
    return z


# ------------------------------------------------------------------------------ first order


def _proximal_gradient(A, b, lam, z0, momentum):
    """Iterate z <- soft_threshold(y - A^T (A y - b) / L, lam / L), with L = ||A||_2^2.

    ISTA sets y = z, the last iterate. FISTA extrapolates y beyond z (Beck, Teboulle, SIAM J.
    Imaging Sci. 2009), and restarts when this momentum points uphill (O'Donoghue, Candès, Found.
    Comput. Math. 2015). With ISTA the objective never increases; with FISTA it can.

    By themselves these steps converge slowly, because the condition number of A_S^T A_S is 1e6 and
    more: in 10,000 steps, ISTA solves 1 of 100 problems of a search. So when the signs of z have
    been stable for `STABLE_STEPS` steps, `_support_step` moves to the minimum for these signs
    (FPC_AS: Wen, Yin, Goldfarb, Zhang, SIAM J. Sci. Comput. 2010). From there on, only columns with
    |A_j^T r| > lam join. A warm start begins with a step on its own support.

    FPC_AS also uses continuation in lam. It took 1.3 to 2 times as many steps and is not used here.
    """
    L = np.linalg.norm(A, 2) ** 2
    gap_tolerance = TOLERANCE * 0.5 * b.dot(b)
    z, stable = (np.zeros(A.shape[1]), 0) if z0 is None else (z0, STABLE_STEPS)
    y, t, n_iter = z, 1.0, 0
    while n_iter < MAX_ITER:
        n_iter += 1
        if stable >= STABLE_STEPS:
            z, took_full_step = _support_step(A, b, lam, z, RIDGE * L)
            y, t = z, 1.0
            if took_full_step:
                if _gap(A, b, z, lam) <= gap_tolerance:
                    break
                stable = 0
            continue
        z_last = z
        z = soft_threshold(y + A.T.dot(b - A.dot(y)) / L, lam / L)
        if not momentum or (y - z).dot(z - z_last) > 0.0:  # y - z is the gradient, up to a factor
            y, t = z, 1.0
        else:
            t_last, t = t, 0.5 + math.sqrt(0.25 + t * t)
            y = z + (t_last - 1.0) / t * (z - z_last)
        stable = stable + 1 if (np.sign(z) == np.sign(z_last)).all() else 0
    return z, n_iter, True


def _support_step(A, b, lam, z, ridge):
    """Take a Newton step on the support S of z with the signs s fixed, followed by a line search.

    Let x = z_S. With fixed signs, P is the quadratic 1/2 ||A_S x - b||^2 + lam s^T x, and the step
    d solves

        (A_S^T A_S + ridge I) d = A_S^T (b - A_S x) - lam s.

    If the columns of A_S are dependent, the ridge makes the system solvable, and d can move along
    their null space, where ||x||_1 decreases. An entry that would change its sign stops at zero
    (OWL-QN: Andrew, Gao, ICML 2007).

    The line search compares the full step with all shorter steps at which an entry reaches zero,
    and takes the one with the least objective. P decreases up to the shortest of them, so P never
    increases.

    Returns z and whether the full step was best. If no entry stopped, z is then the minimum of P
    for these signs.
    """
    S = z.nonzero()[0]
    x, A_S = z[S], A.take(S, axis=1)
    H = A_S.T.dot(A_S)
    H.flat[:: len(S) + 1] += ridge  # on the diagonal
    d = np.linalg.solve(H, A_S.T.dot(b - A_S.dot(x)) - np.copysign(lam, x))

    # The step length at which each entry reaches zero; negative if the entry moves away from zero.
    with np.errstate(divide="ignore", over="ignore"):
        zero_at = -x / d
    stops = zero_at[(0.0 < zero_at) & (zero_at < 1.0)]
    lengths = np.concatenate(([1.0], stops))[:, None]

    # One candidate per row. An entry that has reached zero stays there.
    nonzero = (zero_at <= 0.0) | (lengths < zero_at)
    candidates = np.where(nonzero, x + lengths * d, 0.0)
    residuals = b - candidates.dot(A_S.T)
    objectives = 0.5 * (residuals * residuals).sum(axis=1) + lam * np.abs(candidates).sum(axis=1)
    best = objectives.argmin()

    z = np.zeros(len(z))
    z[S] = candidates[best]
    return z, best == 0


# ------------------------------------------------------------------------------ interior point


def _mosek(A, b, lam, z0):
    """Solve with MOSEK through CVXPY; needs a license. z0 is not used."""
    cvxpy, mosek = _import("cvxpy", "mosek"), _import("mosek", "mosek")
    try:
        with mosek.Env() as env:
            env.checkoutlicense(mosek.feature.pton)
    except mosek.Error:
        raise SolverUnavailable(
            "no MOSEK license in ~/mosek/mosek.lic or at the path in "
            f"MOSEKLM_LICENSE_FILE; {SOLVERS_HINT}, clarabel needs no license"
        ) from None
    names = ("PFEAS", "DFEAS", "REL_GAP", "MU_RED")
    params = {f"MSK_DPAR_INTPNT_CO_TOL_{name}": 1e-12 for name in names}
    return _interior_point(cvxpy, A, b, lam, "MOSEK", mosek_params=params)


def _clarabel(A, b, lam, z0):
    """Solve with Clarabel through CVXPY; free. z0 is not used."""
    cvxpy, _ = _import("cvxpy", "clarabel"), _import("clarabel", "clarabel")
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    return _interior_point(cvxpy, A, b, lam, "CLARABEL", **tolerances)


def _import(package, solver):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(package)
    except ImportError:
        raise SolverUnavailable(
            f"solver {solver!r} needs the package {package} (pip install {package}); {SOLVERS_HINT}"
        ) from None


def _interior_point(cvxpy, A, b, lam, name, **options):
    z = cvxpy.Variable(A.shape[1])
    loss = 0.5 * cvxpy.sum_squares(A @ z - b)
    # Minimize P / lam. At the optimum, P is of the order of lam ||z||_1, which can be smaller than
    # the solver's absolute tolerances, even though these are set far below their defaults.
    problem = cvxpy.Problem(cvxpy.Minimize(loss / lam + cvxpy.norm1(z) if lam > 0.0 else loss))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.suppress(cvxpy.SolverError):
            problem.solve(solver=name, **options)
    if z.value is None:
        return np.zeros(A.shape[1]), 0, False
    return np.asarray(z.value), int(problem.solver_stats.num_iters or 0), True


# ------------------------------------------------------------------------------ recovery


# `recover` calls a solver as
#
#     solve(A, b, lam, z0) -> z, n_iter, solved
#
# The problem is scaled by powers of two, which is exact, so that the largest |entry| of A and
# lam_max = ||A^T b||_inf lie in [1/2, 1). 0 <= lam < lam_max. z0 is None or a code in this scale.
# All arrays are float64; a solver must not write to them. A solver returns
#
#     z        float64 (n,), in the same scale
#     n_iter   int, for information
#     solved   False if the solver knows that it failed; `recover` checks the gap of z in any case
#
# and raises SolverUnavailable if a package or a license is missing.
SOLVERS = {
    "homotopy": _homotopy,
    "ista": partial(_proximal_gradient, momentum=False),
    "fista": partial(_proximal_gradient, momentum=True),
    "mosek": _mosek,
    "clarabel": _clarabel,
}


def recover(A, b, lam=1e-5, solver="homotopy", z0=None):
    """Sparse code of b in the dictionary A: argmin_z 1/2 ||A z - b||^2 + lam ||z||_1.

    Parameters
    ----------
    A : array_like, shape (m, n)
        Dictionary of any rank; columns may be equal or zero.
    b : array_like, shape (m,)
    lam : float, >= 0
        If lam >= lam_max = ||A^T b||_inf, the code is exactly 0. At lam = 0 every least-squares
        solution is optimal; homotopy from a cold start returns one of least l1 norm, the end of its
        path.
    solver : {"homotopy", "ista", "fista", "mosek", "clarabel"}, or another name in `SOLVERS`
    z0 : array_like, shape (n,), optional
        Warm start, any vector. homotopy, ista and fista first try its support and signs; mosek and
        clarabel ignore it.

    Returns
    -------
    Solution
        If the solver does not converge, `converged` is False; no exception is raised.

    Raises
    ------
    ValueError
        Wrong shape or non-finite entries of A, b or z0; negative or non-finite lam; unknown solver.
    SolverUnavailable
        mosek or clarabel without its package, or mosek without a license, unless the code is 0.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose from {', '.join(SOLVERS)}")
    A, b, lam, z0, max_A = _validate(A, b, lam, z0)
    lam_max = _max_abs(A.T.dot(b))
    if lam >= lam_max:
        return Solution(np.zeros(A.shape[1]), 0.0, 0, True, solver)

    # Scaling by powers of two is exact.
    scale_A = 2.0 ** math.frexp(max_A)[1]
    scale_b = 2.0 ** math.frexp(lam_max / scale_A)[1]
    A, b, lam = A / scale_A, b / scale_b, lam / (scale_A * scale_b)
    z0 = None if z0 is None else z0 * (scale_A / scale_b)
    z, n_iter, solved = SOLVERS[solver](A, b, lam, z0)
    gap = _gap(A, b, z, lam) / (0.5 * float(b.dot(b)))
    converged = bool(solved and gap <= TOLERANCE)
    return Solution(z * (scale_b / scale_A), gap, n_iter, converged, solver)
