/* Draws the avatar with WebGL2 as pipeline/rasterize/reference.py does: EWA splatting, sRGB colours, alpha compositing.
 *
 * Three passes. The first writes, for each Gaussian, what it is made of into a texture of three bands: quaternion;
 * standard deviations and opacity; colour. The second draws a quad for each, back to front, in half floats: bytes would
 * round with every layer, and colours may leave [0,1] on the way. The third copies that to the canvas. */

const BANDS = 3;

const POSE = `#version 300 es
precision highp float;
precision highp int;
precision highp sampler2DArray;
precision highp isampler2DArray;
uniform isampler2DArray shapes; // four shapes of one number in a texel: TURN layers for each number of the turn, ...
uniform sampler2DArray resting; // share of the torso and log deviations; quaternion; share of the skull and colour; logit
uniform vec4 weights[LAYERS]; // weights times steps
uniform vec4 turns[3]; // of head, torso and skull, xyzw
uniform int rows;
out uvec4 texel;

ivec2 place;

float blend(int layer, int count) {
  float sum = 0.0;
  for (int k = layer; k < layer + count; k++) sum += dot(vec4(texelFetch(shapes, ivec3(place, k), 0)), weights[k]);
  return sum;
}

vec3 blend3(int layer, int count) {
  return vec3(blend(layer, count), blend(layer + count, count), blend(layer + 2 * count, count));
}

vec4 product(vec4 a, vec4 b) {
  return vec4(a.w * b.xyz + b.w * a.xyz + cross(a.xyz, b.xyz), a.w * b.w - dot(a.xyz, b.xyz));
}

vec4 rest(int layer) { return texelFetch(resting, ivec3(place, layer), 0); }

void main() {
  int band = int(gl_FragCoord.y) / rows;
  place = ivec2(gl_FragCoord.x, int(gl_FragCoord.y) - band * rows);
  const int shading = 3 * TURN;
  vec4 made;
  if (band == 0) {
    float torso = rest(0).x, skull = rest(2).x;
    vec4 joint = (1.0 - torso - skull) * turns[0] + torso * turns[1] + skull * turns[2];
    made = normalize(product(joint, product(vec4(blend3(0, TURN), 1.0), rest(1))));
  } else if (band == 1) {
    float logit = rest(3).x + blend(shading + 6 * SHADE, SHADE);
    made = vec4(exp(rest(0).yzw + blend3(shading, SHADE)), 1.0 / (1.0 + exp(-logit)));
  } else made = vec4(rest(2).yzw + blend3(shading + 3 * SHADE, SHADE), 0.0);
  texel = floatBitsToUint(made);
}`;

const EVERYWHERE = `#version 300 es
void main() { gl_Position = vec4(vec2(gl_VertexID & 1, gl_VertexID >> 1) * 4.0 - 1.0, 0.0, 1.0); }`;

