"""Export a trained network to ONNX: one file, which runs without PyTorch and without this code.

    python tools/export.py --weights runs/NAME/network.pt               # runs/NAME/network.onnx
    python tools/export.py --weights runs/NAME/network.pt -o net.onnx

The file takes `images`, uint8 from 0 to 255, (N, 3, H, W): any number N of RGB images, of the size
that the network was trained at. It normalises them itself, as training did, and gives `logits`,
float32, (N, classes). The auxiliary head is left out. Its metadata hold the names of the classes,
the genotype and all else that the run said of the network; what is not text is JSON.

It is put in place, over an older one, only if onnxruntime computes what torch computes. How to run
it: docs/export.md. This needs onnx, onnxscript and onnxruntime.
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
TOLERANCE = 1e-5  # of a logit, relative to the largest; rounding alone makes some 6e-7


class Exported(nn.Module):
    """A network and, before it, the normalisation of its training: uint8 images in, logits out."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images):                                        # uint8, (B, 3, H, W)
        logits, _ = self.net((images.float() / 255 - self.mean) / self.std)
        return logits                                                 # (B, num_classes)


def to_onnx(net, image_size, metadata):
    """The content of an ONNX file that computes what an `Exported` network in evaluation mode does.

    UserError if a package is missing, or onnxruntime computes other logits than torch. `metadata`
    is a dict of texts.
    """
    try:
        onnx, _, onnxruntime = map(importlib.import_module, PACKAGES)
    except ImportError as error:
        raise UserError(f"{error}: pip install {' '.join(PACKAGES)}") from None

    def random_images(batch):
        return torch.randint(256, (batch, 3, image_size, image_size), dtype=torch.uint8)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            net, (random_images(2),), dynamo=True, verbose=False, input_names=["images"],
            output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    proto = program.model_proto
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # lines of our sources, and where they lie on this machine
    onnx.helper.set_model_props(proto, metadata)
    content = proto.SerializeToString()

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for images in map(random_images, (1, 3)):
        with torch.inference_mode():
            expected = net(images)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        deviation = ((found - expected).abs().max() / expected.abs().max()).item()
        if not deviation <= TOLERANCE:  # NaN is not
            raise UserError(f"not exported: logits by onnxruntime and by torch differ by "
                            f"{deviation:.0e} of the largest")
    return content


def get_args_parser():
    parser = flags.Parser("export.py", __doc__, check=check)
    parser.add_argument("--weights", required=True, type=flags.nonempty, metavar="FILE",
                        help="the network.pt of a training or of a finished one-stage search")
    parser.add_argument("-o", "--output", type=flags.nonempty, metavar="FILE",
                        help="what to write, a name in .onnx (default: beside the weights)")
    return parser


def check(args):
    flags.check_file("--weights", args.weights)
    args.output = args.output or os.path.splitext(args.weights)[0] + ".onnx"
    if not args.output.endswith(".onnx"):  # but network.pt, say
        raise UserError(f"-o {args.output}: the name must end in .onnx")


def main(args):
    source = checkpoints.read_weights(args.weights)
    config, about = source["config"], source["about"]
    if not about:
        raise UserError(f"{args.weights} does not say the classes of its training: give the "
                        "network.pt that a run has written at its end")
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
