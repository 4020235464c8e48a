// The page: collects images and a question, asks POST /v1/chat/completions and shows the answer as it comes.
"use strict"
const at = id => document.getElementById(id)
let turns = []      // what is sent: messages of the API
let chosen = []     // images of the next question: { name, url }
let running = null  // the AbortController of the request that is on its way
let model = ""

const headers = () => {
  const key = at("key").value.trim()
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) }
}

function fail(text) {
  at("error").textContent = text
  at("error").hidden = !text
}

async function messageOf(response) {
  const text = await response.text()
  try {
    return JSON.parse(text).error.message
  } catch {
    return `The server returned status ${response.status}. Try again.`
  }
}

async function learnModel() {
  const response = await fetch("/v1/models", { headers: headers() })
  if (!response.ok) throw new Error(await messageOf(response))
  model = (await response.json()).data[0].id
  at("title").textContent = document.title = model
}

// Images of the model's own report: one click puts image and question where they can be changed and asked.
async function showExamples() {
  const response = await fetch("/examples.json", { headers: headers() })
  if (!response.ok) return
  const examples = await response.json()
  at("examples").replaceChildren(...examples.map(example => {
    const item = document.createElement("li"), take = document.createElement("button")
    take.type = "button"
    take.append(picture({ url: example.image, name: "" }), example.question)
    take.onclick = () => {
      chosen = [{ name: "example image", url: example.image }]
      at("question").value = example.question
      showChosen()
      at("question").focus()
    }
    item.append(take)
    return item
  }))
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader()
    reader.onload = () => resolve(reader.result)
    reader.onerror = () => reject(new Error(`${file.name}: cannot be read. Choose it again.`))
    reader.readAsDataURL(file)
  })
}

async function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      fail(`${file.name}: not an image. Choose a JPEG, PNG or WebP file.`)
      continue
    }
    try {
      chosen.push({ name: file.name || "pasted image", url: await readFile(file) })
    } catch (error) {
      fail(error.message)
    }
  }
  showChosen()
}

function showChosen() {
  at("images").replaceChildren(...chosen.map((image, number) => {
    const item = document.createElement("li"), remove = document.createElement("button")
    remove.type = "button"
    remove.textContent = "×"
    remove.setAttribute("aria-label", `Remove ${image.name}`)
    remove.onclick = () => {
      chosen.splice(number, 1)
      showChosen()
      at("question").focus()
    }
    item.append(picture(image), remove)
    return item
  }))
}

function picture(image) {
  const shown = document.createElement("img")
  shown.src = image.url
  shown.alt = image.name
  return shown
}

function show(role, text, images = []) {
  const turn = document.createElement("div"), who = document.createElement("b"), said = document.createElement("span")
  turn.className = `turn ${role}`
  who.textContent = role === "user" ? "You" : "Model"
  said.textContent = text
  turn.append(who, said, ...images.map(picture))
  at("log").append(turn)
  at("hint").hidden = true
  at("log").scrollTop = at("log").scrollHeight
  return said
}

function setRunning(controller) {
  running = controller
  at("stop").hidden = !controller
  at("send").hidden = Boolean(controller)
  at("again").hidden = Boolean(controller) || turns.at(-1)?.role !== "assistant"
  at("log").setAttribute("aria-busy", String(Boolean(controller)))
}

// Yield the values of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let held = ""
  for (;;) {
    const { done, value } = await reader.read()
    if (done) return
    const lines = (held + value).split("\n")
    held = lines.pop()
    for (const line of lines) {
      if (line === "data: [DONE]") return
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6))
    }
  }
}

// Ask the turns so far; returns whether there is an answer, or a part of one.
async function answer() {
  const controller = new AbortController()
  setRunning(controller)
  fail("")
  at("status").textContent = "The model is answering."
  let text = "", reason = "", said = null
  try {
    if (!model) await learnModel()
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), signal: controller.signal,
      body: JSON.stringify({
        model, messages: turns, stream: true,
        temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value),
      }),
    })
    if (!response.ok) throw new Error(await messageOf(response))
    said = show("assistant", "")
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message)
      const choice = event.choices[0]
      if (!choice) continue
      reason = choice.finish_reason ?? reason
      text += choice.delta.content ?? ""
      said.textContent = text
      at("log").scrollTop = at("log").scrollHeight
    }
    if (!reason) throw new Error("The connection was lost. Try again.")
  } catch (error) {
    if (error.name !== "AbortError") fail(error instanceof TypeError ? "The server cannot be reached. Start it and try again." : error.message)
    else reason = "stopped"
  }
  const notes = { length: " [cut off]", stopped: " [stopped]" }
  if (said) {
    turns.push({ role: "assistant", content: text })
    said.textContent = text + (notes[reason] ?? (reason ? "" : " [interrupted]"))
  }
  at("status").textContent = said && reason ? "The answer is complete." : ""
  setRunning(null)
  at("question").focus()
  return Boolean(said)
}

at("form").addEventListener("submit", async event => {
  event.preventDefault()
  const text = at("question").value.trim()
  if (running || (!text && !chosen.length)) return
  const images = chosen
  turns.push({
    role: "user",
    content: [...images.map(image => ({ type: "image_url", image_url: { url: image.url } })), { type: "text", text }],
  })
  const shown = show("user", text, images).parentElement
  chosen = []
  at("question").value = ""
  showChosen()
  if (!await answer()) {  // not asked: the question goes back to where it can be changed
    turns.pop()
    shown.remove()
    chosen = [...images, ...chosen]
    if (!at("question").value) at("question").value = text
    showChosen()
    at("hint").hidden = turns.length > 0
    setRunning(null)
  }
})

at("stop").addEventListener("click", () => running?.abort())

at("again").addEventListener("click", async () => {
  if (running || turns.at(-1)?.role !== "assistant") return
  const before = turns.pop(), shown = at("log").lastElementChild
  shown.remove()
  if (!await answer()) {  // the answer that was there stays
    turns.push(before)
    at("log").append(shown)
    setRunning(null)
  }
})

at("new").addEventListener("click", () => {
  running?.abort()
  location.reload()
})

at("file").addEventListener("change", async () => {
  await addFiles([...at("file").files])
  at("file").value = ""
})

at("question").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault()
    at("form").requestSubmit()
  }
})

document.addEventListener("keydown", event => {
  if (event.key === "Escape") running?.abort()
})

document.addEventListener("paste", event => {
  const files = [...event.clipboardData.files]
  if (files.length) {
    event.preventDefault()
    addFiles(files)
  }
})

document.addEventListener("dragover", event => {
  event.preventDefault()
  at("form").classList.add("over")
})
document.addEventListener("dragleave", () => at("form").classList.remove("over"))
document.addEventListener("drop", event => {
  event.preventDefault()
  at("form").classList.remove("over")
  addFiles([...event.dataTransfer.files])
})

learnModel().then(showExamples).catch(error => fail(error.message))
