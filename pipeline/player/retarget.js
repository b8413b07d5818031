/* From the viewer's face to the avatar's performance: what pipeline/retarget.py does for clips, in the same columns.
 *
 * `avatar` is the object that pipeline/exports/webcam.py makes: names, neutral, low, high and room [D], T_cam_rest [16],
 * gaze_range. Its columns are the coefficients, then pitch and yaw of both eyes, turn and move of the head. */

import { multiply, rotvecOf, turning } from "./rigid.js";

/* Columns after the coefficients. */
export const EYES = 4;
export const TURN = 3;
export const MOVE = 3;

/* How many of the avatar's columns are coefficients. */
export function coefficientCount(avatar) {
  return avatar.names.length - EYES - TURN - MOVE;
}

/* Values left alone within `low` and `high`, eased beyond, never farther than `room` from them. */
export function softLimit(values, low, high, room) {
  return Float64Array.from(values, (value, i) => {
    const inside = Math.min(Math.max(value, low[i]), high[i]);
    return room[i] > 0 ? inside + room[i] * Math.tanh((value - inside) / room[i]) : inside;
  });
}

/* What the avatar is to do [D]: its own neutral, and the departures of `values` [D] from the driver's `neutral` [D]. */
export function transfer(values, neutral, avatar) {
  const count = coefficientCount(avatar);
  const wanted = Float64Array.from(values, (value, i) => {
    const moved = avatar.neutral[i] + value - neutral[i];
    return i < count ? Math.min(Math.max(moved, 0), 1) : moved;
  });
  return softLimit(wanted, avatar.low, avatar.high, avatar.room);
}

/* The drive (main.js) of an avatar's values [D]; `names` are the coefficients that the player wants, in its order. */
export function driveOf(values, avatar, names) {
  const count = coefficientCount(avatar), [x, y, z] = values.subarray(count + EYES, count + EYES + TURN);
  const head = multiply(avatar.T_cam_rest, turning(x, y, z, new Float64Array(16)), new Float64Array(16));
  for (let axis = 0; axis < MOVE; axis++) head[4 * axis + 3] += values[count + EYES + TURN + axis];
  return {
    expression: Float32Array.from(names, (name) => values[avatar.names.indexOf(name)]),
    eyes: Array.from(values.subarray(count, count + EYES)),
    head: Float32Array.from(head),
  };
}

/* Pitch and yaw of the left eye, then of the right, that eyeLook* coefficients stand for (pipeline/gaze.py). */
export function eyesOf(coefficients, range) {
  const angle = (direction, side) => range[direction] * (coefficients[`eyeLook${direction}${side}`] ?? 0);
  return [["Left", 1], ["Right", -1]].flatMap(([side, outwards]) => [
    angle("Down", side) - angle("Up", side),
    outwards * (angle("Out", side) - angle("In", side)),
  ]);
}

/* The head joint in MediaPipe's canonical face, centimetres: where our head models have it. */
const HEAD_IN_FACE = [0, -1.35, -6.0];

/* T_cam_head, row-major, metres, camera axes x right, y down, z forward, of MediaPipe's facial transformation matrix:
 * column-major, from its canonical face (cm; the axes of our heads) to a camera with y up that looks along -z. */
export function headPose(matrix) {
  const pose = new Float64Array(16);
  for (let r = 0; r < 3; r++) {
    const flip = r === 0 ? 1 : -1;
    for (let c = 0; c < 3; c++) pose[4 * r + c] = flip * matrix[4 * c + r];
    const joint = HEAD_IN_FACE.reduce((sum, p, c) => sum + pose[4 * r + c] * p, flip * matrix[12 + r]);
    pose[4 * r + 3] = 0.01 * joint;
  }
  pose[15] = 1;
  return pose;
}

/* A row of the driver's performance [D]: of coefficients by name, and a head pose relative to that of `rest`. */
export function performanceRow(coefficients, pose, rest, avatar) {
  const count = coefficientCount(avatar), row = new Float64Array(avatar.names.length);
  for (let i = 0; i < count; i++) row[i] = coefficients[avatar.names[i]] ?? 0;
  row.set(eyesOf(coefficients, avatar.gaze_range), count);
  rotvecOf(relativeTurn(rest, pose), row, count + EYES);
  for (let axis = 0; axis < MOVE; axis++) row[count + EYES + TURN + axis] = pose[4 * axis + 3] - rest[4 * axis + 3];
  return row;
}

/* The mean of rigid poses: their mean departure from the first. */
export function meanPose(poses) {
  const [first] = poses, mean = [0, 0, 0], vector = [0, 0, 0];
  for (const pose of poses) {
    rotvecOf(relativeTurn(first, pose), vector);
    for (let i = 0; i < 3; i++) mean[i] += vector[i] / poses.length;
  }
  const pose = multiply(first, turning(...mean, new Float64Array(16)), new Float64Array(16));
  for (let r = 3; r < 12; r += 4) pose[r] = poses.reduce((sum, one) => sum + one[r] / poses.length, 0);
  return pose;
}

/* R_from^T R_to as a 4x4. */
function relativeTurn(from, to) {
  const turn = new Float64Array(16);
  for (let r = 0; r < 3; r++) {
    for (let c = 0; c < 3; c++) turn[4 * r + c] = from[r] * to[c] + from[4 + r] * to[4 + c] + from[8 + r] * to[8 + c];
  }
  turn[15] = 1;
  return turn;
}
