"""Whole runs on a tiny random model: what they record and save, and what an interruption changes: nothing."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial

import jax
import numpy as np
import pytest
import small_run

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama import prefix
from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.registry import load_tokenizer
from fedmezo_jax.run import ledger, loop, run_folder
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.loop import train
from fedmezo_jax.run.prepare import prepare


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is taken from the user's cache, and nothing is left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Five rounds, each of which hangs on the ones before: by momentum, and by rates from the clients' drift."""
    place = tmp_path_factory.mktemp("small")
    return paper_config(
        model=str(small_run.write_model(place / "model")),
        data=str(small_run.write_data(place / "data.jsonl")),
        clients=5,
        participation=0.6,
        weighting="samples",
        rounds=5,
        local_steps=2,
        batch_size=3,
        max_length=64,
        test_examples=10,
        learning_rate=1e-2,
        perturbation_scale=0.1,
        server_optimizer="momentum",
        lora_rank=4,
        targets="down_proj",
        personalize="model-diff",
        uplink="lora",
    )


def start(folder, config, **options):
    """What the command does before and while it trains."""
    run_folder.check_folder(folder, config, resume=True)
    setup = prepare(config)
    folder.mkdir(exist_ok=True)
    run_folder.write_json(folder / "config.json", asdict(config))
    return setup, train(setup, folder, checkpoint_every=2, eval_every=2, **options)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    return folder, *start(folder, config)


def without_seconds(records):
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


def test_metrics_hold_a_record_for_each_round(undisturbed):
    folder, setup, result = undisturbed
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.metrics
    assert [record["round"] for record in result.metrics] == [1, 2, 3, 4, 5]
    assert [record["test_loss"] is None for record in result.metrics] == [True, False, True, False, False]
    assert result.loss_after == result.metrics[-1]["test_loss"]
    numbers = 2 * (48 * 4 + 4 * 32)  # two layers' A and B of down_proj
    for record in result.metrics:
        assert set(record) >= {
            *("round", "train_loss", "test_loss", "participants", "learning_rates", "seconds", "forward_passes"),
            *("tokens", "uplink_bytes", "downlink_bytes"),
        }
        assert len(set(record["participants"])) == len(record["learning_rates"]) == 3
        assert set(record["participants"]) <= set(range(5))
        assert 0 < record["train_loss"] < 10
        assert record["seconds"] > 0
        assert record["forward_passes"] == 3 * 2 * 2  # clients, steps, two points
        assert record["tokens"] == 3 * 2 * 2 * 3 * setup.task.train.tokens.shape[1]
        for way in ("up", "down"):
            assert sum(record[f"client_{way}link_bytes"]) == record[f"{way}link_bytes"]
            for size in record[f"client_{way}link_bytes"]:
                assert 4 * numbers < size < 4 * numbers + 400  # float32, and the names around them
    assert len({tuple(record["participants"]) for record in result.metrics}) > 1
    assert any(rate != pytest.approx(1e-2) for rate in result.metrics[-1]["learning_rates"])


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_nothing_is_compiled_after_the_first_round(config, tmp_path, layers):
    jax.clear_caches()  # other tests of this process have compiled the same programs
    compiled, after = [], []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        start(tmp_path, replace(config, layers=layers), on_round=lambda record: after.append(len(compiled)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert after[0] > 0
    assert after == [after[0]] * 5


def test_hidden_states_are_computed_before_the_rounds_or_within_them_with_the_same_result(
    config, tmp_path, monkeypatch
):
    config, run, computed = replace(config, layers="last:1", rounds=3), prefix.Prefix.__call__, []
    monkeypatch.setattr(prefix.Prefix, "__call__", lambda *args: computed.append(len(args[1])) or run(*args))
    ledgers, at_start = [], []
    for most in (prefix.READ_AGAIN, 0):
        monkeypatch.setattr(prefix, "READ_AGAIN", most)
        setup = prepare(config)
        at_start.append(sum(computed) - len(setup.task.test.labels))
        computed.clear()
        folder = tmp_path / str(most)
        start(folder, config)
        computed.clear()
        ledgers.append((folder / "run.ledger").read_bytes())
    assert at_start[0] == 0 < at_start[1]
    assert ledgers[0] == ledgers[1]


class StopError(Exception):
    """The power cut."""


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_ends_as_an_undisturbed_one(stop, config, undisturbed, tmp_path):
    """Cut before the first checkpoint, between two (with half a line written), and after the last round."""
    folder, _, expected = undisturbed

    def cut(record):
        if record["round"] == stop:
            raise StopError

    with pytest.raises(StopError):
        start(tmp_path, config, on_round=cut)
    assert not (tmp_path / "adapter").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 9, "train_lo')

    seen = []
    _, result = start(tmp_path, config, on_round=seen.append)
    assert seen == result.metrics == run_folder.read_metrics(tmp_path)
    assert without_seconds(result.metrics) == without_seconds(expected.metrics)
    assert (result.loss_before, result.loss_after) == (expected.loss_before, expected.loss_after)
    jax.tree.map(np.testing.assert_array_equal, result.params, expected.params)
    for file in (folder / "adapter").iterdir():
        assert (tmp_path / "adapter" / file.name).read_bytes() == file.read_bytes()


def test_a_resumed_run_needs_no_program_that_a_fresh_one_does_not(config, tmp_path, monkeypatch):
    """JAX compiles again for arrays that are bound to a device, and for types that are weak where others are not."""
    begun, opened = [], loop.open_journal
    monkeypatch.setattr(loop, "open_journal", lambda *given: begun.append(journal := opened(*given)) or journal)

    def cut(record):
        if record["round"] == 3:
            raise StopError

    for _ in range(2):
        with pytest.raises(StopError):
            start(tmp_path, config, on_round=cut)
    kinds = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type, leaf.committed), journal.progress.state)
        for journal in begun
    ]
    assert [int(journal.progress.state.round) for journal in begun] == [0, 2]
    assert kinds[0] == kinds[1]


