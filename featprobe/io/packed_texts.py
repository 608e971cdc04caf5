"""Many texts in little memory: their bytes one after another, and a few bytes more for each."""

from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

AT_ONCE = 1 << 12  # places that are looked up together, where all texts are asked for


class Texts(Sequence[str]):
    """Texts, stored as UTF-8 in one piece. Each is made when it is asked for. Raises UnicodeError for bad Unicode.

    >>> texts = Texts(["a", "ü", ""])
    >>> texts[1], list(texts), texts == ("a", "ü", ""), list(texts.some([1, 1, 0]))
    ('ü', ['a', 'ü', ''], True, ['ü', 'ü', 'a'])
    """

    def __init__(self, texts: Sequence[str]) -> None:
        together = "".join(texts)
        data = together.encode()
        ascii_alone = len(data) == len(together)
        lengths = map(len, texts) if ascii_alone else (len(text.encode()) for text in texts)
        self._set(data, np.cumsum([0, *lengths], dtype=np.int64))

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """Texts as they are, or stored as such."""
        return texts if isinstance(texts, Texts) else cls(texts)

    @classmethod
    def of_bytes(cls, data: bytes, ends: NDArray[np.integer[Any]]) -> "Texts":
        """The texts between the places ends[i] and ends[i + 1] of UTF-8, which must be sound. ends: (texts + 1,)."""
        made = cls.__new__(cls)
        made._set(data, ends)
        return made

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """All texts of some one after another."""
        starts = np.cumsum([0, *(len(part._data) for part in parts)])
        ends = [part._ends[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
        made = cls.of_bytes(b"".join(part._data for part in parts), np.concatenate([*ends, starts[-1:]]))
        words = np.cumsum([0, *(len(part._ends) - 1 for part in parts)])
        if all(part._chosen is None for part in parts):
            return made
        chosen = [part._places() + word for part, word in zip(parts, words[:-1], strict=True)]
        return made.some(np.concatenate(chosen))

    def _set(self, data: bytes, ends: NDArray[np.integer[Any]]) -> None:
        self._data = data
        self._ends = ends.astype(np.uint32 if len(data) < 1 << 32 else np.int64)
        self._chosen: NDArray[np.int32] | None = None  # None for all, once each

    def some(self, places: ArrayLike) -> "Texts":
        """Texts at some places, of which the bytes are stored once. places: (n,), >= 0."""
        index = np.asarray(places, dtype=np.int32)
        made = Texts.__new__(Texts)
        made._data, made._ends = self._data, self._ends
        made._chosen = index if self._chosen is None else self._chosen[index]
        return made

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._chosen is None else len(self._chosen)

    def __repr__(self) -> str:
        return f"Texts({len(self)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.to_list()[index]
        place = range(len(self))[index]
        word = place if self._chosen is None else self._chosen[place]
        return self._data[self._ends[word] : self._ends[word + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        data = self._data
        for start in range(0, len(self), AT_ONCE):
            chosen = slice(start, start + AT_ONCE) if self._chosen is None else self._chosen[start : start + AT_ONCE]
            begins, ends = self._ends[:-1][chosen].tolist(), self._ends[1:][chosen].tolist()
            for begin, end in zip(begins, ends, strict=True):
                yield data[begin:end].decode()

    def to_list(self) -> list[str]:
        """All texts."""
        return list(self)

    def all_differ(self) -> bool:
        """Whether no text is there twice."""
        found = np.fromiter(map(hash, self), np.int64, len(self))
        ordered = np.sort(found)
        same = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        doubtful = np.flatnonzero(np.isin(found, list(same))) if same else ()
        return len({self[i] for i in doubtful}) == len(doubtful)

    @property
    def longest(self) -> int:
        """Bytes of the longest text that is stored; 0 for none."""
        return int(np.diff(self._ends).max(initial=0))

    def _places(self) -> NDArray[np.int32]:
        return np.arange(len(self), dtype=np.int32) if self._chosen is None else self._chosen
