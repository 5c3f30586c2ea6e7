"""One immutable `Settings` for all parts: argument, then ``MLSTOR_*``, then stored profile, then default.

Each setting is declared once, as a field below with its parser and default; docs/settings.md describes them
and a test holds the two together. No other module reads ``MLSTOR_*``.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlstor.errors import UsageError
from mlstor.units import format_gib, parse_size

PROFILE_VARIABLE = "MLSTOR_PROFILE"


@dataclass(frozen=True)
class Kind:
    """How one setting's text is read, and the sentence that says which texts are accepted."""

    parse: Callable[[str], Any]
    accepts: str


def _choice(*words: str) -> Kind:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return Kind(parse, " or ".join((", ".join(words[:-1]), words[-1])))


def _count(least: int, most: int) -> Kind:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    return Kind(parse, f"a whole number from {least} to {most}")


def _size(least: int, most: int, multiple: int, automatic: bool = False) -> Kind:
    def parse(text: str) -> int:
        nbytes = parse_size(text)
        if automatic and nbytes == 0:
            return 0
        if not least <= nbytes <= most or nbytes % multiple:
            raise ValueError
        return nbytes

    limits = f", a multiple of {multiple} bytes, at most {format_gib(most)}" if multiple > 1 else ""
    return Kind(parse, f"a size such as 4MiB or 1.5GB{limits}")


def _path() -> Kind:
    def parse(text: str) -> str:
        if not text:
            raise ValueError
        return os.path.expanduser(text)

    return Kind(parse, "a path")


def _setting(default: Any, kind: Kind, *, unit: str, help: str, env: str = "", per_target: bool = False) -> Any:
    """Declare one setting; `env` is its variable if that isn't MLSTOR_ and its name in capitals."""
    metadata = {"kind": kind, "unit": unit, "help": help, "env": env, "per_target": per_target}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine and the commands can be told, resolved. Made by `Settings.resolve`; sizes are in bytes.

    A plain ``Settings()`` holds the defaults and looks at neither the environment nor a profile.
    """

    backend: str = _setting(
        "auto",
        _choice("auto", "io_uring", "threads"),
        unit="word",
        help="how I/O is submitted; auto takes io_uring where the kernel grants it",
    )
    direct: str = _setting(
        "auto",
        _choice("auto", "require", "off"),
        unit="word",
        help="O_DIRECT: where it works, or else an error, or never",
        per_target=True,
    )
    block_bytes: int = _setting(
        0,
        _size(4096, 1 << 30, 4096, automatic=True),
        unit="bytes",
        help="bytes of one read or write; 0 takes 1 MiB, or up to 4 MiB where the file system prefers more",
        per_target=True,
    )
    depth: int = _setting(
        0,
        _count(0, 1024),
        unit="operations",
        help="reads or writes in flight per worker; 0 begins with 2 MiB and takes up to 8 where more gives more",
    )
    workers: int = _setting(
        0,
        _count(0, 256),
        unit="threads",
        help="I/O threads of an engine; 0 takes two, or one where one core is allowed",
    )
    pool_huge: str = _setting(
        "auto",
        _choice("auto", "off"),
        unit="word",
        help="huge pages for the staging pool, where the kernel has them",
    )
    register: str = _setting(
        "auto",
        _choice("auto", "off"),
        unit="word",
        help="registration of the staging pool with the ring, where RLIMIT_MEMLOCK allows it",
    )
    ephemeral_storage_limit_bytes: int | None = _setting(
        None,
        _size(1, 1 << 62, 1),
        unit="bytes",
        help="the pod's ephemeral-storage limit, beyond which it is evicted; none when not set",
        env="MLSTOR_EPHEMERAL_STORAGE_LIMIT",
    )
    results_dir: str = _setting(
        "results",
        _path(),
        unit="path",
        help="directory of the result records",
        env="MLSTOR_RESULTS",
    )
    _sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    _targets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    _profile: str = field(default="", repr=False, compare=False)

    @classmethod
    def resolve(cls, **arguments: Any) -> Settings:
        """Settings from `arguments` (None = not given), the environment, the stored profile and the defaults.

        Raises
        ------
        UsageError
            If a name is unknown or a value isn't accepted; it says where that was and what is accepted.
        """
        known = {setting.name: setting for setting in declared()}
        for name in arguments:
            if name not in known:
                raise UsageError(f"there is no setting {name!r}{_near(name, known)}")
        profile, values, targets = _stored_profile(known)
        resolved: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name, setting in known.items():
            variable = environment_name(setting)
            if (argument := arguments.get(name)) is not None:
                resolved[name] = _parsed(setting, argument, f"{name}={argument}")
                sources[name] = "argument"
            elif text := os.environ.get(variable):
                resolved[name] = _parsed(setting, text, f"{variable}={text}")
                sources[name] = f"environment {variable}"
            elif name in values:
                resolved[name] = values[name]
                sources[name] = f"profile {profile}"
        return cls(**resolved, _sources=sources, _targets=targets, _profile=profile)

    def for_target(self, path: str | os.PathLike[str]) -> Settings:
        """These settings as they hold for `path`, by the longest prefix of it among the profile's targets.

        A target's values replace defaults and the profile's own; arguments and ``MLSTOR_*`` stay, since they
        were said for this run.
        """
        prefix = max((key for key in self._targets if _lies_under(os.fsdecode(path), key)), key=len, default=None)
        if prefix is None:
            return self
        replaced = {
            name: value
            for name, value in self._targets[prefix].items()
            if not self.source(name).startswith(("argument", "environment"))
        }
        sources = dict.fromkeys(replaced, f"profile {self._profile} for {prefix}")
        return dataclasses.replace(self, **replaced, _sources={**self._sources, **sources})

    def source(self, name: str) -> str:
        """Where `name` is from: argument, environment VARIABLE, profile FILE [for PREFIX] or default."""
        return self._sources.get(name, "default")

    def describe(self) -> dict[str, dict[str, Any]]:
        """Each setting's value and source, as results record them."""
        return {s.name: {"value": getattr(self, s.name), "source": self.source(s.name)} for s in declared()}

    def slot_nbytes(self) -> int:
        """Bytes of a staging slot, which bounds a transfer: the largest `block_bytes` of any target, 4 MiB for 0."""
        blocks = [self.block_bytes, *(of["block_bytes"] for of in self._targets.values() if "block_bytes" in of)]
        return max(block or 4 << 20 for block in blocks)

    def depth_count(self) -> int:
        """Transfers that a worker has in flight at most: `depth`, or 8 where that is 0."""
        return self.depth or 8

    def worker_count(self) -> int:
        """`workers`, or where that is 0 the automatic choice: two, or one where only one core is allowed."""
        return self.workers or min(2, len(os.sched_getaffinity(0)))


