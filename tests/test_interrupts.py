"""Ctrl-C and SIGTERM: which exit code, when they are heard, and that what handled them before does so again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from raysgd.errors import Interrupted
from raysgd.interrupts import heard_at_last, held_off, sigterm_interrupts, undisturbed


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_either_ends_the_block(number: signal.Signals, code: int) -> None:
    done = []

    @sigterm_interrupts()
    def block() -> None:
        signal.raise_signal(number)
        done.append("after")

    with pytest.raises(Interrupted) as told:
        block()
    assert (done, told.value.exit_code) == ([], code)


def test_what_turns_it_into_a_plain_interrupt_does_not_change_the_code() -> None:
    @sigterm_interrupts()
    def block() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Interrupted) as told:
        block()
    assert told.value.exit_code == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_held_off_until_the_end_of_the_block(number: signal.Signals) -> None:
    done = []

    @sigterm_interrupts()
    @held_off()
    def block() -> None:
        signal.raise_signal(number)
        with held_off():
            done.append("inner")
        done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["inner", "outer"]


def test_a_second_one_is_not_held_off() -> None:
    done = []

    @held_off()
    def block() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("once")
        signal.raise_signal(signal.SIGINT)
        done.append("twice")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["once"]


def test_one_that_was_held_off_is_heard_after_an_error_too() -> None:
    @held_off()
    def block() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ValueError("in the block")

    with pytest.raises(KeyboardInterrupt) as told:
        block()
    assert isinstance(told.value.__context__, ValueError)


class Deaf:
    """Python passes over what is raised while an object is deleted."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_was_passed_over_is_heard_at_last(number: signal.Signals, code: int) -> None:
    done = []

    @sigterm_interrupts()
    @heard_at_last()
    def block() -> None:
        Deaf(number)
        done.append("after")

    with pytest.raises(Interrupted) as told:
        block()
    assert (done, told.value.exit_code) == (["after"], code)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_heard_at_once_is_not_heard_again(number: signal.Signals) -> None:
    done = []

    @sigterm_interrupts()
    def block() -> None:
        try:
            with heard_at_last():
                signal.raise_signal(number)
                done.append("after")
        except KeyboardInterrupt:
            done.append("heard")

    block()
    assert done == ["heard"]


def test_undisturbed() -> None:
    with undisturbed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_in_another_thread_nothing_is_handled() -> None:
    done = []

    def work() -> None:
        with sigterm_interrupts(), heard_at_last(), held_off(), undisturbed():
            done.append("work")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["work"]
