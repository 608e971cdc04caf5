"""What a bug report gets: also from a broken installation, and never the user's home, name or secrets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import filled_cache

from featprobe.stages.upkeep import doctor
from featprobe.stages.upkeep.doctor import as_json, examine, private

ROOT = Path(__file__).parents[3]


def run(workspace: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`featprobe doctor` in a process of its own."""
    paths = environment.pop("PYTHONPATH", "")
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [paths, str(ROOT)])), **environment}
    command = [sys.executable, "-m", "featprobe", "--workspace", str(workspace), "doctor", "--offline", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=settings)


def test_a_broken_torch_is_said_and_the_rest_is_reported(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')\n")
    home = tmp_path / "home"
    home.mkdir()
    result = run(
        home / "space", "--json", PYTHONPATH=str(tmp_path / "broken"), HOME=str(home), HF_TOKEN="hf_very_secret",
        HTTPS_PROXY="http://me:word@proxy", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    found = json.loads(result.stdout)
    assert found["unusable"] == ["device: torch"]
    assert "libtorch_cpu.so: cannot open" in found["device"]["torch"]
    assert found["versions"]["h5py"] and found["disk"]["locks"] == "works" and found["disk"]["free"]
    assert found["disk"]["folder"] == "~/space (not there yet)"
    assert found["environment"]["HF_TOKEN"] == found["environment"]["HTTPS_PROXY"] == "set"
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    assert str(home) not in result.stdout and "secret" not in result.stdout and "word" not in result.stdout
    assert not (home / "space").exists(), "it makes no folder"


def test_a_workspace_is_counted_and_its_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_device", lambda: iter(()))
    filled_cache(tmp_path / "cache" / "parts-000000" / "some-00000000.h5")
    (tmp_path / "cache" / "parts-000000" / "other-00000000.h5").write_bytes(b"no cache")
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "results.jsonl").write_bytes(b"[]\n")
    found = as_json(examine(tmp_path, offline=True))
    assert found["unusable"] == []
    space = found["workspace"]
    assert isinstance(space, dict)
    assert space["caches"].startswith("2, ") and "1 can't be opened" in space["caches"]
    assert space["results"] == "0 rows; 1 line without a row: see `featprobe compare`"
    (tmp_path / "featprobe.toml").write_text("[data.x]\nsize = 3\n")
    facts = examine(tmp_path, offline=True)
    assert [fact.name for fact in facts if fact.unusable] == ["featprobe.toml"]
    assert any("wanted a text, found 3" in fact.value for fact in facts)


@pytest.mark.parametrize(
    "written", ["[data.ours]\nsize = 3\n", '[data."ours"]\nx = 1\n', "[data.ours]\n[data.ours]\n", "[data.ours]\nx ="]
)
def test_a_faulty_featprobe_toml_does_not_give_away_the_names_of_data_sets(written: str, tmp_path: Path) -> None:
    (tmp_path / "featprobe.toml").write_text(written)
    faulty = next(fact for fact in doctor._workspace(tmp_path) if fact.unusable)
    assert "UNUSABLE" in faulty.value and "ours" not in faulty.value


@pytest.mark.parametrize("address", ["http://[", "http://no host", "no address", "//"])
def test_an_address_of_the_hub_that_is_none_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert [fact.value for fact in doctor._hub(offline=False)][1].startswith("no: ")


def test_a_login_in_the_address_of_the_hub_is_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://jane:word@hub.example/x")
    shown = [private(fact.value) for fact in doctor._environment() if fact.name == "HF_ENDPOINT"]
    assert shown == ["https://hub.example/x"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs a user who can become another one")
def test_a_workspace_that_may_not_be_read_ends_no_report(tmp_path: Path) -> None:
    (tmp_path / "space").mkdir(mode=0o700)
    code = (
        "import os, pathlib, sys; from featprobe.stages.upkeep import doctor; os.setuid(65534); root = pathlib.Path("
        "sys.argv[1]); print(*(f.value for own in (doctor._disk, doctor._workspace) for f in own(root)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "space" / "inner")]
    told = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert told.returncode == 0 and "not there yet" in told.stdout, told.stderr


def test_a_hub_that_does_not_answer_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert [fact.value for fact in doctor._hub(offline=False)][1].startswith("no: ")
    monkeypatch.setattr(doctor, "_asked", lambda address: __import__("time").sleep(30))
    monkeypatch.setattr(doctor, "HUB_SECONDS", -0.9)
    assert [fact.value for fact in doctor._hub(offline=False)][1].startswith("no answer")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jane", "~"),
        ("/home/janet/x", "/home/janet/x"),
        ("a=/home/jane/a:/home/jane/b", "a=~/a:~/b"),
        ("/scratch/jane.d and /scratch/jane", "/scratch/USER.d and /scratch/USER"),
    ],
)
def test_homes_and_names_are_shortened(text: str, shown: str) -> None:
    assert private(text, "/home/jane", "jane") == shown
