"""The model card: the parts of a model and their licences, its training, and its scores.

All of it comes from files next to the checkpoint: config.json, run.json, import.json and results.json.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from tinyllava.config import COMPONENTS, DataConfig, Run, Tune, run_from_json
from tinyllava.data.mixtures import LICENCES, MIXTURES
from tinyllava.data.readers.hub import is_hub_name
from tinyllava.data.sources import parse_source
from tinyllava.errors import CheckpointError
from tinyllava.evaluation.results import Metric, Result, ResultTable
from tinyllava.files import read_object
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.parts.folders import read_config
from tinyllava.parts.language import LANGUAGE_MODELS, LanguageModel
from tinyllava.parts.resolve import known_parts
from tinyllava.parts.vision import VISION_ENCODERS, VisionEncoder

_UNKNOWN = "not recorded"
_FORMATS = (
    "`tinyllava export` can write the model in these formats. Agreement is the largest difference between "
    "the export and the original checkpoint on an example prompt.\n\n"
)
_SUMMARY = (
    "A small multimodal model that answers questions about images. It consists of a vision encoder, a "
    "connector and a small language model (TinyLLaVA, arXiv:2402.14289)."
)
_USE = {
    "llava": """```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
content = [{{"type": "image", "path": "image.jpg"}}, {{"type": "text", "text": "What is in the image?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```""",
    "vllm": """```console
$ vllm serve {name}
```""",
    "onnx": """With transformers.js in Node (for browsers, export with `--format web`):

```js
import {{ AutoProcessor, AutoModelForImageTextToText, load_image }} from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{path}");
const model = await AutoModelForImageTextToText.from_pretrained("{path}");
const content = [{{ type: "image" }}, {{ type: "text", text: "What is in the image?" }}];
const messages = [{{ role: "user", content }}];
const prompt = processor.apply_chat_template(messages, {{ add_generation_prompt: true }});
const inputs = await processor(await load_image("image.jpg"), prompt);
const output = await model.generate({{ ...inputs, max_new_tokens: 64, do_sample: false }});
const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(answer, {{ skip_special_tokens: true }})[0]);
```

`onnx/vision_encoder` takes the raw pixels of an image of any size (`[1, 3, height, width]`, RGB, 0 to 255).
The graph pads, resizes and normalises them. Scale images down to at most 4096 pixels a side first, and put
transparent images on a background. Pass images of different sizes one at a time. OpenVINO can run the graphs
too. Set its `INFERENCE_PRECISION_HINT` to `f32`, because it computes in 16 bits on some CPUs otherwise.""",
    "web": """```console
{fetch}$ python -m http.server --bind 127.0.0.1 --directory {folder} 8000
```

