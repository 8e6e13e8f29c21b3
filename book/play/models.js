// The models of chapters 1, 5 and 7. Each `stream` yields what it has after a step.

import { linear } from "./layers.js";
import { argsort, choice, combine, sample } from "./sampling.js";
import { KVCache, Transformer } from "./transformer.js";

/** Vectors (N, D) of a table, by their numbers (N). */
function embedding({ shape: [, dim], data }, numbers) {
  const x = new Float32Array(numbers.length * dim);
  numbers.forEach((n, i) => x.set(data.subarray(n * dim, (n + 1) * dim), i * dim));
  return x;
}

/** One of equal parts of an array. */
function part(x, n, count) {
  return x.subarray(n * x.length / count, (n + 1) * x.length / count);
}

/** Logits of one row, or guided ones of two: away from those without a class. */
function guided(logits, rows, guidance) {
  if (rows === 1) return logits;
  return combine(part(logits, 0, 2), part(logits, 1, 2), guidance);
}

/** A GPT over the tokens of an image, row by row, after its class. */
export class ImageGPT {
  constructor(config, weights) {
    Object.assign(this, { config, length: config.height * config.width });
    this.classEmbedding = weights["class_embedding.weight"];
    this.tokens = weights["tokens.weight"];
    this.head = weights["head.weight"];
    this.transformer = new Transformer(config, weights, config.width);
  }

  /** Logits (B, K) of what follows a class or a token (B) and what is in B caches. */
  logits(inputs, caches) {
    const table = caches[0].filled ? this.tokens : this.classEmbedding;
    const hidden = this.transformer.forward(embedding(table, inputs), caches);
    return linear(hidden, this.head);
  }

  *stream({ label, guidance = 1, temperature = 1, topP = 1, random }) {
    const rows = guidance === 1 ? [label] : [label, this.config.classes], tokens = [];
    const caches = rows.map(() => new KVCache(this.config, this.length));
    for (let position = 0; position < this.length; position++) {
      const inputs = position ? rows.map(() => tokens[position - 1]) : rows;
      const logits = guided(this.logits(inputs, caches), rows.length, guidance);
      const token = sample(logits, { temperature, topP }, random.uniform());
      tokens.push(token);
      yield { tokens, chosen: [[position, choice(logits, token, temperature)]] };
    }
  }
}

/** How many tokens stay masked after a step, of `total` and `before` this step. */
export function stillMasked(total, before, step, steps) {
  if (step >= steps) return 0;
  const count = total * Math.cos(Math.PI / 2 * (step / steps));
  return Math.max(0, Math.min(before - 1, Math.floor(count + 1e-9)));
}

/** A transformer that sees all tokens at once, some of them masked. */
export class MaskGIT {
  constructor(config, weights) {
    Object.assign(this, { config, length: config.height * config.width });
    this.maskToken = config.codebook_size;
    this.classEmbedding = weights["class_embedding.weight"];
    this.tokens = weights["tokens.weight"];
    this.head = weights["head.weight"];
    this.transformer = new Transformer(config, weights, config.width, false);
  }

  /** Logits (K) at each of the positions of tokens (T), guided if there are two rows. */
  logitsAt(positions, tokens, rows, guidance) {
    const x = rows.map((row) => [
      ...embedding(this.classEmbedding, [row]),
      ...embedding(this.tokens, tokens),
    ]);
    const caches = rows.map(() => new KVCache(this.config, this.length + 1));
    const hidden = this.transformer.forward(Float32Array.from(x.flat()), caches);
    const { dim } = this.config;
    return positions.map((position) => {
      const at = rows.map((_, n) => {
        const start = (n * (this.length + 1) + position + 1) * dim;
        return [...hidden.subarray(start, start + dim)];
      });
      const logits = linear(Float32Array.from(at.flat()), this.head);
      return guided(logits, rows.length, guidance);
    });
  }

  *stream(
    {
      label,
      tokens,
      steps = 8,
      guidance = 1,
      noise = 4.5,
      temperature = 1,
      topP = 1,
      random,
    },
  ) {
    tokens = (tokens ?? Array(this.length).fill(null)).map((t) => t ?? this.maskToken);
    const masked = tokens.map((token) => token === this.maskToken);
    const rows = guidance === 1 ? [label] : [label, this.config.classes];
    const confidence = new Float32Array(this.length);
    const surest = () =>
      // masked positions by falling confidence
      argsort(confidence).filter((n) => masked[n]);
    const total = surest().length;
    for (let step = 1, left = total; left > 0; step++) {
      const before = left;
      left = stillMasked(total, before, step, steps);
      const at = surest();
      const logits = this.logitsAt(at, tokens, rows, guidance);
      const options = { temperature, topP };
      const drawn = logits.map((row) => sample(row, options, random.uniform()));
      const fading = noise * (1 - step / steps);
      at.forEach((position, n) => {
        const sum = logits[n].reduce(
          (a, b) => a + Math.exp(b - logits[n][drawn[n]]),
          0,
        );
        confidence[position] = -Math.log(sum) - fading * Math.log(random.exponential());
      });
      const chosen = surest().slice(0, before - left).map((position) => {
        const n = at.indexOf(position);
        tokens[position] = drawn[n];
        return [position, choice(logits[n], drawn[n], temperature)];
      });
      chosen.forEach(([position]) => masked[position] = false);
      yield { tokens, chosen };
    }
  }
}

/** A GPT over the colors of a square image, row by row, after a first color. */
export class PixelGPT {
  constructor(config, weights) {
    Object.assign(this, { config, length: config.size ** 2 });
    this.tokens = weights["gpt.tokens.weight"];
    this.transformer = new Transformer(
      config,
      weights,
      config.size,
      true,
      "gpt.transformer",
    );
  }

  /** Logits of the color that follows a color and those in the cache. */
  logits(color, caches) {
    const hidden = this.transformer.forward(embedding(this.tokens, [color]), caches);
    return linear(hidden, this.tokens);
  }

  *stream({ first, temperature = 1, topP = 1, random }) {
    const tokens = [first], cache = new KVCache(this.config, this.length);
    while (tokens.length < this.length) {
      const logits = this.logits(tokens[tokens.length - 1], [cache]);
      tokens.push(sample(logits, { temperature, topP }, random.uniform()));
      yield { tokens };
    }
  }

  /** Red, green and blue, 0 to 255, of a color. */
  rgb(color) {
    const { bits } = this.config, top = 2 ** bits - 1;
    return [2, 1, 0].map((n) => Math.round((color >> (n * bits) & top) / top * 255));
  }
}
