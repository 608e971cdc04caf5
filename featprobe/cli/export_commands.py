"""The command that takes a head out of featprobe: export."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.options import as_json, echo, show_json, workspace_of
from featprobe.errors import DataError

if TYPE_CHECKING:
    from featprobe.geometry import Size


def sides(ctx: click.Context, param: click.Parameter, text: str | None) -> "Size | None":
    """A size as HxW."""
    from featprobe.geometry import parse_size  # it loads numpy

    try:
        return None if text is None else parse_size(text)
    except DataError as error:
        raise click.BadParameter(str(error), ctx, param) from None


@click.command()
@click.argument("head", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The ONNX file to write.")
@click.option("--weights", type=click.Path(dir_okay=False), help="The weights of the backbone, if they have moved.")
@click.option(
    "--image-size",
    metavar="HxW",
    callback=sides,
    help="The size of the images that the model takes, in pixels.  [default: the commonest of the test images]",
)
@click.option(
    "--opset",
    type=click.IntRange(18, 23),
    metavar="N",
    default=20,
    show_default=True,
    help="The version of ONNX's operators.",
)
@click.option(
    "--threshold",
    type=float,
    metavar="T",
    help="From which score on something is a finding, or above which score an image is called.  [default: as that of "
    "predict]",
)
@click.option(
    "--test-images",
    type=click.IntRange(1),
    metavar="N",
    default=20,
    show_default=True,
    help="How many images the model is compared with featprobe on.",
)
@click.option(
    "--images",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    help="Compare on these images, or those in this folder.  [default: those that the head was tested on]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    metavar="X",
    default=0.001,
    show_default=True,
    help="How far logits, or scores, may lie from featprobe's.",
)
@as_json
@click.pass_context
def export(ctx: click.Context, head: Path, json_: bool, **options: Any) -> None:
    """Write a saved head as an ONNX file that runs without featprobe.

    HEAD is a folder that `probe` or `finetune` has written. The file takes raw levels as they come from the camera;
    the intensity window, resizing, normalisation, the backbone and the head are inside. It is written once onnxruntime
    has found in test images what featprobe finds; the figures are in a JSON file beside it.

    \b
    Example:
      featprobe export probes/SET/BACKBONE/HEAD/seed0 --out model.onnx
    """
    from featprobe.stages.export.export import export as run

    report = run(head if head.is_dir() else head.parent, options.pop("out"), workspace_of(ctx), **options)
    if json_:
        return show_json(asdict(report))
    for note in report.notes:
        echo(f"note: {note}")
    echo(f"{report.model}: {report.bytes / 2**20:.1f} MiB, takes {report.input}, gives {', '.join(report.outputs)}")
    for line in report.parity.lines:
        echo(line)
    echo(f"figures: {report.parity_file}")
