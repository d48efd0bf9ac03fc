"""Models that do not fit their tokenizer or overflow, in generation and evaluation: one line that names them."""

import json
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
import small_run
from token_data import table

from experiments import evaluate, fedmezo, generate
from fedmezo_jax.errors import UserError
from fedmezo_jax.evaluation import likelihood
from fedmezo_jax.llama import checks
from fedmezo_jax.llama.checkpoints import safetensors, stored_base
from fedmezo_jax.llama.checkpoints.adapter import save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.checkpoints.export import export
from fedmezo_jax.llama.checkpoints.layout import layout
from fedmezo_jax.llama.checks import largest_magnitude, largest_weight
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.generate import generate as continued
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.registry import load_tokenizer
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.job import fine_tune

HUGE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def config(folder):
    return LlamaConfig.from_json(folder)


def overflowing(base):
    """Weights of 1e19 and less, with products beyond float32 from the second layer on."""
    mlp = jax.tree.map(np.array, base["layers"]["mlp"])
    for name, size in (("up_proj", 1e19), ("gate_proj", 1e18), ("down_proj", 1e18)):
        kernel = mlp[name]["kernel"]
        kernel[1] = np.where(kernel[1] > 0, size, -0.9 * size)
    return base | {"layers": base["layers"] | {"mlp": mlp}}


@pytest.fixture(scope="module")
def overflows(folder, config, tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "overflows"
    save_base(place, config, overflowing(load_base(folder, config)), tokenizer=load_tokenizer(folder))
    return place


@pytest.fixture(scope="module")
def narrow(folder, config, tmp_path_factory):
    """A model of 50 tokens beside a tokenizer of 200."""
    place, base = tmp_path_factory.mktemp("model") / "narrow", load_base(folder, config)
    smaller = base | {
        "embed_tokens": {"embedding": base["embed_tokens"]["embedding"][:50]},
        "lm_head": {"kernel": base["lm_head"]["kernel"][:, :50]},
    }
    save_base(place, replace(config, vocab_size=50), smaller, tokenizer=load_tokenizer(folder))
    return place


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "red cat", "choices": ["dog", "sun"], "answer": 0}) + "\n")
    return str(file)


def commands(place, questions, out):
    """Each command that reads a model, on one that has something wrong with it."""
    usual = {"model": str(place), "out": out}
    measured = usual | {"max_length": 64, "prompt_style": "plain", "test_examples": 0}
    return {
        "generate": lambda: generate.main(generate.Config(prompt=("red cat dog",), max_new_tokens=3, **usual)),
        "choice": lambda: evaluate.main(evaluate.Config(metric="choice", data=questions, **measured)),
        "loss": lambda: evaluate.main(evaluate.Config(metric="loss", data=questions, **DATA, **measured)),
        "gsm8k": lambda: evaluate.main(
            evaluate.Config(metric="gsm8k", data=questions, max_new_tokens=3, **DATA, **measured)
        ),
    }


