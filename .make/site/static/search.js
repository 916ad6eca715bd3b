// The search of the book. Ranking is plain functions on data (tests run them without a browser);
// what touches the page stands below them. The index is fetched when someone searches.
"use strict";

const bookSearch = (() => {
  // ------------------------------------------------------------------------------- words

  const TOKEN = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}ー]+|\d+(?:[:.]\d+)+|[\p{L}\p{N}³]+(?:[-_'’][\p{L}\p{N}]+)*/gu;
  const JAPANESE = /^[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}ー]/u;
  const fold = (text) => text.normalize("NFKC").toLowerCase();

  // One spelling for British and American words.
  const spelling = (word) => {
    if (!/^[a-z]{5,}$/.test(word)) return word;
    const s = word.replace(/is(?=(?:e|ed|es|er|ers|ing|ation|ations)$)/, "iz");
    return s.replace(/our(?=$|s$|ed$|ing$|ful$|al$|ably$)/, "or").replace(/tre(?=s?$)/, "ter");
  };

  // One stem for the forms of a word. Two words of one stem need not be related; the exact form
  // always counts more.
  const stem = (word) => {
    if (!/^[a-z]{4,}$/.test(word)) return word;
    let s = spelling(word);
    if (/[^aeiou]ies$/.test(s)) s = s.replace(/ies$/, "y");
    else if (/(?:ss|x|z|ch|sh)es$/.test(s)) s = s.slice(0, -2);
    else if (/[^siu]s$/.test(s)) s = s.slice(0, -1);
    for (const ending of ["ization", "ation", "izing", "ized", "izer", "ize", "ing", "ed", "er", "e"]) {
      const rest = s.slice(0, -ending.length);
      if (s.endsWith(ending) && rest.length >= 3 && /[aeiouy]/.test(rest)) {
        s = rest + (ending.startsWith("iz") ? "iz" : "");
        break;
      }
    }
    return s.length > 4 ? s.replace(/([bdfglmnprt])\1$/, "$1") : s;
  };

  // Each word of a text: its form, its stem, and where it stands in the text as it was given.
  const words = (text) => {
    const found = [];
    for (const match of text.matchAll(TOKEN)) {
      const form = fold(match[0]);
      const at = match.index;
      const end = at + match[0].length;
      if (JAPANESE.test(form)) {
        if (form.length === 1) found.push({ form, stem: form, at, end });
        for (let i = 0; i + 1 < form.length; i++) {
          found.push({ form: form.slice(i, i + 2), stem: form.slice(i, i + 2), at: at + i, end: at + i + 2 });
        }
        continue;
      }
      const parts = [...match[0].matchAll(/[^-_'’]+/g)];
      if (parts.length > 1) {
        const joined = parts.map((part) => spelling(fold(part[0]))).join("");
        found.push({ form: joined, stem: stem(joined), at, end, whole: true });
      }
      for (const part of parts) {
        const piece = spelling(fold(part[0]));
        const from = at + part.index;
        found.push({ form: piece, stem: stem(piece), at: from, end: from + part[0].length });
      }
    }
    return found;
  };

  // A query asks for the parts of a word with hyphens; the index holds the whole as well.
  const asked = (query) => {
    const unique = new Map();
    for (const word of words(query)) if (!word.whole) unique.set(word.form, word);
    return [...unique.values()];
  };

  // ------------------------------------------------------------------------------- index

  const FIELDS = { names: 8, heading: 6, title: 5, text: 1 };

  // From the stored index {pages: [[kind, path, title, [[anchor, heading, text, names], …]], …]}.
  const load = (stored) => {
    const sections = [];
    const stems = new Map();
    stored.pages.forEach(([kind, path, title, parts], page) => {
      parts.forEach(([anchor, heading, text, names], order) => {
        const number = sections.length;
        sections.push({ kind, path, title, page, anchor, heading, text, names: names || [], order });
        const fields = { names: (names || []).join(" | "), heading, title: order ? "" : title, text };
        for (const [field, weight] of Object.entries(FIELDS)) {
          for (const { form, stem: root } of words(fields[field] || "")) {
            let places = stems.get(root);
            if (!places) stems.set(root, (places = new Map()));
            let counts = places.get(number);
            if (!counts) places.set(number, (counts = new Map()));
            const key = `${weight} ${form}`;
            counts.set(key, (counts.get(key) || 0) + 1);
          }
        }
      });
    });
    return { sections, stems, pages: stored.pages.length };
  };

  const places = (index, word) => {
    const found = new Map();
    const add = (counted, part) => {
      for (const [number, counts] of counted) {
        let score = 0;
        for (const [key, count] of counts) {
          const [weight, form] = key.split(" ");
          const same = form === word.form ? 1 : part;
          score += same * Number(weight) * (weight === "1" ? 1 + Math.min(Math.log(count), 2) : 1);
        }
        found.set(number, Math.max(score, found.get(number) || 0));
      }
    };
    if (index.stems.has(word.stem)) add(index.stems.get(word.stem), 0.7);
    // A word that is still being typed.
    if (!found.size && word.form.length >= 2) {
      for (const [root, counted] of index.stems) if (root.startsWith(word.form)) add(counted, 0.4);
    }
    return found;
  };

  // Pages that answer a query: chapters, then the glossary, then other pages, then the reference;
  // each with its sections, the best first.
  const rank = (index, query, limit = 20, each = 4) => {
    const terms = asked(query);
    if (!terms.length) return [];
    const phrase = fold(query).trim();
    // The same words in any of their forms and spellings.
    const roots = (text) => words(text).filter((word) => !word.whole).map((word) => word.stem).join(" ");
    const wanted = roots(query);
    const scores = new Map();
    const covered = new Map();
    terms.forEach((term, i) => {
      const found = places(index, term);
      const rare = Math.log(1 + index.sections.length / (1 + found.size));
      for (const [number, score] of found) {
        const row = scores.get(number) || { score: 0, terms: new Set() };
        row.score += score * rare;
        row.terms.add(i);
        scores.set(number, row);
        const { page } = index.sections[number];
        if (!covered.has(page)) covered.set(page, new Set());
        covered.get(page).add(i);
      }
    });
    const most = Math.max(0, ...[...covered.values()].map((one) => one.size));
    const pages = new Map();
    for (const [number, row] of scores) {
      const section = index.sections[number];
      if (covered.get(section.page).size < most) continue;
      let { score } = row;
      if (row.terms.size === terms.length) score *= 2;
      if (section.names.some((name) => roots(name) === wanted)) score += 400;
      else if (roots(section.heading) === wanted) score += 200;
      if (!section.order && roots(section.title) === wanted) score += 300;
      if (terms.length > 1 && fold(section.text).includes(phrase)) score *= 1.5;
      if (!pages.has(section.page)) pages.set(section.page, []);
      pages.get(section.page).push({ ...section, score });
    }
    return [...pages.values()]
      .map((sections) => {
        sections.sort((a, b) => b.score - a.score || a.order - b.order);
        const { kind, path, title } = sections[0];
        const score = sections[0].score + 0.15 * sections.slice(1, 6).reduce((sum, one) => sum + one.score, 0);
        return { kind, path, title, score, sections: sections.slice(0, each) };
      })
      .sort((a, b) => a.kind - b.kind || b.score - a.score || (a.path < b.path ? -1 : 1))
      .slice(0, limit);
  };

  // Where the words of a query stand in a text: pairs of places.
  const marks = (text, query) => {
    const stems = new Set(asked(query).map((word) => word.stem));
    const found = [];
    for (const { stem: root, at, end } of words(text)) {
      if (!stems.has(root)) continue;
      const last = found[found.length - 1];
      if (last && at <= last[1]) last[1] = Math.max(last[1], end);
      else found.push([at, end]);
    }
    return found;
  };

  // A piece of a section's text around the first of the words.
  const snippet = (text, query, length = 170) => {
    const first = marks(text, query)[0];
    const middle = first ? first[0] : 0;
    let start = Math.max(0, middle - Math.floor(length / 3));
    if (start) start = text.indexOf(" ", start) + 1 || start;
    const piece = text.slice(start, start + length);
    return `${start ? "… " : ""}${piece}${start + length < text.length ? " …" : ""}`;
  };

  return { stem, words, load, rank, marks, snippet };
})();

// ----------------------------------------------------------------------------------- the page

if (typeof document !== "undefined") {
  const KINDS = ["Chapter", "Glossary", "Page", "Reference"];
  const top = document.documentElement.dataset.content_root || "";
  let index;

  // A script, not a request: a site that is opened from a folder may load it too.
  const fetched = () => {
    if (!index) {
      index = new Promise((done, failed) => {
        const script = document.createElement("script");
        script.src = `${top}search-index.js`;
        script.onload = () => done(bookSearch.load(window.effnbIndex));
        script.onerror = () => failed(new Error("the index of the search could not be loaded"));
        document.head.append(script);
      });
    }
    return index;
  };

  const marked = (text, query) => {
    const out = document.createElement("span");
    let last = 0;
    for (const [at, end] of bookSearch.marks(text, query)) {
      const mark = document.createElement("mark");
      mark.textContent = text.slice(at, end);
      out.append(text.slice(last, at), mark);
      last = end;
    }
    out.append(text.slice(last));
    return out;
  };

  const address = (section, query) =>
    `${top}${section.path}.html?highlight=${encodeURIComponent(query)}${section.anchor ? `#${section.anchor}` : ""}`;

  const row = (section, query, page) => {
    const item = document.createElement("li");
    const link = document.createElement("a");
    link.href = address(section, query);
    link.append(marked(section.heading || page.title, query));
    const words = document.createElement("p");
    words.append(marked(bookSearch.snippet(section.text, query), query));
    item.append(link, words);
    return item;
  };

  const show = (hits, query, place, said) => {
    place.replaceChildren();
    said.textContent = !query.trim()
      ? ""
      : hits.length
        ? `${hits.length} ${hits.length === 1 ? "page" : "pages"}`
        : `Nothing in the book answers “${query}”. Try one word of it.`;
    for (const page of hits) {
      const box = document.createElement("section");
      const head = document.createElement("p");
      head.className = "found-page";
      const kind = document.createElement("span");
      kind.className = "found-kind";
      kind.textContent = KINDS[page.kind];
      head.append(kind, ` ${page.title}`);
      const list = document.createElement("ul");
      for (const section of page.sections) list.append(row(section, query, page));
      box.append(head, list);
      place.append(box);
    }
  };

  const connect = (input, place, said, limit, each) => {
    let latest = 0;
    const look = async () => {
      const query = input.value;
      const mine = ++latest;
      try {
        const loaded = await fetched();
        if (mine === latest) show(bookSearch.rank(loaded, query, limit, each), query, place, said);
      } catch (problem) {
        said.textContent = `Search does not work here: ${problem.message}.`;
      }
    };
    let waiting;
    input.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(look, 120);
    });
    return look;
  };

  const results = (where) => {
    const said = document.createElement("p");
    said.className = "found-said";
    said.setAttribute("role", "status");
    const place = document.createElement("div");
    place.className = "found";
    where.append(said, place);
    return [place, said];
  };

  const dialog = document.getElementById("pst-search-dialog");
  if (dialog) {
    const [place, said] = results(dialog);
    connect(dialog.querySelector("input"), place, said, 6, 2);
    dialog.addEventListener("keydown", (event) => {
      if (!["ArrowDown", "ArrowUp"].includes(event.key)) return;
      const stops = [dialog.querySelector("input"), ...place.querySelectorAll("a")];
      const next = stops.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1);
      if (stops[next]) {
        event.preventDefault();
        stops[next].focus();
      }
    });
  }

  const page = document.getElementById("search-results");
  if (page) {
    const input = document.querySelector("article input[name=q]");
    const look = connect(input, ...results(page), 30, 4);
    input.value = new URLSearchParams(location.search).get("q") || "";
    input.focus();
    if (input.value) look();
  }

  // A hit leads to its section, and its words are marked there until Escape is pressed.
  const query = new URLSearchParams(location.search).get("highlight");
  const article = document.querySelector("article");
  if (query && article) {
    const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT, {
      acceptNode: (node) =>
        node.parentElement.closest(".katex, script, style, [hidden], .panel-frames")
          ? NodeFilter.FILTER_REJECT
          : NodeFilter.FILTER_ACCEPT,
    });
    const nodes = [];
    while (walker.nextNode()) nodes.push(walker.currentNode);
    for (const node of nodes) {
      const text = node.textContent;
      const found = bookSearch.marks(text, query);
      if (found.length) node.replaceWith(...marked(text, query).childNodes);
    }
    if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
    addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      for (const mark of document.querySelectorAll("article mark")) mark.replaceWith(mark.textContent);
    });
  }
}
