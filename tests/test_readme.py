"""README says what is so: its example runs, its links lead somewhere, and it can be read where only its text is."""

import re
from pathlib import Path

import pytest
import torch

import cece

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/GROUND.md"]


def test_the_example_runs():
    code = re.search(r"^## Use it\n\n```python\n(.*?)^```", README, re.M | re.S)[1]
    names = {}
    torch.manual_seed(0)
    exec(compile(code, "README: Use it", "exec"), names)
    assert names["loss"].isfinite() and names["one"].allclose(names["two"])


def test_a_newcomer_finds_things_in_this_order():
    headings = re.findall(r"^## (.+)", README, re.M)
    wanted = ["Requirements", "Install", "How fast", "Use it", "Troubleshooting", "Compatibility", "FAQ", "Links"]
    assert [h for h in headings if h in wanted] == wanted
    assert README.index("**`BCELoss` has no sigmoid.**") < README.index("### Adopting it")
    assert "missed" not in README and "goals met" not in README


def test_readme_needs_no_picture():
    """A package index shows README alone, where a picture beside it is a broken one: its plot is text."""
    assert "![" not in README and "<img" not in README
    assert README.index("```text\ncross_entropy") < README.index("## Requirements")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            assert (ROOT / page).parent.joinpath(path).exists(), link
        if anchor:
            assert re.search(rf"^#+ {anchor}$", (ROOT / page).read_text(), re.M | re.I), link


def test_files_named_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"\b(?:csrc|cece|benchmarks)/[\w/]+\.\w+", text)
    assert len(named) > 15 and [name for name in named if not (ROOT / name).exists()] == []


DIFFERS = {
    "weight 0 of an infinite BCE loss": lambda: cece.binary_cross_entropy_with_logits(
        torch.tensor([torch.inf]), torch.zeros(1), torch.zeros(1)
    ),
    "probability target 0 at a logit of -inf": lambda: cece.cross_entropy(
        torch.tensor([[-torch.inf, 1.0]]), torch.tensor([[0.0, 1.0]])
    ),
    "±inf logit and a target that agrees": lambda: cece.cross_entropy(
        torch.tensor([[torch.inf, 1.0]]), torch.tensor([0])
    ),
}


@pytest.mark.parametrize("row", DIFFERS)
def test_what_the_table_says_is_0(row):
    assert re.search(rf"^\| {re.escape(row)} \| NaN \| 0[ ,:|]", README, re.M)
    assert DIFFERS[row]() == 0


def test_a_sigmoid_too_many_costs_what_the_box_says():
    right = torch.tensor([1.0])
    assert f"{cece.binary_cross_entropy_with_logits(right, right):.2f}" == "0.31" and "is 0.31, not" in README