/* Its numbers are those of pipeline/rasterize/reference.py. */
const SPLAT = `#version 300 es
precision highp float;
precision highp int;
precision highp usampler2D;
uniform usampler2D posed;
uniform int rows;
uniform mat4 view; // T_cam_world
uniform vec4 lens; // fx, fy, cx, cy in pixels
uniform vec2 size;
layout(location = 0) in vec4 splat; // mean, and which Gaussian it is
out vec2 sigmas;
flat out vec4 shade; // colour and opacity

vec4 made(int band) {
  int i = int(splat.w), columns = textureSize(posed, 0).x;
  return uintBitsToFloat(texelFetch(posed, ivec2(i % columns, i / columns + band * rows), 0));
}

mat3 rotation(vec4 q) {
  vec3 t = 2.0 * q.xyz;
  float xx = q.x * t.x, yy = q.y * t.y, zz = q.z * t.z, xy = q.x * t.y, xz = q.x * t.z, yz = q.y * t.z;
  vec3 w = q.w * t;
  return mat3(1.0 - yy - zz, xy + w.z, xz - w.y, xy - w.z, 1.0 - xx - zz, yz + w.x, xz + w.y, yz - w.x, 1.0 - xx - yy);
}

void main() {
  vec3 point = (view * vec4(splat.xyz, 1.0)).xyz;
  vec4 deviations = made(1);
  float opacity = deviations.w;
  if (point.z <= 0.01 || opacity < 1.0 / 255.0) {
    gl_Position = vec4(0.0, 0.0, 2.0, 1.0);
    return;
  }
  vec2 focal = lens.xy, ratio = point.xy / point.z;
  // Outside 1.3 times the field of view the Jacobian is taken at the border: there it would blow up.
  vec2 margin = 0.15 * size / focal;
  vec2 held = clamp(ratio, -(lens.zw / focal + margin), (size - lens.zw) / focal + margin);
  mat3 M = mat3(view) * rotation(made(0));
  M = mat3(M[0] * deviations.x, M[1] * deviations.y, M[2] * deviations.z);
  vec3 across = focal.x / point.z * (vec3(1.0, 0.0, -held.x) * M);
  vec3 down = focal.y / point.z * (vec3(0.0, 1.0, -held.y) * M);
  float xx = dot(across, across) + 0.3, xy = dot(across, down), yy = dot(down, down) + 0.3;

  // A quad along the ellipse's axes, as large as alpha stays at 1/255.
  float middle = 0.5 * (xx + yy), apart = length(vec2(0.5 * (xx - yy), xy));
  vec2 axis = xx > yy ? vec2(middle + apart - yy, xy) : vec2(xy, middle + apart - xx);
  axis = apart > 1e-6 * middle ? normalize(axis) : vec2(1.0, 0.0);
  float least = max(middle - apart, 0.3);
  float extent = min(sqrt(2.0 * log(255.0 * opacity)), 3.33);
  sigmas = extent * (2.0 * vec2(gl_VertexID & 1, gl_VertexID >> 1) - 1.0);
  vec2 offset = sigmas.x * sqrt(middle + apart) * axis + sigmas.y * sqrt(least) * vec2(-axis.y, axis.x);
  vec2 pixel = focal * ratio + lens.zw + offset;
  shade = vec4(made(2).rgb, opacity);
  gl_Position = vec4(2.0 * pixel / size - 1.0, 0.0, 1.0);
  gl_Position.y = -gl_Position.y;
}`;

const COVER = `#version 300 es
precision highp float;
in vec2 sigmas;
flat in vec4 shade;
out vec4 pixel;
void main() {
  float alpha = min(shade.a * exp(-0.5 * dot(sigmas, sigmas)), 0.999);
  if (alpha < 1.0 / 255.0) discard;
  pixel = vec4(shade.rgb * alpha, alpha);
}`;

const COPY = `#version 300 es
precision highp float;
uniform sampler2D blended;
out vec4 pixel;
void main() { pixel = texelFetch(blended, ivec2(gl_FragCoord.xy), 0); }`;

export class Renderer {
  /* Of a WebGL2 context and a BakedAvatar; throws an Error where a shader does not work here. */
  constructor(gl, avatar) {
    this.gl = gl;
    this.count = avatar.count;
    this.columns = 128;
    this.rows = Math.ceil(avatar.count / this.columns);
    const turn = Math.ceil(avatar.motions / 4), shade = Math.ceil(avatar.shadings / 4), layers = 3 * turn + 7 * shade;
    this.weights = new Float32Array(4 * layers);
    this.turns = new Float32Array(12);
    this.view = new Float32Array(16);
    const numbers = `#define TURN ${turn}\n#define SHADE ${shade}\n#define LAYERS ${layers}\n`;
    this.poseProgram = program(gl, EVERYWHERE, POSE.replace("\n", `\n${numbers}`));
    this.splatProgram = program(gl, SPLAT, COVER);
    this.copyProgram = program(gl, EVERYWHERE, COPY);
    // Where neither is there, it is blended in bytes.
    this.halfFloats = ["EXT_color_buffer_float", "EXT_color_buffer_half_float"].some((name) => gl.getExtension(name));
    gl.disable(gl.DITHER);
    gl.disable(gl.DEPTH_TEST);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);

