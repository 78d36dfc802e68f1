"""The sparse supernet: a network over all candidate operations that runs only a few of them.

    from model_search import Network
    net = Network(16, 10, 8)
    logits, _ = net(images)                     # runs 2 of the n_j candidates of every node
    net.recover()                               # new code and support from the point b
    print(net.genotype())

Every cell of a type shares one `SparseCode`. Node j of a cell (j = 0..3) may choose among
n_j = 7(j+2) pairs of an edge and an operation, numbered k = edge·7 + operation. Its code z_j in
R^{n_j} is not trained: it is recovered from a point b_j in R^m, m = 7, through a fixed dictionary
A_j, and its 2 largest entries are the support S_j, the pairs that run.
"""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import distributed
import ista
from genotypes import NODES, PRIMITIVES, Genotype, as_lists
from model import NetworkCIFAR, Skeleton, preprocess
from operations import BatchNorm2d, State, build, drop_path


class Recovery(NamedTuple):
    """What one recovery did. Lists are node by node: 4 normal nodes, then 4 reduction nodes.

    Attributes
    ----------
    distance : list of float
        ‖z_new − z_last‖₂ of each node, z_last being the last code that was accepted; 0 for a
        frozen node.
    changed : int
        Pairs in the supports now that were not there before.
    frozen : list of bool
        Nodes whose code is final.
    parameters : int or None
        Of the candidate's retraining network, where they are limited.
    rejected : bool
        Whether they were too many, so that the last architecture was kept.
    not_converged : int
        Codes for which the solver asked for did not converge, so that homotopy solved them.
    """

    distance: list
    changed: int
    frozen: list
    parameters: int | None
    rejected: bool
    not_converged: int


def _to_host(tensors):
    """Read tensors, alike but for their last dimension, off the device at once: float64 arrays."""
    joined = torch.cat([*tensors], -1).double().numpy(force=True)
    widths = [t.shape[-1] for t in tensors]
    return [joined[..., end - n : end] for n, end in zip(widths, accumulate(widths), strict=True)]


