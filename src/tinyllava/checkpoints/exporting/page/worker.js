// The model in a thread of its own: loads it, answers, and streams the pieces to the page.
import {
  AutoModelForImageTextToText, AutoProcessor, InterruptableStoppingCriteria, RawImage, TextStreamer, env,
} from "./runtime/transformers.min.js"

env.allowRemoteModels = false
env.allowLocalModels = true
env.localModelPath = "./" // a whole address would be taken for the hub
env.useBrowserCache = false // it knows a file by its address alone, and another model may be served there
const runtime = new URL("runtime/ort-wasm-simd-threaded.asyncify", import.meta.url).href
env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` }

const LONGEST_PX = 4096
const stopping = new InterruptableStoppingCriteria()
let settings, processor, model, image

/** Pixels as the model was trained on them: EXIF's orientation, colours as stored, transparency on its colour. */
async function read(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" })
  const scale = Math.min(1, LONGEST_PX / Math.max(bitmap.width, bitmap.height))
  const width = Math.max(1, Math.round(bitmap.width * scale)), height = Math.max(1, Math.round(bitmap.height * scale))
  const canvas = new OffscreenCanvas(width, height).getContext("2d")
  if (settings.background) {
    canvas.fillStyle = `rgb(${settings.background})`
    canvas.fillRect(0, 0, width, height)
  }
  canvas.drawImage(bitmap, 0, 0, width, height)
  return new RawImage(canvas.getImageData(0, 0, width, height).data, width, height, 4).rgb()
}

/** Answer the last question of a conversation; returns token ids, text, and whether it ran into its limit. */
async function answer(turns, limit, told = () => {}) {
  const messages = turns.map(({ role, text }, place) => {
    const words = { type: "text", text: text.replaceAll("<image>", "image") } // the word stands for an image here
    return { role, content: place || !image ? [words] : [{ type: "image" }, words] }
  })
  const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true })
  const inputs = image ? await processor(image, prompt) : processor.tokenizer(prompt)
  const length = inputs.input_ids.dims.at(-1)
  if (length >= settings.context) throw new Error(`The conversation has ${length} tokens, but the context holds ${settings.context}. Start over.`)
  const streamer = new TextStreamer(processor.tokenizer, {
    skip_prompt: true, skip_special_tokens: true, callback_function: told,
  })
  stopping.reset()
  const output = await model.generate({
    ...inputs, do_sample: false, streamer, stopping_criteria: stopping,
    max_new_tokens: Math.min(limit, settings.context - length),
  })
  const ids = output.slice(0, [length, null]).tolist().map(Number)
  const text = processor.tokenizer.decode(ids, { skip_special_tokens: true }).trim()
  return { ids, text, isCut: !settings.ends.includes(ids.at(-1)) && !stopping.interrupted }
}

/** Open the model on a device and answer the example that was answered when the model was exported. */
async function open(device) {
  model = await AutoModelForImageTextToText.from_pretrained("model", {
    device, progress_callback: ({ status, file, progress }) => {
      if (status === "progress") postMessage({ kind: "loading", text: `${file} ${Math.floor(progress)}%` })
    },
  })
  image = await read(await (await fetch("example.png")).blob())
  const { ids } = await answer([{ role: "user", text: settings.example.question }], settings.example.ids.length)
  image = undefined
  return JSON.stringify(ids) === JSON.stringify(settings.example.ids)
}

async function start(wanted) {
  settings = await (await fetch("settings.json")).json()
  processor = await AutoProcessor.from_pretrained("model")
  let device = "wasm", why = ""
  const hasGpu = wanted !== "wasm" && await navigator.gpu?.requestAdapter()
  let isRight = false
  if (hasGpu) {
    try {
      isRight = await open("webgpu")
      device = isRight ? "webgpu" : device
      why = isRight ? "" : " (the GPU gives a different answer to the example)"
    } catch (error) {
      why = ` (the GPU cannot run the model: ${error.message})`
    }
    if (!isRight) await model?.dispose()
  }
  if (!isRight) isRight = await open("wasm")
  postMessage({ kind: "ready", name: settings.name, device, isRight, text: device + why })
}

async function handle(data) {
  try {
    if (data.kind === "start") await start(data.device)
    if (data.kind === "image") image = data.blob ? await read(data.blob) : undefined
    if (data.kind === "ask") {
      const told = text => postMessage({ kind: "piece", text })
      postMessage({ kind: "answer", ...await answer(data.turns, data.limit, told) })
    }
  } catch (error) {
    postMessage({ kind: "error", text: error.message ?? String(error) })
  }
}

let done = Promise.resolve() // one thing after the other, in the order in which they were asked
onmessage = ({ data }) => {
  if (data.kind === "stop") stopping.interrupt()
  else done = done.then(() => handle(data))
}
