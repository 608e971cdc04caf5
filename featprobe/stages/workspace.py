"""The workspace: the folder that holds cache/, probes/, data/ and featprobe.toml."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featprobe.backbones import ALIASES
from featprobe.backbones.catalog import check_levels, check_own, check_weights, find_backbone
from featprobe.backbones.given import spec_at_hand
from featprobe.cache import Cache
from featprobe.datasets import GENERATED, DataSet
from featprobe.datasets.names import name_of
from featprobe.errors import CacheError, DataError, DiskError, FeatprobeError, counted, nearest
from featprobe.geometry import Spacing, spacing_of
from featprobe.io.disk import is_there, listable, may_be_listed, new_folder, plain_name, read_toml
from featprobe.io.fields import Fault, message
from featprobe.io.plugins import BACKBONES, names_in
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.command_line import backbone_words
from featprobe.stages.extraction.extract_options import (
    DataEntry,
    ExtractOptions,
    check_given,
    configured,
    entry_faults,
    read_as,
)

CONFIG = "featprobe.toml"
RANDOM = "-random"  # ending of a backbone's name that means seeded random weights
AnySet = str | os.PathLike[str] | DataSet
"""A data set by its name in a workspace, by its path, or as it was read."""


@dataclass(frozen=True)
class BackboneEntry:
    """A section [backbones.NAME] of featprobe.toml: timm's name of a model, and its weights."""

    model: str
    weights: str | None = None
    random_init: bool = False
    final_norm: bool | None = None


@dataclass(frozen=True)
class Config:
    """The fields of featprobe.toml. It is used as it is, once it has no faults."""

    data: Mapping[str, DataEntry] = field(default_factory=dict)
    backbones: Mapping[str, BackboneEntry] = field(default_factory=dict)


