"""The commands of `featprobe cache`."""

from collections.abc import Sequence
from dataclasses import asdict
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.help import InOrder
from featprobe.cli.options import (
    agreed,
    as_json,
    caches_named,
    columns,
    device,
    echo,
    names,
    quiet,
    show_json,
    workspace_of,
)
from featprobe.errors import FeatprobeError, as_usage, counted
from featprobe.kinds import SEEDS, SOLVED, TASKS, kind_of, kinds_of

if TYPE_CHECKING:
    from featprobe.cache import Damage
    from featprobe.stages.comparison.audit import Audit
    from featprobe.stages.workspace import Workspace

FEW_ROWS = 5  # that are named in one line
AUDITED = (kinds_of(TASKS[0])[0], *SOLVED)


@click.group(cls=InOrder)
def cache() -> None:
    """List, describe, verify, upgrade or remove feature caches.

    \b
    Example:
      featprobe cache ls
      featprobe cache verify xray
    """


@cache.command("ls")
@as_json
@click.pass_context
def cache_ls(ctx: click.Context, json_: bool) -> None:
    """List the caches of the workspace.

    \b
    Example:
      featprobe cache ls
    """
    from featprobe.stages.upkeep.caches import describe_cache, list_cache

    workspace = workspace_of(ctx)
    found, broken = [], []
    for path in workspace.cache_files():
        try:
            found.append(describe_cache(path) if json_ else list_cache(path))
        except FeatprobeError as error:
            broken.append({"path": str(path), "error": str(error)})
    if json_:
        return show_json(found + broken)
    rows = [
        (
            Path(c["path"]).relative_to(workspace.cache).as_posix(),
            c["recipe"]["label"],
            "x".join(map(str, c["recipe"]["frame"])),
            _kept_text(c["recipe"]),
            f"{c['whole']} of {c['rows']}",
            _bytes_text(c),
            _version_text(c["version"]),
        )
        for c in found
    ]
    if rows:
        echo(columns(rows, ("file", "backbone", "frame", "dtype", "rows", "size", "version")))
    elif not broken:
        echo(_no_caches(workspace))
    for entry in broken:
        echo(f"can't be opened: {entry['error'].splitlines()[0]}", err=True)


@cache.command("info")
@click.argument("name")
@as_json
@click.pass_context
def cache_info(ctx: click.Context, name: str, json_: bool) -> None:
    """Describe caches: recipe, levels, data set, origin.

    NAME is a path, the name of a data set, or a part of a file name.

    \b
    Example:
      featprobe cache info xray
    """
    from featprobe.stages.upkeep.caches import describe_cache

    found = [describe_cache(path) for path in caches_named(workspace_of(ctx), [name])]
    if json_:
        return show_json(found)
    for c in found:
        recipe, origin = c["recipe"], c["data"]
        levels = ", ".join(f"{v['name']} ({v['channels']} ch)" for v in recipe["levels"])
        rows: list[tuple[str, object]] = [
            ("rows", f"{c['whole']} whole, {c['missing']} missing, {len(c['unreadable'])} unreadable of {c['rows']}"),
            ("size", _bytes_text(c)),
            ("version", _version_text(c["version"])),
            ("backbone", f"{recipe['label']}: {recipe['backbone']}, weights sha256 {recipe['weights_sha256'][:12]}…"),
            ("levels", levels),
            ("final norm", recipe["final_norm"]),
            ("frame", f"{_size_text(recipe['frame'])} ({recipe['fit']} to {_size_text(recipe['size'])})"),
            ("shown", _parts_text(recipe)),
            ("dtype", _kept_text(recipe)),
            ("precision", _precision_text(recipe, c["may_hold_tf32"])),
            ("intensity", f"{recipe['intensity']}{_window_text(recipe, origin)}"),
            ("data", f"{origin['name']}: {origin['root']}"),
            *([("classes", ", ".join(origin["classes"]))] if origin["tasks"] else []),
            *([("labels", _labels_text(origin["label_names"]))] if "label_names" in origin else []),
            ("tasks", _tasks_text(c)),
            ("identity", "intact" if c["intact"] else "DAMAGED: run `featprobe cache verify`"),
            ("key", c["key"]),
            ("command", c["command"]),
            ("made", _made_text(c["provenance"])),
        ]
        echo(columns(rows, (c["path"], "")))
        for name_, reason in c["unreadable"].items():
            echo(f"unreadable: {name_}: {reason}")


