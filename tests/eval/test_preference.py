"""The task `preference`: what is won, by whose measure, and with what error."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoint
import configs
import stage
from dpo.data import PairRows
from eval import preference as task
from eval.language import Subject
from tests.conftest import Place
from tests.eval.test_main import evaluate


def measured(monkeypatch, policy: list, reference: list, ends: list, prompts: list, kinds: list, beta: float) -> dict:
    """The task's numbers for given log-probabilities. ends: lengths of prompt, chosen and rejected answer."""
    bounds = np.array([np.cumsum([0, *lengths]) for lengths in ends])
    pairs = SimpleNamespace(bounds=bounds, prompts=np.array(prompts), kinds=np.array(kinds), names=["a", "b"])
    monkeypatch.setattr(task, "of_pairs", lambda model, pairs, name: torch.tensor(policy, dtype=torch.float64))
    return task.preference(Subject(None, None), pairs, torch.tensor(reference, dtype=torch.float64), beta)


def test_by_hand(monkeypatch):
    # Rewards times β = 2: (2, 0) won; (0, 2) lost; (−2, −2) a tie; (−2, −4) won. Prompts: two pairs, one, one.
    policy, reference = [(-4, -6), (-3, -5), (-9, -3), (-5, -8)], [(-5, -6), (-3, -6), (-8, -2), (-4, -6)]
    ends, prompts, kinds = [(3, 4, 2), (5, 2, 4), (1, 6, 6), (2, 5, 1)], [0, 0, 1, 2], [0, 0, 1, 1]
    found = measured(monkeypatch, policy, reference, ends, prompts, kinds, beta=2.0)
    assert found["win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert found["margin"] == (2 - 2 + 0 + 2) / 4
    assert (found["reward_chosen"], found["reward_rejected"]) == ((2 + 0 - 2 - 2) / 4, (0 + 2 - 2 - 4) / 4)
    # Over prompts: wins 1, 0.5, 1 of 2, 1, 1 pairs; the ratio's residuals are −0.25, −0.125, 0.375.
    assert found["stderr"] == pytest.approx(math.sqrt(3 / 2 * (0.25**2 + 0.125**2 + 0.375**2)) / 4)
    assert found["perplexity_chosen"] == pytest.approx(math.exp(21 / 17))
    assert found["perplexity_rejected"] == pytest.approx(math.exp(22 / 13))
    assert found["likelier"] == 3 / 4
    assert found["longer_wins"] == (1 + 0 + 0.5 + 1) / 4
    kinds = {name: (kind["win_rate"], kind["n"]) for name, kind in found["by_kind"].items()}
    assert kinds == {"a": (0.5, 2), "b": (0.75, 2)}
    assert (found["n"], found["prompts"], found["baseline"]) == (4, 3, 0.5)


longer = st.lists(st.integers(-40, 40), min_size=1, max_size=80).map(np.array)


@given(longer)
def test_who_looks_at_lengths_alone_wins_half_of_matched_pairs(longer):
    weights = task.matched(longer)
    assert ((weights >= 0) & (weights <= 1)).all()
    if weights.any():
        wins = task.chosen_greater(np.stack([longer, np.zeros_like(longer)], axis=1))
        assert task.clustered(wins, weights, np.arange(len(longer)))[0] == pytest.approx(0.5)


@given(longer)
def test_matching_leaves_what_has_nothing_to_do_with_length(longer):
    assert (task.matched(longer)[longer == 0] == 1).all()
    both = np.concatenate([longer, -longer])  # already as often the longer one: nothing to weigh
    assert task.matched(both) == pytest.approx(1)


def test_where_no_lengths_match_the_number_is_missing(monkeypatch):
    found = measured(monkeypatch, [(-1, -2)], [(-2, -2)], [(1, 3, 2)], [0], [0], 1.0)
    assert math.isnan(found["win_rate_length_matched"])
    assert found["win_rate"] == 1


@pytest.mark.parametrize(
    ("wins", "prompts", "error"),
    [
        ([0.5, 0.5, 0.5], [0, 1, 2], 0),  # a model beside itself: ties by construction
        ([1, 1, 1], [0, 1, 2], math.sqrt(5 / 7 * 2 / 7 / 7)),
        ([1, 0, 1, 0], [0, 0, 1, 1], math.sqrt(1 / 4 / 6)),  # each prompt half: the next may differ
        ([1, 0], [0, 0], math.sqrt(1 / 4 / 5)),  # a single prompt
    ],
)
def test_prompts_that_score_alike_promise_no_certainty(wins, prompts, error):
    found = task.clustered(np.array(wins, dtype=float), np.ones(len(wins)), np.array(prompts))
    assert found[1] == pytest.approx(error)


def test_three_stages(measured: Place, tmp_path: Path):
    found = json.loads((measured.runs / "mini/eval/results.json").read_text())
    assert list(found) == ["pretrain", "sft", "dpo"]
    reference = found["sft"]["preference"]  # beside itself
    assert (reference["win_rate"], reference["margin"], reference["stderr"]) == (0.5, 0.0, 0.0)
    assert found["dpo"]["preference"]["win_rate"] > 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(measured.runs))
        experiment = configs.load(measured.config)
    counts = stage.read_manifest(measured.runs / "mini/dpo_data")["counts"]
    held_out = PairRows(measured.runs / "mini/dpo_data", "val", counts)
    models = [checkpoint.load_model(measured.runs / f"mini/{name}/final").double() for name in ("dpo", "sft")]
    margins = []
    for ids, (p, c, r) in zip(*(part.tolist() for part in held_out.read(range(held_out.count))[:2]), strict=True):
        rewards = []
        for answer in (ids[p:c], ids[c:r]):
            text = torch.tensor([ids[:p] + answer])
            log_p = [model(text[:, :-1])[0, p - 1 :].log_softmax(1) for model in models]
            own = [each[torch.arange(len(answer)), text[0, p:]].sum().item() for each in log_p]
            rewards.append(experiment.dpo.loss.beta * (own[0] - own[1]))
        margins.append(rewards[0] - rewards[1])
    assert found["dpo"]["preference"]["margin"] == pytest.approx(np.mean(margins), rel=1e-3)
    assert found["dpo"]["preference"]["win_rate"] == np.mean(np.array(margins) > 0)
    copy = Place(shutil.copytree(measured.path, tmp_path, dirs_exist_ok=True))  # other tests share the original
    evaluate(copy, "--checkpoint", copy.runs / "mini/dpo/best")
    assert list(json.loads((copy.runs / "mini/dpo/eval_best/results.json").read_text())) == ["dpo"]
