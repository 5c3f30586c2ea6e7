"""What `s3.open` is told, checked, and completed from AWS's environment and profile files."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from mlstor.errors import UsageError
from mlstor.storage import aws_config
from mlstor.units import format_gib

MIB = 1 << 20
#: S3 takes no smaller part but the last, and no larger one.
LEAST_PART_BYTES, MOST_PART_BYTES = 5 * MIB, 5 << 30
#: What s3torchconnector and AWS's CRT take too.
PART_BYTES = 8 * MIB
PART_THRESHOLD_BYTES = 16 * MIB
# A name that can be part of a host name and of a certificate's one level of it.
_HOST_NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")


class Place(NamedTuple):
    """A bucket, a prefix, and how they are reached. Nothing secret is in it."""

    bucket: str
    #: "" or ends with "/"
    prefix: str
    #: scheme://host[:port][/path] of the service
    endpoint: str
    endpoint_from: str
    #: of the bucket: what keys are appended to
    base: str
    path_style: bool
    region: str
    region_from: str
    ca_file: str | None
    #: PUT asks first with an empty body where to, as AIStore's S3 wants it
    follow: bool


def parse_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of ``s3://BUCKET[/PREFIX]``; the prefix is "" or ends with "/".

    Raises
    ------
    UsageError
        If it is no such URL.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", bucket):
        raise UsageError(f"{url!r} is not s3://BUCKET or s3://BUCKET/PREFIX")
    return bucket, prefix if not prefix or prefix.endswith("/") else prefix + "/"


def place(
    url: str,
    profile: aws_config.Profile,
    endpoint: str | None,
    region: str | None,
    path_style: bool | None,
    ca_file: str | None,
    follow: bool | None,
) -> Place:
    """Where a URL's bucket is.

    `path_style` None: the profile's ``addressing_style``; else on for custom endpoints, and for buckets whose name no
    host may have. `follow` None: on where the endpoint's path is ``/s3``, which is AIStore's.

    Raises
    ------
    UsageError
        If the URL, the endpoint or the profile isn't understood.
    """
    bucket, prefix = parse_url(url)
    region, region_from = aws_config.region(region, profile)
    given, given_from = aws_config.endpoint_url(endpoint, profile)
    if not re.fullmatch(r"[A-Za-z0-9-]+", region):
        raise UsageError(f"{region!r} is no region; one is named as in us-east-1")
    service = _checked(given, given_from) if given else f"https://s3.{region}.amazonaws.com{_domain(region)}"
    parts = urlsplit(service)
    if path_style is None:
        style = aws_config.addressing_style(profile)
        path_style = style == "path" or (style == "auto" and (bool(given) or not _HOST_NAME.fullmatch(bucket)))
    base = f"{service}/{bucket}" if path_style else f"{parts.scheme}://{bucket}.{parts.netloc}{parts.path}"
    if follow is None:
        follow = parts.path == "/s3"
    bundle = aws_config.ca_bundle(ca_file, profile)
    return Place(bucket, prefix, service, given_from or "AWS", base, path_style, region, region_from, bundle, follow)


def _domain(region: str) -> str:
    return ".cn" if region.startswith("cn-") else ""


def _checked(endpoint: str, source: str) -> str:
    said = f"the endpoint ({source})"
    try:
        parts = urlsplit(endpoint)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        raise UsageError(f"{said} is not a URL such as http://host:9000") from None
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"{said} holds a user name or password: give credentials by the environment or a profile")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or not port_fits:
        raise UsageError(f"{said} is {endpoint!r}, not a URL such as http://host:9000 or https://host")
    return endpoint.rstrip("/")


def check_sizes(part_bytes: int, part_threshold_bytes: int) -> None:
    """Raise a UsageError for part sizes that S3, or this client, does not take."""
    if not LEAST_PART_BYTES <= part_bytes <= MOST_PART_BYTES or part_bytes % 4096:
        raise UsageError(
            f"part_bytes is {part_bytes}: S3 takes {format_gib(LEAST_PART_BYTES)} to {format_gib(MOST_PART_BYTES)}, "
            "and it must be a multiple of 4096"
        )
    if not part_bytes <= part_threshold_bytes <= MOST_PART_BYTES:
        raise UsageError(
            f"part_threshold_bytes is {part_threshold_bytes}: at least part_bytes ({part_bytes}), and at most "
            f"{format_gib(MOST_PART_BYTES)}, S3's limit of one PUT"
        )
