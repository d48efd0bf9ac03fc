"""JAX's persistent compilation cache in this package's cache folder: equal programs are compiled once a machine."""

from __future__ import annotations

import hashlib
import platform
import warnings
from pathlib import Path

import jax


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in ``folder``, unless the user has chosen another place (``JAX_COMPILATION_CACHE_DIR``).

    Programs for CPUs may use any instruction of the machine that compiled them. So machines with other processors have
    folders of their own, in case they share their home. The programs are the same ones, so the bits are too.

    Args:
        folder: of the cache. A program that cannot be read from it or written to it, as on a full disk, is compiled
            again and nothing is said: what else fails for the same reason has its own message.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        processor = hashlib.sha256(_processor().encode()).hexdigest()[:16]
        jax.config.update("jax_compilation_cache_dir", str(folder / processor))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