class SparseCode(nn.Module):
    """Points b, dictionaries A and codes z of the 4 nodes of one cell type.

    The code of a node solves

        z = argmin ½‖Az − b‖² + λ‖z‖₁

    (ISTA-NAS, the sparse coding problem of section 3), and S is the support of its s largest
    entries in modulus.
    From b = Az follows z = Aᵀb − (AᵀA − I)z; with z held constant and restricted to S, the
    weights of the pairs that run are

        w_S = A_Sᵀ b − (A_Sᵀ A_S − I) z_S,

    whose derivative with respect to b is A_S.

    Parameters
    ----------
    proj_dims : int
        m, the length of b.
    sparseness : int
        s, the pairs kept at each node.
    lam : float
        λ.

    Attributes
    ----------
    A : list of 4 tensors, float64, (m, n_j)
        Entries uniform on [0, 1), drawn once.
    b : nn.ParameterList of 4 tensors, (m,)
        All that is trained of the architecture; initialised 1e-3·N(0, 1).
    z : list of 4 tensors, float64, (n_j,)
    support : list of 4 lists of (edge, operation index)
        In the order of k = edge·7 + operation. A function of z alone.
    """

    def __init__(self, proj_dims=7, sparseness=2, lam=1e-5):
        super().__init__()
        self.sparseness = sparseness
        self.lam = lam
        self.b = nn.ParameterList()
        for j in range(NODES):
            n = len(PRIMITIVES) * (j + 2)
            self.register_buffer(f"A{j}", torch.rand(proj_dims, n, dtype=torch.float64))
            self.register_buffer(f"z{j}", torch.zeros(n, dtype=torch.float64))
            self.b.append(nn.Parameter(1e-3 * torch.randn(proj_dims)))
        # The support is kept twice: in Python, so that deciding what runs asks nothing of the
        # device, and on the device, to take columns of A with. Neither is saved: z gives both.
        self.register_buffer("S", torch.empty(NODES, sparseness, dtype=torch.int64), False)
        self.register_buffer("frozen", torch.zeros(NODES, dtype=torch.bool))
        self._choose_support()
        self.register_load_state_dict_post_hook(SparseCode._choose_support)

    @property
    def A(self):
        return [getattr(self, f"A{j}") for j in range(NODES)]

    @property
    def z(self):
        return [getattr(self, f"z{j}") for j in range(NODES)]

    def recover(self, solver="homotopy"):
        """Refresh z and the support from b, but for the nodes that are frozen.

        Parameters
        ----------
        solver : str
            One of `ista.SOLVERS`. Where it does not converge, homotopy takes its place.

        Returns
        -------
        not_converged : int
            The number of codes for which that happened.

        Raises
        ------
        ista.SolverUnavailable
            If the solver needs a package or a licence that is not here.
        """
        codes, not_converged = [], 0
        problems = zip(*map(_to_host, (self.A, self.b, self.z)), self.frozen.tolist(), strict=True)
        for A, b, z, frozen in problems:
            if not frozen:
                solution = ista.recover(A, b, self.lam, solver, z0=z)
                if not solution.converged:
                    not_converged += 1
                    solution = ista.recover(A, b, self.lam, z0=z)
                z = solution.z
            codes.append(torch.from_numpy(z))
        self.accept(codes)
        return not_converged

    @torch.no_grad()
    def accept(self, codes):
        """Take 4 codes for z, and the support that they give."""
        for z, code in zip(self.z, codes, strict=True):
            z.copy_(code)
        self._choose_support()

    def active_weights(self):
        """Weights w_S of the pairs of the support.

        Returns
        -------
        tensor, float64, (4, s)
            Differentiable in b; in the order of the support.
        """
        weights = []
        for A, b, z, S in zip(self.A, self.b, self.z, self.S, strict=True):
            A_S, z_S = A[:, S].double(), z[S].double()  # also where the network was cast
            weights.append(A_S.T @ b.double() - (A_S.T @ (A_S @ z_S) - z_S))
        return torch.stack(weights)

    def weights(self):
        """Weights of all pairs, for inspection: zero off the support.

        Returns
        -------
        tensor, float64, (14, 7)
            One row an edge (2 of node 0, 3 of node 1, ...), one column an operation.
        """
        dense = []
        for j, w in enumerate(self.active_weights()):
            n = len(PRIMITIVES) * (j + 2)
            dense.append(w.new_zeros(n).index_put((self.S[j],), w))
        return torch.cat(dense).view(-1, len(PRIMITIVES))

    def pairs(self):
        """The support as `[(operation name, input node), ...]`, as a Genotype lists it."""
        return [(PRIMITIVES[op], edge) for node in self.support for edge, op in node]

    def _choose_support(self, _incompatible_keys=None):
        # A stable sort gives ties to the smaller index.
        order = [np.argsort(-np.abs(z), kind="stable") for z in _to_host(self.z)]
        S = np.sort([indices[: self.sparseness] for indices in order])
        self.S.copy_(torch.from_numpy(S))
        self.support = [[divmod(k, len(PRIMITIVES)) for k in node] for node in S.tolist()]


