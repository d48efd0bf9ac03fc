"""FedMeZO's client step in PyTorch and PEFT, like the paper's reference code; the baseline of ``benchmarks.step``.

Clients run one after another. A step moves every LoRA parameter in place by +μz, −2μz and +μz, evaluates the loss in
between, and then makes the update. It draws z again from its seed for each of these.
"""

from __future__ import annotations

from collections.abc import Callable

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig, to_json


def peer_step(
    config: LlamaConfig, clients: int, batch: int, length: int, rank: int, targets: list[str], dtype: str
) -> Callable[[], None]:
    """Returns a function that runs one local step of all clients on random weights and examples, half of each labelled.

    Raises:
        UserError: PyTorch or PEFT is not installed.
    """
    try:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"the peer needs PyTorch and PEFT ({error}): pip install torch peft, or --no-peer") from None

    torch_dtype = getattr(torch, dtype)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_json(config))).to(torch_dtype)
    model = get_peft_model(model, lora).to(torch_dtype).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = torch.randint(0, config.vocab_size, (clients, batch, length))
    labels = tokens.clone()
    labels[..., : length // 2] = -100
    scale, rate = 1e-3, 1e-5

    def move(seed: int, by: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            z = torch.normal(0.0, 1.0, size=parameter.shape, dtype=parameter.dtype)
            parameter.data = parameter.data + by * z

    def loss(client: int) -> float:
        with torch.inference_mode():
            mask = torch.ones_like(tokens[client])
            return model(input_ids=tokens[client], attention_mask=mask, labels=labels[client]).loss.item()

    def step() -> None:
        for seed in range(clients):
            move(seed, scale)
            plus = loss(seed)
            move(seed, -2 * scale)
            minus = loss(seed)
            move(seed, scale)
            move(seed, -rate * (plus - minus) / (2 * scale))

    return step