class Workspace:
    """The folders below a workspace, and the names in its featprobe.toml.

    follow_links: whether links may lead out of every data set that is read, as a set's own `follow_links` says of it.
    """

    def __init__(self, root: str | Path = ".", follow_links: bool = False) -> None:
        self.root = Path(root)
        self.cache, self.probes, self.data = (self.root / name for name in ("cache", "probes", "data"))
        self.follow_links = follow_links
        self.config = self._read_config()

    def __repr__(self) -> str:
        named = {what: len(self.config.get(of, {})) for of, what in (("data", "data set"), ("backbones", "backbone"))}
        said = [
            counted(len(self.cache_files()), "cache"),
            *(counted(n, f"named {what}") for what, n in named.items() if n),
        ]
        return f"Workspace({str(self.root)!r}, {', '.join(said)})"

    def backbone(
        self, name: str, weights: str | None = None, random_init: bool = False, final_norm: bool | None = None
    ) -> BackboneSpec:
        """The backbone that a name and options mean; raises BackboneError."""
        if given := spec_at_hand(name):
            return given
        table = self.config.get("backbones", {})
        arguments = backbone_words(name, weights, random_init, final_norm)
        if name in table:
            spec = replace(find_backbone(table[name]["model"]), label=name)
            weights = weights or self._path(table[name].get("weights"))
            random_init |= bool(table[name].get("random_init", False))
            final_norm = table[name].get("final_norm") if final_norm is None else final_norm
        else:
            spec = find_backbone(name)
        if weights is not None:
            label = spec.label if name in table else f"{spec.label}-{Path(weights).stem}"
            spec = replace(spec, label=label, source="file", weights=weights)
        elif random_init:
            spec = replace(spec, label=f"{spec.label}-random", source="random")
        spec = replace(spec, final_norm=final_norm, arguments=arguments)
        check_own(spec)
        return spec

    def backbone_names(self) -> list[str]:
        """Short names that can be asked for here."""
        return list(dict.fromkeys([*ALIASES, *names_in(BACKBONES), *self.config.get("backbones", {})]))

    def data_set(
        self,
        name: str,
        format_name: str | None = None,
        group_from: str | None = None,
        split_file: str | None = None,
        complete: bool = True,
        images: str | None = None,
        masks: str | None = None,
    ) -> DataSet:
        """A data set by its name in featprobe.toml, by a built-in set's name, or by a path.

        Its format is the one named here, else the one that featprobe.toml names, else found by looking; likewise the
        patterns of images, masks and groups, and the file that gives splits, see `read_data`. A built-in set is
        generated into data/ when it is first asked for. complete=False leaves the splits as they are. Raises DataError.
        """
        from featprobe.datasets import read_data  # the formats take time, and a misspelt name needs none of them

        own = self.data_options(name)
        given = {"format": format_name, "images": images, "masks": masks}
        how = read_as(given | {"group_from": group_from, "split_file": split_file}, own)
        pinned = Path(how["split_file"]) if how["split_file"] else None
        called, root = self.data_root(name)
        patterns = how["images"], how["masks"]
        return read_data(
            called, root, how["format"], how["group_from"], pinned, complete, own.get("classes"), *patterns,
            self.follow_links or own.get("follow_links", False), own.get("good"),
        )  # fmt: skip

    def data_called(self, data: AnySet) -> str:
        """The name or path by which commands here know a data set. Raises DataError for what is none."""
        if not isinstance(data, str | os.PathLike | DataSet):
            raise DataError(
                f"A {type(data).__name__} is no data set. Nothing was computed.\n"
                "  wanted  a name, a path, or a DataSet\n"
                "Images that are in memory become one with DataSet.from_arrays(folder, images, …)."
            )
        return self.data_argument(data.name, data.root) if isinstance(data, DataSet) else os.fspath(data)

    def sets_called(self, data: AnySet | Sequence[AnySet]) -> tuple[str, ...]:
        """The same of several data sets, or of one."""
        each = (data,) if isinstance(data, str | os.PathLike | DataSet) or not isinstance(data, Iterable) else data
        return tuple(map(self.data_called, each))

    def data_root(self, name: str) -> tuple[str, Path]:
        """The name and the folder of a data set; a built-in set is generated. Raises DataError."""
        table = self.config.get("data", {})
        if name in table:
            return name, Path(self._path(table[name]["path"]) or "")
        if name in GENERATED:
            return name, self.generated(name)
        self.check_set(name)
        return name_of(Path(name)), Path(name)

    def check_set(self, name: str) -> None:
        """Raise DataError where no data set has this name, and nothing lies at this path. None is generated."""
        if name in self.data_names() or os.path.exists(name):
            return
        raise DataError(_absent(name, self.data_names(), self.root / CONFIG))

    def check_reading(self, name: str, how: Mapping[str, Any]) -> None:
        """Raise DataError for a set that does not exist, or for options of how it is read, by name, that can't be."""
        self.check_set(name)
        check_given(how)
        if any(words := [how.get(key) for key in ("format", "group_from", "images", "masks")]):
            from featprobe.datasets.formats import check_reading

            check_reading(*words)

    def check_extraction(self, spec: BackboneSpec, name: str, options: ExtractOptions) -> None:
        """Raise FeatprobeError for an extraction that can't be, as far as this is known without images and network."""
        self.check_reading(name, vars(options))
        check_levels(spec, options.levels)
        if spec.source == "file":
            check_weights(Path(str(spec.weights)))
        configured(options, self.data_options(name)).check()

    def data_names(self) -> list[str]:
        """Names of data sets that can be asked for here."""
        return [*GENERATED, *self.config.get("data", {})]

    def data_options(self, name: str) -> Mapping[str, Any]:
        """The options that featprobe.toml gives a data set, without its path; its split file as seen from here."""
        own = {k: v for k, v in self.config.get("data", {}).get(name, {}).items() if k != "path"}
        return own | ({"split_file": self._path(own["split_file"])} if "split_file" in own else {})

    def generated(self, name: str) -> Path:
        """The folder of a built-in set, made whole or not at all when it is not there yet."""
        return make_generated(name, self.data / name)

    def cache_folder(self, name: str, root: Path) -> Path:
        """cache/<data>: a set's name and 6 hex digits of who it is."""
        own = os.fsencode(self.data_argument(name, root))  # a path may be no text
        return self.cache / f"{name}-{hashlib.sha256(own).hexdigest()[:6]}"

    def data_argument(self, name: str, root: Path) -> str:
        """The argument that names this data set on the command line: its name if it has one here, else its path."""
        known = name in self.config.get("data", {}) or root == self.data / name
        return name if known else str(root.resolve())

    def cache_files(self) -> list[Path]:
        """Every cache file here, and each folder that may not be read, in place of its own: opening it says so.

        Sorted. Raises FeatprobeError where their folder may not be read."""
        return _caches_below(listable(self.cache))

    def find_caches(self, text: str) -> list[Path]:
        """The caches that a path, a data set's name or a part of a file's name means; raises CacheError.

        A name without a folder means the caches here, also where a file in the current folder is called so.
        """
        files = self.cache_files()
        found = [path for path in files if text.strip("./") and text in f"{path.parent.name}/{path.name}"]
        is_file = os.path.lexists(text) and not Path(text).is_dir()
        if is_file and (Path(text).name != text or not found or self.holds(Path(text))):
            return [Path(text)]
        if not found:
            known = [f"{path.parent.name}/{path.name}" for path in files]
            hint = nearest(text, known) if known else "There is none yet."
            raise CacheError(f"No cache in {self.cache} is called {text!r}. {hint}".rstrip())
        return found

    def holds(self, path: Path) -> bool:
        """Whether a path, as it is written, is that of a cache file here."""
        return os.path.abspath(path) in map(os.path.abspath, self.cache_files())

    def _path(self, text: str | None) -> str | None:
        """A path of featprobe.toml, which is relative to that file."""
        return None if text is None else str(self.root / Path(text).expanduser())

    def _read_config(self) -> dict[str, Any]:
        path = self.root / CONFIG
        try:
            if not is_there(path):
                return {}
            config = read_toml(path)
        except (OSError, ValueError) as error:
            raise FeatprobeError(f"{path} can't be read as TOML: {getattr(error, 'strerror', '') or error}.") from error
        from featprobe.io.schemas import check  # pydantic takes time, and most workspaces have no such file

        faults = check(Config, config)
        places = [
            (section, name) for section in config if isinstance(config[section], dict) for name in config[section]
        ]
        wanted = "it can't be the name of a folder. wanted: one without / and \\ and control characters, not .."
        faults += [Fault(place, wanted) for place in places if not plain_name(place[1])]
        sections = config.get("data")
        for name, entry in sections.items() if isinstance(sections, dict) else ():
            bad = {fault.place[2] for fault in faults if fault.place[:2] == ("data", name) and len(fault.place) > 2}
            if isinstance(entry, dict):
                own = {key: value for key, value in entry.items() if key not in bad}
                faults += [fault.below("data", name) for fault in entry_faults(own, entry)]
        if faults:
            to_do = "Correct it, then run the same command again."
            raise FeatprobeError(message(f"{path} can't be used. Nothing was computed.", faults, to_do))
        return config


