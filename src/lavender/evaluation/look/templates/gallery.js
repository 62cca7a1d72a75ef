"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const gallery = byId("gallery"), records = [...gallery.children];

function matches(word, wanted) {
  return word.dataset.word.split(" ").some((form) => form.startsWith(wanted));
}

function update() {
  const wanted = byId("find").value.trim().toLowerCase(), order = byId("order").value;
  let texts = 0, words = 0;
  records.forEach((record) => {
    let found = 0;
    record.querySelectorAll("[data-word]").forEach((word) => {
      const isFound = wanted !== "" && matches(word, wanted), name = word.querySelector(".name, mark");
      found += isFound;
      if (isFound !== (name.tagName === "MARK")) {
        const next = document.createElement(isFound ? "mark" : "span");
        next.textContent = name.textContent;
        if (!isFound) next.className = "name";
        name.replaceWith(next);
      }
    });
    record.hidden = wanted !== "" && !found;
    texts += !record.hidden;
    words += found;
  });
  const place = (record) => Number(record.dataset.record); // the page comes worst first
  const unscored = records.length - data.num_scored; // they come last in both orders
  const best = (record) => (place(record) < data.num_scored ? -place(record) : place(record) + unscored);
  const key = { worst: place, best, store: (record) => data.store_order[place(record)] }[order];
  [...records].sort((first, second) => key(first) - key(second)).forEach((record) => gallery.append(record));
  const found = wanted ? `${texts} of ${records.length} texts have “${wanted}”, ${words} words` : `${records.length} texts`;
  byId("status").textContent = `${found}, ${byId("order").selectedOptions[0].textContent}.`;
}

byId("find").addEventListener("input", update);
byId("order").addEventListener("change", update);
byId("controls").hidden = false;
