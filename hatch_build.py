"""Build hook: an editable install carries the start-up line too, and copies nothing else."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

START_UP_LINE = "decdec_eval_hook.pth"


class EditableStartUpLine(BuildHookInterface):
    """Replaces pyproject's force-include in an editable wheel.

    csrc and tasks are read from the checkout there; only the .pth file has to lie in site-packages.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            build_data["force_include_editable"] = {START_UP_LINE: START_UP_LINE}
