"""The commands of `featprobe data`."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from featprobe.cli.help import InOrder
from featprobe.cli.options import (
    as_json,
    columns,
    data_format,
    echo,
    follow_links,
    group_from,
    images_at,
    intensity,
    masks_at,
    quiet,
    read_options,
    show_json,
    terminal_width,
    workspace_of,
)
from featprobe.errors import FeatprobeError, UsageError, as_usage, counted

if TYPE_CHECKING:
    from featprobe.datasets import DataSet
    from featprobe.stages.workspace import Workspace


few_workers = click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    default=2,
    show_default=True,
    help="How many threads decode images.",
)


@click.group(cls=InOrder, invoke_without_command=True)
@click.pass_context
def data(ctx: click.Context) -> None:
    """List, describe, check, draw, split or convert data sets.

    Without a command, it lists the data sets that can be named here.

    \b
    Example:
      featprobe data
      featprobe data info xray
      featprobe data show xray --out xray.png
    """
    if ctx.invoked_subcommand is not None:
        return
    from featprobe.datasets.formats import FORMATS, added_formats

    workspace = workspace_of(ctx)
    added, broken = added_formats()
    entries = workspace.config.get("data", {})
    rows = [
        (name, str(workspace.data / name), "built in, there" if (workspace.data / name).is_dir() else "built in")
        if name not in entries
        else (name, entries[name]["path"], "featprobe.toml")
        for name in workspace.data_names()
    ]
    echo(columns(rows, ("name", "path", "from")))
    echo(f"A path works too, if its data set has one of these formats: {', '.join([*FORMATS, *added])}.")
    for message in broken:
        echo(f"warning: {message}", err=True)


@data.command("info")
@click.argument("name")
@read_options
@as_json
@click.pass_context
def data_info(ctx: click.Context, name: str, json_: bool, **how: str | None) -> None:
    """Describe a data set: images, groups, classes, splits.

    NAME is a name from `featprobe data`, or a path.

    \b
    Example:
      featprobe data info surface
    """
    named = _read(workspace_of(ctx), name, how)
    from featprobe.datasets.label_sets import NO_LABEL
    from featprobe.stages.upkeep.describe import share_text, summarise

    summary = summarise(named)
    if json_:
        return show_json(asdict(summary))
    low, high = ("x".join(map(str, size)) for size in summary.sizes)
    echo(f"{summary.name}: {summary.root}")
    sizes = low if low == high else f"{low} to {high}"
    echo(f"  {counted(sum(summary.images.values()), 'image')}, {summary.depth}-bit, {sizes} (height x width)")
    echo(f"  labels for {', '.join(summary.serves)}")
    for split, count in summary.images.items():
        echo(f"  {split:<6} {counted(count, 'image')}, {counted(summary.groups[split], 'group')}")
    header = ["class", *(["pixels"] if summary.pixels else []), *(["instances"] if summary.instances else [])]
    rows = [
        [
            name,
            *([share_text(summary.pixels[name])] if summary.pixels else []),
            *([summary.instances.get(name, "")] if summary.instances else []),
        ]
        for name in summary.classes
    ]
    if summary.tasks:
        echo(columns(rows, header))
    if summary.labels:
        names = next(iter(summary.labels.values()))
        counts = [[name or NO_LABEL, *(own[name] for own in summary.labels.values())] for name in names]
        echo(columns(counts, ("label", *summary.labels)))
    for note in summary.notes:
        echo(f"note: {note}")
    echo(f"\nIts description, for featprobe.toml:\n\n{summary.toml}")


@data.command("show")
@click.argument("name")
@read_options
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The PNG file to write.")
@click.option("--count", type=click.IntRange(1), metavar="N", default=8, show_default=True, help="How many images.")
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    default="train",
    show_default=True,
    help="The split to take images from.",
)
@intensity
@click.pass_context
def data_show(
    ctx: click.Context,
    name: str,
    out: Path,
    count: int,
    split: str,
    intensity: str | None,
    **how: str | None,
) -> None:
    """Draw images of a data set beside their labels.

    NAME is a name from `featprobe data`, or a path.

    \b
    Example:
      featprobe data show xray --out xray.png
    """
    from featprobe.intensity import Intensity

    workspace = workspace_of(ctx)
    with as_usage():
        if out.suffix.lower() not in ("", ".png"):
            raise UsageError(f"--out {out}: the picture is a PNG file. wanted: a name that ends in .png")
        _ = intensity and Intensity.parse(intensity)
    policy = intensity or workspace.data_options(name).get("intensity")
    named = _read(workspace, name, how)
    from featprobe.stages.upkeep.describe import contact_sheet

    shown = contact_sheet(named, out, count, split, policy)
    echo(f"{out}: {counted(len(shown), 'image')} of {split}")


@data.command("check")
@click.argument("name")
@read_options
@click.option(
    "--size", metavar="HxW", help="The size of the images for which objects are measured.  [default: that of `extract`]"
)
@click.option(
    "--html", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page with pictures."
)
@few_workers
@quiet
@as_json
@click.pass_context
def data_check(
    ctx: click.Context,
    name: str,
    size: str | None,
    html: Path | None,
    workers: int,
    quiet: bool,
    json_: bool,
    **how: str | None,
) -> None:
    """Find what would spoil a study on a data set.

    It looks for groups, images or near copies of images that are in two splits; empty splits; files that can't be read;
    masks whose size differs from that of their image; boxes outside their image; other bad labels; objects that an
    image lists twice; images in two classes where one is meant; one label for all images; and 8-bit and 16-bit images
    in one data set. If it finds any of these, the exit code is 3. NAME is a name from `featprobe data`, or a path.

    \b
    Example:
      featprobe data check path/to/my_set --html check.html
    """
    from featprobe.geometry import parse_size
    from featprobe.stages.extraction.extract_options import ExtractOptions, configured

    workspace = workspace_of(ctx)
    with as_usage():
        measured = ExtractOptions(size=parse_size(size) if size else None)
    named = _read(workspace, name, how, complete=False)
    from featprobe.report.text import table_text
    from featprobe.stages.upkeep.check import (
        check,
        class_table,
        entry_texts,
        head_lines,
        label_table,
        object_line,
        object_table,
    )

    made = configured(measured, workspace.data_options(name))
    found = check(named, size=made.size, fit=made.fit, tile=made.tile, page=html, workers=workers, quiet=quiet)
    width = terminal_width()
    if json_:
        show_json(asdict(found))
    else:
        echo(f"{found.name}: {found.root}")
        echo("\n".join(f"  {line}" for line in head_lines(found)))
        tables = [class_table(found)] if found.tasks else []
        tables += [label_table(found)] if found.labels else []
        for table in tables:
            echo(f"\n{table_text(table, width)}\n")
        if found.objects:
            echo(f"{object_line(found.objects)}\n{table_text(object_table(found.objects), width)}\n")
        for note in found.notes:
            echo(f"note: {note}")
        for finding in found.findings:
            _show_finding("spoils a study" if finding.spoils else "to know", finding.text, entry_texts(finding))
        if not found.spoiled:
            echo("Nothing was found that would spoil a study.")
        if html:
            echo(f"page: {html}")
    if found.spoiled:
        ctx.exit(3)


@data.command("convert")
@click.argument("name")
@read_options
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The folder to write to; it must be new or empty.",
)
@click.option("--link", is_flag=True, help="Make links to the images instead of copies.")
@quiet
@as_json
@click.pass_context
def data_convert(
    ctx: click.Context,
    name: str,
    out: Path,
    link: bool,
    quiet: bool,
    json_: bool,
    **how: str | None,
) -> None:
    """Write a data set as COCO JSON, one file per split.

    Ids, splits, groups, masks and boxes stay the same. NAME is a name from `featprobe data`, or a path.

    \b
    Example:
      featprobe data convert path/to/my_set --out my_set_coco
    """
    named = _read(workspace_of(ctx), name, how)
    from featprobe.datasets.files import FOLLOW_LINKS
    from featprobe.datasets.label_sets import says_good
    from featprobe.stages.upkeep.convert import convert

    done = convert(named, out, link=link, quiet=quiet)
    if json_:
        return show_json(asdict(done))
    counts = ", ".join(f"{count} of {split}" for split, count in done.images.items())
    echo(f"{done.path}: images: {counts}; {counted(sum(done.annotations.values()), 'annotation')}")
    if link:
        echo(f"Its images are links to files outside it. Read it with  {FOLLOW_LINKS}")
    good = named.label_names and named.label_names.good
    if good and not says_good(good):
        echo(f'No usual name says what is good. Its section of featprobe.toml needs  good = "{good}"')


@data.command("split")
@click.argument("name")
@data_format
@images_at
@masks_at
@group_from
@follow_links
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The CSV file to write.")
@click.option(
    "--split",
    metavar="SPLIT",
    default="own",
    show_default=True,
    help="own (as the data set says), group, stratified (by group, with balanced classes) or image. group:5 "
    "gives the five folds of a cross-validation.",
)
@click.option("--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Shuffles the groups.")
@few_workers
@quiet
@as_json
@click.pass_context
def data_split(
    ctx: click.Context,
    name: str,
    out: Path,
    split: str,
    seed: int,
    workers: int,
    quiet: bool,
    json_: bool,
    **how: str | None,
) -> None:
    """Write a split of a data set to a CSV file.

    Its columns are id, group and split. You can edit it, and use it with --split of `probe` and `finetune`. The command
    then reads all images, as `data check` does, and reports images that look the same but are in two splits. NAME is a
    name from `featprobe data`, or a path.

    \b
    Example:
      featprobe data split xray --out split.csv --split stratified
      featprobe probe --data xray --split split.csv
    """
    from featprobe.splitting import SplitChoice

    with as_usage():
        choice = SplitChoice.parse(split)
    named = _read(workspace_of(ctx), name, how)
    from featprobe.stages.upkeep.describe import write_split

    report = write_split(named, out, choice, seed, workers=workers, quiet=quiet)
    if json_:
        return show_json(asdict(report))
    rows = [[part, count, report.groups[part], *report.holders[part].values()] for part, count in report.images.items()]
    echo(columns(rows, ("split", "images", "groups", *next(iter(report.holders.values())))))
    for note in report.notes:
        echo(f"note: {note}")
    echo(
        f"{out}: {counted(sum(report.images.values()), 'image')}; use it:  "
        + shlex.join(["featprobe", "probe", "--data", name, "--split", str(out)])
    )


@data.command("make")
@click.argument("name", type=click.Choice(["xray", "surface"]))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder to write to.  [default: data/NAME in the workspace]",
)
@click.option("--images", type=click.IntRange(12), metavar="N", default=240, show_default=True, help="How many images.")
@click.option("--size", default="256x256", show_default=True, metavar="HxW", help="Height x width in pixels.")
@click.option(
    "--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Another seed draws other images."
)
@click.pass_context
def data_make(ctx: click.Context, name: str, out: Path | None, images: int, size: str, seed: int) -> None:
    """Generate a built-in data set, in any size.

    \b
    Example:
      featprobe data make xray --images 480 --size 384x384 --out big_xray
    """
    from featprobe.geometry import parse_size
    from featprobe.stages.workspace import make_generated

    with as_usage():
        sides = parse_size(size)
    folder = out or workspace_of(ctx).data / name
    there = (folder / "annotations").is_dir()
    if there:
        raise FeatprobeError(f"{folder} holds a data set already. Nothing was changed. Name another folder with --out.")
    make_generated(name, folder, images=images, size=sides, seed=seed)
    echo(f"{folder}: {images} images of {size}")


def _read(workspace: "Workspace", name: str, how: dict[str, str | None], complete: bool = True) -> "DataSet":
    how = {**how}
    with as_usage():
        workspace.check_reading(name, how)
    return workspace.data_set(name, how.pop("format"), complete=complete, **how)


def _show_finding(kind: str, text: str, entries: Sequence[str]) -> None:
    echo(f"{kind}: {text}")
    for entry in entries[:5]:
        echo("\n".join(f"  {line}" for line in entry.splitlines()))
    if len(entries) > 5:
        echo(f"  and {len(entries) - 5} more; --json lists all of them")
