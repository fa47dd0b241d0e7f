"""One step of TRL's own trainers on the model and data of bench/peer_steps.py: python trl_steps.py DIRECTORY

Reads model/, sft.jsonl, pairs.jsonl, prompts.jsonl and settings.json there; writes for each of sft, dpo and grpo the
weights after the step and the loss, and for grpo what it sampled. Runs in the peers' environment: nothing of async_rl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    settings = json.loads((directory / "settings.json").read_text())
    for name, step in (("sft", sft), ("dpo", dpo), ("grpo", grpo)):
        model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory / "model")
        tokenizer.chat_template = None
        loss = step(directory, settings, model, tokenizer)
        save_file({n: p.detach().clone() for n, p in model.named_parameters()}, directory / f"{name}.safetensors")
        (directory / f"{name}.json").write_text(json.dumps({"loss": loss}) + "\n")


def common(settings: dict[str, Any], directory: Path, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "trl"), "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
        "max_steps": 1, "learning_rate": settings["learning_rate"], "lr_scheduler_type": "constant",
        "warmup_steps": 0, "optim": "adamw_torch_fused", "adam_beta1": settings["betas"][0], "adam_beta2":
        settings["betas"][1], "adam_epsilon": settings["eps"], "weight_decay": 0.0, "max_grad_norm":
        settings["clip_norm"], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip


def read(path: Path) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])


def logged_loss(trainer: Any) -> float:
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def precise(trainer: Any) -> list[float]:
    """TRL's log rounds the loss: take it as `compute_loss` returns it."""
    losses: list[float] = []
    compute = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    trainer.compute_loss = compute_loss
    return losses


def sft(directory: Path, settings: dict[str, Any], model: Any, tokenizer: Any) -> float:
    rows = read(directory / "sft.jsonl").rename_column("response", "completion")
    config = SFTConfig(**common(settings, directory, len(rows)), max_length=None, packing=False)
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    losses = precise(trainer)
    trainer.train()
    return losses[0]


def dpo(directory: Path, settings: dict[str, Any], model: Any, tokenizer: Any) -> float:
    """The reference is another model than the policy, or the first step would say little."""
    rows = read(directory / "pairs.jsonl")
    reference = AutoModelForCausalLM.from_pretrained(directory / "reference", dtype=torch.float32)
    config = DPOConfig(
        **common(settings, directory, len(rows)), beta=settings["beta"], loss_type=["sigmoid"], max_length=None
    )
    trainer = DPOTrainer(model=model, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer)
    losses = precise(trainer)
    trainer.train()
    return losses[0]


def grpo(directory: Path, settings: dict[str, Any], model: Any, tokenizer: Any) -> float:
    """TRL samples and rewards; the log-probs of the sampling policy are then moved away from the current ones, so that
    ratios are not 1 and some are clipped."""
    prompts = read(directory / "prompts.jsonl")
    group = settings["group_size"]
    config = GRPOConfig(
        **common(settings, directory, len(prompts) * group), num_generations=group, loss_type="dapo", beta=0.0,
        max_completion_length=settings["max_new_tokens"], epsilon=0.2, epsilon_high=0.28, temperature=1.0,
        scale_rewards="group", mask_truncated_completions=False,
    )  # fmt: skip
    kept: dict[str, Any] = {}

    class Kept(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
            length = output["completion_ids"].shape[1]
            with torch.no_grad():
                logp, *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, length)
            noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
            output["old_per_token_logps"] = logp + settings["off_policy"] * noise
            kept.update({key: output[key].clone() for key in (
                "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "old_per_token_logps",
            )})  # fmt: skip
            return output

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        scores = [
            sum(a == b for a, b in zip(sorted(prompt[:-1]), said, strict=False)) / len(prompt[:-1])
            for prompt, said in zip(prompts, completions, strict=True)
        ]
        kept["rewards"] = torch.tensor(scores)
        kept["completions"] = completions
        return scores

    trainer = Kept(model=model, reward_funcs=reward, args=config, train_dataset=prompts, processing_class=tokenizer)
    losses = precise(trainer)
    trainer.train()
    kept.pop("completions")
    save_file({key: value.contiguous() for key, value in kept.items()}, directory / "sampled.safetensors")
    return losses[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
