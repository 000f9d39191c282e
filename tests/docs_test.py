"""The documentation site: what its extension makes of docstrings, and a whole build of it."""

import functools
import html
import http.server
import importlib
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import warnings
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

for package in ("sphinx", "furo"):
    pytest.importorskip(package, reason='the site needs Sphinx: pip install -e ".[docs]"')
nodes = importlib.import_module("docutils.nodes")
formula = importlib.import_module("jaxref_docs.formula")
form = importlib.import_module("jaxref_docs.docstring")

LISTED = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "jaxref").glob("*/**/__init__.py")
    if path.parent.name not in {"core", "bench"}
)
PACKAGE = importlib.import_module("jaxref_docs.package").Package(ROOT)

DOCSTRING = """What it computes, with `other_name`.

    L = Σ_i x_i       where so
    L = 0             elsewhere

Args:
  logits, labels: `[...]` floating point,
    over two lines.

    A paragraph of its own:

        p = 1 - q
  axis: the axis.

Returns:
  `[...]` losses.

Raises:
  ValueError, TypeError: what is wrong.

Use it here; `e.g. There` too.

Cost: O(n²) = much. It is not advice.

Example:
  >>> print(1)
  1

Reference: Hui et al. and others, "Title. Of it", 2023, arXiv:2302.03952.
"""


def public_names():
    """Every name that a package lists, in full."""
    modules = {name: importlib.import_module(name) for name in LISTED}
    return {
        f"{m}.{name}" for m, module in modules.items() for name in vars(module).get("__all__", ())
    }


def marked(node):
    """A node as text: scripts in brackets, cells between bars."""
    if isinstance(node, nodes.Text):
        return str(node)
    inside = "".join(map(marked, node.children))
    match node:
        case nodes.subscript():
            return f"_[{inside}]"
        case nodes.superscript():
            return f"^[{inside}]"
        case formula.formula_cell():
            return f"{inside}|"
        case formula.formula_row():
            return f"{inside}\n"
    return inside


def display(*lines, names=()):
    return marked(formula.display(lines, lambda text: nodes.literal("", text), names))


def test_a_docstring_is_cut_into_its_parts():
    first, block, arguments, returns, raises, use, costs, example, reference = form.parse(DOCSTRING)
    assert first == form.Text("What it computes, with `other_name`.")
    assert block == form.Formula(("L = Σ_i x_i       where so", "L = 0             elsewhere"))
    assert [name for name, _ in arguments.items] == ["logits, labels", "axis"]
    assert arguments.items[0][1] == (
        form.Text("`[...]` floating point, over two lines."),
        form.Text("A paragraph of its own:"),
        form.Formula(("p = 1 - q",)),
    )
    assert returns == form.Section("Returns", (("", (form.Text("`[...]` losses."),)),))
    assert raises.items == (("ValueError, TypeError", (form.Text("what is wrong."),)),)
    assert use.text.startswith("Use it here")
    assert costs.text.startswith("Cost: ")
    assert example == form.Section("Example", (("", (form.Doctest(">>> print(1)\n1"),)),))
    assert reference.role == "reference"
    assert reference.text.endswith("arXiv:2302.03952.")


def test_the_comparison_takes_its_sentences_from_the_docstring():
    blocks = form.parse(DOCSTRING)
    assert form.summary(blocks) == "What it computes, with `other_name`."
    assert form.advice(blocks) == "Use it here; `e.g. There` too."
    assert form.cost(blocks) == "O(n²) = much. It is not advice."
    assert form.split_sentences("By Hui et al. The `a. B` end. Then more.") == [
        "By Hui et al. The `a. B` end.",
        "Then more.",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("L = -log p + ε_j (1 - p)^j", "L = −log p + ε_[j] (1 − p)^[j]"),
        ("softmax(f_t)_{y_t} e^(-d) e^-80", "softmax(f_[t])_[y_[t]] e^[(−d)] e^[−80]"),
        ("Σ_{j=1}^{N} x_ij π_ref", "Σ^[N]_[j=1] x_[ij] π_[ref]"),
        (
            "wd_ratio scale-invariant 1e-4 FN_k ‖x‖_∞",
            "wd_ratio scale-invariant 1e-4 FN_[k] ‖x‖_[∞]",
        ),
        ("mean_k max_i q `top_k`", "mean_[k] max_[i] q top_k"),
    ],
)
def test_formulas_get_their_scripts(line, expected):
    assert display(line) == f"{expected}|\n"


def test_arguments_keep_their_names_in_formulas():
    assert display("k = top_k", names=["top_k"]) == "k = top_k|\n"


