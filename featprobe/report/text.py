"""Tables as text for a terminal."""

from textwrap import fill

import pandas as pd


def table_text(table: pd.DataFrame, width: int | None = None) -> str:
    """A table of texts, aligned to the right, in lines of at most `width` characters where one is given.

    Where they would be longer, columns that say the same in every row are said once, above the table; and columns that
    still do not fit follow below, behind the first columns that tell the rows apart.

    >>> table = pd.DataFrame({"backbone": ["a", "b"], "head": ["linear", "linear"], "IoU": ["1.5", "20.1"]})
    >>> print(table_text(table, 20))
    head: linear
    <BLANKLINE>
    backbone   IoU
           a   1.5
           b  20.1
    """
    columns = {str(name): [str(name), *map(str, table[name])] for name in table.columns}
    wide = {name: max(map(len, cells)) for name, cells in columns.items()}
    if width is None or _length(wide, list(columns)) <= width:
        return _block(columns, wide, list(columns))
    first = next(iter(columns))
    alike = [name for name, cells in columns.items() if len(set(cells[1:])) == 1 and name != first]
    said = [name for name in alike if len(table) > 1 or not columns[name][1]]
    above = ", ".join(f"{name}: {columns[name][1]}" for name in said if columns[name][1])
    shown = [name for name in columns if name not in said]
    head = _naming(columns, shown)
    head = head if all(_length(wide, [*head, name]) <= width for name in shown[len(head) :]) else shown[:1]
    parts = [list(head)]
    for name in shown[len(head) :]:
        fits = parts[-1] == head or _length(wide, [*parts[-1], name]) <= width
        parts = [*parts[:-1], [*parts[-1], name]] if fits else [*parts, [*head, name]]
    blocks = [fill(above, width, break_long_words=False)] if above else []
    return "\n\n".join([*blocks, *(_block(columns, wide, names) for names in parts)])


def _naming(columns: dict[str, list[str]], names: list[str]) -> list[str]:
    """The first columns, as many as tell all rows apart; the first alone where none do."""
    for count in range(1, len(names) + 1):
        rows = list(zip(*(columns[name] for name in names[:count]), strict=True))
        if len(set(rows)) == len(rows):
            return names[:count]
    return names[:1]


def _length(wide: dict[str, int], names: list[str]) -> int:
    return sum(wide[name] for name in names) + 2 * (len(names) - 1)


def _block(columns: dict[str, list[str]], wide: dict[str, int], names: list[str]) -> str:
    lines = zip(*([cell.rjust(wide[name]) for cell in columns[name]] for name in names), strict=True)
    return "\n".join("  ".join(line).rstrip() for line in lines)