@cache.command("verify")
@click.argument("name", required=False)
@click.option(
    "--hdf5", is_flag=True, help="Also open files through HDF5, and compare what it finds with their headers."
)
@quiet
@as_json
@click.pass_context
def cache_verify(ctx: click.Context, name: str | None, hdf5: bool, quiet: bool, json_: bool) -> None:
    """Find damaged bytes in caches.

    It computes the hash of every row, level and target again. If something is damaged, the exit code is 3, and rows
    with damaged features are marked as missing, so that `extract` computes only these again. NAME is a path, the name
    of a data set, or a part of a file name; without it, all caches are checked.

    \b
    Example:
      featprobe cache verify xray
    """
    from featprobe.stages.upkeep.caches import verify_cache

    workspace = workspace_of(ctx)
    paths = caches_named(workspace, [name]) if name else workspace.cache_files()
    found = {str(path): verify_cache(path, quiet, hdf5, lambda line: echo(line, err=True)) for path in paths}
    if json_:
        show_json({path: [asdict(damage) for damage in damages] for path, damages in found.items()})
    else:
        for path, damages in found.items():
            echo(_verified_text(Path(path), damages))
        if not paths:
            echo(_no_caches(workspace))
    if any(found.values()):
        ctx.exit(3)


@cache.command("upgrade")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@quiet
@click.pass_context
def cache_upgrade(ctx: click.Context, names: tuple[str, ...], quiet: bool) -> None:
    """Bring caches of older versions to the newest version.

    Each file is copied and then replaced. Nothing is computed again, and heads that were trained on it can still be
    used. A damaged file is refused and stays as it is. NAME is a path, the name of a data set, or a part of a file
    name.

    \b
    Example:
      featprobe cache upgrade xray
    """
    from featprobe.cache.header import FILE_VERSION
    from featprobe.stages.upkeep.caches import upgrade_cache

    workspace = workspace_of(ctx)
    for path in caches_named(workspace, names):
        done = upgrade_cache(path, quiet)
        echo(f"{path}: {'now' if done else 'already'} of version {FILE_VERSION}")


@cache.command("audit")
@click.argument("name")
@click.option(
    "--heads",
    metavar="LIST",
    default=",".join(AUDITED),
    show_default=True,
    help="Heads to compare, separated by commas, or none.",
)
@click.option(
    "--seeds", type=click.IntRange(1), metavar="N", default=SEEDS, show_default=True, help="How many seeds per head."
)
@click.option(
    "--iterations", type=click.IntRange(1), metavar="N", help="How many training steps.  [default: as in `probe`]"
)
@device
@quiet
@as_json
@click.pass_context
def cache_audit(ctx: click.Context, name: str, json_: bool, **options: Any) -> None:
    """Measure what int8 would save and cost.

    It converts the features of a cache of fp16, fp32 or bf16 to int8 in memory, and reports the bytes, the error of
    each level and the validation scores of heads. It writes no file and does not use the test split. NAME is a path,
    the name of a data set, or a part of a file name.

    \b
    Example:
      featprobe cache audit xray
      featprobe cache audit xray --heads none
    """
    workspace = workspace_of(ctx)
    paths = caches_named(workspace, [name])
    heads = () if options["heads"] == "none" else names(options["heads"])
    with as_usage():
        for head in heads:
            kind_of(TASKS[0], head)
    from featprobe.io.fields import plain
    from featprobe.stages.comparison.audit import AuditOptions, audit

    say = (lambda line: None) if json_ or options["quiet"] else lambda line: echo(line, err=True)
    how = AuditOptions(heads, options["seeds"], options["iterations"], options["device"], options["quiet"])
    found = audit(workspace, paths, how, say)
    if json_:
        return show_json([plain(asdict(one)) for one in found])
    echo("\n\n".join(map(_audit_text, found)))


@cache.command("rm")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@click.pass_context
def cache_rm(ctx: click.Context, name: str, yes: bool) -> None:
    """Delete caches.

    NAME is a path, the name of a data set, or a part of a file name. The command asks first. A file outside of the
    workspace is deleted only if it is a cache.

    \b
    Example:
      featprobe cache rm xray --yes
    """
    from featprobe.machine import human_bytes
    from featprobe.stages.upkeep.caches import check_removable, remove_caches

    workspace = workspace_of(ctx)
    sizes = {path: check_removable(workspace, path) for path in caches_named(workspace, [name])}
    for path, size in sizes.items():
        echo(f"{path}  {human_bytes(size)}")
    if not yes:
        agreed(f"Delete {'this cache' if len(sizes) == 1 else f'these {len(sizes)} caches'}?")
    echo(f"{human_bytes(remove_caches(sizes))} freed")


def _no_caches(workspace: "Workspace") -> str:
    return f"No caches in {workspace.cache}. Make one:  featprobe extract --backbone embedded --data xray"


def _version_text(version: int) -> str:
    from featprobe.cache.header import FILE_VERSION

    return str(version) if version == FILE_VERSION else f"{version}, older: featprobe cache upgrade"


