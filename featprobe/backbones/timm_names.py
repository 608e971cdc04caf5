"""timm's own names, read from the source files of the installed timm: importing it takes seconds."""

import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_MARK = "\n@register_model"
_MODEL = re.compile(r"\n@register_model\b[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(")
_TAGGED = re.compile(r"""\n +["'](\w+\.[\w.-]+)["']:""")
_FORMER = re.compile(r"register_model_deprecations\(\s*__name__,\s*\{(.*?)\}", re.DOTALL)
_KEY = re.compile(r"""["'](\w+)["']\s*:""")


class TimmNames:
    """Names of timm: of models, of their weights, as convnext_tiny.fb_in1k, and former ones, which still mean a model.

    A tag of weights is looked at where some of its model are known; else timm judges it once it is loaded.
    """

    def __init__(self, models: Iterable[str], weights: Iterable[str], former: Iterable[str]) -> None:
        self.models, self.former = frozenset(models), frozenset(former)
        self.weights = frozenset(name for name in weights if name != _model_of(name) in self.models)
        self.tagged = frozenset(map(_model_of, self.weights))

    def __contains__(self, name: str) -> bool:
        if name in self.weights or name in self.former:
            return True
        model = _model_of(name)
        return model in self.models and (name == model or model not in self.tagged)

    def __iter__(self) -> Iterator[str]:
        yield from self.models
        yield from self.weights


def _model_of(name: str) -> str:
    return name.partition(".")[0]


def timm_names() -> TimmNames:
    """The names of the timm that is installed: as its files say, read as text in a twentieth of a second.

    timm itself is asked where it is imported already, since others may have added models to it, and where its files do
    not look as expected.
    """
    known = None if "timm" in sys.modules else _read()
    if known is None:
        from timm.models import _registry  # timm.list_models sorts, in seven times the time

        models = _registry._model_entrypoints.keys() - _registry._deprecated_models.keys()
        weights = (name for model in models for name in _registry._model_with_tags.get(model, ()))
        known = TimmNames(models, weights, _registry._deprecated_models)
    return known


def timm_folder() -> Path | None:
    """The folder of the timm that is installed; None where there is none, or more than one."""
    spec = find_spec("timm")
    folders = (spec and spec.submodule_search_locations) or ()
    return Path(folders[0]) if len(folders) == 1 else None


@cache
def _read() -> TimmNames | None:
    folder = timm_folder()
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("models/*.py")] if folder else []
    models = [name for text in texts for name in _MODEL.findall(text)]
    if not models or len(models) != sum(text.count(_MARK) for text in texts):
        return None
    weights = [name for text in texts for name in _TAGGED.findall(text)]
    former = [name for text in texts for block in _FORMER.findall(text) for name in _KEY.findall(block)]
    return TimmNames(models, weights, former)
