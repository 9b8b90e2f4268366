"""The chat with an engine that answers nothing, as a process that a page shows."""

import os

from tests.tui_pilot import FakeEngine
from tui.app import RingChat

if __name__ == "__main__" and os.environ["TERM"] != "dumb":
    RingChat(FakeEngine()).run()
