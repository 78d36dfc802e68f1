"""tools/export.py: the ONNX file has the outputs of the network, and runs without torch."""

import copy
import json
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ENVIRONMENT, ONE_STAGE, ROOT, imagenet_of_digits, run
from sklearn.datasets import load_digits

import data
import genotypes
import model

pytestmark = pytest.mark.crash  # torch's exporter is slow; test_edits.py has a short test of it
IMAGENET = [
    "train.py", "--dataset", "imagenet", "--data", "images", "--image_size", "32", "--arch",
    "ISTA_twostage", "--init_channels", "2", "--layers", "3", "--batch_size", "16",
]
KINDS = {"one_stage": ONE_STAGE, "imagenet": IMAGENET}  # both stems, both kinds of pools and skips

# Runs each network on images of its size, in batches of 1 and 5.
INFERENCE = """
import json, sys
import numpy as np
import onnxruntime
found = {}
for kind in sys.argv[1:]:
    session = onnxruntime.InferenceSession(f"{kind}/network.onnx")
    (images,) = session.get_inputs()
    pixels = np.load("pixels.npy").repeat(images.shape[2] // 8, 2).repeat(images.shape[3] // 8, 3)
    found[kind] = dict(
        input=[images.name, images.type, images.shape],
        logits=[session.run(["logits"], {"images": pixels[:n]})[0].tolist() for n in (1, 5)],
        metadata=session.get_modelmeta().custom_metadata_map,
    )
print(json.dumps(found))
"""


def run_without_torch(code, *args, cwd):
    """Run code in a process that cannot import torch; return its output."""
    code = f"import sys\nsys.modules['torch'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, env=ENVIRONMENT,
                          stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def pixels():
    """Five handwritten digits in color, uint8, (5, 3, 8, 8)."""
    gray = load_digits().images[:5, None] * (255 / 16)
    return (gray * np.reshape([1, 0.7, 0.4], (3, 1, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network of each kind, exported next to its weights."""
    place = tmp_path_factory.mktemp("place")
    imagenet_of_digits(place / "images")
    for kind, command in KINDS.items():
        run(*command, "--epochs", 1, "--save", kind, cwd=place)
        run("tools/export.py", "--weights", f"{kind}/network.pt", cwd=place)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_logits_of_torch_and_describes_itself(place, pixels, kind):
    np.save(place / "pixels.npy", pixels)
    found = json.loads(run_without_torch(INFERENCE, kind, cwd=place))[kind]
    net, about = model.load(place / kind / "network.pt")
    size = about["image_size"]
    images = torch.from_numpy(pixels.repeat(size // 8, 2).repeat(size // 8, 3))
    with torch.no_grad():
        expected = net(data.normalize(images, about["mean"], about["std"]))[0].numpy()
    assert expected.std() > 0.01
    assert found["input"] == ["images", "tensor(uint8)", ["batch", 3, size, size]]
    for n, logits in zip((1, 5), found["logits"], strict=True):
        assert np.shape(logits) == (n, len(about["classes"]))
        np.testing.assert_allclose(logits, expected[:n], rtol=1e-5, atol=1e-5)

    metadata = found["metadata"]
    genotype, _ = genotypes.load(metadata["genotype"])
    assert genotype == genotypes.from_lists(net.config["genotype"])
    assert json.loads(metadata["one_stage"]) is (kind == "one_stage")
    for key in ("classes", "mean", "std", "image_size", "test_accuracy"):
        assert json.loads(metadata[key]) == about[key]
    assert [path.name for path in (place / kind).glob("*.onnx*")] == ["network.onnx"]
    assert b"auxiliary" not in (place / kind / "network.onnx").read_bytes()


def test_the_code_in_the_docs_predicts_the_class(place, pixels):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    net, about = model.load(place / "one_stage/network.pt")
    Image.fromarray(pixels[0].transpose(1, 2, 0)).save(place / "one_stage/image.png")
    image = data.normalize(torch.from_numpy(pixels[:1]), about["mean"], about["std"])
    with torch.no_grad():
        label = net(image)[0].argmax().item()
    assert run_without_torch(lines, cwd=place / "one_stage") == about["classes"][label] + "\n"


def test_a_file_with_other_logits_is_not_written(place, tmp_path):
    exporter = torch.onnx.export

    def export_other_weights(net, *args, **kwargs):
        net = copy.deepcopy(net)
        net.net.classifier.bias.data += 1
        return exporter(net, *args, **kwargs)

    (tmp_path / "net.onnx").write_text("older")
    flags = ["-o", "net.onnx", "--weights", place / "one_stage/network.pt"]
    with mock.patch.object(torch.onnx, "export", export_other_weights):
        done = run("tools/export.py", *flags, cwd=tmp_path, status=2)
    assert re.fullmatch(r"export.py: error: .* by onnxruntime and by torch .*\n", done.stderr)
    assert (tmp_path / "net.onnx").read_text() == "older"


def test_a_missing_package_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    flags = ["--weights", place / "one_stage/network.pt", "-o", "net.onnx"]
    done = run("tools/export.py", *flags, cwd=tmp_path, status=2)
    assert "pip install onnx onnxscript onnxruntime\n" in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flags, message", [
    (["--weights", "one_stage/checkpoint.pt"], "is the checkpoint of a search"),
    (["--weights", "plain.pt"], "does not contain the class names"),
    (["--weights", "one_stage/network.pt", "-o", "nowhere/net.onnx"], "could not be written"),
    (["--weights", "one_stage/network.pt", "-o", "one_stage/network.pt"], "must end in .onnx"),
])
def test_wrong_files_are_refused(place, flags, message):
    state = torch.load(place / "one_stage/network.pt", weights_only=True)
    torch.save(state["weights"], place / "plain.pt")
    done = run("tools/export.py", *flags, cwd=place, status=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("export.py: error: ")
    assert message in done.stderr