DATA = {"fields": "instruction=question,response=question"}
COMMANDS = ("generate", "choice", "loss", "gsm8k")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_token_beyond_the_vocabulary_is_refused(narrow, questions, tmp_path, command):
    tokenizer = load_tokenizer(narrow)
    assert max(tokenizer("red cat dog").input_ids) >= 50
    with pytest.raises(UserError, match=r"narrow: its tokenizer makes token \d+, but the model's vocabulary has 50: "):
        commands(narrow, questions, tmp_path / "out")[command]()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_that_overflow_are_an_error_that_names_model_and_tensor(overflows, questions, tmp_path, command):
    outputs = "logits" if command in ("generate", "gsm8k") else "losses"
    with pytest.raises(UserError) as caught:
        commands(overflows, questions, tmp_path / "out")[command]()
    assert str(caught.value) == (
        f"--model {overflows}: the {outputs} are not finite, although the weights are; the largest weight is 1e+19 in "
        f"{HUGE}: fetch the model again, or give another"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("check_rate", [True, False])
def test_a_run_ends_before_its_first_round_and_leaves_nothing(overflows, tmp_path, check_rate):
    """The learning rate's probe, which would blame the learning rate, is not asked."""
    run = paper_config(
        model=str(overflows),
        data=str(small_run.write_data(tmp_path / "data.jsonl", 40)),
        clients=2,
        rounds=1,
        local_steps=1,
        batch_size=2,
        max_length=64,
        test_examples=4,
    )
    with pytest.raises(
        UserError, match=r"overflows: the losses are not finite, .* 1e\+19 in model.layers.1.mlp.up_proj"
    ):
        fedmezo.main(fedmezo.Config(run, out=tmp_path / "out", check_rate=check_rate))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_weight_whose_square_overflows_is_named(folder, config, questions, tmp_path, command):
    """In the embedding it makes the norms zero and so all logits, which are finite."""
    base = load_base(folder, config)
    embedding = np.array(base["embed_tokens"]["embedding"])
    embedding[:, 3] = -3e38
    huge = base | {"embed_tokens": {"embedding": embedding}}
    assert not np.any(Llama(config).apply({"params": huge}, np.array([[1, 2, 3]]), {}))
    save_base(tmp_path / "huge", config, huge, tokenizer=load_tokenizer(folder))
    with pytest.raises(UserError, match=r"safetensors: model.embed_tokens.weight holds a weight of 3e\+38, whose"):
        commands(tmp_path / "huge", questions, tmp_path / "out")[command]()
    assert not (tmp_path / "out").exists()


def test_each_weight_is_read_and_checked_once(folder, config, questions, tmp_path, monkeypatch):
    """A run, and all that reads a model: the files go through memory once, and no second check follows."""
    reads, checked = Counter(), Counter()

    def counted(counter, function, name_of):
        return lambda *given: (counter.update([name_of(*given)]), function(*given))[1]

    monkeypatch.setattr(safetensors, "_read_tensor", counted(reads, safetensors._read_tensor, lambda file, name: name))
    monkeypatch.setattr(
        stored_base, "check_tensor", counted(checked, stored_base.check_tensor, lambda tensor, name, file: name)
    )
    monkeypatch.setattr(checks, "_largest", lambda base: pytest.fail("all weights are searched for the largest"))

    def stop(context):
        raise KeyboardInterrupt

    def begin():
        with pytest.raises(KeyboardInterrupt):  # before the first round, when all is loaded and checked
            fine_tune(run, tmp_path / "run", on_start=stop)

    data = str(small_run.write_data(tmp_path / "data.jsonl", 40))
    run = paper_config(model=str(folder), data=data, clients=2, max_length=64, test_examples=4)
    read = commands(folder, questions, tmp_path / "out")
    merge = lambda: export(folder, tmp_path / "merged")  # noqa: E731
    for name, command in {"run": begin, "generate": read["generate"], "loss": read["loss"], "merge": merge}.items():
        reads.clear()
        checked.clear()
        command()
        once = dict.fromkeys(layout(config), 1)
        assert reads == once, name
        assert checked == ({} if name == "merge" else once), name  # it writes weights and computes with none


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_largest_magnitude_of_any_floats(dtype):
    draw = np.random.default_rng(0)
    tensor = (draw.standard_normal((5, 7)) * 10.0 ** draw.integers(-9, 5, (5, 7))).astype(dtype)
    assert largest_magnitude(tensor) == max(abs(float(entry)) for entry in tensor.ravel()) > 0
    assert largest_magnitude(-tensor) == largest_magnitude(tensor)
    assert largest_magnitude(np.zeros((2, 3), dtype)) == 0
    for odd in (np.nan, -np.nan, np.inf, -np.inf):
        tensor[3, 2] = odd
        assert not np.isfinite(largest_magnitude(tensor))


def test_an_adapter_that_overflows_is_named_beside_the_model(folder, config, tmp_path):
    lora = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 2e38, np.float32), init_lora(jax.random.key(0), config, 2, ("o_proj",))
    )
    save_adapter(tmp_path / "adapter", lora, rank=2, alpha=8.0, targets=("o_proj",), base_name="small")
    usual = {"model": str(folder), "out": tmp_path / "out", "adapter": tmp_path / "adapter"}
    with pytest.raises(UserError, match=r"and of the adapter 2e\+38 in o_proj: fetch the model and the adapter again"):
        generate.main(generate.Config(prompt=("red cat dog",), max_new_tokens=3, **usual))


def test_logits_count_up_to_the_end_of_a_row_alone(folder, config):
    """A token whose embedding is NaN spoils what follows it, and nothing where the row has ended with it."""
    base = load_base(folder, config)
    model = Llama(config)
    (ends, goes_on) = continued(model, base, {}, [[5, 9], [7, 3]], 4, ends=[])
    spoils = ends[1]
    assert spoils not in (5, 9, 7, 3, ends[0], *goes_on)
    embedding = np.array(base["embed_tokens"]["embedding"])
    embedding[spoils] = np.nan
    spoilt = base | {"embed_tokens": {"embedding": embedding}}
    assert continued(model, spoilt, {}, [[5, 9], [7, 3]], 4, ends=[spoils]) == [ends[:2], goes_on]
    with pytest.raises(UserError, match="the logits are not finite"):
        continued(model, spoilt, {}, [[5, 9], [7, 3]], 4, ends=[])


def test_the_largest_weight_is_found_wherever_it_is(folder, config):
    base = load_base(folder, config)
    assert largest_weight(config, overflowing(base)) == (HUGE, pytest.approx(1e19))
    for name, path, at in (
        ("lm_head.weight", ("lm_head", "kernel"), (3, 7)),
        ("model.norm.weight", ("norm", "scale"), (0,)),
        ("model.layers.0.self_attn.k_proj.weight", ("layers", "self_attn", "k_proj", "kernel"), (0, 2, 2)),
        ("model.layers.1.input_layernorm.weight", ("layers", "input_layernorm", "scale"), (1, 5)),
    ):
        changed = jax.tree.map(np.array, overflowing(base))
        leaf = changed
        for key in path:
            leaf = leaf[key]
        leaf[at] = -1e20
        assert largest_weight(config, changed) == (name, pytest.approx(1e20))


def test_a_perplexity_beyond_every_number_is_null_in_json(folder, config, questions, tmp_path):
    base = load_base(folder, config)
    loud = base | {"lm_head": {"kernel": base["lm_head"]["kernel"] * 1e4}}
    save_base(tmp_path / "loud", config, loud, tokenizer=load_tokenizer(folder))
    found = likelihood.mean_loss(Llama(config), loud, {}, table([5, 9, 12], vocabulary=200))
    assert 710 < found.loss < np.inf
    assert found.perplexity == np.inf
    commands(tmp_path / "loud", questions, tmp_path / "out")["loss"]()
    text = (tmp_path / "out" / "results.json").read_text()
    rows = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))["rows"]
    assert rows[0]["value"] > 710
    assert rows[1]["value"] is None
