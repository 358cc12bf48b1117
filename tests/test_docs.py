"""What documents refer to exists, and their figures are pictures."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("name", ["fused_schedule", "rollout"])
def test_figures_are_svg_and_made_by_the_documented_command(name: str) -> None:
    figure = ROOT / "docs" / "figures" / f"{name}.svg"
    assert ElementTree.parse(figure).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert f"--svg docs/figures/{name}.svg" in (ROOT / "Makefile").read_text(encoding="utf-8")
