"""The report page in Debian's chromium: sorting, filtering, hovering, and no error in its console."""

import os
import shutil
import tempfile
import time

import pytest

from report_runs import make_run, make_sweep
from vitrail.reporting.page import read_run, render_page

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,  # on a busy machine, a click may come before the page has drawn
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="needs Debian's chromium and its driver (apt-get install chromium-driver)"
    ),
]
EVIL = "<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={profile}")
        for argument in arguments:
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(DRIVER, env={**os.environ, "HOME": profile})
        driver = webdriver.Chrome(options=options, service=service)
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a sweep of six runs, a failed run, and a run whose name is HTML."""
    root = tmp_path_factory.mktemp("logs")
    values = [(lr, decay, 60 + 1e3 * lr + decay) for lr in (1e-3, 2e-3, 1e-2) for decay in (0.05, 0.5)]
    sweep = make_sweep(root / "train" / "sweep", values)
    trace = "2026-01-02 03:02:00,000 DEBUG vitrail: failed\nTrace\nConfigError: data.root=/x: no such folder.\n"
    single = root / "train" / "runs"
    paths = [sweep / str(number) for number in range(6)]
    paths += [
        make_run(single / "failed", finished=False, epochs=None, planned=3, log=trace),
        make_run(single / EVIL, epochs=1, overrides=[f"seed={EVIL}"], note=EVIL),
    ]
    runs = [read_run(path, root, lambda _: False) for path in paths]
    file = root / "report.html"
    file.write_text(render_page(runs, "val/top1", f"runs {EVIL}"))
    return file


@pytest.fixture
def opened(browser, page):
    """The page, freshly opened at desktop width; afterwards its console must be empty."""
    show(browser, page, 1400)
    browser.execute_script("sessionStorage.clear()")
    show(browser, page, 1400)
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None


def show(browser, page, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "true"


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def wait_for(condition):
    """Wait until the page has handled its events, which takes long on a busy machine."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def names(browser):
    return texts(browser, "#table tbody tr .link")


def click(browser, selector):
    browser.find_element("css selector", selector).click()


def hover(browser, selector):
    """Move the pointer over the middle of an element's own line."""
    browser.execute_script(
        """
        const node = document.querySelector(arguments[0]);
        node.scrollIntoView({ block: "center" });
        const middle = node.getPointAtLength(node.getTotalLength() / 2);
        const at = new DOMPoint(middle.x, middle.y).matrixTransform(node.getScreenCTM());
        const options = { clientX: at.x, clientY: at.y, bubbles: true };
        node.dispatchEvent(new PointerEvent("pointermove", options));
        """,
        selector,
    )
    return browser.find_element("css selector", ".tooltip").text


def test_table__headers_sort(opened):
    assert names(opened)[0] == "train/sweep/5"  # the best comes first
    assert names(opened)[-1] == "train/runs/failed"  # which has no result
    click(opened, "th[data-key='best'] button")
    assert names(opened)[0] == f"train/runs/{EVIL}"
    assert names(opened)[-1] == "train/runs/failed"
    click(opened, "th[data-key='config optimizer.lr'] button")
    column = texts(opened, "#table tbody td:nth-child(5)")
    assert [float(value) for value in column if value] == [0.001] * 4 + [0.002] * 2 + [0.01] * 2
    click(opened, "th[data-key='name'] button")
    assert names(opened) == sorted(names(opened), key=str.lower)
    assert opened.find_element("css selector", "th[aria-sort='ascending']").text.startswith("run")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("sweep", 6),
        ("no such folder", 1),
        ("status=failed", 1),
        ("epochs<2", 2),
        ("optimizer.lr>=0.002 sweep", 4),
        ("optimizer.weight_decay=0.5", 3),
        ("onerror", 1),
        ("nothing", 0),
    ],
)
def test_table__filter(opened, words, found):
    opened.find_element("css selector", "#filter").send_keys(words)
    wait_for(lambda: len(names(opened)) == found)
    assert texts(opened, "#count") == [f"{found} of 8 runs"]


def test_table__columns_can_be_chosen(opened):
    before = texts(opened, "#table th")
    opened.execute_script("document.querySelector('.chooser').open = true")
    for box in opened.find_elements("css selector", ".chooser input")[:1]:
        box.click()
    assert len(texts(opened, "#table th")) == len(before) - 1