def test_the_finished_run_is_in_its_folder(config, undisturbed):
    folder, setup, result = undisturbed
    names = {"config.json", "run.ledger", "metrics.jsonl", "checkpoints", "adapter"}
    assert {file.name for file in folder.iterdir()} == names
    adapter = load_adapter(folder / "adapter", setup.task.model.config)
    assert (adapter.rank, adapter.alpha, adapter.targets) == (4, 16.0, ("down_proj",))
    jax.tree.map(np.testing.assert_array_equal, adapter.lora, result.params)
    assert all(np.any(halves["B"]) for halves in result.params.values())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
def test_peft_s_logits_are_ours(config, undisturbed):
    import peft
    import torch
    from transformers import LlamaForCausalLM

    folder, setup, result = undisturbed
    tokens = setup.task.test.tokens
    ours, plain = (setup.task.model.apply({"params": setup.task.base}, tokens, lora) for lora in (result.params, {}))
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(config.model), folder / "adapter")
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(ours - plain).max() > 0.01


def test_another_seed_is_another_run(config, undisturbed):
    setup = prepare(replace(config, seed=1))
    _, first, _ = undisturbed
    assert not np.array_equal(setup.params["down_proj"]["A"], first.params["down_proj"]["A"])
    assert not np.array_equal(setup.task.test.tokens, first.task.test.tokens)


def test_a_tokenizer_of_another_model_is_refused(config, tmp_path):
    """JAX would take the embedding's last row for every token beyond it. Padding alone may lie there."""
    folder = shutil.copytree(config.model, tmp_path / "model")
    llama = LlamaConfig.from_json(folder)
    base = load_base(folder, llama)

    def cut(size):
        smaller = base | {
            "embed_tokens": {"embedding": base["embed_tokens"]["embedding"][:size]},
            "lm_head": {"kernel": base["lm_head"]["kernel"][:, :size]},
        }
        save_base(folder, replace(llama, vocab_size=size), smaller)
        return prepare(replace(config, model=str(folder)))

    largest = int(prepare(config).task.train.tokens.max())
    with pytest.raises(UserError, match=rf"tokenizer makes token {largest}, but the model's vocabulary has {largest}:"):
        cut(largest)
    assert cut(largest + 1).task.train.tokens.max() == largest
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<far>"})
    tokenizer.save_pretrained(folder)
    assert cut(largest + 1).task.train.tokens.max() == largest + 1
    tokenizer.eos_token = "<far>"  # which closes every row, and is the padding token too
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"tokenizer makes token {largest + 1}, but"):
        cut(largest + 1)


