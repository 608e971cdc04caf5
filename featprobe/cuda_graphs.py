"""Work of a CUDA device that is recorded once, as a CUDA graph, and then replayed by a single call."""

import os
from collections.abc import Callable

import torch


def recorded(device: torch.device) -> bool:
    """Whether work of fixed shapes is recorded on a device: training steps, and a backbone's pass over a block.

    With FEATPROBE_RECORD=0 nothing is recorded: the results are the same, but it takes longer.
    """
    return device.type == "cuda" and os.environ.get("FEATPROBE_RECORD") != "0"


def record(call: Callable[[], object], device: torch.device, stream: "torch.cuda.Stream") -> "torch.cuda.CUDAGraph":
    """Record what a call has a CUDA device do, without doing it. stream: on which it was warmed up.

    Raises torch.OutOfMemoryError, and RuntimeError where the call does what can't be recorded, such as waiting for the
    device: the error is what ended the call, not what then ended the recording.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:  # thread_local: threads that read ahead may ask for memory meanwhile
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # a recording that fails at its end leaves its own behind
        first = error if error.__context__ is None else error.__context__
        if isinstance(error, torch.OutOfMemoryError) or isinstance(first, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(first)) from error
        raise RuntimeError(str(first)) from error
    return graph
