"""TRL's GRPO loss on given tensors: the method of the real trainer, called on the few attributes it reads."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from trl import GRPOTrainer

SETTINGS: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo_is": {"loss_type": "dapo", "epsilon_high": 0.28, "use_vllm": True},
    "grpo": {"loss_type": "grpo"},
    "grpo_kl": {"loss_type": "grpo", "beta": 0.04},
    "grpo_opsm": {"loss_type": "grpo", "beta": 0.001, "off_policy_mask_threshold": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"},
    "sapo": {"loss_type": "sapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}
"""Configurations of TRL, by the name a benchmark row gives. `dapo_is` multiplies by a ready importance ratio."""


class TRLLoss:
    """Callable: builds TRL's loss for one batch of `[B, L]` tensors."""

    def __init__(self, setting: str, max_completion_length: int) -> None:
        values = SETTINGS[setting]
        beta = values.get("beta", 0.0)
        args = SimpleNamespace(
            delta=None, use_bias_correction_kl=True, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            steps_per_generation=1,
        )  # fmt: skip
        self.fields: dict[str, Any] = {
            "args": args, "beta": beta, "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "epsilon_low": 0.2,
            "epsilon_high": 0.2, "importance_sampling_level": "token", "off_policy_mask_threshold": None,
            "use_vllm": False, "vllm_importance_sampling_correction": True, "_entropy_bonus_enabled": False,
            "current_gradient_accumulation_steps": 1, "max_completion_length": max_completion_length,
            "model": SimpleNamespace(training=True), "accelerator": Accelerator(cpu=True),
            "get_off_policy_mask": GRPOTrainer.get_off_policy_mask,
        } | values  # fmt: skip

    def __call__(self, inputs: dict[str, Tensor], logp_BL: Tensor, entropy_BL: Tensor) -> Tensor:
        """Scalar loss; `inputs` as the trainer's own batch, whose forward pass is replaced by the given log-probs."""

        def forward(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
            return logp_BL, entropy_BL, None

        trainer = SimpleNamespace(
            **self.fields, _get_per_token_logps_and_entropies=forward, _metrics={"train": defaultdict(list)}
        )
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def trl_inputs(
    mask_BL: Tensor, old_BL: Tensor, reference_BL: Tensor, advantages_B: Tensor, ratio_BL: Tensor
) -> dict[str, Tensor]:
    empty = torch.zeros(mask_BL.shape[0], 0, dtype=torch.int64)
    return {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": torch.zeros_like(mask_BL, dtype=torch.int64),
        "completion_mask": mask_BL.long(), "advantages": advantages_B, "old_per_token_logps": old_BL,
        "sampling_per_token_logps": old_BL, "ref_per_token_logps": reference_BL,
        "importance_sampling_ratio": ratio_BL, "num_items_in_batch": mask_BL.sum(),
    }  # fmt: skip
