"""LoRA parameters and PEFT folders: PEFT reads ours, we read PEFT's, and what is not plain LoRA is refused."""

import json
import math
import re

import jax
import numpy as np
import pytest
from llama_files import LINEAR, SMALL
from safetensors.numpy import load_file, save_file

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints import adapter as adapter_module
from fedmezo_jax.llama.checkpoints.adapter import load_adapter, save_adapter
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import TARGETS, init_lora

CONFIG = LlamaConfig.from_json(SMALL)
WIDTHS = {name.split(".")[1]: shape[::-1] for name, shape in LINEAR.items()}  # (in, out)


def key(seed=0):
    return jax.random.key(seed, impl="threefry2x32")


def random_lora(rank, targets):
    """A LoRA tree whose B is not zero, as after training."""
    draw = np.random.default_rng(0)
    return {
        name: {
            "A": draw.normal(size=(2, WIDTHS[name][0], rank)).astype(np.float32),
            "B": draw.normal(size=(2, rank, WIDTHS[name][1])).astype(np.float32),
        }
        for name in targets
    }


def test_fresh_lora_has_peft_s_start():
    """kaiming_uniform with a = sqrt(5) is uniform on ±1/sqrt(in), whose standard deviation is 1/sqrt(3 in)."""
    wide = LlamaConfig.from_json(SMALL | {"hidden_size": 400, "intermediate_size": 600})
    lora = init_lora(key(), wide, 50, TARGETS)
    assert tuple(lora) == TARGETS
    assert lora["down_proj"]["A"].shape == (2, 600, 50)
    assert lora["down_proj"]["B"].shape == (2, 50, 400)
    for name in ("q_proj", "down_proj"):
        a, bound = np.asarray(lora[name]["A"]), 1 / math.sqrt(lora[name]["A"].shape[1])
        assert a.dtype == np.float32
        assert 0.999 * bound < np.abs(a).max() <= bound
        assert abs(a.std() * math.sqrt(3) / bound - 1) < 0.01  # 40,000 draws: 0.2 % is one standard error
        assert abs(a.mean()) < 5 * bound / math.sqrt(3 * a.size)
        assert not np.any(lora[name]["B"])
        assert not np.array_equal(a[0], a[1])


def test_a_target_s_start_hangs_on_the_seed_and_on_no_other_target():
    alone, among = init_lora(key(), CONFIG, 3, ["v_proj"]), init_lora(key(), CONFIG, 3, TARGETS[::-1])
    np.testing.assert_array_equal(alone["v_proj"]["A"], among["v_proj"]["A"])
    assert not np.array_equal(among["k_proj"]["A"], among["v_proj"]["A"])
    assert not np.array_equal(init_lora(key(1), CONFIG, 3, ["v_proj"])["v_proj"]["A"], alone["v_proj"]["A"])


@pytest.mark.parametrize(
    ("rank", "targets", "named"),
    [
        (0, ["q_proj"], "rank must be at least 1, not 0"),
        (-2, ["q_proj"], "rank"),
        (4, ["q_proj", "query", "lm_head"], "'query', 'lm_head': choose among q_proj, k_proj, .*, down_proj"),
        (4, ["q_proj", "q_proj"], "twice"),
        (4, [], "no LoRA target"),
    ],
)
def test_bad_ranks_and_targets_are_refused(rank, targets, named):
    with pytest.raises(UserError, match=named):
        init_lora(key(), CONFIG, rank, targets)


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("down_proj",)])
def test_round_trip_is_exact(tmp_path, targets):
    lora = random_lora(3, targets)
    save_adapter(tmp_path / "a", lora, rank=3, alpha=6.5, targets=targets[::-1], base_name="x/y")
    back = load_adapter(tmp_path / "a", CONFIG)
    assert (back.rank, back.alpha, back.targets) == (3, 6.5, targets)
    assert jax.tree.structure(back.lora) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, back.lora, lora)


