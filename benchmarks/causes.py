"""Two-stage searches that differ from those of `search.py` in one thing, to see what it does.

    python benchmarks/causes.py --warm_up 15 --dataset imagefolder --data DIR --distinct_edges
    python benchmarks/causes.py --idle_weights_move --dataset imagefolder --data DIR
    python benchmarks/causes.py --relative_lam 0.3 --dataset imagefolder --data DIR

--warm_up N: what comes into a cell has not run before, and what runs beside it has. Here all
operations learn for N epochs before the search begins: b rests, and each step draws the pairs of
every node anew, on edges that differ, with weights of 1.

--idle_weights_move: once an operation has run, weight decay and momentum move its weights in every
step, as in the released code under the PyTorch of 2020.

--relative_lam R: λ is that share of the least one at which a code is 0, ‖Aᵀb‖∞. At the published λ
a code has as many nonzero entries as b has coordinates, of which two run; see recovery.py.

All other flags are those of `search.py`. To go on with a run, give the same flags and --resume; one
that ended in its first epoch begins anew.
"""

import argparse
import functools
import os
import random
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import arguments
import ista
import runs
import search
from genotypes import PRIMITIVES


def draw(code, generator):
    """Give a `model_search.SparseCode` a random support whose weights are 1.

    Parameters
    ----------
    code : model_search.SparseCode
    generator : random.Random
    """
    codes = []
    for z in code.z:
        drawn = torch.zeros(len(z), dtype=torch.float64)
        for edge in generator.sample(range(len(z) // len(PRIMITIVES)), code.sparseness):
            drawn[len(PRIMITIVES) * edge + generator.randrange(len(PRIMITIVES))] = 1
        codes.append(drawn.numpy())
    code.accept(codes)
    with torch.no_grad():
        code.c += code.active_weights() - 1


def warm_up(net, batches, weight_optimizer, args, log, epochs):
    """Train the weights for some epochs on random supports, and then take those of b again."""
    weights, generator = net.weight_parameters(), random.Random(args.seed)
    search.train_only(weights, net.arch_parameters())
    net.train()
    for epoch in range(epochs):
        for x, y in batches:
            for code in net.codes:
                draw(code, generator)
            loss = F.cross_entropy(net(x)[0], y)
            weight_optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(weights, args.grad_clip)
            weight_optimizer.step()
        log(f"warm-up {epoch + 1}/{epochs}: loss {loss:.3f} in the last step")
    net.recover(args.solver)


def let_idle_weights_move(optimizer):
    """Have an optimizer set gradients to 0, where it else forgets them and so skips a weight."""
    optimizer.zero_grad = functools.partial(optimizer.zero_grad, set_to_none=False)


def relative(recover, share):
    """`ista.recover` with a λ that is a share of ‖Aᵀb‖∞."""

    def recover_at_share(A, b, lam, *args, **kwargs):
        return recover(A, b, share * np.abs(A.T @ b).max(), *args, **kwargs)

    return recover_at_share


def main():
    parser = argparse.ArgumentParser(prog="causes.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--warm_up", type=arguments.whole(1))
    parser.add_argument("--idle_weights_move", action="store_true")
    parser.add_argument("--relative_lam", type=arguments.real(0, 1))
    parser.error = functools.partial(arguments.fail, parser.prog)
    causes, flags = parser.parse_known_args()
    two_stage_epoch, optimizers = search.two_stage_epoch, search.optimizers

    def epoch_after_warm_up(net, parallel, batches, *rest):
        _, weight_optimizer, _, args, progress, epoch = rest
        if causes.warm_up and epoch == 1:
            warm_up(net, batches, weight_optimizer, args, progress.log, causes.warm_up)
        return two_stage_epoch(net, parallel, batches, *rest)

    def changed_optimizers(net, args):
        weight_optimizer, arch_optimizer = optimizers(net, args)
        if causes.idle_weights_move:
            let_idle_weights_move(weight_optimizer)
        return weight_optimizer, arch_optimizer

    if causes.relative_lam is not None:
        ista.recover = relative(ista.recover, causes.relative_lam)
    search.two_stage_epoch, search.optimizers = epoch_after_warm_up, changed_optimizers
    parser = search.get_args_parser()
    parser.prog, parser.description = "causes.py", __doc__
    search.main(parser.parse_args(flags))


if __name__ == "__main__":
    with runs.command("causes.py"):
        main()
