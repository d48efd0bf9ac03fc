"""The scorers by hand, the likelihoods against the model's own logits, and the command on a small model."""

import json
import math
from decimal import Decimal

import jax
import numpy as np
import pytest
import small_run
from token_data import make_tokenizer, table

from experiments import evaluate
from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.files import Record
from fedmezo_jax.data.prompts import text_ids
from fedmezo_jax.errors import UserError
from fedmezo_jax.evaluation import choice, gsm8k, likelihood, text
from fedmezo_jax.llama.checkpoints.adapter import save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.registry import load_tokenizer


@pytest.mark.parametrize(
    ("solution", "number"),
    [
        ("2+3=5\nThe answer is 5", "5"),
        ("The answer is $1,234.50.", "1234.50"),
        ("the answer is: -7 degrees", "-7"),
        ("The answer is -$7", "-7"),
        ("So 5-3=2.\n#### 2", "2"),
        ("#### Step 1\nAdd 2 and 3, which is 5.", "5"),  # a heading states no answer
        # A model that goes on to another problem is held to its first answer.
        ("The answer is 18\n\n### Instruction:\nNext.\nThe answer is 20", "18"),
        ("The answer is 12 of 30 eggs, which is 40%.", "12"),
        # Without the phrase the last number counts, and a dash between numbers is no sign.
        ("He has 3 and then 4, so 3+4=7 in all.", "7"),
        ("It takes 10-3", "3"),
        ("x = .5", ".5"),
        ("Tickets cost 1,000,000 dollars.", "1000000"),
        # GSM8K's marker rules, wherever it stands and whatever the text before it says.
        ("The answer is clear: 2+2=4\n#### 4", "4"),
        ("#### 4\nThe answer is 5", "4"),
        ("#### 18\n\nNext.\n#### 20", "18"),
        ("####$1,234.5", "1234.5"),
        ("So 3+4=7.\n####", "7"),  # a marker without a number is none
        # U+2212 is a minus like the hyphen, and like it a sign only where nothing stands before it.
        ("The answer is \u221242", "-42"),
        ("#### \u2212$42", "-42"),
        ("It takes 10\u22123", "3"),
        # A comma separates thousands and nothing else, and a number has one point at most.
        ("The answer is 1,23", None),
        ("The answer is 1,23 or 5", None),
        ("#### 1234,567", None),
        ("#### 1,2345", None),
        ("1,2,3", None),
        ("The answer is 3.4.5", None),
        ("He has 9. Version 3.4.5", None),
        ("The answer is 1.234,5", None),
        # Punctuation after a number is not part of it.
        ("The answer is 18, as 9+9=18.", "18"),
        ("The answer is 3.5.", "3.5"),
        ("It goes on...5", "5"),
        # The phrase without a number after it states nothing, whatever came before.
        ("There are 9. The answer is nine", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_answer_of_a_solution(solution, number):
    assert gsm8k.answer(solution) == (None if number is None else Decimal(number))


def test_exact_match_by_hand():
    references = ["...\nThe answer is 72", "The answer is 1,000", "The answer is 5", "#### 3", "The answer is 4"]
    solutions = ["The answer is 72.0", "It is 1000", "The answer is 6", "The answer is three", ""]
    assert gsm8k.score(solutions, references) == (2 / 5, 3 / 5, 5)
    assert gsm8k.score(references, references) == (1, 4 / 5, 5)


def test_a_reference_without_an_answer_matches_nothing():
    assert gsm8k.score(["", "no number"], ["", "none here"]).accuracy == 0


def test_texts_are_compared_word_by_word():
    score = text.score(["def  f():\n", "def g(): pass", "```", ""], ["def f():", "def pass", "x y", "z"])
    # Two words of the second pair's five are the same twice: 4/5. White space does not count.
    assert score == (1 / 4, (1 + 4 / 5 + 0 + 0) / 4, 2 / 4, 4)


ROW = {"question": "2+2?", "choices": ["3", "4", "5"], "answer": 1, "subject": "sums"}
QUESTION = choice.Question("2+2?", ("3", "4", "5"), 1, "sums")


@pytest.mark.parametrize("answer", [1, "B", " B ", "4"])
def test_a_question_in_the_forms_there_are(answer):
    assert choice.question(Record("f, line 1", {**ROW, "answer": answer})) == QUESTION
    assert choice.candidates(QUESTION) == [
        Example("2+2?\nA. 3\nB. 4\nC. 5", "", letter, "sums") for letter in ("A", "B", "C")
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (7, "must be an object"),
        ({"question": "a"}, "the field choices and answer is missing"),
        ({**ROW, "answer": None}, "the field answer is null"),
        ({**ROW, "choices": ["one"]}, "2 to 26 texts"),
        ({**ROW, "choices": "ABC"}, "2 to 26 texts"),
        ({**ROW, "answer": 3}, "index from 0 to 2, a letter from A to C, or one of the choices, not 3"),
        ({**ROW, "answer": -1}, "not -1"),
        ({**ROW, "answer": "D"}, "not 'D'"),
        ({**ROW, "answer": True}, "not True"),
        ({**ROW, "question": 5}, "question must be text"),
    ],
)
def test_a_broken_question_is_named_by_its_row(row, words):
    with pytest.raises(UserError, match=words) as caught:
        choice.question(Record("f, line 4", row))
    assert str(caught.value).startswith("f, line 4: ")


def test_accuracy_by_hand():
    other = QUESTION._replace(choices=("x", "y"), answer=0)
    losses = np.array([3.0, 1.0, 2.0, 0.5, 0.4])  # the first is right, the second wrong
    assert choice.accuracy([QUESTION, other], losses) == 0.5
    assert choice.accuracy([QUESTION, other], np.array([3.0, 1.0, 2.0, 0.4, 0.4])) == 1  # a tie goes to the first
    assert choice.accuracy([other, QUESTION], np.array([1.0, 2.0, 1.0, 1.0, 0.9])) == 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.write_model(tmp_path_factory.mktemp("model") / "small")


def test_row_losses_are_those_of_the_models_logits(folder, monkeypatch):
    config = LlamaConfig.from_json(folder)
    base = load_base(folder, config)
    lora = jax.tree.map(lambda leaf: leaf + 0.05, init_lora(jax.random.key(0), config, 2, ("q_proj", "o_proj")))
    model = Llama(config, 2.0)
    rows = table([5, 60, 9, 12, 33, 33, 8, 7, 6, 12, 50], vocabulary=200)
    logits = jax.jit(lambda tokens: model.apply({"params": base}, tokens, lora))(rows.tokens)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = [
        -sum(
            log_probabilities[i, position, label]
            for position, label, weight in zip(
                rows.label_positions[i], rows.labels[i], rows.label_weights[i], strict=True
            )
            if weight
        )
        for i in range(len(rows.tokens))
    ]
    monkeypatch.setattr(likelihood, "BUCKETS", 2)
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 100)  # several batches, the last of each width not full
    np.testing.assert_allclose(likelihood.row_losses(model, base, lora, rows), expected, rtol=1e-5)
    found = likelihood.mean_loss(model, base, lora, rows)
    labels = int(rows.label_weights.sum())
    assert found.labels == labels
    assert found.loss == pytest.approx(sum(expected) / labels, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / labels), rel=1e-4)


