// Owns which turns of a conversation are sent, and with which of their pictures. Pure.

/**
 * Every exchange that has an answer in words, then the one that is asked now. Pictures of those left out between them, which
 * were asked for boxes or points or not answered at all, go along with the next turn: later questions may be about them.
 * @returns {{text: string, images: string[], answer: string | null, exchanges: object[]}[]}
 */
export function turnsOf(exchanges, asked) {
  const turns = [];
  let waiting = [];
  for (const one of exchanges) {
    if (one.asked.isText) continue;
    waiting.push(one);
    const isNow = one === asked;
    if (isNow || one.isTold) {
      turns.push({
        text: one.asked.text, images: waiting.flatMap((each) => each.asked.images ?? []),
        answer: isNow ? null : one.text, exchanges: waiting,
      });
      waiting = [];
    }
    if (isNow) break;
  }
  return turns;
}

/** How many of each turn's pictures go along where at most `most` may: the newest. */
export function sentPictures(turns, most) {
  let room = most;
  return turns.toReversed().map(({ images }) => {
    const count = Math.min(images.length, room);
    room -= count;
    return count;
  }).reverse();
}

export function questionItem(text, images) {
  const content = [{ type: "input_text", text }, ...images.map((image_url) => ({ type: "input_image", image_url }))];
  return { role: "user", content };
}
