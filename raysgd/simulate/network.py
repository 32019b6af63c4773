"""A network that loses, repeats and reorders what it carries, as a seed says."""

from __future__ import annotations

import random
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from raysgd.simulate.problem import Faults, Outcome


@dataclass(frozen=True, slots=True)
class Delivery:
    serial: int
    #: whom it concerns: a seat, or the shard that is told another's norms
    address: int
    content: Any


class Network:
    """What is on its way. local: kinds of content that need no network and so cannot be lost"""

    def __init__(self, faults: Faults, outcome: Outcome, chance: random.Random, local: tuple[type[Any], ...]) -> None:
        self.faults, self.outcome, self.random, self.local = faults, outcome, chance, local
        #: by serial number
        self.flight: list[Delivery] = []
        self._serial = 0
        self._order = sha256()

    def send(self, address: int, content: Any) -> None:
        self.flight.append(Delivery(self._serial, address, content))
        self._serial += 1

    def next(self) -> Delivery | None:
        """What arrives next; None where it was lost."""
        at = 0 if self.faults.in_order else int(self.random.random() * len(self.flight))
        delivery = self.flight.pop(at)
        self.outcome.reordered += at > 0
        if not isinstance(delivery.content, self.local):
            if self.random.random() < self.faults.lose:
                self.outcome.lost += 1
                return None
            if self.random.random() < self.faults.duplicate:
                self.outcome.duplicated += 1
                self.send(delivery.address, delivery.content)
        self.outcome.delivered += 1
        self._order.update(_name(delivery).encode())
        return delivery

    def order(self) -> str:
        """A digest of what arrived, in its order."""
        return self._order.hexdigest()


def _name(delivery: Delivery) -> str:
    content = delivery.content
    step = content.step if hasattr(content, "step") else content.version
    return f"{delivery.address} {type(content).__name__} {getattr(content, 'shard', '')} {step};"
