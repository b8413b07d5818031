/* What people touch: the sliders, the bar at the foot, mouse, fingers and keys. */

import * as clip from "./clip.js";
import { goTo, headAngles, setExpression, setHeadAngles } from "./sliders.js";

const GROUPS = [
  ["Brows", /^brow/, /^brow/],
  ["Lids", /^eye(Blink|Squint|Wide)/, /^eye/],
  ["Gaze", /^eyeLook/, /^eye/],
  ["Jaw", /^jaw/, /^jaw/],
  ["Mouth", /^mouth/, /^mouth/],
  ["Cheeks, nose, tongue", /^(cheek|nose|tongue)/, /^$/],
  ["Other", /./, /^$/],
];
const OPEN = ["Head", "Lids", "Jaw"];
const PRESETS = {
  Rest: {},
  Smile: { mouthSmile: 0.8, cheekSquint: 0.4, eyeSquint: 0.25 },
  Open: { jawOpen: 0.8 },
  Surprise: { browInnerUp: 0.8, browOuterUp: 0.7, eyeWide: 0.8, jawOpen: 0.4 },
  Frown: { browDown: 0.8, mouthFrown: 0.7 },
  Kiss: { mouthPucker: 0.9, mouthFunnel: 0.2 },
  Closed: { eyeBlink: 1 },
  Wink: { eyeBlinkLeft: 1, mouthSmileLeft: 0.5, cheekSquintLeft: 0.4 },
};
const HEAD = ["Nod", "Turn", "Tilt"], HEAD_DEGREES = { beyond: 4, least: 8, most: 35 };
const BACKGROUNDS = ["studio", "white", "grey", "black", "green"];
const SLIDERS_EVERY_MS = 100;
const SHOWN = {
  percent: (value) => Math.round(100 * value),
  degrees: (value) => `${Math.round(value)}°`,
  plain: (value) => value.toFixed(2),
};

const element = (id) => document.getElementById(id);
const media = (query) => window.matchMedia(query).matches;

export function build(player) {
  const message = element("message");
  player.say = (text) => {
    message.textContent = text;
    message.hidden = text === "";
  };
  const showSliders = buildSliders(player);
  buildBar(player);
  buildView(player);
  let last = 0;
  // While a clip plays the sliders follow, but not at every frame: they cost more than the avatar.
  player.onShown = () => {
    const now = performance.now();
    if (player.driver !== "sliders" && now - last < SLIDERS_EVERY_MS) return;
    last = now;
    if (!document.body.classList.contains("bare")) showSliders();
  };
}

/* Presets, the head's turn, and a slider for each coefficient; gives what shows the drive's values in them. */
function buildSliders(player) {
  const rows = [], names = player.names, twins = names.map((name) => names.indexOf(twinOf(name)));
  const touch = async (act) => {
    await player.use("sliders");
    act();
  };

  for (const [label, raised] of Object.entries(PRESETS)) {
    if (names.every(isOwn) && label !== "Rest") continue; // they are known by ARKit's names only
    const button = make("button", { textContent: label, type: "button" });
    button.onclick = () =>
      touch(() => {
        const target = player.rest.expression.slice();
        for (const [part, value] of Object.entries(raised))
          names.forEach((name, i) => {
            if ([part, `${part}Left`, `${part}Right`].includes(name)) target[i] = Math.min(1, target[i] + value);
          });
        goTo(target, media("(prefers-reduced-motion: reduce)"));
      });
    element("presets").append(button);
  }

  const groups = element("groups");
  const addGroup = (title) => {
    const group = make("details", { open: OPEN.includes(title) });
    group.append(make("summary", { textContent: title }));
    groups.append(group);
    return group;
  };
  const addRow = (group, label, name, min, max, unit, read, write) => {
    const row = make("label", { className: "row", title: name });
    const slider = make("input", { type: "range", min, max, step: (max - min) / 200, ariaLabel: inWords(name) });
    const output = make("output", {});
    row.append(make("span", { textContent: label }), slider, output);
    group.append(row);
    slider.oninput = () => touch(() => write(slider.valueAsNumber));
    rows.push({ row, group, slider, output, read, unit, words: `${name} ${label}`.toLowerCase() });
  };

  const head = addGroup("Head");
  let angles = new Float64Array(3);
  const turned = furthestTurns(player);
  HEAD.forEach((label, axis) =>
    addRow(head, label, `head${label}, degrees`, -turned[axis], turned[axis], "degrees", () => angles[axis], (value) => {
      angles[axis] = value;
      setHeadAngles(angles);
    }),
  );
  const left = new Set(names.keys());
  const bases = [...new Set(names.filter(isOwn).map((name) => name.split("/")[0]))];
  const own = bases.map((basis) => [basis, { test: (name) => name.startsWith(`${basis}/`) }, /^$/]);
  for (const [title, members, prefix] of [...own, ...GROUPS]) {
    const found = [...left].filter((i) => members.test(names[i]));
    if (!found.length) continue;
    const group = addGroup(title);
    for (const i of found) {
      left.delete(i);
      const [low, high] = rangeOf(names[i], i), unit = isOwn(names[i]) ? "plain" : "percent";
      const label = isOwn(names[i]) ? names[i].split("/")[1] : inWords(names[i].replace(prefix, ""));
      addRow(group, label, names[i], low, high, unit, () => player.drive.expression[i], (value) => {
        const linked = element("linked").checked && twins[i] >= 0;
        setExpression(new Map(linked ? [[i, value], [twins[i], value]] : [[i, value]]));
      });
    }
  }
  buildSearch(rows, [...groups.children]);

  return () => {
    angles = headAngles(player);
    for (const { slider, output, read, unit } of rows) {
      const value = read();
      slider.value = value;
      output.textContent = SHOWN[unit](Number(unit === "degrees" ? slider.value : value));
    }
  };
}