def test_a_test_loss_beyond_every_number_is_null_in_the_metrics(config, tmp_path):
    setup = prepare(replace(config, rounds=1))
    test = setup.task.test._replace(label_weights=np.full_like(setup.task.test.label_weights, np.nan))
    setup = setup._replace(task=replace(setup.task, test=test))
    result = train(setup, tmp_path, checkpoint_every=1, eval_every=1, loss_before=1.0)
    assert np.isnan(result.loss_after)
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert record["test_loss"] is None


@pytest.mark.parametrize("tokens_at_once", [160, 10**6])
def test_test_loss_is_the_mean_over_all_labels_of_the_test_examples(tokens_at_once, undisturbed, monkeypatch):
    monkeypatch.setattr("fedmezo_jax.llama.task.TOKENS_AT_ONCE", tokens_at_once)  # the first leaves a batch to fill up
    _, setup, result = undisturbed
    task = replace(setup.task)  # which has not been evaluated yet
    logits = np.asarray(task.model.apply({"params": task.base}, task.test.tokens, result.params), np.float64)
    losses = [
        np.log(np.exp(logits[row, position]).sum()) - logits[row, position, label]
        for row, (_, *columns) in enumerate(zip(*task.test, strict=True))
        for position, label, weight in zip(*columns, strict=True)
        if weight
    ]
    assert len(losses) == task.test.label_weights.sum() > 20
    np.testing.assert_allclose(task.evaluate(result.params), np.mean(losses), rtol=1e-6)


def test_a_round_is_done_once_it_is_in_the_ledger(config, undisturbed, tmp_path, monkeypatch):
    """Cut right after a record: the resumed run makes that round from it, and no client works on it again."""
    folder, _, expected = undisturbed

    def cut(*_):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(loop.rounds, "advance", cut)
        with pytest.raises(StopError):
            start(tmp_path, config)
    assert run_folder.read_metrics(tmp_path) == []
    assert len(list(ledger.entries(tmp_path / "run.ledger"))) == 1
    worked, run_round = [], loop.rounds.run_round
    monkeypatch.setattr(loop.rounds, "run_round", lambda c, t, *rest: worked.append(t) or run_round(c, t, *rest))
    _, result = start(tmp_path, config)
    assert worked == [1, 2, 3, 4]
    assert without_seconds(result.metrics) == without_seconds(expected.metrics)
    jax.tree.map(np.testing.assert_array_equal, result.params, expected.params)
    assert (tmp_path / "run.ledger").read_bytes() == (folder / "run.ledger").read_bytes()


def test_both_uplinks_give_the_same_bits(config, undisturbed, tmp_path):
    folder, _, expected = undisturbed
    _, result = start(tmp_path, replace(config, uplink="coefficients"))
    jax.tree.map(np.testing.assert_array_equal, result.params, expected.params)
    bytes_of = [name for name in result.metrics[0] if name.endswith("_bytes")]
    for record, other in zip(result.metrics, expected.metrics, strict=True):
        assert all(max(np.ravel(record[name])) * 10 < max(np.ravel(other[name])) for name in bytes_of)
        assert without_seconds([other | {name: record[name] for name in bytes_of}]) == without_seconds([record])
    ours, theirs = (list(ledger.entries(place / "run.ledger")) for place in (tmp_path, folder))
    assert list(map(ledger.pack_entry, ours)) == list(map(ledger.pack_entry, theirs))


def test_clients_in_blocks_end_as_all_at_once(config, undisturbed, tmp_path, monkeypatch):
    """To rounding: XLA may sum in another order for another number of clients, at μ = 0.1 worth 1e-6 of a step."""
    _, setup, whole = undisturbed
    at_once = 2 * setup.task.train.tokens[0].size * config.batch_size
    monkeypatch.setattr("fedmezo_jax.llama.task.TOKENS_AT_ONCE", at_once)
    _, blocked = start(tmp_path, config)  # two of the three clients and then one
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6), blocked.params, whole.params)
    for record, expected in zip(blocked.metrics, whole.metrics, strict=True):
        np.testing.assert_allclose(record["train_loss"], expected["train_loss"], rtol=1e-6)
        np.testing.assert_allclose(record["learning_rates"], expected["learning_rates"], rtol=1e-4)
    assert np.abs(whole.params["down_proj"]["B"]).max() > 0.01
