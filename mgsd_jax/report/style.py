"""The style sheet of the report: light, dark and print; no outside file, no web font.

Colours are of the Okabe-Ito palette, darkened or lightened until marks and text keep their contrast
on the page; nothing is said by colour alone.
"""

_LIGHT = """
--page:#ffffff;--ink:#1c2128;--muted:#57606a;--line:#d5dbe1;--panel:#f5f7f9;--link:#0b5cad;
--base:#6a737d;--grounded:#b85c00;--distilled:#0069b4;
--other0:#007a5a;--other1:#a3417f;--other2:#7a6a00;
--other3:#0069b4;--other4:#b83a00;--other5:#5a4fb0;
--good:#00704f;--bad:#b83a00;--bar:#0069b41c;
"""
_DARK = """
--page:#12161b;--ink:#e4e8ec;--muted:#9aa5b1;--line:#343c46;--panel:#1b2128;--link:#6db6f2;
--base:#a3adb8;--grounded:#f0a04b;--distilled:#56b4e9;
--other0:#35c29a;--other1:#e08cc0;--other2:#d6c64a;
--other3:#56b4e9;--other4:#ff8a5c;--other5:#b3a8ff;
--good:#3fcb9f;--bad:#ff8a5c;--bar:#56b4e930;
"""
_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 overflow-wrap:break-word;font-variant-numeric:tabular-nums}
main,header,footer{max-width:1100px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:1rem;font-weight:600;color:var(--muted);margin:0 0 4px}
h2{font-size:1.45rem;line-height:1.25;margin:56px 0 8px;letter-spacing:-.01em}
h3{font-size:1rem;margin:0 0 8px}
h3 small{font-weight:400;color:var(--muted);margin-left:.4em}
p{margin:0 0 12px;max-width:72ch}
a{color:var(--link)}
.order{font-size:clamp(1.7rem,5.5vw,2.7rem);line-height:1.12;font-weight:700;letter-spacing:-.02em;
 margin:0 0 14px;max-width:none}
.verdict{font-size:1.12rem}
.note,figcaption,.key{color:var(--muted);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:20px 0 0;padding:10px 0;font-size:.9rem;
 border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;
 margin:22px 0 12px}
.tile{background:var(--panel);border-radius:10px;padding:14px 16px;border-top:3px solid var(--c)}
.tile b{display:block;font-size:1.75rem;line-height:1.2;letter-spacing:-.02em}
.tile span{display:block;font-size:.875rem;color:var(--muted)}
.tile .who{color:var(--ink);font-weight:600}
svg{display:block;max-width:100%}
svg text{fill:var(--muted);font-size:11px}
.icon{display:inline-block;vertical-align:-2px;margin-right:5px;overflow:visible}
.grid line{stroke:var(--line);stroke-width:1;shape-rendering:crispEdges}
.mark{stroke:var(--c);stroke-width:2}
.mark.full{fill:var(--c)}.mark.hollow{fill:var(--page)}.mark.cross{fill:none;stroke-width:2.5}
.span{stroke:var(--c);stroke-width:3;opacity:.55}
.link{fill:none;stroke:var(--c);stroke-width:1.5}
.dots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:28px 40px;
 margin:20px 0}
.row{display:grid;grid-template-columns:11.6em 1fr 8.2em;gap:0 12px;align-items:center;
 padding:3px 0;font-size:.875rem}
.row .num{text-align:right;white-space:nowrap}
.row small,td small,th small{color:var(--muted)}
.row.axis{padding:0}
.track,.stack{width:100%;overflow:visible}
.bars{margin:14px 0 8px}
.bars .row{grid-template-columns:11.6em 1fr 4em}
.stack text{font-size:13px;font-weight:600}
.stack rect{stroke:var(--page);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:12px 0;padding:0;
 font-size:.875rem}
