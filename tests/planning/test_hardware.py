"""Devices that are not there: what is asked of the compilers, and what is said where they are missing."""

from types import SimpleNamespace

import pytest

from fedmezo_jax.errors import UserError
from fedmezo_jax.planning import hardware


@pytest.fixture
def asked(monkeypatch):
    """Stands in for JAX's description of devices and records what is asked of it."""
    calls = []

    def describe(**request):
        calls.append(request)
        return SimpleNamespace(devices=["one", "two"])

    monkeypatch.setattr(hardware.topologies, "get_topology_desc", describe)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return calls


@pytest.mark.parametrize(
    ("name", "slice", "gib"),
    [("v5e:2x2", "v5e:2x2", 15.75), ("v5e:4x4", "v5e:4x4", 15.75), ("v5p", "v5p:2x2x1", 95), ("v6e", "v6e:2x2", 31.25)],
)
def test_a_tpu_is_asked_for_by_its_slice(asked, name, slice, gib):
    found = hardware.describe(name)
    assert asked == [{"topology_name": slice, "platform": "tpu"}]
    assert (found.devices, found.memory) == (["one", "two"], gib * 2**30)


def test_a_gpu_is_described_to_the_compiler(asked):
    found = hardware.describe("h100:8")
    (request,) = asked
    assert (request["topology_name"], request["platform"], request["topology"]) == ("h100", "cuda", "1x1x8")
    assert "cuda_compute_capability { major: 9 minor: 0 }" in request["target_config"]
    assert f"device_memory_size: {80 * 2**30}" in request["target_config"]
    assert found.memory == 80 * 2**30


@pytest.mark.parametrize("name", ["v4:2x2", "a100", "", "h100:two"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(UserError, match="unknown topology"):
        hardware.describe(name)


@pytest.mark.parametrize(("name", "package"), [("v5e:2x2", "libtpu"), ("a100-40gb", "jax-cuda12-plugin==")])
def test_a_missing_compiler_is_named(monkeypatch, name, package):
    def fail(**request):
        raise RuntimeError("Unknown backend\nand more")

    monkeypatch.setattr(hardware.topologies, "get_topology_desc", fail)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with pytest.raises(UserError, match=rf"\(Unknown backend\): pip install .*{package}"):
        hardware.describe(name)


class Lowered:
    """A lowered program whose compilation ends as told."""

    def __init__(self, outcome):
        self.outcome = outcome

    def compile(self, compiler_options):
        assert compiler_options == {"an": "option"}
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return SimpleNamespace(memory_analysis=lambda: self.outcome)


def test_a_program_too_large_has_no_plan():
    target = hardware.Topology([], 1, {"an": "option"})
    sizes = SimpleNamespace(peak_memory_in_bytes=7, temp_size_in_bytes=3)
    assert hardware.plan(Lowered(sizes), target) == (7, 3)
    error = hardware.jax.errors.JaxRuntimeError
    assert hardware.plan(Lowered(error("RESOURCE_EXHAUSTED: 372G of 16G")), target) == (None, None)
    with pytest.raises(error, match="INTERNAL"):
        hardware.plan(Lowered(error("INTERNAL: a fault")), target)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('%c.1 = (s32[8,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", x', 1),
        ('%c.1 = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8", x', 1),
        ("%convolution.3 = s32[8,8]{1,0:T(8,128)} convolution(%f.3, %f.4), dim_labels=bf_io->bf", 1),
        ("%dot.3 = s32[8,8]{1,0} dot(%f.3, %f.4)", 1),
        ('%c.1 = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", x', 0),
        ("%get-tuple-element.1 = s32[8,8]{1,0} get-tuple-element(%custom-call.1), index=0", 0),
        ("%convolution.3 = f32[8,8]{1,0} convolution(%f.3, %f.4), dim_labels=bf_io->bf", 0),
    ],
)
def test_eight_bit_products_are_told_from_others(text, count):
    """Lines of XLA's compilers for the H100, the v6e and CPUs."""
    compiled = SimpleNamespace(as_text=lambda: f"  {text}\n  %add.1 = s32[] add(%a, %b)\n  {text}\n")
    assert hardware.eight_bit_products(compiled) == 2 * count
