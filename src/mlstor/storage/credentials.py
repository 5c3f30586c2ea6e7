"""Keys for S3: from the environment, AWS's profile files, or botocore for those that are fetched and expire.

Nothing here prints a key, and an object that holds one does not show it in its repr and can't be pickled.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from mlstor.errors import UsageError
from mlstor.storage.aws_config import Profile, config_path, credentials_path, load_profile

if TYPE_CHECKING:
    from mlstor._http import HttpEngine

#: How often fetched credentials are asked for again. botocore fetches new ones 15 minutes before theirs expire.
RENEW_S = 60.0
#: Settings of a profile that AWS's tools look at before its keys (a role may be assumed with these, for instance).
_BEFORE_KEYS = {"role_arn", "web_identity_token_file", "sso_session", "sso_start_url", "login_session"}


class Credentials:
    """An access key, its secret and, if temporary, the session token."""

    __slots__ = ("access_key", "secret_key", "token")

    def __init__(self, access_key: str, secret_key: str, token: str = "") -> None:
        self.access_key = access_key
        self.secret_key = secret_key
        self.token = token

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Credentials):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __repr__(self) -> str:
        return "Credentials(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("credentials are not pickled: the other process looks for its own")


class Source(Protocol):
    """Where credentials come from."""

    #: in words, for messages and records
    name: str
    #: `current` may give others later
    renewable: bool

    def current(self) -> Credentials:
        """Credentials that are valid now.

        Raises
        ------
        PermissionError
            If they can't be had.
        """


class _Fixed:
    renewable = False

    def __init__(self, name: str, credentials: Credentials) -> None:
        self.name = name
        self._credentials = credentials

    def current(self) -> Credentials:
        return self._credentials


class _Fetched:
    """By botocore: credential_process, web identity, assumed roles, SSO, container and instance metadata."""

    renewable = True

    def __init__(self, name: str, credentials: Any) -> None:
        self.name = name
        self._credentials = credentials

    def current(self) -> Credentials:
        import errno

        try:
            found = self._credentials.get_frozen_credentials()
        except _failures() as error:
            # Its text may hold what a credential_process wrote, so only its kind is told.
            raise PermissionError(
                errno.EACCES, f"{self.name} gave no credentials ({type(error).__name__}); try it by hand"
            ) from None
        return Credentials(found.access_key, found.secret_key, found.token or "")


def _failures() -> tuple[type[Exception], ...]:
    """What botocore raises for credentials that it can't get. A ClientError (a role that is refused) is no
    BotoCoreError, and what isn't the JSON that it should be ends in one of the last four.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError


def find(profile: str | None = None) -> Source:
    """The first credentials there are, in the order of AWS's tools.

    The environment (unless `profile` is given), the profile's files, and then, through botocore, what has to be
    fetched: role, web identity, SSO, ``credential_process``, and metadata of the container or instance.

    Raises
    ------
    UsageError
        If there are none, or a profile or botocore is missing; it says what to set.
    """
    loaded = load_profile(profile)
    if not loaded.chosen:
        if source := _of_environment():
            return source
        if os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
            return _of_botocore(profile, loaded)
    return _of_files(loaded) or _of_botocore(profile, loaded)


def _of_environment() -> Source | None:
    access, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if access and secret:
        name = "the environment (AWS_ACCESS_KEY_ID)"
        return _Fixed(name, Credentials(access, secret, os.environ.get("AWS_SESSION_TOKEN", "")))
    if access or secret:
        missing = "AWS_SECRET_ACCESS_KEY" if access else "AWS_ACCESS_KEY_ID"
        raise UsageError(f"{missing} is not set, though its other half is: set both or neither")
    return None


def _of_files(profile: Profile) -> Source | None:
    if _BEFORE_KEYS & profile.merged().keys():
        return None
    if source := _pair(profile.keys, f"profile {profile.name} of {credentials_path()}"):
        return source
    if "credential_process" in profile.merged():
        return None
    return _pair(profile.config, f"profile {profile.name} of {config_path()}")


def _pair(values: dict[str, str], name: str) -> Source | None:
    access, secret = values.get("aws_access_key_id"), values.get("aws_secret_access_key")
    if not access or not secret:
        return None
    return _Fixed(name, Credentials(access, secret, values.get("aws_session_token", "")))


def _of_botocore(profile: str | None, loaded: Profile) -> Source:
    try:
        import botocore.session
    except ImportError:
        raise UsageError(
            "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile, or ask "
            "anonymously; for roles, credential_process and instance metadata `pip install mlstor[s3]`"
        ) from None
    try:
        found = botocore.session.Session(profile=profile).get_credentials()
    except _failures() as error:
        raise UsageError(
            f"profile {loaded.name} gave no credentials for S3 ({type(error).__name__}): try what it names by hand"
        ) from None
    if found is None:
        raise UsageError(
            "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile, or ask "
            "anonymously; neither the profile files nor this host's metadata have any"
        )
    return _Fetched(f"{found.method} of profile {loaded.name}", found)


class Signer:
    """Has engines sign with a source's credentials, and with the new ones when those have been renewed.

    A thread asks a renewable source again every `renew_s`; nothing waits for it. While it fails the old credentials
    stay, and `problem` says why.
    """

    def __init__(self, source: Source, region: str, renew_s: float = RENEW_S) -> None:
        self.source = source
        self.problem = ""
        self._region = region
        self._renew_s = renew_s
        self._lock = threading.Lock()
        self._signed: list[tuple[HttpEngine, int]] = []
        self._credentials = source.current()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def attach(self, engine: HttpEngine, *endpoints: int) -> None:
        """Sign these endpoints' requests from now on."""
        with self._lock:
            for endpoint in endpoints:
                self._sign(engine, endpoint)
                self._signed.append((engine, endpoint))
            if self.source.renewable and self._thread is None:
                self._thread = threading.Thread(target=self._keep_renewing, name="mlstor-credentials", daemon=True)
                self._thread.start()

    def detach(self, engine: HttpEngine) -> None:
        """Forget an engine, before it is closed."""
        with self._lock:
            self._signed = [(signed, endpoint) for signed, endpoint in self._signed if signed is not engine]

    def renew(self) -> None:
        """Ask the source now, and sign with what it gives if that is new."""
        try:
            credentials = self.source.current()
        except OSError as error:
            self.problem = error.strerror or str(error)
            return
        with self._lock:
            self.problem = ""
            if credentials != self._credentials:
                self._credentials = credentials
                for engine, endpoint in self._signed:
                    self._sign(engine, endpoint)

    def _sign(self, engine: HttpEngine, endpoint: int) -> None:
        keys = self._credentials
        engine.sign(endpoint, keys.access_key, keys.secret_key, keys.token, self._region, "s3")

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._renew_s):
            self.renew()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1)
        with self._lock:
            self._signed.clear()
