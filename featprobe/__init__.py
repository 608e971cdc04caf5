"""Frozen-feature probing of vision backbones on inspection images, from a feature cache.

The public names are loaded when they are first asked for, so that importing the package is quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BackboneSpec": "featprobe.specs",
    "Cache": "featprobe.cache",
    "DataSet": "featprobe.datasets",
    "ExtractOptions": "featprobe.stages.extraction.extract_options",
    "FeatprobeError": "featprobe.errors",
    "FeatureLevel": "featprobe.levels",
    "Features": "featprobe.features",
    "HeadKind": "featprobe.kinds",
    "HeadRecipe": "featprobe.probes",
    "OwnBackbone": "featprobe.backbones.adapted",
    "Predictor": "featprobe.stages.predictor",
    "ProbeOptions": "featprobe.stages.training.probe_options",
    "TrainRecipe": "featprobe.kinds",
    "Tuning": "featprobe.stages.training.probe_options",
    "Wanted": "featprobe.metrics.defects.operating",
    "Workspace": "featprobe.stages.workspace",
    "build_head": "featprobe.probes",
    "check_head": "featprobe.probes.contract",
    "compare": "featprobe.stages.comparison.compare",
    "export": "featprobe.stages.export.export",
    "extract": "featprobe.stages.extraction.extract",
    "finetune": "featprobe.stages.training.finetune",
    "inspect": "featprobe.stages.inspection.inspect",
    "load_head": "featprobe.probes",
    "open_cache": "featprobe.cache",
    "predict": "featprobe.stages.predict",
    "probe": "featprobe.stages.training.probe",
    "register_head": "featprobe.kinds",
    "results": "featprobe.stages.result_frame",
    "run_study": "featprobe.stages.study.run_study",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'featprobe' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
