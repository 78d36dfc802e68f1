"""The sparse supernet: a network of all candidate operations, of which only a few run.

    from model_search import Network
    net = Network(16, 10, 8)
    logits, _ = net(images)                     # runs 2 of the n_j candidates of each node
    net.recover()                               # new codes and supports from b
    print(net.genotype())

All cells of a type use the same `SparseCode`. Node j of a cell (j = 0, ..., 3) can choose among
n_j = 7(j+2) pairs of an edge and an operation, numbered k = 7·edge + operation. Its code z_j in
R^{n_j} is not trained. A sparse solver recovers it from the architecture parameters b_j, a point
in R^m, m = 7, and a fixed dictionary A_j. The pairs of the 2 largest |z_jk| are the support S_j.
Only these run.
"""

import copy
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import ista
from genotypes import NODES, PRIMITIVES, Genotype, as_lists
from layers import concat, weighted
from model import NetworkCIFAR, NetworkImageNet, Skeleton, preprocess
from operations import build, drop_path, last_norm


class Recovery(NamedTuple):
    """Result of a recovery. Lists have an entry per node, normal nodes first."""

    distance: list           # ‖z_new − z‖₂ from the previously accepted code z; 0 if frozen
    frozen: list             # whether the code is final
    parameters: int | None   # of the retraining network; None if neither limit was given
    rejected: bool           # whether these were too many, so that the previous architecture stays
    not_converged: int       # codes for which the solver did not converge; homotopy solved these
    too_sparse: list         # whether the code has fewer than s nonzero entries
    lam_max: list            # ‖Aᵀb‖∞, the smallest λ at which the code is 0


# ------------------------------------------------------------------------------------------------
# Dictionaries and sparse codes
# ------------------------------------------------------------------------------------------------


def uniform(m, n):
    """Entries uniform on [0, 1), as in the released code; the columns have norms near √(m/3)."""
    return torch.rand(m, n, dtype=torch.float64)


def normal(m, n):
    """Entries N(0, 1), as reported for the paper, with columns scaled to norm 1 (our choice)."""
    return nn.functional.normalize(torch.randn(m, n, dtype=torch.float64), dim=0)


DICTIONARIES = {"uniform": uniform, "normal": normal}


