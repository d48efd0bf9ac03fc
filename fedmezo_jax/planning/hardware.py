"""Descriptions of TPUs and GPUs that are not present, for ahead-of-time compilation with XLA.

A TPU needs the ``libtpu`` package, and a GPU needs the CUDA plugin (``jax-cuda12-plugin`` and ``jax-cuda12-pjrt`` of
JAX's own version, installed with ``--no-deps``). No device is needed, but the compiled programs cannot run here.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from fedmezo_jax.errors import UserError


class Gpu(NamedTuple):
    """The properties of a GPU that XLA's compiler needs.

    Attributes:
        capability: CUDA compute capability, (major, minor).
        cores: streaming multiprocessors.
        memory: bytes of device memory.
        bandwidth: bytes per second to that memory.
        l2: bytes of level-2 cache.
        shared: bytes of shared memory per multiprocessor.
        clock: GHz.
    """

    capability: tuple[int, int]
    cores: int
    memory: int
    bandwidth: int
    l2: int
    shared: int
    clock: float


GIB = 2**30
# NVIDIA's A100, H100 (SXM) and Ada data sheets and white papers.
GPUS = {
    "a100-40gb": Gpu((8, 0), 108, 40 * GIB, 1_555_000_000_000, 40 * 2**20, 167_936, 1.41),
    "a100-80gb": Gpu((8, 0), 108, 80 * GIB, 2_039_000_000_000, 40 * 2**20, 167_936, 1.41),
    "rtx-4090": Gpu((8, 9), 128, 24 * GIB, 1_008_000_000_000, 72 * 2**20, 102_400, 2.52),
    "h100": Gpu((9, 0), 132, 80 * GIB, 3_350_000_000_000, 50 * 2**20, 233_472, 1.98),
}
# No autotuning of kernels, which needs the device, and no Triton, whose tools may be missing here.
_GPU_OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Tpu(NamedTuple):
    """A TPU generation.

    Attributes:
        memory: bytes that a program can use on a chip: its high-bandwidth memory without the system's share.
        slice: the smallest slice that libtpu describes for it.
    """

    memory: int
    slice: str


TPUS = {"v5e": Tpu(63 * GIB // 4, "2x2"), "v5p": Tpu(95 * GIB, "2x2x1"), "v6e": Tpu(125 * GIB // 4, "2x2")}


_EIGHT_BIT = re.compile(
    r"= s32\[[^=]* (?:dot|convolution)\(|= \(s32\[.*__cublas\$lt\$matmul\"|= .*__cublas\$lt\$matmul\$f8\""
)


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
        devices: JAX's descriptions of the devices.
        memory: bytes that a program can use on one device.
        options: XLA's compiler options.
    """

    devices: list[Any]
    memory: int
    options: dict[str, Any]


def describe(name: str) -> Topology:
    """Returns the topology of ``v5e:2x2`` (TPU generation and slice), ``a100-40gb`` or ``h100:8`` (GPU and number).

    Raises:
        UserError: unknown name, or the compiler for it is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind in TPUS:
        # Otherwise the TPU's library asks the network for the machine's metadata.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        return Topology(_load("libtpu", "tpu", f"{kind}:{shape or TPUS[kind].slice}"), TPUS[kind].memory, {})
    if kind in GPUS and (shape or "1").isdecimal():
        package = f"--no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        options = {"target_config": _target_config(kind, GPUS[kind]), "topology": f"1x1x{shape or 1}"}
        return Topology(_load(package, "cuda", kind, **options), GPUS[kind].memory, _GPU_OPTIONS)
    known = ", ".join([*(f"{tpu}:{spec.slice}" for tpu, spec in TPUS.items()), *GPUS])
    raise UserError(f"unknown topology {name!r}: give one of {known} (a GPU with :N for N of them)")


def host() -> Topology:
    """Returns this machine's CPU, with all of its memory."""
    return Topology(jax.devices("cpu"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), {})


def present() -> Topology:
    """Returns this process's first device, with the memory that it says programs can use."""
    device = jax.devices()[0]
    return host() if device.platform == "cpu" else Topology([device], device.memory_stats()["bytes_limit"], {})


class Plan(NamedTuple):
    """The memory of a program on one device, as planned by the compiler.

    Attributes:
        peak: largest number of bytes of arguments, results and temporaries; None if the device's memory is too small.
        temporary: bytes of temporaries; None likewise.
    """

    peak: int | None
    temporary: int | None


def compile_for(target: Topology, lowered: Any) -> Any:
    """Compiles a lowered program for a topology; returns None if the device's memory is too small for it."""
    try:
        return lowered.compile(compiler_options=target.options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def plan(lowered: Any, target: Topology) -> Plan:
    """Compiles a lowered program for a topology and returns the compiler's plan of its memory."""
    compiled = compile_for(target, lowered)
    return Plan(None, None) if compiled is None else plan_of(compiled, target)


def eight_bit_products(compiled: Any) -> int | None:
    """Counts a compiled program's products of eight-bit numbers: sums in s32, and cuBLAS's products of fp8.

    None if the compiler's text is not available (libtpu may use instructions that jaxlib does not know).
    """
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return len(_EIGHT_BIT.findall(text))


def plan_of(compiled: Any, target: Topology) -> Plan:
    """Returns the compiler's plan of the memory of a program that is compiled for a topology."""
    analysis = compiled.memory_analysis()
    if target.devices and target.devices[0].platform == "cpu":  # the CPU's compiler leaves temporaries out of its peak
        arguments_and_results = (
            analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        )
        return Plan(arguments_and_results + analysis.temp_size_in_bytes, analysis.temp_size_in_bytes)
    return Plan(analysis.peak_memory_in_bytes, analysis.temp_size_in_bytes)


def _load(package: str, platform: str, name: str, **options: str) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform=platform, **options).devices)
    except Exception as error:  # a missing plugin and a wrong slice raise several types
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"no compiler for {name} ({reason}): pip install {package}, "
            "and set JAX_PLATFORMS=cpu where there is no such device"
        ) from None


def _target_config(name: str, gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto in text form."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 64
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared - 1024}
  core_count: {gpu.cores} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
