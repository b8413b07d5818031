/* What a tracked face does to the avatar from frame to frame: its neutral is taken, its jitter smoothed, its loss eased. */

import { EYES, MOVE, TURN, coefficientCount, driveOf, meanPose, performanceRow, transfer } from "./retarget.js";

const NEUTRAL_SECONDS = 1; // of the face that are taken for its neutral
const NEUTRAL_FRAMES = 5; // at least
const NEUTRAL_QUANTILE = 0.1; // of coefficients; faces rest at their low values
const RECENT_EVERY_SECONDS = 0.1;
const RECENT_FRAMES = 300; // the last half minute
const HOLD_SECONDS = 0.5; // a face that is lost is held for so long
const AWAY_SECONDS = 1; // then it takes so long to rest
const BACK_SECONDS = 0.3; // and so long back to a face that is found
// The cut-off of the smoothing at rest, Hz, and how much it rises with speed: of coefficients, radians, metres.
const SMOOTHING = { coefficient: [1.5, 1], eye: [1.5, 4], turn: [1.2, 4], move: [0.8, 20] };

/* The one-euro filter (Casiez, Roussel, Vogel 2012) on rows of numbers: slow ones are smoothed, fast ones followed. */
export class OneEuro {
  constructor(cutoffs, slopes, speedCutoff = 1) {
    this.cutoffs = cutoffs;
    this.slopes = slopes;
    this.speedCutoff = speedCutoff;
    this.reset();
  }

  reset() {
    this.seconds = null;
  }

  /* The smoothed row of a row that was seen at `seconds`. */
  filter(row, seconds) {
    const passed = seconds - this.seconds;
    if (this.seconds === null) {
      this.smooth = Float64Array.from(row);
      this.speed = new Float64Array(row.length);
      this.seconds = seconds;
    } else if (passed > 0) {
      for (let i = 0; i < row.length; i++) {
        this.speed[i] += share(this.speedCutoff, passed) * ((row[i] - this.smooth[i]) / passed - this.speed[i]);
        const cutoff = this.cutoffs[i] + this.slopes[i] * Math.abs(this.speed[i]);
        this.smooth[i] += share(cutoff, passed) * (row[i] - this.smooth[i]);
      }
      this.seconds = seconds;
    }
    return Float64Array.from(this.smooth);
  }
}

function share(cutoff, seconds) {
  const r = 2 * Math.PI * cutoff * seconds;
  return r / (r + 1);
}

/* Follows one face. `avatar` as in retarget.js, `names` the coefficients that the player wants, in its order.
 *
 * The driver's neutral: the head's is its mean pose in the first second. The coefficients' is found while the face is
 * followed, as pipeline/retarget.py finds it in a clip: low values of the last seconds, for who starts to speak at once
 * closes the mouth sooner or later. A face that is shown for it (`takeNeutral`) is kept instead. */
export class Follower {
  constructor(avatar, names) {
    this.avatar = avatar;
    this.names = names;
    const count = coefficientCount(avatar), { coefficient, eye, turn, move } = SMOOTHING;
    const kinds = [[coefficient, count], [eye, EYES], [turn, TURN], [move, MOVE]];
    const column = (which) => kinds.flatMap(([numbers, times]) => Array(times).fill(numbers[which]));
    this.smoothing = new OneEuro(column(0), column(1));
    this.still = new Float64Array(avatar.names.length);
    this.neutral = null; // {row [D], pose}: the driver at rest
    this.shown = false; // whether a face was shown for it
    this.recent = []; // {row, seconds} of the last seconds
    this.presence = 0; // 0: the avatar rests, 1: it follows
    this.seen = this.seconds = null;
    this.taken = []; // faces for the neutral that is being taken, else null
  }

  /* Take what the face does from now on for its neutral. */
  takeNeutral() {
    this.taken = [];
    this.shown = true;
  }

  get takingNeutral() {
    return this.taken !== null;
  }

  /* The drive (main.js) after a frame; `face` is {coefficients: {name: value}, pose: T_cam_head} or null without one. */
  follow(face, seconds) {
    const passed = this.seconds === null ? 0 : Math.max(seconds - this.seconds, 0);
    this.seconds = seconds;
    if (face) {
      if (this.seen === null || seconds - this.seen > HOLD_SECONDS) this.smoothing.reset();
      this.seen = seconds;
      if (this.taken) this.collect(face, seconds);
      if (this.neutral) {
        const row = performanceRow(face.coefficients, face.pose, this.neutral.pose, this.avatar);
        if (!this.shown) this.learnNeutral(row, seconds);
        const departure = row.map((value, i) => value - this.neutral.row[i]);
        this.values = transfer(this.smoothing.filter(departure, seconds), this.still, this.avatar);
        this.presence = Math.min(this.presence + passed / BACK_SECONDS, 1);
      }
    } else if (this.seen === null || seconds - this.seen > HOLD_SECONDS) {
      this.presence = Math.max(this.presence - passed / AWAY_SECONDS, 0);
    }
    const rest = this.avatar.neutral, weight = this.presence ** 2 * (3 - 2 * this.presence);
    const shown = Float64Array.from(rest, (at, i) => (weight ? at + weight * (this.values[i] - at) : at));
    return driveOf(shown, this.avatar, this.names);
  }

  /* One more face for the neutral; it is taken once they are enough. */
  collect(face, seconds) {
    this.taken.push({ ...face, seconds });
    if (this.taken.length < NEUTRAL_FRAMES || seconds - this.taken[0].seconds < NEUTRAL_SECONDS) return;
    const pose = meanPose(this.taken.map((one) => one.pose));
    const rows = this.taken.map((one) => performanceRow(one.coefficients, one.pose, pose, this.avatar));
    this.neutral = { row: this.quantiles(rows, 0.5), pose };
    this.recent = rows.map((row) => ({ row, seconds }));
    this.taken = null;
    this.presence = 0;
    this.smoothing.reset();
  }

  learnNeutral(row, seconds) {
    if (seconds - this.recent.at(-1).seconds < RECENT_EVERY_SECONDS) return;
    this.recent.push({ row, seconds });
    if (this.recent.length > RECENT_FRAMES) this.recent.shift();
    this.neutral.row = this.quantiles(this.recent.map((one) => one.row), NEUTRAL_QUANTILE);
  }

  /* Rest [D] by rows: a quantile of the coefficients, the median of the eyes; turns and moves are told from the pose. */
  quantiles(rows, share) {
    const count = coefficientCount(this.avatar);
    return this.still.map((_, i) => {
      if (i >= count + EYES) return 0;
      const sorted = Float64Array.from(rows, (row) => row[i]).sort();
      return sorted[Math.floor((i < count ? share : 0.5) * (sorted.length - 1))];
    });
  }
}
