"""Options that several commands share. Nothing here imports torch: `--help` must be quick."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from featprobe.texts import printable

if TYPE_CHECKING:
    from featprobe.stages.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., Any])

as_json = click.option("--json", "json_", is_flag=True, help="Print one JSON value instead of text.")
quiet = click.option("--quiet", is_flag=True, help="No progress bar.")
data_format = click.option("--format", metavar="NAME[:PART]", help="The data set's format. Default: found by looking.")
log = click.option(
    "--log",
    type=click.Choice(["tensorboard", "wandb"]),
    multiple=True,
    help="Write curves of loss, rate and validation scores beside the head; may be repeated.",
)
intensity = click.option(
    "--intensity",
    metavar="POLICY",
    help="window:LO:HI | percentile:LO:HI | minmax | none | log; behind it :log, and :image for each image's own. "
    "Default: none for 8-bit, percentile:0.01:99.99 of the training images for all others.",
)
group_from = click.option(
    "--group-from",
    metavar="REGEX",
    help="Groups from the images' ids: the first group of a match, as '(C\\d+)_', or all.",
)
split_file = click.option(
    "--split-file",
    type=click.Path(dir_okay=False),
    help="Splits and groups from a CSV file, as `data split` writes it.",
)
images_at = click.option(
    "--images",
    metavar="PATTERN",
    help="Where the images lie below the data folder, as 'shots/*/*.jpg'; with --masks, in place of --format.",
)
masks_at = click.option(
    "--masks",
    metavar="PATTERN",
    help="Where the mask of an image lies, as 'seg/{stem}_m.png'; also {dir} and {split}, see docs/formats.md.",
)
follow_links = click.option(
    "--follow-links",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, param, given: ctx.meta.update({"follow_links": given}),
    help="Read also what links in the data folder lead to outside of it.",
)
device = click.option("--device", metavar="cpu|cuda|mps", help="Where to compute. Default: the best there is.")


def names(text: str | None) -> tuple[str, ...]:
    """The names of a list separated by commas.

    >>> names("stride4, stride8")
    ('stride4', 'stride8')
    """
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in names(text))
    except ValueError:
        raise click.BadParameter(f"{text!r}. wanted: numbers separated by commas", ctx, param) from None


def iterations(ctx: click.Context, param: click.Parameter, text: str | None) -> int | str | None:
    """A number of iterations, or auto."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r}. wanted: a whole number from 1 on, or auto", ctx, param)
    return int(text)


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
    data_format,
    images_at,
    masks_at,
    group_from,
    split_file,
    follow_links,
    click.option("--levels", help="Feature levels, separated by commas. Default: all, as stride4,stride8,…"),
    click.option("--size", metavar="HxW", help="Height x width. Default: the images' own up to 512, else 512x512."),
    click.option("--fit", type=click.Choice(["resize", "letterbox"]), help="How images meet --size. Default: resize."),
    intensity,
    click.option(
        "--tile", type=click.IntRange(0), metavar="PX", help="Cut images into tiles of this side, pixels; 0: do not."
    ),
    click.option("--overlap", type=click.IntRange(0), metavar="PX", help="Of tiles, at least.  [default: tile / 8]"),
    click.option(
        "--empty-tiles",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Of the training tiles without a defect, that is kept.  [default: 1]",
    ),
    click.option(
        "--views",
        metavar="LIST",
        help="Views of the training images to store too: hflip,vflip,rot90,crop:N, or none.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images per block."),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Threads that decode images.  [default: the cores that may be used, at most 16]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["fp16", "fp32", "bf16", "int8"]),
        default="fp16",
        show_default=True,
        help="Of the stored features. int8: half of fp16's bytes; see `featprobe cache audit`.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "tf32", "amp"]),
        default="auto",
        show_default=True,
        help="Of the computation. fp32: float32 without TF32; tf32, amp (fp16 where that is safe): faster, on CUDA "
        "alone. Features differ a little, and so does their key. auto: as the cache that is there; "
        "else amp on CUDA, fp32 elsewhere.",
    ),
    click.option("--skip-bad", is_flag=True, help="Go on without samples that can't be used, and list them."),
    device,
    quiet,
]

