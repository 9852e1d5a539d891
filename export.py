"""Export a checkpoint as one file that maps pictures to labels, without these scripts.

    python export.py --ckpt runs/unet/best.pt --out model.pt2
    python export.py --ckpt runs/unet/best.pt --out model.onnx

It takes "images", (N, 3, H, W) uint8 RGB of any size, and returns (N, H, W) uint8 labels, equal to
predict.py's in float32: all steps between are inside. metadata.json has class names and colours.
"""

import argparse
import io
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import UserError
from dataset import FILL, PAD_MULTIPLE, normalize, resized_size
from models import load_checkpoint, model_from_checkpoint


class Labels(nn.Module):
    """(N, 3, H, W) uint8 pictures to (N, H, W) uint8 labels. Nothing depends on whether there is
    any padding, so that torch.export can leave height and width open."""

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, H, W) uint8."""
        height, width = images.shape[-2:]
        h, w = resized_size(height, width, self.size, torch.sym_min, torch.sym_max)
        x = images.float()
        for size in ((height, w), (h, w)):  # rounded after each axis, as torchvision does in uint8
            x = (F.interpolate(x, size=size, mode="bilinear", antialias=True) + 0.5).floor()
        padded = ((n + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE for n in (h, w))
        rows, columns = map(torch.arange, padded)
        x = x[:, :, rows.clamp(max=h - 1)][..., columns.clamp(max=w - 1)]
        x = torch.where((rows < h)[:, None] & (columns < w), x, torch.tensor(FILL).view(3, 1, 1))
        logits = self.model(normalize(x))["out"][:, :, torch.arange(h)][..., torch.arange(w)]
        return F.interpolate(logits, size=(height, width), mode="bilinear").argmax(dim=1).byte()


def exported(state: dict, suffix: str) -> bytes:
    """Content of a file with that suffix, .pt2 or .onnx. Raises UserError without its package."""
    model = Labels(model_from_checkpoint(state, torch.device("cpu")), state["args"]["size"])
    metadata = json.dumps({key: state[key] for key in ("classes", "colors")})
    example = (torch.zeros(2, 3, 150, 201, dtype=torch.uint8),)
    dynamic = {"images": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    program, file = torch.export.export(model.eval(), example, dynamic_shapes=dynamic), io.BytesIO()
    if suffix == ".pt2":
        torch.export.save(program, file, extra_files={"metadata.json": metadata})
        return file.getvalue()
    try:
        onnx = torch.onnx.export(program, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    except ImportError as error:
        remedy = "pip install onnx onnxscript, or give --out a name that ends in .pt2"
        raise UserError(f"cannot write ONNX ({error}): {remedy}") from None
    onnx.model.metadata_props["metadata.json"] = metadata
    return onnx.model_proto.SerializeToString()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, metavar="PATH", help="checkpoint")
    out = {"type": Path, "default": Path("model.pt2"), "metavar": "FILE"}
    parser.add_argument("--out", **out, help="*.pt2 or *.onnx")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the checkpoint, write the file."""
    args = build_parser().parse_args(argv)
    if args.out.suffix not in (".pt2", ".onnx") or not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: give a *.pt2 or *.onnx, in a folder that is there")
    warnings.filterwarnings("ignore", module="torch")  # that no user can do anything about
    content = exported(load_checkpoint(args.ckpt), args.out.suffix)
    with common.atomic_write(args.out) as file:
        file.write(content)
    print(f"{args.out}: {len(content) / 2**20:.1f} MB")


if __name__ == "__main__":
    common.run_command(main)
