"""FedMeZO's client step in PyTorch and PEFT, like the paper's reference code, and back-propagation: the baseline.

Clients run one after another. A step moves every LoRA parameter in place by +μz, −2μz and +μz, evaluates the loss in
between, and then makes the update. It draws z again from its seed for each of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig, to_json


class PeerSteps(NamedTuple):
    """Functions that run one local step of all clients, and return when the device has done it.

    Attributes:
        mezo: the zeroth-order step.
        backprop: a step of SGD by back-propagation, without checkpoints.
    """

    mezo: Callable[[], None]
    backprop: Callable[[], None]


def peer_steps(
    config: LlamaConfig,
    clients: int,
    batch: int,
    length: int,
    rank: int,
    targets: list[str],
    dtype: str,
    device: str = "cpu",
) -> PeerSteps:
    """Returns the steps on random weights and examples, half of each labelled; ``device`` is ``cpu`` or ``cuda``.

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
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_json(config))).to(torch_dtype)
        model = get_peft_model(model, lora).to(torch_dtype).eval()
        tokens = torch.randint(0, config.vocab_size, (clients, batch, length))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    labels = tokens.clone()
    labels[..., : length // 2] = -100
    scale, rate = 1e-3, 1e-5

    def move(seed: int, by: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            z = torch.normal(0.0, 1.0, size=parameter.shape, dtype=parameter.dtype, device=device)
            parameter.data = parameter.data + by * z

    def loss(client: int) -> Any:
        return model(
            input_ids=tokens[client], attention_mask=torch.ones_like(tokens[client]), labels=labels[client]
        ).loss

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def forward(client: int) -> float:
        with torch.inference_mode():
            return loss(client).item()

    def mezo() -> None:
        for seed in range(clients):
            move(seed, scale)
            plus = forward(seed)
            move(seed, -2 * scale)
            minus = forward(seed)
            move(seed, scale)
            move(seed, -rate * (plus - minus) / (2 * scale))
        wait()

    def backprop() -> None:
        for client in range(clients):
            gradients = torch.autograd.grad(loss(client), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.data -= rate * gradient
        wait()

    return PeerSteps(mezo, backprop)