    const { columns, rows } = this;
    this.shapes = texture(gl, gl.TEXTURE_2D_ARRAY);
    gl.texImage3D(
      gl.TEXTURE_2D_ARRAY, 0, gl.RGBA8I, columns, rows, layers, 0, gl.RGBA_INTEGER, gl.BYTE,
      shapeTexels(avatar, turn, shade, columns * rows),
    );
    this.resting = texture(gl, gl.TEXTURE_2D_ARRAY);
    gl.texImage3D(
      gl.TEXTURE_2D_ARRAY, 0, gl.RGBA32F, columns, rows, 4, 0, gl.RGBA, gl.FLOAT, restTexels(avatar, columns * rows),
    );
    this.posed = texture(gl, gl.TEXTURE_2D);
    gl.texImage2D(
      gl.TEXTURE_2D, 0, gl.RGBA32UI, columns, BANDS * rows, 0, gl.RGBA_INTEGER, gl.UNSIGNED_INT, null,
    );
    this.posing = into(gl, this.posed);
    this.blended = null; // the picture in half floats, made for its size

    this.nothing = gl.createVertexArray();
    this.quads = gl.createVertexArray();
    this.instances = gl.createBuffer();
    gl.bindVertexArray(this.quads);
    gl.bindBuffer(gl.ARRAY_BUFFER, this.instances);
    gl.bufferData(gl.ARRAY_BUFFER, 16 * this.count, gl.STREAM_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 4, gl.FLOAT, false, 0, 0);
    gl.vertexAttribDivisor(0, 1);
  }

  /* First pass: all but the means of the Gaussians of the avatar as it is posed. */
  pose(avatar) {
    const { gl, poseProgram: { program, at } } = this;
    fillWeights(avatar, this.weights);
    avatar.turns.forEach(([w, x, y, z], j) => this.turns.set([x, y, z, w], 4 * j));
    gl.useProgram(program);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.posing);
    gl.viewport(0, 0, this.columns, BANDS * this.rows);
    gl.disable(gl.BLEND);
    gl.uniform4fv(at("weights"), this.weights);
    gl.uniform4fv(at("turns"), this.turns);
    gl.uniform1i(at("rows"), this.rows);
    gl.uniform1i(at("shapes"), 0);
    gl.uniform1i(at("resting"), 1);
    gl.activeTexture(gl.TEXTURE1);
    gl.bindTexture(gl.TEXTURE_2D_ARRAY, this.resting);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D_ARRAY, this.shapes);
    gl.bindVertexArray(this.nothing);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }

  /* Second pass: draw into a framebuffer, null for the page's canvas.
   *   camera: {width, height, fx, fy, cx, cy, view}, pixels; view is the row-major T_cam_world
   *   instances: of an Order
   *   background: premultiplied RGBA */
  draw(framebuffer, camera, instances, background) {
    const { gl, splatProgram: { program, at } } = this, half = this.halfFloats && this.#blending(camera);
    gl.bindFramebuffer(gl.FRAMEBUFFER, half ? half.framebuffer : framebuffer);
    gl.viewport(0, 0, camera.width, camera.height);
    gl.clearColor(...background);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.useProgram(program);
    this.view.set(camera.view);
    gl.uniformMatrix4fv(at("view"), true, this.view);
    gl.uniform4f(at("lens"), camera.fx, camera.fy, camera.cx, camera.cy);
    gl.uniform2f(at("size"), camera.width, camera.height);
    gl.uniform1i(at("rows"), this.rows);
    gl.uniform1i(at("posed"), 0);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, this.posed);
    gl.bindVertexArray(this.quads);
    gl.bindBuffer(gl.ARRAY_BUFFER, this.instances);
    gl.bufferSubData(gl.ARRAY_BUFFER, 0, instances);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.count);
    if (!half) return;
    gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffer);
    gl.disable(gl.BLEND);
    gl.useProgram(this.copyProgram.program);
    gl.bindTexture(gl.TEXTURE_2D, half.texture);
    gl.bindVertexArray(this.nothing);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }

  /* The half floats of a picture's size, {width, height, texture, framebuffer}. */
  #blending({ width, height }) {
    const { gl } = this;
    if (this.blended?.width === width && this.blended.height === height) return this.blended;
    if (this.blended) {
      gl.deleteTexture(this.blended.texture);
      gl.deleteFramebuffer(this.blended.framebuffer);
    }
    const made = texture(gl, gl.TEXTURE_2D);
    gl.texStorage2D(gl.TEXTURE_2D, 1, gl.RGBA16F, width, height);
    return (this.blended = { width, height, texture: made, framebuffer: into(gl, made) });
  }

  /* A picture of its own: RGBA bytes, premultiplied, rows from the top. */
  picture(camera, instances, background) {
    const { gl } = this, { width, height } = camera, row = 4 * width;
    const framebuffer = gl.createFramebuffer(), buffer = gl.createRenderbuffer();
    gl.bindRenderbuffer(gl.RENDERBUFFER, buffer);
    gl.renderbufferStorage(gl.RENDERBUFFER, gl.RGBA8, width, height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffer);
    gl.framebufferRenderbuffer(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.RENDERBUFFER, buffer);
    this.draw(framebuffer, camera, instances, background);
    const upwards = new Uint8Array(row * height), pixels = new Uint8ClampedArray(row * height);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, upwards);
    for (let y = 0; y < height; y++) pixels.set(upwards.subarray(row * (height - 1 - y), row * (height - y)), row * y);
    gl.deleteFramebuffer(framebuffer);
    gl.deleteRenderbuffer(buffer);
    return pixels;
  }
}

