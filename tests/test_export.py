"""tools/export.py: the ONNX file computes what the network does, without torch, and says what."""

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

IMAGENET = [
    "train.py", "--dataset", "imagenet", "--data", "images", "--image_size", "32", "--arch",
    "ISTA_twostage", "--init_channels", "2", "--layers", "3", "--batch_size", "16",
]
pytestmark = pytest.mark.crash  # torch's exporter is slow; test_edits.py has a short test of it
KINDS = {"one_stage": ONE_STAGE, "imagenet": IMAGENET}  # both stems, both kinds of pools and skips

# Runs every network on the images of its size, in batches of 1 and 5.
FIND = """
import json, sys
import numpy as np
import onnxruntime
found = {}
for kind in sys.argv[1:]:
    session = onnxruntime.InferenceSession(f"{kind}/network.onnx")
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    pixels = np.load("pixels.npy").repeat(images.shape[2] // 8, 2).repeat(images.shape[3] // 8, 3)
    found[kind] = dict(
        images=[images.name, images.type, images.shape], logits=[logits.name, logits.shape],
        values=[session.run(None, {"images": pixels[:n]})[0].tolist() for n in (1, 5)],
        about=session.get_modelmeta().custom_metadata_map,
    )
print(json.dumps(found))
"""


def without_torch(code, *args, cwd):
    """What code prints in a process in which an import of torch fails."""
    code = f"import sys\nsys.modules['torch'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, env=ENVIRONMENT,
                          stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained network of each kind."""
    place = tmp_path_factory.mktemp("place")
    imagenet_of_digits(place / "images")
    for kind, command in KINDS.items():
        run(*command, "--epochs", 1, "--save", kind, cwd=place)
    return place


@pytest.fixture(scope="module")
def pixels():
    """Five handwritten digits in color, uint8, (5, 3, 8, 8)."""
    grey = load_digits().images[:5, None] * (255 / 16)
    return (grey * np.reshape([1, 0.7, 0.4], (3, 1, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def programs(place):
    """Each network exported beside its weights; and what torch's exporter, which is slow, made."""
    made, exporter = [], torch.onnx.export
    with mock.patch.object(torch.onnx, "export") as patched:
        patched.side_effect = lambda *args, **kwargs: (
            made.append(exporter(*args, **kwargs)) or made[-1])
        for kind in KINDS:
            run("tools/export.py", "--weights", f"{kind}/network.pt", cwd=place)
    return dict(zip(KINDS, made, strict=True))


@pytest.fixture(scope="module")
def found(place, pixels, programs):
    """What a process that has no torch finds in the exported files."""
    np.save(place / "pixels.npy", pixels)
    return json.loads(without_torch(FIND, *KINDS, cwd=place))


@pytest.mark.parametrize("kind", KINDS)
def test_without_torch_it_computes_the_logits_of_torch(place, pixels, found, kind):
    net, about = model.load(place / kind / "network.pt")
    size, classes = about["image_size"], len(about["classes"])
    images = torch.from_numpy(pixels).repeat_interleave(size // 8, 2)
    images = images.repeat_interleave(size // 8, 3)
    with torch.no_grad():
        expected = net(data.normalize(images, about["mean"], about["std"]))[0].numpy()
    assert expected.std() > 0.01
    assert found[kind]["images"] == ["images", "tensor(uint8)", ["batch", 3, size, size]]
    assert found[kind]["logits"] == ["logits", ["batch", classes]]
    for n, values in zip((1, 5), found[kind]["values"], strict=True):
        assert np.shape(values) == (n, classes)
        np.testing.assert_allclose(values, expected[:n], rtol=1e-5, atol=1e-5)


def test_the_lines_of_the_docs_name_the_class(place, pixels, programs):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    net, about = model.load(place / "one_stage/network.pt")
    Image.fromarray(pixels[0].transpose(1, 2, 0)).save(place / "one_stage/image.png")
    image = data.normalize(torch.from_numpy(pixels[:1]), about["mean"], about["std"])
    with torch.no_grad():
        label = net(image)[0].argmax().item()
    assert without_torch(lines, cwd=place / "one_stage") == about["classes"][label] + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_alone_and_says_what_it_is(place, found, kind):
    net, about = model.load(place / kind / "network.pt")
    told = found[kind]["about"]
    names = [f"n{k:08}" for k in range(7)] if kind == "imagenet" else list("0123456789")
    assert json.loads(told["classes"]) == names
    genotype, _ = genotypes.load(told["genotype"])
    assert genotype == genotypes.from_lists(net.config["genotype"])
    assert json.loads(told["one_stage"]) is (kind == "one_stage")
    assert told["dataset"] == about["dataset"]
    for key in ("mean", "std", "image_size", "test_accuracy"):
        assert json.loads(told[key]) == about[key]
    assert [path.name for path in (place / kind).glob("*.onnx*")] == ["network.onnx"]
    content = (place / kind / "network.onnx").read_bytes()
    assert b"auxiliary" not in content and b"model.py" not in content


def test_an_older_file_is_replaced_only_by_a_right_one(place, programs, tmp_path, monkeypatch):
    state = torch.load(place / "one_stage/network.pt", weights_only=True)
    state["weights"]["classifier.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    (tmp_path / "net.onnx").write_text("older")
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: programs["one_stage"])
    flags = ["-o", "net.onnx", "--weights"]
    done = run("tools/export.py", *flags, "other.pt", cwd=tmp_path, status=2)
    assert re.fullmatch(r"export.py: error: .* by onnxruntime and by torch .*\n", done.stderr)
    assert (tmp_path / "net.onnx").read_text() == "older"
    done = run("tools/export.py", *flags, place / "one_stage/network.pt", cwd=tmp_path)
    assert "takes images, uint8 (N, 3, 8, 8), and gives logits (N, 10)" in done.stdout
    content = (tmp_path / "net.onnx").read_bytes()
    assert content == (place / "one_stage/network.onnx").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"net.onnx", "other.pt"}


def test_a_missing_package_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    flags = ["--weights", place / "one_stage/network.pt", "-o", "net.onnx"]
    done = run("tools/export.py", *flags, cwd=tmp_path, status=2)
    assert re.fullmatch(r"export.py: error: .*\bonnxscript\b.*: pip install onnx onnxscript "
                        "onnxruntime\n", done.stderr)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flags, says", [
    (["--weights", "nothing.pt"], "there is no such file"),
    (["--weights", "one_stage/log.txt"], "not a file of network weights"),
    (["--weights", "one_stage/checkpoint.pt"], "is the checkpoint of a search"),
    (["--weights", "plain.pt"], "does not contain the class names"),
    (["--weights", "one_stage/network.pt", "-o", "nowhere/net.onnx"], "could not be written"),
    (["--weights", "one_stage/network.pt", "-o", "one_stage/network.pt"], "must end in .onnx"),
])
def test_what_cannot_be_exported_is_refused_in_a_line(place, flags, says):
    state = torch.load(place / "one_stage/network.pt", weights_only=True)
    torch.save(state["weights"], place / "plain.pt")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    done = run("tools/export.py", *flags, cwd=place, status=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("export.py: error: ")
    assert says in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