def test_files_hold_peft_s_names_and_shapes(tmp_path):
    lora = random_lora(3, ("o_proj", "up_proj"))
    save_adapter(tmp_path, lora, rank=3, alpha=6, targets=("o_proj", "up_proj"), base_name="x/y")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1."
    np.testing.assert_array_equal(stored[prefix + "self_attn.o_proj.lora_A.weight"], lora["o_proj"]["A"][1].T)
    np.testing.assert_array_equal(stored[prefix + "mlp.up_proj.lora_B.weight"], lora["up_proj"]["B"][1].T)
    assert len(stored) == 8
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, "x/y")


def test_a_failed_save_leaves_the_last_adapter_whole(tmp_path, monkeypatch):
    lora = random_lora(3, ["q_proj"])
    save_adapter(tmp_path / "a", lora, rank=3, alpha=6, targets=["q_proj"], base_name="x")

    def full_disk(file, tensors):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_module, "write_tensors", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(tmp_path / "a", random_lora(5, ["q_proj"]), rank=5, alpha=6, targets=["q_proj"], base_name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "a", CONFIG).lora, lora)


def change(folder, **changed):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.fixture
def saved(tmp_path):
    save_adapter(tmp_path, random_lora(4, ["q_proj"]), rank=4, alpha=6, targets=["q_proj"], base_name="x")
    return tmp_path


def test_rank_stabilised_scaling_is_alpha_over_the_root_of_the_rank(saved):
    change(saved, use_rslora=True)
    adapter = load_adapter(saved, CONFIG)
    assert adapter.alpha / adapter.rank == 6 / math.sqrt(4)


