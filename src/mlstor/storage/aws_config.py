"""What AWS's environment variables and profile files say of a client, apart from its keys: region, endpoint, ...

The files are ``~/.aws/config`` and ``~/.aws/credentials``, or those that ``AWS_CONFIG_FILE`` and
``AWS_SHARED_CREDENTIALS_FILE`` name. As in AWS's own tools an option wins over the environment, and that over a file.
"""

from __future__ import annotations

import configparser
import os
from typing import NamedTuple

from mlstor.errors import UsageError


class Profile(NamedTuple):
    """One profile of the files. Its repr shows names, no values: there are keys among them."""

    name: str
    #: it was asked for by an option, which the environment's keys do not override
    chosen: bool
    #: of the config file
    config: dict[str, str]
    #: of the credentials file
    keys: dict[str, str]
    #: the `services` section that the profile names: service -> settings
    services: dict[str, dict[str, str]]

    def __repr__(self) -> str:
        return f"Profile({self.name!r})"

    def merged(self) -> dict[str, str]:
        """Both files' settings; the credentials file wins, as it does in AWS's tools."""
        return {**self.config, **self.keys}


def config_path() -> str:
    return os.path.expanduser(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config")


def credentials_path() -> str:
    return os.path.expanduser(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")


def load_profile(name: str | None = None) -> Profile:
    """The profile `name`, else that of ``AWS_PROFILE``, else the default one, which may be empty.

    Raises
    ------
    UsageError
        If a profile was named that isn't there, or a file can't be read.
    """
    named = name or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or ""
    wanted = named or "default"
    config, keys = _sections(config_path()), _sections(credentials_path())
    of_config = config.get(f"profile {wanted}")
    if of_config is None and wanted == "default":
        of_config = config.get("default")
    of_keys = keys.get(wanted)
    if named and of_config is None and of_keys is None:
        said = "profile" if name else "AWS_PROFILE"
        raise UsageError(f"{said}={named}: there is no such profile in {config_path()} or {credentials_path()}")
    services = (of_config or {}).get("services", "")
    section = config.get(f"services {services}", {}) if services else {}
    nested = {service: _nested(text) for service, text in section.items()}
    return Profile(wanted, bool(name), of_config or {}, of_keys or {}, nested)


def _sections(path: str) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(default_section="\0none", strict=False)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError):
        # The parser's own text repeats lines of the file, and there may be keys in them.
        raise UsageError(f"{path} is not in AWS's form: [profile NAME] and lines of name = value") from None
    # Names in quotes are allowed: [profile "my profile"].
    return {" ".join(name.replace('"', "").split()): dict(parser[name]) for name in parser.sections()}


def _nested(text: str) -> dict[str, str]:
    """Indented lines of ``name = value`` below a setting, as below ``s3 =``."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def endpoint_url(given: str | None, profile: Profile) -> tuple[str, str]:
    """The custom endpoint of S3 and where it was named; ("", "") for AWS's own.

    In turn: the option, ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, and of the profile its service section's and
    its own ``endpoint_url``. ``AWS_IGNORE_CONFIGURED_ENDPOINT_URLS=true`` leaves all but the option out.
    """
    if given:
        return given, "option"
    settings = profile.config
    ignore = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS") or settings.get("ignore_configured_endpoint_urls")
    if (ignore or "").lower() == "true":
        return "", ""
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if value := os.environ.get(variable):
            return value, f"environment {variable}"
    value = profile.services.get("s3", {}).get("endpoint_url") or settings.get("endpoint_url", "")
    return value, f"profile {profile.name}" if value else ""


def region(given: str | None, profile: Profile) -> tuple[str, str]:
    """The region that requests are signed for and where it was named; us-east-1 by default, as S3's first region."""
    if given:
        return given, "option"
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        if value := os.environ.get(variable):
            return value, f"environment {variable}"
    if value := profile.merged().get("region", ""):
        return value, f"profile {profile.name}"
    return "us-east-1", "default"


def ca_bundle(given: str | None, profile: Profile) -> str | None:
    """File of the CAs to trust: the option, ``AWS_CA_BUNDLE``, the profile's ``ca_bundle``; None: the system's."""
    path = given or os.environ.get("AWS_CA_BUNDLE") or profile.config.get("ca_bundle")
    return os.path.expanduser(path) if path else None


def addressing_style(profile: Profile) -> str:
    """``path``, ``virtual`` or ``auto``, of the profile's s3 settings."""
    style = _nested(profile.config.get("s3", "")).get("addressing_style", "auto")
    if style not in ("path", "virtual", "auto"):
        raise UsageError(f"profile {profile.name}: addressing_style is path, virtual or auto, not {style!r}")
    return style
