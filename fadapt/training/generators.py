"""Generators: torch's global generators, which dropout and a DataLoader's order come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..seeds import generator
from .checkpoint import expect, expect_like


class Generators:
    """torch's global generators of the CPU and of one device.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None

    def seed(self, seed: int) -> None:
        """Seeds them; call it inside :func:`torch.random.fork_rng`."""
        torch.default_generator.manual_seed(seed)
        if self.device is not None:
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:
        """Their states."""
        states = {"cpu": torch.get_rng_state()}
        if self.device is not None:
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Sets them to states that :meth:`state_dict` returned, of those that are here."""
        own = self.state_dict()
        expect(
            {"cpu"} <= states.keys() <= {"cpu", "cuda"}, f"there are generators {sorted(states)}"
        )
        for kind in own.keys() & states.keys():
            expect_like(states[kind], own[kind], f"the generator of {kind}")
        torch.set_rng_state(states["cpu"])
        if self.device is not None and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


def pass_seed(seed: int, step: int, rank: int) -> int:
    """A seed for what one process draws in one step."""
    return generator("pass", seed, step, rank).initial_seed()