/* Whether a coefficient is of an imported dataset's own basis, whose name comes before the slash. */
const isOwn = (name) => /^[\w-]+\//.test(name);

/* From where to where a coefficient goes: 0 to 1, or of an imported dataset's own what the clip shows, and rest. */
function rangeOf(name, i) {
  if (!isOwn(name)) return [0, 1];
  let low = 0, high = 1e-6;
  for (let frame = 0; frame < clip.state.frames; frame++) {
    const value = clip.driveOf(frame).expression[i];
    [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  return [low, high];
}

/* Degrees that the head may turn about each axis: a little further than in the clip, as what was not filmed looks odd. */
function furthestTurns(player) {
  const { beyond, least, most } = HEAD_DEGREES, furthest = [0, 0, 0];
  for (let frame = 0; frame < clip.state.frames; frame++) {
    const angles = headAngles({ rest: player.rest, drive: clip.driveOf(frame) });
    for (let axis = 0; axis < 3; axis++) furthest[axis] = Math.max(furthest[axis], Math.abs(angles[axis]));
  }
  return furthest.map((angle) => Math.round(Math.min(most, Math.max(least, angle + beyond))));
}

function buildSearch(rows, groups) {
  const search = element("search");
  search.placeholder = `Search ${rows.length} sliders`;
  let open = null; // which groups were open before the search
  search.oninput = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && !open) open = groups.map((group) => group.open);
    for (const row of rows) row.row.hidden = !words.every((word) => row.words.includes(word));
    groups.forEach((group, i) => {
      group.hidden = rows.every((row) => row.group !== group || row.row.hidden);
      if (words.length) group.open = true;
      else if (open) group.open = open[i];
    });
    if (!words.length) open = null;
  };
}

/* Tell the player where panel and bar leave the canvas free. */
function layOut(player) {
  // The ragged edge below the shoulders lies behind the bar, or the sheet.
  const bar = element("bar").getBoundingClientRect(), panel = element("panel").getBoundingClientRect();
  const bare = document.body.classList.contains("bare"), sheet = media("(max-width: 700px)");
  const foot = sheet && !bare ? panel.top + 24 : (bar.top + bar.bottom) / 2, top = sheet ? 56 : 0;
  player.free = [0, top, sheet || bare ? window.innerWidth : panel.left, Math.max(foot - top, 1)];
  player.look();
}

