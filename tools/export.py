"""Export a trained network to an ONNX file, which runs without PyTorch and without this code.

    python tools/export.py --weights runs/NAME/network.pt               # runs/NAME/network.onnx
    python tools/export.py --weights runs/NAME/network.pt -o net.onnx

The input is `images`, uint8 from 0 to 255, (N, 3, H, W): any number N of RGB images of the size
used in training. The file normalizes them as in training. The output is `logits`, float32,
(N, classes). The auxiliary head is not exported. The metadata contain the class names, the genotype
and what else the run stored with the network; values that are not strings are JSON.

The file is written only if onnxruntime computes the same logits as torch. docs/export.md shows how
to run it. The script needs onnx, onnxscript and onnxruntime.
"""

import importlib
import json
import os
import sys
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch import nn

import genotypes
import model
from harness import checkpoints, flags, runs
from utils import UserError, write_file

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-5  # of logits, relative to the largest one; rounding causes about 6e-7


class Exported(nn.Module):
    """A network with the normalization of its training: takes uint8 images, returns logits."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images):                                        # uint8, (B, 3, H, W)
        logits, _ = self.net((images.float() / 255 - self.mean) / self.std)
        return logits                                                 # (B, num_classes)


def to_onnx(net, image_size, metadata):
    """Return the content of an ONNX file for an `Exported` network in evaluation mode.

    Raises UserError if a package is missing or if onnxruntime computes other logits than torch.
    """
    try:
        onnx, _, onnxruntime = map(importlib.import_module, PACKAGES)
    except ImportError as error:
        raise UserError(f"{error}: pip install {' '.join(PACKAGES)}") from None

    def random_images(batch):
        return torch.randint(256, (batch, 3, image_size, image_size), dtype=torch.uint8)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside of the exporter
        program = torch.onnx.export(
            net, (random_images(2),), dynamo=True, verbose=False, input_names=["images"],
            output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    proto = program.model_proto
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # source lines and absolute paths
    onnx.helper.set_model_props(proto, metadata)
    content = proto.SerializeToString()

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for images in map(random_images, (1, 3)):
        with torch.inference_mode():
            expected = net(images)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        deviation = ((found - expected).abs().max() / expected.abs().max()).item()
        if not deviation <= TOLERANCE:  # also if it is NaN
            raise UserError(f"not exported: logits by onnxruntime and by torch differ by "
                            f"{deviation:.0e} of the largest")
    return content


def get_args_parser():
    parser = flags.Parser("export.py", __doc__, check=check)
    parser.add_argument("--weights", required=True, type=flags.nonempty, metavar="FILE",
                        help="the network.pt of a training or of a finished one-stage search")
    parser.add_argument("-o", "--output", type=flags.nonempty, metavar="FILE",
                        help="the ONNX file (default: the name of the weights with .onnx)")
    return parser


def check(args):
    flags.check_file("--weights", args.weights)
    args.output = args.output or os.path.splitext(args.weights)[0] + ".onnx"
    if not args.output.endswith(".onnx"):
        raise UserError(f"-o {args.output}: the name must end in .onnx")


def main(args):
    source = checkpoints.read_weights(args.weights)
    config, about = source["config"], source["about"]
    if not about:
        raise UserError(f"{args.weights} does not contain the class names of its training: give "
                        "the network.pt that a run wrote at its end")
    net = model.from_config(config)
    net.load_state_dict(source["weights"])
    about = {
        **about, "genotype": str(genotypes.from_lists(config["genotype"])),
        "one_stage": config["one_stage"],
    }
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    exported = Exported(net, about["mean"], about["std"]).eval()
    content = to_onnx(exported, about["image_size"], metadata)
    write_file(args.output, content)
    size, classes = about["image_size"], len(about["classes"])
    print(f"{args.output}: {len(content) / 1e6:.1f} MB, takes images, uint8 (N, 3, {size}, {size}),"
          f" and gives logits (N, {classes}); docs/export.md shows how to run it")


if __name__ == "__main__":
    with runs.command("export.py"):
        main(get_args_parser().parse_args())
