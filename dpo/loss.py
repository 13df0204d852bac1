"""What is learnt from a pair of answers: the equations of DPO and its kin, and the log-probabilities they are of.

With π the model, ref the reference, x a prompt, c its chosen and r its rejected answer, the reward that a model implies
is  r(x, y) = β · (log π(y|x) − log ref(y|x)),  and  h = (log π(c) − log ref(c)) − (log π(r) − log ref(r)).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.data import IGNORED
from stage import check_types


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss. Raises TypeError or ValueError, naming the field, for what cannot be."""

    loss: str = "sigmoid"
    """"sigmoid" (DPO, arXiv:2305.18290), "ipo" (arXiv:2310.12036) or "hinge" (SLiC, arXiv:2305.10425)."""
    beta: float = 0.1
    """How dear it is to leave the reference."""
    label_smoothing: float = 0.0
    """Of "sigmoid": the share of pairs that are thought to be the wrong way round."""
    chosen_weight: float = 0.0
    """Of the chosen answer's own loss, in nats a token, which keeps its likelihood from falling with the rejected one's
    (RPO, arXiv:2404.19733)."""

    def __post_init__(self):
        check_types(self)
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; expected one of {', '.join(LOSSES)}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; expected a positive number")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss != "sigmoid"):
            raise ValueError(
                f"label_smoothing is {self.label_smoothing} and loss {self.loss!r}; expected 0, or for "
                '"sigmoid" less than 0.5'
            )
        if not 0 <= self.chosen_weight < math.inf:
            raise ValueError(f"chosen_weight is {self.chosen_weight}; expected 0 or more")


def sigmoid(h: Tensor, lengths: Tensor, config: LossConfig) -> Tensor:
    """−(1 − ε) log σ(β h) − ε log σ(−β h), ε the label smoothing: equation 7 of DPO; with ε its authors' cDPO."""
    h, smoothing = config.beta * (h[:, 0] - h[:, 1]), config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)


def ipo(h: Tensor, lengths: Tensor, config: LossConfig) -> Tensor:
    """(h − 1 / 2β)²: equation 17, with h of means over an answer's tokens rather than sums, as its authors advise."""
    means = h / lengths
    return (means[:, 0] - means[:, 1] - 1 / (2 * config.beta)).square()


def hinge(h: Tensor, lengths: Tensor, config: LossConfig) -> Tensor:
    """max(0, 1 − β h)."""
    return torch.relu(1 - config.beta * (h[:, 0] - h[:, 1]))


LOSSES: dict[str, Callable[[Tensor, Tensor, LossConfig], Tensor]] = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}


def preference_loss(policy: Tensor, reference: Tensor, lengths: Tensor, config: LossConfig) -> Tensor:
    """The loss of each pair, (pairs,), in the dtype of `policy`.

    policy, reference: (pairs, 2), log-probabilities in nats of the chosen and the rejected answer. lengths: (pairs, 2),
    their tokens.
    """
    loss = LOSSES[config.loss](policy - reference, lengths, config)
    return loss - config.chosen_weight * policy[:, 0] / lengths[:, 0] if config.chosen_weight else loss


def rewards(policy: Tensor, reference: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """What is logged of pairs, (pairs,) each, by name: rewards, their margin, and whether the chosen one is greater (a
    tie counts half). They are of whole answers, whatever the loss; that of "ipo" is of means over their tokens."""
    chosen, rejected = (config.beta * (policy - reference).detach()).unbind(1)
    margin = chosen - rejected
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "margin": margin,
        "accuracy": (margin > 0).double() + (margin == 0).double() / 2,
        "logp_chosen": policy[:, 0].detach(),
        "logp_rejected": policy[:, 1].detach(),
    }


def laid_out(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Pairs as one row without padding, in which a prompt stands once and both answers follow it.

    ids: (pairs, width) int64: prompt, chosen and rejected answer of each, then anything. bounds: (pairs, 3) int64,
    where each of them ends. Returns inputs, targets and positions, (1, T) each, for `Transformer`: an answer's targets
    are its ids moved on by one, which happens here, and nowhere else; and the lengths of all answers.

    Of the prompt the last id stands twice, for there the answers part: it predicts the first id of each.
    """
    inputs, targets, positions, lengths = [], [], [], []
    for row, (p, c, r) in zip(ids, bounds.tolist(), strict=True):
        inputs += [row[: c - 1], row[p - 1 : p], row[c : r - 1]]
        targets += [row.new_full((p - 1,), IGNORED), row[p:r]]
        positions += [torch.arange(c - 1), torch.arange(p - 1, p - 1 + r - c)]
        lengths += [c - p, r - c]
    return *(torch.cat(parts)[None] for parts in (inputs, targets, positions)), lengths


def log_probs(model: nn.Module, ids: Tensor, bounds: Tensor) -> Tensor:
    """log π of the answers of pairs, in nats: (pairs, 2) float64, chosen and rejected. ids, bounds: as in `laid_out`,
    on the CPU.

    Logits are made a chunk at a time, and only where an answer is predicted.
    """
    inputs, targets, positions, lengths = laid_out(ids, bounds)
    device = next(model.parameters()).device
    answers = (targets[0] != IGNORED).nonzero()[:, 0].to(device, non_blocking=True)
    losses = model(inputs.to(device, non_blocking=True), targets, positions=positions, reduction="none")[0]
    # float64: the difference of two such sums is what is learnt from.
    sums = [part.sum() for part in losses[answers].double().split(lengths)]
    return -torch.stack(sums).view(-1, 2)
