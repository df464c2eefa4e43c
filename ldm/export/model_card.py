"""The model card of a diffusion run: README.md with the metadata of the Hugging Face Hub."""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ldm.errors import UserError
from ldm.evaluation.evaluation_file import metrics_from_json
from ldm.files.untrusted import read_json, to_one_line
from ldm.metrics.metric import Metric
from ldm.runs.lineage import run_weights_sha256
from ldm.runs.run import EVALUATION_FILE, Run
from ldm.sampling.pipeline import LatentDiffusion

CARD_FILE = "README.md"
SAMPLES_FILE = "samples.png"
METRICS = {
    "fd_samples": "FD",
    "kd_samples": "KD",
    "cmmd_samples": "CMMD",
    "precision_samples": "precision",
    "recall_samples": "recall",
    "retrieval_at_1_held_out_samples": "retrieval @1, held-out captions",
    "class_accuracy_samples": "accuracy of the classes",
    "close_share_samples": "share of samples close to a training image",
    "bits_per_dim": "bits per dimension",
}
"""Metrics that the card lists, and their labels."""
RESULT_SETTINGS = ("features", "num_samples", "reference", "num_images")
PATH_KEYS = {"_name_or_path", "name_or_path"}
CONFIG_KEYS = (
    *("network", "schedule", "objective", "variance", "conditioning", "optimizer", "batch_size", "seed", "init_from"),
    *("latent_statistics", "trainer"),
)
"""Options of stage 2 that the card lists."""
LICENCES = ("cc-by-nc-sa-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-4.0", "cc0-1.0", "apache-2.0", "mit")
"""Identifiers of licences on the Hub that are recognised in the description of a licence."""
TASKS = {"text": "text-to-image", "class": "unconditional-image-generation", "none": "unconditional-image-generation"}


def model_card(run: Run, pipeline: LatentDiffusion, name: str, *, is_native: bool, licence: str | None) -> ModelCard:
    """Describe a finished run: how to use the model, its data, training, metrics and limits.

    Args:
        name: Folder or Hub id of the exported pipeline, for the example.
        is_native: True if the pipeline contains code; False for a stock pipeline of diffusers.
        licence: Licence of the weights, as an identifier of the Hub. None derives it from that of the images, unless
            the training started from other weights.
    """
    facts, kind, resolution = run.facts, pipeline.conditioning.kind, pipeline.contract.resolution
    source, data = run.config().get("init_from"), to_one_line(str(facts.get("data")))
    licence = licence or (None if source else _hub_licence(facts.get("accounting", {}).get("licence")))
    metrics, results = _metrics(run)
    metadata = ModelCardData(
        license=licence or "other",
        license_name=None if licence else "unknown",
        library_name="diffusers",
        pipeline_tag=TASKS[kind],
        tags=["latent-diffusion", "ldm-trainer"],
        model_name=facts["name"],
        eval_results=[EvalResult(TASKS[kind], "images", data, **result) for result in results] or None,
    )
    condition = {"text": "from captions", "class": "of chosen classes", "none": "without a condition"}[kind]
    origin = f"fine-tuned from {without_absolute_path(source)}" if source else "trained from scratch"
    sections = [
        f"# {facts['name']}",
        f"A latent diffusion model that generates images of {resolution} x {resolution} pixels {condition}, {origin} "
        f"on {data} with [ldm](https://pypi.org/project/ldm-trainer).",
        *([f"![Samples]({SAMPLES_FILE})"] if _samples(run).is_file() else []),
        _usage(run, pipeline, name, is_native),
        _training_data(run, licence),
        _training(run, pipeline),
        metrics,
        f"""## Limits

- The model reflects its training images{" and its initial weights" if source else ""}, with their biases.
- It was trained at {resolution} x {resolution} pixels. Images of other sizes are worse.
- Diffusion models can reproduce training images. If it has been measured, the metrics state the share of samples that
  are closer to a training image than 99% of new images are. About 1% is expected of new images.""",
    ]
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n")


