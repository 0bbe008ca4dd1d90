"""Contestants of a benchmark in processes of their own: what they answer, and how they end."""

import os

import pytest
from turns import Contestant


def ends(_):
    os._exit(3)


def test_orders_are_done_in_one_process_that_keeps_what_it_made():
    contestant = Contestant(list)
    try:
        assert contestant.told(pushed) == contestant.told(pushed) - 1 == 1
        assert contestant.told(process) != os.getpid()
        with pytest.raises(RuntimeError, match="IndexError: list index out of range"):
            contestant.told(beyond)
        assert contestant.told(len) == 2
    finally:
        contestant.dismissed()


def test_a_process_that_ends_is_reported():
    contestant = Contestant(list)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the process ended with exit code 3"):
            contestant.told(ends)
    contestant.dismissed()


def pushed(made):
    made.append(0)
    return len(made)


def process(_):
    return os.getpid()


def beyond(made):
    return made[5]
