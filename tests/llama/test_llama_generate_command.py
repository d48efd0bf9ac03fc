"""``python -m experiments.generate``: what it prints and writes, and that bad input costs one line."""

import json
import sys

import pytest
from test_llama_generate import random_lora
from test_llama_parity import random_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from weight_files import LLAMA3, shapes_of, write_in

from experiments import _cli
from experiments import generate as command
from fedmezo_jax.llama.checkpoints.adapter import save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.generate import generate
from fedmezo_jax.llama.lora import TARGETS
from fedmezo_jax.llama.model import Llama


@pytest.fixture
def model(tmp_path):
    """A model that can be asked: letters are tokens."""
    raw = shapes_of(2, False, False, False) | {"vocab_size": 32, "rope_scaling": LLAMA3, "max_position_embeddings": 400}
    write_in("safetensors", tmp_path / "model", raw, random_weights(raw))
    vocab = {letter: i for i, letter in enumerate("#^$abcdefghijklmnopqrstuvwxyz .:")}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="#"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="^", eos_token="$", unk_token="#").save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def run(monkeypatch, *arguments):
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    try:
        _cli.run(command.main, command.Config, command.__doc__)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_command_writes_what_it_prints(model, tmp_path, monkeypatch, capsys):
    config = LlamaConfig.from_json(model)
    given = ["--model", model, "--prompt", "hello", "--prompt", "a b", "--max-new-tokens", 9, "--out", tmp_path / "out"]
    assert run(monkeypatch, *given) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["rows"]
    assert [row["prompt"] for row in rows] == ["hello", "a b"]
    assert [row["prompt_tokens"] for row in rows] == [5, 3]
    assert all(row["response"] in capsys.readouterr().out for row in rows[:1])
    letters = "#^$abcdefghijklmnopqrstuvwxyz .:"
    expected = generate(Llama(config), load_base(model, config), {}, [[letters.index(x) for x in "a b"]], 9)[0]
    assert rows[1]["new_tokens"] == len(expected)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["prompt"], said["max_new_tokens"]) == (["hello", "a b"], 9)
    # with an adapter, and as an instruction
    save_adapter(tmp_path / "adapter", random_lora(config), rank=3, alpha=6, targets=TARGETS, base_name="x")
    assert run(monkeypatch, *given, "--adapter", tmp_path / "adapter") == 0
    adapted = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["response"] for row in adapted] != [row["response"] for row in rows]
    assert run(monkeypatch, *given, "--instruct") == 0
    instructed = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert instructed[0]["prompt"] == "hello"
    assert instructed[0]["prompt_tokens"] > 100


def test_eight_bit_products_are_asked_of_the_model(model, tmp_path, monkeypatch):
    asked = []

    def answer(model, *rest, **names):
        asked.append(model.eight_bit)
        return generate(model, *rest, **names)

    monkeypatch.setattr(command, "generate", answer)
    given = ["--model", model, "--prompt", "ab", "--max-new-tokens", 2, "--base", "int8", "--out", tmp_path / "out"]
    assert run(monkeypatch, *given) == run(monkeypatch, *given, "--eight-bit-products") == 0
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "no prompt is given"),
        (["--prompt", ""], "a prompt is empty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--prompt", "x", "--max-new-tokens", "many"], "max-new-tokens"),
        (["--prompt", "x", "--adapter", "nowhere"], "nowhere/adapter_config.json: cannot be read"),
        (["--prompt", "x", "--model", "nowhere"], "unknown model 'nowhere'"),
        (["--prompt", "x", "--wrong", "1"], "wrong"),
        (["--prompt", "x", "--eight-bit-products"], "--eight-bit-products needs --base int8 or fp8"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, tmp_path, monkeypatch, capsys, arguments, named):
    first = [] if "--model" in arguments else ["--model", model]
    assert run(monkeypatch, *first, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_names_every_option(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for option in ("--prompt", "--model", "--adapter", "--instruct", "--max-new-tokens", "--out"):
        assert option in printed