def results(out):
    return {
        row["metric"]: (row["value"], row["count"]) for row in json.loads((out / "results.json").read_text())["rows"]
    }


def run(folder, tmp_path, **settings):
    out = tmp_path / "out"
    evaluate.main(evaluate.Config(model=str(folder), out=out, max_length=64, **settings))
    return results(out)


def test_the_command_measures_loss_and_answers_with_an_adapter(folder, tmp_path, capsys):
    config = LlamaConfig.from_json(folder)
    lora = jax.tree.map(lambda leaf: leaf + 0.3, init_lora(jax.random.key(0), config, 2, ("q_proj", "v_proj")))
    save_adapter(tmp_path / "adapter", lora, rank=2, alpha=8.0, targets=("q_proj", "v_proj"), base_name="small")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"q": f"red {i}", "a": f"The answer is {i}"}) + "\n" for i in range(20)))
    settings = {"data": str(data), "fields": "instruction=q,response=a", "prompt_style": "plain", "test_examples": 5}
    plain = run(folder, tmp_path, **settings)
    adapted = run(
        folder, tmp_path, **settings, adapter=tmp_path / "adapter", metric="loss,gsm8k,text", max_new_tokens=4
    )
    assert plain["loss (nats/token)"][1] == 5
    assert plain["perplexity"][0] == pytest.approx(math.exp(plain["loss (nats/token)"][0]))
    assert adapted["loss (nats/token)"][0] != pytest.approx(plain["loss (nats/token)"][0], rel=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    right = [gsm8k.answer(line["generated"]) == gsm8k.answer(line["given"]) for line in lines]
    assert adapted["gsm8k exact match"] == (sum(right) / 5, 5)
    begun_alike = [line["generated"].split()[:1] == line["given"].split()[:1] for line in lines]
    assert adapted["text first word"] == (sum(begun_alike) / 5, 5)
    assert "gsm8k exact match" in capsys.readouterr().out
    assert run(folder, tmp_path, **{**settings, "test_examples": 0})["perplexity"][1] == 20


def test_the_command_measures_multiple_choice(tmp_path):
    tokenizer = make_tokenizer(pad_token="<pad>")  # knows every byte, and so every letter
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = Llama(config)
    drawn = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32), {})["params"]
    base = jax.tree.map(lambda leaf: leaf * 20, drawn)
    folder = tmp_path / "model"
    save_base(folder, config, base, tokenizer=tokenizer)
    data = tmp_path / "d.json"
    rows = [{"question": f"q{i}", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(12)]
    data.write_text(json.dumps({"data": rows}, indent=1))
    found = run(folder, tmp_path, data=str(data), metric="choice", prompt_style="plain", test_examples=0)
    assert found["choice by chance"] == (pytest.approx(1 / 3), 12)
    # By hand: the next token after each prompt, restricted to the three letters and the end token after it.
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({"params": base}, tokens, {})))
    right = 0
    for i, row in enumerate(rows):
        asked = tokenizer(f"{row['question']}\nA. a\nB. b\nC. c\n", add_special_tokens=False)["input_ids"]
        scores = []
        for letter in "ABC":
            (token,) = tokenizer(letter)["input_ids"]
            tokens = np.array([[*asked, token, tokenizer.eos_token_id]])
            logs = np.asarray(forward(tokens))[0]
            scores.append(logs[len(asked) - 1, token] + logs[len(asked), tokenizer.eos_token_id])
        right += int(np.argmax(scores)) == i % 3
    assert 0 < right < 12
    assert found["choice accuracy"] == (pytest.approx(right / 12), 12)


def test_generated_texts_come_back_in_the_order_of_their_prompts(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 2)
    # Stands in for a model that says its prompt again, and can only take two at a time.
    monkeypatch.setattr(
        evaluate, "generate", lambda model, base, lora, tokens, new, **named: [row[:new] for row in tokens[:2]]
    )
    texts = ["red cat dog", "one", "blue moon", "two three", "star dog bird red"]
    subject = evaluate.LoadedModel(None, None, {}, tokenizer, "x")
    assert evaluate.generator(subject, 99)(text_ids(texts, tokenizer)) == texts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "loss,bleu"}, "--metric: unknown 'bleu'; choose from loss,gsm8k,text,choice,humaneval"),
        ({"metric": " , "}, "there is nothing to measure"),
        ({"metric": "humaneval"}, "runs code that the model writes: add --allow-code-execution"),
        ({"task_limit": -1}, "--task-limit and --num-fewshot must be at least 0"),
        ({"test_examples": -1}, "--test-examples must be at least 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        evaluate.Config(**settings)


def test_a_runs_folder_is_not_written_over(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds a run, whose results would be overwritten"):
        run(folder, tmp_path)
