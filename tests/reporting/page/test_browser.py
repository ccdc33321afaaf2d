"""The report page in Debian's chromium: sorting, filtering, hovering, and no error in its console."""

import json
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
def tab(browser):
    """A new tab, which has its own sessionStorage; afterwards its console must be empty."""
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    yield browser
    errors, hacked = browser.get_log("browser"), browser.execute_script("return window.hacked")
    browser.close()
    browser.switch_to.window(first)
    assert errors == []
    assert hacked is None


@pytest.fixture
def opened(tab, page):
    """The page at desktop width."""
    show(tab, page, 1400)
    return tab


def show(browser, page, width):
    """Open a page, with the width set before: an open page draws itself again when its width changes."""
    browser.get("about:blank")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    state = "return [document.documentElement.dataset.ready, window.innerWidth]"
    wait_for(lambda: browser.execute_script(state), ["true", width])


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def wait_for(read, expected):
    """Wait until `read` returns what is expected: on a busy machine, the page handles its events late."""
    deadline = time.monotonic() + 30
    while (found := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == expected


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
    return "\n".join(texts(browser, ".tooltip div"))


def act(browser, script, selector):
    """Run a script on the first such element once the page has drawn: in one step, as it may be reloading."""
    guarded = f"""
        const node = document.documentElement.dataset.ready && document.querySelector(arguments[0]);
        if (node) {{ {script}; }}
        return Boolean(node);
        """
    wait_for(lambda: browser.execute_script(guarded, selector), True)


def test_table__headers_sort(opened):
    assert names(opened)[0] == "train/sweep/5"  # the best comes first
    assert names(opened)[-1] == "train/runs/failed"  # which has no result
    click(opened, "th[data-key='best'] button")
    wait_for(lambda: names(opened)[0], f"train/runs/{EVIL}")
    assert names(opened)[-1] == "train/runs/failed"
    click(opened, "th[data-key='config optimizer.lr'] button")
    expected = [0.001] * 4 + [0.002] * 2 + [0.01] * 2
    column = "#table tbody td:nth-child(5)"
    wait_for(lambda: [float(value) for value in texts(opened, column) if value], expected)
    click(opened, "th[data-key='name'] button")
    wait_for(lambda: names(opened) == sorted(names(opened), key=str.lower), True)
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
    wait_for(lambda: (len(names(opened)), texts(opened, "#count")), (found, [f"{found} of 8 runs"]))


def test_table__columns_can_be_chosen(opened):
    before = texts(opened, "#table th")
    opened.execute_script("document.querySelector('.chooser').open = true")
    click(opened, ".chooser input")
    wait_for(lambda: len(texts(opened, "#table th")), len(before) - 1)


def test_curves__hover_log_scale_smoothing_and_weights(opened):
    first = "#curves figure:first-child"
    shown = hover(opened, f"{first} path[data-run='train/sweep/5'][data-metric='val/top1']")
    assert "train/sweep/5" in shown
    assert "val/top1" in shown
    assert "epoch 2" in shown
    assert opened.find_elements("css selector", f"{first} .curve.near")

    def curve():
        path = "return document.querySelector(arguments[0]).getAttribute('d')"
        return opened.execute_script(path, f"{first} path[data-run='train/sweep/5']")

    before = curve()
    click(opened, "#log")
    wait_for(lambda: curve() != before, True)
    click(opened, "#log")
    wait_for(curve, before)
    act(opened, "node.value = 0.9; node.dispatchEvent(new Event('input'))", "#smooth")
    assert curve() != before
    assert texts(opened, f"{first} .curve.ema")
    click(opened, "#weights option[value='raw']")
    wait_for(lambda: texts(opened, f"{first} .curve.ema"), [])
    assert texts(opened, f"{first} .curve")


def test_curves__runs_and_metric_can_be_chosen(opened):
    curves = "#curves figure:first-child .curve:not(.ema)"
    assert len(texts(opened, curves)) == 7
    click(opened, "tr[data-run='train/sweep/5'] input")
    wait_for(lambda: len(texts(opened, curves)), 6)
    click(opened, "#curves figure:first-child option[value='train/loss']")
    wait_for(lambda: set(texts(opened, "#curves figure:first-child option:checked")), {"train/loss"})


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
    wait_for(lambda: texts(opened, "#run h2"), [f"train/runs/{EVIL}"])
    assert any(EVIL in text for text in texts(opened, "#run pre"))
    assert EVIL in texts(opened, "#run .leaf")
    assert opened.find_elements("css selector", "#run .stretch")
    assert not opened.find_elements("css selector", "img[src='x']")


@pytest.mark.parametrize("width", [1400, 390])
def test_page__fits_the_width(tab, page, width):
    show(tab, page, width)
    click(tab, "#table .link")
    wait_for(lambda: len(texts(tab, "#run h2")), 1)
    assert tab.execute_script("return document.documentElement.scrollWidth") <= width


def test_page__segmentation_beside_classification(tab, tmp_path):
    scores = {"without": ("val/top1", "val/loss"), "columns": {"val/mIoU": lambda epoch: 30 + epoch}}
    paths = [make_run(tmp_path / "a" / "b" / name, **options) for name, options in (("c", {}), (EVIL, scores))]
    evaluation = tmp_path / "eval"
    evaluation.mkdir()
    results = {"mIoU": 25.0, "mAcc": 30.0, "aAcc": 80.0, "images": 3, "inference": f"whole images, {EVIL}"}
    (evaluation / "results.json").write_text(json.dumps({"raw": results}))
    (evaluation / "classes_raw.csv").write_text(f"class,iou,accuracy\nsky,50.00,60.00\nred,0.00,0.00\n{EVIL},,\n")
    file = tmp_path / "report.html"
    runs = [read_run(path, tmp_path, lambda _: False) for path in paths]
    file.write_text(render_page(runs, "val/top1", "both", {paths[1]: evaluation}))
    show(tab, file, 1400)
    labels = texts(tab, "#table th")
    assert "best val/mIoU" in labels
    column = f"#table tbody td:nth-child({labels.index('best val/mIoU') + 1})"
    wait_for(lambda: texts(tab, column), ["", "32.00"])
    assert "val/mIoU" in texts(tab, "#curves option:checked")
    tab.find_elements("css selector", "#table tbody .link")[1].click()
    wait_for(lambda: texts(tab, "#run h2"), [f"a/b/{EVIL}"])
    assert texts(tab, "#run .local tbody tr") == ["red00", "sky5060", EVIL]


def test_page__another_report_of_the_same_title_has_its_own_state(tab, page):
    show(tab, page, 1400)
    act(tab, "node.value = 'sweep'; node.dispatchEvent(new Event('input'))", "#filter")
    copy = page.with_name("copy.html")
    copy.write_bytes(page.read_bytes())
    show(tab, copy, 1400)
    assert len(names(tab)) == 8
    show(tab, page, 1400)
    assert len(names(tab)) == 6


def test_page__reloads_itself_and_keeps_what_the_user_chose(tab, tmp_path):
    paths = [
        make_run(tmp_path / "a" / "b" / str(number), overrides=[f"seed={number}"], seed=number) for number in (1, 2)
    ]
    file = tmp_path / "report.html"

    def write(some):
        runs = [read_run(path, tmp_path, lambda _: False) for path in some]
        unfinished = file.with_suffix(".part")
        unfinished.write_text(render_page(runs, "val/top1", "live", reload_seconds=0.3))
        unfinished.replace(file)

    write(paths)
    show(tab, file, 1400)
    act(tab, "node.value = 'a/b'; node.dispatchEvent(new Event('input'))", "#filter")
    for selector in ("th[data-key='name'] button", "tr[data-run='a/b/2'] input", "tr[data-run='a/b/1'] .link"):
        act(tab, "node.click()", selector)
    wait_for(lambda: texts(tab, "#run h2"), ["a/b/1"])
    write([*paths, make_run(tmp_path / "a" / "b" / "3")])
    wait_for(lambda: names(tab), ["a/b/1", "a/b/2", "a/b/3"])
    wait_for(lambda: texts(tab, "#run h2"), ["a/b/1"])
    values = "return document.querySelector('#filter')?.value"
    wait_for(lambda: tab.execute_script(values), "a/b")
    drawn = """
        const curves = document.querySelectorAll("#curves figure:first-child .curve:not(.ema)");
        return [...curves].map((node) => node.dataset.run);
        """
    wait_for(lambda: tab.execute_script(drawn), ["a/b/1"])


@pytest.mark.slow  # a busy machine takes longer
def test_page__two_hundred_runs_of_three_hundred_epochs_open_in_three_seconds(tab, tmp_path):
    columns = {f"train/part{number}": lambda epoch: f"{epoch / 7:.6g}" for number in range(12)}
    paths = [make_run(tmp_path / "a" / "b" / str(number), epochs=300, columns=columns) for number in range(200)]
    file = tmp_path / "report.html"
    file.write_text(render_page([read_run(path, tmp_path, lambda _: False) for path in paths], "val/top1", "many"))
    show(tab, file, 1400)
    assert tab.execute_script("return performance.now()") < 3000
    assert len(names(tab)) == 200
