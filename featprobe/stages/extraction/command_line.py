"""The command line of an extraction, composed in one place: for a cache that is made, and for the page of a result."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from featprobe.datasets.files import FOLLOW_LINKS
from featprobe.stages.extraction.extract_options import OF_ONE_RUN, READ_AS, ExtractOptions

IN_COMMANDS = tuple(option.name for option in fields(ExtractOptions) if option.name not in OF_ONE_RUN)
"""Options that a command says, in this order."""
FIRST, LAST = ("size", "levels", "fit", "intensity"), ("dtype", "precision")
"""Options that the command of a card names in another order."""
CARD_ORDER = (*FIRST, *(name for name in IN_COMMANDS if name not in (*FIRST, *LAST)), *LAST)


def command_of(backbone: Sequence[str], data: str, options: ExtractOptions, order: Sequence[str] = IN_COMMANDS) -> str:
    """The command line that makes the same cache. backbone: its words there, see `backbone_words`.

    >>> command_of(("--backbone", "embedded"), "xray", ExtractOptions(tile=512, overlap=64, skip_bad=True))
    'featprobe extract --backbone embedded --data xray --tile 512 --overlap 64 --skip-bad'
    """
    words = ["featprobe", "extract", *backbone, "--data", data]
    for name in order:
        value = getattr(options, name)
        if value != getattr(ExtractOptions, name):
            words += [option_name(name), *([] if value is True else [_text(name, value)])]
    return shlex.join(words)


def with_links(command: str, followed: bool) -> str:
    """A command that follows links out of its data set where the set was read so."""
    return f"{command} {FOLLOW_LINKS}" if followed else command


def command_of_card(card: Mapping[str, Any], data: str, table: Mapping[str, Any]) -> str:
    """The command line that makes the features that a saved head was trained on.

    data: the name of its data set where the command is to run, or its path. table: what featprobe.toml says of it
    there.
    """
    features, result = card["features"], card["result"]
    backbone = (card["backbone"] or {}).get("arguments") or ("--backbone", features["label"])
    unasked = "amp" if result.get("device", "cpu").startswith("cuda") else "fp32"  # what such a device takes
    options = ExtractOptions.making(features)
    if result["regime"] == "full":  # its features come from no cache
        options = replace(options, dtype=ExtractOptions.dtype, precision="auto")
    elif options.precision == unasked:
        options = replace(options, precision="auto")
    options = replace(
        options,
        tile=options.tile or (0 if table.get("tile") else None),
        views=options.views or (() if "views" in table else None),
        skip_bad=bool(result.get("unreadable")),
        **{name: value for name, value in card.get("read_as", {}).items() if name in READ_AS},
    )
    return command_of(backbone, data, options, CARD_ORDER)


def backbone_words(name: str, weights: str | None, random_init: bool, final_norm: bool | None) -> tuple[str, ...]:
    """The words that name a backbone on the command line, from any folder."""
    words = ["--backbone", name, *(["--weights", str(Path(weights).resolve())] if weights else [])]
    words += ["--random-init"] if random_init else []
    words += [] if final_norm is None else ["--final-norm" if final_norm else "--no-final-norm"]
    return tuple(words)


def option_name(name: str) -> str:
    """The name of an option on the command line.

    >>> option_name("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def _text(name: str, value: Any) -> str:
    """An option's value as the command line takes it."""
    if name == "size":
        return "x".join(map(str, value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return (",".join(value) or "none") if isinstance(value, tuple) else str(value)
