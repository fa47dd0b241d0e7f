"""Deltas are lossless for any change, of any width, and refuse what they are not meant for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.models.parameters import Layout
from async_rl.weights.delta import BLOCK, CHUNK, Delta, apply, compare
from async_rl.weights.errors import WeightsCorrupt


def payloads(elements: int, width: int, changed: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 256, (elements, width), dtype=np.uint8)
    new = base.copy()
    new[changed, draw.integers(0, width, len(changed))] ^= draw.integers(1, 256, len(changed), dtype=np.uint8)
    return torch.from_numpy(base.reshape(-1)), torch.from_numpy(new.reshape(-1))


@settings(max_examples=60)
@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3 * BLOCK), st.integers(0, 99))
def test_base_and_delta_give_the_new_bits(data: st.DataObject, width: int, elements: int, seed: int) -> None:
    places = data.draw(st.lists(st.integers(0, elements - 1), max_size=50, unique=True))
    base, new = payloads(elements, width, places, seed)
    found = compare(base, new, width)
    assert (found.changed, found.elements) == (len(places), elements)
    if found.delta is None:  # too many for so few elements
        assert (2 + width) * len(places) > 0.69 * elements * width - (2 + width)
        return
    kept = base.clone()
    assert torch.equal(apply(found.delta, base, torch.empty_like(base), width), new)
    assert torch.equal(base, kept), "the base is left alone"
    assert torch.equal(apply(found.delta, base, base, width), new), "also in place"


def test_over_several_chunks_and_at_their_edges() -> None:
    elements = 2 * CHUNK + 5
    places = [0, BLOCK - 1, BLOCK, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, elements - 1]
    base, new = payloads(elements, 2, places, 1)
    delta = compare(base, new, 2).delta
    assert delta is not None
    assert torch.equal(apply(delta, base, torch.empty_like(base), 2), new)
    assert delta.layout.nbytes < 4 * (elements // BLOCK + 2) + 4 * len(places) + 8


def test_nothing_changed() -> None:
    base, new = payloads(1000, 2, [], 1)
    found = compare(base, new, 2)
    assert found.fraction == 0 and found.delta is not None
    assert torch.equal(apply(found.delta, base, torch.empty_like(base), 2), new)


def test_minus_zero_and_nan_are_bits_like_any_other() -> None:
    base = torch.tensor([0.0, float("nan"), 1.0], dtype=torch.bfloat16).repeat(100)
    new = base.clone()
    new[0] = -0.0
    assert torch.equal(base, new) is False or base[0] == new[0]  # as numbers they are equal
    found = compare(base.view(torch.uint8), new.view(torch.uint8), 2)
    assert found.changed == 1


def test_what_does_not_belong_to_these_weights_is_refused() -> None:
    base, new = payloads(BLOCK + 10, 2, [3, BLOCK + 9], 1)
    delta = compare(base, new, 2).delta
    assert delta is not None
    for other in (base[: 2 * BLOCK], base[: 2 * BLOCK + 10], torch.zeros(9 * BLOCK, dtype=torch.uint8)):
        with pytest.raises(WeightsCorrupt):
            apply(delta, other, torch.empty_like(other), 2)
    with pytest.raises(WeightsCorrupt, match="counts, places and values, not a"):
        wrong = Layout.pack_up([("a", (4,), torch.uint8)])
        apply(Delta(wrong, torch.zeros(4, dtype=torch.uint8)), base, base.clone(), 2)
