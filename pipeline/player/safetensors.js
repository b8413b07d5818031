/* Reads gzip around the layout of safetensors. */

const TYPES = { F32: Float32Array, F16: Uint16Array, I8: Int8Array, U8: Uint8Array, U16: Uint16Array };

/* {arrays: name -> typed array (of F16 the bits), shapes: name -> sizes, types: name -> F32 ..., about} of a file's
 * bytes; `about` is the JSON in its metadata's `headcast`. Throws an Error with words where they are none. */
export async function readTensors(packed) {
  if (!("DecompressionStream" in window)) throw new Error("This browser is too old for this page; take one of 2023 or later.");
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer().catch(() => {
    throw new Error("A file of this page is damaged: it does not unpack. Copy or export the page anew.");
  });
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const { __metadata__, ...entries } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const arrays = {}, shapes = {}, types = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(entries)) {
    arrays[name] = new TYPES[dtype](buffer.slice(8 + length + begin, 8 + length + end)); // a copy is aligned
    shapes[name] = shape;
    types[name] = dtype;
  }
  return { arrays, shapes, types, about: JSON.parse(__metadata__.headcast) };
}