def test_curves__hover_log_scale_smoothing_and_weights(opened):
    first = "#curves figure:first-child"
    shown = hover(opened, f"{first} path[data-run='train/sweep/5'][data-metric='val/top1']")
    assert "train/sweep/5" in shown
    assert "val/top1" in shown
    assert "epoch 2" in shown
    assert opened.find_elements("css selector", f"{first} .curve.near")

    def curve():
        return opened.find_element("css selector", f"{first} path[data-run='train/sweep/5']").get_attribute("d")

    before = curve()
    click(opened, "#log")
    assert curve() != before
    click(opened, "#log")
    assert curve() == before
    opened.execute_script(
        "const node = document.querySelector('#smooth'); node.value = 0.9; node.dispatchEvent(new Event('input'))"
    )
    assert curve() != before
    assert opened.find_elements("css selector", f"{first} .curve.ema")
    opened.find_element("css selector", "#weights option[value='raw']").click()
    assert not opened.find_elements("css selector", f"{first} .curve.ema")
    assert opened.find_elements("css selector", f"{first} .curve")


def test_curves__runs_and_metric_can_be_chosen(opened):
    curves = "#curves figure:first-child .curve:not(.ema)"
    assert len(opened.find_elements("css selector", curves)) == 7
    click(opened, "tr[data-run='train/sweep/5'] input")
    assert len(opened.find_elements("css selector", curves)) == 6
    opened.find_element("css selector", "#curves figure:first-child option[value='train/loss']").click()
    assert set(texts(opened, "#curves figure:first-child option:checked")) == {"train/loss"}


def test_sweep__parallel_coordinates_and_importance(opened):
    assert len(opened.find_elements("css selector", "#sweep .coordinate")) == 6
    shown = hover(opened, "#sweep .coordinate[data-run='train/sweep/5']")
    assert "optimizer.lr 0.01" in shown
    assert "val/top1 70.5" in shown
    pytest.importorskip("optuna")
    assert texts(opened, "#sweep .bars .key") == ["optimizer.lr", "optimizer.weight_decay"]


def test_run__opens_with_its_config_and_command(opened):
    for link in opened.find_elements("css selector", "#table .link"):
        if link.text.endswith(EVIL):
            link.click()
    assert texts(opened, "#run h2") == [f"train/runs/{EVIL}"]
    assert any(EVIL in text for text in texts(opened, "#run pre"))
    assert EVIL in texts(opened, "#run .leaf")
    assert opened.find_elements("css selector", "#run .stretch")
    assert not opened.find_elements("css selector", "img[src='x']")


@pytest.mark.parametrize("width", [1400, 390])
def test_page__fits_the_width(opened, page, width):
    show(opened, page, width)
    opened.find_element("css selector", "#table .link").click()
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width


def test_page__reloads_itself_and_keeps_what_the_user_chose(browser, tmp_path):
    paths = [
        make_run(tmp_path / "a" / "b" / str(number), overrides=[f"seed={number}"], seed=number) for number in (1, 2)
    ]
    file = tmp_path / "report.html"

    def write(some):
        runs = [read_run(path, tmp_path, lambda _: False) for path in some]
        file.write_text(render_page(runs, "val/top1", "live", reload_seconds=0.3))

    write(paths)
    show(browser, file, 1400)
    browser.find_element("css selector", "#filter").send_keys("a/b")
    click(browser, "th[data-key='name'] button")
    click(browser, "tr[data-run='a/b/2'] input")
    click(browser, "#table .link")
    assert texts(browser, "#run h2") == ["a/b/1"]
    write([*paths, make_run(tmp_path / "a" / "b" / "3")])
    for _ in range(100):
        if len(names(browser)) == 3:
            break
        time.sleep(0.1)
    assert names(browser) == ["a/b/1", "a/b/2", "a/b/3"]
    assert texts(browser, "#run h2") == ["a/b/1"]
    assert browser.find_element("css selector", "#filter").get_attribute("value") == "a/b"
    drawn = browser.find_elements("css selector", "#curves figure:first-child .curve:not(.ema)")
    assert [node.get_attribute("data-run") for node in drawn] == ["a/b/1"]


@pytest.mark.slow
def test_page__two_hundred_runs_of_three_hundred_epochs_open_in_three_seconds(browser, tmp_path):
    columns = {f"train/part{number}": lambda epoch: f"{epoch / 7:.6g}" for number in range(12)}
    paths = [make_run(tmp_path / "a" / "b" / str(number), epochs=300, columns=columns) for number in range(200)]
    file = tmp_path / "report.html"
    file.write_text(render_page([read_run(path, tmp_path, lambda _: False) for path in paths], "val/top1", "many"))
    show(browser, file, 1400)
    assert browser.execute_script("return performance.now()") < 3000
    assert len(names(browser)) == 200
