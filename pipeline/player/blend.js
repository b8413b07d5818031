/* The means at rest: base plus the sum of the shapes of motion, 1.7 million products a frame for 10,000 Gaussians, and
 * most of a frame's JavaScript; so 16 at once in WebAssembly where the browser has its vectors, else in a plain loop. */

const LANES = 16, PAGE = 65536;

export class MeanBlend {
  /* Of means [3,N] and the shapes' bytes [G,6,N], of which the first three columns move means. */
  constructor(means, motion, shapes) {
    const N = means.length / 3, P = Math.ceil(N / LANES) * LANES;
    this.base = new Float32Array(3 * P);
    for (let c = 0; c < 3; c++) this.base.set(means.subarray(c * N, (c + 1) * N), c * P);
    // One memory: values [3,P] floats, weights [3,G] floats, planes [3,G,P] bytes.
    this.at = { values: 0, weights: 12 * P, planes: 12 * (P + shapes) };
    const { memory, kernel } = compiled(this.at.planes + 3 * shapes * P);
    this.kernel = kernel;
    this.shapes = shapes;
    this.stride = P; // of a column in `values`
    this.values = new Float32Array(memory, 0, 3 * P);
    this.weights = new Float32Array(memory, this.at.weights, 3 * shapes);
    const planes = new Int8Array(memory, this.at.planes, 3 * shapes * P);
    for (let c = 0; c < 3; c++)
      for (let g = 0; g < shapes; g++)
        planes.set(motion.subarray((6 * g + c) * N, (6 * g + c + 1) * N), (c * shapes + g) * P);
  }

  /* `values` of weights times steps [G,6]. */
  blend(motionWeights) {
    const { at, shapes: G, stride: P, weights, values } = this;
    values.set(this.base);
    for (let c = 0; c < 3; c++) {
      for (let g = 0; g < G; g++) weights[c * G + g] = motionWeights[6 * g + c];
      const begin = at.values + 4 * c * P;
      this.kernel(begin, at.planes + c * G * P, at.weights + 4 * c * G, begin + 4 * P, P, G);
    }
  }
}

/* {memory: an ArrayBuffer of so many bytes, kernel(values, planes, weights, end, stride, shapes)}: floats from `values`
 * to `end` grow by the sum over shapes of a weight times bytes `stride` apart; all but the last two are addresses. */
function compiled(bytes) {
  const code = assembled();
  if (typeof WebAssembly === "object" && WebAssembly.validate(code)) {
    const memory = new WebAssembly.Memory({ initial: Math.ceil(bytes / PAGE) });
    const instance = new WebAssembly.Instance(new WebAssembly.Module(code), { page: { memory } });
    return { memory: memory.buffer, kernel: instance.exports.blend };
  }
  const memory = new ArrayBuffer(bytes), floats = new Float32Array(memory), planes = new Int8Array(memory);
  const kernel = (values, plane, weights, end, stride, shapes) => {
    for (let g = 0; g < shapes; g++) {
      const weight = floats[weights / 4 + g], first = plane + g * stride;
      for (let i = 0; i < stride; i++) floats[values / 4 + i] += weight * planes[first + i];
    }
  };
  return { memory, kernel };
}

/* The module's bytes, written out by hand: instructions by the names of the WebAssembly specification. */
function assembled() {
  const leb = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...leb(n >> 7)]);
  const sized = (bytes) => [...leb(bytes.length), ...bytes];
  const section = (id, ...items) => [id, ...sized([items.length, ...items.flat()])];
  const name = (text) => sized([...text].map((letter) => letter.charCodeAt(0)));
  const get = (local) => [0x20, local], set = (local) => [0x21, local], tee = (local) => [0x22, local];
  const number = (n) => [0x41, n], add = [0x6a], subtract = [0x6b], below = [0x49], repeatIf = [0x0d, 0];
  const loop = (...body) => [0x03, 0x40, ...body.flat(), 0x0b];
  const vector = (operation, ...immediate) => [0xfd, ...leb(operation), ...immediate];
  const load = (offset) => vector(0, 0, offset), store = (offset) => vector(11, 0, offset), splat = vector(9, 2, 0);
  const halves = [vector(135), vector(136)]; // i16x8.extend_{low,high}_i8x16_s
  const quarters = [vector(167), vector(168)]; // i32x4.extend_{low,high}_i16x8_s
  const toFloats = vector(250), times = vector(230), plus = vector(228);
  const [i32, v128] = [0x7f, 0x7b];

  const [values, planes, weights, end, stride, shapes, plane, weightAt, left] = Array(9).keys();
  const sums = [9, 10, 11, 12], [bytes, weight, half] = [13, 14, 15];
  const eachShape = loop(
    get(plane), load(0), set(bytes), get(weightAt), splat, set(weight),
    ...[0, 1].map((h) => [
      ...get(bytes), ...halves[h], ...set(half),
      ...[0, 1].flatMap((q) => [
        ...get(sums[2 * h + q]), ...get(half), ...quarters[q], ...toFloats, ...get(weight), ...times, ...plus,
        ...set(sums[2 * h + q]),
      ]),
    ]),
    get(plane), get(stride), add, set(plane), get(weightAt), number(4), add, set(weightAt),
    get(left), number(1), subtract, tee(left), repeatIf,
  );
  const body = loop(
    get(planes), set(plane), get(weights), set(weightAt), get(shapes), set(left),
    ...sums.map((sum, k) => [...get(values), ...load(16 * k), ...set(sum)]),
    eachShape,
    ...sums.map((sum, k) => [...get(values), ...get(sum), ...store(16 * k)]),
    get(planes), number(16), add, set(planes),
    get(values), [0x41, 0xc0, 0x00], add, tee(values), get(end), below, repeatIf, // 64 bytes on
  );
  return Uint8Array.from([
    0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, [0x60, 6, ...Array(6).fill(i32), 0]),
    ...section(2, [...name("page"), ...name("memory"), 2, 0, 1]),
    ...section(3, [0]),
    ...section(7, [...name("blend"), 0, 0]),
    ...section(10, sized([2, 3, i32, 7, v128, ...body, 0x0b])),
  ]);
}
