"""Who is hung, and who is only busy or slow to answer: calls that are answered when the test says so."""

from __future__ import annotations

import pytest

from raysgd.runtime import pulse
from raysgd.runtime.pulse import Pulse


class Actor:
    """Answers or not, and uses CPU time or not; its clock goes a quarter of a second a look."""

    def __init__(self) -> None:
        self.answers, self.ticks, self.now = True, 0, 100.0
        self.asked: list[float] = []
        self.pulse = Pulse()

    def look(self, seconds: float, ticks_a_look: int = 0, every: float = 0.25) -> bool:
        """Whether it is found hung in these seconds."""
        for _ in range(round(seconds / every)):
            self.now += every
            self.ticks += ticks_a_look
            if self.pulse.look(lambda: self, lambda: self.ticks):
                return True
        return False


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Actor:
    class Clock:
        @staticmethod
        def monotonic() -> float:
            return found[0].now if found else 100.0

    class Calls:
        @staticmethod
        def wait(refs: list[Actor], timeout: float) -> tuple[list[Actor], list[Actor]]:
            assert timeout == 0
            return (refs, []) if refs[0].answers else ([], refs)

        @staticmethod
        def get(_ref: Actor) -> None:
            return None

    found: list[Actor] = []
    monkeypatch.setattr(pulse, "time", Clock)
    monkeypatch.setattr(pulse, "ray", Calls)
    found.append(Actor())
    return found[0]


def test_who_answers_is_alive(actor: Actor) -> None:
    assert not actor.look(60)


def test_who_neither_answers_nor_computes_is_hung_after_three_seconds(actor: Actor) -> None:
    actor.look(1)
    actor.answers = False
    assert not actor.look(2.75)
    assert actor.look(1)


def test_who_computes_without_answering_is_busy(actor: Actor) -> None:
    """A numpy call that holds the interpreter's lock for a minute."""
    actor.look(1)
    actor.answers = False
    assert not actor.look(60, ticks_a_look=1)
    assert actor.look(5)  # and then it hangs


def test_a_stop_of_two_seconds_is_no_hang(actor: Actor) -> None:
    actor.look(1)
    for _ in range(10):
        actor.answers = False
        assert not actor.look(2)
        actor.answers = True
        assert not actor.look(1)


def test_who_was_stopped_himself_has_heard_nobody(actor: Actor) -> None:
    """The driver of a laptop that slept an hour: only the looks since count."""
    actor.look(1)
    actor.answers = False
    assert not actor.look(4 * 3600, every=3600)
