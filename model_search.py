"""The sparse supernet: a network over all candidate operations that runs only a few of them.

    from model_search import Network
    net = Network(16, 10, 8)
    logits, _ = net(images)                     # runs 2 of the n_j candidates of every node
    net.recover()                               # new code and support from the point b
    print(net.genotype())

Every cell of a type shares one `SparseCode`. Node j of a cell (j = 0..3) may choose among
n_j = 7(j+2) pairs of an edge and an operation, numbered k = edge·7 + operation. Its code z_j in
R^{n_j} is not trained: it is recovered from a point b_j in R^m, m = 7, through a fixed dictionary
A_j, and the 2 largest |z_jk| are its support S_j, the pairs that run.
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
    """What one recovery did. Lists are node by node: the normal nodes, then the reduction nodes."""

    distance: list           # ‖z_new − z_last‖₂, z_last the last accepted code; 0 if frozen
    frozen: list             # whether the code is final
    parameters: int | None   # of the retraining network, where nodes may freeze or size is limited
    rejected: bool           # whether they were too many, so that the last architecture stays
    not_converged: int       # codes that homotopy solved, because the solver did not converge
    too_sparse: list         # whether < s entries of the code are not 0; the node does not freeze
    lam_max: list            # ‖Aᵀb‖∞, the least λ at which the code is 0


# ------------------------------------------------------------------------------------------------
# Points, dictionaries and codes
# ------------------------------------------------------------------------------------------------


def uniform(m, n):
    """Entries uniform on [0, 1), as in the released code: columns about √(m/3) long."""
    return torch.rand(m, n, dtype=torch.float64)


def normal(m, n):
    """Entries N(0, 1), as reported for the paper, with columns scaled (by us) to norm 1."""
    return nn.functional.normalize(torch.randn(m, n, dtype=torch.float64), dim=0)


DICTIONARIES = {"uniform": uniform, "normal": normal}


class SparseCode(nn.Module):
    """Points b, dictionaries A and codes z of the nodes of one cell type.

    The code of a node solves

        z = argmin ½‖Az − b‖² + λ‖z‖₁

    (ISTA-NAS, the sparse coding problem of section 3), and S is the support of its s largest
    entries in modulus. From b = Az follows z = Aᵀb − (AᵀA − I)z; with z held constant and
    restricted to S, the weights of the pairs that run are

        w_S = M b − c,     M = A_Sᵀ,     c = (A_Sᵀ A_S − I) z_S,

    in which b alone moves until the next recovery.

    Parameters
    ----------
    proj_dims, sparseness, lam
        m, the length of b; s, the pairs kept at each node; λ.
    distinct_edges : bool
        Whether the support takes at most one pair an edge: that of each edge's largest |z|, and
        of these the s largest, as DARTS derives its cells.
    dictionary : str
        One of `DICTIONARIES`.

    Attributes
    ----------
    A : list of 4 tensors, float64, (m, n_j)
    b : nn.ParameterList of 4 tensors, (m,)
        All that is trained of the architecture; initialised 1e-3·N(0, 1).
    z : list of 4 tensors, float64, (n_j,)
    S : tensor, int64, (4, s)
        Numbers k = edge·7 + operation of the pairs of the support.
    frozen : tensor, bool, (4,)
        Whether the code of a node is final.
    support : list of 4 lists of (edge, operation index)
        A view of S for Python, which decides with it what runs.
    is_frozen : list of 4 bools
        A view of `frozen` for Python.
    M, c : tensors, float64, (4, s, m) and (4, s)

    Notes
    -----
    `support`, `is_frozen`, M and c follow A, z, S and `frozen` when these are written in place,
    loaded, copied or moved. After a write through `.data`, call `recover`.
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
        """Compute everything again that follows from A, z, S and `frozen`, if one has changed."""
        if torch.compiler.is_compiling():  # the compiler guards the lists, and reads no versions
            return
        sources = [*self.A, *self.z, self.S, self.frozen]
        # Tensors that were made in inference mode have no version.
        versions = [(t.data_ptr(), t.is_inference() or t._version) for t in sources]
        if versions == self._versions:
            return
        self._versions = versions
        self._is_frozen = self.frozen.tolist()
        self._support = [[divmod(k, len(PRIMITIVES)) for k in node] for node in self.S.tolist()]
        with torch.inference_mode(self.M.is_inference()), torch.no_grad():
            # In place, because a CUDA graph reads M and c from where they are.
            for j, (A, z, S) in enumerate(zip(self.A, self.z, self.S, strict=True)):
                A_S, z_S = A[:, S], z[S]                              # (m, s), (s,)
                self.M[j] = A_S.T
                self.c[j] = A_S.T @ (A_S @ z_S) - z_S

    def solve(self, solver="homotopy"):
        """The new codes of the points b, the last ones, ‖Aᵀb‖∞ of each, and the solver's failures.

        Codes are lists of 4 arrays, float64 (n_j,), the same in both where a node is frozen. The
        failures are the number of codes for which homotopy took the solver's place.
        """
        A, b, last = map(_to_arrays, (self.A, self.b, self.z))
        codes, not_converged = [*last], 0
        for j in range(NODES):
            if not self.is_frozen[j]:
                solution = ista.recover(A[j], b[j], self.lam, solver, z0=last[j])
                if not solution.converged:
                    not_converged += 1
                    solution = ista.recover(A[j], b[j], self.lam, z0=last[j])
                codes[j] = solution.z
        lam_max = [float(np.abs(A.T @ b).max()) for A, b in zip(A, b, strict=True)]
        return codes, last, lam_max, not_converged

    def choose(self, codes):
        """The rule: the support that codes give, of each node the s pairs largest in |z|.

        Takes the 4 codes, arrays (n_j,); returns 4 lists of (edge, operation index). Ties go to the
        smaller index, and where a code has fewer than s nonzero entries, to pairs of the last
        support. Asked once a recovery; a frozen node keeps its support whatever it says.
        """
        support = []
        for z, last in zip(codes, self.support, strict=True):
            size, pairs = np.abs(z), np.arange(len(z))
            has_run = np.isin(pairs, indices(last))
            order = np.lexsort((~has_run & (size == 0), -size))  # stable
            if self.distinct_edges:
                _, first = np.unique(order // len(PRIMITIVES), return_index=True)
                order = order[np.sort(first)]  # each edge's largest
            chosen = np.sort(order[: self.sparseness]).tolist()
            support.append([divmod(k, len(PRIMITIVES)) for k in chosen])
        return support

    def is_too_sparse(self, z):
        """Whether a code has fewer than s nonzero entries to choose from."""
        pairs = np.flatnonzero(z)
        choices = np.unique(pairs // len(PRIMITIVES)) if self.distinct_edges else pairs
        return len(choices) < self.sparseness

    def choose_unfrozen(self, codes):
        """What `choose` says, but for frozen nodes."""
        chosen = [[(int(edge), int(op)) for edge, op in node] for node in self.choose(codes)]
        if len(chosen) != NODES:
            raise ValueError(f"SparseCode.choose returned {len(chosen)} nodes instead of {NODES}")
        for j, node in enumerate(chosen):
            exist = all(edge in range(j + 2) and op in range(len(PRIMITIVES)) for edge, op in node)
            if not exist or not len({*node}) == len(node) == self.sparseness:
                raise ValueError(
                    f"SparseCode.choose returned {node} for node {j}: it has to return "
                    f"{self.sparseness} different pairs of an edge below {j + 2} and an operation "
                    f"below {len(PRIMITIVES)}"
                )
        nodes = zip(self.is_frozen, self.support, chosen, strict=True)
        return [last if frozen else new for frozen, last, new in nodes]

    @torch.no_grad()
    def accept(self, codes, support):
        """Write codes into z, and a support into S."""
        for z, code in zip(self.z, codes, strict=True):
            z.copy_(torch.as_tensor(code))
        self.S.copy_(torch.tensor([indices(node) for node in support]))
        self._versions = None
        self._refresh()

    def recover(self, solver="homotopy"):
        """Refresh z and the support from b, but for frozen nodes.

        `solver` is one of `ista.SOLVERS`; returns for how many codes it did not converge, so that
        homotopy took its place. Raises ista.SolverUnavailable without its package or licence.
        """
        codes, *_, not_converged = self.solve(solver)
        self.accept(codes, self.choose_unfrozen(codes))
        return not_converged

    def active_weights(self):
        """Weights w_S = M b − c of the support: float64, (4, s), differentiable in b."""
        self._refresh()
        b = torch.stack([*self.b]).to(self.M.dtype)                   # (4, m)
        return torch.einsum("jsm,jm->js", self.M, b) - self.c

    def weights(self):
        """Weights of all pairs, for inspection: float64, (14, 7), zero off the support.

        One row an edge (2 of node 0, 3 of node 1, ...), one column an operation.
        """
        rows, columns, first = [], [], 0
        for j, node in enumerate(self.support):
            rows += [first + edge for edge, _ in node]
            columns += [op for _, op in node]
            first += j + 2
        w = self.active_weights().flatten()
        dense = w.new_zeros(first, len(PRIMITIVES))
        dense[rows, columns] = w
        return dense


def _to_arrays(tensors):
    """Copy tensors to float64 arrays."""
    return [t.detach().double().numpy(force=True).copy() for t in tensors]


def indices(pairs):
    """The numbers k = edge·7 + operation of pairs."""
    return [edge * len(PRIMITIVES) + op for edge, op in pairs]


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------


class MixedOp(nn.Module):
    """The candidate operations of one edge, of which each call runs one: w · op(x)."""

    def __init__(self, C, stride, one_stage):
        super().__init__()
        self._ops = nn.ModuleList(
            build(primitive, C, stride, affine=one_stage, norm_pools=True, norm_skips=one_stage)
            for primitive in PRIMITIVES
        )

    def forward(self, x, op, w):
        return weighted(self._ops[op], x, w)


class Cell(nn.Module):
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
        """The MixedOps that lead into intermediate node j, by their input node."""
        first = sum(i + 2 for i in range(j))
        return self._ops[first : first + j + 2]

    def forward(self, s0, s1, keep, support, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]         # nodes: (B, C, H, W)
        first = 0  # edge into this node from node 0
        for node, node_weights in zip(support, weights, strict=True):
            terms = []
            for (edge, op), w in zip(node, node_weights, strict=True):
                y = self._ops[first + edge](states[edge], op, w)
                if keep is not None:  # one-stage search, in which even a skip is not bare
                    y = drop_path(y, keep)
                terms.append(y)
            first += len(states)
            states.append(sum(terms[1:], terms[0]))
        return concat(states[2:])                                     # (B, 4C, H, W)


class Network(Skeleton):
    """The sparse supernet of both searches.

    Parameters
    ----------
    C, num_classes, layers : int
        Channels of the first cells, classes, number of cells.
    one_stage : bool
        Supernet of one-stage search: every operation ends in an affine BatchNorm. In all
        BatchNorms of a node's operations, γ = 1 and β = 0 are held until the node freezes.
    auxiliary : bool
        Whether it has an auxiliary head.
    imagenet : bool
        Stem and auxiliary head for 224×224 images instead of those for 32×32.
    proj_dims, sparseness, lam, distinct_edges, dictionary
        See `SparseCode`; those of the two cell types are `normal_code` and `reduce_code`.
    """

    def __init__(
        self, C, num_classes, layers, *, one_stage=False, auxiliary=False, imagenet=False,
        proj_dims=7, sparseness=2, lam=1e-5, distinct_edges=False, dictionary="uniform",
    ):
        def make_cell(*shape):
            return Cell(*shape, one_stage)

        super().__init__(C, num_classes, layers, auxiliary, make_cell, imagenet)
        self.shape = dict(C=C, num_classes=num_classes, layers=layers)
        self.one_stage = one_stage
        of_code = proj_dims, sparseness, lam, distinct_edges, dictionary
        self.normal_code, self.reduce_code = SparseCode(*of_code), SparseCode(*of_code)
        self.codes = (self.normal_code, self.reduce_code)
        self._update_requires_grad()
        self.register_load_state_dict_post_hook(Network._update_requires_grad)

    def forward(self, x):
        return super().forward(x, *(self._given(code) for code in self.codes))

    def _given(self, code):  # to the cells of its type: the support, and its weights as scalars
        weights = code.active_weights().to(self.classifier.weight.dtype)
        return code.support, [w.unbind() for w in weights.unbind()]

    def active_modules(self):
        idle = {m for *_, op in self.idle_operations() for m in op.modules()}
        return [m for m in self.modules() if m not in idle]

    def graph_key(self):
        supports = [code.support for code in self.codes]
        return {**super().graph_key(), "the support": supports, "the frozen nodes": self.frozen}

    def operations(self):
        """Return the preprocess layers and all candidate operations of all cells."""
        found = []
        for cell in self.cells:
            candidates = [op for mixed in cell._ops for op in mixed._ops if op is not None]
            found += [cell.preprocess0, cell.preprocess1, *candidates]
        return found

    def arch_parameters(self):
        return [*self.normal_code.b, *self.reduce_code.b]

    def weight_parameters(self):
        arch = {id(b) for b in self.arch_parameters()}
        return [p for p in self.parameters() if id(p) not in arch]

    def genotype(self, supports=None):
        """The support, or another one of the normal and of the reduction cell, as a Genotype."""
        normal, reduce = supports or (code.support for code in self.codes)
        concat = range(2, 2 + NODES)
        return Genotype(as_pairs(normal), concat, as_pairs(reduce), concat)

    def describe(self):
        """The genotype as plain lists, and the weights of its pairs: a line of genotypes.jsonl."""
        normal, reduce = (code.active_weights().flatten().tolist() for code in self.codes)
        return {**as_lists(self.genotype()), "normal_weights": normal, "reduce_weights": reduce}

    def recover(self, solver="homotopy", freeze_tol=None, max_params=None, share=None):
        """Refresh codes and supports from the points b.

        Parameters
        ----------
        solver : str
            One of `ista.SOLVERS`; ista.SolverUnavailable without its package or licence.
        freeze_tol : float, optional
            A node freezes when ‖z_new − z_last‖₂ ≤ freeze_tol.
        max_params : float, optional
            Millions of parameters. A candidate whose retraining network has as many or more is
            rejected: the last architecture stays, and no node freezes.
        share : callable, optional
            With several ranks: takes the results of this rank, and returns those of rank 0,
            because rounding may differ.

        Returns
        -------
        Recovery
        """
        solved = [code.solve(solver) for code in self.codes]
        codes, last, lam_max, not_converged = zip(*solved, strict=True)
        supports = [code.choose_unfrozen(z) for code, z in zip(self.codes, codes, strict=True)]
        if share:
            codes, supports, lam_max = share((codes, supports, lam_max))

        nodes = zip(_joined(codes), _joined(last), strict=True)
        distance = [float(np.linalg.norm(z - old)) for z, old in nodes]
        too_sparse = _joined([code.is_too_sparse(z) for z in of_type]
                             for code, of_type in zip(self.codes, codes, strict=True))
        parameters, rejected = None, False
        if freeze_tol is not None or max_params is not None:
            parameters = self.retraining_parameters(self.genotype(supports))
            rejected = max_params is not None and parameters >= max_params * 1e6
        if not rejected:
            for code, z, support in zip(self.codes, codes, supports, strict=True):
                code.accept(z, support)
            if freeze_tol is not None:
                at_rest = zip(distance, too_sparse, strict=True)
                self.freeze([d <= freeze_tol and not sparse for d, sparse in at_rest])
        return Recovery(
            distance, self.frozen, parameters, rejected, sum(not_converged), too_sparse,
            _joined(lam_max),
        )

    # --------------------------------------------------------------------------------------------
    # One-stage search
    # --------------------------------------------------------------------------------------------

    @property
    def frozen(self):
        """For each node, normal ones first, whether its code is final."""
        return _joined(code.is_frozen for code in self.codes)

    def freeze(self, nodes=None):
        """Make codes final: their b stops, and γ and β of their operations start to train.

        `nodes`: which ones, a bool for each, normal ones first; all if it is None.
        """
        flags = torch.tensor(2 * NODES * [True] if nodes is None else nodes)
        for code, of_code in zip(self.codes, flags.split(NODES), strict=True):
            code.frozen |= of_code.to(code.frozen.device)
        self._update_requires_grad()

    def _update_requires_grad(self, _incompatible_keys=None):
        """Train b of the nodes that are searched, and γ and β of the operations of frozen nodes."""
        if not self.one_stage:
            return
        for code, reduction in zip(self.codes, (False, True), strict=True):
            for j, frozen in enumerate(code.is_frozen):
                code.b[j].requires_grad_(not frozen)
                if frozen:
                    code.b[j].grad = None  # else the optimizer would step on it once more
                for cell in self.cells:
                    if cell.reduction == reduction:
                        for layer in cell.edges(j).modules():
                            if isinstance(layer, nn.BatchNorm2d):
                                layer.requires_grad_(frozen)

    def retraining_parameters(self, genotype=None):
        """Parameters of the network that retraining would build, without an auxiliary head."""
        with torch.device("meta"):
            plain = self._plain(genotype or self.genotype(), auxiliary=False)
        return sum(p.numel() for p in plain.parameters())

    def _plain(self, genotype, auxiliary):
        build_network = NetworkImageNet if self.imagenet else NetworkCIFAR
        return build_network(
            **self.shape, auxiliary=auxiliary, genotype=genotype, one_stage=self.one_stage
        )

    def idle_operations(self):
        """The operations outside the support, each with its MixedOp and its index there."""
        for cell in self.cells:
            support = self.codes[cell.reduction].support
            for j in range(NODES):
                for edge, mixed in enumerate(cell.edges(j)):
                    for k, op in enumerate(mixed._ops):
                        if op is not None and (edge, k) not in support[j]:
                            yield mixed, k, op

    def prune(self):
        """Drop the operations outside the support, for good; returns the parameters they held."""
        dropped = []
        for mixed, k, op in self.idle_operations():
            dropped += op.parameters()
            mixed._ops[k] = None
        return dropped

    def prune_like(self, state_dict):
        """Drop the operations that a state dict lacks: it is that of a pruned supernet."""
        here = {operation_of(key) for key in state_dict}
        for key in self.state_dict():
            if (name := operation_of(key)) and name not in here:
                operations, _, op = name.rpartition(".")
                self.get_submodule(operations)[int(op)] = None

    @torch.no_grad()
    def absorb(self):
        """A new model.NetworkCIFAR or NetworkImageNet with the same outputs, from one-stage search.

        The weight of each active operation is folded into its last BatchNorm: γ ← wγ, β ← wβ. The
        supernet stays as it is. ValueError for the two-stage one, whose operations cannot take a
        weight, and where the outputs differ.
        """
        if not self.one_stage:
            raise ValueError("only the supernet of one-stage search can be absorbed")
        with torch.random.fork_rng(devices=[]):  # initial weights draw no random number of the run
            plain = self._plain(self.genotype(), self.auxiliary)
        plain.to(self.classifier.weight)
        plain.drop_path_prob = self.drop_path_prob
        own = plain.state_dict()
        own.update((k, v) for k, v in self.state_dict().items() if k in own and "._ops." not in k)
        plain.load_state_dict(own)
        for cell, plain_cell in zip(self.cells, plain.cells, strict=True):
            support, weights = self._given(self.codes[cell.reduction])
            plain_ops = iter(plain_cell._ops)
            for j in range(NODES):
                for (edge, op), w in zip(support[j], weights[j], strict=True):
                    plain_op = next(plain_ops)
                    plain_op.load_state_dict(cell.edges(j)[edge]._ops[op].state_dict())
                    absorb_weight(plain_op, w)
        self._check_same_outputs(plain)
        return plain.train(self.training)

    def _check_same_outputs(self, plain):
        size = 64 if self.imagenet else 32
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        nets = [copy.deepcopy(net).cpu().eval() for net in (plain, self)]  # TF32 rounds on CUDA
        (found, _), (expected, _) = (net(x.to(net.keep_prob)) for net in nets)
        if not torch.allclose(found, expected, rtol=0, atol=1e-2 * expected.abs().max().item()):
            raise ValueError(
                "one-stage search cannot absorb the weights w: the network after absorption "
                "computes something else than the supernet, because an edit of MixedOp, Cell or "
                "Network does more with w than to multiply the output of an operation by it"
            )


def absorb_weight(op, w):
    """Fold w into the last BatchNorm of an operation: γ ← wγ, β ← wβ."""
    norm = last_norm(op)
    norm.weight.mul_(w)
    norm.bias.mul_(w)


@torch.no_grad()
def check_operations(C, one_stage, imagenet=False):
    """Raise ValueError if an edited operation or cell would make a search wrong.

    An operation that takes `pair_weight` has to multiply its output by it. In one-stage search, its
    last BatchNorm also has to absorb w, in each operation and in a whole network.
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
        # Two operations run at the first edge of each node, which has stride 2 in reduction cells.
        for first in range(0, len(PRIMITIVES) * one_stage, 2 * NODES):
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
        raise ValueError(f"{name}: images {tuple(x.shape)} become {tuple(y.shape)}, but have to "
                         f"become {expected}")
    if not torch.equal(x, before):
        raise ValueError(f"{name}: the operation writes into its input, which other operations "
                         "read as well: leave out inplace=True")
    if not torch.allclose(weighted(op, x, w), w * y, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{name}: forward(x, pair_weight) is not pair_weight · forward(x): multiply the whole "
            "output by pair_weight, or leave that argument out"
        )


def check_absorption(name, op, x, w):
    absorbed = copy.deepcopy(op)
    if last_norm(op) is None or not last_norm(op).affine:
        raise ValueError(f"{name}: one-stage search needs a BatchNorm at the end of the operation, "
                         "whose γ and β absorb w: append one")
    absorb_weight(absorbed, w)
    if not torch.allclose(absorbed(x), w * op(x), rtol=1e-3, atol=1e-3):
        raise ValueError(f"{name}: one-stage search cannot absorb w, because the operation goes on "
                         "after its last BatchNorm: append a BatchNorm")


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


def as_pairs(support):
    """A support as a Genotype lists it: `[(operation name, input node), ...]`."""
    return [(PRIMITIVES[op], edge) for node in support for edge, op in node]


def operation_of(key):
    """Name of the candidate operation that a state-dict key belongs to, or None."""
    found = re.match(r"cells\.\d+\._ops\.\d+\._ops\.\d+", key)
    return found and found[0]


def _joined(of_types):
    """One list of the nodes of both cell types."""
    return [node for nodes in of_types for node in nodes]
