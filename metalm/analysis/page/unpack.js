// From the page's data blocks to words and losses; metalm/analysis/word_columns.py packs them.
"use strict";

const facts = JSON.parse(document.getElementById("facts").textContent);
const step = Number(document.getElementById("facts").dataset.step);

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const signs = atob(base64);
  const bytes = new Uint8Array(signs.length);
  for (let i = 0; i < signs.length; i += 1) bytes[i] = signs.charCodeAt(i);
  return bytes;
}

// The content of a block of zlib's format in base64.
async function inflated(id) {
  const packed = bytesOf(document.getElementById(id).textContent);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function inflatedText(id) {
  return new TextDecoder().decode(await inflated(id));
}

// One promise for something that is wanted many times and made once.
function once(make) {
  let made = null;
  return () => {
    made ??= make();
    return made;
  };
}

const vocabulary = once(async () => JSON.parse(await inflatedText("vocabulary")));

function hasWords(number) {
  return document.getElementById(`text-${number}`).textContent.length > 0;
}

// Words of a text, and for each of its columns the loss of every word in nats.
async function unpackText(number) {
  const [bytes, known] = await Promise.all([inflated(`text-${number}`), vocabulary()]);
  const { words: count, columns } = facts.texts[number];
  const plane = (columns.length + 1) * count;
  const at = (array, i) => {
    const place = array * count + i;
    return bytes[place] | (bytes[plane + place] << 8) | (bytes[2 * plane + place] << 16);
  };
  const words = Array.from({ length: count }, (_, i) => known[at(0, i)]);
  const steps = new Map();
  columns.forEach((column, index) => {
    const parent = steps.get(facts.columns[column].parent);
    const own = new Int32Array(count);
    for (let i = 0; i < count; i += 1) {
      const folded = at(index + 1, i);
      const difference = folded & 1 ? -((folded + 1) >> 1) : folded >> 1;
      own[i] = difference + (parent ? parent[i] : 0);
    }
    steps.set(column, own);
  });
  const losses = new Map();
  for (const [column, own] of steps) losses.set(column, Float64Array.from(own, (v) => v * step));
  return { words, losses };
}