/* out = weights times steps in the order of the shapes' texels. */
function fillWeights(avatar, out) {
  const { motions, shadings, motionWeights, shadingWeights } = avatar;
  const turn = 4 * Math.ceil(motions / 4), shade = 4 * Math.ceil(shadings / 4);
  for (let c = 0; c < 3; c++) for (let g = 0; g < motions; g++) out[c * turn + g] = motionWeights[6 * g + 3 + c];
  for (let c = 0; c < 7; c++) for (let l = 0; l < shadings; l++) out[3 * turn + c * shade + l] = shadingWeights[7 * l + c];
}

/* Bytes [layers, texels, 4] of turns, then of log deviations, colours and the opacity's logit. */
function shapeTexels(avatar, turn, shade, texels) {
  const { count: N, motions, shadings, arrays } = avatar, out = new Int8Array(4 * texels * (3 * turn + 7 * shade));
  const fill = (plane, layer, k) => {
    const begin = 4 * texels * layer + k;
    for (let i = 0; i < N; i++) out[begin + 4 * i] = plane[i];
  };
  for (let c = 0; c < 3; c++)
    for (let g = 0; g < motions; g++)
      fill(arrays.motion.subarray((6 * g + 3 + c) * N, (6 * g + 4 + c) * N), c * turn + (g >> 2), g & 3);
  for (let c = 0; c < 7; c++)
    for (let l = 0; l < shadings; l++)
      fill(arrays.shading.subarray((7 * l + c) * N, (7 * l + c + 1) * N), 3 * turn + c * shade + (l >> 2), l & 3);
  return out;
}

/* Floats [4, texels, 4] of a Gaussian at rest, as the first pass reads them. */
function restTexels(avatar, texels) {
  const { count: N, arrays: { appearance, quats, joints } } = avatar, out = new Float32Array(16 * texels);
  for (let i = 0; i < N; i++) {
    const [torso, quat, skull, logit] = [0, 1, 2, 3].map((layer) => 4 * (layer * texels + i));
    out[torso] = joints[2 * i] / 255;
    out[skull] = joints[2 * i + 1] / 255;
    for (let c = 0; c < 3; c++) {
      out[torso + 1 + c] = appearance[c * N + i];
      out[skull + 1 + c] = appearance[(3 + c) * N + i];
      out[quat + c] = quats[4 * i + 1 + c];
    }
    out[quat + 3] = quats[4 * i];
    out[logit] = appearance[6 * N + i];
  }
  return out;
}

function texture(gl, kind) {
  const made = gl.createTexture();
  gl.bindTexture(kind, made);
  for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(kind, side, gl.NEAREST);
  return made;
}

/* A framebuffer whose pixels are a texture's. */
function into(gl, texture) {
  const made = gl.createFramebuffer();
  gl.bindFramebuffer(gl.FRAMEBUFFER, made);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  return made;
}

/* {program, at: name -> where that uniform is}. */
function program(gl, vertex, fragment) {
  const made = gl.createProgram(), places = new Map();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS) && !gl.isContextLost()) {
    const logs = gl.getAttachedShaders(made).map((shader) => gl.getShaderInfoLog(shader));
    throw new Error(`The graphics driver refused a shader: ${[gl.getProgramInfoLog(made), ...logs].join(" ").trim()}`);
  }
  const at = (name) => {
    if (!places.has(name)) places.set(name, gl.getUniformLocation(made, name));
    return places.get(name);
  };
  return { program: made, at };
}
