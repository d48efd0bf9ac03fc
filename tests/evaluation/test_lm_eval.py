"""Tasks of lm-evaluation-harness: against its own backend ``hf``, and against the model's logits by hand."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from experiments import evaluate
from fedmezo_jax.errors import UserError
from fedmezo_jax.evaluation.loaded import LoadedModel
from fedmezo_jax.llama.checkpoints.adapter import load_adapter, save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.registry import cache_folder, load_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate

from fedmezo_jax.evaluation import harness_tasks, likelihood
from fedmezo_jax.evaluation import lm_eval as ours

TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: 'first {{a}} {{b}}:'\ndoc_to_choice: options\n"
    "doc_to_target: answer\nmetric_list: [{metric: acc}]",
    "last_word": "output_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: ' {{a}} {{b}}'\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]",
    "pages": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}]",
    "answers": "output_type: generate_until\ndoc_to_text: '{{text}} both {{a}} {{b}} '\ndoc_to_target: '{{b}} {{a}}'\n"
    "generation_kwargs: {until: ['e', ' c'], max_gen_toks: 20}\nmetric_list: [{metric: exact_match}]",
    "long_answers": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{a}}'\n"
    "fewshot_split: test\nnum_fewshot: 2\n"
    "generation_kwargs: {until: [], max_gen_toks: 40}\nmetric_list: [{metric: exact_match}]",
}
"""A stand-in for each kind of task. The longest texts are longer than a small model's 64 tokens."""
SMALL = "llama with an adapter", "llama, begin token added", "Qwen2", "Qwen3"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and tasks, which the harness has loaded; and models."""
    place = tmp_path_factory.mktemp("harness")
    draw = np.random.RandomState(0)

    def words(count):
        return " ".join(draw.choice(small_run.WORDS, count))

    rows = [
        {
            "text": words(1 + 5 * i),
            "a": words(1),
            "b": words(1),
            "options": [words(1), words(2), words(3), f"{words(1)} x"],
            "answer": i % 4,
        }
        for i in range(10)
    ]
    (place / "data" / "own" / "set").mkdir(parents=True)
    (place / "data" / "own" / "set" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "data" / "tasks").mkdir()
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: own/set\ntest_split: test\n"
        (place / "data" / "tasks" / f"{name}.yaml").write_text(head + text + "\n")
    small_run.write_model(place / "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
        yield place, rows, harness_tasks.load_tasks([*TASKS], place / "data", download=False)


def loaded(folder, adapter=None):
    config = LlamaConfig.from_json(folder)
    base = jax.tree.map(jnp.asarray, load_base(folder, config))
    adapter = adapter and load_adapter(adapter, config)
    scale, lora = (adapter.alpha / adapter.rank, adapter.lora) if adapter else (1.0, {})
    return ours.HarnessModel(LoadedModel(Llama(config, scale), base, lora, load_tokenizer(folder), "small"))


def write_qwen(folder, source, kind):
    """A random Qwen of transformers, with the tokenizer of another model."""
    import torch
    import transformers

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=200, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, eos_token_id=2, **sizes
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for weight in model.parameters():  # as drawn, they say nearly the same of every token
        weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


def answers(model, tasks):
    """Every response to every request, by task."""
    samples = simple_evaluate(model, tasks=tasks, bootstrap_iters=0)["samples"]
    return {task: [response for row in rows for (response,) in row["resps"]] for task, rows in samples.items()}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which PEFT asks for
@pytest.mark.parametrize("case", [*SMALL, "SmolLM2-135M"])
def test_responses_are_those_of_the_harness_s_own_backend(case, place, tmp_path):
    import peft
    import transformers
    from lm_eval.models.huggingface import HFLM

    place, _, tasks = place
    folder, adapter = tmp_path / "model", None
    if case not in SMALL:
        folder = cache_folder() / "smollm2-135m"
        if not (folder / "model.safetensors").exists():
            pytest.skip("smollm2-135m is not in the cache: a run with --model smollm2-135m puts it there")
    elif case.startswith("Qwen"):
        write_qwen(folder, place / "llama", case)
    else:
        small_run.write_model(folder)
    if "begin token" in case:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
        tokenizer.save(str(folder / "tokenizer.json"))
    if "adapter" in case:
        adapter, targets = tmp_path / "adapter", ("q_proj", "v_proj")
        lora = jax.tree.map(
            lambda leaf: leaf + 0.2, init_lora(jax.random.key(0), LlamaConfig.from_json(folder), 2, targets)
        )
        save_adapter(adapter, lora, rank=2, alpha=8.0, targets=targets, base_name="small")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    if adapter:  # put on here: the backend would first cut the embedding to the tokenizer's vocabulary
        theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    theirs = HFLM(theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), device="cpu", batch_size=3)
    expected, found = answers(theirs, tasks), answers(loaded(folder, adapter), tasks)
    assert found.keys() == expected.keys() == TASKS.keys()
    for task in ("choice", "last_word"):
        np.testing.assert_allclose([score[0] for score in found[task]], [score[0] for score in expected[task]], 1e-5)
        assert [score[1] for score in found[task]] == [score[1] for score in expected[task]]
    np.testing.assert_allclose(found["pages"], expected["pages"], 1e-5)
    for task in ("answers", "long_answers"):
        assert found[task] == expected[task]
        assert len(set(found[task])) > 3


def by_hand(model, tokens):
    """log p of every next token, [n - 1], and whether it is the likeliest one."""
    subject, count = model.loaded, len(tokens) - 1
    padded = np.array([[*tokens[:-1], *[0] * (64 - count)]])  # so that all lengths share a program
    logits = jax.jit(subject.model.apply)({"params": subject.base}, padded, {})[0, :count]
    scores = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return scores[np.arange(len(tokens) - 1), tokens[1:]], scores.argmax(-1) == tokens[1:]


def own_answer(model, context):
    """The context with the token that the model puts after it, where that stays a token of its own in the text."""
    subject, tokens = model.loaded, model.tokenizer.encode(context)
    logits = jax.jit(subject.model.apply)({"params": subject.base}, np.array([tokens]), {})
    first = int(logits[0, -1].argmax())
    text = model.tokenizer.decode([first])
    return (context, text) if model.tokenizer.encode(context + text) == [*tokens, first] else None


def ask(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_likelihoods_are_those_of_the_logits(place, monkeypatch):
    place, rows, _ = place
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 200)
    monkeypatch.setattr(ours, "_LABELS_IN_ROW", 2)
    model = loaded(place / "llama")
    encode = model.tokenizer.encode
    pairs = [(row["text"], f" {option}") for row in rows for option in row["options"]]
    # Requests that share all but their last token, some twice, and one whose answers the model would give itself.
    pairs += [("red cat", f" {letter}") for letter in "abcab"]
    pairs.append(next(filter(None, (own_answer(model, word) for word in small_run.WORDS))))
    found = model.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, is_best) in zip(pairs, found, strict=True):
        tokens, count = encode(context + continuation), len(encode(context + continuation)) - len(encode(context))
        scores, best = by_hand(model, tokens[-65:])
        assert score == pytest.approx(scores[-count:].sum(), rel=1e-5)
        assert is_best == best[-count:].all()
    assert found[-1][1]
    assert not found[0][1]
    (alone,) = model.loglikelihood(ask("loglikelihood", ("", "red cat")))  # after the begin token
    assert alone[0] == pytest.approx(by_hand(model, [1, *encode("red cat")])[0].sum(), rel=1e-5)


def test_a_text_longer_than_the_model_is_scored_in_windows(place):
    model = loaded(place[0] / "llama")
    text = " ".join(small_run.WORDS * 12)
    tokens = [1, *model.tokenizer.encode(text)]
    windows = [tokens[:65], tokens[64:129], tokens[-65:]]
    assert 128 < len(tokens) - 1 < 192
    expected = [by_hand(model, window)[0] for window in windows]
    expected[2] = expected[2][
        -(len(tokens) - 129) :
    ]  # the last window is full; what it shares with another counts once
    total, empty = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,), ("",)))
    assert total == pytest.approx(sum(map(np.sum, expected)), rel=1e-5)
    assert empty == 0


def test_generation_ends_at_the_first_stop_sequence(place, monkeypatch):
    model = loaded(place[0] / "llama")
    lengths = []

    def noted(*given, **named):
        found = real(*given, **named)
        lengths.extend(map(len, found))
        return found

    real = ours.generate
    monkeypatch.setattr(ours, "generate", noted)
    (free,) = model.generate_until(ask("generate_until", ("red", {"until": [], "max_gen_toks": 50})))
    stop = free[len(free) // 4 :][:2]
    early = {"until": [stop, "no such text"], "max_gen_toks": 50}
    (cut,) = model.generate_until(ask("generate_until", ("red", early)))
    assert cut == free[: free.index(stop)]
    assert lengths[0] == 50
    assert lengths[1] < 50  # what nobody reads is not generated


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_sample": True, "temperature": 0.5}, "greedily alone"),
        ({"num_beams": 3}, "greedily alone"),
        ({"max_gen_toks": 64}, "a task asks for 64 new tokens; the model reads 64 in all"),
    ],
)
def test_generation_that_is_not_offered_is_refused(place, settings, words):
    with pytest.raises(UserError, match=words):
        loaded(place[0] / "llama").generate_until(ask("generate_until", ("red", settings)))


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chats_go_through_the_tokenizer_s_template(place):
    model = loaded(place[0] / "llama")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "red"}]
    with pytest.raises(UserError, match="no chat template"):
        model.apply_chat_template(turns)
    model.tokenizer.chat_template = TEMPLATE
    assert (
        model.apply_chat_template(turns) == "<user>red</s><assistant>"
    )  # the system turn, which it refuses, is left out
    opened = [*turns[1:], {"role": "assistant", "content": "cat"}]
    assert model.apply_chat_template(opened, add_generation_prompt=False) == "<user>red</s><assistant>cat"


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = lambda name: name.partition(".")[0] == "torch"
PathFinder.find_spec = staticmethod(lambda name, *rest: None if hidden(name) else find(name, *rest))
import fedmezo_jax.evaluation.harness_tasks
print("torch" in sys.modules)
"""


