"""Saved heads whose cards claim what their files do not hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LEVELS, recipe_of

from featprobe.errors import ProbeError
from featprobe.kinds import TASKS, kinds_of
from featprobe.probes import heads
from featprobe.probes.cards import HeadRecipe
from featprobe.probes.heads import build_head
from featprobe.probes.saved import fingerprint, load_head, save_head
from featprobe.specs import digest

EVERY = [(task, kind) for task in TASKS for kind in kinds_of(task)]


def kept(folder: Path, task: str, kind: str) -> Path:
    recipe = HeadRecipe(task, kind, ("background", "pore"), sides=(3.0, 5.0, 9.0))
    card = {
        "format": "featprobe-head", "version": 1, "head": recipe.to_json(), "fingerprint": fingerprint(recipe_of()),
    }  # fmt: skip
    save_head(folder, build_head(recipe, LEVELS), card, {})
    return folder


def claimed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a card and seal it again."""
    card = json.loads((folder / "card.json").read_text())
    del card["card_sha256"]
    change(card)
    (folder / "card.json").write_text(json.dumps({**card, "card_sha256": digest(card)}))
    return folder


@pytest.mark.parametrize(("task", "kind"), [own for own in EVERY if own[1] != "patchcore"])  # that one is empty
def test_no_memory_is_taken_for_a_head_that_its_file_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, kind: str
) -> None:
    folder = kept(tmp_path, task, kind)
    assert load_head(folder)[1]["head"]["kind"] == kind
    claimed(folder, lambda card: [level.update(channels=30_000) for level in card["fingerprint"]["levels"]])
    devices: list[torch.device] = []
    plain = heads.build_head

    def building(*words: Any) -> Any:
        devices.append(torch.empty(0).device)
        return plain(*words)

    monkeypatch.setattr(heads, "build_head", building)
    with pytest.raises(ProbeError, match=r"describes one of \d+ bytes, and head.safetensors has"):
        load_head(folder)
    assert [device.type for device in devices] == ["meta"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card["files"]["head.safetensors"].update(sha256="0" * 64), "that of head_sha256"),
        (lambda card: card["fingerprint"]["levels"][0].update(channels=1 << 20), r"levels\[0\].channels: wanted 1 to"),
        (lambda card: card["fingerprint"]["levels"][0].update(stride=0), r"levels\[0\].stride: wanted 1 to"),
        (lambda card: card["fingerprint"].update(levels=card["fingerprint"]["levels"] * 40), "wanted 1 to 64 levels"),
        (lambda card: card.update(format="x" * 100_000), 'holds "x{58}… 1. wanted: featprobe-head 1'),
    ],
    ids=["hash", "channels", "stride", "levels", "format"],
)
def test_a_card_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    folder = claimed(kept(tmp_path, *EVERY[0]), change)
    with pytest.raises(ProbeError, match=said) as raised:
        load_head(folder)
    assert len(str(raised.value)) < 1000
