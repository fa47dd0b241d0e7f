"""Of `async-rl` and its services."""

EXIT_FAILED, EXIT_WRONG_INPUT = 1, 2
EXIT_AGAIN = 75
"""Whoever started this should start it again: its machine is wanted back; or, of a service, the controller had given up
on it or is a new one, or code of the environment blocks it."""
EXIT_STOPPED = 130
"""Somebody asked it to stop; it can be continued."""
