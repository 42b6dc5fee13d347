#!/usr/bin/env python
"""Convert a published checkpoint into one of ours, or back.

    python tools/convert_checkpoint.py detr-r50-e632da11.pth detr.pth
    python tools/convert_checkpoint.py r50_deformable_detr.pth deformable_detr.pth \\
        --config-file configs/deformable_detr.py
    python tools/convert_checkpoint.py output/detr/model_final.pth official.pth --to detr

The format of SOURCE is recognised by its keys. With a config every weight is compared with its
model; without one, heads for COCO's 91 category numbers become heads for its 80 classes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from efficient_detr.checkpoint.convert import Conversion, convert_checkpoint, export_checkpoint
from efficient_detr.checkpoint.downloads import (
    download,
    is_address,
    parse_address,
    read_download,
)
from efficient_detr.checkpoint.files import read_checkpoint, write_checkpoint
from efficient_detr.checkpoint.formats import (
    OWN_FORMAT,
    find_format,
    is_backbone_format,
    list_formats,
)
from efficient_detr.engine.building import build_model
from efficient_detr.engine.checks import check_arguments, check_parts, load_config
from efficient_detr.engine.commands import report_user_error, start_logging
from efficient_detr.errors import UserError

_ENDINGS = (".pth", ".safetensors")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help=".pth, .pkl, .safetensors or an address")
    parser.add_argument("out", metavar="OUT", help=".pth or .safetensors")
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="format of SOURCE (default: by keys)"
    )
    parser.add_argument(
        "--to",
        dest="target_format",
        metavar="FORMAT",
        default=OWN_FORMAT.name,
        help="format of OUT (default: ours)",
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="LazyConfig of the model that the weights are for"
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="write what fits, whatever is missing or left over",
    )
    parser.add_argument(
        "--class-rows",
        type=int,
        choices=(80, 91),
        help="rows of heads for COCO: its classes or its category numbers (default: 80 in our "
        "format, as in SOURCE in others)",
    )
    parser.add_argument(
        "--list-formats", action=_ListFormats, nargs=0, help="list the formats and exit"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="overrides, path.to.key=value"
    )
    return parser


class _ListFormats(argparse.Action):
    """Prints the formats and leaves, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(tabulate(list_formats(), headers=["format", "of"]))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, or 2 after an error that the user can put right.
    """
    args = build_parser().parse_args(argv)
    start_logging()
    try:
        print(convert(args))
    except UserError as error:
        return report_user_error(error)
    return 0


def convert(args: argparse.Namespace) -> str:
    """Read, convert and write; returns what to tell.

    Raises:
        UserError: if anything is wrong with the files, the format or the config.
    """
    check_arguments_of_command(args)
    content = read(args.source)
    conversion, weights_of_model = converted(args, content)
    state = conversion.state
    own = args.target_format == OWN_FORMAT.name
    if not own:
        # With 91 rows already where the file is read.
        coco_ids = args.class_rows == 91
        state = export_checkpoint(
            state, args.target_format, coco_ids=coco_ids, source=f"The checkpoint {args.source}"
        )
    names = conversion.class_names if own else None
    write_checkpoint(args.out, state, {} if names is None else {"class_names": list(names)})
    titles = dict(list_formats())
    return (
        f"{conversion.report.table()}\n\n"
        f"{args.source} ({conversion.report.layout}) -> {args.out} "
        f"({titles[args.target_format]}): {len(state)} weights.\n"
        f"{compared(args, conversion, weights_of_model)}"
    )


def compared(args: argparse.Namespace, conversion: Conversion, weights_of_model: int | None) -> str:
    """What is known about the result and a model.

    Args:
        args: of the command.
        conversion: the weights.
        weights_of_model: number of weights of the config's model, None without a config.
    """
    if weights_of_model is None:
        return (
            "They were not compared with any model, so that missing weights were not noticed: name "
            "a config with --config-file to do so."
        )
    filled = len(conversion.state)
    if filled < weights_of_model:
        return (
            f"Only {filled} of the {weights_of_model} weights of the model of {args.config_file} "
            f"are there; the other {weights_of_model - filled} will keep their initial values."
        )
    return f"They fill the model of {args.config_file}."


def check_arguments_of_command(args: argparse.Namespace) -> None:
    """Refuse what could not work, before anything is read.

    Raises:
        UserError: for an unknown format, a config and rows that contradict it, or an impossible
            OUT.
    """
    for name in (args.source_format, args.target_format):
        if name is not None and not is_backbone_format(name):
            find_format(name)
    own = args.target_format == OWN_FORMAT.name
    if args.config_file and args.class_rows and own:
        raise UserError(
            f"--class-rows {args.class_rows} contradicts --config-file, whose model has its own "
            f"number of rows: use --opts model.num_classes={args.class_rows}."
        )
    if args.opts and not args.config_file:
        raise UserError("--opts changes a config: name it with --config-file.")
    if not args.out.endswith(_ENDINGS):
        raise UserError(f"{args.out} must end in {' or '.join(_ENDINGS)}.")
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        raise UserError(f"The folder of {args.out} does not exist: make it first.")
    exist = os.path.exists(args.out) and os.path.exists(args.source)
    if exist and os.path.samefile(args.source, args.out):
        raise UserError(f"{args.out} would replace its own source: choose another name.")


def read(source: str) -> dict[str, Any]:
    """The entries of a file or of what is at an address.

    Raises:
        UserError: if it cannot be read.
    """
    if is_address(source):
        return read_download(download(parse_address(source)), source)
    return read_checkpoint(source)


def converted(args: argparse.Namespace, content: dict[str, Any]) -> tuple[Conversion, int | None]:
    """Convert the weights for the model of the config, if there is one.

    Returns:
        The weights, and how many the model has.

    Raises:
        UserError: if they do not fit.
    """

    def convert_for(model: nn.Module | None) -> Conversion:
        return convert_checkpoint(
            content["model"],
            source_format=args.source_format,
            model=model,
            source_class_names=content.get("class_names"),
            keep_classes=model is None and keeps_classes(args),
            allow_partial=args.allow_partial,
            source=f"The checkpoint {args.source}",
            target=f"the model of {args.config_file}" if args.config_file else "any model",
        )

    if not args.config_file:
        return convert_for(None), None
    config = load_config(args.config_file, args.opts)
    check_parts(config, ["model"])
    check_arguments(config)
    try:
        with torch.device("meta"):
            model = build_model(config)
        conversion = convert_for(model)
        if all(tensor.device.type != "meta" for tensor in conversion.state.values()):
            return conversion, len(model.state_dict())
    # Parts that compute something from values.
    except (NotImplementedError, RuntimeError):
        pass
    model = build_model(config)
    return convert_for(model), len(model.state_dict())


def keeps_classes(args: argparse.Namespace) -> bool:
    """Whether heads keep their rows while they are read."""
    if args.target_format == OWN_FORMAT.name:
        return bool(args.class_rows == 91)
    return bool(args.class_rows != 80)


if __name__ == "__main__":
    sys.exit(main())
