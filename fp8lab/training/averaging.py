"""An exponential moving average of the weights, kept beside them while they train.

Averaging over the last steps takes out noise that a constant learning rate leaves in the weights
(LAWA, 2209.14981; EMA, 2411.18704; in the place of a decay, WSM, 2507.17634), at a cost of three passes
over the weights a step. The average is validated at the end and trains nothing, so that one run gives
both losses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightAverage:
    """Averages of a list of parameters, in FP32 on their device."""

    def __init__(self, parameters: Mapping[str, Tensor], half_life_steps: float) -> None:
        """
        Args:
            parameters: by name; the tensors that the optimizer updates in place.
            half_life_steps: steps after which a value counts half.
        """
        self._parameters = [parameter.detach() for parameter in parameters.values()]
        self._share = 1 - 0.5 ** (1 / half_life_steps)
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Take in the weights as they stand after one step.

        A skipped step left them as they were, and leaves the average so too. The first steps count alike, or a
        random beginning would weigh on the averages of short runs.

        Args:
            step: number of the step, from 1.
            skipped: boolean scalar on the device.
        """
        share = torch.where(skipped, 0.0, max(self._share, 1 / step))
        averages = list(self.averages.values())
        differences = torch._foreach_sub(self._parameters, averages)
        torch._foreach_mul_(differences, share)
        torch._foreach_add_(averages, differences)
