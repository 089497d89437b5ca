"""Schedulers that integrate a flow, diffusers' and one that adds noise on the way, and what they are called here."""

from typing import Literal

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Solver = Literal["euler", "heun", "dpm++", "sde"]
ROUNDING = 1e-5  # of times, which are float32


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler-Maruyama on the reverse SDE of a flow, whose samples have the distribution of the flow's.

    With s the share of noise, dx = (v - n / 2) dt + sqrt(s dt) N(0, 1), where v is the velocity and n the noise in x as
    the model sees it; the last step goes straight to the data. Errors of earlier steps are forgotten, for which it
    needs more steps than Euler.

    Source: Ma et al., ECCV 2024 (SiT, arXiv 2401.08740), with the diffusion w_t = s.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """As its base's `step`: `model_output` points from data to noise. `generator`: one, or one per sample. What
        begins with "s_" and `per_token_timesteps` have no effect, as the former have none there."""
        if self.step_index is None:
            self._init_step_index(timestep)
        noise_level, following = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        length = noise_level - following
        sample, velocity = sample.float(), model_output.float()  # half precision would round within the step
        previous = sample - length * velocity
        if following > 0:
            noise = sample + (1 - noise_level) * velocity
            fresh = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            previous = previous - length / 2 * noise + (noise_level * length).sqrt() * fresh
        previous = previous.to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous) if return_dict else (previous,)


def flow_scheduler(solver: Solver, shift: float = 1.0) -> SchedulerMixin:
    """A scheduler for `LightningDiTPipeline`.

    Args:
        solver: "euler"; "heun", of second order, which evaluates the transformer twice in all steps but the last;
            "dpm++", DPM-Solver++ of second order, which evaluates it once; "sde", see `FlowMatchSDEScheduler`.
        shift: of the time steps, towards noise if above 1; LightningDiT's timestep shift s is 1 / s here.
    Source: Karras et al., NeurIPS 2022 (Heun); Lu et al. (arXiv 2211.01095).
    """
    if solver == "heun":
        return FlowMatchHeunDiscreteScheduler(shift=shift)
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
        )
    return (FlowMatchSDEScheduler if solver == "sde" else FlowMatchEulerDiscreteScheduler)(shift=shift)


def check_scheduler(scheduler: SchedulerMixin, prediction_type: str) -> None:
    """Raises ValueError for a scheduler of other predictions, or one of flows that, as it is set, does not go from
    noise at 1 to data at 0."""
    sigmas, name = getattr(scheduler, "sigmas", None), type(scheduler).__name__
    fits = scheduler.config.get("prediction_type", "flow_prediction") == prediction_type
    if prediction_type != "flow_prediction":
        if not fits:
            raise ValueError(f"this {name} takes no {prediction_type}, which the transformer predicts")
    elif not fits or sigmas is None or float(sigmas.max()) > 1 + ROUNDING or float(sigmas[-1]) > ROUNDING:
        raise ValueError(
            f"this {name} is not set to integrate a flow; favae.pipelines.solvers.flow_scheduler makes some that are, "
            'and others of diffusers take use_flow_sigmas=True, prediction_type="flow_prediction"'
        )


def shift_of(scheduler: SchedulerMixin) -> float | None:
    """The shift of the time steps; None for a scheduler that has none, or one that follows the image's size."""
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return None
    return config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
