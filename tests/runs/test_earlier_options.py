"""ldm.runs.resume: options that were added after a run was started."""

from types import SimpleNamespace

import pytest

from ldm.errors import UserError
from ldm.runs.resume import check_resume_options

UNET = {"network": {"_target_": "unet", "attention_levels": [1]}}
NEW_UNET = {"network": {"_target_": "unet", "attention_levels": [1], "scale_shift": True}}
DIT = {"network": {"_target_": "dit", "depth": 6}}


def resume(saved, new, *options: str) -> str:
    """Return the error of a resume with the config `new` of a run that was started with the config `saved`."""
    run = SimpleNamespace(stage="diffusion", config=lambda: saved, facts={"options": ["stage=diffusion", *options]})
    with pytest.raises(UserError) as error:
        check_resume_options(run, new, ["resume=true"])
    return str(error.value)


def test_run_without_the_option_keeps_the_earlier_behaviour():
    message = resume(UNET, NEW_UNET)
    assert "network.scale_shift was False and is True now" in message
    assert message.endswith("stage=diffusion network.scale_shift=false resume=true")
    earlier = {"network": {**UNET["network"], "scale_shift": False}}
    run = SimpleNamespace(stage="diffusion", config=lambda: UNET, facts={})
    assert check_resume_options(run, earlier, []) == []


def test_printed_command_has_only_options_of_the_saved_network():
    assert resume(DIT, NEW_UNET, "network=dit").endswith("stage=diffusion network=dit resume=true")
    assert resume(UNET, DIT).endswith("stage=diffusion network.scale_shift=false resume=true")
    assert resume(NEW_UNET, DIT).endswith("stage=diffusion resume=true")
