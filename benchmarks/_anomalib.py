"""anomalib's PatchCore on given images and weights; run by the Python of anomalib's own environment.

    PYTHON _anomalib.py FOLDER

FOLDER holds job.json (timm's model, names of its layers, share of the coreset, seeds), weights.safetensors (with timm's
names), train.npy and test.npy ((images, 3, height, width), float32, as the backbone takes them). For each seed there
will be seed<k>.npz: maps (images, height, width), scores (images,), seconds of the fit, and what was drawn for the
coreset: projection (columns, channels), and its cells, the first of which was drawn too.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from anomalib.models.components import KCenterGreedy
from anomalib.models.image.patchcore import torch_model
from safetensors.torch import load_file

BATCH = 8


class Recorded(KCenterGreedy):
    """anomalib's own choice, of which what it drew is kept."""

    drawn: dict[str, np.ndarray]

    def select_coreset_idxs(self) -> list[int]:
        """The same indices."""
        chosen = super().select_coreset_idxs()
        Recorded.drawn = {"projection": self.model.sparse_random_matrix.numpy(), "chosen": np.array(chosen)}
        return chosen


def main() -> None:
    """Fit and score once per seed."""
    folder = Path(sys.argv[1])
    torch_model.KCenterGreedy = Recorded
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    tensors = load_file(folder / "weights.safetensors")
    train, test = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "test"))
    for seed in job["seeds"]:
        torch.manual_seed(seed)
        np.random.seed(seed)
        model = torch_model.PatchcoreModel(layers=list(job["layers"]), backbone=job["model"], pre_trained=False)
        own = model.feature_extractor.feature_extractor.state_dict()
        missing = [name for name in own if name not in tensors]
        if missing:
            sys.exit(f"The weights lack {missing[:5]} of anomalib's extractor.")
        model.feature_extractor.feature_extractor.load_state_dict({name: tensors[name] for name in own}, strict=True)
        begun = time.perf_counter()
        model.train()
        with torch.no_grad():
            for first in range(0, len(train), BATCH):
                model(torch.from_numpy(train[first : first + BATCH].copy()))
            model.subsample_embedding(job["coreset"])
            seconds = time.perf_counter() - begun
            model.eval()
            found = [model(torch.from_numpy(test[i : i + BATCH].copy())) for i in range(0, len(test), BATCH)]
        np.savez(
            folder / f"seed{seed}.npz",
            maps=torch.cat([own.anomaly_map[:, 0] for own in found]).numpy(),
            scores=torch.cat([own.pred_score for own in found]).numpy(),
            seconds=seconds,
            **Recorded.drawn,
        )


if __name__ == "__main__":
    main()
