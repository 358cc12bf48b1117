"""Imports run one way, heavy packages stay inside their adapters, and kernels/ is no Python package."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A package may import those of earlier tiers, and its own tier's, in no circle. What only `fuse` names is in its tier.
TIERS = (
    ("schedules",),
    ("fuse",),  # roles, sample, trace, ops: whatever the later tiers do not name
    ("fuse.algorithms",),
    ("fuse.engines", "fuse.interstage", "fuse.intrastage"),
    ("fuse.training",),
    ("fuse.workers",),
    ("fuse.driver",),
    ("fuse.checkpoint", "fuse.config", "fuse.trainers"),
    ("fuse.__main__", "fuse.cli", "fuse.commands", "fuse.demo", "fuse.recipe", "fuse.run_page"),
    ("fuse.benchmarks",),
)
PACKAGES = {package for tier in TIERS for package in tier}
# Within a tier these do not know each other at all.
STRANGERS = {"fuse.engines", "fuse.interstage", "fuse.intrastage"}
# The facade `from fuse import PPOTrainer` reaches up, lazily.
FACADE = "fuse"
ADAPTERS = {
    "vllm": "fuse.engines.vllm",
    "megatron": "fuse.intrastage.megatron",
    "nixl": "fuse.workers.kv.nixl",
    "peft": "fuse.intrastage.adapters",
}
BARRED_FROM_SCHEDULES = {"torch", "transformers", "ray", "fuse"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in ("schedules", "fuse")
    for folder in (ROOT / package, *(link for link in (ROOT / package).iterdir() if link.is_symlink()))
    for path in sorted(folder.rglob("*.py"))
}


@cache
def imports(path):
    """Dotted names that the file imports anywhere; `from package import name` counts as package.name too."""
    return tuple(_imported(path, ast.walk(parsed(path))))


@cache
def parsed(path):
    return ast.parse(path.read_text(), path)


def _imported(path, nodes):
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def at_once(body):
    """Statements that run when the module is imported."""
    for node in body:
        is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not is_for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from at_once(
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)
            )


@cache
def loaded_with(module):
    """All names that are imported when the module is, by it and by those of ours that it imports."""
    names, left = set(), [module]
    while left:
        path = MODULES[left.pop()]
        new = {*_imported(path, at_once(parsed(path).body))} - names
        names |= new
        left += [name for name in new if name in MODULES]
    return names


@cache
def package(module):
    """The longest of PACKAGES that the module is in."""
    parts = module.split(".")
    return max(PACKAGES & {".".join(parts[: index + 1]) for index in range(len(parts))}, key=len)


def tier(module):
    return next(index for index, packages in enumerate(TIERS) if package(module) in packages)


@cache
def imported_modules(module):
    """Modules of ours that it imports; a package around it, loaded already, is none."""
    around = {module, FACADE, *(name for name in MODULES if module.startswith(f"{name}."))}
    return {imported for imported in imports(MODULES[module]) if imported in MODULES} - around


def test_every_folder_of_modules_is_a_package():
    assert not {path.parent for path in MODULES.values() if not (path.parent / "__init__.py").exists()}


def links():
    """Pairs of a module and one that it imports."""
    return [(module, imported) for module in MODULES if module != FACADE for imported in imported_modules(module)]


def test_imports_run_one_way():
    upward = [f"{module} imports {imported}" for module, imported in links() if tier(imported) > tier(module)]
    assert not upward, "of later tiers"


def test_engines_and_the_two_fusions_are_strangers():
    packages = {(package(module), package(imported)): (module, imported) for module, imported in links()}
    assert not {link for (one, other), link in packages.items() if one != other and {one, other} <= STRANGERS}


def test_there_is_no_circle():
    graph = {module: imported_modules(module) for module in MODULES if module != FACADE}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_packages_of_one_tier_are_in_no_circle():
    graph = {name: set() for name in PACKAGES}
    for module, imported in links():
        graph[package(module)].add(package(imported))
    TopologicalSorter({name: others - {name} for name, others in graph.items()}).prepare()


def test_schedules_knows_of_no_runtime():
    known = {(module, name) for module in MODULES if tier(module) == 0 for name in imports(MODULES[module])}
    assert known
    assert not {(module, name) for module, name in known if name.split(".")[0] in BARRED_FROM_SCHEDULES}


@pytest.mark.parametrize("package", ADAPTERS)
def test_heavy_packages_are_imported_only_in_their_adapters(package):
    importers = [
        module
        for module, path in MODULES.items()
        if any(imported.split(".")[0] == package for imported in imports(path))
        and not module.startswith(ADAPTERS[package])
    ]
    assert not importers


@pytest.mark.parametrize("package", ADAPTERS)
def test_heavy_packages_are_loaded_by_those_that_use_them_only(package):
    def has(names):
        return any(name.split(".")[0] == package for name in names)

    assert any(has(imports(MODULES[module])) for module in MODULES if module.startswith(ADAPTERS[package]))
    assert not has(loaded_with("fuse.trainers.ppo"))


@pytest.mark.processes
def test_schedules_works_where_there_is_no_torch():
    modules = sorted(module for module in MODULES if tier(module) == 0)
    program = "import sys\nfor name in ('torch', 'ray', 'fuse'): sys.modules[name] = None\n"
    program += "".join(f"import {module}\n" for module in modules)
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


@pytest.mark.processes
def test_import_fuse_loads_neither_torch_nor_ray():
    program = "import sys, fuse; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd="/").returncode == 0


def test_kernels_holds_native_sources_only():
    assert not list((ROOT / "kernels").rglob("*.py"))


@pytest.mark.processes
@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_transformers_does_not_take_our_kernels_for_its_own(folder):
    """Run beside kernels/ as `python -c`, which puts the folder on sys.path."""
    program = "from transformers.utils.import_utils import is_kernels_available as f; print(f())"
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
