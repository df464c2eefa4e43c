"""Export a trained model for diffusers, with a model card, and optionally upload it to the Hugging Face Hub."""

import shutil
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from omegaconf import DictConfig
from pydantic import Field

from ldm.errors import UserError
from ldm.export.hub import check_upload, upload
from ldm.export.model_card import model_card, remove_paths, save_card, without_absolute_path
from ldm.files.atomic import atomic_folder
from ldm.rules import Flag, apply_rules
from ldm.runs.run import Run
from ldm.sampling.pipeline import VARIANCE_FILE
from ldm.sampling.stock import save_stock


class ExportOptions(TypedDict):
    """Rules for the options of an export."""

    format: Annotated[Literal["native", "stock"], Field()]
    text_encoder: Annotated[Literal["copy", "hub"], Field()]
    private: Flag


def export(config: DictConfig) -> None:
    apply_rules(ExportOptions, config)
    out, is_native = Path(config.out).expanduser(), config.format == "native"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={config.out} already exists. Choose another folder, or remove this one first.")
    if config.push is not None:
        check_upload(config.push)
    run = Run.open(config.run)
    pipeline = run.pipeline()
    encoder = getattr(pipeline.conditioning, "encoder", None)  # of captions
    copies = config.text_encoder == "copy"
    if not copies and not (is_native and encoder is not None and encoder.revision):
        raise UserError(
            "text_encoder=hub needs format=native, and a text encoder that was loaded from the Hugging Face Hub. Use "
            "text_encoder=copy."
        )
    if encoder is not None:
        encoder.name = without_absolute_path(encoder.name)
    name = config.push or out.name
    with atomic_folder(out) as partial:
        if is_native:
            pipeline.save(partial, with_text_encoder=copies)
            if pipeline.z_0_mse is not None:
                shutil.copy(run.pipeline_folder / VARIANCE_FILE, partial)
        else:
            save_stock(pipeline, partial)
        remove_paths(partial)
        save_card(model_card(run, pipeline, name, is_native=is_native, licence=config.license), run, partial)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"pipeline saved to {out} ({size / 1e6:.1f} MB); model card: {out / 'README.md'}")
    if config.push is not None:
        print(f"uploaded to {upload(out, config.push, private=config.private)}")
