"""The public names: a chosen list, each documented, none of them loaded before it is asked for."""

import importlib
import subprocess
import sys

import pytest

import featprobe

CHOSEN = {
    "__version__",
    "BackboneSpec",
    "Cache",
    "DataSet",
    "ExtractOptions",
    "FeatprobeError",
    "FeatureLevel",
    "Features",
    "HeadKind",
    "HeadRecipe",
    "OwnBackbone",
    "Predictor",
    "ProbeOptions",
    "TrainRecipe",
    "Tuning",
    "Wanted",
    "Workspace",
    "build_head",
    "check_head",
    "compare",
    "export",
    "extract",
    "finetune",
    "inspect",
    "load_head",
    "open_cache",
    "predict",
    "probe",
    "register_head",
    "results",
    "run_study",
}


def test_the_public_names_are_the_chosen_ones() -> None:
    assert set(featprobe.__all__) == CHOSEN == set(dir(featprobe))
    assert len(featprobe.__all__) == len(CHOSEN)


@pytest.mark.parametrize("name", sorted(CHOSEN - {"__version__"}))
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(featprobe, name)
    assert value.__name__ == name
    assert value.__module__.startswith("featprobe.")
    assert not value.__doc__.startswith(f"{name}("), "a dataclass without a docstring gets its signature as one"
    assert len(value.__doc__.split()) >= 5


def test_what_another_program_may_catch_is_one_tree() -> None:
    errors = importlib.import_module("featprobe.errors")
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(value, featprobe.FeatprobeError) and value.__name__ in errors.__doc__ for value in classes)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="finetune_everything"):
        featprobe.finetune_everything  # noqa: B018


def test_importing_the_package_or_its_command_line_does_not_import_torch() -> None:
    heavy = {"torch", "timm", "h5py", "numpy", "pandas", "PIL"}
    code = f"import sys, featprobe, featprobe.cli; print(featprobe.__version__, sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [featprobe.__version__, "[]"]
