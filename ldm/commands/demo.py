"""Generate the demo's images (16 prompts, 16 held-out captions, the reverse chain) and compute its metrics."""

import time
from pathlib import Path

from omegaconf import DictConfig

from ldm.cli import main as command
from ldm.evaluation.samples import report
from ldm.image_grid import grid, to_pil
from ldm.runs.lineage import run_weights_sha256
from ldm.runs.run import EVALUATION_FILE, Run
from ldm.runtime import shell
from ldm.runtime.device import choose_device
from ldm.sampling.draw import draw_batches, film_strip
from ldm.sampling.request import Request

EXPECTED_KD = {1_300: 0.064, 2_300: 0.045, 3_000: 0.038}
"""KD of the samples after so many steps of stage 2, N=512; from runs of the demo on machines of different speeds."""


def demo(config: DictConfig) -> None:
    start = time.perf_counter()
    run = Run.open(config.run)
    vae = Run.open(run.facts["vae"])
    pipeline = run.pipeline().to(choose_device(config.device))
    images = run.image_data()
    sampler = command.construct(config.sampler)
    options = {"guidance": config.guidance, "seed": config.seed}
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)

    captions = images.require_captions()
    grids = {
        "samples.png": ("Sixteen prompts", list(config.prompts)),
        "held_out.png": ("Held-out captions", [captions[i] for i in images.val_indices[:16]]),
    }
    for file, (title, prompts) in grids.items():
        request = Request(*pipeline.conditioning.for_request(prompts=prompts))
        samples = [image for batch in draw_batches(pipeline, request, sampler, **options) for image in to_pil(batch)]
        grid(samples, prompts, columns=4, title=title).save(out / file)
        if file == "samples.png":
            film_strip(pipeline, request, sampler, **options).save(out / "strip.png")

    metrics = vae.facts["figures"]
    print(
        f"Autoencoder on {metrics['val_images']} held-out images: PSNR {metrics['psnr_db']:.2f} dB, SSIM "
        f"{metrics['ssim']:.3f}; PCA with the same latent size {metrics['pca_psnr_db']:.2f} dB; compression "
        f"{metrics['compression']:.1f}"
    )
    if "sampling_level" in metrics:
        print(
            f"Samples are decoded by the sampling decoder, at noise level {metrics['sampling_level']:.2g}. Its PSNR on "
            f"latents without noise is {metrics['sampling_decoder_psnr_db']:.2f} dB"
        )
    options |= {"num_samples": config.num_samples, "weights_sha256": run_weights_sha256(run)}
    evaluation = report.measure_samples(pipeline, images, sampler, run.path / "evaluation", **options)
    metrics_file = report.save_unless_smaller(evaluation, run.path, out / EVALUATION_FILE)
    evaluation.print()
    print(f"all metrics: {metrics_file}")
    print(expected_quality(run))
    demo_s = time.perf_counter() - start
    parts = [("stage 1", vae.facts["duration_s"]), ("stage 2", run.facts["duration_s"]), ("images, metrics", demo_s)]
    total_s = sum(seconds for _, seconds in parts)
    print(f"time: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in parts)}; {total_s / 60:.1f} minutes total")
    print(f"images: {out / 'samples.png'}, {out / 'held_out.png'} and {out / 'strip.png'}")
    print(f"next: {shell.tool_command('sample', f'run={run.path}', 'prompt=red heart')}")


def expected_quality(run: Run) -> str:
    """Describe what to expect of the samples after the run's steps of stage 2, and how to get better ones."""
    steps = run.facts["figures"]["steps"]
    table = "; ".join(f"{count:,} steps, {kd}" for count, kd in EXPECTED_KD.items())
    text = f"Stage 2 made {steps:,} steps. KD in our runs, on machines of different speeds: {table}."
    if steps >= max(EXPECTED_KD):
        return text
    options = ("stage=diffusion", f"name={run.facts['name']}", f"vae={run.facts['vae']}", "overwrite=true")
    command = shell.train_command(*options, "trainer.max_time=00:12:00")
    return f"{text}\nFor better images, train stage 2 for twice the time, then repeat this command: {command}"
