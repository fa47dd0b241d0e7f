"""The error tree.

AsyncRLError
├── UserError        input we were given is wrong: one line on stderr, exit code 2
│   └── MissingExtra an optional package is not installed
├── ProtocolError    a peer broke the wire contract (proto/README.md)
├── GradingFailed    a grader hung, died or could not be set up: there is no verdict
├── IllegalTransition  a rollout, or the turn on a device, was moved along an edge its state machine does not have
└── LedgerCorrupt    a record on disk does not decode or breaks conservation
"""

from __future__ import annotations

import importlib
from types import ModuleType


class AsyncRLError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(AsyncRLError):
    """Bad input: says the field, the value and what to write instead, in one line."""


class MissingExtra(UserError):
    """A feature was asked for whose optional packages are not installed."""


class ProtocolError(AsyncRLError):
    """A peer sent something the wire contract does not allow."""


class GradingFailed(AsyncRLError):
    """There is no verdict: the grader hung, died or could not be set up. Says which, and with what."""


class IllegalTransition(AsyncRLError):
    """Something was asked to take a step its state machine does not have."""


class LedgerCorrupt(AsyncRLError):
    """What the ledger holds contradicts itself."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or say which extra of this package brings it.

    Raises:
        MissingExtra: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(
            f"{purpose} needs the package '{module.split('.')[0]}': pip install 'async-rl[{extra}]'"
        ) from None
