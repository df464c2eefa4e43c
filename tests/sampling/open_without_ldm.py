"""Program that draws from pipelines with diffusers alone: reads a JSON list of requests, and saves a tensor for each.

`ldm` cannot be imported here, so this file uses none of it.
"""

import importlib.abc
import json
import sys
import warnings


class Hidden(importlib.abc.MetaPathFinder):
    """Makes `import ldm` fail."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ldm":
            raise ImportError("ldm is hidden")


def main() -> None:
    sys.meta_path.insert(0, Hidden())
    warnings.simplefilter("ignore")
    import diffusers
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    folder, pipeline = None, None
    for request in json.load(sys.stdin):
        if request["folder"] != folder:
            folder = request["folder"]
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
            pipeline.set_progress_bar_config(disable=True)
            config = pipeline.scheduler.config
        pipeline.scheduler = getattr(diffusers, request["scheduler"]).from_config(config)
        generators = [torch.Generator().manual_seed(seed) for seed in request["seeds"]]
        images = pipeline(**request["arguments"], generator=generators, output_type="pt").images
        save_file({"images": images.contiguous()}, request["out"])
    assert "ldm" not in sys.modules


if __name__ == "__main__":
    main()