Open http://127.0.0.1:8000 in a browser. Any web server works. The page loads nothing from other sites, and
images and questions stay on the device. The page uses WebGPU if the browser supports it and if it gives the
same answer to a built-in example as the exported model. Otherwise it uses WebAssembly. `?device=wasm` forces
WebAssembly.""",
    "gguf": """```console
{fetch}$ llama-server -m {folder}/model.gguf --mmproj {folder}/mmproj.gguf --jinja
```""",
    "tinyllava": """```console
{fetch}$ tinyllava chat image.jpg "What is in the image?" --model {folder}
```""",
}


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a checkpoint, read from the files of its folder."""

    run: Run | None
    imported_from: str
    """The layout that it was imported from; empty for one that was trained here."""
    names: dict[str, str]
    """What the imported checkpoint calls its encoder and its language model; empty where it does not say."""
    results: tuple[Result, ...]
    licences: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Of data that is in no table: by record file, those of the checkpoint below under an empty name."""
    adapter: str = ""
    """In words, the adapter that is merged into the weights."""


def read_provenance(folder: Path, results: Path | None, adapter: Path | None = None) -> Provenance:
    """Read the files next to a checkpoint.

    Args:
        folder: of the checkpoint, or of the one below an adapter.
        results: None takes a results.json beside the weights, if any.
        adapter: of peft, merged into the weights; what the checkpoint below it scored is no score of both.

    Raises:
        ConfigError, DataError, CheckpointError: a file is there and cannot be read.
    """
    run_file, import_file = folder / "run.json", folder / "import.json"
    run = run_from_json(run_file.read_text(encoding="utf-8"), str(run_file)) if run_file.is_file() else None
    imported = read_config(folder, "import.json") if import_file.is_file() else {"kind": ""}
    if "kind" not in imported:
        raise CheckpointError(
            f"{import_file}: has no 'kind', the layout of the source. Import the checkpoint again."
        )
    beside = (adapter or folder) / "results.json"
    if results is None and beside.is_file():
        results = beside
    return Provenance(
        run=run,
        imported_from=str(imported["kind"]),
        names={part: str(imported.get(part) or "") for part in ("vision_encoder", "language_model")},
        results=ResultTable.load(results).results if results else (),
        licences={k: v for k, v in (read_object(folder / LICENCES) or {}).items() if isinstance(v, dict)},
        adapter=_describe_adapter(adapter) if adapter else "",
    )


def _describe_adapter(folder: Path) -> str:
    config = read_config(folder, "adapter_config.json")
    return f"{config.get('peft_type', 'peft')} adapter of rank {config.get('r', _UNKNOWN)}"


def write_card(
    name: str,
    layout: str,
    model: TinyLlavaForConditionalGeneration,
    provenance: Provenance,
    formats: list[list[str]],
    measured: str = "",
    told: str = "",
) -> str:
    """Return the text of README.md.

    Args:
        name: what the card calls the model, and what its examples open.
        layout: tinyllava, llava, vllm, onnx, web or gguf.
        formats: the table of formats, its head first.
        measured: how closely the folder agrees with the checkpoint, where that is not exactly.
        told: sections on how this layout is used, if any.
    """
    parts = _parts(provenance, model)
    folder = name.rpartition("/")[2]
    fetch = f"$ hf download {name} --local-dir {folder}\n" if "/" in name else ""
    path = name if "/" in name else f"./{name}"  # transformers.js takes a bare name for one of the hub
    sections = [
        f"# {folder}",
        _SUMMARY,
        "## Use\n\n" + _USE[layout].format(name=name, folder=folder, fetch=fetch, path=path),
        *([f"## Agreement\n\nThe export was compared with the checkpoint: {measured}."] if measured else []),
        *([told] if told else []),
        "## Parts\n\n" + _parts_table(model, parts, _given_names(provenance)),
        "## Training\n\n" + _training(provenance),
        "## Scores\n\n" + _scores(provenance.results),
        "## Formats\n\n" + _FORMATS + _table(formats[0], formats[1:]),
        "## Licences\n\n" + _licences(provenance, parts),
    ]
    return f"---\n{_metadata(name, layout, provenance, parts)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _given_names(provenance: Provenance) -> dict[str, str]:
    """Return the names of encoder and language model in the run or import, without local folders."""
    model = provenance.run.model if provenance.run else None
    if model is None:
        return provenance.names
    names = {"vision_encoder": model.vision_encoder, "language_model": model.language_model}
    return {part: name.rstrip("/").rpartition("/")[2] for part, name in names.items()}


def _parts(
    provenance: Provenance, built: TinyLlavaForConditionalGeneration
) -> dict[str, VisionEncoder | LanguageModel | None]:
    """Return the table rows of encoder and language model; None for a part that is not in the tables.

    A local folder is one of the table by its name where width and depth agree too.
    """
    named = vars(provenance.run.model) if provenance.run else provenance.names
    encoder, language = known_parts(named["vision_encoder"], named["language_model"])
    local = _given_names(provenance)
    for row in VISION_ENCODERS.values() if encoder is None else ():
        is_named = local["vision_encoder"].startswith((row.path.rpartition("/")[2], f"{row.name}-"))
        if is_named and built.config.vision_width == row.width:
            encoder = row
    text = built.config.text_config
    for model_row in LANGUAGE_MODELS.values() if language is None else ():
        is_same = (text.hidden_size, text.num_hidden_layers) == (model_row.width, model_row.num_layers)
        if local["language_model"] == model_row.path.rpartition("/")[2] and is_same:
            language = model_row
    return {"vision_encoder": encoder, "language_model": language}


def _parts_table(
    model: TinyLlavaForConditionalGeneration,
    parts: dict[str, VisionEncoder | LanguageModel | None],
    given: dict[str, str],
) -> str:
    names = {
        "vision_encoder": model.config.vision_config.model_type,
        "connector": f"{model.config.connector}, {model.config.num_image_tokens} tokens per image",
        "language_model": model.config.text_config.model_type,
    }
    rows = []
    for component in COMPONENTS:
        part = parts.get(component)
        modules = [getattr(model, component)] + ([model.lm_head] if component == "language_model" else [])
        # A head that shares the embedding's rows is the same parameter and counts once.
        parameters = {id(p): p.numel() for module in modules for p in module.parameters()}
        label = _label(part) if part else _named(given.get(component, ""), names[component])
        rows.append([component.replace("_", " "), label, f"{sum(parameters.values()):,}"])
    return _table(["part", "model", "parameters"], rows)


def _named(name: str, family: str) -> str:
    """Return the name of a part that is in no table, with its architecture."""
    return f"{name} ({family})" if name and "/" not in name else name or family


def _label(part: VisionEncoder | LanguageModel) -> str:
    paths = _paths(part)
    return f"{part.name} ({', '.join(paths)})" if paths else part.name


def _paths(part: VisionEncoder | LanguageModel) -> list[str]:
    """Return the hub names that a part is made of; one out of a Python package has none."""
    members = (part.members if isinstance(part, VisionEncoder) else ()) or (part,)
    return [member.path for member in members if not member.path.startswith("starter:")]


def _training(provenance: Provenance) -> str:
    told = _trained(provenance)
    if not provenance.adapter:
        return told
    return f"{told}\n\nA {provenance.adapter} was merged into the weights. Its training is {_UNKNOWN}."


def _trained(provenance: Provenance) -> str:
    run = provenance.run
    if run is None:
        if provenance.imported_from:
            return f"Imported from {provenance.imported_from}. See the publisher for data and recipe."
        return f"{_UNKNOWN.capitalize()}: the checkpoint has no run.json."
    start = Path(run.start_from)
    start_name = start.parent.name if start.name == "model" else start.name
    before = (
        f" It started from the checkpoint `{start_name}`, whose own training is not listed."
        if start_name
        else ""
    )
    recipe = f"Recipe `{run.recipe}`, seed {run.seed}." if run.recipe else f"Seed {run.seed}."
    rows = [
        [
            name,
            ", ".join(_data_names(stage.data)) or _UNKNOWN,
            ", ".join(f"{c.replace('_', ' ')} {_tuning(stage.tune(c))}" for c in COMPONENTS),
            f"{stage.learning_rate:g}",
            str(stage.global_batch_size),
            stage.length,
        ]
        for name, stage in run.stages.items()
    ]
    header = ["stage", "data", "tuning", "learning rate", "batch size", "length"]
    return f"{recipe}{before}\n\n{_table(header, rows)}"


def _data_names(data: DataConfig) -> list[str]:
    """Return names of mixtures, or of files without their local folders."""
    return [parse_source(record).label for record in data.records]


def _tuning(tune: Tune) -> str:
    if tune.kind == "lora":
        return f"LoRA of rank {tune.rank}"
    return f"from layer {tune.first_layer}" if tune.kind == "from_layer" else tune.kind


def _scores(results: Iterable[Result]) -> str:
    rows = [[r.benchmark, r.metric, *_score(r), r.protocol, _remark(r)] for r in results]
    if not rows:
        return f"{_UNKNOWN.capitalize()}."
    header = ["benchmark", "metric", "score", "95% interval", "questions", "protocol", "remark"]
    return _table(header, rows)


def _score(result: Result) -> list[str]:
    metric: Metric | None = next((m for m in result.metrics if m.name == result.metric), None)
    if metric is None:
        return [_UNKNOWN, "", f"{result.num_questions:,}"]
    interval = f"{metric.interval[0]:.1f} to {metric.interval[1]:.1f}" if metric.interval else ""
    return [f"{metric.value:.1f}", interval, f"{metric.num_questions:,}"]


def _remark(result: Result) -> str:
    partial = [f"{result.num_questions} of {result.num_expected} questions"] if result.is_partial else []
    return "; ".join([*partial, *([f"judge {result.judge}"] if result.judge else []), *result.notes])


def _licences(provenance: Provenance, parts: dict[str, VisionEncoder | LanguageModel | None]) -> str:
    run = provenance.run
    rows = [[name.replace("_", " "), part.licence if part else _UNKNOWN] for name, part in parts.items()]
    for stage in run.stages.values() if run else ():
        for record in stage.data.records:
            source = parse_source(record).name
            name = source if source in MIXTURES or is_hub_name(source) else Path(source).name
            known = {name: MIXTURES[source].licence} if source in MIXTURES else provenance.licences.get(name)
            rows += [[f"data: {data}", licence] for data, licence in (known or {name: _UNKNOWN}).items()]
    rows += [[f"data: {data}", licence] for data, licence in provenance.licences.get("", {}).items()]
    if "" not in provenance.licences and (provenance.imported_from or (run and run.start_from)):
        rows.append(["the source checkpoint and its data", _UNKNOWN])
    unique = list(dict.fromkeys(map(tuple, rows)))
    note = "The model is derived from all of these. Each of their licences applies to its use."
    return _table(["part or data", "licence"], [list(row) for row in unique]) + f"\n\n{note}"


def _metadata(
    name: str, layout: str, provenance: Provenance, parts: dict[str, VisionEncoder | LanguageModel | None]
) -> str:
    known = [part for part in parts.values() if part]
    stages = provenance.run.stages.values() if provenance.run else ()
    records = [parse_source(record).name for stage in stages for record in stage.data.records]
    mixtures = [MIXTURES[r] for r in dict.fromkeys(records) if r in MIXTURES]
    data = ModelCardData(
        model_name=name.rpartition("/")[2] if provenance.results else None,
        library_name={
            "tinyllava": "tinyllava",
            "onnx": "transformers.js",
            "web": "transformers.js",
            "gguf": "gguf",
        }.get(layout, "transformers"),
        pipeline_tag="image-text-to-text",
        tags=["tinyllava", "multimodal"],
        base_model=[path for part in known for path in _paths(part)] or None,
        datasets=list(dict.fromkeys("/".join(m.source.split("/")[-2:]) for m in mixtures)) or None,
        license="other",  # the parts and the data have one each, and the field holds one
        license_name="licences-of-the-parts",
        license_link="README.md",
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=r.benchmark.lower(),
                dataset_name=r.benchmark,
                dataset_split=r.split,
                metric_type=r.metric,
                metric_value=round(r.value, 2),
            )
            for r in provenance.results
            if r.value is not None
        ]
        or None,
    )
    return str(data.to_yaml()).strip()


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
