// Owns the figures of an answer: time to first token, rate, tokens, longest gap. Reads beads, writes words.

export const number = (value, digits) =>
  value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
export const ms = (value) =>
  (value < 10 ? `${number(value, 1)} ms` : value < 1000 ? `${Math.round(value)} ms` : `${number(value / 1000, 2)} s`);

/**
 * Fills `.f-first`, `.f-rate`, `.f-tokens` and `.f-gap`.
 * @param {(name: string) => HTMLElement} part
 * @param {import("./beads.js").Beads} beads
 * @param {number | undefined} tokens as the server counted them
 * @param {number} lead tokens that the first bead stands for
 */
export function showFigures(part, beads, tokens, lead = 1) {
  const { times, gaps, askedAt } = beads;
  if (!times.length) return;
  const span = times.at(-1) - times[0];
  const counted = tokens ?? times.length;
  // Too few tokens, or too short a time, give no rate.
  const rate = counted > lead + 2 && span > 10 ? ((counted - lead) / span) * 1000 : 0;
  part("f-first").textContent = ms(times[0] - askedAt);
  part("f-rate").textContent = rate ? number(rate, rate < 10 ? 1 : 0) : "–";
  part("f-tokens").textContent = String(counted);
  part("f-gap").textContent = gaps.length ? ms(Math.max(...gaps)) : "–";
}

/** The server's own account, for who points at the figures. */
export function serversAccount(timing) {
  const told = ["time_to_first_token", "queue", "prefill", "decode", "total"]
    .map((name) => `${name.replaceAll("_", " ")} ${ms((timing[`${name}_s`] ?? 0) * 1000)}`);
  return `As the server counts: ${told.join(", ")}`;
}
