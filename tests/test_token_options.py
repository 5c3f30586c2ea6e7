"""Token reads: which options become what, and which exclude one another."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
from token_support import data

from mlstor.errors import UsageError
from mlstor.stream import tokens
from mlstor.stream.tokens import Tokens

__all__ = ["data"]


def options(*words: str, **fields: Any) -> Any:
    parser = argparse.ArgumentParser()
    tokens.add_options(parser)
    others = {
        "profile": None,
        "seed": None,
        "rate": None,
        "workers": None,
        "in_flight": None,
        "put": None,
        "head": None,
        "delete": None,
        "read_nbytes": None,
        "read_offset": 0,
        "range": None,
    }
    return SimpleNamespace(**{**others, **fields, **vars(parser.parse_args(words))})


def test_options_become_those_of_records() -> None:
    given = options("--pattern", "tokens", "--record", "8KiB", "--handles", "open", "--max-handles", "9")
    assert tokens.apply(given) == Tokens("open", 9, 8192)
    assert (given.read_nbytes, given.range) == (8192, "records")
    assert tokens.apply(options("--pattern", "tokens")) == Tokens("kept", 512, 4096)
    assert tokens.apply(options()) is None


def test_the_olmo_profile_paces_each_node_and_knows_what_p99_may_be() -> None:
    given = options(profile="olmo-1b")
    assert tokens.apply(given) == Tokens("open", 512, 4096)
    assert (given.in_flight, given.workers, given.seed) == (None, 1, 6198)
    assert [tokens.threads_of(given, rank, 8) for rank in (0, 7)] == [4, 4]
    assert [tokens.threads_of(given, rank, 5) for rank in range(5)] == [7, 7, 6, 6, 6]
    assert (tokens.threads_of(given, 0, 1), tokens.threads_of(given, 63, 64)) == (32, 1)
    assert tokens.threads_of(options(), 0, 1) is None
    assert tokens.rate_of_all(given, hosts=3) == 30_000
    of_zero = options(profile="olmo-1b", seed=0)
    tokens.apply(of_zero)
    assert of_zero.seed == 0
    assert tokens.p99_goal_ns(8 * 4 * 3, 30_000) == 3_200_000
    faster = options("--rate-per-node", "20000", "--handles", "kept", profile="olmo-1b", in_flight=16)
    assert tokens.apply(faster) == Tokens("kept", 512, 4096)
    assert (faster.in_flight, tokens.rate_of_all(faster, hosts=1)) == (16, 20_000)


@pytest.mark.parametrize(
    ("words", "fields", "said"),
    [
        (["--handles", "kept"], {}, "--handles is an option of --pattern tokens"),
        (["--record", "4096"], {}, "--record is an option"),
        (["--pattern", "tokens"], {"put": 100.0}, "only reads"),
        (["--pattern", "tokens"], {"read_nbytes": 1}, "whole records"),
        (["--pattern", "tokens"], {"range": "random"}, "whole records"),
        (["--pattern", "tokens", "--record", "0"], {}, "--record 0"),
        (["--pattern", "tokens", "--max-handles", "0"], {}, "--max-handles 0"),
    ],
)
def test_what_token_reads_exclude_is_refused(words: list[str], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tokens.apply(options(*words, **fields))


def test_two_rates_exclude_one_another() -> None:
    given = options("--pattern", "tokens", "--rate-per-node", "5", rate=3.0)
    with pytest.raises(UsageError, match="give one of them"):
        tokens.rate_of_all(given, 1)
    assert tokens.rate_of_all(options(rate=3.0), 1) == 3.0
    assert tokens.rate_of_all(options(), 1) is None
    with pytest.raises(UsageError, match="nothing to do"):
        tokens.rate_of_all(options("--rate-per-node", "0"), 1)
