"""What a continued run must have in common with the run as it was begun."""

from typing import Any

from ldm.errors import UserError

FACTS = (
    "stage",
    "data_fingerprint",
    "latent_shape",
    "chain_sha256",
    "loss",
    "prediction",
    "variance",
    "pretrained",
    "regulariser",
    "perceptual",
    "adversarial",
    "discriminator",
    "codebook_size",
    "likelihood",
    "trained",
)
"""Of run.json: what must not differ."""


def check_facts(known: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse to continue a run as something else than it was started as, or on another autoencoder's latents.

    Raises:
        UserError: naming the first thing that differs.
    """
    for key in FACTS:
        if key in known and key in facts and known[key] != facts[key]:
            raise UserError(
                f"resume= continues a run whose {key} is {known[key]}, but the options given now make it {facts[key]}. "
                "Give the options that it was started with: they are in its config.yaml."
            )
    then, now = (content.get("contract", {}).get("autoencoder_sha256") for content in (known, facts))
    if then is not None and now is not None and then != now:
        raise UserError(
            f"resume= continues a run on the latents of the autoencoder {str(then)[:12]}, which was in "
            f"vae={known.get('vae')}, but vae={facts.get('vae')} holds {now[:12]}. Name a folder that holds the one that "
            "it was started with, or begin another run with another name=."
        )
