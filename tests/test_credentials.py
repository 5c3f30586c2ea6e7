"""Where S3's keys, region and endpoint come from; that keys show nowhere; that new ones are signed with."""

from __future__ import annotations

import errno
import json
import pickle
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from s3_support import forget_aws

from mlstor.errors import UsageError
from mlstor.storage import aws_config, credentials, s3_options
from mlstor.storage.credentials import Credentials, Signer, find

SECRET = "very+secret/key"


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Profile files of this test alone."""
    forget_aws(monkeypatch)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.write_text(textwrap.dedent(text))


def keys_file(aws: Path) -> None:
    write(
        aws / "credentials",
        f"""
        [default]
        aws_access_key_id = FILEKEY
        aws_secret_access_key = {SECRET}
        [other]
        aws_access_key_id = OTHERKEY
        aws_secret_access_key = {SECRET}2
        aws_session_token = token+of/other==
        """,
    )


def access_key(profile: str | None = None) -> str:
    return find(profile).current().access_key


def test_the_environment_goes_before_the_files(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys_file(aws)
    assert access_key() == "FILEKEY"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    with pytest.raises(UsageError, match="AWS_SECRET_ACCESS_KEY is not set"):
        find()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    source = find()
    assert source.current() == Credentials("ENVKEY", SECRET, "token")
    assert "environment" in source.name
    # AWS_PROFILE does not change that, a profile that was asked for does
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert access_key() == "ENVKEY"
    assert find("other").current() == Credentials("OTHERKEY", SECRET + "2", "token+of/other==")


def test_aws_profile_chooses_among_the_files(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys_file(aws)
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert access_key() == "OTHERKEY"
    assert "profile other" in find().name
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(UsageError, match="AWS_PROFILE=absent"):
        find()
    with pytest.raises(UsageError, match="profile=absent"):
        find("absent")


def test_keys_may_stand_in_the_config_file(aws: Path) -> None:
    write(
        aws / "config",
        """
        [profile "in config"]
        aws_access_key_id = CONFIGKEY
        aws_secret_access_key = s
        """,
    )
    assert access_key("in config") == "CONFIGKEY"


def test_without_any_credentials_it_says_what_to_set() -> None:
    pytest.importorskip("botocore")
    with pytest.raises(UsageError, match=r"AWS_ACCESS_KEY_ID.*anonymously"):
        find()


def test_without_botocore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    monkeypatch.setitem(sys.modules, "botocore", None)
    with pytest.raises(UsageError, match=r"pip install mlstor\[s3\]"):
        find()


def credential_process(aws: Path, answer: str, code: int = 0) -> Path:
    program = aws / "process.py"
    answers = aws / "answer.json"
    answers.write_text(answer)
    program.write_text(f"import sys\nsys.stdout.write(open({str(answers)!r}).read())\nsys.exit({code})\n")
    write(aws / "config", f"[profile p]\ncredential_process = {sys.executable} {program}\n")
    return answers


def process_answer(key: str, expires: str = "2099-01-01T00:00:00Z") -> str:
    keys = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": SECRET, "SessionToken": "t", "Expiration": expires}
    return json.dumps(keys)


def test_a_credential_process_is_asked_through_botocore_and_again_before_its_keys_expire(aws: Path) -> None:
    pytest.importorskip("botocore")
    # Expired at once, so that each question runs the program again.
    answers = credential_process(aws, process_answer("FIRST", "2000-01-01T00:00:00Z"))
    answers.write_text(process_answer("FIRST"))
    source = find("p")
    assert source.renewable
    assert source.current() == Credentials("FIRST", SECRET, "t")
    assert "custom-process" in source.name


def test_a_credential_process_that_fails_is_named_and_its_output_is_not(aws: Path) -> None:
    pytest.importorskip("botocore")
    credential_process(aws, f"leaked {SECRET}", code=1)
    with pytest.raises(UsageError, match="profile p gave no credentials") as caught:
        find("p")
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("answer", [f"leaked {SECRET}", "[]", '{"Version": 1}'])
def test_a_credential_process_that_writes_something_else_is_named_and_its_output_is_not(aws: Path, answer: str) -> None:
    pytest.importorskip("botocore")
    credential_process(aws, answer)
    with pytest.raises(UsageError, match="profile p gave no credentials") as caught:
        find("p")
    assert SECRET not in str(caught.value)


def test_a_role_that_is_refused_later_is_a_problem_and_does_not_end_the_renewal() -> None:
    exceptions = pytest.importorskip("botocore.exceptions")

    class Refused:
        def get_frozen_credentials(self) -> Any:
            answer = {"Error": {"Code": "ExpiredToken", "Message": "expired"}}
            raise exceptions.ClientError(answer, "AssumeRole")

    with pytest.raises(PermissionError, match=r"assume-role gave no credentials \(ClientError\)"):
        credentials._Fetched("assume-role", Refused()).current()


def test_a_file_that_is_not_understood_is_named_and_its_lines_are_not(aws: Path) -> None:
    (aws / "credentials").write_text(f"aws_secret_access_key {SECRET}\n[default\n")
    with pytest.raises(UsageError, match="is not in AWS's form") as caught:
        find()
    assert SECRET not in str(caught.value)


def test_keys_show_in_no_repr_and_no_pickle(aws: Path) -> None:
    keys_file(aws)
    source = find("other")
    found = source.current()
    for text in (repr(found), repr(source), repr(aws_config.load_profile("other")), str(vars(source).keys())):
        assert SECRET not in text
        assert "OTHERKEY" not in text
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(found)


class Signed:
    """Stands where an engine does: keeps what it was told to sign with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.told = threading.Event()

    def sign(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        self.told.set()


class Rotating:
    name = "a test"
    renewable = True

    def __init__(self) -> None:
        self.key = "KEY0"
        self.broken = False

    def current(self) -> Credentials:
        if self.broken:
            raise PermissionError(errno.EACCES, "the source is broken")
        return Credentials(self.key, SECRET)


def test_new_keys_are_signed_with_while_a_run_goes_on() -> None:
    source, engine = Rotating(), Signed()
    signer = Signer(source, "eu-west-1", renew_s=0.01)
    signer.attach(engine, 0, 3)  # type: ignore[arg-type]
    try:
        assert engine.calls == [(n, "KEY0", SECRET, "", "eu-west-1", "s3") for n in (0, 3)]
        engine.told.clear()
        source.key = "KEY1"
        assert engine.told.wait(60)
    finally:
        signer.close()
    assert engine.calls[2][1] == "KEY1"
    assert len(engine.calls) == 4  # the same keys are not given again


def test_a_source_that_fails_leaves_the_old_keys_and_a_reason() -> None:
    source, engine = Rotating(), Signed()
    signer = Signer(source, "eu-west-1", renew_s=1000)
    signer.attach(engine, 0)  # type: ignore[arg-type]
    source.broken = True
    signer.renew()
    assert signer.problem == "the source is broken"
    source.broken = False
    source.key = "KEY2"
    signer.renew()
    assert signer.problem == ""
    assert engine.calls[-1][1] == "KEY2"
    signer.detach(engine)  # type: ignore[arg-type]
    source.key = "KEY3"
    signer.renew()
    assert engine.calls[-1][1] == "KEY2"
    signer.close()


# ---- region, endpoint and the rest ----


def place(url: str = "s3://bucket", endpoint: str | None = None, region: str | None = None, **more: Any) -> Any:
    profile = aws_config.load_profile(more.pop("profile", None))
    given = {"path_style": None, "ca_file": None, "follow": None, **more}
    return s3_options.place(url, profile, endpoint, region, **given)


def test_aws_itself_is_reached_by_virtual_host() -> None:
    found = place("s3://bucket/a/b")
    assert found.base == "https://bucket.s3.us-east-1.amazonaws.com"
    assert (found.bucket, found.prefix, found.endpoint_from) == ("bucket", "a/b/", "AWS")
    # a certificate covers one level of names only
    assert place("s3://with.dots", region="eu-west-1").base == "https://s3.eu-west-1.amazonaws.com/with.dots"
    assert place(region="cn-north-1").base == "https://bucket.s3.cn-north-1.amazonaws.com.cn"
    assert place(path_style=True).base == "https://s3.us-east-1.amazonaws.com/bucket"


def test_a_custom_endpoint_is_reached_by_path() -> None:
    found = place(endpoint="http://127.0.0.1:9000/")
    assert found.base == "http://127.0.0.1:9000/bucket"
    assert not found.follow
    assert place(endpoint="http://h:9000", path_style=False).base == "http://bucket.h:9000"
    assert place(endpoint="http://h:51080/s3").base == "http://h:51080/s3/bucket"
    assert place(endpoint="http://h:51080/s3").follow


def test_endpoint_and_region_come_from_the_standard_places(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        aws / "config",
        """
        [default]
        region = eu-central-1
        endpoint_url = http://of-profile:1
        ca_bundle = ~/ca.pem
        [profile serviced]
        services = mine
        endpoint_url = http://of-profile:2
        s3 =
            addressing_style = virtual
        [services mine]
        s3 =
            endpoint_url = http://of-service:3
        """,
    )
    found = place()
    assert (found.endpoint, found.region, found.region_from) == (
        "http://of-profile:1",
        "eu-central-1",
        "profile default",
    )
    assert found.ca_file == str(Path("~/ca.pem").expanduser())
    assert place(profile="serviced").base == "http://bucket.of-service:3"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://of-environment:4")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-1")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/ca")
    assert place().endpoint == "http://of-environment:4"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://of-environment:5")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    found = place()
    assert (found.endpoint, found.endpoint_from) == ("http://of-environment:5", "environment AWS_ENDPOINT_URL_S3")
    assert (found.region, found.ca_file) == ("us-west-2", "/ca")
    found = place(endpoint="https://given", region="given-1", ca_file="/given")
    assert (found.endpoint, found.region, found.ca_file) == ("https://given", "given-1", "/given")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert place().endpoint == "https://s3.us-west-2.amazonaws.com"


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("s3://", {}, "is not s3://BUCKET"),
        ("s3:///key", {}, "is not s3://BUCKET"),
        ("s3://a b/key", {}, "is not s3://BUCKET"),
        ("s3://b", {"endpoint": "127.0.0.1:9000"}, "not a URL such as http://host:9000"),
        ("s3://b", {"endpoint": "ftp://h"}, "not a URL such as http://host:9000"),
        ("s3://b", {"endpoint": "http://h:99999"}, "not a URL such as http://host:9000"),
        ("s3://b", {"endpoint": "http://h?x=1"}, "not a URL such as http://host:9000"),
        ("s3://b", {"region": "eu west"}, "is no region"),
    ],
)
def test_what_is_not_understood_is_said(url: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        place(url, **options)


def test_an_endpoint_with_a_password_is_refused_and_not_repeated() -> None:
    for password, text in (("pass+word", "user name or password"), (SECRET, "is not a URL such as")):
        with pytest.raises(UsageError, match=text) as caught:
            place(endpoint=f"http://user:{password}@host:9000")
        assert password not in str(caught.value)


def test_renewal_asks_often_enough_for_botocores_window() -> None:
    # botocore fetches anew from 15 minutes before the end on, and waits for it from 10 minutes on
    assert credentials.RENEW_S <= 60
