"""``alignment export``: write a trained model as one folder that paddlenlp or transformers opens."""

from __future__ import annotations

import argparse
import sys

from alignment import runtime
from alignment.cli import CommandParser


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(prog="alignment export", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="model folder, output_dir of a PPO run, or checkpoint-N of any stage",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--format", default="paddle", metavar="paddle|huggingface", help="which library is to open it (paddle)"
    )
    parser.add_argument("--role", metavar="policy|value", help="which of a PPO run's two models (policy)")
    parser.add_argument(
        "--dtype", metavar="float32|bfloat16|float16", help="of the weights (default: as they are stored)"
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="split larger weights into files of this size (5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        AlignmentError: an option, folder or disk cannot be used.
    """
    options = make_parser().parse_args(argv)
    with runtime.quiet_import():
        from alignment.export.export_model import export_model

    report = export_model(
        options.checkpoint,
        options.output,
        format=options.format,
        role=options.role,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    files = "1 file" if len(report.weight_files) == 1 else f"{len(report.weight_files)} files"
    print(f"exported {report.source} ({report.architecture}): {report.output}, {report.size:,} bytes in {files}")
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
