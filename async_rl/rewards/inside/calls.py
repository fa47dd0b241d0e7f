"""Python objects of another process: tests here, the program there, and only plain values pass between them.

    program = Peer(socket)                      here (the examiner)
    names = program.request("load")             {"solve": <function of the program>, "LIMIT": 100, ...}
    names["solve"]([3, 1, 2])                   [1, 2, 3]: a list of this process

Plain values (numbers, texts, lists, tuples, sets, dicts, None, Decimal, Fraction) are copied, and a list, set or dict
that a call changed is changed here too. Everything else stays where it is, and a Remote stands for it. A Remote is
never equal to a plain value, and computes with none: an object of the program that claims to be equal to everything is
not.
"""

from __future__ import annotations

import builtins
import json
import math
import operator
import socket
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, NoReturn, cast

from async_rl.rewards.inside.channel import HEADER, pack

MAX_MESSAGE = 64 << 20
Json = Any


class Gone(BaseException):
    """The other process ended, or spoke nonsense. No test's `except Exception` swallows it."""


class OutOfTime(BaseException):
    """The other process did not answer before the deadline."""


class Unsupported(BaseException):
    """A test does what cannot be passed on."""


class Remote:
    """An object of the other process."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__", "__class_getitem__"):
            raise AttributeError(name)  # protocols of Python's own, such as copying, are not for it
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return cast(Peer, object.__getattribute__(self, "_peer")).call(self, arguments, named)

    def __len__(self) -> int:
        return _plain(int, _ask(self, "len"))

    def __str__(self) -> str:
        return _plain(str, _ask(self, "str"))

    def __repr__(self) -> str:
        return _plain(str, _ask(self, "repr"))

    def __bool__(self) -> bool:
        return bool(_plain(int, _ask(self, "bool")))

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __iter__(self) -> Iterator[Any]:
        return cast(Iterator[Any], _ask(self, "iter"))

    def __next__(self) -> Any:
        return _ask(self, "next")

    def __enter__(self) -> Any:
        return _ask(self, "enter")

    def __exit__(self, *_: object) -> None:
        _ask(self, "exit")

    def __instancecheck__(self, other: Any) -> bool:
        return isinstance(other, Remote) and bool(_ask(self, "instancecheck", other))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(_ask(self, "eq", other))

    def __lt__(self, other: object) -> bool:
        return bool(_ask(self, "lt", other)) if isinstance(other, Remote) else NotImplemented

    def __hash__(self) -> int:
        return _plain(int, _ask(self, "hash"))


def _ask(remote: Remote, operation: str, *arguments: Any) -> Any:
    return cast(Peer, object.__getattribute__(remote, "_peer")).request(operation, remote, *arguments)


def _plain(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _enter(target: Any) -> Any:
    return type(target).__enter__(target)


def _exit(target: Any) -> None:
    type(target).__exit__(target, None, None, None)


def _isinstance(target: Any, other: Any) -> bool:
    return isinstance(other, target)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "len": len,
    "str": str,
    "repr": repr,
    "bool": bool,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "iter": iter,
    "next": next,
    "enter": _enter,
    "exit": _exit,
    "instancecheck": _isinstance,
    "eq": operator.eq,
    "lt": operator.lt,
    "hash": hash,
}


class Peer:
    """One end. The program's end serves every operation on its objects; the examiner's only calls of functions that a
    test passed along."""

    def __init__(self, connection: socket.socket, serve: Callable[[], Any] | None = None) -> None:
        """serve: what "load" does; only the program's end has it."""
        self._connection, self._load = connection, serve
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        """id -> place in `_objects`, which keeps it alive."""
        self._exceptions: dict[str, type[BaseException]] = {}
        self.deadline: float | None = None
        """In time.monotonic()."""
        self.broken: BaseException | None = None
        """Why there will be no further answer; a test may have swallowed it."""

    # --- asking -----------------------------------------------------------------------------------------------------

    def request(self, operation: str, *arguments: Any) -> Any:
        """Raises what the other process raised (as an exception of its name), Gone, OutOfTime, Unsupported."""
        self._send(["?", operation, [self._encode(argument) for argument in arguments]])
        while True:
            message = self._receive()
            try:
                kind = message[0]
                value = self._decode(message[1]) if kind == "=" else None
                raised = self._exception(message[1], message[2]) if kind == "!" else None
                asked = (message[1], message[2]) if kind == "?" else None
            except (
                ValueError,
                TypeError,
                KeyError,
                IndexError,
                AttributeError,
                ArithmeticError,
                RecursionError,
            ) as error:
                self._fail(Gone(f"the program answered nonsense: {error}"))
            if raised is not None:
                raise raised
            if asked is None:
                return value
            self._answer(*asked)

    def call(self, function: Remote, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        result, changed = self.request("call", function, list(arguments), named)
        for place, value in changed:
            _overwrite(arguments[place], value)
        return result

    # --- answering --------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until the other end is closed."""
        try:
            while True:
                _, operation, arguments = self._receive()
                self._answer(operation, arguments)
        except Gone:
            return

    def _answer(self, operation: str, arguments: list[Json]) -> None:
        try:
            decoded = [self._decode(argument) for argument in arguments]
            self._send(["=", self._encode(self._perform(operation, decoded))])
        except (SystemExit, Gone, OutOfTime):
            raise
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            self._send(["!", names, str(error)[:2000]])

    def _perform(self, operation: str, arguments: list[Any]) -> Any:
        if operation == "call":
            function, given, named = arguments
            before = [self._encode(one) for one in given]
            result = function(*given, **named)
            changed = [
                [place, one]
                for place, one in enumerate(given)
                if isinstance(one, (list, dict, set, bytearray)) and self._encode(one) != before[place]
            ]
            return result, changed
        if self._load is None:
            raise PermissionError(operation)
        return self._load() if operation == "load" else OPERATIONS[operation](*arguments)

    # --- values -----------------------------------------------------------------------------------------------------

    def _encode(self, value: Any) -> Json:
        if value is None or isinstance(value, (bool, str)):
            return str(value) if isinstance(value, str) else value
        if isinstance(value, Remote):
            return ["yours", object.__getattribute__(value, "_number")]
        if isinstance(value, Fraction):
            return ["fraction", hex(value.numerator), hex(value.denominator)]
        if isinstance(value, Decimal):
            return ["decimal", str(value)]
        if isinstance(value, Integral):
            number = int(value)
            return number if abs(number) < 1 << 62 else ["int", hex(number)]
        if isinstance(value, Real):
            number = float(value)
            return number if math.isfinite(number) else ["float", repr(number)]
        if isinstance(value, complex):
            return ["complex", repr(value.real), repr(value.imag)]
        if isinstance(value, (bytes, bytearray)):
            return [type(value).__name__, value.hex()]
        for kind in (list, tuple, set, frozenset):
            if isinstance(value, kind):
                return [kind.__name__, *(self._encode(one) for one in cast("list[Any]", value))]
        if isinstance(value, dict):
            pairs = cast("dict[Any, Any]", value).items()
            return ["dict", *([self._encode(key), self._encode(one)] for key, one in pairs)]
        if isinstance(value, range):
            return ["range", value.start, value.stop, value.step]
        if isinstance(value, (KeysView, ItemsView, ValuesView)):
            return self._encode(list(cast("Iterable[Any]", value)))
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", [kind.__name__ for kind in value.__mro__]]
        if self._load is None and not callable(value):
            raise Unsupported(f"the test passes a {type(value).__name__} to the program: pass plain values")
        return ["mine", self._number(value)]

    def _number(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._numbers[id(value)]

    def _decode(self, value: Json) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = cast("list[Any]", value)
        if kind == "mine":
            return Remote(self, int(rest[0]))
        if kind == "yours":
            return self._objects[rest[0]]
        if kind == "int":
            return int(rest[0], 16)
        if kind == "fraction":
            return Fraction(int(rest[0], 16), int(rest[1], 16))
        if kind == "decimal":
            return Decimal(rest[0])
        if kind == "float":
            return float(rest[0])
        if kind == "complex":
            return complex(float(rest[0]), float(rest[1]))
        if kind in ("bytes", "bytearray"):
            return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(rest[0])
        if kind == "exception":
            return self._class(rest[0])
        if kind == "range":
            return range(*rest)
        if kind == "dict":
            return {self._decode(key): self._decode(one) for key, one in rest}
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(self._decode, rest))

    def _class(self, names: list[str]) -> type[BaseException]:
        """The exception class of that name: Python's own, or one made here of the same ancestors."""
        name = names[0]
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, BaseException):
            return known if issubclass(known, Exception) else RuntimeError
        if name not in self._exceptions:
            parent = self._class(names[1:]) if len(names) > 1 else Exception
            self._exceptions[name] = cast("type[BaseException]", type(name, (parent,), {}))
        return self._exceptions[name]

    def _exception(self, names: list[str], text: str) -> BaseException:
        try:
            return self._class([str(name) for name in names])(text)
        except TypeError:  # UnicodeDecodeError and its like want more
            return RuntimeError(f"{names[0]}: {text}")

    # --- the wire ---------------------------------------------------------------------------------------------------

    def _send(self, message: Json) -> None:
        if self.broken is not None:
            raise self.broken
        try:
            self._wait(self._connection.sendall, pack(message))
        except RecursionError:
            raise Unsupported("a value is nested too deeply") from None

    def _receive(self) -> list[Json]:
        (size,) = HEADER.unpack(self._exactly(HEADER.size))
        if size > MAX_MESSAGE:
            self._fail(Gone(f"the program answered with {size >> 20} MiB"))
        try:
            message = json.loads(self._exactly(size))
        except (ValueError, RecursionError) as error:
            self._fail(Gone(f"the program answered nonsense: {error}"))
        if not isinstance(message, list) or not message:
            self._fail(Gone("the program answered nonsense"))
        return cast("list[Json]", message)

    def _exactly(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            part = self._wait(self._connection.recv, min(size, 1 << 20))
            if not part:
                self._fail(Gone("the program ended"))
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, operation: Callable[..., Any], argument: Any) -> Any:
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                self._fail(OutOfTime("time"))
            self._connection.settimeout(left)
        try:
            return operation(argument)
        except socket.timeout:  # noqa: UP041 - another class before Python 3.10
            self._fail(OutOfTime("time"))
        except OSError:
            self._fail(Gone("the program ended"))

    def _fail(self, error: BaseException) -> NoReturn:
        self.broken = error
        raise error from None


def _overwrite(target: Any, value: Any) -> None:
    """What the program did to its copy of an argument."""
    if isinstance(target, (list, bytearray)):
        target[:] = value
    elif isinstance(target, (dict, set)):
        cast("dict[Any, Any]", target).clear()
        cast("dict[Any, Any]", target).update(value)