def test_columns_of_formulas_align():
    assert display("x ← x̂ (a)     where so", "y ← y          elsewhere") == (
        "x ← x̂ (a)|where so|\ny ← y|elsewhere|\n"
    )
    assert display("L   = a", "L_π = b") == "L|= a|\nL_[π]|= b|\n"
    assert display("a = b,   c = d") == "a = b,\u2003c = d|\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/j + ε_j", True),
        ("2 w f_j / (C - 1)", True),
        ("axis=-1", False),
        ("[n_1, n_2]", False),
        ("jax.vmap(f)", False),
    ],
)
def test_mathematics_is_told_from_code(text, expected):
    assert formula.is_mathematics(text) is expected


def test_colab_opens_what_is_at_github():
    site = importlib.import_module("jaxref_docs.site")
    address = "https://colab.research.google.com/github/owner/name/blob/main/colabs/a.ipynb"
    for repository in ("https://github.com/owner/name", "https://github.com/owner/name.git"):
        assert site.colab_address(repository, "colabs/a.ipynb") == address
    assert site.colab_address("https://example.org/name", "colabs/a.ipynb") == ""
    assert site.colab_address("", "colabs/a.ipynb") == ""


def test_every_public_name_is_read_from_the_source():
    assert public_names() - set(PACKAGE.symbols) == set()


def test_docstrings_have_the_form_that_the_site_reads():
    found = {
        f"{symbol.module}: {symbol.name}": problems
        for symbol in {s.name: s for s in PACKAGE.symbols.values()}.values()
        if (problems := form.irregularities(symbol.docstring))
    }
    assert found == {}


def test_every_method_says_when_to_use_it_and_what_it_costs_and_has_an_example():
    site = importlib.import_module("jaxref_docs.site")
    silent = []
    for room in site.Site(ROOT).rooms:
        for symbol in room.symbols:
            is_method = not symbol.is_state and symbol.kind != "data"
            is_alias = symbol.docstring.startswith("Another name of")
            if room.name not in site.PROGRAMS and is_method and not is_alias:
                blocks = form.parse(symbol.docstring)
                has = {
                    "use": form.advice(blocks),
                    "cost": form.cost(blocks),
                    "example": ">>>" in symbol.docstring,
                }
                silent += [f"{symbol.name}: {part}" for part, there in has.items() if not there]
    assert silent == []


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_holds_everything(tmp_path):
    """By the command of BUILD.md, but for where it writes to."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    result = subprocess.run(
        [*command, "-d", tmp_path / "doctrees", ROOT / "docs", site],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    anchors = {page: set(re.findall(r'\sid="([^"]+)"', text)) for page, text in pages.items()}
    assert public_names() - set().union(*anchors.values()) == set()
    assert dead_links(site, pages, anchors) == []
    assert "adamp" in (site / "searchindex.js").read_text()
    papers = tomllib.loads((ROOT / "jaxref" / "papers" / "index.toml").read_text("utf-8"))
    assert set(papers) <= anchors["papers.html"]
    assert 'href="reference/optimizers/adamp.html#jaxref.optimizers.adamp"' in pages["papers.html"]
    entry = pages["reference/losses/classification.html"].partition('id="jaxref.losses.squentropy"')
    shown = re.search(r'<div class="formula".*?</div>', entry[2], re.DOTALL)
    assert shown
    assert "log softmax(f)" in html.unescape(re.sub("<[^>]+>", "", shown[0]))
    assert "<sub>" in shown[0]
    assert "https://cdn" not in "".join(pages.values())
    if browser := shutil.which("chromium") or shutil.which("google-chrome"):
        check_in_browser(browser, site)
    else:
        warnings.warn("no Chromium here: the site's scripts were not run", stacklevel=1)


def dead_links(site, pages, anchors):
    """Links to pages, files and anchors that are not there."""
    dead = []
    for page, text in pages.items():
        for link in set(re.findall(r'\s(?:href|src)="([^"]+)"', text)):
            parts = urlsplit(html.unescape(link))
            if parts.scheme:
                continue
            path = (
                ((site / page).parent / unquote(parts.path)).resolve()
                if parts.path
                else site / page
            )
            target = path.relative_to(site.resolve()).as_posix() if parts.path else page
            known = anchors.get(target, ())
            if not path.exists() or (parts.fragment and unquote(parts.fragment) not in known):
                dead.append(f"{page}: {link}")
    return dead


def check_in_browser(browser, site):
    """The search and the filter find AdamP, and no page's script reports an error."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def rendered(page):
            options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
            result = subprocess.run(
                [
                    browser,
                    *options,
                    "--virtual-time-budget=10000",
                    "--dump-dom",
                    f"http://localhost:{server.server_port}/{page}",
                ],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert "CONSOLE" not in result.stderr, result.stderr
            return result.stdout

        found = rendered("search.html?q=adamp")
        assert "reference/optimizers/adamp.html#jaxref.optimizers.adamp" in found
        left = re.findall(r'<div class="paper [^>]*>', rendered("papers.html?filter=adamp"))
        assert [tag for tag in left if "hidden" not in tag]
        assert len([tag for tag in left if "hidden" in tag]) > 100
        assert 'class="formula"' in rendered("reference/losses/classification.html")
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *_):
        pass
