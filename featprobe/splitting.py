"""What decides which images are trained on, chosen on and scored."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from featprobe.errors import DataError, nearest

SPLITS_BY: Mapping[str, str] = {
    "own": "its own split",
    "group": "split by group",
    "image": "split by image",
    "stratified": "split by group, stratified",
}
"""The ways to make a split without a file, and their printed names."""
PINNED = re.compile(r"(.*\.csv)(?:#([0-9a-f]+))?", re.IGNORECASE | re.DOTALL)  # a split file, perhaps with its digest


@dataclass(frozen=True)
class SplitChoice:
    """What decides which images are trained on, chosen on and scored.

    by: a name of SPLITS_BY, or a split file's path with `#` and the first digits of its digest behind, where pinned.
    folds: K of a cross-validation, 0 for a single split. fold: the one meant, 1 <= fold <= folds; 0 for all of them.
    """

    by: str
    folds: int = 0
    fold: int = 0

    @classmethod
    def parse(cls, text: str) -> "SplitChoice":
        """Read `NAME`, `NAME:K` or `NAME:K/I`, where a name may be a CSV file's; raises DataError.

        >>> SplitChoice.parse("group:5/2")
        SplitChoice(by='group', folds=5, fold=2)
        >>> SplitChoice.parse("splits/mine.csv#1a2b3c4d").file
        'splits/mine.csv'
        """
        found = re.fullmatch(r"(.+?)(?::(\d{1,4})(?:/(\d{1,4}))?)?", text, re.DOTALL)
        by, folds, fold = (found[1], int(found[2] or 0), int(found[3] or 0)) if found else (text, 0, 0)
        choice = cls(by, folds, fold)
        if fold > folds >= 2:
            raise DataError(
                f"{text!r} is not a split: there is no fold {fold} of {folds}.\n"
                f"  wanted  {by}:{folds}/1 to {by}:{folds}/{folds}, or {by}:{folds} for all of them"
            )
        counted = bool(found) and (found[2] is None or folds >= 2) and (found[3] is None or 1 <= fold <= folds)  # type: ignore[index]
        if not counted or not (choice.file or by in SPLITS_BY) or (folds and by == "own"):
            raise DataError(
                f"{text!r} is not a split. {nearest(by, SPLITS_BY)}\n"
                f"  wanted  {', '.join(SPLITS_BY)}, or a file FILE.csv (featprobe data split writes one);\n"
                "          group:K, stratified:K or image:K for a cross-validation of K >= 2 folds, group:K/I for one"
            )
        return choice

    @property
    def file(self) -> str:
        """The path of the split file; "" where there is none."""
        found = PINNED.fullmatch(self.by)
        return found[1] if found else ""

    @property
    def pinned(self) -> str:
        """First digits of the digest that the split file must have; "" where any will do."""
        found = PINNED.fullmatch(self.by)
        return (found[2] or "") if found else ""

    @property
    def whole(self) -> str:
        """The choice without its fold, as result rows keep it."""
        return f"{self.by}:{self.folds}" if self.folds else self.by

    @property
    def key(self) -> str:
        """The same for the same choice, wherever its file lies, and whatever it is called."""
        return re.sub(r".*(?=#[0-9a-f]+(:\d+)?$)", "", self.whole, flags=re.DOTALL) if self.pinned else self.whole

    def __str__(self) -> str:
        return f"{self.whole}/{self.fold}" if self.fold else self.whole

    @property
    def text(self) -> str:
        """For people.

        >>> SplitChoice.parse("group:5/2").text, SplitChoice.parse("stratified:5").text
        ('fold 2 of 5, split by group', '5 folds, split by group, stratified')
        """
        by = f"split of {self.file}" if self.file else SPLITS_BY[self.by]
        folds = f"fold {self.fold} of {self.folds}, " if self.fold else f"{self.folds} folds, " if self.folds else ""
        return folds + by
