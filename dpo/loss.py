"""The losses of preference learning, and the log-probabilities that they compare."""

# DPO (arXiv:2305.18290) needs no reward model. With the trained model π, the model before training ref, a prompt x and
# an answer y, the reward of the answer is
#     β · (log π(y | x) − log ref(y | x))
# A pair has a chosen answer c and a rejected answer r. Their rewards differ by the margin β h. The losses use
#     h = (log π(c) − log ref(c)) − (log π(r) − log ref(r))

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORED, send
from stage import check_types


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss. Raises TypeError or ValueError, with the field's name, for an impossible value."""

    loss: str = "sigmoid"  # DPO, arXiv:2305.18290; or "ipo", arXiv:2310.12036; or "hinge", SLiC, arXiv:2305.10425
    # Pull towards the reference; higher stays closer. Try 0.01 and 1: with a weak pull the answers degrade.
    beta: float = 0.1
    label_smoothing: float = 0.0  # for "sigmoid": assumed share of pairs with swapped labels
    # Weight of the chosen answer's own loss, in nats per token (RPO, arXiv:2404.19733). Without this loss, both answers
    # may become less likely.
    chosen_weight: float = 0.0

    def __post_init__(self):
        check_types(self)
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; expected one of {', '.join(LOSSES)}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; expected a positive number")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss != "sigmoid"):
            raise ValueError(f'label_smoothing is {self.label_smoothing}; expected 0, or for "sigmoid" less than 0.5')
        if not 0 <= self.chosen_weight < math.inf:
            raise ValueError(f"chosen_weight is {self.chosen_weight}; expected 0 or more")


def sigmoid(h: Tensor, config: LossConfig) -> Tensor:
    """−(1 − ε) log σ(β h) − ε log σ(−β h), ε the label smoothing: DPO, equation 7; with ε > 0, cDPO."""
    # σ(β h) is the probability that the chosen answer wins (Bradley-Terry). The loss is the
    # cross-entropy of two classes with the margin as logit. Pairs with a large margin hardly count any more.
    margin = config.beta * h  # (pairs,)
    right = F.logsigmoid(margin)
    wrong = F.logsigmoid(-margin)
    return -(1 - config.label_smoothing) * right - config.label_smoothing * wrong


def ipo(h: Tensor, config: LossConfig) -> Tensor:
    """(h − 1 / 2β)²: equation 17 of IPO."""
    # h has a goal, 1 / 2β. The sigmoid has none, and can overfit pairs that never contradict each other.
    goal = 1 / (2 * config.beta)
    return (h - goal).square()


def hinge(h: Tensor, config: LossConfig) -> Tensor:
    """max(0, 1 − β h)."""
    return torch.relu(1 - config.beta * h)


LOSSES = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}


def preference_loss(policy: Tensor, reference: Tensor, lengths: Tensor, config: LossConfig) -> Tensor:
    """The loss of each pair, (pairs,), in the dtype of `policy`. The three tensors: (pairs, 2)."""
    # policy, reference: log-probabilities in nats of the chosen and the rejected answer. lengths: their tokens.
    chosen, rejected = (policy - reference).unbind(1)  # (pairs,) each
    if config.loss == "ipo":  # means over an answer's tokens rather than sums, as the authors of IPO advise
        chosen = chosen / lengths[:, 0]
        rejected = rejected / lengths[:, 1]
    loss = LOSSES[config.loss](chosen - rejected, config)
    if config.chosen_weight:  # keeps the chosen answer likely: h alone can grow while both become less likely
        loss = loss - config.chosen_weight * policy[:, 0] / lengths[:, 0]
    return loss


def rewards(policy: Tensor, reference: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """The values to log, by name, (pairs,) each. Rewards are sums over whole answers, for "ipo" too."""
    chosen, rejected = (config.beta * (policy - reference)).detach().unbind(1)  # (pairs,) each
    margin = chosen - rejected
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "margin": margin,
        "accuracy": (margin.sign() + 1) / 2,  # a tie counts half: about 0.5 before the first step
        # Watch logp_chosen: if it falls while the margin grows, chosen_weight can help.
        "logp_chosen": policy[:, 0].detach(),
        "logp_rejected": policy[:, 1].detach(),
    }


def pack_pairs(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Packs pairs into one row without padding: each prompt once, then both answers."""
    # ids: (pairs, width) int64, on the CPU: prompt, chosen and rejected answer of each pair, then padding. bounds:
    # (pairs, 3) int64, where these three end. Returns inputs, targets and positions, (1, T) each, for `Transformer`,
    # and the lengths of all answers, chosen and rejected in turn. A prompt "a b" with answers "c d" and "x y" is
    #   inputs     a  b  c    b  x
    #   targets    -  c  d    x  y      the ids, shifted here by one; "-" is IGNORED
    #   positions  0  1  2    1  2
    # The prompt's last id is repeated, because it predicts the first id of both answers. The fall from position
    # 2 to 1 tells the model that the second answer continues the prompt and does not see the first answer.
    inputs, targets, positions, lengths = [], [], [], []
    for row, (prompt, chosen, rejected) in zip(ids, bounds.tolist(), strict=True):
        inputs += [row[: chosen - 1], row[prompt - 1 : prompt], row[chosen : rejected - 1]]
        targets += [torch.full((prompt - 1,), IGNORED), row[prompt:rejected]]
        positions += [torch.arange(chosen - 1), torch.arange(rejected - chosen) + prompt - 1]
        lengths += [chosen - prompt, rejected - chosen]
    return torch.cat(inputs)[None], torch.cat(targets)[None], torch.cat(positions)[None], lengths


def log_probs(model: nn.Module, ids: Tensor, bounds: Tensor) -> Tensor:
    """log π of the chosen and rejected answers, in nats: (pairs, 2) float64. ids, bounds: as in `pack_pairs`."""
    inputs, targets, positions, lengths = pack_pairs(ids, bounds)
    # On a CPU, oneDNN keeps megabytes for each length: pad to few lengths. A padding token is a text of its own.
    end = (0, -inputs.shape[1] % 128)
    inputs, targets, positions = F.pad(inputs, end), F.pad(targets, end, value=IGNORED), F.pad(positions, end)
    device = next(model.parameters()).device
    inputs = send(inputs, device)
    losses = model(inputs, targets, positions=positions, reduction="none")[0]  # (T,), −log π of each target
    losses = losses[send((targets[0] != IGNORED).nonzero()[:, 0], device)]
    # float64: the loss is a small difference of large sums, and float32 would lose digits. A Mac's GPU lacks float64.
    wide = torch.float32 if device.type == "mps" else torch.float64
    return -torch.stack([part.sum() for part in losses.to(wide).split(lengths)]).view(-1, 2)
