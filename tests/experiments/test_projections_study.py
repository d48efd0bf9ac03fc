"""The study of projections: what it compares, at equal compute."""

from dataclasses import replace

import pytest

from experiments.studies import estimators, projections, runner
from fedmezo_jax.llama.lora import check_targets


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_all_methods_have_the_compute_of_the_papers(preset):
    given = projections.PRESETS[preset]
    decoder = estimators.OPEN_LLAMA_3B if preset == "paper" else estimators.TINY
    whole = estimators.compute(given.run, decoder)
    for label, fields in given.variants.items():
        run = replace(given.run, **fields)
        check_targets(run.target_names)
        assert estimators.compute(run, decoder) / whole == pytest.approx(1, abs=0.5 / run.rounds), label


def test_the_paper_s_method_adapts_q_and_v():
    assert runner.SMALL.target_names == ("q_proj", "v_proj")
