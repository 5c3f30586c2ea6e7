"""The command line of ``mlstor stream``: what it takes, and what it refuses in a sentence."""

from __future__ import annotations

import pytest

from mlstor.errors import UsageError
from mlstor.stream import options, profiles

URL = "/somewhere"


def parse(*words: str) -> options.Options:
    return options.parse([*words, URL])


def test_nothing_said_is_one_epoch_of_reading():
    given = parse()
    assert (given.get, given.put, given.epochs, given.urls) == (100.0, 0.0, 1, [URL])


def test_reads_are_what_the_others_leave():
    given = parse("--put", "30%", "--head", "2.5", "--ops", "10")
    assert (given.get, given.put, given.head, given.delete) == (67.5, 30.0, 2.5, 0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--put", "100%"], "say when it ends"),
        (["--put", "100%", "--epochs", "2"], "--epochs counts passes of reading"),
        (["--get", "50", "--put", "30", "--ops", "1"], "together are not 100 %"),
        (["--put", "120"], "percentage"),
        (["--put", "x"], "percentage"),
        (["--ops", "0"], "--ops 0 leaves nothing to do"),
        (["--duration", "0"], "--duration 0.0 leaves nothing to do"),
        (["--epochs", "-1"], "not a whole number"),
        (["--read-offset", "4KiB"], "go with --read-bytes"),
        (["--read-bytes", "4KiB", "--read-offset", "1", "--range", "random"], "offsets of its own"),
        (["--read-bytes", "4KiB", "--range-align", "1"], "--range-align is for --range random"),
        (["--read-bytes", "4KiB", "--verify", "checksum"], "of whole objects"),
        (["--catalog", "a", "--list-file", "b"], "--catalog and --list-file each say what is read"),
        (["--catalog", "a", "--verify"], "give --objects-of"),
        (["--put", "50", "--verify", "--ops", "3"], "leave --put out"),
        (["--put", "100", "--verify", "checksum", "--ops", "3"], "there are none"),
        (["--delete", "20", "--ops", "9"], "--delete removes only what mlstor wrote"),
        (["--delete", "100", "--ops", "9"], "--delete removes only what mlstor wrote"),
        (["--compressibility", "101", "--put", "100", "--ops", "1"], "0 to 100"),
        (["--rate", "0"], "a rate"),
        (["--nodes", "3"], "belong to --profile"),
        (["--run-id", "a/b"], "directory's name"),
        (["--bytes", "3x-servers"], "not a size"),
        (["-o", "region"], "NAME=VALUE"),
        (["--profile", "shards-fill"], "say when it ends"),
        (["--put", "100", "--ops", "1", "--warmup", "1epoch"], "--warmup in epochs needs reads"),
        (["--unknown"], "--help"),
    ],
)
def test_what_can_not_be_meant_is_refused(words, said):
    with pytest.raises(UsageError) as refused:
        parse(*words)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_url_is_asked_for():
    with pytest.raises(UsageError, match="say where"):
        options.parse([])


def test_a_limit_may_be_a_multiple_of_the_servers_memory():
    given = parse("--put", "100", "--bytes", "3x-server-memory")
    assert (given.limit_nbytes, given.server_memory_times) == (None, 3.0)
    assert parse("--bytes", "2KiB").limit_nbytes == 2048


def test_a_warm_up_is_a_time_or_epochs():
    assert (parse("--warmup", "90s").warmup_s, parse("--warmup", "2min").warmup_s) == (90.0, 120.0)
    assert [parse("--warmup", text).warmup_epochs for text in ("1epoch", "2epochs")] == [1, 2]


def test_options_of_the_store_have_their_types():
    given = parse("-o", "anonymous=yes", "-o", "part_bytes=16MiB", "-o", "tries=3", "-o", "region=eu-1")
    assert given.store_options == {"anonymous": True, "part_bytes": 16 << 20, "tries": 3, "region": "eu-1"}
    assert parse("--endpoint", "http://h:1").store_options == {"endpoint": "http://h:1"}
    assert parse("--client", "s3torchconnector").store_options == {"client": "s3torchconnector"}


def test_to_verify_without_more_is_to_read_what_was_written_last():
    given = parse("--verify")
    assert (given.verify, given.objects_of) == ("pattern", "last")
    assert parse("--verify", "pattern", "--fill", "3").objects_of is None


def test_a_profile_gives_what_was_not_said():
    given = parse("--profile", "shards-fill", "--ops", "2")
    assert (given.put, given.size, given.nodes, given.gpus, given.loaders) == (100.0, "1GiB", 8, 8, 5)
    said = parse("--profile", "shards-fill", "--ops", "2", "--size", "1MiB", "--nodes", "2")
    assert (said.size, said.nodes, said.gpus) == ("1MiB", 2, 8)
    assert parse("--profile", "shards-stream").get == 100.0


@pytest.mark.parametrize("size", [1, 2, 3, 64, 320])
def test_a_profiles_loaders_are_dealt_to_the_processes(size):
    given = parse("--profile", "shards-stream")
    shares = [profiles.under_way(given, rank, size) for rank in range(size)]
    assert sum(workers * in_flight for workers, in_flight in shares) == 8 * 8 * 5


def test_what_is_said_of_depth_goes_before_a_profile():
    given = parse("--profile", "shards-stream", "--workers", "2", "--in-flight", "3")
    assert profiles.under_way(given, 0, 1) == (2, 3)
    assert profiles.under_way(parse(), 0, 1) == (0, 0)
