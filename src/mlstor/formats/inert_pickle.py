"""What a pickle holds, with nothing of it carried out: to name tensors in a message, and to find files.

Every class and function that the pickle names becomes an inert stand-in that keeps what it is given. So no code is
imported or run for it, whoever wrote the file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple


class Inert:
    """A stand-in for an object of any class, and for the result of any function.

    Attributes
    ----------
    named : str
        Module and name of what stands in the pickle.
    args : tuple
        What it was called with.
    items : dict
        What was put in by key, or by number for what was appended.
    state : object
        What it was told to take as its state.
    """

    named = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.items, self.state = (*args, *kwargs.values()), {}, None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `__new__` has it all, which pickles may call alone."""

    args: tuple[Any, ...]
    items: dict[Any, Any]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    add = append


class Reference(tuple[Any, ...]):
    """A persistent id: what stands outside of the pickle, as a tensor's storage does."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._classes: dict[str, type[Inert]] = {}

    def find_class(self, module_name: str, global_name: str, /) -> type[Inert]:
        named = f"{module_name}.{global_name}"
        if named not in self._classes:
            self._classes[named] = type("Inert", (Inert,), {"named": named})
        return self._classes[named]

    def persistent_load(self, pid: Any) -> Reference:
        return Reference(pid if isinstance(pid, tuple) else (pid,))


def read_inert(data: bytes) -> Any:
    """The object of a pickle, made of built-in values, `Inert` and `Reference`.

    Raises
    ------
    ValueError
        If `data` is no such pickle, or more than one.
    """
    stream = io.BytesIO(data)
    try:
        root = _Unpickler(stream).load()
    except Exception as error:  # a damaged pickle raises whatever an operation on wrong operands raises
        raise ValueError(f"it can't be unpickled: {type(error).__name__}: {error}") from None
    if stream.read(1):
        raise ValueError("bytes follow the pickle that nobody wrote")
    return root


class Stored(NamedTuple):
    """What a pickle says of a storage."""

    #: the first tensor in it, as ``state['model']['w']``
    tensor: str
    #: the device on which it was, as ``cpu`` or ``cuda:0``
    location: str


def stored(data: bytes) -> dict[str, Stored]:
    """The storages that a pickle refers to, by key: ``0`` for the record ``data/0``.

    Parameters
    ----------
    data
        The record ``data.pkl`` of torch.save.

    Raises
    ------
    ValueError
        If `data` is no pickle.
    """
    found: dict[str, Stored] = {}
    for path, reference in _references(read_inert(data)):
        if len(reference) > 3:  # ("storage", class, key, location, number of elements)
            found.setdefault(str(reference[2]), Stored(path, str(reference[3])))
    return found


def _references(root: Any) -> Iterator[tuple[str, Reference]]:
    """Every reference with its path, in the order of the pickle. Without recursion: pickles may be nested deeply."""
    waiting: list[tuple[str, Any]] = [("state", root)]
    seen: set[int] = set()
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Reference):
            yield path, value
            continue
        if isinstance(value, (str, bytes, int, float, type(None))) or id(value) in seen:
            continue
        seen.add(id(value))
        waiting += reversed(list(_parts(path, value)))


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{path}[{_key(key)}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"{path}[{number}]", part) for number, part in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((path, part) for part in value)
    elif isinstance(value, Inert):
        yield from ((path, part) for part in value.args)
        yield from _parts(path, value.items)
        # A module's or dataclass's state: its attributes.
        if isinstance(value.state, dict):
            yield from ((f"{path}.{key}", part) for key, part in value.state.items())
        else:
            yield path, value.state


def _key(key: Any) -> str:
    return repr(key) if isinstance(key, (str, int, float, bytes)) else "..."