/* Play and timeline, the camera's button, reset, background, theme, the panel; and their keys. */
function buildBar(player) {
  const { state } = clip, play = element("play"), time = element("time"), clock = element("clock");
  const root = document.documentElement, panel = element("toggle");
  const playOrPause = async () => {
    if (!clip.available()) return;
    await player.use("clip");
    if (state.playing) clip.pause();
    else clip.play();
  };
  const seek = async (act) => {
    if (!clip.available()) return;
    await player.use("clip");
    clip.pause();
    act();
  };
  state.onTime = () => {
    play.classList.toggle("playing", state.playing);
    play.setAttribute("aria-label", state.playing ? "Pause the clip" : "Play the clip");
    time.value = state.time;
    const seconds = Math.floor(state.time);
    const text = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    if (clock.textContent !== text) clock.textContent = text;
  };
  time.max = state.duration;
  play.disabled = time.disabled = !clip.available();
  play.onclick = playOrPause;
  time.oninput = () => {
    const seconds = time.valueAsNumber;
    seek(() => clip.seek(seconds));
  };

  const reset = async () => {
    await player.use("sliders");
    player.reset();
    player.orbit.reset();
    player.look();
  };
  const nextBackground = () => {
    root.dataset.background = BACKGROUNDS[(BACKGROUNDS.indexOf(root.dataset.background) + 1) % BACKGROUNDS.length];
  };
  const otherTheme = () => {
    const dark = root.dataset.theme === "auto" ? media("(prefers-color-scheme: dark)") : root.dataset.theme === "dark";
    root.dataset.theme = dark ? "light" : "dark";
  };
  const togglePanel = (shown) => {
    document.body.classList.toggle("bare", !shown);
    panel.setAttribute("aria-expanded", shown);
    layOut(player);
  };
  const flipPanel = () => togglePanel(document.body.classList.contains("bare"));
  togglePanel(!media("(max-width: 700px)"));
  window.addEventListener("resize", () => layOut(player));
  element("reset").onclick = reset;
  element("background").onclick = nextBackground;
  element("theme").onclick = otherTheme;
  panel.onclick = flipPanel;

  const webcam = element("webcam");
  webcam.hidden = !player.drivers.webcam.available();
  webcam.onclick = () => player.use(player.driver === "webcam" ? "sliders" : "webcam");
  player.onUse = (driver) => {
    webcam.setAttribute("aria-pressed", driver === "webcam");
    for (const section of document.querySelectorAll(".driver")) section.hidden = section.id !== `driver-${driver}`;
  };

  const keys = {
    " ": playOrPause,
    ",": () => seek(() => clip.step(-1)),
    ".": () => seek(() => clip.step(1)),
    r: reset,
    b: nextBackground,
    t: otherTheme,
    p: flipPanel,
  };
  document.addEventListener("keydown", (event) => {
    const { target } = event, typing = target.matches("input[type=search]");
    const pressing = event.key === " " && target.matches("button, summary, input");
    if (typing || pressing || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
}

/* Orbit and zoom on the picture, by mouse, fingers and keys. */
function buildView(player) {
  const { canvas, orbit } = player, fingers = new Map();
  const middle = () => [...fingers.values()].reduce(([x, y], p) => [x + p[0] / fingers.size, y + p[1] / fingers.size], [0, 0]);
  const spread = () => {
    const [a, b] = [...fingers.values()];
    return b ? Math.hypot(a[0] - b[0], a[1] - b[1]) : 0;
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  for (const end of ["pointerup", "pointercancel"])
    canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    const before = middle(), wide = spread();
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    const after = middle(), size = canvas.clientHeight, dx = (after[0] - before[0]) / size, dy = (after[1] - before[1]) / size;
    if (fingers.size > 1 || event.shiftKey || event.buttons === 2) orbit.move(dx, dy);
    else orbit.turn(-3 * dx, 3 * dy);
    if (wide > 0) orbit.magnify(spread() / wide);
    player.look();
  });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      orbit.magnify(2 ** (-Math.max(-100, Math.min(100, event.deltaY)) / 300));
      player.look();
    },
    { passive: false },
  );
  canvas.addEventListener("dblclick", () => {
    orbit.reset();
    player.look();
  });
  const keys = {
    ArrowLeft: () => orbit.turn(-0.1, 0),
    ArrowRight: () => orbit.turn(0.1, 0),
    ArrowUp: () => orbit.turn(0, 0.1),
    ArrowDown: () => orbit.turn(0, -0.1),
    "+": () => orbit.magnify(1.1),
    "-": () => orbit.magnify(1 / 1.1),
  };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
    player.look();
  });
}

function make(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

function twinOf(name) {
  if (name.endsWith("Left")) return name.replace(/Left$/, "Right");
  return name.endsWith("Right") ? name.replace(/Right$/, "Left") : "";
}

function inWords(name) {
  const words = name.replace(/([a-z])([A-Z])/g, "$1 $2").toLowerCase();
  return words.charAt(0).toUpperCase() + words.slice(1);
}
