"""What this book adds to Sphinx: clean notebooks, tables of results, the modules."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\w*).*$", re.M)


def clean_notebook(notebook: dict) -> dict:
    """The notebook as a reader sees it: without `#|` lines and cells of nothing else.

    A cell with `#| hide` and the one that installs the package on Colab run, but are
    not shown.
    """
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            words = DIRECTIVE.findall(source)
            lines = [line for line in source.splitlines() if not DIRECTIVE.match(line)]
            code = "\n".join(lines).strip("\n")
            if not code:
                continue
            cell["source"] = code
            if "hide" in words or '"google.colab" in sys.modules' in code:
                cell["metadata"].setdefault("tags", []).append("remove-cell")
        cells.append(cell)
    notebook["cells"] = cells
    return notebook


def results_tables() -> str:
    """A section for each training script, with a column for each of its results."""
    sections = []
    scripts = (ROOT / "minigen" / "train").glob("*.py")
    for script in sorted(file.stem for file in scripts if file.stem[0] != "_"):
        files = sorted((ROOT / "data" / "results").glob(f"{script}-*.json"))
        runs = {file.stem.removeprefix(f"{script}-"): json.loads(file.read_text())
                for file in files}
        names = dict.fromkeys(name for run in runs.values() for name in run["metrics"])
        rows = [["", *(f"`{name}`" for name in runs)], ["---", *["---:"] * len(runs)],
                ["data", *(Path(run["dataset"]).name for run in runs.values())],
                ["minutes", *(number(run["minutes"]) for run in runs.values())]]
        for cost in ("images_seen", "flops"):
            rows.append([cost.replace("_", " "), *(
                number(run.get("cost", {}).get(cost)) for run in runs.values())])
        rows += [[name.replace("_", " "),
                  *(number(run["metrics"].get(name)) for run in runs.values())]
                 for name in names]
        rows += evaluation_rows(list(runs.values()))
        table = "".join(f"| {' | '.join(row)} |\n" for row in rows) if runs else ""
        made = [f"- `{name}`: `{run['command']}`, seed {run['seed']}, on "
                f"{run['hardware']}\n" for name, run in runs.items()]
        if not any(name.startswith("full") for name in runs):
            made.append("- preset `full`: not measured yet\n")
        sections.append(f"## {script}\n\n{table}\n{''.join(made)}")
    return "\n".join(sections)


def systems_tables() -> str:
    """Three tables of what was measured for each system that the book compares."""
    from minigen.systems import COLUMNS, table  # here, since it imports torch

    names = list(COLUMNS)
    cut = [0, names.index("seconds per image"), names.index("FD-landscape"), len(names)]
    parts = [names[start:stop] for start, stop in zip(cut, cut[1:], strict=False)]
    return "\n\n".join(table(part) for part in reversed(parts))


def evaluation_rows(runs: list[dict]) -> list[list[str]]:
    """Rows for the figures of `minigen evaluate`, each with that of real images."""
    reports = [run.get("evaluation", {}) for run in runs]
    names = dict.fromkeys(name for report in reports
                          for name in report.get("figures", {}))
    rows = [["images measured", *(str(report.get("N", "")) for report in reports)],
            ["reference", *(report.get("reference", "") for report in reports)],
            ["extractor", *(report.get("hash", "") for report in reports)]]
    for name in names:
        found = [report.get("figures", {}).get(name) for report in reports]
        rows.append([f"{name} (of real images)", *(
            "" if figure is None else f"{number(figure['value'])} "
            f"({number(figure['floor'])})" for figure in found)])
    return rows if names else []


def benchmark_tables() -> str:
    """A table for each file that `minigen bench --json` wrote to data/benchmarks."""
    tables = []
    for file in sorted((ROOT / "data" / "benchmarks").glob("*.json")):
        run = json.loads(file.read_text())
        rows = [f"`{run['command']}` on {run['hardware']}, {run['date']}\n",
                "| Case | Measured | Target | Reached | |",
                "| --- | ---: | ---: | --- | --- |"]
        for row in run["rows"]:
            bound = "at least" if row["at_least"] else "at most"
            target = "-" if row["target"] is None else f"{bound} {row['target']:g}"
            reached = {True: "yes", False: "**no**", None: "-"}[row["reached"]]
            measured = f"{number(row['value'])} {row['unit']}"
            cells = (row["case"], measured, target, reached, row["note"])
            rows.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(rows))
    return "\n\n".join(tables) or "Not measured yet."


def number(value) -> str:
    """A measured value for a table: four digits, nothing for None."""
    if isinstance(value, float):
        if abs(value) >= 1e9:
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def module_list() -> str:
    """A section for each module: first those of the chapters, then others."""
    chapters, by_hand = [], []
    for file in sorted((ROOT / "minigen").glob("[!_]*.py")):
        text = file.read_text()
        if chapter := re.search(r"^# AUTOGENERATED.*?(\w+)\.ipynb", text, re.M):
            chapters.append((chapter[1], file.stem))
        else:
            by_hand.append(file.stem)
    sections = [section(name, f"Written in {{doc}}`/nbs/{chapter}`.")
                for chapter, name in sorted(chapters)]
    sections += ["## By hand\n\nThese modules hold what the chapters use without "
                 "explaining it.\n"]
    return "\n".join(sections + [section(name, "", "###") for name in by_hand])


def section(name: str, about: str, level: str = "##") -> str:
    """The documentation of one module."""
    return (f"{level} minigen.{name}\n\n{about}\n\n"
            f"```{{eval-rst}}\n.. automodule:: minigen.{name}\n   :members:\n```\n")


GENERATED = {
    "book/results": (("<!-- systems -->", systems_tables),
                     ("<!-- results -->", results_tables),
                     ("<!-- benchmarks -->", benchmark_tables)),
    "book/api": (("<!-- modules -->", module_list),),
}


def read_source(app, docname, source):
    if app.env.doc2path(docname).endswith(".ipynb"):
        source[0] = json.dumps(clean_notebook(json.loads(source[0])))
    elif docname in GENERATED:
        for marker, write in GENERATED[docname]:
            source[0] = source[0].replace(marker, write())


def quiet_theme(app, config):
    """Leave out parts of the theme and of Jupyter Book that this book does not use."""
    # The theme shows a second header above every page unless its parts are empty.
    empty = {f"navbar_{part}": [] for part in ("start", "center", "end", "persistent")}
    options = empty | {"logo": {"text": "minigen"}}
    config.html_theme_options = config.html_theme_options | options
    # Pages are light or dark as the reader's system is: "auto" in the theme's words.
    config.html_context = config.html_context | {"default_mode": "auto"}
    # Thebe runs cells in a remote kernel, and its address is an error on every page.
    for listeners in app.events.listeners.values():
        listeners[:] = [each for each in listeners
                        if not each.handler.__module__.startswith("sphinx_thebe")]
    styles = app.registry.css_files
    app.registry.css_files = [each for each in styles if "thebe" not in each[0]]


def skip_field(app, what, name, member, skip, options):
    """A named tuple's fields are in its signature; Python's docstring adds nothing."""
    text = getattr(member, "__doc__", None) or ""
    return True if text.startswith("Alias for field number") else None


def setup(app):
    app.connect("autodoc-skip-member", skip_field)
    app.connect("source-read", read_source)
    app.connect("config-inited", quiet_theme)
    app.connect("env-get-outdated", lambda *_: list(GENERATED))
    return {"parallel_read_safe": True}
