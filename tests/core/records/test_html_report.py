"""The HTML report: one file, nothing from the network, every site with its reason; read in a real browser."""

import re
import shutil
import subprocess

import pytest
import zoo

import thresher
from thresher.errors import ArgumentError
from thresher.records import html_report
from thresher.report import Miss, PassReport, Report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    model, inputs = zoo.ZOO["llama"].build()
    recipe = {"prepack": True, "nvfp4": {"min_weights": 0, "keep": ["head", "first"], "budget": 1.0}}
    return thresher.compile(model, inputs, recipe, target="reference")


def test_every_site_and_reason_is_there_and_nothing_is_fetched(compiled, tmp_path):
    page = html_report.write(tmp_path / "r.html", compiled, title="tiny <llama>").read_text()
    assert not re.search(r"(src|href)\s*=|url\(|https?://|@import", page)
    assert "tiny &lt;llama&gt;" in page and "<llama>" not in page
    for account in compiled.report.passes:
        for site in account.rewritten:
            assert f'data-fqn="{site}"' in page
        for miss in account.missed:
            assert html_report._e(miss.reason) in page
    assert '<input type="checkbox" id="changed" checked>' in page and "<div class=scroll><table>" in page
    assert page.count("<svg") == 3 and "varlen_attention" in page and "Certificate" in page


def test_states_of_sites():
    report = Report("r", [
        PassReport("a", rewritten=["layers.0.x"], missed=[Miss("layers.1.x", "Too narrow.")], predicted={"layers.0.x": 2.0}),
        PassReport("b", missed=[Miss("layers.0.x", "w is already rewritten by a, and b cannot build on it."),
                                Miss("layers.2.x", "w is already rewritten by a, and b cannot build on it.")]),
        PassReport("c", missed=[Miss("layers.3.x", "The pass was rolled back.")], rolled_back="it changed too much."),
    ])  # fmt: skip
    found = html_report.sites(report)
    assert {s: state for s, (state, _) in found.items()} == {
        "layers.0.x": "rewritten", "layers.1.x": "missed", "layers.2.x": "claimed", "layers.3.x": "rolled"
    }  # fmt: skip
    assert "2.00x" in found["layers.0.x"][1] and "changed too much" in found["layers.3.x"][1]
    page = html_report.render(report)
    assert page.index("layers.1.x") < page.index("layers.2.x") and "Program" not in page
    token = PassReport("t", rewritten=["m.layers.0, m.layers.1"], flops={"before": 4.0, "after": 1.0})
    page = html_report.render(Report("r", [token]))
    assert (
        page.count(">the layer<") == 2 and "25% of the layers" in page
    )  # one site over layers stands in each


def test_a_pass_without_sites_does_not_claim_to_cover_them():
    page = html_report.render(Report("r", [PassReport("a"), PassReport("b", rewritten=["layers.0.x"])]))
    assert page.count(">no site<") == 1 and page.count(">100%<") == 1


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ArgumentError, match="what"):
        html_report.render(3)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium in the PATH")
def test_in_a_browser(compiled, tmp_path):
    page = html_report.write(tmp_path / "r.html", compiled, title="tiny llama")
    script = "<script>const s=document.querySelector('.site.rewritten[data-why]');s.dispatchEvent(new MouseEvent('mouseover',{bubbles:true}));</script></body>"  # noqa: E501
    page.write_text(page.read_text().replace("</body>", script))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    assert 'data-ready="yes"' in dom
    shown = re.search(r'id="why"[^>]*>([^<]*)', dom)[1]
    assert "Rewritten by" in shown  # hovering a site put its reason into the panel
    assert 'class="same" style="display: none;"' in dom  # it opens on the changed lines
    picture = tmp_path / "r.png"
    subprocess.run([*command, f"--screenshot={picture}", "--window-size=1200,1400", page.as_uri()],
                   capture_output=True, timeout=120, check=True)  # fmt: skip
    from PIL import Image

    colours = {c for _, c in Image.open(picture).convert("RGB").getcolors(1 << 24)}
    assert len(colours) > 50


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium in the PATH")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk(compiled, tmp_path, width, dark):
    """Shown in a frame of that width, since a window of Chromium's is never narrower than 500 pixels."""
    page = html_report.write(tmp_path / "r.html", compiled, title="tiny llama")
    probe = "<script>document.body.dataset.wide=document.documentElement.scrollWidth</script></body>"
    page.write_text(page.read_text().replace("</body>", probe))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe id=f src="{page.name}" style="border:0;width:{width}px;height:1600px"></iframe>'
        "<script>f.onload=()=>document.body.dataset.wide=f.contentDocument.body.dataset.wide</script>"
    )
    command = [CHROMIUM, *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={max(width, 500)},1600"]  # fmt: skip
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom = subprocess.run(
        [*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    wide = re.search(r'<body[^>]*data-wide="(\d+)"', dom)
    assert wide is not None and int(wide[1]) <= width  # nothing makes the page itself scroll sideways
    picture = tmp_path / "r.png"
    subprocess.run(
        [*command, f"--screenshot={picture}", frame.as_uri()], capture_output=True, timeout=120, check=True
    )
    from PIL import Image

    ground = sum(Image.open(picture).convert("RGB").getpixel((5, 5)))
    assert (ground < 200) == dark
