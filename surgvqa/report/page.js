"use strict";
(() => {
  const root = document.documentElement;
  const $ = (id) => document.getElementById(id);

  // Dark or light: as the system says, until somebody says otherwise.
  $("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // On paper nothing can be opened.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((each) => { each.open = false; }));

  if (!$("packed")) { root.dataset.ready = "1"; return; }

  const bytes = (id) => {
    const text = $(id).textContent.trim();
    $(id).textContent = "";
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text), made = new Uint8Array(raw.length);
    for (let at = 0; at < raw.length; at++) made[at] = raw.charCodeAt(at);
    return made;
  };
  const inflated = (packed) =>
    new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  const element = (name, look, text) => {
    const made = document.createElement(name);
    if (look) made.className = look;
    if (text !== undefined) { made.textContent = text; made.dir = "auto"; }
    return made;
  };
  const drawn = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  };

  const SIZE = 24;
  const gallery = (data) => {
    const texts = data.texts, runs = data.runs, several = runs.length > 1, total = data.id.length;
    const lower = texts.map((text) => text.toLowerCase());
    let pictures = null;  // decoded when the first one is wanted
    let found = [], current = 0, page = 0, urls = [];
    const view = { v: "all", t: "", g: "", q: "" };

    const oks = (row) => runs.map((run) => run.ok[row]).filter((ok) => ok >= 0);
    const verdicts = {
      __proto__: null,  // an address may name what every object has
      all: ["all", () => true],
      wrong: [several ? "wrong in a run" : "wrong", (row) => oks(row).includes(0)],
      right: [several ? "right in all" : "right", (row) => !oks(row).includes(0)],
    };
    if (several) {
      verdicts.differ = ["right in one, wrong in another", (row) => oks(row).includes(0) && oks(row).includes(1)];
      verdicts.answers = ["answers differ", (row) => new Set(runs.map((run) => run.a[row]).filter((a) => a >= 0)).size > 1];
      runs.forEach((run, number) => {
        verdicts["wrong" + number] = ["wrong in " + data.names[number], (row) => run.ok[row] === 0];
      });
    }
    const option = (value, text) => { const made = element("option", "", text); made.value = value; return made; };
    const all = [...Array(total).keys()];
    for (const [name, [text, fits]] of Object.entries(verdicts)) {
      $("verdict").append(option(name, text + " (" + all.filter(fits).length.toLocaleString("en") + ")"));
    }
    const counts = new Array(data.types.length).fill(0);
    data.t.forEach((kind) => { counts[kind]++; });
    $("type").append(option("", "all (" + total.toLocaleString("en") + ")"));
    data.types.map((text, kind) => [text, kind]).sort().forEach(([text, kind]) => {
      $("type").append(option(text, text + " (" + counts[kind].toLocaleString("en") + ")"));
    });
    $("boxes-legend").hidden = Object.keys(data.boxes).length === 0;

    const holding = (words) => {
      const wanted = words.trim().toLowerCase();
      return wanted ? lower.map((text) => text.includes(wanted)) : null;
    };
    const filter = () => {
      const kind = view.t ? data.types.indexOf(view.t) : -1;
      const fits = (verdicts[view.v] || verdicts.all)[1];
      const query = holding(view.q), group = holding(view.g);
      found = all.filter((row) =>
        (kind < 0 || data.t[row] === kind) && fits(row) &&
        (!group || group[data.g[row]] || group[data.images[data.k[row]][0]]) &&
        (!query || query[data.q[row]] || query[data.id[row]] || data.r[row].some((text) => query[text]) ||
          runs.some((run) => run.a[row] >= 0 && query[run.a[row]])));
    };

    const views = (row) => {
      const [name, frames, shown, why] = data.images[data.k[row]];
      if (!shown.length) {
        const none = texts[why] ? "The image cannot be read: " + texts[why] : "No picture in this file.";
        return element("div", "views none", none);
      }
      const made = element("div", "views");
      pictures = pictures || bytes("pictures");
      for (const [frame, picture] of shown) {
        const [start, length, width, height] = data.pictures[picture];
        const place = element("div", "view"), image = element("img");
        const url = URL.createObjectURL(new Blob([pictures.subarray(start, start + length)], { type: "image/webp" }));
        urls.push(url);
        image.width = width; image.height = height; image.src = url;
        image.alt = texts[name].split(/\n|\\n/)[frame] || texts[name];
        place.append(image);
        const boxes = (data.boxes[row] || []).filter((box) => box[1] === frame);
        if (boxes.length) {
          const svg = drawn("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none" });
          for (const [what, , x1, y1, x2, y2, label] of boxes) {
            const look = what === 0 ? "asked" : what === 1 ? "expected" : "found c" + ((what - 2) % 6);
            const rect = drawn("rect", { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1), class: look });
            const title = drawn("title", {});
            title.textContent = (what === 0 ? "asked about" : what === 1 ? "expected" : "found") + (texts[label] ? ": " + texts[label] : "");
            rect.append(title); svg.append(rect);
          }
          place.append(svg);
        }
        if (frames > 1) place.append(element("small", "", "frame " + (frame + 1) + " of " + frames));
        made.append(place);
      }
      return made;
    };
    const odds = (run, number) => {
      const made = element("div", "odds c" + (number % 6));
      for (const [label, permille] of run) {
        const svg = drawn("svg", { viewBox: "0 0 1000 6", preserveAspectRatio: "none", "aria-hidden": "true" });
        svg.append(drawn("rect", { width: permille, height: 6 }));
        const middle = element("span"); middle.append(svg);
        made.append(element("span", "", texts[label]), middle, element("span", "", (permille / 10).toFixed(1)));
      }
      return made;
    };
    const card = (row, place) => {
      const made = element("article", "card");
      made.dataset.row = row;
      made.append(views(row));
      const words = element("div", "words");
      words.append(element("div", "question clamp", texts[data.q[row]]));
      const pair = element("div", "pair");
      const told = (what, text, look) => pair.append(element("span", "", what), element("span", "clamp " + look, text));
      told("expected", data.r[row].map((text) => texts[text]).join("  |  "), "");
      runs.forEach((run, number) => {
        if (run.a[row] < 0) return;
        const ok = run.ok[row] === 1;
        const said = (ok ? "✓ " : "✗ ") + (texts[run.a[row]] || "(nothing)") + (run.cut.includes(row) ? " ‡ cut" : "");
        told(several ? data.names[number] : "answer", said, ok ? "ok" : "no");
      });
      words.append(pair);
      runs.forEach((run, number) => { if (run.p[row]) words.append(odds(run.p[row], number)); });
      const tags = [data.types[data.t[row]], texts[data.g[row]], texts[data.images[data.k[row]][0]], texts[data.id[row]]];
      words.append(element("div", "tags", [...new Set(tags.filter(Boolean))].join(" · ")));
      made.append(words);
      made.addEventListener("click", () => { current = place; mark(); });
      made.firstChild.addEventListener("click", () => made.classList.toggle("large"));
      return made;
    };

    const pages = () => Math.max(1, Math.ceil(found.length / SIZE));
    const mark = (scroll) => {
      [...$("cards").children].forEach((each, place) => each.classList.toggle("current", place === current));
      if (scroll && $("cards").children[current]) $("cards").children[current].scrollIntoView({ block: "nearest" });
    };
    const render = () => {
      urls.forEach((url) => URL.revokeObjectURL(url));
      urls = [];
      page = Math.min(Math.max(0, page), pages() - 1);
      const rows = found.slice(page * SIZE, (page + 1) * SIZE);
      $("cards").replaceChildren(...rows.map(card));
      $("count").textContent = found.length.toLocaleString("en") + (found.length === 1 ? " question" : " questions");
      $("page").value = page + 1;
      $("pages").textContent = pages().toLocaleString("en");
      for (const id of ["previous", "previous2"]) $(id).disabled = page === 0;
      for (const id of ["next", "next2"]) $(id).disabled = page >= pages() - 1;
      mark();
    };
    const remember = () => {
      const words = new URLSearchParams();
      if (view.v !== "all") words.set("v", view.v);
      for (const key of ["t", "g", "q"]) if (view[key]) words.set(key, view[key]);
      if (page) words.set("p", page + 1);
      const hash = words.size || [...words].length ? "#" + words : "#gallery";
      try { history.replaceState(null, "", hash); } catch { /* some places have no history */ }
    };
    const recall = () => {
      const hash = location.hash.slice(1), words = new URLSearchParams(hash.includes("=") ? hash : "");
      view.v = verdicts[words.get("v")] ? words.get("v") : "all";
      view.t = data.types.includes(words.get("t")) ? words.get("t") : "";
      view.g = words.get("g") || "";
      view.q = words.get("q") || "";
      page = (parseInt(words.get("p"), 10) || 1) - 1;
      $("verdict").value = view.v; $("type").value = view.t; $("group").value = view.g; $("query").value = view.q;
      current = 0;
      filter(); render();
      return hash.includes("=");
    };
    const changed = () => {
      view.v = $("verdict").value; view.t = $("type").value; view.g = $("group").value; view.q = $("query").value;
      page = 0; current = 0;
      filter(); render(); remember();
    };
    const turn = (to, place = 0, scroll = true) => {
      if (to < 0 || to >= pages()) return false;
      page = to;
      render();
      current = place < 0 ? $("cards").children.length - 1 : place;
      mark(); remember();
      if (scroll) $("gallery").scrollIntoView();
      return true;
    };
    const step = (by) => {
      const to = current + by, last = $("cards").children.length - 1;
      if (to < 0) turn(page - 1, -1, false);
      else if (to > last) turn(page + 1, 0, false);
      else current = to;
      mark(true);
    };

    let waiting = 0;
    const soon = () => { clearTimeout(waiting); waiting = setTimeout(changed, 120); };
    $("verdict").addEventListener("change", changed);
    $("type").addEventListener("change", changed);
    $("group").addEventListener("input", soon);
    $("query").addEventListener("input", soon);
    $("filters").addEventListener("submit", (event) => { event.preventDefault(); changed(); });
    $("page").addEventListener("change", () => { turn((parseInt($("page").value, 10) || 1) - 1, 0, false) || render(); });
    for (const id of ["previous", "previous2"]) $(id).addEventListener("click", () => turn(page - 1, 0, id !== "previous"));
    for (const id of ["next", "next2"]) $(id).addEventListener("click", () => turn(page + 1, 0, id !== "next"));
    $("keys").addEventListener("click", () => $("help").showModal());
    addEventListener("hashchange", () => { if (location.hash.includes("=")) recall(); });

    const keys = {
      j: () => turn(page + 1), ArrowRight: () => turn(page + 1),
      k: () => turn(page - 1), ArrowLeft: () => turn(page - 1),
      n: () => step(1), p: () => step(-1),
      "/": () => { $("query").focus(); $("query").select(); },
      "?": () => $("help").showModal(),
    };
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
      const target = event.target, typing = /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName);
      if (typing) { if (event.key === "Escape") target.blur(); return; }
      if (event.key === "Enter" && target === document.body) {
        const chosen = $("cards").children[current];
        if (chosen) { chosen.classList.toggle("large"); chosen.scrollIntoView({ block: "nearest" }); }
      } else if (Object.hasOwn(keys, event.key)) { event.preventDefault(); keys[event.key](); }
    });

    if (recall()) $("gallery").scrollIntoView();
    root.dataset.ready = "1";
  };
  inflated(bytes("packed")).then(gallery).catch((error) => {
    $("cards").textContent = "The questions cannot be shown: " + error;
    throw error;
  });
})();
