"""The fixed parts of the HTML report: its style and the few lines of script. No outside resource is used."""

STYLE = """
:root { --ok:#1b7f4d; --okbg:#d8f1e3; --miss:#8a5a00; --missbg:#fdeec7; --claim:#3a4f9f; --claimbg:#dfe5fb;
  --bad:#a12020; --badbg:#fbdcdc; --line:#d5d9de; --text:#1c2126; --dim:#5b6670; --bg:#fff; --panel:#f6f7f9; }
@media (prefers-color-scheme: dark) { :root { --ok:#7fdcae; --okbg:#12402a; --miss:#f0c968; --missbg:#453410;
  --claim:#aebcff; --claimbg:#26305c; --bad:#ff9d9d; --badbg:#521d1d; --line:#3a424a; --text:#e8ebee; --dim:#9aa5af;
  --bg:#14181c; --panel:#1d2328; } }
* { box-sizing:border-box } body { font:15px/1.5 system-ui,sans-serif; margin:0 auto; max-width:1280px; padding:24px;
  color:var(--text); background:var(--bg) } h1 { font-size:24px; margin:0 } h2 { font-size:18px; margin:32px 0 8px }
p,td,th { font-size:14px } .dim { color:var(--dim) } table { border-collapse:collapse; width:100% }
th { text-align:left; font-weight:600 } th+th { text-align:right }
td,th { padding:4px 12px 4px 0; border-bottom:1px solid var(--line);
  vertical-align:top } td.n { text-align:right; font-variant-numeric:tabular-nums }
.layer { display:flex; gap:8px; align-items:flex-start; padding:4px 0; border-bottom:1px solid var(--line) }
.layer>b { flex:0 0 200px; font:13px/26px ui-monospace,monospace; overflow:hidden; text-overflow:ellipsis }
.sites { display:flex; flex-wrap:wrap; gap:4px }
.site { border:1px solid transparent; border-radius:4px; padding:2px 8px; font:12px/20px ui-monospace,monospace;
  cursor:pointer; color:inherit } .site:focus { outline:2px solid var(--claim) }
.rewritten { background:var(--okbg); color:var(--ok) } .missed { background:var(--missbg); color:var(--miss) }
.claimed { background:var(--claimbg); color:var(--claim) } .rolled { background:var(--badbg); color:var(--bad) }
.legend span { margin-right:8px; cursor:default }
#why { position:sticky; bottom:0; background:var(--panel); border:1px solid var(--line); border-radius:6px;
  padding:10px 14px; margin-top:10px; min-height:48px; white-space:pre-wrap; font-size:14px }
.ir { display:grid; grid-template-columns:1fr 1fr; gap:0 8px; font:11px/16px ui-monospace,monospace; overflow:auto;
  max-height:640px; border:1px solid var(--line); border-radius:6px }
.ir div { white-space:pre; overflow:hidden; text-overflow:ellipsis; padding:0 6px; min-width:0 }
.ir .gone { background:var(--badbg) } .ir .new { background:var(--okbg) } .ir .same { color:var(--dim) }
.ir .head { position:sticky; top:0; background:var(--panel); font-weight:700; padding:4px 6px }
.plots { display:flex; flex-wrap:wrap; gap:24px } .plots figure { margin:0; flex:1 1 340px }
.scroll { overflow-x:auto } .scroll td.n,.scroll th { white-space:nowrap } .scroll th+th { padding-left:12px }
pre { overflow-x:auto; max-width:100% } p,li { overflow-wrap:anywhere }
@media (max-width:700px) { body { padding:16px 12px } .layer { flex-direction:column; gap:2px } .layer>b { flex:none }
  .site { padding:6px 10px } .ir { grid-template-columns:minmax(340px,1fr) minmax(340px,1fr) }
  .plots figure { flex:1 1 100% } #why { max-height:40vh; overflow:auto } }
svg { max-width:100% }
svg text { font:12px system-ui,sans-serif; fill:var(--text) } svg .a { fill:var(--claim) } svg .b { fill:var(--ok) }
svg .c { fill:var(--bad) } figcaption { color:var(--dim); font-size:13px }
"""

SCRIPT = """
const why = document.getElementById('why');
function show(e) {
  const site = e.target.closest('.site[data-why]');
  if (site) why.textContent = site.dataset.fqn + '\\n' + site.dataset.why;
}
document.addEventListener('mouseover', show);
document.addEventListener('focusin', show);
document.addEventListener('click', show);
const changed = document.getElementById('changed');
function choose() {
  for (const line of document.querySelectorAll('.ir .same')) line.style.display = changed.checked ? 'none' : '';
}
if (changed) { changed.addEventListener('change', choose); choose(); }
document.body.dataset.ready = 'yes';
"""
