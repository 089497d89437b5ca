"""timm's Muon, whose matrix products are in float32 on processors that have no instructions for bfloat16."""

from collections.abc import Callable
from functools import partial

import timm.optim
import timm.optim.muon
from torch import Tensor

from favae.precision import fast_dtype


class Muon(timm.optim.Muon):
    """timm's `Muon`, which says what the arguments are; in its published precision, bfloat16, where that is fast.

    timm has no argument for the precision of the Newton-Schulz iteration, so `step` lends its own function to timm.
    """

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        published = timm.optim.muon.zeropower_via_newtonschulz
        dtype = fast_dtype(self.param_groups[0]["params"][0].device.type)
        timm.optim.muon.zeropower_via_newtonschulz = partial(published, dtype=dtype)
        try:
            return super().step(closure)
        finally:
            timm.optim.muon.zeropower_via_newtonschulz = published
