"""Which heads are inspected: those that somebody names, or the results of a workspace. Nothing here loads torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featprobe.errors import FileKindError, ProbeError, UsageError, nearest
from featprobe.io.disk import below, read_json
from featprobe.probes.saved import HEAD_FORMAT, HEAD_VERSION, LARGEST_CARD
from featprobe.result_rows import ResultRow
from featprobe.specs import digest
from featprobe.stages.upkeep.saved_heads import RESULTS, last_rows
from featprobe.stages.workspace import Workspace


@dataclass(frozen=True)
class ScoredHead:
    """A saved head. row: what it scored; head_sha256: of its weights, by which what lies beside it is known. root: of
    the data set that it was trained on.
    """

    folder: Path
    row: ResultRow
    head_sha256: str
    root: Path


def head_in(folder: Path) -> ScoredHead:
    """The head in a folder, by its card; raises ProbeError where there is none, or it was changed."""
    try:
        card = read_json(below(folder, "card.json", "The folder of a head"), LARGEST_CARD)
        known = (card["format"], card["version"] <= HEAD_VERSION) == (HEAD_FORMAT, True)
        sealed = card.pop("card_sha256") == digest(card)
        head_sha256, result, root = (
            card["head_sha256"],
            card.get("result"),
            Path((card.get("data") or {}).get("root", "")),
        )
        if "\0" in str(root):
            raise ValueError("the root of its data set is no path")
    except FileNotFoundError as error:
        raise ProbeError(_no_head(folder)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FileKindError, RecursionError) as error:
        raise ProbeError(
            f"{folder} holds no saved head that can be read: {type(error).__name__}: {str(error).rstrip('.')}."
        ) from error
    if not known:
        raise ProbeError(f"{folder} holds another format of heads. wanted: {HEAD_FORMAT} {HEAD_VERSION}.")
    if not sealed:
        raise ProbeError(f"{folder}/card.json is not as featprobe wrote it. Was it edited? Train the head again.")
    if not isinstance(result, Mapping) or not isinstance(head_sha256, str):
        raise ProbeError(f"{folder} holds a head that was never scored. Train it with `featprobe probe`.")
    row = ResultRow.from_json(result, load=False)
    if not row.is_known:
        raise ProbeError(f"{folder} holds a head of the task {row.task}, which is not known here.")
    return ScoredHead(folder, row, head_sha256, root)


def _no_head(folder: Path) -> str:
    """The error text for a folder without a card, or for none."""
    if not folder.exists():
        return f"There is no folder {folder}. Heads are listed by:  featprobe probes ls"
    heads = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("**/seed*/card.json"))
    if heads:
        more = f" and {len(heads) - 3} more" if len(heads) > 3 else ""
        return f"{folder} holds no head itself, but {', '.join(heads[:3])}{more}. Name one of them."
    return f"{folder} has no card.json, so there is no saved head in it. Train it again."


def head_of(workspace: Workspace, row: ResultRow) -> ScoredHead:
    """The head of a result row; raises ProbeError where it is not there as it was saved."""
    try:
        head = head_in(below(workspace.probes, row.folder, "its row"))
    except FileKindError as error:
        raise ProbeError(str(error)) from error
    if head.row != row:
        raise ProbeError(f"{head.folder} was written again since, by another run. Nothing was inspected.")
    return head


def check_here(workspace: Workspace, heads: Iterable[ScoredHead]) -> None:
    """Raise ProbeError for heads of other workspaces, whose caches are not here."""
    for head in heads:
        if head.folder.resolve() != (workspace.probes / head.row.folder).resolve():
            raise ProbeError(
                f"{head.folder} is of another workspace than {workspace.root}, and its records are made from the cache "
                "there. Nothing was computed.\nName that workspace:  featprobe --workspace FOLDER inspect --rescore …"
            )


def rows_asked(workspace: Workspace, asked: Mapping[str, Sequence[str]]) -> list[ResultRow]:
    """The last rows of the results of a workspace that fit, in the order in which they were made.

    asked: field of a row -> values that it may have; empty for any. Raises UsageError for a value that no row has,
    ProbeError where there is no result.
    """
    rows = list(last_rows(workspace.probes / RESULTS).values())
    if not rows:
        raise ProbeError(
            f"There is no result in {workspace.probes} to inspect.\n"
            "Make some:  featprobe extract --backbone embedded --data xray\n"
            "            featprobe probe --task semseg"
        )
    for name, values in asked.items():
        known = [str(getattr(row, name)) for row in rows]
        for value in values:
            if value not in known:
                raise UsageError(f"No result has the {name} {value!r}. {nearest(value, known)}".rstrip())
    found = [row for row in rows if all(not own or getattr(row, name) in own for name, own in asked.items())]
    if not found:
        said = ", ".join(f"--{name} {','.join(own)}" for name, own in asked.items() if own)
        raise UsageError(f"No result in {workspace.probes} has all of {said}.")
    return found


def rows_below(workspace: Workspace, folder: Path) -> list[ResultRow]:
    """The last rows of the heads below a folder that is none itself; none for other folders."""
    root, inside = workspace.probes.resolve(), folder.resolve()
    if (folder / "card.json").exists() or not inside.is_relative_to(root):
        return []
    rows = last_rows(workspace.probes / RESULTS).values()
    return [row for row in rows if inside in (root / row.folder).parents]


def one_of_each(rows: Iterable[ResultRow]) -> list[list[ResultRow]]:
    """Rows by seed of a run: one alone, or those of its folds in their order. Of the same fold the last counts."""
    found: dict[str, dict[int, ResultRow]] = {}
    for row in rows:
        found.setdefault(_seed_of(row), {})[row.fold or 0] = row
    return [[folds[fold] for fold in sorted(folds)] for folds in found.values()]


def by_run(seeds: Iterable[list[ResultRow]]) -> list[list[list[ResultRow]]]:
    """The seeds of each run together."""
    found: dict[str, list[list[ResultRow]]] = {}
    for rows in seeds:
        found.setdefault(digest(list(rows[0].run)), []).append(rows)
    return list(found.values())


def folds_of(workspace: Workspace, row: ResultRow) -> list[ResultRow]:
    """The rows of all folds of the cross-validation and seed that a row is of; the row alone where there is none.

    A row that joins all folds may stand for them. Raises ProbeError, naming them, where folds are missing.
    """
    if not row.choice.folds:
        return [row]
    own = [known for known in last_rows(workspace.probes / RESULTS).values() if _seed_of(known) == _seed_of(row)]
    (folds,) = one_of_each(own or [row])
    there = {known.fold for known in folds}
    missing = [str(fold) for fold in range(1, row.choice.folds + 1) if fold not in there]
    if missing:
        raise ProbeError(
            f"A cross-validation is inspected as a whole: without a result are the folds {', '.join(missing)} of "
            f"{row.choice.folds}.\nTrain them:  featprobe probe --split {row.split} …, as the others were."
        )
    return folds


def validation_of(rows: Sequence[ResultRow]) -> float:
    """Mean of the main score on validation over the folds of a seed; -1 where there is none."""
    values = [row.validation for row in rows]
    return sum(-1.0 if value is None else value for value in values) / len(values)


def _seed_of(row: ResultRow) -> str:
    return digest([list(row.run), row.seed])