def _verified_text(path: Path, damages: Sequence["Damage"]) -> str:
    """The findings in a file, what was done, and what to do."""
    from featprobe.stages.upkeep.caches import describe_cache, missing_rows

    lines = [f"  row {one.row} {one.id}: {one.part}" if one.row >= 0 else f"  {one.part}" for one in damages]
    try:
        now = describe_cache(path)
    except FeatprobeError as error:
        return "\n".join([f"{path}: {len(damages)} bad", *lines, f"  {str(error).splitlines()[-1]}"])
    if damages:
        rows = sorted({one.row for one in damages if one.row >= 0})
        if rows and now["intact"]:
            marked = missing_rows(path)
            lines += _rows_line([row for row in rows if row in marked], "now marked as missing")
            again = "not marked as missing: run this command again first"
            lines += _rows_line([row for row in rows if row not in marked], again)
        return "\n".join([f"{path}: {len(damages)} bad", *lines, f"  To repair it, run:  {now['command']}"])
    if missing := now["missing"]:
        lack = f"{missing} of {counted(now['rows'], 'row')} {'is' if missing == 1 else 'are'} missing"
        return f"{path}: sound, but {lack}. To finish it, run:  {now['command']}"
    return f"{path}: sound"


def _rows_line(rows: Sequence[int], what: str) -> list[str]:
    """A line on rows, or none where there are none."""
    few = ", ".join(map(str, rows[:FEW_ROWS])) + (", …" if len(rows) > FEW_ROWS else "")
    one = len(rows) == 1
    return [f"  {'row' if one else f'{len(rows)} rows:'} {few} {'is' if one else 'are'} {what}"] if rows else []


def _audit_text(found: "Audit") -> str:
    from featprobe.machine import human_bytes
    from featprobe.report.comparison import interval_text, number

    sizes = ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in found.bytes_of.items())
    dtypes = list(next(iter(found.errors.values())))
    errors = [(level, *(f"{own[dtype]:.3%}" for dtype in dtypes)) for level, own in found.errors.items()]
    lines = [
        f"{found.path}: all features take {sizes}",
        *(["int8 is larger here: keep fp16"] if found.bytes_of["int8"] >= found.bytes_of["fp16"] else []),
        f"relative L2 error against the stored {found.dtype}, of {counted(found.rows, 'row')}",
        columns(errors, ("level", *dtypes)),
    ]
    if found.heads:
        heads = []
        for own in found.heads:
            gap = own.difference
            low, high = (gap.low, gap.high) if gap.has_interval else (nan, nan)
            heads.append((
                own.head, own.seeds, number(100 * own.fp16), number(100 * own.int8), number(100 * gap.estimate, "+.2f"),
                interval_text(low, high, "+.2f"), f"{gap.groups}{' (few)' if gap.few_groups else ''}",
            ))  # fmt: skip
        lines.append("foreground mIoU on validation, percent")
        lines.append(columns(heads, ("head", "seeds", "fp16", "int8", "int8 - fp16", "95 %", "groups")))
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _bytes_text(found: dict[str, Any]) -> str:
    """The size of a cache, and of what was pooled from it; of which levels, where they were looked at."""
    from featprobe.machine import human_bytes

    if "pooled_bytes" not in found:
        return human_bytes(found["bytes"])
    of = f" from {', '.join(found['pooled_levels'])}" if found.get("pooled_levels") else ""
    return f"{human_bytes(found['bytes'])} + {human_bytes(found['pooled_bytes'])} pooled{of}"


def _kept_text(recipe: dict[str, Any]) -> str:
    from featprobe.specs import FeatureRecipe

    return FeatureRecipe.from_json(recipe).kept_as


def _labels_text(names: dict[str, Any]) -> str:
    """The labels of whole images, and what says that one is good."""
    several = "several of an image, none: good" if names["multi"] else f"good: {names['good'] or 'not known'}"
    return f"{', '.join(names['names'])} (of images; {several})"


def _tasks_text(found: dict[str, Any]) -> str:
    """The tasks that a cache serves; of pooled features with the heads that read them."""
    from featprobe.specs import DataInfo

    if "serves" in found:
        return ", ".join(f"{task} ({', '.join(heads)})" for task, heads in found["serves"].items())
    return ", ".join(DataInfo.from_json(found["data"]).serves)


def _parts_text(recipe: dict[str, Any]) -> str:
    from featprobe.tiling import Tiling

    tiling = Tiling.in_json(recipe)
    tiles = tiling.text if tiling else "whole images"
    views = recipe["views"][1:]
    return f"{tiles}; of training images also {', '.join(views)}" if views else tiles


def _precision_text(recipe: dict[str, Any], doubt: str) -> str:
    return f"{recipe['precision']}; may hold TF32: {doubt}" if doubt else recipe["precision"]


def _made_text(made: dict[str, Any]) -> str:
    device = f" on {made['device']}" if made.get("device") else ""
    return f"{made.get('created', '?')} by featprobe {made.get('featprobe', '?')}{device}"


def _window_text(recipe: dict[str, Any], origin: dict[str, Any]) -> str:
    if recipe["window"] is None:
        return ""
    low, high = recipe["window"]
    clipped = "" if origin["clipped"] is None else f", clips {origin['clipped']:.2%} of the annotated pixels"
    return f", levels {low:g} to {high:g}{clipped}"


def _size_text(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
