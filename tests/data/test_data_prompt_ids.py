"""Prompt ids: the same in training, generation and scoring, whatever the tokenizer puts around a text."""

import json
import shutil
from dataclasses import replace

import llama2_tokenizer
import numpy as np
import pytest
import small_run
from llama2_tokenizer import VOCABULARY, spelled
from token_data import make_tokenizer
from tokenizers import processors

from experiments import evaluate, generate
from fedmezo_jax.data.encode import encode
from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.prompts import prompt, prompt_ids, text_ids
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.registry import load_tokenizer

SORT, NAME = Example("Sort.", "b, a", "a, b", ""), Example("Name {x}.", "", "x", "")
STYLES = ("alpaca", "plain", "question-answer")


@pytest.fixture(scope="module", params=[False, True], ids=["begin", "begin and end"])
def llama2(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2")
    llama2_tokenizer.save(folder, add_eos_token=request.param)
    written = json.loads((folder / "tokenizer.json").read_text())
    assert written["pre_tokenizer"]["prepend_scheme"] == "first"
    tokenizer = load_tokenizer(folder)
    assert tokenizer("x").input_ids == [1, *spelled(" x"), *([2] if request.param else [])]  # it is such a tokenizer
    return tokenizer


def ending(begin):
    """A byte-level tokenizer that appends the end token, which is its begin token too."""
    tokenizer = make_tokenizer(bos_token="</s>", pad_token="<pad>")
    template = "</s> $A </s>" if begin else "$A </s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", 2)]
    )
    return tokenizer


def trained(example, tokenizer, style):
    """The ids before the first label in training."""
    rows = encode([example], tokenizer, 1000, style=style).rows
    return rows.tokens[0, : rows.label_positions[0, 0] + 1].tolist()


@pytest.mark.parametrize("style", STYLES)
def test_a_space_stays_before_the_first_word_after_the_begin_token(llama2, style):
    expected = [[1, *spelled(f" {prompt(example, style)}")] for example in (SORT, NAME)]
    assert prompt_ids([SORT, NAME], llama2, style) == expected
    assert [trained(example, llama2, style) for example in (SORT, NAME)] == expected
    assert text_ids(["Hi", "Ho ho"], llama2) == [[1, *spelled(" Hi")], [1, *spelled(" Ho ho")]]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_no_end_token_follows_a_prompt(style, begin):
    tokenizer = ending(begin)
    (ids,) = prompt_ids([SORT], tokenizer, style)
    assert ids == trained(SORT, tokenizer, style)
    assert ids.count(2) == begin  # the begin token alone
    assert tokenizer.decode(ids[begin:]) == prompt(SORT, style)


def test_a_chat_s_prompt_is_what_stands_before_its_answer_in_training(llama2):
    llama2.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ ('[INST] ' + m['content'] + ' [/INST]') if m['role'] == 'user' else (' ' + m['content'] + eos_token) }}"
        "{% endfor %}"
    )
    (ids,) = prompt_ids([NAME], llama2, "chat")
    assert ids == [1, *spelled("[INST] Name {x}. [/INST]")]
    assert trained(NAME, llama2, "chat") == ids


def test_nothing_asked_is_nothing():
    assert prompt_ids([], make_tokenizer(), "alpaca") == []


@pytest.mark.parametrize("end", [False, True])
def test_the_commands_give_the_model_the_ids_of_training(tmp_path, monkeypatch, end):
    folder = small_run.write_model(tmp_path / "model")
    base = load_base(folder, LlamaConfig.from_json(folder))
    config = replace(LlamaConfig.from_json(folder), vocab_size=len(VOCABULARY), max_position_embeddings=300)
    wide = base | {
        "embed_tokens": {"embedding": np.ones((config.vocab_size, config.hidden_size), np.float32)},
        "lm_head": {"kernel": np.ones((config.hidden_size, config.vocab_size), np.float32)},
    }
    shutil.rmtree(folder)
    save_base(folder, config, wide)
    llama2_tokenizer.save(folder, add_eos_token=end)
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"instruction": NAME.instruction, "output": "The answer is 1"}) + "\n")
    given = []
    for command in (generate, evaluate):
        monkeypatch.setattr(
            command, "generate", lambda model, base, lora, prompts, *_, **__: given.extend(prompts) or [[5]]
        )
    usual = {"model": str(folder), "out": tmp_path / "out"}
    generate.main(generate.Config(prompt=(NAME.instruction,), instruct=True, **usual))
    generate.main(generate.Config(prompt=(prompt(NAME),), **usual))
    evaluate.main(evaluate.Config(data=str(data), metric="gsm8k", test_examples=0, max_length=300, **usual))
    assert given == [[1, *spelled(f" {prompt(NAME)}")]] * 3
    generate.main(generate.Config(prompt=(NAME.instruction,), instruct=True, prompt_style="plain", **usual))
    assert given[3] == [1, *spelled(f" {prompt(NAME, 'plain')}")]
    with pytest.raises(UserError, match="--prompt-style plain is for instructions: add --instruct"):
        generate.Config(prompt=(NAME.instruction,), prompt_style="plain")


def test_a_response_is_tokenised_apart_from_its_prompt(llama2):
    """As documented: for such a tokenizer the first label has a space that joint tokenisation does not give it."""
    example = Example("Name the capital of France.", "", "Paris", "")
    rows = encode([example], llama2, 1000).rows
    assert rows.labels[0, : int(rows.label_weights.sum())].tolist() == [*spelled(" Paris"), 2]
    joint = llama2(prompt(example) + "Paris", add_special_tokens=False).input_ids
    assert joint == spelled(f" {prompt(example)}Paris")
