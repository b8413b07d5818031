/* The driver that plays the avatar's own clip. */

import { turning } from "./rigid.js";

let clip = null, tell = null, waiting = 0, begun = 0, shown = -1;

/* How playing goes on; `onTime` is called when it changes. */
export const state = { playing: false, time: 0, duration: 0, frames: 0, onTime: () => {} };

/* Take the clip that came with the avatar. */
export function load(avatar) {
  const times = avatar.arrays.clip_times, frames = times.length;
  clip = { arrays: avatar.arrays, E: avatar.names.length, M: avatar.torsoShapes, times };
  state.frames = frames;
  const each = frames > 1 ? (times[frames - 1] - times[0]) / (frames - 1) : 0;
  state.duration = frames ? times[frames - 1] - times[0] + each : 0;
}

export const available = () => state.frames > 1;

export function start(player, onDrive) {
  tell = onDrive;
  shown = -1;
  seek(state.time);
}

export function stop() {
  pause();
  tell = null;
}

export function play() {
  state.playing = true;
  begun = performance.now() - 1000 * state.time;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(advance);
  state.onTime();
}

export function pause() {
  cancelAnimationFrame(waiting);
  state.playing = false;
  state.onTime();
}

/* Go to so many seconds from the clip's start. */
export function seek(seconds) {
  state.time = Math.min(Math.max(seconds, 0), state.duration);
  begun = performance.now() - 1000 * state.time;
  showFrame(frameAt(state.time));
  state.onTime();
}

/* So many frames on. */
export function step(frames) {
  const frame = Math.min(Math.max(frameAt(state.time) + frames, 0), state.frames - 1);
  seek(clip.times[frame] - clip.times[0] + 1e-4);
}

/* The drive of a frame. */
export function driveOf(frame) {
  const { arrays, E, M } = clip, row = (name, n) => arrays[`clip_${name}`].subarray(n * frame, n * (frame + 1));
  return {
    expression: expressionOf(row("expression", E)),
    head: poseOf(row("T_cam_head", 6)),
    torso: poseOf(row("T_cam_torso", 6)),
    skull: poseOf(row("T_cam_skull", 6)),
    eyes: row("eyes", 4),
    torsoShape: row("shape", M),
  };
}

/* Coefficients from 0 to 1 come as whole numbers; an imported dataset's own, of any range, as they are. */
function expressionOf(values) {
  return values instanceof Float32Array ? values.slice() : Float32Array.from(values, (value) => value / 65535);
}

function poseOf([x, y, z, ...moved]) {
  const pose = turning(x, y, z, new Float64Array(16));
  for (let r = 0; r < 3; r++) pose[4 * r + 3] = moved[r];
  return pose;
}

function advance(now) {
  state.time = ((now - begun) / 1000) % state.duration;
  showFrame(frameAt(state.time));
  state.onTime();
  waiting = requestAnimationFrame(advance);
}

/* The last frame that has begun by then. */
function frameAt(seconds) {
  let first = 0, behind = state.frames;
  while (behind - first > 1) {
    const middle = (first + behind) >> 1;
    if (clip.times[middle] - clip.times[0] <= seconds) first = middle;
    else behind = middle;
  }
  return first;
}

function showFrame(frame) {
  if (frame === shown || !tell) return;
  shown = frame;
  tell(driveOf(frame));
}
