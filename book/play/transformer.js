// Chapter 1's transformer: vectors (B, T, D), one after the other in a Float32Array.

import { gelu, layerNorm, linear, softmax } from "./layers.js";

/** Keys and values of a sequence as far as it was read, one pair for each layer. */
export class KVCache {
  constructor(config, length) {
    const empty = () => new Float32Array(length * config.dim);
    this.keys = Array.from({ length: config.depth }, empty);
    this.values = Array.from({ length: config.depth }, empty);
    this.filled = 0;
  }
}

/** Each position attends to all others, or in a causal model to those before it. */
class Attention {
  constructor(config, weights, name, causal) {
    this.heads = config.heads;
    this.dim = config.dim;
    this.causal = causal;
    this.qkv = weights[`${name}.qkv.weight`];
    this.proj = weights[`${name}.proj.weight`];
  }

  forward(x, caches, layer) {
    const { dim } = this, T = x.length / dim / caches.length;
    const qkv = linear(x, this.qkv), y = new Float32Array(x.length);
    caches.forEach((cache, n) => {
      const part = qkv.subarray(3 * dim * T * n, 3 * dim * T * (n + 1));
      const keys = cache.keys[layer], values = cache.values[layer];
      for (let t = 0; t < T; t++) {
        const from = 3 * dim * t, to = (cache.filled + t) * dim;
        keys.set(part.subarray(from + dim, from + 2 * dim), to);
        values.set(part.subarray(from + 2 * dim, from + 3 * dim), to);
      }
      this.attend(part, keys, values, cache.filled, y.subarray(dim * T * n), T);
    });
    return linear(y, this.proj);
  }

  /** Adds to y (T, D) what each of T queries finds among keys and values. */
  attend(q, keys, values, start, y, T) {
    const { dim, heads } = this, size = dim / heads, scale = 1 / Math.sqrt(size);
    const scores = new Float32Array(start + T);
    for (let t = 0; t < T; t++) {
      const seen = scores.subarray(0, this.causal ? start + t + 1 : start + T);
      for (let at = 0; at < dim; at += size) { // a head after the other
        const query = 3 * dim * t + at, to = dim * t + at;
        for (let s = 0; s < seen.length; s++) {
          let sum = 0;
          for (let i = 0; i < size; i++) sum += q[query + i] * keys[s * dim + at + i];
          seen[s] = sum * scale;
        }
        softmax(seen);
        for (let s = 0; s < seen.length; s++) {
          const share = seen[s], from = s * dim + at;
          for (let i = 0; i < size; i++) y[to + i] += share * values[from + i];
        }
      }
    }
  }
}

/** GPT-2's feed-forward layer. */
class MLP {
  constructor(weights, name) {
    this.up = weights[`${name}.up.weight`];
    this.down = weights[`${name}.down.weight`];
  }

  forward(x) {
    return linear(gelu(linear(x, this.up)), this.down);
  }
}

/** Attention, then an MLP, each added to the residual stream. */
class Block {
  constructor(config, weights, name, causal) {
    this.attention = new Attention(config, weights, `${name}.attention`, causal);
    this.mlp = new MLP(weights, `${name}.mlp`);
    this.norm1 = weights[`${name}.norm1.weight`];
    this.norm2 = weights[`${name}.norm2.weight`];
  }

  forward(x, ...context) {
    x = add(x, this.attention.forward(layerNorm(x, this.norm1), ...context));
    return add(x, this.mlp.forward(layerNorm(x, this.norm2)));
  }
}

/** The sum of two arrays, in the first one. */
export function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
}

/** Positions of a grid, blocks, a last norm. */
export class Transformer {
  constructor(config, weights, columns, causal = true, name = "transformer") {
    const known = { bias: false, norm: "layer", mlp: "gelu", positions: "rowcol" };
    for (const [key, value] of Object.entries(known)) {
      if (config[key] !== value) {
        throw new Error(`this page draws with ${key} ${value}, found ${config[key]}`);
      }
    }
    Object.assign(this, { config, columns });
    this.row = weights[`${name}.positions.row`].data;
    this.column = weights[`${name}.positions.column`].data;
    this.blocks = Array.from(
      { length: config.depth },
      (_, n) => new Block(config, weights, `${name}.blocks.${n}`, causal),
    );
    this.norm = weights[`${name}.norm.weight`];
  }

  /** Vectors (B, T, D), which follow those in B caches, to hidden states. */
  forward(x, caches) {
    const { dim } = this.config, T = x.length / dim / caches.length;
    const start = caches[0].filled;
    for (let n = 0; n < x.length / dim; n++) {
      const position = start + n % T;
      const row = Math.floor(position / this.columns) * dim;
      const column = position % this.columns * dim;
      for (let i = 0; i < dim; i++) {
        x[n * dim + i] += this.row[row + i] + this.column[column + i];
      }
    }
    this.blocks.forEach((block, layer) => x = block.forward(x, caches, layer));
    for (const cache of caches) cache.filled = start + T;
    return layerNorm(x, this.norm);
  }
}
