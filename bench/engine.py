"""Useful tokens per CPU-second of the embedded engine beside transformers, one process, one thread, same weights.

    python bench/engine.py [--model models/smollm2-135m-instruct] [--repeats 3] [--write]

ragged    32 requests in groups of 8 (one prompt each), completion lengths lognormal (median 24, sigma .6, at most 96),
          stop tokens off, so that everyone samples the same number of tokens. `generate` pads: it runs until the
          longest of its batch, and only tokens within a request's own length are useful. `generate_batch` is
          transformers' continuous batching with a limit per request.
products  groups as in the demo, 4 of 8: prompts of 51 tokens, 25 new ones each (the mean at the demo's start). Prompts
          shared by their group, and made distinct in one token each, which is what an engine without shared prefill
          computes; otherwise the same work.

CPU-seconds of the process; medians over the repeats with [min, max], arms in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from stamp import commit
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig
from transformers.utils import logging as transformers_logging

from async_rl.engines.batcher import Batcher
from async_rl.engines.protocol import Request
from async_rl.wire.messages import WeightsId

ROOT = Path(__file__).resolve().parents[1]
GROUPS, SIZE = 4, 8
Work = list[tuple[tuple[int, ...], int]]
"""(prompt, completion length) of each request."""


def products_prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    """reasoning-gym's own wording, 51 tokens under the chat template."""
    wording = "Solve the following multiplication: {}. Give only the result as your final answer."
    questions = [wording.format(product) for product in ("7 * 8", "3 * 9", "6 * 4", "4 * 5")]
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    return [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in rendered]


def ragged(prompts: list[tuple[int, ...]]) -> Work:
    draw = random.Random(1)
    return [(p, max(1, min(96, round(24 * draw.lognormvariate(0, 0.6))))) for p in prompts for _ in range(SIZE)]


def distinct(work: Work, vocabulary: int) -> Work:
    """The same lengths, no two prompts equal."""
    draw = random.Random(2)
    return [((p[0], draw.randrange(3, vocabulary), *p[2:]), n) for p, n in work]


class Ours:
    def __init__(self, model: Any) -> None:
        options = {"slots": GROUPS * SIZE, "max_length": 192, "dtype": model.dtype, "device": torch.device("cpu")}
        self._batcher = Batcher(model.config, **options)
        self._batcher.swap(WeightsId(0, 0), self._batcher.prepare(dict(model.named_parameters())))

    def __call__(self, work: Work) -> int:
        requests = [Request(i, prompt, n, key=i) for i, (prompt, n) in enumerate(work)]
        self._batcher.submit(requests)
        tokens = 0
        while self._batcher.has_work:
            tokens += sum(len(chunk.tokens) for chunk in self._batcher.step())
        return tokens


def generate(model: Any) -> Callable[[Work], int]:
    def run(work: Work) -> int:
        longest, limit = max(len(p) for p, _ in work), max(n for _, n in work)
        ids = torch.zeros((len(work), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(work):  # left-padded
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
        model.generate(ids, attention_mask=mask, min_new_tokens=limit, max_new_tokens=limit, **options)
        return sum(n for _, n in work)

    return run


def generate_batch(model: Any) -> Callable[[Work], int]:
    def run(work: Work) -> int:
        tokens = 0
        settings = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=512)
        generation = model.generation_config
        generation.do_sample, generation.eos_token_id = True, -1
        with model.continuous_batching_context_manager(generation, continuous_batching_config=settings) as manager:
            for prompt, limit in work:
                manager.add_request(list(prompt), max_new_tokens=limit)
            left = len(work)
            while left:
                output = manager.get_result()
                if output is not None and output.is_finished():
                    tokens += len(output.generated_tokens)
                    left -= 1
        return tokens

    return run


def measure(arms: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Tokens per CPU-second of each arm; one unmeasured round first."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            started = time.process_time()
            tokens = arm()
            rate = tokens / (time.process_time() - started)
            if repeat:
                rates[name].append(rate)
                print(f"  {repeat}/{repeats}  {name:<24} {rate:7.1f} useful tokens per CPU-second", flush=True)
    return {
        name: {"median": statistics.median(found), "min": min(found), "max": max(found)}
        for name, found in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    prompts = products_prompts(tokenizer)
    work, products = ragged(prompts), [(prompt, 25) for prompt in prompts for _ in range(SIZE)]
    unshared = distinct(products, len(tokenizer))
    ours, padded, continuous = Ours(model), generate(model), generate_batch(model)
    with torch.no_grad():
        print(f"ragged, {sum(n for _, n in work)} tokens")
        ragged_rates = measure(
            {
                "embedded": lambda: ours(work),
                "generate_batch": lambda: continuous(work),
                "generate": lambda: padded(work),
            },
            options.repeats,
        )
        print("products")
        products_rates = measure(
            {"shared prefill": lambda: ours(products), "unshared prefill": lambda: ours(unshared)},
            options.repeats,
        )
    figures = {"ragged": ragged_rates, "products": products_rates}
    ratios = {
        "embedded / generate_batch": ragged_rates["embedded"]["median"] / ragged_rates["generate_batch"]["median"],
        "embedded / generate": ragged_rates["embedded"]["median"] / ragged_rates["generate"]["median"],
        "shared / unshared": products_rates["shared prefill"]["median"] / products_rates["unshared prefill"]["median"],
    }
    for name, ratio in ratios.items():
        print(f"{name:<28} {ratio:.2f}x")
    if options.write:
        device = f"{platform.processor() or platform.machine()}, 1 thread"
        stamp = {"date": date.today().isoformat(), "commit": commit(), "device": device}
        path = ROOT / "bench" / "results" / "engine_smollm2.json"
        path.write_text(json.dumps(stamp | {"model": options.model.name, **figures, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