class SparseCode(nn.Module):
    """Architecture parameters b, dictionaries A and codes z of the nodes of one cell type.

    The code of a node is the solution of the LASSO problem (ISTA-NAS, section 3)

        z = argmin ½‖Az − b‖² + λ‖z‖₁,

    and the support S holds the s entries of z that are largest in modulus. If b = Az, then
    z = Aᵀb − (AᵀA − I)z. With z fixed and restricted to S, this gives the weights of the active
    pairs,

        w_S = M b − c,     M = A_Sᵀ,     c = (A_Sᵀ A_S − I) z_S,

    which depend on b alone until the next recovery.

    Parameters
    ----------
    proj_dims, sparseness, lam
        m, the length of b; s, the number of active pairs of a node; λ.
    distinct_edges : bool
        Whether a node has at most one active pair per edge: first the largest |z| of each edge is
        taken, then the s largest of these.
    dictionary : str
        A name in `DICTIONARIES`.

    Attributes
    ----------
    A : list of 4 tensors, float64, (m, n_j)
    b : nn.ParameterList of 4 tensors, (m,)
        The architecture parameters, initialized 1e-3·N(0, 1).
    z : list of 4 tensors, float64, (n_j,)
    S : tensor, int64, (4, s)
        Numbers k = 7·edge + operation of the active pairs.
    frozen : tensor, bool, (4,)
        Whether the code of a node is final.
    support : list of 4 lists of (edge, operation index)
        S as Python lists, which decide what runs.
    is_frozen : list of 4 bools
        `frozen` as a Python list.
    M, c : tensors, float64, (4, s, m) and (4, s)

    Notes
    -----
    `support`, `is_frozen`, M and c are computed again when A, z, S or `frozen` has been written in
    place, loaded, copied or moved. After a write through `.data`, call `recover`.
    """

    def __init__(
        self, proj_dims=7, sparseness=2, lam=1e-5, distinct_edges=False, dictionary="uniform"
    ):
        super().__init__()
        self.sparseness = sparseness
        self.lam = lam
        self.distinct_edges = distinct_edges
        self.b = nn.ParameterList()
        for j in range(NODES):
            n = len(PRIMITIVES) * (j + 2)
            self.register_buffer(f"A{j}", DICTIONARIES[dictionary](proj_dims, n).double())
            self.register_buffer(f"z{j}", torch.zeros(n, dtype=torch.float64))
            self.b.append(nn.Parameter(1e-3 * torch.randn(proj_dims)))
        self.register_buffer("frozen", torch.zeros(NODES, dtype=torch.bool))
        self.register_buffer("S", torch.zeros(NODES, sparseness, dtype=torch.int64))
        size = NODES, sparseness, proj_dims
        self.register_buffer("M", torch.zeros(size, dtype=torch.float64), persistent=False)
        self.register_buffer("c", torch.zeros(size[:2], dtype=torch.float64), persistent=False)
        self._support, self._is_frozen, self._versions = None, None, None
        self.recover()

    @property
    def A(self):
        return [getattr(self, f"A{j}") for j in range(NODES)]

    @property
    def z(self):
        return [getattr(self, f"z{j}") for j in range(NODES)]

    @property
    def support(self):
        self._refresh()
        return self._support

    @property
    def is_frozen(self):
        self._refresh()
        return self._is_frozen

    def _refresh(self):
        """Update support, is_frozen, M and c if one of the tensors they depend on has changed."""
        if torch.compiler.is_compiling():  # the compiler guards the lists, but cannot read versions
            return
        sources = [*self.A, *self.z, self.S, self.frozen]
        # Tensors that were created in inference mode have no version.
        versions = [(t.data_ptr(), t.is_inference() or t._version) for t in sources]
        if versions == self._versions:
            return
        self._versions = versions
        self._is_frozen = self.frozen.tolist()
        self._support = [[divmod(k, len(PRIMITIVES)) for k in node] for node in self.S.tolist()]
        with torch.inference_mode(self.M.is_inference()), torch.no_grad():
            # Write M and c in place, because CUDA graphs read them at their addresses.
            for j, (A, z, S) in enumerate(zip(self.A, self.z, self.S, strict=True)):
                A_S, z_S = A[:, S], z[S]                              # (m, s), (s,)
                self.M[j] = A_S.T
                self.c[j] = A_S.T @ (A_S @ z_S) - z_S

    def solve(self, solver="homotopy"):
        """Compute the codes from b; frozen nodes keep theirs.

        Returns 4 arrays, float64 (n_j,); for each node ‖Aᵀb‖∞, the smallest λ at which its code is
        0; and the number of codes for which the solver did not converge, so that homotopy solved
        them instead.
        """
        codes, lam_max, not_converged = to_arrays(self.z), [], 0
        for j, (A, b) in enumerate(zip(to_arrays(self.A), to_arrays(self.b), strict=True)):
            lam_max.append(float(np.abs(A.T @ b).max()))
            if self.is_frozen[j]:
                continue
            z0 = codes[j]
            solution = ista.recover(A, b, self.lam, solver, z0)
            if not solution.converged and solver != "homotopy":
                not_converged += 1
                solution = ista.recover(A, b, self.lam, z0=z0)
            codes[j] = solution.z
        return codes, lam_max, not_converged

    def choose(self, codes):
        """Choose the support from the codes: the s pairs of each node with the largest |z|.

        Takes 4 arrays (n_j,), and returns 4 lists of (edge, operation index). It is called once per
        recovery, and its answer is ignored for frozen nodes.
        """
        support = []
        for z, previous in zip(codes, self.support, strict=True):
            magnitude = np.abs(z)
            was_active = np.isin(np.arange(len(z)), pair_numbers(previous))
            # Sort by |z|, stably, so that ties go to the smaller number. Among zeros, pairs of the
            # previous support come first: they fill up a code with fewer than s nonzero entries.
            order = np.lexsort((~was_active & (magnitude == 0), -magnitude))
            if self.distinct_edges:
                _, first = np.unique(order // len(PRIMITIVES), return_index=True)
                order = order[np.sort(first)]  # the largest of each edge
            chosen = np.sort(order[: self.sparseness]).tolist()
            support.append([divmod(k, len(PRIMITIVES)) for k in chosen])
        return support

    def choose_unfrozen(self, codes):
        """Call `choose` and check its answer; frozen nodes keep their pairs."""
        chosen = [[(int(edge), int(op)) for edge, op in node] for node in self.choose(codes)]
        if len(chosen) != NODES:
            raise ValueError(f"SparseCode.choose returned {len(chosen)} nodes instead of {NODES}")
        for j, node in enumerate(chosen):
            exist = all(edge in range(j + 2) and op in range(len(PRIMITIVES)) for edge, op in node)
            are_different = len(set(node)) == len(node) == self.sparseness
            if not (exist and are_different):
                raise ValueError(
                    f"SparseCode.choose returned {node} for node {j}: it has to return "
                    f"{self.sparseness} different pairs of an edge below {j + 2} and an operation "
                    f"below {len(PRIMITIVES)}"
                )
            if self.is_frozen[j]:
                chosen[j] = self.support[j]
        return chosen

    def is_too_sparse(self, z):
        """Whether a code has fewer than s nonzero entries to choose from."""
        pairs = np.flatnonzero(z)
        choices = np.unique(pairs // len(PRIMITIVES)) if self.distinct_edges else pairs
        return len(choices) < self.sparseness

    @torch.no_grad()
    def accept(self, codes, support):
        """Write codes into z and a support into S."""
        for z, z_new in zip(self.z, codes, strict=True):
            z.copy_(torch.as_tensor(z_new))
        self.S.copy_(torch.tensor([pair_numbers(node) for node in support]))
        self._versions = None  # A may have been written through `.data`
        self._refresh()

    def recover(self, solver="homotopy"):
        """Update z and the support from b, except those of frozen nodes.

        `solver` is a name in `ista.SOLVERS`; ista.SolverUnavailable is raised if its package or
        license is missing. Returns the number of codes that homotopy solved in its place.
        """
        codes, _, not_converged = self.solve(solver)
        self.accept(codes, self.choose_unfrozen(codes))
        return not_converged

    def active_weights(self):
        """Weights w_S = M b − c of the active pairs: float64, (4, s), differentiable in b."""
        self._refresh()
        b = torch.stack([*self.b]).to(self.M.dtype)                   # (4, m)
        return torch.einsum("jsm,jm->js", self.M, b) - self.c

    def weights(self):
        """Weights of all pairs, for inspection: float64, (14, 7), zero outside the support.

        Rows are edges (2 of node 0, then 3 of node 1, ...), columns are operations.
        """
        edges = sum(j + 2 for j in range(NODES))
        dense = self.c.new_zeros(edges, len(PRIMITIVES))
        first_edge = 0
        for j, w in enumerate(self.active_weights()):
            for (edge, op), w_k in zip(self.support[j], w, strict=True):
                dense[first_edge + edge, op] = w_k
            first_edge += j + 2
        return dense


def to_arrays(tensors):
    """Copy tensors to float64 arrays."""
    return [t.detach().double().numpy(force=True).copy() for t in tensors]


def pair_numbers(pairs):
    """Numbers k = 7·edge + operation of pairs (edge, operation)."""
    return [edge * len(PRIMITIVES) + op for edge, op in pairs]


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------


class MixedOp(nn.Module):
    """The candidate operations of an edge. Each call runs one of them: w · op(x)."""

    def __init__(self, C, stride, one_stage):
        super().__init__()
        self._ops = nn.ModuleList(
            build(primitive, C, stride, affine=one_stage, norm_pools=True, norm_skips=one_stage)
            for primitive in PRIMITIVES
        )

    def forward(self, x, op, w):
        return weighted(self._ops[op], x, w)


class MixedCell(nn.Module):
    """A cell of the supernet: node = Σ_{k in S} w_k · op_k(input of its edge)."""

    def __init__(self, C_prev_prev, C_prev, C, reduction, reduction_prev, one_stage):
        super().__init__()
        self.reduction = reduction
        self.C_out = NODES * C
        self.preprocess0, self.preprocess1 = preprocess(
            C_prev_prev, C_prev, C, reduction_prev, affine=one_stage
        )
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and edge < 2 else 1, one_stage)
            for j in range(NODES)
            for edge in range(j + 2)
        )

    def edges(self, j):
        """The MixedOps of the edges into intermediate node j, in the order of their inputs."""
        first = sum(i + 2 for i in range(j))
        return self._ops[first : first + j + 2]

    def forward(self, s0, s1, keep, support, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]         # (B, C, H, W) each
        first_edge = 0  # number of the first edge into this node
        for pairs, w in zip(support, weights, strict=True):
            terms = []
            for (edge, op), w_k in zip(pairs, w, strict=True):
                y = self._ops[first_edge + edge](states[edge], op, w_k)
                if keep is not None:  # skips too: in one-stage search they end in a BatchNorm
                    y = drop_path(y, keep)
                terms.append(y)
            first_edge += len(states)
            states.append(sum(terms[1:], terms[0]))
        return concat(states[2:])                                     # (B, 4C, H, W)


