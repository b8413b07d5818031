/* Files that came with the page: beside it, or inside it where the page is a single file. */

const embedded = (name) => document.querySelector(`script[data-asset="${CSS.escape(name)}"]`);
const single = document.documentElement.hasAttribute("data-single");
const beside = () => (document.documentElement.dataset.assets || "").split(" ");

/* Whether a file of this name came with the page. */
export function hasAsset(name) {
  return single ? embedded(name) !== null : beside().includes(name);
}

/* Its bytes, a Uint8Array. */
export async function asset(name) {
  if (single) {
    const element = embedded(name);
    if (!element) throw new Error(`This page came without '${name}'.`);
    const text = atob(element.textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    element.remove(); // its text is as large as the bytes
    return bytes;
  }
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`'${name}' is missing beside this page (${answer.status}).`);
  return new Uint8Array(await answer.arrayBuffer());
}
