/* Reads the packed avatar (docs/player.md, "The file"): gzip around safetensors; pipeline/exports/packing.py writes it. */

const TYPES = { F32: Float32Array, F16: Uint16Array, I8: Int8Array, U8: Uint8Array, U16: Uint16Array };
const DELTAS = ["motion", "shading", "grid_means"];

/* {arrays: name -> typed array, shapes: name -> sizes, about} of a file's bytes; halves become floats, differences
 * values. Throws an Error with words where the browser or the file is at fault. */
export async function readAvatar(bytes) {
  // A server may unpack it on the way.
  const unpacked = bytes[0] === 0x1f && bytes[1] === 0x8b ? await gunzip(bytes) : bytes;
  const length = Number(new DataView(unpacked.buffer, unpacked.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(unpacked.subarray(8, 8 + length)));
  const about = JSON.parse(header.__metadata__.headcast);
  if (about.schema !== 1) throw new Error(`This page reads avatars of schema 1; this one has ${about.schema}.`);
  delete header.__metadata__;
  const arrays = {}, shapes = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    const data = unpacked.slice(8 + length + begin, 8 + length + end); // a copy is aligned
    const values = new TYPES[dtype](data.buffer);
    shapes[name] = shape;
    arrays[name] = dtype === "F16" ? floats(values) : values;
  }
  for (const name of DELTAS) runningSum(arrays[name], shapes[name].at(-1));
  const n = shapes.grid_means[1], low = arrays.means_low, step = arrays.means_step;
  arrays.means = Float32Array.from(arrays.grid_means, (value, i) => low[(i / n) | 0] + step[(i / n) | 0] * value);
  return { arrays, shapes, about };
}

async function gunzip(bytes) {
  if (!("DecompressionStream" in window)) throw new Error("This browser is too old to unpack the avatar.");
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
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
