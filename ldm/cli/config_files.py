"""Config files as Hydra reads them: those of conf/ are ours, and any other is checked before it is composed."""

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource as HydrasFileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

from ldm.cli.targets import check_composed_file
from ldm.errors import UserError
from ldm.files.untrusted import first_line
from ldm.runtime.paths import folder


class FileConfigSource(HydrasFileConfigSource):
    """Hydra's, which a config outside conf/ passes only as plain values and choices of ours.

    --config-dir, --config-path, hydra.searchpath and a choice with ../ in it all come through here.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path)).resolve()
        if file.is_file() and not file.is_relative_to(folder("conf").resolve()):
            try:
                text = file.read_text(encoding="utf-8")
                package = self._get_header_dict(text[:512]).get("package")
            except (OSError, ValueError) as error:
                raise UserError(f"{file} cannot be read ({first_line(error)}). Choose another config.") from error
            check_composed_file(text, str(file), config_path, package)
        return super().load_config(config_path)


def check_foreign_files() -> None:
    """Have Hydra read files through the check."""
    Plugins.instance()  # Hydra's own sources come first: it leaves one alone that is there already
    SourcesRegistry.instance().types["file"] = FileConfigSource
