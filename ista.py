"""LASSO solvers: the sparse-coding step of ISTA-NAS (Yang et al., NeurIPS 2020), in numpy.

Given a dictionary A (m, n) and a point b (m,), recover the code

    z = argmin_z  P(z),     P(z) = 1/2 ||A z - b||^2 + lam ||z||_1.

`recover` offers five solvers of this one problem:

    homotopy   exact to rounding, and the default: it follows the solution path in lam, which has
               about 10 breakpoints in a search. 0.2 ms a code from a cold start, 0.04 warm.
    ista       proximal gradient, the method of the name: gradient steps find the support, a step
               on the support ends there. 50 steps, 0.8 ms; warm most often 1 step, 0.1 ms.
    fista      ista with momentum: for dictionaries larger than those of a search. For 200 x 1000
               Gaussian entries and lam_max / lam = 10 it takes 20 ms, ista 37, homotopy 291.
    mosek      interior point through CVXPY, as in the original experiments; needs a licence.
    clarabel   interior point through CVXPY, free: a check by other people's code. 5 ms.

(Medians on one core of an Intel Xeon over 2,000 problems of a search, for clarabel 41: 7 x 14 to
7 x 35, lam = 1e-5, ||b|| from 1e-3 to 1, so that lam_max = ||A^T b||_inf, the least lam whose code
is 0, is 1e-3 to 6. All codes had a relative gap within 1e-9; from a cold start homotopy, ista and
fista found the same 2,000 supports. 200 x 1000: means of 10.)

Another solver takes two edits: write a function, and add it to `SOLVERS`, where it is said what
the function is given and returns.

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
REST = 5  # steps of ista and fista over which the signs rest before a step on the support
RIDGE = 1e-12  # of _support_step, relative to L; at 1e-8 some problems take 100 times the steps
DEPENDENT = 1e-9  # a column this close to the span of others, relative to its norm, is in it
TINY = 1e-300  # in place of a zero divisor
FREE = "homotopy, ista and fista need neither package nor licence"
DAMPING = 1e-3  # see _stationary; small next to A, whose largest entry is scaled to [1/2, 1)

# On arrays this small the call is what costs: dot and argmax take half the time of @ and max.


class Solution(NamedTuple):
    """A code and how well it is known to solve its problem."""

    z: np.ndarray    # float64, (n,)
    gap: float       # duality_gap / (1/2 ||b||^2), 0 when b = 0: bounds the relative suboptimality
    n_iter: int      # linear solves (homotopy), gradient and support steps, interior-point steps
    converged: bool  # gap <= TOLERANCE; for homotopy the optimality conditions were checked as well
    solver: str


class SolverUnavailable(RuntimeError):
    """The solver's package or licence is missing; the message is one line that says which."""


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
        Entries within t of zero come out as exactly +0.0.
    """
    v = np.asarray(v)
    return v - np.minimum(np.maximum(v, -t), t) + 0.0  # + 0.0 turns the -0.0 of t = 0 into 0.0


def objective(A, b, z, lam):
    """Primal objective P(z) = 1/2 ||A z - b||^2 + lam ||z||_1 (absolute). Errors as `recover`.

    Parameters
    ----------
    A, b, z : array_like, shapes (m, n), (m,), (n,)
    lam : float, >= 0
    """
    A, b, lam, z, _ = _validate(A, b, lam, z)
    r = b - A.dot(z)
    return float(0.5 * r.dot(r) + lam * np.abs(z).sum())


def duality_gap(A, b, z, lam):
    """Duality gap P(z) - D(theta) (absolute, never negative): an upper bound of P(z) - min P.

    The dual is to maximise D(theta) = 1/2 ||b||^2 - 1/2 ||b - theta||^2 subject to
    ||A^T theta||_inf <= lam. With r = b - A z and c = A^T r, the residual is shrunk into the
    feasible set: theta = alpha r, alpha = min(1, lam / ||c||_inf). For lam = 0 that set is the null
    space of A^T, and theta is the projection of r onto it. Parameters and errors as `objective`.
    """
    A, b, lam, z, _ = _validate(A, b, lam, z)
    return _gap(A, b, z, lam)


def _gap(A, b, z, lam):
    r = b - A.dot(z)
    if lam == 0.0:
        fitted = A.dot(np.linalg.lstsq(A, r, rcond=None)[0])
        return float(0.5 * fitted.dot(fitted))
    c = A.T.dot(r)
    alpha = lam / max(_largest(c), lam)
    # P - D with b^T r = r^T r + z^T c put in. No term is negative, but for rounding, so a small gap
    # is not lost in the difference of two large numbers.
    gap = 0.5 * (1.0 - alpha) ** 2 * r.dot(r) + z.dot(np.copysign(lam, z) - alpha * c)
    return max(float(gap), 0.0)  # in this order nan stays nan


def _largest(x):
    """Return ||x||_inf, which is nan or inf if an entry is."""
    size = np.abs(x)
    return size.item(size.argmax())


def _validate(A, b, lam, z):
    A, b = np.asarray(A, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if A.ndim != 2 or b.shape != A.shape[:1] or A.size == 0:
        raise ValueError(f"A must be (m, n) and b (m,), m, n >= 1; got {A.shape} and {b.shape}")
    size_A = _largest(A)
    if not (math.isfinite(size_A) and math.isfinite(_largest(b))):
        raise ValueError(f"A {A.shape} and b {b.shape} must be finite")
    lam = float(lam)
    if not 0.0 <= lam < math.inf:
        raise ValueError(f"lam must be finite and >= 0; got {lam}")
    if z is not None:
        z = np.asarray(z, dtype=np.float64)
        if z.shape != A.shape[1:]:
            raise ValueError(f"a code for A {A.shape} must be {A.shape[1:]}; got {z.shape}")
        if not math.isfinite(_largest(z)):
            raise ValueError(f"the code {z.shape} must be finite")
    return A, b, lam, z, size_A


# ------------------------------------------------------------------------------ homotopy


def _homotopy(A, b, lam, z0):
    """Exact solution: warm start or path, then an active-set method that accepts or repairs.

    At an optimum, with r = b - A z, A_j^T r = lam sign(z_j) on the support and |A_j^T r| <= lam
    off it. `_active_set` solves on the support of z0, or else of the end of the path, and moves
    only if these conditions fail. So a warm start whose support and signs are still optimal costs
    one linear solve, and a path led astray by ties (columns that join and leave at one lam) costs
    a few more instead of the answer.
    """
    n_iter = 0
    if z0 is not None and 0 < np.count_nonzero(z0) <= A.shape[0]:
        z, n_iter, solved = _active_set(A, b, lam, z0, only_if_near=True)
        if solved:
            return z, n_iter, True
    z, n_path = _path(A, b, lam)
    z, n_more, solved = _active_set(A, b, lam, z)
    return z, n_iter + n_path + n_more, solved


def _stationary(A, b, S, s):
    """Solution on support S (k columns, independent) with signs s, for every lam at once.

    The optimality conditions on S, A_S z_S + r = b and A_S^T r = lam s, are linear in (r, z_S):

        z_S = p - lam q,    p = A_S^+ b,              q = (A_S^T A_S)^-1 s,
        r   = e + lam u,    e = b - A_S p,            u = A_S q.

    They are solved as they stand, as one symmetric system of order m + k. The normal equations
    would square the condition number of A_S (1e3 and more for a 7 x 7 support) in z. So would
    elimination here if it pivoted on the identity in front of r; solving for r / DAMPING instead
    leaves entries of A_S as the pivots (Björck, BIT 1967). One LU also costs half
    of a QR or SVD in numpy.

    Returns the columns (p, -q) and (e, u), of shapes (k, 2) and (m, 2). If elimination finds A_S
    singular it raises LinAlgError; it may not find it, and the result be inaccurate.
    """
    m, k = len(b), len(S)
    K, rhs = np.zeros((m + k, m + k)), np.zeros((m + k, 2))
    K[:m, m:] = A_S = A.take(S, axis=1)
    K[m:, :m] = A_S.T
    K.flat[: m * (m + k + 1) : m + k + 1] = DAMPING
    rhs[:m, 0], rhs[m:, 1] = b, s / DAMPING
    solution = np.linalg.solve(K, rhs)
    return solution[m:], DAMPING * solution[:m]


def _path(A, b, lam):
    """Follow the piecewise linear solution path from lam_max down to lam.

    (Osborne, Presnell, Turlach, IMA J. Numer. Anal. 2000; as LARS: Efron et al., Ann. Stat. 2004.)

    Between breakpoints z and c = A^T r = a + mu g are linear in mu. Going down, column j joins
    where |c_j| meets mu. Which bound it meets is told by the end of the line, c_j = a_j at mu = 0:
    the bound of the sign of a_j, at mu = |a_j| / (1 - sign(a_j) g_j). Column i leaves where
    z_i = p_i - mu q_i meets zero, at mu = p_i / q_i, if its sign at mu = 0 is the other one. These
    rules need no memory of what has just joined or left.

    Returns z and the number of solves. Ties may still lead the path astray; then it stops early or
    ends off the optimum. The caller checks.
    """
    m, n = A.shape
    z, s = np.zeros(n), np.zeros(n)
    c = A.T.dot(b)
    j = np.abs(c).argmax()
    s[j], mu = np.sign(c[j]), abs(c[j])
    noise = 1e-13 * mu  # a column dependent on the support has a_j = 0, but for rounding
    n_iter = 0
    while n_iter < 4 * (m + n):  # ties may make it go round; paths take about 1.5 m
        n_iter += 1
        S = s.nonzero()[0]
        try:
            Z, R = _stationary(A, b, S, s[S])
        except np.linalg.LinAlgError:
            break
        a, g = A.T.dot(R).T
        size, rate = np.abs(a), 1.0 - np.sign(a) * g
        size[S] = 0.0
        # rate <= 0 is a column beyond its bound, which a missed breakpoint leaves: it joins now.
        join = np.where(size > noise, size / np.maximum(rate, TINY), 0.0)
        j = join.argmax()
        i, mu_next = None, join[j]
        leaving = (s[S] * Z[:, 0] < 0.0).nonzero()[0]
        if leaving.size:
            p, q = np.abs(Z[leaving]).T
            leave = p / np.maximum(q, TINY)
            if leave.max() > mu_next:
                i, mu_next = S[leaving[leave.argmax()]], leave.max()
        mu = min(mu, mu_next)
        z[S] = Z[:, 0] + max(mu, lam) * Z[:, 1]
        if mu <= lam:
            break
        if i is None:
            s[j] = np.sign(a[j])
        else:
            z[i] = s[i] = 0.0
    return z, n_iter


def _active_set(A, b, lam, z, only_if_near=False):
    """Minimise from z by an active-set method on (support, signs).

    (Feature-sign search: Lee, Battle, Raina, Ng, NeurIPS 2006, and a rule for dependent columns.)
    Solve on the support with the signs held. If a sign would change, go only as far as the first
    entry to reach zero, and take it off the support. Else let the column that violates its bound
    |A_j^T r| <= lam most join. If that column depends on the support, A z can stay put while
    ||z||_1 falls, along the null vector of the enlarged support, until an entry reaches zero and
    leaves; so the columns stay independent. No step raises the objective.

    Every point solved with agreeing signs has a lower objective than the one before, so no
    (support, signs) comes twice and the method is finite; when one does come twice, rounding is
    all that is left, and the method stops. From far off it needs more solves than the path does;
    with `only_if_near` it gives up if the first solve would change two signs or more.

    Returns z, the number of solves, and whether the optimality conditions hold: to within `slack`,
    signs strictly.
    """
    n, s = A.shape[1], np.sign(z)
    slack = 1e-9 * lam + 1e-12  # lam_max is in [1/2, 1): rounding leaves twelve digits of A^T r
    visited, n_iter, solved = set(), 0, False
    while True:
        n_iter += 1
        S = s.nonzero()[0]
        s_S = s[S]
        try:
            Z, _ = _stationary(A, b, S, s_S)
        except np.linalg.LinAlgError:
            break
        target = np.zeros(n)
        target[S] = Z[:, 0] + lam * Z[:, 1]
        crossing = S[target[S] * s_S <= 0.0]
        if only_if_near and n_iter == 1 and crossing.size > 1:
            break
        if crossing.size:
            z = _to_first_zero(z, s, target - z, crossing)
            continue
        z = target
        c = A.T.dot(b - A.dot(z))
        size = np.abs(c)
        j = size.argmax()
        if size[j] <= lam + slack:
            # No entry of s c exceeds lam, so all on the support equal lam if their sum does.
            solved = bool(s.dot(c) >= len(S) * (lam - slack))
            break
        if s[j] or s.tobytes() in visited:
            break
        visited.add(s.tobytes())
        sign = np.sign(c[j])
        n_iter += 1
        Z, R = _stationary(A, A[:, j], S, s_S)
        if np.linalg.norm(R[:, 0]) <= DEPENDENT * np.linalg.norm(A[:, j]):
            null = np.zeros(n)
            null[S], null[j] = -sign * Z[:, 0], sign
            shrinking = (s * null < 0.0).nonzero()[0]
            if not shrinking.size:
                break
            z = _to_first_zero(z, s, null, shrinking)
        s[j] = sign
    return z, n_iter, solved


def _to_first_zero(z, s, direction, entries):
    """Go from z along direction until the first of the entries is 0; take it off z and s."""
    steps = np.abs(z[entries]) / np.maximum(np.abs(direction[entries]), TINY)
    i = entries[steps.argmin()]
    z = z + steps.min() * direction
    z[i] = s[i] = 0.0
    return z


# ------------------------------------------------------------------------------ first order


def _proximal_gradient(A, b, lam, z0, momentum):
    """Iterate z <- prox(y - A^T (A y - b) / L), prox = soft_threshold(., lam / L), L = ||A||_2^2.

    ISTA has y = z, the last iterate. FISTA has y ahead of z (Beck, Teboulle, SIAM J. Imaging Sci.
    2009), until this momentum points uphill (O'Donoghue, Candès, Found. Comput. Math. 2015); its
    objective may rise on the way, that of ISTA does not.

    Alone these steps converge at the rate of the condition number of A_S^T A_S, 1e6 and more:
    10,000 of ISTA's solve 1 of 100 problems of a search. So once the signs of z rest,
    `_support_step` goes to the minimum on them (FPC_AS: Wen, Yin, Goldfarb, Zhang, SIAM J. Sci.
    Comput. 2010). From there only columns with |A_j^T r| > lam join. A warm start begins with its
    own support. Continuation in lam, also of FPC_AS, took 1.3 to 2 times the steps: left out.
    """
    L = np.linalg.norm(A, 2) ** 2
    enough = TOLERANCE * 0.5 * b.dot(b)
    z, rested = (np.zeros(A.shape[1]), 0) if z0 is None else (z0, REST)
    y, t, n_iter = z, 1.0, 0
    while n_iter < MAX_ITER:
        n_iter += 1
        if rested >= REST:
            z, minimal = _support_step(A, b, lam, z, RIDGE * L)
            y, t = z, 1.0
            if minimal:
                if _gap(A, b, z, lam) <= enough:
                    break
                rested = 0
            continue
        z_last = z
        z = soft_threshold(y + A.T.dot(b - A.dot(y)) / L, lam / L)
        if not momentum or (y - z).dot(z - z_last) > 0.0:  # y - z: the gradient, up to a factor
            y, t = z, 1.0
        else:
            t_last, t = t, 0.5 + math.sqrt(0.25 + t * t)
            y = z + (t_last - 1.0) / t * (z - z_last)
        rested = rested + 1 if (np.sign(z) == np.sign(z_last)).all() else 0
    return z, n_iter, True


def _support_step(A, b, lam, z, ridge):
    """Newton step on the support S of z, its signs s held, to the least objective on the way.

    With the signs held, P is the quadratic 1/2 ||A_S x - b||^2 + lam s^T x, and the step d solves

        (A_S^T A_S + ridge I) d = A_S^T (b - A_S x) - lam s.

    Where the columns of A_S are dependent, the ridge lets d go along their null space, downhill in
    ||x||_1. An entry that would change sign stops at zero (OWL-QN: Andrew, Gao, ICML 2007). Of the
    points where one stops and the end, the best is taken. P falls all the way to the first of
    them, so it never rises.

    Returns z and whether the end was taken: z is then the minimum on its signs, unless some
    entries stopped.
    """
    S = z.nonzero()[0]
    x, A_S = z[S], A.take(S, axis=1)
    H = A_S.T.dot(A_S)
    H.flat[:: len(S) + 1] += ridge
    d = np.linalg.solve(H, A_S.T.dot(b - A_S.dot(x)) - np.copysign(lam, x))
    with np.errstate(divide="ignore", over="ignore"):
        stop = -x / d  # where the entry reaches zero; behind x if negative
    steps = np.concatenate(([1.0], stop[(0.0 < stop) & (stop < 1.0)]))[:, None]
    X = np.where((stop <= 0.0) | (steps < stop), x + steps * d, 0.0)  # a candidate in each row
    R = b - X.dot(A_S.T)
    best = (0.5 * (R * R).sum(axis=1) + lam * np.abs(X).sum(axis=1)).argmin()
    z = np.zeros(len(z))
    z[S] = X[best]
    return z, best == 0


# ------------------------------------------------------------------------------ interior point


def _mosek(A, b, lam, z0):
    """Interior point through CVXPY; needs a licence. z0 is of no use."""
    cvxpy, mosek = _import("cvxpy", "mosek"), _import("mosek", "mosek")
    try:
        with mosek.Env() as env:
            env.checkoutlicense(mosek.feature.pton)
    except mosek.Error:
        raise SolverUnavailable(
            "no MOSEK licence in ~/mosek/mosek.lic or where MOSEKLM_LICENSE_FILE points; "
            f"{FREE}, clarabel needs no licence"
        ) from None
    names = ("PFEAS", "DFEAS", "REL_GAP", "MU_RED")
    params = {f"MSK_DPAR_INTPNT_CO_TOL_{name}": 1e-12 for name in names}
    return _interior_point(cvxpy, A, b, lam, "MOSEK", mosek_params=params)


def _clarabel(A, b, lam, z0):
    """Interior point through CVXPY; free. z0 is of no use."""
    cvxpy, _ = _import("cvxpy", "clarabel"), _import("clarabel", "clarabel")
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    return _interior_point(cvxpy, A, b, lam, "CLARABEL", **tolerances)


def _import(package, solver):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(package)
    except ImportError:
        raise SolverUnavailable(
            f"solver {solver!r} needs the package {package} (pip install {package}); {FREE}"
        ) from None


def _interior_point(cvxpy, A, b, lam, name, **options):
    """Minimise P / lam: at the optimum ||A z - b|| is of the order of lam, and P, of the order of
    lam ||z||_1, would be lost under the tolerances, though they are far below the default ones.
    """
    z = cvxpy.Variable(A.shape[1])
    loss = 0.5 * cvxpy.sum_squares(A @ z - b)
    problem = cvxpy.Problem(cvxpy.Minimize(loss / lam + cvxpy.norm1(z) if lam > 0.0 else loss))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.suppress(cvxpy.SolverError):
            problem.solve(solver=name, **options)
    if z.value is None:
        return np.zeros(A.shape[1]), 0, False
    return np.asarray(z.value), int(problem.solver_stats.num_iters or 0), True


# ------------------------------------------------------------------------------ recovery


# What every solver is, as `recover` calls it:
#
#     solve(A, b, lam, z0) -> z, n_iter, solved
#
# The problem comes scaled by powers of two, so that no digit is lost: the largest entry of A and
# lam_max = ||A^T b||_inf lie in [1/2, 1), and 0 <= lam < lam_max. z0 is a code in that scale or
# None, for a cold start. All arrays are float64, and not to be written to. The function returns
#
#     z        float64 (n,), in the same scale
#     n_iter   int, for information
#     solved   False if it knows that it failed. `recover` measures the gap of z whatever it says.
#
# and raises SolverUnavailable if a package or a licence is missing.
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
        Dictionary. Any rank; columns may be equal or zero.
    b : array_like, shape (m,)
    lam : float, >= 0
        With lam >= lam_max = ||A^T b||_inf the code is exactly 0. At lam = 0 every least-squares
        solution is optimal; homotopy from a cold start returns the end of its path, which is one
        of least l1 norm.
    solver : {"homotopy", "ista", "fista", "mosek", "clarabel"}, or another name in `SOLVERS`
    z0 : array_like, shape (n,), optional
        Warm start; any point will do. homotopy, ista and fista first try its support and signs;
        mosek and clarabel have no use for it.

    Returns
    -------
    Solution
        A solver that stops short says so in `converged` and does not raise.

    Raises
    ------
    ValueError
        Mis-shaped or non-finite A, b, z0; negative or non-finite lam; unknown solver.
    SolverUnavailable
        mosek or clarabel without its package, mosek without a licence; not if the code is 0.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
    A, b, lam, z0, size_A = _validate(A, b, lam, z0)
    lam_max = _largest(A.T.dot(b))
    if lam >= lam_max:
        return Solution(np.zeros(A.shape[1]), 0.0, 0, True, solver)

    # Powers of two, so that nothing is rounded.
    scale_A = 2.0 ** math.frexp(size_A)[1]
    scale_b = 2.0 ** math.frexp(lam_max / scale_A)[1]
    A, b, lam = A / scale_A, b / scale_b, lam / (scale_A * scale_b)
    z0 = None if z0 is None else z0 * (scale_A / scale_b)
    z, n_iter, solved = SOLVERS[solver](A, b, lam, z0)
    gap = _gap(A, b, z, lam) / (0.5 * float(b.dot(b)))
    converged = bool(solved and gap <= TOLERANCE)
    return Solution(z * (scale_b / scale_A), gap, n_iter, converged, solver)