def _caches_below(folder: Path) -> list[Path]:
    """See Workspace.cache_files."""
    return sorted([*folder.glob("*/*.h5"), *(own for own in folder.glob("*/") if not may_be_listed(own))])


def backbone_of(workspace: Workspace, name: str) -> BackboneSpec:
    """The backbone of a name; with the ending -random, where no backbone has that name, its seeded random weights."""
    if name.endswith(RANDOM) and name not in workspace.backbone_names():
        return workspace.backbone(name.removesuffix(RANDOM), random_init=True)
    return workspace.backbone(name)


def pixel_size_of(workspace: Workspace, name: str, root: Path) -> Spacing | None:
    """Millimetres per pixel, down and across, that featprobe.toml states of a data set; None where it does not.

    The set is the one that has this root there, by whatever name; else the one of this name.
    """
    sets = workspace.data_names()[len(GENERATED) :]
    at_root = [own for own in sets if workspace.data_root(own)[1].resolve() == root.resolve()]
    stated = workspace.data_options(next(iter(at_root), name)).get("pixel_size")
    return None if stated is None else spacing_of(stated)


def caches_of(workspace: Workspace, caches: Sequence[Cache], name: str) -> list[Cache]:
    """The caches of the data set at a path, or else of the set with that name."""
    folder = workspace.cache_folder(name_of(Path(name)), Path(name)).name
    at_path = [cache for cache in caches if cache.path.parent.name == folder]
    return at_path or [cache for cache in caches if cache.data.name == name]


def make_generated(
    name: str, folder: Path, *, images: int = 240, size: tuple[int, int] = (256, 256), seed: int = 0
) -> Path:
    """Generate a built-in set into a folder, whole or not at all; what is there already stays.

    Raises DataError when the folder holds something else, DiskError when it can't be written.
    """
    if (folder / "annotations").is_dir():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and not a generated set. Nothing was changed. Choose another folder.")
    from featprobe.datasets.generated import generate  # scipy takes time, and most commands generate nothing

    try:
        with new_folder(folder) as temporary:
            generate(name, temporary, images=images, size=size, seed=seed)
    except DiskError:
        if not (folder / "annotations").is_dir():  # else another process was faster
            raise
    return folder


def _absent(name: str, known: Sequence[str], config: Path) -> str:
    """The error text for a data set that is neither known nor a path that leads to something."""
    if os.sep in name:
        there = next((own for own in Path(name).parents if os.path.exists(own)), None)
        found = f"\n  found   {there.resolve()}, and nothing of the rest" if there else ""
        said = f"There is no data set {name!r}: nothing lies at this path. Nothing was read."
        return f"{said}\n  wanted  the path of a folder of images and labels{found}"
    return (
        f"There is no data set {name!r}. {nearest(name, known)}\n"
        f"  wanted  {', '.join(GENERATED)}, a name in {config}, or the path of a folder\n"
        "List them:  featprobe data"
    )
