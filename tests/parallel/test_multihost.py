"""Several real processes on this machine: one run, equal to one process's; and none of them hangs or writes twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import preloaded
import pytest
import small_run
from free_port import free_port

from fedmezo_jax.errors import UserError
from fedmezo_jax.parallel import multihost
from fedmezo_jax.run import ledger

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("processes")
    small_run.write_model(place / "model")
    small_run.write_data(place / "data.jsonl")
    return place


ARGUMENTS = (
    "--clients 5 --rounds 3 --local-steps 2 --max-length 64 --length-buckets 1 --test-examples 10 --lora-rank 2 "
    "--targets v_proj --checkpoint-every 2"
)


def given(place, out, *arguments, devices=1):
    """The command's arguments for a small model, and the environment of a process with so many devices."""
    names = ["--model", "model", "--data", str(place / "data.jsonl"), "--out", str(out)]
    return [*names, *ARGUMENTS.split(), *arguments], {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "FEDMEZO_CACHE": str(place / "cache"),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(place, out, *arguments, devices=1, environment=None, cwd=None):
    """The main job in a process that has imported everything."""
    argv, variables = given(place, out, "--no-check-rate", *arguments, devices=devices)
    return preloaded.Command(argv, variables | (environment or {}), cwd or place)


def both(place, out, *arguments, second=(), **options):
    """Two processes of one run; what the second is told besides."""
    at = f"localhost:{free_port()}"
    return [
        start(place, out, "--processes", f"{at},2,{i}", *arguments, *(second if i else ()), **options) for i in range(2)
    ]


OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:41"}
SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"}
RANKS = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"


def launched(launcher, place, out, *arguments):
    """Two processes that a shell would start, and that know of each other by a launcher's environment alone."""
    argv, variables = given(place, out, *arguments)
    variables |= launcher | {"JAX_COORDINATOR_PORT": str(free_port())}  # a launcher's own choice may be taken here
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": place}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.fedmezo", *argv],
            env=os.environ | variables | dict.fromkeys(RANKS, str(i)),
            **pipes,
        )
        for i in range(2)
    ]


def outcome(*running, seconds=300):
    """(exit code, standard output, standard error) of each process."""
    found = []
    for one in running:
        out, err = one.communicate(timeout=seconds)
        found.append((one.returncode, out, err))
    return found


def await_round(out, running):
    """Waits until the first round is recorded."""
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert [one.poll() for one in running] == [None] * len(running)
        time.sleep(0.005)