def save_card(card: ModelCard, run: Run, folder: Path) -> None:
    """Write the card, and the samples of the finished training, which it shows."""
    card.save(folder / CARD_FILE)
    if _samples(run).is_file():
        shutil.copy(_samples(run), folder / SAMPLES_FILE)


def _samples(run: Run) -> Path:
    return run.images / "samples_final.png"


def _usage(run: Run, pipeline: LatentDiffusion, name: str, is_native: bool) -> str:
    config, kind = run.config(), pipeline.conditioning.kind
    sampler, guidance = config.get("sampler", {}), config.get("conditioning", {}).get("guidance", 1.0)
    arguments = [f"num_inference_steps={sampler['steps']}"] if "steps" in sampler else []
    arguments += [f"guidance_scale={guidance}"] if kind != "none" else []
    arguments.append("generator=torch.Generator().manual_seed(0)")
    if kind == "text":
        arguments.insert(0, json.dumps(_example_prompt(run), ensure_ascii=False))
    if pipeline.conditioning.class_names:
        arguments.insert(0, f"class_labels={json.dumps(pipeline.conditioning.class_names[0], ensure_ascii=False)}")
    call = "".join(f"    {argument},\n" for argument in arguments)
    notes = ["This needs torch, diffusers and transformers." if kind == "text" else "This needs torch and diffusers."]
    if is_native:
        notes.append(
            "`trust_remote_code` runs the Python files in this folder, which define the pipeline and its models. Read "
            "them first, as you would with any code from others."
        )
    if is_native and _samples(run).is_file() and sampler.get("_target_", "").endswith("DPMSolver"):
        notes.append("The example draws the first of the samples above.")
    return f"""## Use

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({json.dumps(name)}{", trust_remote_code=True" if is_native else ""})
image = pipeline(
{call}).images[0]
image.save("image.png")
```

{" ".join(notes)}"""


def _training_data(run: Run, licence: str | None) -> str:
    facts, accounting = run.facts, run.facts.get("accounting", {})
    data_licence = to_one_line(str(accounting.get("licence") or "not recorded"))
    return f"""## Training data

{to_one_line(str(facts.get("data")))}: {accounting.get("train", "?")} images for training and \
{accounting.get("validation", "?")} for validation, with the SHA-256 `{facts.get("data_fingerprint")}`.

Licence and attribution of the images: {data_licence}. Licence of the weights: {licence or "not stated"}."""


def _training(run: Run, pipeline: LatentDiffusion) -> str:
    facts, config, autoencoder = run.facts, run.config(), pipeline.autoencoder
    stages = [*_autoencoder_run(facts), run]
    size = sum(p.numel() for p in pipeline.network.parameters()) / 1e6
    rows = {
        "network": f"{type(pipeline.network).__name__}, {size:.1f} M parameters",
        "autoencoder": f"{type(autoencoder.model).__name__}, f = {autoencoder.factor}",
        "latent": " x ".join(map(str, pipeline.latent_shape)),
        "chain": f"{pipeline.schedule.name}, T = {pipeline.schedule.num_steps}, prediction {pipeline.prediction}",
        "steps": f"{(facts.get('figures') or {}).get('steps', '?')}, batch size {config.get('batch_size')}",
        "time": " + ".join(f"{stage.facts.get('duration_s', 0) / 60:.1f}" for stage in stages) + " minutes",
        "hardware": ", ".join(str(facts[key]) for key in ("device", "machine", "system") if key in facts),
        "precision": facts.get("precision"),
        "commit": facts.get("commit"),
        "versions": ", ".join(f"{key} {value}" for key, value in facts.get("versions", {}).items()),
    }
    table = "\n".join(f"| {key} | {to_one_line(str(value))} |" for key, value in rows.items())
    options = [without_absolute_path(stage.facts.get("options", [])) for stage in stages]
    commands = "\n".join(to_one_line(shlex.join(["python", "-m", "ldm.train", *words])) for words in options)
    options_of_stage_2 = without_absolute_path({key: config[key] for key in CONFIG_KEYS if key in config})
    return f"""## Training

```
{commands}
```

| | |
|---|---|
{table}

<details><summary>Config of stage 2</summary>

```yaml
{yaml.safe_dump(options_of_stage_2, sort_keys=False)}```

</details>"""


