"""Losses on preference pairs: DPO, its length-normalised form, SimPO, IPO. Offline: the pairs were sampled by other
models.

    dpo       z = beta [(pi_w - ref_w) - (pi_l - ref_l)]    -(1 - s) log sigmoid(z) - s log sigmoid(-z)
              Rafailov et al. 2023 (arXiv:2305.18290, Eq. 7), s = label smoothing (cDPO); beta 0.1
    dpo_norm  the same on per-token averages; Tulu 3 (2411.15124), beta 5
    simpo     z = beta (pi_w/|w| - pi_l/|l|) - gamma, no reference; Meng et al. 2024 (2405.14734, Eq. 6),
              beta 2, gamma .3 to 1.6
    ipo       (h - 1 / (2 beta))^2, h = (pi_w - ref_w) - (pi_l - ref_l); Azar et al. 2023 (2310.12036, Eq. 17)

Sums over the answer's tokens with EOS, prompt masked, in fp64: at thousands of tokens fp32 sums differ in the digits
that z consists of. The partition function cancels in the pair; the gradient is -beta sigmoid(-z)(grad pi_w - grad
pi_l). DPO for subjective preferences, RL where the answer can be verified.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

PreferenceKind = Literal["dpo", "dpo_norm", "simpo", "ipo"]


class PreferenceLoss(NamedTuple):
    loss_B: Tensor
    chosen_reward_B: Tensor
    """Implied reward beta (log pi - log ref), up to a term of the prompt; without gradient."""
    rejected_reward_B: Tensor


def preference_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor | None = None,
    reference_rejected_B: Tensor | None = None,
    len_chosen_B: Tensor | None = None,
    len_rejected_B: Tensor | None = None,
    *,
    kind: PreferenceKind = "dpo",
    beta: float = 0.1,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """[B] loss per pair from log-probs summed over each answer. SimPO needs no reference, DPO and IPO no lengths."""
    chosen_B, rejected_B = policy_chosen_B.double(), policy_rejected_B.double()
    if kind != "simpo":
        if reference_chosen_B is None or reference_rejected_B is None:
            raise ValueError(f"kind = {kind!r} needs the log-probs of the reference")
        chosen_B, rejected_B = chosen_B - reference_chosen_B.double(), rejected_B - reference_rejected_B.double()
    if kind in ("simpo", "dpo_norm"):
        if len_chosen_B is None or len_rejected_B is None:
            raise ValueError(f"kind = {kind!r} needs the lengths of the answers")
        chosen_B, rejected_B = chosen_B / len_chosen_B, rejected_B / len_rejected_B
    margin_B = chosen_B - rejected_B
    if kind == "ipo":
        loss_B = (margin_B - 1 / (2 * beta)).square()
    else:
        z_B = beta * margin_B - (gamma if kind == "simpo" else 0.0)
        loss_B = -(1 - label_smoothing) * logsigmoid(z_B) - label_smoothing * logsigmoid(-z_B)
    return PreferenceLoss(loss_B, (beta * chosen_B).detach(), (beta * rejected_B).detach())