.legend li{display:flex;align-items:center;gap:6px}
.e-success{fill:#00704f}.e-not_optimal{fill:#7fcdb4}.e-not_successful{fill:#f2d16b}
.e-illegal_plan{fill:#e79a3c}.e-wrong_state{fill:#c4480f}.e-truncated{fill:#9aa4af}
.e-unparsed{fill:#5b6570}.e-request_failed{fill:#23292f}
.stack g text{fill:#1c2128}
.stack .e-success text,.stack .e-wrong_state text,.stack .e-unparsed text,
.stack .e-request_failed text{fill:#fff}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr));
 gap:20px 24px;margin:12px 0}
.panels.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
figure{margin:0;min-width:0}
.panel{max-width:420px}
.panel svg{width:100%;height:auto}
.panel figcaption{display:flex;justify-content:space-between;gap:12px;color:var(--ink);
 font-weight:600;overflow-wrap:anywhere}
.panel figcaption b{font-weight:400;color:var(--muted);white-space:nowrap}
.over{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.curve{--c:var(--distilled)}.grounding .curve{--c:var(--grounded)}
.curve polyline{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.curve polygon{fill:var(--c);opacity:.2}
.curve circle{fill:var(--c)}
.missing{border-left:3px solid var(--bad);background:var(--panel);padding:10px 14px;
 border-radius:0 8px 8px 0}
.table{margin:18px 0 8px;border:1px solid var(--line);border-radius:10px;overflow:hidden}
.table h3{margin:0;padding:10px 12px 4px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.875rem}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;vertical-align:top}
thead th{vertical-align:bottom;font-weight:500;color:var(--muted);white-space:normal;
 min-width:5.4em;line-height:1.25;border-bottom:1px solid var(--line)}
th.left,tbody th{text-align:left}
tbody th{font-weight:500}
tbody tr+tr>*{border-top:1px solid color-mix(in srgb,var(--line) 45%,transparent)}
tbody tr.group>*{border-top:1px solid var(--muted)}
td small,th small{display:block;font-size:.78rem}
td.bar{background:linear-gradient(90deg,var(--bar) var(--share),transparent 0)}
tbody th:first-child,thead th:first-child{position:sticky;left:0;background:var(--page)}
details{margin:10px 0}
summary{cursor:pointer;color:var(--link)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);border-radius:8px;
 padding:10px 12px;margin:8px 0;
 font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.cards{display:grid;gap:22px;margin:18px 0}
.card{border:1px solid var(--line);border-radius:12px;padding:16px 16px 2px;min-width:0}
.boards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(46%,150px),1fr));gap:0 16px}
.boards figure{display:grid;grid-row:span 3;grid-template-rows:subgrid;align-content:start}
.boards figure>div{padding-bottom:14px}
.boards svg{width:100%;height:auto;border-radius:6px;background:#000}
.boards figcaption{font-weight:600;color:var(--ink);padding-bottom:4px;align-self:end}
.boards p{margin:6px 0 0;font-size:.875rem;line-height:1.35}
.boards details{margin:6px 0 0;font-size:.875rem}
.outcome.good,.good b{color:var(--good)}.outcome.bad,.bad b{color:var(--bad)}
.plan{color:var(--muted);letter-spacing:.02em}
.state{color:var(--muted)}
.route{fill:none;stroke-width:var(--w);stroke-linecap:round;stroke-linejoin:round}
.route .casing{stroke:#10151b!important;stroke-width:calc(1.9 * var(--w))}
.route polyline,.route path{stroke:var(--r)}
.route .start{fill:none;stroke:var(--r);stroke-width:2.5}
.route .end circle{fill:var(--r);stroke:#10151b;stroke-width:1.5}
.route .hand circle{fill:#fff;stroke:var(--r);stroke-width:2}
.route .hand text{fill:#10151b;font-weight:700;stroke:none;text-anchor:middle}
.route.good{--r:#19d3a2}.route.bad{--r:#ff7a2f}.route.hint{--r:#c9d3dd}
.route.bad polyline:not(.casing){stroke-dasharray:calc(2.2 * var(--w)) calc(1.8 * var(--w))}
.route.bad polyline:not(.casing){stroke-linecap:butt}
footer{color:var(--muted);font-size:.875rem;padding-top:40px;padding-bottom:48px}
@media (max-width:640px){
 main,header,footer{padding-left:16px;padding-right:16px}
 header{padding-top:24px}
 h2{margin-top:44px}
 .row,.bars .row{grid-template-columns:1fr auto;gap:0 10px}
 .row .track,.row .stack{grid-column:1/-1;grid-row:2}
 .row{padding:5px 0}
 .row.axis .who,.row.axis .num{display:none}
 .tiles{grid-template-columns:1fr 1fr;gap:10px}
 .card{padding:12px 12px 0}
 h3 small{display:block;margin:2px 0 0}
 .boards{column-gap:12px}
 th,td{padding:6px 9px}tbody th{white-space:normal;max-width:44vw}
}
@page{margin:14mm}
@media print{
 .dots{grid-template-columns:1fr 1fr;gap:14px 24px}
 .row{grid-template-columns:7.5em 1fr 7em;gap:0 6px;font-size:8pt;padding:1px 0}
 .panels:not(.wide){grid-template-columns:repeat(3,1fr)}
 .boards{display:flex;gap:10px}.boards figure{flex:1 1 0;display:block}
 .boards p{font-size:8pt}
 .table{overflow:visible}
 body{font-size:10.5pt}
 nav,.boards details{display:none}
 main,header,footer{max-width:none;padding-left:0;padding-right:0}
 h2{margin-top:24pt}h2,h3,.legend{break-after:avoid}
 .scroll{overflow:visible}
 table{font-size:7.5pt}th,td{padding:3px 5px}
 .card,.panel,.dot-group,tr,.row,.tile{break-inside:avoid}
 .tile,td.bar,svg{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""

CSS = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}{_RULES}"
)
