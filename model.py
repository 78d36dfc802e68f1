"""Networks with a fixed genotype, for retraining and evaluation.

    import genotypes, model
    net = model.NetworkCIFAR(36, 10, 20, True, genotypes.ISTA_twostage)
    logits, logits_aux = net(images)            # images: float32, (batch, 3, 32, 32)

A network is a stem, a sequence of cells and a classifier. `Skeleton` contains them; the supernet in
`model_search.py` uses it with other cells.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from genotypes import as_lists, by_node, from_lists
from layers import BatchNorm2d, Conv2d, ReLU, Sequential, concat
from operations import FactorizedReduce, ReLUConvBN, build, drop_path


class Skeleton(nn.Module):
    """Stem, cells, auxiliary head and classifier, as DARTS lays them out.

    Cells layers//3 and 2·layers//3 are reduction cells: they halve the resolution and double the
    channels. The auxiliary head is applied to the output of the second one.
    make_cell(C_prev_prev, C_prev, C, reduction, reduction_prev) builds a cell. `drop_path_prob` is
    the probability with which training drops the output of an operation for an image.
    """

    def __init__(self, C, num_classes, layers, auxiliary, make_cell, imagenet=False):
        super().__init__()
        self.imagenet = imagenet
        if imagenet:
            self.stem0 = Sequential(
                Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False),
                BatchNorm2d(C // 2),
                ReLU(inplace=True),
                Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
                BatchNorm2d(C),
            )
            self.stem1 = Sequential(
                ReLU(),
                Conv2d(C, C, 3, stride=2, padding=1, bias=False),
                BatchNorm2d(C),
            )
            C_prev_prev, C_prev, reduction_prev = C, C, True
        else:
            self.stem = Sequential(
                Conv2d(3, 3 * C, 3, padding=1, bias=False), BatchNorm2d(3 * C)
            )
            C_prev_prev, C_prev, reduction_prev = 3 * C, 3 * C, False

        self.auxiliary = auxiliary
        self.auxiliary_layer = 2 * layers // 3
        self.register_buffer("keep_prob", torch.ones(()), persistent=False)
        self.drop_path_prob = 0.0
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            cell = make_cell(C_prev_prev, C_prev, C, reduction, reduction_prev)
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, cell.C_out
            if i == self.auxiliary_layer:
                C_auxiliary = C_prev
        if auxiliary:
            self.auxiliary_head = AuxiliaryHead(C_auxiliary, num_classes, imagenet)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)

    @property
    def drop_path_prob(self):
        return self._drop_path_prob

    @drop_path_prob.setter
    def drop_path_prob(self, value):
        # A tensor on the device, so that CUDA graphs stay valid when the probability changes.
        self.keep_prob.fill_(1 - value)
        self._drop_path_prob, self._drops_paths = value, value > 0

    def active_modules(self):
        """Return the modules that a forward pass runs."""
        return self.modules()

    def graph_key(self):
        """Return by name the values that select the kernels of a forward pass, besides shapes."""
        return {"training mode": self.training, "drop-path": self._drops_paths}

    def forward(self, x, normal_args=(), reduce_args=()):             # (B, 3, H, W)
        """Return logits and auxiliary logits, which are None in evaluation or without such a head.

        The supernet passes support and weights to the cells of each type.
        """
        if self.imagenet:
            s0 = self.stem0(x)                                        # (B, C, H/4, W/4)
            s1 = self.stem1(s0)                                       # (B, C, H/8, W/8)
        else:
            s0 = s1 = self.stem(x)                                    # (B, 3C, H, W)
        logits_aux = None
        keep = self.keep_prob if self.training and self._drops_paths else None
        for i, cell in enumerate(self.cells):
            cell_args = reduce_args if cell.reduction else normal_args
            s0, s1 = s1, cell(s0, s1, keep, *cell_args)
            if i == self.auxiliary_layer and self.auxiliary and self.training:
                logits_aux = self.auxiliary_head(s1)                  # (B, num_classes)
        pooled = self.global_pooling(s1).flatten(1)                   # (B, C of the last cell)
        return self.classifier(pooled), logits_aux


class PoolTo2x2(nn.Module):
    """Average pooling to 2×2 pixels for any image size.

    As in DARTS, the window is 5 for 8×8 pixels (CIFAR, stride 3) and 7×7 (ImageNet, stride 2).
    """

    def forward(self, x):
        size = x.shape[-1]
        if size == 1:
            return F.adaptive_avg_pool2d(x, 2)
        window = min(math.ceil(size * 5 / 8), size - 1)
        return F.avg_pool2d(x, window, stride=size - window)


class AuxiliaryHead(nn.Module):
    """A second classifier after two thirds of the cells, for shorter paths of the gradient."""

    def __init__(self, C, num_classes, imagenet=False):
        super().__init__()
        self.features = Sequential(
            ReLU(),
            PoolTo2x2(),
            Conv2d(C, 128, 1, bias=False),
            BatchNorm2d(128),
            ReLU(inplace=True),
            Conv2d(128, 768, 2, bias=False),
            # DARTS omits this BatchNorm for ImageNet, and so published weights lack it.
            nn.Identity() if imagenet else BatchNorm2d(768),
            ReLU(inplace=True),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):                                             # (B, C, H, W)
        return self.classifier(self.features(x).flatten(1))           # (B, num_classes)


def preprocess(C_prev_prev, C_prev, C, reduction_prev, affine=True):
    """Build the two layers that give a cell's inputs C channels and the same resolution."""
    if reduction_prev:
        first = FactorizedReduce(C_prev_prev, C, affine)
    else:
        first = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine)
    return first, ReLUConvBN(C_prev, C, 1, 1, 0, affine)