class Network(Skeleton):
    """The sparse supernet of both searches.

    Parameters
    ----------
    C, num_classes, layers : int
        Channels of the first cells, number of classes, number of cells.
    one_stage : bool
        Whether it is the supernet of one-stage search, in which each operation ends in an affine
        BatchNorm. γ = 1 and β = 0 are fixed in the operations of a node until it freezes.
    auxiliary : bool
        Whether there is an auxiliary head.
    imagenet : bool
        Whether stem and auxiliary head are those for images of 224×224 pixels instead of 32×32.
    proj_dims, sparseness, lam, distinct_edges, dictionary
        See `SparseCode`. `normal_code` and `reduce_code` are those of the two cell types.
    """

    def __init__(
        self, C, num_classes, layers, *, one_stage=False, auxiliary=False, imagenet=False,
        proj_dims=7, sparseness=2, lam=1e-5, distinct_edges=False, dictionary="uniform",
    ):
        def make_cell(*shape):
            return MixedCell(*shape, one_stage)

        super().__init__(C, num_classes, layers, auxiliary, make_cell, imagenet)
        self.shape = dict(C=C, num_classes=num_classes, layers=layers)
        self.one_stage = one_stage
        options = proj_dims, sparseness, lam, distinct_edges, dictionary
        self.normal_code = SparseCode(*options)
        self.reduce_code = SparseCode(*options)
        self.codes = (self.normal_code, self.reduce_code)
        self._update_requires_grad()
        self.register_load_state_dict_post_hook(Network._update_requires_grad)

    def forward(self, x):
        normal, reduce = (support_and_weights(code, self.classifier.weight.dtype)
                          for code in self.codes)
        return super().forward(x, normal, reduce)

    def active_modules(self):
        idle = {m for _, _, module in self.idle_operations() for m in module.modules()}
        return [m for m in self.modules() if m not in idle]

    def graph_key(self):
        supports = [code.support for code in self.codes]
        return {**super().graph_key(), "the support": supports, "the frozen nodes": self.frozen}

    def operations(self):
        """Return the preprocess layers and all candidate operations of all cells."""
        found = []
        for cell in self.cells:
            found += [cell.preprocess0, cell.preprocess1]
            for mixed in cell._ops:
                found += [op for op in mixed._ops if op is not None]
        return found

    def arch_parameters(self):
        """The parameters b of the normal cell, then those of the reduction cell."""
        return [*self.normal_code.b, *self.reduce_code.b]

    def weight_parameters(self):
        """All parameters except b."""
        arch = {id(b) for b in self.arch_parameters()}
        return [p for p in self.parameters() if id(p) not in arch]

    def genotype(self, supports=None):
        """Return the Genotype of the supports (normal, reduce); by default the current ones."""
        normal, reduce = supports or (code.support for code in self.codes)
        nodes = range(2, 2 + NODES)
        return Genotype(as_pairs(normal), nodes, as_pairs(reduce), nodes)

    def describe(self):
        """The genotype as lists and the weights of its pairs: a line of genotypes.jsonl."""
        normal, reduce = (code.active_weights().flatten().tolist() for code in self.codes)
        return {**as_lists(self.genotype()), "normal_weights": normal, "reduce_weights": reduce}

    def recover(self, solver="homotopy", freeze_tol=None, max_params=None, broadcast=None):
        """Update codes and supports from b.

        Parameters
        ----------
        solver : str
            A name in `ista.SOLVERS`.
        freeze_tol : float, optional
            Freeze a node when ‖z_new − z‖₂ ≤ freeze_tol.
        max_params : float, optional
            In millions. A candidate is rejected if its retraining network has as many parameters
            or more: the previous architecture stays, and no node freezes.
        broadcast : callable, optional
            Returns its argument of rank 0 on all ranks, because rounding may differ.

        Returns
        -------
        Recovery
        """
        new_z, supports = [], []  # for each cell type: 4 arrays, 4 lists of pairs
        lam_max, not_converged = [], 0
        for code in self.codes:
            solutions, of_nodes, failures = code.solve(solver)
            new_z.append(solutions)
            supports.append(code.choose_unfrozen(solutions))
            lam_max += of_nodes
            not_converged += failures
        if broadcast:
            new_z, supports, lam_max = broadcast((new_z, supports, lam_max))

        distance, too_sparse = [], []
        for code, solutions in zip(self.codes, new_z, strict=True):
            for z, z_previous in zip(solutions, to_arrays(code.z), strict=True):
                distance.append(float(np.linalg.norm(z - z_previous)))
                too_sparse.append(code.is_too_sparse(z))

        parameters, rejected = None, False
        if freeze_tol is not None or max_params is not None:
            parameters = self.count_retraining_parameters(self.genotype(supports))
        if max_params is not None:
            rejected = parameters >= max_params * 1e6
        if not rejected:
            for code, solutions, support in zip(self.codes, new_z, supports, strict=True):
                code.accept(solutions, support)
            if freeze_tol is not None:
                nodes = zip(distance, too_sparse, strict=True)
                self.freeze([d <= freeze_tol and not sparse for d, sparse in nodes])
        return Recovery(
            distance, self.frozen, parameters, rejected, not_converged, too_sparse, lam_max
        )

    # --------------------------------------------------------------------------------------------
    # One-stage search
    # --------------------------------------------------------------------------------------------

    @property
    def frozen(self):
        """Whether the code of each node is final, normal nodes first."""
        return [*self.normal_code.is_frozen, *self.reduce_code.is_frozen]

    def freeze(self, nodes=None):
        """Make codes final: fix b, and train γ and β of the operations.

        `nodes` has a bool per node, normal nodes first; None freezes all.
        """
        nodes = torch.tensor([True] * (2 * NODES) if nodes is None else nodes)
        nodes = nodes.to(self.normal_code.frozen.device)
        self.normal_code.frozen |= nodes[:NODES]
        self.reduce_code.frozen |= nodes[NODES:]
        self._update_requires_grad()

    def _update_requires_grad(self, _incompatible_keys=None):
        """Train b of the nodes that are not frozen, and γ and β of the operations of the others."""
        if not self.one_stage:
            return
        for code, reduction in zip(self.codes, (False, True), strict=True):
            for j, frozen in enumerate(code.is_frozen):
                code.b[j].requires_grad_(not frozen)
                if frozen:
                    code.b[j].grad = None  # so that the optimizer skips it from now on
                for norm in self._norms(reduction, j):
                    norm.requires_grad_(frozen)

    def _norms(self, reduction, j):
        """The BatchNorms of all operations of node j in all cells of a type."""
        return [
            layer
            for cell in self.cells if cell.reduction == reduction
            for layer in cell.edges(j).modules() if isinstance(layer, nn.BatchNorm2d)
        ]

    def count_retraining_parameters(self, genotype=None):
        """Number of parameters of the retraining network, without an auxiliary head."""
        with torch.device("meta"):
            net = self._retraining_network(genotype or self.genotype(), auxiliary=False)
        return sum(p.numel() for p in net.parameters())

    def _retraining_network(self, genotype, auxiliary):
        build_network = NetworkImageNet if self.imagenet else NetworkCIFAR
        return build_network(
            **self.shape, auxiliary=auxiliary, genotype=genotype, one_stage=self.one_stage
        )

    def idle_operations(self):
        """Yield (mixed, op, module) for each module = mixed._ops[op] outside the support."""
        for cell in self.cells:
            support = self.codes[cell.reduction].support
            for j in range(NODES):
                for edge, mixed in enumerate(cell.edges(j)):
                    for op, module in enumerate(mixed._ops):
                        if module is not None and (edge, op) not in support[j]:
                            yield mixed, op, module

    def prune(self):
        """Delete the operations outside the support, and return their parameters."""
        parameters = []
        for mixed, op, module in self.idle_operations():
            parameters += module.parameters()
            mixed._ops[op] = None
        return parameters

    def prune_like(self, state_dict):
        """Delete the operations that the state dict of a pruned supernet lacks."""
        present = {operation_name(key) for key in state_dict}
        for key in self.state_dict():
            name = operation_name(key)
            if name is not None and name not in present:
                operations, _, op = name.rpartition(".")
                self.get_submodule(operations)[int(op)] = None

    @torch.no_grad()
    def absorb(self):
        """Fold the weights of a one-stage supernet into BatchNorm, and return a plain network.

        The weight w of each active pair is folded into the last BatchNorm of its operation:
        γ ← wγ, β ← wβ. The supernet does not change.

        Returns a new model.NetworkCIFAR or NetworkImageNet with the same outputs. Raises ValueError
        if the supernet is that of two-stage search, or if the outputs differ.
        """
        if not self.one_stage:
            raise ValueError("only the supernet of one-stage search can be absorbed")
        with torch.random.fork_rng(devices=[]):  # initial weights use no random number of the run
            net = self._retraining_network(self.genotype(), self.auxiliary)
        net.to(self.classifier.weight)
        net.drop_path_prob = self.drop_path_prob
        state = net.state_dict()
        for key, value in self.state_dict().items():
            if key in state and "._ops." not in key:  # operations have other numbers there
                state[key] = value
        net.load_state_dict(state)
        for mixed_cell, cell in zip(self.cells, net.cells, strict=True):
            support, weights = support_and_weights(
                self.codes[mixed_cell.reduction], self.classifier.weight.dtype
            )
            targets = iter(cell._ops)
            for j in range(NODES):
                for (edge, op), w in zip(support[j], weights[j], strict=True):
                    target = next(targets)
                    target.load_state_dict(mixed_cell.edges(j)[edge]._ops[op].state_dict())
                    absorb_weight(target, w)
        self._check_same_outputs(net)
        return net.train(self.training)

    def _check_same_outputs(self, net):
        size = 64 if self.imagenet else 32
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        # Compare on the CPU, because TF32 rounds on CUDA.
        found, expected = copy.deepcopy(net).cpu().eval(), copy.deepcopy(self).cpu().eval()
        x = x.to(net.keep_prob.dtype)
        found, expected = found(x)[0], expected(x)[0]
        if not torch.allclose(found, expected, rtol=0, atol=1e-2 * expected.abs().max().item()):
            raise ValueError(
                "one-stage search cannot absorb the weights w, because the absorbed network has "
                "other outputs than the supernet: an edit of MixedOp, MixedCell or Network does "
                "more with w than multiplying the output of an operation by it"
            )


