"""The plain form of a training step: what the text of the method says, in the most obvious way.

It is what the project's own steps are measured against (`bench.py`) and held to (`tests/`). Of the
networks it uses the layers, with their weights and settings, but none of their `forward`s: each
operation rectifies its own input and is multiplied by its own weight, each weight is asked on the
device whether it is zero, and both halves of a two-stage step compute every gradient.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


def layer(f, x):
    if isinstance(f, nn.ReLU):
        return F.relu(x)
    if isinstance(f, nn.Conv2d):
        return F.conv2d(x, f.weight, None, f.stride, f.padding, f.dilation, f.groups)
    if isinstance(f, nn.BatchNorm2d):
        return nn.BatchNorm2d.forward(f, x)
    return f(x)  # pools, Identity


def layers(fs, x):
    for f in fs:
        x = layer(f, x)
    return x


def operation(op, x):
    if hasattr(op, "conv_1"):  # FactorizedReduce
        x = F.relu(x)
        x = torch.cat([layer(op.conv_1, x), layer(op.conv_2, x[:, :, 1:, 1:])], dim=1)
        return layer(op.bn, x)
    return layers(getattr(op, "op", op), x)


def drop_path(y, drop_prob, op):
    is_bare_skip = isinstance(op, nn.Sequential) and [type(f) for f in op] == [nn.Identity]
    if drop_prob == 0 or is_bare_skip:
        return y
    keep = torch.empty(len(y), 1, 1, 1, dtype=y.dtype, device=y.device).bernoulli_(1 - drop_prob)
    return y / (1 - drop_prob) * keep


def weights(code):
    """The weights of all pairs of a cell type, (14, 7) with the 7 operations of the space."""
    rows = []
    for A, b, z in zip(code.A, code.b, code.z, strict=True):
        on = torch.zeros_like(z)
        on[z.abs().topk(code.sparseness).indices] = 1
        identity = torch.eye(len(z), dtype=z.dtype, device=z.device)
        rows.append(on * (A.T @ b.to(A.dtype) - (A.T @ A - identity) @ (on * z)))
    return torch.cat(rows).view(14, -1)


def supernet_cell(cell, s0, s1, w, drop_prob):
    nodes = [operation(cell.preprocess0, s0), operation(cell.preprocess1, s1)]
    edges = iter(zip(w, cell._ops, strict=True))
    for _ in range(4):
        total = 0
        for x in list(nodes):
            w_edge, mixed = next(edges)
            for w_op, op in zip(w_edge, mixed._ops, strict=True):
                if w_op != 0:  # asks the device
                    total = total + w_op * drop_path(operation(op, x), drop_prob, op)
        nodes.append(total)
    return torch.cat(nodes[2:], dim=1)


def genotype_cell(cell, s0, s1, drop_prob):
    nodes = [operation(cell.preprocess0, s0), operation(cell.preprocess1, s1)]
    pairs = iter(zip(cell._ops, cell.inputs, strict=True))
    for _ in range(4):
        total = 0
        for _ in range(len(cell.inputs) // 4):
            op, node = next(pairs)
            total = total + drop_path(operation(op, nodes[node]), drop_prob, op)
        nodes.append(total)
    return torch.cat([nodes[node] for node in cell.concat], dim=1)


def network(net, x):
    """(logits, logits_aux) of a `model_search.Network` or of a network of `model.py`."""
    if hasattr(net, "stem"):
        s0 = s1 = layers(net.stem, x)
    else:
        s0 = layers(net.stem0, x)
        s1 = layers(net.stem1, s0)
    is_supernet, logits_aux = hasattr(net, "normal_code"), None
    drop_prob = net.drop_path_prob if net.training else 0
    if is_supernet:
        w_normal, w_reduce = (weights(code).to(x.dtype) for code in net.codes)
    for i, cell in enumerate(net.cells):
        if is_supernet:
            w = w_reduce if cell.reduction else w_normal
            s2 = supernet_cell(cell, s0, s1, w, drop_prob)
        else:
            s2 = genotype_cell(cell, s0, s1, drop_prob)
        s0, s1 = s1, s2
        if i == net.auxiliary_layer and net.auxiliary and net.training:
            head = net.auxiliary_head
            logits_aux = head.classifier(layers(head.features, s1).flatten(1))
    return net.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1)), logits_aux


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------


def optimizers(net, args):
    """SGD on the weights, and Adam on the points b of a supernet or None."""
    points = net.arch_parameters() if hasattr(net, "arch_parameters") else []
    others = [p for p in net.parameters() if all(p is not b for b in points)]
    sgd = torch.optim.SGD(
        others, args.learning_rate, args.momentum, weight_decay=args.weight_decay, foreach=False
    )
    adam = points and torch.optim.Adam(
        points, args.arch_learning_rate, betas=(0.5, 0.999),
        weight_decay=args.arch_weight_decay, foreach=False,
    )  # fmt: skip
    return sgd, adam or None


def backward(net, x, y, args, optimizers):
    """Forward and backward pass; loss and accuracy, read at once."""
    logits, logits_aux = network(net, x)
    loss = total = F.cross_entropy(logits, y)
    if logits_aux is not None:
        total = loss + args.auxiliary_weight * F.cross_entropy(logits_aux, y)
    for optimizer in optimizers:
        optimizer.zero_grad()
    total.backward()
    return loss.item(), (logits.argmax(1) == y).float().mean().item()


def clip_and_step(sgd, args):
    clip_grad_norm_(sgd.param_groups[0]["params"], args.grad_clip, foreach=False)
    sgd.step()


def two_stage_step(net, x, y, x_arch, y_arch, args, sgd, adam):
    backward(net, x_arch, y_arch, args, [sgd, adam])
    adam.step()
    backward(net, x, y, args, [sgd, adam])
    clip_and_step(sgd, args)


def one_stage_step(net, x, y, args, sgd, adam):
    backward(net, x, y, args, [sgd, adam])
    adam.step()
    clip_and_step(sgd, args)


def retraining_step(net, x, y, args, sgd):
    backward(net, x, y, args, [sgd])
    clip_and_step(sgd, args)
