"""What the services of a run prove themselves with: files that only their owner reads, never logged.

    secrets/              0700, made whole or not at all
      controller.key      key pair of the controller, and the public keys it accepts
      generator.key       public key of the controller, key pair of all generators
      learner.key         the same for the learner
      token               bearer token of the HTTP endpoint

The controller makes them when it starts, if they are not there: a restarted one has the keys that its peers know. A
worker needs the file of its role and nothing else.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
import zmq

from async_rl.errors import UserError

Key: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")]
"""In Z85."""
Role: TypeAlias = Literal["generator", "learner"]
ROLES: tuple[Role, ...] = ("generator", "learner")
CONTROLLER, TOKEN = "controller.key", "token"
TOKEN_BYTES = 24

T = TypeVar("T", bound=msgspec.Struct)


class ServerKeys(msgspec.Struct, frozen=True):
    """Of the controller."""

    public: Key
    secret: Key
    allowed: dict[Role, Key]
    """Public keys of the peers, one per role and stream."""

    def __repr__(self) -> str:
        return f"ServerKeys({self.public!r})"


class ClientKeys(msgspec.Struct, frozen=True):
    """Of one role."""

    controller: Key
    """Public key that the controller has to prove."""
    public: Key
    secret: Key
    origin: str = ""
    """The file they were read from, for messages."""

    def __repr__(self) -> str:
        return f"ClientKeys({self.public!r})"


class RunSecrets:
    """The directory. Making one reads and writes nothing; every method raises UserError naming the file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def make(self) -> ServerKeys:
        """The controller's keys, made with all others where there are none: who comes second uses what is there."""
        if not self.directory.exists():
            self._make()
        return self.server()

    def _make(self) -> None:
        if not zmq.has("curve"):
            raise UserError("this build of pyzmq has no CURVE: pip install --force-reinstall pyzmq, which brings it")
        try:
            with tempfile.TemporaryDirectory(prefix=f".{self.directory.name}-", dir=self.directory.parent) as draft:
                whole = Path(draft) / "whole"
                whole.mkdir(0o700)
                for name, content in _new().items():
                    _write(whole / name, content)
                whole.rename(self.directory)
        except OSError as error:
            if not self.directory.exists():
                raise UserError(f"{self.directory}: cannot be made ({error.strerror})") from None

    def server(self) -> ServerKeys:
        keys = _decode(path := self.directory / CONTROLLER, ServerKeys)
        if missing := set(ROLES) - set(keys.allowed):
            raise UserError(
                f"{path}: it has no key for {', '.join(sorted(missing))}: remove {self.directory} for new ones"
            )
        return keys

    def client(self, role: Role) -> ClientKeys:
        path = self.directory / f"{role}.key"
        return msgspec.structs.replace(_decode(path, ClientKeys), origin=str(path))

    @property
    def token_file(self) -> Path:
        return self.directory / TOKEN

    def token(self) -> str:
        found = _read(self.token_file).decode(errors="replace").strip()
        if len(found) < TOKEN_BYTES or not found.isascii():
            raise UserError(f"{self.token_file}: this is no token: write {TOKEN_BYTES} random characters or more")
        return found


def _new() -> dict[str, bytes]:
    pairs = {name: [key.decode() for key in zmq.curve_keypair()] for name in ("controller", *ROLES)}
    public, secret = pairs["controller"]
    files: dict[str, msgspec.Struct] = {
        CONTROLLER: ServerKeys(public, secret, {role: pairs[role][0] for role in ROLES})
    }
    files |= {f"{role}.key": ClientKeys(public, *pairs[role]) for role in ROLES}
    return {name: msgspec.json.encode(content) for name, content in files.items()} | {
        TOKEN: secrets.token_urlsafe(TOKEN_BYTES).encode()
    }


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content + b"\n")
        file.flush()
        os.fsync(descriptor)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; the controller makes it when it starts: start it first, or copy the file from its "
            "run directory and name the folder with --secrets"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if mode & 0o077:
        raise UserError(f"{path}: others may read it (mode {mode:04o}): chmod 600 {path}, or make new ones")
    return content


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(_read(path), type=kind)
    except msgspec.DecodeError as error:
        raise UserError(f"{path}: this is no key of a run ({error}): copy it again from the controller's") from None
