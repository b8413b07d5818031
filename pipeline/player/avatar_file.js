/* The packed avatar as arrays (docs/player.md, "The file"); pipeline/exports/packing.py writes it. */

import { readTensors } from "./safetensors.js";

const DELTAS = ["motion", "shading", "grid_means"];

/* {arrays: name -> typed array, shapes: name -> sizes, about} of a file's bytes; halves become floats, differences
 * values. Throws an Error with words where the browser or the file is at fault. */
export async function readAvatar(bytes) {
  const { arrays, shapes, types, about } = await readTensors(bytes);
  if (about.schema !== 1) throw new Error(`This page reads avatars of schema 1; this one has ${about.schema}.`);
  for (const name of Object.keys(arrays)) if (types[name] === "F16") arrays[name] = floats(arrays[name]);
  for (const name of DELTAS) runningSum(arrays[name], shapes[name].at(-1));
  const n = shapes.grid_means[1], low = arrays.means_low, step = arrays.means_step;
  arrays.means = Float32Array.from(arrays.grid_means, (value, i) => low[(i / n) | 0] + step[(i / n) | 0] * value);
  return { arrays, shapes, about };
}

/* Values from their differences along the last axis; the type's own overflow is part of it. */
function runningSum(values, n) {
  for (let row = 0; row < values.length; row += n) for (let i = row + 1; i < row + n; i++) values[i] += values[i - 1];
}

/* Floats of IEEE halves. */
function floats(halves) {
  return Float32Array.from(halves, (half) => {
    const exponent = (half >> 10) & 31, fraction = half & 1023, sign = half & 0x8000 ? -1 : 1;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
}
