"""Does a recovery keep what the weights of a pair have learnt?

    python benchmarks/recovery.py

Between two recoveries the weights of the two pairs that run are w = M b − c, and b follows their
gradients; then new codes z take the place of w. Here b moves as Adam moves it where the gradient
wants one |w| to rise and the other to fall, all else equal. The table has, over random problems as
a search has them (A uniform on [0, 1)):

    nonzero     entries of a code
    too few     codes with less than two of them, which the other columns leave out
    kept        change of |z| as a share of that of |w|: the pair that was to rise, less the other
    leaves      problems in which one of the two pairs is not among the two largest any more
    loser       ... and it is the one whose |w| fell; 50 % would be chance

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
    """Of one problem, as the table has it; `kept` and the rest are None for a code too sparse."""

    nonzero: int
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
    wanted = np.sign(z[S]) * ([1, -1] if first_rises else [-1, 1])  # of w, whose M is A_Sᵀ
    moved = b + step * np.sign(A[:, S] @ wanted)
    new = solve(A, moved, share)
    w_change, z_change = wanted @ (A[:, S].T @ (moved - b)), wanted @ (new[S] - z[S])
    stays = np.isin(S, np.argsort(-np.abs(new), kind="stable")[:2])
    rises = stays if first_rises else stays[::-1]
    return Outcome(nonzero, z_change / w_change, not stays.all(), tuple(rises) == (True, False))


def outcomes(m, share, problems, move_by, seed):
    """Outcomes of random problems, with dictionaries of 14, 21, 28 and 35 columns by turns."""
    rng = np.random.default_rng(seed)
    for k in range(problems):
        A, b = rng.random((m, 7 * (2 + k % 4))), rng.standard_normal(m)
        yield move(A, b, share, move_by * np.linalg.norm(b), bool(rng.integers(2)))


def row(found):
    """Columns of the table from outcomes: nonzero, too few, kept, leaves, loser."""
    whole = [one for one in found if one.kept is not None]
    gone = [one for one in whole if one.leaves]
    one_gone = sum(one.loser for one in gone)
    return (
        np.mean([one.nonzero for one in found]), 1 - len(whole) / len(found),
        np.median([one.kept for one in whole]), len(gone) / len(whole),
        one_gone / len(gone) if gone else float("nan"),
    )


def main(args):
    print(f"{'m':>3} {'λ/λ_max':>8} {'nonzero':>8} {'too few':>8} {'kept':>6} {'leaves':>7} "
          f"{'loser':>6}")
    for m in (4, 7, 14):
        for share in SHARES:
            found = [*outcomes(m, share, args.problems, args.move, args.seed)]
            nonzero, few, kept, leaves, loser = row(found)
            print(f"{m:>3} {share:>8g} {nonzero:>8.1f} {few:>8.0%} {kept:>6.0%} {leaves:>7.0%} "
                  f"{loser:>6.0%}", flush=True)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
