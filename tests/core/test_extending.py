"""The examples of docs/extending.md run, are short, and satisfy the contracts."""

import re
from pathlib import Path

import estimator_contract
import jax
import numpy as np
import pytest

from fedmezo_jax.core import aggregation, mezo
from fedmezo_jax.core.estimators import Estimator

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
EXAMPLES = dict(
    re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
)


def run(title):
    names = {}
    exec(compile(EXAMPLES[title], str(DOCUMENT), "exec"), names)
    return names


def test_the_document_has_these_examples():
    assert {"An estimator", "An aggregation rule", "A model that is not a LLaMA"} <= EXAMPLES.keys()


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_short(title):
    assert EXAMPLES[title].count("\n") < 40


def test_the_estimator_trains_and_satisfies_the_contract():
    names = run("An estimator")
    losses = np.asarray(names["report"].losses)
    assert losses[:, -1].max() < 0.5 * losses[:, 0].min()
    estimator: Estimator = names["OneSided"](mezo.MezoConfig(1e-2, 2))
    estimator_contract.check_reconstruction(estimator)
    estimator_contract.check_unbiased(estimator)


def test_the_aggregator_is_a_median_and_withstands_a_client(capsys):
    names = run("An aggregation rule")
    mean, median = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert median < np.sqrt(5) < mean
    aggregator: aggregation.Aggregator = names["Median"]()
    draw = np.random.default_rng(0)
    uploads = [{"w": draw.standard_normal((2, 3)).astype(np.float32)} for _ in range(5)]
    params, weights = {"w": np.ones((2, 3), np.float32)}, np.full(5, 0.2, np.float32)
    middle = np.sort([upload["w"] for upload in uploads], axis=0)[2]
    np.testing.assert_allclose(aggregator.combine_params(params, weights, iter(uploads))["w"], middle - 1, atol=1e-6)
    coefficients = draw.standard_normal((5, 3, 2)).astype(np.float32)
    combined = aggregator.combine_coefficients(weights, coefficients)
    np.testing.assert_array_equal(combined, np.sort(coefficients, axis=0)[2])
    assert jax.tree.structure(aggregator.combine_params(params, weights, iter(uploads))) == jax.tree.structure(params)


def test_the_task_is_trained_both_ways_and_replayed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("A model that is not a LLaMA")
    result = names["result"]
    assert names["task"].evaluate(names["state"].params) < 0.1 > result.loss_after
    assert result.loss_before > 1
    jax.tree.map(np.testing.assert_array_equal, names["replayed"].params, result.params)
    saved = np.load("runs/regression/params.npz")
    jax.tree.map(np.testing.assert_array_equal, dict(saved), result.params)
