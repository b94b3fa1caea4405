"""The report's style sheet and its only script: a table that sorts. Nothing comes from a network."""

from __future__ import annotations

#: For light and for dark pages: each at least 3:1 against its background.
LIGHT = ("#0060A8", "#B84A00", "#007355", "#A23B78", "#7D6000", "#3378A8", "#333333")
DARK = ("#62B6F2", "#FF9A55", "#45CFA2", "#EBA0CB", "#F0C95A", "#A9D9F7", "#DDDDDD")


def _series(colours: tuple[str, ...]) -> str:
    return "".join(f"--s{i}:{colour};" for i, colour in enumerate(colours))


_DASHES = ("none", "7 4", "2 3", "9 3 2 3", "4 3", "1 3", "11 4")
_STYLES = "".join(
    f".s{i}{{stroke:var(--s{i})}}.mark.s{i}{{fill:var(--s{i})}}.line.s{i}{{stroke-dasharray:{dash}}}"
    for i, dash in enumerate(_DASHES)
)
_LIGHT_PAGE = (
    "--bg:#fff;--fg:#1b1f24;--soft:#57606a;--line:#d0d7de;--card:#f6f8fa;--good:#116329;--bad:#b3261e;--link:#0550ae;"
)
_DARK_PAGE = (
    "--bg:#12161b;--fg:#e6edf3;--soft:#9da7b3;"
    "--line:#3a424c;--card:#1a2027;--good:#6fdd8b;--bad:#ff8f85;--link:#79b8ff;"
)

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT_PAGE}{_series(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK_PAGE}{_series(DARK)}}}}}
@media print{{:root{{{_LIGHT_PAGE}{_series(LIGHT)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
main{{max-width:1180px;margin:0 auto;padding:28px 20px 60px}}
h1{{font-size:26px;line-height:1.2;margin:0 0 4px}}h2{{font-size:21px;margin:40px 0 8px}}
h3{{font-size:17px;margin:26px 0 4px}}
p{{margin:8px 0;max-width:78ch}}.lead{{font-size:18px}}.soft,caption{{color:var(--soft)}}
.when{{color:var(--soft);margin:0 0 14px}}
a{{color:var(--link)}}nav a{{margin-right:14px}}code{{font:.92em ui-monospace,Menlo,Consolas,monospace}}
.good{{color:var(--good)}}.bad{{color:var(--bad);font-weight:600}}
.scroll{{overflow-x:auto;margin:10px 0}}.scroll:focus-visible{{outline:2px solid var(--link)}}
table{{border-collapse:collapse;font-size:14px;min-width:60%}}caption{{text-align:left;padding:4px 0}}
th,td{{padding:5px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}}
thead th{{background:var(--card);white-space:nowrap}}
td.n,th.n{{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}}
tbody th{{font-weight:600}}tr.first td,tr.first th{{border-top:2px solid var(--line)}}
th button{{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer}}
th button::after{{content:" \\2195";color:var(--soft)}}th[aria-sort=ascending] button::after{{content:" \\2191"}}
th[aria-sort=descending] button::after{{content:" \\2193"}}
figure{{margin:12px 0}}figcaption{{color:var(--soft);font-size:14px}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}}
.plot{{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:6px}}
.plot text{{fill:var(--fg);font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
.plot .tick{{fill:var(--soft);font-size:12px}}
.plot .panel{{font-weight:600;font-size:14px}}.axis{{fill:none;stroke:var(--soft)}}
.grid{{stroke:var(--line);stroke-width:.7}}
.line{{fill:none;stroke-width:2}}.bar{{stroke-width:1.6;opacity:.7}}.mark{{stroke-width:1.6}}{_STYLES}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:8px 0}}dt{{color:var(--soft)}}
dd{{margin:0;overflow-wrap:anywhere}}
details{{margin:8px 0}}summary{{cursor:pointer}}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const words = head.textContent;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = words;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? String(x).localeCompare(y) : x - y;
        return up ? order : -order;
      }).forEach((row) => body.append(row));
    });
  });
}
"""
