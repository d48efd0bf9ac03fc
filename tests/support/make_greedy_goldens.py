"""What Hugging Face's ``generate`` says greedily on SmolLM2-135M, for machines without PyTorch.

    python -m experiments.generate --model smollm2-135m --prompt x   # once, to have the model
    python tests/make_greedy_goldens.py

writes ``tests/goldens/smollm2_greedy.json``: the 64 (or fewer) tokens after each of 20 prompts, in float32, one by one.
"""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

from fedmezo_jax.llama.registry import load_tokenizer, resolve

GOLDENS = Path(__file__).parent / "goldens" / "smollm2_greedy.json"
NEW_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "The three primary colours are",
    "import numpy as np\n\n",
    "Water boils at",
    "Dear Sir or Madam,",
    "In 1969, astronauts",
    "The derivative of x^2 is",
    "List of planets: Mercury, Venus,",
    "Translate to French: good morning ->",
    "She opened the door and",
    "SELECT name FROM users WHERE",
    "The mitochondria is",
    "To make a cup of tea, first",
    "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
    "Photosynthesis",
    "Hello",
]


def fingerprint(folder: Path) -> str:
    """Of one matrix: the model comes in two quantisations, with unlike weights."""
    with safe_open(folder / "model.safetensors", framework="numpy") as handle:
        return hashlib.sha256(handle.get_tensor("model.layers.0.self_attn.q_proj.weight").tobytes()).hexdigest()


def hugging_face_greedy(model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The tokens that ``model.generate`` adds to each prompt, one prompt at a time."""
    import torch

    found = []
    for prompt in prompts:
        with torch.no_grad():
            tokens = torch.tensor([prompt])
            # Without a mask, generate takes what equals the padding for padding.
            mask = torch.ones_like(tokens)
            row = model.generate(
                tokens, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
            )
        found.append(row[0, len(prompt) :].tolist())
    return found


if __name__ == "__main__":
    import torch
    from transformers import LlamaForCausalLM

    folder = resolve("smollm2-135m")
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = hugging_face_greedy(model, prompts, NEW_TOKENS)
    kept = {"fingerprint": fingerprint(folder), "prompts": prompts, "tokens": rows}
    GOLDENS.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    print(f"{GOLDENS}: {sum(map(len, rows))} tokens")
