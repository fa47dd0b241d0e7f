"""Events for browsers: gathered, encoded once, and nobody is waited for. What a page is told of rows and tokens."""

from __future__ import annotations

import asyncio
import doctest
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from async_rl import config
from async_rl.errors import UserError
from async_rl.telemetry import dashboard, token_text
from async_rl.telemetry.feed import INTERVAL_S, MAX_WAITING, Feed
from async_rl.telemetry.reading import telling
from async_rl.telemetry.token_text import HEAD, NOT_SAMPLED, TAIL, load_decoder, pieces
from async_rl.wire.messages import Sequence, TrainRollout, VersionSpan

Virtual = Callable[[Any], Any]
TINY = config.Model(tiny=config.TinyModel(characters="0123456789="))


def made() -> Feed:
    feed = Feed(asyncio.get_running_loop().time)
    feed.look = lambda rows: {"rows": rows}
    return feed


async def event(events: AsyncIterator[bytes]) -> tuple[str, Any]:
    async with asyncio.timeout(100):
        text = (await anext(events)).decode()
    assert text.endswith("\n\n") and text.count("\n") == 3, "one event is three lines"
    kind, data, *_ = text.split("\n")
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_steps_are_gathered_and_everything_else_is_told_at_once(virtual: Virtual) -> None:
    async def main() -> None:
        feed = made()
        feed.tell("step", {"version": 0})
        events = feed.events(lambda: {"rows": ["all so far"]})
        assert await event(events) == ("start", {"rows": ["all so far"]}), "and not once more as news"
        for version in (1, 2, 3):
            feed.tell("step", {"version": version, "reward": float("nan")})
        await asyncio.sleep(INTERVAL_S)
        feed.tell("step", {"version": 4})
        kind, data = await event(events)
        assert kind == "update" and [row["version"] for row in data["rows"]] == [1, 2, 3, 4]
        assert data["rows"][0]["reward"] is None, "JSON has no NaN"
        feed.tell("step", {"version": 5})
        feed.tell("say", "two\nlines \x1b[31m")
        _, data = await event(events)
        assert [row["version"] for row in data["rows"]] == [5] and data["said"][0]["text"] == "two lines [31m"
        feed.tell("ready", {"not": "for browsers"})
        feed.close("stopped")
        assert (await event(events))[1]["ended"] == "stopped"
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    virtual(main())


def test_a_browser_that_does_not_read_is_let_go_and_the_others_are_not(virtual: Virtual) -> None:
    async def main() -> None:
        feed = made()
        slow, quick = feed.events(dict), feed.events(dict)
        await event(slow)
        await event(quick)
        for number in range(MAX_WAITING + 2):
            feed.tell("say", str(number))
            assert (await event(quick))[1]["said"][0]["text"] == str(number)
        heard = [one async for one in slow]
        assert 0 < len(heard) <= MAX_WAITING, "what it had not read, and then its end"

    virtual(main())


def test_nobody_watches_nothing_is_looked_at(virtual: Virtual) -> None:
    async def main() -> None:
        feed = made()
        feed.look = lambda rows: pytest.fail("nobody asked")
        feed.tell("step", {"version": 1})
        feed.tell("pulse", {"stage": "training"})
        assert feed.pulse == {"stage": "training"}

    virtual(main())


def row(version: int) -> dict[str, Any]:
    lag = {"mean": 1.0, "max": 2, "tokens": {"1": 5}}
    return {"version": version, "wall_s": 2.0 * version, "reward": 0.5, "lag": lag, "epoch": 1, "other": 3}


def test_a_long_run_begins_with_chosen_steps_and_the_last_ones() -> None:
    found = dashboard.history([row(version) for version in range(5000)])
    assert len(found) <= dashboard.MAX_ROWS
    assert [one["version"] for one in found[-dashboard.RECENT_STEPS :]] == list(range(4990, 5000))
    assert found[0]["step_s"] is None and found[1]["step_s"] == found[-1]["step_s"] == 2.0, "of one step"
    assert "other" not in found[0] and found[0]["lag_tokens"] == {"1": 5}
    assert dashboard.history([]) == []


def test_news_know_the_step_before_them() -> None:
    assert [one["step_s"] for one in dashboard.points([row(4), row(5)], row(3))] == [2.0, 2.0]
    assert dashboard.points([row(4)], None)[0]["step_s"] is None


def sequence(tokens: list[int], *spans: tuple[int, int, int]) -> Sequence:
    found = np.array(tokens, np.int32).tobytes()
    return Sequence(found, b"\0" * len(found), [VersionSpan(*span, span[2]) for span in spans])


def test_tokens_are_text_by_the_version_that_wrote_them() -> None:
    decode = load_decoder(TINY)
    assert pieces(sequence([1, 6, 13, 4, 5, 2], (3, 5, 7), (5, 6, 8)), decode) == [
        (NOT_SAMPLED, "<bos>3="),
        (7, "12"),
        (8, "<eos>"),
    ]
    long = sequence([3] * 2000, (10, 1990, 4))
    parts = pieces(long, decode)
    assert parts[2] == (NOT_SAMPLED, f"\n[... {2000 - HEAD - TAIL:,} tokens ...]\n")
    assert sum(len(part.text) for part in parts if part.version == 4) == HEAD + TAIL - 20


@given(st.text(max_size=30), st.data())
def test_cut_text_is_the_whole_text(text: str, data: st.DataObject) -> None:
    ids = list(text.encode("utf-8", "surrogatepass"))
    starts = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=4)))

    def decode(tokens: Any) -> str:
        return bytes(tokens).decode(errors="replace")

    assert "".join(token_text.cut(decode, ids, starts)) == decode(ids)


def test_a_real_tokenizer_file_and_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        load_decoder(config.Model(path=str(tmp_path)))
    backend = Tokenizer(models.WordLevel({"▁two": 0, "▁words": 1, "<s>": 2}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    decode = load_decoder(config.Model(path=str(tmp_path)))
    assert pieces(sequence([0, 1], (1, 2, 3)), decode) == [(NOT_SAMPLED, "two"), (3, " words")], "the space is not lost"


def test_the_group_that_tells_most() -> None:
    rollouts = [TrainRollout(group, member, reward, []) for group, member, reward in
                ((1, 0, 0.5), (1, 1, 0.5), (2, 0, 0.0), (2, 1, 0.4), (2, 2, 1.0))]  # fmt: skip
    assert [(one.group_id, one.member) for one in telling(rollouts)] == [(2, 0), (2, 2)]
    assert len(telling(rollouts[:2])) == 1


def test_examples() -> None:
    assert doctest.testmod(token_text).failed == 0
