"""Options that several commands share. Nothing here imports torch: `--help` must be quick."""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

as_json = click.option("--json", "json_", is_flag=True, help="Print one JSON value instead of text.")
quiet = click.option("--quiet", is_flag=True, help="No progress bar.")
device = click.option("--device", metavar="cpu|cuda|mps", help="Where to compute. Default: the best there is.")

_BACKBONE = [
    click.option("--backbone", required=True, help="An alias or any timm model; see `featprobe backbones`."),
    click.option("--weights", type=click.Path(dir_okay=False), help="Own weights: .safetensors or .pth, tensors only."),
    click.option("--random-init", is_flag=True, help="Seeded random weights, as a control."),
    click.option(
        "--final-norm/--no-final-norm",
        default=None,
        help="Apply the model's last normalisation layer. Default: on for DINOv2 and DINOv3, off otherwise.",
    ),
]
_FEATURES = [
    click.option("--data", required=True, help="A data set's name, or a path; see `featprobe data`."),
    click.option("--levels", help="Feature levels, separated by commas. Default: all, as stride4,stride8,…"),
    click.option("--size", metavar="HxW", help="Height x width. Default: the images' own up to 512, else 512x512."),
    click.option("--fit", type=click.Choice(["resize", "letterbox"]), help="How images meet --size. Default: resize."),
    click.option(
        "--intensity",
        metavar="POLICY",
        help="window:LO:HI | percentile:LO:HI | minmax | none. "
        "Default: percentile:0.01:99.99 of the training images for 16-bit, none for 8-bit.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images per block."),
    click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads that decode images."),
    click.option("--dtype", type=click.Choice(["fp16", "fp32", "bf16"]), default="fp16", show_default=True),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "amp"]),
        default="fp32",
        show_default=True,
        help="amp: compute in fp16 where that is safe (CUDA); features differ a little, and so does their key.",
    ),
    click.option("--skip-bad", is_flag=True, help="Go on without samples that can't be used, and list them."),
    device,
    quiet,
]


def feature_options(command: Command) -> Command:
    """All options that decide which features are made, and how."""
    for option in reversed([*_BACKBONE, *_FEATURES]):
        command = option(command)
    return command


def names(text: str | None) -> tuple[str, ...]:
    """The names of a list separated by commas.

    >>> names("stride4, stride8")
    ('stride4', 'stride8')
    """
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def show_json(value: object) -> None:
    """Print a value for a machine."""
    click.echo(json.dumps(value, default=str))


def columns(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Rows as aligned text.

    >>> print(columns([("a", 10), ("bc", 2)], ("name", "n")))
    name  n
    a     10
    bc    2
    """
    table = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)
