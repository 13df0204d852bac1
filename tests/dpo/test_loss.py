"""The losses of DPO against the equations in float64 and against trl."""

import math

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convert
from dpo.loss import LossConfig, log_probs, pack_pairs, preference_loss, rewards
from model import IGNORED, ModelConfig, Transformer
from tests.test_model import build, relative, to_transformers

SHAPE = ModelConfig(vocab_size=61, context_length=24, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=40)
LOSSES = [
    LossConfig(beta=0.3),
    LossConfig(beta=0.3, label_smoothing=0.2),
    LossConfig(loss="ipo", beta=0.4),
    LossConfig(loss="hinge", beta=0.4),
    LossConfig(beta=0.3, chosen_weight=0.7),
    LossConfig(loss="ipo", beta=2.0, chosen_weight=1.5),
    LossConfig(loss="hinge", beta=0.4, chosen_weight=0.7),
]
# Lengths of prompt, chosen and rejected: of one token each too; and as long as the context can hold.
LENGTHS = [(5, 4, 7), (1, 6, 2), (9, 1, 5), (3, 8, 1), (1, 1, 1), (17, 8, 3), (2, 4, 4)]


def pairs(lengths=tuple(LENGTHS), seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids and bounds of pairs, as PairRows gives them."""
    bounds = torch.tensor(lengths).cumsum(1)
    ids = torch.randint(61, (len(lengths), int(bounds.max())), generator=torch.Generator().manual_seed(seed))
    return ids, bounds


def by_hand(model: Transformer, ids: Tensor, bounds: Tensor) -> Tensor:
    """log π of the answers, (pairs, 2): answer by answer, from full logits, in float64."""
    sums = []
    for row, (p, c, r) in zip(ids, bounds.tolist(), strict=True):
        for text in (row[:c], torch.cat([row[:p], row[c:r]])):
            logits = model.double()(text[None, :-1])[0].log_softmax(-1)
            sums.append(logits[p - 1 :].gather(1, text[p:, None]).sum())
    return torch.stack(sums).view(-1, 2)


def equation(policy: Tensor, reference: Tensor, lengths: Tensor, config: LossConfig) -> Tensor:
    """The losses as they are written in the papers, without any function made for them."""
    beta, eps = config.beta, config.label_smoothing
    (c, r), (ref_c, ref_r), (n_c, n_r) = policy.T, reference.T, lengths.T
    if config.loss == "sigmoid":
        p = 1 / (1 + torch.exp(-(beta * (c - ref_c) - beta * (r - ref_r))))  # that the chosen one is preferred
        loss = -(1 - eps) * torch.log(p) - eps * torch.log(1 - p)
    elif config.loss == "ipo":
        loss = ((c - ref_c) / n_c - (r - ref_r) / n_r - 1 / (2 * beta)) ** 2
    else:
        h = 1 - beta * ((c - ref_c) - (r - ref_r))
        loss = h * (h > 0)
    return loss + config.chosen_weight * -c / n_c


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("config", LOSSES, ids=str)
def test_losses_rewards_and_every_gradient_are_those_of_the_equations(config):
    model, reference, (ids, bounds) = build(SHAPE).double(), build(SHAPE, 1).double(), pairs()
    lengths = bounds.diff(dim=1)
    ours = log_probs(model, ids, bounds)
    policy = by_hand(model, ids, bounds)
    with torch.no_grad():
        theirs = by_hand(reference, ids, bounds)
        of_reference = log_probs(reference, ids, bounds)
    found = preference_loss(ours, of_reference, lengths, config).mean()
    logged = rewards(ours, of_reference, config)
    each = equation(policy, theirs, lengths, config)
    if config.loss == "hinge" and not config.chosen_weight:
        assert 0 < int((each > 0).sum()) < len(each)  # on both sides of the hinge
    assert found.item() == pytest.approx(each.mean().item(), rel=1e-11)
    expected = config.beta * (policy - theirs).detach()
    margin = expected[:, 0] - expected[:, 1]
    assert 0 < int((margin > 0).sum()) < len(margin)
    for name, value in {
        "reward_chosen": expected[:, 0],
        "reward_rejected": expected[:, 1],
        "margin": margin,
        "accuracy": (margin > 0).double(),
        "logp_chosen": policy[:, 0].detach(),
        "logp_rejected": policy[:, 1].detach(),
    }.items():
        torch.testing.assert_close(logged[name], value, rtol=1e-10, atol=1e-10)
        assert not logged[name].requires_grad
    exact = gradients(each.mean(), model)
    assert exact.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients(found, model).items():
        assert relative(gradient, exact[name]) < 1e-9, name


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_log_probs_of_any_lengths_are_those_of_separate_texts(lengths, seed):
    model, (ids, bounds) = build(SHAPE).double(), pairs(lengths, seed)
    with torch.no_grad():
        found, expected = log_probs(model, ids, bounds), by_hand(model, ids, bounds)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_texts_of_any_pairs_have_few_lengths():
    """oneDNN keeps megabytes for each length on a CPU: training grew to 7 GiB."""
    model, shapes = build(SHAPE), set()
    model.register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape))
    for length in range(1, 13):
        log_probs(model, *pairs([(length, 3, 4), (5, length, 2)], 0))
    assert shapes == {(1, 128)}


def test_pack_pairs_by_hand():
    """Prompt 1 2 3, chosen 4 5, rejected 6 7 8; then prompt 9, of which each answer has one token."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 0, 0, 0, 0, 0]])
    inputs, targets, positions, lengths = pack_pairs(ids, torch.tensor([[3, 5, 8], [1, 2, 3]]))
    assert inputs.tolist() == [[1, 2, 3, 4, 3, 6, 7, 9, 9]]
    assert targets.tolist() == [[IGNORED, IGNORED, 4, 5, 6, 7, 8, 10, 11]]
    assert positions.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 0]]
    assert lengths == [2, 3, 1, 1]


