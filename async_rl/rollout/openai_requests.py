"""Pure: what an OpenAI client sends, as a question to the policy, or the reason why it cannot be one.

Parameters that would sample from another distribution than the one that is trained (temperature, top_p, penalties, a
forced tool) are refused, unless they say what holds anyway. For an agent that cannot help sending one, the environment
has it ignored by name: `policy.endpoint(ignore=("temperature",))`. What changes nothing (`user`, `metadata`) passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast


class Refused(Exception):
    """An HTTP status, and an error in OpenAI's form."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, slots=True)
class Question:
    """`messages` of a chat, or the `prompt` of a completion."""

    messages: Sequence[Mapping[str, Any]] = ()
    prompt: str | Sequence[int] = ""
    tools: Sequence[Mapping[str, Any]] = ()
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage_in_stream: bool = False
    logprobs: bool = False


PASSES = frozenset(
    {
        "metadata",
        "model",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "seed",
        "service_tier",
        "store",
        "user",
    }
)
"""Let pass and not heeded: they do not change what is sampled. The run's own seed decides."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "top_p": (1,),
    "verbosity": (),
}
"""Values beside null that say what holds anyway; any other is refused."""

CHAT = frozenset(
    {
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "tool_choice",
        "tools",
    }
)
COMPLETION = frozenset({"logprobs", "max_tokens", "prompt", "stop", "stream", "stream_options", "temperature"})
IGNORABLE = frozenset({*NEUTRAL, "temperature", "tool_choice"})


def read_chat(body: object, temperature: float | None, ignore: frozenset[str]) -> Question:
    """
    Args:
        temperature: that is trained at; None: any may be asked for, as nothing is trained on.
        ignore: parameters that are dropped.

    Raises:
        Refused: naming the parameter, its value and what to write instead.
    """
    given = _given(body, CHAT, temperature, ignore)
    messages = given.pop("messages", None)
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) for m in cast(list[Any], messages))
    ):
        raise Refused("messages: write a list of messages, at least one", "messages")
    tools = _typed(given, "tools", list, "a list of tools") or []
    choice = given.pop("tool_choice", None)
    if choice not in (None, "auto", "none"):
        raise Refused(
            f"tool_choice = {choice!r}: the policy cannot be made to call a tool, what it writes is sampled; write "
            "'auto' or 'none'",
            "tool_choice",
        )
    limits = [_number(given, name) for name in ("max_completion_tokens", "max_tokens")]
    return Question(
        messages=cast(list[dict[str, Any]], messages),
        tools=[] if choice == "none" else tools,
        max_new_tokens=next((limit for limit in limits if limit is not None), None),
        logprobs=bool(given.pop("logprobs", False)),
        **_shared(given),
    )


def read_completion(body: object, temperature: float | None, ignore: frozenset[str]) -> Question:
    """The same for /v1/completions: one text, or the token ids of one."""
    given = _given(body, COMPLETION, temperature, ignore)
    prompt: Any = given.pop("prompt", None)
    if isinstance(prompt, list) and len(cast(list[Any], prompt)) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    ids = isinstance(prompt, list) and all(type(token) is int for token in cast(list[Any], prompt))
    if not prompt or not (isinstance(prompt, str) or ids):
        raise Refused("prompt: write one text, or one list of token ids, not empty", "prompt")
    logprobs = given.pop("logprobs", None)
    if logprobs not in (None, False, 0, 1):
        raise Refused(f"logprobs = {logprobs}: only those of sampled tokens are known; write 0 or 1", "logprobs")
    return Question(
        prompt=cast("str | list[int]", prompt),
        max_new_tokens=_number(given, "max_tokens"),
        logprobs=logprobs is not None and logprobs is not False,
        **_shared(given),
    )


def _given(body: object, known: frozenset[str], temperature: float | None, ignore: frozenset[str]) -> dict[str, Any]:
    """What is left to read, once everything that may pass has passed."""
    if not isinstance(body, dict):
        raise Refused("the body is no JSON object")
    given = {
        name: value
        for name, value in cast(dict[str, Any], body).items()
        if value is not None and name not in PASSES and name not in ignore
    }
    for name in list(given):
        if name == "temperature":
            if given.pop(name) != temperature and temperature is not None:
                raise Refused(
                    f"temperature = {body[name]!r}: this run samples and trains at {temperature:g}; leave it out, or "
                    'have it ignored: policy.endpoint(ignore=("temperature",))',
                    name,
                )
        elif name in NEUTRAL:
            value = given.pop(name)
            if value not in NEUTRAL[name]:
                raise Refused(
                    f"{name} = {value!r}: it would change what the policy samples, or ask for what is not sampled; "
                    f'leave it out, or have it ignored: policy.endpoint(ignore=("{name}",))',
                    name,
                )
        elif name not in known:
            raise Refused(f"{name}: there is no such parameter here; leave it out", name)
    return given


def _shared(given: dict[str, Any]) -> dict[str, Any]:
    stop: Any = given.pop("stop", ())
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) and s for s in cast(list[Any], stop)):
        raise Refused(f"stop = {stop!r}: write a text or a list of texts, none of them empty", "stop")
    options = _typed(given, "stream_options", dict, "an object") or {}
    return {
        "stop": tuple(cast(list[str], stop)),
        "stream": bool(given.pop("stream", False)),
        "usage_in_stream": bool(options.get("include_usage", False)),
    }


def _number(given: dict[str, Any], name: str) -> int | None:
    value = given.pop(name, None)
    if value is not None and (type(value) is not int or value < 1):
        raise Refused(f"{name} = {value!r}: write a whole number above 0", name)
    return value


def _typed(given: dict[str, Any], name: str, kind: type, what: str) -> Any:
    value = given.pop(name, None)
    if value is not None and not isinstance(value, kind):
        raise Refused(f"{name} = {value!r}: write {what}", name)
    return value
