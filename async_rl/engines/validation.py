"""Pure: what every engine refuses at `submit`."""

from __future__ import annotations

from async_rl.engines.protocol import Request


def check(request: Request, *, vocabulary: int, max_length: int) -> None:
    """Raises ValueError naming the field, the value and the bound. `max_length` 0: no bound."""
    prompt = request.prompt
    if not prompt:
        raise ValueError(f"request {request.id}: prompt = (): write at least one token")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        position, token = next((i, t) for i, t in enumerate(prompt) if not 0 <= t < vocabulary)
        raise ValueError(f"request {request.id}: prompt[{position}] = {token}: the vocabulary is 0 to {vocabulary - 1}")
    if request.max_new_tokens < 1:
        raise ValueError(f"request {request.id}: max_new_tokens = {request.max_new_tokens}: write 1 or more")
    check_length(request, max_length)
    if request.temperature < 0:
        raise ValueError(f"request {request.id}: temperature = {request.temperature}: write 0 or more")
    if request.segment_tokens is not None and request.segment_tokens < 1:
        raise ValueError(f"request {request.id}: segment_tokens = {request.segment_tokens}: write 1 or more, or None")


def check_length(request: Request, max_length: int) -> None:
    """Raises ValueError if prompt and completion could outgrow a slot. `max_length` 0: no bound."""
    if max_length and len(request.prompt) + request.max_new_tokens > max_length:
        raise ValueError(
            f"request {request.id}: max_new_tokens = {request.max_new_tokens} after a prompt of {len(request.prompt)}: "
            f"a sequence holds at most {max_length} tokens"
        )
