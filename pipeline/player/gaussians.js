/* The baked avatar's formula (docs/avatars.md, "Baked avatar"; pipeline/avatars/baked.py is the same in Python).
 *
 * What depends on single Gaussians beside their means is done on the GPU (renderer.js): here are the weights of the
 * shapes, the joints' poses, and the means, which the order of drawing needs. */

import { MeanBlend } from "./blend.js";
import { invert, multiply, quaternionOf, rotvecOf, turning } from "./rigid.js";

const LIMIT = 3; // poses, and all that correctives see, are held at so many deviations
const TURN_M = 0.2; // a turn by a radian counts like a move by this many metres (pipeline/torso.py)
const GAZE_RANGE = { In: 0.38, Out: 0.37, Up: 0.19, Down: 0.31 }; // radians (pipeline/gaze.py)

export class BakedAvatar {
  /* `file` as `readAvatar` gives it. */
  constructor({ arrays, shapes, about }) {
    Object.assign(this, { arrays, about, names: about.expression_names });
    this.count = shapes.quats[0];
    [this.motions, this.shadings] = [shapes.motion[0], shapes.shading[0]];
    [this.units, this.drives] = shapes.hidden;
    this.torsoShapes = arrays.neutral_torso_shape.length;
    const E = this.names.length, K = this.motions + this.shadings;
    this.x = new Float64Array(this.drives);
    this.inputs = new Float64Array(E + 4 + this.drives);
    this.activations = new Float64Array(this.units);
    this.weights = new Float64Array(K);
    // What each plane of bytes counts: weights times steps; motion [G,6], then shading [L,7].
    this.motionWeights = new Float64Array(6 * this.motions);
    this.shadingWeights = new Float64Array(7 * this.shadings);
    // Head, torso, skull: rows of 4x4, and quaternions on the head's side.
    this.bones = [0, 1, 2].map(() => new Float64Array(16));
    this.turns = [0, 1, 2].map(() => new Float64Array(4));
    this.shape = new Float64Array(this.torsoShapes);
    this.resting = new MeanBlend(arrays.means, arrays.motion, this.motions);
    this.means = new Float32Array(3 * this.count); // as posed: x of all, y of all, z of all
    this.scratch = [0, 1, 2].map(() => new Float64Array(16));
    this.eyeLook = ["Left", "Right"].map((side) =>
      Object.fromEntries(Object.keys(GAZE_RANGE).map((way) => [way, this.names.indexOf(`eyeLook${way}${side}`)])),
    );
  }

  /* The drive of rest (main.js says what a drive is). */
  rest() {
    const of = (name) => Float32Array.from(this.arrays[`neutral_${name}`]);
    const eyes = of("eyes");
    return {
      expression: of("expression"),
      head: of("T_cam_head"),
      eyes: Float32Array.of(eyes[0], eyes[1], eyes[3], eyes[4]),
      torso: of("T_cam_torso"),
      torsoShape: of("torso_shape"),
      skull: of("T_cam_skull"),
    };
  }

  /* Pose the avatar: joints, weights and means. */
  pose(drive) {
    const [head, torso, skull] = this.bones;
    head.set(drive.head);
    skull.set(drive.skull || drive.head);
    this.shape.fill(0);
    if (drive.torso) {
      torso.set(drive.torso);
      if (drive.torsoShape) this.shape.set(drive.torsoShape);
    } else this.predictTorso(drive.head, torso, this.shape);
    this.bones.forEach((bone, j) => {
      const q = quaternionOf(bone, this.turns[j]), h = this.turns[0];
      if (q[0] * h[0] + q[1] * h[1] + q[2] * h[2] + q[3] * h[3] < 0) for (let i = 0; i < 4; i++) q[i] = -q[i];
    });
    this.#weigh(drive);
    this.#moveMeans();
  }

  /* The torso that goes with a head as it did in the clip: its pose into `torso`, its shape into `shape`. */
  predictTorso(head, torso, shape) {
    const { predictor_T_cam_head: Th, predictor_T_cam_torso: Tt, predictor_shape, predictor_weights } = this.arrays;
    const [away, turn] = this.scratch, M = this.torsoShapes, columns = 6 + M;
    this.#departure(head, Th, away, 0);
    for (let i = 0; i < 3; i++) away[i] *= TURN_M;
    const moved = this.x.fill(0); // of the right size at least, and filled anew afterwards
    for (let r = 0; r < 6; r++)
      for (let c = 0; c < columns; c++) moved[c] += away[r] * predictor_weights[r * columns + c];
    turning(moved[0] / TURN_M, moved[1] / TURN_M, moved[2] / TURN_M, turn);
    multiply(turn, Tt, torso);
    for (let i = 0; i < 3; i++) torso[4 * i + 3] = moved[3 + i] + Tt[4 * i + 3];
    for (let m = 0; m < M; m++) shape[m] = moved[6 + m] + predictor_shape[m];
  }