def test_other_ways_to_name_the_targets(saved):
    for names in (["self_attn.q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]):
        change(saved, target_modules=names)
        assert load_adapter(saved, CONFIG).targets == ("q_proj",)
    for expression in (
        ".*q_proj",
        r"model\.layers\.\d+\.self_attn\.q_proj",
        ".*self_attn.q.*",
        r".*\.(q_proj|nothing)$",
    ):
        change(saved, target_modules=expression)
        assert load_adapter(saved, CONFIG).targets == ("q_proj",)
    # as Unsloth writes it for every model
    parts = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    change(
        saved,
        target_modules=rf"(?:.*?(?:vision).*?{parts}.*?(?:q_proj).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.{parts}\.(?:(?:q_proj)))",
    )
    assert load_adapter(saved, CONFIG).targets == ("q_proj",)
    change(saved, target_modules=["q_proj", "query_key_value"])  # the second is in no LLaMA, and PEFT passes over it
    assert load_adapter(saved, CONFIG).targets == ("q_proj",)
    change(saved, target_modules="all-linear")
    with pytest.raises(UserError, match=r"missing: .*down_proj"):
        load_adapter(saved, CONFIG)


UNDERSTOOD = [
    *(".*q_proj", "q_proj", "", "(?i:.*Q_PROJ)", "^.*?layers.*?(q|v)_proj", ".*[qv]_pro[j]{1}", r".*\.q_pro\x6a"),
    *(r"model\.layers\.\d+\.self_attn\.q_proj", r".*\.[^.]*_proj$", r".*\.0\..*|.*\.1\..*q_proj"),
    *("(?s).+[^a-z]q_proj", r"\A(\w+\.)+[q]_\w{4}", "(?P<all>lm.*)|.*v_proj"),
]
REFUSED = [
    *(
        r".*(?<=\.)q_proj",
        r"(.)*q_proj\1*",
        "(?x) .* q_proj",
        r".*q_proj\Z",
        ".*q_pro{,1}j",
        "[[a]",
        "[a[:digit:]]",
        "[a--q]_proj",
    ),
    *(".*q_proj|.*v_proj)|(.*", "[", "a{1,2}{3}", "\ud800"),
]


@pytest.mark.parametrize("expression", UNDERSTOOD)
def test_an_expression_matches_as_python_s_does(expression):
    places = [f"model.layers.{i}.{name}" for i in range(12) for name in LINEAR] + ["lm_head"]
    matching = [place for place in places if re.fullmatch(expression, place)]
    assert adapter_module._matching(expression, places) == matching


@pytest.mark.parametrize("expression", REFUSED, ids=ascii)
def test_an_expression_that_might_be_read_otherwise_is_refused(expression):
    with pytest.raises(UserError, match=r"is no regular expression|(is|are) not supported"):
        adapter_module._matching(expression, ["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize(
    "expression",
    [
        r"(model|model\.|\w+|[\w.]+)*!",
        "(a*)*" * 50 + "!",
        r"(.*)*(.*)*(.*)*q_proj!",
        "(" * 3000 + ")" * 3000,
        "a" * 20000,
    ],
    ids=lambda text: text[:20],
)
def test_an_expression_that_would_match_for_ever_is_refused(saved, expression):
    change(saved, target_modules=expression)
    with pytest.raises(UserError, match=r"adapter_config.json: target_modules: ") as caught:
        load_adapter(saved, CONFIG)
    assert len(str(caught.value)) < 400


def test_a_million_target_names_are_looked_up_once(saved):
    change(saved, target_modules=["q_proj", *map(str, range(10**6))])
    assert load_adapter(saved, CONFIG).targets == ("q_proj",)


@pytest.mark.parametrize(
    "changed",
    [
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [CONFIG.num_hidden_layers]},
        {"layers_to_transform": [0, 0]},
        {"layers_to_transform": [True]},
        {"layers_to_transform": -1},
        {"lora_bias": True},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa"},
        {"some_future_option": 1},
        {"target_modules": ".*q_proj("},
        {"target_modules": "q_proj"},
        {"target_modules": r".*\.0\..*q_proj"},
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ".*(q_proj|lm_head)"},
        {"target_modules": []},
        {"target_modules": None},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"r": 0},
        {"r": "4"},
        {"r": 10**400},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("nan")},
        {"lora_alpha": None},
        {"use_rslora": "yes"},
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_by_name(saved, changed):
    load_adapter(saved, CONFIG)
    change(saved, **changed)
    with pytest.raises(UserError) as caught:
        load_adapter(saved, CONFIG)
    (field,) = changed
    assert field in str(caught.value)
    assert str(saved / "adapter_config.json") in str(caught.value)


@pytest.mark.parametrize(("target_modules", "layers_pattern"), [("q_proj", "layers"), (["q_proj"], "h")])
def test_layers_that_peft_would_choose_otherwise_are_refused(saved, target_modules, layers_pattern):
    change(saved, target_modules=target_modules, layers_to_transform=[0], layers_pattern=layers_pattern)
    with pytest.raises(UserError, match="layers_"):
        load_adapter(saved, CONFIG)


def test_an_adapter_of_some_layers_goes_out_and_in(tmp_path):
    lora = jax.tree.map(lambda leaf: leaf[1:], random_lora(4, ("q_proj",)))
    save_adapter(tmp_path, lora, rank=4, alpha=8, targets=("q_proj",), base_name="x", trained=(1,))
    adapter = load_adapter(tmp_path, CONFIG)
    assert adapter.trained == (1,)
    jax.tree.map(np.testing.assert_array_equal, adapter.lora, lora)


def test_all_unsupported_fields_are_told_at_once(saved):
    change(saved, use_dora=True, bias="all", r=0)
    with pytest.raises(UserError, match=r"bias.*r must be.*use_dora"):
        load_adapter(saved, CONFIG)


def test_faults_of_the_weights(saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    for broken, named in (
        ({other: tensors[other] for other in tensors if other != name}, f"missing: {name}"),
        (tensors | {"base_model.model.lm_head.lora_A.weight": tensors[name]}, "unexpected: base_model.model.lm_head"),
        (tensors | {name: np.zeros((16, 5), np.float32)}, r"\[16, 5\] and not \[16, 4\]"),
        (tensors | {name: np.full((16, 4), np.nan, np.float32)}, "lora_B of q_proj is not finite"),
    ):
        save_file(broken, file)
        with pytest.raises(UserError, match=named):
            load_adapter(saved, CONFIG)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="is damaged or cut short"):
        load_adapter(saved, CONFIG)
    file.rename(saved / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: is not there .*pickle"):
        load_adapter(saved, CONFIG)
    with pytest.raises(UserError, match=r"adapter_config.json: cannot be read"):
        load_adapter(saved / "nowhere", CONFIG)
