"""Options that several commands share. Nothing here imports torch: `--help` must be quick."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click

from featprobe.cli import streams
from featprobe.cli.help import (
    ALL_KINDS,
    DRAWN,
    OF_UNITS,
    ON_IMAGES,
    ON_MAPS,
    SEEDS_TEXT,
    default_of,
    default_width,
    listed,
    under,
)
from featprobe.errors import as_usage
from featprobe.io.texts import printable
from featprobe.kinds import CORESET, FALSE_CALLS, LOSSES
from featprobe.machine import check_device, check_here

if TYPE_CHECKING:
    from pathlib import Path

    from featprobe.stages.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., Any])

data, features, cutting, computing, output = map(
    under, ("Data set", "Features", "Tiles and views", "Computing", "Output")
)
wanted, head, training = map(under, ("What to train", "Head", "Training"))


def device_name(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    """A name of a device, which is not here only where torch alone knows that."""
    if name is not None:
        with as_usage():
            check_device(name)
        check_here(name)
    return name


as_json = output("--json", "json_", is_flag=True, help="Print one JSON value instead of text.")
quiet = output("--quiet", is_flag=True, help="Show no progress bar.")
data_format = data("--format", metavar="NAME[:PART]", help="The format of the data set.  [default: detected]")
log = output(
    "--log",
    type=click.Choice(["tensorboard", "wandb"]),
    multiple=True,
    help="Also write curves of loss, learning rate and validation scores. Can be repeated.",
)
intensity = features(
    "--intensity",
    metavar="POLICY",
    help="How raw grey levels become numbers from 0 to 1: window:LO:HI, percentile:LO:HI, minmax, none or log. Add "
    ":log to take the logarithm, :image to use the levels of each image alone.  [default: none for 8-bit images, "
    "percentile:0.01:99.99 of the training images for others]",
)
group_from = data(
    "--group-from",
    metavar="REGEX",
    help="Find the group of each image in its id with this regular expression: its first group, as '(C\\d+)_', or the "
    "whole match.",
)
split_file = data(
    "--split-file",
    type=click.Path(dir_okay=False),
    help="Take splits and groups from a CSV file, as `data split` writes it.",
)
images_at = data(
    "--images",
    metavar="PATTERN",
    help="Where the images lie in the data folder, as 'shots/*/*.jpg'. Use it with --masks, instead of --format.",
)
masks_at = data(
    "--masks",
    metavar="PATTERN",
    help="Where the mask of each image lies, as 'seg/{stem}_m.png'; also {dir} and {split}, see docs/formats.md.",
)
_LINKS: dict[str, Any] = {
    "is_flag": True,
    "expose_value": False,
    "callback": lambda ctx, param, given: ctx.meta.update({"follow_links": given}),
    "help": "Follow links in the data folder to files outside it.",
}
follow_links = data("--follow-links", **_LINKS)
device = computing(
    "--device",
    metavar="cpu|cuda|mps",
    callback=device_name,
    help="Where to compute.  [default: the best device there is]",
)
workers = computing(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="How many threads decode images; for a GPU processes.  [default: one per usable core, at most 16]",
)


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
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise click.BadParameter(f"{text[:60]!r}. wanted: a whole number from 1 on, or auto", ctx, param)
    return int(text)


backbone = under("Backbone")
_FEATURES = [
    backbone("--backbone", required=True, metavar="NAME", help="An alias (see `featprobe backbones`) or a timm model."),
    backbone("--weights", type=click.Path(dir_okay=False), help="Load your own weights: .safetensors, or .pth that "
             "holds tensors only."),
    backbone("--random-init", is_flag=True, help="Use seeded random weights, as a control."),
    backbone(
        "--final-norm/--no-final-norm",
        default=None,
        help="Apply the last normalisation layer of the model.  [default: yes for DINOv2 and DINOv3, no for others]",
    ),
    data("--data", required=True, metavar="NAME", help="A name (see `featprobe data`) or a path."),
    data_format,
    images_at,
    masks_at,
    group_from,
    split_file,
    follow_links,
    features("--levels", metavar="LIST", help="Feature levels, as stride8,stride16.  [default: all]"),
    features(
        "--size",
        metavar="HxW",
        help="Height x width in pixels that images are brought to.  [default: that of the images if all have the same "
        "size and no side is above 512, else 512x512]",
    ),
    features(
        "--fit",
        type=click.Choice(["resize", "letterbox"]),
        help="How images are brought to that size. letterbox keeps their shape and pads them.  [default: resize]",
    ),
    intensity,
    features(
        "--dtype",
        type=click.Choice(["fp16", "fp32", "bf16", "int8"]),
        default="fp16",
        show_default=True,
        help="How features are stored. int8 takes half the bytes of fp16; `cache audit` measures what it costs.",
    ),
    features(
        "--store",
        type=click.Choice(["maps", "pooled"]),
        default="maps",
        show_default=True,
        help="What is kept of each level: its map, or only the mean and the maximum of each channel, a few kB per "
        "image. pooled serves --task classify and --task anomaly with the head knn, and nothing else.",
    ),
    features(
        "--precision",
        type=click.Choice(["auto", "fp32", "tf32", "amp"]),
        default="auto",
        show_default=True,
        help="How features are computed. fp32 is float32 without TF32. tf32 and amp (fp16 where that is safe) are "
        "faster and need CUDA; they change the features a little, so another cache is made. auto takes the precision "
        "of the cache that exists, else amp on CUDA and fp32 elsewhere.",
    ),
    cutting("--tile", type=click.IntRange(0), metavar="PX", help="Cut images into square tiles of this side, in "
            "pixels. 0 keeps images whole."),
    cutting(
        "--overlap",
        type=click.IntRange(0),
        metavar="PX",
        help="By how many pixels neighbouring tiles overlap, at least.  [default: an eighth of --tile]",
    ),
    cutting(
        "--empty-tiles",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Which share of the training tiles without a defect is kept.  [default: 1]",
    ),
    cutting(
        "--views",
        metavar="LIST",
        help="Also store these views of the training images: hflip, vflip, rot90 and crop:N (N random crops), "
        "separated by commas; or none.",
    ),
    computing(
        "--batch-size", type=click.IntRange(1), metavar="N", default=16, show_default=True,
        help="How many images are computed and written at once.",
    ),
    workers,
    device,
    computing("--skip-bad", is_flag=True, help="Omit samples that can't be used, and list them."),
    quiet,
]  # fmt: skip


def _own_weights(ctx: click.Context, param: click.Parameter, given: object) -> None:
    """Weights belong to `extract`, or to a name in featprobe.toml; raises UsageError where they are given."""
    if given is not None and not ctx.resilient_parsing:
        raise click.UsageError(
            f"--weights is an option of `featprobe extract`, not of `featprobe {ctx.info_name}`.\n"
            "To make a cache with your own weights here, name them in featprobe.toml:\n\n"
            f'  [backbones.NAME]\n  model = "a model of timm"\n  weights = {json.dumps(given)}\n\n'
            f"Then run:  featprobe {ctx.info_name} --extract --backbone NAME",
            ctx,
        )


_HEAD = [
    wanted("--data", metavar="LIST", help="Data sets, separated by commas.  [default: every complete cache here]"),
    wanted("--backbone", metavar="LIST", help="Backbones, separated by commas.  [default: every complete cache here]"),
    wanted("--weights", hidden=True, expose_value=False, callback=_own_weights),
    wanted(
        "--extract",
        is_flag=True,
        help="First make the caches that are missing: of --data and --backbone, or of those in featprobe.toml.",
    ),
    wanted(
        "--fraction",
        callback=numbers,
        metavar="LIST",
        help="Shares of the training split to train on, as 0.01,0.1,1.  [default: 1]",
    ),
    wanted(
        "--split",
        metavar="SPLIT",
        default="own",
        show_default=True,
        help="How images are divided: own (as the data set says), group, stratified (by group, with balanced "
        "classes), image, or FILE.csv of `data split`. group:5 is a cross-validation with five folds, group:5/2 is its "
        "second fold.",
    ),
    wanted(
        "--instances",
        type=click.Choice(["own", "components"]),
        default="own",
        show_default=True,
        help="Which objects detect and instseg learn: those of the data set, or the connected components of its masks.",
    ),
    wanted(
        "--labels",
        type=click.Choice(["own", "defect", "classes"]),
        default="own",
        show_default=True,
        help=f"What {listed(ON_IMAGES)} learns of images: own (the labels that the data set gives them), defect (if "
        "they show one) or classes (which of those of masks or objects they show).",
    ),
    wanted(
        "--unit",
        type=click.Choice(["image", "tile"]),
        default="image",
        show_default=True,
        help=f"What {listed(OF_UNITS)} judges: whole images, or each tile of a cache of tiles.",
    ),
    wanted("--follow-links", **_LINKS),
    head("--head", metavar="KIND", help=f"The kind of head. {ALL_KINDS}.  [default: the first of the task]"),
    head("--levels", metavar="LIST", help="Levels that the head uses, separated by commas.  [default: all]"),
    head(
        "--width", type=click.IntRange(1), metavar="N",
        help=f"How many channels the head has.  {default_width()}",
    ),
    head(
        "--pyramid",
        type=click.Choice(["auto", "levels", "simple"]),
        default="auto",
        show_default=True,
        help="What the head is built on: the levels as they are, or a simple pyramid made from the last level. auto "
        "takes simple for a ViT.",
    ),
    head(
        "--coreset", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE", default=CORESET, show_default=True,
        help=f"Which share of the patches of good images {listed(DRAWN)} keeps.",
    ),
    head(
        "--remove-position",
        is_flag=True,
        help=f"For {listed(ON_MAPS)}: subtract the mean map of the good training images, which is what a backbone says "
        "of a place whatever it shows.",
    ),
    training(
        "--iterations",
        metavar="N|auto",
        callback=iterations,
        help="How many training steps. auto increases them until validation gains no more; it is the default where "
        f"--fraction is below 1.  {default_of('iterations')}",
    ),
    training(
        "--batch-size", type=click.IntRange(1), metavar="N",
        help=f"How many images per step, over all processes.  {default_of('batch_size')}",
    ),
    training(
        "--lr", callback=numbers, metavar="LIST",
        help=f"Peak learning rates of AdamW, separated by commas. All are tried.  {default_of('lr')}",
    ),
    training(
        "--weight-decay", callback=numbers, metavar="LIST",
        help=f"Weight decays of AdamW, separated by commas. All are tried.  {default_of('weight_decay')}",
    ),
    training(
        "--loss", metavar="LOSS",
        help=f"The loss of a dense head: {listed(LOSSES)}, or a sum as ce+dice.  {default_of('loss')}",
    ),
    training(
        "--class-weights", type=click.Choice(["none", "inverse-sqrt"]),
        help=f"How the loss of a dense head weights the classes.  {default_of('class_weights')}",
    ),
    training(
        "--loss-at",
        type=click.Choice(["level", "image"]),
        help="Where the loss of a dense head is computed: on the grid of a feature level, which is much faster, or "
        f"on that of the image.  {default_of('loss_at')}",
    ),
    training(
        "--weights-from",
        type=click.Choice(["best", "end"]),
        help=f"Which point of the validation curve the head is taken from.  {default_of('weights_from')}",
    ),
    training(
        "--seeds", type=click.IntRange(1), metavar="N",
        help=f"How many seeds, counted from 0.  [default: {SEEDS_TEXT}]",
    ),
    training(
        "--shared-order",
        is_flag=True,
        help="Show images to all seeds in one order. This is faster, but the spread over seeds becomes narrower.",
    ),
    device,
    output(
        "--false-calls",
        type=click.FloatRange(0, 1, max_open=True),
        metavar="RATE",
        default=FALSE_CALLS,
        show_default=True,
        help=f"For {listed(OF_UNITS)}: which share of the good validation images may lie above the threshold.",
    ),
    output(
        "--absent-classes",
        type=click.Choice(["zero", "ignore"]),
        default="ignore",
        show_default=True,
        help="How to score a class that is predicted, but not in the test split: ignore omits it, zero counts it as 0.",
    ),
    output(
        "--show", type=click.IntRange(0), default=0, metavar="K", help="Draw K test images with their predictions."
    ),
    log,
    quiet,
]  # fmt: skip


def feature_options(command: Command) -> Command:
    """All options that decide which features are made, and how."""
    for option in reversed(_FEATURES):
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
    try:
        click.echo(printable(str(text)), err=err, nl=nl)
    except OSError as error:
        streams.refused(error, err=err)


def to_stderr(line: str) -> None:
    """Print a line of progress, which is no part of the result."""
    echo(line, err=True)


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
    return shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else None


def workspace_of(ctx: click.Context) -> "Workspace":
    """The folder that the command works in."""
    from featprobe.stages.workspace import Workspace

    return Workspace(ctx.obj, ctx.meta.get("follow_links", False))


def agreed(question: str, *, err: bool = False) -> None:
    """Ask before something is removed; where the answer is no, or nobody can give one, the command ends with 1."""
    try:
        click.confirm(question, abort=True, err=err)
    except click.Abort:
        echo("\nNothing was removed. With --yes nobody is asked.", err=True)
        raise click.exceptions.Exit(1) from None


def at_workspace(ctx: click.Context) -> list[str]:
    """The words that name the workspace on a command line; none for the current folder."""
    return [] if str(ctx.obj) == "." else ["--workspace", str(ctx.obj)]


def caches_named(workspace: "Workspace", names: Sequence[str]) -> list["Path"]:
    """The caches that words of the command line mean.

    Raises UsageError for one that means nothing, CacheError for a data set that has no cache yet.
    """
    found = []
    for name in names:
        with nullcontext() if name in workspace.data_names() else as_usage():
            found += workspace.find_caches(name)
    return found
