/* The order of drawing: from the farthest Gaussian to the nearest, by a counting sort. */

const BINS = 65536;

export class Order {
  constructor(count) {
    this.depths = new Float32Array(count);
    this.places = new Uint16Array(count);
    this.begins = new Uint32Array(BINS + 1);
    /* [N,4] mean and number of each Gaussian in the order of drawing: what the GPU draws them from. */
    this.instances = new Float32Array(4 * count);
  }

  /* Sort means [3,N] by their depths in a camera; `view` is its row-major T_cam_world. */
  sort(means, view) {
    const { depths, places, begins, instances } = this, N = depths.length;
    const [a, b, c, d] = [view[8], view[9], view[10], view[11]];
    let nearest = Infinity, farthest = -Infinity;
    for (let i = 0; i < N; i++) {
      const depth = a * means[i] + b * means[N + i] + c * means[2 * N + i] + d;
      depths[i] = depth;
      if (depth < nearest) nearest = depth;
      if (depth > farthest) farthest = depth;
    }
    const scale = farthest > nearest ? (BINS - 1) / (farthest - nearest) : 0;
    begins.fill(0);
    for (let i = 0; i < N; i++) {
      places[i] = (farthest - depths[i]) * scale;
      begins[places[i] + 1]++;
    }
    for (let bin = 0; bin < BINS; bin++) begins[bin + 1] += begins[bin];
    for (let i = 0; i < N; i++) {
      const at = 4 * begins[places[i]]++;
      instances[at] = means[i];
      instances[at + 1] = means[N + i];
      instances[at + 2] = means[2 * N + i];
      instances[at + 3] = i;
    }
  }
}
