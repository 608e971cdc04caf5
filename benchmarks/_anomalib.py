"""anomalib's PatchCore on given images and weights; run by the Python of anomalib's own environment.

    PYTHON _anomalib.py FOLDER

FOLDER holds job.json (timm's model, names of its layers, share of the coreset, seeds), weights.safetensors (with
timm's names), train.npy and test.npy ((images, 3, height, width), float32, as the backbone takes them). For each seed there
will be seed<k>.npz: maps (images, height, width), scores (images,), seconds of the fit.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from safetensors.torch import load_file

BATCH = 8


def main() -> None:
    """Fit and score once per seed."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    tensors = load_file(folder / "weights.safetensors")
    train, test = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "test"))
    for seed in job["seeds"]:
        torch.manual_seed(seed)
        np.random.seed(seed)
        model = PatchcoreModel(layers=list(job["layers"]), backbone=job["model"], pre_trained=False)
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
            bank=len(model.memory_bank),
            seconds=seconds,
        )


if __name__ == "__main__":
    main()