  /* out[at..at+6] = the rotation vector of R Rt^T, and the difference of the translations. */
  #departure(pose, typical, out, at) {
    const [, , turned] = this.scratch;
    for (let r = 0; r < 3; r++)
      for (let c = 0; c < 3; c++) {
        const a = 4 * r, b = 4 * c;
        turned[a + c] = pose[a] * typical[b] + pose[a + 1] * typical[b + 1] + pose[a + 2] * typical[b + 2];
      }
    rotvecOf(turned, out, at);
    for (let i = 0; i < 3; i++) out[at + 3 + i] = pose[4 * i + 3] - typical[4 * i + 3];
  }

  /* The weights of the shapes: linear in the drive, and a small network's correctives. */
  #weigh(drive) {
    const { x, inputs, activations, weights, arrays } = this, { linear, hidden, correctives } = arrays;
    const E = this.names.length, D = this.drives, I = inputs.length, H = this.units, G = this.motions;
    x.set(drive.expression);
    for (let eye = 0; eye < 2; eye++) {
      const look = this.eyeLook[eye], value = (way) => GAZE_RANGE[way] * (drive.expression[look[way]] || 0);
      x[E + 2 * eye] = drive.eyes ? drive.eyes[2 * eye] : value("Down") - value("Up");
      const outwards = value("Out") - value("In");
      x[E + 2 * eye + 1] = drive.eyes ? drive.eyes[2 * eye + 1] : eye ? -outwards : outwards;
    }
    this.#departure(this.bones[0], arrays.typical_head, x, E + 4);
    const [inverse, torsoInHead] = this.scratch;
    multiply(invert(this.bones[0], inverse), this.bones[1], torsoInHead);
    this.#departure(torsoInHead, arrays.typical_torso, x, E + 10);
    x.set(this.shape, E + 16);

    for (let i = 0; i < E + 4; i++) inputs[i] = x[i];
    for (let i = 0; i < D; i++) {
      const n = (x[i] - arrays.drive_mean[i]) / arrays.drive_scale[i];
      inputs[E + 4 + i] = Math.min(LIMIT, Math.max(-LIMIT, n));
    }
    for (let h = 0; h < H; h++) {
      let sum = arrays.hidden_bias[h];
      for (let i = 0; i < D; i++) sum += hidden[h * D + i] * inputs[E + 4 + i];
      activations[h] = Math.tanh(sum);
    }
    for (let k = 0; k < weights.length; k++) {
      let sum = arrays.offset[k];
      for (let i = 0; i < I; i++) sum += linear[k * I + i] * inputs[i];
      for (let h = 0; h < H; h++) sum += correctives[k * H + h] * activations[h];
      weights[k] = sum;
    }
    for (let i = 0; i < this.motionWeights.length; i++)
      this.motionWeights[i] = weights[Math.floor(i / 6)] * arrays.motion_steps[i];
    for (let i = 0; i < this.shadingWeights.length; i++)
      this.shadingWeights[i] = weights[G + Math.floor(i / 7)] * arrays.shading_steps[i];
  }

  /* Means at rest with the shapes of motion, then moved by the joints. */
  #moveMeans() {
    const { count: N, resting, means, bones, scratch: [torso, skull], arrays: { joints } } = this;
    const { values, stride } = resting;
    resting.blend(this.motionWeights);
    // The head moves all; torso and skull add how they differ from it, by their shares.
    for (let k = 0; k < 12; k++) {
      torso[k] = (bones[1][k] - bones[0][k]) / 255;
      skull[k] = (bones[2][k] - bones[0][k]) / 255;
    }
    const add = (T, share, i, x, y, z) => {
      means[i] += share * (T[0] * x + T[1] * y + T[2] * z + T[3]);
      means[N + i] += share * (T[4] * x + T[5] * y + T[6] * z + T[7]);
      means[2 * N + i] += share * (T[8] * x + T[9] * y + T[10] * z + T[11]);
    };
    means.fill(0);
    for (let i = 0; i < N; i++) {
      const x = values[i], y = values[stride + i], z = values[2 * stride + i];
      add(bones[0], 1, i, x, y, z);
      if (joints[2 * i]) add(torso, joints[2 * i], i, x, y, z);
      if (joints[2 * i + 1]) add(skull, joints[2 * i + 1], i, x, y, z);
    }
  }
}