def padded(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen texts, then the rejected ones, (2 · pairs, T), padded; what is text in them, and what is answer."""
    texts = [(row[:c], p) for row, (p, c, _) in zip(ids, bounds.tolist(), strict=True)]
    texts += [(torch.cat([row[:p], row[c:r]]), p) for row, (p, c, r) in zip(ids, bounds.tolist(), strict=True)]
    tokens, text_mask, answer_mask = torch.zeros(3, len(texts), max(len(text) for text, _ in texts), dtype=torch.int64)
    for i, (text, p) in enumerate(texts):
        tokens[i, : len(text)], text_mask[i, : len(text)], answer_mask[i, p : len(text)] = text, 1, 1
    return tokens, text_mask, answer_mask


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """trl's trainer over transformers' own LLaMA with our weights, and as its reference another."""
    import datasets
    import trl

    words = {str(i): i for i in range(59)} | {"<pad>": 59, "</s>": 60}
    spm = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    spm.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    about = {"output_dir": str(tmp_path_factory.mktemp("trl")), "report_to": "none", "use_cpu": True, "bf16": False}
    return trl.DPOTrainer(
        model=to_transformers(build(SHAPE)).double(),
        ref_model=to_transformers(build(SHAPE, 1)).double(),
        args=trl.DPOConfig(**about, disable_dropout=True, gradient_checkpointing=False, beta=0.1),
        train_dataset=datasets.Dataset.from_list([{"prompt": "1 2", "chosen": " 3", "rejected": " 4"}]),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=spm, pad_token="<pad>", eos_token="</s>"
        ),
    )


@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_trl_computes_the_same(trainer, loss):
    model, reference, (ids, bounds) = build(SHAPE).double(), build(SHAPE, 1).double(), pairs()
    tokens, text, answer = padded(ids, bounds)
    trainer.loss_types, trainer.beta = [loss], 0.7
    trainer.model.train().zero_grad()
    theirs = trainer.compute_loss(
        trainer.model, {"input_ids": tokens, "attention_mask": text, "completion_mask": answer}
    )
    theirs.backward()
    with torch.no_grad():
        of_reference = log_probs(reference, ids, bounds)
    config = LossConfig(loss=loss, beta=0.7)
    found = preference_loss(log_probs(model, ids, bounds), of_reference, bounds.diff(dim=1), config).mean()
    assert found.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert theirs.item() > 0.01
    others = dict(trainer.model.named_parameters())
    for name, gradient in gradients(found, model).items():
        assert relative(gradient, others[convert.theirs(name)].grad.double()) < 1e-5, name


WRONG = [{"loss": "dpo"}, {"beta": 0.0}, {"beta": math.nan}, {"label_smoothing": 0.5}, {"chosen_weight": -1.0}]


@pytest.mark.parametrize("wrong", [*WRONG, {"label_smoothing": 0.1, "loss": "ipo"}])
def test_a_wrong_field_is_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is "):
        LossConfig(**wrong)
