"""The state of the random numbers that dropout draws, which goes to the host with lent adapters and comes back."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from atoll.errors import ProtocolError


def generator_state(device: torch.device) -> bytes:
    """The state of the generator from which layers on this device draw."""
    return _state(device).numpy().tobytes()


def set_generator_state(device: torch.device, state: bytes) -> None:
    """Go on from a state that came over the network.

    Raises: ProtocolError for what is no state.
    """
    _set_state(device, torch.frombuffer(bytearray(state), dtype=torch.uint8))


class Draws:
    """Inside a `with`, the process's generator is in this state, and afterwards as it was; `swap` lets others use theirs in between.

    A state of another kind of processor is taken for a seed, and stays as it was: what is dropped is then not what would be dropped there.
    """

    def __init__(self, device: torch.device, state: bytes) -> None:
        self._device, self._given = device, state
        self._fits = len(state) == len(_state(device))
        self._other = torch.frombuffer(bytearray(state), dtype=torch.uint8) if self._fits else _seeded(device, state)

    @property
    def state(self) -> bytes:
        """Where the device goes on, after what was drawn here."""
        return self._other.numpy().tobytes() if self._fits else self._given

    def swap(self) -> None:
        """Exchange the process's state for the other.

        Raises: ProtocolError for what is no state.
        """
        other = _state(self._device)
        _set_state(self._device, self._other)
        self._other = other

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_: object) -> None:
        self.swap()


def _seeded(device: torch.device, state: bytes) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(state).digest()[:8], "big") >> 1
    return torch.Generator(device).manual_seed(seed).get_state()


def _state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    try:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
    except (RuntimeError, TypeError):
        raise ProtocolError(
            "the state of a random generator that is none", got=f"{len(state)} bytes", expected="the state that the other side had",
            do="use the same version of torch on both sides",
        ) from None  # fmt: skip
