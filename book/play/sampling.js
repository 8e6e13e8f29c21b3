// Chapter 1's sampler, for one row of logits at a time.

import { softmax } from "./layers.js";

/** Random numbers that a seed repeats (mulberry32); not those of PyTorch. */
export class Random {
  constructor(seed) {
    this.state = seed >>> 0;
  }

  /** A number from 0 to below 1. */
  uniform() {
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let t = this.state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }

  /** An exponential number, above 0. */
  exponential() {
    return -Math.log(1 - this.uniform()) || 2 ** -32;
  }
}

/** The indexes of an array by falling value; equal ones as they came. */
export function argsort(values) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
}

/** Logits with all but the best set to -Infinity, in place. */
export function filterLogits(logits, topP) {
  if (!(topP < 1)) return logits;
  const order = argsort(logits), mass = softmax(Float32Array.from(logits));
  let better = 0;
  order.forEach((token, rank) => {
    if (rank && better >= topP) logits[token] = -Infinity;
    better = Math.fround(better + mass[token]);
  });
  return logits;
}

/** An index, drawn in proportion to probabilities with a number from 0 to 1. */
export function sampleCategorical(probabilities, uniform) {
  const cumulative = new Float32Array(probabilities.length);
  let sum = 0;
  probabilities.forEach((p, n) => cumulative[n] = sum = Math.fround(sum + p));
  const threshold = Math.fround(uniform * sum);
  return cumulative.findIndex((value) => value > threshold);
}

/** A token for logits, with a random number from 0 to 1; 0 takes the likeliest. */
export function sample(logits, { temperature = 1, topP = 1 }, uniform) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!Number.isFinite(largest)) {
    throw new Error("the model's logits are not finite: its weights are damaged");
  }
  if (temperature === 0) return logits.indexOf(largest);
  const scaled = logits.map((value) => (value - largest) / temperature);
  return sampleCategorical(softmax(filterLogits(scaled, topP)), uniform);
}

/** Guided logits: away from those without a class, by a scale; 1 is none. */
export function combine(conditional, unconditional, scale) {
  return conditional.map((c, n) => unconditional[n] + scale * (c - unconditional[n]));
}

/** What a reader may ask of a choice: its probability, and the ten likeliest tokens. */
export function choice(logits, token, temperature = 1) {
  const p = softmax(logits.map((value) => value / (temperature || 1)));
  const best = argsort(p).slice(0, 10).map((other) => [other, p[other]]);
  return { token, probability: p[token], best };
}
