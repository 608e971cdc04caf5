"""torch's AdamW, without torch's compiler."""

from inspect import unwrap
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch's AdamW: the same values, hooks and states.

    torch wraps some methods of its optimizers so that its compiler leaves them alone. The first call of one loads the
    compiler, which takes most of the time that torch itself takes to load. featprobe compiles no optimizer, so here the
    methods are the ones inside.
    """

    add_param_group: Any = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad: Any = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict: Any = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict: Any = unwrap(torch.optim.Optimizer.load_state_dict)
    step: Any = torch.no_grad()(unwrap(torch.optim.AdamW.step))