def test_no_pytorch_is_needed():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_the_command_writes_what_the_tasks_found(place, tmp_path, monkeypatch):
    place, rows, tasks = place
    monkeypatch.setattr(
        harness_tasks, "load_tasks", lambda *given: [task for task in tasks if task.task_name in given[0]]
    )
    out = tmp_path / "out"
    evaluate.main(
        evaluate.Config(
            model=str(place / "llama"), out=out, tasks="choice, answers", task_data=place / "data", task_limit=9
        )
    )
    found = {row.pop("metric"): row for row in json.loads((out / "results.json").read_text())["rows"]}
    model = loaded(place / "llama")
    right = []
    for row in rows[:9]:
        context = f"first {row['a']} {row['b']}:"
        scores = []
        for option in row["options"]:
            tokens, start = model.tokenizer.encode(f"{context} {option}"), len(model.tokenizer.encode(context))
            scores.append(by_hand(model, tokens)[0][start - 1 :].sum())
        right.append(np.argmax(scores) == row["answer"])
    assert 0 < sum(right) < 9
    accuracy = found["choice acc"]
    assert accuracy == {
        "value": pytest.approx(np.mean(right)),
        "stderr": pytest.approx(np.std(right, ddof=1) / 3),
        "count": 9,
    }
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == [f"{row['text']} both {row['a']} {row['b']} " for row in rows[:9]]
    assert {line["task"] for line in lines} == {"answers"}
    assert found["answers exact_match"]["value"] == np.mean([line["generated"] == line["given"] for line in lines])


def test_what_is_not_there_is_named_and_nothing_is_fetched(place, monkeypatch):
    def no_network(*given, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"--tasks hellaswag: cannot be loaded .*Rowan/hellaswag.* --allow-download"):
        harness_tasks.load_tasks(["hellaswag"], place[0] / "data", download=False)


def test_tasks_and_folders_that_do_not_exist_are_named(place):
    with pytest.raises(UserError, match=r"--task-data .*none: there is no such folder"):
        harness_tasks.load_tasks(["choice"], place[0] / "none", download=False)
    with pytest.raises(UserError, match="--tasks: unknown 'helaswag'"):
        harness_tasks.load_tasks(["helaswag", "choice"], place[0] / "data", download=False)


def test_without_the_harness_the_remedy_is_one_line(place, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "fedmezo_jax.evaluation.harness_tasks")
    monkeypatch.delattr("fedmezo_jax.evaluation.harness_tasks", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UserError, match=r"--tasks needs lm_eval.evaluator: pip install 'fedmezo_jax\[eval\]'"):
        evaluate.main(evaluate.Config(model=str(place[0] / "llama"), out=tmp_path / "out", tasks="choice"))