def support_and_weights(code, dtype):
    """The support of a SparseCode, and its weights as a list of 0-dim tensors per node."""
    weights = code.active_weights().to(dtype)
    return code.support, [w.unbind() for w in weights.unbind()]


def absorb_weight(op, w):
    """Fold w into the last BatchNorm of an operation: γ ← wγ, β ← wβ."""
    norm = last_norm(op)
    norm.weight.mul_(w)
    norm.bias.mul_(w)


def as_pairs(support):
    """A support in the form of a Genotype: `[(operation name, input node), ...]`."""
    return [(PRIMITIVES[op], edge) for node in support for edge, op in node]


def operation_name(key):
    """Name of the candidate operation to which a state-dict key belongs, or None."""
    match = re.match(r"cells\.\d+\._ops\.\d+\._ops\.\d+", key)
    return match and match[0]


# ------------------------------------------------------------------------------------------------
# Checks of edited operations and cells
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_operations(C, one_stage, imagenet=False):
    """Raise ValueError if a search with the current operations and cells would be wrong.

    An operation that takes `pair_weight` has to multiply its output by it. In one-stage search, the
    last BatchNorm of each operation also has to absorb w, in the operation and in a whole network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        x = torch.randn(2, C, 8, 8)
        for stride in (1, 2):
            mixed = MixedOp(C, stride, one_stage).eval()
            randomize_norms(mixed)
            for primitive, op in zip(PRIMITIVES, mixed._ops, strict=True):
                name = f"{primitive} at stride {stride}"
                for w in (1.5, -0.5):
                    check_operation(name, op, x, torch.tensor(w), stride)
                if one_stage:
                    check_absorption(name, op, x, torch.tensor(-0.5))
        if one_stage:
            check_network(C, imagenet)


def check_network(C, imagenet):
    """Absorb networks that contain each operation at stride 2, at the first edge of a node."""
    for first in range(0, len(PRIMITIVES), 2 * NODES):
        net = Network(C, 10, 3, one_stage=True, imagenet=imagenet)
        randomize_norms(net)
        for b in net.arch_parameters():
            b.normal_()
        ops = [k % len(PRIMITIVES) for k in range(first, first + 2 * NODES)]
        support = [[(0, ops[2 * j]), (0, ops[2 * j + 1])] for j in range(NODES)]
        for code in net.codes:
            code.accept([z.numpy() for z in code.z], support)
        net.prune()  # fewer layers to copy
        net.absorb()


def check_operation(name, op, x, w, stride):
    before, y = x.clone(), op(x)
    expected = (len(x), x.shape[1], x.shape[2] // stride, x.shape[3] // stride)
    if y.shape != expected:
        raise ValueError(f"{name}: an input of shape {tuple(x.shape)} gives an output of shape "
                         f"{tuple(y.shape)} instead of {expected}")
    if not torch.equal(x, before):
        raise ValueError(f"{name}: the operation writes into its input, which other operations "
                         "read as well: leave out inplace=True")
    if not torch.allclose(weighted(op, x, w), w * y, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{name}: forward(x, pair_weight) is not pair_weight · forward(x): multiply the whole "
            "output by pair_weight, or leave that argument out"
        )


def check_absorption(name, op, x, w):
    norm = last_norm(op)
    if norm is None or not norm.affine:
        raise ValueError(f"{name}: one-stage search needs a BatchNorm at the end of the operation, "
                         "whose γ and β absorb w: append one")
    absorbed = copy.deepcopy(op)
    absorb_weight(absorbed, w)
    if not torch.allclose(absorbed(x), w * op(x), rtol=1e-3, atol=1e-3):
        raise ValueError(f"{name}: one-stage search cannot absorb w, because other layers follow "
                         "the last BatchNorm of the operation: append a BatchNorm")


@torch.no_grad()
def randomize_norms(net):
    """Give all BatchNorms random γ, β and running statistics."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            if norm.track_running_stats:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                norm.weight.normal_()
                norm.bias.normal_()
