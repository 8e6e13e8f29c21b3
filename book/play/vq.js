// The decoder of chapter 4: tokens to an image.

import { conv2d, groupNorm, silu, softmax, upsample } from "./layers.js";
import { add } from "./transformer.js";

const MULTIPLIERS = { 4: [1, 2, 4], 8: [1, 2, 2, 4], 16: [1, 1, 2, 2, 4] };

/** Two convolutions beside a skip connection, 1 x 1 where the width changes. */
function residualBlock(part, x) {
  let h = conv2d(silu(groupNorm(x, ...part("norm1"))), ...part("conv1"));
  h = conv2d(silu(groupNorm(h, ...part("norm2"))), ...part("conv2"));
  const [weight, bias] = part("skip");
  add(h.data, (weight ? conv2d(x, weight, bias) : x).data);
  return h;
}

/** Each position of a small image attends to all of them, with one head. */
function attentionBlock(part, x) {
  const qkv = conv2d(groupNorm(x, ...part("norm")), ...part("qkv")).data;
  const { channels: C } = x, T = x.height * x.width, y = new Float32Array(C * T);
  const [q, k, v] = [0, 1, 2].map((n) => qkv.subarray(n * C * T, (n + 1) * C * T));
  const scores = new Float32Array(T);
  for (let t = 0; t < T; t++) {
    scores.fill(0);
    for (let c = 0; c < C * T; c += T) {
      for (let s = 0; s < T; s++) scores[s] += q[c + t] * k[c + s];
    }
    for (let s = 0; s < T; s++) scores[s] /= Math.sqrt(C);
    softmax(scores);
    for (let c = 0; c < C * T; c += T) {
      let sum = 0;
      for (let s = 0; s < T; s++) sum += scores[s] * v[c + s];
      y[c + t] = sum;
    }
  }
  const added = conv2d({ ...x, data: y }, ...part("proj"));
  add(added.data, x.data);
  return added;
}

/** The half of a tokenizer that draws; its encoder stays in Python. */
export class VQModel {
  constructor(config, weights) {
    this.config = config;
    this.codebook = weights["quantizer.codebook"];
    const part = (n) => (name) => {
      const key = ["decoder", n, name].filter((word) => word !== "").join(".");
      return [weights[`${key}.weight`], weights[`${key}.bias`]];
    };
    const conv = (n) => (x) => conv2d(x, ...part(n)(""));
    this.layers = [];
    const addLayer = (make) => this.layers.push(make(this.layers.length));
    const residual = (n) => (x) => residualBlock(part(n), x);
    const attention = (n) => (x) => attentionBlock(part(n), x);
    const levels = MULTIPLIERS[config.downsample].length;
    [conv, conv, residual, attention, residual].forEach(addLayer);
    for (let level = 0; level < levels; level++) {
      for (let n = 0; n <= config.blocks; n++) {
        addLayer(residual);
        if (level === 0) addLayer(attention);
      }
      if (level < levels - 1) addLayer((n) => (x) => conv(n)(upsample(x)));
    }
    addLayer((n) => (x) => silu(groupNorm(x, ...part(n)(""))));
    addLayer(() => (x) => x); // its SiLU is in the layer before
    addLayer(conv);
  }

  /** The code (d, h, w) of each of tokens (h * w). */
  embed(tokens, height) {
    const { shape: [, channels], data: codes } = this.codebook, T = tokens.length;
    const data = new Float32Array(channels * T);
    for (let t = 0; t < T; t++) {
      for (let c = 0; c < channels; c++) {
        data[c * T + t] = codes[tokens[t] * channels + c];
      }
    }
    return { data, channels, height, width: T / height };
  }

  /** Tokens (h * w) to an image of red, green, blue and opacity, 0 to 255. */
  decode(tokens, height) {
    const image = this.layers.reduce(
      (x, layer) => layer(x),
      this.embed(tokens, height),
    );
    const pixels = image.height * image.width;
    const rgba = new Uint8ClampedArray(4 * pixels).fill(255);
    for (let c = 0; c < 3; c++) {
      for (let i = 0; i < pixels; i++) {
        rgba[4 * i + c] = Math.round((image.data[c * pixels + i] + 1) / 2 * 255);
      }
    }
    return { rgba, height: image.height, width: image.width };
  }
}
