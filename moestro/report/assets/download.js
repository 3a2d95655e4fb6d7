"use strict";
// Buttons that save a figure: SVG and CSV as the report holds them, PNG painted from the SVG at twice its size.

function saveAs(name, type, content) {
  const link = element("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function savePng(name, svg) {
  const image = new Image();
  image.onload = () => {
    const canvas = element("canvas");
    [canvas.width, canvas.height] = [2 * image.naturalWidth, 2 * image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => saveAs(`${name}.png`, "image/png", blob));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
}

// name: a function that gives the figure's name when a button is pressed.
function addDownloads(box, files, name) {
  if (!files || !files[name()]) return;
  const row = element("div", "downloads");
  row.append(element("span", "", "Save"));
  const save = {
    SVG: (key) => saveAs(`${key}.svg`, "image/svg+xml", files[key].svg),
    PNG: (key) => savePng(key, files[key].svg),
    CSV: (key) => saveAs(`${key}.csv`, "text/csv", files[key].csv),
  };
  Object.entries(save).forEach(([kind, act]) => {
    const button = element("button", "", kind);
    button.type = "button";
    button.setAttribute("aria-label", `save ${name()} as ${kind}`);
    button.addEventListener("click", () => act(name()));
    row.append(button);
  });
  box.append(row);
}
