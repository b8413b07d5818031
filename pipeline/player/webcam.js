/* Driving by the viewer's own camera; see main.js for what a driver is. */

export function available() {
  return false;
}

export async function start(player, onDrive) {}

export function stop() {}
