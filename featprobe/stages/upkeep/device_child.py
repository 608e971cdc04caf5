"""What torch finds on this machine, as one line of JSON:  python -P device_child.py

It runs in a process of its own, so that a broken torch breaks nothing else.
"""

import json


def found() -> dict[str, object]:
    """Facts about torch and its devices, for people."""
    import torch

    facts: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.version.cuda:
        facts["built for CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            own = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            facts[f"cuda:{index}"] = (
                f"{own.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, compute {own.major}.{own.minor}"
            )
    elif torch.backends.mps.is_available():
        facts["mps"] = "Apple's GPU"
    facts["computes on"] = "cuda" if torch.cuda.is_available() else "mps" if "mps" in facts else "cpu"
    return facts


if __name__ == "__main__":
    print(json.dumps(found()))
