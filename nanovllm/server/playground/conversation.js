// A conversation in its panel: exchanges of a prompt and an answer, shown as they grow.
//
// Everything that a model, a server or a file says goes into text nodes; nothing is markup.

const NEAR_END_PX = 48;

/** One exchange on the page. */
class ExchangeView {
  constructor(exchange) {
    const template = document.getElementById("exchange-template");
    this.exchange = exchange;
    this.node = template.content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.node.querySelector(selector);
  }

  /** Bring the page up to date with the exchange. */
  update() {
    const { prompt, answer, thought, error, running } = this.exchange;
    const { thinking, spoken } = splitThinking(thought, answer);
    this.node.classList.toggle("running", running);
    this.node.setAttribute("aria-busy", running);
    setText(this.find(".prompt"), prompt);
    setText(this.find(".thinking p"), thinking);
    this.find(".thinking").hidden = !thinking;
    setText(this.find(".answer"), spoken);
    setText(this.find(".failure p"), error ?? "");
    this.find(".failure").hidden = !error;
    setText(this.find(".figures"), describeFigures(this.exchange));
  }
}

/** Show text in a node, appending where it only grew, so that a selection in it survives. */
function setText(node, text) {
  if (!node.firstChild) node.append(document.createTextNode(""));
  const shown = node.firstChild;
  if (text.startsWith(shown.data)) shown.appendData(text.slice(shown.data.length));
  else shown.data = text;
}

/** Part what a reasoning model thinks from what it says, unless the server has done so. */
function splitThinking(thought, text) {
  if (thought) return { thinking: thought, spoken: text };
  const [all, thinking] = /^\s*<think>([^]*?)(?:<\/think>\s*|$)/.exec(text) ?? ["", ""];
  return { thinking: thinking.trim(), spoken: text.slice(all.length) };
}

function describeFigures({ figures, ending }) {
  if (!figures) return ending ?? "";
  const { ttft, tokens, seconds } = figures;
  const parts = [`TTFT ${ttft < 1000 ? `${ttft.toFixed(0)} ms` : `${(ttft / 1000).toFixed(2)} s`}`];
  if (tokens > 1 && seconds) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
  if (ending) parts.push(ending);
  return parts.join("  ·  ");
}

/** The exchanges of one mode, and the panel that shows them. */
export class Conversation {
  constructor(panel) {
    this.panel = panel;
    this.list = panel.querySelector(".exchanges");
    this.views = [];
    this.frame = null;
    this.followsEnd = true;
    panel.addEventListener("scroll", () => this.noteScroll());
  }

  get exchanges() {
    return this.views.map((view) => view.exchange);
  }

  get last() {
    return this.views.at(-1)?.exchange;
  }

  /** Append an exchange that has only its prompt so far, or one that was kept. */
  add({ prompt, answer = "", thought = "", figures = null, ending = null }) {
    const said = { prompt, answer, thought };
    const view = new ExchangeView({ ...said, figures, ending, error: null, running: false });
    this.views.push(view);
    this.list.append(view.node);
    this.panel.classList.add("begun");
    view.update();
    this.scrollToEnd();
    return view.exchange;
  }

  removeLast() {
    this.views.pop()?.node.remove();
    this.panel.classList.toggle("begun", this.views.length > 0);
  }

  clear() {
    while (this.views.length) this.removeLast();
  }

  exchangeOf(node) {
    return this.views.find((view) => view.node.contains(node))?.exchange;
  }

  /** Show what has changed, at most once a frame. */
  refresh() {
    this.frame ??= requestAnimationFrame(() => this.refreshNow());
  }

  refreshNow() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.views.at(-1)?.update();
    if (this.followsEnd) this.panel.scrollTop = this.panel.scrollHeight;
    this.noteScroll();
  }

  /** A reader who has scrolled up is left there; one at the end is kept at it. */
  noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.panel;
    this.followsEnd = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    this.panel.dispatchEvent(new CustomEvent("follow", { bubbles: true }));
  }

  scrollToEnd() {
    this.panel.scrollTop = this.panel.scrollHeight;
    this.noteScroll();
  }
}
