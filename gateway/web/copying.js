// Owns copying to the clipboard: by the clipboard's interface, or by a selection where the page may not use that.

/** A small button that copies what `textOf()` gives when it is pressed, and says so. */
export function copyButton(label, spoken, textOf) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "link-button";
  button.textContent = label;
  button.setAttribute("aria-label", spoken);
  let timer = 0;
  button.addEventListener("click", async () => {
    const isCopied = await copy(textOf());
    button.textContent = isCopied ? "Copied" : "Not copied";
    clearTimeout(timer);
    timer = setTimeout(() => { button.textContent = label; }, 1600);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // no clipboard outside a secure context: http:// on a local network
  }
}

function copyBySelection(text) {
  const back = document.activeElement;
  const field = document.createElement("textarea");
  field.className = "hidden";
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  back?.focus?.();
  return isCopied;
}
