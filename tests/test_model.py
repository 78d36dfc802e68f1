"""Networks with a fixed genotype."""

import pytest
import torch

import genotypes
import model
from harness import checkpoints
from model import NetworkCIFAR, NetworkImageNet, from_config
from operations import drop_path


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("network, shape, genotype, one_stage, parameters", [
    (NetworkCIFAR, (36, 10, 20), "ISTA_twostage", False, 3_316_726),
    (NetworkCIFAR, (36, 10, 20), "ISTA_onestage", True, 3_371_806),
    (NetworkImageNet, (48, 1000, 14), "ISTA_ImageNet", False, 5_651_392),
    (NetworkImageNet, (48, 1000, 14), "ISTA_ImageNet", True, 5_655_232),
])
def test_parameters_of_published_networks(network, shape, genotype, one_stage, parameters):
    with torch.device("meta"):
        net = network(*shape, True, genotypes.load(genotype)[0], one_stage)
    named = net.named_parameters()
    assert sum(p.numel() for name, p in named if "auxiliary" not in name) == parameters


def test_parameter_names_and_their_order_are_those_of_darts():
    with torch.device("meta"):
        keys = list(NetworkCIFAR(36, 10, 20, True, genotypes.ISTA_twostage).state_dict())
        imagenet = set(NetworkImageNet(48, 1000, 14, True, genotypes.ISTA_ImageNet).state_dict())
    for key in (
        "stem.1.bias", "cells.0._ops.1.op.1.weight", "cells.0._ops.2.op.7.running_var",
        "cells.7.preprocess0.conv_1.weight", "auxiliary_head.features.6.bias",
        "auxiliary_head.classifier.weight", "classifier.bias",
    ):
        assert key in keys
    order = ["stem.0.weight", "cells.0.preprocess0.op.1.weight", "cells.0.preprocess1.op.1.weight",
             "cells.0._ops.1.op.1.weight", "cells.19._ops.6.op.1.weight",
             "auxiliary_head.features.2.weight", "classifier.weight"]
    assert [key for key in keys if key in order] == order
    assert "cells.0._ops.0.1.weight" not in keys  # a skip has no BatchNorm
    assert {"stem0.0.weight", "stem0.4.bias", "stem1.1.weight"} <= imagenet
    assert not any(key.startswith("auxiliary_head.features.6") for key in imagenet)


@pytest.mark.parametrize("image_size", [4, 8, 32, 44, 64])
def test_the_auxiliary_head_runs_in_training_only_at_any_size(image_size):
    net = NetworkCIFAR(4, 7, 5, True, genotypes.ISTA_onestage, True)
    x = torch.randn(3, 3, image_size, image_size)
    logits, logits_aux = net(x)
    assert logits.shape == logits_aux.shape == (3, 7)
    assert net.eval()(x)[1] is None


@pytest.mark.parametrize("size, stride", [(8, 3), (7, 2)])
def test_the_auxiliary_head_pools_as_darts_does(size, stride):
    x = torch.randn(2, 5, size, size)
    darts = torch.nn.AvgPool2d(5, stride, padding=0, count_include_pad=False)
    torch.testing.assert_close(model.PoolTo2x2()(x), darts(x))


def test_from_config_rebuilds_a_network():
    genotype = genotypes.draw(3)._replace(normal_concat=[3, 5])
    net = NetworkCIFAR(6, 3, 4, True, genotype, one_stage=True)
    again = from_config(net.config)
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(net.eval()(x)[0], again.eval()(x)[0])
    shape = checkpoints.shape_of(net.state_dict())
    assert shape == {key: net.config[key] for key in shape}


@pytest.mark.parametrize("network, C", [(NetworkCIFAR, 4), (NetworkImageNet, 8)])
def test_load(tmp_path, network, C):
    net = network(C, 3, 3, True, genotypes.draw(2), one_stage=True)
    x = torch.randn(4, 3, 64, 64)
    net(x)  # changes the running statistics
    about = dict(classes=["cat", "dog", "owl"], mean=[0.1, 0.2, 0.3])
    state = dict(config=net.config, weights=net.state_dict(), about=about)
    checkpoints.save(str(tmp_path / "network.pt"), state)
    again, found = model.load(tmp_path / "network.pt")
    assert type(again) is network and found == about and not again.training
    with torch.no_grad():
        logits, logits_aux = again(x)
        assert logits_aux is None and torch.equal(logits, net.eval()(x)[0])


def test_load_rejects_missing_weights_and_executes_no_code(tmp_path):
    path = tmp_path / "network.pt"
    net = NetworkCIFAR(4, 3, 3, False, genotypes.ISTA_twostage)
    weights = {k: v for k, v in net.state_dict().items() if k != "classifier.bias"}
    torch.save(dict(config=net.config, weights=weights, about={}), path)
    with pytest.raises(RuntimeError, match=r"classifier\.bias"):
        model.load(path)
    torch.save(net, path)
    with pytest.raises(Exception, match="weights_only"):
        model.load(path)


def test_nodes_with_more_pairs():
    pairs = [("avg_pool_3x3", 0), ("skip_connect", 1), ("avg_pool_3x3", 1)] * 4
    net = NetworkCIFAR(4, 10, 3, False, genotypes.Genotype(pairs, range(2, 6), pairs, [5]))
    assert [len(cell._ops) for cell in net.cells] == [12] * 3
    assert net(torch.randn(2, 3, 16, 16))[0].shape == (2, 10)


# ------------------------------------------------------------------------------------------------
# Drop-path
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.75, torch.tensor(0.75)])
def test_drop_path_drops_samples_and_keeps_the_mean(keep):
    x = torch.rand(4000, 2, 3, 3) + 0.5
    y = drop_path(x, keep)
    kept = (y != 0).flatten(1)
    assert (kept.all(1) | ~kept.any(1)).all()
    assert abs(kept[:, 0].float().mean().item() - 0.75) < 0.03
    torch.testing.assert_close(y[kept[:, 0]], x[kept[:, 0]] / 0.75)


def test_drop_path_skips_identities_and_evaluation():
    skips = [("skip_connect", 0)] * 8
    genotype = genotypes.Genotype(skips, range(2, 6), skips, range(2, 6))
    x = torch.randn(64, 3, 8, 8)
    for one_stage, is_identity in ((False, True), (True, False)):
        net = NetworkCIFAR(4, 10, 6, False, genotype, one_stage)
        s = net.stem(x)
        y, dropped = (net.cells[0](s, s, keep) for keep in (None, 0.1))
        assert torch.allclose(y, dropped) == is_identity
        net.eval().drop_path_prob = 0.9
        logits = net(x)[0]
        net.drop_path_prob = 0.0
        assert torch.equal(net(x)[0], logits)


def test_the_drop_path_probability_is_on_the_device_and_not_in_the_state_dict():
    net = NetworkCIFAR(4, 10, 3, False, genotypes.ISTA_twostage)
    assert net.drop_path_prob == 0 and net.keep_prob == 1
    net.drop_path_prob = 0.2
    assert net.drop_path_prob == 0.2 and net.keep_prob == torch.tensor(0.8)
    assert not any("keep" in name or "drop" in name for name in net.state_dict())