class Cell(nn.Module):
    """A cell whose nodes are sums over (operation, input node) pairs."""

    def __init__(self, genotype, C_prev_prev, C_prev, C, reduction, reduction_prev, one_stage):
        super().__init__()
        self.reduction = reduction
        self.preprocess0, self.preprocess1 = preprocess(C_prev_prev, C_prev, C, reduction_prev)
        pairs = genotype.reduce if reduction else genotype.normal
        self.outputs = genotype.reduce_concat if reduction else genotype.normal_concat
        self.C_out = C * len(self.outputs)
        self.inputs = by_node([node for _, node in pairs])
        self._ops = nn.ModuleList(
            build(primitive, C, stride=2 if reduction and node < 2 else 1,
                  norm_pools=one_stage, norm_skips=one_stage)
            for primitive, node in pairs
        )

    def forward(self, s0, s1, keep):
        states = [self.preprocess0(s0), self.preprocess1(s1)]         # nodes: (B, C, H, W)
        ops = iter(self._ops)
        for inputs in self.inputs:
            terms = []
            for node in inputs:
                op = next(ops)
                y = op(states[node])
                if keep is not None and not isinstance(op, nn.Identity):
                    y = drop_path(y, keep)
                terms.append(y)
            states.append(sum(terms[1:], terms[0]))
        return concat([states[node] for node in self.outputs])


class NetworkCIFAR(Skeleton):
    """Network with a fixed genotype for images of 32×32 pixels (other sizes work, too).

    Parameters
    ----------
    C, num_classes, layers : int
        Channels of the first cells, number of classes, number of cells.
    auxiliary : bool
        Whether to add an auxiliary head, which runs in training mode only.
    genotype : genotypes.Genotype
    one_stage : bool
        Whether a BatchNorm follows each pool and each skip of stride 1, as in networks trained by
        one-stage search.

    Attributes
    ----------
    drop_path_prob : float
    config : dict
        Arguments from which `from_config` rebuilds the network.
    """

    def __init__(
        self, C, num_classes, layers, auxiliary, genotype, one_stage=False, *, imagenet=False
    ):
        def make_cell(*shape):
            return Cell(genotype, *shape, one_stage)

        super().__init__(C, num_classes, layers, auxiliary, make_cell, imagenet)
        self.config = dict(
            imagenet=imagenet, C=C, num_classes=num_classes, layers=layers, auxiliary=auxiliary,
            one_stage=one_stage, genotype=as_lists(genotype),
        )


class NetworkImageNet(NetworkCIFAR):
    """Network with a fixed genotype for images of 224×224 pixels.

    Other sizes must be multiples of 32, because the resolution is halved five times and
    FactorizedReduce requires even sizes. Parameters and attributes are those of `NetworkCIFAR`.
    """

    def __init__(self, C, num_classes, layers, auxiliary, genotype, one_stage=False):
        super().__init__(C, num_classes, layers, auxiliary, genotype, one_stage, imagenet=True)


def from_config(config):
    """Build a network from its `config`."""
    kwargs = {**config, "genotype": from_lists(config["genotype"])}
    network = NetworkImageNet if kwargs.pop("imagenet") else NetworkCIFAR
    return network(**kwargs)


def load(path):
    """Load a trained network from a file written by `train.py` or one-stage search.

    Parameters
    ----------
    path : str
        Path of a network.pt, or of the checkpoint.pt of a training run.

    Returns
    -------
    net : NetworkCIFAR or NetworkImageNet
        On the CPU and in evaluation mode: `logits, _ = net(x)`.
    about : dict
        `classes`, the names of the labels; `mean` and `std`, for `data.normalize`; `image_size`;
        accuracies.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    net = from_config(state["config"])
    net.load_state_dict(state["weights"])
    return net.eval(), state["about"]
