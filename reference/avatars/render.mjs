// Draw avatars: `node render.mjs OUT SIZE < specs.jsonl` appends one RGB picture (SIZE x SIZE x 3 bytes) per line to OUT.
// A line holds {options, view, figure, tilt, turn}: the style's own options with one value each, the square of the drawing that is
// shown [x, y, side], and where the figure [dx, dy, scale], the head (degrees) and the face (dx) stand. Art: "ToonHead" by Johan
// Melin, CC BY 4.0; the parts are its own, moved by transforms.
import fs from 'node:fs';
import readline from 'node:readline';
import { createAvatar } from '@dicebear/core';
import * as style from '@dicebear/toon-head';
import { Resvg } from '@resvg/resvg-js';
// The style exports whole drawings only; moving a head needs its parts.
import * as parts from './node_modules/@dicebear/toon-head/lib/components/index.js';

const NECK = [384, 600];
const [out, size] = [process.argv[2], Number(process.argv[3])];
const settings = { fitTo: { mode: 'width', value: size }, font: { loadSystemFonts: false } }; // looking for fonts takes longest

function drawing(spec) {
  const extra = createAvatar(style, spec.options).toJson().extra;
  const colors = { skin: extra.skinColor, hair: extra.hairColor, clothes: extra.clothesColor };
  const part = (group, asked) => {
    if ((extra[group] ?? null) !== (asked ?? null)) throw new Error(`asked for ${group} ${asked}, the renderer chose ${extra[group]}`);
    return extra[group] ? parts[group][extra[group]]({}, colors) : '';
  };
  const p = Object.fromEntries(
    ['rearHair', 'body', 'head', 'clothes', 'mouth', 'beard', 'eyes', 'eyebrows', 'hair'].map((group) => [
      group, part(group, spec.options[`${group}Probability`] === 0 ? null : (spec.options[group] ?? [group])[0]),
    ]));
  const [dx, dy, scale] = spec.figure;
  const head = (body) => `<g transform="rotate(${spec.tilt} ${NECK}) translate(${spec.turn / 4} 0)">${body}</g>`;
  const face = (body) => `<g transform="translate(${spec.turn} 0)">${body}</g>`;
  const [x, y, side] = spec.view;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="${x} ${y} ${side} ${side}" fill="none">`
    + `<rect x="${x}" y="${y}" width="${side}" height="${side}" fill="${extra.primaryBackgroundColor}"/>`
    + `<g transform="translate(${384 + dx} ${400 + dy}) scale(${scale}) translate(-384 -400)">`
    + head(`<g transform="translate(0 10)">${p.rearHair}</g>`) + p.body + head(p.head) + p.clothes
    + head(face(p.mouth + p.beard + p.eyes + p.eyebrows) + p.hair) + '</g></svg>';
}

const file = fs.openSync(out, 'a');
for await (const line of readline.createInterface({ input: process.stdin })) {
  const { pixels } = new Resvg(drawing(JSON.parse(line)), settings).render();
  const rgb = Buffer.alloc(size * size * 3);
  for (let i = 0; i < size * size; i++) pixels.copy(rgb, 3 * i, 4 * i, 4 * i + 3);
  fs.writeSync(file, rgb);
}
