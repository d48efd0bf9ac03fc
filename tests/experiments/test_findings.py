"""The summary of results: each rule on rows whose finding is known, and the verdicts on the stored results."""

import json
import re
from pathlib import Path

import pytest

from experiments import _findings
from experiments._findings import AGREES, DIFFERS, NO_DIFFERENCE, NOT_COMPARABLE, OPEN, finding
from experiments.studies.paper import NOT_IN_PAPER, QUESTIONS

ROOT = Path(__file__).parents[2]


def losses(*ends):
    """Rows of variants that end at (loss, half of the interval)."""
    return [{"variant": f"v{i}", "loss_after": loss, "band_90": band} for i, (loss, band) in enumerate(ends)]


def verdict(name, rows):
    return finding(name, rows).verdict


@pytest.mark.parametrize(
    ("name", "ends", "expected"),
    [
        ("local_steps", [(2.0, 0.1), (9.0, 0.1), (1.7, 0.1)], AGREES),  # the last is lower than the first
        ("local_steps", [(1.7, 0.1), (2.0, 0.1)], DIFFERS),
        ("local_steps", [(2.0, 0.2), (1.7, 0.1)], NO_DIFFERENCE),  # 1.8 to 2.2 and 1.6 to 1.8 meet
        ("batch_size", [(1.7, 0.1), (2.0, 0.1)], AGREES),
        ("batch_size", [(2.0, 0.1), (1.7, 0.1)], DIFFERS),
        ("perturbation_scale", [(2.0, 0.1), (None, 0.1)], AGREES),  # a diverged run is worse than any
        ("partitioners", [(2.0, None), (1.7, None)], "-"),  # one seed says nothing
        ("clients", [(2.0, 0.1), (2.02, 0.1), (2.04, 0.1)], AGREES),
        ("clients", [(2.0, 0.1), (2.1, 0.1), (2.0, 0.1)], DIFFERS),
        ("model_size", [(2.0, 0.1), (3.0, 0.1)], NOT_COMPARABLE),
        ("lora_rank", [(2.0, 0.1), (3.0, 0.1)], OPEN),
    ],
)
def test_the_verdict_on_losses(name, ends, expected):
    assert verdict(name, losses(*ends)) == expected


def test_models_of_the_paper_are_compared():
    rows = losses((0.9, 0.01), (1.0, 0.01))
    for row, name in zip(rows, QUESTIONS["model_size"].by_variant, strict=True):
        row["variant"] = name
    assert verdict("model_size", rows) == AGREES


def divergences(*rounds):
    return [{"learning_rate": 0.1 * (i + 1), "first_divergence": t} for i, each in enumerate(rounds) for t in each]


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([(None, None, 9), (7, 8, None), (1, 2, 1)], AGREES),
        ([(1, 1, 1), (None, None, None)], DIFFERS),
        ([(None,), (None,)], NO_DIFFERENCE),
    ],
)
def test_the_verdict_on_divergence(rounds, expected):
    assert verdict("divergence", divergences(*rounds)) == expected


@pytest.mark.parametrize(("after", "expected"), [(0.03, NO_DIFFERENCE), (0.05, AGREES), (0.0, NO_DIFFERENCE)])
def test_a_gain_in_answers_within_two_standard_errors_is_none(after, expected):
    rows = [{"exact_match": x, "standard_error": 0.02, "test_loss": 1.0} for x in (0.0, after)]
    assert verdict("task_metrics", rows) == expected


def test_memory_is_compared_with_back_propagation():
    def rows(step, back):
        return [
            {"what": what, "over_forward": x} for what, x in (("forward", 1.0), ("fedmezo", step), ("backprop", back))
        ]

    assert finding("memory", rows(1.1, 3.5)) == ("of a forward pass: step 1.10, back-propagation 3.50 times", AGREES)
    assert verdict("memory", rows(3.6, 3.5)) == DIFFERS


def test_every_question_of_the_paper_has_a_rule():
    assert set(_findings._RULES) == {name for name, asked in QUESTIONS.items() if asked.paper != NOT_IN_PAPER}


def test_the_verdicts_on_the_stored_results():
    stored = {"memory": "memory_a100"}
    verdicts = {
        name: verdict(
            name, json.loads((ROOT / f"experiments/results/{stored.get(name, name)}.json").read_text())["rows"]
        )
        for name in _findings._RULES
    }
    assert verdicts == {
        "convergence": DIFFERS,
        **dict.fromkeys(("perturbation_scale", "batch_size", "partitioners"), NO_DIFFERENCE),
        **dict.fromkeys(("personalised_rates", "best_rank", "task_metrics"), NO_DIFFERENCE),
        **dict.fromkeys(("local_steps", "clients", "divergence", "communication", "memory"), AGREES),
        **dict.fromkeys(("lora_rank", "heterogeneity_index", "effective_rank", "theory_constants"), OPEN),
        **dict.fromkeys(("model_size", "step"), NOT_COMPARABLE),
        "convergence_rate": "not confirmed; the theorem is an upper bound",
    }


def test_the_documents_have_the_questions_and_the_papers_findings():
    index = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    commands = r"^\| `python -m experiments\.(?:\w+\.)?(\w+)[^`]*` \| ([^|]+) \|"
    asked = {name: text for name, text in re.findall(commands, index, re.MULTILINE) if name in QUESTIONS}
    assert asked == {name: one.question for name, one in QUESTIONS.items()}
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", results, re.MULTILINE))
    assert len(found) > 15
    assert found == {name: QUESTIONS[name].paper for name in found}
