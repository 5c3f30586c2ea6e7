"""Signals that are held while a loop is amidst something, and raise where it looks."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest

from mlstor.signals import Interrupted, Interrupts, held, raise_lost


def test_an_interrupt_that_numpy_drops_is_raised_by_who_looks_for_it():
    class Interrupting(type):
        """As an enumeration before Python 3.12, it looks in Python for attributes that it has not."""

        def __getattr__(cls, name: str) -> Any:
            signal.raise_signal(signal.SIGINT)
            raise AttributeError(name)

    class Number(int, metaclass=Interrupting):
        pass

    with Interrupts():
        raise_lost()
        assert (np.zeros(2, int) == Number(0)).all(), "numpy lets it through: there is nothing left to guard against"
        with pytest.raises(Interrupted) as raised:
            raise_lost()
    assert raised.value.exit_code == 130
    raise_lost()


def test_a_held_signal_raises_where_it_is_looked_for():
    steps = []

    def loop():
        with held() as check:
            signal.raise_signal(signal.SIGTERM)
            steps.append("went on")
            check()
            steps.append("not reached")

    with Interrupts(), pytest.raises(Interrupted) as raised:
        loop()
    assert steps == ["went on"]
    assert raised.value.exit_code == 143


def test_a_held_signal_that_nobody_looked_for_raises_at_the_end():
    with Interrupts(), pytest.raises(Interrupted), held():
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_is_obeyed_at_once():
    steps = []

    def loop():
        with held():
            signal.raise_signal(signal.SIGINT)
            steps.append("went on")
            signal.raise_signal(signal.SIGINT)
            steps.append("not reached")

    with Interrupts(), pytest.raises(Interrupted):
        loop()
    assert steps == ["went on"]


def test_nothing_is_held_behind_the_end():
    with Interrupts():
        with held() as check:
            check()
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_without_interrupts_signals_do_what_they_do():
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(signal.SIGINT)
