"""The states of the random number generators of devices: taken at one point, and gone back to later."""

from __future__ import annotations

import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Returns the random states of the CPU and of a device, for `set_random_states`."""
    states = {'cpu': torch.get_rng_state()}
    if device.type != 'cpu':
        states[device.type] = torch.get_device_module(device).get_rng_state(*_number(device))
    return states


def set_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    """Goes back to the random states that `random_states` returned.

    Args:
        device: the device. If the states are those of another kind of device, only that of the CPU is set.
        states: what `random_states` returned.
    """
    torch.set_rng_state(states['cpu'])
    if device.type in states and device.type != 'cpu':
        torch.get_device_module(device).set_rng_state(states[device.type], *_number(device))


def _number(device: torch.device) -> list[torch.device]:
    return [] if device.type == 'mps' else [device]  # of the kind mps there is one device, which has no number