def declared() -> Iterator[dataclasses.Field[Any]]:
    """The declarations: name, default, and in the metadata kind, unit, help, env, per_target."""
    return (setting for setting in dataclasses.fields(Settings) if not setting.name.startswith("_"))


def environment_name(setting: dataclasses.Field[Any]) -> str:
    """The variable that gives `setting`, ``MLSTOR_DEPTH`` for instance."""
    return setting.metadata["env"] or f"MLSTOR_{setting.name.upper()}"


def profile_path() -> str:
    """Where the stored profile is, whether or not it exists."""
    chosen = os.environ.get(PROFILE_VARIABLE)
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.expanduser(chosen) if chosen else os.path.join(config, "mlstor", "profile.yaml")


def _stored_profile(
    known: Mapping[str, dataclasses.Field[Any]],
) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """The profile's file, its values, and its values by target prefix; all empty if there is no profile."""
    path = profile_path()
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        if os.environ.get(PROFILE_VARIABLE):
            raise UsageError(f"{PROFILE_VARIABLE} names {path}, which does not exist") from None
        return "", {}, {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the profile {path} can't be read: {error}") from None
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"the profile {path} is not YAML: {' '.join(str(error).split())}") from None
    content = _mapping(content, path)
    targets = _mapping(content.pop("targets", None), f"{path}: targets")
    per_target = {name: setting for name, setting in known.items() if setting.metadata["per_target"]}
    return (
        path,
        _parsed_mapping(content, known, path),
        {
            _normal(prefix): _parsed_mapping(_mapping(values, f"{path}: {prefix}"), per_target, f"{path}: {prefix}")
            for prefix, values in targets.items()
        },
    )


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{where} must map names to values, as in `depth: 16`")
    return {str(key): value for key, value in content.items()}


def _parsed_mapping(
    content: Mapping[str, Any], known: Mapping[str, dataclasses.Field[Any]], where: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in known:
            raise UsageError(f"{where}: {name!r} can't be set here{_near(name, known)}")
        # YAML 1.1 reads a bare `off` as a boolean.
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        values[name] = _parsed(known[name], text, f"{where}: {name}: {text}")
    return values


def _parsed(setting: dataclasses.Field[Any], value: Any, said: str) -> Any:
    kind: Kind = setting.metadata["kind"]
    try:
        if value is None or isinstance(value, (bool, dict, list)):
            raise ValueError
        return kind.parse(str(value).strip())
    except (ValueError, UsageError):
        raise UsageError(f"{said} is not accepted: {setting.name} takes {kind.accepts}") from None


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _normal(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def _lies_under(path: str, prefix: str) -> bool:
    """Whether `path` is `prefix` or below it, by whole components."""
    return (_normal(path) + "/").startswith(prefix.rstrip("/") + "/")