def lines(err):
    return [line for line in err.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def alone(place):
    """The same run in one process with two devices."""
    ((code, _, err),) = outcome(start(place, place / "alone", "--mesh", "clients=2,model=1", devices=2))
    assert code == 0, err
    return place / "alone"


def check_same(ours, theirs):
    for name in ("run.ledger", "config.json", "adapter/adapter_model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    told = [
        [
            {key: value for key, value in json.loads(line).items() if "seconds" not in key}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (ours, theirs)
    ]
    assert told[0] == told[1]


def check_first_alone_speaks(first, other):
    assert "test loss" in first
    assert [line for line in other.splitlines() if not line.startswith("[Gloo]")] == []


def test_two_processes_are_one_run(place, alone):
    (code, out, err), (other, silent, complaint) = outcome(*launched(OPEN_MPI, place, place / "two"))
    assert (code, other) == (0, 0), err + complaint
    check_same(place / "two", alone)
    check_first_alone_speaks(out, silent)


def test_a_copy_of_the_weights_may_lie_across_processes(place, alone):
    found = outcome(*launched(SLURM, place, place / "split", "--mesh", "clients=1,model=2"))
    assert [code for code, *_ in found] == [0, 0], found
    records = [json.loads((folder / "results.json").read_text())["rows"][0] for folder in (place / "split", alone)]
    assert records[0]["loss_after"] == pytest.approx(records[1]["loss_after"], rel=1e-5)
    split, whole = (ledger.read_header(folder / "run.ledger") for folder in (place / "split", alone))
    assert split.pop("first_rate") == pytest.approx(whole.pop("first_rate"), rel=1e-5)  # measured on split products
    assert split == whole  # with the hash of all weights, of which each process holds half


COMPUTED = """
import json, sys
from collections import defaultdict
from fedmezo_jax.llama import prefix
from fedmezo_jax.parallel import multihost
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune

at, options, out, read_again = sys.argv[1:]
multihost.join(at, 60)
prefix.READ_AGAIN = int(read_again)
computed = defaultdict(set)
compute = prefix.HiddenStates.compute
def noted(self, examples, *rest):
    computed[id(self)].update(examples.ravel().tolist())
    compute(self, examples, *rest)

prefix.HiddenStates.compute = noted
task = fine_tune(RunConfig(**json.loads(options)), out, check_rate=False, notify=lambda line: None).context.task
trained_on = sorted(computed[id(task.train[0])])
print(json.dumps({"trained_on": trained_on, "parts": [part.tolist() for part in task.parts]}))
"""


@pytest.mark.parametrize("read_again", [0, 1 << 26], ids=["before the run", "round by round"])
def test_each_process_computes_hidden_states_of_its_own_clients_examples_alone(read_again, place, tmp_path):
    """Of four clients each process has two."""
    _, variables = given(place, place / "none")
    options = {"model": str(place / "model"), "data": str(place / "data.jsonl"), "clients": 4, "rounds": 2}
    options |= {"local_steps": 2, "layers": "last:1", "max_length": 64, "test_examples": 10}
    at, pipes = f"localhost:{free_port()}", {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    given_to_all = json.dumps(options), str(tmp_path / "run"), str(read_again)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", COMPUTED, f"{at},2,{i}", *given_to_all], env=os.environ | variables, **pipes
        )
        for i in range(2)
    ]
    for i, (code, out, err) in enumerate(outcome(*running)):
        assert code == 0, err
        found = json.loads(out.splitlines()[-1])
        own = [set(part) for part in found["parts"][2 * i : 2 * i + 2]]
        assert set(found["trained_on"]) <= own[0] | own[1]
        assert all(set(found["trained_on"]) & part for part in own)


def test_a_process_that_dies_ends_the_run_and_it_can_be_resumed(place, alone):
    out = place / "killed"
    first, second = both(place, out, "--process-timeout", "20")
    await_round(out, [first, second])
    second.send_signal(signal.SIGKILL)
    ((code, _, err),) = outcome(first, seconds=60)
    second.communicate()
    assert (code, len(lines(err))) == (2, 1), err
    assert "another process has ended or can no longer be reached" in err
    assert "--resume" in err
    found = outcome(*both(place, out, "--resume"))
    assert [code for code, *_ in found] == [0, 0], found
    check_same(out, alone)


@pytest.mark.parametrize("signalled", [(0, 1), (0,)])
def test_a_signal_stops_all_processes_and_is_named(place, signalled):
    """JAX's own preemption service would take the signal and let the run go on.

    A process that has no signal of its own is most likely waiting in a collective for the one that has.
    """
    out = place / f"signalled-{len(signalled)}"
    running = both(place, out, "--rounds", "100000")
    await_round(out, running)
    for index in signalled:
        running[index].send_signal(signal.SIGTERM)
    for code, _, err in outcome(*running):
        assert code == 128 + signal.SIGTERM, err
        assert err.splitlines() == ["stopped by SIGTERM; go on with --resume"]


def test_processes_that_were_started_otherwise_all_say_so(place):
    found = outcome(*both(place, place / "no", second=("--learning-rate", "0.5")))
    for code, _, err in found:
        assert code == 2, err
        assert lines(err) == [
            "error: process 1 was started with other settings: learning_rate (auto in process 0, 0.5 there): "
            "start all processes alike"
        ]
    assert not (place / "no").exists()


def test_what_one_process_refuses_all_refuse(place, tmp_path):
    at = f"localhost:{free_port()}"
    running = [
        start(place, place / "no", "--processes", f"{at},2,{i}", cwd=(place, tmp_path)[i]) for i in range(2)
    ]  # the second is where there is no model
    first, second = outcome(*running)
    assert (first[0], second[0]) == (2, 2)
    assert lines(first[2])[0].startswith("error: process 1: unknown model 'model'")
    assert lines(second[2])[0].startswith("error: unknown model 'model'")
    assert not (place / "no").exists()


def test_fewer_processes_than_announced(place):
    at = f"localhost:{free_port()}"
    running = [start(place, place / "no", "--processes", f"{at},3,{i}", "--process-timeout", "5") for i in range(2)]
    for code, _, err in outcome(*running, seconds=60):
        assert code == 2, err
        assert len(lines(err)) == 1, err
        assert "not all 3 processes have come together within 5 s" in lines(err)[0]
    assert not (place / "no").exists()


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        ("3,1", "process 0 was given a COUNT of 2 and process 1 one of 3: give all processes the same"),
        ("3,2", "process 0 was given a COUNT of 2 and process 2 one of 3: give all processes the same"),
    ],
)
def test_different_counts_are_refused_by_all(place, second, complaint):
    at = f"localhost:{free_port()}"
    for code, _, err in outcome(*(start(place, place / "no", "--processes", f"{at},{it}") for it in ("2,0", second))):
        assert code == 2, err
        assert lines(err) == [f"error: --processes: {complaint}"]
    assert not (place / "no").exists()


