"""The layers: pipeline knows no Prefect and no stage, no stage knows another, and help comes without heavy imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "prefect", "mediapipe", "rembg", "numba", "cv2", "av", "scipy", "matplotlib")


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("*.py")), ids=lambda p: p.stem)
def test_library_knows_no_prefect_and_nothing_above(path: Path) -> None:
    upward = {"stages", "flows"} if path.parent.name != "cli" else set()  # the command line starts the flows
    assert not tops(path) & ({"prefect"} | upward)


@pytest.mark.parametrize("path", sorted((ROOT / "stages").glob("*.py")), ids=lambda p: p.stem)
def test_stage_imports_library_only(path: Path) -> None:
    allowed = {"stages"} if path.name in ("__init__.py", "__main__.py") else set()  # they are about all of them
    assert not tops(path) & ({"prefect", "flows", "stages"} - allowed)


@pytest.mark.parametrize("path", sorted((ROOT / "flows").glob("*.py")), ids=lambda p: p.stem)
def test_flows_are_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 200, "what is more than wiring belongs in pipeline/"


@pytest.mark.parametrize("module", ["pipeline.cli", "stages", "pipeline.run", "pipeline.stage"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(' '.join(sorted(set({HEAVY!r}) & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
