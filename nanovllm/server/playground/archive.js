// Conversations as files, and in this tab's storage.

const KEPT = "nanovllm.kept";

/** Offer `content` to the reader as a JSON file. */
export function download(name, content) {
  const file = new Blob([JSON.stringify(content, null, 2)], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Read a file that `download` wrote, or any other with OpenAI's `messages`. */
export async function readConversation(file) {
  const content = JSON.parse(await file.text());
  if (!Array.isArray(content?.messages)) throw new Error("it has no list of messages");
  const exchanges = [];
  let system = "";
  for (const { role, content: text } of content.messages) {
    const last = exchanges.at(-1);
    if (typeof text !== "string") throw new Error("a message has no text");
    if (role === "system" && !last) system = text;
    else if (role === "user") exchanges.push({ prompt: text, answer: "" });
    else if (role === "assistant" && last && !last.answer) last.answer = text;
    else throw new Error("its messages do not alternate between user and assistant");
  }
  const mode = content.mode === "complete" ? "complete" : "chat";
  return { mode, system, parameters: content.parameters, exchanges: { [mode]: exchanges } };
}

/** Keep what the page holds until the tab is closed, so that a reload loses nothing. */
export function keep(content) {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(content));
  } catch {
    sessionStorage.removeItem(KEPT); // too long to store, and what was kept before is out of date
  }
}

export const readKept = () => JSON.parse(sessionStorage.getItem(KEPT));