@pytest.mark.parametrize("launcher", [None, OPEN_MPI])
def test_a_port_in_use_is_refused(place, launcher):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if launcher is None:
            running = start(place, place / "no", "--processes", f"localhost:{port},2,0")
        else:
            environment = launcher | {"JAX_COORDINATOR_PORT": str(port)} | dict.fromkeys(RANKS, "0")
            running = start(place, place / "no", environment=environment)
        ((code, _, err),) = outcome(running)
    assert code == 2, err
    (line,) = err.splitlines()
    assert line.startswith(f"error: process 0 cannot listen on port {port} ")
    assert "choose another port" in line
    assert not (place / "no").exists()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_others_with_one_line(place, stopped):
    out = place / f"stopped-{stopped}"
    running = both(place, out, "--process-timeout", "20", "--rounds", "100000")
    await_round(out, running)
    running[stopped].send_signal(signal.SIGSTOP)
    try:
        ((code, _, err),) = outcome(running[1 - stopped])
    finally:
        running[stopped].kill()
        running[stopped].communicate()
    assert code == 2, err
    (line,) = err.splitlines()
    assert line.startswith(f"error: process {stopped} has sent no heartbeat for 20 s")
    assert "--resume" in line


def test_an_unhandled_exception_in_one_process_ends_the_others():
    at = f"localhost:{free_port()}"
    program = (
        "import sys\nfrom fedmezo_jax.parallel import multihost\nindex = int(sys.argv[1])\n"
        f"multihost.join(f'{at},2,{{index}}', 20)\nmultihost.all_or_none(lambda: 1 / (1 - index))"
    )
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": variables}
    running = [subprocess.Popen([sys.executable, "-c", program, str(index)], **pipes) for index in range(2)]
    (code, _, err), (failed, _, trace) = outcome(*running)
    assert (failed, code) == (1, 1), err
    assert "ZeroDivisionError" in trace
    assert err.splitlines() == ["error: process 1: it has ended with an error of the program: division by zero"]


@pytest.mark.parametrize("text", ["localhost,2,0", "localhost:1234,2,2", "localhost:0,2,0", "localhost:65536,2,0", "2"])
def test_what_does_not_name_a_process_is_refused(text):
    with pytest.raises(UserError, match="ADDRESS:PORT,COUNT,INDEX"):
        multihost.join(text, 5)


def test_a_process_alone_agrees_with_itself():
    multihost.check_same_config({"rounds": 3})
    assert multihost.all_or_none(lambda: 7) == 7
