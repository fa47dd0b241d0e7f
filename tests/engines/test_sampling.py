from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_rl.engines import draw, sampling

INT64S = st.integers(0, 2**64 - 1)


@given(key=INT64S, position=st.integers(0, 2**40))
def test_python_numpy_and_torch_agree_bit_for_bit(key: int, position: int) -> None:
    expected = sampling.uniform(key, position)
    assert 0 <= expected < 1
    assert sampling.uniforms(key, np.array([position]))[0] == expected
    keys, positions = torch.tensor([draw.signed(key)]), torch.tensor([position])
    assert draw.uniforms(keys, positions).item() == expected


def test_known_values() -> None:
    """SplitMix64 with seed 1234567, as published in its reference implementation."""
    outputs = [sampling.mix(1234567 + n * sampling.GOLDEN) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_rollout_keys_are_distinct() -> None:
    keys = {sampling.rollout_key(seed, rollout) for seed in range(20) for rollout in range(1000)}
    assert len(keys) == 20_000
    assert sampling.rollout_key(1, 7) == sampling.rollout_key(1, 7)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations from its mean."""
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("along", ["positions", "rollouts", "seeds"])
def test_uniforms_are_uniform(along: str) -> None:
    count, bins = 50_000, 100
    if along == "positions":
        values = sampling.uniforms(sampling.rollout_key(3, 5), np.arange(count))
    elif along == "rollouts":
        values = np.array([sampling.uniform(sampling.rollout_key(3, rollout), 0) for rollout in range(count)])
    else:
        values = np.array([sampling.uniform(sampling.rollout_key(seed, 5), 0) for seed in range(count)])
    histogram = np.histogram(values, bins, (0, 1))[0]
    assert abs(chi_square(histogram, np.full(bins, count / bins))) < 4
    pairs = np.histogram2d(values[:-1], values[1:], 20, ((0, 1), (0, 1)))[0].flatten()
    assert abs(chi_square(pairs, np.full(400, (count - 1) / 400))) < 4


@pytest.mark.parametrize("vocabulary", [7, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_distribution(vocabulary: int, temperature: float) -> None:
    count = 20_000
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(vocabulary, generator=generator) * 3
    probabilities = (logits.double() / temperature).softmax(-1)
    keys = torch.tensor([draw.signed(sampling.rollout_key(4, 4))]).expand(count)
    uniforms = draw.uniforms(keys, torch.arange(count))
    counts = torch.zeros(vocabulary)
    for part in uniforms.split(1000):
        rows = logits.expand(len(part), -1)
        tokens, logprobs = draw.draw(rows, part, torch.full((len(part),), temperature))
        counts += torch.bincount(tokens, minlength=vocabulary)
        assert torch.allclose(logprobs.double(), probabilities.log()[tokens], atol=1e-5)
    usual = probabilities * count >= 10
    observed, expected = counts[usual].double(), probabilities[usual] * count
    observed = torch.cat((observed, counts[~usual].sum().double()[None]))
    expected = torch.cat((expected, (probabilities[~usual].sum() * count + 1e-9)[None]))
    keep = expected > 5
    assert abs(chi_square(observed[keep].numpy(), expected[keep].numpy())) < 4


@pytest.mark.parametrize("vocabulary", [6, 4099])
def test_impossible_tokens_are_never_drawn(vocabulary: int) -> None:
    logits = torch.full((4, vocabulary), float("-inf"))
    allowed = [1, 2, vocabulary - 3]
    logits[:, allowed] = torch.tensor([0.0, -70.0, 1.0])
    for value in (0.0, 2.0**-53, 0.25, 0.9, 1 - 2.0**-53):
        uniforms = torch.full((4,), value, dtype=torch.float64)
        tokens, logprobs = draw.draw(logits, uniforms)
        assert set(tokens.tolist()) <= set(allowed)
        assert logprobs.isfinite().all()
    assert draw.draw(logits, torch.zeros(4, dtype=torch.float64))[0].tolist() == [1] * 4
    last = draw.draw(logits, torch.full((4,), 1 - 2.0**-53, dtype=torch.float64))[0]
    assert last.tolist() == [vocabulary - 3] * 4


def test_greedy_rows_beside_sampled_ones() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    uniforms = torch.zeros(2, dtype=torch.float64)
    tokens, logprobs = draw.draw(logits, uniforms, None, torch.tensor([True, False]))
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])
