/* The camera: the clip's own with a lens that frames the avatar, gone round its head (pipeline/viewpoint.py). */

import { turning } from "./rigid.js";

const MARGIN = 1.08; // of a framed picture
const SHARE = 0.005; // of the Gaussians may lie outside on either side: strays do not shrink the rest
const HEAD_MIDDLE = [0, 0.04, 0.05]; // metres in the head's axes
const MOST_YAW = 1.4, MOST_PITCH = 1.1, ZOOMS = [0.4, 12];

export class Orbit {
  /* `means` [3,N] at rest and the head's pose at rest. */
  constructor(means, head) {
    const N = means.length / 3, flat = [new Float32Array(N), new Float32Array(N)];
    for (let i = 0; i < N; i++) for (let a = 0; a < 2; a++) flat[a][i] = means[a * N + i] / means[2 * N + i];
    const ends = flat.map((values) => {
      const sorted = values.filter((_, i) => means[2 * N + i] > 0).sort();
      return [sorted[Math.floor(SHARE * sorted.length)], sorted[Math.ceil((1 - SHARE) * sorted.length) - 1]];
    });
    this.low = ends.map(([low]) => low);
    this.high = ends.map(([, high]) => high);
    this.pivot = [0, 4, 8].map((r) => head[r + 3] + HEAD_MIDDLE.reduce((sum, m, c) => sum + head[r + c] * m, 0));
    this.up = [head[1], head[5], head[9]];
    this.turns = [0, 1].map(() => new Float64Array(16));
    this.made = { width: 0, height: 0, fx: 0, fy: 0, cx: 0, cy: 0, view: new Float64Array(16) };
    this.reset();
  }

  reset() {
    Object.assign(this, { yaw: 0, pitch: 0, zoom: 1, right: 0, down: 0 });
  }

  /* Radians, to the subject's left and up. */
  turn(yaw, pitch) {
    this.yaw = Math.min(MOST_YAW, Math.max(-MOST_YAW, this.yaw + yaw)); // nothing was filmed behind
    this.pitch = Math.min(MOST_PITCH, Math.max(-MOST_PITCH, this.pitch + pitch));
  }

  magnify(factor) {
    this.zoom = Math.min(ZOOMS[1], Math.max(ZOOMS[0], this.zoom * factor));
  }

  /* Shares of the picture's height. */
  move(right, down) {
    this.right = Math.min(1, Math.max(-1, this.right + right));
    this.down = Math.min(1, Math.max(-1, this.down + down));
  }

  /* The camera of a picture of so many pixels that fills the rectangle `free` = [x, y, width, height] of it; the same
   * object each time. */
  camera(width, height, free = [0, 0, width, height]) {
    const { low, high, pivot, up, made, turns: [aboutUp, aboutRight] } = this, view = made.view;
    const focal = Math.min(free[2] / (high[0] - low[0]), free[3] / (high[1] - low[1])) / MARGIN;
    Object.assign(made, { width, height, fx: focal, fy: focal });
    made.cx = free[0] + free[2] / 2 - (focal * (low[0] + high[0])) / 2 + this.right * height;
    made.cy = free[1] + free[3] - focal * high[1] + this.down * height; // the shoulders stand on its foot

    turning(this.yaw * up[0], this.yaw * up[1], this.yaw * up[2], aboutUp);
    const f = [0, 4, 8].map((r) => aboutUp[r] * pivot[0] + aboutUp[r + 1] * pivot[1] + aboutUp[r + 2] * pivot[2]);
    const right = [f[1] * up[2] - f[2] * up[1], f[2] * up[0] - f[0] * up[2], f[0] * up[1] - f[1] * up[0]];
    const scale = -this.pitch / Math.hypot(...right);
    turning(scale * right[0], scale * right[1], scale * right[2], aboutRight);
    // The world turns the other way about the pivot: the transposed product of both turns.
    view.fill(0);
    view[15] = 1;
    for (let r = 0; r < 3; r++) {
      let moved = pivot[r];
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < 3; k++) sum += aboutRight[4 * c + k] * aboutUp[4 * k + r];
        view[4 * r + c] = sum;
        moved -= sum * pivot[c];
      }
      view[4 * r + 3] = moved + (1 / this.zoom - 1) * pivot[r];
    }
    return made;
  }
}
