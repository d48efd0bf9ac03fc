"""Runs on a base that stays quantised: its ledger, its replay, and the precision that it gets by default."""

from functools import partial
from pathlib import Path

import jax
import pytest
import small_run

from fedmezo_jax.core.tree_hash import tree_hash
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.loop import train
from fedmezo_jax.run.prepare import prepare, resolve_defaults
from fedmezo_jax.run.replay import largest_difference, replay


def test_a_run_is_replayed_on_what_it_held(tmp_path_factory):
    with small_run.place(tmp_path_factory, "quantised") as place:
        config = small_run.configuration(place, base="int8", precision="float32", layers="last:1")
        setup = prepare(config)
        (place / "out").mkdir()
        result = train(setup, place / "out", checkpoint_every=9, eval_every=9)
        replayed = replay(place / "out" / "run.ledger")
        assert largest_difference(jax.device_get(result.params), replayed.params) is None
        model = config.model, LlamaConfig.from_json(Path(config.model))
        assert setup.task.base_hash == tree_hash(load_base(*model, "float32", "int8"))
        assert setup.task.base_hash != tree_hash(load_base(*model))
        save_base(place / "other", model[1], jax.tree.map(lambda leaf: leaf * 1.5, load_base(*model)))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (place / "other" / name).write_bytes((place / "model" / name).read_bytes())
        with pytest.raises(UserError, match="its weights are not those that the run was on"):
            replay(place / "out" / "run.ledger", str(place / "other"))


def test_a_base_in_few_bits_is_multiplied_as_one_in_sixteen(monkeypatch, tmp_path_factory):
    with small_run.place(tmp_path_factory, "defaults") as place:
        monkeypatch.setattr("fedmezo_jax.llama.precision._multiplies_bfloat16", lambda: True)
        asked = partial(small_run.configuration, place)
        assert resolve_defaults(asked()).precision == "float32"  # as the file's weights are
        for base, precision in (("int8", "paired"), ("bfloat16", "paired"), ("float32", "float32")):
            assert resolve_defaults(asked(base=base)).precision == precision
    with pytest.raises(
        UserError, match="--base must be one of float32, bfloat16, int8, fp8, int4, as-stored, not int2"
    ):
        RunConfig(base="int2")


@pytest.mark.parametrize("base", [None, "int4", "as-stored", "bfloat16"])
def test_eight_bit_products_need_a_base_with_one_scale_for_each_output(base):
    with pytest.raises(UserError, match="--eight-bit-products needs --base int8 or fp8"):
        RunConfig(base=base, eight_bit_products=True)


def test_losses_that_differ_by_rounding_are_not_subtracted():
    RunConfig(base="int8", eight_bit_products=True)
    RunConfig(base="int8", eight_bit_products=True, algorithm="fedavg", uplink="lora", estimator="two-point")
    with pytest.raises(UserError, match="--eight-bit-products rounds activations, so that losses at θ ± μz differ"):
        RunConfig(base="int8", eight_bit_products=True, estimator="two-point")


def test_a_run_with_eight_bit_products_is_of_another_model(tmp_path_factory):
    with small_run.place(tmp_path_factory, "eight bits") as place:
        asked = partial(small_run.configuration, place, base="int8", precision="float32", estimator="forward-gradient")
        losses = []
        for eight_bit in (False, True):
            setup = prepare(asked(eight_bit_products=eight_bit, layers="last:1"))
            assert setup.task.model.eight_bit == eight_bit
            losses.append(setup.task.evaluate(setup.params))
        assert losses[0] != losses[1]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