def _autoencoder_run(facts: Mapping[str, Any]) -> list[Run]:
    """Return the run of the autoencoder, if it still exists."""
    try:
        return [Run.open(str(facts.get("vae")))]
    except UserError:
        return []


def _metrics(run: Run) -> tuple[str, list[dict[str, Any]]]:
    """Return the section with the metrics of this run's weights, and the same metrics for the Hub."""
    rows: dict[str, tuple[Metric, dict[str, Any]]] = {}
    notes = []
    if content := _current_metrics(run, EVALUATION_FILE):
        metrics = metrics_from_json(content)
        rows |= {name: (metrics[name], content) for name in METRICS if name in metrics}
        sampler = content.get("sampler", {})
        notes.append(
            f"{content.get('num_samples')} samples by {sampler.get('method')} in {sampler.get('steps')} steps, "
            f"guidance {content.get('guidance')}; features of {content.get('features')}; reference: "
            f"{content.get('num_reference')} images of {content.get('reference')}. Compare FD and KD only if all of "
            "these are equal."
        )
    if content := _current_metrics(run, "likelihood.json"):
        bound = content["chain"]
        rows["bits_per_dim"] = Metric(bound["total"], bound["standard_error"]), content
        notes.append(f"Bits per dimension: an upper bound, on {content['num_images']} images of {content['images']}.")
    if not rows:
        remedy = "Measure them with tools/evaluate.py and tools/likelihood.py, then export again."
        return f"## Metrics\n\nNo metrics have been measured for these weights. {remedy}", []
    table = "\n".join(
        f"| {METRICS[name]} | {metric.value:.3g}{f' +- {error:.2g}' if (error := metric.standard_error) else ''} |"
        for name, (metric, _) in rows.items()
    )
    note = f"{' '.join(notes)} `+-` is a standard error over images, not over training runs."
    results = [
        {
            "metric_type": name,
            "metric_name": METRICS[name],
            "metric_value": round(metric.value, 6),
            "metric_args": {key: content[key] for key in RESULT_SETTINGS if key in content}
            | ({"standard_error": metric.standard_error} if metric.standard_error else {}),
        }
        for name, (metric, content) in rows.items()
    ]
    return f"## Metrics\n\n| metric | value |\n|---|---|\n{table}\n\n{note}", results


def _current_metrics(run: Run, name: str) -> dict[str, Any] | None:
    """Return the content of a file with metrics, if they belong to the run's present weights."""
    content = read_json(run.path / name) if (run.path / name).is_file() else {}
    return content if content.get("weights_sha256") == run_weights_sha256(run) else None


def remove_paths(folder: Path) -> None:
    """Remove the paths from which models were loaded from the configs in a pipeline folder."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.keys() & PATH_KEYS:
            content = {key: value for key, value in content.items() if key not in PATH_KEYS}
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def without_absolute_path(value: Any) -> Any:
    """Replace absolute paths in a plain value, also in options key=PATH, by their last component."""
    if isinstance(value, dict):
        return {key: without_absolute_path(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_absolute_path(item) for item in value]
    if not isinstance(value, str):
        return value
    prefix, separator, path = value.rpartition("=")
    if PurePosixPath(path).is_absolute() or path.startswith("~") or PureWindowsPath(path).is_absolute():
        return f"{prefix}{separator}{PureWindowsPath(path).name}"
    return value


def _hub_licence(description: str | None) -> str | None:
    text = re.sub(r"\s+", "-", (description or "").lower())
    return next((licence for licence in LICENCES if re.search(rf"\b{re.escape(licence)}\b", text)), None)


def _example_prompt(run: Run) -> str:
    """Return the caption of the first sample, which is in the command that training printed."""
    words = shlex.split(str(run.facts.get("next", "")))
    return next((word.removeprefix("prompt=") for word in words if word.startswith("prompt=")), "")
