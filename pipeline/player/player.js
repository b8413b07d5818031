/* The player itself: an avatar, how it is driven now, and a canvas. main.js says what a drive and a driver are. */

import { Order } from "./order.js";
import { Orbit } from "./orbit.js";
import { Renderer } from "./renderer.js";

const MOST_PIXELS_PER_PX = 2;
const SLOW_MS = 40, LEAST_SCALE = 0.5; // drawing slower than this is done in fewer pixels

export class Player {
  /* Throws an Error with words where WebGL2 does not work here. */
  constructor(avatar, canvas, drivers) {
    this.avatar = avatar;
    this.names = avatar.names;
    this.rest = avatar.rest();
    this.canvas = canvas;
    this.drivers = drivers;
    this.driver = null;
    this.say = () => {};
    this.onUse = () => {};
    this.onShown = () => {}; // after a frame with another drive
    this.free = null; // [x, y, width, height] in px, where nothing lies over the canvas; null: all of it
    this.order = new Order(avatar.count);
    this.reset();
    avatar.pose({ ...this.rest, torso: null, torsoShape: null, skull: null });
    this.orbit = new Orbit(avatar.means, this.rest.head);
    this.gl = canvas.getContext("webgl2", { antialias: false, depth: false, powerPreference: "high-performance" });
    if (!this.gl) throw new Error("This browser shows no WebGL2, which draws the avatar. Try another one, or a newer one.");
    this.renderer = new Renderer(this.gl, avatar);
    this.scale = 1;
    this.pace = { last: 0, mean: 0, frames: 0 };
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => {
      this.renderer = new Renderer(this.gl, avatar);
      this.#changed();
    });
    new ResizeObserver(() => this.look()).observe(canvas);
  }

  /* Everything at rest. */
  reset() {
    this.drive = { expression: new Float32Array(this.names.length), head: new Float32Array(16) };
    this.show({ expression: null, head: null, eyes: this.rest.eyes, torso: null, torsoShape: null, skull: null });
  }

  /* Show a drive; a part left out stays as it is, null means rest, or as it follows from the rest of the drive. */
  show(given) {
    for (const part of ["expression", "head"])
      if (given[part] !== undefined) this.drive[part].set(given[part] || this.rest[part]);
    for (const part of ["eyes", "torso", "torsoShape", "skull"])
      if (given[part] !== undefined) this.drive[part] = given[part] && Float32Array.from(given[part]);
    this.#changed();
  }

  /* Hand over to a driver by name; null to none. What went wrong with its start is told to people. */
  async use(name) {
    if (name === this.driver) return;
    this.drivers[this.driver]?.stop();
    this.driver = name;
    if (name !== "sliders") this.show({ torso: null, torsoShape: null, skull: null });
    this.say("");
    this.onUse(name);
    if (name === null) return;
    const onDrive = (given) => {
      if (this.driver === name) this.show(given);
    };
    try {
      await this.drivers[name].start(this, onDrive);
    } catch (error) {
      if (this.driver !== name) return;
      await this.use(null);
      this.say(error.message);
    }
  }

  /* The camera has changed, or the canvas. */
  look() {
    this.dirty ||= "view";
    this.#soon();
  }

  #changed() {
    this.dirty = "drive";
    this.#soon();
  }

  #soon() {
    if (this.renderer) this.waiting ||= requestAnimationFrame((now) => this.#frame(now));
  }

  #frame(now) {
    this.waiting = 0;
    this.#keepPace(now);
    const { canvas, avatar, order, renderer } = this, dirty = this.dirty;
    const perPx = this.scale * Math.min(window.devicePixelRatio || 1, MOST_PIXELS_PER_PX);
    const width = Math.max(1, Math.round(canvas.clientWidth * perPx));
    const height = Math.max(1, Math.round(canvas.clientHeight * perPx));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    if (dirty === "drive") {
      avatar.pose(this.drive);
      renderer.pose(avatar);
    }
    this.dirty = null;
    const camera = this.camera();
    order.sort(avatar.means, camera.view);
    renderer.draw(null, camera, order.instances, [0, 0, 0, 0]);
    if (dirty === "drive") this.onShown();
  }

  /* Draw in fewer pixels where frames that follow each other come slowly. */
  #keepPace(now) {
    const { pace } = this, between = now - pace.last;
    pace.last = now;
    if (between > 300) return;
    pace.mean = pace.frames ? 0.8 * pace.mean + 0.2 * between : between;
    if (++pace.frames > 8 && pace.mean > SLOW_MS && this.scale > LEAST_SCALE) {
      this.scale = Math.max(LEAST_SCALE, 0.8 * this.scale);
      pace.frames = 0;
    }
  }

  /* The camera that the canvas is drawn with. */
  camera() {
    const { width, height, clientWidth } = this.canvas, perPx = width / Math.max(clientWidth, 1);
    return this.orbit.camera(width, height, this.free?.map((px) => px * perPx));
  }

  /* A picture, {width, height, pixels: RGBA bytes}, of a drive, by a camera as `camera()` gives it.
   * A part of the drive that is left out is at rest; background is sRGB in [0,1]. */
  picture(drive = {}, camera = this.camera(), background = [1, 1, 1]) {
    const { avatar, order, renderer } = this;
    avatar.pose({ ...this.rest, ...drive });
    renderer.pose(avatar);
    order.sort(avatar.means, camera.view);
    const pixels = renderer.picture(camera, order.instances, [...background, 1]);
    this.#changed();
    return { width: camera.width, height: camera.height, pixels };
  }

  /* What the formula gives for a drive: the shapes' weights [K], means [3,N] in the clip's camera, the torso [4,4]. */
  numbers(drive = {}) {
    this.avatar.pose({ ...this.rest, ...drive });
    this.#changed();
    const [weights, means, torso] = [this.avatar.weights, this.avatar.means, this.avatar.bones[1]];
    return { weights: [...weights], means: [...means], torso: [...torso] };
  }

  /* JavaScript's milliseconds per frame, drawing excluded, over so many frames with a drive each. Browsers round times to
   * a tenth. On a busy machine the fastest says most: then the others also count what else ran. */
  measure(frames = 400) {
    const { avatar, order } = this, times = new Float64Array(frames);
    const drive = { ...this.rest, expression: this.rest.expression.slice(), torso: null, torsoShape: null };
    for (let frame = -50; frame < frames; frame++) {
      for (let i = 0; i < drive.expression.length; i++) drive.expression[i] = 0.5 + 0.5 * Math.sin(i + 0.1 * frame);
      const begin = performance.now();
      avatar.pose(drive);
      order.sort(avatar.means, this.camera().view);
      if (frame >= 0) times[frame] = performance.now() - begin; // the first ones warm up
    }
    times.sort();
    this.#changed();
    return { gaussians: avatar.count, fastest_ms: times[0], median_ms: times[frames >> 1], slowest_ms: times[frames - 1] };
  }
}
