"""Does a recovery keep what the weights of a pair have learnt?

    python benchmarks/recovery.py

Between two recoveries two pairs run, with the weights w = M b − c, and b follows the gradients of
w; but which pairs run next, the new code z of b decides. Here b moves as Adam moves it where the
gradient wants one |w| to rise and the other to fall, all else equal. The table has, over random
problems as a search has them (A uniform on [0, 1)):

    nonzero     entries of a code
    too few     codes with less than two of them, which the other columns leave out
    opposite    pairs whose w and z differ in sign, so that |z| falls where |w| rises
    kept        change of |z| as a share of that of |w|: the pair that was to rise, less the other
    leaves      problems in which one of the two pairs is not among the two largest any more
    loser       ... and it is the one whose |w| fell: 50 % is chance

by λ, as a share of the least λ at which the code is 0, and by m, the length of b. The published λ
of 1e-5 is a share of 1e-5 to 1e-2, as b grows from 0.003.
"""

import os
import sys
from typing import NamedTuple

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import arguments
import ista

SHARES = 1e-4, 0.03, 0.1, 0.3, 0.5, 0.7


class Outcome(NamedTuple):
    """Of one problem, as the table has it; what is None is not defined for a code too sparse."""

    nonzero: int
    opposite: int = 0
    kept: float | None = None
    leaves: bool | None = None
    loser: bool | None = None


def get_args_parser():
    parser = arguments.Parser(prog="recovery.py", description=__doc__)
    parser.add_argument("--problems", type=arguments.whole(1), default=1000, metavar="N",
                        help="of each row (%(default)s)")
    parser.add_argument("--move", type=arguments.real(0, open_low=True), default=0.07, metavar="X",
                        help="of a coordinate of b, as a share of ‖b‖ (%(default)s)")
    parser.add_argument("--seed", type=arguments.whole(0), default=0, metavar="N",
                        help="of the problems (%(default)s)")
    return parser


def solve(A, b, share):
    return ista.recover(A, b, share * np.abs(A.T @ b).max()).z


def move(A, b, share, step, first_rises):
    """Move b as the weights of the two largest entries of its code want it, and recover again.

    Parameters
    ----------
    A : array, (m, n)
    b : array, (m,)
    share : float
        λ / ‖Aᵀb‖∞.
    step : float
        By which each coordinate of b moves.
    first_rises : bool
        Whether the larger of the two is to rise, and the other to fall.

    Returns
    -------
    Outcome
    """
    z = solve(A, b, share)
    nonzero = np.count_nonzero(z)
    if nonzero < 2:
        return Outcome(nonzero)
    S = np.argsort(-np.abs(z), kind="stable")[:2]
    A_S, z_S, sides = A[:, S], z[S], np.array([1, -1] if first_rises else [-1, 1])
    w = A_S.T @ b - (A_S.T @ A_S @ z_S - z_S)  # as model_search.SparseCode has it
    moved = b + step * np.sign(A_S @ (sides * np.sign(w)))
    new = solve(A, moved, share)
    w_change = sides * np.sign(w) @ (A_S.T @ (moved - b))
    z_change = sides @ (np.abs(new[S]) - np.abs(z_S))
    stays = np.isin(S, np.argsort(-np.abs(new), kind="stable")[:2])
    return Outcome(
        nonzero, np.count_nonzero(np.sign(w) != np.sign(z_S)), z_change / w_change,
        stays.sum() == 1, np.array_equal(stays, sides > 0),
    )


def outcomes(m, share, problems, move_by, seed):
    """Outcomes of random problems, with dictionaries of 14, 21, 28 and 35 columns by turns."""
    rng = np.random.default_rng(seed)
    for k in range(problems):
        A, b = rng.random((m, 7 * (2 + k % 4))), rng.standard_normal(m)
        yield move(A, b, share, move_by * np.linalg.norm(b), bool(rng.integers(2)))


def row(found):
    """Columns of the table from outcomes: nonzero, too few, opposite, kept, leaves, loser."""
    whole = [one for one in found if one.kept is not None]
    gone = [one for one in whole if one.leaves]
    return (
        np.mean([one.nonzero for one in found]), 1 - len(whole) / len(found),
        np.mean([one.opposite for one in whole]) / 2, np.median([one.kept for one in whole]),
        len(gone) / len(whole), np.mean([one.loser for one in gone]) if gone else float("nan"),
    )


def main(args):
    print(f"{'m':>3} {'λ/λ_max':>8} {'nonzero':>8} {'too few':>8} {'opposite':>9} {'kept':>6} "
          f"{'leaves':>7} {'loser':>6}")
    for m in (4, 7, 14):
        for share in SHARES:
            found = [*outcomes(m, share, args.problems, args.move, args.seed)]
            nonzero, few, opposite, kept, leaves, loser = row(found)
            print(f"{m:>3} {share:>8g} {nonzero:>8.1f} {few:>8.0%} {opposite:>9.0%} {kept:>6.0%} "
                  f"{leaves:>7.0%} {loser:>6.0%}", flush=True)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