_HEAD = [
    click.option("--data", help="Data sets, separated by commas. Default: every complete cache here."),
    click.option("--backbone", help="Backbones, separated by commas. Default: every complete cache here."),
    click.option(
        "--extract",
        is_flag=True,
        help="Make missing caches first, of --data and --backbone or of those in featprobe.toml.",
    ),
    follow_links,
    click.option("--head", help="semseg: linear, upsample, ridge; detect: fcos, fasterrcnn; instseg: maskrcnn."),
    click.option("--levels", help="Levels that the head takes, separated by commas. Default: all in the cache."),
    click.option(
        "--width", type=click.IntRange(1), help="Channels of the head.  [default: 128 upsample, 64 the others]"
    ),
    click.option(
        "--pyramid",
        type=click.Choice(["auto", "levels", "simple"]),
        default="auto",
        show_default=True,
        help="What the head stands on: the levels as they are, or a simple pyramid of the last one (auto: for a ViT).",
    ),
    click.option(
        "--iterations",
        metavar="N|auto",
        callback=iterations,
        help="Training steps; auto: train ever longer until validation gains no more; the default where --fraction "
        "is below 1.  [default: 1000 linear, 400 fcos, 300 others]",
    ),
    click.option(
        "--weights-from",
        type=click.Choice(["best", "end"]),
        help="Point of the validation curve whose weights are kept.  [default: best]",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        help="Images per step, of all processes together.  [default: 16 linear, 8 upsample, 8 fcos, 4 others]",
    ),
    click.option("--lr", callback=numbers, help="Peak learning rates of AdamW, separated by commas; all are tried."),
    click.option("--weight-decay", callback=numbers, help="Weight decays, separated by commas; all are tried."),
    click.option("--loss", help="ce, dice, focal, or a sum as ce+dice.  [default: ce]"),
    click.option(
        "--class-weights", type=click.Choice(["none", "inverse-sqrt"]), help="Of the loss.  [default: inverse-sqrt]"
    ),
    click.option(
        "--loss-at",
        type=click.Choice(["level", "image"]),
        help="Grid of the loss; level is several times faster.  [default: image linear, level others]",
    ),
    click.option(
        "--seeds", type=click.IntRange(1), help="How many, from 0 on.  [default: 3; ridge on all training images: 1]"
    ),
    click.option(
        "--shared-order", is_flag=True, help="One order of the images for all seeds: faster, a narrower spread."
    ),
    click.option(
        "--fraction", callback=numbers, help="Shares of the training split, separated by commas, as 0.01,0.1,1."
    ),
    click.option(
        "--instances",
        type=click.Choice(["own", "components"]),
        default="own",
        show_default=True,
        help="Objects of detect and instseg: the set's own, or connected components of its masks.",
    ),
    click.option(
        "--split",
        metavar="SPLIT",
        default="own",
        show_default=True,
        help="own, group, stratified (by group, heeding classes), image, or FILE.csv of `data split`. "
        "group:5 is a cross-validation of five folds, group:5/2 its second fold.",
    ),
    click.option(
        "--absent-classes",
        type=click.Choice(["zero", "ignore"]),
        default="ignore",
        show_default=True,
        help="Classes that are predicted, but that the split lacks: ignore leaves them out, zero counts them as 0.",
    ),
    click.option("--show", type=click.IntRange(0), default=0, metavar="K", help="Write a sheet of K test images."),
    log,
    device,
    quiet,
]


def feature_options(command: Command) -> Command:
    """All options that decide which features are made, and how."""
    for option in reversed([*_BACKBONE, *_FEATURES]):
        command = option(command)
    return command


def read_options(command: Command) -> Command:
    """All options that say how a data set is read."""
    for option in reversed([data_format, images_at, masks_at, group_from, split_file, follow_links]):
        command = option(command)
    return command


def head_options(command: Command) -> Command:
    """All options that decide which heads are trained and how they are scored, whatever the regime."""
    for option in reversed(_HEAD):
        command = option(command)
    return command


def echo(text: object = "", err: bool = False, nl: bool = True) -> None:
    """Print a line: the one way to the terminal, which control characters of files don't get through."""
    click.echo(printable(str(text)), err=err, nl=nl)


def show_json(value: object) -> None:
    """Print a value for a machine."""
    echo(json.dumps(value, default=str))


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


def terminal_width() -> int | None:
    """Characters in a line of the terminal that stdout is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def workspace_of(ctx: click.Context) -> "Workspace":
    """The folder that the command works in."""
    from featprobe.stages.workspace import Workspace

    return Workspace(ctx.obj, ctx.meta.get("follow_links", False))
