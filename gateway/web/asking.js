// Owns which door a question about pictures goes through, and the body it has there. Opens no sockets itself.

/** What an answer may be, and the capability that it needs. */
export const KINDS = {
  query: "Words", think: "Words, thinking first", detect: "Boxes", point: "Points", segment: "Outline",
};

/** Whether this model can be asked to think, and to point, before it answers about a picture. */
export const canThink = (model) => model.capabilities.includes("query") && model.thinking === "optional";

/** The kinds of answer that a model which looks at pictures can give in a conversation; none where there is no choice. */
export function kindsOf(model) {
  const can = (kind) => (kind === "think" ? canThink(model) : model.capabilities.includes(kind === "query" ? "chat" : kind));
  const kinds = model.takes_images ? Object.keys(KINDS).filter(can) : [];
  return kinds.length > 1 ? kinds : [];
}

/**
 * Asks one question about one picture. @param {{lanes, moondream}} links
 * @param {{task: string, text: string, image: string, length?: string, thinks?: boolean}} asked
 */
export function askAbout(links, model, asked, onEvent) {
  const { task, text, image } = asked;
  if (task === "segment") return links.moondream.ask("segment", { model: model.id, image_url: image, object: text }, onEvent);
  if (task === "query" && asked.thinks) {
    return links.moondream.ask("query", { model: model.id, image_url: image, question: text, reasoning: true }, onEvent);
  }
  const content = [{ type: "input_image", image_url: image }];
  if (task === "query") content.unshift({ type: "input_text", text });
  const degas = { task };
  if (task === "caption") degas.length = asked.length;
  else if (task !== "query") degas.object = text;
  return links.lanes.ask({ model: model.id, input: [{ role: "user", content }], degas, store: false }, onEvent);
}
