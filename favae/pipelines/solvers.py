"""diffusers' schedulers that integrate a flow: which there are, and what they are called here."""

from typing import Literal

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)

Solver = Literal["euler", "heun", "dpm++"]


def flow_scheduler(solver: Solver, shift: float = 1.0) -> SchedulerMixin:
    """A scheduler for `LightningDiTPipeline`.

    Args:
        solver: "euler"; "heun", of second order, which evaluates the transformer twice in all steps but the last;
            "dpm++", DPM-Solver++ of second order, which evaluates it once.
        shift: of the time steps, towards noise if above 1; LightningDiT's timestep shift s is 1 / s here.
    Source: Karras et al., NeurIPS 2022 (Heun); Lu et al. (arXiv 2211.01095).
    """
    if solver == "heun":
        return FlowMatchHeunDiscreteScheduler(shift=shift)
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
        )
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def shift_of(scheduler: SchedulerMixin) -> float | None:
    """The shift of the time steps; None for a scheduler that has none."""
    config = scheduler.config
    return config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
