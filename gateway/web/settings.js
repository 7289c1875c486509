// Owns the settings of the conversation, folded away: system prompt and sampling. What is empty is left to the model.

const FIELDS = {
  temperature: { key: "temperature", usual: (defaults) => (defaults.temperature === 0 ? "0, greedy" : defaults.temperature) },
  "top-p": { key: "top_p", usual: (defaults) => defaults.top_p },
  "max-tokens": { key: "max_output_tokens", usual: (defaults) => defaults.max_tokens },
  seed: { key: "seed", usual: () => "any" },
};
const byId = (id) => document.getElementById(id);

export class Settings {
  /** @param {() => void} onChange */
  constructor(onChange) {
    this.panel = byId("settings");
    this.toggle = byId("settings-toggle");
    this.system = byId("system-prompt");
    this.thinking = byId("thinking-choice");
    this.inputs = Object.entries(FIELDS).map(([id, field]) => ({ input: byId(id), ...field }));
    this.toggle.addEventListener("click", () => this.open(this.panel.hidden));
    byId("settings-reset").addEventListener("click", () => {
      this.restore({});
      onChange();
    });
    this.panel.addEventListener("input", () => {
      this.count();
      onChange();
    });
    this.panel.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.open(false);
      // Enter in a field would send the message.
      else if (event.key === "Enter" && event.target instanceof HTMLInputElement) event.preventDefault();
      else return;
      event.stopPropagation();
    });
  }

  open(isOpen) {
    this.panel.hidden = !isOpen;
    this.toggle.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) this.system.focus();
    else if (this.panel.contains(document.activeElement) || document.activeElement === document.body) this.toggle.focus();
  }

  /** Shows what the model does where a field is empty. */
  serve(model, converses) {
    this.system.closest("label").hidden = !converses;
    // A model that is asked about pictures thinks for one question at a time: the composer offers that.
    const canChoose = converses && model.thinking === "optional" && !model.capabilities.includes("query");
    this.thinking.closest("label").hidden = !canChoose;
    if (!canChoose) this.thinking.value = "";
    this.count();
    const defaults = model.defaults ?? {};
    for (const { input, usual } of this.inputs) input.placeholder = String(usual(defaults) ?? "");
    byId("max-tokens").max = String(model.context_tokens ?? "");
  }

  /** The fields of a request; opens the panel at a field that the server would refuse, and returns null. */
  read() {
    const wrong = this.inputs.find(({ input }) => !input.checkValidity());
    if (wrong) {
      this.open(true);
      wrong.input.reportValidity();
      return null;
    }
    const body = {};
    for (const { input, key } of this.inputs) if (input.value !== "") body[key] = input.valueAsNumber;
    if (this.thinking.value) body.reasoning = { effort: this.thinking.value };
    if (this.system.value.trim()) body.instructions = this.system.value.trim();
    return body;
  }

  count() {
    const set = [this.system, this.thinking, ...this.inputs.map(({ input }) => input)].filter((field) => field.value.trim() !== "").length;
    byId("settings-count").textContent = set ? String(set) : "";
    byId("settings-count").hidden = !set;
    byId("settings-reset").disabled = !set;
  }

  kept() {
    return Object.fromEntries([["system", this.system.value], ["thinking", this.thinking.value], ...this.inputs.map(({ input, key }) => [key, input.value])]);
  }

  restore(kept) {
    this.system.value = kept.system ?? "";
    this.thinking.value = kept.thinking ?? "";
    for (const { input, key } of this.inputs) input.value = kept[key] ?? "";
    this.count();
  }
}