class MixedOp(nn.Module):
    """The candidate operations of one edge, of which each call runs one."""

    def __init__(self, C, stride, one_stage):
        super().__init__()
        self._ops = nn.ModuleList(
            build(primitive, C, stride, affine=one_stage, norm_pools=True, norm_skips=one_stage)
            for primitive in PRIMITIVES
        )

    def forward(self, state, op, w, drop_prob=0.0):
        y = self._ops[op](state, w)
        if drop_prob > 0 and not self._ops[op].is_identity:
            y = drop_path(y, drop_prob)
        return y


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

    def forward(self, s0, s1, drop_prob, support, weights):
        states = [State(self.preprocess0(s0)), State(self.preprocess1(s1))]
        first = 0  # edge into this node from node 0
        for node, node_weights in zip(support, weights, strict=True):
            outputs = [
                self._ops[first + edge](states[edge], op, w, drop_prob)
                for (edge, op), w in zip(node, node_weights, strict=True)
            ]
            first += len(states)
            states.append(State(sum(outputs[1:], outputs[0])))
        return State(None, states[2:])


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
    proj_dims, sparseness, lam
        See `SparseCode`.

    Attributes
    ----------
    normal_code, reduce_code : SparseCode
    drop_path_prob : float
    """

    def __init__(
        self, C, num_classes, layers, *,
        one_stage=False, auxiliary=False, proj_dims=7, sparseness=2, lam=1e-5,
    ):  # fmt: skip
        def make_cell(*shape):
            return Cell(*shape, one_stage)

        super().__init__(C, num_classes, layers, auxiliary, make_cell)
        self.shape = dict(C=C, num_classes=num_classes, layers=layers)
        self.one_stage = one_stage
        self.normal_code = SparseCode(proj_dims, sparseness, lam)
        self.reduce_code = SparseCode(proj_dims, sparseness, lam)
        self.codes = (self.normal_code, self.reduce_code)
        self._recover("homotopy", None, None)
        self._hold()
        self.register_load_state_dict_post_hook(Network._hold)

    def forward(self, x):
        """Logits of a batch, and those of the auxiliary head or None; see `Skeleton.forward`."""
        return super().forward(x, *(self._given(code) for code in self.codes))

    def _given(self, code):
        """What the cells of a type are given: the support, and its weights as scalars."""
        weights = code.active_weights().to(self.classifier.weight.dtype)
        return code.support, [w.unbind() for w in weights.unbind()]

    def arch_parameters(self):
        """The points b: those of the normal nodes, then those of the reduction nodes."""
        return [*self.normal_code.b, *self.reduce_code.b]

    def weight_parameters(self):
        """All other parameters."""
        arch = {id(b) for b in self.arch_parameters()}
        return [p for p in self.parameters() if id(p) not in arch]

    def idle_parameters(self):
        """The parameters of the operations outside the support."""
        for operations, op in self._outside():
            yield from operations[op].parameters()

    def genotype(self):
        """The support as a Genotype: at each node its pairs by input node, then operation."""
        concat = range(2, 2 + NODES)
        return Genotype(self.normal_code.pairs(), concat, self.reduce_code.pairs(), concat)

    def describe(self):
        """The genotype as plain lists, and the weights of its pairs: a line of genotypes.jsonl."""
        normal, reduce = (code.active_weights().flatten().tolist() for code in self.codes)
        return {**as_lists(self.genotype()), "normal_weights": normal, "reduce_weights": reduce}

    def recover(self, solver="homotopy", freeze_tol=None, max_params=None):
        """Refresh codes and supports from the points b.

        Of several processes the first does so, and the others take its codes over.

        Parameters
        ----------
        solver : str
            One of `ista.SOLVERS`.
        freeze_tol : float, optional
            A node freezes when ‖z_new − z_last‖₂ ≤ freeze_tol.
        max_params : float, optional
            Millions of parameters. A candidate whose retraining network has as many or more is
            rejected: the last architecture stays, and no node freezes.

        Returns
        -------
        Recovery

        Raises
        ------
        ista.SolverUnavailable
            If the solver needs a package or a licence that is not here.
        """
        recovery, codes = distributed.on_first(
            lambda: (self._recover(solver, freeze_tol, max_params), self._codes_state())
        )
        if distributed.rank() > 0:
            super().load_state_dict(codes, strict=False)
        return recovery

    def _codes_state(self):
        names = ("normal_code", "reduce_code")
        states = [getattr(self, name).state_dict(prefix=f"{name}.") for name in names]
        return {key: value.cpu() for state in states for key, value in state.items()}

    def _recover(self, solver, freeze_tol, max_params):
        last = [[z.clone() for z in code.z] for code in self.codes]
        last_pairs = [set(node) for code in self.codes for node in code.support]
        not_converged = sum(code.recover(solver) for code in self.codes)
        distance = torch.stack([
            torch.dist(new, old)
            for code, zs in zip(self.codes, last, strict=True)
            for new, old in zip(code.z, zs, strict=True)
        ]).tolist()  # fmt: skip
        parameters, rejected = None, False
        if max_params is not None:
            parameters = self.retraining_parameters()
            rejected = parameters >= max_params * 1e6
        if rejected:
            for code, zs in zip(self.codes, last, strict=True):
                code.accept(zs)
        elif freeze_tol is not None:
            self.freeze([d <= freeze_tol for d in distance])
        pairs = [set(node) for code in self.codes for node in code.support]
        changed = sum(len(new - old) for new, old in zip(pairs, last_pairs, strict=True))
        return Recovery(distance, changed, self.frozen, parameters, rejected, not_converged)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load parameters, buffers and codes; the state of a pruned network prunes this one."""
        codes = {k: v for k, v in state_dict.items() if k.split(".")[0].endswith("_code")}
        if codes and any("._ops." in k for k in self.state_dict().keys() - state_dict.keys()):
            super().load_state_dict(codes, strict=False)
            self.prune()
        return super().load_state_dict(state_dict, *args, **kwargs)

    # --------------------------------------------------------------------------------------------
    # One-stage search
    # --------------------------------------------------------------------------------------------

    @property
    def frozen(self):
        """For each of the 8 nodes, whether its code is final."""
        return [flag for code in self.codes for flag in code.frozen.tolist()]

    def freeze(self, nodes):
        """Make codes final: their b stops, and γ and β of their operations start to train.

        Parameters
        ----------
        nodes : list of 8 bools
            The nodes to freeze; those that are frozen already stay so.
        """
        for code, flags in zip(self.codes, (nodes[:NODES], nodes[NODES:]), strict=True):
            code.frozen |= torch.tensor(flags, device=code.frozen.device)
        self._hold()

    def _hold(self, _incompatible_keys=None):
        """Let b train while its node is searched, and γ and β of its operations once it is not."""
        if not self.one_stage:
            return
        for code, reduction in zip(self.codes, (False, True), strict=True):
            for j, frozen in enumerate(code.frozen.tolist()):
                code.b[j].requires_grad_(not frozen)
                if frozen:
                    code.b[j].grad = None  # else the optimizer would step on it once more
                for cell in self.cells:
                    if cell.reduction == reduction:
                        for layer in cell.edges(j).modules():
                            if isinstance(layer, BatchNorm2d):
                                layer.requires_grad_(frozen)

    def retraining_parameters(self):
        """Parameters of the network that retraining would build, without an auxiliary head."""
        with torch.device("meta"):
            plain = NetworkCIFAR(
                **self.shape, auxiliary=False, genotype=self.genotype(), one_stage=self.one_stage
            )
        return sum(p.numel() for p in plain.parameters())

    def prune(self):
        """Drop the operations outside the support, for good.

        Returns
        -------
        list of nn.Parameter
            What they held, for an optimizer to forget.
        """
        dropped = list(self.idle_parameters())
        for operations, op in self._outside():
            operations[op] = None
        return dropped

    def _outside(self):
        """The operations outside the support: of each, the list that holds it and its place."""
        for cell in self.cells:
            support = self.codes[cell.reduction].support
            for j in range(NODES):
                for edge, mixed in enumerate(cell.edges(j)):
                    for op, layer in enumerate(mixed._ops):
                        if layer is not None and (edge, op) not in support[j]:
                            yield mixed._ops, op

    @torch.no_grad()
    def absorb(self):
        """Fold the weight of each active operation into its last BatchNorm: γ ← wγ, β ← wβ.

        Returns
        -------
        model.NetworkCIFAR
            A new network of the genotype with the same outputs. The supernet stays as it is.

        Raises
        ------
        ValueError
            For the supernet of two-stage search, whose operations have nothing to fold into.
        """
        if not self.one_stage:
            raise ValueError("only the supernet of one-stage search can be absorbed")
        with torch.device("meta"):  # no memory, and no random number, is spent on initial weights
            plain = NetworkCIFAR(
                **self.shape, auxiliary=self.auxiliary, genotype=self.genotype(), one_stage=True
            )
        weight = self.classifier.weight
        plain.to_empty(device=weight.device).to(weight.dtype).train(self.training)
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
                    plain_op.norm.weight.mul_(w)
                    plain_op.norm.bias.mul_(w)
        return plain
