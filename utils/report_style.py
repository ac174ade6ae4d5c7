"""The style of a report: one column on narrow windows, light and dark, visible focus, wide tables scroll alone."""

CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #18794e; --bad: #b42318; --accent: #2a78d6;
  --page: #fff; --ink: #1a1d21; --dim: #60666e; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff8a7a; --accent: #6ea8ff; --page: #16181b;
  --ink: #e8eaed; --dim: #a0a6ae; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.2rem; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 0 1.2rem 4rem;
  overflow-wrap: anywhere; background: var(--page); color: var(--ink); }
h1 { font-size: 1.6rem; margin: 1.4rem 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; } h4 { font-size: .95rem; margin: 1rem 0 .3rem; }
p.note, figcaption, .meta { color: var(--dim); font-size: .87rem; } p.note { margin: .4rem 0; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0 .2rem; }
.tiles div { flex: 1 1 9rem; border: 1px solid var(--line); border-radius: .6rem; padding: .5rem .9rem; }
.tiles dt { color: var(--dim); font-size: .83rem; } .tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
p.banner { border-left: 4px solid #d08a00; background: #d08a0018; padding: .5rem .8rem; margin: .8rem 0; }
nav.top { position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line);
  display: flex; gap: 1.1rem; overflow-x: auto; padding: .55rem 0; white-space: nowrap; }
a { color: var(--accent); } nav.top a { text-decoration: none; }
.scroll { overflow-x: auto; } :focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; font-size: .9rem; }
td, tbody th { white-space: nowrap; } th { font-weight: 600; } thead th { vertical-align: bottom; }
tbody th, tbody td { vertical-align: top; } tbody th { font-weight: 500; }
th, td { padding: .25rem .55rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom-width: 2px; }
tbody th { position: sticky; left: 0; background: var(--page); }
tr.first th, tr.first td { border-top: 1px solid var(--dim); } summary h3 { display: inline; }
tr.paper th, tr.paper td { color: var(--dim); font-style: italic; } tr.paper th { padding-left: 1.4rem; }
tr.ours th, tr.ours td { background: color-mix(in srgb, var(--accent) 12%, var(--page)); }
td.words, thead th.words { text-align: left; white-space: normal; max-width: 24rem; }
td.words:has(img) { max-width: 46rem; min-width: 16rem; } td.words img { max-width: 100%; margin-top: .3rem; }
tr.groups th, tr.groups td { border-bottom: 0; text-align: center; padding-bottom: 0; color: var(--dim); }
svg.bar { width: min(220px, 18vw); min-width: 90px; height: 12px; vertical-align: middle; }
svg.bar .t { fill: var(--soft); }
svg.bar .m { fill: var(--accent); opacity: .55; } svg.bar .w { stroke: var(--ink); stroke-width: 2; fill: none;
  vector-effect: non-scaling-stroke; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; margin: .6rem 0; }
summary { cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: .6rem; }
figure { margin: 0; min-width: 0; }
.charts svg { width: 100%; height: auto; } .charts svg text { font-size: 10px; fill: var(--dim); }
.charts svg text.t { font-size: 12px; fill: var(--ink); } svg line.g { stroke: var(--line); stroke-width: .5; }
.key { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: 1.2em; height: .25em; vertical-align: middle; margin-right: .35em; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem .7rem; align-items: end; padding: .7rem; margin: .6rem 0;
  background: var(--soft); border-radius: .5rem; }
.filters label { display: flex; flex-direction: column; font-size: .8rem; color: var(--dim); }
.filters .wide { flex: 1 1 14rem; } .filters .tick { flex-direction: row; gap: .35rem; padding-bottom: .35rem; }
input, select, button { font: inherit; font-size: .9rem; color: var(--ink); }
select, input[type=search] { padding: .25rem .4rem; border: 1px solid var(--line); border-radius: .35rem;
  background: var(--page); max-width: 100%; }
button { padding: .25rem .9rem; border: 1px solid var(--line); border-radius: .35rem; cursor: pointer;
  background: var(--page); } button:hover { border-color: var(--accent); }
.keys { font-size: .9rem; } .keys dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .9rem; }
dd { margin: 0; } kbd { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .35rem; }
article { display: grid; grid-template-columns: minmax(0, 1fr); padding: 1rem;
  margin: .8rem 0; background: var(--soft); border-radius: .6rem; row-gap: .6rem; scroll-margin-top: 3.2rem; }
article h3 { margin: 0; } article .meta { margin: 0; }
.said h4 { margin: 0 0 .2rem; }
.text { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.below { display: grid; grid-template-columns: minmax(0, 1fr) 16rem; gap: 1.2rem; align-items: start; }
.controls { display: flex; flex-direction: column; gap: .45rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .45rem .9rem; }
.pictures img { display: block; width: 100%; max-width: 52rem; }
.strip { position: relative; overflow: hidden; border-radius: .3rem; cursor: zoom-in; background: #000; }
.strip img { position: absolute; inset: 0; width: 100%; height: 100%; max-width: none; }
.truth figcaption::before, .predicted figcaption::before { content: ''; display: inline-block; width: .7em;
  height: .7em; border-radius: 50%; margin-right: .4em; background: #20c860; }
.predicted figcaption::before { background: #ff6020; }
body.plain .mask { visibility: hidden; }
audio { width: 100%; height: 36px; } .enlarge { align-self: start; }
.chips { display: flex; flex-wrap: wrap; gap: .35rem; margin: .2rem 0 .5rem; }
.chip { padding: .05rem .55rem; border-radius: 1rem; background: var(--soft); font-size: .87rem; min-width: 0;
  white-space: pre-wrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.chip.good { background: color-mix(in srgb, var(--good) 15%, transparent); }
.chip.bad { background: color-mix(in srgb, var(--bad) 15%, transparent); }
ol.steps { list-style: none; padding: 0; margin: .3rem 0; } .steps li { margin: 0 0 .35rem; padding-left: 5.6rem;
  position: relative; } .steps b { position: absolute; left: 0; font-size: .78rem; font-weight: 600;
  letter-spacing: .02em; color: var(--dim); line-height: 1.9; }
#more { text-align: center; }
dialog { width: min(1100px, 96vw); max-height: 94vh; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--page); color: var(--ink); padding: 1rem; } dialog::backdrop { background: #000a; }
dialog .head { display: flex; justify-content: space-between; gap: 1rem; align-items: start; }
dialog h3 { margin: 0; } .views { display: flex; flex-wrap: wrap; gap: .8rem; margin: .6rem 0; }
.views figure { flex: 1 1 18rem; max-width: 31rem; } .view { position: relative; overflow: hidden; background: #000; }
.inner { position: relative; } .inner img { display: block; width: 100%; } .inner .mask { position: absolute; inset: 0;
  height: 100%; } .slide { display: flex; gap: .8rem;
  align-items: center; margin: .5rem 0; } .slide input { flex: 1; }
@media (max-width: 820px) { article { padding: .7rem; } .below { grid-template-columns: minmax(0, 1fr); }
  body { padding: 0 .7rem 3rem; } .filters label { flex: 1 1 7rem; } tbody th { position: static; white-space: normal;
  min-width: 7rem; max-width: 12rem; }
  tr.paper th { min-width: 11rem; } td.words { min-width: 9rem; } thead th { white-space: nowrap; } }
@media print { nav.top, .filters, #more, audio, .enlarge { display: none; } }
"""
