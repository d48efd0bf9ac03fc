"""The question of each experiment, and the finding of the paper (arXiv 2402.05926).

The studies' tables, the report, ``experiments/README.md`` and ``docs/results.md`` use these texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

NOT_IN_PAPER = "not in the paper"


class Question(NamedTuple):
    """A question of the paper, or one that goes beyond it.

    Attributes:
        question: the question, as in the index.
        paper: the paper's section and finding.
        by_variant: the paper's figures for single variants, by label.
    """

    question: str
    paper: str = NOT_IN_PAPER
    by_variant: Mapping[str, str] = MappingProxyType({})


QUESTIONS = {
    "convergence": Question(
        "Does FedMeZO learn faster than back-propagated FedAvg, both tuned?",
        "Fig. 1, 10: FedMeZO falls faster than FedAvg with plain SGD at FedMeZO's own learning rate",
    ),
    "estimators": Question("Which estimator and which layers learn most at equal compute?"),
    "ceiling": Question("What does back-propagation reach with so many trained layers, run to the end?"),
    "automatic_rate": Question("How much of the best fixed learning rate's loss drop does the automatic one reach?"),
    "single_client": Question("How does MeZO compare with back-propagation for one client?"),
    "perturbation_scale": Question(
        "How does the perturbation scale μ matter?",
        "Fig. 2, 8: of μ = 2e-4, 1e-3 and 5e-3 a smaller one is slightly better",
    ),
    "local_steps": Question(
        "How does the number of local steps matter?",
        "Fig. 3, 9: of H = 10, 30 and 50 more steps converge faster, and 50 can diverge",
    ),
    "batch_size": Question(
        "How does the batch size of a local step matter?",
        "Tab. 7: at round 409 batch 1 has 1.38 and batch 5 has 1.49",
        {"B = 1": "1.38 (round 409)", "B = 5": "1.49 (round 409)"},
    ),
    "clients": Question(
        "How does the number of clients matter?",
        "Fig. 7, Tab. 6: N = 3 to 40 differ little",
        {"N = 3": "1.51 (round 309)", "N = 9": "1.31 (round 500)", "N = 40": "1.32 (round 500)"},
    ),
    "partitioners": Question(
        "How does the partition of the data matter?", "Fig. 6: more heterogeneity gives a lower loss"
    ),
    "lora_rank": Question("How does the LoRA rank matter?", "Sec. 6: ranks 32, 64 and 128 are left open"),
    "model_size": Question(
        "How does the size of the base model matter?",
        "Tab. 8, round 309: 3B and 7B have 1.40 and 1.51 on Dolly, 0.87 and 0.90 on Code, 0.94 and 1.01 on GSM8K",
        {
            "openlm-research/open_llama_3b_v2": "0.94 (GSM8K, round 309)",
            "openlm-research/open_llama_7b_v2": "1.01 (LLaMA2-7B, GSM8K, round 309)",
        },
    ),
    "divergence": Question(
        "Which learning rates diverge, and is there a warning before?",
        "Fig. 5: of 1, 3, 5 and 10 times 1e-5 a larger learning rate diverges earlier",
    ),
    "shared_directions": Question("Do directions shared by all clients learn as well as each client's own?"),
    "attacks": Question("Which rules of aggregation withstand which attacks?"),
    "privacy_utility": Question("What does differential privacy of clients cost, and what does it hide?"),
    "shadow_models": Question("Do shadow models tell what a run was trained on, with and without privacy?"),
    "forgetting": Question("How near does a replay without a client come to a run that never had it?"),
    "personalised_rates": Question(
        "Which signal should personalise learning rates?",
        "Fig. 4: model-diff is best, five-round is good, round-wise has no effect",
    ),
    "heterogeneity_index": Question(
        "Which index follows the true heterogeneity of the clients?", "open question 2: not measured"
    ),
    "effective_rank": Question("What is the effective rank of the Hessian?", "open question 1: not measured"),
    "best_rank": Question(
        "Does the best LoRA rank follow the effective rank?",
        "Conjecture 3.8, not tested: the best LoRA rank is bounded below by the effective rank",
    ),
    "theory_constants": Question(
        "What do the paper's bounds predict with measured constants?", "Sec. 3: the bounds are not evaluated"
    ),
    "convergence_rate": Question("How does ‖∇f‖² depend on N, H and T?", "Theorem 3.5: it falls as (NHT)^-½"),
    "task_metrics": Question(
        "Does tuning improve answers on GSM8K?",
        "Tab. 5: 3.41, 4.32 and 4.62 % are right at rounds 0, 100 and 200",
    ),
    "communication": Question(
        "How many bytes do a client and the server exchange?",
        "App. F.1: 80.45 MB for the LoRA weights in fp16, 6.39 GB for all weights",
    ),
    "memory": Question(
        "What is the peak memory of a step, a forward pass and back-propagation?",
        "Tab. 1, MiB of back-propagation and FedMeZO: 26571 and 10061 on Dolly, 17771 and 9733 on GSM8K, 15287 and "
        "9569 on Code",
    ),
    "step": Question(
        "How fast is a round compared with two forward passes, matrix products and PyTorch?",
        "Tab. 4, seconds of 10 rounds of back-propagation and FedMeZO: 117 and 108 on Dolly, 126 and 120 on Code, 104 "
        "and 95 on GSM8K, 107 and 99 on Alpaca",
    ),
    "scale": Question("Do time per client and memory stay the same from 8 to 1000 clients?"),
    "precision": Question("How accurate is the projected gradient by μ and precision?"),
    "secure_sum": Question("How many bytes and milliseconds does a secure sum take?"),
    "weak_scaling": Question("How do work, memory and traffic of a device grow with the number of devices?"),
    "plan": Question("What fits on these devices, and how long does a round take at least?"),
}
"""Module of the experiment → its question. The report lists the paper's questions in this order."""
