"""The chat's side of ``ring-mlx chat --web``: Textual's driver for a page, which ends with the page's server."""

from __future__ import annotations

from textual import messages
from textual.drivers import web_driver

from tui.paste import PasteParser


class PageDriver(web_driver.WebDriver):
    """Reads keys and pastes from the server."""

    def run_input_thread(self) -> None:
        """Read until the server ends, also where it was killed; then end the application."""
        web_driver.XTermParser = PasteParser  # type: ignore[attr-defined]
        super().run_input_thread()
        if not self.exit_event.is_set():
            self._app.post_message(messages.ExitApp())
