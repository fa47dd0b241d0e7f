"""Presets: what overriding and misspelling does, and that the table in the docs is the code's."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from async_rl.algorithms.objective import Objective
from async_rl.algorithms.presets import PRESETS, preset

DOCS = Path(__file__).parents[2] / "docs"


def test_override_replaces_one_part_only():
    objective = preset("async_default", clip_high=0.4)
    assert objective.clip_high == 0.4
    assert preset("async_default", clip_high=0.28) == Objective() == preset("async_default")


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("gropo", {}, r"preset = 'gropo': did you mean 'grpo'\? known: async_default, .*"),
        ("grpo", {"clip_hihg": 1}, r"clip_hihg = 1: an objective has no such part; did you mean 'clip_high'\?"),
        ("grpo", {"scale": "std"}, r"scale = 'std': write one of 'group', 'batch', 'group_mean', 'none'"),
        ("grpo", {"clip_low": -0.1}, r"clip_low = -0.1: write a number from 0 to inf"),
        ("grpo", {"clip_low": "0.2"}, r"clip_low = '0.2': write a number from 0 to inf"),
        ("grpo", {"ddof": 0.5}, r"ddof = 0.5: write an integer from 0 to 1"),
        ("grpo", {"kl_ratio_weighted": 1}, r"kl_ratio_weighted = 1: write true or false"),
        ("grpo", {"guard": "mask"}, r"guard = 'mask', veto = None with old = 'behaviour': .* set old = 'proximal'.*"),
        ("dapo", {"kl_coef": 0.1}, r"kl_coef = 0.1 with kl = 'none': set kl to 'k1', 'k2' or 'k3'"),
        ("ppo", {"kl_target": 0.0}, r"kl_target = 0.0: write a number above 0"),
        ("ppo", {"kl_target": 6, "kl_horizon": float("inf")}, r"kl_horizon = inf: write a number above 0"),
        ("ppo", {"kl_horizon": 99}, r"kl_horizon = 99 without kl_target: write kl_target = 6.0"),
        ("grpo", {"kl_target": 6}, r"kl_target = 6 with kl = 'k3', kl_in = 'loss', kl_coef = 0.04: .* or no kl_target"),
        ("ppo", {"kl_target": 6, "kl_coef": 0}, r"kl_target = 6 with kl = 'k1', .*, kl_coef = 0: .* or no kl_target"),
        ("async_ppo", {"rho_bar": 0.0}, r"rho_bar = 0.0: write a number from 1e-06 to inf"),
        ("async_ppo", {"c_bar": 2.0}, r"rho_bar = 1.0, c_bar = 2.0: V-trace cuts .*; write c_bar <= rho_bar"),
        (
            "ppo",
            {"rho_bar": 2.0},
            r"rho_bar = 2.0, c_bar = 1.0 with advantage = 'critic': write advantage = 'vtrace'.*",
        ),
        ("gspo", {"advantage": "vtrace"}, r"advantage = 'vtrace' with surrogate = 'gspo', .*: those weigh whole .*"),
        ("async_default", {"clip_low": None}, r"clip_low = None: write a number from 0 to inf"),
    ],
)
def test_errors_name_field_value_and_remedy(name, parts, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        preset(name, **parts)


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match="needs values"):
        preset("ppo").advantages(torch.ones(2), torch.zeros(2, dtype=torch.int64))


def test_what_a_preset_needs():
    assert preset("async_default").needs_proximal and not preset("a3po").needs_proximal
    assert preset("kimi_k1_5").needs_proximal and not preset("cispo").needs_proximal
    assert preset("grpo").needs_reference and not preset("dapo").needs_reference
    assert preset("ppo").needs_critic and not preset("grpo").needs_critic
    assert preset("async_ppo").needs_critic and preset("async_ppo").needs_current and not preset("ppo").needs_current


def test_a_ratio_weighs_a_token_once():
    """V-trace's rho goes into the advantage where the loss has none of its own."""
    without = {name for name, entry in PRESETS.items() if not entry.objective.has_ratio}
    assert without == {
        "impala", "reinforce", "rloo", "raft", "expert_iteration", "kimi_k1_5", "kimi_squared",
    }  # fmt: skip


def test_the_table_in_the_docs_is_generated_from_the_code():
    spec = importlib.util.spec_from_file_location("generate_algorithms", DOCS / "generate_algorithms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "algorithms.md").read_text() == module.page(), "run python docs/generate_algorithms.py"
    assert all(f"| `{name}` |" in module.page() for name in PRESETS)


def test_modules_on_plain_numbers_import_no_torch():
    modules = [
        "adaptive_kl", "calibration", "curation", "length_reward", "overlong", "overoptimisation",
        "pass_at_k", "repetition", "sampling", "text_rewards", "thinking",
    ]  # fmt: skip
    imports = "; ".join(f"import async_rl.algorithms.{name}" for name in modules)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=DOCS.parent, check=False).returncode == 0
