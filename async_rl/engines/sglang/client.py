"""The HTTP side of a SGLang server, one method for each endpoint we use (engines.sglang.contract says what they mean).

Every call has a deadline whose error names server and endpoint. Errors:

ServerError
├── ServerGone      it does not answer: dead, not up yet, or cut off
└── ServerRefused   it answered that it will not, and why
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import msgspec

from async_rl.engines.sglang.contract import TESTED
from async_rl.engines.sglang.keys import Keys
from async_rl.errors import AsyncRLError

LINE_BYTES = 1 << 26
"""One event of a call; a cumulative one of 100 thousand tokens takes 5 MB."""
ANSWER_S = 30.0
DONE = b"[DONE]"
BUSY = (429, 502, 503, 504)
"""Status codes of a server or router that may take the call later."""
DONE_STATUS = (200, 202)
"""Done, or, by a router, soon."""
DENIED = (401, 403)
API_KEY, ADMIN_KEY = "generator.sglang.api_key_env", "generator.sglang.admin_api_key_env"
"""What is not right where the status code is one of these, for what only asks or samples and for all the rest."""
NO_REQUEST = "no request of anybody"
"""No id begins so."""
NO_KEYS = Keys()
UNREACHED = 500
"""What a router answers whose server broke off, or is not there."""
MEMORY = ["kv_cache", "weights"]
PauseMode = Literal["retract", "in_place"]


class ServerError(AsyncRLError):
    """Base: a call of a SGLang server failed."""


class ServerGone(ServerError):
    """Nobody answers there."""


class ServerRefused(ServerError):
    """The server's answer was an error; says which."""

    busy = False
    """It may do it later (429, 503)."""
    denied = False
    """It wants another key."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself."""

    version: str
    tp_size: int
    device: str
    max_input: int
    """Tokens of prompt it takes."""
    dp_size: int = 1

    @property
    def untested(self) -> str:
        """What to tell of it where it is another version than this was written for; else nothing."""
        if self.version == TESTED:
            return ""
        return f"is of version {self.version}; async_rl was written for and tested with {TESTED} (docs/sglang.md)"


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a server is; over all its ranks."""

    running: float
    waiting: float
    cache_used: float
    """Share of the KV cache."""
    tokens_per_s: float


class SGLangClient:
    """One server. Made and used on one event loop; the session belongs to whoever made it."""

    kind = "server"

    def __init__(self, url: str, session: aiohttp.ClientSession, keys: Keys = NO_KEYS) -> None:
        self.url = url.rstrip("/")
        self.pauses = 0
        """Leases (engines.sglang.lease) that keep it paused."""
        self.empty = False
        """It gave its memory back: it stays paused until it has weights again."""
        self._session = session
        self._headers, self._admin_headers = _bearer(keys.api), _bearer(keys.admin)
        self._fields = (API_KEY, ADMIN_KEY)

    # --- sampling ---------------------------------------------------------------------------------------------

    async def generate(self, body: dict[str, Any], url: str = "") -> AsyncGenerator[dict[str, Any]]:
        """Events of a call; without `stream`, one for each of its requests, when all have ended. url: of a router to
        ask in place of this server.

        There is no deadline for the whole of it: a rollout may take hours. Closing it aborts the call on the server.

        Raises:
            ServerGone, ServerRefused
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_S)
        who = f"SGLang router {url}, generate" if url else f"SGLang server {self.url}, generate"
        try:
            async with self._session.post(
                f"{url or self.url}/generate", json=body, timeout=timeout, headers=self._headers
            ) as response:
                if response.status != 200:
                    refusal = await _refusal(who, response, API_KEY)
                    if url and response.status == UNREACHED:
                        raise ServerGone(str(refusal))
                    raise refusal
                if not body["stream"]:
                    answer: Any = msgspec.json.decode(await response.read())
                    for event in answer if isinstance(answer, list) else [answer]:  # pyright: ignore[reportUnknownVariableType]
                        yield event
                    return
                while line := await response.content.readline():
                    data = line.removeprefix(b"data:").strip()
                    if not data:
                        continue
                    if data == DONE:
                        return
                    event: dict[str, Any] = msgspec.json.decode(data)
                    if "error" in event:
                        raise ServerRefused(f"{who}: {event['error']}")
                    yield event
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise ServerGone(f"{who}: {str(error) or type(error).__name__}") from error
        raise ServerGone(f"{who}: the answer broke off")

    async def abort(self, rid: str) -> None:
        """Its call ends with the tokens it has. Unknown ids are ignored; a prefix aborts all ids that begin so."""
        await self._post("abort_request", {"rid": rid})

    async def pause(self, mode: PauseMode) -> None:
        """retract: requests return to the queue, their KV may be flushed. in_place: they stay as they are. What comes
        while paused is held."""
        await self._post("pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Harmless where nothing is paused."""
        await self._post("continue_generation", {})

    # --- weights ----------------------------------------------------------------------------------------------

    async def init_group(self, host: str, port: int, size: int, name: str, backend: str, timeout_s: float) -> None:
        """Join the weight group as ranks 1 to size - 1; answers when all are there."""
        body = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": size}
        await self._post("init_weights_update_group", body | {"group_name": name, "backend": backend}, timeout_s)

    async def destroy_group(self, name: str) -> None:
        await self._post("destroy_weights_update_group", {"group_name": name})

    async def begin_update(self) -> None:
        await self._post("begin_weight_update", {})

    async def end_update(self) -> None:
        await self._post("end_weight_update", {})

    async def receive_bucket(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        timeout_s: float,
        *,
        version: str,
        flush: bool,
    ) -> None:
        """Receive one flattened bucket from rank 0 and load it; answers when it is loaded. version: what the weights
        are called then."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": flush,
            "weight_version": version,
        }
        await self._post("update_weights_from_distributed", body, timeout_s)

    async def load_from_disk(self, directory: str, version: str, timeout_s: float, *, flush: bool) -> None:
        body = {"model_path": directory, "weight_version": version, "flush_cache": flush, "load_format": "auto"}
        await self._post("update_weights_from_disk", body, timeout_s)

    async def checksums(self, timeout_s: float) -> list[dict[str, str]]:
        """By rank: parameter of the server's own model -> checksum of its bytes."""
        answer = await self._post("weights_checker", {"action": "checksum"}, timeout_s)
        return [rank["checksums"] for rank in answer["ranks"]]

    async def release_memory(self) -> None:
        """Weights and KV cache leave the device; only while paused, with nothing running."""
        await self._post("release_memory_occupation", {"tags": MEMORY})

    async def take_memory(self) -> None:
        """They come back, with no sensible content. Only after `release_memory`: else the server dies of it."""
        await self._post("resume_memory_occupation", {"tags": MEMORY})

    async def name_weights(self, version: str) -> None:
        """Call what it holds so. Tokens that come afterwards carry the name."""
        await self._post("update_weight_version", {"new_version": version, "abort_all_requests": False})

    # --- what it is and how it is -----------------------------------------------------------------------------

    async def info(self, timeout_s: float = ANSWER_S) -> ServerInfo:
        """Also answers while paused, as /health does not."""
        found = await self._get("server_info", timeout_s)
        return ServerInfo(
            version=str(found.get("version")),
            tp_size=int(found.get("tp_size") or 1),
            device=str(found.get("device") or "cuda"),
            max_input=int(found.get("max_req_input_len") or 0),
            dp_size=int(found.get("dp_size") or 1),
        )

    async def ask_admin(self, timeout_s: float) -> None:
        """Whether what changes the server may be called; changes nothing. Raises ServerError."""
        await self._post("abort_request", {"rid": NO_REQUEST}, timeout_s)

    async def weight_version(self) -> str:
        return str((await self._get("model_info", ANSWER_S))["weight_version"])

    async def takes_requests(self, timeout_s: float = ANSWER_S) -> bool:
        """It is up and not paused. A SGLang too old to say so counts as one that does."""
        try:
            await self._get("ready", timeout_s)
        except ServerRefused as error:
            return not error.busy
        return True

    async def load(self, timeout_s: float = ANSWER_S) -> Load:
        """Also answers while paused."""
        loads: list[dict[str, Any]] = (await self._get("v1/loads", timeout_s))["loads"]
        return Load(
            running=sum(float(one["num_running_reqs"]) for one in loads),
            waiting=sum(float(one["num_waiting_reqs"]) for one in loads),
            cache_used=max((float(one["token_usage"]) for one in loads), default=0.0),
            tokens_per_s=sum(float(one["gen_throughput"]) for one in loads),
        )

    async def _get(self, endpoint: str, timeout_s: float) -> dict[str, Any]:
        return await self._call("GET", endpoint, None, timeout_s)

    async def _post(self, endpoint: str, body: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
        return await self._call("POST", endpoint, body, timeout_s)

    async def _call(self, method: str, endpoint: str, body: Any, timeout_s: float) -> dict[str, Any]:
        who = f"SGLang {self.kind} {self.url}, {endpoint}"
        asks = method == "GET"
        headers, field = (self._headers, self._fields[0]) if asks else (self._admin_headers, self._fields[1])
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(method, f"{self.url}/{endpoint}", json=body, headers=headers) as response,
            ):
                if response.status not in DONE_STATUS:
                    raise await _refusal(who, response, field)
                text = await response.read()
        except TimeoutError as error:
            raise ServerGone(f"{who}: no answer in {timeout_s:.0f} s") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerGone(f"{who}: {str(error) or type(error).__name__}") from error
        answer = msgspec.json.decode(text) if text.startswith(b"{") else {}
        if answer.get("success") is False:
            raise ServerRefused(f"{who}: {answer.get('message')}")
        return answer


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _refusal(who: str, response: aiohttp.ClientResponse, key: str) -> ServerRefused:
    """key: the field of a recipe that names the one that was sent."""
    denied = response.status in DENIED
    instead = f"; write in {key} the name of the environment variable that holds its key" if denied else ""
    refused = ServerRefused(f"{who}: {await _reason(response)}{instead}")
    refused.busy, refused.denied = response.status in BUSY, denied
    return refused


async def _reason(response: aiohttp.ClientResponse) -> str:
    """Of an error answer: the message it carries, in one line."""
    text = (await response.text()).strip()
    try:
        answer = msgspec.json.decode(text)
    except msgspec.DecodeError:
        answer = {}
    if isinstance(answer, dict):
        error = answer.get("error")  # pyright: ignore[reportUnknownMemberType]
        inner = error.get("message") if isinstance(error, dict) else error  # pyright: ignore[reportUnknownMemberType]
        text = str(answer.get("message") or inner or answer.get("detail") or text)  # pyright: ignore[reportUnknownMemberType]
    return f"{response.status} {' '.join(text.split())}"
