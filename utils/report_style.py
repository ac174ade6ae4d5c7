"""Style and script of the report page: one column on narrow windows, light and dark, all controls by keyboard."""

CSS = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --good: #18794e; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff8a7a; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.note, figcaption, .meta { color: GrayText; font-size: .9rem; }
.scroll { overflow-x: auto; } .scroll:focus-visible, button:focus-visible { outline: 2px solid #2a78d6; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, tbody th { white-space: nowrap; } th { vertical-align: bottom; }
th, td { padding: .25rem .55rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom-width: 2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: .6rem; }
svg { width: 100%; height: auto; } svg text { font-size: 10px; fill: CanvasText; } svg text.t { font-size: 12px; }
svg line.g { stroke: var(--line); stroke-width: .5; } .key { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: 1.2em; height: .25em; vertical-align: middle; margin-right: .35em; }
.filters { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0; }
button { font: inherit; padding: .2rem .8rem; border: 1px solid var(--line); border-radius: 1rem; cursor: pointer;
  background: transparent; color: inherit; }
button[aria-pressed=true] { background: #2a78d6; color: #fff; }
article { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1rem; padding: 1rem;
  margin: .8rem 0; background: var(--soft); border-radius: .5rem; }
article[hidden] { display: none; } article img { width: 100%; height: auto; display: block; image-rendering: auto; }
article h3 { margin: 0 0 .3rem; font-size: 1rem; } ol { padding-left: 1.3rem; margin: .4rem 0; }
audio { width: 100%; margin-top: .4rem; } .good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 0; }
@media (max-width: 720px) { article { grid-template-columns: minmax(0, 1fr); } }
"""

SCRIPT = """
const buttons = [...document.querySelectorAll('.filters button')];
const clips = [...document.querySelectorAll('article')];
for (const button of buttons) button.addEventListener('click', () => {
  for (const other of buttons) other.setAttribute('aria-pressed', String(other === button));
  const tag = button.dataset.tag;
  for (const clip of clips) clip.hidden = tag !== '' && !clip.dataset.tags.split(' ').includes(tag);
});
"""
